"""The mathematics of methods without a critic: other libraries' numbers, by hand, and against `functional`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxft.objectives import functional as F
from mlxft.objectives.functional import equal_groups, group_relative, kl_loss, leave_one_out
from mlxft.objectives.grpo import GRPO, RLOO, GRPOSettings, RLOOSettings
from mlxft.objectives.grpo import VARIANTS as VARIANTS_OF_GRPO
from mlxft.objectives.rollouts import RolloutBatch

FOLDER = Path(__file__).resolve().parents[2] / "golden"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "group_policy.json").read_text())
VARIANTS: dict[str, Any] = json.loads((FOLDER / "gspo_cispo.json").read_text())

SCORES = np.array([0, 1, 1, 2, 3, 3, 3, 3], dtype=np.float32)
# Of the group 0, 1, 1, 2: mean 1, squares 1 + 0 + 0 + 1, so the unbiased deviation is sqrt(2 / 3).
STD = (2 / 3) ** 0.5
# All eight: mean 2, squares 4 + 1 + 1 + 0 + 4 * 1 = 10, over 7.
ALL = (10 / 7) ** 0.5


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["advantages"])
def test_advantages_are_verls_and_trls(case: dict[str, Any]) -> None:
    """The first case has a group of equal scores."""
    scores, size = np.array(case["scores"], dtype=np.float32), case["size"]
    scales: tuple[F.Scale, ...] = ("group", "batch", "none")
    for scale in scales:
        np.testing.assert_allclose(group_relative(scores, size, scale), case[scale], atol=1e-5, err_msg=scale)
    np.testing.assert_allclose(leave_one_out(scores, size), case["leave_one_out"], atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["rloo_advantages"])
def test_rloo_s_advantages_with_kl_in_the_reward_are_trls(case: dict[str, Any]) -> None:
    objective: Any = object.__new__(RLOO)
    objective.kl_coef, objective.rollouts = case["kl_coef"], SimpleNamespace(samples=case["size"])
    tokens = {
        name: [np.array(row[:n], np.float32) for row, n in zip(GOLDEN[name], GOLDEN["lengths"])]
        for name in ("old_logprobs", "ref_logprobs")
    }
    rollout: Any = SimpleNamespace(tokens=tokens, scores=np.array(case["scores"], np.float32))
    np.testing.assert_allclose(objective.compute_advantages(rollout)[0], case["advantages"], atol=1e-6)


def flat(name: str) -> mx.array:
    """(N,) numbers of the tokens of the golden batch, completion by completion."""
    return mx.array(np.concatenate([row[:n] for row, n in zip(GOLDEN[name], GOLDEN["lengths"])]).astype(np.float32))


def padded(name: str) -> mx.array:
    """(B, T) numbers of the tokens of the golden batch; NaN behind each completion."""
    return mx.array(np.where(np.array(MASK) > 0, np.array(GOLDEN[name], np.float32), np.nan))


MASK = mx.array([[1.0] * n + [0.0] * (GOLDEN["max_tokens"] - n) for n in GOLDEN["lengths"]])
ADVANTAGES = mx.array(np.array(GOLDEN["advantages_of_rows"], np.float32))


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[f"{c['of']} {c['settings']}" for c in GOLDEN["cases"]])
def test_policy_loss_of_padded_rows_is_verls_and_trls(case: dict[str, Any]) -> None:
    s, old, ref = case["settings"], padded("old_logprobs"), padded("ref_logprobs")
    how = F.Aggregation(s.get("loss", "constant"), GOLDEN["max_tokens"])
    if case["objective"] == "rloo":
        how = F.Aggregation("constant", ratio="completion")
    clip = (s["clip"], s.get("clip_high", s["clip"]))
    penalty = F.KLPenalty(ref, s["kl_coef"], "k3") if s.get("kl_coef") else None

    def loss(logprobs: mx.array) -> mx.array:
        return F.policy_loss(logprobs, old, ADVANTAGES, MASK, clip, how=how, penalty=penalty).mean()

    value, gradient = mx.value_and_grad(loss)(padded("logprobs"))
    assert value.item() == pytest.approx(case["loss"], abs=2e-6)
    np.testing.assert_allclose(gradient, case["gradient"], atol=2e-6)


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["policy_loss"])
def test_policy_loss_with_far_ratios_is_verls(case: dict[str, Any]) -> None:
    """Two bounds and dual clipping, with the gradient and the metrics, for ratios far from 1."""
    clip, old = (case["clip_low"], case["clip_high"]), padded("old_logprobs")

    def loss(logprobs: mx.array) -> tuple[mx.array, F.LossSum]:
        sums = F.policy_loss(logprobs, old, ADVANTAGES, MASK, clip, case["dual_clip"])
        return sums.mean(), sums

    (value, sums), gradient = mx.value_and_grad(loss)(padded("wide_logprobs"))
    assert value.item() == pytest.approx(case["loss"], abs=2e-6)
    np.testing.assert_allclose(gradient, case["gradient"], atol=2e-6)
    for name in ("clip_fraction", "approx_kl", *(["dual_clip_fraction"] if case["dual_clip"] else [])):
        assert (sums.metrics[name] / sums.weight).item() == pytest.approx(case[name], abs=1e-6), name


def trained(golden: dict[str, Any], case: dict[str, Any], logprobs: Any) -> tuple[float, np.ndarray]:
    """Loss and gradient in the log-probabilities, as the objective computes them over completions of unequal length."""
    sizes, count = np.array(golden["lengths"]), len(golden["lengths"])

    def flat(rows: Any) -> mx.array:
        return mx.array(np.concatenate([row[:n] for row, n in zip(rows, sizes)]).astype(np.float32))

    kind, settings = (RLOO, RLOOSettings) if case.get("objective") == "rloo" else (GRPO, GRPOSettings)
    objective: Any = object.__new__(kind)
    objective.settings = settings.model_validate(case["settings"])
    objective.rollouts = SimpleNamespace(max_tokens=golden["max_tokens"])
    objective.kl_coef = objective.settings.kl_coef
    objective.needs_reference = objective.kl_coef > 0
    data = RolloutBatch(
        ids=mx.zeros((count, 1)),
        last=mx.zeros(count),
        positions=mx.zeros(1),
        labels=mx.zeros(1),
        old_logprobs=flat(golden["old_logprobs"]),
        ref_logprobs=flat(golden["ref_logprobs"]),
        advantages=mx.array(np.array(golden["advantages_of_rows"], np.float32)),
        owners=mx.array(np.repeat(np.arange(count), sizes).astype(np.int32)),
    )
    per = objective.per(SimpleNamespace(sizes=sizes), range(count))["policy"]

    def loss(x: mx.array) -> mx.array:
        objective.logprobs = lambda _: x
        return objective.loss(None, data).losses["policy"] / per

    value, gradient = mx.value_and_grad(loss)(flat(logprobs))
    return value.item(), np.array(gradient)


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[f"{c['of']} {c['settings']}" for c in GOLDEN["cases"]])
def test_the_loss_that_is_trained_is_verls_and_trls(case: dict[str, Any]) -> None:
    value, gradient = trained(GOLDEN, case, GOLDEN["logprobs"])
    assert value == pytest.approx(case["loss"], abs=2e-6)
    wanted = np.concatenate([row[:n] for row, n in zip(case["gradient"], GOLDEN["lengths"])])
    np.testing.assert_allclose(gradient, wanted, atol=2e-6)


@pytest.mark.golden
@pytest.mark.parametrize("case", VARIANTS["cases"], ids=[f"{c['logprobs']} {c['settings']}" for c in VARIANTS["cases"]])
def test_gspo_and_cispo_are_trls(case: dict[str, Any]) -> None:
    """By `grpo.variant`, with its parts set apart: ratios near 1 for GSPO's narrow clip, and far ones for CISPO's."""
    value, gradient = trained(VARIANTS, case, VARIANTS["logprobs"][case["logprobs"]])
    assert value == pytest.approx(case["loss"], abs=1e-5)
    wanted = np.concatenate([row[:n] for row, n in zip(case["gradient"], VARIANTS["lengths"])])
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_a_ratio_of_sequences_is_the_geometric_mean_of_its_tokens() -> None:
    """Ratios 4 and 1 of one completion: each token's is 2, beyond 1 + 0.5 where A > 0; 1 / 2 is within 1 - 0.6."""
    how = F.Aggregation("sequence", ratio="sequence")
    logprobs, old, mask = mx.log(mx.array([[4.0, 1.0], [0.25, 1.0]])), mx.zeros((2, 2)), mx.ones((2, 2))
    sums = F.policy_loss(logprobs, old, mx.array([1.0, 1.0]), mask, (0.6, 0.5), how=how)
    assert sums.total.item() == pytest.approx(-(1.5 + 0.5))
    assert {k: sums.metrics[k].item() for k in ("clip_fraction", "ratio_mean", "ratio_max")} == pytest.approx(
        {"clip_fraction": 1, "ratio_mean": 2.5, "ratio_max": 2}
    )


def test_a_weighted_token_keeps_its_gradient_beyond_the_bounds() -> None:
    """d loss / d logprob is -A clip(ratio), where PPO's is 0: ratios 1 / 2 and 8 within 1 - 0.25 and 1 + 4."""
    old, one = mx.zeros((1, 2)), mx.ones((1, 2))
    slopes = {}
    for weighted in (False, True):
        how = F.Aggregation("token", weighted=weighted)

        def loss(x: mx.array, how: F.Aggregation = how) -> mx.array:
            return F.policy_loss(x, old, mx.array([[-1.0, 1.0]]), one, (0.25, 4.0), how=how).total

        slopes[weighted] = np.array(mx.grad(loss)(mx.log(mx.array([[0.5, 8.0]])))).tolist()[0]
    assert slopes == {False: [0, 0], True: pytest.approx([0.75, -5.0])}


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, {"ratio": "token", "surrogate": "clipped", "loss": "sequence", "clip": 0.2, "kl_coef": 0.04}),
        ({"variant": "dr_grpo"}, {"scale": "none", "others": False, "loss": "constant", "kl_coef": 0, "clip": 0.2}),
        ({"variant": "dapo"}, {"loss": "token", "clip_high": 0.28, "skip_equal": True, "resample": 9, "kl_coef": 0}),
        ({"variant": "gspo"}, {"ratio": "sequence", "clip": 3e-4, "clip_high": 4e-4, "kl_coef": 0, "scale": "group"}),
        ({"variant": "cispo"}, {"surrogate": "weighted", "loss": "token", "clip": 1, "clip_high": 4, "kl_coef": 0}),
        # What the recipe sets takes precedence, also where it contradicts the variant.
        ({"variant": "gspo", "ratio": "token", "kl_coef": 0.1}, {"ratio": "token", "kl_coef": 0.1, "clip": 3e-4}),
        ({"variant": "dapo", "clip_high": None, "resample": 0}, {"clip_high": None, "resample": 0, "loss": "token"}),
    ],
)
def test_a_variant_sets_its_parts(given: dict[str, Any], seen: dict[str, Any]) -> None:
    settings = GRPOSettings.model_validate(given)
    assert {name: getattr(settings, name) for name in seen} == seen
    assert GRPOSettings.model_validate(settings.model_dump()) == settings, "config.yaml says what it came to"
    if settings.variant != "grpo":
        note = settings.variant_note()
        assert all(f"{name}: {getattr(settings, name)}" in note for name in VARIANTS_OF_GRPO[settings.variant])
        own = [name for name in given if name != "variant"]
        assert (f"by the recipe: {', '.join(own)}" in note) is bool(own)


def exact_kl(logits: mx.array, others: mx.array) -> mx.array:
    return F.divergence(F.log_softmax(logits), F.log_softmax(others), 1.0)


@pytest.mark.golden
def test_the_exact_kl_is_torchs() -> None:
    """A token that is nearly certain and equal distributions among them."""
    golden = json.loads((FOLDER / "exact_kl.json").read_text())
    logits, others = (mx.array(golden[name]) for name in ("logits", "others"))
    np.testing.assert_allclose(exact_kl(logits, others), golden["kl"], rtol=1e-5, atol=1e-6)
    slope = mx.grad(lambda x: exact_kl(x, others).sum())(logits)
    np.testing.assert_allclose(slope, golden["gradient"], rtol=1e-5, atol=1e-5)


def test_the_exact_kl_is_the_mean_of_its_estimates() -> None:
    """Over all tokens, each with its probability: the value of k1's mean, and the gradient of k2's."""
    rng = np.random.default_rng(0)
    logits, others = (mx.array(rng.normal(size=(3, 7)).astype(np.float32)) for _ in range(2))

    def log(x: mx.array) -> mx.array:
        return x - mx.logsumexp(x, axis=-1, keepdims=True)

    def estimated(x: mx.array, kind: str) -> mx.array:
        return (mx.stop_gradient(mx.exp(log(x))) * F.kl(log(x), log(others), kind)).sum(axis=-1)

    np.testing.assert_allclose(exact_kl(logits, others), estimated(logits, "k1"), atol=1e-6)
    slope = mx.grad(lambda x: exact_kl(x, others).sum())(logits)
    np.testing.assert_allclose(slope, mx.grad(lambda x: estimated(x, "k2").sum())(logits), atol=1e-6)
    assert np.abs(np.array(mx.grad(lambda x: exact_kl(others, x).sum())(logits))).max() == 0
    without = mx.where(mx.arange(7) == 2, -mx.inf, logits)
    assert np.isfinite(np.array(exact_kl(without, mx.where(mx.arange(7) == 2, -mx.inf, others)))).all()


def test_leave_one_out_by_hand() -> None:
    # 0 - (1 + 1 + 2) / 3, 1 - (0 + 1 + 2) / 3, the same, 2 - (0 + 1 + 1) / 3
    np.testing.assert_allclose(leave_one_out(SCORES, 4), [-4 / 3, 0, 0, 4 / 3, 0, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(leave_one_out(SCORES, 2), [-1, 1, -1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("scale", "others", "first"),
    [
        ("none", False, -1),
        ("group", False, -1 / (STD + 1e-4)),
        ("batch", False, -1 / (ALL + 1e-4)),
        ("none", True, -4 / 3),
        ("group", True, -4 / 3 / (STD + 1e-4)),
    ],
)
def test_group_relative_by_hand(scale: str, others: bool, first: float) -> None:
    found = group_relative(SCORES, 4, scale, others)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, [first, 0, 0, -first, 0, 0, 0, 0], atol=1e-6)


def test_the_groups_own_mean_makes_them_smaller_by_a_known_factor() -> None:
    scores = np.random.default_rng(0).normal(size=24)
    np.testing.assert_allclose(group_relative(scores, 6, "none") * 6 / 5, leave_one_out(scores, 6), atol=1e-6)


def test_equal_groups() -> None:
    assert equal_groups(SCORES, 4).tolist() == [False, True]
    thirds = np.full(3, 0.1, dtype=np.float32)  # its mean is not 0.1 to the last bit
    assert equal_groups(thirds, 3).tolist() == [True]
    assert np.abs(group_relative(thirds, 3, "group")).max() < 1e-6


def test_scores_that_are_no_groups() -> None:
    with pytest.raises(AssertionError, match="7 scores cannot be split into groups of 2"):
        leave_one_out(SCORES[:7], 2)


@pytest.mark.parametrize("loss", ["token", "sequence", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "completion"])
def test_tokens_on_end_are_padded_rows(loss: Any, ratio: Any) -> None:
    """Loss, weight, metrics and gradient of (N,) tokens with owners are those of (B, T)."""
    if ratio == "completion" and loss == "token":
        with pytest.raises(AssertionError, match="sequence or constant"):
            F.policy_loss(MASK, MASK, MASK, MASK, 0.2, how=F.Aggregation(loss, ratio=ratio))
        return
    how, sizes = F.Aggregation(loss, 6, ratio), np.array(GOLDEN["lengths"])
    owners = mx.array(np.repeat(np.arange(len(sizes)), sizes).astype(np.int32))

    def of_rows(x: mx.array) -> tuple[mx.array, F.LossSum]:
        sums = F.policy_loss(x, padded("old_logprobs"), ADVANTAGES, MASK, 0.2, how=how)
        return sums.mean(), sums

    def of_tokens(x: mx.array) -> tuple[mx.array, F.LossSum]:
        sums = F.policy_loss(x, flat("old_logprobs"), ADVANTAGES, mx.ones_like(x), 0.2, how=how._replace(owners=owners))
        return sums.mean(), sums

    (_, rows), by_row = mx.value_and_grad(of_rows)(padded("logprobs"))
    (_, tokens), by_token = mx.value_and_grad(of_tokens)(flat("logprobs"))
    assert rows.weight.item() == tokens.weight.item()
    assert rows.total.item() == pytest.approx(tokens.total.item(), abs=1e-5)
    assert {n: x.item() for n, x in rows.metrics.items()} == pytest.approx(
        {n: x.item() for n, x in tokens.metrics.items()}, abs=1e-5
    )
    np.testing.assert_allclose(np.array(by_row)[np.array(MASK) > 0], by_token, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "gain", "low", "high", "slope"),
    [
        (1.25, 1.0, 0.2, 0.28, -1.25),  # within clip_high
        (1.30, 1.0, 0.2, 0.28, 0.0),
        (0.75, -1.0, 0.2, 0.28, 0.0),
        (0.85, -1.0, 0.2, 0.28, 0.85),
        (1.30, -1.0, 0.2, 0.28, 1.30),  # the pessimistic branch is never clipped
        (3.00, 1.0, None, None, -3.0),
    ],
)
def test_bounds_apart(ratio: float, gain: float, low: float | None, high: float | None, slope: float) -> None:
    """d loss / d log ratio is -A ratio, or 0 beyond the bound that A pushes towards."""
    one, clip = mx.ones(1), None if low is None or high is None else (low, high)
    found = mx.grad(lambda x: F.policy_loss(x, 0 * one, gain * one, one, clip).total)(mx.log(mx.array([ratio])))
    assert abs(found.item() - slope) < 1e-5


def test_the_gradient_of_kl_is_unbiased_under_the_tokens_of_an_older_policy() -> None:
    """One token of four, all weighed by how often the older policy draws them: the gradient of KL itself."""
    new, old, reference = (mx.array(x) for x in ([0.3, -1.0, 0.8, 0.1], [1.0, 0.2, -0.5, 0.0], [0.0, 0.4, 0.1, -0.9]))

    def log(logits: mx.array) -> mx.array:
        return logits - mx.logsumexp(logits)

    def exact(logits: mx.array) -> mx.array:
        return (mx.exp(log(logits)) * (log(logits) - log(reference))).sum()

    def estimated(logits: mx.array) -> mx.array:
        return (mx.exp(log(old)) * kl_loss(log(logits), log(old), log(reference), "k2")).sum()

    def unweighed(logits: mx.array) -> mx.array:
        return (mx.exp(log(old)) * F.kl(log(logits), log(reference), "k2")).sum()

    wanted = np.array(mx.grad(exact)(new))
    np.testing.assert_allclose(np.array(mx.grad(estimated)(new)), wanted, atol=1e-6)
    assert np.abs(np.array(mx.grad(unweighed)(new)) - wanted).max() > 0.1
