"""Score completions by a reward run: single ones, pairs, and several of one prompt, which are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlxft.data.dataset import EncodedCompletion
from mlxft.data.formats import (
    FORMATS,
    Completion,
    Conversation,
    Labelled,
    Pair,
    Ranked,
    in_our_fields,
    with_usual_names,
)
from mlxft.data.sources import Problem, read_rows, report_lines
from mlxft.errors import ConfigError, DataError
from mlxft.model.heads import SCORING_TOKENS, Scorer, find_head, read_head
from mlxft.model.logits import Split
from mlxft.objectives.functional import wins
from mlxft.objectives.reward import measure, score_statistics, thirds_of
from mlxft.objectives.rewards import reads_chat
from mlxft.runs import load_run
from mlxft.text import bar, home_path


@dataclass
class ScoredRow:
    """A row's completions and their scores.

    Attributes:
        kind: "answer", "pair" (chosen and rejected) or "ranking".
        weight: of a pair; the pairs of one row add up to 1.
        tie: a pair without a better completion.
    """

    where: str
    kind: str
    answers: list[EncodedCompletion]
    scores: list[float] = field(default_factory=list)
    weight: float = 1.0
    tie: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the row's line of JSON."""
        if self.kind == "ranking":
            return {"row": self.where, "scores": self.scores, "ranking": self._order()}
        line = {"row": self.where, **self._named()}
        if self.kind == "pair":
            line |= {"margin": self.scores[0] - self.scores[1], **({"tie": True} if self.tie else {})}
        return line

    def __str__(self) -> str:
        if self.kind == "ranking":
            return f"{self.where}: " + " > ".join(f"answers[{i}] {self.scores[i]:.4f}" for i in self._order())
        scores = ", ".join(f"{name} {value:.4f}" for name, value in self._named().items())
        return f"{self.where}: {scores}{' (a tie)' if self.tie else ''}"

    def _order(self) -> list[int]:
        return sorted(range(len(self.scores)), key=lambda i: -self.scores[i])

    def _named(self) -> dict[str, float]:
        return dict(zip(("chosen", "rejected") if self.kind == "pair" else ("score",), self.scores))


def open_scorer(path: str | Path, **options: Any) -> Scorer:
    """Load a reward run (or its adapter or model folder).

    Raises:
        ConfigError: there is no such folder. ModelError: it is not a reward run, or does not fit its base.
    """
    folder = home_path(path)
    if not folder.exists():
        raise ConfigError(f"there is no run {path}; name a run of objective: reward")
    loaded = load_run(path, scores=True, **options)
    loaded.model.eval()
    mx.eval(loaded.model.parameters())
    head = find_head(folder)
    assert head is not None, "load_run requires it"
    about = read_head(head).about
    statistics = about.get("reward", {})
    chat = reads_chat(folder, about)
    return Scorer(Split(loaded.model), loaded.tokenizer, chat, statistics.get("mean"), statistics.get("std"))


def score_file(run: str | Path, file: str, console: Console, *, tokens: int = SCORING_TOKENS) -> list[ScoredRow]:
    """Score all rows of a file.

    Args:
        file: rows of messages, prompt and completion, chosen and rejected, or prompt and answers.
        console: shows progress.
    Raises:
        ConfigError, DataError: there is no such file, or rows cannot be scored, all of them in one.
        ModelError: the run is not a reward run.
    """
    rows = with_usual_names(list(read_rows(file, "test")), _SCORED)
    scorer = open_scorer(run)
    found: list[ScoredRow] = []
    problems: list[str] = []
    for row in rows:
        try:
            if isinstance(row, Problem):
                raise DataError(row.text)
            found += read_row(scorer, row.data, row.where)
        except DataError as exc:
            text = str(exc)
            problems.append(text if text.startswith(f"{row.where}: ") else f"{row.where}: {text}")
    if problems:
        raise DataError(report_lines(problems))
    every = [completion for item in found for completion in item.answers]
    with bar(console, len(every), "completions") as advance:
        scores = iter(scorer.scores(every, tokens, advance))
    for item in found:
        item.scores = [next(scores) for _ in item.answers]
    return found


_SCORED = ("preference", "ratings", "messages", "prompt-completion")


def read_row(scorer: Scorer, row: dict[str, Any], where: str) -> list[ScoredRow]:
    """Return what is to be scored of a row, by its fields.

    Raises:
        DataError: the row has none of the fields, or is not well formed.
    """
    row = in_our_fields(row, ("preference", "ratings"), scorer.chat and bool(scorer.tokenizer.has_chat_template))
    has = {name for name, value in row.items() if value is not None}
    listed = next((name for name in ("answers", "completions") if name in has), None)
    if {"chosen", "rejected"} <= has:
        item = FORMATS["preference"].read(row)
        pairs = item.pairs if isinstance(item, Ranked) else (item,)
        return [_pair(scorer, pair, where) for pair in pairs if isinstance(pair, Pair)]
    if "prompt" in has and listed:
        texts = row[listed]
        if not isinstance(texts, list) or not texts:
            raise DataError(f"{listed} is {texts!r:.40}; expected a list of completions")
        items = [FORMATS["unpaired"].read({**row, "completion": text, "label": True}) for text in texts]
        return [ScoredRow(where, "ranking", [_encoded(scorer, item, where) for item in items])]
    single = "unpaired" if isinstance(row.get("prompt"), str) else "prompt-completion"
    kind = FORMATS["messages" if "messages" in has else single]
    labelled = {**row, "label": True}  # the label does not matter for a score
    if not kind.missing(labelled):
        return [ScoredRow(where, "answer", [_encoded(scorer, kind.read(labelled), where)])]
    raise DataError(
        f"the row has {', '.join(sorted(has)) or 'no fields'}; expected messages; prompt and "
        "completion; chosen and rejected; or prompt and answers"
    )


def _encoded(scorer: Scorer, item: Any, where: str) -> EncodedCompletion:
    if isinstance(item, Conversation):
        *prompt, reply = ({k: v for k, v in message.items() if k != "weight"} for message in item.messages)
        return scorer.encode(prompt, reply, where, item.tools)
    assert isinstance(item, Completion | Labelled)
    return scorer.encode(item.prompt, item.completion, where, item.tools if isinstance(item, Labelled) else None)


def _pair(scorer: Scorer, pair: Pair, where: str) -> ScoredRow:
    both = [scorer.encode(pair.prompt, reply, where, pair.tools) for reply in (pair.chosen, pair.rejected)]
    return ScoredRow(where, "pair", both, [], pair.weight, pair.tie)


def summarise(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Return mean and spread of all scores; for pairs the numbers of a validation: rows count once, ties do not."""
    values = np.array([value for row in rows for value in row.scores])
    weights = np.array([row.weight for row in rows for _ in row.scores])
    mean = np.average(values, weights=weights)
    summary: dict[str, Any] = {"rows": len({row.where for row in rows}), "mean": float(mean)}
    summary["std"] = float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))
    pairs = [row for row in rows if row.kind == "pair" and not row.tie]
    if ties := sum(row.tie for row in rows):
        summary["ties"] = ties
    return summary | _of_pairs(pairs) if pairs else summary


def _of_pairs(pairs: Sequence[ScoredRow]) -> dict[str, Any]:
    """Return accuracy, margin and calibration of pairs; scores that are equal within rounding count half."""
    weights = np.array([row.weight for row in pairs], dtype=np.float32)  # a GPU has no float64
    chosen, rejected = (np.array([row.scores[side] for row in pairs], dtype=np.float32) for side in (0, 1))
    margins = chosen - rejected
    won = np.array(wins(mx.array(margins), mx.array(np.abs(chosen) + np.abs(rejected))))
    scores = [row.scores[side] for side in (0, 1) for row in pairs]
    lengths = [len(row.answers[side].reply) for side in (0, 1) for row in pairs]
    sums = measure(mx.array(scores), mx.array(lengths), mx.array(weights), thirds_of(lengths))
    found = score_statistics({name: float(value) / float(weights.sum()) for name, value in sums.items()})
    return {
        "pairs": len(pairs),
        "accuracy": float(np.average(won, weights=weights)),
        "margin": float(np.average(margins, weights=weights)),
        **{name: found[name] for name in ("ece", "reliability", "scores_by_length")},
    }


def tables(summary: dict[str, Any]) -> list[str]:
    """Return a summary's tables as lines: reliability, and scores by the completions' length."""
    if "pairs" not in summary:
        return []
    lines = ["how sure   how often right   share of pairs"]
    for row in summary["reliability"]:
        lines.append(f"{row['confidence']:8.3f}   {row['accuracy']:15.3f}   {row['share']:14.1%}")
    lines.append("length     mean score       std   share")
    for name, row in summary["scores_by_length"].items():
        lines.append(f"{name:8}   {row['mean']:10.4f}   {row['std']:7.4f}   {row['share']:5.1%}")
    return lines
