"""What is the user's stays: commands that replace or delete touch only what mlxft made, by its mark."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft import run
from mlxft.errors import CheckpointError, ConfigError
from mlxft.files import HOLDER, KINDS, check_replaceable, claim, empty, hold, read_mark, temporary
from mlxft.run import train
from mlxft.text import Event

Command = Callable[..., Any]
Write = Callable[..., str]
Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def their_folder(folder: Path, recipe: dict[str, Any]) -> Path:
    """A folder that nothing of mlxft ever wrote to, with the names that mlxft would give."""
    files = {
        "config.yaml": yaml.safe_dump(recipe),
        "config.json": '{"model_type": "llama"}',
        "status.json": '{"status": "done", "pid": 1}',
        "metrics.jsonl": '{"event": "start", "step": 0}\n',
        "adapter_config.json": "{}",
        "adapter/adapter_config.json": "{}",
        "Modelfile": "FROM x",
        "sweep.db": "theirs",
        "study.json": "{}",
        "predictions.jsonl": "theirs",
        "results.json": "{}",
        "best.yaml": "theirs",
        "data/pairs.jsonl": "theirs",
        "run/config.yaml": "theirs",
        "sft/config.yaml": "theirs",
        "fused/config.json": "{}",
        "trials/0/config.yaml": "theirs",
        "thesis.txt": "years of work",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def replacing(recipe: str, target: str) -> dict[str, list[str]]:
    """Every command that replaces or deletes a folder, with `target` for it."""
    run = [f"run.dir={Path(target).parent}", f"run.name={Path(target).name}"]
    sweep = ["sweep.space={optim.lr: {log: [1.0e-5, 1.0e-2]}}", "data.valid=0.3"]
    exports = {
        f"export {form}": ["export", "runs/base", target, "--format", form, "--overwrite"]
        for form in ("peft", "seq-cls", "ollama")
    }
    return {
        "train": ["train", recipe, *run, "--overwrite"],
        "resume": ["train", recipe, *run, "--resume"],
        "fuse": ["fuse", "runs/base", target, "--overwrite"],
        "convert": ["convert", "runs/base", target, "--overwrite"],
        **exports,
        "import": ["import", "peft", target, "--overwrite"],
        "sweep": ["sweep", recipe, *run, *sweep, "--overwrite"],
        "fewshot": ["fewshot", recipe, "--test", "test.jsonl", "--k", "0,1", "--out", target, "--overwrite"],
        "sweep, on": ["sweep", recipe, *run, *sweep],
        "fewshot, on": ["fewshot", recipe, "--test", "test.jsonl", "--k", "0,1", "--out", target],
        "eval": ["eval", "runs/base", "test.jsonl", "--out", target, "--overwrite"],
        "runs rm": ["runs", "--dir", str(Path(target).parent), "rm", Path(target).name, "--yes"],
        "demo": ["demo", "--dir", target],
        "rlhf": ["rlhf", "--dir", target],
    }


def test_a_folder_of_the_users_stays_as_it_is(
    write: Write, recipe: Callable[..., dict[str, Any]], refused: Refused, tmp_path: Path
) -> None:
    """Whatever names its files have; and no command so much as loads a model before it refuses."""
    file = write()
    folder = their_folder(tmp_path / "mine", recipe())
    before = tree(folder)
    for name, command in replacing(file, "mine").items():
        said = refused(2, *command)
        assert "mine" in said, (name, said)
        assert "mlxft made" in said, (name, said)
    (tmp_path / "mine.gguf").write_bytes(b"GGUF" + b"\3\0\0\0" + b"\0" * 5000)
    said = refused(2, "export", "runs/base", "mine.gguf", "--format", "gguf", "--overwrite")
    assert "is not a .gguf file that this version of mlxft wrote" in said
    assert tree(folder) == before
    assert not (folder / HOLDER).exists()


def test_a_file_of_the_users_in_a_folder_of_ours_is_named_and_kept(
    write: Write, mlxft: Command, refused: Refused, tmp_path: Path
) -> None:
    file = write(**{"run.name": "base"})
    assert mlxft("train", file).code == 0
    assert mlxft("convert", str(yaml.safe_load((tmp_path / file).read_text())["model"]["path"]), "made").code == 0
    for place in ("notes.txt", "adapter/notes.txt", "checkpoints/notes.txt", "eval/x/notes.txt", "model/config.json"):
        path = tmp_path / "runs/base" / place
        there = path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years of work", "utf-8")
        commands = replacing(file, "runs/base")
        for name in ("train", "runs rm"):
            said = refused(2, *commands[name])
            assert f"that mlxft did not make ({place if place[:5] != 'model' else 'model/'})" in said
        path.unlink() if there else shutil.rmtree(tmp_path / "runs/base" / place.split("/")[0])
    (tmp_path / "made/notes.txt").write_text("years of work", "utf-8")
    for name in ("fuse", "convert"):
        assert "that mlxft did not make (notes.txt)" in refused(2, *replacing(file, "made")[name])
    (tmp_path / "made/notes.txt").unlink()
    (tmp_path / "runs/base/checkpoints-of-mine").mkdir()
    assert "(checkpoints-of-mine/)" in refused(2, *replacing(file, "runs/base")["train"])
    assert "made: is a model folder, not a sweep" in refused(2, *replacing(file, "made")["sweep"])
    (tmp_path / "link").symlink_to("made")
    assert "link: is a link" in refused(2, *replacing(file, "link")["fuse"])


def test_what_mlxft_wrote_into_a_folder_goes_with_it(
    write: Write, mlxft: Command, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A run that was evaluated, drawn, reported, exported and so on is replaced and removed as any other."""
    file = write(**{"data.valid": 0.3})
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the in"}\n', "utf-8")
    for command in (
        ["train", file],
        ["eval", "runs/a", "rows-10.jsonl"],
        ["eval", "runs/a", "rows-10.jsonl", "--out", "runs/a/mine"],
        ["runs", "report", "a"],
        ["runs", "report", "a", "--out", "runs/a/also.html"],
        ["runs", "plot", "a", "--out", "runs/a/curves.png"],
        [
            "generate",
            "--model",
            "runs/a",
            "--batch",
            "prompts.jsonl",
            "--max-tokens",
            "3",
            "--out",
            "runs/a/said.jsonl",
        ],
        ["push", "runs/a", "ada/a", "--dry-run"],
        ["fuse", "runs/a", "runs/a/fused", "--force"],
        ["export", "runs/a", "runs/a/a.gguf", "--format", "gguf"],
        ["train", "--resume", "runs/a"],
        ["runs", "report", "a"],
    ):
        done = mlxft(*command)
        assert done.code == 0, (command, done.err)
    (tmp_path / "runs/a/.DS_Store").write_bytes(b"\0")
    (tmp_path / "runs/a/checkpoints/.tmp-mlxft-1-step-9").mkdir()
    (tmp_path / "runs/a/checkpoints/.tmp-mlxft-1-step-9/weights.safetensors").touch()
    assert ".mlxft.json" not in mlxft("push", "runs/a", "ada/a", "--dry-run").out
    done = mlxft("train", file, "--overwrite")
    assert done.code == 0, done.err
    names = {p.name for p in (tmp_path / "runs/a").iterdir()}
    assert names == {
        ".mlxft.json",
        "adapter",
        "chat_template.jinja",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "status.json",
    }
    assert mlxft("runs", "rm", "a", "--yes").code == 0
    assert not list((tmp_path / "runs").iterdir())


def test_a_second_command_on_a_run_is_refused_before_it_removes_anything(
    write: Write, mlxft: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write()
    assert mlxft("train", file).code == 0
    load_base, told = run.load_base, []

    def slow(*args: Any, **options: Any) -> Any:
        if not told:
            told.append(tree(tmp_path / "runs"))
            told.extend(
                mlxft(*c)
                for c in (["train", file, "--overwrite"], ["train", "--resume", "runs/a"], ["runs", "rm", "a", "--yes"])
            )
            assert tree(tmp_path / "runs") == told[0]
        return load_base(*args, **options)

    monkeypatch.setattr("mlxft.run.load_base", slow)
    assert mlxft("train", file, "--overwrite").code == 0
    assert len(told) == 4
    for second in told[1:]:
        assert second.code == 1
        assert f"runs/a is in use now, by process {os.getpid()}" in second.err
    assert not (tmp_path / "runs/a" / HOLDER).exists()


def test_a_second_command_on_a_file_or_folder_that_is_being_written_is_refused(
    write: Write, mlxft: Command, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the process id of the first, before a model is loaded; and the name is free once the command has ended."""
    file, pid = write(**{"data.valid": 0.3}), os.getppid()
    assert mlxft("train", file).code == 0
    model = str(yaml.safe_load((tmp_path / file).read_text())["model"]["path"])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the in"}\n', "utf-8")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answers": ["b", "c"]}\n', "utf-8")
    (tmp_path / "f.py").write_text("def near(prompts, completions, rows): return [0.0 for _ in completions]\n")
    shots = ["--test", "prompts.jsonl", "--k", "0", "--out"]
    sample = ["sample", "prompts.jsonl", "--function", "f.py:near", "--cut-off", "--max-tokens", "2", "--model"]
    commands = {
        "out.jsonl": [
            ["generate", "--model", model, "--max-tokens", "2", "--batch", "prompts.jsonl", "--out"],
            [*sample, model, "--out"],
            ["label", "pairs.jsonl", "--out"],
        ],
        "out": [
            ["fuse", "runs/a"],
            ["convert", model],
            ["import", "nope"],
            *(["export", "runs/a", "--format", form] for form in ("peft", "seq-cls", "ollama")),
        ],
        "out.gguf": [["export", "runs/a", "--format", "gguf"]],
        "out.png": [["lr-find", file, "--steps", "20", "--plot"]],
        "ev": [["eval", model, "rows-10.jsonl", "--out"]],
    }
    for out, all_of_them in commands.items():
        name = tmp_path / out / "predictions.jsonl" if out == "ev" else tmp_path / out
        name.parent.mkdir(exist_ok=True)
        first = temporary(name, pid)
        first.touch()
        for command in all_of_them:
            assert f"{name} is being written now, by process {pid}" in refused(1, *command, out), command
        first.unlink()
    for out in ("out.jsonl", "out.gguf", "ev"):
        done = mlxft(*commands[out][0], out)
        assert done.code == 0, done.err
        assert not list(tmp_path.rglob(".tmp-*"))
    assert "exists already" in refused(2, *commands["out.jsonl"][0], "out.jsonl")
    # Those whose folder is theirs from the beginning.
    for folder, command in {
        "demo": ["demo", "--dir"],
        "rlhf": ["rlhf", "--dir"],
        "fs": ["fewshot", file, *shots],
    }.items():
        with hold(tmp_path / folder):
            assert f"{folder} is in use now, by process {os.getpid()}" in refused(1, *command, folder), command


def test_a_refused_run_leaves_no_folder_behind(write: Write, refused: Refused, tmp_path: Path) -> None:
    refused(1, "train", write(), "model.path=/nowhere/at/all")
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_folder_is_taken_away_ends_with_a_word(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    class Remover:
        def event(self, event: Event) -> None:
            if event["event"] == "train" and event["step"] == 2:
                (tmp_path / "runs/a").rename(tmp_path / "moved")

        def close(self) -> None:
            pass

    with pytest.raises(CheckpointError, match="runs/a was removed or renamed while it was written to"):
        train(recipe(**{"run.save_every": 1}), sinks=[Remover()])
    assert not (tmp_path / "runs/a").exists()


def test_files_that_are_there_or_can_not_be_written_are_refused_before_the_work(
    write: Write, mlxft: Command, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate`, `sample`, `eval`, `lr-find`, `runs plot` and `report`: with a model that is not there."""
    file = write()
    assert mlxft("train", file).code == 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the in"}\n', "utf-8")
    (tmp_path / "f.py").write_text("def near(prompts, completions, rows): return [0.0 for _ in completions]\n")
    (tmp_path / "mine").mkdir()
    for name in ("mine.png", "mine/results.json"):
        (tmp_path / name).write_text("years of work", "utf-8")
    commands = [
        ["generate", "--model", "nope", "--batch", "prompts.jsonl", "--out"],
        ["sample", "prompts.jsonl", "--model", "nope", "--function", "f.py:near", "--out"],
        ["lr-find", file, "model.path=nope", "--plot"],
        ["runs", "plot", "a", "--out"],
        ["runs", "report", "a", "--out"],
    ]
    for command in commands:
        for out, said in {
            "mine.png": "exists already; give another name, or replace it with --overwrite",
            "f.py/x.png": "cannot write f.py/x.png: Not a directory",
            "": "is empty; give a name",
            "x" * 300 + ".png": "File name too long",
        }.items():
            assert said in refused(2, *command, out), (command, out)
    assert "mine/results.json exists already" in refused(2, "eval", "nope", "prompts.jsonl", "--out", "mine")
    assert mlxft("runs", "report", "a", "--out", "mine.png", "--overwrite").code == 0
    # A report of ours is made anew, another file of that name is not.
    for _ in range(2):
        assert mlxft("runs", "report", "a").code == 0
    (tmp_path / "runs/a/.mlxft.json").unlink()
    assert "report.html exists already" in refused(2, "runs", "report", "a")


def test_places_that_nothing_can_be_written_to_are_refused_before_the_work(
    write: Write, mlxft: Command, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command that writes: with a model that is not there, or can not be loaded."""
    file = write(**{"data.valid": 0.3})
    assert mlxft("train", file).code == 0
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "sweep.yaml").write_text(
        (tmp_path / file).read_text() + "sweep: {space: {optim.lr: {log: [1e-5, 1e-2]}}}"
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the in"}\n', "utf-8")
    folder: dict[str, Callable[[str], list[str]]] = {
        "train": lambda out: ["train", file, f"run.dir={out}"],
        "sweep": lambda out: ["sweep", "sweep.yaml", f"run.dir={out}"],
        "fewshot": lambda out: ["fewshot", file, "--test", "prompts.jsonl", "--out", out],
        "eval": lambda out: ["eval", "nope", "prompts.jsonl", "--out", out],
        "fuse": lambda out: ["fuse", "--force", "runs/a", "--", out],
        "convert": lambda out: ["convert", "nope", "--", out],
        "import": lambda out: ["import", "nope", "--", out],
        **{
            form: lambda out, form=form: ["export", "--format", form, "runs/a", "--", out]  # type: ignore[misc]
            for form in ("peft", "seq-cls", "ollama")
        },
        "demo": lambda out: ["demo", "--dir", out],
        "rlhf": lambda out: ["rlhf", "--dir", out],
    }
    plain: dict[str, Callable[[str], list[str]]] = {
        "gguf": lambda out: ["export", "--format", "gguf", "runs/a", "--", out],
        "generate": lambda out: ["generate", "--model", "nope", "--batch", "prompts.jsonl", "--out", out],
        "label": lambda out: ["label", "prompts.jsonl", "--model", "nope", "--out", out],
    }

    def loads(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work has begun")

    for name in (
        "mlxft.run.load_base",
        "mlxft.build.load_base",
        "mlxft.exports.fuse.load_shared_base",
        "mlxft.runs.load_run",
    ):
        monkeypatch.setattr(name, loads)
    monkeypatch.setattr("mlxft.study.sweep.load_base", loads)
    for name, command in (folder | plain).items():
        end = ".gguf" if name == "gguf" else ""
        for out in ("", f"{file}/x{end}", f"{'x' * 300}{end}", f"/proc/none/x{end}"):
            if out or name not in ("train", "sweep"):
                assert refused(2, *command(out)).strip(), (name, out)
    for name in ("eval", "fuse", "convert", "peft"):
        assert "/dev/null" in refused(2, *folder[name]("/dev/null"))
    assert "is a device or a pipe" in refused(2, *plain["gguf"]("pipe.gguf"))
    assert "is not UTF-8" in refused(2, *folder["fuse"]("\udcff"))
    assert "it is a device or a pipe" in refused(2, "push", "runs/a", "ada/a", "--dry-run", "--card", "/dev/zero")
    # Root, as whom tests may run, can write everything.
    access = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: (mode, str(path)[:4]) != (os.W_OK, "made") and access(path, mode)
    )
    for name in ("made", "made.gguf"):
        (tmp_path / name).mkdir() if name == "made" else (tmp_path / name).write_text("")
    assert "made: it is read-only" in refused(2, *folder["fuse"]("made"))
    assert "made.gguf: it is read-only" in refused(2, *plain["generate"]("made.gguf"), "--overwrite")
    # What an evaluation of a run is kept in by default.
    (tmp_path / "runs/a/eval").write_text("mine", "utf-8")
    assert "--out is not given: cannot write" in refused(2, "eval", "runs/a", "prompts.jsonl")
    (tmp_path / "[x]").write_text("mine", "utf-8")
    for walk in ("demo", "rlhf"):
        assert "[x]: exists and is a file" in refused(2, walk, "--dir", "[x]")


def test_a_pipe_is_written_to_and_stays_one(write: Write, mlxft: Command, tmp_path: Path, tiny_model_dir: Path) -> None:
    write()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the in"}\n', "utf-8")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text("utf-8")), daemon=True)
    reader.start()
    model = ["--model", str(tiny_model_dir), "--max-tokens", "3"]
    assert mlxft("generate", "--batch", "prompts.jsonl", *model, "--out", str(pipe)).code == 0
    reader.join(60)
    assert json.loads(read[0])["prompt"] == "the in"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    assert mlxft("generate", "--batch", "prompts.jsonl", *model, "--out", "null").code == 0
    assert (tmp_path / "null").is_symlink()
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_judgements_need_a_file(write: Write, refused: Refused, tmp_path: Path) -> None:
    write()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answers": ["b", "c"]}\n', "utf-8")
    (tmp_path / "null").symlink_to("/dev/null")
    assert "is a device or a pipe" in refused(2, "label", "rows.jsonl", "--out", "null")
    assert "Not a directory" in refused(2, "label", "rows.jsonl", "--out", "rows.jsonl/x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_names_made_of_file_names_are_names(write: Write, mlxft: Command, refused: Refused, tmp_path: Path) -> None:
    file = write("...yaml", **{"run.name": None})
    assert mlxft("train", file).code == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["sft"]
    sweep = ["sweep", file, "sweep.space={optim.lr: {log: [1.0e-5, 1.0e-2]}}", "data.valid=0.3"]
    for name in ("../../x", "..", "", "a/b"):
        assert "run.name" in refused(2, *sweep, "--name", name)


def test_other_commands_write_under_other_names(tmp_path: Path) -> None:
    """So that two that write one file at once do not write into each other's."""
    assert temporary(tmp_path / "a.npz").name == f".tmp-mlxft-{os.getpid()}-a.npz"


def test_a_folder_is_held_by_one_and_known_by_its_mark(tmp_path: Path) -> None:
    in_use = pytest.raises(CheckpointError, match=f"in use now, by process {os.getpid()}")
    with hold(tmp_path / "a/b"), in_use, hold(tmp_path / "a/b"):
        pass
    assert not (tmp_path / "a").exists()  # nothing came into it
    (tmp_path / ".mlxft.json").write_text('{"mlxft": "thesis", "files": []}')
    assert read_mark(tmp_path) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_the_name_of_a_folder_of_ours_is_the_users(kind: str, tmp_path: Path) -> None:
    """Such as notes that lie beside the trials of a sweep."""
    claim(tmp_path, kind)
    for name in KINDS[kind][1]:
        path = tmp_path / name.replace("**", "").replace("*", "mine").rstrip("/")
        if name.endswith("/"):
            path.parent.mkdir(exist_ok=True)
            path.write_text("years of work", "utf-8")
            with pytest.raises(ConfigError, match=f"did not make .*{path.name}"):
                check_replaceable(tmp_path, kind)
            empty(tmp_path)
            assert path.read_text("utf-8") == "years of work"
