"""A model's weights one by one, in the numbers of a .gguf file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.errors import ExportError
from mlxft.model.lora import QUANTIZED, LowRank, dense_weight

BLOCK = 32  # numbers that share a scale in q8_0
_Q8_BYTES = BLOCK + 2
# Bytes of a number; general.file_type as llama.cpp counts them.
KINDS = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": _Q8_BYTES / BLOCK}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


@dataclass(frozen=True)
class Weight:
    """One array of a model: its name without wrappers, its shape unpacked, and how to get it (float32, fused)."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], mx.array]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; `read` gives it as numpy, in its kind."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Any]


def model_weights(model: nn.Module) -> Iterator[Weight]:
    """All weights, adapters fused and packed layers unpacked, none of them read yet.

    What `read` gives is taken out of the model, so that no more than one stands in memory unpacked.
    """
    inside: tuple[str, ...] = ()
    for path, module in list(model.named_modules()):
        if path.startswith(inside) and inside:
            continue
        base = module
        if isinstance(module, LowRank):
            inside = (*inside, f"{path}.")
            base = module.base
        packed = isinstance(base, QUANTIZED)
        for leaf in [k for k, v in base.items() if isinstance(v, mx.array) and not k.startswith("_")]:
            if packed and leaf in ("scales", "biases"):
                continue
            shape = dense_weight(base).shape if leaf == "weight" and packed else base[leaf].shape
            yield Weight(f"{path}.{leaf}", tuple(shape), _reader(module, base, leaf))


def _reader(module: nn.Module, base: nn.Module, leaf: str) -> Callable[[], mx.array]:
    def read() -> mx.array:
        if leaf != "weight":
            return base.pop(leaf).astype(mx.float32)
        # Unpacked in float32: the file's own rounding is to be the only one.
        value = module.fused_weight(exact=True) if isinstance(module, LowRank) else dense_weight(base, exact=True)
        mx.eval(value)
        for owner in {id(m): m for m in (module, base)}.values():
            for own in ("weight", "scales", "biases", "lora_a", "lora_b", "m"):
                owner.pop(own, None)
        return value

    return read


def stored_kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The kind that a tensor is stored in: vectors (norms, biases) stay float32.

    Raises:
        ExportError: rows that q8_0's blocks do not fill.
    """
    if len(shape) < 2:
        return "f32"
    if kind == "q8_0" and shape[-1] % BLOCK:
        raise ExportError(
            f"{name}: rows of {shape[-1]} numbers can not be packed as q8_0, which takes {BLOCK} at a time; "
            "take f16 or bf16"
        )
    return kind


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor in a file."""
    return int(np.prod(shape) * KINDS[kind])


def encode(value: mx.array, kind: str, name: str) -> Any:
    """A float32 array as numpy has a kind: bf16 as uint16, q8_0 as rows of bytes.

    Raises:
        ExportError: numbers that are not finite in this kind.
    """
    if kind == "q8_0":
        _check_finite(value, name, kind)
        return np.array(quantize_q8_0(value))
    if kind == "bf16":
        value = value.astype(mx.bfloat16)
        _check_finite(value, name, kind)
        return np.array(value.view(mx.uint16))
    value = value.astype(mx.float16 if kind == "f16" else mx.float32)
    _check_finite(value, name, kind)
    return np.array(value)


def _check_finite(value: mx.array, name: str, kind: str) -> None:
    if mx.isfinite(value).all().item():
        return
    hint = "; its numbers are too large for f16, take bf16" if kind == "f16" else "; the model is broken"
    raise ExportError(f"{name}: holds numbers that are not finite as {kind}{hint}")


def quantize_q8_0(value: mx.array) -> mx.array:
    """Rows in blocks of 32 numbers: a float16 scale, and 32 whole numbers of 8 bits.

    (..., D) float32 -> (..., D / 32 * 34) uint8. Source: ggml's quantize_row_q8_0_ref.
    """
    blocks = value.astype(mx.float32).reshape(-1, BLOCK)
    scale = mx.abs(blocks).max(axis=1, keepdims=True) / 127
    turned = blocks * mx.where(scale == 0, 0.0, 1 / mx.where(scale == 0, 1.0, scale))
    # Halves go away from zero, as C's roundf has it.
    whole = mx.floor(mx.abs(turned))
    rounded = mx.sign(turned) * (whole + mx.floor(2 * (mx.abs(turned) - whole)))
    parts = [scale.astype(mx.float16).view(mx.uint8), rounded.astype(mx.int8).view(mx.uint8)]
    return mx.concatenate(parts, axis=1).reshape(*value.shape[:-1], -1)
