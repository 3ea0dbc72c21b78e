"""Events in words, in metrics.jsonl and in the live view."""

from __future__ import annotations

import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlxft.errors import CheckpointError
from mlxft.text import bar, make_console
from mlxft.trainer.report import EventFile, LiveView, Plain, event_line, sparkline, terminal

TRAIN: dict[str, Any] = {
    "event": "train",
    "step": 12345,
    "epoch": 1.5,
    "loss": 1.23456,
    "lr": 2e-4,
    "grad_norm": 0.5,
    "tokens": 100,
    "trained_tokens": 50,
    "tokens_per_s": 1000.0,
    "trained_tokens_per_s": 500.0,
    "peak_memory_gb": 1.5,
    "elapsed_s": 3.0,
}
EVAL: dict[str, Any] = {"event": "eval", "step": 20, "loss": 2.5, "best": True, "elapsed_s": 1.0}


def test_train_in_words():
    assert event_line(TRAIN) == (
        "step 12345 epoch 1.50 loss 1.2346 lr 2.00e-04 grad_norm 0.500 500 trained tokens/s peak 1.50 GB"
    )


def test_an_objective_need_not_say_how_long_an_epoch_is():
    event = {name: value for name, value in TRAIN.items() if name != "epoch"}
    assert event_line(event).startswith("step 12345 loss 1.2346 lr 2.00e-04 ")
    view = LiveView(Console(file=io.StringIO(), force_terminal=True, width=80, height=40), 20_000, 0)
    view.event(event)
    view.close()


def test_metrics_of_an_objective_and_skipped_batches_are_shown():
    text = event_line(TRAIN | {"accuracy": 0.75, "skipped_batches": 2})
    assert " accuracy 0.75 " in text
    assert text.endswith("; skipped 2 batches without a trained token")


def test_eval_and_sample_in_words():
    assert event_line(EVAL) == "step 20 validation loss 2.5000 (best)"
    assert event_line(EVAL | {"best": False, "accuracy": 0.5}) == "step 20 validation loss 2.5000 accuracy 0.5"
    assert event_line({"event": "sample", "step": 1, "prompt": "a\nb", "answer": "c"}) == r"step 1 'a\nb' -> 'c'"


def test_plain_takes_brackets_as_they_are():
    out = io.StringIO()
    Plain(Console(file=out, width=20)).event({"event": "sample", "step": 1, "prompt": "[red]", "answer": "[/x] " * 9})
    assert out.getvalue().strip() == f"step 1 '[red]' -> '{'[/x] ' * 9}'"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_on_the_disk_at_once(tmp_path: Path):
    file = EventFile(tmp_path / "m.jsonl", None)
    file.event({"event": "train", "step": 1, "loss": float("nan"), "text": "é"})
    assert lines(tmp_path / "m.jsonl") == [{"event": "train", "step": 1, "loss": "nan", "text": "é"}]
    file.close()


def test_resume_keeps_what_is_before_the_checkpoint(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    kept = [{"event": "start", "step": 0}, {"event": "train", "step": 4}, {"event": "eval", "step": 4}]
    gone = [{"event": "interrupted", "step": 4}, {"event": "train", "step": 5}]
    path.write_text("".join(json.dumps(e) + "\n" for e in kept + gone) + '{"event": "train", "st')
    EventFile(path, 4).close()
    assert lines(path) == kept
    EventFile(path, None).close()
    assert lines(path) == []


def test_a_full_disk_is_no_traceback(tmp_path: Path):
    file = EventFile(tmp_path / "m.jsonl", None)

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    file._file = Full()
    with pytest.raises(CheckpointError, match=r"m\.jsonl: No space left on device"):
        file.event(TRAIN)


def test_sparkline():
    assert sparkline([0.0, 1.0, 2.0]) == "▁▅█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == ""


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_fits_its_terminal(width: int):
    """With the longest numbers there may be, no line is cut short by the terminal, broken or as wide as to wrap."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=40, legacy_windows=False)
    view = LiveView(console, 1_234_567, 0)
    for k in range(60):
        view.event(TRAIN | {"step": 1_000_000 + k, "loss": 10.0 - k / 10, "skipped_batches": 3})
    view.event(EVAL | {"step": 1_000_060})
    view.close()
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]+", out.getvalue())]
    assert max(len(line.rstrip()) for line in shown) <= width
    last = "\n".join(shown[-12:])
    for piece in ("1000059/1234567", "loss", "4.1000", "validation", "2.5000", "skipped", "batches without"):
        assert piece in last, last
    assert "…" not in last
    assert "step 1000060 validation loss 2.5000 (best)" in "\n".join(shown)


def test_a_notebook_shows_progress_and_curves_in_one_place(monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []
    places: list[str] = []

    class Handle:
        def update(self, text: str) -> None:
            shown.append(text)

    def display(text: str, display_id: bool) -> Handle:
        places.append(text)
        return Handle()

    fake = types.ModuleType("IPython.display")
    fake.HTML, fake.display = str, display
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    assert isinstance(terminal(make_console(file=io.StringIO()), 4, 0), Plain), "a console of its own shows nothing"
    view = terminal(make_console(force_jupyter=True), 4, 0)
    for step in (1, 2, 4):
        view.event(TRAIN | {"step": step, "loss": 3.0 / step})
    view.event({"event": "eval", "step": 4, "loss": 1.5, "best": True})
    view.event({"event": "message", "step": 4, "text": "<script>\x1b[2J"})
    view.close()
    assert len(places) == 1
    assert shown[-1].count("<polyline") == 2
    for part in ('value="4" max="4"', "training loss, step 1 to 4: 3 to 0.75", "validation loss 1.5", "&lt;script&gt;"):
        assert part in shown[-1]
    assert "\x1b" not in shown[-1]
    with bar(make_console(force_jupyter=True), 3, "rows") as advance:
        advance(2)
    assert 'value="2" max="3"' in shown[-1]
