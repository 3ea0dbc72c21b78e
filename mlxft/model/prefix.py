"""Several answers to one prompt, which is computed once for all of them.

The prompts go through the model first, the answers after them, each seeing the keys and values that its prompt left:
what a KV cache does, with the gradient flowing through it. Positions go on where each prompt ends, so an answer's
hidden states are those that it has behind its prompt; whether an architecture gives them is tried on a few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlxft.model.heads import head_of, read_scores
from mlxft.model.layers import is_checkpointed, probing
from mlxft.model.logits import ATTENTION, Split, hidden_logprobs, rows_logprobs


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token ids as a model reads them: whole rows, or completions apart from their prompts, each computed once.

    Attributes:
        ids: (B, T) whole rows, padded on the right; or (R, A) completions, where there are `prompts`.
        segments: (B, T) number of the packed row that a token belongs to, from 1, 0 for padding; None: one a row.
        prompts, begins, of: (P, T) prompts, (P,) their lengths, and (R,) the prompt of each completion.
    """

    ids: mx.array
    segments: mx.array | None = None
    prompts: mx.array | None = None
    begins: mx.array | None = None
    of: mx.array | None = None


@dataclass(frozen=True, kw_only=True)
class ScoredRows(Rows):
    """Rows that a head scores.

    Attributes:
        last: (B,) position of the last real token of whole rows; with prompts, its index in the flat tokens of the
            prompts and then of the completions.
        lengths: (B,) tokens of the completions, float32.
    """

    last: mx.array
    lengths: mx.array


@dataclass(frozen=True, kw_only=True)
class Completions(ScoredRows):
    """Completions of whose N tokens log-probabilities are read.

    Attributes:
        positions: (N,) flat index that predicts a token; with prompts, in the flat tokens of both.
        labels: (N,) the tokens.
        owners: (N,) the completion that each belongs to.
    """

    positions: mx.array
    labels: mx.array
    owners: mx.array


# Tokens of the trial: prompts, and the answers' prompts and lengths.
_PROMPTS, _ANSWERS = (5, 3), ((0, 4), (1, 3), (0, 2), (1, 4))


class _Prompt:
    """Stands in for a layer's KV cache while prompts are read, and keeps their keys and values."""

    offset = 0
    keys: mx.array
    values: mx.array

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """As the model would make it by itself."""
        from mlx_lm.models.base import create_causal_mask

        if return_array or (window_size and window_size < N):
            mask: mx.array = create_causal_mask(N, window_size=window_size)
            return mask
        return None if N == 1 else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The prompts' own: nothing came before."""
        self.keys, self.values = keys, values
        return keys, values


class _Answer:
    """Stands in for a layer's KV cache while answers are read: each sees its prompt, and itself so far."""

    def __init__(self, prompt: _Prompt, begins: mx.array, of: mx.array, axes: int) -> None:
        self._prompt, self._of, self._axes = prompt, of, axes
        self.offset = begins[of]  # (R,)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """(R, 1, N, P + N) bool: prompts are padded, and the padding is not seen."""
        width = self._prompt.keys.shape[-2]
        own, begins = mx.arange(N), self.offset[:, None]
        keys = mx.concatenate([mx.broadcast_to(mx.arange(width), (len(begins), width)), begins + own], axis=1)
        real = mx.concatenate([mx.arange(width) < begins, mx.ones((len(begins), N), dtype=mx.bool_)], axis=1)
        distance = (begins + own)[:, :, None] - keys[:, None, :]
        mask = real[:, None, :] & (distance >= 0)
        if window_size is not None:
            mask = mask & (distance < window_size)
        return mx.expand_dims(mask, tuple(range(1, 1 + self._axes)))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The prompt's and the answer's own."""
        before = self._prompt.keys[self._of], self._prompt.values[self._of]
        return mx.concatenate([before[0], keys], axis=-2), mx.concatenate([before[1], values], axis=-2)


class Sharing:
    """A model's answers to judge, with each prompt computed once where that is possible.

    Args:
        split: of any mlx-lm model, with or without adapters.
    """

    def __init__(self, split: Split) -> None:
        self.split, self._axes = split, 1

    @property
    def possible(self) -> bool:
        """Whether prompts may be shared now: what a checkpointed block computes again would not know its prompt."""
        return not self.reason and not is_checkpointed(self.split.model)

    @cached_property
    def thinkable(self) -> bool:
        """Whether prompts may be shared, as far as shapes tell, and then with how many axes of heads; the model needs
        no weights, and its own layers."""
        if not self._of_the_kind():
            return False
        with probing(self.split.model):
            for self._axes in (2, 1):
                if self._shapes():
                    return True
        return False

    def _of_the_kind(self) -> bool:
        return self.split.separable and not {type(c).__name__ for c in self._caches()} - set(ATTENTION)

    @cached_property
    def reason(self) -> str:
        """Why the model can not share prompts; empty if it can."""
        model = self.split.model
        if not self._of_the_kind():
            return "the body is not separable, or keeps more than keys and values"
        with probing(model):
            for self._axes in (2, 1):
                reason = self._trial()
                if not reason:
                    break
        return reason

    def logprobs(self, a: Completions, *, grad: bool) -> mx.array:
        """(N,) float32 log-probabilities of the answers' tokens, in nats."""
        if a.prompts is None:
            return rows_logprobs(self.split, a.ids, a.positions, a.labels, grad=grad)
        return hidden_logprobs(self.split, self.hidden(a)[a.positions], a.labels, grad=grad)

    def scores(self, a: ScoredRows) -> mx.array:
        """(R,) float32 scores of the answers, by the model's head."""
        if a.prompts is None:
            return read_scores(self.split, a.ids, a.last)
        head = head_of(self.split.model)
        assert head is not None, "attach_head first"
        return head(self.hidden(a)[a.last])

    def _caches(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        return list(make_prompt_cache(self.split.model))

    def hidden(self, a: Rows) -> mx.array:
        """Hidden states of a batch, flat: (B x T, D) of whole or packed rows, else (B x P + R x A, D)."""
        if a.prompts is None:
            whole = self.split.hidden(a.ids, a.segments)
            return whole.reshape(-1, whole.shape[-1])
        assert a.begins is not None
        assert a.of is not None
        first = [_Prompt() for _ in self._caches()]
        before = self.split.hidden(a.prompts, caches=first)
        after = self.split.hidden(a.ids, caches=[_Answer(p, a.begins, a.of, self._axes) for p in first])
        return mx.concatenate([h.reshape(-1, h.shape[-1]) for h in (before, after)])

    def _shapes(self) -> bool:
        """Whether the model takes masks of so many axes of heads; nothing is computed."""
        zeros = {"prompts": mx.zeros((2, 5)), "begins": mx.zeros(2), "ids": mx.zeros((4, 3)), "of": mx.zeros(4)}
        try:
            found = self.hidden(Rows(**{k: v.astype(mx.int32) for k, v in zeros.items()}))
        except Exception:  # whatever a model's own code raises on being called so
            return False
        return found.shape[0] == 2 * 5 + 4 * 3

    def _trial(self) -> str:
        """What is wrong with the answers' hidden states next to those of each row as a whole; empty if nothing."""
        rng, width, longest = np.random.default_rng(0), max(_PROMPTS), max(n for _, n in _ANSWERS)
        prompts = rng.integers(0, 8, (len(_PROMPTS), width)).astype(np.int32)
        ids = rng.integers(0, 8, (len(_ANSWERS), longest)).astype(np.int32)
        arrays: dict[str, Any] = {"prompts": prompts, "begins": _PROMPTS, "ids": ids, "of": [p for p, _ in _ANSWERS]}
        try:
            found = self.hidden(Rows(**{k: mx.array(v) for k, v in arrays.items()}))
            for r, (p, n) in enumerate(_ANSWERS):
                row = np.concatenate([prompts[p, : _PROMPTS[p]], ids[r, :n]])
                whole = self.split.hidden(mx.array(row[None]))[0, _PROMPTS[p] :].astype(mx.float32)
                start = prompts.size + r * longest
                wrong = float(mx.abs(found[start : start + n] - whole).max() / mx.abs(whole).max())
                if not wrong <= (1e-4 if found.dtype == mx.float32 else 5e-2):
                    return f"an answer's hidden states differ by {wrong:.1%}"
        except Exception as e:  # whatever a model's own code raises on being called so
            return f"{type(e).__name__}: {e}"
        return ""
