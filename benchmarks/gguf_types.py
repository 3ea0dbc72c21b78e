"""Read .gguf files with mlxft, and compare the predictions with llama.cpp's on the same file.

    python benchmarks/gguf_types.py model-q4_k_m.gguf model-q6_k.gguf

The tokens are those of mlxft's built-in text, given to both. llama.cpp rounds activations to 8 bits where weights are
packed on a CPU; --floats also measures it on the numbers that mlxft read, written as a file of float32, which it does
not round. Needs the extra llama-cpp.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import report

from mlxft.exports.fuse import Meter, find_probe
from mlxft.exports.gguf import export_gguf
from mlxft.exports.llama_cpp import logits_of
from mlxft.model.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="number of tokens (default: %(default)s)")
    parser.add_argument("--floats", action="store_true", help="also measure llama.cpp on the same numbers as float32")
    given = parser.parse_args()
    table = []
    for file in given.files:
        loaded = load(str(file), dtype="float32")
        meter = Meter(loaded, find_probe([], loaded.tokenizer, None, budget=given.tokens))
        own, longest = meter.read(), max(len(row.ids) for row in meter.probe.rows)
        line = [file.name, *meter.gap(own, meter.read_from(logits_of(file, longest)))]
        if given.floats:
            with tempfile.TemporaryDirectory() as folder:
                plain = Path(folder) / "plain.gguf"
                export_gguf(file, plain, kind="f32")
                line += meter.gap(own, meter.read_from(logits_of(plain, longest)))
        table.append(line)
    columns = ["file", "KL a token", "same likeliest", *(["as f32: KL", "same likeliest"] if given.floats else [])]
    report("gguf_types", columns, table, {"tokens": meter.probe.tokens})


if __name__ == "__main__":
    main()
