"""Log-probabilities of tokens, one by one, with logits only for a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from mlxft.model.cpu import cross_entropy, exp, logsumexp
from mlxft.model.logits import Split, chunk_size
from mlxft.model.random import again, position

Parameters = dict[str, mx.array]
Read = Callable[[mx.array, mx.array], mx.array]  # (n, V) logits and (n,) labels -> (n,) numbers

_OUT = -1e30  # a logit without probability
K = TypeVar("K")
A = TypeVar("A")
V = TypeVar("V")


def ahead(batches: Iterable[tuple[K, A]], read: Callable[[A], V]) -> Iterator[tuple[K, V]]:
    """`read` of each batch, the next one asked for before one is handed out: the device computes it meanwhile."""
    before: list[tuple[K, V]] = []
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
