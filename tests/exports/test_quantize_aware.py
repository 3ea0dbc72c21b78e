"""Runs with tune.quantize_aware: what is trained, validated, read and sampled is what is fused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import mlxft
from mlxft.build import base_skeleton, planned
from mlxft.config import parse_config
from mlxft.errors import ConfigError, ExportError, ModelError
from mlxft.exports.fuse import fuse_sources
from mlxft.exports.peft import export_peft
from mlxft.model.adapters import LoRASpec, attach
from mlxft.model.frozen import FrozenModels
from mlxft.model.layers import QUANTIZED, LowRank, dense_weight
from mlxft.model.load import load
from mlxft.model.memory import Rolling, Shape, sampling_bytes

Recipe = Callable[..., dict[str, Any]]
Maker = Callable[..., Path]
IDS = mx.array([[3, 40, 77, 5, 21, 9]])
AWARE = {"tune.quantize_aware": 4, "data.valid": 0.2}
PACKED = {"model.quantize": 4, "model.group_size": 32}


def logits(path: str | Path) -> mx.array:
    return mlxft.load(path).model(IDS).astype(mx.float32)


@pytest.mark.parametrize("base", [PACKED, {}], ids=["packed", "float"])
def test_a_run_is_what_is_fused(base: dict[str, Any], recipe: Recipe, tiny_model_dir: Path, tmp_path: Path) -> None:
    run = mlxft.train(recipe(**AWARE, **base))
    out, held = tmp_path / "out", tmp_path / "held.jsonl"
    fused = fuse_sources(run.dir, out, bits=4)
    assert (fused.chosen.name, fused.chosen.kept, fused.chosen.gap.divergence) == ("4 bits", 1, 0)
    assert [trial.name for trial in fuse_sources(run.dir, tmp_path / "again").trials] == ["4 bits"]
    assert mx.allclose(logits(out), logits(run.dir), atol=1e-5)
    assert mx.allclose(mlx_lm.load(str(out))[0](IDS), logits(run.dir), atol=1e-5)
    kinds = {path: m.bits for path, m in mlxft.load(out).model.named_modules() if isinstance(m, QUANTIZED)}
    assert set(kinds.values()) == {4}
    assert ("model.embed_tokens" in kinds) == bool(base), "what is not adapted stays as it was"
    # Validation, evaluation and sampling read the rounded model.
    held.write_text("".join((tmp_path / "rows-10.jsonl").read_text("utf-8").splitlines(keepends=True)[:4]), "utf-8")
    losses = [mlxft.evaluate(path, held).to_json()["tasks"][0]["figures"]["loss"]["value"] for path in (run.dir, out)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert mlxft.generate(mlxft.load(run.dir), "the in", max_tokens=8, temperature=0) == mlxft.generate(
        mlxft.load(out), "the in", max_tokens=8, temperature=0
    )
    # Dequantised it computes the same; other bits would round it again; other programs add the update as it is.
    fuse_sources(run.dir, tmp_path / "float", dequantize=True)
    assert mx.allclose(logits(tmp_path / "float"), logits(run.dir), atol=1e-4)
    with pytest.raises(ExportError, match=r"--bits 8: was trained for 4 bits .tune.quantize_aware"):
        fuse_sources(run.dir, tmp_path / "no", bits=8)
    if not base:
        theirs = mlx_lm.load(str(tiny_model_dir), adapter_path=str(run.result))[0](IDS)
        assert mx.abs(theirs - logits(run.dir)).max() > 1e-3
        assert "rounded to 4 bits" in "\n".join(export_peft(run.dir, tmp_path / "peft"))


def test_experts_and_resuming(recipe: Recipe, make_model_dir: Maker, tmp_path: Path) -> None:
    """A mixture on a float base: fused as trained; a resumed run is the uninterrupted one, bit for bit."""
    folder = make_model_dir(tmp_path / "moe", "mixtral")
    settings = recipe(**AWARE, **{"model.path": str(folder), "run.save_every": 2})
    whole = mlxft.train({**settings, "run": {**settings["run"], "name": "whole"}})
    shutil.rmtree(mlxft.train(settings).dir / "checkpoints/step-4")
    resumed = mlxft.train(settings, resume=True)
    name = "adapters.safetensors"
    assert (resumed.result / name).read_bytes() == (whole.result / name).read_bytes()
    fuse_sources(resumed.dir, tmp_path / "out")
    assert mx.allclose(logits(tmp_path / "out"), logits(resumed.dir), atol=1e-5)


def test_the_reference_is_the_plain_base(recipe: Recipe, tiny_model_dir: Path, tmp_path: Path) -> None:
    base = load(str(tiny_model_dir), dtype="float32")
    plain = base.model(IDS)
    attach(base.model, LoRASpec(("model.layers.0.self_attn.q_proj",), 4, 2.0, quantize_aware=2))
    assert not mx.allclose(base.model(IDS), plain, atol=1e-4)
    with FrozenModels(base.model, None).base().reading() as split:
        assert mx.array_equal(split.model(IDS), plain)
    pairs = [{"prompt": "the in", "chosen": " on" * n, "rejected": " of" * n} for n in (1, 2, 3, 4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    data = {"train": str(tmp_path / "pairs.jsonl"), "format": "preference"}
    run = mlxft.train(recipe(objective="preference", data=data, **{"tune.quantize_aware": 4}, **PACKED))
    # A packed base keeps its numbers until the adapter moves them: DPO begins at ln 2.
    first, *_, last = (event["loss"] for event in run.metrics("train"))
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert last != first


def test_rollouts_are_of_the_rounded_policy(recipe: Recipe, tmp_path: Path) -> None:
    """On a float base the rounding is far off; sampling, scoring and training agree on it."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the in on"}\n' * 4, "utf-8")
    data = {"train": str(tmp_path / "prompts.jsonl"), "format": "prompts", "max_length": 64}
    rollout = {"prompts": 4, "samples": 2, "max_tokens": 6}
    rules = {"rules": [{"kind": "regex", "pattern": "[a-m]"}]}
    settings = recipe(objective="grpo", data=data, rollout=rollout, rewards=rules, grpo={"kl_coef": 0.1})
    settings["tune"]["quantize_aware"] = 2
    run = mlxft.train(settings)
    trained, rolled = run.metrics("train"), run.metrics("rollout")
    assert trained[0]["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert rolled[0]["kl"] != pytest.approx(0, abs=1e-4), "the reference is not rounded"


def test_what_does_not_go_together(recipe: Recipe, make_model_dir: Maker, tmp_path: Path) -> None:
    for changes, said in (
        ({"tune.dropout": 0.1}, "leave out one"),
        ({"tune": {"method": "full", "quantize_aware": 4}}, "method full has no quantize_aware"),
        ({"distributed": {"shard": "base"}}, "distributed.shard: base cuts them"),
    ):
        with pytest.raises(ConfigError, match=said):
            mlxft.train(recipe(**{"tune.quantize_aware": 4, **changes}))
    narrow = make_model_dir(tmp_path / "narrow", hidden_size=48, num_attention_heads=4, head_dim=12)
    with pytest.raises(ModelError, match="48 wide, which groups of 32 do not fill"):
        mlxft.train(recipe(**{"model.path": str(narrow), "tune.quantize_aware": 4}))


def test_an_adapter_goes_on(recipe: Recipe) -> None:
    """One that is not rounded is from now on; one that is stays so."""
    first = mlxft.train(recipe(**{"run.steps": 1}))
    settings = recipe(
        **{"model.adapter": str(first.dir), "tune": {"quantize_aware": 4}, "run.name": "b", "run.steps": 1}
    )
    run = mlxft.train(settings)
    assert json.loads((run.result / "adapter_config.json").read_text())["mlxft"]["quantize_aware"] == 4
    settings = recipe(**{"model.adapter": str(run.dir), "run.name": "c", "run.steps": 1})
    with pytest.raises(ConfigError, match=r"leave out tune.quantize_aware"):
        mlxft.train({**settings, "tune": {"quantize_aware": 3}})
    model = mlxft.load(mlxft.train({**settings, "tune": {}}).dir).model
    assert {m.form.bits for m in model.modules() if isinstance(m, LowRank) and m.form} == {4}
    (run.result / "inputs.safetensors").unlink()
    with pytest.raises(ModelError, match=r"without inputs\.safetensors.* copy that file"):
        mlxft.load(run.dir)


def test_the_plan_counts_it(recipe: Recipe) -> None:
    config = parse_config(recipe(**{"tune.quantize_aware": 4, "memory": {"checkpoint": "off"}}))
    model = base_skeleton(config)
    found = planned(config, model, [Shape(2, 16, 16)])
    (without,) = (size for other, size in found.others.items() if "not rounded" in other)
    # Packed weights wait for the gradient, with a scale and a bias a group: less than the dense ones.
    layers = [
        (dense_weight(m.base).size, m.form.group_size) for m in model.modules() if isinstance(m, LowRank) and m.form
    ]
    packed = sum(numbers // 2 + 8 * numbers // size for numbers, size in layers)
    assert 0.5 * packed < found.plan.needed - without < 2 * packed  # at the peak the last ones are gone
    rolling = Rolling(2, 1, 8, 8, False, ())
    held = sampling_bytes(model, rolling) - sampling_bytes(base_skeleton(parse_config(recipe())), rolling)
    assert held == packed
