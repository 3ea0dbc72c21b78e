"""Dropout is drawn once: what a forward pass computed is what its gradient is of, however often parts are computed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import build, scatter
from mlx.utils import tree_flatten, tree_map
from rich.console import Console
from stepping import first_step, sums_of

from mlxft.build import make_objective, prepare
from mlxft.config import parse_config
from mlxft.errors import ConfigError
from mlxft.model import logits as logits_module
from mlxft.model.adapters import LoRASpec, attach, prepare_full, select_targets
from mlxft.model.layers import checkpoint_layers
from mlxft.model.load import Loaded
from mlxft.model.logits import Split, hidden_entropy, row_sums, rows_hidden, rows_logprobs, rows_nll
from mlxft.objectives import functional as F
from mlxft.run import train

Recipe = Callable[..., dict[str, Any]]
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
ROWS, WIDTH, SEED = 4, 9, 7


def adapted(name: str, targets: list[str], checkpoint: bool = False) -> nn.Module:
    """A tiny model in training, with adapters that do something and dropout 0.3."""
    model = build(name)
    mx.random.seed(0)
    attach(model, LoRASpec(tuple(select_targets(model, targets, "all")), 4, 2.0, 0.3))
    scatter(model, seed=2, only="lora_b")
    for module in model.modules():
        if "num_experts_per_tok" in vars(module):  # all experts: where some are chosen, a loss has jumps
            module.num_experts_per_tok = module.num_experts
    checkpoint_layers(model, checkpoint)
    model.train()
    return model


def batch() -> dict[str, mx.array]:
    """Every position predicts a token."""
    r = np.random.default_rng(0)
    return {
        "ids": mx.array(r.integers(0, 64, (ROWS, WIDTH)).astype(np.int32)),
        "positions": mx.arange(ROWS * WIDTH),
        "labels": mx.array(r.integers(0, 64, ROWS * WIDTH).astype(np.int32)),
    }


def slope_error(model: nn.Module, f: Callable[[], mx.array]) -> float:
    """How far the slope by automatic differentiation is from that by central differences, with one seed's masks.

    Along the gradient itself, where the slope is largest beside the rounding of the differences.
    """

    def value(parameters: Any) -> mx.array:
        model.update(parameters)
        mx.random.seed(SEED)
        return f()

    here = model.trainable_parameters()
    _, gradient = mx.value_and_grad(value)(here)
    length = mx.sqrt(sum((g.square().sum() for _, g in tree_flatten(gradient)), mx.array(0.0)))
    step = 3e-3
    above, below = (value(tree_map(lambda p, g, s=s: p + s * g / length, here, gradient)) for s in (step, -step))
    model.update(here)
    differences = float(above - below) / (2 * step)
    return abs(float(length) - differences) / abs(differences)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """36 positions are five chunks, the last one partial."""
    monkeypatch.setattr(logits_module, "chunk_size", lambda vocabulary: 8)
    monkeypatch.setattr("mlxft.model.logits.chunk_size", lambda vocabulary: 8)


def nll(model: nn.Module) -> Callable[[], mx.array]:
    split, a = Split(model), batch()
    return lambda: rows_nll(split, **a, weights=mx.ones(ROWS * WIDTH), grad=True)


def simpo(model: nn.Module) -> Callable[[], mx.array]:
    """Of two pairs: the function itself, which an objective calls on a model without dropout."""
    split, a = Split(model), batch()
    owners = mx.arange(ROWS * WIDTH) // WIDTH

    def loss() -> mx.array:
        means = row_sums(rows_logprobs(split, **a, grad=True), owners, ROWS) / WIDTH
        return F.simpo(means[:2], means[2:], 2.0, 1.0).sum()

    return loss


def entropy(model: nn.Module) -> Callable[[], mx.array]:
    split, a = Split(model), batch()
    return lambda: hidden_entropy(split, rows_hidden(split, a["ids"], a["positions"]), grad=True).sum()


@pytest.mark.parametrize("loss", [nll, simpo, entropy])
@pytest.mark.parametrize(
    ("name", "targets", "checkpoint"),
    [
        ("llama", ["all-linear"], True),
        ("llama untied", ["all-linear", HEAD], False),
        ("llama untied", [HEAD, EMBEDDING, "q_proj"], True),
        ("llama", [EMBEDDING, "q_proj"], False),
        ("llama", [EMBEDDING, "all-linear"], True),
        ("mixtral", ["all-linear"], True),
        ("gemma2", [EMBEDDING, "all-linear"], True),
        ("minicpm", [EMBEDDING, "all-linear"], True),
        ("gpt_neox", ["all-linear"], True),
    ],
)
def test_the_gradient_is_of_the_masks_that_were_drawn(
    name: str, targets: list[str], checkpoint: bool, loss: Callable[[nn.Module], Callable[[], mx.array]]
) -> None:
    if name == "gpt_neox" and loss is entropy:
        pytest.skip("its hidden states can not be had")
    model = adapted(name, targets, checkpoint)
    assert slope_error(model, loss(model)) < 0.01


@pytest.mark.parametrize("loss", [nll, simpo])
def test_so_it_is_with_an_architectures_own_dropout(loss: Callable[[nn.Module], Callable[[], mx.array]]) -> None:
    model: Any = build("llama untied")
    for layer in model.layers:
        layer.mlp = nn.Sequential(nn.Dropout(0.3), layer.mlp)
    model.lm_head = nn.Sequential(nn.Dropout(0.3), model.lm_head)
    prepare_full(model, "all", [], [])
    checkpoint_layers(model)
    model.train()
    found = loss(model)
    assert float(found()) != float(found()), "there is dropout"
    assert slope_error(model, found) < 0.01


@pytest.mark.parametrize(
    ("tied", "targets"),
    [(True, ["all-linear"]), (True, ["all-linear", "embed_tokens"]), (False, ["q_proj", "lm_head"])],
)
def test_checkpointing_does_not_change_what_is_learnt(
    tied: bool,
    targets: list[str],
    recipe: Recipe,
    make_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The masks are the same: after eight steps the weights differ by rounding only."""
    folder = make_model_dir(tmp_path / "model", tie_word_embeddings=tied)
    found = []
    for checkpoint in ("off", "on"):
        settings = recipe(
            tune={"rank": 4, "dropout": 0.3, "targets": targets},
            memory={"checkpoint": checkpoint},
            **{"model.path": str(folder), "run.name": checkpoint, "run.steps": 8},
        )
        run = train(settings, console=Console(file=io.StringIO()))
        found.append(mx.load(str(run.result / "adapters.safetensors")))
    off, on = found
    moved = max(float(mx.abs(value).max()) for name, value in off.items() if name.endswith("lora_b"))
    assert moved > 0.01
    assert max(float(mx.abs(off[name] - on[name]).max()) for name in off) < 1e-3 * moved


# Objectives that compare what a network gives train without.

COMPARING = ["dpo", "ipo", "hinge", "simpo", "orpo", "cpo", "kto", "reward"]


@pytest.fixture(scope="module")
def noisy_adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run of a supervised fine-tuning with dropout 0.5."""
    folder = tmp_path_factory.mktemp("noisy")
    rows = [{"prompt": f"{i} the", "completion": "and the or"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    settings = {
        "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "tune": {"rank": 4, "dropout": 0.5, "targets": ["all-linear", "embed_tokens"]},
        "data": {"train": str(folder / "rows.jsonl"), "format": "prompt-completion"},
        "optim": {"lr": 1e-2},
        "run": {"dir": str(folder), "name": "sft", "steps": 2},
    }
    return str(train(settings, console=Console(file=io.StringIO())).dir)


def comparing(recipe: Recipe, tmp_path: Path, loss: str, **changes: Any) -> dict[str, Any]:
    rows = [{"prompt": f"{i} the", "chosen": "and the or" * (i + 1), "rejected": "in on"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    data = {"train": str(tmp_path / "pairs.jsonl"), "format": "preference"}
    own = {"objective": "reward"} if loss == "reward" else {"objective": "preference", "preference": {"loss": loss}}
    return recipe(data=data, **own, **changes)


@pytest.mark.parametrize("loss", COMPARING)
def test_an_adapters_dropout_is_off_where_completions_are_compared(
    loss: str, recipe: Recipe, noisy_adapter: str, tiny_model: Loaded, tmp_path: Path
) -> None:
    """It is said, and the loss of a batch is that of the whole network, each time, with a gradient of it."""
    config = parse_config(comparing(recipe, tmp_path, loss, tune={}, **{"model.adapter": noisy_adapter}))
    objective: Any = make_objective(config, tiny_model.tokenizer)
    assert not any("dropout" in note for note in objective.summary().notes)
    prepare(config, tiny_model)
    model = tiny_model.model
    objective.prepare(model)
    assert any("dropout is off" in note for note in objective.summary().notes)
    model.train()
    step = first_step(objective, model)
    first = float(sums_of(objective, model, step).total)
    assert float(sums_of(objective, model, step).total) == first
    assert slope_error(model, lambda: sums_of(objective, model, step).total) < 0.01
    model.eval()
    assert float(sums_of(objective, model, step).total) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("loss", COMPARING)
def test_dropout_is_refused_where_completions_are_compared(
    loss: str, recipe: Recipe, tiny_model: Loaded, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"tune\.dropout: .*leave it out"):
        make_objective(parse_config(comparing(recipe, tmp_path, loss, **{"tune.dropout": 0.1})), tiny_model.tokenizer)
    make_objective(parse_config(comparing(recipe, tmp_path, loss, **{"tune.dropout": 0.0})), tiny_model.tokenizer)
