"""`mlxft studio` as a process: its lock, its end, and judgements that survive a kill."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from serving import Served, fill, serve

from mlxft.runs import run_info
from mlxft.study.label import agreement


@pytest.fixture
def folder(tmp_path: Path, make_model_dir: Callable[..., Path]) -> Path:
    make_model_dir(tmp_path / "tiny")
    return fill(tmp_path)


def task_of(page: str) -> str:
    found = re.search(r'name="task" value="([^"]*)"', page)
    assert found is not None, page
    return found[1]


def test_thirty_judgements_with_a_kill_between_are_each_there_once(folder: Path) -> None:
    served = serve(folder, "--port", "0")
    opened = {"prompts": "ab.jsonl", "out": "ab.labels.jsonl"}
    assert served.ask("/label/open", **opened) == (303, "/label?out=ab.labels.jsonl")
    judged = []

    def press(served: Served, task: str, key: str) -> None:
        assert served.ask("/label", out="ab.labels.jsonl", task=task, key=key)[0] == 303

    while (task := task_of(served.ask("/label?out=ab.labels.jsonl")[1])) != "":
        if len(judged) == 11:  # killed while a judgement is on its way: it is there or not, and is sent again
            sending = threading.Thread(target=suppressed, args=(served, task), daemon=True)
            sending.start()
            served.end(signal.SIGKILL)
            sending.join()
            served = serve(folder, "--port", "0")
            served.ask("/label/open", **opened)
        judged.append(task)
        press(served, task, str(1 + len(judged) % 2))
        if len(judged) in (5, 20):
            press(served, task, "1")  # sent twice: ignored
    assert len(judged) == 30
    press(served, "", "u")  # the last one, and again
    again = task_of(served.ask("/label?out=ab.labels.jsonl")[1])
    press(served, "", "u")  # sent twice
    press(served, again, "0")
    assert "30 of 30 judged, 0 skipped" in served.ask("/label?out=ab.labels.jsonl")[1]
    assert served.end()[0] == 0
    rows = [json.loads(line) for line in (folder / "ab.labels.jsonl").read_text("utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 30
    assert [row["turn"] for row in rows] == list(range(1, 31))
    assert rows[-1]["tie"] is True
    assert agreement(folder / "ab.labels.jsonl", folder / "ab.labels.jsonl").n == 30  # as mlxft label reads them


def suppressed(served: Served, task: str) -> None:
    with suppress(OSError, Exception):
        served.ask("/label", out="ab.labels.jsonl", task=task, key="1")


def test_a_second_studio_names_the_first_and_runs_outlive_it(folder: Path) -> None:
    served = serve(folder, "--port", "0")
    command = [sys.executable, "-m", "mlxft", "studio", "--no-open", "--port", "0"]
    assert served.ask("/start", recipe="recipe.yaml", set="run.steps=1000000")[0] == 303
    second = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert f"a studio works in this folder already: {served.address}" in second.stderr
    run = folder / "runs" / "a"
    wait_for(lambda: run_info(run).step > 0)
    assert served.end(signal.SIGTERM) == (0, "studio closed; still running: runs/a\n")
    assert not (folder / ".mlxft-studio").exists()
    reached = run_info(run).step
    wait_for(lambda: run_info(run).step > reached)
    served = serve(folder, "--port", "0")  # it stops a run that it has not started
    assert served.ask("/stop", run="runs/a")[0] == 303
    wait_for(lambda: run_info(run).status == "interrupted")
    assert (run / "checkpoints").is_dir()
    assert served.end() == (0, "studio closed\n")


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(600):
        if what():
            return
        time.sleep(0.1)
    raise AssertionError("waited for a minute")
