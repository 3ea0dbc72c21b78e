"""Body and head apart give the model's own losses and gradients, for every architecture that can be built tiny."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import ARCHITECTURES, build, scatter
from mlx.utils import tree_flatten

from mlxft.model import logits as logits_module
from mlxft.model.adapters import LoRASpec, attach, prepare_full, select_targets, unfreeze
from mlxft.model.load import load
from mlxft.model.logits import Split, rows_nll
from mlxft.model.memory import ShapeSplit

# The head stands within the body: all logits are computed.
WHOLE = {"gpt_neox"}


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
    monkeypatch.setattr(logits_module, "CHUNK", (4, 32 << 20))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_gradients_of_every_architecture(name: str) -> None:
    model = build(name)
    split = Split(model)
    assert split.separable == (name not in WHOLE)
    assert ShapeSplit(model).separable == split.separable, "a plan takes apart what training does"
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
    monkeypatch.setattr(logits_module, "CHUNK", (128, 32 << 20))
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
