"""The mathematics of methods without a critic: what a completion is worth beside others, and the clipped ratio.

B completions, those of one prompt side by side; G of each prompt; N tokens of a batch.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxft.objectives import functional as F

Floats = npt.NDArray[np.float32]
Scale = Literal["group", "batch", "none"]

EPS = 1e-4
# As in `functional`: exp(20) is far from float32's end, and beyond it a log-ratio says only "very different".
_MAX_LOG_RATIO = 20.0


def _groups(scores: npt.NDArray[Any], size: int) -> npt.NDArray[np.float64]:
    if size < 1 or len(scores) % size:
        raise AssertionError(f"{len(scores)} scores are no groups of {size}")
    return np.asarray(scores, dtype=np.float64).reshape(-1, size)


def leave_one_out(scores: npt.NDArray[Any], size: int) -> Floats:
    """(B,) each score less the mean of the other G - 1 of its group (Kool et al. 2019, Ahmadian et al. 2024).

    The baseline does not know of the completion, so that the gradient it gives is unbiased. size: G, at least 2.
    """
    groups = _groups(scores, size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (size - 1)
    return (groups - others).reshape(-1).astype(np.float32)


def group_relative(scores: npt.NDArray[Any], size: int, scale: Scale, others: bool = False) -> Floats:
    """(B,) each score less its group's mean, over a standard deviation (Shao et al. 2024, eq. 3).

    Args:
        size: G, at least 2.
        scale: of each group; of the whole batch; or none (Dr. GRPO, Liu et al. 2025). Deviations are unbiased (n - 1)
            and have 1e-4 added, as in TRL.
        others: the mean is of the other G - 1. The group's own makes all advantages (G - 1) / G times as large.
    """
    groups = _groups(scores, size)
    centred = leave_one_out(scores, size).reshape(groups.shape) if others else groups - groups.mean(1, keepdims=True)
    if scale == "group":
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + EPS)
    elif scale == "batch":
        centred = centred / (groups.std(ddof=1) + EPS)
    return centred.reshape(-1).astype(np.float32)


def equal_groups(scores: npt.NDArray[Any], size: int) -> npt.NDArray[np.bool_]:
    """(B / G,) whether all scores of a group are the same, so that it teaches nothing."""
    groups = _groups(scores, size)
    return np.asarray(groups.max(axis=1) == groups.min(axis=1))


def surrogate(
    log_ratio: mx.array, advantages: mx.array, low: float | None, high: float | None
) -> tuple[mx.array, dict[str, mx.array]]:
    """The clipped surrogate of tokens, or of whole completions, to be minimised; nothing is added up.

    max(-A ratio, -A clip(ratio, 1 - low, 1 + high)) (Schulman et al. 2017, eq. 7; low and high apart as in DAPO, Yu et
    al. 2025), ratio = exp(log_ratio), which is held within +-20.

    Args:
        log_ratio, advantages: (n,), the gradient flows into the first only.
        low, high: None for the plain ratio.
    Returns:
        Losses (n,), and metrics (n,) each: clip_fraction, ratio_mean.
    """
    advantages = mx.stop_gradient(advantages)
    ratio = _ratio(log_ratio)
    plain = -advantages * ratio
    if low is None or high is None:
        return plain, {"clip_fraction": mx.zeros_like(ratio), "ratio_mean": ratio}
    clipped = -advantages * mx.clip(ratio, 1.0 - low, 1.0 + high)
    return mx.maximum(plain, clipped), {"clip_fraction": (clipped > plain).astype(mx.float32), "ratio_mean": ratio}


def kl_loss(logprobs: mx.array, old: mx.array, reference: mx.array, estimator: Literal["k2", "k3"]) -> mx.array:
    """KL to the reference of each token, (n,), as a term of a loss.

    k2's gradient under tokens of the policy itself is that of KL(policy || reference). In later passes the tokens are
    of an older policy, so it is weighed by the ratio to that one; without, four passes over a rollout end 18 % below
    the best KL of a task where that is known. k3 is as published (Shao et al. 2024, eq. 4).

    Args:
        logprobs, old, reference: (n,) of the policy, of the one that sampled, and of the reference; the gradient flows
            into the first only.
    """
    apart = F.kl(logprobs, reference, estimator)
    return apart * mx.stop_gradient(_ratio(logprobs - old)) if estimator == "k2" else apart


def _ratio(log_ratio: mx.array) -> mx.array:
    return mx.exp(mx.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
