"""One real step of the largest batch, before training: what it takes decides where a plan only predicts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.config import Config
from mlxft.device import FAILURES, backend, gpu_failure, machine_bytes, usable_bytes
from mlxft.doctor import CROWDED, swap_bytes
from mlxft.errors import ConfigError, ModelError
from mlxft.model.cpu import quicker
from mlxft.model.memory import checkpoint_layers, is_checkpointed, limits
from mlxft.model.plan import CHECKPOINT_ABOVE
from mlxft.model.random import probing
from mlxft.objectives.base import Batch
from mlxft.planning import amount, room_of, why_eager
from mlxft.train.gradient import CompiledGradient, Found, gradient, summed
from mlxft.train.optim import Optimizer

ALL = 1 << 62  # bytes of a step that no memory was left for
TIMED = 4  # gradients, after the first, which makes caches and kernels
QUICKER = 0.95  # share of the eager gradient's time below which the compiled one is taken: above lies noise


def settle_by_measure(config: Config, model: nn.Module, objective: Any, optimizer: Optimizer) -> list[str]:
    """Measure a step, and settle by it what is left open: gradient checkpointing, where it takes too much, and on a
    GPU whether the loop compiles (`objective.compiled`).

    Returns:
        What there is to say of it; nothing where the objective's batches are not known before it runs.
    Raises:
        ConfigError: it takes more than `memory.limit`, or than this machine has.
        ModelError: the model can not be compiled, and `run.compile` asks for it.
    """
    eager = why_eager(config, model, objective)
    objective.compiled = config.run.compile == "on"
    if not config.memory.measure or not hasattr(objective, "largest"):
        return []
    taken = measured_bytes(config, model, objective, optimizer)
    room, open_ = usable_bytes(config.memory.limit), config.memory.checkpoint == "auto"
    most = min(room, machine_bytes() * CHECKPOINT_ABOVE)
    if open_ and not is_checkpointed(model) and taken is not None and taken > most:
        checkpoint_layers(model)
        taken = measured_bytes(config, model, objective, optimizer)
    if taken is None:
        return []
    if taken > room:
        takes = "found no room" if taken == ALL else f"takes {amount(taken)}"
        raise ConfigError(f"a step {takes}; {room_of(config)}. What helps: {FAILURES['memory'][1]}")
    on = "; gradient checkpointing is on" if is_checkpointed(model) else ""
    notes = [f"measured peak memory: {amount(taken)}, of a step of the largest batch{on}"]
    # Not on a CPU: 0.84 to 0.92 of the eager time (llamas of 8 and 30 layers, float32), but a C++ compiler makes the
    # kernels, some 20 s the first time.
    if config.run.compile == "auto" and backend() != "cpu":
        notes.append(eager or _settle_compiling(config, model, objective, optimizer, room))
    return notes


def _settle_compiling(config: Config, model: nn.Module, objective: Any, optimizer: Optimizer, room: int) -> str:
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
    with probing(model, training=True), quicker(model), limits(config.memory.limit, config.memory.cache):
        batch, compute = objective.largest(model), _computing(config, model, objective)
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
    """Peak of a step of the largest batch, weights included; None if there is no batch to take.

    Its gradient is thrown away, and the random state is afterwards as it was. Without memory for it, all there is.
    """
    try:
        with probing(model, training=True), quicker(model), limits(config.memory.limit, config.memory.cache):
            batch = objective.largest(model)
            if batch is None:
                return None
            held = [model.parameters(), optimizer.arrays(), batch.arrays]
            mx.eval(held)
            mx.clear_cache()
            mx.reset_peak_memory()
            # What else stands in this process is not this run's.
            others = max(0, mx.get_active_memory() - sum(v.nbytes for _, v in tree_flatten(held)))
            grads: dict[str, mx.array] = {}
            compute = _computing(config, model, objective)
            for _ in range(min(2, config.batch.accumulate)):  # the second stands for all further ones
                sums, more = compute(batch)
                grads = summed(grads, more)
                mx.async_eval(sums, grads)  # as the loop does
                del more
            mx.eval(sums, grads)
            # The update holds the square of the largest parameter for the norm, and what it makes anew.
            largest = max((v.size for _, v in tree_flatten(model.trainable_parameters())), default=0)
            update = mx.get_active_memory() + 4 * largest + optimizer.renewed(model)
            return max(mx.get_peak_memory(), update) - others
    except (RuntimeError, MemoryError) as error:
        if gpu_failure(error) != "memory":
            raise
        mx.clear_cache()
        return ALL
