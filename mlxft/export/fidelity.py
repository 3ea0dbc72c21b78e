"""How much of an adaptation is left in another form of the model, measured on probe rows.

Three models stand side by side: the base, the adapted one, and the fused one. Between two of them it measures the
Kullback-Leibler divergence of what they predict, a mean over tokens, in nats; for reward models, the mean square of
the difference of their scores. The share of the adaptation that is kept is 1 - D(adapted, fused) / D(adapted, base).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxft.data.batching import plan_epoch
from mlxft.data.encode import Encoded
from mlxft.export.probe import Probe, limited
from mlxft.model.heads import read_scores
from mlxft.model.logits import Split, chunk_size
from mlxft.model.lora import QUANTIZED, dense_weight, plain

BATCH = 512  # tokens, padding included
_HELD = 256 << 20  # bytes of one model's log-probabilities, which are held for comparison

Outputs = list[mx.array]  # of a meter, in the order of its rows


class Gap(NamedTuple):
    """Between two models: a divergence, at least 0, and the share of tokens or pairs on which they agree."""

    divergence: float
    agreement: float


def kl(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) in nats, (n,), of log-probabilities p and q (n, V), float32.

    As the sum of p (e^d - 1 - d) with d = q - p, whose terms are all at least 0: in the sum of -p d, two models that
    differ by little would cancel to noise (the terms p (e^d - 1) add up to 0). Small d go by the series.
    """
    d = q - p
    small = mx.abs(d) < 0.1
    near = mx.where(small, d, 0.0)
    series = near * near * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near / 120)))
    probability = mx.exp(p)
    # A token that p rules out counts for q's share of it only.
    far = mx.exp(q) - probability - mx.where(probability > 0, probability * d, 0.0)
    return mx.where(small, probability * series, far).sum(axis=-1)


def kept_share(fused: float, base: float) -> float | None:
    """1 - fused / base, from 0 to 1; None where the adaptation changes nothing, and there is nothing to keep."""
    if base <= 0:
        return None
    return min(1.0, max(0.0, 1.0 - fused / base))


class TextMeter:
    """Predictions at the tokens of probe rows that count."""

    name = "kl"

    def __init__(self, split: Split, probe: Probe, vocabulary: int) -> None:
        self._split = split
        self._chunk = chunk_size(vocabulary)
        self.probe = limited(probe, max(64, _HELD // (4 * vocabulary)))
        self.batches = list(_batches(self.probe.rows))

    def outputs(self) -> Outputs:
        """Log-probabilities, (n, V) float32, evaluated."""
        found: Outputs = []
        for rows, ids in self.batches:
            width = ids.shape[1]
            at = np.concatenate([b * width + np.flatnonzero(row.trained) - 1 for b, row in enumerate(rows)])
            positions = mx.array(at.astype(np.int32))
            split = self._split
            states = split.hidden(ids) if split.separable else split.call(ids)
            states = states.reshape(-1, states.shape[-1])[positions]
            for start in range(0, len(at), self._chunk):
                part = states[start : start + self._chunk]
                logits = (split.logits(part) if split.separable else part).astype(mx.float32)
                found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
                mx.eval(found[-1])
        return found

    def gap(self, one: Outputs, other: Outputs) -> Gap:
        """Mean KL(one || other) a token, and the share of tokens whose likeliest one is the same."""
        total = sum(float(kl(p, q).sum()) for p, q in zip(one, other))
        same = sum(float((p.argmax(axis=-1) == q.argmax(axis=-1)).sum()) for p, q in zip(one, other))
        count = sum(p.shape[0] for p in one)
        return Gap(total / count, same / count)


class ScoreMeter:
    """Scores of probe answers by the model's head."""

    name = "squared score difference"

    def __init__(self, split: Split, probe: Probe) -> None:
        self._split = split
        self.probe = probe
        self.batches = list(_batches(probe.rows))

    def outputs(self) -> Outputs:
        """Scores, (n,) float32, evaluated."""
        found: Outputs = []
        for rows, ids in self.batches:
            last = mx.array([len(row.ids) - 1 for row in rows])
            found.append(read_scores(self._split, ids, last))
            mx.eval(found[-1])
        return found

    def gap(self, one: Outputs, other: Outputs) -> Gap:
        """Mean square of the difference, and the share of pairs of answers that both put into the same order."""
        a, b = (np.concatenate([np.array(part) for part in given]) for given in (one, other))
        upper = np.triu_indices(len(a), 1)
        same = (np.sign(a[:, None] - a[None])[upper] == np.sign(b[:, None] - b[None])[upper]) if len(a) > 1 else True
        return Gap(float(np.mean((a - b) ** 2)), float(np.mean(same)))


Meter = TextMeter | ScoreMeter


def _batches(rows: list[Encoded]) -> Iterator[tuple[list[Encoded], mx.array]]:
    """Rows of like length with their ids (B, T), padded on the right, where causal attention never sees it."""
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    for slot in plan_epoch(lengths, tokens=BATCH, seed=None):
        ids = np.zeros((len(slot.rows), slot.width), dtype=np.int32)
        for b, i in enumerate(slot.rows):
            ids[b, : lengths[i]] = rows[i].ids
        yield [rows[i] for i in slot.rows], mx.array(ids)


class Standin(nn.Module):
    """Stands in for a layer, with a weight that is made when it is used and gone after: no second model is held.

    Args:
        base: the layer, quantised or not, whose bias and kind it has.
        weight: makes the weight, dense.
    """

    def __init__(self, base: nn.Module, weight: Callable[[], mx.array]) -> None:
        super().__init__()
        self._now = lambda: plain(base, weight())
        self._base = lambda: base
        if "bias" in base:
            self["bias"] = base["bias"]  # past setattr, which would look it up in the base

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        return self._now()(*args, **options)

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the output layer."""
        return self._now().as_linear(x)

    def __getattr__(self, key: str) -> Any:
        if key == "weight":
            return self._now().weight
        if key in self:
            return self[key]
        return getattr(self._base(), key)


@contextmanager
def standing_in(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block, these modules stand where the model has others of these names."""
    modules = dict(model.named_modules())
    before = [(path, modules[path]) for path in layers]
    model.update_modules(tree_unflatten(list(layers.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(before))


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside the block, quantised layers compute with their weights unpacked.

    The same function; so all forms of a model are measured with the same arithmetic, and on a CPU it is 10 times as
    quick as packed products.
    """
    packed = {path: m for path, m in model.named_modules() if isinstance(m, QUANTIZED)}
    with standing_in(model, {path: Standin(m, partial(dense_weight, m)) for path, m in packed.items()}):
        yield
