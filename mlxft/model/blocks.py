"""The graph of checkpointed blocks.

`mx.checkpoint` can not be exported. So blocks are traced one by one, forward and backward; in the model's graph a
stand-in takes their place, and then their graphs are put where it stands, as MLX builds them: the forward pass
keeps its arguments only, and the backward pass begins with computing it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxft.errors import ModelError
from mlxft.model.trace import Graph, Op, arrays_of, trace


@dataclass
class _Call:
    """One block as the model calls it."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def arrays(self) -> dict[str, mx.array]:
        """Key -> array among the arguments and in their tuples; the hidden states are "0"."""
        return {k: a for k, a in self._all() if isinstance(a, mx.array)}

    def signature(self) -> tuple[Any, ...]:
        """The same for calls whose graphs are alike."""
        arrays = tuple((k, a.shape, a.dtype) for k, a in self.arrays().items())
        other = tuple((k, repr(a)) for k, a in self._all() if not isinstance(a, mx.array))
        trained = tuple(n for n, _ in tree_flatten(self.layer.trainable_parameters()))
        held = tuple((type(m), key, m[key].shape, m[key].dtype) for m, key in arrays_of(self.layer))
        return (type(self.layer), arrays, other, trained, held)

    def run(self, arrays: dict[str, mx.array]) -> mx.array:
        """The hidden states that come out."""
        args, kwargs = (
            tree_map_with_path(lambda key, value: arrays.get(key, value), given, is_leaf=_is_module)
            for given in (self.args, self.kwargs)
        )
        return first(self.layer(*args, **kwargs))

    def _all(self) -> list[tuple[str, Any]]:
        return [pair for given in (self.args, self.kwargs) for pair in tree_flatten(given, is_leaf=_is_module)]


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def first(out: Any) -> mx.array:
    """The first array of what a block returns: the hidden states."""
    found: Any = out if isinstance(out, mx.array) else tree_flatten(out)[0][1]
    assert isinstance(found, mx.array)
    return found


class Blocks:
    """The blocks of a model that will be checkpointed.

    Attributes:
        tap: added to the first block's input. Its gradient makes one flow through all blocks, as their parameters do
            where they are checkpointed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tap = mx.zeros((1, 1, 1))
        self._calls: list[_Call] = []
        self._known: dict[Any, tuple[Graph, Graph]] = {}

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Stand-ins in place of the blocks: |x|, whose gradient is the incoming one times sign(x)."""
        layers = list(self.model.layers)
        kinds = [type(layer) for layer in layers]
        for layer, kind in zip(layers, kinds):
            layer.__class__ = type(kind.__name__, (kind,), {"__call__": self._stand_in(kind)})
        try:
            yield
        finally:
            for layer, kind in zip(layers, kinds):
                layer.__class__ = kind

    def _stand_in(self, kind: type) -> Callable[..., Any]:
        def call(layer: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            out = kind.__call__(layer, x, *args, **kwargs)
            if not isinstance(x, mx.array) or first(out).shape != x.shape or first(out).dtype != x.dtype:
                raise ModelError("memory with checkpointing can not be predicted for this architecture's blocks")
            stand = mx.abs(x if self._calls else x + self.tap.astype(x.dtype))
            self._calls.append(_Call(layer, (x, *args), kwargs))
            if isinstance(out, mx.array):
                return stand
            flat = tree_flatten(out)
            return tree_unflatten([(flat[0][0], stand), *flat[1:]])

        return call

    def spliced(self, graph: Graph, trained: Sequence[str]) -> Graph:
        """The model's graph with the blocks' own graphs in it.

        Args:
            graph: with stand-ins; its outputs are the loss, the gradients of `trained`, and the tap's.
        """
        marks = [op for op in graph.ops if op.name == "Abs"]
        signs = {op.inputs[0]: op for op in graph.ops if op.name == "Sign"}
        if len(marks) != len(self._calls):
            raise ModelError("memory with checkpointing can not be predicted for this architecture")
        users = {name: op for op in graph.ops for name in op.inputs}
        held = arrays_of(self.model)
        names = dict(zip(((id(m), k) for m, k in held), graph.inputs[len(graph.inputs) - len(held) :]))
        paths = {id(module): name for name, module in self.model.named_modules()}
        gone, ops, outputs = set[int](), list[Op](), list(graph.outputs)
        for i, (mark, call) in enumerate(zip(marks, self._calls)):
            forward, backward = self._graphs(call)
            sign = signs[mark.inputs[0]]
            product = users[sign.outputs[0]]
            gone |= {id(mark), id(sign), id(product)}
            (cotangent,) = (n for n in product.inputs if n != sign.outputs[0])
            own = [names[id(m), k] for m, k in arrays_of(call.layer)]
            others = {k: f"argument {id(a)}" for k, a in call.arrays().items() if k != "0"}
            for key, name in others.items():
                graph.sizes[name] = (tuple(call.arrays()[key].shape), call.arrays()[key].dtype.size)
            leaves = [n for n, _ in tree_flatten(call.layer.trainable_parameters())]
            arguments = [mark.inputs[0], *others.values()]
            ops += _inlined(graph, forward, f"{i}f", [*arguments, *own], [out := f"{i}out"])
            ops.append(Op("CustomTransforms", [*arguments, out], list(mark.outputs), []))
            # The block's arguments again, but not before its output is there.
            again = [f"{i}again{k}" for k in range(len(arguments))]
            for new, old in zip(again, arguments):
                graph.sizes[new] = graph.sizes[old]
            ops.append(Op("Depends", [*arguments, *mark.outputs], again, []))
            path = paths[id(call.layer)]
            at = [1 + trained.index(f"{path}.{leaf}") for leaf in leaves]
            gradients = [f"{i}g{k}" for k in range(len(leaves))]
            results = [*product.outputs, *gradients]
            ops += _inlined(graph, backward, f"{i}b", [cotangent, *again, *own], results)
            for k, gradient in zip(at, gradients):
                outputs[k] = gradient
        rest = [op for op in graph.ops if id(op) not in gone]
        return Graph(graph.inputs, outputs[:-1], rest + ops, graph.sizes).pruned()

    def _graphs(self, call: _Call) -> tuple[Graph, Graph]:
        """Forward: arguments -> hidden states. Backward: their gradient, arguments -> the input's, the parameters'."""
        key = call.signature()
        if key in self._known:
            return self._known[key]
        layer, spots = call.layer, call.arrays()
        leaves = [n for n, _ in tree_flatten(layer.trainable_parameters())]
        x, fresh = call.args[0], [mx.zeros(a.shape, a.dtype) for a in spots.values()]

        def forward(*arrays: mx.array) -> list[mx.array]:
            return [call.run(dict(zip(spots, arrays)))]

        def backward(cotangent: mx.array, *arrays: mx.array) -> list[mx.array]:
            def again(x: mx.array, *values: mx.array) -> list[mx.array]:
                layer.update(tree_unflatten(list(zip(leaves, values))))
                return forward(x, *arrays[1:])

            primals = [arrays[0], *(v for _, v in tree_flatten(layer.trainable_parameters()))]
            return list(mx.vjp(again, primals, [cotangent])[1])

        cotangent = mx.zeros(x.shape, x.dtype)
        self._known[key] = trace(layer, forward, fresh)[0], trace(layer, backward, [cotangent, *fresh])[0]
        return self._known[key]


def _inlined(into: Graph, part: Graph, prefix: str, arguments: Sequence[str], results: Sequence[str]) -> list[Op]:
    """The operations of `part` under names of its own, from `arguments` to `results`."""
    names = {n: f"{prefix} {n}" for n in part.sizes} | dict(zip(part.inputs, arguments))
    for name, size in part.sizes.items():
        into.sizes.setdefault(names[name], size)
    ops = [Op(o.name, [names[n] for n in o.inputs], [names[n] for n in o.outputs], o.arguments) for o in part.ops]
    for inner, outer in zip(part.outputs, results):
        into.sizes[outer] = part.sizes[inner]
        ops.append(Op("Copy", [names[inner]], [outer], []))
    return ops
