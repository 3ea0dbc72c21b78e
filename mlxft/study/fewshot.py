"""The cells of `mlxft fewshot`, the numbers of examples it is asked for, and its table: as JSON, text and picture."""

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
from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from mlxft.build import load_base, make_objective, settled
from mlxft.check import check_trains
from mlxft.config import Config, load_config
from mlxft.data.dataset import load_splits
from mlxft.data.formats import Completion, Example, labels_of
from mlxft.data.sources import read_rows
from mlxft.errors import ConfigError
from mlxft.files import check_replaceable, claim, clear, empty, hold, is_empty, is_of_kind, write_text
from mlxft.model.folder import brief
from mlxft.model.load import Loaded, load_tokenizer
from mlxft.objectives.base import Objective
from mlxft.run import total_steps, train
from mlxft.runs import load_run, read_events
from mlxft.study.evaluate import Evaluated, run_task
from mlxft.study.stats import Estimate, Interval, bootstrap, crossed
from mlxft.study.tasks import READ, Case, Task, choose_shots, make_cases, read_task
from mlxft.text import home_path, json_text, parse_json, read_file

# --- fewshot ----------------------------------------------------------------------------------------------------------
# `mlxft fewshot`: what a few examples bring, shown in the prompt, trained on, and both, next to none at all.
#
# A cell is one model asked one way: a method, a number of examples and a seed. Each is kept as a file when it is done,
# so that a study that was stopped goes on, and grows by other numbers of examples and more seeds.

_FILE = "study.json"  # what is compared, and with what


@dataclass(frozen=True)
class StudyPlan:
    """What is compared.

    Attributes:
        in_context, tuned, both: numbers of examples for each method; `tuned` may have "all".
        seeds: how many; of "all", which draws nothing, only the first is run.
        test: the evaluated rows; `limit` takes the first ones.
        task: how they are asked; None: as the recipe's rows are, by the likeliest label where they have labels, else
            by whether the written answer is the wanted one.
        least_steps: of a tuned cell, whatever the recipe's epochs give: few rows make few steps.
    """

    test: str
    in_context: Sequence[int] = (1, 4, 16)
    tuned: Sequence[_K] = (1, 4, 16)
    both: Sequence[int] = (1, 4, 16)
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
    """Run what is not done yet, and tabulate all.

    Args:
        out: the study's folder; default: the recipe's run folder with -fewshot.
        overwrite: start over in a folder that holds another study.
    Raises:
        ConfigError, DataError: found before anything is trained, shots that overflow the context aside.
        CheckpointError: the folder can not be written.
        KeyboardInterrupt: interrupted; what is done stays.
    """
    config = load_config(recipe, overrides)
    _check(config, plan)
    out = out or config.run_dir.with_name(f"{config.run.name}-fewshot")
    _check_out(out, overwrite)
    with hold(out):
        return _Study(config, plan, out, overwrite, console).run()


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that is something else."""
    if overwrite:
        check_replaceable(out, "fewshot")
    elif out.exists() and not is_of_kind(out, "fewshot", _FILE):
        raise ConfigError(
            f"--out: {out} is not empty, and holds no few-shot study that this version of mlxft made; choose another"
        )


def _check(config: Config, plan: StudyPlan) -> None:
    problems = []
    if config.objective != "sft":
        problems.append(f"objective: few-shot studies are of sft, not {config.objective}")
    if config.data.shots is not None:
        problems.append(f"data.shots ({config.data.shots}): is set for each cell; leave it out")
    if config.data.format not in READ or config.data.format == "text":
        problems.append(f"data.format: {config.data.format} has no answers to compare with")
    train_file, test = Path(config.data.train), home_path(plan.test)
    if test.is_file() and train_file.is_file() and test.samefile(train_file):
        problems.append(f"--test: {plan.test} is data.train itself; name rows that nothing is trained on")
    if problems:
        raise ConfigError("\n".join(problems))


def default_task(config: Config, train_rows: Sequence[Example]) -> Task:
    """How the recipe's rows are asked: by the likeliest label where they have labels, else by the written answer."""
    data = config.data
    how: dict[str, Any] = {"name": "few-shot", "format": data.format, "fields": data.fields, "template": data.template}
    labels = labels_of(train_rows)
    if labels is None or len(set(labels)) < 2:  # there is nothing to choose between
        return Task.model_validate({**how, "metrics": ["exact_match"]})
    # As they stand: where a prompt is plain text, the space before an answer belongs to it.
    items = [item for _, item in train_rows]
    said = {i.completion if isinstance(i, Completion) else str(i.messages[-1]["content"]) for i in items}  # type: ignore[union-attr]
    return Task.model_validate({**how, "choices": sorted(said), "delimiter": ""})


class _Study:
    """One study: its rows, its cells and its folder."""

    def __init__(self, config: Config, plan: StudyPlan, out: Path, overwrite: bool, console: Console) -> None:
        self.config, self.plan, self.out, self.console = config, plan, out, console
        splits = load_splits(config.data, config.run.seed)
        self.task = read_task(plan.task) if plan.task else default_task(config, splits.train)
        if self.task.kind == "loss":
            raise ConfigError(f"--task {plan.task}: is a loss; few-shot tables want choices or metrics")
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
        cells = [Cell("zero-shot", 0, 0)]
        cells += [Cell("in context", k, s) for k in plan.in_context for s in seeds]
        ks = list(dict.fromkeys([*plan.tuned, *plan.both]))
        for k in ks:  # a tuned model is asked both ways before the next one is trained
            for s in seeds if k != _ALL else range(1):
                cells += [Cell("tuned", k, s)] if k in plan.tuned else []
                cells += [Cell("both", k, s)] if k in plan.both else []
        return cells

    def _notes(self, train_rows: Sequence[Example]) -> list[str]:
        """What makes the table say something else than it seems to."""
        notes = []
        own = {json.dumps(_asked(item), sort_keys=True) for _, item in train_rows}
        also = sum(json.dumps(case.prompt, sort_keys=True) in own for case in self.cases)
        if also:
            notes.append(f"{also:,} of {len(self.cases):,} evaluated prompts are also among the training rows")
        if self.task.prompt is not None and self.task.prompt != self.config.data.fields.get("prompt"):
            notes.append("the task asks by a prompt of its own, which is not the one that the recipe trains on")
        if _ALL in self.plan.tuned and self.plan.seeds > 1:
            notes.append("all is trained once: its rows are not drawn, and its interval is over rows alone")
        return notes

    def _shots(self, cell: Cell) -> list[Case]:
        seed = self.config.run.seed + cell.seed
        return choose_shots(self.config.data.train, self.task, self.cases, int(cell.k), seed, cell.option)

    def _cell_config(self, cell: Cell) -> Config:
        """The recipe for a tuned cell."""
        name = f"tuned-{cell.k}-{cell.seed}"
        run = {"dir": self.out / "runs", "name": name, "seed": self.config.run.seed + cell.seed}
        data = {} if cell.k == _ALL else {"shots": int(cell.k)}
        update = {"run": self.config.run.model_copy(update=run), "data": self.config.data.model_copy(update=data)}
        config = self.config.model_copy(update=update)
        load_splits(config.data, config.run.seed, cell.option)  # refuses what there are not enough rows for
        return config

    def _claim(self, train_rows: Sequence[Example], overwrite: bool) -> None:
        """The folder, for this study alone."""
        digest = blake2b(digest_size=12)
        for where in [*(repr(row) for row in train_rows), *(repr((c.prompt, c.answers)) for c in self.cases)]:
            digest.update(where.encode("utf-8", "surrogatepass"))
        recipe = self.config.model_dump(mode="json", exclude={"run": {"name", "dir"}, "versions": True})
        about: dict[str, Any] = {
            "recipe": recipe,
            "task": self.task.model_dump(mode="json"),
            "rows": digest.hexdigest(),
        }
        about |= {"least_steps": self.plan.least_steps, "overflow": self.plan.overflow, "test": len(self.cases)}
        file = self.out / _FILE
        clear(self.out)  # a kill at the first write
        _check_out(self.out, overwrite)
        if overwrite:
            empty(self.out)
        elif file.is_file():
            before = _read(file)
            if other := [name for name, value in about.items() if before.get(name) != value]:
                raise ConfigError(
                    f"{self.out} holds another study (other {', '.join(other)}); choose another --out, or replace it "
                    "with --overwrite"
                )
        if is_empty(self.out):
            claim(self.out, "fewshot")
        write_text(file, json_text(about, indent=1) + "\n")

    def run(self) -> Study:
        base: Loaded | None = None
        tuned: tuple[str, Loaded] | None = None
        for number, cell in enumerate(self.cells, 1):
            if self._file(cell).is_file():
                continue
            self._say(f"cell {number} of {len(self.cells)}: {cell.method}, {cell.k} examples, seed {cell.seed}")
            start = time.perf_counter()
            if cell.method in ("zero-shot", "in context"):
                base = base or self._base()
                self._keep(cell, self._ask(base, cell), 0, start)
                continue
            base = None  # its memory, before the next one's
            config = self.configs[cell]
            if tuned is None or tuned[0] != config.run.name:
                tuned = None
                gc.collect()
                mx.clear_cache()
                tuned = (str(config.run.name), self._tuned(config))
            self._keep(cell, self._ask(tuned[1], cell), self._trained_rows(config), start)
        return self._finish()

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _base(self) -> Loaded:
        model = self.config.model
        return (
            load_base(self.config)
            if model.adapter is None
            else load_run(model.path, model.adapter, dtype=model.dtype, trust_remote_code=model.trust_remote_code)
        )

    def _tuned(self, config: Config) -> Loaded:
        """The trained model; what was trained before, or in part, is gone on with."""
        folder = config.run_dir
        begun = (folder / "config.yaml").is_file()
        if not any(e["event"] == "end" for e in read_events(folder)):
            train(self._with_steps(config), resume=begun, overwrite=not begun and folder.exists(), console=self.console)
        return load_run(folder, trust_remote_code=config.model.trust_remote_code)

    def _objective(self, config: Config) -> Objective:
        m = config.model
        return make_objective(config, load_tokenizer(m.path, m.chat_template, trust_remote_code=m.trust_remote_code))

    def _with_steps(self, config: Config) -> Config:
        if config.run.steps is not None:
            return config
        plain = settled(config, resume=False)
        if total_steps(plain, self._objective(plain)) >= self.plan.least_steps:
            return config
        run = {"steps": self.plan.least_steps, "epochs": None}
        return config.model_copy(update={"run": config.run.model_copy(update=run)})

    def _trained_rows(self, config: Config) -> int:
        return next(int(e["data"]["rows"]) for e in read_events(config.run_dir) if e["event"] in ("start", "resume"))

    def _ask(self, loaded: Loaded, cell: Cell) -> Evaluated:
        shots = self.shots.get(cell, [])
        how: dict[str, Any] = {"overflow": self.plan.overflow, "seed": self.config.run.seed, "console": self.console}
        return run_task(loaded, self.cases, self.task, shots=shots, **how)

    def _file(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"

    def _keep(self, cell: Cell, result: Evaluated, trained_rows: int, start: float) -> None:
        predictions = [{k: line[k] for k in ("row", "prediction", "target", "scores")} for line in result.predictions]
        found: dict[str, Any] = {**cell._asdict(), "trained_rows": trained_rows, "rows": predictions}
        found["notes"] = result.notes
        found["shots"] = [shot.where for shot in self.shots.get(cell, [])]
        found["elapsed_s"] = round(time.perf_counter() - start, 1)
        write_text(self._file(cell), json_text(found) + "\n")
        metric, figure = next(iter(result.figures().items()))
        self._say(f"  {metric} {figure.value:.4f} on {figure.n} rows, {found['elapsed_s']} s")

    def _finish(self) -> Study:
        """The table of all cells, as JSON, text and a picture."""
        kept = {cell: _read(self._file(cell), _Kept) for cell in self.cells}
        if len({tuple(row["scores"]) for found in kept.values() for row in found["rows"]}) > 1:
            raise ConfigError(f"{self.out / 'cells'}: not all have the same scores; delete those that were altered")
        notes = [*self.notes]
        for cell, found in kept.items():
            notes += [f"{cell.name}: {note}" for note in found["notes"]]
        study = Study(*tabulate(kept), notes, self.out)
        write_text(self.out / "fewshot.json", json_text(study.to_json(), indent=1) + "\n")
        write_text(self.out / "fewshot.md", _markdown(study))
        return study


def _asked(item: Any) -> Any:
    return item.prompt if isinstance(item, Completion) else item.messages[:-1]


class _Row(BaseModel):
    row: str | int
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(min_length=1)


class _Kept(BaseModel):
    """What the file of a cell must hold."""

    rows: list[_Row] = Field(min_length=1)
    trained_rows: int
    notes: list[str]


def _read(file: Path, schema: type[BaseModel] | None = None) -> dict[str, Any]:
    try:
        found = parse_json(read_file(file))
        if not isinstance(found, dict):
            raise ValueError("an object was written")
        if schema is not None:
            schema.model_validate(found)
        return found
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file}: can not be read ({brief(e)}); delete it, and the cell is run again") from e


# --- fewshot tables ---------------------------------------------------------------------------------------------------

_DEFAULT = "0,1,4,16"
_ALL = "all"
_METHODS = ("zero-shot", "in context", "tuned", "both")
BOUNDED = ("accuracy", "accuracy_norm", "exact_match", "contains", "regex", "number", "f1", "json")
_K = int | str


class Cell(NamedTuple):
    """A method, its number of examples (tuned: of each label) and which of the seeds."""

    method: str
    k: _K
    seed: int

    @property
    def name(self) -> str:
        """Its file's."""
        return f"{self.method.replace(' ', '-')}-{self.k}-{self.seed}"

    @property
    def option(self) -> str:
        """What asks for it, for messages."""
        return f"{_option(self.method)} or --k"


class Line(NamedTuple):
    """A line of the table: a method at a number of examples, over its seeds.

    Attributes:
        against: the difference to zero-shot on the same rows, None for zero-shot itself.
        trained_rows: what was trained on, 0 where nothing was.
    """

    method: str
    k: _K
    seeds: int
    rows: int
    trained_rows: int
    estimate: Estimate
    against: Interval | None

    def to_json(self) -> dict[str, Any]:
        """As fewshot.json has it."""
        e, a = self.estimate, self.against
        line: dict[str, Any] = {"method": self.method, "k": self.k, "seeds": self.seeds, "rows": self.rows}
        line |= {"trained_rows": self.trained_rows, "value": e.value, "se": e.se, "low": e.low, "high": e.high}
        return line | {"against_zero_shot": a and a._asdict()}


@dataclass(frozen=True)
class Study:
    """A finished study."""

    metric: str
    lines: list[Line]
    notes: list[str]
    out: Path

    def to_json(self) -> dict[str, Any]:
        """As fewshot.json has it."""
        table = [line.to_json() for line in self.lines]
        return {"metric": self.metric, "confidence": 0.95, "table": table, "notes": self.notes, "out": str(self.out)}


def read_ks(ks: str | None, given: Mapping[str, str | None]) -> tuple[list[int], list[_K], list[int]]:
    """Numbers of examples shown, trained on, and both.

    Args:
        ks: `--k`, for every method that is not in `given`; without it only those that are given are run.
        given: in_context, tuned and both, None where not given.
    Raises:
        ConfigError: what is no number of examples.
    """
    common = ks if ks is not None else _DEFAULT if not any(given.values()) else ""

    def numbers(name: str) -> list[_K]:
        text = given[name]
        found = _numbers(common, "--k") if text is None else _numbers(text, _option(name))
        return [k for k in found if k != 0]  # none is zero-shot, which is always run

    def shown(name: str) -> list[int]:
        found = numbers(name)
        if _ALL in found and given[name] is not None:
            raise ConfigError(f"{_option(name)}: all rows can not be shown in a prompt; give numbers")
        return [k for k in found if isinstance(k, int)]

    return shown("in_context"), numbers("tuned"), shown("both")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-').replace(' ', '-')}"


def _numbers(text: str, option: str) -> list[_K]:
    numbers: list[_K] = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        if part != _ALL and not (part.isascii() and part.isdigit()):
            raise ConfigError(f"{option}: {part!r} is no number of examples; expected numbers with commas, or all")
        k = _ALL if part == _ALL else int(part)
        if k in numbers:
            raise ConfigError(f"{option}: {part} is given twice")
        numbers.append(k)
    if text.strip() and not numbers:
        raise ConfigError(f"{option}: {text!r} has no numbers; expected some, with commas between")
    return numbers


def show_study(console: Console, study: Study) -> None:
    """The table, and what there is to say of it."""
    head, *rows = cells_of(study)
    # 80 columns have room for these; fewshot.md has them all.
    kept = [i for i, name in enumerate(head) if name not in ("trained rows", "rows")]
    table = Table(box=None, pad_edge=False)
    for i in kept:
        table.add_column(head[i], justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    console.print(table)
    counts = sorted({line.rows for line in study.lines})
    console.print(f"over {' to '.join(f'{n:,}' for n in counts[:: max(1, len(counts) - 1)])} rows, and all seeds")
    for note in study.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _draw(study: Study) -> str:
    """Draw the table beside it. Returns where it all is, or why there is no picture."""
    from mlxft.study.plots import fewshot_curves as plot

    rows = [
        {"k": 0 if line.method == "zero-shot" else line.k, "method": line.method}
        | {"value": line.estimate.value, "low": line.estimate.low, "high": line.estimate.high}
        for line in study.lines
    ]
    try:
        picture = plot(rows, study.out / "fewshot.png", metric=study.metric)
    except ConfigError as e:  # matplotlib is an extra
        return f"table: {study.out / 'fewshot.json'}, fewshot.md; no picture: {e}"
    return f"table: {study.out / 'fewshot.json'}, fewshot.md; picture: {picture}"


def tabulate(cells: dict[Cell, dict[str, Any]]) -> tuple[str, list[Line]]:
    """The metric, and a line for each method and number of examples, over the rows that all its seeds answered."""
    groups: dict[tuple[str, _K], list[dict[str, Any]]] = {}
    for cell, found in cells.items():
        groups.setdefault((cell.method, cell.k), []).append(found)
    metric = next(iter(next(iter(cells.values()))["rows"][0]["scores"]))
    scores = {key: [_scores(found, metric) for found in group] for key, group in groups.items()}
    zero = scores["zero-shot", 0][0]
    lines = []
    for (method, k), seeds in scores.items():
        rows = [row for row in seeds[0] if all(row in own for own in seeds)]
        matrix = np.array([[own[row] for row in rows] for own in seeds])
        estimate = crossed(matrix, bounds=(0.0, 1.0) if metric in BOUNDED else None)
        against = None
        if method != "zero-shot":
            both = [i for i, row in enumerate(rows) if row in zero]
            against = bootstrap(matrix.mean(axis=0)[both], [zero[rows[i]] for i in both], seed=0)
        trained = groups[method, k][0]["trained_rows"]
        lines.append(Line(method, k, len(seeds), len(rows), trained, estimate, against))
    lines.sort(key=lambda line: (_METHODS.index(line.method), math.inf if isinstance(line.k, str) else line.k))
    return metric, lines


def _scores(found: dict[str, Any], metric: str) -> dict[str, float]:
    return {row["row"]: float(row["scores"][metric]) for row in found["rows"]}


def cells_of(study: Study) -> list[list[str]]:
    """The table as texts: a header, then a line for each method and number of examples."""
    table = [["method", "examples", "trained rows", "seeds", "rows", study.metric, "95 % interval", "to zero-shot"]]
    for line in study.lines:
        e, a = line.estimate, line.against
        gain = "" if a is None else f"{a.difference:+.3f} [{a.low:+.3f}, {a.high:+.3f}]"
        each = line.method == "tuned" and line.k != _ALL and line.trained_rows > int(line.k)
        few = f"{line.k} a label" if each else str(line.k)
        interval = f"[{e.low:.3f}, {e.high:.3f}]"
        trained = f"{line.trained_rows:,}" if line.trained_rows else ""
        table.append([line.method, few, trained, str(line.seeds), str(line.rows), f"{e.value:.3f}", interval, gain])
    return table


def _markdown(study: Study) -> str:
    """The table and its notes for a README."""
    head, *rows = cells_of(study)
    lines = [head, ["---"] * len(head), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "".join(f"\n{note}\n" for note in study.notes)
