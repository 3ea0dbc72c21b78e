"""Sample completions and whole conversations, one or many at once, with their KV caches."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

from mlxft.data.chat import opening_after, until_stop
from mlxft.data.dataset import encode_prompt
from mlxft.data.formats import message_at
from mlxft.distributed import Portion, current
from mlxft.errors import ConfigError, DataError, ModelError
from mlxft.model.cpu import exp
from mlxft.model.folder import NO_NUMBERS
from mlxft.model.layers import evaluating, rounded_once

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


# --- kv ---------------------------------------------------------------------------------------------------------------
# mlx-lm's caches with several sequences: make them, fill them with prompts, and select rows.
#
# Prompts of one length go through a model's own caches, which take any number of rows: exact for every architecture,
# including recurrent state. Prompts of unequal lengths need caches that know the padding, and a model that respects it.

PREFILL = 4096  # most tokens, padding included, that go through the model in one call
_PADDING = 64  # tokens of padding that cost less than another call of the model
_PADDED = (KVCache, RotatingKVCache)
_ROWS = (KVCache, RotatingKVCache, ChunkedKVCache, ArraysCache)
_TRIED: dict[tuple[frozenset[type], bool], bool] = {}


def pads(model: nn.Module, later: bool = False) -> bool:
    """Return whether prompts of unequal lengths can share a batch, by one trial for each set of module types.

    mlx-lm's batched caches have an array where its plain ones have a number, the offset; an architecture that computes
    with the number fails, or returns other logits.

    Args:
        later: whether they can also get further tokens, in unequal numbers, once they are in the caches.
    """
    caches = make_prompt_cache(model)
    kind = frozenset(type(part) for part in (*model.modules(), *caches)), later
    if kind not in _TRIED:
        _TRIED[kind] = all(type(cache) in _PADDED for cache in caches) and _agrees(model, later)
    return _TRIED[kind]


def _agrees(model: nn.Module, later: bool) -> bool:
    # Much padding, so that a position counted from its beginning is far off: afm7's layers that share keys do that.
    # Only the two tokens that every model has: beyond its embedding, MLX reads arbitrary memory.
    prompts = [[1, 0, 0, 1] * 8, [0, 1, 0, 0, 1]]
    try:
        if later:
            caches, _ = prefill(model, [[1, 0, 0], [0]], padded=True)
            together = _extend(model, caches, [prompts[0][3:], prompts[1][1:]])
        else:
            _, together = prefill(model, prompts)
        alone = mx.concatenate([prefill(model, [prompt])[1] for prompt in prompts])
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return False
    if mx.isnan(alone).any().item():  # this shows nothing about other models with the same modules
        raise ModelError(NO_NUMBERS)
    apart = mx.abs(together.astype(mx.float32) - alone.astype(mx.float32)).max()
    # Limits of rounding; a wrong mask or position makes a larger difference.
    rounding = 1e-2 if alone.dtype == mx.float32 else 5e-2
    return bool((apart <= rounding * mx.abs(alone).max()).item())


def takes_rows(model: nn.Module) -> bool:
    """Return whether the model's own caches take several sequences; otherwise they are decoded one at a time."""

    def known(cache: Any) -> bool:
        return all(map(known, cache.caches)) if type(cache) is CacheList else type(cache) in _ROWS

    return all(map(known, make_prompt_cache(model)))


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]], padded: bool = False) -> tuple[list[Any], mx.array]:
    """Return caches that hold P prompts, right-aligned, and the logits (P, V) of each next token.

    Unequal lengths need a model for which `pads` is true; they cost least where neighbours have similar lengths.

    Args:
        padded: whether the caches know padding even where lengths are equal, so that rows can grow apart later.
    """
    lengths = [len(prompt) - 1 for prompt in prompts]
    if min(lengths) == max(lengths) and not padded:
        caches = make_prompt_cache(model)
        _fill(model, caches, [prompt[:-1] for prompt in prompts], lengths[0])
    else:
        caches = []
        for run in _runs(lengths):
            own = [cache.merge([cache] * len(lengths[run])) for cache in make_prompt_cache(model)]
            _fill_padded(model, own, [prompt[:-1] for prompt in prompts[run]])
            for cache, more in zip(caches, own):
                cache.extend(more)
            caches = caches or own
    return caches, step(model, caches, mx.array([prompt[-1] for prompt in prompts]))


def _extend(model: nn.Module, caches: list[Any], added: Sequence[Sequence[int]]) -> mx.array:
    """Put further tokens of each row, at least one, into caches, and return the logits (B, V) of each next token.

    Unequal numbers of them need caches of `prefill(padded=True)`.
    """
    before = [ids[:-1] for ids in added]
    lengths = [len(ids) for ids in before]
    if min(lengths) == max(lengths):
        _fill(model, caches, before, lengths[0])
    else:
        _fill_padded(model, caches, before)
    return step(model, caches, mx.array([ids[-1] for ids in added]))


def _runs(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield neighbours that go through the model together: with little padding, or too little for a separate call."""
    start = 0
    for end in range(1, len(lengths) + 1):
        together = lengths[start : end + 1]
        padding = max(together) * len(together) - sum(together)
        if end == len(lengths) or padding > max(_PADDING, sum(together) // 10):
            yield slice(start, end)
            start = end


def _fill_padded(model: nn.Module, caches: list[Any], prompts: Sequence[Sequence[int]]) -> None:
    lengths = [len(prompt) for prompt in prompts]
    # A rotating cache takes a single column for a step of decoding, for which it is not ready before `finalize`.
    width = max(*lengths, 2)
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=[width - length for length in lengths])
    _fill(model, caches, [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], width)
    for cache in caches:
        cache.finalize()
    mx.eval([cache.state for cache in caches])


def _fill(model: nn.Module, caches: list[Any], prompts: Sequence[Sequence[int]], width: int) -> None:
    """Put `width` tokens of each prompt into the caches, in calls of limited size."""
    if not width:
        return
    ids = mx.array([list(prompt) for prompt in prompts])
    # Parts of nearly equal size, and never a single column where there are two.
    parts = -(-width // max(3, PREFILL // len(prompts)))
    for start, end in itertools.pairwise(width * i // parts for i in range(parts + 1)):
        model(ids[:, start:end], cache=caches)
        # The logits are never evaluated: MLX computes only what is needed for the caches.
        mx.eval([cache.state for cache in caches])
        mx.clear_cache()


def step(model: nn.Module, caches: list[Any], ids: mx.array) -> mx.array:
    """Return the logits (B, V) after one further token of each sequence, ids (B,)."""
    logits: mx.array = model(ids[:, None], cache=caches)
    return logits[:, -1]


def take(caches: Sequence[Any], rows: mx.array) -> list[Any]:
    """Return caches of these rows, in this order, with repetitions. The given ones stay as they are."""
    found = [copy.copy(cache) for cache in caches]
    for cache in found:
        if type(cache) is CacheList:
            cache.caches = tuple(take(cache.caches, rows))
        elif isinstance(cache, (BatchKVCache, BatchRotatingKVCache, ArraysCache)):
            cache.filter(rows)
        elif cache.keys is not None:
            cache.keys, cache.values = cache.keys[rows], cache.values[rows]
    return found


# --- sample -----------------------------------------------------------------------------------------------------------
# One completion at a time, as text; and how tokens are drawn, also for `sample_batch`.

_Prompt = str | list[dict[str, Any]] | Sequence[int]
_DRAWN = 64  # steps whose random numbers are drawn at one time


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn and where it ends.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p, top_k, min_p: filters as mlx-lm applies them (before the temperature); 1, 0 and 0 switch them off.
        stop: strings that end a completion.
        stop_at_eos: whether the tokenizer's eos ids end it; otherwise they and the pad id are ordinary tokens.
        stop_in_answer: whether `stop` counts only after the thoughts of a reasoning model (`sample_batch`).
    Raises:
        ConfigError: values are out of bounds; it lists all of them.
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
        stop: Any = self.stop
        texts = not isinstance(stop, str) and all(isinstance(text, str) and text for text in stop)
        bounds = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("stop", texts, "a list of strings, none of them empty"),
        )
        wrong = [f"{name} is {getattr(self, name)!r}; expected {text}" for name, fits, text in bounds if not fits]
        if wrong:
            raise ConfigError("sampling: " + "; ".join(wrong))
        object.__setattr__(self, "stop", tuple(stop))


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: _Prompt,
    sampling: Sampling,
    *,
    seed: int | None = None,
    until: Callable[[], bool] | None = None,
) -> Iterator[str]:
    """Yield pieces of a completion as they come; it ends at any eos id, a stop string (not shown) or max_tokens.

    MLX's global random state is not used, and every module's training flag is restored at the end.

    Args:
        prompt: ids; or text or messages, encoded by `encode_prompt`.
        seed: the same seed gives the same text; None: a new seed from the system.
        until: called after each token, also one that gives no piece yet; True ends the completion.
    Raises:
        DataError: an empty prompt, or messages that the template refuses; at the call, not at the first piece.
    """
    if isinstance(prompt, str):
        ids = encode_prompt(prompt, tokenizer)
    elif prompt and isinstance(prompt[0], dict):
        ids = encode_prompt([message_at(m, f"prompt[{i}]") for i, m in enumerate(prompt)], tokenizer)
    else:
        ids = [int(token) for token in cast("Sequence[int]", prompt)]
    if not ids:
        raise DataError("the prompt is empty: there is no token to start from")
    return _stop_at(_pieces(model, tokenizer, ids, sampling, seed, until), sampling.stop)


def complete(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: _Prompt, sampling: Sampling, *, seed: int | None = None
) -> str:
    """Return the whole completion; arguments as for `stream`."""
    return "".join(stream(model, tokenizer, prompt, sampling, seed=seed))


class Noise:
    """Uniform random numbers, step by step, with a separate stream for each row.

    The keys are its own: drawing from the global state between two training steps would change the training.

    Args:
        keys: (B, 2), one key for each row: a row's numbers do not depend on the rows beside it.
    """

    def __init__(self, keys: mx.array) -> None:
        self._keys, self._at = keys, _DRAWN
        self._drawn = mx.zeros((keys.shape[0], 0, 2))

    def __call__(self) -> mx.array:
        """Return the next step's numbers, (B, 2) float32, 0 <= u < 1."""
        if self._at == _DRAWN:
            split = mx.vmap(mx.random.split)(self._keys)
            self._keys, now = split[:, 0], split[:, 1]
            self._drawn = mx.vmap(lambda key: mx.random.uniform(shape=(_DRAWN, 2), key=key))(now)
            self._at = 0
        self._at += 1
        return self._drawn[:, self._at - 1]

    def take(self, rows: mx.array) -> None:
        """Keep only these rows."""
        self._keys, self._drawn = self._keys[rows], self._drawn[rows]


def never_drawn(tokenizer: TokenizerWrapper, sampling: Sampling) -> int | None:
    """Return the pad id if it is never part of a completion.

    None if padding uses an eos id, which ends a completion, or if eos ids are ordinary tokens: then so is the pad id.
    """
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    return None if not sampling.stop_at_eos or pad in tokenizer.eos_token_ids else pad


def pick(logits: mx.array, sampling: Sampling, noise: Noise, without: int | None = None) -> mx.array:
    """Return ids (B,) for logits (B, V) by the filters and temperature of `sampling`; the id `without` is never one.

    A row with NaN gives -1, which `checked` refuses.
    """
    if without is not None:
        logits = mx.where(mx.arange(logits.shape[-1]) == without, -math.inf, logits)
    if sampling.temperature == 0:
        ids = mx.argmax(logits, axis=-1)
    else:
        ids = _draw(_filtered(logits.astype(mx.float32), sampling) / sampling.temperature, noise())
    return mx.where(mx.isnan(logits).any(axis=-1), -1, ids.astype(mx.int32))


def checked(token: int) -> int:
    """Return an id of `pick`, or raise a ModelError if the logits were NaN."""
    if token < 0:
        raise ModelError(NO_NUMBERS)
    return token


def _filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """Return logits (B, V) with -inf for the tokens that the filters exclude."""
    if sampling.top_p < 1:
        logits = apply_top_p(logits - mx.logsumexp(logits, axis=-1, keepdims=True), sampling.top_p)
    if sampling.min_p > 0:
        logits = apply_min_p(logits, sampling.min_p, 1)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = apply_top_k(logits, sampling.top_k)
    return logits


def _draw(logits: mx.array, uniform: mx.array) -> mx.array:
    """Return ids (B,) for logits (B, V) and uniform numbers (B, 2), each with its probability by softmax.

    The cumulative sum is inverted in two stages, a block of the vocabulary and then a token in it: two numbers for
    each row instead of one for each token, and sums of a few hundred addends, in which no unlikely token is rounded
    away.
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
    """Return the first place (B,) where the cumulative share of mass (B, N), not normalised, is above uniform (B,)."""
    upto = mx.cumsum(mass, axis=-1)
    # A GPU's parallel sums need not be monotone: a place without mass is never taken.
    return mx.argmax((upto > uniform[:, None] * upto[:, -1:]) & (mass > 0), axis=-1)


def _detokenizer(tokenizer: TokenizerWrapper) -> NaiveStreamingDetokenizer:
    # The wrapper's own detokenizer drops a leading space, which belongs to the text if the prompt is plain text.
    return NaiveStreamingDetokenizer(tokenizer._tokenizer)


def _pieces(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    ids: list[int],
    sampling: Sampling,
    seed: int | None,
    until: Callable[[], bool] | None,
) -> Iterator[str]:
    from mlx_lm.generate import generate_step, wired_limit  # it asks for MLX's device as it is imported

    text = _detokenizer(tokenizer)
    noise = Noise(mx.random.key(int.from_bytes(os.urandom(7), "big") if seed is None else seed)[None])
    without = never_drawn(tokenizer, sampling)
    sampler: Callable[[mx.array], mx.array] = lambda logprobs: pick(logprobs, sampling, noise, without)  # noqa: E731
    ends = tokenizer.eos_token_ids if sampling.stop_at_eos else ()
    with evaluating(model), rounded_once(model), wired_limit(model):
        for token, _ in generate_step(mx.array(ids), model, max_tokens=sampling.max_tokens, sampler=sampler):
            if checked(token) in ends or (until is not None and until()):
                break
            text.add_token(token)
            if piece := text.last_segment:
                yield piece
        text.finalize()
        if piece := text.last_segment:
            yield piece


def _stop_at(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """Yield pieces up to the first stop string; text that may be the start of one waits until that is known."""
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


# --- batch sample -----------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 32  # sequences decoded at one time by default
_CLEAR = 256  # steps between two clearings of MLX's buffers: a growing cache leaves many sizes behind


class Sampled(NamedTuple):
    """A completion: its tokens as sampled, and why it ended."""

    ids: list[int]  # including the eos id that ended it
    finish: str  # "eos", "stop" or "length"


def _keys(seed: int, part: Portion, samples: int = 1) -> mx.array:
    """Return the keys of a part's samples: those that they have among the samples of all prompts."""
    return mx.random.split(mx.random.key(seed), part.whole * samples)[part.start * samples : part.stop * samples]


def sample_batch(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int,
    rows: int | None = None,
    part: Portion | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[list[Sampled]]:
    """Return `samples` completions of each prompt, in the order of the prompts.

    A completion's random numbers depend only on `seed` and the numbers of its prompt and sample. The same call gives
    the same ids; other `rows` differ only by rounding. MLX's global random state is not used, and every module's
    training flag is restored at the end.

    Args:
        prompts: token ids from `encode_prompt`.
        rows: most sequences decoded at one time, 32 by default. Memory grows with it.
        part: the stretch of all prompts that these are, where other ranks sample the rest.
        on_done: called with the number of completions finished since its last call.
    Raises:
        ConfigError: values are out of bounds, or completions should end at eos and there is no eos id.
        DataError: there are no prompts, or an empty one.
    """
    from mlx_lm.generate import wired_limit

    rows = ROWS_AT_ONCE if rows is None else rows
    _check(tokenizer, prompts, sampling, samples, rows)
    keys = _keys(seed, part or Portion(0, len(prompts), len(prompts)), samples)
    found: list[list[Sampled]] = [[] for _ in prompts]
    with evaluating(model), rounded_once(model), wired_limit(model):
        alone = not takes_rows(model)
        for group in _groups(prompts, 1 if alone else max(1, rows // samples), pads(model)):
            caches, logits = prefill(model, [prompts[i] for i in group])
            wanted = [(place, prompt * samples + k) for place, prompt in enumerate(group) for k in range(samples)]
            size = 1 if alone else rows
            for start in range(0, len(wanted), size):
                places, numbers = zip(*wanted[start : start + size])
                openings = [_opening(tokenizer, prompts[number // samples], sampling) for number in numbers]
                most = [sampling.max_tokens] * len(numbers)
                decoding = _Decoding(tokenizer, sampling, openings, most, on_done or (lambda n: None))
                if alone:
                    own, first = copy.deepcopy(caches), logits
                else:
                    own, first = take(caches, mx.array(places)), logits[mx.array(places)]
                noise = Noise(keys[mx.array(numbers)])
                for number, completion in zip(numbers, decoding.run(model, own, first, noise)):
                    found[number // samples].append(completion)
    return found


def sample_shared(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    **options: Any,
) -> list[list[Sampled]]:
    """Return what `sample_batch` does, where each rank samples the completions of some prompts."""

    def sampled(part: Portion) -> list[list[Sampled]]:
        return sample_batch(model, tokenizer, prompts[part.here], sampling, part=part, **options)

    return [[Sampled(*each) for each in found] for found in current().in_portions(len(prompts), sampled)]


class TurnStart(NamedTuple):
    """What a conversation gets before a turn of the model: at least one id; and the turn's most tokens."""

    ids: Sequence[int]
    most: int


def sample_turns(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    starts: Sequence[TurnStart],
    sampling: Sampling,
    reply: Callable[[list[tuple[int, Sampled]]], Sequence[TurnStart | None]],
    *,
    seed: int,
    rows: int | None = None,
    part: Portion | None = None,
) -> None:
    """Sample conversations side by side, a turn at a time; between turns only what is new goes through the model.

    A conversation's random numbers depend only on `seed`, its number and its turns. Models whose caches take no rows
    of unequal lengths decode one conversation after the other, with its cache.

    Args:
        starts: the prompt of each conversation.
        sampling: `max_tokens` is not read.
        reply: called with the turns that were written at one time, each with its conversation's number; returns what
            each conversation gets next, or None where it ends.
        rows: most conversations decoded at one time, 32 by default.
        part: as in `sample_batch`.
    Raises:
        ConfigError, DataError: as `sample_batch`.
    """
    from mlx_lm.generate import wired_limit

    rows = ROWS_AT_ONCE if rows is None else rows
    _check(tokenizer, [start.ids for start in starts], sampling, 1, rows)
    every = _keys(seed, part or Portion(0, len(starts), len(starts)))
    with evaluating(model), rounded_once(model), wired_limit(model):
        together = pads(model, later=True)
        for going in _groups([start.ids for start in starts], rows if together else 1, True):
            now = {i: starts[i] for i in going}
            asked = [tuple(start.ids) for start in now.values()]
            prompts = list(dict.fromkeys(asked))  # samples of one prompt share its prefill
            caches, logits = prefill(model, prompts, padded=together)
            if len(asked) > 1:
                places = mx.array([prompts.index(ids) for ids in asked])
                caches, logits = take(caches, places), logits[places]
            keys = every[mx.array(going)]
            while True:
                openings = [_opening(tokenizer, start.ids, sampling) for start in now.values()]
                most = [start.most for start in now.values()]
                decoding = _Decoding(tokenizer, sampling, openings, most, keeps=True)
                turns = decoding.run(model, caches, logits, Noise(keys))
                replies = reply(list(zip(now, turns)))
                left = {place: start for place, start in enumerate(replies) if start is not None}
                if not left:
                    break
                numbers = list(now)
                now = {numbers[place]: start for place, start in left.items()}
                caches, logits = decoding.extended(model, {place: start.ids for place, start in left.items()})
                # A third key of each: `Noise` uses the first two.
                keys = mx.vmap(lambda key: mx.random.split(key, 3)[2])(keys[mx.array(list(left))])
            mx.clear_cache()


def text_of(tokenizer: TokenizerWrapper, completion: Sampled, sampling: Sampling, prompt: Sequence[int] = ()) -> str:
    """Return a completion as text, as `stream` shows it: without the eos, and up to the first stop string.

    Args:
        prompt: its ids; needed for `stop_in_answer` if prompts may open a thought.
    """
    whole = _detokenizer(tokenizer)
    for token in completion.ids[: -1 if completion.finish == "eos" else None]:
        whole.add_token(token)
    whole.finalize()
    return until_stop(whole.text, sampling.stop, _opening(tokenizer, prompt, sampling), sampling.stop_in_answer)


def _opening(tokenizer: TokenizerWrapper, prompt: Sequence[int], sampling: Sampling) -> str:
    """Return the mark by which a prompt has opened a thought, if that affects where completions end."""
    return opening_after(tokenizer, prompt) if sampling.stop and sampling.stop_in_answer else ""


def _check(tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, samples: int, rows: int) -> None:
    for name, number in (("samples", samples), ("rows", rows)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; expected at least 1")
    if sampling.stop_at_eos and not tokenizer.eos_token_ids:
        raise ConfigError(
            "the tokenizer has no eos token, so no completion can end at one; set rollout.stop_at_eos to false, and "
            "completions end at a stop string or at max_tokens"
        )
    if not prompts:
        raise DataError("there are no prompts to complete")
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise DataError(f"prompt {empty[0]} is empty ({len(empty)} are): there is no token to start from")


def _groups(prompts: Sequence[Sequence[int]], most: int, pads: bool) -> Iterator[list[int]]:
    """Yield the numbers of prompts that are computed together: neighbours in length, which need little padding."""
    group: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if len(group) == most or (group and not pads and len(prompts[i]) != len(prompts[group[0]])):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


class _Kept(NamedTuple):
    """Rows that have ended, their caches, and the last tokens of each that are not in them yet."""

    caches: list[Any]
    rows: list[int]
    missing: list[list[int]]


@dataclass
class _Decoding:
    """Decodes rows side by side, one token each in every step, until all have ended.

    Attributes:
        most: most tokens of each row.
        keeps: whether the caches of rows that have ended are `kept`, for further turns.
    """

    tokenizer: Any
    sampling: Sampling
    openings: Sequence[str]
    most: Sequence[int]
    on_done: Callable[[int], None] = lambda n: None
    keeps: bool = False
    kept: list[_Kept] = field(default_factory=list)

    def run(self, model: nn.Module, caches: list[Any], logits: mx.array, noise: Noise) -> list[Sampled]:
        """Return a completion for each row of the first logits (B, V); the caches are used up."""
        most, without = max(self.most), never_drawn(self.tokenizer, self.sampling)
        # Tokens behind a row's end would push what belongs to it out of a window.
        at_once = self.keeps and any(isinstance(cache, BatchRotatingKVCache) for cache in caches)
        ids: list[list[int]] = [[] for _ in range(logits.shape[0])]
        finish: list[str | None] = [None] * len(ids)
        rows = list(range(len(ids)))  # the completion of each row of the batch
        drawn = pick(logits, self.sampling, noise, without)
        del logits
        mx.async_eval(drawn)
        for n in range(1, most + 1):
            ahead = None
            if n < most:
                # The next step starts before this one's tokens are read; for rows that end here it is wasted.
                ahead = pick(step(model, caches, drawn), self.sampling, noise, without)
                mx.async_eval(ahead)
            ended = 0
            for i, token in zip(rows, cast("list[int]", drawn.tolist())):
                if finish[i] is None:
                    ids[i].append(checked(token))
                    finish[i] = self._end(ids[i], self.openings[i], self.most[i])
                    ended += finish[i] is not None
            if ended:
                self.on_done(ended)
            going = [place for place, i in enumerate(rows) if finish[i] is None]
            if ahead is None or not going:
                self._keep(caches, rows, range(len(rows)), ids, n - (ahead is None))
                break
            # Rows leave the batch together: each time, the caches are copied.
            if len(going) <= len(rows) * 3 // 4 or (at_once and len(going) < len(rows)):
                self._keep(caches, rows, sorted({*range(len(rows))} - {*going}), ids, n)
                keep = mx.array(going)
                caches, ahead, rows = take(caches, keep), ahead[keep], [rows[place] for place in going]
                noise.take(keep)
            drawn = ahead
            if n % _CLEAR == 0:
                mx.clear_cache()
        return [Sampled(completion, why or "length") for completion, why in zip(ids, finish)]

    def _keep(
        self, caches: list[Any], rows: list[int], places: Sequence[int], ids: list[list[int]], cached: int
    ) -> None:
        """Keep the caches of rows that have ended, without the tokens that were computed after their ends.

        Args:
            cached: tokens of each row that are in the caches.
        """
        if not self.keeps:
            return
        own = caches if len(places) == len(rows) else take(caches, mx.array(list(places)))
        held = [rows[place] for place in places]
        beyond = [max(0, cached - len(ids[i])) for i in held]
        if any(beyond):  # what stands on the right is padding
            for cache in own:
                cache.prepare(right_padding=beyond)
                cache.finalize()
        self.kept.append(_Kept(own, held, [ids[i][cached:] for i in held]))

    def extended(self, model: nn.Module, added: Mapping[int, Sequence[int]]) -> tuple[list[Any], mx.array]:
        """Return caches of some rows with further tokens of each, and the logits (B, V) of each next token."""
        first, *others = self.kept
        for more in others:
            for cache, other in zip(first.caches, more.caches):
                cache.extend(other)
        held = [i for kept in self.kept for i in kept.rows]
        missing = [ids for kept in self.kept for ids in kept.missing]
        places = [held.index(i) for i in added]
        caches = first.caches if places == list(range(len(held))) else take(first.caches, mx.array(places))
        return caches, _extend(model, caches, [[*missing[p], *ids] for p, ids in zip(places, added.values())])

    @cached_property
    def _window(self) -> int:
        """Number of last tokens that contain a stop string: a token is at least a byte, except a few special ones."""
        return max((len(text.encode()) for text in self.sampling.stop), default=0) + 8

    def _end(self, ids: list[int], opening: str, most: int) -> str | None:
        """Return why a completion ends with its last token, if it does."""
        how = self.sampling
        if how.stop_at_eos and ids[-1] in self.tokenizer.eos_token_ids:
            return "eos"
        if how.stop:
            text = self.tokenizer.decode(ids[-self._window :])
            if any(stop in text for stop in how.stop):
                whole = self.tokenizer.decode(ids) if how.stop_in_answer else ""
                # A stop string among the thoughts does not count.
                if not how.stop_in_answer or len(until_stop(whole, how.stop, opening)) < len(whole):
                    return "stop"
        return "length" if len(ids) == most else None
