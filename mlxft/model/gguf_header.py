"""The table of tensors at the head of a .gguf file: which quantisation each one has.

MLX gives tensors without their type, and reads some types wrongly in silence (Q4_K in mlx 0.32.4), so the types are
looked at before. Layout: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

# Bytes of a metadata value by its type number; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9

TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    30: "BF16",
    39: "MXFP4",
}


def tensor_types(path: Path) -> dict[str, str]:
    """Tensor name -> type ("Q4_1"; "type 99" where the number has no name here).

    Raises:
        ValueError: not GGUF of version 2 or 3, or cut off within its head.
    """
    with open(path, "rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"not a GGUF file: it starts with {magic!r}")
        version, tensors, pairs = _unpack(file, "IQQ")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}; only 2 and 3 are known")
        for _ in range(pairs):
            _skip_string(file)
            _skip_value(file, *_unpack(file, "I"))
        return dict(_tensor(file) for _ in range(tensors))


def _tensor(file: BinaryIO) -> tuple[str, str]:
    (length,) = _unpack(file, "Q")
    name = _read(file, length).decode("utf-8", "replace")
    (dimensions,) = _unpack(file, "I")
    _read(file, 8 * dimensions)
    kind, _ = _unpack(file, "IQ")
    return name, TYPES.get(kind, f"type {kind}")


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack("<" + form, _read(file, struct.calcsize("<" + form)))


def _read(file: BinaryIO, length: int) -> bytes:
    # No name, number or list of sizes is long; a broken file may claim petabytes.
    data = file.read(length) if length < 1 << 16 else b""
    if len(data) != length:
        raise ValueError("cut off or broken within its head")
    return data


def _skip_string(file: BinaryIO) -> None:
    file.seek(_unpack(file, "Q")[0], 1)


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _skip_string(file)
    elif kind == _ARRAY:
        inner, count = _unpack(file, "IQ")
        if inner in _SIZES:
            file.seek(_SIZES[inner] * count, 1)
        else:
            for _ in range(count):
                _skip_value(file, inner)
    elif kind in _SIZES:
        file.seek(_SIZES[kind], 1)
    else:
        raise ValueError(f"broken: a metadata value of type {kind}")
