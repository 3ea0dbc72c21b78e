"""Build what a recipe describes: the model with what is trained, the objective, and the plan and measurement of its
memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.config import Config, load_config, objective_class
from mlxft.data.chat import set_day
from mlxft.device import (
    BACKEND_NAMES,
    CROWDED,
    FAILURES,
    UNKNOWN,
    backend,
    gpu_failed,
    gpu_failure,
    machine_bytes,
    planned_backend,
    swap_bytes,
    usable_bytes,
)
from mlxft.errors import ConfigError, ModelError
from mlxft.model.adapters import LoRASpec, load_adapter, prepare_adapter, prepare_full, select_targets
from mlxft.model.cpu import quicker
from mlxft.model.heads import find_head, head_of, without_head
from mlxft.model.layers import (
    aside,
    checkpoint_layers,
    dropouts,
    is_checkpointed,
    limits,
    probing,
    watch_routers,
    without_dropout,
)
from mlxft.model.load import Loaded, NotBeforeLoading, base_fingerprint, skeleton
from mlxft.model.load import load as load_model
from mlxft.model.logits import Split
from mlxft.model.memory import (
    CHECKPOINT_ABOVE,
    Beside,
    Job,
    MemoryPlan,
    PhasedPlan,
    Shape,
    ShapeSplit,
    largest_packed,
    largest_tokens,
    plan,
    with_phases,
)
from mlxft.model.prefix import Sharing
from mlxft.objectives.base import MakesStep, MicroBatch, Objective, Step, heaviest
from mlxft.runs import find_adapter
from mlxft.trainer.loop import CompiledGradient, LossAndGradients, gradient, scales_of, summed
from mlxft.trainer.optim import Arrays, Optimizer

# --- parts ------------------------------------------------------------------------------------------------------------
# What a recipe names: its model, its objective with the data, and what of the model is trained.


def load_base(config: Config, *, lazy: bool = False, template: Path | None = None) -> Loaded:
    """The model that a recipe names, without adapters.

    Args:
        template: where the chat template is, in place of model.chat_template.
    """
    m = config.model
    return load_model(
        m.path,
        dtype=m.dtype,
        quantize=m.quantize,
        group_size=m.group_size,
        chat_template=template or m.chat_template,
        trust_remote_code=m.trust_remote_code,
        lazy=lazy,
    )


def make_objective(config: Config, tokenizer: Any) -> Objective:
    """The objective that a recipe names, with its data.

    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """
    if config.data.date is not None:
        set_day(tokenizer, config.data.date)
    objective: Objective = objective_class(config.objective)(config, tokenizer)
    run = config.run
    needing = {"patience": run.patience is not None}
    if not run.sample_prompts:  # these are answered at each validation, with or without held-out rows
        needing |= {"eval_every": run.eval_every is not None, "eval_at_start": run.eval_at_start}
    if config.batch.pack and not objective.summary().packed:
        raise ConfigError(f"batch.pack: objective {config.objective} does not pack rows; leave it out")
    idle = [f"run.{name}" for name, given in needing.items() if given]
    if idle and not objective.summary().validates:
        raise ConfigError(f"{', '.join(idle)}: there is no validation data to use; give data.valid (0.05: a share)")
    return objective


def prepare(config: Config, loaded: Loaded) -> LoRASpec | None:
    """Make trainable what the recipe says. Returns the adapter's shape, None for whole weights."""
    tune, model = config.tune, loaded.model
    if tune.router_aux is not None:
        watch_routers(model, "tune.router_aux")
    if config.model.adapter is not None:
        return _continue_adapter(config, loaded)
    mx.random.seed(config.run.seed)
    if tune.method == "full":
        prepare_full(model, tune.layers, tune.train, tune.freeze)
        return None
    dora = tune.method == "dora"
    paths = select_targets(model, tune.targets, tune.layers, dora)
    spec = LoRASpec(tuple(paths), tune.rank, tune.multiplier, tune.dropout, dora)
    prepare_adapter(model, spec, tune.train)
    return spec


def _continue_adapter(config: Config, loaded: Loaded) -> LoRASpec:
    """Start from an adapter that there is; its shape is what it is."""
    assert config.model.adapter is not None
    folder = find_adapter(Path(config.model.adapter))
    spec = load_adapter(loaded.model, folder, base_fingerprint(loaded))
    if spec is None or config.tune.method == "full":
        raise ConfigError("model.adapter: only low-rank adapters can be trained further; fuse it and train the result")
    mine = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout, "method": "dora" if spec.dora else "lora"}
    given = config.tune.model_fields_set
    wrong = [k for k, v in mine.items() if k in given and getattr(config.tune, k) not in (None, v)]
    wrong += [k for k in ("targets", "layers", "alpha", "rslora", "train") if k in given]
    if wrong:
        raise ConfigError(
            f"model.adapter: {folder} has rank {spec.rank}, scale {spec.scale:g}, dropout {spec.dropout:g}, method "
            f"{mine['method']} and its own targets; leave out tune.{', tune.'.join(wrong)}"
        )
    mx.random.seed(config.run.seed)
    return spec


def check_head(config: Config, model: nn.Module) -> None:
    """ConfigError where a reward run is to be trained further by an objective that has no use for its head."""
    given = {"model.adapter": config.model.adapter, "model.path": config.model.path}
    found = [(setting, path) for setting, path in given.items() if find_head(path)]
    if found and head_of(model) is None:
        setting, path = found[0]
        raise ConfigError(
            f"{setting}: {path} is a reward model, which gives scores, and objective {config.objective} trains one "
            "that gives text; start from a policy, or from the base"
        )


# --- planning ---------------------------------------------------------------------------------------------------------
# From a recipe to a memory plan: what `mlxft check` shows, and what training decides by it.

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

    plan: MemoryPlan
    rows: int
    width: int
    usable: int
    tokens: int
    others: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON, in bytes."""
        p = self.plan
        parts = {k: getattr(p, k) for k in _PARTS}
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
        where = f"on {BACKEND_NAMES[planned_backend()]}" if self.usable == UNKNOWN else fits
        largest = f"batch.tokens up to {self.tokens:,}" if self.tokens else "not even one row of this length"
        on = "on" if p.checkpoint else "off"
        batch = f"{self.rows} x {self.width} tokens"
        phases = p.phases() if isinstance(p, PhasedPlan) else {}
        roles = {k: v for k, v in p.roles.items() if v} if isinstance(p, PhasedPlan) else {}
        return [
            f"memory: {amount(p.needed)} for {batch}, checkpointing {on}; {where}",
            *(f"  {k}: {amount(getattr(p, k))}" for k in _PARTS[:2]),
            *([f"  frozen models: {amount(p.frozen)}"] if p.frozen else []),
            *(f"  {k} (a role): {amount(v)}" for k, v in roles.items()),
            *(f"  {k}: {amount(getattr(p, k))}" for k in _PARTS[3:-1]),
            *(f"  peak of {k}: {amount(v)}" for k, v in phases.items()),
            f"  peak where there is room to work ahead: {amount(p.total)}",
            f"fits on Macs of (GB): {macs}",
            *([] if self.usable == UNKNOWN else [f"would fit here: {largest}"]),
            *(f"with {other}: {amount(needed)}" for other, needed in self.others.items()),
        ]


_PARTS = ("weights", "adapters", "frozen", "gradients", "optimizer", "activations", "logits", "batch", "ahead")


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.1f} MB"


def job_of(config: Config, model: nn.Module, trained_share: float = 1.0) -> Job:
    """What a plan needs to know of a recipe and its prepared model."""
    optim = config.optim.model_copy(update={"groups": []})  # they may name what the objective adds later
    optimizer = Optimizer(optim, model)
    state = sum(v.nbytes for v in optimizer.arrays().values())
    renewed, packed = optimizer.renewed(model), config.batch.pack
    outline = objective_class(config.objective).outline(config)
    return Job(model, state, trained_share, config.batch.accumulate, outline, renewed, packed)


def plan_batches(
    config: Config, model: nn.Module, shapes: Sequence[Shape], around: Beside | None = None
) -> tuple[MemoryPlan, int, int]:
    """The plan of the batch that takes most, and its rows and width, with checkpointing as it will be.

    Raises:
        ModelError: this architecture's memory can not be predicted.
    """
    kind = objective_class(config.objective)
    together = kind.outline(config).together
    frozen = sum(kind.residents(config, model).frozen.values()) if around is None else 0
    if any(s.prompt for s in shapes) and not Sharing(ShapeSplit(model)).thinkable:
        shapes = [Shape(*s[:3]) for s in shapes]

    def plans(checkpoint: bool) -> list[tuple[MemoryPlan, int, int]]:
        found = []
        for s in (shapes[i] for i in heaviest(shapes, together)):
            job = job_of(config, model, s.trained / (s.rows * s.width))
            shared = (0, 0) if checkpoint else (s.prompt, s.answer)
            found.append((_planned(job, s, checkpoint, shared, frozen, around), s.rows, s.width))
        return found

    def most(found: list[tuple[MemoryPlan, int, int]]) -> tuple[MemoryPlan, int, int]:
        return max(found, key=lambda f: f[0].needed)

    setting = config.memory.checkpoint
    off = most(plans(False)) if setting != "on" else None
    room = min(usable_bytes(config.memory.limit), machine_bytes() * CHECKPOINT_ABOVE)
    if off is not None and (setting == "off" or off[0].fits(room)):
        return off
    return most(plans(True))


def _planned(
    job: Job, s: Shape, checkpoint: bool, shared: tuple[int, int], frozen: int, around: Beside | None
) -> MemoryPlan:
    if around is None:
        return replace(plan(job, s.rows, s.width, checkpoint, shared), frozen=frozen)
    # As if the micro-batch were alone in its step: what earlier ones leave is counted with the critic's.
    step = plan(replace(job, accumulate=1), s.rows, s.width, checkpoint, shared)
    return with_phases(step, around.residents, around.sampling, around.scoring, job.sums if around.several else 0)


def planned(config: Config, model: nn.Module, shapes: Sequence[Shape], around: Beside | None = None) -> Planned:
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
    beside = objective_class(config.objective).residents(config, model).with_training(job)
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
    room -= objective_class(config.objective).residents(config, model).with_training(job)
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
    prepare(config, bare)
    kind = objective_class(config.objective)
    if not kind.outline(config).dropout:
        without_dropout(bare.model)
    kind.outfit(config, bare.model)
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
    config: Config, model: nn.Module, objective: Objective, refuse: bool = True
) -> tuple[bool, list[str]]:
    """Whether to checkpoint, and what to say of the memory that training will take.

    Args:
        refuse: whether a plan of the steps may refuse them; else what is measured does, or it was when the run began.
    Raises:
        ConfigError: it takes more than `memory.limit`, or than this machine has.
    """
    split = Split(model)
    shapes, notes = objective.shapes(), full_logits(split)
    if any(shape.prompt for shape in shapes) and Sharing(split).reason:
        shapes = [Shape(*shape[:3]) for shape in shapes]
    if not shapes:
        unknown = f"the batches of objective {config.objective} are not known before it runs"
        return config.memory.checkpoint == "on", [*notes, _unpredicted(config, unknown)]
    # A critic stands in the model by now: it is counted among the roles.
    with without_head(model) if objective.steps_per_rollout() else nullcontext():
        try:
            around = objective.beside(model)
            found, rows, width = plan_batches(config, model, shapes, around)
        except ModelError as error:
            return config.memory.checkpoint == "on", [*notes, _unpredicted(config, str(error))]
    if around is not None:
        notes += around.residents.notes
    phases = found.phases(ahead=False) if isinstance(found, PhasedPlan) else {}
    if refuse or max((v for k, v in phases.items() if k != "training"), default=0) > usable_bytes(config.memory.limit):
        check_memory(config, found, rows, width)
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


def check_memory(config: Config, found: MemoryPlan, rows: int, width: int) -> None:
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


def _needs(found: MemoryPlan, rows: int, width: int) -> str:
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


# --- measure ----------------------------------------------------------------------------------------------------------

_ALL = 1 << 62  # bytes of a step that no memory was left for
MEASURED = 5  # times, at most, that a step is measured for batch.tokens: auto
TIMED = 4  # gradients, after the first, which makes caches and kernels
QUICKER = 0.95  # share of the eager gradient's time below which the compiled one is taken: above lies noise
FILLED = 0.95  # of the room is what it aims at: the run agrees with what was measured within a few percent
ENOUGH = 1.15  # times as many tokens would fit: below that, they are not tried
OVER = 1.05  # times a limit: MLX works ahead until it is reached, and a little beyond, before it waits


def settle_by_measure(
    config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer, taken: int | None = None
) -> list[str]:
    """Measure a step, and settle by it what is left open: gradient checkpointing, where it takes too much, and on a
    GPU whether the loop compiles (`objective.compiled`).

    Args:
        taken: what it takes, where that was measured already.
    Returns:
        What there is to say of it; nothing where the objective's batches are not known before it runs.
    Raises:
        ConfigError: it takes more than `memory.limit`, or than this machine has.
        ModelError: the model can not be compiled, and `run.compile` asks for it.
    """
    eager = why_eager(config, model, objective)
    objective.compiled = config.run.compile == "on"
    if not config.memory.measure:
        return []
    taken = measured_bytes(config, model, objective, optimizer) if taken is None else taken
    room = room_of_all(config)
    if taken is not None and taken > room_for_step(config, model):
        checkpoint_layers(model)
        taken = measured_bytes(config, model, objective, optimizer)
    if taken is None:
        return []
    if taken > room:
        raise ConfigError(_too_much(config, taken))
    on = "; gradient checkpointing is on" if is_checkpointed(model) else ""
    beside = "; sampling is by the plan" if objective.steps_per_rollout() else ""
    notes = [f"measured peak memory: {amount(taken)}, of a step of the largest batch{on}{beside}"]
    # Not on a CPU: 0.84 to 0.92 of the eager time (llamas of 8 and 30 layers, float32), but a C++ compiler makes the
    # kernels, some 20 s the first time.
    if config.run.compile == "auto" and backend() != "cpu":
        notes.append(eager or _settle_compiling(config, model, objective, optimizer, room))
    return notes


def room_of_all(config: Config) -> float:
    """Bytes that training may be measured to take."""
    return OVER * usable_bytes(config.memory.limit)


def room_for_step(config: Config, model: nn.Module) -> float:
    """Bytes that a step may take with the blocks as they are: beyond a share of the machine they are checkpointed,
    where that is left open."""
    room = room_of_all(config)
    if config.memory.checkpoint != "auto" or is_checkpointed(model):
        return room
    return min(room, machine_bytes() * CHECKPOINT_ABOVE)


def fit_tokens(
    config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer
) -> tuple[Config, int | None, list[str]]:
    """Correct what the plan has made of `batch.tokens: auto` by what the largest batch takes; the objective's batches
    are made by it from then on.

    Returns:
        The recipe with the number; what was measured with it, None if nothing was; what to say of it.
    """
    objective.compiled = config.run.compile == "on"
    tokens, tried, said = config.batch.budget, dict[int, int](), list[str]()
    for _ in range(MEASURED):
        config = _rebatched(config, objective, tokens)
        taken = measured_bytes(config, model, objective, optimizer)
        if taken is None:
            return config, None, [f"batch.tokens: auto is {tokens:,}: there is no batch to measure"]
        tried[tokens] = taken
        said.append(f"{tokens:,} takes {'more than there is' if taken == _ALL else amount(taken)}")
        most = room_for_step(config, model)
        largest = max(shape.rows * shape.width for shape in objective.shapes())
        wanted = _corrected(tokens, largest, taken, most, _lasting(model, optimizer))
        open_ = config.memory.checkpoint == "auto" and not is_checkpointed(model)
        if open_ and taken > most and wanted < LEAST_TOKENS:
            checkpoint_layers(model)  # rather than smaller batches
            tried.clear()
            said[-1] += ", and less with gradient checkpointing"
        elif wanted in tried:
            break
        else:
            tokens = wanted
    fitting = [n for n, taken in tried.items() if taken <= most]
    tokens = max(fitting, default=min(tried, default=tokens))
    note = f"batch.tokens: auto is {tokens:,}, by measured steps with room for {amount(most)}: {'; '.join(said)}"
    return _rebatched(config, objective, tokens), tried.get(tokens), [note]


def _rebatched(config: Config, objective: Objective, tokens: int) -> Config:
    """The recipe with this batch.tokens, by which the objective makes its batches from then on."""
    if tokens != config.batch.budget:
        config = with_tokens(config, tokens)
        objective.rebatch(config)
    return config


def _corrected(tokens: int, largest: int, taken: int, most: float, lasting: int) -> int:
    """The batch.tokens to try next; the same where it is good.

    Args:
        largest: tokens of the largest batch that was made of `tokens`, padding included.
        taken: what its step takes, of `most`.
        lasting: bytes of it that do not grow with the batch.
    """
    if taken == _ALL:
        return max(64, tokens // 4)
    share = (FILLED * most - lasting) / max(1, taken - lasting)
    if taken <= most and (share < ENOUGH or 2 * largest < tokens):  # there may be no larger batch
        return tokens
    found = int(min(max(share, 1 / 16), 16) * largest) // 64 * 64
    return max(64, min(found, MOST_TOKENS))


def _lasting(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of weights, gradients and the optimiser."""
    arrays = tree_flatten([model.parameters(), model.trainable_parameters(), optimizer.arrays()])
    return sum(v.nbytes for _, v in arrays)


def _too_much(config: Config, taken: int) -> str:
    takes = "found no room" if taken == _ALL else f"takes {amount(taken)}"
    return f"a step {takes}; {room_of(config)}. What helps: {FAILURES['memory'][1]}"


def _settle_compiling(config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer, room: float) -> str:
    """Compile where the largest batch's gradient is quicker so, and its step fits into `room`. Returns what to say."""
    objective.compiled = True
    try:
        taken = measured_bytes(config, model, objective, optimizer)
        if taken is not None and taken <= room:
            eager, compiled = (gradient_seconds(config, model, objective, on) for on in (False, True))
            objective.compiled = compiled < QUICKER * eager
            said = f"{'' if objective.compiled else 'not '}compiled where shapes come again"
            return f"the step is {said}: its gradient took {compiled:.3g} s so, {eager:.3g} s eager"
        said = f"the step is not compiled: it would take {amount(taken or 0)}"
    except (ModelError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ModelError) and gpu_failure(error) != "memory":
            raise
        said = f"the step is not compiled: {error}"
    objective.compiled = False
    return said


def gradient_seconds(config: Config, model: nn.Module, objective: Objective, compiled: bool) -> float:
    """Seconds of a gradient of the largest batch, of several in a row; the random state is afterwards as it was."""
    objective.compiled = compiled  # its batches are filled up then
    with _probed(config, model):
        step, compute = objective.largest(model)[0](), _computing(config, model, objective)
        batch = step.micro_batches[0]
        mx.eval(compute(batch, step.per))
        began, before = time.perf_counter(), mx.array(0.0)
        for _ in range(TIMED):
            total, sums, grads = compute(batch, step.per)
            mx.async_eval(total, sums, grads)
            del grads
            mx.eval(before)  # as the loop does: while one is computed the next is made
            before = total
        mx.eval(before)
        mx.synchronize()
        return (time.perf_counter() - began) / TIMED


def _computing(
    config: Config, model: nn.Module, objective: Objective
) -> Callable[[MicroBatch, dict[str, float]], LossAndGradients]:
    """`gradient` as the loop has it for shapes that come again."""
    if objective.compiled:
        compiled = CompiledGradient(model, objective)
        return lambda batch, per: compiled(batch)
    aux = config.tune.router_aux
    return lambda batch, per: gradient(model, objective, batch, scales_of(per, aux, batch.trained_tokens))


def crowded(config: Config) -> list[str]:
    """What there is to warn of before training: swap in use, and a limit above what the system recommends."""
    limit, lent = config.memory.limit, usable_bytes()
    notes = (
        []
        if limit is None or limit * 1e9 <= lent
        else [f"warning: memory.limit is above the {amount(lent)} that this machine lends"]
    )
    used = swap_bytes()
    return notes + (
        [f"warning: {amount(used)} of swap are in use: close what crowds the memory"] if used > CROWDED else []
    )


def measured_bytes(config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer) -> int | None:
    """Peak of training on the batches that may take most, weights included; None if there is none to take.

    It is two steps as the loop makes them, with a learning rate of 0: weights, random state and the objective's state
    are afterwards as they were, and the optimiser begins anew. Without memory for them, all there is.

    Raises:
        ConfigError: no memory was left amid an update, when it is not known what has become of the weights.
        TrainingError: macOS has ended the GPU's work.
    """
    try:
        with _probed(config, model):
            steps = objective.largest(model)
            return max((_peak(config, model, objective, optimizer, step) for step in steps), default=None)
    except (RuntimeError, MemoryError) as error:
        if gpu_failure(error) != "memory":
            raise
        mx.clear_cache()
        return _ALL


@contextmanager
def _probed(config: Config, model: nn.Module) -> Iterator[None]:
    """The model inside the block is as the loop has it, and what macOS ends there is told as it is of the loop."""
    try:
        with probing(model, training=True), quicker(model), limits(config.memory.limit, config.memory.cache):
            yield
    except RuntimeError as error:
        if gpu_failure(error) != "watchdog":
            raise
        raise gpu_failed("watchdog", "in a step that is measured before training") from error


def _peak(config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer, step: MakesStep) -> int:
    """Peak of two steps in a row, without what else stands in this process."""
    held = [model.parameters(), optimizer.arrays(), objective.held()]
    mx.eval(held)
    mx.clear_cache()
    mx.reset_peak_memory()
    own = {id(v): v.nbytes for _, v in tree_flatten(held)}  # a critic may begin as the policy's very arrays
    others = max(0, mx.get_active_memory() - sum(own.values()))
    del held
    compute = _computing(config, model, objective)
    total, grads = _gradients(compute, step())
    mx.eval(total, grads)
    # A rate of 0 times what is not finite would be no 0; the run ends at such a step.
    if all(mx.isfinite(g.square().sum()).item() for g in grads.values()):
        try:
            mx.async_eval(optimizer.step(model, grads, mx.array(1.0), 0.0))
            # The next step's forward pass begins while old and new parameters stand side by side.
            total, grads = _gradients(compute, step())
            mx.async_eval(optimizer.step(model, grads, mx.array(1.0), 0.0))
            mx.eval(total, model.parameters(), optimizer.arrays())
        except (RuntimeError, MemoryError) as error:
            if gpu_failure(error) != "memory":
                raise
            raise ConfigError(_too_much(config, _ALL)) from error
        finally:
            optimizer.begin(model)
    return mx.get_peak_memory() - others


def _gradients(
    compute: Callable[[MicroBatch, dict[str, float]], LossAndGradients], step: Step
) -> tuple[mx.array, Arrays]:
    """Total and gradients of a step's micro-batches, on their way as the loop has them."""
    grads: Arrays = {}
    for batch in step.micro_batches:
        total, sums, more = compute(batch, step.per)
        grads = summed(grads, more)
        mx.async_eval(total, sums, grads)
        del more
    return total, grads
