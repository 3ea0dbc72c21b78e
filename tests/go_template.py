"""The few constructs of Go's text/template that our templates for Ollama are made of, rendered to check them.

Text, {{ "a literal" }}, {{ .Field }}, {{ $.Field }}, {{ $i }}, {{ range $i, $m := .Messages }},
{{ if }} / {{ else if }} / {{ else }} / {{ end }} with eq and and.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:\\.|[^"\\])*"|[()]|[^\s()]+')
Scope = Mapping[str, Any]


def render(template: str, data: Mapping[str, Any]) -> str:
    """What Go prints for a template.

    Args:
        data: the fields of the top: Messages (mappings with Role and Content), System.
    Raises:
        ValueError: a construct that is not known here.
    """
    pieces = _ACTION.split(template)
    steps = [("action" if i % 2 else "text", piece.strip() if i % 2 else piece) for i, piece in enumerate(pieces)]
    out, rest = _block(steps, 0, {"$": data, ".": data}, True)
    if rest != len(steps):
        raise ValueError(f"{steps[rest][1]!r} closes nothing")
    return out


def _block(steps: Sequence[tuple[str, str]], at: int, scope: Scope, on: bool) -> tuple[str, int]:
    """Text up to the end or else that closes this block, and where that stands; nothing if it is not `on`."""
    out = ""
    while at < len(steps):
        kind, piece = steps[at]
        word = piece.split(" ")[0] if kind == "action" else ""
        if word in ("end", "else"):
            return out, at
        if word == "if":
            text, at = _choice(steps, at, scope, on)
        elif word == "range":
            text, at = _loop(steps, at, scope, on)
        elif kind == "text":
            text = piece
        else:
            text = str(_value(piece, scope)) if on else ""
        out += text if on else ""
        at += 1
    return out, at


def _choice(steps: Sequence[tuple[str, str]], at: int, scope: Scope, on: bool) -> tuple[str, int]:
    """An if with its branches; where its end stands."""
    out, done = "", False
    while True:
        condition = steps[at][1].removeprefix("else").strip().removeprefix("if").strip()
        taken = on and not done and (not condition or bool(_value(condition, scope)))
        text, at = _block(steps, at + 1, scope, taken)
        out, done = out + text, done or taken
        if at >= len(steps):
            raise ValueError("an if is not closed")
        if steps[at][1] == "end":
            return out, at


def _loop(steps: Sequence[tuple[str, str]], at: int, scope: Scope, on: bool) -> tuple[str, int]:
    """A range over messages; where its end stands."""
    found = re.fullmatch(r"range (\$\w+), (\$\w+) := (\S+)", steps[at][1])
    if found is None:
        raise ValueError(f"{steps[at][1]!r} is not known")
    number, name, what = found.groups()
    items = _value(what, scope) if on else []
    out = "".join(_block(steps, at + 1, {**scope, ".": m, number: i, name: m}, True)[0] for i, m in enumerate(items))
    _, end = _block(steps, at + 1, scope, False)
    if end >= len(steps) or steps[end][1] != "end":
        raise ValueError("a range is not closed")
    return out, end


def _value(expression: str, scope: Scope) -> Any:
    words = _WORD.findall(expression)
    value, rest = _term(words, scope) if words and words[0] not in ("eq", "and") else _call(words, scope)
    if rest:
        raise ValueError(f"{expression!r} is not known")
    return value


def _call(words: list[str], scope: Scope) -> tuple[Any, list[str]]:
    """`eq a b` and `and a b`, up to a closing bracket."""
    name, rest = words[0], words[1:]
    values = []
    while rest and rest[0] != ")":
        value, rest = _term(rest, scope)
        values.append(value)
    if name == "eq" and len(values) == 2:
        return values[0] == values[1], rest
    if name == "and" and values:
        return next((v for v in values if not v), values[-1]), rest
    raise ValueError(f"{name!r} is not known")


def _term(words: list[str], scope: Scope) -> tuple[Any, list[str]]:
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _call(rest, scope)
        if rest[:1] != [")"]:
            raise ValueError("a bracket is not closed")
        return value, rest[1:]
    if word.startswith('"'):
        return json.loads(word), rest
    if word.isdigit():
        return int(word), rest
    owner, dot, field = word.partition(".")
    found = scope.get(owner or ".")
    if found is None:
        raise ValueError(f"{word!r} is not known")
    return (found[field] if dot and field else found), rest
