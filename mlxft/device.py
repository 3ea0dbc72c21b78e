"""Ask which device MLX uses and how much memory it has, recognise its failures, and load a fast BLAS on Linux."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlxft.errors import ConfigError, MlxftError, TrainingError

# --- blas -------------------------------------------------------------------------------------------------------------
# The BLAS behind MLX's CPU backend on Linux: load a fast one before MLX, and report which one is in use.
#
# MLX's Linux wheel links the reference BLAS, which is tens of times slower than OpenBLAS. But MLX binds to another
# `cblas_sgemm` if the process has one among its global symbols when MLX is loaded.

VARIABLE = "MLXFT_BLAS"
EXPECTED = "expected the path of a BLAS library, or off for MLX's own"
# Fedora's libopenblas.so.0 is single-threaded, its libopenblasp.so.0 is not.
SYSTEM = ("libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so")
# OpenBLAS's x86 kernels from before AVX; no new ones are written.
INTEL_SSE = {
    "katmai",
    "coppermine",
    "northwood",
    "prescott",
    "banias",
    "atom",
    "core2",
    "penryn",
    "dunnington",
    "nehalem",
}
OTHER_SSE = {"athlon", "opteron", "opteron_sse3", "barcelona", "bobcat", "nano", "generic"}
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
CGROUP = Path("/sys/fs/cgroup")
INSTALL = "sudo apt-get install libopenblas0-pthread"


def load_blas() -> None:
    """Load the fastest BLAS that is installed, unless the process has one already (LD_PRELOAD).

    Raises:
        ConfigError: MLXFT_BLAS names a library that cannot be loaded.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off" or hasattr(ctypes.CDLL(None), "cblas_sgemm"):
        return
    for name in (wanted,) if wanted else SYSTEM:
        try:
            library = _load_with_best_kernel(name)
        except OSError as e:
            if wanted:
                raise ConfigError(f"{VARIABLE}: {e}; {EXPECTED}") from e
            continue
        if wanted and not hasattr(library, "cblas_sgemm"):
            raise ConfigError(f"{VARIABLE}: {name} has no function cblas_sgemm; {EXPECTED}")
        _limit_threads(library)
        return


class _BeforeMLX:
    """An entry of `sys.meta_path` that loads a fast BLAS when MLX is about to be imported, and finds no module itself.

    A process that needs no MLX, such as `mlxft --help`, thus loads no BLAS with its threads.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "mlx.core":
            load_blas()


def prepare_process() -> None:
    """Prepare this process for MLX: on a Mac relax the display watchdog, on Linux load a fast BLAS before MLX."""
    relax_watchdog()
    if sys.platform == "linux":
        sys.meta_path.insert(0, _BeforeMLX)


def _load_with_best_kernel(name: str) -> ctypes.CDLL:
    """Load a library. If its OpenBLAS falls back to SSE on a CPU with AVX, load it again with the right kernel.

    Raises:
        OSError: there is no such library.
    """
    library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    if "OPENBLAS_CORETYPE" in os.environ or not is_sse(_text(library, "openblas_get_corename")):
        return library
    kernel = best_kernel(read_or_nothing("/proc/cpuinfo"))
    if not kernel:
        return library
    # OpenBLAS reads the variable once, while it is loaded. Child processes must not inherit it.
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
    os.environ["OPENBLAS_CORETYPE"] = kernel
    try:
        return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    finally:
        del os.environ["OPENBLAS_CORETYPE"]


def _limit_threads(library: ctypes.CDLL) -> None:
    """Lower OpenBLAS's number of threads to the CPU quota of a container: OpenBLAS only counts the CPUs."""
    files = [CGROUP / "cpu.max"], [CGROUP / "cpu/cpu.cfs_quota_us", CGROUP / "cpu/cpu.cfs_period_us"]  # version 2, 1
    quotas = [quota for paths in files if (quota := cpu_quota(" ".join(map(read_or_nothing, paths))))]
    user_has_set = any(name in os.environ for name in THREAD_VARIABLES)
    if user_has_set or not quotas or not hasattr(library, "openblas_get_num_threads"):
        return
    if quotas[0] < library.openblas_get_num_threads():
        library.openblas_set_num_threads(quotas[0])


def is_sse(kernel: str) -> bool:
    """Return whether an OpenBLAS kernel is for x86 CPUs without AVX."""
    return kernel.lower() in INTEL_SSE | OTHER_SSE


def best_kernel(cpuinfo: str) -> str:
    """Return OpenBLAS's kernel for an x86 CPU with AVX, from the text of /proc/cpuinfo; "" for any other CPU."""
    found = dict(re.findall(r"^(flags|vendor_id)\s*:\s*(.*)$", cpuinfo, re.MULTILINE))
    flags = set(found.get("flags", "").split())
    if flags >= {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}:
        return "SkylakeX"
    if flags >= {"avx2", "fma"}:
        return "Haswell" if found.get("vendor_id") == "GenuineIntel" else "Zen"
    return "Sandybridge" if "avx" in flags else ""


def cpu_quota(text: str) -> int | None:
    """Return how many CPUs a control group may use, from "quota period"; None if there is no limit."""
    numbers = text.split()
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):  # "max 100000", "-1 100000"
        return None
    return max(1, math.ceil(int(numbers[0]) / int(numbers[1])))


@dataclass(frozen=True)
class Blas:
    """The BLAS that MLX uses.

    Attributes:
        library: OpenBLAS, MKL, "reference BLAS", or the name of its file.
        version: version of OpenBLAS; "" for other libraries.
        kernel: kernel that OpenBLAS chose for this CPU; "" for other libraries.
        threads: number of threads; None if the library does not report it.
        warning: why it is slow and what to do; "" if it is not slow.
    """

    library: str
    version: str = ""
    kernel: str = ""
    threads: int | None = None
    warning: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the known attributes as JSON."""
        return {name: value for name, value in vars(self).items() if value not in ("", None)}

    def lines(self) -> list[str]:
        """Return a description and, if there is one, the warning."""
        parts = [f"{self.library} {self.version}".strip()]
        parts += [f"{self.kernel} kernel"] if self.kernel else []
        parts += [f"{self.threads} thread{'s' if self.threads != 1 else ''}"] if self.threads else []
        return [f"blas: {', '.join(parts)}", *([f"warning: {self.warning}"] if self.warning else [])]


def in_use() -> Blas | None:
    """Return the BLAS that MLX calls; None on a Mac and on a GPU, where MLX uses none."""
    import mlx.core as mx

    if sys.platform != "linux" or mx.default_device().type != mx.DeviceType.cpu:
        return None
    # MLX binds to a global symbol, else to that of the libraries it was linked to.
    scopes = ctypes.CDLL(None), ctypes.CDLL(mx.__file__)
    functions = [scope.cblas_sgemm for scope in scopes if hasattr(scope, "cblas_sgemm")]
    path = _file_of(functions[0]) if functions else ""
    return _described(path) if path else None


class _SymbolInfo(ctypes.Structure):  # Dl_info of dlfcn.h
    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(function: Any) -> str:
    """Return the path of the library that a function is from."""
    info = _SymbolInfo()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return os.fsdecode(info.path or b"")


def _described(path: str) -> Blas:
    library, name = ctypes.CDLL(path), Path(path).name
    if config := _text(library, "openblas_get_config"):  # "OpenBLAS 0.3.21 DYNAMIC_ARCH NO_AFFINITY Zen MAX_THREADS=64"
        version = (re.search(r"OpenBLAS (\S+)", config) or ["", ""])[1]
        kernel, threads = _text(library, "openblas_get_corename"), int(library.openblas_get_num_threads())
        return Blas("OpenBLAS", version, kernel, threads, _sse_warning(kernel) if is_sse(kernel) else "")
    if name.startswith("libblas"):
        return Blas("reference BLAS", warning=_reference_warning())
    return Blas("MKL" if name.startswith("libmkl") else name)


def _sse_warning(kernel: str) -> str:
    why, best = f"OpenBLAS's {kernel} kernel uses only SSE", best_kernel(read_or_nothing("/proc/cpuinfo"))
    if not best:
        return f"{why}, and this CPU has no AVX, so matrix products are slow"
    chosen = os.environ.get("OPENBLAS_CORETYPE")
    way = f"unset OPENBLAS_CORETYPE, which is {chosen}" if chosen else f"set OPENBLAS_CORETYPE={best}"
    return f"{why}, which is several times slower than this CPU can be: {way}"


def _reference_warning() -> str:
    why = "MLX uses the reference BLAS, which is tens of times slower than OpenBLAS"
    if os.environ.get(VARIABLE) == "off":
        return f"{why}: {VARIABLE} is off"
    return f"{why}: install OpenBLAS (Debian: {INSTALL}), and in Python import mlxft before mlx"


def _text(library: ctypes.CDLL, name: str) -> str:
    """Call an OpenBLAS function that returns a string; return "" if the library has no such function."""
    function = getattr(library, name, None)
    if function is None:
        return ""
    function.restype = ctypes.c_char_p
    return os.fsdecode(function() or b"")


def read_or_nothing(path: str | Path) -> str:
    """Return the text of a system file, or "" if it cannot be read."""
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


# --- device -----------------------------------------------------------------------------------------------------------

CROWDED = 1e9  # bytes of swap in use above which memory is short

Backend = Literal["metal", "cuda", "cpu"]
BACKEND_NAMES: dict[Backend, str] = {"metal": "a Mac's GPU", "cuda": "an NVIDIA GPU", "cpu": "a CPU"}
Failure = Literal["memory", "watchdog"]
# Failure -> what happened, and what helps if it happened in training.
FAILURES: dict[Failure, tuple[str, str]] = {
    "memory": (
        "out of memory",
        (
            "a smaller batch.tokens (with batch.accumulate for the same step), memory.checkpoint: on, and "
            "model.quantize: 4 or a shorter data.max_length; mlxft check shows how much each saves"
        ),
    ),
    "watchdog": (
        "the GPU's work kept the display waiting, and macOS stopped it",
        (
            "a smaller batch.tokens (with batch.accumulate for the same step), or letting the display sleep (Control, "
            "Shift and Eject or Power) during training"
        ),
    ),
}

UNKNOWN = 1 << 60  # memory in bytes of a machine that is not this one
# macOS stops a kernel that keeps the display waiting; it waits longer if this is set before Metal starts (mlx issue
# 3267).
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
    """Let kernels keep a Mac's display waiting for longer, unless the user has set the variable."""
    if sys.platform == "darwin":
        os.environ.setdefault(WATCHDOG, "1")


def backend() -> Backend:
    """Return the backend of the default device."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


_PLANNED: ContextVar[Backend | None] = ContextVar("planned", default=None)


@contextmanager
def planning_for(kind: Backend | None) -> Iterator[None]:
    """Make memory plans for another backend inside the block; None means this machine's."""
    token = _PLANNED.set(kind)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def planned_backend() -> Backend:
    """Return the backend that memory plans are made for."""
    return _PLANNED.get() or backend()


def elsewhere() -> bool:
    """Return whether plans are made for another machine, whose memory size is not known."""
    return planned_backend() != backend()


def machine_bytes() -> int:
    """Return the memory of the device in bytes: a Mac's or CPU's RAM, or a CUDA card's own; else `UNKNOWN`."""
    import mlx.core as mx

    if elsewhere():
        return UNKNOWN
    about = mx.device_info()
    own = about.get("total_memory") if backend() == "cuda" else about.get("memory_size")
    return int(own or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def usable_bytes(limit_gb: float | None = None) -> int:
    """Return the bytes that a job may use: `limit_gb` (10^9 bytes), else Metal's recommendation, else nine tenths."""
    import mlx.core as mx

    if limit_gb is not None or elsewhere():
        return UNKNOWN if limit_gb is None else int(limit_gb * 1e9)
    lent = mx.device_info().get("max_recommended_working_set_size") if backend() == "metal" else None
    return int(lent or 0.9 * machine_bytes())


def gpu_failure(error: BaseException) -> Failure | None:
    """Return the failure that an error reports: out of memory, or work that macOS stopped; else None.

    The result is None for mlxft's own errors, whose texts may quote anything.
    """
    if isinstance(error, MlxftError):
        return None
    text = str(error)
    if isinstance(error, MemoryError) or _NO_ROOM.search(text):
        return "memory"
    return "watchdog" if _ENDED.search(text) else None


def gpu_failed(failure: Failure, when: str, then: str = "") -> TrainingError:
    """Return the error for a failure: what happened, `when`, what helps, and what to do `then`."""
    what, helps = FAILURES[failure]
    return TrainingError(f"{what} {when}. What helps most: {helps}{then}")


@contextmanager
def awake(wanted: bool) -> Iterator[None]:
    """Keep a Mac awake inside the block, or until this process is killed. Do nothing on other machines."""
    process: subprocess.Popen[bytes] | None = None
    if wanted and sys.platform == "darwin":
        with suppress(OSError):  # without caffeinate the Mac may sleep
            process = subprocess.Popen(["caffeinate", "-i", "-m", "-s", "-w", str(os.getpid())])
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def ask(*command: str) -> str:
    """Return the output of a system program; "" if it is missing, fails, or takes more than ten seconds."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def swap_bytes() -> float:
    """Return the bytes of swap in use."""
    if sys.platform == "darwin":
        used = re.search(r"used = ([\d.]+)M", ask("sysctl", "-n", "vm.swapusage"))
        return float(used[1]) * 1e6 if used else 0.0
    sizes = dict(re.findall(r"^(Swap\w+):\s+(\d+) kB", read_or_nothing("/proc/meminfo"), re.MULTILINE))
    return 1024.0 * (int(sizes.get("SwapTotal", 0)) - int(sizes.get("SwapFree", 0)))
