"""The table of tensors at the head of a .gguf file: which quantisation each one has.

MLX gives tensors without their type, and reads some types wrongly in silence (in mlx 0.32.4 Q4_K, and BF16 by way of
float16, where large numbers become infinite), so the types are looked at before.
Layout: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

# Bytes of a metadata value by its type number; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_FARTHEST = 1 << 40  # file systems refuse to seek much further

MOST_DIMENSIONS = 4  # of a tensor, as in ggml
_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34)}

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


class Entry(NamedTuple):
    """A line of the table: type of a tensor ("Q4_1"; "type 99" where it has no name here), shape, place in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int


def tensor_table(path: Path) -> dict[str, Entry]:
    """Tensor name -> what the table says of it.

    Raises:
        ValueError: not GGUF of version 2 or 3, or cut off within its head.
    """
    with open(path, "rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"not a GGUF file: it starts with {magic!r}")
        version, tensors, pairs = _unpack(file, "IQQ")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}; only 2 and 3 are known")
        alignment = 32
        for _ in range(pairs):
            key = _string(file)
            (kind,) = _unpack(file, "I")
            if key == "general.alignment" and kind == _UINT32:
                (alignment,) = _unpack(file, "I")
            else:
                _skip_value(file, kind)
        table = dict(_tensor(file) for _ in range(tensors))
        # Offsets count from where the data begins, on a full multiple.
        if not alignment:
            raise ValueError("broken: it aligns its data to 0 bytes")
        start = -(-file.tell() // alignment) * alignment
        end = file.seek(0, 2)
    table = {name: entry._replace(offset=start + entry.offset) for name, entry in table.items()}
    _check_places(table, start, end)
    return table


def _check_places(table: dict[str, Entry], free: int, end: int) -> None:
    """ValueError where tensors overlap or reach beyond the file: MLX's reader believes what the table says."""
    for name, (kind, shape, offset) in sorted(table.items(), key=lambda item: item[1].offset):
        if offset < free:
            raise ValueError(f"broken: the tensor {name[:80]!r} overlaps another one")
        items, size = _BLOCKS.get(kind, (1, 0))
        free = offset + -(-math.prod(shape) // items) * size
        if free > end:
            raise ValueError(f"broken or cut off: the tensor {name[:80]!r} reaches beyond the file's end")


def _tensor(file: BinaryIO) -> tuple[str, Entry]:
    name = _string(file)
    (dimensions,) = _unpack(file, "I")
    if dimensions > MOST_DIMENSIONS:
        raise ValueError(f"broken: a tensor of {dimensions:,} dimensions; expected at most {MOST_DIMENSIONS}")
    # The innermost comes first.
    shape = struct.unpack(f"<{dimensions}Q", _read(file, 8 * dimensions))[::-1]
    kind, offset = _unpack(file, "IQ")
    return name, Entry(TYPES.get(kind, f"type {kind}"), shape, offset)


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return _read(file, length).decode("utf-8", "replace")


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack("<" + form, _read(file, struct.calcsize("<" + form)))


def _read(file: BinaryIO, length: int) -> bytes:
    # No name, number or list of sizes is long; a broken file may claim petabytes.
    data = file.read(length) if length < 1 << 16 else b""
    if len(data) != length:
        raise ValueError("cut off or broken within its head")
    return data


def _skip(file: BinaryIO, length: int) -> None:
    # One byte of it is read: a file may be sought beyond its end.
    if length:
        file.seek(min(length - 1, _FARTHEST), 1)
        _read(file, 1)


def _skip_string(file: BinaryIO) -> None:
    _skip(file, _unpack(file, "Q")[0])


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _skip_string(file)
    elif kind == _ARRAY:
        inner, count = _unpack(file, "IQ")
        if inner in _SIZES:
            _skip(file, _SIZES[inner] * count)
        elif inner == _STRING:
            for _ in range(count):
                _skip_string(file)
        else:  # nobody writes them, and MLX's reader calls itself for each level
            raise ValueError("broken: an array of arrays in its metadata")
    elif kind in _SIZES:
        _skip(file, _SIZES[kind])
    else:
        raise ValueError(f"broken: a metadata value of type {kind}")
