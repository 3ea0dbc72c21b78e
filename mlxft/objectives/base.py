"""What every objective hands to the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxft.config import Config
from mlxft.data.batching import IntArray, Slot, plan_epoch
from mlxft.data.dataset import Encoded, EncodedAnswer, EncodedPair
from mlxft.errors import DataError, ModelError
from mlxft.model.layers import without_dropout
from mlxft.model.load import context_of, load_config
from mlxft.model.memory import Shape

# Architectures that look positions up in a table; MLX reads and writes memory beyond its end without a word.
POSITION_TABLES = ("gpt2", "gpt_bigcode")
MAX = "_max"  # metrics whose names end so are maxima, not sums
# Makes the micro-batches of a step, each when it is asked for, as `batches` does.
MakesStep = Callable[[], Iterator["Batch"]]


class LossSum(NamedTuple):
    """Sums over items, never means: total (), weight () and metrics, all float32.

    Micro-batches and ranks differ in how many tokens or pairs they train, so the mean of their means is not the mean
    over all of them. Sums add up exactly; the loop adds them and divides once, by the whole step's weight.
    `total` comes first, so that `mx.value_and_grad` of a function returning a LossSum differentiates it.
    """

    total: mx.array  # sum of per-item losses
    weight: mx.array  # number of items: trained tokens, pairs, response tokens
    metrics: dict[str, mx.array]  # name -> sum over the same items

    def plus(self, other: LossSum) -> LossSum:
        """The sums over both parts' items (`+` would join the tuples); a metric that one lacks counts as 0 there.

        Of a metric named `..._max` it is the larger one.
        """
        metrics = dict(self.metrics)
        for name, value in other.metrics.items():
            join = mx.maximum if name.endswith(MAX) else mx.add
            metrics[name] = join(metrics[name], value) if name in metrics else value
        return LossSum(self.total + other.total, self.weight + other.weight, metrics)

    def mean(self) -> mx.array:
        """Loss per item, (). Only where weight > 0 does it mean anything: an empty sum gives 0, not NaN.

        Raising would need the weight on the host, amid a compiled step; the loop skips empty steps and counts them.
        """
        return self.total / mx.where(self.weight > 0, self.weight, 1.0)


@dataclass(frozen=True)
class Batch:
    """What one micro-batch computes with, and what reports say of it. Only the objective looks into `arrays`."""

    arrays: dict[str, mx.array]
    tokens: int  # real ones: without padding
    trained_tokens: int  # 0: nothing to learn here, the loop skips it
    rows: tuple[str, ...]  # where they come from, for messages
    ends_epoch: bool = False
    ends_step: bool | None = None  # None: the recipe's batch.accumulate says
    trains: Callable[[str], bool] | None = None  # which parameters, by name; None: all that are trainable
    counts: bool = True  # False: another pass over rows that were counted already
    event: dict[str, Any] | None = None  # what is to be reported before the step: of a rollout
    before_s: float = 0.0  # seconds of making it that are not training's: of sampling and scoring
    lengths: tuple[int, ...] = ()  # real tokens of each row of `ids`, where no array says where they end


class NoDropout(NamedTuple):
    """Training without dropout, as objectives want it that compare what a network gives with what it gives elsewhere.

    Attributes:
        why: what dropout would do, for messages.
    """

    why: str

    def problems(self, config: Config) -> list[str]:
        """What is wrong with a recipe that asks for dropout."""
        return [f"tune.dropout: {self.why}; leave it out"] if config.tune.dropout else []

    def take_out(self, *modules: nn.Module) -> list[str]:
        """Take the dropout out of modules, which an adapter may have brought. Returns what is to be said of it."""
        return [f"the adapter's dropout is off: {self.why}"] if without_dropout(*modules) else []


@dataclass(frozen=True)
class Summary:
    """What an objective's data comes to, for the start of a run and for `mlxft check`."""

    counts: dict[str, int | float]  # label -> number, in the order to print
    notes: list[str] = field(default_factory=list)  # what was dropped or cut, a sentence each
    validates: bool = False  # whether there is held-out data
    packed: int = 0  # width of sequences of several rows; 0: each row is its own
    ends: frozenset[int] = frozenset()  # the ids that end a trained turn


class Objective(Protocol):
    """One way to train. The loop pulls batches, adds their LossSums, and never looks inside.

    Attributes:
        traceable: whether `loss` reads the model and `batch.arrays` alone, and nothing of Python that changes.
        compiled: whether the loop compiles it where shapes come again: batches should have few.
    """

    traceable: bool
    compiled: bool

    def prepare(self, model: nn.Module, base: str = "") -> None:
        """Once, when the model has what the recipe trains and before a checkpoint is put back: add what the objective
        needs beside it (a scalar head), note what it starts from (a reference).

        Args:
            base: fingerprint of the base.
        Raises:
            ConfigError, ModelError: it can not be done with this model.
        """
        ...

    def batches(self, model: nn.Module) -> Iterator[Batch]:
        """Micro-batches without end, from where `state_dict` says; the state is past a batch once it is yielded."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Sums over the batch, differentiable in the model's trainable parameters."""
        ...

    def valid_batches(self, model: nn.Module) -> Iterator[Batch]:
        """The whole validation set, the same each time; none if there is none."""
        ...

    def validated(self, means: dict[str, float]) -> dict[str, Any]:
        """What a validation reports, from the loss and metrics per item over the whole set."""
        ...

    def about(self) -> dict[str, Any]:
        """What is worth noting in the result beside its weights, as JSON."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        """A validation of its own, with `loss` among its numbers, and `samples`; None: the loss over valid_batches."""
        ...

    def parts(self) -> dict[str, float]:
        """Parameters that are clipped by themselves: prefix of their names -> multiplier of their learning rate."""
        ...

    def stepped(self, sums: LossSum) -> None:
        """The sums of the step that was just made, lazy."""
        ...

    def steps_per_epoch(self, accumulate: int, epoch: int = 0) -> int:
        """Optimiser updates of epoch `epoch`, from 0. No step reaches over an epoch's end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is in its data, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...

    def arrays(self) -> dict[str, mx.array]:
        """What beside `state_dict` it needs to go on exactly, for a checkpoint: a rollout that is in use."""
        ...

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Put back what `arrays` gave; after `load_state_dict`."""
        ...

    def fingerprint(self) -> str:
        """Hash of the data, so that a run is not resumed on other rows."""
        ...

    def summary(self) -> Summary:
        """Counts of rows and tokens."""
        ...

    def previews(self, n: int) -> Sequence[Encoded | EncodedPair | EncodedAnswer]:
        """The first `n` training rows, to be shown."""
        ...


def beyond_context(config: Config, lengths: Sequence[int]) -> list[str]:
    """That rows are longer than what the model was made for, if some are; nothing where its config does not say.

    Args:
        lengths: tokens of each row.
    Raises:
        DataError: the model has no number at all for later positions.
    """
    try:
        about = load_config(config.model.path)
    except ModelError:  # whoever loads the model says why it can not be
        return []
    context = context_of(about)
    long = [length for length in lengths if context is not None and length > context]
    if not long:
        return []
    if about.get("model_type") in POSITION_TABLES:
        raise DataError(
            f"{len(long):,} rows are longer than the {context:,} positions that the model has an embedding for; the "
            f"longest has {max(long):,}: set data.max_length to {context}, and see data.overflow"
        )
    note = (
        f"{len(long):,} rows are longer than the model's context of {context:,} tokens (max_position_embeddings); the "
        f"longest has {max(long):,}: see data.max_length and data.overflow"
    )
    return [note]


def heaviest(shapes: Sequence[Shape], together: int = 1) -> list[int]:
    """Which batches may take most memory.

    Args:
        together: see `Shape.computed`.
    """
    # Some parts of a step grow with the tokens, attention's with rows x width x width, the loss's with what is trained.
    costs: list[Callable[[Shape], int]] = [
        lambda s: s.computed(together),
        lambda s: s.computed(together) * s.width,
        lambda s: s.rows * s.width,  # where blocks are checkpointed no prompt is shared
        lambda s: s.trained,
    ]
    by_size = sorted(range(len(shapes)), key=lambda i: (shapes[i].rows * shapes[i].width, shapes[i].trained))
    found = [max(reversed(by_size), key=lambda i: cost(shapes[i])) for cost in costs]
    of_shape = {shapes[i]._replace(trained=0): i for i in found}  # of those of one shape the one that trains most
    return list(of_shape.values())


class OffPolicy:
    """What objectives over rows that are there from the start share: the order of their batches, and a place in it.

    Args:
        lengths: (N,) tokens of each row.
        per_row: rows of a batch that one of the data set becomes: two of a pair.
    """

    traceable = False  # a subclass says so
    compiled = False

    def __init__(self, config: Config, lengths: IntArray, per_row: int = 1) -> None:
        self._lengths, self._seed, self._per_row = lengths, config.run.seed, per_row
        self._epoch, self._next = 0, 0
        self.rebatch(config)

    def rebatch(self, config: Config) -> None:
        """Make batches as this recipe has it from now on, which differs in batch.tokens only; before the first."""
        rows, tokens = config.batch.rows, max(1, config.batch.budget // self._per_row)
        self._budget: dict[str, Any] = {"rows": rows, "tokens": None if rows else tokens}
        self._accumulate = config.batch.accumulate
        self._sizes: dict[int, int] = {}  # batches of an epoch

    def plan(self, epoch: int) -> list[Slot]:
        """The batches of one epoch."""
        return plan_epoch(self._lengths, **self._budget, seed=self._seed, epoch=epoch)

    def plan_valid(self, lengths: IntArray) -> list[Slot]:
        """The batches of validation rows of these lengths."""
        return plan_epoch(lengths, **self._budget, seed=None)

    def shapes(self) -> list[Shape]:
        """Of the first epoch's batches, for a plan of the memory they take; none where it does not say."""
        return []

    def rehearsed(self, model: nn.Module, slots: Sequence[Slot]) -> Iterator[Batch]:
        """The micro-batches of a step."""
        raise AssertionError(f"{type(self).__name__} makes no batches")

    def largest(self, model: nn.Module) -> list[MakesStep]:
        """Steps of the first epoch's batches that may take most."""
        slots = self.plan(0)
        # The second micro-batch stands for all further ones.
        steps = [[slots[i]] * min(2, self._accumulate) for i in heaviest(self.shapes(), self._per_row)]
        return [partial(self.rehearsed, model, step) for step in steps]

    def held(self) -> list[mx.array]:
        """Arrays that it holds beside the model's own."""
        return []

    def places(self) -> Iterator[tuple[list[Slot], int]]:
        """Each epoch's batches, and the number of the one to make; without end, from where `state_dict` says."""
        while True:
            slots = self.plan(self._epoch)
            for at in range(self._next, len(slots)):
                last = at + 1 == len(slots)
                self._epoch, self._next = (self._epoch + 1, 0) if last else (self._epoch, at + 1)
                yield slots, at

    def steps_per_epoch(self, accumulate: int, epoch: int = 0) -> int:
        if epoch not in self._sizes:
            self._sizes[epoch] = len(self.plan(epoch))
        return -(-self._sizes[epoch] // accumulate)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._next = state["epoch"], state["next"]

    def prepare(self, model: nn.Module, base: str = "") -> None:
        pass

    def validated(self, means: dict[str, float]) -> dict[str, Any]:
        return means

    def about(self) -> dict[str, Any]:
        return {}

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        return None

    def parts(self) -> dict[str, float]:
        return {}

    def stepped(self, sums: LossSum) -> None:
        pass

    def arrays(self) -> dict[str, mx.array]:
        return {}

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        pass
