"""lm-eval's tasks by name: run on a model of ours, and its figures as JSON."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxft.data.thoughts import Thoughts
from mlxft.errors import ConfigError, DataError, MlxftError, missing_extra, nearest
from mlxft.model.load import context_of
from mlxft.rundir import load
from mlxft.study.evaluate import TOKENS

CONTEXT = 2048  # where the model's config does not say


def run_tasks(
    model: str,
    names: Sequence[str],
    *,
    adapter: str | None = None,
    include_path: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    chat: bool = False,
    thoughts: Thoughts = "drop",
    console: Console | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval.

    Args:
        names: tasks, groups or tags that lm-eval knows, or finds in the folder `include_path`.
        shots: shown before each question; default: as each task says.
        limit: only the first questions of each task.
        max_length: of a request in tokens; default: the model's context.
        chat: whether questions go through the chat template.
        thoughts: whether tasks are given written answers without the thoughts before them (drop), or whole (keep).
    Returns:
        {"tasks": {name: {"n", "shots", "figures": {metric: {"value", "se"}}}}, "groups": ..., "notes": [...]}
    Raises:
        ConfigError: lm-eval is not installed, or knows no such task. ModelError: no such model.
        DataError: a task's rows can not be had, or it fails.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from mlxft.study.harness import Model
    except ModuleNotFoundError as e:
        raise ConfigError(f"--tasks: {missing_extra('lm-eval', 'eval')}") from e
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder")
    manager = TaskManager(include_path=include_path)
    if not names:
        raise ConfigError("--tasks names none; expected for example arc_easy,hellaswag")
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        said = [f"{name}{nearest(name, known)}" for name in unknown]
        raise ConfigError(f"--tasks: lm-eval knows no {', '.join(said)}; `lm-eval ls tasks` lists all {len(known):,}")
    loaded = load(model, adapter)
    if chat and not loaded.tokenizer.has_chat_template:
        raise ConfigError("--chat: this model has no chat template")
    lm = Model(loaded, max_length or context_of(loaded.config) or CONTEXT, tokens, seed, console, thoughts)
    try:
        found = simple_evaluate(
            model=lm,
            tasks=list(names),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=None,
            fewshot_random_seed=seed,
        )
    except MlxftError:
        raise
    except Exception as e:  # its tasks fetch data sets and run code of their own
        raise DataError(f"lm-eval could not run {', '.join(names)}: {type(e).__name__}: {str(e)[:500]}") from e
    return _as_json(found, lm.cut, lm.limit)


def _as_json(found: dict[str, Any], cut: int, limit: int) -> dict[str, Any]:
    tasks = {
        name: {
            "n": found.get("n-samples", {}).get(name, {}).get("effective"),
            "shots": found.get("n-shot", {}).get(name),
            "figures": figures(values),
        }
        for name, values in found["results"].items()
    }
    notes = [f"{cut:,} requests were longer than {limit:,} tokens, and their beginning is cut off"] if cut else []
    groups = {name: figures(values) for name, values in (found.get("groups") or {}).items()}
    return {"tasks": tasks, "groups": groups, "notes": notes}


def figures(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's {"acc,none": 0.5, "acc_stderr,none": 0.1, ...} as {"acc": {"value": 0.5, "se": 0.1}, ...}."""
    every: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, selection = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{selection}")
        name = metric if selection == "none" else f"{metric}, {selection}"
        every[name] = {"value": float(value), "se": float(error) if isinstance(error, int | float) else None}
    return every


def show_tasks(console: Console, found: dict[str, Any]) -> None:
    """A table of all tasks."""
    table = Table()
    for name in ("task", "n", "shots", "metric", "value ± standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", overflow="fold")
    groups = {name: {"n": None, "shots": None, "figures": of} for name, of in found["groups"].items()}
    for name, task in (found["tasks"] | groups).items():
        for metric, figure in task["figures"].items():
            error = f" ± {figure['se']:.4f}" if figure["se"] is not None else ""
            cells = (name, task["n"], task["shots"], metric, f"{figure['value']:.4f}{error}")
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))
    console.print(table)
    for note in found["notes"]:
        console.print(Text(f"note: {note}"))
