"""mlxft generate, mlxft chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
SHORT = ("--max-tokens", "4")


@pytest.fixture
def trained(write: Callable[..., str], mlxft: Command) -> str:
    """A run of one step, in runs/a."""
    assert mlxft("train", write(**{"run.steps": 1, "optim.lr": 0.05})).code == 0
    return "runs/a"


def test_generate_answers_from_a_run_an_adapter_and_a_model(
    trained: str, mlxft: Command, tiny_model_dir: Path, tmp_path: Path
) -> None:
    by_run = mlxft("generate", "--model", trained, "the in", *SHORT)
    assert (by_run.code, by_run.err) == (0, "")
    assert by_run.out.endswith("\n")
    for args in (
        ("--model", f"{trained}/adapter"),
        ("--model", str(tiny_model_dir), "--adapter", trained),
        ("--model", str(tiny_model_dir), "--adapter", f"{trained}/adapter"),
    ):
        assert mlxft("generate", *args, "the in", *SHORT).out == by_run.out
    assert mlxft("generate", "--model", str(tiny_model_dir), "the in", *SHORT).code == 0


def test_a_prompt_from_a_pipe_is_the_same_prompt(trained: str, mlxft: Command, shell: Command) -> None:
    given = mlxft("generate", "--model", trained, "thé in", *SHORT)
    assert mlxft("generate", "--model", trained, *SHORT, stdin="thé in") == given
    piped = shell("generate", "--model", trained, *SHORT, stdin="thé in")
    assert (piped.code, piped.out, piped.err) == (0, given.out, "")


def test_options_act(trained: str, mlxft: Command) -> None:
    def answer(*options: str) -> str:
        done = mlxft("generate", "--model", trained, "the in", "--max-tokens", "12", *options)
        assert done.code == 0, done.err
        return str(done.out)

    hot = ("--temperature", "2", "--seed", "1")
    plain = answer()
    assert plain == answer(), "the most likely text is one text"
    assert answer(*hot) == answer(*hot) != plain
    assert answer(*hot) != answer("--temperature", "2", "--seed", "2")
    assert answer("--temperature", "2", "--top-p", "0.000001", "--seed", "1") == plain
    assert answer("--system", "of the") != plain
    assert len(answer("--max-tokens", "2")) < len(plain)


def test_wrong_use_of_generate(trained: str, refused: Callable[..., str], tiny_model_dir: Path, tmp_path: Path) -> None:
    use = ("generate", "--model", trained)
    for empty in ("", "  \n"):
        assert "the prompt is empty" in refused(2, *use, empty)
        assert "the prompt is empty" in refused(2, *use, stdin=empty)
    assert "standard input is not UTF-8 (byte 2 is 0xff)" in refused(2, *use, stdin=b"a\xff")
    assert "Missing option '--model'" in refused(2, "generate", "hi")
    assert "0 is not in the range" in refused(2, *use, "hi", "--max-tokens", "0")
    assert "top-p" in refused(2, *use, "hi", "--top-p", "1.5")
    assert "temperature is nan; expected at least 0" in refused(2, *use, "hi", "--temperature", "nan")
    assert "-1 is not in the range" in refused(2, *use, "hi", "--seed", "-1")
    assert "No such option '--temprature'" in refused(2, *use, "hi", "--temprature", "1")
    nope = refused(1, "generate", "--model", str(tiny_model_dir), "--adapter", "nope", "hi")
    assert "nope is not an adapter: adapter_config.json cannot be read" in nope
    (tmp_path / "empty").mkdir()
    assert "no config.json in empty" in refused(1, "generate", "--model", "empty", "hi")
    assert "no such file or folder" in refused(1, "generate", "--model", "./nope", "hi")
    missing = refused(1, "generate", "--model", "runs/nope", "hi")  # no hub id, though it looks like one
    assert "'runs/nope': no such file or folder" in missing


def test_a_run_without_a_result(trained: str, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / trained / "adapter").rename(tmp_path / "elsewhere")
    err = refused(1, "generate", "--model", trained, "hi")
    assert f"{trained} has no trained weights yet; resume it with mlxft train --resume {trained}" in err


def test_an_adapter_of_another_base(
    trained: str,
    refused: Callable[..., str],
    write: Callable[..., str],
    make_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    wide = str(make_model_dir(tmp_path / "wide", hidden_size=64, head_dim=16))
    recipe = write("other.yaml", **{"model.path": wide, "model.adapter": trained, "tune": None, "run.name": "b"})
    for args in (
        ("generate", "--model", wide, "--adapter", trained, "hi"),
        ("chat", "--model", wide, "--adapter", trained),
        ("fuse", trained, "out", "--model", wide),
        ("train", recipe),
    ):
        err = refused(1, *args)
        assert err.startswith("ModelError: ")
        assert "was trained on another base: " in err
        assert "load the adapter on its own base" in err


def test_chat_over_a_pipe_ends_with_it(trained: str, mlxft: Command, shell: Command) -> None:
    nothing = mlxft("chat", "--model", trained)
    assert (nothing.code, nothing.out, nothing.err) == (0, "> \n", "")
    talk = shell("chat", "--model", trained, *SHORT, stdin="the in\nof is\n")
    assert (talk.code, talk.err) == (0, "")
    assert talk.out.count("> ") == 3
    for stdin in ("the in\nof is\n", "the in\nof is"):
        assert mlxft("chat", "--model", trained, *SHORT, stdin=stdin) == talk
    ended = mlxft("chat", "--model", trained, *SHORT, stdin="the in\nof is\n\nnot read\n")
    assert (ended.code, ended.err, ended.out.count("> ")) == (0, "", 3)
    first = mlxft("generate", "--model", trained, "the in", *SHORT).out
    assert talk.out.startswith(f"> {first}> ")
    bad = mlxft("chat", "--model", trained, *SHORT, stdin=b"\xff\n")
    assert bad.code == 2
    assert "standard input is not UTF-8" in bad.err


def test_chat_remembers_what_was_said(trained: str, mlxft: Command) -> None:
    """The second answer depends on the first turn."""

    def last(*said: str) -> str:
        return str(mlxft("chat", "--model", trained, "--max-tokens", "12", stdin="\n".join(said)).out).split("> ")[-2]

    assert last("the in", "of is") != last("on a is of", "of is")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A text, messages, and a text again, in prompts.jsonl."""
    said = ["the in", [{"role": "user", "content": "of is ü"}], "on a"]
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(said)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return "prompts.jsonl"


def test_a_batch_is_answered_as_its_prompts_are(trained: str, prompts: str, mlxft: Command, tmp_path: Path) -> None:
    use = ("generate", "--model", trained, *SHORT)
    done = mlxft(*use, "--batch", prompts)
    assert (done.code, done.err) == (0, "")
    found = lines(done.out)
    assert [list(line) for line in found] == [["prompt", "completions", "finish"]] * 3
    assert [line["prompt"] for line in found] == [row["prompt"] for row in lines((tmp_path / prompts).read_text())]
    for line, prompt in zip(found, ("the in", "of is ü", "on a")):
        assert [mlxft(*use, prompt).out] == [text + "\n" for text in line["completions"]]
    assert {end for line in found for end in line["finish"]} <= {"eos", "length"}
    assert mlxft(*use, "--batch", prompts, "--out", "new/out.jsonl").out == ""
    assert (tmp_path / "new" / "out.jsonl").read_text("utf-8") == done.out
    (tmp_path / "p.csv").write_text("prompt\nthe in\non a\n")
    assert lines(mlxft(*use, "--batch", "p.csv").out) == [found[0], found[2]]


def test_samples_of_a_batch(trained: str, prompts: str, mlxft: Command) -> None:
    def say(*options: str) -> str:
        use = ("--max-tokens", "12", "--temperature", "1.5", "--batch", prompts)
        return str(mlxft("generate", "--model", trained, *use, *options).out)

    many = say("--samples", "3", "--seed", "1")
    assert many == say("--samples", "3", "--seed", "1") != say("--samples", "3", "--seed", "2")
    assert say() != say(), "without a seed each time is another"
    assert [len(set(line["completions"])) for line in lines(many)] == [3, 3, 3]
    assert len({text for line in lines(many) for text in line["completions"]}) == 9
    stopped = lines(say("--samples", "3", "--seed", "1", "--stop", "e", "--stop", "a"))
    for line, whole in zip(stopped, lines(many)):
        for text, end, before in zip(line["completions"], line["finish"], whole["completions"]):
            cut = min((at for at in (before.find("e"), before.find("a")) if at >= 0), default=len(before))
            assert text == before[:cut]
            assert (end == "stop") == (cut < len(before))


def test_filters_act(trained: str, mlxft: Command) -> None:
    """Each filter, at its narrowest, leaves the most likely token only; --stop ends the text and is not shown."""
    use = ("generate", "--model", trained, "the in", "--max-tokens", "12")
    plain = mlxft(*use).out
    for narrow in (("--top-k", "1"), ("--min-p", "1"), ("--top-p", "0.000001")):
        assert mlxft(*use, "--temperature", "3", *narrow).out == plain
    stop = plain[2:4]
    assert mlxft(*use, "--stop", stop).out == plain[: plain.index(stop)] + "\n"


def test_wrong_use_of_a_batch(trained: str, prompts: str, refused: Callable[..., str], tmp_path: Path) -> None:
    use = ("generate", "--model", trained)
    batch = (*use, "--batch", prompts)
    assert "give a PROMPT or --batch, not both" in refused(2, *batch, "hi")
    assert "--out and --samples go with --batch" in refused(2, *use, "hi", "--out", "x.jsonl")
    assert "--out and --samples go with --batch" in refused(2, *use, "hi", "--samples", "2")
    assert "--samples 2 at temperature 0" in refused(2, *batch, "--samples", "2")
    assert "--out is the file of prompts" in refused(2, *batch, "--out", f"./{prompts}")
    assert "nope.jsonl: no such file" in refused(2, *use, "--batch", "nope.jsonl")
    assert "none of them empty" in refused(2, *batch, "--stop", "")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n{"text": "b"}\n')
    err = refused(1, *use, "--batch", "bad.jsonl")
    assert "bad.jsonl:2: prompt is a number" in err
    assert "bad.jsonl:3: no field 'prompt'" in err
    (tmp_path / "file").write_text("")
    assert "cannot write file/out.jsonl" in refused(2, *batch, "--out", "file/out.jsonl")
