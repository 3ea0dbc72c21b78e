"""Report the events of a run: to metrics.jsonl, and to the terminal as a live view or as plain lines."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlxft.files import write_text, writing
from mlxft.text import parse_json, read_file

Event = dict[str, Any]
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


def describe(event: Event) -> str:
    """Return an event as one line of text."""
    kind = event["event"]
    if kind == "rollout":
        numbers = " ".join(f"{k} {v:.4g}" for k, v in event.items() if isinstance(v, float) and k != "elapsed_s")
        warning = f"; warning: {event['warning']}" if "warning" in event else ""
        return f"rollout {event['rollout']} {numbers}{warning}"
    if kind == "train":
        known = {"event", "step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_s"}
        known |= {"trained_tokens_per_s", "peak_memory_gb", "elapsed_s", "skipped_batches"}
        if "rollout" in event:  # the rollout's line has the other metrics
            known |= {k for k in event if k not in LOSS_METRICS}
        extra = "".join(f" {k} {v:.4g}" for k, v in event.items() if k not in known)
        return (
            f"step {event['step']} epoch {event['epoch']:.2f} loss {event['loss']:.4f}{extra} lr {event['lr']:.2e} "
            f"{_norm(event)}{event['trained_tokens_per_s']:.0f} trained tokens/s "
            f"peak {event['peak_memory_gb']:.2f} GB{skipped(event)}"
        )
    if kind == "eval":
        extra = "".join(
            f" {k} {v:.4g}" for k, v in event.items() if isinstance(v, float) and k not in ("loss", "elapsed_s", "best")
        )
        return f"step {event['step']} validation loss {event['loss']:.4f}{extra}{' (best)' if event['best'] else ''}"
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
        self._console.print(describe(event), markup=False, highlight=False, soft_wrap=True)

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
            self._live.console.print(describe(event), markup=False, highlight=False)
        self._live.update(self._view())

    def _view(self) -> Group:
        t, e = self._train, self._eval
        grid = Table.grid(padding=(0, 2))
        grid.add_row("loss", f"{t['loss']:.4f}" if t else "...", Text(sparkline(list(self._losses)), style="cyan"))
        if e:
            grid.add_row("validation", f"{e['loss']:.4f}", f"at step {e['step']}{' (best)' if e['best'] else ''}")
        if t:
            grid.add_row("epoch", f"{t['epoch']:.2f}", f"lr {t['lr']:.2e} {_norm(t)}")
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
    """Return a live view if there is a terminal, else a printer of lines."""
    return LiveView(console, total, step) if console.is_terminal and sys.stdout.isatty() else Plain(console)
