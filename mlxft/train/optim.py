"""Optimiser, learning-rate schedule, clipping, and float32 master weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxft.config import Optim

Arrays = dict[str, mx.array]
REST = ""  # the part of what no other part names
LARGE = 1 << 20  # numbers; from here on a parameter is updated by itself


def learning_rate(settings: Optim, step: int, total: int) -> float:
    """Rate of update `step` (from 0) of `total`: linear warm-up to lr, then constant, linear or cosine to min_lr.

    The first warm-up step has lr / warm-up steps, not 0, so that no step is lost.
    """
    warmup = int(settings.warmup) if settings.warmup >= 1 else math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup) / max(1, total - warmup)
    share = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.min_lr + (settings.lr - settings.min_lr) * share


def make_optimizer(settings: Optim) -> opt.Optimizer:
    """The mlx optimiser; its rate is set before each update. Bias correction is on."""
    s, lr = settings, settings.lr
    decay = s.weight_decay if s.weight_decay is not None else (0.01 if s.name == "adamw" else 0.0)
    betas = list(s.betas or (0.9, 0.999))
    if s.name == "adamw":
        return opt.AdamW(lr, betas=betas, eps=s.eps or 1e-8, weight_decay=decay, bias_correction=True)
    if s.name == "adam":
        return opt.Adam(lr, betas=betas, eps=s.eps or 1e-8, bias_correction=True)
    if s.name == "lion":
        return opt.Lion(lr, betas=list(s.betas or (0.9, 0.99)), weight_decay=decay)
    if s.name == "sgd":
        return opt.SGD(lr, momentum=s.momentum or 0.0, weight_decay=decay)
    if s.name == "adafactor":
        return opt.Adafactor(lr, relative_step=False, scale_parameter=False, weight_decay=decay)
    momentum = 0.95 if s.momentum is None else s.momentum
    return opt.Muon(lr, momentum=momentum, weight_decay=decay)


class Optimizer:
    """Updates a model's trainable parameters in float32.

    Parameters of a lower precision get a float32 master copy: a bfloat16 weight has 8 bits, and most updates of a
    small learning rate would round to nothing.

    Args:
        parts: prefix of parameters' names -> multiplier of their learning rate. Each part is clipped by its own norm
            and counts its own updates: it may be left out of some.
    """

    def __init__(self, settings: Optim, model: nn.Module, parts: Mapping[str, float] | None = None) -> None:
        self._settings = settings
        self._opt = make_optimizer(settings)
        self._rates = {REST: 1.0, **(parts or {})}
        params = _flat(model.trainable_parameters())
        self._master = {n: p.astype(mx.float32) for n, p in params.items() if p.dtype != mx.float32}
        self._opt.init(params | self._master)
        self._steps = {part: mx.array(0, mx.uint64) for part in self._rates}
        owners = {n: next((p for p in parts or () if n.startswith(p)), REST) for n in params}
        self._groups = {part: _groups({n: p for n, p in params.items() if owners[n] == part}) for part in self._rates}
        self._measure: Callable[..., tuple[mx.array, mx.array]] = mx.compile(self._norm_and_factor)
        self._apply: Callable[..., tuple[list[mx.array], list[mx.array], list[Any]]] = mx.compile(self._update)

    def _norm_and_factor(self, squares: list[mx.array], weight: mx.array) -> tuple[mx.array, mx.array]:
        # Divide once, by the whole step's weight: micro-batches differ in trained tokens, and a mean of means would
        # weigh a short row's tokens more than a long one's.
        norm = mx.sqrt(sum(squares, mx.array(0.0))) / weight
        if self._settings.clip is None:
            return norm, 1.0 / weight
        return norm, mx.minimum(self._settings.clip / (norm + 1e-6), 1.0) / weight

    def _update(
        self,
        params: list[mx.array],
        masters: list[mx.array | None],
        states: list[Any],
        grads: list[mx.array],
        scalars: tuple[mx.array, mx.array, mx.array],
    ) -> tuple[list[mx.array], list[mx.array], list[Any]]:
        """One group, without its names: groups of the same shapes share a compiled update."""
        factor, self._opt.state["step"], self._opt.state["learning_rate"] = scalars
        full = [p if m is None else m for p, m in zip(params, masters)]
        new = [self._opt.apply_single(g.astype(mx.float32) * factor, f, s) for g, f, s in zip(grads, full, states)]
        return [n.astype(p.dtype) for n, p in zip(new, params)], new, states

    def step(self, model: nn.Module, grads: Arrays, weight: mx.array, lr: float) -> dict[str, mx.array]:
        """One update from summed gradients, by name.

        Parts of which there is no gradient stay as they are. Works group by group, each put on its way before the
        next: all at once would hold temporaries of all.

        Returns:
            grad_norm, and PART_grad_norm of each further part: norms before clipping, lazy float32 scalars.
        """
        norms: dict[str, mx.array] = {}
        for part, groups in self._groups.items():
            if groups and groups[0][0] in grads:
                name = f"{part.rstrip('.')}_grad_norm" if part else "grad_norm"
                norms[name] = self._step_part(model, part, grads, weight, lr * self._rates[part])
        return norms

    def _step_part(self, model: nn.Module, part: str, grads: Arrays, weight: mx.array, lr: float) -> mx.array:
        squares = []
        for names in self._groups[part]:
            squares.append(sum((grads[n].astype(mx.float32).square().sum() for n in names), mx.array(0.0)))
            mx.async_eval(squares[-1])
        norm, factor = self._measure(squares, weight)
        step, rate = self._steps[part] + 1, mx.array(lr)
        params = _flat(model.trainable_parameters())
        for names in self._groups[part]:
            masters = [self._master.get(n) for n in names]
            rounded, new, states = self._apply(
                [params.pop(n) for n in names],
                masters,
                [self._opt.state[n] for n in names],
                [grads.pop(n) for n in names],
                (factor, step, rate),
            )
            for name, value, state in zip(names, new, states):
                self._opt.state[name] = state
                if name in self._master:
                    self._master[name] = value
            model.update(tree_unflatten(list(zip(names, rounded))))
            # Nothing here may hold on to the old arrays: their memory becomes the new ones'.
            del masters
            mx.async_eval(rounded, new, states)
        self._steps[part] = step
        self._opt.state["step"], self._opt.state["learning_rate"] = step, rate
        return norm

    def arrays(self) -> Arrays:
        """All of its state, by name."""
        state = {f"state.{n}": v for n, v in tree_flatten(self._opt.state)}
        steps = {f"steps.{part}": v for part, v in self._steps.items()}
        return state | steps | {f"master.{n}": v for n, v in self._master.items()}

    def load(self, arrays: Arrays) -> None:
        """Put back what `arrays` gave."""
        assert set(arrays) == set(self.arrays()), "checkpoint of another optimiser"
        # Parameter names hold dots, so the tree is walked as it is and not rebuilt from names.
        self._opt.state = tree_map_with_path(lambda n, _: arrays[f"state.{n}"], self._opt.state)
        self._steps = {part: arrays[f"steps.{part}"] for part in self._steps}
        self._master = {n: arrays[f"master.{n}"] for n in self._master}


def _groups(params: Arrays) -> list[list[str]]:
    """Names that are updated together: the many small parameters in one group, each large one by itself."""
    small = [n for n, p in params.items() if p.size < LARGE]
    return ([small] if small else []) + [[n] for n, p in params.items() if p.size >= LARGE]


def _flat(tree: Any) -> Arrays:
    """Name -> array, without the empty places that models leave in their trees."""
    return dict(tree_flatten(tree))
