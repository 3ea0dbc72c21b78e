"""Solved rows to show before a prompt: chosen from a file, never one of the rows that are asked."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mlxft.data.shots import balanced, few_of
from mlxft.data.sources import read_rows
from mlxft.errors import ConfigError
from mlxft.study.cases import Case, make_cases
from mlxft.study.tasks import Task


def choose_shots(
    spec: str, task: Task, asked: Sequence[Case], shots: int, seed: int, setting: str = "--shots"
) -> list[Case]:
    """`shots` cases of a file, mixed, with the same number (or one more) of each label where there are few labels.

    Args:
        spec: a file, folder (its train split) or hub data set.
        asked: the evaluated cases: rows that are equal to one of them, or have its prompt, are left out.
        setting: what asks for them, for messages.
    Raises:
        ConfigError: no such file, or not as many other rows. DataError: rows that do not fit the task.
    """
    cases = make_cases(read_rows(spec, "train"), task)
    prompts = {_key(case) for case in asked}
    others = [case for case in cases if _key(case) not in prompts]
    if len(others) < shots:
        left = f" ({len(cases) - len(others)} are among the evaluated rows)" if len(others) < len(cases) else ""
        raise ConfigError(
            f"{setting}: {shots} shots are asked for; {spec} has {len(others)} rows to take them from{left}"
        )
    labels = few_of([case.label for case in others])
    return [others[i] for i in balanced(labels, len(others), shots, seed, setting)]


def _key(case: Case) -> str:
    return json.dumps(case.prompt, sort_keys=True, ensure_ascii=False)
