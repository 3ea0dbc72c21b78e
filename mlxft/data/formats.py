"""Row formats: one function per format, from a row's fields to a Conversation, a Completion, a Text or a Prompt.

A format never guesses: a row either is in the format that the recipe names or is refused with the place, what was
seen and what is wanted. `suggest_format` says what a row looks like, for messages only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from mlxft.data.sources import Problem, Row, report_lines, type_name
from mlxft.errors import ConfigError, DataError, nearest

Message: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat, checked: `role` and a string `content` each; `tool_calls` with arguments as mappings.

    An assistant message may carry `weight` 0 or 1: whether it is trained.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Prompt:
    """What a rollout starts from, and the whole row, which a reward function may want."""

    prompt: str | list[Message]
    row: dict[str, Any]


Item: TypeAlias = Conversation | Completion | Text | Prompt


class Example(NamedTuple):
    """A converted row and where it stood."""

    where: str
    item: Item


class Format(NamedTuple):
    """How a row is read, which fields it must have, and which it may have."""

    read: Callable[[dict[str, Any]], Item]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


ROLES = ("system", "developer", "user", "assistant", "tool")
_OPENERS = ("system", "developer")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def _string(value: Any, at: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{at} is {type_name(value)}; expected a string")
    if not empty and not value.strip():
        raise DataError(f"{at} is empty; expected text")
    return value


def _list(value: Any, at: str, of: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{at} is {type_name(value)}; expected a list of {of}")
    if not value:
        raise DataError(f"{at} is empty; expected at least one of {of}")
    return value


def _json(text: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{at} is a string that is not valid JSON: {exc}") from exc


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool descriptions: a list of objects, or the JSON of one (csv and parquet hold strings). Empty is none."""
    value = _json(value, "tools") if isinstance(value, str) and value.strip() else value or None
    if value is None:
        return None
    for i, tool in enumerate(_list(value, "tools", "tool descriptions")):
        if not isinstance(tool, dict):
            raise DataError(f"tools[{i}] is {type_name(tool)}; expected an object describing a function")
    return list(value)


def _content(message: Message, at: str) -> str:
    content = message.get("content")
    if content is None and "tool_calls" in message:
        return ""
    if content is None:
        raise DataError(f"{at}.content is missing; expected text")
    if isinstance(content, list):
        texts = []
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = repr(part.get("type")) if isinstance(part, dict) else type_name(part)
                raise DataError(
                    f"{at}.content[{i}] is {kind}; expected {{'type': 'text', 'text': ...}}: only text is trained"
                )
            texts.append(_string(part.get("text"), f"{at}.content[{i}].text", empty=True))
        content = "".join(texts)
    return _string(content, f"{at}.content", empty=True)


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        seen = "has no 'function' object" if isinstance(call, dict) else f"is {type_name(call)}"
        raise DataError(f"{at} {seen}; expected {{'type': 'function', 'function': {{'name': ..., 'arguments': ...}}}}")
    if call.get("type") not in (None, "function"):
        raise DataError(f"{at}.type is {call['type']!r}; expected 'function'")
    function = dict(call["function"])
    function["name"] = _string(function.get("name"), f"{at}.function.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # Chat templates walk over the arguments: they want a mapping, though the wire format is a string.
        arguments = _json(arguments, f"{at}.function.arguments")
    if not isinstance(arguments, dict):
        raise DataError(f"{at}.function.arguments is {type_name(arguments)}; expected an object")
    return {
        **{key: value for key, value in call.items() if value is not None},
        "function": {**function, "arguments": arguments},
    }


def _message(value: Any, at: str) -> Message:
    """One message, checked by itself. Null fields count as missing: parquet fills a struct's gaps with them."""
    if not isinstance(value, dict):
        raise DataError(f"{at} is {type_name(value)}; expected an object with role and content")
    message = {key: field for key, field in value.items() if field is not None}
    role = message.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{at}.role is {role!r}; expected system, user, assistant or tool{hint}")
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    if "tool_calls" in message:
        if role != "assistant":
            raise DataError(f"{at} has tool_calls and role {role}; only an assistant calls tools")
        calls = _list(message["tool_calls"], f"{at}.tool_calls", "calls")
        message["tool_calls"] = [_tool_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    message["content"] = _content(message, at)
    if "weight" in message:
        weight = message["weight"]
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f"{at}.weight is {weight!r}; expected 0 (not trained) or 1")
        if role != "assistant":
            raise DataError(f"{at} has a weight and role {role}; only assistant turns carry one")
    return message


def _check_order(messages: Sequence[Message], at: Sequence[str], last: tuple[str, ...] = ("assistant",)) -> None:
    """System first or not at all, then user and assistant in turn, tool turns after the calls; `at` names each."""
    previous: Message = {"role": "nothing"}
    for message, place in zip(messages, at):
        role, before = message["role"], previous["role"]
        if role in _OPENERS:
            fits, wanted = before == "nothing", "it may only stand first"
        elif role == "user":
            fits, wanted = before in ("nothing", *_OPENERS, "assistant"), "user and assistant take turns"
        elif role == "assistant":
            fits, wanted = before in ("user", "tool"), "an assistant turn follows a user or tool turn"
        else:
            fits = before == "tool" or "tool_calls" in previous
            wanted = "a tool turn follows an assistant turn with tool_calls, or another tool turn"
        if not fits:
            raise DataError(f"{place}.role is {role} after {before}; {wanted}")
        previous = message
    if previous["role"] not in last:
        raise DataError(
            f"{at[-1]}.role is {previous['role']}, and it is the last; expected {' or '.join(last)} to end it"
        )


def _messages(value: Any, name: str, last: tuple[str, ...] = ("assistant",)) -> list[Message]:
    at = [f"{name}[{i}]" for i in range(len(_list(value, name, "messages")))]
    messages = [_message(message, place) for message, place in zip(value, at)]
    _check_order(messages, at, last)
    # A turn may be empty, real chats have such; an answer that is all empty has nothing to learn from.
    answers = [m for m in messages if m["role"] == "assistant"]
    if answers and not any(m["content"].strip() or "tool_calls" in m or "reasoning_content" in m for m in answers):
        raise DataError(f"{name}: every assistant turn is empty; expected text")
    return messages


def read_messages(row: dict[str, Any]) -> Conversation:
    """{"messages": [{"role", "content", ...}], "tools"?: [...]}"""
    return Conversation(_messages(row["messages"], "messages"), _tools(row.get("tools")))


def read_prompt_completion(row: dict[str, Any]) -> Conversation | Completion:
    """{"prompt", "completion"}: two strings, or messages and then messages, one message or a string.

    What stands in a prompt of messages is context: its assistant turns get weight 0 unless they carry one.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return Completion(_string(prompt, "prompt"), _string(completion, "completion"))
    if not isinstance(prompt, list):
        raise DataError(f"prompt is {type_name(prompt)}; expected a string or a list of messages")
    context = _messages(prompt, "prompt", ("user", "tool", "assistant"))
    context = [{"weight": 0, **message} if message["role"] == "assistant" else message for message in context]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": _string(completion, "completion")}]
    elif isinstance(completion, dict):
        completion = [completion]
    at = [f"completion[{i}]" for i in range(len(_list(completion, "completion", "messages")))]
    messages = context + [_message(message, place) for message, place in zip(completion, at)]
    _check_order(messages, [f"prompt[{i}]" for i in range(len(context))] + at)
    return Conversation(messages, _tools(row.get("tools")))


def read_text(row: dict[str, Any]) -> Text:
    """{"text": ...}"""
    return Text(_string(row["text"], "text"))


def _sharegpt_turn(turn: Any, at: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{at} is {type_name(turn)}; expected an object with from and value")
    source, value = turn.get("from"), turn.get("value")
    if source not in _SHAREGPT:
        hint = nearest(source, _SHAREGPT) if isinstance(source, str) else ""
        raise DataError(f"{at}.from is {source!r}; expected one of {', '.join(_SHAREGPT)}{hint}")
    message: Message = {"role": _SHAREGPT[source], "weight": turn.get("weight")}
    if source == "function_call":
        calls = _json(_string(value, f"{at}.value"), f"{at}.value")
        calls = calls if isinstance(calls, list) else [calls]
        return _message({**message, "tool_calls": [{"type": "function", "function": call} for call in calls]}, at)
    empty = message["role"] in ("system", "tool")
    return _message({**message, "content": _string(value, f"{at}.value", empty=empty)}, at)


def read_sharegpt(row: dict[str, Any]) -> Conversation:
    """{"conversations": [{"from", "value"}], "system"?, "tools"?}"""
    turns = _list(row["conversations"], "conversations", "turns")
    at = [f"conversations[{i}]" for i in range(len(turns))]
    messages = [_sharegpt_turn(turn, place) for turn, place in zip(turns, at)]
    system = _system(row)
    _check_order(system + messages, ["system"] * len(system) + at)
    return Conversation(system + messages, _tools(row.get("tools")))


def _system(row: dict[str, Any]) -> list[Message]:
    """The system turn of a row's own `system` field; none where it is missing, null or empty."""
    text = _string(row.get("system") or "", "system", empty=True)
    return [{"role": "system", "content": text}] if text.strip() else []


def read_alpaca(row: dict[str, Any]) -> Conversation:
    """{"instruction", "output", "input"?, "system"?, "history"?: [[question, answer], ...]}"""
    messages = _system(row)
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{i}] is not a pair; expected [question, answer]")
        messages.append({"role": "user", "content": _string(pair[0], f"history[{i}][0]")})
        messages.append({"role": "assistant", "content": _string(pair[1], f"history[{i}][1]")})
    question = _string(row["instruction"], "instruction")
    extra = _string("" if row.get("input") is None else row["input"], "input", empty=True)
    messages.append({"role": "user", "content": f"{question}\n\n{extra}" if extra.strip() else question})
    messages.append({"role": "assistant", "content": _string(row["output"], "output")})
    return Conversation(messages)


def read_prompts(row: dict[str, Any]) -> Prompt:
    """{"prompt": a string, or messages that end with a user or tool turn}, and whatever a reward wants."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return Prompt(_string(prompt, "prompt"), row)
    if not isinstance(prompt, list):
        raise DataError(f"prompt is {type_name(prompt)}; expected a string or a list of messages")
    return Prompt(_messages(prompt, "prompt", ("user", "tool")), row)


FORMATS: dict[str, Format] = {
    "messages": Format(read_messages, ("messages",), ("tools",)),
    "prompt-completion": Format(read_prompt_completion, ("prompt", "completion"), ("tools",)),
    "text": Format(read_text, ("text",)),
    "sharegpt": Format(read_sharegpt, ("conversations",), ("system", "tools")),
    "alpaca": Format(read_alpaca, ("instruction", "output"), ("input", "system", "history")),
    "prompts": Format(read_prompts, ("prompt",)),
}


def suggest_format(row: dict[str, Any]) -> str | None:
    """The format that a row looks like, or None. For messages; nothing is read by it."""
    # `prompts` comes last: its only field is one of prompt-completion's, too.
    has = {field for field, value in row.items() if value is not None}
    return next((name for name, form in FORMATS.items() if has.issuperset(form.required)), None)


def convert(
    rows: Iterable[Row | Problem],
    format: str,
    fields: Mapping[str, str] | None = None,
    skipped: list[Problem] | None = None,
) -> list[Example]:
    """All rows of a source in one format.

    Args:
        format: a name of `FORMATS`.
        fields: the format's field name -> the row's name of it, where the two differ.
        skipped: takes the rows that do not fit, which then are left out; without it, and when no row fits, they raise.
    Raises:
        ConfigError: no such format; or `fields` names a field that the format, or every row, does not have.
        DataError: rows that can not be read or do not fit; all of them in one.
    """
    form, fields = _format(format), dict(fields or {})
    _check_fields(fields, format)
    examples: list[Example] = []
    problems: list[Problem] = []
    looks: list[str | None] = []
    names: set[str] = set()
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        names.update(row.data)
        data = {key: value for key, value in row.data.items() if key not in fields or fields[key] == key}
        data |= {ours: row.data[theirs] for ours, theirs in fields.items() if theirs in row.data}
        missing = [fields.get(name, name) for name in form.required if data.get(name) is None]
        if missing:
            has = ", ".join(map(str, row.data)) or "none"
            problems.append(Problem(row.where, f"no field {' and no '.join(map(repr, missing))}; the row has {has}"))
            looks.append(suggest_format(row.data))
            continue
        try:
            examples.append(Example(row.where, form.read(data)))
        except DataError as exc:
            problems.append(Problem(row.where, str(exc)))
    for ours, theirs in fields.items():
        if names and theirs not in names:
            seen = f"no row has{nearest(theirs, names)}; rows have {', '.join(sorted(names))}"
            raise ConfigError(f"data.fields.{ours} is {theirs!r}, which {seen}")
    total = len(examples) + len(problems)
    if problems and (skipped is None or not examples):
        raise DataError(_report(problems, [name for name in looks if name and name != format], total))
    if skipped is not None:
        skipped.extend(problems)
    return examples


def _report(problems: list[Problem], looks: list[str], total: int) -> str:
    text = report_lines([f"{problem.where}: {problem.text}" for problem in problems])
    likely = max(looks, key=looks.count, default=None)
    if likely and 2 * looks.count(likely) >= total:
        text += f"\nthis file looks like data.format: {likely}"
    return text


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"data.format is {name!r}; expected one of {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    return FORMATS[name]


def _check_fields(fields: Mapping[str, str], format: str) -> None:
    known = FORMATS[format].required + FORMATS[format].optional
    unknown = [
        f"data.fields.{name}: format {format} has no field {name!r}{nearest(name, known)}"
        for name in fields
        if name not in known
    ]
    if unknown:
        raise ConfigError("\n".join([*unknown, f"the fields of {format} are {', '.join(known)}"]))
