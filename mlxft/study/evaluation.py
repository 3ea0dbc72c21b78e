"""`mlxft eval`: models opened one after the other, the same rows asked of each, and what comes of it kept."""

from __future__ import annotations

import gc
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from rich.console import Console

from mlxft.config import Data
from mlxft.data.convert import FORMATS
from mlxft.data.formats import unwritten
from mlxft.data.sources import Problem, Row, read_rows
from mlxft.data.template import is_template
from mlxft.data.thoughts import Thoughts
from mlxft.errors import CheckpointError, ConfigError, MlxftError, nearest
from mlxft.model.adapters import base_noted, kept_template, read_adapter_config, template_of
from mlxft.model.load import Loaded
from mlxft.model.source import stated_name
from mlxft.owned import (
    EVALUATION,
    check_file,
    check_writable,
    claim,
    hold,
    is_empty,
    is_ours,
    is_stream,
    note,
    our_folder,
    read_mark,
    remove,
)
from mlxft.rundir import find_adapter, is_run, load, open_run, versions
from mlxft.study.cases import READ, Case, make_cases
from mlxft.study.evaluate import TOKENS, Paired, Result, compare, evaluate
from mlxft.study.shots import choose_shots
from mlxft.study.tasks import Task, read_task
from mlxft.text import home_path, json_text
from mlxft.trainer.files import write_text, writing


@dataclass(frozen=True)
class Asking:
    """What is asked, and how.

    Attributes:
        tasks: names, files, or Task.
        format: how rows are read; None: as a run's own rows are, else what they look like.
        template: as data.template, before what a task or a run says.
        thoughts: what is judged of written answers, before what a task says; see Task.
        shots: solved rows of the file `shots_from` shown before each prompt.
        limit: only the first rows.
        max_length, overflow, tokens, seed: see `evaluate`; the seed also chooses shots and resamples.
    """

    tasks: Sequence[str | Task] = ("loss",)
    format: str | None = None
    template: str | None = None
    thoughts: Thoughts | None = None
    shots: int = 0
    shots_from: str | None = None
    limit: int | None = None
    max_length: int | None = None
    overflow: str = "error"
    tokens: int = TOKENS
    seed: int = 0
    confidence: float = 0.95


class Compared(NamedTuple):
    """A task's result, and where there is another model its result and the differences."""

    result: Result
    other: Result | None
    paired: list[Paired]


@dataclass(frozen=True)
class Evaluation:
    """What `mlxft eval` found; `against` is None where nothing was compared."""

    model: str
    file: str
    against: str | None
    asking: Asking
    tasks: list[Compared]

    def to_json(self) -> dict[str, Any]:
        """As results.json has it; what is not a number is null."""
        found: dict[str, Any] = {
            "model": self.model,
            "file": self.file,
            "against": self.against,
            "shots": self.asking.shots,
            "seed": self.asking.seed,
            "confidence": self.asking.confidence,
            "tasks": [_task_json(found) for found in self.tasks],
            "versions": versions(),
        }
        finite: dict[str, Any] = _finite(found)
        return finite

    def lines(self) -> Iterable[dict[str, Any]]:
        """As predictions.jsonl has them: each row of each task, with what the other model said."""
        for result, other, _ in self.tasks:
            for i, line in enumerate(result.predictions):
                also = {}
                if other is not None:
                    kept = ("prediction", "answer", "logprobs", "finish", "scores")
                    also = {"against": {k: v for k, v in other.predictions[i].items() if k in kept}}
                yield {"task": result.task, **line, "prompt": unwritten(line["prompt"]), **also}

    def write(self, out: Path) -> None:
        """predictions.jsonl and results.json in a folder, both of them of one evaluation.

        Raises:
            CheckpointError: they can not be written.
        """
        texts = ("".join(f"{json_text(_finite(line))}\n" for line in self.lines()), json_text(self.to_json(), 1) + "\n")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with hold(out, wait=True):
            fresh = is_empty(out) and our_folder(out) is None
            if fresh:
                claim(out, "eval")
            try:
                for name, text in zip(EVALUATION, texts):
                    write_text(out / name, text)
                    note(out / name)
            except CheckpointError:
                if fresh and is_empty(out):
                    remove(out)
                raise


def check_out(out: Path | None, overwrite: bool, model: str) -> None:
    """Refuse, before the work, a folder that can not be written, or that holds what an evaluation would replace.

    Args:
        out: None: `default_out` of the model.
    Raises:
        ConfigError: so it is.
    """
    if out is None:
        if is_run(folder := home_path(model)):
            check_writable(folder / "eval" / EVALUATION[0], "--out is not given")
        return
    if is_stream(out):
        raise ConfigError(f"--out: {out} is a device or a pipe; give a folder's name")
    for file in [out / name for name in EVALUATION] if os.path.isdir(out) else [out]:
        check_file(file, overwrite)
        if file.exists() and not is_ours(file):
            raise ConfigError(f"--out: {file} is not what this version of mlxft made; choose another folder")


def _task_json(found: Compared) -> dict[str, Any]:
    result, other, paired = found
    task: dict[str, Any] = {"task": result.task, "kind": result.kind, "rows": len(result.rows)}
    task["figures"] = {name: figure._asdict() for name, figure in result.figures().items()}
    task["notes"] = result.notes
    if other is not None:
        task["against"] = {name: figure._asdict() for name, figure in other.figures().items()}
        task["paired"] = [pair._asdict() for pair in paired]
    return task


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_evaluation(
    model: str, file: str, asking: Asking, *, adapter: str | None = None, against: str | None = None, console: Console
) -> Evaluation:
    """Evaluate a model on a file, and another one on the same rows.

    Args:
        model: run, adapter, fused or any other model; with an adapter if one is named.
        file: a file, folder (its test split) or hub data set, as data.train takes it.
        against: another model, or "base": what the run or adapter started from.
    Raises:
        ConfigError, DataError, ModelError: something given can not be used; what does not need a model is found first.
    """
    named = adapter or model
    rows = list(read_rows(file, "test"))
    if asking.limit is not None:
        rows = rows[: asking.limit]
    data = _run_data(named)
    tasks = merged([_settled(task, asking, data, rows) for task in asking.tasks])
    if asking.thoughts is not None and all(task.kind != "generate" for task in tasks):
        raise ConfigError(f"--thoughts {asking.thoughts}: only for metrics of written answers; leave it out")
    asked = [make_cases(rows, task) for task in tasks]
    shots = [_shots(asking, task, cases) for task, cases in zip(tasks, asked)]
    other, options = _base(model, adapter) if against == "base" else (against, {})
    if other is not None:
        load(other, lazy=True, **options)  # what is wrong with it shows now, not when the first model is done

    def answered(loaded: Loaded) -> list[Result]:
        how: dict[str, Any] = {"tokens": asking.tokens, "overflow": asking.overflow, "seed": asking.seed}
        how |= {"max_length": asking.max_length, "console": console}
        return [evaluate(loaded, cases, t, shots=s, **how) for t, cases, s in zip(tasks, asked, shots)]

    results = answered(load(model, adapter))
    if other is None:
        return Evaluation(named, file, None, asking, [Compared(result, None, []) for result in results])
    gc.collect()  # the first model's weights, before the second's
    mx.clear_cache()
    others = answered(load(other, **options))
    found = []
    for result, second in zip(results, others):
        first, second = _same_rows(result, second)
        paired = compare(first, second, seed=asking.seed, confidence=asking.confidence)
        found.append(Compared(first, second, paired))
    return Evaluation(named, file, against, asking, found)


def merged(tasks: Sequence[Task]) -> list[Task]:
    """Tasks that differ only in how answers are judged as one, so that a model answers once.

    Raises:
        ConfigError: a task is given twice.
    """
    found: dict[str, list[Task]] = {}
    for task in tasks:
        how = task.model_dump_json(exclude={"name", "metrics"})
        found.setdefault(f"{task.kind} {how}", []).append(task)
    every = []
    for alike in found.values():
        labels = [metric.label for task in alike for metric in task.metrics or []]
        if len(alike) > 1 and (alike[0].kind != "generate" or len(set(labels)) < len(labels)):
            raise ConfigError(f"--task: {alike[0].name} is given twice")
        update = {"metrics": [m for t in alike for m in t.metrics or []], "name": "+".join(t.name or "" for t in alike)}
        every.append(alike[0].model_copy(update=update) if len(alike) > 1 else alike[0])
    return every


def _same_rows(a: Result, b: Result) -> tuple[Result, Result]:
    """Both without the rows that the other's context had no room for."""
    common = set(a.rows) & set(b.rows)
    return a.only(common), b.only(common)


def _run_data(model: str) -> Data | None:
    """How the rows of a run are read; None for what is no run."""
    folder = home_path(model)
    try:
        return open_run(folder).config.data if (folder / "config.yaml").is_file() else None
    except MlxftError:
        return None  # loading it will say what is wrong


def _settled(given: str | Task, asking: Asking, data: Data | None, rows: Sequence[Row | Problem]) -> Task:
    """A task with what the command and the run say of how rows are read."""
    task = read_task(given) if isinstance(given, str) else given
    if asking.format is not None:
        if task.prompt is not None:
            raise ConfigError(f"--format {asking.format}: task {task.name} has a prompt of its own; leave it out")
        if asking.format not in FORMATS:
            hint = nearest(asking.format, FORMATS)
            raise ConfigError(f"--format is {asking.format!r}; expected one of {', '.join(READ)}{hint}")
        task = task.model_copy(update={"format": asking.format})
    if asking.template is not None:
        task = task.model_copy(update={"template": asking.template})
    if asking.thoughts is not None and task.kind == "generate":
        task = task.model_copy(update={"thoughts": asking.thoughts})
    if data is None:
        return task
    update: dict[str, Any] = {}
    if "template" not in task.model_fields_set:
        update["template"] = data.template
    fits = task.prompt is None and data.format in READ and task.format in (None, data.format)
    if fits and not task.fields and _fits(data, rows):
        update |= {"format": data.format, "fields": data.fields}
        if task.kind == "loss" and task.train_on is None:
            update["train_on"] = data.train_on
    return task.model_copy(update=update)


def _fits(data: Data, rows: Sequence[Row | Problem]) -> bool:
    """Whether the first row has what a run's rows have."""
    first = next((row.data for row in rows if isinstance(row, Row)), {})
    names = dict.fromkeys(first, "there")
    names |= {ours: "there" for ours, theirs in data.fields.items() if is_template(theirs) or theirs in first}
    return not FORMATS[data.format].missing(names)


def _shots(asking: Asking, task: Task, cases: Sequence[Case]) -> list[Case]:
    """Solved cases to show, of other rows than the evaluated ones."""
    if not asking.shots:
        return []
    return choose_shots(asking.shots_from or "", task, cases, asking.shots, asking.seed)


def _base(model: str, adapter: str | None) -> tuple[str, dict[str, Any]]:
    """The bare base of a run or adapter, and how it is loaded.

    Raises:
        ConfigError: it does not say.
    """
    if adapter is not None:
        return model, {}
    folder = home_path(model)
    if (find_adapter(folder) / "adapter_config.json").is_file():
        options = dict(base_noted(read_adapter_config(find_adapter(folder))))
        options.pop("fingerprint", None)
        name = options.pop("model", None)
        if name is not None:
            return stated_name(str(name)), {**options, "chat_template": template_of(find_adapter(folder))}
    elif is_run(folder):
        run = open_run(folder)
        return run.config.model.path, {"chat_template": kept_template(folder, run.config.model.chat_template)}
    raise ConfigError(f"--against base: {model} does not say what it was made from; name the model: --against MODEL")


def default_out(model: str, file: str, found: Evaluation) -> Path | None:
    """Where a run's evaluations are kept, one folder for each file, tasks and shots; None for what is no run."""
    folder = home_path(model)
    if not is_run(folder):
        return None
    names = [file.removeprefix("hf:") if file.startswith("hf:") else Path(file).stem]
    names += [task.result.task for task in found.tasks if task.result.task != "loss"]
    names += [f"{found.asking.shots}-shot"] if found.asking.shots else []
    name = re.sub(r"[^\w.+-]+", "-", "-".join(names))[:120].strip(".") or "rows"
    out = folder / "eval" / name
    # What stands in a folder without a mark may be the user's.
    numbered = (out.with_name(f"{name}-{n}") for n in itertools.count(2))
    return out if read_mark(folder) or not out.exists() else next(f for f in numbered if not f.exists())
