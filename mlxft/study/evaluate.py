"""What a model makes of a task's rows: a score for each row, figures with their errors, and differences of two models.

task = read_task("configs/eval-reviews.yaml")
cases = make_cases(read_rows("test.jsonl", "test"), task)
result = evaluate(load("runs/a"), cases, task)          # shots=[...] are cases too, of other rows
print(result.figures()["accuracy"], compare(result, other)[0])
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlxft.data.batching import plan_epoch
from mlxft.data.chat import by_template
from mlxft.data.dataset import OVERFLOW, build
from mlxft.data.encode import context_ids, prompt_text
from mlxft.data.formats import Example, Message
from mlxft.data.sources import report_lines
from mlxft.data.thoughts import opening_of
from mlxft.errors import ConfigError, DataError, ModelError
from mlxft.model.batch_sample import ROWS, sample_batch, text_of
from mlxft.model.cpu import quicker
from mlxft.model.declared import NO_NUMBERS
from mlxft.model.load import Loaded, context_of
from mlxft.model.logits import Split
from mlxft.model.logprobs import row_sums, rows_logprobs
from mlxft.model.random import probing
from mlxft.model.sample import Sampling
from mlxft.objectives.functional import wins
from mlxft.objectives.onpolicy.rewards import Item
from mlxft.objectives.sft import make_batch
from mlxft.study.answers import Answer
from mlxft.study.bar import bar
from mlxft.study.cases import Case, delimiter, with_shots
from mlxft.study.choice import EncodedChoices, encode_choices, loglikelihoods
from mlxft.study.judges import items_of, judges
from mlxft.study.stats import Figure, Floats, bootstrap, mean
from mlxft.study.tasks import Task

TOKENS = 2048  # of a batch, padding included
MAX_TOKENS = 256
_ANY = 1 << 31  # no limit


@dataclass(frozen=True)
class Result:
    """What a model made of a task.

    Attributes:
        kind: loss, choice or generate.
        rows: the evaluated rows' places, in order.
        scores: metric -> (n,) a score for each row; of a loss its mean over the row's tokens, in nats.
        weights: metric -> (n,) what a row counts, where not 1: tokens.
        predictions: a mapping a row: row, prompt, prediction, target and scores, and what else there is to know.
        notes: what was left out or is odd, a sentence each.
    """

    task: str
    kind: str
    rows: list[str]
    scores: dict[str, Floats]
    predictions: list[dict[str, Any]]
    weights: dict[str, Floats] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Figure]:
        """Metric -> its mean, standard error and number of rows; a loss brings its perplexity along."""
        found = {name: mean(values, self.weights.get(name)) for name, values in self.scores.items()}
        if "loss" in found:
            loss = found["loss"]
            value = _exp(loss.value)
            found["perplexity"] = Figure(value, value * loss.se, loss.n)  # by the delta method
        return found

    def only(self, rows: Set[str]) -> Result:
        """The same of some of the rows."""
        kept = [i for i, where in enumerate(self.rows) if where in rows]
        scores, weights = ({k: v[kept] for k, v in of.items()} for of in (self.scores, self.weights))
        lines = [self.predictions[i] for i in kept]
        return replace(self, rows=[self.rows[i] for i in kept], scores=scores, weights=weights, predictions=lines)


class Paired(NamedTuple):
    """One model against another on the same rows.

    Attributes:
        difference: mean of the first's scores less the second's; `se` its standard error.
        low, high: the bootstrap interval around it.
        won, lost, tied: rows on which the first is better, worse, or neither; less loss is better.
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


def compare(a: Result, b: Result, *, seed: int = 0, confidence: float = 0.95) -> list[Paired]:
    """What `a` is better or worse by than `b`, for each metric.

    Raises:
        ConfigError: they are not of the same rows and tokens.
    """
    if a.rows != b.rows or a.scores.keys() != b.scores.keys():
        raise ConfigError(f"the two were not evaluated on the same rows by the same task: {a.task}, {b.task}")
    found = []
    for name, values in a.scores.items():
        other, weights = b.scores[name], a.weights.get(name)
        if weights is not None and not np.array_equal(weights, b.weights[name]):
            raise ConfigError(
                "the two models make other tokens of the same text, so a loss a token of one is not that of the "
                "other; compare them by a task with choices or metrics"
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


def evaluate(
    loaded: Loaded,
    cases: Sequence[Case],
    task: Task,
    *,
    shots: Sequence[Case] = (),
    tokens: int = TOKENS,
    max_length: int | None = None,
    overflow: str = "error",
    seed: int = 0,
    console: Console | None = None,
) -> Result:
    """Ask a model the cases of a task.

    Args:
        loaded: a model that gives text; every module's training flag is as before at the end.
        shots: solved cases that are shown before each (choice and written answers only).
        tokens: of a batch, padding included.
        max_length: most tokens a row may have, answer included; default: what the model's config says.
        overflow: what to do with a longer one: "error" reports them all, "drop" leaves them out and counts them;
            a loss can also "truncate" and, of texts, "split".
        seed: of sampling, where the task has a temperature.
        console: where progress is shown.
    Raises:
        ConfigError, DataError: the task, its rows or shots do not fit the model.
        RewardError: a function gives no number.
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
        """The cases that fit the context, and what there is to say of the others."""
        limit = self.limit
        long = [i for i, length in enumerate(lengths) if limit is not None and length > limit]
        if not long:
            return list(range(len(cases))), []
        whose = f"prompt, {shots} shots and answer" if shots else "prompt and answer"
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


def _in_own_words(text: str) -> str:
    """What building rows for training has to say, by the names that an evaluation has for it."""
    names = {"data.max_length": "--max-length", "data.overflow:": "--overflow"}
    names |= {"left to train on": "left to evaluate", "token to train": "token to evaluate"}
    for theirs, ours in names.items():
        text = text.replace(theirs, ours)
    return text.replace("--max-length and data.train_on", "--max-length and a task's train_on")


def _loss(how: _How, cases: Sequence[Case]) -> Result:
    task, tokenizer = how.task, how.loaded.tokenizer
    examples = [Example(case.where, case.item) for case in cases if case.item is not None]
    try:
        data = build(
            examples,
            tokenizer,
            train_on=task.train_on or "assistant",
            max_length=how.limit or _ANY,
            overflow=how.overflow,
            chat=task.template == "auto",
        )
    except (ConfigError, DataError) as e:
        raise type(e)(_in_own_words(str(e))) from e
    split, lengths = Split(how.loaded.model), np.array([len(row.ids) for row in data.rows])
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    slots = plan_epoch(lengths, tokens=how.tokens, seed=None)
    with probing(how.loaded.model), bar(how.console, len(data.rows), "rows") as advance:
        for slot in slots:
            rows = [data.rows[i] for i in slot.rows]
            a = make_batch(rows, slot.width).arrays
            logprobs = rows_logprobs(split, a["ids"], a["positions"], a["labels"], grad=False)
            totals = np.array(row_sums(-logprobs, a["positions"] // slot.width, len(rows)))
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
    notes = [_in_own_words(note) for note in data.counts.notes()]
    return Result(task.name or "loss", "loss", places, {"loss": losses}, lines, weights, notes)


def _rendered(how: _How, prompt: str | list[Message], case: Case) -> str:
    """A prompt as the text that the model goes on from."""
    if isinstance(prompt, str):
        return prompt
    return prompt_text(prompt, how.loaded.tokenizer, tools=case.tools, where=case.where)


def _before_answer(how: _How, prompt: str | list[Message], case: Case) -> str:
    """A prompt as the text that an answer follows at once.

    After the generation prompt a reasoning model writes a thought, if only an empty one, or the mark of a channel; and
    some generation prompts open a thought. As its template writes an answered turn, so a choice is scored.
    """
    text = _rendered(how, prompt, case)
    if isinstance(prompt, str):
        return text
    place = "\u2063answer\u2063"  # no template looks for it
    turns = [*prompt, {"role": "assistant", "content": place}]
    try:
        answered = by_template(how.loaded.tokenizer, turns, case.tools, case.where, lambda chat: chat.render(turns))
    except DataError:  # a template that takes no answered turn
        return text
    begun, found, _ = answered.partition(place)
    goes_on = begun.startswith(text) or (opening_of(text) and text.startswith(begun))
    return begun if found and goes_on else text


def _choice(how: _How, cases: Sequence[Case], shots: Sequence[Case]) -> Result:
    prompts = [with_shots(case, shots, how.task, how.chat) for case in cases]
    between = "" if how.chat else delimiter(how.task)
    asked: list[EncodedChoices] = []
    for case, prompt in zip(cases, prompts):
        text, ends = _before_answer(how, prompt, case), [between + c for c in case.choices]
        try:
            asked.append(encode_choices(how.loaded.tokenizer, text, ends, plain=not how.chat))
        except DataError as e:
            raise DataError(f"{case.where}: {e}") from e
    lengths = [max(len(r.context) + len(r.continuation) for r in own.requests) for own in asked]
    kept, notes = how.fitting(cases, lengths, len(shots))
    if joint := sum(asked[i].joint > 0 for i in kept):
        rows = f"{joint:,} of {len(kept):,} rows"
        notes.append(f"in {rows} a choice joins the prompt's last token, which is scored along with every choice")
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
        # As lm-eval's acc and acc_norm: by characters, so that long choices are not at a disadvantage; of the prompt
        # those count that are scored too.
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
    return Result(how.task.name or "choice", "choice", [cases[i].where for i in kept], scores, lines, notes=notes)


def _generate(how: _How, cases: Sequence[Case], shots: Sequence[Case]) -> Result:
    task, tokenizer = how.task, how.loaded.tokenizer
    judging = judges(task)
    prompts = [with_shots(case, shots, task, how.chat) for case in cases]
    # In plain text a model goes on with a block of its own after its answer, as the shots have shown it.
    stop = tuple(task.stop if task.stop is not None else ["\n\n"] if shots and not how.chat else [])
    most = task.max_tokens or MAX_TOKENS
    drops, ends = task.judged == "drop", bool(tokenizer.eos_token_ids)
    sampling = Sampling(most, task.temperature or 0.0, stop=stop, stop_at_eos=ends, stop_in_answer=drops)
    texts = [_rendered(how, prompt, case) for case, prompt in zip(cases, prompts)]
    ids = [context_ids(tokenizer, text, plain=not how.chat, where=case.where) for case, text in zip(cases, texts)]
    if empty := [case.where for case, own in zip(cases, ids) if not own]:
        raise DataError(f"{empty[0]}: the prompt is empty: there is no token to go on from")
    kept, notes = how.fitting(cases, [len(own) + most for own in ids], len(shots))
    rows = max(1, min(ROWS, 8 * how.tokens // max(len(ids[i]) + most for i in kept)))
    with bar(how.console, len(kept), "answers") as advance:
        found = sample_batch(
            how.loaded.model, tokenizer, [ids[i] for i in kept], sampling, seed=how.seed, rows=rows, on_done=advance
        )
    answers = [Answer(a.ids, a.finish, text_of(tokenizer, a, sampling, ids[i])) for i, (a,) in zip(kept, found)]
    chosen = [cases[i] for i in kept]
    asked = [texts[i] if isinstance(prompts[i], list) else prompts[i] for i in kept]
    items = items_of(chosen, asked, answers, [opening_of(texts[i]) for i in kept])
    scores = {name: np.asarray(judge(chosen, items), dtype=np.float64) for name, judge in judging.items()}
    lines = [
        {"row": case.where, "prompt": prompts[i], "prediction": item.completion}
        | ({"answer": item.answer} if drops and item.answer != item.completion else {})
        | {"target": _target(case), "finish": answer.finish}
        | {"scores": {name: float(values[k]) for name, values in scores.items()}}
        for k, (i, case, item, answer) in enumerate(zip(kept, chosen, items, answers))
    ]
    notes += _answer_notes(items, most, drops)
    return Result(task.name or "generate", "generate", [c.where for c in chosen], scores, lines, notes=notes)


def _answer_notes(items: Sequence[Item], most: int, drops: bool) -> list[str]:
    """What there is to say of answers that are none, or not whole."""
    total, empty = len(items), sum(not item.completion.strip() for item in items)
    cut, thoughts = sum(not item.finished for item in items), 0
    if drops:
        thoughts = sum(bool(item.completion.strip()) and not item.answer.strip() for item in items)
    notes = [f"{empty:,} of {total:,} answers are empty"] if empty else []
    notes += [f"{cut:,} of {total:,} answers were cut off at {most} tokens (max_tokens)"] if cut else []
    if thoughts:
        notes.append(
            f"{thoughts:,} of {total:,} completions are thoughts without an answer (thoughts: keep judges them)"
        )
    return notes


def _target(case: Case) -> str | list[str] | None:
    return list(case.answers) if len(case.answers) > 1 else case.label
