"""Checkpoints: whole or not there, the newest whole one is found, damage is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxft.errors import CheckpointError
from mlxft.trainer import checkpoint
from mlxft.trainer.checkpoint import Snapshot, checkpoints, load_newest, save_checkpoint


def snapshot(value: float) -> Snapshot:
    return Snapshot({"w": mx.full((4,), value)}, {"state.m": mx.full((4,), -value)}, {"progress": {"step": int(value)}})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights cut": lambda p: cut(p / "weights.safetensors"),
    "weights changed by one bit": lambda p: flip(p / "weights.safetensors"),
    "weights empty": lambda p: (p / "weights.safetensors").write_bytes(b"") and None,
    "optimizer missing": lambda p: (p / "optimizer.safetensors").unlink(),
    "state missing": lambda p: (p / "state.json").unlink(),
    "state cut": lambda p: cut(p / "state.json"),
    "state is a list": lambda p: (p / "state.json").write_text("[]") and None,
    "a number of the state altered": lambda p: flip(p / "state.json"),
    "a key of the state missing": lambda p: (p / "state.json").write_text('{"format": 3, "step": 10}') and None,
    "digests missing": lambda p: (p / "digests.json").unlink(),
    "digests are of other files": lambda p: (p / "digests.json").write_text('{"x": "y"}') and None,
    "a link": lambda p: link(p / "weights.safetensors"),
    "a link that leads nowhere": lambda p: (p / "state.json").unlink() or (p / "state.json").symlink_to("/none"),
    "a folder in a file's place": lambda p: (p / "state.json").unlink() or (p / "state.json").mkdir(),
    "a pipe in a file's place": lambda p: (p / "state.json").unlink() or os.mkfifo(p / "state.json"),
    "all of it a link": lambda p: link(p),
    "a file in its place": lambda p: shutil.rmtree(p) or (p.write_text("") and None),
}


def test_it_comes_back(tmp_path: Path):
    save_checkpoint(tmp_path, 3, snapshot(3), keep=2)
    back = load_newest(tmp_path, pytest.fail)
    assert back is not None
    assert back.weights["w"].tolist() == [3.0] * 4
    assert back.optimizer["state.m"].tolist() == [-3.0] * 4
    assert (back.state["step"], back.state["progress"]) == (3, {"step": 3})


def test_the_newest_by_number_is_taken_and_the_newest_are_kept(tmp_path: Path):
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, step, snapshot(step), keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-10", "step-11"]
    back = load_newest(tmp_path, pytest.fail)
    assert back is not None
    assert back.state["step"] == 11


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_newest_is_said_and_the_one_before_used(tmp_path: Path, damage: Callable[[Path], None]):
    said: list[str] = []
    save_checkpoint(tmp_path, 5, snapshot(5), keep=2)
    save_checkpoint(tmp_path, 10, snapshot(10), keep=2)
    damage(tmp_path / "step-10")
    back = load_newest(tmp_path, said.append)
    assert back is not None
    assert back.weights["w"].tolist() == [5.0] * 4
    assert len(said) == 1
    assert "step-10 is damaged" in said[0]
    assert "using the one before it" in said[0]


def test_all_damaged_is_refused(tmp_path: Path):
    said: list[str] = []
    for step in (5, 10):
        save_checkpoint(tmp_path, step, snapshot(step), keep=2)
        cut(tmp_path / f"step-{step}" / "weights.safetensors")
    with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
        load_newest(tmp_path, said.append)
    assert len(said) == 2


def test_a_damaged_later_one_never_pushes_out_a_whole_one(tmp_path: Path):
    """step-20 is damaged, so the run goes on from 10 and saves 15: with keep 1, 15 is what must stay."""
    save_checkpoint(tmp_path, 10, snapshot(10), keep=2)
    save_checkpoint(tmp_path, 20, snapshot(20), keep=2)
    cut(tmp_path / "step-20" / "weights.safetensors")
    save_checkpoint(tmp_path, 15, snapshot(15), keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-15"]
    assert load_newest(tmp_path, pytest.fail) is not None


def test_a_damaged_one_is_replaced_by_a_whole_one_of_the_same_step(tmp_path: Path):
    save_checkpoint(tmp_path, 5, snapshot(5), keep=2)
    cut(tmp_path / "step-5" / "weights.safetensors")
    save_checkpoint(tmp_path, 5, snapshot(5), keep=2)
    assert load_newest(tmp_path, pytest.fail) is not None


def test_what_the_user_put_into_a_checkpoint_stays(tmp_path: Path):
    """Be it rotated away, passed over, or in the way of one of the same step; what is kept is counted without it."""
    said: list[str] = []
    for step in (2, 4, 20):
        save_checkpoint(tmp_path, step, snapshot(step), keep=5)
        (tmp_path / f"step-{step}/notes.txt").write_text(f"mine {step}")
    cut(tmp_path / "step-20" / "weights.safetensors")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "step-4", elsewhere)
    (tmp_path / "step-3").symlink_to(elsewhere)
    (tmp_path / "step-6").symlink_to(elsewhere)
    for step in (4, 5, 6):
        save_checkpoint(tmp_path, step, snapshot(step), keep=2, say=said.append)
    assert len([line for line in said if ": notes.txt" in line]) == 3, said
    assert [line.split()[-1] for line in said if "in the way" in line] == ["step-4.kept-1", "step-6.kept-1"]
    notes = [p for p in tmp_path.glob("step*/notes.txt") if p.parent.name != "step-3"]
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in notes} == {
        "step-2/notes.txt": "mine 2",
        "step-4.kept-1/notes.txt": "mine 4",
        "step-6.kept-1/notes.txt": "mine 4",
        "step-20/notes.txt": "mine 20",
    }
    assert len(list(elsewhere.iterdir())) == 5
    back = load_newest(tmp_path, pytest.fail)
    assert back is not None
    assert back.state["step"] == 6
    assert [p.name for p in checkpoints(tmp_path)] == ["step-3", "step-5", "step-6"]


def test_a_half_written_one_is_no_checkpoint_and_is_cleared_away(tmp_path: Path):
    save_checkpoint(tmp_path, 5, snapshot(5), keep=2)
    process = subprocess.Popen(["true"])
    process.wait()
    half, busy = (tmp_path / f".tmp-mlxft-{pid}-step-10" for pid in (process.pid, os.getppid()))
    for folder in (half, busy):
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"half")
    back = load_newest(tmp_path, pytest.fail)
    assert back is not None
    assert back.state["step"] == 5
    assert not half.exists()
    assert busy.exists(), "a process that lives is writing it"


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path, 5, snapshot(5), keep=1)

    def full(path: Path, arrays: dict[str, mx.array]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_arrays", full)
    with pytest.raises(CheckpointError, match="step-10: No space left on device; what was saved before is unchanged"):
        save_checkpoint(tmp_path, 10, snapshot(10), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]
    assert load_newest(tmp_path, pytest.fail) is not None


def test_another_format_is_refused_by_number(tmp_path: Path):
    said: list[str] = []
    save_checkpoint(tmp_path, 5, snapshot(5), keep=1)
    file = tmp_path / "step-5" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))  # before its digest is looked at
    with pytest.raises(CheckpointError):
        load_newest(tmp_path, said.append)
    assert "format 99" in said[0]


def test_no_folder_is_no_checkpoint(tmp_path: Path):
    assert load_newest(tmp_path / "none", pytest.fail) is None
