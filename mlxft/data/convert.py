"""Rows of a source into the items of one format. `suggest_format` says what a row looks like, for messages only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from mlxft.data import formats, preference
from mlxft.data.formats import Example, Item
from mlxft.data.sources import Problem, Row, report_lines
from mlxft.data.template import fill, is_template, names_in
from mlxft.errors import ConfigError, DataError, nearest


class Format(NamedTuple):
    """How a row is read, which fields it must have ("a|b" is one of the two), and which it may have."""

    read: Callable[[dict[str, Any]], Item]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """The required fields that a row does not have, or has as null."""
        return [name for name in self.required if all(row.get(part) is None for part in name.split("|"))]


FORMATS: dict[str, Format] = {
    "messages": Format(formats.read_messages, ("messages",), ("tools",)),
    "prompt-completion": Format(formats.read_prompt_completion, ("prompt", "completion"), ("tools",)),
    "text": Format(formats.read_text, ("text",)),
    "sharegpt": Format(formats.read_sharegpt, ("conversations",), ("system", "tools")),
    "alpaca": Format(formats.read_alpaca, ("instruction", "output"), ("input", "system", "history")),
    "prompts": Format(formats.read_prompts, ("prompt",)),
    "preference": Format(
        preference.read_preference,
        ("chosen", "rejected"),
        ("prompt", "conversations", "system", "tools", "margin", "tie", "preferred"),
    ),
    "ratings": Format(preference.read_ratings, ("prompt", "answers|completions", "ratings|scores|ranking"), ("tools",)),
    "unpaired": Format(preference.read_unpaired, ("prompt", "completion", "label"), ("tools",)),
}


def suggest_format(row: dict[str, Any]) -> str | None:
    """The format that a row looks like, or None. For messages; nothing is read by it."""
    fitting = [name for name, form in FORMATS.items() if not form.missing(row)]
    # The one that says most of the row: the fields of one format may be among those of another.
    return max(fitting, key=lambda name: len(FORMATS[name].required), default=None)


def convert(
    rows: Iterable[Row | Problem],
    format: str,
    fields: Mapping[str, str] | None = None,
    skipped: list[Problem] | None = None,
) -> list[Example]:
    """All rows of a source in one format.

    Args:
        format: a name of `FORMATS`.
        fields: the format's field name -> the row's name of it, where the two differ, or a text with the names of
            the row's fields between braces, to be filled with them.
        skipped: takes the rows that do not fit, which then are left out; without it, and when no row fits, they raise.
    Raises:
        ConfigError: no such format; or `fields` names a field that the format, or every row, does not have.
        DataError: rows that can not be read or do not fit; all of them in one.
    """
    form, fields = _format(format), dict(fields or {})
    _check_fields(fields, format)
    templates = {ours: text for ours, text in fields.items() if is_template(text)}
    fields = {ours: theirs for ours, theirs in fields.items() if ours not in templates}
    needed = {ours: names_in(text, f"data.fields.{ours}") for ours, text in templates.items()}
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
        try:
            data |= {ours: fill(text, row.data, f"data.fields.{ours}") for ours, text in templates.items()}
        except DataError as exc:
            problems.append(Problem(row.where, str(exc)))
            continue
        if missing := form.missing(data):
            names_of = [" or ".join(repr(fields.get(part, part)) for part in name.split("|")) for name in missing]
            has = ", ".join(map(str, row.data)) or "none"
            problems.append(Problem(row.where, f"no field {' and no '.join(names_of)}; the row has {has}"))
            looks.append(suggest_format(row.data))
            continue
        try:
            examples.append(Example(row.where, form.read(data)))
        except DataError as exc:
            problems.append(Problem(row.where, str(exc)))
    for ours, theirs in [*fields.items(), *((ours, name) for ours, given in needed.items() for name in given)]:
        if names and theirs not in names:
            seen = f"no row has{nearest(theirs, names)}; rows have {', '.join(sorted(names))}"
            raise ConfigError(f"data.fields.{ours} {'names' if ours in templates else 'is'} {theirs!r}, which {seen}")
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
    known = "|".join(FORMATS[format].required + FORMATS[format].optional).split("|")
    unknown = [
        f"data.fields.{name}: format {format} has no field {name!r}{nearest(name, known)}"
        for name in fields
        if name not in known
    ]
    if unknown:
        raise ConfigError("\n".join([*unknown, f"the fields of {format} are {', '.join(known)}"]))
