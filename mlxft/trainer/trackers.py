"""Send metrics to the experiment trackers in `report.to`; each is a sink of events with its own library.

All are off by default. A failure in a tracker is reported once and ends that tracker, never the training:
metrics.jsonl has everything anyway.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlxft.config import Report
from mlxft.errors import ConfigError, missing_extra
from mlxft.files import write_text
from mlxft.text import parse_json, read_file

IDS_FILE = "trackers.json"
KINDS = ("train", "eval", "rollout")  # events with numbers; the others are messages


@dataclass(frozen=True)
class About:
    """The run that is tracked.

    Args:
        settings: dotted name -> value of each setting that has one.
        known: the tracker's id of this run, if the run is resumed.
        step: the last step before this start.
    """

    project: str | None
    folder: Path
    settings: dict[str, Any]
    known: str | None
    step: int


class Backend(Protocol):
    """Interface to one library. `id` identifies the run there; `where` says where users find it."""

    id: str
    where: str

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Log the numbers of one event."""
        ...

    def close(self, outcome: str) -> None:
        """Close the run as done, interrupted or failed."""
        ...


class Wandb:
    """Weights & Biases. Its environment variables apply (WANDB_MODE, WANDB_PROJECT, ...)."""

    def __init__(self, about: About) -> None:
        import wandb

        self.id = about.known or secrets.token_hex(4)
        # A step that is trained again after a kill is already logged; wandb ignores the second one.
        self._run = wandb.init(
            project=about.project or os.environ.get("WANDB_PROJECT") or "mlxft",
            name=about.folder.name,
            id=self.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(about.folder),
            config=about.settings,
            settings=wandb.Settings(silent=True, console="off"),  # mlxft writes to the terminal
        )
        self.where = str(about.folder / "wandb") if self._run.offline else str(self._run.url)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self, outcome: str) -> None:
        self._run.finish(exit_code=int(outcome != "done"))


class Trackio:
    """Trackio, local unless its environment variables name a Space or a server."""

    def __init__(self, about: About) -> None:
        import trackio

        # Trackio identifies a run by its name, so the name must be unique.
        self.id = about.known or f"{about.folder.name}-{secrets.token_hex(3)}"
        project = about.project or "mlxft"
        resume = "allow" if about.known else "never"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(project, name=self.id, config=about.settings, resume=resume, embed=False)
        self.where = f"trackio show --project {project}"

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self, outcome: str) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


class Tensorboard:
    """Event files in the run folder, written by the `tensorboard` package without torch or tensorflow."""

    def __init__(self, about: About) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = about.folder / "tensorboard"
        resumed = folder.is_dir()
        self.id, self.where = folder.name, f"tensorboard --logdir {folder}"
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if resumed:  # steps that a killed run wrote after its checkpoint are trained and written again
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=about.step + 1, session_log=start))

    def log(self, numbers: dict[str, float], step: int) -> None:
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self, outcome: str) -> None:
        self._writer.close()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI."""

    _MOST = 100  # parameters per request

    def __init__(self, about: About) -> None:
        # A server that does not respond must not delay training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        self.where = f"MLflow at {self._client.tracking_uri}"
        if about.known:
            self.id = about.known
            self._client.update_run(self.id, "RUNNING")
            return
        name = about.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "mlxft"
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.id = self._client.create_run(experiment, run_name=about.folder.name).info.run_id
        params = [Param(k, str(v)[:500]) for k, v in about.settings.items()]
        for i in range(0, len(params), self._MOST):
            self._client.log_batch(self.id, params=params[i : i + self._MOST])

    def log(self, numbers: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[self._metric(k, v, now, step) for k, v in numbers.items()])

    def close(self, outcome: str) -> None:
        status = {"done": "FINISHED", "interrupted": "KILLED"}.get(outcome, "FAILED")
        self._client.set_terminated(self.id, status)


BACKENDS: dict[str, Callable[[About], Backend]] = {
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


class Tracker:
    """A sink that sends the numbers of events to a tracker, named by kind: train/loss, eval/loss, rollout/kl.

    Args:
        remember: stores the tracker's id of the run for a resume.
    Attributes:
        tell: called with each message for the user, and the step.
    """

    def __init__(self, name: str, about: About, remember: Callable[[str, str], None]) -> None:
        self.tell: Callable[[str, int], None] = lambda text, step: None
        self._name, self._about, self._remember = name, about, remember
        self._backend: Backend | None = None
        self._outcome, self._step, self._failed = "failed", about.step, False

    def event(self, event: dict[str, Any]) -> None:
        kind, self._step = event["event"], event["step"]
        if kind in ("start", "resume"):
            self._safely(self._open)
        elif kind in KINDS and (backend := self._backend) is not None:
            # type() leaves out flags such as best, which isinstance() counts as int.
            numbers = {f"{kind}/{k}": float(v) for k, v in event.items() if type(v) in (int, float) and k != "step"}
            self._safely(lambda: backend.log(numbers, self._step))
        self._outcome = {"end": "done", "interrupted": "interrupted"}.get(kind, self._outcome)

    def close(self) -> None:
        if (backend := self._backend) is not None:
            self._safely(lambda: backend.close(self._outcome))

    def _open(self) -> None:
        about = self._about
        self._backend = backend = BACKENDS[self._name](about)
        self._remember(self._name, backend.id)
        new = about.step and not about.known
        missing = f"; this is a new run there, without the first {about.step} steps" if new else ""
        self.tell(f"{self._name}: {backend.where}{missing}", self._step)

    def _safely(self, do: Callable[[], None]) -> None:
        try:
            do()
        except (Exception, SystemExit) as e:  # training continues, whatever the error
            self._backend = None
            if not self._failed:
                self._failed = True
                reason = " ".join(str(e).split()) or type(e).__name__
                self.tell(f"warning: nothing more is sent to {self._name}: {reason}; training continues", self._step)


def check_installed(names: Sequence[str]) -> None:
    """Raise a ConfigError before training if a tracker's package is missing."""
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ConfigError(f"report.to: {name}: {missing_extra(name, name)}")


def make_trackers(report: Report, folder: Path, settings: dict[str, Any], step: int) -> list[Tracker]:
    """Return the trackers that a recipe asks for.

    Args:
        settings: dotted name -> value.
        step: the last step that is done, from a resumed run's checkpoint.
    """
    ids: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        ids = dict(parse_json(read_file(folder / IDS_FILE)))

    def remember(name: str, found: str) -> None:
        ids[name] = found
        write_text(folder / IDS_FILE, json.dumps(ids, indent=2) + "\n")

    return [Tracker(name, About(report.project, folder, settings, ids.get(name), step), remember) for name in report.to]
