"""How many files of mlxft a reader passes who follows one run: those of which a function is called in it.

    python benchmarks/files_passed.py

Class bodies and module code do not count, nor do comprehensions in them; lambdas do. Each job runs in a process of its
own, through the command line, on the tiny model of digests.py, with MLX's own operations as on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import digests

RECORDER = """
import json, sys, threading
from pathlib import Path
out, *sys.argv = sys.argv[1:]
import mlxft
ROOT = str(Path(mlxft.__file__).parent) + "/"
seen, importing = {}, 0
def record(frame, event, arg):
    # What module code calls while it is imported (decorators, tables) is no step of the run. Class bodies are not
    # optimised code (inspect.CO_OPTIMIZED), functions are; the iterator of a comprehension is not looked at.
    global importing
    code = frame.f_code
    if not code.co_filename.startswith(ROOT):
        return
    if code.co_name == "<module>":
        importing += {"call": 1, "return": -1}.get(event, 0)
    elif event == "call" and not importing and code.co_flags & 1:
        seen.setdefault(code.co_filename.removeprefix(ROOT), code.co_name)
threading.setprofile(record)
sys.setprofile(record)
from mlxft.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
finally:
    sys.setprofile(None)
    Path(out).write_text(json.dumps(seen))
"""


def passed(*arguments: str) -> dict[str, str]:
    """Files of which a function was called in `mlxft ARGUMENTS`, and the first of them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "files.json"
        command = [sys.executable, "-c", RECORDER, str(out), "mlxft", *arguments]
        own = os.environ | {"MLXFT_CPU": "off"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
        if done.returncode:
            raise SystemExit(f"mlxft {' '.join(arguments)}\n{done.stdout}\n{done.stderr}")
        found: dict[str, str] = json.loads(out.read_text("utf-8"))
        return found


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        digests.inputs(folder)
        jobs: dict[str, list[str]] = {}
        for name in ("sft", "ppo"):
            jobs[name] = ["train", str(digests.write_recipe(folder, name, folder / "runs", 4))]
        # The tiny model's tokenizer is none that .gguf files hold.
        jobs["sft of smollm2"] = [*jobs["sft"], "model.path=smollm2-135m", "run.name=smol", "run.steps=1"]
        jobs["adapter to GGUF"] = ["export", str(folder / "runs/smol"), str(folder / "a.gguf"), "--format", "gguf"]
        for name, arguments in jobs.items():
            files = passed(*arguments)
            print(f"{name}: {len(files)} files")
            print("   ", " ".join(sorted(files)), flush=True)


if __name__ == "__main__":
    main()
