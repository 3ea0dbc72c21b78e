"""The BLAS that MLX gets on Linux: the user's choice, else the best kernel for the CPU; and a word where it is slow."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

import mlxft
from mlxft import device

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings its own")

SSE = "fpu sse sse2 ssse3 sse4_1 sse4_2 popcnt"
AVX2 = f"{SSE} avx f16c fma bmi1 avx2 bmi2"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni amx_bf16"
# Xeon Phi has AVX-512 without the parts that OpenBLAS's kernels are compiled for.
PHI = f"{AVX2} avx512f avx512pf avx512er avx512cd"


def cpuinfo(vendor: str, family: int, model: int, flags: str) -> str:
    """/proc/cpuinfo of two processors, in the kernel's form."""
    lines = (
        f"vendor_id\t: {vendor}",
        f"cpu family\t: {family}",
        f"model\t\t: {model}",
        "fpu\t\t: yes",
        f"flags\t\t: {flags}",
    )
    return "".join(f"processor\t: {i}\n" + "\n".join(lines) + "\nbugs\t\t: spectre_v1\n\n" for i in range(2))


ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes sve bf16 i8mm\nCPU implementer\t: 0x41\n\n"


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        pytest.param(cpuinfo("GenuineIntel", 6, 207, AVX512), "SkylakeX", id="Xeon of 2023"),
        pytest.param(cpuinfo("AuthenticAMD", 25, 17, AVX512), "SkylakeX", id="Zen 4"),
        pytest.param(cpuinfo("AuthenticAMD", 25, 1, AVX2), "Zen", id="Zen 3"),
        pytest.param(cpuinfo("GenuineIntel", 6, 207, AVX2), "Haswell", id="AVX-512 hidden by a hypervisor"),
        pytest.param(cpuinfo("GenuineIntel", 6, 87, PHI), "Haswell", id="Xeon Phi"),
        pytest.param(cpuinfo("GenuineIntel", 6, 42, f"{SSE} avx"), "Sandybridge", id="Sandy Bridge"),
        pytest.param(cpuinfo("GenuineIntel", 6, 26, SSE), "", id="Nehalem"),
        pytest.param(ARM, "", id="aarch64"),
        pytest.param("", "", id="no cpuinfo"),
    ],
)
def test_the_kernel_is_named_by_the_flags(text: str, kernel: str) -> None:
    assert device.best_kernel(text) == kernel


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000\n", None),
        ("-1 100000", None),
        ("", None),
        ("200000 100000\n", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
    ],
)
def test_the_quota_of_a_container(text: str, cpus: int | None) -> None:
    assert device.cpu_quota(text) == cpus


def process(code: str, **env: str) -> Any:
    """The last line that a fresh process prints, read as JSON; it has no variables of OpenBLAS and mlxft but `env`."""
    ours = ("OPENBLAS_", "MLXFT_BLAS", "LD_PRELOAD", *device.THREAD_VARIABLES)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


USED = "from mlxft.device import in_use; import json; print(json.dumps(in_use().to_json()))"


@pytest.fixture(scope="module")
def openblas() -> dict[str, Any]:
    """The installed OpenBLAS, as mlxft brings it."""
    used = process(f"import mlxft; {USED}") if sys.platform == "linux" else {}
    if used.get("library") != "OpenBLAS":
        pytest.skip("no OpenBLAS is installed")
    return used


@pytest.fixture
def avx() -> None:
    if not device.best_kernel(device.read_or_nothing("/proc/cpuinfo")):
        pytest.skip("this CPU has no AVX")


@linux
def test_no_blas_is_loaded_before_mlx_is() -> None:
    code = "import mlxft, json; print(json.dumps('openblas' in open('/proc/self/maps').read()))"
    assert process(code) is False


def test_openblas_comes_with_mlx_and_is_named(openblas: dict[str, Any]) -> None:
    assert openblas.keys() >= {"library", "version", "kernel", "threads"}
    assert openblas["threads"] >= 1
    assert process(f"import mlxft; {USED}", OPENBLAS_NUM_THREADS="1")["threads"] == 1


@pytest.mark.usefixtures("avx")
def test_a_cpu_that_openblas_does_not_know_gets_the_kernel_of_its_flags(openblas: dict[str, Any]) -> None:
    """OpenBLAS falls back to Prescott there; here a variable that only C sees makes it. A child inherits nothing."""
    code = (
        "import ctypes, json, subprocess, sys\n"
        "ctypes.CDLL(None).setenv(b'OPENBLAS_CORETYPE', b'Prescott', 1)\n"
        "import mlxft; from mlxft.device import in_use; used = in_use()\n"
        "child = 'import os; print(os.environ.get(\"OPENBLAS_CORETYPE\"))'\n"
        "heard = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True).stdout.strip()\n"
        "print(json.dumps([used.kernel, used.warning, heard]))"
    )
    kernel, warning, heard = process(code)
    assert not device.is_sse(kernel)
    assert (warning, heard) == ("", "None")


@pytest.mark.usefixtures("avx", "openblas")
def test_the_kernel_that_the_user_names_stays_and_is_warned_of() -> None:
    used = process(f"import mlxft; {USED}", OPENBLAS_CORETYPE="Prescott")
    assert device.is_sse(used["kernel"])
    assert "OPENBLAS_CORETYPE, which is Prescott" in used["warning"]


def test_which_kernels_are_slow() -> None:
    slow = ["Prescott", "Generic", "Core2", "Nehalem", "Katmai", "Opteron_SSE3"]
    quick = ["Sandybridge", "Haswell", "Zen", "Excavator", "SkylakeX", "Cooperlake", "SapphireRapids", "neoversen1", ""]
    assert [device.is_sse(name) for name in slow + quick] == [True] * len(slow) + [False] * len(quick)


@linux
def test_mlx_own_blas_is_slow_and_that_is_said() -> None:
    off = process(f"import mlxft; {USED}", MLXFT_BLAS="off")
    assert off["library"] == "reference BLAS"
    assert "MLXFT_BLAS is off" in off["warning"]
    late = process(f"import mlx.core, mlxft; {USED}")
    assert late["library"] == "reference BLAS"
    assert "import mlxft before mlx" in late["warning"]


@pytest.mark.usefixtures("openblas")
def test_a_blas_that_the_process_has_already_is_left_in_use() -> None:
    """As one of LD_PRELOAD. Here it is MLX's own, made global; no other is loaded beside it."""
    code = (
        "import ctypes, importlib.util; from pathlib import Path\n"
        "packages = Path(importlib.util.find_spec('mlx').submodule_search_locations[0]).parent\n"
        "for path in packages.glob('mlx_cpu.libs/libblas*'):\n"
        "    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)\n"
        "import json, mlxft; from mlxft.device import in_use; used = in_use()\n"
        "print(json.dumps([used.library, 'openblas' in open('/proc/self/maps').read()]))"
    )
    assert process(code) == ["reference BLAS", False]


@linux
@pytest.mark.parametrize(("name", "why"), [("/no/such/blas.so", "/no/such/blas.so"), ("libm.so.6", "cblas_sgemm")])
def test_a_library_that_is_none_is_refused(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXFT_BLAS", name)
    bare = SimpleNamespace()
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *a, **k: bare if name is None else real(name, *a, **k))
    with pytest.raises(mlxft.device.ConfigError, match=f"MLXFT_BLAS.*{why}"):
        device.load_blas()


class FakeOpenBLAS:
    """One with eight threads."""

    threads = 8

    def openblas_get_num_threads(self) -> int:
        return self.threads

    def openblas_set_num_threads(self, threads: int) -> None:
        self.threads = threads


@pytest.mark.parametrize(
    ("files", "env", "threads"),
    [
        ({"cpu.max": "250000 100000\n"}, {}, 3),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, {}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, {}, 8),
        ({"cpu.max": "max 100000\n"}, {}, 8),
        ({"cpu.max": "3200000 100000\n"}, {}, 8),
        ({"cpu.max": "200000 100000\n"}, {"OMP_NUM_THREADS": "6"}, 8),
        ({}, {}, 8),
    ],
)
def test_no_more_threads_than_a_container_may_keep_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], env: dict[str, str], threads: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    for name in device.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    library = FakeOpenBLAS()
    device._limit_threads(library)  # type: ignore[arg-type]
    assert library.threads == threads


def test_nothing_is_said_on_a_gpu_or_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
        assert device.in_use() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert device.in_use() is None


@pytest.mark.parametrize("slow", [True, False])
def test_check_train_and_the_start_event_name_it(
    recipe: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    slow: bool,
) -> None:
    from rich.console import Console

    import mlxft.check
    import mlxft.run

    used = device.Blas("OpenBLAS", "0.3.21", "Prescott" if slow else "Zen", 2, "it is slow" if slow else "")
    monkeypatch.setattr(mlxft.run, "in_use", lambda: used)
    monkeypatch.setattr(mlxft.check, "in_use", lambda: used)
    said = [f"blas: OpenBLAS 0.3.21, {used.kernel} kernel, 2 threads", *(["warning: it is slow"] if slow else [])]
    run = mlxft.train(recipe(**{"run.steps": 1}), console=Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("blas:", "warning:"))] == said
    assert run.metrics("start")[0]["blas"] == used.to_json()
    mlxft.check.check(run.config, 0, Console(width=200), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("blas:", "warning:"))] == said
    assert mlxft.check.check(run.config, 0, Console(quiet=True), as_json=True)["blas"] == used.to_json()


def test_where_there_is_none_nothing_is_said(
    recipe: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    import mlxft.check
    import mlxft.run

    monkeypatch.setattr(mlxft.run, "in_use", lambda: None)
    monkeypatch.setattr(mlxft.check, "in_use", lambda: None)
    run = mlxft.train(recipe(**{"run.steps": 1}), console=Console(width=200))
    facts = mlxft.check.check(run.config, 0, Console(width=200), as_json=False)
    assert "blas" not in capsys.readouterr().out.lower()
    assert "blas" not in run.metrics("start")[0] | facts
