"""Body and head apart, so that logits exist only where they are needed.

Any mlx-lm model whose `__call__` runs a body once and turns its output into logits is separable: the head is the
model's own `__call__` with the body replaced by one that returns given hidden states. Tied embeddings, soft-capping
and logit scaling come along by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.device import planned_backend
from mlxft.model.cpu import cross_entropy, exp, on_cpu
from mlxft.model.pack import Packing
from mlxft.model.random import again, position, probing, repeatable

# Trained positions whose logits exist at one time: most of them, and bytes of their logits in float32. Each chunk reads
# the whole head; a GPU computes a product of a thousand rows in not much more time than that takes.
CHUNK, GPU_CHUNK = (256, 32 << 20), (1024, 256 << 20)


class _Given:
    """Stands in for the body: returns hidden states that are known, is the body in all else."""

    def __init__(self, body: nn.Module, hidden: mx.array) -> None:
        self._body, self._hidden = body, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class _Watched:
    """Stands in for the body: runs it as the model calls it, and keeps what it returns."""

    def __init__(self, body: nn.Module) -> None:
        self._body = body
        self.returned: list[mx.array] = []

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        self.returned.append(self._body(*args, **kwargs))
        return self.returned[-1]

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
        repeatable(model)  # the head is computed twice for a gradient
        self._width, self._dtype = 0, mx.float32  # of hidden states
        self.vocabulary = 0
        self._read: dict[frozenset[str], tuple[str, ...]] = {}
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
        ids = mx.array([[1, 0, 1]])
        try:
            with probing(self.model):
                whole, hidden = self._watched(ids)
                if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
                    return False
                # A body that gives the logits themselves has its head inside: there is nothing to take apart.
                if hidden.shape == whole.shape and mx.array_equal(hidden, whole).item():
                    return False
                self._width, self._dtype = hidden.shape[-1], hidden.dtype
                self.vocabulary = whole.shape[-1]
                apart = self.logits(hidden.reshape(-1, hidden.shape[-1]))
                return bool(mx.allclose(whole.reshape(apart.shape), apart, rtol=1e-3, atol=1e-3).item())
        except (TypeError, ValueError, AttributeError, IndexError):
            return False

    @cached_property
    def packing(self) -> Packing:
        """How the model takes packed rows; ModelError if it can not."""
        return Packing(self.model)

    def call(self, ids: mx.array, segments: mx.array | None = None, caches: Sequence[Any] | None = None) -> mx.array:
        """(B, T) ids -> (B, T, V), by the model itself.

        Args:
            segments: (B, T) numbers of the rows of packed sequences.
            caches: of its layers, in place of segments.
        """
        if segments is not None:
            caches = self.packing.caches(segments)
        return self.model(ids) if caches is None else self.model(ids, cache=caches)

    def hidden(self, ids: mx.array, segments: mx.array | None = None, caches: Sequence[Any] | None = None) -> mx.array:
        """(B, T) ids -> (B, T, D), what the head takes. The others: see `call`."""
        if segments is not None:
            _ = self.packing  # it tries the model, and so before the body is replaced
        # The logits that this makes are never evaluated: MLX computes only what is asked for.
        return self._watched(ids, segments, caches)[1]

    def _watched(
        self, ids: mx.array, segments: mx.array | None = None, caches: Sequence[Any] | None = None
    ) -> tuple[mx.array, mx.array]:
        """What the model gives, and what its body gave on the way."""
        watched = _Watched(self.body)
        with self._in_place(watched):
            whole = self.call(ids, segments, caches)
        (hidden,) = watched.returned
        return whole, hidden

    def logits(self, hidden: mx.array, parameters: Mapping[str, mx.array] | None = None) -> mx.array:
        """(N, D) hidden states -> (N, V) logits; `parameters`, by full name, stand in for the model's own."""
        own = self._values(parameters or ())
        self.model.update(tree_unflatten(list((parameters or {}).items())))
        try:
            with self._in_place(_Given(self.body, hidden[:, None])):
                out = self.model(mx.zeros((hidden.shape[0], 1), dtype=mx.int32))
        finally:
            self.model.update(tree_unflatten(list(own.items())))
        return out[:, 0]

    @property
    def body(self) -> nn.Module:
        """What gives the hidden states; there is one where the model is separable."""
        assert self._owner is not None
        return self._owner[self._name]

    @contextmanager
    def _in_place(self, other: Any) -> Iterator[None]:
        """`other` stands where the body is, which comes back at the end."""
        owner: Any = self._owner
        body = self.body
        # Past nn.Module's own setter, which would count `other` in or the body out of its parameters.
        dict.__setitem__(owner, self._name, other)
        try:
            yield
        finally:
            dict.__setitem__(owner, self._name, body)

    def trained_head(self) -> dict[str, mx.array]:
        """Full name -> value of the trainable parameters that the head reads; a tied embedding is one of them."""
        trained = frozenset(n for n, _ in tree_flatten(self.model.trainable_parameters()))
        if trained not in self._read:
            with probing(self.model):
                self._read[trained] = tuple(self._readers(sorted(trained)))
        return self._values(self._read[trained])

    def _values(self, names: Iterable[str]) -> dict[str, mx.array]:
        wanted = set(names)
        return {n: v for n, v in tree_flatten(self.model.parameters()) if n in wanted} if wanted else {}

    def _readers(self, names: list[str]) -> list[str]:
        """Those of `names` that the head's output depends on.

        A parameter of NaNs makes the output NaN exactly if it is read, whatever the values (an adapter's are zero at
        first). Halving finds the few that are without trying each.
        """
        poison = {n: mx.broadcast_to(mx.array(math.nan, v.dtype), v.shape) for n, v in self._values(names).items()}
        if not poison or mx.isfinite(self.logits(mx.ones((1, self._width), self._dtype), poison)).all().item():
            return []
        if len(names) == 1:
            return names
        middle = len(names) // 2
        return self._readers(names[:middle]) + self._readers(names[middle:])


def _nll(logits: mx.array, labels: mx.array, weights: mx.array) -> mx.array:
    return (cross_entropy(logits, labels) * weights).sum()


def _nll_slopes(
    split: Split, hidden: mx.array, parameters: dict[str, mx.array], labels: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    """`_nll` of (n, D) hidden states with its gradient in them and in the head's parameters.

    On a CPU by hand from the logits' own gradient, weights x (softmax - onehot): one exponential of each logit serves
    value and gradient, where automatic differentiation would take two.
    """
    names = list(parameters)
    if not on_cpu():

        def loss(h: mx.array, values: list[mx.array]) -> mx.array:
            return _nll(split.logits(h, dict(zip(names, values))), labels, weights)

        value, (slope, more) = mx.value_and_grad(loss, argnums=(0, 1))(hidden, list(parameters.values()))
        return value, slope, dict(zip(names, more))

    def head(h: mx.array, *values: mx.array) -> mx.array:
        return split.logits(h, dict(zip(names, values))).astype(mx.float32)

    drawn = position()
    logits = head(hidden, *parameters.values())
    largest = logits.max(axis=-1, keepdims=True)
    powers = exp(logits - largest)
    sums = powers.sum(axis=-1, keepdims=True)
    picked = mx.take_along_axis(logits, labels[:, None], axis=-1)
    value = ((mx.log(sums) + largest - picked)[:, 0] * weights).sum()
    slopes = mx.put_along_axis(powers / sums, labels[:, None], exp(picked - largest) / sums - 1.0, axis=-1)
    with again(drawn):
        _, (slope, *more) = mx.vjp(head, [hidden, *parameters.values()], [slopes * weights[:, None]])
    return value, slope, dict(zip(names, more))


def rows_nll(
    split: Split,
    ids: mx.array,
    positions: mx.array,
    labels: mx.array,
    weights: mx.array,
    *,
    grad: bool,
    segments: mx.array | None = None,
) -> mx.array:
    """Sum of negative log-likelihoods at chosen positions, float32 scalar, in nats.

    Args:
        ids: (B, T) tokens, padded on the right.
        positions: (N,) flat indices into B x T of the positions that predict.
        labels: (N,) tokens that they predict.
        weights: (N,) float32; 0 for entries that only fill the array.
        grad: whether a gradient will be asked for.
        segments: (B, T) int32, which row of its sequence a token belongs to, from 1; 0 for padding. None: one row each.
    Raises:
        ModelError: there are segments, and the model can not keep the rows of a sequence apart.
    """
    if not split.separable:
        logits = split.call(ids, segments)
        return _nll(logits.reshape(-1, logits.shape[-1])[positions], labels, weights)
    hidden = split.hidden(ids, segments)
    hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
    return hidden_nll(split, hidden, labels, weights, grad=grad)


def hidden_nll(split: Split, hidden: mx.array, labels: mx.array, weights: mx.array, *, grad: bool) -> mx.array:
    """The loss of (N, D) hidden states, chunk by chunk, with its gradient computed on the way and kept.

    What is kept is (N, D), and the shapes of the head's own trained parameters: the (N, V) logits never exist, neither
    forward nor backward, and no chunk is computed twice.
    """
    still = mx.stop_gradient
    head = split.trained_head() if grad else {}
    frozen = {n: still(v) for n, v in head.items()}
    total, done = mx.array(0.0), list[mx.array]()
    slopes: list[mx.array] = []
    head_slopes: dict[str, mx.array] = {}
    size = chunk_size(split.vocabulary)
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        h, y, w = still(hidden[part]), labels[part], weights[part]
        if done:  # one chunk after the other: MLX would else begin with all of them
            (h,) = mx.depends([h], done)

        if not grad:
            value = _nll(split.logits(h, frozen), y, w)
            total, done = total + value, [value]
            continue
        value, slope, more = _nll_slopes(split, h, frozen, y, w)
        # In float32, as the loop adds up micro-batches.
        head_slopes = {n: head_slopes[n].astype(mx.float32) + g if n in head_slopes else g for n, g in more.items()}
        slopes.append(slope)
        total, done = total + value, [value, slope, *head_slopes.values()]
    if not grad:
        return total
    # v - still(v) is zero: these terms leave the value and bring the gradient.
    total = still(total) + (still(mx.concatenate(slopes)) * (hidden - still(hidden))).sum()
    for name, value in head.items():
        total = total + (still(head_slopes[name]).astype(value.dtype) * (value - frozen[name])).sum()
    return total


def chunk_size(vocabulary: int) -> int:
    """Positions whose logits exist at one time on this device, or on the one that is planned for."""
    most, size = CHUNK if planned_backend() == "cpu" else GPU_CHUNK
    return max(32, min(most, size // (4 * vocabulary) // 32 * 32))
