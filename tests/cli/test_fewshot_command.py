"""mlxft fewshot as a command: its table, its JSON and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., Any]


def rows(path: Path, start: int, count: int) -> str:
    said = [{"prompt": f"{i} the", "completion": ("on", "in")[i % 2]} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in said), "utf-8")
    return path.name


def test_a_table_and_its_json(write: Command, shell: Command, mlxft: Command, tmp_path: Path) -> None:
    train, test = rows(tmp_path / "t.jsonl", 0, 12), rows(tmp_path / "e.jsonl", 50, 6)
    recipe = write(**{"data.train": train, "data.format": "prompt-completion", "run.steps": 2})
    asked = ("fewshot", recipe, "--test", test, "--k", "0,2,all", "--seeds", "1")
    done = shell(*asked)
    assert done.code == 0, done.err
    for said in ("zero-shot", "in context", "2 a label", "both", "over 6 rows", "a-fewshot"):
        assert said in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines()[:6])
    found = json.loads(mlxft(*asked, "--json").out)
    assert [(line["method"], line["k"]) for line in found["table"]] == [
        ("zero-shot", 0),
        ("in context", 2),
        ("tuned", 2),
        ("tuned", "all"),
        ("both", 2),
    ]
    assert found["metric"] == "accuracy"
    assert all(line["low"] <= line["value"] <= line["high"] for line in found["table"])
    assert found == json.loads((tmp_path / "runs/a-fewshot/fewshot.json").read_text("utf-8"))


def test_refusals_leave_everything_as_it_was(write: Command, refused: Command, tmp_path: Path) -> None:
    train, test = rows(tmp_path / "t.jsonl", 0, 12), rows(tmp_path / "e.jsonl", 50, 6)
    recipe = write(**{"data.train": train, "data.format": "prompt-completion"})
    assert "not a number of examples" in refused(2, "fewshot", recipe, "--test", test, "--k", "few")
    assert "12 rows" in refused(2, "fewshot", recipe, "--test", test, "--in-context", "13")
    assert "only 6 of" in refused(2, "fewshot", recipe, "--test", test, "--tuned", "7")
    assert "Missing option '--test'" in refused(2, "fewshot", recipe)
    wrong = tmp_path / "w.jsonl"
    wrong.write_text('{"prompt": "1 the", "completion": "off"}\n', "utf-8")
    assert "w.jsonl:1: " in refused(1, "fewshot", recipe, "--test", "w.jsonl", "--k", "1")
