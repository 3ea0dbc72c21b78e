"""A packed row's loss and gradients are those of the row alone, for every architecture that a mask suffices for."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from test_logits import ARCHITECTURES, adapt, build, value_and_gradient

from mlxft.data.dataset import Encoded
from mlxft.errors import ModelError
from mlxft.model.adapters import prepare_full
from mlxft.model.layers import checkpoint_layers
from mlxft.model.logits import PackCache, Packing, Split, rows_nll
from mlxft.objectives.sft import SFTBatch, make_batch, pack_batch

STATE = {"falcon_h1": "CacheList", "mamba": "ArraysCache", "mamba2": "ArraysCache", "rwkv7": "ArraysCache"}
# Learned positions; and one whose second pass over the layers masks by itself.
REFUSED = {"gpt2", "gpt_bigcode", "iquestloopcoder", *STATE}
# Windows of 16 tokens, of which rows of 20 are wider.
WINDOWS = ["cohere2", "exaone4", "gemma3_text", "gpt_oss", "olmo3"]
LENGTHS = ((20, 9), (5, 18, 4))
WIDTH = 32


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Adapters begin at random; at a kink of an activation float32's noise would choose the slope."""
    mx.random.seed(0)


def sequences() -> list[list[Encoded]]:
    """Rows of random tokens, about half of them trained."""
    r = np.random.default_rng(3)

    def row(n: int) -> Encoded:
        trained = r.random(n) < 0.5
        trained[0], trained[-1] = False, True
        return Encoded(r.integers(0, 64, n).astype(np.int32), trained, f"row of {n}")

    return [[row(n) for n in lengths] for lengths in LENGTHS]


def nll(split: Split, data: SFTBatch) -> mx.array:
    return rows_nll(split, data.ids, data.positions, data.labels, data.weights, grad=True, segments=data.segments)


def alone(model: nn.Module) -> tuple[float, dict[str, mx.array]]:
    """Sums over the rows, each in a batch of its own."""
    split, total = Split(model), 0.0
    slopes: dict[str, mx.array] = {}
    for row in (row for sequence in sequences() for row in sequence):
        data = make_batch([row], len(row.ids)).data
        value, more = value_and_gradient(model, lambda d=data: nll(split, d))
        total += value
        slopes = {n: slopes[n] + g if n in slopes else g for n, g in more.items()}
    return total, slopes


def packed(model: nn.Module) -> tuple[float, dict[str, mx.array]]:
    """The same rows in two sequences."""
    data, split = pack_batch(sequences(), WIDTH).data, Split(model)
    assert data.ids.shape == (2, WIDTH)
    return value_and_gradient(model, lambda: nll(split, data))


def assert_same(model: nn.Module) -> None:
    wanted, slopes = alone(model)
    value, found = packed(model)
    assert value == pytest.approx(wanted, rel=1e-5)
    assert found.keys() == slopes.keys() != set()
    largest = max(float(mx.abs(slope).max()) for slope in slopes.values())
    assert largest > 1e-2
    for name, slope in slopes.items():
        assert float(mx.abs(found[name] - slope).max()) <= 1e-4 * max(largest, 1.0), name


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in REFUSED])
def test_packed_rows_are_as_alone(name: str) -> None:
    model = build(name)
    adapt(model, "all-linear")
    assert_same(model)


class Wide(PackCache):
    """Knows of no window."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        return super().make_mask(N)


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_kept(name: str) -> None:
    """The rows are wider than the window, and the window matters: it is not there by chance that they agree."""
    model = build(name)
    ids = mx.array(sequences()[0][0].ids[None])
    assert ids.shape[1] > 16
    wide = [Wide(mx.ones(ids.shape, mx.int32)) for _ in model.layers]
    seen = model(ids, cache=Packing(model).caches(mx.ones(ids.shape, mx.int32)))
    assert mx.allclose(seen, model(ids), rtol=1e-4, atol=1e-4)
    assert not mx.allclose(seen, model(ids, cache=wide), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt_neox", "deepseek_v3"])
def test_whole_models(name: str) -> None:
    model = build(name)
    prepare_full(model, "all", [], [])
    assert_same(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "qwen3_moe", "phi3", "deepseek_v3"])
def test_with_checkpointed_layers(name: str) -> None:
    model = build(name)
    adapt(model, "all-linear")
    model.train()
    plain = packed(model)
    checkpoint_layers(model)
    value, found = packed(model)
    assert value == pytest.approx(plain[0], rel=1e-6)
    for key, slope in plain[1].items():
        assert mx.allclose(found[key], slope, rtol=1e-4, atol=1e-5), key
    assert_same(model)


@pytest.mark.parametrize("name", sorted(STATE))
def test_a_recurrent_state_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^batch.pack: {name} carries more than keys .*\({STATE[name]}\)"):
        Packing(build(name))


@pytest.mark.parametrize("name", sorted(REFUSED - STATE.keys()))
def test_what_does_not_keep_rows_apart_is_refused(name: str) -> None:
    model = build(name)
    model.train()
    with pytest.raises(ModelError, match=rf"^batch.pack: {name} does not keep packed rows apart: logits .* differ by"):
        Packing(model)
    assert model.training


def test_a_model_that_takes_no_cache_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(4, 4)]
            self.embed = nn.Embedding(8, 4)

        def __call__(self, ids: mx.array) -> mx.array:
            return self.layers[0](self.embed(ids))

    with pytest.raises(
        ModelError, match=r"Plain does not keep packed rows apart: its own code fails .*\(TypeError: .*cache"
    ):
        Packing(Plain())


@pytest.mark.parametrize("weights", [True, False])
def test_a_model_that_asks_its_caches_for_more_is_refused_by_a_sentence(weights: bool) -> None:
    said = r"gemma3n does not keep packed rows apart: its own code fails .* caches \(AttributeError: .*keys_and_values"
    with pytest.raises(ModelError, match=rf"^batch\.pack: {said}'\); remove batch\.pack$"):
        Packing(build("gemma3n"), weights=weights)


def test_positions_that_change_attention_far_out_are_refused() -> None:
    """Some scale attention from a position on: rows at the end of a long sequence would not be as alone."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama")
            self.layers = self.inner.layers

        def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
            start = cache[0].offset if cache else 0
            scale = 1 + mx.floor((start + mx.arange(ids.shape[1])) / 64)
            return self.inner(ids, cache=cache) * scale[:, None]

    model = Scaled()
    Packing(model, 64)
    with pytest.raises(ModelError, match="does not keep packed rows apart"):
        Packing(model, 65)


def test_half_precision_is_no_reason_to_refuse() -> None:
    model = build("llama")
    model.set_dtype(mx.bfloat16)
    Packing(model, 512)


def test_padding_sees_itself() -> None:
    """A softmax over nothing would be NaN, and NaN would reach the loss through the gradient."""
    mask = PackCache(mx.array([[1, 1, 2, 0, 0]])).make_mask(5)
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].astype(mx.int32).tolist() == wanted
    model = build("llama")
    adapt(model, "all-linear")
    assert all(mx.isfinite(g).all().item() for g in packed(model)[1].values())


def test_mask_of_one_row_is_mlx_lms() -> None:
    ours, theirs = PackCache(mx.ones((1, 9), mx.int32)), KVCache()
    for window in (None, 4):
        wanted = theirs.make_mask(9, return_array=True, window_size=window)
        assert mx.array_equal(ours.make_mask(9, window_size=window)[0, 0], wanted)


def test_the_batch() -> None:
    rows = [row for sequence in sequences() for row in sequence]
    batch = pack_batch(sequences(), WIDTH)
    a = batch.data
    assert a.segments.tolist()[0] == [1] * 20 + [2] * 9 + [0] * 3
    ids = np.array(a.ids).reshape(-1)
    assert batch.tokens == 56
    assert batch.trained_tokens == len(a.labels) == sum(int(row.trained.sum()) for row in rows)
    # Each label stands right behind its position, in the same row.
    assert ids[np.array(a.positions) + 1].tolist() == a.labels.tolist()
    numbers = np.array(a.segments).reshape(-1)
    assert (numbers[np.array(a.positions) + 1] == numbers[np.array(a.positions)]).all()
    assert a.labels.tolist() == [int(t) for row in rows for t in row.ids[row.trained]]
    assert make_batch(rows, 20).data.segments is None
