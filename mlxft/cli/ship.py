"""mlxft fuse, mlxft convert."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", help="The base, where the adapter does not say or it has moved.")
@click.option("--dequantize", is_flag=True, help="Write float weights of a quantised base.")
@click.option("--bits", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="Requantise the fused layers so.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder.")
def fuse(run: Path, out: Path, model: str | None, dequantize: bool, bits: str | None, overwrite: bool) -> None:
    """Fuse RUN's adapter into its base and write the folder OUT, for mlx-lm, LM Studio and transformers.

    Example: mlxft fuse runs/quickstart fused
    """
    if dequantize and bits:
        raise click.UsageError("give --dequantize or --bits, not both")
    from mlxft.export.fuse import fuse as fuse_run

    for line in fuse_run(
        run, out, model=model, dequantize=dequantize, bits=int(bits) if bits else None, overwrite=overwrite
    ):
        click.echo(line)


@click.command()
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--quantize", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="Bits a weight.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Weights that share a scale; default 64.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--dequantize", is_flag=True, help="Write float weights of a quantised SRC.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model folder.")
def convert(
    src: str, dst: Path, quantize: str | None, group_size: str | None, dtype: str, dequantize: bool, overwrite: bool
) -> None:
    """Write SRC (hub id, folder, .gguf, smollm2-135m) as an MLX folder DST.

    Example: mlxft convert smollm2-135m smollm2 --dtype float32
    """
    from mlxft.export.convert import convert as run

    bits, groups = (int(given) if given else None for given in (quantize, group_size))
    run(src, dst, dtype=dtype, quantize=bits, group_size=groups, dequantize=dequantize, overwrite=overwrite)
    click.echo(f"wrote {dst}")
