"""Rows, samples, names, templates and models full of escape codes and markup: no command lets them steer a terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.text import json_text, printable

# Titles, a cleared screen, 8-bit escapes, bidi override and isolate, line separator, zero width; rich's markup.
BAD = "\x1b]0;t\x07\x1b[2J\x9b31m\u202e\u2066\u2028\u200b[red][link y[/x]:bomb:"
HARMFUL = set(BAD) - set(printable(BAD))


def clean(*texts: str) -> bool:
    """Whether nothing harmful is left, and something was there."""
    assert not any(HARMFUL & set(text) for text in texts), texts
    return any("[linky[/x]:bomb:" in "".join(text.split()) for text in texts)


@pytest.fixture
def hostile(write: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path) -> str:
    """A recipe with such rows and prompts, and a model folder named so."""
    model = tmp_path / "".join(["m", *sorted(HARMFUL)])
    shutil.copytree(tiny_model_dir, model)
    answer = {"role": "assistant", "content": f"{BAD}[link=http://x]z[/link]"}
    row = {"messages": [{"role": "user", "content": BAD}, answer], BAD: "x"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4, "utf-8")
    changes = {"data.train": "rows.jsonl", "data.valid": 0.5, "model.path": str(model), "run.sample_prompts": [BAD]}
    return str(write(**changes, **{"run.steps": 2, "data.max_length": 512}))


def test_no_command_prints_what_steers_a_terminal(hostile: str, mlxft: Callable[..., Any]) -> None:
    run = "runs/a"
    for args in (["check", hostile], ["train", hostile], ["runs", "show", run]):
        done = mlxft(*args)
        assert done.code == 0, done
        assert clean(done.out, done.err), args
    for args in (["eval", run, "rows.jsonl"], ["runs"], ["runs", "compare", run, run], ["runs", "watch", run]):
        done = mlxft(*args)
        assert done.code == 0, done
        clean(done.out, done.err)
    for args in (["check", hostile, "--json"], ["runs", "show", run, "--json"]):
        done = mlxft(*args)
        assert clean(done.out)
        assert json.loads(done.out)
        assert json_text(BAD)[1:-1] in done.out, "as JSON all of it is there"


def test_errors_are_clean(hostile: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert clean(refused(2, "check", hostile, f"{BAD}=1"))
    assert clean(refused(2, "check", hostile, f"run.{BAD}=1"))
    assert clean(refused(2, BAD))
    assert clean(refused(2, "check", hostile, f"--{BAD}"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": BAD, "content": "x"}]}), "utf-8")
    clean(refused(1, "check", hostile))
    (tmp_path / "rows.jsonl").write_text(json.dumps({BAD: 1}), "utf-8")
    assert clean(refused(1, "check", hostile))


def not_obeyed(shown: str) -> bool:
    """Whether a terminal shows such a text, and none of it as it is; rich has escape codes of its own."""
    assert not any(part in shown for part in ("\x1b]0;", "\x1b[2J", *(HARMFUL - {"\x1b"}))), repr(shown)
    return "[2J" in shown


def test_a_model_that_writes_escapes(
    tiny_model_dir: Path, mlxft: Callable[..., Any], screen: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxft.model.sampling.stream", lambda *args, **options: iter(["a\x1b[31", "m" + BAD]))
    ask = ("generate", "--model", str(tiny_model_dir), "hi")
    assert mlxft(*ask).out == f"a\x1b[31m{BAD}\n", "a pipe is given what the model wrote"
    seen = screen(*ask)
    assert not_obeyed(seen), "a terminal is not"
    seen = screen("chat", *ask[1:-1], "--system", BAD, typed=["hi\n", "\n"])
    assert not_obeyed(seen)


@pytest.fixture
def rows(tmp_path: Path, write: Callable[..., Any]) -> Path:
    """Rows whose every text is such, for all that judges or scores, in a file named so."""
    answers = [f"{BAD} a", f"{BAD} b"]
    row = {"prompt": BAD, "answers": answers, "models": [BAD, "B"], "chosen": answers[0], "rejected": answers[1]}
    write()
    file = tmp_path / f"{BAD.replace('/', '')}.jsonl"
    file.write_text(json.dumps(row) + "\n", "utf-8")
    return file


def test_labels_at_a_terminal(rows: Path, screen: Callable[..., str]) -> None:
    assert not_obeyed(screen("label", rows.name, "--out", "out.jsonl", typed=["q"]))


def test_scores_at_a_terminal(
    rows: Path, write: Callable[..., Any], mlxft: Callable[..., Any], screen: Callable[..., str]
) -> None:
    judged = {"objective": "reward", "data.train": rows.name, "data.format": "preference", "run.steps": 1}
    assert mlxft("train", write(**judged, **{"data.max_length": 512})).code == 0
    pair = {side: json.loads(rows.read_text("utf-8"))[side] for side in ("prompt", "chosen", "rejected")}
    rows.write_text(json.dumps(pair) + "\n", "utf-8")
    seen = screen("score", "runs/a", rows.name)
    assert "accuracy" in seen
    assert not_obeyed(seen)
    rows.write_text(json.dumps({BAD: BAD}) + "\n", "utf-8")
    assert not_obeyed(screen("score", "runs/a", rows.name))


def test_samples_at_a_terminal(rows: Path, screen: Callable[..., str], tiny_model_dir: Path) -> None:
    rows.with_name("f.py").write_text("def f(prompts, completions, rows):\n    raise ValueError(prompts[0])\n", "utf-8")
    sample = ("sample", rows.name, "--model", str(tiny_model_dir), "--n", "2", "--max-tokens", "2", "--cut-off")
    seen = screen(*sample, "--function", "f.py:f", "--out", "out.jsonl")
    assert "RewardError" in seen
    assert not_obeyed(seen)
    good = "def f(prompts, completions, rows):\n    return [1.0] * len(prompts)\n"
    rows.with_name("f.py").write_text(good, "utf-8")
    seen = screen(*sample, "--function", "f.py:f", "--out", f"{BAD.replace('/', '')}.out", "--keep", "all")
    assert "completions of 1 prompts kept" in seen
    assert not_obeyed(seen)


def damage_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")


def add_tensor(folder: Path) -> None:
    import mlx.core as mx

    arrays = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays | {BAD: mx.zeros(1)})


def refuse_in_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(f"{{{{ raise_exception({json.dumps(BAD)}) }}}}", "utf-8")


HOSTILE_MODELS: dict[str, Callable[[Path], Any]] = {
    "model_type": lambda folder: damage_config(folder, model_type=BAD),
    "model_file": lambda folder: damage_config(folder, model_file=BAD),
    "dtype": lambda folder: damage_config(folder, torch_dtype=BAD),
    "a size": lambda folder: damage_config(folder, hidden_size=BAD),
    "a tensor's name": add_tensor,
    "raise_exception": refuse_in_template,
}


@pytest.mark.parametrize("damage", HOSTILE_MODELS)
def test_what_a_model_brings_into_messages(
    damage: str, mlxft: Callable[..., Any], screen: Callable[..., str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    HOSTILE_MODELS[damage](model)
    ask = ("generate", "--model", str(model), "hi")
    done = mlxft(*ask)
    assert done.code == 1, done
    clean(done.out, done.err)
    assert not_obeyed(screen(*ask)), damage
