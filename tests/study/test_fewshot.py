"""Few examples: which rows are drawn, what a mean over rows and seeds is worth, and whole studies of a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from mlxft.config import load_config
from mlxft.data.dataset import load_splits
from mlxft.data.formats import (
    Completion,
    Conversation,
    Example,
    balanced,
    fill,
    is_template,
    labels_of,
    names_in,
    pick_shots,
)
from mlxft.errors import CheckpointError, ConfigError, DataError
from mlxft.run import train
from mlxft.study.fewshot import Study, StudyPlan, fewshot, read_ks
from mlxft.study.stats import crossed, t_quantile

QUIET = Console(quiet=True)
LABELS = ["a", "b", "a", "a", "b", "c", "c", "a", "b", "c"]


def completions(answers: list[str]) -> list[Example]:
    return [Example(f"r:{i}", Completion(f"p{i}", answer)) for i, answer in enumerate(answers)]


# Drawing


def test_so_many_of_each_label_and_fewer_are_among_more() -> None:
    few, more = (set(pick_shots(LABELS, 10, k, 3, "data.shots").rows) for k in (1, 3))
    assert few < more
    assert Counter(LABELS[i] for i in more) == {"a": 3, "b": 3, "c": 3}
    assert pick_shots(LABELS, 10, 3, 3, "s") == pick_shots(LABELS, 10, 3, 3, "s")
    assert len({tuple(pick_shots(LABELS, 10, 1, seed, "s").rows) for seed in range(20)}) > 5


def test_more_shots_than_a_label_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.shots: asks for 4 rows of each label.* only 3 of 'b', 3 of 'c'"):
        pick_shots(LABELS, 10, 4, 0, "data.shots")
    with pytest.raises(ConfigError, match="at most 10, the number of rows, seen 11"):
        pick_shots(None, 10, 11, 0, "data.shots")


@pytest.mark.parametrize("shots", range(1, 10))
def test_shots_in_context_are_balanced_whatever_their_number(shots: int) -> None:
    chosen = balanced(LABELS, 10, shots, 1, "--shots")
    counts = Counter(LABELS[i] for i in chosen)
    assert len(set(chosen)) == shots
    assert max(counts.values()) - min(counts[name] for name in "abc") <= 1


def test_labels_are_few_answers_or_a_field() -> None:
    assert labels_of(completions([" x", "y", "x", "y"])) == ["x", "y", "x", "y"]
    assert labels_of(completions(["x", "y", "z", "y"])) is None, "three answers in four rows are no labels"
    assert labels_of(completions([str(i % 21) for i in range(100)])) is None
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    assert labels_of([Example("r:1", Conversation(turns))] * 2) == ["yes", "yes"]
    rows = [{"topic": 1}, {"topic": 2}]
    assert labels_of(completions(["x", "y"]), rows, "topic") == ["1", "2"]
    with pytest.raises(ConfigError, match=r"'topc', which no row has \(did you mean topic\?\)"):
        labels_of(completions(["x", "y"]), rows, "topc")
    with pytest.raises(DataError, match="r:0: topic is missing"):
        labels_of(completions(["x", "y"]), [{}, {"topic": 2}], "topic")


def test_a_template_takes_a_rows_fields() -> None:
    assert fill("{{{a}}}: {b}", {"a": "x {b}", "b": 2}, "prompt") == "{x {b}}: 2"
    assert names_in("{a}{b}{a}", "prompt") == ["a", "b"]
    assert not is_template("label")
    assert not is_template("{{no}}")
    for wrong in ("{", "{a!r}", "{}", "{a:3}"):
        with pytest.raises(ConfigError, match="prompt is "):
            names_in(wrong, "prompt")
    with pytest.raises(DataError, match=r"no field 'revew', which prompt names \(did you mean review\?\)"):
        fill("{revew}", {"review": "x"}, "prompt")


# data.shots


def write_rows(folder: Path, name: str, rows: int, start: int = 0) -> None:
    """Rows that a model can learn from their last word, half good and half bad, each with a number of its own."""
    words = {"good": ("fine", "nice"), "bad": ("poor", "sad")}
    with (folder / name).open("w", encoding="utf-8") as file:
        for i in range(start, start + rows):
            label = ("good", "bad")[i % 2]
            file.write(json.dumps({"said": f"{i} {words[label][i // 2 % 2]}", "is": label}) + "\n")


@pytest.fixture
def reviews(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """A recipe file over 40 rows, with 12 other rows in test.jsonl."""

    def make(**changes: Any) -> Path:
        write_rows(tmp_path, "train.jsonl", 40)
        write_rows(tmp_path, "test.jsonl", 12, start=100)
        fields = {"prompt": "{said}:", "completion": " {is}"}
        data = {"train": str(tmp_path / "train.jsonl"), "format": "prompt-completion", "fields": fields}
        settings = {"run.steps": None, "batch.rows": 8, "data": {**data, "template": "none"}}
        file = tmp_path / "few.yaml"
        file.write_text(yaml.safe_dump(recipe(**{**settings, **changes})), "utf-8")
        return file

    return make


def test_shots_leave_validation_rows_as_they_are(reviews: Callable[..., Path]) -> None:
    whole, few = (
        load_splits(load_config(reviews(), ["data.valid=0.25", *more]).data, 5) for more in ([], ["data.shots=3"])
    )
    assert [e.where for e in few.valid] == [e.where for e in whole.valid]
    assert {e.where for e in few.train} < {e.where for e in whole.train}
    assert Counter(e.item.completion for e in few.train if isinstance(e.item, Completion)) == {" good": 3, " bad": 3}
    assert few.notes == ["6 of 30 rows are used: 3 of each label, 'bad', 'good' (data.shots)"]


def test_a_run_with_shots_goes_on_with_the_same_ones(reviews: Callable[..., Path]) -> None:
    file = reviews(**{"run.steps": 3, "data.shots": None})
    run = train(load_config(file, ["data.shots=2"]), console=QUIET)
    assert run.metrics("start")[0]["data"]["rows"] == 4
    train(load_config(file, ["data.shots=2"]), resume=True, console=QUIET)
    with pytest.raises((ConfigError, CheckpointError), match=r"data\.shots: the run has 2, the recipe has 3"):
        train(load_config(file, ["data.shots=3"]), resume=True, console=QUIET)


def test_a_label_without_shots_is_refused(reviews: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"label \(is\) needs shots"):
        load_config(reviews(), ["data.label=is"])


# Intervals


def test_quantiles_of_t() -> None:
    """scipy.stats.t.ppf(0.975, df) of scipy 1.17.1, and the normal's."""
    for df, wanted in ((1, 12.7062047), (2, 4.3026527), (2.5, 3.5746548), (10, 2.2281389), (199, 1.9719565)):
        assert t_quantile(0.975, df) == pytest.approx(wanted, rel=2e-5)
    assert t_quantile(0.975, 1e5) == pytest.approx(1.95999, rel=1e-4)


def test_one_seed_gives_the_usual_interval_and_equal_seeds_add_nothing() -> None:
    scores = np.array([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    one, three = crossed(scores), crossed(np.repeat(scores, 3, axis=0))
    assert one.se == pytest.approx(scores.std(ddof=1) / 6**0.5)
    assert one.high - one.value == pytest.approx(2.5705818 * one.se, rel=1e-4)
    assert three == pytest.approx(one)
    assert crossed(scores, bounds=(0, 1)).high == 1.0
    assert math.isnan(crossed(np.ones((2, 1))).se)


def test_two_seeds_by_hand() -> None:
    """Rows 0 2 | 4 4: row means 2 3, seed means 1 4, mean 2.5; residuals .5: MS rows 1, seeds 9, rest 1; se is
    root of (1 + 9 - 1) / 4."""
    found = crossed(np.array([[0.0, 2.0], [4.0, 4.0]]))
    assert (found.value, found.se) == pytest.approx((2.5, 1.5))


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    """3 seeds and 40 rows, both drawn anew: normal effects of each, and noise."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        rows, seeds, noise = rng.normal(size=(1, 40)), 0.3 * rng.normal(size=(3, 1)), rng.normal(size=(3, 40))
        found = crossed(rows + seeds + noise)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 600 <= 0.99


# Studies


def study(file: Path, plan: StudyPlan, **options: Any) -> Study:
    return fewshot(file, [], plan, out=file.parent / "study", console=QUIET, **options)


def test_a_study_learns_goes_on_and_is_the_same_again(reviews: Callable[..., Path], tmp_path: Path) -> None:
    """Trained on all rows the tiny model tells the words apart; cells that are there are not run again."""
    file = reviews(**{"run.epochs": 30, "tune": {"method": "full"}})
    plan = StudyPlan(str(tmp_path / "test.jsonl"), [2], [1, "all"], [1], seeds=2, least_steps=4)
    found = study(file, plan)
    table = {(line.method, line.k): line for line in found.lines}
    wanted: list[tuple[str, int | str]] = [
        ("zero-shot", 0),
        ("in context", 2),
        ("tuned", 1),
        ("tuned", "all"),
        ("both", 1),
    ]
    assert list(table) == wanted
    assert [table[key].seeds for key in wanted] == [1, 2, 2, 1, 2]
    assert [table[key].trained_rows for key in wanted] == [0, 0, 2, 40, 2]
    assert table["tuned", "all"].estimate.value == 1.0
    assert table["zero-shot", 0].estimate.value < 0.8
    against = table["tuned", "all"].against
    assert against is not None
    assert against.low > 0
    cells = sorted((tmp_path / "study/cells").iterdir())
    assert len(cells) == 8
    times = {cell: cell.stat().st_mtime_ns for cell in cells}
    before = json.loads(cells[0].read_text("utf-8"))
    cells[0].unlink()  # as if a kill had come before it
    again = study(file, plan)
    assert again.to_json() == found.to_json()
    assert json.loads(cells[0].read_text("utf-8"))["rows"] == before["rows"]
    assert {cell: cell.stat().st_mtime_ns for cell in cells[1:]} == {cell: times[cell] for cell in cells[1:]}
    assert "| tuned | all | 40 |" in (tmp_path / "study/fewshot.md").read_text("utf-8")
    whole = cells[0].read_text("utf-8")
    for damaged in ("[]", "{}", json.dumps(before | {"rows": [{"row": "a"}]}), json.dumps(before | {"notes": 3})):
        cells[0].write_text(damaged, "utf-8")
        with pytest.raises(ConfigError, match=f"{cells[0].name}: can not be read.*delete it"):
            study(file, plan)
    cells[0].write_text(whole.replace('"scores": {"', '"scores": {"other '), "utf-8")
    with pytest.raises(ConfigError, match="not all have the same scores"):
        study(file, plan)


def test_shots_are_never_evaluated_rows(reviews: Callable[..., Path], tmp_path: Path) -> None:
    file = reviews()
    with (tmp_path / "test.jsonl").open("a", encoding="utf-8") as out:
        out.writelines((tmp_path / "train.jsonl").read_text("utf-8").splitlines(keepends=True)[:30])
    found = study(file, StudyPlan(str(tmp_path / "test.jsonl"), [10], [], [], seeds=1))
    shots = json.loads((tmp_path / "study/cells/in-context-10-0.json").read_text("utf-8"))["shots"]
    assert sorted(shots) == sorted(f"train.jsonl:{n}" for n in range(31, 41))
    assert "30 of 42 evaluated prompts are also among the training rows" in found.notes


@pytest.mark.parametrize(
    ("plan", "overrides", "error"),
    [
        ({"in_context": [41]}, [], "^--in-context or --k: asks for 41 shots, and .* has 40 rows"),
        ({"tuned": [21]}, [], "^--tuned or --k: asks for 21 rows of each label.* only 20 of 'bad', 20 of 'good'"),
        ({"task": "loss"}, [], "is a loss; few-shot tables want choices"),
        ({"task": "exact_mtch"}, [], "there is no task"),
        ({"test": "train.jsonl"}, [], "is data.train itself"),
        ({}, ["data.shots=2"], "is set for each cell"),
        ({"test": "none.jsonl"}, [], "no such file"),
        ({"tuned": [2]}, ["tune.targets=q_porj"], "matches no module"),
        ({"both": [2]}, ["memory.limit=1e-4"], "training needs"),
    ],
)
def test_what_can_not_be_is_refused_first(
    plan: dict[str, Any], overrides: list[str], error: str, reviews: Callable[..., Path], tmp_path: Path
) -> None:
    file = reviews()
    test = str(tmp_path / plan.pop("test", "test.jsonl"))
    whole = {"in_context": [], "tuned": [], "both": [], **plan}
    with pytest.raises(ConfigError, match=error):
        fewshot(file, overrides, StudyPlan(test, **whole), out=tmp_path / "study", console=QUIET)
    assert not (tmp_path / "study").exists()


def test_shots_that_overflow_the_context_are_refused_or_counted(reviews: Callable[..., Path], tmp_path: Path) -> None:
    """The tiny model's context has 512 tokens; rows of 400 leave no room for another one."""
    file = reviews()
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text("utf-8").splitlines()]
    rows[0]["said"] = "at " * 250
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    plan: dict[str, Any] = {
        "test": str(tmp_path / "test.jsonl"),
        "in_context": [12],
        "tuned": [],
        "both": [],
        "seeds": 1,
    }
    with pytest.raises(DataError, match=r"test\.jsonl:1: .* the context has 512"):
        study(file, StudyPlan(**plan))
    found = study(file, StudyPlan(**plan, overflow="drop"), overwrite=True)
    assert [line.rows for line in found.lines][-1] == 11
    assert any("1 of 12 rows are left out" in note for note in found.notes)


def test_another_study_in_the_folder_is_kept(reviews: Callable[..., Path], tmp_path: Path) -> None:
    file = reviews()
    plan = StudyPlan(str(tmp_path / "test.jsonl"), [1], [], [], seeds=1)
    first = study(file, plan)
    with pytest.raises(ConfigError, match=r"another study \(other recipe\).*--overwrite"):
        fewshot(file, ["optim.lr=3e-4"], plan, out=tmp_path / "study", console=QUIET)
    more = study(file, StudyPlan(str(tmp_path / "test.jsonl"), [1, 3], [], [], seeds=1))
    assert more.lines[:2] == first.lines
    process = subprocess.Popen(["true"])  # a study that was killed at its first write goes on
    process.wait()
    (tmp_path / "begun").mkdir()
    (tmp_path / f"begun/.tmp-mlxft-{process.pid}-study.json").touch()
    assert fewshot(file, [], plan, out=tmp_path / "begun", console=QUIET).lines == first.lines
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(ConfigError, match="is not a few-shot study"):
        fewshot(file, [], plan, out=tmp_path / "full", overwrite=True, console=QUIET)


def test_numbers_of_examples() -> None:
    none: dict[str, str | None] = dict.fromkeys(("in_context", "tuned", "both"))
    assert read_ks(None, none) == ([1, 4, 16], [1, 4, 16], [1, 4, 16])
    assert read_ks("0,4,all", none) == ([4], [4, "all"], [4])
    assert read_ks(None, {**none, "tuned": "16, all"}) == ([], [16, "all"], [])
    assert read_ks("2", {**none, "tuned": "all"}) == ([2], ["all"], [2])
    for ks, given, error in (
        ("1,x", none, "--k: 'x' is no number"),
        ("-1", none, "no number"),
        (None, {**none, "both": "all"}, "--both: all rows can not be shown"),
        ("1,1", none, "1 is given twice"),
        (",", none, "has no numbers"),
    ):
        with pytest.raises(ConfigError, match=error):
            read_ks(ks, given)
