"""The step that is measured before training: as much as the run takes, and it leaves no trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxft import measure
from mlxft.device import machine_bytes
from mlxft.errors import ConfigError
from mlxft.model.memory import is_checkpointed
from mlxft.recipe import load_config, parse_config
from mlxft.run import assemble, load_base, make_objective, train

Make = Callable[..., dict[str, Any]]
MEASURE = """
import json, sys
import mlxft
from rich.console import Console
from mlxft import measure
found, own = [], measure.measured_bytes
measure.measured_bytes = lambda *args: found.append(own(*args)) or found[-1]
run = mlxft.train(json.loads(sys.argv[1]), console=Console(quiet=True))
print(json.dumps([found[-1], max(e["peak_memory_gb"] for e in run.metrics("train")) * 1e9]))
"""


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"prompt": "the in on", "chosen": "and or " * n, "rejected": "is of"} for n in range(1, 9)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tune": {"method": "full"}},
        {"tune": {"method": "full"}, "memory": {"checkpoint": "on"}},
        {"tune": {"method": "full"}, "batch": {"rows": 4, "accumulate": 3}},
    ],
    ids=["lora", "full", "checkpointed", "accumulated"],
)
def test_what_is_measured_is_what_the_run_takes(
    changes: dict[str, Any], recipe: Make, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_dir(tmp_path / "wide", hidden_size=128, intermediate_size=384, head_dim=32)
    settings = recipe(rows=16, **{"batch.rows": 16, "run.steps": 4, **changes})
    settings["model"]["path"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(settings)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured, taken = json.loads(done.stdout.splitlines()[-1])
    # How far MLX works ahead within a step hangs on the machine: usually they are within 5 %.
    assert measured == pytest.approx(taken, rel=0.15)


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "reward"])
def test_a_run_that_was_measured_is_the_run(objective: str, pairs: str, recipe: Make) -> None:
    """Weights and losses to the bit, dropout and the reference point included."""
    changes: dict[str, Any] = {"run.steps": 3, "tune.dropout": 0.2}
    if objective != "sft":
        changes = {"run.steps": 3, "data": {"train": pairs, "format": "preference"}}
        changes["objective"] = "reward" if objective == "reward" else "preference"
        changes |= {"preference": {"loss": "kto"}} if objective == "kto" else {}
    runs = [train(recipe(**changes, **{"memory.measure": m, "run.name": f"m-{m}"})) for m in (False, True)]
    one, other = (mx.load(str(run.result / "adapters.safetensors")) for run in runs)
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    assert [e["loss"] for e in runs[0].metrics("train")] == [e["loss"] for e in runs[1].metrics("train")]


def test_a_step_that_takes_too_much_is_checkpointed_and_stays_so(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan would leave checkpointing off; what is measured decides, is written down, and holds for a resume."""
    asked: list[bool] = []

    def pretend(config: Any, model: Any, objective: Any, optimizer: Any) -> int:
        asked.append(is_checkpointed(model))
        return 10**6 if asked[-1] else machine_bytes() // 2

    monkeypatch.setattr(measure, "measured_bytes", pretend)
    run = train(recipe(**{"run.steps": 2, "optim.schedule": "constant", "optim.warmup": 0}))
    assert asked == [False, True]
    assert load_config(run.dir / "config.yaml").memory.checkpoint == "on"
    again = recipe(**{"run.steps": 3, "optim.schedule": "constant", "optim.warmup": 0})
    train(again, resume=True)
    assert asked == [False, True], "a resumed run is not measured again"
    assert load_config(run.dir / "config.yaml").memory.checkpoint == "on"


def test_what_does_not_fit_is_refused_and_off_is_off(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measured_bytes", lambda *args: 1 << 62)
    with pytest.raises(ConfigError, match=r"a step found no room; .* What helps: a smaller batch.tokens"):
        train(recipe())
    assert not (tmp_path / "runs/a").exists()
    monkeypatch.setattr(measure, "measured_bytes", lambda *args: machine_bytes() // 2)
    run = train(recipe(**{"memory.checkpoint": "off", "run.steps": 1}))
    assert load_config(run.dir / "config.yaml").memory.checkpoint == "off"


def test_no_memory_for_the_step_is_all_memory(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(recipe(**{"memory.measure": False}))
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    _, optimizer, _, _ = assemble(config, loaded, objective)

    def fails(*args: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(measure, "gradient", fails)
    said = "[metal::malloc] Resource limit (499000) exceeded."
    assert measure.measured_bytes(config, loaded.model, objective, optimizer) == 1 << 62
    said = "[matmul] shapes"
    with pytest.raises(RuntimeError, match="shapes"):
        measure.measured_bytes(config, loaded.model, objective, optimizer)


def test_a_crowded_memory_is_warned_of(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(recipe(**{"memory.limit": 10**5}))
    monkeypatch.setattr(measure, "swap_bytes", lambda: 3e9)
    above, swap = measure.crowded(config)
    assert above.startswith("warning: memory.limit is above the ")
    assert swap == "warning: 3.00 GB of swap are in use: close what crowds the memory"
    monkeypatch.setattr(measure, "swap_bytes", lambda: 0.0)
    assert measure.crowded(parse_config(recipe())) == []
