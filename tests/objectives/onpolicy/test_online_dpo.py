"""Online DPO: known optima, pairs and ties, and the loss against a plain computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from stepping import first_step, sums_of

import mlxft
from mlxft.errors import ConfigError, TrainingError
from mlxft.objectives.base import Terms
from mlxft.objectives.rollouts import FAR, Rollout

from .test_kin import ARM, LENGTHS, made, moved, quietly

Words = Callable[..., Path]
OnPolicy = Callable[..., dict[str, Any]]


def probabilities(folder: Path, words: int) -> np.ndarray:
    """The trained policy's, of the first token after a prompt."""
    model = mlxft.load(folder).model
    return np.array(mx.softmax(model(mx.array([[0, 1]]))[0, -1, :words]), dtype=np.float64)


@pytest.mark.learning
def test_labels_by_bradley_terry_lead_to_the_tilted_reference(words: Words, on_policy: OnPolicy) -> None:
    """One token of six with rewards r, and a label that says i is better than j with probability sigmoid(r_i - r_j).

    The reward function adds standard Gumbel noise, and the difference of two such numbers is logistic, so labels are
    drawn by Bradley-Terry. For a pair {i, j} the expected loss is the cross-entropy between sigmoid(r_i - r_j) and
    sigmoid(beta (h_i - h_j)) with h = log pi - log ref, which is least where beta (h_i - h_j) = r_i - r_j. That holds
    for all pairs at once, however often each is sampled, at pi = ref exp(r / beta) / Z: the closed form of DPO. The
    reference is uniform, so pi_i = exp(r_i / beta) / sum_j exp(r_j / beta).
    """
    beta, rewards = 0.5, np.arange(6) / 6
    body = (
        "import numpy; rng = score.__dict__.setdefault('rng', numpy.random.default_rng(1)); "
        "return [int(c[1:]) / 6 + rng.gumbel() for c in completions]"
    )
    changes = {"rollout.prompts": 16, "rollout.samples": 16, "rollout.rows": 256, "batch.tokens": 8192}
    changes |= {"optim.lr": 3e-3, "optim.schedule": "linear", "run.steps": 150}
    run = quietly(on_policy("online_dpo", words(6), body, {"kl_coef": beta}, **changes))
    wanted = np.exp(rewards / beta) / np.exp(rewards / beta).sum()
    found = probabilities(run.dir, 6)
    np.testing.assert_allclose(found, wanted, atol=0.04)
    assert np.abs(found - 1 / 6).max() > 0.1
    first, last = (run.metrics("rollout")[i] for i in (0, -1))
    assert (first["pairs"], first["ties"], first["kl"]) == (128, 0, 0)
    assert last["kl"] == pytest.approx(float((wanted * np.log(6 * wanted)).sum()), abs=0.1)
    assert {"rewards_chosen", "rewards_rejected", "margin", "accuracy", "reward", FAR} <= run.metrics("train")[0].keys()


@pytest.mark.learning
def test_certain_labels_with_smoothing_have_a_known_optimum(words: Words, on_policy: OnPolicy) -> None:
    """Of two tokens the second is always better. With label smoothing e the loss of a pair is
    -(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta log(p / (1 - p)), least at m = log((1 - e) / e): so the better
    token's odds are ((1 - e) / e)^(1 / beta). Here 3^(1 / 1) = 3, and p = 3/4."""
    own = {"kl_coef": 1.0, "label_smoothing": 0.25}
    changes = {"optim.schedule": "linear", "run.steps": 60, "rollout.prompts": 8, "rollout.samples": 8}
    run = quietly(on_policy("online_dpo", words(2), ARM, own, **changes))
    assert probabilities(run.dir, 2)[1] == pytest.approx(0.75, abs=0.01)
    assert all(e["pairs"] + e["ties"] == 32 and e["ties"] > 0 for e in run.metrics("rollout"))


def scored(objective: Any, scores: list[float]) -> tuple[list[int], dict[str, float]]:
    rollout = Rollout(0, [], [np.zeros(1, np.int32)] * len(scores), [], np.array(scores, np.float32))
    return objective.kept(rollout), objective.set_advantages(rollout, [])


def test_pairs_and_ties(words: Words, on_policy: OnPolicy) -> None:
    """The better completion comes first; pairs of equal rewards are left out and counted."""
    scores = [1.0, 3.0, 2.0, 2.0, 5.0, 4.0, 4.0, 4.5]
    neighbours, _ = made(on_policy("online_dpo", words(2), ARM, {}))
    extremes, _ = made(on_policy("online_dpo", words(2), ARM, {"pairs": "extremes"}, **{"rollout.samples": 4}))
    kept, event = scored(neighbours, scores)
    assert kept == [1, 0, 4, 5, 7, 6]
    assert event == {"pairs": 3, "ties": 1, "reward_gap": pytest.approx((2 + 1 + 0.5) / 3)}
    assert scored(extremes, scores) == ([1, 0, 4, 5], {"pairs": 2, "ties": 0, "reward_gap": 1.5})
    assert scored(extremes, [1.0] * 4 + [0.0] * 4) == ([], {"pairs": 0, "ties": 2, "reward_gap": 0.0})


@pytest.mark.parametrize("pairs", ["disjoint", "extremes"])
def test_the_completions_of_a_pair_stay_together(words: Words, on_policy: OnPolicy, pairs: str) -> None:
    """In each micro-batch of each minibatch and epoch, the better one first, whatever their lengths."""
    own = {"pairs": pairs, "epochs": 2, "minibatches": 3}
    changes = {"rollout.max_tokens": 6, "rollout.stop_at_eos": True, "rollout.samples": 6, "batch.rows": 5}
    body, count = "return [c.count('w1') for c in completions]", 4 if pairs == "extremes" else 12
    objective, model = made(on_policy("online_dpo", words(4, eos=True, spread=0.1), body, own, **changes))
    rollout, event = objective.roll(model)
    steps = objective._steps(rollout, objective._lengths(rollout))
    assert len(steps) == 6 <= objective.steps_per_rollout() == 6
    wanted = sorted(p for p in objective.pairs(rollout) if rollout.scores[p[0]] > rollout.scores[p[1]])
    for epoch in (steps[:3], steps[3:]):
        rows = [micro for step in epoch for micro in step]
        assert sorted((a, b) for micro in rows for a, b in zip(micro[::2], micro[1::2])) == wanted
        assert {len(micro) for micro in rows} <= {2, 4}
    assert event["pairs"] == len(wanted)
    assert event["pairs"] + event["ties"] == count
    assert all(len(values) for values in rollout.tokens["ref_logprobs"]), "KL is over all completions, ties too"
    # The plan: a third of the pairs in the largest minibatch, of full length.
    assert sum(shape.rows for shape, _ in objective._largest_steps()[0]) == -(-count // 3) * 2
    for make in objective.largest(model):
        assert {len(batch.data.ids) for batch in make().micro_batches} <= {2, 4}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_dpos_of_each_pair(words: Words, on_policy: OnPolicy, accumulate: int) -> None:
    """A pair at a time with numpy; one, two or all pairs at once, accumulated or not, have one loss and gradient."""
    seen = []
    for rows in (2, 5, 64):
        own = {"kl_coef": 0.3, "label_smoothing": 0.1, "minibatches": accumulate}
        changes = {"rollout.max_tokens": 6, "rollout.stop_at_eos": True, "batch.rows": rows}
        settings = on_policy("online_dpo", words(4, eos=True, spread=0.1), LENGTHS, own, **changes)
        settings["batch"]["accumulate"] = accumulate
        objective, model = made(settings)
        moved(model)
        step = first_step(objective, model)
        moved(model, 0.1)
        sums, grads = nn.value_and_grad(model, lambda o=objective, m=model, s=step: sums_of(o, m, s))()
        losses, won, far = [], [], []
        for data in (batch.data for batch in step.micro_batches):
            new, owners = np.array(objective.logprobs(data), np.float64), np.array(data.owners)
            h = np.bincount(owners, new - np.array(data.ref_logprobs))
            margin = 0.3 * (h[::2] - h[1::2])
            losses += (0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin))).tolist()
            won += np.where(np.abs(margin) < 1e-6, 0.5, margin > 0).tolist()  # 1/2: the same text twice
            d = np.array(data.old_logprobs) - new
            far += (np.bincount(owners, np.exp(-d) - 1 + d) / np.bincount(owners)).tolist()
        assert step.per == {"preference": len(losses)} == {"preference": step.event["pairs"]}
        assert float(sums.mean()) == pytest.approx(np.mean(losses), rel=1e-4)
        assert float(sums.metrics["accuracy"] / sums.weight) == pytest.approx(np.mean(won))
        assert float(sums.metrics[FAR] / sums.weight) == pytest.approx(np.mean(far), rel=1e-3)
        seen.append((float(sums.mean()), {n: np.array(g / sums.weight) for n, g in tree_flatten(grads)}))
    for loss, slopes in seen[1:]:
        assert loss == pytest.approx(seen[0][0], rel=1e-5)
        for name, slope in slopes.items():
            np.testing.assert_allclose(slope, seen[0][1][name], rtol=2e-3, atol=2e-6, err_msg=name)


def test_passes_end_by_target_kl(words: Words, on_policy: OnPolicy) -> None:
    """The KL to the policy that sampled is a mean over pairs: 2 x 0.2 / 2 above 1.5 x 0.1."""
    own = {"target_kl": 0.1, "epochs": 4}
    objective, model = made(on_policy("online_dpo", words(2), ARM, own))
    steps = objective.steps(model)
    for far, rollout in ((0.2, 0), (0.4, 0), (0.0, 1)):
        step = next(steps)
        assert objective.state_dict()["rollout"] == rollout
        assert step.after is not None
        step.after(Terms({}, {FAR: mx.array(far)}), {"preference": 2.0})


def test_a_reward_that_is_always_equal_ends_the_run(words: Words, on_policy: OnPolicy) -> None:
    with pytest.raises(TrainingError, match=r"8 consecutive rollouts .*: the rewards of every pair are equal"):
        quietly(on_policy("online_dpo", words(2), "return [1.0] * len(prompts)", {}))


def test_held_out_prompts_are_measured_by_reward_and_kl(words: Words, on_policy: OnPolicy) -> None:
    settings = on_policy("online_dpo", words(4, spread=0.1), LENGTHS, {"kl_coef": 0.5}, **{"run.steps": 3})
    settings["data"]["valid"] = settings["data"]["train"]
    found = quietly(settings).metrics("eval")[-1]
    assert math.isclose(found["loss"], 0.5 * found["kl"] - found["reward"])


@pytest.mark.parametrize(
    ("own", "changes", "says"),
    [
        ({}, {"rollout.samples": 1}, "rollout.samples: online_dpo compares completions of one prompt; give at least 2"),
        ({}, {"rollout.samples": 3}, "rollout.samples: 3 completions of a prompt cannot be split into pairs"),
        ({"kl_coef": 0}, {}, "online_dpo.kl_coef"),
        ({"clip": 0.2}, {}, "online_dpo.clip: no such setting"),
    ],
)
def test_settings_that_do_not_fit(
    words: Words, on_policy: OnPolicy, own: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        made(on_policy("online_dpo", words(2), ARM, own, **changes))


def test_three_completions_have_extremes(words: Words, on_policy: OnPolicy) -> None:
    assert made(on_policy("online_dpo", words(2), ARM, {"pairs": "extremes"}, **{"rollout.samples": 3}))
