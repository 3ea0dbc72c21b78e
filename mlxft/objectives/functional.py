"""The mathematics of the objectives, as pure functions over arrays.

B rows, T positions of completions, V vocabulary, n pairs (or rows). `mask` (B, T) is non-zero where a token counts.
Inputs of any float type are cast: everything is computed and returned in float32. Values outside a mask may be
anything, NaN included; they reach neither the result nor a gradient. Arrays whose shapes would broadcast silently,
such as (n,) with (n, 1), are refused with an AssertionError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxft.errors import ConfigError, ModelError, nearest
from mlxft.model.logits import divergence as divergence
from mlxft.model.logits import entropy as entropy
from mlxft.model.logits import log_shares as log_shares
from mlxft.model.logits import log_softmax as log_softmax
from mlxft.model.logits import row_sums
from mlxft.model.logits import token_logprobs as token_logprobs


class LossSum(NamedTuple):
    """Sums over items: `total` and `weight`, the number of items, both (), and metrics over the same items.

    Sums of several batches add up exactly; the mean of their means would not be the mean over all items. A metric named
    `..._max` is a maximum.
    """

    total: mx.array
    weight: mx.array
    metrics: dict[str, mx.array]

    def mean(self) -> mx.array:
        """Return the loss per item, (); 0 without items."""
        return self.total / mx.where(self.weight > 0, self.weight, 1.0)


KL_ESTIMATORS = ("k1", "k2", "k3")

# exp(20) is far below float32's maximum; a log-ratio beyond it means only "very different".
_MAX_LOG_RATIO = 20.0
# verl's bound on k3, whose tail grows as exp(-d): a single token could outweigh a whole rollout.
_MAX_K3 = 10.0
# Two forward passes of one model over batches of other shapes gave sums of log-probabilities up to 2 ulps apart.
_ROUNDING = 4 * 2.0**-23


def _same_shape(**arrays: mx.array | None) -> None:
    """Raise AssertionError unless all shapes agree: (n,) with (n, 1) would broadcast to (n, n)."""
    if len({tuple(array.shape) for array in arrays.values() if array is not None}) > 1:
        seen = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items() if array is not None)
        raise AssertionError(f"shapes differ: {seen}; expected one shape for all")


def _float(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


def _masked(x: mx.array, keep: mx.array) -> mx.array:
    """Return x in float32, 0 outside. By `where`, not by a product: 0 * NaN is NaN, in value and gradient."""
    return mx.where(keep, _float(x), 0.0)


def _neg_log_sigmoid(x: mx.array) -> mx.array:
    """Return -log sigmoid(x) = log(1 + exp(-x)), finite for every finite x."""
    return mx.logaddexp(-x, mx.array(0.0, dtype=mx.float32))


def _scan_from_right(decay: mx.array, add: mx.array) -> mx.array:
    """Return x with x[:, t] = add[:, t] + decay[:, t] * x[:, t + 1], all (B, T), and x[:, T] = 0.

    By doubling: after k rounds each position has summed 2^k successors, so log2(T) operations on whole arrays replace T
    small ones, and nothing is divided by a power of the decay, which might underflow.
    """
    span, length = 1, add.shape[1]
    while span < length:
        ahead = [(0, 0), (0, span)]
        add = add + decay * mx.pad(add[:, span:], ahead)
        decay = decay * mx.pad(decay[:, span:], ahead)
        span *= 2
    return add


def gae(rewards: mx.array, values: mx.array, mask: mx.array, gamma: float, lam: float) -> tuple[mx.array, mx.array]:
    """Compute generalised advantage estimates (Schulman et al. 2016, eq. 16), not whitened.

    delta_t = r_t + gamma v_{t+1} - v_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + v_t. The value after the
    last counted token is 0. Uncounted tokens within a row (a tool's output) are skipped, as in verl.

    Args:
        rewards, values: (B, T); anything outside the mask is ignored.
        mask: (B, T), 1 for completion tokens up to and including the last one.
    Returns:
        advantages and returns, both (B, T) float32, zero outside the mask.
    """
    _same_shape(rewards=rewards, values=values, mask=mask)
    keep = mask != 0
    rewards, values = _masked(rewards, keep), _masked(values, keep)
    # An uncounted position adds nothing and passes its successor on unchanged.
    at_or_after = _scan_from_right(mx.where(keep, 0.0, 1.0), values)
    next_values = mx.pad(at_or_after[:, 1:], [(0, 0), (0, 1)])
    deltas = _masked(rewards + gamma * next_values - values, keep)
    advantages = _masked(_scan_from_right(mx.where(keep, gamma * lam, 1.0), deltas), keep)
    return advantages, _masked(advantages + values, keep)


def whiten(x: mx.array, mask: mx.array) -> mx.array:
    """Shift and scale to mean 0 and variance 1 over the masked entries of the whole array.

    (x - mean) / sqrt(var + 1e-8), var unbiased (n - 1), as TRL's masked_whiten. x, mask: (B, T). Returns (B, T), zero
    outside the mask, and all zeros where at most one entry counts.
    """
    _same_shape(x=x, mask=mask)
    keep = mask != 0
    x = _masked(x, keep)
    count = _float(keep).sum()
    centred = _masked(x - x.sum() / mx.maximum(count, 1.0), keep)
    variance = (centred * centred).sum() / mx.maximum(count - 1.0, 1.0)
    return centred / mx.sqrt(variance + 1e-8)


def _ratio(log_ratio: mx.array) -> mx.array:
    return mx.exp(mx.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def _surrogate(
    log_ratio: mx.array,
    logprobs: mx.array,
    advantages: mx.array,
    bounds: tuple[float | None, float | None],
    dual_clip: float | None,
    weighted: bool,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of each item, a token or a completion, and its metrics; arguments as for `policy_loss`."""
    low, high = bounds
    if wrong := [clip for clip in (low, high) if clip is not None and not clip > 0]:
        raise ConfigError(f"clip is {wrong[0]}; expected a number above 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"dual_clip is {dual_clip}; expected a number above 1, or none")
    ratio = _ratio(log_ratio)
    losses = plain = -advantages * ratio
    metrics = {"clip_fraction": mx.zeros_like(ratio), "ratio_mean": ratio}
    within = ratio if low is None or high is None else mx.clip(ratio, 1.0 - low, 1.0 + high)
    if weighted:
        return -advantages * mx.stop_gradient(within) * logprobs, metrics | {"clip_fraction": _float(within != ratio)}
    if within is not ratio:
        clipped = -advantages * within
        losses = mx.maximum(plain, clipped)
        metrics["clip_fraction"] = _float(clipped > plain)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded = (advantages < 0) & (losses > bound)
        metrics["dual_clip_fraction"] = _float(bounded)
        losses = mx.where(bounded, bound, losses)
    return losses, metrics


class Aggregation(NamedTuple):
    """How a policy's loss is summed, what its ratio is of, and how the ratio acts.

    Attributes:
        loss: token: the mean over all tokens (DAPO, Yu et al. 2025); sequence: the mean over a completion's tokens,
            then over completions (Shao et al. 2024); constant: the sum over tokens, divided by completions x length
            (Dr. GRPO, Liu et al. 2025).
        length: of constant; 1 sums over a completion's tokens, so that the loss is that of whole completions.
        ratio: token; sequence: the geometric mean of a completion's ratios stands for each of them (GSPO, Zheng et al.
            2025, eq. 7); completion: the ratio of the whole completion's probability is clipped; not with loss: token.
        owners: the completion that each token belongs to, 0 to B - 1, in the mask's shape; None: its row.
        weighted: whether the clipped ratio is a constant weight of A log pi, so that no token loses its gradient
            (CISPO, MiniMax 2025, eq. 4).
    """

    loss: Literal["token", "sequence", "constant"] = "token"
    length: float = 1
    ratio: Literal["token", "sequence", "completion"] = "token"
    owners: mx.array | None = None
    weighted: bool = False


_BY_TOKEN = Aggregation()


class KLPenalty(NamedTuple):
    """A term of a policy's loss: coef x the KL of each token to the reference.

    Attributes:
        reference: log-probabilities by the reference, for `kl_loss`; with estimator exact each token's KL itself, as
            `divergence` gives it, through which the gradient flows.
    """

    reference: mx.array
    coef: float
    estimator: Literal["k2", "k3", "exact"]

    def of(self, logprobs: mx.array, old: mx.array, keep: mx.array) -> mx.array:
        """Return each token's KL, without coef, 0 outside of `keep`; the other arguments are 0 there."""
        if self.estimator == "exact":
            return _masked(self.reference, keep)
        return kl_loss(logprobs, old, _masked(mx.stop_gradient(self.reference), keep), self.estimator)


class _Rows:
    """The completions that tokens belong to; only tokens in `keep` count."""

    def __init__(self, keep: mx.array, owners: mx.array | None, count: int) -> None:
        first = mx.arange(keep.shape[0]).reshape(-1, *[1] * (keep.ndim - 1))
        self.owners = mx.broadcast_to(first, keep.shape) if owners is None else owners
        self._keep, self._count = keep, count
        self.sizes = self.sums(mx.ones(keep.shape))

    def sums(self, x: mx.array) -> mx.array:
        return row_sums(_masked(x, self._keep), self.owners, self._count)

    def means(self, x: mx.array) -> mx.array:
        return self.sums(x) / mx.maximum(self.sizes, 1.0)


def policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    mask: mx.array,
    clip: float | tuple[float, float] | None,
    dual_clip: float | None = None,
    how: Aggregation = _BY_TOKEN,
    penalty: KLPenalty | None = None,
) -> LossSum:
    """Sum the clipped surrogate of PPO, GRPO and their kin, to be minimised (Schulman et al. 2017, eq. 7).

    max(-A ratio, -A clip(ratio, 1 - low, 1 + high)), with ratio = exp(logprobs - old_logprobs), whose argument is
    clipped to +-20. Where A < 0 the loss grows without bound in the ratio; dual_clip = c bounds it by -A c (Ye et al.
    2020; c = 3 is usual). With `how.weighted` it is -A clip(ratio) logprobs instead, the ratio a constant.

    Args:
        logprobs, old_logprobs, mask: (B, T), or (N,) tokens with `how.owners`; at the sampling temperature. The
            gradient flows into logprobs only.
        advantages: of tokens, in the mask's shape, or of completions, (B,).
        clip: low and high, or one number for both, above 0 (else ConfigError); None: the plain ratio.
        dual_clip: above 1 (else ConfigError), or None.
    Returns:
        LossSum over tokens, completions or completions x length. Metrics, over the same items: clip_fraction (the
        clipped branch is the larger; weighted: the weight is clipped), dual_clip_fraction, ratio_mean, approx_kl (k1 of
        old to new, verl's ppo_kl), approx_kl_k3, and the penalty's kl_loss, without its coef; and ratio_max, which is
        the largest.
    """
    if how.ratio == "completion" and how.loss == "token":
        raise AssertionError("the ratio is of completions and the mean over tokens; expected sequence or constant")
    if how.weighted and dual_clip is not None:
        raise AssertionError("a weighted surrogate has no dual_clip, which bounds the clipped one")
    bounds = clip if isinstance(clip, tuple) else (clip, clip)
    _same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask, owners=how.owners)
    keep, advantages = mask != 0, mx.stop_gradient(advantages)
    rows = _Rows(keep, how.owners, count=advantages.shape[0])
    new, old = _masked(logprobs, keep), _masked(mx.stop_gradient(old_logprobs), keep)
    log_ratio, taken, counted = new - old, new, keep
    tokens = {"approx_kl": -mx.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO), "approx_kl_k3": kl(old, new, "k3")}
    if how.ratio == "completion":
        log_ratio, taken, counted = rows.sums(log_ratio), rows.sums(new), rows.sizes > 0
    elif advantages.ndim == 1 and advantages.shape != mask.shape:
        advantages = advantages[rows.owners]
    if how.ratio == "sequence":
        log_ratio = rows.means(log_ratio)[rows.owners]
    _same_shape(log_ratio=log_ratio, advantages=advantages)
    losses, items = _surrogate(log_ratio, taken, _masked(advantages, counted), bounds, dual_clip, how.weighted)
    if penalty is not None:
        tokens["kl_loss"] = penalty.of(new, old, keep)
        _same_shape(losses=losses, kl_loss=tokens["kl_loss"])
        losses = losses + penalty.coef * tokens["kl_loss"]
    items = {name: _masked(x, counted) for name, x in items.items()}
    highest = {"ratio_max": items["ratio_mean"].max()}
    if how.ratio != "completion":
        items, tokens = {}, items | tokens
    if how.loss == "token":
        sums = {name: _masked(x, keep).sum() for name, x in tokens.items()}
        return LossSum(losses.sum(), _float(keep).sum(), sums | highest)
    length = how.length if how.loss == "constant" else 1
    total = rows.means(losses) if how.loss == "sequence" and how.ratio != "completion" else losses
    means = items | {name: rows.means(x) for name, x in tokens.items()}
    # A completion weighs `length` in metrics too, so that they stay means over its tokens.
    sums = {name: length * x.sum() for name, x in means.items()}
    return LossSum(total.sum(), length * _float(rows.sizes > 0).sum(), sums | highest)


def value_loss(
    values: mx.array, old_values: mx.array, returns: mx.array, mask: mx.array, clip: float | None
) -> LossSum:
    """Sum half the critic's squared error, clipped around its old values (OpenAI baselines), over the mask.

    1/2 max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2). No gradient flows into old_values and returns.

    values, old_values, returns, mask: (B, T). clip: above 0 (else ConfigError), or None for the plain squared error.
    Returns a LossSum over the mask's tokens. Metrics: value_clip_fraction (the clipped branch is the larger).
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"value clip is {clip}; expected a number above 0, or none")
    _same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    keep = mask != 0
    values = _masked(values, keep)
    old = _masked(mx.stop_gradient(old_values), keep)
    returns = _masked(mx.stop_gradient(returns), keep)
    reach = math.inf if clip is None else clip
    plain = mx.square(values - returns)
    # Clip the value, not its change: old + clip(v - old) differs from v by rounding and would count as clipped.
    clipped = mx.square(mx.clip(values, old - reach, old + reach) - returns)
    metrics = {"value_clip_fraction": _float(clipped > plain).sum()}
    return LossSum(0.5 * mx.maximum(plain, clipped).sum(), _float(keep).sum(), metrics)


def kl(logprobs: mx.array, ref_logprobs: mx.array, estimator: str) -> mx.array:
    """Estimate KL(policy || reference) from the sampled tokens (Schulman 2020, "Approximating KL divergence").

    With d = logprobs - ref_logprobs: k1 = d, unbiased, of either sign; k2 = d^2 / 2, biased, >= 0, with the right
    gradient; k3 = exp(-d) - 1 + d, unbiased and >= 0, but bounded by 10 as in verl: constant at d < -2.6 or d > 11.
    logprobs, ref_logprobs: (B, T). Returns (B, T), nats, unmasked. ConfigError for an unknown estimator.
    """
    if estimator not in KL_ESTIMATORS:
        hint = nearest(estimator, KL_ESTIMATORS)
        raise ConfigError(f"KL estimator is {estimator!r}; expected one of {', '.join(KL_ESTIMATORS)}{hint}")
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = _float(logprobs) - _float(ref_logprobs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * mx.square(d)
    d = mx.clip(d, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)  # or the gradient of an overflow would be 0 * inf
    # expm1: exp(-d) - 1 would lose its digits near d = 0, the usual case.
    return mx.clip(mx.expm1(-d) + d, 0.0, _MAX_K3)


def kl_loss(logprobs: mx.array, old: mx.array, reference: mx.array, estimator: Literal["k2", "k3"]) -> mx.array:
    """Return each token's KL to the reference, (n,), as a term of a loss.

    k2's gradient on the policy's own tokens is that of KL(policy || reference). In later passes an older policy sampled
    the tokens, so it is weighted by the ratio to that one; without, four passes over a rollout end 18 % below the best
    KL of a task where that is known. k3 is as published (Shao et al. 2024, eq. 4).

    Args:
        logprobs, old, reference: (n,) by the policy, the one that sampled, and the reference; the gradient flows into
            the first only.
    """
    apart = kl(logprobs, reference, estimator)
    return apart * mx.stop_gradient(_ratio(logprobs - old)) if estimator == "k2" else apart


def load_balance(chosen: mx.array, shares: mx.array) -> mx.array:
    """Return how unevenly a router spreads tokens over E experts (Fedus et al. 2021, eq. 4 to 6, without alpha), ().

    E sum_i f_i P_i: f_i the share of choices that fell on expert i, P_i the router's mean probability of it. 1 where
    both are even, up to E where one expert gets everything. With several experts a token, f is over all choices.

    Args:
        chosen, shares: (E,) for each expert the sums over tokens of its choices and of its probability. No gradient
            flows into the first.
    """
    _same_shape(chosen=chosen, shares=shares)
    chosen, shares = mx.stop_gradient(_float(chosen)), _float(shares)
    return chosen.size * (chosen / chosen.sum() * (shares / shares.sum())).sum()


def truncate_at_stop(ids: mx.array, stop: int | Sequence[int], pad: int) -> mx.array:
    """Replace everything after a row's first stop token by pad; the stop token stays.

    ids: (B, T) integers; stop: one id, or several that each end a row. Returns (B, T), dtype of ids; a row without a
    stop token is unchanged.
    """
    hits = mx.zeros(ids.shape, dtype=mx.bool_)
    for token in [stop] if isinstance(stop, int) else stop:
        hits = hits | (ids == token)
    counts = hits.astype(mx.int32)
    # Stops before a position: 0 up to and including the first one.
    before = mx.cumsum(counts, axis=1) - counts
    return mx.where(before > 0, mx.array(pad, dtype=ids.dtype), ids)


def adaptive_kl(coef: float, observed: float, target: float, horizon: float, n: int) -> float:
    """Return the next KL coefficient (Ziegler et al. 2019, section 2.2).

    coef * (1 + clip(observed / target - 1, -0.2, 0.2) * n / horizon),
    observed and target in nats; n episodes (or steps) since the last call, horizon in the same unit. ConfigError
    unless target and horizon are above 0, ModelError where the observed KL is not a number.
    """
    if not (target > 0 and horizon > 0):
        raise ConfigError(f"adaptive KL: target is {target} and horizon is {horizon}; expected both above 0")
    if math.isnan(observed):
        raise ModelError("adaptive KL: the observed KL is not a number: training has diverged; lower optim.lr")
    error = min(max(observed / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * n / horizon)


def wins(difference: mx.array, size: mx.array) -> mx.array:
    """Return 1 where a difference is above 0, 0 where it is below, and 1/2 where it is within rounding, (n,).

    Args:
        difference: (n,) float32.
        size: (n,) sum of the magnitudes of the two numbers.
    """
    _same_shape(difference=difference, size=size)
    return mx.where(mx.abs(difference) <= _ROUNDING * size, 0.5, _float(difference > 0))


def bradley_terry(
    chosen: mx.array,
    rejected: mx.array,
    margin: mx.array | None = None,
    centering: float = 0.0,
    label_smoothing: float | mx.array = 0.0,
    weights: mx.array | None = None,
) -> LossSum:
    """Sum a reward model's pairwise loss (Ouyang et al. 2022, eq. 1): -log sigmoid(chosen - rejected - margin).

    Args:
        chosen, rejected: (n,) scores.
        margin: (n,), how much better chosen should be (Touvron et al. 2023, eq. 2).
        centering: adds centering * (chosen + rejected)^2, which fixes the free constant (Eisenstein et al. 2024).
        label_smoothing: e, or (n,): the pair has weight 1 - e and the swapped pair e, as if labels were wrong so often.
        weights: (n,) of the pairs; None: 1.
    Returns:
        LossSum over pairs. Metrics: accuracy (chosen above rejected, by `wins`), margin (chosen - rejected).
    """
    _same_shape(chosen=chosen, rejected=rejected, margin=margin, weights=weights)
    chosen, rejected, wanted = _float(chosen), _float(rejected), 0.0 if margin is None else _float(margin)
    difference = chosen - rejected
    right, swapped = _neg_log_sigmoid(difference - wanted), _neg_log_sigmoid(-difference - wanted)
    losses = (1 - label_smoothing) * right + label_smoothing * swapped + centering * mx.square(chosen + rejected)
    right_of_two = wins(difference, mx.abs(chosen) + mx.abs(rejected))
    w = mx.ones(difference.shape) if weights is None else _float(weights)
    metrics = {"accuracy": (right_of_two * w).sum(), "margin": (difference * w).sum()}
    return LossSum((losses * w).sum(), w.sum(), metrics)


# Preference losses: everything is (n,), one loss for each pair (or row), float32; no gradient flows into a reference.


def implicit_reward(logprobs: mx.array, ref_logprobs: mx.array, beta: float) -> mx.array:
    """Return beta (log pi - log ref), (n,): the implicit reward, up to a constant (Rafailov et al. 2023, eq. 5)."""
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return beta * (_float(logprobs) - mx.stop_gradient(_float(ref_logprobs)))


def _log_ratio_margin(chosen: mx.array, rejected: mx.array, ref_chosen: mx.array, ref_rejected: mx.array) -> mx.array:
    """Return h = log (pi/ref)(chosen) - log (pi/ref)(rejected), (n,)."""
    _same_shape(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return implicit_reward(chosen, ref_chosen, 1.0) - implicit_reward(rejected, ref_rejected, 1.0)


def _smoothed(margin: mx.array, label_smoothing: float) -> mx.array:
    return (1 - label_smoothing) * _neg_log_sigmoid(margin) + label_smoothing * _neg_log_sigmoid(-margin)


def dpo(
    chosen: mx.array,
    rejected: mx.array,
    ref_chosen: mx.array,
    ref_rejected: mx.array,
    beta: float,
    label_smoothing: float = 0.0,
) -> mx.array:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): -log sigmoid(beta h), (n,).

    h = log (pi/ref)(chosen) - log (pi/ref)(rejected), from sums of the completions' log-probabilities, each (n,).
    label_smoothing e is conservative DPO (Mitchell 2023): (1 - e) (-log sigmoid(beta h)) + e (-log sigmoid(-beta h)).
    """
    return _smoothed(beta * _log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected), label_smoothing)


def ipo(chosen: mx.array, rejected: mx.array, ref_chosen: mx.array, ref_rejected: mx.array, beta: float) -> mx.array:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): (h - 1 / (2 beta))^2, (n,), beta the paper's tau.

    h as in `dpo`, but from MEANS of log-probabilities over a completion's tokens: the paper's authors confirmed it, by
    TRL's documentation, and TRL does so.
    """
    return mx.square(_log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected) - 1.0 / (2.0 * beta))


def hinge(chosen: mx.array, rejected: mx.array, ref_chosen: mx.array, ref_rejected: mx.array, beta: float) -> mx.array:
    """Hinge on the normalised margin (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023): max(0, 1 - beta h), (n,).

    h as in `dpo`, from sums of log-probabilities. A pair with beta h above 1 has loss and gradient 0.
    """
    return mx.maximum(1.0 - beta * _log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected), 0.0)


def kto(
    logratios: mx.array,
    desirable: mx.array,
    reference_point: mx.array | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024), for rows that are good or bad, not paired; (n,).

    With r = logratios and z = max(0, reference_point), a good row loses w_D (1 - sigmoid(beta (r - z))), a bad one
    w_U (1 - sigmoid(beta (z - r))).

    Args:
        logratios: (n,), sums over the completion of log pi - log ref; the gradient flows here only.
        desirable: (n,), non-zero for a good row.
        reference_point: one number, nats: the mean of such log-ratios over prompts each with ANOTHER row's completion,
            an estimate of KL(pi || ref). Take it over the whole step: means of micro-batches would not add up.
        desirable_weight, undesirable_weight: the paper advises (w_D n_D) / (w_U n_U) from 1 to 4/3.
    """
    _same_shape(logratios=logratios, desirable=desirable)
    point = mx.stop_gradient(_float(mx.maximum(reference_point, 0.0)))
    if point.size != 1:
        raise AssertionError(f"reference_point has shape {tuple(point.shape)}; expected one number for all rows")
    good = desirable != 0
    gain = beta * (_float(logratios) - point.reshape(()))
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) is near 1.
    return mx.where(good, desirable_weight, undesirable_weight) * mx.sigmoid(mx.where(good, -gain, gain))


def cpo(chosen: mx.array, rejected: mx.array, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """Contrastive preference optimisation (Xu et al. 2024): -log sigmoid(beta (chosen - rejected)), (n,).

    DPO against a uniform reference, from sums of log-probabilities. The paper's loss adds the chosen row's NLL: that is
    the caller's to add. label_smoothing as in `dpo`.
    """
    _same_shape(chosen=chosen, rejected=rejected)
    return _smoothed(beta * (_float(chosen) - _float(rejected)), label_smoothing)


def simpo(chosen: mx.array, rejected: mx.array, beta: float, gamma: float) -> mx.array:
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(beta (chosen - rejected) - gamma), (n,), without a reference.

    chosen, rejected: MEANS of log-probabilities over the response's tokens. gamma is not multiplied by beta.
    """
    _same_shape(chosen=chosen, rejected=rejected)
    return _neg_log_sigmoid(beta * (_float(chosen) - _float(rejected)) - gamma)


def _log1mexp(x: mx.array) -> mx.array:
    """Return log(1 - exp(x)) for x <= 0, kept away from x = 0 (a completion of probability 1), where it is -inf."""
    return mx.log(-mx.expm1(mx.minimum(x, -1e-6)))


def odds_ratio(chosen: mx.array, rejected: mx.array, beta: float) -> mx.array:
    """Return ORPO's preference term (Hong et al. 2024, eq. 7), (n,), to be ADDED to the chosen completion's mean NLL.

    -beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) with p = exp(chosen), exp(rejected).
    chosen, rejected: MEANS of log-probabilities over a completion's tokens, at most 0.
    """
    _same_shape(chosen=chosen, rejected=rejected)
    chosen, rejected = _float(chosen), _float(rejected)
    return beta * _neg_log_sigmoid((chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected)))


# --- groups -----------------------------------------------------------------------------------------------------------
# B completions, G of each prompt, which are neighbours; N tokens of a batch.

Floats = npt.NDArray[np.float32]
Scale = Literal["group", "batch", "none"]

EPS = 1e-4


def _groups(scores: npt.NDArray[Any], size: int) -> npt.NDArray[np.float64]:
    if size < 1 or len(scores) % size:
        raise AssertionError(f"{len(scores)} scores cannot be split into groups of {size}")
    return np.asarray(scores, dtype=np.float64).reshape(-1, size)


def leave_one_out(scores: npt.NDArray[Any], size: int) -> Floats:
    """Return (B,) each score minus the mean of the other G - 1 in its group (Kool et al. 2019, Ahmadian et al. 2024).

    The baseline does not depend on the completion, so the gradient is unbiased. size: G, at least 2.
    """
    groups = _groups(scores, size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (size - 1)
    return (groups - others).reshape(-1).astype(np.float32)


def group_relative(scores: npt.NDArray[Any], size: int, scale: Scale, others: bool = False) -> Floats:
    """Return (B,) each score minus its group's mean, divided by a standard deviation (Shao et al. 2024, eq. 3).

    Args:
        size: G, at least 2.
        scale: of each group; of the whole batch; or none (Dr. GRPO, Liu et al. 2025). Deviations are unbiased (n - 1)
            and have 1e-4 added, as in TRL.
        others: take the mean of the other G - 1. The whole group's makes all advantages (G - 1) / G times as large.
    """
    groups = _groups(scores, size)
    centred = leave_one_out(scores, size).reshape(groups.shape) if others else groups - groups.mean(1, keepdims=True)
    if scale == "group":
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + EPS)
    elif scale == "batch":
        centred = centred / (groups.std(ddof=1) + EPS)
    return centred.reshape(-1).astype(np.float32)


def equal_groups(scores: npt.NDArray[Any], size: int) -> npt.NDArray[np.bool_]:
    """Return (B / G,) whether all scores of a group are equal, so that its advantages are 0."""
    groups = _groups(scores, size)
    return np.asarray(groups.max(axis=1) == groups.min(axis=1))
