"""Train: pull steps from an objective, add up sums and gradients, divide once, update."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from types import FrameType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.config import Config
from mlxft.distributed import Ranks, assign, current
from mlxft.errors import ModelError, TrainingError
from mlxft.model.cpu import as_trained, quicker
from mlxft.model.layers import aside, probing, random_state, watching
from mlxft.objectives.base import MAX, MicroBatch, Objective, Step, Terms, arrays_of
from mlxft.objectives.functional import load_balance
from mlxft.text import Event
from mlxft.trainer.optim import Optimizer, learning_rate

# --- gradient ---------------------------------------------------------------------------------------------------------
# The gradient of a micro-batch: eager or, for shapes that come again, by a function compiled for them.

TRACES = 16  # most shapes that a run compiles, because each trace keeps a graph in memory
REMEMBERED = 1024  # most shapes seen once that are remembered
AUX = "router_aux"
# The total, to be divided by the denominator of the step's first term; its sums; gradients by name.
LossAndGradients = tuple[mx.array, Terms, dict[str, mx.array]]


class Scales(NamedTuple):
    """Factors that make a micro-batch's terms one number, to be divided once for the whole step."""

    of: dict[str, float]  # term -> the first term's denominator over its own; a missing term has 1
    aux: float | None = None  # tune.router_aux; None: no balance is added
    trained: int = 0  # trained tokens of the micro-batch, which weight its balance


PLAIN_SCALES = Scales({})


def gradient(
    model: nn.Module, objective: Objective, batch: MicroBatch, scales: Scales, params: dict[str, mx.array] | None = None
) -> LossAndGradients:
    """Return a micro-batch's sums, and the gradient of their total in the parameters that it trains, by name.

    `params` replace the model's own while it is traced.
    """

    def loss(params: dict[str, mx.array]) -> tuple[mx.array, Terms]:
        model.update(tree_unflatten(list(params.items())))
        if scales.aux is None:
            terms = objective.loss(model, batch.data)
        else:
            terms = _balanced(model, objective, batch.data, scales.aux, scales.trained)
        scaled = [scales.of[name] * value if name in scales.of else value for name, value in terms.losses.items()]
        return sum(scaled[1:], scaled[0]), terms

    own = dict(tree_flatten(model.trainable_parameters()))
    if batch.trains is not None:
        own = {n: v for n, v in own.items() if batch.trains(n)}
    try:
        (total, terms), grads = mx.value_and_grad(loss)(own if params is None else params)
    finally:
        model.update(tree_unflatten(list(own.items())))  # removes tracers
    return total, terms, grads


def _balanced(model: nn.Module, objective: Objective, data: Any, aux: float, trained: int) -> Terms:
    """Return the objective's terms and one for the balance of the model's routers, a mean over their layers.

    The choice of experts must be known for all tokens that are balanced together, so each micro-batch is balanced
    separately and counts by its trained tokens. The metric router_aux is 1 where tokens are spread evenly.
    """
    with watching({mask.shape: mask for mask in objective.real_tokens(data)}) as seen:
        terms = objective.loss(model, data)
    balance = mx.stack([load_balance(chosen, shares) for chosen, shares in seen.values()]).mean()
    added = balance * trained
    return Terms(terms.losses | {AUX: aux * added}, terms.metrics | {AUX: mx.stop_gradient(added)})


class CompiledGradient:
    """`gradient` of a `traceable` objective, compiled once for each set of shapes.

    The trained parameters change, so they are inputs like the micro-batch's arrays. Everything else that is read,
    frozen weights included, is part of the trace by reference.

    Attributes:
        traces: the shapes of each trace, as `shapes_of` returns them.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model, self._objective = model, objective
        self._functions: dict[type, Callable[..., Any]] = {}
        self.traces: list[str] = []

    def _function(self, kind: type) -> Callable[..., Any]:
        # Not a method: a compiled function keeps what it reads, and would keep this object and thus the model alive.
        model, objective, traces = self._model, self._objective, self.traces

        def traced(params: dict[str, mx.array], arrays: dict[str, mx.array]) -> LossAndGradients:
            batch = MicroBatch(kind(**arrays), 0, 0)  # nothing else of it, which the trace would keep
            traces.append(shapes_of(batch))
            return gradient(model, objective, batch, PLAIN_SCALES, params)

        if kind not in self._functions:
            self._functions[kind] = mx.compile(traced)
        return self._functions[kind]

    def __call__(self, batch: MicroBatch) -> LossAndGradients:
        """Compute `gradient` of terms that have one denominator; raise ModelError if the model cannot be traced."""
        if shapes_of(batch) not in self.traces:
            # A trace cannot evaluate anything, so what is found by trying (how to take a model apart) must be known
            # before. This graph is thrown away, not computed.
            gradient(self._model, self._objective, batch, PLAIN_SCALES)
        params = dict(tree_flatten(self._model.trainable_parameters()))
        try:
            total, terms, grads = self._function(type(batch.data))(params, arrays_of(batch.data))
        except ValueError as error:
            if "function transformations" not in str(error):
                raise
            name = getattr(self._model, "model_type", type(self._model).__name__)
            why = "reads numbers while it is computed"
            raise ModelError(f"run.compile: {name} cannot be compiled, it {why} ({error}); set it to off") from error
        return total, Terms(*terms), grads


class Gradients:
    """The gradients of a run: compiled for up to TRACES shapes that are seen again, eager for all others.

    Args:
        aux: tune.router_aux.
        progress: keeps the shapes, because compiled and eager gradients differ in the last bits, so that a resumed
            run needs the same ones. None: every shape is compiled if `objective.compiled`.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, aux: float | None, progress: Progress | None = None
    ) -> None:
        self._model, self._objective, self._aux, self._progress = model, objective, aux, progress
        self.compiled = CompiledGradient(model, objective) if objective.compiled else None

    def __call__(self, batch: MicroBatch, per: dict[str, float]) -> LossAndGradients:
        """Compute `gradient` in a step with these denominators."""
        first = next(iter(per.values()))
        factors = {name: first / count for name, count in per.items() if count != first}
        scales = Scales(factors, self._aux, batch.trained_tokens)
        whole = batch.trains is None and not scales.of
        if self.compiled is not None and whole and self._comes_again(shapes_of(batch)):
            return self.compiled(batch)
        return gradient(self._model, self._objective, batch, scales)

    def summed(self, batches: Sequence[MicroBatch], per: dict[str, float]) -> LossAndGradients:
        """Sum over the micro-batches of a step, being evaluated."""
        grads: dict[str, mx.array] = {}
        total, sums = mx.array(0.0), Terms({}, {})
        for k, batch in enumerate(batches):
            part, terms, more = self(batch.finished(), per)
            total, sums = (total + part, sums.plus(terms)) if k else (part, terms)
            # In float32, because bfloat16 has 8 bits: a sum stops growing at 256 times what is added to it.
            grads |= {n: grads[n].astype(mx.float32) + g if n in grads else g for n, g in more.items()}
            # All at once and before anything else is evaluated: an array that only one of them needs would keep the
            # activations of the others alive.
            mx.async_eval(total, sums, grads)
            del more
        return total, sums, grads

    def _comes_again(self, key: str) -> bool:
        if self._progress is None:
            return True
        once, again = self._progress.shapes_seen, self._progress.shapes_compiled
        if key in again:
            return True
        if len(again) == TRACES:
            return False
        if key in once:
            once.remove(key)
            again.append(key)
            return True
        once.append(key)
        del once[:-REMEMBERED]
        return False


def shapes_of(batch: MicroBatch) -> str:
    """Return a digest of the names, shapes and types of a micro-batch's arrays."""
    about = sorted((name, value.shape, str(value.dtype)) for name, value in arrays_of(batch.data).items())
    return blake2b(repr(about).encode(), digest_size=8).hexdigest()


def _step_digest(batches: Sequence[MicroBatch], ranks: Sequence[int]) -> str:
    """Return a digest of what is known of a step's micro-batches before they are computed, and of who computes them."""
    about = [(b.tokens, b.trained_tokens, b.rows, rank) for b, rank in zip(batches, ranks)]
    return blake2b(repr(about).encode(), digest_size=8).hexdigest()


# --- validate ---------------------------------------------------------------------------------------------------------
# Held-out loss and metrics, over the same whole set each time, weighted by items.


def validate(model: nn.Module, objective: Objective) -> dict[str, Any]:
    """Return loss and metrics over the validation set, {} if there is none, or what `evaluate` returns.

    Dropout is off, and the random state is restored.
    """
    sums, per, ranks = Terms({}, {}), dict[str, float](), current()
    with probing(model):
        own = objective.evaluate(model)
        if own is not None:
            return own

        def batches() -> Iterator[MicroBatch]:
            for step in objective.valid_steps(model):
                per.update({name: per.get(name, 0.0) + count for name, count in step.per.items()})
                yield from step.micro_batches

        for batch, counts in ranks.turns(batches()):
            part = as_trained(partial(objective.loss, model, batch.finished().data))
            sums = sums.plus(part) if counts else sums
            mx.eval(part, sums)  # one micro-batch's activations at a time
    if not per:
        return {}
    sums = over_ranks(ranks, sums)
    first = next(iter(per.values()))
    loss = sum(float(value) / per[name] for name, value in sums.losses.items())
    return objective.validated({"loss": loss} | {k: float(v) / per.get(k, first) for k, v in sums.metrics.items()})


# --- ranks ------------------------------------------------------------------------------------------------------------
# What is added up over the processes that train together.


def over_ranks(ranks: Ranks, sums: Terms) -> Terms:
    """Return the sums of all ranks, the same bits on each; a name that a rank lacks counts as 0 there."""
    return sums if ranks.size == 1 else _joined(ranks.gather(_floats(sums)))


def _floats(sums: Terms) -> list[dict[str, float]]:
    mx.eval(sums)
    return [{name: float(value) for name, value in part.items()} for part in sums]


def _joined(every: Sequence[Sequence[dict[str, float]]]) -> Terms:
    """Add up the sums of all ranks."""

    def joined(parts: list[dict[str, float]]) -> dict[str, mx.array]:
        names = dict.fromkeys(name for part in parts for name in part)
        found = {name: [part[name] for part in parts if name in part] for name in names}
        return {k: mx.array(max(v) if k.endswith(MAX) else math.fsum(v)) for k, v in found.items()}

    return Terms(joined([losses for losses, _ in every]), joined([metrics for _, metrics in every]))


ROUNDING = 1e-4  # relative difference that other hardware may make in a denominator that is computed
FAR_APART = 1e-3  # relative difference of weights' norms that no rounding makes
WEIGHED = range(2, 10)  # the steps that are timed for distributed.weights: auto; the first ones make caches and kernels


# --- loop -------------------------------------------------------------------------------------------------------------

MOST_PENDING = 64  # most steps whose numbers stay on the device: each is a buffer, and Metal limits their number
ADVICE = (
    "What was saved before is intact. Try a lower optim.lr, a longer optim.warmup, a smaller optim.clip, "
    "model.dtype: float32, or look at the rows"
)


@dataclass
class Progress:
    """The progress of a run; with weights, optimiser and data position, all that exact resume needs."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    elapsed_s: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    skipped_batches: int = 0
    sources: dict[str, list[int]] = field(default_factory=dict)  # of a mixture: rows, tokens, trained tokens of each
    # Sums since the last report, saved so that an interruption does not change the next report.
    window: dict[str, float] = field(default_factory=dict)
    about: dict[str, float] = field(default_factory=dict)  # the latest event's numbers, repeated in each report
    stopped_early: bool = False
    weights: list[float] | None = None  # of the ranks, once they are measured
    shapes_seen: list[str] = field(default_factory=list)  # of micro-batches, seen once
    shapes_compiled: list[str] = field(default_factory=list)
    shapes_of_ranks: list[list[list[str]]] = field(default_factory=list)  # the two above of each rank, when it is saved


@dataclass
class Hooks:
    """Functions that the loop calls with events, and when to save or to complete the sample prompts."""

    event: Callable[[Event], None]
    checkpoint: Callable[[Progress], None]
    best: Callable[[Progress], None]
    samples: Callable[[Progress], None]


@contextmanager
def _watched_signals() -> Iterator[list[int]]:
    """Yield a list, to which Ctrl-C and SIGTERM are added; a second signal raises KeyboardInterrupt."""
    seen: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(signum)

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, whose owner handles signals
        before = {}
    try:
        yield seen
    finally:
        for s, old in before.items():
            signal.signal(s, old)


@dataclass
class _Made:
    """An update whose numbers have not been read: everything is lazy."""

    number: int
    total: mx.array
    metrics: dict[str, mx.array]
    per: dict[str, float]
    norms: dict[str, mx.array]
    lr: float
    tokens: int
    trained_tokens: int
    rows: tuple[str, ...]
    sources: dict[str, tuple[int, int, int]]


@dataclass(eq=False)
class Loop:
    """The training loop, which runs until `total_steps`, an early stop or an interrupt.

    Attributes:
        steps: what is trained on; None: `objective.steps`.
    """

    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    config: Config
    total_steps: int
    progress: Progress
    hooks: Hooks
    steps: Iterator[Step] | None = None

    def __post_init__(self) -> None:
        self.ranks = current()
        if self.ranks.size == len(self.progress.shapes_of_ranks):
            self.progress.shapes_seen, self.progress.shapes_compiled = self.progress.shapes_of_ranks[self.ranks.rank]
        self.gradients = Gradients(self.model, self.objective, self.config.tune.router_aux, self.progress)
        self._signals: list[int] = []
        self._aligned = False  # whether ranks differed in their last bits
        self._stop = False  # whether any rank has seen a signal, as of the last step
        self._speeds: list[list[tuple[int, float]]] = []  # of timed steps, each rank's tokens and seconds
        if self.ranks.size > 1 and self.config.distributed.weights == "auto" and self.progress.weights is not None:
            self.ranks.weights = self.progress.weights
        self._pending: list[_Made] = []
        self._started = time.perf_counter() - self.progress.elapsed_s
        self._reported = time.perf_counter()

    def run(self) -> bool:
        """Train. Return False if it was interrupted, after a checkpoint was saved.

        Raises:
            TrainingError: a loss or gradient is NaN or infinite.
        """
        p, settings = self.progress, self.config.run
        self.model.train()
        if self.ranks.size > 1:  # random numbers of other hardware may differ in their last bits, too
            self._align(dict(tree_flatten(self.model.trainable_parameters())))
        with _watched_signals() as self._signals, quicker(self.model):
            if settings.eval_at_start and p.step == 0:
                self._evaluate(candidate=False)
            steps = self.objective.steps(self.model) if self.steps is None else self.steps
            while p.step < self.total_steps and not p.stopped_early:
                step, ends_epoch = self._update(steps)
                p.step += 1
                p.tokens += step.tokens
                p.trained_tokens += step.trained_tokens
                for name, counted in step.sources.items():
                    p.sources[name] = [a + b for a, b in zip(p.sources.get(name, [0, 0, 0]), counted)]
                self._pending.append(step)
                if len(self._pending) > 1:
                    # Wait for the step before, so that one step keeps the device busy and the queue does not grow.
                    mx.eval(self._pending[-2].total)
                if len(self._pending) > MOST_PENDING:
                    self._read(self._pending[:-1])  # they are computed
                last = p.step == self.total_steps
                if p.step % settings.report_every == 0 or last:
                    self._report()
                due = p.step % settings.eval_every == 0 if settings.eval_every else ends_epoch
                if due or last:
                    self._evaluate()
                stop = bool(self._signals) if self.ranks.size == 1 else self._stop
                if p.step % settings.save_every == 0 or last or stop or p.stopped_early:
                    self._save()
                if stop:
                    self.ranks.agreed = True
                    return False
        return True

    def _update(self, steps: Iterator[Step]) -> tuple[_Made, bool]:
        """Make the next step that trains anything, and return whether it ends an epoch; count the skipped ones."""
        epochs = 0
        while True:
            step = next(steps)
            if step.event is not None:
                self._send(step.event, step.before_s)
            batches = [b for b in step.micro_batches if b.trained_tokens or not b.tokens]
            self.progress.skipped_batches += len(step.micro_batches) - len(batches) if step.micro_batches else 1
            if batches and any(step.per.values()):
                return self._make(step, batches), step.ends_epoch
            epochs += step.ends_epoch
            if epochs == 2:
                raise TrainingError("no batch of a whole epoch has anything to train: see the rows with mlxft check")

    def _make(self, step: Step, batches: Sequence[MicroBatch]) -> _Made:
        trained = sum(b.trained_tokens for b in batches)
        # Divide by the whole step's items: micro-batches differ in them, and a mean of means would count a short
        # row's tokens more than a long one's.
        per = step.per if self.config.tune.router_aux is None else step.per | {AUX: float(trained)}
        if self.ranks.size == 1:
            total, sums, grads = self.gradients.summed(batches, per)
        else:
            total, sums, grads = self._summed_over_ranks(batches, per)
        first = next(iter(per.values()))
        lr = self.rate()
        norms = self.optimizer.step(self.model, grads, mx.array(first), lr)
        mx.async_eval(norms)
        if step.after is not None:
            step.after(sums, per)
        rows = tuple(row for batch in batches for row in batch.rows)
        tokens = sum(b.tokens for b in batches)
        return _Made(self.progress.step + 1, total, sums.metrics, per, norms, lr, tokens, trained, rows, step.sources)

    def _summed_over_ranks(self, batches: Sequence[MicroBatch], per: dict[str, float]) -> LossAndGradients:
        """Sum over the micro-batches of all ranks; this one computes its own."""
        ranks, trainable = self.ranks, dict(tree_flatten(self.model.trainable_parameters()))
        free = [i for i, batch in enumerate(batches) if batch.rank is None]
        owners = dict(zip(free, assign([batches[i].tokens for i in free], ranks.weights)))
        every = [owners[i] if batch.rank is None else batch.rank for i, batch in enumerate(batches)]
        shared = [*ranks.own(batches, every)]
        own = [batch for batch, counts in shared if counts]
        drawn = np.random.default_rng([self.config.run.seed, 7, self.progress.step, ranks.rank])
        began = time.perf_counter()
        # Each rank draws its own noise, which a resumed run draws again. What an objective draws is the same on all.
        with aside():
            mx.random.seed(int(drawn.integers(1 << 32)))
            total, sums, grads = self.gradients.summed(own, per)
            mx.eval(total, sums, grads)
            for batch, counts in shared:
                if not counts:
                    mx.eval(self.gradients(batch.finished(), per))
        mine = [
            _step_digest(batches, every),
            per,
            float(total),
            _floats(sums),
            bool(self._signals),
            sum(b.tokens for b in own),
            time.perf_counter() - began,
        ]
        digests, denominators, totals, parts, stops, tokens, seconds = zip(*ranks.gather(mine))
        self._check_same_step(digests, denominators)
        self._stop = any(stops)
        self._weigh(tokens, seconds)
        names = [n for n in sorted(trainable) if any(b.trains is None or b.trains(n) for b in batches)]
        held = {n: grads[n] if n in grads else mx.zeros(trainable[n].shape) for n in names}
        return mx.array(math.fsum(totals)), _joined(parts), ranks.sum(held)

    def _check_same_step(self, digests: Sequence[str], denominators: Sequence[dict[str, float]]) -> None:
        """Raise TrainingError, on all ranks, where an objective of the user's own has made other steps on some."""
        first = denominators[0]
        for rank, (digest, per) in enumerate(zip(digests, denominators)):
            alike = per.keys() == first.keys() and all(math.isclose(per[k], first[k], rel_tol=ROUNDING) for k in per)
            if digest != digests[0] or not alike:
                raise TrainingError(
                    f"step {self.progress.step + 1}: the micro-batches of {self.ranks.name(rank)} are not those of "
                    f"{self.ranks.name(0)}, with denominators {per} and {first}: an objective has to yield the same "
                    "steps on all ranks. Draw with mx.random, or with a generator that is seeded by run.seed"
                )

    def _weigh(self, tokens: Sequence[int], seconds: Sequence[float]) -> None:
        """Give each rank work by its measured speed from now on, once enough steps are timed."""
        if self.config.distributed.weights != "auto" or self.progress.weights is not None:
            return
        if self.progress.step in WEIGHED:
            self._speeds.append(list(zip(tokens, seconds)))
        if self.progress.step < WEIGHED[-1] or not self._speeds:
            return
        each = [(sum(n for n, _ in column), sum(s for _, s in column)) for column in zip(*self._speeds)]
        if all(n and s for n, s in each):
            speeds = [n / s for n, s in each]
            self.progress.weights = self.ranks.weights = [speed / sum(speeds) for speed in speeds]

    def rate(self) -> float:
        """Return the next step's learning rate."""
        return learning_rate(self.config.optim, self.progress.step, self.total_steps)

    def _send(self, event: Event, before_s: float) -> None:
        """Report an event of the next step. A resumed run that repeats the step drops it and sends it again."""
        self._drain()
        self.progress.window["seconds"] -= before_s  # speed is that of training alone
        self.hooks.event({**event, "step": self.progress.step + 1, "elapsed_s": self.progress.elapsed_s})
        self.progress.about = {k: v for k, v in event.items() if isinstance(v, (int, float))}

    def _drain(self) -> None:
        """Read the numbers of all pending steps: only here, and with MOST_PENDING, the loop waits for the device."""
        self._read(self._pending)
        window, now = self.progress.window, time.perf_counter()
        window["seconds"] = window.get("seconds", 0.0) + now - self._reported
        self._reported = now
        self.progress.elapsed_s = now - self._started

    def _read(self, steps: list[_Made]) -> None:
        """Add the numbers of the oldest pending steps to the window; raise TrainingError if one is not finite."""
        window = self.progress.window
        for step in steps:
            total, weight = float(step.total), next(iter(step.per.values()))
            norms = {k: float(v) for k, v in step.norms.items()}
            if not all(map(math.isfinite, (total, *norms.values()))):
                raise TrainingError(_not_finite(step, total, norms))
            sums = {"total": total, "weight": weight, "tokens": step.tokens, "trained": step.trained_tokens}
            sums |= {f"sum:{k}": float(v) for k, v in step.metrics.items()}
            sums |= {f"of:{k}": step.per.get(k, weight) for k in step.metrics}  # a step may lack some metrics
            for name, value in sums.items():
                known = window.get(name)
                window[name] = value if known is None else max(known, value) if name.endswith(MAX) else known + value
            window |= {"lr": step.lr, **{f"norm:{k}": v for k, v in norms.items()}}
        del self._pending[: len(steps)]

    def _report(self) -> None:
        self._drain()
        p, w = self.progress, self.progress.window
        seconds = max(w["seconds"], 1e-9)
        event: Event = {
            "event": "train",
            "step": p.step,
            **self._epochs(),
            "loss": w["total"] / w["weight"],
            **p.about,
            **{k[4:]: v if k.endswith(MAX) else v / w[f"of:{k[4:]}"] for k, v in w.items() if k.startswith("sum:")},
            "lr": w["lr"],
            **{f"lr/{name}": w["lr"] * scale for name, scale in self.optimizer.scales.items()},
            **{k[5:]: v for k, v in w.items() if k.startswith("norm:")},
            "tokens": p.tokens,
            "trained_tokens": p.trained_tokens,
            **{f"rows/{name}": rows for name, (rows, _, _) in p.sources.items()},
            **{f"trained_tokens/{name}": trained for name, (_, _, trained) in p.sources.items()},
            "tokens_per_s": w["tokens"] / seconds,
            "trained_tokens_per_s": w["trained"] / seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "elapsed_s": p.elapsed_s,
        }
        if p.skipped_batches:
            event["skipped_batches"] = p.skipped_batches
        if self.ranks.size > 1:
            event |= self._by_rank(seconds)
        p.window = {}
        self.hooks.event(event)

    def _by_rank(self, seconds: float) -> dict[str, float]:
        """Return what a report says of each rank, since the one before: peak memory, and the time it waited."""
        ranks = self.ranks
        every = ranks.gather([mx.get_peak_memory() / 1e9, ranks.waited_s])
        shared = ranks.summing_s / seconds
        ranks.waited_s, ranks.summing_s = 0.0, 0.0
        each = {f"peak_memory_gb/rank{i}": peak for i, (peak, _) in enumerate(every)}
        each |= {f"wait_s/rank{i}": waited for i, (_, waited) in enumerate(every)}
        if self.config.distributed.weights == "auto":
            each |= {f"weight/rank{i}": weight for i, weight in enumerate(ranks.weights)}
        return {**each, "peak_memory_gb": max(peak for peak, _ in every), "communication_share": shared}

    def _epochs(self) -> dict[str, float]:
        """Return the passes over the data so far, if the objective knows the steps of each."""
        epoch, left = 0, self.progress.step
        while (size := self.objective.steps_per_epoch(epoch)) is not None and left >= size:
            epoch, left = epoch + 1, left - size
        return {} if size is None else {"epoch": round(epoch + left / size, 4)}

    def _evaluate(self, candidate: bool = True) -> None:
        """Validate and complete the sample prompts; the untrained model is not a `candidate` for the best."""
        self._drain()
        p = self.progress
        began = time.perf_counter()
        found = validate(self.model, self.objective)
        samples = found.pop("samples", [])
        if found:
            loss, best = found["loss"], math.inf if p.best_loss is None else p.best_loss
            better = candidate and math.isfinite(loss) and loss < best
            self.hooks.event({"event": "eval", "step": p.step, **found, "best": better, "elapsed_s": p.elapsed_s})
            p.evals_without_gain = 0 if better or not candidate else p.evals_without_gain + 1
            if better:
                p.best_loss, p.best_step = loss, p.step
                self.hooks.best(p)
            patience = self.config.run.patience
            p.stopped_early = patience is not None and p.evals_without_gain >= patience
        for sample in samples:
            self.hooks.event({"event": "sample", "step": p.step, **sample})
        self.hooks.samples(p)
        self._pause(began)
        if p.stopped_early and p.window.get("weight"):
            self._report()  # otherwise the steps since the last report would be missing

    def _save(self) -> None:
        self._drain()
        began = time.perf_counter()
        weights = tree_flatten(self.model.trainable_parameters())
        if not mx.stack([mx.isfinite(v).all() for _, v in weights]).all().item():
            # The loss would show it one step later, when the only good checkpoint might have been deleted.
            raise TrainingError(f"step {self.progress.step}: the update made weights infinite or NaN. {ADVICE}")
        if self.ranks.size > 1:
            self._align(dict(weights))
        if self.gradients.compiled is not None:  # ranks compute other micro-batches, of other shapes
            self.progress.shapes_of_ranks = self.ranks.gather(
                [self.progress.shapes_seen, self.progress.shapes_compiled]
            )
        self.hooks.checkpoint(self.progress)
        self._pause(began)

    def _align(self, weights: dict[str, mx.array]) -> None:
        """Give all ranks rank 0's weights where bits differ: other hardware rounds differently.

        Raises:
            TrainingError: they differ by more than that.
        """
        digest = blake2b(digest_size=16)
        for _, value in sorted(weights.items()):
            digest.update(np.array(value.reshape(-1).view(mx.uint8)).data)
        norm = math.sqrt(sum(float(value.astype(mx.float32).square().sum()) for value in weights.values()))
        every = self.ranks.gather([digest.hexdigest(), norm])
        apart = [rank for rank, (bits, _) in enumerate(every) if bits != every[0][0]]
        if not apart:
            return
        names = ", ".join(map(self.ranks.name, apart))
        far = max(abs(other / norm - 1) for _, other in every) if norm else 0.0
        if far > FAR_APART:
            raise TrainingError(
                f"step {self.progress.step}: the weights of {names} are not those of {self.ranks.name(0)}: their norms "
                f"differ by {far:.2%}. The last checkpoint is intact; test the machines with mlxft selftest"
            )
        shared = self.ranks.arrays_from_first(weights)
        self.model.update(tree_unflatten(list(shared.items())))
        self.optimizer.load(self.ranks.arrays_from_first(self.optimizer.gathered()))
        if not self._aligned:
            self._aligned = True
            text = f"the last bits of {names} differed, as other hardware rounds differently: all have rank 0's now"
            self.hooks.event({"event": "aligned", "step": self.progress.step, "text": text})

    def _pause(self, began: float) -> None:
        """Exclude the time since `began` from the training time."""
        away = time.perf_counter() - began
        self._started += away
        self._reported += away


def loop_state(loop: Loop) -> dict[str, Any]:
    """Return what a checkpoint's state.json holds beside the arrays."""
    return {
        "progress": asdict(loop.progress),
        "objective": loop.objective.state_dict(),
        "random": random_state(),
        "total_steps": loop.total_steps,
        "data": loop.objective.fingerprint(),
    }


def _not_finite(step: _Made, total: float, norms: dict[str, float]) -> str:
    wrong = next(((k, v) for k, v in norms.items() if not math.isfinite(v)), ("grad_norm", 0.0))
    what = f"the loss is {total}" if not math.isfinite(total) else f"the gradient's norm ({wrong[0]}) is {wrong[1]}"
    shown = ", ".join(step.rows[:8]) + (f" and {len(step.rows) - 8} more" if len(step.rows) > 8 else "")
    return f"step {step.number}: {what}. Rows: {shown}. {ADVICE}"
