"""In how many bits each fused layer is written: the least that keep as much of the adaptation as is wished.

Fusing into a quantised base rounds again, and a layer's rounding may be larger than its update. So each layer is
tried in several forms, and for each the noise of its rounding is measured: how much its output moves on probe rows,
relative to that output. Going up, the step that takes most noise away for its bytes comes first; that gives one row of
assignments from "all as the base" to "all float", layer by layer, on which the smallest that keeps enough is searched
by measuring whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.errors import ExportError
from mlxft.export.fidelity import Meter, Standin, standing_in, unpacked
from mlxft.model.lora import QUANTIZED, LowRank, dense_weight, plain, shift

BITS = (2, 3, 4, 5, 6, 8)
_TRIALS = 8  # most models measured in the search


class Form(NamedTuple):
    """How a fused layer is written; 0 bits: float. `same`: as the base is, of which its update changes nothing."""

    bits: int
    group_size: int = 0
    mode: str = "affine"
    same: bool = False

    def layer(self, base: nn.Module, weight: mx.array) -> nn.Module:
        """The layer with `weight`, float32, in this form."""
        if self.same:
            return base
        dense = plain(base, weight.astype(dense_weight(base).dtype))
        return dense.to_quantized(self.group_size, self.bits, mode=self.mode) if self.bits else dense

    def bytes(self, base: nn.Module) -> int:
        """What the layer's weight takes."""
        dense = dense_weight(base)
        if not self.bits:
            return int(dense.size * dense.dtype.size)
        # A scale and a bias a group; the other modes have one byte.
        extra = 2 * dense.dtype.size if self.mode == "affine" else 1
        return int(dense.size * self.bits // 8 + dense.size // self.group_size * extra)


FLOAT = Form(0)
Forms = dict[str, Form]  # path of a fused layer -> its form


def fused_paths(model: nn.Module) -> dict[str, LowRank]:
    """The model's low-rank layers."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRank)}


def own_form(base: nn.Module) -> Form:
    """As the base is."""
    return Form(base.bits, base.group_size, base.mode) if isinstance(base, QUANTIZED) else FLOAT


def with_bits(base: nn.Module, bits: int) -> Form | None:
    """A quantised layer in other bits; None where its width does not go into groups. Float layers stay so."""
    own = own_form(base)
    if bits == own.bits or not own.bits:
        return own
    groups = own.group_size if own.mode == "affine" else 32  # float modes have only a few widths: affine takes over
    return Form(bits, groups) if dense_weight(base).shape[-1] % groups == 0 else None


def uniform(model: nn.Module, bits: int | None) -> Forms:
    """All fused layers alike: None as their base is, 0 float, else so many bits where the base is quantised.

    Raises:
        ExportError: a layer can not have so many bits.
    """
    forms: Forms = {}
    for path, module in fused_paths(model).items():
        form = FLOAT if bits == 0 else own_form(module.base) if bits is None else with_bits(module.base, bits)
        if form is None:
            width, mode = dense_weight(module.base).shape[-1], module.base.mode
            raise ExportError(
                f"--bits {bits}: {path} is quantised as {mode} and {width} wide, which groups of 32 do not fill; "
                "leave --bits out, or use --dequantize"
            )
        forms[path] = form
    return forms


def model_bytes(model: nn.Module, forms: Forms, dequantize: bool = False) -> int:
    """What the model's weights take once its low-rank layers are fused in these forms.

    Args:
        dequantize: whether the layers that are not fused are unpacked too.
    """
    total = 0
    layers = fused_paths(model)
    modules = dict(model.named_modules())
    for name, value in tree_flatten(model.parameters()):
        owner, _, leaf = name.rpartition(".")
        if any(part in layers for part in accumulate(owner.split("."), lambda a, b: f"{a}.{b}")):
            total += value.nbytes if leaf == "bias" else 0
        elif not (dequantize and isinstance(modules.get(owner), QUANTIZED) and leaf in ("weight", "scales", "biases")):
            total += value.nbytes
        elif leaf == "weight":
            total += dense_weight(modules[owner]).nbytes
    return total + sum(forms[path].bytes(module.base) for path, module in layers.items())


def unchanged(model: nn.Module) -> set[str]:
    """Low-rank layers over quantised bases whose update is zero: they are written as they are, not rounded again."""
    off = {p: mx.abs(shift(m)).max() for p, m in fused_paths(model).items() if isinstance(m.base, QUANTIZED)}
    mx.eval(off)
    return {path for path, value in off.items() if value.item() == 0}


def standins(model: nn.Module, forms: Forms) -> dict[str, nn.Module]:
    """The fused layers in these forms, each made when it is used."""

    def standin(layer: LowRank, form: Form) -> Standin:
        base = layer.base
        return Standin(base, lambda: dense_weight(form.layer(base, layer.fused_weight())))

    layers = fused_paths(model)
    return {path: standin(layers[path], form) for path, form in forms.items()}


class _Tap(nn.Module):
    """Runs a low-rank layer and notes how much its output would move in each form, and how large it is."""

    def __init__(self, layer: LowRank, forms: Sequence[Form]) -> None:
        super().__init__()
        base, noted = layer.base, list[mx.array]()

        def note(y: mx.array, run: Callable[[nn.Module], mx.array]) -> mx.array:
            weight = layer.fused_weight()
            sizes = [y.astype(mx.float32).square().sum()]
            for form in forms:
                moved = plain(base, dense_weight(form.layer(base, weight)).astype(mx.float32) - weight)
                moved.pop("bias", None)  # which rounding does not move
                sizes.append(run(moved).astype(mx.float32).square().sum())
            noted.append(mx.stack(sizes))
            mx.async_eval(noted[-1])
            return y

        # As functions: what a module holds as modules or lists is part of its weights.
        self._note = note
        self._layer = lambda: layer
        self._noted = lambda: noted

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        return self._note(self._layer()(x, *args, **options), lambda moved: moved(x, *args, **options))

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the output layer."""
        return self._note(self._layer().as_linear(x), lambda moved: moved.as_linear(x))

    def noise(self, forms: int) -> list[float]:
        """Of each form, relative to the output; over all calls."""
        if not self._noted():  # a layer that these rows do not reach
            return [0.0] * forms
        sums: Any = mx.stack(self._noted()).sum(axis=0).tolist()
        size, *moved = sums
        return [m / size if size else 0.0 for m in moved]

    def __getattr__(self, key: str) -> Any:
        return self[key] if key in self else getattr(self._layer(), key)


class Option(NamedTuple):
    """A form that a layer can have: bytes of its weight, and noise as `_Tap` measures it."""

    form: Form
    bytes: int
    noise: float


def options_of(model: nn.Module, meter: Meter) -> dict[str, list[Option]]:
    """What each fused layer can be, the base's own bits first, then more, then float."""
    taps: dict[str, _Tap] = {}
    forms: dict[str, list[Form]] = {}
    bases = {path: module.base for path, module in fused_paths(model).items()}
    still = unchanged(model)
    for path, module in fused_paths(model).items():
        own = own_form(module.base)
        if path in still or not own.bits:
            forms[path] = [own._replace(same=True) if own.bits else own]
            continue
        more = (with_bits(module.base, bits) for bits in BITS if bits > own.bits)
        forms[path] = [own, *(form for form in more if form is not None), FLOAT]
        taps[path] = _Tap(module, forms[path])
    with unpacked(model), standing_in(model, taps):
        meter.outputs()
    noise = {path: taps[path].noise(len(forms[path])) if path in taps else [0.0] for path in forms}
    return {
        path: [Option(form, form.bytes(bases[path]), off) for form, off in zip(forms[path], noise[path])]
        for path in forms
    }


class Ladder:
    """Assignments from all layers as their base to all float; a rung raises one layer.

    Attributes:
        bytes, noise: of each rung, over all fused layers; noise falls from rung to rung.
    """

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        self._start = {path: given[0] for path, given in options.items()}
        steps: list[tuple[float, str, Option, Option]] = []
        for path, given in options.items():
            at = given[0]
            # The lower convex hull of noise over bytes: from each point on, the steepest way down.
            while better := [o for o in given if o.bytes > at.bytes and o.noise < at.noise]:
                to = max(better, key=lambda o: (at.noise - o.noise) / (o.bytes - at.bytes))
                steps.append(((at.noise - to.noise) / (to.bytes - at.bytes), path, at, to))
                at = to
        steps.sort(key=lambda step: -step[0])
        self._steps = steps
        start = self._start.values()
        self.bytes = list(accumulate((b.bytes - a.bytes for _, _, a, b in steps), initial=sum(o.bytes for o in start)))
        self.noise = list(accumulate((b.noise - a.noise for _, _, a, b in steps), initial=sum(o.noise for o in start)))

    def __len__(self) -> int:
        return len(self.bytes)

    def forms(self, rung: int) -> Forms:
        """The assignment at a rung, from 0."""
        found = {path: option.form for path, option in self._start.items()}
        for _, path, _, option in self._steps[:rung]:
            found[path] = option.form
        return found


@dataclass(frozen=True)
class Trial:
    """A model that was measured.

    Attributes:
        bytes: of all its weights.
        divergence, agreement: from the adapted model (see fidelity.py).
        kept: share of the adaptation, None where there is nothing to keep.
    """

    name: str
    bytes: int
    divergence: float
    agreement: float
    kept: float | None
    forms: Forms = field(repr=False)

    def meets(self, wish: float) -> bool:
        """Whether it keeps as much."""
        return self.kept is None or self.kept >= wish


def name_of(forms: Forms) -> str:
    """Its precisions: 4 bits; 4/6/8 bits; 4 bits/float; float."""
    bits = sorted({form.bits for form in forms.values()} - {0})
    packed = f"{'/'.join(map(str, bits))} bits" if bits else ""
    return "/".join(part for part in (packed, "float" if FLOAT in forms.values() else "") if part) or "as it is"


def search(ladder: Ladder, others: Sequence[Forms], measure: Callable[[Forms], Trial], wish: float) -> list[Trial]:
    """Measure assignments until the least that keeps `wish` is found; all that were measured, in that order.

    Args:
        others: assignments to measure beside the ladder's: of one precision for all layers.
    """
    plain_trial = measure(ladder.forms(0))
    trials = [plain_trial]
    if plain_trial.meets(wish) or len(ladder) == 1:
        return trials
    trials.append(measure(ladder.forms(len(ladder) - 1)))
    if not trials[-1].meets(wish):
        return trials
    trials += [measure(forms) for forms in others]
    low, high = 0, len(ladder) - 1
    lost = 1 - (plain_trial.kept or 0.0)
    for _ in range(_TRIALS):
        if high - low <= 1 or ladder.bytes[high] - ladder.bytes[low] <= 0.01 * ladder.bytes[high]:
            break
        # What is lost grows with the noise; so the rung that just keeps enough can be guessed, and the next is near.
        aim = ladder.noise[low] * (1 - wish) / max(lost, 1e-9)
        rung = next(i for i in range(len(ladder)) if ladder.noise[i] <= aim or i == len(ladder) - 1)
        if not low < rung < high:
            half = (ladder.bytes[low] * ladder.bytes[high]) ** 0.5
            rung = next(i for i in range(low + 1, high + 1) if ladder.bytes[i] >= half or i == high - 1)
        trials.append(measure(ladder.forms(rung)))
        if trials[-1].meets(wish):
            high = rung
        else:
            low, lost = rung, 1 - (trials[-1].kept or 0.0)
    return trials


def least(trials: Sequence[Trial], wish: float) -> Trial:
    """The smallest that keeps `wish`; where none does, the one that keeps most."""
    enough = [trial for trial in trials if trial.meets(wish)]
    return min(enough, key=lambda t: t.bytes) if enough else max(trials, key=lambda t: t.kept or 0.0)
