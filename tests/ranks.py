"""Start a script as several ranks on this machine, connected by the ring backend, as `mlx.launch` does."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before a script: the folder of the tests is importable, and output is not held back.
_HERE = Path(__file__).resolve().parent

Result = tuple[int, str, str]


def run_ranks(script: str | Sequence[str], n: int = 2, timeout: float = 300.0) -> list[Result]:
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


_WORDS = ["the", "then", "other", "in", "on", "and", "is", "of", "he", "her", "in", "it", "the", "is", "and"]
_GUESS = """
from mlxft import Observation
class Guess:
    def reset(self, row, seed):
        self.seed = seed
    def step(self, turn):
        return Observation('try again', reward=(len(turn.text) + self.seed) % 7, end=self.seed % 2 == 0)
"""


def row_writer(folder: Path) -> tuple[random.Random, Callable[[int, int], str], Callable[..., None]]:
    """Write the environment guess.py; return what draws rows, the same each time.

    They are a source of random numbers, `text(least, most)` of so many words, and `write(name, make, count)`.
    """
    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(least, most)))

    def write(name: str, make: Callable[[], dict[str, Any]], count: int) -> None:
        (folder / name).write_text("".join(json.dumps(make()) + "\n" for _ in range(count)))

    (folder / "guess.py").write_text(_GUESS)
    return rng, text, write


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
