"""mlxft label: what it prints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.model.sampling import Sampling
from mlxft.study.label import LabelSource, LabelSummary

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


def test_a_recipe_gives_the_options_and_the_command_line_beats_it(
    prompts: str, mlxft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def judge(spec: str, out: Path, source: LabelSource, console: Any) -> LabelSummary:
        seen.append((spec, str(out), source))
        return LabelSummary(0, 0, 0, None)

    monkeypatch.setattr("mlxft.study.label.label", judge)
    text = "prompts: p.jsonl\nout: ann.jsonl\nmodel: m\nadapter: a\nn: 3\nmax_tokens: 7\ntemperature: 0.5\nseed: 9\n"
    Path("label.yaml").write_text(text, "utf-8")
    assert mlxft("label", "--recipe", "label.yaml").code == 0
    assert seen.pop() == ("p.jsonl", "ann.jsonl", LabelSource(Sampling(7, 0.5), "m", "a", None, 3, 9))
    # 512 and 2 are the defaults: given, they count all the same.
    given = ("--out", "o.jsonl", "--n", "2", "--max-tokens", "512", "--model", "other")
    assert mlxft("label", "q.jsonl", "--recipe", "label.yaml", *given).code == 0
    assert seen.pop() == ("q.jsonl", "o.jsonl", LabelSource(Sampling(512, 0.5), "other", "a", None, 2, 9))
    Path("label.yaml").write_text("model: m\nagainst: w\n", "utf-8")
    assert mlxft("label", prompts, "--recipe", "label.yaml", "--out", "o.jsonl").code == 0
    assert seen.pop() == (prompts, "o.jsonl", LabelSource(Sampling(512, 1.0), "m", None, "w", 2, 0))


def test_a_sitting_by_recipe(prompts: str, mlxft: Command) -> None:
    Path("label.yaml").write_text("prompts: p.jsonl\nout: ann.jsonl\n", "utf-8")
    done = mlxft("label", "--recipe", "label.yaml", stdin="t\nt\n")
    assert (done.code, done.err) == (0, "")
    assert len(Path("ann.jsonl").read_text("utf-8").splitlines()) == 2


def test_what_is_wrong_with_a_recipe_of_label(prompts: str, refused: Callable[..., str]) -> None:
    recipe = Path("label.yaml")
    recipe.write_text("modle: m\nn: 12\nout: o.jsonl\n", "utf-8")
    said = refused(2, "label", prompts, "--recipe", "label.yaml")
    assert "label.yaml: modle: no such setting (did you mean model?)" in said
    assert "label.yaml: n: input should be less than or equal to 9; seen 12" in said
    recipe.write_text("out: o.jsonl\n", "utf-8")
    assert "give one file of prompts" in refused(2, "label", "--recipe", "label.yaml")
    assert "--agreement takes two files" in refused(2, "label", "--agreement", "a", "b", "--recipe", "label.yaml")
    recipe.write_text("objective: sft\n", "utf-8")
    assert "a recipe for mlxft train" in refused(2, "label", prompts, "--recipe", "label.yaml")
    recipe.write_text("- x\n", "utf-8")
    assert "expected a mapping of settings, found list" in refused(2, "label", prompts, "--recipe", "label.yaml")
    assert "cannot read the recipe" in refused(2, "label", prompts, "--recipe", "nowhere.yaml")


def test_wrong_use_of_label(prompts: str, refused: Callable[..., str]) -> None:
    Path("bare.jsonl").write_text('{"prompt": "x"}\n', "utf-8")
    assert "--out" in refused(2, "label", prompts)
    assert "two files" in refused(2, "label", "--agreement", prompts)
    for more in (("--out", "o.jsonl"), ("--adapter", "a"), ("--seed", "1")):
        assert "two files" in refused(2, "label", "--agreement", prompts, prompts, *more)
    said = refused(2, "label", prompts, "--out", "o.jsonl", "--max-tokens", "5", "--n", "2")
    assert "--max-tokens, --n: without --model" in said
    assert "no such file" in refused(2, "label", "q.jsonl", "--out", "o.jsonl")
    assert "name a --model" in refused(2, "label", "bare.jsonl", "--out", "o.jsonl")
    assert "nowhere" in refused(1, "label", "bare.jsonl", "--out", "o.jsonl", "--model", "./nowhere")
    assert "p.jsonl:1: not a line that mlxft label wrote" in refused(
        1, "label", "bare.jsonl", "--out", prompts, "--model", "x"
    )
    assert "cannot write" in refused(2, "label", prompts, "--out", ".")
