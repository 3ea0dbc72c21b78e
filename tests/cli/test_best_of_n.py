"""mlxft sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.data.formats import convert
from mlxft.data.sources import read_rows
from mlxft.study.generate import read_keep

Command = Callable[..., Any]
TURNS = [
    {"role": "user", "content": "of is ü"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "on"},
]
SAID: list[Any] = ["the in", TURNS, "on a"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def use(write: Callable[..., str], tiny_model_dir: Path, tmp_path: Path) -> tuple[str, ...]:
    """Three prompts, each with its wanted length; a function that scores by the distance to it."""
    write()
    rows = [{"prompt": prompt, "wanted": 5 * i} for i, prompt in enumerate(SAID)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    body = "return [-abs(len(c) - row['wanted']) for c, row in zip(completions, rows)]"
    (tmp_path / "f.py").write_text(f"def near(prompts, completions, rows):\n    {body}\n")
    more = ("--function", "f.py:near", "--seed", "1", "--max-tokens", "6")
    return ("sample", "prompts.jsonl", "--model", str(tiny_model_dir), *more)


def score(row: dict[str, Any]) -> int:
    return -abs(len(row["completion"]) - 5 * SAID.index(row["prompt"]))


def test_the_best_is_the_best_of_all(use: tuple[str, ...], mlxft: Command, tmp_path: Path) -> None:
    for keep in ("all", "best", "above:-6"):
        done = mlxft(*use, "--n", "5", "--cut-off", "--keep", keep, "--out", f"{keep}.jsonl")
        assert (done.code, done.err) == (0, "")
    every, best, above = (lines(tmp_path / f"{keep}.jsonl") for keep in ("all", "best", "above:-6"))
    assert [row["prompt"] for row in every] == [prompt for prompt in SAID for _ in range(5)]
    assert all(row["score"] == score(row) for row in every)
    assert len({row["completion"] for row in every}) > 10
    groups = [every[i : i + 5] for i in (0, 5, 10)]
    assert best == [max(group, key=lambda row: row["score"]) for group in groups]
    assert above == [row for row in every if row["score"] > -6]
    assert 0 < len(above) < len(every)


def test_the_rows_are_read_as_prompt_completion(use: tuple[str, ...], mlxft: Command, tmp_path: Path) -> None:
    """What is context stays context: only the sampled answer is trained."""
    done = mlxft(*use, "--cut-off", "--out", "best.jsonl", "--json")
    summary = json.loads(done.out)
    assert (summary["prompts"], summary["answers"], summary["kept"], summary["out"]) == (3, 24, 3, "best.jsonl")
    assert summary["kept_mean"] == pytest.approx(sum(row["score"] for row in lines(tmp_path / "best.jsonl")) / 3)
    assert summary["kept_mean"] > summary["mean"]
    _, chat, _ = (item for _, item in convert(read_rows(str(tmp_path / "best.jsonl"), "train"), "prompt-completion"))
    assert [m.get("weight") for m in chat.messages] == [None, 0, None, None]
    assert mlxft("train", "recipe.yaml", "data.train=best.jsonl", "data.format=prompt-completion").code == 0


def test_with_system_the_row_has_it_too(use: tuple[str, ...], mlxft: Command, tmp_path: Path) -> None:
    assert mlxft(*use, "--cut-off", "--system", "of the", "--overwrite", "--out", "o.jsonl").code == 0
    first, second, _ = lines(tmp_path / "o.jsonl")
    assert first["prompt"] == [{"role": "system", "content": "of the"}, {"role": "user", "content": "the in"}]
    assert second["prompt"] == [{"role": "system", "content": "of the"}, *TURNS]


def test_answers_that_did_not_end_are_left_out(use: tuple[str, ...], mlxft: Command, tmp_path: Path) -> None:
    """SFT would take them for whole."""
    done = mlxft(*use, "--n", "60", "--keep", "all", "--max-tokens", "40", "--overwrite", "--out", "o.jsonl", "--json")
    summary = json.loads(done.out)
    assert summary["answers"] == 180
    assert summary["cut_off"] > 0
    assert summary["kept"] == 180 - summary["cut_off"] - summary["empty"] == len(lines(tmp_path / "o.jsonl"))
    text = mlxft(*use, "--n", "60", "--keep", "all", "--max-tokens", "40", "--overwrite", "--out", "o.jsonl").out
    assert f"{summary['kept']} of 180 completions of 3 prompts kept ({summary['cut_off']} cut off" in text


def test_by_a_reward_run(use: tuple[str, ...], mlxft: Command, tmp_path: Path, recipe: Callable[..., Any]) -> None:
    """Of a bare base, and of a policy with an adapter of its own on that base."""
    import yaml

    pairs = [{"prompt": f"the {i}", "chosen": "in on", "rejected": "at"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    settings = recipe(**{"objective": "reward", "run.name": "rm", "run.steps": 2})
    settings["data"] |= {"train": "pairs.jsonl", "format": "preference"}
    (tmp_path / "rm.yaml").write_text(yaml.safe_dump(settings))
    assert mlxft("train", "rm.yaml").code == 0
    assert mlxft("train", "recipe.yaml", "run.name=policy").code == 0
    (tmp_path / "texts.jsonl").write_text('{"prompt": "the in"}\n{"prompt": "on a"}\n')
    for model in (use[3], "runs/policy"):
        args = ("sample", "texts.jsonl", "--model", model, "--reward", "runs/rm", "--n", "3", "--keep", "all")
        done = mlxft(*args, "--seed", "2", "--max-tokens", "5", "--cut-off", "--overwrite", "--out", "o.jsonl")
        assert done.code == 0, done.err
        rows = lines(tmp_path / "o.jsonl")
        assert len({row["score"] for row in rows}) == len(rows) == 6


def test_wrong_use(use: tuple[str, ...], refused: Callable[..., str], tmp_path: Path) -> None:
    out = ("--overwrite", "--out", "o.jsonl")
    bare = use[:4]
    assert "--reward or --function" in refused(2, *bare, *out)
    assert "--reward or --function" in refused(2, *use, "--reward", "x", *out)
    assert "rewards.adapter: there is no run or folder nope" in refused(2, *bare, "--reward", "nope", *out)
    assert "--n 8 at temperature 0" in refused(2, *use, "--temperature", "0", *out)
    assert "--keep best: --n is 1" in refused(2, *use, "--n", "1", *out)
    assert "--keep is 'bets' (did you mean best?); expected best, all" in refused(2, *use, "--keep", "bets", *out)
    assert "--out is the file of prompts" in refused(2, *use, "--out", "./prompts.jsonl")
    assert "Missing option '--out'" in refused(2, *use)
    assert "nope.jsonl: no such file" in refused(2, "sample", "nope.jsonl", *use[2:], *out)
    err = refused(1, *use, "--cut-off", "--keep", "above:3", *out)
    assert "none of 24 completions is kept; the highest score is" in err
    err = refused(1, *use, "--max-tokens", "1", "--n", "2", *out)
    assert "cut off: raise --max-tokens (1), or give --cut-off" in err
    (tmp_path / "f.py").write_text("def near(prompts, completions, rows):\n    return [None] * len(rows)\n")
    assert "prompts.jsonl:1: returned None" in refused(1, *use, *out)


def test_what_keep_says() -> None:
    assert read_keep("above:-1.5", 1) == -1.5
    assert read_keep("best", 2) is None
    for text in ("above:nan", "above:", "above", "above:x", "3"):
        with pytest.raises(ValueError, match="expected best, all, or above:X with a number"):
            read_keep(text, 2)
