"""mlxft fuse: what it measures, what it writes and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxft.model import folder

Command = Callable[..., Any]
PAIRS = [
    {"prompt": f"{i} the", "chosen": f"{word} of", "rejected": f"{word} z z"}
    for i, word in enumerate(["in", "on", "at", "is", "to", "a", "or", "and", "of", "the"])
]
PACKED = {"model.quantize": 4, "model.group_size": 32}
HIGH = {"optim.lr": 0.05, "run.steps": 2}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path.name


@pytest.mark.parametrize("packed", [{}, PACKED])
@pytest.mark.parametrize("changes", [{}, {"data.template": "none", "tune.train": ["norm"]}])
def test_a_fused_reward_model_scores_as_its_run(
    changes: dict[str, Any], packed: dict[str, Any], write: Command, mlxft: Command, tmp_path: Path
) -> None:
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    data = {"objective": "reward", "data.train": "pairs.jsonl", "data.format": "preference", "data.valid": 0.3}
    done = mlxft("train", write(**data, **changes, **packed, **HIGH))
    assert done.code == 0, done.err
    done = mlxft("fuse", "runs/a", "fused", "--json", "--keep", "0.99", "--probe", "valid")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["measure"] == "squared score difference"
    assert told["probe"] == {"source": "validation rows", "rows": 6, "tokens": told["probe"]["tokens"]}
    assert 0.99 <= told["kept"] <= 1
    assert told["adapted_to_fused"] <= 0.01 * told["adapted_to_base"]
    one, two = (
        [json.loads(line) for line in mlxft("score", model, "pairs.jsonl", "--json").out.splitlines()]
        for model in ("runs/a", "fused")
    )
    # The whole adaptation is of the size of the root of "adapted to base".
    near = 1e-4 if not packed else 0.5 * told["adapted_to_base"] ** 0.5
    assert all(b["chosen"] == pytest.approx(a["chosen"], abs=near) for a, b in zip(one[:-1], two[:-1]))
    assert mlxft("generate", "--model", "fused", "hi").code == 1
    assert mlxft("fuse", "runs/a", "out", "--adapter", "runs/a/adapter").code == 2


def test_rows_to_measure_on(write: Command, mlxft: Command, refused: Command, tmp_path: Path) -> None:
    """Built-in ones, a file's, or validation rows; never the rows that were trained on, and no file unasked."""
    assert mlxft("train", write(**HIGH, **{"data.valid": 0.2})).code == 0
    probes = {"built-in text": [], "validation rows": ["--probe", "valid"]}
    probes |= {name: ["--probe", name] for name in ("other.jsonl", "text.jsonl")}
    write_rows(tmp_path / "other.jsonl", PAIRS)
    write_rows(tmp_path / "text.jsonl", [{"text": "the in of " * 300}])
    for source, options in probes.items():
        told = json.loads(mlxft("fuse", "runs/a", "fused", "--overwrite", "--json", *options).out)
        assert told["probe"]["source"] == source
        assert told["kept"] == pytest.approx(1, abs=1e-6)
        assert told["adapted_to_base"] > 1e-3
        assert 0 < told["probe"]["tokens"] <= 600
    assert "no such file" in refused(2, "fuse", "runs/a", "out", "--probe", "nope.jsonl")
    write_rows(tmp_path / "bad.jsonl", [{"words": 3}])
    assert "a probe's have messages, text" in refused(1, "fuse", "runs/a", "out", "--probe", "bad.jsonl")
    # What the recipe of a run names may be a stranger's choice: it is named, and left alone.
    assert mlxft("train", write("two.yaml", **HIGH, **{"data.valid": "rows-10.jsonl", "run.name": "b"})).code == 0
    (tmp_path / "rows-10.jsonl").rename(tmp_path / "gone.jsonl")
    done = mlxft("fuse", "runs/b", "built")
    assert "--probe valid measures on the run's own validation rows (of /" in done.out
    assert "built-in text" in done.out
    assert "rows-10.jsonl: no such file" in refused(2, "fuse", "runs/b", "out", "--probe", "valid")
    assert mlxft("train", write("three.yaml", **HIGH, **{"run.name": "c"})).code == 0
    assert "has no validation rows" in refused(2, "fuse", "runs/c", "out", "--probe", "valid")


def test_too_little_kept(write: Command, mlxft: Command, refused: Command, tmp_path: Path) -> None:
    assert mlxft("train", write(**PACKED, **{"optim.lr": 1e-3, "run.steps": 2})).code == 0
    said = refused(1, "fuse", "runs/a", "out", "--bits", "4")
    assert "of the adaptation is kept, --keep asks for 95.0%, so out is not written; leave --bits 4 out" in said
    told = mlxft("fuse", "runs/a", "out", "--bits", "4", "--json")
    assert told.code == 1
    assert json.loads(told.out)["written"] is False
    assert not (tmp_path / "out").exists()
    forced = mlxft("fuse", "runs/a", "out", "--bits", "4", "--json", "--force")
    assert forced.code == 0
    assert json.loads(forced.out)["kept"] < 0.95
    best = json.loads(mlxft("fuse", "runs/a", "best", "--json").out)
    assert best["kept"] >= 0.95
    assert best["tried"][0]["precision"] == "4 bits"
    assert best["bytes"] > best["tried"][0]["bytes"]


def test_merging_from_the_command_line(write: Command, mlxft: Command, refused: Command, tmp_path: Path) -> None:
    base = ""
    for name, seed in (("a", 0), ("b", 1)):
        assert mlxft("train", write(**HIGH, **{"run.name": name, "run.seed": seed})).code == 0
        base = json.loads((tmp_path / "runs" / name / "adapter" / "adapter_config.json").read_text())["mlxft"]["base"][
            "model"
        ]
    both = ("--adapter", "runs/a:0.7", "--adapter", "runs/b:0.3")
    found = [json.loads(mlxft("fuse", *paths, *both, "--json").out) for paths in (["one"], [base, "two"])]
    assert found[0]["adapted_to_base"] == found[1]["adapted_to_base"] > 0
    assert [part["weight"] for part in found[0]["adapters"]] == [0.7, 0.3]
    third = json.loads(mlxft("fuse", "runs/a", "three", "--adapter", "runs/b:0", "--json").out)
    assert [part["weight"] for part in third["adapters"]] == [1, 0]
    assert "'x' is not a weight" in refused(2, "fuse", "out", "--adapter", "runs/a:x")
    assert "is named twice" in refused(2, "fuse", "out", "--adapter", "runs/a", "--adapter", "runs/a:0.3")
    assert "give RUN and OUT, or OUT" in refused(2, "fuse", "out")
    assert "give RUN and OUT, or OUT" in refused(2, "fuse", "runs/a", "b", "c")


def test_a_full_disk(write: Command, mlxft: Command, refused: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlxft("train", write(**HIGH)).code == 0
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    assert "out: needs about 0.05 GB, 0.00 GB are free on its disk" in refused(1, "fuse", "runs/a", "out")
