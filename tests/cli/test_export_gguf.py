"""mlxft export --format gguf and ollama, as a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.fixture
def trained(write: Callable[..., str], mlxft: Command) -> str:
    """A run of two steps, in runs/a."""
    assert mlxft("train", write(**{"run.steps": 2, "optim.lr": 0.05})).code == 0
    return "runs/a"


def test_a_run_goes_out_as_gguf_and_comes_back(trained: str, mlxft: Command, tmp_path: Path) -> None:
    done = mlxft("export", trained, "a.gguf", "--format", "GGUF", "--type", "F32")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("wrote a.gguf (")
    assert mlxft("fuse", trained, "fused").code == 0
    asked = [mlxft("generate", "--model", m, "the in", "--max-tokens", "6").out for m in ("a.gguf", "fused")]
    assert asked[0] == asked[1]
    pushed = json.loads(mlxft("push", "a.gguf", "ada/a", "--run", trained, "--dry-run", "--json").out)
    assert [f["path"] for f in pushed["files"]] == ["README.md", "a.gguf", "curves.png"]
    assert "llama-cli -m a/a.gguf" in pushed["card"]
    told = json.loads(mlxft("export", trained, "l.gguf", "--format", "gguf", "--lora", "--json").out)
    assert (told["out"], told["format"], told["type"]) == ("l.gguf", "gguf", "f16")
    assert (tmp_path / "l.gguf").stat().st_size < (tmp_path / "a.gguf").stat().st_size


def test_a_run_goes_out_for_ollama(trained: str, mlxft: Command, tmp_path: Path) -> None:
    done = mlxft("export", trained, "out", "--format", "ollama", "--type", "q8_0")
    assert (done.code, done.err) == (0, "")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".mlxft.json", "Modelfile", "model.gguf"]
    assert (tmp_path / "out" / "Modelfile").read_text("utf-8").splitlines()[0].startswith("FROM ./model.gguf")
    pushed = mlxft("push", "out", "ada/out", "--run", trained, "--dry-run")
    assert pushed.code == 0
    assert "ollama create out -f out/Modelfile" in pushed.out


def test_what_export_refuses(trained: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "--lora is for --format gguf" in refused(2, "export", trained, "o", "--format", "ollama", "--lora")
    assert "--format" in refused(2, "export", trained, "o")
    assert "--imatrix is for --format gguf" in refused(2, "export", trained, "o", "--format", "peft", "--imatrix")
    assert "--probe is for --measure" in refused(2, "export", trained, "o", "--format", "gguf", "--probe", "valid")
    (tmp_path / "mine.gguf").write_text("thesis")
    assert "exists already" in refused(2, "export", trained, "mine.gguf", "--format", "gguf")
    assert "must end in .gguf" in refused(2, "export", trained, "mine", "--format", "gguf")
    assert "ModelError" in refused(1, "export", "runs/nope", "o.gguf", "--format", "gguf")


def test_a_file_is_converted_to_few_bits_and_measured(trained: str, mlxft: Command) -> None:
    assert mlxft("export", trained, "a.gguf", "--format", "gguf", "--type", "q8_0").code == 0
    done = mlxft("convert", "a.gguf", "b", "--quantize", "4", "--group-size", "32", "--measure")
    assert (done.code, done.err) == (0, "")
    assert "KL a token " in done.out
    assert mlxft("generate", "--model", "a.gguf", "the in", "--max-tokens", "3").code == 0


def test_the_types_that_are_offered() -> None:
    from mlxft.cli.export import _TYPES
    from mlxft.exports.gguf import _FILE_TYPES

    assert sorted(_TYPES) == sorted(_FILE_TYPES)
