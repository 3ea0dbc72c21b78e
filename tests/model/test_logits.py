"""Body and head apart give the model's own losses and gradients, for every architecture that can be built tiny."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.model import logits as logits_module
from mlxft.model.adapters import LoRASpec, attach, prepare_full, select_targets, unfreeze
from mlxft.model.load import load
from mlxft.model.logits import Split, rows_nll

# What mlx-lm's architectures call their sizes; each takes those that its ModelArgs has.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "rope_traditional": False,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.5,
    "rotary_dim": 4,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "bias": False,
    "hidden_act": "silu",
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "layer_types": ["full_attention", "full_attention"],
    # gpt-2 and kin
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "n_inner": 48,
    "num_layers": 2,
    # mixtures
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # state-space models
    "state_size": 8,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 4,
    "use_conv_bias": True,
    # what some scale or cap by
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 3.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.2,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "use_qkv_bias": False,
}
_YARN = {
    "type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}
UNTIED = {"tie_word_embeddings": False}
PLAIN = (
    "Klear afmoe cohere cohere2 deepseek dots1 ernie4_5 exaone falcon_h1 gemma gemma2 gemma3_text glm glm4 gpt2 "
    "gpt_bigcode gptj granite granitemoe helium hunyuan_v1_dense internlm2 internlm3 iquestloopcoder llama mamba mimo "
    "minicpm mixtral nanochat nemotron olmo2 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 "
    "stablelm starcoder2 telechat3 youtu_llm"
)
# Name -> what differs from SIZES.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN.split()},
    "llama untied": UNTIED,
    "minicpm untied": UNTIED,
    "granite untied": UNTIED,
    "apertus": {"post_norm": False, "qk_norm": True},
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy"},
    "deepseek_v3": {"rope_scaling": _YARN, "topk_method": "noaux_tc"},
    "exaone4": {"sliding_window_pattern": "LG"},
    "glm4_moe": {"use_qk_norm": True},
    "gpt_neox": {"rotary_emb_base": 10000},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "time_step_limit": [0.0, 100.0]},
    "minicpm3": {
        "rope_scaling": {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    },
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "rwkv7": {"a_low_rank_dim": 4, "v_low_rank_dim": 4, "gate_low_rank_dim": 4, "decay_low_rank_dim": 4},
}
# The head stands within the body: all logits are computed.
WHOLE = {"gpt_neox"}


def build(name: str) -> nn.Module:
    """A tiny model of an architecture of mlx-lm, with random weights."""
    module = importlib.import_module(f"mlx_lm.models.{name.split(' ')[0]}")
    known = {field.name for field in dataclasses.fields(module.ModelArgs)}
    settings = {k: v for k, v in SIZES.items() if k in known} | {"model_type": name} | ARCHITECTURES[name]
    model = module.Model(module.ModelArgs.from_dict(settings))
    scatter(model, seed=1)
    model.eval()
    return model


def scatter(model: nn.Module, seed: int, only: str = "") -> None:
    """Random values for matrices whose name holds `only` (heads and LoRA's B may be zero at first)."""
    key, leaves = mx.random.key(seed), []
    for name, value in sorted(tree_flatten(model.parameters())):
        key, now = mx.random.split(key)
        if value.ndim > 1 and only in name:
            leaves.append((name, 0.2 * mx.random.normal(value.shape, key=now)))
    model.update(tree_unflatten(leaves))


def batch(vocab: int, rows: int = 2, width: int = 7, n: int = 9) -> dict[str, mx.array]:
    """Ids and `n` positions with labels; one weighs nothing, one twice."""
    r = np.random.default_rng(0)
    positions = np.sort(r.choice(rows * width, n, replace=False))
    weights = np.ones(n, dtype=np.float32)
    weights[1], weights[2] = 0.0, 2.0
    return {
        "ids": mx.array(r.integers(0, vocab, (rows, width)).astype(np.int32)),
        "positions": mx.array(positions.astype(np.int32)),
        "labels": mx.array(r.integers(0, vocab, n).astype(np.int32)),
        "weights": mx.array(weights),
    }


def plain_nll(model: nn.Module, b: dict[str, mx.array]) -> mx.array:
    """The same sum from all logits."""
    logits = model(b["ids"]).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = logprobs.reshape(-1, logits.shape[-1])[b["positions"]]
    return -(mx.take_along_axis(chosen, b["labels"][:, None], axis=1)[:, 0] * b["weights"]).sum()


def value_and_gradient(model: nn.Module, f: Callable[[], mx.array]) -> tuple[float, dict[str, mx.array]]:
    """As the training loop asks: in the trainable parameters, which come back as they were."""

    def of(parameters: Any) -> mx.array:
        model.update(parameters)
        return f()

    before = model.trainable_parameters()
    value, gradient = mx.value_and_grad(of)(before)
    model.update(before)
    return float(value), dict(tree_flatten(gradient))


def assert_same_as_plain(model: nn.Module, split: Split | None = None) -> dict[str, mx.array]:
    """Value and gradients of `rows_nll` are those of the plain sum. Returns the gradients."""
    split = split or Split(model)
    b = batch(64)
    wanted, slopes = value_and_gradient(model, lambda: plain_nll(model, b))
    value, found = value_and_gradient(model, lambda: rows_nll(split, **b, grad=True))
    assert value == pytest.approx(wanted, rel=1e-5)
    assert float(rows_nll(split, **b, grad=False)) == pytest.approx(wanted, rel=1e-5)
    assert found.keys() == slopes.keys() != set()
    for name, slope in slopes.items():
        size = max(float(mx.abs(slope).max()), 1e-3)
        assert float(mx.abs(found[name] - slope).max()) <= 1e-5 * max(size, 1.0) + 1e-5 * size, name
    return found


def adapt(model: nn.Module, targets: str | list[str], dora: bool = False) -> None:
    """An adapter that does something."""
    attach(model, LoRASpec(tuple(select_targets(model, targets, "all", dora)), 2, 2.0, 0.0, dora))
    scatter(model, seed=2, only="lora_b")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine positions are three chunks, the last one partial."""
    monkeypatch.setattr(logits_module, "CHUNK", 4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_gradients_of_every_architecture(name: str) -> None:
    model = build(name)
    split = Split(model)
    assert split.separable == (name not in WHOLE)
    adapt(model, "all-linear")
    assert_same_as_plain(model, split)


@pytest.mark.parametrize(
    "name", ["llama", "llama untied", "gemma2", "cohere", "granite", "minicpm", "gpt_neox", "mamba"]
)
def test_gradients_of_whole_models(name: str) -> None:
    """The head is trained too: the embedding where they are tied."""
    model = build(name)
    prepare_full(model, "all", [], [])
    found = assert_same_as_plain(model)
    heads = [n for n in found if "lm_head" in n or "embed" in n]
    assert heads
    assert all(mx.abs(found[n]).max().item() > 0 for n in heads)


HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"


@pytest.mark.parametrize(
    ("name", "targets", "train", "read"),
    [
        ("llama", "all-linear", [], []),
        ("llama untied", "all-linear", [], []),
        ("llama untied", [HEAD, "q_proj"], [], [f"{HEAD}.lora_a", f"{HEAD}.lora_b"]),
        ("llama untied", [EMBEDDING], [], []),
        ("llama", [EMBEDDING, "q_proj"], [], [f"{EMBEDDING}.lora_a", f"{EMBEDDING}.lora_b"]),
        ("llama", "attention", [f"{EMBEDDING}.weight"], [f"{EMBEDDING}.weight"]),
        ("llama untied", "attention", [f"{EMBEDDING}.weight"], []),
        ("llama untied", "attention", [f"{HEAD}.weight", "model.norm.weight"], [f"{HEAD}.weight"]),
        ("llama", "attention", ["model.norm.weight"], []),
        ("phi", "attention", [f"{HEAD}.bias"], [f"{HEAD}.bias"]),
        ("nanochat", [HEAD], [], [f"{HEAD}.lora_a", f"{HEAD}.lora_b"]),
    ],
)
def test_what_the_head_reads_of_what_is_trained(
    name: str, targets: str | list[str], train: list[str], read: list[str]
) -> None:
    model = build(name)
    # Found before the adapter has learnt anything: its update is zero then.
    paths = select_targets(model, targets, "all")
    attach(model, LoRASpec(tuple(paths), 2, 2.0))
    unfreeze(model, train)
    split = Split(model)
    assert sorted(split.trained_head()) == sorted(read)
    scatter(model, seed=3, only="lora_b")
    assert_same_as_plain(model, split)


def test_what_the_head_reads_of_whole_models() -> None:
    tied, untied = build("llama"), build("llama untied")
    for model in (tied, untied):
        prepare_full(model, "all", [], [])
    assert list(Split(tied).trained_head()) == [f"{EMBEDDING}.weight"]
    assert list(Split(untied).trained_head()) == [f"{HEAD}.weight"]
    # A head of zeros is read as well.
    untied.lm_head.weight = mx.zeros_like(untied.lm_head.weight)
    assert list(Split(untied).trained_head()) == [f"{HEAD}.weight"]


def test_what_is_trained_may_change() -> None:
    model = build("llama untied")
    split = Split(model)
    adapt(model, [HEAD])
    assert len(split.trained_head()) == 2
    assert_same_as_plain(model, split)
    model.lm_head.freeze()
    model.unfreeze(keys=["weight"], recurse=True)
    model.lm_head.linear.freeze()
    assert split.trained_head() == {}
    assert_same_as_plain(model, split)
    model.lm_head.linear.unfreeze()
    assert list(split.trained_head()) == [f"{HEAD}.linear.weight"]
    assert_same_as_plain(model, split)


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    model.train()
    prepare_full(model, "all", [], [])
    body, embedding = model.model, model.model.embed_tokens.weight
    split = Split(model)
    value_and_gradient(model, lambda: rows_nll(split, **batch(64), grad=True))
    assert model.model is body
    assert mx.array_equal(model.model.embed_tokens.weight, embedding)
    assert model.training
    assert not any(mx.isnan(v).any().item() for _, v in tree_flatten(model.parameters()))


def test_a_body_that_is_called_twice_is_not_taken_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama").model

        def __call__(self, ids: mx.array) -> mx.array:
            return self.model.embed_tokens.as_linear(self.model(ids) + self.model(ids[:, ::-1]))

    model = Twice()
    model.freeze()
    model.model.norm.unfreeze()
    assert not Split(model).separable
    assert_same_as_plain(model)


def test_quantised_head(tmp_path: Path, make_model_dir: Callable[..., Path]) -> None:
    model = load(str(make_model_dir(tmp_path / "m", vocab_size=64)), dtype="float32", quantize=4, group_size=32).model
    adapt(model, ["q_proj", "embed_tokens"])
    assert_same_as_plain(model)


@pytest.mark.parametrize("whole", [False, True])
def test_logits_of_all_positions_never_exist(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 positions of a vocabulary of 16,384 are 67 MB of logits, and as much of their gradient; 16 are trained."""
    monkeypatch.setattr(logits_module, "CHUNK", 128)
    monkeypatch.setitem(ARCHITECTURES, "llama", {"vocab_size": 16384})
    model = build("llama")
    if whole:
        prepare_full(model, "all", [], [])
    else:
        adapt(model, "all-linear")
    split, b = Split(model), batch(16384, rows=4, width=256, n=16)
    mx.eval(model.parameters(), b)

    def peak(f: Callable[[], mx.array]) -> float:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        _, gradient = value_and_gradient(model, f)
        mx.eval(gradient)
        return (mx.get_peak_memory() - before) / 1e6

    split.trained_head()
    assert peak(lambda: rows_nll(split, **b, grad=True)) < 40
    assert peak(lambda: plain_nll(model, b)) > 130
