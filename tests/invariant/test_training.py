"""Laws of training: what may not matter does not, and what should be learned is."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rich.console import Console

import mlxft
from mlxft.build import load_base, make_objective, prepare
from mlxft.config import parse_config
from mlxft.model.adapters import trained_weights
from mlxft.model.load import Loaded
from mlxft.objectives.sft import SFT, make_batch
from mlxft.run import as_config, total_steps
from mlxft.runs import Run
from mlxft.trainer.loop import Hooks, Loop, Progress, validate
from mlxft.trainer.optim import Optimizer

Recipe = Callable[..., dict[str, Any]]
Arrays = dict[str, mx.array]


def train(settings: dict[str, Any], **options: Any) -> Run:
    return mlxft.train(settings, console=Console(quiet=True), **options)


def adapter(run: Run) -> bytes:
    return (run.result / "adapters.safetensors").read_bytes()


def step_of(settings: dict[str, Any]) -> tuple[Arrays, Arrays, float]:
    """One update by the real loop: the gradient (divided), the weights after it, and the loss."""
    config = parse_config(settings)
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    prepare(config, loaded)
    optimizer = Optimizer(config.optim, loaded.model)
    seen: Arrays = {}
    real = optimizer.step

    def step(model: nn.Module, grads: Arrays, weight: mx.array, lr: float) -> Arrays:
        seen.update({n: g / weight for n, g in grads.items()})
        return real(model, grads, weight, lr)

    optimizer.step = step  # type: ignore[method-assign]
    events: list[dict[str, Any]] = []
    hooks = Hooks(events.append, lambda p: None, lambda p: None, lambda p: None)
    Loop(loaded.model, objective, optimizer, config, 1, Progress(), hooks).run()
    return seen, trained_weights(loaded.model), events[0]["loss"]


def close(one: Arrays, other: Arrays, tolerance: float) -> None:
    assert set(one) == set(other)
    for name in one:
        scale = max(1.0, float(mx.abs(one[name]).max()))
        assert float(mx.abs(one[name] - other[name]).max()) <= tolerance * scale, name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_batch_of_eight_is_four_of_two(recipe: Recipe, method: str):
    """8 rows with unequal masks: gradient, weights after the step and loss agree to 1e-5."""
    common: dict[str, Any] = {"tune.method": method, "tune.rank": None if method == "full" else 4, "run.steps": 1}
    # Plain descent, since Adam's first step is the sign of the gradient: it would blow noise near 0 up to full size.
    common |= {"optim.name": "sgd", "optim.lr": 0.1}
    grads, weights, loss = step_of(recipe(rows=8, **common, **{"batch.rows": 8}))
    for rows in (2, 3):
        parts = step_of(recipe(rows=8, **common, **{"batch.rows": rows, "batch.accumulate": -(-8 // rows)}))
        close(grads, parts[0], 1e-5)
        close(weights, parts[1], 1e-5)
        assert parts[2] == pytest.approx(loss, rel=1e-5)
    assert max(float(mx.abs(g).max()) for g in grads.values()) > 1e-3


def test_padding_changes_nothing(recipe: Recipe, tiny_model: Loaded):
    """Rows padded together to any width: loss and gradient are those of the rows one by one."""
    objective = SFT(parse_config(recipe(rows=5)), tiny_model.tokenizer)
    rows, model = objective.train.rows, tiny_model.model
    assert len({len(r.ids) for r in rows}) > 2

    def gradient(batches: list[Any]) -> tuple[float, Arrays]:
        def loss(params: Any) -> mx.array:
            model.update(params)
            return sum((objective.loss(model, b.data).losses["nll"] for b in batches), mx.array(0.0))

        value, grads = mx.value_and_grad(loss)(model.trainable_parameters())
        return float(value), dict(tree_flatten(grads))

    single = gradient([make_batch([r], len(r.ids)) for r in rows])
    for extra in (0, 13):
        padded = gradient([make_batch(rows, max(len(r.ids) for r in rows) + extra)])
        assert padded[0] == pytest.approx(single[0], rel=1e-5)
        close(single[1], padded[1], 1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_fresh_adapter_changes_nothing(recipe: Recipe, method: str):
    """At step 0 the model with adapter gives the logits of the model: exactly for LoRA."""
    config = parse_config(recipe(**{"tune.method": method, "tune.dropout": 0.5}))
    loaded = load_base(config)
    ids = mx.array([[5, 9, 100, 42, 7]])
    before = loaded.model(ids)
    prepare(config, loaded)
    loaded.model.eval()
    after = loaded.model(ids)
    if method == "lora":
        assert mx.array_equal(before, after)
    assert mx.allclose(before, after, rtol=0, atol=2e-6)


def test_one_seed_one_result_another_seed_another(recipe: Recipe):
    settings: dict[str, Any] = {"tune.dropout": 0.2}
    results = [
        adapter(train(recipe(**settings, **{"run.seed": seed, "run.name": name})))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_the_seed_orders_rows_in_full_training(recipe: Recipe):
    """Nothing else is random there."""
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run = train(recipe(**{"tune": {"method": "full"}, "run.seed": seed, "run.name": name, "optim.lr": 1e-3}))
        weights.append((run.result / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_looking_does_not_change_what_is_learned(recipe: Recipe):
    """Validations, sample prompts, reports and checkpoints: the trained weights are the same bits with and without."""
    common: dict[str, Any] = {"data.valid": 0.3, "tune.dropout": 0.2, "run.steps": 6}
    looks: list[dict[str, Any]] = [
        {"run.eval_every": 100, "run.report_every": 100, "run.save_every": 100},
        {"run.eval_every": 1, "run.report_every": 3, "run.save_every": 2, "run.eval_at_start": True},
        {"run.eval_every": 2, "run.sample_prompts": ["the", "who"], "run.sample_tokens": 5, "run.save_every": 1},
    ]
    weights = []
    for k, look in enumerate(looks):
        run = train(recipe(**common, **look, **{"run.name": f"r{k}"}))
        weights.append((run.dir / "checkpoints/step-6/weights.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


def rows_by_epoch(settings: dict[str, Any], loaded: Loaded, epochs: int) -> list[list[str]]:
    """The rows that the loop's steps are made of, epoch by epoch, as `total_steps` counts them."""
    config = parse_config(settings)
    objective = make_objective(config, loaded.tokenizer)
    found, steps = [], objective.steps(loaded.model)
    for epoch in range(epochs):
        rows: list[str] = []
        while True:
            step = next(steps)
            rows += [row for batch in step.micro_batches for row in batch.rows]
            if step.ends_epoch:
                break
        found.append(rows)
        assert objective.steps_per_epoch(epoch) > 0
    return found


@pytest.mark.parametrize("budget", [{"batch.rows": 4}, {"batch.rows": None, "batch.tokens": 150}])
def test_every_row_once_an_epoch_in_another_order(recipe: Recipe, tiny_model: Loaded, budget: dict[str, Any]):
    """Also the last, partial batch: 11 rows do not divide by 4."""
    epochs = rows_by_epoch(recipe(rows=11, **budget), tiny_model, 3)
    every = Counter(f"rows-11.jsonl:{i + 1}" for i in range(11))
    assert [Counter(e) for e in epochs] == [every] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("budget", [{"batch.rows": 4}, {"batch.rows": None, "batch.tokens": 150}])
def test_epochs_are_whole_passes(recipe: Recipe, tiny_model: Loaded, budget: dict[str, Any], accumulate: int):
    """`run.epochs: 7` is the steps after which the data stands at the begin of its eighth pass, whatever the budget."""
    changes: dict[str, Any] = {"run.steps": None, "run.epochs": 7, "batch.accumulate": accumulate, **budget}
    config = parse_config(recipe(rows=23, **changes))
    objective = make_objective(config, tiny_model.tokenizer)
    total, steps = total_steps(config, objective), objective.steps(tiny_model.model)
    for _ in range(total):
        next(steps)
    assert objective.state_dict() == {"epoch": 7, "next": 0}


@pytest.mark.parametrize(("epochs", "steps"), [(None, 100), (0.4, 2), (2, 10), (2.6, 13), (0.01, 1)])
def test_fractions_of_epochs(recipe: Recipe, tiny_model: Loaded, epochs: float | None, steps: int):
    """10 rows in twos are 5 steps; without a length a small file gets 20 epochs, the most."""
    config = parse_config(recipe(rows=10, **{"run.steps": None, "run.epochs": epochs}))
    assert total_steps(config, make_objective(config, tiny_model.tokenizer)) == steps


def test_the_best_adapter_is_kept_and_else_the_last(recipe: Recipe, contradiction: dict[str, Any]):
    """The held-out loss falls and rises again, and the best of it is on the disk, not the end."""
    run = train(recipe(**contradiction, **{"run.steps": 30, "run.save_every": 30}))
    losses = {e["step"]: e["loss"] for e in run.metrics("eval")}
    best = min(losses, key=lambda step: losses[step])
    assert run.metrics("end")[0]["best_step"] == best
    assert 3 < best < 30, losses
    assert losses[best] < min(losses[3], losses[30]) - 0.1
    last = mx.load(str(run.dir / "checkpoints/step-30/weights.safetensors"))
    kept = mx.load(str(run.result / "adapters.safetensors"))
    assert not all(mx.array_equal(last[n], kept[n]).item() for n in last)
    # What was kept has the loss that was reported for it.
    loaded = mlxft.load(run.dir)
    found = validate(loaded.model, make_objective(as_config(run.dir / "config.yaml"), loaded.tokenizer))
    assert found["loss"] == pytest.approx(losses[best], rel=1e-5)


def test_early_stopping(recipe: Recipe, contradiction: dict[str, Any]):
    run = train(recipe(**contradiction, **{"run.steps": 60, "run.patience": 2}))
    evals = run.metrics("eval")
    assert evals[-1]["step"] < 30
    assert [e["best"] for e in evals[-3:]] == [True, False, False]
    assert run.metrics("end")[0]["step"] == evals[-1]["step"]


def test_bfloat16_full_training_has_float32_masters(recipe: Recipe, tiny_model_dir: Path):
    """Updates of 1e-5 are below half a unit of bfloat16 for most weights; they add up in the masters."""
    changes: dict[str, Any] = {"tune": {"method": "full"}, "model.dtype": "bfloat16", "optim.lr": 1e-5}
    run = train(recipe(**changes, **{"optim.schedule": "constant", "optim.warmup": 0, "run.steps": 3}))
    arrays = mx.load(str(run.dir / "checkpoints/step-3/optimizer.safetensors"))
    weights = mx.load(str(run.dir / "checkpoints/step-3/weights.safetensors"))
    start = mx.load(str(tiny_model_dir / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    master, weight = arrays[f"master.{name}"], weights[name]
    assert (master.dtype, weight.dtype) == (mx.float32, mx.bfloat16)
    assert mx.array_equal(master.astype(mx.bfloat16), weight)
    moved = float(mx.abs(master - start[name].astype(mx.bfloat16).astype(mx.float32)).mean())
    assert moved > 1e-5
    stuck = float(mx.mean(weight == start[name].astype(mx.bfloat16)))
    assert 0.3 < stuck < 1.0  # plain bfloat16 would have lost these updates


def test_whole_modules_beside_an_adapter_are_trained_and_saved(recipe: Recipe, tiny_model_dir: Path):
    run = train(recipe(**{"tune.train": ["embed_tokens"]}))
    weights = mx.load(str(run.result / "adapters.safetensors"))
    start = mx.load(str(tiny_model_dir / "model.safetensors"))
    name = "model.embed_tokens.weight"
    assert not mx.array_equal(weights[name], start[name])
    loaded = mlxft.load(run.dir)
    assert mx.array_equal(dict(tree_flatten(loaded.model.parameters()))[name], weights[name])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor", "muon"])
def test_every_optimiser_learns(recipe: Recipe, name: str):
    lr = {"sgd": 0.5, "adafactor": 1e-2, "lion": 3e-3, "muon": 2e-2}.get(name, 1e-2)
    run = train(recipe(rows=4, **{"optim.name": name, "optim.lr": lr, "run.steps": 24, "batch.rows": 4}))
    losses = [e["loss"] for e in run.metrics("train")]
    assert losses[-1] < losses[0] - 0.5, losses


def test_muons_decay_is_decoupled(recipe: Recipe):
    """At lr 0.02 a decay of 0.1 takes 6 % off the weights in 40 steps: they learn as with 0.01, and are smaller."""
    ends, sizes = [], []
    for decay in (0.01, 0.1):
        optim = {"name": "muon", "lr": 2e-2, "weight_decay": decay}
        run = train(
            recipe(
                tune={"method": "full"}, optim=optim, batch={"rows": 10}, **{"run.steps": 40, "run.name": f"{decay}"}
            )
        )
        ends.append(np.mean([e["loss"] for e in run.metrics("train")[-5:]]))
        weights = mx.load(str(run.result / "model.safetensors"))
        sizes.append(float(mx.linalg.norm(weights["model.layers.0.mlp.up_proj.weight"])))
    assert ends[0] < 0.2
    assert ends[1] < ends[0] + 0.2
    assert 0.85 < sizes[1] / sizes[0] < 0.99


def write_chain(path: Path, rows: int, seed: int) -> tuple[Path, float]:
    """Texts of a Markov chain: after any letter the text ends with 1/8, else one of two letters follows, 7/16 each.

    Returns the file and the entropy of its tokens under the chain, in nats per trained token: no model can do better.
    """
    letters = "bckmvxqj"  # none merge with each other in the tiny tokenizer
    rng, nll, count = random.Random(seed), 0.0, 0
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            at = rng.randrange(8)
            text = letters[at]
            while rng.random() >= 1 / 8 and len(text) < 60:
                at = (at + rng.choice((1, 3))) % 8
                text += letters[at]
                nll += math.log(16 / 7)
            nll += math.log(8)
            count += len(text)
            file.write(json.dumps({"text": text}) + "\n")
    return path, nll / count


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_known_optimum_is_learned(recipe: Recipe, tmp_path: Path, method: str):
    """H = -(1/8 ln 1/8 + 7/8 ln 7/16) = 0.983 nats a token. The held-out loss comes within 2 % of it, never below."""
    train_file, _ = write_chain(tmp_path / "chain.jsonl", 3000, seed=1)
    valid_file, entropy = write_chain(tmp_path / "held.jsonl", 600, seed=2)
    assert entropy == pytest.approx(math.log(8) / 8 + 7 / 8 * math.log(16 / 7), rel=0.03)
    tune = {"method": "full"} if method == "full" else {"rank": 16, "train": ["embed_tokens", "norm"], "alpha": 32}
    changes: dict[str, Any] = {
        "tune": tune,
        "optim.lr": 1e-2 if method == "full" else 2e-2,
        "run.steps": None,
        "run.epochs": 2 if method == "full" else 3,
        "run.report_every": 50,
    }
    data = {"train": str(train_file), "valid": str(valid_file), "format": "text"}
    run = train(recipe(**changes, data=data, batch={"tokens": 512}))
    loss = min(e["loss"] for e in run.metrics("eval"))
    assert loss == pytest.approx(entropy, rel=0.02)
    assert loss > entropy * 0.995
    assert np.isfinite(loss)
