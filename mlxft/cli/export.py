"""mlxft export."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "form", required=True, type=click.Choice(["gguf", "ollama"]), help="Of OUT.")
@click.option(
    "--type",
    "kind",
    default="f16",
    show_default=True,
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="Of the matrices.",
)
@click.option("--lora", is_flag=True, help="gguf: the adapter alone, for llama.cpp's --lora.")
@click.option("--model", help="The base, where the adapter does not say or it has moved.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is of this format.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def export(
    run: Path, out: Path, form: str, kind: str, lora: bool, model: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write RUN (or any model) as OUT, in the form that another program reads.

    gguf: one file with weights, tokenizer and chat template, for llama.cpp; ollama: a folder with such a file and a
    Modelfile.

    \b
    Example: mlxft export runs/quickstart quickstart.gguf --format gguf --type q8_0
             mlxft export runs/quickstart quickstart-ollama --format ollama
    """
    if lora and form != "gguf":
        raise click.UsageError(f"--lora is for --format gguf, not {form}")
    if form == "gguf":
        from mlxft.export.gguf import export_gguf

        said = export_gguf(run, out, kind=kind, lora=lora, model=model, overwrite=overwrite)
    else:
        from mlxft.export.ollama import export_ollama

        said = export_ollama(run, out, kind=kind, model=model, overwrite=overwrite)
    click.echo(
        json.dumps({"out": str(out), "format": form, "type": kind, "said": said}) if as_json else "\n".join(said)
    )
