"""Files of judgements: kept so that a kill loses none, and what they say: win rates and agreement."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxft.errors import ConfigError, DataError, MlxftError
from mlxft.owned import check_file, is_stream
from mlxft.text import parse_json

Row = dict[str, Any]
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
        self.rows: list[Row] = []
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

    def append(self, row: Row) -> None:
        """Add a line; it is on the disk when this returns."""
        start = os.fstat(self._fd).st_size
        try:
            self._write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        except OSError as e:
            self._cut(start)
            raise MlxftError(f"can not write {self.path}: {e.strerror or e}; what was judged before is safe") from e
        self.rows.append(row)
        self._starts.append(start)

    def undo(self) -> Row:
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


def _object(line: bytes) -> Row | None:
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


def win_rate(rows: Sequence[Row], model: str | None = None) -> WinRate | None:
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
