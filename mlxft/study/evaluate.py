"""Evaluate a model on a file: loss and perplexity, or a task, with standard errors and paired differences."""

from __future__ import annotations

import gc
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from rich import text
from rich.console import Console
from rich.table import Column, Table

from mlxft.config import DataSettings
from mlxft.data.chat import Thoughts, by_template, opening_of
from mlxft.data.dataset import OVERFLOW, context_ids, encode_rows, plan_epoch, prompt_text
from mlxft.data.formats import FORMATS, Example, Message, is_template, unwritten
from mlxft.data.sources import Problem, Row, read_rows, report_lines
from mlxft.errors import CheckpointError, ConfigError, DataError, MlxftError, ModelError, nearest
from mlxft.files import (
    EVALUATION,
    check_file,
    check_writable,
    claim,
    hold,
    is_empty,
    is_ours,
    is_stream,
    note,
    our_folder,
    read_mark,
    remove,
    write_text,
    writing,
)
from mlxft.model.adapters import base_noted, kept_template, read_adapter_config, template_of
from mlxft.model.cpu import quicker
from mlxft.model.folder import NO_NUMBERS
from mlxft.model.layers import probing
from mlxft.model.load import Loaded, context_of, stated_name
from mlxft.model.logits import Split, hidden_logprobs_greedy, row_sums, rows_logprobs, rows_logprobs_greedy
from mlxft.model.prefix import Rows, Sharing
from mlxft.model.sampling import ROWS_AT_ONCE, Sampling, sample_batch, text_of
from mlxft.objectives.functional import wins
from mlxft.objectives.rewards import ToScore
from mlxft.objectives.sft import make_batch
from mlxft.runs import find_adapter, is_run, load_run, open_run, versions
from mlxft.study.generate import Generated
from mlxft.study.stats import Figure, Floats64, bootstrap, mean
from mlxft.study.tasks import (
    READ,
    Case,
    Task,
    choose_shots,
    delimiter,
    items_of,
    judges,
    make_cases,
    read_task,
    with_shots,
)
from mlxft.text import bar, home_path, json_text

# --- choice -----------------------------------------------------------------------------------------------------------
# Log-likelihoods of texts that follow a context, such as choices.
#
# Tokens are computed once where possible: texts that begin alike share a row, and rows that begin alike (the choices of
# one prompt, or all rows with the same shots) share their beginning.

_PADDING = 64  # tokens of padding that cost less than another call of the model
_GAIN = 0.75  # share of the tokens below which sharing pays: its masks are slower than the causal one


class Request(NamedTuple):
    """Ids of a context, at least one, and of a text that may follow it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """The log-likelihood of a text in nats, and whether each of its tokens is the likeliest one."""

    logprob: float
    greedy: bool


class EncodedChoices(NamedTuple):
    """Texts that follow one context, as ids.

    Attributes:
        requests: one for each text, all with the same context.
        joint: characters of the context that are scored with every text; 0 where no text joins its last token.
    """

    requests: list[Request]
    joint: int


def encode_choices(
    tokenizer: Any, context: str, continuations: Sequence[str], *, plain: bool, special: bool | None = None
) -> EncodedChoices:
    """Encode a context with each text that may follow it, cut where the context's ids end.

    A tokenizer may join the beginning of a text to the context's last token, so that no cut of the whole is the text
    alone. All texts are then cut after the ids that the context shares with every whole, and log p(rest of the context
    + text) is scored. It differs from the log-probability of the whole by a term that is equal for all texts, so they
    compare; tokenised apart, a text would have tokens that no model has seen.

    Args:
        plain: the context is a plain text: the tokenizer adds its BOS, and white space at the end of the context moves
            to the text, as in lm-eval. Otherwise it is a rendered chat with its BOS.
        special: whether the tokenizer adds special tokens; default: as plain.
    Raises:
        DataError: a context has no tokens, or a text has none of its own.
    """
    bare = context.rstrip() if plain else context
    moved = context[len(bare) :]
    special = plain if special is None else special
    before = context_ids(tokenizer, bare, plain=special)
    if not before:
        raise DataError("the prompt is empty; expected at least one token")
    wholes = [context_ids(tokenizer, bare + moved + continuation, plain=special) for continuation in continuations]
    cut = min(_common(before, whole) for whole in wholes)
    sizes = [len(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (before, before[:cut])]
    joint = max(1, sizes[0] - sizes[1]) if cut < len(before) else 0
    first = before[:cut] or [_start(tokenizer)]
    for continuation, whole in zip(continuations, wholes):
        if len(whole) <= cut and continuation:
            raise DataError(f"{continuation!r:.60} adds no token to the prompt: the tokenizer drops it")
    return EncodedChoices([Request(tuple(first), tuple(whole[cut:])) for whole in wholes], joint)


def _start(tokenizer: Any) -> int:
    """Return the token before a context whose first token joins a text."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError("a choice joins the prompt's first token, and the tokenizer has no BOS or EOS to put before it")


class _Unit(NamedTuple):
    """Ids that are computed once, and the rests of the rows that begin with them."""

    prompt: tuple[int, ...]
    rests: tuple[tuple[int, ...], ...] = ()


def loglikelihoods(
    split: Split, requests: Sequence[Request], tokens: int, on_done: Callable[[int], None] | None = None
) -> list[Likelihood]:
    """Compute the log-likelihood of each text after its context.

    Args:
        tokens: of a batch, padding included; a longer row is a batch of its own.
        on_done: called with the number of texts finished since its last call.
    """
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(requests)  # as empty texts have
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
    """Return rows of ids -> the requests that each serves; no row is the beginning of another."""
    needed = [request.context + request.continuation[:-1] for request in requests]
    asking = [i for i, request in enumerate(requests) if request.continuation]
    members: dict[tuple[int, ...], list[int]] = {}
    last: tuple[int, ...] = ()
    # In this order a row follows those that begin with it.
    for i in sorted(asking, key=lambda i: needed[i], reverse=True):
        if last[: len(needed[i])] != needed[i]:
            last = needed[i]
            members[last] = []
        members[last].append(i)
    return members


def _units(
    members: dict[tuple[int, ...], list[int]], requests: Sequence[Request], tokens: int, sharing: Sharing
) -> list[_Unit]:
    """Split rows so that few tokens are computed: not at all, after each context, or after their common start."""
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
    """Yield all rests of one prompt, which is computed again for each batch of `tokens`."""
    batch: list[tuple[int, ...]] = []
    for rest in sorted(rests, key=len):
        size, real = (len(batch) + 1) * len(rest), sum(map(len, batch)) + len(rest)
        # Another call costs the prompt again.
        padded = size - real > max(_PADDING + len(prompt), real // 10)
        if batch and (len(prompt) + size > tokens or padded):
            yield _Unit(prompt, tuple(batch))
            batch = []
        batch.append(rest)
    yield _Unit(prompt, tuple(batch))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many ids two rows share at the beginning; so do all rows between them in order."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _cost(units: Sequence[_Unit]) -> int:
    return sum(len(unit.prompt) + sum(map(len, unit.rests)) for unit in units)


def _batches(units: Sequence[_Unit], tokens: int) -> Iterator[list[_Unit]]:
    """Batch units of like length, up to a number of tokens and with little padding."""
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
    """Return the computed tokens, padding included."""
    rests = [rest for unit in batch for rest in unit.rests]
    return len(batch) * max(len(unit.prompt) for unit in batch) + len(rests) * max(map(len, rests), default=0)


def _asked(
    batch: Sequence[_Unit], members: dict[tuple[int, ...], list[int]], requests: Sequence[Request]
) -> tuple[list[int], list[int], list[int]]:
    """Return the requests that a batch serves, in order, the flat positions of all their tokens, and the tokens."""
    prompts = max(len(unit.prompt) for unit in batch)
    rests = max((len(rest) for unit in batch for rest in unit.rests), default=0)
    own: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    row = 0
    for b, unit in enumerate(batch):
        # A prompt without rests, or whose own ids are a row too, serves requests itself.
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
) -> tuple[Floats64, npt.NDArray[np.bool_]]:
    """Return log-probabilities of the labels, and whether each is the likeliest token."""
    where, wanted = mx.array(positions, dtype=mx.int32), mx.array(labels, dtype=mx.int32)
    prompts = _padded([unit.prompt for unit in batch])
    rests = [rest for unit in batch for rest in unit.rests]
    if not rests:
        logprobs, greedy = rows_logprobs_greedy(sharing.split, prompts, where, wanted)
    else:
        rows = Rows(
            ids=_padded(rests),
            prompts=prompts,
            begins=mx.array([len(unit.prompt) for unit in batch]),
            of=mx.array([b for b, unit in enumerate(batch) for _ in unit.rests]),
        )
        logprobs, greedy = hidden_logprobs_greedy(sharing.split, sharing.hidden(rows)[where], wanted)
    mx.eval(logprobs, greedy)
    return np.array(logprobs, dtype=np.float64), np.array(greedy)


def _padded(rows: Sequence[tuple[int, ...]]) -> mx.array:
    """Return (B, T) int32, padded on the right, where causal attention never sees it."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return mx.array(ids)


# --- evaluate ---------------------------------------------------------------------------------------------------------
# Scores of a model for each row of a task, figures with errors, and differences of two models.
#
# task = read_task("configs/eval-reviews.yaml")
# cases = make_cases(read_rows("test.jsonl", "test"), task)
# result = run_task(load("runs/a"), cases, task)  # shots=[...] are cases of other rows
# print(result.figures()["accuracy"], paired_differences(result, other)[0])

EVAL_TOKENS = 2048  # of a batch, padding included
_MAX_TOKENS = 256
_ANY = 1 << 31  # no limit


@dataclass(frozen=True)
class Evaluated:
    """The result of a model on a task.

    Attributes:
        kind: loss, choice or generate.
        rows: the evaluated rows' places, in order.
        scores: metric -> (n,) a score for each row; for a loss the mean over the row's tokens, in nats.
        weights: metric -> (n,) weights of rows other than 1: tokens.
        predictions: a mapping for each row: row, prompt, prediction, target, scores and more.
        notes: on rows that are left out or unusual.
    """

    task: str
    kind: str
    rows: list[str]
    scores: dict[str, Floats64]
    predictions: list[dict[str, Any]]
    weights: dict[str, Floats64] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Figure]:
        """Return metric -> mean, standard error and number of rows; for a loss the perplexity too."""
        found = {name: mean(values, self.weights.get(name)) for name, values in self.scores.items()}
        if "loss" in found:
            loss = found["loss"]
            value = _exp(loss.value)
            found["perplexity"] = Figure(value, value * loss.se, loss.n)  # by the delta method
        return found

    def only(self, rows: Set[str]) -> Evaluated:
        """Return the result on some of the rows."""
        kept = [i for i, where in enumerate(self.rows) if where in rows]
        scores, weights = ({k: v[kept] for k, v in of.items()} for of in (self.scores, self.weights))
        lines = [self.predictions[i] for i in kept]
        return replace(self, rows=[self.rows[i] for i in kept], scores=scores, weights=weights, predictions=lines)


class Paired(NamedTuple):
    """One model against another on the same rows.

    Attributes:
        difference: mean of the first's scores minus the second's; `se` its standard error.
        low, high: its bootstrap interval.
        won, lost, tied: rows on which the first is better, worse, or neither; a lower loss is better.
    """

    metric: str
    n: int
    difference: float
    se: float
    low: float
    high: float
    won: int
    lost: int
    tied: int


def paired_differences(a: Evaluated, b: Evaluated, *, seed: int = 0, confidence: float = 0.95) -> list[Paired]:
    """Return the difference of `a` and `b` for each metric.

    Raises:
        ConfigError: they have different rows or tokens.
    """
    if a.rows != b.rows or a.scores.keys() != b.scores.keys():
        raise ConfigError(f"the two were not evaluated on the same rows by the same task: {a.task}, {b.task}")
    found = []
    for name, values in a.scores.items():
        other, weights = b.scores[name], a.weights.get(name)
        if weights is not None and not np.array_equal(weights, b.weights[name]):
            raise ConfigError(
                "the two models tokenise the same text differently, so their losses per token do not compare; compare "
                "them by a task with choices or metrics"
            )
        interval = bootstrap(values, other, weights, seed=seed, confidence=confidence)
        better = other - values if a.kind == "loss" else values - other
        share = np.array(wins(mx.array(better, mx.float32), mx.array(np.abs(values) + np.abs(other), mx.float32)))
        won, lost = int((share == 1).sum()), int((share == 0).sum())
        around = interval.difference, mean(values - other, weights).se, interval.low, interval.high
        found.append(Paired(name, len(values), *around, won, lost, len(values) - won - lost))
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def run_task(
    loaded: Loaded,
    cases: Sequence[Case],
    task: Task,
    *,
    shots: Sequence[Case] = (),
    tokens: int = EVAL_TOKENS,
    max_length: int | None = None,
    overflow: str = "error",
    seed: int = 0,
    console: Console | None = None,
) -> Evaluated:
    """Evaluate a model on the cases of a task.

    Args:
        loaded: a model that writes text; its training flags are restored at the end.
        shots: solved cases that are shown before each (choice and generate only).
        tokens: of a batch, padding included.
        max_length: most tokens of a row, completion included; default: the model's context.
        overflow: what to do with a longer row: "error" reports them all, "drop" leaves them out and counts them;
            a loss can also "truncate" and, for texts, "split".
        seed: of sampling, where the task has a temperature.
        console: shows progress.
    Raises:
        ConfigError, DataError: the task, its rows or shots do not fit the model.
        RewardError: a function does not return a number.
    """
    wanted = OVERFLOW if task.kind == "loss" else OVERFLOW[:2]
    if overflow not in wanted:
        raise ConfigError(f"overflow is {overflow!r}; a {task.kind} task takes {', '.join(wanted)}")
    if task.kind == "loss" and shots:
        raise ConfigError("shots are shown before prompts: give a task with choices or metrics (--task), not a loss")
    if not cases:
        raise DataError("there are no rows to evaluate")
    how = _How(loaded, task, tokens, max_length or context_of(loaded.config), overflow, seed, console)
    with quicker(loaded.model):
        if task.kind == "loss":
            return _loss(how, cases)
        return _choice(how, cases, shots) if task.kind == "choice" else _generate(how, cases, shots)


@dataclass(frozen=True)
class _How:
    """What all kinds of tasks need."""

    loaded: Loaded
    task: Task
    tokens: int
    limit: int | None
    overflow: str
    seed: int
    console: Console | None

    @property
    def chat(self) -> bool:
        return self.task.template == "auto" and bool(self.loaded.tokenizer.has_chat_template)

    def fitting(self, cases: Sequence[Case], lengths: Sequence[int], shots: int) -> tuple[list[int], list[str]]:
        """Return the indices of the cases that fit the context, and notes on the others."""
        limit = self.limit
        long = [i for i, length in enumerate(lengths) if limit is not None and length > limit]
        if not long:
            return list(range(len(cases))), []
        whose = f"prompt, {shots} shots and completion" if shots else "prompt and completion"
        if self.overflow == "error" or len(long) == len(cases):
            lines = [f"{cases[i].where}: {whose} take {lengths[i]:,} tokens; the context has {limit:,}" for i in long]
            ways = ["fewer shots"] if shots else []
            ways += ["a smaller max_tokens"] if self.task.kind == "generate" else []
            ways += ["--overflow drop, which leaves such rows out"]
            raise DataError(f"{report_lines(lines)}\nuse {', or '.join(ways)}")
        left = set(long)
        return [i for i in range(len(cases)) if i not in left], [
            f"{len(long):,} of {len(cases):,} rows are left out: {whose} take more than the context's {limit:,} tokens"
        ]


def _for_evaluation(text: str) -> str:
    """Return a message about training rows with the names of an evaluation's options."""
    names = {"data.max_length": "--max-length", "data.overflow:": "--overflow"}
    names |= {"left to train on": "left to evaluate", "trained token": "evaluated token"}
    for theirs, ours in names.items():
        text = text.replace(theirs, ours)
    return text.replace("--max-length and data.train_on", "--max-length and a task's train_on")


def _loss(how: _How, cases: Sequence[Case]) -> Evaluated:
    task, tokenizer = how.task, how.loaded.tokenizer
    examples = [Example(case.where, case.item) for case in cases if case.item is not None]
    try:
        data = encode_rows(
            examples,
            tokenizer,
            train_on=task.train_on or "assistant",
            max_length=how.limit or _ANY,
            overflow=how.overflow,
            chat=task.template == "auto",
        )
    except (ConfigError, DataError) as e:
        raise type(e)(_for_evaluation(str(e))) from e
    split, lengths = Split(how.loaded.model), np.array([len(row.ids) for row in data.rows])
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    slots = plan_epoch(lengths, tokens=how.tokens, seed=None)
    with probing(how.loaded.model), bar(how.console, len(data.rows), "rows") as advance:
        for slot in slots:
            rows = [data.rows[i] for i in slot.rows]
            a = make_batch(rows, slot.width).data
            logprobs = rows_logprobs(split, a.ids, a.positions, a.labels, grad=False)
            totals = np.array(row_sums(-logprobs, a.positions // slot.width, len(rows)))
            for row, total in zip(rows, totals):
                sums[row.where] = sums.get(row.where, 0.0) + float(total)
                counts[row.where] = counts.get(row.where, 0) + int(row.trained.sum())
            advance(len(rows))
    by_place = {case.where: case for case in cases}
    places = [case.where for case in cases if case.where in counts]
    losses = np.array([sums[w] / counts[w] for w in places])
    if np.isnan(losses).any():
        raise ModelError(NO_NUMBERS)
    lines = [
        {
            "row": w,
            "prompt": by_place[w].prompt,
            "target": by_place[w].label,
            "tokens": counts[w],
            "scores": {"loss": x},
        }
        for w, x in zip(places, losses.tolist())
    ]
    weights = {"loss": np.array([counts[w] for w in places], dtype=np.float64)}
    notes = [_for_evaluation(line) for line in data.counts.notes()]
    return Evaluated(task.name or "loss", "loss", places, {"loss": losses}, lines, weights, notes)


def _rendered(how: _How, prompt: str | list[Message], case: Case) -> str:
    """Return a prompt as text."""
    if isinstance(prompt, str):
        return prompt
    return prompt_text(prompt, how.loaded.tokenizer, tools=case.tools, where=case.where)


def _before_choice(how: _How, prompt: str | list[Message], case: Case) -> str:
    """Return a prompt as the text that a choice follows directly.

    After the generation prompt a reasoning model writes a thought, if only an empty one, or the mark of a channel; and
    some generation prompts open a thought. A choice is scored where the template writes the content of a turn.
    """
    text = _rendered(how, prompt, case)
    if isinstance(prompt, str):
        return text
    place = "\u2063answer\u2063"  # occurs in no template
    turns = [*prompt, {"role": "assistant", "content": place}]
    try:
        whole = by_template(how.loaded.tokenizer, turns, case.tools, case.where, lambda chat: chat.render(turns))
    except DataError:  # the template refuses such a turn
        return text
    begun, found, _ = whole.partition(place)
    follows = begun.startswith(text) or (opening_of(text) and text.startswith(begun))
    return begun if found and follows else text


def _choice(how: _How, cases: Sequence[Case], shots: Sequence[Case]) -> Evaluated:
    prompts = [with_shots(case, shots, how.task, how.chat) for case in cases]
    between = "" if how.chat else delimiter(how.task)
    asked: list[EncodedChoices] = []
    for case, prompt in zip(cases, prompts):
        text, ends = _before_choice(how, prompt, case), [between + c for c in case.choices]
        try:
            asked.append(encode_choices(how.loaded.tokenizer, text, ends, plain=not how.chat))
        except DataError as e:
            raise DataError(f"{case.where}: {e}") from e
    lengths = [max(len(r.context) + len(r.continuation) for r in own.requests) for own in asked]
    kept, notes = how.fitting(cases, lengths, len(shots))
    if joint := sum(asked[i].joint > 0 for i in kept):
        rows = f"{joint:,} of {len(kept):,} rows"
        notes.append(f"in {rows} a choice joins the prompt's last token, which is scored with every choice")
    flat = [request for i in kept for request in asked[i].requests]
    with bar(how.console, len(flat), "choices") as advance:
        found = [x.logprob for x in loglikelihoods(Split(how.loaded.model), flat, how.tokens, advance)]
    lines: list[dict[str, Any]] = []
    right: list[float] = []
    normed: list[float] = []
    at = 0
    for i in kept:
        case, end = cases[i], at + len(cases[i].choices)
        logprobs = np.array(found[at:end])
        at = end
        # As lm-eval's acc and acc_norm: by characters, so that long choices have no disadvantage; scored characters of
        # the prompt count too.
        sizes = [asked[i].joint + len(choice) for choice in case.choices]
        said, said_norm = int(logprobs.argmax()), int((logprobs / sizes).argmax())
        right.append(float(said == case.right))
        normed.append(float(said_norm == case.right))
        own = {"accuracy": right[-1], "accuracy_norm": normed[-1]}
        lines.append(
            {"row": case.where, "prompt": prompts[i], "prediction": case.choices[said], "target": case.label}
            | {"choices": list(case.choices), "logprobs": logprobs.tolist(), "scores": own}
        )
    scores = {"accuracy": np.array(right), "accuracy_norm": np.array(normed)}
    return Evaluated(how.task.name or "choice", "choice", [cases[i].where for i in kept], scores, lines, notes=notes)


def _generate(how: _How, cases: Sequence[Case], shots: Sequence[Case]) -> Evaluated:
    task, tokenizer = how.task, how.loaded.tokenizer
    judging = judges(task)
    prompts = [with_shots(case, shots, task, how.chat) for case in cases]
    # In plain text a model would continue with another block, as the shots show it.
    stop = tuple(task.stop if task.stop is not None else ["\n\n"] if shots and not how.chat else [])
    most = task.max_tokens or _MAX_TOKENS
    drops, ends = task.judged == "drop", bool(tokenizer.eos_token_ids)
    sampling = Sampling(most, task.temperature or 0.0, stop=stop, stop_at_eos=ends, stop_in_answer=drops)
    texts = [_rendered(how, prompt, case) for case, prompt in zip(cases, prompts)]
    ids = [context_ids(tokenizer, text, plain=not how.chat, where=case.where) for case, text in zip(cases, texts)]
    if empty := [case.where for case, own in zip(cases, ids) if not own]:
        raise DataError(f"{empty[0]}: the prompt is empty; expected at least one token")
    kept, notes = how.fitting(cases, [len(own) + most for own in ids], len(shots))
    rows = max(1, min(ROWS_AT_ONCE, 8 * how.tokens // max(len(ids[i]) + most for i in kept)))
    with bar(how.console, len(kept), "completions") as advance:
        found = sample_batch(
            how.loaded.model, tokenizer, [ids[i] for i in kept], sampling, seed=how.seed, rows=rows, on_done=advance
        )
    written = [Generated(a.ids, a.finish, text_of(tokenizer, a, sampling, ids[i])) for i, (a,) in zip(kept, found)]
    chosen = [cases[i] for i in kept]
    asked = [texts[i] if isinstance(prompts[i], list) else prompts[i] for i in kept]
    items = items_of(chosen, asked, written, [opening_of(texts[i]) for i in kept])
    scores = {name: np.asarray(judge(chosen, items), dtype=np.float64) for name, judge in judging.items()}
    lines = [
        {"row": case.where, "prompt": prompts[i], "prediction": item.completion}
        | ({"answer": item.answer} if drops and item.answer != item.completion else {})
        | {"target": _target(case), "finish": completion.finish}
        | {"scores": {name: float(values[k]) for name, values in scores.items()}}
        for k, (i, case, item, completion) in enumerate(zip(kept, chosen, items, written))
    ]
    notes += _completion_notes(items, most, drops)
    return Evaluated(task.name or "generate", "generate", [c.where for c in chosen], scores, lines, notes=notes)


def _completion_notes(items: Sequence[ToScore], most: int, drops: bool) -> list[str]:
    """Return notes on completions that are empty, cut off, or thoughts only."""
    total, empty = len(items), sum(not item.completion.strip() for item in items)
    cut, thoughts = sum(not item.finished for item in items), 0
    if drops:
        thoughts = sum(bool(item.completion.strip()) and not item.answer.strip() for item in items)
    notes = [f"{empty:,} of {total:,} completions are empty"] if empty else []
    notes += [f"{cut:,} of {total:,} completions were cut off at {most} tokens (max_tokens)"] if cut else []
    if thoughts:
        notes.append(
            f"{thoughts:,} of {total:,} completions are thoughts without an answer (thoughts: keep scores them)"
        )
    return notes


def _target(case: Case) -> str | list[str] | None:
    return list(case.answers) if len(case.answers) > 1 else case.label


# --- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """Settings of an evaluation.

    Attributes:
        tasks: names, files, or Task.
        format: of the rows; None: that of the run's rows, else the one that they look like.
        template: as data.template; overrides a task's and a run's.
        thoughts: which part of completions is scored; overrides a task's.
        shots: number of solved rows of the file `shots_from` that are shown before each prompt.
        limit: take the first rows only.
        max_length, overflow, tokens, seed: see `run_task`; the seed also picks shots and resamples.
    """

    tasks: Sequence[str | Task] = ("loss",)
    format: str | None = None
    template: str | None = None
    thoughts: Thoughts | None = None
    shots: int = 0
    shots_from: str | None = None
    limit: int | None = None
    max_length: int | None = None
    overflow: str = "error"
    tokens: int = EVAL_TOKENS
    seed: int = 0
    confidence: float = 0.95


class Compared(NamedTuple):
    """A task's result and, if there is another model, its result and the differences."""

    result: Evaluated
    other: Evaluated | None
    paired: list[Paired]


@dataclass(frozen=True)
class Evaluation:
    """The result of `mlxft eval`; `against` is None without another model."""

    model: str
    file: str
    against: str | None
    asking: Asking
    tasks: list[Compared]

    def to_json(self) -> dict[str, Any]:
        """Return the content of results.json; NaN is null."""
        found: dict[str, Any] = {
            "model": self.model,
            "file": self.file,
            "against": self.against,
            "shots": self.asking.shots,
            "seed": self.asking.seed,
            "confidence": self.asking.confidence,
            "tasks": [_task_json(found) for found in self.tasks],
            "versions": versions(),
        }
        finite: dict[str, Any] = _finite(found)
        return finite

    def lines(self) -> Iterable[dict[str, Any]]:
        """Yield the lines of predictions.jsonl: each row of each task, with the other model's prediction."""
        for result, other, _ in self.tasks:
            for i, line in enumerate(result.predictions):
                also = {}
                if other is not None:
                    kept = ("prediction", "answer", "logprobs", "finish", "scores")
                    also = {"against": {k: v for k, v in other.predictions[i].items() if k in kept}}
                yield {"task": result.task, **line, "prompt": unwritten(line["prompt"]), **also}

    def write(self, out: Path) -> None:
        """Write predictions.jsonl and results.json into a folder.

        Raises:
            CheckpointError: they cannot be written.
        """
        texts = ("".join(f"{json_text(_finite(line))}\n" for line in self.lines()), json_text(self.to_json(), 1) + "\n")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with hold(out, wait=True):
            fresh = is_empty(out) and our_folder(out) is None
            if fresh:
                claim(out, "eval")
            try:
                for name, text in zip(EVALUATION, texts):
                    write_text(out / name, text)
                    note(out / name)
            except CheckpointError:
                if fresh and is_empty(out):
                    remove(out)
                raise


def check_out(out: Path | None, overwrite: bool, model: str) -> None:
    """Check an output folder before the work.

    Args:
        out: None: `default_out` of the model.
    Raises:
        ConfigError: it cannot be written, or holds files that an evaluation would replace.
    """
    if out is None:
        if is_run(folder := home_path(model)):
            check_writable(folder / "eval" / EVALUATION[0], "--out is not given")
        return
    if is_stream(out):
        raise ConfigError(f"--out: {out} is a device or a pipe; give a folder's name")
    for file in [out / name for name in EVALUATION] if os.path.isdir(out) else [out]:
        check_file(file, overwrite)
        if file.exists() and not is_ours(file):
            raise ConfigError(f"--out: {file} is not what this version of mlxft made; choose another folder")


def _task_json(found: Compared) -> dict[str, Any]:
    result, other, paired = found
    task: dict[str, Any] = {"task": result.task, "kind": result.kind, "rows": len(result.rows)}
    task["figures"] = {name: figure._asdict() for name, figure in result.figures().items()}
    task["notes"] = result.notes
    if other is not None:
        task["against"] = {name: figure._asdict() for name, figure in other.figures().items()}
        task["paired"] = [pair._asdict() for pair in paired]
    return task


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_evaluation(
    model: str, file: str, asking: Asking, *, adapter: str | None = None, against: str | None = None, console: Console
) -> Evaluation:
    """Evaluate a model on a file and, if given, another one on the same rows.

    Args:
        model: a run, adapter, fused or other model.
        adapter: an adapter for the model.
        file: a file, folder (its test split) or hub data set, as data.train takes it.
        against: another model, or "base": what the run or adapter started from.
    Raises:
        ConfigError, DataError, ModelError: something does not fit; checks that need no model come first.
    """
    named = adapter or model
    rows = list(read_rows(file, "test"))
    if asking.limit is not None:
        rows = rows[: asking.limit]
    data = _run_data(named)
    tasks = merged([_settled(task, asking, data, rows) for task in asking.tasks])
    if asking.thoughts is not None and all(task.kind != "generate" for task in tasks):
        raise ConfigError(f"--thoughts {asking.thoughts}: is for metrics of completions; leave it out")
    asked = [make_cases(rows, task) for task in tasks]
    shots = [_shots(asking, task, cases) for task, cases in zip(tasks, asked)]
    other, options = _base(model, adapter) if against == "base" else (against, {})
    if other is not None:
        load_run(other, lazy=True, **options)  # raises now, not after the first model is done

    def evaluated(loaded: Loaded) -> list[Evaluated]:
        how: dict[str, Any] = {"tokens": asking.tokens, "overflow": asking.overflow, "seed": asking.seed}
        how |= {"max_length": asking.max_length, "console": console}
        return [run_task(loaded, cases, t, shots=s, **how) for t, cases, s in zip(tasks, asked, shots)]

    results = evaluated(load_run(model, adapter))
    if other is None:
        return Evaluation(named, file, None, asking, [Compared(result, None, []) for result in results])
    gc.collect()  # the first model's weights, before the second's
    mx.clear_cache()
    others = evaluated(load_run(other, **options))
    found = []
    for result, second in zip(results, others):
        first, second = _same_rows(result, second)
        paired = paired_differences(first, second, seed=asking.seed, confidence=asking.confidence)
        found.append(Compared(first, second, paired))
    return Evaluation(named, file, against, asking, found)


def merged(tasks: Sequence[Task]) -> list[Task]:
    """Merge tasks that differ in metrics only, so that completions are written once.

    Raises:
        ConfigError: a task is given twice.
    """
    found: dict[str, list[Task]] = {}
    for task in tasks:
        how = task.model_dump_json(exclude={"name", "metrics"})
        found.setdefault(f"{task.kind} {how}", []).append(task)
    every = []
    for alike in found.values():
        labels = [metric.label for task in alike for metric in task.metrics or []]
        if len(alike) > 1 and (alike[0].kind != "generate" or len(set(labels)) < len(labels)):
            raise ConfigError(f"--task: {alike[0].name} is given twice")
        update = {"metrics": [m for t in alike for m in t.metrics or []], "name": "+".join(t.name or "" for t in alike)}
        every.append(alike[0].model_copy(update=update) if len(alike) > 1 else alike[0])
    return every


def _same_rows(a: Evaluated, b: Evaluated) -> tuple[Evaluated, Evaluated]:
    """Return both without rows that do not fit the other's context."""
    common = set(a.rows) & set(b.rows)
    return a.only(common), b.only(common)


def _run_data(model: str) -> DataSettings | None:
    """Return the data settings of a run; None for anything else."""
    folder = home_path(model)
    try:
        return open_run(folder).config.data if (folder / "config.yaml").is_file() else None
    except MlxftError:
        return None  # loading it raises


def _settled(given: str | Task, asking: Asking, data: DataSettings | None, rows: Sequence[Row | Problem]) -> Task:
    """Return a task with the command's and the run's settings for rows."""
    task = read_task(given) if isinstance(given, str) else given
    if asking.format is not None:
        if task.prompt is not None:
            raise ConfigError(f"--format {asking.format}: task {task.name} has its own prompt; leave it out")
        if asking.format not in FORMATS:
            hint = nearest(asking.format, FORMATS)
            raise ConfigError(f"--format is {asking.format!r}; expected one of {', '.join(READ)}{hint}")
        task = task.model_copy(update={"format": asking.format})
    if asking.template is not None:
        task = task.model_copy(update={"template": asking.template})
    if asking.thoughts is not None and task.kind == "generate":
        task = task.model_copy(update={"thoughts": asking.thoughts})
    if data is None:
        return task
    update: dict[str, Any] = {}
    if "template" not in task.model_fields_set:
        update["template"] = data.template
    fits = task.prompt is None and data.format in READ and task.format in (None, data.format)
    if fits and not task.fields and _fits(data, rows):
        update |= {"format": data.format, "fields": data.fields}
        if task.kind == "loss" and task.train_on is None:
            update["train_on"] = data.train_on
    return task.model_copy(update=update)


def _fits(data: DataSettings, rows: Sequence[Row | Problem]) -> bool:
    """Return whether the first row has the fields of a run's rows."""
    first = next((row.data for row in rows if isinstance(row, Row)), {})
    names = dict.fromkeys(first, "there")
    names |= {ours: "there" for ours, theirs in data.fields.items() if is_template(theirs) or theirs in first}
    return not FORMATS[data.format].missing(names)


def _shots(asking: Asking, task: Task, cases: Sequence[Case]) -> list[Case]:
    """Return solved cases to show, from other rows than the evaluated ones."""
    if not asking.shots:
        return []
    return choose_shots(asking.shots_from or "", task, cases, asking.shots, asking.seed)


def _base(model: str, adapter: str | None) -> tuple[str, dict[str, Any]]:
    """Return the base of a run or adapter, and its loading options.

    Raises:
        ConfigError: the adapter does not name its base.
    """
    if adapter is not None:
        return model, {}
    folder = home_path(model)
    if (find_adapter(folder) / "adapter_config.json").is_file():
        options = dict(base_noted(read_adapter_config(find_adapter(folder))))
        options.pop("fingerprint", None)
        name = options.pop("model", None)
        if name is not None:
            return stated_name(str(name)), {**options, "chat_template": template_of(find_adapter(folder))}
    elif is_run(folder):
        run = open_run(folder)
        return run.config.model.path, {"chat_template": kept_template(folder, run.config.model.chat_template)}
    raise ConfigError(f"--against base: {model} does not name its base; give it: --against MODEL")


def default_out(model: str, file: str, found: Evaluation) -> Path | None:
    """Return a run's folder for an evaluation, one for each file, tasks and shots; None for other models."""
    folder = home_path(model)
    if not is_run(folder):
        return None
    names = [file.removeprefix("hf:") if file.startswith("hf:") else Path(file).stem]
    names += [task.result.task for task in found.tasks if task.result.task != "loss"]
    names += [f"{found.asking.shots}-shot"] if found.asking.shots else []
    name = re.sub(r"[^\w.+-]+", "-", "-".join(names))[:120].strip(".") or "rows"
    out = folder / "eval" / name
    # A folder without a mark may be the user's.
    numbered = (out.with_name(f"{name}-{n}") for n in itertools.count(2))
    return out if read_mark(folder) or not out.exists() else next(f for f in numbered if not f.exists())


# --- eval tables ------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Format with four digits after the point, fewer for large numbers; NaN is a dash."""
    if math.isnan(value):
        return "-"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.2f}" if abs(value) < 1e6 else f"{value:.3g}"


def with_error(figure: Figure) -> str:
    """Format a figure with its standard error."""
    return f"{_number(figure.value)} ± {_number(figure.se)}"


def show_evaluation(console: Console, found: Evaluation) -> None:
    """Print a table for each task, one for the differences, and the notes."""
    for task in found.tasks:
        shots = f", {found.asking.shots} shots" if found.asking.shots else ""
        console.print(
            text.Text(f"{task.result.task}: {len(task.result.rows):,} rows{shots}, ± standard error", style="bold")
        )
        console.print(_figures(found, task))
        if task.paired:
            console.print(_differences(found, task))
        for line in task.result.notes:
            console.print(text.Text(f"note: {line}"))
        for line in task.other.notes if task.other else []:
            console.print(text.Text(f"note ({found.against}): {line}"))


def _figures(found: Evaluation, task: Compared) -> Table:
    others = task.other.figures() if task.other else {}
    table = Table("", Column("model", justify="right"))
    if others:
        table.add_column(text.Text(found.against or ""), justify="right", overflow="fold")
    for name, figure in task.result.figures().items():
        cells = [name, with_error(figure)] + ([with_error(others[name])] if others else [])
        table.add_row(*map(text.Text, cells))
    return table


def _differences(found: Evaluation, task: Compared) -> Table:
    """Return the table of differences, the model minus the other."""
    heads = ("difference", f"{found.asking.confidence:.0%} interval", "won/lost/tied")
    table = Table("", *(Column(head, justify="right") for head in heads))
    for pair in task.paired:
        interval = "-" if math.isnan(pair.low) else f"[{pair.low:+.4f}, {pair.high:+.4f}]"
        rows = f"{pair.won}/{pair.lost}/{pair.tied}"
        table.add_row(*map(text.Text, (pair.metric, f"{pair.difference:+.4f} ± {_number(pair.se)}", interval, rows)))
    return table
