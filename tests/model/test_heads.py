"""Scalar heads: how they are drawn, what they read, and that a wrong one is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxft.errors import ConfigError, ModelError
from mlxft.model.adapters import LoRASpec, attach, prepare_full
from mlxft.model.heads import (
    ScoreHead,
    adapter_metadata,
    attach_head,
    body_width,
    find_head,
    fix_unread,
    head_arrays,
    head_metadata,
    head_of,
    load_head,
    read_scores,
    without_head,
)
from mlxft.model.load import Loaded, load
from mlxft.model.logits import Split


def saved(folder: Path, head: ScoreHead, fingerprint: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "head.safetensors"
    mx.save_safetensors(str(file), head_arrays(head), head_metadata(fingerprint, {}))
    return file


def test_drawn_with_standard_deviation_one_over_root_of_width_plus_one() -> None:
    mx.random.seed(0)
    weight = np.array(ScoreHead(40_000).weight)
    assert weight.dtype == np.float32
    assert weight.std() == pytest.approx(1 / np.sqrt(40_001), rel=0.02)
    assert abs(weight.mean()) < 3 * weight.std() / 200


def test_the_score_is_the_head_times_the_last_real_tokens_state(tiny_model: Loaded) -> None:
    model = tiny_model.model
    split = Split(model)
    attach_head(model, ScoreHead(body_width(split)))
    eos = tiny_model.tokenizer.eos_token_id
    # Padding is the very token that ends a row: only the index says which of them is the last real one.
    rows = [[5, 9, eos], [7, eos, 8, 11, eos]]
    ids = mx.array([row + [eos] * (8 - len(row)) for row in rows])
    got = read_scores(split, ids, mx.array([2, 4]))
    assert got.dtype == mx.float32
    for row, score in zip(rows, got.tolist()):
        head = head_of(model)
        assert head is not None
        wanted = (model.model(mx.array([row]))[0, -1] * head.weight[0]).sum().item()
        assert score == pytest.approx(wanted, abs=1e-5)
        assert read_scores(split, mx.array([row]), mx.array([len(row) - 1])).item() == pytest.approx(score, abs=1e-5)


def test_the_head_is_no_part_of_what_mlx_lm_loads(tiny_model: Loaded) -> None:
    model = tiny_model.model
    names = [n for n, _ in tree_flatten(model.parameters())]
    head = ScoreHead(32)
    attach_head(model, head)
    assert [n for n, _ in tree_flatten(model.parameters()) if n not in names] == ["score_head.weight"]
    with without_head(model) as taken:
        assert taken is head
        assert [n for n, _ in tree_flatten(model.parameters())] == names
    assert head_of(model) is head


def test_what_a_score_does_not_depend_on_is_frozen(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load(str(make_model_dir(tmp_path / "m", "llama", tie_word_embeddings=False)), dtype="float32")
    prepare_full(loaded.model, "all", [], [])
    split = Split(loaded.model)
    attach_head(loaded.model, ScoreHead(32))
    fix_unread(split, "tune.targets")
    trained = dict(tree_flatten(loaded.model.trainable_parameters()))
    assert "lm_head.weight" not in trained
    assert {"score_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(trained)

    def total(parameters: object) -> mx.array:
        loaded.model.update(parameters)
        return read_scores(split, mx.array([[1, 2, 3]]), mx.array([2])).sum()

    slopes = dict(tree_flatten(mx.grad(total)(loaded.model.trainable_parameters())))
    assert all(mx.any(v != 0).item() for v in slopes.values())


def test_an_adapter_where_no_score_is_read_is_refused(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load(str(make_model_dir(tmp_path / "m", "llama", tie_word_embeddings=False)), dtype="float32")
    attach(loaded.model, LoRASpec(("lm_head", "model.layers.0.mlp.up_proj"), 2, 1.0))
    with pytest.raises(ConfigError, match=r"tune\.targets: scores do not depend on lm_head"):
        fix_unread(Split(loaded.model), "tune.targets")


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_any_separable_architecture(kind: str, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    split = Split(load(str(make_model_dir(tmp_path / kind, kind)), dtype="float32").model)
    attach_head(split.model, ScoreHead(body_width(split)))
    padded = read_scores(split, mx.array([[3, 4, 5, 0, 0], [6, 7, 8, 9, 10]]), mx.array([2, 4]))
    alone = read_scores(split, mx.array([[3, 4, 5]]), mx.array([2]))
    assert padded[0].item() == pytest.approx(alone.item(), abs=1e-4)


def test_an_architecture_without_a_body_of_its_own_is_refused() -> None:
    split = Split.__new__(Split)
    split.model, split.separable = nn.Linear(2, 2), False
    with pytest.raises(ModelError, match=r"the body of this model \(linear\) cannot be separated"):
        body_width(split)


def test_a_head_of_another_base_or_width_is_refused(tiny_model: Loaded, tmp_path: Path) -> None:
    split = Split(tiny_model.model)
    with pytest.raises(ModelError, match=r"another base \(abc\)"):
        load_head(split, saved(tmp_path / "a", ScoreHead(32), "abc"), tiny_model.fingerprint)
    with pytest.raises(ModelError, match="width 48, and this model's have 32"):
        load_head(split, saved(tmp_path / "b", ScoreHead(48)), tiny_model.fingerprint)
    assert head_of(tiny_model.model) is None
    broken = tmp_path / "c" / "head.safetensors"
    broken.parent.mkdir()
    broken.write_bytes(b"x")
    with pytest.raises(ModelError, match="cannot be read"):
        load_head(split, broken, None)
    mx.save_safetensors(str(broken), {"weight": mx.zeros(3)})
    with pytest.raises(ModelError, match="has no head"):
        load_head(split, broken, None)


def test_a_head_and_an_adapter_that_were_not_saved_together_are_refused(tiny_model: Loaded, tmp_path: Path) -> None:
    head = ScoreHead(32)
    file = saved(tmp_path, head)
    weights = {"x": mx.zeros(1)}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights, adapter_metadata(head))
    load_head(Split(tiny_model.model), file, None)
    found = head_of(tiny_model.model)
    assert found is not None
    assert mx.array_equal(found.weight, head.weight).item()
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights, adapter_metadata(ScoreHead(32)))
    with pytest.raises(ModelError, match=r"was not saved together.*--resume"):
        load_head(Split(tiny_model.model), file, None)


def test_a_head_is_found_in_a_run_and_in_its_folders(tmp_path: Path) -> None:
    assert find_head(None) is None
    assert find_head(tmp_path) is None
    file = saved(tmp_path / "adapter", ScoreHead(4))
    assert find_head(tmp_path) == find_head(tmp_path / "adapter") == file
