"""mlxft fuse, mlxft convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.runs import load_run

Command = Callable[..., Any]
SHORT = ("--max-tokens", "6")


@pytest.fixture
def trained(write: Callable[..., str], mlxft: Command) -> str:
    """A run of two steps, in runs/a."""
    assert mlxft("train", write(**{"run.steps": 2, "optim.lr": 0.05})).code == 0
    return "runs/a"


def test_a_fused_run_answers_as_the_run(trained: str, mlxft: Command) -> None:
    done = mlxft("fuse", trained, "fused")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("fused 14 layers; wrote fused (0.1 MB of weights)\n")
    assert "built-in text" in done.out  # the run had no validation rows
    answers = [mlxft("generate", "--model", m, "the in", *SHORT).out for m in (trained, "fused")]
    assert answers[0] == answers[1]
    assert mlxft("fuse", f"{trained}/adapter", "again").code == 0


def test_out_that_exists_stays_unless_it_may_go(
    trained: str, mlxft: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    assert mlxft("fuse", trained, "fused").code == 0
    assert "fused: exists already; give another name, or overwrite it (--overwrite)" in refused(
        2, "fuse", trained, "fused"
    )
    assert mlxft("fuse", trained, "fused", "--overwrite").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for more in ((), ("--overwrite",)):
        assert "file: exists and is a file" in refused(2, "fuse", trained, "file", *more)
        assert "mine: " in refused(2, "convert", "fused", "mine", *more)
    assert "is not a model folder that this" in refused(2, "fuse", trained, "mine", "--overwrite")


def test_wrong_use_of_fuse(trained: str, refused: Callable[..., str], tiny_model_dir: Path) -> None:
    assert "runs/nope: no such run or adapter" in refused(1, "fuse", "runs/nope", "out")
    assert "is neither a run nor an adapter" in refused(1, "fuse", str(tiny_model_dir), "out")
    for option in (("--dequantize",), ("--bits", "8")):
        err = refused(1, "fuse", trained, "out", *option)
        assert "the base is not quantised: --dequantize and --bits have nothing to act on" in err


def test_options_of_fuse_on_a_quantised_base(write: Callable[..., str], mlxft: Command, tmp_path: Path) -> None:
    recipe = write(**{"model.quantize": 4, "model.group_size": 32, "run.steps": 1, "tune.targets": ["q_proj"]})
    assert mlxft("train", recipe).code == 0
    assert mlxft("fuse", "runs/a", "plain", "--bits", "4", "--force").code == 0
    assert mlxft("fuse", "runs/a", "eight", "--bits", "8", "--force").code == 0
    assert "float" in mlxft("fuse", "runs/a", "wide", "--dequantize").out

    def config(name: str) -> Any:
        return json.loads((tmp_path / name / "config.json").read_text())

    layer = "model.layers.0.self_attn.q_proj"
    assert config("plain")["quantization"]["bits"] == 4
    assert config("eight")["quantization"][layer]["bits"] == 8
    assert "quantization" not in config("wide")
    assert load_run("wide").model.layers[0].self_attn.q_proj.weight.shape == (32, 32)


def test_convert(write: Callable[..., str], mlxft: Command, refused: Callable[..., str], tiny_model_dir: Path) -> None:
    write()
    done = mlxft("convert", str(tiny_model_dir), "q4", "--quantize", "4", "--group-size", "32")
    assert (done.code, done.out, done.err) == (0, "wrote q4\n", "")
    assert load_run("q4").config["quantization"]["group_size"] == 32
    assert mlxft("convert", "q4", "plain", "--dequantize", "--dtype", "bfloat16").code == 0
    assert "quantization" not in load_run("plain").config
    assert "q4: exists already" in refused(2, "convert", str(tiny_model_dir), "q4")
    assert "no such file or folder" in refused(1, "convert", "./nope", "out")
    assert "is not one of" in refused(2, "convert", str(tiny_model_dir), "out", "--quantize", "7")
