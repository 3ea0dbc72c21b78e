"""mlxft fewshot."""

from __future__ import annotations

from pathlib import Path

import click

from mlxft.cli import PathArg
from mlxft.text import echo, json_text, make_console


@click.command()
@click.argument("recipe", type=PathArg())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--test", required=True, metavar="FILE", help="The rows that are evaluated; never trained on or shown.")
@click.option("--k", "ks", metavar="K,K,...", help="Numbers of examples for every method; default 0,1,4,16.")
@click.option("--in-context", metavar="K,K,...", help="Those shown in the prompt, where they differ from --k.")
@click.option("--tuned", metavar="K,K,...", help="Those trained on, of each label; all is every row.")
@click.option("--both", metavar="K,K,...", help="Those trained on and shown.")
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(1, 1000), help="Draws of examples; all: once."
)
@click.option("--task", metavar="TASK", help="As for mlxft eval; default: as the recipe's rows ask and answer.")
@click.option("--limit", type=click.IntRange(1), help="Evaluate only the first rows.")
@click.option(
    "--least-steps",
    default=30,
    show_default=True,
    type=click.IntRange(1),
    help="Of training, where the recipe's epochs over few rows give less.",
)
@click.option(
    "--overflow",
    type=click.Choice(["error", "drop"]),
    default="error",
    show_default=True,
    help="What becomes of rows that do not fit the context behind their examples; drop counts them.",
)
@click.option("--out", type=PathArg(file_okay=False), help="Default: the run's folder and -fewshot.")
@click.option("--overwrite", is_flag=True, help="Replace another study in that folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def fewshot(
    recipe: Path,
    overrides: tuple[str, ...],
    test: str,
    ks: str | None,
    in_context: str | None,
    tuned: str | None,
    both: str | None,
    seeds: int,
    task: str | None,
    limit: int | None,
    least_steps: int,
    overflow: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """What a few examples bring: shown in the prompt, trained on by RECIPE, and both, next to none.

    Without --k, only the methods that are given are run, beside zero-shot. Started again, it goes on where it was
    stopped.

    \b
    Example: mlxft fewshot configs/fewshot-reviews.yaml --k 0,1,4,16,all --test test.jsonl
             mlxft fewshot configs/fewshot-reviews.yaml --in-context 4 --tuned 16,all --test test.jsonl
    """
    from mlxft.study.fewshot import Plan
    from mlxft.study.fewshot import fewshot as run
    from mlxft.study.fewshot_tables import draw, read_ks, show

    given = {"in_context": in_context, "tuned": tuned, "both": both}
    numbers = read_ks(ks, given)
    plan = Plan(test, *numbers, seeds, limit, task, least_steps, overflow)
    study = run(recipe, overrides, plan, out=out, overwrite=overwrite, console=make_console(stderr=True))
    said = draw(study)
    if as_json:
        echo(json_text(study.to_json()))
        return
    show(make_console(), study)
    echo(said)
