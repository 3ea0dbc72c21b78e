"""SFT next to mlx_lm's trainer: same weights, rows, LoRA shape and optimiser, alternating in one run.

    python benchmarks/sft_vs_mlx_lm.py --rows alpaca --alternations 5

Each side trains in a process of its own, through its own data path. The first step is not counted. Trained tokens
are the answer's; mlx_lm counts one more a row, which its mask trains by mistake. MLXFT_CPU=off in the environment: ours
with MLX's own kernels, as mlx_lm's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import lengths, median_ratio, report, worker, write_rows

import mlxft  # before mlx: brings the fast BLAS on Linux, for both sides

REFERENCE = "mlx_lm"
SIDES = ("ours", "ours-checkpoint", "mlx_lm", "mlx_lm-checkpoint")
SCENARIOS = {
    "alpaca": ("alpaca", 0.75),
    "prompt-heavy": ("alpaca", 0.10),
    "equal": ("equal", 1.0),
}


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """mlxft.train on the rows."""
    import mlx.core as mx
    from rich.console import Console

    run = mlxft.train(
        {
            "model": {"path": job["model"], "dtype": "float32"},
            "tune": {"rank": 8, "scale": 2.0},
            "data": {"train": job["rows"], "format": "prompt-completion"} | ({"train_on": "all"} if job["all"] else {}),
            "batch": {"rows": 4} if job["by_rows"] else {"tokens": job["tokens"]},
            "optim": {"lr": 1e-4, "schedule": "constant", "warmup": 0, "clip": None, "weight_decay": 0.01},
            "memory": {"checkpoint": "on" if job["checkpoint"] else "off"},
            "run": {"dir": job["dir"], "name": "ours", "steps": job["steps"] + 1, "report_every": 1, "save_every": 999},
        },
        overwrite=True,
        console=Console(quiet=True),
    )
    steps = run.metrics("train")
    seconds = steps[-1]["elapsed_s"] - steps[0]["elapsed_s"]
    return {
        "tokens_per_s": (steps[-1]["trained_tokens"] - steps[0]["trained_tokens"]) / seconds,
        "real_tokens_per_s": (steps[-1]["tokens"] - steps[0]["tokens"]) / seconds,
        "peak_gb": mx.get_peak_memory() / 1e9,
        "loss": sum(s["loss"] for s in steps[-2:]) / 2,
    }


def theirs(job: dict[str, Any]) -> dict[str, Any]:
    """mlx_lm's trainer on the rows."""
    import mlx.core as mx
    import mlx.optimizers as opt
    from mlx_lm import load
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer = load(job["model"])
    mx.reset_peak_memory()
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    data = CacheDataset(CompletionsDataset(rows, tokenizer, "prompt", "completion", mask_prompt=not job["all"]))

    class Watch(TrainingCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.reports: list[tuple[float, float, float]] = []

        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            self.reports.append((time.perf_counter(), train_info["trained_tokens"], train_info["train_loss"]))

    watch = Watch()
    args = TrainingArgs(
        batch_size=4,
        iters=job["steps"] + 1,
        steps_per_report=1,
        steps_per_eval=10**6,
        steps_per_save=10**6,
        adapter_file=str(Path(job["dir"]) / "theirs.safetensors"),
        grad_checkpoint=job["checkpoint"],
    )
    optimizer = opt.AdamW(learning_rate=1e-4, weight_decay=0.01, bias_correction=True)
    train(model, optimizer, data, None, args, training_callback=watch)
    (first, before, _), (last, after, _) = watch.reports[0], watch.reports[-1]
    wrong = 0 if job["all"] else 4 * job["steps"]
    return {
        "tokens_per_s": (after - before - wrong) / (last - first),
        "real_tokens_per_s": float("nan"),
        "peak_gb": mx.get_peak_memory() / 1e9,
        "loss": sum(r[2] for r in watch.reports[-2:]) / 2,
    }


def sides_of(text: str) -> list[str]:
    """Names of sides, one of them mlx_lm."""
    sides = text.split(",")
    if not set(sides) <= set(SIDES) or REFERENCE not in sides or len(sides) < 2:
        raise argparse.ArgumentTypeError(f"{text}: expected {REFERENCE} and others of {', '.join(SIDES)}")
    return sides


def main() -> None:
    """Parse, alternate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=SCENARIOS, default="alpaca")
    parser.add_argument("--model", help="A float32 folder; default: SmolLM2-135M, converted for the occasion.")
    parser.add_argument("--sides", type=sides_of, default=["ours", REFERENCE], help=", ".join(SIDES))
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=900, help="Our budget a batch, padding included.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        print(json.dumps((theirs if job["side"].startswith(REFERENCE) else ours)(job)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = alternate(args, folder)
    rates = {s: [r["tokens_per_s"] for r in found[s]] for s in args.sides}
    peaks = {s: [r["peak_gb"] for r in found[s]] for s in args.sides}
    table = [
        [s, i + 1, r["tokens_per_s"], r["peak_gb"], r["loss"]]
        for i in range(args.alternations)
        for s in args.sides
        for r in [found[s][i]]
    ]
    ratios = {
        s: {"speed": median_ratio(rates[s], rates[REFERENCE]), "peak": median_ratio(peaks[s], peaks[REFERENCE])}
        for s in args.sides
        if s != REFERENCE
    }
    columns = ["side", "alternation", "trained tok/s", "peak GB", "loss"]
    kernels = "-mlx-kernels" if os.environ.get("MLXFT_CPU") == "off" else ""
    report(f"sft_vs_mlx_lm-{args.rows}{kernels}", columns, table, {"ratios": ratios, "arguments": vars(args)})
    for side, ratio in ratios.items():
        print(f"{side}: median {ratio['speed']:.2f}x the speed, {ratio['peak']:.2f}x the peak memory of {REFERENCE}")


def alternate(args: argparse.Namespace, folder: str) -> dict[str, list[dict[str, Any]]]:
    """Results of each side, run in turns and in turned order."""
    kind, share = SCENARIOS[args.rows]
    rows = Path(folder) / "rows.jsonl"
    write_rows(rows, lengths(kind, 400), share if share < 1 else 0.8)
    model = args.model
    if model is None:
        from mlxft.exports.fuse import convert_model

        model = str(Path(folder) / "model")
        convert_model("smollm2-135m", Path(model), dtype="float32")
    job = {"model": model, "rows": str(rows), "dir": folder, "steps": args.steps, "tokens": args.tokens}
    job |= {"by_rows": args.rows == "equal", "all": share == 1}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    for i in range(args.alternations):
        for side in args.sides if i % 2 == 0 else args.sides[::-1]:
            on = side.endswith("-checkpoint")
            found[side].append(worker(__file__, {**job, "side": side, "checkpoint": on}))
            print(side, {k: round(v, 3) for k, v in found[side][-1].items()}, flush=True)
    return found


if __name__ == "__main__":
    main()
