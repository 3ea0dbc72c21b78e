"""Routers of mixtures of experts: which layers they are, and what they say while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlxft.errors import ConfigError
from mlxft.model.lora import LINEAR, LowRank

# mlx-lm's mixtures all call it one of these; gate_proj and shared_expert_gate are other layers.
NAMES = ("gate", "router")
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
    return any(part in NAMES for part in path.split("."))


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
    kinds = {_kind(m) for m in modules.values() if isinstance(m, nn.Module) and any(n in m for n in NAMES)}
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
        while not any(n in modules[name] for n in NAMES):
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
    name = next(n for n in NAMES if n in block)
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
