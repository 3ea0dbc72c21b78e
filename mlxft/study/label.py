"""Judging answers by hand: sampled from a model or two, or held in a file; shown blind, in random order."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import select
import signal
import sys
import termios
import tty
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field
from rich.console import Console, RenderableType
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
)
from mlxft.data.sources import Problem, read_rows, report_lines
from mlxft.errors import ConfigError, DataError, MlxftError
from mlxft.files import check_file, is_stream
from mlxft.text import parse_json

if TYPE_CHECKING:
    from mlxft.model.sampling import Sampling


# --- judgements -------------------------------------------------------------------------------------------------------
# Files of judgements: kept so that a kill loses none, and what they say: win rates and agreement.

_Row = dict[str, Any]
TIE = "tie"
_BEGIN = b'{"id": '  # of each line


class Journal:
    """A jsonl file that grows by a line at a time, each on the disk before `append` returns.

    One process at a time may have it open. The last line can be taken back by cutting the file, so that at any moment
    the file is whole; a line that a kill left half written is cut when the file is opened.

    Raises:
        ConfigError: it can not be opened, or another process has it.
        DataError: a line is not a JSON object with an id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[_Row] = []
        self._starts: list[int] = []
        check_file(path, overwrite=True)
        self._theirs = path.exists() and not path.stat().st_size
        if is_stream(path):
            raise ConfigError(
                f"--out: {path} is a device or a pipe; judgements are gone on with, so give a file's name"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as e:
            raise ConfigError(f"--out: can not write {path}: {e.strerror or e}") from e
        try:
            self._lock()
            self._read()
            self._flush_folder()
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ConfigError(f"--out: another mlxft label is writing {self.path}; end it, or choose another") from e

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        # Only what begins as our lines do may be cut: a file of something else is left as it is.
        tail = b"" if _object(raw[whole:]) else raw[whole:]
        torn = tail.startswith(_BEGIN) or _BEGIN.startswith(tail)
        start = 0
        for number, line in enumerate((raw.removesuffix(tail) if torn else raw).splitlines(keepends=True), 1):
            row = _object(line)
            if row is None or not {"id", "turn"} <= row.keys():
                raise DataError(f"{self.path}:{number}: not a line that mlxft label wrote; choose another --out")
            self.rows.append(row)
            self._starts.append(start)
            start += len(line)
        if tail:
            self._cut(whole)
        elif whole < len(raw):  # only the newline is missing
            self._write(b"\n")

    def append(self, row: _Row) -> None:
        """Add a line; it is on the disk when this returns."""
        start = os.fstat(self._fd).st_size
        try:
            self._write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        except OSError as e:
            self._cut(start)
            raise MlxftError(f"can not write {self.path}: {e.strerror or e}; what was judged before is safe") from e
        self.rows.append(row)
        self._starts.append(start)

    def undo(self) -> _Row:
        """Take the last line back, and give it."""
        self._cut(self._starts.pop())
        return self.rows.pop()

    def close(self) -> None:
        """Let others write it. A file that holds nothing is removed, unless it was there like that."""
        if not self._theirs and os.fstat(self._fd).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        os.fsync(self._fd)

    def _flush_folder(self) -> None:
        fd = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _object(line: bytes) -> _Row | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share of n trials (Wilson 1927); z is the normal quantile, of 95 % unless told."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


class WinRate(NamedTuple):
    """How often one model's answers were chosen over another's; ties count half."""

    model: str
    against: str
    wins: int
    losses: int
    ties: int

    @property
    def n(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def rate(self) -> float:
        return (self.wins + self.ties / 2) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95 %."""
        return wilson(self.rate, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.model} wins {self.rate:.1%} against {self.against} (95 % interval {low:.1%} to {high:.1%}; "
            f"{self.wins} won, {self.losses} lost, {self.ties} tied)"
        )


def win_rate(rows: Sequence[_Row], model: str | None = None) -> WinRate | None:
    """Over the judgements of two answers by two models; None where no such, or more than two models, are there.

    Args:
        model: whose wins are counted; the first row's first model unless told.
    """
    duels = [row for row in rows if row.get("models") and len(row["models"]) == 2 == len(set(row["models"]))]
    names = {name for row in duels for name in row["models"]}
    if len(names) != 2:
        return None
    first = model if model in names and model is not None else str(duels[0]["models"][0])
    (second,) = names - {first}
    won = [row["judgement"] if row["judgement"] == TIE else row["models"][row["judgement"]] for row in duels]
    count = Counter(won)
    return WinRate(first, second, count[first], count[second], count[TIE])


class Agreement(NamedTuple):
    """Two labellers on the same prompts: how many, the share judged alike, and that beyond chance (Cohen's kappa)."""

    n: int
    observed: float
    kappa: float | None

    def __str__(self) -> str:
        said = (
            "undefined (each gave one and the same verdict throughout)" if self.kappa is None else f"{self.kappa:.3f}"
        )
        return f"Cohen's kappa {said}; {self.observed:.1%} of {self.n} shared prompts judged alike"


def cohens_kappa(first: Sequence[Any], second: Sequence[Any]) -> Agreement:
    """Agreement of two raters' verdicts on the same items (Cohen 1960); kappa is None where chance agreement is 1."""
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second)) / n
    one, two = Counter(first), Counter(second)
    chance = sum(one[verdict] * two[verdict] for verdict in one) / (n * n)
    return Agreement(n, observed, None if chance == 1 else (observed - chance) / (1 - chance))


def agreement(first: Path, second: Path) -> Agreement:
    """Agreement of two labellers' files over the prompts, with the same answers, that both judged.

    Ties that no human gave (of equal answers) do not count. What chance gives is counted by the answers' places in the
    file that was judged, which tell their models where there are two; where the places differ, by the texts' order.

    Raises:
        ConfigError: no such file. DataError: a line is no judgement, or the files share no prompt.
    """
    one, two = _verdicts(first), _verdicts(second)
    shared = [key for key in one if key in two]
    if not shared:
        raise DataError(f"{first} and {second} share no prompt with the same answers")
    orders = [one[key].answers if one[key].answers == two[key].answers else sorted(one[key].answers) for key in shared]
    return cohens_kappa(*([file[key].place(order) for key, order in zip(shared, orders)] for file in (one, two)))


class _Verdict(NamedTuple):
    """The answers' texts as JSON, and the best one among them or a tie."""

    answers: list[str]
    best: str

    def place(self, order: list[str]) -> str:
        """Where the best one stands in an order of the answers."""
        return TIE if self.best == TIE else str(order.index(self.best))


def _verdicts(path: Path) -> dict[tuple[str, int], _Verdict]:
    """Verdicts by prompt, answers, and how many such there were before."""
    from mlxft.data.sources import Problem, read_rows, report_lines

    seen: Counter[str] = Counter()
    verdicts: dict[tuple[str, int], _Verdict] = {}
    problems: list[str] = []
    for row in read_rows(str(path), "train"):
        if isinstance(row, Problem):
            problems.append(f"{row.where}: {row.text}")
            continue
        data = row.data
        if data.get("auto"):
            continue
        rejected = data.get("rejected")
        texts = [data.get("chosen"), *(rejected if isinstance(rejected, list) else [rejected])]
        if "prompt" not in data or None in texts:
            problems.append(f"{row.where}: no prompt, chosen and rejected; expected a line of mlxft label")
            continue
        listed = data["answers"] if isinstance(data.get("answers"), list) else []
        held, shown = ([json.dumps(text, sort_keys=True) for text in some] for some in (texts, listed))
        key = json.dumps([data["prompt"], sorted(held)], sort_keys=True)
        tied = data.get("tie") or data.get("preferred") == TIE
        order = shown if sorted(shown) == sorted(held) else sorted(held)
        verdicts[key, seen[key]] = _Verdict(order, TIE if tied else held[0])
        seen[key] += 1
    if problems:
        raise DataError(report_lines(problems))
    return verdicts


# --- label recipe -----------------------------------------------------------------------------------------------------
# A recipe of `mlxft label`: its options in a file.


class Label(Settings):
    """Each setting is the option of its name; what stands there and is not given has the option's default."""

    prompts: str | None = Field(None, min_length=1, description="Rows with a prompt; those with answers are judged.")
    out: Path | None = Field(None, description="Judgements, a line each; gone on with if it exists.")
    model: str | None = Field(None, min_length=1, description="What answers.")
    adapter: str | None = Field(None, min_length=1, description="Adapter folder or run to put on the model.")
    against: str | None = Field(None, min_length=1, description="Another model: one answer from each.")
    n: int | None = Field(None, ge=2, le=9, description="Answers a prompt.")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer.")
    temperature: float | None = Field(None, ge=0, description="Of sampling.")
    seed: int | None = Field(None, ge=0, description="Of the answers and their order.")


def read_label_recipe(path: Path) -> dict[str, Any]:
    """The settings that a recipe gives, by name.

    Raises:
        ConfigError: missing file, bad YAML, or any wrong setting, all reported at once.
    """
    return read_settings(path, Label, "configs/label.yaml shows one of mlxft label").model_dump(exclude_none=True)


# --- terminal ---------------------------------------------------------------------------------------------------------
# The terminal that answers are judged at: single keys, and answers side by side.

_NARROW = 80  # columns below which answers stand one below the other
_COLUMN = 30  # columns an answer needs
_ESCAPE = 0.05  # seconds in which the rest of an arrow key comes
_ARROWS = {b"[D": "l", b"[C": "r"}


class Keys:
    """Keys of standard input: at a terminal each as it is pressed, from a pipe the first letter of each line.

    The terminal is as before when the context ends, also by SIGTERM.
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._fd is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            signal.signal(signal.SIGTERM, self._on_term)

    def forget(self) -> None:
        """Drop what was typed so far: it was meant for what stood there before."""
        if self._fd is not None:
            termios.tcflush(self._fd, termios.TCIFLUSH)

    def key(self) -> str:
        """The next key, in lower case; an arrow is l or r; the end of input is q."""
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

    def line(self, ask: Callable[[], None]) -> str:
        """A line of text, typed with the terminal's own editing once `ask` has asked for it."""
        if self._fd is None:
            ask()
            return sys.stdin.readline().strip()
        now = termios.tcgetattr(self._fd)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
        try:
            ask()
            return os.read(self._fd, 4096).decode("utf-8", "replace").strip()
        finally:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, now)


def show_side_by_side(console: Console, title: str, prompt: str | list[dict[str, Any]], answers: Sequence[str]) -> None:
    """A prompt and the answers to it, in the order given: side by side where there is room for that."""
    console.rule(Text(title))
    turns = [prompt] if isinstance(prompt, str) else [f"{m['role']}: {m['content']}" for m in prompt]
    console.print(Text("\n".join(turns), style="bold"))
    names = ["left (l)", "right (r)"] if len(answers) == 2 else [str(i) for i in range(1, len(answers) + 1)]
    texts: list[RenderableType] = [Text(answer) for answer in answers]
    if console.width < max(_NARROW, _COLUMN * len(answers)):
        for name, text in zip(names, texts):
            console.print(Panel(text, title=name, title_align="left"))
        return
    table = Table(expand=True, show_lines=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*texts)
    console.print(table)


def choices(count: int) -> dict[str, int]:
    """Key -> place of the answer it chooses."""
    digits = {str(i + 1): i for i in range(count)}
    return {"l": 0, "r": 1, **digits} if count == 2 else digits


def keys_help(count: int) -> str:
    """The line that says which keys there are."""
    choose = "l or r" if count == 2 else f"1 to {count}"
    return f"{choose} choose   t tie   s skip   u undo   n note   q quit"


# --- label ------------------------------------------------------------------------------------------------------------

MOST = 9  # answers that a digit can choose
_AGAIN = 4  # more samples where answers are empty or alike


@dataclass(frozen=True)
class LabelSource:
    """Where answers come from. `against` is a second model: then each gives one answer."""

    sampling: Sampling
    model: str | None = None
    adapter: str | None = None
    against: str | None = None
    n: int = 2
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """The model of each answer."""
        own = f"{self.model} with {self.adapter}" if self.adapter else str(self.model)
        return [own, self.against] if self.against else [own] * self.n


class LabelTask(NamedTuple):
    """A prompt to judge: its answers and, where known, the model of each; None where they are to be sampled."""

    id: str
    prompt: str | list[Message]
    answers: list[str] | None
    models: list[str] | None
    tools: list[dict[str, Any]] | None = None


class Shown(NamedTuple):
    """A task's answers, as sampled or held, and the order they are shown in."""

    answers: list[str]
    models: list[str] | None
    order: list[int]


class LabelSummary(NamedTuple):
    """What a file of judgements holds, of how many prompts."""

    judged: int
    skipped: int
    total: int
    win_rate: WinRate | None


def read_tasks(spec: str) -> list[LabelTask]:
    """Prompts of a file, in order; rows may hold answers: `answers` (and `models`), or `chosen` and `rejected`.

    Raises:
        ConfigError: no such file. DataError: rows that do not fit, all in one.
    """
    tasks: list[LabelTask] = []
    problems: list[str] = []
    seen: Counter[str] = Counter()
    for row in read_rows(spec, "train"):
        try:
            if isinstance(row, Problem):
                raise DataError(row.text)
            data = in_our_fields(row.data, ("preference", "ratings"))
            prompt, answers, models = _task(data)
            tools = tools_of(data)
        except DataError as e:
            problems.append(f"{row.where}: {e}")
            continue
        said = json.dumps([unwritten(prompt), answers, *([tools] if tools else [])], sort_keys=True)
        name = blake2b(said.encode(), digest_size=8).hexdigest()
        seen[name] += 1
        tasks.append(LabelTask(name if seen[name] == 1 else f"{name}-{seen[name]}", prompt, answers, models, tools))
    if problems:
        raise DataError(report_lines(problems))
    return tasks


def _task(row: _Row) -> tuple[str | list[Message], list[str] | None, list[str] | None]:
    name = next((name for name in ("answers", "completions") if row.get(name) is not None), None)
    if name is None and row.get("chosen") is not None and row.get("rejected") is not None:
        return _held_pair(row)
    if row.get("prompt") is None:
        raise DataError(f"no field 'prompt'; the row has {', '.join(map(str, row)) or 'none'}")
    prompt = read_prompts(row).prompt
    if name is None:
        return prompt, None, None
    answers = [string_at(text, f"{name}[{i}]") for i, text in enumerate(list_at(row[name], name, "texts"))]
    if not 2 <= len(set(answers)) == len(answers) <= MOST:
        raise DataError(f"{name} has {len(answers)} texts, {len(set(answers))} of them different; expected 2 to {MOST}")
    models = row.get("models")
    if models is not None and len(models := [str(m) for m in list_at(models, "models", "names")]) != len(answers):
        raise DataError(f"models has {len(models)} names for {len(answers)} {name}; expected one for each")
    return prompt, answers, models


def _held_pair(row: _Row) -> tuple[str | list[Message], list[str], None]:
    item = read_preference(row)
    pairs = item.pairs if isinstance(item, Ranked) else (item,)
    turns = [pairs[0].chosen, *(pair.rejected for pair in pairs)]
    answers = [turn if isinstance(turn, str) else str(turn["content"]) for turn in turns]
    if any("tool_calls" in turn for turn in turns if isinstance(turn, dict)):
        raise DataError("an answer has tool_calls; only texts can be judged")
    if len(set(answers)) < len(answers):
        raise DataError("two answers are the same; expected a difference to judge")
    return pairs[0].prompt, answers, None


def label(spec: str, out: Path, source: LabelSource, console: Console) -> LabelSummary:
    """Judge the prompts of a file, from where the last time ended, until all are judged or `q` is pressed.

    Each judgement is a line of `out`, on the disk before the next prompt is shown, and is a row of data.format:
    preference. Skipped prompts stand in a file beside it.

    Raises:
        ConfigError: settings that do not go together, or `out` holds judgements of other models.
        DataError: the file's rows do not fit.
    """
    tasks = read_tasks(spec)
    _check(tasks, source, Path(spec), out)
    judged = Journal(out)
    try:
        skipped = Journal(out.with_name(out.name + ".skipped"))
        try:
            _check_models(judged, tasks, source)
            _Session(tasks, judged, skipped, source, console).run()
            known = {task.id for task in tasks}
            done, left = (sum(row["id"] in known for row in journal.rows) for journal in (judged, skipped))
            own = source.names[0] if source.model else None
            return LabelSummary(done, left, len(tasks), win_rate(judged.rows, own))
        finally:
            skipped.close()
    finally:
        judged.close()


def _check(tasks: list[LabelTask], source: LabelSource, spec: Path, out: Path) -> None:
    wrong = []
    asked = any(task.answers is None for task in tasks)
    if spec.exists() and out.exists() and spec.samefile(out):
        wrong.append("--out is the file of prompts; choose another")
    if asked and source.model is None:
        wrong.append(f"{spec} holds prompts without answers; name a --model to sample them from")
    if not asked and source.model is not None:
        wrong.append(f"--model: {spec} holds all answers already; leave it out to judge those")
    if source.model is None and (source.adapter or source.against):
        wrong.append("--adapter and --against go with --model")
    if source.against and source.n != 2:
        wrong.append(f"--against compares one answer of each model; --n is {source.n}")
    if source.against and len(set(source.names)) == 1:
        wrong.append("--against is the model itself; name another, or leave it out")
    if asked and not source.against and source.sampling.temperature == 0:
        wrong.append("--temperature 0 gives the same answer each time; raise it to have answers that differ")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _check_models(judged: Journal, tasks: list[LabelTask], source: LabelSource) -> None:
    """A file of judgements compares one thing: its win rate is of two models, not of any."""
    sampled = {task.id for task in tasks if task.answers is None}
    for row in judged.rows:
        if row["id"] in sampled and set(row.get("models") or ()) != set(source.names):
            before = " and ".join(sorted(set(row.get("models") or ["none"])))
            raise ConfigError(
                f"--out: {judged.path} holds judgements of {before}; choose another file for "
                f"{' and '.join(sorted(set(source.names)))}"
            )


class _Session:
    """A sitting: the prompts that are not done yet, one after the other."""

    def __init__(
        self, tasks: list[LabelTask], judged: Journal, skipped: Journal, source: LabelSource, console: Console
    ) -> None:
        self.tasks, self.judged, self.skipped = tasks, judged, skipped
        self.source, self.console = source, console
        self._sample = _sampler(source)
        self._answers: dict[str, Shown] = {}

    def run(self) -> None:
        with Keys() as keys:
            while (found := self._next()) is not None:
                number, task = found
                shown = self._shown(task)
                if len(shown.answers) < 2:
                    self._no_choice(task, shown)
                elif not self._judge(keys, number, task, shown):
                    return

    def _next(self) -> tuple[int, LabelTask] | None:
        done = {row["id"] for journal in (self.judged, self.skipped) for row in journal.rows}
        return next(((i, task) for i, task in enumerate(self.tasks, 1) if task.id not in done), None)

    def _shown(self, task: LabelTask) -> Shown:
        if task.id not in self._answers:
            answers, models = task.answers, task.models
            if answers is None:
                with self.console.status("sampling answers"):
                    answers, models = self._sample(task)
            order = list(range(len(answers)))
            # Other answers' lengths, models and places in the file must not show through the order.
            random.Random(f"{self.source.seed} {task.id}").shuffle(order)
            self._answers[task.id] = Shown(answers, models, order)
        return self._answers[task.id]

    def _no_choice(self, task: LabelTask, shown: Shown) -> None:
        """Two models that say the same are tied; otherwise there is nothing to learn."""
        if self.source.against and shown.answers:
            models = self.source.names
            same = Shown(shown.answers * 2, models, [0, 1])
            self.judged.append({**self._line(task, same, TIE), "auto": True})
            self.console.print("both models gave the same answer: a tie")
        else:
            self.skipped.append({"id": task.id, "turn": self._turn(), "auto": True})
            self.console.print("the answers are empty or all the same: skipped")

    def _judge(self, keys: Keys, number: int, task: LabelTask, shown: Shown) -> bool:
        """One prompt until it is judged, skipped, or another one is to be shown; False is to quit."""
        count, note = len(shown.answers), ""
        keys.forget()
        show_side_by_side(
            self.console, f"{number} of {len(self.tasks)}", task.prompt, [shown.answers[i] for i in shown.order]
        )
        self.console.print(keys_help(count))
        while True:
            key = keys.key()
            if key == "q":
                return False
            if key == "u" and self._undo():
                return True
            if key == "s":
                self.skipped.append({"id": task.id, "turn": self._turn()})
                return True
            if key in choices(count) or key == "t":
                verdict = TIE if key == "t" else shown.order[choices(count)[key]]
                row = self._line(task, shown, verdict)
                self.judged.append({**row, "note": note} if note else row)
                return True
            if key == "n":
                note = keys.line(lambda: self.console.print("note: ", end=""))
            elif key.strip():
                self.console.print("nothing to undo" if key == "u" else keys_help(count))

    def _turn(self) -> int:
        return 1 + max((row["turn"] for journal in (self.judged, self.skipped) for row in journal.rows), default=0)

    def _undo(self) -> bool:
        """Take back the last judgement or skip by hand, and what no hand did since."""
        journals = (self.judged, self.skipped)
        if not any(not row.get("auto") for journal in journals for row in journal.rows):
            return False
        while True:
            last = max((journal for journal in journals if journal.rows), key=lambda journal: journal.rows[-1]["turn"])
            if not last.undo().get("auto"):
                return True

    def _line(self, task: LabelTask, shown: Shown, verdict: int | str) -> _Row:
        best = 0 if isinstance(verdict, str) else verdict
        rest = [text for i, text in enumerate(shown.answers) if i != best]
        return {
            "id": task.id,
            "prompt": unwritten(task.prompt),
            "chosen": shown.answers[best],
            "rejected": rest[0] if len(rest) == 1 else rest,
            **({"tools": task.tools} if task.tools else {}),
            **({"tie": True} if verdict == TIE else {}),
            "answers": shown.answers,
            "models": shown.models,
            "shown": shown.order,
            "judgement": verdict,
            "turn": self._turn(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _sampler(source: LabelSource) -> Callable[[LabelTask], tuple[list[str], list[str]]]:
    """From a task to different answers and their models, the same each time. Models are loaded when first needed."""
    loaded: list[Any] = []

    def ask(task: LabelTask, which: int, attempt: int, count: int) -> list[str]:
        from mlxft.data.dataset import encode_prompt
        from mlxft.model.sampling import sample_batch, text_of
        from mlxft.runs import load_run

        if not loaded:
            loaded.append(load_run(str(source.model), source.adapter))
            if source.against:
                loaded.append(load_run(source.against))
        model, tokenizer = loaded[which].model, loaded[which].tokenizer
        said = f"{source.seed} {task.id} {which} {attempt}".encode()
        seed = int.from_bytes(blake2b(said, digest_size=7).digest(), "big")
        how = replace(source.sampling, stop_at_eos=bool(tokenizer.eos_token_ids))
        ids = encode_prompt(task.prompt, tokenizer, tools=task.tools)
        (found,) = sample_batch(model, tokenizer, [ids], how, samples=count, seed=seed)
        return [text_of(tokenizer, answer, how) for answer in found]

    def several(task: LabelTask, which: int, count: int) -> list[str]:
        """At most `count` texts, all different, none of them blank."""
        texts: list[str] = []
        for attempt in range(1 if source.sampling.temperature == 0 else 1 + _AGAIN):
            for text in ask(task, which, attempt, count - len(texts)):
                if text.strip() and text not in texts:
                    texts.append(text)
            if len(texts) == count:
                break
        return texts

    def sample(task: LabelTask) -> tuple[list[str], list[str]]:
        if not source.against:
            texts = several(task, 0, source.n)
            return texts, source.names[: len(texts)]
        # A second model that says the same is a result.
        first, second = several(task, 0, 1), several(task, 1, 1)
        if not first or not second:
            return [], []
        return (first, source.names[:1]) if first == second else (first + second, source.names)

    return sample
