"""What a kill leaves is removed by the next command there; what a living process writes, and the user's, is not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mlxft.errors import ExportError
from mlxft.model.folder import replace_folder
from mlxft.owned import claim
from mlxft.temporary import clear, discard, temporary
from mlxft.train.files import write_text


@pytest.fixture(scope="module")
def ended() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_only_what_dead_processes_left_is_removed(tmp_path: Path, ended: int):
    gone = [f".tmp-mlxft-{ended}-a.json", f".m.partial-{ended}"]
    kept = [
        f".tmp-mlxft-{os.getppid()}-a.json",
        f".m.partial-{os.getppid()}",
        ".tmp-notes",
        f"m.partial-{ended}",
        ".git",
    ]
    for name in [*gone, *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
        if name.endswith(f".partial-{ended}"):
            claim(tmp_path / name, "model")
    (tmp_path / f".users.partial-{ended}").mkdir()  # it has no mark, so it may be anybody's
    kept.append(f".users.partial-{ended}")
    (tmp_path / f".tmp-mlxft-{ended}-b.json").write_text("half")
    clear(tmp_path)
    assert names(tmp_path) == sorted(kept)
    write_text(tmp_path / "a.json", "whole")
    assert names(tmp_path) == sorted([*kept, "a.json"])
    clear(tmp_path / "nowhere")


def test_a_folder_moved_aside_gets_its_name_back(tmp_path: Path, ended: int):
    """The kill came between the two renames: neither the old nor the new one had the name."""
    (tmp_path / f".m.old-{ended}").mkdir()
    claim(tmp_path / f".m.old-{ended}", "model", ["config.json"])
    (tmp_path / f".m.old-{ended}" / "config.json").write_text("old")
    with pytest.raises(ExportError), replace_folder(tmp_path / "m", "model"):
        raise OSError("a full disk")
    assert names(tmp_path) == ["m"]
    assert (tmp_path / "m/config.json").read_text() == "old"
    (tmp_path / f".m.old-{ended}").mkdir()
    claim(tmp_path / f".m.old-{ended}", "model")
    with replace_folder(tmp_path / "m", "model") as part:
        (part / "config.json").write_text("new")
    assert names(tmp_path) == ["m"]


def test_what_is_discarded_is_renamed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed before anything within it is gone, it no longer has its name."""
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3/weights").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("mlxft.temporary._remove", lambda path: None)
        discard(tmp_path / "step-3")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".tmp-mlxft-{os.getpid()}-")
    assert (left / "weights").exists()
    discard(tmp_path / "not there")
    (tmp_path / "link").symlink_to(left)
    discard(tmp_path / "link")
    assert (left / "weights").exists(), "a link is removed, not what it leads to"


def test_a_temporary_name_keeps_the_ending_and_fits(tmp_path: Path):
    path = temporary(tmp_path / ("x" * 240 + ".safetensors"))
    path.write_text("")
    assert path.suffix == ".safetensors"
