"""Reinforcement learning by GRPO, with a reward that is a Python function, in a loop of your own.

The task: reply to a sum of two digits with the number alone. In a recipe the method is `objective: grpo`, which also
plans memory, splits micro-batches, resumes and reports.

    python examples/rl_loop.py --model smollm2-135m --out adapters/rl
    mlxft generate --model adapters/rl "What is 3 + 4? Reply with the number only."
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import mlxft  # isort: skip  (before MLX: on Linux it loads a fast BLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np


def reward(completion: str, wanted: int) -> float:
    """Return 1 for the right number alone; else the share of characters that are digits, as a fifth: a way to there."""
    digits = sum(character in "0123456789" for character in completion) / max(1, len(completion))
    return 1.0 if completion.strip() == str(wanted) else 0.2 * digits


def padded(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """Return ids (B, T) of prompts with their completions, padded on the right; and mask (B, T), 1 in completions."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), np.int32)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        ids[i, : len(p) + len(c)] = [*p, *c]
        mask[i, len(p) : len(p) + len(c)] = 1
    return mx.array(ids), mx.array(mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id, folder, .gguf file, or smollm2-135m.")
    parser.add_argument("--bits", type=int, help="Quantise the base to this many bits (QLoRA).")
    parser.add_argument("--out", default="adapters/rl", help="Folder of the adapter.")
    parser.add_argument("--steps", type=int, default=20, help="Rollouts.")
    parser.add_argument("--prompts", type=int, default=4, help="Prompts of a rollout.")
    parser.add_argument("--group", type=int, default=8, help="Completions of a prompt, each other's baseline.")
    parser.add_argument("--max-tokens", type=int, default=8, help="Tokens of a completion.")
    parser.add_argument("--epochs", type=int, default=2, help="Updates from one rollout.")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--kl", type=float, default=0.02, help="Weight of KL to the base.")
    parser.add_argument("--clip", type=float, default=0.2, help="The ratio has no gradient beyond 1 +- this.")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # One base in memory is both: with its adapter the policy, without it the reference.
    model = mlxft.load(args.model, quantize=args.bits)
    mlxft.adapt(model, rank=args.rank, alpha=2 * args.rank, seed=args.seed)
    optimizer = optim.AdamW(args.lr, weight_decay=0.0, bias_correction=True)
    rng = np.random.default_rng(args.seed)

    def loss(
        ids: mx.array, mask: mx.array, old: mx.array, reference: mx.array, advantages: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the loss, and the means over tokens of KL and ratio. All arguments are (B, T)."""
        new = mlxft.logprobs(model, ids, mask, temperature=args.temperature)
        policy = mlxft.functional.policy_loss(new, old, advantages, mask, args.clip)
        kl = mlxft.functional.kl(new, reference, "k3").sum() / policy.weight  # 0 outside the mask, where both are 0
        return policy.mean() + args.kl * kl, kl, policy.metrics["ratio_mean"] / policy.weight

    gradient = nn.value_and_grad(model.model, loss)
    for step in range(1, args.steps + 1):
        # 1. Sample a group of completions for each prompt from the policy as it is now.
        sums = rng.integers(0, 10, (args.prompts, 2))
        questions = [f"What is {a} + {b}? Reply with the number only." for a, b in sums]
        groups = mlxft.sample_tokens(
            model,
            questions,
            samples=args.group,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed + step,
        )
        completions = [completion for group in groups for completion in group]  # a group's are neighbours

        # 2. Score them. A completion's advantage is its reward next to those of its group.
        wanted = np.repeat(sums.sum(axis=1), args.group)
        rewards = np.array([reward(c.text, int(number)) for c, number in zip(completions, wanted)])
        advantages = mx.array(mlxft.functional.group_relative(rewards, args.group, "group"))[:, None]

        # 3. Read the same tokens by the policy that sampled and by the reference, which no gradient goes through.
        ids, mask = padded([c.prompt for c in completions], [c.ids for c in completions])
        old = mlxft.logprobs(model, ids, mask, temperature=args.temperature, grad=False)
        reference = mlxft.logprobs(model, ids, mask, temperature=args.temperature, base=True)
        mx.eval(old, reference)

        # 4. Update. In the first epoch the ratio is 1; later the clipped surrogate holds the policy near the old one.
        for _ in range(args.epochs):
            (_, kl, ratio), gradients = gradient(ids, mask, old, reference, mx.broadcast_to(advantages, ids.shape))
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            optimizer.update(model.model, gradients)
            mx.eval(model.model.trainable_parameters(), optimizer.state, kl, ratio)
        right = np.mean([c.text.strip() == str(number) for c, number in zip(completions, wanted)])
        print(
            f"step {step} reward {rewards.mean():.3f} right {right:.2f} kl {kl.item():.4f} ratio {ratio.item():.3f}",
            flush=True,
        )

    print("saved", mlxft.save_adapter(model, args.out, overwrite=True))
    question = "What is 3 + 4? Reply with the number only."
    print(question, mlxft.generate(model, question, max_tokens=args.max_tokens))


if __name__ == "__main__":
    main()
