"""`mlxft fuse --recipe`: the fused model quantised by mlx-lm's own tools, and what that keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.quant import gptq

import mlxft
from mlxft.errors import ConfigError, ExportError
from mlxft.exports.fuse import Fused, LostTooMuch, Meter, fuse_sources
from mlxft.model.layers import QUANTIZED

Recipe = Callable[..., dict[str, Any]]
Maker = Callable[..., Path]
IDS = mx.array([[3, 40, 77, 5, 21, 9]])


def train(settings: dict[str, Any]) -> Path:
    return mlxft.train({**settings, "optim": {"lr": 0.05, "schedule": "constant", "warmup": 0}}).dir


def check(fused: Fused, run: Path) -> dict[str, int]:
    """The folder, as mlx-lm and as mlxft load it, is the model that was measured. Returns the bits of its layers."""
    loaded = mlxft.load(fused.out)
    assert mx.allclose(mlx_lm.load(str(fused.out))[0](IDS), loaded.model(IDS), atol=1e-4)
    meter = Meter(loaded, fused.probe)
    gap = meter.gap(Meter(mlxft.load(run), fused.probe).read(), meter.read())
    assert gap.divergence == pytest.approx(fused.chosen.gap.divergence, rel=1e-3)
    config = json.loads((fused.out / "config.json").read_text("utf-8"))
    assert config["quantization"] == config["quantization_config"]
    assert fused.bytes == fused.chosen.bytes
    return {path: m.bits for path, m in loaded.model.named_modules() if isinstance(m, QUANTIZED)}


@pytest.mark.parametrize(
    ("tool", "bits", "base"),
    [
        ("mixed", {4, 5}, {"model.quantize": 4, "model.group_size": 32, "tune.method": "dora"}),
        ("awq", {4}, {}),
        ("gptq", {4, 6}, {}),
        ("dwq", {4}, {}),
    ],
)
def test_each_is_what_was_measured(
    tool: str, bits: set[int], base: dict[str, Any], recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, random = train(recipe(**base)), np.random.get_state()[1].tolist()
    capsys.readouterr()
    fused = fuse_sources(run, tmp_path / "out", recipe=tool, rows="train", keep=0.5, tell=print)
    told, err = capsys.readouterr()
    assert err == ""
    assert f"\n{tool}: " in told, "progress is told, here on stdout"
    assert all(line.startswith(("measuring", "loading", "writing", f"{tool}: ")) for line in told.splitlines())
    assert [trial.name.split(",")[0] for trial in fused.trials] == ["float", "plain 4 bits", tool]
    assert fused.trials[0].gap.divergence < 1e-6
    assert fused.chosen is fused.trials[2]
    layers = check(fused, run)
    assert set(layers.values()) == bits
    assert "model.embed_tokens" in layers, "what is not adapted is quantised too"
    assert "calibrated on" in fused.notes[0]
    assert np.random.get_state()[1].tolist() == random


def test_experts_in_half_precision_layers(recipe: Recipe, make_model_dir: Maker, tmp_path: Path) -> None:
    """Mixtures, which awq does not know; gptq, whose sums float16 does not hold."""
    folder = make_model_dir(tmp_path / "moe", "mixtral")
    run = train(recipe(**{"model.path": str(folder)}))
    check(fuse_sources(run, tmp_path / "out", recipe="mixed", rows="train", keep=0.3, bits=3), run)
    with pytest.raises(ExportError, match=r"awq: .* this model is mixtral; try --recipe mixed or gptq or dwq"):
        fuse_sources(run, tmp_path / "no", recipe="awq")
    half = train(recipe(**{"model.dtype": "float16", "run.name": "half"}))
    fused = fuse_sources(half, tmp_path / "half", recipe="gptq", rows="train", keep=0.3)
    assert fused.chosen.gap.divergence < fused.trials[1].gap.divergence


def test_rows_that_are_measured_are_not_calibrated_on(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe())
    rows = str(tmp_path / "rows-10.jsonl")
    with pytest.raises(ConfigError, match=r"--rows .*: all its rows are measured on; name other rows"):
        fuse_sources(run, tmp_path / "out", recipe="dwq", rows=rows, probe=rows)
    with pytest.raises(LostTooMuch, match="try more --bits or another --recipe") as lost:
        fuse_sources(run, tmp_path / "out", recipe="mixed", bits=2, keep=0.999)
    assert "rows of it that are measured on" in lost.value.fused.notes[0]
    assert not (tmp_path / "out").exists()


def test_refusals(recipe: Recipe, make_model_dir: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = train(recipe()), tmp_path / "out"
    for options, said in (
        ({"recipe": "mixed", "dequantize": True}, "--dequantize writes float"),
        ({"rows": "train"}, "--rows is what a --recipe calibrates on"),
        ({"recipe": "best"}, "--recipe best: expected mixed, awq, gptq, dwq"),
        ({"recipe": "gptq", "bits": 3}, "gptq takes 2, 4, 8 bits; 3 bits: mixed, awq, dwq"),
        ({"recipe": "mixed", "bits": 8}, "8 bits: awq, gptq"),
        ({"recipe": "dwq", "rows": "valid"}, "--rows valid: the run has no validation rows"),
    ):
        with pytest.raises(ConfigError, match=said):
            fuse_sources(run, out, **options)
    aware = train(recipe(**{"tune.quantize_aware": 4, "run.name": "aware"}))
    with pytest.raises(ExportError, match="was trained for 4 bits"):
        fuse_sources(aware, out, recipe="mixed")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "the", "chosen": "in the", "rejected": "on a"}\n' * 4, "utf-8")
    data = {"train": str(pairs), "format": "preference"}
    with pytest.raises(ExportError, match="this is a reward model"):
        fuse_sources(train(recipe(objective="reward", data=data, **{"run.name": "reward"})), out, recipe="dwq")
    narrow = make_model_dir(tmp_path / "narrow", intermediate_size=48)
    with pytest.raises(ExportError, match=r"down_proj is 48 wide"):
        fuse_sources(train(recipe(**{"model.path": str(narrow), "run.name": "narrow"})), out, recipe="dwq")

    def fails(*_: Any, **__: Any) -> None:
        raise AttributeError("no such layer")

    monkeypatch.setattr(gptq, "gptq_quantize", fails)
    with pytest.raises(
        ExportError, match=r"gptq: mlx-lm's tool failed on this model \(no such layer\); try --recipe m"
    ):
        fuse_sources(run, out, recipe="gptq")
    assert not out.exists()


def test_command(recipe: Recipe, tmp_path: Path) -> None:
    """Only the result goes to stdout."""
    run = train(recipe())
    command = [sys.executable, "-m", "mlxft", "fuse", str(run), str(tmp_path / "out"), "--recipe", "dwq", "--bits", "6"]
    done = subprocess.run([*command, "--rows", "train", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["recipe"], len(found["tried"]), set(found["bits"].values())) == ("dwq", 3, {6})
