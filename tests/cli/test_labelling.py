"""mlxft label: what it prints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two prompts with the answers of two models, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"q{i}", "answers": [f"a{i}", f"b{i}"], "models": ["A", "B"]} for i in range(2)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return "p.jsonl"


def test_label_and_agreement(prompts: str, mlxft: Command) -> None:
    done = mlxft("label", prompts, "--out", "ann.jsonl", stdin="t\nt\n")
    assert (done.code, done.err) == (0, "")
    # Two ties: a half, and Wilson's 1.96 sqrt(0.25/2 + 3.8415/16) / (1 + 3.8415/2) = 0.4054 around it.
    assert done.out.endswith(
        "2 of 2 prompts judged, 0 skipped: ann.jsonl\n"
        "A wins 50.0% against B (95 % interval 9.5% to 90.5%; 0 won, 0 lost, 2 tied)\n"
    )
    done = mlxft("label", prompts, "--out", "ben.jsonl", "--json", stdin="t\ns\n")
    result = json.loads(done.out)
    assert (result["judged"], result["skipped"], result["total"]) == (1, 1, 2)
    assert (result["win_rate"]["rate"], result["win_rate"]["ties"]) == (0.5, 1)
    found = mlxft("label", "--agreement", "ann.jsonl", "ben.jsonl", "--json")
    assert json.loads(found.out) == {"n": 1, "observed": 1.0, "kappa": None}
    found = mlxft("label", "--agreement", "ann.jsonl", "ben.jsonl")
    assert found.out.endswith("100.0% of 1 shared prompts judged alike\n")


def test_wrong_use_of_label(prompts: str, refused: Callable[..., str]) -> None:
    Path("bare.jsonl").write_text('{"prompt": "x"}\n', "utf-8")
    assert "--out" in refused(2, "label", prompts)
    assert "two files" in refused(2, "label", "--agreement", prompts)
    assert "two files" in refused(2, "label", "--agreement", prompts, prompts, "--out", "o.jsonl")
    assert "no such file" in refused(2, "label", "q.jsonl", "--out", "o.jsonl")
    assert "name a --model" in refused(2, "label", "bare.jsonl", "--out", "o.jsonl")
    assert "nowhere" in refused(1, "label", "bare.jsonl", "--out", "o.jsonl", "--model", "./nowhere")
    assert "p.jsonl:1: not a line that mlxft label wrote" in refused(
        1, "label", "bare.jsonl", "--out", prompts, "--model", "x"
    )
    assert "can not write" in refused(2, "label", prompts, "--out", ".")
