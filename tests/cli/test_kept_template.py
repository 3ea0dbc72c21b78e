"""A run keeps the chat template that it was trained with, and the day that it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import FAMILIES

from mlxft import build
from mlxft.errors import ModelError
from mlxft.exports.hub import pack
from mlxft.model.load import load
from mlxft.runs import load_run

Command = Callable[..., Any]
QWEN, DATED = FAMILIES["qwen-2.5"].template, FAMILIES["dated"].template
TWO_STEPS = {"optim.schedule": "constant", "optim.warmup": 0, "run.steps": 2, "run.save_every": 1}


def test_the_template_goes_with_the_run(write: Command, mlxft: Command, tmp_path: Path) -> None:
    """Edited, the file changes nothing any more; gone, it is not missed: in all that opens the run or its adapter."""
    Path("my.jinja").write_text(QWEN, "utf-8")
    assert mlxft("train", write(**{"model.chat_template": "my.jinja", **TWO_STEPS})).code == 0
    for place in ("runs/a", "runs/a/adapter"):
        assert Path(place, "chat_template.jinja").read_text("utf-8") == QWEN
    Path("my.jinja").write_text("{{ 'edited' }}", "utf-8")
    for missing in (False, True):
        if missing:
            Path("my.jinja").unlink()
        for name in ("runs/a", "runs/a/adapter"):
            assert load_run(name).tokenizer.chat_template == QWEN
        for command in (
            ("fuse", "runs/a", "fused", "--force", "--overwrite"),
            ("export", "runs/a", "peft", "--format", "peft", "--overwrite"),
        ):
            done = mlxft(*command)
            assert done.code == 0, done.err
            assert Path(command[2], "chat_template.jinja").read_text("utf-8") == QWEN
        done = mlxft("train", "--resume", "runs/a", f"run.steps={3 + missing}")
        assert done.code == 0, done.err
        assert Path("runs/a/adapter/chat_template.jinja").read_text("utf-8") == QWEN
    assert mlxft("eval", "runs/a", "rows-10.jsonl", "--task", "exact_match").code == 0
    assert mlxft("eval", "runs/a", "rows-10.jsonl", "--against", "base").code == 0
    # What the user names now goes before what the run keeps.
    Path("other.jinja").write_text(DATED, "utf-8")
    assert load_run("runs/a", chat_template=Path("other.jinja")).tokenizer.chat_template == DATED


def test_a_run_that_was_copied_elsewhere_works(write: Command, mlxft: Command, tmp_path: Path) -> None:
    Path("my.jinja").write_text(QWEN, "utf-8")
    assert mlxft("train", write(**{"model.chat_template": "my.jinja", **TWO_STEPS})).code == 0
    shutil.move("runs/a", "copied")
    Path("my.jinja").unlink()
    done = mlxft("generate", "--model", "copied", "--max-tokens", "2", "in")
    assert done.code == 0, done.err


def test_named_templates_are_kept_by_name(tiny_model_dir: Path, write: Command, mlxft: Command, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model_dir, tmp_path / "named")
    loaded = load(str(base))
    loaded.tokenizer.chat_template = {"default": loaded.tokenizer.chat_template, "tool_use": QWEN}
    loaded.tokenizer.save_pretrained(base)
    assert mlxft("train", write(**{"model.path": str(base), **TWO_STEPS})).code == 0
    kept = load_run("runs/a/adapter").tokenizer.chat_template
    assert kept == loaded.tokenizer.chat_template
    named = "additional_chat_templates/tool_use.jinja"
    assert Path("runs/a/adapter", named).read_text("utf-8") == QWEN
    assert {named, "chat_template.jinja"} < set(pack(Path("runs/a"), "ada/x").files)


def test_an_adapter_from_before_asks_for_its_file(write: Command, mlxft: Command, tmp_path: Path) -> None:
    """A path in an adapter, which may be a stranger's, is not read; the user brings the file."""
    Path("my.jinja").write_text(QWEN, "utf-8")
    assert mlxft("train", write(**{"model.chat_template": "my.jinja", **TWO_STEPS})).code == 0
    Path("runs/a/adapter/chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"my\.jinja.*copy it there as chat_template\.jinja"):
        load_run("runs/a")
    Path("runs/a/adapter/chat_template.jinja").write_text(QWEN, "utf-8")
    assert load_run("runs/a").tokenizer.chat_template == QWEN


def test_a_run_does_not_say_which_file_is_read(write: Command, mlxft: Command, tmp_path: Path) -> None:
    """The base that a whole run is compared with would get any file as its template."""
    Path("my.jinja").write_text(QWEN, "utf-8")
    whole = {"tune.method": "full", "tune.rank": None, "model.chat_template": "my.jinja"}
    assert mlxft("train", write(**whole, **TWO_STEPS)).code == 0
    against = ("eval", "runs/a", "rows-10.jsonl", "--against", "base")
    assert mlxft(*against).code == 0
    Path("runs/a/chat_template.jinja").unlink()
    done = mlxft(*against)
    assert done.code == 1
    assert "copy it there as chat_template.jinja" in done.err
    # To go on with it is to train by its recipe.
    assert mlxft("train", "--resume", "runs/a", "run.steps=3").code == 0


@pytest.mark.parametrize("objective", ["sft", "preference", "grpo"])
def test_the_day_of_a_run_is_the_day_it_began(
    objective: str, write: Command, mlxft: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed a day later it goes on with the same rows: the same weights as a run that was never stopped."""
    Path("dated.jinja").write_text(DATED, "utf-8")
    changes: dict[str, Any] = {"objective": objective, "model.chat_template": "dated.jinja", **TWO_STEPS}
    if objective != "sft":
        pair = {"prompt": "in", "chosen": "on", "rejected": "an", "answer": "on"}
        rows = [{**pair, "prompt": word} for word in ("in", "the", "of", "a")]
        Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        changes |= {"data.train": "r.jsonl", "data.format": "preference" if objective == "preference" else "prompts"}
    if objective == "grpo":
        changes |= {"rollout": {"prompts": 2, "samples": 2, "max_tokens": 4}, "data.max_length": 128}
        changes |= {"rewards": {"rules": [{"kind": "length", "max": 2}]}}
    first = date.today() - timedelta(days=1)

    class Today(date):
        @classmethod
        def today(cls) -> date:
            return first

    recipe = write(**changes)
    monkeypatch.setattr(build, "date", Today)
    assert mlxft("train", recipe).code == 0
    assert mlxft("train", recipe, "run.name=b", "run.steps=4").code == 0
    monkeypatch.setattr(build, "date", date)
    done = mlxft("train", "--resume", "runs/a", "run.steps=4")
    assert done.code == 0, done.err
    assert yaml.safe_load(Path("runs/a/config.yaml").read_text("utf-8"))["data"]["date"] == str(first)
    a, b = (Path(f"runs/{name}/adapter/adapters.safetensors").read_bytes() for name in "ab")
    assert a == b
    # Another day is another text, and asked for by name it is refused.
    done = mlxft("train", recipe, "--resume", "run.steps=4", f"data.date={date.today()}")
    assert done.code == 2
    assert "data.date" in done.err
