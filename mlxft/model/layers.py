"""Layers that mlxft puts into a model and the modes they run in: random state, low-rank layers, routers, gradient
checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from mlxft.device import backend, usable_bytes
from mlxft.errors import ConfigError

# --- random -----------------------------------------------------------------------------------------------------------
# What a model draws: MLX's global random state, a part of it drawn again, and models looked at without a trace.
#
# Randomness within a forward pass (dropout) comes from the global generator. Where a pass is computed twice, for its
# gradient, the second time must draw what the first did: it notes `position` beforehand, and computes again inside
# `again(position)`. MLX's global state can not be put back without waiting for the device, so what is drawn again comes
# from a generator beside it, which gives the same keys.

_replays: list[mx.array] = []  # keys of the generators beside the global one; the last is drawn from


def random_state() -> list[int]:
    """The key of the global generator, two 32-bit numbers. Waits for the device."""
    return _numbers(_global())


def set_random_state(state: list[int]) -> None:
    """Put back what `random_state` gave: a 64-bit seed is the key, upper half first."""
    mx.random.seed(state[0] << 32 | state[1])
    assert random_state() == list(state), "this mlx makes keys of seeds in another way"


def position() -> mx.array:
    """Where drawing stands now: a key, (2,) uint32, lazy."""
    return _replays[-1] if _replays else _global()


@contextmanager
def again(position: mx.array) -> Iterator[None]:
    """Inside the block `Dropout` draws what it drew from `position` on; the global generator stays where it is."""
    _replays.append(mx.stop_gradient(position))
    try:
        yield
    finally:
        _replays.pop()


class Dropout(nn.Dropout):
    """MLX's dropout, whose mask can be drawn `again`."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _replays or self._p_1 == 1 or not self.training:
            return super().__call__(x)
        _replays[-1], key = mx.random.split(_replays[-1])  # as the global generator takes its keys
        mask = mx.random.bernoulli(self._p_1, x.shape, key=key)
        return (mask * x) * (1 / self._p_1)


def repeatable(model: nn.Module) -> None:
    """Let all of a model's dropout be drawn `again`, also what its architecture brought."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout


@contextmanager
def aside() -> Iterator[None]:
    """Whatever is drawn inside the block, the global random state is afterwards as it was."""
    before = _global()
    try:
        yield
    finally:
        if _global() is not before:
            set_random_state(_numbers(before))


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Dropout and the like are off; at the end every module's training flag is as it was.

    Args:
        training: true for the opposite: they are on.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module._training = flag


@contextmanager
def probing(model: nn.Module, training: bool = False) -> Iterator[None]:
    """For a look at a model between steps: as `evaluating`, and the random state is afterwards as it was."""
    with aside(), evaluating(model, training):
        yield


def _global() -> mx.array:
    key: mx.array = mx.random.state[0]  # type: ignore[index]
    return key


def _numbers(key: mx.array) -> list[int]:
    numbers: list[int] = key.tolist()  # type: ignore[assignment]
    return numbers


# --- lora -------------------------------------------------------------------------------------------------------------
# Low-rank layers: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) around a frozen layer.
#
# Parameters carry mlx-lm's names (`lora_a`, `lora_b`, `m`, and the base below `linear` or `embedding`), so that an
# adapter saved here loads there. Two things differ: the scale is an array, so that a compiled function sees it
# change, and the float32 matrices are cast to the activations' type, so that they do not promote bfloat16 ones.

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
LEAVES = ("lora_a", "lora_b", "m")


def dropouts(*modules: nn.Module) -> list[nn.Dropout]:
    """The dropout that acts in modules and what they hold."""
    return [m for module in modules for m in module.modules() if isinstance(m, nn.Dropout) and m._p_1 < 1]


def without_dropout(*modules: nn.Module) -> bool:
    """Take the dropout out of modules and what they hold; whether there was any."""
    found = dropouts(*modules)
    for dropout in found:
        dropout._p_1 = 1.0
    return bool(found)


def dense_weight(base: nn.Module, exact: bool = False) -> mx.array:
    """The weight of a layer, dequantised if it is quantised.

    Args:
        exact: in float32, also while it is unpacked, so that nothing is rounded on the way; else as the scales are.
    """
    weight = base.weight
    if isinstance(base, QUANTIZED):
        scales, biases = base.scales, base.get("biases")
        if exact and biases is not None:  # the other modes have scales of 8 bits
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(weight, scales, biases, group_size=base.group_size, bits=base.bits, mode=base.mode)
    return weight.astype(mx.float32) if exact else weight


class LowRank(nn.Module):
    """What LoRA layers share: dropout and scale. `base` is the frozen layer they wrap."""

    def __init__(self, scale: float, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(p=dropout)
        # Underscored: part of the state that a compiled function reads, but not a parameter.
        self._scale = mx.array(scale, dtype=mx.float32)

    @property
    def base(self) -> nn.Module:
        """The wrapped layer."""
        return self.embedding if "embedding" in self else self.linear

    @property
    def scale(self) -> float:
        """Multiplier of the update."""
        return float(self._scale)

    def delta(self) -> mx.array:
        """The update to the base's weight, in its shape, float32."""
        raise AssertionError(f"{type(self).__name__} has no delta")

    def fused_weight(self, exact: bool = False) -> mx.array:
        """Base weight plus update, float32; `exact` as for `dense_weight`."""
        return dense_weight(self.base, exact).astype(mx.float32) + self.delta()


class LoRALinear(LowRank):
    """y = W x + b + scale * B A x; with `dora`, rows of W + scale * B A are rescaled to the norms `m`."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, dora: bool = False) -> None:
        super().__init__(scale, dropout)
        out_dims, in_dims = dense_weight(base).shape
        self.linear = base
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (in_dims, rank))
        self.lora_b = mx.zeros((rank, out_dims))
        if dora:
            self._norm2 = dense_weight(base).astype(mx.float32).square().sum(axis=1)
            self.m = self._norm2.sqrt()

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        update = ((self.dropout(x) @ a) * self._scale.astype(x.dtype)) @ b
        if "m" not in self:
            return self.linear(x) + update
        out = (self.m / self._adapted_norm()).astype(x.dtype) * (self._product(x) + update)
        return out + self.linear.bias if "bias" in self.linear else out

    def _product(self, x: mx.array) -> mx.array:
        """W x, without the bias."""
        base = self.linear
        if not isinstance(base, nn.QuantizedLinear):
            return x @ base.weight.T
        options = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
        return mx.quantized_matmul(x, base.weight, base.scales, base.get("biases"), transpose=True, **options)

    def _adapted_norm(self) -> mx.array:
        """Row norms of W + scale * B A, (out,), a constant of the gradient (Liu et al. 2024, section 4.3).

        Expanded, so that the adapted weight is never formed: |w|^2 + 2 s <w, d> + s^2 |d|^2 with d = B A.
        """
        a, b, s = (mx.stop_gradient(v) for v in (self.lora_a, self.lora_b, self._scale))
        compute = self.linear.scales.dtype if "scales" in self.linear else self.linear.weight.dtype
        wa = self._product(a.T.astype(compute)).astype(mx.float32)  # (rank, out)
        cross = (wa * b).sum(axis=0)
        own = (b * ((a.T @ a) @ b)).sum(axis=0)
        return (self._norm2 + 2 * s * cross + s * s * own).sqrt()

    def delta(self) -> mx.array:
        return self._scale * (self.lora_b.T @ self.lora_a.T)

    def fused_weight(self, exact: bool = False) -> mx.array:
        weight = super().fused_weight(exact)
        if "m" in self:
            weight = weight * (self.m / weight.square().sum(axis=1).sqrt())[:, None]
        return weight


class LoRASwitchLinear(LowRank):
    """LoRA on the experts of a mixture: one A (rank, in) and B (out, rank) for each."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(scale, dropout)
        self.linear = base
        experts, in_dims, out_dims = base.num_experts, base.input_dims, base.output_dims
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, in_dims))
        self.lora_b = mx.zeros((experts, out_dims, rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = self.dropout(x)
        for factor in (self.lora_a, self.lora_b):
            z = mx.gather_mm(
                z,
                factor.astype(x.dtype).swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return y + z * self._scale.astype(x.dtype)

    def __getattr__(self, key: str) -> Any:
        # Mixture blocks ask their experts for sizes.
        if key in ("input_dims", "output_dims", "num_experts"):
            return getattr(self["linear"], key)
        return super().__getattr__(key)

    def delta(self) -> mx.array:
        return self._scale * (self.lora_b @ self.lora_a)


class LoRAEmbedding(LowRank):
    """LoRA on an embedding, also where it serves as the output head."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(scale, dropout)
        count, dims = dense_weight(base).shape
        self.embedding = base
        bound = 1 / math.sqrt(count)
        self.lora_a = mx.random.uniform(-bound, bound, (count, rank))
        self.lora_b = mx.zeros((rank, dims))

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.embedding(ids)
        z = self.dropout(self.lora_a[ids] @ self.lora_b)
        return y + (self._scale * z).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return self.embedding.as_linear(x) + ((self.dropout(x) @ b.T) * self._scale.astype(x.dtype)) @ a.T

    @property
    def weight(self) -> mx.array:
        """The adapted weight, (tokens, D), without dropout, for architectures whose output layer reads it (minicpm)."""
        weight = dense_weight(self.embedding)
        return weight + self.delta().astype(weight.dtype)

    def delta(self) -> mx.array:
        return self._scale * (self.lora_a @ self.lora_b)


def shift(layer: LowRank) -> mx.array:
    """What fusing adds to the base's weight, in its shape, float32; DoRA's rescaling is part of it."""
    return layer.fused_weight() - dense_weight(layer.base).astype(mx.float32) if "m" in layer else layer.delta()


def adaptable(module: nn.Module) -> bool:
    """Whether a low-rank layer can wrap `module`."""
    # mlx-lm's fused layers are linear ones that give several outputs; they say so by having LoRA of their own.
    return isinstance(module, LINEAR + SWITCH + EMBEDDING) and not hasattr(module, "to_lora")


def wrap(module: nn.Module, rank: int, scale: float, dropout: float, dora: bool) -> LowRank:
    """The low-rank layer for `module`; `dora` is for linear layers."""
    if isinstance(module, LINEAR):
        return LoRALinear(module, rank, scale, dropout, dora)
    assert not dora, "select_targets refuses DoRA elsewhere"
    kind = LoRASwitchLinear if isinstance(module, SWITCH) else LoRAEmbedding
    return kind(module, rank, scale, dropout)


def plain_layer(base: nn.Module, weight: mx.array) -> nn.Module:
    """A layer without quantisation that has `weight` and the base's bias."""
    if isinstance(base, EMBEDDING):
        layer = nn.Embedding(1, 1)
    elif isinstance(base, SWITCH):
        layer = SwitchLinear(1, 1, 1, bias=False)
    else:
        layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    if "bias" in base:
        layer.bias = base.bias
    return layer


# --- routers ----------------------------------------------------------------------------------------------------------
# Routers of mixtures of experts: which layers they are, and what they say while a model runs.

# mlx-lm's mixtures all call it one of these; gate_proj and shared_expert_gate are other layers.
_NAMES = ("gate", "router")
# Files of mlx-lm's whose routers choose experts by a softmax over all of them, and are balanced by nothing else.
SOFTMAX = (
    *("deepseek", "deepseek_v2", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid", "hunyuan", "jamba"),
    *("mellum", "mixtral", "olmoe", "phimoe", "phixtral", "qwen2_moe", "qwen3_moe", "qwen3_next"),
)

Masks = Mapping[tuple[int, ...], mx.array]
_MIXTURES: dict[type, type] = {}


class _Watch(NamedTuple):
    """What is being watched: masks by the shape (B, T) of a call, and block -> (2, E) of what its router has said."""

    masks: Masks
    seen: dict[str, mx.array]


_watch: _Watch | None = None


def is_router(path: str) -> bool:
    """Whether a module, by its full name, is a router or part of one."""
    return any(part in _NAMES for part in path.split("."))


@contextmanager
def watching(masks: Masks | None) -> Iterator[dict[str, mx.array]]:
    """Collect what the routers of a model prepared by `watch_routers` say inside the block, in training mode.

    Args:
        masks: (B, T) -> a mask of that shape, 1 where a token is real. None: nothing is collected.
    Yields:
        Block -> (2, E) float32, sums over the real tokens: how often each expert was chosen, and its probability. The
        gradient flows through the second.
    """
    global _watch
    before, _watch = _watch, None if masks is None else _Watch(masks, {})
    try:
        yield {} if _watch is None else _watch.seen
    finally:
        _watch = before


def watched_masks() -> Masks | None:
    """The masks of the block that is being watched, if one is."""
    return None if _watch is None else _watch.masks


def collect(seen: Mapping[str, mx.array]) -> None:
    """Take what routers said where `watching` looked only on behalf of the block outside (a checkpointed layer)."""
    if _watch is not None:
        for name, sums in seen.items():
            _watch.seen[name] = _watch.seen[name] + sums if name in _watch.seen else sums


def watch_routers(model: nn.Module, setting: str) -> None:
    """Make a model's mixtures tell `watching` what their routers say; before its blocks are checkpointed.

    Raises:
        ConfigError: it has no routers, or of a kind whose balance is not that of a softmax; it names `setting`.
    """
    modules = dict(model.named_modules())
    kinds = {_kind(m) for m in modules.values() if isinstance(m, nn.Module) and any(n in m for n in _NAMES)}
    if not kinds:
        raise ConfigError(f"{setting}: this model has no routers to balance: it is not a mixture of experts")
    if wrong := sorted(kinds.difference(SOFTMAX)):
        raise ConfigError(
            f"{setting}: is for routers that choose by a softmax over all experts and are balanced by nothing else "
            f"({', '.join(SOFTMAX)}); those of {', '.join(wrong)} are not known to: leave it out"
        )
    for path, experts in modules.items():
        if not isinstance(experts, (SwitchGLU, SwitchMLP)):
            continue
        name = path
        while not any(n in modules[name] for n in _NAMES):
            name = name.rpartition(".")[0]
        block = modules[name]
        kind = type(block)
        if kind not in _MIXTURES:
            _MIXTURES[kind] = type(kind.__name__, (kind,), {"__call__": _telling(kind)})
        block._name, block._experts = name, path[len(name) + 1 :]
        block.__class__ = _MIXTURES[kind]


def _kind(module: nn.Module) -> str:
    return type(module).__module__.rpartition(".")[2]


def _telling(kind: type) -> Any:
    """A mixture's call that tells what its router said, and which experts were chosen by it."""

    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if _watch is None or not self.training:  # a probe of the model runs in eval mode
            return kind.__call__(self, x, *args, **kwargs)
        logits, chosen = list[mx.array](), list[mx.array]()

        def of_router(layer: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            logits.append(out if isinstance(layer, (*LINEAR, LowRank)) else given[0] @ layer.weight.T)

        def of_experts(layer: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            chosen.append(given[1])

        # The router is looked up anew at each call: a role may have put another layer there.
        with _in_place(self, _router_path(self), of_router), _in_place(self, self._experts, of_experts):
            out = kind.__call__(self, x, *args, **kwargs)
        mask = _watch.masks[tuple(x.shape[:2])].reshape(-1).astype(mx.float32)
        collect({self._name: _sums(logits[0], chosen[0], mask)})
        return out

    return call


def _router_path(block: nn.Module) -> str:
    """The layer that gives a router's logits, within its block: itself linear, or with one within, or neither."""
    name = next(n for n in _NAMES if n in block)
    linear = (p for p, m in block[name].named_modules() if isinstance(m, (*LINEAR, LowRank)))
    inner = min(linear, key=len, default="")
    return f"{name}.{inner}" if inner else name


def _sums(logits: mx.array, chosen: mx.array, mask: mx.array) -> mx.array:
    """(2, E) of (..., E) logits, (..., k) numbers of the experts that were chosen, and a mask of the N tokens."""
    count = logits.shape[-1]
    chosen = mx.stop_gradient(chosen).reshape(len(mask), -1)
    often = mx.zeros(count).at[chosen.reshape(-1)].add(mx.repeat(mask, chosen.shape[1]))
    shares = mx.softmax(logits.reshape(len(mask), count).astype(mx.float32), axis=-1)
    return mx.stack([mx.stop_gradient(often), (shares * mask[:, None]).sum(axis=0)])


class _Told:
    """Stands in for a layer: runs it, and tells what it was given and gave; is the layer in all else."""

    def __init__(self, layer: nn.Module, tell: Any) -> None:
        self._layer, self._tell = layer, tell

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._layer(*args, **kwargs)
        self._tell(self._layer, args, out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextmanager
def _in_place(block: nn.Module, path: str, tell: Any) -> Iterator[None]:
    """A stand-in where the layer at `path` is, which comes back at the end."""
    owner: Any = block
    *parents, name = path.split(".")
    for part in parents:
        owner = owner[part]
    layer = owner[name]
    # Past nn.Module's own setter, as for a body: parameters are neither counted in nor out.
    dict.__setitem__(owner, name, _Told(layer, tell))
    try:
        yield
    finally:
        dict.__setitem__(owner, name, layer)


# --- memory -----------------------------------------------------------------------------------------------------------

_CHECKPOINTED: dict[type, type] = {}


def _checkpointed(kind: type) -> type:
    """A subclass of a layer's class that keeps only its inputs, and computes the rest again for the gradient."""
    if kind not in _CHECKPOINTED:

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self.training:
                return kind.__call__(self, *args, **kwargs)

            # For the gradient it is called again, when another role may stand in the block and nobody watches.
            own, masks, calls = _contents(self), watched_masks(), count()

            def inner(params: Any, drawn: mx.array, *inputs: Any, **named: Any) -> Any:
                before = _contents(self)
                _put(own)
                try:
                    self.update(params)
                    with again(drawn) if next(calls) else nullcontext(), watching(masks) as seen:
                        return kind.__call__(self, *inputs, **named), seen
                finally:
                    _put(before)  # no tracers are left, and the role that was there

            # Given as an argument, the position is not there before the block's output: masks wait for their turn.
            out, seen = mx.checkpoint(inner)(self.trainable_parameters(), position(), *args, **kwargs)
            collect(seen)
            return out

        _CHECKPOINTED[kind] = type(kind.__name__, (kind,), {"__call__": call, "checkpointed": kind})
    return _CHECKPOINTED[kind]


def _contents(part: Any) -> list[tuple[Any, Any]]:
    """A module and all in it that holds parameters or modules, each with what it holds now."""
    held = list(part) if isinstance(part, list) else dict(part)
    found = [(part, held)]
    for child in held if isinstance(held, list) else held.values():
        if isinstance(child, (dict, list)):
            found += _contents(child)
    return found


def _put(contents: list[tuple[Any, Any]]) -> None:
    """Give all of them back what they held."""
    for part, held in contents:
        if isinstance(part, list):
            part[:] = held
        else:  # past the module's own setters
            dict.clear(part)
            dict.update(part, held)


def checkpoint_layers(model: nn.Module, on: bool = True) -> None:
    """Switch gradient checkpointing of the model's blocks on or off; other models of the same classes are untouched.

    Each block becomes an instance of a subclass of its own class, so any mix of classes will do, and switching
    twice is switching once.
    """
    repeatable(model)
    for layer in model.layers:
        kind = getattr(type(layer), "checkpointed", None)
        if on and kind is None:
            layer.__class__ = _checkpointed(type(layer))
        elif not on and kind is not None:
            layer.__class__ = kind


def is_checkpointed(model: nn.Module) -> bool:
    """Whether the model's blocks are checkpointed."""
    return all(hasattr(type(layer), "checkpointed") for layer in model.layers)


@contextmanager
def limits(limit_gb: float | None, cache_gb: float | None) -> Iterator[None]:
    """Hold MLX to limits inside the block; to be entered once the weights are loaded.

    The memory limit makes MLX wait for running work before it allocates more, and give back freed buffers that it keeps
    for reuse; a limit of these alone would have it allocate anew each step. The wired limit keeps weights resident on
    Metal.
    """
    limit = usable_bytes(limit_gb)
    memory = mx.set_memory_limit(limit)
    cache = mx.set_cache_limit(int(cache_gb * 1e9)) if cache_gb is not None else None
    wired = mx.set_wired_limit(min(limit, usable_bytes())) if backend() == "metal" else None
    try:
        yield
    finally:
        mx.set_memory_limit(memory)
        if cache is not None:
            mx.set_cache_limit(cache)
        if wired is not None:
            mx.set_wired_limit(wired)
