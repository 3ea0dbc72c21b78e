"""What the loop costs beside the device's step: pulling and padding batches, building graphs, reporting.

    python benchmarks/overhead.py

The loop trains by a real SFT objective. The bare side takes the same batches through the same loss, gradient, clipping
and AdamW, and counts only the time that MLX takes to evaluate them: the graphs are built before the clock starts. Both
alternate in one process, on two copies of the model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from common import median_ratio, report
from plan import make_folder, write_rows

ROWS, WIDTH = 4, 48


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """The recipe of both sides."""
    return {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "format": "prompt-completion",
            "template": "none",
            "cache": False,
        },
        "batch": {"rows": ROWS},
        "optim": {"schedule": "constant", "warmup": 0},
        "run": {"dir": str(folder), "name": "run", "steps": steps},
    }


class Side:
    """A model with its objective."""

    def __init__(self, config: Any) -> None:
        import mlx.core as mx

        from mlxft.build import load_base, make_objective, prepare

        self.config = config
        loaded = load_base(config)
        self.model = loaded.model
        self.objective = make_objective(config, loaded.tokenizer)
        prepare(config, loaded)
        self.objective.prepare(loaded.model)
        mx.eval(loaded.model.parameters())


class Looped(Side):
    """Steps by the loop."""

    def __init__(self, config: Any) -> None:
        from mlxft.trainer.optim import Optimizer

        super().__init__(config)
        self.optimizer = Optimizer(config.optim, self.model)

    def seconds(self, steps: int) -> float:
        """Of `steps` steps, as the loop reports them."""
        from mlxft.trainer.loop import Hooks, Loop, Progress

        events: list[dict[str, Any]] = []
        hooks = Hooks(events.append, lambda p: None, lambda p: None, lambda p: None)
        Loop(self.model, self.objective, self.optimizer, self.config, steps, Progress(), hooks).run()
        return float(events[-1]["elapsed_s"])


class Bare(Side):
    """The device's part of the same steps."""

    def __init__(self, config: Any) -> None:
        from mlx.optimizers import AdamW

        super().__init__(config)
        self.steps = self.objective.steps(self.model)
        self.optimizer = AdamW(config.optim.lr, bias_correction=True)
        self.optimizer.init(self.model.trainable_parameters())

    def seconds(self, steps: int) -> float:
        """That MLX takes to evaluate `steps` steps."""
        import mlx.core as mx
        from mlx.optimizers import clip_grad_norm
        from mlx.utils import tree_map

        from mlxft.model.cpu import quicker
        from mlxft.objectives.base import arrays_of

        self.model.train()
        spent = 0.0
        for step in islice(self.steps, steps):
            (batch,) = step.micro_batches

            def loss(params: Any, batch: Any = batch) -> Any:
                self.model.update(params)
                return self.objective.loss(self.model, batch.data).losses["nll"]

            params = self.model.trainable_parameters()
            with quicker(self.model):
                sums, grads = mx.value_and_grad(loss)(params)
            self.model.update(params)
            mx.eval(arrays_of(batch.data))
            began = time.perf_counter()
            mx.eval(sums, grads)
            spent += time.perf_counter() - began
            grads = tree_map(lambda g, w=batch.trained_tokens: g / w, grads)
            clipped, norm = clip_grad_norm(grads, self.config.optim.clip or 1.0)
            self.optimizer.update(self.model, clipped)
            began = time.perf_counter()
            mx.eval(norm, self.model.trainable_parameters(), self.optimizer.state)
            spent += time.perf_counter() - began
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alternations", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="in each turn")
    args = parser.parse_args()
    import mlxft
    from mlxft.run import as_config

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        make_folder(folder / "model", "llama")
        write_rows(folder / "rows.jsonl", ROWS * args.steps, WIDTH)
        config = as_config(settings(folder, args.steps))
        sides: dict[str, Looped | Bare] = {"loop": Looped(config), "bare": Bare(config)}
        for side in sides.values():
            side.seconds(2)
        found: dict[str, list[float]] = {"loop": [], "bare": []}
        for turn in range(args.alternations):
            for name in sorted(sides, reverse=bool(turn % 2)):
                found[name].append(1000 * sides[name].seconds(args.steps) / args.steps)
    rows = [[name, statistics.median(v), min(v), max(v)] for name, v in found.items()]
    share = median_ratio(found["loop"], found["bare"]) - 1
    print(f"mlxft {mlxft.__version__}: the loop adds {share:.1%} to the device's step (median of the alternations)")
    report("overhead", ["side", "ms a step, median", "least", "most"], rows, {"overhead": share, "turns": found})


if __name__ == "__main__":
    main()
