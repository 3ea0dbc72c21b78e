"""The metrics of a task, ready to judge written answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlxft.data.formats import Message
from mlxft.data.thoughts import Thoughts, wanted_of
from mlxft.errors import ConfigError
from mlxft.objectives.onpolicy.functions import load_functions
from mlxft.objectives.onpolicy.rewards import Item
from mlxft.objectives.onpolicy.rules import ScoredRule
from mlxft.objectives.onpolicy.settings import JsonSchema
from mlxft.study import metrics
from mlxft.study.cases import Case, as_messages
from mlxft.study.score import open_scorer
from mlxft.study.tasks import Metric, Task

Judge = Callable[[Sequence[Case], Sequence[Item]], Sequence[float]]


def judges(task: Task) -> dict[str, Judge]:
    """Metric -> what gives a score to each of a task's cases for the answers to them.

    Functions are loaded now, so that a mistake in one shows before a model answers anything; a reward run is loaded
    when it judges, and checked now.

    Raises:
        ConfigError, ModelError: a function, a schema or a reward run can not be used.
    """
    return {metric.label: _judge(metric, task.judged) for metric in task.metrics or []}


def _judge(metric: Metric, thoughts: Thoughts) -> Judge:
    if metric.kind == "function":
        (function,) = _functions(metric)
        return lambda cases, items: function.score(items)
    if metric.kind == "json":
        rule = _rule(metric, thoughts)
        return lambda cases, items: rule.score(items)
    if metric.kind == "reward":
        return partial(_rewards, open_scorer(metric.run or ""))
    compare, whole = _comparing(metric), metric.keeps_thoughts(thoughts)

    def score(case: Case, item: Item) -> float:
        if whole:
            return metrics.best(compare, item.completion, case.answers or ("",))
        return metrics.best(compare, item.answer, tuple(map(wanted_of, case.answers)) or ("",))

    return lambda cases, items: [score(case, item) for case, item in zip(cases, items)]


def _comparing(metric: Metric) -> Callable[[str, str], float]:
    if metric.kind == "exact_match":
        return partial(metrics.exact_match, ignore_case=metric.ignore_case)
    if metric.kind == "contains":
        return partial(metrics.contains, ignore_case=metric.ignore_case)
    if metric.kind == "number":
        return partial(metrics.number, tolerance=metric.tolerance, pattern=metric.pattern)
    if metric.kind == "regex":
        pattern = metric.pattern or ""
        return lambda said, _: metrics.regex(said, pattern)
    return metrics.f1


def _functions(metric: Metric) -> Any:
    try:
        return load_functions(metric.function)
    except ConfigError as e:
        raise ConfigError(str(e).replace("rewards.function", "function", 1)) from e


def _rule(metric: Metric, thoughts: Thoughts) -> ScoredRule:
    try:
        rule = JsonSchema.model_validate({"schema": metric.schema_, "thoughts": metric.thoughts})
        return ScoredRule(0, rule, thoughts)
    except ConfigError as e:
        raise ConfigError(str(e).replace("rewards.rules[0].schema", "json: schema")) from e


def _rewards(scorer: Any, cases: Sequence[Case], items: Sequence[Item]) -> Sequence[float]:
    """A reward model's scores, by its own template. An answer without text is one: its end."""
    answers = []
    for case, item in zip(cases, items):
        chat: bool = isinstance(case.prompt, list)
        reply: str | Message = {"role": "assistant", "content": item.completion} if chat else item.completion
        prompt = as_messages(case.prompt) if chat else case.prompt
        answers.append(scorer.encode(prompt, reply, case.where, case.tools))
    return scorer.scores(answers)


def items_of(
    cases: Sequence[Case], prompts: Sequence[Any], answers: Sequence[Any], openings: Sequence[str]
) -> list[Item]:
    """What functions and rules are given: prompts as text, answers, the rows' fields, and thoughts begun by prompts."""
    empty = np.zeros(0, dtype=np.int32)
    return [
        Item(empty, np.array(a.ids, dtype=np.int32), p, a.text, c.row, a.finish != "length", c.where, opening=opening)
        for c, p, a, opening in zip(cases, prompts, answers, openings)
    ]
