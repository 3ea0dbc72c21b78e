"""Predicted against measured peak memory: four model shapes x lora, qlora, full x two lengths, and checkpointing.

    python benchmarks/plan.py

Each configuration trains two steps in a process of its own, on rows of one length, by the recipe that the plan was
made from; the plan reads config.json only. --tight makes MLX wait for memory at each operation, as it does near a
limit, and compares with what the plan says is needed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import WORDS, make_model, report, worker

BASE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 5, "intermediate_size": 768, "vocab_size": 4000},
    "qwen3": {
        "num_hidden_layers": 4,
        "intermediate_size": 640,
        "num_attention_heads": 8,
        "vocab_size": 8000,
        "tie_word_embeddings": False,
    },
    "gemma2": {
        "num_hidden_layers": 3,
        "intermediate_size": 1024,
        "vocab_size": 6000,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "mixtral": {
        "num_hidden_layers": 3,
        "intermediate_size": 384,
        "vocab_size": 4000,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"tune": {"method": "lora", "rank": 8}},
    "qlora": {"tune": {"method": "lora", "rank": 8}, "quantize": 4},
    "full": {"tune": {"method": "full"}},
}
BATCHES = ((8, 96), (2, 512))
TOLERANCE = 0.10


def make_folder(folder: Path, kind: str) -> None:
    """One of the shapes, as a folder."""
    make_model(folder, {"model_type": kind, **BASE, **SHAPES[kind]})


def recipe(job: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a job; its rows are half prompt, half answer."""
    method = METHODS[job["method"]]
    model = {"path": job["model"], "dtype": "float32"}
    if "quantize" in method:
        model["quantize"] = method["quantize"]
    return {
        "model": model,
        "tune": method["tune"],
        "data": {"train": job["data"], "format": "prompt-completion", "template": "none", "cache": False},
        "batch": {"rows": job["rows"]},
        "memory": {"checkpoint": job["checkpoint"]},
        "run": {"dir": job["dir"], "name": "run", "steps": 2, "report_every": 1},
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Predict, then train."""
    import mlx.core as mx
    from rich.console import Console

    import mlxft
    from mlxft.build import base_skeleton, make_objective, plan_batches
    from mlxft.model import layers
    from mlxft.model.load import load_tokenizer
    from mlxft.run import as_config

    config = as_config(recipe(job))
    shapes = make_objective(config, load_tokenizer(job["model"])).shapes()
    began = time.perf_counter()
    plan, rows, width = plan_batches(config, base_skeleton(config), shapes)
    seconds = time.perf_counter() - began
    untouched = mx.get_peak_memory()
    if job["tight"]:
        setattr(layers, "usable_bytes", lambda limit_gb=None: 1 if limit_gb is None else int(limit_gb * 1e9))  # noqa: B010
    run = mlxft.train(config, overwrite=True, console=Console(quiet=True))
    measured = max(e["peak_memory_gb"] for e in run.metrics("train")) * 1e9
    return {
        "rows": rows,
        "width": width,
        "predicted": plan.needed if job["tight"] else plan.total,
        "measured": measured,
        "plan_s": seconds,
        "plan_peak": untouched,
    }


def write_rows(path: Path, rows: int, width: int) -> None:
    """Rows of `width` tokens, the last one the end of text."""
    rng = np.random.default_rng(0)
    with path.open("w") as f:
        for _ in range(2 * rows):
            row = {"prompt": " ".join(rng.choice(WORDS, width // 2)), "completion": ""}
            row["completion"] = " " + " ".join(rng.choice(WORDS, width - width // 2 - 1))
            f.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker")
    parser.add_argument("--tight", action="store_true")
    parser.add_argument("--only", choices=SHAPES, help="one model shape")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    table: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as tmp:
        for kind in [args.only] if args.only else SHAPES:
            model = Path(tmp) / kind
            make_folder(model, kind)
            jobs = [(m, r, w, "off") for m in METHODS for r, w in BATCHES]
            for method, rows, width, checkpoint in [*jobs, ("lora", *BATCHES[1], "on"), ("full", *BATCHES[1], "on")]:
                data = Path(tmp) / f"{rows}-{width}.jsonl"
                write_rows(data, rows, width)
                job = {
                    "model": str(model),
                    "method": method,
                    "data": str(data),
                    "rows": rows,
                    "dir": tmp,
                    "tight": args.tight,
                }
                r = worker(__file__, {**job, "checkpoint": checkpoint})
                error = r["predicted"] / r["measured"] - 1
                found = [r["predicted"] / 1e6, r["measured"] / 1e6, round(100 * error, 2), r["plan_s"]]
                table.append([kind, method, r["rows"], r["width"], checkpoint, *found])
                print(*table[-1], flush=True)
    errors = [row[7] / 100 for row in table if row[4] == "off"]
    good = sum(abs(e) <= TOLERANCE for e in errors)
    lowest = min(row[7] for row in table)
    print(f"within {TOLERANCE:.0%}: {good} of {len(errors)} (without checkpointing); lowest {lowest:.1f} %")
    columns = ["model", "method", "rows", "width", "checkpoint", "predicted MB", "measured MB", "error %", "plan s"]
    report(
        "plan-tight" if args.tight else "plan",
        columns,
        table,
        {"within_tolerance": good, "of": len(errors), "lowest_percent": lowest},
    )


if __name__ == "__main__":
    main()
