"""LoRA and QLoRA on the experts of a mixture: those that were chosen learn, the others stay, and fusing keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxft.config import OptimSettings
from mlxft.exports.fuse import fuse_layers
from mlxft.model.adapters import LoRASpec, attach, select_targets
from mlxft.model.cpu import quicker
from mlxft.model.layers import SWITCH, LoRASwitchLinear, LowRank
from mlxft.model.load import load
from mlxft.model.logits import Split, rows_nll
from mlxft.trainer.optim import Optimizer

EXPERTS = 128  # of which 2 x 40 choices can not take all
STEPS = 10
Chosen = dict[str, set[int]]


def choices(model: nn.Module, ids: mx.array, monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """Which experts each adapted layer is asked for."""
    seen: dict[int, mx.array] = {}
    plain = LoRASwitchLinear.__call__

    def call(self: LoRASwitchLinear, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        seen[id(self)] = indices
        return plain(self, x, indices, sorted_indices)

    with monkeypatch.context() as patched, quicker(model):
        patched.setattr(LoRASwitchLinear, "__call__", call)
        mx.eval(model(ids))
    return {n: set(seen[id(m)].reshape(-1).tolist()) for n, m in model.named_modules() if id(m) in seen}


def train(model: nn.Module, ids: mx.array, monkeypatch: pytest.MonkeyPatch) -> list[Chosen]:
    """Ten steps on one batch, a label for every position; what was chosen in each."""
    optimizer = Optimizer(OptimSettings(weight_decay=0.0), model)
    split = Split(model)
    labels = mx.random.randint(0, 64, (ids.size,), key=mx.random.key(2))
    batch = {"ids": ids, "positions": mx.arange(ids.size), "labels": labels, "weights": mx.ones(ids.size)}

    def loss(params: Any) -> mx.array:
        model.update(params)
        return rows_nll(split, **batch, grad=True)

    found = []
    for _ in range(STEPS):
        found.append(choices(model, ids, monkeypatch))
        params = model.trainable_parameters()
        with quicker(model):
            grads = mx.grad(loss)(params)
        model.update(params)
        optimizer.step(model, dict(tree_flatten(grads)), mx.array(float(ids.size)), 1e-3)
        mx.eval(model.parameters())
    return found


# mlx-lm sorts what 64 and more choices take.
@pytest.mark.parametrize(("targets", "tokens"), [("all-linear", 12), (["switch_mlp"], 40)])
@pytest.mark.parametrize("bits", [None, 4], ids=["lora", "qlora"])
@pytest.mark.parametrize(("kind", "count"), [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")])
def test_chosen_experts_learn(
    kind: str,
    count: str,
    bits: int | None,
    targets: Any,
    tokens: int,
    make_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_model_dir(tmp_path / kind, kind, hidden_size=64, **{count: EXPERTS})
    model = load(str(folder), dtype="float32", quantize=bits, group_size=32 if bits else None).model
    mx.random.seed(0)
    attach(model, LoRASpec(tuple(select_targets(model, targets, "all")), 2, 2.0))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRASwitchLinear)}
    assert len(layers) == 6
    assert {type(m.linear) for m in layers.values()} == {QuantizedSwitchLinear if bits else SwitchLinear}
    before = {n: mx.array(m.lora_a) for n, m in layers.items()}
    model.train()
    ids = mx.random.randint(0, 64, (2, tokens // 2), key=mx.random.key(1))
    base = model(ids)
    seen = train(model, ids, monkeypatch)
    for name, layer in layers.items():
        ever = set().union(*(step[name] for step in seen))
        always = set.intersection(*(step[name] for step in seen))
        assert always
        assert len(ever) < EXPERTS
        moved_b = rows_that(layer.lora_b != 0)
        moved_a = rows_that(layer.lora_a != before[name])
        assert moved_b == ever, name
        # A has a gradient once B is no longer zero.
        assert always <= moved_a <= ever, name
    model.eval()
    wanted = model(ids)
    assert mx.abs(wanted - base).max().item() > 1e-2
    fuse_layers(model, dequantize=bits is not None)
    assert not any(isinstance(m, LowRank) for m in model.modules())
    assert any(isinstance(m, SWITCH) for m in model.modules())
    assert mx.abs(model(ids) - wanted).max().item() < 1e-4 * max(1.0, mx.abs(wanted).max().item())


def rows_that(differ: mx.array) -> set[int]:
    """The experts of which any number differs."""
    return {e for e, any_of in enumerate(differ.any(axis=(1, 2)).tolist()) if any_of}
