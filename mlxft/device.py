"""The machine that MLX computes on: its backend, the memory it lends, what kills long work there, and what helps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Literal

from mlxft.blas import read_or_nothing
from mlxft.errors import MlxftError, TrainingError

CROWDED = 1e9  # bytes of swap in use from which on the memory is short

Backend = Literal["metal", "cuda", "cpu"]
NAMES: dict[Backend, str] = {"metal": "a Mac's GPU", "cuda": "an NVIDIA GPU", "cpu": "a CPU"}
Failure = Literal["memory", "watchdog"]
# What has happened, and what helps where it was in training.
FAILURES: dict[Failure, tuple[str, str]] = {
    "memory": (
        "out of memory",
        (
            "a smaller batch.tokens (with batch.accumulate for the same step), memory.checkpoint: on, and "
            "model.quantize: 4 or a shorter data.max_length; mlxft check shows what each saves"
        ),
    ),
    "watchdog": (
        "macOS has ended the GPU's work, since it kept the display waiting",
        (
            "a smaller batch.tokens (with batch.accumulate for the same step), or to let the display sleep (Control, "
            "Shift and Eject or Power) while it trains"
        ),
    ),
}

UNKNOWN = 1 << 60  # bytes of a machine that is not this one
# macOS ends a kernel that keeps the display waiting; with this set before Metal starts, later (mlx issue 3267).
WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
_NO_ROOM = re.compile(
    r"(unable|attempting) to allocate|insufficient memory|out.?of.?memory|bad_alloc|resource limit \("
    r"|\[(metal::)?malloc|cudamalloc|cudaerrormemory|_status_\w*alloc(ation)?_failed",
    re.I,
)
_ENDED = re.compile(
    r"impacting interactivity|gpu timeout|gpu hang|callbackerror(timeout|hang)|(prior|excessive)\S* gpu errors"
    r"|victim of gpu error|innocent victim|\(victim",
    re.I,
)


def relax_watchdog() -> None:
    """Let kernels run longer on a Mac than its display likes, unless the user has said something else."""
    if sys.platform == "darwin":
        os.environ.setdefault(WATCHDOG, "1")


def backend() -> Backend:
    """What new arrays are computed by."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


_PLANNED: ContextVar[Backend | None] = ContextVar("planned", default=None)


@contextmanager
def planning_for(kind: Backend | None) -> Iterator[None]:
    """Inside the block plans are those of another backend, None: of this machine's."""
    token = _PLANNED.set(kind)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def planned_backend() -> Backend:
    """The backend that plans are made for."""
    return _PLANNED.get() or backend()


def elsewhere() -> bool:
    """Whether plans are made for a machine that is not this one: how much memory it has is not known."""
    return planned_backend() != backend()


def machine_bytes() -> int:
    """Memory of what computes: of a Mac all that there is; of CUDA the card's own; elsewhere `UNKNOWN`."""
    import mlx.core as mx

    if elsewhere():
        return UNKNOWN
    about = mx.device_info()
    own = about.get("total_memory") if backend() == "cuda" else about.get("memory_size")
    return int(own or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def usable_bytes(limit_gb: float | None = None) -> int:
    """What a job may take: `limit_gb` (10^9 bytes), else what the system lends the GPU, else nine tenths."""
    import mlx.core as mx

    if limit_gb is not None or elsewhere():
        return UNKNOWN if limit_gb is None else int(limit_gb * 1e9)
    lent = mx.device_info().get("max_recommended_working_set_size") if backend() == "metal" else None
    return int(lent or 0.9 * machine_bytes())


def gpu_failure(error: BaseException) -> Failure | None:
    """What an error says has happened: no memory was left, or macOS has ended the work; None: neither, as of all of
    mlxft's own, whose texts may quote anything."""
    if isinstance(error, MlxftError):
        return None
    text = str(error)
    if isinstance(error, MemoryError) or _NO_ROOM.search(text):
        return "memory"
    return "watchdog" if _ENDED.search(text) else None


def gpu_failed(failure: Failure, when: str, then: str = "") -> TrainingError:
    """The error that says so: what has happened `when`, what helps, and what to do `then`."""
    what, helps = FAILURES[failure]
    return TrainingError(f"{what} {when}. What helps most: {helps}{then}")


@contextmanager
def awake(wanted: bool) -> Iterator[None]:
    """Keep a Mac from falling asleep inside the block, or until this process is killed. Nothing happens elsewhere."""
    process: subprocess.Popen[bytes] | None = None
    if wanted and sys.platform == "darwin":
        with suppress(OSError):  # then it sleeps as it would
            process = subprocess.Popen(["caffeinate", "-i", "-m", "-s", "-w", str(os.getpid())])
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def ask(*command: str) -> str:
    """What a program of the system prints; "" where it is not there, fails, or takes ten seconds."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def swap_bytes() -> float:
    """Bytes of swap in use."""
    if sys.platform == "darwin":
        used = re.search(r"used = ([\d.]+)M", ask("sysctl", "-n", "vm.swapusage"))
        return float(used[1]) * 1e6 if used else 0.0
    sizes = dict(re.findall(r"^(Swap\w+):\s+(\d+) kB", read_or_nothing("/proc/meminfo"), re.MULTILINE))
    return 1024.0 * (int(sizes.get("SwapTotal", 0)) - int(sizes.get("SwapFree", 0)))
