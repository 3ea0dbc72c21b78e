"""Commands that export: fuse, convert, export, import, push."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from mlxft.cli import TRUST, PathArg, RunArg, reserve
from mlxft.text import echo, json_text, make_console

# --- ship -------------------------------------------------------------------------------------------------------------
# mlxft fuse, mlxft convert.


@click.command()
@click.argument(
    "paths", metavar="[RUN] OUT", nargs=-1, required=True, type=PathArg(), shell_complete=RunArg().shell_complete
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="RUN[:W]",
    help="Adapter to merge, with weight W (default: 1); can be given several times.",
)
@click.option("--model", help="Base model, if the adapter does not name it or it has moved.")
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the adaptation that must be kept; on a quantised base, the fewest bits that keep it are used.",
)
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="Quantise every fused layer to this many bits; with --recipe, every layer (default: 4).",
)
@click.option("--dequantize", is_flag=True, help="Write float weights, although the base is quantised.")
@click.option(
    "--recipe",
    type=click.Choice(["mixed", "awq", "gptq", "dwq"], case_sensitive=False),
    help="Quantise the whole fused model by one of mlx-lm's tools.",
)
@click.option(
    "--rows",
    metavar="FILE",
    help="File of rows that --recipe calibrates on, or train for the run's training rows (default: built-in text).",
)
@click.option(
    "--probe",
    metavar="FILE",
    help="File of rows to measure on, or valid for the recipe's validation rows (default: built-in text).",
)
@click.option("--force", is_flag=True, help="Write the model even if less than --keep is kept.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def fuse(
    paths: tuple[Path, ...],
    adapters: tuple[str, ...],
    model: str | None,
    keep: float,
    bits: str | None,
    dequantize: bool,
    recipe: str | None,
    rows: str | None,
    probe: str | None,
    force: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fuse RUN's adapter into its base and write the folder OUT, for mlx-lm, LM Studio and transformers.

    The share of the adaptation that is kept is measured; if it is below --keep, nothing is written.

    Example: mlxft fuse runs/quickstart fused

    Example: mlxft fuse merged --adapter runs/a:0.7 --adapter runs/b:0.3
    """
    if dequantize and bits:
        raise click.UsageError("give --dequantize or --bits, not both")
    if len(paths) > 2 or (len(paths) == 1 and not adapters):
        raise click.UsageError("give RUN and OUT, or OUT and at least one --adapter RUN")
    reserve(paths[-1])
    from rich.text import Text

    from mlxft.exports.fuse import LostTooMuch, parse_adapter
    from mlxft.exports.fuse import fuse_sources as fuse_run
    from mlxft.runs import named_run

    with make_console(stderr=True).status("loading") as status:
        try:
            fused = fuse_run(
                named_run(paths[0]) if len(paths) == 2 else None,
                paths[-1],
                adapters=[(named_run(path), weight) for path, weight in map(parse_adapter, adapters)],
                model=model,
                dequantize=dequantize,
                bits=int(bits) if bits else None,
                recipe=recipe,
                rows=rows,
                keep=keep,
                probe=probe,
                force=force,
                overwrite=overwrite,
                tell=lambda message: status.update(Text(message)),
            )
        except LostTooMuch as lost:
            if as_json:
                echo(json_text(lost.fused.to_json()))
            raise
    echo(json_text(fused.to_json()) if as_json else "\n".join(fused.lines()))


@click.command()
@click.argument("src", type=RunArg())
@click.argument("dst", type=PathArg())
@click.option(
    "--quantize", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="Quantise the weights to this many bits."
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Number of weights that share a quantisation scale (default: 64).",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the float weights.",
)
@click.option("--dequantize", is_flag=True, help="Write float weights, although SRC is quantised.")
@click.option("--measure", is_flag=True, help="Compare DST with SRC in float: KL a token, and the likeliest token.")
@click.option("--probe", metavar="FILE", help="File of rows to --measure on (default: built-in text).")
@TRUST
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model folder.")
def convert(
    src: str,
    dst: Path,
    quantize: str | None,
    group_size: str | None,
    dtype: str,
    dequantize: bool,
    measure: bool,
    probe: str | None,
    overwrite: bool,
) -> None:
    """Write the model SRC (hub id, folder, .gguf or smollm2-135m) as an MLX model folder DST.

    \b
    Example: mlxft convert smollm2-135m smollm2 --dtype float32
             mlxft convert model-q4_k_m.gguf model --quantize 4 --measure
    """
    from mlxft.exports.fuse import convert_model as run

    reserve(dst)
    bits, groups = (int(given) if given else None for given in (quantize, group_size))
    if probe and not measure:
        raise click.UsageError("--probe is for --measure; give that too")
    options: dict[str, Any] = {"dequantize": dequantize, "measure": measure, "probe": probe, "overwrite": overwrite}
    done = run(src, dst, dtype=dtype, quantize=bits, group_size=groups, **options)
    echo(f"wrote {dst}")
    if found := done.get("measured"):
        echo(f"measured on {found['tokens']:,} tokens ({found['source']}), against the model in float:")
        echo(f"KL a token {found['kl']:.3g}, same likeliest token {found['agreement']:.1%}")


# --- export -----------------------------------------------------------------------------------------------------------
# mlxft export, mlxft import.

_TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k"),
    *("iq4_nl", "iq4_xs", "q5_1", "q5_0", "q4_1", "q4_0"),
)


@click.command()
@click.argument("run", type=PathArg(run=True))
@click.argument("out", type=PathArg())
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["peft", "seq-cls", "gguf", "ollama"], case_sensitive=False),
    help="Format of OUT.",
)
@click.option(
    "--type",
    "kinds",
    multiple=True,
    type=click.Choice(_TYPES, case_sensitive=False),  # llama.cpp writes Q4_K_M
    help="With gguf and ollama: type of the matrices, by llama.cpp's quantiser below 8 bits; with gguf, can be given "
    "several times, for OUT-TYPE.gguf of each.  [default: f16]",
)
@click.option(
    "--imatrix",
    is_flag=False,
    flag_value="train",
    metavar="[FILE]",
    help="With gguf and ollama: round by an importance matrix of the run's training rows, or of the rows of FILE.",
)
@click.option("--measure", is_flag=True, help="With gguf and ollama: compare each file with the model in float.")
@click.option(
    "--probe",
    metavar="FILE",
    help="Rows to --measure on, or valid for the recipe's validation rows (default: built-in text).",
)
@click.option("--lora", is_flag=True, help="With gguf: write the adapter alone, for llama.cpp's --lora.")
@click.option("--model", help="Base model, if the adapter does not name it or it has moved.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it has this format.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def export(
    run: Path,
    out: Path,
    form: str,
    kinds: tuple[str, ...],
    imatrix: str | None,
    measure: bool,
    probe: str | None,
    lora: bool,
    model: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export RUN (or any model) to OUT, in a format that another program reads.

    peft is an adapter folder for PEFT, also of a reward model. seq-cls is a reward model as a merged sequence
    classification model for transformers. gguf is one file with weights, tokenizer and chat template, for llama.cpp.
    ollama is a folder with such a file and a Modelfile.

    \b
    Example: mlxft export runs/quickstart quickstart-peft --format peft
             mlxft export runs/reward reward-model --format seq-cls
             mlxft export runs/quickstart quickstart.gguf --format gguf --type q8_0
             mlxft export runs/quickstart small.gguf --format gguf --type q4_k_m --type q6_k --imatrix --measure
             mlxft export runs/quickstart quickstart-ollama --format ollama
    """
    if lora and form != "gguf":
        raise click.UsageError(f"--lora is for --format gguf, not {form}")
    options: dict[str, Any] = {"imatrix": imatrix, "measure": measure or None, "probe": probe}
    options = {name: given for name, given in options.items() if given is not None}
    if form not in ("gguf", "ollama") and (named := [*(["type"] if kinds else []), *options]):
        raise click.UsageError(f"--{named[0]} is for --format gguf and ollama, not {form}")
    if probe and not measure:
        raise click.UsageError("--probe is for --measure; give that too")
    reserve(out)
    from rich.text import Text

    from mlxft.api import export as write

    with make_console(stderr=True).status("loading") as status:
        if form in ("gguf", "ollama"):
            options["tell"] = lambda message: status.update(Text(message))
        options |= {"type": kinds or "f16", "lora": lora, "model": model, "overwrite": overwrite}
        lines = write(run, out, format=form, **options)  # type: ignore[arg-type]
    types = {"type": ",".join(dict.fromkeys(kinds)) or "f16"} if form in ("gguf", "ollama") else {}
    report = {"out": str(out), "format": form, **types, **getattr(lines, "figures", {}), "said": lines}
    echo(json_text(report) if as_json else "\n".join(lines))


@click.command("import")
@click.argument("peft", type=PathArg())
@click.argument("out", type=PathArg())
@click.option("--model", help="Base model, if the adapter does not name it or it has moved.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is an adapter folder.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def import_(peft: Path, out: Path, model: str | None, overwrite: bool, as_json: bool) -> None:
    """Convert the PEFT adapter in the folder PEFT (LoRA, rsLoRA or DoRA) to an adapter folder OUT for mlxft and mlx-lm.

    Example: mlxft import their-adapter adapter --model their-base
    """
    from mlxft.exports.peft import import_peft

    reserve(out)
    lines = import_peft(peft, out, model=model, overwrite=overwrite)
    echo(json_text({"out": str(out), "said": lines}) if as_json else "\n".join(lines))


# --- push -------------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("run", type=PathArg(run=True))
@click.argument("repo")
@click.option("--dry-run", is_flag=True, help="List the files and show the model card, but send nothing.")
@click.option("--public", is_flag=True, help="Create a public repository (default: private).")
@click.option("--update", is_flag=True, help="Add a commit to an existing repository; its model card is replaced.")
@click.option("--message", default="Upload by mlxft", show_default=True, help="Commit message on the hub.")
@click.option("--what", type=click.Choice(["adapter", "model"]), help="Refuse to push anything else.")
@click.option("--run", "of", type=PathArg(run=True), help="Run that a fused or exported folder came from.")
@click.option(
    "--licence", "--license", help="Licence of the base, as the hub names it (apache-2.0), if it is not known."
)
@click.option("--card", "own", type=PathArg(), help="README.md to use in place of the generated model card.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
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
    """Push RUN, or a folder that fuse or export wrote, to REPO (owner/name) on the Hugging Face hub.

    Weights, tokenizer, configuration and a model card are uploaded; checkpoints, data, metrics and samples are not.
    The token comes from HF_TOKEN or `hf auth login`.

    Example: mlxft push runs/quickstart ada/quickstart --dry-run
    """
    from mlxft.exports.hub import pack, upload
    from mlxft.study.plots import curves

    package = pack(run, repo, what=what, run=of, licence=licence, own_card=own, draw=curves)
    commit = None if dry_run else upload(package, public=public, update=update, message=message)
    sizes = package.sizes()
    if as_json:
        files = [{"path": name, "bytes": size} for name, size in sizes.items()]
        report = {"repo": repo, "url": package.url, "public": public, "files": files, "left_out": package.left_out}
        echo(json_text(report | {"notes": package.notes, "card": package.card, "commit": commit}, indent=2))
        return
    echo(f"{'would push' if dry_run else 'pushed'} to {package.url} ({'public' if public else 'private'})")
    for name, size in [*sizes.items(), ("total", sum(sizes.values()))]:
        echo(f"{_size(size):>12}  {name}")
    for line in ([f"not uploaded: {', '.join(package.left_out)}"] if package.left_out else []) + package.notes:
        echo(line)
    echo(f"\nREADME.md:\n\n{package.card}" if dry_run else f"commit: {commit}")


def _size(size: int) -> str:
    """Format a number of bytes."""
    return f"{size:,} B" if size < 1000 else f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
