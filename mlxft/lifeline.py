"""What connects a rank to the others beside MLX's engine, and to the launcher that started it.

A collective of the engine waits for ever for a rank that was stopped or unplugged, and where a rank was killed its
error names none. So every rank also keeps a TCP connection to rank 0, on which both sides send a beat each second.
Rank 0 finds out who was lost, and informs the others.

    line = Lifeline.listen()                                                     # rank 0
    address = ranks.from_first(line.address if ranks.rank == 0 else None)        # a collective
    line.start(hosts) if ranks.rank == 0 else Lifeline.connect(address, rank, hosts)

Nothing here needs MLX.
"""

from __future__ import annotations

import errno
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mlxft.errors import TrainingError, shorten
from mlxft.text import echo, parse_json, printable, read_small

TIMEOUT = 30.0  # seconds of silence after which a rank counts as lost
GRACE = 5.0  # seconds that the main thread has to see a loss before the process ends
ENDED = "ended without a word (killed, or out of memory)"
SILENT = "has sent nothing for {:g} s: it hangs, or its network is gone"
UNREACHABLE = "cannot be reached any more: {}"
STUCK = "all ranks wait in one exchange for {:g} s, and none is lost: MLX's engine hangs (see docs/several-macs.md)"
_BEAT = 1.0  # seconds
_FAREWELL = 2.0  # seconds that an error or a goodbye waits for its receipt
_PROOF = 10.0  # seconds that a connection has to show the token
_STRANGERS = 32  # connections without the token that are held at once
_MOST_TEXT, _MOST_LINE = 4000, 1 << 16  # characters of an error; bytes of a message
# A rank that does not run, as on a Mac that sleeps, must not count the time as silence of the others.
_MOST_ELAPSED = 2 * _BEAT


class _Peer:
    """One connection: of rank 0 to another rank or to a stranger (rank None), or of another rank to rank 0."""

    def __init__(self, connection: socket.socket, rank: int | None) -> None:
        connection.setblocking(False)
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.rank = connection, rank
        self.since = time.monotonic()
        self.received, self.unsent = bytearray(), bytearray()
        self.owes_receipt = False  # of what this process has said last

    def send(self, *message: Any) -> None:
        """Send a message, or what of it the connection takes now; the rest goes with the next one."""
        self.unsent += json.dumps(message).encode() + b"\n"
        with suppress(OSError):  # one that has closed is noticed where it is read
            del self.unsent[: self.socket.send(self.unsent)]

    def read(self) -> tuple[list[list[Any]], OSError | None]:
        """Return the messages that have come, and what ended the connection, if it has ended."""
        ended: OSError | None = None
        try:
            while not ended:
                data = self.socket.recv(_MOST_LINE)
                self.received += data
                if not data:
                    ended = ConnectionResetError(errno.ECONNRESET, "closed")
                if len(self.received) > 4 * _MOST_LINE:
                    break
        except BlockingIOError:
            pass
        except OSError as e:
            ended = e
        *lines, rest = bytes(self.received).split(b"\n")
        self.received = bytearray() if len(rest) > _MOST_LINE else bytearray(rest)
        return [message for line in lines if (message := _parsed(line))], ended


def _parsed(line: bytes) -> list[Any]:
    with suppress(ValueError):
        found = parse_json(line)
        if isinstance(found, list) and found and isinstance(found[0], str):
            return found
    return []


def _clean(text: object) -> str:
    return shorten(printable(str(text)).strip(), _MOST_TEXT)


class Lifeline:
    """The connection of this rank to the others, watched by a thread; see `listen`, `start` and `connect`.

    Attributes:
        lost: which rank was lost and how, in a sentence; None while all is well. The first loss stays.
        exchange: number of what the main thread does with the engine: one more when a collective begins, and when it
            ends, so that it is odd inside.
        address: of rank 0, for `connect`, as JSON: names to try, port and token.
    """

    def __init__(self, rank: int, address: Sequence[Any]) -> None:
        self.rank, self.address = rank, address
        self.lost: str | None = None
        self.exchange = 0
        self._exchanges: dict[int, int] = {}  # of the other ranks, as rank 0 knows them
        self._same: tuple[int, float] = (0, 0.0)  # the collective that all ranks are in, and for how long
        self._listener: socket.socket | None = None
        self._hosts: Sequence[str] = ()
        self._peers: list[_Peer] = []
        self._silence: dict[int, float] = {}  # rank -> seconds since it was heard from, of those that are watched
        self._living: set[int] = set()  # ranks that can still write an error
        self._lock = threading.RLock()  # held by whoever uses the above
        self._changed = threading.Condition(self._lock)
        self._seen = self._closed = False
        self._thread: threading.Thread | None = None

    # Making one

    @classmethod
    def listen(cls, host: str | None = None) -> Lifeline:
        """Return rank 0's side. The others may connect from now on; `start`, soon after, lets them in and watches them.

        Args:
            host: the one address of this machine to listen at; default: all.
        Raises:
            TrainingError: this machine cannot listen there.
        """
        try:
            listener = socket.create_server((host or "", 0), backlog=128)
        except OSError as e:
            raise TrainingError(f"rank 0 cannot listen for the other ranks: {e.strerror or e}") from e
        listener.setblocking(False)
        name = socket.gethostname()
        names = [host] if host else dict.fromkeys([engine_host(), name, f"{name.partition('.')[0]}.local"])
        line = cls(0, ([*names], listener.getsockname()[1], secrets.token_hex(16)))
        line._listener = listener
        return line

    @classmethod
    def connect(
        cls,
        address: Sequence[Any],
        rank: int,
        hosts: Sequence[str],
        timeout_s: float = TIMEOUT,
        grace_s: float = GRACE,
        on_lost: Callable[[str], None] | None = None,
    ) -> Lifeline:
        """Connect a rank other than 0 to rank 0; see `start`.

        Args:
            address: rank 0's.
        Raises:
            TrainingError: rank 0 cannot be reached.
        """
        names, port, token = address
        tried = []
        for name in names:  # in a ring of Thunderbolt cables, only neighbours reach the engine's address
            connection = None
            try:
                connection = socket.create_connection((name, port), timeout=min(timeout_s, _PROOF))
                connection.sendall(json.dumps(["hello", token, rank]).encode() + b"\n")
                if welcome := connection.recv(64):
                    break
                raise OSError("it closes the connection")
            except OSError as e:
                tried.append(f"{name}:{port}: {e.strerror or e}")
                if connection is not None:
                    connection.close()
        else:
            ranks = f"rank 0 ({hosts[0]}) cannot be reached from rank {rank} ({hosts[rank]})"
            raise TrainingError(f"{ranks}: {'; '.join(tried)}")
        line = cls(rank, address)
        line._peers.append(_Peer(connection, 0))
        line._peers[0].received += welcome
        return line.start(hosts, timeout_s, grace_s, on_lost)

    def start(
        self,
        hosts: Sequence[str],
        timeout_s: float = TIMEOUT,
        grace_s: float = GRACE,
        on_lost: Callable[[str], None] | None = None,
    ) -> Lifeline:
        """Watch the other ranks.

        Args:
            hosts: name of each rank's machine, for messages.
            timeout_s: silence after which a rank counts as lost.
            grace_s: the main thread may be in a collective that never ends. If it has called none of `wait_lost`,
                `acknowledge`, `report` and `close` so long after a loss, the process ends with exit code 1.
            on_lost: called with the loss before the process ends so, in the watching thread.
        """
        self._hosts, self._timeout, self._grace, self._on_lost = hosts, timeout_s, grace_s, on_lost
        self._living = set(range(len(hosts)))
        self._silence = dict.fromkeys(range(1, len(hosts)) if self.rank == 0 else [0], 0.0)
        self._thread = threading.Thread(target=self._watch, name="mlxft lifeline", daemon=True)
        self._thread.start()
        return self

    # For the main thread

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that writes what went wrong: the lowest that lives, as far as is known here."""
        with self._lock:
            return self.rank == min(self._living, default=self.rank)

    def wait_lost(self, seconds: float) -> str | None:
        """Wait until a loss is known, and return it, which counts as acknowledged; None if all ranks live."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost is not None, seconds)
            self._seen |= self.lost is not None
            return self.lost

    def acknowledge(self) -> None:
        """Say that the main thread knows of the loss, and ends the process itself."""
        with self._lock:
            self._seen = True

    def report(self, text: str) -> None:
        """Inform the other ranks that this one fails, and why, unless they have a loss to report already."""
        with self._lock:
            self._seen = True
            if self.lost is not None:
                return
            text = _clean(text)
            self._lose(self.rank, f"{self._name(self.rank)}: {text}", ends=False)
            if self.rank != 0:
                self._peers_send("error", text)
            self._await_receipts()

    def close(self) -> None:
        """End the connection: the other ranks do not count this one as lost."""
        with self._lock:
            if self._closed:
                return
            self._seen = True
            if self._thread is not None:
                self._peers_send("bye")
                self._await_receipts()
            self._closed = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * _BEAT)
        with self._lock:
            for connection in (self._listener, *(peer.socket for peer in self._peers)):
                if connection is not None:
                    connection.close()

    def _peers_send(self, *message: Any) -> None:
        """Send a message that wants a receipt to every rank that this one is connected to."""
        for peer in self._peers:
            if peer.rank is not None:
                peer.owes_receipt = True
                peer.send(*message)

    def _await_receipts(self) -> None:
        def received() -> bool:
            return not any(peer.owes_receipt for peer in self._peers if peer.rank in self._silence)

        self._changed.wait_for(received, _FAREWELL)

    # For the watching thread

    def _watch(self) -> None:
        last = beaten = time.monotonic()
        lost_at: float | None = None
        while True:
            ready = self._ready(_BEAT / 4)
            with self._lock:
                if self._closed:
                    return
                now = time.monotonic()
                passed, last = min(now - last, _MOST_ELAPSED), now
                for rank in self._silence:
                    self._silence[rank] += passed
                self._receive(ready)
                self._find_silent()
                self._find_stuck(passed)
                if now - beaten >= _BEAT:
                    beaten = now
                    for peer in self._peers:
                        if peer.rank is not None:
                            peer.send("beat", self.exchange)
                if self.lost is not None and lost_at is None:
                    lost_at = now
                stuck = lost_at is not None and not self._seen and now - lost_at > self._grace
            if stuck:
                self._give_up()

    def _ready(self, seconds: float) -> list[socket.socket]:
        """Wait until something has come, and return the sockets on which it has."""
        with self._lock:
            sockets = [*filter(None, [self._listener]), *(peer.socket for peer in self._peers)]
        with selectors.DefaultSelector() as selector:
            for each in sockets:
                with suppress(ValueError, OSError):  # closed by `close`
                    selector.register(each, selectors.EVENT_READ)
            return [key.fileobj for key, _ in selector.select(seconds) if isinstance(key.fileobj, socket.socket)]

    def _receive(self, ready: Sequence[socket.socket]) -> None:
        if self._listener in ready:
            self._accept()
        errors: list[tuple[int, str]] = []
        for peer in [peer for peer in self._peers if peer.socket in ready]:
            messages, ended = peer.read()
            for message in messages:
                if peer.rank is None:
                    self._admit(peer, message)
                    if peer.rank is None:
                        ended = ended or OSError()
                        break
                elif self.rank == 0 and message[0] == "error" and len(message) == 2:
                    peer.send("seen")
                    errors.append((peer.rank, f"{self._name(peer.rank)}: {_clean(message[1])}"))
                else:
                    self._understand(peer, peer.rank, message)
            if peer.rank is not None and messages:
                self._heard(peer.rank)
            if ended is not None:
                self._drop(peer, ended)
        # An error may be the consequence of another rank's end: that comes first.
        for rank, sentence in errors:
            self._lose(rank, sentence, ends=False)

    def _heard(self, rank: int) -> None:
        if rank in self._silence:
            self._silence[rank] = 0.0

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                strangers = [peer for peer in self._peers if peer.rank is None]
                if len(strangers) >= _STRANGERS:
                    self._drop(strangers[0], OSError())
                self._peers.append(_Peer(connection, None))

    def _admit(self, peer: _Peer, message: list[Any]) -> None:
        """Take a stranger for the rank that it says to be, if it shows the token."""
        if len(message) != 3 or message[0] != "hello" or not isinstance(message[1], str):
            return
        rank, known = message[2], hmac.compare_digest(message[1].encode("utf-8", "replace"), self.address[2].encode())
        taken = {other.rank for other in self._peers}
        if known and isinstance(rank, int) and rank in self._silence and rank not in taken:
            peer.rank = rank
            peer.send("beat")
            if self.lost is not None:
                peer.send("lost", 0, self.lost, False)

    def _understand(self, peer: _Peer, rank: int, message: list[Any]) -> None:
        """Act on a message of a rank; what is not understood is ignored."""
        match message:
            case ["seen"]:
                peer.owes_receipt = False
                self._changed.notify_all()
            case ["beat", int(exchange)]:
                self._exchanges[rank] = exchange
            case ["bye"]:
                peer.send("seen")
                self._leave(rank)
            case ["left", int(other)] if self.rank != 0 and self.lost is None:
                self._living.discard(other)
            case ["lost", int(other), str(sentence), bool(ends)] if self.rank != 0:
                peer.send("seen")
                self._lose(other, _clean(sentence), ends)

    def _leave(self, rank: int) -> None:
        """A rank has ended well."""
        self._silence.pop(rank, None)
        if self.lost is None:
            self._living.discard(rank)
        if self.rank == 0:
            for peer in self._peers:
                if peer.rank not in (None, rank):
                    peer.send("left", rank)

    def _drop(self, peer: _Peer, reason: OSError) -> None:
        """Close a connection. If its rank has not said goodbye, it is lost."""
        self._peers.remove(peer)
        peer.socket.close()
        self._changed.notify_all()
        if peer.rank is not None and peer.rank in self._silence:
            killed = reason.errno in (errno.ECONNRESET, errno.EPIPE)
            how = ENDED if killed else UNREACHABLE.format(reason.strerror or reason)
            self._lose(peer.rank, f"{self._name(peer.rank)} {how}", ends=True)

    def _find_silent(self) -> None:
        for rank in [rank for rank, seconds in self._silence.items() if seconds > self._timeout]:
            self._lose(rank, f"{self._name(rank)} {SILENT.format(self._timeout)}", ends=True)
        for peer in [peer for peer in self._peers if peer.rank is None and time.monotonic() - peer.since > _PROOF]:
            self._drop(peer, OSError())

    def _find_stuck(self, passed: float) -> None:
        """End a collective that all ranks have begun and that does not end: the engine hangs."""
        if self.rank != 0 or len(self._exchanges) + 1 < len(self._hosts):
            return
        known = {self.exchange, *self._exchanges.values()}
        inside = known == {self.exchange} and self.exchange % 2 == 1
        self._same = (self.exchange, self._same[1] + passed if inside and self._same[0] == self.exchange else 0.0)
        if self._same[1] > self._timeout:
            self._lose(0, STUCK.format(self._timeout), ends=False)

    def _lose(self, rank: int, sentence: str, ends: bool) -> None:
        """A rank has failed: note it, and as rank 0 inform the others. If it `ends`, it cannot speak for itself."""
        self._silence.pop(rank, None)
        if self.lost is not None:  # who speaks is settled
            return
        self.lost = sentence
        if ends:
            self._living.discard(rank)
        self._changed.notify_all()
        if self.rank == 0:
            self._peers_send("lost", rank, sentence, ends)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({printable(self._hosts[rank])})"

    def _give_up(self) -> NoReturn:
        """End the process, whose main thread does not come back."""
        assert self.lost is not None
        try:
            if self._on_lost is not None:
                self._on_lost(self.lost)
            if self.speaks:
                echo(f"TrainingError: {self.lost}", err=True)
        finally:
            sign_off(1)
            os._exit(1)


def engine_host() -> str:
    """Return the address at which MLX's engine reaches rank 0, as mlx.launch has set it; else this machine's name."""
    ring = os.environ.get("MLX_HOSTFILE", "")
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        found = parse_json(Path(ring).read_text("utf-8"))[0][0] if ring else os.environ["MLX_JACCL_COORDINATOR"]
        return str(found.rpartition(":")[0])
    return os.environ.get("NCCL_HOST_IP") or socket.gethostname()


# --- launched ---------------------------------------------------------------------------------------------------------
# A rank that `mlxft launch` has started. mlx.launch ends with exit code 0 also where a rank was killed, and cannot send
# signals; so a rank writes how it ends, and takes "stop" on its standard input for Ctrl-C.

LAUNCHED = "MLXFT_LAUNCHED"  # the token of the launcher; processes that a rank starts do not have it
STOP = b"stop\n"
_token = ""
_ORPHANED = 900.0  # seconds in which a rank can still save a checkpoint when its launcher has gone


def follow_launcher() -> None:
    """If `mlxft launch` has started this process, stop as by Ctrl-C when it says so, or when it has gone."""
    global _token
    _token = os.environ.pop(LAUNCHED, "")
    if not _token:
        return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # ssh has ended: so has the standard input
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(0).st_mode) or stat.S_ISSOCK(os.fstat(0).st_mode) or os.isatty(0):
            threading.Thread(target=_obey, name="mlxft launcher", daemon=True).start()  # MPI gives some /dev/null


def _obey() -> None:
    said = b""
    while True:
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        if not data:  # nobody reads our output either, and writing it would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(_ORPHANED)
            os._exit(130)  # it waits for another rank
        *lines, said = (said + data.replace(b"\r", b"")).split(b"\n")
        for line in lines:
            if line == STOP.strip():
                os.kill(os.getpid(), signal.SIGINT)


def own_rank() -> int:
    """Return this process's rank, from what mlx.launch or MPI has set; 0 if there is none."""
    names = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


def several_ranks() -> bool:
    """Return whether mlx.launch or MPI has started other ranks beside this one."""
    if "MLX_RANK" not in os.environ:
        return any(os.environ.get(name, "1") != "1" for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    hosts = os.environ.get("MLX_HOSTFILE")  # an empty file for mlx.launch -n 1
    return os.environ.get("MLX_WORLD_SIZE") != "1" and (hosts is None or bool(read_small(Path(hosts)).strip()))


def sign_off(code: int) -> None:
    """Write the exit code of this rank for `mlxft launch`, if that has started it; end the process if it failed.

    A process that failed ends at once: MLX's engine would wait for other ranks, which may be gone.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(OSError):  # twice: mlx.launch forwards blocks of bytes, and another rank's may come between two
        os.write(2, 2 * f"{_token} {own_rank()} {code}\n".encode() if _token else b"")
    if code:
        os._exit(code)
