"""mlxft fewshot: compare what a few examples bring in the prompt, in training, in both, and none at all.

A cell is one method, one number of examples and one seed. Each cell is written to a file when it is done, so that a
study can be resumed, and extended by other numbers of examples and more seeds.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import mlx.core as mx
import numpy as np
from pydantic import BaseModel, Field, TypeAdapter
from rich.console import Console
from rich.table import Table

from mlxft.build import load_base, make_objective, settled
from mlxft.check import check_trains
from mlxft.config import Config, load_config
from mlxft.data.dataset import load_splits, with_format
from mlxft.data.formats import Completion, Example, labels_of
from mlxft.data.sources import read_rows
from mlxft.errors import ConfigError
from mlxft.files import check_replaceable, claim, clear, empty, hold, is_empty, is_of_kind, write_text
from mlxft.model.folder import brief
from mlxft.model.load import Loaded, load_tokenizer
from mlxft.objectives.base import Objective
from mlxft.run import total_steps, train
from mlxft.runs import load_run, read_events
from mlxft.study.evaluate import Asking, run_task
from mlxft.study.plots import fewshot_curves
from mlxft.study.stats import Estimate, Interval, bootstrap, crossed
from mlxft.study.tasks import READ, Case, Task, choose_shots, make_cases, read_task
from mlxft.text import home_path, json_text, read_file

# --- few-shot table ---------------------------------------------------------------------------------------------------

_FILE = "study.json"  # what is compared
_DEFAULT = "0,1,4,16"
_ALL = "all"
_METHODS = ("zero-shot", "in context", "tuned", "both")
BOUNDED = ("accuracy", "accuracy_norm", "exact_match", "contains", "regex", "number", "f1", "json")
_K = int | str  # a number of examples, or all


class Cell(NamedTuple):
    """A method, its number of examples (if trained on, of each label), and the index of its seed."""

    method: str
    k: _K
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.replace(' ', '-')}-{self.k}-{self.seed}"

    @property
    def option(self) -> str:
        """Return the options that ask for the cell, for messages."""
        return f"{_option(self.method)} or --k"


class Line(NamedTuple):
    """A line of the table: a method with a number of examples, over its seeds.

    Attributes:
        trained_rows: number of rows that were trained on.
        against: difference to zero-shot on the same rows; None for zero-shot.
    """

    method: str
    k: _K
    seeds: int
    rows: int
    trained_rows: int
    estimate: Estimate
    against: Interval | None

    def to_json(self) -> dict[str, Any]:
        facts = {"method": self.method, "k": self.k, "seeds": self.seeds, "rows": self.rows}
        facts |= {"trained_rows": self.trained_rows, **self.estimate._asdict()}
        return facts | {"against_zero_shot": self.against and self.against._asdict()}


@dataclass(frozen=True)
class Study:
    """A finished study; `out` is its folder."""

    metric: str
    lines: list[Line]
    notes: list[str]
    out: Path

    def to_json(self) -> dict[str, Any]:
        table = [line.to_json() for line in self.lines]
        return {"metric": self.metric, "confidence": 0.95, "table": table, "notes": self.notes, "out": str(self.out)}

    def cells(self) -> list[list[str]]:
        """Return the table as text: a header, then its lines."""
        table = [["method", "examples", "trained rows", "seeds", "rows", self.metric, "95 % interval", "to zero-shot"]]
        for line in self.lines:
            e, a = line.estimate, line.against
            gain = "" if a is None else f"{a.difference:+.3f} [{a.low:+.3f}, {a.high:+.3f}]"
            per_label = line.method == "tuned" and line.k != _ALL and line.trained_rows > int(line.k)
            k = f"{line.k} a label" if per_label else str(line.k)
            trained = f"{line.trained_rows:,}" if line.trained_rows else ""
            figures = [f"{e.value:.3f}", f"[{e.low:.3f}, {e.high:.3f}]", gain]
            table.append([line.method, k, trained, str(line.seeds), str(line.rows), *figures])
        return table

    def show(self, console: Console) -> None:
        """Print the table and the notes."""
        head, *rows = self.cells()
        # These fit 80 columns; fewshot.md has them all.
        kept = [i for i, name in enumerate(head) if name not in ("trained rows", "rows")]
        table = Table(box=None, pad_edge=False)
        for i in kept:
            table.add_column(head[i], justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[i] for i in kept))
        console.print(table)
        counts = sorted({line.rows for line in self.lines})
        console.print(f"over {' to '.join(f'{n:,}' for n in counts[:: max(1, len(counts) - 1)])} rows, and all seeds")
        for note in self.notes:
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=not console.is_terminal)

    def plot(self) -> str:
        """Plot the table into the folder. Return a line that says where everything is, or why there is no plot."""
        found = f"table: {self.out / 'fewshot.json'}, fewshot.md"
        try:
            table = [line.to_json() for line in self.lines]
            return f"{found}; plot: {fewshot_curves(table, self.out / 'fewshot.png', metric=self.metric)}"
        except ConfigError as e:  # matplotlib is an extra
            return f"{found}; no plot: {e}"


def read_ks(ks: str | None, given: Mapping[str, str | None]) -> tuple[list[_K], list[_K], list[_K]]:
    """Return the numbers of examples that are shown, trained on, and both.

    Args:
        ks: `--k`, for every method that is not in `given`; without it only the given methods are run.
        given: the options in_context, tuned and both.
    Raises:
        ConfigError: an option has something other than numbers of examples.
    """
    common = _numbers(ks if ks is not None else "" if any(given.values()) else _DEFAULT, "--k")

    def numbers(name: str, all_rows: bool = False) -> list[_K]:
        text = given[name]
        found = common if text is None else _numbers(text, _option(name))
        if text is not None and _ALL in found and not all_rows:
            raise ConfigError(f"{_option(name)}: all rows cannot be shown in a prompt; give numbers")
        # 0 is zero-shot, which is always run.
        return [k for k in found if k != 0 and (all_rows or k != _ALL)]

    return numbers("in_context"), numbers("tuned", all_rows=True), numbers("both")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-').replace(' ', '-')}"


def _numbers(text: str, option: str) -> list[_K]:
    numbers: list[_K] = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        if part != _ALL and not (part.isascii() and part.isdigit()):
            raise ConfigError(f"{option}: {part!r} is not a number of examples; expected numbers with commas, or all")
        k = _ALL if part == _ALL else int(part)
        if k in numbers:
            raise ConfigError(f"{option}: {part} is given twice")
        numbers.append(k)
    if text.strip() and not numbers:
        raise ConfigError(f"{option}: {text!r} has no numbers; expected some, with commas between")
    return numbers


class _Row(BaseModel):
    row: str | int
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(min_length=1)


class _Kept(BaseModel):
    """What is read from the file of a cell."""

    rows: list[_Row] = Field(min_length=1)
    trained_rows: int
    notes: list[str]

    def scores(self, metric: str) -> dict[_K, float]:
        return {row.row: row.scores[metric] for row in self.rows}


def _read(file: Path, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_json(read_file(file))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file}: cannot be read ({brief(e)}); delete it, and the cell is run again") from e


def tabulate(cells: dict[Cell, _Kept]) -> tuple[str, list[Line]]:
    """Return the metric, and a line per method and number of examples, over the rows that all its seeds have."""
    groups: dict[tuple[str, _K], list[_Kept]] = {}
    for cell, found in cells.items():
        groups.setdefault((cell.method, cell.k), []).append(found)
    zero_shot = groups["zero-shot", 0][0]
    metric = next(iter(zero_shot.rows[0].scores))
    zero = zero_shot.scores(metric)
    lines = []
    for (method, k), group in groups.items():
        seeds = [found.scores(metric) for found in group]
        rows = [row for row in seeds[0] if all(row in own for own in seeds)]
        matrix = np.array([[own[row] for row in rows] for own in seeds])
        estimate = crossed(matrix, bounds=(0.0, 1.0) if metric in BOUNDED else None)
        against = None
        if method != "zero-shot":
            both = [i for i, row in enumerate(rows) if row in zero]
            against = bootstrap(matrix.mean(axis=0)[both], [zero[rows[i]] for i in both], seed=0)
        lines.append(Line(method, k, len(seeds), len(rows), group[0].trained_rows, estimate, against))
    lines.sort(key=lambda line: (_METHODS.index(line.method), math.inf if isinstance(line.k, str) else line.k))
    return metric, lines


# --- few-shot study ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyPlan:
    """What is compared.

    Attributes:
        test: the evaluated rows; `limit` takes the first ones.
        in_context, tuned, both: numbers of examples for each method; `tuned` may have "all".
        seeds: number of seeds; "all", which draws nothing, is run once.
        task: task of the rows; None: choose the most likely label if the recipe's rows have labels, else write a
            completion and compare it with the wanted one.
        least_steps: minimum number of training steps: few rows make few steps.
    """

    test: str
    in_context: Sequence[_K] = (1, 4, 16)
    tuned: Sequence[_K] = (1, 4, 16)
    both: Sequence[_K] = (1, 4, 16)
    seeds: int = 3
    limit: int | None = None
    task: str | None = None
    least_steps: int = 30
    overflow: str = "error"


def fewshot(
    recipe: Path,
    overrides: Sequence[str],
    plan: StudyPlan,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    console: Console,
) -> Study:
    """Run the cells that are not done yet, and tabulate all of them.

    Args:
        out: folder of the study (default: the recipe's run folder with -fewshot).
        overwrite: replace another study in the folder.
    Raises:
        ConfigError, DataError: the plan does not fit the rows; found before training, except for shots that do not fit
            the context.
        CheckpointError: the folder cannot be written.
        KeyboardInterrupt: the study was interrupted; the cells that are done are kept.
    """
    config = load_config(recipe, overrides)
    config = with_format(config) if config.objective == "sft" else config
    _check(config, plan)
    out = out or config.run_dir.with_name(f"{config.run.name}-fewshot")
    if overwrite:
        check_replaceable(out, "fewshot")
    elif out.exists() and not is_of_kind(out, "fewshot", _FILE):
        raise ConfigError(
            f"--out: {out} is not a few-shot study that this version of mlxft made; choose another folder"
        )
    with hold(out):
        return _Job(config, plan, out, overwrite, console).run()


def _check(config: Config, plan: StudyPlan) -> None:
    problems = []
    if config.objective != "sft":
        problems.append(f"objective: expected sft for a few-shot study, found {config.objective}")
    if config.data.shots is not None:
        problems.append(f"data.shots ({config.data.shots}): is set for each cell; leave it out")
    problems += [
        f"data.{name}: is not for a few-shot study; leave it out"
        for name in ("mix", "stream")
        if getattr(config.data, name)
    ]
    if config.data.format not in READ or config.data.format == "text":
        problems.append(f"data.format: rows of {config.data.format} have no completions to compare with")
    test, trained = home_path(plan.test), config.data.train
    files = [Path(path) for path in ([trained] if isinstance(trained, str) else trained)]
    if test.is_file() and any(file.is_file() and test.samefile(file) for file in files):
        problems.append(f"--test: {plan.test} is data.train itself; give a file of other rows")
    if problems:
        raise ConfigError("\n".join(problems))


def default_task(config: Config, train_rows: Sequence[Example]) -> Task:
    """Return the task of the recipe's rows: the most likely label if they have labels, else the written completion."""
    data = config.data
    how: dict[str, Any] = {"name": "few-shot", "format": data.format, "fields": data.fields, "template": data.template}
    labels = labels_of(train_rows)
    if labels is None or len(set(labels)) < 2:  # there is nothing to choose between
        return Task.model_validate({**how, "metrics": ["exact_match"]})
    # Unchanged: if the prompt is plain text, the space before a completion belongs to it.
    items: list[Any] = [item for _, item in train_rows]
    choices = {i.completion if isinstance(i, Completion) else str(i.messages[-1]["content"]) for i in items}
    return Task.model_validate({**how, "choices": sorted(choices), "delimiter": ""})


class _Job:
    """One call of a study."""

    def __init__(self, config: Config, plan: StudyPlan, out: Path, overwrite: bool, console: Console) -> None:
        self.config, self.plan, self.out, self.console = config, plan, out, console
        splits = load_splits(config.data, config.run.seed)
        self.task = read_task(plan.task) if plan.task else default_task(config, splits.train)
        if self.task.kind == "loss":
            raise ConfigError(f"--task {plan.task}: is a loss; few-shot tables need choices or metrics")
        self.cases = make_cases(list(read_rows(plan.test, "test"))[: plan.limit], self.task)
        self.cells = self._cells()
        self.notes = self._notes(splits.train)
        self.shots = {c: self._shots(c) for c in self.cells if c.method in ("in context", "both")}
        self.configs = {c: self._cell_config(c) for c in self.cells if c.method in ("tuned", "both")}
        for config in {c.k: settled(config, resume=False) for c, config in self.configs.items()}.values():
            check_trains(config, self._objective(config))
        self._claim(splits.train, overwrite)

    def _cells(self) -> list[Cell]:
        plan, seeds = self.plan, range(self.plan.seeds)
        cells = [Cell("zero-shot", 0, 0), *(Cell("in context", k, s) for k in plan.in_context for s in seeds)]
        for k in dict.fromkeys([*plan.tuned, *plan.both]):
            for s in seeds if k != _ALL else range(1):  # both cells of a trained model, before the next is trained
                cells += [Cell("tuned", k, s)] if k in plan.tuned else []
                cells += [Cell("both", k, s)] if k in plan.both else []
        return cells

    def _notes(self, train_rows: Sequence[Example]) -> list[str]:
        """Return what makes the table misleading."""
        notes = []
        items: list[Any] = [item for _, item in train_rows]
        prompts = [item.prompt if isinstance(item, Completion) else item.messages[:-1] for item in items]
        trained = {json.dumps(prompt, sort_keys=True) for prompt in prompts}
        also = sum(json.dumps(case.prompt, sort_keys=True) in trained for case in self.cases)
        if also:
            notes.append(f"{also:,} of {len(self.cases):,} evaluated prompts are also among the training rows")
        if self.task.prompt is not None and self.task.prompt != self.config.data.fields.get("prompt"):
            notes.append("the task has a prompt of its own, which differs from the recipe's")
        if _ALL in self.plan.tuned and self.plan.seeds > 1:
            notes.append("all is trained once: its rows are not drawn, and its interval is over rows alone")
        return notes

    def _shots(self, cell: Cell) -> list[Case]:
        seed = self.config.run.seed + cell.seed
        return choose_shots(self.config.data.train, self.task, self.cases, int(cell.k), seed, cell.option)

    def _cell_config(self, cell: Cell) -> Config:
        """Return the recipe of a cell that trains."""
        name = f"tuned-{cell.k}-{cell.seed}"
        run = {"dir": self.out / "runs", "name": name, "seed": self.config.run.seed + cell.seed}
        data = {} if cell.k == _ALL else {"shots": int(cell.k)}
        update = {"run": self.config.run.model_copy(update=run), "data": self.config.data.model_copy(update=data)}
        config = self.config.model_copy(update=update)
        load_splits(config.data, config.run.seed, cell.option)  # raises if there are too few rows
        return config

    def _claim(self, train_rows: Sequence[Example], overwrite: bool) -> None:
        """Mark the folder as that of this study."""
        rows = blake2b(digest_size=12)
        for text in [*(repr(row) for row in train_rows), *(repr((c.prompt, c.answers)) for c in self.cases)]:
            rows.update(text.encode("utf-8", "surrogatepass"))
        about: dict[str, Any] = {
            "recipe": self.config.model_dump(mode="json", exclude={"run": {"name", "dir"}, "versions": True}),
            "task": self.task.model_dump(mode="json"),
            "rows": rows.hexdigest(),
            "least_steps": self.plan.least_steps,
            "overflow": self.plan.overflow,
            "test": len(self.cases),
        }
        file = self.out / _FILE
        clear(self.out)  # what a kill in the first write left
        if overwrite:
            empty(self.out)
        elif file.is_file():
            before = _read(file, dict[str, Any])
            if other := [name for name, value in about.items() if before.get(name) != value]:
                raise ConfigError(
                    f"{self.out} holds another study (other {', '.join(other)}); choose another --out, or replace it "
                    "with --overwrite"
                )
        if is_empty(self.out):
            claim(self.out, "fewshot")
        write_text(file, json_text(about, indent=1) + "\n")

    def run(self) -> Study:
        loaded: tuple[str, Loaded] | None = None
        for number, cell in enumerate(self.cells, 1):
            if self._file(cell).is_file():
                continue
            self._say(f"cell {number} of {len(self.cells)}: {cell.method}, {cell.k} examples, seed {cell.seed}")
            start = time.perf_counter()
            config = self.configs.get(cell)
            name = str(config.run.name) if config else ""
            if loaded is None or loaded[0] != name:
                loaded = None  # frees its memory before the next model is loaded
                gc.collect()
                mx.clear_cache()
                loaded = name, self._tuned(config) if config else self._base()
            self._run_cell(cell, loaded[1], config, start)
        return self._finish()

    def _run_cell(self, cell: Cell, loaded: Loaded, config: Config | None, start: float) -> None:
        """Evaluate a model, and write the file of the cell."""
        shots = self.shots.get(cell, [])
        asking = Asking(overflow=self.plan.overflow, seed=self.config.run.seed)
        result = run_task(loaded, self.cases, self.task, asking, shots=shots, console=self.console)
        begun = [e for e in read_events(config.run_dir) if e["event"] in ("start", "resume")] if config else []
        found = {
            **cell._asdict(),
            "trained_rows": int(begun[0]["data"]["rows"]) if begun else 0,
            "rows": [{k: line[k] for k in ("row", "prediction", "target", "scores")} for line in result.predictions],
            "notes": result.notes,
            "shots": [shot.where for shot in shots],
            "elapsed_s": round(time.perf_counter() - start, 1),
        }
        write_text(self._file(cell), json_text(found) + "\n")
        metric, figure = next(iter(result.figures().items()))
        self._say(f"  {metric} {figure.value:.4f} on {figure.n} rows, {found['elapsed_s']} s")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _base(self) -> Loaded:
        model = self.config.model
        if model.adapter is None:
            return load_base(self.config)
        return load_run(model.path, model.adapter, dtype=model.dtype, trust_remote_code=model.trust_remote_code)

    def _tuned(self, config: Config) -> Loaded:
        """Train a model, or resume its training, unless that is done already; load it."""
        folder = config.run_dir
        begun = (folder / "config.yaml").is_file()
        if not any(e["event"] == "end" for e in read_events(folder)):
            if config.run.steps is None:
                plain = settled(config, resume=False)
                if total_steps(plain, self._objective(plain)) < self.plan.least_steps:
                    run = {"steps": self.plan.least_steps, "epochs": None}
                    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
            train(config, resume=begun, overwrite=not begun and folder.exists(), console=self.console)
        return load_run(folder, trust_remote_code=config.model.trust_remote_code)

    def _objective(self, config: Config) -> Objective:
        m = config.model
        return make_objective(config, load_tokenizer(m.path, m.chat_template, trust_remote_code=m.trust_remote_code))

    def _file(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"

    def _finish(self) -> Study:
        """Tabulate all cells, and write the table as JSON and Markdown."""
        kept: dict[Cell, _Kept] = {cell: _read(self._file(cell), _Kept) for cell in self.cells}
        if len({tuple(row.scores) for found in kept.values() for row in found.rows}) > 1:
            raise ConfigError(f"{self.out / 'cells'}: not all have the same scores; delete those that were altered")
        notes = self.notes + [f"{cell.name}: {note}" for cell, found in kept.items() for note in found.notes]
        study = Study(*tabulate(kept), notes, self.out)
        write_text(self.out / "fewshot.json", json_text(study.to_json(), indent=1) + "\n")
        head, *rows = study.cells()
        table = "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rows])
        write_text(self.out / "fewshot.md", table + "".join(f"\n{note}\n" for note in notes))
        return study
