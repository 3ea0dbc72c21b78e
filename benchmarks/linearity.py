"""Time and memory against the number of rows: four times the rows in one batch, with checkpointing and without.

python benchmarks/linearity.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import median_ratio, report, worker
from plan import SHAPES, make_folder, write_rows

WIDTH, FEW, MANY = 128, 2, 8
LAYERS = 24  # what checkpointing keeps of each layer is its input: with few layers the part of one at work hides it


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak bytes of steps with few rows and with many, in turns."""
    import mlxft  # noqa: F401  isort: skip - before MLX, for its BLAS
    import mlx.core as mx

    from mlxft.build import load_base, make_objective, prepare
    from mlxft.model.cpu import quicker
    from mlxft.model.layers import checkpoint_layers
    from mlxft.objectives.base import arrays_of
    from mlxft.run import as_config

    recipe = {
        "model": {"path": job["model"], "dtype": "float32"},
        "data": {"train": job["data"], "format": "prompt-completion", "template": "none", "cache": False},
    }
    configs = [as_config({**recipe, "batch": {"rows": rows}}) for rows in (FEW, MANY)]
    loaded = load_base(configs[0])
    prepare(configs[0], loaded)
    model = loaded.model
    objectives = [make_objective(config, loaded.tokenizer) for config in configs]
    batches = [next(objective.steps(model)).micro_batches[0] for objective in objectives]
    checkpoint_layers(model, job["checkpoint"])
    model.train()
    mx.eval(model.parameters(), [arrays_of(b.data) for b in batches])

    def step(which: int) -> tuple[float, int]:
        def loss(params: Any) -> Any:
            model.update(params)
            return objectives[which].loss(model, batches[which].data).losses["nll"]

        params = model.trainable_parameters()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        with quicker(model):
            result = mx.value_and_grad(loss)(params)
        model.update(params)
        mx.eval(result)
        return time.perf_counter() - began, mx.get_peak_memory() - before

    for which in (0, 1):
        step(which)
    turns = [[step(which) for which in (0, 1)] for _ in range(job["alternations"])]
    return {
        "seconds": [[t[which][0] for t in turns] for which in (0, 1)],
        "peaks": [statistics.median(t[which][1] for t in turns) for which in (0, 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker")
    parser.add_argument("--alternations", type=int, default=5)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    table: list[list[Any]] = []
    growth: dict[bool, float] = {}
    ratios: dict[bool, float] = {}
    SHAPES["llama"]["num_hidden_layers"] = LAYERS
    with tempfile.TemporaryDirectory() as tmp:
        model, data = Path(tmp) / "model", Path(tmp) / "rows.jsonl"
        make_folder(model, "llama")
        write_rows(data, MANY, WIDTH)
        for checkpoint in (False, True):
            job = {"model": str(model), "data": str(data), "alternations": args.alternations, "checkpoint": checkpoint}
            r = worker(__file__, job)
            few, many = r["seconds"]
            ratios[checkpoint] = median_ratio(many, few)
            growth[checkpoint] = (r["peaks"][1] - r["peaks"][0]) / ((MANY - FEW) * WIDTH)
            seconds = [1000 * statistics.median(s) for s in (few, many)]
            peaks = [p / 1e6 for p in r["peaks"]]
            name = "on" if checkpoint else "off"
            table.append([name, *seconds, ratios[checkpoint], *peaks, growth[checkpoint] / 1e3])
    share = growth[True] / growth[False]
    print(f"{MANY // FEW}x the rows take {ratios[False]:.2f}x the time, {ratios[True]:.2f}x with checkpointing")
    print(f"memory a token with checkpointing: {share:.1%} of what it is without")
    few_name, many_name = f"{FEW} x {WIDTH}", f"{MANY} x {WIDTH}"
    columns = ["checkpointing", f"ms, {few_name}", f"ms, {many_name}", "ratio"]
    columns += [f"MB, {few_name}", f"MB, {many_name}", "kB a token"]
    report("linearity", columns, table, {"time_ratio": ratios[False], "memory_share": share})


if __name__ == "__main__":
    main()
