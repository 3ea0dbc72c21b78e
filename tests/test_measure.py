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
from mlx.utils import tree_flatten

from mlxft import build
from mlxft.build import load_base, make_objective, settled
from mlxft.check import check
from mlxft.config import load_config, parse_config
from mlxft.device import machine_bytes
from mlxft.errors import ConfigError, ModelError, TrainingError
from mlxft.model.layers import is_checkpointed, random_state
from mlxft.objectives.base import arrays_of
from mlxft.run import assemble, train
from mlxft.text import make_console

Make = Callable[..., dict[str, Any]]
MEASURE = """
import json, sys
import mlxft
from rich.console import Console
from mlxft import build
found, own = [], build.measured_bytes
build.measured_bytes = lambda *args: found.append(own(*args)) or found[-1]
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
        {"tune": {"method": "full"}, "batch": {"rows": 1}},
        {"tune": {"method": "full"}, "run.compile": "on"},
    ],
    ids=["lora", "full", "checkpointed", "accumulated", "update", "compiled"],
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


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "precomputed", "reward"])
def test_a_run_that_was_measured_is_the_run(objective: str, pairs: str, recipe: Make) -> None:
    """Weights and losses to the bit, dropout and the reference point included."""
    changes: dict[str, Any] = {"run.steps": 3, "tune.dropout": 0.2}
    if objective != "sft":
        changes = {"run.steps": 3, "data": {"train": pairs, "format": "preference"}}
        changes["objective"] = "reward" if objective == "reward" else "preference"
        settings = {"kto": {"loss": "kto"}, "precomputed": {"loss": "kto", "precompute": True}}.get(objective)
        changes |= {"preference": settings} if settings else {}
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

    monkeypatch.setattr(build, "measured_bytes", pretend)
    run = train(recipe(**{"run.steps": 2, "optim.schedule": "constant", "optim.warmup": 0}))
    assert asked == [False, True]
    assert load_config(run.dir / "config.yaml").memory.checkpoint == "on"
    again = recipe(**{"run.steps": 3, "optim.schedule": "constant", "optim.warmup": 0})
    train(again, resume=True)
    assert asked == [False, True], "a resumed run is not measured again"
    kept = load_config(run.dir / "config.yaml").memory
    assert (kept.checkpoint, kept.measure) == ("on", True)


def test_what_does_not_fit_is_refused_and_off_is_off(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "measured_bytes", lambda *args: 1 << 62)
    with pytest.raises(ConfigError, match=r"a step found no room; .* What helps: a smaller batch.tokens"):
        train(recipe())
    assert not (tmp_path / "runs/a").exists()
    monkeypatch.setattr(build, "measured_bytes", lambda *args: machine_bytes() // 2)
    run = train(recipe(**{"memory.checkpoint": "off", "run.steps": 1}))
    assert load_config(run.dir / "config.yaml").memory.checkpoint == "off"


def test_no_memory_for_the_step_is_all_memory(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(recipe(**{"memory.measure": False}))
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    _, optimizer, _, _ = assemble(config, loaded, objective)

    def fails(*args: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(build.Gradients, "__call__", fails)
    said = "[metal::malloc] Resource limit (499000) exceeded."
    assert build.measured_bytes(config, loaded.model, objective, optimizer) == 1 << 62
    said = "[matmul] shapes"
    with pytest.raises(RuntimeError, match="shapes"):
        build.measured_bytes(config, loaded.model, objective, optimizer)
    said = "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e)"
    for work in (build.measured_bytes, lambda c, m, o, _: build.gradient_seconds(c, m, o, False)):
        with pytest.raises(TrainingError, match=r"measured before training\. What helps most: .* the display sleep"):
            work(config, loaded.model, objective, optimizer)


def test_a_crowded_memory_is_warned_of(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(recipe(**{"memory.limit": 10**5}))
    monkeypatch.setattr(build, "swap_bytes", lambda: 3e9)
    above, swap = build.crowded(config)
    assert above.startswith("warning: memory.limit is above the ")
    assert swap.startswith("warning: 3.00 GB of swap are in use")
    monkeypatch.setattr(build, "swap_bytes", lambda: 0.0)
    assert build.crowded(parse_config(recipe())) == []


def made(settings: dict[str, Any]) -> tuple[Any, ...]:
    """Config, model, objective and optimiser as the loop has them."""
    config = parse_config(settings)
    loaded = load_base(config)
    objective = make_objective(config, loaded.tokenizer)
    return config, loaded.model, objective, assemble(config, loaded, objective).optimizer


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd", "adafactor", "muon"])
def test_nothing_is_left_of_it(name: str, recipe: Make) -> None:
    optim = {"name": name, "lr": 1e-2} | ({"momentum": 0.9} if name == "sgd" else {})
    optim |= {"weight_decay": 0.1} if name not in ("adam", "lion") else {}
    changes = {"optim": optim, "tune": {"method": "full"}, "model.dtype": "bfloat16", "memory.measure": False}
    config, model, objective, optimizer = made(recipe(**changes))
    before = {n: mx.array(v) for n, v in tree_flatten([model.parameters(), optimizer.arrays()])}
    random, state = random_state(), objective.state_dict()
    assert build.measured_bytes(config, model, objective, optimizer) is not None
    after = dict(tree_flatten([model.parameters(), optimizer.arrays()]))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[n], after[n]).item() for n in before)
    assert (random_state(), objective.state_dict()) == (random, state)


ON_POLICY: dict[str, dict[str, Any]] = {
    "ppo": {"ppo": {"epochs": 1, "minibatches": 1, "critic_warmup": 1}},
    "shared": {"ppo": {"epochs": 1, "minibatches": 1, "critic": "shared"}},
    "grpo": {"objective": "grpo", "rollout.samples": 2},
    "exact": {"objective": "grpo", "grpo": {"kl_estimator": "exact"}, "rollout.samples": 2},
    "online_dpo": {"objective": "online_dpo", "rollout.samples": 4},
    "rloo": {"objective": "rloo", "rollout.samples": 2},
    "reinforce": {"objective": "reinforce", "reinforce": {"baseline": "average"}},
}


@pytest.fixture
def on_policy(recipe: Make, tmp_path: Path) -> Make:
    def make(kind: str, **changes: Any) -> dict[str, Any]:
        rows = [{"prompt": "the in " * (1 + i)} for i in range(4)]
        (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
        source = "def length(prompts, completions, rows):\n    return [float(len(c)) for c in completions]\n"
        (tmp_path / "rewards.py").write_text(source, "utf-8")
        settings = {
            "objective": "ppo",
            "data": {"train": str(tmp_path / "prompts.jsonl"), "format": "prompts"},
            "rollout": {"prompts": 4, "max_tokens": 6, "stop_at_eos": False},
            "rewards": {"function": f"{tmp_path / 'rewards.py'}:length"},
            "run.steps": 2,
        }
        return recipe(**{**settings, **ON_POLICY[kind], **changes})

    return make


@pytest.mark.parametrize("kind", ON_POLICY)
def test_made_up_completions_are_as_sampled_ones(kind: str, on_policy: Make) -> None:
    """The same arrays, of the same types, and as large as the longest completions make them."""
    _, model, objective, _ = made(on_policy(kind, **{"memory.measure": False}))
    made_up = [batch for step in objective.largest(model) for batch in step().micro_batches]
    sampled = objective.steps(model)
    while objective._number < objective.first_whole:
        next(sampled)
    seen = [batch for _ in range(2) for batch in next(sampled).micro_batches]

    def kinds(batches: list[Any]) -> set[Any]:
        return {(b.trains, frozenset((n, v.dtype, v.ndim) for n, v in arrays_of(b.data).items())) for b in batches}

    assert kinds(made_up) == kinds(seen)
    assert max(b.data.ids.size for b in made_up) >= max(b.data.ids.size for b in seen)


@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
def test_an_on_policy_run_that_was_measured_is_the_run(kind: str, on_policy: Make) -> None:
    runs = [train(on_policy(kind, **{"memory.measure": m, "run.name": f"m-{m}"})) for m in (False, True)]
    assert [e["loss"] for e in runs[0].metrics("train")] == [e["loss"] for e in runs[1].metrics("train")]


def fake(monkeypatch: pytest.MonkeyPatch, per_token: float) -> list[int]:
    """A machine on which a step takes so many bytes for each token of its batch. Returns the budgets it was asked."""
    asked: list[int] = []

    def pretend(config: Any, model: Any, objective: Any, optimizer: Any) -> int:
        asked.append(objective._budget["tokens"])
        return int(per_token * max(s.rows * s.width for s in objective.shapes()))

    monkeypatch.setattr(build, "measured_bytes", pretend)
    monkeypatch.setattr(build, "_lasting", lambda *args: 0)
    return asked


@pytest.mark.parametrize("factor", [0.3, 2.0])
def test_auto_is_corrected_by_what_is_measured(
    factor: float, recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up and down, to what fills the room; the batches, the number of steps and config.yaml go by it."""
    changes = {"batch": {"tokens": "auto"}, "data.max_length": 128, "run.steps": None, "run.epochs": 1}
    settings = recipe(rows=200, **changes, memory={"limit": 0.02, "checkpoint": "on"})
    planned = settled(parse_config(settings), resume=False).batch.budget
    asked = fake(monkeypatch, factor * 2e7 / planned)
    run = train(settings)
    found = load_config(run.dir / "config.yaml").batch.tokens
    assert asked[0] == planned
    assert len(asked) <= 3
    assert isinstance(found, int)
    assert 0.7 * planned / factor <= found <= planned / factor
    assert run.metrics("train")[-1]["epoch"] == 1.0
    assert f"batch.tokens: auto is {found:,}, by measured steps" in " ".join(capsys.readouterr().out.split())
    count = len(asked)
    assert settled(parse_config(settings), resume=True).batch.tokens == found
    train(settings, resume=True)
    assert len(asked) == count, "a resumed run keeps its number"


def test_auto_goes_by_the_plan_where_nothing_is_measured(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"batch": {"tokens": "auto"}, "data.max_length": 128, "run.steps": 1}
    settings = recipe(**changes, memory={"limit": 0.02, "measure": False})
    planned = settled(parse_config(settings), resume=False).batch.tokens
    asked = fake(monkeypatch, 1e9)
    assert load_config(train(settings).dir / "config.yaml").batch.tokens == planned
    assert not asked


def test_what_can_not_be_planned_is_said_and_measured(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any) -> Any:
        raise ModelError("memory cannot be predicted for this architecture")

    monkeypatch.setattr(build, "plan_batches", fails)
    monkeypatch.setattr(build, "largest_tokens", fails)
    auto = {"batch": {"tokens": "auto"}, "run.steps": 1}

    def said(**changes: Any) -> str:
        train(recipe(**{**auto, **changes}), overwrite=True)
        return " ".join(capsys.readouterr().out.split())

    fake(monkeypatch, 1.0)
    found = said()
    assert "gradient checkpointing is off: a measured step decides" in found
    assert "batch.tokens: auto is 2,048, by measured steps" in found
    with pytest.raises(ConfigError, match=r"batch\.tokens: auto: memory cannot .* memory\.measure: true"):
        said(memory={"measure": False})
    found = said(memory={"measure": False}, batch={"tokens": 512})
    assert "gradient checkpointing is off: set memory.checkpoint: on where memory runs out" in found
    check(parse_config(recipe(**auto)), 0, make_console(), False)
    assert "auto is 2,048 by default, without a memory plan; a measured step" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_what_a_reference_holds_is_counted(loss: str, pairs: str, recipe: Make) -> None:
    """The weights as they began, of which the first measurement makes new ones: measured again, they are the run's."""
    data = {"train": pairs, "format": "preference", "max_length": 64}
    settings = recipe(objective="preference", preference={"loss": loss}, data=data, tune=None)
    config = parse_config({**settings, "tune": {"method": "full"}, "memory": {"measure": False}})
    loaded = load_base(config)
    objective: Any = make_objective(config, loaded.tokenizer)
    _, optimizer, config, _ = assemble(config, loaded, objective)
    began = {n: id(v) for n, v in tree_flatten(loaded.model.trainable_parameters())}
    assert build.measured_bytes(config, loaded.model, objective, optimizer) is not None
    assert not set(began.values()) & {id(v) for _, v in tree_flatten(loaded.model.trainable_parameters())}
    assert set(began.values()) <= {id(v) for v in objective.held()}


def test_kto_with_auto_is_no_on_policy_objective(pairs: str, recipe: Make) -> None:
    """Its outline is like theirs."""
    data = {"train": pairs, "format": "preference", "max_length": 64}
    own = {"objective": "preference", "preference": {"loss": "kto"}, "data": data, "batch": {"tokens": "auto"}}
    assert isinstance(train(recipe(**own, **{"run.steps": 1})).config.batch.tokens, int)


def test_a_little_over_the_limit_is_at_the_limit(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX works ahead until a limit is reached, and waits then."""
    taken = [1.03]
    monkeypatch.setattr(build, "measured_bytes", lambda *args: int(taken[0] * 10**9))
    limited = {"memory.limit": 1.0, "memory.checkpoint": "off", "run.steps": 1}
    train(recipe(**limited))
    taken[0] = 1.2
    with pytest.raises(ConfigError, match=r"a step takes 1\.20 GB; memory\.limit is 1\.00 GB"):
        train(recipe(**limited), overwrite=True)


@pytest.mark.parametrize("measured", [False, True])
def test_auto_of_packed_rows_is_planned_with_their_mask(measured: bool, recipe: Make) -> None:
    """What the plan finds fits by the plan that training makes of its batches."""
    settings = recipe(
        60,
        **{
            "batch": {"tokens": "auto", "pack": True},
            "data.max_length": 64,
            "memory": {"limit": 0.004, "measure": measured, "checkpoint": "off"},
            "run.steps": 1,
        },
    )
    found = train(settings).config.batch.tokens
    assert isinstance(found, int)
    assert found >= 64
