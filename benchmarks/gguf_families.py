"""Runs a tiny file of every model family in llama.cpp, and writes tests/golden/gguf_families.json.

llama-cpp-python stands in an environment of its own, whose Python is given.

python benchmarks/gguf_families.py --llama-python ~/llama/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE

sys.path[:0] = [str(HERE.parent)]

NOTE = (
    "Files of tiny models (tests/exports/test_gguf_families.py) that llama-cpp-python {version} ran on a CPU with "
    "given tokens, written by benchmarks/gguf_families.py: the largest difference of its logits from mlx-lm's, and the "
    "mean KL. Gemma's differences are those of ggml's GELU, a table in float16. What stands in these files is what is "
    "written now."
)
RUN = """
import sys, numpy as np, llama_cpp
ids = [int(i) for i in sys.argv[2].split(",")]
exact = {"flash_attn": False, "type_k": 0, "type_v": 0}
model = llama_cpp.Llama(sys.argv[1], logits_all=True, verbose=False, n_ctx=64, n_batch=64, **exact)
model.eval(ids)
np.save(sys.argv[3], model.scores[: len(ids)])
print(llama_cpp.__version__)
"""


def compare(folder: Path, case: str, python: str) -> tuple[dict[str, Any], str]:
    """What llama.cpp made of a family's file, what stands in it, and llama-cpp-python's version."""
    from mlxft.exports.gguf import export_gguf
    from mlxft.model.load import load
    from tests.exports.test_gguf_families import IDS, content, family_dir

    file, out = folder / "a.gguf", folder / "logits.npy"
    export_gguf(family_dir(folder / "m", case), file, kind="f32")
    ids = ",".join(map(str, np.array(IDS[0]).tolist()))
    run = subprocess.run([python, "-c", RUN, str(file), ids, str(out)], check=True, capture_output=True, text=True)
    ours = np.array(load(str(folder / "m"), dtype="float32").model(IDS)[0], np.float64)
    theirs = np.load(out).astype(np.float64)
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (ours, theirs))
    seen = {
        "largest_difference": float(f"{abs(ours - theirs).max():.2e}"),
        "mean_kl": float(f"{(np.exp(p) * (p - q)).sum(-1).mean():.2e}"),
    }
    return {"llama.cpp": seen, **content(file)}, run.stdout.split()[-1]


def main() -> None:
    """Write the file anew."""
    from tests.exports.test_gguf_families import CASES, GOLDEN

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True, help="Python of an environment with llama-cpp-python")
    python, lines, version = parser.parse_args().llama_python, [], ""
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found, version = compare(Path(folder), case, python)
        print(f"{case:12} {found['llama.cpp']}")
        lines.append(f"  {json.dumps(case)}: {json.dumps(found)}")
    note, cases = json.dumps(NOTE.format(version=version)), ",\n".join(lines)
    GOLDEN.write_text(f'{{\n "note": {note},\n "cases": {{\n{cases}\n }}\n}}\n', "utf-8")


if __name__ == "__main__":
    main()
