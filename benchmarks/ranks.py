"""Compare two ranks of one core each with one rank of one core: trained tokens a second, and sampled ones.

    python benchmarks/ranks.py [sft] [grpo] [--steps 6]

Linux only: cores are chosen by taskset. Each line gives the rates of all steps, their medians' ratio, and the shares of
adding up gradients and of waiting. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

WORDS = ["water", "house", "light", "friend", "morning", "river", "garden", "yellow", "paper", "window", "story"]
REWARD = "def vowels(prompts, completions, rows):\n    return [sum(c in 'aeiou' for c in t) for t in completions]\n"
RATES = {"train": "trained_tokens_per_s", "rollout": "sampling_tokens_per_s"}


def recipes(folder: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Write rows, and return a recipe of SFT and one of GRPO, of SmolLM2 in float32."""
    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows = [{"prompt": text(20, 20), "completion": text(60, 140)} for _ in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text(8, 12)}) + "\n" for _ in range(64)))
    (folder / "reward.py").write_text(REWARD)
    common: dict[str, Any] = {
        "model": {"path": "smollm2-135m", "dtype": "float32"},
        "tune": {"rank": 8},
        "memory": {"measure": False, "checkpoint": "off"},
        "run": {"dir": str(folder / "runs"), "steps": steps, "report_every": 1, "save_every": 10**6},
    }
    sft = {"data": {"train": "rows.jsonl", "format": "prompt-completion", "max_length": 512}, "batch": {"rows": 8}}
    grpo = {
        "data": {"train": "prompts.jsonl", "format": "prompts", "max_length": 256},
        "batch": {"tokens": 1024},
        # rows: each rank decodes as many at once; half as many would cost nearly as much a step.
        "rollout": {"prompts": 8, "samples": 4, "max_tokens": 32, "rows": 8, "stop_at_eos": False},
        "rewards": {"function": "reward.py:vowels"},
    }
    return {"sft": {"objective": "sft", **sft, **common}, "grpo": {"objective": "grpo", **grpo, **common}}


def measured(folder: Path, name: str, recipe: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Train on so many ranks, each on a core of its own, and return the events."""
    file, run = folder / f"{name}.yaml", f"{name}-{ranks}"
    file.write_text(yaml.safe_dump({**recipe, "run": {**recipe["run"], "name": run}}))
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{24000 + rank}"] for rank in range(ranks)]))
    started = []
    for rank in range(ranks):
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}
        command = ["taskset", "-c", str(rank), sys.executable, "-m", "mlxft", "train", str(file), "--overwrite"]
        started.append(subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in started]
    assert not any(codes), f"{run} has failed"
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["sft", "grpo"])
    parser.add_argument("--steps", type=int, default=6)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for name in asked.names:
            recipe = recipes(folder, asked.steps)[name]
            one, two = (measured(folder, name, recipe, ranks) for ranks in (1, 2))
            for kind, key in RATES.items():
                rates = [[event[key] for event in events if event["event"] == kind] for events in (one, two)]
                if rates[0]:
                    ratio = statistics.median(rates[1][1:]) / statistics.median(rates[0][1:])
                    shown = " / ".join(" ".join(f"{rate:.0f}" for rate in each) for each in rates)
                    print(f"{name} {key}: {shown}; ratio {ratio:.2f}")
            last = [event for event in two if event["event"] == "train"][-1]
            waits = ", ".join(f"{last[f'wait_s/rank{rank}']:.2f}" for rank in (0, 1))
            print(f"{name}: adding up takes {last['communication_share']:.2%} of a step; ranks waited {waits} s")


if __name__ == "__main__":
    main()
