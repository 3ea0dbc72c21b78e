"""mlxft train, mlxft check."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mlxft.cli import PathArg
from mlxft.text import make_console

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@click.command()
@click.argument("recipe", type=PathArg(), required=False)
@OVERRIDES
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[RUN]",
    help="Go on from the newest checkpoint: of RUN, or of the recipe's run folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run folder if it exists.")
def train(recipe: Path | None, overrides: tuple[str, ...], resume: str | None, overwrite: bool) -> None:
    """Train by RECIPE; KEY=VALUE beats what it says.

    \b
    Example: mlxft train configs/sft-lora.yaml optim.lr=2e-4
             mlxft train --resume runs/sft-lora
    """
    path, overrides = _recipe(recipe, overrides, resume)
    from mlxft.recipe import load_config
    from mlxft.run import train as run

    of_run = path.name == "config.yaml" and resume is not None
    config = load_config(path, overrides, of_run=of_run)
    if of_run:  # a run folder may have been moved since
        place = {"dir": path.resolve().parent.parent, "name": path.resolve().parent.name}
        config = config.model_copy(update={"run": config.run.model_copy(update=place)})
    run(config, resume=resume is not None, overwrite=overwrite)


def _recipe(recipe: Path | None, overrides: tuple[str, ...], resume: str | None) -> tuple[Path, tuple[str, ...]]:
    """The file to read. `--resume` takes a run folder, a recipe, or nothing: then RECIPE is one of them."""
    if resume and recipe is not None and "=" in str(recipe) and not recipe.exists():
        overrides, recipe = (str(recipe), *overrides), None
    if resume and recipe is not None and "=" in resume:
        overrides, resume = (resume, *overrides), ""
    given = [p for p in (recipe, Path(resume) if resume else None) if p is not None]
    if len(given) != 1:
        raise click.UsageError("name one recipe, or --resume with one run folder")
    path = given[0]
    if resume is not None and path.is_dir():
        if not (path / "config.yaml").exists():
            raise click.UsageError(f"{path} is no run folder: it has no config.yaml")
        return path / "config.yaml", overrides
    if path.is_dir():
        raise click.UsageError(f"{path} is a folder; name a recipe, or use --resume {path}")
    return path, overrides


@click.command()
@click.argument("recipe", type=PathArg())
@OVERRIDES
@click.option("--rows", default=2, show_default=True, type=click.IntRange(0), help="Rows to show.")
@click.option("--time", is_flag=True, help="Load the weights and time a few steps: how long training will take.")
@click.option(
    "--device", type=click.Choice(["metal", "cuda", "cpu"]), help="What memory is planned for; default: this machine's."
)
@click.option("--json", "as_json", is_flag=True, help="Print counts, plan and rows as JSON.")
def check(
    recipe: Path,
    overrides: tuple[str, ...],
    rows: int,
    time: bool,
    device: Literal["metal", "cuda", "cpu"] | None,
    as_json: bool,
) -> None:
    """Validate RECIPE and its data; show what would be trained and the memory it takes. Nothing is written.

    Without --time no weights are loaded.

    \b
    Example: mlxft check configs/sft-lora.yaml data.train=my.jsonl
             mlxft check configs/sft-lora.yaml --time
             mlxft check configs/sft-lora.yaml --device metal
    """
    if time and device:
        raise click.UsageError("--time is of this machine: give --device or --time, not both")
    from mlxft.check import check as run
    from mlxft.recipe import load_config

    run(load_config(recipe, overrides), rows, make_console(), as_json, time, device)
