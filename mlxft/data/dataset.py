"""Encoded rows as a data set: lengths held to the limit, everything that was left out counted."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from mlxft.data import cache as disk
from mlxft.data.encode import Encoded, encode
from mlxft.data.formats import Example, Text
from mlxft.data.sources import report_lines
from mlxft.errors import ConfigError, DataError, nearest

T = TypeVar("T")

OVERFLOW = ("error", "drop", "truncate", "split")


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows. All but the tokens are numbers of rows.

    Attributes:
        source_rows: rows given.
        encoded_rows: rows in the data set: fewer by what was left out, more by turns and pieces that stand alone.
        tokens, trained_tokens: in the data set.
        dropped: encoded rows left out as too long.
        truncated, split: encoded rows cut at the limit, and into pieces.
        untrainable: encoded rows left out since no token of them is trained.
    """

    source_rows: int = 0
    encoded_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    untrainable: int = 0

    def notes(self) -> list[str]:
        """What was left out or cut, a sentence each."""
        said = {
            "dropped": "rows were longer than data.max_length and are left out",
            "truncated": "rows were longer than data.max_length and are cut",
            "split": "rows were longer than data.max_length and are split",
            "untrainable": "rows have no token to train and are left out",
        }
        return [f"{getattr(self, name):,} {text}" for name, text in said.items() if getattr(self, name)]


@dataclass(frozen=True)
class Dataset:
    """Rows in the order of their source, and the counts."""

    rows: list[Encoded]
    counts: Counts

    @property
    def ends(self) -> set[int]:
        """The ids that end trained turns."""
        return {end for row in self.rows for end in row.ends}


def build(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    train_on: str,
    max_length: int,
    overflow: str,
    chat: bool = True,
    cache: bool = False,
) -> Dataset:
    """Encode examples and hold them to a length.

    Args:
        max_length: tokens a row may have.
        overflow: what to do with a longer one. "error" reports them all; "drop" leaves them out; "truncate" keeps the
            head, and drops what then has no trained token; "split" (of texts only) makes pieces of max_length, each
            beginning with the last token of the one before, untrained: every token but the first is trained once.
        cache: whether to look for the encoded rows on the disk, and to leave them there.
    Raises:
        ConfigError: an unknown `overflow`, a `max_length` below 2, or "split" of what is not text.
        DataError: rows that can not be encoded or are too long (all of them in one), or no row is left.
    """
    if overflow not in OVERFLOW:
        hint = nearest(overflow, OVERFLOW)
        raise ConfigError(f"data.overflow is {overflow!r}; expected one of {', '.join(OVERFLOW)}{hint}")
    if max_length < 2:
        raise ConfigError(f"data.max_length is {max_length}; expected at least 2: one token to see and one to predict")
    if overflow == "split" and not all(isinstance(example.item, Text) for example in examples):
        raise ConfigError("data.overflow: split is for data.format: text; use error, drop or truncate")
    encoded = _encode_all(examples, tokenizer, train_on, chat, cache)
    long = [row for row in encoded if len(row.ids) > max_length]
    if long and overflow == "error":
        lines = [f"{row.where}: {len(row.ids)} tokens; data.max_length is {max_length}" for row in long]
        longest = max(len(row.ids) for row in long)
        advice = (
            f"raise data.max_length (the longest has {longest}) or set data.overflow: drop, truncate or split (texts)"
        )
        raise DataError(f"{report_lines(lines)}\n{advice}")
    rows, counts = _fit(encoded, max_length, overflow)
    counts = replace(
        counts,
        source_rows=len(examples),
        encoded_rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        trained_tokens=sum(int(row.trained.sum()) for row in rows),
    )
    if not rows:
        why = "; ".join(counts.notes()) or "there are none"
        raise DataError(
            f"no row is left to train on, of {len(examples):,}: {why}; see data.max_length and data.train_on"
        )
    return Dataset(rows, counts)


def _encode_all(examples: Sequence[Example], tokenizer: Any, train_on: str, chat: bool, cache: bool) -> list[Encoded]:
    key = disk.encoding_key(fingerprint(examples), tokenizer, train_on, chat) if cache else None
    kept = disk.read(key, examples) if key else None
    if kept is not None:
        return kept
    encoded: list[Encoded] = []
    sources: list[int] = []
    problems: list[str] = []
    for i, (where, item) in enumerate(examples):
        try:
            rows = encode(item, tokenizer, where, train_on, chat)
            encoded += rows
            sources += [i] * len(rows)
        except DataError as exc:
            problems.append(str(exc))
    if problems:
        raise DataError(report_lines(problems))
    if key and encoded:
        disk.write(key, encoded, sources)
    return encoded


def _fit(encoded: list[Encoded], max_length: int, overflow: str) -> tuple[list[Encoded], Counts]:
    rows: list[Encoded] = []
    dropped = truncated = split = untrainable = 0
    for row in encoded:
        if not row.trained.any():
            untrainable += 1
        elif len(row.ids) <= max_length:
            rows.append(row)
        elif overflow == "split":
            split += 1
            rows.extend(_pieces(row, max_length))
        elif overflow == "truncate" and row.trained[:max_length].any():
            truncated += 1
            rows.append(row._replace(ids=row.ids[:max_length], trained=row.trained[:max_length]))
        else:
            dropped += 1
    return rows, Counts(dropped=dropped, truncated=truncated, split=split, untrainable=untrainable)


def _pieces(row: Encoded, max_length: int) -> list[Encoded]:
    pieces = []
    # The last token of a piece is predicted there, and is the context of the next piece's first prediction.
    for start in range(0, len(row.ids) - 1, max_length - 1):
        trained = row.trained[start : start + max_length].copy()
        trained[0] = False
        pieces.append(Encoded(row.ids[start : start + max_length], trained, row.where))
    return pieces


def split_valid(examples: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Set a share of the examples aside for validation: (train, valid), disjoint, each in the source's order.

    The same examples, share and seed give the same two lists. Valid has the rounded share, at least one row.

    Raises:
        DataError: one of the two would be empty.
    """
    count = max(1, round(share * len(examples)))
    if not 0 < share < 1 or count >= len(examples):
        raise DataError(
            f"empty valid split, or no train rows beside it: {len(examples)} rows at a share of {share}; each needs at "
            "least one: give more rows, another share between 0 and 1, or a validation file"
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


def fingerprint(*splits: Sequence[Example]) -> str:
    """blake2b over the rows of each split, in order: whether a resumed run meets the same data.

    Of the rows, not of their ids: these depend on the day where a chat template writes the date, and on the versions of
    libraries.
    """
    digest = blake2b(digest_size=16)
    for examples in splits:
        for _, item in examples:
            text = json.dumps([type(item).__name__, vars(item)], default=_plain, sort_keys=True)
            digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no form for: an item within an item, or a value of a row (a date of parquet's)."""
    return vars(value) if is_dataclass(value) else repr(value)


def describe(encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """A row as runs of text, each with whether its tokens are trained."""
    ids, trained = encoded.ids.tolist(), encoded.trained
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    return [(str(tokenizer.decode(ids[a:b])), bool(trained[a])) for a, b in pairwise(edges) if a < b]
