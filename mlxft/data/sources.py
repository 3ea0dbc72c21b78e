"""Where rows come from: jsonl, json, csv and parquet files, folders of them, and the Hugging Face hub.

A reader yields rows as they were before they were written: null keys that Arrow adds are removed. It does not stop at
a bad line but yields a `Problem` in its place, so that all problems of a file are reported at once. It raises where
there is no row to read, such as an empty file.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from mlxft.config import handed_over
from mlxft.errors import ConfigError, DataError, half_character, missing_extra, nearest
from mlxft.files import digest
from mlxft.text import home_path, parse_json


class Row(NamedTuple):
    """A row: its place `where` ("train.jsonl:17", "train.json[16]") and its fields."""

    where: str
    data: dict[str, Any]


class Problem(NamedTuple):
    """A row that cannot be read: its place `where` and what is wrong."""

    where: str
    text: str


# Splits with the names that files and hub data sets give them.
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
REPORTED = 20  # problems in a message
_DEEPEST = 100
_SPARSE = ("tools", "functions", "tool_calls", "function_call")
_LONGEST = 1 << 22  # characters of a text; tokenizers hold some 200 bytes for each
_MAX_CSV_FIELD = 2**31 - 1
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
# hf:org/name[:config][:split], where the split may carry a slice: train[:1000]
_HUB = re.compile(r"hf:([^:\[\]]+)(?::([^:\[\]]+)(?=:|$))?(?::([^:\[\]]+(?:\[[^\[\]]*\])?))?")


def read_rows(spec: str, split: str) -> Iterator[Row | Problem]:
    """Read the rows of one split of a file, a folder or a hub data set, in order.

    Args:
        spec: a .jsonl, .json, .csv or .parquet file (read whole, whatever the split); a folder with
            {split}.{jsonl,json,csv,parquet}; or `hf:org/name[:config][:split]`.
        split: "train", "valid" or "test"; "valid" has the names validation, val and dev, too.
    Raises:
        ConfigError: there is no such file or split, or its kind is unknown. Raised at once.
        DataError: the file has no rows, is damaged as a whole, or the hub did not return it. Raised while iterating.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; expected one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    if spec.startswith("hf:"):
        return _some(_read_hub(spec, split), spec)
    if spec.startswith("python:"):
        return _some(given_rows(handed_over(f"data.{split}", spec), spec.removeprefix("python:")), spec)
    path = find_file(spec, split)
    return _some(READERS[path.suffix.lower()](path), path.name)


def find_file(spec: str, split: str) -> Path:
    """Return the file with the rows of a split: `spec` itself, or one in that folder; raise ConfigError without one."""
    known = ", ".join(READERS)
    try:
        path = home_path(spec)
        folder = path.is_dir()
    except OSError as exc:  # too long for a path
        raise ConfigError(f"{spec[:80]}: not a path: {getattr(exc, 'strerror', None) or exc}") from exc
    if folder:
        found = find_split(path, split)
        if found is None:
            wanted = ", ".join(f"{name}.jsonl" for name in SPLITS[split])
            names = sorted(file.name for file in path.iterdir())
            has = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "no files"
            raise ConfigError(f"{spec}: no file for the {split} split; expected {wanted} (or {known}); it has {has}")
        path = found
    if not path.exists():
        raise ConfigError(f"{spec}: no such file{neighbour(path)}")
    if not path.is_file():
        raise ConfigError(f"{spec}: is a device or a pipe; expected a file, which is read more than once")
    if path.suffix.lower() not in READERS:
        raise ConfigError(f"{spec}: unknown kind of file {path.suffix!r}; known are {known}")
    return path


def source_hash(spec: str, split: str) -> tuple[str, int]:
    """Hash what a source holds that is read row by row, and its name; return also how many rows it has, blank ones too.

    Raises:
        ConfigError: it is read whole.
        DataError: the hub did not return it.
    """
    if spec.startswith("python:"):
        raise ConfigError("rows that a program gives are in memory already; leave data.stream out")
    if not spec.startswith("hf:"):
        path = find_file(spec, split)
        if path.suffix.lower() not in STREAMED:
            raise ConfigError(
                f"{spec}: a {path.suffix} file is read whole; data.stream is for {', '.join(STREAMED)} and data sets "
                "of the hub: convert it, or leave data.stream out"
            )
        return f"{path.name} {digest(path)}", _count(path)
    rows, name = _open_hub(spec, split)
    files = [digest(Path(file["filename"])) for file in getattr(rows, "cache_files", ())]
    if not files:
        hashed = blake2b(digest_size=16)
        for row in rows:
            hashed.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
        files = [hashed.hexdigest()]
    return f"{spec} {name} {len(rows)} {' '.join(files)}", len(rows)


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


def _some(rows: Iterator[Row | Problem], name: str) -> Iterator[Row | Problem]:
    empty = True
    for row in rows:
        empty = False
        wrong = (_too_large(row.data) or half_character(row.data)) if isinstance(row, Row) else None
        yield row if wrong is None else Problem(row.where, wrong)
    if empty:
        raise DataError(f"{name}: no rows; expected at least one")


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

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in found if keys.count(key) > 1)
            raise ValueError(f"the key {twice[:80]!r} is given twice in one object")
        return found

    return parse_json(text, object_pairs_hook=once)


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
    return f"not valid JSON: {f'{exc.msg} at column {exc.colno}' if isinstance(exc, json.JSONDecodeError) else exc}"


def _read_jsonl(path: Path) -> Iterator[Row | Problem]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path.name}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield _object(read_json(line), where)
            except UnicodeDecodeError as exc:
                yield Problem(where, _not_utf8(exc))
            except (ValueError, RecursionError) as exc:
                yield Problem(where, _not_json(exc))


def _read_json(path: Path) -> Iterator[Row | Problem]:
    """Yield the rows of an array of objects, or of one object a line, as the first character says."""
    raw = path.read_bytes()
    if not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_jsonl(path)
        return
    try:
        values = read_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        yield Problem(f"{path.name}:{line}", f"not UTF-8 (0x{raw[exc.start]:02x}); save the file as UTF-8")
    except json.JSONDecodeError as exc:
        yield Problem(f"{path.name}:{exc.lineno}", _not_json(exc))
    except (ValueError, RecursionError) as exc:
        yield Problem(path.name, _not_json(exc))
    else:
        for index, value in enumerate(values):
            yield _object(value, f"{path.name}[{index}]")


def _read_csv(path: Path) -> Iterator[Row | Problem]:
    lines: list[str] = []
    problems: list[Problem] = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), 1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as exc:
            problems.append(Problem(f"{path.name}:{number}", _not_utf8(exc)))
    if problems:
        # A row of such a file may span a bad line: what the others hold is not certain either.
        yield from problems
        return
    # The stdlib's limit of 128 KiB a field is less than a long document; it is one for the whole process.
    limit = csv.field_size_limit(_MAX_CSV_FIELD)
    try:
        rows = list(_csv_rows(csv.reader(lines, strict=True), path.name))
    finally:
        csv.field_size_limit(limit)
    yield from rows


def _csv_rows(reader: Any, name: str) -> Iterator[Row | Problem]:
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            yield Problem(where, f"not valid CSV: {exc}")
            continue
        if not any(cell.strip() for cell in cells) and len(cells) < 2:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            twice = sorted({cell for cell in header if header.count(cell) > 1})
            if twice or "" in header:
                seen = f"names {', '.join(map(repr, twice))} twice" if twice else "has a column without a name"
                yield Problem(where, f"the header {seen}; the first line must name each column once")
                return
        elif len(cells) != len(header):
            yield Problem(where, f"{len(cells)} columns; the header names {len(header)} ({', '.join(header)})")
        else:
            yield Row(where, dict(zip(header, cells)))


def _read_parquet(path: Path) -> Iterator[Row | Problem]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(f"{path.name}: {missing_extra('pyarrow', 'data')}") from exc
    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path.name}: has two columns {', '.join(map(repr, twice))}; expected each name once")
        for batch in file.iter_batches():
            kind = pa.struct(batch.schema) if "map<" in str(batch.schema) else None
            for data in _batch_rows(batch):
                number += 1
                where = f"{path.name}:{number}"
                if isinstance(data, UnicodeDecodeError):
                    yield Problem(where, _not_utf8(data, "a text"))
                else:
                    yield Row(where, _without_gaps(data, kind))
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError) as exc:  # as it is damaged
        raise DataError(f"{path.name}: not a readable parquet file: {' '.join(str(exc).split())[:300]}") from exc


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


READERS: dict[str, Callable[[Path], Iterator[Row | Problem]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# Read row by row: the others' readers hold a whole file.
STREAMED = (".jsonl", ".parquet")


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
