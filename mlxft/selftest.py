"""mlxft selftest: what training is made of, computed by this machine's device and held against float32 on the CPU."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxft import __version__
from mlxft.device import NAMES, backend
from mlxft.doctor import examine
from mlxft.errors import MlxftError
from mlxft.export.fuse import fuse
from mlxft.model.cpu import cross_entropy
from mlxft.model.delta import gated_delta
from mlxft.model.tiny import write_tiny
from mlxft.planning import base_skeleton, batch_shapes, plan_batches
from mlxft.recipe import parse_config
from mlxft.run import load, make_objective, train
from mlxft.text import make_console, parse_json

Arrays = list[mx.array]
# Largest difference, as a share of the largest number: of float32, which GPUs multiply in fewer bits, and of bfloat16.
FLOAT, HALF = 5e-3, 4e-2
LOSSES = 2e-2  # of the losses of a few steps, as a share
PLANNED = 0.2  # between what a plan says of memory, and what is measured
STEPS = 4


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        found, allowed: the largest difference, as a share.
        error: what went wrong, where it is not a difference.
    """

    name: str
    found: float = 0.0
    allowed: float = 0.0
    error: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all is as it should be; a NaN is not."""
        return not self.error and self.found <= self.allowed


def selftest(tell: Callable[[Check], object] = lambda check: None) -> list[Check]:
    """Run all checks; each is told when it is done."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, allowed, work in [*_operations(), *_trainings(Path(folder))]:
            began = time.perf_counter()
            try:
                check = Check(name, float(work()), allowed)
            except (MlxftError, RuntimeError, ValueError, TypeError, subprocess.SubprocessError) as error:
                check = Check(name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            found.append(Check(**{**asdict(check), "seconds": time.perf_counter() - began}))
            tell(found[-1])
    return found


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """As JSON, for an issue report."""
    lines = [{**asdict(c), "passed": c.passed} for c in checks]
    machine = {f.name: f.value for f in examine(Path())}
    return {"mlxft": __version__, "device": NAMES[backend()], "machine": machine, "checks": lines}


def _difference(ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> float:
    """Of each pair of arrays the largest, as a share of the largest number; of all pairs the worst."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        a, b = (np.array(x.astype(mx.float32)) for x in (one, other))
        share = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))
        worst = share if not share <= worst else worst  # a NaN stays
    return worst


def _compare(function: Callable[..., mx.array], arrays: Arrays, dtype: mx.Dtype, reference: Any = None) -> float:
    """Value and gradient on the device, against `reference`'s (default: its own) in float32 on the CPU."""

    def both(of: Callable[..., mx.array], given: Arrays) -> Arrays:
        weights = mx.random.normal(of(*given).shape, key=mx.random.key(9))

        def total(*a: mx.array) -> mx.array:
            return (of(*a).astype(mx.float32) * weights).sum()

        real = [i for i, a in enumerate(given) if mx.issubdtype(a.dtype, mx.floating)]
        slopes: Any = mx.grad(total, argnums=real)(*given)
        out = [of(*given), *slopes]
        mx.eval(out)
        return out

    def cast(kind: mx.Dtype) -> Arrays:
        return [a.astype(kind) if mx.issubdtype(a.dtype, mx.floating) else a for a in arrays]

    mx.eval(arrays)
    with mx.stream(mx.cpu):
        wanted = both(reference or function, [a.astype(mx.float32) if a.dtype == dtype else a for a in cast(dtype)])
    return _difference(both(function, cast(dtype)), wanted)


def _draw(*shapes: Sequence[int]) -> Arrays:
    with mx.stream(mx.cpu):
        return [mx.random.normal(tuple(shape), key=mx.random.key(i)) for i, shape in enumerate(shapes)]


def _operations() -> Iterator[tuple[str, float, Callable[[], float]]]:
    """Name, what is allowed, and the work of each operation of a step."""
    for dtype, allowed in ((mx.float32, FLOAT), (mx.bfloat16, HALF)):
        kind = str(dtype).rpartition(".")[2]
        for width in (64, 128):
            yield f"attention of heads {width} wide, {kind}", allowed, partial(_attention, dtype, width)
        yield f"4-bit product, {kind}", 2 * allowed, partial(_quantized, dtype)
        if dtype == mx.float32 or backend() != "cpu":  # MLX's CPU has this one in float32 only
            yield f"experts' product, {kind}", allowed, partial(_experts, dtype)
        yield f"cross entropy of 50,000 words, {kind}", allowed, partial(_entropy, dtype)
    yield "gated delta rule", FLOAT, _delta


def _attention(dtype: mx.Dtype, width: int) -> float:
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask="causal")

    return _compare(attend, _draw((2, 4, 256, width), (2, 2, 256, width), (2, 2, 256, width)), dtype)


def _quantized(dtype: mx.Dtype) -> float:
    x, w = _draw((64, 512), (384, 512))
    with mx.stream(mx.cpu):
        q, scales, biases = mx.quantize(w.astype(dtype), 64, 4)
        whole = mx.dequantize(q, scales.astype(mx.float32), biases.astype(mx.float32), 64, 4)

    def product(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, q, scales, biases, True, 64, 4)

    return _compare(product, [x], dtype, lambda x: x @ whole.T)


def _experts(dtype: mx.Dtype) -> float:
    x, w = _draw((32, 1, 1, 256), (8, 256, 128))
    chosen = mx.array(np.random.default_rng(0).integers(0, 8, (32, 2)).astype(np.uint32))

    def product(x: mx.array, w: mx.array) -> mx.array:
        return mx.gather_mm(x, w, rhs_indices=chosen)

    return _compare(product, [x, w], dtype, lambda x, w: x @ w[chosen])


def _entropy(dtype: mx.Dtype) -> float:
    hidden, head = _draw((32, 256), (50_000, 256))
    labels = mx.array(np.random.default_rng(0).integers(0, 50_000, 32))

    def plain(h: mx.array, w: mx.array) -> mx.array:
        logits = h @ (w.T * 0.1)
        return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

    return _compare(lambda h, w: cross_entropy(h @ (w.T * 0.1), labels), [hidden, head], dtype, plain)


def _delta() -> float:
    from mlx_lm.models.gated_delta import gated_delta_ops

    q, k, v, g, beta = _draw((1, 200, 16, 128), (1, 200, 16, 128), (1, 200, 32, 128), (1, 200, 32), (1, 200, 32))
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True, stream=mx.cpu)

    def by(update: Callable[..., Any]) -> Callable[..., mx.array]:
        return lambda q, k, v, g, b: update(q, k, v, mx.sigmoid(g + 2), mx.sigmoid(b), None)[0]

    return _compare(by(gated_delta), [q, k, v, g, beta], mx.float32, by(gated_delta_ops))


def recipe(folder: Path, objective: str, name: str, **more: Any) -> dict[str, Any]:
    """A few steps on the tiny model."""
    form = {"sft": "messages", "preference": "preference", "ppo": "prompts"}[objective]
    made: dict[str, Any] = {
        "objective": objective,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "tune": {"rank": 4},
        "data": {"train": str(folder / f"{form}.jsonl"), "format": form, "cache": False},
        "run": {"name": name, "dir": str(folder / "runs"), "steps": STEPS, "report_every": 1, "keep_awake": False},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0},
        "batch": {"rows": 4},
    }
    if objective == "ppo":
        made |= {"rollout": {"prompts": 4, "max_tokens": 8}, "ppo": {"epochs": 1, "minibatches": 1}}
        made |= {"rewards": {"rules": [{"kind": "regex", "pattern": "[a-z]"}]}, "batch": {}}
    for key, value in more.items():
        section, _, setting = key.partition("__")
        made[section][setting] = value
    return made


def losses(settings: dict[str, Any]) -> list[float]:
    """Train, and tell the losses of the steps."""
    run = train(settings, overwrite=True, console=make_console(file=io.StringIO()))
    return [float(event["loss"]) for event in run.metrics("train")]


# What the reference runs, in a process of its own: this one's device is its user's.
ON_CPU = """
import json, sys
import mlxft, mlx.core as mx
mx.set_default_device(mx.cpu)
from mlxft.selftest import losses
print(json.dumps([losses(settings) for settings in json.loads(sys.stdin.read())]))
"""


def _trainings(folder: Path) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """Name, what is allowed, and the work of each training."""
    compared = {
        "SFT against the CPU": recipe(folder, "sft", "sft"),
        "DPO against the CPU": recipe(folder, "preference", "dpo"),
        "SFT compiled against the CPU": recipe(folder, "sft", "compiled", batch__rows=16, run__compile="on"),
        "SFT in bfloat16 against float32": recipe(folder, "sft", "half", model__dtype="bfloat16"),
    }
    known: dict[str, list[float]] = {}

    def prepare() -> float:
        write_tiny(folder)
        on_cpu = [
            {**s, "run": {**s["run"], "name": f"{s['run']['name']}-cpu", "compile": "off"}} for s in compared.values()
        ]
        on_cpu = [{**s, "model": {**s["model"], "dtype": "float32"}} for s in on_cpu]
        command = [sys.executable, "-c", ON_CPU]
        done = subprocess.run(command, input=json.dumps(on_cpu), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        known.update(zip(compared, parse_json(done.stdout.strip().splitlines()[-1])))
        return 0.0

    def against(name: str) -> float:
        ours, theirs = losses(compared[name]), known[name]
        return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

    yield "a tiny model, and its losses on the CPU", 0.0, prepare
    for name in compared:
        yield name, LOSSES, partial(against, name)
    yield "DPO in bfloat16 begins at ln 2", FLOAT, partial(_begins, folder)
    yield "PPO: the ratio of sampling and training is 1", FLOAT, partial(_ppo, folder)
    yield "a resumed run is the run", FLOAT if backend() != "cpu" else 0.0, partial(_resumed, folder)
    yield "a fused model answers as the adapter", FLOAT, partial(_fused, folder)
    yield "memory measured against planned", PLANNED, partial(_memory, folder)


def _begins(folder: Path) -> float:
    first = losses(recipe(folder, "preference", "begins", model__dtype="bfloat16"))[0]
    return abs(first - math.log(2)) / math.log(2)


def _ppo(folder: Path) -> float:
    settings = recipe(folder, "ppo", "ppo")
    run = train(settings, overwrite=True, console=make_console(file=io.StringIO()))
    events = run.metrics("train")
    if not any(e["grad_norm"] > 0 for e in events):
        raise RuntimeError("no completion was better than another: nothing was learnt")
    return max(abs(e[name] - 1.0) for e in events for name in ("ratio_mean", "ratio_max"))


def _resumed(folder: Path) -> float:
    """Two steps, and two more after a resume, against four at once."""
    settings = recipe(folder, "sft", "whole")
    quiet = make_console(file=io.StringIO())
    whole = train(settings, overwrite=True, console=quiet)
    parted = recipe(folder, "sft", "parted", run__save_every=2)

    class Interrupt:
        def event(self, event: dict[str, Any]) -> None:
            if event["event"] == "train" and event["step"] == 3:
                raise KeyboardInterrupt

        def close(self) -> None:
            pass

    with suppress(KeyboardInterrupt):
        train(parted, overwrite=True, console=quiet, sinks=[Interrupt()])
    again = train(parted, resume=True, console=quiet)
    one, other = (mx.load(str(run.result / "adapters.safetensors")) for run in (again, whole))
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    return _difference([one[n] for n in sorted(one)], [other[n] for n in sorted(other)])


def _fused(folder: Path) -> float:
    run = folder / "runs" / "sft"
    fuse(run, folder / "fused", force=True, overwrite=True)
    ids = mx.array([[1, 5, 9, 20, 30]])
    adapted, fused = load(run), load(folder / "fused")
    return _difference([fused.model(ids)], [adapted.model(ids)])


def _memory(folder: Path) -> float:
    settings = recipe(folder, "sft", "memory", batch__rows=16)
    config = parse_config(settings)
    before = mx.get_active_memory()
    run = train(settings, overwrite=True, console=make_console(file=io.StringIO()))
    objective = make_objective(config, load(run).tokenizer)
    plan = plan_batches(config, base_skeleton(config), batch_shapes(objective))[0]
    measured = max(e["peak_memory_gb"] for e in run.metrics("train")) * 1e9 - before
    return abs(plan.total - measured) / measured
