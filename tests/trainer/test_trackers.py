"""Trackers hold the numbers of metrics.jsonl; one that fails says so once and never stops training; resume goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlxft.config import parse_config
from mlxft.errors import ConfigError
from mlxft.run import train
from mlxft.runs import open_run

Recipe = Callable[..., dict[str, Any]]
NAMES = ("wandb", "trackio", "mlflow")


class Library:
    """Stands for wandb, trackio and mlflow: notes what it is given, and fails where it is told to."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.closed: list[Any] = []
        self.values: dict[str, list[tuple[int, float]]] = {}
        self.fails_at: int | None = None
        self.offline, self.url = True, None

    def take(self, numbers: dict[str, float], step: int) -> None:
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("the server\nis away")
        for name, value in numbers.items():
            self.values.setdefault(name, []).append((step, value))

    def init(self, project: str, **given: Any) -> Library:
        self.opened.append({"project": project, **given})
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.take(numbers, step)

    def finish(self, exit_code: int = 0) -> None:
        self.closed.append(exit_code)

    # MLflow's client
    tracking_uri = "file:nowhere"

    def get_experiment_by_name(self, name: str) -> Any:
        self.opened.append({"project": name})
        return SimpleNamespace(experiment_id="1")

    def create_run(self, experiment: str, run_name: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="id-1"))

    def update_run(self, run_id: str, status: str) -> None:
        self.opened.append({"id": run_id})

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        for name, value, _, step in metrics:
            self.take({name: value}, step)

    def set_terminated(self, run_id: str, status: str) -> None:
        self.closed.append(status)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Library]:
    """Modules in the place of those that need accounts and servers."""
    found = {name: Library() for name in NAMES}
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.__dict__.update(init=found[name].init, finish=found[name].finish, Settings=dict)
        monkeypatch.setitem(sys.modules, name, module)
    mlflow, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    mlflow.__dict__["MlflowClient"] = lambda: found["mlflow"]
    entities.__dict__.update(Metric=lambda *given: given, Param=lambda *given: given)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return found


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every number of metrics.jsonl, by the name that trackers give it."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in open_run(folder).metrics():
        for key, value in event.items() if event["event"] in ("train", "eval", "rollout") else ():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
                found.setdefault(f"{event['event']}/{key}", []).append((event["step"], value))
    return found


def test_each_tracker_holds_the_numbers_of_metrics_jsonl(recipe: Recipe, libraries: dict[str, Library]) -> None:
    settings = recipe(**{"data.valid": 0.2, "run.eval_at_start": True, "report": {"to": [*NAMES]}})
    run = train(settings)
    wanted = expected(run.dir)
    assert {"train/loss", "train/grad_norm", "eval/loss", "train/tokens"} <= set(wanted)
    assert len(wanted["train/loss"]) == 4
    for name, library in libraries.items():
        assert library.values == wanted, name
        assert library.opened[0]["project"] == "mlxft"
    assert [libraries[name].closed for name in NAMES] == [[0], [0], ["FINISHED"]]
    assert libraries["wandb"].opened[0]["config"]["optim.lr"] == 0.01
    assert libraries["wandb"].opened[0]["settings"] == {"silent": True, "console": "off"}


def test_tensorboards_own_reader_reads_our_files(recipe: Recipe) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe(**{"data.valid": 0.2, "run.eval_every": 2, "report": {"to": ["tensorboard"]}}))
    reader = EventAccumulator(str(run.dir / "tensorboard")).Reload()
    wanted = expected(run.dir)
    assert set(reader.Tags()["scalars"]) == set(wanted)
    for name, values in wanted.items():
        found = [(e.step, e.value) for e in reader.Scalars(name)]
        assert found == [(step, float(np.float32(value))) for step, value in values]


def test_steps_that_a_resumed_run_trains_again_stand_once_in_tensorboard(recipe: Recipe) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = recipe(**{"run.save_every": 2, "report": {"to": ["tensorboard"]}})
    run = train(settings)
    (run.dir / "checkpoints/step-4/state.json").unlink()  # as if killed before it was whole
    train(settings, resume=True)
    values = expected(run.dir)["train/loss"]
    assert [step for step, _ in values] == [1, 2, 3, 4]
    reader = EventAccumulator(str(run.dir / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in reader.Scalars("train/loss")] == [(s, float(np.float32(v))) for s, v in values]


def test_a_resumed_run_goes_on_in_the_same_place_or_says_that_it_does_not(
    recipe: Recipe, libraries: dict[str, Library]
) -> None:
    settings = recipe(**{"optim.schedule": "constant", "optim.warmup": 0, "report": {"to": ["wandb", "trackio"]}})
    run = train(settings)
    ids = json.loads((run.dir / "trackers.json").read_text())
    settings["run"]["steps"] = 6
    settings["report"] = {"to": [*NAMES], "project": "mine"}
    train(settings, resume=True)
    first, second = libraries["wandb"].opened
    assert first["id"] == second["id"] == ids["wandb"]
    first, second = libraries["trackio"].opened
    assert (first["name"], first["resume"]) == (ids["trackio"], "never")
    assert (second["name"], second["resume"], second["project"]) == (ids["trackio"], "allow", "mine")
    assert [s for s, _ in libraries["trackio"].values["train/loss"]] == [1, 2, 3, 4, 5, 6]
    said = [e["text"] for e in run.metrics("message")]
    assert [t for t in said if "a new run there" in t] == [
        "mlflow: MLflow at file:nowhere; this is a new run there, without the first 4 steps"
    ]


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_failure_is_told_once_and_training_goes_on(
    fails_at: int, recipe: Recipe, libraries: dict[str, Library], capsys: pytest.CaptureFixture[str]
) -> None:
    libraries["wandb"].fails_at = fails_at
    run = train(recipe(report={"to": ["wandb", "trackio"]}))
    warning = "warning: nothing more is sent to wandb: the server is away; training continues"
    assert [e["text"] for e in run.metrics("message")].count(warning) == 1
    assert capsys.readouterr().out.count(warning) == 1
    assert libraries["trackio"].values == expected(run.dir)
    assert [s for s, _ in libraries["wandb"].values.get("train/loss", [])] == [1, 2][:fails_at]
    assert run.metrics("end")[0]["step"] == 4


def test_a_tracker_that_can_not_even_begin_does_not_stop_training(
    recipe: Recipe, libraries: dict[str, Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**given: Any) -> None:
        raise SystemExit("log in first")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    run = train(recipe(report={"to": ["wandb"]}))
    assert any("nothing more is sent to wandb: log in first" in e["text"] for e in run.metrics("message"))
    assert run.metrics("end")


def test_trackers_are_off_unless_asked_for(recipe: Recipe, libraries: dict[str, Library]) -> None:
    run = train(recipe())
    assert all(not library.opened for library in libraries.values())
    assert not (run.dir / "trackers.json").exists()


def test_a_missing_package_is_said_before_anything_is_written(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    settings = recipe(report={"to": ["trackio"]})
    with pytest.raises(ConfigError, match=r"report\.to: trackio: .* pip install 'mlxft\[trackio\]'"):
        train(settings)
    assert not Path(settings["run"]["dir"]).exists()


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"to": ["wandb", "wandb"]}, "twice"),
        ({"to": ["tensorboard"], "project": "p"}, r"project \(p\) needs wandb, trackio or mlflow"),
        ({"to": ["wandlb"]}, "wandlb"),
    ],
)
def test_settings_that_would_not_act_are_refused(report: dict[str, Any], told: str, recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_config(recipe(report=report))
