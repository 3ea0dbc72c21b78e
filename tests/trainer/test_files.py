"""Files are whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlxft.errors import CheckpointError
from mlxft.files import digest, save_arrays, write_beside, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def half(beside: Path) -> None:
        beside.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"a\.txt: No space left on device; what was saved before is unchanged"):
        write_beside(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def stopped(beside: Path) -> None:
        beside.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beside(path, stopped)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_new_content_replaces_old_and_makes_folders(tmp_path: Path):
    path = tmp_path / "b" / "c" / "a.txt"
    write_text(path, "old")
    write_text(path, "newer é")
    assert path.read_text(encoding="utf-8") == "newer é"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_path_below_a_file_is_a_checkpoint_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_arrays_come_back_bit_for_bit(tmp_path: Path):
    arrays = {"b": mx.random.normal((3, 5)), "a": mx.array([1, 2], mx.uint32), "c": mx.ones(3, mx.bfloat16) / 3}
    save_arrays(tmp_path / "x.safetensors", arrays)
    back = mx.load(str(tmp_path / "x.safetensors"))
    assert isinstance(back, dict)
    assert set(back) == set(arrays)
    for name, value in arrays.items():
        assert back[name].dtype == value.dtype
        assert mx.array_equal(back[name], value)


def test_arrays_that_do_not_fit_are_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="No space left"):
        save_arrays(tmp_path / "x.safetensors", {"a": mx.zeros(300)})
    assert not list(tmp_path.iterdir())


def test_digest_sees_one_byte(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"x" * 2_000_000)
    (tmp_path / "b").write_bytes(b"x" * 1_999_999 + b"y")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"x" * 2_000_000)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_half_a_character_is_written_as_the_escape_that_json_has(tmp_path: Path):
    line = {"prediction": "a \ud83d, é"}
    write_text(tmp_path / "a.jsonl", json.dumps(line, ensure_ascii=False))
    text = (tmp_path / "a.jsonl").read_text("utf-8")
    assert text == '{"prediction": "a \\ud83d, é"}'
    assert json.loads(text) == line
