"""From a recipe to a memory plan: what `mlxft check` shows, and what training decides by it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple

import mlx.nn as nn

from mlxft.config import Config, objective_class
from mlxft.device import NAMES, UNKNOWN, machine_bytes, planned_backend, usable_bytes
from mlxft.errors import ConfigError, ModelError
from mlxft.model.heads import begin_head, body_width, head_of, without_head
from mlxft.model.load import Loaded, NotBeforeLoading, skeleton
from mlxft.model.logits import Split
from mlxft.model.lora import dropouts, without_dropout
from mlxft.model.phases import PhasedPlan, Residents, sampling_bytes, scoring_bytes, with_phases
from mlxft.model.plan import (
    CHECKPOINT_ABOVE,
    PLAIN,
    Job,
    Outline,
    Plan,
    Shape,
    ShapeSplit,
    largest_packed,
    largest_tokens,
    plan,
)
from mlxft.model.random import aside
from mlxft.model.shared import Sharing
from mlxft.objectives.base import Objective, heaviest
from mlxft.objectives.onpolicy import memory as onpolicy
from mlxft.objectives.onpolicy.base import OnPolicy
from mlxft.parts import check_head, prepare
from mlxft.recipe import load_config
from mlxft.trainer.optim import Optimizer

MARGIN = 0.9  # of what is usable: the prediction is good to a tenth
LEAST_TOKENS = 2048  # below it, `auto` would rather checkpoint
MOST_TOKENS = 1 << 16  # for `auto`: no device is quicker with more in one go


@dataclass(frozen=True)
class Planned:
    """A recipe's plan.

    Attributes:
        plan: of the batch that takes most.
        rows, width: of that batch.
        usable: bytes that training may take here.
        tokens: the largest batch.tokens that fits here, of rows of that width; 0 if none does.
        others: setting -> bytes that it would take instead, where this machine does not decide between them.
    """

    plan: Plan
    rows: int
    width: int
    usable: int
    tokens: int
    others: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON, in bytes."""
        p = self.plan
        parts = {k: getattr(p, k) for k in PARTS}
        phased = {"roles": dict(p.roles), "phases": p.phases()} if isinstance(p, PhasedPlan) else {}
        return {
            **parts,
            **phased,
            "total": p.total,
            "needed": p.needed,
            "checkpoint": p.checkpoint,
            "rows": self.rows,
            "width": self.width,
            "usable": None if self.usable == UNKNOWN else self.usable,
            "fits": None if self.usable == UNKNOWN else p.fits(self.usable),
            "device": planned_backend(),
            "macs": p.macs(),
            "largest_tokens": self.tokens,
        }

    def lines(self) -> list[str]:
        """In words."""
        p = self.plan
        macs = ", ".join(map(str, p.macs())) or "none of up to 128"
        fits = f"{'fits' if p.fits(self.usable) else 'DOES NOT FIT'} here ({amount(self.usable)})"
        where = f"on {NAMES[planned_backend()]}" if self.usable == UNKNOWN else fits
        largest = f"batch.tokens up to {self.tokens:,}" if self.tokens else "not even one row of this length"
        on = "on" if p.checkpoint else "off"
        batch = f"{self.rows} x {self.width} tokens"
        phases = p.phases() if isinstance(p, PhasedPlan) else {}
        roles = {k: v for k, v in p.roles.items() if v} if isinstance(p, PhasedPlan) else {}
        return [
            f"memory: {amount(p.needed)} for {batch}, checkpointing {on}; {where}",
            *(f"  {k}: {amount(getattr(p, k))}" for k in PARTS[:2]),
            *(f"  {k} (a role): {amount(v)}" for k, v in roles.items()),
            *(f"  {k}: {amount(getattr(p, k))}" for k in PARTS[2:-1]),
            *(f"  peak of {k}: {amount(v)}" for k, v in phases.items()),
            f"  peak where there is room to work ahead: {amount(p.total)}",
            f"fits on Macs of (GB): {macs}",
            *([] if self.usable == UNKNOWN else [f"would fit here: {largest}"]),
            *(f"with {other}: {amount(needed)}" for other, needed in self.others.items()),
        ]


PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "batch", "ahead")


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.1f} MB"


def job_of(config: Config, model: nn.Module, trained_share: float = 1.0) -> Job:
    """What a plan needs to know of a recipe and its prepared model."""
    optim = config.optim.model_copy(update={"groups": []})  # they may name what the objective adds later
    optimizer = Optimizer(optim, model)
    state = sum(v.nbytes for v in optimizer.arrays().values())
    renewed, packed = optimizer.renewed(model), config.batch.pack
    return Job(model, state, trained_share, config.batch.accumulate, outline_of(config), renewed, packed)


def outline_of(config: Config) -> Outline:
    """What a step of the recipe's objective is; an objective that does not say trains log-likelihoods."""
    objective = objective_class(config.objective)
    if issubclass(objective, OnPolicy):
        return onpolicy.OUTLINE
    outline: Outline = objective.outline(config) if hasattr(objective, "outline") else PLAIN
    return outline


class Around(NamedTuple):
    """What on-policy training takes beside its steps.

    Attributes:
        residents: the other roles.
        sampling, scoring: bytes of these phases alone.
        parted: whether a step has several micro-batches.
    """

    residents: Residents
    sampling: int
    scoring: int
    parted: bool


def around_of(config: Config, model: nn.Module, objective: Any) -> Around | None:
    """That of a recipe and its prepared model; None where completions are not the model's own.

    Raises:
        ModelError: this architecture's memory can not be predicted.
    """
    if not isinstance(objective, OnPolicy):
        return None
    rolling = onpolicy.rolling(objective)
    phases = sampling_bytes(model, rolling), scoring_bytes(model, rolling.scored)
    return Around(onpolicy.residents(config, model), *phases, onpolicy.parted(objective))


def plan_batches(
    config: Config, model: nn.Module, shapes: Sequence[Shape], around: Around | None = None
) -> tuple[Plan, int, int]:
    """The plan of the batch that takes most, and its rows and width, with checkpointing as it will be.

    Raises:
        ModelError: this architecture's memory can not be predicted.
    """
    together = outline_of(config).together
    if any(s.prompt for s in shapes) and not Sharing(ShapeSplit(model)).thinkable:
        shapes = [Shape(*s[:3]) for s in shapes]

    def plans(checkpoint: bool) -> list[tuple[Plan, int, int]]:
        found = []
        for s in (shapes[i] for i in heaviest(shapes, together)):
            job = job_of(config, model, s.trained / (s.rows * s.width))
            shared = (0, 0) if checkpoint else (s.prompt, s.answer)
            found.append((_planned(job, s, checkpoint, shared, around), s.rows, s.width))
        return found

    def most(found: list[tuple[Plan, int, int]]) -> tuple[Plan, int, int]:
        return max(found, key=lambda f: f[0].needed)

    setting = config.memory.checkpoint
    off = most(plans(False)) if setting != "on" else None
    room = min(usable_bytes(config.memory.limit), machine_bytes() * CHECKPOINT_ABOVE)
    if off is not None and (setting == "off" or off[0].fits(room)):
        return off
    return most(plans(True))


def _planned(job: Job, s: Shape, checkpoint: bool, shared: tuple[int, int], around: Around | None) -> Plan:
    if around is None:
        return plan(job, s.rows, s.width, checkpoint, shared)
    step = plan(job, s.rows, s.width, checkpoint, shared)
    return with_phases(step, around.residents, around.sampling, around.scoring, job.sums if around.parted else 0)


def planned(config: Config, model: nn.Module, shapes: Sequence[Shape], around: Around | None = None) -> Planned:
    """The plan of a recipe's batches, and what else would fit.

    Raises:
        ModelError: this architecture's memory can not be predicted.
    """
    found, rows, width = plan_batches(config, model, shapes, around)
    room, others = usable_bytes(config.memory.limit), dict[str, int]()

    def other(said: str, section: str, setting: str, value: Any) -> None:
        changed = getattr(config, section).model_copy(update={setting: value})
        there = plan_batches(config.model_copy(update={section: changed}), model, shapes, around)[0]
        others[said] = there.needed

    if config.batch.pack and planned_backend() != "cpu":
        other("batches as large of rows that are not packed, whose attention is fused", "batch", "pack", False)
    if room == UNKNOWN:
        if config.memory.checkpoint == "auto":
            other("memory.checkpoint: on", "memory", "checkpoint", "on")
        return Planned(found, rows, width, room, 0, others)
    job = job_of(config, model)
    beside = around.residents.with_training(job) if around is not None else 0
    tokens = largest_tokens(job, width, found.checkpoint, MARGIN * room - beside, MOST_TOKENS)
    return Planned(found, rows, width, room, min(tokens, MOST_TOKENS), others)


def settled(config: Config, resume: bool) -> Config:
    """Settle what a recipe leaves open: `batch.tokens: auto`, by what a plan says fits, and the day.

    A run that is resumed keeps what it began with: these two, the optim.lr that its recipe did not give, and whether
    blocks are checkpointed and the step is compiled.

    Raises:
        ModelError: the model can not be had.
        ConfigError: no row of data.max_length fits; memory can not be predicted, and `memory.measure` is off.
    """
    file = config.run_dir / "config.yaml"
    stored = load_config(file, looked_at=True) if resume and file.exists() else None
    if stored is not None:
        checkpoint = stored.memory.checkpoint if config.memory.checkpoint == "auto" else config.memory.checkpoint
        memory = config.memory.model_copy(update={"checkpoint": checkpoint})
        compile_ = stored.run.compile if config.run.compile == "auto" else config.run.compile
        run = config.run.model_copy(update={"compile": compile_})
        optim = config.optim.with_default(stored.optim.lr)
        config = config.model_copy(update={"optim": optim, "memory": memory, "run": run})
    if config.data.date is None:
        day = (stored and stored.data.date) or date.today()
        config = config.model_copy(update={"data": config.data.model_copy(update={"date": day})})
    if config.batch.tokens != "auto":
        return config
    return with_tokens(config, _auto_tokens(config) if stored is None else stored.batch.tokens)


def with_tokens(config: Config, tokens: Any) -> Config:
    """The recipe with another batch.tokens."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"tokens": tokens})})


def is_open(config: Config) -> bool:
    """Whether a recipe, before it was `settled`, leaves batch.tokens to what is measured."""
    return config.batch.tokens == "auto" and config.memory.measure


def _auto_tokens(config: Config) -> int:
    """By the plan; where there can be none, what the first measured step is of."""
    width, usable = config.data.max_length, usable_bytes(config.memory.limit)
    if usable == UNKNOWN:
        raise ConfigError("batch.tokens: auto: the other machine's memory is not known; give memory.limit too")
    if width > MOST_TOKENS:
        raise ConfigError(
            f"batch.tokens: auto: makes batches of at most {MOST_TOKENS:,} tokens, and data.max_length is "
            f"{width:,}; lower it, or give batch.tokens as a number"
        )
    try:
        bare = bare_skeleton(config)
    except NotBeforeLoading as error:
        return _unplanned_tokens(config, error)
    model = outfitted(config, bare)
    try:
        found, room = _planned_tokens(config, model, MARGIN * usable)
    except ModelError as error:
        return _unplanned_tokens(config, error)
    if not found:
        raise ConfigError(
            f"batch.tokens: auto: not even one row of data.max_length ({width}) fits in {amount(room)}; lower "
            "data.max_length or tune.rank, or set model.quantize: 4 or memory.checkpoint: on; mlxft check shows a plan"
        )
    return min(found, MOST_TOKENS)


def _unplanned_tokens(config: Config, error: ModelError) -> int:
    if config.memory.measure:
        return LEAST_TOKENS
    raise ConfigError(f"batch.tokens: auto: {error}; give it as a number, or set memory.measure: true") from error


def _planned_tokens(config: Config, model: nn.Module, room: float) -> tuple[int, float]:
    """The largest batch.tokens that fits, 0 if none does; and the bytes of `room` that steps may take.

    Raises:
        ModelError: this architecture's memory can not be predicted.
    """
    job, width, setting = job_of(config, model), config.data.max_length, config.memory.checkpoint
    if job.outline is onpolicy.OUTLINE:  # others may be alike
        room -= onpolicy.residents(config, model).with_training(job)
    largest = largest_packed if job.packed else largest_tokens
    found = 0
    if setting != "on":
        # On its own, checkpointing is left off up to a share of the machine: larger batches would switch it on.
        most = room if setting == "off" else min(room, machine_bytes() * CHECKPOINT_ABOVE)
        found = largest(job, width, False, most, MOST_TOKENS)
    if setting != "off" and found < LEAST_TOKENS:
        found = largest(job, width, True, room, MOST_TOKENS)
    return found, room


def base_skeleton(config: Config) -> nn.Module:
    """The recipe's model with what is trained, without weights; the random state is left as it was.

    Raises:
        ConfigError, ModelError: as training would, or the model is not known before it is loaded.
    """
    return outfitted(config, bare_skeleton(config))


@aside()
def bare_skeleton(config: Config) -> Loaded:
    """The recipe's model without weights.

    Raises:
        ModelError: it is not known before it is loaded.
    """
    m = config.model
    return skeleton(
        m.path, dtype=m.dtype, quantize=m.quantize, group_size=m.group_size, trust_remote_code=m.trust_remote_code
    )


@aside()
def outfitted(config: Config, bare: Loaded) -> nn.Module:
    """The model with what is trained, as `prepare` and the objective add it.

    Raises:
        ConfigError, ModelError: as training would.
    """
    m = config.model
    prepare(config, bare)
    outline = outline_of(config)
    if not outline.dropout:
        without_dropout(bare.model)
    if outline.reads == "scores":
        setting = "tune.train" if config.tune.train else "tune.targets"
        begin_head(ShapeSplit(bare.model), m.adapter or m.path, setting)
    if onpolicy.critic(config) is not None:
        body_width(ShapeSplit(bare.model))  # which refuses as training does
    check_head(config, bare.model)
    return bare.model


def full_logits(split: Split) -> list[str]:
    """What to say where the logits of chosen positions can not be had alone."""
    if split.separable or head_of(split.model) is not None:
        return []
    kind = type(split.model).__module__.rpartition(".")[2]
    text = (
        f"logits are computed for every position: the body of this model ({kind}) can not be taken apart from its "
        "output layer, so tokens that are not trained cost as much memory and time as those that are"
    )
    return [text]


def decide_checkpointing(
    config: Config, model: nn.Module, objective: Any, refuse: bool = True
) -> tuple[bool, list[str]]:
    """Whether to checkpoint, and what to say of the memory that training will take.

    Args:
        refuse: whether a plan of the steps may refuse them; else what is measured does, or it was when the run began.
    Raises:
        ConfigError: it takes more than `memory.limit`, or than this machine has.
    """
    split = Split(model)
    shapes, notes = batch_shapes(objective), full_logits(split)
    if any(shape.prompt for shape in shapes) and Sharing(split).reason:
        shapes = [Shape(*shape[:3]) for shape in shapes]
    if not shapes:
        unknown = f"the batches of objective {config.objective} are not known before it runs"
        return config.memory.checkpoint == "on", [*notes, _unpredicted(config, unknown)]
    # A critic stands in the model by now: it is counted among the roles.
    with without_head(model) if isinstance(objective, OnPolicy) else nullcontext():
        try:
            around = around_of(config, model, objective)
            found, rows, width = plan_batches(config, model, shapes, around)
        except ModelError as error:
            return config.memory.checkpoint == "on", [*notes, _unpredicted(config, str(error))]
    if around is not None:
        notes += around.residents.notes
    phases = found.phases(ahead=False) if isinstance(found, PhasedPlan) else {}
    if refuse or max((v for k, v in phases.items() if k != "training"), default=0) > usable_bytes(config.memory.limit):
        check_room(config, found, rows, width)
    why = " (memory.checkpoint: auto)" if config.memory.checkpoint == "auto" else ""
    said = f"expected peak memory: {amount(found.total)}"
    return found.checkpoint, [*notes, said + (f"; gradient checkpointing is on{why}" if found.checkpoint else "")]


def _unpredicted(config: Config, why: str) -> str:
    """What to say where there is no plan: what then becomes of gradient checkpointing."""
    if config.memory.checkpoint != "auto":
        return f"memory is not predicted: {why}"
    then = "a measured step decides" if config.memory.measure else "set memory.checkpoint: on where memory runs out"
    return f"memory is not predicted: {why}; gradient checkpointing is off: {then}"


def why_eager(config: Config, model: nn.Module, objective: Objective) -> str:
    """What to say where the step of a recipe and its prepared model can not be compiled; empty if it can.

    Raises:
        ConfigError: it can not, and `run.compile` asks for it.
    """
    why = ""
    if not objective.traceable:
        why = f"the loss of objective {config.objective} reads more than the arrays of a batch"
    elif config.tune.router_aux is not None:
        why = "tune.router_aux reads more of a batch than its arrays"
    elif dropouts(model):
        why = "dropout draws anew in each step (tune.dropout, or what the model or model.adapter brings)"
    if why and config.run.compile == "on":
        raise ConfigError(f"run.compile: on: {why}; leave it out")
    return why and f"the step is not compiled: {why}"


def check_room(config: Config, found: Plan, rows: int, width: int) -> None:
    """Refuse a recipe whose largest batch, of rows x width tokens, does not fit.

    Raises:
        ConfigError: it takes more than `memory.limit`, or than this machine has.
    """
    if not found.fits(usable_bytes(config.memory.limit)):
        raise ConfigError(f"{_needs(found, rows, width)}, or raise memory.limit; {room_of(config)}")


def room_of(config: Config) -> str:
    """What a recipe's training may take, in words."""
    limit = "memory.limit" if config.memory.limit is not None else "what this machine can give"
    return f"{limit} is {amount(usable_bytes(config.memory.limit))}"


def _needs(found: Plan, rows: int, width: int) -> str:
    """What a plan that does not fit needs, and what helps."""
    phases = found.phases(ahead=False) if isinstance(found, PhasedPlan) else {}
    phase = max(phases, key=lambda name: phases[name]) if phases else "training"
    if phase == "sampling":
        return (
            f"sampling needs {amount(found.needed)}. What helps: a smaller rollout.rows (completions decoded at once) "
            "or rollout.max_tokens, shorter prompts, model.quantize: 4"
        )
    step = "the step stays the same" if phases else "with batch.accumulate for the same step; auto finds one"
    return (
        f"{phase} needs {amount(found.needed)} (batches of {rows} x {width} tokens). What helps: a smaller "
        f"batch.tokens ({step}), memory.checkpoint: on, model.quantize: 4, a shorter data.max_length"
    )


def batch_shapes(objective: Any) -> list[Shape]:
    """Shapes of the first epoch's batches; none where an objective can not tell before it runs."""
    if isinstance(objective, OnPolicy):
        return onpolicy.shapes(objective)
    return [Shape(*s) for s in objective.shapes()] if hasattr(objective, "shapes") else []
