"""mlxft eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlxft.cli import TRUST, PathArg, reserve
from mlxft.text import echo, json_text, make_console


@click.command()
@click.argument("model")
@click.argument("file", required=False)
@click.option("--adapter", help="Adapter folder or run to put on the model.")
@click.option(
    "--format", "format_", help="How rows are read, as data.format; default: the run's, or what they look like."
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="loss (default), choice, exact_match, contains, number, f1, json, file.py:function, reward:RUN, or a file of "
    "YAML; can be given several times.",
)
@click.option(
    "--template",
    type=click.Choice(["auto", "none"]),
    help="none: prompts as plain text, as lm-eval asks; default: the task's, the run's, else auto, the chat template.",
)
@click.option(
    "--thoughts",
    type=click.Choice(["drop", "keep"]),
    help="drop: judge written answers without the thoughts before them; keep: whole; default: the task's, else drop.",
)
@click.option("--shots", default=0, show_default=True, type=click.IntRange(0), help="Solved rows shown before each.")
@click.option("--shots-from", metavar="FILE", help="Where these are taken from.")
@click.option("--against", metavar="MODEL", help="base, or another run or model: the paired difference.")
@click.option("--limit", type=click.IntRange(1), help="Only the first rows (of lm-eval: of each task).")
@click.option("--max-length", type=click.IntRange(2), help="Most tokens of a row; default: the model's context.")
@click.option(
    "--overflow",
    default="error",
    show_default=True,
    type=click.Choice(["error", "drop", "truncate", "split"]),
    help="What becomes of longer rows; truncate and split (texts) only for a loss.",
)
@click.option("--tokens", default=2048, show_default=True, type=click.IntRange(1), help="Of a batch, with padding.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of shots, sampling and resamples.")
@click.option(
    "--out",
    type=PathArg(file_okay=False),
    help="Folder for predictions.jsonl and results.json; default: of a run, its eval/FILE.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an evaluation left in the folder of --out.")
@click.option("--tasks", "harness", metavar="NAMES", help="Tasks of lm-eval instead of FILE, with commas between.")
@click.option("--include-path", metavar="DIR", help="With --tasks: where lm-eval finds more task files.")
@click.option("--chat", is_flag=True, help="With --tasks: questions go through the chat template.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def eval(
    model: str,
    file: str | None,
    out: Path | None,
    overwrite: bool,
    against: str | None,
    adapter: str | None,
    tasks: tuple[str, ...],
    harness: str | None,
    include_path: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """How good MODEL (a run, adapter, fused or any other model) is on FILE: loss and perplexity, or a task.

    Each figure comes with its standard error. A task with choices goes by log-likelihood, the others by what the model
    writes; configs/eval-reviews.yaml shows a task in YAML.

    \b
    Example: mlxft eval runs/quickstart mlxft/demo/valid.jsonl --against base
             mlxft eval runs/a test.jsonl --task f1 --task contains --json
             mlxft eval runs/a --tasks arc_easy,hellaswag --limit 100
    """
    if harness is not None:
        _refuse_beside_tasks(file, out, against, tasks, options)
        _by_harness(model, adapter, harness, include_path, options, as_json)
        return
    if file is None:
        raise click.UsageError("give a FILE, or tasks of lm-eval with --tasks")
    if include_path is not None or options.pop("chat"):
        raise click.UsageError("--include-path and --chat go with --tasks")
    if bool(options["shots"]) != (options["shots_from"] is not None):
        raise click.UsageError("--shots and --shots-from go together")
    from mlxft.owned import EVALUATION
    from mlxft.study.eval_tables import show
    from mlxft.study.evaluation import Asking, check_out, default_out, run_evaluation

    if out is not None:
        reserve(out / EVALUATION[0])
    check_out(out, overwrite, adapter or model)
    options["format"] = options.pop("format_")
    asking = Asking(tasks or ("loss",), **options)
    found = run_evaluation(model, file, asking, adapter=adapter, against=against, console=make_console(stderr=True))
    folder = out or default_out(adapter or model, file, found)
    # First on the screen: a disk that is full takes nothing away from what was found.
    if as_json:
        echo(json_text(found.to_json()))
    else:
        show(make_console(), found)
    if folder is not None:
        found.write(folder)
    if not as_json:
        echo(f"predictions: {folder / 'predictions.jsonl'}" if folder else "give --out DIR to keep the predictions")


def _refuse_beside_tasks(
    file: str | None, out: Path | None, against: str | None, tasks: tuple[str, ...], options: dict[str, Any]
) -> None:
    """What lm-eval's tasks have no use for."""
    given = {
        "FILE": file,
        "--task": tasks,
        "--against": against,
        "--format": options["format_"],
        "--template": options["template"],
        "--shots-from": options["shots_from"],
        "--out": out,
        "--overflow": options["overflow"] != "error",
    }
    if idle := [name for name, value in given.items() if value]:
        raise click.UsageError(f"{', '.join(idle)}: not with --tasks, which are lm-eval's and bring their own rows")


def _by_harness(
    model: str, adapter: str | None, names: str, include_path: str | None, options: dict[str, Any], as_json: bool
) -> None:
    from mlxft.study.harness_tasks import run_tasks, show_tasks

    found = run_tasks(
        model,
        [name.strip() for name in names.split(",") if name.strip()],
        adapter=adapter,
        include_path=include_path,
        shots=options["shots"] or None,
        console=make_console(stderr=True),
        thoughts=options["thoughts"] or "drop",
        **{name: options[name] for name in ("limit", "max_length", "tokens", "seed", "chat")},
    )
    if as_json:
        echo(json_text(found))
    else:
        show_tasks(make_console(), found)
