"""What a recipe would do, without doing it: settings, data, masks, and what would be trained."""

from __future__ import annotations

import json
from typing import Any

from mlx.utils import tree_flatten
from rich.console import Console
from rich.text import Text

from mlxft.config import Config
from mlxft.data.dataset import describe
from mlxft.errors import ModelError
from mlxft.model.load import load_tokenizer
from mlxft.model.plan import ShapeSplit
from mlxft.objectives.onpolicy.base import OnPolicy
from mlxft.parts import make_objective
from mlxft.planning import Planned, around_of, bare_skeleton, batch_shapes, full_logits, outfitted, planned, settled
from mlxft.run import total_steps
from mlxft.timing import TimedSteps, timed_steps
from mlxft.train.optim import group_of, learning_rate


def check(config: Config, rows: int, console: Console, as_json: bool, time: bool = False) -> dict[str, Any]:
    """Validate, load the tokenizer and the data; print counts, the memory plan and the first rows as trained.

    Args:
        rows: how many to show, with trained tokens marked.
        as_json: print all as JSON in place of that.
        time: load the weights and take a few steps, to tell how long training takes; nothing is written.
    Raises:
        ConfigError, DataError, ModelError: as training would.
    """
    config, m = settled(config, resume=False), config.model
    tokenizer = load_tokenizer(m.path, m.chat_template, trust_remote_code=m.trust_remote_code)
    objective = make_objective(config, tokenizer)
    summary = objective.summary()
    total = total_steps(config, objective)
    found, reason, notes = memory_plan(config, objective)
    facts = {
        "recipe": "valid",
        "objective": config.objective,
        "base": m.path,
        "steps": total,
        "steps_per_epoch": objective.steps_per_epoch(config.batch.accumulate),
        "lr": config.optim.lr,
        "first_lr": float(f"{learning_rate(config.optim, 0, total):.4g}"),
        "trains": trains(config),
        "data": summary.counts,
        "notes": [*summary.notes, *notes],
        "run_dir": str(config.run_dir),
    }
    took = timed_steps(config, objective, total) if time else None
    if as_json:
        facts |= {"memory": {"not_predicted": reason} if found is None else found.to_json()}
        facts |= {"time": took.to_json()} if took is not None else {}
        console.out(json.dumps(facts, indent=2), highlight=False)  # never coloured: it is for programs
        return facts
    colour = console.is_terminal and console.color_system is not None and not console.no_color
    for key, value in facts.items():
        if isinstance(value, dict):
            for name, number in value.items():
                console.print(f"{name}: {number:.1%}" if isinstance(number, float) else f"{name}: {number:,}")
        elif isinstance(value, list):
            for line in value:
                console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=not console.is_terminal)
        elif value:
            console.print(f"{key}: {value}", markup=False, highlight=False)
    for line in plan_lines(found, reason, took):
        console.print(line, markup=False, highlight=False)
    for row in objective.previews(rows):
        title = f"\n{row.where}: {len(row.ids)} tokens, {int(row.trained.sum())} trained"
        console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        # A line that rich breaks would look like a line break of the row.
        console.print(marked(describe(row, tokenizer), colour), soft_wrap=True)
    return facts


def memory_plan(config: Config, objective: Any) -> tuple[Planned | None, str, list[str]]:
    """The plan, or why there is none; and what there is to say of the model.

    Raises:
        ConfigError, ModelError: the model can not be trained so.
    """
    try:
        bare = bare_skeleton(config)
    except ModelError as error:
        return None, str(error), []
    model = outfitted(config, bare)
    if not isinstance(objective, OnPolicy):  # a critic is added when training begins
        group_of(config.optim.groups, (name for name, _ in tree_flatten(model.trainable_parameters())))
    notes = full_logits(ShapeSplit(model))
    shapes = batch_shapes(objective)
    if not shapes:
        return None, f"the batches of objective {config.objective} are not known before it runs", notes
    try:
        around = around_of(config, model, objective)
        notes += around.residents.notes if around is not None else ()
        return planned(config, model, shapes, around), "", notes
    except ModelError as error:
        return None, str(error), notes


def plan_lines(found: Planned | None, reason: str, took: TimedSteps | None) -> list[str]:
    """Memory and time, in words."""
    lines = [f"memory: not predicted: {reason}"] if found is None else found.lines()
    return lines + (took.lines(found.plan.total if found else None) if took is not None else [])


def marked(pieces: list[tuple[str, bool]], colour: bool) -> Text:
    """A row's text with what is trained in green, or between ⟦ and ⟧ where there is no colour."""
    text = Text()
    for piece, trained in pieces:
        if not trained:
            text.append(piece)
        elif colour:
            text.append(piece, style="bold green")
        else:
            text.append(f"⟦{piece}⟧")
    return text


def trains(config: Config) -> str:
    """What the recipe trains, in words."""
    t = config.tune
    if config.model.adapter is not None:
        return f"the adapter {config.model.adapter}, further"
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
    whole = f", and whole: {', '.join(t.train)}" if t.train else ""
    return f"{t.method} of rank {t.rank}, scale {t.multiplier:g}, on {targets}{where}{whole}"
