"""Routers of mixtures: which layers they are in every architecture, and what they say while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import ARCHITECTURES, MORE, build
from mlx.utils import tree_flatten

from mlxft.errors import ConfigError
from mlxft.model.adapters import LoRASpec, prepare_adapter, prepare_full, select_targets
from mlxft.model.layers import SOFTMAX, SWITCH, checkpoint_layers, is_router, watch_routers, watching
from mlxft.model.load import load
from mlxft.objectives.functional import load_balance

IDS = mx.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
MASK = mx.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
# Wherever mlx-lm has experts; qwen3_5 has them where its configuration says so.
MIXTURES = [
    *("Klear", "bailing_moe", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe"),
    *("glm4_moe", "gpt_oss", "granitemoe", "granitemoehybrid", "hunyuan", "jamba", "kimi_linear", "laguna", "lfm2_moe"),
    *("llama4", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "mistral4", "mixtral", "nemotron_h", "olmoe"),
    *("phimoe", "phixtral", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "step3p5"),
    "gemma4_text moe",
]
# Whose mixture they have.
OWN = {"qwen3_5_moe": "qwen3_next", "qwen3_vl_moe": "qwen3_moe", "gemma4_text moe": "gemma4_text"}


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_adapted_by_name_only(name: str) -> None:
    """Not among all-linear and mlp, which have the experts; what opens a shared expert or a neuron is no router."""
    model = build(name)
    linear = select_targets(model, "all-linear", "all")
    assert not [p for p in linear if {"gate", "router"} & set(p.split("."))]
    modules = dict(model.named_modules())
    experts = [p for p, m in modules.items() if isinstance(m, SWITCH)]
    assert set(experts) <= set(linear)
    for ending in ("gate_proj", "shared_expert_gate", "up_proj"):
        there = [p for p, m in modules.items() if p.endswith(f".{ending}") and isinstance(m, (nn.Linear, *SWITCH))]
        assert {p for p in there if not is_router(p)} <= set(linear)


@pytest.mark.parametrize(
    ("name", "pattern", "found"),
    [
        ("mixtral", "gate", "block_sparse_moe.gate"),
        ("qwen3_moe", "mlp.gate", "mlp.gate"),
        ("granitemoe", "router.layer", "block_sparse_moe.router.layer"),
        ("gpt_oss", ["router", "q_proj"], "mlp.router"),
    ],
)
def test_a_router_that_is_named_is_adapted(name: str, pattern: Any, found: str) -> None:
    paths = select_targets(build(name), pattern, "all")
    assert f"model.layers.0.{found}" in paths


@pytest.mark.parametrize("name", [n for n in MIXTURES if OWN.get(n, n) in SOFTMAX])
def test_what_routers_say(name: str) -> None:
    """8 real tokens, 2 experts each; the model's own numbers stay, and so do those of a call that nobody watches."""
    model = build(name)
    before = model(IDS)
    watch_routers(model, "tune.router_aux")
    model.train()
    with watching({IDS.shape: MASK}) as seen:
        after = model(IDS)
    assert mx.array_equal(after, before)
    assert len(seen) == sum(any(n in m for n in ("gate", "router")) for _, m in model.named_modules())
    for sums in seen.values():
        assert sums.shape == (2, 4)
        assert sums[0].sum().item() == 16
        assert sums[1].sum().item() == pytest.approx(8, abs=1e-5)
    model(IDS)
    model.eval()
    with watching({IDS.shape: MASK}) as probed:
        model(IDS)
    assert not probed
    assert all(sums[0].sum().item() == 16 for sums in seen.values())


@pytest.mark.parametrize("name", [n for n in MIXTURES if OWN.get(n, n) not in SOFTMAX])
def test_routers_that_are_not_a_plain_softmax_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"tune\.router_aux: .* mixtral.*; those of {name} are not known to"):
        watch_routers(build(name), "tune.router_aux")


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.router_aux: this model has no routers to balance"):
        watch_routers(build("llama"), "tune.router_aux")


def test_every_architecture_that_is_balanced_is_tried() -> None:
    assert set(SOFTMAX) <= {OWN.get(name, name) for name in MIXTURES}
    assert set(MIXTURES) <= {*ARCHITECTURES, *MORE}


@pytest.fixture
def mixtral(make_model_dir: Callable[..., Path], tmp_path: Path) -> nn.Module:
    return load(str(make_model_dir(tmp_path / "mixtral", "mixtral")), dtype="float32").model


def test_sums_are_those_of_a_plain_computation(mixtral: nn.Module) -> None:
    """softmax(x W^T) of the real tokens, and how often each expert is among the two likeliest."""
    watch_routers(mixtral, "")
    mixtral.train()
    block = mixtral.model.layers[0].block_sparse_moe
    x = mx.random.normal((2, 5, 32), key=mx.random.key(0))
    with watching({(2, 5): MASK}) as seen:
        block(x)
    (sums,) = seen.values()
    logits = np.array(x, np.float64).reshape(10, 32)[np.array(MASK).reshape(-1) == 1] @ np.array(block.gate.weight).T
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    often = np.bincount(np.argsort(-logits, axis=1)[:, :2].reshape(-1), minlength=4)
    np.testing.assert_allclose(np.array(sums), [often, shares.sum(axis=0)], rtol=1e-5)


def balance_and_slopes(model: nn.Module, ids: mx.array) -> tuple[float, dict[str, mx.array]]:
    def loss(params: Any) -> mx.array:
        model.update(params)
        with watching({ids.shape: MASK}) as seen:
            out = model(ids)
        return mx.stack([load_balance(*sums) for sums in seen.values()]).mean() + 0.0 * out.sum()

    value, grads = mx.value_and_grad(loss)(model.trainable_parameters())
    return value.item(), dict(tree_flatten(grads))


@pytest.mark.parametrize("method", ["lora", "full", "router"])
def test_the_gradient_goes_through_checkpointed_blocks(mixtral: nn.Module, method: str) -> None:
    """The same value and gradient; nothing of padding is in it; routers and what lies below them have one."""
    if method == "full":
        prepare_full(mixtral, "all", [], [])
    else:
        targets = select_targets(mixtral, "all-linear" if method == "lora" else ["gate", "q_proj"], "all")
        prepare_adapter(mixtral, LoRASpec(tuple(targets), 4, 2.0), [])
        key = mx.random.key(1)
        for _, module in mixtral.named_modules():
            if "lora_b" in module:
                module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=key)
    watch_routers(mixtral, "")
    mixtral.train()
    value, slopes = balance_and_slopes(mixtral, IDS)
    other, same = balance_and_slopes(mixtral, mx.where(MASK, IDS, 9))
    checkpoint_layers(mixtral)
    again, kept = balance_and_slopes(mixtral, IDS)
    assert value > 1.001
    assert (other, again) == pytest.approx((value, value), rel=1e-6)
    wanted = "layers.1.block_sparse_moe.gate" if method != "lora" else "layers.0.block_sparse_moe.switch_mlp"
    assert max(mx.abs(v).max().item() for n, v in slopes.items() if wanted in n) > 1e-6
    for name, slope in slopes.items():
        assert mx.allclose(kept[name], slope, rtol=1e-4, atol=1e-7), name
        if "embed" not in name:
            assert mx.allclose(same[name], slope, rtol=1e-4, atol=1e-7), name


def test_the_gradient_is_that_of_the_probabilities(mixtral: nn.Module) -> None:
    """The choice is a constant: with shares p of a token x, dL/dW = E / n sum over tokens of p (f - p f) x^T."""
    watch_routers(mixtral, "")
    mixtral.train()
    block = mixtral.model.layers[0].block_sparse_moe
    x = mx.random.normal((2, 5, 32), key=mx.random.key(0))
    weight = block.gate.weight

    def loss(weight: mx.array) -> mx.array:
        block.gate.weight = weight
        with watching({(2, 5): MASK}) as seen:
            block(x)
        return load_balance(*next(iter(seen.values())))

    slope = mx.grad(loss)(weight)
    tokens = np.array(x, np.float64).reshape(10, 32)[np.array(MASK).reshape(-1) == 1]
    logits = tokens @ np.array(weight, np.float64).T
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    f = np.bincount(np.argsort(-logits, axis=1)[:, :2].reshape(-1), minlength=4) / 16
    wanted = 4 / 8 * (p * (f - (p @ f)[:, None])).T @ tokens
    np.testing.assert_allclose(np.array(slope), wanted, rtol=1e-4, atol=1e-6)
