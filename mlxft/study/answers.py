"""Answers to a file of prompts, in batches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlxft.data.convert import convert
from mlxft.data.formats import Message, Prompt
from mlxft.data.sources import read_rows, report_lines
from mlxft.errors import DataError
from mlxft.model.batch_sample import ROWS, sample_batch, text_of
from mlxft.model.load import Loaded
from mlxft.model.sample import Sampling, render_prompt
from mlxft.train.files import write_beside

_BATCHES = 4  # that are sampled before their answers are given out


class Asked:
    """A file's prompts, of data.format: prompts, rendered for a model.

    Raises:
        ConfigError: no such file. DataError: rows that do not fit, or that the chat template refuses; all in one.
    """

    def __init__(self, spec: str, loaded: Loaded, system: str | None = None) -> None:
        self._loaded = loaded
        self.prompts: list[str | list[Message]] = []
        self._ids: list[list[int]] = []
        problems = []
        for where, item in convert(read_rows(spec, "test"), "prompts"):
            assert isinstance(item, Prompt)
            try:
                ids = render_prompt(loaded.tokenizer, item.prompt, system)
                if not ids:
                    raise DataError("the prompt has no tokens")
                self._ids.append(ids)
                self.prompts.append(item.prompt)
            except DataError as e:
                problems.append(f"{where}: {e}")
        if problems:
            raise DataError(report_lines(problems))

    def answers(self, sampling: Sampling, samples: int, seed: int, console: Console) -> Iterator[dict[str, Any]]:
        """A line for each prompt, in order: prompt, completions and why each ended, as they are there."""
        tokenizer = self._loaded.tokenizer
        how = replace(sampling, stop_at_eos=bool(tokenizer.eos_token_ids))
        size = max(1, _BATCHES * ROWS // samples)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("answers"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=samples * len(self._ids))
            for start in range(0, len(self._ids), size):
                found = sample_batch(
                    self._loaded.model,
                    tokenizer,
                    self._ids[start : start + size],
                    how,
                    samples=samples,
                    seed=seed + start,
                    on_done=lambda n: progress.advance(bar, n),
                )
                for prompt, answers in zip(self.prompts[start:], found):
                    texts = [text_of(tokenizer, answer, how) for answer in answers]
                    yield {"prompt": prompt, "completions": texts, "finish": [answer.finish for answer in answers]}


def write_answers(asked: Asked, sampling: Sampling, samples: int, seed: int | None, out: Path | None) -> None:
    """Each prompt's line of JSON, to `out` (whole or not at all) or to standard output as they come.

    Args:
        seed: None draws a new one from the system.
    Raises:
        CheckpointError: `out` can not be written.
    """
    seed = int.from_bytes(os.urandom(7), "big") if seed is None else seed

    def lines(file: TextIO) -> None:
        for line in asked.answers(sampling, samples, seed, Console(stderr=True)):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            lines(file)

    if out is None:
        lines(sys.stdout)
    else:
        write_beside(out, write)
