"""Texts made of a row's fields: `Review: {review}` says where each goes."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from typing import Any

from mlxft.errors import ConfigError, DataError, nearest


def is_template(text: str) -> bool:
    """Whether a text has places for fields; `{{` and `}}` stand for braces."""
    return "{" in text.replace("{{", "")


def names_in(template: str, setting: str) -> list[str]:
    """The fields that a template names, each once.

    Args:
        setting: where it stands, for messages.
    Raises:
        ConfigError: braces that do not match, or more than a field's name between them.
    """
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
    """The template with the row's fields in place; what is no text is written as JSON.

    Raises:
        ConfigError: a template that is none. DataError: the row has no such field, or has it as null.
    """
    names_in(template, setting)
    text = []
    for before, name, _, _ in string.Formatter().parse(template):
        text.append(before)
        if name is None:
            continue
        value = row.get(name)
        if value is None:
            seen = f"{nearest(name, map(str, row))}; the row has {', '.join(map(str, row)) or 'none'}"
            raise DataError(f"no field {name!r}, which {setting} names{seen}")
        text.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(text)
