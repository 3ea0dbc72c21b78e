"""A recipe without sizes is sized to its rows, a run that can hardly learn is noted, and numbers say what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft import build
from mlxft.build import base_notes, rate_notes
from mlxft.config import load_config, parse_config
from mlxft.demo import walk
from mlxft.model.load import resolve
from mlxft.text import VALUE, validation_figure

Command = Callable[..., Any]
OPEN: dict[str, Any] = {"batch": {}, "run.steps": None}


def numbers(mlxft: Command, *args: str) -> dict[str, Any]:
    done = mlxft("check", *args, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_sizes_follow_the_rows_and_what_is_given_wins(write: Command, mlxft: Command) -> None:
    few, many = numbers(mlxft, write(rows=120, **OPEN)), numbers(mlxft, write(rows=600, **OPEN))
    for found in (few, many):
        assert 200 <= found["steps"] <= 200 + found["steps_per_epoch"]
        assert any("sizes by the rows: batch.tokens" in note for note in found["notes"])
    assert 64 <= many["steps_per_epoch"] <= 100  # a batch is rarely full
    given = numbers(mlxft, write(rows=120, **OPEN), "batch.tokens=100000", "run.epochs=3")
    assert (given["steps_per_epoch"], given["steps"]) == (2, 6)
    halved = numbers(mlxft, write(rows=600, **OPEN), "batch.accumulate=2")
    assert halved["steps_per_epoch"] < many["steps_per_epoch"] // 2 + 32


def test_sizes_are_recorded_and_a_resumed_run_keeps_them(write: Command, mlxft: Command, tmp_path: Path) -> None:
    recipe = write(rows=3, **OPEN)
    assert mlxft("train", recipe).code == 0
    file = tmp_path / "runs/a/config.yaml"
    stored = yaml.safe_load(file.read_text("utf-8"))
    assert (stored["batch"]["tokens"], stored["run"]["epochs"]) == (256, 20.0)
    assert mlxft("train", recipe, "--resume").code == 0
    # A run of an older version recorded no sizes: it had one epoch of 2,048 tokens a batch, and keeps them.
    stored["batch"]["tokens"] = stored["run"]["epochs"] = None
    file.write_text(yaml.safe_dump(stored), "utf-8")
    old = parse_config(stored).begun
    assert (old.batch.tokens, old.run.epochs) == (2048, 1.0)
    said = mlxft("train", recipe, "--resume").out
    assert "the run is already complete" in said
    assert yaml.safe_load(file.read_text("utf-8"))["batch"]["tokens"] == 2048


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["run.steps=3", "optim.lr=2e-4"], "3 steps are few to learn from: set run.steps=200"),
        (["run.steps=15", "optim.lr=1e-3"], "15 steps are few to learn from: set run.steps=40"),
        (["run.epochs=1", "run.steps=null", "optim.lr=2e-4"], "run.epochs=40"),
        (["optim.lr=0.02"], "optim.lr 0.02 is 100 times the usual rate of sft by lora: set optim.lr=0.0002"),
        (["optim.lr=2e-5"], "optim.lr 2e-05 is 1/10 of the usual rate"),
    ],
)
def test_what_can_hardly_learn_is_noted_with_a_value(
    settings: list[str], said: str, write: Command, mlxft: Command
) -> None:
    found = mlxft("check", write(), *settings)
    assert (found.code, said in found.out) == (0, True), found.out
    assert "usual rate" not in mlxft("check", write(), "optim.lr=1e-3").out


def test_the_demo_takes_its_own_advice(mlxft: Command, tiny_model_dir: Path) -> None:
    """Few steps at five times the usual rate: as many as it takes to learn its rows."""
    demo = Path(walk.__file__).parent
    found = numbers(
        mlxft, str(demo / "recipe.yaml"), f"model.path={tiny_model_dir}", f"data.train={demo / 'rows.jsonl'}"
    )
    assert found["steps"] < 100
    assert not any("few to learn from" in note for note in found["notes"])


def test_no_recipe_of_ours_has_a_rate_that_is_noted() -> None:
    for recipe in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        if "model" in (yaml.safe_load(recipe.read_text("utf-8")) or {}) and recipe.stem not in ("label", "sweep"):
            assert rate_notes(load_config(recipe)) == [], recipe


def pairs(tmp_path: Path) -> None:
    words = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they"]
    rows = [
        {"prompt": " ".join(words[i : i + 3]), "chosen": words[i % 7], "rejected": f"{words[7 + i % 6]} {words[i]}"}
        for i in range(10)
    ]
    for name, part in (("pairs", rows), ("held", rows[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part), "utf-8")


@pytest.mark.parametrize("kind", ["dpo", "ipo", "reward"])
def test_held_out_pairs_are_measured_as_validation_does(
    kind: str, write: Command, mlxft: Command, tmp_path: Path
) -> None:
    pairs(tmp_path)
    own: dict[str, Any] = {"preference": {"loss": kind}} if kind != "reward" else {}
    changes = {"data.train": "pairs.jsonl", "data.valid": "held.jsonl", "data.format": "preference", "run.dir": "runs"}
    recipe = write(objective="preference" if own else "reward", **own, **changes)
    assert mlxft("train", recipe).code == 0
    events = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text("utf-8").splitlines()]
    (kept,) = [e for e in events if e["event"] == "eval" and e["best"]][-1:]
    against = ["--against", "base"] if own else []
    done = mlxft("eval", "runs/a", "held.jsonl", *against, "--json")
    assert done.code == 0, done.err
    (task,) = json.loads(done.out)["tasks"]
    prefix = "reward_" if own else ""
    for name in ("accuracy", "margin"):
        assert task["figures"][prefix + name]["value"] == pytest.approx(kept[name], abs=1e-5)
        low, high = task["intervals"][prefix + name]
        assert low <= kept[name] <= high
    if own:  # next to itself, the base has no implicit reward
        assert task["against"]["reward_margin"]["value"] == 0.0
    else:
        assert "only one of the two is a reward model" in mlxft("eval", "runs/a", "held.jsonl", "--against", "base").err


def test_evaluations_of_other_files_and_tasks_stand_side_by_side(
    write: Command, mlxft: Command, tmp_path: Path
) -> None:
    assert mlxft("train", write(**{"run.dir": "runs"})).code == 0
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text((tmp_path / "rows-10.jsonl").read_text("utf-8"), "utf-8")
    for args in (["one"], ["two"], ["one"], ["one", "--task", "f1"], ["one", "--limit", "2", "--answers", "1"]):
        assert mlxft("eval", "runs/a", f"{args[0]}/test.jsonl", *args[1:]).code == 0
    folders = sorted(p.name for p in (tmp_path / "runs/a/eval").iterdir())
    assert folders == ["test", "test-2", "test-3", "test-f1"]
    lines = [json.loads(x) for x in (tmp_path / "runs/a/eval/test-3/predictions.jsonl").read_text("utf-8").splitlines()]
    assert ["prediction" in line for line in lines] == [True, False]
    shown, page = mlxft("runs", "show", "a").out, json.loads(mlxft("runs", "show", "a", "--json").out)
    assert (shown.count("loss on test.jsonl"), shown.count("f1 on test.jsonl")) == (3, 1)
    assert len(page["evaluations"]) == 4


def test_an_on_policy_validation_is_called_what_it_is() -> None:
    event = {"event": "eval", "step": 4, "loss": -0.25, "reward": 0.5, "eos_share": 1.0}
    assert validation_figure(event) == validation_figure(event | {VALUE: 0.25}) == ("reward less KL cost", 0.25)
    assert validation_figure({"event": "eval", "loss": 0.5, "accuracy": 1.0}) == ("loss", 0.5)


def test_short_numbers_held_as_floats_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large .gguf file; not where the recipe says how its numbers are held."""
    file = str(resolve("smollm2-135m"))

    def notes(**model: Any) -> list[str]:
        return base_notes(parse_config({"model": {"path": file, **model}, "data": {"train": "rows.jsonl"}}))

    assert notes() == []
    monkeypatch.setattr(build, "MANY", 100_000_000)
    (note,) = notes()
    assert "has weights of about 4 bits, which are held as floats: set model.quantize=4 for a base of about" in note
    assert notes(quantize=8) == []
