"""mlxft score."""

from __future__ import annotations

import click

from mlxft.cli import TRUST
from mlxft.text import echo, json_text, make_console


@click.command()
@click.argument("run")
@click.argument("file")
@click.option("--tokens", default=4096, show_default=True, type=click.IntRange(1), help="Of a batch, with padding.")
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a row, and a last one with the summary.")
def score(run: str, file: str, tokens: int, as_json: bool) -> None:
    """Score the answers in FILE with the reward model of RUN.

    A row is messages, or prompt and completion: one score; chosen and rejected: both; prompt and answers: a ranking.

    Example: mlxft score runs/reward-lora test.jsonl
    """
    from mlxft.study.score import score as run_score
    from mlxft.study.score import summarise, tables

    rows = run_score(run, file, make_console(stderr=True), tokens=tokens)
    for row in rows:
        echo(json_text(row.to_json()) if as_json else str(row))
    summary = summarise(rows)
    if as_json:
        echo(json_text({"summary": summary}))
        return
    for line in tables(summary):
        echo(line)
    plain = {k: v for k, v in summary.items() if isinstance(v, int | float)}
    echo(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in plain.items()))
