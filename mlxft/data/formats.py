"""Row formats: one function per format turns a row (a dict) into a typed item, or says what is wrong with it."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, product
from typing import Any, NamedTuple, TypeAlias

from mlxft.data.sources import (
    SPEAKERS,
    SPOKEN,
    USUAL_NAMES,
    Problem,
    Row,
    plain_name,
    read_json,
    report_lines,
    type_name,
)
from mlxft.errors import ConfigError, DataError, half_character, nearest

# --- template ---------------------------------------------------------------------------------------------------------
# Texts made of a row's fields, such as `Review: {review}`.


def is_template(text: str) -> bool:
    """Return whether a text has places for fields; `{{` and `}}` stand for braces."""
    return "{" in text.replace("{{", "")


def names_in(template: str, setting: str) -> list[str]:
    """Return the fields that the template of a setting names, each once; raise ConfigError if its braces are wrong."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise ConfigError(f"{setting} is {template!r}: {e}; write {{{{ and }}}} for braces of the text") from e
    names = [name for _, name, _, _ in parts if name is not None]
    wrong = [name for _, name, how, as_ in parts if name is not None and (not name.strip() or how or as_)]
    if wrong:
        raise ConfigError(f"{setting} is {template!r}: expected a field's name between braces, as in {{review}}")
    return list(dict.fromkeys(names))


def fill(template: str, row: Mapping[str, Any], setting: str) -> str:
    """Fill a template with a row's fields, written as JSON unless they are texts; raise DataError if one is missing."""
    names_in(template, setting)
    text = []
    for before, name, _, _ in string.Formatter().parse(template):
        text.append(before)
        if name is None:
            continue
        if (value := cell_of(row, name)) is None:
            seen = f"{nearest(name, map(str, row))}; the row has {', '.join(map(str, row)) or 'none'}"
            raise DataError(f"no field {name!r}, which {setting} names{seen}")
        text.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(text)


def cell_of(row: Mapping[str, Any], name: str) -> Any:
    """Return a field of a row, or of an object in it (`translation.en`); None where there is none."""
    outer, _, inner = name.partition(".")
    if name in row or not inner:
        return row.get(name)
    within = row.get(outer)
    return within.get(inner) if isinstance(within, Mapping) else None


def names_of(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of a row's fields, and those of the objects in it as `outer.inner`."""
    for name, value in row.items():
        yield str(name)
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in value)


# --- formats ----------------------------------------------------------------------------------------------------------
# A format never guesses: a row is in the format that the recipe names, or is refused with the place, what was seen and
# what is expected.

Message: TypeAlias = dict[str, Any]
WRITTEN = "_written"
"""Key in a call's function for the text of its arguments as given, which some chat templates need."""


@dataclass(frozen=True)
class Conversation:
    """Checked turns of a chat: `role`, a string `content`, and `tool_calls` with arguments as mappings.

    An assistant message may have a `weight` of 0 or 1: whether it is trained. A call's function has WRITTEN where the
    row gave its arguments as a text.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, both texts."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample completions of, and its whole row, which rewards may read."""

    prompt: str | list[Message]
    row: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt; the chosen one is better unless it is a tie.

    The prompt is a text, and then both completions are texts; or messages, and then both are an assistant message.
    """

    prompt: str | list[Message]
    chosen: str | Message
    rejected: str | Message
    margin: float | None = None  # how much better the chosen one is, in units of score; None if unknown
    weight: float = 1.0  # the pairs of one row add up to 1
    tie: bool = False  # neither is better
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Ranked:
    """The pairs of several completions of one prompt; none where all are equally good."""

    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Labelled:
    """A completion and whether it is good. Prompt and completion are as in a Pair."""

    prompt: str | list[Message]
    completion: str | Message
    label: bool
    tools: list[dict[str, Any]] | None = None


Item: TypeAlias = Conversation | Completion | Text | Prompt | Pair | Ranked | Labelled


class Example(NamedTuple):
    """A converted row and its place."""

    where: str
    item: Item


def with_completion(prompt: str | list[Message], completion: str | Message) -> list[Message]:
    """Return a prompt and its completion as messages."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*turns, {"role": "assistant", "content": completion} if isinstance(completion, str) else completion]


ROLES = ("system", "developer", "user", "assistant", "tool")
_OPENERS = ("system", "developer")
# The roles that a role may follow, for messages.
_ORDER = {
    **dict.fromkeys(_OPENERS, (("nothing",), "it may only stand first")),
    "user": (("nothing", *_OPENERS, "assistant"), "user and assistant take turns"),
    "assistant": (("user", "tool"), "an assistant turn follows a user or tool turn"),
    "tool": (("tool",), "a tool turn follows an assistant turn with tool_calls, or another tool turn"),
}
_SHAREGPT = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool"), "tool"),
}


def string_at(value: Any, at: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{at} is {type_name(value)}; expected a string")
    if not empty and not value.strip():
        raise DataError(f"{at} is empty; expected text")
    return value


def flag_at(value: Any, at: str) -> bool:
    """Return a value as true or false; tables have it as a text, a number or a thumb."""
    text = re.sub(r"[\s_\ufe0f\U0001f3fb-\U0001f3ff]", "", str(value).lower())
    if isinstance(value, bool | int | str) and text in _GOOD | _BAD:
        return text in _GOOD
    raise DataError(f"{at} is {value!r}; expected true or false")


_GOOD = {"true", "accept", "accepted", "1", "+1", "up", "thumbsup", "👍", "yes", "like", "liked", "good"}
_BAD = {"false", "reject", "rejected", "0", "-1", "down", "thumbsdown", "👎", "no", "dislike", "disliked", "bad"}


def _is_flag(value: Any) -> bool:
    with suppress(DataError):
        return flag_at(value, "") in (True, False)
    return False


def list_at(value: Any, at: str, of: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{at} is {type_name(value)}; expected a list of {of}")
    if not value:
        raise DataError(f"{at} is empty; expected at least one of {of}")
    return value


def _json(text: str, at: str) -> Any:
    try:
        value = read_json(text)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{at} is a string that is not valid JSON: {exc}") from exc
    if half := half_character(value, at):
        raise DataError(half)
    return value


def _objects(value: Any, at: str, of: str) -> list[dict[str, Any]]:
    """Return a list of objects given as such, as JSON (csv and parquet hold strings), or as a list of JSON texts."""
    if isinstance(value, str):
        value = _json(value, at) if value.strip() else None
    if value is None or value in ([], {}):
        return []
    found = []
    for i, part in enumerate(list_at(value, at, of)):
        part = _json(part, f"{at}[{i}]") if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise DataError(f"{at}[{i}] is {type_name(part)}; expected an object: {of}")
        found.append(part)
    return found


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of a row, or None: from `tools`, or from OpenAI's older `functions`."""
    tools, functions = _objects(row.get("tools"), "tools", "tool descriptions"), functions_of(row)
    if tools and functions:
        raise DataError("the row has tools and functions; expected one of them")
    return tools or [{"type": "function", "function": function} for function in functions] or None


def functions_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row's `functions`; none where the column holds something else."""
    given = row.get("functions")
    known = isinstance(given, list) and all(isinstance(function, dict) and "name" in function for function in given)
    return list(given) if known and given else []


def _content(message: Message, at: str) -> str:
    content = message.get("content")
    if content is None and "tool_calls" in message:
        return ""
    if content is None:
        raise DataError(f"{at}.content is missing; expected text")
    if isinstance(content, list):
        texts = []
        for i, part in enumerate(content):
            if not isinstance(part, dict) or (part.get("type") != "text" and part.keys() != {"text"}):  # Bedrock's
                kind = repr(part.get("type")) if isinstance(part, dict) else type_name(part)
                raise DataError(
                    f"{at}.content[{i}] is {kind}; expected {{'type': 'text', 'text': ...}}: only text is trained"
                )
            texts.append(string_at(part.get("text"), f"{at}.content[{i}].text", empty=True))
        content = "".join(texts)
    return string_at(content, f"{at}.content", empty=True)


def _tool_call(call: dict[str, Any], at: str) -> dict[str, Any]:
    """Return a call in OpenAI's present form; name and arguments may come without the wrapper `function`."""
    call = {key: value for key, value in call.items() if value is not None}
    if "function" not in call and "name" in call:
        outer = {key: call.pop(key) for key in ("id", "type") if key in call}
        call = {"type": "function"} | outer | {"function": call}
    beside = [key for key in ("arguments", "parameters") if key in call]
    if not isinstance(call.get("function"), dict) or beside:
        seen = f"has {beside[0]} beside 'function'" if beside else "has no 'function' object"
        raise DataError(f"{at} {seen}; expected {{'type': 'function', 'function': {{'name': ..., 'arguments': ...}}}}")
    if call.get("type") not in (None, "function"):
        raise DataError(f"{at}.type is {call['type']!r}; expected 'function'")
    return {**call, "function": _function(call["function"], f"{at}.function")}


def _function(given: dict[str, Any], at: str) -> dict[str, Any]:
    """Return a called function with its arguments as a mapping, and as WRITTEN where they were a text."""
    function = {key: value for key, value in given.items() if value is not None and key != WRITTEN}
    function["name"] = string_at(function.get("name"), f"{at}.name")
    if "arguments" not in function and "parameters" in function:  # as Llama 3.1 writes its calls
        function["arguments"] = function.pop("parameters")
    others = [key for key in function if key not in ("name", "arguments", "description", "id", "type", "index")]
    if "arguments" not in function and others:
        raise DataError(f"{at} has {', '.join(others)} and no arguments; expected name and arguments")
    arguments = written = function.get("arguments")
    if isinstance(written, str):
        arguments = _json(written, f"{at}.arguments") if written.strip() else None
    if arguments is None or arguments == []:  # PHP writes an empty object as []
        arguments, written = {}, None
    if not isinstance(arguments, dict):
        raise DataError(f"{at}.arguments is {type_name(arguments)}; expected an object")
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:  # NaN, Infinity, 1e400; a date, from parquet
        raise DataError(f"{at}.arguments holds what JSON cannot write ({error}); make it null or a text") from error
    return {**function, "arguments": arguments, **({WRITTEN: written} if isinstance(written, str) else {})}


def unwritten(value: Any) -> Any:
    """Return a text, a message or messages without WRITTEN, to compare them or write them to a file."""
    if isinstance(value, list):
        return [unwritten(part) for part in value]
    if not isinstance(value, dict) or "tool_calls" not in value:
        return value
    calls = [
        {**call, "function": {key: part for key, part in call["function"].items() if key != WRITTEN}}
        for call in value["tool_calls"]
    ]
    return {**value, "tool_calls": calls}


def _calls(message: Message, at: str) -> list[dict[str, Any]]:
    """Return the calls of a message, which may have OpenAI's older `function_call`."""
    calls = _objects(message.get("tool_calls"), f"{at}.tool_calls", "calls")
    old = message.get("function_call")
    if isinstance(old, str) and old.strip():
        old = _json(old, f"{at}.function_call")
    if not old:
        return [_tool_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if calls:
        raise DataError(f"{at} has tool_calls and function_call; expected one of them")
    if not isinstance(old, dict):
        raise DataError(f"{at}.function_call is {type_name(old)}; expected {{'name': ..., 'arguments': ...}}")
    return [{"type": "function", "function": _function(old, f"{at}.function_call")}]


def message_at(value: Any, at: str) -> Message:
    """Check one message. Null fields count as missing: parquet fills gaps in structs with them."""
    if not isinstance(value, dict):
        raise DataError(f"{at} is {type_name(value)}; expected an object with role and content")
    message = {key: field for key, field in value.items() if field is not None}
    if message.get("role") == "function":  # OpenAI's older name of the role tool
        message["role"] = "tool"
    role = message.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{at}.role is {role!r}; expected system, user, assistant or tool{hint}")
    calls = _calls(message, at)
    message = {key: field for key, field in message.items() if key not in ("tool_calls", "function_call")}
    if calls:
        if role != "assistant":
            raise DataError(f"{at} has tool_calls and role {role}; only an assistant calls tools")
        message["tool_calls"] = calls
    message["content"] = _content(message, at)
    if "weight" in message:
        weight = message["weight"]
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f"{at}.weight is {weight!r}; expected 0 (not trained) or 1")
        if role != "assistant":
            raise DataError(f"{at} has a weight and role {role}; only assistant turns carry one")
    return message


def check_order(
    messages: Sequence[Message], at: Sequence[str], last: tuple[str, ...] = ("assistant",), in_text: bool = False
) -> None:
    """Check the order: system first or not at all, user and assistant alternating, tool turns after calls.

    With `in_text`, calls may be in an assistant turn's text, so that a tool turn may follow any such turn.
    """
    previous: Message = {"role": "nothing"}
    for message, place in zip(messages, at):
        role, before = message["role"], previous["role"]
        follows, wanted = _ORDER[role]
        after_call = "tool_calls" in previous or (in_text and before == "assistant")
        if before not in follows and not (role == "tool" and after_call):
            raise DataError(f"{place}.role is {role} after {before}; {wanted}")
        previous = message
    if previous["role"] not in last:
        ends = " or ".join(last)
        raise DataError(f"{at[-1]}.role is {previous['role']}, and it is the last; expected {ends} to end it")


_Read: TypeAlias = Callable[[Any, str], Message]


def _messages(
    value: Any,
    name: str,
    last: tuple[str, ...] = ("assistant",),
    read: _Read = message_at,
    in_text: bool = False,
) -> list[Message]:
    value = _json(value, name) if isinstance(value, str) and value.lstrip().startswith("[") else value  # as csv has it
    at = [f"{name}[{i}]" for i in range(len(list_at(value, name, "messages")))]
    messages = [read(turn, place) for turn, place in zip(value, at)]
    check_order(messages, at, last, in_text)
    # Real chats have empty turns, but a chat with nothing else has nothing to learn.
    turns = [m for m in messages if m["role"] == "assistant"]
    if turns and not any(m["content"].strip() or "tool_calls" in m or "reasoning_content" in m for m in turns):
        raise DataError(f"{name}: every assistant turn is empty; expected text")
    return messages


_ASKING = ("user", "tool")


def _prompt(value: Any, last: tuple[str, ...] = _ASKING, read: _Read = message_at) -> str | list[Message]:
    if isinstance(value, str):
        return string_at(value, "prompt")
    if not isinstance(value, list):
        raise DataError(f"prompt is {type_name(value)}; expected a string or a list of messages")
    return _messages(value, "prompt", last, read)


def read_messages(row: dict[str, Any]) -> Conversation:
    """{"messages": [{"role", "content", ...}], "system"?, "tools"?: [...]}"""
    return Conversation(with_system(row, _messages(row["messages"], "messages"), "messages"), tools_of(row))


def read_prompt_completion(row: dict[str, Any]) -> Conversation | Completion:
    """{"prompt", "completion", "system"?}: two strings; or messages, and then messages, one message or a string.

    A prompt of messages is context: its assistant turns get weight 0 unless they have a weight.
    """
    prompt, completion = _prompt(row["prompt"], (*_ASKING, "assistant")), row["completion"]
    if isinstance(prompt, str):
        completion = string_at(completion, "completion")
        if is_text(row):
            return Completion(prompt, completion)
        return Conversation(with_system(row, with_completion(prompt, completion)), tools_of(row))
    context = [{"weight": 0, **message} if message["role"] == "assistant" else message for message in prompt]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": string_at(completion, "completion")}]
    elif isinstance(completion, dict):
        completion = [completion]
    at = [f"completion[{i}]" for i in range(len(list_at(completion, "completion", "messages")))]
    messages = context + [message_at(message, place) for message, place in zip(completion, at)]
    check_order(messages, [f"prompt[{i}]" for i in range(len(context))] + at)
    return Conversation(with_system(row, messages, "prompt"), tools_of(row))


def read_text(row: dict[str, Any]) -> Text:
    """{"text": ...}"""
    return Text(string_at(row["text"], "text"))


def sharegpt_turn(turn: Any, at: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{at} is {type_name(turn)}; expected an object with from and value")
    source, value = turn.get("from"), turn.get("value")
    if source not in _SHAREGPT:
        hint = nearest(source, _SHAREGPT) if isinstance(source, str) else ""
        raise DataError(f"{at}.from is {source!r}; expected one of {', '.join(_SHAREGPT)}{hint}")
    message: Message = {"role": _SHAREGPT[source], "weight": turn.get("weight")}
    if source == "function_call":
        calls = _json(string_at(value, f"{at}.value"), f"{at}.value")
        calls = calls if isinstance(calls, list) else [calls]
        return message_at({**message, "tool_calls": [{"type": "function", "function": call} for call in calls]}, at)
    empty = message["role"] in ("system", "tool")
    return message_at({**message, "content": string_at(value, f"{at}.value", empty=empty)}, at)


def read_sharegpt(row: dict[str, Any]) -> Conversation:
    """{"conversations": [{"from", "value"}], "system"?, "tools"?}"""
    messages = _messages(row["conversations"], "conversations", read=sharegpt_turn, in_text=True)
    return Conversation(with_system(row, messages, "conversations"), tools_of(row))


def system_turn(row: Mapping[str, Any]) -> list[Message]:
    """Return the system turn of a row's `system` field; none where it is missing, null or empty."""
    given = row.get("system") or ""
    text = string_at(_content({"content": given}, "system") if isinstance(given, list) else given, "system", empty=True)
    return [{"role": "system", "content": text}] if text.strip() else []


def is_text(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a text as its prompt, without a system text or tools, which need a chat."""
    return isinstance(row.get("prompt"), str) and not system_turn(row) and not tools_of(row)


def with_system(row: Mapping[str, Any], messages: list[Message], name: str = "prompt") -> list[Message]:
    """Put the system turn of a row's `system` field, if any, before its messages, which are in the field `name`."""
    system, first = system_turn(row), messages[0]
    if not system or first == system[0]:
        return messages
    if first["role"] in _OPENERS:
        raise DataError(f"the row has a field system, and {name}[0] is a {first['role']} turn too; keep one of them")
    return system + messages


def read_alpaca(row: dict[str, Any]) -> Conversation:
    """{"instruction", "output", "input"?, "system"?, "history"?: [[user, assistant], ...]}"""
    messages = system_turn(row)
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{i}] is not a pair; expected [user, assistant]")
        messages += with_completion(*(string_at(text, f"history[{i}][{j}]") for j, text in enumerate(pair)))
    question = string_at(row["instruction"], "instruction")
    extra = string_at("" if row.get("input") is None else row["input"], "input", empty=True)
    asked = f"{question}\n\n{extra}" if extra.strip() else question
    return Conversation(messages + with_completion(asked, string_at(row["output"], "output")))


def read_prompts(row: dict[str, Any]) -> Prompt:
    """{"prompt": a string, or messages that end with a user or tool turn, "system"?}, and what rewards read."""
    prompt = _prompt(row["prompt"])
    if isinstance(prompt, str) and system_turn(row):
        prompt = [{"role": "user", "content": prompt}]
    return Prompt(prompt if isinstance(prompt, str) else with_system(row, prompt), row)


# --- published --------------------------------------------------------------------------------------------------------
# Preference data as published: rows of well-known sets, recognised by their columns, become our fields.
#
# Layouts are looked for within the format that the recipe names; a note says which one was found.

Fields = Mapping[str, Any]
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ANSWER = "\n\nAssistant:"


class Published(NamedTuple):
    """A row of a published set in our fields."""

    says: str  # the layout and its set, for a note
    columns: tuple[str, ...]  # of the row, those that are read
    fields: dict[str, Any]  # ours, in their place

    def replaced(self, row: Fields) -> dict[str, Any]:
        """Return a row with our fields in place of the columns."""
        return {name: value for name, value in row.items() if name not in self.columns} | self.fields


def as_published(row: Fields, format: str, chat: bool = True, names: Fields | None = None) -> Published | None:
    """Read a row by its layout; None where it has none, DataError where its columns hold something else.

    With `chat`, texts go through a chat template, and a transcript becomes its turns; `names` are data.fields.
    """
    layouts = LAYOUTS.get(format, ())
    return next((found for read in layouts if (found := read(row, chat, names or {})) is not None), None)


def in_our_fields(row: Fields, formats: Iterable[str], chat: bool = True) -> dict[str, Any]:
    """Return a row in our fields by the first format with a layout for it; unchanged where none has."""
    found = next((found for name in formats if (found := as_published(row, name, chat)) is not None), None)
    return dict(row) if found is None else found.replaced(row)


def _has(row: Fields, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _with_prompt(row: Fields, chat: bool, says: str, columns: tuple[str, ...], fields: Fields) -> Published | None:
    """Add the prompt, by its names in published sets, to a layout's fields; None where there is none.

    In the note `says`, {} stands for the names of the prompt's columns.
    """
    # Alpaca's `input` belongs to an instruction.
    names = tuple(name for name in ("question", "instruction", "input") if _has(row, name))
    if _has(row, "prompt"):
        names, prompt = ("prompt",), (_turns_asked(row["prompt"]) if chat else []) or row["prompt"]
    elif not names or _has(row, "conversations"):
        return None
    elif len(names) == 1:
        prompt = row[names[0]]
    else:
        texts = [row[name] for name in names if name != "input" or row[name] != ""]
        if "question" in names or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"the row has {' and '.join(names)}; say which is the prompt: data.fields: {{prompt: {names[0]}}}"
            )
        prompt = "\n\n".join(texts)
    return Published(says.replace("{}", " and ".join(names)), (*names, *columns), {"prompt": prompt, **fields})


def _transcript(text: Any) -> list[Message]:
    """Return the turns of "Human: ...\\n\\nAssistant: ...", those of one speaker joined; none of another text."""
    before, *parts = _TURN.split(text.lstrip()) if isinstance(text, str) else [""]
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        role, said = _SPEAKERS[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            said = f"{turns.pop()['content']}\n\n{said}".strip()
        turns.append({"role": role, "content": said})
    return turns if not before and turns and turns[0]["role"] == "user" else []


def _turns_asked(text: Any) -> list[Message]:
    """Return the turns of a transcript that ends where the assistant speaks; none of another text."""
    asks = isinstance(text, str) and text.rstrip().endswith(_ANSWER)
    return _transcript(text.rstrip().removesuffix(_ANSWER)) if asks else []


def _hh(row: Fields, chat: bool, names: Fields) -> Published | None:
    sides = {name: row.get(name) for name in ("chosen", "rejected")}
    if _has(row, "prompt") or _has(row, "conversations") or not all(_transcript(text) for text in sides.values()):
        return None
    says = "Anthropic's HH: chosen and rejected are whole transcripts"
    if chat:
        return Published(says, tuple(sides), {name: _transcript(text) for name, text in sides.items()})
    cuts = {name: str(text).rpartition(_ANSWER) for name, text in sides.items()}
    if len({prompt for prompt, _, _ in cuts.values()}) > 1:
        raise DataError("chosen and rejected differ before the last turn; expected two completions of one prompt")
    prompt = cuts["chosen"][0] + _ANSWER
    return Published(says, tuple(sides), {"prompt": prompt, **{name: cut[2] for name, cut in cuts.items()}})


def _asking(row: Fields, chat: bool, names: Fields) -> Published | None:
    # A prompt from a template of data.fields stays as it is.
    turns = _turns_asked(row.get("prompt")) if chat and not is_template(str(names.get("prompt", ""))) else []
    return Published("Anthropic's HH: the prompt is a transcript", ("prompt",), {"prompt": turns}) if turns else None


def _orca(row: Fields, chat: bool, names: Fields) -> Published | None:
    sides = [row.get("chosen"), row.get("rejected")]
    # Whole conversations include their prompt: another column may be something else.
    if _has(row, "prompt") or None in sides or all(isinstance(side, list) and len(side) > 1 for side in sides):
        return None
    return _with_prompt(row, chat, "Orca: prompt is {}", (), {})


def _responses(row: Fields, chat: bool, names: Fields) -> Published | None:
    columns = ("chosen_response", "rejected_response")
    if not _has(row, *columns) or _has(row, "chosen"):
        return None
    says = "UltraFeedback of Argilla: prompt is {}, chosen is chosen_response"
    return _with_prompt(row, chat, says, columns, {"chosen": row[columns[0]], "rejected": row[columns[1]]})


def _shp(row: Fields, chat: bool, names: Fields) -> Published | None:
    columns = ("history", "human_ref_A", "human_ref_B", "labels")
    if not _has(row, *columns):
        return None
    history, *pair, label = (row[name] for name in columns)
    chosen, rejected = pair if flag_at(label, "labels") else reversed(pair)
    says = "SHP: prompt is history, chosen is human_ref_A where labels is 1, else human_ref_B"
    return Published(says, columns, {"prompt": history, "chosen": chosen, "rejected": rejected})


_WHO = ("role", "from", "speaker", "author", "sender", "user")
_WHAT = ("content", "value", "text", "message", "body", "utterance")


def _other_turns(row: Fields, chat: bool, names: Fields) -> Published | None:
    """Read a conversation in one of the less usual forms: other keys, pairs of texts, or texts by turns."""
    if "messages" in names:
        return None
    for column in sorted(USUAL_NAMES["turns"] | {"data", "comments"}):
        given = row.get(column)
        usual = isinstance(given, list) and all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in given)
        if not usual and _kind(given) != "sharegpt" and (turns := _turns_of(given)):
            told = next((n for n in ("systemInstruction", "system_instruction") if isinstance(row.get(n), dict)), "")
            system = [{"role": "system", "content": _text_of_parts(row[told])}] if told else []
            return Published(f"turns are in {column}", (column, *filter(None, [told])), {"messages": system + turns})
    return None


def _text_of_parts(turn: Fields) -> str:
    """Return the text of a turn as Gemini has it."""
    return "".join(p["text"] for p in turn.get("parts") or [] if isinstance(p, dict) and isinstance(p.get("text"), str))


def _logged(row: Fields, chat: bool, names: Fields) -> Published | None:
    """Read a request to an API for chats, and its response, as a log has them."""
    request, response = row.get("request"), row.get("response")
    if "messages" in names or not isinstance(request, dict) or not isinstance(response, dict):
        return None
    asked, choices, parts = request.get("messages"), response.get("choices"), response.get("content")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):  # of OpenAI
        said = choices[0].get("message")
    else:  # of Anthropic
        texts = [p.get("text") or "" for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
        said = {"role": "assistant", "content": "\n\n".join(texts)} if any(texts) else None
    if not isinstance(asked, list) or not isinstance(said, dict):
        return None
    system = [{"role": "system", "content": request["system"]}] if isinstance(request.get("system"), str) else []
    tools = {"tools": request["tools"]} if request.get("tools") else {}
    says = "a log: messages of request, then the message of response"
    return Published(says, ("request", "response"), {"messages": [*system, *asked, said], **tools})


def _judged_turns(row: Fields, chat: bool, names: Fields) -> Published | None:
    """Read a conversation whose last turn is judged, as LLaMA-Factory's KTO has it."""
    column = next((name for name in ("messages", "conversations") if _kind(row.get(name)) in ("turns", "sharegpt")), "")
    if not column or _has(row, "completion") or not _is_flag(row.get("label")):
        return None
    turns = [turn if "role" in turn else sharegpt_turn(turn, column) for turn in row[column]]
    return Published(f"the last turn of {column} is judged", (column,), {"prompt": turns[:-1], "completion": turns[-1]})


def _turns_of(value: Any) -> list[Message]:
    """Return the turns of a conversation in such a form; none of something else."""
    if isinstance(value, dict) and len({len(part) if isinstance(part, list) else -1 for part in value.values()}) == 1:
        value = [dict(zip(value, turn)) for turn in zip(*value.values())]  # a list for each key
    if not isinstance(value, list) or not value:
        return []
    if all(isinstance(text, str) for text in value):  # by turns, as UltraChat
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]
    turns: list[Message] = []
    for turn in value:
        if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            turns += with_completion(*turn)
            continue
        if not isinstance(turn, dict):
            return []
        who = next((key for key in _WHO if isinstance(turn.get(key), str)), None)
        if isinstance(turn.get("parts"), list):  # as Gemini has them
            turn = {**turn, "content": _text_of_parts(turn)}
        what = next((key for key in _WHAT if isinstance(turn.get(key), str)), None)
        if who and what and (role := SPOKEN.get(turn[who].strip().casefold())):
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += f"\n\n{turn[what]}"
            else:
                turns.append({"role": role, "content": turn[what]})
            continue
        said = [(role, turn[key]) for key, role in _SIDES if isinstance(turn.get(key), str) and turn[key].strip()]
        if not said or (who and what):
            return []
        turns += [{"role": role, "content": text} for role, text in said]
    return turns


_SIDES = (
    ("system", "system"),
    *((name, "user") for name in ("human", "user", "input", "question", "prompt", "instruction")),
    *((name, "assistant") for name in ("assistant", "gpt", "bot", "output", "answer", "response", "completion")),
)


def _questions(row: Fields, chat: bool, names: Fields) -> Published | None:
    if _has(row, "prompt") or not any(_has(row, name) for name in ("question", "instruction", "input")):
        return None
    return _with_prompt(row, chat, "prompt is {}", (), {})


def _first_answer(row: Fields, chat: bool, names: Fields) -> Published | None:
    """Read a question with a list of right answers, as SQuAD and TriviaQA have them."""
    column = next((name for name in ("answers", "answer") if isinstance(row.get(name), list | dict)), "")
    if not column or not isinstance(row.get("question"), str) or {"completion", "prompt"} & {*row, *names}:
        return None
    given = row[column]
    given = given if isinstance(given, list) else given.get("text") or given.get("value")
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        return None
    asked = [row[name] for name in ("context", "question") if isinstance(row.get(name), str) and row[name].strip()]
    says = f"question and answers: prompt is {'context and question' if len(asked) > 1 else 'question'}, completion is "
    fields = {"prompt": "\n\n".join(asked), "completion": given[0] if given else None}
    return Published(f"{says}the first one in {column}", ("question", "context", column), fields)


def _rated(row: Fields, name: str, text: str, rating: str) -> tuple[list[Any], list[Any]] | None:
    """Return the texts and ratings of a list of objects; None where a column is not such a list."""
    given = row.get(name)
    if not isinstance(given, list) or not given or not all(isinstance(x, dict) and text in x for x in given):
        return None
    for i, x in enumerate(given):
        if x.get(rating) is None:
            has = ", ".join(key for key, value in x.items() if value is not None)
            raise DataError(f"{name}[{i}] has no {rating}; it has {has}")
    return [x[text] for x in given], [x[rating] for x in given]


def _ultrafeedback(row: Fields, chat: bool, names: Fields) -> Published | None:
    score = str(names.get("ratings", "overall_score"))
    if (rated := _rated(row, "completions", "response", score)) is None:
        return None
    says = f"UltraFeedback: prompt is {{}}, answers are completions' response, ratings {score}"
    return _with_prompt(row, chat, says, ("completions", score), {"answers": rated[0], "ratings": rated[1]})


def _nectar(row: Fields, chat: bool, names: Fields) -> Published | None:
    if (rated := _rated(row, "answers", "answer", "rank")) is None:
        return None
    fields = {"answers": rated[0], "ratings": [-float(rank) for rank in rated[1]]}
    says = "Nectar: answers are answers' answer, ratings their rank, 1 is the best"
    return _with_prompt(row, chat, says, ("answers",), fields)


def _distilabel(row: Fields, chat: bool, names: Fields) -> Published | None:
    rating = next((name for name in ("ratings", "rating") if isinstance(row.get(name), list)), None)
    if rating is None or not _has(row, "generations"):
        return None
    says = f"distilabel: prompt is {{}}, answers are generations, ratings is {rating}"
    fields = {"answers": row["generations"], "ratings": row[rating]}
    return _with_prompt(row, chat, says, ("generations", rating), fields)


LAYOUTS: dict[str, tuple[Callable[[Fields, bool, Fields], Published | None], ...]] = {
    "preference": (_shp, _responses, _hh, _orca, _asking),
    "ratings": (_ultrafeedback, _nectar, _distilabel, _asking),
    "unpaired": (_judged_turns, _asking),
    "prompts": (_asking, _questions),
    "prompt-completion": (_first_answer,),
    "messages": (_logged, _other_turns),
}
"""The layouts of each format, the most specific first."""


def together(rows: Iterable[Row | Problem], rating: str, prompt: str) -> Iterator[Row | Problem]:
    """Join neighbouring rows of one response each, as in HelpSteer, into one for each prompt, by names of columns."""

    def prompt_of(row: Row | Problem) -> Any:
        data = row.data if isinstance(row, Row) else {}
        joined = _has(data, prompt, "response", rating) and not isinstance(data[rating], list)
        return data[prompt] if joined else None

    for found, group in groupby(rows, prompt_of):
        if found is None:
            yield from group
            continue
        held = [row for row in group if isinstance(row, Row)]
        first = {name: value for name, value in held[0].data.items() if name != "response"}
        lists = {"answers": [row.data["response"] for row in held], rating: [row.data[rating] for row in held]}
        yield Row(held[0].where, first | lists)


# --- preference -------------------------------------------------------------------------------------------------------
# Pairs, several completions with ratings, and single completions with a label.

_DIFFERENCE = re.compile(r"\s*(-?[\d.]+(?:[eE][-+]?\d+)?) - (-?[\d.]+(?:[eE][-+]?\d+)?)\s*")
_LARGEST = 3.4e38  # a larger number is infinite in float32, in which losses are computed


def read_preference(row: dict[str, Any]) -> Pair | Ranked:
    """{"prompt", "chosen", "rejected", "system"?, "margin"?, "tie"?, "preferred"?, "tools"?}

    Prompt and completions are texts; or messages, and then a completion is a text, an assistant message, or a list:
    that message alone or the whole conversation. Without a prompt both are whole conversations that differ only in the
    last turn. ShareGPT's pairs have `conversations` as the prompt, and messages may have from and value. `rejected` may
    be a list of texts: one pair for each.
    """
    rejected = row["rejected"]
    if isinstance(rejected, list) and rejected and all(isinstance(text, str) for text in rejected):
        pairs = [_pair(row, text, f"rejected[{i}]", 1 / len(rejected)) for i, text in enumerate(rejected)]
        return Ranked(tuple(pairs))
    return _pair(row, rejected, "rejected", 1.0)


def _pair(row: dict[str, Any], rejected: Any, at: str, weight: float) -> Pair:
    sides = {"chosen": _side(row["chosen"], "chosen"), at: _side(rejected, at)}
    prompt: str | list[Message] | None = None
    if row.get("conversations") is not None:
        if row.get("prompt") is not None:
            raise DataError("the row has prompt and conversations; expected one of them")
        prompt = _messages(row["conversations"], "conversations", _ASKING, _message, in_text=True)
    elif row.get("prompt") is not None:
        prompt = _context(row)
    prompt, (better, worse) = _completed(row, prompt, sides)
    margin, tie = _margin_and_tie(row)
    if _same(better, worse) and not tie:
        raise DataError(f"chosen and {at} are the same; expected a difference (or tie: true)")
    return Pair(prompt, better, worse, margin, weight, tie, tools_of(row))


def _completed(
    row: dict[str, Any], prompt: str | list[Message] | None, sides: Mapping[str, str | list[Message]]
) -> tuple[str | list[Message], list[str | Message]]:
    """Return the prompt and its completions: all of them texts, or messages where one is or the row has a system text.

    The prompt is None where the completions (`sides`, by their names) are whole conversations.
    """
    if isinstance(prompt, str) and not all(isinstance(side, str) for side in sides.values()):
        prompt = _shared({at: _whole(prompt, side, at) for at, side in sides.items()})
    elif prompt is None:
        prompt = _shared(sides)
    completions = [_completion(side, prompt, at) for at, side in sides.items()]
    if isinstance(prompt, str):
        if not system_turn(row):
            return prompt, completions
        prompt = [{"role": "user", "content": prompt}]
        completions = [{"role": "assistant", "content": text} for text in completions]
    return with_system(row, prompt), completions


def _same(one: Any, other: Any) -> bool:
    return bool(unwritten(one) == unwritten(other))


def _parting(one: list[Message], other: list[Message]) -> int | None:
    """Return the first index at which two lists of messages differ, or None."""
    if _same(one, other):
        return None
    return next((i for i, pair in enumerate(zip(one, other)) if not _same(*pair)), min(len(one), len(other)))


def _side(value: Any, at: str) -> str | list[Message]:
    """Return a completion as given: a text, or messages."""
    if isinstance(value, str):
        return string_at(value, at)
    if isinstance(value, dict):
        return [_message(value, at)]
    if not isinstance(value, list):
        raise DataError(f"{at} is {type_name(value)}; expected text, a message or a list of messages")
    return [_message(turn, f"{at}[{i}]") for i, turn in enumerate(list_at(value, at, "messages"))]


def _message(value: Any, at: str) -> Message:
    """Return a message given by role and content, or by ShareGPT's from and value."""
    sharegpt = isinstance(value, dict) and value.get("role") is None and value.get("from") is not None
    message = (sharegpt_turn if sharegpt else message_at)(value, at)
    return {key: value for key, value in message.items() if key != "weight"}


def _context(row: dict[str, Any]) -> str | list[Message]:
    # Runs on the disk have hashed prompts without WRITTEN.
    prompt: str | list[Message] = unwritten(_prompt(row["prompt"], read=_message))
    return prompt


def _shared(sides: Mapping[str, str | list[Message]]) -> list[Message]:
    """Return the prompt of whole conversations: all but the last turn, in which alone they may differ."""
    wholes = {at: side for at, side in sides.items() if not isinstance(side, str)}
    if len(wholes) < len(sides):
        raise DataError("no field 'prompt', and the completions are texts; give the prompt, or whole conversations")
    (first, whole), *others = wholes.items()
    for name, other in others:
        if (at := _parting(whole[:-1], other[:-1])) is not None:
            raise DataError(
                f"{first}[{at}] and {name}[{at}] differ before the last turn; expected two completions of one prompt"
            )
    if len(whole) < 2:
        raise DataError("no field 'prompt', and chosen has one message only; give the prompt, or whole conversations")
    return whole[:-1]


def _whole(prompt: str, side: str | list[Message], at: str) -> list[Message]:
    """Return the conversation of a text prompt and a completion of messages, one of whose user turns is that text."""
    if isinstance(side, str):
        raise DataError(f"{at} is a string, and the other completion is messages; expected both alike")
    whole = [{"role": "user", "content": prompt}, *side] if len(side) == 1 else side
    asked = [message["content"] for message in whole if message["role"] == "user"]
    if prompt.strip() not in map(str.strip, asked):
        raise DataError(f"{at} is for another prompt: none of its user turns is the text of prompt")
    return whole


def _completion(side: str | list[Message], prompt: str | list[Message], at: str) -> str | Message:
    """Return the completion alone: the last turn."""
    if isinstance(prompt, str):
        assert isinstance(side, str), "a text prompt has texts as completions here"
        return side
    if isinstance(side, str):
        return {"role": "assistant", "content": side}
    if len(side) > 1 and (place := _parting(side[:-1], prompt)) is not None:
        raise DataError(f"{at}[{place}] is not as in the prompt; expected the prompt's messages and one more")
    reply = side[-1]
    check_order([*prompt, reply], ["prompt"] * len(prompt) + [f"{at}[{len(side) - 1}]" if len(side) > 1 else at])
    if not reply["content"].strip() and "tool_calls" not in reply:
        raise DataError(f"{at} is empty; expected text")
    return reply


def _number(value: Any, at: str) -> float:
    """Return a finite number; csv has it as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise DataError(f"{at} is {value!r}; expected a finite number")
    return number


def _margin_and_tie(row: dict[str, Any]) -> tuple[float | None, bool]:
    preferred, said, given = row.get("preferred") or "chosen", row.get("tie"), row.get("margin")
    if preferred not in ("chosen", "tie"):
        raise DataError(f"preferred is {preferred!r}; expected 'tie' or 'chosen' (the columns are named by it)")
    tie = preferred == "tie" if said in (None, "") else flag_at(said, "tie")
    if preferred == "tie" and not tie:
        raise DataError("preferred is 'tie' and tie is false; expected the two to agree")
    margin = None
    if isinstance(given, str) and (of := _DIFFERENCE.fullmatch(given)):  # as data.fields wrote two columns
        margin = _number(of[1], "margin") - _number(of[2], "margin")
    elif given not in (None, ""):
        margin = _number(given, "margin")
    if tie and margin:
        raise DataError(f"margin is {margin:g} and the row is a tie; expected one of them")
    return margin, tie


def read_ratings(row: dict[str, Any]) -> Ranked:
    """{"prompt", "answers" or "completions", "ratings" or "scores": numbers, or "ranking": best first, ...}

    It may have `system` and `tools`; prompt and completions are as in a preference. Every two completions with
    different ratings are a pair, the higher one chosen; the pairs' weights add up to 1, so that a prompt with many
    completions counts as much as one with few. `ranking` holds indices of completions, from 0.
    """
    name, given = _one_of(row, ("answers", "completions"))
    sides = {f"{name}[{i}]": _side(side, f"{name}[{i}]") for i, side in enumerate(list_at(given, name, "answers"))}
    count = len(sides)
    if count < 2:
        raise DataError(f"{name} has one entry; expected two or more to compare")
    rated_by, given = _one_of(row, ("ratings", "scores", "ranking"))
    ratings = [_number(value, f"{rated_by}[{i}]") for i, value in enumerate(list_at(given, rated_by, "numbers"))]
    if len(ratings) != count:
        raise DataError(f"{rated_by} has {len(ratings)} numbers for {count} {name}; expected one for each")
    if rated_by == "ranking":
        if sorted(ratings) != list(range(count)):
            raise DataError(f"ranking is {given}; expected each index from 0 to {count - 1} once, the best first")
        ratings = [-float(ratings.index(i)) for i in range(count)]
    prompt, turns = _completed(row, _context(row), sides)
    tools = tools_of(row)
    order = sorted(range(len(turns)), key=lambda i: -ratings[i])
    better = [(a, b) for n, a in enumerate(order) for b in order[n + 1 :] if ratings[a] > ratings[b]]
    for a, b in better:
        if _same(turns[a], turns[b]):
            first, second = sorted((a, b))
            raise DataError(f"{name}[{first}] and {name}[{second}] are the same text, with different ratings")
    weight = 1 / max(1, len(better))
    return Ranked(tuple(Pair(prompt, turns[a], turns[b], None, weight, False, tools) for a, b in better))


def _one_of(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    given = [name for name in names if row.get(name) is not None]
    if len(given) != 1:
        raise DataError(f"the row has {' and '.join(given)}; expected one of them")
    return given[0], row[given[0]]


def read_unpaired(row: dict[str, Any]) -> Labelled:
    """{"prompt", "completion", "label": true or false, "system"?, "tools"?}: the first two as in a preference."""
    sides = {"completion": _side(row["completion"], "completion")}
    prompt, (completion,) = _completed(row, _context(row), sides)
    return Labelled(prompt, completion, flag_at(row["label"], "label"), tools_of(row))


# --- convert ----------------------------------------------------------------------------------------------------------
_NAMED = 12  # columns that a note names


class Format(NamedTuple):
    """How to read a row, its required fields ("a|b": one of the two), and its optional fields."""

    read: Callable[[dict[str, Any]], Item]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> list[str]:
        """Return the names of all fields."""
        return "|".join(self.required + self.optional).split("|")

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """Return the required fields that a row does not have, or has as null."""
        return [name for name in self.required if all(row.get(part) is None for part in name.split("|"))]


FORMATS: dict[str, Format] = {
    "messages": Format(read_messages, ("messages",), ("tools", "system")),
    "prompt-completion": Format(read_prompt_completion, ("prompt", "completion"), ("tools", "system")),
    "text": Format(read_text, ("text",)),
    "sharegpt": Format(read_sharegpt, ("conversations",), ("tools", "system")),
    "alpaca": Format(read_alpaca, ("instruction", "output"), ("input", "system", "history")),
    "prompts": Format(read_prompts, ("prompt",), ("tools", "system")),
    "preference": Format(
        read_preference,
        ("chosen", "rejected"),
        ("prompt", "conversations", "tools", "system", "margin", "tie", "preferred"),
    ),
    "ratings": Format(read_ratings, ("prompt", "answers|completions", "ratings|scores|ranking"), ("tools", "system")),
    "unpaired": Format(read_unpaired, ("prompt", "completion", "label"), ("tools", "system")),
}


def suggest_format(row: dict[str, Any]) -> str | None:
    """Return the format that a row looks like, or None; for messages only."""

    def fits(name: str) -> bool:
        try:
            return not (FORMATS[name].missing(row) and FORMATS[name].missing(in_our_fields(row, (name,))))
        except DataError:  # the columns of a layout hold something else
            return False

    # The most specific one: the fields of a format may be among those of another.
    return max(filter(fits, FORMATS), key=lambda name: len(FORMATS[name].required), default=None)


@dataclass
class Columns:
    """The columns of a source's rows."""

    seen: dict[str, None] = field(default_factory=dict)  # those with a value in some row, in their order
    read: set[str] = field(default_factory=set)
    layouts: dict[str, None] = field(default_factory=dict)  # of published sets, by which rows were read

    def notes(self, also: Iterable[str] | None = ()) -> list[str]:
        """Return notes on the layouts of rows, and on columns that are neither read nor in `also` (None: all are)."""
        unused = [name for name in self.seen if also is not None and name not in self.read.union(also)]
        more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
        names = [f"columns not used: {', '.join(unused[:_NAMED])}{more}"] if unused else []
        return [*(f"rows are read as published: {layout}" for layout in self.layouts), *names]


class _NoField(DataError):
    """A row lacks a field of its format."""


class _Reader:
    """Turns rows into items of a format."""

    def __init__(self, format: str, fields: Mapping[str, str], chat: bool, columns: Columns) -> None:
        if format not in FORMATS:
            hint = nearest(format, FORMATS)
            raise ConfigError(f"data.format is {format!r}; expected one of {', '.join(FORMATS)}{hint}")
        self.form, self.format, self.fields = FORMATS[format], format, fields
        self.chat, self.columns = chat, columns
        known = self.form.fields
        if unknown := [name for name in fields if name not in known]:
            lines = [f"data.fields.{n}: format {format} has no field {n!r}{nearest(n, known)}" for n in unknown]
            raise ConfigError("\n".join([*lines, f"the fields of {format} are {', '.join(known)}"]))
        self.templates = {ours: text for ours, text in fields.items() if is_template(text)}
        self.renamed = {ours: theirs for ours, theirs in fields.items() if ours not in self.templates}
        self.named = {ours: names_in(text, f"data.fields.{ours}") for ours, text in self.templates.items()}
        # A system text that a template has put into a field must not be used again.
        self.in_template = "system" not in fields and any("system" in names for names in self.named.values())
        self.names: set[str] = set()  # every column of any row
        used = set(self.renamed.values()).union(*self.named.values())
        columns.read |= {*known}.difference(fields) | used | {name.partition(".")[0] for name in used}

    def asked(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Published | None]:
        """Return a row with the format's names, the same with what is read of it, and the layout that it has."""
        data = {key: value for key, value in row.items() if key not in self.renamed or self.renamed[key] == key}
        found = {ours: cell_of(row, theirs) for ours, theirs in self.renamed.items()}
        data |= {ours: value for ours, value in found.items() if value is not None or self.renamed[ours] in row}
        data |= {ours: fill(text, row, f"data.fields.{ours}") for ours, text in self.templates.items()}
        asked = {name: value for name, value in data.items() if name != "system"} if self.in_template else data
        published = as_published(asked, self.format, self.chat, self.fields)
        return data, asked if published is None else published.replaced(asked), published

    def item(self, row: dict[str, Any]) -> Item:
        """Return a row's item; raise DataError if it does not fit the format."""
        self.names.update(names_of(row))
        self.columns.seen |= {name: None for name, value in row.items() if value not in (None, "", [], {})}
        data, asked, published = self.asked(row)
        if published is not None:
            self.names.update(published.columns)
            self.columns.read.update(published.columns)
            self.columns.layouts[published.says] = None
        if missing := self.form.missing(asked):
            named = [" or ".join(repr(self.renamed.get(part, part)) for part in name.split("|")) for name in missing]
            has = ", ".join(map(str, row)) or "none"
            single = self.format == "ratings" and isinstance(row.get("response"), str)
            way = "; where a row has one response, name its rating: data.fields: {ratings: ...}" if single else ""
            raise _NoField(f"no field {' and no '.join(named)}; the row has {has}{way}")
        if not self.chat and isinstance(asked.get("prompt"), str) and not is_text(asked):
            what = "system has" if system_turn(asked) else "tools have"
            raise DataError(
                f"{what} no place in plain text (no chat template, or data.template: none); leave the column out, or "
                "put it into the prompt, as in data.fields: {prompt: '{system} {prompt}'}"
            )
        item = self.form.read(asked)
        self.columns.read |= {"functions"} if "tools" in self.form.optional and functions_of(asked) else set()
        return replace(item, row=data) if isinstance(item, Prompt) else item


class Conversion:
    """Converts the rows of a source to items of one format; keeps what is wrong with those that do not fit.

    Args:
        format, fields, chat, columns: as for `convert`.
        kept: most problems to keep; all are counted.
    Raises:
        ConfigError: `fields` names a field that the format does not have.
    """

    def __init__(
        self,
        format: str,
        fields: Mapping[str, str] | None = None,
        *,
        chat: bool = True,
        columns: Columns | None = None,
        kept: int | None = None,
    ) -> None:
        self._reader = _Reader(format, dict(fields or {}), chat, Columns() if columns is None else columns)
        self._kept = kept
        self._looks: Counter[str | None] = Counter()
        self.fitted = self.wrong = 0  # rows
        self.problems: list[Problem] = []

    def examples(self, rows: Iterable[Row | Problem]) -> Iterator[Example]:
        """Yield the rows that fit."""
        reader = self._reader
        rating = next((reader.renamed[name] for name in ("ratings", "scores") if name in reader.renamed), None)
        if reader.format == "ratings" and rating is not None:
            rows = together(rows, rating, reader.renamed.get("prompt", "prompt"))
        for row in rows:
            try:
                if isinstance(row, Problem):
                    raise DataError(row.text)
                example = Example(row.where, reader.item(row.data))
            except DataError as exc:
                self.wrong += 1
                if self._kept is None or len(self.problems) < self._kept:
                    self.problems.append(Problem(row.where, str(exc)))
                if isinstance(exc, _NoField) and isinstance(row, Row):
                    self._looks[suggest_format(row.data)] += 1
                continue
            self.fitted += 1
            yield example

    def check(self, drop: bool) -> None:
        """Raise what is wrong with the rows, once all are read; with `drop`, only if none fits."""
        reader = self._reader
        named = [(ours, name) for ours, given in reader.named.items() for name in given]
        for ours, theirs in [*reader.renamed.items(), *named]:
            if reader.names and theirs not in reader.names:
                seen = f"no row has{nearest(theirs, reader.names)}; rows have {', '.join(sorted(reader.names))}"
                verb = "names" if ours in reader.templates else "is"
                raise ConfigError(f"data.fields.{ours} {verb} {theirs!r}, which {seen}")
        if self.wrong and not (drop and self.fitted):
            text = report_lines([f"{problem.where}: {problem.text}" for problem in self.problems], self.wrong)
            looks = {name: count for name, count in self._looks.items() if name and name != reader.format}
            likely = max(looks, key=looks.__getitem__, default=None)
            if likely and 2 * looks[likely] >= self.fitted + self.wrong:
                objective, recipe = TAKEN_BY[likely]
                text += (
                    f"\nthese rows look like data.format: {likely}, for objective: {objective} (configs/{recipe}.yaml)"
                )
            raise DataError(text)


def convert(
    rows: Iterable[Row | Problem],
    format: str,
    fields: Mapping[str, str] | None = None,
    skipped: list[Problem] | None = None,
    *,
    chat: bool = True,
    columns: Columns | None = None,
) -> list[Example]:
    """Convert all rows of a source to items of one format.

    Args:
        fields: the format's field -> the row's name for it, where the two differ, or a template of the row's fields.
        skipped: rows that do not fit are appended and left out; without it, or if no row fits, they raise.
        chat: whether texts can become turns of a chat template; without, a row's system text has no place.
        columns: filled with the columns that are read.
    Raises:
        ConfigError: `fields` names a field that the format, or every row, does not have.
        DataError: rows cannot be read or do not fit; all of them in one.
    """
    conversion = Conversion(format, fields, chat=chat, columns=columns)
    examples = list(conversion.examples(rows))
    conversion.check(skipped is not None)
    if skipped is not None:
        skipped.extend(conversion.problems)
    return examples


# --- recognise --------------------------------------------------------------------------------------------------------
# Which format rows have, and which of their columns are its fields, by the names that columns usually have and by what
# stands in them. Where two readings are possible none is chosen: the error shows each as the settings to write.

RECOGNISED_BY = 1000  # rows; the others are held to what these show, row by row
_OPTIONS = 4  # readings that an error shows

TAKEN_BY = {
    **dict.fromkeys(("messages", "prompt-completion", "text", "sharegpt", "alpaca"), ("sft", "sft-lora")),
    **dict.fromkeys(("preference", "ratings"), ("preference", "dpo-lora")),
    "unpaired": ("preference, with preference.loss: kto", "kto"),
    "prompts": ("grpo", "grpo"),
}
"""An objective that takes each format, and its recipe in configs/, for messages."""

_TEXTUAL = ("text", "number")


class Recognised(NamedTuple):
    """The format of rows, the names of its fields in them (as data.fields has them), and a note on both."""

    format: str
    fields: dict[str, str]
    notes: list[str]


def as_settings(format: str, fields: Mapping[str, str]) -> str:
    """Return the overrides that read rows so, quoted for a shell; what follows = is YAML."""
    written = _in_yaml(fields)
    return f"data.format={format}" + (f" {shlex.quote(f'data.fields={written}')}" if written else "")


def _in_yaml(fields: Mapping[str, str]) -> str:
    """Return data.fields as YAML; "" where all fields are called as the format calls them."""
    plain = re.compile(r"(?!(?:true|false|null|yes|no|on|off)$)[^\W\d_][\w -]*(?<! )", re.IGNORECASE)
    other = {ours: theirs for ours, theirs in fields.items() if ours != theirs}
    written = {o: t if plain.fullmatch(t) else json.dumps(t, ensure_ascii=False) for o, t in other.items()}
    return f"{{{', '.join(f'{ours}: {theirs}' for ours, theirs in written.items())}}}" if written else ""


def _kind(value: Any) -> str:
    """Return what stands in a field: text, number, turns, sharegpt, texts, objects, object or other."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return "text"
        try:
            return _kind(read_json(value))
        except (ValueError, RecursionError):
            return "text"
    if isinstance(value, bool | int | float):
        return "number"
    if not isinstance(value, list) or not value:
        return "object" if isinstance(value, dict) else "other"
    if all(isinstance(part, dict) for part in value):
        keys = [{key for key, part in turn.items() if part is not None} for turn in value]
        if all("role" in has and has & {"content", "tool_calls", "function_call"} for has in keys):
            return "turns"
        return "sharegpt" if all({"from", "value"} <= has for has in keys) else "objects"
    return "texts" if all(isinstance(part, str) for part in value) else "other"


class _Column(NamedTuple):
    name: str
    plain: str
    kind: str  # of most of its values
    values: list[Any]  # that are not empty


_Reading: TypeAlias = tuple[str, dict[str, str]]  # a format, and its data.fields


class _Table:
    """The columns of rows, and the ways in which they can be read.

    Args:
        given: data.fields, which are kept.
        formats: to read them by.
        chat: whether texts can become turns of a chat template.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], given: Mapping[str, str], formats: Sequence[str], chat: bool
    ) -> None:
        self.rows, self.given, self.chat, self.single = rows, dict(given), chat, len(formats) == 1
        self.formats = [name for name in formats if given.keys() <= set(FORMATS[name].fields)]
        values: dict[str, list[Any]] = {}
        for row in rows:
            for name in names_of(row):
                if (value := cell_of(row, name)) is not None and value not in ("", [], {}):
                    values.setdefault(name, []).append(value)
        kinds = {name: Counter(map(_kind, found[:50])).most_common(1)[0][0] for name, found in values.items()}
        self.columns = [_Column(name, plain_name(name), kinds[name], found) for name, found in values.items()]
        self.common = [column for column in self.columns if 2 * len(column.values) >= len(rows)]

    def names(self, field: str, kinds: Sequence[str] = ("text",), ours: str = "", sparse: bool = False) -> list[str]:
        """Return what a field can be called in the rows: what is given, or columns with a usual name.

        Args:
            ours: the format's name of the field, if it differs.
            sparse: whether a column may be empty in most rows.
        """
        if (theirs := self.given.get(ours or field)) is not None:
            return [theirs]
        found = [column for column in (self.columns if sparse else self.common) if column.kind in kinds]
        if whole := [column for column in found if column.plain in USUAL_NAMES[field]]:
            return [column.name for column in whole]
        words = USUAL_NAMES.get(f"{field} word", set())
        names = [c.name for c in found if (has := set(c.plain.split("_"))) & words and not has & USUAL_NAMES["about"]]
        return [name for name in names if name.rpartition(".")[0] not in names]

    def _system(self) -> dict[str, str]:
        """Return the field of a system text, which plain text has no place for."""
        names = self.names("system", sparse=True) if self.chat else []
        return {"system": names[0]} if names else {}

    def column(self, name: str) -> _Column | None:
        return next((column for column in self.columns if column.name == name), None)

    def text_of(self, name: str) -> str:
        """Return what data.fields maps a text to: a column, or a template where some of its values are numbers."""
        column = self.column(name)
        numbers = column is not None and any(isinstance(value, int | float) for value in column.values)
        return f"{{{name}}}" if numbers and not is_template(name) else name

    def fits(self, format: str) -> bool:
        """Return whether most rows have a format's fields as they are, or in the layout of a published set."""
        if format not in self.formats:
            return False
        reader, fit = _Reader(format, self.given, self.chat, Columns()), 0
        for row in self.rows:
            try:
                fit += not reader.form.missing(reader.asked(row)[1])
            except DataError:  # it has the columns, and they hold something else: reading it says what
                fit += 1
        return 2 * fit >= len(self.rows)

    def readings(self) -> list[_Reading]:
        """Return the possible readings by the most specific kind of format; several where none is the right one."""
        for name in ("preference", "ratings", "unpaired"):
            if found := self._of(name):
                return found
        turns, pairs, texts = self._turns(), self._pairs(), self._texts()
        if pairs and not self.single and "unpaired" not in self.formats and any(map(self._rates, self._labels())):
            return []  # some of the completions are bad
        if pairs:  # which may be made of a column with what is asked, and one with what is said
            turns = [t for t in turns if (c := self.column(_turns_in(t))) is None or _is_whole(c.values[0])]
        if turns:
            inside = "".join(
                str(c.values[0]) for c in self.common if c.kind in ("turns", "sharegpt", "objects", "texts")
            )
            asked = [c for reading in pairs for name in reading[1].values() if (c := self.column(name.strip("{}")))]
            return turns + [p for p in pairs if not all(_within(c.values[0], inside) for c in asked)]
        if pairs:
            used = {name for _, fields in pairs for name in fields.values()}
            apart = [text for text in texts if not self._holds(text, used)]
            pair = pairs[0][1]
            beside = [
                ("alpaca", {"instruction": pair["prompt"], "output": pair["completion"], "input": text[1]["text"]})
                for text in apart
                if "prompt" in pair and "alpaca" in self.formats
            ]
            return pairs + beside + apart
        return self._of("prompts") or texts

    def _of(self, format: str) -> list[_Reading]:
        if format not in self.formats:
            return []
        if self.fits(format):
            return [(format, self.given)]
        kinds = ("text", "turns", "sharegpt", "object")
        if format == "preference":
            better, worse = self.names("chosen", kinds), self.names("rejected", kinds)
            asks: list[str] = self.names("prompt", ("text", "turns", "sharegpt"))
            if not asks and all(getattr(self.column(name), "kind", "") == "text" for name in better):
                return []  # texts need a prompt
            return [
                (format, {**({"prompt": ask} if ask else {}), "chosen": a, "rejected": b})
                for ask, a, b in product(asks or [""], better, worse)
            ]
        if format == "unpaired":
            parts = self.names("prompt"), self.names("completion"), self._labels()
            fields = [dict(zip(("prompt", "completion", "label"), names)) for names in product(*parts)]
            return [(format, each) for each in fields if len(set(each.values())) == 3]
        if format == "prompts":
            ends = [c.name for c in self.common if c.kind == "turns" and _last_role(c.values[0]) in _ASKING]
            return [(format, {"prompt": name}) for name in ends or self.names("prompt")]
        return []

    def verdicts(self) -> dict[str, list[str]]:
        """Return Prodigy's column of decisions on rows, and which there are."""
        seen = {c.name: sorted(set(map(str, c.values))) for c in self.common if c.kind == "text"}
        return {"answer": seen["answer"]} if "answer" in seen and self.column("_input_hash") else {}

    def speakers(self) -> dict[str, list[str]]:
        """Return the columns that say who speaks, and who does."""
        said = {c.name: sorted(set(c.values)) for c in self.common if c.plain in SPEAKERS and c.kind == "text"}
        return {name: who for name, who in said.items() if 2 <= len(who) <= max(2, len(self.rows) / 2)}

    def choices(self, name: str) -> list[str]:
        """Return the columns of lists of texts, where a column has the numbers or letters of their entries."""
        values = {str(value) for c in self.columns if c.name == name.strip("{}") for value in c.values}
        if not values or not all(re.fullmatch(r"\d|[A-Ha-h]", value) for value in values):
            return []
        return [c.name for c in self.common if c.plain in ("choices", "options") and c.kind == "texts"]

    def _labels(self) -> list[str]:
        """Return the columns that say of completions whether they are good."""
        found = [(name, self.column(name)) for name in self.names("label", _TEXTUAL)]
        return [name for name, c in found if c is None or 2 * sum(map(_is_flag, c.values)) > len(c.values)]

    def _rates(self, name: str) -> bool:
        """Return whether labels are not numbers, which may be those of classes."""
        column = self.column(name)
        return column is not None and any(not re.fullmatch(r"[-+]?\d+", str(value)) for value in column.values)

    def _turns(self) -> list[_Reading]:
        if self.fits("messages") and not self._kinds("messages", "sharegpt"):
            return [("messages", self.given)]
        forms = {"turns": ("messages", "messages"), "sharegpt": ("sharegpt", "conversations")}
        found = [c for c in self.common if c.kind in forms and forms[c.kind][0] in self.formats]
        named = [c for c in found if c.name == self.given.get(forms[c.kind][1])]
        usual = [c for c in found if c.plain in USUAL_NAMES["turns"]]
        system = self._system()
        return [(forms[c.kind][0], {**self.given, forms[c.kind][1]: c.name, **system}) for c in named or usual or found]

    def _kinds(self, name: str, kind: str) -> bool:
        column = self.column(self.given.get(name, name))
        return column is not None and column.kind == kind

    def _pairs(self) -> list[_Reading]:
        """Return readings as a prompt, perhaps with a context, and a completion."""
        if not {"prompt-completion", "alpaca"} & set(self.formats):
            return []
        layout = next((row for row in self.rows if as_published(row, "prompt-completion", self.chat)), None)
        if layout is not None and self.fits("prompt-completion"):
            return [("prompt-completion", self.given)]
        only = "alpaca" if "prompt-completion" not in self.formats else ""
        ours = ("instruction", "output") if only or {"instruction", "output"} & self.given.keys() else ("", "")
        asks = self.names("prompt", ("text", "turns"), ours[0])
        says = self.names("completion", (*_TEXTUAL, "turns", "object"), ours[1])
        inputs = self.names("input", ("text", "turns"), "input", sparse=True)
        asks, says = (
            [name for name in asks if name not in inputs] or asks,
            [n for n in says if n not in self.verdicts()],
        )
        common = [column.name for column in self.common]
        asks = asks or [name for name in inputs if name in common] or self.names("text") or self.names("turns")
        exact = [p for p in (("prompt", "completion"), ("instruction", "output")) if {*p} <= {*common}]
        system = self._system()
        found: list[_Reading] = []
        for ask, say in exact if exact and not self.given else product(asks, says):
            if ask == say:
                continue
            beside = [name for name in inputs if name not in (ask, say)] if ask != "prompt" else []
            for extra in beside or [""]:
                to_alpaca = only or ("alpaca" in self.formats and (extra or plain_name(ask) == "instruction"))
                if to_alpaca:
                    fields = {"instruction": ask, "output": self.text_of(say), **({"input": extra} if extra else {})}
                else:
                    prompt = f"{{{ask}}}\n\n{{{extra}}}" if extra else ask
                    fields = {"prompt": prompt, "completion": self.text_of(say)}
                found.append(("alpaca" if to_alpaca else "prompt-completion", {**fields, **system}))
        return found

    def _texts(self) -> list[_Reading]:
        if "text" not in self.formats:
            return []
        names = self.names("text")
        if not names and len(self.common) == 1 and self.common[0].kind == "text":
            names = [c.name for c in self.common if c.plain not in USUAL_NAMES["prompt"]]  # prompts alone are no texts
        found: list[_Reading] = [("text", {"text": name}) for name in names]
        labels = [c.name for c in self.common if c.plain in USUAL_NAMES["class"] and c.kind in _TEXTUAL]
        if len(names) == 1 and labels and "prompt-completion" in self.formats:
            label = {"prompt": names[0], "completion": self.text_of(labels[0])}
            return [("prompt-completion", label), *found]
        return found

    def _holds(self, text: _Reading, used: Iterable[str]) -> bool:
        """Return whether the column of a text repeats, or is among, the columns of a pair."""
        whole = self.column(text[1]["text"]) if text[0] == "text" else None
        if whole is None or whole.name in used:
            return True
        parts = [c for c in self.common if c.name in {name.strip("{}") for name in used} and c.kind == "text"]
        return bool(parts) and all(_within(c.values[0], str(whole.values[0])) for c in parts)

    def likely(self) -> list[_Reading]:
        """Return a reading by the order of columns, for an error: the user knows which is which."""
        texts = [c for c in self.common if c.kind in _TEXTUAL and not set(c.plain.split("_")) & USUAL_NAMES["about"]]
        many = [c for c in texts if len({str(v) for v in c.values}) > len(c.values) / 2 and c.kind == "text"]
        order = ("prompt-completion", "alpaca", "preference", "unpaired", "prompts", "text")
        for format in (name for name in order if name in self.formats):
            needed = ["prompt", *FORMATS[format].required] if format == "preference" else FORMATS[format].required
            if format == "text" and [c.plain in USUAL_NAMES["prompt"] for c in texts] == [True]:
                continue
            free = many if len(many) >= len(needed) else texts
            if len(free) < len(needed):
                continue
            fields: dict[str, str] = {}
            for ours in needed:
                role = {"instruction": "prompt", "output": "completion"}.get(ours, ours)
                names = self.names(role, _TEXTUAL, ours) or (self.names("chosen") if role == "completion" else [])
                names = [name for name in names if name not in fields.values()]
                if len(names) == 1:
                    fields[ours] = names[0]
            left = iter([c.name for c in free if c.name not in fields.values()])
            for ours in needed:
                fields.setdefault(ours, next(left, ""))
            if all(fields.values()):
                named = {f: self.text_of(fields[f]) if f in ("completion", "output") else fields[f] for f in needed}
                return [(format, named)]
        return []

    def shown(self) -> str:
        """Return the columns, each with a short value of it."""
        lines = [f"  {c.name}: {_short(c.values[0])}" for c in self.columns[:_NAMED]]
        return "\n".join([*lines, *([f"  ... and {len(self.columns) - _NAMED} more"] if self.columns[_NAMED:] else [])])


def _turns_in(reading: _Reading) -> str:
    format, fields = reading
    name = "messages" if format == "messages" else "conversations"
    return fields.get(name, name)


def _last_role(turns: Any) -> Any:
    turns = read_json(turns) if isinstance(turns, str) else turns
    return turns[-1].get("role") if isinstance(turns, list) else None


def _is_whole(turns: Any) -> bool:
    """Return whether turns begin with a prompt and end with a completion, as far as their roles are known."""
    turns = read_json(turns) if isinstance(turns, str) else turns
    return _last_role(turns) not in _ASKING and (not isinstance(turns, list) or turns[0].get("role") != "assistant")


def _within(part: Any, whole: str) -> bool:
    """Return whether a text occurs in another, or in how another value is written."""
    return isinstance(part, str) and (part.strip() in whole or repr(part.strip())[1:-1] in whole)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def recognise(
    rows: Iterable[Row | Problem],
    fields: Mapping[str, str] | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    *,
    name: str = "",
    chat: bool = True,
    taker: str = "",
) -> Recognised:
    """Find the format of rows, and which of their columns are its fields.

    Args:
        rows: the first `RECOGNISED_BY` of them are read.
        fields: data.fields, as far as they are given.
        formats: among which to choose: those that the objective takes, or a single one.
        name: of the source, for messages.
        chat: whether texts can become turns of a chat template.
        taker: what takes these formats, such as "objective sft", for messages.
    Raises:
        ConfigError: `fields` names a field that none of the formats has.
        DataError: no format fits, or several: the error shows the columns and the settings to write.
    """
    first = list(islice(rows, RECOGNISED_BY))
    seen = [row.data for row in first if isinstance(row, Row)]
    if not seen:
        raise DataError(report_lines([f"{row.where}: {row.text}" for row in first if isinstance(row, Problem)]))
    given = dict(fields or {})
    if len(formats) == 1:
        _Reader(formats[0], given, chat, Columns())  # raises for fields that it does not have
    table = _Table(seen, given, formats, chat)
    if not table.formats:
        known = "\n".join(f"  {format}: {', '.join(FORMATS[format].fields)}" for format in formats)
        raise ConfigError(f"data.fields: no format has all of {', '.join(given)}; the fields are\n{known}")
    readings = list({as_settings(*reading): reading for reading in table.readings()}.values())
    if len(formats) > 1 and (doubt := _doubt(table, readings, name or _file_of(first))):
        raise DataError(doubt)
    if len(readings) == 1:
        format, named = readings[0][0], given | {o: t for o, t in readings[0][1].items() if o != t}
        found = {name: named[name] for name in FORMATS[format].fields if name in named}
        said = f", data.fields: {written}" if (written := _in_yaml(found)) else ""
        return Recognised(format, found, [f"rows are read as data.format: {format}{said}"])
    name = name or _file_of(first)
    wanted = formats[0] if len(formats) == 1 else ""
    if readings:
        options = "\n".join(f"  {as_settings(*reading)}" for reading in readings[:_OPTIONS])
        raise DataError(f"{name}: the columns can be read in several ways; choose one:\n{options}\n{_seen(table)}")
    what = f"the columns have no usual names{f' for data.format: {wanted}' if wanted else ''}"
    ways = [f"say which is which, as in\n  {as_settings(*reading)}" for reading in table.likely()]
    others = _Table(seen, given, tuple(FORMATS), chat).readings()
    for format, more in [reading for reading in others if wanted or reading[0] not in formats][:1]:
        objective, recipe = TAKEN_BY[format]
        what = f"the rows look like data.format: {format}, which {taker or 'this'} does not take"
        if wanted and TAKEN_BY[format] == TAKEN_BY[wanted]:
            what = f"the rows do not fit data.format: {wanted}"
            ways = [f"they look like\n  {as_settings(format, more)}"]
        else:
            way = f"objective: {objective} takes it: mlxft train configs/{recipe}.yaml data.train={name}"
            ways = [way, *(f"or {way}" for way in ways)]
    names = [column.name for column in table.columns]
    if any(name.endswith((".", "?", "!")) for name in names) or len(" ".join(names).split()) >= 3 * len(names):
        line = ["question", "answer", *(f"column{i}" for i in range(3, len(names) + 1))]
        above = f"write a line with the columns' names above it: {','.join(line)}"
        ways.insert(0, f"if these names are a row, {above} (with the file's own delimiter)")
    ways = ways or [_needed(formats)]
    raise DataError("\n".join([f"{name}: {what}", *ways, _seen(table)]))


def _file_of(rows: Sequence[Row | Problem]) -> str:
    return re.sub(r"(:\d+|\[\d+\])\Z", "", rows[0].where)


def _doubt(table: _Table, readings: Sequence[_Reading], name: str) -> str:
    """Return why rows are hardly meant as they can be read, and the settings that read them; "" if nothing is odd.

    Some are rejected, each is a turn of a conversation, or the completion is the number of a choice that is not shown.
    """
    why, way = "", "or train each row alone"
    if not readings or "unpaired" in table.formats:
        return ""
    for column, seen in table.verdicts().items():
        if seen != ["accept"]:
            keep = f"jq -c 'select(.{column} == \"accept\")' {shlex.quote(name)} > accepted.jsonl"
            why, way = f"{column} says {' or '.join(seen)} of a row; keep what is accepted: {keep}", "or train all rows"
    if {format for format, _ in readings} == {"text"}:
        for column, who in table.speakers().items():
            said = f"{', '.join(map(str, who[:_OPTIONS]))}{' ...' if len(who) > _OPTIONS else ''}"
            make = "make a row of each conversation, or call them user and assistant, with a column conversation_id"
            why = f"{column} says who speaks ({said}); {make}"
    for format, fields in readings:
        if (lists := table.choices(fields.get("completion", ""))) and format == "prompt-completion":
            asked = fields["prompt"] if is_template(fields["prompt"]) else f"{{{fields['prompt']}}}"
            shown = {**fields, "prompt": f"{asked}\n{{{lists[0]}}}"}
            why, way = f"the completion is the number of one of {lists[0]}", "show them to the model, or do not"
            readings = [(format, shown), (format, fields)]
            break
    options = "\n".join(f"  {as_settings(*reading)}" for reading in readings[:_OPTIONS])
    return why and f"{name}: {why}\n{way}\n{options}\n{_seen(table)}"


def with_usual_names(rows: Sequence[Row | Problem], formats: Sequence[str]) -> list[Row | Problem]:
    """Return rows with the names of the one of these formats that they fit; unchanged where none fits, or several."""
    try:
        found = recognise(rows, formats=formats)
    except DataError:
        return list(rows)
    reader = _Reader(found.format, found.fields, True, Columns())

    def named(row: Row | Problem) -> Row | Problem:
        try:
            return Row(row.where, reader.asked(row.data)[0]) if isinstance(row, Row) else row
        except DataError:  # a field of a template is missing
            return row

    return [named(row) for row in rows] if found.fields else list(rows)


def _seen(table: _Table) -> str:
    return f"the rows have\n{table.shown()}"


def _needed(formats: Sequence[str]) -> str:
    """Return what rows of some formats have, for a message."""
    lines = [f"  {name}: {', '.join(FORMATS[name].required).replace('|', ' or ')}" for name in formats]
    return "\n".join(["expected are columns for one of", *lines])


# --- shots ------------------------------------------------------------------------------------------------------------

MOST_LABELS = 20


class Shots(NamedTuple):
    """The indices of the chosen rows, in order, and a note."""

    rows: list[int]
    note: str


def wanted_completion(item: Item) -> str | None:
    """Return a row's completion or last assistant turn, or good or bad for a labelled one; else None."""
    if isinstance(item, Completion):
        return item.completion.strip()
    if isinstance(item, Labelled):
        return "good" if item.label else "bad"
    if isinstance(item, Conversation) and item.messages[-1]["role"] == "assistant":
        return str(item.messages[-1]["content"]).strip()
    return None


def few_of(texts: Sequence[str | None]) -> list[str] | None:
    """Return texts as labels if every row has one and few are different, else None."""
    labels = [text for text in texts if text is not None]
    different = len(set(labels))
    few = different <= MOST_LABELS and 2 * different <= len(labels)
    return labels if few and len(labels) == len(texts) else None


def labels_of(
    examples: Sequence[Example], rows: Sequence[dict[str, Any]] | None = None, field: str | None = None
) -> list[str] | None:
    """Return a label for each row, or None where rows have none.

    With `field`, it is that field (a text, a number, true or false) of `rows`, the examples' rows as read.
    """
    if field is None:
        return few_of([wanted_completion(item) for _, item in examples])
    assert rows is not None, "the field is in the rows"
    assert len(rows) == len(examples), "each example comes from a row"
    found: list[str] = []
    for (where, _), row in zip(examples, rows):
        value = row.get(field)
        if value is None or isinstance(value, (list, dict)):
            names = sorted({name for row in rows for name in row})
            if field not in names:
                seen = f"no row has{nearest(field, names)}; rows have {', '.join(names)}"
                raise ConfigError(f"data.label is {field!r}, which {seen}")
            seen = "missing" if value is None else json.dumps(value)[:40]
            raise DataError(f"{where}: {field} is {seen}; data.label: {field} needs a text or a number")
        found.append(value if isinstance(value, str) else json.dumps(value))
    return found


def pick_shots(labels: Sequence[str] | None, count: int, shots: int, seed: int, setting: str) -> Shots:
    """Pick `shots` of `count` rows for a setting: of each label, or of all rows without labels.

    A larger number includes a smaller one's rows.
    """
    rng = random.Random(seed)
    order = rng.sample(range(count), count)
    if labels is None:
        if shots > count:
            raise ConfigError(f"{setting}: expected at most {count}, the number of rows, seen {shots}")
        return Shots(sorted(order[:shots]), f"{shots:,} of {count:,} rows are used ({setting})")
    groups = grouped(labels, order)
    short = [f"{len(rows)} of {name!r}" for name, rows in groups.items() if len(rows) < shots]
    if short:
        raise ConfigError(
            f"{setting}: asks for {shots} rows of each label, and there are only {', '.join(short)}; there are "
            f"{count} rows of {len(groups)} labels"
        )
    rows = sorted(row for group in groups.values() for row in group[:shots])
    names = ", ".join(repr(name) for name in groups)
    return Shots(rows, f"{len(rows):,} of {count:,} rows are used: {shots} of each label, {names} ({setting})")


def balanced(labels: Sequence[str] | None, count: int, shots: int, seed: int, setting: str) -> list[int]:
    """Pick `shots` of `count` rows, shuffled, with numbers of labels that differ by at most one.

    A larger number includes a smaller one's rows.
    """
    rng = random.Random(seed)
    order = rng.sample(range(count), count)
    if shots > count:
        raise ConfigError(f"{setting}: asks for {shots} shots, and there are {count} rows")
    if labels is None:
        return order[:shots]
    groups = grouped(labels, order)
    # The seed decides which labels have one row more.
    turns = rng.sample(sorted(groups), len(groups))
    wanted = {name: len(range(i, shots, len(turns))) for i, name in enumerate(turns)}
    short = [f"{len(groups[name])} of {name!r}" for name, most in wanted.items() if len(groups[name]) < most]
    if short:
        raise ConfigError(
            f"{setting}: asks for {shots} shots of {len(turns)} labels, and there are only {', '.join(short)}"
        )
    chosen = [groups[turns[i % len(turns)]][i // len(turns)] for i in range(shots)]
    # Shuffled, or a model would continue the pattern of labels.
    rng.shuffle(chosen)
    return chosen


def grouped(labels: Sequence[str], order: Sequence[int]) -> dict[str, list[int]]:
    """Return the rows of each label, in `order`; labels in alphabetical order."""
    groups: dict[str, list[int]] = {name: [] for name in sorted(set(labels))}
    for row in order:
        groups[labels[row]].append(row)
    return groups
