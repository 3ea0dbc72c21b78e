"""mlxft launch: which ranks start where, how they end, Ctrl-C, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxft.errors import ConfigError
from mlxft.launch import (
    LOCAL,
    Cluster,
    Machine,
    _Found,
    _without_marks,
    check_cluster,
    check_environment,
    find_cluster,
    over_ssh,
)

PATIENCE = 300.0  # seconds after which a test fails; nothing waits so long
# A rank: the arguments hold what each rank does.
RANK = """
import os, signal, sys, time
from mlxft.lifeline import follow_launcher, own_rank, sign_off
follow_launcher()
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as mlxft does
assert "MLXFT_LAUNCHED" not in os.environ
what = sys.argv[1:][own_rank()]
print(f"rank {own_rank()} does {what}", flush=True)
try:
    if what == "wait":
        time.sleep(600)
    elif what == "ignore":
        while True:
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                print("not yet", flush=True)
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "silent":
        os._exit(7)
    elif what == "names":
        time.sleep(1)
        sys.exit("TrainingError: rank 1 (127.0.0.1) ended without a word (killed, or out of memory)")
    elif what == "env":
        print(os.getcwd(), os.environ["A"], os.environ["AGX_RELAX_CDM_CTXSTORE_TIMEOUT"], flush=True)
    else:
        sys.exit(int(what))
except KeyboardInterrupt:
    open(f"stopped-{own_rank()}", "w").close()
    sign_off(130)
except SystemExit as e:
    if isinstance(e.code, str):
        print(e.code, file=sys.stderr)
    sign_off(e.code if isinstance(e.code, int) else 1)
sign_off(0)
"""
LAUNCH = """
import json, sys
from mlxft.launch import Cluster, Machine, launch
machines, command, options = json.loads(sys.argv[1])
cluster = Cluster(tuple(Machine(name, ssh, ("127.0.0.1",)) for name, ssh in machines), "ring")
sys.exit(launch([sys.executable, "rank.py", *command], cluster, **options))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start("0", "wait")` launches ranks that do this; `hosts` are their names, b is reached by ssh."""
    (tmp_path / "rank.py").write_text(RANK)
    children: list[subprocess.Popen[str]] = []

    def run(*command: str, hosts: str = "", env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        machines = [(name, "b" if name == "b" else LOCAL) for name in (hosts or "a" * len(command))]
        child = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, json.dumps([machines, command, options])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | (env or {}),
        )
        children.append(child)
        return child

    yield run
    for child in children:
        child.kill()
        child.communicate(timeout=PATIENCE)


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that runs the command here, on a terminal with -tt; with host c it asks for a password."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(
        f"#!{sys.executable}\n"
        "import os, pty, sys\n"
        "host, command = sys.argv[-2:]\n"
        "if host == 'c':\n"
        "    sys.exit(print('Permission denied (publickey).', file=sys.stderr) or 255)\n"
        "if '-G' in sys.argv:\n"
        "    sys.exit(print('hostname 127.0.0.1'))\n"
        "os.environ['FAKE_HOST'] = host\n"
        "if '-tt' in sys.argv:\n"
        "    sys.exit(os.waitstatus_to_exitcode(pty.spawn(['/bin/bash', '-c', command])))\n"
        "os.execv('/bin/bash', ['bash', '-c', command])\n"
    )
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "ssh"


def wait_for(child: subprocess.Popen[str], count: int, text: str = " does ") -> None:
    """Read until each rank has said what it does."""
    assert child.stdout is not None
    for line in child.stdout:
        count -= text in line
        if not count:
            return
    raise AssertionError(child.communicate())


def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=PATIENCE)
    return child.returncode, out, err


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_all_ranks_end_well(start: Start) -> None:
    code, out, err = ended(start("0", "0"))
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == ["rank 0 does 0", "rank 1 does 0"]


@pytest.mark.parametrize(
    ("ranks", "code"),
    [(("2", "0"), 2), (("130", "130"), 130), (("0", "130"), 130), (("0", "2"), 1), (("3", "0"), 1), (("130", "2"), 1)],
)
def test_the_exit_code_is_that_of_rank_0_or_1(start: Start, ranks: tuple[str, ...], code: int) -> None:
    assert ended(start(*ranks))[::2] == (code, "")


def test_a_killed_rank_is_a_failure_and_is_named(start: Start) -> None:
    """mlx.launch itself exits with 0 here."""
    code, _, err = ended(start("0", "killed"))
    assert (code, err) == (1, "TrainingError: rank 1 (a) was killed by SIGKILL (out of memory?)\n")


def test_a_killed_rank_is_named_once(start: Start) -> None:
    code, _, err = ended(start("names", "killed"))
    assert (code, err) == (1, "TrainingError: rank 1 (127.0.0.1) ended without a word (killed, or out of memory)\n")


def test_a_rank_that_waits_is_stopped_when_another_has_failed(start: Start, tmp_path: Path) -> None:
    code, _, err = ended(start("wait", "silent"))
    assert "rank 1 (a) ended with exit code 7" in err
    assert code == 1
    assert (tmp_path / "stopped-0").exists()


def test_folder_and_environment(start: Start, tmp_path: Path) -> None:
    (tmp_path / "b c").mkdir()
    (tmp_path / "b c" / "rank.py").write_text(RANK)
    code, out, _ = ended(start("env", "env", cwd=str(tmp_path / "b c"), starting_port=free_port()))
    assert code == 1  # A is not set
    child = start("env", cwd=str(tmp_path / "b c"), starting_port=free_port(), env={"A": "inherited here"})
    code, out, _ = ended(child)
    assert (code, out) == (0, f"rank 0 does env\n{tmp_path / 'b c'} inherited here 1\n")


# --- stop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("hosts", ["aa", "ab"])
def test_a_signal_reaches_all_ranks(number: int, hosts: str, start: Start, fake_ssh: Path, tmp_path: Path) -> None:
    child = start("wait", "wait", hosts=hosts)
    wait_for(child, 2)
    child.send_signal(number)
    code, _, err = ended(child)
    assert (code, err) == (130, "")
    assert (tmp_path / "stopped-0").exists()
    assert (tmp_path / "stopped-1").exists()


def test_signals_are_forwarded_twice_and_the_third_kills(start: Start) -> None:
    child = start("ignore")
    wait_for(child, 1)
    for _ in range(2):
        child.send_signal(signal.SIGINT)
        wait_for(child, 1, "not yet")
    child.send_signal(signal.SIGINT)
    code, _, err = ended(child)
    assert code == 1
    assert "mlx.launch was killed with its ranks" in err


@pytest.mark.parametrize("hosts", ["aa", "ab"])
def test_ranks_stop_when_the_launcher_is_killed(hosts: str, start: Start, fake_ssh: Path, tmp_path: Path) -> None:
    child = start("wait", "wait", hosts=hosts)
    wait_for(child, 2)
    child.kill()
    until = time.monotonic() + PATIENCE
    while not all((tmp_path / f"stopped-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < until
        time.sleep(0.1)


# --- output -----------------------------------------------------------------------------------------------------------


def test_marks_are_taken_out_wherever_the_output_is_cut() -> None:
    text = b"one\nTOKEN 0 0\nTOKEN 0 0\nno newlineTOKEN 12 130\r\nTOKEN 1 ended -9\n\x1b[33m two \x1b[0m TOKE\n"
    text += b"rank 2 (c) has sent nothing for 45 s: TOKEN"
    wanted = b"one\nno newline\x1b[33m two \x1b[0m TOKE\nrank 2 (c) has sent nothing for 45 s: TOKEN"
    for size in range(1, len(text) + 1):
        found = _Found()
        pieces = (text[i : i + size] for i in range(0, len(text), size))
        assert b"".join(_without_marks(pieces, b"TOKEN", found)) == wanted
        assert (found.codes, found.exits, found.named) == ({0: 0, 12: 130}, {1: -9}, {2})


def test_output_is_not_held_back() -> None:
    """A progress bar has no newline."""
    shown = _without_marks(iter([b"step 1\r", b"step 2 \x1b[2K", b"T"]), b"TOKEN", _Found())
    assert [next(shown), next(shown)] == [b"step 1\r", b"step 2 \x1b[2K"]


# --- hosts ------------------------------------------------------------------------------------------------------------


def test_processes_on_this_machine() -> None:
    found = find_cluster(repeats=3, backend="ring")
    assert found.machines == (Machine(LOCAL, LOCAL, (LOCAL,)),) * 3
    assert found.ports(5000) == [(0, LOCAL, 5000), (1, LOCAL, 5001), (2, LOCAL, 5002)]


def test_names_get_addresses(fake_ssh: Path) -> None:
    found = find_cluster("localhost,8.8.8.8,me@localhost", backend="ring").machines
    assert [m.ssh for m in found] == [LOCAL, "8.8.8.8", "me@localhost"]
    assert [m.ips for m in found][1:] == [("8.8.8.8",), (LOCAL,)]
    assert find_cluster("alias-of-ssh", backend="ring").machines[0].ips == (LOCAL,)


def test_a_name_without_an_address_is_named() -> None:
    with pytest.raises(ConfigError, match=r"host nowhere\.invalid has no.*\n.*mlx\.distributed_config"):
        find_cluster(f"{LOCAL},nowhere.invalid", backend="ring")
    assert find_cluster("nowhere.invalid", backend="mpi").machines[0].ssh == "nowhere.invalid"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a hostfile"),
        ("[]", "no hosts"),
        ('[{"ssh": "-oProxyCommand=x"}]', "not the name of a host"),
        ('[{"ssh": "a", "ips": "1.2.3.4"}]', "list of addresses"),
        ('{"backend": "rings", "hosts": [{"ssh": "127.0.0.1"}]}', "did you mean ring"),
        ('{"backend": "jaccl", "hosts": [{"ssh": "127.0.0.1"}]}', "RDMA"),
    ],
)
def test_a_wrong_hostfile_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "hosts.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        find_cluster(hostfile=tmp_path / "hosts.json")


def test_a_variable_needs_a_name() -> None:
    check_environment(["A=1", "B_2=x=y", "C="])
    for wrong in ("A", "=1", "A-B=1", "A B=1", "A=1\nB=2"):
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            check_environment([wrong])


# --- checks -----------------------------------------------------------------------------------------------------------


def two(second: str = "b") -> Cluster:
    return Cluster((Machine("a", LOCAL, (LOCAL,)), Machine(second, second, (LOCAL,))), "ring")


def test_equal_machines_pass(fake_ssh: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").touch()
    check_cluster(two(), sys.executable, str(tmp_path), ["r.yaml"], free_port())


def test_all_that_is_missing_is_named_at_once(fake_ssh: Path, tmp_path: Path) -> None:
    port = free_port()
    cluster = Cluster((*two().machines, Machine("c", "c", (LOCAL,))), "ring")
    with socket.create_server((LOCAL, port + 1)), pytest.raises(ConfigError) as error:
        check_cluster(cluster, sys.executable, str(tmp_path), ["r.yaml"], port)
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["rank 0 (a)", "rank 1 (b)", "rank 1 (b)", "rank 2 (c)"]
    assert "r.yaml" in lines[0]
    assert "r.yaml" in lines[1]
    assert f"port {port + 1} of {LOCAL}" in lines[2]
    assert "Permission denied (publickey)" in lines[3]


def test_other_versions_are_named(fake_ssh: Path, tmp_path: Path) -> None:
    def shell(host: str, command: str) -> subprocess.CompletedProcess[str]:
        done = over_ssh(host, command)
        if host == "b":
            found = json.loads(done.stdout.removeprefix("mlxft-check ")) | {"mlx": "0.1", "Python": "3.9"}
            done.stdout = f"Welcome!\nmlxft-check {json.dumps(found)}\n"
        return done

    with pytest.raises(ConfigError) as error:
        check_cluster(two(), sys.executable, str(tmp_path), [], free_port(), shell=shell)
    first, second = str(error.value).splitlines()
    assert first.startswith("rank 1 (b): Python is 3.9, rank 0 (a) has 3.")
    assert second.startswith("rank 1 (b): mlx is 0.1, rank 0 (a) has ")


def test_a_python_without_mlxft_a_missing_folder_and_no_python(
    fake_ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "path" / "mlxft"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import no_such_module")
    with pytest.raises(ConfigError) as error:
        check_cluster(two(), sys.executable, "/no/such", [], free_port(), [f"PYTHONPATH={broken.parent}"])
    folder, imports = [line for line in str(error.value).splitlines() if line.startswith("rank 1 (b)")]
    assert "/no/such" in folder
    assert "no_such_module" in imports
    with pytest.raises(ConfigError, match=r"rank 1 \(b\): /no/python cannot be run.*--python"):
        check_cluster(two(), "/no/python", None, [], free_port())


def test_a_machine_that_hangs_is_named() -> None:
    def shell(host: str, command: str) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 60)

    with pytest.raises(ConfigError, match=r"rank 1 \(b\): ssh has not ended"):
        check_cluster(two(), sys.executable, shell=shell)


# --- the command ------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_a_checkpoint_that_is_resumed(
    write: Callable[..., str], shell: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = write(**{"run.save_every": 100_000, "optim.schedule": "constant", "optim.warmup": 0})
    child = subprocess.Popen(
        [sys.executable, "-m", "mlxft", "launch", recipe, "run.name=b", "run.steps=1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = tmp_path / "runs" / "b"
    while not ((run / "metrics.jsonl").exists() and '"train"' in (run / "metrics.jsonl").read_text()):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    code, out, err = ended(child)
    assert code == 130, (out, err)
    (saved,) = (run / "checkpoints").iterdir()
    assert '"interrupted"' in (run / "status.json").read_text()
    again = ["run.name=b", f"run.steps={int(saved.name[5:]) + 1}", "--resume", "--starting-port", str(free_port())]
    done = shell("launch", "-n", "1", recipe, *again)
    assert done.code == 0, done
    assert (run / "adapter" / "adapters.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe.yaml", "tune.rnak=1"], "tune.rank"),
        (["recipe.yaml", "--env", "A"], "NAME=VALUE"),
        (["nowhere.yaml"], "nowhere.yaml"),
        ([], "give a recipe"),
        (["recipe.yaml", "--hosts", "a,,b"], "--hosts"),
        (["recipe.yaml", "--hosts", "a", "--hostfile", "recipe.yaml"], "--hostfile"),
        (["recipe.yaml", "--hostfile", "recipe.yaml"], "mlx.distributed_config"),
    ],
)
def test_what_is_refused(
    arguments: list[str], words: str, write: Callable[..., str], refused: Callable[..., str]
) -> None:
    write()
    error = refused(2, "launch", *arguments)
    assert words in error
    assert error.count("Error") == 1
