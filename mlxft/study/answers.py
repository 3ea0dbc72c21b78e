"""Answers to a file of prompts, in batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console

from mlxft.data.convert import convert
from mlxft.data.encode import encode_prompt
from mlxft.data.formats import Prompt, tools_of, unwritten
from mlxft.data.sources import read_rows, report_lines
from mlxft.errors import DataError
from mlxft.model.batch_sample import ROWS, sample_batch, text_of
from mlxft.model.load import Loaded
from mlxft.model.sample import Sampling
from mlxft.study.bar import bar
from mlxft.text import json_text, make_console
from mlxft.trainer.files import write_result

_BATCHES = 4  # that are sampled before their answers are given out


class Answer(NamedTuple):
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
    ) -> Iterator[tuple[int, list[list[Answer]]]]:
        """The answers to some prompts at a time, in order: the first one's number, and each one's answers."""
        tokenizer = self.loaded.tokenizer
        how = replace(sampling, stop_at_eos=bool(tokenizer.eos_token_ids))
        size = max(1, _BATCHES * ROWS // samples)
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
                yield start, [[Answer(a.ids, a.finish, text_of(tokenizer, a, how)) for a in row] for row in found]

    def answers(self, sampling: Sampling, samples: int, seed: int, console: Console) -> Iterator[dict[str, Any]]:
        """A line for each prompt, in order: prompt, completions and why each ended, as they are there."""
        for start, found in self.sampled(sampling, samples, seed, console):
            for item, row in zip(self.prompts[start:], found):
                texts, ends = [answer.text for answer in row], [answer.finish for answer in row]
                yield {"prompt": unwritten(item.prompt), "completions": texts, "finish": ends}


def drawn(seed: int | None) -> int:
    """The seed, or a new one from the system."""
    return int.from_bytes(os.urandom(7), "big") if seed is None else seed


def write_answers(asked: Asked, sampling: Sampling, samples: int, seed: int | None, out: Path | None) -> None:
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
