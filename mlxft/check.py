"""Check a recipe for `mlxft check`: show rows as they are trained, the memory plan, and how long the run will take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from rich.console import Console
from rich.text import Text

from mlxft.build import (
    Planned,
    Traffic,
    amount,
    base_skeleton,
    check_memory,
    full_logits,
    gradient_seconds,
    is_open,
    learning_notes,
    load_base,
    make_objective,
    planned,
    settled,
    usual_networks,
    why_eager,
)
from mlxft.config import Config
from mlxft.data.dataset import Encoded, EncodedLabelled, EncodedPair, shared_part, trained_spans
from mlxft.data.dataset import describe_pair as describe_judged
from mlxft.device import Backend, elsewhere, in_use, planning_for
from mlxft.distributed import Network
from mlxft.errors import ModelError
from mlxft.files import check_writable
from mlxft.model.layers import LowRank, aside, limits, unrounded
from mlxft.model.load import NotBeforeLoading, check_weights, load_tokenizer
from mlxft.model.logits import refuse_states
from mlxft.model.memory import ShapeSplit
from mlxft.objectives.base import Objective, Step, arrays_of
from mlxft.run import assemble, total_steps
from mlxft.text import Event, json_text
from mlxft.trainer.loop import Hooks, Loop, Progress
from mlxft.trainer.optim import group_of, learning_rate
from mlxft.trainer.report import check_installed

# --- timing -----------------------------------------------------------------------------------------------------------
# Estimate how long a run will take from a few real steps; nothing is written.

_STEPS = 4  # the first one compiles and is not timed
LOOKED_AT = 64  # number of micro-batches among which the largest is searched


@dataclass(frozen=True)
class TimedSteps:
    """Time and memory of a few steps.

    Attributes:
        seconds: expected time of the whole run, without validation and saving.
        tokens_per_s: speed, padding not counted.
        peak: measured peak memory in bytes.
        steps: of the run.
        rollout: seconds of one rollout by phase; empty for off-policy objectives.
        rounding: how many times as long a gradient takes with tune.quantize_aware; None: nothing is rounded.
    """

    seconds: float
    tokens_per_s: float
    peak: int
    steps: int
    rollout: dict[str, float] = field(default_factory=dict)
    rounding: float | None = None

    def on(self, ranks: int, carried: Traffic, network: Network) -> float:
        """Return the expected seconds on so many machines like this one."""
        return self.seconds / ranks + self.steps * carried.seconds(network)

    def to_json(self) -> dict[str, Any]:
        """Return the measurements as JSON."""
        found: dict[str, Any] = {"expected_s": self.seconds, "tokens_per_s": self.tokens_per_s}
        found |= {"rounding": self.rounding} if self.rounding is not None else {}
        return found | {"measured_peak": self.peak} | ({"rollout": self.rollout} if self.rollout else {})

    def lines(self, predicted: int | None) -> list[str]:
        """Return the measurements as lines of text."""
        beside = f" (predicted: {amount(predicted)})" if predicted is not None else ""
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.rollout.items())
        return [
            f"time: about {duration(self.seconds)} at {self.tokens_per_s:,.0f} tokens/s, without validation and saving",
            *([f"one rollout: {phases}"] if phases else []),
            *([f"tune.quantize_aware: {self.rounding:.2f} times the time of a gradient"] if self.rounding else []),
            f"measured peak memory: {amount(self.peak)}{beside}",
        ]


def duration(seconds: float) -> str:
    """Format seconds as a duration."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@aside()
def timed_steps(config: Config, objective: Objective, correct: bool) -> TimedSteps:
    """Load the weights, run a few steps, and estimate how long a run will take.

    For on-policy objectives these are the steps of one whole rollout, which is sampled and scored.

    Args:
        correct: see `assemble`.
    Raises:
        ModelError: the weights cannot be loaded.
        RewardError: a reward is not a number.
        TrainingError: the loss is not a number.
    """
    loaded = load_base(config, lazy=True)
    _, optimizer, config, _ = assemble(config, loaded, objective, correct)
    total = total_steps(config, objective)
    events: list[Event] = []
    settings = {"report_every": 1, "eval_at_start": False, "eval_every": None, "patience": None}
    config = config.model_copy(update={"run": config.run.model_copy(update=settings)})

    def keep(event: Event) -> None:
        if event["event"] in ("train", "rollout"):  # and not the validation at the end
            events.append(event)

    hooks = Hooks(keep, lambda p: None, lambda p: None, lambda p: None)
    rolled = objective.steps_per_rollout()
    count = rolled or _STEPS
    mx.reset_peak_memory()
    with limits(config.memory.limit, config.memory.cache):
        few = None if rolled else _few_steps(objective, loaded.model)
        Loop(loaded.model, objective, optimizer, config, count, Progress(), hooks, few).run()
    peak, times = mx.get_peak_memory(), _rounding_times(config, loaded.model, objective)
    if rolled:
        return replace(_of_rollout(events, total / count, peak, total), rounding=times)
    first, last = events[0], events[-1]
    seconds = last["elapsed_s"] - first["elapsed_s"]
    tokens_per_s = (last["tokens"] - first["tokens"]) / seconds
    steps = objective.steps_per_epoch()
    # Where an epoch's steps are not known, those that were timed stand for all.
    per_step = (
        objective.summary().counts["tokens"] / steps if steps else (last["tokens"] - first["tokens"]) / (_STEPS - 1)
    )
    return TimedSteps(total * per_step / tokens_per_s, tokens_per_s, peak, total, rounding=times)


def _rounding_times(config: Config, model: nn.Module, objective: Objective) -> float | None:
    """Return how many times as long a gradient of the largest batch takes with rounded weights as without."""
    if not (any(isinstance(m, LowRank) and m.form for m in model.modules()) and objective.largest(model)):
        return None
    rounded = gradient_seconds(config, model, objective, objective.compiled)
    with unrounded(model):
        return rounded / gradient_seconds(config, model, objective, objective.compiled)


def _of_rollout(events: list[Event], rollouts: float, peak: int, total: int) -> TimedSteps:
    """Estimate the time of `rollouts` rollouts from the events of one."""
    rolled, last = events[0], events[-1]
    seconds = last["elapsed_s"]
    phases = {"sampling": rolled["sampling_s"], "scoring": rolled["scoring_s"]}
    phases["training"] = seconds - sum(phases.values())
    return TimedSteps(rollouts * seconds, last["tokens"] / seconds, peak, total, phases)


def _few_steps(objective: Objective, model: nn.Module) -> Iterator[Step]:
    """Return an objective's first steps over and over, the one with the largest micro-batch first."""
    seen = list(islice(objective.steps(model), max(LOOKED_AT // objective.config.batch.accumulate, _STEPS)))
    largest = max(seen, key=_largest_bytes)
    return cycle([largest, *(step for step in seen if step is not largest)][:_STEPS])


def _largest_bytes(step: Step) -> int:
    return max(sum(a.nbytes for a in arrays_of(b.data).values()) for b in step.micro_batches)


# --- check ------------------------------------------------------------------------------------------------------------

TO_COME = "; a measured step corrects it when training begins"


def check(
    config: Config,
    rows: int,
    console: Console,
    as_json: bool,
    time: bool = False,
    device: Backend | None = None,
) -> dict[str, Any]:
    """Validate a recipe and its data; print counts, the memory plan and the first rows as they are trained.

    Args:
        rows: number of rows to show, with trained tokens marked.
        as_json: print everything as JSON instead.
        time: load the weights and run a few steps, to estimate how long training takes; nothing is written.
        device: device that the memory plan is for (default: this machine's).
    Raises:
        ConfigError, DataError, ModelError: as training would raise; that memory is too small is raised last.
    """
    with planning_for(device):
        return _check(config, rows, console, as_json, time)


def _check(config: Config, rows: int, console: Console, as_json: bool, time: bool) -> dict[str, Any]:
    check_weights(config.model.path)
    check_writable(config.run_dir, "run.dir")
    check_installed(config.report.to)
    asked, config, m = config, settled(config, resume=False).sharded, config.model
    tokenizer = load_tokenizer(m.path, m.chat_template, trust_remote_code=m.trust_remote_code)
    objective = make_objective(config, tokenizer)
    open_sizes, config = config, objective.config
    summary = objective.summary()
    total = total_steps(config, objective)
    found, reason, notes = memory_plan(config, objective)
    if asked.batch.tokens == "auto":
        by = "the memory plan" if found is not None else "default, without a memory plan"
        notes.append(f"batch.tokens: auto is {config.batch.budget:,} by {by}{TO_COME if is_open(asked) else ''}")
    fits = found is None or found.plan.fits(found.usable)
    facts = {
        "recipe": "valid",
        "objective": config.objective,
        "base": m.path,
        "steps": total,
        "steps_per_epoch": objective.steps_per_epoch(),
        "lr": config.optim.lr,
        "first_lr": float(f"{learning_rate(config.optim, 0, total):.4g}"),
        "trains": trains(config),
        "turn_ends_with": " ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(summary.ends)),
        "data": summary.counts,
        "notes": [*summary.notes, *learning_notes(open_sizes, objective, total), *notes],
        "run_dir": str(config.run_dir),
    }
    took, blas = (
        timed_steps(config, objective, is_open(asked)) if time and fits else None,
        None if elsewhere() else in_use(),
    )
    if as_json:
        facts["previews"] = [preview(row, tokenizer) for row in objective.previews(rows)]
        facts |= {"memory": {"not_predicted": reason} if found is None else found.to_json()}
        facts |= {"time": took.to_json()} if took is not None else {}
        facts |= {"blas": blas.to_json()} if blas is not None else {}
        console.out(json_text(facts, indent=2), highlight=False)  # without colours, because programs read it
    else:
        _print(facts, [*plan_lines(found, reason, took), *(blas.lines() if blas is not None else [])], console)
        colour = console.is_terminal and console.color_system is not None and not console.no_color
        for row in objective.previews(rows):
            _show(preview(row, tokenizer), console, colour)
    if not is_open(asked):  # otherwise a measured step corrects a batch that is too large
        _check_room(config, found)
    return facts


def check_trains(config: Config, objective: Objective) -> None:
    """Refuse a recipe that training would refuse, as far as that is known without weights.

    Raises:
        ConfigError, ModelError: as training would raise.
    """
    _check_room(config, memory_plan(config, objective)[0])


def _check_room(config: Config, found: Planned | None) -> None:
    if found is not None:
        check_memory(config, found.plan, found.rows, found.width)


def _print(facts: dict[str, Any], lines: list[str], console: Console) -> None:
    """Print the facts, then the lines."""
    for key, value in facts.items():
        if isinstance(value, dict):
            for name, number in value.items():
                console.print(f"{name}: {number:.1%}" if isinstance(number, float) else f"{name}: {number:,}")
        elif isinstance(value, list):
            for line in value:
                console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=not console.is_terminal)
        elif value:
            console.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=not console.is_terminal)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def preview(row: Encoded | EncodedPair | EncodedLabelled, tokenizer: Any) -> dict[str, Any]:
    """Return a row as it is trained, as JSON: its place, its texts and their numbers of tokens.

    In a pair, `shared` is the common beginning of both completions.
    """
    if isinstance(row, Encoded):
        return {
            "row": row.where,
            "tokens": len(row.ids),
            "trained_tokens": int(row.trained.sum()),
            "pieces": [{"text": text, "trained": trained} for text, trained in trained_spans(row, tokenizer)],
        }
    parts = describe_judged(row, tokenizer)
    found: dict[str, Any] = {"row": row.where}
    if isinstance(row, EncodedPair):
        parts.append(shared_part(row, tokenizer))
        found |= {name: value for name, value in (("margin", row.margin), ("tie", row.tie)) if value}
    else:
        found["label"] = row.label
    return found | {p.name: p.text for p in parts} | {f"{p.name}_tokens": p.tokens for p in parts}


def _show(row: dict[str, Any], console: Console, colour: bool) -> None:
    """Print a preview with trained text marked; the common beginning of a pair's completions is marked apart."""
    if "pieces" in row:
        title = f"{row['tokens']} tokens, {row['trained_tokens']} trained"
        texts = [Text().join(marked(piece["text"], piece["trained"], colour) for piece in row["pieces"])]
    else:
        names = [name for name in ("chosen", "rejected", "completion") if name in row]
        title = ", ".join([f"prompt {row['prompt_tokens']} tokens", *(f"{n} {row[f'{n}_tokens']}" for n in names)])
        title += f", the first {row['shared_tokens']} shared" if "shared" in row else ""
        title += f", margin {row['margin']:g}" if "margin" in row else ""
        title += ", a tie" if "tie" in row else ""
        title += (", good" if row["label"] else ", bad") if "label" in row else ""
        prompt = Text(row["prompt"].removesuffix("\n"))
        texts = [prompt, *(Text(f"{name}: ").append_text(_completion(row, name, colour)) for name in names)]
    console.print(f"\n{row['row']}: {title}", style="bold", markup=False, highlight=False, soft_wrap=True)
    for text in texts:
        # Rich must not wrap lines: a wrapped line would look like a line break in the row.
        console.print(text, soft_wrap=True)


def _completion(row: dict[str, Any], name: str, colour: bool) -> Text:
    shared = row.get("shared", "") if row[name].startswith(row.get("shared", "")) else ""
    pieces = [(shared, "green"), (row[name].removeprefix(shared), "bold green")]
    return Text().join(marked(text, True, colour, style) for text, style in pieces if text)


def memory_plan(config: Config, objective: Objective) -> tuple[Planned | None, str, list[str]]:
    """Return the memory plan, or the reason why there is none, and notes about the model.

    Raises:
        ConfigError, ModelError: the model cannot be trained with this recipe.
    """
    try:
        model = base_skeleton(config)
    except NotBeforeLoading as error:
        return None, str(error), []
    if config.batch.pack:
        refuse_states(model)
    why_eager(config, model, objective)
    if not objective.steps_per_rollout():  # an on-policy objective adds its critic when training begins
        group_of(config.optim.groups, (name for name, _ in tree_flatten(model.trainable_parameters())))
    notes = full_logits(ShapeSplit(model))
    shapes = objective.shapes()
    if not shapes:
        return None, f"the batches of objective {config.objective} are not known before training", notes
    try:
        around = objective.beside(model)
        notes += around.residents.notes if around is not None else ()
        return planned(config, model, shapes, around), "", notes
    except ModelError as error:
        return None, str(error), notes


def plan_lines(found: Planned | None, reason: str, took: TimedSteps | None) -> list[str]:
    """Return memory and time as lines of text."""
    lines = [f"memory: not predicted: {reason}"] if found is None else found.lines()
    if took is None:
        return lines
    lines += took.lines(found.plan.total if found and found.traffic is None else None)
    if found is not None and found.traffic is not None:
        times = [
            f"{duration(took.on(found.ranks, found.traffic, n))} {name}"
            for name, n in usual_networks(found.ranks).items()
        ]
        lines.append(f"time on {found.ranks} ranks: about {', '.join(times)}")
    return lines


def marked(text: str, trained: bool, colour: bool, style: str = "bold green") -> Text:
    """Return a text that is green if it is trained, or between ⟦ and ⟧ if there are no colours."""
    if not trained:
        return Text(text)
    return Text(text, style=style) if colour else Text(f"⟦{text}⟧")


def trains(config: Config) -> str:
    """Return a description of what the recipe trains."""
    t = config.tune
    if config.model.adapter is not None:
        return f"the adapter {config.model.adapter}"
    where = (
        ""
        if t.layers == "all"
        else f" of layers {t.layers}"
        if isinstance(t.layers, list)
        else f" of the last {t.layers} layers"
    )
    if t.method == "full":
        base = f"{', '.join(t.train)}{' and all' + where if where else ''}" if t.train else f"all weights{where}"
        return f"{base}{', but not ' + ', '.join(t.freeze) if t.freeze else ''}"
    targets = t.targets if isinstance(t.targets, str) else ", ".join(t.targets)
    whole = f", and in full: {', '.join(t.train)}" if t.train else ""
    aware = f", rounded to {t.quantize_aware} bits" if t.quantize_aware else ""
    return f"{t.method} of rank {t.rank}, scale {t.multiplier:g}, on {targets}{where}{aware}{whole}"
