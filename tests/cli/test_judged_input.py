"""Judged answers that can not be trained on, by the command: what is refused, what is left out, and what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxft.model.heads import ScoreHead, adapter_metadata, head_metadata

Write, Refused = Callable[..., str], Callable[..., str]
GOOD: list[dict[str, Any]] = [{"prompt": f"q{i}", "chosen": "the in", "rejected": f"on it {i}"} for i in range(4)]
OTHER = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.fixture
def judged(write: Write) -> Write:
    """`judged("reward", rows, ...)` writes rows and a recipe for them, of format preference unless said otherwise."""

    def make(objective: str, rows: list[dict[str, Any]] | None = None, **changes: Any) -> str:
        # `allow_nan`, since files from elsewhere hold NaN too.
        text = "".join(json.dumps(row) + "\n" for row in (GOOD if rows is None else rows))
        Path("pairs.jsonl").write_text(text, "utf-8")
        base = {"objective": objective, "data.train": "pairs.jsonl", "data.format": "preference", "run.steps": 1}
        return write(**{**base, **changes})

    return make


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{**OTHER, "rejected": "a"}], ["pairs.jsonl:5: chosen and rejected are the same"]),
        (
            [{"prompt": "q", "chosen": "a"}, {**OTHER, "chosen": None}, {**OTHER, "rejected": "  "}],
            [
                "pairs.jsonl:5: no field 'rejected'",
                "pairs.jsonl:6: no field 'chosen'",
                "pairs.jsonl:7: rejected is empty",
            ],
        ),
        (
            [{"chosen": turns("x", "a"), "rejected": turns("y", "b")}],
            ["pairs.jsonl:5: chosen[0] and rejected[0] differ before the last turn"],
        ),
        (
            [{**OTHER, "margin": float("nan")}, {**OTHER, "margin": float("inf")}, {**OTHER, "margin": "big"}],
            ["pairs.jsonl:5: margin is nan", "pairs.jsonl:6: margin is inf", "pairs.jsonl:7: margin is 'big'"],
        ),
        ([{**OTHER, "chosen": "a " * 60}], ["pairs.jsonl:5: 78 tokens; data.max_length is 64", "data.overflow: drop"]),
    ],
    ids=["no difference", "missing side", "prompt mismatch", "margin", "too long"],
)
@pytest.mark.parametrize("objective", ["reward", "preference"])
def test_pairs_that_are_refused(
    objective: str, rows: list[dict[str, Any]], said: list[str], judged: Write, refused: Refused
) -> None:
    recipe = judged(objective, [*GOOD, *rows], **{"data.max_length": 64})
    for command in ("check", "train"):
        found = refused(1, command, recipe)
        assert not [text for text in said if text not in found], found


def test_one_answer_can_not_be_rated(judged: Write, refused: Refused) -> None:
    rows = [{"prompt": "q", "completions": ["a"], "ratings": [3]}]
    recipe = judged("reward", rows, **{"data.format": "ratings"})
    assert "pairs.jsonl:1: completions has one entry; expected two or more" in refused(1, "train", recipe)


def test_ties_where_the_loss_has_none(judged: Write, refused: Refused, mlxft: Callable[..., Any]) -> None:
    rows = [*GOOD, {**OTHER, "tie": True}]
    for loss in ("dpo", "kto", "orpo"):
        said = refused(1, "train", judged("preference", rows, preference={"loss": loss}))
        assert f"pairs.jsonl:5: is a tie, which loss {loss} cannot learn from" in said
    assert "1 pair without a better completion" in mlxft("check", judged("reward", rows)).out


@pytest.mark.parametrize("objective", ["reward", "preference"])
def test_what_is_too_long_is_left_out_and_never_cut(
    objective: str, judged: Write, refused: Refused, mlxft: Callable[..., Any]
) -> None:
    # Up to token 64 the two answers are the same.
    long = {"prompt": "q", "chosen": "a " * 60 + "x", "rejected": "a " * 60 + "y"}
    drop = {"data.max_length": 64, "data.overflow": "drop"}
    done = mlxft("train", judged(objective, [*GOOD, long], **drop))
    assert (done.code, done.err) == (0, "")
    assert "pairs 4, " in done.out
    assert "1 pair was longer than data.max_length and is left out" in done.out
    Path("valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [long, GOOD[0]]), "utf-8")
    recipe = judged(objective, **drop, **{"data.valid": "valid.jsonl"})
    assert "validation: 1 pair was longer than data.max_length and is left out" in mlxft("check", recipe).out
    Path("valid.jsonl").write_text(json.dumps(long) + "\n", "utf-8")
    assert "data.valid: no row is left to train on, of 1" in refused(1, "check", recipe)
    said = refused(1, "train", judged(objective, [long], **drop), "run.name=b")
    assert "no row is left to train on, of 1: 1 pair was longer than data.max_length and is left out" in said
    assert "None" not in said
    said = refused(2, "train", judged(objective, [long]), "data.overflow=truncate", "run.name=b")
    assert "data.overflow: truncate would change" in said
    assert "overflow: split" in refused(2, "train", "recipe.yaml", "data.overflow=split", "run.name=b")


def test_answers_of_one_length_are_suspicious(judged: Write, mlxft: Callable[..., Any]) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "the", "rejected": "on"} for i in range(4)]
    for objective in ("reward", "preference"):
        assert "every completion has 2 tokens: were they cut before?" in mlxft("check", judged(objective, rows)).out


def test_runs_of_the_wrong_kind(judged: Write, refused: Refused, mlxft: Callable[..., Any], tmp_path: Path) -> None:
    for name, objective in (("judge", "reward"), ("policy", "preference")):
        assert mlxft("train", judged(objective), f"run.name={name}").code == 0
    judge, policy = (str(tmp_path / "runs" / name) for name in ("judge", "policy"))
    Path("p.jsonl").write_text('{"prompt": "x"}\n', "utf-8")
    for command in ("check", "train"):
        said = refused(2, command, judged("preference", tune={}), f"model.adapter={judge}")
        assert "is a reward model, which returns scores, and objective preference" in said
    for use in (("generate", "x", "--model", judge), ("chat", "--model", judge)):
        assert "is a reward model: it gives scores, not text" in refused(1, *use)
    assert "gives text, not scores" in refused(1, "score", policy, "pairs.jsonl")
    assert mlxft("train", judged("reward", tune={}), f"model.adapter={policy}", "run.name=b").code == 0, "to start from"


def test_adapters_and_heads_of_another_base_or_width(
    judged: Write, refused: Refused, mlxft: Callable[..., Any], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    assert mlxft("train", judged("reward"), "run.name=judge").code == 0
    wide = make_model_dir(tmp_path / "wide", hidden_size=64, head_dim=16)
    adapter = tmp_path / "runs/judge/adapter"
    recipe = judged("reward", tune={})
    for command in ("check", "train"):
        said = refused(1, command, recipe, f"model.adapter={adapter}", f"model.path={wide}")
        assert "was trained on another base" in said
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    weights = mx.load(str(other / "adapters.safetensors"))
    assert isinstance(weights, dict)
    head = ScoreHead.of(mx.zeros((1, 48)))
    mx.save_safetensors(str(other / "head.safetensors"), {"score_head.weight": head.weight}, head_metadata("", {}))
    for use in (("train", recipe, f"model.adapter={other}"), ("score", str(other), "pairs.jsonl")):
        assert "was not saved together with adapters.safetensors" in refused(1, *use)
    mx.save_safetensors(str(other / "adapters.safetensors"), weights, adapter_metadata(head))
    for use in (("train", recipe, f"model.adapter={other}"), ("score", str(other), "pairs.jsonl")):
        assert "reads hidden states of width 48, and this model's have 32" in refused(1, *use)
