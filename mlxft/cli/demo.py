"""mlxft demo."""

from __future__ import annotations

from pathlib import Path

import click

from mlxft.cli import PathArg
from mlxft.text import make_console


@click.command()
@click.option(
    "--dir",
    "folder",
    default="demo-run",
    show_default=True,
    type=PathArg(),
    help="Where the run and the fused model go; what an earlier demo left there is replaced.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def demo(folder: Path, overrides: tuple[str, ...]) -> None:
    """Teach SmolLM2-135M ten facts that it can not know, fuse, and let the fused model answer.

    Example: mlxft demo
    """
    from mlxft.demo.walk import walk

    walk(folder, overrides, make_console())


@click.command()
@click.option(
    "--dir",
    "folder",
    default="rlhf-run",
    show_default=True,
    type=PathArg(),
    help="Where the runs and the fused model go; what an earlier walk left there is replaced.",
)
@click.option("--reviews", help="File of rows with `review` and `label` (great or other); default: some built-in ones.")
@click.argument("overrides", nargs=-1, metavar="[RUN:KEY=VALUE]...")
def rlhf(folder: Path, reviews: str | None, overrides: tuple[str, ...]) -> None:
    """Walk the whole road on SmolLM2-135M: SFT, a reward model from pairs of reviews, PPO, fuse, before and after.

    Example: mlxft rlhf ppo:run.steps=40
    """
    from mlxft.demo.rlhf import walk

    walk(folder, reviews, overrides, make_console())
