"""What a model draws: MLX's global random state, a part of it drawn again, and models looked at without a trace.

Randomness within a forward pass (dropout) comes from the global generator. Where a pass is computed twice, for its
gradient, the second time must draw what the first did: it notes `position` beforehand, and computes again inside
`again(position)`. MLX's global state can not be put back without waiting for the device, so what is drawn again comes
from a generator beside it, which gives the same keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

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
