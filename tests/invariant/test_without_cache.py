"""A model reads without a cache, as in training, what it reads with one, as it generates."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import ARCHITECTURES, MORE, build, scatter
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlxft.model.adapters import LoRASpec, attach, select_targets
from mlxft.model.layers import checkpoint_layers
from mlxft.model.logits import Split, rows_nll

IDS = mx.array([[3, 40, 12, 5, 21, 9]])


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *MORE}))
def test_without_a_cache_as_with_one(name: str) -> None:
    model = build(name)
    plain, cached = (mx.where(mx.isinf(v), 0, v) for v in (model(IDS), model(IDS, cache=make_prompt_cache(model))))
    assert mx.abs(plain - cached).max().item() < 1e-4 * max(1.0, mx.abs(plain).max().item())


def slopes(model: nn.Module) -> dict[str, mx.array]:
    split, params = Split(model), model.trainable_parameters()

    def loss(params: object) -> mx.array:
        model.update(params)
        batch = {"positions": mx.arange(5), "labels": IDS[0, 1:], "weights": mx.ones(5)}
        return rows_nll(split, IDS, **batch, grad=True)

    found = dict(tree_flatten(mx.grad(loss)(params)))
    model.update(params)
    return found


def test_shared_keys_and_values_pass_the_gradient_of_checkpointed_blocks() -> None:
    """Gemma 3n: two layers, of which the last two read keys and values, get a gradient from those; theirs is none."""
    model = build("gemma3n")
    attach(model, LoRASpec(tuple(select_targets(model, ["k_proj", "v_proj"], "all")), 2, 2.0))
    scatter(model, seed=2, only="lora_b")
    model.train()
    plain = slopes(model)
    checkpoint_layers(model)
    kept = slopes(model)
    for name, slope in plain.items():
        assert mx.allclose(kept[name], slope, rtol=1e-4, atol=1e-6), name
        assert (mx.abs(slope).max().item() > 1e-4) == ("layers.0" in name or "layers.1" in name), name
