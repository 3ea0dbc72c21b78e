"""mlxft push."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mlxft.cli import PathArg
from mlxft.text import echo, json_text


@click.command()
@click.argument("run", type=PathArg())
@click.argument("repo")
@click.option("--dry-run", is_flag=True, help="List the files and show the card; send nothing.")
@click.option("--public", is_flag=True, help="All may read it; default: private.")
@click.option("--update", is_flag=True, help="Add a commit to a repository that is there; its card is replaced.")
@click.option("--message", default="Upload by mlxft", show_default=True, help="Of the commit.")
@click.option("--what", type=click.Choice(["adapter", "model"]), help="Refuse to push anything else.")
@click.option("--run", "of", type=PathArg(), help="The run that a fused or exported folder came from.")
@click.option("--licence", "--license", help="Of the base, as the hub names it (apache-2.0), where it is not known.")
@click.option("--card", "own", type=PathArg(), help="A README.md to use in place of the written one.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def push(
    run: Path,
    repo: str,
    dry_run: bool,
    public: bool,
    update: bool,
    message: str,
    what: Literal["adapter", "model"] | None,
    of: Path | None,
    licence: str | None,
    own: Path | None,
    as_json: bool,
) -> None:
    """Push RUN, or what fuse or export wrote, to REPO (owner/name) on the Hugging Face hub, with a model card.

    Weights, tokenizer, configuration and card go; checkpoints, data, metrics and samples stay here. The token is
    that of HF_TOKEN or `hf auth login`.

    Example: mlxft push runs/quickstart ada/quickstart --dry-run
    """
    from mlxft.export.hub import pack, upload
    from mlxft.study.plots import curves

    shipment = pack(run, repo, what=what, run=of, licence=licence, own_card=own, draw=curves)
    commit = None if dry_run else upload(shipment, public=public, update=update, message=message)
    sizes = shipment.sizes()
    if as_json:
        files = [{"path": name, "bytes": size} for name, size in sizes.items()]
        told = {"repo": repo, "url": shipment.url, "public": public, "files": files, "left_out": shipment.left_out}
        echo(json_text(told | {"notes": shipment.notes, "card": shipment.card, "commit": commit}, indent=2))
        return
    echo(f"{'would push' if dry_run else 'pushed'} to {shipment.url} ({'public' if public else 'private'})")
    for name, size in [*sizes.items(), ("in all", sum(sizes.values()))]:
        echo(f"{_size(size):>12}  {name}")
    for line in ([f"stays here: {', '.join(shipment.left_out)}"] if shipment.left_out else []) + shipment.notes:
        echo(line)
    echo(f"\nREADME.md:\n\n{shipment.card}" if dry_run else f"commit: {commit}")


def _size(size: int) -> str:
    """Bytes as people say it."""
    return f"{size:,} B" if size < 1000 else f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
