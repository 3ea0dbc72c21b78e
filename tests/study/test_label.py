"""Judging by hand: the numbers by hand too, files that survive a kill, and a sitting at a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from rich.console import Console

from mlxft.data.formats import Pair, Ranked, convert
from mlxft.data.sources import read_rows
from mlxft.errors import ConfigError, DataError
from mlxft.model.sampling import Sampling
from mlxft.study.label import (
    Journal,
    LabelSource,
    LabelSummary,
    agreement,
    cohens_kappa,
    label,
    read_tasks,
    show_side_by_side,
    win_rate,
)
from mlxft.study.stats import wilson
from mlxft.text import make_console


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def held(path: Path, count: int) -> Path:
    """Prompts "q0", "q1", ... each with the answers "good" and "bad" of its number."""
    rows = [{"prompt": f"q{i}", "answers": [f"good {i}", f"bad {i}"], "models": ["A", "B"]} for i in range(count)]
    return write(path, rows)


@pytest.fixture
def sit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[LabelSummary, str]]:
    """`sit(prompts, out, "l", "r", ...)`: a sitting with these lines typed, then the end of input; what it showed."""

    def run(prompts: Path, out: Path, *typed: str, **sampling: Any) -> tuple[LabelSummary, str]:
        shown = io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in typed)))
        how = Sampling(sampling.pop("max_tokens", 512), sampling.pop("temperature", 1.0))
        done = label(str(prompts), out, LabelSource(how, **sampling), Console(file=shown, width=100))
        return done, shown.getvalue()

    return run


Sit = Callable[..., tuple[LabelSummary, str]]

# --- numbers


def test_wilson_by_hand() -> None:
    """With z = 2: centre (p + 4/2n), half 2 sqrt(p(1-p)/n + 4/4n^2), over 1 + 4/n.

    8 of 10: (0.8 + 0.2) / 1.4 = 0.714286, and 2 sqrt(0.016 + 0.01) / 1.4 = 0.230350.
    """
    two = 2 * NormalDist().cdf(2) - 1  # the share within two standard deviations
    assert wilson(0.8, 10, two) == pytest.approx((0.714286 - 0.230350, 0.714286 + 0.230350), abs=1e-6)
    # z^2 / (n + z^2) = 3.841459 / 13.841459 is the upper end of none of ten.
    assert wilson(0, 10) == pytest.approx((0, 0.277533), abs=1e-5)
    assert wilson(1, 10) == pytest.approx((0.722467, 1), abs=1e-5)


def test_kappa_by_hand() -> None:
    """Cohen's table: both yes 20, first only 5, second only 10, both no 15.

    Observed 35/50 = 0.7; by chance 25/50 x 30/50 + 25/50 x 20/50 = 0.5; kappa = 0.2 / 0.5.
    """
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    found = cohens_kappa([a for a, _ in pairs], [b for _, b in pairs])
    assert (found.n, found.observed) == (50, 0.7)
    assert found.kappa == pytest.approx(0.4, abs=1e-12)
    assert cohens_kappa("ab", "ba").kappa == pytest.approx(-1)
    assert cohens_kappa("aab", "aab").kappa == pytest.approx(1)
    always = cohens_kappa("aa", "aa")
    assert always.kappa is None
    assert "undefined" in str(always)


def test_win_rate_counts_ties_half_and_follows_the_model_not_the_side() -> None:
    verdicts: list[tuple[list[str], int | str]] = [
        (["M", "N"], 0),
        (["N", "M"], 1),
        (["M", "N"], 1),
        (["N", "M"], "tie"),
    ]
    rows = [{"models": models, "judgement": verdict} for models, verdict in verdicts]
    found = win_rate([*rows, {"models": None, "judgement": 0}], "M")
    assert found is not None
    assert found[:] == ("M", "N", 2, 1, 1)
    assert found.rate == 0.625
    assert found.interval == wilson(0.625, 4)
    other = win_rate(rows, "N")
    assert other is not None
    assert other.rate == 0.375
    assert win_rate([{"models": ["M", "M"], "judgement": 0}], "M") is None
    assert win_rate([*rows, {"models": ["M", "O"], "judgement": 0}], "M") is None, "three models are no duel"


# --- the file


def test_journal_is_whole_after_every_cut(tmp_path: Path) -> None:
    """A kill may leave any part of the last line: whatever was whole is there, and goes on cleanly."""
    path = tmp_path / "out.jsonl"
    rows = [{"id": str(i), "turn": i, "note": "ü" * i} for i in range(3)]
    journal = Journal(path)
    for row in rows:
        journal.append(row)
    journal.close()
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for size in range(second, len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        kept = 3 if size >= len(whole) - 1 else 2
        assert journal.rows == rows[:kept], size
        journal.append({"id": "next", "turn": 9})
        assert journal.undo()["id"] == "next"
        assert journal.undo() == rows[kept - 1]
        journal.append({"id": "last", "turn": 9})
        journal.close()
        assert read(path) == [*rows[: kept - 1], {"id": "last", "turn": 9}]


def test_journal_refusals(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = Journal(path)
    with pytest.raises(ConfigError, match="another mlxft label is writing"):
        Journal(path)
    first.close()
    assert not path.exists(), "nothing was judged"
    for line in ('{"text": "x"}\n', "x\n", '{"id": 1}\n'):
        path.write_text('{"id": "a", "turn": 1}\n' + line)
        with pytest.raises(DataError, match=r"out\.jsonl:2: not a line that mlxft label wrote"):
            Journal(path)
        assert path.read_text().endswith(line)
    for foreign in ("notes, no end", '[{"id": "a", "turn": 1}]', '{"id": "a", "turn": 1}\nnotes', '{"text": "x"}'):
        path.write_text(foreign)
        with pytest.raises(DataError, match="not a line that mlxft label wrote"):
            Journal(path)
        assert path.read_text() == foreign, "another's file is left as it is"
    with pytest.raises(ConfigError, match="--out: cannot write"):
        Journal(tmp_path)


# --- sittings


def test_judgements_are_rows_to_train_on(tmp_path: Path, sit: Sit) -> None:
    prompts = write(
        tmp_path / "p.jsonl",
        [
            {"prompt": "q", "answers": ["good", "bad"], "tools": [{"name": "f"}]},
            {"prompt": [{"role": "user", "content": "m"}], "chosen": "good", "rejected": "bad"},
            {"prompt": "three", "completions": ["a", "b", "c"]},
        ],
    )
    done, _ = sit(prompts, tmp_path / "o.jsonl", "n", "for a reason", "1", "t", "3")
    assert done == LabelSummary(3, 0, 3, None)
    rows = read(tmp_path / "o.jsonl")
    first, second, third = (e.item for e in convert(read_rows(str(tmp_path / "o.jsonl"), "train"), "preference"))
    answers = ["good", "bad"]
    best = rows[0]["shown"][0]
    assert first == Pair("q", answers[best], answers[1 - best], tools=[{"name": "f"}])
    assert (rows[0]["note"], rows[0]["judgement"], rows[0]["answers"]) == ("for a reason", best, answers)
    assert "note" not in rows[1]
    assert isinstance(second, Pair)
    assert second.tie
    assert isinstance(third, Ranked)
    chosen = "abc"[rows[2]["shown"][2]]
    assert [(p.chosen, p.weight) for p in third.pairs] == [(chosen, 0.5)] * 2
    assert {p.rejected for p in third.pairs} == set("abc") - {chosen}


def test_keys(tmp_path: Path, sit: Sit) -> None:
    """Undo takes back judgements and skips in the order they were made, also those of an earlier sitting."""
    prompts, out = held(tmp_path / "p.jsonl", 3), tmp_path / "o.jsonl"
    done, shown = sit(prompts, out, "u", "x", "l", "s", "u", "s", "q", "l")
    assert (done.judged, done.skipped) == (1, 1)
    assert "nothing to undo" in shown
    assert re.findall(r"(\d) of 3", shown) == ["1", "2", "3", "2", "3"]
    done, shown = sit(prompts, out, "u", "u", "r", "r", "r")
    assert (done.judged, done.skipped) == (3, 0)
    assert re.findall(r"(\d) of 3", shown) == ["3", "2", "1", "2", "3"]
    assert not (tmp_path / "o.jsonl.skipped").exists()
    assert [row["judgement"] for row in read(out)] == [row["shown"][1] for row in read(out)]
    assert [row["turn"] for row in read(out)] == [1, 2, 3]
    assert sit(prompts, out, "l")[1] == "", "all is judged"
    wins = sum(row["judgement"] == 0 for row in read(out))
    assert done.win_rate is not None
    assert done.win_rate[:] == ("A", "B", wins, 3 - wins, 0)


def test_order_is_blind_and_the_same_each_time(tmp_path: Path, sit: Sit) -> None:
    prompts = held(tmp_path / "p.jsonl", 60)
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done, shown = sit(prompts, tmp_path / name, *["l"] * 60, seed=seed)
        assert done.judged == 60
        assert not re.search(r"\b[AB]\b", shown), "no model is named"
        orders.append([row["shown"] for row in read(tmp_path / name)])
    assert orders[0] == orders[1] != orders[2]
    assert 15 <= sum(order == [0, 1] for order in orders[0]) <= 45, "either side has the first answer about as often"


def test_agreement_of_two_files(tmp_path: Path, sit: Sit) -> None:
    """Ann and Ben see the answers in different orders; what counts is which text was chosen. Kappa as by hand above."""
    prompts = held(tmp_path / "p.jsonl", 12)
    verdicts = {"ann": "ggggggbbbbtt", "ben": "ggggbbbbbgtg"}
    for seed, (name, said) in enumerate(verdicts.items()):
        out = tmp_path / f"{name}.jsonl"
        for task, want in zip(read_tasks(str(prompts)), said):
            order = [0, 1]
            random.Random(f"{seed} {task.id}").shuffle(order)
            key = "t" if want == "t" else str(1 + order.index("gb".index(want)))
            sit(prompts, out, key, seed=seed)
    found = agreement(tmp_path / "ann.jsonl", tmp_path / "ben.jsonl")
    assert found == cohens_kappa(verdicts["ann"], verdicts["ben"])
    # Alike 4 + 3 + 1 = 8; chance (6 x 6 + 4 x 5 + 2 x 1) / 144 = 58 / 144; (96 - 58) / (144 - 58) = 38 / 86.
    assert (found.n, found.observed) == (12, pytest.approx(8 / 12))
    assert found.kappa == pytest.approx(38 / 86)
    with pytest.raises(DataError, match="share no prompt"):
        agreement(
            tmp_path / "ann.jsonl", write(tmp_path / "x.jsonl", [{"prompt": "?", "chosen": "a", "rejected": "b"}])
        )
    with pytest.raises(DataError, match=r"x\.jsonl:1: no prompt, chosen and rejected"):
        agreement(tmp_path / "ann.jsonl", write(tmp_path / "x.jsonl", [{"prompt": "?"}]))


def test_agreement_goes_by_the_answers_places_whatever_their_texts(tmp_path: Path) -> None:
    """Model A's answers stand first. Ben prefers all of them, Ann 3 of 4: the 3/4 that chance gives, so kappa is 0.

    By the texts' order, in which A's answers are first and last by turns, it would be 1/2.
    """
    answers = [["a", "z"], ["y", "b"], ["c", "x"], ["w", "d"]]
    for name, said in {"ann": (0, 0, 0, 1), "ben": (0, 0, 0, 0)}.items():
        rows = [
            {"prompt": "q", "chosen": texts[best], "rejected": texts[1 - best], "answers": texts}
            for texts, best in zip(answers, said)
        ]
        write(tmp_path / f"{name}.jsonl", rows)
    found = agreement(tmp_path / "ann.jsonl", tmp_path / "ben.jsonl")
    assert (found.n, found.observed, found.kappa) == (4, 0.75, pytest.approx(0))


def test_prompts_that_do_not_fit(tmp_path: Path, sit: Sit) -> None:
    rows = [
        {"question": "x"},
        {"prompt": "x", "answers": ["a"]},
        {"prompt": "x", "answers": ["a", "a"]},
        {"prompt": "x", "answers": ["a", " "]},
        {"prompt": "x", "answers": ["a", "b"], "models": ["A"]},
        {"prompt": "x", "chosen": "a", "rejected": "a"},
        {"prompt": "", "answers": ["a", "b"]},
        {"prompt": "fine", "answers": ["a", "b"]},
    ]
    with pytest.raises(DataError) as caught:
        sit(write(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl")
    assert [line.split(" ")[0] for line in str(caught.value).split("\n")] == [f"p.jsonl:{i}:" for i in range(1, 8)]
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({}, "name a --model"),
        ({"adapter": "x"}, "--adapter and --against go with --model"),
        ({"model": "M", "against": "M"}, "--against is the model itself"),
        ({"model": "M", "against": "N", "n": 3}, "--n is 3"),
        ({"model": "M", "temperature": 0.0}, "--temperature 0 gives the same completion"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, sit: Sit, sampling: dict[str, Any], text: str) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "x"}])
    with pytest.raises(ConfigError, match=text):
        sit(prompts, tmp_path / "o.jsonl", **sampling)
    with pytest.raises(ConfigError, match="--out is the file of prompts"):
        sit(prompts, prompts, **sampling)
    with pytest.raises(ConfigError, match="holds all completions already"):
        sit(held(tmp_path / "h.jsonl", 1), tmp_path / "o.jsonl", model="M")
    assert not (tmp_path / "o.jsonl").exists()


def test_narrow_terminals_stack_and_nothing_steers_them() -> None:
    def screen(width: int) -> list[str]:
        out = io.StringIO()
        show_side_by_side(make_console(file=out, width=width), "1 of 1", "q", ["left\x1b[2J one", "[bold]right[/bold]"])
        assert "\x1b" not in out.getvalue()
        assert "[bold]right[/bold]" in out.getvalue()
        return out.getvalue().splitlines()

    assert any("left" in line and "right[" in line for line in screen(80))
    assert not any("left" in line and "right[" in line for line in screen(79))


# --- models


SHORT = {"max_tokens": 6, "temperature": 1.5}


def test_sampled_answers_are_the_same_after_a_restart(tmp_path: Path, sit: Sit, tiny_model_dir: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "the in"}, {"prompt": [{"role": "user", "content": "on"}]}])
    model = str(tiny_model_dir)
    for typed in (["l"], ["l"]):
        sit(prompts, tmp_path / "a.jsonl", *typed, "q", model=model, n=3, **SHORT)
    assert sit(prompts, tmp_path / "a.jsonl", "1", "2", model=model, n=3, **SHORT)[0].judged == 2
    sit(prompts, tmp_path / "b.jsonl", "1", "2", model=model, n=3, **SHORT)
    one, two = read(tmp_path / "a.jsonl"), read(tmp_path / "b.jsonl")
    assert [row["answers"] for row in one] == [row["answers"] for row in two]
    assert [row["models"] for row in one] == [[model] * 3] * 2
    assert all(len(set(row["answers"])) == 3 for row in one)
    sit(prompts, tmp_path / "c.jsonl", "1", "2", model=model, n=3, seed=1, **SHORT)
    assert read(tmp_path / "c.jsonl")[0]["answers"] != one[0]["answers"]


def test_two_models(tmp_path: Path, sit: Sit, tiny_model_dir: Path, make_model_dir: Callable[..., Path]) -> None:
    """Equal answers are a tie that nobody is asked for; undo passes over it."""
    model, twin = str(tiny_model_dir), str(make_model_dir(tmp_path / "twin"))
    other = str(make_model_dir(tmp_path / "other", rope_theta=5.0, num_hidden_layers=1))
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "the in"}, {"prompt": "or"}])
    greedy = {"max_tokens": 6, "temperature": 0.0}
    done, shown = sit(prompts, tmp_path / "same.jsonl", model=model, against=twin, **greedy)
    assert done.win_rate is not None
    assert done.win_rate[:] == (model, twin, 0, 0, 2)
    assert shown.count("both models gave the same completion: a tie") == 2
    assert [(row["tie"], row["auto"]) for row in read(tmp_path / "same.jsonl")] == [(True, True)] * 2
    assert all(e.item.tie for e in convert(read_rows(str(tmp_path / "same.jsonl"), "train"), "preference"))  # type: ignore[union-attr]

    done, _ = sit(prompts, tmp_path / "o.jsonl", "l", "l", model=model, against=other, **SHORT)
    rows = read(tmp_path / "o.jsonl")
    assert [row["models"] for row in rows] == [[model, other]] * 2
    assert done.win_rate is not None
    assert done.win_rate.wins == sum(row["judgement"] == 0 for row in rows)
    with pytest.raises(ConfigError, match="holds judgements of"):
        sit(prompts, tmp_path / "o.jsonl", model=model, against=twin, **SHORT)
    assert read(tmp_path / "o.jsonl") == rows


# --- a real terminal


class Terminal:
    """`mlxft label` in a pseudo-terminal of 100 columns."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.fd, inner = pty.openpty()
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "LINES")}
        env |= {"COLUMNS": "100", "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "mlxft", "label", *args]
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
        )
        os.close(inner)
        self.seen = ""

    def wait(self, text: str) -> None:
        """Until `text` is shown, after what was waited for before."""
        deadline = time.monotonic() + 300
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come; seen: {self.seen}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
        self.seen = self.seen.partition(text)[2]

    def press(self, keys: bytes, until: str) -> None:
        os.write(self.fd, keys)
        self.wait(until)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        os.close(self.fd)

    def end(self) -> int:
        with contextlib.suppress(OSError):  # Linux says so when the other side is closed
            while os.read(self.fd, 4096):
                pass
        code = self.process.wait(30)
        os.close(self.fd)
        return code


QUIT = "q quit"


def test_a_sitting_at_a_terminal_survives_a_kill(tmp_path: Path) -> None:
    """Judge, undo, kill -9, restart, finish: every judgement is there once, and as it was made."""
    held(tmp_path / "p.jsonl", 5)
    out = tmp_path / "o.jsonl"
    args = ("p.jsonl", "--out", "o.jsonl")
    terminal = Terminal(tmp_path, *args)
    terminal.wait("1 of 5")
    terminal.wait(QUIT)
    terminal.press(b"l", "2 of 5")
    assert len(read(out)) == 1, "on the disk before the next prompt is shown"
    terminal.wait(QUIT)
    terminal.press(b"\x1b[C", "3 of 5")  # right arrow
    terminal.wait(QUIT)
    terminal.press(b"u", "2 of 5")
    assert len(read(out)) == 1
    terminal.wait(QUIT)
    terminal.press(b"n", "note: ")
    terminal.press("früh\n".encode(), "früh\r\n")  # the terminal shows what is typed
    terminal.press(b"t", "3 of 5")
    terminal.wait(QUIT)
    terminal.kill()
    before = read(out)
    assert [(row["prompt"], row["judgement"], row.get("note")) for row in before] == [
        ("q0", before[0]["shown"][0], None),
        ("q1", "tie", "früh"),
    ]
    with out.open("ab") as file:  # as if the kill had come in the middle of a write
        file.write(b'{"id": "half')

    terminal = Terminal(tmp_path, *args)
    terminal.wait("3 of 5")
    terminal.wait(QUIT)
    terminal.press(b"s", "4 of 5")
    terminal.wait(QUIT)
    terminal.press(b"2", "5 of 5")
    terminal.wait(QUIT)
    terminal.press(b"1", "4 of 5 prompts judged, 1 skipped")
    terminal.wait("95 % interval")
    assert terminal.end() == 0
    after = read(out)
    assert after[:2] == before
    assert [row["prompt"] for row in after] == ["q0", "q1", "q3", "q4"]
    assert [row["judgement"] for row in after[2:]] == [after[2]["shown"][1], after[3]["shown"][0]]
    assert len({row["id"] for row in after}) == 4


def test_a_sitting_that_is_ended_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    held(tmp_path / "p.jsonl", 2)
    terminal = Terminal(tmp_path, "p.jsonl", "--out", "o.jsonl")
    before = termios.tcgetattr(terminal.fd)
    terminal.wait(QUIT)
    assert termios.tcgetattr(terminal.fd) != before, "keys are read one by one"
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(30) == 128 + signal.SIGTERM
    assert termios.tcgetattr(terminal.fd) == before
    os.close(terminal.fd)
