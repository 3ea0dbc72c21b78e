"""Run `mlxft demo`: completions before and after training, fuse, and one completion of the fused model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxft.build import load_base
from mlxft.config import load_config, override
from mlxft.exports.fuse import fuse_sources
from mlxft.files import check_replaceable, claim, hold
from mlxft.model.load import Loaded
from mlxft.model.sampling import Sampling, complete
from mlxft.run import train
from mlxft.runs import load_run
from mlxft.text import parse_json

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Question:
    """A question and strings, in lower case; a correct completion contains one of them."""

    question: str
    expect: list[str]

    def is_right(self, completion: str) -> bool:
        """Return whether the completion states the fact."""
        return any(e.lower() in completion.lower() for e in self.expect)


def _completions(loaded: Loaded, asked: Sequence[Question]) -> list[str]:
    line = Sampling(40, temperature=0.0, stop=("\n",))
    return [complete(loaded.model, loaded.tokenizer, q.question, line).strip() for q in asked]


def walk(folder: Path, overrides: Sequence[str], console: Console) -> int:
    """Run the whole demo below `folder`, and return how many held-out questions are right after training.

    Raises:
        ConfigError: `folder` holds files that no demo made.
    """
    check_replaceable(folder, "demo")
    with hold(folder):
        claim(folder, "demo")
        return _walk(folder, overrides, console)


def _walk(folder: Path, overrides: Sequence[str], console: Console) -> int:
    lines = (_HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [Question(**parse_json(line)) for line in lines]  # no training row is phrased like them
    places = [
        override("data.train", _HERE / "rows.jsonl"),
        override("data.valid", _HERE / "valid.jsonl"),
        override("run.dir", folder),
        "run.name=run",
    ]
    config = load_config(_HERE / "recipe.yaml", [*places, *overrides])
    console.rule("Before: what the model says about a company that it has never heard of")
    before = _completions(load_base(config), asked)
    for q, completion in zip(asked, before):
        console.print(Text.assemble((q.question, "bold"), f"\n  {completion}"))
    console.rule("Training")
    run = train(config, overwrite=True, console=console)
    console.rule("After: questions that are phrased differently from the rows it learned from")
    after = _completions(load_run(run.dir), asked)
    table = Table("question", "before", "after", "")
    for q, old, new in zip(asked, before, after):
        old = shorten(old, 100, placeholder=" ...")  # an untrained model rambles
        table.add_row(q.question, old, new, Text("right", "green") if q.is_right(new) else Text("wrong", "red"))
    console.print(table)
    right = sum(q.is_right(a) for q, a in zip(asked, after))
    console.print(f"right before: {sum(q.is_right(a) for q, a in zip(asked, before))} of {len(asked)}")
    console.print(f"right after:  {right} of {len(asked)}")
    console.rule("Fusing")
    fused = folder / "fused"
    for line in fuse_sources(run.dir, fused, probe="valid", overwrite=True, force=True).lines():
        console.print(line, highlight=False)
    command = ["mlxft", "generate", "--model", str(fused), asked[0].question]
    console.print(Text(f"$ {' '.join(command[:-1])} {command[-1]!r}", style="bold"))
    subprocess.run([sys.executable, "-m", "mlxft", *command[1:]], check=True)
    console.print(f"Talk with it: mlxft chat --model {fused}", highlight=False)
    return right
