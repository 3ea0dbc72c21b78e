"""Rows as people bring them, through the commands: halves of characters, pairs as they are published, columns that
nothing reads, rows longer than the model's context."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mlxft.check import check
from mlxft.config import load_config, parse_config
from mlxft.data.dataset import with_format
from mlxft.errors import DataError
from mlxft.objectives.base import beyond_context

Command = Callable[..., Any]
HALF = "contains half of a character (U+D83D at "
CHAT = {"messages": [{"role": "user", "content": "in"}, {"role": "assistant", "content": "on"}]}
PAIR = {"prompt": "in", "chosen": "on the", "rejected": "on a"}


def save(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return name


@pytest.mark.parametrize(
    ("objective", "format", "row", "place"),
    [
        ("sft", "messages", {"messages": [{"role": "user", "content": "hi \ud83d"}]}, "messages[0].content"),
        ("sft", "text", {"text": "half \ud83d of it"}, "text"),
        ("sft", "prompt-completion", {"prompt": "p", "completion": "\ud83d"}, "completion"),
        ("preference", "preference", {**PAIR, "prompt": "p \ud83d"}, "prompt"),
        ("reward", "preference", {**PAIR, "rejected": "p \ud83d"}, "rejected"),
        ("preference", "unpaired", {"prompt": "p", "completion": "\ud83d", "label": True}, "completion"),
        ("grpo", "prompts", {"prompt": "p", "answer": "\ud83d"}, "answer"),
    ],
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_half_a_character_is_a_bad_row(
    command: str, objective: str, format: str, row: Any, place: str, write: Command, refused: Command
) -> None:
    changes: dict[str, Any] = {"data.train": save("odd.jsonl", row, row), "data.format": format}
    if format == "unpaired":
        changes["preference"] = {"loss": "kto"}
    if objective == "grpo":
        rollout = {"prompts": 1, "samples": 2, "max_tokens": 4}
        changes |= {"rewards": {"rules": [{"kind": "exact_match"}]}, "rollout": rollout}
    said = refused(1, command, write(objective=objective, **changes))
    assert [line.split(" contains ")[0] for line in said.splitlines()] == [
        f"DataError: odd.jsonl:1: {place}",
        f"odd.jsonl:2: {place}",
    ]
    assert HALF in said


def test_half_a_character_is_found_before_a_model_answers(
    refused: Command, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows, and of what is given on the command line."""
    monkeypatch.chdir(tmp_path)
    save("qa.jsonl", {"prompt": "p", "answer": "a \ud83d"}, {"prompt": "q", "answer": "b"})
    model = str(tiny_model_dir)
    said = refused(1, "eval", model, "qa.jsonl", "--task", "exact_match", "--out", "ev")
    assert f"qa.jsonl:1: answer {HALF}2)" in said
    for command in (("generate", "--model", model, "--batch", "qa.jsonl"), ("label", "qa.jsonl", "--out", "o.jsonl")):
        assert f"qa.jsonl:1: answer {HALF}2)" in refused(1, *command)
    for args in (("p \ud83d",), ("p", "--system", "p \ud83d"), ("p", "--stop", "p \ud83d")):
        assert f"{HALF}2)" in refused(2, "generate", "--model", model, *args)
    # A byte that is not UTF-8 comes to Python so.
    assert "not UTF-8 (byte 3 is 0xff)" in refused(2, "generate", "--model", model, "p \udcff")


def test_half_a_character_in_a_recipe(write: Command, refused: Command) -> None:
    recipe = write(**{"run.sample_prompts": ["in", "on \ud83d"]})
    assert "\\ud83d" in Path(recipe).read_text("utf-8").lower(), "as YAML writes it"
    said = refused(2, "train", recipe)
    assert f"recipe.yaml: run.sample_prompts[1] {HALF}3)" in said
    assert f"data.fields.messages {HALF}0)" in refused(2, "check", write(), 'data.fields={messages: "\\ud83d"}')


# --- pairs


@pytest.fixture
def pairs(write: Command) -> str:
    """A recipe of DPO on one pair."""
    save("pairs.jsonl", {**PAIR, "margin": 1.5}, {"prompt": "or", "chosen": "at", "rejected": "is"})
    return str(write(objective="preference", **{"data.train": "pairs.jsonl", "data.format": "preference"}))


def test_check_shows_both_completions_and_where_they_part(pairs: str, mlxft: Command) -> None:
    out = mlxft("check", pairs, "--rows", "1").out
    shown = out[out.index("pairs.jsonl:1") :]
    assert shown.startswith(
        "pairs.jsonl:1: prompt 16 tokens, chosen 4, rejected 3, the first 1 shared, margin 1.5\n"
        "<|im_start|>user\nin<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "chosen: ⟦on⟧⟦ the<|im_end|>⟧\n" in shown
    assert "rejected: ⟦on⟧⟦ a<|im_end|>⟧\n" in shown
    both = mlxft("check", pairs, "--rows", "2").out
    assert "chosen: ⟦at<|im_end|>⟧\nrejected: ⟦is<|im_end|>⟧\n" in both, "these share nothing"


def test_check_shows_pairs_as_json(pairs: str, mlxft: Command) -> None:
    first, second = json.loads(mlxft("check", pairs, "--json").out)["previews"]
    assert first == {
        "row": "pairs.jsonl:1",
        "margin": 1.5,
        "prompt": "<|im_start|>user\nin<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "on the<|im_end|>",
        "rejected": "on a<|im_end|>",
        "shared": "on",
        "prompt_tokens": 16,
        "chosen_tokens": 4,
        "rejected_tokens": 3,
        "shared_tokens": 1,
    }
    assert (second["shared"], second["shared_tokens"]) == ("", 0)
    assert json.loads(mlxft("check", pairs, "--json", "--rows", "0").out)["previews"] == []


def test_check_shows_rows_and_answers_as_json(write: Command, mlxft: Command) -> None:
    save("rows.jsonl", CHAT)
    (row,) = json.loads(mlxft("check", write(**{"data.train": "rows.jsonl"}), "--json").out)["previews"]
    assert (row["row"], row["trained_tokens"]) == ("rows.jsonl:1", 2)
    assert [piece for piece in row["pieces"] if piece["trained"]] == [{"text": "on<|im_end|>", "trained": True}]
    save("good.jsonl", {"prompt": "in", "completion": "on", "label": False}, {**PAIR, "completion": "a", "label": True})
    kto = write(objective="preference", preference={"loss": "kto"}, **{"data.train": "good.jsonl"})
    first, _ = json.loads(mlxft("check", kto, "data.format=unpaired", "--json").out)["previews"]
    assert (first["completion"], first["completion_tokens"], first["label"]) == ("on<|im_end|>", 2, False)
    out = mlxft("check", kto, "data.format=unpaired").out
    assert "good.jsonl:1: prompt 16 tokens, completion 2, bad\n" in out
    assert "completion: ⟦on<|im_end|>⟧\n" in out


def test_colour_tells_what_the_completions_share(pairs: str) -> None:
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, _environ={"TERM": "xterm-256color", "COLUMNS": "20"})
    check(load_config(Path(pairs)), 1, terminal, as_json=False)
    assert "chosen: \x1b[32mon\x1b[0m\x1b[1;32m the<|im_end|>\x1b[0m" in drawn.getvalue()
    assert "⟦" not in drawn.getvalue()


def test_pairs_with_a_system_column(write: Command, mlxft: Command, refused: Command) -> None:
    """Case: Intel's orca_dpo_pairs and its kin; of them csv has an empty text where there is none."""
    save(
        "orca.jsonl",
        {"system": "Be terse.", "question": "in", "chosen": "on", "rejected": "an the"},
        {"system": "", "question": "or", "chosen": "er", "rejected": "the"},
    )
    recipe = write(objective="preference", **{"data.train": "orca.jsonl", "data.format": "preference"})
    turns = "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nin<|im_end|>\n<|im_start|>assistant\n"
    for fields in ((), ("data.fields={prompt: question}",)):
        first, second = json.loads(mlxft("check", recipe, *fields, "--json").out)["previews"]
        assert (first["prompt"], "system" in second["prompt"]) == (turns, False)
    told = mlxft("check", recipe, 'data.fields={prompt: "{system} {question}"}', "--json").out
    assert "<|im_start|>user\nBe terse. in<|im_end|>" in json.loads(told)["previews"][0]["prompt"]
    said = refused(1, "check", recipe, "data.template=none")
    assert said.startswith("DataError: orca.jsonl:1: system has no place in plain text")
    for objective in ("preference", "reward"):
        assert mlxft("train", recipe, f"objective={objective}", f"run.name={objective}", "run.steps=1").code == 0


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("prompt-completion", {"prompt": "in", "completion": "on"}),
        ("messages", CHAT),
    ],
)
def test_a_system_column_is_trained_with(format: str, row: dict[str, Any], write: Command, mlxft: Command) -> None:
    save("rows.jsonl", {**row, "system": "Be terse."})
    out = mlxft("check", write(**{"data.train": "rows.jsonl", "data.format": format})).out
    assert "\n<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nin<|im_end|>\n" in out


def test_hh_without_a_chat_template_is_text(write: Command, mlxft: Command) -> None:
    save(
        "hh.jsonl",
        {"chosen": "\n\nHuman: in\n\nAssistant: on", "rejected": "\n\nHuman: in\n\nAssistant: at"},
    )
    recipe = write(objective="reward", **{"data.train": "hh.jsonl", "data.format": "preference"})
    (chat,) = json.loads(mlxft("check", recipe, "--json").out)["previews"]
    assert chat["prompt"] == "<|im_start|>user\nin<|im_end|>\n<|im_start|>assistant\n"
    facts = json.loads(mlxft("check", recipe, "data.template=none", "--json").out)
    (plain,) = facts["previews"]
    assert (plain["prompt"], plain["chosen"]) == ("\n\nHuman: in\n\nAssistant:", " on<|im_end|>")
    assert "rows are read as published: Anthropic's HH: chosen and rejected are whole transcripts" in facts["notes"]


# --- notes


def test_columns_that_nothing_reads_are_named(write: Command, mlxft: Command) -> None:
    save("rows.jsonl", *[{**CHAT, "id": i, "source": "a", "topic": f"t{i % 2}"} for i in range(4)])
    save("valid.jsonl", {**CHAT, "id": 3, "source": "a", "topic": "b"})
    save("other.jsonl", {**CHAT, "url": "b"})
    recipe = write(**{"data.train": "rows.jsonl", "data.valid": "valid.jsonl", "run.steps": 1})
    for command in ("check", "train"):
        out = mlxft(command, recipe).out
        assert out.count("columns not used: id, source, topic\n") == 1, "of both files, which have the same"
        assert out.count("columns not used") == 1
    assert "validation: columns not used: url\n" in mlxft("check", recipe, "data.valid=other.jsonl").out
    used = mlxft("check", recipe, "data.shots=1", "data.label=topic", 'data.fields={system: "{source}"}').out
    assert "columns not used: id\n" in used


def test_columns_that_rewards_read(write: Command, mlxft: Command) -> None:
    save("prompts.jsonl", {"prompt": "in", "answer": "on", "topic": "a"})
    Path("reward.py").write_text("def score(prompts, completions, rows):\n    return [0.0] * len(rows)\n", "utf-8")
    recipe = write(
        objective="grpo",
        rollout={"prompts": 1, "samples": 2, "max_tokens": 4},
        **{"data.train": "prompts.jsonl", "data.format": "prompts", "batch.rows": None},
    )

    def notes(rewards: str) -> list[str]:
        done = mlxft("check", recipe, f"rewards={rewards}", "--json")
        assert done.code == 0, done.err
        return [note for note in json.loads(done.out)["notes"] if note.startswith("columns")]

    assert notes("{rules: [{kind: exact_match}]}") == ["columns not used: topic"]
    assert notes("{rules: [{kind: length, max: 9}]}") == ["columns not used: answer, topic"]
    assert notes("{function: 'reward.py:score'}") == [], "it is given the whole row"


def test_rows_that_do_not_fit_may_be_left_out(write: Command, mlxft: Command, refused: Command) -> None:
    """As of HH, where a few transcripts differ before their last answer."""
    odd = {"chosen": "\n\nHuman: in\n\nAssistant: on", "rejected": "\n\nHuman: at\n\nAssistant: on"}
    save(
        "hh.jsonl",
        odd,
        {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"},
        {"text": "\ud83d"},
    )
    recipe = write(objective="preference", **{"data.train": "hh.jsonl", "data.format": "preference", "run.steps": 1})
    said = refused(1, "check", recipe)
    assert "hh.jsonl:1: chosen[0] and rejected[0] differ" in said
    assert "hh.jsonl:3: text contains half of a character" in said
    note = "2 rows are left out (data.bad_rows: drop), the first: hh.jsonl:1: chosen[0] and rejected[0] differ"
    for command in ("check", "train"):
        done = mlxft(command, recipe, "data.bad_rows=drop")
        assert (done.code, done.out.count(note)) == (0, 1)
    save("hh.jsonl", odd)
    assert "hh.jsonl:1: chosen[0] and rejected[0] differ" in refused(1, "check", recipe, "data.bad_rows=drop")


def test_labels_are_those_of_the_rows_that_are_left(write: Command, mlxft: Command, refused: Command) -> None:
    rows = [{**CHAT, "topic": topic} for topic in ("a", "b", "b")]
    save("rows.jsonl", {"messages": [], "topic": "c"}, *rows, {"topic": "c"})
    recipe = write(**{"data.train": "rows.jsonl", "data.shots": 1, "data.label": "topic"})
    out = mlxft("check", recipe, "data.bad_rows=drop").out
    assert "2 of 3 rows are used: 1 of each label, 'a', 'b' (data.shots)" in out
    assert "rows.jsonl:1: messages is empty" in refused(1, "check", recipe)


LONG = " ".join(["the in on"] * 12)


@pytest.mark.parametrize(
    ("objective", "format", "row", "short", "more"),
    [
        ("sft", "messages", {"messages": [{"role": "user", "content": LONG}, CHAT["messages"][1]]}, CHAT, {}),
        ("preference", "preference", {**PAIR, "chosen": LONG}, PAIR, {}),
        (
            "preference",
            "unpaired",
            {"prompt": LONG, "completion": "on", "label": True},
            {"prompt": "in", "completion": "on", "label": False},
            {"preference": {"loss": "kto"}},
        ),
    ],
)
def test_rows_beyond_the_models_context_are_counted(
    objective: str,
    format: str,
    row: Any,
    short: Any,
    more: Any,
    write: Command,
    mlxft: Command,
    make_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    save("rows.jsonl", row, short, row, short)
    model = str(make_model_dir(tmp_path / "short", max_position_embeddings=24))
    changes = {"data.train": "rows.jsonl", "data.format": format, "run.steps": 1, "model.path": model, **more}
    recipe = write(objective=objective, **changes)
    for command in ("check", "train"):
        out = mlxft(command, recipe).out
        (said,) = [line for line in out.splitlines() if "context" in line]
        assert (
            "2 rows are longer than the model's context of 24 tokens (max_position_embeddings); the longest has" in said
        )
    save("rows.jsonl", short, short)
    save("valid.jsonl", row)
    valid = mlxft("check", recipe, "data.valid=valid.jsonl").out
    assert "note: validation: 1 row is longer than the model's context of 24 tokens" in valid
    assert "context" not in mlxft("check", recipe).out


@pytest.mark.parametrize("kind", ["gpt2", "gpt_bigcode"])
def test_rows_beyond_a_table_of_positions_are_refused(
    kind: str, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The model has no numbers for them: MLX would read, and in training write, what lies behind its table."""
    about = {"model_type": kind, "n_positions": 16, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(about))
    config = parse_config(recipe(**{"model.path": str(tmp_path)}))
    assert not beyond_context(config.model.path, [3, 16])
    with pytest.raises(DataError, match=r"2 rows are longer than the 16 positions .*data\.max_length to 16"):
        beyond_context(config.model.path, [3, 17, 16, 40])


# --- formats that are found


QA = [{"Frage": f"in {i}", "Antwort": f"on the {i}"} for i in range(6)]


def test_a_run_keeps_the_format_that_its_rows_had(
    write: Command, mlxft: Command, refused: Command, tmp_path: Path
) -> None:
    save("qa.jsonl", *QA)
    recipe = write(**{"data.train": "qa.jsonl", "data.format": None, "run.steps": 2})
    note = "rows are read as data.format: prompt-completion, data.fields: {prompt: Frage, completion: Antwort}\n"
    assert mlxft("check", recipe).out.count(note) == 1
    done = mlxft("train", recipe)
    assert (done.code, done.out.count(note)) == (0, 1)
    kept = load_config(tmp_path / "runs" / "a" / "config.yaml", looked_at=True).data
    assert (kept.format, kept.fields) == ("prompt-completion", {"prompt": "Frage", "completion": "Antwort"})
    # Rows that could now be read in several ways are read as before by a resumed run.
    save("qa.jsonl", *({**row, "Lösung": "x"} for row in QA))
    assert "can be read in several ways" in refused(1, "check", recipe)
    assert mlxft("train", recipe, "--resume", "run.steps=2").code == 0
    streamed = mlxft("check", recipe, "data.train=qa.jsonl", "data.stream=true", "data.fields={completion: Antwort}")
    assert note in streamed.out, streamed.err


def test_settings_are_held_to_the_format_that_is_found(write: Command, refused: Command, mlxft: Command) -> None:
    save("texts.jsonl", {"content": "the in on " * 30}, {"content": "at"})
    recipe = write(**{"data.train": "texts.jsonl", "data.format": None})
    assert "train_on: last does not work with format text" in refused(2, "check", recipe, "data.train_on=last")
    assert mlxft("check", recipe, "data.overflow=split", "data.max_length=20").code == 0
    save("chats.jsonl", CHAT)
    said = refused(2, "check", recipe, "data.train=chats.jsonl", "data.overflow=split")
    assert "data.overflow: split works only with format text, not messages" in said
    said = refused(1, "check", recipe, "data.train=chats.jsonl", "data.template=none")
    assert "chats.jsonl: the rows look like data.format: messages" in said
    said = refused(2, "check", recipe, "data.invalid=drop")
    assert "invalid is called bad_rows: write data.bad_rows: drop" in said


EVERY = {
    "messages": ("sft", CHAT),
    "prompt-completion": ("sft", {"prompt": "in", "completion": "on"}),
    "text": ("sft", {"text": "in on"}),
    "sharegpt": ("sft", {"conversations": [{"from": "human", "value": "in"}, {"from": "gpt", "value": "on"}]}),
    "alpaca": ("sft", {"instruction": "in", "output": "on"}),
    "preference": ("preference", PAIR),
    "ratings": ("preference", {"prompt": "in", "answers": ["on", "at"], "ratings": [2, 1]}),
    "unpaired": ("preference", {"prompt": "in", "completion": "on", "label": True}),
    "prompts": ("grpo", {"prompt": "in"}),
}


@pytest.mark.parametrize("objective", ["sft", "preference", "reward", "grpo", "kto"])
@pytest.mark.parametrize("format", EVERY)
def test_rows_for_another_objective_are_sent_to_it(
    objective: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each format under each objective: taken, or the error names an objective and recipe, which then take it."""
    monkeypatch.chdir(tmp_path)
    taker, row = EVERY[format]
    save("rows.jsonl", row, {**row, **({"label": False} if format == "unpaired" else {})})
    name = "preference" if objective == "kto" else objective
    raw = {"objective": name, "model": {"path": "x"}, "data": {"train": "rows.jsonl"}}
    raw |= {"preference": {"loss": "kto"}} if objective == "kto" else {}
    taken = {
        "sft": ("messages", "prompt-completion", "text", "sharegpt", "alpaca"),
        "kto": ("unpaired", "preference"),
        "grpo": ("prompts", "prompt-completion", "preference", "ratings", "unpaired", "alpaca"),
    }
    if format in taken.get(objective, ("preference", "ratings")):
        assert with_format(parse_config(raw)).data.format == ("prompts" if objective == "grpo" else format)
        return
    with pytest.raises(DataError) as caught:
        with_format(parse_config(raw))
    said = str(caught.value)
    assert said.startswith(
        f"rows.jsonl: the rows look like data.format: {format}, which objective {name} does not take"
    )
    assert f"objective: {taker}" in said
    (named,) = re.findall(r"mlxft train (configs/\S+\.yaml) data\.train=rows\.jsonl", said)
    settings = yaml.safe_load((Path(__file__).parents[2] / named).read_text("utf-8"))
    found = with_format(parse_config({**settings, "data": {**settings["data"], "train": "rows.jsonl"}}))
    assert found.data.format == format
