"""mlxft label: judge completions by hand, sampled from one or two models or read from a file, in random order."""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import signal
import sys
import termios
import tty
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import Field
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlxft.config import Settings, read_settings
from mlxft.data.formats import (
    Message,
    Ranked,
    in_our_fields,
    list_at,
    read_preference,
    read_prompts,
    string_at,
    tools_of,
    unwritten,
    with_usual_names,
)
from mlxft.data.sources import Problem, Row, read_rows, report_lines
from mlxft.errors import ConfigError, DataError, MlxftError
from mlxft.files import check_file, flush, is_stream
from mlxft.study.stats import wilson
from mlxft.text import parse_json

if TYPE_CHECKING:
    from mlxft.model.load import Loaded
    from mlxft.model.sampling import Sampling


# --- judgements -------------------------------------------------------------------------------------------------------
# Files of judgements, which survive a kill, and their statistics: win rates and agreement.

_T = TypeVar("_T")
_Row = dict[str, Any]
TIE = "tie"
_BEGIN = b'{"id": '  # of each line


class Journal:
    """A jsonl file to which lines are appended; each is on the disk before `append` returns.

    Only one process at a time may open it. The last line can be removed by truncating the file, so the file is complete
    at any moment; a line that a kill left incomplete is removed when the file is opened.

    Raises:
        ConfigError: the file cannot be opened, or another process has opened it.
        DataError: a line is not a JSON object with an id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[_Row] = []
        check_file(path, overwrite=True)
        self._was_empty = path.exists() and not path.stat().st_size
        if is_stream(path):
            raise ConfigError(
                f"--out: {path} is a device or a pipe, which cannot be continued; give the name of a file"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as e:
            raise ConfigError(f"--out: cannot write {path}: {e.strerror or e}") from e
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise ConfigError(
                    f"--out: another mlxft label is writing {path}; end it, or choose another file"
                ) from e
            self._read()
            flush(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self) -> None:
        raw = self.path.read_bytes()
        end = raw.rfind(b"\n") + 1
        tail = raw[end:]
        # Remove only what begins as a line of ours does: another program's file stays as it is.
        torn = _object(tail) is None and (tail.startswith(_BEGIN) or _BEGIN.startswith(tail))
        for number, line in enumerate((raw[:end] if torn else raw).splitlines(), 1):
            row = _object(line)
            if row is None or not {"id", "turn"} <= row.keys():
                raise DataError(f"{self.path}:{number}: not a line that mlxft label wrote; choose another --out")
            self.rows.append(row)
        if tail and torn:
            self._truncate(end)
        elif tail:  # only the newline is missing
            self._write(b"\n")

    def append(self, row: _Row) -> None:
        """Add a line and write it to the disk."""
        start = os.fstat(self._fd).st_size
        try:
            self._write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        except OSError as e:
            self._truncate(start)
            raise MlxftError(f"cannot write {self.path}: {e.strerror or e}; earlier judgements are safe") from e
        self.rows.append(row)

    def undo(self) -> _Row:
        """Remove the last line, and return it."""
        raw = self.path.read_bytes()
        self._truncate(raw.rfind(b"\n", 0, -1) + 1)
        return self.rows.pop()

    def close(self) -> None:
        """Release the file, and delete it if it is empty and was not there before."""
        if not self._was_empty and os.fstat(self._fd).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        os.fsync(self._fd)


def _object(line: bytes) -> _Row | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class WinRate(NamedTuple):
    """How often one model's completions were preferred to another's; ties count half."""

    model: str
    against: str
    wins: int
    losses: int
    ties: int

    @property
    def rate(self) -> float:
        return (self.wins + self.ties / 2) / (self.wins + self.losses + self.ties)

    @property
    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval."""
        return wilson(self.rate, self.wins + self.losses + self.ties)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.model} wins {self.rate:.1%} against {self.against} (95 % interval {low:.1%} to {high:.1%}; "
            f"{self.wins} won, {self.losses} lost, {self.ties} tied)"
        )


def win_rate(rows: Sequence[_Row], model: str | None = None) -> WinRate | None:
    """Return the win rate over judgements of two models' completions; None unless there are exactly two models.

    Args:
        model: the model whose wins are counted (default: the first model of the first row).
    """
    duels = [row for row in rows if row.get("models") and len(row["models"]) == 2 == len(set(row["models"]))]
    names = {name for row in duels for name in row["models"]}
    if len(names) != 2:
        return None
    first = str(model if model in names else duels[0]["models"][0])
    (second,) = names - {first}
    won = Counter(TIE if row["judgement"] == TIE else row["models"][row["judgement"]] for row in duels)
    return WinRate(first, second, won[first], won[second], won[TIE])


class Agreement(NamedTuple):
    """Agreement of two labellers: number of shared prompts, share with equal verdicts, and Cohen's kappa."""

    n: int
    observed: float
    kappa: float | None

    def __str__(self) -> str:
        kappa = "undefined (both gave one verdict throughout)" if self.kappa is None else f"{self.kappa:.3f}"
        return f"Cohen's kappa {kappa}; {self.observed:.1%} of {self.n} shared prompts judged alike"


def cohens_kappa(first: Sequence[Any], second: Sequence[Any]) -> Agreement:
    """Return the agreement of two raters' verdicts on the same items (Cohen 1960).

    Kappa, the agreement beyond chance, is None if chance agreement is 1.
    """
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second)) / n
    one, two = Counter(first), Counter(second)
    chance = sum(one[verdict] * two[verdict] for verdict in one) / (n * n)
    return Agreement(n, observed, None if chance == 1 else (observed - chance) / (1 - chance))


def agreement(first: Path, second: Path) -> Agreement:
    """Return the agreement of two files of judgements, over the prompts with the same completions that are in both.

    Automatic ties (of equal completions) do not count. Chance agreement is that of the completions' places in the file
    of prompts, since the place names the model if there are two; where the places differ, that of the texts' order.

    Raises:
        ConfigError: a file does not exist. DataError: a line is not a judgement, or the files share no prompt.
    """
    one, two = _verdicts(first), _verdicts(second)
    verdicts: tuple[list[int | str], list[int | str]] = ([], [])
    for key in one.keys() & two.keys():
        order = one[key].texts if one[key].texts == two[key].texts else sorted(one[key].texts)
        for found, verdict in zip(verdicts, (one[key], two[key])):
            found.append(TIE if verdict.best is None else order.index(verdict.best))
    if not verdicts[0]:
        raise DataError(f"{first} and {second} share no prompt with the same completions")
    return cohens_kappa(*verdicts)


class _Verdict(NamedTuple):
    """The completions as JSON, and the best of them; None: a tie."""

    texts: list[str]
    best: str | None


def _verdicts(path: Path) -> dict[tuple[str, int], _Verdict]:
    """Return verdicts by prompt with completions, and the number of equal ones before."""
    seen: Counter[str] = Counter()
    verdicts: dict[tuple[str, int], _Verdict] = {}
    for key, verdict in _read_each(read_rows(str(path), "train"), _verdict):
        if verdict is not None:
            verdicts[key, seen[key]] = verdict
            seen[key] += 1
    return verdicts


def _verdict(row: _Row) -> tuple[str, _Verdict | None]:
    rejected = row.get("rejected")
    texts = [row.get("chosen"), *(rejected if isinstance(rejected, list) else [rejected])]
    if row.get("auto"):
        return "", None
    if "prompt" not in row or None in texts:
        raise DataError("no prompt, chosen and rejected; expected a line of mlxft label")
    listed = row["answers"] if isinstance(row.get("answers"), list) else []
    held, shown = ([json.dumps(text, sort_keys=True) for text in some] for some in (texts, listed))
    order = shown if sorted(shown) == sorted(held) else sorted(held)
    tied = row.get("tie") or row.get("preferred") == TIE
    return json.dumps([row["prompt"], sorted(held)], sort_keys=True), _Verdict(order, None if tied else held[0])


def _read_each(rows: Iterable[Row | Problem], read: Callable[[_Row], _T]) -> list[_T]:
    """Return what `read` returns for each row; raise a DataError with all problems."""
    found, problems = [], []
    for row in rows:
        try:
            if isinstance(row, Problem):
                raise DataError(row.text)
            found.append(read(row.data))
        except DataError as e:
            problems.append(f"{row.where}: {e}")
    if problems:
        raise DataError(report_lines(problems))
    return found


# --- label recipe -----------------------------------------------------------------------------------------------------


class Label(Settings):
    """Recipe of `mlxft label`: each setting is the option of the same name, which also has its default."""

    prompts: str | None = Field(None, min_length=1, description="Rows with a prompt; completions in them are judged.")
    out: Path | None = Field(None, description="File of judgements, one per line; an existing file is continued.")
    model: str | None = Field(None, min_length=1, description="Model that is sampled.")
    adapter: str | None = Field(None, min_length=1, description="Adapter folder or run to apply to the model.")
    against: str | None = Field(None, min_length=1, description="Another model: one completion from each is judged.")
    n: int | None = Field(None, ge=2, le=9, description="Completions per prompt.")
    max_tokens: int | None = Field(None, ge=1, description="Maximum length of a completion in tokens.")
    temperature: float | None = Field(None, ge=0, description="Sampling temperature.")
    seed: int | None = Field(None, ge=0, description="Seed for the completions and their order.")


def read_label_recipe(path: Path) -> dict[str, Any]:
    """Return the settings that a recipe gives, by name; raise a ConfigError with all problems at once."""
    return read_settings(path, Label, "configs/label.yaml shows one of mlxft label").model_dump(exclude_none=True)


# --- terminal ---------------------------------------------------------------------------------------------------------
# Single keys, and completions side by side.

_NARROW = 80  # columns; on narrower terminals completions are stacked
_COLUMN = 30  # columns that a completion needs
_ESCAPE = 0.05  # seconds to wait for the rest of an arrow key
_ARROWS = {b"[D": "l", b"[C": "r"}


class Keys:
    """Keys from standard input: each as it is pressed on a terminal, the first letter of each line from a pipe.

    The terminal's settings are restored when the context ends, also by SIGTERM.
    """

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] = []
        self._on_term: Any = None

    def __enter__(self) -> Keys:
        if self._fd is not None:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
            self._on_term = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        return self

    def __exit__(self, *error: object) -> None:
        if self._fd is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            signal.signal(signal.SIGTERM, self._on_term)

    def discard(self) -> None:
        """Discard the keys pressed so far: they were meant for the previous prompt."""
        if self._fd is not None:
            termios.tcflush(self._fd, termios.TCIFLUSH)

    def key(self) -> str:
        """Return the next key in lower case: an arrow as l or r, the end of input as q."""
        if self._fd is None:
            line = sys.stdin.readline()
            return line.strip().lower()[:1] if line else "q"
        pressed = os.read(self._fd, 1)
        if pressed in (b"", b"\x04"):
            return "q"
        if pressed == b"\x1b":
            rest = os.read(self._fd, 8) if select.select([self._fd], [], [], _ESCAPE)[0] else b""
            return _ARROWS.get(rest, "")
        return pressed.decode("ascii", "ignore").lower()

    def line(self, show: Callable[[], None]) -> str:
        """Return a line of text; `show` shows what to type once the terminal edits lines."""
        if self._fd is None:
            show()
            return sys.stdin.readline().strip()
        now = termios.tcgetattr(self._fd)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
        try:
            show()
            return os.read(self._fd, 4096).decode("utf-8", "replace").strip()
        finally:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, now)


def show_side_by_side(
    console: Console,
    title: str,
    prompt: str | list[dict[str, Any]],
    texts: Sequence[str],
    names: Sequence[str] | None = None,
) -> None:
    """Print a prompt and its completions, side by side if there is room; without `names` by the keys that choose."""
    console.rule(Text(title))
    lines = [prompt] if isinstance(prompt, str) else [f"{m['role']}: {m['content']}" for m in prompt]
    console.print(Text("\n".join(lines), style="bold"))
    count = len(texts)
    names = names or (["left (l)", "right (r)"] if count == 2 else [str(i + 1) for i in range(count)])
    if console.width < max(_NARROW, _COLUMN * count):
        for name, text in zip(names, texts):
            console.print(Panel(Text(text), title=Text(name), title_align="left"))
        return
    table = Table(expand=True, show_lines=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*map(Text, texts))
    console.print(table)


# --- label ------------------------------------------------------------------------------------------------------------

MOST = 9  # completions that a digit can select
_AGAIN = 4  # further samples if completions are empty or equal


@dataclass(frozen=True)
class LabelSource:
    """How completions are sampled. With `against`, a second model, each model gives one completion."""

    sampling: Sampling
    model: str | None = None
    adapter: str | None = None
    against: str | None = None
    n: int = 2
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """Return the model of each completion."""
        own = f"{self.model} with {self.adapter}" if self.adapter else str(self.model)
        return [own, self.against] if self.against else [own] * self.n


class LabelTask(NamedTuple):
    """A prompt to judge, with its completions ([]: they are to be sampled) and, if known, the model of each."""

    id: str
    prompt: str | list[Message]
    completions: list[str]
    models: list[str] | None
    tools: list[dict[str, Any]] | None = None


class LabelSummary(NamedTuple):
    """Numbers of prompts, and the win rate of a file of judgements."""

    judged: int
    skipped: int
    total: int
    win_rate: WinRate | None


def read_tasks(spec: str) -> list[LabelTask]:
    """Return the prompts of a file, in order.

    Rows may hold completions: "answers" or "completions" (and "models"), or "chosen" and "rejected".

    Raises:
        ConfigError: the file does not exist. DataError: rows do not fit; all are reported at once.
    """
    tasks: list[LabelTask] = []
    seen: Counter[str] = Counter()
    rows = with_usual_names(list(read_rows(spec, "train")), ("preference", "ratings", "prompts"))
    for task in _read_each(rows, _task):
        parts = [unwritten(task.prompt), task.completions or None, *([task.tools] if task.tools else [])]
        name = blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
        seen[name] += 1
        tasks.append(task._replace(id=name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return tasks


def _task(row: _Row) -> LabelTask:
    """Return the task of a row, without its id."""
    row = in_our_fields(row, ("preference", "ratings"))
    name = next((name for name in ("answers", "completions") if row.get(name) is not None), None)
    if name is None and row.get("chosen") is not None and row.get("rejected") is not None:
        return LabelTask("", *_pair(row), None, tools_of(row))
    if row.get("prompt") is None:
        raise DataError(f"no field 'prompt'; the row has {', '.join(map(str, row)) or 'none'}")
    prompt = read_prompts(row).prompt
    if name is None:
        return LabelTask("", prompt, [], None, tools_of(row))
    texts = [string_at(text, f"{name}[{i}]") for i, text in enumerate(list_at(row[name], name, "texts"))]
    if not 2 <= len(set(texts)) == len(texts) <= MOST:
        raise DataError(f"{name} has {len(texts)} texts, {len(set(texts))} of them different; expected 2 to {MOST}")
    models = row.get("models")
    if models is not None and len(models := [str(m) for m in list_at(models, "models", "names")]) != len(texts):
        raise DataError(f"models has {len(models)} names for {len(texts)} {name}; expected one for each")
    return LabelTask("", prompt, texts, models, tools_of(row))


def _pair(row: _Row) -> tuple[str | list[Message], list[str]]:
    item = read_preference(row)
    pairs = item.pairs if isinstance(item, Ranked) else (item,)
    found = [pairs[0].chosen, *(pair.rejected for pair in pairs)]
    if any("tool_calls" in message for message in found if isinstance(message, dict)):
        raise DataError("a completion has tool_calls; expected texts, since only texts can be judged")
    texts = [message if isinstance(message, str) else str(message["content"]) for message in found]
    if len(set(texts)) < len(texts):
        raise DataError("two completions are the same; expected a difference to judge")
    return pairs[0].prompt, texts


def label(spec: str, out: Path, source: LabelSource, console: Console) -> LabelSummary:
    """Judge the prompts of a file that have no judgement yet, until none is left or `q` is pressed.

    Each judgement is a line of `out`, is on the disk before the next prompt is shown, and is a row of data.format:
    preference. Skipped prompts are recorded in a file beside it.

    Raises:
        ConfigError: settings contradict each other, or `out` holds judgements of other models.
        DataError: rows of the file do not fit.
    """
    with judging(spec, out, source, console) as session:
        session.run()
        return session.summary()


@contextmanager
def judging(spec: str, out: Path, source: LabelSource, console: Console) -> Iterator[Judging]:
    """Open the prompts of a file and the judgements in `out`; arguments and errors as for `label`."""
    tasks = read_tasks(spec)
    _check(tasks, source, Path(spec), out)
    with closing(Journal(out)) as judged, closing(Journal(out.with_name(out.name + ".skipped"))) as skipped:
        _check_models(judged, tasks, source)
        yield Judging(tasks, judged, skipped, source, console)


def _check(tasks: list[LabelTask], source: LabelSource, spec: Path, out: Path) -> None:
    sampled = any(not task.completions for task in tasks)
    same = sampled and not source.against and source.sampling.temperature == 0
    problems = {
        "--out is the file of prompts; choose another": spec.exists() and out.exists() and spec.samefile(out),
        f"{spec} holds prompts without completions; name a --model to sample": sampled and source.model is None,
        f"--model: {spec} holds all completions already; leave it out to judge those": not sampled and source.model,
        "--adapter and --against go with --model": source.model is None and (source.adapter or source.against),
        f"--against compares one completion of each model; --n is {source.n}": source.against and source.n != 2,
        "--against is the model itself; name another, or leave it out": source.against and len(set(source.names)) == 1,
        "--temperature 0 gives the same completion each time; raise it": same,
    }
    if wrong := [text for text, found in problems.items() if found]:
        raise ConfigError("\n".join(wrong))


def _check_models(judged: Journal, tasks: list[LabelTask], source: LabelSource) -> None:
    """Refuse a file with judgements of other models: a file has one win rate, of two models."""
    sampled = {task.id for task in tasks if not task.completions}
    wanted = " and ".join(sorted(set(source.names)))
    for row in judged.rows:
        before = " and ".join(sorted(set(row.get("models") or ["no model"])))
        if row["id"] in sampled and before != wanted:
            raise ConfigError(f"--out: {judged.path} holds judgements of {before}; choose another file for {wanted}")


class Judging:
    """Judging of the prompts that have no judgement yet, one after the other."""

    def __init__(
        self, tasks: list[LabelTask], judged: Journal, skipped: Journal, source: LabelSource, console: Console
    ) -> None:
        self.tasks, self.judged, self.skipped = tasks, judged, skipped
        self.source, self.console = source, console
        self._models: list[Loaded] = []
        self._sampled: dict[str, LabelTask] = {}

    def run(self) -> None:
        """Show one prompt after the other on the terminal, until none is left or `q` is pressed."""
        with Keys() as keys:
            while (found := self.next()) is not None and self._judge(keys, *found):
                pass

    def next(self) -> tuple[int, LabelTask] | None:
        """Return the first prompt without a judgement and its number, None if there is none left.

        Its completions are sampled if need be; a prompt that leaves no choice is recorded and passed over.
        """
        while True:
            done = {row["id"] for row in self._rows()}
            found = next(((i, task) for i, task in enumerate(self.tasks, 1) if task.id not in done), None)
            if found is None:
                return None
            number, task = found
            if not task.completions:
                task = self._sampled[task.id] = self._sampled.get(task.id) or self._sample(task)
            if len(task.completions) > 1:
                return number, task
            self._no_choice(task)

    def record(self, task: LabelTask, verdict: int | str, note: str = "") -> None:
        """Write a judgement: the place of the best completion in the task, or TIE."""
        row = self._line(task, verdict)
        self.judged.append({**row, "note": note} if note else row)

    def skip(self, task: LabelTask) -> None:
        """Record that a prompt is skipped."""
        self.skipped.append({"id": task.id, "turn": self._turn()})

    def summary(self) -> LabelSummary:
        """Return how many prompts are judged and skipped, and the win rate."""
        known = {task.id for task in self.tasks}
        done, left = (sum(row["id"] in known for row in journal.rows) for journal in (self.judged, self.skipped))
        rate = win_rate(self.judged.rows, self.source.names[0] if self.source.model else None)
        return LabelSummary(done, left, len(self.tasks), rate)

    def _rows(self) -> list[_Row]:
        return [*self.judged.rows, *self.skipped.rows]

    def order(self, task: LabelTask) -> list[int]:
        """Return an order that depends on the seed and the prompt only, so that it reveals nothing about the models."""
        order = list(range(len(task.completions)))
        random.Random(f"{self.source.seed} {task.id}").shuffle(order)
        return order

    def _no_choice(self, task: LabelTask) -> None:
        """Record a tie if two models gave the same completion; otherwise skip the prompt."""
        if self.source.against and task.completions:
            same = task._replace(completions=task.completions * 2, models=self.source.names)
            self.judged.append({**self._line(same, TIE), "shown": [0, 1], "auto": True})
            self.console.print("both models gave the same completion: a tie")
        else:
            self.skipped.append({"id": task.id, "turn": self._turn(), "auto": True})
            self.console.print("the completions are empty or all the same: skipped")

    def _judge(self, keys: Keys, number: int, task: LabelTask) -> bool:
        """Show a prompt until it is judged or skipped, or the last one is undone; return False to quit."""
        count, order, note = len(task.completions), self.order(task), ""
        places = {str(i + 1): i for i in range(count)} | ({"l": 0, "r": 1} if count == 2 else {})
        choose = "l or r" if count == 2 else f"1 to {count}"
        usage = f"{choose} choose   t tie   s skip   u undo   n note   q quit"
        title, texts = f"{number} of {len(self.tasks)}", [task.completions[i] for i in order]
        keys.discard()
        show_side_by_side(self.console, title, task.prompt, texts)
        self.console.print(usage)
        while True:
            key = keys.key()
            if key == "q":
                return False
            if key == "u" and self.undo():
                return True
            if key == "s":
                self.skip(task)
                return True
            if key in places or key == "t":
                self.record(task, TIE if key == "t" else order[places[key]], note)
                return True
            if key == "n":
                note = keys.line(lambda: self.console.print("note: ", end=""))
            elif key.strip():
                self.console.print("nothing to undo" if key == "u" else usage)

    def _turn(self) -> int:
        return 1 + max((row["turn"] for row in self._rows()), default=0)

    def undo(self) -> bool:
        """Undo the last judgement or skip by hand, and the automatic ones after it; return False if there is none."""
        if all(row.get("auto") for row in self._rows()):
            return False
        while True:
            journals = [journal for journal in (self.judged, self.skipped) if journal.rows]
            if not max(journals, key=lambda journal: journal.rows[-1]["turn"]).undo().get("auto"):
                return True

    def _line(self, task: LabelTask, verdict: int | str) -> _Row:
        best = 0 if isinstance(verdict, str) else verdict
        rest = [text for i, text in enumerate(task.completions) if i != best]
        return {
            "id": task.id,
            "prompt": unwritten(task.prompt),
            "chosen": task.completions[best],
            "rejected": rest[0] if len(rest) == 1 else rest,
            **({"tools": task.tools} if task.tools else {}),
            **({"tie": True} if verdict == TIE else {}),
            "answers": task.completions,
            "models": task.models,
            "shown": self.order(task),
            "judgement": verdict,
            "turn": self._turn(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _sample(self, task: LabelTask) -> LabelTask:
        """Add different completions and their models, the same each time."""
        names = self.source.names
        with self.console.status("sampling completions"):
            if not self.source.against:
                texts = self._different(task, 0, self.source.n)
            else:
                # Equal completions of two models are a tie; without a completion of each there is nothing to compare.
                first, second = self._different(task, 0, 1), self._different(task, 1, 1)
                texts = [] if not first or not second else first if first == second else first + second
        return task._replace(completions=texts, models=names[: len(texts)])

    def _different(self, task: LabelTask, which: int, count: int) -> list[str]:
        """Sample at most `count` completions of a model that are all different and not blank."""
        texts: list[str] = []
        for attempt in range(1 if self.source.sampling.temperature == 0 else 1 + _AGAIN):
            for text in self._complete(task, which, attempt, count - len(texts)):
                if text.strip() and text not in texts:
                    texts.append(text)
            if len(texts) == count:
                break
        return texts

    def _complete(self, task: LabelTask, which: int, attempt: int, count: int) -> list[str]:
        from mlxft.data.dataset import encode_prompt
        from mlxft.model.sampling import sample_batch, text_of
        from mlxft.runs import load_run

        source = self.source
        if not self._models:
            self._models.append(load_run(str(source.model), source.adapter))
            if source.against:
                self._models.append(load_run(source.against))
        model, tokenizer = self._models[which].model, self._models[which].tokenizer
        seed = blake2b(f"{source.seed} {task.id} {which} {attempt}".encode(), digest_size=7).digest()
        how = replace(source.sampling, stop_at_eos=bool(tokenizer.eos_token_ids))
        ids = encode_prompt(task.prompt, tokenizer, tools=task.tools)
        (found,) = sample_batch(model, tokenizer, [ids], how, samples=count, seed=int.from_bytes(seed, "big"))
        return [text_of(tokenizer, completion, how) for completion in found]
