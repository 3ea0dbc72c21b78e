"""MLX's global random state, read and put back."""

from __future__ import annotations

import mlx.core as mx


def random_state() -> list[int]:
    """The key of the global generator, two 32-bit numbers."""
    upper, lower = mx.random.state[0]  # type: ignore[index]
    return [int(upper.item()), int(lower.item())]


def set_random_state(state: list[int]) -> None:
    """Put back what `random_state` gave: a 64-bit seed is the key, upper half first."""
    mx.random.seed(state[0] << 32 | state[1])
    assert random_state() == list(state), "this mlx makes keys of seeds in another way"
