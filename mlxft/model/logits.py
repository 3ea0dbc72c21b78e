"""From hidden states to losses and log-probabilities, in chunks: whole logits never stand in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.device import planned_backend
from mlxft.errors import ModelError
from mlxft.model.cpu import cross_entropy, exp, logsumexp, on_cpu
from mlxft.model.layers import again, position, probing, repeatable

# --- pack -------------------------------------------------------------------------------------------------------------
# Several rows in one sequence, each seeing only itself: attention with a block-diagonal mask.
#
# mlx-lm's models ask the cache that they are given for the mask (`create_attention_mask`), for the offset of positions
# and for keys and values. A cache that keeps nothing and answers with a mask of one's own is thus all it takes, without
# a change to the model. Rotary positions are relative, so a row may begin anywhere; whether an architecture really
# keeps rows apart is tried on a few tokens.

ATTENTION = ("KVCache", "RotatingKVCache")  # of keys and values only: what a mask hides is not seen
# Rows of the trial, by sequence: unequal numbers and lengths, and padding behind the second's.
_TRIAL = ((7, 5), (4, 3, 3))


class PackCache:
    """Stands in for a layer's KV cache: keeps nothing, and masks the rows of a sequence from each other.

    Args:
        segments: (B, T) integers; a token sees those before it with its own number, and itself.
        axes: of heads, between B and T x T in the model's scores: 1, or 2 where query heads are grouped by hand.
        offset: position of the first token.
    """

    def __init__(self, segments: mx.array, axes: int = 1, offset: int = 0) -> None:
        self.offset = offset
        at = mx.arange(segments.shape[1])
        self._distance = at[:, None] - at
        mask = (segments[:, :, None] == segments[:, None, :]) & (self._distance >= 0)
        self._mask = mx.expand_dims(mask, tuple(range(1, 1 + axes)))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """(B, 1, T, T) bool, true where a query (axis -2) sees a key."""
        assert self._mask.shape[-1] == N, f"{N} tokens, segments for {self._mask.shape[-1]}"
        return self._mask if window_size is None else self._mask & (self._distance < window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The sequence's own keys and values: nothing came before."""
        return keys, values


def _kind(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))


def refuse_states(model: nn.Module) -> int:
    """Refuse to pack rows for what keeps more than keys and values, which is known without weights.

    Returns:
        How many layers keep such.
    Raises:
        ModelError: so it is.
    """
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    others = sorted({type(c).__name__ for c in caches} - set(ATTENTION))
    if others:
        raise ModelError(
            f"batch.pack: {_kind(model)} carries more than keys and values from token to token ({', '.join(others)}): "
            "a state that no mask divides, so that rows would see the ones before them; leave batch.pack out"
        )
    return len(caches)


class Packing:
    """How a model takes packed rows.

    Args:
        model: any mlx-lm model, with or without adapters.
        width: positions that there will be; where given, the trial reaches up to there.
        weights: whether the model has weights; without, only shapes are tried.
    Raises:
        ModelError: the model can not keep the rows of a sequence apart.
    """

    def __init__(self, model: nn.Module, width: int = 0, weights: bool = True) -> None:
        kind, self._count = _kind(model), refuse_states(model)
        with probing(model):
            trial = self._trial if weights else self._shapes
            reasons = [trial(model, axes, width) for axes in (1, 2)]
        if all(reasons):
            raise ModelError(f"batch.pack: {kind} does not keep packed rows apart: {reasons[0]}; leave batch.pack out")
        self._axes = 1 + reasons.index("")

    def caches(self, segments: mx.array) -> list[Any]:
        """What the model takes as `cache` to keep apart the rows that `segments` (B, T) numbers; 0 is padding."""
        return [PackCache(segments, self._axes)] * self._count

    def _shapes(self, model: nn.Module, axes: int, width: int) -> str:
        """Why the model does not take a mask of so many axes of heads; empty if it does. Nothing is computed."""
        ids = mx.zeros((3, 5), dtype=mx.int32)
        try:
            model(ids, cache=[PackCache(ids, axes)] * self._count)
        except Exception as e:  # whatever a model's own code raises on being called so
            return _said(e)
        return ""

    def _trial(self, model: nn.Module, axes: int, width: int) -> str:
        """What is wrong with packed logits next to those of each row alone; empty if nothing."""
        length = max(sum(lengths) for lengths in _TRIAL)
        ids = np.random.default_rng(0).integers(0, 8, (len(_TRIAL), length)).astype(np.int32)
        segments = np.zeros_like(ids)
        alone: list[mx.array] = []
        where: list[tuple[int, slice]] = []
        for b, lengths in enumerate(_TRIAL):
            for i, n in enumerate(lengths):
                part = slice(sum(lengths[:i]), sum(lengths[:i]) + n)
                segments[b, part] = i + 1
                where.append((b, part))
        try:
            alone = [model(mx.array(ids[b : b + 1, part]))[0] for b, part in where]
            # The second time at the far end: positions that scale attention, or that end, show there.
            for offset in (0, width - length) if width > length else (0,):
                caches = [PackCache(mx.array(segments), axes, offset)] * self._count
                packed = model(mx.array(ids), cache=caches)
                wrong = max(_difference(packed[b, part], one) for one, (b, part) in zip(alone, where))
                # Noise of half precision is some 1e-2; rotations by a large angle are exact to 1e-3 in float32.
                bound = 5e-2 if packed.dtype != mx.float32 else 1e-2 if offset else 1e-3
                if not wrong <= bound:
                    return f"logits of a packed row differ by {wrong:.1%} from those of the row alone"
        except Exception as e:  # whatever a model's own code raises on being called so
            return _said(e)
        return ""


def _said(error: Exception) -> str:
    cause = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return f"its own code fails where a mask stands in for its layers' caches ({cause})"


def _difference(a: mx.array, b: mx.array) -> float:
    """Mean over tokens of |a - b| / |b|."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float((mx.linalg.norm(a - b, axis=-1) / mx.linalg.norm(b, axis=-1)).mean())


# --- logits -----------------------------------------------------------------------------------------------------------
# Body and head apart, so that logits exist only where they are needed.
#
# Any mlx-lm model whose `__call__` runs a body once and turns its output into logits is separable: the head is the
# model's own `__call__` with the body replaced by one that returns given hidden states. Tied embeddings, soft-capping
# and logit scaling come along by themselves.

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


# --- logprobs ---------------------------------------------------------------------------------------------------------

Parameters = dict[str, mx.array]
Read = Callable[[mx.array, mx.array], mx.array]  # (n, V) logits and (n,) labels -> (n,) numbers

_OUT = -1e30  # a logit without probability
_K = TypeVar("_K")
A = TypeVar("A")
V = TypeVar("V")


def ahead(batches: Iterable[tuple[_K, A]], read: Callable[[A], V]) -> Iterator[tuple[_K, V]]:
    """`read` of each batch, the next one asked for before one is handed out: the device computes it meanwhile."""
    before: list[tuple[_K, V]] = []
    for key, arrays in batches:
        before.append((key, read(arrays)))
        mx.async_eval(before[-1][1])
        if len(before) > 1:
            yield before.pop(0)
    yield from before


def _picked(logits: mx.array, labels: mx.array) -> mx.array:
    return -cross_entropy(logits, labels)


def _entropy(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    total = logsumexp(logits)
    return total - (exp(logits - total[:, None]) * logits).sum(axis=-1)


class Draw(NamedTuple):
    """How tokens were sampled: from softmax(logits / temperature), of all tokens but `without`."""

    temperature: float = 1.0
    without: int | None = None


_PLAIN = Draw()


def _at(draw: Draw, read: Read) -> Read:
    """`read` of the logits that were sampled from."""
    if draw == _PLAIN:
        return read

    def of_drawn(logits: mx.array, labels: mx.array) -> mx.array:
        logits = logits.astype(mx.float32) / draw.temperature
        if draw.without is not None:
            # Finite: in an entropy -inf would be 0 * inf.
            logits = mx.where(mx.arange(logits.shape[-1]) == draw.without, _OUT, logits)
        return read(logits, labels)

    return of_drawn


def rows_logprobs(
    split: Split, ids: mx.array, positions: mx.array, labels: mx.array, *, grad: bool, draw: Draw = _PLAIN
) -> mx.array:
    """Log-probability of each label at its position, (N,) float32, in nats.

    Args:
        ids: (B, T) tokens, padded on the right.
        positions: (N,) flat indices into B x T of the positions that predict.
        labels: (N,) tokens that they predict.
        grad: whether a gradient will be asked for.
        draw: how the labels were sampled.
    """
    if not split.separable:
        logits = split.model(ids)
        return _at(draw, _picked)(logits.reshape(-1, logits.shape[-1])[positions], labels)
    return hidden_logprobs(split, rows_hidden(split, ids, positions), labels, grad=grad, draw=draw)


def rows_hidden(split: Split, ids: mx.array, positions: mx.array) -> mx.array:
    """(N, D) hidden states at positions; arguments as for `rows_logprobs`."""
    hidden = split.hidden(ids)
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def hidden_logprobs(split: Split, hidden: mx.array, labels: mx.array, *, grad: bool, draw: Draw = _PLAIN) -> mx.array:
    """The same of (N, D) hidden states, in chunks: the logits of all of them never exist."""
    return _read(split, hidden, labels, _at(draw, _picked), grad)


def hidden_entropy(split: Split, hidden: mx.array, *, grad: bool, draw: Draw = _PLAIN) -> mx.array:
    """Entropy of the next token, (N,) float32, in nats, after (N, D) hidden states."""
    labels = mx.zeros(hidden.shape[0], dtype=mx.int32)
    return _read(split, hidden, labels, _at(draw, lambda logits, _: _entropy(logits)), grad)


def rows_logprobs_entropy(
    split: Split, ids: mx.array, positions: mx.array, labels: mx.array, *, draw: Draw = _PLAIN
) -> tuple[mx.array, mx.array]:
    """Log-probabilities, bit for bit those of `rows_logprobs`, and entropies, both (N,), without a gradient."""
    if split.separable:
        return hidden_logprobs_entropy(split, rows_hidden(split, ids, positions), labels, draw=draw)
    logits = split.model(ids)
    found = _at(draw, _picked_entropy)(logits.reshape(-1, logits.shape[-1])[positions], labels)
    return found[:, 0], found[:, 1]


def hidden_logprobs_entropy(
    split: Split, hidden: mx.array, labels: mx.array, *, draw: Draw = _PLAIN
) -> tuple[mx.array, mx.array]:
    """The same after (N, D) hidden states."""
    found = _read(split, hidden, labels, _at(draw, _picked_entropy), False)
    return found[:, 0], found[:, 1]


def _picked_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    return mx.stack([_picked(logits, labels), _entropy(logits)], axis=-1)


def hidden_logprobs_greedy(split: Split, hidden: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """Log-probabilities after (N, D) hidden states, and whether each label is the likeliest token, both (N,)."""
    found = _read(split, hidden, labels, _picked_greedy, False)
    return found[:, 0], found[:, 1] > 0


def rows_logprobs_greedy(
    split: Split, ids: mx.array, positions: mx.array, labels: mx.array
) -> tuple[mx.array, mx.array]:
    """The same of whole rows; arguments as for `rows_logprobs`."""
    if split.separable:
        return hidden_logprobs_greedy(split, rows_hidden(split, ids, positions), labels)
    logits = split.model(ids)
    found = _picked_greedy(logits.reshape(-1, logits.shape[-1])[positions], labels)
    return found[:, 0], found[:, 1] > 0


def _picked_greedy(logits: mx.array, labels: mx.array) -> mx.array:
    likeliest = mx.argmax(logits, axis=-1) == labels
    return mx.stack([_picked(logits, labels), likeliest.astype(mx.float32)], axis=-1)


def _read(split: Split, hidden: mx.array, labels: mx.array, read: Read, grad: bool) -> mx.array:
    if not grad:
        return _values(split, hidden, labels, {}, read)
    head = split.trained_head()
    if head:
        return _recomputed(split, hidden, labels, head, read)
    return _with_slopes(split, hidden, labels, read)


def _parts(split: Split, count: int) -> list[slice]:
    size = chunk_size(split.vocabulary)
    return [slice(start, start + size) for start in range(0, count, size)]


def _values(split: Split, hidden: mx.array, labels: mx.array, head: Parameters, read: Read) -> mx.array:
    done: list[mx.array] = []
    for part in _parts(split, hidden.shape[0]):
        h = hidden[part]
        if done:  # one chunk after the other: MLX would else begin with all of them
            (h,) = mx.depends([h], [done[-1]])
        done.append(read(split.logits(h, head), labels[part]))
    return mx.concatenate(done)


def _with_slopes(split: Split, hidden: mx.array, labels: mx.array, read: Read) -> mx.array:
    """With the gradient of each token's number in its own hidden state, (N, D), computed on the way and kept.

    A row of logits depends on its own hidden state alone, so the gradient of the sum is all of theirs at once.
    """
    still = mx.stop_gradient
    values: list[mx.array] = []
    slopes: list[mx.array] = []
    for part in _parts(split, hidden.shape[0]):
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
    # hidden - still(hidden) is zero: the term leaves the value and brings the gradient.
    return still(mx.concatenate(values)) + ((hidden - still(hidden)).astype(mx.float32) * slope).sum(axis=-1)


def _recomputed(split: Split, hidden: mx.array, labels: mx.array, head: Parameters, read: Read) -> mx.array:
    """Where the head is trained too its gradient depends on what each token's number counts: chunks are computed
    again once that is known."""
    names, drawn = list(head), position()

    def forward(hidden: mx.array, *parameters: mx.array) -> mx.array:
        return _values(split, hidden, labels, dict(zip(names, parameters)), read)

    values: Any = mx.custom_function(forward)

    def back(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        hidden, *parameters = primals
        slopes: list[mx.array] = []
        sums: list[mx.array] = []
        with again(drawn):
            for part in _parts(split, hidden.shape[0]):
                h, y, c = hidden[part], labels[part], cotangent[part]
                if slopes:
                    (h,) = mx.depends([h], [slopes[-1], *sums])

                def total(h: mx.array, parameters: list[mx.array], y: mx.array = y, c: mx.array = c) -> mx.array:
                    return (read(split.logits(h, dict(zip(names, parameters))), y) * c).sum()

                slope, more = mx.grad(total, argnums=(0, 1))(h, parameters)
                slopes.append(slope)
                # In float32, as the loop adds up micro-batches.
                sums = [a.astype(mx.float32) + b for a, b in zip(sums, more)] if sums else more
        return (mx.concatenate(slopes), *(s.astype(p.dtype) for s, p in zip(sums, parameters)))

    values.vjp(back)
    out: mx.array = values(hidden, *head.values())
    return out


def row_sums(values: mx.array, owners: mx.array, rows: int) -> mx.array:
    """(N,) numbers of tokens -> (rows,) sums; owners: (N,) the row that each belongs to."""
    return mx.zeros(rows, dtype=mx.float32).at[owners].add(values)
