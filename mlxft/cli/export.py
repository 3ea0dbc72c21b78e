"""mlxft export, mlxft import."""

from __future__ import annotations

from pathlib import Path

import click

from mlxft.cli import TRUST, PathArg, reserve
from mlxft.text import echo, json_text


@click.command()
@click.argument("run", type=PathArg())
@click.argument("out", type=PathArg())
@click.option(
    "--format", "form", required=True, type=click.Choice(["peft", "seq-cls", "gguf", "ollama"]), help="Of OUT."
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="gguf, ollama: of the matrices.  [default: f16]",
)
@click.option("--lora", is_flag=True, help="gguf: the adapter alone, for llama.cpp's --lora.")
@click.option("--model", help="The base, where the adapter does not say or it has moved.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is of this format.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def export(
    run: Path, out: Path, form: str, kind: str | None, lora: bool, model: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write RUN (or any model) as OUT, in the form that another program reads.

    peft: an adapter's folder for PEFT, of a reward model too; seq-cls: a reward model as transformers' model for
    sequence classification, merged; gguf: one file with weights, tokenizer and chat template, for llama.cpp; ollama:
    a folder with such a file and a Modelfile.

    \b
    Example: mlxft export runs/quickstart quickstart-peft --format peft
             mlxft export runs/reward reward-model --format seq-cls
             mlxft export runs/quickstart quickstart.gguf --format gguf --type q8_0
             mlxft export runs/quickstart quickstart-ollama --format ollama
    """
    if lora and form != "gguf":
        raise click.UsageError(f"--lora is for --format gguf, not {form}")
    if kind and form not in ("gguf", "ollama"):
        raise click.UsageError(f"--type is for --format gguf and ollama, not {form}")
    reserve(out)
    if form == "peft":
        from mlxft.export.peft import export_peft

        said = export_peft(run, out, model=model, overwrite=overwrite)
    elif form == "seq-cls":
        from mlxft.export.seqcls import export_seqcls

        said = export_seqcls(run, out, model=model, overwrite=overwrite)
    elif form == "gguf":
        from mlxft.export.gguf import export_gguf

        said = export_gguf(run, out, kind=kind or "f16", lora=lora, model=model, overwrite=overwrite)
    else:
        from mlxft.export.ollama import export_ollama

        said = export_ollama(run, out, kind=kind or "f16", model=model, overwrite=overwrite)
    types = {"type": kind or "f16"} if form in ("gguf", "ollama") else {}
    told = {"out": str(out), "format": form, **types, "said": said}
    echo(json_text(told) if as_json else "\n".join(said))


@click.command("import")
@click.argument("peft", type=PathArg())
@click.argument("out", type=PathArg())
@click.option("--model", help="The base, where the adapter does not say or it has moved.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is an adapter's folder.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def import_(peft: Path, out: Path, model: str | None, overwrite: bool, as_json: bool) -> None:
    """Read the PEFT adapter in the folder PEFT (LoRA, rsLoRA, DoRA) and write it as OUT, for mlxft and mlx-lm.

    Example: mlxft import their-adapter adapter --model their-base
    """
    from mlxft.export.peft_in import import_peft

    reserve(out)
    said = import_peft(peft, out, model=model, overwrite=overwrite)
    echo(json_text({"out": str(out), "said": said}) if as_json else "\n".join(said))
