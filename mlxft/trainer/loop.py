"""The one loop. It pulls steps, adds up their sums and gradients, divides once, updates; it never looks into data."""

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
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.config import Config
from mlxft.errors import ModelError, TrainingError
from mlxft.model.cpu import as_trained, quicker
from mlxft.model.layers import probing, random_state, watching
from mlxft.objectives.base import MAX, MicroBatch, Objective, Step, Terms, arrays_of
from mlxft.objectives.functional import load_balance
from mlxft.text import Event
from mlxft.trainer.optim import Optimizer, learning_rate

# --- gradient ---------------------------------------------------------------------------------------------------------
# A micro-batch's gradient: as the loss is written or, where shapes come again, by a function compiled for them.

TRACES = 16  # most shapes that a run compiles: each trace is a graph that stays in memory
REMEMBERED = 1024  # shapes that were seen once; where none comes again they would become as many as batches
AUX = "router_aux"
# total, to be divided by the denominator of the step's first term; the sums it is made of; gradients by name
LossAndGradients = tuple[mx.array, Terms, dict[str, mx.array]]


class Scales(NamedTuple):
    """How a micro-batch's terms become one number, which the whole step is divided by once.

    Attributes:
        of: term -> what it is multiplied by, the first term's denominator over its own; a term that is not there: 1.
        aux: tune.router_aux, None where no balance is added.
        trained: tokens that the micro-batch trains, by which its balance counts.
    """

    of: dict[str, float]
    aux: float | None = None
    trained: int = 0


PLAIN_SCALES = Scales({})


def scales_of(per: dict[str, float], aux: float | None, trained: int) -> Scales:
    """Return the scales of a micro-batch in a step of these denominators."""
    first = next(iter(per.values()))
    return Scales({name: first / count for name, count in per.items() if count != first}, aux, trained)


def gradient(
    model: nn.Module,
    objective: Objective,
    batch: MicroBatch,
    scales: Scales,
    params: dict[str, mx.array] | None = None,
) -> LossAndGradients:
    """Return a micro-batch's sums, and the gradient of their total in what it trains, by name.

    Args:
        params: stand in for the model's own while it is traced.
    """

    def loss(params: dict[str, mx.array]) -> tuple[mx.array, Terms]:
        model.update(tree_unflatten(list(params.items())))
        if scales.aux is None:
            terms = objective.loss(model, batch.data)
        else:
            terms = _balanced(model, objective, batch.data, scales)
        scaled = [scales.of[name] * value if name in scales.of else value for name, value in terms.losses.items()]
        return sum(scaled[1:], scaled[0]), terms

    own = dict(tree_flatten(model.trainable_parameters()))
    if batch.trains is not None:
        own = {n: v for n, v in own.items() if batch.trains(n)}
    try:
        (total, terms), grads = mx.value_and_grad(loss)(own if params is None else params)
    finally:
        model.update(tree_unflatten(list(own.items())))  # no tracers are left
    return total, terms, grads


def _balanced(model: nn.Module, objective: Objective, data: Any, scales: Scales) -> Terms:
    """The objective's terms, and the balance of the model's routers, mean over the layers that have one, as another.

    Micro-batches are balanced each by itself, and count by their trained tokens: the choice of experts has to be known
    of all tokens that are balanced together. Metric router_aux is 1 where tokens are spread evenly.
    """
    assert scales.aux is not None
    with watching({mask.shape: mask for mask in objective.real_tokens(data)}) as seen:
        terms = objective.loss(model, data)
    balance = mx.stack([load_balance(chosen, shares) for chosen, shares in seen.values()]).mean()
    added = balance * scales.trained
    return Terms(terms.losses | {AUX: scales.aux * added}, terms.metrics | {AUX: mx.stop_gradient(added)})


def summed(grads: dict[str, mx.array], more: dict[str, mx.array]) -> dict[str, mx.array]:
    """The gradients of micro-batches so far, and those of one more."""
    # In float32: a sum in bfloat16 has 8 bits, and stands still at 256 times what is added to it.
    return grads | {n: grads[n].astype(mx.float32) + g if n in grads else g for n, g in more.items()}


class CompiledGradient:
    """`gradient` of an objective that is `traceable`, compiled: once for each set of shapes.

    What is trained goes in with the micro-batch's arrays, since it changes. All else that is read, the frozen weights
    among it, is part of the trace, by reference.

    Attributes:
        traces: the shapes of each that there is, as `shapes_of`.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model, self._objective = model, objective
        self._functions: dict[type, Callable[..., Any]] = {}
        self._known: set[str] = set()
        self.traces: list[str] = []

    def _function(self, kind: type) -> Callable[..., Any]:
        # No method: what is compiled keeps what it reads, and a model that is done with should go at once.
        model, objective, traces = self._model, self._objective, self.traces

        def traced(params: dict[str, mx.array], arrays: dict[str, mx.array]) -> LossAndGradients:
            batch = MicroBatch(kind(**arrays), 0, 0)  # nothing else of it: the trace would keep it
            traces.append(shapes_of(batch))
            return gradient(model, objective, batch, PLAIN_SCALES, params)

        if kind not in self._functions:
            self._functions[kind] = mx.compile(traced)
        return self._functions[kind]

    def __call__(self, batch: MicroBatch) -> LossAndGradients:
        """As `gradient`, of terms that have one denominator.

        Raises:
            ModelError: the model reads numbers while it is computed, so that it cannot be traced.
        """
        key = shapes_of(batch)
        if key not in self._known:
            # Whatever is found out by trying (how a model is taken apart) must be known before: in a trace nothing
            # can be evaluated. The graph is thrown away, not computed.
            gradient(self._model, self._objective, batch, PLAIN_SCALES)
            self._known.add(key)
        function = self._function(type(batch.data))
        try:
            total, terms, grads = function(
                dict(tree_flatten(self._model.trainable_parameters())), arrays_of(batch.data)
            )
        except ValueError as error:
            if "function transformations" not in str(error):
                raise
            name = getattr(self._model, "model_type", type(self._model).__name__)
            why = "reads numbers while it is computed"
            raise ModelError(f"run.compile: {name} can not be compiled, it {why} ({error}); set it to off") from error
        return total, Terms(*terms), grads


class Gradients:
    """The gradients of a run: compiled for shapes that are seen again, up to TRACES of them; eager for all others.

    Args:
        aux: tune.router_aux.
        once: shapes that were seen once, oldest first; changed in place.
        again: those that are compiled; changed in place. Compiled and eager differ in the last bits, so a run that
            is resumed needs both lists as they were.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, aux: float | None, once: list[str], again: list[str]
    ) -> None:
        self._model, self._objective, self._aux, self._once, self._again = model, objective, aux, once, again
        self.compiled = CompiledGradient(model, objective) if objective.compiled else None

    def __call__(self, batch: MicroBatch, per: dict[str, float]) -> LossAndGradients:
        """As `gradient`, of a step of these denominators."""
        scales = scales_of(per, self._aux, batch.trained_tokens)
        whole = batch.trains is None and not scales.of
        if self.compiled is not None and whole and self._comes_again(shapes_of(batch)):
            return self.compiled(batch)
        return gradient(self._model, self._objective, batch, scales)

    def _comes_again(self, key: str) -> bool:
        if key in self._again:
            return True
        if len(self._again) == TRACES:
            return False
        if key in self._once:
            self._once.remove(key)
            self._again.append(key)
            return True
        self._once.append(key)
        del self._once[:-REMEMBERED]
        return False


def shapes_of(batch: MicroBatch) -> str:
    """Return a digest of the names, shapes and types of its arrays."""
    about = sorted((name, value.shape, str(value.dtype)) for name, value in arrays_of(batch.data).items())
    return blake2b(repr(about).encode(), digest_size=8).hexdigest()


# --- validate ---------------------------------------------------------------------------------------------------------
# Held-out loss and metrics: the whole set, the same each time, weighted by items.


def validate(model: nn.Module, objective: Objective) -> dict[str, Any]:
    """Loss and metrics over the validation set, {} if there is none. Dropout is off; randomness is left as it was.

    An objective may have a way of its own.
    """
    sums, per = Terms({}, {}), dict[str, float]()
    with probing(model):
        own = objective.evaluate(model)
        if own is not None:
            return own
        for step in objective.valid_steps(model):
            for batch in step.micro_batches:
                sums = sums.plus(as_trained(partial(objective.loss, model, batch.data)))
                mx.eval(sums)  # one micro-batch's activations at a time
            per = {name: per.get(name, 0.0) + count for name, count in step.per.items()}
    if not sums.losses:
        return {}
    first = next(iter(per.values()))
    loss = sum(float(value) / per[name] for name, value in sums.losses.items())
    return objective.validated({"loss": loss} | {k: float(v) / per.get(k, first) for k, v in sums.metrics.items()})


# --- loop -------------------------------------------------------------------------------------------------------------

MOST_PENDING = 64  # steps whose numbers stay on the device: each is a buffer, and Metal has a limit of those
ADVICE = (
    "What was saved before is intact. Try a lower optim.lr, a longer optim.warmup, a smaller optim.clip, "
    "model.dtype: float32, or look at the rows"
)


@dataclass
class Progress:
    """Where a run stands; with weights, optimiser and data position, all that exact resume needs."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    elapsed_s: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    skipped_batches: int = 0
    # Since the last report, so that reports are the same whether or not a run was interrupted between two.
    window: dict[str, float] = field(default_factory=dict)
    about: dict[str, float] = field(default_factory=dict)  # the newest event's numbers, which go into each report
    stopped_early: bool = False
    shapes_seen: list[str] = field(default_factory=list)  # of micro-batches: once, and to be compiled
    shapes_compiled: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass
class Hooks:
    """What the loop tells others: events, and that it is time to save."""

    event: Callable[[Event], None]
    checkpoint: Callable[[Progress], None]
    best: Callable[[Progress], None]
    samples: Callable[[Progress], None]


class Interrupt:
    """Ctrl-C and SIGTERM end the run after the step at hand; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Handle the signals inside the block."""

        def handle(signum: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        try:
            before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever started it handles signals
            before = {}
        try:
            yield
        finally:
            for s, old in before.items():
                signal.signal(s, old)


@dataclass
class _Made:
    """One update, not looked at yet: everything lazy.

    Attributes:
        total: over the denominator of the step's first term.
    """

    number: int
    total: mx.array
    metrics: dict[str, mx.array]
    per: dict[str, float]
    norms: dict[str, mx.array]
    lr: float
    tokens: int
    trained_tokens: int
    rows: tuple[str, ...]


class Loop:
    """Trains `model` by `objective` until `total_steps`, an early stop or an interrupt."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        config: Config,
        total_steps: int,
        progress: Progress,
        hooks: Hooks,
    ) -> None:
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.config, self.total_steps, self.progress, self.hooks = config, total_steps, progress, hooks
        self.gradients = Gradients(
            model, objective, config.tune.router_aux, progress.shapes_seen, progress.shapes_compiled
        )
        self._pending: list[_Made] = []
        self._started = time.perf_counter() - progress.elapsed_s
        self._reported = time.perf_counter()

    def run(self) -> bool:
        """Train. Returns False if it was interrupted (a checkpoint is saved then).

        Raises:
            TrainingError: a loss or gradient is NaN or infinite.
        """
        p, settings = self.progress, self.config.run
        self.model.train()
        interrupt = Interrupt()
        with interrupt.watch(), quicker(self.model):
            if settings.eval_at_start and p.step == 0:
                self._evaluate(candidate=False)
            steps = self.objective.steps(self.model)
            while p.step < self.total_steps and not p.stopped_early:
                step, ends_epoch = self._update(steps)
                p.step += 1
                p.tokens += step.tokens
                p.trained_tokens += step.trained_tokens
                self._pending.append(step)
                if len(self._pending) > 1:
                    # Wait for the step before: the device is kept busy by one step, never by a growing queue.
                    mx.eval(self._pending[-2].total)
                if len(self._pending) > MOST_PENDING:
                    self._look(self._pending[:-1])  # they are done
                last = p.step == self.total_steps
                if p.step % settings.report_every == 0 or last:
                    self._report()
                due = p.step % settings.eval_every == 0 if settings.eval_every else ends_epoch
                if due or last:
                    self._evaluate()
                stop = interrupt.asked
                if p.step % settings.save_every == 0 or last or stop or p.stopped_early:
                    self._save()
                if stop:
                    return False
        return True

    def _update(self, steps: Iterator[Step]) -> tuple[_Made, bool]:
        """Make the next step that has anything to train; those without are skipped and counted."""
        epochs = 0
        while True:
            step = next(steps)
            if step.event is not None:
                self._tell(step.event, step.before_s)
            batches = [b for b in step.micro_batches if b.trained_tokens or not b.tokens]
            self.progress.skipped_batches += len(step.micro_batches) - len(batches) if step.micro_batches else 1
            if batches and any(step.per.values()):
                return self._make(step, batches), step.ends_epoch
            epochs += step.ends_epoch
            if epochs == 2:
                raise TrainingError("no batch of a whole epoch has anything to train: see the rows with mlxft check")

    def _make(self, step: Step, batches: Sequence[MicroBatch]) -> _Made:
        """One optimiser update. Sums are added up over the micro-batches, and divided once by the whole step's items:
        micro-batches differ in them, and a mean of means would count a short row's tokens more than a long one's."""
        trained = sum(b.trained_tokens for b in batches)
        per = step.per if self.config.tune.router_aux is None else step.per | {AUX: float(trained)}
        grads: dict[str, mx.array] = {}
        total, sums = mx.array(0.0), Terms({}, {})
        for k, batch in enumerate(batches):
            part, terms, more = self.gradients(batch, per)
            total, sums = (total + part, sums.plus(terms)) if k else (part, terms)
            grads = summed(grads, more)
            # Together, and before anything else is asked for: what only one of them needs would keep the others'
            # activations alive.
            mx.async_eval(total, sums, grads)
            del more
        lr, first = self.rate(), next(iter(per.values()))
        norms = self.optimizer.step(self.model, grads, mx.array(first), lr)
        mx.async_eval(norms)
        if step.after is not None:
            step.after(sums, per)
        rows = tuple(row for batch in batches for row in batch.rows)
        tokens = sum(b.tokens for b in batches)
        return _Made(self.progress.step + 1, total, sums.metrics, per, norms, lr, tokens, trained, rows)

    def rate(self) -> float:
        """The next step's learning rate."""
        return learning_rate(self.config.optim, self.progress.step, self.total_steps)

    def _tell(self, event: Event, before_s: float) -> None:
        """Report what comes with a batch. It is the next step's: a resumed run that repeats it drops it and tells it
        again."""
        self._drain()
        self.progress.window["seconds"] -= before_s  # speed is of training alone
        self.hooks.event({**event, "step": self.progress.step + 1, "elapsed_s": self.progress.elapsed_s})
        self.progress.about = {k: v for k, v in event.items() if isinstance(v, (int, float))}

    def _drain(self) -> None:
        """Look at the steps since the last time: the only place where the loop waits for numbers.

        Raises:
            TrainingError: one is not finite.
        """
        self._look(self._pending)
        window, now = self.progress.window, time.perf_counter()
        window["seconds"] = window.get("seconds", 0.0) + now - self._reported
        self._reported = now
        self.progress.elapsed_s = now - self._started

    def _look(self, steps: list[_Made]) -> None:
        """Add the numbers of some pending steps, the oldest, to the window; TrainingError where one is not finite."""
        window = self.progress.window
        for step in steps:
            total, weight = float(step.total), next(iter(step.per.values()))
            norms = {k: float(v) for k, v in step.norms.items()}
            if not all(map(math.isfinite, (total, *norms.values()))):
                raise TrainingError(_not_finite(step, total, norms))
            sums = {"total": total, "weight": weight, **{f"sum:{k}": float(v) for k, v in step.metrics.items()}}
            sums |= {f"of:{k}": step.per.get(k, weight) for k in step.metrics}  # not every step need have all metrics
            for name, value in sums.items():
                known = window.get(name)
                window[name] = value if known is None else max(known, value) if name.endswith(MAX) else known + value
            window |= {"lr": step.lr, **{f"norm:{k}": v for k, v in norms.items()}}
            window["tokens"] = window.get("tokens", 0) + step.tokens
            window["trained"] = window.get("trained", 0) + step.trained_tokens
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
            "tokens_per_s": w["tokens"] / seconds,
            "trained_tokens_per_s": w["trained"] / seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "elapsed_s": p.elapsed_s,
        }
        if p.skipped_batches:
            event["skipped_batches"] = p.skipped_batches
        p.window = {}
        self.hooks.event(event)

    def _epochs(self) -> dict[str, float]:
        """Passes over the data so far, where the objective knows how many steps one has."""
        epoch, left = 0, self.progress.step
        while (size := self.objective.steps_per_epoch(epoch)) is not None and left >= size:
            epoch, left = epoch + 1, left - size
        return {} if size is None else {"epoch": round(epoch + left / size, 4)}

    def _evaluate(self, candidate: bool = True) -> None:
        """Validate and answer the sample prompts; the untrained model is no `candidate` for the best."""
        self._drain()
        p = self.progress
        began = time.perf_counter()
        found = validate(self.model, self.objective)
        samples = found.pop("samples", [])
        if found:
            better = (
                candidate
                and math.isfinite(found["loss"])
                and found["loss"] < (math.inf if p.best_loss is None else p.best_loss)
            )
            self.hooks.event({"event": "eval", "step": p.step, **found, "best": better, "elapsed_s": p.elapsed_s})
            p.evals_without_gain = 0 if better or not candidate else p.evals_without_gain + 1
            if better:
                p.best_loss, p.best_step = found["loss"], p.step
                self.hooks.best(p)
            patience = self.config.run.patience
            p.stopped_early = patience is not None and p.evals_without_gain >= patience
        for sample in samples:
            self.hooks.event({"event": "sample", "step": p.step, **sample})
        self.hooks.samples(p)
        self._pause(began)
        if p.stopped_early and p.window.get("weight"):
            self._report()  # the steps since the last one would go unreported

    def _save(self) -> None:
        self._drain()
        began = time.perf_counter()
        weights = tree_flatten(self.model.trainable_parameters())
        if not mx.stack([mx.isfinite(v).all() for _, v in weights]).all().item():
            # The loss would show it one step later, when the only good checkpoint might be gone.
            raise TrainingError(f"step {self.progress.step}: the update made weights infinite or NaN. {ADVICE}")
        self.hooks.checkpoint(self.progress)
        self._pause(began)

    def _pause(self, began: float) -> None:
        """Take the time since `began` out of the training time."""
        away = time.perf_counter() - began
        self._started += away
        self._reported += away


def loop_state(loop: Loop) -> dict[str, Any]:
    """What a checkpoint's state.json holds beside the arrays."""
    return {
        "progress": loop.progress.to_json(),
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
