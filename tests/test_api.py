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
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import mlxft
from mlxft.build import load_base, prepare
from mlxft.errors import CheckpointError, ConfigError
from mlxft.model.load import Loaded
from mlxft.model.sampling import Sampling, complete
from mlxft.objectives.grpo import GRPO
from mlxft.run import as_config
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


# What a training loop of one's own is made of.


def adapted(folder: Path, **options: Any) -> Loaded:
    """An adapter whose update is not zero."""
    model = mlxft.adapt(mlxft.load(str(folder), **options), rank=4, dora="quantize" not in options)
    changed = tree_map(lambda v: v + 0.05 * mx.random.normal(v.shape, key=mx.random.key(1)), model.model.parameters())
    trained = model.model.trainable_parameters()
    flat = {name: value for name, value in tree_flatten(changed) if name in dict(tree_flatten(trained))}
    model.model.load_weights(list(flat.items()), strict=False)
    return model


def logits(model: Loaded, ids: mx.array) -> mx.array:
    model.model.eval()
    found: mx.array = model.model(ids)
    return found


IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]]
MASK = [[0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0]]


def test_adapt_starts_where_train_does(settings: dict[str, Any]) -> None:
    settings |= {"tune": {"rank": 4, "alpha": 8, "targets": "attention"}}
    settings["run"]["seed"] = 7
    config = as_config(settings)
    theirs = load_base(config)
    prepare(config, theirs)
    ours = mlxft.load(config.model.path)
    before = np.array(mx.random.state[0]).tolist()  # type: ignore[index]
    assert mlxft.adapt(ours, rank=4, alpha=8, targets="attention", seed=7) is ours
    assert np.array(mx.random.state[0]).tolist() == before, "the random state is the caller's"  # type: ignore[index]
    one, other = (dict(tree_flatten(m.model.trainable_parameters())) for m in (theirs, ours))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    assert ours.model.training
    bare = mlxft.load(config.model.path)
    assert mx.array_equal(logits(ours, mx.array(IDS)), logits(bare, mx.array(IDS))).item(), "no effect at first"
    with pytest.raises(ConfigError, match="adapter already"):
        mlxft.adapt(ours)
    problems: list[dict[str, Any]] = [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": "q_porj"}]
    for wrong in problems:
        with pytest.raises(ConfigError, match="q_porj" if "targets" in wrong else f"{next(iter(wrong))} is "):
            mlxft.adapt(bare, **wrong)


def test_tokenize(settings: dict[str, Any], tiny_model: Loaded) -> None:
    rows = mlxft.tokenize(tiny_model, ROWS)
    for row, other in zip(rows, mlxft.tokenize(tiny_model, settings["data"]["train"])):
        assert row.ids.tolist() == other.ids.tolist()
    decode = tiny_model.tokenizer.decode
    assert decode(rows[0].ids[rows[0].trained].tolist()) == "It is the house.<|im_end|>"
    assert not rows[0].trained[0]
    (whole,) = mlxft.tokenize(tiny_model, [{"text": "the sea"}], format="text")
    assert whole.trained[1:].all()
    with pytest.raises(mlxft.errors.DataError, match=r"rows\[1\]"):
        mlxft.tokenize(tiny_model, [ROWS[0], {"messages": []}])
    with pytest.raises(mlxft.errors.DataError, match=r"rows\[0\]: \d+ tokens"):
        mlxft.tokenize(tiny_model, ROWS, max_length=4)
    with pytest.raises(ConfigError, match="train_on"):
        mlxft.tokenize(tiny_model, ROWS, train_on="asistant")
    with pytest.raises(ConfigError, match=r"overflow is 'cut'; expected one of error"):
        mlxft.tokenize(tiny_model, ROWS, overflow="cut")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_whole_logits(tiny_model_dir: Path, temperature: float) -> None:
    """Values and gradient, with an adapter that has an effect."""
    model, ids, mask = adapted(tiny_model_dir), mx.array(IDS), mx.array(MASK)
    model.model.eval()

    def direct() -> mx.array:
        found = mlxft.functional.token_logprobs(model.model(ids)[:, :-1], ids[:, 1:], temperature)
        return mx.pad(found, [(0, 0), (1, 0)]) * mask

    def ours() -> mx.array:
        return mlxft.logprobs(model, ids, mask, temperature=temperature)

    assert mx.allclose(ours(), direct(), atol=1e-5).item()
    still = mlxft.logprobs(model, np.array(IDS), np.array(MASK), temperature=temperature, grad=False)
    assert mx.allclose(still, direct(), atol=1e-5).item()
    weights = mx.random.normal(mask.shape, key=mx.random.key(2))  # of tokens, as advantages are
    one, other = (nn.value_and_grad(model.model, lambda f=f: (f() * weights).sum())()[1] for f in (ours, direct))
    one, other = dict(tree_flatten(one)), dict(tree_flatten(other))
    assert one.keys() == other.keys()
    assert one
    for name in one:
        assert mx.allclose(one[name], other[name], rtol=1e-3, atol=1e-4).item(), name


def test_logprobs_of_the_base(tiny_model_dir: Path) -> None:
    """By the model without its adapter, to the last bit, and nothing of the model has changed after it."""
    model, bare = adapted(tiny_model_dir), mlxft.load(str(tiny_model_dir))
    before = dict(tree_flatten(model.model.trainable_parameters()))
    expected = mlxft.logprobs(bare, IDS, MASK, grad=False)
    assert mx.array_equal(mlxft.logprobs(model, IDS, MASK, base=True), expected).item()
    assert not mx.allclose(mlxft.logprobs(model, IDS, MASK), expected, atol=1e-2).item()
    after = dict(tree_flatten(model.model.trainable_parameters()))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert model.model.training


@pytest.mark.parametrize(
    ("mask", "message"),
    [([[1, 0, 0]], "first token"), ([[0, 0, 0]], "no token"), ([[0, 1]], r"\(1, 3\) and mask \(1, 2\)")],
)
def test_masks_that_mean_nothing_are_refused(tiny_model: Loaded, mask: list[list[int]], message: str) -> None:
    with pytest.raises(mlxft.errors.DataError, match=message):
        mlxft.logprobs(tiny_model, [[1, 2, 3]], mask)
    with pytest.raises(ConfigError, match="temperature"):
        mlxft.logprobs(tiny_model, [[1, 2, 3]], [[0, 1, 1]], temperature=0)


def test_sample_tokens_are_the_texts_of_sample(tiny_model: Loaded) -> None:
    prompts = ["What is sea?", "What is the longest road?"]
    found = mlxft.sample_tokens(tiny_model, prompts, samples=3, max_tokens=8, seed=1)
    texts = mlxft.sample(tiny_model, prompts, samples=3, max_tokens=8, seed=1)
    assert [[completion.text for completion in group] for group in found] == texts
    for prompt, group in zip(prompts, found):
        assert prompt in tiny_model.tokenizer.decode(group[0].prompt)
        assert all(c.finish == ("eos" if c.ids[-1] in tiny_model.tokenizer.eos_token_ids else "length") for c in group)
        assert all(0 < len(c.ids) <= 8 for c in group)


@pytest.mark.parametrize("options", [{}, {"quantize": 4, "group_size": 32}], ids=["float", "4 bits"])
def test_an_adapter_that_is_saved_is_loaded(tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model, ids = adapted(tiny_model_dir, **options), mx.array(IDS)
    folder = mlxft.save_adapter(model, tmp_path / "a")
    again = mlxft.load(folder)
    assert mx.array_equal(logits(model, ids), logits(again, ids)).item(), "the base is loaded as it was"
    assert not mx.allclose(logits(again, ids), logits(mlxft.load(str(tiny_model_dir)), ids), atol=1e-2).item()
    assert again.tokenizer.eos_token_ids == model.tokenizer.eos_token_ids
    with pytest.raises(ConfigError, match="exists already"):
        mlxft.save_adapter(model, folder)
    second = mlxft.save_adapter(again, tmp_path / "b")  # one that was loaded
    assert mx.array_equal(logits(mlxft.load(second), ids), logits(model, ids)).item()
    mlxft.save_adapter(again, folder, overwrite=True)
    with pytest.raises(ConfigError, match="no adapter"):
        mlxft.save_adapter(mlxft.load(str(tiny_model_dir)), tmp_path / "c")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of the user's own")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        mlxft.save_adapter(model, tmp_path / "mine", overwrite=True)


def test_mlx_lm_reads_what_save_adapter_writes(tiny_model_dir: Path, tmp_path: Path) -> None:
    import mlx_lm

    model = adapted(tiny_model_dir)
    folder = mlxft.save_adapter(model, tmp_path / "a")
    theirs = mlx_lm.load(str(tiny_model_dir), adapter_path=str(folder))[0]
    theirs.eval()
    assert mx.allclose(theirs(mx.array(IDS)), logits(model, mx.array(IDS)), atol=1e-4).item()


def test_every_public_name_is_there() -> None:
    for name in mlxft.__all__:
        assert getattr(mlxft, name) is not None, name
    assert set(mlxft.__all__) <= set(dir(mlxft))
