"""mlxft sample."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mlxft.cli import PathArg, reserve
from mlxft.cli.use import sampling
from mlxft.text import echo, json_text, make_console


@click.command()
@click.argument("prompts")
@click.option("--n", default=8, show_default=True, type=click.IntRange(1, 10_000), help="Answers a prompt.")
@click.option(
    "--keep", default="best", show_default=True, help="best: one a prompt; all; above:X: those that score above X."
)
@click.option("--reward", metavar="RUN", help="Score by a reward run.")
@click.option("--function", metavar="FILE.py:NAME", help="Score by a function, as rewards.function in a recipe.")
@click.option("--cut-off", is_flag=True, help="Keep answers cut off at --max-tokens too, which SFT takes for whole.")
@click.option("--out", required=True, type=PathArg(dir_okay=False), help="Rows for SFT.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@sampling(temperature=1.0)
def sample(
    prompts: str,
    n: int,
    keep: str,
    reward: str | None,
    function: str | None,
    cut_off: bool,
    out: Path,
    overwrite: bool,
    as_json: bool,
    model: str,
    adapter: str | None,
    system: str | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Sample answers to the PROMPTS of a file, score them, and write the good ones to train on.

    OUT is of data.format: prompt-completion, each row with its score.

    \b
    Example: mlxft sample prompts.jsonl --model runs/sft --reward runs/reward-lora --out best.jsonl
             mlxft sample prompts.jsonl --model runs/sft --function rewards.py:score --keep above:0.5 --out good.jsonl
    """
    if (reward is None) == (function is None):
        raise click.UsageError("give --reward or --function, one of them: by it answers are scored")
    if n > 1 and options["temperature"] == 0:
        raise click.UsageError(f"--n {n} at temperature 0 would be {n} times the same; raise it")
    if os.path.exists(out) and Path(prompts).exists() and out.samefile(prompts):
        raise click.UsageError("--out is the file of prompts; choose another")
    from mlxft.model.sample import Sampling
    from mlxft.objectives.onpolicy.settings import RewardsSettings
    from mlxft.owned import check_file
    from mlxft.rundir import load
    from mlxft.study.best import Choice, choose, read_keep

    reserve(out)
    check_file(out, overwrite)
    choice = Choice(
        n, read_keep(keep, n), cut_off, Sampling(**options), RewardsSettings(adapter=reward, function=function)
    )
    done = choose(
        prompts, load(model, adapter), choice, out, seed=seed, system=system, console=make_console(stderr=True)
    )
    echo(json_text(done.to_json()) if as_json else str(done))
