"""Text out of a model, one answer at a time; and how tokens are drawn, for `batch_sample` too.

Only these two files, and `kv` beside them, touch mlx-lm's generator and caches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlxft.data.encode import encode_prompt
from mlxft.data.formats import message_at
from mlxft.errors import ConfigError, DataError, ModelError
from mlxft.model.cpu import exp
from mlxft.model.declared import NO_NUMBERS
from mlxft.model.random import evaluating

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Prompt = str | list[dict[str, Any]]
_DRAWN = 64  # steps whose random numbers are drawn at one time


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and where it ends.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p, top_k, min_p: filters as mlx-lm applies them (before the temperature); 1, 0 and 0 switch them off.
        stop: strings that end an answer.
        stop_at_eos: whether the tokenizer's eos ids end it; if not, they and the pad id are tokens like others.
        stop_in_answer: whether `stop` counts after the thoughts of a reasoning model only (`sample_batch`).
    Raises:
        ConfigError: all that is out of bounds, in one.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True
    stop_in_answer: bool = False

    def __post_init__(self) -> None:
        wrong = []
        if self.max_tokens < 1:
            wrong.append(f"max_tokens is {self.max_tokens}; at least 1")
        if not 0 <= self.temperature < math.inf:
            wrong.append(f"temperature is {self.temperature}; at least 0")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p is {self.top_p}; above 0 and at most 1")
        if self.top_k < 0:
            wrong.append(f"top_k is {self.top_k}; at least 0 (0 is off)")
        if not 0 <= self.min_p <= 1:
            wrong.append(f"min_p is {self.min_p}; from 0 to 1")
        stop: Any = self.stop
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            wrong.append(f"stop is {stop!r}; a list of strings, none of them empty")
        if wrong:
            raise ConfigError("sampling: " + "; ".join(wrong))
        object.__setattr__(self, "stop", tuple(stop))


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt | Sequence[int],
    sampling: Sampling,
    *,
    seed: int | None = None,
) -> Iterator[str]:
    """Pieces of an answer as they come; they end at any eos id, at a stop string (not shown) or at max_tokens.

    MLX's global random state is never drawn from, and every module's training flag is as before at the end.

    Args:
        prompt: ids; or text or messages, encoded as `encode_prompt` does.
        seed: the same seed gives the same text; None draws a new one from the system.
    Raises:
        DataError: an empty prompt, or messages that the template refuses; at the call, not at the first piece.
    """
    ids = _ids(tokenizer, prompt)
    if not ids:
        raise DataError("the prompt is empty: there is no token to go on from")
    return _stop_at(_pieces(model, tokenizer, ids, sampling, seed), sampling.stop)


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt | Sequence[int],
    sampling: Sampling,
    *,
    seed: int | None = None,
) -> str:
    """The whole answer; arguments as for `stream`."""
    return "".join(stream(model, tokenizer, prompt, sampling, seed=seed))


def _ids(tokenizer: TokenizerWrapper, prompt: Any) -> list[int]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], dict)):
        turns = prompt if isinstance(prompt, str) else [message_at(m, f"prompt[{i}]") for i, m in enumerate(prompt)]
        return encode_prompt(turns, tokenizer)
    return [int(token) for token in prompt]


class Noise:
    """Uniform numbers, step by step, for rows that each have a stream of their own.

    Keys of its own: drawing from the global state between two training steps would change the training.

    Args:
        keys: (B, 2), a key a row: a row's numbers are the same whatever rows stand beside it.
    """

    def __init__(self, keys: mx.array) -> None:
        self._keys, self._at = keys, _DRAWN
        self._drawn = mx.zeros((keys.shape[0], 0, 2))

    def __call__(self) -> mx.array:
        """(B, 2) float32, 0 <= u < 1, of the next step."""
        if self._at == _DRAWN:
            split = mx.vmap(mx.random.split)(self._keys)
            self._keys, now = split[:, 0], split[:, 1]
            self._drawn = mx.vmap(lambda key: mx.random.uniform(shape=(_DRAWN, 2), key=key))(now)
            self._at = 0
        self._at += 1
        return self._drawn[:, self._at - 1]

    def take(self, rows: mx.array) -> None:
        """Go on with these rows only."""
        self._keys, self._drawn = self._keys[rows], self._drawn[rows]


def never_drawn(tokenizer: TokenizerWrapper, sampling: Sampling) -> int | None:
    """The pad id, which is no part of any answer.

    None where padding is by an eos id, which ends an answer; and where eos ids are tokens like others: so is pad then.
    """
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    return None if not sampling.stop_at_eos or pad in tokenizer.eos_token_ids else pad


def pick(logits: mx.array, sampling: Sampling, noise: Noise, without: int | None = None) -> mx.array:
    """(B, V) logits -> (B,) ids, by the sampling's filters and temperature, and none of them `without`.

    A row of logits that are no numbers gives -1, which `checked` refuses.
    """
    if without is not None:
        logits = mx.where(mx.arange(logits.shape[-1]) == without, -math.inf, logits)
    if sampling.temperature == 0:
        ids = mx.argmax(logits, axis=-1)
    else:
        ids = _draw(_filtered(logits.astype(mx.float32), sampling) / sampling.temperature, noise())
    return mx.where(mx.isnan(logits).any(axis=-1), -1, ids.astype(mx.int32))


def checked(token: int) -> int:
    """Return an id that was picked.

    Raises:
        ModelError: there was none to pick: an answer would be made of nothing, in silence.
    """
    if token < 0:
        raise ModelError(NO_NUMBERS)
    return token


def _filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """(B, V) -> (B, V), -inf where a token is out."""
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    if sampling.top_p < 1:
        logits = apply_top_p(logits - mx.logsumexp(logits, axis=-1, keepdims=True), sampling.top_p)
    if sampling.min_p > 0:
        logits = apply_min_p(logits, sampling.min_p, 1)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = apply_top_k(logits, sampling.top_k)
    return logits


def _draw(logits: mx.array, uniform: mx.array) -> mx.array:
    """(B, V) logits and (B, 2) uniform numbers -> (B,) ids, each with its softmax's probability.

    The cumulative sum is turned around in two stages, a block of the vocabulary and then a token in it: two numbers a
    row in place of one a token, and sums of a few hundred addends, in which no unlikely token is rounded away.
    """
    rows, vocabulary = logits.shape
    side = math.isqrt(vocabulary - 1) + 1
    blocks = -(-vocabulary // side)
    mass = exp(logits - logits.max(axis=-1, keepdims=True))
    mass = mx.pad(mass, [(0, 0), (0, blocks * side - vocabulary)]).reshape(rows, blocks, side)
    block = _first(mass.sum(axis=-1), uniform[:, 0])
    inside = mx.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    return block * side + _first(inside, uniform[:, 1])


def _first(mass: mx.array, uniform: mx.array) -> mx.array:
    """(B, N) not normalised, (B,) -> (B,): the first place where the cumulative share is above `uniform`."""
    upto = mx.cumsum(mass, axis=-1)
    # A GPU's parallel sums need not be monotone: what has no mass is never taken.
    return mx.argmax((upto > uniform[:, None] * upto[:, -1:]) & (mass > 0), axis=-1)


def _pieces(
    model: nn.Module, tokenizer: TokenizerWrapper, ids: list[int], sampling: Sampling, seed: int | None
) -> Iterator[str]:
    """Text as its tokens come."""
    from mlx_lm.generate import generate_step, wired_limit
    from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

    # The wrapper's own detokenizer drops a leading space, which belongs to the text where a prompt is plain text.
    text = NaiveStreamingDetokenizer(tokenizer._tokenizer)
    noise = Noise(mx.random.key(int.from_bytes(os.urandom(7), "big") if seed is None else seed)[None])
    without = never_drawn(tokenizer, sampling)
    sampler: Callable[[mx.array], mx.array] = lambda logprobs: pick(logprobs, sampling, noise, without)  # noqa: E731
    ends = tokenizer.eos_token_ids if sampling.stop_at_eos else ()
    with evaluating(model), wired_limit(model):
        for token, _ in generate_step(mx.array(ids), model, max_tokens=sampling.max_tokens, sampler=sampler):
            if checked(token) in ends:
                break
            text.add_token(token)
            if piece := text.last_segment:
                yield piece
        text.finalize()
        if piece := text.last_segment:
            yield piece


def _stop_at(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """Pieces up to the first stop string; text that may be the start of one waits until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        if ends := [at for at in (held.find(s) for s in stop) if at >= 0]:
            held = held[: min(ends)]
            break
        longest = min(len(held), max((len(s) for s in stop), default=1) - 1)
        keep = next((n for n in range(longest, 0, -1) if any(s.startswith(held[-n:]) for s in stop)), 0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held
