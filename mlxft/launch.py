"""Start training on several machines, or in several processes on this one, through mlx.launch.

mlx.launch starts the ranks (over ssh, where they are on another machine) and forwards their output. What is added:
the machines are checked before anything starts, the exit code is that of the ranks, and Ctrl-C reaches all of them.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from types import FrameType
from typing import Any, BinaryIO, NamedTuple

from mlxft.device import WATCHDOG
from mlxft.errors import ConfigError, TrainingError, nearest, shorten
from mlxft.lifeline import ENDED, LAUNCHED, SILENT, STOP, UNREACHABLE
from mlxft.text import echo, parse_json, printable, read_small

_BACKENDS = ("ring", "jaccl", "jaccl-ring", "mpi", "nccl")
STARTING_PORT, _NCCL_PORT = 32323, 12345  # mlx.launch's
LOCAL = "127.0.0.1"  # the only name that mlx.launch does not use ssh for
_SSH_SECONDS = 60.0
# After the first failure, ranks that have not ended are terminated, and killed; after Ctrl-C they may save first. Where
# that does not help, because ssh hangs, mlx.launch is killed, too.
_TERMINATE_SECONDS, _FORCE_SECONDS, _KILL_SECONDS, _SAVE_SECONDS = 10.0, 20.0, 120.0, 900.0
KILLED = 1000  # in place of the exit code of a rank that was killed by force
_CONFIGURE = "mlx.distributed_config makes a hostfile"


# --- machines ---------------------------------------------------------------------------------------------------------
# Which rank runs where.


class Machine(NamedTuple):
    """Where a rank runs.

    Attributes:
        name: as the user gave it, for messages.
        ssh: name for ssh; LOCAL if the rank runs on this machine.
        ips: addresses at which the other ranks reach it.
        rdma: names of the RDMA devices to each rank, for jaccl.
    """

    name: str
    ssh: str
    ips: tuple[str, ...]
    rdma: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """The machines of all ranks, in the order of the ranks, and how they are connected."""

    machines: tuple[Machine, ...]
    backend: str
    envs: tuple[str, ...] = ()  # of a hostfile
    repeats: int = 1

    def name(self, rank: int) -> str:
        """Return what a rank is called in messages."""
        return f"rank {rank} ({printable(self.machines[rank].name)})"

    def ports(self, starting_port: int) -> list[tuple[int, str, int]]:
        """Return (rank, address, port) of each port that the engine will listen on."""
        if self.backend == "mpi" or len(self.machines) == 1:
            return []
        if self.backend != "ring":
            port = _NCCL_PORT if self.backend == "nccl" else starting_port
            return [(0, self.machines[0].ips[0], port)]
        places = [(rank, ip) for rank, machine in enumerate(self.machines) for ip in machine.ips]
        return [(rank, ip, starting_port + i) for i, (rank, ip) in enumerate(places)]


def find_cluster(
    hosts: str | None = None, hostfile: Path | None = None, repeats: int = 1, backend: str | None = None
) -> Cluster:
    """Return where the ranks run, with the addresses of all hosts.

    Args:
        hosts: names or addresses, separated by commas; default: this machine.
        hostfile: a hostfile of MLX, in place of `hosts`.
        repeats: number of ranks on each of `hosts`.
        backend: default: the hostfile's, or mlx.launch's.
    Raises:
        ConfigError: the hostfile cannot be read, or a host has no address.
    """
    if hostfile is not None:
        machines, named, envs = _read_hostfile(hostfile)
    else:
        names = (hosts if hosts is not None else LOCAL).split(",")
        machines, named, envs = (
            [Machine(name.strip(), name.strip(), ()) for name in names for _ in range(repeats)],
            "",
            (),
        )
    place = f"{hostfile}: " if hostfile else "--hosts: "
    backend = backend or named or _usual_backend()
    if backend not in _BACKENDS:
        raise ConfigError(f"{place}backend: {backend!r}; expected {', '.join(_BACKENDS)}{nearest(backend, _BACKENDS)}")
    if not machines:
        raise ConfigError(f"{place}there are no hosts")
    for machine in machines:  # ssh would read a dash as an option
        if not re.fullmatch(r"[^\s\-]\S*", machine.name):
            raise ConfigError(f"{place}{machine.name!r} is not the name of a host")
    if backend.startswith("jaccl") and any(len(machine.rdma) != len(machines) for machine in machines):
        raise ConfigError(
            f"{place}{backend} needs a --hostfile that names the RDMA devices between all hosts; {_CONFIGURE}"
        )
    return Cluster(tuple(machines if backend == "mpi" else _reachable(machines)), backend, envs, repeats)


def _read_hostfile(path: Path) -> tuple[list[Machine], str, tuple[str, ...]]:
    """Return the machines, the backend and the variables that a hostfile of MLX names."""
    try:
        found = parse_json(read_small(path))
        found = found if isinstance(found, dict) else {"hosts": found}
        hosts, backend, envs = found["hosts"], found.get("backend") or "", tuple(map(str, found.get("envs") or ()))
        machines = [Machine(h["ssh"], h["ssh"], tuple(h.get("ips") or ()), tuple(h.get("rdma") or ())) for h in hosts]
        if not all(isinstance(text, str) for m in machines for text in (m.name, *m.ips, backend)):
            raise TypeError("ssh, ips and backend are texts")
        if any(isinstance(h.get("ips"), str) for h in hosts):
            raise TypeError("ips is a list of addresses")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise ConfigError(f"{path}: not a hostfile of MLX: {e}; {_CONFIGURE}") from e
    check_environment(envs, f"{path}: envs: ")
    return machines, backend, envs


def _usual_backend() -> str:
    import mlx.core as mx

    return "nccl" if mx.cuda.is_available() else "ring"


def _reachable(machines: Sequence[Machine]) -> list[Machine]:
    """Return the machines with an address for each, and LOCAL in place of the names of this machine."""
    found, problems = [], []
    addresses: dict[str, str | None] = {}
    for machine in machines:
        if machine.name not in addresses:
            addresses[machine.name] = _address(machine.name)
            if addresses[machine.name] is None and not machine.ips:
                problems.append(f"host {machine.name} has no IPv4 address that is known here; give its address")
        address = addresses[machine.name]
        local = address is not None and "@" not in machine.name and _is_own(address)
        ips = machine.ips or ((address,) if address else ())
        found.append(machine._replace(ssh=LOCAL if local else machine.ssh, ips=ips))
    if problems:
        raise ConfigError("\n".join([*problems, f"({_CONFIGURE})"]))
    # Others cannot reach this machine by its address for itself.
    if other := next((machine.ips[0] for machine in found if machine.ssh != LOCAL), None):
        found = [
            m._replace(ips=tuple(_seen_from(other) if ip.startswith("127.") and m.ssh == LOCAL else ip for ip in m.ips))
            for m in found
        ]
    return found


def _address(name: str) -> str | None:
    """Return the IPv4 address of a host; the name may be an alias of ssh's configuration."""
    bare = name.rpartition("@")[2]
    with suppress(ValueError):
        return str(ipaddress.IPv4Address(bare))
    for known in (bare, None):
        with suppress(OSError, subprocess.SubprocessError):
            if known is None:
                shown = subprocess.run(
                    ["ssh", "-G", name], capture_output=True, text=True, timeout=10, check=True
                ).stdout
                known = dict(line.partition(" ")[::2] for line in shown.splitlines()).get("hostname", bare)
            return str(socket.getaddrinfo(known, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    return None


def _is_own(address: str) -> bool:
    return _is_free(address, 0)


def _is_free(address: str, port: int) -> bool:
    """Return whether this machine could listen there."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError:
        return False
    return True


def _seen_from(other: str) -> str:
    """Return the address of this machine towards another one."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as e:
        raise ConfigError(f"host {other} cannot be reached from here: {e.strerror or e}") from e


# --- checks -----------------------------------------------------------------------------------------------------------
# What must be the same on all machines, asked before anything starts.

Shell = Callable[[str, str], "subprocess.CompletedProcess[str]"]  # host, command -> what it wrote

_SAME = ("Python", "mlxft", "mlx", "mlx-lm", "transformers")
_MARK = "mlxft-check "
_PROBE = """
import hashlib, importlib.metadata, json, os, socket, sys
given, found = json.loads(sys.argv[1]), {"Python": "%d.%d" % sys.version_info[:2], "problems": []}
try:
    os.chdir(given["folder"])
except OSError as e:
    found["problems"].append("the working folder %s: %s; give another by --cwd" % (given["folder"], e.strerror))
else:
    found["problems"] += ["there is no %s in %s" % (p, os.getcwd()) for p in given["paths"] if not os.path.exists(p)]
try:
    import mlx.core, mlxft
    code = hashlib.blake2b(digest_size=4)
    for folder, folders, files in os.walk(os.path.dirname(mlxft.__file__)):
        folders.sort()
        for name in sorted(f for f in files if f.endswith(".py")):
            with open(os.path.join(folder, name), "rb") as file:
                code.update(file.read())
    for name in ("mlxft", "mlx", "mlx-lm", "transformers"):
        found[name] = importlib.metadata.version(name)
    found["mlxft"] = "%s (code %s)" % (mlxft.__version__, code.hexdigest())
except Exception as e:
    found["problems"].append("%s cannot import mlxft: %s" % (sys.executable, e))
for address, port in given["ports"]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as e:
            found["problems"].append("port %d of %s: %s; --starting-port gives others" % (port, address, e.strerror))
print("mlxft-check " + json.dumps(found))
"""


def over_ssh(host: str, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the shell on a host, or here if it is LOCAL.

    Raises:
        OSError, subprocess.TimeoutExpired: it cannot be run, or does not end.
    """
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, command]
    return subprocess.run(
        ["/bin/bash", "-c", command] if host == LOCAL else ssh,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SSH_SECONDS,
    )


def check_cluster(
    cluster: Cluster,
    python: str,
    cwd: str | None = None,
    paths: Sequence[str] = (),
    starting_port: int = STARTING_PORT,
    env: Sequence[str] = (),
    shell: Shell = over_ssh,
) -> None:
    """Check that each machine is ready, and has the same versions as that of rank 0.

    Args:
        python: the Python that runs the ranks.
        cwd: working folder of the ranks; default: this one.
        paths: files or folders that the ranks read.
        shell: runs a command on a host.
    Raises:
        ConfigError: what is wrong, on all machines.
    """
    ports = cluster.ports(starting_port)
    first = {machine.ssh: rank for rank, machine in reversed([*enumerate(cluster.machines)])}
    asked = {
        host: json.dumps(
            {
                "folder": cwd or os.getcwd(),
                "paths": [*paths],
                "ports": [(ip, port) for rank, ip, port in ports if cluster.machines[rank].ssh == host],
            }
        )
        for host in first
    }
    pairs = [*_environment(), *cluster.envs, *env]
    commands = {host: shlex.join(["env", *pairs, python, "-c", _PROBE, asked[host]]) for host in first}
    with ThreadPoolExecutor(max_workers=len(first)) as pool:
        found = dict(zip(first, pool.map(lambda host: _ask(host, commands[host], python, shell), first)))
    problems = []
    known = min((host for host in found if "mlxft" in found[host]), key=first.__getitem__, default=None)
    for host, rank in sorted(first.items(), key=lambda item: item[1]):
        problems += [f"{cluster.name(rank)}: {printable(str(problem))}" for problem in found[host]["problems"]]
        for name in _SAME if known else ():
            here, there = found[host].get(name), found[known].get(name) if known else None
            if here and there and here != there:
                problems.append(
                    f"{cluster.name(rank)}: {name} is {here}, {cluster.name(first[known or host])} has {there}"
                )
    if problems:
        raise ConfigError("\n".join(problems))


def check_environment(env: Sequence[str], place: str = "--env ") -> None:
    """Raise a ConfigError where a variable is not NAME=VALUE, which mlx.launch would leave out."""
    for each in env:
        if not re.fullmatch(r"[A-Za-z_]\w*=[^\n\0]*", each, re.ASCII):
            raise ConfigError(f"{place}{shorten(each)!r}: expected NAME=VALUE")


def _ask(host: str, command: str, python: str, shell: Shell) -> dict[str, Any]:
    """Return what a machine says of itself; its problems are under "problems"."""
    try:
        done = shell(host, command)
    except (OSError, subprocess.TimeoutExpired) as e:
        slow = isinstance(e, subprocess.TimeoutExpired)
        return {"problems": [f"ssh has not ended within {_SSH_SECONDS:g} s" if slow else f"ssh cannot be run: {e}"]}
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            with suppress(ValueError, TypeError):
                return dict(parse_json(line.removeprefix(_MARK)))
    last = shorten(" ".join(done.stderr.split()) or f"exit code {done.returncode}")
    if done.returncode == 255 and host != LOCAL:
        return {"problems": [f"ssh {host} does not work without a password (ssh-copy-id {host}): {last}"]}
    return {"problems": [f"{python} cannot be run, give another by --python: {last}"]}


# --- launch -----------------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """What was found in the output of the ranks."""

    codes: dict[int, int] = field(default_factory=dict)  # rank -> exit code, from the rank
    exits: dict[int, int] = field(default_factory=dict)  # rank -> exit code, as `engine` has seen it
    named: set[int] = field(default_factory=set)  # ranks that another rank has said to be lost
    failed_at: float | None = None


def launch(
    command: Sequence[str],
    cluster: Cluster,
    *,
    cwd: str | None = None,
    starting_port: int = STARTING_PORT,
    env: Sequence[str] = (),
) -> int:
    """Run a command as every rank of a cluster, and forward its output.

    The first and second Ctrl-C (or SIGTERM) are forwarded to all ranks; the third kills them.

    Args:
        command: a program and its arguments, which calls `follow_launcher` and `sign_off`.
        cwd: working folder; default: this one, where it exists.
        env: NAME=VALUE for all ranks.
    Returns:
        0 if all ranks have ended with 0; 130 if some were interrupted and none has failed; 2 if rank 0 ended so;
        else 1.
    Raises:
        TrainingError: mlx.launch has failed.
    """
    token, found = secrets.token_hex(16), _Found()
    hosts = [{"ssh": m.ssh, "ips": [*m.ips], "rdma": [*m.rdma]} for m in cluster.machines]
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as hostfile:
        json.dump({"backend": cluster.backend, "envs": [*cluster.envs], "hosts": hosts}, hostfile)
        hostfile.flush()
        arguments = ["--hostfile", hostfile.name, "--backend", cluster.backend, "--starting-port", str(starting_port)]
        arguments += ["--repeat-hosts", str(cluster.repeats), *(["--cwd", cwd] if cwd else [])]
        for pair in (*_environment(), *env, f"{LAUNCHED}={token}"):
            arguments += ["--env", pair]
        child = subprocess.Popen(
            [sys.executable, "-c", "from mlxft.launch import engine; engine()", *arguments, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {LAUNCHED: token},
        )
        with _forwarding(child, token, found):
            while child.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(1)
                if found.failed_at is not None and time.monotonic() - found.failed_at > _KILL_SECONDS:
                    _kill(child)
    return _verdict(cluster, found, child.returncode)


def _environment() -> list[str]:
    """Return the variables that ranks on other machines need, too."""
    found = [f"{WATCHDOG}={os.environ.get(WATCHDOG, '1')}"]
    found += [f"{name}={os.environ[name]}" for name in ("PYTHONPATH", "NO_COLOR") if os.environ.get(name)]
    if sys.stdout.isatty():  # rank 0 writes to a pipe, and shall show its progress as on this terminal
        columns, lines = shutil.get_terminal_size()
        found += ["FORCE_COLOR=1", f"COLUMNS={columns}", f"LINES={lines}"]
    return found


@contextmanager
def _forwarding(child: subprocess.Popen[bytes], token: str, found: _Found) -> Iterator[None]:
    """Forward output of the ranks, and signals to them."""
    signals = 0

    def stop(signum: int = 0, frame: FrameType | None = None) -> None:
        nonlocal signals
        signals += 1
        if signals > 2:
            _kill(child)
        elif child.stdin is not None:
            with suppress(OSError, ValueError):
                os.write(child.stdin.fileno(), STOP)

    def forward(source: BinaryIO, target: BinaryIO) -> None:
        open_ = True
        for data in _without_marks(iter(lambda: os.read(source.fileno(), 1 << 16), b""), token.encode(), found):
            with suppress(OSError, ValueError):
                if open_:
                    open_ = False
                    target.write(data)
                    target.flush()
                    open_ = True
            if not open_ and not signals:  # nobody reads our output any more
                stop()

    assert child.stdout is not None
    assert child.stderr is not None
    pairs = (child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer)
    threads = [threading.Thread(target=forward, args=pair, daemon=True) for pair in pairs]
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    for thread in threads:
        thread.start()
    try:
        yield
        for thread in threads:
            thread.join()
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        if child.stdin is not None:
            child.stdin.close()


def _kill(child: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)  # with the ranks here, and the connections to others


def _without_marks(chunks: Iterator[bytes], token: bytes, found: _Found) -> Iterator[bytes]:
    """Yield output without the lines for this launcher, in which ranks and `engine` write how a rank has ended."""
    marks = re.compile(rb"%s (\d+) (ended )?(-?\d+)\r?\n" % token)
    phrases = b"|".join(re.escape(text.partition("{")[0].encode()) for text in (ENDED, SILENT, UNREACHABLE))
    lost = re.compile(rb"rank (\d+) \([^()\n]*\) (?:%s)" % phrases)

    def take(match: re.Match[bytes]) -> bytes:
        (found.exits if match[2] else found.codes)[int(match[1])] = int(match[3])
        if found.failed_at is None and int(match[3]) not in (0, 130):
            found.failed_at = time.monotonic()
        return b""

    held = shown = b""
    for data in chunks:
        data = marks.sub(take, held + data)
        cut = _start_of(token, data)
        data, held = data[:cut], data[cut:]
        shown = shown[-500:] + data
        found.named |= {int(match[1]) for match in lost.finditer(shown)}
        if data:
            yield data
    if held:
        yield held


def _start_of(mark: bytes, data: bytes) -> int:
    """Return where the end of `data` may be the start of a line with this mark; its length if it is not."""
    at = data.rfind(mark)
    if at >= 0 and b"\n" not in data[at:] and len(data) - at < len(mark) + 60:
        return at
    return len(data) - next((n for n in range(min(len(mark), len(data)), 0, -1) if data.endswith(mark[:n])), 0)


def _verdict(cluster: Cluster, found: _Found, code: int) -> int:
    """Return the exit code, and write which ranks have ended without a word, if no other rank has."""
    if not found.codes and not found.exits and code == -signal.SIGKILL:
        raise TrainingError("mlx.launch was killed with its ranks, before any had ended")
    if not found.codes and not found.exits:
        raise TrainingError(f"mlx.launch has started no rank, and ended with exit code {code}")
    missing = [rank for rank in range(len(cluster.machines)) if rank not in found.codes]
    for rank in missing:
        if rank not in found.named:
            echo(f"TrainingError: {cluster.name(rank)} {_end(found.exits.get(rank))}", err=True)
    codes = {found.codes.get(rank) for rank in range(len(cluster.machines))}
    if codes <= {0, 130}:
        return found.codes[0] or max(found.codes.values())
    return 2 if found.codes.get(0) == 2 else 1


def _end(code: int | None) -> str:
    """Return how a rank without a word of its own has ended."""
    if code == KILLED:
        return "did not end when another had failed, and was killed"
    number = -code if code is not None and code < 0 else (code or 0) - 128
    with suppress(ValueError):
        return f"was killed by {signal.Signals(number).name}" + " (out of memory?)" * (number == signal.SIGKILL)
    if code == 255:
        return "has lost its connection by ssh"
    return ENDED if code is None else f"ended with exit code {code} before mlxft could say why"


# --- engine -----------------------------------------------------------------------------------------------------------


def engine() -> None:
    """Run mlx.launch with the arguments of this process, which `launch` has started.

    As it is, mlx.launch never sleeps while it forwards, which takes most of a core from training. Once its standard
    input has ended, it neither notices nor informs the ranks. And once a rank has ended with a code other than 0, it
    forwards nothing more, and terminates the others, also one that saves a checkpoint after Ctrl-C.
    """
    from mlx._distributed_utils import launch as mlx_launch

    token = os.environ[LAUNCHED]
    processes: list[Any] = []
    ours, (theirs, ends) = os.dup(0), os.pipe()
    os.dup2(theirs, 0)

    class Rank(mlx_launch.RemoteProcess):
        def __init__(self, rank: int, *arguments: Any) -> None:
            super().__init__(rank, *arguments)
            self.rank, self.we_killed = rank, False
            processes.append(self)

        @property
        def exit_status(self) -> tuple[int, bool]:
            code = KILLED if self.we_killed else self.process.poll()
            os.write(2, f"{token} {self.rank} ended {code}\n".encode())
            return 0, False

    def forward() -> None:
        while data := os.read(ours, 4096):
            os.write(ends, data)
        nowhere = os.open(os.devnull, os.O_WRONLY)  # the launcher has gone: nobody reads the output
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.write(ends, STOP)

    def sleeping_select(read: list[int], write: list[int], other: list[int], timeout: float) -> Any:
        ready = select(read, [], other, min(timeout, 0.05))
        return ready if ready[0] or not write else select(read, write, other, 0)

    for task in (forward, lambda: _end_ranks(processes)):
        threading.Thread(target=task, daemon=True).start()
    mlx_launch.select, mlx_launch.RemoteProcess = sleeping_select, Rank
    sys.argv[0] = "mlx.launch"
    mlx_launch.main()


def _end_ranks(processes: list[Any]) -> None:
    """Wait until a rank has failed, or was interrupted; end those that do not end then, at last by force."""
    failed_at = stopped_at = None
    terminated: set[int] = set()
    while True:
        time.sleep(0.5)
        now, codes = time.monotonic(), {process.process.poll() for process in processes}
        failed_at = failed_at or (now if codes - {None, 0, 130} else None)
        stopped_at = stopped_at or (now if 130 in codes else None)
        late = max(now - (failed_at or now), now - (stopped_at or now) - _SAVE_SECONDS)
        for process in [process for process in processes if process.process.poll() is None]:
            if late > _FORCE_SECONDS and not process.we_killed:
                process.we_killed = True
                process.process.kill()
                if not process._is_local and process._pidfile:
                    script = process.make_kill_script(process._pidfile.strip()).replace("kill $pid", "kill -9 $pid")
                    with suppress(OSError, subprocess.TimeoutExpired):
                        over_ssh(process._host, script)
            elif late > _TERMINATE_SECONDS and process.rank not in terminated:
                terminated.add(process.rank)
                process.process.terminate()
