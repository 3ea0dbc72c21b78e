"""mlxft export --format peft and seq-cls, mlxft import."""

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


def test_out_and_in_again_it_answers_as_the_run(trained: str, mlxft: Command, tmp_path: Path) -> None:
    done = mlxft("export", trained, "out", "--format", "peft")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("wrote out: LoRA of rank 4 on 14 modules, lora_alpha 16, for ")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
    told = json.loads(mlxft("import", "out", "back", "--json").out)
    assert told["out"] == "back"
    answers = [mlxft("generate", "--model", m, "the in", "--max-tokens", "6").out for m in (trained, "back")]
    assert answers[0] == answers[1] != ""


def test_what_export_and_import_refuse(trained: str, mlxft: Command, refused: Callable[..., str]) -> None:
    for form in ("peft", "seq-cls"):
        assert "--type is for" in refused(2, "export", trained, "o", "--format", form, "--type", "f16")
        assert "--lora is for" in refused(2, "export", trained, "o", "--format", form, "--lora")
    assert "gives text, not scores" in refused(1, "export", trained, "o", "--format", "seq-cls")
    assert mlxft("export", trained, "out", "--format", "peft").code == 0
    assert "out: exists already" in refused(2, "export", trained, "out", "--format", "peft")
    assert "not an adapter folder" in refused(2, "export", "out", trained, "--format", "peft", "--overwrite")
    told = json.loads(mlxft("export", trained, "out", "--format", "peft", "--overwrite", "--json").out)
    assert (told["format"], told["out"]) == ("peft", "out")
    assert "it already is an adapter of mlxft or mlx-lm" in refused(1, "import", "runs/a/adapter", "o")
    assert "nowhere: no such folder" in refused(1, "import", "nowhere", "o")
    assert "Example: mlxft import" in mlxft("import", "--help").out
