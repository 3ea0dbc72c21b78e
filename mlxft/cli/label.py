"""mlxft label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlxft.cli import TRUST, PathArg, reserve
from mlxft.text import echo, json_text, make_console


@click.command()
@click.argument("files", nargs=-1, metavar="[PROMPTS]")
@click.option("--recipe", type=PathArg(), help="File with these settings; options beat it.")
@click.option("--model", help="Run, adapter or fused folder, hub id, .gguf or smollm2-135m that answers.")
@click.option("--adapter", help="Adapter folder or run to put on the model.")
@click.option("--against", help="Another model or run: one answer from each, and the win rate at the end.")
@click.option("--n", default=2, show_default=True, type=click.IntRange(2, 9), help="Answers a prompt.")
@click.option("--out", type=PathArg(), help="Judgements, a line each; gone on with if it exists.")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(1, 10**6))
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the answers and their order.")
@click.option("--agreement", is_flag=True, help="Compare two labellers' files instead: Cohen's kappa.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def label(
    context: click.Context,
    /,
    files: tuple[str, ...],
    recipe: Path | None,
    agreement: bool,
    as_json: bool,
    **source: Any,
) -> None:
    """Judge answers to the PROMPTS of a file by hand, blind; OUT is then a file of data.format: preference.

    Rows are {"prompt": ...}; those with "answers", or "chosen" and "rejected", are judged as they are, without a model.

    \b
    Example: mlxft label prompts.jsonl --model runs/sft --out pairs.jsonl
             mlxft label --recipe configs/label.yaml --model runs/sft
             mlxft label --agreement ann.jsonl ben.jsonl
    """
    typed = click.core.ParameterSource.COMMANDLINE
    given = {name for name in context.params if context.get_parameter_source(name) == typed}
    if agreement:
        if len(files) != 2 or given - {"files", "agreement", "as_json"}:
            raise click.UsageError("--agreement takes two files of judgements, and nothing else")
        from mlxft.study.judgements import agreement as compare

        found = compare(Path(files[0]), Path(files[1]))
        echo(json_text(found._asdict()) if as_json else str(found))
        return
    if recipe is not None:
        files, source = _with_recipe(recipe, files, source, given)
    if source["model"] is None and (unused := sorted(given & {"n", "max_tokens", "temperature"})):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise click.UsageError(f"{names}: without --model no answers are sampled; name one, or leave it out")
    out = source.pop("out")
    if len(files) != 1 or out is None:
        raise click.UsageError("give one file of prompts, and --out; on the command line or in a --recipe")
    reserve(out)
    from mlxft.model.sample import Sampling
    from mlxft.study.label import Source
    from mlxft.study.label import label as judge

    how = Sampling(source.pop("max_tokens"), source.pop("temperature"))
    done = judge(files[0], out, Source(how, **source), make_console(stderr=as_json))
    win = done.win_rate
    if as_json:
        rate = None if win is None else {**win._asdict(), "rate": win.rate, "interval": win.interval}
        echo(json_text({**done._asdict(), "win_rate": rate}))
        return
    echo(f"{done.judged} of {done.total} prompts judged, {done.skipped} skipped: {out}")
    if win is not None:
        echo(str(win))


def _with_recipe(
    recipe: Path, files: tuple[str, ...], source: dict[str, Any], given: set[str]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What the command line gives, and for the rest what the recipe does."""
    from mlxft.study.label_recipe import read_label_recipe

    settings = read_label_recipe(recipe)
    prompts = settings.pop("prompts", None)
    source |= {k: v for k, v in settings.items() if k not in given}
    return files or (() if prompts is None else (prompts,)), source
