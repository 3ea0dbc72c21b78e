"""A fused model is the adapted one, for every architecture of mlx-lm that can be built tiny."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import ARCHITECTURES, MORE, NOT, build, names, scatter

from mlxft.exports.fuse import fuse_layers, uniform
from mlxft.model.adapters import LoRASpec, attach, select_targets
from mlxft.model.layers import LINEAR, LowRank, standing_in, standins, unpacked

IDS = mx.array([[3, 40, 12, 5, 21, 9]])


def logits(model: nn.Module) -> mx.array:
    """Of a few tokens; some architectures rule tokens out by an infinite one."""
    found = model(IDS)
    return mx.where(mx.isinf(found), 0, found)


def adapted(name: str, dora: bool) -> tuple[nn.Module, mx.array, mx.array]:
    """A tiny model with an adapter that does something; the base's logits, and the adapted ones."""
    model = build(name)
    base = logits(model)
    paths = select_targets(model, "all-linear", "all")
    if dora:  # which is for linear layers
        modules = dict(model.named_modules())
        paths = [path for path in paths if isinstance(modules[path], LINEAR)]
    mx.random.seed(0)
    attach(model, LoRASpec(tuple(paths), 2, 2.0, 0.0, dora))
    scatter(model, seed=2, only="lora_b")
    return model, base, logits(model)


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *MORE}))
def test_fused_is_adapted(name: str) -> None:
    model, base, wanted = adapted(name, dora=False)
    size = max(1.0, float(mx.abs(wanted).max()))
    assert float(mx.abs(wanted - base).max()) > 5e-3
    # What measuring puts in place of the layers is the fused model too.
    layers = standins(model, uniform(model, None))
    with unpacked(model), standing_in(model, layers):
        assert float(mx.abs(logits(model) - wanted).max()) < 1e-4 * size
    fuse_layers(model)
    assert not any(isinstance(m, LowRank) for m in model.modules())
    assert float(mx.abs(logits(model) - wanted).max()) < 1e-4 * size


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "mamba", "deepseek_v3", "qwen3_next", "rwkv7"])
def test_fused_dora_is_adapted(name: str) -> None:
    model, base, wanted = adapted(name, dora=True)
    assert float(mx.abs(wanted - base).max()) > 5e-3
    fuse_layers(model)
    assert float(mx.abs(logits(model) - wanted).max()) < 1e-4 * max(1.0, float(mx.abs(wanted).max()))


def test_every_architecture_is_tried_or_has_a_reason() -> None:
    tried = {name.split(" ")[0] for name in (*ARCHITECTURES, *MORE)}
    # A newer mlx-lm may have more; here stand all that this one has.
    assert set(names()) <= tried | NOT.keys()
    assert not tried & NOT.keys()
    print(f"{len(tried)} architectures; not tried: {NOT}")
