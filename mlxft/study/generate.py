"""Complete prompts from a file, or play episodes from them; best of n or rejection sampling by a reward."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from rich.console import Console

from mlxft.data.chat import opening_after
from mlxft.data.dataset import encode_prompt
from mlxft.data.formats import Prompt, convert, tools_of, unwritten, with_usual_names
from mlxft.data.sources import read_rows, report_lines
from mlxft.distributed import Portion, check_same, current
from mlxft.errors import ConfigError, DataError, nearest
from mlxft.files import text_writer, write_result
from mlxft.model.frozen import FrozenModels
from mlxft.model.layers import SAVED
from mlxft.model.load import Loaded, base_fingerprint, context_of
from mlxft.model.sampling import ROWS_AT_ONCE, Sampling, sample_shared, text_of
from mlxft.objectives.episodes import EncodedPrompt, EnvironmentSettings, Episode, Episodes
from mlxft.objectives.rewards import Rewards, RewardsSettings, Scores, ToScore
from mlxft.runs import versions
from mlxft.study.tasks import as_messages
from mlxft.text import bar, json_text, make_console

# --- ranks ------------------------------------------------------------------------------------------------------------
# For what the ranks of mlx.launch evaluate or sample together.


def check_shared(loaded: Loaded, what: str, held: Any) -> None:
    """Refuse ranks whose numbers would not belong together: versions, the model or `what` they hold differ.

    Args:
        held: something whose repr is the same in all processes.
    Raises:
        ConfigError: every difference from rank 0, with its rank.
    """
    if (ranks := current()).size == 1:
        return
    template = getattr(loaded.tokenizer, "chat_template", None)
    model = hashlib.sha256(f"{base_fingerprint(loaded)} {template}".encode())
    for name, value in sorted(tree_flatten(loaded.model.parameters()), key=lambda item: item[0]):
        if name.rpartition(".")[2] in SAVED:  # the fingerprint is without adapters
            model.update(np.array(value.astype(mx.float32)).tobytes())
    hashes = {"the model": model.hexdigest()[:16], what: hashlib.sha256(repr(held).encode()).hexdigest()[:16]}
    check_same(ranks, {"version of": versions(), "hash of": hashes})


def shared_bar(console: Console | None, total: int, what: str) -> AbstractContextManager[Callable[[int], None]]:
    """Show a progress bar of what rank 0 does of a shared work."""
    part = (ranks := current()).portion(total)
    return bar(console if ranks.first else None, part.stop - part.start, what)


def _seed(given: int | None) -> int:
    """Return a seed, or a random one of rank 0."""
    return int(current().from_first(int.from_bytes(os.urandom(7), "big") if given is None else given))


# --- completions ------------------------------------------------------------------------------------------------------

_BATCHES = 4  # sampled before their completions are returned
_CONTEXT = 32768  # most tokens of an episode where a model's config does not say its context


class Met(NamedTuple):
    """The environment of episodes, and whether something else rewards them, so that it need not."""

    environment: EnvironmentSettings
    rewarded: bool = False


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

    Args:
        limit: read the first rows only.
        met: the environment of episodes; FILE may be `environment` then, for its own rows.
    Raises:
        ConfigError: there is no such file. DataError: rows do not fit, or the chat template refuses them; all in one.
    """

    def __init__(
        self, spec: str, loaded: Loaded, system: str | None = None, *, limit: int | None = None, met: Met | None = None
    ) -> None:
        self.loaded, self._system = loaded, system
        self.episodes = None if met is None else Episodes(met.environment, loaded.tokenizer, True, met.rewarded)
        self.prompts: list[AskedPrompt] = []
        problems = []
        if self.episodes is not None:
            spec = self.episodes.rows("test", spec) or spec
        rows = with_usual_names(list(read_rows(spec, "test")), ("prompts",))
        for where, item in islice(convert(rows, "prompts"), limit):
            assert isinstance(item, Prompt)
            try:
                tools = tools_of(item.row) if self.episodes is None else self.episodes.tools_of(item.row)
                ids = encode_prompt(item.prompt, loaded.tokenizer, system=system, tools=tools, where=where)
                if not ids:
                    raise DataError(f"{where}: the prompt has no tokens")
                self.prompts.append(AskedPrompt(where, item, ids))
            except DataError as e:
                problems.append(str(e))
        if problems:
            raise DataError(report_lines(problems))
        if self.episodes is not None:
            self.episodes.check(self._encoded(self.prompts[0]))
        check_shared(loaded, "the prompts", [(prompt.ids, prompt.item.row) for prompt in self.prompts])

    def _encoded(self, prompt: AskedPrompt) -> EncodedPrompt:
        asked = prompt.item.prompt if self._system is None else as_messages(prompt.item.prompt, self._system)
        text = asked if isinstance(asked, str) else str(self.loaded.tokenizer.decode(prompt.ids))
        return EncodedPrompt(np.array(prompt.ids, dtype=np.int32), text, prompt.item.row, prompt.where, asked)

    def played(
        self, sampling: Sampling, samples: int, seed: int | None, console: Console
    ) -> Iterator[list[tuple[AskedPrompt, list[Episode]]]]:
        """Yield blocks of prompts, in order, with their episodes.

        Args:
            sampling: of a turn.
            seed: None: a random one.
        """
        seed, how = _seed(seed), replace(sampling, stop_at_eos=bool(self.loaded.tokenizer.eos_token_ids))
        most, size = context_of(self.loaded.config) or _CONTEXT, max(1, _BATCHES * ROWS_AT_ONCE // samples)
        with shared_bar(console, samples * len(self.prompts), "episodes") as advance:
            for start in range(0, len(self.prompts), size):
                block = self.prompts[start : start + size]
                asked = [self._encoded(prompt) for prompt in block for _ in range(samples)]
                found = self._play(asked, samples, how, most=most, seed=seed + start, on_done=advance)
                yield [(prompt, found[i * samples : (i + 1) * samples]) for i, prompt in enumerate(block)]

    def _play(self, asked: list[EncodedPrompt], samples: int, sampling: Sampling, **options: Any) -> list[Episode]:
        """Play an episode for each; one rank plays all `samples` of a prompt, which are neighbours."""
        assert self.episodes is not None
        ranks, play = current(), self.episodes.play

        def played(part: Portion) -> list[Any]:
            mine = Portion(*(samples * n for n in part))
            found = play(self.loaded.model, asked[mine.here], sampling, part=mine, **options)
            return found if ranks.size == 1 else [episode.to_json() for episode in found]

        found = ranks.in_portions(len(asked) // samples, played)
        return found if ranks.size == 1 else [Episode.of(known, prompt) for known, prompt in zip(found, asked)]

    def sampled(
        self, sampling: Sampling, samples: int, seed: int | None, console: Console
    ) -> Iterator[list[tuple[AskedPrompt, list[Generated]]]]:
        """Yield blocks of prompts, in order, with their completions.

        Args:
            seed: None: a random one.
        """
        model, tokenizer, seed = self.loaded.model, self.loaded.tokenizer, _seed(seed)
        how = replace(sampling, stop_at_eos=bool(tokenizer.eos_token_ids))
        size = max(1, _BATCHES * ROWS_AT_ONCE // samples)
        with shared_bar(console, samples * len(self.prompts), "completions") as advance:
            for start in range(0, len(self.prompts), size):
                block = self.prompts[start : start + size]
                ids = [prompt.ids for prompt in block]
                found = sample_shared(model, tokenizer, ids, how, samples=samples, seed=seed + start, on_done=advance)
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
        cut_off: also keep those that were cut off, and episodes that a limit or an error ended.
        environment: plays episodes in place of single completions; None: none.
    """

    n: int
    above: float | None
    cut_off: bool
    sampling: Sampling
    rewards: RewardsSettings
    environment: EnvironmentSettings | None = None


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

    Ranks share the prompts, and rank 0 writes. Of episodes the rows are whole conversations, of data.format: messages.

    Args:
        spec: rows of data.format: prompts.
        seed: None: a random one.
    Raises:
        ConfigError, ModelError, DataError: prompts or reward cannot be used, or nothing is left to keep.
        RewardError: the reward does not return a number.
        EpisodeError: the environment fails.
        CheckpointError: `out` cannot be written.
    """
    met = None if choice.environment is None else Met(choice.environment, choice.rewards.given)
    rewards = Rewards(choice.rewards, loaded.tokenizer, needed=met is None)
    asked = Asked(spec, loaded, system, met=met)
    rewards.prepare(FrozenModels(loaded.model, base_fingerprint(loaded), loaded.source))
    lines: list[dict[str, Any]] = []
    scores: list[float] = []
    cut = empty = 0
    scored = _scored if met is None else _scored_episodes
    for row in scored(asked, choice, rewards, system, seed, console):
        scores += [each.score for each in row]
        whole = [each for each in row if choice.cut_off or each.finished]
        fit = [each for each in whole if each.written]
        cut, empty = cut + len(row) - len(whole), empty + len(whole) - len(fit)
        if choice.above is None:
            kept = [max(fit, key=lambda each: each.score)] if fit else []
        else:
            kept = [each for each in fit if each.score > choice.above]
        lines += [each.line | {"score": each.score} for each in kept]
    if not lines:
        raise DataError(_nothing(choice, scores, cut, empty))
    mean = float(np.mean([line["score"] for line in lines]))
    if current().first:
        write_result(out, text_writer("".join(json_text(line) + "\n" for line in lines)))
    return Chosen(len(asked.prompts), len(scores), len(lines), cut, empty, float(np.mean(scores)), mean, str(out))


class _Candidate(NamedTuple):
    """A completion or an episode: its score, whether it was finished and has text, and its row without the score."""

    score: float
    finished: bool
    written: bool
    line: dict[str, Any]


def _scored(
    asked: Asked, choice: Choice, rewards: Rewards, system: str | None, seed: int | None, console: Console
) -> Iterator[list[_Candidate]]:
    """Yield the completions of each prompt."""
    for block in asked.sampled(choice.sampling, choice.n, seed, console):
        items = [_item(asked.loaded.tokenizer, prompt, each) for prompt, row in block for each in row]
        values = iter(_totals(partial(rewards.score, tokens=_TOKENS), items, choice.n))
        for prompt, row in block:
            yield [
                _Candidate(next(values), g.finish != "length", bool(g.text.strip()), _line(prompt.item, system, g.text))
                for g in row
            ]


def _scored_episodes(
    asked: Asked, choice: Choice, rewards: Rewards, system: str | None, seed: int | None, console: Console
) -> Iterator[list[_Candidate]]:
    """Yield the episodes of each prompt."""
    assert asked.episodes is not None
    for block in asked.played(choice.sampling, choice.n, seed, console):
        every = [episode for _, row in block for episode in row]
        score = partial(asked.episodes.score, rewards=rewards, tokens=_TOKENS)
        values = iter(_totals(score, every, choice.n))
        for prompt, row in block:
            tools = asked.episodes.tools_of(prompt.item.row)
            also = {"tools": tools} if tools else {}
            # What an environment says at its end is not for the model.
            said = [{"messages": unwritten(e.messages[: e.last[1] + 1]), **also} for e in row]
            yield [_Candidate(next(values), e.ended == "end", True, line) for e, line in zip(row, said)]


def _totals(score: Callable[[Any], Scores], items: Sequence[Any], n: int) -> list[float]:
    """Return the scores of all items; one rank scores all `n` of a prompt, which are neighbours."""
    return current().in_portions(
        len(items) // n, lambda part: score(items[n * part.start : n * part.stop]).total.tolist()
    )


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


def _line(item: Prompt, system: str | None, text: str) -> dict[str, Any]:
    # Without system text and tools the completion would belong to another prompt.
    prompt = item.prompt if system is None else as_messages(item.prompt, system)
    tools = tools_of(item.row)
    return {"prompt": unwritten(prompt), "completion": text, **({"tools": tools} if tools else {})}


def _nothing(choice: Choice, scores: Sequence[float], cut: int, empty: int) -> str:
    text = f"none of {len(scores)} completions is kept"
    if cut and choice.environment is not None:
        text += f"; {cut} were ended by a limit or an error: raise the limits of --environment, or give --cut-off"
    elif cut:
        text += f"; {cut} were cut off: raise --max-tokens ({choice.sampling.max_tokens}), or give --cut-off"
    if empty:
        text += f"; {empty} are empty"
    if choice.above is not None and choice.above > -math.inf:
        text += f"; the highest score is {max(scores):g}; --keep asks for above {choice.above:g}"
    return text
