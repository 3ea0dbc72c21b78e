"""Update parameters: optimisers, learning-rate schedules, clipping, and float32 master weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxft.config import Group, OptimSettings
from mlxft.distributed import assign
from mlxft.errors import CheckpointError, ConfigError, nearest
from mlxft.model.adapters import layer_paths, matches
from mlxft.model.heads import CRITIC
from mlxft.model.layers import LINEAR, SWITCH, LowRank
from mlxft.model.shard import exchanged

Arrays = dict[str, mx.array]
_B = "lora_b"  # of an adapter: the factor that starts at zero
REST = ""  # the part of all parameters that no other part names
LARGE = 1 << 20  # a parameter with at least this many numbers is updated alone


def learning_rate(settings: OptimSettings, step: int, total: int) -> float:
    """Return the learning rate of `step` (from 0) of `total`: linear warm-up to lr, then the schedule down to min_lr.

    The first warm-up step has lr / warm-up steps, not 0, so that no step is wasted.
    """
    warmup = int(settings.warmup) if settings.warmup >= 1 else math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup) / max(1, total - warmup)
    share = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.min_lr + (settings.lr - settings.min_lr) * share


class Muon(opt.AdamW):
    """Muon for hidden matrices (Jordan et al. 2024), AdamW for all other parameters.

    The momentum of a matrix is orthogonalised, and scaled so that updates of every shape have the root mean square
    that AdamW's usually have, 0.2 (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4), so that one learning
    rate is right for both. Weight decay is decoupled in both: w <- w - lr (0.2 sqrt(max(rows, columns)) O + decay w).

    Args:
        matrices: names of the parameters that Muon updates; the last two dimensions of each are a matrix, those
            before them number the matrices (experts).
    """

    def __init__(self, matrices: Iterable[str], momentum: float, **adamw: Any) -> None:
        super().__init__(**adamw)
        self._matrices, self.momentum = frozenset(matrices), momentum

    def init(self, parameters: Arrays) -> None:
        """Prepare the state of parameters by name: momentum for a matrix, AdamW's moments for the others."""
        self.state |= {n: {"momentum": mx.zeros_like(p)} for n, p in parameters.items() if n in self._matrices}
        super().init(parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Return the parameter after one update."""
        if "momentum" not in state:
            return super().apply_single(gradient, parameter, state)
        b, lr = self.momentum, self.learning_rate
        state["momentum"] = b * state["momentum"] + (1 - b) * gradient
        update = orthogonalised((1 - b) * gradient + b * state["momentum"])  # Nesterov momentum
        scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
        return parameter * (1 - lr * self.weight_decay) - lr * scale * update


def orthogonalised(matrices: mx.array, steps: int = 5) -> mx.array:
    """Return approximately U V^T for matrices U S V^T, shape (..., rows, columns), by Newton-Schulz (Jordan 2024).

    Each step maps the singular values, first divided by the Frobenius norm, by 3.4445 s - 4.775 s^3 + 2.0315 s^5;
    five steps bring all but tiny ones to between 0.7 and 1.2. A matrix of zeros stays zero.
    """
    x = matrices / (mx.sqrt(matrices.square().sum(axis=(-2, -1), keepdims=True)) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-2, -1) if tall else x
    for _ in range(steps):
        gram = x @ x.swapaxes(-2, -1)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * (gram @ gram)) @ x
    return x.swapaxes(-2, -1) if tall else x


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of trainable matrices in the model's blocks: linear layers, experts and low-rank factors.

    Embeddings, the output layer, scalar heads, norms, biases, convolutions and the arrays of state-space layers are
    not included.
    """
    modules = dict(model.named_modules())
    blocks = tuple(f"{path}." for path in layer_paths(model)) if hasattr(model, "layers") else ()
    found = set()
    for name in _flat(model.trainable_parameters()):
        # The parameters of a separate critic contain their names in the model.
        path, _, leaf = name.removeprefix(f"{CRITIC}.role.").replace("/", ".").rpartition(".")
        owner = modules.get(path)
        layer = owner.base if isinstance(owner, LowRank) else owner
        if path.startswith(blocks) and isinstance(layer, LINEAR + SWITCH) and leaf in ("weight", "lora_a", "lora_b"):
            found.add(name)
    return found


def make_optimizer(settings: OptimSettings, model: nn.Module) -> opt.Optimizer:
    """Return the mlx optimiser, with bias correction; its learning rate is set before each update."""
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
    return Muon(hidden_matrices(model), momentum, learning_rate=lr, weight_decay=decay, bias_correction=True)


class Bundle(NamedTuple):
    """Parameters that are updated together.

    Attributes:
        scale: learning rate as a multiple of the run's.
        decay: weight decay; None means the optimiser's.
    """

    names: list[str]
    scale: float
    decay: float | None


def group_of(groups: Sequence[Group], names: Iterable[str]) -> dict[str, int]:
    """Return the index of the first group that matches each parameter; parameters without a group are left out.

    Raises:
        ConfigError: a group matches no parameter.
    """
    known, found = list(names), dict[str, int]()
    for i, group in enumerate(groups):
        pattern = group.match
        if pattern.startswith("re:"):
            hits = [n for n in known if re.search(pattern[3:], n)]
        else:
            hits = [n for n in known if matches(n, pattern)]
        mine = [n for n in hits if n not in found]
        if not mine:
            why = "no parameter that is trained" if not hits else "only parameters that earlier groups match"
            raise ConfigError(f"optim.groups: {pattern!r} matches {why}{'' if hits else _near(pattern, known)}")
        found |= dict.fromkeys(mine, i)
    return found


def _near(pattern: str, names: list[str]) -> str:
    """Return a suggestion for a pattern that matches nothing, and some of the names."""
    parts = [n.split(".") for n in names]
    pieces = {".".join(p[i : i + size]) for p in parts for size in (1, 2, 3) for i in range(len(p) - size + 1)}
    shown = ", ".join(names[:: max(1, len(names) // 3)][:3])
    return f"{nearest(pattern, sorted(pieces, key=len))}; there are {len(names)}, such as {shown}"


class Optimizer:
    """Updates a model's trainable parameters in float32.

    Parameters of lower precision get a float32 master copy: a bfloat16 weight has 8 bits of precision, and most
    updates at a small learning rate would be lost in rounding.

    Args:
        parts: prefix of parameter names -> multiplier of their learning rate. Each part is clipped by its own norm and
            counts its own updates, because a step may leave it out.
        lora_plus: multiplier of the learning rate of adapters' B, beside that of its part or group; None: 1.
        group: ranks that share the work: each keeps the state and master copies of its own parameters only, updates
            them, and gets the others' from their ranks, so that all have the same bits (stage 1 of ZeRO, Rajbhandari
            et al. 2020). All of them must have the whole summed gradients. None: this process does it all.
    Attributes:
        scales: pattern of each group in the settings -> its learning rate as a multiple of the run's; and, with
            lora_plus, lora_b -> that of B.
    Raises:
        ConfigError: a group matches no parameter.
    """

    def __init__(
        self,
        settings: OptimSettings,
        model: nn.Module,
        parts: Mapping[str, float] | None = None,
        lora_plus: float | None = None,
        group: mx.distributed.Group | None = None,
    ) -> None:
        self._settings, self._group = settings, group
        rates = {REST: 1.0, **(parts or {})}
        self._steps = dict.fromkeys(rates, mx.array(0, mx.uint64))
        self.begin(model)
        params = _flat(model.trainable_parameters())
        owners = {n: next((p for p in parts or () if n.startswith(p)), REST) for n in params}
        self.scales = {g.match: _scale(g, settings) for g in settings.groups}
        if lora_plus is not None:
            self.scales[_B] = self.scales.get(_B, 1.0) * lora_plus
        grouped = group_of(settings.groups, params)
        self._bundles = {
            part: _bundles({n: p for n, p in params.items() if owners[n] == part}, settings, grouped, rate, lora_plus)
            for part, rate in rates.items()
        }
        self._measure: Callable[..., tuple[mx.array, mx.array]] = mx.compile(self._norm_and_factor)
        # Compile once for each decay, because the optimiser reads it as a Python number while it is traced.
        decays = {b.decay for bundles in self._bundles.values() for b in bundles}
        self._apply: dict[float | None, Callable[..., Any]] = {d: mx.compile(self._update_by(d)) for d in decays}

    def begin(self, model: nn.Module) -> None:
        """Start over from the model's current parameters, as if there had been no update."""
        params = _flat(model.trainable_parameters())
        rank, size = (0, 1) if self._group is None else (self._group.rank(), self._group.size())
        self._owner = dict(zip(params, assign([p.nbytes for p in params.values()], [1.0] * size)))
        own = {n: p for n, p in params.items() if self._owner[n] == rank}
        self._opt = make_optimizer(self._settings, model)
        self._master = {n: p.astype(mx.float32) for n, p in own.items() if p.dtype != mx.float32}
        self._opt.init(own | self._master)
        self._steps = {part: mx.array(0, mx.uint64) for part in self._steps}
        # The shapes of the whole state, which is never evaluated.
        whole = make_optimizer(self._settings, model)
        whole.init(zeros := {n: mx.zeros(p.shape) for n, p in params.items()})
        masters = {f"master.{n}": zeros[n] for n, p in params.items() if p.dtype != mx.float32}
        self._like = {f"state.{n}": v for n, v in tree_flatten(whole.state)} | masters
        self._state_owner = {
            name: self._owner[n] for n in params for name in (f"master.{n}", *_leaves(f"state.{n}", whole.state[n]))
        }

    def _norm_and_factor(self, squares: list[mx.array], weight: mx.array) -> tuple[mx.array, mx.array]:
        # Divide by the whole step's weight: micro-batches differ in trained tokens, and a mean of means would count a
        # short row's tokens more than a long one's.
        norm = mx.sqrt(sum(squares, mx.array(0.0))) / weight
        if self._settings.clip is None:
            return norm, 1.0 / weight
        return norm, mx.minimum(self._settings.clip / (norm + 1e-6), 1.0) / weight

    def _update_by(self, decay: float | None) -> Callable[..., tuple[list[mx.array], list[mx.array], list[Any]]]:
        """Return the update of a bundle with this decay; it uses no names, so bundles of equal shapes share it."""
        own = getattr(self._opt, "weight_decay", 0.0)

        def update(
            params: list[mx.array],
            masters: list[mx.array | None],
            states: list[Any],
            grads: list[mx.array],
            scalars: tuple[mx.array, mx.array, mx.array],
        ) -> tuple[list[mx.array], list[mx.array], list[Any]]:
            self._opt.weight_decay = own if decay is None else decay
            factor, self._opt.state["step"], self._opt.state["learning_rate"] = scalars
            full = [p if m is None else m for p, m in zip(params, masters)]
            new = [self._opt.apply_single(g.astype(mx.float32) * factor, f, s) for g, f, s in zip(grads, full, states)]
            return [n.astype(p.dtype) for n, p in zip(new, params)], new, states

        return update

    def step(self, model: nn.Module, grads: Arrays, weight: mx.array, lr: float) -> dict[str, mx.array]:
        """Update the parameters from summed gradients, by name.

        Parts without a gradient stay unchanged. Bundles are evaluated one after the other: all at once would hold the
        temporaries of all in memory. With a group, the loop waits here until the ranks have exchanged parameters.

        Returns:
            grad_norm, and PART_grad_norm for each further part: norms before clipping, as lazy float32 scalars.
        """
        norms: dict[str, mx.array] = {}
        updated: list[str] = []
        for part, bundles in self._bundles.items():
            if bundles and bundles[0].names[0] in grads:
                updated += [n for bundle in bundles for n in bundle.names]
                name = f"{part.rstrip('.')}_grad_norm" if part else "grad_norm"
                norms[name] = self._step_part(model, part, grads, weight, lr)
        if self._group is not None and self._group.size() > 1:
            params = _flat(model.trainable_parameters())
            params = {n: params[n] for n in updated}
            like = {n: mx.zeros(p.shape, p.dtype) for n, p in params.items()}
            own = {n: p for n, p in params.items() if n in self._opt.state}
            del params
            for found in exchanged(own, like, self._owner, self._group):
                model.update(tree_unflatten(list(found.items())))
        return norms

    def _step_part(self, model: nn.Module, part: str, grads: Arrays, weight: mx.array, lr: float) -> mx.array:
        squares = []
        for names, _, _ in self._bundles[part]:
            squares.append(sum((grads[n].astype(mx.float32).square().sum() for n in names), mx.array(0.0)))
            mx.async_eval(squares[-1])
        norm, factor = self._measure(squares, weight)
        step = self._steps[part] + 1
        params = _flat(model.trainable_parameters())
        for every, scale, decay in self._bundles[part]:
            names = [n for n in every if n in self._opt.state]
            for n in set(every).difference(names):  # another rank's
                del params[n], grads[n]
            if not names:
                continue
            masters = [self._master.get(n) for n in names]
            rounded, new, states = self._apply[decay](
                [params.pop(n) for n in names],
                masters,
                [self._opt.state[n] for n in names],
                [grads.pop(n) for n in names],
                (factor, step, mx.array(lr * scale)),
            )
            for name, value, state in zip(names, new, states):
                self._opt.state[name] = state
                if name in self._master:
                    self._master[name] = value
            model.update(tree_unflatten(list(zip(names, rounded))))
            # Drop all references to the old arrays, so that the new ones can reuse their memory.
            del masters
            mx.async_eval(rounded, new, states)
        self._steps[part] = step
        self._opt.state["step"], self._opt.state["learning_rate"] = step, mx.array(lr)
        return norm

    def arrays(self) -> Arrays:
        """Return the state of the optimiser that this process holds, by name."""
        state = {f"state.{n}": v for n, v in tree_flatten(self._opt.state)}
        steps = {f"steps.{part}": v for part, v in self._steps.items()}
        return state | steps | {f"master.{n}": v for n, v in self._master.items()}

    def gathered(self, keep: bool = True) -> Arrays:
        """Return the whole state by name, as `arrays` returns it where one process holds it all; all ranks call this.

        Args:
            keep: false for a rank that only takes part: it holds some of the state at a time, and returns nothing.
        """
        held = self.arrays()
        if self._group is None or self._group.size() == 1:
            return held
        owned = {n: v for n, v in self._like.items() if n in self._state_owner}
        found = {n: v for n, v in held.items() if n not in owned}
        for part in exchanged(held, owned, self._state_owner, self._group):
            found |= part if keep else {}
        return found if keep else {}

    def renewed(self, model: nn.Module) -> tuple[int, int]:
        """Return the bytes that an update allocates, with masters and state, before it frees the old arrays.

        Returns:
            Bytes for the largest parameter, which are always needed, and for the largest bundle, if there is room.
        """
        sizes: dict[str, int] = {}
        for name, value in _flat(model.trainable_parameters()).items():
            master = self._master[name].nbytes if name in self._master else 0
            state = sum(v.nbytes for _, v in tree_flatten(self._opt.state.get(name, {})))
            sizes[name] = value.nbytes + master + state
        bundles = [bundle.names for bundles in self._bundles.values() for bundle in bundles]
        return max(sizes.values(), default=0), max((sum(sizes[n] for n in names) for names in bundles), default=0)

    def load(self, arrays: Arrays) -> None:
        """Restore the whole state that `gathered` returned, on any number of ranks; each keeps what is its own.

        Raises:
            CheckpointError: the state is from another optimiser or another version of mlxft.
        """
        if set(arrays) != self._like.keys() | {f"steps.{part}" for part in self._steps}:
            raise CheckpointError(
                f"the checkpoint's optimiser state does not fit {self._settings.name} in this version of mlxft; start "
                "a new run, if you like from the adapter or model of this one (model.adapter, or model.path)"
            )
        # Parameter names contain dots, so walk the existing tree instead of building one from names.
        self._opt.state = tree_map_with_path(lambda n, _: arrays[f"state.{n}"], self._opt.state)
        self._steps = {part: arrays[f"steps.{part}"] for part in self._steps}
        self._master = {n: arrays[f"master.{n}"] for n in self._master}


def _leaves(name: str, state: Any) -> list[str]:
    """Return the names of the arrays in the state of one parameter."""
    return [f"{name}.{leaf}" if leaf else name for leaf, _ in tree_flatten(state)]


def _scale(group: Group, settings: OptimSettings, rate: float = 1.0) -> float:
    """Return a group's learning rate as a multiple of the run's, within a part whose multiple is `rate`."""
    return group.lr / settings.lr if group.lr is not None else rate * (1.0 if group.scale is None else group.scale)


def _bundles(
    params: Arrays, settings: OptimSettings, grouped: dict[str, int], rate: float, lora_plus: float | None
) -> list[Bundle]:
    """Return the bundles of all groups: one for a group's small parameters of one rate, and one for each large one."""
    groups, bundles = settings.groups, list[Bundle]()
    for i in (None, *range(len(groups))):
        mine = [n for n in params if grouped.get(n) == i]
        scale = rate if i is None else _scale(groups[i], settings, rate)
        decay = None if i is None else groups[i].weight_decay
        for of_b in (False, True):
            names = [n for n in mine if (lora_plus is not None and n.endswith(_B)) is of_b]
            own = scale * lora_plus if lora_plus is not None and of_b else scale
            small = [n for n in names if params[n].size < LARGE]
            each = ([small] if small else []) + [[n] for n in names if params[n].size >= LARGE]
            bundles += [Bundle(names, own, decay) for names in each]
    return bundles


def _flat(tree: Any) -> Arrays:
    """Return name -> array, without the empty nodes that models leave in their trees."""
    return dict(tree_flatten(tree))
