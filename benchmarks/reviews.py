"""Reviews as judgements: a reward model from pairs of them, and PPO by it; end to end through the command.

python benchmarks/reviews.py reward DATA [KEY=VALUE ...]    trains the reward model
python benchmarks/reviews.py score DATA                     measures it on the test reviews
python benchmarks/reviews.py ppo DATA [KEY=VALUE ...]       SFT on short reviews, PPO from there, before and after
DATA is a folder with reviews-train.jsonl and reviews-test.jsonl: {"review", "label": "great" or "other"}. Settings are
those of the reward run or of PPO's. Everything is written to runs/reviews. No model is trained on a test review.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import report

PLACE = Path("runs/reviews")
TOPIC = "Food review:"
OPENING, HELD_OUT = 4, 200  # words of an opening; openings that are held out
SMOLLM2 = ["model.path=smollm2-135m", "data.template=none", f"run.dir={PLACE}"]
REWARD = [
    "objective=reward",
    "data.format=preference",
    "data.valid=0.05",
    "data.max_length=384",
    "data.overflow=drop",
    "tune.rank=16",
    "reward.label_smoothing=0.05",
    "optim.lr=3e-4",
    "optim.warmup=0.05",
    "run.name=reward",
    "run.epochs=2",
]
SFT = [
    "data.format=prompt-completion",
    "optim.lr=5e-4",
    "batch.tokens=1024",
    "run.name=sft",
    "run.epochs=1",
]
PPO = [
    "objective=ppo",
    "data.format=prompts",
    f"model.adapter={PLACE}/sft",
    f"rewards.adapter={PLACE}/reward",
    "rewards.normalize=true",
    "rollout.prompts=64",
    "rollout.max_tokens=32",
    "ppo.critic=shared",
    "ppo.epochs=1",
    "ppo.minibatches=2",
    "ppo.lam=1.0",
    "ppo.kl_coef=0.05",
    "optim.lr=7e-4",
    "optim.schedule=linear",
    "optim.warmup=0",
    "run.name=ppo",
    "run.steps=60",
    "run.eval_every=20",
    "run.eval_at_start=true",
    "run.report_every=4",
]


def reviews(data: Path, split: str) -> list[tuple[str, bool]]:
    """Texts, and whether each is a great one."""
    rows = [json.loads(line) for line in (data / f"reviews-{split}.jsonl").read_text("utf-8").splitlines()]
    return [(row["review"], row["label"] == "great") for row in rows]


def write(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """A file of rows."""
    PLACE.mkdir(parents=True, exist_ok=True)
    file = PLACE / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def mlxft(*arguments: str) -> str:
    """Run the command; what it prints."""
    done = subprocess.run([sys.executable, "-m", "mlxft", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mlxft {arguments[0]} ended with {done.returncode}")
    return done.stdout


def train(name: str, *settings: str) -> None:
    """Train by settings alone."""
    recipe = PLACE / f"{name}.yaml"
    recipe.write_text("{}\n", "utf-8")
    sys.stdout.write(mlxft("train", str(recipe), *SMOLLM2, *settings, "--overwrite"))


def pairs_of(found: Sequence[tuple[str, bool]]) -> list[dict[str, str]]:
    """Each great review once, preferred to one of the others of like length that was taken the fewest times."""
    draw = random.Random(0)
    others = [text for text, great in found if not great]
    taken = dict.fromkeys(others, 0)
    greats = [text for text, great in found if great]
    draw.shuffle(greats)
    pairs = []
    for text in greats:

        def apart(other: str, size: int = len(text)) -> float:
            return abs(len(other) - size) / (20 + size) + taken[other] / 2 + draw.random() / 1000

        other = min(others, key=apart)
        taken[other] += 1
        pairs.append({"prompt": TOPIC, "chosen": f" {text}", "rejected": f" {other}"})
    draw.shuffle(pairs)
    return pairs


def of_all_pairs(great: Any, other: Any) -> dict[str, float]:
    """How often a great review scores above another one, over every such pair, and how well the model knows it."""
    apart = np.subtract.outer(great, other).ravel()
    right = (apart > 0) + 0.5 * (apart == 0)
    sure = 1 / (1 + np.exp(-np.abs(apart)))
    bins = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    ece = sum(abs((right - sure)[bins == b].sum()) for b in range(10)) / len(apart)
    return {"pairs": len(apart), "accuracy": float(right.mean()), "ece": float(ece)}


def reward(data: Path, settings: Sequence[str]) -> None:
    """Train the reward model."""
    train("reward", *REWARD, f"data.train={write('pairs', pairs_of(reviews(data, 'train')))}", *settings)


def score(data: Path) -> None:
    """Score the test reviews: by the run, by its adapter alone, and each review in a batch of its own."""
    test = reviews(data, "test")
    rows = write("test", [{"prompt": TOPIC, "completion": f" {text}"} for text, _ in test])
    scores, again, alone = (
        np.array([json.loads(line)["score"] for line in mlxft("score", *asked, "--json").splitlines()[:-1]])
        for asked in (
            (str(PLACE / "reward"), rows),
            (str(PLACE / "reward" / "adapter"), rows),
            (str(PLACE / "reward"), rows, "--tokens", "1"),
        )
    )
    great = np.array([great for _, great in test])
    found = of_all_pairs(scores[great], scores[~great]) | {
        "by the adapter": float(np.abs(scores - again).max()),
        "scored alone": float(np.abs(scores - alone).max()),
        "minutes": events("reward", "train")[-1]["elapsed_s"] / 60,
    }
    report("reviews-reward", list(found), [list(found.values())], {"settings": REWARD})


def events(run: str, kind: str) -> list[dict[str, Any]]:
    """Of a run's metrics."""
    lines = (PLACE / run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def ppo(data: Path, settings: Sequence[str]) -> None:
    """SFT on short reviews, PPO from there, and both on openings of the test reviews."""
    from mlxft.demo.rlhf import distinct2

    short = [" ".join(t.split()) for t, _ in reviews(data, "train") if 8 <= len(t.split()) <= 45]
    parts = [(" ".join(t.split()[:OPENING]), " ".join(t.split()[OPENING:])) for t in short]
    sft = write("sft", [{"prompt": f"{TOPIC} {a}", "completion": f" {b}"} for a, b in parts])
    prompts = write("prompts", [{"prompt": f"{TOPIC} {a}"} for a, _ in parts])
    openings = [f"{TOPIC} {' '.join(t.split()[:OPENING])}" for t, _ in reviews(data, "test")[:HELD_OUT]]
    held_out = write("held-out", [{"prompt": opening} for opening in openings])
    began = time.perf_counter()
    train("sft", *SFT, f"data.train={sft}")
    middle = time.perf_counter()
    train("ppo", *PPO, f"data.train={prompts}", f"data.valid={held_out}", *settings)
    ended = time.perf_counter()
    best = min(events("ppo", "eval"), key=lambda event: event["loss"])
    before, after = (answers(run, openings) for run in ("sft", "ppo"))
    found = {
        "rise": (best["reward"] - best["reference_reward"]) / best["reference_reward_std"],
        **{name: best[name] for name in ("reward", "reference_reward", "reference_reward_std", "kl", "win_rate")},
        "distinct-2 ratio": distinct2(after) / distinct2(before),
        "words before": float(np.mean([len(text.split()) for text in before])),
        "words after": float(np.mean([len(text.split()) for text in after])),
        "sft minutes": (middle - began) / 60,
        "ppo minutes": (ended - middle) / 60,
    }
    samples = [dict(zip(("opening", "before", "after"), row)) for row in zip(openings, before, after)]
    for sample in samples[:10]:
        print(json.dumps(sample, indent=1, ensure_ascii=False))
    extra = {"settings": [*PPO, *settings], "step": best["step"], "samples": samples[:10]}
    report("reviews-ppo", list(found), [list(found.values())], extra)


def answers(run: str, prompts: Sequence[str]) -> list[str]:
    """A sample to each prompt."""
    from mlxft import load
    from mlxft.model.sampling import Sampling, sample_batch, text_of

    loaded = load(PLACE / run)
    how = Sampling(32)
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    found = sample_batch(loaded.model, loaded.tokenizer, ids, how, seed=0, rows=64)
    return [text_of(loaded.tokenizer, of_one[0], how) for of_one in found]


def main() -> None:
    """One of the three."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("reward", "score", "ppo"))
    parser.add_argument("data", type=Path)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    if args.stage != "score":
        {"reward": reward, "ppo": ppo}[args.stage](args.data, args.settings)
    elif args.settings:
        parser.error("score takes no settings")
    else:
        score(args.data)


if __name__ == "__main__":
    main()
