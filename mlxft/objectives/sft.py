"""Supervised fine-tuning: negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.config import Config, Data, Settings
from mlxft.data.batching import IntArray, Slot, pack_epoch, pack_width, padding_share
from mlxft.data.convert import convert
from mlxft.data.dataset import Dataset, build, fingerprint, split_valid
from mlxft.data.encode import Encoded
from mlxft.data.formats import Example
from mlxft.data.shots import choose, labels_of
from mlxft.data.sources import Row, find_split, read_rows
from mlxft.errors import ConfigError, DataError
from mlxft.model.logits import Split, rows_nll
from mlxft.objectives.base import Batch, LossSum, OffPolicy, Summary

SETTINGS: dict[str, type[Settings]] = {}
LEARNING_RATE = 2e-5  # of full fine-tuning, as most full fine-tuning has it; LoRA 2e-4
FORMATS = ("messages", "prompt-completion", "text", "sharegpt", "alpaca")


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


def load_examples(data: Data, spec: str, split: str) -> tuple[list[Example], list[str] | None]:
    """Rows of one split in their format, and their labels where data.shots needs them and they have some."""
    try:
        rows = list(read_rows(spec, split))
    except ConfigError as e:
        raise ConfigError(f"data.{split}: {e}") from e
    examples = convert(rows, data.format, data.fields)
    if data.shots is None or split != "train":
        return examples, None
    return examples, labels_of(examples, [row.data for row in rows if isinstance(row, Row)], data.label)


def load_splits(data: Data, seed: int, setting: str = "data.shots") -> Splits:
    """Training and validation examples; the second is empty where none are asked for and the folder has none.

    Args:
        setting: what asks for a few rows only, for messages.
    """
    train, labels = load_examples(data, data.train, "train")
    valid: list[Example] = []
    if isinstance(data.valid, float):
        # The rows set aside are the same whatever data.shots says.
        kept, held_out = split_valid(list(range(len(train))), data.valid, seed)
        train, valid = [train[i] for i in kept], [train[i] for i in held_out]
        labels = labels and [labels[i] for i in kept]
    elif data.valid is not None:
        valid = load_examples(data, data.valid, "valid")[0]
    elif Path(data.train).is_dir() and find_split(Path(data.train), "valid"):
        valid = load_examples(data, data.train, "valid")[0]
    if data.shots is None:
        return Splits(train, valid, [])
    shots = choose(labels, len(train), data.shots, seed, setting)
    return Splits([train[i] for i in shots.rows], valid, [shots.note])


class Objective(OffPolicy):
    """SFT over rows held in memory as token ids and masks.

    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        data = config.data
        if data.format not in FORMATS:
            raise ConfigError(f"data.format: {data.format} is not for objective sft; choose {', '.join(FORMATS)}")
        options: dict[str, Any] = {
            "train_on": data.train_on or "assistant",
            "max_length": data.max_length,
            "overflow": data.overflow,
            "chat": data.template == "auto",
            "cache": data.cache,
        }
        train, valid, self._notes = load_splits(data, config.run.seed)
        self.train = build(train, tokenizer, **options)
        with of_valid():
            self.valid: Dataset | None = build(valid, tokenizer, **options) if valid else None
        super().__init__(config, _lengths(self.train))
        self._width = pack_width(self._lengths, self._budget["tokens"]) if config.batch.pack else None
        self._split: Split | None = None

    def plan(self, epoch: int) -> list[Slot]:
        if self._width is not None:
            return pack_epoch(self._lengths, width=self._width, **self._budget, seed=self._seed, epoch=epoch)
        return super().plan(epoch)

    def shapes(self) -> list[tuple[int, int, int]]:
        """Rows, width and trained tokens of the first epoch's batches, for a plan of the memory they take."""
        trained = [int(r.trained.sum()) for r in self.train.rows]
        return [(len(s.sequences), s.width, sum(trained[i] for i in s.rows)) for s in self.plan(0)]

    def batches(self, model: nn.Module) -> Iterator[Batch]:
        for slots, at in self.places():
            sequences = [[self.train.rows[i] for i in rows] for rows in slots[at].sequences]
            yield pack_batch(sequences, slots[at].width, at + 1 == len(slots), segments=self._width is not None)

    def valid_batches(self, model: nn.Module) -> Iterator[Batch]:
        if self.valid is None:
            return
        for slot in self.plan_valid(_lengths(self.valid)):
            yield make_batch([self.valid.rows[i] for i in slot.rows], slot.width)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        if self._split is None or self._split.model is not model:
            self._split = Split(model)
        a = batch.arrays
        total = rows_nll(
            self._split,
            a["ids"],
            a["positions"],
            a["labels"],
            a["weights"],
            grad=model.training,
            segments=a.get("segments"),
        )
        return LossSum(total, a["weights"].sum(), {})

    def fingerprint(self) -> str:
        return fingerprint(self.train) + (fingerprint(self.valid) if self.valid is not None else "")

    def summary(self) -> Summary:
        c = self.train.counts
        counts: dict[str, int | float] = {
            "rows": c.encoded_rows,
            "tokens": c.tokens,
            "trained tokens": c.trained_tokens,
            "padding share": padding_share(self.plan(0), self._lengths),
        }
        notes = [*self._notes, *c.notes()]
        if self.valid is not None:
            notes += [f"validation: {note}" for note in self.valid.counts.notes()]
            counts["validation rows"] = self.valid.counts.encoded_rows
            counts["validation trained tokens"] = self.valid.counts.trained_tokens
        return Summary(counts, notes, self.valid is not None, self._width or 0)

    def previews(self, n: int) -> list[Encoded]:
        """The first `n` training rows."""
        return self.train.rows[:n]


def _lengths(data: Dataset) -> IntArray:
    return np.array([len(row.ids) for row in data.rows], dtype=np.int64)


def make_batch(rows: list[Encoded], width: int, ends_epoch: bool = False) -> Batch:
    """Right-padded ids and the flat positions that predict a trained token.

    Padding stands behind every real token, so that causal attention never sees it and no mask is needed.
    """
    return pack_batch([[row] for row in rows], width, ends_epoch, segments=False)


def pack_batch(sequences: list[list[Encoded]], width: int, ends_epoch: bool = False, *, segments: bool = True) -> Batch:
    """The same with several rows a sequence, one after the other.

    Args:
        segments: whether to number the rows in their sequence, from 1 with 0 for padding, as `rows_nll` takes it.
    """
    ids = np.zeros((len(sequences), width), dtype=np.int32)
    numbers = np.zeros_like(ids)
    positions, labels = [], []
    for b, sequence in enumerate(sequences):
        start = 0
        for number, row in enumerate(sequence, 1):
            stop = start + len(row.ids)
            ids[b, start:stop] = row.ids
            numbers[b, start:stop] = number
            at = np.flatnonzero(row.trained)
            if at.size and at[0] == 0:
                raise DataError(f"{row.where}: the first token can not be trained, nothing predicts it")
            positions.append(b * width + start + at - 1)
            labels.append(row.ids[at])
            start = stop
    where = np.concatenate(positions).astype(np.int32)
    arrays = {
        "ids": mx.array(ids),
        "positions": mx.array(where),
        "labels": mx.array(np.concatenate(labels).astype(np.int32)),
        "weights": mx.ones(len(where), dtype=mx.float32),
    }
    if segments:
        arrays["segments"] = mx.array(numbers)
    rows = [row for sequence in sequences for row in sequence]
    lengths = tuple(sum(len(row.ids) for row in sequence) for sequence in sequences)
    return Batch(arrays, sum(lengths), len(where), tuple(r.where for r in rows), ends_epoch, lengths=lengths)
