"""How long one waits: the help, a check, and a run of one step on the demo's rows.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import report

import mlxft

ROWS = Path(mlxft.__file__).parent / "demo" / "rows.jsonl"


def main() -> None:
    """Time each command five times, as whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "r.yaml"
        recipe.write_text(
            f"model: {{path: smollm2-135m}}\ndata: {{train: {ROWS}, format: messages}}\n"
            f"batch: {{rows: 1}}\nrun: {{steps: 1, dir: {folder}}}\n"
        )
        commands = {
            "--help": ["--help"],
            "check": ["check", str(recipe)],
            "train, one step of one row": ["train", str(recipe), "--overwrite"],
        }
        table = []
        for name, arguments in commands.items():
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                subprocess.run([sys.executable, "-m", "mlxft", *arguments], check=True, capture_output=True)
                seconds.append(time.perf_counter() - began)
            table.append([name, min(seconds), statistics.median(seconds), max(seconds)])
    report("startup", ["command", "min s", "median s", "max s"], table, {})


if __name__ == "__main__":
    main()
