"""`mlxft distill-cache` and training by what it stored, through the installed command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def stored(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose teacher is the base with a prompt, to be stored in the folder `cache`."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "the " * (1 + i % 3) + "in"} for i in range(10)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = recipe(
        **{
            "objective": "distill",
            "distill": {"teacher_prompt": "of the", "on_policy": 0.0, "cache": "cache", "divergence": "forward_kl"},
            "data": {"train": "prompts.jsonl", "format": "prompts", "max_length": 60, "valid": 0.2},
            "rollout": {"prompts": 4, "max_tokens": 5},
            "run.steps": 3,
        }
    )
    Path("r.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    return Path("r.yaml")


def test_a_teacher_is_stored_and_learnt_from(stored: Path, mlxft: Callable[..., Any]) -> None:
    refused = mlxft("train", "r.yaml")
    assert refused.code == 2
    assert "distill.cache: there is no stored teacher in cache; mlxft distill-cache RECIPE writes it" in refused.err
    done = mlxft("distill-cache", "r.yaml", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"] == 10
    again = mlxft("distill-cache", "r.yaml")
    assert again.code == 0, again.err
    assert again.out.startswith("10 rows, ")
    checked = mlxft("check", "r.yaml", "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["memory"]["frozen"] == 0
    trained = mlxft("train", "r.yaml")
    assert trained.code == 0, trained.err
    other = mlxft("train", "r.yaml", "distill.top_k=3", "run.name=b")
    assert other.code == 2
    assert "cache was made of something else: top_k was 64 and is 3" in other.err
    moved = mlxft("distill-cache", "r.yaml", "distill.top_k=3")
    assert moved.code == 2
    assert "name another folder" in moved.err


def test_a_recipe_without_a_cache_is_not_stored(stored: Path, mlxft: Callable[..., Any]) -> None:
    refused = mlxft("distill-cache", "r.yaml", "distill.cache=null", "distill.on_policy=1")
    assert refused.code == 2
    assert "distill.cache: name the folder to write" in refused.err
    other = mlxft("distill-cache", "r.yaml", "objective=sft")
    assert other.code == 2


def test_a_damaged_cache_is_named(stored: Path, mlxft: Callable[..., Any]) -> None:
    assert mlxft("distill-cache", "r.yaml").code == 0
    Path("cache/top-00000.npy").write_bytes(b"cut")
    refused = mlxft("train", "r.yaml")
    assert refused.code == 2
    assert "distill.cache: cache/top-00000.npy is damaged" in refused.err
    assert mlxft("distill-cache", "r.yaml").code == 0
    assert mlxft("train", "r.yaml").code == 0
    Path("cache/teacher.json").write_text("{")
    assert "cache/teacher.json is damaged" in mlxft("train", "r.yaml", "run.name=b").err
