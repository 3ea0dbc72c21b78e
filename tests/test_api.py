"""The Python API: train, load, Run, and validation before the first step."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxft
from mlxft.errors import CheckpointError, ConfigError
from mlxft.model.sampling import Sampling, complete
from mlxft.objectives.grpo import GRPO
from mlxft.trainer.loop import Loop

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {w}?"}, {"role": "assistant", "content": f"It is the {w}."}]}
    for w in ("house", "sea", "road", "tower", "wind", "stone")
]


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in ROWS), "utf-8")
    return {
        "model": {"path": str(tiny_model_dir)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "valid": 0.34, "format": "messages"},
        "batch": {"rows": 2},
        "run": {"dir": str(tmp_path / "runs"), "name": "a", "steps": 4, "eval_every": 2, "save_every": 2},
    }


def weights(run: mlxft.Run) -> dict[str, mx.array]:
    found = mx.load(str(run.result / "adapters.safetensors"))
    assert isinstance(found, dict)
    return found


def test_the_name_train_is_the_function_whatever_was_imported_before() -> None:
    """With its signature, before its modules are imported and after."""
    code = """if True:
        import mlxft, mlxft.errors
        {first}
        for _ in range(2):  # the first call imports what trains
            try:
                mlxft.train({{}})
            except mlxft.errors.ConfigError as e:
                print("model.path: is needed" in str(e))
        import inspect
        from mlxft import train
        print(list(inspect.signature(train).parameters)[0] == "config")
    """
    for first in ("pass", "import mlxft.trainer.loop"):
        ran = subprocess.run([sys.executable, "-c", code.format(first=first)], capture_output=True, text=True)
        assert (ran.stdout.split(), ran.stderr) == (["True"] * 3, "")


def test_train_then_load(settings: dict[str, Any]) -> None:
    run = mlxft.train(settings)
    assert run.dir == Path(settings["run"]["dir"]) / "a"
    assert [e["step"] for e in run.metrics("eval")] == [2, 4]
    ids = mx.array([[5, 6, 7]])
    by_run, by_dir = mlxft.load(run), mlxft.load(run.dir)
    assert mx.array_equal(by_run.model(ids), by_dir.model(ids)).item()
    bare = mlxft.load(settings["model"]["path"])
    assert not mx.array_equal(by_run.model(ids), bare.model(ids)).item(), "the adapter is on it"
    assert isinstance(complete(by_run.model, by_run.tokenizer, "What is the sea?", Sampling(4)), str)


def test_load_takes_the_run_of_a_full_fine_tune(settings: dict[str, Any]) -> None:
    run = mlxft.train(settings | {"tune": {"method": "full"}})
    assert mlxft.load(run).path == run.dir / "model"


def test_validation_at_the_start_is_reported_and_changes_nothing_else(settings: dict[str, Any]) -> None:
    plain = mlxft.train(settings)
    settings["run"] |= {"name": "b", "eval_at_start": True}
    run = mlxft.train(settings)
    start, *rest = run.metrics("eval")
    assert (start["step"], start["best"]) == (0, False)
    keep = ("step", "loss", "best")
    assert [[e[k] for k in keep] for e in rest] == [[e[k] for k in keep] for e in plain.metrics("eval")]
    ours, theirs = weights(run), weights(plain)
    assert all(mx.array_equal(ours[n], theirs[n]).item() for n in theirs)


def test_the_untrained_model_is_never_the_best(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 3.0, 2.0])  # it was better before training
    monkeypatch.setattr("mlxft.trainer.loop.validate", lambda *_: {"loss": next(losses)})
    settings["run"] |= {"eval_at_start": True, "patience": 1}
    run = mlxft.train(settings)
    assert [(e["step"], e["loss"], e["best"]) for e in run.metrics("eval")] == [
        (0, 1.0, False),
        (2, 3.0, True),
        (4, 2.0, True),
    ]
    assert run.metrics("end")[0]["best_step"] == 4


def test_resume_does_not_validate_the_start_again(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings["run"] |= {"eval_at_start": True}
    save = Loop._save

    def stop(loop: Loop) -> None:
        save(loop)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            mlxft.train(settings)
    run = mlxft.train(settings, resume=True)
    assert [e["step"] for e in run.metrics("eval")] == [0, 2, 4]


def test_starting_over_keeps_no_old_lines(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings["run"] |= {"eval_at_start": True}

    def die(loop: Loop, batches: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_update", die)
        with pytest.raises(KeyboardInterrupt):
            mlxft.train(settings)
    run = mlxft.train(settings, resume=True)  # killed before its first checkpoint
    assert [e["step"] for e in run.metrics("eval")] == [0, 2, 4]
    assert len(run.metrics("start")) == 1


@pytest.mark.parametrize("setting", [{"eval_at_start": True}, {"eval_every": 2}, {"patience": 1}])
def test_validation_settings_without_validation_data_are_refused(
    settings: dict[str, Any], setting: dict[str, Any]
) -> None:
    del settings["data"]["valid"]
    settings["run"] = {"dir": settings["run"]["dir"], "name": "a", "steps": 1, **setting}
    with pytest.raises(ConfigError, match=rf"run\.{next(iter(setting))}: there is no validation data"):
        mlxft.train(settings)
    assert not Path(settings["run"]["dir"]).exists()


def test_sample_prompts_need_no_validation_data(settings: dict[str, Any]) -> None:
    del settings["data"]["valid"]
    settings["run"] |= {"eval_at_start": True, "sample_prompts": ["What is a road?"], "sample_tokens": 3}
    run = mlxft.train(settings)
    assert [e["step"] for e in run.metrics("sample")] == [0, 2, 4]


# Objects in place of paths.


def test_rows_and_a_loaded_model(settings: dict[str, Any]) -> None:
    """The run is the one that files make, to the bit; and a resumed one is given them again."""
    files = mlxft.train(settings)
    given = {k: v for k, v in settings.items() if k != "model"}
    given |= {"data": {"format": "messages", "valid": 0.34}, "run": {**settings["run"], "name": "b"}}
    loaded = mlxft.load(settings["model"]["path"])
    run = mlxft.train(given, rows=iter(ROWS), model=loaded)
    one, other = weights(files), weights(run)
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    with pytest.raises(ConfigError, match=r"exists; resume it with resume=True, replace it with overwrite=True"):
        mlxft.train(given, rows=ROWS, model=mlxft.load(settings["model"]["path"]))
    resumed = mlxft.train(
        given, "run.save_every=3", rows=ROWS, model=mlxft.load(settings["model"]["path"]), resume=True
    )
    assert resumed.metrics("end")
    with pytest.raises(CheckpointError, match="data has changed"):
        mlxft.train(given, rows=ROWS[:4], model=mlxft.load(settings["model"]["path"]), resume=True)


def test_a_row_that_is_wrong_is_named_as_it_was_given(settings: dict[str, Any]) -> None:
    with pytest.raises(mlxft.errors.DataError, match=r"rows\[1\]"):
        mlxft.train(settings, rows=[ROWS[0], {"messages": []}])
    with pytest.raises(mlxft.errors.DataError, match=r"rows\[0\]: is .*; expected a mapping of fields"):
        mlxft.train(settings, rows=["a text"])  # type: ignore[list-item]


def test_rewards_and_an_objective(settings: dict[str, Any]) -> None:
    class Mine(GRPO):
        """GRPO that says so."""

    def length(prompts: list[str], completions: list[str], rows: list[Any]) -> list[float]:
        return [float(len(c)) for c in completions]

    changes = {
        "objective": "grpo",
        "data": {"format": "prompts", "max_length": 64},
        "rollout": {"prompts": 2, "samples": 2, "max_tokens": 4},
        "run": {**settings["run"], "steps": 2, "eval_every": None},
    }
    recipe = {**settings, **changes}
    run = mlxft.train(recipe, rows=[{"prompt": "a"}, {"prompt": "b c"}], rewards=[length, length], overwrite=True)
    assert {"reward/length_0", "reward/length_1"} <= run.metrics("rollout")[0].keys()
    run = mlxft.train(recipe, "run.name=c", rows=[{"prompt": "a"}, {"prompt": "b c"}], rewards=[length], objective=Mine)
    assert run.config.objective == "python:Mine"
    assert "reward/length" in run.metrics("rollout")[0]


def test_a_model_that_does_not_fit_is_refused(settings: dict[str, Any]) -> None:
    run = mlxft.train(settings)
    with pytest.raises(ConfigError, match="model: it has an adapter already"):
        mlxft.train(settings, "run.name=b", model=mlxft.load(run))
    with pytest.raises(ConfigError, match=r"model\.quantize: 4; the model that was given has all bits"):
        mlxft.train(settings, "run.name=b", "model.quantize=4", model=mlxft.load(settings["model"]["path"]))


def test_a_run_shows_itself(settings: dict[str, Any]) -> None:
    settings["run"]["report_every"] = 1
    run = mlxft.train(settings)
    assert re.fullmatch(
        r"Run\('.*a', objective: sft, base: .*, step: 4, loss: [\d.]+, validation loss: [\d.]+\)", repr(run)
    )
    html = run._repr_html_()
    assert "<polyline" in html
    assert "training loss, step 1 to 4" in html


def test_a_run_is_used_by_plain_calls(settings: dict[str, Any], tmp_path: Path) -> None:
    run = mlxft.train(settings)
    model = mlxft.load(run)
    text = mlxft.generate(model, "What is sea?", max_tokens=8)
    assert text == mlxft.generate(run, [{"role": "user", "content": "What is sea?"}], max_tokens=8)
    drawn = mlxft.sample(model, ["What is sea?", "What is road?"], samples=3, max_tokens=8, seed=1)
    assert [len(found) for found in drawn] == [3, 3]
    assert drawn == mlxft.sample(model, ["What is sea?", "What is road?"], samples=3, max_tokens=8, seed=1)
    found = mlxft.evaluate(run, settings["data"]["train"], against="base", template="auto")
    (task,) = found.to_json()["tasks"]
    assert {"loss", "perplexity"} <= task["figures"].keys()
    fused = mlxft.fuse(run, tmp_path / "fused", force=True)
    assert fused is not None
    again = mlxft.generate(tmp_path / "fused", "What is sea?", max_tokens=8)
    assert isinstance(again, str)
    assert mlxft.export(run, tmp_path / "peft", format="peft")
    with pytest.raises(ConfigError, match="format is 'onnx'; expected peft"):
        mlxft.export(run, tmp_path / "onnx", format="onnx")  # type: ignore[arg-type]
    assert inspect.isfunction(mlxft.export), "no module of this name may take its place"


def test_rows_are_scored(settings: dict[str, Any]) -> None:
    pairs = [{"prompt": f"{w}?", "chosen": f"the {w}", "rejected": w} for w in ("sea", "road", "wind")]
    recipe = {**settings, "objective": "reward", "data": {"format": "preference"}}
    recipe["run"] = {**settings["run"], "eval_every": None}
    run = mlxft.train(recipe, rows=pairs)
    found = mlxft.score(run, pairs)
    assert [row["row"] for row in found] == ["rows[0]", "rows[1]", "rows[2]"]
    assert all(row["margin"] == pytest.approx(row["chosen"] - row["rejected"]) for row in found)


def test_every_public_name_is_there() -> None:
    for name in mlxft.__all__:
        assert getattr(mlxft, name) is not None, name
    assert set(mlxft.__all__) <= set(dir(mlxft))
