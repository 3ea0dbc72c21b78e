"""No file of a stranger's runs its own code: models, adapters and runs that want to, in every command that loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.config import parse_config
from mlxft.exports.fuse import fuse_sources
from mlxft.exports.peft import export_peft
from mlxft.run import train
from mlxft.text import make_console

CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nraise RuntimeError('code of a stranger ran')\n"
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CHAT = {"messages": TURNS, "prompt": "a"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c d"}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that a stranger's code writes."""
    return tmp_path / "ran"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def name_code(folder: Path, kind: str, code: str) -> None:
    """Let what looks like a model's folder bring Python along."""
    (folder / "code.py").write_text(code, "utf-8")
    if kind == "model_file":
        changes: dict[str, dict[str, Any]] = {"config.json": {"model_file": "code.py"}}
    else:
        maps = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        maps |= {"AutoModelForSequenceClassification": "code.Model"}
        tokenizer = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
        changes = {"config.json": {"auto_map": maps}, "tokenizer_config.json": tokenizer}
    for name, more in changes.items():
        about = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(about | more), "utf-8")


def grant(value: Any) -> Any:
    """JSON or YAML of a run in which everything says that code is trusted."""
    if isinstance(value, dict):
        given = {key: grant(part) for key, part in value.items()}
        return given | {"trust_remote_code": True} if {"path", "fingerprint"} & set(value) else given
    return value


@pytest.fixture(scope="module", params=["model_file", "auto_map"])
def hostile(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_model_dir: Callable[..., Path]
) -> dict[str, str]:
    """Runs of a base that was good when they were trained, and now brings code along; each says that it is trusted.

    What stands in the runs fits, so that with trust the code runs: what is refused is refused for its code.
    """
    kind, here = request.param, tmp_path_factory.mktemp("hostile")
    evil, marker = make_model_dir(here / "evil"), here / "ran"
    rows, pairs = write_lines(here / "rows.jsonl", [CHAT] * 3), write_lines(here / "pairs.jsonl", [PAIR] * 3)
    settings: dict[str, Any] = {
        "model": {"path": str(evil)},
        "tune": {"rank": 2},
        "data": {"train": rows, "format": "messages"},
        "optim": {"schedule": "constant", "warmup": 0},
        "run": {"steps": 1, "dir": str(here)},
    }
    console = make_console(quiet=True)
    judged = {**settings, "objective": "reward", "data": {"train": pairs, "format": "preference"}}
    for name, recipe in {"run": settings, "judge": judged}.items():
        train(parse_config({**recipe, "run": {**recipe["run"], "name": name}}), console=console)
    export_peft(here / "run", here / "peft")
    export_peft(here / "judge", here / "judge-peft")
    fuse_sources(here / "judge", here / "scorer", force=True)
    shutil.copytree(evil, here / "run/checkpoints/step-000001", dirs_exist_ok=True)
    for folder in (evil, here / "scorer", here / "run/checkpoints/step-000001"):
        name_code(folder, kind, CODE.format(marker=str(marker)))
    for run in ("run", "judge"):
        file, noted = here / run / "config.yaml", here / run / "adapter/adapter_config.json"
        file.write_text(yaml.safe_dump(grant(yaml.safe_load(file.read_text("utf-8")))), "utf-8")
        noted.write_text(json.dumps(grant(json.loads(noted.read_text("utf-8")))), "utf-8")
    on = {**settings, "model": {"path": str(evil), "adapter": str(here / "run")}, "run": {**settings["run"]}}
    on.pop("tune")
    valid = {**settings, "data": {**settings["data"], "valid": rows}}
    asked = {**settings, "objective": "grpo", "data": {"train": pairs, "format": "prompts", "max_length": 64}}
    asked |= {"rollout": {"prompts": 1, "samples": 2, "max_tokens": 2}, "rewards": {"adapter": str(here / "judge")}}
    asked["model"] = {"path": str(make_model_dir(here / "good"))}
    sweep = {**valid, "sweep": {"space": {"optim.lr": {"log": [1e-5, 1e-2]}}}}
    for name, recipe in {"plain": settings, "mine": on, "valid": valid, "grpo": asked, "sweep": sweep}.items():
        (here / f"{name}.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    write_lines(here / "test.jsonl", [CHAT])
    (here / "f.py").write_text("def f(prompts, completions, rows):\n    return [0.0] * len(prompts)\n", "utf-8")
    names = ("evil", "run", "judge", "peft", "judge-peft", "scorer")
    return {name.replace("-", "_"): str(here / name) for name in names} | {"here": str(here), "kind": kind}


COMMANDS = {
    "generate": "generate --model {run} hello",
    "generate-adapter": "generate --model {run}/adapter hello",
    "generate-model": "generate --model {evil} hello",
    "generate-on": "generate --model {evil} --adapter {run} hello",
    "generate-batch": "generate --model {run} --batch {here}/rows.jsonl",
    "generate-checkpoint": "generate --model {run}/checkpoints/step-000001 hello",
    "chat": "chat --model {run}",
    "eval": "eval {run} {here}/rows.jsonl",
    "eval-against": "eval {run} {here}/rows.jsonl --against base",
    "score": "score {judge} {here}/pairs.jsonl",
    "score-adapter": "score {judge}/adapter {here}/pairs.jsonl",
    "score-model": "score {scorer} {here}/pairs.jsonl",
    "sample": "sample {here}/rows.jsonl --model {run} --function {here}/f.py:f --cut-off --out {out}",
    "sample-reward": "sample {here}/rows.jsonl --model {here}/good --reward {judge} --cut-off --out {out}",
    "label": "label {here}/rows.jsonl --model {run} --out {out}",
    "label-against": "label {here}/rows.jsonl --model {here}/good --against {run} --out {out}",
    "fuse": "fuse {run} {out} --force",
    "fuse-judge": "fuse {judge} {out} --force",
    "convert": "convert {evil} {out}",
    "export-gguf": "export {run} {out}.gguf --format gguf",
    "export-lora": "export {run} {out}.gguf --format gguf --lora",
    "export-peft": "export {run} {out} --format peft",
    "export-seq-cls": "export {judge} {out} --format seq-cls",
    "export-ollama": "export {run} {out} --format ollama",
    "import": "import {peft} {out}",
    "import-seq-cls": "import {judge_peft} {out}",
    "push": "push {run} ada/a --dry-run",
    "train": "train {here}/mine.yaml run.name=mine",
    "train-reward": "train {here}/grpo.yaml run.name=grpo",
    "check": "check {here}/plain.yaml",
    "check-time": "check {here}/mine.yaml --time",
    "resume": "train --resume {run} run.steps=2",
    "train-run": "train {run}/config.yaml --resume run.steps=2",
    "sweep": "sweep {here}/sweep.yaml --trials 1",
    "lr-find": "lr-find {here}/plain.yaml --steps 20",
    "fewshot": "fewshot {here}/plain.yaml --test {here}/test.jsonl --k 0 --out {out}",
}
# What does not run a model's code whatever is given: by its config.json alone, or not loading it at all.
NEVER = {
    "model_file": {"export-peft", "import", "import-seq-cls", "push", "check"},
    "auto_map": {"import", "import-seq-cls", "push"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_stranger_runs(
    command: str,
    hostile: dict[str, str],
    mlxft: Callable[..., Any],
    screen: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused by name, or done without the code; and it would run, were it trusted: the case comes that far.

    At a terminal nothing is asked either: transformers does, of who does not tell it; `y` is typed.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    marker, never = Path(hostile["here"], "ran"), command in NEVER[hostile["kind"]]
    marker.unlink(missing_ok=True)

    def given(out: str) -> list[str]:
        return COMMANDS[command].format(**hostile, out=tmp_path / out).split()

    done = mlxft(*given("piped"), stdin="hello\n")
    assert not marker.exists(), done
    assert "Traceback" not in done.err
    assert never or "--trust-remote-code" in done.err, done
    assert "[y/N]" not in screen(*given("shown"), typed=["y\n"])
    assert not marker.exists()
    recipe = command.startswith(("train", "check", "resume", "sweep", "lr-find", "fewshot"))
    if command != "push":
        done = mlxft(*given("trusted"), "model.trust_remote_code=true" if recipe else "--trust-remote-code")
    assert marker.exists() != never, done


@pytest.mark.parametrize("hostile", ["model_file"], indirect=True)
def test_trust_is_given_for_one_command(hostile: dict[str, str], mlxft: Callable[..., Any]) -> None:
    marker, ask = Path(hostile["here"], "ran"), ("generate", "--model", hostile["run"], "hello")
    mlxft(*ask, "--trust-remote-code")
    assert marker.exists()
    marker.unlink()
    said = mlxft(*ask).err
    assert "code.py" in said
    assert "--trust-remote-code" in said
    assert not marker.exists()


OPENED = {
    "generate": "generate --model runs/a hi --max-tokens 2",
    "eval": "eval runs/a rows.jsonl",
    "eval-against": "eval runs/a rows.jsonl --against base",
    "fuse": "fuse runs/a fused --force",
    "export": "export runs/a peft --format peft",
    "score": "score runs/a rows.jsonl",
    "show": "runs show runs/a",
    "compare": "runs compare runs/a runs/a",
    "list": "runs list --dir runs",
    "report": "runs report runs/a --out report.html",
    "push": "push runs/a ada/a --dry-run",
}


@pytest.fixture
def opened(write: Callable[..., Any], mlxft: Callable[..., Any], tmp_path: Path, marker: Path) -> None:
    """A run in runs/a whose recipe names Python, which has become a stranger's."""
    code = tmp_path / "reward.py"
    code.write_text("def score(prompts, completions, rows):\n    return [0.0] * len(prompts)\n", "utf-8")
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "in"}, {"role": "assistant", "content": "on"}]
    rows.write_text(json.dumps({"prompt": "in"}) + "\n", "utf-8")
    changes: dict[str, Any] = {"objective": "grpo", "data.train": str(rows), "data.format": "prompts", "run.steps": 1}
    changes |= {"rollout": {"prompts": 1, "samples": 2, "max_tokens": 2}, "data.max_length": 64}
    changes |= {"rewards": {"function": f"{code}:score"}}
    result = mlxft("train", write(**changes))
    assert result.code == 0, result
    rows.write_text(json.dumps({"messages": turns}) + "\n", "utf-8")
    code.write_text(CODE.format(marker=str(marker)), "utf-8")


@pytest.mark.parametrize("objective", ["{code}:Objective", "{code}", "../../reward", "grpo"])
def test_an_opened_run_does_not_run_its_recipe(
    objective: str, opened: None, marker: Path, tmp_path: Path, mlxft: Callable[..., Any]
) -> None:
    file, noted = Path("runs/a/config.yaml"), Path("runs/a/adapter/adapter_config.json")
    objective = objective.format(code=tmp_path / "reward.py")
    recipe, about = (yaml.safe_load(path.read_text("utf-8")) for path in (file, noted))
    recipe["objective"] = about["mlxft"]["objective"] = objective
    file.write_text(yaml.safe_dump(recipe), "utf-8")
    noted.write_text(json.dumps(about), "utf-8")
    done = {name: mlxft(*command.split()) for name, command in OPENED.items()}
    assert not marker.exists()
    assert not [result for result in done.values() if "Traceback" in result.err]
    if objective == "{code}:Objective".format(code=tmp_path / "reward.py"):
        assert done["generate"].code == 0, "a run of an objective in a file is used, and the file is not run"
        return
    if objective != "grpo":
        assert "no such objective" in done["generate"].err
        return
    codes = {name: result.code for name, result in done.items()}
    assert {codes[name] for name in ("generate", "fuse", "export", "show", "report", "push")} == {0}, codes


LINKS = {
    "template": ("runs/a/adapter/chat_template.jinja", "fuse runs/a fused --force"),
    "adapter's config": ("runs/a/adapter/adapter_config.json", "generate --model runs/a hi"),
    "generation settings": ("model/generation_config.json", "convert model fused"),
    "tokenizer's config": ("model/tokenizer_config.json", "convert model fused"),
    "named templates": ("model/additional_chat_templates", "convert model fused"),
    "notice": ("runs/a/adapter/NOTICE", "push runs/a ada/a --dry-run"),
    "pushed weights": ("runs/a/adapter/more.safetensors", "push runs/a ada/a --dry-run"),
    "PEFT's config": ("peft/adapter_config.json", "import peft fused"),
}


def test_no_link_out_of_a_folder_is_read(
    opened: None, tmp_path: Path, mlxft: Callable[..., Any], tiny_model_dir: Path
) -> None:
    """A link to a file of the user's would be written into what is fused and pushed: the key in it would be public."""
    shutil.copytree(tiny_model_dir, "model")
    Path("peft").mkdir()
    secret = tmp_path / "secret"
    for place, command in LINKS.values():
        file = Path(place)
        kept = file.read_bytes() if file.is_file() else None
        file.unlink(missing_ok=True)
        if file.name == "additional_chat_templates":
            secret.mkdir()
            (secret / "x.jinja").write_text("key", "utf-8")
        else:
            secret.write_bytes(kept or b"{}")
        file.symlink_to(secret)
        done = mlxft(*command.split())
        assert done.code == 1, (place, done)
        assert f"{file.name}: is a link out of its folder" in done.err
        assert not Path("fused").exists()
        file.unlink()
        shutil.rmtree(secret) if secret.is_dir() else secret.unlink()
        if kept is not None:
            file.write_bytes(kept)


def test_links_of_users_are_followed(
    opened: None, tmp_path: Path, mlxft: Callable[..., Any], tiny_model_dir: Path
) -> None:
    """The hub's cache is made of links, whole folders may be linked, and weights may be kept elsewhere."""
    blobs, snapshot = (tmp_path / "models--ada--tiny" / part for part in ("blobs", "snapshots/123"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(tiny_model_dir.iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    mine = shutil.copytree(tiny_model_dir, tmp_path / "mine")
    (mine / "model.safetensors").unlink()
    (mine / "model.safetensors").symlink_to(tiny_model_dir / "model.safetensors")
    Path("latest").symlink_to("runs/a")
    Path("adapter").symlink_to("runs/a/adapter")
    for model in (str(snapshot), "mine", "latest", "adapter"):
        done = mlxft("generate", "--model", model, "hi", "--max-tokens", "2")
        assert done.code == 0, done


def test_a_folder_here_is_not_taken_for_a_hub_id(
    opened: None, mlxft: Callable[..., Any], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an adapter names by a hub id is not what lies here by that name, unless the user says so."""
    file = Path("runs/a/adapter/adapter_config.json")
    about = json.loads(file.read_text("utf-8"))
    about["mlxft"]["base"]["model"] = "ada/tiny"
    file.write_text(json.dumps(about), "utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "its cache does not hold it" in mlxft("generate", "--model", "runs/a", "hi").err
    shutil.copytree(tiny_model_dir, "ada/tiny")
    for command in (OPENED[name] for name in ("generate", "eval", "eval-against", "fuse", "export")):
        done = mlxft(*command.split())
        assert done.code == 1, done
        assert "if you mean the folder, give ./ada/tiny as the adapter's base" in done.err
    assert mlxft("fuse", "runs/a", "fused", "--force", "--model", "./ada/tiny").code == 0


def test_asking_the_hub_is_said(
    opened: None, mlxft: Callable[..., Any], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter may name a hub id as its base: that it is asked for is seen, and offline it is an error."""
    file = Path("runs/a/adapter/adapter_config.json")
    about = json.loads(file.read_text("utf-8"))
    about["mlxft"]["base"]["model"] = "ada/evil"
    file.write_text(json.dumps(about), "utf-8")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tiny_model_dir))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    done = mlxft(*OPENED["generate"].split())
    assert done.code == 0
    assert "ada/evil: from the Hugging Face hub" in done.err
