"""The command as a process of its own (`shell`), or in this one by the same entry point (`mlxft`), which is quick."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, both outputs."""

    code: int
    out: str
    err: str


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def write(recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`write(**{"tune.rank": 4})` writes recipe.yaml into the working directory, a fresh one; see `recipe`."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "recipe.yaml", rows: int = 10, **changes: Any) -> str:
        (tmp_path / name).write_text(yaml.safe_dump(recipe(rows, **changes)), "utf-8")
        return name

    return make


@pytest.fixture
def mlxft(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`mlxft("train", recipe, "tune.rank=4", stdin="...")` in this process."""

    def run(*args: str, stdin: str | bytes = b"") -> Result:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["mlxft", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8", "surrogateescape"))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`screen("chat", ..., typed=["hi\\n", "\\n"])` in this process, at a terminal; returns what it showed.

    The next text is typed whenever nothing more is shown, and the last one again and again.
    """

    def run(*args: str, typed: Sequence[str] = ("\n",)) -> str:
        ours, theirs = pty.openpty()
        settings = termios.tcgetattr(theirs)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, settings)
        shown, done, keys = bytearray(), threading.Event(), [*reversed(typed)]

        def sit() -> None:
            while True:
                if select.select([ours], [], [], 0.02)[0]:
                    shown.extend(os.read(ours, 65536))
                elif done.is_set():
                    return
                else:
                    os.write(ours, (keys.pop() if len(keys) > 1 else keys[0]).encode())

        sitting = threading.Thread(target=sit, daemon=True)
        monkeypatch.setattr(sys, "argv", ["mlxft", *args])
        monkeypatch.setenv("TERM", "xterm")
        with open(theirs, "r+b", buffering=0) as raw, io.TextIOWrapper(raw, "utf-8", write_through=True) as terminal:
            for name in ("stdin", "stdout", "stderr"):
                monkeypatch.setattr(sys, name, terminal)
            sitting.start()
            with pytest.raises(SystemExit):
                main()
            done.set()
            sitting.join()
        os.close(ours)
        return shown.decode("utf-8", "replace")

    return run


@pytest.fixture
def refused(mlxft: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """`refused(2, "train", recipe, ...)`: the command fails with that code, says why on stderr only, and no file
    is written, changed or lost. Returns what it said."""

    def run(code: int, *args: str, stdin: str | bytes = b"") -> str:
        before = tree(tmp_path)
        result = mlxft(*args, stdin=stdin)
        assert (result.code, result.out) == (code, ""), result
        assert "Traceback" not in result.err
        assert tree(tmp_path) == before, "a refusal must leave everything as it was"
        return result.err

    return run


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Result]:
    """`shell("train", recipe, stdin="...", env={...})` as a process of its own, in the test's folder."""

    def run(*args: str, stdin: str | bytes = b"", env: dict[str, str] | None = None) -> Result:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
        done = subprocess.run(
            [sys.executable, "-m", "mlxft", *args],
            input=given,
            capture_output=True,
            cwd=tmp_path,
            env=clean | {"HF_HUB_OFFLINE": "1", **(env or {})},
            timeout=300,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
