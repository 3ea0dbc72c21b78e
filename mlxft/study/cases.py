"""Rows as a task asks them: prompt, wanted answers, choices; and shots set before a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxft.data.convert import FORMATS, convert, suggest_format
from mlxft.data.formats import (
    Completion,
    Conversation,
    Item,
    Message,
    Prompt,
    Text,
    message_at,
    read_prompts,
    tools_of,
)
from mlxft.data.sources import Problem, Row, report_lines, type_name
from mlxft.data.template import fill, is_template
from mlxft.errors import ConfigError, DataError, nearest
from mlxft.study.tasks import Task

READ = ("messages", "prompt-completion", "text", "sharegpt", "alpaca", "prompts")
_QUESTIONS = ("prompt", "question")


@dataclass(frozen=True)
class Case:
    """A row as a task asks it.

    Attributes:
        where: the row's place, for messages.
        row: its fields.
        prompt: a text, or messages up to a user or tool turn.
        answers: the wanted answers, of which one is enough; of choices the right one.
        choices: to choose from; `right` is the index of the wanted one.
        item: what a loss is of.
        tools: that a chat template is told of.
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
        """The (first) wanted answer."""
        return self.answers[0] if self.answers else None


def make_cases(rows: Iterable[Row | Problem], task: Task) -> list[Case]:
    """A case for each row, in order.

    Raises:
        ConfigError: a format that can not be asked, or a field that no row has.
        DataError: rows that can not be read or do not fit, all of them in one, with their places.
    """
    rows = list(rows)
    problems = [f"{row.where}: {row.text}" for row in rows if isinstance(row, Problem)]
    sound = [row for row in rows if isinstance(row, Row)]
    if not sound:
        raise DataError(report_lines(problems) or "there are no rows to evaluate")
    _check_fields(task, sound)
    items: Sequence[Item | None] = [None] * len(sound)
    if task.prompt is None and not (task.kind == "choice" and task.format is None and _is_question(sound, task)):
        items = [item for _, item in convert(rows, _format(task, sound), task.fields)]
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
    """Whether rows ask and answer in fields of their own, in none of the formats for training."""
    asks = any(row.data.get(name) is not None for row in rows[:1] for name in _QUESTIONS)
    return asks and any(row.data.get(task.answer or "answer") is not None for row in rows)


def _format(task: Task, rows: Sequence[Row]) -> str:
    """The format that rows are read by: the task's, else what the first row looks like."""
    looks = task.format or suggest_format(rows[0].data)
    if looks in READ and not (looks == "text" and task.kind != "loss"):
        return str(looks)
    if looks is None:
        has = ", ".join(rows[0].data) or "no fields"
        raise DataError(
            f"{rows[0].where}: the row has {has}, which is none of the formats "
            f"{', '.join(READ)}; name one with --format, or say what to ask in a task's prompt (--task TASK.yaml)"
        )
    what = f"a {task.kind} task" if task.kind != "loss" else "a loss"
    more = "; mlxft score takes pairs and rankings" if looks in FORMATS and looks not in READ else ""
    raise ConfigError(f"format {looks} is not for {what}{more}; it takes {', '.join(READ)}")


def _check_fields(task: Task, rows: Sequence[Row]) -> None:
    """A field that the task names and no row has is a mistake in the task, not in each row."""
    names = {name for row in rows for name in row.data}
    named = {"answer": task.answer, "choices": task.choices}
    for setting, field in named.items():
        if isinstance(field, str) and not is_template(field) and names and field not in names:
            raise ConfigError(
                f"{setting} is {field!r}, which no row has{nearest(field, names)}; rows have {', '.join(sorted(names))}"
            )


def _case(row: Row, item: Item | None, task: Task) -> Case:
    prompt, own = _asked(row.data, item, task)
    tools = item.tools if isinstance(item, Conversation) else tools_of(row.data) if isinstance(item, Prompt) else None
    if task.kind == "loss":
        if item is None or isinstance(item, Prompt):
            item = _completion(row.data, prompt, task)
            own = _texts(_value(row.data, task.answer or "answer"), task.answer or "answer")
        return Case(row.where, row.data, prompt, own, item=item)
    if task.kind == "choice":
        choices = _choices(row.data, task)
        wanted = own[0] if own and task.answer is None else _value(row.data, task.answer or "answer")
        right = _right(wanted, choices, task.answer or "answer")
        return Case(row.where, row.data, prompt, (choices[right],), choices, right, tools=tools)
    if task.answer is not None:
        own = _texts(_value(row.data, task.answer), task.answer)
    elif isinstance(item, Prompt) and row.data.get("answer") is not None:
        own = _texts(row.data["answer"], "answer")
    if task.compares and not own:
        has = ", ".join(row.data)
        raise DataError(
            f"no wanted answer to compare with: no field 'answer'; the row has {has} (a task's answer: names one)"
        )
    return Case(row.where, row.data, prompt, own, tools=tools)


def _asked(row: dict[str, Any], item: Item | None, task: Task) -> tuple[str | list[Message], tuple[str, ...]]:
    """The prompt, and the wanted answers where the format says what they are."""
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
        raise DataError(
            f"no field {' or '.join(_QUESTIONS)}; the row has {', '.join(row)} (a task's prompt: says what to ask)"
        )
    return read_prompts({"prompt": row[name], "system": row.get("system")}).prompt, ()


def _completion(row: dict[str, Any], prompt: str | list[Message], task: Task) -> Item:
    """What a loss is of, where a template says what is asked."""
    (text, *_) = _texts(_value(row, task.answer or "answer"), task.answer or "answer")
    if isinstance(prompt, str) and task.system is None:
        return Completion(prompt, text)
    return Conversation([*as_messages(prompt, task.system), {"role": "assistant", "content": text}])


def _value(row: dict[str, Any], field: str) -> Any:
    """A field of the row, or a template filled from it."""
    if is_template(field):
        return fill(field, row, "answer")
    if row.get(field) is None:
        raise DataError(f"no field {field!r}; the row has {', '.join(row) or 'none'}")
    return row[field]


def _texts(value: Any, field: str) -> tuple[str, ...]:
    """The wanted answers: a text, a number, or a list of them."""
    every = value if isinstance(value, list) else [value]
    if not every or any(isinstance(v, bool) or not isinstance(v, str | int | float) for v in every):
        seen = "an empty list" if value == [] else type_name(value)
        raise DataError(f"{field} is {seen}; expected a text, a number, or a list of them")
    return tuple(str(v) for v in every)


def _choices(row: dict[str, Any], task: Task) -> tuple[str, ...]:
    if isinstance(task.choices, list):
        return tuple(task.choices)
    name = task.choices or "choices"
    value = row.get(name)
    if value is None:
        raise DataError(f"no field {name!r}; the row has {', '.join(row) or 'none'}")
    if not isinstance(value, list):
        raise DataError(f"{name} is {type_name(value)}; expected a list of texts")
    for i, choice in enumerate(value):
        if isinstance(choice, bool) or not isinstance(choice, str | int | float) or not str(choice).strip():
            seen = "empty" if choice == "" or isinstance(choice, str) else type_name(choice)
            raise DataError(f"{name}[{i}] is {seen}; expected a text")
    texts = tuple(str(choice) for choice in value)
    if len(texts) < 2:
        raise DataError(f"{name} has {len(texts)} texts; expected at least two to choose from")
    if len(set(texts)) < len(texts):
        raise DataError(f"{name} has the same text twice: {value!r:.80}")
    return texts


def _right(value: Any, choices: tuple[str, ...], field: str) -> int:
    """The wanted choice, given as its text or, as a number, its index."""
    if value is None:
        raise DataError(f"no field {field!r}, which says which choice is right")
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, str) and value.strip() in [c.strip() for c in choices]:
        return [c.strip() for c in choices].index(value.strip())
    if isinstance(value, (str, bool)) or not isinstance(value, int):
        near = nearest(value, choices) if isinstance(value, str) else ""
        raise DataError(f"{field} is {value!r:.60}{near}; expected one of the choices, or its index from 0 as a number")
    if not 0 <= value < len(choices):
        raise DataError(
            f"{field} is {value}; out of range: there are {len(choices)} choices, from 0 to {len(choices) - 1}"
        )
    return value


def as_messages(prompt: str | list[Message], system: str | None = None) -> list[Message]:
    """The turns that a prompt is in a chat."""
    turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is None:
        return turns
    if turns and turns[0]["role"] == "system":
        raise ConfigError("system is given, and the messages start with one of their own; keep one of them")
    return [{"role": "system", "content": system}, *turns]


def with_shots(case: Case, shots: Sequence[Case], task: Task, chat: bool) -> str | list[Message]:
    """A case's prompt after solved ones: earlier turns of the chat, or blocks of text with an empty line between.

    Args:
        shots: cases with an answer; their first one is shown.
        chat: whether the prompt goes through a chat template.
    Raises:
        ConfigError: a system prompt, or messages, where there is no chat.
    """
    if missing := [shot.where for shot in shots if shot.label is None]:
        raise DataError(f"{missing[0]}: has no answer, so it can not be shown as an example")
    if chat:
        turns: list[Message] = []
        for shot in shots:
            own = as_messages(shot.prompt)
            turns += [m for m in own if m["role"] != "system"] + [{"role": "assistant", "content": shot.label}]
        last = as_messages(case.prompt)
        opening = [m for m in last[:1] if m["role"] == "system"]
        return as_messages([*opening, *turns, *last[len(opening) :]], task.system)
    if task.system is not None:
        raise ConfigError(
            "system has no place in plain text (no chat template, or template: none); write it into prompt"
        )
    texts = [case.prompt, *(shot.prompt for shot in shots)]
    if any(not isinstance(text, str) for text in texts):
        raise DataError(
            f"{case.where}: messages need a chat template; this model has none, or the task's template is none"
        )
    blocks = [f"{shot.prompt}{delimiter(task)}{shot.label}" for shot in shots]
    return "\n\n".join([*blocks, str(case.prompt)])


def delimiter(task: Task) -> str:
    """Plain text: what stands between a prompt and its answer. Rows of prompt-completion bring their own."""
    if task.delimiter is not None:
        return task.delimiter
    return "" if task.prompt is None and task.kind != "choice" else " "
