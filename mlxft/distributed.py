"""Work over several processes, which MLX's engine connects: who computes what, and what all of them need to know.

Each process (a rank, one to a Mac) runs the same program over the same rows and makes the same steps. It computes the
micro-batches that are its own; gradients and sums are added up over all ranks, so that every rank makes the same
update. Only rank 0 writes and reports. Evaluation and sampling are shared in the same way, by rows. A single process
is one rank that talks to nobody.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxft.errors import ConfigError, TrainingError
from mlxft.lifeline import TIMEOUT, Lifeline, several_ranks
from mlxft.text import parse_json

MESSAGE = 64 << 20  # most bytes of one message, and of the float32 copies that it needs
_SMALL = 1 << 10  # bytes of the first message of `gather_bytes`, enough for the sums of a step
_U = TypeVar("_U")


class Portion(NamedTuple):
    """The stretch of a list that one rank takes: from `start` up to `stop` of `whole` things."""

    start: int
    stop: int
    whole: int

    @property
    def here(self) -> slice:
        """Return it as a slice."""
        return slice(self.start, self.stop)


class Ranks:
    """The processes that train together, seen from one of them.

    All ranks call the same methods in the same order, or all of them wait.

    Args:
        group: MLX's; None: there is this process only.
    Attributes:
        rank, size: the number of this process, from 0, and of all.
        hosts: the name of each rank's machine.
        weights: the share of the work that each rank takes; they sum to 1.
        waited_s, summing_s: seconds spent waiting for slower ranks, and adding up arrays.
        lifeline: what watches the other ranks.
        network: what `measure_network` has measured.
        alike: whether all ranks must compute the same number of micro-batches, because they gather a base together.
        agreed: whether all ranks end now because they have agreed to.
        training: whether they train, so that what is called meanwhile is each rank's own.
        on_lost: called with the loss where a rank was lost and this one is stuck, before it ends.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self.weights = [1 / self.size] * self.size
        self.waited_s = self.summing_s = 0.0
        self.lifeline: Lifeline | None = None
        self.network = Network(0.0, 1e9, 1e9)
        self.alike = self.agreed = self.training = False
        self.on_lost: Callable[[str], None] = lambda text: None
        self.hosts: list[str] = [socket.gethostname()] if self.size == 1 else self.gather(socket.gethostname())

    @property
    def first(self) -> bool:
        """Return whether this is the rank that writes and reports."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """Return what a rank is called in messages."""
        return f"rank {rank} ({self.hosts[rank]})"

    # Who computes what

    def portion(self, count: int, rank: int | None = None) -> Portion:
        """Return the stretch of `count` things that a rank takes, this one by default, by the ranks' weights."""
        bounds = np.round(np.cumsum([0.0, *self.weights]) * count).astype(int)
        rank = self.rank if rank is None else rank
        return Portion(int(bounds[rank]), int(bounds[rank + 1]), count)

    def share(self, groups: Sequence[Sequence[_U]], costs: Sequence[float]) -> list[tuple[list[_U], int]]:
        """Cut groups of units into pieces, so that the cost of each rank's pieces is as its weight.

        A rank takes neighbouring units, so few groups are cut.

        Args:
            costs: of a unit of each group.
        Returns:
            The pieces with their ranks, in the order of the groups.
        """
        if self.size == 1:
            return [(list(group), 0) for group in groups]
        total = sum(cost * len(group) for group, cost in zip(groups, costs))
        bounds, done = np.cumsum(self.weights)[:-1] * total, 0.0
        found: list[tuple[list[_U], int]] = []
        for group, cost in zip(groups, costs):
            middles = done + cost * (np.arange(len(group)) + 0.5)
            owners = np.searchsorted(bounds, middles, side="right")
            found += [([u for u, o in zip(group, owners) if o == rank], int(rank)) for rank in np.unique(owners)]
            done += cost * len(group)
        return found

    def turns(self, things: Iterable[_U]) -> Iterator[tuple[_U, bool]]:
        """Yield every `size`-th thing, from this rank's number on, and whether it counts: see `own`."""
        number = -1
        for number, thing in enumerate(things):
            if number % self.size == self.rank:
                yield thing, True
        if self.alike and number >= 0 and number % self.size < self.rank:
            yield thing, False

    def own(self, things: Sequence[_U], owners: Sequence[int]) -> Iterator[tuple[_U, bool]]:
        """Yield what this rank computes, and whether it counts.

        Where ranks must be `alike`, a rank with less to do than another computes something again that does not count.
        """
        mine = [thing for thing, owner in zip(things, owners) if owner == self.rank]
        yield from ((thing, True) for thing in mine)
        if self.alike and things:
            most = max(owners.count(rank) for rank in range(self.size))
            yield from ((things[0], False) for _ in range(most - len(mine)))

    def each(self, things: Sequence[_U], costs: Sequence[float], compute: Callable[[_U], Any]) -> list[Any]:
        """Return what is computed of each thing, as JSON: on one rank each, by the costs, and then known to all."""
        owners = assign(costs, self.weights)
        mine = [compute(thing) for thing, owner in zip(things, owners) if owner == self.rank]
        found = [iter(theirs) for theirs in self.gather(mine)]
        return [next(found[owner]) for owner in owners]

    def in_portions(self, count: int, compute: Callable[[Portion], Sequence[Any]]) -> list[Any]:
        """Return what is computed of `count` things, in order, as JSON: each rank takes its portion, if any."""
        part = self.portion(count)
        mine = [*compute(part)] if part.stop > part.start or self.size == 1 else []
        return [value for theirs in self.gather(mine) for value in theirs]

    # What all need to know

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return what each rank gives."""
        if self.size == 1:
            return [data]
        began = time.perf_counter()
        head = len(data).to_bytes(8, "little") + data[: _SMALL - 8]
        heads = self._gathered(head, _SMALL)
        sizes = [int.from_bytes(head[:8], "little") for head in heads]
        found = [head[8 : 8 + size] for head, size in zip(heads, sizes)]
        rest = max(sizes) - (_SMALL - 8)
        if rest > 0:
            more = self._gathered(data[_SMALL - 8 :], rest)
            found = [part + tail[: size - len(part)] for part, tail, size in zip(found, more, sizes)]
        self.waited_s += time.perf_counter() - began
        return found

    def _gathered(self, data: bytes, size: int) -> list[bytes]:
        mine = mx.array(np.frombuffer(data.ljust(size, b"\0"), np.uint8))
        found = np.array(self.computed(mx.distributed.all_gather(mine[None], group=self.group)))
        return [row.tobytes() for row in found]

    def computed(self, value: mx.array) -> mx.array:
        """Evaluate a collective; raise TrainingError, which names the rank that was lost, where it fails."""
        if self.lifeline is not None:
            self.lifeline.exchange += 1
        try:
            mx.eval(value)
        except RuntimeError as error:
            raise TrainingError(self.lost(10.0) or f"another rank was lost: {error}") from None
        if self.lifeline is not None:
            self.lifeline.exchange += 1
        return value

    def lost(self, seconds: float) -> str | None:
        """Return which rank was lost, once that is known, but wait no longer; None: none is known to be."""
        return self.lifeline.wait_lost(seconds) if self.lifeline is not None else None

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank gives, as JSON; floats are exact, and what JSON does not know is a text."""
        if self.size == 1:
            return [value]
        return [parse_json(found.decode()) for found in self.gather_bytes(json.dumps(value, default=str).encode())]

    def from_first(self, value: Any) -> Any:
        """Return what rank 0 gives, as JSON."""
        return self.gather(value if self.first else None)[0]

    def gather_arrays(self, arrays: Mapping[str, npt.NDArray[Any]]) -> list[dict[str, npt.NDArray[Any]]]:
        """Return the arrays that each rank gives, which may differ in names and shapes."""
        if self.size == 1:
            return [dict(arrays)]
        held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        about = json.dumps({name: (a.dtype.str, a.shape) for name, a in held.items()}).encode()
        data = len(about).to_bytes(8, "little") + about + b"".join(a.tobytes() for a in held.values())
        return [_unpacked(found) for found in self.gather_bytes(data)]

    def sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the sums of all ranks' arrays of these names, in float32, the same bits on every rank.

        They are packed into few messages. All ranks give the same names and shapes.
        """
        if self.size == 1:
            return dict(arrays)
        began, found = time.perf_counter(), dict[str, mx.array]()
        for names in _messages({name: 4 * value.size for name, value in arrays.items()}):
            flat = mx.concatenate([arrays[name].reshape(-1).astype(mx.float32) for name in names])
            mx.eval(flat)
            total = self.computed(mx.distributed.all_sum(flat, group=self.group))
            ends = np.cumsum([arrays[name].size for name in names])[:-1].tolist()
            parts = zip(names, mx.split(total, ends))
            found |= {name: part.reshape(arrays[name].shape) for name, part in parts}
        mx.eval(found)
        self.summing_s += time.perf_counter() - began
        return found

    def arrays_from_first(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return rank 0's arrays, to the bit; what other ranks give is not read."""
        if self.size == 1:
            return dict(arrays)
        kinds = {str(kind): kind for kind in (mx.float32, mx.float16, mx.bfloat16, *_WHOLE_KINDS)}
        about = self.from_first({name: (str(v.dtype), list(v.shape)) for name, v in arrays.items()})
        found: dict[str, mx.array] = {}
        for name, (kind, shape) in about.items():
            dtype = kinds[kind]
            size = int(np.prod(shape, dtype=np.int64)) * dtype.size
            if not size:
                found[name] = mx.zeros(shape, dtype)
                continue
            mine = arrays[name].reshape(-1).view(mx.uint8) if self.first else mx.zeros((size,), mx.uint8)
            parts = mx.split(mine, list(range(MESSAGE, size, MESSAGE))) if size > MESSAGE else [mine]
            sums = [self.computed(mx.distributed.all_sum(part, group=self.group)) for part in parts]
            found[name] = mx.concatenate(sums).view(dtype).reshape(shape)
            mx.eval(found[name])
        return found


def assign(costs: Sequence[float], weights: Sequence[float]) -> list[int]:
    """Return the rank of each thing that cannot be cut: the heaviest first, to the rank with the least to do.

    Args:
        costs: of each thing.
        weights: the share of the work that each rank takes.
    """
    load, found = np.zeros(len(weights)), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = int(np.argmin((load + costs[i]) / np.array(weights)))
        load[found[i]] += costs[i]
    return found


_WHOLE_KINDS = (mx.int32, mx.uint32, mx.int64, mx.uint64, mx.int16, mx.uint16, mx.int8, mx.uint8, mx.bool_)


def _messages(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the names of the arrays of each message."""
    names, held = list[str](), 0
    for name, size in sizes.items():
        if names and held + size > MESSAGE:
            yield names
            names, held = [], 0
        names, held = [*names, name], held + size
    if names:
        yield names


def _unpacked(data: bytes) -> dict[str, npt.NDArray[Any]]:
    at = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, npt.NDArray[Any]] = {}
    for name, (kind, shape) in parse_json(data[8:at].decode()).items():
        dtype, count = np.dtype(kind), int(np.prod(shape, dtype=np.int64))
        found[name] = np.frombuffer(data, dtype, count, at).reshape(shape).copy()
        at += count * dtype.itemsize
    return found


# --- network ----------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """What the connection between ranks takes.

    Attributes:
        latency_s: seconds of the smallest message.
        summed_per_s: bytes a second of large arrays that are added up.
        gathered_per_s: bytes a second of large arrays that are gathered, those of all ranks together.
    """

    latency_s: float
    summed_per_s: float
    gathered_per_s: float


def measure_network(ranks: Ranks) -> Network:
    """Measure the connection by gathering a few bytes and adding up a few megabytes; all ranks get the same numbers."""
    small, large = mx.zeros(16), mx.zeros(1 << 20)  # 4 MB
    mx.eval(small, large)

    def seconds(collective: Callable[..., mx.array], value: mx.array, times: int) -> float:
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            ranks.computed(collective(value, group=ranks.group))
            taken.append(time.perf_counter() - began)
        return float(np.median(taken[1:]))

    latency = seconds(mx.distributed.all_sum, small, 12)
    summed, gathered = (seconds(c, large, 4) for c in (mx.distributed.all_sum, mx.distributed.all_gather))
    speeds = large.nbytes / max(summed - latency, 1e-9), ranks.size * large.nbytes / max(gathered - latency, 1e-9)
    latencies, *both = zip(*ranks.gather([latency, *speeds]))
    return Network(max(latencies), *map(min, both))


_current = Ranks()
_spoken_for: list[bool] = []  # of the last `joined`, whether another rank writes what went wrong


def spoken_for() -> bool:
    """Return whether another rank writes what went wrong."""
    return bool(_spoken_for) and _spoken_for[-1]


def current() -> Ranks:
    """Return the ranks that work together now: those of `joined`, or this process alone."""
    return _current


@contextmanager
def joined(timeout_s: float = TIMEOUT, *, training: bool = False) -> Iterator[Ranks]:
    """Join the processes that were started with this one, if any were, for the time of the block.

    A block inside another one has the same ranks; inside training it is of this process alone, since other ranks may
    not come by.

    Args:
        timeout_s: silence after which a rank counts as lost.
    Raises:
        ConfigError: they cannot be connected.
    """
    global _current
    if _current.training:
        before, _current = _current, Ranks()
        try:
            yield _current
        finally:
            _current = before
        return
    if _current.size > 1 or not several_ranks():
        yield _current
        return
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes cannot be connected: {error}") from None
    if group.size() == 1:
        yield _current
        return
    before, ranks = _current, Ranks(group)
    ranks.training = training
    line = Lifeline.listen() if ranks.first else None
    address = ranks.from_first(line and line.address)
    how: dict[str, Any] = {"timeout_s": timeout_s, "on_lost": lambda text: ranks.on_lost(text)}
    line = line.start(ranks.hosts, **how) if line else Lifeline.connect(address, ranks.rank, ranks.hosts, **how)
    _current, ranks.lifeline = ranks, line
    try:
        ranks.gather(None)  # an error that comes now reaches all ranks
        yield ranks
    except BaseException as error:
        if ranks.agreed:
            raise
        # mlx.launch interrupts the others where one has ended; that is not what went wrong.
        if isinstance(error, KeyboardInterrupt) and (lost := line.wait_lost(2.0)):
            raise TrainingError(lost) from None
        with suppress(KeyboardInterrupt):  # mlx.launch interrupts this rank, too, once another has ended by its error
            line.report(_reason(error))
            line.close()
        raise
    finally:
        _spoken_for.append(not line.speaks)
        line.close()
        _current = before


def check_same(ranks: Ranks, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse ranks that would not do the same thing.

    Args:
        facts: kind -> name -> value, as JSON: what has to be the same on all ranks.
    Raises:
        ConfigError: every difference from rank 0, with its rank.
    """
    every = ranks.gather(facts)
    problems = []
    for rank, theirs in enumerate(every):
        for kind, mine in every[0].items():
            other = theirs.get(kind, {})
            for name in sorted({*mine, *other}):
                if mine.get(name) != other.get(name):
                    seen, wanted = (json.dumps(values.get(name)) for values in (other, mine))
                    problems.append(f"{ranks.name(rank)}: {kind} {name} is {seen}, {ranks.name(0)} has {wanted}")
    if problems:
        raise ConfigError("\n".join(problems))


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name
