"""Complete prompts from a file, and best of n or rejection sampling by a reward."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from rich.console import Console

from mlxft.data.chat import opening_after
from mlxft.data.dataset import encode_prompt
from mlxft.data.formats import Prompt, convert, tools_of, unwritten
from mlxft.data.sources import read_rows, report_lines
from mlxft.errors import ConfigError, DataError, nearest
from mlxft.files import text_writer, write_result
from mlxft.model.frozen import FrozenModels
from mlxft.model.load import Loaded, base_fingerprint
from mlxft.model.sampling import ROWS_AT_ONCE, Sampling, sample_batch, text_of
from mlxft.objectives.rewards import Rewards, RewardsSettings, ToScore
from mlxft.text import bar, json_text, make_console

# --- answers ----------------------------------------------------------------------------------------------------------
# Answers to a file of prompts, in batches.

_BATCHES = 4  # that are sampled before their answers are given out


class Generated(NamedTuple):
    """An answer's ids as sampled, why it ended ("eos", "stop" or "length"), and its text."""

    ids: list[int]
    finish: str
    text: str


class Asked:
    """A file's prompts, of data.format: prompts, rendered for a model.

    Raises:
        ConfigError: no such file. DataError: rows that do not fit, or that the chat template refuses; all in one.
    """

    def __init__(self, spec: str, loaded: Loaded, system: str | None = None) -> None:
        self.loaded = loaded
        self.prompts: list[Prompt] = []
        self.wheres: list[str] = []
        self.ids: list[list[int]] = []
        problems = []
        for where, item in convert(read_rows(spec, "test"), "prompts"):
            assert isinstance(item, Prompt)
            try:
                tools = tools_of(item.row)
                ids = encode_prompt(item.prompt, loaded.tokenizer, system=system, tools=tools, where=where)
                if not ids:
                    raise DataError(f"{where}: the prompt has no tokens")
                self.ids.append(ids)
                self.prompts.append(item)
                self.wheres.append(where)
            except DataError as e:
                problems.append(str(e))
        if problems:
            raise DataError(report_lines(problems))

    def sampled(
        self, sampling: Sampling, samples: int, seed: int, console: Console
    ) -> Iterator[tuple[int, list[list[Generated]]]]:
        """The answers to some prompts at a time, in order: the first one's number, and each one's answers."""
        tokenizer = self.loaded.tokenizer
        how = replace(sampling, stop_at_eos=bool(tokenizer.eos_token_ids))
        size = max(1, _BATCHES * ROWS_AT_ONCE // samples)
        with bar(console, samples * len(self.ids), "answers") as advance:
            for start in range(0, len(self.ids), size):
                found = sample_batch(
                    self.loaded.model,
                    tokenizer,
                    self.ids[start : start + size],
                    how,
                    samples=samples,
                    seed=seed + start,
                    on_done=advance,
                )
                yield (
                    start,
                    [[Generated(a.ids, a.finish, text_of(tokenizer, a, how)) for a in row] for row in found],
                )

    def answers(self, sampling: Sampling, samples: int, seed: int, console: Console) -> Iterator[dict[str, Any]]:
        """A line for each prompt, in order: prompt, completions and why each ended, as they are there."""
        for start, found in self.sampled(sampling, samples, seed, console):
            for item, row in zip(self.prompts[start:], found):
                texts, ends = [answer.text for answer in row], [answer.finish for answer in row]
                yield {"prompt": unwritten(item.prompt), "completions": texts, "finish": ends}


def drawn(seed: int | None) -> int:
    """The seed, or a new one from the system."""
    return int.from_bytes(os.urandom(7), "big") if seed is None else seed


def write_completions(asked: Asked, sampling: Sampling, samples: int, seed: int | None, out: Path | None) -> None:
    """Each prompt's line of JSON, to `out` (whole or not at all) or to standard output as they come.

    Args:
        seed: None draws a new one from the system.
    Raises:
        CheckpointError: `out` can not be written.
    """
    seed = drawn(seed)

    def lines(file: TextIO) -> None:
        for line in asked.answers(sampling, samples, seed, make_console(stderr=True)):
            file.write(json_text(line) + "\n")
            file.flush()

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            lines(file)

    if out is None:
        lines(sys.stdout)
    else:
        write_result(out, write)


# --- best -------------------------------------------------------------------------------------------------------------

_TOKENS = 4096  # most of a batch that a reward model reads
_KEEP = "best, all, or above:X with a number"


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
        raise ConfigError(f"--keep is {text!r}{nearest(kind, ('best', 'all', 'above'))}; expected {_KEEP}")
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


def best_of_n(
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
    rewards.prepare(FrozenModels(loaded.model, base_fingerprint(loaded), loaded.source))
    lines: list[dict[str, Any]] = []
    scores: list[float] = []
    cut = empty = 0
    for start, found in asked.sampled(choice.sampling, choice.n, drawn(seed), console):
        places = range(start, start + len(found))
        items = [_item(asked, i, answer) for i, answers in zip(places, found) for answer in answers]
        block = rewards.score(items, tokens=_TOKENS).total.tolist()
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


def _item(asked: Asked, number: int, answer: Generated) -> ToScore:
    item, ids = asked.prompts[number], asked.ids[number]
    text = item.prompt if isinstance(item.prompt, str) else str(asked.loaded.tokenizer.decode(ids))
    prompt, reply = np.array(ids, dtype=np.int32), np.array(answer.ids, dtype=np.int32)
    opening = opening_after(asked.loaded.tokenizer, ids)
    finished, where = answer.finish != "length", asked.wheres[number]
    return ToScore(prompt, reply, text, answer.text, item.row, finished, where, item.prompt, opening)


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
