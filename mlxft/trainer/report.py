"""Report a run's events: to the terminal, to files, and to trackers (wandb, TensorBoard, trackio, mlflow)."""

from __future__ import annotations

import contextlib
import html
import importlib.util
import io
import json
import math
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlxft.errors import ConfigError, missing_extra
from mlxft.files import write_text, writing
from mlxft.text import (
    VALUE,
    Event,
    notebook_place,
    parse_json,
    printable,
    progress_html,
    read_file,
    validation_figure,
)

if TYPE_CHECKING:
    from mlxft.config import ReportSettings

# --- report -----------------------------------------------------------------------------------------------------------
# Report the events of a run: to metrics.jsonl, and to the terminal as a live view or as plain lines.

LOSS_METRICS = (
    "approx_kl",
    "clip_fraction",
    "ratio_mean",
    "value_loss",
)  # metrics of a step, in addition to those of its rollout
BARS = "▁▂▃▄▅▆▇█"


class Stopped(Exception):
    """Raised by a sink to end a run; `run_status` is the status to record: pruned or interrupted."""

    def __init__(self, text: str, run_status: str = "pruned") -> None:
        super().__init__(text)
        self.run_status = run_status


class Sink(Protocol):
    """A receiver of events."""

    def event(self, event: Event) -> None:
        """Receive one event."""
        ...

    def close(self) -> None:
        """Close the sink; there are no more events."""
        ...


class EventFile:
    """Write metrics.jsonl or samples.jsonl: one object per line, flushed at once.

    Args:
        resume_at: keep the existing lines up to this step; None means start over.
        kinds: kinds of events to write; None means all. A file for some kinds is created with its first event.
    """

    def __init__(self, path: Path, resume_at: int | None, kinds: tuple[str, ...] | None = None) -> None:
        kept: list[str] = []
        if resume_at is not None and path.exists():
            # Steps after the checkpoint are trained again, so their old lines would appear twice.
            with suppress(OSError, ValueError):  # a file that cannot be read as text is replaced
                kept = [line for line in read_file(path).decode().splitlines() if _until(line, resume_at)]
        if kinds is None or path.exists():
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._path, self._kinds = path, kinds
        self._file: TextIO | None = None

    def event(self, event: Event) -> None:
        if self._kinds is not None and event["event"] not in self._kinds:
            return
        safe = {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in event.items()}
        with writing(self._path):
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8", errors="backslashreplace")
            self._file.write(json.dumps(safe, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported when the line was written
            if self._file is not None:
                self._file.close()


def _until(line: str, step: int) -> bool:
    try:
        event = parse_json(line)
    except ValueError:  # cut short by a kill
        return False
    return bool(event.get("step", 0) <= step and event.get("event") not in ("end", "interrupted"))


def sparkline(values: list[float]) -> str:
    """Return a one-line plot of some numbers."""
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[min(7, int((v - low) / span * 8))] for v in values)


def skipped(event: Event) -> str:
    """Return a warning that counts the batches without a trained token, or ""."""
    count = event.get("skipped_batches", 0)
    return f"; skipped {count} batch{'es' if count != 1 else ''} without a trained token" if count else ""


def _norm(event: Event) -> str:
    """Return the norm of the gradient, or "" if there is none: a step may train a critic only."""
    return f"grad_norm {event['grad_norm']:.3f} " if "grad_norm" in event else ""


def _epoch(event: Event) -> str:
    """Return the passes over the data, or "" if the objective does not say how long one is."""
    return f"{event['epoch']:.2f}" if "epoch" in event else ""


def _waits(event: Event) -> str:
    """Return the seconds that each rank has waited for slower ones, or "" if there is one process."""
    waited = [value for name, value in event.items() if name.startswith("wait_s/rank")]
    return f" ranks waited {', '.join(f'{value:.2g}' for value in waited)} s" if waited else ""


def event_line(event: Event) -> str:
    """Return an event as one line of text."""
    kind = event["event"]
    if kind == "rollout":
        numbers = " ".join(f"{k} {v:.4g}" for k, v in event.items() if isinstance(v, float) and k != "elapsed_s")
        warning = f"; warning: {event['warning']}" if "warning" in event else ""
        return f"rollout {event['rollout']} {numbers}{warning}"
    if kind == "train":
        known = {"event", "step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_s"}
        known |= {"trained_tokens_per_s", "peak_memory_gb", "elapsed_s", "skipped_batches"}
        known |= {k for k in event if k.startswith(("rows/", "trained_tokens/"))}  # of a mixture's sources
        known |= {k for k in event if "/rank" in k}
        if "rollout" in event:  # the rollout's line has the other metrics
            known |= {k for k in event if k not in LOSS_METRICS}
        extra = "".join(f" {k} {v:.4g}" for k, v in event.items() if k not in known)
        epoch = f" epoch {_epoch(event)}" if _epoch(event) else ""
        return (
            f"step {event['step']}{epoch} loss {event['loss']:.4f}{extra} lr {event['lr']:.2e} "
            f"{_norm(event)}{event['trained_tokens_per_s']:.0f} trained tokens/s "
            f"peak {event['peak_memory_gb']:.2f} GB{_waits(event)}{skipped(event)}"
        )
    if kind == "eval":
        known = {"loss", VALUE, "elapsed_s", "best"}
        extra = "".join(f" {k} {v:.4g}" for k, v in event.items() if isinstance(v, float) and k not in known)
        name, value = validation_figure(event)
        return f"step {event['step']} validation {name} {value:.4f}{extra}{' (best)' if event['best'] else ''}"
    if kind == "sample":
        score = f" (score {event['score']:.4g})" if "score" in event else ""
        return f"step {event['step']} {event['prompt']!r} -> {event['answer']!r}{score}"
    if kind == "failed":
        return f"training failed after step {event['step']}"  # the error itself gives the reason
    return str(event.get("text", kind))


class Plain:
    """Print events as lines, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def event(self, event: Event) -> None:
        self._console.print(event_line(event), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class LiveView:
    """Show a view that is updated in place: metrics, a plot of the recent loss, and the time left."""

    def __init__(self, console: Console, total: int, step: int) -> None:
        self._console = console
        self._train: Event = {}
        self._eval: Event = {}
        self._losses: deque[float] = deque(maxlen=40)
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=total, completed=step)
        self._live = Live(self._view(), console=console, refresh_per_second=4)
        self._live.start()

    def recall(self, events: Iterable[Event]) -> None:
        """Add events from before this view began, without printing them."""
        for event in events:
            if event["event"] == "train":
                self._train = event
                self._losses.append(event["loss"])
                task = self._progress.tasks[self._task]
                task.start_time = task.get_time() - event["elapsed_s"]
            elif event["event"] == "eval":
                self._eval = event
        self._live.update(self._view())

    def event(self, event: Event) -> None:
        kind = event["event"]
        if kind == "train":
            self._train = event
            self._losses.append(event["loss"])
            self._progress.update(self._task, completed=event["step"])
        elif kind == "eval":
            self._eval = event
        if kind not in ("train",):
            self._live.console.print(event_line(event), markup=False, highlight=False)
        self._live.update(self._view())

    def _view(self) -> Group:
        t, e = self._train, self._eval
        grid = Table.grid(padding=(0, 2))
        grid.add_row("loss", f"{t['loss']:.4f}" if t else "...", Text(sparkline(list(self._losses)), style="cyan"))
        if e:
            name, value = validation_figure(e)
            at = f"{name} at step {e['step']}{' (best)' if e['best'] else ''}"
            grid.add_row("validation", f"{value:.4f}", at)
        if t:
            grid.add_row("epoch", _epoch(t), f"lr {t['lr']:.2e} {_norm(t)}")
            if "rollout" in t:
                far = f"KL {t['kl']:.3f}, " if "kl" in t else ""
                lengths = f"{far}{t['response_tokens']:.1f} tokens per completion"
                grid.add_row("reward", f"{t['reward']:.4f}", lengths)
            grid.add_row("speed", f"{t['trained_tokens_per_s']:.0f}", "trained tokens/s")
            grid.add_row("memory", f"{t['peak_memory_gb']:.2f}", "GB peak")
            if skipped(t):
                grid.add_row("skipped", str(t["skipped_batches"]), "batches without a trained token")
        return Group(self._progress, grid)

    def close(self) -> None:
        self._live.update(self._view())
        self._live.stop()


class NotebookView:
    """Show progress, the curve of the loss and the latest messages in a notebook, in one place that is updated."""

    _EVERY = 0.3  # seconds between two updates
    _LINES = 12  # messages that are shown

    def __init__(self, show: Callable[[str], None], total: int, step: int) -> None:
        self._show, self._total, self._step = show, total, step
        self._train: list[tuple[int, float]] = []
        self._valid: list[tuple[int, float]] = []
        self._lines: deque[str] = deque(maxlen=self._LINES)
        self._now, self._drawn = "", 0.0
        self._draw()

    def event(self, event: Event) -> None:
        kind = event["event"]
        if kind == "train":
            self._step, self._now = event["step"], event_line(event)
            self._train.append((event["step"], event["loss"]))
        else:
            self._lines.append(event_line(event))
            if kind == "eval":
                self._valid.append((event["step"], event["loss"]))
        if time.monotonic() - self._drawn > self._EVERY:
            self._draw()

    def _draw(self) -> None:
        lines = "\n".join([self._now, *self._lines] if self._now else self._lines)
        curves = curve_svg(self._train, self._valid)
        head = progress_html(self._step, self._total, "steps")
        self._show(f"<div>{head}</div>{curves}<pre>{html.escape(printable(lines))}</pre>")
        self._drawn = time.monotonic()

    def close(self) -> None:
        self._draw()


def curve_svg(
    train: Sequence[tuple[int, float]], valid: Sequence[tuple[int, float]] = (), width: int = 360, height: int = 120
) -> str:
    """Return lines through (step, loss) as SVG, with the first and the last loss; "" for less than two points."""
    train, valid = ([(x, y) for x, y in points if math.isfinite(y)] for points in (train, valid))
    if len(train) < 2:
        return ""
    steps, losses = zip(*train, *valid)
    low, high, first = min(losses), max(losses), min(steps)
    across, up = (width - 10) / max(1, max(steps) - first), (height - 10) / ((high - low) or 1.0)
    parts, said = [], []
    for name, points, colour in (("training", train, "currentColor"), ("validation", valid, "#d97706")):
        if not points:
            continue
        line = " ".join(f"{5 + (x - first) * across:.1f},{height - 5 - (y - low) * up:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        said.append(f"{name} loss, step {points[0][0]} to {points[-1][0]}: {points[0][1]:.4g} to {points[-1][1]:.4g}")
    title = "; ".join(said)
    picture = f'<svg width="{width}" height="{height}" role="img"><title>{title}</title>{"".join(parts)}</svg>'
    return f"{picture}<div>{title}</div>"


class Reporter:
    """Send each event to every sink."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def event(self, event: Event) -> None:
        """Send one event."""
        for sink in self._sinks:
            sink.event(event)

    def say(self, text: str, step: int = 0) -> None:
        """Send a message as an event."""
        self.event({"event": "message", "step": step, "text": text})

    def close(self) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            sink.close()


def terminal(console: Console, total: int, step: int) -> Sink:
    """Return a live view if there is a terminal or a notebook, else a printer of lines."""
    if (show := notebook_place(console)) is not None:
        return NotebookView(show, total, step)
    return LiveView(console, total, step) if console.is_terminal and sys.stdout.isatty() else Plain(console)


# --- trackers ---------------------------------------------------------------------------------------------------------
# Send metrics to the experiment trackers in `report.to`; each is a sink of events with its own library.
#
# All are off by default. A failure in a tracker is reported once and ends that tracker, never the training:
# metrics.jsonl has everything anyway.

IDS_FILE = "trackers.json"
_KINDS = ("train", "eval", "rollout")  # events with numbers; the others are messages


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


class Service(Protocol):
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


BACKENDS: dict[str, Callable[[About], Service]] = {
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
        self._backend: Service | None = None
        self._outcome, self._step, self._failed = "failed", about.step, False

    def event(self, event: dict[str, Any]) -> None:
        kind, self._step = event["event"], event["step"]
        if kind in ("start", "resume"):
            self._safely(self._open)
        elif kind in _KINDS and (backend := self._backend) is not None:
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


def make_trackers(report: ReportSettings, folder: Path, settings: dict[str, Any], step: int) -> list[Tracker]:
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
