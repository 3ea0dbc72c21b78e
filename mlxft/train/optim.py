"""Optimiser, learning-rate schedule, clipping, and float32 master weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxft.config import Optim

Arrays = dict[str, mx.array]


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
    """

    def __init__(self, settings: Optim, model: nn.Module) -> None:
        self._settings = settings
        self._opt = make_optimizer(settings)
        params = _flat(model.trainable_parameters())
        self._master = {n: p.astype(mx.float32) for n, p in params.items() if p.dtype != mx.float32}
        self._opt.init(params | self._master)
        self._apply: Callable[..., tuple[Arrays, Arrays, Any, mx.array]] = mx.compile(self._update)

    def _update(
        self, params: Arrays, master: Arrays, state: Any, grads: Arrays, weight: mx.array, lr: mx.array
    ) -> tuple[Arrays, Arrays, Any, mx.array]:
        # Divide once, by the whole step's weight: micro-batches differ in trained tokens, and a mean of means would
        # weigh a short row's tokens more than a long one's.
        grads = {n: g.astype(mx.float32) / weight for n, g in grads.items()}
        norm = mx.sqrt(sum((g.square().sum() for g in grads.values()), mx.array(0.0)))
        if self._settings.clip is not None:
            shrink = mx.minimum(self._settings.clip / (norm + 1e-6), 1.0)
            grads = {n: g * shrink for n, g in grads.items()}
        self._opt.state = state
        self._opt.state["learning_rate"] = lr
        new: Arrays = self._opt.apply_gradients(grads, params | master)
        rounded = {n: p.astype(params[n].dtype) for n, p in new.items()}
        return rounded, {n: new[n] for n in master}, self._opt.state, norm

    def step(self, model: nn.Module, grads: Any, weight: mx.array, lr: float) -> mx.array:
        """One update from summed gradients. Returns the gradient's norm before clipping, a lazy float32 scalar."""
        params = _flat(model.trainable_parameters())
        new, self._master, self._opt.state, norm = self._apply(
            params, self._master, self._opt.state, _flat(grads), weight, mx.array(lr)
        )
        model.update(tree_unflatten(list(new.items())))
        return norm

    def arrays(self) -> Arrays:
        """All of its state, by name."""
        state = {f"state.{n}": v for n, v in tree_flatten(self._opt.state)}
        return state | {f"master.{n}": v for n, v in self._master.items()}

    def load(self, arrays: Arrays) -> None:
        """Put back what `arrays` gave."""
        assert set(arrays) == set(self.arrays()), "checkpoint of another optimiser"
        # Parameter names hold dots, so the tree is walked as it is and not rebuilt from names.
        self._opt.state = tree_map_with_path(lambda n, _: arrays[f"state.{n}"], self._opt.state)
        self._master = {n: arrays[f"master.{n}"] for n in self._master}


def _flat(tree: Any) -> Arrays:
    """Name -> array, without the empty places that models leave in their trees."""
    return dict(tree_flatten(tree))
