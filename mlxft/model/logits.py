"""Compute losses and log-probabilities from hidden states, in chunks: the logits of all positions never exist."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.device import planned_backend
from mlxft.errors import ConfigError, ModelError
from mlxft.model.cpu import cross_entropy, exp, logsumexp, on_cpu
from mlxft.model.layers import again, intercepted, position, probing, repeatable
from mlxft.model.shard import sharding_of

# --- pack -------------------------------------------------------------------------------------------------------------
# Several rows in one sequence, each seeing only itself: attention with a block-diagonal mask.
#
# mlx-lm's models ask their cache for the mask (`create_attention_mask`), the offset of positions, and keys and values.
# So a cache that keeps nothing and returns our mask is enough, and the model stays as it is. Rotary positions are
# relative, so a row may begin anywhere; whether an architecture keeps rows apart is tried on a few tokens.

ATTENTION = ("KVCache", "RotatingKVCache")  # caches of keys and values only, which a mask can hide
# Lengths of the rows of each sequence of the trial; the second sequence is padded.
_TRIAL = ((7, 5), (4, 3, 3))


class PackCache:
    """A substitute for a layer's KV cache that keeps nothing and hides the rows of a sequence from each other.

    Args:
        segments: (B, T) integers; a token sees itself and earlier tokens with its own number.
        axes: number of head axes in the model's scores, between B and T x T: 2 where the model groups query heads.
        offset: position of the first token.
    """

    def __init__(self, segments: mx.array, axes: int = 1, offset: int = 0) -> None:
        self.offset = offset
        at = mx.arange(segments.shape[1])
        self._distance = at[:, None] - at
        mask = (segments[:, :, None] == segments[:, None, :]) & (self._distance >= 0)
        self._mask = mx.expand_dims(mask, tuple(range(1, 1 + axes)))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return (B, 1, T, T) bool, true where a query (axis -2) sees a key."""
        assert self._mask.shape[-1] == N, f"{N} tokens, segments for {self._mask.shape[-1]}"
        return self._mask if window_size is None else self._mask & (self._distance < window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the sequence's own keys and values, because nothing came before."""
        return keys, values


def _model_type(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))


def refuse_states(model: nn.Module) -> int:
    """Return the number of layers; refuse a model whose layers keep more than keys and values. Needs no weights."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    others = sorted({type(c).__name__ for c in caches} - set(ATTENTION))
    if others:
        raise ModelError(
            f"batch.pack: {_model_type(model)} carries more than keys and values from token to token "
            f"({', '.join(others)}), which no mask can hide: a row would see the rows before it; remove batch.pack"
        )
    return len(caches)


class Packing:
    """A model's way of reading packed rows, found by a trial.

    Args:
        model: any mlx-lm model, with or without adapters.
        width: number of positions of training; if given, the trial also reads the last of them.
        weights: whether the model has weights; otherwise only shapes are tried.
    """

    def __init__(self, model: nn.Module, width: int = 0, weights: bool = True) -> None:
        self._count = refuse_states(model)
        reasons = []
        with probing(model):
            for axes in (1, 2):
                try:
                    reasons.append(self._trial(model, axes, width, weights))
                except Exception as e:  # a model's own code may raise anything here
                    cause = f"{type(e).__name__}: {(str(e).strip().splitlines() or ['no reason given'])[0]}"
                    reasons.append(f"its own code fails with a mask in place of its layers' caches ({cause})")
        if all(reasons):
            raise ModelError(
                f"batch.pack: {_model_type(model)} does not keep packed rows apart: {reasons[0]}; remove batch.pack"
            )
        self._axes = 1 + reasons.index("")

    def caches(self, segments: mx.array) -> list[Any]:
        """Return the model's `cache` for rows numbered by `segments` (B, T); 0 is padding."""
        return [PackCache(segments, self._axes)] * self._count

    def _trial(self, model: nn.Module, axes: int, width: int, weights: bool) -> str:
        """Return how packed logits differ from those of each row alone; empty: they agree, or have no values."""
        length = max(sum(lengths) for lengths in _TRIAL)
        ids = np.random.default_rng(0).integers(0, 8, (len(_TRIAL), length)).astype(np.int32)
        segments = np.zeros_like(ids)
        where: list[tuple[int, slice]] = []
        for b, lengths in enumerate(_TRIAL):
            for i, n in enumerate(lengths):
                part = slice(sum(lengths[:i]), sum(lengths[:i]) + n)
                segments[b, part] = i + 1
                where.append((b, part))
        if not weights:
            model(mx.array(ids), cache=[PackCache(mx.array(segments), axes)] * self._count)
            return ""
        alone = [model(mx.array(ids[b : b + 1, part]))[0].astype(mx.float32) for b, part in where]
        # The second time at the far end, to find positions that scale attention or are limited.
        for offset in (0, width - length) if width > length else (0,):
            caches = [PackCache(mx.array(segments), axes, offset)] * self._count
            packed = model(mx.array(ids), cache=caches)
            pairs = [(packed[b, part].astype(mx.float32), one) for one, (b, part) in zip(alone, where)]
            norm = partial(mx.linalg.norm, axis=-1)
            wrong = max(float((norm(a - b) / norm(b)).mean()) for a, b in pairs)
            # Noise of half precision is some 1e-2; rotations by a large angle are exact to 1e-3 in float32.
            bound = 5e-2 if packed.dtype != mx.float32 else 1e-2 if offset else 1e-3
            if not wrong <= bound:
                return f"logits of a packed row differ by {wrong:.1%} from those of the row alone"
        return ""


# --- logits -----------------------------------------------------------------------------------------------------------
# The body and the head of a model, separated so that logits exist only where they are needed.
#
# Any mlx-lm model whose `__call__` runs a body once and turns its output into logits is separable: the head is the
# model's own `__call__` with the body replaced by one that returns given hidden states. Tied embeddings, soft-capping
# and logit scaling are thus included.

# Limits of the trained positions whose logits exist at one time: their number, and bytes of their logits in float32.
# Each chunk reads the whole head; a GPU needs little more time for a product of a thousand rows.
CHUNK, GPU_CHUNK = (256, 32 << 20), (1024, 256 << 20)
_LEAST_CHUNK = 32


class _Returned(Exception):
    """Carries what a body has returned out of its model."""

    def __init__(self, hidden: mx.array) -> None:
        super().__init__()
        self.hidden = hidden


class Split:
    """The body and the head of any mlx-lm model, with or without adapters.

    Attributes:
        separable: whether logits can be computed at selected positions only; otherwise `rows_nll` computes them all.
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
        """Return owner and name of the deepest `model` / `language_model` / ... that still holds the blocks."""
        owner, name, at = None, "", model
        while True:
            for key in ("model", "language_model", "transformer", "backbone"):
                child = at.get(key)
                if isinstance(child, nn.Module) and (hasattr(child, "layers") or hasattr(child, "h")):
                    owner, name, at = at, key, child
                    break
            else:
                return owner, name

    def _agrees(self) -> bool:
        """Return whether body and head together are the model, tried on a few tokens."""
        ids = mx.array([[1, 0, 1]])
        try:
            with probing(self.model):
                whole, hidden = self._watched(ids)
                if hidden is whole or hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
                    return False
                self._width, self._dtype, self.vocabulary = hidden.shape[-1], hidden.dtype, whole.shape[-1]
                return self._is_exact(whole, hidden)
        except (TypeError, ValueError, AttributeError, IndexError):
            return False

    def _is_exact(self, whole: mx.array, hidden: mx.array) -> bool:
        # A body that returns the logits has its head inside.
        if hidden.shape == whole.shape and mx.array_equal(hidden, whole).item():
            return False
        apart = self.logits(hidden.reshape(-1, hidden.shape[-1]))
        return bool(mx.allclose(whole.reshape(apart.shape), apart, rtol=1e-3, atol=1e-3).item())

    @cached_property
    def packing(self) -> Packing:
        """The model's way of reading packed rows; raises ModelError if there is none."""
        return Packing(self.model)

    def call(self, ids: mx.array, segments: mx.array | None = None, caches: Sequence[Any] | None = None) -> mx.array:
        """Compute (B, T) ids -> (B, T, V); `segments` (B, T) numbers packed rows, or `caches` are the layers'."""
        if segments is not None:
            caches = self.packing.caches(segments)
        return self.model(ids) if caches is None else self.model(ids, cache=caches)

    def hidden(self, ids: mx.array, segments: mx.array | None = None, caches: Sequence[Any] | None = None) -> mx.array:
        """Compute (B, T) ids -> (B, T, D), the head's input; arguments as for `call`."""
        if segments is not None:
            _ = self.packing  # tries the model, so it must come before the body is replaced
        if sharding_of(self.model) is None:
            return self._watched(ids, segments, caches)[1]  # the logits made there are never evaluated
        assert self._owner is not None
        body = self.body

        def watched(*args: Any, **kwargs: Any) -> mx.array:
            raise _Returned(body(*args, **kwargs))

        # The model is left before its head, which would be gathered for nothing.
        with intercepted(self._owner, self._name, watched):
            try:
                self.call(ids, segments, caches)
            except _Returned as returned:
                return returned.hidden
        raise AssertionError("the model does not call its body")

    def _watched(
        self, ids: mx.array, segments: mx.array | None = None, caches: Sequence[Any] | None = None
    ) -> tuple[mx.array, mx.array]:
        """Return what the model returns, and what its body returned on the way."""
        assert self._owner is not None
        body, returned = self.body, list[mx.array]()

        def watched(*args: Any, **kwargs: Any) -> mx.array:
            returned.append(body(*args, **kwargs))
            return returned[-1]

        with intercepted(self._owner, self._name, watched):
            whole = self.call(ids, segments, caches)
        (hidden,) = returned
        return whole, hidden

    def logits(self, hidden: mx.array, parameters: Mapping[str, mx.array] | None = None) -> mx.array:
        """Compute (N, D) hidden states -> (N, V) logits; `parameters`, by full name, replace the model's own."""
        assert self._owner is not None
        own = self._values(parameters or ())
        self.model.update(tree_unflatten(list((parameters or {}).items())))
        try:
            with intercepted(self._owner, self._name, lambda *args, **kwargs: hidden[:, None]):
                out = self.model(mx.zeros((hidden.shape[0], 1), dtype=mx.int32))
        finally:
            self.model.update(tree_unflatten(list(own.items())))
        return out[:, 0]

    @property
    def body(self) -> nn.Module:
        """The module that computes the hidden states of a separable model."""
        assert self._owner is not None
        return self._owner[self._name]

    def trained_head(self) -> dict[str, mx.array]:
        """Return the trainable parameters that the head reads, by full name; a tied embedding is one of them."""
        trained = frozenset(n for n, _ in tree_flatten(self.model.trainable_parameters()))
        if trained not in self._read:
            with probing(self.model):
                self._read[trained] = tuple(self._readers(sorted(trained)))
        return self._values(self._read[trained])

    def _values(self, names: Iterable[str]) -> dict[str, mx.array]:
        wanted = set(names)
        return {n: v for n, v in tree_flatten(self.model.parameters()) if n in wanted} if wanted else {}

    def _readers(self, names: list[str]) -> list[str]:
        """Return those of `names` that the head's output depends on.

        A parameter of NaNs makes the output NaN exactly if it is read, whatever its values are (an adapter's begin at
        zero). Bisection finds the few that are read.
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
    """Compute `_nll` of (n, D) hidden states, and its gradient in them and in the head's parameters.

    On a CPU the logits' gradient, weights x (softmax - onehot), is written by hand: value and gradient then need one
    exponential per logit, where automatic differentiation takes two.
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
    """Return the sum of negative log-likelihoods at selected positions, float32 scalar, in nats.

    Args:
        ids, positions, labels, grad: as for `rows_logprobs`.
        weights: (N,) float32; 0 for entries that only fill the array.
        segments: (B, T) int32, the number of the packed row that a token belongs to, from 1; 0 for padding.
    """
    if split.separable:
        return hidden_nll(split, _flat(split.hidden(ids, segments))[positions], labels, weights, grad=grad)
    return _nll(_flat(split.call(ids, segments))[positions], labels, weights)


def _flat(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def hidden_nll(split: Split, hidden: mx.array, labels: mx.array, weights: mx.array, *, grad: bool) -> mx.array:
    """Compute the loss of (N, D) hidden states chunk by chunk, and its gradient at the same time, which is kept.

    The kept gradients are (N, D), and of the shapes of the head's trained parameters: the (N, V) logits never exist,
    and no chunk is computed twice.
    """
    still = mx.stop_gradient
    head = split.trained_head() if grad else {}
    frozen = {n: still(v) for n, v in head.items()}
    total, done = mx.array(0.0), list[mx.array]()
    slopes: list[mx.array] = []
    head_slopes: dict[str, mx.array] = {}
    for part in _parts(split, hidden.shape[0]):
        h, y, w = still(hidden[part]), labels[part], weights[part]
        if done:  # one chunk at a time; otherwise MLX would begin with all of them
            (h,) = mx.depends([h], done)
        if not grad:
            value = _nll(split.logits(h, frozen), y, w)
            total, done = total + value, [value]
            continue
        value, slope, more = _nll_slopes(split, h, frozen, y, w)
        # In float32, as the loop sums micro-batches.
        head_slopes = {n: head_slopes[n].astype(mx.float32) + g if n in head_slopes else g for n, g in more.items()}
        slopes.append(slope)
        total, done = total + value, [value, slope, *head_slopes.values()]
    if not grad:
        return total
    # v - still(v) is zero: these terms keep the value and add the gradient.
    total = still(total) + (still(mx.concatenate(slopes)) * (hidden - still(hidden))).sum()
    for name, value in head.items():
        total = total + (still(head_slopes[name]).astype(value.dtype) * (value - frozen[name])).sum()
    return total


def chunk_size(vocabulary: int) -> int:
    """Return the number of positions whose logits exist at one time, on the device that is planned for."""
    most, size = CHUNK if planned_backend() == "cpu" else GPU_CHUNK
    return max(_LEAST_CHUNK, min(most, size // (4 * vocabulary) // 32 * 32))


# --- logprobs ---------------------------------------------------------------------------------------------------------

Parameters = dict[str, mx.array]
# (n, V) logits, and what belongs to each of them, such as (n,) labels -> (n,) numbers or (n, 2)
Read = Callable[[mx.array, mx.array], mx.array]

_OUT = -1e30  # a logit of probability 0
_K = TypeVar("_K")
A = TypeVar("A")
V = TypeVar("V")


def ahead(batches: Iterable[tuple[_K, A]], read: Callable[[A], V]) -> Iterator[tuple[_K, V]]:
    """Yield `read` of each batch; the next one is requested before one is yielded, so the device computes meanwhile."""
    before: list[tuple[_K, V]] = []
    for key, arrays in batches:
        before.append((key, read(arrays)))
        mx.async_eval(before[-1][1])
        if len(before) > 1:
            yield before.pop(0)
    yield from before


def _tempered(logits: mx.array, temperature: float) -> mx.array:
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; expected a number above 0")
    return logits if temperature == 1.0 else logits.astype(mx.float32) / temperature


def token_logprobs(logits: mx.array, ids: mx.array, temperature: float = 1.0) -> mx.array:
    """Return the log-probability of each token, log softmax(logits / temperature)[ids], (B, T) float32, in nats.

    Args:
        logits: (B, T, V) of any float type, position t predicting ids[:, t]; or (N, V).
        ids: (B, T) integers in 0..V-1, at pads too; or (N,).
        temperature: the sampling temperature, or PPO's ratio compares other distributions; ConfigError unless above 0.
    """
    if tuple(logits.shape[:-1]) != tuple(ids.shape):
        raise AssertionError(f"logits {tuple(logits.shape)} and ids {tuple(ids.shape)}; expected (B, T, V) and (B, T)")
    flat = _tempered(logits, temperature).reshape(-1, logits.shape[-1])
    return -cross_entropy(flat, ids.reshape(-1)).reshape(ids.shape)


def entropy(logits: mx.array, temperature: float = 1.0) -> mx.array:
    """Return the entropy of softmax(z), z = logits / temperature: logsumexp(z) - sum p z, (B, T) in nats, 0 to log V.

    logits: (B, T, V) or (N, V); -inf marks a token that is never sampled. ConfigError unless temperature is above 0.
    """
    # -inf would give 0 * -inf; a low finite floor has probability 0, too.
    scaled = mx.maximum(_tempered(logits, temperature).astype(mx.float32), _OUT)
    total = logsumexp(scaled)
    return total - (exp(scaled - total[..., None]) * scaled).sum(axis=-1)


def log_softmax(logits: mx.array, temperature: float = 1.0) -> mx.array:
    """Return log softmax(logits / temperature) over the last axis, float32; -inf marks a token never sampled."""
    scaled = mx.maximum(_tempered(logits, temperature).astype(mx.float32), _OUT)
    return scaled - logsumexp(scaled)[..., None]


def log_shares(logits: mx.array, ids: mx.array, temperature: float = 1.0) -> mx.array:
    """Return (N, K + 1) log-probabilities by softmax(logits / temperature): of K tokens, and of all others together.

    The last one is summed over the other tokens, not 1 minus the K, which would lose its digits.

    Args:
        logits: (N, V). ids: (N, K), the tokens, each once.
    """
    scaled = _tempered(logits, temperature).astype(mx.float32)
    others = logsumexp(mx.put_along_axis(scaled, ids, mx.array(_OUT), axis=-1))
    shares = mx.concatenate([mx.take_along_axis(scaled, ids, axis=-1), others[:, None]], axis=-1)
    return shares - logsumexp(scaled)[:, None]


def divergence(logprobs: mx.array, teacher_logprobs: mx.array, beta: float) -> mx.array:
    """Return the divergence of a student from its teacher at each position, (N,) float32, in nats.

    0 is forward KL(teacher || student), 1 is reverse KL(student || teacher). Between them it is the generalised
    Jensen-Shannon divergence (Agarwal et al. 2024, eq. 1): beta KL(teacher || m) + (1 - beta) KL(student || m) with
    m = beta teacher + (1 - beta) student. Divided by beta it goes to forward KL as beta goes to 0, and divided by
    1 - beta to reverse KL as beta goes to 1.

    Args:
        logprobs: (N, K); the gradient flows here only. teacher_logprobs: (N, K).
    """
    assert logprobs.shape == teacher_logprobs.shape, f"{logprobs.shape} and {teacher_logprobs.shape}"
    mine, theirs = logprobs.astype(mx.float32), mx.stop_gradient(teacher_logprobs.astype(mx.float32))
    fixed = mx.stop_gradient(mine)
    # mine - fixed is zero: the term keeps the value and adds the gradient.
    slope = _divergence_slope(fixed, theirs, beta)
    return _divergence(fixed, theirs, beta) + (slope * (mine - fixed)).sum(axis=-1)


def _mixed(mine: mx.array, theirs: mx.array, beta: float) -> mx.array:
    return mx.logaddexp(theirs + math.log(beta), mine + math.log1p(-beta))


def _divergence(mine: mx.array, theirs: mx.array, beta: float) -> mx.array:
    if beta == 0:
        return (exp(theirs) * (theirs - mine)).sum(axis=-1)
    if beta == 1:
        return (exp(mine) * (mine - theirs)).sum(axis=-1)
    mixed = _mixed(mine, theirs, beta)
    return (beta * exp(theirs) * (theirs - mixed) + (1 - beta) * exp(mine) * (mine - mixed)).sum(axis=-1)


def _divergence_slope(mine: mx.array, theirs: mx.array, beta: float) -> mx.array:
    """Return the derivative of `_divergence` in each log-probability by hand: fewer arrays of a whole vocabulary.

    The derivatives through the mixture cancel.
    """
    if beta == 0:
        return -exp(theirs)
    if beta == 1:
        return exp(mine) * (mine - theirs + 1)
    return (1 - beta) * exp(mine) * (mine - _mixed(mine, theirs, beta))


class Draw(NamedTuple):
    """The distribution that tokens were sampled from: softmax(logits / temperature) of all tokens but `without`."""

    temperature: float = 1.0
    without: int | None = None


_PLAIN = Draw()


def _drawn(draw: Draw, logits: mx.array) -> mx.array:
    """Return the logits of the distribution that was sampled from."""
    if draw == _PLAIN:
        return logits
    logits = _tempered(logits.astype(mx.float32), draw.temperature)
    return logits if draw.without is None else mx.where(mx.arange(logits.shape[-1]) == draw.without, _OUT, logits)


def _at(draw: Draw, read: Read) -> Read:
    """Return `read` of the distribution that was sampled from."""
    return lambda logits, labels: read(_drawn(draw, logits), labels)


def rows_logprobs(
    split: Split, ids: mx.array, positions: mx.array, labels: mx.array, *, grad: bool, draw: Draw = _PLAIN
) -> mx.array:
    """Return the log-probability of each label at its position, (N,) float32, in nats.

    Args:
        ids: (B, T) tokens, padded on the right.
        positions: (N,) flat indices into B x T of the positions that predict.
        labels: (N,) tokens that they predict.
        grad: whether a gradient will be taken.
        draw: the distribution that the labels were sampled from.
    """
    return read_positions(split, ids, positions, labels, _at(draw, token_logprobs), grad)


def rows_hidden(split: Split, ids: mx.array, positions: mx.array) -> mx.array:
    """Return (N, D) hidden states at positions; arguments as for `rows_logprobs`."""
    return _flat(split.hidden(ids))[positions]


def hidden_logprobs(split: Split, hidden: mx.array, labels: mx.array, *, grad: bool, draw: Draw = _PLAIN) -> mx.array:
    """Return log-probabilities after (N, D) hidden states, in chunks: the logits of all of them never exist."""
    return _read(split, hidden, labels, _at(draw, token_logprobs), grad)


def hidden_entropy(split: Split, hidden: mx.array, *, grad: bool, draw: Draw = _PLAIN) -> mx.array:
    """Return the entropy of the next token after (N, D) hidden states, (N,) float32, in nats."""
    labels = mx.zeros(hidden.shape[0], dtype=mx.int32)
    return _read(split, hidden, labels, _at(draw, lambda logits, _: entropy(logits)), grad)


def hidden_kl(
    split: Split,
    hidden: mx.array,
    others: mx.array,
    other_logits: Callable[[mx.array], mx.array],
    *,
    grad: bool,
    draw: Draw = _PLAIN,
) -> mx.array:
    """Return KL(model || other) of the next token to another model after (N, D) hidden states, (N,) float32, in chunks.

    Args:
        others: (N, D) the other model's hidden states at the same positions, and `other_logits` its head.
    """

    def read(logits: mx.array, states: mx.array) -> mx.array:
        mine, theirs = (log_softmax(_drawn(draw, each)) for each in (logits, other_logits(states)))
        return divergence(mine, theirs, 1.0)

    return _read(split, hidden, others, read, grad)


def rows_logprobs_entropy(
    split: Split, ids: mx.array, positions: mx.array, labels: mx.array, *, draw: Draw = _PLAIN
) -> tuple[mx.array, mx.array]:
    """Return log-probabilities, bit for bit those of `rows_logprobs`, and entropies, both (N,), without a gradient."""
    found = read_positions(split, ids, positions, labels, _at(draw, _picked_entropy), False)
    return found[:, 0], found[:, 1]


def hidden_logprobs_entropy(
    split: Split, hidden: mx.array, labels: mx.array, *, draw: Draw = _PLAIN
) -> tuple[mx.array, mx.array]:
    """Return the same after (N, D) hidden states."""
    found = _read(split, hidden, labels, _at(draw, _picked_entropy), False)
    return found[:, 0], found[:, 1]


def _picked_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    return mx.stack([token_logprobs(logits, labels), entropy(logits)], axis=-1)


def hidden_logprobs_greedy(split: Split, hidden: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """Return log-probabilities after (N, D) hidden states, and whether each label is the likeliest token, both (N,)."""
    found = _read(split, hidden, labels, _picked_greedy, False)
    return found[:, 0], found[:, 1] > 0


def rows_logprobs_greedy(
    split: Split, ids: mx.array, positions: mx.array, labels: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the same of whole rows; arguments as for `rows_logprobs`."""
    found = read_positions(split, ids, positions, labels, _picked_greedy, False)
    return found[:, 0], found[:, 1] > 0


def _picked_greedy(logits: mx.array, labels: mx.array) -> mx.array:
    likeliest = mx.argmax(logits, axis=-1) == labels
    return mx.stack([token_logprobs(logits, labels), likeliest.astype(mx.float32)], axis=-1)


def read_positions(
    split: Split, ids: mx.array, positions: mx.array, labels: mx.array, read: Read, grad: bool, arrays: int = 1
) -> mx.array:
    """Return `read` of the logits at positions, in chunks: (N,) or (N, m) numbers; arguments as for `rows_logprobs`.

    Args:
        labels: (N, ...) what `read` needs beside the (n, V) logits of a chunk; it is given the same rows of it.
        arrays: how many times as many (n, V) arrays it holds as log-probabilities take; chunks are so much smaller.
    """
    if split.separable:
        return _read(split, rows_hidden(split, ids, positions), labels, read, grad, arrays)
    return read(_flat(split.model(ids))[positions], labels)


def _read(split: Split, hidden: mx.array, labels: mx.array, read: Read, grad: bool, arrays: int = 1) -> mx.array:
    parts = _parts(split, hidden.shape[0], arrays)
    if not grad:
        return _values(split, hidden, labels, {}, read, parts)
    head = split.trained_head()
    if head:
        return _recomputed(split, hidden, labels, head, read, parts)
    return _with_slopes(split, hidden, labels, read, parts)


def _parts(split: Split, count: int, arrays: int = 1) -> list[slice]:
    size = max(_LEAST_CHUNK, chunk_size(split.vocabulary) // arrays)
    return [slice(start, start + size) for start in range(0, count, size)]


def _values(
    split: Split, hidden: mx.array, labels: mx.array, head: Parameters, read: Read, parts: Sequence[slice]
) -> mx.array:
    done: list[mx.array] = []
    for part in parts:
        h = hidden[part]
        if done:  # one chunk at a time; otherwise MLX would begin with all of them
            (h,) = mx.depends([h], [done[-1]])
        done.append(read(split.logits(h, head), labels[part]))
    return mx.concatenate(done)


def _with_slopes(split: Split, hidden: mx.array, labels: mx.array, read: Read, parts: Sequence[slice]) -> mx.array:
    """Compute the numbers, and the gradient of each in its own hidden state, (N, D), which is kept.

    A row of logits depends on its own hidden state alone, so the gradient of the sum holds all of these gradients.
    """
    still = mx.stop_gradient
    values: list[mx.array] = []
    slopes: list[mx.array] = []
    for part in parts:
        h, y = still(hidden[part]), labels[part]
        if values:
            (h,) = mx.depends([h], [values[-1], slopes[-1]])

        def total(h: mx.array, y: mx.array = y) -> tuple[mx.array, mx.array]:
            value = read(split.logits(h), y)
            return value.sum(), value

        (_, value), slope = mx.value_and_grad(total)(h)
        values.append(value)
        slopes.append(slope)
    slope = still(mx.concatenate(slopes)).astype(mx.float32)
    # hidden - still(hidden) is zero: the term keeps the value and adds the gradient.
    return still(mx.concatenate(values)) + ((hidden - still(hidden)).astype(mx.float32) * slope).sum(axis=-1)


def _recomputed(
    split: Split, hidden: mx.array, labels: mx.array, head: Parameters, read: Read, parts: Sequence[slice]
) -> mx.array:
    """Compute the numbers, and their chunks again for the gradient: a trained head's depends on all cotangents."""
    names, drawn = list(head), position()

    def forward(hidden: mx.array, *parameters: mx.array) -> mx.array:
        return _values(split, hidden, labels, dict(zip(names, parameters)), read, parts)

    values: Any = mx.custom_function(forward)

    def back(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        hidden, *parameters = primals
        slopes: list[mx.array] = []
        sums: list[mx.array] = []
        with again(drawn):
            for part in parts:
                h, y, c = hidden[part], labels[part], cotangent[part]
                if slopes:
                    (h,) = mx.depends([h], [slopes[-1], *sums])

                def total(h: mx.array, parameters: list[mx.array], y: mx.array = y, c: mx.array = c) -> mx.array:
                    return (read(split.logits(h, dict(zip(names, parameters))), y) * c).sum()

                slope, more = mx.grad(total, argnums=(0, 1))(h, parameters)
                slopes.append(slope)
                # In float32, as the loop sums micro-batches.
                sums = [a.astype(mx.float32) + b for a, b in zip(sums, more)] if sums else more
        return (mx.concatenate(slopes), *(s.astype(p.dtype) for s, p in zip(sums, parameters)))

    values.vjp(back)
    out: mx.array = values(hidden, *head.values())
    return out


def row_sums(values: mx.array, owners: mx.array, rows: int) -> mx.array:
    """Sum (N,) numbers of tokens by row -> (rows,); owners: (N,) the row of each."""
    return mx.zeros(rows, dtype=mx.float32).at[owners].add(values)
