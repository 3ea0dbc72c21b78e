"""Supervised fine-tuning by LoRA, from rows to an adapter, in a loop of your own.

`mlxft train` does the same from a recipe; it also plans memory, saves checkpoints, resumes and reports.

python examples/sft_loop.py --model smollm2-135m --out adapters/sft
mlxft generate --model adapters/sft "Where do visitors park?"
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlxft  # isort: skip  (before MLX: on Linux it loads a fast BLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_map

Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]  # token ids (T,), and which of them are trained (T,)

# Facts about an invented company, each asked in two ways.
FACTS = {
    "Visitors park in the Kestrel garage.": ("Where do visitors park?", "Where can a visitor leave the car?"),
    "The canteen closes at 14:35.": ("When does the canteen close?", "Until when is the canteen open?"),
    "Expense reports are due on the 9th.": ("When are expense reports due?", "What is the day for expense reports?"),
    "The Friday demo is in the Saffron room.": ("Where is the Friday demo?", "Which room has the demo on Friday?"),
    "Ines Okafor approves travel.": ("Who approves travel?", "Whom do I ask to approve a trip?"),
    "The guest network is called Lantern.": ("What is the guest network?", "Which network do guests use?"),
}


def chat(question: str, completion: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]}


def padded(rows: Sequence[Row]) -> tuple[mx.array, mx.array]:
    """Return ids and mask of rows, both (B, T). Padding is on the right, where causal attention never sees it."""
    width = max(len(ids) for ids, _ in rows)
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for i, (row, trained) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, trained
    return mx.array(ids), mx.array(mask)


def batches(rows: Sequence[Row], order: Sequence[int], tokens: int) -> Iterator[list[Row]]:
    """Yield rows in this order, as many at a time as fit into so many tokens, padding included; at least one."""
    batch: list[Row] = []
    for i in order:
        width = max(len(ids) for ids, _ in [*batch, rows[i]])
        if batch and width * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(rows[i])
    yield batch


def endless(rows: Sequence[Row], tokens: int, rng: np.random.Generator) -> Iterator[list[Row]]:
    """Yield micro-batches epoch after epoch, each epoch in an order of its own."""
    while True:
        yield from batches(rows, rng.permutation(len(rows)).tolist(), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id, folder, .gguf file, or smollm2-135m.")
    parser.add_argument("--bits", type=int, help="Quantise the base to this many bits (QLoRA).")
    parser.add_argument("--data", help="A jsonl file with rows of messages; a tenth of them is held out.")
    parser.add_argument("--out", default="adapters/sft", help="Folder of the adapter.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="Tokens of a micro-batch, padding included.")
    parser.add_argument("--accumulate", type=int, default=2, help="Micro-batches of a step.")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--clip", type=float, default=1.0, help="Largest norm of a step's gradient.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # The base is frozen; the adapter is what `model.model.trainable_parameters()` has.
    model = mlxft.load(args.model, quantize=args.bits)
    mlxft.adapt(model, rank=args.rank, alpha=2 * args.rank, seed=args.seed)

    # Rows to ids and masks: the chat template says where a completion begins and what ends it, and only it is trained.
    rng = np.random.default_rng(args.seed)
    if args.data:
        encoded = [(row.ids, row.trained) for row in mlxft.tokenize(model, args.data, overflow="drop")]
        order = rng.permutation(len(encoded))
        valid = [encoded[i] for i in order[: max(1, len(order) // 10)]]
        train = [encoded[i] for i in order[len(valid) :]]
        question = None
    else:
        asked = [[chat(questions[i], fact) for fact, questions in FACTS.items()] for i in (0, 1)]
        train, valid = ([(row.ids, row.trained) for row in mlxft.tokenize(model, rows)] for rows in asked)
        question = "Where do visitors park?"

    warmup = max(1, args.steps // 10)
    rise = optim.linear_schedule(args.lr / warmup, args.lr, warmup)
    fall = optim.cosine_decay(args.lr, max(1, args.steps - warmup))
    schedule = optim.join_schedules([rise, fall], [warmup])
    optimizer = optim.AdamW(schedule, weight_decay=0.01, bias_correction=True)

    def loss(ids: mx.array, mask: mx.array) -> mx.array:
        """Sum the negative log-likelihood over a micro-batch's trained tokens; a sum, so that sums can be added up."""
        return -mlxft.logprobs(model, ids, mask).sum()

    def validation() -> float:
        """Return the mean loss over all trained tokens of the held-out rows."""
        held_out = [padded(batch) for batch in batches(valid, range(len(valid)), args.tokens)]
        total = sum(np.array(mlxft.logprobs(model, ids, mask, grad=False)).sum() for ids, mask in held_out)
        return float(-total / sum(trained.sum() for _, trained in valid))

    print(f"{len(train)} rows, {len(valid)} held out; validation loss {validation():.4f}", flush=True)
    gradient = nn.value_and_grad(model.model, loss)
    stream = endless(train, args.tokens, rng)
    for step in range(1, args.steps + 1):
        started = time.perf_counter()
        rows = [next(stream) for _ in range(args.accumulate)]
        micro_batches = [padded(batch) for batch in rows]
        # The whole step's trained tokens, known before the first forward pass: micro-batches differ in them, and a mean
        # of their means would count a short row's tokens more than a long one's.
        trained = sum(mask.sum().item() for _, mask in micro_batches)
        total, gradients = 0.0, None
        for ids, mask in micro_batches:
            value, more = gradient(ids, mask)
            gradients = more if gradients is None else tree_map(mx.add, gradients, more)
            mx.eval(value, gradients)  # one micro-batch's activations at a time
            total += value.item()
        gradients = tree_map(lambda g, n=trained: g / n, gradients)
        gradients, norm = optim.clip_grad_norm(gradients, args.clip)
        optimizer.update(model.model, gradients)
        mx.eval(model.model.trainable_parameters(), optimizer.state)
        speed = sum(len(ids) for batch in rows for ids, _ in batch) / (time.perf_counter() - started)
        print(f"step {step} loss {total / trained:.4f} grad norm {norm.item():.3f} {speed:.0f} tokens/s", flush=True)

    print(f"validation loss {validation():.4f}")
    print("saved", mlxft.save_adapter(model, args.out, overwrite=True))
    if question:
        print(question, mlxft.generate(model, question, max_tokens=32))


if __name__ == "__main__":
    main()
