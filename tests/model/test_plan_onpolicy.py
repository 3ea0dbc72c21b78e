"""The plan of on-policy training: by phase, with every role, and held against what real runs take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from stepping import role_bytes

from mlxft.build import (
    amount,
    base_skeleton,
    decide_checkpointing,
    load_base,
    make_objective,
    plan_batches,
    prepare,
    settled,
)
from mlxft.config import Config, parse_config
from mlxft.errors import ConfigError
from mlxft.model.load import base_fingerprint, load_tokenizer
from mlxft.model.memory import MemoryPlan, Rolling, sampling_bytes
from mlxft.objectives.rollouts import OnPolicy

Make = Callable[..., dict[str, Any]]
WORDS = ["the", "in", "on", "and", "or"]
# Each run has a process of its own, whose memory holds nothing else; they share the imports.
MEASURE = """
import json, os, sys
import mlxft
from rich.console import Console
for settings in json.loads(sys.stdin.read()):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        run = mlxft.train(settings, console=Console(quiet=True))
        print(max(e["peak_memory_gb"] for e in run.metrics("train")), flush=True)
        os._exit(0)
"""


@pytest.fixture(scope="session")
def small(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Large enough that what is planned outweighs what is not: a llama of 4 layers and width 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 4, "vocab_size": 2000}
    return str(make_model_dir(tmp_path_factory.mktemp("plan") / "model", "llama", **sizes))


@pytest.fixture
def ppo(recipe: Make, small: str, tmp_path: Path) -> Make:
    """Settings of a PPO run of two rollouts: 16 prompts of some 30 tokens, completions of 24, none of them shorter."""

    def make(**changes: Any) -> dict[str, Any]:
        rows = [{"prompt": " ".join(WORDS * (3 + i % 2))} for i in range(16)]
        (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
        source = "def length(prompts, completions, rows):\n    return [float(len(c)) for c in completions]\n"
        (tmp_path / "rewards.py").write_text(source, "utf-8")
        return recipe(
            **{
                "objective": "ppo",
                "model.path": small,
                "data": {"train": str(tmp_path / "prompts.jsonl"), "format": "prompts", "max_length": 128},
                "rollout": {"prompts": 16, "max_tokens": 24, "stop_at_eos": False},
                "rewards": {"function": f"{tmp_path / 'rewards.py'}:length"},
                "ppo": {"epochs": 1, "minibatches": 1},
                "batch": {"rows": 8},
                "run.steps": 2,
                **changes,
            },
        )

    return make


def plan_of(settings: dict[str, Any]) -> tuple[Config, MemoryPlan]:
    config = parse_config(settings)
    objective = make_objective(config, load_tokenizer(settings["model"]["path"]))
    model = base_skeleton(config)
    found, _, _ = plan_batches(config, model, objective.shapes(), objective.beside(model))
    assert found.sampling
    return config, found


CASES: dict[str, dict[str, Any]] = {
    "training is largest": {},
    "checkpointed": {"memory": {"checkpoint": "on"}, "batch": {"rows": 16}},
    "sampling is largest": {"batch": {"rows": 1}, "rollout.rows": 64, "rollout.samples": 4},
    "the critic on the policy's trunk": {"ppo.critic": "shared"},
    "entropy is rewarded": {"ppo.entropy_coef": 0.01},
    "groups without a critic": {"objective": "grpo", "ppo": None, "grpo": {"epochs": 1}, "rollout.samples": 4},
    "an exact KL": {
        "objective": "grpo",
        "ppo": None,
        "grpo": {"kl_estimator": "exact"},
        "rollout.samples": 4,
        "batch": {"rows": 32},
    },
    "pairs": {"objective": "online_dpo", "ppo": None, "rollout.samples": 4, "batch": {"rows": 32}},
    "whole weights, all in copies": {"tune": {"method": "full"}, "batch": {"rows": 2}},
}


def test_predicted_is_near_measured(ppo: Make) -> None:
    settings = [ppo(**changes, **{"run.name": name}) for name, changes in CASES.items()]
    done = subprocess.run([sys.executable, "-c", MEASURE], input=json.dumps(settings), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, one, measured in zip(CASES, settings, done.stdout.split(), strict=True):
        _, found = plan_of(one)
        largest = max(found.phases(), key=lambda phase: found.phases()[phase])
        assert largest == ("sampling" if name == "sampling is largest" else "training"), name
        assert found.checkpoint == (name == "checkpointed"), name
        assert found.total == pytest.approx(float(measured) * 1e9, rel=0.15), name


def test_a_sum_of_gradients_is_counted_once(ppo: Make) -> None:
    """Where a step has several micro-batches: by accumulation, or since the rows do not fit into one."""
    changes = {"objective": "grpo", "ppo": None, "rollout.samples": 2, "batch": {"rows": 32}}
    alone = plan_of(ppo(**changes, grpo={"minibatches": 1}))[1]
    several = plan_of(ppo(**changes | {"batch": {"rows": 8}}, grpo={"minibatches": 1}))[1]
    summed = {"grpo": {"minibatches": 2}, "batch": {"rows": 16, "accumulate": 2}}
    accumulated = plan_of(ppo(**changes | summed))[1]
    both = plan_of(ppo(**changes | {"grpo": {"minibatches": 2}, "batch": {"rows": 8, "accumulate": 2}}))[1]
    assert several.gradients == accumulated.gradients == both.gradients == 2 * alone.gradients > 0


@pytest.fixture
def reward_run(recipe: Make, small: str, tmp_path: Path) -> Callable[..., str]:
    """`reward_run(model)` trains a reward run of one step."""
    import mlxft

    def make(model: str = small, **changes: Any) -> str:
        row = {"prompt": "the in", "chosen": "on it", "rejected": "at a"}
        (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 4, "utf-8")
        data = {"train": str(tmp_path / "pairs.jsonl"), "format": "preference"}
        settings = {"objective": "reward", "data": data, "run.steps": 1, "run.name": "reward", "model.path": model}
        return str(mlxft.train(recipe(**{**settings, **changes})).dir)

    return make


def test_four_roles_are_counted_as_they_are(
    ppo: Make, recipe: Make, reward_run: Callable[..., str], small: str
) -> None:
    """A policy that goes on from an adapter, that adapter as the reference, a reward role and a critic begun from it:
    the plan by config.json and files counts the bytes that they have once they are loaded."""
    import mlxft

    sft = mlxft.train(recipe(**{"run.name": "sft", "run.steps": 1, "model.path": small}))
    reward = reward_run(**{"tune.rank": 2})
    changes = {"rewards": {"adapter": reward}, "tune": None, "model.adapter": str(sft.dir)}
    config, found = plan_of(ppo(**changes))
    loaded = load_base(config, lazy=True)
    objective = make_objective(config, loaded.tokenizer)
    prepare(config, loaded)
    objective.prepare(loaded.model, base_fingerprint(loaded))
    assert isinstance(objective, OnPolicy)
    roles = objective.roles
    assert roles.names == ["policy", "reference", "reward", "value"]
    assert found.adapters == found.roles["reference"] == role_bytes(roles, "reference")
    # Of the critic the head is not counted, and of the reward role the header of its files is.
    assert found.roles["reward"] == pytest.approx(role_bytes(roles, "reward"), rel=0.1)
    assert found.roles["critic"] == pytest.approx(role_bytes(roles, "value"), rel=0.1)
    assert found.roles["reward"] < 0.75 * found.roles["reference"], "of rank 2, the policy's is of rank 4"
    # The same plan is made from the loaded model, in which the critic stands.
    on, said = decide_checkpointing(config, loaded.model, objective)
    assert not on
    assert f"expected peak memory: {amount(found.total)}" in said
    assert "critic" in loaded.model, "it is back in its place"


def test_a_critic_has_no_output_layer(ppo: Make, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path / "untied", "llama", tie_word_embeddings=False)
    _, found = plan_of(ppo(tune={"method": "full"}, **{"model.path": str(folder)}))
    head = 32 * len(load_tokenizer(str(folder)).get_vocab()) * 4
    assert found.roles["reference"] - found.roles["critic"] == head
    assert found.roles["reference"] == found.weights


def test_a_plan_leaves_everything_as_it_was(ppo: Make, reward_run: Callable[..., str]) -> None:
    settings = ppo(rewards={"adapter": reward_run()})
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    plan_of(settings)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_the_peak_is_the_largest_phase_and_never_their_sum(ppo: Make) -> None:
    _, found = plan_of(ppo())
    phases = found.phases()
    assert found.total == max(phases.values()) < sum(phases.values())
    assert found.needed == max(found.phases(ahead=False).values()) <= found.total
    _, longer = plan_of(ppo(**{"rollout.max_tokens": 80}))
    assert all(longer.phases()[name] >= phases[name] for name in phases)
    _, fewer = plan_of(ppo(**{"rollout.rows": 4}))
    assert fewer.sampling < 0.3 * found.sampling
    assert fewer.phases()["training"] == phases["training"]


def test_sampling_takes_caches_of_prompts_and_of_completions(ppo: Make) -> None:
    """By hand: keys and values are of 4 layers x 2 heads x 32 numbers of 4 bytes, in steps of 256 positions."""
    model = base_skeleton(parse_config(ppo()))
    position = 2 * 4 * 2 * 32 * 4
    assert sampling_bytes(model, Rolling(16, 16, 100, 50, False, [])) == pytest.approx(32 * 256 * position, rel=0.15)
    # Four samples of each prompt: its cache is there once.
    assert sampling_bytes(model, Rolling(16, 4, 100, 50, False, [])) == pytest.approx(20 * 256 * position, rel=0.15)
    # Longer than a step of the cache.
    assert sampling_bytes(model, Rolling(16, 16, 100, 200, False, [])) == pytest.approx(48 * 256 * position, rel=0.15)


def test_a_budget_leaves_room_for_the_roles(ppo: Make) -> None:
    changes = {"batch": {"tokens": "auto"}, "memory": {"limit": 0.09}}

    def tokens(critic: str) -> int:
        settings = ppo(**changes, **{"ppo.critic": critic}, tune={"method": "full"})
        found = settled(parse_config(settings), resume=False).batch.tokens
        assert isinstance(found, int)
        return found

    assert 128 <= tokens("separate") < tokens("shared")


def test_what_does_not_fit_is_refused_before_anything_is_written(ppo: Make, tmp_path: Path) -> None:
    import mlxft

    with pytest.raises(ConfigError, match=r"sampling needs .* MB.*memory\.limit is 20\.0 MB.*rollout\.rows"):
        mlxft.train(ppo(memory={"limit": 0.02}, batch={"rows": 1}, **{"rollout.rows": 64, "rollout.samples": 4}))
    with pytest.raises(ConfigError, match=r"training needs .* MB .*memory\.limit is 20\.0 MB"):
        mlxft.train(ppo(memory={"limit": 0.02, "checkpoint": "off"}, **{"rollout.rows": 1, "batch.rows": 16}))
    assert not (tmp_path / "runs").exists()


def test_the_largest_batch_that_steps_can_have(ppo: Make) -> None:
    """Prompts of 25 and 40 tokens with completions of 24; steps of 8 completions, in batches of at most 200 tokens."""
    settings = ppo(batch={"tokens": 200}, ppo={"minibatches": 2, "epochs": 1})
    objective = make_objective(parse_config(settings), load_tokenizer(settings["model"]["path"]))
    assert isinstance(objective, OnPolicy)
    sizes = sorted({len(p.ids) + 24 for p in objective.prompts})
    shapes = objective.shapes()
    assert {s.width for s in shapes} == set(sizes)
    for size in sizes:
        assert max(s.rows for s in shapes if s.width == size) == 200 // size
    assert all(s.trained == 24 * s.rows for s in shapes)
    assert objective._several()
    assert objective.steps_per_rollout() == 2
