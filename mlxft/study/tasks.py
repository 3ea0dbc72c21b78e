"""Tasks: what is asked of a model and how its answers are judged, by a name or by a few lines of YAML.

A task with `choices` is multiple choice by log-likelihood, one with `metrics` has the model write an answer, and one
with neither measures the loss of the rows' answers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from mlxft.config import Data, Settings
from mlxft.data.template import names_in
from mlxft.data.thoughts import Thoughts, keeps_thoughts
from mlxft.errors import ConfigError, nearest
from mlxft.recipe import read_settings
from mlxft.text import home_path

Kind = Literal["exact_match", "contains", "regex", "number", "f1", "json", "function", "reward"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMED = ("loss", "choice", *(k for k in KINDS if k not in ("regex", "function", "reward")))
# What a metric of each kind may say beside its kind and name.
TAKES: dict[Kind, tuple[str, ...]] = {
    "exact_match": ("ignore_case", "thoughts"),
    "contains": ("ignore_case", "thoughts"),
    "regex": ("pattern", "thoughts"),
    "number": ("tolerance", "pattern", "thoughts"),
    "f1": ("thoughts",),
    "json": ("schema", "thoughts"),
    "function": ("function",),
    "reward": ("run",),
}
NEEDS: dict[Kind, str] = {"regex": "pattern", "function": "function", "reward": "run"}
# Metrics that hold the answer against a wanted one.
COMPARING: tuple[Kind, ...] = ("exact_match", "contains", "number", "f1")


class Metric(Settings):
    """How an answer is judged."""

    kind: Kind = Field(description=f"{', '.join(KINDS)}.")
    name: str | None = Field(None, min_length=1, description="Its name in reports; default: the kind.")
    ignore_case: bool = Field(False, description="exact_match, contains: upper and lower case are the same.")
    pattern: str | None = Field(
        None, min_length=1, description="regex: what must be found. number: where to look; its first group, if any."
    )
    tolerance: float = Field(1e-6, ge=0, description="number: largest difference.")
    schema_: str | dict[str, Any] | None = Field(
        None, alias="schema", description="json: a JSON Schema or its file; default: any JSON will do."
    )
    function: str | None = Field(
        None, description="function: file.py:name, called as name(prompts, completions, rows) -> list of floats."
    )
    thoughts: Thoughts | None = Field(
        None,
        description="drop: judge the answer without its thoughts; keep: the whole completion; default: as the task's "
        "thoughts, and keep where pattern names the marks of thoughts, as <think>.",
    )
    run: str | None = Field(None, description="reward: a run of objective reward.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, RecursionError, OverflowError) as e:
            raise ValueError(f"pattern {value!r} is no regular expression: {e}") from e
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Metric:
        given = {"schema" if name == "schema_" else name for name in self.model_fields_set} - {"kind", "name"}
        foreign = sorted(given - set(TAKES[self.kind]))
        if foreign:
            has = ", ".join(TAKES[self.kind]) or "none"
            raise ValueError(f"{self.kind} has no setting {', '.join(foreign)} (its own: {has})")
        needed = NEEDS.get(self.kind)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{self.kind} needs {needed}: {type(self).model_fields[needed].description}")
        return self

    def keeps_thoughts(self, general: Thoughts) -> bool:
        """Return whether the whole completion is judged, where the task's `thoughts` is `general`."""
        return keeps_thoughts(self.thoughts, general, self.pattern)

    @property
    def label(self) -> str:
        """Its name in reports."""
        return self.name or (self.function or "").rpartition(":")[2] or self.kind


class Task(Settings):
    """A task. Templates name fields of the row in braces, as in "Review: {review}"; {{ and }} are braces."""

    name: str | None = Field(None, min_length=1, description="Its name in reports; default: the file's.")
    format: (
        Literal[  # type: ignore[valid-type]
            get_args(Data.model_fields["format"].annotation)
        ]
        | None
    ) = Field(None, description="How rows are read, as data.format, where no prompt is given.")
    fields: dict[str, str] = Field(default_factory=dict, description="As data.fields: other names of its fields.")
    prompt: str | list[dict[str, str]] | None = Field(
        None, description="Template of the prompt, or messages whose contents are; default: the row's own."
    )
    system: str | None = Field(None, min_length=1, description="System prompt.")
    answer: str | None = Field(
        None, min_length=1, description="Field (or template) of the wanted answer; of choices: its text or index."
    )
    choices: str | list[str] | None = Field(None, description="The answers to choose from, or the field with them.")
    metrics: list[Metric] | None = Field(None, description="How written answers are judged: names, or mappings.")
    template: Literal["auto", "none"] = Field("auto", description="As data.template: none is plain text.")
    delimiter: str | None = Field(
        None, description="Plain text: what stands between a prompt and its answer; default a space."
    )
    train_on: Literal["assistant", "last", "completion", "all"] | None = Field(
        None, description="loss: of which tokens, as data.train_on."
    )
    max_tokens: int | None = Field(None, ge=1, description="metrics: longest answer; default 256.")
    stop: list[str] | None = Field(None, description="metrics: texts that end an answer.")
    thoughts: Thoughts | None = Field(
        None,
        description="metrics: what is judged. drop (default): the answer without its thoughts (<think>...</think>, and "
        "other families' marks); a thought that never ends leaves no answer. keep: the whole completion, as functions "
        "(see mlxft.answer_of) and reward runs always read it.",
    )
    temperature: float | None = Field(None, ge=0, description="metrics: default 0, the most likely answer.")

    @field_validator("metrics", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for given in value:
            kind = given.get("kind") if isinstance(given, dict) else given
            if isinstance(kind, str) and kind not in KINDS:
                raise ValueError(f"no such metric {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
        return [{"kind": m} if isinstance(m, str) else m for m in value]

    @field_validator("choices")
    @classmethod
    def _are_several(cls, value: Any) -> Any:
        if isinstance(value, list) and (len(set(value)) < 2 or len(set(value)) < len(value) or "" in value):
            raise ValueError(f"choices are {value}; expected at least two different texts, none of them empty")
        return value

    @field_validator("prompt")
    @classmethod
    def _is_a_template(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else [m.get("content", "") for m in value or []]:
            names_in(text, "prompt")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.choices is not None and self.metrics is not None:
            raise ValueError("give choices (by log-likelihood) or metrics (of written answers), not both")
        if self.metrics is not None:
            labels = [m.label for m in self.metrics]
            twice = sorted({name for name in labels if labels.count(name) > 1})
            if not labels:
                raise ValueError(f"metrics is empty; there are {', '.join(KINDS)}")
            if twice:
                raise ValueError(f"two metrics are called {', '.join(twice)}; give them a name each")
        written = [n for n in ("max_tokens", "stop", "temperature", "thoughts") if getattr(self, n) is not None]
        if written and self.kind != "generate":
            raise ValueError(f"{', '.join(written)}: only for metrics of written answers")
        if self.train_on is not None and self.kind != "loss":
            raise ValueError("train_on: only for a loss, without choices and metrics")
        if self.prompt is not None and (self.format is not None or self.fields):
            raise ValueError("give prompt, or format and fields, not both")
        if self.prompt is not None and self.answer is None and self.compares:
            raise ValueError("answer is needed: the field of the wanted answer")
        return self

    @property
    def kind(self) -> str:
        """loss, choice or generate."""
        return "choice" if self.choices is not None else "loss" if self.metrics is None else "generate"

    @property
    def judged(self) -> Thoughts:
        """What is judged of a completion."""
        return self.thoughts or "drop"

    @property
    def compares(self) -> bool:
        """Whether rows must have a wanted answer."""
        return self.metrics is None or any(m.kind in COMPARING for m in self.metrics)


def read_task(given: str) -> Task:
    """A task by name (`NAMED`), by `file.py:function`, by `reward:RUN`, or from a YAML file.

    Raises:
        ConfigError: no such task or file, or all that is wrong with its settings.
    """
    head, colon, rest = given.partition(":")
    if Path(given).suffix in (".yaml", ".yml"):
        path = home_path(given)
        task = read_settings(path, Task, "configs/eval-reviews.yaml shows a task of mlxft eval")
        return task if task.name else task.model_copy(update={"name": path.stem})
    if given in NAMED:
        kinds: dict[str, dict[str, Any]] = {"loss": {}, "choice": {"choices": "choices"}}
        return Task(name=given, **kinds.get(given, {"metrics": [given]}))
    if given.rpartition(":")[0].endswith(".py"):
        metric = {"kind": "function", "function": given}
        return Task.model_validate({"name": given.rpartition(":")[2], "metrics": [metric]})
    if head == "reward" and colon and rest:
        return Task.model_validate({"name": "reward", "metrics": [{"kind": "reward", "run": rest}]})
    raise ConfigError(
        f"--task {given!r}: no such task{nearest(given, NAMED)}; there are {', '.join(NAMED)}, file.py:function, "
        "reward:RUN, and files of YAML (configs/eval-reviews.yaml is one); tasks of lm-eval go to --tasks"
    )
