"""The connection between ranks, each a process of its own: killed, stopped, failed, gone, and strangers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxft.errors import TrainingError
from mlxft.lifeline import Lifeline, engine_host

PATIENCE = 300.0  # seconds after which a test fails; nothing waits so long
# A rank: argv holds its rank, the number of ranks, the timeout and rank 0's address. It says in JSON what happens.
RANK = """
import json, os, sys, time
from mlxft.lifeline import Lifeline

rank, size, timeout, address, mode = json.loads(sys.argv[1])
hosts = [f"{name}.local" for name in "abcd"[:size]]
say = lambda **what: print(json.dumps(what), flush=True)
options = {"timeout_s": timeout, "grace_s": 0.5, "on_lost": lambda text: say(on_lost=text)}
if rank == 0:
    line = Lifeline.listen("127.0.0.1")
    say(address=line.address)
    line.start(hosts, **options)
else:
    line = Lifeline.connect(address, rank, hosts, **options)
say(ready=True)
if mode == "stuck":
    sys.stdin.readline()
    time.sleep(600)
for command in sys.stdin:
    command = command.strip()
    if command == "wait":
        say(lost=line.wait_lost(300), speaks=line.speaks)
    elif command == "look":
        say(lost=line.lost, speaks=line.speaks)
    elif command == "enter":
        line.exchange += 1
        say(exchange=line.exchange)
    elif command == "close":
        line.close()
        say(closed=True)
    elif command.startswith("report "):
        line.report(json.loads(command[7:]))
        say(reported=True, speaks=line.speaks)
        os._exit(1)
"""


class Rank:
    """A rank as a process."""

    def __init__(self, rank: int, size: int, timeout: float, address: Any, mode: str) -> None:
        given = json.dumps([rank, size, timeout, address, mode])
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.address = self.hear()["address"] if rank == 0 else address

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()

    def ask(self, command: str) -> dict[str, Any]:
        self.say(command)
        return self.hear()

    def end(self) -> tuple[int, str]:
        """The exit code and what it wrote to stderr."""
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err.decode()


Start = Callable[..., list[Rank]]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(3, timeout=45)` starts so many ranks, which are connected to each other when it returns."""
    ranks: list[Rank] = []

    def make(size: int, timeout: float | Sequence[float] = 45, modes: Sequence[str] = ()) -> list[Rank]:
        times = [timeout] * size if isinstance(timeout, int | float) else timeout
        for rank in range(size):
            address = ranks[0].address if ranks else None
            ranks.append(Rank(rank, size, times[rank], address, modes[rank] if modes else "commands"))
        for each in ranks:
            assert each.hear() == {"ready": True}
        return ranks

    began = time.monotonic()
    yield make
    for each in ranks:
        each.process.kill()
        each.process.communicate()
    assert time.monotonic() - began < PATIENCE


def test_a_killed_rank_is_named_at_once(start: Start) -> None:
    ranks = start(3)
    ranks[1].process.kill()
    lost = "rank 1 (b.local) ended without a word (killed, or out of memory)"
    assert ranks[0].ask("wait") == {"lost": lost, "speaks": True}
    assert ranks[2].ask("wait") == {"lost": lost, "speaks": False}


def test_a_stopped_rank_is_found_by_its_silence(start: Start) -> None:
    ranks = start(3, timeout=3)
    ranks[2].process.send_signal(signal.SIGSTOP)
    lost = "rank 2 (c.local) has sent nothing for 3 s: it hangs, or its network is gone"
    assert ranks[0].ask("wait") == {"lost": lost, "speaks": True}
    assert ranks[1].ask("wait") == {"lost": lost, "speaks": False}


def test_time_in_which_a_rank_did_not_run_is_no_silence_of_others(start: Start) -> None:
    """A Mac that slept, or a thread that Python did not let run."""
    ranks = start(2, timeout=[2.5, 60])
    ranks[0].process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    ranks[0].process.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert ranks[0].ask("look") == {"lost": None, "speaks": True}
    assert ranks[1].ask("look") == {"lost": None, "speaks": False}


def test_an_error_reaches_all(start: Start) -> None:
    ranks = start(3)
    text = "data.jsonl:3: \x1b[2Jbroken\nsecond line" + "x" * 10_000
    assert ranks[1].ask(f"report {json.dumps(text)}") == {"reported": True, "speaks": False}
    for rank in (0, 2):
        found = ranks[rank].ask("wait")
        assert found["lost"].startswith("rank 1 (b.local): data.jsonl:3: \N{REPLACEMENT CHARACTER}[2Jbroken\nsecond")
        assert len(found["lost"]) < 4100
        assert found["speaks"] is (rank == 0)


def test_an_error_of_rank_0_reaches_all(start: Start) -> None:
    ranks = start(3)
    assert ranks[0].ask('report "no space"') == {"reported": True, "speaks": True}
    for rank in (1, 2):
        assert ranks[rank].ask("wait") == {"lost": "rank 0 (a.local): no space", "speaks": False}


def test_the_first_loss_stays(start: Start) -> None:
    """What fails after it is a consequence."""
    ranks = start(3)
    ranks[2].ask('report "cause"')
    assert ranks[0].ask("wait")["lost"] == "rank 2 (c.local): cause"
    ranks[1].process.kill()
    ranks[1].process.wait()
    assert ranks[0].ask("look")["lost"] == "rank 2 (c.local): cause"


def test_who_says_goodbye_is_not_lost(start: Start) -> None:
    ranks = start(3)
    assert ranks[1].ask("close") == {"closed": True}
    assert ranks[1].ask("close") == {"closed": True}
    ranks[1].process.kill()
    ranks[1].process.wait()
    assert ranks[0].ask("close") == {"closed": True}
    assert ranks[2].ask("look") == {"lost": None, "speaks": True}
    assert ranks[2].ask("close") == {"closed": True}


def test_if_rank_0_is_lost_the_next_one_speaks(start: Start) -> None:
    ranks = start(4)
    ranks[0].process.kill()
    lost = "rank 0 (a.local) ended without a word (killed, or out of memory)"
    assert [rank.ask("wait") for rank in ranks[1:]] == [{"lost": lost, "speaks": i == 0} for i in range(3)]


def test_a_stopped_rank_0_is_found(start: Start) -> None:
    ranks = start(2, timeout=3)
    ranks[0].process.send_signal(signal.SIGSTOP)
    lost = "rank 0 (a.local) has sent nothing for 3 s: it hangs, or its network is gone"
    assert ranks[1].ask("wait") == {"lost": lost, "speaks": True}


def test_a_main_thread_that_does_not_come_back_is_ended(start: Start) -> None:
    ranks = start(3, modes=["stuck", "commands", "stuck"])
    for rank in (0, 2):
        ranks[rank].say("sleep")
    ranks[1].process.kill()
    lost = "rank 1 (b.local) ended without a word (killed, or out of memory)"
    assert ranks[2].hear() == {"on_lost": lost}
    assert ranks[0].hear() == {"on_lost": lost}
    assert ranks[0].end() == (1, f"TrainingError: {lost}\n")
    assert ranks[2].end() == (1, "")


def test_a_rank_that_never_comes_is_lost() -> None:
    line = Lifeline.listen("127.0.0.1").start(["a", "b"], timeout_s=1)
    assert line.wait_lost(PATIENCE) == "rank 1 (b) has sent nothing for 1 s: it hangs, or its network is gone"
    line.close()


def test_strangers_are_dropped() -> None:
    line = Lifeline.listen("127.0.0.1")
    (host,), port, token = line.address
    rubbish = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\x00" * 50_000,
        b"[" * 100_000 + b"\n",
        b'["hello","wrong",1]\n',
        b'["hello",1,1]\n',
        b'["hello","\\ud800",1]\n',
        b'{"hello":1}\n',
        json.dumps(["hello", token, 7]).encode() + b"\n",
        json.dumps(["hello", token, 0]).encode() + b"\n",
        json.dumps(["hello", token, "1"]).encode() + b"\n",
        json.dumps(["hello", token, [1]]).encode() + b"\n",
        json.dumps(["error", "I am rank 1"]).encode() + b"\n",
        b"",
    ]
    line.start(["a", "b"])
    strangers = []
    for data in rubbish:
        strangers.append(socket.create_connection((host, port)))
        strangers[-1].sendall(data)
    other = Lifeline.connect(line.address, 1, ["a", "b"])
    second = socket.create_connection((host, port))  # the place of rank 1 is taken
    second.sendall(json.dumps(["hello", token, 1]).encode() + b'\n["error","not so"]\n')
    assert second.recv(100) == b""
    other.report("so it is")
    assert line.wait_lost(PATIENCE) == "rank 1 (b): so it is"
    other.close()
    line.close()
    for each in (*strangers, second):
        each.close()


def test_rubbish_of_a_rank_is_ignored() -> None:
    line = Lifeline.listen("127.0.0.1")
    (host,), port, token = line.address
    line.start(["a", "b"])
    with socket.create_connection((host, port)) as rank:
        rank.sendall(json.dumps(["hello", token, 1]).encode() + b"\n")
        for rubbish in (b"\n\n", b"[]\n", b"[1]\n", b'["lost",0,"x",true]\n', b'["left",0]\n', b"x" * 200_000 + b"\n"):
            rank.sendall(rubbish)
        rank.sendall(b'["error",{"a":[1]}]\n')
        assert line.wait_lost(PATIENCE) == "rank 1 (b): {'a': [1]}"
    line.close()


def test_all_names_of_rank_0_are_tried() -> None:
    line = Lifeline.listen()
    names, port, token = line.address
    assert names[-1].endswith(".local")
    line.start(["a", "b"])
    other = Lifeline.connect((["nowhere.invalid", "127.0.0.1"], port, token), 1, ["a", "b"])
    other.close()
    assert line.lost is None
    line.close()
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # it takes connections, and never replies
        address = (["127.0.0.1"], deaf.getsockname()[1], token)
        with pytest.raises(TrainingError, match=r"rank 0 \(a\) cannot be reached from rank 1 \(b\): 127.0.0.1:\d+: "):
            Lifeline.connect(address, 1, ["a", "b"], timeout_s=0.5)


def test_the_engine_says_where_rank_0_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    assert engine_host() == socket.gethostname()
    monkeypatch.setenv("NCCL_HOST_IP", "10.0.0.3")
    assert engine_host() == "10.0.0.3"
    monkeypatch.setenv("MLX_JACCL_COORDINATOR", "10.0.0.2:32323")
    assert engine_host() == "10.0.0.2"
    (tmp_path / "hosts").write_text('[["10.0.0.1:32323"], ["10.0.0.2:32324"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    assert engine_host() == "10.0.0.1"
    assert os.environ["MLX_HOSTFILE"]


def test_an_exchange_that_all_are_in_and_that_does_not_end_is_an_error(start: Start) -> None:
    """The engine may hang with all ranks alive; one that has not come to the exchange yet is only slow."""
    ranks = start(2, timeout=2.0)
    assert ranks[0].ask("enter") == {"exchange": 1}
    assert ranks[1].ask("look")["lost"] is None
    assert ranks[1].ask("enter") == {"exchange": 1}
    for rank in ranks:
        assert "MLX's engine hangs" in rank.ask("wait")["lost"]
