"""Best of n and rejection sampling: answers of a model, scored, and the good ones as rows to train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from mlxft.data.formats import Prompt, tools_of, unwritten
from mlxft.data.thoughts import opening_after
from mlxft.errors import ConfigError, DataError, nearest
from mlxft.model.load import Loaded, base_fingerprint
from mlxft.model.logits import Split
from mlxft.model.roles import Roles
from mlxft.model.sample import Sampling
from mlxft.objectives.onpolicy.rewards import Item, Rewards
from mlxft.objectives.onpolicy.settings import RewardsSettings
from mlxft.study.answers import Answer, Asked, drawn
from mlxft.text import json_text
from mlxft.trainer.files import text_writer, write_result

TOKENS = 4096  # most of a batch that a reward model reads
KEEP = "best, all, or above:X with a number"


class Keep(NamedTuple):
    """Which of a prompt's answers are kept: the best one, or all that score above `least`."""

    best: bool
    least: float = -math.inf


class Choice(NamedTuple):
    """How answers are sampled and chosen: `n` a prompt; `cut_off` keeps also those that did not come to an end."""

    n: int
    keep: Keep
    cut_off: bool
    sampling: Sampling
    rewards: RewardsSettings


def read_keep(text: str, n: int) -> Keep:
    """What `--keep` says.

    Raises:
        ConfigError: it is none of best, all, above:X; or the best of one is asked for.
    """
    kind, colon, number = text.partition(":")
    if text == "best":
        if n == 1:
            raise ConfigError("--keep best: --n is 1, which leaves nothing to choose from; raise it, or use above:X")
        return Keep(True)
    if text == "all":
        return Keep(False)
    try:
        least = float(number) if kind == "above" and colon else math.nan
    except ValueError:
        least = math.nan
    if not math.isfinite(least):
        raise ConfigError(f"--keep is {text!r}{nearest(kind, ('best', 'all', 'above'))}; expected {KEEP}")
    return Keep(False, least)


@dataclass(frozen=True)
class Chosen:
    """What was sampled and kept.

    Attributes:
        cut_off, empty: answers that did not come to an end (0 where they may be kept), and those without text, which
            are left out.
        mean: score of all answers. kept_mean: of those that are kept.
    """

    prompts: int
    answers: int
    kept: int
    cut_off: int
    empty: int
    mean: float
    kept_mean: float
    out: str

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        left = ", ".join(f"{n} {why}" for n, why in ((self.cut_off, "cut off"), (self.empty, "empty")) if n)
        return (
            f"{self.kept} of {self.answers} answers to {self.prompts} prompts kept"
            f"{f' ({left} left out)' if left else ''}, mean score {self.kept_mean:.4f} against {self.mean:.4f} of all: "
            f"{self.out}"
        )


def choose(
    spec: str,
    loaded: Loaded,
    choice: Choice,
    out: Path,
    *,
    seed: int | None = None,
    system: str | None = None,
    console: Console,
) -> Chosen:
    """Sample, score, choose, and write the rows, of data.format: prompt-completion, with their scores.

    Args:
        spec: rows of data.format: prompts.
        seed: None draws a new one from the system.
    Raises:
        ConfigError, ModelError, DataError: prompts or reward can not be used; or nothing is left to keep.
        RewardError: the reward gives no number.
        CheckpointError: `out` can not be written.
    """
    rewards = Rewards(choice.rewards, loaded.tokenizer)
    asked = Asked(spec, loaded, system)
    rewards.prepare(Roles(loaded.model, adopt="policy"), Split(loaded.model), base_fingerprint(loaded), loaded.source)
    lines: list[dict[str, Any]] = []
    scores: list[float] = []
    cut = empty = 0
    for start, found in asked.sampled(choice.sampling, choice.n, drawn(seed), console):
        places = range(start, start + len(found))
        items = [_item(asked, i, answer) for i, answers in zip(places, found) for answer in answers]
        block = rewards.score(items, tokens=TOKENS).total.tolist()
        scores += block
        for k, (i, answers) in enumerate(zip(places, found)):
            own = block[k * choice.n : (k + 1) * choice.n]
            whole = [j for j, a in enumerate(answers) if choice.cut_off or a.finish != "length"]
            fit = [j for j in whole if answers[j].text.strip()]
            cut, empty = cut + len(answers) - len(whole), empty + len(whole) - len(fit)
            lines += [_line(asked.prompts[i], system, answers[j].text, own[j]) for j in _kept(own, fit, choice.keep)]
    if not lines:
        raise DataError(_nothing(choice, scores, cut, empty))
    kept = float(np.mean([line["score"] for line in lines]))
    write_result(out, text_writer("".join(json_text(line) + "\n" for line in lines)))
    return Chosen(len(asked.ids), len(scores), len(lines), cut, empty, float(np.mean(scores)), kept, str(out))


def _item(asked: Asked, number: int, answer: Answer) -> Item:
    item, ids = asked.prompts[number], asked.ids[number]
    text = item.prompt if isinstance(item.prompt, str) else str(asked.loaded.tokenizer.decode(ids))
    prompt, reply = np.array(ids, dtype=np.int32), np.array(answer.ids, dtype=np.int32)
    opening = opening_after(asked.loaded.tokenizer, ids)
    finished, where = answer.finish != "length", asked.wheres[number]
    return Item(prompt, reply, text, answer.text, item.row, finished, where, item.prompt, opening)


def _kept(scores: Sequence[float], fit: Sequence[int], keep: Keep) -> list[int]:
    """Which answers of a prompt; of the best, the first."""
    if keep.best:
        return [max(fit, key=lambda j: scores[j])] if fit else []
    return [j for j in fit if scores[j] > keep.least]


def _line(item: Prompt, system: str | None, text: str, score: float) -> dict[str, Any]:
    prompt: Any = item.prompt
    # Without system text and tools the row would teach the answer to another prompt.
    if system is not None:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [{"role": "system", "content": system}, *turns]
    tools = tools_of(item.row)
    return {"prompt": unwritten(prompt), "completion": text, "score": score, **({"tools": tools} if tools else {})}


def _nothing(choice: Choice, scores: Sequence[float], cut: int, empty: int) -> str:
    text = f"no answer of {len(scores)} is left to keep"
    if cut:
        text += f"; {cut} were cut off: raise --max-tokens ({choice.sampling.max_tokens}), or give --cut-off"
    if empty:
        text += f"; {empty} are empty"
    if not choice.keep.best and choice.keep.least > -math.inf:
        text += f"; the highest score is {max(scores):g}, asked for is above {choice.keep.least:g}"
    return text
