"""The contract between objectives and the loop: an objective yields steps and computes their loss.

The loop pulls a `Step`, adds up the gradients of its micro-batches, each term of the loss divided by its denominator
over the whole step, and updates. It never looks into a micro-batch's data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.config import Config, Settings
from mlxft.data.dataset import Encoded, EncodedLabelled, EncodedPair, IntArray, Mixture, Plan, Slot, plan_epoch
from mlxft.data.formats import FORMATS, TAKEN_BY
from mlxft.distributed import current
from mlxft.errors import ConfigError, DataError, ModelError
from mlxft.model.frozen import FrozenSource, frozen_residents
from mlxft.model.layers import without_dropout
from mlxft.model.load import context_of, read_model_config
from mlxft.model.memory import PLAIN_OUTLINE, Beside, Outline, Residents, Shape
from mlxft.text import Event, counted

# Architectures that look positions up in a table; MLX reads and writes memory beyond its end without a word.
POSITION_TABLES = ("gpt2", "gpt_bigcode")
MAX = "_max"  # metrics whose names end so are maxima, not sums
Trains = Callable[[str], bool]
# Sizes of a recipe that leaves them open. They hang on the rows alone, so that every machine makes the same run.
DEFAULT_BATCHES = 64  # micro-batches of an epoch x batch.accumulate that batch.tokens aims at ...
LEAST_DEFAULT_TOKENS, MOST_DEFAULT_TOKENS = 256, 2048  # ... within these
MOST_DEFAULT_EPOCHS = 20.0


class Terms(NamedTuple):
    """What a loss gives for one micro-batch: sums over its items, never means.

    Micro-batches and ranks differ in how many tokens or pairs they train, so the mean of their means is not the mean
    over all of them. Sums add up exactly; each is divided once, by its denominator over the whole step.

    Attributes:
        losses: term -> sum over the term's items, (), float32; the names are those of `Step.per`.
        metrics: name -> sum over the items of the first term of `Step.per`, or over those of the entry of that name;
            a metric named `..._max` is a maximum.
    """

    losses: dict[str, mx.array]
    metrics: dict[str, mx.array]

    def plus(self, more: Terms) -> Terms:
        """Add another micro-batch's sums; a name that one of the two lacks counts as 0 there."""

        def joined(mine: dict[str, mx.array], other: dict[str, mx.array]) -> dict[str, mx.array]:
            found = dict(mine)
            for name, value in other.items():
                join = mx.maximum if name.endswith(MAX) else mx.add
                found[name] = join(found[name], value) if name in found else value
            return found

        return Terms(joined(self.losses, more.losses), joined(self.metrics, more.metrics))


@dataclass(frozen=True)
class MicroBatch:
    """What is computed at once.

    Attributes:
        data: a dataclass of the objective's own, whose fields are arrays or None.
        tokens, trained_tokens: real ones, without padding, of rows that no micro-batch before it in the step has had;
            one without trained tokens is skipped.
        rows: where they come from, for messages.
        trains: which parameters get a gradient, by name; None: all that are trainable.
        finish: adds to the data what frozen models say of it, and returns it; None: nothing is missing.
        rank: the process that computes it; None: whichever has least to do.
    """

    data: Any
    tokens: int
    trained_tokens: int
    rows: tuple[str, ...] = ()
    trains: Trains | None = None
    finish: Callable[[Any], Any] | None = None
    rank: int | None = None

    def with_finish(self, finish: Callable[[Any], Any]) -> MicroBatch:
        """Return it with what frozen models say of it; with several ranks only the one that computes it asks them."""
        return replace(self, data=finish(self.data)) if current().size == 1 else replace(self, finish=finish)

    def finished(self) -> MicroBatch:
        """Return it with all its data."""
        return self if self.finish is None else replace(self, data=self.finish(self.data), finish=None)


@dataclass(frozen=True)
class Step:
    """One optimiser update.

    Attributes:
        micro_batches: those of all ranks; none where there is only an event to report.
        per: term of the loss -> its denominator over the whole step and all ranks, known before the first forward pass.
        ends_epoch: whether it is the epoch's last.
        event: what is reported before the step: of the rollout that it begins.
        before_s: seconds spent on the event's work, sampling and scoring, which do not count as training.
        after: called with the step's sums, not evaluated yet, and `per`, once the step is made.
        sources: of a mixture, name of a source -> rows, tokens and trained tokens of the step.
    """

    micro_batches: Sequence[MicroBatch]
    per: dict[str, float]
    ends_epoch: bool = False
    event: Event | None = None
    before_s: float = 0.0
    after: Callable[[Terms, dict[str, float]], None] | None = None
    sources: dict[str, tuple[int, int, int]] = field(default_factory=dict)


MakesStep = Callable[[], Step]


def arrays_of(data: Any) -> dict[str, mx.array]:
    """Return the arrays of a micro-batch's data, by name."""
    found = {f.name: getattr(data, f.name) for f in fields(data)}
    return {name: value for name, value in found.items() if value is not None}


def real_mask(ids: mx.array, lengths: mx.array) -> mx.array:
    """Return (B, T) bool, true for the first (B,) `lengths` tokens of each row of ids: those that are no padding."""
    return mx.arange(ids.shape[1]) < lengths[:, None]


class NoDropout(NamedTuple):
    """Training without dropout or noise, as objectives need it that compare a network's numbers with others of it.

    Attributes:
        why: the reason, for messages.
    """

    why: str

    def problems(self, config: Config) -> list[str]:
        """Return what is wrong with a recipe that asks for dropout or noise."""
        on = [name for name in ("dropout", "neftune") if getattr(config.tune, name)]
        return [f"tune.{name}: {self.why}; leave it out" for name in on]

    def take_out(self, *modules: nn.Module) -> list[str]:
        """Take the dropout of an adapter that is trained further out of modules, and return a note if there was any."""
        return [f"the adapter's dropout is off: {self.why}"] if without_dropout(*modules) else []


def format_problems(config: Config, formats: Sequence[str]) -> list[str]:
    """Return what is wrong with a recipe whose objective does not take its formats, and the objective that does."""
    problems = []
    for setting, format in config.data.formats.items():
        if format == "auto" or format in formats:
            continue
        taker, recipe = TAKEN_BY[format]
        way = f"choose {' or '.join(formats)}, or objective {taker}, which takes it (configs/{recipe}.yaml)"
        problems.append(f"{setting}.format: {format} is not for objective {config.objective}; {way}")
    asked = [setting for setting, format in config.data.formats.items() if format == "prompts"]
    if "prompts" in formats and 0 < len(asked) < len(config.data.formats):
        problems.append(f"{asked[0]}.format: prompts, beside rows with completions; give all sources the same")
    return problems


def whole_row_problems(config: Config, formats: Sequence[str], dropout: NoDropout) -> list[str]:
    """Return what is wrong with a recipe whose completions are trained whole, each as a row of its own."""
    data, name = config.data, config.objective
    problems = format_problems(config, formats)
    if data.train_on is not None:
        problems.append("data.train_on: completions are trained whole; leave it out")
    if data.overflow not in ("error", "drop"):
        problems.append(f"data.overflow: {data.overflow} would change prompts or completions; choose error or drop")
    if config.batch.pack:
        problems.append(f"batch.pack: is not for objective {name}, whose completions are rows of their own")
    return problems + dropout.problems(config)


@dataclass(frozen=True)
class Summary:
    """Counts and notes of an objective's data, for the start of a run and for `mlxft check`."""

    counts: dict[str, int | float] = field(default_factory=dict)  # label -> number, in the order to print
    notes: list[str] = field(default_factory=list)  # what was dropped or cut, a sentence each
    validates: bool = False  # whether there is held-out data
    packed: int = 0  # width of packed sequences; 0: each row stands alone
    ends: frozenset[int] = frozenset()  # the ids that end a trained turn


class Objective(ABC):
    """One way to train. A subclass needs `steps`, `loss`, `state_dict` and `load_state_dict`; the rest has defaults.

    Args:
        config: the recipe; the objective's own sections are `config.section(name, kind)`.
        tokenizer: the model's.
    Raises:
        ConfigError, DataError: settings or rows do not fit.

    Attributes:
        sections: section of a recipe -> its Settings.
        learning_rate: default of full fine-tuning; LoRA takes ten times as much.
        traceable: whether `loss` reads nothing but the model and a micro-batch's arrays, so that it can be compiled.
        noisy: whether `loss` adds the noise of tune.neftune.
        least_steps: steps that an open run.epochs comes to at least, within MOST_DEFAULT_EPOCHS; 0: one epoch.
        valued: whether the loss of a validation is the cost of KL less reward, and is shown as VALUE.
        compiled: whether the loop compiles it where shapes come again; set when the run is built.
    """

    sections: ClassVar[dict[str, type[Settings]]] = {}
    learning_rate: ClassVar[float] = 2e-5
    least_steps: ClassVar[int] = 0
    valued: ClassVar[bool] = False
    traceable: ClassVar[bool] = False
    noisy: ClassVar[bool] = False
    compiled: bool = False

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    def section(cls) -> str:
        """Return the name of the objective's own section, which a subclass of it keeps: the first of `sections`."""
        return next(iter(cls.sections))

    @classmethod
    def formats(cls, config: Config) -> Sequence[str]:
        """Return the formats of rows that it takes, among which data.format: auto chooses; by default all."""
        return tuple(FORMATS)

    @abstractmethod
    def steps(self, model: nn.Module) -> Iterator[Step]:
        """Yield steps without end, from where the state says; the state is past a step once it is yielded.

        The loop pulls a step only when the one before is on its way, so a step may be made with the newest weights.
        What frozen models say of a micro-batch belongs into its data, by `MicroBatch.finish`. All ranks yield the same
        steps; where some of a step's micro-batches are cut for them, each names its rank.
        """

    @abstractmethod
    def loss(self, model: nn.Module, data: Any) -> Terms:
        """Return sums over a micro-batch, differentiable in the model's trainable parameters."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return its position in the data, as JSON."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned."""

    # Set-up

    def prepare(self, model: nn.Module, base: str = "") -> None:
        """Add what the objective needs beside the model (a head), and keep what it starts from (a reference).

        Called once: after the model has what the recipe trains, before a checkpoint is restored.

        Args:
            base: fingerprint of the base.
        Raises:
            ConfigError, ModelError: it cannot be done with this model.
        """
        return

    def clip_groups(self) -> dict[str, float]:
        """Return parameters whose gradient is clipped on its own: prefix of their names -> multiplier of their rate."""
        return {}

    def rebatch(self, config: Config) -> None:
        """Make micro-batches from now on as `config` says, which differs in batch.tokens only."""
        self.config = config

    # Data

    def steps_per_epoch(self, epoch: int = 0) -> int | None:
        """Return the optimiser updates of an epoch, counted from 0; None: unknown, and run.steps is needed."""
        return None

    def default_epochs(self) -> float | None:
        """Return the epochs of a recipe that gives neither run.steps nor run.epochs: `least_steps`, or some more."""
        size = self.steps_per_epoch()
        return None if size is None else min(MOST_DEFAULT_EPOCHS, max(1.0, math.ceil(self.least_steps / max(1, size))))

    def fingerprint(self) -> str:
        """Return a hash of the data, so that a run is not resumed on other rows."""
        return ""

    def summary(self) -> Summary:
        """Return counts of rows and tokens."""
        return Summary()

    def previews(self, n: int) -> Sequence[Encoded | EncodedPair | EncodedLabelled]:
        """Return the first `n` training rows, to be shown."""
        return []

    def real_tokens(self, data: Any) -> list[mx.array]:
        """Return masks (B, T) of the real tokens, one for each pass through the model.

        Raises:
            ConfigError: the objective does not say; `tune.router_aux` needs it.
        """
        raise ConfigError(f"tune.router_aux: objective {self.config.objective} does not say which tokens are real")

    # Checkpoints

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays that it needs beside `state_dict` to continue exactly: a rollout that is in use."""
        return {}

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Restore what `arrays` returned; called after `load_state_dict`."""
        return

    def about(self) -> dict[str, Any]:
        """Return notes for the adapter's configuration, as JSON."""
        return {}

    # Validation

    def valid_steps(self, model: nn.Module) -> Iterator[Step]:
        """Yield the whole validation set, the same each time; nothing if there is none."""
        return iter(())

    def validated(self, means: dict[str, float]) -> dict[str, Any]:
        """Return what a validation reports, given the loss and the metrics per item over the whole set."""
        return means

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        """Validate in its own way and return numbers, `loss` among them, and `samples`; None: by `valid_steps`."""
        return None

    # Memory and time

    @classmethod
    def outline(cls, config: Config) -> Outline:
        """Return what a step reads of the model, for the memory plan."""
        return PLAIN_OUTLINE

    @classmethod
    def outfit(cls, config: Config, model: nn.Module) -> None:
        """Add to a model without weights what `prepare` adds, so that a plan counts it.

        Raises:
            ConfigError, ModelError: as `prepare`.
        """
        return

    @classmethod
    def frozen(cls, config: Config) -> Sequence[FrozenSource]:
        """Return the frozen models that it reads: what `prepare` opens by `FrozenModels`."""
        return ()

    @classmethod
    def residents(cls, config: Config, model: nn.Module) -> Residents:
        """Return what frozen models, and a critic, take beside the trained model."""
        sources = cls.frozen(config)
        return frozen_residents(sources, config, model) if sources else Residents()

    @classmethod
    def relief(cls, config: Config) -> list[str]:
        """Return what of its own settings saves memory; an error about memory names it first."""
        return []

    def beside(self, model: nn.Module) -> Beside | None:
        """Return what sampling, scoring and other roles take beside the steps; None: it samples nothing.

        Raises:
            ModelError: this architecture's memory cannot be predicted.
        """
        return None

    def shapes(self) -> list[Shape]:
        """Return the shapes of the first epoch's micro-batches; none where they are unknown before it runs."""
        return []

    def largest(self, model: nn.Module) -> list[MakesStep]:
        """Return functions that make the steps that may take most memory, to measure them; none: unknown."""
        return []

    def held(self) -> list[mx.array]:
        """Return the arrays that it holds beside the model's own."""
        return []

    def steps_per_rollout(self) -> int:
        """Return the steps that one rollout is used for; 0: it samples nothing."""
        return 0


def beyond_context(
    path: str,
    lengths: Sequence[int] | IntArray,
    whose: str = "the model",
    way: str | None = None,
) -> list[str]:
    """Return a note if rows are longer than a model's context; nothing where its config does not say.

    Args:
        path: the model's.
        lengths: tokens of each row.
        whose: what the model is called; way: what to do about it; None: data.max_length.
    Raises:
        DataError: the model has no embedding for later positions.
    """
    try:
        about = read_model_config(path)
    except ModelError:  # loading the model reports it
        return []
    context = context_of(about)
    long = np.asarray(lengths)[np.asarray(lengths) > context] if context is not None else ()
    if not len(long):
        return []
    if about.get("model_type") in POSITION_TABLES:
        raise DataError(
            f"{counted(len(long), 'rows are longer')} than the {context:,} positions that {whose} has embeddings for; "
            f"the longest has {max(long):,}: {way or f'set data.max_length to {context}, and see data.overflow'}"
        )
    note = (
        f"{counted(len(long), 'rows are longer')} than {whose}'s context of {context:,} tokens "
        f"(max_position_embeddings); the longest has {max(long):,}: {way or 'see data.max_length and data.overflow'}"
    )
    return [note]


def heaviest(shapes: Sequence[Shape], together: int = 1) -> list[int]:
    """Return the indices of the batches that may take most memory.

    Args:
        together: see `Shape.computed`.
    """
    # Some parts of a step grow with the tokens, attention with rows x width x width, the loss with the trained tokens.
    costs: list[Callable[[Shape], int]] = [
        lambda s: s.computed(together),
        lambda s: s.computed(together) * s.width,
        lambda s: s.rows * s.width,  # with gradient checkpointing no prompt is shared
        lambda s: s.trained,
    ]
    by_size = sorted(range(len(shapes)), key=lambda i: (shapes[i].rows * shapes[i].width, shapes[i].trained))
    found = [max(reversed(by_size), key=lambda i: cost(shapes[i])) for cost in costs]
    of_shape = {shapes[i]._replace(trained=0): i for i in found}  # of equal shapes the one that trains most
    return list(of_shape.values())


class OffPolicy(Objective):
    """An objective over given rows: the order of their micro-batches, and the position in it.

    A subclass gives `make_step`.

    Args:
        lengths: (N,) tokens of each row.
        per_row: rows of a micro-batch that one row of the data set becomes: two of a pair.
        mixture: the rows of each epoch; None: all, once.
    """

    def __init__(
        self, config: Config, tokenizer: Any, lengths: IntArray, per_row: int = 1, mixture: Mixture | None = None
    ) -> None:
        super().__init__(config, tokenizer)
        self._lengths, self._seed, self._per_row, self._mixture = lengths, config.run.seed, per_row, mixture
        self._epoch, self._next = 0, 0
        self.rebatch(self._sized(config))

    def _sized(self, config: Config) -> Config:
        """Return the recipe with the batch.tokens that suit the rows, where it leaves the size of batches open."""
        if config.batch.tokens is not None or config.batch.rows is not None:
            return config
        drawn = self._lengths if self._mixture is None else self._lengths[self._mixture.epoch(0)]
        tokens = int(drawn.sum()) * self._per_row // (DEFAULT_BATCHES * config.batch.accumulate)
        found = min(MOST_DEFAULT_TOKENS, max(LEAST_DEFAULT_TOKENS, tokens // 64 * 64))
        return config.model_copy(update={"batch": config.batch.model_copy(update={"tokens": found})})

    def make_step(self, model: nn.Module, slots: Sequence[Slot], *, valid: bool = False) -> Step:
        """Return the step of these micro-batches, of training or of validation rows."""
        raise AssertionError(f"{type(self).__name__} makes no steps")

    def rebatch(self, config: Config) -> None:
        super().rebatch(config)
        rows, tokens = config.batch.rows, max(1, config.batch.budget // self._per_row)
        self._budget: dict[str, Any] = {"rows": rows, "tokens": None if rows else tokens}
        self._accumulate = config.batch.accumulate
        self._sizes: dict[int, int] = {}  # epoch -> its number of micro-batches
        self._planned: tuple[int, Plan] | None = None  # the epoch asked for last

    def plan(self, epoch: int) -> Plan:
        """Return the micro-batches of one epoch."""
        if self._planned is None or self._planned[0] != epoch:
            if self._mixture is None:
                self._planned = epoch, self.arrange(self._lengths, epoch)
            else:
                rows = self._mixture.epoch(epoch)
                self._planned = epoch, self.arrange(self._lengths[rows], epoch).of(rows)
        return self._planned[1]

    def arrange(self, lengths: IntArray, epoch: int) -> Plan:
        """Return the micro-batches of an epoch whose rows have these lengths."""
        return plan_epoch(lengths, **self._budget, seed=self._seed, epoch=epoch)

    def epoch_counts(self, rows: str, tokens: str, trained: str) -> dict[str, int]:
        """Return, under these names, what the first epoch draws from all sources, and from each; {} of one source."""
        if self._mixture is None:
            return {}
        found = self._mixture.count(self.plan(0).order)
        counts = dict(zip((rows, tokens, trained), map(sum, zip(*found.values()))))
        for name, (n, _, of_those) in found.items():
            counts |= {f"{rows} of {name}": n, f"{trained} of {name}": of_those}
        return counts

    def plan_valid(self, lengths: IntArray) -> Plan:
        """Return the micro-batches of validation rows of these lengths."""
        return plan_epoch(lengths, **self._budget, seed=None)

    def largest(self, model: nn.Module) -> list[MakesStep]:
        slots = self.plan(0)
        # The second micro-batch stands for all further ones.
        steps = [[slots[i]] * min(2, self._accumulate) for i in heaviest(self.shapes(), self._per_row)]
        return [partial(self.make_step, model, step) for step in steps]

    def _shared(self, slots: Sequence[Slot]) -> tuple[list[Slot], list[int | None]]:
        """Cut the micro-batches of a step for the ranks, and return the rank of each; the rows are the same."""
        ranks = current()
        if ranks.size == 1 or self.config.tune.router_aux is not None:  # what is balanced together stays together
            return [*slots], [None] * len(slots)
        packed = self.config.batch.pack
        cut, owners = list[Slot](), list[int | None]()
        pieces = ranks.share([slot.sequences for slot in slots], [slot.width for slot in slots])
        widths = {row: slot.width for slot in slots for row in slot.rows}
        for sequences, rank in pieces:
            rows = [row for sequence in sequences for row in sequence]
            width = widths[rows[0]] if packed else int(self._lengths[rows].max())
            cut.append(Slot(tuple(sequences), width))
            owners.append(rank)
        return cut, owners

    def steps(self, model: nn.Module) -> Iterator[Step]:
        while True:
            plan = self.plan(self._epoch)
            after = min(self._next + self._accumulate, len(plan))
            slots, ranks = self._shared(plan[self._next : after])
            step = self.make_step(model, slots)
            made = [
                batch if rank is None else replace(batch, rank=rank) for batch, rank in zip(step.micro_batches, ranks)
            ]
            rows = [row for slot in slots for row in slot.rows]
            sources = {} if self._mixture is None else self._mixture.count(rows)
            last = after == len(plan)
            self._epoch, self._next = (self._epoch + 1, 0) if last else (self._epoch, after)
            yield replace(step, micro_batches=made, ends_epoch=last, sources=sources)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        if epoch not in self._sizes:
            self._sizes[epoch] = len(self.plan(epoch))
        return -(-self._sizes[epoch] // self._accumulate)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._next = state["epoch"], state["next"]
