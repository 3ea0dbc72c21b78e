"""Sample completions, one or many at once, with their KV caches."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

from mlxft.data.chat import opening_after, until_stop
from mlxft.data.dataset import encode_prompt
from mlxft.data.formats import message_at
from mlxft.errors import ConfigError, DataError, ModelError
from mlxft.model.cpu import exp
from mlxft.model.folder import NO_NUMBERS
from mlxft.model.layers import evaluating

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


# --- kv ---------------------------------------------------------------------------------------------------------------
# mlx-lm's caches with several sequences in them: made, filled with prompts, and their rows taken.
#
# Prompts of one length go through a model's own caches, which take any number of rows: exact for every architecture,
# recurrent state included. Prompts of unequal length need caches that know the padding, and a model that heeds it.

PREFILL = 4096  # most tokens, padding included, that go through the model in one call
_PADDING = 64  # tokens of padding that cost less than one more call of the model
_PADDED = (KVCache, RotatingKVCache)
_ROWS = (KVCache, RotatingKVCache, ChunkedKVCache, ArraysCache)
_TRIED: dict[frozenset[type], bool] = {}


def pads(model: nn.Module) -> bool:
    """Whether prompts of unequal length can stand in one batch: tried once for each set of parts.

    mlx-lm's batched caches hold an array where its plain ones hold a number, the offset; an architecture that counts
    with the number fails, or gives other logits.
    """
    caches = make_prompt_cache(model)
    kind = frozenset(type(part) for part in (*model.modules(), *caches))
    if kind not in _TRIED:
        _TRIED[kind] = all(type(cache) in _PADDED for cache in caches) and _agrees(model)
    return _TRIED[kind]


def _agrees(model: nn.Module) -> bool:
    # So much padding that a place counted from its beginning is far off: afm7's layers that share keys do that.
    # Of the two tokens that every model has: beyond its embedding MLX reads whatever lies in memory.
    prompts = [[1, 0, 0, 1] * 8, [0, 1, 0, 0, 1]]
    try:
        _, together = prefill(model, prompts)
        alone = mx.concatenate([prefill(model, [prompt])[1] for prompt in prompts])
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return False
    if mx.isnan(alone).any().item():  # nothing to learn from, for models of the same parts
        raise ModelError(NO_NUMBERS)
    apart = mx.abs(together.astype(mx.float32) - alone.astype(mx.float32)).max()
    # What rounding may do; a wrong mask or position does more.
    rounding = 1e-2 if alone.dtype == mx.float32 else 5e-2
    return bool((apart <= rounding * mx.abs(alone).max()).item())


def takes_rows(model: nn.Module) -> bool:
    """Whether several sequences can stand in the model's own caches; otherwise it is one at a time."""

    def known(cache: Any) -> bool:
        return all(map(known, cache.caches)) if type(cache) is CacheList else type(cache) in _ROWS

    return all(map(known, make_prompt_cache(model)))


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[list[Any], mx.array]:
    """Caches that hold P prompts, right-aligned, and the logits (P, V) of what follows each.

    Unequal lengths are for models that `pads` is true of; they cost least where neighbours are of like length.
    """
    lengths = [len(prompt) - 1 for prompt in prompts]
    if min(lengths) == max(lengths):
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


def _runs(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbours that go through the model together: little of it is padding, or too little for a call of its own."""
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
    """`width` tokens of each prompt, in calls of bounded size."""
    if width:
        ids = mx.array([list(prompt) for prompt in prompts])
        for part in _columns(width, len(prompts)):
            model(ids[:, part], cache=caches)
            # The logits are never evaluated: MLX computes only what is asked for.
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()


def _columns(width: int, rows: int) -> list[slice]:
    """`width` columns in parts of nearly one size, none of them a single column where there are two."""
    most = max(3, PREFILL // rows)
    parts = -(-width // most)
    edges = [width * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def step(model: nn.Module, caches: list[Any], ids: mx.array) -> mx.array:
    """(B,) ids, one further token of each sequence -> (B, V) logits of what follows."""
    logits: mx.array = model(ids[:, None], cache=caches)
    return logits[:, -1]


def take(caches: Sequence[Any], rows: mx.array) -> list[Any]:
    """Caches of these rows, in this order, a row as often as it is named. The given ones stay as they are."""
    return [_take(cache, rows) for cache in caches]


def _take(cache: Any, rows: mx.array) -> Any:
    taken = copy.copy(cache)
    if type(cache) is CacheList:
        taken.caches = tuple(_take(part, rows) for part in cache.caches)
    elif isinstance(cache, (BatchKVCache, BatchRotatingKVCache, ArraysCache)):
        taken.filter(rows)
    elif cache.keys is not None:
        taken.keys, taken.values = cache.keys[rows], cache.values[rows]
    return taken


def clone(caches: Sequence[Any]) -> list[Any]:
    """Caches with the same content, which go on by themselves. For those of which no rows can be taken."""
    return copy.deepcopy(list(caches))


# --- sample -----------------------------------------------------------------------------------------------------------
# Text out of a model, one answer at a time; and how tokens are drawn, for `batch_sample` too.
#
# Only these two files, and `kv` beside them, touch mlx-lm's generator and caches.

_Prompt = str | list[dict[str, Any]]
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
    prompt: _Prompt | Sequence[int],
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


def complete(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: _Prompt | Sequence[int],
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


# --- batch sample -----------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 32  # sequences decoded at one time, where nothing else is said
_CLEAR = 256  # steps between two clearings of MLX's buffers: a cache that grows leaves many sizes behind


class Sampled(NamedTuple):
    """An answer: its tokens as sampled, and why it ended."""

    ids: list[int]  # the eos id that ended it included
    finish: str  # "eos", "stop" or "length"


def sample_batch(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int,
    rows: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[list[Sampled]]:
    """`samples` answers to each prompt, in the order of the prompts.

    An answer's randomness is its own, by `seed` and by which prompt and sample it is. The same call gives the same ids;
    other `rows` differ only where rounding decides. MLX's global random state is never drawn from, and every module's
    training flag is as before at the end.

    Args:
        prompts: token ids, as `encode_prompt` gives them.
        rows: most sequences decoded at one time; 32 if not given. Memory grows with it.
        on_done: called with how many answers were finished since it was called last.
    Raises:
        ConfigError: numbers out of bounds, or answers that should end at eos where there is no eos id.
        DataError: no prompts, or an empty one.
    """
    rows = ROWS_AT_ONCE if rows is None else rows
    _check(tokenizer, prompts, sampling, samples, rows)
    ends = frozenset(tokenizer.eos_token_ids) if sampling.stop_at_eos else frozenset[int]()
    # A key each, whatever batch it comes to stand in.
    keys = mx.random.split(mx.random.key(seed), len(prompts) * samples)
    found: list[list[Sampled]] = [[] for _ in prompts]
    from mlx_lm.generate import wired_limit

    with evaluating(model), wired_limit(model):
        alone = not takes_rows(model)
        for group in _groups(prompts, 1 if alone else max(1, rows // samples), pads(model)):
            caches, logits = prefill(model, [prompts[i] for i in group])
            wanted = [(place, prompt * samples + k) for place, prompt in enumerate(group) for k in range(samples)]
            most = 1 if alone else rows
            for start in range(0, len(wanted), most):
                block = wanted[start : start + most]
                openings = [_opening(tokenizer, prompts[number // samples], sampling) for _, number in block]
                decoding = _Decoding(tokenizer, sampling, ends, openings, on_done or (lambda n: None))
                if alone:
                    own, first = clone(caches), logits
                else:
                    places = mx.array([place for place, _ in block])
                    own, first = take(caches, places), logits[places]
                noise = Noise(keys[mx.array([number for _, number in block])])
                for (_, number), answer in zip(block, decoding.run(model, own, first, noise)):
                    found[number // samples].append(answer)
    return found


def text_of(tokenizer: TokenizerWrapper, answer: Sampled, sampling: Sampling, prompt: Sequence[int] = ()) -> str:
    """An answer as text, as `stream` shows it: without the eos, and up to where a stop string begins.

    Args:
        prompt: its ids; needed for `stop_in_answer` where prompts may open a thought.
    """
    from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

    # The wrapper's own detokenizer drops a leading space, which belongs to the text where a prompt is plain text.
    whole = NaiveStreamingDetokenizer(tokenizer._tokenizer)
    for token in answer.ids[: -1 if answer.finish == "eos" else None]:
        whole.add_token(token)
    whole.finalize()
    return until_stop(whole.text, sampling.stop, _opening(tokenizer, prompt, sampling), sampling.stop_in_answer)


def _opening(tokenizer: TokenizerWrapper, prompt: Sequence[int], sampling: Sampling) -> str:
    """The mark by which a prompt has opened a thought, where that bears on where answers end."""
    return opening_after(tokenizer, prompt) if sampling.stop and sampling.stop_in_answer else ""


def _check(tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, samples: int, rows: int) -> None:
    for name, number in (("samples", samples), ("rows", rows)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; at least 1")
    if sampling.stop_at_eos and not tokenizer.eos_token_ids:
        raise ConfigError(
            "the tokenizer has no eos token, so no answer can end at one; set rollout.stop_at_eos to false, and "
            "answers end at a stop string or at max_tokens"
        )
    if not prompts:
        raise DataError("there are no prompts to answer")
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise DataError(f"prompt {empty[0]} is empty ({len(empty)} are): there is no token to go on from")


def _groups(prompts: Sequence[Sequence[int]], most: int, pads: bool) -> Iterator[list[int]]:
    """Numbers of the prompts that are computed together: neighbours in length, so that little of it is padding."""
    group: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if len(group) == most or (group and not pads and len(prompts[i]) != len(prompts[group[0]])):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


class _Decoding:
    """Rows that go on, a token each at a step, until all have ended."""

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        ends: frozenset[int],
        openings: Sequence[str],
        on_done: Callable[[int], None],
    ) -> None:
        self._tokenizer, self._sampling, self._ends, self._on_done = tokenizer, sampling, ends, on_done
        self._openings = openings
        self._without = never_drawn(tokenizer, sampling)
        # A token is at least a byte of text, but for a few special ones.
        self._window = max((len(text.encode()) for text in sampling.stop), default=0) + 8

    def run(self, model: nn.Module, caches: list[Any], logits: mx.array, noise: Noise) -> list[Sampled]:
        """The answers of (B, V) first logits' rows; the caches are used up."""
        ids: list[list[int]] = [[] for _ in range(logits.shape[0])]
        finish: list[str | None] = [None] * len(ids)
        rows = list(range(len(ids)))  # which answer a row of the batch is
        drawn = pick(logits, self._sampling, noise, self._without)
        del logits
        mx.async_eval(drawn)
        for n in range(1, self._sampling.max_tokens + 1):
            ahead = None
            if n < self._sampling.max_tokens:
                # The next step is on its way before this one's tokens are read; for rows that end here it is wasted.
                ahead = pick(step(model, caches, drawn), self._sampling, noise, self._without)
                mx.async_eval(ahead)
            ended = 0
            for i, token in zip(rows, cast("list[int]", drawn.tolist())):
                if finish[i] is None:
                    ids[i].append(checked(token))
                    finish[i] = self._end(ids[i], self._openings[i])
                    ended += finish[i] is not None
            if ended:
                self._on_done(ended)
            going = [place for place, i in enumerate(rows) if finish[i] is None]
            if ahead is None or not going:
                break
            if len(going) <= _worth(len(rows)):
                keep = mx.array(going)
                caches, ahead, rows = take(caches, keep), ahead[keep], [rows[place] for place in going]
                noise.take(keep)
            drawn = ahead
            if n % _CLEAR == 0:
                mx.clear_cache()
        return [Sampled(answer, why or "length") for answer, why in zip(ids, finish)]

    def _end(self, ids: list[int], opening: str) -> str | None:
        """Why an answer ends with its last token, if it does."""
        if ids[-1] in self._ends:
            return "eos"
        if self._sampling.stop:
            text = self._tokenizer.decode(ids[-self._window :])
            if any(stop in text for stop in self._sampling.stop) and self._stops(ids, opening):
                return "stop"
        return "length" if len(ids) == self._sampling.max_tokens else None

    def _stops(self, ids: list[int], opening: str) -> bool:
        """Whether a stop string, which there is, counts."""
        if not self._sampling.stop_in_answer:
            return True
        text = self._tokenizer.decode(ids)
        return len(until_stop(text, self._sampling.stop, opening)) < len(text)


def _worth(rows: int) -> int:
    """How few of the rows must be going on for the others to leave: that copies the caches once, so not for each."""
    return rows * 3 // 4
