"""Conversations sampled side by side, with KV caches kept from turn to turn, are what whole contexts give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build, scatter
from test_batch_sample import PROMPTS, Words, gemma3, lfm2

from mlxft.model import sampling as sampling_module
from mlxft.model.load import load
from mlxft.model.sampling import Noise, Sampled, Sampling, TurnStart, sample_turns

Kept = dict[int, list[tuple[list[int], bool]]]  # number -> its ids, in pieces, and whether the policy wrote them
# Turns end where it pleases: at one of these, or after 9 tokens.
ENDS = (3, 17, 30, 31)
HOW = Sampling(9, 1.0)


def observed(number: int, turn: int) -> list[int]:
    """From 1 to 13 tokens that depend on the conversation and the turn."""
    return [(5 * number + 3 * turn + k) % 25 + 4 for k in range(1 + (7 * number + 5 * turn) % 13)]


def play(
    model: nn.Module, numbers: int, turns: int = 4, rows: int | None = None, tokenizer: Any = None, seed: int = 0
) -> Kept:
    """Conversations of up to `turns` turns; the one of number i ends after 1 + i % turns of them."""
    kept: Kept = {i: [(list(PROMPTS[i % len(PROMPTS)]), False)] for i in range(numbers)}

    def reply(written: list[tuple[int, Sampled]]) -> list[TurnStart | None]:
        found: list[TurnStart | None] = []
        for number, turn in written:
            kept[number].append((turn.ids, True))
            said = sum(own for _, own in kept[number])
            if said > number % turns:
                found.append(None)
                continue
            kept[number].append((observed(number, said), False))
            found.append(TurnStart(kept[number][-1][0], 9 - number % 3))
        return found

    starts = [TurnStart(kept[i][0][0], 9 - i % 3) for i in kept]
    sample_turns(model, tokenizer or Words(*ENDS), starts, HOW, reply, seed=seed, rows=rows)
    return kept


def logprobs_seen(monkeypatch: pytest.MonkeyPatch) -> list[mx.array]:
    """The log-probabilities (B, V) of each call of `pick`."""
    seen: list[mx.array] = []
    pick = sampling_module.pick

    def record(logits: mx.array, *args: Any) -> mx.array:
        seen.append(nn.log_softmax(logits.astype(mx.float32)))
        return pick(logits, *args)

    monkeypatch.setattr(sampling_module, "pick", record)
    return seen


def again(model: nn.Module, kept: Kept, seed: int = 0) -> list[tuple[mx.array, list[int]]]:
    """For each turn, the log-probabilities (T, V) by one pass over the whole context, and the drawn ids.

    Each is drawn from them by the numbers of its conversation alone.
    """
    keys = mx.random.split(mx.random.key(seed), len(kept))
    found = []
    for number, pieces in kept.items():
        before: list[int] = []
        key = keys[number]
        for ids, own in pieces:
            if own:
                logits = model(mx.array([before + ids]))[0, len(before) - 1 : -1]
                noise = Noise(key[None])
                drawn = [int(sampling_module.pick(row[None], HOW, noise).item()) for row in logits]
                assert drawn == ids
                found.append((nn.log_softmax(logits.astype(mx.float32)), ids))
                key = mx.random.split(key, 3)[2]
            before = before + ids
    return found


def shared() -> nn.Module:
    model = build("afm7")
    scatter(model, 0)
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3", "lfm2", "qwen3_5", "afm7"])
def test_kept_caches_give_what_whole_contexts_give(
    kind: str, make_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities to 1e-4 for caches that are plain, windows of 8 tokens, recurrent, or take no padding."""
    own = {"gemma3": gemma3, "lfm2": lfm2, "afm7": shared}
    model = own[kind]() if kind in own else load(str(make_model_dir(tmp_path / kind, kind)), dtype="float32").model
    assert sampling_module.pads(model, later=True) is (kind in ("llama", "gemma3"))
    seen = logprobs_seen(monkeypatch)
    kept = play(model, 13)
    steps, seen[:] = list(seen), []
    assert {sum(own for _, own in pieces) for pieces in kept.values()} == {1, 2, 3, 4}
    lengths = {len(ids) for pieces in kept.values() for ids, own in pieces if own}
    assert len(lengths) > 3, "turns end at unequal times"
    for logprobs, _ in again(model, kept):
        for row in logprobs:  # each stands among what the batch was drawn from
            apart = min(float(mx.abs(step - row).max(axis=-1).min()) for step in steps)
            assert apart < 1e-4


def test_rows_side_by_side_change_nothing(tiny_model: Any) -> None:
    """Whatever the number of conversations decoded at one time: each has random numbers of its own."""
    first = play(tiny_model.model, 13)
    assert all(play(tiny_model.model, 13, rows=rows) == first for rows in (1, 2, 5))
    assert play(tiny_model.model, 13, seed=1) != first


def test_a_batch_needs_few_calls(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 conversations of four turns side by side take under a tenth of the model's calls of one after the other."""
    calls = []
    inner = type(tiny_model.model).__call__

    def counted(self: Any, ids: mx.array, *args: Any, **named: Any) -> mx.array:
        calls.append(ids.shape)
        return inner(self, ids, *args, **named)

    monkeypatch.setattr(type(tiny_model.model), "__call__", counted)
    taken = []
    for rows in (64, 1):
        calls.clear()
        play(tiny_model.model, 64, rows=rows)
        taken.append(len(calls))
    assert taken[0] < taken[1] / 10, taken
