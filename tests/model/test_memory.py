"""Checkpointing changes nothing but the memory; limits hold inside their block only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxft.errors import TrainingError
from mlxft.model.adapters import LoRASpec, attach, select_targets
from mlxft.model.layers import checkpoint_layers, is_checkpointed, limits
from mlxft.model.load import load

IDS = mx.array([[5, 9, 1, 7, 3, 3, 2, 8], [4, 4, 6, 1, 9, 2, 0, 0]])


def adapted(folder: Path) -> Any:
    model = load(str(folder), dtype="float32").model
    mx.random.seed(3)
    attach(model, LoRASpec(tuple(select_targets(model, "all-linear", "all")), 4, 2.0))
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):  # at zero, half of the gradients would be
            model.load_weights([(name, mx.random.normal(value.shape) * 0.1)], strict=False)
    model.train()
    return model


def gradients(model: Any) -> dict[str, mx.array]:
    def loss(params: Any) -> mx.array:
        model.update(params)
        return model(IDS).square().sum()

    params = model.trainable_parameters()
    value, grads = mx.value_and_grad(loss)(params)
    model.update(params)
    return {"": value, **dict(tree_flatten(grads))}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_checkpointed_is_plain(kind: str, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """The same loss and the same gradients; switching twice is switching once; switching off brings back the class."""
    model = adapted(make_model_dir(tmp_path / kind, kind))
    classes = [type(layer) for layer in model.layers]
    plain = gradients(model)
    checkpoint_layers(model)
    checkpoint_layers(model)
    assert is_checkpointed(model)
    for name, value in gradients(model).items():
        assert mx.allclose(value, plain[name], rtol=1e-5, atol=1e-5).item(), name
    assert [type(layer).__mro__[1] for layer in model.layers] == classes
    checkpoint_layers(model, False)
    assert [type(layer) for layer in model.layers] == classes


def test_only_this_model(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path / "llama", "llama")
    one, other = adapted(folder), adapted(folder)
    checkpoint_layers(one)
    assert is_checkpointed(one)
    assert not is_checkpointed(other)


def test_less_is_kept(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """With many layers, most of what backward needs is computed again."""
    folder = make_model_dir(tmp_path / "deep", "llama", num_hidden_layers=16)
    peaks = []
    for on in (False, True):
        model = adapted(folder)
        checkpoint_layers(model, on)
        ids = mx.ones((8, 128), dtype=mx.int32)
        before = mx.get_active_memory()
        mx.reset_peak_memory()

        def loss(params: Any, model: Any = model, ids: mx.array = ids) -> mx.array:
            model.update(params)
            return model(ids).square().sum()

        mx.eval(mx.value_and_grad(loss)(model.trainable_parameters()))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.5 * peaks[0], peaks


def test_limits_end_with_their_block() -> None:
    """Unless the recipe says so, the cache of freed buffers keeps MLX's own limit."""
    memory = mx.set_memory_limit(10**9)
    cache = mx.set_cache_limit(10**8)
    try:
        with limits(2.0, None):
            assert mx.set_cache_limit(10**8) == 10**8
        with limits(2.0, 0.25):
            assert mx.set_cache_limit(250_000_000) == 250_000_000
            assert mx.set_memory_limit(2_000_000_000) == 2_000_000_000
        assert mx.set_memory_limit(memory) == 10**9
        assert mx.set_cache_limit(cache) == 10**8
    finally:
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)


def test_running_out_says_what_helps(recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The three settings that help most, and nothing of the run is lost."""
    import mlxft
    from mlxft.trainer.loop import Loop

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 99999999999 bytes.")

    monkeypatch.setattr(Loop, "_update", fail)
    with pytest.raises(TrainingError, match=r"batch\.tokens.*memory\.checkpoint: on.*model\.quantize"):
        mlxft.train(recipe())
