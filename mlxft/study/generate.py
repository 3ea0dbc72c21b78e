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
from mlxft.study.tasks import as_messages
from mlxft.text import bar, json_text, make_console

# --- completions ------------------------------------------------------------------------------------------------------

_BATCHES = 4  # sampled before their completions are returned


class Generated(NamedTuple):
    """A completion's ids as sampled, why it ended ("eos", "stop" or "length"), and its text."""

    ids: list[int]
    finish: str
    text: str


class AskedPrompt(NamedTuple):
    """A row's prompt and its ids."""

    where: str
    item: Prompt
    ids: list[int]


class Asked:
    """A file's prompts, of data.format: prompts, rendered for a model.

    Raises:
        ConfigError: there is no such file. DataError: rows do not fit, or the chat template refuses them; all in one.
    """

    def __init__(self, spec: str, loaded: Loaded, system: str | None = None) -> None:
        self.loaded = loaded
        self.prompts: list[AskedPrompt] = []
        problems = []
        for where, item in convert(read_rows(spec, "test"), "prompts"):
            assert isinstance(item, Prompt)
            try:
                tools = tools_of(item.row)
                ids = encode_prompt(item.prompt, loaded.tokenizer, system=system, tools=tools, where=where)
                if not ids:
                    raise DataError(f"{where}: the prompt has no tokens")
                self.prompts.append(AskedPrompt(where, item, ids))
            except DataError as e:
                problems.append(str(e))
        if problems:
            raise DataError(report_lines(problems))

    def sampled(
        self, sampling: Sampling, samples: int, seed: int | None, console: Console
    ) -> Iterator[list[tuple[AskedPrompt, list[Generated]]]]:
        """Yield blocks of prompts, in order, with their completions.

        Args:
            seed: None: a random one.
        """
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        seed = int.from_bytes(os.urandom(7), "big") if seed is None else seed
        how = replace(sampling, stop_at_eos=bool(tokenizer.eos_token_ids))
        size = max(1, _BATCHES * ROWS_AT_ONCE // samples)
        with bar(console, samples * len(self.prompts), "completions") as advance:
            for start in range(0, len(self.prompts), size):
                block = self.prompts[start : start + size]
                ids = [prompt.ids for prompt in block]
                found = sample_batch(model, tokenizer, ids, how, samples=samples, seed=seed + start, on_done=advance)
                texts = [[Generated(a.ids, a.finish, text_of(tokenizer, a, how)) for a in row] for row in found]
                yield list(zip(block, texts))


def write_completions(asked: Asked, sampling: Sampling, samples: int, seed: int | None, out: Path | None) -> None:
    """Write a line of JSON for each prompt (prompt, completions, and why each ended).

    Args:
        seed: None: a random one.
        out: written completely or not at all; None: standard output, line by line.
    Raises:
        CheckpointError: `out` cannot be written.
    """

    def lines(file: TextIO) -> None:
        for block in asked.sampled(sampling, samples, seed, make_console(stderr=True)):
            for prompt, row in block:
                line = {"prompt": unwritten(prompt.item.prompt), "completions": [each.text for each in row]}
                file.write(json_text(line | {"finish": [each.finish for each in row]}) + "\n")
                file.flush()

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            lines(file)

    if out is None:
        lines(sys.stdout)
    else:
        write_result(out, write)


# --- best -------------------------------------------------------------------------------------------------------------

_TOKENS = 4096  # of a batch for a reward model


class Choice(NamedTuple):
    """How completions are sampled and chosen.

    Attributes:
        n: completions per prompt.
        above: keep all that score above it; None: the best one of each prompt.
        cut_off: also keep those that were cut off.
    """

    n: int
    above: float | None
    cut_off: bool
    sampling: Sampling
    rewards: RewardsSettings


def read_keep(text: str, n: int) -> float | None:
    """Parse `--keep` into `Choice.above`.

    Raises:
        ConfigError: it is not best, all or above:X; or best with a single completion.
    """
    if text == "all":
        return -math.inf
    if text == "best":
        if n == 1:
            raise ConfigError("--keep best: --n is 1, so there is no choice; raise it, or use above:X")
        return None
    kind, _, number = text.partition(":")
    try:
        above = float(number) if kind == "above" else math.nan
    except ValueError:
        above = math.nan
    if not math.isfinite(above):
        hint = nearest(kind, ("best", "all", "above"))
        raise ConfigError(f"--keep is {text!r}{hint}; expected best, all, or above:X with a number")
    return above


@dataclass(frozen=True)
class Chosen:
    """Counts and mean scores of sampled and kept completions.

    Attributes:
        answers: number of completions that were sampled.
        cut_off, empty: completions that are left out: cut off (0 where they may be kept), and without text.
        mean: score of all completions. kept_mean: of the kept ones.
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
        """Return it as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        left = ", ".join(f"{n} {why}" for n, why in ((self.cut_off, "cut off"), (self.empty, "empty")) if n)
        return (
            f"{self.kept} of {self.answers} completions of {self.prompts} prompts kept"
            f"{f' ({left} left out)' if left else ''}, mean score {self.kept_mean:.4f}, of all {self.mean:.4f}: "
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
    """Sample and score completions, choose, and write rows of data.format: prompt-completion with their scores.

    Args:
        spec: rows of data.format: prompts.
        seed: None: a random one.
    Raises:
        ConfigError, ModelError, DataError: prompts or reward cannot be used, or nothing is left to keep.
        RewardError: the reward does not return a number.
        CheckpointError: `out` cannot be written.
    """
    rewards = Rewards(choice.rewards, loaded.tokenizer)
    asked = Asked(spec, loaded, system)
    rewards.prepare(FrozenModels(loaded.model, base_fingerprint(loaded), loaded.source))
    lines: list[dict[str, Any]] = []
    scores: list[float] = []
    cut = empty = 0
    for block in asked.sampled(choice.sampling, choice.n, seed, console):
        items = [_item(loaded.tokenizer, prompt, each) for prompt, row in block for each in row]
        scores += rewards.score(items, tokens=_TOKENS).total.tolist()
        values = iter(scores[-len(items) :])
        for prompt, row in block:
            scored = list(zip(row, values))
            whole = [pair for pair in scored if choice.cut_off or pair[0].finish != "length"]
            fit = [pair for pair in whole if pair[0].text.strip()]
            cut, empty = cut + len(row) - len(whole), empty + len(whole) - len(fit)
            if choice.above is None:
                kept = [max(fit, key=lambda pair: pair[1])] if fit else []
            else:
                kept = [pair for pair in fit if pair[1] > choice.above]
            lines += [_line(prompt.item, system, each.text, score) for each, score in kept]
    if not lines:
        raise DataError(_nothing(choice, scores, cut, empty))
    mean = float(np.mean([line["score"] for line in lines]))
    write_result(out, text_writer("".join(json_text(line) + "\n" for line in lines)))
    return Chosen(len(asked.prompts), len(scores), len(lines), cut, empty, float(np.mean(scores)), mean, str(out))


def _item(tokenizer: Any, asked: AskedPrompt, found: Generated) -> ToScore:
    item, ids = asked.item, asked.ids
    return ToScore(
        prompt_ids=np.array(ids, dtype=np.int32),
        reply_ids=np.array(found.ids, dtype=np.int32),
        prompt=item.prompt if isinstance(item.prompt, str) else str(tokenizer.decode(ids)),
        completion=found.text,
        row=item.row,
        finished=found.finish != "length",
        where=asked.where,
        asked=item.prompt,
        opening=opening_after(tokenizer, ids),
    )


def _line(item: Prompt, system: str | None, text: str, score: float) -> dict[str, Any]:
    # Without system text and tools the completion would belong to another prompt.
    prompt = item.prompt if system is None else as_messages(item.prompt, system)
    tools = tools_of(item.row)
    return {"prompt": unwritten(prompt), "completion": text, "score": score, **({"tools": tools} if tools else {})}


def _nothing(choice: Choice, scores: Sequence[float], cut: int, empty: int) -> str:
    text = f"none of {len(scores)} completions is kept"
    if cut:
        text += f"; {cut} were cut off: raise --max-tokens ({choice.sampling.max_tokens}), or give --cut-off"
    if empty:
        text += f"; {empty} are empty"
    if choice.above is not None and choice.above > -math.inf:
        text += f"; the highest score is {max(scores):g}; --keep asks for above {choice.above:g}"
    return text
