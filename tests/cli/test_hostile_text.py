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


def test_a_model_that_writes_escapes(
    tiny_model_dir: Path, mlxft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxft.model.sample.stream", lambda *args, **options: iter(["a\x1b[31", "m" + BAD]))
    ask = ("generate", "--model", str(tiny_model_dir), "hi")
    assert mlxft(*ask).out == f"a\x1b[31m{BAD}\n", "a pipe is given what the model wrote"
