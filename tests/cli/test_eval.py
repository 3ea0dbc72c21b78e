"""mlxft eval as a command: figures, files, comparisons, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "green", "red"], "answer": 0},
    {"question": "Two and two are", "choices": ["three", "four"], "answer": "four"},
    {"question": "A cat is", "choices": ["an animal", "a stone"], "answer": 0},
    {"question": "Ice is", "choices": ["hot", "cold"], "answer": 1},
]
REVIEWS = [{"text": f"{word} food, {n} of them", "label": word} for n in range(4) for word in ("good", "bad")]
TASK = {"prompt": "{text}\nGood or bad?", "answer": "label", "choices": ["good", "bad"]}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def here(write: Callable[..., str], tmp_path: Path) -> Path:
    """The working directory, with files to evaluate on and a task."""
    write()
    for name, rows in (("questions", QUESTIONS), ("reviews", REVIEWS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK), "utf-8")
    return tmp_path


@pytest.fixture
def run(here: Path, mlxft: Callable[..., Any]) -> str:
    assert mlxft("train", "recipe.yaml").code == 0
    return "runs/a"


def test_a_run_against_its_base(run: str, here: Path, shell: Callable[..., Any]) -> None:
    done = shell("eval", run, "rows-10.jsonl", "--against", "base", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    (task,) = found["tasks"]
    figures, (pair,) = task["figures"], task["paired"]
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(figures["loss"]["value"]))
    assert figures["loss"]["n"] == 10
    assert pair["difference"] == pytest.approx(figures["loss"]["value"] - task["against"]["loss"]["value"])
    assert pair["difference"] < 0, "it has trained on these rows"
    assert pair["low"] < pair["difference"] < pair["high"]
    assert pair["won"] + pair["lost"] + pair["tied"] == 10
    kept = lines(here / "runs/a/eval/rows-10/predictions.jsonl")
    assert [line["row"] for line in kept] == [f"rows-10.jsonl:{n}" for n in range(1, 11)]
    tokens = sum(line["tokens"] for line in kept)
    assert sum(line["tokens"] * line["scores"]["loss"] for line in kept) / tokens == pytest.approx(
        figures["loss"]["value"]
    )
    assert kept[0]["against"]["scores"]["loss"] > kept[0]["scores"]["loss"]
    assert json.loads((here / "runs/a/eval/rows-10/results.json").read_text("utf-8")) == found


def test_the_loss_is_that_of_validation(here: Path, write: Any, mlxft: Callable[..., Any]) -> None:
    """The last validation of a run, measured again from outside."""
    changes = {"data.valid": "rows-10.jsonl", "run.eval_every": 4, "run.dir": "runs"}
    assert mlxft("train", write(**changes)).code == 0
    events = [event for event in lines(here / "runs/a/metrics.jsonl") if event["event"] == "eval"]
    found = json.loads(mlxft("eval", "runs/a", "rows-10.jsonl", "--json").out)
    assert found["tasks"][0]["figures"]["loss"]["value"] == pytest.approx(min(e["loss"] for e in events), rel=1e-4)


def test_choices_and_written_answers(here: Path, tiny_model_dir: Path, mlxft: Callable[..., Any]) -> None:
    model = str(tiny_model_dir)
    done = mlxft("eval", model, "questions.jsonl", "--task", "choice", "--json", "--out", "out")
    (task,) = json.loads(done.out)["tasks"]
    kept = lines(here / "out/predictions.jsonl")
    right = [line["prediction"] == line["target"] for line in kept]
    assert task["figures"]["accuracy"]["value"] == sum(right) / 4
    assert [line["target"] for line in kept] == ["blue", "four", "an animal", "cold"]
    assert all(line["choices"][line["logprobs"].index(max(line["logprobs"]))] == line["prediction"] for line in kept)
    (here / "qa.jsonl").write_text(json.dumps({"prompt": "Where?", "completion": "Rome"}) + "\n", "utf-8")
    asked = ["--task", "exact_match", "--task", "f1", "--task", "loss"]
    both = json.loads(mlxft("eval", model, "qa.jsonl", *asked, "--json").out)
    assert [(t["task"], list(t["figures"])) for t in both["tasks"]] == [
        ("exact_match+f1", ["exact_match", "f1"]),
        ("loss", ["loss", "perplexity"]),
    ]
    assert both["tasks"][0]["figures"]["f1"]["se"] is None, "one row says nothing of its error"


def test_plain_text_is_lm_evals_way(here: Path, tiny_model_dir: Path, mlxft: Callable[..., Any]) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden/lm_eval_choice.json").read_text("utf-8"))
    (here / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in golden["items"]), "utf-8")
    args = ["eval", str(tiny_model_dir), "items.jsonl", "--task", "choice", "--json"]
    plain = json.loads(mlxft(*args, "--template", "none").out)["tasks"][0]["figures"]
    assert plain["accuracy"]["value"] == pytest.approx(golden["acc"])
    assert plain["accuracy_norm"]["value"] == pytest.approx(golden["acc_norm"])
    chat = json.loads(mlxft(*args).out)["tasks"][0]["figures"]
    assert chat != plain, "by default the prompt goes through the chat template"


def test_shots_are_never_rows_that_are_asked(here: Path, tiny_model_dir: Path, mlxft: Any, refused: Any) -> None:
    asked = ["eval", str(tiny_model_dir), "reviews.jsonl", "--task", "task.yaml", "--limit", "3"]
    args = [*asked, "--shots", "2", "--shots-from", "reviews.jsonl"]
    done = mlxft(*args, "--out", "out")
    assert done.code == 0, done.err
    assert "2 shots" in done.out
    for line in lines(here / "out/predictions.jsonl"):
        shown = [m["content"] for m in line["prompt"]]
        assert len(shown) == 5
        assert sorted(shown[1::2]) == ["bad", "good"]
        assert not {c.split("\n")[0] for c in shown[0:4:2]} & {row["text"] for row in REVIEWS[:3]}
    before = (here / "out/predictions.jsonl").read_bytes()
    assert "exists already" in refused(2, *args, "--out", "out")
    assert mlxft(*args, "--out", "out", "--overwrite").code == 0
    assert (here / "out/predictions.jsonl").read_bytes() == before, "the same seed shows the same rows"
    args[-3] = "6"
    assert "asks for 6 shots, and reviews.jsonl has 5 rows" in refused(2, *args)
    args[-3] = "4"
    said = refused(1, *args, "--max-length", "60")
    assert "reviews.jsonl:1: prompt, 4 shots and completion take" in said
    assert "use fewer shots, or --overflow drop" in said


def test_a_reward_run_judges_and_does_not_write(here: Path, write: Any, mlxft: Any, refused: Any) -> None:
    pairs = [{"prompt": f"{n} in?", "chosen": "the house", "rejected": "is of"} for n in range(8)]
    (here / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pairs), "utf-8")
    changes = {"objective": "reward", "data.train": "pairs.jsonl", "data.format": "preference", "run.dir": "runs"}
    assert mlxft("train", write(**changes)).code == 0
    model = yaml.safe_load(Path("recipe.yaml").read_text("utf-8"))["model"]["path"]
    said = refused(1, "eval", "runs/a", "questions.jsonl", "--task", "choice")
    assert "is a reward model: it gives scores, not text" in said
    (here / "asked.jsonl").write_text('{"prompt": "in?"}\n{"prompt": "on?"}\n', "utf-8")
    done = mlxft("eval", model, "asked.jsonl", "--task", "reward:runs/a", "--json", "--out", "out")
    assert done.code == 0, done.err
    figure = json.loads(done.out)["tasks"][0]["figures"]["reward"]
    rows = [
        {"prompt": line["prompt"], "answers": [line["prediction"], "x"]}
        for line in lines(here / "out/predictions.jsonl")
    ]
    for row in rows:
        row["prompt"] = row["prompt"][0]["content"]
    (here / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    scored = [
        json.loads(line)["scores"][0]
        for line in mlxft("score", "runs/a", "answers.jsonl", "--json").out.splitlines()[:2]
    ]
    assert figure["value"] == pytest.approx(sum(scored) / 2, abs=1e-4)
    assert "gives text, not scores" in refused(1, "eval", model, "asked.jsonl", "--task", f"reward:{model}")


@pytest.mark.parametrize(
    ("rows", "args", "code", "said"),
    [
        (None, ["--task", "exactmatch"], 2, "there is no task 'exactmatch' (did you mean exact_match?)"),
        (None, ["--task", "none.yaml"], 2, "none.yaml: cannot read the recipe"),
        (None, ["--format", "mesages"], 2, "(did you mean messages?)"),
        (None, ["--task", "choice", "--task", "choice"], 2, "choice is given twice"),
        (None, ["--task", "choice", "--shots", "2"], 2, "--shots and --shots-from go together"),
        (None, ["--task", "choice", "--overflow", "truncate"], 2, "a choice task takes error, drop"),
        (None, ["--against", "base", "--task", "choice"], 2, "does not name its base"),
        (None, ["--against", "nowhere", "--task", "choice"], 1, "nowhere"),
        (None, ["--task", "choice", "--thoughts", "keep"], 2, "--thoughts keep: is for metrics of completions"),
        (None, ["--tasks", "arc_easy"], 2, "FILE: not with --tasks"),
        (None, ["--include-path", "."], 2, "go with --tasks"),
        (["{"], [], 1, "not valid JSON"),
        (['{"a": 1}'], [], 1, "rows.jsonl:1: the row has a, which fits no format"),
        (['{"question": "x", "answer": 0}'], ["--task", "choice"], 2, "choices is 'choices', which no row has"),
        (
            ['{"question": "x", "choices": ["a", "b"], "answer": 1}', '{"question": "x", "choices": [], "answer": 0}'],
            ["--task", "choice"],
            1,
            "rows.jsonl:2: choices has 0 texts; expected at least two",
        ),
        (
            ['{"question": "x", "choices": ["a", "b"], "answer": 2}'],
            ["--task", "choice"],
            1,
            "rows.jsonl:1: answer is 2; out of range",
        ),
        (
            ['{"question": "x", "choices": ["a", "b"], "answer": "c"}'],
            ["--task", "choice"],
            1,
            "expected one of the choices",
        ),
        (['{"choices": ["a", "b"], "answer": 1}'], ["--task", "choice"], 1, "rows.jsonl:1"),
        (['{"prompt": "x"}'], ["--task", "f1"], 1, "rows.jsonl:1: no wanted answer"),
        (['{"text": "x"}'], ["--task", "f1"], 2, "format text is not for a generate task"),
        (
            ['{"text": "x", "label": "good"}', '{"label": "bad"}'],
            ["--task", "task.yaml"],
            1,
            "rows.jsonl:2: no field 'text'",
        ),
        (['{"chosen": "x", "rejected": "y"}'], [], 1, "rows.jsonl:1: no field 'prompt'"),
    ],
)
def test_bad_input(
    rows: list[str] | None, args: list[str], code: int, said: str, here: Path, tiny_model_dir: Path, refused: Any
) -> None:
    file = "questions.jsonl"
    if rows is not None:
        file = "rows.jsonl"
        (here / file).write_text("".join(f"{row}\n" for row in rows), "utf-8")
    assert said in refused(code, "eval", str(tiny_model_dir), file, *args)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics": ["contain"], "choices": None}, "(did you mean contains?)"),
        ({"metrics": ["f1"]}, "give choices (by log-likelihood) or metrics"),
        ({"metrics": [], "choices": None}, "metrics: list should have at least 1 item"),
        ({"metrics": [{"kind": "regex", "pattern": "("}], "choices": None}, "is not a regular expression"),
        ({"metrics": [{"kind": "f1", "pattern": "x"}], "choices": None}, "f1 has no setting pattern"),
        ({"metrics": [{"kind": "reward"}], "choices": None}, "reward needs run"),
        ({"choices": ["good"]}, "at least two different texts"),
        ({"chioces": ["a", "b"]}, "no such setting (did you mean choices?)"),
        ({"prompt": "{text"}, "prompt"),
        ({"answer": "lable"}, "'lable', which no row has (did you mean label?)"),
        ({"max_tokens": 5}, "for metrics of completions"),
        ({"thoughts": "keep"}, "thoughts: for metrics of completions"),
        ({"metrics": [{"kind": "reward", "run": "x", "thoughts": "drop"}], "choices": None}, "no setting thoughts"),
        ({"format": "prompts"}, "give prompt, or format and fields, not both"),
    ],
)
def test_a_task_with_a_mistake(
    change: dict[str, Any], said: str, here: Path, tiny_model_dir: Path, refused: Callable[..., str]
) -> None:
    task = {name: value for name, value in (TASK | change).items() if value is not None}
    (here / "task.yaml").write_text(yaml.safe_dump(task), "utf-8")
    assert said in refused(2, "eval", str(tiny_model_dir), "reviews.jsonl", "--task", "task.yaml")


def test_a_failure_to_write_takes_no_result_away(
    here: Path, tiny_model_dir: Path, mlxft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxft import files

    flush = files.flush

    def full(path: Path) -> None:
        if "predictions" in path.name:
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(files, "flush", full)
    asked = ["eval", str(tiny_model_dir), "questions.jsonl", "--task", "choice", "--out", "out"]
    shown, told = mlxft(*asked), mlxft(*asked, "--json")
    assert (shown.code, told.code) == (1, 1)
    assert "accuracy_norm" in shown.out
    assert json.loads(told.out)["tasks"][0]["figures"]["accuracy"]["n"] == 4
    for done in (shown, told):
        assert "cannot write out/predictions.jsonl: No space left on device" in done.err
    assert not (here / "out").exists()


def test_half_of_a_character_is_named_before_anything_is_asked(here: Path, tiny_model_dir: Path, mlxft: Any) -> None:
    (here / "half.jsonl").write_text(json.dumps({"q": "in", "a": "half \ud83d"}) + "\n", "utf-8")
    task = {"prompt": "{q}", "answer": "a", "metrics": ["exact_match"], "max_tokens": 2}
    (here / "asks.yaml").write_text(yaml.safe_dump(task), "utf-8")
    done = mlxft("eval", str(tiny_model_dir), "half.jsonl", "--task", "asks.yaml", "--out", "out")
    assert done.code == 1
    assert "half.jsonl:1: a contains half of a character (U+D83D at 5)" in done.err
    assert not (here / "out").exists()


def test_lm_eval_is_an_extra(here: Path, tiny_model_dir: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "pip install 'mlxft[eval]'" in refused(2, "eval", str(tiny_model_dir), "--tasks", "arc_easy")
