"""What a model makes of a task's rows: a score for each row, figures with their errors, and differences of two models.

    task = read_task("configs/eval-reviews.yaml")
    cases = make_cases(read_rows("test.jsonl", "test"), task)
    result = evaluate(load("runs/a"), cases, task)          # shots=[...] are cases too, of other rows
    print(result.figures()["accuracy"], compare(result, other)[0])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlxft.data.batching import plan_epoch
from mlxft.data.dataset import build
from mlxft.data.formats import Example, Message, Text
from mlxft.data.sources import report_lines
from mlxft.errors import ConfigError, DataError
from mlxft.model.batch_sample import sample_batch, text_of
from mlxft.model.load import Loaded
from mlxft.model.logits import Split
from mlxft.model.logprobs import row_sums, rows_logprobs
from mlxft.model.sample import Sampling, evaluating
from mlxft.objectives.onpolicy.rewards import Item as Answered
from mlxft.objectives.sft import make_batch
from mlxft.study.cases import Case, delimiter, with_shots
from mlxft.study.choice import Request, encode_pair, loglikelihoods
from mlxft.study.judges import judges
from mlxft.study.stats import Figure, Floats, bootstrap, mean
from mlxft.study.tasks import Task

TOKENS = 4096  # of a batch, padding included
MAX_TOKENS = 256
OVERFLOW = ("error", "drop", "truncate", "split")


@dataclass(frozen=True)
class Result:
    """What a model made of a task.

    Attributes:
        kind: loss, choice or generate.
        rows: the evaluated rows' places, in order.
        scores: metric -> (n,) a score for each row; of a loss its mean over the row's tokens, in nats.
        weights: metric -> (n,) what a row counts, where not 1: tokens.
        predictions: a mapping a row: row, prompt, prediction, target and scores, and what else there is to know.
        notes: what was left out or is odd, a sentence each.
    """

    task: str
    kind: str
    rows: list[str]
    scores: dict[str, Floats]
    predictions: list[dict[str, Any]]
    weights: dict[str, Floats] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Figure]:
        """Metric -> its mean, standard error and number of rows; a loss brings its perplexity along."""
        found = {name: mean(values, self.weights.get(name)) for name, values in self.scores.items()}
        if "loss" in found:
            loss = found["loss"]
            value = _exp(loss.value)
            found["perplexity"] = Figure(value, value * loss.se, loss.n)  # by the delta method
        return found


class Paired(NamedTuple):
    """One model against another on the same rows.

    Attributes:
        difference: mean of the first's scores less the second's; `se` its standard error.
        low, high: the bootstrap interval around it.
        won, lost, tied: rows on which the first is better, worse, or neither; less loss is better.
    """

    metric: str
    n: int
    difference: float
    se: float
    low: float
    high: float
    won: int
    lost: int
    tied: int


def compare(a: Result, b: Result, *, seed: int = 0, confidence: float = 0.95) -> list[Paired]:
    """What `a` is better or worse by than `b`, for each metric.

    Raises:
        ConfigError: they are not of the same rows and tokens.
    """
    if a.rows != b.rows or a.scores.keys() != b.scores.keys():
        raise ConfigError(f"the two were not evaluated on the same rows by the same task: {a.task}, {b.task}")
    found = []
    for name, values in a.scores.items():
        other, weights = b.scores[name], a.weights.get(name)
        if weights is not None and not np.array_equal(weights, b.weights[name]):
            raise ConfigError(
                "the two models make other tokens of the same text, so a loss a token of one is not that of the "
                "other; compare them by a task with choices or metrics"
            )
        interval = bootstrap(values, other, weights, seed=seed, confidence=confidence)
        better = other - values if a.kind == "loss" else values - other
        won, lost = int((better > 0).sum()), int((better < 0).sum())
        se = mean(values - other, weights).se
        found.append(Paired(name, len(values), *_flat(interval, se), won, lost, len(values) - won - lost))
    return found


def _flat(interval: Any, se: float) -> tuple[float, float, float, float]:
    return interval.difference, se, interval.low, interval.high


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def evaluate(
    loaded: Loaded,
    cases: Sequence[Case],
    task: Task,
    *,
    shots: Sequence[Case] = (),
    tokens: int = TOKENS,
    max_length: int | None = None,
    overflow: str = "error",
    seed: int = 0,
    console: Console | None = None,
) -> Result:
    """Ask a model the cases of a task.

    Args:
        loaded: a model that gives text; every module's training flag is as before at the end.
        shots: solved cases that are shown before each (choice and written answers only).
        tokens: of a batch, padding included.
        max_length: most tokens a row may have, answer included; default: what the model's config says.
        overflow: what to do with a longer one: "error" reports them all, "drop" leaves them out and counts them;
            a loss can also "truncate" and, of texts, "split".
        seed: of sampling, where the task has a temperature.
        console: where progress is shown.
    Raises:
        ConfigError, DataError: the task, its rows or shots do not fit the model.
        RewardError: a function gives no number.
    """
    raise NotImplementedError
