"""Plan the memory of a step: trace its graph, walk what lives when, and extrapolate to other shapes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxft.device import Backend, backend, planned_backend
from mlxft.errors import ModelError
from mlxft.model.cpu import patched, quicker
from mlxft.model.layers import SAVED, LowRank, aside, probing, unrounded
from mlxft.model.logits import (
    Packing,
    Split,
    chunk_size,
    hidden_kl,
    hidden_logprobs,
    hidden_nll,
    rows_logprobs_entropy,
    rows_nll,
)
from mlxft.model.prefix import Completions, Rows, ScoredRows, Sharing
from mlxft.model.sampling import PREFILL, takes_rows
from mlxft.model.shard import Shares, shares

# --- fused ------------------------------------------------------------------------------------------------------------
# Stand-ins for what a GPU computes in one kernel, so that a step can be traced and planned on any machine.
#
# MLX's exporter does not know the gradients of these kernels, and a CPU computes them by many operations. A stand-in
# computes something else, but its output and what it keeps for the gradient are as large as the kernel's.

HEADS = (64, 72, 80, 96, 128, 192, 256)  # head widths with a fused attention kernel for training (MLX 0.32)
CUDA_TOKENS = 128  # on CUDA, the number of queries must also be a multiple of this


def plain_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **other: Any
) -> mx.array:
    """Compute attention by the operations that MLX uses where it has no kernel; arguments as of mx.fast's function."""
    dtype = mx.result_type(q, k, v)
    q, k, v = q.astype(dtype) * mx.array(scale, dtype), k.astype(dtype), v.astype(dtype)
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    queries, keys = q.shape[2], k.shape[2]
    if isinstance(mask, mx.array):
        mask = mx.broadcast_to(mask, (*q.shape[:3], keys))
        mask = mask if repeats == 1 else mx.unflatten(mask, 1, (groups, repeats))
    elif mask is not None:  # "causal", the only mask with a name
        mask = mx.arange(keys - queries, keys)[:, None] >= mx.arange(keys)[None]
    if repeats > 1:
        q, k, v = mx.unflatten(q, 1, (groups, repeats)), mx.expand_dims(k, 2), mx.expand_dims(v, 2)
    scores = q @ k.swapaxes(-1, -2)
    if mask is not None:
        hidden = mx.array(mx.finfo(dtype).min, dtype)
        scores = mx.where(mask, scores, hidden) if mask.dtype == mx.bool_ else scores + mask.astype(dtype)
    if sinks is not None:  # one more column, which every query sees
        column = mx.expand_dims(sinks.astype(dtype), (0, 2, 3))
        column = column if repeats == 1 else mx.unflatten(column, 1, (groups, repeats))
        scores = mx.concatenate([mx.broadcast_to(column, (*scores.shape[:-1], 1)), scores], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = (weights if sinks is None else weights[..., 1:]) @ v
    return out if repeats == 1 else mx.flatten(out, 1, 2)


def _attention(kind: Backend, plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return a stand-in for this backend's attention kernel; it calls `plain` where the backend has no kernel."""

    def sum_of_squares(x: mx.array) -> mx.array:  # (B, H, T, D) -> (B, H, 1, 1); its gradient needs x
        return mx.square(x).sum(axis=(-2, -1), keepdims=True)

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, sinks: Any = None, **how: Any
    ) -> mx.array:
        fused = sinks is None and not isinstance(mask, mx.array) and {q.shape[-1], v.shape[-1]} <= set(HEADS)
        if not fused or (kind == "cuda" and q.shape[2] % CUDA_TOKENS):
            return plain(q, k, v, mask=mask, sinks=sinks, **how)
        factor = mx.repeat(sum_of_squares(k) * sum_of_squares(v), q.shape[1] // k.shape[1], axis=1)
        width = v.shape[-1]
        wide = q if width <= q.shape[-1] else mx.concatenate([q] * -(-width // q.shape[-1]), -1)
        return mx.exp(wide[..., :width] * factor)  # its gradient needs the output, as the kernel's does

    return attention


def _cross_entropy(logits: mx.array, targets: mx.array, **other: Any) -> mx.array:
    return mx.logsumexp(logits, axis=-1).astype(mx.float32)  # its gradient has the logits' shape and type


def _plain_cross_entropy(logits: mx.array, targets: mx.array, **other: Any) -> mx.array:
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)


def _gated_delta(
    q: mx.array, k: mx.array, v: mx.array, gamma: mx.array, beta: mx.array, initial_state: Any = None, mask: Any = None
) -> list[mx.array]:
    factor = mx.square(q).sum() * mx.square(k).sum() * mx.square(gamma).sum() * mx.square(beta).sum()
    y = mx.exp(v * factor.astype(v.dtype))
    b, _, heads, width = v.shape
    state = mx.zeros((b, heads, width, q.shape[-1])) if initial_state is None else initial_state
    return [y, state * y.sum()]


def fused_on(kind: Backend) -> AbstractContextManager[None]:
    """Replace the functions of `mx.fast` by stand-ins for this backend's kernels inside the block."""
    theirs: dict[str, Callable[..., Any]] = {}
    if kind != "cpu":
        # Another backend may lack a kernel that this machine has: it then computes plain operations.
        plain = mx.fast.scaled_dot_product_attention if kind == backend() else plain_attention
        theirs["scaled_dot_product_attention"] = _attention(kind, plain)
        theirs["cross_entropy"] = _cross_entropy
    elif backend() != "cpu":
        theirs["scaled_dot_product_attention"] = plain_attention
        theirs["cross_entropy"] = _plain_cross_entropy
    if kind == "metal":
        theirs["gated_delta_update"] = _gated_delta
    return patched((mx.fast, name, function) for name, function in theirs.items())


# --- trace ------------------------------------------------------------------------------------------------------------
# What a training step would hold in memory, computed from its graph without running it.
#
# MLX is lazy: a model whose weights were never read can be called and differentiated, and its graph exported with the
# shape of every array. `Graph.peak` walks that graph in the order in which MLX evaluates it and counts bytes: buffers
# that views share, inputs whose memory an output reuses, copies that an operation makes of strided inputs.

# How far MLX runs ahead of a CPU: 10 tasks of 10 pieces of work each; an operation counts as two, a view as one.
QUEUE, TASK = 100, 10
WIDTH = 20  # MLX_BFS_MAX_WIDTH: most operations that MLX queues breadth first when it orders a graph
# Arrays here have shapes and strides only, in elements, over this one byte.
_BYTE: npt.NDArray[np.uint8] = np.zeros(1, np.uint8)

_VIEWS = ("StopGradient", "CustomTransforms", "Depends", "Copy", "AsStrided", "View")
# These may write their result into an input that nothing else needs.
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
    """An operation of a graph."""

    name: str
    inputs: list[str]
    outputs: list[str]
    arguments: list[Any]


@dataclass
class _Array:
    view: npt.NDArray[np.uint8]
    buffer: int
    users: int
    held: bool


@dataclass
class Graph:
    """Operations with the names of arguments and results; `sizes` maps each array to (shape, bytes of an item)."""

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    sizes: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def receive(self, item: dict[str, Any]) -> None:
        """Take one item from `mx.export_function`'s callback."""
        constants = [(name, value.shape, value.dtype) for name, value in item.get("constants", ())]
        for name, shape, dtype in [*item.get("inputs", ()), *item.get("outputs", ()), *constants]:
            self.sizes[name] = (tuple(shape), dtype.size)
        inputs, outputs = ([name for name, *_ in item.get(part, ())] for part in ("inputs", "outputs"))
        if item["type"] == "inputs":
            self.inputs = inputs
        elif item["type"] == "outputs":
            self.outputs = outputs
        elif item["type"] == "primitive":
            self.ops.append(Op(item["name"], inputs, outputs, item["arguments"]))

    @property
    def makers(self) -> dict[str, Op]:
        """The operation that makes each array."""
        return {out: op for op in self.ops for out in op.outputs}

    def peak(self, ahead: bool = False) -> int:
        """Return the most bytes that exist at one time, without the inputs.

        With `ahead`, as MLX works on a CPU while memory lasts: it prepares operations before the earlier ones are done,
        and holds their buffers as long. Otherwise each waits for the one before.
        """
        return _Run(self, QUEUE if ahead and planned_backend() == "cpu" else 0).peak

    def pruned(self) -> Graph:
        """Return the graph without operations that no output depends on."""
        makers, found, names = self.makers, dict[int, Op](), list(self.outputs)
        while names:
            op = makers.get(names.pop())
            if op is not None and id(op) not in found:
                found[id(op)] = op
                names += op.inputs
        return replace(self, ops=[op for op in self.ops if id(op) in found])

    def as_run(self) -> Graph:
        """Return the graph as MLX builds it: the exporter merges equal constant arrays, and drops `mx.depends`."""
        users = defaultdict[str, list[Op]](list)
        for op in self.ops:
            for name in op.inputs:
                users[name].append(op)
        makers = self.makers
        waits = dict[int, list[str]]()  # id of an Add -> what waits, and for what
        for mark in (op for op in self.ops if op.name == _MARK):
            awaited, reached = makers[mark.inputs[0]].inputs[0], [mark.outputs[0]]
            while reached:
                name = reached.pop()
                for op in users[name]:
                    if op.name == "Add":
                        waits[id(op)] = [next(n for n in op.inputs if n != name), awaited]
                    else:
                        reached += op.outputs
        ops = list[Op]()
        for op in self.ops:
            inputs = list(waits.get(id(op), op.inputs))
            for i, source in enumerate(inputs):
                if source in makers and makers[source].name == "Full":
                    inputs[i] = f"{source} of {op.outputs[0]}"
                    self.sizes[inputs[i]] = self.sizes[source]
                    ops.append(replace(makers[source], outputs=[inputs[i]]))
            ops.append(replace(op, name="Depends" if id(op) in waits else op.name, inputs=inputs))
        return replace(self, ops=ops)

    def order(self) -> list[Op]:
        """Return the operations in MLX's order: breadth first from the outputs up to a width, then reversed."""
        makers, root = self.makers, Op("", self.outputs, [], [])
        waits = Counter(id(makers[n]) for op in [*self.ops, root] for n in op.inputs if n in makers)
        tape, stack = [root], list[tuple[Op, int]]()
        at = 0
        while at < len(tape) or stack:
            if at < len(tape):
                op, begin = tape[at], 0
                at += 1
            else:
                op, begin = stack.pop()
            for j in range(begin, len(op.inputs)):
                maker = makers.get(op.inputs[j])
                if maker is None:
                    continue
                if len(tape) - at >= WIDTH:
                    stack.append((op, j))
                    break
                waits[id(maker)] -= 1
                if not waits[id(maker)]:
                    tape.append(maker)
        assert len(tape) == len(self.ops) + 1, "operations that no output depends on"
        return tape[:0:-1]


class _Run:
    """A simulated evaluation of a graph that counts bytes."""

    def __init__(self, graph: Graph, queue: int) -> None:
        self.graph, self.queue, self.given = graph, queue, 0
        self.waiting: deque[tuple[int, set[int]]] = deque()  # work queued so far, and the buffers it holds
        self.users = Counter(n for op in graph.ops for n in op.inputs)
        self.arrays: dict[str, _Array] = {}
        self.buffers: list[list[int]] = []  # [bytes, arrays that share it] of each buffer
        self.kept = set(graph.outputs)
        self.now = self.peak = 0
        for name in graph.sizes.keys() - graph.makers.keys():
            self._add(name, held=True)
        self.now = self.peak = 0
        for op in graph.order():
            buffers = {self.arrays[name].buffer for name in op.inputs}
            views = False
            for out in op.outputs:
                views = self._evaluate(op, out)
            self._hold(buffers - {self.arrays[out].buffer for out in op.outputs}, 1 if views else 2)
            for name in op.inputs:
                array = self.arrays[name]
                array.users -= 1
                if not array.users and not array.held:
                    self._let_go(self.arrays.pop(name).buffer)
            for name in op.outputs:
                if not self.users[name] and name not in self.kept:
                    self._let_go(self.arrays.pop(name).buffer)

    def _add(self, name: str, view: Any = None, shared: str = "", held: bool = False) -> None:
        """Add an array, in a buffer of its own or in that of the array `shared`."""
        shape, item = self.graph.sizes[name]
        view = _dense(shape) if view is None else view
        buffer = self.arrays[shared].buffer if shared else len(self.buffers)
        if not shared:
            size = _apart(view).size * item
            self.buffers.append([size, 0])
            self.now += size
            self.peak = max(self.peak, self.now)
        self.buffers[buffer][1] += 1
        self.arrays[name] = _Array(view, buffer, self.users[name], held or name in self.kept)

    def _donates(self, op: Op, name: str, out: str) -> bool:
        """Return whether an output may reuse the memory of an input that nothing else needs."""
        array = self.arrays[name]
        alone = array.users == op.inputs.count(name) and not array.held and self.buffers[array.buffer][1] == 1
        shape, item = self.graph.sizes[out]
        fits = self.buffers[array.buffer][0] == math.prod(shape) * item
        return alone and fits and self.graph.sizes[name][1] == item and _is_dense(array.view)

    def _hold(self, buffers: set[int], work: int) -> None:
        """Hold an operation's buffers until its work, and everything queued before it, counts as done."""
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
        """Make one output, and return whether it is a view."""
        at = op.outputs.index(out) if op.name in ("CustomTransforms", "Depends") else 0
        if op.name == "CustomTransforms":  # its inputs are the arguments, then the outputs
            at += len(op.inputs) - len(op.outputs)
        source = op.inputs[at] if op.inputs else ""
        first = self.arrays[source].view if source else _BYTE
        if source and (view := _as_view(op, first, self.graph.sizes[out][0])) is not None:
            self._add(out, view, source)
            return True
        candidates = op.inputs[:1] if op.name in _UNARY | _UPDATES else op.inputs if op.name in _BINARY else []
        if op.name == "Select":
            candidates = op.inputs[1:]
        for name in candidates:
            if self._donates(op, name, out):
                self._add(out, self.arrays[name].view, name)
                return False
        strided = self._strided_copies(op)
        self.now += strided
        # A unary operation keeps the order of its input's elements, and a broadcast one's repetition.
        self._add(out, first if op.name in _UNARY and _is_dense(_apart(first)) else None)
        self.now -= strided
        return False

    def _strided_copies(self, op: Op) -> int:
        """Return the bytes that a matrix product copies, because it needs its last two dimensions dense."""
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
    strides = np.cumprod([1, *reversed(shape[1:])])[::-1] if shape else ()
    return np.lib.stride_tricks.as_strided(_BYTE, tuple(shape), tuple(int(s) for s in strides))


def _apart(view: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return one copy of what a broadcast view repeats."""
    return view[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in view.strides)]


def _is_dense(view: npt.NDArray[np.uint8]) -> bool:
    """Return whether the elements lie side by side, in any order."""
    expected = 1
    for stride, count in sorted((s, n) for s, n in zip(view.strides, view.shape) if n > 1):
        if stride != expected:
            return False
        expected *= count
    return True


def _as_view(op: Op, array: Any, shape: tuple[int, ...]) -> Any:
    """Return the output if it is a view of the first input, otherwise None."""
    if op.name == "Broadcast":
        return np.broadcast_to(array, shape)
    if op.name == "Transpose":
        return array.transpose(op.arguments[0])
    if op.name == "Slice":
        return array[tuple(slice(*bounds) for bounds in zip(*op.arguments))]
    if op.name in ("ExpandDims", "Squeeze", "Unflatten", "Flatten", "Reshape", *_VIEWS):
        try:
            return np.reshape(array, shape, copy=False)
        except ValueError:  # the strides do not allow it, so MLX copies
            return None
    if op.name == "Contiguous" and array.flags.c_contiguous:
        return array
    return None


def _arrays_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the places (module, key) of all arrays that the model holds, parameters or not."""
    return [(m, key) for _, m in model.named_modules() for key, value in m.items() if isinstance(value, mx.array)]


def trace(model: nn.Module, fun: Callable[..., Any], arguments: Sequence[mx.array]) -> tuple[Graph, list[str]]:
    """Trace `fun(*arguments)`, which returns a list of arrays; every array of the model is a further input.

    Returns the graph and the names of its inputs that are `arguments`; raises ModelError if it cannot be exported.
    """
    slots = _arrays_of(model)
    values = [module[key] for module, key in slots]

    def put(arrays: Iterable[mx.array]) -> None:
        for (module, key), value in zip(slots, arrays):
            dict.__setitem__(module, key, value)

    def whole(*given: mx.array) -> Any:
        put(given[len(arguments) :])
        return fun(*given[: len(arguments)])

    graph = Graph()
    trained = {v.size for _, v in tree_flatten(model.trainable_parameters())}
    try:
        # Aside, because a dropout would leave its tracer in the random state.
        with aside(), quicker(model), fused_on(planned_backend()), _exportable(trained):
            mx.export_function(graph.receive, whole, *arguments, *values)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"memory cannot be predicted for this architecture: {error}") from error
    finally:
        put(values)
    return graph.as_run().pruned(), graph.inputs[: len(arguments)]


def _exportable(trained: set[int]) -> AbstractContextManager[None]:
    """Replace functions that cannot be exported by stand-ins with the same shapes and dependencies.

    `trained` has the sizes of the trained parameters.
    """
    gather_mm = mx.gather_mm

    def after(arrays: Sequence[mx.array], others: Sequence[mx.array]) -> list[mx.array]:
        for other in others:
            mark = mx.erfinv(mx.stop_gradient(other).max())
            arrays = [a + mark.astype(a.dtype) for a in arrays]
        return list(arrays)

    def product(a: mx.array, b: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # With sorted indices, the gradient of the experts' weights is a segmented product, which cannot be exported.
        if not kwargs.get("sorted_indices") or b.size not in trained:
            return gather_mm(a, b, *args, **kwargs)
        out = gather_mm(a, mx.stop_gradient(b), *args, **kwargs)
        one = mx.ones((1, 1, 1), b.dtype)
        dense = mx.stop_gradient(a).reshape(-1, a.shape[-1]) @ (b * one).sum(axis=0)
        return out + (dense.reshape(out.shape) if dense.size == out.size else dense.mean())

    return patched([(mx, "depends", after), (mx, "gather_mm", product)])


# --- blocks -----------------------------------------------------------------------------------------------------------
# The graph of checkpointed blocks.
#
# `mx.checkpoint` cannot be exported. So blocks are traced one by one, forward and backward; in the model's graph a
# stand-in takes their place, which is then replaced by their graphs, as MLX builds them: the forward pass keeps its
# arguments only, and the backward pass begins by computing it again.


@dataclass
class _Call:
    """A block as the model calls it, with (positional, named) arguments."""

    layer: nn.Module
    given: tuple[tuple[Any, ...], dict[str, Any]]

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays among the arguments and in their tuples by key; the hidden states come first."""
        return {k: a for k, a in tree_flatten(self.given, is_leaf=_is_module) if isinstance(a, mx.array)}

    def signature(self) -> tuple[Any, ...]:
        """Return a key that is the same for calls with the same graph."""
        given = tree_flatten(self.given, is_leaf=_is_module)
        arguments = tuple((k, (a.shape, a.dtype) if isinstance(a, mx.array) else repr(a)) for k, a in given)
        trained = tuple(n for n, _ in tree_flatten(self.layer.trainable_parameters()))
        held = tuple((type(m), key, m[key].shape, m[key].dtype) for m, key in _arrays_of(self.layer))
        return (type(self.layer), arguments, trained, held)

    def run(self, arrays: dict[str, mx.array]) -> mx.array:
        """Return the hidden states, the first array that the block returns, computed from these arrays."""
        args, kwargs = tree_map_with_path(lambda key, value: arrays.get(key, value), self.given, is_leaf=_is_module)
        return tree_flatten(self.layer(*args, **kwargs))[0][1]


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


class Blocks:
    """The blocks of a model that will be checkpointed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Added to the first block's input, so that a gradient flows through all blocks, as it does to the parameters
        # of checkpointed ones.
        self.tap = mx.zeros((1, 1, 1))
        self._calls: list[_Call] = []
        self._known: dict[Any, tuple[Graph, Graph]] = {}

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace the blocks by stand-ins inside the block: |x|, whose gradient is the incoming one times sign(x)."""
        kinds = [(layer, type(layer)) for layer in self.model.layers]
        for layer, kind in kinds:
            layer.__class__ = type(kind.__name__, (kind,), {"__call__": self._stand_in(kind)})
        try:
            yield
        finally:
            for layer, kind in kinds:
                layer.__class__ = kind

    def _stand_in(self, kind: type) -> Callable[..., Any]:
        def call(layer: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            (name, hidden), *others = tree_flatten(kind.__call__(layer, x, *args, **kwargs))
            if not isinstance(x, mx.array) or hidden.shape != x.shape or hidden.dtype != x.dtype:
                raise ModelError("memory with checkpointing cannot be predicted for this architecture's blocks")
            stand = mx.abs(x if self._calls else x + self.tap.astype(x.dtype))
            self._calls.append(_Call(layer, ((x, *args), kwargs)))
            return tree_unflatten([(name, stand), *others])

        return call

    def spliced(self, graph: Graph, trained: Sequence[str]) -> Graph:
        """Put the blocks' own graphs in place of their stand-ins in the model's graph.

        The outputs of `graph` are the loss, the gradients of `trained`, and the tap's.
        """
        marks = [op for op in graph.ops if op.name == "Abs"]
        signs = {op.inputs[0]: op for op in graph.ops if op.name == "Sign"}
        if len(marks) != len(self._calls):
            raise ModelError("memory with checkpointing cannot be predicted for this architecture")
        users = {name: op for op in graph.ops for name in op.inputs}
        held = _arrays_of(self.model)
        names = dict(zip(((id(m), k) for m, k in held), graph.inputs[len(graph.inputs) - len(held) :]))
        paths = {id(module): name for name, module in self.model.named_modules()}
        gone, ops, outputs = set[int](), list[Op](), list(graph.outputs)
        for i, (mark, call) in enumerate(zip(marks, self._calls)):
            forward, backward = self._graphs(call)
            sign = signs[mark.inputs[0]]
            product = users[sign.outputs[0]]
            gone |= {id(mark), id(sign), id(product)}
            (cotangent,) = (n for n in product.inputs if n != sign.outputs[0])
            own = [names[id(m), k] for m, k in _arrays_of(call.layer)]
            arguments = [mark.inputs[0]]
            for array in list(call.arrays().values())[1:]:
                arguments.append(f"argument {id(array)}")
                graph.sizes[arguments[-1]] = (tuple(array.shape), array.dtype.size)
            ops += _inlined(graph, forward, f"{i}f", [*arguments, *own], [out := f"{i}out"])
            ops.append(Op("CustomTransforms", [*arguments, out], list(mark.outputs), []))
            # The backward pass takes the block's arguments again, but not before the block's output exists.
            again = [f"{i}again{k}" for k in range(len(arguments))]
            graph.sizes.update({new: graph.sizes[old] for new, old in zip(again, arguments)})
            ops.append(Op("Depends", [*arguments, *mark.outputs], again, []))
            leaves = [n for n, _ in tree_flatten(call.layer.trainable_parameters())]
            gradients = [f"{i}g{k}" for k in range(len(leaves))]
            results = [*product.outputs, *gradients]
            ops += _inlined(graph, backward, f"{i}b", [cotangent, *again, *own], results)
            for leaf, gradient in zip(leaves, gradients):
                outputs[1 + trained.index(f"{paths[id(call.layer)]}.{leaf}")] = gradient
        rest = [op for op in graph.ops if id(op) not in gone]
        return Graph(graph.inputs, outputs[:-1], rest + ops, graph.sizes).pruned()

    def _graphs(self, call: _Call) -> tuple[Graph, Graph]:
        """Trace a block forward (arguments -> hidden states) and backward (their gradient, arguments -> gradients)."""
        key = call.signature()
        if key in self._known:
            return self._known[key]
        layer, spots = call.layer, call.arrays()
        leaves = [n for n, _ in tree_flatten(layer.trainable_parameters())]
        fresh = [mx.zeros(a.shape, a.dtype) for a in spots.values()]

        def forward(*arrays: mx.array) -> list[mx.array]:
            return [call.run(dict(zip(spots, arrays)))]

        def backward(cotangent: mx.array, *arrays: mx.array) -> list[mx.array]:
            def again(x: mx.array, *values: mx.array) -> list[mx.array]:
                layer.update(tree_unflatten(list(zip(leaves, values))))
                return forward(x, *arrays[1:])

            primals = [arrays[0], *(v for _, v in tree_flatten(layer.trainable_parameters()))]
            return list(mx.vjp(again, primals, [cotangent])[1])

        cotangent = mx.zeros_like(fresh[0])
        self._known[key] = trace(layer, forward, fresh)[0], trace(layer, backward, [cotangent, *fresh])[0]
        return self._known[key]


def _inlined(into: Graph, part: Graph, prefix: str, arguments: Sequence[str], results: Sequence[str]) -> list[Op]:
    """Return the operations of `part` with names prefixed, from `arguments` to `results`."""
    names = {n: f"{prefix} {n}" for n in part.sizes} | dict(zip(part.inputs, arguments))
    for name, size in part.sizes.items():
        into.sizes.setdefault(names[name], size)
    ops = [Op(o.name, [names[n] for n in o.inputs], [names[n] for n in o.outputs], o.arguments) for o in part.ops]
    for inner, outer in zip(part.outputs, results):
        into.sizes[outer] = part.sizes[inner]
        ops.append(Op("Copy", [names[inner]], [outer], []))
    return ops


# --- plan -------------------------------------------------------------------------------------------------------------
# How much memory a training step needs: predicted from config.json, without weights.

MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128)  # memory sizes of Macs in GB
# Share of its memory that macOS lets a GPU hold: `max_recommended_working_set_size` of Metal is about 2/3 on Macs of up
# to 36 GB and 3/4 on larger ones; the system and other programs need the rest.
MAC_SHARE = 0.7
# A step that keeps every activation may take this share of the machine; above it, checkpointing costs less than
# swapping.
CHECKPOINT_ABOVE = 1 / 3
_MOST_ROWS = 1 << 16
_SHORT = 512  # tokens of a row that is planned quickly
_SURELY = 1.1  # a row that shorter ones predict to take this many times the memory limit is not planned
# Chunks of the loss that are traced; they run one after the other, so each further one adds only what it leaves.
_TRACED_CHUNKS = 24


@dataclass(frozen=True)
class MemoryPlan:
    """Peak memory of training in bytes, by what takes it."""

    weights: int  # the base as it is held, packed if quantised
    adapters: int  # low-rank matrices
    gradients: int  # of all trained parameters; with accumulation, the sum of the earlier micro-batches too
    optimizer: int  # its state and float32 master weights
    activations: int  # what the backward pass needs of the forward pass, and its temporaries, at the peak
    logits: int  # of one chunk of positions, with their gradient and the head's
    batch: int  # token ids, labels and weights
    ahead: int  # operations that MLX prepares before the earlier ones are done; near a limit it waits instead
    checkpoint: bool  # whether activations are those of gradient checkpointing
    frozen: int = 0  # models that an objective reads, unless they are counted as roles
    roles: Mapping[str, int] = field(default_factory=dict)  # of on-policy training, see `Residents`
    sampling: int = 0  # caches, logits and the prompts of one prefill, in the sampling phase
    scoring: int = 0  # forward pass of the largest batch, in the scoring phase
    gathered: int = 0  # of a sharded base: two blocks, and embeddings or the head

    def phases(self, ahead: bool = True) -> dict[str, int]:
        """Return the peak of each phase, in order: of training alone, where nothing is sampled."""
        held = self.weights + self.gathered + self.adapters + self.frozen + sum(self.roles.values()) + self.optimizer
        step = self.gradients + self.activations + self.logits + self.batch + (self.ahead if ahead else 0)
        others = {"sampling": self.sampling, "scoring": self.scoring}
        return {name: held + peak for name, peak in others.items() if peak} | {"training": held + step}

    @property
    def total(self) -> int:
        """The peak while memory lasts."""
        return max(self.phases().values())

    @property
    def needed(self) -> int:
        """The peak when MLX has to wait for memory."""
        return max(self.phases(ahead=False).values())

    def fits(self, limit: float) -> bool:
        """Return whether `limit` bytes are enough."""
        return self.needed <= limit

    def macs(self) -> list[int]:
        """Return the Macs on which it fits, by their memory in GB."""
        return [gb for gb in MACS if self.fits(MAC_SHARE * gb * 2**30)]


class Outline(NamedTuple):
    """An objective's step, as far as memory depends on it."""

    # A sum of negative log-likelihoods, log-probabilities of tokens (and their KL to another model, by its hidden
    # states), or scores of rows.
    reads: Literal["nll", "logprobs", "logprobs and kl", "scores"] = "nll"
    together: int = 1  # rows of a batch that cannot be separated: the two of a pair

    @property
    def dropout(self) -> bool:
        """Whether dropout is drawn: log-probabilities and scores are compared, and read without it."""
        return self.reads == "nll"


PLAIN_OUTLINE = Outline()


@dataclass(frozen=True)
class Job:
    """What is the same for batches of every size; the model's arrays need not be evaluated."""

    model: nn.Module  # with adapters, its trainable parameters unfrozen, and its head if scores are read
    optimizer: int  # bytes of the optimiser's state and master weights
    trained_share: float = 1.0  # share of a batch's tokens that are predicted
    accumulate: int = 1  # micro-batches per step
    outline: Outline = PLAIN_OUTLINE
    update: tuple[int, int] = (0, 0)  # bytes that the optimiser allocates at one time: the minimum, and with room
    packed: bool = False  # whether rows are packed, which takes a mask for each sequence
    ranks: int = 1  # over which the frozen base is sharded

    @property
    def gradients(self) -> int:
        """Bytes of the gradient of all trained parameters."""
        return sum(v.nbytes for _, v in tree_flatten(self.model.trainable_parameters()))

    @property
    def sums(self) -> int:
        """Bytes of a sum of such gradients, which is in float32."""
        return sum(4 * v.size for _, v in tree_flatten(self.model.trainable_parameters()))


class Shape(NamedTuple):
    """The size of a batch.

    Attributes:
        rows, width: with its padding.
        trained: tokens that are predicted.
        prompt, completion: widths of prompts and completions, where a prompt is computed once for
            `Outline.together` rows; otherwise 0.
    """

    rows: int
    width: int
    trained: int
    prompt: int = 0
    completion: int = 0

    def computed(self, together: int) -> int:
        """Return the number of tokens that go through the model."""
        return self.rows // together * self.prompt + self.rows * (self.completion or self.width)


def plan(job: Job, rows: int, width: int, checkpoint: bool, shared: tuple[int, int] = (0, 0)) -> MemoryPlan:
    """Predict the peak of training on batches of `rows` x `width` tokens; raise ModelError if it cannot be predicted.

    `shared` is `prompt` and `completion` of a `Shape`, and not for checkpointing.
    """
    model = job.model
    held = [(key, module[key].nbytes) for module, key in _arrays_of(model)]
    adapters = sum(n for key, n in held if key in SAVED)
    gradients = job.gradients
    positions = rows if job.outline.reads == "scores" else max(1, math.ceil(job.trained_share * rows * width))
    prompt, completion = shared
    ids = {"ids": mx.zeros((rows, completion or width), dtype=mx.int32)}
    if job.packed:
        ids |= {"segments": mx.zeros((rows, width), dtype=mx.int32)}
    if prompt:
        prompts = rows // job.outline.together
        ids |= {"prompts": mx.zeros((prompts, prompt), dtype=mx.int32)}
        ids |= {"begins": mx.zeros(prompts, dtype=mx.int32), "of": mx.zeros(rows, dtype=mx.int32)}
    # The peak of the gradient: all of it exists at the end, and the earlier micro-batches' sum all the time.
    earlier = job.sums if job.accumulate > 1 else 0
    with probing(model, training=True):
        step = _Step(model, job.outline.reads, ids, positions)
        peak, queued = (size + earlier for size in step.peaks(checkpoint))
        head_peak = step.head_peak()
    # The update holds all gradients, the square of the largest parameter (for the norm) or its gradient in float32,
    # and what the optimiser allocates.
    largest = max((v.size for _, v in tree_flatten(model.trainable_parameters())), default=0)
    update, renewed = ((earlier or gradients) + 4 * largest + new for new in job.update)
    transient = max(peak, update)
    logits = min(head_peak, max(0, transient - gradients - earlier))
    sharded = shares(model, job.ranks) if job.ranks > 1 else Shares(0, 0, 0, 0)
    return MemoryPlan(
        weights=sum(n for _, n in held) - adapters - sharded.whole + sharded.resident,
        adapters=adapters,
        gradients=gradients + earlier,
        optimizer=job.optimizer,
        activations=max(0, transient - gradients - earlier - logits),
        logits=logits,
        batch=sum(v.nbytes for v in ids.values()) + 12 * positions,
        ahead=max(queued, renewed, transient) - transient,
        checkpoint=checkpoint,
        gathered=sharded.gathered,
    )


def largest_tokens(job: Job, width: int, checkpoint: bool, limit: float, most: int | None = None) -> int:
    """Return the largest `batch.tokens`, a multiple of 64, with which a batch of rows of `width` fits in `limit`.

    0: not even one row, or pair of rows, fits. At most `most` tokens are tried.
    """
    together = job.outline.together

    def needed(rows: int, width: int = width) -> int:
        return plan(job, together * rows, width, checkpoint).needed

    # The plan of a long row takes minutes. Memory grows at least in proportion to the width, so the line through two
    # shorter widths is a lower bound.
    shorter: list[tuple[int, int]] = []
    short = _SHORT
    while 4 * short <= width:
        shorter.append((short, needed(1, short)))
        if shorter[-1][1] > limit:
            return 0
        if len(shorter) > 1:
            (w0, n0), (w1, n1) = shorter[-2:]
            if n1 + (n1 - n0) * (width - w1) / (w1 - w0) > _SURELY * limit:
                return 0
        short *= 2
    rows = _MOST_ROWS if most is None else max(1, most // (together * width))
    fits, over = (1, needed(1)), (rows + 1, math.inf)
    if fits[1] > limit:
        return 0
    known, rows = [fits], 2
    # Memory grows nearly in proportion to the rows: a line through two counts soon leads to the largest.
    while over[0] - fits[0] > max(1, fits[0] // 50):
        now = (rows, needed(rows))
        fits, over = (now, over) if now[1] <= limit else (fits, now)
        (r0, n0), (r1, n1) = known[-1], now
        known.append(now)
        guess = r1 + (limit - n1) * (r1 - r0) / (n1 - n0) if n1 != n0 and r1 != r0 else over[0]
        rows = min(max(int(guess), fits[0] + 1), over[0] - 1)
    tokens = fits[0] * together * width
    return tokens // 64 * 64 if tokens >= 64 else tokens


def largest_packed(job: Job, width: int, checkpoint: bool, limit: float, most: int) -> int:
    """Return the same for packed rows of up to `width` tokens, which may all be packed into one sequence."""
    fits, over = 0, most + 64
    tokens = max(64, -(-width // 64) * 64)
    while over - fits > max(64, fits // 16):
        if plan(job, 1, tokens, checkpoint).needed <= limit:
            fits, tokens = tokens, min(2 * tokens, (tokens + over) // 2)
        elif not fits:  # not even the longest row
            return 0
        else:
            over, tokens = tokens, (fits + tokens) // 2
        tokens = tokens // 64 * 64
    return fits


class ShapeSplit(Split):
    """Body and head of a model without weights: nothing is evaluated."""

    @cached_property
    def packing(self) -> Packing:
        return Packing(self.model, weights=False)

    def _is_exact(self, whole: mx.array, hidden: mx.array) -> bool:
        return True

    def _readers(self, names: list[str]) -> list[str]:
        values = self._values(names)
        if not values:
            return []
        states = mx.zeros((1, self._width), self._dtype)

        def logits(h: mx.array, *given: mx.array) -> list[mx.array]:
            return [self.logits(h, dict(zip(values, given)))]

        graph, inputs = trace(self.model, logits, [states, *values.values()])
        read = {name for op in graph.ops for name in op.inputs} | set(graph.outputs)
        return [name for name, given in zip(values, inputs[1:]) if given in read]


class _Step:
    """Loss and gradient of one micro-batch, traced."""

    def __init__(self, model: nn.Module, reads: str, ids: dict[str, mx.array], positions: int) -> None:
        self.model, self.reads, self.ids, self.positions = model, reads, ids, positions
        self.split = ShapeSplit(model)
        self.sharing = Sharing(self.split)
        # Both call the model to find the number of axes of its masks: do it before blocks are replaced.
        if "segments" in ids:
            _ = self.split.packing
        if "prompts" in ids and not self.sharing.thinkable:
            raise ModelError("memory cannot be predicted: the model cannot read completions after a shared prompt")
        self.traced = positions
        if self.split.separable and reads != "scores":
            self.traced = min(positions, _TRACED_CHUNKS * chunk_size(self.split.vocabulary))
        places = mx.zeros((self.traced,), dtype=mx.int32)
        self.places = {"positions": places, "labels": places, "weights": mx.zeros((self.traced,))}
        if reads == "scores":
            self.places = {"last": places}

    def peaks(self, checkpoint: bool) -> tuple[int, int]:
        """Return the bytes beside weights and batch: the minimum, and while memory lasts."""
        if checkpoint:
            blocks = Blocks(self.model)
            with blocks.replaced():
                graph = self._graph(blocks)
            trained = [n for n, _ in tree_flatten(self.model.trainable_parameters())]
            graph = blocks.spliced(graph, trained)  # traces the blocks themselves
        else:
            graph = self._graph()
        # At the peak four arrays of hidden states and gradients exist at the positions beyond the traced chunks.
        more = 4 * (self.positions - self.traced) * self.split._width * self.split._dtype.size
        return graph.peak() + more, graph.peak(ahead=True) + more

    def head_peak(self) -> int:
        """Return the bytes of the head and the loss alone."""
        if not self.split.separable or self.reads == "scores":
            return 0
        hidden = mx.zeros((self.traced, self.split._width), self.split._dtype)

        def loss(h: mx.array, labels: mx.array, weights: mx.array) -> list[mx.array]:
            if self.reads == "nll" or self.split.trained_head():
                return [hidden_nll(self.split, h, labels, weights, grad=True)]
            return [(self._logprobs(h, labels) * weights).sum()]

        return trace(self.model, loss, [hidden, self.places["labels"], self.places["weights"]])[0].peak()

    def _logprobs(self, hidden: mx.array, labels: mx.array) -> mx.array:
        logprobs = hidden_logprobs(self.split, hidden, labels, grad=True)
        if self.reads == "logprobs":
            return logprobs
        (behind,) = mx.depends([hidden], [logprobs])
        return logprobs + hidden_kl(self.split, behind, mx.stop_gradient(behind), self.split.logits, grad=True)

    def _loss(self, a: dict[str, mx.array]) -> mx.array:
        """Compute a number that depends on what the objective reads in the same way as its loss."""
        split, sharing = self.split, self.sharing
        ids = {name: a[name] for name in self.ids}
        if self.reads == "scores":
            return sharing.scores(ScoredRows(**ids, last=a["last"], lengths=a["last"])).square().sum()
        if not split.separable:
            given = (a["ids"], a["positions"], a["labels"], a["weights"])
            return rows_nll(split, *given, grad=True, segments=a.get("segments"))
        # With a trained head, log-probabilities have a custom gradient, which cannot be exported. It computes chunks
        # as the gradient of the sum does, and holds as much.
        if self.reads == "nll" or split.trained_head():
            return hidden_nll(split, sharing.hidden(Rows(**ids))[a["positions"]], a["labels"], a["weights"], grad=True)
        unread = {"last": a["labels"], "lengths": a["labels"], "owners": a["labels"]}
        rows = Completions(**ids, **unread, positions=a["positions"], labels=a["labels"])
        return (self._logprobs(sharing.hidden(rows)[rows.positions], rows.labels) * a["weights"]).sum()

    def _graph(self, blocks: Blocks | None = None) -> Graph:
        """Trace the loss and the gradients of all trained parameters; with blocks, then of their tap."""
        batch = self.ids | self.places

        def step(*arrays: mx.array) -> list[mx.array]:
            def loss(params: Any) -> mx.array:
                self.model.update(params["model"])
                if blocks is not None:
                    blocks.tap = params["tap"]
                return self._loss(dict(zip(batch, arrays)))

            trained = {"model": self.model.trainable_parameters()}
            if blocks is not None:
                trained["tap"] = mx.zeros((1, 1, 1), self.split._dtype)
            value, grads = mx.value_and_grad(loss)(trained)
            return [value, *(g for _, g in tree_flatten(grads))]

        if self.split.separable:
            self.split.trained_head()  # traces the head, so it must come before this trace
        return trace(self.model, step, list(batch.values()))[0]


# --- phases -----------------------------------------------------------------------------------------------------------

_STEP = 256  # positions by which mlx-lm's caches grow
# (B, V) float32 arrays that drawing a token takes beside the logits: divided by the temperature, their mass, its padded
# copy, and the first ones of the step ahead; filters also hold them sorted, and their indices.
_DRAWN, _FILTERED = 4, 6


class Rolling(NamedTuple):
    """The largest rollout."""

    rows: int  # completions decoded at once
    group: int  # prompts whose caches exist beside theirs
    prompt: int  # tokens of the longest prompt
    completion: int
    filtered: bool  # whether top_p, top_k or min_p leave tokens out
    scored: Sequence[Shape]  # batches that are scored, by the policy or a reward model


class Residents(NamedTuple):
    """What is in memory beside the trained model in every phase."""

    frozen: Mapping[str, int] = MappingProxyType({})  # name -> bytes of each frozen model, without a shared base
    critic: int = 0  # bytes of its own parameters, which have gradients and optimiser state because they are trained
    apart: frozenset[str] = frozenset()  # names of frozen models that do not share the trained base
    notes: tuple[str, ...] = ()  # sentences about them for the user

    def with_training(self, job: Job) -> int:
        """Return their bytes with the critic's optimiser state, gradient, and sum of earlier gradients."""
        own = job.gradients
        more = self.critic * (job.optimizer + job.sums) // own if own else 0
        return sum(self.frozen.values()) + 2 * self.critic + more


class Beside(NamedTuple):
    """What on-policy training takes beside its steps."""

    residents: Residents
    sampling: int  # bytes of this phase, without what is in memory in every phase
    scoring: int
    several: bool  # whether a step has several micro-batches, so that the first gradient waits for the others


def with_phases(step: MemoryPlan, around: Beside, sums: int) -> MemoryPlan:
    """Extend the plan of a training step to one of training with rollouts.

    Args:
        step: of the policy's largest micro-batch, as if it were the only one of its step.
        sums: bytes of a sum of the policy's gradients.
    """
    own, critic = step.gradients, around.residents.critic
    sums = sums if around.several else 0
    before = sums + (critic * sums // own if own else 0)
    # The critic's batch comes after the policy's, whose gradient is kept meanwhile, and has no logits.
    first = replace(step, gradients=before + own)
    second = replace(step, gradients=max(before, own) + critic, logits=0)
    both = max(first, second, key=lambda part: part.needed) if critic else first
    return replace(
        both,
        optimizer=step.optimizer + (critic * step.optimizer // own if own else 0),
        roles={"reference": 0, "reward": 0, **around.residents.frozen, "critic": critic},
        sampling=around.sampling,
        scoring=around.scoring,
    )


def sampling_bytes(model: nn.Module, rolling: Rolling) -> int:
    """Return the peak of sampling, without the weights; raise ModelError if it cannot be predicted."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    kinds = {type(c) for c in make_prompt_cache(model)}
    if other := sorted(k.__name__ for k in kinds if not issubclass(k, (KVCache, RotatingKVCache))):
        name = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"the memory of sampling is predicted for transformers only, and {name} keeps another state "
            f"({', '.join(other)}); measure it with mlxft check --time"
        )
    # Quantisation-aware layers are rounded once for the phase.
    aware = [(m, m.form) for m in model.modules() if isinstance(m, LowRank) and m.form is not None]
    rounded = sum(part.nbytes for layer, form in aware for part in form.rounded(layer))
    with probing(model), unrounded(model):
        rows, group = (rolling.rows, rolling.group) if takes_rows(model) else (1, 1)
        room, longest = _rounded(rolling.prompt), rolling.prompt + rolling.completion
        before = min(rolling.prompt - 1, max(3, PREFILL // group))
        first = _cached(model, group, before, rolling.prompt - 1 - before, room)
        prefill = first.peak() if before else 0
        last = _cached(model, rows, 1, longest - 1, _rounded(longest))
        prompts = sum(part.nbytes for part in _keys_values(model, group, room))
        vocabulary = model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
        drawn = 4 * rows * vocabulary * (_FILTERED if rolling.filtered else _DRAWN)
        return rounded + max(prefill, prompts + last.peak() + drawn)


def scoring_bytes(model: nn.Module, shapes: Sequence[Shape]) -> int:
    """Return the peak of scoring the largest of these batches, without the weights."""
    largest = {max(shapes, key=lambda s: s.rows * s.width), max(shapes, key=lambda s: s.rows * s.width * s.width)}
    with probing(model):
        split = ShapeSplit(model)

        def read(ids: mx.array, positions: mx.array, labels: mx.array) -> list[mx.array]:
            return list(rows_logprobs_entropy(split, ids, positions, labels))

        peaks = []
        for shape in largest:
            most = _TRACED_CHUNKS * chunk_size(split.vocabulary) if split.separable else shape.trained
            n = max(1, min(shape.trained, most))
            ids, places = mx.zeros((shape.rows, shape.width), dtype=mx.int32), mx.zeros((n,), dtype=mx.int32)
            # Hidden states at positions beyond the traced chunks.
            more = (shape.trained - n) * split._width * split._dtype.size if split.separable else 0
            peaks.append(trace(model, read, [ids, places, places])[0].peak() + max(0, more))
        return max(peaks)


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP


def _keys_values(model: nn.Module, rows: int, room: int) -> list[mx.array]:
    """Return arrays like each layer's keys and values for `room` positions, or for its sliding window."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)  # gives them shapes; it is never evaluated
    found = []
    for cache in caches:
        size = min(room, getattr(cache, "max_size", room))
        for part in (cache.keys, cache.values):
            found.append(mx.zeros((rows, part.shape[1], size, part.shape[-1]), part.dtype))
    return found


def _cached(model: nn.Module, rows: int, columns: int, offset: int, room: int) -> Graph:
    """Trace `columns` further tokens of each row after `offset` of them; the caches are among what it makes."""
    from mlx_lm.models.cache import make_prompt_cache

    def step(ids: mx.array, *held: mx.array) -> list[mx.array]:
        caches = make_prompt_cache(model)
        for cache, keys, values in zip(caches, held[::2], held[1::2]):
            cache.keys, cache.values, cache.offset = keys, values, offset
            if hasattr(cache, "_idx"):
                cache._idx = min(offset, keys.shape[2])
        logits = model(ids, cache=caches)
        kept = [part for cache in caches for part in (cache.keys, cache.values)]
        return [*kept, logits[:, -1]] if columns == 1 else kept

    ids = mx.zeros((rows, max(1, columns)), dtype=mx.int32)
    return trace(model, step, [ids, *_keys_values(model, rows, room)])[0]
