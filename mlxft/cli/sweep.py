"""mlxft sweep, mlxft lr-find."""

from __future__ import annotations

from pathlib import Path

import click

from mlxft.cli import PathArg, reserve
from mlxft.cli.train import OVERRIDES
from mlxft.text import echo, json_text, make_console


@click.command()
@click.argument("recipe", type=PathArg())
@OVERRIDES
@click.option("--trials", type=click.IntRange(1, 10**6), help="Trials in all, those of earlier calls included.")
@click.option("--time", "limit", metavar="TIME", help="Longest time of this call, e.g. 2h, 30m, 1h30m.")
@click.option("--name", help="Folder below run.dir; default: the run's name.")
@click.option("--overwrite", is_flag=True, help="Begin anew: the trials there are get lost.")
@click.option("--json", "as_json", is_flag=True, help="Print trials, best and importance as JSON.")
def sweep(
    recipe: Path,
    overrides: tuple[str, ...],
    trials: int | None,
    limit: str | None,
    name: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Find better settings for RECIPE: train it with others, and stop early what falls behind.

    What is varied stands in the recipe, beside what `mlxft train` takes:

    \b
      sweep:
        space:
          optim.lr: {log: [1.0e-5, 1.0e-2]}    # also float, int, log_int: [low, high]
          tune.rank: {choice: [4, 8, 16, 32]}
        metric: loss        # of validation; others need direction: minimize or maximize
        sampler: tpe        # or random, grid
        pruner: halving     # or median, none

    A sweep that was killed or interrupted goes on with the same command. The best is written as best.yaml.

    \b
    Example: mlxft sweep configs/sweep.yaml --trials 12
             mlxft sweep configs/sweep.yaml --time 2h data.train=my.jsonl
    """
    from mlxft.study.sweep import sweep as run

    console = make_console(stderr=as_json)
    found = run(recipe, overrides, trials=trials, limit=limit, name=name, overwrite=overwrite, console=console)
    if as_json:
        echo(json_text(found.to_json()))
    else:
        found.print(console)


@click.command("lr-find")
@click.argument("recipe", type=PathArg())
@OVERRIDES
@click.option("--min", "low", default=1e-7, show_default=True, help="First rate.")
@click.option("--max", "high", default=1.0, show_default=True, help="Last rate.")
@click.option("--steps", default=100, show_default=True, help="Steps from the first rate to the last.")
@click.option("--plot", type=PathArg(), help="Draw the loss over the rate: .png, .svg or .pdf.")
@click.option("--overwrite", is_flag=True, help="Replace the picture if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print rates, losses and suggestion as JSON.")
def lr_find(
    recipe: Path,
    overrides: tuple[str, ...],
    low: float,
    high: float,
    steps: int,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Suggest a learning rate for RECIPE: train at a rising one, and see where the loss falls (Smith 2015).

    The suggestion is a tenth of the rate at which the smoothed loss was lowest, before it first rose by a quarter of
    its whole fall. The test ends where the loss runs away, and leaves no run behind.

    \b
    Example: mlxft lr-find configs/sft-lora.yaml --plot lr.png
             mlxft lr-find configs/sft-lora.yaml --min 1e-6 --max 1e-1 --steps 200
    """
    from mlxft.owned import check_file
    from mlxft.recipe import load_config
    from mlxft.study.lr_find import lr_find as run

    console = make_console(stderr=as_json)
    if plot is not None:
        reserve(plot)
        check_file(plot, overwrite, "--plot")
    found = run(load_config(recipe, overrides), low, high, steps, plot, console)
    if as_json:
        echo(json_text(found.to_json()))
        return
    for line in found.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if plot is not None:
        echo(f"picture: {plot}")
