"""Tokens a second of episodes: many side by side with kept KV caches, and one after the other.

python benchmarks/episodes.py [--model smollm2-135m] [--episodes 64] [--turns 4] [--tokens 16]
Each turn has exactly --tokens tokens of the policy, and each observation a dozen. Seconds are of the whole call.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import mlxft
from mlxft.config import hand_over
from mlxft.data.dataset import encode_prompt
from mlxft.model.load import load
from mlxft.model.sampling import Sampling
from mlxft.objectives.episodes import EncodedPrompt, EnvironmentSettings, Episodes


class Talks:
    """Replies with a short text, without end."""

    def reset(self, row: dict[str, Any], seed: int) -> None:
        self.turns = 0

    def step(self, turn: mlxft.Turn) -> mlxft.Observation:
        self.turns += 1
        return mlxft.Observation("Why is that so? " * self.turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    for name, default in (("episodes", 64), ("turns", 4), ("tokens", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    loaded = load(args.model)
    path = hand_over("environment.path", "Talks", Talks)
    found = Episodes(EnvironmentSettings(path=path, turns=args.turns), loaded.tokenizer, True, True)
    texts = [f"What do you think of the number {i}?" for i in range(args.episodes)]
    asked = [np.array(encode_prompt(text, loaded.tokenizer), np.int32) for text in texts]
    prompts = [EncodedPrompt(ids, text, {}, text, text) for ids, text in zip(asked, texts)]
    how, speeds = Sampling(args.tokens, 1.0, stop_at_eos=False), {}
    for rows in (args.episodes, 1):
        began = time.perf_counter()
        played = found.play(loaded.model, prompts, how, most=4096, seed=0, rows=rows)
        tokens = sum(sum(episode.own) for episode in played)
        speeds[rows] = tokens / (time.perf_counter() - began)
        print(f"{rows} at a time: {tokens:,} tokens of the policy, {speeds[rows]:,.1f} a second")
    print(f"ratio: {speeds[args.episodes] / speeds[1]:.2f}")


if __name__ == "__main__":
    main()
