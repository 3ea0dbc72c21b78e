"""mlxft demo."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--dir",
    "folder",
    default="demo-run",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where the run and the fused model go; what an earlier demo left there is replaced.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def demo(folder: Path, overrides: tuple[str, ...]) -> None:
    """Teach SmolLM2-135M ten facts that it can not know, fuse, and let the fused model answer.

    Example: mlxft demo
    """
    from rich.console import Console

    from mlxft.demo.walk import walk

    walk(folder, overrides, Console())
