"""Where rows come from: files of rows, tables, texts and exported chats, folders of them, and the Hugging Face hub.

A reader yields rows as they were before they were written: null keys that Arrow adds are removed. It does not stop at
a bad line but yields a `Problem` in its place, so that all problems of a file are reported at once. It raises where
there is no row to read, such as an empty file.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import shlex
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time
from glob import glob
from hashlib import blake2b
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO, TypeAlias
from xml.etree import ElementTree

from mlxft.config import Paths, handed_over
from mlxft.errors import ConfigError, DataError, half_character, missing_extra, nearest
from mlxft.files import digest
from mlxft.text import counted, home_path, parse_json


class Row(NamedTuple):
    """A row: its place `where` ("train.jsonl:17", "train.json[16]") and its fields."""

    where: str
    data: dict[str, Any]


class Problem(NamedTuple):
    """A row that cannot be read: its place `where` and what is wrong."""

    where: str
    text: str


# Splits with the names that files and hub data sets give them.
SPLITS = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
REPORTED = 20  # problems in a message
_DEEPEST = 100
_SPARSE = ("tools", "functions", "tool_calls", "function_call")
_LONGEST = 1 << 22  # characters of a text; tokenizers hold some 200 bytes for each
_MAX_CSV_FIELD = 2**31 - 1
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
# hf:org/name[:config][:split], where the split may carry a slice: train[:1000]
_HUB = re.compile(r"hf:([^:\[\]]+)(?::([^:\[\]]+)(?=:|$))?(?::([^:\[\]]+(?:\[[^\[\]]*\])?))?")


class File(NamedTuple):
    """A file of rows, the part of it that is named (a sheet, or a key of JSON), and its name for messages."""

    path: Path
    part: str
    name: str

    @property
    def kind(self) -> str:
        """Return its suffix."""
        return self.path.suffix.lower()

    @property
    def spec(self) -> str:
        """Return how a recipe names it."""
        return f"{self.path}:{self.part}" if self.part else str(self.path)


_Read: TypeAlias = Callable[[File, str, list[str]], "Iterator[Row | Problem]"]


def read_rows(spec: Paths, split: str, notes: list[str] | None = None) -> Iterator[Row | Problem]:
    """Read the rows of one split of files, a folder or a hub data set, in order.

    Args:
        spec: a file (read whole, whatever the split), with the part of it that is meant (`faq.xlsx:Sheet2`,
            `rows.json:items`) where it has several; a pattern such as `rows/*.csv`; a folder with {split}.jsonl or
            another kind of file, or of texts; `hf:org/name[:config][:split]`; or a list of these.
        split: "train", "valid" or "test"; "valid" has the names validation, val, dev and eval, too.
        notes: notes on how files are read are appended as they are.
    Raises:
        ConfigError: there is no such file or split, or its kind is unknown. Raised at once.
        DataError: a file has no rows, is damaged as a whole, or the hub did not return it. Raised while iterating.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; expected one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    said: list[str] = [] if notes is None else notes
    if not isinstance(spec, str):
        given = [one for one in spec if one.startswith(("hf:", "python:"))]
        if not given:
            return _of_files(find_files(spec, split), split, said)
        return chain.from_iterable([read_rows(one, split, said) for one in spec])
    if spec.startswith("hf:"):
        return _some(_read_hub(spec, split), spec, said)
    if spec.startswith("python:"):
        return _some(given_rows(handed_over(f"data.{split}", spec), spec.removeprefix("python:")), spec, said)
    return _of_files(find_files(spec, split), split, said)


def _of_files(files: Sequence[File], split: str, notes: list[str]) -> Iterator[Row | Problem]:
    return chain.from_iterable(_some(_reader(file, notes)(file, split, notes), file.name, notes) for file in files)


def _reader(file: File, notes: list[str]) -> _Read:
    """Return what reads a file: by its suffix, but for a table that is a spreadsheet by its content, or is none."""
    kind, book = file.kind, _head(file.path)[:8].startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0"))
    if kind == ".txt" and _is_table(file.path):
        notes.append(f"{file.name}: is a table by its columns, and is read as .csv")
        return _read_csv
    if kind != ".parquet" and book != (kind in _SHEETS):
        kind = ".xlsx" if book else ".csv"
        notes.append(f"{file.name}: is {'a spreadsheet' if book else 'a text'} by its content, and is read as {kind}")
    return READERS[kind]


def _is_table(path: Path) -> bool:
    """Return whether lines have as many tabs, as spreadsheet programs and Anki write them, or below usual names."""
    lines = [line for line in _head(path).split(b"\n")[:50] if line.strip(b"\r\0 ") and not line.startswith(b"#")]
    tabs = {line.count(b"\t") for line in lines[:-1] or lines}
    names = [plain_name(part) for part in re.split(r"[,;|]", lines[0].decode(errors="ignore"))] if lines else []
    named = len(names) > 1 and {*names} <= _KNOWN
    return len(lines) > 1 and (named or (len(tabs) == 1 and tabs != {0}))


def find_files(spec: Paths, split: str) -> list[File]:
    """Return the files with the rows of a split, by their places; raise ConfigError without any."""
    if not isinstance(spec, str):
        found = [file for one in spec for file in find_files(one, split)]
        if twice := [file for file, count in Counter(found).items() if count > 1]:
            raise ConfigError(f"{twice[0].path} is named twice; name each file once (data.mix repeats rows)")
        if not found:
            raise ConfigError("the list names no file; expected at least one")
        return _named(found)
    try:
        path, part = home_path(spec), ""
        if not path.exists():
            whole, colon, named = spec.rpartition(":")
            if colon and (home_path(whole).is_file() or Path(whole).suffix.lower() in _PARTS):
                path, part = home_path(whole), named
            elif is_pattern(spec):
                return _matching(spec, split)
        folder = path.is_dir()
    except (OSError, ValueError) as exc:  # too long for a path
        raise ConfigError(f"{spec[:80]}: not a path: {getattr(exc, 'strerror', None) or exc}") from exc
    if folder:
        return _of_folder(path, spec, split)
    if not path.exists():
        raise ConfigError(f"{spec}: no such file{neighbour(path)}")
    file = _file(path, part)
    if path.suffix.lower() not in READERS:
        way = _CONVERTED.get(path.suffix.lower(), "").format(*map(shlex.quote, (spec, str(path.with_suffix("")))))
        known = f"known are {', '.join(READERS)}"
        raise ConfigError(f"{spec}: unknown kind of file {path.suffix!r}; {known}{way and f'; {way}'}")
    if part and path.suffix.lower() not in _PARTS:
        raise ConfigError(f"{spec}: a {path.suffix} file has no parts; name it as {path}")
    return [file]


def _file(path: Path, part: str = "") -> File:
    if not path.is_file():
        raise ConfigError(f"{path}: is a device or a pipe; expected a file, which is read more than once")
    return File(path, part, path.name)


def is_pattern(spec: str) -> bool:
    """Return whether a source's name is a pattern of files."""
    return not spec.startswith(("hf:", "python:")) and any(sign in spec for sign in "*?[")


def _matching(spec: str, split: str) -> list[File]:
    paths = sorted(Path(found) for found in glob(str(home_path(spec)), recursive=True))
    files = [file for path in paths if path.is_file() for file in find_files(str(path), split)]
    if not files:
        raise ConfigError(f"{spec}: no file matches this pattern; expected files of {', '.join(READERS)}")
    return _named(files)


def _of_folder(path: Path, spec: str, split: str) -> list[File]:
    found = find_split(path, split)
    if found is not None:
        return [_file(found)]
    shards = [p for name in SPLITS[split] for p in sorted(path.glob(f"**/{name}-*-of-*.*")) if p.suffix in READERS]
    every = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in READERS and p.is_file()]
    texts = every if split == "train" and all(p.suffix.lower() in _TEXTS for p in every) else []  # not a readme's
    splits = {name for names in SPLITS.values() for name in names}
    only = [p for p in every if p.parent == path and p.suffix.lower() not in _TEXTS and p.stem not in splits]
    only = [p for p in only if p.name == "conversations.json"] or only  # of an exported account
    if shards or texts or (split == "train" and len(only) == 1):
        return _named([_file(path) for path in shards or texts or only])
    wanted, known = ", ".join(f"{name}.jsonl" for name in SPLITS[split]), ", ".join(READERS)
    names = sorted(file.name for file in path.iterdir())
    has = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "no files"
    kinds = dict.fromkeys(Path(name).suffix for name in names if Path(name).suffix.lower() in READERS)
    way = f"; to read all of a kind, name them by a pattern: {Path(spec) / f'*{next(iter(kinds))}'}" if kinds else ""
    raise ConfigError(f"{spec}: no file for the {split} split; expected {wanted} (or {known}); it has {has}{way}")


def _named(files: Sequence[File]) -> list[File]:
    """Return files by names that differ: with the folders in which they are, if need be."""
    names = Counter(file.path.name for file in files)
    return [file._replace(name=str(file.path)) if names[file.path.name] > 1 else file for file in files]


def source_hash(spec: Paths, split: str) -> tuple[str, int]:
    """Hash what a source holds that is read row by row, and its name; return also how many rows it has, blank ones too.

    Raises:
        ConfigError: it is read whole.
        DataError: the hub did not return it.
    """
    if not isinstance(spec, str) and any(one.startswith(("hf:", "python:")) for one in spec):
        parts = [source_hash(one, split) for one in spec]
        return " ".join(name for name, _ in parts), sum(rows for _, rows in parts)
    if isinstance(spec, str) and spec.startswith("python:"):
        raise ConfigError("rows that a program gives are in memory already; leave data.stream out")
    if not isinstance(spec, str) or not spec.startswith("hf:"):
        files = find_files(spec, split)
        if whole := [file for file in files if file.kind not in STREAMED]:
            raise ConfigError(
                f"{whole[0].path}: a {whole[0].kind} file is read whole; data.stream is for {', '.join(STREAMED)} and "
                "data sets of the hub: convert it, or leave data.stream out"
            )
        return " ".join(f"{file.name} {digest(file.path)}" for file in files), sum(_count(file.path) for file in files)
    rows, name = _open_hub(spec, split)
    hashes = [digest(Path(file["filename"])) for file in getattr(rows, "cache_files", ())]
    if not hashes:
        hashed = blake2b(digest_size=16)
        for row in rows:
            hashed.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
        hashes = [hashed.hexdigest()]
    return f"{spec} {name} {len(rows)} {' '.join(hashes)}", len(rows)


def _count(path: Path) -> int:
    if path.suffix.lower() == ".parquet":
        with suppress(Exception):  # reading its rows says what is wrong
            import pyarrow.parquet as pq

            return int(pq.read_metadata(path).num_rows)
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def given_rows(rows: Iterable[Any], name: str = "rows") -> Iterator[Row | Problem]:
    """Yield rows that are objects of a program, each with its place in what the program calls `name`."""
    for i, row in enumerate(rows):
        where = f"{name}[{i}]"
        if isinstance(row, Mapping):
            yield Row(where, dict(row))
        else:
            yield Problem(where, f"is {type_name(row)}; expected a mapping of fields")


def find_split(folder: Path, split: str) -> Path | None:
    """Return the file of a folder with a split, or None; raise ConfigError if there are two."""
    candidates = [folder / f"{name}{suffix}" for name in SPLITS[split] for suffix in READERS]
    found = [path for path in candidates if path.exists() and not path.is_dir()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ConfigError(f"{folder}: {names} could both be the {split} split; name the file instead of the folder")
    return found[0] if found else None


def neighbour(path: Path) -> str:
    """Return a hint for a missing path: a similar name, or that its folder is missing too."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either"
    return nearest(path.name, [other.name for other in path.parent.iterdir()])


def _some(rows: Iterator[Row | Problem], name: str, notes: list[str]) -> Iterator[Row | Problem]:
    count = unused = 0
    for row in _threads(rows, notes):
        count += 1
        if isinstance(row, Row) and (chat := exported_chat(row.data)) is not None:
            if not chat["messages"]:
                unused += 1
                continue
            row = Row(row.where, chat)
        wrong = (_too_large(row.data) or half_character(row.data)) if isinstance(row, Row) else None
        yield row if wrong is None else Problem(row.where, wrong)
    if unused == count:
        raise DataError(f"{name}: no rows; expected at least one")
    if unused:
        notes.append(f"{name}: {unused:,} of {count:,} exported chats have no completion in text and are left out")


def _too_large(data: dict[str, Any]) -> str | None:
    """Return what is wrong with a row that is nested too deep or too long for later readers."""
    level: list[Any] = [data]
    for _ in range(_DEEPEST):
        level = [v for part in level for v in (part.values() if isinstance(part, dict) else part)]
        if most := max((len(v) for v in level if isinstance(v, str) and len(v) > _LONGEST), default=0):
            return f"the row has a text of {most:,} characters; expected at most {_LONGEST:,}: make several rows of it"
        level = [v for v in level if isinstance(v, (dict, list))]
        if not level:
            return None
    return f"the row is nested more than {_DEEPEST} deep"


def read_json(text: str) -> Any:
    """Parse the JSON of a row; raise ValueError also if a key is given twice, as one would be lost silently."""
    return parse_json(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is given twice in one object")
    return found


def _object(value: Any, where: str) -> Row | Problem:
    if isinstance(value, dict):
        return Row(where, value)
    return Problem(where, f"the row is {type_name(value)}; expected an object with named fields, {{...}}")


def type_name(value: Any) -> str:
    """Return a value's type by its JSON name, for messages."""
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def report_lines(lines: Sequence[str], count: int | None = None) -> str:
    """Return the first problems, a line each, and the number of others; of `count`, where not all are in `lines`."""
    count = len(lines) if count is None else count
    more = [f"... and {count - REPORTED} more"] if count > REPORTED else []
    return "\n".join([*(line if len(line) <= 500 else f"{line[:480]} ..." for line in lines[:REPORTED]), *more])


def _not_utf8(exc: UnicodeDecodeError, what: str = "the line") -> str:
    return f"byte {exc.start + 1} of {what} is not UTF-8 (0x{exc.object[exc.start]:02x}); save the file as UTF-8"


def _not_json(exc: ValueError | RecursionError) -> str:
    if not isinstance(exc, json.JSONDecodeError):
        return f"not valid JSON: {exc}"
    single = exc.doc[exc.pos : exc.pos + 1] == "'"
    hint = "; JSON has double quotes (in Python, write rows with json.dumps, not str)" if single else ""
    return f"not valid JSON: {exc.msg} at column {exc.colno}{hint}"


# --- json -------------------------------------------------------------------------------------------------------------

_CHUNK = 1 << 20  # characters that are read at once


def _first_line(path: Path) -> tuple[bytes, bool]:
    """Return the first line of a file that is not blank, at most 16 MiB of it, and whether there are others."""
    with path.open("rb") as file:
        first = b""
        while not first and (line := file.readline(1 << 24)):
            first = line.removeprefix(b"\xef\xbb\xbf").strip()
        return first, line.endswith(b"\n") and any(part.strip() for part in iter(lambda: file.read(1 << 20), b""))


def _read_jsonl(source: File, split: str, notes: list[str]) -> Iterator[Row | Problem]:
    first, several = _first_line(source.path)
    if first in (b"[", b"{") or (first.startswith(b"[{") and not several):  # JSON by another name
        yield from _read_values(source, split, notes)
        return
    damaged = False
    with source.path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{source.name}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield _object(read_json(line), where)
            except UnicodeDecodeError as exc:
                if not damaged and (likely := _encodings(_head(source.path), 2)) is not None:
                    yield _in_encoding(source, likely)
                    return
                damaged = True
                yield Problem(where, _not_utf8(exc))
            except (ValueError, RecursionError) as exc:
                yield Problem(where, _not_json(exc))


def _read_json(source: File, split: str, notes: list[str]) -> Iterator[Row | Problem]:
    """Return the rows of an array, of an object that wraps them, or of one object a line."""
    first, several = _first_line(source.path)
    lines = several and first.startswith(b"{") and not _wraps(source)
    return (_read_jsonl if lines else _read_values)(source, split, notes)


def _wraps(source: File) -> bool:
    """Return whether a file seems to be one object, which may wrap the rows: its first line is not a whole object."""
    first, several = _first_line(source.path)
    with suppress(ValueError, RecursionError):
        return first.startswith(b"{") and not (several and read_json(first.decode()))
    return first.startswith(b"{")


class _AtLine(ValueError):
    """What is wrong with JSON, and the line of the file."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(text)
        self.line = line


class _Values:
    """Decodes JSON values that follow each other in a file; in memory is what is not decoded yet."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._line = file, "", 0, 1
        self._decode = json.JSONDecoder(object_pairs_hook=_once).raw_decode

    def _more(self, size: int = _CHUNK) -> bool:
        if not (read := self._file.read(size)):
            return False
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + read, 0
        return True

    def sign(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def skip(self, sign: str) -> None:
        """Leave out the next character that is not white space; raise ValueError unless it is `sign`."""
        if self.sign() != sign:
            self.refuse(f"expected {sign!r}")
        self._at += 1

    def value(self) -> Any:
        """Return the next value; raise ValueError if it is not JSON."""
        self.sign()
        size = _CHUNK
        while True:
            try:
                found, end = self._decode(self._text, self._at)
                # A number may be longer.
                if end < len(self._text) or self._text[end - 1] in '}]"' or not self._more(size):
                    self._at = end
                    return found
            except json.JSONDecodeError as exc:
                if not self._more(size):
                    self.refuse(exc.msg, exc.pos)
            size *= 2  # so that a large value is tried a few times only

    def refuse(self, text: str, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        column = at - self._text.rfind("\n", 0, at)
        raise _AtLine(f"not valid JSON: {text} at column {column}", self._line + self._text.count("\n", 0, at))


def _read_values(source: File, split: str, notes: list[str]) -> Iterator[Row | Problem]:
    """Yield the rows of a JSON array, of objects that follow each other, or of one that wraps them."""
    name, index = source.name, 0
    try:
        with source.path.open(encoding="utf-8-sig") as file:
            values = _Values(file)
            array = values.sign() == "["
            if array:
                values.skip("[")
            while values.sign() not in ("", "]"):
                if array and index:
                    values.skip(",")
                    if values.sign() == "]":
                        values.refuse("a comma before ] (remove it)")
                value = values.value()
                if array or index or values.sign() or not isinstance(value, dict):
                    yield _object(value, f"{name}[{index}]")
                else:
                    yield from _unwrapped(value, source, split, notes)
                index += 1
            if array:
                values.skip("]")
    except UnicodeDecodeError:
        yield _not_text(source)
    except _AtLine as exc:
        yield Problem(f"{name}:{exc.line}", str(exc))
    except RecursionError:
        yield Problem(name, "not valid JSON: it is nested too deep")
    except DataError:
        raise
    except ValueError as exc:
        yield Problem(name, _not_json(exc))


def _not_text(source: File) -> Problem:
    """Return the line of a file that is not UTF-8, or the encoding of all of it."""
    if (likely := _encodings(_head(source.path), 2)) is not None:
        return _in_encoding(source, likely)
    with source.path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as exc:
                return Problem(f"{source.name}:{number}", _not_utf8(exc))
    return Problem(source.name, "it was changed while it was read")


def _unwrapped(value: dict[str, Any], source: File, split: str, notes: list[str]) -> Iterator[Row | Problem]:
    """Yield the rows of a file's only object: lists of rows by name, columns, rows by key, or a single row."""
    name = source.name
    lists = {key: rows for key, rows in value.items() if _are_rows(rows)}
    if all("row" in row and "row_idx" in row for row in lists.get("rows", [{}])):  # of the hub's viewer
        lists = {"rows": [row["row"] for row in lists["rows"]]}
    if source.part and source.part not in lists:
        has = f"it has {', '.join(lists)}" if lists else "it has none"
        raise DataError(f"{name}: no list of rows {source.part!r}{nearest(source.part, lists)}; {has}")
    if lists:
        key = source.part or _part_of(list(lists), source, split, notes)
        rows = [asked for row in lists[key] for asked in (_asked_of(row) or [row])]
        yield from (_object(row, f"{name}:{key}[{i}]") for i, row in enumerate(rows))
        return
    columns, cells = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(cells, list):  # as pandas splits a table
        yield from (Row(f"{name}[{i}]", dict(zip(map(str, columns), row))) for i, row in enumerate(cells))
        return
    inner = list(value.values())
    alike = all(isinstance(part, dict) and part and part.keys() == inner[0].keys() for part in inner)
    if alike and all(str(key).isdigit() for key in inner[0]):  # as pandas writes columns
        yield from (Row(f"{name}[{i}]", {key: value[key][i] for key in value}) for i in inner[0])
    elif alike and len(inner) > 1:
        yield from (Row(f"{name}:{key}", part) for key, part in value.items())
    elif all(_is_column(part) and len(part) == len(inner[0]) for part in inner):
        yield from (Row(f"{name}[{i}]", dict(zip(value, row))) for i, row in enumerate(zip(*inner)))
    elif len(inner) > 1 and all(isinstance(v, str) for v in inner) and not {plain_name(key) for key in value} & _KNOWN:
        notes.append(f"{name}: each name is read as a prompt, and its text as the completion")
        yield from (Row(f"{name}[{i}]", {"prompt": k, "completion": v}) for i, (k, v) in enumerate(value.items()))
    else:
        yield Row(f"{name}[0]", value)


def _part_of(names: Sequence[str], source: File, split: str, notes: list[str]) -> str:
    """Return the name of the list or sheet with the rows of a split: the one that is called so, or the only one.

    Raises:
        DataError: there are several.
    """
    called = _called(names, split)
    if not called and len(names) > 1:
        ways = " or ".join(shlex.quote(f"data.train={source.path}:{name}") for name in names)
        what = "sheets" if source.kind in _SHEETS else "lists"
        whole = shlex.quote(f"data.train=[{', '.join(f'{source.path}:{name}' for name in names)}]")
        raise DataError(f"{source.name}: {len(names)} {what} have rows; name one: {ways}; or all of them: {whole}")
    if len(names) > 1:
        notes.append(f"{source.name}: of {', '.join(names)}, {called} is read")
    return called or names[0]


def _called(names: Iterable[str], split: str) -> str:
    plain = {name: re.sub(r"_(set|data|dataset|split|rows)\Z", "", plain_name(name)) for name in names}
    return next((name for alias in SPLITS[split] for name, called in plain.items() if called == alias), "")


def split_in(spec: Paths, split: str) -> str:
    """Return a source's own rows of a split: a folder's file, or the list or sheet of a file that has one for training.

    "" if there is none.
    """
    path = home_path(spec) if isinstance(spec, str) else Path()
    if not isinstance(spec, str) or not path.exists():
        return ""
    if path.is_dir():
        return str(find_split(path, split) or "")
    seen = path.stat()
    names = _parts_in(File(path, "", path.name), (seen.st_mtime_ns, seen.st_size))
    name = _called(names, split) if _called(names, "train") else ""
    return f"{spec}:{name}" if name else ""


@functools.lru_cache(maxsize=16)
def _parts_in(source: File, seen: tuple[int, int]) -> list[str]:
    """Return the names of a .json file's lists of rows, or of a spreadsheet's visible sheets; `seen`: its state."""
    with suppress(ValueError, RecursionError, OSError, DataError, ConfigError):
        if source.kind in _SHEETS:
            return list(_sheets(source))
        if source.kind == ".json" and _wraps(source):
            return [key for key, rows in read_json(source.path.read_text("utf-8-sig")).items() if _are_rows(rows)]
    return []


def _asked_of(article: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the questions on an article of SQuAD's own file, each with its context; none of another row."""
    parts = article.get("paragraphs")
    if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("qas"), list) for p in parts):
        return []
    found = [(part.get("context"), asked) for part in parts for asked in part["qas"] if isinstance(asked, dict)]
    return [
        {**asked, "context": context, "answers": [a.get("text") for a in asked.get("answers") or []]}
        for context, asked in found
    ]


def _is_column(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not any(isinstance(cell, dict | list) for cell in value)


def _are_rows(value: Any) -> bool:
    """Return whether a value is a list of objects that are no turns of a chat."""
    turn = {"role", "from", "speaker", "sender"}
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and not turn & v.keys() for v in value)


# --- exported chats ---------------------------------------------------------------------------------------------------
# ChatGPT exports a conversation as a tree of messages, with `current_node` at the end of the branch that was kept, and
# Claude as a list with senders. The texts of user and assistant are read; tools, files and thoughts are left out.


def exported_chat(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row of `messages` of a conversation that ChatGPT or Claude exported; None of another row.

    It ends with a completion, and has no message where there is none.
    """
    nodes, chat = row.get("mapping"), row.get("chat_messages")
    if isinstance(chat, list) and all(isinstance(turn, dict) and "sender" in turn for turn in chat):
        said = [(str(turn["sender"]).replace("human", "user"), _claude_text(turn)) for turn in chat]
    elif isinstance(nodes, dict) and all(isinstance(node, dict) and "message" in node for node in nodes.values()):
        said = [_chatgpt_turn(node.get("message")) for node in _branch(nodes, row.get("current_node"))]
    else:
        return None
    return _conversation([(role, text) for role, text in said if role in ("user", "assistant")])


def _conversation(said: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return a row of `messages`, those of one role joined, from a prompt on to the last completion."""
    turns: list[dict[str, str]] = []
    for role, text in said:
        if not text.strip() or (role == "assistant" and not any(turn["role"] == "user" for turn in turns)):
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{text}"
        else:
            turns.append({"role": role, "content": text})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    return {"messages": turns}


# Who speaks in a conversation -> the role.
_USERS = (
    *("human", "user", "prompter", "customer", "client", "patient", "question", "instruction"),
    *("end-user", "end user", "end_user", "visitor", "guest", "caller", "requester", "buyer"),
)
_ASSISTANTS = (
    *("gpt", "assistant", "bot", "chatbot", "ai", "agent", "model", "doctor", "answer"),
    *("operator", "support", "support agent", "admin", "representative", "seller"),
)
SPOKEN = {
    **dict.fromkeys(_USERS, "user"),
    **dict.fromkeys(_ASSISTANTS, "assistant"),
    "system": "system",
}
_OF = tuple(
    f"{name}{end}"
    for end in ("_id", "")
    for name in ("conversation", "conv", "dialog", "dialogue", "thread", "session", "chat", "ticket")
)
_TALKERS = {*_USERS, *_ASSISTANTS} - {"question", "answer"}  # their turns are parts of conversations
SPEAKERS = ("role", "speaker", "sender", "author_role", "author_type", "sender_role", "sender_type")
_BY = (*SPEAKERS, "author", "from")
_SAYS = ("content", "text", "message", "body", "utterance")


def _turn_columns(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the columns of a row that say in which conversation it is a turn, who speaks and what; else None."""
    names = {plain_name(name): name for name in row}
    of, by, says = (next((names[name] for name in usual if name in names), "") for usual in (_OF, _BY, _SAYS))
    turn = of and by and says and isinstance(row[of], str | int) and isinstance(row[says], str)
    return (of, by, says) if turn and str(row[by]).strip().casefold() in SPOKEN else None


def _turn_rows(rows: Sequence[Row | Problem], notes: list[str]) -> Sequence[Row | Problem]:
    """Join rows that are turns, as a help desk exports them, into conversations; return other rows as they are."""
    found = [row for row in rows if isinstance(row, Row)]
    columns = {_turn_columns(row.data) for row in found}
    if len(columns) > 1 or not (named := columns.pop()):
        return rows
    of, by, says = named
    talks: dict[Any, list[Row]] = {}
    for row in found:
        talks.setdefault(row.data[of], []).append(row)
    if len(talks) == len(found):
        return rows
    chats = (
        Row(turns[0].where, _conversation([(SPOKEN[t.data[by].strip().casefold()], t.data[says]) for t in turns]))
        for turns in talks.values()
    )
    whole = [chat for chat in chats if chat.data["messages"]]
    count = f"{len(found):,} rows are joined to {counted(len(whole), 'conversations')}"
    notes.append(f"{count}: {of} says which, {by} who speaks, and {says} what")
    return [*(row for row in rows if isinstance(row, Problem)), *whole]


_TREE = {"message_id", "parent_id", "role", "text"}


def _threads(rows: Iterator[Row | Problem], notes: list[str]) -> Iterator[Row | Problem]:
    """Join rows that are messages of trees, as OpenAssistant publishes them, into conversations: each best branch."""
    first = next(rows, None)
    rows = rows if first is None else chain([first], rows)
    if first is None or isinstance(first, Problem):
        yield from rows
        return
    if not first.data.keys() >= _TREE:
        yield from _turn_rows(list(rows), notes) if _turn_columns(first.data) else rows
        return
    found = [row for row in rows if isinstance(row, Row)]
    replies: dict[Any, list[Row]] = {}
    for row in found:
        replies.setdefault(row.data.get("parent_id"), []).append(row)
    for root in (row for row in found if row.data.get("parent_id") is None):
        at, turns = [root], list[dict[str, Any]]()
        while at:
            best = min(at, key=lambda row: row.data["rank"] if isinstance(row.data.get("rank"), int | float) else 1e9)
            role = str(best.data.get("role")).replace("prompter", "user")
            turns.append({"role": role, "content": best.data.get("text")})
            at = replies.get(best.data.get("message_id"), []) if len(turns) < len(found) else []
        if turns[-1]["role"] == "user":
            turns.pop()
        if turns:
            yield Row(root.where, {"messages": turns})
    notes.append(f"{len(found):,} messages are joined to conversations, each of the best-ranked replies")


def _branch(nodes: dict[Any, Any], leaf: Any) -> list[Any]:
    """Return the nodes from the root to a leaf; to the last one, if it is not named."""
    parents = {node.get("parent") for node in nodes.values()}
    at = leaf if leaf in nodes else next((name for name in reversed(nodes) if name not in parents), None)
    found: dict[Any, Any] = {}
    while at in nodes and at not in found:
        found[at] = nodes[at]
        at = nodes[at].get("parent")
    return list(found.values())[::-1]


def _chatgpt_turn(message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        return "", ""
    about, content = message.get("metadata") or {}, message.get("content") or {}
    hidden = about.get("is_visually_hidden_from_conversation") or message.get("recipient", "all") != "all"
    if hidden or content.get("content_type") not in ("text", "multimodal_text"):
        return "", ""
    parts = [part for part in content.get("parts") or [] if isinstance(part, str) and part.strip()]
    return str((message.get("author") or {}).get("role")), "\n\n".join(parts)


def _claude_text(turn: Mapping[str, Any]) -> str:
    parts = turn.get("content")
    texts = [p.get("text") or "" for p in parts if isinstance(p, dict) and p.get("type") == "text"] if parts else []
    return "\n\n".join(texts) if any(texts) else str(turn.get("text") or "")


# --- tables -----------------------------------------------------------------------------------------------------------
# csv and spreadsheets: a header and rows of cells, all of them texts.

_Cells: TypeAlias = tuple[str, list[str]]  # a row of a table, with its place
_DELIMITERS = ",;\t|"
_TITLES = 20  # rows above a header
_USUAL = {
    "prompt": "prompt question front query instruction request problem user human q ask input user_message user_input "
    "user_prompt user_query input_messages patient customer client frage anfrage eingabe aufgabe anweisung pregunta "
    "consulta entrada instruccion demande requete consigne domanda pergunta vraag вопрос 问题 指令 質問",
    "completion": "completion answer back response output reply assistant target solution a bot gpt summary highlights "
    "ideal expected_output model_output model_response doctor agent expert assistant_response assistant_message "
    "antwort ausgabe loesung losung zusammenfassung respuesta salida reponse sortie resume risposta resposta antwoord "
    "ответ 回答 答案 输出",
    "input": "input context passage kontext contexte contexto",
    "system": "system system_prompt system_message system_instruction",
    "text": "text content document body article passage page_content paragraph story texte texto inhalt testo",
    "turns": "messages message conversations conversation dialog dialogue dialogs chat chats turns contents",
    "chosen": "chosen preferred better accepted winner win chosen_response good_response response_chosen "
    "preferred_output",
    "rejected": "rejected dispreferred worse loser lose rejected_response bad_response response_rejected "
    "non_preferred_output",
    "label": "label is_good good thumbs_up thumbs thumb desirable liked like feedback user_feedback vote verdict "
    "reaction",
    "class": "label labels class sentiment intent emotion",
    # A name with such a word is that of a field, unless another word says that it is about the text.
    "prompt word": "prompt question query instruction frage anfrage pregunta user",
    "completion word": "completion answer response reply antwort reponse respuesta assistant",
    "chosen word": "chosen preferred accepted good better best winning",
    "rejected word": "rejected dispreferred bad worse worst losing",
    "about": "id ids idx index type count number no nr num date time start end score len length tokens url link lang "
    "language model source category original author name title status quality rating hash",
}
USUAL_NAMES = {field: set(names.split()) for field, names in _USUAL.items()}
_KNOWN = set().union(*(names for field, names in USUAL_NAMES.items() if " " not in field and field != "about"))


def plain_name(name: str) -> str:
    """Return a column's name in lower case, without accents and signs: `Réponse (texte)` is `reponse_texte`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    text = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)).casefold()
    return re.sub(r"[\W_]+", "_", text).strip("_")


def _header_at(lines: Sequence[_Cells | Problem]) -> int:
    """Return which line of a table is its header: the first with more than one cell, if any has, else the first.

    A title of several cells may stand above it: a line without a usual name, before one with two.
    """
    filled = [(i, cells) for i, line in enumerate(lines[:_TITLES]) if _filled(cells := _cells_in(line))]
    wide = [
        (i, {plain_name(cell) for cell in cells if cell.strip()} & _KNOWN) for i, cells in filled if _filled(cells) > 1
    ]
    if wide and not wide[0][1]:
        return next((i for i, names in wide if len(names) > 1), wide[0][0])
    return wide[0][0] if wide else filled[0][0] if filled else len(lines)


def _cells_in(line: _Cells | Problem) -> list[str]:
    return [] if isinstance(line, Problem) else line[1]


def _table(lines: Sequence[_Cells | Problem], source: File, notes: list[str]) -> Iterator[Row | Problem]:
    """Yield the rows of a table.

    Raises:
        DataError: most values of a column are missing: spreadsheet programs compute them, others write none.
    """
    at = _header_at(lines)
    above = [" ".join(cells).strip() for line in lines[:at] if _filled(cells := _cells_in(line))]
    header = [cell.strip() for cell in _cells_in(lines[at])] if at < len(lines) else []
    if twice := sorted({cell for cell in header if cell and header.count(cell) > 1}):
        text = f"the header names {', '.join(map(repr, twice))} twice; the first line must name each column once"
        yield Problem(str(lines[at][0]), text)
        return
    body = [cells for line in lines[at + 1 :] if _filled(cells := _cells_in(line))]
    lost = Counter(name for cells in body for name, cell in zip(header, cells) if name and cell in _LOST)
    if gone := [name for name, count in lost.items() if 2 * count >= len(body)]:
        raise DataError(
            f"{source.name}: {', '.join(map(repr, gone))}: the formulas have no stored value, or an error (#REF!); "
            "open the file and save it in a spreadsheet program, so that values are stored, or remove the column"
        )
    yield from (line for line in lines[:at] if isinstance(line, Problem))
    empty, pending, unnamed = 0, 0, 0
    for line in lines[at + 1 :]:
        if isinstance(line, Problem):
            yield line
            continue
        where, cells = line
        if not _filled(cells):
            pending += len(cells) > 1  # a blank line of one column is not even an empty row
            continue
        empty, pending = empty + pending, 0
        if len(cells) < len(header) or _filled(cells[len(header) :]):
            names = [name for name in header if name]
            yield Problem(where, f"{len(cells)} columns; the header names {len(names)} ({', '.join(names)})")
        else:
            unnamed += any(cell.strip() and not name for name, cell in zip(header, cells))
            yield Row(where, {name: "" if cell in _LOST else cell for name, cell in zip(header, cells) if name})
    notes += [f"{source.name}: what stands above the header is left out: {above[0][:60]}"] if above else []
    notes += [f"{source.name}: {', '.join(lost)}: {counted(lost.total(), 'formulas have no value')}"] if lost else []
    notes += [f"{source.name}: {counted(empty, 'empty rows are left out')}"] if empty else []
    notes += (
        [f"{source.name}: {counted(unnamed, 'rows have cells in columns without a name, not used')}"] if unnamed else []
    )


# What a formula shows that has no value.
_LOST = {
    *["#REF!", "#N/A", "#NAME?", "#VALUE!", "#DIV/0!", "#NULL!", "#NUM!", "#SPILL!", "#CALC!"],
    *(f"Err:{n}" for n in range(501, 541)),
}


def _filled(cells: Sequence[str]) -> int:
    return sum(1 for cell in cells if cell.strip())


def _read_csv(source: File, split: str, notes: list[str]) -> Iterator[Row | Problem]:
    lines = _text_lines(source, notes)
    if bad := [line for line in lines if isinstance(line, Problem)]:
        # A row of such a file may span a bad line: what the others hold is not certain either.
        yield from bad
        return
    texts = [str(line) for line in lines]
    start, delimiter = 0, ""
    if texts and (named := re.fullmatch(r"sep=(.)\s*", texts[0])):  # as Excel writes and reads it
        start, delimiter = 1, named[1]
    elif texts and (named := re.fullmatch(r"#separator:(.+?)\s*", texts[0])):  # a deck of Anki
        delimiter = _ANKI.get(named[1].casefold(), named[1][0])
        about = next((i for i, text in enumerate(texts) if not text.startswith("#")), len(texts))
        own = next((text[len("#columns:") :] for text in texts[:about] if text.startswith("#columns:")), "")
        start, texts[about - 1] = about - 1, own or delimiter.join(_CARD[: texts[about].count(delimiter) + 1]) + "\n"
    # The stdlib's limit of 128 KiB a field is less than a long document; it is one for the whole process.
    limit = csv.field_size_limit(_MAX_CSV_FIELD)
    try:
        delimiter = delimiter or _delimiter(texts[start:_SNIFFED])
        rows = list(_csv_rows(texts[start:], delimiter, source.name, start))
        if any(isinstance(row, Problem) for row in rows) and any('\\"' in text for text in texts):
            escaped = list(_csv_rows(texts[start:], delimiter, source.name, start, doublequote=False, escapechar="\\"))
            rows = rows if any(isinstance(row, Problem) for row in escaped) else escaped
    finally:
        csv.field_size_limit(limit)
    yield from _table(rows, source, notes)


_ANKI = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "colon": ":", "space": " "}
_CARD = ("Front", "Back", "Tags")
_SNIFFED = 2000  # lines that show the delimiter


def _delimiter(lines: Sequence[str]) -> str:
    """Return what stands between the columns: of what the header has, that with the most rows of its width."""
    best, most = "\x1f", 0.0  # a single column, whose texts may have any sign
    for sign in _DELIMITERS:
        widths = [len(cells) for cells in csv.reader(lines, delimiter=sign) if _filled(cells)]
        share = sum(width == widths[0] for width in widths) / len(widths) if widths and widths[0] > 1 else 0.0
        if share > most:
            best, most = sign, share
    return best


def _csv_rows(lines: Sequence[str], delimiter: str, name: str, start: int, **how: Any) -> list[_Cells | Problem]:
    """Return the rows of a csv file with their places, and in place of a row what is wrong with its quotes."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True, **how)
    found: list[_Cells | Problem] = []
    spanning, doubtful = 0, list[tuple[int, int, int]]()
    width = 0
    while True:
        first = reader.line_num
        where = f"{name}:{start + first + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as exc:
            hint = f"a quote that opens a text here has no end, or stands within it: write {_QUOTES}"
            found.append(Problem(where, f"not valid CSV: {exc}; {hint}"))
            continue
        width = width or len(cells)
        if (taken := reader.line_num - first) > 1:
            spanning += 1
            inner = [line.count(delimiter) for line in lines[first : reader.line_num]]
            if taken >= _SWALLOWED and width > 1 and set(inner) == {width - 1}:
                doubtful.append((len(found), start + first + 1, start + reader.line_num))
        found.append((where, cells))
    # Where most texts of several lines look so, they are meant so.
    for at, begin, end in doubtful:
        if 2 * len(doubtful) > spanning or end - begin >= 4 * _SWALLOWED:
            lost = f"a quote in line {begin} swallows the rows up to line {end}: remove it, or write {_QUOTES}"
            found[at] = Problem(f"{name}:{begin}", lost)
    return found


_QUOTES = '"" for a quote within a quoted text'
_SWALLOWED = 4  # lines of a text which all look like rows


def _text_lines(source: File, notes: list[str]) -> list[str | Problem]:
    """Return the lines of a text in any usual encoding, and in place of a line what is wrong with it."""
    raw = source.path.read_bytes()
    nulls, even = raw[:2000].count(b"\0"), raw[:2000:2].count(b"\0")
    encoding = "utf-8-sig"  # with a mark or without
    if raw.startswith(_UTF_16):
        encoding = "utf-16"
    elif 4 * nulls > len(raw[:2000]):
        encoding = "utf-16-be" if 2 * even > nulls else "utf-16-le"
    with suppress(UnicodeDecodeError):
        text = raw.decode(encoding)
        if encoding != "utf-8-sig":
            notes.append(f"{source.name}: read as {encoding.upper()}")
        return list(io.StringIO(text, newline=""))
    if encoding != "utf-8-sig":
        return [Problem(source.name, f"is not {encoding.upper()} throughout, as it begins; save it as UTF-8")]
    if (likely := _encodings(raw)) is None:  # damaged, and not in another encoding
        lines: list[str | Problem] = []
        for number, line in enumerate(raw.splitlines(keepends=True), 1):
            try:
                lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as exc:
                lines.append(Problem(f"{source.name}:{number}", _not_utf8(exc)))
        return lines
    name = likely[0].lower().replace("-", "_") if likely else ""
    if name not in _READ or (len(likely) > 1 and "MAC-ROMAN" in likely):
        return [_in_encoding(source, likely)]
    notes.append(f"{source.name}: is not UTF-8 and read as {name}; look at a row with accents")
    return list(io.StringIO(raw.decode(name, "replace"), newline=""))


_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1 << 20)


def _encodings(raw: bytes, least: int = 1) -> list[str] | None:
    """Return the likely encodings of bytes that are not UTF-8, the best first; None of UTF-8 with damaged lines.

    Args:
        least: lines that are not UTF-8, without which a file is damaged.
    """
    decoded = [line.decode("utf-8-sig", "replace") for line in raw.splitlines() if not line.isascii()]
    damaged = least if raw.startswith(_UTF_16) else sum("\ufffd" in line for line in decoded)
    if 2 * damaged <= len(decoded) or damaged < least:
        return None
    with suppress(UnicodeDecodeError):
        return None if raw.decode("utf-8-sig", "surrogatepass") else []  # UTF-8 with halves of characters
    if raw.startswith(_UTF_16):
        return ["UTF-16"]
    start = raw[: 1 << 16]
    start = start[: start.rfind(b"\n") + 1] or start  # no character is cut
    odds: dict[str, tuple[float, bool, str]] = {}  # by text, since several encodings may give the same
    for encodings, letters in _alphabets():
        for name in encodings.split():
            with suppress(UnicodeDecodeError):
                text = start.decode(name)
                # Few texts with kana are Chinese.
                odd = _oddness(text, letters), letters is not _alphabets()[-1][1] or _KANA.isdisjoint(text), name
                odds[text] = min(odds.get(text, odd), odd, key=lambda found: found[:2])
    ranked = sorted(odds.values(), key=lambda found: found[:2])
    names = [name for odd, _, name in ranked if odd <= min(_MOST_ODD, ranked[0][0] + 0.02)]
    if not names:
        from charset_normalizer import from_bytes

        names = [each.encoding for each in from_bytes(start) if each.encoding not in _READ]
    return [name.upper().replace("_", "-") for name in names[:2]]


# Which encoding a short text has, its letters show: those of one language, small within words. (charset-normalizer,
# which knows more encodings, takes Hungarian for French and EUC-JP for Korean where a file has a few rows.)
_READ = ("cp1252", "mac_roman")
_MOST_ODD = 0.1  # share of the letters that the language does not have
_INNER = "‚“”„…€£§°«»‹›¿¡•®™©×²±½"  # signs that do not stand within words
_SIGNS = frozenset(f"{_INNER}’‘–—·\xa0") | {chr(c) for c in (*range(0x3000, 0x3040), *range(0xFF01, 0xFF5F))}
_WESTERN = "äöüß éèêëàâæçîïôœùûüÿ áéíñóúü ãáâàçéêíóôúü àèéìíòóùú áéëïíóöüú åäöé æøåéó àçèéíïòóúü"
_CYRILLIC = (
    "абвгдеёжзийклмнопрстуфхцчшщъыьэюя абвгґдеєжзиіїйклмнопрстуфхцчшщьюя абвгдеёжзійклмнопрстуўфхцчшыьэюя "
    "абвгдђежзијклљмнњопрстћуфхцчџшѓќѕ"
)
# Encodings, and the letters of each language that is written in them; of those that fit as well the first is taken.
_LETTERS = (
    ("cp1252", _WESTERN),
    ("cp1250 iso8859_2", "ąćęłńóśźż áčďéěíňóřšťúůýž áäčďéíľňóôšťúýž áéíóöőúüű ăâîșşțţ čćđšž"),
    ("cp1254", "çğıöşüâîi"),
    ("mac_roman cp850", _WESTERN),
    ("cp1255", "".join(map(chr, range(0x5D0, 0x5EB)))),
    ("cp1251 koi8_r koi8_u cp866 iso8859_5 mac_cyrillic", _CYRILLIC),
    ("cp1253 iso8859_7", "αβγδεζηθικλμνξοπρστυφχψωςάέήίόύώϊϋΐΰ"),
    ("cp1256", "".join(map(chr, range(0x60C, 0x670)))),
    ("cp1257", "ąčęėįšųūž āčēģīķļņšūž äõöüšž"),
)
_THAI = frozenset(map(chr, range(0xE01, 0xE5C)))
_RARE = frozenset("ðýþ")  # Icelandic; a few of them alone are Turkish or Croatian in another encoding
_KANA = frozenset(map(chr, range(0x3041, 0x3100)))


@functools.cache
def _alphabets() -> list[tuple[str, list[frozenset[str]]]]:
    """Return encodings, and the letters of their languages; of East Asian ones the usual characters."""

    def usual(encoding: str, first: int, last: int) -> frozenset[str]:
        codes = (bytes([a, b]) for a in range(first, last + 1) for b in (*range(0x40, 0x7F), *range(0xA1, 0xFF)))
        return frozenset("".join(code.decode(encoding, "ignore") for code in codes)) - frozenset(map(chr, range(128)))

    return [
        *((encodings, list(map(frozenset, letters.split()))) for encodings, letters in _LETTERS),
        ("cp949", [usual("euc_kr", 0xB0, 0xC8)]),
        ("gb18030", [usual("gb2312", 0xB0, 0xD7)]),
        ("cp950", [usual("big5", 0xA4, 0xC6)]),
        ("cp874", [_THAI]),
        ("cp932 euc_jp", [usual("euc_jp", 0xB0, 0xCF) | _KANA]),
    ]


def _oddness(text: str, alphabets: Sequence[frozenset[str]]) -> float:
    """Return the share of a text's letters, without ASCII, that no single alphabet has, or not so within a word."""
    text = re.sub("õe", "", text, flags=re.IGNORECASE)  # Portuguese; õ alone is Hungarian in another encoding
    seen = Counter(c.lower()[0] for c in text if not c.isascii() and c not in _SIGNS)
    odd: float = min(sum(n for c, n in seen.items() if c not in letters) for letters in alphabets)
    together = _RARE.union(*alphabets)  # of several languages
    odd = min(odd, sum(n for c, n in seen.items() if c not in together) + 0.06 * seen.total())
    odd += len(re.findall(rf"(?<=[^\W\d_])[{_INNER}](?=[^\W\d_])|(?<=\w)[¿¡]|(?<=[a-z])±", text))
    odd += len(re.findall(r"(?<=[A-Za-z])[\u0370-\u1fff]|[\u0370-\u1fff](?=[A-Za-z])", text))
    odd += sum(after.isupper() and before.islower() and not after.isascii() for before, after in pairwise(text))
    capitals = sum(c.isupper() - c.islower() for c in text if not c.isascii()) > 0
    return odd / max(1, seen.total()) + 0.05 * capitals


def _in_encoding(source: File, likely: Sequence[str]) -> Problem:
    """Return what is wrong with a file in another encoding, and the command that converts it."""
    path, out = source.path, source.path.with_stem(f"{source.path.stem}-utf8")
    seen = f", but probably {' or '.join(likely)}" if likely else ""
    way = f"iconv -f {likely[0] if likely else 'ENCODING'} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(out))}"
    return Problem(source.name, f"is not UTF-8{seen}; save it as UTF-8, or convert it: {way}")


def _read_sheets(source: File, split: str, notes: list[str]) -> Iterator[Row | Problem]:
    sheets = _sheets(source)
    own = _called(sheets, split)  # though it is empty: no other sheet stands for it
    filled = [name for name, rows in sheets.items() if name == own or sum(map(bool, map(_filled, rows))) > 1]
    name = source.part or _part_of(filled or list(sheets)[:1] or [""], source, split, notes)
    if len(filled) == 1 < len(sheets):
        notes.append(f"{source.name}: sheet {name} is read, the only one with rows")
    place = f"{source.name}:{name}" if source.part else source.name
    cells = sheets.get(name, [])
    for row, column in _without_values(source.path, name):
        if row < len(cells) and column < len(cells[row]) and not cells[row][column]:
            cells[row][column] = "#VALUE!"
    yield from _table([(f"{place}:{i}", row) for i, row in enumerate(cells, 1)], source, notes)


def _sheets(source: File) -> dict[str, list[list[str]]]:
    """Return the cells of the visible sheets by name, or of the sheet that is named."""
    try:
        import python_calamine as calamine
    except ImportError as exc:
        raise ConfigError(f"{source.name}: {missing_extra('python-calamine', 'data')}") from exc
    try:
        with source.path.open("rb") as file, calamine.CalamineWorkbook.from_filelike(file) as book:
            shown = [s.name for s in book.sheets_metadata if s.visible == calamine.SheetVisibleEnum.Visible]
            if source.part and source.part not in book.sheet_names:
                hint = nearest(source.part, book.sheet_names)
                raise DataError(f"{source.name}: no sheet {source.part!r}{hint}; it has {', '.join(book.sheet_names)}")
            names = [source.part] if source.part else shown
            return {name: _cells_of(book.get_sheet_by_name(name)) for name in names}
    except DataError:
        raise
    except (calamine.CalamineError, OSError, ValueError) as exc:
        raise DataError(f"{source.name}: not a readable spreadsheet: {' '.join(str(exc).split())[:300]}") from exc


def _without_values(path: Path, sheet: str) -> Iterator[tuple[int, int]]:
    """Yield row and column of the formulas of an xlsx file that have an error or no stored value, from 0.

    python-calamine does not distinguish them from empty cells.
    """
    if not zipfile.is_zipfile(path):
        return
    with suppress(KeyError, zipfile.BadZipFile, ElementTree.ParseError), zipfile.ZipFile(path) as book:
        tops = [ElementTree.fromstring(book.read(f"xl/{name}")) for name in ("workbook.xml", "_rels/workbook.xml.rels")]
        named = {key: tag.get("name") for tag in tops[0].iter() for key in tag.attrib.values()}
        target = next((tag.get("Target", "") for tag in tops[1] if named.get(tag.get("Id", "")) == sheet), "")
        text = book.read(target.lstrip("/") if target.startswith("/") else f"xl/{target}")
        for cell in re.finditer(rb"<c\b([^>]*)(?<!/)>(.*?)</c>", text, re.S):
            at = re.search(rb'\br="([A-Z]+)(\d+)"', cell[1])
            kept = b't="str"' in cell[1] or re.search(rb"<v>[^<]", cell[2])
            if at and (b't="e"' in cell[1] or (b"<f" in cell[2] and not kept)):
                column = functools.reduce(lambda sum, letter: 26 * sum + letter - 64, at[1], 0)
                yield int(at[2]) - 1, column - 1


def _cells_of(sheet: Any) -> list[list[str]]:
    """Return a sheet's cells as texts; those that are merged over rows each have the value that they show."""
    rows = [[_cell(value) for value in row] for row in sheet.to_python(skip_empty_area=False)]
    for (top, left), (bottom, _) in sheet.merged_cell_ranges or ():
        for row in filter(_filled, rows[top : bottom + 1]):  # and not a header that is merged over an empty row
            row[left] = rows[top][left]
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat(" ")
    return value.isoformat() if isinstance(value, date | time) else str(value)


# --- texts ------------------------------------------------------------------------------------------------------------

_PIECE = 4000  # characters of a row that is cut from a long text: some 1,000 tokens


def _read_text(source: File, split: str, notes: list[str]) -> Iterator[Row | Problem]:
    """Yield a text as one row; a long one as rows of whole paragraphs, lines or sentences, if there are some."""
    lines = _text_lines(source, notes)
    if bad := [line for line in lines if isinstance(line, Problem)]:
        yield from bad
        return
    text = "".join(map(str, lines)).replace("\r\n", "\n").strip()
    if asked := _asked_in(text):
        yield from (Row(f"{source.name}:{line}", row) for line, row in asked)
        notes.append(
            f"{source.name}: each question with its answer is a row; data.format: text trains both as they stand"
        )
        return
    talkers = [mark[1] for mark in _MARK.finditer(text) if plain_name(mark[1]) in _TALKERS]
    if len(talkers) >= 4 and len(set(talkers)) == 2:
        seen = " and ".join(f"{name}:" for name in talkers[:2])
        notes.append(f"{source.name}: has turns of {seen}, and is read as a text; for a chat, write rows of messages")
    pieces = _pieces(text)
    for i, piece in enumerate(pieces):
        yield Row(source.name if len(pieces) == 1 else f"{source.name}[{i}]", {"text": piece})
    if len(pieces) > 1:
        count = f"{len(text):,} characters in {len(pieces):,} rows"
        notes.append(f"{source.name}: {count}, cut between paragraphs, each of at most {_PIECE:,} characters")


_MARK = re.compile(r"^[ \t#>*_-]*([^\W\d_]+)[ .]?\d*(?:\*\*|__)?[:：](?:\*\*|__)?[ \t]*", re.MULTILINE)
_ABOVE = re.compile(r"\s*(?:#+ .*|[-*_]{3,}\s*)?")  # a heading or a rule above the next question


def _asked_in(text: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the questions and answers of a text that is made of them (`Q: ... A: ...`), each pair with its line."""
    found = [(mark, plain_name(mark[1])) for mark in _MARK.finditer(text)]
    asks, says = ([m for m in found if m[1] in USUAL_NAMES[side] - _TALKERS] for side in ("prompt", "completion"))
    marks = sorted([*asks, *says], key=lambda m: m[0].start())
    alternate = len(asks) == len(says) > 1 and marks[::2] == asks and len({name for _, name in marks}) == 2
    if not alternate or text[: marks[0][0].start()].strip().count("\n") > 2:
        return []
    ends = [*(mark.start() for mark, _ in marks[1:]), len(text)]
    rows, line, before = [], 1, 0
    for (ask, _), (say, _), end in zip(marks[::2], marks[1::2], ends[1::2]):
        line, before = line + text.count("\n", before, ask.start()), ask.start()
        prompt = text[ask.end() : say.start()].strip()
        if prompt[-2:] in ("**", "__") and prompt.count(prompt[-2:]) % 2:  # it began before the mark
            prompt = prompt[:-2].rstrip()
        said = text[say.start() : end].split("\n")
        while len(said) > 1 and _ABOVE.fullmatch(said[-1]):
            said.pop()
        answer = "\n".join(said).rstrip()
        completion = answer[len(say[0]) :].strip()
        rows.append((line, {"prompt": prompt, "completion": completion, "text": text[before : say.start()] + answer}))
    return rows if all(all(row.values()) for _, row in rows) else []


def _pieces(text: str) -> list[str]:
    pieces: list[str] = []
    while len(text) > _PIECE:
        ends = (text.rfind(sign, _PIECE // 4, _PIECE) for sign in ("\n\n", "\n", ". ", " "))
        at = next((end + 1 for end in ends if end > 0), _PIECE)
        pieces.append(text[:at].strip())
        text = text[at:].lstrip()
    return [*pieces, text] if text else pieces


def _read_parquet(source: File, split: str, notes: list[str]) -> Iterator[Row | Problem]:
    path = source.path
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(f"{source.name}: {missing_extra('pyarrow', 'data')}") from exc
    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{source.name}: has two columns {', '.join(map(repr, twice))}; expected each name once")
        for batch in file.iter_batches():
            kind = pa.struct(batch.schema) if "map<" in str(batch.schema) else None
            for data in _batch_rows(batch):
                number += 1
                where = f"{source.name}:{number}"
                if isinstance(data, UnicodeDecodeError):
                    yield Problem(where, _not_utf8(data, "a text"))
                else:
                    yield Row(where, _without_gaps(data, kind))
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError) as exc:  # as it is damaged
        raise DataError(f"{source.name}: not a readable parquet file: {' '.join(str(exc).split())[:300]}") from exc


def _batch_rows(batch: Any) -> list[Any]:
    """Return the rows of an Arrow batch, with an error in place of a row whose texts are not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as exc:
        if batch.num_rows == 1:
            return [exc]
        return [row for i in range(batch.num_rows) for row in _batch_rows(batch.slice(i, 1))]


def _without_gaps(value: Any, kind: Any = None, sparse: bool = False) -> Any:
    """Remove the null keys that Arrow adds to every struct, from descriptions and calls of tools (`sparse`).

    Other nulls may be intended. The value's Arrow type, `kind`, distinguishes maps from structs.
    """
    if isinstance(value, dict):
        kinds = {} if kind is None else {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return {
            key: _without_gaps(below, kinds.get(key), sparse or key in _SPARSE or _describes_tools(below))
            for key, below in value.items()
            if not (sparse and below is None)
        }
    if not isinstance(value, list):
        return value
    if hasattr(kind, "item_type"):  # a map, which has keys of its own: a null there is one
        return {key: _without_gaps(below, kind.item_type, sparse) for key, below in value}
    return [_without_gaps(below, getattr(kind, "value_type", None), sparse) for below in value]


def _describes_tools(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and (isinstance(first.get("function"), dict) or {"name", "parameters"} <= {*first})


_SHEETS = (".xlsx", ".xlsm", ".xls", ".ods")
READERS: dict[str, _Read] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".ndjson": _read_jsonl,
    ".tsv": _read_csv,
    **dict.fromkeys(_SHEETS, _read_sheets),
    **dict.fromkeys((".txt", ".md"), _read_text),
}
# What makes a file of another kind readable: {0} is the file, {1} its name without the suffix.
_CONVERTED = {
    **dict.fromkeys(
        (".html", ".htm", ".docx", ".doc", ".rtf", ".odt", ".webarchive"),
        "make a text of it: textutil -convert txt {0}, or: pandoc {0} -t plain -o {1}.txt",
    ),
    ".epub": "make a text of it: pandoc {0} -t plain -o {1}.txt",
    ".pdf": "make a text of it: pdftotext {0} {1}.txt",
    ".gz": "unpack it: gunzip -k {0}, and name {1}",
    ".bz2": "unpack it: bunzip2 -k {0}, and name {1}",
    ".zst": "unpack it: zstd -d {0}, and name {1}",
    ".zip": "unpack it: unzip {0} -d {1}, and name a file of {1}",
    **dict.fromkeys((".yaml", ".yml", ".py", ".pkl", ".arrow"), "write its rows as .jsonl, an object a line"),
    ".numbers": "export it from Numbers as CSV",
}
_TEXTS = (".txt", ".md")
_PARTS = (*_SHEETS, ".json")  # a part of such a file can be named


# Read row by row: the others' readers hold a whole file.
STREAMED = (".jsonl", ".ndjson", ".parquet")


def _parse_hub(spec: str) -> tuple[str, str | None, str | None]:
    """Parse `hf:org/name[:config][:split]`. A single suffix is a split if it has a split's name, else a config."""
    match = _HUB.fullmatch(spec)
    if match is None:
        raise ConfigError(
            f"{spec}: not a hub data set; expected hf:org/name, hf:org/name:split or hf:org/name:config:split"
        )
    name, config, split = match.groups()
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise ConfigError(f"{spec}: {name} is not a name of a data set on the hub; a folder is named without hf:")
    if Path(name).exists():  # which datasets would read in its place
        raise ConfigError(
            f"{spec}: there is a file or folder {name} here, which the library datasets takes for the data set; name "
            f"it as ./{name} if it is meant, else call mlxft from another folder"
        )
    if split is None and any(config in names for names in SPLITS.values()):
        config, split = None, config
    return name, config, split


def _open_hub(spec: str, split: str) -> tuple[Any, str]:
    """Return a data set of the hub, whose rows are on the disk, and the name that their places have."""
    name, config, part = _parse_hub(spec)
    try:
        import datasets
    except ImportError as exc:
        raise ConfigError(f"{spec}: {missing_extra('datasets', 'data')}") from exc
    try:
        if part is None:
            offered = list(datasets.get_dataset_split_names(name, config))
            part = next((alias for alias in SPLITS[split] if alias in offered), None)
            if part is None:
                raise ConfigError(
                    f"{spec}: no {split} split; it has {', '.join(offered)}: name one as {spec}:{offered[0]}"
                )
        rows = datasets.load_dataset(name, config, split=part)
    except ConfigError:
        raise
    # Which exceptions come out of the hub, its cache and the builders differs from release to release.
    except Exception as exc:
        raise DataError(
            f"{spec}: could not load it from the hub ({type(exc).__name__}: {str(exc).strip()[:300]}); check the name, "
            "the network, and `hf auth login` for a gated one; or download it and name the file"
        ) from exc
    return rows, f"{name}:{part}"


def _read_hub(spec: str, split: str) -> Iterator[Row | Problem]:
    rows, name = _open_hub(spec, split)
    for index in range(len(rows)):
        where = f"{name}[{index}]"
        try:
            yield Row(where, _without_gaps(dict(rows[index])))
        except UnicodeDecodeError as exc:
            yield Problem(where, _not_utf8(exc, "a text"))
