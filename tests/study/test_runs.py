"""Run folders from outside: what each is said to be, whatever is in it; side by side; as an HTML page."""

from __future__ import annotations

import html.parser
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mlxft.errors import CheckpointError, ConfigError, DataError
from mlxft.files import claim, hold, is_held
from mlxft.runs import (
    Tail,
    find_removable,
    find_run,
    list_runs,
    read_events,
    read_status,
    recorded,
    remove_run,
    run_info,
    watch,
)
from mlxft.study.report import (
    compare_runs,
    details,
    ending,
    plot_runs,
    render,
    show_comparison,
    show_details,
    show_list,
    span,
    write_report,
)

START = {"event": "start", "step": 0, "objective": "sft", "base": "org/base", "method": "lora", "steps": 20}
START |= {"trainable_parameters": 10, "total_parameters": 1000, "data": {"rows": 7, "padding share": 0.25}}
TRAIN = {"event": "train", "step": 20, "epoch": 1.0, "loss": 1.25, "lr": 0.1, "tokens": 9, "trained_tokens_per_s": 5.0}
EVALS = [
    {"event": "eval", "step": 0, "loss": 3.0, "best": False},
    {"event": "eval", "step": 10, "loss": 1.5, "best": True},
    {"event": "eval", "step": 20, "loss": 1.75, "best": False},
]
SAMPLES = [{"event": "sample", "step": s, "prompt": "<b>Why?</b>", "answer": f"so & {s}"} for s in (0, 10, 20)]
END = {"event": "end", "step": 20, "best_loss": 1.5, "best_step": 10}
WHOLE = [START, *EVALS, *SAMPLES, TRAIN, END]
CONFIG = {"objective": "sft", "model": {"path": "org/base"}, "tune": {"rank": 8, "alpha": 7.0}}
CONFIG |= {"data": {"train": "rows.jsonl", "format": "messages"}, "versions": {"mlxft": "0.1.0"}}
DONE = {"status": "done", "pid": 1, "locked": True, "started": "2026-01-02T03:04:05+00:00"}

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("a", events, status, config)` writes a run folder below runs/; None leaves a file out."""

    def write(name: str, events: Any = WHOLE, status: Any = DONE, config: Any = CONFIG) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        if config is not None:
            text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
            (folder / "config.yaml").write_text(text)
        if events is not None:
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in events))
        if status is not None:
            (folder / "status.json").write_text(status if isinstance(status, str) else json.dumps(status))
        return folder

    return write


# What a folder is


def test_a_run_at_a_glance(make: Make) -> None:
    info = run_info(make("a"))
    assert (info.name, info.status, info.note, info.error) == ("a", "done", "", "")
    assert (info.objective, info.base, info.method, info.step, info.steps) == ("sft", "org/base", "lora", 20, 20)
    assert (info.best.metric, info.best.value, info.best.step, info.best.of) == ("loss", 1.5, 10, "validation")
    assert info.started == DONE["started"]
    assert str(info.best) == "loss 1.5 @ 10"


@pytest.mark.parametrize(
    ("events", "best"),
    [
        ([START, {**EVALS[1], "accuracy": 0.75}], "accuracy 0.75 @ 10"),
        ([START, {**EVALS[1], "accuracy": 0.75, "reward": -2.0}], "reward -2 @ 10"),
        ([START, EVALS[0]], "loss 3 @ 0"),  # no weights were kept yet
        ([START, {**EVALS[2], "loss": "nan"}, TRAIN], "train loss 1.25 @ 20"),
        ([START], "None"),
    ],
)
def test_what_a_run_is_judged_by(events: list[Any], best: str, make: Make) -> None:
    assert str(run_info(make("a", events)).best) == best


@pytest.mark.parametrize(
    ("changes", "status", "note"),
    [
        ({"status": None}, "done", "by an older version: no status.json"),
        ({"status": None, "events": [START, TRAIN]}, "unfinished", "by an older version: no status.json"),
        ({"status": None, "events": [START, {"event": "failed", "step": 3}]}, "failed", "by an older version"),
        ({"status": "{"}, "done", "status.json cannot be read"),
        ({"status": {"status": 3}}, "done", "status.json cannot be read"),
        ({"config": None}, "half-written", "no config.yaml"),
        ({"config": "", "status": None, "events": None}, "half-written", "config.yaml is not a recipe"),
        ({"config": "a: [", "status": None, "events": []}, "half-written", "config.yaml cannot be read"),
        ({"status": None, "events": None}, "half-written", "no metrics yet"),
        ({"status": {**DONE, "status": "running"}}, "interrupted", "its process was killed"),
        ({"status": {**DONE, "status": "running", "locked": False, "pid": os.getpid()}}, "running", ""),
        ({"status": {**DONE, "status": "running", "locked": False, "pid": 2**22 + 1}}, "interrupted", "killed"),
        ({"status": {**DONE, "status": "failed", "error": "no disk"}}, "failed", ""),
    ],
)
def test_odd_folders_are_shown_as_what_they_are(
    changes: dict[str, Any], status: str, note: str, make: Make, tmp_path: Path
) -> None:
    folder = make("odd", **changes)
    (info,) = list_runs(tmp_path / "runs")
    assert info.status == status
    assert note in info.note
    assert info.error == ("no disk" if status == "failed" and not note else "")
    out = io.StringIO()
    for width in (80, 120):
        console = Console(file=out, width=width)
        show_list(console, [info])
        show_details(console, details(folder))  # and no traceback
    assert "odd" in out.getvalue()
    render(details(folder))
    assert status in ending(info)


def test_a_binary_or_cut_metrics_file_is_read_as_far_as_it_goes(make: Make) -> None:
    folder = make("a")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"event"\n[1]\n{"event": "train", "step": null, "loss": 1}\n{"event": "train", "st')
    assert read_events(folder) == WHOLE
    assert run_info(folder).step == 20


def test_runs_of_the_same_name_are_told_apart(make: Make, tmp_path: Path) -> None:
    make("one/0")
    make("two/0", [START, {**TRAIN, "loss": 7.5}])
    found = compare_runs([details(tmp_path / "runs" / name, name) for name in ("one/0", "two/0")]).to_json()
    assert found["runs"] == ["one/0", "two/0"]
    assert set(found["results"]["training loss"]) == {"one/0", "two/0"}


def test_what_is_wrong_with_a_recipe_is_told_in_one_line(make: Make) -> None:
    note = run_info(make("odd", config="model: [", status=None)).note
    assert "cannot be read" in note
    assert "\n" not in note


def test_while_a_process_trains_a_folder_is_its_own(make: Make) -> None:
    folder = make("a", status=None)
    claim(folder, "run")
    with hold(folder) as held, recorded(held):
        assert run_info(folder).status == "running"
        assert is_held(folder)
        with pytest.raises(ConfigError, match="no such run") as e:
            find_removable(["b"], folder.parent)
        assert "mlxft runs --all lists them" in str(e.value)
        with pytest.raises(CheckpointError, match=rf"is in use now, by process {os.getpid()}"):
            find_removable(["a"], folder.parent)
        with pytest.raises(CheckpointError, match="is in use now"), hold(folder):
            raise AssertionError("two processes in one folder")
    assert not is_held(folder)
    assert run_info(folder).status == "done"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (ValueError("bad"), "failed", "bad"),
        (OSError(), "failed", "OSError"),
    ],
)
def test_how_training_ended_is_written_down(error: BaseException, status: str, told: str | None, make: Make) -> None:
    folder = make("a", status=None)
    with hold(folder) as held, pytest.raises(type(error)), recorded(held):
        raise error
    record = read_status(folder)
    assert record is not None
    assert (record["status"], record.get("error")) == (status, told)
    with hold(folder) as held, recorded(held):
        pass
    again = read_status(folder)
    assert again is not None
    assert (again["status"], again["started"], "error" in again) == ("done", record["started"], False)
    assert again["resumed"] <= again["ended"]


def test_an_error_may_say_how_it_is_told(make: Make) -> None:
    class Pruned(Exception):
        run_status = "pruned"

    folder = make("a", status=None)
    with hold(folder) as held, pytest.raises(Pruned), recorded(held):
        raise Pruned
    assert run_info(folder).status == "pruned"


# Lists


def test_runs_are_listed_oldest_first_and_trials_only_when_asked_for(make: Make, tmp_path: Path) -> None:
    make("late", status={**DONE, "started": "2026-01-03T00:00:00+00:00"})
    make("early")
    make("sweep/trials/0")
    make("late/checkpoints/step-1")  # what lies in a run is no run
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "file").touch()
    assert [r.name for r in list_runs(tmp_path / "runs")] == ["early", "late"]
    assert [r.name for r in list_runs(tmp_path / "runs", every=True)] == ["early", "sweep/trials/0", "late"]


def test_a_run_is_found_by_name_or_path(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, place = make("quick"), tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    assert find_run("quick", place).samefile(folder)
    assert find_run("runs/quick", Path("elsewhere")).samefile(folder)
    with pytest.raises(ConfigError, match=r"quack: no such run in .* \(did you mean quick\?\)"):
        find_run("quack", place)
    with pytest.raises(ConfigError, match="is not a run folder"):
        find_run(str(tmp_path), place)


def test_only_what_surely_is_a_run_is_removed(make: Make, tmp_path: Path) -> None:
    place = tmp_path / "runs"
    folder, other, old = make("a"), make("other", events=None, status=None), make("old")
    half = make("half", events=None, status=None, config="")
    for run in (folder, other, half):
        claim(run, "run")
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"that mlxft did not make \(thesis.txt\)"):
        find_removable(["a", "other"], place)
    with pytest.raises(ConfigError, match="old: is not a run folder that this version of mlxft made"):
        find_removable(["a", "old"], place)
    (half / "report.html").touch()  # left by mlxft runs report
    assert find_removable(["half", "a", "a"], place) == {
        run: sum(p.stat().st_size for p in run.iterdir()) for run in (half, folder)
    }
    remove_run(folder)
    assert [p.name for p in sorted(place.iterdir())] == ["half", "old", "other"]
    assert old.is_dir()


def test_only_names_below_the_place_are_removed(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the place itself, nor what is beside it, nor what is behind a link."""
    place = tmp_path / "runs"
    for run in (make("."), make("a"), make("../home"), make("b/c")):
        claim(run, "run")
    (place / "link").symlink_to(tmp_path / "home")
    (place / "far").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("../home", str(tmp_path / "home"), "home", "", ".", "a/..", "far/home", "link", "link/", "nope"):
        with pytest.raises(ConfigError):
            find_removable([name], Path("runs"))
    for name in ("a", "runs/a", "b/c", str(place / "a")):
        (found,) = find_removable([name], Path("runs"))
        assert found == place / name.removeprefix(str(place) + "/").removeprefix("runs/")


# One run, several, and the page


def test_details_hold_what_a_run_did(make: Make) -> None:
    run = details(make("a"))
    assert (run.before["loss"], run.kept["loss"], run.last["loss"], run.speed) == (3.0, 1.5, 1.25, 5.0)
    assert run.differs == {
        "model.path": "org/base",
        "tune.alpha": 7.0,
        "data.train": "rows.jsonl",
        "data.format": "messages",
    }
    (sample,) = run.samples
    assert (sample.first_step, sample.first, sample.last_step, sample.last) == (0, "so & 0", 10, "so & 10")
    assert json.loads(json.dumps(run.to_json()))["best"]["value"] == 1.5


def test_runs_side_by_side(make: Make) -> None:
    other = {**CONFIG, "tune": {"rank": 16, "alpha": 7.0}, "run": {"name": "b"}, "old": 1, "versions": {"mlxft": "0"}}
    better = [START, {**EVALS[1], "loss": 1.25}, TRAIN, END]
    found = compare_runs([details(make("a")), details(make("b", better, config=other))])
    assert found.settings == {"tune.rank": [8, 16], "old": [None, 1], "versions.mlxft": ["0.1.0", "0"]}
    assert found.results["validation loss"] == [1.5, 1.25]
    assert found.to_json()["results"]["validation loss"] == {"a": 1.5, "b": 1.25}
    out = io.StringIO()
    show_comparison(Console(file=out, width=80), found)
    assert re.search(r"validation loss +1.5 +1.25 +-0.25", out.getvalue())
    assert re.search(r"tune.rank +8 +16", out.getvalue())


def test_no_line_is_wider_than_the_terminal(make: Make) -> None:
    long = {**CONFIG, "model": {"path": "/" + "deep/" * 40 + "base"}}
    events = [{**START, "base": "/" + "x" * 200}, *WHOLE[1:]]
    folders = [make(name, events, config=long) for name in ("a-run-with-a-name-that-goes-on-and-on-" * 2, "b")]
    for width in (80, 120):
        out = io.StringIO()
        console = Console(file=out, width=width)
        show_list(console, [run_info(f) for f in folders])
        show_comparison(console, compare_runs([details(f) for f in folders]))
        assert max(len(line) for line in out.getvalue().splitlines()) <= width


class _Reader(html.parser.HTMLParser):
    """Open tags, what is fetched from elsewhere, and the text."""

    VOID = ("meta", "br", "img", "input", "hr", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.open += [] if tag in self.VOID else [tag]
        links = [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and not v.startswith("#")]
        self.fetched += links

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_by_itself_and_takes_text_as_text(make: Make, tmp_path: Path) -> None:
    out = write_report(make("a"))
    assert out == tmp_path / "runs/a/report.html"
    text = out.read_text()
    reader = _Reader()
    reader.feed(text)
    assert (reader.open, reader.fetched) == ([], [])
    assert {"svg", "details"} <= reader.tags
    assert not reader.tags & {"script", "link", "img", "iframe", "b i"}
    assert "url(http" not in text
    assert "prefers-color-scheme: dark" in text
    for piece in ("<b>Why?</b>", "so & 0", "so & 10", "before training", "org/base", "tune.alpha", "1.5"):
        assert piece in reader.text, piece
    assert "<b>Why" not in text


def test_the_page_of_a_run_without_metrics_says_so(make: Make) -> None:
    page = render(details(make("a", [START])))
    assert "nothing to draw" in page
    assert "<svg" not in page


def test_plots_of_one_run_and_of_several(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = make("a").parent
    make("b")
    make("empty", [START])
    assert plot_runs(["a"], place, None) == [Path("a.png")]
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    plot_runs(["a", "b"], place, Path("both.svg"))
    assert Path("both.svg").read_text().count("<!-- a, validation -->") == 1
    with pytest.raises(ConfigError, match=r"a\.gif: a picture ends in"):
        plot_runs(["a"], place, Path("a.gif"))
    for names in (["empty"], ["a", "empty"]):
        with pytest.raises(DataError, match="empty: there is nothing to draw"):
            plot_runs(names, place, None)


# Watching


def test_lines_are_told_once_they_are_whole_and_a_resumed_run_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False)
    path.write_text('{"event": "a"}\n{"event": ')
    assert tail.read() == ([{"event": "a"}], True)
    with path.open("a") as file:
        file.write('"b"}\n')
    assert tail.read() == ([{"event": "b"}], False)
    (tmp_path / "new").write_text('{"event": "c"}\n')
    (tmp_path / "new").rename(path)
    assert tail.read() == ([{"event": "c"}], True)


def test_watching_a_run_that_has_ended_ends(make: Make) -> None:
    out = io.StringIO()
    assert watch(make("a"), Console(file=out)).status == "done"
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, "-"), (3.21, "3.2 s"), (59, "59 s"), (61, "1 min 1 s"), (7322, "2 h 2 min")]
)
def test_times_in_words(seconds: float | None, said: str) -> None:
    assert span(seconds) == said
