"""A prompt that is computed once for both answers gives what it gives when it is computed for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxft.build import make_objective, prepare
from mlxft.config import parse_config
from mlxft.data.dataset import EncodedPair
from mlxft.model.adapters import LoRASpec, attach, prepare_full, select_targets
from mlxft.model.heads import ScoreHead, attach_head, body_width
from mlxft.model.layers import checkpoint_layers
from mlxft.model.load import load
from mlxft.model.logits import Split
from mlxft.model.prefix import Completions, Sharing
from mlxft.objectives import pairs as pairs_module
from mlxft.objectives.pairs import stack_pairs
from mlxft.run import train

KINDS = ("llama", "qwen3", "gemma2", "phi3", "mixtral", "qwen3_moe", "mistral", "qwen2")
# Windows that end within the prompts and reach over from the answers.
LAYERS = ["full_attention", "sliding_attention"]
OPTIONS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 16, "layer_types": LAYERS}}


def some_pairs(count: int = 3, least: int = 34) -> list[EncodedPair]:
    """Prompts and answers of unequal length, an answer of one token among them."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> Any:
        return rng.integers(3, 250, n).astype(np.int32)

    sizes = [(least + 5 * i, 1 + 3 * i, 6 - i) for i in range(count)]
    return [EncodedPair(ids(p), ids(c), ids(r), None, 1.0, False, f"x:{p}") for p, c, r in sizes]


@pytest.fixture
def sharing(make_model_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Sharing]:
    """Of a tiny model with adapters that do something, or trained whole; with a head."""

    def make(kind: str, whole: bool = False) -> Sharing:
        folder = make_model_dir(tmp_path / f"{kind}-{whole}", kind, **OPTIONS.get(kind, {}))
        model = load(str(folder), dtype="float32").model
        if whole:
            prepare_full(model, "all", [], [])
        else:
            attach(model, LoRASpec(tuple(select_targets(model, "all-linear", "all")), 2, 2.0))
            model.update(tree_map(lambda v: v + 0.05, model.trainable_parameters()))
        split = Split(model)
        attach_head(model, ScoreHead(body_width(split)))
        model.train()
        return Sharing(split)

    return make


def both(sharing: Sharing, monkeypatch: pytest.MonkeyPatch) -> tuple[Completions, Completions]:
    """The same pairs as whole rows, and with shared prompts."""
    pairs = some_pairs()
    width = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    shared = stack_pairs(pairs, width, sharing)
    monkeypatch.setattr(pairs_module, "LEAST_PROMPT", 1000)
    plain = stack_pairs(pairs, width, sharing)
    assert plain.prompts is None
    assert shared.prompts is not None
    assert shared.prompts.size + shared.ids.size < 0.75 * plain.ids.size
    return plain, shared


def gradient(sharing: Sharing, read: Callable[[], mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
    """The numbers, and the gradient of a sum in which each counts another amount."""
    model = sharing.split.model

    def loss(parameters: Any) -> tuple[mx.array, mx.array]:
        model.update(parameters)
        values = read()
        return (values * mx.cos(mx.arange(values.size))).sum(), values

    parameters = model.trainable_parameters()
    (_, values), slopes = mx.value_and_grad(loss)(parameters)
    model.update(parameters)
    return values, dict(tree_flatten(slopes))


@pytest.mark.parametrize(("kind", "whole"), [*((k, False) for k in KINDS), ("llama", True), ("gemma2", True)])
def test_scores_logprobs_and_gradients(
    kind: str, whole: bool, sharing: Callable[..., Sharing], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sharing(kind, whole)
    assert not one.reason
    plain, shared = both(one, monkeypatch)
    assert mx.array_equal(plain.labels, shared.labels)
    for read in (one.scores, partial(one.logprobs, grad=True)):
        (expected, slopes), (found, others) = (gradient(one, partial(read, a)) for a in (plain, shared))
        assert found.shape == expected.shape
        assert mx.allclose(found, expected, rtol=1e-4, atol=1e-4).item()
        assert slopes.keys() == others.keys()
        for name, slope in slopes.items():
            assert mx.allclose(others[name], slope, rtol=1e-3, atol=1e-4 * max(1.0, mx.abs(slope).max().item())), name
    assert mx.allclose(one.logprobs(shared, grad=False), one.logprobs(plain, grad=False), rtol=1e-4, atol=1e-4).item()


def test_prompts_are_not_shared_where_it_does_not_pay_or_can_not_be(
    sharing: Callable[..., Sharing], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    one = sharing("llama")
    assert stack_pairs(some_pairs(least=8), 28, one).prompts is None, "short prompts"
    long = [pair._replace(chosen_ids=pair.prompt_ids.repeat(4)) for pair in some_pairs()]
    assert stack_pairs(long, max(5 * len(p.prompt_ids) for p in long), one).prompts is None, "long answers"
    checkpoint_layers(one.split.model)
    assert stack_pairs(some_pairs(), 60, one).prompts is None, "a checkpointed block has no keys to give"
    whole = load(str(make_model_dir(tmp_path / "whole", "gpt_neox")), dtype="float32").model
    assert "separable" in Sharing(Split(whole)).reason


@pytest.mark.parametrize("changes", [{"objective": "reward"}, {"objective": "preference"}], ids=["reward", "dpo"])
def test_a_run_is_the_same_run(
    changes: dict[str, Any], recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["the", "in", "on", "and", "or"]
    rows = [
        {"prompt": f"{i} " + " ".join(words * 8), "chosen": " ".join(words[: i % 4 + 1]), "rejected": f"or {i} z"}
        for i in range(10)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    data = {"train": str(tmp_path / "pairs.jsonl"), "format": "preference", "valid": 0.2}
    settings = recipe(**changes, data=data)
    losses = []
    for least in (pairs_module.LEAST_PROMPT, 1000):
        monkeypatch.setattr(pairs_module, "LEAST_PROMPT", least)
        settings["run"]["name"] = f"least-{least}"
        config = parse_config(settings)
        loaded = load(config.model.path, dtype="float32")
        objective = make_objective(config, loaded.tokenizer)
        prepare(config, loaded)
        objective.prepare(loaded.model)
        shared = next(objective.steps(loaded.model)).micro_batches[0].data.prompts is not None
        assert shared == (least < 1000)
        run = train(settings)
        losses.append([e["loss"] for kind in ("train", "eval") for e in run.metrics(kind)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
