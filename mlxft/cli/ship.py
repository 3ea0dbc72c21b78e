"""mlxft fuse, mlxft convert."""

from __future__ import annotations

from pathlib import Path

import click

from mlxft.cli import TRUST, PathArg, reserve
from mlxft.text import echo, json_text, make_console


@click.command()
@click.argument("paths", metavar="[RUN] OUT", nargs=-1, required=True, type=PathArg())
@click.option("--adapter", "adapters", multiple=True, metavar="RUN[:W]", help="Merge: add W times its change (1).")
@click.option("--model", help="The base, where the adapter does not say or it has moved.")
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the adaptation that must be kept; on a quantised base the fewest bits that do are taken.",
)
@click.option("--bits", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="Requantise all fused layers so.")
@click.option("--dequantize", is_flag=True, help="Write float weights of a quantised base.")
@click.option("--probe", metavar="FILE", help="Rows to measure on; valid: its recipe's; default: built-in text.")
@click.option("--force", is_flag=True, help="Write it even if less than --keep is kept.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
def fuse(
    paths: tuple[Path, ...],
    adapters: tuple[str, ...],
    model: str | None,
    keep: float,
    bits: str | None,
    dequantize: bool,
    probe: str | None,
    force: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fuse RUN's adapter into its base and write the folder OUT, for mlx-lm, LM Studio and transformers.

    What was kept of the fine-tune is measured; where less than --keep would be, nothing is written.

    Example: mlxft fuse runs/quickstart fused

    Example: mlxft fuse merged --adapter runs/a:0.7 --adapter runs/b:0.3
    """
    if dequantize and bits:
        raise click.UsageError("give --dequantize or --bits, not both")
    if len(paths) > 2 or (len(paths) == 1 and not adapters):
        raise click.UsageError("give RUN and OUT, or OUT and --adapter RUN (once or more)")
    reserve(paths[-1])
    from rich.text import Text

    from mlxft.export.fuse import LostTooMuch
    from mlxft.export.fuse import fuse as fuse_run
    from mlxft.export.sources import parse_adapter

    with make_console(stderr=True).status("loading") as status:
        try:
            fused = fuse_run(
                paths[0] if len(paths) == 2 else None,
                paths[-1],
                adapters=[parse_adapter(text) for text in adapters],
                model=model,
                dequantize=dequantize,
                bits=int(bits) if bits else None,
                keep=keep,
                probe=probe,
                force=force,
                overwrite=overwrite,
                tell=lambda said: status.update(Text(said)),
            )
        except LostTooMuch as lost:
            if as_json:
                echo(json_text(lost.fused.to_json()))
            raise
    echo(json_text(fused.to_json()) if as_json else "\n".join(fused.lines()))


@click.command()
@click.argument("src")
@click.argument("dst", type=PathArg())
@click.option("--quantize", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="Bits a weight.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Weights that share a scale; default 64.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--dequantize", is_flag=True, help="Write float weights of a quantised SRC.")
@TRUST
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model folder.")
def convert(
    src: str, dst: Path, quantize: str | None, group_size: str | None, dtype: str, dequantize: bool, overwrite: bool
) -> None:
    """Write SRC (hub id, folder, .gguf, smollm2-135m) as an MLX folder DST.

    Example: mlxft convert smollm2-135m smollm2 --dtype float32
    """
    from mlxft.export.convert import convert as run

    reserve(dst)
    bits, groups = (int(given) if given else None for given in (quantize, group_size))
    run(src, dst, dtype=dtype, quantize=bits, group_size=groups, dequantize=dequantize, overwrite=overwrite)
    echo(f"wrote {dst}")
