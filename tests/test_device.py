"""What MLX's backends are called, how much they lend, how they fail, and what keeps a Mac at work."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxft import device
from mlxft.device import Failure, awake, gpu_failure, machine_bytes, relax_watchdog, usable_bytes
from mlxft.errors import TrainingError
from mlxft.files import flush
from mlxft.run import train
from mlxft.trainer.loop import Gradients

GB = 10**9


def test_usable_is_the_limit_or_most_of_the_machine() -> None:
    assert usable_bytes(3.5) == 3_500_000_000
    assert usable_bytes() > GB


@pytest.mark.parametrize(
    ("backend", "about", "whole", "usable"),
    [
        ("metal", {"memory_size": 16 * GB, "max_recommended_working_set_size": 11 * GB}, 16 * GB, 11 * GB),
        ("cuda", {"total_memory": 80 * GB, "free_memory": 78 * GB}, 80 * GB, 72 * GB),
    ],
)
def test_memory_is_that_of_what_computes(
    backend: str, about: dict[str, int], whole: int, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "backend", lambda: backend)
    monkeypatch.setattr(mx, "device_info", lambda: about)
    assert (machine_bytes(), usable_bytes()) == (whole, usable)


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        ("[malloc_or_wait] Unable to allocate 4294967296 bytes.", "memory"),
        ("[metal::malloc] Resource limit (499000) exceeded.", "memory"),
        (
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackError)",
            "memory",
        ),
        ("[malloc] Unable to allocate 7340032 bytes.", "memory"),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", "memory"),
        ("cudaMallocManaged failed: cudaErrorMemoryAllocation", "memory"),
        ("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBuffer)", "watchdog"),
        (
            "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBuffer)",
            "watchdog",
        ),
        (
            "[METAL] Command buffer execution failed: Caused GPU Hang Error (00000003:kIOGPUCommandBuffer)",
            "watchdog",
        ),
        (
            "Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPU)",
            "watchdog",
        ),
        ("Command buffer execution failed: Internal (00000002:kIOGPUCommandBufferCallbackErrorTimeout)", "watchdog"),
        ("Command buffer execution failed: Discarded (victim of GPU error/recovery) (00000005:kIOGPU)", "watchdog"),
        ("[metal::malloc] Attempting to allocate 99999999999 bytes which is greater than the maximum", "memory"),
        ("cuMemCreate(&handle, size, &prop, 0) failed: CUDA_ERROR_OUT_OF_MEMORY", "memory"),
        ("cublasLtCreate(&handle) failed: CUBLAS_STATUS_ALLOC_FAILED", "memory"),
        ("cudnn failed: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "memory"),
        ("[matmul] Last dimension of first input with shape (2,3)", None),
        ("[load] Failed to open file allocations.jsonl, on node allocated to another job", None),
    ],
)
def test_failures_are_known_by_what_backends_say(said: str, failure: Failure | None) -> None:
    assert gpu_failure(RuntimeError(said)) == failure
    assert gpu_failure(MemoryError()) == "memory"
    assert gpu_failure(TrainingError(said)) is None, "an error of mlxft says itself what has happened"


@pytest.mark.parametrize(
    ("said", "helps"),
    [
        ("Command buffer execution failed: Impacting Interactivity (0000000e)", "display sleep"),
        ("[metal::malloc] Resource limit (499000) exceeded.", "memory.checkpoint: on"),
    ],
)
def test_a_failure_in_training_leaves_the_checkpoint_and_advice(
    said: str, helps: str, recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU fails in the third step: one error, and the run goes on to the very weights of one that did not fail."""
    settings = {"run.steps": 4, "run.save_every": 2, "memory.measure": False}
    whole = train(recipe(**settings))
    gradient, calls = Gradients.__call__, iter(range(9))

    def failing(self: Gradients, batch: Any, per: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError(said)
        return gradient(self, batch, per)

    monkeypatch.setattr(Gradients, "__call__", failing)
    with pytest.raises(
        TrainingError, match=f"after step 2; the checkpoint of step 2 is intact.*{helps}.*mlxft train --resume"
    ):
        train(recipe(**settings, **{"run.name": "b"}))
    assert json.loads((tmp_path / "runs/b/status.json").read_text("utf-8"))["status"] == "failed"
    monkeypatch.undo()
    again = train(recipe(**settings, **{"run.name": "b"}), resume=True)
    one, other = (mx.load(str(run.result / "adapters.safetensors")) for run in (whole, again))
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


def test_without_a_checkpoint_none_is_promised(
    recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Gradients, batch: Any, per: Any) -> Any:
        raise error

    monkeypatch.setattr(Gradients, "__call__", failing)
    error: Exception = MemoryError()
    with pytest.raises(TrainingError, match=r"after step 0; there is no checkpoint yet.*start over") as told:
        train(recipe(**{"memory.measure": False}))
    assert "--resume" not in str(told.value)
    error = TrainingError("step 1: the loss is nan; its rows: allocations.jsonl:1, out of memory.jsonl:2")
    with pytest.raises(TrainingError, match=r"^step 1: the loss is nan; its rows: allocations\.jsonl:1"):
        train(recipe(**{"memory.measure": False}), overwrite=True)


def test_a_mac_is_kept_awake_as_long_as_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "caffeinate"
    tool.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/said\nexec sleep 60\n", "utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begun: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def begin(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        begun.append(popen(*args, **options))
        return begun[-1]

    monkeypatch.setattr(device.subprocess, "Popen", begin)
    with awake(True):
        assert begun == [], "nothing but a Mac falls asleep so"
    monkeypatch.setattr(sys, "platform", "darwin")
    with awake(False):
        assert begun == []

    def work() -> None:
        with awake(True):
            while not (tmp_path / "said").exists() or not (tmp_path / "said").read_text("utf-8"):
                time.sleep(0.01)
            raise OSError("of the block")

    with pytest.raises(OSError, match="of the block"):
        work()
    assert (tmp_path / "said").read_text("utf-8").split()[-2:] == ["-w", str(os.getpid())]
    assert begun[0].returncode is not None
    monkeypatch.setenv("PATH", "")
    with awake(True):
        pass


def test_the_watchdog_is_relaxed_on_a_mac_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(device.WATCHDOG, raising=False)
    relax_watchdog()
    assert device.WATCHDOG not in os.environ or sys.platform == "darwin"
    monkeypatch.setattr(sys, "platform", "darwin")
    relax_watchdog()
    assert os.environ[device.WATCHDOG] == "1"
    monkeypatch.setenv(device.WATCHDOG, "0")
    relax_watchdog()
    assert os.environ[device.WATCHDOG] == "0"


@pytest.mark.parametrize("refused", [None, errno.ENOTSUP])
def test_a_mac_flushes_past_the_drives_own_memory(
    refused: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def full(fd: int, what: int) -> int:
        asked.append(f"full {what}")
        if refused is not None:
            raise OSError(refused, "not here")
        return 0

    (tmp_path / "file").touch()
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append("plain"))
    flush(tmp_path / "file")
    assert asked == (["full 51"] if refused is None else ["full 51", "plain"])


def test_sigterm_is_as_ctrl_c_before_training_too() -> None:
    work = "lambda **_: os.kill(os.getpid(), signal.SIGTERM)"
    code = f"import os, signal, mlxft.cli as c\nc.cli.main = {work}\nc.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_failure_outside_of_training_is_one_line_too() -> None:
    text = "[metal::malloc] Resource limit (499000) exceeded."
    code = f"import mlxft.cli as c\ndef work(**_): raise RuntimeError('{text}')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}c.cli.main = work\nc.main()"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"RuntimeError: out of memory: {text}\n")
