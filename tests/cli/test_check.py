"""mlxft check: what it prints, for people, pipes and programs."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlxft.check import check
from mlxft.check import trains as words
from mlxft.config import load_config

ROW = {"messages": [{"role": "user", "content": "the in"}, {"role": "assistant", "content": "on [red] it"}]}
CHECKED = "rows.jsonl:1: "
PLAIN = "<|im_start|>user\nthe in<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def good(write: Callable[..., str], tmp_path: Path) -> str:
    """A recipe with two rows, and one row a batch."""
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 2, "utf-8")
    return write(**{"data.train": "rows.jsonl", "run.steps": None, "batch.rows": 1})


def on_a_terminal(folder: Path, *args: str, **env: str) -> str:
    """What the command draws on a terminal of 40 columns."""
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    clean |= {"TERM": "xterm-256color", "COLUMNS": "40", **env}
    command = [sys.executable, "-m", "mlxft", *args]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=clean)
    os.close(theirs)
    drawn = b""
    try:
        while chunk := os.read(ours, 4096):
            drawn += chunk
    except OSError:  # Linux says so when the other side is closed
        pass
    assert process.wait(300) == 0
    os.close(ours)
    return drawn.decode().replace("\r\n", "\n")


def test_people_see_settings_counts_and_what_is_trained(good: str, mlxft: Callable[..., Any], tmp_path: Path) -> None:
    seen = mlxft("check", good)
    assert (seen.code, seen.err) == (0, "")
    for line in (
        "recipe: valid",
        "objective: sft",
        "steps: 40",
        "trains: lora of rank 4, scale 4, on all-linear",
        "rows: 2",
        f"run_dir: {tmp_path / 'runs' / 'a'}",
    ):
        assert line in seen.out.splitlines()
    assert f"{PLAIN}⟦on [red] it<|im_end|>⟧\n" in seen.out
    assert seen.out.count("rows.jsonl:") == 2
    assert not (tmp_path / "runs").exists()


def test_the_number_of_rows_shown(good: str, mlxft: Callable[..., Any]) -> None:
    assert [mlxft("check", good, "--rows", n).out.count("rows.jsonl:") for n in ("0", "1", "9")] == [0, 1, 2]


def test_the_rate_that_a_recipe_leaves_out(write: Callable[..., Any], mlxft: Callable[..., Any]) -> None:
    path = write(**{"optim.lr": None, "optim.warmup": 0})
    for override, rate in (("tune.rank=4", 2e-4), ("tune={method: full}", 2e-5), ("optim.lr=0.5", 0.5)):
        assert json.loads(mlxft("check", path, override, "--json").out)["lr"] == pytest.approx(rate)
    assert "lr: 0.0002\n" in mlxft("check", path).out


def test_what_would_be_trained_in_words(good: str, mlxft: Callable[..., Any]) -> None:
    def trains(*overrides: str) -> str:
        out = mlxft("check", good, *overrides, "--json").out
        return str(json.loads(out)["trains"])

    assert trains("tune.method=dora", "tune.targets=[q_proj, v_proj]", "tune.layers=1") == (
        "dora of rank 4, scale 4, on q_proj, v_proj of the last 1 layers"
    )
    assert trains("tune.train=[norm]") == "lora of rank 4, scale 4, on all-linear, and in full: norm"
    assert trains("tune={method: full, freeze: [norm]}") == "all weights, but not norm"
    assert trains("tune={method: full, layers: [0]}") == "all weights of layers [0]"
    assert words(load_config(Path(good), ["model.adapter=runs/b"])) == "the adapter runs/b"


def test_an_adapter_that_is_not_there_is_refused(good: str, refused: Callable[..., str]) -> None:
    assert "runs/b is not an adapter" in refused(1, "check", good, "model.adapter=runs/b")


def test_json_is_json_and_nothing_else(
    good: str, mlxft: Callable[..., Any], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard output, also where the environment asks for colour."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in mlxft("check", good).out, "people do get colour"
    done = mlxft("check", good, "--json")
    facts = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert (facts["recipe"], facts["steps"], facts["data"]["rows"]) == ("valid", 40, 2)
    assert "did you mean tune.rank?" in refused(2, "check", good, "tune.rnak=3", "--json")


def test_colour_marks_what_is_trained_on_a_terminal(good: str, tmp_path: Path) -> None:
    drawn = on_a_terminal(tmp_path, "check", good)
    assert "\x1b[1;32mon [red] it<|im_end|>\x1b[0m" in drawn
    assert "⟦" not in drawn


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_brackets_mark_it_where_colour_is_not_wanted(good: str, env: dict[str, str]) -> None:
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, _environ={"TERM": "xterm-256color", "COLUMNS": "20", **env})
    check(load_config(Path(good)), 2, terminal, as_json=False)
    assert f"{PLAIN}⟦on [red] it<|im_end|>⟧\n" in drawn.getvalue(), "no line is broken"


def test_an_output_that_lacks_characters(good: str, shell: Callable[..., Any]) -> None:
    done = shell("check", good, env={"PYTHONIOENCODING": "ascii"})
    assert (done.code, done.err) == (0, "")
    assert "?on [red] it<|im_end|>?" in done.out


def test_a_reader_that_goes_away(good: str, tmp_path: Path) -> None:
    """As of `mlxft check ... | head -1`: no traceback."""
    gone = f"{sys.executable} -m mlxft check {good} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", gone], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_the_plan_is_shown_and_nothing_is_loaded_or_written(
    good: str, mlxft: Callable[..., Any], tmp_path: Path
) -> None:
    lines = mlxft("check", good).out.splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("memory: "))
    parts = [line.split(":")[0].strip() for line in lines[first + 1 : first + 8]]
    assert parts == ["weights", "adapters", "gradients", "optimizer", "activations", "logits", "batch"]
    assert "fits on Macs of (GB): 8, 16, 18, 24, 32, 36, 48, 64, 96, 128" in lines
    memory = json.loads(mlxft("check", good, "--json").out)["memory"]
    assert memory["needed"] == sum(memory[k] for k in parts)
    assert memory["total"] == memory["needed"] + memory["ahead"]
    assert (memory["rows"], memory["checkpoint"], memory["fits"]) == (1, False, True)
    assert json.loads(mlxft("check", good, "memory.checkpoint=on", "--json").out)["memory"]["checkpoint"]
    assert not (tmp_path / "runs").exists()


def test_time_takes_real_steps_and_writes_nothing(
    good: str, mlxft: Callable[..., Any], shell: Callable[..., Any], tmp_path: Path
) -> None:
    # In a process of its own: the peak counts whatever MLX holds.
    found = json.loads(shell("check", good, "--time", "--json", "run.steps=500").out)
    time, memory = found["time"], found["memory"]
    # Half a megabyte: whether one step's arrays are gone when the next begins is a matter of timing.
    assert time["measured_peak"] == pytest.approx(memory["total"], rel=0.25)
    per_step = found["data"]["tokens"] / found["steps_per_epoch"]
    assert time["expected_s"] == pytest.approx(500 * per_step / time["tokens_per_s"])
    assert "measured peak memory: " in mlxft("check", good, "--time").out
    assert "measured peak memory: " in mlxft("check", good, "--time", "data.valid=0.5").out
    assert not (tmp_path / "runs").exists()


def test_a_budget_found_by_itself(good: str, mlxft: Callable[..., Any]) -> None:
    auto = ("batch={tokens: auto}", "data.max_length=64")
    found = json.loads(mlxft("check", good, *auto, "memory.limit=0.004", "--json").out)
    assert found["memory"]["fits"]
    refused = mlxft("check", good, *auto, "memory.limit=0.0001")
    assert refused.code == 2
    assert "not even one row of data.max_length (64) fits" in refused.err


@pytest.fixture
def whole(make_model_dir: Callable[..., Path], tmp_path: Path) -> str:
    return str(make_model_dir(tmp_path / "whole", "gpt_neox"))


def test_where_all_logits_are_computed_it_is_said(
    write: Callable[..., str], whole: str, mlxft: Callable[..., Any]
) -> None:
    said = "logits are computed for every position: the body of this model (gpt_neox) cannot be taken apart"
    pairs = {"data.train": "pairs.jsonl", "data.format": "preference"}
    row = json.dumps({"prompt": "the in", "chosen": "on it", "rejected": "at a"})
    recipes = [write("sft.yaml"), write("orpo.yaml", objective="preference", preference={"loss": "orpo"}, **pairs)]
    Path("pairs.jsonl").write_text(f"{row}\n" * 4, "utf-8")
    for recipe in recipes:
        for command in ("check", "train"):
            small = mlxft(command, recipe, f"run.name={recipe}-small", "run.steps=1")
            assert (small.code, said in small.out) == (0, False), small.err
            large = mlxft(command, recipe, f"run.name={recipe}-{command}", f"model.path={whole}", "run.steps=1")
            assert (large.code, said in large.out) == (0, True), large.err
        notes = json.loads(mlxft("check", recipe, f"model.path={whole}", "--json").out)["notes"]
        assert sum(said in note for note in notes) == 1


def test_a_reward_model_that_can_not_be_is_refused_by_check_as_by_training(
    write: Callable[..., str], whole: str, refused: Callable[..., str]
) -> None:
    row = json.dumps({"prompt": "the in", "chosen": "on it", "rejected": "at a"})
    Path("pairs.jsonl").write_text(f"{row}\n" * 4, "utf-8")
    recipe = write(objective="reward", **{"data.train": "pairs.jsonl", "data.format": "preference"})
    for command in ("check", "train"):
        said = refused(1, command, recipe, f"model.path={whole}")
        assert "the body of this model (gpt_neox) cannot be separated from its output layer" in said


def test_what_training_would_refuse_for_room_check_refuses_after_its_plan(
    good: str, mlxft: Callable[..., Any], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, planned = mlxft("check", good, "memory.limit=1e-4"), mlxft("check", good, "memory.limit=1e-4", "--json")
    assert (plain.code, "DOES NOT FIT" in plain.out, CHECKED in plain.out) == (2, True, True)
    assert (planned.code, json.loads(planned.out)["memory"]["fits"]) == (2, False)
    assert plain.err == planned.err == mlxft("train", good, "memory.limit=1e-4").err
    assert "What helps: a smaller" in plain.err
    (tmp_path / "file").touch()
    assert "run.dir: cannot write" in refused(2, "check", good, "run.dir=file/runs")
    monkeypatch.setattr("mlxft.trainer.report.importlib.util.find_spec", lambda name: None)
    assert "needs the package trackio" in refused(2, "check", good, "report.to=[trackio]")


def test_what_can_not_pack_is_refused_by_check_too(
    write: Callable[..., str], refused: Callable[..., str], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    hybrid = str(make_model_dir(tmp_path / "hybrid", "qwen3_5"))
    file = write(**{"model.path": hybrid, "batch": {"tokens": 64, "pack": True}})
    assert refused(1, "check", file) == refused(1, "train", file)
    assert "carries more than keys and values" in refused(1, "check", file)


def test_a_plan_for_a_mac(good: str, mlxft: Callable[..., Any]) -> None:
    """From a machine that is none: how much memory it has is not known, unless memory.limit says so."""
    told = json.loads(mlxft("check", good, "--device", "metal", "--json").out)["memory"]
    assert (told["device"], told["usable"], told["fits"]) == ("metal", None, None)
    shown = mlxft("check", good, "--device", "metal")
    assert (shown.code, "on a Mac's GPU" in shown.out, "with memory.checkpoint: on:" in shown.out) == (0, True, True)
    packed = mlxft("check", good, "--device", "metal", "batch.pack=true", "batch.rows=null", "batch.tokens=128")
    assert (packed.code, "with batches as large of rows that are not packed" in packed.out) == (0, True)
    limited = mlxft("check", good, "--device", "metal", "memory.limit=1e-4")
    assert (limited.code, "DOES NOT FIT" in limited.out) == (2, True)
    assert mlxft("check", good, "--device", "metal", "--time").code == 2


def test_the_plan_of_pairs_is_shown(write: Callable[..., str], mlxft: Callable[..., Any], refused: Any) -> None:
    row = json.dumps({"prompt": "the in", "chosen": "on it", "rejected": "at a"})
    Path("pairs.jsonl").write_text(f"{row}\n" * 8, "utf-8")
    for objective in ("reward", "preference"):
        recipe = write(objective=objective, **{"data.train": "pairs.jsonl", "data.format": "preference"})
        memory = json.loads(mlxft("check", recipe, "--json").out)["memory"]
        assert (memory["rows"], memory["fits"]) == (4, True), "two pairs"
        assert "training needs" in refused(2, "train", recipe, "memory.limit=0.0002")
