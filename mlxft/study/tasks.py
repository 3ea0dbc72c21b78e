"""Evaluation tasks: their recipes, cases, few-shot examples, metrics and judges."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from mlxft.config import DataSettings, Paths, Settings, read_settings
from mlxft.data.chat import Thoughts, keeps_thoughts, wanted_of
from mlxft.data.formats import (
    FORMATS,
    Completion,
    Conversation,
    Item,
    Message,
    Pair,
    Prompt,
    Ranked,
    Text,
    balanced,
    convert,
    few_of,
    fill,
    is_template,
    message_at,
    names_in,
    read_prompts,
    suggest_format,
    tools_of,
    with_completion,
    with_usual_names,
)
from mlxft.data.sources import Problem, Row, read_rows, report_lines, type_name
from mlxft.errors import ConfigError, DataError, nearest
from mlxft.objectives.rewards import JsonSchema, ScoredFunction, ScoredRule, ToScore, last_number, load_functions
from mlxft.study.score import open_scorer
from mlxft.text import home_path

# --- metrics ----------------------------------------------------------------------------------------------------------
# _Scores of a completion against the wanted answer, from 0 to 1, as pure functions of two texts.

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(said: str, wanted: str, ignore_case: bool = False) -> float:
    """Return 1 if the two are equal without surrounding white space."""
    if ignore_case:
        said, wanted = said.casefold(), wanted.casefold()
    return float(said.strip() == wanted.strip())


def contains(said: str, wanted: str, ignore_case: bool = False) -> float:
    """Return 1 if the wanted text occurs in what was said; an empty one only in an empty text."""
    if ignore_case:
        said, wanted = said.casefold(), wanted.casefold()
    return float(wanted.strip() in said if wanted.strip() else not said.strip())


def number(said: str, wanted: str, tolerance: float = 1e-6, pattern: str | None = None) -> float:
    """Return 1 if the last number said is the (last) wanted one; commas, currency and percent signs are ignored.

    Args:
        tolerance: largest difference between the two.
        pattern: look in the last match of this regular expression, or of its first group.
    """
    if pattern is not None:
        every = list(re.finditer(pattern, said))
        said = (every[-1].group(1 if every[-1].re.groups else 0) or "") if every else ""
    one, two = last_number(said), last_number(wanted)
    return float(one is not None and two is not None and abs(one - two) <= tolerance)


def words(text: str) -> list[str]:
    """Return lower-case words without punctuation and articles, as SQuAD 1.1 does (Rajpurkar et al. 2016)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(said: str, wanted: str) -> float:
    """Return SQuAD's F1 of the words that the two have in common."""
    one, two = words(said), words(wanted)
    common = sum((Counter(one) & Counter(two)).values())
    if not one or not two:  # SQuAD 2.0: an empty text is right where an empty one is wanted
        return float(one == two)
    return 2 * common / (len(one) + len(two))


# --- tasks ------------------------------------------------------------------------------------------------------------
# A task says what a model is asked and how it is scored, by a name or a few lines of YAML. A task with `choices` is
# multiple choice by log-likelihood, one with `metrics` lets the model write, and one with neither measures the loss.

Kind = Literal["exact_match", "contains", "regex", "number", "f1", "json", "function", "reward"]
_KINDS: tuple[Kind, ...] = get_args(Kind)
NAMED = ("loss", "pairs", "choice", *(k for k in _KINDS if k not in ("regex", "function", "reward")))
# Settings of each kind of metric besides kind and name.
TAKES: dict[Kind, tuple[str, ...]] = {
    "exact_match": ("ignore_case", "thoughts"),
    "contains": ("ignore_case", "thoughts"),
    "regex": ("pattern", "thoughts"),
    "number": ("tolerance", "pattern", "thoughts"),
    "f1": ("thoughts",),
    "json": ("schema", "thoughts"),
    "function": ("function",),
    "reward": ("run",),
}
NEEDS: dict[Kind, str] = {"regex": "pattern", "function": "function", "reward": "run"}
# Metrics that compare with a wanted answer.
COMPARING: tuple[Kind, ...] = ("exact_match", "contains", "number", "f1")


class Metric(Settings):
    """A metric of completions."""

    kind: Kind = Field(description=f"{', '.join(_KINDS)}.")
    name: str | None = Field(None, min_length=1, description="Its name in reports; default: the kind.")
    ignore_case: bool = Field(False, description="exact_match, contains: ignore upper and lower case.")
    pattern: str | None = Field(
        None, min_length=1, description="regex: what to find. number: where to look; its first group, if any."
    )
    tolerance: float = Field(1e-6, ge=0, description="number: largest difference.")
    schema_: str | dict[str, Any] | None = Field(
        None, alias="schema", description="json: a JSON Schema or its file; default: any JSON fits."
    )
    function: str | None = Field(
        None, description="function: file.py:name, called as name(prompts, completions, rows) -> list of floats."
    )
    thoughts: Thoughts | None = Field(
        None,
        description="drop: score the answer without its thoughts; keep: the whole completion. Default: as the task's "
        "thoughts, but keep where pattern names the marks of thoughts, such as <think>.",
    )
    run: str | None = Field(None, description="reward: a run of objective reward.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, RecursionError, OverflowError) as e:
            raise ValueError(f"pattern {value!r} is not a regular expression: {e}") from e
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Metric:
        given = {name.rstrip("_") for name in self.model_fields_set} - {"kind", "name"}
        if foreign := sorted(given - set(TAKES[self.kind])):
            has = ", ".join(TAKES[self.kind]) or "none"
            raise ValueError(f"{self.kind} has no setting {', '.join(foreign)} (its own: {has})")
        needed = NEEDS.get(self.kind)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{self.kind} needs {needed}: {type(self).model_fields[needed].description}")
        return self

    @property
    def label(self) -> str:
        """Return its name in reports."""
        return self.name or (self.function or "").rpartition(":")[2] or self.kind


class Task(Settings):
    """A task. Templates name fields of the row in braces, as in "Review: {review}"; {{ and }} are braces."""

    name: str | None = Field(None, min_length=1, description="Its name in reports; default: the file's.")
    format: (
        Literal[  # type: ignore[valid-type]
            get_args(DataSettings.model_fields["format"].annotation)
        ]
        | None
    ) = Field(None, description="Format of the rows, as data.format, where no prompt is given.")
    fields: dict[str, str] = Field(default_factory=dict, description="As data.fields: the rows' names for fields.")
    prompt: str | list[dict[str, str]] | None = Field(
        None, description="Template of the prompt, or messages with templates; default: the row's own prompt."
    )
    system: str | None = Field(None, min_length=1, description="System prompt.")
    answer: str | None = Field(
        None, min_length=1, description="Field (or template) of the wanted answer; for choices: its text or index."
    )
    choices: str | list[str] | None = Field(None, description="Texts to choose from, or the field with them.")
    pairs: bool = Field(False, description="Measure which completion of a pair the model prefers: accuracy, margin.")
    metrics: list[Metric] | None = Field(None, min_length=1, description="Metrics of completions: names, or mappings.")
    template: Literal["auto", "none"] = Field("auto", description="As data.template; none: plain text.")
    delimiter: str | None = Field(
        None, description="Plain text: text between a prompt and what follows; default: a space."
    )
    train_on: Literal["assistant", "last", "completion", "all"] | None = Field(
        None, description="loss: the evaluated tokens, as data.train_on."
    )
    max_tokens: int | None = Field(None, ge=1, description="metrics: longest completion in tokens; default 256.")
    stop: list[str] | None = Field(None, description="metrics: texts that end a completion.")
    thoughts: Thoughts | None = Field(
        None,
        description="metrics: what is scored. drop (default): the answer without its thoughts (<think>...</think>, and "
        "other families' marks); a thought that never ends leaves no answer. keep: the whole completion, as functions "
        "(see mlxft.answer_of) and reward runs always read it.",
    )
    temperature: float | None = Field(None, ge=0, description="metrics: sampling temperature; default 0.")

    @field_validator("metrics", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return [{"kind": m} if isinstance(m, str) else m for m in value] if isinstance(value, list) else value

    @field_validator("choices")
    @classmethod
    def _are_several(cls, value: Any) -> Any:
        if isinstance(value, list) and (len(set(value)) < 2 or len(set(value)) < len(value) or "" in value):
            raise ValueError(f"choices are {value}; expected at least two different texts, none of them empty")
        return value

    @field_validator("prompt")
    @classmethod
    def _is_a_template(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else [m.get("content", "") for m in value or []]:
            names_in(text, "prompt")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.choices is not None and self.metrics is not None:
            raise ValueError("give choices (by log-likelihood) or metrics (of completions), not both")
        if self.pairs and (self.choices is not None or self.metrics is not None or self.prompt is not None):
            raise ValueError("pairs: rows have their own prompt and completions; leave out prompt, choices and metrics")
        labels = [m.label for m in self.metrics or []]
        if twice := sorted({name for name in labels if labels.count(name) > 1}):
            raise ValueError(f"two metrics are called {', '.join(twice)}; give each a name")
        written = [n for n in ("max_tokens", "stop", "temperature", "thoughts") if getattr(self, n) is not None]
        if written and self.kind != "generate":
            raise ValueError(f"{', '.join(written)}: for metrics of completions")
        if self.train_on is not None and self.kind != "loss":
            raise ValueError("train_on: for a loss, without choices and metrics")
        if self.prompt is not None and (self.format is not None or self.fields):
            raise ValueError("give prompt, or format and fields, not both")
        if self.prompt is not None and self.answer is None and self.compares:
            raise ValueError("answer is needed: the field of the wanted answer")
        return self

    @property
    def kind(self) -> str:
        """Return loss, pairs, choice or generate."""
        if self.pairs:
            return "pairs"
        return "choice" if self.choices is not None else "loss" if self.metrics is None else "generate"

    @property
    def compares(self) -> bool:
        """Return whether rows must have a wanted answer."""
        return self.metrics is None or any(m.kind in COMPARING for m in self.metrics)


def read_task(given: str) -> Task:
    """Return a task by name (`NAMED`), by `file.py:function`, by `reward:RUN`, or from a YAML file.

    Raises:
        ConfigError: there is no such task or file, or its settings are wrong, all of them in one.
    """
    head, _, rest = given.partition(":")
    if Path(given).suffix in (".yaml", ".yml"):
        path = home_path(given)
        task = read_settings(path, Task, "configs/eval-reviews.yaml shows a task of mlxft eval")
        return task if task.name else task.model_copy(update={"name": path.stem})
    if given in NAMED:
        kinds: dict[str, dict[str, Any]] = {"loss": {}, "pairs": {"pairs": True}, "choice": {"choices": "choices"}}
        return Task(name=given, **kinds.get(given, {"metrics": [given]}))
    if given.rpartition(":")[0].endswith(".py"):
        metric = {"kind": "function", "function": given}
        return Task.model_validate({"name": given.rpartition(":")[2], "metrics": [metric]})
    if head == "reward" and rest:
        return Task.model_validate({"name": "reward", "metrics": [{"kind": "reward", "run": rest}]})
    raise ConfigError(
        f"--task: there is no task {given!r}{nearest(given, NAMED)}; expected {', '.join(NAMED)}, file.py:function, "
        "reward:RUN, or a YAML file such as configs/eval-reviews.yaml; tasks of lm-eval go to --tasks"
    )


# --- cases ------------------------------------------------------------------------------------------------------------
# Rows as cases of a task: prompt, wanted answers and choices.

READ = ("messages", "prompt-completion", "text", "sharegpt", "alpaca", "prompts")
PAIRED = ("preference", "ratings")  # what a task of pairs reads
_QUESTIONS = ("prompt", "question")


@dataclass(frozen=True)
class Case:
    """A row as a case of a task.

    Attributes:
        where: the row's place, for messages.
        row: its fields.
        prompt: a text, or messages up to a user or tool turn.
        answers: wanted answers, any of them right; for choices the right one.
        choices: texts to choose from; `right` is the index of the wanted one.
        item: what a loss is computed of.
        tools: for the chat template.
    """

    where: str
    row: dict[str, Any]
    prompt: str | list[Message]
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int = -1
    item: Item | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def label(self) -> str | None:
        """Return the (first) wanted answer."""
        return self.answers[0] if self.answers else None


def make_cases(rows: Iterable[Row | Problem], task: Task) -> list[Case]:
    """Return a case for each row, in order.

    Raises:
        ConfigError: the format is not for evaluation, or no row has a field.
        DataError: rows cannot be read or do not fit, all of them in one, with their places.
    """
    rows = list(rows)
    problems = [f"{row.where}: {row.text}" for row in rows if isinstance(row, Problem)]
    sound = [row for row in rows if isinstance(row, Row)]
    if not sound:
        raise DataError(report_lines(problems) or "there are no rows to evaluate")
    _check_fields(task, sound)
    items: Sequence[Item | None] = [None] * len(sound)
    if task.prompt is None and not (task.kind == "choice" and task.format is None and _is_question(sound, task)):
        unknown = task.format is None and not task.fields and suggest_format(sound[0].data) is None
        named = with_usual_names(rows, READ) if unknown else rows
        first = [row for row in named if isinstance(row, Row)]
        items = [item for _, item in convert(named, _format(task, first), task.fields)]
    cases = []
    for row, item in zip(sound, items):
        try:
            cases.append(_case(row, item, task))
        except DataError as e:
            problems.append(f"{row.where}: {e}")
    if problems:
        raise DataError(report_lines(problems))
    return cases


def _is_question(rows: Sequence[Row], task: Task) -> bool:
    """Return whether rows have a question and an answer in fields of no training format."""
    asks = any(row.data.get(name) is not None for row in rows[:1] for name in _QUESTIONS)
    return asks and any(row.data.get(task.answer or "answer") is not None for row in rows)


def _format(task: Task, rows: Sequence[Row]) -> str:
    """Return the format of the rows: the task's, else what the first row looks like."""
    looks, takes = task.format or suggest_format(rows[0].data), PAIRED if task.pairs else READ
    if looks in takes and not (looks == "text" and task.kind != "loss"):
        return str(looks)
    if looks is None:
        has = ", ".join(rows[0].data) or "no fields"
        raise DataError(
            f"{rows[0].where}: the row has {has}, which fits no format of "
            f"{', '.join(takes)}; name one with --format, or give a task with a prompt (--task TASK.yaml)"
        )
    what = "a loss" if task.kind == "loss" else "pairs" if task.pairs else f"a {task.kind} task"
    more = "; mlxft score takes pairs and rankings" if looks in FORMATS and looks not in READ else ""
    raise ConfigError(f"format {looks} is not for {what}{more}; it takes {', '.join(takes)}")


def _check_fields(task: Task, rows: Sequence[Row]) -> None:
    """Raise ConfigError for a field that the task names and no row has."""
    names = {name for row in rows for name in row.data}
    named = {"answer": task.answer, "choices": task.choices}
    for setting, field in named.items():
        if isinstance(field, str) and not is_template(field) and names and field not in names:
            hint, has = nearest(field, names), ", ".join(sorted(names))
            raise ConfigError(f"{setting} is {field!r}, which no row has{hint}; rows have {has}")


def _case(row: Row, item: Item | None, task: Task) -> Case:
    data, field = row.data, task.answer or "answer"
    if isinstance(item, Pair | Ranked):
        pairs = item.pairs if isinstance(item, Ranked) else (item,)
        return Case(row.where, data, pairs[0].prompt if pairs else "", item=item)
    prompt, own = _asked(data, item, task)
    tools = item.tools if isinstance(item, Conversation) else tools_of(data) if isinstance(item, Prompt) else None
    if task.kind == "loss":
        if item is None or isinstance(item, Prompt):  # a template gives the prompt
            own = _answers(data, field)
            if isinstance(prompt, str) and task.system is None:
                item = Completion(prompt, own[0])
            else:
                item = Conversation(with_completion(as_messages(prompt, task.system), own[0]))
        return Case(row.where, data, prompt, own, item=item)
    if task.kind == "choice":
        choices = _choices(data, task)
        right = _right(own[0] if own and task.answer is None else _value(data, field), choices, field)
        return Case(row.where, data, prompt, (choices[right],), choices, right, tools=tools)
    if task.answer is not None or (isinstance(item, Prompt) and data.get("answer") is not None):
        own = _answers(data, field)
    if task.compares and not own:
        why = f"no field 'answer'; the row has {', '.join(data)} (a task's answer: names one)"
        raise DataError(f"no wanted answer to compare with: {why}")
    return Case(row.where, data, prompt, own, tools=tools)


def _asked(row: dict[str, Any], item: Item | None, task: Task) -> tuple[str | list[Message], tuple[str, ...]]:
    """Return the prompt, and the wanted answers where the format has them."""
    if isinstance(task.prompt, str):
        return fill(task.prompt, row, "prompt"), ()
    if task.prompt is not None:
        turns = [{**m, "content": fill(m.get("content", ""), row, f"prompt[{i}]")} for i, m in enumerate(task.prompt)]
        return [message_at(turn, f"prompt[{i}]") for i, turn in enumerate(turns)], ()
    if isinstance(item, Completion):
        return item.prompt, (item.completion,)
    if isinstance(item, Conversation):
        *before, last = ({k: v for k, v in m.items() if k != "weight"} for m in item.messages)
        return before, (str(last["content"]),)
    if isinstance(item, Prompt):
        return item.prompt, ()
    if isinstance(item, Text):
        return "", ()
    name = next((name for name in _QUESTIONS if row.get(name) is not None), None)
    if name is None:
        has = ", ".join(row)
        raise DataError(f"no field {' or '.join(_QUESTIONS)}; the row has {has} (a task's prompt names the fields)")
    return read_prompts({"prompt": row[name], "system": row.get("system")}).prompt, ()


def _value(row: dict[str, Any], field: str) -> Any:
    """Return a field of the row, or a template filled from it."""
    if is_template(field):
        return fill(field, row, "answer")
    if row.get(field) is None:
        raise DataError(f"no field {field!r}; the row has {', '.join(row) or 'none'}")
    return row[field]


def _answers(row: dict[str, Any], field: str) -> tuple[str, ...]:
    """Return the wanted answers: a text, a number, or a list of them."""
    value = _value(row, field)
    every = value if isinstance(value, list) else [value]
    if not every or any(isinstance(v, bool) or not isinstance(v, str | int | float) for v in every):
        seen = "an empty list" if value == [] else type_name(value)
        raise DataError(f"{field} is {seen}; expected a text, a number, or a list of them")
    return tuple(map(str, every))


def _choices(row: dict[str, Any], task: Task) -> tuple[str, ...]:
    if isinstance(task.choices, list):
        return tuple(task.choices)
    name = task.choices or "choices"
    value = _value(row, name)
    if not isinstance(value, list):
        raise DataError(f"{name} is {type_name(value)}; expected a list of texts")
    for i, choice in enumerate(value):
        if isinstance(choice, bool) or not isinstance(choice, str | int | float) or not str(choice).strip():
            seen = "empty" if isinstance(choice, str) else type_name(choice)
            raise DataError(f"{name}[{i}] is {seen}; expected a text")
    texts = tuple(map(str, value))
    if len(texts) < 2:
        raise DataError(f"{name} has {len(texts)} texts; expected at least two to choose from")
    if len(set(texts)) < len(texts):
        raise DataError(f"{name} has the same text twice: {value!r:.80}")
    return texts


def _right(value: Any, choices: tuple[str, ...], field: str) -> int:
    """Return the index of the wanted choice, given as its text or as a number."""
    if isinstance(value, str):
        stripped = [choice.strip() for choice in choices]
        if value in choices or value.strip() in stripped:
            return choices.index(value) if value in choices else stripped.index(value.strip())
    if isinstance(value, bool) or not isinstance(value, int):
        near = nearest(value, choices) if isinstance(value, str) else ""
        raise DataError(f"{field} is {value!r:.60}{near}; expected one of the choices, or its index from 0 as a number")
    if not 0 <= value < len(choices):
        raise DataError(f"{field} is {value}; out of range: there are {len(choices)} choices, the first is 0")
    return value


def as_messages(prompt: str | list[Message], system: str | None = None) -> list[Message]:
    """Return a prompt as turns of a chat."""
    turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is None:
        return turns
    if turns and turns[0]["role"] == "system":
        raise ConfigError("system is given, and the messages start with their own; keep one of them")
    return [{"role": "system", "content": system}, *turns]


def with_shots(case: Case, shots: Sequence[Case], task: Task, chat: bool) -> str | list[Message]:
    """Return a case's prompt after solved ones: earlier turns of a chat, or blocks of text with empty lines between.

    Args:
        shots: cases with an answer; the first answer is shown.
        chat: whether the prompt goes through a chat template.
    Raises:
        ConfigError: there is a system prompt, or messages, without a chat template.
    """
    if missing := [shot.where for shot in shots if shot.label is None]:
        raise DataError(f"{missing[0]}: has no answer, so it cannot be shown as an example")
    if chat:
        turns: list[Message] = []
        for shot in shots:
            turns += [m for m in with_completion(shot.prompt, shot.label or "") if m["role"] != "system"]
        last = as_messages(case.prompt)
        opening = [m for m in last[:1] if m["role"] == "system"]
        return as_messages([*opening, *turns, *last[len(opening) :]], task.system)
    if task.system is not None:
        raise ConfigError("system has no place in plain text (no chat template, or template: none); put it into prompt")
    texts = [case.prompt, *(shot.prompt for shot in shots)]
    if any(not isinstance(text, str) for text in texts):
        why = "this model has none, or the task's template is none"
        raise DataError(f"{case.where}: messages need a chat template; {why}")
    blocks = [f"{shot.prompt}{delimiter(task)}{shot.label}" for shot in shots]
    return "\n\n".join([*blocks, str(case.prompt)])


def delimiter(task: Task) -> str:
    """Return the text between a prompt and what follows in plain text. Rows of prompt-completion have their own."""
    if task.delimiter is not None:
        return task.delimiter
    return "" if task.prompt is None and task.kind != "choice" else " "


# --- shots ------------------------------------------------------------------------------------------------------------
# Solved rows to show before a prompt, chosen from a file; never an evaluated row.


def choose_shots(
    spec: Paths, task: Task, asked: Sequence[Case], shots: int, seed: int, setting: str = "--shots"
) -> list[Case]:
    """Choose `shots` cases of a file, shuffled, balanced over labels where there are few labels.

    Args:
        spec: a file, folder (its train split) or hub data set.
        asked: the evaluated cases; rows with the prompt of one of them are left out.
        setting: the setting that asks for them, for messages.
    Raises:
        ConfigError: there is no such file, or it has too few other rows. DataError: rows do not fit the task.
    """
    cases = make_cases(read_rows(spec, "train"), task)
    prompts = {_key(case) for case in asked}
    others = [case for case in cases if _key(case) not in prompts]
    if len(others) < shots:
        left = f" ({len(cases) - len(others)} are among the evaluated rows)" if len(others) < len(cases) else ""
        raise ConfigError(f"{setting}: asks for {shots} shots, and {spec} has {len(others)} rows for them{left}")
    labels = few_of([case.label for case in others])
    return [others[i] for i in balanced(labels, len(others), shots, seed, setting)]


def _key(case: Case) -> str:
    return json.dumps(case.prompt, sort_keys=True, ensure_ascii=False)


# --- scorers ----------------------------------------------------------------------------------------------------------

_Scores = Callable[[Sequence[Case], Sequence[ToScore]], Sequence[float]]


def open_scorers(task: Task) -> dict[str, _Scores]:
    """Return metric -> function that scores completions of a task's cases.

    Functions are loaded now, so that mistakes show before anything is generated.

    Raises:
        ConfigError, ModelError: a function, a schema or a reward run cannot be used.
    """
    return {metric.label: _open_scorer(metric, task.thoughts or "drop") for metric in task.metrics or []}


def _open_scorer(metric: Metric, thoughts: Thoughts) -> _Scores:
    if metric.kind == "reward":
        model = open_scorer(metric.run or "")
        return lambda cases, items: model.scores(
            [model.encode(case.prompt, item.completion, case.where, case.tools) for case, item in zip(cases, items)]
        )
    if metric.kind in ("function", "json"):
        try:
            scorer = _rule(metric, thoughts)
        except ConfigError as e:
            text = str(e).replace("rewards.function", "function", 1).replace("rewards.rules[0].schema", "json: schema")
            raise ConfigError(text) from e
        return lambda cases, items: scorer.score(items)
    compare, whole = _comparing(metric), keeps_thoughts(metric.thoughts, thoughts, metric.pattern)

    def score(case: Case, item: ToScore) -> float:
        said, wanted = item.completion, case.answers
        if not whole:
            said, wanted = item.answer, tuple(map(wanted_of, case.answers))
        return max(compare(said, text) for text in wanted or ("",))

    return lambda cases, items: [score(case, item) for case, item in zip(cases, items)]


def _rule(metric: Metric, thoughts: Thoughts) -> ScoredRule | ScoredFunction:
    if metric.kind == "function":
        return load_functions(metric.function)[0]
    rule = JsonSchema.model_validate({"schema": metric.schema_, "thoughts": metric.thoughts})
    return ScoredRule(0, rule, thoughts)


def _comparing(metric: Metric) -> Callable[[str, str], float]:
    if metric.kind == "exact_match":
        return partial(exact_match, ignore_case=metric.ignore_case)
    if metric.kind == "contains":
        return partial(contains, ignore_case=metric.ignore_case)
    if metric.kind == "number":
        return partial(number, tolerance=metric.tolerance, pattern=metric.pattern)
    if metric.kind == "regex":
        pattern = re.compile(metric.pattern or "")
        return lambda said, _: float(pattern.search(said) is not None)
    return f1
