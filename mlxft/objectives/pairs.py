"""What objectives over given completions share: reward models, and preference training on pairs or labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxft.config import Config
from mlxft.data.dataset import (
    Counts,
    EncodedCompletion,
    EncodedLabelled,
    EncodedPair,
    Ids,
    Sizes,
    Slot,
    encode_sources,
    ends_of,
    ids_fingerprint,
    lengths_of,
    padding_share,
    sizes_of,
)
from mlxft.errors import ConfigError
from mlxft.model.logits import Split
from mlxft.model.memory import Shape
from mlxft.model.prefix import Completions, ScoredRows, Sharing
from mlxft.objectives import functional as F
from mlxft.objectives.base import (
    MicroBatch,
    NoDropout,
    OffPolicy,
    Step,
    Summary,
    beyond_context,
    real_mask,
    whole_row_problems,
)

_Row = TypeVar("_Row", EncodedPair, EncodedLabelled)
# A prompt is computed once for both completions where that leaves at most this share of the tokens: attention with an
# explicit mask costs more than causal attention. Short prompts do not pay for a second pass.
SHARED, LEAST_PROMPT = 0.75, 32
_NO_DROPOUT = NoDropout("what is compared (completions, policy and reference) must come from one network")


def completions_of(row: EncodedPair | EncodedLabelled) -> list[EncodedCompletion]:
    """Return the chosen and the rejected completion of a pair, or a labelled row's only one."""
    if isinstance(row, EncodedPair):
        return [EncodedCompletion(row.prompt_ids, row.chosen_ids), EncodedCompletion(row.prompt_ids, row.rejected_ids)]
    return [EncodedCompletion(row.prompt_ids, row.completion_ids)]


def stack(
    rows: Sequence[EncodedCompletion], width: int | None = None, own: Sequence[npt.NDArray[np.bool_]] | None = None
) -> Completions:
    """Stack prompts with their completions as rows of one batch, padded on the right.

    Args:
        own: which tokens of each completion are read; default: all of them.
    """
    own = [np.ones(len(row.reply), dtype=bool) for row in rows] if own is None else own
    width = width or max(len(row.prompt) + len(row.reply) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int32)
    positions = []
    for b, (prompt, reply) in enumerate(rows):
        ids[b, : len(prompt)] = prompt
        ids[b, len(prompt) : len(prompt) + len(reply)] = reply
        positions.append(b * width + len(prompt) - 1 + np.flatnonzero(own[b]))
    sizes = [int(mine.sum()) for mine in own]
    return Completions(
        ids=_int32(ids),
        last=_int32([len(row.prompt) + len(row.reply) - 1 for row in rows]),
        lengths=mx.array(np.array(sizes, dtype=np.float32)),
        positions=_int32(np.concatenate(positions)),
        labels=_int32(np.concatenate([row.reply[mine] for row, mine in zip(rows, own)])),
        owners=_int32(np.repeat(np.arange(len(rows)), sizes)),
    )


def _int32(values: Any) -> mx.array:
    return mx.array(np.asarray(values).astype(np.int32))


def stack_shared(prompts: Sequence[Ids], completions: Sequence[tuple[int, Ids]]) -> Completions:
    """Stack prompts as rows of their own, and completions with the index of their prompt, both padded on the right."""
    sizes = np.array([len(p) for p in prompts], dtype=np.int32)
    before = np.zeros((len(prompts), sizes.max()), dtype=np.int32)
    for b, prompt in enumerate(prompts):
        before[b, : len(prompt)] = prompt
    of = np.array([p for p, _ in completions], dtype=np.int32)
    lengths = np.array([len(reply) for _, reply in completions], dtype=np.int32)
    ids = np.zeros((len(completions), lengths.max()), dtype=np.int32)
    positions = []
    for r, (p, reply) in enumerate(completions):
        ids[r, : len(reply)] = reply
        start = before.size + r * ids.shape[1]
        positions.append(np.array([p * before.shape[1] + len(prompts[p]) - 1, *range(start, start + len(reply) - 1)]))
    return Completions(
        prompts=_int32(before),
        begins=_int32(sizes),
        ids=_int32(ids),
        of=_int32(of),
        last=_int32(before.size + np.arange(len(completions)) * ids.shape[1] + lengths - 1),
        lengths=mx.array(lengths.astype(np.float32)),
        positions=_int32(np.concatenate(positions)),
        labels=_int32(np.concatenate([reply for _, reply in completions])),
        owners=_int32(np.repeat(np.arange(len(completions)), lengths)),
    )


def sharing_pays(sizes: Sizes, width: int) -> tuple[int, int] | None:
    """Return the widths of prompts and completions where computing each prompt once is cheaper than rows of `width`.

    Args:
        sizes: of some rows, see `sizes_of`; labelled ones share no prompt.
    """
    if sizes.shape[1] != 3 or sizes[:, 0].min() < LEAST_PROMPT:
        return None
    prompt, longest = int(sizes[:, 0].max()), int(sizes[:, 1:].max())
    return (prompt, longest) if prompt + 2 * longest <= SHARED * 2 * width else None


def stack_pairs(pairs: Sequence[EncodedPair], width: int, sharing: Sharing) -> Completions:
    """Stack the chosen and then the rejected completions, with each prompt once where that is cheaper."""
    prompts = [pair.prompt_ids for pair in pairs]
    replies = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    if sharing_pays(sizes_of(pairs), width) and sharing.possible:
        return stack_shared(prompts, [(i % len(pairs), reply) for i, reply in enumerate(replies)])
    return stack([EncodedCompletion(prompts[i % len(pairs)], reply) for i, reply in enumerate(replies)], width)


def encode_splits(
    config: Config, tokenizer: Any, build: Callable[..., Any], kind: type[Any]
) -> tuple[Sequence[Any], Counts, Sequence[Any], Counts | None]:
    """Encode training and validation rows by `encode_pairs` or `encode_labelled` to rows of a kind, and count them.

    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """
    data = config.data
    options = {"max_length": data.max_length, "overflow": data.overflow, "chat": data.template == "auto"}
    first, second, notes, fingerprint = encode_sources(
        config, tokenizer, lambda examples, block: build(examples, tokenizer, **options, block=block), kind
    )
    if second:
        notes = [*notes, *(f"validation: {note}" for note in second.counts.left_out())]
    counts = replace(first.counts, source_notes=tuple(notes), fingerprint=fingerprint)
    return first.rows, counts, second.rows if second else [], second.counts if second else None


def halves(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the chosen completions' half and the rejected ones'."""
    half = x.shape[0] // 2
    return x[:half], x[half:]


def implicit_rewards(rewards: mx.array, size: mx.array, weights: mx.array) -> dict[str, mx.array]:
    """Return metrics of implicit rewards, as sums over pairs.

    Args:
        rewards: (2n,) of the chosen completions and then of the rejected ones.
        size: (2n,) magnitude of the numbers that each was computed from.
    """
    chosen, rejected = halves(mx.stop_gradient(rewards))
    difference = chosen - rejected
    values = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "accuracy": F.wins(difference, mx.add(*halves(mx.stop_gradient(size)))),
        "margin": difference,
    }
    return {name: (weights * value).sum() for name, value in values.items()}


def micro_batch(data: Any, rows: Sequence[EncodedPair | EncodedLabelled], trained_tokens: int) -> MicroBatch:
    """Return the micro-batch that was made of these rows."""
    tokens = sum(len(each.prompt) + len(each.reply) for row in rows for each in completions_of(row))
    return MicroBatch(data, tokens, trained_tokens, tuple(row.where for row in rows))


def check_completion_recipe(config: Config, formats: Sequence[str]) -> None:
    """Raise ConfigError for settings that have no meaning for given completions, all of them in one."""
    if problems := whole_row_problems(config, formats, _NO_DROPOUT):
        raise ConfigError("\n".join(problems))


class CompletionObjective(OffPolicy, Generic[_Row]):
    """An objective over given completions, each trained whole. A subclass gives `make` and the loss.

    Args:
        per_row: rows of a micro-batch that one row of the data set becomes: two of a pair.
    """

    least_steps = 100
    traceable = True  # the reference's numbers, and KTO's reference point, are in the batch

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        rows: Sequence[_Row],
        counts: Counts,
        valid: Sequence[_Row],
        per_row: int,
    ) -> None:
        self.counts = counts
        self.rows: Sequence[_Row] = rows
        self.valid: Sequence[_Row] = valid
        self.notes: list[str] = counts.notes()
        self._sharing: Sharing | None = None
        super().__init__(config, tokenizer, lengths_of(rows), per_row, counts.mixture)
        self.notes += beyond_context(config.model.path, self._lengths)
        self.notes += [f"validation: {note}" for note in beyond_context(config.model.path, lengths_of(valid))]

    def prepare(self, model: nn.Module, base: str = "") -> None:
        self.notes += _NO_DROPOUT.take_out(model)

    def sharing(self, model: nn.Module) -> Sharing:
        """Return what reads the model's completions; another model gets a new one."""
        if self._sharing is None or self._sharing.split.model is not model:
            self._sharing = Sharing(Split(model))
        return self._sharing

    def make(
        self, model: nn.Module, rows: Sequence[int], width: int, point: mx.array | None, valid: bool
    ) -> MicroBatch:
        """Return the micro-batch of these rows; `point` is what `reference_point` gave for the step."""
        raise AssertionError(f"{type(self).__name__} makes no micro-batches")

    def chosen_rows(self, rows: Sequence[int], valid: bool) -> list[_Row]:
        """Return some rows of the training or the validation set."""
        return [(self.valid if valid else self.rows)[i] for i in rows]

    def reference_point(self, model: nn.Module, slots: Sequence[Slot], valid: bool) -> mx.array | None:
        """Return a number () of the whole step, or of all validation rows, that its losses read."""
        return None

    def rebatch(self, config: Config) -> None:
        super().rebatch(config)
        self.__dict__.pop("most", None)

    def shapes(self) -> list[Shape]:
        found, every = [], sizes_of(self.rows)
        for slot in self.plan(0):
            sizes = every[list(slot.rows)]
            shared = sharing_pays(sizes, slot.width) or ()
            found.append(Shape(sizes[:, 1:].size, slot.width, int(sizes[:, 1:].sum()), *shared))
        return found

    @cached_property
    def most(self) -> int:
        """Return the tokens of the largest batch, padding included."""
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
        slots = self.plan_valid(lengths_of(self.valid))
        point = self.reference_point(model, slots, True)
        yield from (self._step(model, [slot], point, True) for slot in slots)

    def real_tokens(self, data: ScoredRows) -> list[mx.array]:
        if data.prompts is None:
            return [real_mask(data.ids, data.last + 1)]
        assert data.begins is not None
        return [real_mask(data.prompts, data.begins), real_mask(data.ids, data.lengths)]

    def fingerprint(self) -> str:
        return self.counts.fingerprint

    def ids_fingerprint(self) -> str:
        """Return a hash of all ids, which numbers computed from them depend on."""
        return ids_fingerprint(self.rows) + ids_fingerprint(self.valid)

    def summary(self) -> Summary:
        kind = "pairs" if self.rows and isinstance(self.rows[0], EncodedPair) else "answers"
        counts: dict[str, int | float] = {
            kind: len(self.rows),
            "tokens": self.counts.tokens,
            "response tokens": self.counts.trained_tokens,
            "padding share": padding_share(self.plan(0), self._lengths),
            **self.epoch_counts(kind, "tokens", "response tokens"),
        }
        if self.counts.chosen_longer is not None:
            counts["chosen is longer"] = self.counts.chosen_longer
        if self.valid:
            counts[f"validation {kind}"] = len(self.valid)
        return Summary(counts, self.notes, bool(self.valid), ends=frozenset(ends_of(self.rows)))

    def previews(self, n: int) -> list[_Row]:
        """Return the first `n` pairs, or labelled completions."""
        return list(self.rows[:n])
