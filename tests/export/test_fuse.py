"""`mlxft fuse`: from a run to a folder that other programs load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import mlxft
from mlxft.errors import ExportError, ModelError
from mlxft.export.fuse import fuse
from mlxft.model.lora import QUANTIZED
from mlxft.rundir import Run

Recipe = Callable[..., dict[str, Any]]
Maker = Callable[..., Path]
IDS = mx.array([[3, 40, 77, 5, 21, 9]])


def train(settings: dict[str, Any]) -> Run:
    return mlxft.train({**settings, "optim": {"lr": 0.05, "schedule": "constant", "warmup": 0}})


def logits(path: str | Path, **options: Any) -> mx.array:
    return mlxft.load(path, **options).model(IDS).astype(mx.float32)


def theirs(path: Path, **options: Any) -> mx.array:
    return mlx_lm.load(str(path), **options)[0](IDS).astype(mx.float32)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"tune.method": "lora"},
        {"tune.method": "dora"},
        {"tune.train": ["embed_tokens"]},
        {"tune.targets": ["embed_tokens", "all-linear"]},
    ],
)
def test_fused_run(changes: dict[str, Any], recipe: Recipe, tiny_model_dir: Path, tmp_path: Path) -> None:
    run = train(recipe(**changes))
    out = tmp_path / "out"
    said = fuse(run.dir, out)
    assert f"wrote {out}" in said[0]
    adapted = logits(run.dir)
    assert mx.abs(adapted - logits(str(tiny_model_dir))).max() > 1e-2
    assert mx.allclose(logits(out), adapted, atol=1e-4)
    assert mx.allclose(theirs(out), adapted, atol=1e-4)
    assert config_of(out)["model_type"] == "llama"
    assert sorted(p.name for p in out.iterdir() if p.suffix == ".safetensors") == ["model.safetensors"]


def test_the_same_run_in_mlx_lm(recipe: Recipe, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its loader, and its fuse as a program of its own, make of the adapter what mlxft makes of it."""
    run = train(recipe(**{"tune.method": "dora"}))
    adapted = logits(run.dir)
    assert mx.allclose(theirs(tiny_model_dir, adapter_path=str(run.result)), adapted, atol=1e-4)
    out = tmp_path / "theirs"
    arguments = ["--model", str(tiny_model_dir), "--adapter-path", str(run.result), "--save-path", str(out)]
    done = subprocess.run([sys.executable, "-m", "mlx_lm", "fuse", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert mx.allclose(logits(out), adapted, atol=1e-4)


def test_a_whole_model_needs_no_fusing(recipe: Recipe, tmp_path: Path) -> None:
    settings = recipe(**{"tune.method": "full", "tune.rank": None})
    run = train(settings)
    assert mx.array_equal(theirs(run.result), logits(run.dir))
    with pytest.raises(ModelError, match=r"trained whole, there is no adapter to fuse; its model is .*model"):
        fuse(run.dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_quantised_base(method: str, recipe: Recipe, tmp_path: Path) -> None:
    """QLoRA on 4 bits: each way to fuse loads everywhere, true to its config, and more bits lose less."""
    run = train(recipe(**{"tune.method": method, "model.quantize": 4, "model.group_size": 32}))
    adapted = logits(run.dir)
    errors: dict[str, float] = {}
    for name, options in {"4": {}, "6": {"bits": 6}, "8": {"bits": 8}, "float": {"dequantize": True}}.items():
        out = tmp_path / name
        said = fuse(run.dir, out, **options)
        again = logits(out)
        assert mx.allclose(theirs(out), again, atol=1e-5)
        errors[name] = float(mx.sqrt(mx.mean((again - adapted) ** 2)))
        kinds = {m.bits for m in mlxft.load(out).model.modules() if isinstance(m, QUANTIZED)}
        config = config_of(out)
        if name == "float":
            assert kinds == set()
            assert "quantization" not in config
            assert "nothing of the adapter is rounded away" in said[1]
            continue
        # The embedding is not adapted: it stays at 4 bits.
        assert kinds == {4, int(name)}
        assert config["quantization"]["bits"] == 4
        assert config["quantization_config"] == config["quantization"]
        assert f"rounded to {name} bits again" in said[1]
        # After a few steps at a high rate the adapter is far larger than the rounding: no advice.
        assert said[1].endswith("times as far as the adapter did")
    assert errors["4"] > 2 * errors["6"] > 4 * errors["8"] > 0
    assert errors["float"] < 1e-4


def test_quantised_experts(recipe: Recipe, make_model_dir: Maker, tmp_path: Path) -> None:
    """mlx-lm quantises the router of this one in its own way, which config.json says layer by layer."""
    folder = make_model_dir(tmp_path / "moe", "qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    quantized = {"model.path": str(folder), "model.quantize": 4, "model.group_size": 32}
    run = train(recipe(**quantized))
    adapted = logits(run.dir)
    for name, options in {"8": {"bits": 8}, "float": {"dequantize": True}}.items():
        out = tmp_path / name
        fuse(run.dir, out, **options)
        assert mx.allclose(theirs(out), logits(out), atol=1e-5)
        assert mx.abs(logits(out) - adapted).mean() < (0.05 if name == "8" else 1e-4) * mx.abs(adapted).mean()


def test_an_adapter_goes_onto_the_float_base_and_back(recipe: Recipe, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Trained on 8 bits, fused into the float base: the figures differ by what 8 bits are off."""
    run = train(recipe(**{"model.quantize": 8, "model.group_size": 32}))
    out = tmp_path / "out"
    assert len(fuse(run.dir, out, model=str(tiny_model_dir / ".." / tiny_model_dir.name))) == 1
    fused, trained, bare = logits(out), logits(run.dir), logits(tiny_model_dir)
    assert "quantization" not in config_of(out)
    assert mx.abs(fused - trained).mean() < 0.1 * mx.abs(trained - bare).mean()
    packed = tmp_path / "q8"
    mlxft_convert(tiny_model_dir, packed)
    again = mlxft.load(packed, run.dir, dtype="float32").model(IDS)
    assert mx.allclose(again, trained, atol=1e-4)


def test_an_update_smaller_than_the_rounding_is_said_to_drown(recipe: Recipe, tmp_path: Path) -> None:
    settings = recipe(**{"model.quantize": 4, "model.group_size": 32, "optim.lr": 1e-4})
    run = mlxft.train(settings)
    moved = {}
    for bits, advice in {
        4: "--bits 8 keeps more, --dequantize keeps all of it",
        8: "drown the fine-tune: --dequantize",
    }.items():
        said = fuse(run.dir, tmp_path / str(bits), bits=bits)[1]
        found = re.search(r"([\d.e+]+) times as far as the adapter did", said)
        assert found, said
        moved[bits] = float(found[1])
        assert advice in said
    assert moved[4] > 10 * moved[8] > 2.5


def mlxft_convert(src: Path, dst: Path) -> None:
    from mlxft.export.convert import convert

    convert(str(src), dst, dtype="float32", quantize=8, group_size=32)


def test_refusals(recipe: Recipe, tiny_model_dir: Path, tmp_path: Path, make_model_dir: Maker) -> None:
    run = train(recipe())
    with pytest.raises(ModelError, match="no such run or adapter"):
        fuse(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ModelError, match=r"is neither a run nor an adapter"):
        fuse(tiny_model_dir, tmp_path / "out")
    for options in ({"bits": 8}, {"dequantize": True}):
        with pytest.raises(ExportError, match="the base is not quantised"):
            fuse(run.dir, tmp_path / "out", **options)
    other = make_model_dir(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ModelError, match="was trained on another base"):
        fuse(run.dir, tmp_path / "out", model=str(other))
    assert not (tmp_path / "out").exists()
    fuse(run.dir, tmp_path / "out")
    with pytest.raises(ExportError, match="exists already"):
        fuse(run.dir, tmp_path / "out")
    fuse(run.dir, tmp_path / "out", overwrite=True)
