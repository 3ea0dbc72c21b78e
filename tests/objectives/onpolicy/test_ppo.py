"""PPO: its numbers against a plain computation, its roles, warm-up, early ends, and what a run leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxft
from mlxft.errors import ModelError
from mlxft.model.heads import CRITIC
from mlxft.model.layers import LowRank
from mlxft.model.load import load as load_model
from mlxft.objectives.ppo import is_critic
from mlxft.trainer.loop import Hooks, Loop, Progress
from mlxft.trainer.optim import Optimizer

from .test_kin import OnPolicy, Words, made, moved, quietly
from .test_rewards import trained

Recipe = Callable[..., dict[str, Any]]
ZERO = "return [0.0] * len(completions)"
COUNT = "return [c.count('w7') - 0.1 * len(c.split()) for c in completions]"
EVAL_COUNT = "return [float(c.count('e')) for c in completions]"


@pytest.fixture(scope="module")
def reward_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(trained(tmp_path_factory.mktemp("reward"), tiny_model_dir, rank=2, targets="attention").dir)


@pytest.fixture
def tiny(recipe: Recipe, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`tiny({"epochs": 2}, **{"tune.method": "dora"})`: PPO of the tiny llama, which knows chat and EOS."""
    rows = [{"prompt": "the " * (1 + i % 3) + "in"} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(f"def f(prompts, completions, rows):\n    {EVAL_COUNT}\n")

    def make(own: dict[str, Any], **changes: Any) -> dict[str, Any]:
        settings = {
            "objective": "ppo",
            "ppo": own,
            "data": {"train": str(tmp_path / "prompts.jsonl"), "format": "prompts", "max_length": 60},
            "rollout": {"prompts": 4, "samples": 2, "max_tokens": 5},
            "rewards": {"function": f"{tmp_path}/r.py:f"},
            "batch.rows": 3,
        }
        if changes.get("tune.method") == "full":
            settings["tune.rank"] = None
        return recipe(**{**settings, **changes})

    return make


def checkpoint(run: mlxft.Run) -> dict[str, mx.array]:
    """The weights of a run's only checkpoint."""
    (folder,) = (run.dir / "checkpoints").glob("step-*")
    held = mx.load(str(folder / "weights.safetensors"))
    assert isinstance(held, dict)
    return held


def digest(arrays: dict[str, mx.array]) -> dict[str, bytes]:
    return {name: np.array(value).tobytes() for name, value in arrays.items()}


# Against numpy.


def log_softmax(logits: Any) -> Any:
    high = logits.max(-1, keepdims=True)
    return logits - high - np.log(np.exp(logits - high).sum(-1, keepdims=True))


def reads(model: Any, ids: list[int], size: int, temperature: float, head: Any = None) -> Any:
    """Of one row's last `size` tokens, in float64: log-probabilities with entropies, or values by a head."""
    rows = slice(len(ids) - size - 1, -1)
    if head is not None:
        return np.array(model.model(mx.array([ids])), np.float64)[0, rows] @ np.array(head, np.float64)[0]
    every = log_softmax(np.array(model(mx.array([ids])), np.float64)[0, rows] / temperature)
    return every[np.arange(size), ids[-size:]], -(np.exp(every) * every).sum(-1)


def model_with(path: Path, weights: dict[str, mx.array]) -> Any:
    loaded = load_model(str(path), dtype="float32").model
    loaded.load_weights(list(weights.items()), strict=False)
    return loaded


def plain_gae(rewards: Any, values: Any, gamma: float, lam: float) -> Any:
    found, ahead, following = np.zeros(len(rewards)), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        ahead = rewards[t] + gamma * following - values[t] + gamma * lam * ahead
        found[t], following = ahead, values[t]
    return found


def now(model: nn.Module) -> tuple[dict[str, mx.array], dict[str, mx.array], mx.array]:
    """The policy's weights, the critic's by the names they have in the model, and its head."""
    weights = dict(tree_flatten(model.trainable_parameters()))
    role = {n.removeprefix(f"{CRITIC}.role.").replace("/", "."): v for n, v in weights.items() if is_critic(n)}
    head = role.pop(f"{CRITIC}.head.weight")
    return {n: v for n, v in weights.items() if not is_critic(n)}, role, head


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_rollout_in_numpy(words: Words, on_policy: OnPolicy, estimator: str) -> None:
    """Scores, KL, rewards of tokens, values, GAE, whitening, both losses and entropy, with one token at a time."""
    path, temperature, s = words(32, eos=True, spread=0.3), 0.7, {"gamma": 0.9, "lam": 0.8, "kl_coef": 0.3}
    own = {**s, "kl_estimator": estimator, "clip": 0.05, "dual_clip": 1.05, "value_clip": 0.01, "entropy_coef": 0.2}
    changes = {"rollout.max_tokens": 6, "rollout.stop_at_eos": True, "rollout.temperature": temperature}
    objective, model = made(on_policy("ppo", path, COUNT, own, **changes, **{"batch.rows": 5}))
    moved(model, 0.02)
    policy, role, head = now(model)
    rollout, event = objective.roll(model)
    assert len(set(rollout.sizes.tolist())) > 1, "lengths are meant to differ"
    before, reference, critic = model_with(path, policy), load_model(str(path)).model, model_with(path, role)
    moved(model, 0.005)
    policy, role, head_after = now(model)
    after, critic_after = model_with(path, policy), model_with(path, role)
    rows: list[Any] = []
    for i, reply in enumerate(rollout.replies):
        ids, size = [*objective.prompts[rollout.prompts[i]].ids.tolist(), *reply.tolist()], len(reply)
        old, entropy = reads(before, ids, size, temperature)
        ref, _ = reads(reference, ids, size, temperature)
        values = reads(critic, ids, size, 1, head)
        d = old - ref
        rewards = -s["kl_coef"] * {"k1": d, "k2": d * d / 2, "k3": np.minimum(np.exp(-d) - 1 + d, 10)}[estimator]
        text = [f"w{t}" for t in reply if t != 31]
        rewards[-1] += text.count("w7") - 0.1 * len(text)
        raw = plain_gae(rewards, values, s["gamma"], s["lam"])
        new, spread = reads(after, ids, size, temperature)
        rows.append((old, d, values, raw, new, spread, reads(critic_after, ids, size, 1, head_after), entropy))
    old, d, values, raw, new, spread, values_after, entropy = (np.concatenate(part) for part in zip(*rows))
    assert event["kl"] == pytest.approx(d.sum() / len(rollout), abs=1e-4)
    assert event["entropy"] == pytest.approx(entropy.mean(), abs=1e-4)
    assert [event[f"advantage_{name}"] for name in ("mean", "std")] == pytest.approx([raw.mean(), raw.std()], abs=1e-4)
    assert event["explained_variance"] == pytest.approx(1 - raw.var() / (raw + values).var(), abs=1e-4)
    white = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.concatenate(rollout.tokens["advantages"]), white, atol=1e-3)
    np.testing.assert_allclose(np.concatenate(rollout.tokens["returns"]), raw + values, atol=1e-4)

    ratio = np.exp(new - old)
    losses = np.maximum(-white * ratio, -white * np.clip(ratio, 0.95, 1.05))
    losses = np.where(white < 0, np.minimum(losses, -white * 1.05), losses) - 0.2 * spread
    near = np.clip(values_after, values - 0.01, values + 0.01)
    value_losses = 0.5 * np.maximum((values_after - raw - values) ** 2, (near - raw - values) ** 2)
    every = objective.make(rollout, list(range(len(rollout))))
    found = [objective.loss(model, batch.data) for batch in every]
    assert objective.per(rollout, range(len(rollout))) == {"policy": len(old), "value": len(old)}
    assert [batch.trained_tokens for batch in every] == [len(old), 0], "tokens count once"
    assert float(found[0].losses["policy"]) == pytest.approx(losses.sum(), rel=1e-3)
    assert float(found[1].losses["value"]) == pytest.approx(0.5 * value_losses.sum(), rel=1e-3)
    metrics = {name: float(value) for part in found for name, value in part.metrics.items()}
    assert all(0 < metrics[f"{name}clip_fraction"] < len(old) for name in ("", "dual_", "value_"))
    assert metrics["ratio_mean"] == pytest.approx(ratio.sum(), rel=1e-4)
    assert metrics["ratio_max"] == pytest.approx(ratio.max(), rel=1e-4)
    assert metrics["approx_kl"] == pytest.approx((old - new).sum(), abs=1e-2)
    assert metrics["value_loss"] == pytest.approx(value_losses.sum(), rel=1e-3)


# Roles.

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"tune.method": "dora"},
    "full": {"tune.method": "full"},
    "qlora": {"model.quantize": 4},
    "lora and modules": {"tune.train": ["input_layernorm", "embed_tokens"]},
    "shared": {"ppo": {"critic": "shared", "minibatches": 2}},
    "temperature": {"rollout.temperature": 0.7},
}


@pytest.mark.parametrize("method", METHODS)
def test_policy_and_reference_begin_as_one(tiny: Recipe, method: str) -> None:
    """KL of the first rollout is 0 to the last bit, and the first ratio of each rollout is 1."""
    run = quietly(tiny({"minibatches": 2}, **METHODS[method], **{"run.steps": 16}))
    rollouts, steps = run.metrics("rollout"), {e["step"]: e for e in run.metrics("train")}
    assert rollouts[0]["kl"] == 0
    assert rollouts[1]["kl"] != 0
    for first in (steps[e["step"]] for e in rollouts):
        assert (first["ratio_mean"], first["ratio_max"], first["clip_fraction"], first["approx_kl"]) == (1, 1, 0, 0)


@pytest.mark.parametrize("method", ["lora", "dora", "full", "lora and modules", "shared"])
@pytest.mark.parametrize("rewarded", [False, True])
def test_checkpointing_changes_nothing(tiny: Recipe, reward_run: str, method: str, rewarded: bool) -> None:
    """A block of the critic's is computed again for its gradient when the policy stands in the model."""
    source = {"rewards.function": None, "rewards.adapter": reward_run} if rewarded else {}
    changes = {**METHODS[method], **source, "optim.name": "sgd", "optim.lr": 0.1, "run.steps": 6}
    apart = [
        checkpoint(quietly(tiny({"minibatches": 2}, **changes, **{"run.name": f"{on}", "memory.checkpoint": on})))
        for on in (False, True)
    ]
    assert set(apart[0]) == set(apart[1])
    for name, value in apart[0].items():
        assert mx.allclose(value, apart[1][name], atol=1e-6), name


def go(settings: dict[str, Any], steps: int, objective: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Train by the loop alone; its events."""
    events: list[dict[str, Any]] = []
    nothing: Callable[[Progress], None] = lambda p: None  # noqa: E731
    optimizer = Optimizer(objective.config.optim, model, objective.clip_groups())
    hooks = Hooks(events.append, nothing, nothing, nothing)
    Loop(model, objective, optimizer, objective.config, steps, Progress(), hooks).run()
    return events


@pytest.mark.parametrize("method", ["lora", "full", "qlora", "lora and modules"])
def test_frozen_roles_never_change(tiny: Recipe, reward_run: str, method: str) -> None:
    """Base, reference and reward role are the same bytes after training, the critic begins as the reward role."""
    settings = tiny({}, **METHODS[method], **{"rewards.function": None, "rewards.adapter": reward_run})
    objective, model = made(settings)
    roles = objective.roles

    def frozen() -> dict[str, Any]:
        found = {"reward": digest(roles.weights("reward")), "head": np.array(roles["reward"].head.weight).tobytes()}
        with objective.reference.reading():
            found["reference"] = digest(dict(tree_flatten(model.model.parameters())))
        with roles.use(None):
            found["base"] = digest(dict(tree_flatten(model.model.parameters())))
        return found

    begun = digest(now(model)[1])
    assert begun == frozen()["reward"]
    assert np.array(now(model)[2]).tobytes() == frozen()["head"]
    before, policy = frozen(), digest(now(model)[0])
    go(settings, 4, objective, model)
    assert frozen() == before
    assert all(digest(now(model)[1])[n] != begun[n] for n in begun if "lora_b" in n)
    assert digest(now(model)[0]) != policy


def test_values_are_on_the_scale_of_rewards(tiny: Recipe, reward_run: str) -> None:
    """A weighted score's critic begins with its head weighted alike."""
    rewards = {"rewards.function": None, "rewards.adapter": reward_run, "rewards.adapter_weight": 2.5}
    objective, model = made(tiny({}, **METHODS["lora"], **rewards))
    head = objective.roles["reward"].head
    assert mx.allclose(now(model)[2], 2.5 * head.weight).item()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_critic_begins_with_the_scores_that_the_policy_is_trained_on(
    tiny: Recipe, reward_run: str, normalize: bool
) -> None:
    """Its value of a whole completion is the reward, with the reward run's mean taken off where that is normalised."""
    rewards = {"adapter": reward_run, "adapter_weight": 2.5, "normalize": normalize}
    objective, _ = made(tiny({}, **{"rewards": rewards, "rollout.stop_at_eos": True}))
    drawn = objective.draw(0)
    rollout = drawn.rollout
    rows = [np.concatenate([objective.prompts[p].ids, r]) for p, r in zip(rollout.prompts, rollout.replies)]
    for row, score in zip(rows, drawn.scores.total):
        values = objective.critic.values(
            objective.split, objective.roles, mx.array(row[None]), mx.array([len(row) - 1])
        )
        assert values.item() == pytest.approx(float(score), abs=1e-4)
    assert abs(objective.rewards.offset) > 0.01 or not normalize


def test_a_critic_is_what_gives_values(words: Words, on_policy: OnPolicy) -> None:
    """The output layer is the policy's alone."""
    for tune in ({"method": "full"}, {"targets": ["lm_head", "attention"], "rank": 2}):
        _, model = made(on_policy("ppo", words(32), ZERO, {}, tune=tune) | {"tune": tune})
        policy, role, _ = now(model)
        assert any("lm_head" in name for name in policy)
        assert set(role) == {name for name in policy if "lm_head" not in name}


def test_a_body_that_holds_its_head_is_refused(tiny: Recipe, make_model_dir: Any, tmp_path: Path) -> None:
    path = str(make_model_dir(tmp_path / "neox", "gpt_neox"))
    with pytest.raises(ModelError, match=r"gpt_neox.*choose another architecture"):
        quietly(tiny({}, **{"model.path": path}))
    assert not (tmp_path / "runs/a").exists()


# Settings.


def test_entropy_rises_where_it_alone_is_rewarded(words: Words, on_policy: OnPolicy) -> None:
    path, changes = words(32, spread=0.4), {"rollout.max_tokens": 4, "run.steps": 12}
    own = {"kl_coef": 0.0, "entropy_coef": 1.0, "epochs": 2}
    spread = [e["entropy"] for e in quietly(on_policy("ppo", path, ZERO, own, **changes)).metrics("rollout")]
    assert spread[-1] > spread[0] + 0.1


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_critic_warms_up_alone(words: Words, on_policy: OnPolicy, critic: str) -> None:
    """Two rollouts of two steps: the policy is the same to the bit; reports over the end of it are not diluted."""
    own = {"critic": critic, "critic_warmup": 2, "epochs": 2}
    settings = on_policy("ppo", words(32, spread=0.5), COUNT, own, **{"rollout.max_tokens": 4, "run.report_every": 5})
    objective, model = made(settings)
    policy, _, head = now(model)
    before = digest(policy)
    events = go(settings, 4, objective, model)
    assert digest(now(model)[0]) == before
    assert not mx.array_equal(now(model)[2], head)
    assert "ratio_mean" not in events[-1]
    assert events[-1]["value_loss"] > 0
    again, model = made(settings)
    fifth = next(e for e in go(settings, 5, again, model) if e["event"] == "train")
    assert digest(now(model)[0]) != before
    assert fifth["ratio_mean"] == 1, "the mean over the one step that has it"


def test_passes_that_end_early_are_evaluated(words: Words, on_policy: OnPolicy, tmp_path: Path) -> None:
    """Rollouts are left after two of four epochs, most of them; held-out prompts are still answered once a pass."""
    own = {"target_kl": 1e-9, "epochs": 4, "kl_coef": 0.0}
    settings = on_policy("ppo", words(32, spread=0.5), COUNT, own, **{"optim.lr": 0.03, "run.steps": 20})
    settings["data"]["valid"] = settings["data"]["train"]
    run = quietly(settings)
    starts = [e["step"] for e in run.metrics("rollout")]
    steps = [b - a for a, b in pairwise(starts)]
    # 16 prompts, 4 a rollout. That a rollout has ended early is known when the next one is asked for.
    ends = [starts[i] - (steps[i - 1] == 4) for i in range(4, len(starts), 4)]
    assert 2 in [steps[i - 1] for i in range(4, len(starts), 4)], starts
    assert [e["step"] for e in run.metrics("eval")] == [*ends, 20]


def test_a_long_rollout_does_not_turn_an_adaptive_coefficient(words: Words, on_policy: OnPolicy) -> None:
    own = {"kl_target": 5.0, "kl_horizon": 1, "epochs": 1}
    run = quietly(on_policy("ppo", words(32), COUNT, own, **{"run.steps": 4}))
    assert [e["kl_coef"] for e in run.metrics("rollout")] == pytest.approx([0.05 * 0.8**i for i in range(4)])


def test_epochs_are_counted_in_steps(tiny: Recipe) -> None:
    """A pass over 8 prompts is 2 rollouts of 2 steps; that early ends leave room for more is said."""
    recipe = tiny({"epochs": 2, "target_kl": 0.01}, **{"run.steps": None, "run.epochs": 1.5})
    assert any("ppo.target_kl" in note for note in made(recipe)[0].summary().notes)
    assert quietly(recipe).metrics("train")[-1]["step"] == 6
    assert not made(recipe | {"ppo": {"epochs": 2}})[0].summary().notes


def test_an_adapters_dropout_is_left_out(tiny: Recipe, recipe: Recipe) -> None:
    """The policy that is trained is the one that sampled."""
    first = quietly(recipe(**{"tune.dropout": 0.5, "run.name": "sft", "run.steps": 2}))
    settings = tiny({}, **{"model.adapter": str(first.dir), "tune.rank": None})
    objective, model = made(settings)
    assert {m.dropout._p_1 for m in model.modules() if isinstance(m, LowRank)} == {1.0}
    assert any("dropout" in note for note in objective.summary().notes)
    run = quietly(settings)
    assert run.metrics("rollout")[0]["kl"] == 0
    assert run.metrics("train")[0]["ratio_max"] == 1


def test_rewards_do_not_see_the_text_that_ended(tiny: Recipe) -> None:
    objective, _ = made(tiny({}, **{"rollout.stop": ["e", "in"], "rollout.max_tokens": 20}))
    rollout = objective.sample(objective.prompts, [0, 1, 2, 3], 4, 0, 7)
    ends = set(objective.tokenizer.eos_token_ids)
    ended = [i for i, reply in enumerate(rollout.replies) if rollout.finished[i] and reply[-1] not in ends]
    assert ended
    for i in range(len(rollout)):
        assert not {"e", "in"} & {part for part in ("e", "in") if part in objective.text(rollout.replies[i])}


# What a run leaves.

ROLLOUT = "reward reward/f kl kl_coef entropy advantage_mean advantage_std explained_variance response_tokens eos_share"
STEP = "approx_kl clip_fraction ratio_mean ratio_max value_loss grad_norm critic_grad_norm tokens_per_s"


def test_a_runs_events_and_samples(tiny: Recipe, tmp_path: Path) -> None:
    settings = tiny({"dual_clip": 3}, **{"run.steps": 8, "run.eval_at_start": True, "run.patience": 3})
    settings["data"]["valid"] = settings["data"]["train"]
    run = quietly(settings)
    rollout, step, seen = (run.metrics(kind)[-1] for kind in ("rollout", "train", "eval"))
    assert not set(f"{ROLLOUT} sampling_tokens_per_s sampling_s scoring_s".split()) - set(rollout)
    assert not set(f"{ROLLOUT} {STEP} dual_clip_fraction rollout".split()) - set(step)
    assert not {"reward", "reward/f", "kl", "win_rate", "loss"} - set(seen)
    assert run.metrics("eval")[0]["win_rate"] == 0.5, "against itself"
    samples = [json.loads(line) for line in (run.dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * len(run.metrics("eval"))
    assert {"prompt", "answer", "score"} <= set(samples[0])


def test_speed_is_that_of_training(tiny: Recipe, tmp_path: Path) -> None:
    """A reward that takes 0.3 s slows the run, not the steps."""
    settings = tiny({"epochs": 2}, **{"run.steps": 4})
    (tmp_path / "r.py").write_text(
        f"import time\ndef f(prompts, completions, rows):\n    time.sleep(0.3)\n    {EVAL_COUNT}\n"
    )
    began = time.perf_counter()
    run = quietly(settings)
    whole = time.perf_counter() - began
    assert all(e["scoring_s"] >= 0.3 for e in run.metrics("rollout"))
    steps = run.metrics("train")
    tokens = np.diff([0, *(e["tokens"] for e in steps)])
    training = float(sum(n / e["tokens_per_s"] for n, e in zip(tokens, steps)))
    assert 0 < training < whole - 0.6
    assert steps[-1]["elapsed_s"] > training + 0.6


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_result_is_the_policy_alone(tiny: Recipe, tiny_model_dir: Path, method: str) -> None:
    """It loads in mlx-lm, and answers by the command."""
    from mlx_lm import load as load_lm

    run = quietly(tiny({}, **METHODS[method]))
    (start,) = run.metrics("start")
    # A critic of whole weights begins as the policy's own arrays; it counts all the same.
    assert (start["trainable_parameters"] == start["total_parameters"]) is (method == "full")
    policy = {n: v for n, v in checkpoint(run).items() if not is_critic(n)}
    adapter = method == "lora"
    (file,) = run.result.glob("*.safetensors")
    saved = mx.load(str(file))
    assert isinstance(saved, dict)
    assert set(saved) == set(policy)
    assert all(mx.array_equal(saved[n], policy[n]) for n in policy)
    assert not (run.result / "head.safetensors").exists()
    model: Any = load_lm(
        str(tiny_model_dir if adapter else run.result), adapter_path=str(run.result) if adapter else None
    )[0]
    there = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(there[n], policy[n]) for n in policy)
    command = [sys.executable, "-m", "mlxft", "generate", "the in", "--max-tokens", "3", "--model", str(run.dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
