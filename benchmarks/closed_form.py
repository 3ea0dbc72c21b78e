"""On-policy training on a task whose optimum is known: how near it comes, and how long it takes.

python benchmarks/closed_form.py [--methods ppo rloo grpo] [--costs .02 .05 .10] [--seeds 0 1 2]
A uniform policy over 32 tokens writes 8 of them; the score is the share of one token, and a nat of KL costs b. With
a = 1 / (8 b) the best policy takes that token with p* = e^a / (e^a + 31) at each place, and its score less b KL is
J* = 8 b ln((31 + e^a) / 32). 150 rollouts of 128, four passes over each, in full; of the last 30 the means. Each run is
a process of its own, and its seconds include the start.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import TINY, make_model, report

ROLLOUTS, LAST, PASSES, PLACES, TOKENS = 150, 30, 4, 8, 32
LLAMA = {"model_type": "llama", "vocab_size": TOKENS, **TINY}
OWN: dict[str, dict[str, Any]] = {"ppo": {}, "rloo": {}, "grpo": {"scale": "none"}}
REWARDS = """
def score(prompts, completions, rows):
    return [text.split().count("time") / 8 for text in completions]
"""


def optimum(cost: float) -> tuple[float, float, float]:
    """J, score and KL of the best policy."""
    e = math.exp(1 / (PLACES * cost))
    p = e / (e + TOKENS - 1)
    kl = PLACES * (p * math.log(TOKENS * p) + (1 - p) * math.log(TOKENS * (1 - p) / (TOKENS - 1)))
    return p - cost * kl, p, kl


def uniform(folder: Path) -> None:
    """A model all of whose next tokens are equally likely, with its prompts and rewards."""
    make_model(folder / "model", LLAMA)
    import mlx.core as mx

    file = str(folder / "model" / "model.safetensors")
    held = mx.load(file)
    assert isinstance(held, dict)
    weights = {name: mx.zeros_like(v) if name.startswith("lm_head") else v for name, v in held.items()}
    mx.save_safetensors(file, weights, {"format": "mlx"})
    (folder / "prompts.jsonl").write_text('{"prompt": "year"}\n{"prompt": "year people"}\n' * 64)
    (folder / "rewards.py").write_text(REWARDS)


def run(folder: Path, method: str, cost: float, seed: int) -> list[Any]:
    """One row of the table."""
    samples = 1 if method == "ppo" else 8
    recipe = {
        "objective": method,
        "model": {"path": "model", "dtype": "float32"},
        "tune": {"method": "full"},
        "data": {"train": "prompts.jsonl", "format": "prompts", "template": "none", "max_length": 32},
        "rollout": {
            "prompts": 128 // samples,
            "samples": samples,
            "max_tokens": PLACES,
            "stop_at_eos": False,
            "rows": 128,
        },
        "rewards": {"function": "rewards.py:score"},
        method: {"kl_coef": cost, "epochs": PASSES, **OWN[method]},
        "batch": {"tokens": 8192},
        "optim": {"name": "adam", "lr": 1e-3, "schedule": "linear", "warmup": 0},
        "run": {"name": "a", "steps": PASSES * ROLLOUTS, "seed": seed, "report_every": 100, "save_every": 10_000},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    began = time.perf_counter()
    command = [sys.executable, "-m", "mlxft", "train", "recipe.yaml", "--overwrite"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    events = map(json.loads, (folder / "runs" / "a" / "metrics.jsonl").read_text().splitlines())
    last = [event for event in events if event["event"] == "rollout"][-LAST:]
    score, kl = (float(np.mean([event[name] for event in last])) for name in ("reward", "kl"))
    best, share, far = optimum(cost)
    return [method, cost, seed, (score - cost * kl) / best - 1, score / share - 1, kl / far - 1, seconds]


def main() -> None:
    """Every method at every cost with every seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", choices=sorted(OWN), default=list(OWN))
    parser.add_argument("--costs", nargs="+", type=float, default=[0.02, 0.05, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        uniform(folder)
        rows = [run(folder, m, c, s) for m in args.methods for c in args.costs for s in args.seeds]
    report("closed-form", ["method", "b", "seed", "J off by", "score off by", "KL off by", "seconds"], rows, {})


if __name__ == "__main__":
    main()
