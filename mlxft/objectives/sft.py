"""Supervised fine-tuning: negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.config import Config, Settings
from mlxft.data.dataset import (
    Encoded,
    IntArray,
    Plan,
    Slot,
    ends_of,
    lengths_of,
    load_encoded,
    pack_epoch,
    pack_width,
    padding_share,
    sizes_of,
)
from mlxft.errors import ConfigError, DataError
from mlxft.model.layers import noisy_embedding, token_embedding
from mlxft.model.logits import Split, rows_nll
from mlxft.model.memory import Shape
from mlxft.model.prefix import Rows
from mlxft.objectives.base import (
    MicroBatch,
    OffPolicy,
    Step,
    Summary,
    Terms,
    beyond_context,
    format_problems,
    real_mask,
)

SFT_FORMATS = ("messages", "prompt-completion", "text", "sharegpt", "alpaca")


@dataclass(frozen=True, kw_only=True)
class SFTBatch(Rows):
    """Rows with N trained tokens.

    Attributes:
        positions, labels, weights: (N,) flat index that predicts a trained token, the token, and 1; 0 for what fills
            the number up.
        lengths: (B,) real tokens of each sequence.
    """

    positions: mx.array
    labels: mx.array
    weights: mx.array
    lengths: mx.array


class SFT(OffPolicy):
    """SFT over rows of token ids and masks, in memory or on the disk."""

    sections: ClassVar[dict[str, type[Settings]]] = {}
    learning_rate = 2e-5  # of full fine-tuning; LoRA 2e-4
    least_steps = 200
    traceable = True
    noisy = True

    @classmethod
    def formats(cls, config: Config) -> Sequence[str]:
        return SFT_FORMATS

    def __init__(self, config: Config, tokenizer: Any) -> None:
        if problems := format_problems(config, SFT_FORMATS):
            raise ConfigError("\n".join(problems))
        self.train, self.valid, self._notes, self._data = load_encoded(config, tokenizer, mix=True)
        super().__init__(config, tokenizer, lengths_of(self.train.rows), mixture=self.train.counts.mixture)
        self._notes += beyond_context(config.model.path, self._lengths)
        if self.valid is not None:
            self._notes += [f"validation: {n}" for n in beyond_context(config.model.path, lengths_of(self.valid.rows))]
        self._split: Split | None = None
        self._embedding: nn.Module | None = None  # what noise is added to

    def prepare(self, model: nn.Module, base: str = "") -> None:
        self._split = Split(model)  # before anything is traced, where what it tries would stay in memory
        if self.config.tune.neftune is not None:
            self._embedding = token_embedding(model)

    def rebatch(self, config: Config) -> None:
        super().rebatch(config)
        self._width = pack_width(self._lengths, self._budget["tokens"]) if config.batch.pack else None

    def arrange(self, lengths: IntArray, epoch: int) -> Plan:
        if self._width is not None:
            return pack_epoch(lengths, width=self._width, **self._budget, seed=self._seed, epoch=epoch)
        return super().arrange(lengths, epoch)

    def shapes(self) -> list[Shape]:
        plan = self.plan(0)
        columns = (plan.stops - plan.starts, plan.widths, plan.sums(sizes_of(self.train.rows)[:, 1]))
        return [Shape(*numbers) for numbers in zip(*(column.tolist() for column in columns))]

    def make_step(self, model: nn.Module, slots: Sequence[Slot], *, valid: bool = False) -> Step:
        micro_batches = [self._make(slot, valid) for slot in slots]
        return Step(micro_batches, {"nll": sum(m.trained_tokens for m in micro_batches)})

    def _make(self, slot: Slot, valid: bool) -> MicroBatch:
        if valid:
            assert self.valid is not None
            return make_batch([self.valid.rows[i] for i in slot.rows], slot.width)
        sequences = [[self.train.rows[i] for i in rows] for rows in slot.sequences]
        return pack_batch(sequences, slot.width, segments=self._width is not None, few=self.compiled)

    def valid_steps(self, model: nn.Module) -> Iterator[Step]:
        if self.valid is not None:
            slots = self.plan_valid(lengths_of(self.valid.rows))
            yield from (self.make_step(model, [slot], valid=True) for slot in slots)

    def loss(self, model: nn.Module, data: SFTBatch) -> Terms:
        if self._split is None or self._split.model is not model:
            self._split = Split(model)
        places = (data.ids, data.positions, data.labels, data.weights)
        with self._noise(data):
            return Terms({"nll": rows_nll(self._split, *places, grad=model.training, segments=data.segments)}, {})

    def _noise(self, data: SFTBatch) -> AbstractContextManager[None]:
        if self._embedding is None:
            return nullcontext()
        assert self.config.tune.neftune is not None
        lengths = mx.broadcast_to(data.lengths[:, None], data.ids.shape)
        if data.segments is not None:
            lengths = (data.segments[:, :, None] == data.segments[:, None, :]).sum(axis=-1)
        return noisy_embedding(self._embedding, self.config.tune.neftune, lengths)

    def real_tokens(self, data: SFTBatch) -> list[mx.array]:
        return [real_mask(data.ids, data.lengths)]

    def fingerprint(self) -> str:
        return self._data

    def summary(self) -> Summary:
        c = self.train.counts
        counts: dict[str, int | float] = {
            "rows": c.rows,
            "tokens": c.tokens,
            "trained tokens": c.trained_tokens,
            "padding share": padding_share(self.plan(0), self._lengths),
            **self.epoch_counts("rows", "tokens", "trained tokens"),
        }
        notes = [*self._notes, *c.notes()]
        if self.valid is not None:
            notes += [f"validation: {note}" for note in self.valid.counts.notes()]
            counts["validation rows"] = self.valid.counts.rows
            counts["validation trained tokens"] = self.valid.counts.trained_tokens
        return Summary(counts, notes, self.valid is not None, self._width or 0, frozenset(ends_of(self.train.rows)))

    def previews(self, n: int) -> list[Encoded]:
        """Return the first `n` training rows."""
        return list(self.train.rows[:n])


def make_batch(rows: list[Encoded], width: int) -> MicroBatch:
    """Make a micro-batch of right-padded rows.

    Padding follows every real token, so that causal attention never sees it and no mask is needed.
    """
    return pack_batch([[row] for row in rows], width, segments=False)


def pack_batch(sequences: list[list[Encoded]], width: int, *, segments: bool = True, few: bool = False) -> MicroBatch:
    """Make a micro-batch of sequences, each of one or several rows.

    Args:
        segments: number the rows of a sequence from 1, with 0 for padding, as `rows_nll` takes it.
        few: fill the trained positions up to one of few numbers by positions of weight 0, so that shapes come again.
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
                raise DataError(f"{row.where}: the first token cannot be trained: nothing predicts it")
            positions.append(b * width + start + at - 1)
            labels.append(row.ids[at])
            start = stop
    count = sum(map(len, labels))
    fill = (0, one_of_few(count) - count if few else 0)
    lengths = [sum(len(row.ids) for row in sequence) for sequence in sequences]
    data = SFTBatch(
        ids=mx.array(ids),
        segments=mx.array(numbers) if segments else None,
        positions=mx.array(np.pad(np.concatenate(positions).astype(np.int32), fill)),
        labels=mx.array(np.pad(np.concatenate(labels).astype(np.int32), fill)),
        weights=mx.array(np.pad(np.ones(count, dtype=np.float32), fill)),
        lengths=mx.array(lengths),
    )
    rows = tuple(row.where for sequence in sequences for row in sequence)
    return MicroBatch(data, sum(lengths), count, rows)


def one_of_few(count: int) -> int:
    """Round up to one of 16 numbers between powers of two: less than a sixteenth more."""
    step = max(1, (1 << (count - 1).bit_length()) // 32)
    return -(-count // step) * step
