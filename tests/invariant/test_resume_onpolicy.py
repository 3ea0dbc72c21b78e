"""On-policy runs, killed inside a rollout or between its minibatches, go on as if nothing had been."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from .test_resume import ENDLESS, assert_same, cli, command, kill_when, killed, last_step, train, write_recipe

Recipe = Callable[..., dict[str, Any]]
TIMES = ("elapsed_s", "sampling_s", "scoring_s", "sampling_tokens_per_s")


@pytest.fixture
def rolling(recipe: Recipe, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`rolling("grpo", {...})`: four steps a rollout at most, each of several micro-batches."""
    rows = [{"prompt": "the " * (1 + i % 3) + "in"} for i in range(10)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, rows):\n    return [c.count('a') for c in completions]\n"
    )

    def make(objective: str, own: dict[str, Any], **changes: Any) -> dict[str, Any]:
        found = recipe(
            **{
                "objective": objective,
                objective: {"epochs": 2, "minibatches": 2, **own},
                "data": {"train": str(tmp_path / "prompts.jsonl"), "format": "prompts", "max_length": 60},
                "rollout": {"prompts": 4, "samples": 2, "max_tokens": 5},
                "rewards": {"function": f"{tmp_path}/r.py:f"},
                "run.seed": 1,  # with it the policy strays where target_kl is set
                "run.save_every": 3,
                "run.steps": 12,
                **changes,
            }
        )
        if objective == "distill":
            del found["rewards"]
        return found

    return make


def rollouts(run: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in TIMES} for e in events if e["event"] == "rollout"]


ENV = """
import os, signal
from pathlib import Path

from mlxft import Observation

class Env:
    def reset(self, row, seed):
        self.turns, self.seed = 0, seed
        return "again" if seed % 2 else None

    async def step(self, turn):
        self.turns += 1
        kill = Path(__file__).with_name("kill")
        if self.turns == 2 and kill.exists():
            left = int(kill.read_text()) - 1
            kill.write_text(str(left))
            if not left:
                kill.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return Observation(f"{self.seed % 7} more", turn.text.count("a"), end=self.turns == 2 + self.seed % 2)
"""
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {"target_kl": 1e-5, "kl_target": 3.0, "critic_warmup": 1}),
    ("ppo", {"critic": "shared"}),
    ("grpo", {"target_kl": 0.001, "skip_equal": True, "resample": 1}),
    ("grpo", {"variant": "gspo", "kl_coef": 0.1, "kl_estimator": "exact"}),
    ("online_dpo", {}),
    ("rloo", {"ratio": "token"}),
    ("reinforce", {"baseline": "average", "target_kl": 1e-5}),
    ("distill", {"teacher_prompt": "of the", "divergence": "jsd"}),
]


@pytest.mark.parametrize(("objective", "own"), CASES)
def test_killed_is_uninterrupted(
    rolling: Callable[..., dict[str, Any]], tmp_path: Path, objective: str, own: dict[str, Any]
) -> None:
    """Killed in steps of four rollouts, at each place that a step can have in one; saved at every third step."""
    train(rolling(objective, own))
    ends = rollouts(tmp_path / "runs/a")
    if "target_kl" in own:
        starts = [e["step"] for e in ends]
        assert {b - a for a, b in pairwise(starts)} & {2, 3}, f"no pass ended early: {starts}"
    killed(5, rolling(objective, own, **{"run.name": "b"}))
    for step in (
        8,
        10,
    ):  # after checkpoints at steps 3, 6 and 9: in the middle, at the second and at the first step of one
        killed(step, rolling(objective, own, **{"run.name": "b"}), resume=True)
    train(rolling(objective, own, **{"run.name": "b"}), resume=True)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")
    assert rollouts(tmp_path / "runs/a") == rollouts(tmp_path / "runs/b")


@pytest.mark.parametrize(("objective", "own", "kills"), [(*CASES[0], 3), (*CASES[2], 1)])
def test_killed_from_outside(
    rolling: Callable[..., dict[str, Any]], tmp_path: Path, objective: str, own: dict[str, Any], kills: int
) -> None:
    """kill -9 at random moments while it samples, scores, trains or saves."""
    changes = {"run.save_every": 5, "optim.schedule": "constant", "optim.warmup": 0}
    settings = rolling(objective, own, **{**changes, "run.name": "b"})
    path, run = write_recipe(tmp_path / "b.yaml", settings), tmp_path / "runs/b"
    rng = random.Random(kills)
    for least in sorted(rng.sample(range(4, 30), kills)):
        wait = rng.random() * 0.05

        def ready(least: int = least, wait: float = wait) -> bool:
            if last_step(run) < least:
                return False
            time.sleep(wait)
            return True

        kill_when(command("train", path, "--resume", ENDLESS), ready)
    settings["run"]["steps"] = last_step(run) + 5
    train(settings, resume=True)
    train({**settings, "run": {**settings["run"], "name": "a"}})
    assert_same(tmp_path / "runs/a", run)
    assert rollouts(tmp_path / "runs/a") == rollouts(run)


@pytest.mark.parametrize(("objective", "own"), [("ppo", {"critic": "shared"}), ("grpo", {"resample": 1})])
def test_killed_amid_an_episode(
    rolling: Callable[..., dict[str, Any]], tmp_path: Path, objective: str, own: dict[str, Any]
) -> None:
    """kill -9 by an environment in a second turn, twice: the rollout is sampled again from its seeds."""
    (tmp_path / "env.py").write_text(ENV)
    changes = {"environment": f"{tmp_path}/env.py:Env", "data.max_length": 120, "run.save_every": 2}
    settings = [rolling(objective, own, **{**changes, "run.name": name}) for name in "ab"]
    for one in settings:
        del one["rewards"]
    train(settings[0])
    ends = rollouts(tmp_path / "runs/a")
    assert all(2 < e["turns"] < 3 for e in ends)
    path, run = write_recipe(tmp_path / "b.yaml", settings[1]), tmp_path / "runs/b"
    for steps in (12, 10):  # second turns until it is killed
        (tmp_path / "kill").write_text(str(steps))
        assert cli("train", path, "--resume").returncode == -9
    assert 0 < last_step(run) < 12
    train(settings[1], resume=True)
    assert_same(tmp_path / "runs/a", run)
    assert ends == rollouts(run)
