"""One real step of the largest batch, before training: what it takes decides where a plan only predicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.config import Config
from mlxft.device import CROWDED, FAILURES, backend, gpu_failed, gpu_failure, machine_bytes, swap_bytes, usable_bytes
from mlxft.errors import ConfigError, ModelError
from mlxft.model.cpu import quicker
from mlxft.model.memory import checkpoint_layers, is_checkpointed, limits
from mlxft.model.plan import CHECKPOINT_ABOVE
from mlxft.model.random import probing
from mlxft.objectives.base import Batch, MakesStep
from mlxft.objectives.onpolicy import memory as onpolicy
from mlxft.objectives.onpolicy.base import OnPolicy
from mlxft.planning import LEAST_TOKENS, MOST_TOKENS, amount, batch_shapes, room_of, why_eager, with_tokens
from mlxft.trainer.gradient import CompiledGradient, Found, gradient, summed
from mlxft.trainer.optim import Optimizer

ALL = 1 << 62  # bytes of a step that no memory was left for
MEASURED = 5  # times, at most, that a step is measured for batch.tokens: auto
TIMED = 4  # gradients, after the first, which makes caches and kernels
QUICKER = 0.95  # share of the eager gradient's time below which the compiled one is taken: above lies noise
FILLED = 0.95  # of the room is what it aims at: the run agrees with what was measured within a few percent
ENOUGH = 1.15  # times as many tokens would fit: below that, they are not tried
OVER = 1.05  # times a limit: MLX works ahead until it is reached, and a little beyond, before it waits


def settle_by_measure(
    config: Config, model: nn.Module, objective: Any, optimizer: Optimizer, taken: int | None = None
) -> list[str]:
    """Measure a step, and settle by it what is left open: gradient checkpointing, where it takes too much, and on a
    GPU whether the loop compiles (`objective.compiled`).

    Args:
        taken: what it takes, where that was measured already.
    Returns:
        What there is to say of it; nothing where the objective's batches are not known before it runs.
    Raises:
        ConfigError: it takes more than `memory.limit`, or than this machine has.
        ModelError: the model can not be compiled, and `run.compile` asks for it.
    """
    eager = why_eager(config, model, objective)
    objective.compiled = config.run.compile == "on"
    if not config.memory.measure or not _measurable(objective):
        return []
    taken = measured_bytes(config, model, objective, optimizer) if taken is None else taken
    room = room_of_all(config)
    if taken is not None and taken > room_for_step(config, model):
        checkpoint_layers(model)
        taken = measured_bytes(config, model, objective, optimizer)
    if taken is None:
        return []
    if taken > room:
        raise ConfigError(_too_much(config, taken))
    on = "; gradient checkpointing is on" if is_checkpointed(model) else ""
    beside = "; sampling is by the plan" if isinstance(objective, OnPolicy) else ""
    notes = [f"measured peak memory: {amount(taken)}, of a step of the largest batch{on}{beside}"]
    # Not on a CPU: 0.84 to 0.92 of the eager time (llamas of 8 and 30 layers, float32), but a C++ compiler makes the
    # kernels, some 20 s the first time.
    if config.run.compile == "auto" and backend() != "cpu":
        notes.append(eager or _settle_compiling(config, model, objective, optimizer, room))
    return notes


def _measurable(objective: Any) -> bool:
    return isinstance(objective, OnPolicy) or hasattr(objective, "largest")


def room_of_all(config: Config) -> float:
    """Bytes that training may be measured to take."""
    return OVER * usable_bytes(config.memory.limit)


def room_for_step(config: Config, model: nn.Module) -> float:
    """Bytes that a step may take with the blocks as they are: beyond a share of the machine they are checkpointed,
    where that is left open."""
    room = room_of_all(config)
    if config.memory.checkpoint != "auto" or is_checkpointed(model):
        return room
    return min(room, machine_bytes() * CHECKPOINT_ABOVE)


def fit_tokens(
    config: Config, model: nn.Module, objective: Any, optimizer: Optimizer
) -> tuple[Config, int | None, list[str]]:
    """Correct what the plan has made of `batch.tokens: auto` by what the largest batch takes; the objective's batches
    are made by it from then on.

    Returns:
        The recipe with the number; what was measured with it, None if nothing was; what to say of it.
    """
    objective.compiled = config.run.compile == "on"
    tokens, tried, said = config.batch.budget, dict[int, int](), list[str]()
    if not (_measurable(objective) and hasattr(objective, "rebatch")):
        return config, None, [f"batch.tokens: auto is {tokens:,}: objective {config.objective} has no step to measure"]
    for _ in range(MEASURED):
        config = _rebatched(config, objective, tokens)
        taken = measured_bytes(config, model, objective, optimizer)
        if taken is None:
            return config, None, [f"batch.tokens: auto is {tokens:,}: there is no batch to measure"]
        tried[tokens] = taken
        said.append(f"{tokens:,} takes {'more than there is' if taken == ALL else amount(taken)}")
        most = room_for_step(config, model)
        largest = max(shape.rows * shape.width for shape in batch_shapes(objective))
        wanted = _corrected(tokens, largest, taken, most, _lasting(model, optimizer))
        open_ = config.memory.checkpoint == "auto" and not is_checkpointed(model)
        if open_ and taken > most and wanted < LEAST_TOKENS:
            checkpoint_layers(model)  # rather than smaller batches
            tried.clear()
            said[-1] += ", and less with gradient checkpointing"
        elif wanted in tried:
            break
        else:
            tokens = wanted
    fitting = [n for n, taken in tried.items() if taken <= most]
    tokens = max(fitting, default=min(tried, default=tokens))
    note = f"batch.tokens: auto is {tokens:,}, by measured steps with room for {amount(most)}: {'; '.join(said)}"
    return _rebatched(config, objective, tokens), tried.get(tokens), [note]


def _rebatched(config: Config, objective: Any, tokens: int) -> Config:
    """The recipe with this batch.tokens, by which the objective makes its batches from then on."""
    if tokens != config.batch.budget:
        config = with_tokens(config, tokens)
        objective.rebatch(config)
    return config


def _corrected(tokens: int, largest: int, taken: int, most: float, lasting: int) -> int:
    """The batch.tokens to try next; the same where it is good.

    Args:
        largest: tokens of the largest batch that was made of `tokens`, padding included.
        taken: what its step takes, of `most`.
        lasting: bytes of it that do not grow with the batch.
    """
    if taken == ALL:
        return max(64, tokens // 4)
    share = (FILLED * most - lasting) / max(1, taken - lasting)
    if taken <= most and (share < ENOUGH or 2 * largest < tokens):  # there may be no larger batch
        return tokens
    found = int(min(max(share, 1 / 16), 16) * largest) // 64 * 64
    return max(64, min(found, MOST_TOKENS))


def _lasting(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of weights, gradients and the optimiser."""
    arrays = tree_flatten([model.parameters(), model.trainable_parameters(), optimizer.arrays()])
    return sum(v.nbytes for _, v in arrays)


def _too_much(config: Config, taken: int) -> str:
    takes = "found no room" if taken == ALL else f"takes {amount(taken)}"
    return f"a step {takes}; {room_of(config)}. What helps: {FAILURES['memory'][1]}"


def _settle_compiling(config: Config, model: nn.Module, objective: Any, optimizer: Optimizer, room: float) -> str:
    """Compile where the largest batch's gradient is quicker so, and its step fits into `room`. Returns what to say."""
    objective.compiled = True
    try:
        taken = measured_bytes(config, model, objective, optimizer)
        if taken is not None and taken <= room:
            eager, compiled = (gradient_seconds(config, model, objective, on) for on in (False, True))
            objective.compiled = compiled < QUICKER * eager
            said = f"{'' if objective.compiled else 'not '}compiled where shapes come again"
            return f"the step is {said}: its gradient took {compiled:.3g} s so, {eager:.3g} s eager"
        said = f"the step is not compiled: it would take {amount(taken or 0)}"
    except (ModelError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ModelError) and gpu_failure(error) != "memory":
            raise
        said = f"the step is not compiled: {error}"
    objective.compiled = False
    return said


def gradient_seconds(config: Config, model: nn.Module, objective: Any, compiled: bool) -> float:
    """Seconds of a gradient of the largest batch, of several in a row; the random state is afterwards as it was."""
    objective.compiled = compiled  # its batches are filled up then
    with _probed(config, model):
        (batch, *_), compute = objective.largest(model)[0](), _computing(config, model, objective)
        mx.eval(compute(batch))
        began, before = time.perf_counter(), mx.array(0.0)
        for _ in range(TIMED):
            sums, grads = compute(batch)
            mx.async_eval(sums, grads)
            del grads
            mx.eval(before)  # as the loop does: while one is computed the next is made
            before = sums.total
        mx.eval(before)
        mx.synchronize()
        return (time.perf_counter() - began) / TIMED


def _computing(config: Config, model: nn.Module, objective: Any) -> Callable[[Batch], Found]:
    """`gradient` as the loop has it for shapes that come again."""
    if objective.compiled:
        return CompiledGradient(model, objective)
    return lambda batch: gradient(model, objective, batch, config.tune.router_aux)


def crowded(config: Config) -> list[str]:
    """What there is to warn of before training: swap in use, and a limit above what the system recommends."""
    limit, lent = config.memory.limit, usable_bytes()
    notes = (
        []
        if limit is None or limit * 1e9 <= lent
        else [f"warning: memory.limit is above the {amount(lent)} that this machine lends"]
    )
    used = swap_bytes()
    return notes + (
        [f"warning: {amount(used)} of swap are in use: close what crowds the memory"] if used > CROWDED else []
    )


def measured_bytes(config: Config, model: nn.Module, objective: Any, optimizer: Optimizer) -> int | None:
    """Peak of training on the batches that may take most, weights included; None if there is none to take.

    It is two steps as the loop makes them, with a learning rate of 0: weights, random state and the objective's state
    are afterwards as they were, and the optimiser begins anew. Without memory for them, all there is.

    Raises:
        ConfigError: no memory was left amid an update, when it is not known what has become of the weights.
        TrainingError: macOS has ended the GPU's work.
    """
    try:
        with _probed(config, model):
            steps = onpolicy.largest(objective) if isinstance(objective, OnPolicy) else objective.largest(model)
            return max((_peak(config, model, objective, optimizer, step) for step in steps), default=None)
    except (RuntimeError, MemoryError) as error:
        if gpu_failure(error) != "memory":
            raise
        mx.clear_cache()
        return ALL


@contextmanager
def _probed(config: Config, model: nn.Module) -> Iterator[None]:
    """The model inside the block is as the loop has it, and what macOS ends there is told as it is of the loop."""
    try:
        with probing(model, training=True), quicker(model), limits(config.memory.limit, config.memory.cache):
            yield
    except RuntimeError as error:
        if gpu_failure(error) != "watchdog":
            raise
        raise gpu_failed("watchdog", "in a step that is measured before training") from error


def _peak(config: Config, model: nn.Module, objective: Any, optimizer: Optimizer, step: MakesStep) -> int:
    """Peak of two steps in a row, without what else stands in this process."""
    held = [model.parameters(), optimizer.arrays(), objective.held()]
    mx.eval(held)
    mx.clear_cache()
    mx.reset_peak_memory()
    own = {id(v): v.nbytes for _, v in tree_flatten(held)}  # a critic may begin as the policy's very arrays
    others = max(0, mx.get_active_memory() - sum(own.values()))
    del held
    compute = _computing(config, model, objective)
    sums, grads = _gradients(compute, step())
    mx.eval(sums, grads)
    # A rate of 0 times what is not finite would be no 0; the run ends at such a step.
    if all(mx.isfinite(g.square().sum()).item() for g in grads.values()):
        try:
            mx.async_eval(optimizer.step(model, grads, mx.array(1.0), 0.0))
            # The next step's forward pass begins while old and new parameters stand side by side.
            sums, grads = _gradients(compute, step())
            mx.async_eval(optimizer.step(model, grads, mx.array(1.0), 0.0))
            mx.eval(sums, model.parameters(), optimizer.arrays())
        except (RuntimeError, MemoryError) as error:
            if gpu_failure(error) != "memory":
                raise
            raise ConfigError(_too_much(config, ALL)) from error
        finally:
            optimizer.begin(model)
    return mx.get_peak_memory() - others


def _gradients(compute: Callable[[Batch], Found], batches: Iterator[Batch]) -> Found:
    """Sums and gradients of a step's micro-batches, on their way as the loop has them."""
    grads: dict[str, mx.array] = {}
    for batch in batches:
        sums, more = compute(batch)
        grads = summed(grads, more)
        mx.async_eval(sums, grads)
        del more
    return sums, grads
