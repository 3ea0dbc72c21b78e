"""Log-likelihoods of continuations: of choices after a prompt, and of whatever else is asked so.

No token goes through the model twice where that can be helped: continuations that begin alike share a row, and rows
that begin alike (the choices of one prompt, or all rows behind the same shots) share what they begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxft.data.encode import context_ids
from mlxft.errors import DataError
from mlxft.model.logits import Split
from mlxft.model.logprobs import hidden_logprobs_greedy, rows_logprobs_greedy
from mlxft.model.random import probing
from mlxft.model.shared import Sharing
from mlxft.study.stats import Floats

_PADDING = 64  # tokens of padding that cost less than one more call of the model
_GAIN = 0.75  # share of the tokens that may be left for sharing to be worth its masks, which are slower than "causal"


class Request(NamedTuple):
    """What stands before, as ids, at least one; and how it may go on."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """Of a continuation: its log-likelihood in nats, and whether each token of it is the likeliest one."""

    logprob: float
    greedy: bool


class EncodedChoices(NamedTuple):
    """Continuations of one context, as ids.

    Attributes:
        requests: one for each continuation, all after the same ids.
        joint: characters of the context that are scored along with every continuation; 0 where none joins its last
            token.
    """

    requests: list[Request]
    joint: int


def encode_choices(
    tokenizer: Any, context: str, continuations: Sequence[str], *, plain: bool, special: bool | None = None
) -> EncodedChoices:
    """Encode a text with each of its continuations, cut where the context's own ids end.

    A tokenizer may join the beginning of a continuation to the context's last token: the context's own ids are then
    not the beginning of the whole's, and no cut of the whole is the continuation alone. All continuations are then cut
    after the ids that the context has in common with every whole, and log p(rest of the context + continuation) is
    scored. It differs from the log-probability of the whole text, as the tokenizer writes it, by a term that is the
    same for all of them, so that they compare; tokenised apart, a continuation would be scored in a spelling that no
    model has seen.

    Args:
        plain: a text as it stands: the tokenizer adds what it adds by itself (a BOS), and white space that ends the
            context goes to the continuation, which may have it within a token, as lm-eval does. Otherwise it is a
            rendered chat, which has both its BOS and the place where an answer begins.
        special: whether the tokenizer adds what it adds by itself; default: as plain.
    Raises:
        DataError: a context without tokens, or a continuation without any of its own.
    """
    bare = context.rstrip() if plain else context
    moved = context[len(bare) :]
    special = plain if special is None else special
    before = context_ids(tokenizer, bare, plain=special)
    if not before:
        raise DataError("the prompt is empty: there is no token to go on from")
    wholes = [context_ids(tokenizer, bare + moved + continuation, plain=special) for continuation in continuations]
    cut = min(_common(before, whole) for whole in wholes)
    sizes = [len(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (before, before[:cut])]
    joint = max(1, sizes[0] - sizes[1]) if cut < len(before) else 0
    first = before[:cut] or [_start(tokenizer)]
    for continuation, whole in zip(continuations, wholes):
        if len(whole) <= cut and continuation:
            raise DataError(f"{continuation!r:.60} adds no token to the prompt: the tokenizer leaves it out")
    return EncodedChoices([Request(tuple(first), tuple(whole[cut:])) for whole in wholes], joint)


def _start(tokenizer: Any) -> int:
    """The token before a text whose first token joins a continuation."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError("a choice joins the prompt's first token, and the tokenizer has no BOS or EOS to begin a text with")


class _Unit(NamedTuple):
    """Ids that go through the model once, and the rests of the rows that begin with them."""

    prompt: tuple[int, ...]
    rests: tuple[tuple[int, ...], ...] = ()


def loglikelihoods(
    split: Split, requests: Sequence[Request], tokens: int, on_done: Callable[[int], None] | None = None
) -> list[Likelihood]:
    """The log-likelihood of each continuation after its context.

    Args:
        tokens: of a batch, padding included; a longer row is a batch of its own.
        on_done: told how many continuations were finished since it was told last.
    """
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(requests)  # what an empty continuation has
    members = _members(requests)
    sharing = Sharing(split)
    if on_done is not None and (empty := sum(not request.continuation for request in requests)):
        on_done(empty)
    if not members:
        return found
    with probing(split.model):
        for batch in _batches(_units(members, requests, tokens, sharing), tokens):
            own, positions, labels = _asked(batch, members, requests)
            logprobs, greedy = _read(sharing, batch, positions, labels)
            at = 0
            for i in own:
                end = at + len(requests[i].continuation)
                found[i] = Likelihood(float(logprobs[at:end].sum()), bool(greedy[at:end].all()))
                at = end
            if on_done is not None:
                on_done(len(own))
    return found


def _members(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    """Rows of ids that go through the model -> the requests that each answers; no row is the beginning of another."""
    needed = [request.context + request.continuation[:-1] for request in requests]
    asking = [i for i, request in enumerate(requests) if request.continuation]
    members: dict[tuple[int, ...], list[int]] = {}
    last: tuple[int, ...] = ()
    # In this order a row stands right behind the ones that begin with it.
    for i in sorted(asking, key=lambda i: needed[i], reverse=True):
        if last[: len(needed[i])] != needed[i]:
            last = needed[i]
            members[last] = []
        members[last].append(i)
    return members


def _units(
    members: dict[tuple[int, ...], list[int]], requests: Sequence[Request], tokens: int, sharing: Sharing
) -> list[_Unit]:
    """The rows, cut the way that leaves the fewest tokens to compute: not at all, after each context, or all at once
    after what all of them begin with."""
    plain = [_Unit(row) for row in members]
    by_context: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for row, asking in members.items():
        begins = min(len(requests[i].context) for i in asking)
        by_context.setdefault(row[:begins], []).append(row[begins:])
    contexts = []
    for prompt, rests in by_context.items():
        one = [_Unit(prompt + rest) for rest in rests]
        contexts += one if len(one) == 1 else [_Unit(prompt, tuple(rests))]
    common = min(_common(min(members), max(members)), min(map(len, members)) - 1)
    plans = [contexts]
    if common > 0:
        plans.append(list(_behind(min(members)[:common], [row[common:] for row in members], tokens)))
    best = min(plans, key=_cost)
    if _cost(best) > _GAIN * _cost(plain) or not (sharing.split.separable and sharing.possible):
        return plain
    return best


def _behind(prompt: tuple[int, ...], rests: Sequence[tuple[int, ...]], tokens: int) -> Iterator[_Unit]:
    """All rests behind one prompt, which is computed again for each batch of `tokens`."""
    batch: list[tuple[int, ...]] = []
    for rest in sorted(rests, key=len):
        size, real = (len(batch) + 1) * len(rest), sum(map(len, batch)) + len(rest)
        # Here one more call costs the prompt once more.
        padded = size - real > max(_PADDING + len(prompt), real // 10)
        if batch and (len(prompt) + size > tokens or padded):
            yield _Unit(prompt, tuple(batch))
            batch = []
        batch.append(rest)
    yield _Unit(prompt, tuple(batch))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two rows have in common at the beginning; of the first and last in order: all between them too."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _cost(units: Sequence[_Unit]) -> int:
    return sum(len(unit.prompt) + sum(map(len, unit.rests)) for unit in units)


def _batches(units: Sequence[_Unit], tokens: int) -> Iterator[list[_Unit]]:
    """Units of like length share a batch of so many tokens, little of which is padding."""
    batch: list[_Unit] = []
    for unit in sorted(units, key=lambda unit: (len(unit.prompt), max(map(len, unit.rests), default=0))):
        size = _size([*batch, unit])
        real = _cost([*batch, unit])
        if batch and (size > tokens or size - real > max(_PADDING, real // 10)):
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _size(batch: Sequence[_Unit]) -> int:
    """Tokens that are computed, padding included."""
    rests = [rest for unit in batch for rest in unit.rests]
    return len(batch) * max(len(unit.prompt) for unit in batch) + len(rests) * max(map(len, rests), default=0)


def _asked(
    batch: Sequence[_Unit], members: dict[tuple[int, ...], list[int]], requests: Sequence[Request]
) -> tuple[list[int], list[int], list[int]]:
    """The requests that a batch answers, in order; the flat positions of all their tokens, and the tokens."""
    prompts = max(len(unit.prompt) for unit in batch)
    rests = max((len(rest) for unit in batch for rest in unit.rests), default=0)
    own: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    row = 0
    for b, unit in enumerate(batch):
        # A prompt without rests, or one whose own ids are a row too, is answered by itself.
        for rest in unit.rests or ((),):
            begins = len(batch) * prompts + row * rests - len(unit.prompt)
            row += bool(rest)
            for i in members[unit.prompt + rest]:
                first = len(requests[i].context) - 1
                for at in range(first, first + len(requests[i].continuation)):
                    positions.append(b * prompts + at if at < len(unit.prompt) else begins + at)
                own.append(i)
                labels += requests[i].continuation
    return own, positions, labels


def _read(
    sharing: Sharing, batch: Sequence[_Unit], positions: list[int], labels: list[int]
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Log-probabilities of the labels, and whether each is the likeliest token."""
    where, wanted = mx.array(positions, dtype=mx.int32), mx.array(labels, dtype=mx.int32)
    prompts = _padded([unit.prompt for unit in batch])
    rests = [rest for unit in batch for rest in unit.rests]
    if not rests:
        logprobs, greedy = rows_logprobs_greedy(sharing.split, prompts, where, wanted)
    else:
        arrays = {
            "prompts": prompts,
            "begins": mx.array([len(unit.prompt) for unit in batch]),
            "ids": _padded(rests),
            "of": mx.array([b for b, unit in enumerate(batch) for _ in unit.rests]),
        }
        logprobs, greedy = hidden_logprobs_greedy(sharing.split, sharing.hidden(arrays)[where], wanted)
    mx.eval(logprobs, greedy)
    return np.array(logprobs, dtype=np.float64), np.array(greedy)


def _padded(rows: Sequence[tuple[int, ...]]) -> mx.array:
    """(B, T) int32, padded on the right, where causal attention never sees it."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return mx.array(ids)
