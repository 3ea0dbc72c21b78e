"""How much memory a training step needs: predicted from config.json, without weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.errors import ModelError
from mlxft.model.blocks import Blocks
from mlxft.model.logits import Split, chunk_size, hidden_nll, rows_nll
from mlxft.model.logprobs import hidden_logprobs
from mlxft.model.lora import LEAVES
from mlxft.model.pack import Packing
from mlxft.model.random import probing
from mlxft.model.shared import Sharing
from mlxft.model.trace import Graph, arrays_of, trace

GB = 10**9
MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128)  # GB of memory that Macs are sold with
# Share of its memory that macOS lets a GPU hold: `max_recommended_working_set_size` of Metal is about 2/3 on Macs of up
# to 36 GB and 3/4 on larger ones; the system and other programs want the rest.
MAC_SHARE = 0.7
# With every activation kept, no more than this share of the machine: beyond it, checkpointing costs less than swapping.
CHECKPOINT_ABOVE = 1 / 3
MOST_ROWS = 1 << 16
SHORT = 512  # tokens of a row that is planned quickly
SURELY = 1.1  # times the memory there is: what is predicted from shorter rows to take more is not planned
# Chunks of the loss that are traced; they run one after the other, so more of them add only what each leaves.
TRACED_CHUNKS = 24


@dataclass(frozen=True)
class Plan:
    """Peak memory of training, in bytes, by what takes it.

    Attributes:
        weights: the base, as it is held (packed if quantised).
        adapters: low-rank matrices.
        gradients: of all that is trained; with accumulation, the sum of the earlier micro-batches too.
        optimizer: its state and float32 master weights.
        activations: what the backward pass needs of the forward pass, and its temporaries, at the peak.
        logits: of one chunk of positions, with their gradient and the head's.
        batch: token ids, labels and weights.
        ahead: of operations that MLX prepares before those in front of them are done; it does without near a limit.
        checkpoint: whether activations are those of gradient checkpointing.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    batch: int
    ahead: int
    checkpoint: bool

    @property
    def total(self) -> int:
        """The peak where there is room."""
        return sum(v for k, v in asdict(self).items() if k != "checkpoint")

    @property
    def needed(self) -> int:
        """The peak where MLX has to wait for memory."""
        return self.total - self.ahead

    def fits(self, limit: float) -> bool:
        """Whether `limit` bytes will do."""
        return self.needed <= limit

    def macs(self) -> list[int]:
        """Macs on which it fits, by their memory in GB."""
        return [gb for gb in MACS if self.fits(MAC_SHARE * gb * 2**30)]


class Outline(NamedTuple):
    """What an objective's step is, as far as memory goes.

    Attributes:
        reads: of the model: a sum of negative log-likelihoods, log-probabilities of single tokens, or rows' scores.
        together: rows of a batch that can not be parted: two of a pair.
        copies: adapters beside the trained one, a reference's, of the same size.
    """

    reads: Literal["nll", "logprobs", "scores"] = "nll"
    together: int = 1
    copies: int = 0

    @property
    def dropout(self) -> bool:
        """Whether dropout is drawn: log-probabilities and scores are compared, and read without."""
        return self.reads == "nll"


PLAIN = Outline()


@dataclass(frozen=True)
class Job:
    """What stays the same for batches of every size.

    Attributes:
        model: with adapters, its trainable parameters unfrozen; nothing of it need be evaluated. With its head, where
            scores are read.
        optimizer: bytes of the optimiser's state and master weights.
        trained_share: share of a batch's tokens that are predicted; of the fullest batch, to be safe.
        accumulate: micro-batches a step.
        outline: what a step is.
        update: bytes that the optimiser makes anew at one time: that must be, and where there is room to work ahead.
        packed: whether rows are packed, which takes a mask for each sequence.
    """

    model: nn.Module
    optimizer: int
    trained_share: float = 1.0
    accumulate: int = 1
    outline: Outline = PLAIN
    update: tuple[int, int] = (0, 0)
    packed: bool = False

    @property
    def gradients(self) -> int:
        """Bytes of the gradient of all that is trained."""
        return sum(v.nbytes for _, v in tree_flatten(self.model.trainable_parameters()))

    @property
    def sums(self) -> int:
        """Bytes of a sum of such gradients, which is in float32."""
        return sum(4 * v.size for _, v in tree_flatten(self.model.trainable_parameters()))


class Shape(NamedTuple):
    """A batch as it will be.

    Attributes:
        rows, width: with its padding.
        trained: tokens that are predicted.
        prompt, answer: widths of the prompts, each for `Outline.together` rows, and of the answers to them, where
            prompts are computed once; 0: they are not.
    """

    rows: int
    width: int
    trained: int
    prompt: int = 0
    answer: int = 0

    def computed(self, together: int) -> int:
        """Tokens that go through the model."""
        return self.rows // together * self.prompt + self.rows * (self.answer or self.width)


def plan(job: Job, rows: int, width: int, checkpoint: bool, shared: tuple[int, int] = (0, 0)) -> Plan:
    """Predict the peak of training on batches of `rows` x `width` tokens.

    Args:
        shared: widths of prompts and answers, see `Shape`; not together with checkpointing.
    Raises:
        ModelError: the architecture's memory can not be predicted.
    """
    with probing(job.model, training=True):
        return _plan(job, rows, width, checkpoint, shared)


def _plan(job: Job, rows: int, width: int, checkpoint: bool, shared: tuple[int, int]) -> Plan:
    model = job.model
    held = [(key, module[key].nbytes) for module, key in arrays_of(model)]
    adapters = sum(n for key, n in held if key in LEAVES)
    weights = sum(n for _, n in held) - adapters
    gradients = job.gradients
    positions = rows if job.outline.reads == "scores" else max(1, math.ceil(job.trained_share * rows * width))
    prompt, answer = shared
    ids = {"ids": mx.zeros((rows, answer or width), dtype=mx.int32)}
    if job.packed:
        ids |= {"segments": mx.zeros((rows, width), dtype=mx.int32)}
    if prompt:
        prompts = rows // job.outline.together
        ids |= {"prompts": mx.zeros((prompts, prompt), dtype=mx.int32)}
        ids |= {"begins": mx.zeros(prompts, dtype=mx.int32), "of": mx.zeros(rows, dtype=mx.int32)}
    step = _Step(model, job.outline.reads, ids, positions)
    batch = sum(v.nbytes for v in ids.values()) + 12 * step.positions
    # The peak of the gradient: all of it stands at the end; the earlier micro-batches' sum all the time.
    earlier = job.sums if job.accumulate > 1 else 0
    peak, queued = (size + earlier for size in step.peaks(checkpoint))
    # The update holds all gradients, the square of the largest parameter for the norm or its gradient in float32, and
    # what it makes anew.
    largest = max((v.size for _, v in tree_flatten(model.trainable_parameters())), default=0)
    update, renewed = ((earlier or gradients) + 4 * largest + anew for anew in job.update)
    transient = max(peak, update)
    logits = min(step.head_peak(), max(0, transient - gradients - earlier))
    return Plan(
        weights=weights,
        adapters=adapters * (1 + job.outline.copies),
        gradients=gradients + earlier,
        optimizer=job.optimizer,
        activations=max(0, transient - gradients - earlier - logits),
        logits=logits,
        batch=batch,
        ahead=max(queued, renewed, transient) - transient,
        checkpoint=checkpoint,
    )


def largest_tokens(job: Job, width: int, checkpoint: bool, limit: float, most: int | None = None) -> int:
    """The largest `batch.tokens`, a multiple of 64, of which a batch of rows of `width` tokens fits in `limit` bytes.

    0 where not even one row, or a pair of them, fits.

    Args:
        most: tokens beyond which none are looked for.
    """
    together = job.outline.together

    def needed(rows: int) -> int:
        return plan(job, together * rows, width, checkpoint).needed

    if _too_long(job, width, checkpoint, limit):
        return 0
    rows = MOST_ROWS if most is None else max(1, most // (together * width))
    fits, over = (1, needed(1)), (rows + 1, math.inf)
    if fits[1] > limit:
        return 0
    known, rows = [fits], 2
    # What is needed grows nearly in proportion to the rows: a line through two counts soon leads there.
    while over[0] - fits[0] > max(1, fits[0] // 50):
        now = (rows, needed(rows))
        fits, over = (now, over) if now[1] <= limit else (fits, now)
        (r0, n0), (r1, n1) = known[-1], now
        known.append(now)
        guess = r1 + (limit - n1) * (r1 - r0) / (n1 - n0) if n1 != n0 and r1 != r0 else over[0]
        rows = min(max(int(guess), fits[0] + 1), over[0] - 1)
    tokens = fits[0] * together * width
    return tokens // 64 * 64 if tokens >= 64 else tokens


def largest_packed(job: Job, width: int, checkpoint: bool, limit: float, most: int) -> int:
    """The same for packed rows of up to `width` tokens, which may all be packed into one sequence."""
    fits, over = 0, most + 64
    tokens = max(64, -(-width // 64) * 64)
    while over - fits > max(64, fits // 16):
        if plan(job, 1, tokens, checkpoint).needed <= limit:
            fits, tokens = tokens, min(2 * tokens, (tokens + over) // 2)
        elif not fits:  # not even the longest row
            return 0
        else:
            over, tokens = tokens, (fits + tokens) // 2
        tokens = tokens // 64 * 64
    return fits


def _too_long(job: Job, width: int, checkpoint: bool, limit: float) -> bool:
    """Whether shorter rows show that one of `width` tokens does not fit: its own plan may take minutes.

    What is needed grows at least in proportion to the width, so a line through two widths is never above it.
    """
    known: list[tuple[int, int]] = []
    short = SHORT
    while 4 * short <= width:
        known.append((short, plan(job, job.outline.together, short, checkpoint).needed))
        if known[-1][1] > limit:
            return True
        if len(known) > 1:
            (w0, n0), (w1, n1) = known[-2:]
            if n1 + (n1 - n0) * (width - w1) / (w1 - w0) > SURELY * limit:
                return True
        short *= 2
    return False


class ShapeSplit(Split):
    """Body and head of a model whose weights are not there: nothing is evaluated."""

    @cached_property
    def packing(self) -> Packing:
        return Packing(self.model, weights=False)

    def _agrees(self) -> bool:
        ids = mx.array([[1, 0, 2]])
        try:
            with probing(self.model):
                whole, hidden = self._watched(ids)
        except (TypeError, ValueError, AttributeError, IndexError):
            return False
        # A body that gives the logits themselves has its head inside.
        if hidden is whole or hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            return False
        self._width, self._dtype, self.vocabulary = hidden.shape[-1], hidden.dtype, whole.shape[-1]
        return True

    def _readers(self, names: list[str]) -> list[str]:
        values = self._values(names)
        if not values:
            return []
        states = mx.zeros((1, self._width), self._dtype)

        def logits(h: mx.array, *given: mx.array) -> list[mx.array]:
            return [self.logits(h, dict(zip(values, given)))]

        graph, inputs = trace(self.model, logits, [states, *values.values()])
        read = graph.read()
        return [name for name, given in zip(values, inputs[1:]) if given in read]


class _Step:
    """One micro-batch's loss and gradient."""

    def __init__(self, model: nn.Module, reads: str, ids: dict[str, mx.array], positions: int) -> None:
        self.model, self.reads, self.ids, self.positions = model, reads, ids, positions
        self.split = ShapeSplit(model)
        self.sharing = Sharing(self.split)
        # Both call the model to find how many axes their masks have, and so before blocks are replaced.
        if "segments" in ids:
            _ = self.split.packing
        if "prompts" in ids and not self.sharing.thinkable:
            raise ModelError("memory can not be predicted: the model can not read answers behind a shared prompt")

    def peaks(self, checkpoint: bool) -> tuple[int, int]:
        """Bytes beside weights and batch: what must be, and what will be where there is room to work ahead."""
        if not checkpoint:
            graph = self._graph()
        else:
            blocks = Blocks(self.model)
            with blocks.replaced():
                graph = self._graph(blocks)
            graph = blocks.spliced(graph, self._names())  # traces the blocks themselves
        more = self._untraced()
        return graph.peak() + more, graph.peak(ahead=True) + more

    def head_peak(self) -> int:
        """Bytes of the head and the loss alone."""
        if not self.split.separable or self.reads == "scores":
            return 0
        n = self._traced()
        hidden = mx.zeros((n, self.split._width), self.split._dtype)

        def loss(h: mx.array, labels: mx.array, weights: mx.array) -> list[mx.array]:
            if self.reads == "nll" or self.split.trained_head():
                return [hidden_nll(self.split, h, labels, weights, grad=True)]
            return [(hidden_logprobs(self.split, h, labels, grad=True) * weights).sum()]

        places = self._places(n)
        return trace(self.model, loss, [hidden, places["labels"], places["weights"]])[0].peak()

    def _untraced(self) -> int:
        """Hidden states and their gradients at positions beyond the traced chunks: four arrays stand at the peak."""
        return 4 * (self.positions - self._traced()) * self.split._width * self.split._dtype.size

    def _traced(self) -> int:
        if not self.split.separable or self.reads == "scores":
            return self.positions
        return min(self.positions, TRACED_CHUNKS * chunk_size(self.split.vocabulary))

    def _names(self) -> list[str]:
        return [n for n, _ in tree_flatten(self.model.trainable_parameters())]

    def _places(self, n: int) -> dict[str, mx.array]:
        """What `_loss` takes beside the ids."""
        places = mx.zeros((n,), dtype=mx.int32)
        if self.reads == "scores":
            return {"last": places}
        return {"positions": places, "labels": places, "weights": mx.zeros((n,))}

    def _loss(self, a: dict[str, mx.array]) -> mx.array:
        """A number that depends on what the objective reads as its loss does."""
        split, sharing = self.split, self.sharing
        if self.reads == "scores":
            return sharing.scores(a).square().sum()
        if not split.separable:
            given = (a["ids"], a["positions"], a["labels"], a["weights"])
            return rows_nll(split, *given, grad=True, segments=a.get("segments"))
        # Where the head is trained, log-probabilities have a gradient of their own, which can not be exported: it
        # computes chunks as the sum's does, and holds as much.
        if self.reads == "nll" or split.trained_head():
            return hidden_nll(split, sharing.hidden(a)[a["positions"]], a["labels"], a["weights"], grad=True)
        return (sharing.logprobs(a, grad=True) * a["weights"]).sum()

    def _graph(self, blocks: Blocks | None = None) -> Graph:
        """The graph of the loss and the gradient of all trained parameters; with blocks, their tap's comes last."""

        batch = self.ids | self._places(self._traced())

        def step(*arrays: mx.array) -> list[mx.array]:
            def loss(params: Any) -> mx.array:
                self.model.update(params["model"])
                if blocks is not None:
                    blocks.tap = params["tap"]
                return self._loss(dict(zip(batch, arrays)))

            trained = {"model": self.model.trainable_parameters()}
            if blocks is not None:
                trained["tap"] = mx.zeros((1, 1, 1), self.split._dtype)
            value, grads = mx.value_and_grad(loss)(trained)
            return [value, *(g for _, g in tree_flatten(grads))]

        if self.split.separable:
            self.split.trained_head()  # before the trace: it makes one of its own
        return trace(self.model, step, list(batch.values()))[0]
