"""Fusing is a change of form: the fused model is the adapted model, whatever was adapted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.config import TuneSettings
from mlxft.exports.fuse import FLOAT, fuse_layers
from mlxft.model.adapters import LoRASpec, prepare_adapter, select_targets
from mlxft.model.layers import LowRank, dense_weight
from mlxft.model.load import load

Maker = Callable[..., Path]
IDS = mx.array([[3, 40, 77, 5, 21, 9, 250, 3]])
UNTIED = {"tie_word_embeddings": False}
BIASED = {"attention_bias": True, "mlp_bias": True}


def adapt(model: nn.Module, targets: Any, method: str = "lora", train: list[str] | None = None) -> mx.array:
    """Attach an adapter as a recipe would, move all that is trained, and give the logits."""
    tune = TuneSettings(method="dora" if method == "dora" else "lora", rank=4, alpha=8, rslora=method == "rslora")
    paths = select_targets(model, targets, "all", tune.method == "dora")
    mx.random.seed(0)
    spec = LoRASpec(tuple(paths), tune.rank, tune.multiplier, 0.1, tune.method == "dora")
    prepare_adapter(model, spec, train or [])
    key, leaves = mx.random.key(1), []
    for name, value in sorted(tree_flatten(model.trainable_parameters())):
        key, now = mx.random.split(key)
        leaves.append((name, value + 0.2 * mx.random.normal(value.shape, key=now)))
    model.update(tree_unflatten(leaves))
    model.eval()
    return model(IDS)


@pytest.mark.parametrize(
    ("kind", "settings", "targets", "method"),
    [
        *((kind, {}, "all-linear", "lora") for kind in ("llama", "qwen3", "gemma2", "phi3", "mixtral", "qwen3_moe")),
        *((kind, {}, "all-linear", "dora") for kind in ("llama", "qwen3", "gemma2", "phi3")),
        ("mixtral", {}, "attention", "dora"),
        ("llama", {}, "all-linear", "rslora"),
        ("mixtral", {}, ["switch_mlp"], "rslora"),
        ("llama", BIASED, "all-linear", "lora"),
        ("llama", BIASED, "all-linear", "dora"),
        ("qwen2", {}, "attention", "lora"),
        ("qwen2", {}, "attention", "dora"),
        ("llama", {}, ["embed_tokens"], "lora"),
        ("gemma2", {}, ["embed_tokens", "all-linear"], "lora"),
        ("llama", UNTIED, ["embed_tokens", "lm_head"], "lora"),
        ("llama", UNTIED, ["lm_head", "q_proj"], "dora"),
        ("qwen3_moe", UNTIED, ["lm_head", "embed_tokens", "mlp"], "lora"),
    ],
)
def test_fused_is_adapted(
    kind: str, settings: dict[str, Any], targets: Any, method: str, tmp_path: Path, make_model_dir: Maker
) -> None:
    model = load(str(make_model_dir(tmp_path / kind, kind, **settings)), dtype="float32").model
    base, names = model(IDS), {n: v.shape for n, v in tree_flatten(model.parameters())}
    adapted = adapt(model, targets, method)
    assert mx.abs(adapted - base).max() > 0.1
    assert set(fuse_layers(model).values()) == {FLOAT}
    assert mx.allclose(model(IDS), adapted, atol=1e-4)
    assert not any(isinstance(m, LowRank) for m in model.modules())
    assert {n: v.shape for n, v in tree_flatten(model.parameters())} == names


def test_scale_of_rslora_is_alpha_by_the_root_of_the_rank() -> None:
    assert TuneSettings(rank=16, alpha=8, rslora=True).multiplier == 2.0
    assert TuneSettings(rank=16, alpha=8).multiplier == 0.5


def test_modules_trained_whole_stay(tiny_model: Any) -> None:
    adapted = adapt(tiny_model.model, "attention", train=["embed_tokens", "model.norm"])
    fuse_layers(tiny_model.model)
    assert mx.allclose(tiny_model.model(IDS), adapted, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "targets", "method"),
    [
        ("llama", "all-linear", "lora"),
        ("llama", "all-linear", "dora"),
        ("mixtral", "all-linear", "lora"),
        ("llama", ["embed_tokens"], "lora"),
    ],
)
def test_more_bits_lose_less(kind: str, targets: Any, method: str, tmp_path: Path, make_model_dir: Maker) -> None:
    """On a 4-bit base: dequantised nothing is lost, and the error falls as the bits of the fused layers rise."""
    folder = make_model_dir(tmp_path / kind, kind)
    errors, rounding = {}, {}
    for bits in (3, None, 6, 8, 0):
        model = load(str(folder), dtype="float32", quantize=4, group_size=32).model
        adapted = adapt(model, targets, method)
        exact = {path: m.fused_weight() for path, m in model.named_modules() if isinstance(m, LowRank)}
        mx.eval(adapted, exact)
        done = fuse_layers(model, dequantize=bits == 0, bits=bits or None)
        assert {form.bits for form in done.values()} == {4 if bits is None else bits}
        fused = dict(model.named_modules())
        off = sum(float((dense_weight(fused[path]) - weight).square().sum()) for path, weight in exact.items())
        rounding[bits], errors[bits] = off**0.5, float(mx.sqrt(mx.mean((model(IDS) - adapted) ** 2)))
        assert not any(isinstance(m, LowRank) for m in model.modules())
        assert any("scales" in m for m in model.modules()) == (bits != 0)
    # A step is 2^bits - 1 times smaller than a group's range, and errors are even within it.
    assert rounding[3] / rounding[6] == pytest.approx(63 / 7, rel=0.1)
    # Where a base keeps its grid, an update within it is rounded by a noise: up to the root of two times as far.
    assert 0.9 * 255 / 15 < rounding[None] / rounding[8] < 1.1 * 2**0.5 * 255 / 15
    assert rounding[0] == 0
    assert min(errors[3], errors[None]) > 2 * errors[8] > 0
    assert errors[0] < 1e-4


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_fused_weights_have_the_bases_type(name: str, tiny_model_dir: Path) -> None:
    model = load(str(tiny_model_dir), dtype=name).model
    adapted = adapt(model, ["all-linear", "embed_tokens"]).astype(mx.float32)
    fuse_layers(model)
    assert {v.dtype for _, v in tree_flatten(model.parameters())} == {getattr(mx, name)}
    # Eight bits of mantissa for bfloat16, eleven for float16, next to logits of this size.
    off = mx.abs(model(IDS).astype(mx.float32) - adapted).mean() / mx.abs(adapted).mean()
    assert off < (0.05 if name == "bfloat16" else 0.01)
