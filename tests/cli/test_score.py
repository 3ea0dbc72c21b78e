"""mlxft score, and reward runs where text is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"prompt": f"{i} the", "chosen": f"{word} of", "rejected": f"{word} z z"}
    for i, word in enumerate(["in", "on", "at", "is", "to", "a", "or", "and", "of", "the"])
]


@pytest.fixture
def reward(write: Callable[..., str], mlxft: Callable[..., Any], tmp_path: Path) -> str:
    """A reward run, trained by the command."""
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), "utf-8")
    changes = {"objective": "reward", "data.train": "pairs.jsonl", "data.format": "preference", "data.valid": 0.3}
    done = mlxft("train", write(**changes, **{"run.dir": "runs"}))
    assert done.code == 0, done.err
    assert "ece" in done.out
    return "runs/a"


def test_pairs_answers_and_rankings(reward: str, mlxft: Callable[..., Any], shell: Any, tmp_path: Path) -> None:
    done = shell("score", reward, "pairs.jsonl", "--json")
    assert done.code == 0, done.err
    *lines, last = [json.loads(line) for line in done.out.splitlines()]
    assert [line["row"] for line in lines] == [f"pairs.jsonl:{n}" for n in range(1, 11)]
    assert all(line["margin"] == pytest.approx(line["chosen"] - line["rejected"]) for line in lines)
    assert last["summary"]["accuracy"] == sum(line["margin"] > 0 for line in lines) / 10
    first = ROWS[0]
    mixed = [
        {"prompt": first["prompt"], "completion": first["chosen"]},
        {"prompt": first["prompt"], "answers": [first["rejected"], first["chosen"]]},
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in mixed), "utf-8")
    one, ranking, _ = [json.loads(line) for line in mlxft("score", reward, "mixed.jsonl", "--json").out.splitlines()]
    assert one["score"] == pytest.approx(lines[0]["chosen"], abs=1e-4)
    assert ranking["scores"] == pytest.approx([lines[0]["rejected"], lines[0]["chosen"]], abs=1e-4)
    # The same as messages: a prompt that is a text is then the user's turn.
    good, bad = ([{"role": "assistant", "content": first[side]}] for side in ("chosen", "rejected"))
    turns = [
        {"prompt": first["prompt"], "completion": good, "label": False},
        {"prompt": first["prompt"], "answers": [bad, good[0]], "ratings": [1, 2]},
    ]
    (tmp_path / "turns.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in turns), "utf-8")
    told = [json.loads(line) for line in mlxft("score", reward, "turns.jsonl", "--json").out.splitlines()]
    assert [told[0]["score"], *told[1]["scores"]] == pytest.approx([one["score"], *ranking["scores"]], abs=1e-4)
    said = mlxft("score", reward, "mixed.jsonl").out.splitlines()
    assert said[1].startswith("mixed.jsonl:2: answers[")
    assert " > answers[" in said[1]
    assert said[-1].startswith("rows 2, mean ")


def test_the_wrong_kind_of_run_is_refused(
    reward: str, refused: Callable[..., str], mlxft: Any, write: Any, tmp_path: Path
) -> None:
    said = refused(1, "generate", "--model", reward, "hi")
    assert "is a reward model: it gives scores, not text; use mlxft score" in said
    assert mlxft("train", write(**{"run.name": "policy", "run.dir": "runs"})).code == 0
    assert "gives text, not scores" in refused(1, "score", "runs/policy", "pairs.jsonl")
    assert "no such file" in refused(2, "score", reward, "pears.jsonl")
    assert "there is no run runs/none" in refused(2, "score", "runs/none", "pairs.jsonl")


def test_rows_that_can_not_be_scored_are_all_named(reward: str, refused: Callable[..., str], tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "a", "answers": []}, {"text": "x"}]
    (tmp_path / "bad.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in bad), "utf-8")
    said = refused(1, "score", reward, "bad.jsonl")
    for place in (
        "bad.jsonl:1: the row has prompt; expected",
        "bad.jsonl:2: answers is []",
        "bad.jsonl:3: the row has",
    ):
        assert place in said
