"""Tokens sampled a second in a batch: mlxft's `sample_batch` and mlx_lm's `batch_generate`, on the same prompts.

python benchmarks/sampling.py [--model smollm2-135m] [--prompts 16] [--tokens 64] [--rounds 5]
                              [--lengths equal alpaca] [--temperatures 0 1]
Both sides decode exactly --tokens tokens a prompt (no token ends an answer) and take turns in one process; each has one
round that is not counted. Seconds are of the whole call, prompts included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import WORDS, lengths, median_ratio, report


def sides(loaded: Any, prompts: list[list[int]], tokens: int, temperature: float) -> dict[str, Callable[[int], int]]:
    """Name -> what samples once, by a seed, and says how many tokens came."""
    from mlx_lm import batch_generate
    from mlx_lm.sample_utils import make_sampler

    from mlxft.model.sampling import Sampling, sample_batch

    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.eos_token_ids = ()  # of batch_generate, which has no setting for it
    how = Sampling(tokens, temperature, stop_at_eos=False)

    def ours(seed: int) -> int:
        found = sample_batch(model, tokenizer, prompts, how, seed=seed, rows=len(prompts))
        return sum(len(answer.ids) for answers in found for answer in answers)

    def theirs(seed: int) -> int:
        sampler = make_sampler(temp=temperature)
        found = batch_generate(
            model,
            tokenizer,
            prompts,
            max_tokens=tokens,
            sampler=sampler,
            return_token_ids=True,
            prefill_batch_size=len(prompts),
            completion_batch_size=len(prompts),
        )
        return sum(len(ids) for ids in found.token_ids)

    return {"mlxft": ours, "mlx_lm": theirs}


def main() -> None:
    """Greedy and sampled, prompts of one length and of many."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", nargs="+", default=["equal", "alpaca"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    args = parser.parse_args()

    from mlxft.model.load import load

    loaded = load(args.model, dtype="float32")
    loaded.model.eval()
    rng = np.random.default_rng(0)
    rows: list[list[Any]] = []
    for kind in args.lengths:
        sizes = [size // 4 for size in lengths(kind, args.prompts)]
        prompts = [loaded.tokenizer.encode(" ".join(rng.choice(WORDS, size))) for size in sizes]
        for temperature in args.temperatures:
            seconds: dict[str, list[float]] = {}
            for turn in range(args.rounds + 1):
                for name, sample in sides(loaded, prompts, args.tokens, temperature).items():
                    began = time.perf_counter()
                    count = sample(turn)
                    if count != args.prompts * args.tokens:
                        raise SystemExit(f"{name} gave {count} tokens")
                    if turn:
                        seconds.setdefault(name, []).append(time.perf_counter() - began)
            rates = [args.prompts * args.tokens / statistics.median(seconds[name]) for name in ("mlxft", "mlx_lm")]
            rows.append([kind, temperature, *rates, median_ratio(seconds["mlx_lm"], seconds["mlxft"])])
    columns = ["prompts", "temperature", "mlxft tokens/s", "mlx_lm tokens/s", "ratio"]
    report("sampling", columns, rows, {"settings": vars(args)})


if __name__ == "__main__":
    main()
