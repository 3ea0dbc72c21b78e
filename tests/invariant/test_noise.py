"""NEFTune: noise on embeddings while training, of the published size, drawn once, and none anywhere else."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import NOT, build, names
from rich.console import Console
from stepping import first_batch

from mlxft.build import load_base, make_objective, prepare
from mlxft.config import parse_config
from mlxft.errors import ConfigError
from mlxft.model.layers import _StandIn, checkpoint_layers, noisy_embedding, token_embedding
from mlxft.run import train
from mlxft.trainer.loop import PLAIN_SCALES, gradient, validate

Recipe = Callable[..., dict[str, Any]]
ALPHA = 5.0


def quietly(settings: dict[str, Any], **options: Any) -> Any:
    return train(settings, console=Console(file=io.StringIO()), **options)


def ready(settings: dict[str, Any], checkpoint: bool = False) -> tuple[Any, nn.Module]:
    config = parse_config(settings)
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    prepare(config, loaded)
    objective.prepare(loaded.model)
    checkpoint_layers(loaded.model, checkpoint)
    loaded.model.train()
    return objective, loaded.model


def embedded(objective: Any, model: Any, data: Any) -> np.ndarray:
    """What the blocks are given, (B, T, D)."""
    seen = []

    def first(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        seen.append(x)
        return block(x, *args, **kwargs)

    block = model.model.layers[0]
    model.model.layers[0] = _StandIn(block, first)
    try:
        objective.loss(model, data)
    finally:
        model.model.layers[0] = block
    return np.array(seen[-1])  # before that, trials of the model


@pytest.mark.parametrize("name", sorted(set(names()) - set(NOT)))
def test_every_architecture_embeds_tokens_by_one_layer(name: str) -> None:
    """With noise in that layer alone the model's output changes, by other noise each time."""
    model = build(name)
    model.train()
    layer, ids = token_embedding(model), mx.array([[1, 2, 3]])
    plain = model(ids)
    mx.random.seed(0)
    with noisy_embedding(layer, 1.0, mx.full((1, 3), 3)):
        first, second = model(ids), model(ids)
    assert not mx.array_equal(plain, first).item()
    assert not mx.array_equal(first, second).item()
    assert mx.array_equal(plain, model(ids)).item()


def test_the_noise_is_uniform_and_as_large_as_published(recipe: Recipe, tmp_path: Path) -> None:
    """Algorithm 1 of the paper: uniform in (-1, 1) times alpha / sqrt(L d), L the real tokens of a row. A uniform
    number in +-b has standard deviation b / sqrt 3."""
    rows = [{"text": "the in on of " * n} for n in (1, 4, 40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "texts.jsonl"), "format": "text"}
    objective, model = ready(recipe(data=data, batch={"rows": 3}, **{"tune.neftune": ALPHA}))
    batch = first_batch(objective, model).data
    lengths = [int(n) for n in batch.lengths]
    assert max(lengths) > 8 * min(lengths), "mostly padding"
    mx.random.seed(1)
    noisy = embedded(objective, model, batch)
    plain = np.array(model.model.embed_tokens(batch.ids))
    for row, length in enumerate(lengths):
        noise, bound = (noisy - plain)[row], ALPHA / math.sqrt(length * plain.shape[-1])
        assert 0.97 * bound < np.abs(noise).max() <= bound * (1 + 1e-5)
        assert noise.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(noise.mean()) < 0.05 * bound
    model.eval()
    np.testing.assert_array_equal(embedded(objective, model, batch), plain)


def test_a_packed_row_has_the_noise_of_the_row_alone(recipe: Recipe) -> None:
    """L is its own tokens, not those of the sequence."""
    objective, model = ready(recipe(batch={"tokens": 512, "pack": True}, **{"tune.neftune": ALPHA}))
    batch = first_batch(objective, model).data
    noise = embedded(objective, model, batch) - np.array(model.model.embed_tokens(batch.ids))
    segments = np.array(batch.segments)
    assert segments.max() > 2
    for number in range(1, segments[0].max() + 1):
        own = noise[0][segments[0] == number]
        bound = ALPHA / math.sqrt(own.size)
        assert 0.9 * bound < np.abs(own).max() <= bound * (1 + 1e-5)


def test_a_step_that_is_computed_again_has_the_same_noise(recipe: Recipe) -> None:
    """By gradient checkpointing: loss and gradient are those without it. Another draw gives others."""
    found = []
    for checkpoint, seed in ((False, 3), (True, 3), (True, 4)):
        tune = {"rank": 4, "neftune": 20.0, "targets": ["all-linear", "embed_tokens"]}
        objective, model = ready(recipe(tune=tune), checkpoint)
        batch = first_batch(objective, model)
        mx.random.seed(seed)
        total, _, grads = gradient(model, objective, batch, PLAIN_SCALES)
        found.append((float(total), {n: np.array(g) for n, g in grads.items()}))
    (loss, slopes), (again, same), (other, _) = found
    assert again == pytest.approx(loss, rel=1e-6)
    for name, slope in slopes.items():
        np.testing.assert_allclose(same[name], slope, rtol=1e-4, atol=1e-6, err_msg=name)
    assert abs(other - loss) > 1e-4 * abs(loss)


def test_neither_validation_nor_samples_have_noise(recipe: Recipe) -> None:
    """The validation of the untrained model, and its samples, are those of a run without; the first step's loss is
    not. The random state after a validation is what it was."""
    changes = {"data.valid": 0.3, "run.eval_at_start": True, "run.sample_prompts": ["the"], "run.sample_tokens": 4}
    noisy, plain = (
        quietly(recipe(**changes, **{"tune.neftune": n, "run.name": f"n{n}", "optim.lr": 1e-12})) for n in (50.0, None)
    )
    for kind in ("eval", "sample"):
        first, other = (run.metrics(kind)[0] for run in (noisy, plain))
        assert {k: v for k, v in first.items() if k != "elapsed_s"} == {
            k: v for k, v in other.items() if k != "elapsed_s"
        }
    losses = [run.metrics("train")[0]["loss"] for run in (noisy, plain)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    objective, model = ready(recipe(**changes, **{"tune.neftune": ALPHA}))
    key = mx.random.state[0].tolist()
    assert validate(model, objective) == validate(model, objective)
    assert mx.random.state[0].tolist() == key


def test_a_run_with_noise_goes_on_exactly(recipe: Recipe) -> None:
    """From the middle to the same bits; another seed gives other ones."""
    changes = {"tune.neftune": 20.0, "run.save_every": 2, "run.keep": 9}
    whole = quietly(recipe(**changes))
    wanted = next(whole.result.glob("*.safetensors")).read_bytes()
    shutil.rmtree(whole.dir / "checkpoints/step-4")
    shutil.rmtree(whole.result)
    resumed = quietly(recipe(**changes), resume=True)
    assert next(resumed.result.glob("*.safetensors")).read_bytes() == wanted
    with pytest.raises(ConfigError, match=r"cannot resume with other settings.*\n.*tune.neftune"):
        quietly(recipe(**{**changes, "tune.neftune": 5.0}), resume=True)


@pytest.mark.parametrize("method", ["full", "dora"])
def test_noise_is_for_every_method(recipe: Recipe, method: str) -> None:
    run = quietly(recipe(tune={"method": method, "neftune": ALPHA}, **{"run.steps": 1}))
    assert run.config.tune.neftune == ALPHA


@pytest.mark.parametrize("objective", ["ppo", "grpo", "rloo", "reinforce", "online_dpo", "preference", "reward"])
def test_objectives_that_compare_numbers_of_one_network_refuse_it(
    recipe: Recipe, tmp_path: Path, objective: str
) -> None:
    """On policy the first ratio would not be 1; a reference's numbers would be held against noisy ones."""
    pairs = objective in ("preference", "reward")
    row = {"prompt": "the in", "chosen": "on it", "rejected": "at a"} if pairs else {"prompt": "the in"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    data = {"train": str(tmp_path / "rows.jsonl"), "format": "preference" if pairs else "prompts"}
    more = {} if pairs else {"rewards": {"rules": [{"kind": "length", "max": 2}]}, "rollout": {"samples": 2}}
    settings = recipe(objective=objective, data=data, **more, **{"tune.neftune": ALPHA})
    why = "must come from one network" if pairs else "the policy that samples and the one that is trained would differ"
    with pytest.raises(ConfigError, match=rf"tune\.neftune: .*{why}; leave it out"):
        make_objective(parse_config(settings), load_base(parse_config(settings)).tokenizer)


def test_an_objective_of_ones_own_says_whether_it_adds_noise(recipe: Recipe, tmp_path: Path) -> None:
    source = "from mlxft.objectives.sft import SFT\n\n\nclass Own(SFT):\n    noisy = False\n"
    (tmp_path / "own.py").write_text(source)
    settings = recipe(objective=f"{tmp_path}/own.py:Own", **{"tune.neftune": ALPHA})
    with pytest.raises(ConfigError, match=r"tune\.neftune: the loss of objective .*Own adds no noise"):
        quietly(settings)


def test_a_model_without_an_embedding_of_its_own_is_refused() -> None:
    class Odd(nn.Module):
        def __call__(self, ids: mx.array) -> mx.array:
            return mx.zeros((*ids.shape, 4))

    with pytest.raises(ConfigError, match=r"tune\.neftune: this model has no layer of its own that embeds tokens"):
        token_embedding(Odd())
