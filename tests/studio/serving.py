"""A working folder for a studio, and a studio as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import yaml

EVIL = "<script>document.title='evil'</script>"


def fill(folder: Path) -> Path:
    """Write rows, pairs to judge and a recipe for the model in `tiny` into a folder."""
    turns = [[("user", f"{i} {EVIL}"), ("assistant", "the in\x1b[31m" + " and" * i)] for i in range(12)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
    rows = [{"prompt": f"{EVIL} {i}", "answers": [f"a{i} {EVIL}", f"b{i}"], "models": ["A", "B"]} for i in range(30)]
    (folder / "ab.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe: dict[str, Any] = {
        "model": {"path": "tiny", "dtype": "float32"},
        "tune": {"rank": 4},
        "data": {"train": "rows.jsonl", "format": "messages"},
        "batch": {"rows": 2},
        "optim": {"schedule": "constant", "warmup": 0},
        "run": {"name": "a", "steps": 4, "report_every": 1, "sample_prompts": [EVIL], "sample_tokens": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return folder


@dataclass
class Served:
    """A studio as a process, and a browser's cookie for it."""

    process: subprocess.Popen[str]
    address: str
    cookie: str = ""

    @property
    def base(self) -> str:
        return self.address.partition("/?")[0]

    def ask(self, path: str, **fields: str) -> tuple[int, str]:
        """GET, or POST where there are fields; return the status and the text or the new place."""
        headers = {"Cookie": self.cookie, "Origin": self.base}
        with closing(HTTPConnection(urlsplit(self.base).netloc, timeout=60)) as there:
            there.request("POST" if fields else "GET", path, urlencode(fields) or None, headers)
            reply = there.getresponse()
            self.cookie = (reply.getheader("set-cookie") or self.cookie).partition(";")[0]
            text = reply.read().decode()
            return reply.status, reply.getheader("location") or text

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Send a signal; return the exit code and what was printed since."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=30)
        return self.process.returncode, rest


def serve(folder: Path, *options: str) -> Served:
    """Start `mlxft studio` in a folder and log in."""
    command = [sys.executable, "-m", "mlxft", "studio", "--no-open", *options]
    package = str(Path(__file__).parents[2])
    env = {
        **os.environ,
        "PYTHONPATH": package,
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "MLXFT_CACHE": str(folder / ".cache"),
    }
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    process.stdout.readline()  # how to end it
    found = re.search(r"http://\S+", line)
    assert found is not None, line + process.communicate(timeout=30)[0]
    served = Served(process, found[0])
    assert served.ask(served.address[len(served.base) :])[0] == 303
    return served
