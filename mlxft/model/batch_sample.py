"""Many answers at once: prompts computed together, and once for all their samples; rows decoded side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mlxft.data.thoughts import opening_after, until_stop
from mlxft.errors import ConfigError, DataError
from mlxft.model import kv
from mlxft.model.random import evaluating
from mlxft.model.sample import Noise, Sampling, checked, never_drawn, pick

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ROWS = 32  # sequences decoded at one time, where nothing else is said
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
    rows = ROWS if rows is None else rows
    _check(tokenizer, prompts, sampling, samples, rows)
    ends = frozenset(tokenizer.eos_token_ids) if sampling.stop_at_eos else frozenset[int]()
    # A key each, whatever batch it comes to stand in.
    keys = mx.random.split(mx.random.key(seed), len(prompts) * samples)
    found: list[list[Sampled]] = [[] for _ in prompts]
    from mlx_lm.generate import wired_limit

    with evaluating(model), wired_limit(model):
        alone = not kv.takes_rows(model)
        for group in _groups(prompts, 1 if alone else max(1, rows // samples), kv.pads(model)):
            caches, logits = kv.prefill(model, [prompts[i] for i in group])
            wanted = [(place, prompt * samples + k) for place, prompt in enumerate(group) for k in range(samples)]
            most = 1 if alone else rows
            for start in range(0, len(wanted), most):
                block = wanted[start : start + most]
                openings = [_opening(tokenizer, prompts[number // samples], sampling) for _, number in block]
                decoding = _Decoding(tokenizer, sampling, ends, openings, on_done or (lambda n: None))
                if alone:
                    own, first = kv.clone(caches), logits
                else:
                    places = mx.array([place for place, _ in block])
                    own, first = kv.take(caches, places), logits[places]
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
                ahead = pick(kv.step(model, caches, drawn), self._sampling, noise, self._without)
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
                caches, ahead, rows = kv.take(caches, keep), ahead[keep], [rows[place] for place in going]
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
