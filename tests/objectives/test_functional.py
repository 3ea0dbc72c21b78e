"""The objectives' mathematics: other libraries' numbers (tests/golden/, each naming its source), then laws.

Random inputs come from numpy's seeded generator, so that no test depends on another's use of MLX's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlxft  # noqa: F401  (before mlx: it loads the fast BLAS, for whatever tests share this process)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxft.errors import ConfigError, ModelError
from mlxft.objectives import functional as F
from mlxft.objectives.base import Terms
from mlxft.objectives.functional import LossSum

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAN = float("nan")


def golden(name: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    assert cases
    return cases


def preference(loss_type: str) -> list[dict[str, Any]]:
    cases = [case for case in golden("preference") if case["loss_type"] == loss_type]
    assert cases
    return cases


def arrays(case: dict[str, Any], *names: str) -> Any:
    return [mx.array(case[name], dtype=mx.float32) for name in names]


def close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Absolute and relative `tolerance`; NaN is never close."""
    np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=tolerance, atol=tolerance, equal_nan=False)


def per_item(total: LossSum, name: str) -> Any:
    return (total.metrics[name] / total.weight).item()


def gradient(fn: Callable[[mx.array], mx.array], x: Any) -> Any:
    return mx.grad(lambda a: fn(a).sum())(mx.array(x, dtype=mx.float32)).tolist()


def random(seed: int, *shape: int) -> Any:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def right_padded(lengths: list[int], width: int) -> mx.array:
    return mx.array([[1.0] * n + [0.0] * (width - n) for n in lengths])


# Golden numbers


@pytest.mark.golden
@pytest.mark.parametrize("case", golden("logprobs"))
def test_logprobs_and_entropy_are_trls(case: dict[str, Any]) -> None:
    logits, ids = mx.array(case["logits"]), mx.array(case["ids"])
    close(F.token_logprobs(logits, ids, case["temperature"]), case["logprobs"])
    close(F.entropy(logits, case["temperature"]), case["entropy"])


@pytest.mark.golden
@pytest.mark.parametrize("case", golden("gae"))
def test_gae_and_whitening_are_verls_and_trls(case: dict[str, Any]) -> None:
    rewards, values, mask = arrays(case, "rewards", "values", "mask")
    advantages, returns = F.gae(rewards, values, mask, case["gamma"], case["lam"])
    close(advantages, case["advantages"])
    close(returns, case["returns"])
    close(F.whiten(advantages, mask), case["advantages_whitened"])


@pytest.mark.golden
@pytest.mark.parametrize("case", golden("ppo_loss"))
def test_policy_loss_is_verls(case: dict[str, Any]) -> None:
    got = F.policy_loss(
        *arrays(case, "new_logprobs", "old_logprobs", "advantages", "mask"), case["clip"], case["dual_clip"]
    )
    assert got.weight.item() == np.sum(case["mask"])
    close(got.mean(), case["policy_loss"])
    close(per_item(got, "clip_fraction"), case["metrics"]["actor/pg_clipfrac"])
    close(per_item(got, "approx_kl"), case["metrics"]["actor/ppo_kl"])
    keep = np.array(case["mask"]) == 1
    ratios = np.exp(np.array(case["new_logprobs"]) - np.array(case["old_logprobs"]))[keep]
    close(per_item(got, "ratio_mean"), ratios.mean())
    if case["dual_clip"] is None:
        assert "dual_clip_fraction" not in got.metrics
    else:
        close(per_item(got, "dual_clip_fraction"), case["metrics"]["actor/pg_clipfrac_lower"])


@pytest.mark.golden
@pytest.mark.parametrize("case", golden("ppo_loss"))
def test_value_loss_is_verls(case: dict[str, Any]) -> None:
    got = F.value_loss(*arrays(case, "new_values", "old_values", "returns", "mask"), case["value_clip"])
    assert got.weight.item() == np.sum(case["mask"])
    close(got.mean(), case["value_loss"])
    close(per_item(got, "value_clip_fraction"), case["value_clipfrac"])


@pytest.mark.parametrize("estimator", F.KL_ESTIMATORS)
@pytest.mark.parametrize("case", golden("kl"))
def test_kl_is_verls(case: dict[str, Any], estimator: str) -> None:
    """One k3 of the file is 10, verl's bound; exp(-d) - 1 + d alone would be 23.6 there."""
    close(F.kl(*arrays(case, "logprobs", "ref_logprobs"), estimator), case[estimator])


@pytest.mark.golden
@pytest.mark.parametrize("case", golden("adaptive_kl"))
def test_adaptive_kl_is_verls(case: dict[str, Any]) -> None:
    coef = case["init"]
    for observed, wanted in zip(case["observed_kl"], case["coefficient_after"]):
        coef = F.adaptive_kl(coef, observed, case["target"], case["horizon"], case["n_steps"])
        assert coef == pytest.approx(wanted, rel=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("case", golden("truncate"))
def test_truncation_is_trls(case: dict[str, Any]) -> None:
    got = F.truncate_at_stop(mx.array(case["responses"]), case["stop_token"], case["pad_token"])
    assert got.tolist() == case["truncated"]


@pytest.mark.golden
@pytest.mark.parametrize("case", golden("bradley_terry"))
def test_bradley_terry_is_trls(case: dict[str, Any]) -> None:
    chosen, rejected = arrays(case, "chosen", "rejected")
    margin = None if case["margin"] is None else mx.array(case["margin"])
    got = F.bradley_terry(chosen, rejected, margin, case["centering"] or 0.0)
    close(got.mean(), case["loss"])
    assert got.weight.item() == len(case["chosen"])
    differences = np.array(case["chosen"]) - np.array(case["rejected"])
    close(per_item(got, "accuracy"), (differences > 0).mean())
    close(per_item(got, "margin"), differences.mean())


@pytest.mark.golden
@pytest.mark.parametrize("case", preference("dpo"))
def test_dpo_is_torchtunes(case: dict[str, Any]) -> None:
    chosen, rejected, *refs = arrays(case, "policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    close(F.dpo(chosen, rejected, *refs, case["beta"], case["label_smoothing"]), case["losses"])
    close(F.implicit_reward(chosen, refs[0], case["beta"]), case["chosen_rewards"])
    close(F.implicit_reward(rejected, refs[1], case["beta"]), case["rejected_rewards"])
    # CPO is DPO whose reference has no preference.
    shifted = chosen - refs[0], rejected - refs[1]
    close(F.cpo(*shifted, case["beta"], case["label_smoothing"]), case["losses"])


@pytest.mark.golden
@pytest.mark.parametrize("case", preference("orpo_odds_ratio_term"))
def test_odds_ratio_is_trls(case: dict[str, Any]) -> None:
    means = arrays(case, "policy_chosen_mean_logprob", "policy_rejected_mean_logprob")
    close(F.odds_ratio(*means, case["beta"]), case["losses"])


@pytest.mark.golden
@pytest.mark.parametrize("case", preference("simpo"))
def test_simpo_is_trls(case: dict[str, Any]) -> None:
    means = arrays(case, "policy_chosen_mean_logprob", "policy_rejected_mean_logprob")
    close(F.simpo(*means, case["beta"], case["gamma"]), case["losses"])


# Log-probabilities and entropy


def test_logprobs_are_float32_whatever_the_logits() -> None:
    """bf16 has 8 bits: a log-sum-exp in it would be off by 0.01 and more."""
    logits = (3 * random(0, 2, 3, 50)).astype(mx.bfloat16)
    ids = mx.array([[0, 7, 49], [3, 3, 3]])
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    got = F.token_logprobs(logits, ids)
    assert got.dtype == mx.float32
    close(got, np.take_along_axis(exact, np.array(ids)[..., None], -1)[..., 0])
    close(F.entropy(logits), -(np.exp(exact) * exact).sum(-1))


def test_entropy_of_known_distributions() -> None:
    """Uniform over V: log V. Half the tokens forbidden: log V/2. A certain token: 0. All with finite gradients."""
    off = float("-inf")
    logits = mx.array([[[2.0, 2.0, 2.0, 2.0], [1.0, off, 1.0, off], [1e4, 0.0, 0.0, 0.0]]])
    close(F.entropy(logits), [[math.log(4), math.log(2), 0.0]])
    assert np.isfinite(gradient(F.entropy, logits.tolist())).all()
    # A uniform distribution's entropy is at its top, whatever the temperature.
    close(gradient(lambda x: F.entropy(x, 0.5), [[[0.3, 0.3, 0.3]]]), [[[0.0, 0.0, 0.0]]])


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_temperature_must_be_positive(temperature: float) -> None:
    logits = mx.zeros((1, 1, 3))
    with pytest.raises(ConfigError, match="temperature"):
        F.token_logprobs(logits, mx.array([[0]]), temperature)
    with pytest.raises(ConfigError, match="temperature"):
        F.entropy(logits, temperature)


# Advantages


def slow_gae(
    rewards: mx.array, values: mx.array, mask: mx.array, gamma: float, lam: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Equation 16 read literally, in float64: A_t = sum_l (gamma lam)^l delta_{t+l} over a row's counted tokens."""
    r, v, m = (np.array(a, dtype=np.float64) for a in (rewards, values, mask))
    advantages, returns = np.zeros_like(r), np.zeros_like(r)
    for row in range(len(r)):
        counted = [t for t in range(r.shape[1]) if m[row, t]]
        deltas = []
        for i, t in enumerate(counted):
            after = v[row, counted[i + 1]] if i + 1 < len(counted) else 0.0
            deltas.append(r[row, t] + gamma * after - v[row, t])
        for i, t in enumerate(counted):
            advantages[row, t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
            returns[row, t] = advantages[row, t] + v[row, t]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 33])
def test_gae_is_the_definition(gamma: float, lam: float, width: int) -> None:
    """Right-padded rows, an empty row, and a row with holes in its midst."""
    mask = np.array(right_padded([width, max(width // 2, 1), 0, width], width))
    mask[3, 1 : width - 1 : 2] = 0
    rewards, values, counted = random(width, 4, width), random(width + 1, 4, width), mx.array(mask)
    for got, wanted in zip(F.gae(rewards, values, counted, gamma, lam), slow_gae(rewards, values, counted, gamma, lam)):
        close(got, wanted)


def test_gae_stays_exact_over_long_rows() -> None:
    rewards, values, mask = random(0, 1, 1500), random(1, 1, 1500), right_padded([1400], 1500)
    for got, wanted in zip(F.gae(rewards, values, mask, 1.0, 0.95), slow_gae(rewards, values, mask, 1.0, 0.95)):
        close(got, wanted, 2e-5)


@pytest.mark.parametrize("rubbish", [NAN, math.inf, -math.inf, 1e30])
def test_nothing_outside_the_mask_is_read(rubbish: float) -> None:
    """Every masked function gives the same, and finite gradients, whatever stands outside; and it is zero there."""
    mask = right_padded([3, 1], 4)
    clean: Any = [mx.where(mask > 0, random(seed, 2, 4), 0.0) for seed in range(3)]
    dirty: Any = [mx.where(mask > 0, x, rubbish) for x in clean]

    for got, wanted in zip(F.gae(*dirty[:2], mask, 0.9, 0.9), F.gae(*clean[:2], mask, 0.9, 0.9)):
        assert got.tolist() == wanted.tolist()
        assert (np.array(got)[np.array(mask) == 0] == 0).all()
    whitened = F.whiten(dirty[0], mask)
    assert whitened.tolist() == F.whiten(clean[0], mask).tolist()
    assert (np.array(whitened)[np.array(mask) == 0] == 0).all()

    losses: list[Callable[[mx.array, mx.array, mx.array], LossSum]] = [
        lambda a, b, c: F.policy_loss(a, b, c, mask, 0.2, 3.0),
        lambda a, b, c: F.value_loss(a, b, c, mask, 0.2),
        lambda a, b, c: F.value_loss(a, b, c, mask, None),
    ]
    for loss in losses:
        for got, wanted in zip(loss(*dirty)[:2], loss(*clean)[:2]):
            assert got.item() == wanted.item()
        assert {k: v.item() for k, v in loss(*dirty).metrics.items()} == {
            k: v.item() for k, v in loss(*clean).metrics.items()
        }
        grads = mx.grad(lambda a, loss=loss: loss(a, *dirty[1:]).total)(dirty[0])
        assert np.isfinite(np.array(grads)).all()
        assert (np.array(grads)[np.array(mask) == 0] == 0).all()
        assert grads.tolist() == mx.grad(lambda a, loss=loss: loss(a, *clean[1:]).total)(clean[0]).tolist()


def test_padding_changes_nothing() -> None:
    """Five more columns of padding: the same sums, and the same advantages in front."""
    x: Any = [random(seed, 3, 6) for seed in range(3)]
    mask = right_padded([6, 2, 4], 6)
    wide: Any = [mx.pad(a, [(0, 0), (0, 5)], constant_values=9.0) for a in x]
    wide_mask = mx.pad(mask, [(0, 0), (0, 5)])
    for got, wanted in zip(F.gae(*wide[:2], wide_mask, 0.9, 0.8), F.gae(*x[:2], mask, 0.9, 0.8)):
        close(got[:, :6], wanted, 1e-6)
        assert (np.array(got[:, 6:]) == 0).all()
    close(F.whiten(wide[0], wide_mask)[:, :6], F.whiten(x[0], mask), 1e-6)
    for fn, extra in ((F.policy_loss, (0.2, 3.0)), (F.value_loss, (0.2,))):
        close(fn(*wide, wide_mask, *extra).mean(), fn(*x, mask, *extra).mean(), 1e-6)


def test_whitening_gives_mean_0_and_variance_1() -> None:
    mask = np.array(right_padded([5, 2, 7], 7)) == 1
    got = np.array(F.whiten(40 + 3 * random(0, 3, 7), mx.array(mask)))[mask]
    close(got.mean(), 0.0)
    close(got.var(ddof=1), 1.0)


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_one_token_gives_zeros(count: int) -> None:
    got = F.whiten(mx.array([[7.3, 1.0, 2.0]]), right_padded([count], 3))
    assert got.tolist() == [[0.0, 0.0, 0.0]]


# PPO's losses


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "wanted"),
    [
        # d/dlogprob of -A ratio = -A ratio: a good token becomes likelier, a bad one less likely.
        (0.0, 2.0, -2.0),
        (0.0, -2.0, 2.0),
        (math.log(1.1), 1.0, -1.1),
        # Past the clip in the advantage's direction: done, no gradient.
        (math.log(1.5), 1.0, 0.0),
        (math.log(0.5), -1.0, 0.0),
        # Past the clip in the wrong direction: the full gradient back.
        (math.log(0.5), 1.0, -0.5),
        (math.log(1.5), -1.0, 1.5),
        # A bad token that became 5 times as likely: beyond dual_clip = 3, held.
        (math.log(5.0), -1.0, 0.0),
    ],
)
def test_policy_gradient_of_one_token(log_ratio: float, advantage: float, wanted: float) -> None:
    old, one = mx.array([[-2.0]]), mx.array([[1.0]])
    got = gradient(lambda x: F.policy_loss(x, old, one * advantage, one, 0.2, 3.0).total, [[-2.0 + log_ratio]])
    close(got, [[wanted]])


def test_first_minibatch_has_ratio_1_and_clips_nothing() -> None:
    x, mask = random(0, 2, 5), right_padded([5, 3], 5)
    got = F.policy_loss(x, x, random(1, 2, 5), mask, 0.2)
    assert {name: value.item() for name, value in got.metrics.items()} == {
        "approx_kl": 0.0,
        "approx_kl_k3": 0.0,
        "clip_fraction": 0.0,
        "ratio_max": 1.0,
        "ratio_mean": 8.0,
    }


def test_policy_loss_survives_wild_ratios_but_shows_nan() -> None:
    """Log-ratios of +-500 stay finite; a NaN that does count is not hidden."""
    one = mx.ones((1, 2))
    for advantage in (1.0, -1.0):
        new = [[500.0, -500.0]]
        loss = F.policy_loss(mx.array(new), 0 * one, one * advantage, one, 0.2)
        assert np.isfinite(np.array(loss.total))
        for x in gradient(lambda x, a=advantage: F.policy_loss(x, 0 * one, one * a, one, 0.2).total, new)[0]:
            assert math.isfinite(x)
    assert np.isnan(np.array(F.policy_loss(mx.array([[NAN, 0.0]]), 0 * one, one, one, 0.2).total))


def test_only_the_policy_and_the_critic_learn() -> None:
    """Old log-probabilities, advantages, old values, returns and references get no gradient, even from one graph."""
    x, mask = random(0, 2, 3), mx.ones((2, 3))
    frozen = mx.grad(lambda a, b: F.policy_loss(x, a, b, mask, 0.2).total, argnums=(0, 1))(x - 0.1, x + 1)
    frozen += mx.grad(lambda a, b: F.value_loss(x, a, b, mask, 0.2).total, argnums=(0, 1))(x - 0.1, x + 1)
    n = random(1, 4)
    for loss in (F.dpo, F.ipo, F.hinge):
        frozen += mx.grad(lambda a, b, loss=loss: loss(n, n - 1, a, b, 0.1).sum(), argnums=(0, 1))(n, n)
    frozen += (mx.grad(lambda z: F.kto(n, n > 0, z, 0.1).sum())(mx.array(0.7)),)
    assert len(frozen) == 11
    assert all((np.array(g) == 0).all() for g in frozen)


def test_value_gradient_of_one_token() -> None:
    """v - R inside the clip; beyond it the worse of both: none when the clipped value is further off."""
    one = mx.array([[1.0]])

    def value_gradient(value: float, old: float, target: float, clip: float | None) -> float:
        loss = lambda v: F.value_loss(v, one * old, one * target, one, clip).total  # noqa: E731
        return float(gradient(loss, [[value]])[0][0])

    close(value_gradient(1.1, 1.0, 3.0, 0.2), -1.9)
    close(value_gradient(2.0, 1.0, 3.0, 0.2), 0.0)
    close(value_gradient(2.0, 1.0, 0.0, 0.2), 2.0)
    close(value_gradient(2.0, 1.0, 3.0, None), -1.0)
    assert F.value_loss(one * 2, one, one * 4, one, None).total.item() == 2.0


def test_values_within_reach_never_count_as_clipped() -> None:
    """By rounding alone: old + clip(v - old) would differ from v in a third of these."""
    values, old = random(0, 50, 50), random(0, 50, 50) + 0.05 * random(1, 50, 50)
    got = F.value_loss(values, old, random(2, 50, 50), mx.ones((50, 50)), 1.0)
    assert got.metrics["value_clip_fraction"].item() == 0.0


@pytest.mark.parametrize(("clip", "dual_clip"), [(0.0, None), (-0.1, None), (NAN, None), (0.2, 1.0), (0.2, 0.0)])
def test_clips_out_of_bounds(clip: float, dual_clip: float | None) -> None:
    one = mx.ones((1, 1))
    with pytest.raises(ConfigError, match="clip"):
        F.policy_loss(one, one, one, one, clip, dual_clip)
    if dual_clip is None:
        with pytest.raises(ConfigError, match="value clip"):
            F.value_loss(one, one, one, one, clip)


# Sums


def test_splitting_a_batch_adds_up() -> None:
    """8 rows of unequal masks, as one batch and as 3 + 1 + 4: the same sums, metrics and gradient."""
    x: Any = [random(seed, 8, 6) for seed in range(3)]
    mask = right_padded([6, 1, 3, 0, 2, 6, 5, 1], 6)
    parts = [slice(0, 3), slice(3, 4), slice(4, 8)]
    n: Any = [random(seed, 8) for seed in range(3)]
    whole_and_parts: list[tuple[LossSum, list[LossSum]]] = [
        (
            F.policy_loss(*x, mask, 0.2, 3.0),
            [F.policy_loss(x[0][p], x[1][p], x[2][p], mask[p], 0.2, 3.0) for p in parts],
        ),
        (F.value_loss(*x, mask, 0.2), [F.value_loss(x[0][p], x[1][p], x[2][p], mask[p], 0.2) for p in parts]),
        (F.bradley_terry(*n, 0.1), [F.bradley_terry(n[0][p], n[1][p], n[2][p], 0.1) for p in parts]),
    ]
    for whole, (first, *others) in whole_and_parts:
        total = Terms({"loss": first.total}, first.metrics)
        for other in others:
            total = total.plus(Terms({"loss": other.total}, other.metrics))
        assert sum(part.weight.item() for part in (first, *others)) == whole.weight.item()
        assert total.metrics.keys() == whole.metrics.keys()
        for got, wanted in zip([total.losses["loss"], *total.metrics.values()], [whole.total, *whole.metrics.values()]):
            close(got, wanted, 1e-6)

    def grads(rows: slice) -> Any:
        loss = lambda a: F.policy_loss(a, x[1][rows], x[2][rows], mask[rows], 0.2).total  # noqa: E731
        return mx.grad(loss)(x[0][rows])

    close(mx.concatenate([grads(p) for p in parts]), grads(slice(0, 8)), 1e-6)


def test_loss_sum_of_nothing() -> None:
    """A batch that is masked throughout weighs 0, and its mean and gradient are 0, not NaN."""
    x, mask = random(0, 2, 3), mx.zeros((2, 3))
    got = F.policy_loss(x, x - 1, x, mask, 0.2)
    assert (got.total.item(), got.weight.item(), got.mean().item()) == (0.0, 0.0, 0.0)
    assert (np.array(mx.grad(lambda a: F.policy_loss(a, x - 1, x, mask, 0.2).mean())(x)) == 0).all()


def test_terms_keep_what_either_has_and_change_neither() -> None:
    a = Terms({"p": mx.array(1.0)}, {"x": mx.array(3.0), "r_max": mx.array(5.0)})
    b = Terms(
        {"p": mx.array(10.0), "v": mx.array(2.0)}, {"x": mx.array(30.0), "y": mx.array(40.0), "r_max": mx.array(4)}
    )
    total = a.plus(b)
    assert {name: value.item() for name, value in total.losses.items()} == {"p": 11.0, "v": 2.0}
    assert {name: value.item() for name, value in total.metrics.items()} == {"x": 33.0, "y": 40.0, "r_max": 5.0}
    assert list(a.metrics) == ["x", "r_max"]
    assert b.metrics["x"].item() == 30.0


def test_loss_sum_is_what_compiled_gradients_return() -> None:
    def loss(x: mx.array) -> LossSum:
        return F.value_loss(x, x, mx.zeros_like(x), mx.ones_like(x), 0.2)

    value, grads = mx.compile(mx.value_and_grad(loss))(mx.array([[3.0, 4.0]]))
    assert isinstance(value, LossSum)
    assert value.total.item() == 12.5
    assert grads.tolist() == [[3.0, 4.0]]


# KL and rollouts


def test_k3_keeps_its_digits_near_zero() -> None:
    """k3 = d^2 / 2 - d^3 / 6 + ...; exp(-d) - 1 + d in float32 would give 0 or 6e-8 for d = 3e-4."""
    close(F.kl(mx.array([[3e-4]]), mx.array([[0.0]]), "k3").item() / 4.4995500e-8, 1.0, 5e-3)


@pytest.mark.parametrize(("estimator", "wanted"), [("k1", 1.0), ("k2", 0.5), ("k3", 1 - math.exp(-0.5))])
def test_gradient_of_kl(estimator: str, wanted: float) -> None:
    close(gradient(lambda x: F.kl(x, mx.array([[-1.5]]), estimator), [[-1.0]]), [[wanted]])


def test_kl_of_far_apart_models_is_finite() -> None:
    far = [[-200.0, 0.0]]
    ref = mx.array([[0.0, -200.0]])
    assert F.kl(mx.array(far), ref, "k3").tolist() == [[10.0, 10.0]]
    assert gradient(lambda x: F.kl(x, ref, "k3"), far) == [[0.0, 0.0]]


def test_unknown_kl_estimator() -> None:
    with pytest.raises(ConfigError, match=r"'k4'; expected one of k1, k2, k3"):
        F.kl(mx.zeros((1, 1)), mx.zeros((1, 1)), "k4")


def test_adaptive_kl_refuses_what_it_can_not_use() -> None:
    with pytest.raises(ConfigError, match="target is 0"):
        F.adaptive_kl(0.1, 1.0, 0.0, 100, 1)
    with pytest.raises(ConfigError, match="horizon is -1"):
        F.adaptive_kl(0.1, 1.0, 1.0, -1, 1)
    with pytest.raises(ModelError, match="not a number"):
        F.adaptive_kl(0.1, NAN, 1.0, 100, 1)


def test_truncation_with_several_stops_and_with_none() -> None:
    ids = mx.array([[5, 9, 2, 9], [5, 2, 9, 5], [5, 6, 7, 8]])
    assert F.truncate_at_stop(ids, [2, 9], 0).tolist() == [[5, 9, 0, 0], [5, 2, 0, 0], [5, 6, 7, 8]]
    assert F.truncate_at_stop(ids, [], 0).tolist() == ids.tolist()
    assert F.truncate_at_stop(ids, 77, 0).tolist() == ids.tolist()
    assert F.truncate_at_stop(mx.zeros((2, 0), dtype=mx.int32), 2, 0).shape == (2, 0)


def test_truncation_where_pad_is_the_stop() -> None:
    """pad = eos: the row's own stop stays, what follows is pad; ids keep their dtype."""
    got = F.truncate_at_stop(mx.array([[4, 2, 5, 6]], dtype=mx.uint32), 2, 2)
    assert got.tolist() == [[4, 2, 2, 2]]
    assert got.dtype == mx.uint32


# Pairs


def test_bradley_terry_ties_count_half() -> None:
    got = F.bradley_terry(mx.array([1.0, 0.0, 2.0]), mx.array([1.0, 1.0, 0.0]))
    assert got.metrics["accuracy"].item() == 1.5
    assert got.metrics["margin"].item() == 1.0


def test_bradley_terry_gradient_of_one_pair() -> None:
    """-sigmoid(-(d - m)) towards chosen and its opposite towards rejected; centering adds 2 c (chosen + rejected)."""
    chosen, rejected, margin = mx.array([0.3]), mx.array([0.1]), mx.array([0.5])
    push = 1 / (1 + math.exp(0.2 - 0.5))
    got = mx.grad(lambda a, b: F.bradley_terry(a, b, margin).total, argnums=(0, 1))(chosen, rejected)
    close([g.item() for g in got], [-push, push])
    got = mx.grad(lambda a, b: F.bradley_terry(a, b, margin, 0.1).total, argnums=(0, 1))(chosen, rejected)
    close([g.item() for g in got], [-push + 0.08, push + 0.08])


def test_bradley_terry_label_smoothing() -> None:
    """e = 1/2 leaves no preference; e = 1 is the exchanged pair, with its margin; huge differences stay finite."""
    a, b, margin = random(0, 5), random(1, 5), mx.abs(random(2, 5))
    got = mx.grad(lambda x: F.bradley_terry(x, mx.zeros(1), label_smoothing=0.5).total)(mx.zeros(1))
    assert got.tolist() == [0.0]
    close(F.bradley_terry(a, b, margin, label_smoothing=1.0).total, F.bradley_terry(b, a, margin).total)
    mixed = 0.9 * F.bradley_terry(a, b, margin).total + 0.1 * F.bradley_terry(b, a, margin).total
    close(F.bradley_terry(a, b, margin, label_smoothing=0.1).total, mixed)
    assert F.bradley_terry(mx.array([-1e4]), mx.array([1e4])).total.item() == 2e4


PAIR_LOSSES: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "dpo": lambda a, b: F.dpo(a, b, mx.zeros(1), mx.zeros(1), 0.1),
    "ipo": lambda a, b: F.ipo(a, b, mx.zeros(1), mx.zeros(1), 0.1),
    "hinge": lambda a, b: F.hinge(a, b, mx.zeros(1), mx.zeros(1), 0.1),
    "cpo": lambda a, b: F.cpo(a, b, 0.1),
    "simpo": lambda a, b: F.simpo(a, b, 2.0, 0.5),
    "odds_ratio": lambda a, b: F.odds_ratio(a, b, 0.1),
    "bradley_terry": lambda a, b: F.bradley_terry(a, b).total,
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_pair_loss_lifts_chosen_and_sinks_rejected(name: str) -> None:
    up, down = mx.grad(lambda a, b: PAIR_LOSSES[name](a, b).sum(), argnums=(0, 1))(mx.array([-1.0]), mx.array([-1.2]))
    assert up.item() < 0 < down.item()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_pair_loss_refuses_shapes_that_would_broadcast(name: str) -> None:
    with pytest.raises(AssertionError, match="shapes differ"):
        PAIR_LOSSES[name](mx.zeros((3,)), mx.zeros((3, 1)))


def test_masked_functions_refuse_shapes_that_would_broadcast() -> None:
    wide, narrow = mx.ones((2, 3)), mx.ones((2, 1))
    for call in (
        lambda: F.gae(wide, wide, narrow, 1.0, 1.0),
        lambda: F.whiten(wide, narrow),
        lambda: F.policy_loss(wide, wide, narrow, wide, 0.2),
        lambda: F.value_loss(wide, narrow, wide, wide, 0.2),
        lambda: F.kl(wide, narrow, "k1"),
        lambda: F.kto(mx.zeros(3), mx.zeros((3, 1)), 0.0, 0.1),
    ):
        with pytest.raises(AssertionError, match="shapes differ"):
            call()
    with pytest.raises(AssertionError, match="expected"):
        F.token_logprobs(mx.zeros((2, 3, 4)), mx.zeros((2, 2), dtype=mx.int32))
    with pytest.raises(AssertionError, match="one number"):
        F.kto(mx.zeros(3), mx.zeros(3), mx.zeros(3), 0.1)


def test_ipo_by_hand() -> None:
    """beta = 0.1 wants a margin of 5: h = 0 costs 25, h = 5 nothing, h = 7 costs 4 and pulls back."""
    zero, chosen = mx.zeros(3), mx.array([0.0, 5.0, 7.0])
    close(F.ipo(chosen, zero, zero, zero, 0.1), [25.0, 0.0, 4.0])
    close(F.ipo(chosen + 3, zero + 1, zero + 3, zero + 1, 0.1), [25.0, 0.0, 4.0])
    close(gradient(lambda a: F.ipo(a, zero, zero, zero, 0.1), [0.0, 5.0, 7.0]), [-10.0, 0.0, 4.0])


def test_hinge_by_hand() -> None:
    """1 - 0.1 h, until h = 10."""
    zero = mx.zeros(3)
    close(F.hinge(mx.array([-5.0, 4.0, 12.0]), zero, zero, zero, 0.1), [1.5, 0.6, 0.0])
    close(F.hinge(mx.array([4.0]), mx.array([1.0]), mx.array([2.0]), mx.array([3.0]), 0.1), [0.6])
    close(gradient(lambda a: F.hinge(a, zero, zero, zero, 0.1), [-5.0, 4.0, 12.0]), [-0.1, -0.1, 0.0])


def test_kto_by_hand() -> None:
    """z = 2, beta = 1/2. r = z: half the weight. r = z + 2 ln 3: sigmoid 3/4, so 1/4 lost if good, 3/4 if bad."""
    r = [2.0, 2.0, 2 + 2 * math.log(3), 2 + 2 * math.log(3)]
    good = mx.array([1, 0, 1, 0])
    close(F.kto(mx.array(r), good, mx.array([2.0]), 0.5, 1.0, 2.0), [0.5, 1.0, 0.25, 1.5])
    # weight * beta * p (1 - p), down for a good row and up for a bad one
    close(gradient(lambda x: F.kto(x, good, 2.0, 0.5, 1.0, 2.0), r), [-0.125, 0.25, -0.09375, 0.1875])
    # A negative estimate of a KL is held at 0.
    close(F.kto(mx.array([0.0]), mx.array([True]), -3.0, 0.5), [0.5])


def test_odds_ratio_of_a_response_known_by_heart() -> None:
    """A mean log-probability of 0 has infinite odds; loss and gradients stay finite."""
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-80.0, -1e-9)):
        a, b = mx.array([chosen]), mx.array([rejected])
        grads = mx.grad(lambda x, y: F.odds_ratio(x, y, 0.1).sum(), argnums=(0, 1))(a, b)
        assert np.isfinite([F.odds_ratio(a, b, 0.1).item(), *(g.item() for g in grads)]).all()


def test_what_is_no_more_than_rounding_is_a_tie() -> None:
    """Sums of 300 have an ulp of 3e-5; a difference of a few of these says nothing, one of 1e-3 does."""
    difference = mx.array([0.0, 3e-5, -6e-5, 1e-3, -1e-3, 1e-9, 2.0])
    close(F.wins(difference, mx.array([600.0, 600.0, 600.0, 600.0, 600.0, 0.0, 1.0])), [0.5, 0.5, 0.5, 1, 0, 1, 1])
    scores = mx.array([1.0, 1.0, 2.0])
    got = F.bradley_terry(scores, mx.array([1.0 + 2.0**-23, 1.0 - 2.0**-23, 1.0]))
    assert got.metrics["accuracy"].item() == 2


# Mixtures of experts.


def test_load_balance_by_hand() -> None:
    """Four experts: f = (3/4, 1/4, 0, 0), P = (1/2, 1/4, 1/8, 1/8): 4 (3/8 + 1/16) = 1.75. Even 1, all to one 4."""
    close(F.load_balance(mx.array([6, 2, 0, 0]), mx.array([4.0, 2.0, 1.0, 1.0])), 1.75)
    close(F.load_balance(mx.array([3, 3, 3, 3]), mx.array([5.0, 5.0, 5.0, 5.0])), 1.0)
    close(F.load_balance(mx.array([9, 0, 0, 0]), mx.array([9.0, 0.0, 0.0, 0.0])), 4.0)
    # d/dP_i (sum 8) = 4 (f_i - sum f P) / 8.
    slope = mx.grad(lambda p: F.load_balance(mx.array([6.0, 2.0, 0.0, 0.0]), p))(mx.array([4.0, 2.0, 1.0, 1.0]))
    close(slope, [0.5 * (f - 0.4375) for f in (0.75, 0.25, 0.0, 0.0)])
