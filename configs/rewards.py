"""An example of a reward function: rewards.function names it as configs/rewards.py:overlap."""

from __future__ import annotations

from collections import Counter
from typing import Any


def overlap(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """From 0 to 1: words that a completion has in common with its row's field `chosen` (F1)."""
    return [f1(text.lower().split(), str(row["chosen"]).lower().split()) for text, row in zip(completions, rows)]


def f1(said: list[str], wanted: list[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / max(len(said) + len(wanted), 1)
