"""What objectives over judged answers share: rows, the order they come in, and batches of right-padded answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.config import Config
from mlxft.data.dataset import (
    EncodedLabelled,
    EncodedPair,
    Ids,
    PairCounts,
    Slot,
    chat_notes,
    data_fingerprint,
    ends_of,
    ids_fingerprint,
    length,
    load_splits,
    of_valid,
    padding_share,
)
from mlxft.data.formats import Example
from mlxft.errors import ConfigError
from mlxft.model.memory import Shape
from mlxft.model.prefix import Completions, ScoredRows, Sharing
from mlxft.objectives.base import MicroBatch, NoDropout, OffPolicy, Step, Summary, beyond_context

_Row = TypeVar("_Row", EncodedPair, EncodedLabelled)
# A prompt is computed once for both answers where that leaves no more than this share of the tokens: attention with a
# mask of one's own costs more than the plain causal one. Short prompts are not worth a second pass.
SHARED, LEAST_PROMPT = 0.75, 32
_NO_DROPOUT = NoDropout("what is compared (completions, policy and reference) must come from one network")


class Answer(NamedTuple):
    """A prompt (P,) and an answer to it (R,), int32."""

    prompt: Ids
    reply: Ids


def completions_of(row: EncodedPair | EncodedLabelled) -> list[Answer]:
    """The chosen and the rejected answer of a pair, or the one there is."""
    if isinstance(row, EncodedPair):
        return [Answer(row.prompt_ids, row.chosen_ids), Answer(row.prompt_ids, row.rejected_ids)]
    return [Answer(row.prompt_ids, row.completion_ids)]


def stack(answers: Sequence[Answer], width: int | None = None) -> Completions:
    """Answers as rows of one batch, padded on the right, where causal attention never sees it."""
    width = width or max(len(a.prompt) + len(a.reply) for a in answers)
    ids = np.zeros((len(answers), width), dtype=np.int32)
    positions = []
    for b, (prompt, reply) in enumerate(answers):
        ids[b, : len(prompt)] = prompt
        ids[b, len(prompt) : len(prompt) + len(reply)] = reply
        positions.append(b * width + len(prompt) - 1 + np.arange(len(reply)))
    sizes = [len(a.reply) for a in answers]
    return Completions(
        ids=mx.array(ids),
        last=mx.array(np.array([len(a.prompt) + len(a.reply) - 1 for a in answers], dtype=np.int32)),
        lengths=mx.array(np.array(sizes, dtype=np.float32)),
        positions=mx.array(np.concatenate(positions).astype(np.int32)),
        labels=mx.array(np.concatenate([a.reply for a in answers]).astype(np.int32)),
        owners=mx.array(np.repeat(np.arange(len(answers)), sizes).astype(np.int32)),
    )


def stack_shared(prompts: Sequence[Ids], answers: Sequence[tuple[int, Ids]]) -> Completions:
    """Prompts as rows of their own, and answers with the number of their prompt, both padded on the right."""
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

    def int32(values: Any) -> mx.array:
        return mx.array(np.asarray(values).astype(np.int32))

    return Completions(
        prompts=int32(before),
        begins=int32(sizes),
        ids=int32(ids),
        of=int32(of),
        last=int32(before.size + np.arange(len(answers)) * ids.shape[1] + lengths - 1),
        lengths=mx.array(lengths.astype(np.float32)),
        positions=int32(np.concatenate(positions)),
        labels=int32(np.concatenate([reply for _, reply in answers])),
        owners=int32(np.repeat(np.arange(len(answers)), lengths)),
    )


def sharing_pays(rows: Sequence[EncodedPair | EncodedLabelled], width: int) -> tuple[int, int] | None:
    """Widths of the prompts and of the answers, if it is cheaper to compute each prompt once than rows of `width`."""
    pairs = [row for row in rows if isinstance(row, EncodedPair)]
    if not pairs or min(len(pair.prompt_ids) for pair in pairs) < LEAST_PROMPT:
        return None
    prompt = max(len(pair.prompt_ids) for pair in pairs)
    answer = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    return (prompt, answer) if prompt + 2 * answer <= SHARED * 2 * width else None


def stack_pairs(pairs: Sequence[EncodedPair], width: int, sharing: Sharing) -> Completions:
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
    counts = replace(first.counts, source_notes=tuple(notes), fingerprint=data_fingerprint(train, valid))
    return first.rows, counts, second.rows if second else [], second.counts if second else None


def check_completion_recipe(config: Config, formats: Sequence[str]) -> None:
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
    problems += _NO_DROPOUT.problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


class CompletionObjective(OffPolicy, Generic[_Row]):
    """An objective over rows that are judged whole. A subclass gives `make`, `per` and the loss.

    Args:
        per_row: rows of a batch that one of the data set becomes: two of a pair.
    """

    traceable = True  # the reference's numbers, and KTO's point, are in the batch

    def __init__(
        self, config: Config, tokenizer: Any, rows: list[_Row], counts: PairCounts, valid: list[_Row], per_row: int
    ) -> None:
        self.counts = counts
        self.rows: list[_Row] = rows
        self.valid: list[_Row] = valid
        self.notes: list[str] = counts.notes()
        super().__init__(config, tokenizer, np.array([length(row) for row in rows], dtype=np.int64), per_row)
        self.notes += beyond_context(config, self._lengths.tolist())
        self.notes += [f"validation: {note}" for note in beyond_context(config, list(map(length, valid)))]

    def prepare(self, model: nn.Module, base: str = "") -> None:
        self.notes += _NO_DROPOUT.take_out(model)

    def make(
        self, model: nn.Module, rows: Sequence[int], width: int, point: mx.array | None, valid: bool
    ) -> MicroBatch:
        """Return the micro-batch of these rows; `point` is what `reference_point` gave for the step."""
        raise AssertionError(f"{type(self).__name__} makes no micro-batches")

    def reference_point(self, model: nn.Module, slots: Sequence[Slot], valid: bool) -> mx.array | None:
        """Return a number () of the whole step, or of all validation rows, that its losses read; None: none."""
        return None

    def rebatch(self, config: Config) -> None:
        super().rebatch(config)
        self.__dict__.pop("most", None)

    def shapes(self) -> list[Shape]:
        found = []
        for slot in self.plan(0):
            rows = [self.rows[i] for i in slot.rows]
            answers = [answer for row in rows for answer in completions_of(row)]
            apart = sharing_pays(rows, slot.width)
            found.append(Shape(len(answers), slot.width, sum(len(a.reply) for a in answers), *(apart or ())))
        return found

    @cached_property
    def most(self) -> int:
        """Tokens of the largest batch, padding included."""
        return max(shape.rows * shape.width for shape in self.shapes())

    def make_step(self, model: nn.Module, slots: Sequence[Slot], *, valid: bool = False) -> Step:
        return self._step(model, slots, self.reference_point(model, slots, valid), valid)

    def _step(self, model: nn.Module, slots: Sequence[Slot], point: mx.array | None, valid: bool) -> Step:
        rows = self.valid if valid else self.rows
        weight = math.fsum(rows[i].weight for slot in slots for i in slot.rows)
        micro_batches = [self.make(model, slot.rows, slot.width, point, valid) for slot in slots]
        return Step(micro_batches, {self.section(): weight})

    def valid_steps(self, model: nn.Module) -> Iterator[Step]:
        if not self.valid:
            return
        slots = self.plan_valid(np.array([length(row) for row in self.valid], dtype=np.int64))
        point = self.reference_point(model, slots, True)
        yield from (self._step(model, [slot], point, True) for slot in slots)

    def real_tokens(self, data: ScoredRows) -> list[mx.array]:
        def before(ids: mx.array, lengths: mx.array) -> mx.array:
            return mx.arange(ids.shape[1]) < lengths[:, None]

        if data.prompts is None:
            return [before(data.ids, data.last + 1)]
        assert data.begins is not None
        return [before(data.prompts, data.begins), before(data.ids, data.lengths)]

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

    def previews(self, n: int) -> list[_Row]:
        """The first `n` pairs, or answers with a label."""
        return self.rows[:n]
