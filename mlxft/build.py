"""Build a recipe's model and objective, and plan and measure the memory of its training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.config import Config, default_lr, load_config, objective_class
from mlxft.data.chat import set_day
from mlxft.data.dataset import with_format
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
from mlxft.distributed import MESSAGE, Network, Ranks
from mlxft.errors import ConfigError, ModelError
from mlxft.model.adapters import LoRASpec, load_adapter, prepare_adapter, prepare_full, round_as, select_targets
from mlxft.model.cpu import quicker
from mlxft.model.heads import find_head, head_of, without_head
from mlxft.model.layers import (
    LowRank,
    aside,
    checkpoint_layers,
    dropouts,
    is_checkpointed,
    limits,
    probing,
    unrounded,
    watch_routers,
    without_dropout,
)
from mlxft.model.load import Loaded, NotBeforeLoading, base_fingerprint, file_bits, skeleton
from mlxft.model.load import load as load_model
from mlxft.model.logits import Split
from mlxft.model.memory import (
    CHECKPOINT_ABOVE,
    Beside,
    Job,
    MemoryPlan,
    Shape,
    ShapeSplit,
    largest_packed,
    largest_tokens,
    plan,
    with_phases,
)
from mlxft.model.prefix import Sharing
from mlxft.model.shard import Shares, shares
from mlxft.objectives.base import MakesStep, Objective, heaviest
from mlxft.runs import find_adapter
from mlxft.trainer.loop import Gradients
from mlxft.trainer.optim import Optimizer

# --- parts ------------------------------------------------------------------------------------------------------------
# The parts that a recipe names: its model, its objective with the data, and the parameters that are trained.

_LOADING = {"dtype", "quantize", "group_size", "trust_remote_code"}  # settings of model. that loading takes


def load_base(config: Config, *, lazy: bool = False, template: Path | None = None) -> Loaded:
    """Load a recipe's model, without adapters; `template` is a chat template in place of model.chat_template."""
    m = config.model
    return load_model(m.path, chat_template=template or m.chat_template, lazy=lazy, **m.model_dump(include=_LOADING))


def make_objective(config: Config, tokenizer: Any) -> Objective:
    """Make a recipe's objective, with its data; its `config` is the recipe with the sizes that were open.

    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """
    if config.data.date is not None:
        set_day(tokenizer, config.data.date)
    config = with_format(config) if "auto" in config.data.formats.values() else config
    objective: Objective = objective_class(config.objective)(config, tokenizer)
    if config.batch.pack and not objective.summary().packed:
        raise ConfigError(f"batch.pack: objective {config.objective} does not pack rows; leave it out")
    if config.tune.neftune is not None and not objective.noisy:
        raise ConfigError(f"tune.neftune: the loss of objective {config.objective} adds no noise; leave it out")
    run = config.run
    unused = ["run.patience"] if run.patience is not None else []
    if not run.sample_prompts:  # they are completed at each validation, with or without held-out rows
        unused += ["run.eval_every"] if run.eval_every is not None else []
        unused += ["run.eval_at_start"] if run.eval_at_start else []
    if unused and not objective.summary().validates:
        raise ConfigError(f"{', '.join(unused)}: there is no validation data to use; give data.valid (0.05: a share)")
    if run.steps is None and run.epochs is None:
        objective.config = _with(objective.config, "run", epochs=objective.default_epochs())
    if config.batch.tokens is None and config.batch.rows is None:
        objective.config = _with(objective.config, "batch", tokens=objective.config.batch.budget)
    return objective


TOO_HIGH, TOO_LOW = 20.0, 9.5  # times above or below the default; recipes of configs/ have up to 10 times it
MANY = 500_000_000  # numbers of a .gguf file from which on its floats are noted


def learning_notes(config: Config, objective: Objective, total: int) -> list[str]:
    """Return what sizes the rows gave, and settings with which a run of `total` steps can hardly learn.

    Args:
        config: the recipe before `make_objective`.
    """
    sized, run, notes, found = objective.config, config.run, list[str](), dict[str, str]()
    if config.batch.tokens is None and config.batch.rows is None:
        found["batch.tokens"] = f"{sized.batch.tokens:,}"
    if run.steps is None and run.epochs is None and sized.run.epochs is not None:
        found["run.epochs"] = f"{sized.run.epochs:g}"
    if found:
        sizes = " and ".join(f"{name} {value}" for name, value in found.items())
        notes.append(f"sizes by the rows: {sizes}, which make {total:,} steps")
    # A step of Adam is as long as the rate: at five times the usual one, a fifth of the steps goes as far.
    least = math.ceil(objective.least_steps / min(10.0, max(1.0, _times_usual(config))))
    if total < least / 2:
        epochs = math.ceil(least / total * (sized.run.epochs or 1))
        way = f"run.steps={least}" if run.steps is not None else f"run.epochs={epochs}"
        notes.append(
            f"{total:,} {'step is' if total == 1 else 'steps are'} few to learn from: set {way}, smaller batches, or "
            "train on more rows"
        )
    return notes + rate_notes(config) + base_notes(config)


def rate_notes(config: Config) -> list[str]:
    """Return whether the rate is far from that of the objective and method, where rates mean what adamw's do."""
    lr, usual = config.optim.lr, default_lr(config.objective, config.tune.method)
    if 1 / TOO_LOW < _times_usual(config) < TOO_HIGH:
        return []
    kind = "full fine-tuning" if config.tune.method == "full" else config.tune.method
    far = f"{lr / usual:.0f} times" if lr > usual else f"1/{usual / lr:.0f} of"
    way = f"set optim.lr={usual:g}, or measure one with mlxft lr-find"
    return [f"optim.lr {lr:g} is {far} the usual rate of {config.objective} by {kind}: {way}"]


def base_notes(config: Config) -> list[str]:
    """Return that a large .gguf file's short numbers would be held as floats, and the setting that keeps them short."""
    bits, numbers = file_bits(config.model.path)
    if config.model.quantize is not None or bits == 16 or numbers < MANY:
        return []
    size = amount(numbers * (bits + 0.5) / 8)
    what = f"{config.model.path} has weights of about {bits} bits, which are held as floats"
    return [f"{what}: set model.quantize={bits} for a base of about {size}"]


def _times_usual(config: Config) -> float:
    """Return how many times the usual rate a recipe has; 1 of an optimizer whose rates mean another thing."""
    comparable = config.optim.name in ("adamw", "adam", "muon")
    return config.optim.lr / default_lr(config.objective, config.tune.method) if comparable else 1.0


def prepare(config: Config, loaded: Loaded) -> LoRASpec | None:
    """Make trainable what the recipe trains, and return the adapter's shape; None: the weights themselves."""
    tune, model = config.tune, loaded.model
    if tune.router_aux is not None:
        watch_routers(model, "tune.router_aux")
    spec = _continue_adapter(config, loaded) if config.model.adapter is not None else None
    mx.random.seed(config.run.seed)
    if spec is not None:
        return spec
    if tune.method == "full":
        prepare_full(model, tune.layers, tune.train, tune.freeze)
        return None
    dora = tune.method == "dora"
    paths = select_targets(model, tune.targets, tune.layers, dora)
    spec = LoRASpec(tuple(paths), tune.rank, tune.multiplier, tune.dropout, dora, tune.quantize_aware)
    prepare_adapter(model, spec, tune.train)
    return spec


def _continue_adapter(config: Config, loaded: Loaded) -> LoRASpec:
    """Attach the recipe's adapter, which keeps its shape."""
    assert config.model.adapter is not None
    folder = find_adapter(Path(config.model.adapter))
    spec = load_adapter(loaded.model, folder, base_fingerprint(loaded))
    if spec is None or config.tune.method == "full":
        raise ConfigError(
            "model.adapter: only low-rank adapters can be trained further; fuse it and train the fused model"
        )
    mine = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout, "method": "dora" if spec.dora else "lora"}
    given, bits = config.tune.model_fields_set, config.tune.quantize_aware
    if spec.quantize_aware is not None:
        mine["quantize_aware"] = spec.quantize_aware
    elif bits is not None:
        if spec.dropout:
            raise ConfigError(
                f"tune.quantize_aware: {folder} has dropout {spec.dropout:g}, which goes with no rounding"
            )
        round_as(loaded.model, bits)
        spec = replace(spec, quantize_aware=bits)
    wrong = [k for k, v in mine.items() if k in given and getattr(config.tune, k) not in (None, v)]
    wrong += [k for k in ("targets", "layers", "alpha", "rslora", "train") if k in given]
    if wrong:
        rounded = f", quantize_aware {spec.quantize_aware}" if spec.quantize_aware is not None else ""
        raise ConfigError(
            f"model.adapter: {folder} has rank {spec.rank}, scale {spec.scale:g}, dropout {spec.dropout:g}, method "
            f"{mine['method']}{rounded} and its own targets; leave out tune.{', tune.'.join(wrong)}"
        )
    return spec


def check_head(config: Config, model: nn.Module) -> None:
    """Raise ConfigError if the recipe starts from a reward model but its objective trains no score head."""
    given = {"model.adapter": config.model.adapter, "model.path": config.model.path}
    found = [(setting, path) for setting, path in given.items() if find_head(path)]
    if found and head_of(model) is None:
        setting, path = found[0]
        raise ConfigError(
            f"{setting}: {path} is a reward model, which returns scores, and objective {config.objective} trains a "
            "model that writes text; start from a policy, or from the base"
        )


# --- planning ---------------------------------------------------------------------------------------------------------
# The memory plan of a recipe: what `mlxft check` shows, and what training decides by it.

MARGIN = 0.9  # share of the usable bytes that is planned for, because predictions are good to a tenth
LEAST_TOKENS = 2048  # with fewer, batch.tokens: auto prefers gradient checkpointing
MOST_TOKENS = 1 << 16  # limit of batch.tokens: auto; no device is faster with more at once


@dataclass(frozen=True)
class Planned:
    """A recipe's memory plan."""

    plan: MemoryPlan  # of the largest batch
    rows: int  # of that batch
    width: int
    usable: int  # bytes that training may take here
    tokens: int  # the largest batch.tokens that fits here, with rows of that width; 0: none fits
    others: dict[str, int] = field(default_factory=dict)  # setting -> bytes, if this machine does not decide on it
    ranks: int = 1  # that train; the bytes are those of each
    traffic: Traffic | None = None  # of several ranks

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON, in bytes."""
        p, known = self.plan, self.usable != UNKNOWN
        return {
            **{k: getattr(p, k) for k in _PARTS},
            **({"roles": dict(p.roles), "phases": p.phases()} if len(p.phases()) > 1 else {}),
            "total": p.total,
            "needed": p.needed,
            "checkpoint": p.checkpoint,
            "rows": self.rows,
            "width": self.width,
            "usable": self.usable if known else None,
            "fits": p.fits(self.usable) if known else None,
            "device": planned_backend(),
            "macs": p.macs(),
            "largest_tokens": self.tokens,
            **({"ranks": self.ranks, "network": self.traffic._asdict()} if self.traffic is not None else {}),
        }

    def lines(self) -> list[str]:
        """Return the plan as lines of text."""
        p, known = self.plan, self.usable != UNKNOWN
        macs = ", ".join(map(str, p.macs())) or "none of up to 128"
        fits = f"{'fits' if p.fits(self.usable) else 'DOES NOT FIT'} here ({amount(self.usable)})"
        where = fits if known else f"on {BACKEND_NAMES[planned_backend()]}"
        largest = f"batch.tokens up to {self.tokens:,}" if self.tokens else "not even one row of this length"
        batch = f"{self.rows} x {self.width} tokens"
        phases = p.phases() if len(p.phases()) > 1 else {}
        return [
            f"memory: {amount(p.needed)} for {batch}, checkpointing {'on' if p.checkpoint else 'off'}; {where}",
            *(f"  {k}: {amount(getattr(p, k))}" for k in _PARTS[:2]),
            *([f"  gathered from all ranks: {amount(p.gathered)}"] if p.gathered else []),
            *([f"  frozen models: {amount(p.frozen)}"] if p.frozen else []),
            *(f"  {k} (a role): {amount(v)}" for k, v in p.roles.items() if v),
            *(f"  {k}: {amount(getattr(p, k))}" for k in _PARTS[3:-1]),
            *(f"  peak of {k}: {amount(v)}" for k, v in phases.items()),
            f"  peak where there is room to work ahead: {amount(p.total)}",
            f"fits on Macs of (GB): {macs}",
            *([f"would fit here: {largest}"] if known else []),
            *(f"with {other}: {amount(needed)}" for other, needed in self.others.items()),
            *(
                [f"network of {self.ranks} ranks: {self.traffic.text(usual_networks(self.ranks))}"]
                if self.traffic
                else []
            ),
        ]


_PARTS = ("weights", "adapters", "frozen", "gradients", "optimizer", "activations", "logits", "batch", "ahead")


def amount(size: float) -> str:
    """Format bytes for people."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.1f} MB"


def job_of(config: Config, model: nn.Module, trained_share: float = 1.0) -> Job:
    """Return what a plan needs to know of a recipe and its prepared model."""
    optim = config.optim.model_copy(update={"groups": []})  # they may name what the objective adds later
    optimizer = Optimizer(optim, model)
    state = sum(v.nbytes for v in optimizer.arrays().values())
    renewed, packed = optimizer.renewed(model), config.batch.pack
    outline = objective_class(config.objective).outline(config)
    shard, ranks = config.distributed.shard, config.distributed.ranks or 1
    state = -(-state // ranks) if shard == "optimizer" else state
    parts = ranks if shard == "base" else 1
    return Job(model, state, trained_share, config.batch.accumulate, outline, renewed, packed, parts)


class Traffic(NamedTuple):
    """What the network carries for a step, in bytes.

    Attributes:
        summed: of the arrays that are added up over all ranks.
        gathered: of those that every rank gets from all.
        messages: collective operations.
    """

    summed: int
    gathered: int
    messages: int

    def seconds(self, network: Network) -> float:
        """Return the seconds that it takes where nothing is computed at the same time."""
        moved = self.summed / network.summed_per_s + self.gathered / network.gathered_per_s
        return self.messages * network.latency_s + moved

    def text(self, networks: Mapping[str, Network]) -> str:
        """Return it as a sentence, with the time that it takes on some networks."""
        parts = [f"{amount(self.summed)} of gradients are added up"]
        parts += [f"{amount(self.gathered)} of weights are gathered"] if self.gathered else []
        times = [
            f"{self.seconds(n):.2g} s {name} ({amount(n.summed_per_s)}/s added up, {amount(n.gathered_per_s)}/s "
            f"gathered, {1e3 * n.latency_s:.2g} ms a message)"
            for name, n in networks.items()
        ]
        return f"for a step {' and '.join(parts)}: {', '.join(times)}"


def usual_networks(ranks: int) -> dict[str, Network]:
    """Return what a ring of so many ranks carries over usual wires: an array that is added up goes round twice."""
    wires = {"over 1 Gbit/s Ethernet": (1e-3, 125e6), "over Thunderbolt at 20 Gbit/s": (1e-4, 2.5e9)}
    part = (ranks - 1) / ranks
    return {name: Network(latency, speed / (2 * part), speed / part) for name, (latency, speed) in wires.items()}


def traffic(config: Config, model: nn.Module, shared: Shares | None) -> Traffic:
    """Return what the network carries for a step of as many micro-batches as batch.accumulate.

    Args:
        shared: of a sharded base.
    """
    trained = [v for _, v in tree_flatten(model.trainable_parameters())]
    summed = sum(4 * v.size for v in trained)
    messages, gathered = 2 + summed // MESSAGE, 0
    if config.distributed.shard == "optimizer":
        gathered += sum(v.nbytes for v in trained)
        messages += 1 + gathered // MESSAGE
    if shared is not None:
        # A micro-batch goes forward, and backward through the blocks; what a reference reads goes forward once more.
        passes = max(1, -(-config.batch.accumulate // (config.distributed.ranks or 1)))
        reads = 1 + len(objective_class(config.objective).frozen(config))
        gathered += passes * (reads * shared.whole + shared.blocks)
        messages += passes * (reads + 1) * (len(model.layers) + 2)
    return Traffic(summed, gathered, messages)


def plan_batches(
    config: Config, model: nn.Module, shapes: Sequence[Shape], around: Beside | None = None
) -> tuple[MemoryPlan, int, int]:
    """Return the plan of the largest batch, with checkpointing as training will choose it, and its rows and width."""
    kind = objective_class(config.objective)
    together = kind.outline(config).together
    frozen = sum(kind.residents(config, model).frozen.values()) if around is None else 0
    if any(s.prompt for s in shapes) and not Sharing(ShapeSplit(model)).thinkable:
        shapes = [Shape(*s[:3]) for s in shapes]

    def planned(s: Shape, checkpoint: bool) -> MemoryPlan:
        job = job_of(config, model, s.trained / (s.rows * s.width))
        shared = (0, 0) if checkpoint else (s.prompt, s.completion)
        if around is None:
            return replace(plan(job, s.rows, s.width, checkpoint, shared), frozen=frozen)
        # As if the micro-batch were alone in its step: `with_phases` adds what earlier ones leave.
        return with_phases(plan(replace(job, accumulate=1), s.rows, s.width, checkpoint, shared), around, job.sums)

    def largest(checkpoint: bool) -> tuple[MemoryPlan, int, int]:
        heavy = [shapes[i] for i in heaviest(shapes, together)]
        return max(((planned(s, checkpoint), s.rows, s.width) for s in heavy), key=lambda f: f[0].needed)

    setting = config.memory.checkpoint
    if setting == "on":
        return largest(True)
    off = largest(False)
    room = min(usable_bytes(config.memory.limit), machine_bytes() * CHECKPOINT_ABOVE)
    return off if setting == "off" or off[0].fits(room) else largest(True)


def planned(config: Config, model: nn.Module, shapes: Sequence[Shape], around: Beside | None = None) -> Planned:
    """Return the plan of a recipe's batches, and what else would fit."""
    found, rows, width = plan_batches(config, model, shapes, around)
    room, others = usable_bytes(config.memory.limit), dict[str, int]()
    ranks, carried = config.distributed.ranks or 1, None
    if ranks > 1:
        carried = traffic(config, model, shares(model, ranks) if config.distributed.shard == "base" else None)

    def needed(section: str, **changes: Any) -> int:
        return plan_batches(_with(config, section, **changes), model, shapes, around)[0].needed

    if any(isinstance(m, LowRank) and m.form for m in model.modules()):
        with unrounded(model):
            others["weights that are not rounded (no tune.quantize_aware)"] = needed("tune")
    if config.batch.pack and planned_backend() != "cpu":
        name = "batches as large of rows that are not packed, whose attention is fused"
        others[name] = needed("batch", pack=False)
    if room == UNKNOWN:
        if config.memory.checkpoint == "auto":
            others["memory.checkpoint: on"] = needed("memory", checkpoint="on")
        return Planned(found, rows, width, room, 0, others, ranks, carried)
    job = job_of(config, model)
    beside = objective_class(config.objective).residents(config, model).with_training(job)
    tokens = largest_tokens(job, width, found.checkpoint, MARGIN * room - beside, MOST_TOKENS)
    return Planned(found, rows, width, room, min(tokens, MOST_TOKENS), others, ranks, carried)


def _with(config: Config, section: str, **settings: Any) -> Config:
    """Return the recipe with other settings in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=settings)})


def settled(config: Config, resume: bool) -> Config:
    """Decide what a recipe leaves open: how rows are read, `batch.tokens: auto`, by a plan of what fits, and the day.

    A resumed run keeps these from its start; also the defaults of optim.lr, batch.tokens and run.epochs, and whether
    blocks are checkpointed and the step is compiled.

    Raises:
        ModelError: the model cannot be found or read.
        ConfigError: no row of data.max_length fits; memory cannot be predicted, and `memory.measure` is off.
        DataError: the format of the rows is open, and none fits them, or several.
    """
    file = config.run_dir / "config.yaml"
    stored = load_config(file, looked_at=True).begun if resume and file.exists() else None
    if stored is not None:
        if config.memory.checkpoint == "auto":
            config = _with(config, "memory", checkpoint=stored.memory.checkpoint)
        if config.run.compile == "auto":
            config = _with(config, "run", compile=stored.run.compile)
        config = config.model_copy(update={"optim": config.optim.with_default(stored.optim.lr)})
        if config.batch.tokens is None and config.batch.rows is None:
            config = _with(config, "batch", tokens=stored.batch.tokens, rows=stored.batch.rows)
        if config.run.steps is None and config.run.epochs is None:
            config = _with(config, "run", steps=stored.run.steps, epochs=stored.run.epochs)
        config = config.model_copy(update={"data": config.data.as_begun(stored.data)})
    config = with_format(config)
    if config.data.date is None:
        config = _with(config, "data", date=(stored and stored.data.date) or date.today())
    if config.batch.tokens != "auto":
        return config
    return _with(config, "batch", tokens=_auto_tokens(config) if stored is None else stored.batch.tokens)


def agreed(config: Config, ranks: Ranks, begun: bool) -> Config:
    """Return the recipe with what all ranks can do of what each machine has decided for itself.

    Args:
        begun: whether a run is resumed, which keeps what rank 0 has stored.
    """
    if ranks.size == 1:
        return config
    mine = [
        config.batch.tokens,
        config.memory.checkpoint,
        config.run.compile,
        config.data.date and str(config.data.date),
    ]
    every = ranks.gather(mine)
    tokens, checkpoint, compiled, day = every[0]
    if not begun and tokens is not None:
        tokens = min(theirs[0] for theirs in every)
    if not begun and any(theirs[1] == "on" for theirs in every):
        checkpoint = "on"
    config = _with(config, "batch", tokens=tokens)
    config = _with(config, "data", date=day and date.fromisoformat(day))
    return _with(_with(config, "memory", checkpoint=checkpoint), "run", compile=compiled)


def is_open(config: Config) -> bool:
    """Return whether a recipe, before `settled`, leaves batch.tokens to a measured step."""
    return config.batch.tokens == "auto" and config.memory.measure


def _auto_tokens(config: Config) -> int:
    """Return the batch.tokens that a plan predicts to fit; without a plan, those of the first measured step."""
    width, usable = config.data.max_length, usable_bytes(config.memory.limit)
    if usable == UNKNOWN:
        raise ConfigError("batch.tokens: auto: the other machine's memory is not known; give memory.limit too")
    if width > MOST_TOKENS:
        raise ConfigError(
            f"batch.tokens: auto: makes batches of at most {MOST_TOKENS:,} tokens, and data.max_length is "
            f"{width:,}; lower it, or give batch.tokens as a number"
        )
    try:
        model = base_skeleton(config)
    except NotBeforeLoading as error:
        return _unplanned_tokens(config, error)
    try:
        job = job_of(config, model)
        room = MARGIN * usable - objective_class(config.objective).residents(config, model).with_training(job)
        found = _planned_tokens(config, job, room)
    except ModelError as error:
        return _unplanned_tokens(config, error)
    if not found:
        own = objective_class(config.objective).relief(config)
        raise ConfigError(
            f"batch.tokens: auto: not even one row of data.max_length ({width}) fits in {amount(room)}; lower "
            "data.max_length or tune.rank, or set model.quantize: 4 or memory.checkpoint: on; mlxft check shows a plan"
            + (f"; what also helps: {', '.join(own)}" if own else "")
        )
    return min(found, MOST_TOKENS)


def _unplanned_tokens(config: Config, error: ModelError) -> int:
    if config.memory.measure:
        return LEAST_TOKENS
    raise ConfigError(f"batch.tokens: auto: {error}; give it as a number, or set memory.measure: true") from error


def _planned_tokens(config: Config, job: Job, room: float) -> int:
    """Return the largest batch.tokens whose steps fit in `room` bytes, or 0."""
    width, setting, found = config.data.max_length, config.memory.checkpoint, 0
    largest = largest_packed if job.packed else largest_tokens
    if setting != "on":
        # With `auto`, up to a share of the machine: larger batches would switch checkpointing on.
        most = room if setting == "off" else min(room, machine_bytes() * CHECKPOINT_ABOVE)
        found = largest(job, width, False, most, MOST_TOKENS)
    if setting != "off" and found < LEAST_TOKENS:
        found = largest(job, width, True, room, MOST_TOKENS)
    return found


@aside()
def base_skeleton(config: Config) -> nn.Module:
    """Return the recipe's model without weights, with what is trained and what the objective adds.

    Raises:
        NotBeforeLoading: its shapes are not known before it is loaded.
        ConfigError, ModelError: as in training.
    """
    bare = skeleton(config.model.path, **config.model.model_dump(include=_LOADING - {"trust_remote_code"}))
    prepare(config, bare)
    kind = objective_class(config.objective)
    if not kind.outline(config).dropout:
        without_dropout(bare.model)
    kind.outfit(config, bare.model)
    check_head(config, bare.model)
    return bare.model


def full_logits(split: Split) -> list[str]:
    """Return a note if the model computes logits at every position."""
    if split.separable or head_of(split.model) is not None:
        return []
    kind = type(split.model).__module__.rpartition(".")[2]
    text = (
        f"logits are computed for every position: the body of this model ({kind}) cannot be taken apart from its "
        "output layer, so tokens that are not trained take as much memory and time as trained ones"
    )
    return [text]


def decide_checkpointing(
    config: Config, model: nn.Module, objective: Objective, refuse: bool = True, bare: bool = False
) -> tuple[bool, list[str]]:
    """Return whether to checkpoint, and notes about the memory of training; refuse a recipe that needs too much.

    Args:
        refuse: false if the plan of the steps refuses nothing, because a measured step does, or did.
        bare: whether the model has no weights to try it with.
    """
    split = ShapeSplit(model) if bare else Split(model)
    shapes, notes = objective.shapes(), full_logits(split)
    if any(shape.prompt for shape in shapes) and (bare or Sharing(split).reason):
        shapes = [Shape(*shape[:3]) for shape in shapes]
    if not shapes:
        unknown = f"the batches of objective {config.objective} are not known before it runs"
        return config.memory.checkpoint == "on", [*notes, _unpredicted(config, unknown)]
    # A critic is in the model by now: it is counted among the roles.
    with without_head(model) if objective.steps_per_rollout() else nullcontext():
        try:
            around = objective.beside(model)
            found, rows, width = plan_batches(config, model, shapes, around)
        except ModelError as error:
            return config.memory.checkpoint == "on", [*notes, _unpredicted(config, str(error))]
    if around is not None:
        notes += around.residents.notes
    others = [v for k, v in found.phases(ahead=False).items() if k != "training"]
    if refuse or max(others, default=0) > usable_bytes(config.memory.limit):
        check_memory(config, found, rows, width)
    why = " (memory.checkpoint: auto)" if config.memory.checkpoint == "auto" else ""
    on = f"; gradient checkpointing is on{why}" if found.checkpoint else ""
    return found.checkpoint, [*notes, f"expected peak memory: {amount(found.total)}{on}"]


def _unpredicted(config: Config, why: str) -> str:
    """Return a note about a missing plan, and what it means for gradient checkpointing."""
    if config.memory.checkpoint != "auto":
        return f"memory is not predicted: {why}"
    then = "a measured step decides" if config.memory.measure else "set memory.checkpoint: on where memory runs out"
    return f"memory is not predicted: {why}; gradient checkpointing is off: {then}"


def why_eager(config: Config, model: nn.Module, objective: Objective) -> str:
    """Return why a step cannot be compiled, or ""; raise ConfigError if it cannot but `run.compile` is on."""
    why = ""
    if not objective.traceable:
        why = f"the loss of objective {config.objective} reads more than the arrays of a batch"
    elif config.tune.router_aux is not None:
        why = "tune.router_aux reads more of a batch than its arrays"
    elif config.tune.neftune is not None:
        why = "tune.neftune draws new noise in each step"
    elif dropouts(model):
        why = "dropout draws new masks in each step (tune.dropout, or dropout of the model or model.adapter)"
    if why and config.run.compile == "on":
        raise ConfigError(f"run.compile: on: {why}; leave it out")
    return why and f"the step is not compiled: {why}"


def check_memory(config: Config, found: MemoryPlan, rows: int, width: int) -> None:
    """Raise ConfigError if the plan of the largest batch, of rows x width tokens, does not fit."""
    if found.fits(usable_bytes(config.memory.limit)):
        return
    phases = found.phases(ahead=False)
    phase = max(phases, key=lambda name: phases[name])
    if phase == "sampling":
        needs = amount(found.needed)
        helps = "a smaller rollout.rows (completions decoded at once) or rollout.max_tokens, shorter prompts"
    else:
        needs = f"{amount(found.needed)} (batches of {rows} x {width} tokens)"
        rolls = "rollout" in objective_class(config.objective).sections  # whose steps are cut into micro-batches
        step = "the step is the same" if rolls else "with batch.accumulate for the same step; auto finds one"
        helps = f"a smaller batch.tokens ({step}), memory.checkpoint: on, a shorter data.max_length"
    helps = ", ".join([*objective_class(config.objective).relief(config), helps])
    raise ConfigError(
        f"{phase} needs {needs}; {_limit(config)}. What helps: {helps}, model.quantize: 4, or a higher memory.limit"
    )


def _limit(config: Config) -> str:
    limit = "memory.limit" if config.memory.limit is not None else "what this machine can give"
    return f"{limit} is {amount(usable_bytes(config.memory.limit))}"


# --- measure ----------------------------------------------------------------------------------------------------------

_ALL = 1 << 62  # bytes of a step that did not fit in memory
MEASURED = 5  # most measurements for batch.tokens: auto
TIMED = 4  # gradients that are timed, after the first, which makes caches and kernels
QUICKER = 0.95  # compile if the compiled gradient takes less than this share of the eager one's time
FILLED = 0.95  # share of the room to aim at: a run agrees with its measurement within a few percent
ENOUGH = 1.15  # try more tokens only if this many times as many would fit
OVER = 1.05  # times a limit: MLX works ahead until a little above it, and then waits


def settle_by_measure(
    config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer, taken: int | None = None
) -> list[str]:
    """Measure a step to decide what is left open: gradient checkpointing and, on a GPU, `objective.compiled`.

    Args:
        taken: bytes of the step, if it has been measured.
    Returns:
        Notes for the user; none if the objective's batches are not known before it runs.
    Raises:
        ConfigError: it takes more than `memory.limit`, or than this machine has.
        ModelError: the model cannot be compiled, and `run.compile` asks for it.
    """
    eager = why_eager(config, model, objective)
    objective.compiled = config.run.compile == "on"
    if not config.memory.measure:
        return []
    taken = measured_bytes(config, model, objective, optimizer) if taken is None else taken
    room = OVER * usable_bytes(config.memory.limit)
    if taken is not None and taken > _room_for_step(config, model):
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


def _room_for_step(config: Config, model: nn.Module) -> float:
    """Return the bytes above which blocks are checkpointed, if that is left open, or else a step does not fit."""
    room = OVER * usable_bytes(config.memory.limit)
    if config.memory.checkpoint != "auto" or is_checkpointed(model):
        return room
    return min(room, machine_bytes() * CHECKPOINT_ABOVE)


def fit_tokens(
    config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer
) -> tuple[Config, int | None, list[str]]:
    """Correct the planned `batch.tokens: auto` by measuring the largest batch, and rebatch the objective.

    Returns:
        The recipe with the number; the bytes measured with it, or None; notes for the user.
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
        most = _room_for_step(config, model)
        largest = max(shape.rows * shape.width for shape in objective.shapes())
        wanted = _corrected(tokens, largest, taken, most, _lasting(model, optimizer))
        undecided = config.memory.checkpoint == "auto" and not is_checkpointed(model)
        if undecided and taken > most and wanted < LEAST_TOKENS:
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
    if tokens != config.batch.budget:
        config = _with(config, "batch", tokens=tokens)
        objective.rebatch(config)
    return config


def _corrected(tokens: int, largest: int, taken: int, most: float, lasting: int) -> int:
    """Return the batch.tokens to try next; the same number: it is good.

    Args:
        largest: tokens of the largest batch made with `tokens`, padding included.
        taken: bytes of its step, of `most`.
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
    """Return the bytes of weights, gradients and the optimiser."""
    arrays = tree_flatten([model.parameters(), model.trainable_parameters(), optimizer.arrays()])
    return sum(v.nbytes for _, v in arrays)


def _too_much(config: Config, taken: int) -> str:
    takes = "found no room" if taken == _ALL else f"takes {amount(taken)}"
    helps = ", ".join([*objective_class(config.objective).relief(config), FAILURES["memory"][1]])
    return f"a step {takes}; {_limit(config)}. What helps: {helps}"


def _settle_compiling(config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer, room: float) -> str:
    """Compile if it makes the largest batch's gradient faster and its step fits into `room`; return a note."""
    objective.compiled = True
    try:
        taken = measured_bytes(config, model, objective, optimizer)
        if taken is not None and taken <= room:
            eager, compiled = (gradient_seconds(config, model, objective, on) for on in (False, True))
            objective.compiled = compiled < QUICKER * eager
            said = f"{'' if objective.compiled else 'not '}compiled where shapes come again"
            return f"the step is {said}: its gradient took {compiled:.3g} s compiled, {eager:.3g} s eager"
        said = f"the step is not compiled: it would take {amount(taken or 0)}"
    except (ModelError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ModelError) and gpu_failure(error) != "memory":
            raise
        said = f"the step is not compiled: {error}"
    objective.compiled = False
    return said


def gradient_seconds(config: Config, model: nn.Module, objective: Objective, compiled: bool) -> float:
    """Return the seconds per gradient of the largest batch, from several in a row; the random state is restored."""
    objective.compiled = compiled  # its batches are padded then
    with _probed(config, model):
        step, gradients = objective.largest(model)[0](), Gradients(model, objective, config.tune.router_aux)
        batch = step.micro_batches[0]
        mx.eval(gradients(batch, step.per))
        began, before = time.perf_counter(), mx.array(0.0)
        for _ in range(TIMED):
            total, sums, grads = gradients(batch, step.per)
            mx.async_eval(total, sums, grads)
            del grads
            mx.eval(before)  # as in the loop: the next is made while one is computed
            before = total
        mx.eval(before)
        mx.synchronize()
        return (time.perf_counter() - began) / TIMED


def crowded(config: Config) -> list[str]:
    """Return warnings before training: a limit above what the system recommends, and swap in use."""
    limit, lent, used = config.memory.limit, usable_bytes(), swap_bytes()
    notes = []
    if limit is not None and limit * 1e9 > lent:
        notes.append(f"warning: memory.limit is above the {amount(lent)} that this machine lends")
    if used > CROWDED:
        notes.append(f"warning: {amount(used)} of swap are in use: close programs that take much memory")
    return notes


def measured_bytes(config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer) -> int | None:
    """Return the peak of training on the largest batches, weights included; None: the objective knows no such batch.

    It runs two steps as the loop does, with a learning rate of 0: weights, random state and the objective's state are
    restored, and the optimiser starts again. Steps for which memory runs out take `_ALL`.

    Raises:
        ConfigError: memory ran out during an update, after which the weights are not known.
        TrainingError: macOS stopped the GPU's work.
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
    """Set the loop's modes inside the block, and report work that macOS stops as the loop does."""
    try:
        with probing(model, training=True), quicker(model), limits(config.memory.limit, config.memory.cache):
            yield
    except RuntimeError as error:
        if gpu_failure(error) != "watchdog":
            raise
        raise gpu_failed("watchdog", "in a step that is measured before training") from error


def _peak(config: Config, model: nn.Module, objective: Objective, optimizer: Optimizer, step: MakesStep) -> int:
    """Return the peak of two steps in a row, without other arrays of this process."""
    held = [model.parameters(), optimizer.arrays(), objective.held()]
    mx.eval(held)
    mx.clear_cache()
    mx.reset_peak_memory()
    own = {id(v): v.nbytes for _, v in tree_flatten(held)}  # a critic may start as the policy's very arrays
    others = max(0, mx.get_active_memory() - sum(own.values()))
    del held
    gradients = Gradients(model, objective, config.tune.router_aux)

    def summed() -> tuple[mx.array, dict[str, mx.array]]:
        made = step()
        total, _, grads = gradients.summed(made.micro_batches, made.per)
        return total, grads

    total, grads = summed()
    mx.eval(total, grads)
    # A learning rate of 0 times a gradient that is not finite is not 0; the run ends at such a step.
    if all(mx.isfinite(g.square().sum()).item() for g in grads.values()):
        try:
            mx.async_eval(optimizer.step(model, grads, mx.array(1.0), 0.0))
            # The next step's forward pass begins while old and new parameters exist side by side.
            total, grads = summed()
            mx.async_eval(optimizer.step(model, grads, mx.array(1.0), 0.0))
            mx.eval(total, model.parameters(), optimizer.arrays())
        except (RuntimeError, MemoryError) as error:
            if gpu_failure(error) != "memory":
                raise
            raise ConfigError(_too_much(config, _ALL)) from error
        finally:
            optimizer.begin(model)
    return mx.get_peak_memory() - others
