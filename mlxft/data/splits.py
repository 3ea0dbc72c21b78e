"""Training and validation rows, as a recipe names them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mlxft.config import Data
from mlxft.data.convert import Columns, convert
from mlxft.data.dataset import split_valid
from mlxft.data.formats import Example
from mlxft.data.shots import choose, labels_of
from mlxft.data.sources import Problem, Row, find_split, read_rows
from mlxft.errors import ConfigError, DataError


@contextmanager
def of_valid() -> Iterator[None]:
    """What is wrong with rows inside the block is said of data.valid."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.valid: {error}") from error


class Splits(NamedTuple):
    """Training and validation examples, the second empty where there are none; and what there is to say of them."""

    train: list[Example]
    valid: list[Example]
    notes: list[str]


class _Loaded(NamedTuple):
    """Rows of one split in their format, their labels where data.shots needs them and they have some, and notes."""

    examples: list[Example]
    labels: list[str] | None
    notes: list[str]


def _load(data: Data, spec: str, split: str, chat: bool, reads: Collection[str] | None) -> _Loaded:
    try:
        rows = list(read_rows(spec, split))
    except ConfigError as e:
        raise ConfigError(f"data.{split}: {e}") from e
    columns = Columns()
    skipped: list[Problem] | None = [] if data.invalid == "drop" else None
    examples = convert(rows, data.format, data.fields, skipped, chat=chat, columns=columns)
    notes = columns.notes(reads)
    if skipped:
        first = f"{skipped[0].where}: {skipped[0].text}"
        notes.append(f"{len(skipped):,} rows are left out (data.invalid: drop), the first of them: {first}")
    labels = None
    if data.shots is not None and split == "train":
        used = {example.where for example in examples}
        labels = labels_of(
            examples, [row.data for row in rows if isinstance(row, Row) and row.where in used], data.label
        )
    return _Loaded(examples, labels, notes)


def load_splits(
    data: Data, seed: int, setting: str = "data.shots", *, tokenizer: Any = None, reads: Collection[str] | None = ()
) -> Splits:
    """Training and validation examples; the second is empty where none are asked for and the folder has none.

    Args:
        setting: what asks for a few rows only, for messages.
        tokenizer: of the model that is to be trained; None: one with a chat template.
        reads: columns that the objective reads beside those of the format; None: it may read every one.
    """
    chat = data.template == "auto" and (tokenizer is None or tokenizer.has_chat_template)
    how = (chat, None if reads is None else {*reads, data.label or ""})
    train, labels, notes = _load(data, data.train, "train", *how)
    valid: list[Example] = []
    other: list[str] = []
    if isinstance(data.valid, float):
        # The rows set aside are the same whatever data.shots says.
        kept, held_out = split_valid(list(range(len(train))), data.valid, seed)
        train, valid = [train[i] for i in kept], [train[i] for i in held_out]
        labels = labels and [labels[i] for i in kept]
    elif data.valid is not None:
        valid, _, other = _load(data, data.valid, "valid", *how)
    elif Path(data.train).is_dir() and find_split(Path(data.train), "valid"):
        valid, _, other = _load(data, data.train, "valid", *how)
    notes += [f"validation: {note}" for note in other if note not in notes]
    if data.shots is None:
        return Splits(train, valid, notes)
    shots = choose(labels, len(train), data.shots, seed, setting)
    return Splits([train[i] for i in shots.rows], valid, [*notes, shots.note])
