"""Every setting of on-policy training acts: two runs that differ in one differ in what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.config import all_keys, config_class
from mlxft.runs import open_run

Command = Callable[..., Any]
Write = Callable[..., str]
REWARDS = """
def length(prompts, completions, rows):
    return [float(len(text)) for text in completions]

def spaces(prompts, completions, rows):
    return [float(text.count(" ")) for text in completions]
"""
PROMPTS = [{"prompt": "the in on"}, {"prompt": "of"}, {"prompt": "at"}, {"prompt": "is a"}]
ADAPTER = {"rewards": {"adapter": "runs/reward"}}


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that a setting may change."""
    found = open_run(run)
    train, rollouts = found.metrics("train"), found.metrics("rollout")
    seconds = ("sampling_s", "scoring_s", "sampling_tokens_per_s", "elapsed_s")
    return {
        "weights": next(found.result.glob("*.safetensors")).read_bytes(),
        "rollouts": [{k: v for k, v in e.items() if k not in seconds} for e in rollouts],
        "steps": [(e["step"], e["rollout"]) for e in train],
        "rewards": [e["reward"] for e in rollouts],
        "components": sorted(k for k in rollouts[0] if k.startswith("reward/")),
        "lengths": [e["response_tokens"] for e in rollouts],
        "kl_coef": [e["kl_coef"] for e in rollouts],
        "text": found.metrics("failed"),
        "trained": found.metrics("start")[0]["trainable_parameters"],
        "tokens": train[-1]["trained_tokens"],
        "loss": [e["loss"] for e in train],
        "value_loss": [e.get("value_loss") for e in train],
    }


TWICE = {"ppo.epochs": 2, "optim.lr": 0.1}
# setting -> (settings of both runs, the value of the second, what must differ)
ACTS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "ppo.kl_coef": ({}, 1.0, "weights"),
    "ppo.epochs": ({}, 2, "steps"),
    "ppo.minibatches": ({}, 2, "steps"),
    # Only the second pass's step sees how far the first one led.
    "ppo.target_kl": ({**TWICE, "ppo.epochs": 3, "run.steps": 6}, 1e-6, "steps"),
    "ppo.kl_estimator": ({}, "k3", "weights"),
    "ppo.kl_target": ({}, 0.5, "kl_coef"),
    "ppo.kl_horizon": ({"ppo.kl_target": 0.5}, 8, "kl_coef"),
    "ppo.gamma": ({}, 0.5, "weights"),
    "ppo.lam": ({"optim.lr": 0.1}, 0.5, "weights"),
    "ppo.clip": (TWICE, 0.001, "weights"),
    "ppo.dual_clip": (TWICE, 1.001, "weights"),
    "ppo.value_clip": (TWICE, 1e-4, "loss"),
    "ppo.value_coef": ({"ppo.critic": "shared"}, 5.0, "weights"),
    "ppo.entropy_coef": ({}, 1.0, "weights"),
    "ppo.whiten": ({}, False, "weights"),
    "ppo.critic": ({}, "shared", "value_loss"),
    "ppo.critic_lr": ({}, 1.0, "value_loss"),
    "ppo.critic_warmup": ({}, 1, "weights"),
    "rollout.prompts": ({}, 2, "rollouts"),
    "rollout.samples": ({}, 2, "tokens"),
    "rollout.max_tokens": ({"rollout.stop_at_eos": False}, 3, "lengths"),
    "rollout.temperature": ({}, 0.3, "rollouts"),
    "rollout.top_p": ({}, 0.2, "rollouts"),
    "rollout.top_k": ({}, 2, "rollouts"),
    "rollout.min_p": ({}, 0.9, "rollouts"),
    "rollout.stop": ({"rollout.max_tokens": 20}, ["e", "a", "t", "o"], "lengths"),
    "rollout.stop_at_eos": ({"rollout.max_tokens": 48, "data.max_length": 96}, False, "lengths"),
    "rewards.adapter": ({}, "runs/reward", "components"),
    "rewards.adapter_weight": (ADAPTER, 3.0, "rewards"),
    "rewards.normalize": (ADAPTER, True, "rewards"),
    "rewards.function": ({}, {"rewards.py:length": 1.0, "rewards.py:spaces": 2.0}, "components"),
    "rewards.rules": ({}, [{"kind": "length", "max": 3}], "components"),
    "rewards.clip": ({}, 0.5, "rewards"),
    "rewards.missing_eos_penalty": ({}, 7.0, "rewards"),
}
# That a KL above it ends the run is in test_onpolicy; rows decoded at once change memory alone (tests/model); a model
# that has thoughts is in test_eval_thoughts.
ELSEWHERE = {"ppo.max_kl", "rollout.rows", "rewards.thoughts"}


def test_the_table_names_every_setting() -> None:
    sections = ("ppo", "rollout", "rewards")
    assert {*ACTS, *ELSEWHERE} == {key for key in all_keys(config_class("ppo")) if key.partition(".")[0] in sections}


@pytest.mark.parametrize("setting", ACTS)
def test_every_setting_acts(setting: str, write: Write, mlxft: Command, tmp_path: Path) -> None:
    common, value, aspect = ACTS[setting]
    (tmp_path / "rewards.py").write_text(REWARDS, "utf-8")
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PROMPTS), "utf-8")
    if "runs/reward" in (value, common.get("rewards", {}).get("adapter")):
        pairs = [{"prompt": "the in", "chosen": "on it" + " at" * i, "rejected": "a"} for i in range(6)]
        (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pairs), "utf-8")
        data = {"train": "pairs.jsonl", "format": "preference", "valid": 0.5}
        judge = {"objective": "reward", "data": data, "run.steps": 1, "run.name": "reward"}
        assert mlxft("train", write("reward.yaml", **judge)).code == 0
    settings = {
        "objective": "ppo",
        "data": {"train": "prompts.jsonl", "format": "prompts", "max_length": 64},
        "rollout": {"prompts": 4, "max_tokens": 8},
        "rewards": {"function": "rewards.py:length"},
        "ppo": {"epochs": 1, "minibatches": 1},
        "batch": {"rows": 8},
        "run.steps": 4,
        **common,
    }
    runs = []
    for name, changes in (("base", settings), ("other", {**settings, setting: value})):
        done = mlxft("train", write(f"{name}.yaml", **changes, **{"run.name": name}))
        assert (done.code, done.err) == (0, "")
        runs.append(outcome(tmp_path / "runs" / name))
    assert runs[0][aspect] != runs[1][aspect]
