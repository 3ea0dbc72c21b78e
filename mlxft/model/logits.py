"""Body and head apart, so that logits exist only where they are needed.

Any mlx-lm model whose `__call__` runs a body once and turns its output into logits is separable: the head is the
model's own `__call__` with the body replaced by one that returns given hidden states. Tied embeddings, soft-capping
and logit scaling come along by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

CHUNK = 128  # trained positions whose logits exist at one time


class _Given:
    """Stands in for the body: returns hidden states that are known, is the body in all else."""

    def __init__(self, body: nn.Module, hidden: mx.array) -> None:
        self._body, self._hidden = body, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class Split:
    """The body and the head of a model.

    Args:
        model: any mlx-lm model, with or without adapters.
    Attributes:
        separable: whether logits can be computed for chosen positions only; otherwise `rows_nll` computes them all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._owner, self._name = self._find_body(model)
        self.separable = self._owner is not None and self._agrees()

    @staticmethod
    def _find_body(model: nn.Module) -> tuple[nn.Module | None, str]:
        """The deepest chain of `model` / `language_model` / ... that still holds the blocks."""
        owner, name = None, ""
        at = model
        while True:
            for key in ("model", "language_model", "transformer", "backbone"):
                child = at.get(key)
                if isinstance(child, nn.Module) and (hasattr(child, "layers") or hasattr(child, "h")):
                    owner, name, at = at, key, child
                    break
            else:
                return owner, name

    def _agrees(self) -> bool:
        """Whether body and head together are the model, tried on a few tokens."""
        ids = mx.array([[1, 0, 2]])
        training = self.model.training
        self.model.eval()
        try:
            whole = self.model(ids)
            hidden = self.hidden(ids)
            if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
                return False
            apart = self.logits(hidden.reshape(-1, hidden.shape[-1]))
            return bool(mx.allclose(whole.reshape(apart.shape), apart, rtol=1e-3, atol=1e-3).item())
        except (TypeError, ValueError, AttributeError, IndexError):
            return False
        finally:
            self.model.train(training)

    def hidden(self, ids: mx.array) -> mx.array:
        """(B, T) ids -> (B, T, D), what the head takes."""
        assert self._owner is not None
        return self._owner[self._name](ids)

    def logits(self, hidden: mx.array) -> mx.array:
        """(N, D) hidden states -> (N, V) logits."""
        owner, name = self._owner, self._name
        assert owner is not None
        body = owner[name]
        dict.__setitem__(owner, name, _Given(body, hidden[:, None]))
        try:
            out = self.model(mx.zeros((hidden.shape[0], 1), dtype=mx.int32))
        finally:
            dict.__setitem__(owner, name, body)
        return out[:, 0]

    def head_is_trained(self) -> bool:
        """Whether a parameter that the head reads is trainable (a tied, trained embedding counts)."""
        trained = [n for n, _ in tree_flatten(self.model.trainable_parameters())]
        return any(part in n for n in trained for part in ("lm_head", "embed", "wte", "output", "score"))


def _nll(logits: mx.array, labels: mx.array, weights: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return ((mx.logsumexp(logits, axis=-1) - picked) * weights).sum()


def rows_nll(
    split: Split, ids: mx.array, positions: mx.array, labels: mx.array, weights: mx.array, *, grad: bool
) -> mx.array:
    """Sum of negative log-likelihoods at chosen positions, float32 scalar, in nats.

    Args:
        ids: (B, T) tokens, padded on the right.
        positions: (N,) flat indices into B x T of the positions that predict.
        labels: (N,) tokens that they predict.
        weights: (N,) float32; 0 for entries that only fill the array.
        grad: whether a gradient will be asked for.
    """
    if not split.separable:
        logits = split.model(ids)
        return _nll(logits.reshape(-1, logits.shape[-1])[positions], labels, weights)
    hidden = split.hidden(ids)
    hidden = hidden.reshape(-1, hidden.shape[-1])[positions]

    def chunk_loss(h: mx.array, y: mx.array, w: mx.array) -> mx.array:
        return _nll(split.logits(h), y, w)

    chunk: Callable[..., mx.array] = chunk_loss
    if grad:
        chunk = mx.checkpoint(chunk_loss) if split.head_is_trained() else _with_known_gradient(chunk_loss)
    total = mx.array(0.0)
    for start in range(0, hidden.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        total = total + chunk(hidden[part], labels[part], weights[part])
    return total


def _with_known_gradient(f: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`f(h, ...)` whose gradient in h is computed along with the value and kept, (N, D), in place of the (N, V) logits.

    For a frozen head only: parameters that f closes over get no gradient.
    """
    value_and_grad = mx.value_and_grad(f)

    def g(h: mx.array, *rest: mx.array) -> mx.array:
        still = mx.stop_gradient(h)
        value, slope = value_and_grad(still, *rest)
        # h - still is zero: this adds the gradient and leaves the value.
        return mx.stop_gradient(value) + (mx.stop_gradient(slope) * (h - still)).sum()

    return g
