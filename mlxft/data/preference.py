"""Formats of judgements: pairs of answers, several answers with ratings, single answers with a label."""

from __future__ import annotations

import math
import re
from typing import Any

from mlxft.data.formats import (
    Judged,
    Message,
    Preference,
    Ranked,
    check_order,
    flag_at,
    list_at,
    message_at,
    messages_at,
    sharegpt_turn,
    string_at,
    system_turn,
    tools_of,
    unwritten,
    with_system,
)
from mlxft.data.sources import type_name
from mlxft.errors import DataError

_ASKING = ("user", "tool")
_DIFFERENCE = re.compile(r"\s*(-?[\d.]+(?:[eE][-+]?\d+)?) - (-?[\d.]+(?:[eE][-+]?\d+)?)\s*")
_LARGEST = 3.4e38  # beyond it a number is infinite in float32, which losses are computed in


def read_preference(row: dict[str, Any]) -> Preference | Ranked:
    """{"prompt", "chosen", "rejected", "system"?, "margin"?, "tie"?, "preferred"?, "tools"?}

    Prompt and answers are texts; or messages, where an answer is a text, an assistant message, or a list: that message
    alone or the whole conversation. Without a prompt both are whole conversations that differ in the last turn only.
    ShareGPT's pairs have `conversations` as the prompt, and any message may be written as its turns are, by from and
    value. `rejected` may be a list of texts: one pair for each of them.
    """
    rejected = row["rejected"]
    if isinstance(rejected, list) and rejected and all(isinstance(text, str) for text in rejected):
        pairs = [_pair(row, text, f"rejected[{i}]", 1 / len(rejected)) for i, text in enumerate(rejected)]
        return Ranked(tuple(pairs))
    return _pair(row, rejected, "rejected", 1.0)


def _pair(row: dict[str, Any], rejected: Any, at: str, weight: float) -> Preference:
    sides = {"chosen": _side(row["chosen"], "chosen"), at: _side(rejected, at)}
    good, bad = sides.values()
    prompt = _context(row)
    if prompt is None:
        prompt = _shared(good, bad)
    elif isinstance(prompt, str) and not (isinstance(good, str) and isinstance(bad, str)):
        prompt = _shared(*(_whole(prompt, side, name) for name, side in sides.items()))
    tie, margin = _tie(row), _margin(row)
    if tie and margin:
        raise DataError(f"margin is {margin:g} and the row is a tie; expected one of them")
    prompt, answers = _asked(row, prompt, [_reply(side, prompt, name) for name, side in sides.items()])
    if _same(*answers) and not tie:
        raise DataError(f"chosen and {at} are the same; expected a difference (or tie: true)")
    return Preference(prompt, answers[0], answers[1], margin, weight, tie, tools_of(row))


def _asked(
    row: dict[str, Any], prompt: str | list[Message], answers: list[str | Message]
) -> tuple[str | list[Message], list[str | Message]]:
    """Prompt and answers as they are asked and given: as turns, where the row has a system text."""
    if isinstance(prompt, str):
        if not system_turn(row):
            return prompt, answers
        prompt = [{"role": "user", "content": prompt}]
        answers = [{"role": "assistant", "content": answer} for answer in answers]
    return with_system(row, prompt), answers


def _same(one: Any, other: Any) -> bool:
    return bool(unwritten(one) == unwritten(other))


def _parting(one: list[Message], other: list[Message]) -> int:
    """The first place at which two lists of messages differ."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if not _same(a, b)), min(len(one), len(other)))


def _side(value: Any, at: str) -> str | list[Message]:
    """An answer as given: a text, or messages."""
    if isinstance(value, str):
        return string_at(value, at)
    if isinstance(value, dict):
        return [_message(value, at)]
    if not isinstance(value, list):
        raise DataError(f"{at} is {type_name(value)}; expected text, a message or a list of messages")
    turns = list_at(value, at, "messages")
    return [_message(turn, f"{at}[{i}]") for i, turn in enumerate(turns)]


def _message(value: Any, at: str) -> Message:
    """A message by role and content, or as ShareGPT writes it."""
    sharegpt = isinstance(value, dict) and value.get("role") is None and value.get("from") is not None
    return _unweighted((sharegpt_turn if sharegpt else message_at)(value, at))


def _unweighted(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def _context(row: dict[str, Any]) -> str | list[Message] | None:
    """The prompt that the row itself names."""
    if row.get("conversations") is not None:
        if row.get("prompt") is not None:
            raise DataError("the row has prompt and conversations; expected one of them")
        turns = list_at(row["conversations"], "conversations", "turns")
        at = [f"conversations[{i}]" for i in range(len(turns))]
        messages = [_message(turn, place) for turn, place in zip(turns, at)]
        check_order(messages, at, _ASKING, told=True)
        return messages
    return None if row.get("prompt") is None else _prompt(row["prompt"])


def _prompt(prompt: Any) -> str | list[Message]:
    if isinstance(prompt, str):
        return string_at(prompt, "prompt")
    if not isinstance(prompt, list):
        raise DataError(f"prompt is {type_name(prompt)}; expected a string or a list of messages")
    turns = list_at(prompt, "prompt", "messages")
    return messages_at([_message(turn, f"prompt[{i}]") for i, turn in enumerate(turns)], "prompt", _ASKING)


def _shared(good: str | list[Message], bad: str | list[Message]) -> list[Message]:
    """What two whole conversations have in common: all but the last turn, or they answer different prompts."""
    if isinstance(good, str) or isinstance(bad, str):
        raise DataError("no field 'prompt', and the answers are texts; give the prompt, or whole conversations")
    prompt, other = good[:-1], bad[:-1]
    if not _same(prompt, other):
        at = _parting(prompt, other)
        raise DataError(
            f"chosen[{at}] and rejected[{at}] differ before the last turn; expected two answers to the same prompt"
        )
    if not prompt:
        raise DataError("no field 'prompt', and chosen has one message only; give the prompt, or whole conversations")
    return prompt


def _whole(prompt: str, side: str | list[Message], at: str) -> list[Message]:
    """The conversation of a prompt that is a text and an answer that is messages: one of its user turns is the text."""
    if isinstance(side, str):
        raise DataError(f"{at} is a string, and the other answer is messages; expected both alike")
    whole = [{"role": "user", "content": prompt}, *side] if len(side) == 1 else side
    asked = [message["content"] for message in whole if message["role"] == "user"]
    if prompt.strip() not in map(str.strip, asked):
        raise DataError(f"{at} answers another prompt: no user turn of it is the text of prompt")
    return whole


def _reply(side: str | list[Message], prompt: str | list[Message], at: str) -> str | Message:
    """The answer alone: the last turn."""
    if isinstance(prompt, str):
        if isinstance(side, str):
            return side
        raise AssertionError("a text is answered by texts here")
    if isinstance(side, str):
        return {"role": "assistant", "content": side}
    if len(side) > 1 and not _same(side[:-1], prompt):
        place = _parting(side[:-1], prompt)
        raise DataError(f"{at}[{place}] is not as in the prompt; expected the prompt's messages and one answer")
    reply = side[-1]
    check_order([*prompt, reply], ["prompt"] * len(prompt) + [f"{at}[{len(side) - 1}]" if len(side) > 1 else at])
    if not reply["content"].strip() and "tool_calls" not in reply:
        raise DataError(f"{at} is empty; expected text")
    return reply


def _number(value: Any, at: str) -> float:
    """A finite number; csv holds it as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise DataError(f"{at} is {value!r}; expected a finite number")
    return number


def _margin(row: dict[str, Any]) -> float | None:
    """How much better the chosen answer is: a number, or the difference of two that data.fields wrote into a text."""
    given = row.get("margin")
    if given in (None, ""):
        return None
    if isinstance(given, str) and (of := _DIFFERENCE.fullmatch(given)):
        return _number(of[1], "margin") - _number(of[2], "margin")
    return _number(given, "margin")


def _tie(row: dict[str, Any]) -> bool:
    preferred = row.get("preferred") or "chosen"
    if preferred not in ("chosen", "tie"):
        raise DataError(f"preferred is {preferred!r}; expected 'tie' or 'chosen' (the fields say which it is)")
    said = row.get("tie")
    tie = preferred == "tie" if said in (None, "") else flag_at(said, "tie")
    if preferred == "tie" and not tie:
        raise DataError("preferred is 'tie' and tie is false; expected the two to agree")
    return tie


def read_ratings(row: dict[str, Any]) -> Ranked:
    """{"prompt", "answers" or "completions", "ratings" or "scores": numbers, or "ranking": best first, ...}

    It may have `system` and `tools`; prompt and answers are as in a preference. Every two answers with different
    ratings are a pair, the higher one chosen; the pairs' weights add up to 1, so that a prompt with many answers counts
    as much as one with few. `ranking` holds the answers' indices, from 0.
    """
    name, given = _one_of(row, ("answers", "completions"))
    places = {f"{name}[{i}]": side for i, side in enumerate(list_at(given, name, "answers"))}
    sides = {at: _side(side, at) for at, side in places.items()}
    if len(sides) < 2:
        raise DataError(f"{name} has one answer; expected two or more to compare")
    ratings = _ratings(row, len(sides), name)
    prompt, tools = _prompt(row["prompt"]), tools_of(row)
    if isinstance(prompt, str) and not all(isinstance(side, str) for side in sides.values()):
        wholes = [_whole(prompt, side, at) for at, side in sides.items()]
        prompt = wholes[0][:-1]
    prompt, turns = _asked(row, prompt, [_reply(side, prompt, at) for at, side in sides.items()])
    order = sorted(range(len(turns)), key=lambda i: -ratings[i])
    better = [(a, b) for n, a in enumerate(order) for b in order[n + 1 :] if ratings[a] > ratings[b]]
    for a, b in better:
        if _same(turns[a], turns[b]):
            first, second = sorted((a, b))
            raise DataError(f"{name}[{first}] and {name}[{second}] are the same text, with different ratings")
    weight = 1 / max(1, len(better))
    return Ranked(tuple(Preference(prompt, turns[a], turns[b], None, weight, False, tools) for a, b in better))


def _one_of(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    given = [name for name in names if row.get(name) is not None]
    if len(given) != 1:
        raise DataError(f"the row has {' and '.join(given)}; expected one of them")
    return given[0], row[given[0]]


def _ratings(row: dict[str, Any], count: int, answers: str) -> list[float]:
    name, given = _one_of(row, ("ratings", "scores", "ranking"))
    values = [_number(value, f"{name}[{i}]") for i, value in enumerate(list_at(given, name, "numbers"))]
    if len(values) != count:
        raise DataError(f"{name} has {len(values)} numbers for {count} {answers}; expected one for each")
    if name != "ranking":
        return values
    if sorted(values) != list(range(count)):
        raise DataError(f"ranking is {given}; expected each index from 0 to {count - 1} once, the best answer's first")
    return [-float(values.index(i)) for i in range(count)]


def read_unpaired(row: dict[str, Any]) -> Judged:
    """{"prompt", "completion", "label": true or false, "system"?, "tools"?}: the first two as in a preference."""
    prompt, completion = _prompt(row["prompt"]), _side(row["completion"], "completion")
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = _whole(prompt, completion, "completion")[:-1]
    prompt, (reply,) = _asked(row, prompt, [_reply(completion, prompt, "completion")])
    return Judged(prompt, reply, flag_at(row["label"], "label"), tools_of(row))
