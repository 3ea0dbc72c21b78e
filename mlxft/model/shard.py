"""Shard a frozen base over processes: each rank holds a part of its weights, and gathers a block when it computes it.

The idea is that of ZeRO's third stage (Rajbhandari et al. 2020) for weights that are never trained. The trainable
parameters stay whole on every rank.

MLX is lazy: a graph says what depends on what, not when it is computed. Two things must be said in the graph. Every
rank must run the same collective operations in the same order, so each gather depends on the one before. And a gather
must not run long before its block, or the whole model would be in memory, so it also depends on the input of the block
before: the weights of one block arrive while those before are at work, and those of two blocks exist at one time. The
backward pass does the same in the other direction, and computes each block again, with weights gathered again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxft.distributed import MESSAGE
from mlxft.errors import ModelError
from mlxft.model.layers import EMBEDDING, checkpoint_layers, probing

_WORD = 4  # bytes: a part is an array of uint32, so that one message carries arrays of all types
_ALIGNED = 8  # words: where an array begins in its unit, as in a buffer of its own


class _Place(NamedTuple):
    """Where an array of the model is, and where its numbers are in its unit.

    Attributes:
        stand_in: what is there between calls: the right shape and type, NaN, and no memory.
        start, words: of the unit's words.
    """

    module: nn.Module
    key: str
    stand_in: mx.array
    start: int
    words: int

    def read(self, words: mx.array) -> mx.array:
        """Return the array from the words of its unit, as a view."""
        return _read(words, self.start, self.stand_in)


@dataclass(eq=False)
class _Unit:
    """Arrays that are gathered together: those of a block, or of one module beside the blocks.

    Attributes:
        part: this rank's words of the arrays, one after the other.
        given: gathered arrays for the block's next call.
    """

    sharded: Sharded
    places: list[_Place]
    part: mx.array
    given: list[list[mx.array]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """The bytes of all its arrays, gathered."""
        return int(self.part.nbytes * self.sharded.group.size())

    @contextmanager
    def placed(self, arrays: Sequence[mx.array]) -> Iterator[None]:
        """Put arrays into their places inside the block, except where a role has put its own."""
        filled = []
        for place, array in zip(self.places, arrays):
            if dict.get(place.module, place.key) is place.stand_in:
                dict.__setitem__(place.module, place.key, array)
                filled.append(place)
        try:
            yield
        finally:
            for place in filled:
                dict.__setitem__(place.module, place.key, place.stand_in)


class Sharded:
    """The sharded weights of a model; see `shard_base`.

    Attributes:
        whole: bytes of the frozen weights that are sharded.
        resident: bytes of them that this rank holds.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group
        self.whole = self.resident = 0
        self._active = 0  # depth of calls of the model
        self._last: mx.array | None = None  # exists when the last gather is done
        self._point: mx.array | None = None  # the input of the last block: the next gather waits for it
        self._backward = False
        self._kept: dict[_Unit, tuple[list[mx.array], int]] = {}  # of modules beside the blocks, and when last used
        self._phase = 0
        self._begun = False  # whether this call of the model has come to its blocks

    def release(self) -> None:
        """Forget what is gathered beside the blocks, embedding and head; the next pass gathers them again."""
        self._kept.clear()

    def gather(self, unit: _Unit) -> list[mx.array]:
        """Return the arrays of a unit, after the last gather and after what the last block began with."""
        after = [a for a in (self._last, self._point) if a is not None]
        # On the stream of collective operations, so that it waits for these alone and not for other work.
        with mx.stream(mx.cpu):
            part = mx.depends([unit.part], after)[0] if after else unit.part
            words = mx.distributed.all_gather(part, group=self.group)
            # Not the words themselves, which would stay in memory; and evaluated with them, or it would hold them, too.
            self._last = mx.depends([mx.zeros(1)], [words])[0]
            words = mx.stop_gradient(mx.depends([words], [self._last])[0])
        return [place.read(words) for place in unit.places]

    def forward(self, unit: _Unit, x: mx.array) -> list[mx.array]:
        """Return the arrays of a block that is called with x."""
        if not self._begun:
            self._begun = True
            self._drop_unused()  # a head of the pass before
            self._phase += 1
        found = self.gather(unit)
        self._point, self._backward = mx.stop_gradient(x), False
        return found

    def backward(self, unit: _Unit, cotangent: mx.array) -> list[mx.array]:
        """Return the arrays of a block whose gradient is computed, from the gradient of its output."""
        self.release()
        if not self._backward:  # the last block waits for the loss, otherwise its weights would be there twice
            self._point = mx.stop_gradient(cotangent)
        found = self.gather(unit)
        self._point, self._backward = mx.stop_gradient(cotangent), True
        return found

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Mark a call of the model inside the block: only there arrays beside its blocks are gathered."""
        if not self._active:
            self._phase, self._begun = self._phase + 1, False
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    def beside(self, unit: _Unit, place: int) -> mx.array:
        """Return an array beside the blocks, where the model reads it.

        It is gathered once for a pass, even if the head is computed in many chunks: they are as many as a rank's batch
        needs, and the number of gathers must be the same on all ranks.
        """
        if not self._active:
            return unit.places[place].stand_in
        if unit not in self._kept:
            if self._begun:
                self._drop_unused()  # an embedding that is not the head
            self._kept[unit] = self.gather(unit), 0
        found = self._kept[unit][0]
        self._kept[unit] = found, self._phase
        return found[place]

    def _drop_unused(self) -> None:
        self._kept = {unit: kept for unit, kept in self._kept.items() if kept[1] == self._phase}


def shard_base(model: nn.Module, group: mx.distributed.Group) -> Sharded:
    """Keep only this rank's part of a model's frozen weights, and gather them when the model computes.

    Weights are evaluated and cut one array after the other, so lazy ones never exist all at once. Blocks are
    checkpointed from now on. What is sharded: all frozen floating or packed arrays of the blocks, and matrices beside
    them (embedding, head). Arrays of other modules, such as the final norm, are small and stay whole, as do all
    trainable ones.

    All ranks call the model the same number of times and in the same order, forward and backward; the shapes of their
    batches may differ. A step must not be compiled. Other collective operations must not be in one graph with the
    model's: evaluate the model's first. Outside of a call of the model its frozen arrays are NaN of the right shape.

    Args:
        model: with its adapters and frozen; before anything has computed with it, or its weights are read.
        group: the ranks; all of them call this.
    Raises:
        ModelError: nothing is frozen; blocks share arrays; or the model reads a block's weights elsewhere.
    """
    sharded = Sharded(group)
    checkpoint_layers(model, False)
    blocks, beside = _held(model)
    # What is computed from weights (the norms of DoRA) would keep them.
    derived = [[v for k, v in m.items() if isinstance(v, mx.array) and k[0] == "_"] for m in model.modules()]
    mx.eval(derived, model.trainable_parameters())
    for module, held in [*blocks, *beside]:
        module._unit = _cut(sharded, held)
    for block, _ in blocks:
        block.__class__ = _gathered(block.__class__)
    for module, _ in beside:
        module.__class__ = _read_gathered(module.__class__)
    model._sharded = sharded
    model.__class__ = _called(model.__class__)
    checkpoint_layers(model)
    _check(model)
    return sharded


def sharding_of(model: nn.Module) -> Sharded | None:
    """Return how a model's base is sharded, so that its frozen weights cannot be read or saved; None: it is whole."""
    found: Sharded | None = getattr(model, "_sharded", None)
    return found


def _name_of(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))


class Shares(NamedTuple):
    """What sharding a base takes on each rank, in bytes.

    Attributes:
        whole: of the frozen weights that are sharded.
        resident: of them on one rank.
        gathered: of what is whole at one time beside them: two blocks, and embeddings or the head.
        blocks: of the weights in the blocks, which a pass backward gathers again.
    """

    whole: int
    resident: int
    gathered: int
    blocks: int


def shares(model: nn.Module, ranks: int) -> Shares:
    """Predict what `shard_base` does with a model, whose weights need not be there; raise ModelError as it does."""
    blocks, beside = _held(model)
    sizes, others = ([(m, sum(at[key].nbytes for at, key in held)) for m, held in part] for part in (blocks, beside))
    whole = sum(size for _, size in [*sizes, *others])
    tables = sum(size for module, size in others if isinstance(module, EMBEDDING))
    heads = max((size for module, size in others if not isinstance(module, EMBEDDING)), default=0)
    two = sum(sorted(size for _, size in sizes)[-2:])
    return Shares(whole, -(-whole // ranks), two + max(tables, heads), sum(size for _, size in sizes))


_Held = list[tuple[nn.Module, list[tuple[nn.Module, str]]]]


def _held(model: nn.Module) -> tuple[_Held, _Held]:
    """Return the blocks, and the modules beside them, that hold what can be sharded, with its places."""
    taken = set[tuple[int, str]]()
    blocks = [(layer, _frozen(layer)) for layer in {id(layer): layer for layer in model.layers}.values()]
    for _, held in blocks:
        places = {(id(m), key): m for m, key in held}
        if shared := taken & places.keys():
            name = type(places[min(shared)]).__name__
            raise ModelError(f"distributed.shard: base: blocks of {_name_of(model)} share weights of a {name}")
        taken |= places.keys()
    inside = {id(module) for layer in model.layers for module in layer.modules()}
    others = {id(module): module for module in model.modules() if id(module) not in inside}.values()
    beside = [(m, [(m, key) for _, key in _frozen(m, deep=False) if m[key].ndim > 1]) for m in others]
    found = [held for held in blocks if held[1]], [held for held in beside if held[1]]
    if not any(found):
        raise ModelError("distributed.shard: base: nothing is frozen, so there is nothing to shard")
    return found


def _frozen(module: nn.Module, deep: bool = True) -> list[tuple[nn.Module, str]]:
    """Return the places of frozen arrays that can be sharded, each once."""
    found = []
    for part in {id(m): m for m in (module.modules() if deep else [module])}.values():
        arrays = [(k, v) for k, v in part.items() if isinstance(v, mx.array) and k[0] != "_" and k in part._no_grad]
        # Integers that are not packed weights stay, because their stand-in cannot be NaN.
        found += [(part, k) for k, v in arrays if "scales" in part or mx.issubdtype(v.dtype, mx.floating)]
    return found


def _cut(sharded: Sharded, held: Sequence[tuple[nn.Module, str]]) -> _Unit:
    """Replace arrays by stand-ins, and keep this rank's words of them."""
    group, places, end = sharded.group, list[_Place](), 0
    for module, key in held:
        array = module[key]
        words = _count_words(array)
        places.append(_Place(module, key, _stand_in(array), end, words))
        end += words
    size = -(-end // group.size())
    first, pieces = group.rank() * size, list[mx.array]()
    for place in places:
        array = place.module[place.key]
        dict.__setitem__(place.module, place.key, place.stand_in)
        object.__setattr__(place.module, "cut", True)
        start, stop = max(0, first - place.start), min(place.words, first + size - place.start)
        if start < stop:
            pieces.append(mx.contiguous(_words(array)[start:stop]))
            mx.eval(pieces[-1])
        sharded.whole += array.nbytes
        del array
    missing = size - sum(p.size for p in pieces)
    part = mx.concatenate([*pieces, mx.zeros(missing, mx.uint32)])
    mx.eval(part)
    sharded.resident += part.nbytes
    return _Unit(sharded, places, part)


def _stand_in(array: mx.array) -> mx.array:
    floating = mx.issubdtype(array.dtype, mx.floating)
    one = mx.array(float("nan") if floating else mx.iinfo(array.dtype).max, array.dtype)
    stand_in = mx.broadcast_to(one, array.shape)
    mx.eval(stand_in)
    return stand_in


def _count_words(array: mx.array) -> int:
    return -(-array.nbytes // (_WORD * _ALIGNED)) * _ALIGNED


def _words(array: mx.array) -> mx.array:
    """Return an array's bytes as `_count_words` words, with zeros at the end."""
    flat = mx.contiguous(array).reshape(-1)
    padding = (_count_words(array) * _WORD - flat.nbytes) // flat.dtype.size
    if padding:
        flat = mx.concatenate([flat, mx.zeros(padding, flat.dtype)])
    return flat.view(mx.uint32)


def _read(words: mx.array, start: int, like: mx.array) -> mx.array:
    """Return the array whose words begin at `start`, as a view."""
    return words[start : start + _count_words(like)].view(like.dtype)[: like.size].reshape(like.shape)


@cache
def _called(kind: type) -> type:
    """Return a subclass of a model's class that notes its calls."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._sharded.calling():
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@cache
def _read_gathered(kind: type) -> type:
    """Return a subclass of a module's class that gathers its arrays where they are read."""

    def seen(self: nn.Module, key: str, value: Any) -> Any:
        for i, place in enumerate(self._unit.places):
            if value is place.stand_in:
                return self._unit.sharded.beside(self._unit, i)
        return value

    def item(self: nn.Module, key: str) -> Any:
        return seen(self, key, dict.__getitem__(self, key))

    def get(self: nn.Module, key: str, default: Any = None) -> Any:
        return seen(self, key, dict.get(self, key, default))

    def attribute(self: nn.Module, key: str) -> Any:
        return item(self, key) if key in self else kind.__getattr__(self, key)  # type: ignore[attr-defined]

    names = {"__getitem__": item, "get": get, "__getattr__": attribute, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)


@cache
def _gathered(kind: type) -> type:
    """Return a subclass of a block's class that gathers its arrays when it is called, to be checkpointed."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        unit = self._unit
        found = unit.given.pop() if unit.given else unit.sharded.forward(unit, _first((args, kwargs)))
        with unit.placed(found):
            return kind.__call__(self, *args, **kwargs)

    def recomputed(self: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: _recomputed(self._unit, inner, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "recomputed": recomputed, "__module__": kind.__module__})


def _is_leaf(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _arrays(tree: Any) -> list[mx.array]:
    return [v for _, v in tree_flatten(tree, is_leaf=_is_leaf) if isinstance(v, mx.array)]


def _first(tree: Any) -> mx.array:
    """Return the first floating array of a block's arguments, the hidden states."""
    return next(a for a in _arrays(tree) if mx.issubdtype(a.dtype, mx.floating))


def _with(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """Return a tree with other arrays in place of its own."""
    new = iter(arrays)
    return tree_map(lambda v: next(new) if isinstance(v, mx.array) else v, tree, is_leaf=_is_leaf)


def _recomputed(unit: _Unit, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a checkpointed block as `mx.checkpoint(inner)(*args, **kwargs)` would, with its arrays gathered.

    `inner` calls the block once. The arrays are constants of the graph, and their gradient is not computed.
    """
    given = args, kwargs
    returned: list[Any] = []

    def forward(*arrays: mx.array) -> list[mx.array]:
        args, kwargs = _with(given, arrays)
        returned[:] = [inner(*args, **kwargs)]
        return _arrays(returned[0])

    def back(primals: Any, cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        primals = [primals] if isinstance(primals, mx.array) else list(primals)
        floats = [i for i, p in enumerate(primals) if mx.issubdtype(p.dtype, mx.floating)]
        made = [i for i, o in enumerate(outputs) if mx.issubdtype(o.dtype, mx.floating)]
        unit.given.append(unit.sharded.backward(unit, cotangents[made[0]]))
        # Nothing is computed again before the gradient has come here.
        primals = mx.depends(primals, [*outputs, *cotangents])

        def again(*values: mx.array) -> list[mx.array]:
            now = list(primals)
            for i, value in zip(floats, values):
                now[i] = value
            outputs = forward(*now)
            return [outputs[i] for i in made]

        _, slopes = mx.vjp(again, [primals[i] for i in floats], [cotangents[i] for i in made])
        found = [mx.zeros_like(p) for p in primals]
        for i, slope in zip(floats, slopes):
            found[i] = slope
        return found

    arrays = _arrays(given)
    unit.given.append(unit.sharded.forward(unit, _first((args[2:], kwargs))))
    call: Any = mx.custom_function(forward)
    call.vjp(back)
    outputs: list[mx.array] = call(*arrays)
    return _with(returned.pop(), outputs)


def _check(model: nn.Module) -> None:
    """Raise ModelError if the model reads a stand-in: weights of a block outside of its call."""
    with probing(model):
        logits = model(mx.array([[1, 0, 1]]))
    if mx.isnan(logits).any().item():
        raise ModelError(
            f"distributed.shard: base: {_name_of(model)} reads weights of a block outside of its call (or its logits "
            "are NaN), so they cannot be gathered with the block: use another value of distributed.shard"
        )


# --- owned ------------------------------------------------------------------------------------------------------------
# Arrays that one rank each computes: parameters that are updated, and the optimiser's state.


def exchanged(
    own: Mapping[str, mx.array], like: Mapping[str, mx.array], owner: Mapping[str, int], group: mx.distributed.Group
) -> Iterator[dict[str, mx.array]]:
    """Yield all arrays by name, some at a time: those of the other ranks with the bits that they have there.

    Each round is evaluated before the next one is requested. All ranks call this with the same names.

    Args:
        own: what this rank owns, at least.
        like: arrays of the shapes and types of all; they are not read.
        owner: the rank of each name in `like`.
    """
    rounds: list[list[list[str]]] = []  # the names of each rank in each round
    for rank in range(group.size()):
        k, filled = 0, 0
        for name in (n for n in like if owner[n] == rank):
            size = _count_words(like[name]) * _WORD
            if filled and filled + size > MESSAGE:
                k, filled = k + 1, 0
            rounds += [[[] for _ in range(group.size())]] * (k == len(rounds))
            rounds[k][rank].append(name)
            filled += size
    for each in rounds:
        longest = max(sum(_count_words(like[n]) for n in names) for names in each)
        pieces = [_words(own[n]) for n in each[group.rank()]]
        missing = longest - sum(p.size for p in pieces)
        part = mx.concatenate([*pieces, mx.zeros(missing, mx.uint32)])
        words, found = mx.distributed.all_gather(part, group=group), dict[str, mx.array]()
        mx.eval(words)  # also where this rank needs none of the others'
        for rank, names in enumerate(each):
            at = rank * longest
            for name in names:
                # Copies, because a view would keep the arrays of all ranks in memory.
                found[name] = own[name] if rank == group.rank() else mx.contiguous(_read(words, at, like[name]))
                at += _count_words(like[name])
        mx.eval(found)
        del pieces, part, words
        yield found
