"""Rows of a source into the items of one format. `suggest_format` says what a row looks like, for messages only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mlxft.data import formats, preference
from mlxft.data.formats import Example, Item, Prompt, functions_of, is_text, system_turn
from mlxft.data.published import as_published, in_our_fields, together
from mlxft.data.sources import Problem, Row, report_lines
from mlxft.data.template import fill, is_template, names_in
from mlxft.errors import ConfigError, DataError, nearest

_NAMED = 12  # columns that a note names


class Format(NamedTuple):
    """How a row is read, which fields it must have ("a|b" is one of the two), and which it may have."""

    read: Callable[[dict[str, Any]], Item]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """The required fields that a row does not have, or has as null."""
        return [name for name in self.required if all(row.get(part) is None for part in name.split("|"))]


FORMATS: dict[str, Format] = {
    "messages": Format(formats.read_messages, ("messages",), ("tools", "system")),
    "prompt-completion": Format(formats.read_prompt_completion, ("prompt", "completion"), ("tools", "system")),
    "text": Format(formats.read_text, ("text",)),
    "sharegpt": Format(formats.read_sharegpt, ("conversations",), ("tools", "system")),
    "alpaca": Format(formats.read_alpaca, ("instruction", "output"), ("input", "system", "history")),
    "prompts": Format(formats.read_prompts, ("prompt",), ("tools", "system")),
    "preference": Format(
        preference.read_preference,
        ("chosen", "rejected"),
        ("prompt", "conversations", "tools", "system", "margin", "tie", "preferred"),
    ),
    "ratings": Format(
        preference.read_ratings,
        ("prompt", "answers|completions", "ratings|scores|ranking"),
        ("tools", "system"),
    ),
    "unpaired": Format(preference.read_unpaired, ("prompt", "completion", "label"), ("tools", "system")),
}


def suggest_format(row: dict[str, Any]) -> str | None:
    """The format that a row looks like, or None. For messages; nothing is read by it."""
    fitting = [name for name, form in FORMATS.items() if not form.missing(row) or _fits_published(row, name)]
    # The one that says most of the row: the fields of one format may be among those of another.
    return max(fitting, key=lambda name: len(FORMATS[name].required), default=None)


def _fits_published(row: dict[str, Any], format: str) -> bool:
    try:
        return not FORMATS[format].missing(in_our_fields(row, (format,)))
    except DataError:  # it has the columns of a layout, and something else in them
        return False


@dataclass
class Columns:
    """What became of the columns of a source's rows.

    Attributes:
        seen: those that hold something in a row, in their order.
        read: those that are read.
        layouts: of published sets, that rows were read by.
    """

    seen: dict[str, None] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    layouts: dict[str, None] = field(default_factory=dict)

    def notes(self, also: Iterable[str] | None = ()) -> list[str]:
        """By which layouts rows were read, and the columns that nothing reads.

        Args:
            also: columns that something else reads; None: it may read every one.
        """
        unused = [name for name in self.seen if also is not None and name not in self.read.union(also)]
        more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
        names = [f"columns not used: {', '.join(unused[:_NAMED])}{more}"] if unused else []
        return [*(f"rows are read as published: {layout}" for layout in self.layouts), *names]


class _NoField(DataError):
    """A row lacks a field of its format."""


class _Reader:
    """From rows to the items of a format.

    Attributes:
        columns: what became of the rows' columns.
        names: every column that there is.
    """

    def __init__(self, format: str, fields: Mapping[str, str], chat: bool, columns: Columns) -> None:
        self.form, self.format, self.chat, self.columns = _format(format), format, chat, columns
        _check_fields(fields, format)
        self.fields = fields
        self.templates = {ours: text for ours, text in fields.items() if is_template(text)}
        self.renamed = {ours: theirs for ours, theirs in fields.items() if ours not in self.templates}
        self.named = {ours: names_in(text, f"data.fields.{ours}") for ours, text in self.templates.items()}
        # A system text that a template has written into a field would else be said twice.
        self.told = "system" not in fields and any("system" in names for names in self.named.values())
        self.names: set[str] = set()
        declared = "|".join(self.form.required + self.form.optional).split("|")
        columns.read |= {name for name in declared if name not in fields}.union(
            self.renamed.values(), *self.named.values()
        )

    def gathered(self, rows: Iterable[Row | Problem]) -> Iterable[Row | Problem]:
        """The rows, where the format has them so several of the source as one."""
        rating = next((self.renamed[name] for name in ("ratings", "scores") if name in self.renamed), None)
        if self.format != "ratings" or rating is None:
            return rows
        return together(rows, rating, self.renamed.get("prompt", "prompt"))

    def item(self, row: dict[str, Any]) -> Item:
        """What a row becomes.

        Raises:
            DataError: it does not fit.
        """
        self.names.update(row)
        self.columns.seen |= {name: None for name, value in row.items() if value not in (None, "", [], {})}
        data = {key: value for key, value in row.items() if key not in self.renamed or self.renamed[key] == key}
        data |= {ours: row[theirs] for ours, theirs in self.renamed.items() if theirs in row}
        data |= {ours: fill(text, row, f"data.fields.{ours}") for ours, text in self.templates.items()}
        asked = {name: value for name, value in data.items() if name != "system"} if self.told else data
        published = as_published(asked, self.format, self.chat, self.fields)
        if published is not None:
            asked = {name: value for name, value in asked.items() if name not in published.columns} | published.fields
            self.names.update(published.columns)
            self.columns.read.update(published.columns)
            self.columns.layouts[published.says] = None
        if missing := self.form.missing(asked):
            named = [" or ".join(repr(self.renamed.get(part, part)) for part in name.split("|")) for name in missing]
            has = ", ".join(map(str, row)) or "none"
            single = self.format == "ratings" and isinstance(row.get("response"), str)
            way = "; where a row has one response, name what rates it: data.fields: {ratings: ...}" if single else ""
            raise _NoField(f"no field {' and no '.join(named)}; the row has {has}{way}")
        if not self.chat and isinstance(asked.get("prompt"), str) and not is_text(asked):
            what = "system has" if system_turn(asked) else "tools have"
            raise DataError(
                f"{what} no place in plain text (no chat template, or data.template: none); leave the column out, or "
                "write it into the prompt, as in data.fields: {prompt: '{system} {prompt}'}"
            )
        item = self.form.read(asked)
        self.columns.read |= {"functions"} if "tools" in self.form.optional and functions_of(asked) else set()
        return replace(item, row=data) if isinstance(item, Prompt) else item

    def check_names(self) -> None:
        """ConfigError where data.fields names a column that no row has."""
        named = [(ours, name) for ours, given in self.named.items() for name in given]
        for ours, theirs in [*self.renamed.items(), *named]:
            if self.names and theirs not in self.names:
                seen = f"no row has{nearest(theirs, self.names)}; rows have {', '.join(sorted(self.names))}"
                verb = "names" if ours in self.templates else "is"
                raise ConfigError(f"data.fields.{ours} {verb} {theirs!r}, which {seen}")


def convert(
    rows: Iterable[Row | Problem],
    format: str,
    fields: Mapping[str, str] | None = None,
    skipped: list[Problem] | None = None,
    *,
    chat: bool = True,
    columns: Columns | None = None,
) -> list[Example]:
    """All rows of a source in one format.

    Args:
        format: a name of `FORMATS`.
        fields: the format's field name -> the row's name of it, where the two differ, or a text with the names of
            the row's fields between braces, to be filled with them.
        skipped: takes the rows that do not fit, which then are left out; without it, and when no row fits, they raise.
        chat: whether texts can become turns of a chat template; without, a row's system text has no place.
        columns: takes what became of the rows' columns.
    Raises:
        ConfigError: no such format; or `fields` names a field that the format, or every row, does not have.
        DataError: rows that can not be read or do not fit; all of them in one.
    """
    reader = _Reader(format, dict(fields or {}), chat, Columns() if columns is None else columns)
    examples: list[Example] = []
    problems: list[Problem] = []
    looks: list[str | None] = []
    for row in reader.gathered(rows):
        try:
            if isinstance(row, Problem):
                raise DataError(row.text)
            examples.append(Example(row.where, reader.item(row.data)))
        except DataError as exc:
            problems.append(Problem(row.where, str(exc)))
            if isinstance(exc, _NoField) and isinstance(row, Row):
                looks.append(suggest_format(row.data))
    reader.check_names()
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
