"""Run `mlxft rlhf`: SFT, pairs, a reward model, PPO and fuse, with one small model and a file of reviews."""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxft.config import Config, load_config, override
from mlxft.data.sources import Problem, read_rows
from mlxft.errors import ConfigError, DataError
from mlxft.exports.fuse import fuse_sources
from mlxft.files import check_replaceable, claim, hold
from mlxft.model.sampling import Sampling, sample_batch, text_of
from mlxft.objectives.rollouts import RolloutSettings
from mlxft.run import train
from mlxft.runs import Run, load_run
from mlxft.text import parse_json

_HERE = Path(__file__).parent
TOPIC = "Food review:"
OPENING = 4  # words of a review in the prompt
WORDS = (8, 45)  # of the reviews that are used; longer ones would be truncated
HELD_OUT = 32  # openings that are not trained on
_SHOWN = 10


class Review(NamedTuple):
    """A review, which is `great` or another one."""

    text: str
    great: bool

    @property
    def opening(self) -> str:
        """The prompt."""
        return f"{TOPIC} {' '.join(self.text.split()[:OPENING])}"

    @property
    def rest(self) -> str:
        """The completion."""
        return " " + " ".join(self.text.split()[OPENING:])


def read_reviews(file: str) -> list[Review]:
    """Read the reviews of a usable length.

    Raises:
        ConfigError, DataError: the file is missing, a row has no `review` or `label`, or there are too few of a kind.
    """
    found = []
    for row in read_rows(file, "train"):
        if isinstance(row, Problem):
            raise DataError(f"{row.where}: {row.text}")
        review, label = row.data.get("review"), row.data.get("label")
        if not isinstance(review, str) or label not in ("great", "other"):
            raise DataError(f"{row.where}: expected a text `review` and a `label`, great or other")
        text = " ".join(html.unescape(re.sub(r"<br ?/?>", " ", review)).split())
        if WORDS[0] <= len(text.split()) <= WORDS[1]:
            found.append(Review(text, label == "great"))
    great = sum(r.great for r in found)
    if min(great, len(found) - great) < HELD_OUT:
        raise DataError(
            f"{file}: {great} great and {len(found) - great} other reviews of {WORDS[0]} to {WORDS[1]} words; "
            f"at least {HELD_OUT} of each are needed"
        )
    return found


def pairs_of(reviews: Sequence[Review]) -> list[dict[str, str]]:
    """Pair each great review with another one of similar length, so that length is not what is learned."""
    left = [r for r in reviews if not r.great]
    random.Random(0).shuffle(left)
    pairs = []
    for great in (r for r in reviews if r.great):
        if not left:
            break
        other = min(left, key=lambda r: abs(len(r.text) - len(great.text)))
        left.remove(other)
        pairs.append({"prompt": TOPIC, "chosen": f" {great.text}", "rejected": f" {other.text}"})
    return pairs


def _write(folder: Path, reviews: Sequence[Review]) -> None:
    order = list(reviews)
    random.Random(0).shuffle(order)
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    files = {
        "sft": [{"prompt": r.opening, "completion": r.rest} for r in rest],
        "pairs": pairs_of(rest),
        "prompts": [{"prompt": r.opening} for r in rest],
        "held-out": [{"prompt": r.opening} for r in held],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def recipes(folder: Path, overrides: Sequence[str]) -> dict[str, Config]:
    """Return the recipes of the three runs; an override begins with its run, as in ppo:run.steps=20.

    Raises:
        ConfigError: an override names no run, or a setting is wrong.
    """
    data = folder / "data"
    places = {
        "sft": [override("data.train", data / "sft.jsonl")],
        "reward": [override("data.train", data / "pairs.jsonl")],
        "ppo": [
            override("data.train", data / "prompts.jsonl"),
            override("data.valid", data / "held-out.jsonl"),
            override("model.adapter", folder / "sft"),
            override("rewards.adapter", folder / "reward"),
        ],
    }
    for text in overrides:
        stage, _, setting = text.partition(":")
        if stage not in places or "=" not in setting:
            raise ConfigError(f"{text}: expected RUN:KEY=VALUE with a run of {', '.join(places)}")
        places[stage].append(setting)
    return {
        s: load_config(_HERE / f"rlhf-{s}.yaml", [override("run.dir", folder), *more]) for s, more in places.items()
    }


def distinct2(texts: Sequence[str]) -> float:
    """Return the share of distinct word pairs (Li et al. 2016): low if a text repeats itself."""
    found = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    return len(set(found)) / max(1, len(found))


def walk_rlhf(folder: Path, file: str | None, overrides: Sequence[str], console: Console) -> Mapping[str, float]:
    """Run all steps below `folder`, and return the metrics of the last evaluation.

    Raises:
        ConfigError: `folder` holds files that `mlxft rlhf` did not make.
    """
    configs = recipes(folder, overrides)
    check_replaceable(folder, "rlhf")
    reviews = read_reviews(file or str(_HERE / "reviews.jsonl"))
    with hold(folder):
        claim(folder, "rlhf")
        _write(folder / "data", reviews)
        return _walk(folder, configs, console)


def _walk(folder: Path, configs: Mapping[str, Config], console: Console) -> Mapping[str, float]:
    runs: dict[str, Run] = {}
    for (stage, config), title in zip(configs.items(), ("1. SFT", "2. A reward model from pairs", "3. PPO")):
        console.rule(title)
        runs[stage] = train(config, overwrite=True, console=console)
    console.rule("4. Fusing")
    fused = folder / "fused"
    for line in fuse_sources(runs["ppo"].dir, fused, probe="valid", overwrite=True, force=True).lines():
        console.print(line, highlight=False)
    lines = (folder / "data" / "held-out.jsonl").read_text("utf-8").splitlines()
    prompts = [parse_json(line)["prompt"] for line in lines]
    most = configs["ppo"].section("rollout", RolloutSettings).max_tokens
    before, after = (_completions(path, prompts, most) for path in (runs["sft"].dir, fused))
    console.rule("Openings that it was not trained on, before and after")
    for prompt, old, new in list(zip(prompts, before, after))[:_SHOWN]:
        console.print(Text(prompt.removeprefix(TOPIC).strip(), style="bold"))
        console.print(f"  before:{old}\n  after: {new}", highlight=False, markup=False)
    last = runs["ppo"].metrics("eval")[-1]
    console.print(_table(last, before, after))
    return last


def _completions(path: Path, prompts: Sequence[str], most: int) -> list[str]:
    loaded = load_run(path)
    sampling = Sampling(most)
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    found = sample_batch(loaded.model, loaded.tokenizer, ids, sampling, seed=0)
    return [text_of(loaded.tokenizer, samples[0], sampling) for samples in found]


def _table(last: Mapping[str, float], before: Sequence[str], after: Sequence[str]) -> Table:
    table = Table("held-out openings", "before (SFT)", "after (PPO)")
    table.add_row("reward, mean", f"{last['reference_reward']:.3f}", f"{last['reward']:.3f}")
    table.add_row("reward, spread of the SFT model's", f"{last['reference_reward_std']:.3f}", "")
    table.add_row("the higher reward of the two", "", f"{last['win_rate']:.0%}")
    table.add_row("KL, nats a completion", "0", f"{last['kl']:.2f}")
    sizes = [sum(len(t.split()) for t in texts) / len(texts) for texts in (before, after)]
    table.add_row("words a completion", *(f"{size:.1f}" for size in sizes))
    table.add_row("distinct-2", *(f"{distinct2(texts):.3f}" for texts in (before, after)))
    return table
