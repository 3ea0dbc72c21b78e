"""The one loop. It pulls batches, adds up LossSums, divides once, updates; it never looks inside a batch."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.config import Config
from mlxft.errors import ModelError, TrainingError
from mlxft.model.cpu import as_trained, quicker
from mlxft.model.layers import probing, random_state, watching
from mlxft.objectives.base import MAX, Batch, LossSum, Objective
from mlxft.objectives.functional import load_balance
from mlxft.trainer.optim import Optimizer, learning_rate

# --- balance ----------------------------------------------------------------------------------------------------------
# The load-balancing loss of mixtures of experts, added to whatever an objective's loss is.


def balanced_loss(objective: Objective, model: nn.Module, batch: Batch, weight: float) -> LossSum:
    """The objective's loss with `weight` times the balance of its routers, mean over the layers that have one.

    Micro-batches are balanced each by itself, and count as much as their items do: the choice of experts has to be
    known of all tokens that are balanced together.

    Returns:
        The objective's LossSum; metric router_aux is the balance, 1 where tokens are spread evenly.
    """
    with watching(real_tokens(batch)) as seen:
        sums = objective.loss(model, batch)
    balance = mx.stack([load_balance(chosen, shares) for chosen, shares in seen.values()]).mean()
    added = balance * mx.stop_gradient(sums.weight)
    return LossSum(sums.total + weight * added, sums.weight, sums.metrics | {"router_aux": mx.stop_gradient(added)})


def real_tokens(batch: Batch) -> dict[tuple[int, ...], mx.array]:
    """Masks of a batch's tokens by the shape of what goes through the model: rows, or prompts and answers to them."""
    a = batch.arrays
    ids = a["ids"]
    if "prompts" in a:
        masks = [_before(a["prompts"], a["begins"]), _before(ids, a["lengths"])]
    else:
        masks = [_before(ids, a["last"] + 1 if "last" in a else mx.array(batch.lengths))]
    return {mask.shape: mask for mask in masks}


def _before(ids: mx.array, lengths: mx.array) -> mx.array:
    """(B, T), whether a token is one of its row's first `lengths`."""
    return mx.arange(ids.shape[1]) < lengths[:, None]


# --- gradient ---------------------------------------------------------------------------------------------------------
# A micro-batch's gradient: as the loss is written or, where shapes come again, by a function compiled for them.

TRACES = 16  # most shapes that a run compiles: each trace is a graph that stays in memory
REMEMBERED = 1024  # shapes that were seen once; where none comes again they would become as many as batches
Found = tuple[LossSum, dict[str, mx.array]]


def gradient(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    aux: float | None,
    params: dict[str, mx.array] | None = None,
) -> Found:
    """The sums of a micro-batch, and the gradient of their total in what it trains, by name.

    Args:
        aux: tune.router_aux.
        params: stand in for the model's own while it is traced.
    """

    def loss(params: dict[str, mx.array]) -> LossSum:
        model.update(tree_unflatten(list(params.items())))
        if aux is not None:
            return balanced_loss(objective, model, batch, aux)
        return objective.loss(model, batch)

    own = dict(tree_flatten(model.trainable_parameters()))
    if batch.trains is not None:
        own = {n: v for n, v in own.items() if batch.trains(n)}
    try:
        sums, grads = mx.value_and_grad(loss)(own if params is None else params)
    finally:
        model.update(tree_unflatten(list(own.items())))  # no tracers are left
    return sums, grads


def summed(grads: dict[str, mx.array], more: dict[str, mx.array]) -> dict[str, mx.array]:
    """The gradients of micro-batches so far, and those of one more."""
    # In float32: a sum in bfloat16 has 8 bits, and stands still at 256 times what is added to it.
    return grads | {n: grads[n].astype(mx.float32) + g if n in grads else g for n, g in more.items()}


class CompiledGradient:
    """`gradient` of an objective that is `traceable`, compiled: once for each set of shapes.

    What is trained goes in with the batch's arrays, since it changes. All else that is read, the frozen weights among
    it, is part of the trace, by reference.

    Attributes:
        traces: the shapes of each that there is, as `shapes_of`.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model, self._objective = model, objective
        self._known: set[str] = set()
        self.traces = traces = list[str]()

        # No method: what is compiled keeps what it reads, and a model that is done with should go at once.
        def traced(params: dict[str, mx.array], arrays: dict[str, mx.array]) -> Found:
            batch = Batch(arrays, 0, 0, ())  # nothing else of it: the trace would keep it for all that are to come
            traces.append(shapes_of(batch))
            return gradient(model, objective, batch, None, params)

        self._function: Callable[..., Any] = mx.compile(traced)

    def __call__(self, batch: Batch) -> Found:
        """As `gradient`.

        Raises:
            ModelError: the model reads numbers while it is computed, so that it can not be traced.
        """
        key = shapes_of(batch)
        if key not in self._known:
            # Whatever is found out by trying (how a model is taken apart) must be known before: in a trace nothing
            # can be evaluated. The graph is thrown away, not computed.
            gradient(self._model, self._objective, batch, None)
            self._known.add(key)
        try:
            found: Found = self._function(dict(tree_flatten(self._model.trainable_parameters())), batch.arrays)
        except ValueError as error:
            if "function transformations" not in str(error):
                raise
            name = getattr(self._model, "model_type", type(self._model).__name__)
            why = "reads numbers while it is computed"
            raise ModelError(f"run.compile: {name} can not be compiled, it {why} ({error}); set it to off") from error
        return found


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

    def __call__(self, batch: Batch) -> Found:
        """As `gradient`."""
        if self.compiled is not None and batch.trains is None and self._comes_again(shapes_of(batch)):
            return self.compiled(batch)
        return gradient(self._model, self._objective, batch, self._aux)

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


def shapes_of(batch: Batch) -> str:
    """A digest of the names, shapes and types of its arrays."""
    about = sorted((name, value.shape, str(value.dtype)) for name, value in batch.arrays.items())
    return blake2b(repr(about).encode(), digest_size=8).hexdigest()


# --- validate ---------------------------------------------------------------------------------------------------------
# Held-out loss and metrics: the whole set, the same each time, weighted by items.


def validate(model: nn.Module, objective: Objective) -> dict[str, Any]:
    """Loss and metrics over the validation set, {} if there is none. Dropout is off; randomness is left as it was.

    An objective may have a way of its own.
    """
    sums: LossSum | None = None
    with probing(model):
        own = objective.evaluate(model)
        if own is not None:
            return own
        for batch in objective.valid_batches(model):
            part = as_trained(partial(objective.loss, model, batch))
            sums = part if sums is None else sums.plus(part)
            mx.eval(sums)  # one batch's activations at a time
    if sums is None:
        return {}
    weight = float(sums.weight)
    means = {"loss": float(sums.total) / weight} | {k: float(v) / weight for k, v in sums.metrics.items()}
    return objective.validated(means)


# --- loop -------------------------------------------------------------------------------------------------------------

Event = dict[str, Any]
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
class _Step:
    """One update, not looked at yet: everything lazy."""

    number: int
    sums: LossSum
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
        self._pending: list[_Step] = []
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
            batches = self.objective.batches(self.model)
            while p.step < self.total_steps and not p.stopped_early:
                step, ends_epoch = self._update(batches)
                p.step += 1
                p.tokens += step.tokens
                p.trained_tokens += step.trained_tokens
                self._pending.append(step)
                if len(self._pending) > 1:
                    # Wait for the step before: the device is kept busy by one step, never by a growing queue.
                    mx.eval(self._pending[-2].sums.total)
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

    def _update(self, batches: Iterator[Batch], barren: bool = False) -> tuple[_Step, bool]:
        """One optimiser update over up to `accumulate` micro-batches; a step ends with its epoch."""
        grads: dict[str, mx.array] = {}
        sums: LossSum | None = None
        tokens, trained, ends = 0, 0, False
        rows: tuple[str, ...] = ()
        taken, whole = 0, False
        while not whole and not ends:
            batch = next(batches)
            ends = batch.ends_epoch
            if batch.event is not None:
                self._tell(batch.event, batch.before_s)
            if batch.trained_tokens == 0:
                self.progress.skipped_batches += 1
                continue
            part, more = self.gradients(batch)
            sums = part if sums is None else sums.plus(part)
            grads = summed(grads, more)
            # Together, and before anything else is asked for: what only one of them needs would keep the others'
            # activations alive.
            mx.async_eval(sums, grads)
            del more
            taken += 1
            whole = taken == self.config.batch.accumulate if batch.ends_step is None else batch.ends_step
            if batch.counts:
                tokens, trained, rows = tokens + batch.tokens, trained + batch.trained_tokens, rows + batch.rows
        if sums is None:
            if barren:
                raise TrainingError("no batch of a whole epoch has anything to train: see the rows with mlxft check")
            return self._update(batches, barren=True)  # an epoch's last micro-batches held nothing to train
        lr = self.rate()
        norms = self.optimizer.step(self.model, grads, sums.weight, lr)
        mx.async_eval(norms)
        self.objective.stepped(sums)
        return _Step(self.progress.step + 1, sums, norms, lr, tokens, trained, rows), ends

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

    def _look(self, steps: list[_Step]) -> None:
        """Add the numbers of some pending steps, the oldest, to the window; TrainingError where one is not finite."""
        window = self.progress.window
        for step in steps:
            total, weight = float(step.sums.total), float(step.sums.weight)
            norms = {k: float(v) for k, v in step.norms.items()}
            if not all(map(math.isfinite, (total, *norms.values()))):
                raise TrainingError(_not_finite(step, total, norms))
            sums = {"total": total, "weight": weight, **{f"sum:{k}": float(v) for k, v in step.sums.metrics.items()}}
            sums |= {f"of:{k}": weight for k in step.sums.metrics}  # not every step need have all metrics
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
            "epoch": round(self._epochs(), 4),
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

    def _epochs(self) -> float:
        """Passes over the data so far."""
        epoch, left = 0, self.progress.step
        while left >= (size := self.objective.steps_per_epoch(self.config.batch.accumulate, epoch)):
            epoch, left = epoch + 1, left - size
        return epoch + left / size

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


def _not_finite(step: _Step, total: float, norms: dict[str, float]) -> str:
    wrong = next(((k, v) for k, v in norms.items() if not math.isfinite(v)), ("grad_norm", 0.0))
    what = f"the loss is {total}" if not math.isfinite(total) else f"the gradient's norm ({wrong[0]}) is {wrong[1]}"
    shown = ", ".join(step.rows[:8]) + (f" and {len(step.rows) - 8} more" if len(step.rows) > 8 else "")
    return f"step {step.number}: {what}. Rows: {shown}. {ADVICE}"
