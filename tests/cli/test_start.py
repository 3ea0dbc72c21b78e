"""The doors: training without a recipe, mlxft init, a run by its bare name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.config import parse_config
from mlxft.data.formats import recognise
from mlxft.data.sources import read_rows
from mlxft.errors import DataError
from mlxft.runs import prompt_argument
from mlxft.study import start

Command = Callable[..., Any]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A spreadsheet's export in the working folder, with an empty row at its end."""
    monkeypatch.chdir(tmp_path)
    lines = [f"the {word} in;the rain {word}" for word in ("house", "rain", "spain", "falls", "plain") * 6]
    Path("faq.csv").write_text("\n".join(["Question;Answer", *lines, ";"]) + "\n", "utf-8")
    return "faq.csv"


def test_trains_without_a_recipe(rows: str, mlxft: Command, tiny_model_dir: Path) -> None:
    """The run holds the recipe that the options came to, is resumed, and is named as the data."""
    model = str(tiny_model_dir)
    found = mlxft("train", "--model", model, "--data", rows, "run.steps=2", "data.template=none")
    assert found.code == 0, found.err
    kept = yaml.safe_load(Path("runs/sft-faq/config.yaml").read_text())
    assert kept["model"]["path"] == model
    assert kept["data"]["format"] == "prompt-completion"
    assert "mlxft serve runs/sft-faq" in found.out
    same = mlxft(
        "train", f"model.path={model}", f"data.train={rows}", "run.steps=2", "run.name=b", "data.template=none"
    )
    assert same.code == 0, same.err
    assert mlxft("train", "--resume", "sft-faq").code == 0
    assert "mlxft init" in mlxft("train").err


def test_a_run_is_named_the_same_way_everywhere(rows: str, mlxft: Command, tiny_model_dir: Path) -> None:
    given = ("--model", str(tiny_model_dir), "--data", rows, "run.steps=2", "run.name=mine", "data.template=none")
    assert mlxft("train", *given).code == 0
    for name in ("mine", "runs/mine"):
        for command in (
            ("generate", "--model", name, "the", "--max-tokens", "2"),
            ("eval", name, rows, "--overwrite"),
            ("runs", "show", name),
            ("fuse", name, f"fused-{len(name)}"),
            ("fuse", f"merged-{len(name)}", "--adapter", f"{name}:0.5"),
            ("export", "--format", "peft", name, f"peft-{len(name)}"),
            ("compare", "the", "--models", f"base,{name}", "--max-tokens", "2", "--json"),
        ):
            found = mlxft(*command)
            assert found.code == 0, (command, found.err)


def test_init_proposes_a_recipe_that_trains(
    rows: str, mlxft: Command, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "fitting", lambda *given, **more: [])
    made = mlxft("init", rows, "--model", str(tiny_model_dir))
    assert made.code == 0, made.err
    assert "{prompt: Question, completion: Answer}" in made.out
    recipe = yaml.safe_load(Path("mlxft.yaml").read_text())
    assert recipe["data"]["valid"] == 0.1
    assert recipe["run"]["name"] == "faq"
    again = mlxft("init", rows)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert mlxft("check", "data.template=none", "--json").code == 0
    trained = mlxft("train", "run.steps=2", "data.template=none")
    assert trained.code == 0, trained.err
    shown = mlxft("compare", "--max-tokens", "2")  # its own prompts, on the latest run and its base
    assert shown.code == 0, shown.err
    assert "the house in" in shown.out


@pytest.mark.parametrize(
    ("columns", "objective", "key"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", None),
        ({"prompt": "a", "completion": "b", "label": True}, "preference", "preference"),
        ({"prompt": "a"}, "grpo", "rewards"),
    ],
)
def test_init_takes_the_objective_of_the_rows(
    columns: dict[str, Any], objective: str, key: str | None, tmp_path: Path
) -> None:
    rows = [
        {name: f"{value} {i}" if isinstance(value, str) else i % 2 == 0 for name, value in columns.items()}
        for i in range(30)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = start.propose(start.look(str(file)), start.ProposedBase("m", "lora", "")).plain()
    assert recipe["objective"] == objective
    assert key is None or key in recipe
    assert parse_config(recipe, "made").objective == objective


def test_look_counts_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = [
        {"prompt": f"Wie ist das Wetter in der Stadt {i} und was ist nicht gut?", "completion": "gut"}
        for i in range(20)
    ]
    bad = [{"prompt": "und?", "completion": ""}, good[0]]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*good, *bad]))
    seen = start.look(str(file))
    assert (seen.rows, seen.wrong, seen.duplicates, seen.labels, seen.language) == (21, 1, 1, ["gut"], "German")
    assert start.propose(seen, start.ProposedBase("m", "lora", "")).plain()["data"]["bad_rows"] == "drop"


def test_an_adapter_of_mlx_lm_names_its_base(rows: str, mlxft: Command, tiny_model_dir: Path) -> None:
    given = ("--model", str(tiny_model_dir), "--data", rows, "run.steps=2", "run.name=mine", "data.template=none")
    assert mlxft("train", *given).code == 0
    folder = Path("runs/mine/adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["mlxft"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"model": str(tiny_model_dir)}))
    folder.rename("theirs")
    found = mlxft("generate", "--model", "theirs", "the", "--max-tokens", "2")
    assert found.code == 0, found.err


def test_a_name_that_is_no_run_is_answered_with_those_there_are(
    rows: str, mlxft: Command, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the hub is asked, and in every command; a run that cannot be extended is named with the length."""
    given = ("--model", str(tiny_model_dir), "--data", rows, "run.epochs=1", "run.name=mine", "data.template=none")
    assert mlxft("train", *given).code == 0
    monkeypatch.setattr("mlxft.model.load._download", lambda *_: pytest.fail("the hub was asked"))
    for command in (
        ("compare", "the", "--models", "base,zzz"),
        ("serve", "zzz"),
        ("generate", "--model", "zzz", "the"),
        ("eval", "zzz", rows),
        ("fuse", "zzz", "out"),
        ("push", "zzz", "a/b"),
        ("runs", "show", "zzz"),
        ("train", "--resume", "zzz"),
    ):
        found = mlxft(*command)
        assert found.code in (1, 2)
        assert "zzz: no such run" in found.err
        assert "; runs here: mine" in found.err, command
    for asked, more in (("epochs=3", "epochs=2"), ("steps=9", "steps=9")):
        assert f"run.name=mine-2 run.{more}" in mlxft("train", "--resume", "mine", f"run.{asked}").err
    for memory in ("16GB", "16 gib", "16g"):
        assert "a Mac with 16 GB" in mlxft("models", "--memory", memory).out


@pytest.mark.parametrize(
    ("given", "way"),
    [
        (("smollm2-135m", "faq.csv"), "--model smollm2-135m --data faq.csv"),
        (("faq.csv", "a/b"), "--model a/b --data faq.csv"),
        (("a/b", "hf:c/d"), "--model a/b --data hf:c/d"),
        (("faq.csv",), "--model MODEL --data faq.csv"),
        (("smollm2-135m",), "--model smollm2-135m --data FILE"),
        (("mlxft.yaml", "faq.csv"), "data.train=faq.csv"),
    ],
)
def test_model_and_rows_by_position(given: tuple[str, ...], way: str, rows: str, mlxft: Command) -> None:
    for command in ("train", "check"):
        found = mlxft(command, *given)
        assert (found.code, way in found.err) == (2, True), found.err
    assert "a pattern in quotes" in mlxft("init", rows, "more.csv").err, "what a shell makes of *.csv"


def test_init_proposes_what_judged_rows_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thumbs as people write them are for KTO, and ratings are said to be unused; a file's test rows validate."""
    monkeypatch.chdir(tmp_path)
    for sign, (good, bad) in enumerate([("👍", "👎"), ("up", "down"), ("TRUE", "FALSE"), ("thumbs up", "thumbs_down")]):
        lines = [f"Question {i}?,Text {i}.,{bad if i % 3 else good}" for i in range(30)]
        (file := tmp_path / f"{sign}.csv").write_text("\n".join(["question,answer,feedback", *lines]), "utf-8")
        recipe = start.propose(start.look(str(file)), start.ProposedBase("m", "lora", "")).plain()
        assert recipe["preference"] == {"loss": "kto"}
        with pytest.raises(DataError, match="kto takes it"):
            recognise(read_rows(str(file), "train"), formats=("prompt-completion", "text"))
        assert recognise(read_rows(str(file), "train"), formats=("prompt-completion",)).fields["prompt"] == "question"
    file.write_text("\n".join(["question,answer,stars", *(f"Q {i}?,Text {i}.,{i % 5}" for i in range(30))]))
    assert any("stars seems to rate" in note for note in start.look(str(file)).notes)
    Path("a.json").write_text(json.dumps({s: [{"prompt": f"{s}?", "completion": "b"}] for s in ("train", "test")}))
    recipe = start.propose(start.look("a.json"), start.ProposedBase("m", "lora", "")).plain()
    assert (recipe["data"]["train"], recipe["data"]["valid"]) == ("a.json", "a.json:test")


def test_the_prompt_of_the_next_command_is_one_word_of_a_shell() -> None:
    assert prompt_argument(["two\nlines", "-x", 'Say "hi" to Ann\'s $HOME!']) == """'Say "hi" to Ann'"'"'s $HOME!' """
    assert prompt_argument(["two\nlines"]) == "", "the run has prompts of its own"
    assert prompt_argument(["two\nlines"], kept=False) == prompt_argument([]) == "'a prompt' "
