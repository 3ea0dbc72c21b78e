"""Drawing again gives the same; a look at a model leaves the random state and every module's mode as they were."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from rich.console import Console

from mlxft.build import base_skeleton, decide_checkpointing, make_objective, prepare
from mlxft.check import check
from mlxft.config import parse_config
from mlxft.model.adapters import LoRASpec, prepare_adapter, select_targets
from mlxft.model.heads import body_width
from mlxft.model.layers import Dropout, again, aside, evaluating, position, probing, random_state, without_dropout
from mlxft.model.load import Loaded, load
from mlxft.model.logits import Packing, Split
from mlxft.model.memory import Job, Rolling, Shape, ShapeSplit, plan, sampling_bytes, scoring_bytes
from mlxft.model.prefix import Sharing
from mlxft.model.sampling import Sampling, complete
from mlxft.study.lr_find import lr_find
from mlxft.trainer.loop import validate

Recipe = Callable[..., dict[str, Any]]


def drawn(dropout: nn.Module) -> list[float]:
    found: list[float] = dropout(mx.ones((16,))).tolist()
    return found


def test_again_draws_the_same_masks_and_leaves_the_global_generator() -> None:
    dropout = Dropout(0.5)
    mx.random.seed(3)
    begin = position()
    masks = [drawn(dropout) for _ in range(3)]
    assert len({tuple(mask) for mask in masks}) == 3
    after = random_state()
    with again(begin):
        assert drawn(dropout) == masks[0]
        second = position()
        assert drawn(dropout) == masks[1]
        with again(second):  # within another: of a part of it
            assert drawn(dropout) == masks[1]
        assert drawn(dropout) == masks[2]
    assert random_state() == after


def test_masks_are_those_of_mlx() -> None:
    """Also those that are drawn again; off is off."""
    mx.random.seed(4)
    theirs = drawn(nn.Dropout(0.3))
    mx.random.seed(4)
    begin, ours = position(), Dropout(0.3)
    assert drawn(ours) == theirs
    ours.eval()
    with again(begin):
        assert drawn(ours) == [1.0] * 16
        ours.train()
        assert drawn(ours) == theirs
        assert ours(mx.ones((4,), mx.bfloat16)).dtype == mx.bfloat16
    assert without_dropout(nn.Sequential(ours))
    assert drawn(ours) == [1.0] * 16
    assert not without_dropout(ours)


def test_aside_and_evaluating_end_with_their_block() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Dropout(0.5))
    model.layers[1].eval()
    mx.random.seed(5)
    before = random_state()

    def fail() -> None:
        with probing(model):
            assert not any(module.training for module in model.modules())
            mx.random.normal((3,))
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fail()
    assert random_state() == before
    assert [module.training for module in model.layers] == [True, False]
    with evaluating(model, training=True):
        assert all(module.training for module in model.modules())
    with aside():
        mx.random.seed(99)
    assert random_state() == before


# Looks at a model.


@pytest.fixture(params=["tied", "untied"])
def noisy(request: pytest.FixtureRequest, make_model_dir: Callable[..., Path], tmp_path: Path) -> Loaded:
    """A model in training with dropout on all linear layers, the embedding, and the head where it has one."""
    tied = request.param == "tied"
    loaded = load(str(make_model_dir(tmp_path / "model", tie_word_embeddings=tied)), dtype="float32")
    targets = ["all-linear", "embed_tokens"] + ([] if tied else ["lm_head"])
    paths = tuple(select_targets(loaded.model, targets, "all"))
    prepare_adapter(loaded.model, LoRASpec(paths, rank=2, scale=2.0, dropout=0.5), [])
    loaded.model.train()
    return loaded


LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "split": Split,
    "trained head": lambda model: Split(model).trained_head(),
    "packing": lambda model: Packing(model, 64),
    "sharing": lambda model: Sharing(Split(model)).reason,
    "width": lambda model: body_width(Split(model)),
    "shapes": lambda model: ShapeSplit(model).trained_head(),
    "plan": lambda model: [plan(Job(model, 0), 2, 16, on) for on in (False, True)],
    "sampling": lambda model: sampling_bytes(model, Rolling(2, 1, 4, 4, False, [])),
    "scoring": lambda model: scoring_bytes(model, [Shape(2, 16, 4)]),
}


def assert_untouched(model: nn.Module, look: Callable[[], Any]) -> None:
    flags = [module.training for module in model.modules()]
    for _ in range(2):  # what is found the first time may be kept
        before = random_state()
        look()
        assert random_state() == before
        assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_a_model_leaves_no_trace(name: str, noisy: Loaded) -> None:
    mx.random.seed(11)
    assert_untouched(noisy.model, lambda: LOOKS[name](noisy.model))


def test_what_a_run_does_between_its_steps_leaves_no_trace(noisy: Loaded, recipe: Recipe) -> None:
    """Validation, samples, plans and skeletons."""
    model = noisy.model
    config = parse_config(recipe(tune={"rank": 2, "dropout": 0.5}, **{"data.valid": 0.3}))
    objective = make_objective(config, noisy.tokenizer)
    mx.random.seed(12)
    assert_untouched(model, lambda: validate(model, objective))
    assert_untouched(model, lambda: decide_checkpointing(config, model, objective))
    assert_untouched(model, lambda: complete(model, noisy.tokenizer, "the", Sampling(4)))
    assert_untouched(model, lambda: base_skeleton(config))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_what_a_reference_says_leaves_no_trace(loss: str, recipe: Recipe, tiny_model: Loaded, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} the", "chosen": "and the or", "rejected": "in"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    data = {"train": str(tmp_path / "pairs.jsonl"), "format": "preference"}
    config = parse_config(recipe(objective="preference", data=data, preference={"loss": loss}))
    objective: Any = make_objective(config, tiny_model.tokenizer)
    prepare(config, tiny_model)
    objective.prepare(tiny_model.model)
    tiny_model.model.train()
    steps = objective.steps(tiny_model.model)
    assert_untouched(tiny_model.model, lambda: next(steps))


def test_timing_and_searching_leave_no_trace(recipe: Recipe) -> None:
    quiet, before = Console(file=io.StringIO()), random_state()
    config = parse_config(recipe(**{"tune.dropout": 0.5, "tune.targets": ["all-linear", "embed_tokens"]}))
    check(config, 0, quiet, as_json=True, time=True)
    assert random_state() == before
    lr_find(config, steps=20, console=quiet)
    assert random_state() == before
