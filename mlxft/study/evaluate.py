"""Evaluate a model on a file: loss and perplexity, or a task, with standard errors and paired differences."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mlxft.config import DataSettings
from mlxft.data.chat import Thoughts, by_template, opening_of
from mlxft.data.dataset import (
    OVERFLOW,
    Slot,
    context_ids,
    encode_pairs,
    encode_rows,
    lengths_of,
    plan_epoch,
    prompt_text,
)
from mlxft.data.formats import FORMATS, Example, Message, is_template, names_of, recognise, unwritten, with_completion
from mlxft.data.sources import Problem, Row, read_rows, report_lines
from mlxft.distributed import Portion, current
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
from mlxft.model.heads import find_head, head_of, read_scores
from mlxft.model.layers import probing
from mlxft.model.load import Loaded, context_of, stated_name
from mlxft.model.logits import Split, hidden_logprobs_greedy, row_sums, rows_logprobs, rows_logprobs_greedy
from mlxft.model.prefix import Rows, Sharing
from mlxft.model.sampling import ROWS_AT_ONCE, Sampling, sample_shared, text_of
from mlxft.objectives.episodes import LIMITS, EnvironmentSettings, Episode
from mlxft.objectives.functional import wins
from mlxft.objectives.pairs import completions_of, stack, stack_pairs
from mlxft.objectives.preference import REFERRED, PreferenceSettings
from mlxft.objectives.rewards import ToScore
from mlxft.objectives.sft import make_batch
from mlxft.runs import find_adapter, is_run, load_run, open_run, versions
from mlxft.study.generate import Asked, Met, check_shared, shared_bar
from mlxft.study.report import evaluation_tables
from mlxft.study.stats import Figure, Floats64, bootstrap, mean, t_quantile, wilson
from mlxft.study.tasks import (
    PAIRED,
    READ,
    Case,
    Task,
    choose_shots,
    delimiter,
    make_cases,
    open_scorers,
    read_task,
    with_shots,
)
from mlxft.text import home_path, json_text, parse_json, read_file

# --- choice -----------------------------------------------------------------------------------------------------------
# Log-likelihoods of texts that follow a context, such as choices.
#
# Tokens are computed once where possible: texts that begin alike share a row, and rows that begin alike (the choices of
# one prompt, or all rows with the same shots) share their beginning.

_Ids = tuple[int, ...]
_T = TypeVar("_T")
_PADDING = 64  # tokens of padding that cost less than another call of the model
_GAIN = 0.75  # share of the tokens below which sharing pays: its masks are slower than the causal one


class Request(NamedTuple):
    """Ids of a context, at least one, and of a text that may follow it."""

    context: _Ids
    continuation: _Ids


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
    special = plain if special is None else special
    before = context_ids(tokenizer, context.rstrip() if plain else context, plain=special)
    if not before:
        raise DataError("the prompt is empty; expected at least one token")
    wholes = [context_ids(tokenizer, context + continuation, plain=special) for continuation in continuations]
    cut = min(_common(before, whole) for whole in wholes)
    sizes = [len(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (before, before[:cut])]
    joint = max(1, sizes[0] - sizes[1]) if cut < len(before) else 0
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    first = before[:cut] or [int(token) for token in starts if token is not None][:1]
    if not first:
        raise DataError("a choice joins the prompt's first token, and the tokenizer has no BOS or EOS to put before it")
    for continuation, whole in zip(continuations, wholes):
        if len(whole) <= cut and continuation:
            raise DataError(f"{continuation!r:.60} adds no token to the prompt: the tokenizer drops it")
    return EncodedChoices([Request(tuple(first), tuple(whole[cut:])) for whole in wholes], joint)


class _Unit(NamedTuple):
    """Ids that are computed once, and the rests of the rows that begin with them -> the requests that a row serves.

    The rest () is the prompt alone.
    """

    prompt: _Ids
    rests: dict[_Ids, list[int]]


def loglikelihoods(
    split: Split, requests: Sequence[Request], tokens: int, on_done: Callable[[int], None] | None = None
) -> list[Likelihood]:
    """Compute the log-likelihood of each text after its context; ranks share the batches.

    Args:
        tokens: of a batch, padding included; a longer row is a batch of its own.
        on_done: called with the number of texts that this rank has finished since its last call.
    """
    found: dict[int, Likelihood] = {}
    done = on_done or (lambda count: None)
    asked = [i for i, request in enumerate(requests) if request.continuation]
    done(len(requests) - len(asked))
    sharing = Sharing(split)
    with probing(split.model):
        units = _units(requests, asked, tokens, sharing) if asked else []
        # Units of like length have little padding.
        units.sort(key=lambda unit: (len(unit.prompt), max(map(len, unit.rests))))
        batches = [*_cut(units, lambda batch: batch, tokens, _PADDING)]

        def read(batch: list[_Unit]) -> list[tuple[int, float, bool]]:
            own = _read(sharing, batch, requests)
            done(len(own))
            return [(i, *likelihood) for i, likelihood in own.items()]

        for own in current().each(batches, [_size(batch)[0] for batch in batches], read):
            found |= {i: Likelihood(logprob, greedy) for i, logprob, greedy in own}
    return [found.get(i, Likelihood(0.0, True)) for i in range(len(requests))]  # an empty text's is 1


def _units(requests: Sequence[Request], asked: Sequence[int], tokens: int, sharing: Sharing) -> list[_Unit]:
    """Split rows so that few tokens are computed: not at all, after each context, or after their common start."""
    rows: dict[_Ids, list[int]] = {}
    by_context: dict[_Ids, dict[_Ids, list[int]]] = {}
    for i in asked:
        context, text = requests[i]
        rows.setdefault(context + text[:-1], []).append(i)
        by_context.setdefault(context, {}).setdefault(text[:-1], []).append(i)
    plain = [_Unit(row, {(): served}) for row, served in rows.items()]
    contexts = []
    for context, rests in by_context.items():
        served = [i for own in rests.values() for i in own]
        shared = sum(map(bool, rests)) > 1
        contexts.append(_Unit(context, rests) if shared else _Unit(context + max(rests, key=len), {(): served}))
    plans = [contexts]
    common = min(_common(min(rows), max(rows)), min(map(len, rows)) - 1)
    if common > 0:
        start = min(rows)[:common]
        after = sorted(((row[common:], served) for row, served in rows.items()), key=lambda pair: len(pair[0]))
        # The start is computed again in each batch.
        parts = _cut(after, lambda part: [_Unit(start, dict(part))], tokens, _PADDING + common)
        plans.append([_Unit(start, dict(part)) for part in parts])
    best = min(plans, key=lambda units: _size(units)[1])
    if _size(best)[1] > _GAIN * _size(plain)[1]:
        return plain
    # All ranks make the same batches.
    if not all(current().gather(bool(sharing.split.separable and sharing.possible))):
        return plain
    return best


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many ids two rows share at the beginning; so do all rows between them in order."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _cut(
    items: Sequence[_T], units: Callable[[list[_T]], Sequence[_Unit]], tokens: int, padding: int
) -> Iterator[list[_T]]:
    """Yield batches of items, in order, up to a number of tokens and with little padding.

    Args:
        units: function that returns the units of some items.
        padding: tokens of padding that cost less than another call of the model.
    """
    batch: list[_T] = []
    for item in items:
        size, real = _size(units([*batch, item]))
        if batch and (size > tokens or size - real > max(padding, real // 10)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _size(units: Sequence[_Unit]) -> tuple[int, int]:
    """Return the tokens of a batch, with padding and without."""
    prompts = [len(unit.prompt) for unit in units]
    rests = [len(rest) for unit in units for rest in unit.rests if rest]
    return len(prompts) * max(prompts) + len(rests) * max(rests, default=0), sum(prompts) + sum(rests)


def _read(sharing: Sharing, batch: Sequence[_Unit], requests: Sequence[Request]) -> dict[int, Likelihood]:
    """Compute a batch and return the likelihoods of the requests that it serves."""
    prompts, rests = [unit.prompt for unit in batch], [rest for unit in batch for rest in unit.rests if rest]
    width, rest_width = max(map(len, prompts)), max(map(len, rests), default=0)
    own: list[int] = []
    positions: list[int] = []  # flat, in all prompts and then all rests
    row = 0
    for b, unit in enumerate(batch):
        for rest, served in unit.rests.items():
            begins = len(batch) * width + row * rest_width - len(unit.prompt)
            row += bool(rest)
            for i in served:
                first = len(requests[i].context) - 1
                places = range(first, first + len(requests[i].continuation))
                positions += [b * width + at if at < len(unit.prompt) else begins + at for at in places]
            own += served
    at, labels = mx.array(positions), mx.array([token for i in own for token in requests[i].continuation])
    if not rests:
        logprobs, greedy = rows_logprobs_greedy(sharing.split, _padded(prompts), at, labels)
    else:
        rows = Rows(
            ids=_padded(rests),
            prompts=_padded(prompts),
            begins=mx.array([len(prompt) for prompt in prompts]),
            of=mx.array([b for b, unit in enumerate(batch) for rest in unit.rests if rest]),
        )
        logprobs, greedy = hidden_logprobs_greedy(sharing.split, sharing.hidden(rows)[at], labels)
    mx.eval(logprobs, greedy)
    ends = np.cumsum([len(requests[i].continuation) for i in own])[:-1]
    values = np.split(np.array(logprobs, dtype=np.float64), ends), np.split(np.array(greedy), ends)
    return {i: Likelihood(float(x.sum()), bool(y.all())) for i, x, y in zip(own, *values)}


def _padded(rows: Sequence[_Ids]) -> mx.array:
    """Return (B, T) int32, padded on the right, where causal attention never sees it."""
    return mx.array(np.array([*itertools.zip_longest(*rows, fillvalue=0)], dtype=np.int32).T)


# --- evaluate ---------------------------------------------------------------------------------------------------------
# Scores of a model for each row of a task, figures with errors, and differences of two models.
#
# task = read_task("configs/eval-reviews.yaml")
# cases = make_cases(read_rows("test.jsonl", "test"), task)
# result = run_task(load("runs/a"), cases, task)  # shots=[...] are cases of other rows
# print(result.figures()["accuracy"], paired_differences(result, other)[0])

EVAL_TOKENS = 2048  # of a batch, padding included
_MAX_TOKENS = 256


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
        max_length: most tokens of a row, completion included; default: the model's context.
        overflow: what to do with a longer row: "error" reports them all, "drop" leaves them out and counts them;
            a loss can also "truncate" and, for texts, "split".
        tokens: of a batch, padding included.
        seed: for shots, sampling and resamples.
        answers: of a loss: number of rows, the first ones, whose prompts the model also completes.
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
    answers: int = 0


@dataclass(frozen=True)
class Evaluated:
    """The result of a model on a task.

    Attributes:
        kind: loss, pairs, choice or generate.
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
            value = math.exp(loss.value) if loss.value < 700 else math.inf
            found["perplexity"] = Figure(value, value * loss.se, loss.n)  # by the delta method
        return found

    def intervals(self, asking: Asking) -> dict[str, list[float]]:
        """Return metric -> its confidence interval: Wilson's of an accuracy, else by bootstrap over rows."""
        found = {}
        for name, values in self.scores.items():
            if "accuracy" in name:
                found[name] = [*wilson(float(values.mean()), len(values), asking.confidence)]
            else:
                around = bootstrap(values, np.zeros(len(values)), seed=asking.seed, confidence=asking.confidence)
                found[name] = [around.low, around.high]
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


def run_task(
    loaded: Loaded,
    cases: Sequence[Case],
    task: Task,
    asking: Asking | None = None,
    *,
    shots: Sequence[Case] = (),
    console: Console | None = None,
) -> Evaluated:
    """Evaluate a model on the cases of a task; ranks share the work, and all of them return the result.

    Args:
        loaded: a model that writes text; its training flags are restored at the end.
        asking: its max_length, overflow, tokens and seed.
        shots: solved cases that are shown before each (choice and generate only).
        console: shows progress.
    Raises:
        ConfigError, DataError: the task, its rows or shots do not fit the model, or ranks differ in them.
        RewardError: a function does not return a number.
    """
    asking = asking or Asking()
    wanted = OVERFLOW if task.kind == "loss" else OVERFLOW[:2]
    if asking.overflow not in wanted:
        raise ConfigError(f"overflow is {asking.overflow!r}; a {task.kind} task takes {', '.join(wanted)}")
    if task.kind in ("loss", "pairs") and shots:
        raise ConfigError(
            "shots are shown before prompts: give a task with choices or metrics (--task), "
            f"not {'a loss' if task.kind == 'loss' else 'pairs'}"
        )
    if asking.answers and task.kind != "loss":
        raise ConfigError(f"--answers {asking.answers}: is for a loss; {task.name or task.kind} has no use for it")
    if not cases:
        raise DataError("there are no rows to evaluate")
    rows = [(c.row, c.prompt, c.answers, c.choices, c.item, c.tools) for c in (*cases, *shots)]
    check_shared(loaded, "the task and its rows", (asking, task, rows))
    evaluate = {"loss": _loss, "pairs": _pairs, "choice": _choice, "generate": _generate}[task.kind]
    with quicker(loaded.model):
        return evaluate(_How(loaded, task, asking, shots, console), cases)


@dataclass(frozen=True)
class _How:
    """What all kinds of tasks need."""

    loaded: Loaded
    task: Task
    asking: Asking
    shots: Sequence[Case]
    console: Console | None

    @property
    def limit(self) -> int:
        return self.asking.max_length or context_of(self.loaded.config) or 1 << 31

    @property
    def chat(self) -> bool:
        return self.task.template == "auto" and bool(self.loaded.tokenizer.has_chat_template)

    def rendered(self, prompt: str | list[Message], case: Case) -> str:
        """Return a prompt as text."""
        if isinstance(prompt, str):
            return prompt
        return prompt_text(prompt, self.loaded.tokenizer, tools=case.tools, where=case.where)

    def fitting(self, cases: Sequence[Case], lengths: Sequence[int]) -> tuple[list[int], list[str]]:
        """Return the indices of the cases that fit the context, and notes on the others."""
        limit = self.limit
        long = [i for i, length in enumerate(lengths) if length > limit]
        if not long:
            return list(range(len(cases))), []
        whose = f"prompt, {len(self.shots)} shots and completion" if self.shots else "prompt and completion"
        if self.asking.overflow == "error" or len(long) == len(cases):
            lines = [f"{cases[i].where}: {whose} take {lengths[i]:,} tokens; the context has {limit:,}" for i in long]
            ways = ["fewer shots"] if self.shots else []
            ways += ["a smaller max_tokens"] if self.task.kind == "generate" else []
            ways += ["--overflow drop, which leaves such rows out"]
            raise DataError(f"{report_lines(lines)}\nuse {', or '.join(ways)}")
        note = (
            f"{len(long):,} of {len(cases):,} rows are left out: {whose} take more than the context's {limit:,} tokens"
        )
        return [i for i, length in enumerate(lengths) if length <= limit], [note]

    def result(
        self, lines: list[dict[str, Any]], notes: list[str], weights: dict[str, Floats64] | None = None
    ) -> Evaluated:
        """Return the result of a line for each row."""
        scores = {name: np.array([line["scores"][name] for line in lines]) for name in lines[0]["scores"]}
        name, rows = self.task.name or self.task.kind, [line["row"] for line in lines]
        return Evaluated(name, self.task.kind, rows, scores, lines, weights or {}, notes)


def _for_evaluation(text: str) -> str:
    """Return a message about training rows with the names of an evaluation's options."""
    names = {"data.max_length": "--max-length", "data.overflow:": "--overflow", "data.train_on": "a task's train_on"}
    names |= {"left to train on": "left to evaluate", "trained token": "evaluated token"}
    for theirs, ours in names.items():
        text = text.replace(theirs, ours)
    return text


def _loss(how: _How, cases: Sequence[Case]) -> Evaluated:
    task, tokenizer = how.task, how.loaded.tokenizer
    examples = [Example(case.where, case.item) for case in cases if case.item is not None]
    try:
        data = encode_rows(
            examples,
            tokenizer,
            train_on=task.train_on or "assistant",
            max_length=how.limit,
            overflow=how.asking.overflow,
            chat=task.template == "auto",
        )
    except (ConfigError, DataError) as e:
        raise type(e)(_for_evaluation(str(e))) from e
    split, lengths = Split(how.loaded.model), np.array([len(row.ids) for row in data.rows])
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    slots = plan_epoch(lengths, tokens=how.asking.tokens, seed=None)
    with probing(how.loaded.model), shared_bar(how.console, len(data.rows), "rows") as advance:

        def totals(slot: Slot) -> list[float]:
            rows = [data.rows[i] for i in slot.rows]
            a = make_batch(rows, slot.width).data
            logprobs = rows_logprobs(split, a.ids, a.positions, a.labels, grad=False)
            found = np.array(row_sums(-logprobs, a.positions // slot.width, len(rows)), dtype=np.float64)
            advance(len(rows))
            return found.tolist()

        for slot, found in zip(slots, current().each(slots, [s.width * len(s.rows) for s in slots], totals)):
            for row, total in zip((data.rows[i] for i in slot.rows), found):
                sums[row.where] = sums.get(row.where, 0.0) + total
                counts[row.where] = counts.get(row.where, 0) + int(row.trained.sum())
    kept = [case for case in cases if case.where in counts]
    lines = [
        {"row": c.where, "prompt": c.prompt, "target": c.label, "tokens": counts[c.where]}
        | {"scores": {"loss": sums[c.where] / counts[c.where]}}
        for c in kept
    ]
    if how.asking.answers:
        asked = [case for case in kept if case.prompt][: how.asking.answers]
        if not asked:
            raise ConfigError("--answers: the rows have no prompts to complete; leave it out")
        plain = replace(how, task=Task(name="answers", template=task.template))
        written = {line.pop("row"): line for line in _generate(plain, asked).predictions}
        names = ("prediction", "answer", "finish")
        for line in lines:
            line |= {name: value for name, value in written.get(line["row"], {}).items() if name in names}
    weights = np.array([counts[c.where] for c in kept], dtype=np.float64)
    result = how.result(lines, [_for_evaluation(line) for line in data.counts.notes()], {"loss": weights})
    if np.isnan(result.scores["loss"]).any():
        raise ModelError(NO_NUMBERS)
    return result


def _pairs(how: _How, cases: Sequence[Case]) -> Evaluated:
    """Compare the completions of pairs: by the model's score if it has a head, else by their log-probabilities."""
    task, model = how.task, how.loaded.model
    examples = [Example(case.where, case.item) for case in cases if case.item is not None]
    chat = task.template == "auto"
    try:
        data = encode_pairs(
            examples, how.loaded.tokenizer, max_length=how.limit, overflow=how.asking.overflow, chat=chat
        )
    except (ConfigError, DataError) as e:
        raise type(e)(_for_evaluation(str(e))) from e
    pairs = [pair for pair in data.rows if not pair.tie]
    if not pairs:
        raise DataError("there is no pair with a better completion")
    scored, sharing = head_of(model) is not None, Sharing(Split(model))

    def measured(slot: Slot) -> list[list[float]]:
        here = [pairs[i] for i in slot.rows]
        if scored:
            batch = stack([side for sides in zip(*map(completions_of, here)) for side in sides], slot.width)
            values = read_scores(sharing.split, batch.ids, batch.last)
        else:
            batch = stack_pairs(here, slot.width, sharing)
            values = row_sums(sharing.logprobs(batch, grad=False), batch.owners, 2 * len(here))
        advance(len(here))
        return [[float(v) for v in both] for both in np.array(values, dtype=np.float64).reshape(2, -1).T]

    slots = plan_epoch(lengths_of(pairs), tokens=max(1, how.asking.tokens // 2), seed=None)
    with probing(model), shared_bar(how.console, len(pairs), "pairs") as advance:
        found = current().each(slots, [2 * s.width * len(s.rows) for s in slots], measured)
    order = [i for slot in slots for i in slot.rows]
    both = np.array([value for values in found for value in values])[np.argsort(order)]
    if not np.isfinite(both).all():
        raise ModelError(NO_NUMBERS)
    by_row: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_row.setdefault(pair.where, []).append(i)
    lines = []
    for case in cases:
        if not (mine := by_row.get(case.where)):
            continue
        sizes = [[len(pairs[i].chosen_ids), len(pairs[i].rejected_ids)] for i in mine]
        line: dict[str, Any] = {
            "row": case.where,
            "prompt": case.prompt,
            "target": None,
            "weights": [pairs[i].weight for i in mine],
        }
        line |= {"values": both[mine].tolist(), "tokens": sizes}
        lines.append(line | {"scores": _preferred("", line, both[mine], scored)})
    notes = [_for_evaluation(note) for note in data.counts.notes()]
    of = "the reward model's score" if scored else "the log-probability of a completion, in nats"
    return how.result(lines, [*notes, f"accuracy and margin are of {of}"])


def _preferred(prefix: str, line: Mapping[str, Any], values: Floats64, scored: bool = True) -> dict[str, float]:
    """Return the accuracy and the margin of a row's pairs.

    Args:
        values: (n, 2) of chosen and rejected completions.
        scored: whether they are scores; else log-probabilities, which are also compared per token.
    """
    kinds = {prefix: values} | ({} if scored else {"_per_token": values / np.array(line["tokens"])})
    found = {}
    for name, both in kinds.items():
        won = np.array(wins(mx.array(both[:, 0] - both[:, 1], mx.float32), mx.array(np.abs(both).sum(1), mx.float32)))
        head, tail = ("", name) if name.startswith("_") else (name, "")
        found[f"{head}accuracy{tail}"] = float(np.average(won, weights=line["weights"]))
        found[f"{head}margin{tail}"] = float(np.average(both[:, 0] - both[:, 1], weights=line["weights"]))
    return found


class _Reference(NamedTuple):
    """What a run's implicit rewards compare with, and their strength."""

    path: str
    adapter: str | None
    options: dict[str, Any]
    strength: float
    per_token: bool

    def scored(self, result: Evaluated, reference: Evaluated) -> Evaluated:
        """Return a result of pairs with accuracy and margin of implicit rewards, as the run's validation has them."""
        theirs = {line["row"]: line for line in reference.predictions}
        lines = []
        for line in result.predictions:
            apart = np.array(line["values"]) - np.array(theirs[line["row"]]["values"])
            rewards = self.strength * (apart / np.array(line["tokens"]) if self.per_token else apart)
            lines.append(line | {"scores": line["scores"] | _preferred("reward_", line, rewards)})
        scores = {name: np.array([line["scores"][name] for line in lines]) for name in lines[0]["scores"]}
        note = f"reward_accuracy and reward_margin are of implicit rewards, next to the run's reference {self.path}"
        return replace(result, predictions=lines, scores=scores, notes=[*result.notes, note])


def _reference(model: str) -> _Reference | None:
    """Return what a run of objective preference compares with; None where its loss has no reference."""
    if not is_run(folder := home_path(model)):
        return None
    config = open_run(folder).config
    if config.objective != "preference":
        return None
    settings = config.section("preference", PreferenceSettings)
    if settings.loss not in REFERRED:
        return None
    options = config.model.model_dump(include={"dtype", "quantize", "group_size"})
    options["chat_template"] = kept_template(folder, config.model.chat_template)
    return _Reference(config.model.path, config.model.adapter, options, settings.strength, settings.loss == "ipo")


def _before_choice(how: _How, prompt: str | list[Message], case: Case) -> str:
    """Return a prompt as the text that a choice follows directly.

    After the generation prompt a reasoning model writes a thought, if only an empty one, or the mark of a channel; and
    some generation prompts open a thought. A choice is scored where the template writes the content of a turn.
    """
    text = how.rendered(prompt, case)
    if isinstance(prompt, str):
        return text
    place = "\u2063answer\u2063"  # occurs in no template
    turns = with_completion(prompt, place)
    try:
        whole = by_template(how.loaded.tokenizer, turns, case.tools, case.where, lambda chat: chat.render(turns))
    except DataError:  # the template refuses such a turn
        return text
    begun, found, _ = whole.partition(place)
    follows = begun.startswith(text) or (opening_of(text) and text.startswith(begun))
    return begun if found and follows else text


def _choice(how: _How, cases: Sequence[Case]) -> Evaluated:
    prompts = [with_shots(case, how.shots, how.task, how.chat) for case in cases]
    between = "" if how.chat else delimiter(how.task)
    asked: list[EncodedChoices] = []
    for case, prompt in zip(cases, prompts):
        text, ends = _before_choice(how, prompt, case), [between + c for c in case.choices]
        try:
            asked.append(encode_choices(how.loaded.tokenizer, text, ends, plain=not how.chat))
        except DataError as e:
            raise DataError(f"{case.where}: {e}") from e
    lengths = [max(len(r.context) + len(r.continuation) for r in own.requests) for own in asked]
    kept, notes = how.fitting(cases, lengths)
    if joint := sum(asked[i].joint > 0 for i in kept):
        rows = f"{joint:,} of {len(kept):,} rows"
        notes.append(f"in {rows} a choice joins the prompt's last token, which is scored with every choice")
    flat = [request for i in kept for request in asked[i].requests]
    with shared_bar(how.console, len(flat), "choices") as advance:
        found = iter(loglikelihoods(Split(how.loaded.model), flat, how.asking.tokens, advance))
    lines: list[dict[str, Any]] = []
    for i in kept:
        case, logprobs = cases[i], np.array([next(found).logprob for _ in cases[i].choices])
        # As lm-eval's acc and acc_norm: by characters, so that long choices have no disadvantage; scored characters of
        # the prompt count too.
        sizes = [asked[i].joint + len(choice) for choice in case.choices]
        first, normed = int(logprobs.argmax()), int((logprobs / sizes).argmax())
        lines.append(
            {"row": case.where, "prompt": prompts[i], "prediction": case.choices[first], "target": case.label}
            | {"choices": list(case.choices), "logprobs": logprobs.tolist()}
            | {"scores": {"accuracy": float(first == case.right), "accuracy_norm": float(normed == case.right)}}
        )
    return how.result(lines, notes)


def _generate(how: _How, cases: Sequence[Case]) -> Evaluated:
    task, tokenizer, chat = how.task, how.loaded.tokenizer, how.chat
    scorers = open_scorers(task)
    prompts = [with_shots(case, how.shots, task, chat) for case in cases]
    # In plain text a model would continue with another block, as the shots show it.
    stop = tuple(task.stop if task.stop is not None else ["\n\n"] if how.shots and not chat else [])
    most = task.max_tokens or _MAX_TOKENS
    drops, ends = task.thoughts != "keep", bool(tokenizer.eos_token_ids)
    sampling = Sampling(most, task.temperature or 0.0, stop=stop, stop_at_eos=ends, stop_in_answer=drops)
    texts = [how.rendered(prompt, case) for case, prompt in zip(cases, prompts)]
    ids = [context_ids(tokenizer, text, plain=not chat, where=case.where) for case, text in zip(cases, texts)]
    if empty := [case.where for case, own in zip(cases, ids) if not own]:
        raise DataError(f"{empty[0]}: the prompt is empty; expected at least one token")
    kept, notes = how.fitting(cases, [len(own) + most for own in ids])
    rows = max(1, min(ROWS_AT_ONCE, 8 * how.asking.tokens // max(len(ids[i]) + most for i in kept)))
    model, wanted, seed = how.loaded.model, [ids[i] for i in kept], how.asking.seed
    with shared_bar(how.console, len(kept), "completions") as advance:
        found = sample_shared(model, tokenizer, wanted, sampling, seed=seed, rows=rows, on_done=advance)
    items = [
        ToScore(
            prompt_ids=np.zeros(0, dtype=np.int32),
            reply_ids=np.array(sampled.ids, dtype=np.int32),
            prompt=texts[i],
            completion=text_of(tokenizer, sampled, sampling, ids[i]),
            row=cases[i].row,
            finished=sampled.finish != "length",
            where=cases[i].where,
            opening=opening_of(texts[i]),
        )
        for i, (sampled,) in zip(kept, found)
    ]
    chosen = [cases[i] for i in kept]

    def scored(part: Portion) -> list[dict[str, float]]:
        values = {name: scorer(chosen[part.here], items[part.here]) for name, scorer in scorers.items()}
        return [{name: float(values[name][k]) for name in values} for k in range(part.stop - part.start)]

    scores = current().in_portions(len(items), scored)
    lines = [
        {"row": case.where, "prompt": prompts[i], "prediction": item.completion}
        | ({"answer": item.answer} if drops and item.answer != item.completion else {})
        | {"target": list(case.answers) if len(case.answers) > 1 else case.label, "finish": sampled.finish}
        | {"scores": of_one}
        for i, case, item, (sampled,), of_one in zip(kept, chosen, items, found, scores)
    ]
    return how.result(lines, notes + _completion_notes(items, most, drops))


def _completion_notes(items: Sequence[ToScore], most: int, drops: bool) -> list[str]:
    empty = sum(not item.completion.strip() for item in items)
    cut = sum(not item.finished for item in items)
    thoughts = sum(bool(item.completion.strip()) and not item.answer.strip() for item in items) if drops else 0
    notes = {
        "are empty": empty,
        f"were cut off at {most} tokens (max_tokens)": cut,
        "are thoughts without an answer (thoughts: keep scores them)": thoughts,
    }
    return [f"{count:,} of {len(items):,} completions {what}" for what, count in notes.items() if count]


# --- evaluation -------------------------------------------------------------------------------------------------------


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

    @property
    def key(self) -> str:
        """Return what names the evaluation: a hash of the file's place, of the tasks, and of what is asked of rows."""
        asked = asdict(replace(self.asking, tasks=[], tokens=0, seed=0, confidence=0.0))
        tasks = [task if isinstance(task, str) else task.model_dump(mode="json") for task in self.asking.tasks]
        place = self.file if self.file.startswith("hf:") else str(home_path(self.file).absolute())
        names = [found.result.task for found in self.tasks]  # of an environment, which asking.tasks lacks
        return blake2b(json.dumps([place, tasks, names, asked]).encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the content of results.json; NaN is null."""
        found = {
            "model": self.model,
            "file": self.file,
            "against": self.against,
            "shots": self.asking.shots,
            "seed": self.asking.seed,
            "confidence": self.asking.confidence,
            "key": self.key,
            "tasks": [_task_json(found, self.asking) for found in self.tasks],
            "versions": versions(),
        }
        return dict(_finite(found))

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of predictions.jsonl: each row of each task, with the other model's prediction."""
        kept = ("prediction", "answer", "logprobs", "finish", "scores", "values")
        for result, other, _ in self.tasks:
            for i, line in enumerate(result.predictions):
                also = {k: other.predictions[i][k] for k in kept if k in other.predictions[i]} if other else {}
                against = {"against": also} if other else {}
                yield {"task": result.task, **line, "prompt": unwritten(line["prompt"]), **against}

    def write(self, out: Path) -> None:
        """Write predictions.jsonl and results.json into a folder.

        Raises:
            CheckpointError: they cannot be written.
        """
        texts = ("".join(f"{json_text(_finite(line))}\n" for line in self.lines()), json_text(self.to_json(), 1) + "\n")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with hold(out, wait=True):
            if fresh := is_empty(out) and our_folder(out) is None:
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


def _task_json(found: Compared, asking: Asking) -> dict[str, Any]:
    result, other, paired = found
    task: dict[str, Any] = {"task": result.task, "kind": result.kind, "rows": len(result.rows)}
    task["figures"] = {name: figure._asdict() for name, figure in result.figures().items()}
    task["notes"] = result.notes
    if result.kind == "pairs":
        task["intervals"] = result.intervals(asking)
    if other is not None:
        task["against"] = {name: figure._asdict() for name, figure in other.figures().items()}
        if other.kind == "pairs":
            task["against_intervals"] = other.intervals(asking)
        task["paired"] = [pair._asdict() for pair in paired]
    return task


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    return parse_json(json.dumps(value), parse_constant=lambda name: None)


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
    named, said = adapter or model, list[str]()
    rows = list(read_rows(file, "test", said))
    if asking.limit is not None:
        rows = rows[: asking.limit]
    data = _run_data(named)
    tasks = merged([_settled(task, asking, data, rows) for task in asking.tasks])
    if asking.thoughts is not None and all(task.kind != "generate" for task in tasks):
        raise ConfigError(f"--thoughts {asking.thoughts}: is for metrics of completions; leave it out")
    asked = [make_cases(rows, task) for task in tasks]
    shots = [
        choose_shots(asking.shots_from or "", task, cases, asking.shots, asking.seed) if asking.shots else []
        for task, cases in zip(tasks, asked)
    ]
    other, options = base_of(model, adapter) if against == "base" else (against, {})
    heads = [find_head(name) for name in (named, other) if name is not None]
    if any(heads) and not all(heads) and all(task.pairs for task in tasks):
        raise ConfigError(f"--against {against}: only one of the two is a reward model; name another reward run")
    scores: dict[str, Any] = {"scores": all(heads) and all(task.pairs for task in tasks)}
    if other is not None:
        load_run(other, lazy=True, **options, **scores)  # raises now, not after the first model is done

    def evaluated(path: str, adapter: str | None, **options: Any) -> list[Evaluated]:
        loaded = load_run(path, adapter, **options, **scores)
        every = zip(tasks, asked, shots)
        found = [run_task(loaded, cases, task, asking, shots=own, console=console) for task, cases, own in every]
        del loaded
        gc.collect()  # the weights, before the next model's
        mx.clear_cache()
        return found

    results = evaluated(model, adapter)
    results[0].notes[:0] = said
    others = None if other is None else evaluated(other, None, **options)
    reference = _reference(named) if any(task.pairs for task in tasks) else None
    if reference is not None:
        same = others is not None and reference[:2] == (other, None)
        base = others if same else evaluated(reference.path, reference.adapter, **reference.options)
        assert base is not None

        def rewarded(found: list[Evaluated]) -> list[Evaluated]:
            return [reference.scored(one, by) if one.kind == "pairs" else one for one, by in zip(found, base)]

        results, others = rewarded(results), None if others is None else rewarded(others)
    if others is None:
        return Evaluation(named, file, None, asking, [Compared(result, None, []) for result in results])
    found = []
    for result, second in zip(results, others):
        common = set(result.rows) & set(second.rows)  # those that fit both contexts
        first, second = result.only(common), second.only(common)
        paired = paired_differences(first, second, seed=asking.seed, confidence=asking.confidence)
        found.append(Compared(first, second, paired))
    return Evaluation(named, file, against, asking, found)


def run_episodes(
    model: str,
    file: str,
    environment: EnvironmentSettings,
    asking: Asking,
    *,
    adapter: str | None = None,
    against: str | None = None,
    console: Console,
) -> Evaluation:
    """Evaluate a model in an environment and, if given, another one on the same rows: the reward of episodes.

    Turns are the likeliest ones, of at most 256 tokens.

    Args:
        file: rows of data.format: prompts; or environment, for its own.
        asking: its limit, seed and confidence.
        model, adapter, against: as for `run_evaluation`.
    Raises:
        ConfigError, DataError, ModelError, EpisodeError: something does not fit, or the environment fails.
    """
    named = adapter or model
    other, options = base_of(model, adapter) if against == "base" else (against, {})

    def evaluated(loaded: Loaded) -> Evaluated:
        asked = Asked(file, loaded, limit=asking.limit, met=Met(environment))
        with quicker(loaded.model):
            blocks = asked.played(Sampling(_MAX_TOKENS, temperature=0.0), 1, asking.seed, console)
            pairs = [(prompt, episode) for block in blocks for prompt, (episode,) in block]
        rewards = np.array([sum(value for _, value in episode.rewards) for _, episode in pairs])
        lines = [
            {"row": prompt.where, "prompt": prompt.item.prompt, "prediction": episode.text, "finish": episode.ended}
            | {"messages": unwritten(episode.messages), "turns": episode.turns, "scores": {"reward": float(reward)}}
            for (prompt, episode), reward in zip(pairs, rewards)
        ]
        notes = _episode_notes([episode for _, episode in pairs], rewards, asking.confidence)
        rows = [prompt.where for prompt, _ in pairs]
        return Evaluated(str(environment.path), "episodes", rows, {"reward": rewards}, lines, notes=notes)

    first = evaluated(load_run(model, adapter))
    if other is None:
        return Evaluation(named, file, None, asking, [Compared(first, None, [])])
    gc.collect()  # the first model's weights, before the second's
    mx.clear_cache()
    second = evaluated(load_run(other, **options))
    paired = paired_differences(first, second, seed=asking.seed, confidence=asking.confidence)
    return Evaluation(named, file, against, asking, [Compared(first, second, paired)])


def _episode_notes(episodes: Sequence[Episode], rewards: Floats64, confidence: float) -> list[str]:
    """Return the interval of the mean reward, and the numbers of episodes, as sentences."""
    around, n = mean(rewards), len(episodes)
    notes = []
    if n > 1:
        reach = t_quantile((1 + confidence) / 2, n - 1) * around.se
        low, high = around.value - reach, around.value + reach
        notes.append(f"the {confidence:.0%} interval of the mean reward is [{low:.4f}, {high:.4f}]")
    counts = {"turns": sum(e.turns for e in episodes), "tool errors": sum(e.errors for e in episodes)}
    counts["turns with calls that cannot be parsed"] = sum(e.unparsed for e in episodes)
    notes.append(", ".join(f"{count / n:.2f} {name}" for name, count in counts.items()) + " in the mean of an episode")
    ends = {why: sum(e.ended == why for e in episodes) for why in (*LIMITS, "error")}
    notes += [f"{count:,} of {n:,} episodes ended by {why}" for why, count in ends.items() if count]
    return notes


def merged(tasks: Sequence[Task]) -> list[Task]:
    """Merge tasks that differ in metrics only, so that completions are written once.

    Raises:
        ConfigError: a task is given twice.
    """
    found: dict[tuple[str, str], Task] = {}
    for task in tasks:
        key = task.kind, task.model_dump_json(exclude={"name", "metrics"})
        if (other := found.get(key)) is not None:
            metrics = [*(other.metrics or []), *(task.metrics or [])]
            if task.kind != "generate" or len({metric.label for metric in metrics}) < len(metrics):
                raise ConfigError(f"--task: {task.name} is given twice")
            task = other.model_copy(update={"metrics": metrics, "name": f"{other.name or ''}+{task.name or ''}"})
        found[key] = task
    return list(found.values())


def _run_data(model: str) -> DataSettings | None:
    folder = home_path(model)
    try:
        return open_run(folder).config.data if is_run(folder) else None
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
            raise ConfigError(f"--format is {asking.format!r}; expected one of {', '.join((*READ, *PAIRED))}{hint}")
    own = data.format if data is not None and task.format is None and _fits(data, rows) else None
    if task.kind == "loss" and task.prompt is None and (task.format or own or _looks_like(rows)) in PAIRED:
        task = task.model_copy(update={"pairs": True, "name": "pairs" if task.name == "loss" else task.name})
    thoughts = asking.thoughts if task.kind == "generate" else None
    options = {"format": asking.format, "template": asking.template, "thoughts": thoughts}
    task = task.model_copy(update={name: value for name, value in options.items() if value is not None})
    if data is None:
        return task
    update: dict[str, Any] = {}
    if "template" not in task.model_fields_set:
        update["template"] = data.template
    takes = PAIRED if task.pairs else READ
    fits = task.prompt is None and data.format in takes and task.format in (None, data.format)
    if fits and not task.fields and _fits(data, rows):
        update |= {"format": data.format, "fields": data.fields}
        if task.kind == "loss" and task.train_on is None:
            update["train_on"] = data.train_on
    return task.model_copy(update=update)


def _looks_like(rows: Sequence[Row | Problem]) -> str | None:
    try:
        return recognise(rows).format
    except DataError:  # the task says what is wrong
        return None


def _fits(data: DataSettings, rows: Sequence[Row | Problem]) -> bool:
    """Return whether the first row has the fields of a run's rows."""
    first = next((row.data for row in rows if isinstance(row, Row)), {})
    names = dict.fromkeys(names_of(first), "there")
    names |= {ours: "there" for ours, theirs in data.fields.items() if is_template(theirs) or theirs in names}
    return not FORMATS[data.format].missing(names)


def base_of(model: str, adapter: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the base of a run or adapter, and its loading options; raise ConfigError if it does not name one."""
    if adapter is not None:
        return model, {}
    folder = home_path(model)
    own = find_adapter(folder)
    if (own / "adapter_config.json").is_file():
        options = base_noted(read_adapter_config(own))
        if (name := options.pop("model", None)) is not None:
            options.pop("fingerprint", None)
            return stated_name(str(name)), {**options, "chat_template": template_of(own)}
    elif is_run(folder):
        m = open_run(folder).config.model
        return m.path, {"dtype": m.dtype, "chat_template": kept_template(folder, m.chat_template)}
    raise ConfigError(f"base: {model} does not name its base; give the base's own name")


def default_out(model: str, file: str, found: Evaluation) -> Path | None:
    """Return a run's folder for an evaluation, one for each `key`; None for other models.

    Its name has those of the file, tasks and shots, and a number where another evaluation has that name.
    """
    folder = home_path(model)
    if not is_run(folder):
        return None
    names = [file.removeprefix("hf:") if file.startswith("hf:") else Path(file).stem]
    names += [task.result.task for task in found.tasks if task.result.task != "loss"]
    names += [f"{found.asking.shots}-shot"] if found.asking.shots else []
    name = re.sub(r"[^\w.+-]+", "-", "-".join(names))[:120].strip(".") or "rows"
    places = (folder / "eval" / (f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    return next(place for place in places if not place.exists() or (read_mark(folder) and _is_same(place, found)))


def _is_same(folder: Path, found: Evaluation) -> bool:
    """Return whether a folder of the run holds an earlier result of the same evaluation, or none."""
    file = folder / EVALUATION[1]
    try:
        before = parse_json(read_file(file)) if file.exists() else {}
        if not before or "key" in before:
            return not before or bool(before["key"] == found.key)
        # Written by an older version, without a key.
        names = [task["task"] for task in before["tasks"]]
        return bool(before["file"] == found.file and names == [task.result.task for task in found.tasks])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def show_evaluation(console: Console, found: Evaluation) -> None:
    """Print the tables of each task and its notes."""
    data = found.to_json()
    for task, (result, other, _) in zip(data["tasks"], found.tasks):
        title, tables = evaluation_tables(data, task)
        console.print(Text(title, style="bold"))
        for columns, rows in tables:
            heads = (Column(Text(name), justify="right", overflow="fold") for name in columns)
            table = Table("", *heads)
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
        for line in result.notes:
            console.print(Text(f"note: {line}"))
        for line in other.notes if other else []:
            console.print(Text(f"note ({found.against}): {line}"))
