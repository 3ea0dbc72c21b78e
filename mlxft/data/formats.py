"""Row formats: what rows become, and one function per format that reads a row's fields (of pairs: preference.py).

A format never guesses: a row either is in the format that the recipe names or is refused with the place, what was
seen and what is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from mlxft.data.sources import read_json, type_name
from mlxft.errors import DataError, half_character, nearest

Message: TypeAlias = dict[str, Any]
WRITTEN = "_written"
"""Where a call's function keeps the text that its arguments were given as: some chat templates want that one."""


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat, checked: `role` and a string `content` each; `tool_calls` with arguments as mappings.

    An assistant message may carry `weight` 0 or 1: whether it is trained. A call's function carries WRITTEN where the
    row gave its arguments as a text.
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


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is the better one, or of which neither is.

    Attributes:
        prompt: a text, and then both answers are texts; or messages, and then both are an assistant message.
        margin: how much better the chosen one is, in units of score; None where nobody said.
        weight: what the pair counts; the pairs of one row add up to 1.
        tie: neither is better.
    """

    prompt: str | list[Message]
    chosen: str | Message
    rejected: str | Message
    margin: float | None = None
    weight: float = 1.0
    tie: bool = False
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Ranked:
    """The pairs that several answers to one prompt make; none where all are equally good."""

    pairs: tuple[Preference, ...]


@dataclass(frozen=True)
class Judged:
    """One answer and whether it is a good one. Prompt and answer are as in a Preference."""

    prompt: str | list[Message]
    completion: str | Message
    label: bool
    tools: list[dict[str, Any]] | None = None


Item: TypeAlias = Conversation | Completion | Text | Prompt | Preference | Ranked | Judged


class Example(NamedTuple):
    """A converted row and where it stood."""

    where: str
    item: Item


ROLES = ("system", "developer", "user", "assistant", "tool")
_OPENERS = ("system", "developer")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def string_at(value: Any, at: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{at} is {type_name(value)}; expected a string")
    if not empty and not value.strip():
        raise DataError(f"{at} is empty; expected text")
    return value


def flag_at(value: Any, at: str) -> bool:
    """True or false; csv holds it as text."""
    known = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, bool | int | str) and (text := str(value).strip().lower()) in known:
        return known[text]
    raise DataError(f"{at} is {value!r}; expected true or false")


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
    """A list of objects: as it is, as JSON (csv and parquet hold strings), or each of them as JSON. Empty is none."""
    if isinstance(value, str):
        value = _json(value, at) if value.strip() else None
    if value is None or value in ([], {}):
        return []
    found = [
        _json(part, f"{at}[{i}]") if isinstance(part, str) else part for i, part in enumerate(list_at(value, at, of))
    ]
    for i, part in enumerate(found):
        if not isinstance(part, dict):
            raise DataError(f"{at}[{i}] is {type_name(part)}; expected an object: {of}")
    return found


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool descriptions; None where there are none."""
    return _objects(value, "tools", "tool descriptions") or None


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that a row describes: in `tools`, or in `functions` as OpenAI had it before there were tools."""
    tools, functions = read_tools(row.get("tools")), functions_of(row)
    if tools and functions:
        raise DataError("the row has tools and functions; expected one of them")
    return tools or [{"type": "function", "function": function} for function in functions] or None


def functions_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a row's `functions` describe; none where it is something else of that name."""
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
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = repr(part.get("type")) if isinstance(part, dict) else type_name(part)
                raise DataError(
                    f"{at}.content[{i}] is {kind}; expected {{'type': 'text', 'text': ...}}: only text is trained"
                )
            texts.append(string_at(part.get("text"), f"{at}.content[{i}].text", empty=True))
        content = "".join(texts)
    return string_at(content, f"{at}.content", empty=True)


def _tool_call(call: dict[str, Any], at: str) -> dict[str, Any]:
    """A call as OpenAI writes it now; its name and arguments may also stand in it without the wrapper `function`."""
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
    """A called function with its arguments as a mapping, and as WRITTEN where they were a text; none are {}."""
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
    if arguments is None or arguments == []:  # PHP writes an empty object so
        arguments, written = {}, None
    if not isinstance(arguments, dict):
        raise DataError(f"{at}.arguments is {type_name(arguments)}; expected an object")
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:  # NaN, Infinity, 1e400; a date, from parquet
        raise DataError(f"{at}.arguments holds what JSON cannot write ({error}); make it null or a text") from error
    return {**function, "arguments": arguments, **({WRITTEN: written} if isinstance(written, str) else {})}


def unwritten(value: Any) -> Any:
    """A text, a message or several messages without WRITTEN: for comparing what they say, and for files."""
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
    """The calls of a message that may have come as OpenAI's older `function_call`, of which a turn has one."""
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
    """One message, checked by itself. Null fields count as missing: parquet fills a struct's gaps with them."""
    if not isinstance(value, dict):
        raise DataError(f"{at} is {type_name(value)}; expected an object with role and content")
    message = {key: field for key, field in value.items() if field is not None}
    if message.get("role") == "function":  # OpenAI's name of a result before there were tools
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
    messages: Sequence[Message], at: Sequence[str], last: tuple[str, ...] = ("assistant",), told: bool = False
) -> None:
    """System first or not at all, then user and assistant in turn, tool turns after the calls; `at` names each.

    Args:
        told: calls may also stand in the text of an assistant turn: any such turn may be followed by a tool turn.
    """
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
            fits = before == "tool" or "tool_calls" in previous or (told and before == "assistant")
            wanted = "a tool turn follows an assistant turn with tool_calls, or another tool turn"
        if not fits:
            raise DataError(f"{place}.role is {role} after {before}; {wanted}")
        previous = message
    if previous["role"] not in last:
        raise DataError(
            f"{at[-1]}.role is {previous['role']}, and it is the last; expected {' or '.join(last)} to end it"
        )


def messages_at(value: Any, name: str, last: tuple[str, ...] = ("assistant",)) -> list[Message]:
    at = [f"{name}[{i}]" for i in range(len(list_at(value, name, "messages")))]
    messages = [message_at(message, place) for message, place in zip(value, at)]
    check_order(messages, at, last)
    # A turn may be empty, real chats have such; an answer that is all empty has nothing to learn from.
    answers = [m for m in messages if m["role"] == "assistant"]
    if answers and not any(m["content"].strip() or "tool_calls" in m or "reasoning_content" in m for m in answers):
        raise DataError(f"{name}: every assistant turn is empty; expected text")
    return messages


def read_messages(row: dict[str, Any]) -> Conversation:
    """{"messages": [{"role", "content", ...}], "system"?, "tools"?: [...]}"""
    messages = messages_at(row["messages"], "messages")
    return Conversation(with_system(row, messages, "messages"), tools_of(row))


def read_prompt_completion(row: dict[str, Any]) -> Conversation | Completion:
    """{"prompt", "completion", "system"?}: two strings, or messages and then messages, one message or a string.

    What stands in a prompt of messages is context: its assistant turns get weight 0 unless they carry one.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        texts = string_at(prompt, "prompt"), string_at(completion, "completion")
        if is_text(row):
            return Completion(*texts)
        turns = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
        return Conversation(with_system(row, turns), tools_of(row))
    if not isinstance(prompt, list):
        raise DataError(f"prompt is {type_name(prompt)}; expected a string or a list of messages")
    context = messages_at(prompt, "prompt", ("user", "tool", "assistant"))
    context = [{"weight": 0, **message} if message["role"] == "assistant" else message for message in context]
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
    turns = list_at(row["conversations"], "conversations", "turns")
    at = [f"conversations[{i}]" for i in range(len(turns))]
    messages = [sharegpt_turn(turn, place) for turn, place in zip(turns, at)]
    check_order(messages, at, told=True)
    return Conversation(with_system(row, messages, "conversations"), tools_of(row))


def system_turn(row: Mapping[str, Any]) -> list[Message]:
    """The system turn of a row's own `system` field; none where it is missing, null or empty."""
    text = string_at(row.get("system") or "", "system", empty=True)
    return [{"role": "system", "content": text}] if text.strip() else []


def is_text(row: Mapping[str, Any]) -> bool:
    """Whether a row's prompt is a text and nothing but it: a system text and tools have their place in a chat only."""
    return isinstance(row.get("prompt"), str) and not system_turn(row) and not tools_of(row)


def with_system(row: Mapping[str, Any], messages: list[Message], name: str = "prompt") -> list[Message]:
    """The messages behind the system turn of the row's own `system` field; as they are where there is none.

    Args:
        name: what the messages are called, for an error.
    """
    system, first = system_turn(row), messages[0]
    if not system or first == system[0]:
        return messages
    if first["role"] in _OPENERS:
        raise DataError(f"the row has a field system, and {name}[0] is a {first['role']} turn too; keep one of them")
    return system + messages


def read_alpaca(row: dict[str, Any]) -> Conversation:
    """{"instruction", "output", "input"?, "system"?, "history"?: [[question, answer], ...]}"""
    messages = system_turn(row)
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{i}] is not a pair; expected [question, answer]")
        messages.append({"role": "user", "content": string_at(pair[0], f"history[{i}][0]")})
        messages.append({"role": "assistant", "content": string_at(pair[1], f"history[{i}][1]")})
    question = string_at(row["instruction"], "instruction")
    extra = string_at("" if row.get("input") is None else row["input"], "input", empty=True)
    messages.append({"role": "user", "content": f"{question}\n\n{extra}" if extra.strip() else question})
    messages.append({"role": "assistant", "content": string_at(row["output"], "output")})
    return Conversation(messages)


def read_prompts(row: dict[str, Any]) -> Prompt:
    """{"prompt": a string, or messages that end with a user or tool turn, "system"?}, and whatever a reward wants."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        turn = {"role": "user", "content": string_at(prompt, "prompt")}
        return Prompt(with_system(row, [turn]) if system_turn(row) else prompt, row)
    if not isinstance(prompt, list):
        raise DataError(f"prompt is {type_name(prompt)}; expected a string or a list of messages")
    return Prompt(with_system(row, messages_at(prompt, "prompt", ("user", "tool"))), row)
