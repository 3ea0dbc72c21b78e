"""Start a script as several ranks on this machine, connected by the ring backend, as `mlx.launch` does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Before a script: the folder of the tests is importable, and output is not held back.
_HERE = Path(__file__).resolve().parent

Result = tuple[int, str, str]


def run_ranks(script: str | Sequence[str], n: int = 2, timeout: float = 120.0) -> list[Result]:
    """Run a script's text, or the arguments of Python, as n ranks; return code, stdout and stderr of each rank.

    All are killed after `timeout` seconds (code -9), and when one has failed, some seconds later: the others would wait
    for it.
    """
    argv = ["-c", script] if isinstance(script, str) else list(script)
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(_HERE.parent), str(_HERE), env.get("PYTHONPATH", "")])
        files = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(n)]
        started = []
        for rank, (out, err) in enumerate(files):
            with out.open("wb") as o, err.open("wb") as e:
                mine = env | ({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if n > 1 else {})
                started.append(subprocess.Popen([sys.executable, *argv], env=mine, stdout=o, stderr=e))
        _wait(started, time.monotonic() + timeout)
        return [(p.returncode, o.read_text(), e.read_text()) for p, (o, e) in zip(started, files)]


def _wait(started: Sequence[subprocess.Popen[bytes]], until: float) -> None:
    try:
        while any(p.poll() is None for p in started):
            if time.monotonic() > until:
                return
            if any(p.returncode for p in started):
                until = min(until, time.monotonic() + 5)
            time.sleep(0.05)
    finally:
        for p in started:
            p.kill()
            p.wait()


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
