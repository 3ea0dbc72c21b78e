"""Check the machine, its Python and its packages for `mlxft doctor`, and say how to fix what is wrong.

Nothing is computed; `mlxft selftest` does that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mlxft import __version__
from mlxft.device import (
    CROWDED,
    WATCHDOG,
    ask,
    backend,
    in_use,
    machine_bytes,
    read_or_nothing,
    swap_bytes,
    usable_bytes,
)

PACKAGES = ("mlx", "mlx-lm", "transformers", "huggingface-hub")
LEAST_FREE = 10e9  # bytes of free disk, enough for a 3B model in bfloat16 and its checkpoints
OLDEST_MACOS = 14  # the oldest version that MLX's wheels support


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        state: wrong means that training does not work, or is far slower than the machine allows.
        mend: how to fix it, as a command if there is one.
    """

    name: str
    value: str
    state: Literal["ok", "note", "wrong"] = "ok"
    mend: str = ""


def examine(folder: Path) -> list[Finding]:
    """Check this machine.

    Args:
        folder: the folder for runs.
    """
    return [*_machine(), *_software(), *_memory(), *_disks(folder), *_extras()]


def doctor_report(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as JSON."""
    return {"mlxft": __version__, "sound": sound(findings), "findings": [asdict(f) for f in findings]}


def sound(findings: list[Finding]) -> bool:
    """Return whether nothing is wrong."""
    return all(f.state != "wrong" for f in findings)


def _machine() -> Iterator[Finding]:
    if sys.platform == "darwin":
        yield Finding("chip", ask("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine())
        cores = re.search(r'"gpu-core-count"\s*=\s*(\d+)', ask("ioreg", "-rc", "AGXAccelerator", "-d", "1"))
        yield Finding("GPU cores", cores[1] if cores else "unknown")
        version = platform.mac_ver()[0]
        old = int(version.partition(".")[0] or 0) < OLDEST_MACOS
        state: Literal["ok", "wrong"] = "wrong" if old else "ok"
        yield Finding("macOS", version, state, f"MLX needs macOS {OLDEST_MACOS} or later: update macOS" if old else "")
        return
    model = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", read_or_nothing("/proc/cpuinfo"), re.MULTILINE)
    yield Finding("CPU", f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores")
    if backend() == "cuda":
        yield Finding("GPU", ask("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "unknown")
    yield Finding("system", platform.platform())


def _software() -> Iterator[Finding]:
    version = f"{platform.python_version()} ({platform.machine()}), {sys.executable}"
    if sys.platform == "darwin" and (
        ask("sysctl", "-n", "sysctl.proc_translated") == "1" or platform.machine() != "arm64"
    ):
        mend = "this Python is for Intel, where MLX has no GPU: brew install python, then make a new environment"
        yield Finding("Python", version, "wrong", mend)
    else:
        yield Finding("Python", version)
    wanted = dict(_wanted())
    for name in PACKAGES:
        found = importlib.metadata.version(name)
        old = name in wanted and _numbers(found) < _numbers(wanted[name])
        mend = f"pip install -U '{name}>={wanted[name]}'" if old else ""
        yield Finding(name, found, "wrong" if old else "ok", mend)
    kind = backend()
    if kind == "cpu" and sys.platform == "darwin":
        yield Finding(
            "MLX computes on", "the CPU", "wrong", "training needs the GPU: do not call mx.set_default_device"
        )
    else:
        yield Finding("MLX computes on", {"metal": "the GPU (Metal)", "cuda": "the GPU (CUDA)", "cpu": "the CPU"}[kind])
    if (blas := in_use()) is not None:
        description = blas.lines()[0].removeprefix("blas: ")
        yield Finding("BLAS", description, "wrong" if blas.warning else "ok", blas.warning)
    if sys.platform == "darwin":
        relaxed = os.environ.get(WATCHDOG) == "1"
        yield Finding(
            "display watchdog", "relaxed" if relaxed else "as strict as the default of macOS", *_strict(relaxed)
        )


def _strict(relaxed: bool) -> tuple[Literal["ok", "note"], str]:
    return ("ok", "") if relaxed else ("note", f"macOS may stop long steps: unset {WATCHDOG}, and mlxft sets it")


def _wanted() -> Iterator[tuple[str, str]]:
    """Yield each package that mlxft requires, and its lowest version."""
    for line in importlib.metadata.requires("mlxft") or []:
        found = re.match(r"([\w-]+)(?:\[\w+\])?\s*>=\s*([\d.]+)", line)
        if found and "extra ==" not in line:
            yield found[1], found[2]


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", re.split(r"[a-z+-]", version)[0])]


def _memory() -> Iterator[Finding]:
    yield Finding("memory", _gb(machine_bytes()))
    what = "working set that Metal recommends" if backend() == "metal" else "memory for training"
    yield Finding(what, _gb(usable_bytes()))
    used = swap_bytes()
    if used > CROWDED:
        yield Finding("swap", f"{_gb(used)} in use", "note", "other programs use much memory: close some, or restart")
    else:
        yield Finding("swap", f"{_gb(used)} in use")


def _disks(folder: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, place in (("free for runs", folder), ("free for models of the hub", Path(HF_HUB_CACHE))):
        there = next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(there).free
        little = free < LEAST_FREE
        mend = "free some space: hf cache scan, hf cache prune; mlxft runs rm" if little else ""
        yield Finding(name, f"{_gb(free)} at {place}", "note" if little else "ok", mend)


def _extras() -> Iterator[Finding]:
    """Yield which extras are installed and which are not."""
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("mlxft") or []:
        named = re.match(r"([\w-]+).*extra == ['\"](\w+)['\"]", line)
        if named and named[2] not in ("cuda", "demo", "dev", "docs"):
            found.setdefault(named[2], []).append(named[1])
    there = {extra for extra, packages in found.items() if all(map(_is_installed, packages))}
    yield Finding("extras", ", ".join(sorted(there)) or "none")
    if missing := sorted(found.keys() - there):
        yield Finding("extras not installed", ", ".join(missing), mend=f"pip install 'mlxft[{missing[0]}]' adds one")


def _is_installed(package: str) -> bool:
    with suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(package))
    return False


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
