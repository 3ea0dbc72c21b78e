"""Several adapters in one: their changes, each times its weight, add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

import mlxft
from mlxft.errors import ConfigError, ModelError
from mlxft.exports.fuse import find_sources, fuse_sources, load_shared_base, parse_adapter
from mlxft.runs import Run

Recipe = Callable[..., dict[str, Any]]
IDS = mx.array([[3, 40, 77, 5, 21, 9]])


def train(recipe: Recipe, name: str, **changes: Any) -> Run:
    optim = {"lr": 0.02, "schedule": "constant", "warmup": 0}
    return mlxft.train(recipe(**{"run.name": name, "run.steps": 2, "optim": optim, **changes}))


def weights(path: Path | str) -> dict[str, mx.array]:
    return dict(tree_flatten(mlxft.load(path).model.parameters()))


@pytest.fixture
def runs(recipe: Recipe) -> dict[str, Run]:
    """Of different methods, ranks, scales and targets; d trains whole what a and b have low-rank layers on."""
    embedding = {"tune.train": ["embed_tokens", "norm"]}
    return {
        "a": train(recipe, "a", **{"tune.targets": ["embed_tokens", "attention"]}),
        "b": train(recipe, "b", **{"tune.method": "dora", "tune.rank": 2, "tune.scale": 3.0, "run.seed": 1}),
        "c": train(recipe, "c", **{"tune.targets": ["down_proj"], "tune.layers": [1], "tune.rslora": True}),
        "d": train(recipe, "d", **{"tune.targets": ["v_proj"], **embedding}),
    }


def test_changes_add_up(runs: dict[str, Run], tiny_model_dir: Path, tmp_path: Path) -> None:
    base, alone = weights(str(tiny_model_dir)), {}
    for name, run in runs.items():
        fuse_sources(run.dir, tmp_path / name)
        alone[name] = weights(tmp_path / name)
    for mix in ("a:0.7 b:0.3", "a:-1 b c d:0.5", "c:2 d:0.25", "b:0.5"):
        parts = [(name, float(number or 1)) for name, _, number in (part.partition(":") for part in mix.split())]
        wanted = dict(base)
        for name, weight in parts:
            wanted = {n: v + weight * (alone[name][n] - base[n]) for n, v in wanted.items()}
        out = tmp_path / mix
        fused = fuse_sources(None, out, adapters=[(runs[name].dir, weight) for name, weight in parts])
        found = weights(out)
        assert found.keys() == wanted.keys(), mix
        assert all(mx.allclose(found[n], wanted[n], atol=1e-5) for n in found), mix
        assert any(mx.abs(found[n] - base[n]).max() > 1e-2 for n in found), mix
        # What was measured as "adapted" is the merged model.
        assert fused.chosen.kept == pytest.approx(1, abs=1e-5), mix
        assert mx.allclose(mlx_lm.load(str(out))[0](IDS), mlxft.load(out).model(IDS), atol=1e-5), mix


def test_experts_and_quantised_bases(recipe: Recipe, make_model_dir: Any, tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path / "moe", "qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    model = {"model.path": str(folder), "model.quantize": 4, "model.group_size": 32}
    one = train(recipe, "one", **model)
    two = train(recipe, "two", **model, **{"tune.rank": 2, "tune.targets": "mlp", "run.seed": 1})
    out = tmp_path / "out"
    fused = fuse_sources(None, out, adapters=[(one.dir, 0.5), (two.dir, 0.5)], keep=0.99)
    assert fused.chosen.kept is not None
    assert fused.chosen.kept >= 0.99
    exact = tmp_path / "exact"
    assert fuse_sources(
        None, exact, adapters=[(one.dir, 0.5), (two.dir, 0.5)], dequantize=True
    ).chosen.kept == pytest.approx(1)
    base = mlxft.load(str(folder), quantize=4, group_size=32).model(IDS)
    off = mx.abs(mlxft.load(out).model(IDS) - mlxft.load(exact).model(IDS)).mean()
    assert off < 0.3 * mx.abs(base - mlxft.load(exact).model(IDS)).mean()


def test_several_forms_of_a_base_are_told(save_adapter: Any, make_model_dir: Any, tmp_path: Path) -> None:
    base = make_model_dir(tmp_path / "base", hidden_size=64)
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        save_adapter(base, folder, ["down_proj"])
    about = json.loads((packed / "adapter_config.json").read_text("utf-8"))
    about["mlxft"]["base"] |= {"quantize": 4, "group_size": 32}
    (packed / "adapter_config.json").write_text(json.dumps(about), "utf-8")
    for first, second, form in ((packed, plain, "quantised to 4 bits"), (plain, packed, "in float")):
        loaded, (note,) = load_shared_base(find_sources(None, [(first, 0.5), (second, 0.5)])[0], None)
        assert f"{packed} on {base} in 4 bits" in note
        assert f"merged on {base}, {form}: name another one first" in note
        assert ("quantization" in loaded.config) is (first == packed)
    assert load_shared_base(find_sources(packed, [])[0], None)[1] == []


def test_the_weight_of_an_adapter() -> None:
    assert parse_adapter("runs/a") == (Path("runs/a"), 1.0)
    assert parse_adapter("runs/a:0.7") == (Path("runs/a"), 0.7)
    assert parse_adapter("a:b:-1e-1") == (Path("a:b"), -0.1)
    for text in ("a:x", "a:", "a:nan", "a:inf", ":1"):
        with pytest.raises(ConfigError, match=r"is not a weight; expected FOLDER or FOLDER:NUMBER"):
            parse_adapter(text)


def test_refusals(recipe: Recipe, make_model_dir: Any, tmp_path: Path) -> None:
    run = train(recipe, "a")
    a, out = run.dir, tmp_path / "out"
    for again in (a, run.result):
        with pytest.raises(ConfigError, match="is named twice"):
            fuse_sources(a, out, adapters=[(again, 0.5)])
    other = train(recipe, "e", **{"model.path": str(make_model_dir(tmp_path / "other", num_hidden_layers=3))})
    with pytest.raises(ModelError, match="adapters of two bases cannot be merged"):
        fuse_sources(a, out, adapters=[(other.dir, 1.0)])
    with pytest.raises(ModelError, match="no such run or adapter"):
        fuse_sources(a, out, adapters=[(tmp_path / "nowhere", 1.0)])
    assert not out.exists()


def test_a_base_that_is_gone_or_another_now(recipe: Recipe, make_model_dir: Any, tmp_path: Path) -> None:
    base = make_model_dir(tmp_path / "base")
    run = train(recipe, "a", **{"model.path": str(base)})
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"its base cannot be loaded: .*; if it has moved, name it with --model"):
        fuse_sources(run.dir, tmp_path / "out")
    assert fuse_sources(run.dir, tmp_path / "out", model=str(tmp_path / "moved")).written
    make_model_dir(base, intermediate_size=96)
    with pytest.raises(ModelError, match="was trained on another base"):
        fuse_sources(run.dir, tmp_path / "again")
