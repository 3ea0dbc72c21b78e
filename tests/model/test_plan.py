"""Memory plans: exact where they count, close to what training takes where they predict, typed where they can not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from architectures import build
from mlx.utils import tree_flatten

from mlxft.build import base_skeleton, job_of, make_objective, plan_batches, planned, prepare, settled
from mlxft.config import OptimSettings, parse_config
from mlxft.errors import ConfigError, ModelError
from mlxft.model.adapters import LoRASpec, attach, select_targets
from mlxft.model.heads import ScoreHead, attach_head
from mlxft.model.load import load, load_tokenizer, skeleton, without_weights
from mlxft.model.memory import (
    MAC_SHARE,
    MACS,
    Job,
    MemoryPlan,
    Outline,
    Rolling,
    Shape,
    ShapeSplit,
    largest_tokens,
    plan,
    sampling_bytes,
)
from mlxft.model.prefix import Sharing
from mlxft.runs import open_run
from mlxft.trainer.optim import Optimizer

Make = Callable[..., dict[str, Any]]
MB = 10**6


def job(recipe: Make, **changes: Any) -> Job:
    """Of the tiny model, without its weights."""
    config = parse_config(recipe(**changes))
    return job_of(config, base_skeleton(config))


def test_weights_adapters_gradients_and_optimizer_are_exact(recipe: Make) -> None:
    """Against the arrays of the model as training loads it."""
    for changes in ({}, {"tune": {"method": "full"}}, {"tune": {"rank": 3, "train": ["norm"]}}):
        config = parse_config(recipe(**changes))
        loaded = load(config.model.path, dtype="float32")
        prepare(config, loaded)
        found = plan(job_of(config, base_skeleton(config)), 2, 16, False)
        adapters = sum(v.nbytes for n, v in tree_flatten(loaded.model.parameters()) if ".lora_" in n)
        everything = sum(v.nbytes for _, v in tree_flatten(loaded.model.parameters()))
        trained = sum(v.nbytes for _, v in tree_flatten(loaded.model.trainable_parameters()))
        state = sum(v.nbytes for v in Optimizer(OptimSettings(), loaded.model).arrays().values())
        assert found.adapters == adapters
        # The scale of each low-rank layer is an array, but no parameter.
        assert 0 <= found.weights - (everything - adapters) <= 4 * 14
        assert (found.gradients, found.optimizer) == (trained, state)
        assert found.total == sum(v for k, v in asdict(found).items() if k not in ("checkpoint", "roles"))


def test_a_vocabulary_as_large_as_the_width(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Hidden states of the logits' own shape are not taken for logits."""
    folder = make_model_dir(tmp_path / "square", "llama", hidden_size=64, head_dim=16, vocab_size=64)
    split = ShapeSplit(skeleton(str(folder)).model)
    assert split.separable
    assert split.vocabulary == 64


def test_a_skeleton_has_the_shapes_and_types_of_the_loaded_model(
    tiny_model_dir: Path, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    wide = make_model_dir(tmp_path / "wide", hidden_size=64, head_dim=16)
    for folder, options in (
        (tiny_model_dir, {"dtype": "own"}),
        (tiny_model_dir, {"dtype": "bfloat16"}),
        (wide, {"dtype": "float32", "quantize": 4}),
        (wide, {"dtype": "float16", "quantize": 8, "group_size": 32}),
    ):
        ours, theirs = skeleton(str(folder), **options), load(str(folder), **options)
        shapes = [
            {n: (v.shape, v.dtype) for n, v in tree_flatten(loaded.model.parameters())} for loaded in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]
        assert ours.fingerprint == without_weights(theirs.fingerprint)


def test_published_mxfp4_is_known_before_it_is_loaded(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """gpt-oss as its maker packs it: codes and scales of the experts, all else in bfloat16, no type named."""
    folder = make_model_dir(tmp_path / "oss", "gpt_oss", hidden_size=64, intermediate_size=64)
    weights_file = next(folder.glob("*.safetensors"))
    weights = {k: v.astype(mx.bfloat16) for k, v in cast(dict[str, mx.array], mx.load(str(weights_file))).items()}

    def packed(name: str) -> dict[str, mx.array]:
        codes, scales = mx.quantize(weights.pop(f"{name}.weight"), 32, 4, mode="mxfp4")
        return {
            "blocks": codes.view(mx.uint8).reshape(*scales.shape, 16),
            "scales": scales,
            "bias": weights.pop(f"{name}.bias"),
        }

    for name in [name.rpartition(".gate")[0] for name in list(weights) if name.endswith("gate_proj.weight")]:
        gate, up, down = (packed(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        weights |= {f"{name}.down_proj_{part}": value for part, value in down.items()}
        for part, value in gate.items():  # one row of each, in turn
            both = mx.stack([value, up[part]], axis=2)
            weights[f"{name}.gate_up_proj_{part}"] = both.reshape(len(value), -1, *value.shape[2:])
    mx.save_safetensors(str(weights_file), weights)
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    for name in ("dtype", "torch_dtype", "quantization"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    for dtype in ("own", "float32"):
        ours, theirs = skeleton(str(folder), dtype=dtype), load(str(folder), dtype=dtype)
        shapes = [
            {n: (v.shape, v.dtype) for n, v in tree_flatten(found.model.parameters())} for found in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]
        assert ours.config["quantization"] == theirs.config["quantization"]
        assert ours.fingerprint == without_weights(theirs.fingerprint)
    experts = ours.model.model.layers[0].mlp.experts.up_proj
    assert (experts.weight.nbytes + experts.scales.nbytes) * 8 == 4.25 * experts.num_experts * 64 * 64


def test_config_json_is_all_it_takes(recipe: Make, tiny_model_dir: Path, tmp_path: Path) -> None:
    """No weight file, and no memory: the model of a 70B config is planned in a moment."""
    whole = plan(job(recipe), 2, 16, False)
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config))
    assert plan(job(recipe, **{"model.path": str(bare)}), 2, 16, False) == whole  # type: ignore[arg-type]
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "vocab_size": 128256}
    large |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
    (bare / "config.json").write_text(json.dumps(config | large))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    changed = recipe()
    changed["model"] = {"path": str(bare), "dtype": "bfloat16", "quantize": 4}
    parsed = parse_config(changed)
    found = plan(job_of(parsed, base_skeleton(parsed)), 1, 1024, True)
    assert mx.get_peak_memory() - before < 10 * MB
    # 70.55e9 numbers in 4 bits, with a bfloat16 scale and bias for 64 of them: 4.5 bits each.
    assert found.weights == pytest.approx(70.55e9 * 4.5 / 8, rel=0.01)
    assert found.macs() == [gb for gb in MACS if gb >= 64]


def test_more_of_anything_takes_more(recipe: Make) -> None:
    small = job(recipe)

    def total(rows: int = 2, width: int = 32, j: Job = small, checkpoint: bool = False) -> int:
        return plan(j, rows, width, checkpoint).needed

    assert total() < total(rows=3) < total(rows=8)
    assert total() < total(width=48) < total(width=200)
    assert total() < total(j=job(recipe, **{"tune.rank": 16}))
    assert total(8, 200, checkpoint=True) < total(8, 200)
    wide = plan(small, 2, 64, False)
    accumulated = plan(Job(small.model, small.optimizer, accumulate=2), 2, 64, False)
    assert accumulated.gradients == 2 * wide.gradients
    # The sum of the earlier micro-batches' gradients is in float32, twice the size of one in bfloat16.
    one, more = (
        plan(job(recipe, tune={"method": "full"}, **{"model.dtype": "bfloat16", "batch.accumulate": n}), 2, 64, False)
        for n in (1, 2)
    )
    assert more.gradients == 3 * one.gradients


def test_rank_and_optimizer_count(recipe: Make) -> None:
    one, two = (plan(job(recipe, **{"tune.rank": r}), 2, 16, False) for r in (4, 8))
    assert two.adapters == 2 * one.adapters
    state = {name: plan(job(recipe, optim={"name": name}), 2, 16, False).optimizer for name in ("adamw", "lion")}
    assert state["adamw"] == pytest.approx(2 * state["lion"], abs=64)  # two moments, one; and a few scalars
    assert state["adamw"] == pytest.approx(2 * one.adapters, abs=64)


def test_the_largest_budget_fits_and_the_next_does_not(recipe: Make) -> None:
    small = job(recipe)
    limit = 8 * MB
    for checkpoint in (False, True):
        tokens = largest_tokens(small, 64, checkpoint, limit)
        assert tokens % 64 == 0
        assert plan(small, tokens // 64, 64, checkpoint).needed <= limit
        assert plan(small, tokens // 64 + 2, 64, checkpoint).needed > limit
    assert largest_tokens(small, 64, True, limit) > largest_tokens(small, 64, False, limit)
    assert largest_tokens(small, 64, False, 1000) == 0


def test_macs_are_those_with_room() -> None:
    share = MAC_SHARE * 2**30
    exact = MemoryPlan(int(16 * share), 0, 0, 0, 0, 0, 0, 5 * MB, False)
    assert exact.macs() == [gb for gb in MACS if gb >= 16], "what is only ahead does not count"
    assert MemoryPlan(int(16 * share) + 1, 0, 0, 0, 0, 0, 0, 0, False).macs() == [gb for gb in MACS if gb > 16]
    assert MemoryPlan(10**12, 0, 0, 0, 0, 0, 0, 0, False).macs() == []


def test_sampling_of_what_is_no_transformer_is_refused() -> None:
    """Its training is planned; what it keeps of a prompt is no row of keys and values."""
    model = build("mamba2")
    model.train()
    assert plan(Job(model, 0), 1, 8, False).activations > 0
    with pytest.raises(ModelError, match=r"transformers only, and mamba2 keeps another state \(ArraysCache"):
        sampling_bytes(model, Rolling(1, 1, 8, 8, False, []))


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_text"])
def test_checkpointed_blocks_that_are_handed_keys_and_values_in_a_tuple(name: str, recipe: Make) -> None:
    config = parse_config(recipe())
    model = build(name)
    attach(model, LoRASpec(tuple(select_targets(model, "all-linear", "all")), 2, 2.0))
    found = job_of(config, model)
    assert plan(found, 2, 64, True).activations < plan(found, 2, 64, False).activations


def test_planning_leaves_no_trace(recipe: Make, tiny_model_dir: Path) -> None:
    """The model's arrays are its own again, its mode and the random state as they were, dropout or not."""
    config = parse_config(recipe(**{"tune.dropout": 0.3}))
    loaded = load(str(tiny_model_dir), dtype="float32")
    prepare(config, loaded)
    loaded.model.eval()
    before = {n: v.tolist() for n, v in tree_flatten(loaded.model.parameters())}
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(7)
    for checkpoint in (False, True):
        plan(job_of(config, loaded.model), 2, 16, checkpoint)
    assert mx.random.uniform(shape=(4,)).tolist() == expected
    assert {n: v.tolist() for n, v in tree_flatten(loaded.model.parameters())} == before
    assert not loaded.model.training
    assert {type(layer).__name__ for layer in loaded.model.layers} == {"TransformerBlock"}
    assert mx.isfinite(loaded.model(mx.array([[1, 2, 3]]))).all().item()


MEASURE = """
import json, sys
import mlxft
from rich.console import Console
run = mlxft.train(json.loads(sys.argv[1]), console=Console(quiet=True))
print(max(e["peak_memory_gb"] for e in run.metrics("train")))
"""


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tune": {"method": "full"}, "memory": {"checkpoint": "on"}}),
        ("qwen3", {"memory": {"checkpoint": "on"}}),
        ("gemma2", {"tune": {"method": "full"}}),
        ("mixtral", {}),
        ("qwen3_5", {}),
        ("qwen3_5", {"memory": {"checkpoint": "on"}}),
        ("qwen3_5", {"tune": {"method": "full"}}),
        ("llama", {"tune": {"rank": 4, "dropout": 0.1, "targets": ["all-linear", "embed_tokens"]}}),
        ("llama", {"tune": {"rank": 4, "dropout": 0.1}, "memory": {"checkpoint": "on"}}),
        ("llama", {"tune": {"method": "full"}, "model.dtype": "bfloat16"}),
        ("llama", {"tune": {"method": "full"}, "model.dtype": "bfloat16", "batch": {"rows": 8, "accumulate": 2}}),
    ],
)
def test_predicted_is_within_a_tenth_of_measured(
    kind: str, changes: dict[str, Any], recipe: Make, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_dir(tmp_path / "model", kind, hidden_size=64, intermediate_size=192, head_dim=16)
    settings = recipe(rows=16, **{"batch.rows": 16, "run.steps": 3}, **changes)
    settings["model"]["path"] = str(folder)
    config = parse_config(settings)
    shapes = make_objective(config, load_tokenizer(str(folder))).shapes()
    found, _, _ = plan_batches(config, base_skeleton(config), shapes)
    command = [sys.executable, "-c", MEASURE, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert found.total == pytest.approx(float(done.stdout) * 1e9, rel=0.1)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Sixteen pairs of some 150 tokens with their prompt."""
    words = ["the", "in", "on", "and", "or"]
    rows = [
        {"prompt": " ".join(words * (i % 3 + 10)), "chosen": " ".join(words * 9), "rejected": " ".join(words * 8)}
        for i in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(tmp_path / "pairs.jsonl")


JUDGED: dict[str, dict[str, Any]] = {
    "reward": {"objective": "reward"},
    "dpo": {"objective": "preference"},
    "dpo, head trained": {"objective": "preference", "tune": {"method": "full"}},
    "kto, checkpointed": {"objective": "preference", "preference": {"loss": "kto"}, "memory": {"checkpoint": "on"}},
}


@pytest.mark.parametrize("name", JUDGED)
def test_judged_answers_are_planned_too(
    name: str, pairs: str, recipe: Make, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """What reward and preference read of a model is what is predicted; the reference's forward pass adds nothing."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 4}
    folder = make_model_dir(tmp_path / "model", "llama", **sizes)
    data = {"train": pairs, "format": "preference"}
    settings = recipe(data=data, **{"batch.rows": 8, "run.steps": 2, "model.path": str(folder)}, **JUDGED[name])
    config = parse_config(settings)
    shapes = make_objective(config, load_tokenizer(str(folder))).shapes()
    found, rows, _ = plan_batches(config, base_skeleton(config), shapes)
    assert rows == (8 if "kto" in name else 16)
    assert (found.logits > 0) == (name != "reward")
    assert any(shape.prompt for shape in shapes) == ("kto" not in name), "prompts are computed once for both"
    command = [sys.executable, "-c", MEASURE, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert found.total == pytest.approx(float(done.stdout) * 1e9, rel=0.1)


def test_a_budget_for_pairs_holds_a_pair(pairs: str, recipe: Make) -> None:
    changes = {"objective": "reward", "data": {"train": pairs, "format": "preference", "max_length": 256}}
    settings = recipe(**changes, batch={"tokens": "auto"}, memory={"limit": 0.1})
    tokens = settled(parse_config(settings), resume=False).batch.tokens
    assert isinstance(tokens, int)
    assert tokens % 512 == 0
    of_one = job(recipe, **changes)
    assert of_one.outline == ("scores", 2)
    pair, row = (plan(of_one, n, 256, False).needed for n in (2, 1))
    assert largest_tokens(of_one, 256, False, pair) == 512
    assert largest_tokens(of_one, 256, False, (pair + row) / 2) == 0, "half a pair is none"


def test_a_reference_that_keeps_an_adapter_is_counted(pairs: str, recipe: Make, tmp_path: Path) -> None:
    import mlxft

    first = mlxft.train(recipe(**{"run.name": "first", "run.steps": 1}))
    data = {"train": pairs, "format": "preference"}
    changes = {"objective": "preference", "data": data, "tune": {}, "model.adapter": str(first.dir)}
    for settings, copies in (({}, 1), ({"precompute": True}, 0), ({"loss": "simpo"}, 0)):
        config = parse_config(recipe(**changes, preference=settings))
        shapes = [Shape(2, 64, 64)]
        found, _, _ = plan_batches(config, base_skeleton(config), shapes)
        assert found.frozen == copies * found.adapters
        assert planned(config, base_skeleton(config), shapes).to_json()["frozen"] == found.frozen


def test_a_reference_beside_whole_weights_is_counted(
    pairs: str, recipe: Make, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Where all weights move, the reference's stay in memory: a plan without them is a fourth too low here."""
    folder = make_model_dir(tmp_path / "wide", hidden_size=384, intermediate_size=1152, head_dim=48)
    data = {"train": pairs, "format": "preference"}
    changes = {"objective": "preference", "tune": {"method": "full"}, "data": data, "model.path": str(folder)}
    settings = recipe(**changes, **{"batch.rows": 1, "run.steps": 3, "memory.measure": False})
    config = parse_config(settings)
    shapes = make_objective(config, load_tokenizer(str(folder))).shapes()
    found, _, _ = plan_batches(config, base_skeleton(config), shapes)
    assert found.frozen == found.weights
    command = [sys.executable, "-c", MEASURE, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert found.total == pytest.approx(float(done.stdout) * 1e9, rel=0.1)


def test_auto_becomes_the_largest_budget_and_is_written_down(recipe: Make) -> None:
    import mlxft

    changes = {"batch": {"tokens": "auto"}, "data.max_length": 128, "run.steps": 2, "memory": {"limit": 0.012}}
    settings = recipe(**changes)
    config = settled(parse_config(settings), resume=False)
    tokens = config.batch.tokens
    assert isinstance(tokens, int)
    assert 128 <= tokens < 16 * 128
    run = mlxft.train(settings)
    assert open_run(run.dir).config.batch.tokens == tokens
    # A resumed run keeps its budget, whatever would fit now.
    settings["memory"]["limit"] = 0.2
    assert settled(parse_config(settings), resume=True).batch.tokens == tokens
    assert settled(parse_config(settings), resume=False).batch.tokens != tokens


def test_a_plan_above_the_limit_is_refused_before_anything_is_written(recipe: Make, tmp_path: Path) -> None:
    import mlxft

    with pytest.raises(ConfigError, match=r"training needs .* MB .*memory\.limit is 0\.2 MB"):
        mlxft.train(recipe(memory={"limit": 0.0002}))
    with pytest.raises(ConfigError, match=r"auto: not even one row of data\.max_length \(2048\) fits"):
        mlxft.train(recipe(batch={"tokens": "auto"}, memory={"limit": 0.0002}))
    assert not (tmp_path / "runs").exists()


def test_rows_that_are_far_too_long_are_refused_by_shorter_ones(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of such a row takes minutes; of those that fit, none is looked for beyond what is asked."""
    seen: list[int] = []

    def noted(job: Job, rows: int, width: int, checkpoint: bool) -> MemoryPlan:
        seen.append(rows * width)
        return plan(job, rows, width, checkpoint)

    monkeypatch.setattr("mlxft.model.memory.plan", noted)
    assert largest_tokens(job(recipe), 1 << 15, False, 1e8) == 0
    assert max(seen) <= 1 << 12
    seen.clear()
    assert largest_tokens(job(recipe), 64, False, 1e12, 512) == 512
    assert max(seen) <= 512


def test_scores_grow_with_the_square_of_the_length(recipe: Make) -> None:
    """Attention keeps T x T scores for the gradient, whatever the budget: fewer longer rows take more."""
    small = job(recipe)
    few, many = plan(small, 2, 512, False), plan(small, 16, 64, False)
    # 4 heads, 2 layers, one set of scores kept by each: by blocks of 64 queries with the keys up to their own.
    kept = 4 * 2 * 4 * (2 * 512 * (512 + 64) // 2 - 16 * 64**2)
    assert few.needed - many.needed > kept
    assert math.isclose(few.batch, many.batch)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
@pytest.mark.parametrize("reads", ["logprobs", "scores"])
def test_shared_prompts_are_planned_with_the_masks_that_the_model_takes(name: str, reads: Any) -> None:
    """Gemma 2 groups query heads by hand, so that its scores have an axis more; twice the prompts' tokens cost more."""
    model = build(name, num_attention_heads=2, num_key_value_heads=1)
    attach_head(model, ScoreHead(32))
    model.train()
    pairs = Job(model, 0, outline=Outline(reads, 2))
    long, short = (plan(pairs, 4, p + 16, False, (p, 16)) for p in (128, 64))
    assert short.activations < long.activations < plan(pairs, 4, 144, False).activations
    assert model.training


def test_what_can_not_share_prompts_is_known_without_weights() -> None:
    model = build("gemma3n")  # its shared layers ask their caches for what a stand-in does not have
    assert not Sharing(ShapeSplit(model)).thinkable
    with pytest.raises(ModelError, match="cannot read completions after a shared prompt"):
        plan(Job(model, 0, outline=Outline("logprobs", 2)), 4, 48, False, (32, 16))
