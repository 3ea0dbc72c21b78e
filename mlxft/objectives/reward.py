"""Train a reward model: a completion's score, learnt from pairs (Bradley and Terry 1952)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field

from mlxft.config import Config, Settings
from mlxft.data.dataset import EncodedPair, Sizes, encode_pairs, sizes_of
from mlxft.errors import ConfigError, DataError
from mlxft.model.heads import begin_head
from mlxft.model.logits import Split
from mlxft.model.memory import Outline, ShapeSplit
from mlxft.model.prefix import ScoredRows
from mlxft.objectives.base import MicroBatch, Terms
from mlxft.objectives.functional import bradley_terry, wins
from mlxft.objectives.pairs import (
    CompletionObjective,
    check_completion_recipe,
    encode_splits,
    micro_batch,
    stack_pairs,
)
from mlxft.text import counted

_FORMATS = ("preference", "ratings")
BINS = 10  # of confidence, from 1/2 to 1
THIRDS = ("short", "middle", "long")


class RewardSettings(Settings):
    """The section `reward`."""

    centering: float = Field(0.01, ge=0, description="Weight of (chosen + rejected)^2, which keeps scores around 0.")
    margin: bool = Field(
        False, description="Subtract the row's margin from the score difference; a row without one has 0."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of pairs with swapped labels.")


@dataclass(frozen=True, kw_only=True)
class RewardBatch(ScoredRows):
    """n pairs, the chosen completions before the rejected ones; weights, smoothing and margins are (n,)."""

    weights: mx.array
    smoothing: mx.array
    margins: mx.array


def _begin_head(split: Split, config: Config) -> None:
    """Attach a new head, or the head of the reward run that is trained further."""
    given = config.model.adapter or config.model.path
    begin_head(split, given, "tune.train" if config.tune.train else "tune.targets")


class Reward(CompletionObjective[EncodedPair]):
    """A reward model on pairs. A tie is trained as a label that is right half the time; validation leaves ties out.

    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """

    sections: ClassVar[dict[str, type[Settings]]] = {"reward": RewardSettings}
    learning_rate = 1e-5  # of full fine-tuning, LoRA 1e-4, as TRL's RewardConfig

    @classmethod
    def outline(cls, config: Config) -> Outline:
        return Outline("scores", together=2)

    @classmethod
    def outfit(cls, config: Config, model: nn.Module) -> None:
        _begin_head(ShapeSplit(model), config)

    @classmethod
    def formats(cls, config: Config) -> Sequence[str]:
        return _FORMATS

    def __init__(self, config: Config, tokenizer: Any) -> None:
        check_completion_recipe(config, _FORMATS)
        if config.run.sample_prompts:
            raise ConfigError("run.sample_prompts: a reward model gives scores, not text; leave it out")
        rows, counts, valid, _ = encode_splits(config, tokenizer, encode_pairs, EncodedPair)
        self._settings = config.section("reward", RewardSettings)
        decided = [row for row in valid if not row.tie] if any(row.tie for row in valid) else valid
        super().__init__(config, tokenizer, rows, counts, decided, per_row=2)
        if valid and not self.valid:
            raise DataError("data.valid: has ties only, which cannot measure a reward model")
        if len(self.valid) < len(valid):
            self.notes.append(f"{len(valid) - len(self.valid):,} ties are left out of validation")
        margins = sum(row.margin is not None for row in rows)
        if self._settings.margin and not margins:
            raise ConfigError("reward.margin: no row has a margin; leave it out, or give rows a field margin")
        if margins and not self._settings.margin:
            self.notes.append(counted(margins, "rows have a margin, which is not used (reward.margin: true)"))
        self._thirds = thirds_of(sizes_of(self.valid)[:, 1:].ravel()) if self.valid else (0.0, 0.0)
        self._about: dict[str, Any] = {}

    def prepare(self, model: nn.Module, base: str = "") -> None:
        super().prepare(model, base)
        _begin_head(self.sharing(model).split, self.config)

    def make(
        self, model: nn.Module, rows: Sequence[int], width: int, point: mx.array | None, valid: bool
    ) -> MicroBatch:
        pairs = self.chosen_rows(rows, valid)
        stacked = stack_pairs(pairs, width, self.sharing(model))
        smoothing = self._settings.label_smoothing
        margins = [pair.margin or 0.0 if self._settings.margin else 0.0 for pair in pairs]
        data = RewardBatch(
            **{f.name: getattr(stacked, f.name) for f in fields(ScoredRows)},
            weights=mx.array([pair.weight for pair in pairs]),
            smoothing=mx.array([0.5 if pair.tie else smoothing for pair in pairs]),
            margins=mx.array(margins),
        )
        return micro_batch(data, pairs, 2 * len(pairs))

    def loss(self, model: nn.Module, data: RewardBatch) -> Terms:
        scores = self.sharing(model).scores(data)  # chosen and rejected in one pass
        half = scores.shape[0] // 2
        chosen, rejected = scores[:half], scores[half:]
        asked = (data.margins, self._settings.centering, data.smoothing, data.weights)
        total, _, metrics = bradley_terry(chosen, rejected, *asked)
        if not model.training:
            metrics = metrics | measure(scores, data.lengths, data.weights, self._thirds)
        return Terms({"reward": total}, metrics)

    def validated(self, means: dict[str, float]) -> dict[str, Any]:
        """Add ece, reliability, score_mean, score_std and scores_by_length to loss, accuracy and margin."""
        found: dict[str, Any] = {k: v for k, v in means.items() if "/" not in k}
        if len(found) == len(means):
            return found
        found |= score_statistics(means)
        self._about = {"reward": {"mean": found["score_mean"], "std": found["score_std"]}}
        return found

    def about(self) -> dict[str, Any]:
        """Return the mean and standard deviation of the latest validation's scores, to normalise rewards by."""
        return self._about


def thirds_of(lengths: Sequence[int] | Sizes) -> tuple[float, float]:
    """Return where the middle third of the lengths begins and ends."""
    low, high = np.quantile(lengths, [1 / 3, 2 / 3]).tolist()
    return low, high


def measure(scores: mx.array, lengths: mx.array, weights: mx.array, thirds: tuple[float, float]) -> dict[str, mx.array]:
    """Return the sums whose means `score_statistics` reads.

    Args:
        scores, lengths: (2N,), of the chosen completions and then of the rejected ones.
        weights: (N,) of the pairs.
    """
    half = scores.shape[0] // 2
    return _calibration(scores[:half], scores[half:], weights) | _by_length(scores, lengths, weights, thirds)


def score_statistics(means: dict[str, float]) -> dict[str, Any]:
    """Return ece, reliability, score_mean, score_std and scores_by_length."""
    bins = [[means[f"bin/{i}/{k}"] for k in ("share", "confidence", "accuracy")] for i in range(BINS)]
    thirds = [[means[f"third/{i}/{k}"] for k in ("share", "sum", "square")] for i in range(3)]
    mean, std = _moments(*(sum(column) for column in zip(*thirds)))
    return {
        "ece": sum(abs(right - sure) for _, sure, right in bins),
        "reliability": [
            {"share": share, "confidence": sure / share, "accuracy": right / share}
            for share, sure, right in bins
            if share > 0
        ],
        "score_mean": mean,
        "score_std": std,
        "scores_by_length": {
            name: dict(zip(("share", "mean", "std"), (third[0], *_moments(*third))))
            for name, third in zip(THIRDS, thirds)
            if third[0] > 0
        },
    }


def _by_length(
    scores: mx.array, lengths: mx.array, weights: mx.array, thirds: tuple[float, float]
) -> dict[str, mx.array]:
    """Return the sums that give mean and spread of the scores, by thirds of the completions' lengths."""
    weights = mx.concatenate([weights, weights]) / 2
    low, high = thirds
    third = (lengths > low).astype(mx.int32) + (lengths > high).astype(mx.int32)
    sums: dict[str, mx.array] = {}
    for i in range(3):
        w = weights * (third == i)
        values = {"share": w, "sum": w * scores, "square": w * scores.square()}
        sums |= {f"third/{i}/{k}": v.sum() for k, v in values.items()}
    return sums


def _calibration(chosen: mx.array, rejected: mx.array, weights: mx.array) -> dict[str, mx.array]:
    """Return sums by bins of confidence: how sure the model is of the better completion, and how often it is right."""
    difference = chosen - rejected
    confidence = mx.sigmoid(mx.abs(difference))
    right = wins(difference, mx.abs(chosen) + mx.abs(rejected))
    bins = mx.clip(((confidence - 0.5) * 2 * BINS).astype(mx.int32), 0, BINS - 1)
    sums: dict[str, mx.array] = {}
    for i in range(BINS):
        w = weights * (bins == i)
        values = {"share": w, "confidence": w * confidence, "accuracy": w * right}
        sums |= {f"bin/{i}/{k}": v.sum() for k, v in values.items()}
    return sums


def _moments(share: float, total: float, squares: float) -> tuple[float, float]:
    """Return mean and standard deviation."""
    mean = total / share
    return mean, max(0.0, squares / share - mean * mean) ** 0.5
