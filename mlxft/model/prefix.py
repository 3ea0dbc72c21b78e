"""Compute several completions of one prompt with the prompt computed once.

The prompts go through the model first, then the completions, and each sees the keys and values of its prompt: a KV
cache through which gradients flow. Positions continue where each prompt ends, so a completion's hidden states are the
same as in a whole row; a trial on a few tokens shows whether that holds for an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import make_prompt_cache

from mlxft.model.heads import head_of, read_scores
from mlxft.model.layers import is_checkpointed, probing
from mlxft.model.logits import ATTENTION, Split, hidden_logprobs, rows_logprobs


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token ids as a model reads them: whole rows, or completions apart from their prompts, each computed once.

    Attributes:
        ids: (B, T) whole rows, padded on the right; or (R, A) completions, where there are `prompts`.
        segments: (B, T) number of a token's packed row, from 1, and 0 for padding; None: rows are not packed.
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
        lengths: (B,) number of tokens of the completions, float32.
    """

    last: mx.array
    lengths: mx.array


@dataclass(frozen=True, kw_only=True)
class Completions(ScoredRows):
    """Completions with N tokens whose log-probabilities are read.

    Attributes:
        positions: (N,) flat index that predicts each token; with prompts, in the flat tokens of both.
        labels: (N,) the tokens.
        owners: (N,) the completion of each token.
    """

    positions: mx.array
    labels: mx.array
    owners: mx.array


# The trial: lengths of its prompts; prompt and length of each completion.
_PROMPTS, _COMPLETIONS = (5, 3), ((0, 4), (1, 3), (0, 2), (1, 4))


class _PromptCache:
    """A substitute for a layer's KV cache that stores the prompts' keys and values."""

    offset = 0
    keys: mx.array
    values: mx.array

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """Return the mask that mlx-lm makes without a cache."""
        if return_array or (window_size and window_size < N):
            mask: mx.array = create_causal_mask(N, window_size=window_size)
            return mask
        return None if N == 1 else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class _CompletionCache:
    """A substitute for a layer's KV cache with which each completion sees its prompt and its own earlier tokens."""

    def __init__(self, prompt: _PromptCache, begins: mx.array, of: mx.array, axes: int) -> None:
        self._prompt, self._of, self._axes = prompt, of, axes
        self.offset = begins[of]  # (R,)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return (R, 1, N, P + N) bool, which hides the padding of prompts."""
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
        before = self._prompt.keys[self._of], self._prompt.values[self._of]
        return mx.concatenate([before[0], keys], axis=-2), mx.concatenate([before[1], values], axis=-2)


class Sharing:
    """A model's way of reading completions with each prompt computed once, if the model allows that.

    Args:
        split: any mlx-lm model, with or without adapters.
    """

    def __init__(self, split: Split) -> None:
        self.split, self._axes = split, 1

    @property
    def possible(self) -> bool:
        """Return whether prompts can be shared now; not if blocks are checkpointed: recomputation lacks the prompt."""
        return not self.reason and not is_checkpointed(self.split.model)

    @cached_property
    def thinkable(self) -> bool:
        """Return whether prompts can be shared by the shapes; the model needs no weights, but its own layers."""
        return not self._trial(weights=False)

    @cached_property
    def reason(self) -> str:
        """Why the model cannot share prompts; empty if it can."""
        return self._trial(weights=True)

    def logprobs(self, rows: Completions, *, grad: bool) -> mx.array:
        """Return the log-probabilities (N,) of the completions' tokens, float32, in nats."""
        if rows.prompts is None:
            return rows_logprobs(self.split, rows.ids, rows.positions, rows.labels, grad=grad)
        return hidden_logprobs(self.split, self.hidden(rows)[rows.positions], rows.labels, grad=grad)

    def scores(self, rows: ScoredRows) -> mx.array:
        """Return the scores (R,) of the completions by the model's head, float32."""
        if rows.prompts is None:
            return read_scores(self.split, rows.ids, rows.last)
        head = head_of(self.split.model)
        assert head is not None, "attach_head first"
        return head(self.hidden(rows)[rows.last])

    def hidden(self, rows: Rows) -> mx.array:
        """Return flat hidden states: (B x T, D) of whole or packed rows, else (B x P + R x A, D)."""
        if rows.prompts is None:
            whole = self.split.hidden(rows.ids, rows.segments)
            return whole.reshape(-1, whole.shape[-1])
        assert rows.begins is not None
        assert rows.of is not None
        first = [_PromptCache() for _ in make_prompt_cache(self.split.model)]
        before = self.split.hidden(rows.prompts, caches=first)
        caches = [_CompletionCache(prompt, rows.begins, rows.of, self._axes) for prompt in first]
        after = self.split.hidden(rows.ids, caches=caches)
        return mx.concatenate([h.reshape(-1, h.shape[-1]) for h in (before, after)])

    def _trial(self, weights: bool) -> str:
        """Return why the model cannot share prompts, and find the number of head axes of its masks; empty: it can."""
        kinds = {type(cache).__name__ for cache in make_prompt_cache(self.split.model)}
        if not self.split.separable or kinds - set(ATTENTION):
            return "the body is not separable, or keeps more than keys and values"
        reason = ""
        with probing(self.split.model):
            for self._axes in (2, 1):
                try:
                    reason = self._difference(weights)
                except Exception as e:  # a model's own code may raise anything here
                    reason = f"{type(e).__name__}: {e}"
                if not reason:
                    break
        return reason

    def _difference(self, weights: bool) -> str:
        """Return how completions' hidden states differ from those in whole rows; without weights, try shapes only."""
        rng, width, longest = np.random.default_rng(0), max(_PROMPTS), max(n for _, n in _COMPLETIONS)
        prompts = rng.integers(0, 8, (len(_PROMPTS), width)).astype(np.int32)
        ids = rng.integers(0, 8, (len(_COMPLETIONS), longest)).astype(np.int32)
        arrays: dict[str, Any] = {
            "prompts": prompts,
            "begins": _PROMPTS,
            "ids": ids,
            "of": [p for p, _ in _COMPLETIONS],
        }
        found = self.hidden(Rows(**{k: mx.array(v) for k, v in arrays.items()}))
        if not weights:
            return "" if found.shape[0] == prompts.size + ids.size else "the hidden states have another shape"
        for r, (p, n) in enumerate(_COMPLETIONS):
            row = np.concatenate([prompts[p, : _PROMPTS[p]], ids[r, :n]])
            whole = self.split.hidden(mx.array(row[None]))[0, _PROMPTS[p] :].astype(mx.float32)
            start = prompts.size + r * longest
            wrong = float(mx.abs(found[start : start + n] - whole).max() / mx.abs(whole).max())
            if not wrong <= (1e-4 if found.dtype == mx.float32 else 5e-2):
                return f"a completion's hidden states differ by {wrong:.1%}"
        return ""
