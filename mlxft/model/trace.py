"""What a step of training would hold in memory, found from its graph and never run.

MLX is lazy: a model whose weights were never read can be called, differentiated, and its graph exported, with the
shape of every array. `Graph.peak` walks that graph in the order in which MLX evaluates it and counts bytes: buffers
that views share, inputs whose memory becomes an output's, copies that an operation makes of strided inputs.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlxft.device import planned_backend
from mlxft.errors import ModelError
from mlxft.model.cpu import quicker
from mlxft.model.fused import fused_on
from mlxft.model.random import aside

# How far MLX runs ahead of a CPU: 10 tasks of 10 pieces of work each; an operation is two, a view one.
QUEUE, TASK = 100, 10
WIDTH = 20  # MLX_BFS_MAX_WIDTH: how far MLX goes in breadth when it orders a graph
# No array holds data here: shapes and strides only, in elements, over this one byte.
_BYTE: npt.NDArray[np.uint8] = np.zeros(1, np.uint8)

_VIEWS = ("StopGradient", "CustomTransforms", "Depends", "Copy", "AsStrided", "View")
# May put their result where an input was that nobody else needs.
_UNARY = {
    *("Abs", "AsType", "Cos", "Erf", "Exp", "Expm1", "Log", "Log1p", "LogicalNot", "Negative", "Round", "Rsqrt"),
    *("Sigmoid", "Sign", "Sin", "Softmax", "Sqrt", "Square", "Tanh"),
}
_BINARY = {
    *("Add", "ArcTan2", "BitwiseBinary", "Divide", "Equal", "Greater", "GreaterEqual", "Less", "LessEqual"),
    *("LogAddExp", "LogicalAnd", "LogicalOr", "Maximum", "Minimum", "Multiply", "NotEqual", "Power", "Remainder"),
    "Subtract",
}
_MARK = "ErfInv"  # stands for `mx.depends` in a graph that is exported
_UPDATES = {"Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate"}


@dataclass
class Op:
    """One operation of a graph."""

    name: str
    inputs: list[str]
    outputs: list[str]
    arguments: list[Any]

    def shares(self, out: str) -> int:
        """Which input an output is a view of, if it is one."""
        if self.name == "CustomTransforms":  # its inputs are arguments, and then what they became
            return len(self.inputs) - len(self.outputs) + self.outputs.index(out)
        return self.outputs.index(out) if self.name == "Depends" else 0


@dataclass
class _Array:
    view: npt.NDArray[np.uint8]
    buffer: int
    users: int
    held: bool


@dataclass
class Graph:
    """Operations with the shapes of all arrays.

    Attributes:
        inputs: names of the arguments, in order.
        outputs: names of the results.
        sizes: name -> (shape, bytes of an item).
    """

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    sizes: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def receive(self, item: dict[str, Any]) -> None:
        """Take one item of `mx.export_function`'s callback."""
        kind = item["type"]
        if kind == "inputs":
            self.inputs = self._names(item["inputs"])
        elif kind == "outputs":
            self.outputs = self._names(item["outputs"])
        elif kind == "constants":
            for name, value in item["constants"]:
                self.sizes[name] = (tuple(value.shape), value.dtype.size)
        elif kind == "primitive":
            names = self._names(item["inputs"]), self._names(item["outputs"])
            self.ops.append(Op(item["name"], *names, item["arguments"]))

    def _names(self, arrays: Iterable[tuple[str, Any, Any]]) -> list[str]:
        names = []
        for name, shape, dtype in arrays:
            self.sizes[name] = (tuple(shape), dtype.size)
            names.append(name)
        return names

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of arrays."""
        return sum(math.prod(self.sizes[n][0]) * self.sizes[n][1] for n in names)

    def read(self) -> set[str]:
        """The inputs that the outputs depend on."""
        used = {n for op in self.ops for n in op.inputs} | set(self.outputs)
        return {n for n in self.inputs if n in used}

    def peak(self, ahead: bool = False) -> int:
        """Most bytes that exist at one time beside the inputs.

        Args:
            ahead: as MLX works while memory lasts on a CPU: it prepares operations before those in front are done, and
                holds their buffers as long. Else each waits for the one before, as where memory is short.
        """
        return _Run(self, QUEUE if ahead and planned_backend() == "cpu" else 0).peak

    def pruned(self) -> Graph:
        """Without what the outputs do not depend on."""
        maker = {out: op for op in self.ops for out in op.outputs}
        found, names = dict[int, Op](), list(self.outputs)
        while names:
            op = maker.get(names.pop())
            if op is not None and id(op) not in found:
                found[id(op)] = op
                names += op.inputs
        return Graph(self.inputs, self.outputs, [op for op in self.ops if id(op) in found], self.sizes)

    def as_run(self) -> Graph:
        """As MLX builds it: the exporter makes arrays of one value once that are alike, and knows no `mx.depends`."""
        users = defaultdict[str, list[Op]](list)
        for op in self.ops:
            for name in op.inputs:
                users[name].append(op)
        made = {out: op for op in self.ops for out in op.outputs}
        waits = dict[int, tuple[str, str]]()  # id of an Add -> what waits, and for what
        for mark in (op for op in self.ops if op.name == _MARK):
            awaited, reached = made[mark.inputs[0]].inputs[0], [mark.outputs[0]]
            while reached:
                name = reached.pop()
                for op in users[name]:
                    if op.name == "Add":
                        waits[id(op)] = next(n for n in op.inputs if n != name), awaited
                    else:
                        reached += op.outputs
        ops = list[Op]()
        for op in self.ops:
            name, inputs = op.name, list(op.inputs)
            if id(op) in waits:
                name, inputs = "Depends", list(waits[id(op)])
            for i, source in enumerate(inputs):
                if source in made and made[source].name == "Full":
                    inputs[i] = f"{source} of {op.outputs[0]}"
                    self.sizes[inputs[i]] = self.sizes[source]
                    ops.append(Op("Full", made[source].inputs, [inputs[i]], made[source].arguments))
            ops.append(Op(name, inputs, op.outputs, op.arguments))
        return Graph(self.inputs, self.outputs, ops, self.sizes)

    def order(self) -> list[Op]:
        """The operations as MLX evaluates them: breadth first from the outputs up to a width, then turned round."""
        maker = {out: op for op in self.ops for out in op.outputs}
        root = Op("", self.outputs, [], [])
        waits = Counter(id(maker[n]) for op in [*self.ops, root] for n in op.inputs if n in maker)
        tape, stack = [root], list[tuple[Op, int]]()
        at = 0
        while at < len(tape) or stack:
            if at < len(tape):
                op, begin = tape[at], 0
                at += 1
            else:
                op, begin = stack.pop()
            for j in range(begin, len(op.inputs)):
                made_by = maker.get(op.inputs[j])
                if made_by is None:
                    continue
                if len(tape) - at >= WIDTH:
                    stack.append((op, j))
                    break
                waits[id(made_by)] -= 1
                if not waits[id(made_by)]:
                    tape.append(made_by)
        assert len(tape) == len(self.ops) + 1, "operations that no output depends on"
        return tape[:0:-1]


class _Run:
    """A graph's evaluation, counted and not carried out."""

    def __init__(self, graph: Graph, queue: int) -> None:
        self.graph, self.now, self.peak = graph, 0, 0
        self.queue, self.given = queue, 0
        self.waiting: deque[tuple[int, set[int]]] = deque()  # work given so far, and the buffers it holds
        self.users = Counter(n for op in graph.ops for n in op.inputs)
        self.arrays: dict[str, _Array] = {}
        self.buffers: dict[int, list[int]] = {}  # buffer -> [bytes, arrays that share it]
        self.kept = set(graph.outputs)
        made = {n for op in graph.ops for n in op.outputs}
        for name in graph.sizes:
            if name not in made:
                self._new(name, held=True)
        self.now = self.peak = 0
        for op in graph.order():
            buffers = {self.arrays[name].buffer for name in op.inputs}
            views = False
            for out in op.outputs:
                views = self._evaluate(op, out)
            self._hold(buffers - {self.arrays[out].buffer for out in op.outputs}, 1 if views else 2)
            for name in op.inputs:
                self._release(name)
            for name in op.outputs:
                if not self.users[name] and name not in self.kept:
                    self._drop(name)

    def _new(self, name: str, held: bool = False, view: Any = None) -> None:
        shape, item = self.graph.sizes[name]
        buffer = len(self.buffers)
        view = _dense(shape) if view is None else view
        size = _apart(view).size * item
        self.buffers[buffer] = [size, 1]
        self.arrays[name] = _Array(view, buffer, self.users[name], held or name in self.kept)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _share(self, name: str, other: str, view: Any) -> None:
        buffer = self.arrays[other].buffer
        self.buffers[buffer][1] += 1
        self.arrays[name] = _Array(view, buffer, self.users[name], name in self.kept)

    def _release(self, name: str) -> None:
        array = self.arrays[name]
        array.users -= 1
        if not array.users and not array.held:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._let_go(self.arrays.pop(name).buffer)

    def _donates(self, op: Op, name: str, out: str) -> bool:
        """Whether the memory of an input that nobody else needs becomes the output's."""
        array = self.arrays[name]
        alone = array.users == op.inputs.count(name) and not array.held and self.buffers[array.buffer][1] == 1
        shape, item = self.graph.sizes[out]
        fits = self.buffers[array.buffer][0] == math.prod(shape) * item
        return alone and fits and self.graph.sizes[name][1] == item and _is_dense(array.view)

    def _hold(self, buffers: set[int], work: int) -> None:
        """Hold an operation's buffers until its work, and all before it, can be taken as done."""
        if not self.queue:
            return
        self.given += work
        for buffer in buffers:
            self.buffers[buffer][1] += 1
        self.waiting.append((self.given, buffers))
        while self.waiting and self.waiting[0][0] <= self.given // TASK * TASK - self.queue:
            for buffer in self.waiting.popleft()[1]:
                self._let_go(buffer)

    def _let_go(self, buffer: int) -> None:
        self.buffers[buffer][1] -= 1
        if not self.buffers[buffer][1]:
            self.now -= self.buffers[buffer][0]

    def _evaluate(self, op: Op, out: str) -> bool:
        """Make one output. Returns whether it is a view."""
        shape, _ = self.graph.sizes[out]
        source = op.inputs[op.shares(out)] if op.inputs else ""
        first = self.arrays[source].view if source else _BYTE
        if source and (view := _as_view(op, first, shape)) is not None:
            self._share(out, source, view)
            return True
        candidates = op.inputs[:1] if op.name in _UNARY | _UPDATES else op.inputs if op.name in _BINARY else []
        if op.name == "Select":
            candidates = op.inputs[1:]
        for name in candidates:
            if self._donates(op, name, out):
                self._share(out, name, self.arrays[name].view)
                return False
        strided = self._strided_copies(op)
        self.now += strided
        if op.name in _UNARY and _is_dense(_apart(first)):
            self._new(out, view=first)  # in the order of its input, and as often the same
        else:
            self._new(out)
        self.now -= strided
        return False

    def _strided_copies(self, op: Op) -> int:
        """Bytes that a matrix product copies, since it wants its last two dimensions dense."""
        if op.name not in ("Matmul", "QuantizedMatmul", "GatherMM", "GatherQMM", "AddMM"):
            return 0
        total = 0
        for name in op.inputs[:2]:
            view = self.arrays[name].view
            if view.ndim < 2:
                continue
            rows, columns = view.strides[-2:]
            dense = (columns == 1 and rows == view.shape[-1]) or (rows == 1 and columns == view.shape[-2])
            total += 0 if dense or 1 in view.shape[-2:] else view.size * self.graph.sizes[name][1]
        return total


def _dense(shape: Sequence[int]) -> Any:
    return _strided(shape, np.cumprod([1, *reversed(shape[1:])])[::-1] if shape else ())


def _strided(shape: Sequence[int], strides: Any) -> Any:
    return np.lib.stride_tricks.as_strided(_BYTE, tuple(shape), tuple(int(s) for s in strides))


def _apart(view: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """What a broadcast view repeats."""
    return view[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in view.strides)]


def _is_dense(view: npt.NDArray[np.uint8]) -> bool:
    """Whether the elements lie side by side, in whatever order."""
    expected = 1
    for stride, count in sorted((s, n) for s, n in zip(view.strides, view.shape) if n > 1):
        if stride != expected:
            return False
        expected *= count
    return True


def _as_view(op: Op, array: Any, shape: tuple[int, ...]) -> Any:
    """The output where it is a view of the first input, else None."""
    if op.name == "Broadcast":
        return np.broadcast_to(array, shape)
    if op.name == "Transpose":
        return array.transpose(op.arguments[0])
    if op.name == "Slice":
        return array[tuple(slice(*bounds) for bounds in zip(*op.arguments))]
    if op.name in ("ExpandDims", "Squeeze", "Unflatten", "Flatten", "Reshape", *_VIEWS):
        try:
            return np.reshape(array, shape, copy=False)
        except ValueError:  # the strides do not allow it: a copy
            return None
    if op.name == "Contiguous" and array.flags.c_contiguous:
        return array
    return None


def arrays_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the model holds arrays, also those that are no parameters: (module, key)."""
    return [(m, key) for _, m in model.named_modules() for key, value in m.items() if isinstance(value, mx.array)]


def trace(model: nn.Module, fun: Callable[..., Any], arguments: Sequence[mx.array]) -> tuple[Graph, list[str]]:
    """The graph of `fun(*arguments)`, a list of arrays, with all arrays of the model as further inputs.

    Returns:
        The graph, and the inputs that are `arguments`.
    Raises:
        ModelError: the graph can not be had.
    """
    slots = arrays_of(model)
    values = [module[key] for module, key in slots]

    def put(arrays: Iterable[mx.array]) -> None:
        for (module, key), value in zip(slots, arrays):
            dict.__setitem__(module, key, value)

    def whole(*given: mx.array) -> Any:
        put(given[len(arguments) :])
        return fun(*given[: len(arguments)])

    graph = Graph()
    try:
        # Aside: a dropout would leave its tracer in the random state.
        with (
            aside(),
            quicker(model),
            fused_on(planned_backend()),
            _exportable({v.size for _, v in tree_flatten(model.trainable_parameters())}),
        ):
            mx.export_function(graph.receive, whole, *arguments, *values)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"memory can not be predicted for this architecture: {error}") from error
    finally:
        put(values)
    return graph.as_run().pruned(), graph.inputs[: len(arguments)]


@contextmanager
def _exportable(trained: set[int]) -> Iterator[None]:
    """Stand-ins for what can not be exported, of the same shapes and dependencies.

    Args:
        trained: sizes of the trained parameters.
    """
    depends, gather_mm = mx.depends, mx.gather_mm

    def after(arrays: Sequence[mx.array], others: Sequence[mx.array]) -> list[mx.array]:
        for other in others:
            mark = mx.erfinv(mx.stop_gradient(other).max())
            arrays = [a + mark.astype(a.dtype) for a in arrays]
        return list(arrays)

    def product(a: mx.array, b: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # With sorted indices, the gradient of the experts' weights is a product by segments, which has no export.
        if not kwargs.get("sorted_indices") or b.size not in trained:
            return gather_mm(a, b, *args, **kwargs)
        out = gather_mm(a, mx.stop_gradient(b), *args, **kwargs)
        one = mx.ones((1, 1, 1), b.dtype)
        dense = mx.stop_gradient(a).reshape(-1, a.shape[-1]) @ (b * one).sum(axis=0)
        return out + (dense.reshape(out.shape) if dense.size == out.size else dense.mean())

    mx.depends, mx.gather_mm = after, product  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.depends, mx.gather_mm = depends, gather_mm
