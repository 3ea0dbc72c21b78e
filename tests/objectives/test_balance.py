"""The load-balancing loss in whole runs of mixtures, the tokens that it counts, and experts that move."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rich.console import Console
from stepping import first_batch, first_step

from mlxft.build import load_base, make_objective
from mlxft.config import load_config, parse_config
from mlxft.data.dataset import EncodedCompletion
from mlxft.errors import ConfigError
from mlxft.model.adapters import LoRASpec, prepare_adapter, prepare_full, select_targets
from mlxft.model.load import load
from mlxft.objectives.pairs import CompletionObjective, stack, stack_shared
from mlxft.run import assemble, train
from mlxft.runs import Run
from mlxft.trainer.loop import Scales, gradient

Recipe = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def mixture(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixtral whose routers prefer the first expert. Read only."""
    folder = make_model_dir(tmp_path_factory.mktemp("mixture") / "mixtral", "mixtral")
    weights: Any = mx.load(str(folder / "model.safetensors"))
    for name in [n for n in weights if n.endswith("block_sparse_moe.gate.weight")]:
        # The embedding has a mean of its own, so that a router can lean one way for all tokens.
        weights[name] = weights[name].at[0].add(0.2)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] + 0.05
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def run_of(recipe: Recipe, mixture: Path, **changes: Any) -> Run:
    return train(recipe(**{"model.path": str(mixture), "run.steps": 30, **changes}), console=QUIET)


@pytest.mark.parametrize(
    ("tune", "checkpoint"),
    [({"rank": 4}, "off"), ({"rank": 4}, "on"), ({"method": "full"}, "off"), ({"targets": ["gate"], "rank": 4}, "on")],
    ids=["lora", "lora-checkpointed", "full", "router-checkpointed"],
)
def test_load_becomes_even(recipe: Recipe, mixture: Path, tune: dict[str, Any], checkpoint: str) -> None:
    """Also where routers stay as they are: what comes to them changes. loss is what is trained, balance included."""
    changes = {"tune": {**tune, "router_aux": 2.0}, "memory.checkpoint": checkpoint, "batch.rows": 10}
    steps = run_of(recipe, mixture, **changes).metrics("train")
    assert steps[0]["router_aux"] > 1.2
    assert 0.98 < steps[-1]["router_aux"] < 1 + 0.7 * (steps[0]["router_aux"] - 1)
    plain = run_of(recipe, mixture, **{**changes, "tune": tune, "run.name": "b", "run.steps": 1}).metrics("train")
    assert "router_aux" not in plain[0]
    assert steps[0]["loss"] - 2 * steps[0]["router_aux"] == pytest.approx(plain[0]["loss"], abs=1e-4)


def test_validation_is_without_it(recipe: Recipe, mixture: Path) -> None:
    changes = {"data.valid": 0.3, "run.eval_at_start": True, "run.steps": 1}
    first = run_of(recipe, mixture, **changes, **{"tune.router_aux": 1.0}).metrics("eval")[0]
    other = run_of(recipe, mixture, **changes, **{"run.name": "b"}).metrics("eval")[0]
    assert first["loss"] == other["loss"]


def ready(settings: dict[str, Any]) -> tuple[Any, nn.Module]:
    config = parse_config(settings)
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    assemble(config, loaded, objective)
    loaded.model.train()
    return objective, loaded.model


@pytest.mark.parametrize("pack", [False, True])
def test_padding_is_not_counted(recipe: Recipe, mixture: Path, pack: bool) -> None:
    """A batch of all rows says what its rows say one by one, of the sums that are made of them."""
    changes = {"model.path": str(mixture), "tune.router_aux": 1.0, "batch": {"rows": 10, "pack": pack}}
    objective, model = ready(recipe(**changes))
    batch = first_batch(objective, model)
    (mask,) = objective.real_tokens(batch.data)
    assert mask.shape == batch.data.ids.shape
    assert int(mask.sum()) == batch.tokens
    scales = Scales({}, 1.0, batch.trained_tokens)
    whole = gradient(model, objective, batch, scales)
    other = replace(batch, data=replace(batch.data, ids=mx.where(mask, batch.data.ids, 7)))
    again = gradient(model, objective, other, scales)
    assert float(whole[1].metrics["router_aux"]) == pytest.approx(float(again[1].metrics["router_aux"]), rel=1e-6)
    assert float(whole[0] - again[0]) == pytest.approx(0, abs=1e-3)


def test_masks_of_answers_and_of_shared_prompts() -> None:
    prompts, replies = ([1, 2, 3], [4]), ([5, 6], [7], [8, 9, 1], [2])
    ids = [np.array(x, dtype=np.int32) for x in (*prompts, *replies)]
    whole = stack([EncodedCompletion(ids[i % 2], reply) for i, reply in enumerate(ids[2:])])
    real_tokens = partial(CompletionObjective.real_tokens, None)
    assert [m.sum(axis=1).tolist() for m in real_tokens(whole)] == [[5, 2, 6, 2]]
    shared = stack_shared(ids[:2], [(i % 2, reply) for i, reply in enumerate(ids[2:])])
    masks = real_tokens(shared)
    assert {m.shape: m.sum(axis=1).tolist() for m in masks} == {(2, 3): [3, 1], (4, 3): [2, 1, 3, 1]}


def test_micro_batches_count_as_their_items_do(recipe: Recipe, mixture: Path) -> None:
    """What a step adds to the loss is the mean of its micro-batches' balances by their trained tokens."""
    changes = {"batch": {"rows": 3, "accumulate": 4}, "run.steps": 1, "run.epochs": None, "optim.warmup": 0}
    step = run_of(recipe, mixture, **changes, **{"tune.router_aux": 0.5}).metrics("train")[0]
    objective, model = ready(recipe(**{"model.path": str(mixture), **changes, "tune.router_aux": 0.5}))
    batches = first_step(objective, model).micro_batches
    weights = [b.trained_tokens for b in batches]
    assert len(weights) == 4
    assert len(set(weights)) > 1
    parts = [gradient(model, objective, b, Scales({}, 0.5, b.trained_tokens)) for b in batches]
    balance = sum(float(terms.metrics["router_aux"]) for _, terms, _ in parts) / sum(weights)
    assert step["router_aux"] == pytest.approx(balance, rel=1e-5)
    assert step["loss"] == pytest.approx(sum(float(total) for total, _, _ in parts) / sum(weights), rel=1e-5)


@pytest.mark.parametrize("objective", ["preference", "reward", "grpo", "ppo"])
def test_other_objectives_have_it_too(recipe: Recipe, mixture: Path, tmp_path: Path, objective: str) -> None:
    if objective in ("preference", "reward"):
        long = "the in on " * 12  # so long that the prompt is computed once for both answers
        rows = [{"prompt": f"{long} {i}", "chosen": "the in", "rejected": "on or a" * (1 + i % 2)} for i in range(6)]
        changes: dict[str, Any] = {"data.format": "preference"}
    else:
        rows = [{"prompt": "the " * (1 + i % 3)} for i in range(6)]
        (tmp_path / "r.py").write_text("def f(prompts, completions, rows):\n    return [len(c) for c in completions]\n")
        changes = {"data.format": "prompts", "rewards": {"function": f"{tmp_path}/r.py:f"}, "data.max_length": 60}
        changes |= {"rollout": {"prompts": 3, "samples": 2, "max_tokens": 4}}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes |= {"objective": objective, "data.train": str(tmp_path / "rows.jsonl"), "data.template": "none"}
    steps = run_of(recipe, mixture, **changes, **{"tune.router_aux": 0.1, "run.steps": 2}).metrics("train")
    assert all(1 < step["router_aux"] < 4 for step in steps)


def test_what_can_not_be_balanced_is_refused_before_anything_is_written(recipe: Recipe, tmp_path: Path) -> None:
    settings = recipe(**{"tune.router_aux": 0.01})
    with pytest.raises(ConfigError, match=r"tune\.router_aux: this model has no routers"):
        train(settings, console=QUIET)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("tune", [{"rank": 4}, {"method": "full"}], ids=["lora", "full"])
def test_a_run_keeps_it(recipe: Recipe, mixture: Path, tune: dict[str, Any]) -> None:
    """In config.yaml, by which the run is resumed; and where an adapter is trained further."""
    run = run_of(recipe, mixture, tune={**tune, "router_aux": 0.25}, **{"run.steps": 2})
    assert load_config(run.dir / "config.yaml").tune.router_aux == 0.25
    if "method" not in tune:
        more = {"model.adapter": str(run.dir), "tune": {"router_aux": 0.5}, "run.name": "b", "run.steps": 1}
        assert run_of(recipe, mixture, **more).metrics("train")[0]["router_aux"] > 1


# Experts.


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("rows", [1, 10], ids=["few", "sorted"])
def test_experts_move(
    recipe: Recipe, make_model_dir: Callable[..., Path], tmp_path: Path, kind: str, method: str, rows: int
) -> None:
    """Every expert that is chosen learns, with few tokens and with so many that mlx-lm sorts them by expert."""
    base = make_model_dir(tmp_path / kind, kind)
    tune = {"method": "full"} if method == "full" else {"rank": 4}
    run = train(recipe(**{"model.path": str(base), "batch.rows": rows, "run.steps": 8}, tune=tune), console=QUIET)
    file = next(run.result.glob("*.safetensors"))
    after = {n: v for n, v in mx.load(str(file)).items() if "switch_mlp" in n and "lora_a" not in n}
    before = dict(tree_flatten(load(str(base), dtype="float32").model.parameters()))
    assert len(after) == 6
    for name, value in after.items():
        moved = mx.abs(value - before[name] if name in before else value).max(axis=(1, 2))
        assert (moved > 1e-4).all().item(), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_experts_gradient_is_that_of_single_tokens(
    make_model_dir: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    """40 tokens, which are sorted by expert, have the sum of the gradients that each has alone."""
    model = load(str(make_model_dir(tmp_path / "m", "mixtral")), dtype="float32").model
    if method == "full":
        prepare_full(model, "all", ["switch_mlp"], [])
    else:
        prepare_adapter(model, LoRASpec(tuple(select_targets(model, ["switch_mlp"], "all")), 4, 2.0), [])
        for _, module in model.named_modules():
            if "lora_b" in module:
                module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    block = model.model.layers[0].block_sparse_moe
    x = mx.random.normal((1, 40, 32), key=mx.random.key(0))
    loss = nn.value_and_grad(block, lambda x: block(x).square().sum())
    whole = dict(tree_flatten(loss(x)[1]))
    apart = [dict(tree_flatten(loss(x[:, t : t + 1])[1])) for t in range(40)]
    assert whole
    for name, slope in whole.items():
        wanted = sum((part[name] for part in apart), mx.zeros_like(slope))
        assert mx.abs(slope).max(axis=(1, 2)).min().item() > 0, name
        np.testing.assert_allclose(np.array(slope), np.array(wanted), rtol=1e-3, atol=1e-5, err_msg=name)
