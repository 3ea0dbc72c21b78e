"""What the pages of `mlxft studio` show and start: the working folder, runs as processes, rows, models, judgements."""

from __future__ import annotations

import fcntl
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from mlxft.errors import ConfigError, DataError, MlxftError
from mlxft.files import HOLDER, is_held
from mlxft.runs import RunInfo, list_runs, may_be_run, read_status, run_info
from mlxft.study.plots import LOSS, LOSS_UNITS, Panel, Series
from mlxft.text import counted, json_text, parse_json, printable, read_file

if TYPE_CHECKING:
    from mlxft.model.sampling import Sampling
    from mlxft.study.compare import Bases
    from mlxft.study.label import Judging, LabelSource

# --- the working folder -----------------------------------------------------------------------------------------------

_SKIPPED = {"node_modules", "adapter", "model", "checkpoints", "site-packages"}
_DEEP, _MOST_FOLDERS, _MOST_FILES = 3, 2000, 300  # a home folder must not take seconds
_NOT_ROWS = re.compile(r"(tokenizer|config|package|vocab|generation_|special_|metrics|samples|status|results).*", re.I)
LOCK = ".mlxft-studio"
_TAIL = 1 << 16  # bytes of a process's output that are shown


class Workplace:
    """A studio's working folder: its runs, recipes and files. Nothing outside it is read, written or started.

    Args:
        root: the folder; the process works in it.
        place: where runs are, inside it.
    Raises:
        ConfigError: `place` is outside.
    """

    def __init__(self, root: Path, place: str = "runs") -> None:
        self.root = root.resolve()
        self.place = self.inside(place)
        self.checks: list[subprocess.Popen[bytes]] = []  # those that are running
        self._jobs: dict[Path, StartedRun] = {}

    def inside(self, name: str) -> Path:
        """Return the path that a request names, with links resolved; raise a ConfigError if it is outside."""
        try:
            path = (self.root / os.path.expanduser(name)).resolve()
        except (OSError, ValueError, RuntimeError) as e:  # a null byte, a loop of links
            raise ConfigError(f"{printable(name)}: is not a path") from e
        if not name or (path != self.root and self.root not in path.parents):
            raise ConfigError(f"{name or 'an empty name'}: is outside the working folder {self.root}")
        return path

    def name(self, path: Path) -> str:
        """Return a path relative to the working folder."""
        return path.relative_to(self.root).as_posix()

    def files(self, suffixes: Sequence[str]) -> list[str]:
        """Return the files with these suffixes in the folder and three levels below it, without hidden ones."""
        found: list[str] = []
        for at, folders, files in islice(os.walk(self.root), _MOST_FOLDERS):
            here = Path(at)
            deep = len(here.relative_to(self.root).parts)
            folders[:] = sorted(f for f in folders if deep < _DEEP and f[0] != "." and f not in _SKIPPED)
            folders[:] = [f for f in folders if not may_be_run(here / f)]
            if "config.json" not in files:  # the folder of a model
                found += [self.name(here / f) for f in sorted(files) if f[0] != "." and f.endswith(tuple(suffixes))]
        real = ((name, (self.root / name).resolve()) for name in found[:_MOST_FILES])
        return [name for name, path in real if self.root in path.parents]

    def recipes(self) -> list[str]:
        """Return the YAML files that look like recipes."""

        def fits(name: str) -> bool:
            with suppress(OSError), (self.root / name).open("rb") as file:
                return re.search(rb"^(objective|model|data)\s*:", file.read(1 << 16), re.M) is not None
            return False

        return [name for name in self.files((".yaml", ".yml")) if fits(name)]

    def data_files(self) -> list[str]:
        """Return the files that may hold rows."""
        from mlxft.data.sources import READERS

        return [name for name in self.files(tuple(READERS)) if not _NOT_ROWS.fullmatch(Path(name).name)]

    # Runs

    def runs(self) -> list[RunInfo]:
        """Return the runs, the latest first; each is named by its path in the working folder."""
        found = [r.dir for r in list_runs(self.place, every=True)] if self.place.is_dir() else []
        known = dict.fromkeys([*found, *(f for f in self._jobs if may_be_run(f))])
        infos = [run_info(folder, self.name(folder)) for folder in known if folder.resolve() == folder]
        return sorted(infos, key=lambda r: (r.started, r.name), reverse=True)

    def run(self, name: str) -> Path:
        """Return the folder of a run, or of one that has just been started; raise a ConfigError if there is none."""
        folder = self.inside(name)
        if folder not in self._jobs and not (folder.is_dir() and may_be_run(folder)):
            raise ConfigError(f"{name}: no such run in {self.root}")
        for part in ("config.yaml", "metrics.jsonl", "status.json"):
            self.inside(f"{self.name(folder)}/{part}")
        return folder

    def job(self, folder: Path) -> StartedRun | None:
        """Return the process that this studio has started for a run."""
        return self._jobs.get(folder)

    def start(self, recipe: str, overrides: Sequence[str]) -> str:
        """Start a run as a process that outlives the studio, and return its name.

        Raises:
            ConfigError: the recipe or an override is wrong, or the run exists.
        """
        from mlxft.config import load_config

        path = self.inside(recipe)
        self.check_overrides(overrides)
        folder = self.inside(str(load_config(path, overrides).run_dir))
        if (job := self._jobs.get(folder)) is not None and job.runs:
            raise ConfigError(f"{self.name(folder)}: is running")
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{self.name(folder)} exists; resume it, or give another run.name=NAME")
        self._launch(folder, [self.name(path), *overrides])
        return self.name(folder)

    def resume(self, name: str) -> None:
        """Resume a run that was interrupted; raise a ConfigError if it is running."""
        folder = self.run(name)
        job = self._jobs.get(folder)
        if is_held(folder) or (job is not None and job.runs):
            raise ConfigError(f"{name}: is running")
        self._launch(folder, ["--resume", self.name(folder)])

    def _launch(self, folder: Path, arguments: list[str]) -> None:
        if arguments[0].startswith("-") and arguments[0] != "--resume":
            raise ConfigError(f"{arguments[0]}: a recipe's name must not begin with -")
        log = tempfile.TemporaryFile()  # noqa: SIM115  it is without a name, and both processes keep it open
        # A session of its own: neither Ctrl-C in the studio's terminal nor the end of that terminal reaches it.
        process = subprocess.Popen(
            [sys.executable, "-m", "mlxft", "train", *arguments],
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._jobs[folder] = StartedRun(process, log.fileno(), log)

    def stop(self, name: str) -> None:
        """Stop a run as Ctrl-C does: it ends after the step, with a checkpoint.

        The signal goes to the process that holds the folder, whatever a status.json says, which may be a stranger's.

        Raises:
            ConfigError: it does not run on this machine.
        """
        folder = self.run(name)
        job = self._jobs.get(folder)
        if job is not None and job.runs:
            job.process.send_signal(signal.SIGTERM)
            return
        holder = ""
        with suppress(OSError, ValueError):
            holder = read_file(folder / HOLDER).decode()
        pid = (read_status(folder) or {}).get("pid")
        if not is_held(folder) or holder != f"{pid} on {platform.node()}":
            raise ConfigError(f"{name}: is not running on this machine")
        with suppress(ProcessLookupError):
            os.kill(int(pid or 0), signal.SIGTERM)

    def check_overrides(self, overrides: Sequence[str]) -> None:
        """Refuse an override that is not KEY=VALUE, or that names a file or folder outside, but for the model's."""
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
                raise ConfigError(f"{text}: expected KEY=VALUE")
            if key not in ("model.path", "distill.teacher"):
                for part in _texts(value):
                    if "/" in part or part.startswith(("~", "..")):
                        self.inside(part.removeprefix("file://"))

    @contextmanager
    def held(self, address: str) -> Iterator[None]:
        """Hold the working folder for one studio.

        Raises:
            ConfigError: another studio works here; the message has its address.
        """
        path = self.root / LOCK
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            except OSError as e:
                raise ConfigError(f"cannot write {path}: {e.strerror}") from e
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                other = os.read(fd, 500).decode("utf-8", "replace")
                os.close(fd)
                raise ConfigError(f"a studio works in this folder already: {other}") from e
            except OSError:  # a file system without locks
                break
            with suppress(OSError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    break
            os.close(fd)  # the studio before has just removed it
        try:
            os.truncate(fd, 0)
            os.write(fd, address.encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)


def _texts(value: str) -> Iterator[str]:
    """Yield the texts in a value as YAML reads it."""
    try:
        todo = [yaml.safe_load(value)]
    except yaml.YAMLError:
        todo = [value]
    while todo:
        found = todo.pop()
        todo += list(found) if isinstance(found, list) else [*found, *found.values()] if isinstance(found, dict) else []
        if isinstance(found, str):
            yield found


@dataclass
class StartedRun:
    """A run's process that this studio has started, and the file with its output."""

    process: subprocess.Popen[bytes]
    fd: int
    file: Any  # it stays open as long as this object

    @property
    def runs(self) -> bool:
        """Return whether it is running."""
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        """Return whether it has ended with an error, and not by Stop."""
        return self.process.poll() not in (None, 0, 130)

    @property
    def printed(self) -> int:
        """Return how many bytes it has printed."""
        return os.fstat(self.fd).st_size

    @property
    def output(self) -> str:
        """Return the end of what it has printed."""
        size = self.printed
        return printable(os.pread(self.fd, _TAIL, max(0, size - _TAIL)).decode("utf-8", "replace"))


# --- rows -------------------------------------------------------------------------------------------------------------

_LENGTHS = 2000  # rows whose lengths are counted
_SHOWN = 20
_BINS = 24
_CHECK_SECONDS = 600.0


class Bin(NamedTuple):
    """Number of rows with a length from `low` to `high`."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Inspected:
    """Rows of a file, as they are trained or as they are.

    Attributes:
        problems: what training would refuse, as `mlxft check` prints it; "" if it would accept the rows.
        facts: as `mlxft check --json` prints them.
        rows: the first ones, as `mlxft.check.preview` returns them; or a place and JSON.
        unit: of the lengths: tokens, or characters where no recipe is named.
        counted: number of rows whose lengths are in `lengths`.
    """

    problems: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    unit: str = "tokens"
    lengths: list[Bin] = field(default_factory=list)
    counted: int = 0


def inspect_recipe(work: Workplace, recipe: str, overrides: Sequence[str]) -> Inspected:
    """Return what `mlxft check` knows of a recipe and its rows; it runs in a process of its own."""
    work.check_overrides(overrides)
    command = [sys.executable, "-m", "mlxft", "check", "--json", "--rows", str(_LENGTHS), "--"]
    command += [work.name(work.inside(recipe)), *overrides]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=work.root, **pipes) as process:
        work.checks.append(process)
        try:
            out, err = process.communicate(timeout=_CHECK_SECONDS)
        except subprocess.TimeoutExpired as e:
            raise DataError(f"{recipe}: mlxft check took over {_CHECK_SECONDS:.0f} s; run it in a terminal") from e
        finally:
            process.kill()
            work.checks.remove(process)
    problems = printable(err.decode("utf-8", "replace")).strip()
    try:
        facts = parse_json(out)
    except ValueError:
        return Inspected(problems or "mlxft check printed nothing")
    rows = facts.pop("previews", [])
    lengths = [_tokens(row) for row in rows]
    return Inspected(problems, facts, rows[:_SHOWN], "tokens", bins(lengths), len(lengths))


def _tokens(row: dict[str, Any]) -> int:
    """Return the tokens of a preview; of a pair, those of the prompt and the longer completion."""
    if "tokens" in row:
        return int(row["tokens"])
    return int(row["prompt_tokens"]) + max(int(row.get(f"{k}_tokens", 0)) for k in ("chosen", "rejected", "completion"))


def inspect_file(work: Workplace, name: str) -> Inspected:
    """Return the rows of a file as they are, the format that they look like, and what cannot be read."""
    from mlxft.data.formats import as_settings, recognise
    from mlxft.data.sources import Problem, read_rows

    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    read = list(islice(read_rows(str(work.inside(name)), "train"), _LENGTHS))
    for row in read:
        if isinstance(row, Problem):
            problems.append(f"{row.where}: {row.text}")
            continue
        text = json_text(row.data, indent=2, default=str)
        lengths.append(len(json_text(row.data, default=str)))
        if len(rows) < _SHOWN:
            rows.append({"row": row.where, "text": text})
    facts: dict[str, Any] = {}
    try:
        found = recognise(read, name=name)
        facts["read_as"] = as_settings(found.format, found.fields)
    except DataError as e:
        problems.append(str(e))
    return Inspected("\n".join(problems[:_SHOWN]), facts, rows, "characters", bins(lengths), len(lengths))


def bins(lengths: Sequence[int]) -> list[Bin]:
    """Return a histogram with bins of equal width."""
    if not lengths:
        return []
    low, width = min(lengths), max(1, -(-(max(lengths) - min(lengths) + 1) // _BINS))
    counts = [0] * -(-(max(lengths) - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [Bin(low + i * width, low + (i + 1) * width - 1, n) for i, n in enumerate(counts)]


# --- models -----------------------------------------------------------------------------------------------------------

BASE_NAME = "base"


class Playground:
    """Completes prompts by a base and by runs that were tuned on it, one completion at a time.

    The base is loaded once, and adapters are swapped. MLX is used in one thread only, `worker`.
    """

    def __init__(self) -> None:
        self.worker = ThreadPoolExecutor(1, "mlx")
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._bases: Bases | None = None  # from the first completion on

    @staticmethod
    def offers(run: RunInfo) -> bool:
        """Return whether a run can complete prompts: it has trained weights, and is not a reward model."""
        return run.objective != "reward" and any((run.dir / part).is_dir() for part in ("adapter", "model"))

    def stop(self) -> None:
        """End the completion that is being written."""
        self._stop.set()

    def close(self) -> None:
        """End, and wait for what MLX still computes: its threads would abort an interpreter that ends before them."""
        self.stop()
        self.worker.submit(self._drop).result()
        self.worker.shutdown()

    def _drop(self) -> None:
        if self._bases is not None:
            import mlx.core as mx
            from mlx_lm.generate import generation_stream

            self._bases.clear()
            for stream in (mx.default_stream(mx.default_device()), generation_stream):
                mx.synchronize(stream)

    def begin(
        self,
        runs: Sequence[tuple[str, Path]],
        base: bool,
        prompt: list[dict[str, Any]],
        sampling: Sampling,
        seed: int,
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        """Complete a prompt by each model in turn, in the worker; return at once.

        Args:
            runs: names and folders; base: also by the base of the first, which goes first.
            say: called with {"model", "text"} for each piece, {"model", "done"} or {"error"}, and {"end"} at last.
        Raises:
            ConfigError: no model is named, or another completion is being written.
        """
        if not runs:
            raise ConfigError("choose a run")
        if not self._busy.acquire(blocking=False):
            raise ConfigError("another completion is being written; stop it first")
        self._stop.clear()
        asked = [(BASE_NAME, runs[0][1], True)] * base + [(name, folder, False) for name, folder in runs]

        def work() -> None:
            try:
                for name, folder, bare in asked:
                    if not self._stop.is_set():
                        self._complete(name, folder, bare, prompt, sampling, seed, say)
            except (MlxftError, OSError, RuntimeError, MemoryError) as e:
                say({"error": printable(str(e)) or type(e).__name__})
            finally:
                self._busy.release()
                say({"end": True})

        self.worker.submit(work)

    def _complete(
        self,
        name: str,
        folder: Path,
        bare: bool,
        prompt: list[dict[str, Any]],
        sampling: Sampling,
        seed: int,
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        from mlxft.study.compare import Bases, base_source, model_source, stream_each

        say({"model": name, "state": "loading"})
        self._bases = self._bases or Bases(most=1)
        model = self._bases.open(base_source([str(folder)]) if bare else model_source(str(folder)))
        say({"model": name, "state": "writing"})
        begun = time.monotonic()
        for _, piece in stream_each([model], prompt, sampling, seed=seed, until=self._stop.is_set):
            say({"model": name, "text": printable(piece)})
        took = time.monotonic() - begun
        say({"model": name, "done": f"{'stopped after ' if self._stop.is_set() else ''}{took:.1f} s"})


# --- judgements -------------------------------------------------------------------------------------------------------


class Desk:
    """Files of judgements that are open, each as `mlxft label` opens it."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[ExitStack, Judging, str]] = {}

    def open(self, prompts: Path, out: Path, source: LabelSource) -> None:
        """Open prompts and the file of their judgements; if `out` is open already, close it first.

        Raises:
            ConfigError, DataError: as for `mlxft label`.
        """
        from mlxft.files import reserved
        from mlxft.study.label import judging
        from mlxft.text import make_console

        self.close(out)
        with ExitStack() as stack:
            stack.enter_context(reserved(out))
            quiet = make_console(quiet=True)
            session = stack.enter_context(judging(str(prompts), out, source, quiet))
            self._open[out] = stack.pop_all(), session, str(prompts)

    def session(self, out: Path) -> Judging | None:
        """Return the open judgements in a file, None if it is not open."""
        found = self._open.get(out)
        return None if found is None else found[1]

    def names(self) -> list[Path]:
        """Return the files that are open."""
        return list(self._open)

    def close(self, out: Path | None = None) -> None:
        """Close a file, if it is open; None: all."""
        for path in [out] if out is not None else self.names():
            if (found := self._open.pop(path, None)) is not None:
                found[0].close()

    def press(self, out: Path, task_id: str, key: str) -> None:
        """Do what a key says for a prompt: 1 and 2 to 9 choose as shown, 0 is a tie, s skips, u undoes.

        A key for a prompt that is judged already is ignored: a browser may send a form twice.
        """
        from mlxft.study.label import TIE

        session = self.session(out)
        if session is None:
            raise ConfigError(f"{out.name}: is not open; open it again")
        found = session.next()
        if task_id != ("" if found is None else found[1].id):
            return
        if key == "u" or found is None:
            session.undo()
            return
        task = found[1]
        if key == "s":
            session.skip(task)
        elif key == "0":
            session.record(task, TIE)
        elif key.isdecimal() and 1 <= int(key) <= len(task.completions):
            session.record(task, session.order(task)[int(key) - 1])
        else:
            raise ConfigError(f"{printable(key)[:20]!r}: expected 1 to {len(task.completions)}, 0, s or u")


# --- charts -----------------------------------------------------------------------------------------------------------
# Plots as coordinates, which the templates write as SVG.

WIDTH, HEIGHT = 460, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 10, 26
_MOST_POINTS, _MOST_ROWS = 300, 100


class ChartLine(NamedTuple):
    """A line: its points as SVG has them, the same as [x, step, value] for the pointer, and the last value."""

    label: str
    colour: int
    dashed: bool
    points: str
    values: list[tuple[float, float, float]]
    last: float


@dataclass(frozen=True)
class Chart:
    """A plot.

    Attributes:
        across, up: ticks as (place, text).
        bars: x, y, width, height and what each says.
        head, rows: the same as a table.
    """

    title: str
    unit: str
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    lines: list[ChartLine] = field(default_factory=list)
    bars: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    @property
    def said(self) -> str:
        """Return the plot in a sentence, for who cannot see it."""
        ends = "; ".join(f"{line.label} from {line.values[0][2]:.4g} to {line.last:.4g}" for line in self.lines)
        return (
            f"{self.title}{self.unit and ', ' + self.unit}: {ends}" if ends else f"{self.title}: {len(self.bars)} bars"
        )


class _Axis:
    """Maps numbers from `low` to `high` to places on a plot."""

    def __init__(self, low: float, high: float, start: float, end: float, whole: bool = False) -> None:
        if high <= low:
            low, high = (
                (low - 0.5, high + 0.5) if low == 0 or whole else (low - abs(low) * 0.05, high + abs(low) * 0.05)
            )
        self.low, self.high, self.start, self.end, self.whole = low, high, start, end, whole

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        rough = (self.high - self.low) / most
        ten = 10.0 ** math.floor(math.log10(rough))
        wide = next(ten * n for n in (1, 2, 5, 10) if ten * n >= rough)
        wide = max(1.0, wide) if self.whole else wide
        first = math.ceil(self.low / wide - 1e-9)
        values = [n * wide for n in range(first, math.floor(self.high / wide + 1e-9) + 1)]
        return [(self(v), f"{v:,.0f}" if self.whole or wide >= 10 else f"{v:.4g}") for v in values]


def charts(drawn: Sequence[tuple[Panel, Series]], objective: str = "") -> list[Chart]:
    """Return the plots of a run's panels, or of several runs' (`mlxft.study.plots`)."""
    found = (_chart(panel, lines, objective) for panel, lines in drawn)
    return [chart for chart in found if chart is not None]


def _chart(panel: Panel, lines: Series, objective: str) -> Chart | None:
    sound = {label: [(x, y) for x, y in zip(*line) if math.isfinite(y)] for label, line in lines.items()}
    sound = {label: points for label, points in sound.items() if points}
    every = [point for points in sound.values() for point in points]
    if not every:
        return None
    low, high = min(y for _, y in every), max(y for _, y in every)
    if panel.share or panel.amount:
        low, high = 0.0, 1.0 if panel.share else 1.05 * high
    x = _Axis(min(p[0] for p in every), max(p[0] for p in every), _LEFT, WIDTH - _RIGHT, whole=True)
    y = _Axis(low, high, HEIGHT - _BOTTOM, _TOP)
    names = list(dict.fromkeys(_owner(label) for label in sound))
    drawn = []
    for label, points in sound.items():
        values = [(x(at), at, value) for at, value in _thinned(points)]
        dashed = label.endswith("validation")
        path = " ".join(f"{place},{y(value)}" for place, _, value in values)
        drawn.append(ChartLine(label, names.index(_owner(label)) % 6, dashed, path, values, points[-1][1]))
    by_step: dict[float, dict[str, float]] = {}
    for label, points in sound.items():
        for at, value in points:
            by_step.setdefault(at, {})[label] = value
    steps = sorted(by_step)
    kept = steps[:: -(-len(steps) // _MOST_ROWS)]
    rows = [
        [f"{at:,.0f}", *(f"{by_step[at][k]:.4g}" if k in by_step[at] else "" for k in sound)]
        for at in dict.fromkeys([*kept, steps[-1]])
    ]
    unit = LOSS_UNITS.get(objective, "") if panel in LOSS else panel.unit
    return Chart(panel.title, unit, x.ticks(), y.ticks(4), drawn, head=["step", *sound], rows=rows)


def _owner(label: str) -> str:
    """Return what a line is of: a run's training and its validation have one colour."""
    return label.removesuffix(", validation").removesuffix(", training")


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return few enough points to draw: the lowest and the highest of each stretch, and the ends."""
    if len(points) <= _MOST_POINTS:
        return points
    size = -(-2 * len(points) // _MOST_POINTS)
    kept = [points[0]]
    for i in range(0, len(points), size):
        part = points[i : i + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def histogram(found: Sequence[Bin], unit: str) -> Chart | None:
    """Return a plot of lengths, None if there are none."""
    if not found:
        return None
    x = _Axis(found[0].low, found[-1].high + 1, _LEFT, WIDTH - _RIGHT, whole=True)
    y = _Axis(0, max(b.rows for b in found), HEIGHT - _BOTTOM, _TOP)
    bars, rows = [], []
    for low, high, count in found:
        left, top = x(low), y(count)
        lengths = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        bars.append(
            (
                left,
                top,
                max(0.5, x(high + 1) - left - 1),
                HEIGHT - _BOTTOM - top,
                f"{lengths}: {counted(count, 'rows')}",
            )
        )
        rows.append([lengths, f"{count:,}"])
    up = [(place, text) for place, text in y.ticks(4) if "." not in text]
    return Chart("Lengths", unit, x.ticks(), up, bars=bars, head=[unit, "rows"], rows=rows)
