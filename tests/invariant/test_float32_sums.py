"""Gradients in half precision are summed in float32: a row that is seen 4,096 times has the gradient of 4,096."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlxft.model import logits as logits_module
from mlxft.model import logits as logprobs_module
from mlxft.model.adapters import prepare_full, unfreeze
from mlxft.model.logits import Split, hidden_logprobs, hidden_nll

HALVES = [mx.bfloat16, mx.float16]  # whose sums of ones end at 256 and 2,048
EMBEDDING = "model.embed_tokens.weight"
SEEN = 4096


def half(name: str, dtype: mx.Dtype) -> Any:
    """A tiny model in half precision, all of it trained."""
    model = build(name)
    model.set_dtype(dtype)
    prepare_full(model, "all", [], [])
    return model


def gradient(model: nn.Module, f: Callable[[], mx.array]) -> dict[str, mx.array]:
    def of(parameters: Any) -> mx.array:
        model.update(parameters)
        return f()

    before = model.trainable_parameters()
    found = dict(tree_flatten(mx.grad(of)(before)))
    model.update(before)
    return found


class Scaled(nn.Embedding):
    """As architectures have it that scale what they look up."""

    def __call__(self, ids: mx.array) -> mx.array:
        return 2.0 * super().__call__(ids)


def ids_of(*counts: int) -> mx.array:
    """Token i as often as the i-th count says, mixed; (4, N / 4)."""
    flat = mx.concatenate([mx.full((count,), token, dtype=mx.int32) for token, count in enumerate(counts)])
    return flat[mx.random.permutation(flat.size, key=mx.random.key(0))].reshape(4, -1)


@pytest.mark.parametrize("dtype", [*HALVES, mx.float32])
@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_an_embeddings_gradient_counts_every_token(kind: type[nn.Embedding], dtype: mx.Dtype) -> None:
    """What is looked up is the same as before, bit for bit."""
    model = nn.Sequential(kind(7, 3))
    model.set_dtype(dtype)
    ids = ids_of(SEEN, 1, 299, 0, 3700)
    before = model(ids)
    model.freeze()
    unfreeze(model, ["layers.0.weight"])
    unfreeze(model, ["layers.0.weight"])  # again is once
    assert mx.array_equal(model(ids), before)
    assert isinstance(model.layers[0], kind)
    found = gradient(model, lambda: model(ids).astype(mx.float32).sum())["layers.0.weight"]
    assert found.dtype == dtype
    scale = 2 if kind is Scaled else 1
    exact = mx.array([scale * n for n in (SEEN, 1, 299, 0, 3700, 0, 0)]).astype(dtype)
    assert mx.array_equal(found, mx.broadcast_to(exact[:, None], found.shape))
    assert list(dict(tree_flatten(model.parameters()))) == ["layers.0.weight"]
    assert mx.array_equal(model.layers[0].as_linear(mx.ones((1, 3), dtype)), model.layers[0].weight.sum(axis=1)[None])


@pytest.mark.parametrize("dtype", HALVES)
def test_so_does_the_bias_of_experts(dtype: mx.Dtype) -> None:
    """The experts' weights stay float32: MLX's CPU backend has no product of theirs in half precision."""
    model = nn.Sequential(SwitchLinear(4, 3, 5, bias=True))
    layer = model.layers[0]
    layer.bias = layer.bias.astype(dtype)
    picks = ids_of(SEEN, 1, 299, 0, 3700).reshape(-1, 1)
    x = mx.ones((picks.shape[0], 1, 1, 4))
    before = layer(x, picks)
    model.freeze()
    unfreeze(model, ["layers.0.bias"])
    assert mx.array_equal(layer(x, picks), before)
    found = gradient(model, lambda: layer(x, picks).sum())["layers.0.bias"]
    assert mx.array_equal(found[:, 0], mx.array([SEEN, 1, 299, 0, 3700]).astype(dtype))


@pytest.mark.parametrize("name", ["llama", "llama untied", "gpt2"])
def test_embeddings_of_a_model_in_bfloat16(name: str) -> None:
    """Also of positions, where a model has them: each is seen once a row."""
    model = half(name, mx.bfloat16)
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert tables
    for table, layer in tables.items():
        found = gradient(model, lambda layer=layer: layer(ids_of(SEEN)).astype(mx.float32).sum())
        assert mx.all(found[f"{table}.weight"][0] == SEEN)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(SEEN, 8), (4, SEEN // 4, 8)])
def test_vectors_count_every_token_as_they_are(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Norms and biases are summed by MLX's reductions, which need no help of ours where they add up in float32."""
    x, w = mx.ones(shape, dtype), mx.ones((8,), dtype)
    functions: list[Callable[[mx.array], mx.array]] = [
        lambda w: mx.fast.rms_norm(x, w, 0.0),
        lambda w: mx.fast.layer_norm(x, None, w, 1e-5),
        lambda w: mx.addmm(w, x, mx.eye(8, dtype=dtype)),
        lambda w: x @ mx.eye(8, dtype=dtype) + w,
    ]
    for function in functions:
        assert mx.all(mx.grad(lambda w, f=function: f(w).astype(mx.float32).sum())(w) == SEEN)


def chunked(model: nn.Module, reads: str, count: int) -> dict[str, mx.array]:
    """Gradient of the loss of `count` equal positions, in the head's parameters."""
    split = Split(model)
    hidden = mx.broadcast_to(0.5 * mx.random.normal((1, 32), key=mx.random.key(1)), (count, 32)).astype(mx.bfloat16)
    labels = mx.zeros(count, dtype=mx.int32)

    def loss() -> mx.array:
        if reads == "nll":
            return hidden_nll(split, hidden, labels, mx.ones(count), grad=True)
        return -hidden_logprobs(split, hidden, labels, grad=True).sum()

    return gradient(model, loss)


@pytest.mark.parametrize("reads", ["nll", "logprobs"])
@pytest.mark.parametrize(("name", "head"), [("llama", EMBEDDING), ("llama untied", "lm_head.weight")])
def test_a_heads_gradient_counts_every_chunk(name: str, head: str, reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 chunks of four positions have 1,024 times the gradient of one, which is a rounding apart from it."""
    for module in (logits_module, logprobs_module):
        monkeypatch.setattr(module, "chunk_size", lambda vocabulary: 4)
    model = half(name, mx.bfloat16)
    one, many = (chunked(model, reads, count)[head].astype(mx.float32) for count in (4, SEEN))
    assert float(mx.abs(one).max()) > 0
    assert mx.array_equal(many, 1024 * one)
