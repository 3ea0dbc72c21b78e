"""Peak memory of one LoRA step against length and vocabulary, next to mlx_lm's, on a random qwen3-like model.

    python benchmarks/memory.py                      # small, a few minutes
    python benchmarks/memory.py --qwen3-0.6b         # 28 layers, width 1024, vocabulary 151,936, 8 x 256 tokens

Half of the tokens are trained; weights are float32; LoRA of rank 8 is on every linear layer of every block. mlx_lm's
step is its trainer's: full logits for every position, compiled. Peak memory includes the weights.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from common import report, worker

import mlxft  # before mlx: brings the fast BLAS on Linux

assert mlxft


def build(job: dict[str, Any]) -> Any:
    """The random model, evaluated."""
    import mlx.core as mx
    from mlx_lm.models import qwen3

    d = job["width"]
    args = qwen3.ModelArgs(
        model_type="qwen3",
        hidden_size=d,
        num_hidden_layers=job["layers"],
        intermediate_size=3 * d,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=d // 8,
        rms_norm_eps=1e-6,
        vocab_size=job["vocabulary"],
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    mx.random.seed(0)
    model = qwen3.Model(args)
    mx.eval(model.parameters())
    return model


def ours(job: dict[str, Any]) -> None:
    """One step as the loop does it."""
    import mlx.core as mx

    from mlxft.config import OptimSettings
    from mlxft.model.adapters import LoRASpec, attach, select_targets
    from mlxft.model.cpu import quicker
    from mlxft.model.layers import checkpoint_layers
    from mlxft.model.logits import Split, rows_nll
    from mlxft.trainer.optim import Optimizer

    model = build(job)
    attach(model, LoRASpec(tuple(select_targets(model, "all-linear", "all")), 8, 2.0))
    checkpoint_layers(model, job["checkpoint"])
    model.train()
    split, optimizer = Split(model), Optimizer(OptimSettings(), model)
    rows, length = job["rows"], job["length"]
    ids = mx.random.randint(0, job["vocabulary"], (rows, length))
    positions = mx.arange(0, rows * length, 2)
    labels = mx.random.randint(0, job["vocabulary"], positions.shape)
    weights = mx.ones(positions.shape)
    mx.eval(model.parameters(), ids, positions, labels, weights)
    mx.reset_peak_memory()

    def loss(params: Any) -> mx.array:
        model.update(params)
        return rows_nll(split, ids, positions, labels, weights, grad=True)

    for _ in range(2):
        params = model.trainable_parameters()
        with quicker(model):
            sums, grads = mx.value_and_grad(loss)(params)
        model.update(params)
        del params
        mx.async_eval(sums, grads)  # type: ignore[no-untyped-call]
        mx.eval(optimizer.step(model, grads, weights.sum(), 1e-4))
        mx.eval(model.trainable_parameters(), optimizer.arrays())
        del grads


def theirs(job: dict[str, Any]) -> None:
    """One step as mlx_lm's trainer does it."""
    from functools import partial

    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as opt
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = build(job)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    model.train()
    if job["checkpoint"]:
        grad_checkpoint(model.layers[0])
    optimizer = opt.AdamW(learning_rate=1e-4)
    batch = mx.random.randint(0, job["vocabulary"], (job["rows"], job["length"] + 1))
    lengths = mx.array([[job["length"] // 2, job["length"]]] * job["rows"])
    mx.eval(model.parameters(), batch)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, lengths: mx.array) -> Any:
        (value, _), grad = nn.value_and_grad(model, default_loss)(model, batch, lengths)
        optimizer.update(model, grad)
        return value

    mx.reset_peak_memory()
    for _ in range(2):
        mx.eval(step(batch, lengths), state)


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qwen3-0.6b", dest="real", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import mlx.core as mx

        job = json.loads(args.worker)
        (ours if job["side"] == "ours" else theirs)(job)
        print(json.dumps({"peak_gb": mx.get_peak_memory() / 1e9}))
        return
    small = {"layers": 4, "width": 256, "rows": 4}
    jobs: list[dict[str, Any]] = [{**small, "length": n, "vocabulary": 8192} for n in (128, 256, 512, 1024)]
    jobs += [{**small, "length": 256, "vocabulary": v} for v in (2048, 32768, 131072)]
    if args.real:
        jobs = [{"layers": 28, "width": 1024, "rows": 8, "length": 256, "vocabulary": 151936}]
    table = []
    for job in jobs:
        for on in (False, True):
            peaks = [worker(__file__, {**job, "side": s, "checkpoint": on})["peak_gb"] for s in ("ours", "theirs")]
            table.append([job["length"], job["vocabulary"], "on" if on else "off", *peaks, peaks[0] / peaks[1]])
            print(*table[-1], flush=True)
    columns = ["length", "vocabulary", "checkpointing", "ours GB", "mlx_lm GB", "ratio"]
    report("memory-qwen3-0.6b" if args.real else "memory", columns, table, {})


if __name__ == "__main__":
    main()
