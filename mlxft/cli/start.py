"""Commands to start with: init."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlxft.cli import PathArg
from mlxft.text import echo


@click.command()
@click.argument("data", nargs=-1, metavar="[DATA]")
@click.option("--from", "theirs", type=PathArg(dir_okay=False), help="Configuration of another tool.")
@click.option("--objective", help="Objective (default: the one that takes the rows).")
@click.option(
    "--model", help="Base: a hub id, folder, .gguf file or smollm2-135m (default: proposed for this machine)."
)
@click.option(
    "--method",
    type=click.Choice(["lora", "qlora", "dora", "full"], case_sensitive=False),
    help="Method (default: by the base).",
)
@click.option("--valid", help="Validation rows: a share such as 0.1, a file, or 0 for none (default: by the rows).")
@click.option("--out", type=PathArg(dir_okay=False), default="mlxft.yaml", show_default=True, help="Recipe to write.")
@click.option("--overwrite", is_flag=True, help="Replace the recipe if it exists.")
@click.option("--yes", "-y", is_flag=True, help="Ask nothing, and take what is proposed.")
def init(data: tuple[str, ...], theirs: Path | None, out: Path, overwrite: bool, yes: bool, **chosen: Any) -> None:
    """Look at the rows in DATA and write a recipe for them, with the reason for each setting.

    In a terminal it asks what it proposes; elsewhere, and with --yes, it takes that. Nothing is downloaded.
    With --from it turns a configuration of mlx_lm.lora, TRL, Axolotl or LLaMA-Factory (YAML or JSON) into a recipe.

    \b
    Example: mlxft init faq.xlsx
             mlxft init rows.jsonl --model smollm2-135m --valid 0.1 --yes
             mlxft init --from lora_config.yaml
    """
    from mlxft.errors import ConfigError

    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists already; --overwrite replaces it, --out writes another file")
    if theirs is not None:
        if data or any(chosen.values()):
            raise click.UsageError("--from takes everything from that file; change the recipe afterwards")
        _convert(theirs, out)
        return
    asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    if not data and asks:
        data = (click.prompt("File, folder or hub data set (hf:org/name) with your rows"),)
    if not data:
        raise click.UsageError("give DATA, the file with your rows; or --from FILE")
    if len(data) > 1:
        raise click.UsageError("give one DATA; several files are named by a pattern in quotes: 'rows/*.csv'")
    _propose(data[0], out, asks, **chosen)


def _convert(theirs: Path, out: Path) -> None:
    from mlxft.files import write_text
    from mlxft.study.start import convert_recipe

    made = convert_recipe(theirs)
    head = [f"Made from {theirs.name}, a configuration of {made.tool}.", *(f"left out: {line}" for line in made.left)]
    write_text(out, made.plan().text(head))
    echo(f"taken over from {made.tool}:\n" + "\n".join(f"  {line}" for line in made.taken))
    if made.left:
        echo("left out:\n" + "\n".join(f"  {line}" for line in made.left))
    _next(out)


def _propose(
    data: str,
    out: Path,
    asks: bool,
    objective: str | None,
    model: str | None,
    method: str | None,
    valid: str | None,
) -> None:
    from mlxft.config import parse_config
    from mlxft.data.formats import TAKEN_BY
    from mlxft.files import write_text
    from mlxft.runs import prompt_argument
    from mlxft.study.start import ProposedBase, bases, look, propose

    seen = look(data)
    echo("\n".join(seen.lines()))
    offered = bases()
    if model is not None:
        base = next((each for each in offered if each.name == model), ProposedBase(model, "lora", "chosen"))
    else:
        here = [each for each in offered if "installed" in each.why]
        if asks and offered:
            echo("\nBases that fit this machine (mlxft models lists more):")
            for i, each in enumerate(offered, 1):
                echo(f"  {i}. {each.name}: {each.why}{' (4 bits)' if each.method == 'qlora' else ''}")
            base = offered[click.prompt("Base", type=click.IntRange(1, len(offered)), default=1) - 1]
        elif here or offered:  # nothing is downloaded that was not chosen
            base = (here or offered)[0]
            larger = next((each for each in offered if each.name != base.name), None)
            if here and larger:
                echo(f"base: {base.name}, which is installed. Larger: --model {larger.name} ({larger.why})")
        else:
            raise click.UsageError("no base is known to fit this machine; give one: --model MODEL")
    if asks and objective is None:
        objective = click.prompt("Objective", default=TAKEN_BY[seen.format][0].partition(",")[0])
    share: float | str | None = None
    if asks and valid is None and not seen.valid:
        default = propose(seen, base).plain()["data"].get("valid", 0)
        valid = str(click.prompt("Share of the rows to hold out for validation (0: none)", default=default))
    if valid is not None:
        try:
            share = float(valid)
        except ValueError:
            share = valid
    plan = propose(seen, base, objective=objective, method=method, valid=share)
    parse_config(plan.plain(), str(out), out.stem)
    head = ["Written by mlxft init; change what you like. All settings: docs/settings.md, or mlxft schema."]
    write_text(out, plan.text([*head, *seen.lines()]))
    for key, (value, why) in plan.settings.items():
        echo(f"  {key}: {value}" + (f"   # {why}" if why else ""))
    _next(out, prompt_argument(seen.prompts, "run.sample_prompts" in plan.settings))


def _next(out: Path, asked: str = "'a prompt'") -> None:
    recipe = "" if str(out) == "mlxft.yaml" else f" {out}"
    compare = f"mlxft compare {asked}".rstrip()
    echo(f"\nwrote {out}; next:\n  mlxft check{recipe}\n  mlxft train{recipe}\n  {compare}")
