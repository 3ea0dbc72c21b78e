"""Peak memory while a K-quant .gguf file is read, over what is kept of it. Linux.

    python benchmarks/gguf_memory.py                 # 4.1 GB on the disk, 13 GB of memory, a quarter of an hour

The file is a synthetic llama in Q4_K and Q6_K (attn_v, ffn_down and the head), as q4_k_m has them: each tensor repeats
one row of random codes. Each form is read in a process of its own. Resident memory counts from the started program on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import report, worker

import mlxft  # before mlx: brings the fast BLAS on Linux

assert mlxft

WIDTH, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 49152  # the vocabulary is SmolLM2's


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor."""
    yield "token_embd.weight", (VOCABULARY, WIDTH)
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{i}.{name}.weight", (WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            yield f"blk.{i}.{name}.weight", (INNER, WIDTH)
        yield f"blk.{i}.ffn_down.weight", (WIDTH, INNER)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", (WIDTH,)
    yield "output_norm.weight", (WIDTH,)
    yield "output.weight", (VOCABULARY, WIDTH)


def make(file: Path, layers: int) -> None:
    """Write the file, with SmolLM2's tokenizer."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

    from mlxft.model.load import resolve

    sizes = {"embedding_length": WIDTH, "block_count": layers, "feed_forward_length": INNER}
    sizes |= {"attention.head_count": HEADS, "attention.head_count_kv": HEADS, "rope.dimension_count": WIDTH // HEADS}
    writer = GGUFWriter(file, "llama")
    for name, field in GGUFReader(resolve("smollm2-135m")).fields.items():
        if not name.startswith("GGUF") and name != "general.architecture":
            value = sizes.get(name.removeprefix("llama."), field.contents())
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    rows, random = list[tuple[int, np.ndarray]](), np.random.default_rng(0)
    for name, shape in shapes(layers):
        fine = any(part in name for part in ("attn_v.", "ffn_down.", "output.weight")) and "attn_output" not in name
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else GGMLQuantizationType["Q6_K" if fine else "Q4_K"]
        numbers, size = GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (shape[-1] // numbers, size), dtype=np.uint8)
        for at in {"Q4_K": (0, 2), "Q6_K": (208,)}.get(kind.name, ()):  # the float16 scales of a block
            blocks[:, at : at + 2] = np.full(1, 2e-4, np.float16).view(np.uint8)
        row = np.ones(shape, np.float32).view(np.uint8) if len(shape) == 1 else blocks.ravel()
        rows.append((shape[0] if len(shape) == 2 else 1, row))
        stored = shape if len(shape) == 1 else (shape[0], row.size)
        writer.add_tensor_info(
            name, stored, np.dtype("float32" if len(shape) == 1 else "uint8"), rows[-1][0] * row.size, kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for count, row in rows:
        writer.write_tensor_data(np.tile(row, (count, 1)))
    writer.close()


def status(key: str) -> int:
    """Return a figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def read(job: dict[str, Any]) -> None:
    """Read the file in a form, and print what was kept and the peak."""
    import gguf  # noqa: F401
    import mlx_lm.models.llama  # noqa: F401
    import transformers  # noqa: F401

    from mlxft.model.folder import weight_bytes
    from mlxft.model.load import load

    before = status("VmRSS")
    loaded = load(str(job["file"]), dtype="own", quantize=job["bits"] or None)
    print(json.dumps({"kept": weight_bytes(loaded.model), "peak": status("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="number of layers, 0.13 GB each (default: %(default)s)")
    parser.add_argument("--folder", help="where the file is made, and removed (default: the system's)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        read(json.loads(given.worker))
        return
    table = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        file = Path(folder) / "big.gguf"
        make(file, given.layers)
        size = file.stat().st_size
        for bits in (4, 8, 0):
            found = worker(__file__, {"file": str(file), "bits": bits})
            kept, peak = found["kept"], found["peak"]
            table.append(
                [f"{bits} bits" if bits else "float16", round(kept / 1e9, 2), round(peak / 1e9, 2), peak / kept]
            )
    columns = ["read as", "kept GB", "peak GB", "peak over kept"]
    report("gguf_memory", columns, table, {"file GB": round(size / 1e9, 2), "layers": given.layers})


if __name__ == "__main__":
    main()
