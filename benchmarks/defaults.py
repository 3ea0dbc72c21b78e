"""What a recipe learns without a length, a batch size or a rate: next to the best of five rates on the same rows.

python benchmarks/defaults.py ROWS [--sizes 57,136,300,1000] [--most 300] [--rates ...] [KEY=VALUE ...]

ROWS is a jsonl file of data.format: messages. Of its rows of at most --most characters, in a random order, 30 are held
out for all runs, and the first N are trained on by `configs/sft-lora.yaml`. Runs that are done are not trained again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from common import HERE, report

PLACE = Path("runs/defaults")
HELD_OUT = 30


def write_rows(source: Path, sizes: list[int], most: int, place: Path) -> None:
    """Write the held-out rows, and those of each size."""
    rows = [line for line in source.read_text(encoding="utf-8").splitlines() if len(line) <= most]
    rows = list(dict.fromkeys(rows))
    random.Random(0).shuffle(rows)
    if len(rows) < HELD_OUT + max(sizes):
        raise SystemExit(f"{source} has {len(rows)} short rows; {HELD_OUT + max(sizes)} are needed")
    place.mkdir(parents=True, exist_ok=True)
    for name, part in {"valid": rows[:HELD_OUT], **{str(n): rows[HELD_OUT : HELD_OUT + n] for n in sizes}}.items():
        (place / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def falls(n: int, rate: str, settings: list[str], place: Path) -> dict[str, float]:
    """Train on n rows at a rate, or at the default one; return the validation loss before and of the kept weights."""
    name = f"{n}-{rate}"
    file = place / name / "metrics.jsonl"
    if not file.exists() or '"event": "end"' not in file.read_text(encoding="utf-8"):
        given = [f"data.train={place}/{n}.jsonl", f"data.valid={place}/valid.jsonl", f"run.dir={place}"]
        given += [f"run.name={name}", *settings, *([f"optim.lr={rate}"] if rate != "default" else [])]
        recipe = HERE.parent / "configs" / "sft-lora.yaml"
        command = [sys.executable, "-m", "mlxft", "train", str(recipe), *given, "--overwrite"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    evals = [e for e in events if e["event"] == "eval"]
    best = min(evals[1:], key=lambda e: e["loss"])
    return {"before": evals[0]["loss"], "best": best["loss"], "step": best["step"], "steps": evals[-1]["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--sizes", default="57,136,300,1000")
    parser.add_argument("--most", type=int, default=300)
    parser.add_argument("--rates", default="default,5e-5,5e-4,1e-3,2e-3")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_intermixed_args()
    sizes, rates = [int(n) for n in args.sizes.split(",")], args.rates.split(",")
    place = PLACE / args.rows.stem
    write_rows(args.rows, sizes, args.most, place)
    table: list[list[object]] = []
    for n in sizes:
        found = {rate: falls(n, rate, args.settings, place) for rate in rates}
        most = max(one["before"] - one["best"] for one in found.values())
        for rate, one in found.items():
            fell = one["before"] - one["best"]
            table.append([n, rate, one["before"], one["best"], fell / most, one["step"], one["steps"]])
            print(*table[-1], flush=True)
    columns = ["rows", "rate", "loss before", "best loss", "share of the best fall", "at step", "steps"]
    report("defaults", columns, table, {"settings": args.settings})


if __name__ == "__main__":
    main()
