"""What a kill leaves is removed by the next command there; what a living process writes, and the user's, is not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlxft.errors import CheckpointError, ExportError
from mlxft.files import claim, clear, discard, save_arrays, temporary, write_beside, write_text
from mlxft.model.folder import replace_folder


@pytest.fixture(scope="module")
def ended() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_full_disk_leaves_nothing_and_is_said_of_the_place_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def write() -> None:
        with replace_folder(tmp_path / "m", "model") as part:
            raise ExportError(f"{part}/model.gguf: needs 5 GB")

    with pytest.raises(ExportError, match=rf"^{tmp_path}/m/model.gguf: needs 5 GB$"):
        write()
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match=rf"cannot write to {tmp_path}: No space"):
        claim(tmp_path, "model")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 15))

    def save(path: str, *_: object) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 225 bytes to file.")

    monkeypatch.setattr("mlx.core.save_safetensors", save)
    with pytest.raises(CheckpointError, match=r"a.safetensors: No space left on device \(16 bytes are needed\)"):
        write_beside(tmp_path / "a.safetensors", lambda p: save_arrays(p, {"w": mx.zeros(4)}))
    assert names(tmp_path) == []


def test_a_name_of_255_bytes_has_a_temporary_one(tmp_path: Path):
    write_text(tmp_path / ("\N{GREEK SMALL LETTER ALPHA}" * 125 + ".json"), "whole")


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
        patch.setattr("mlxft.files._remove", lambda path: None)
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
