"""What objectives over judged answers share: rows, the order they come in, and batches of right-padded answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.config import Config
from mlxft.data.batching import Slot, padding_share
from mlxft.data.dataset import (
    EncodedAnswer,
    EncodedPair,
    Ids,
    PairCounts,
    chat_notes,
    ends_of,
    fingerprint,
    ids_fingerprint,
    length,
    load_splits,
    of_valid,
)
from mlxft.data.formats import Example
from mlxft.errors import ConfigError
from mlxft.model.memory import Shape
from mlxft.model.prefix import Sharing
from mlxft.objectives.base import Batch, NoDropout, OffPolicy, Summary, beyond_context

Row = TypeVar("Row", EncodedPair, EncodedAnswer)
# A prompt is computed once for both answers where that leaves no more than this share of the tokens: attention with a
# mask of one's own costs more than the plain causal one. Short prompts are not worth a second pass.
SHARED, LEAST_PROMPT = 0.75, 32
NO_DROPOUT = NoDropout("what is compared (completions, policy and reference) must come from one network")


class Answer(NamedTuple):
    """A prompt (P,) and an answer to it (R,), int32."""

    prompt: Ids
    reply: Ids


def answers_of(row: EncodedPair | EncodedAnswer) -> list[Answer]:
    """The chosen and the rejected answer of a pair, or the one there is."""
    if isinstance(row, EncodedPair):
        return [Answer(row.prompt_ids, row.chosen_ids), Answer(row.prompt_ids, row.rejected_ids)]
    return [Answer(row.prompt_ids, row.completion_ids)]


def stack(answers: Sequence[Answer], width: int | None = None) -> dict[str, mx.array]:
    """Answers as rows of one batch, padded on the right, where causal attention never sees it.

    Returns:
        ids (B, T); last (B,), the last real token; lengths (B,) of the answers, float32; and for each of their N tokens
        positions (N,), the flat index that predicts it, labels (N,) and owners (N,), its row.
    """
    width = width or max(len(a.prompt) + len(a.reply) for a in answers)
    ids = np.zeros((len(answers), width), dtype=np.int32)
    positions = []
    for b, (prompt, reply) in enumerate(answers):
        ids[b, : len(prompt)] = prompt
        ids[b, len(prompt) : len(prompt) + len(reply)] = reply
        positions.append(b * width + len(prompt) - 1 + np.arange(len(reply)))
    sizes = [len(a.reply) for a in answers]
    return {
        "ids": mx.array(ids),
        "last": mx.array(np.array([len(a.prompt) + len(a.reply) - 1 for a in answers], dtype=np.int32)),
        "lengths": mx.array(np.array(sizes, dtype=np.float32)),
        "positions": mx.array(np.concatenate(positions).astype(np.int32)),
        "labels": mx.array(np.concatenate([a.reply for a in answers]).astype(np.int32)),
        "owners": mx.array(np.repeat(np.arange(len(answers)), sizes).astype(np.int32)),
    }


def stack_shared(prompts: Sequence[Ids], answers: Sequence[tuple[int, Ids]]) -> dict[str, mx.array]:
    """Prompts as rows of their own, and answers with the number of their prompt, both padded on the right.

    Returns:
        What `stack` does, for `Sharing`: prompts (B, P), begins (B,), ids (R, A), of (R,); positions and last are flat
        indices into the prompts' tokens and then the answers'.
    """
    sizes = np.array([len(p) for p in prompts], dtype=np.int32)
    before = np.zeros((len(prompts), sizes.max()), dtype=np.int32)
    for b, prompt in enumerate(prompts):
        before[b, : len(prompt)] = prompt
    of = np.array([p for p, _ in answers], dtype=np.int32)
    lengths = np.array([len(reply) for _, reply in answers], dtype=np.int32)
    ids = np.zeros((len(answers), lengths.max()), dtype=np.int32)
    positions = []
    for r, (p, reply) in enumerate(answers):
        ids[r, : len(reply)] = reply
        start = before.size + r * ids.shape[1]
        positions.append(np.array([p * before.shape[1] + len(prompts[p]) - 1, *range(start, start + len(reply) - 1)]))
    arrays = {
        "prompts": before,
        "begins": sizes,
        "ids": ids,
        "of": of,
        "last": before.size + np.arange(len(answers)) * ids.shape[1] + lengths - 1,
        "lengths": lengths.astype(np.float32),
        "positions": np.concatenate(positions),
        "labels": np.concatenate([reply for _, reply in answers]),
        "owners": np.repeat(np.arange(len(answers)), lengths),
    }
    return {k: mx.array(v if v.dtype == np.float32 else v.astype(np.int32)) for k, v in arrays.items()}


def sharing_pays(rows: Sequence[EncodedPair | EncodedAnswer], width: int) -> tuple[int, int] | None:
    """Widths of the prompts and of the answers, if it is cheaper to compute each prompt once than rows of `width`."""
    pairs = [row for row in rows if isinstance(row, EncodedPair)]
    if not pairs or min(len(pair.prompt_ids) for pair in pairs) < LEAST_PROMPT:
        return None
    prompt = max(len(pair.prompt_ids) for pair in pairs)
    answer = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    return (prompt, answer) if prompt + 2 * answer <= SHARED * 2 * width else None


def stack_pairs(pairs: Sequence[EncodedPair], width: int, sharing: Sharing) -> dict[str, mx.array]:
    """The chosen answers and then the rejected ones, by `stack` or, where that is cheaper, by `stack_shared`."""
    prompts = [pair.prompt_ids for pair in pairs]
    replies = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    if sharing_pays(pairs, width) and sharing.possible:
        return stack_shared(prompts, [(i % len(pairs), reply) for i, reply in enumerate(replies)])
    return stack([Answer(prompts[i % len(pairs)], reply) for i, reply in enumerate(replies)], width)


def encode_splits(
    config: Config, tokenizer: Any, build: Callable[..., Any], keep: Callable[[list[Example]], list[Example]] = list
) -> tuple[list[Any], PairCounts, list[Any], PairCounts | None]:
    """Training and validation rows with their counts, by `build_pairs` or `build_answers`.

    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """
    data = config.data
    options = {"max_length": data.max_length, "overflow": data.overflow, "chat": data.template == "auto"}
    train, valid, notes = load_splits(data, config.run.seed, tokenizer=tokenizer)
    train, valid = keep(train), keep(valid)
    first = build(train, tokenizer, **options)
    with of_valid():
        second = build(valid, tokenizer, **options) if valid else None
    if second:
        notes = [*notes, *(f"validation: {note}" for note in second.counts.left_out())]
    notes = [*notes, *chat_notes(tokenizer, ends_of(first.rows), train if options["chat"] else ())]
    counts = replace(first.counts, source_notes=tuple(notes), fingerprint=fingerprint(train, valid))
    return first.rows, counts, second.rows if second else [], second.counts if second else None


def check_recipe(config: Config, formats: Sequence[str]) -> None:
    """ConfigError for settings that have no meaning for judged answers, all of them in one."""
    data = config.data
    problems = []
    name = config.objective
    if data.format not in formats:
        problems.append(f"data.format: {data.format} is not for objective {name}; choose {' or '.join(formats)}")
    if data.train_on is not None:
        problems.append(f"data.train_on: {data.train_on} has nothing to choose: answers are judged whole; leave it out")
    if data.overflow not in ("error", "drop"):
        problems.append(f"data.overflow: {data.overflow} would make another answer of one; choose error or drop")
    if config.batch.pack:
        problems.append(f"batch.pack: is not for objective {name}, whose answers are rows of their own")
    problems += NO_DROPOUT.problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


class Judged(OffPolicy, Generic[Row]):
    """The data of an objective, and where it is in it. A subclass makes batches and the loss.

    Args:
        per_row: rows of a batch that one of the data set becomes: two of a pair.
    """

    traceable = True  # the reference's numbers, and KTO's point, are in the batch

    def __init__(self, config: Config, rows: list[Row], counts: PairCounts, valid: list[Row], per_row: int) -> None:
        self.counts = counts
        self.rows: list[Row] = rows
        self.valid: list[Row] = valid
        self.notes: list[str] = counts.notes()
        super().__init__(config, np.array([length(row) for row in rows], dtype=np.int64), per_row)
        self.notes += beyond_context(config, self._lengths.tolist())
        self.notes += [f"validation: {note}" for note in beyond_context(config, list(map(length, valid)))]

    def prepare(self, model: nn.Module, base: str = "") -> None:
        self.notes += NO_DROPOUT.take_out(model)

    def make(self, model: nn.Module, rows: Sequence[int], width: int, *, valid: bool, ends_epoch: bool) -> Batch:
        """The batch of these rows."""
        raise AssertionError(f"{type(self).__name__} makes no batches")

    def begin_step(self, model: nn.Module, slots: Sequence[Slot], *, valid: bool) -> None:
        """Before the first micro-batch of a step, with all of its slots; of validation, with all there are."""

    def rebatch(self, config: Config) -> None:
        super().rebatch(config)
        self.config = config
        self.__dict__.pop("most", None)

    def shapes(self) -> list[Shape]:
        found = []
        for slot in self.plan(0):
            rows = [self.rows[i] for i in slot.rows]
            answers = [answer for row in rows for answer in answers_of(row)]
            apart = sharing_pays(rows, slot.width)
            found.append(Shape(len(answers), slot.width, sum(len(a.reply) for a in answers), *(apart or ())))
        return found

    @cached_property
    def most(self) -> int:
        """Tokens of the largest batch, padding included."""
        return max(shape.rows * shape.width for shape in self.shapes())

    def batches(self, model: nn.Module) -> Iterator[Batch]:
        accumulate = self.config.batch.accumulate
        for slots, at in self.places():
            if at % accumulate == 0:  # a step ends with its epoch, so steps begin at multiples
                self.begin_step(model, slots[at : at + accumulate], valid=False)
            yield self.make(model, slots[at].rows, slots[at].width, valid=False, ends_epoch=at + 1 == len(slots))

    def rehearsed(self, model: nn.Module, slots: Sequence[Slot]) -> Iterator[Batch]:
        self.begin_step(model, slots, valid=False)
        for slot in slots:
            yield self.make(model, slot.rows, slot.width, valid=False, ends_epoch=False)

    def valid_batches(self, model: nn.Module) -> Iterator[Batch]:
        if not self.valid:
            return
        slots = self.plan_valid(np.array([length(row) for row in self.valid], dtype=np.int64))
        self.begin_step(model, slots, valid=True)
        for slot in slots:
            yield self.make(model, slot.rows, slot.width, valid=True, ends_epoch=False)

    def fingerprint(self) -> str:
        return self.counts.fingerprint

    def ids_fingerprint(self) -> str:
        """Hash of all ids, which numbers computed from them depend on."""
        return ids_fingerprint(self.rows) + ids_fingerprint(self.valid)

    def summary(self) -> Summary:
        kind = "pairs" if self.rows and isinstance(self.rows[0], EncodedPair) else "answers"
        counts: dict[str, int | float] = {
            kind: len(self.rows),
            "tokens": self.counts.tokens,
            "response tokens": self.counts.response_tokens,
            "padding share": padding_share(self.plan(0), self._lengths),
        }
        if self.counts.chosen_longer is not None:
            counts["chosen is longer"] = self.counts.chosen_longer
        if self.valid:
            counts[f"validation {kind}"] = len(self.valid)
        return Summary(counts, self.notes, bool(self.valid), ends=frozenset(ends_of(self.rows)))

    def previews(self, n: int) -> list[Row]:
        """The first `n` pairs, or answers with a label."""
        return self.rows[:n]
