"""`mlxft fuse`: from a run to a folder that other programs load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import mlxft
from mlxft.errors import ConfigError, ExportError, ModelError
from mlxft.exports.fuse import LostTooMuch, fuse_sources
from mlxft.exports.peft import export_peft, import_peft
from mlxft.files import claim
from mlxft.model.folder import weight_bytes
from mlxft.model.layers import QUANTIZED
from mlxft.runs import Run

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
    fused = fuse_sources(run.dir, out)
    assert f"wrote {out}" in fused.lines()[0]
    assert fused.chosen.kept == pytest.approx(1, abs=1e-6)
    assert fused.chosen.gap.agreement == 1
    assert fused.bytes == fused.chosen.bytes == weight_bytes(mlxft.load(out).model)
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
    with pytest.raises(ModelError, match=r"was fully fine-tuned and has no adapter; its model is .*model"):
        fuse_sources(run.dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_quantised_base(method: str, recipe: Recipe, tmp_path: Path) -> None:
    """QLoRA on 4 bits: each way to fuse loads everywhere, true to its config, and more bits keep more."""
    run = train(recipe(**{"tune.method": method, "model.quantize": 4, "model.group_size": 32}))
    adapted = logits(run.dir)
    errors: dict[str, float] = {}
    lost: dict[str, float] = {}
    for name, options in {"4": {"bits": 4}, "6": {"bits": 6}, "8": {"bits": 8}, "float": {"dequantize": True}}.items():
        out = tmp_path / name
        fused = fuse_sources(run.dir, out, force=True, **options)
        assert fused.bytes == fused.chosen.bytes
        assert fused.bytes == weight_bytes(mlxft.load(out).model)
        again = logits(out)
        assert mx.allclose(theirs(out), again, atol=1e-5)
        errors[name], lost[name] = float(mx.sqrt(mx.mean((again - adapted) ** 2))), fused.chosen.gap.divergence
        kinds = {m.bits for m in mlxft.load(out).model.modules() if isinstance(m, QUANTIZED)}
        config = config_of(out)
        if name == "float":
            assert kinds == set()
            assert "quantization" not in config
            continue
        # The embedding is not adapted: it stays at 4 bits.
        assert kinds == {4, int(name)}
        assert config["quantization"]["bits"] == 4
        assert config["quantization_config"] == config["quantization"]
    assert errors["4"] > 2 * errors["6"] > 4 * errors["8"] > 0
    assert errors["float"] < 1e-4
    assert lost["4"] > 2 * lost["6"] > 2 * lost["8"] > 1e-7
    assert lost["float"] < 1e-8


def test_quantised_experts(recipe: Recipe, make_model_dir: Maker, tmp_path: Path) -> None:
    """mlx-lm quantises the router of this one in its own way, which config.json says layer by layer."""
    # All experts for each token: where some are chosen, rounding changes the choice.
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts_per_tok": 4}
    folder = make_model_dir(tmp_path / "moe", "qwen3_moe", **sizes)
    quantized = {"model.path": str(folder), "model.quantize": 4, "model.group_size": 32}
    run = train(recipe(**quantized))
    adapted = logits(run.dir)
    for name, options in {"8": {"bits": 8}, "float": {"dequantize": True}, "auto": {"keep": 0.999}}.items():
        out = tmp_path / name
        fuse_sources(run.dir, out, **options)
        assert mx.allclose(theirs(out), logits(out), atol=1e-5)
        assert mx.abs(logits(out) - adapted).mean() < (1e-4 if name == "float" else 0.05) * mx.abs(adapted).mean()


def test_an_adapter_goes_onto_the_float_base_and_back(recipe: Recipe, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Trained on 8 bits, fused into the float base: the figures differ by what 8 bits are off."""
    run = train(recipe(**{"model.quantize": 8, "model.group_size": 32}))
    out = tmp_path / "out"
    assert fuse_sources(run.dir, out, model=str(tiny_model_dir / ".." / tiny_model_dir.name)).chosen.name == "float"
    fused, trained, bare = logits(out), logits(run.dir), logits(tiny_model_dir)
    assert "quantization" not in config_of(out)
    assert mx.abs(fused - trained).mean() < 0.1 * mx.abs(trained - bare).mean()
    packed = tmp_path / "q8"
    mlxft_convert(tiny_model_dir, packed)
    again = mlxft.load(packed, run.dir, dtype="float32").model(IDS)
    assert mx.allclose(again, trained, atol=1e-4)


def test_the_least_precision_that_keeps_enough(recipe: Recipe, tmp_path: Path) -> None:
    """A small update over 4 bits: plain requantising loses it; the choice keeps what --keep asks for, and says how."""
    run = mlxft.train(recipe(**{"model.quantize": 4, "model.group_size": 32, "optim.lr": 3e-3}))
    adapted, sizes = logits(run.dir), []
    with pytest.raises(LostTooMuch, match=r"of the adaptation is kept, --keep asks for 95.0%") as lost:
        fuse_sources(run.dir, tmp_path / "plain", bits=4)
    assert lost.value.fused.chosen.kept is not None
    assert lost.value.fused.chosen.kept < 0.8
    assert not (tmp_path / "plain").exists()
    for keep in (0.5, 0.95, 0.999):
        out = tmp_path / str(keep)
        fused = fuse_sources(run.dir, out, keep=keep)
        chosen = fused.chosen
        assert chosen.kept is not None
        assert chosen.kept >= keep
        assert all(trial.kept < keep for trial in fused.trials if trial.bytes < chosen.bytes and trial.kept is not None)
        assert fused.bytes == chosen.bytes == weight_bytes(mlxft.load(out).model)
        sizes.append(fused.bytes)
        # What is written is what was measured, here and in mlx-lm.
        kinds = {p: m.bits for p, m in mlxft.load(out).model.named_modules() if isinstance(m, QUANTIZED)}
        assert {p: kinds.get(p, 0) for p in chosen.forms} == {p: form.bits for p, form in chosen.forms.items()}
        assert mx.allclose(theirs(out), logits(out), atol=1e-5)
        off = mx.abs(adapted - logits(out)).mean() / mx.abs(adapted - bare(run)).mean()
        assert off < 2 * (1 - keep) ** 0.5
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def bare(run: Run) -> mx.array:
    """Logits of the base that a run was trained on."""
    settings = run.config.model
    return logits(settings.path, quantize=settings.quantize, group_size=settings.group_size)


def test_an_adapter_that_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    """Its layers are written as they were, not rounded again: there is nothing to keep, and nothing is lost."""
    run = mlxft.train(recipe(**{"model.quantize": 4, "model.group_size": 32, "optim.lr": 1e-30}))
    weights = mx.load(str(run.result / "adapters.safetensors"))
    assert isinstance(weights, dict)
    weights = {n: mx.zeros_like(v) if n.endswith("lora_b") else v for n, v in weights.items()}
    mx.save_safetensors(str(run.result / "adapters.safetensors"), weights)
    fused = fuse_sources(run.dir, tmp_path / "out", keep=1)
    assert fused.chosen.kept is None
    assert "there is nothing to keep" in fused.lines()[-1]
    assert mx.array_equal(logits(tmp_path / "out"), logits(run.dir))


def mlxft_convert(src: Path, dst: Path) -> None:
    from mlxft.exports.fuse import convert_model

    convert_model(str(src), dst, dtype="float32", quantize=8, group_size=32)


def test_what_it_is_made_of_is_not_overwritten(recipe: Recipe, make_model_dir: Maker, tmp_path: Path) -> None:
    """Neither the base, onto which the adapter would then come twice, nor the adapter."""
    base = make_model_dir(tmp_path / "base")
    run = train(recipe(**{"model.path": str(base)}))
    for folder, kind in ((base, "model"), (run.result, "adapter")):  # even if they are ours
        claim(folder, kind, [p.name for p in folder.iterdir()])
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    adapter = run.result
    into: list[tuple[Path, Callable[..., object]]] = [(base, fuse_sources), (adapter, export_peft)]
    for folder, export in into:
        with pytest.raises(ExportError, match="would be lost"):
            export(run.dir, folder, overwrite=True)
    with pytest.raises(ExportError, match="would be lost"):
        import_peft(adapter, adapter, overwrite=True)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_refusals(recipe: Recipe, tiny_model_dir: Path, tmp_path: Path, make_model_dir: Maker) -> None:
    run = train(recipe())
    with pytest.raises(ModelError, match="no such run or adapter"):
        fuse_sources(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ModelError, match=r"is neither a run nor an adapter"):
        fuse_sources(tiny_model_dir, tmp_path / "out")
    for options in ({"bits": 8}, {"dequantize": True}):
        with pytest.raises(ExportError, match="the base is not quantised"):
            fuse_sources(run.dir, tmp_path / "out", **options)
    other = make_model_dir(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ModelError, match="was trained on another base"):
        fuse_sources(run.dir, tmp_path / "out", model=str(other))
    assert not (tmp_path / "out").exists()
    fuse_sources(run.dir, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        fuse_sources(run.dir, tmp_path / "out")
    fuse_sources(run.dir, tmp_path / "out", overwrite=True)
