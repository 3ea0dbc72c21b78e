"""No file of a stranger's runs its own code: models, adapters and runs that want to, in every command that loads."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nraise RuntimeError('code of a stranger ran')\n"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that a stranger's code writes."""
    return tmp_path / "ran"


@pytest.fixture(params=["model_file", "auto_map"])
def hostile(
    request: pytest.FixtureRequest, tmp_path: Path, marker: Path, make_model_dir: Callable[..., Path]
) -> dict[str, str]:
    """A model with code of its own, an adapter and runs that say that it is trusted, and a recipe that does not."""
    evil = make_model_dir(tmp_path / "evil")
    (evil / "code.py").write_text(CODE.format(marker=str(marker)), "utf-8")
    name, key, value = {
        "model_file": ("config.json", "model_file", "code.py"),
        "auto_map": ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["code.Tokenizer", None]}),
    }[request.param]
    about = json.loads((evil / name).read_text("utf-8")) | {key: value}
    if key == "auto_map":
        about["tokenizer_class"] = "Tokenizer"
        config = json.loads((evil / "config.json").read_text("utf-8"))
        config |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
        (evil / "config.json").write_text(json.dumps(config), "utf-8")
    (evil / name).write_text(json.dumps(about), "utf-8")
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": turns, "prompt": "a"}) + "\n", "utf-8")
    settings = {
        "model": {"path": str(evil), "trust_remote_code": True},
        "data": {"train": str(rows), "format": "messages"},
        "run": {"steps": 1, "name": "run", "dir": str(tmp_path)},
    }
    run = tmp_path / "run"
    adapter = run / "adapter"
    adapter.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    noted = {"base": {"model": str(evil), "trust_remote_code": True, "dtype": "float32"}}
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["model.layers.0.self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "mlxft": noted}
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (adapter / "adapters.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    settings["model"] = {"path": str(evil), "adapter": str(adapter)}
    settings["run"]["name"] = "mine"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    sweep = {**settings, "model": {"path": str(evil)}, "sweep": {"space": {"optim.lr": {"log": [1e-5, 1e-2]}}}}
    sweep["data"] = {**settings["data"], "valid": str(rows)}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), "utf-8")
    return {"evil": str(evil), "run": str(run), "adapter": str(adapter), "rows": str(rows), "here": str(tmp_path)}


COMMANDS = {
    "generate": "generate --model {run} hello",
    "generate-adapter": "generate --model {adapter} hello",
    "generate-model": "generate --model {evil} hello",
    "generate-on": "generate --model {evil} --adapter {adapter} hello",
    "chat": "chat --model {run}",
    "eval": "eval {run} {rows}",
    "eval-against": "eval {run} {rows} --against base",
    "score": "score {run} {rows}",
    "sample": "sample {rows} --model {run} --function {here}/none.py:f --out {here}/out.jsonl",
    "label": "label {rows} --model {run} --out {here}/out.jsonl",
    "fuse": "fuse {run} {here}/out",
    "convert": "convert {evil} {here}/out",
    "export-gguf": "export {run} {here}/out.gguf --format gguf",
    "export-peft": "export {run} {here}/out --format peft",
    "export-ollama": "export {run} {here}/out --format ollama",
    "train": "train {here}/recipe.yaml",
    "check": "check {here}/recipe.yaml",
    "resume": "train --resume {run}",
    "train-run": "train {run}/config.yaml --resume",
    "sweep": "sweep {here}/sweep.yaml --trials 1",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_stranger_runs(command: str, hostile: dict[str, str], marker: Path, mlxft: Callable[..., Any]) -> None:
    """Refused, or done without the code; it does not run, and nothing it would have made is left."""
    result = mlxft(*COMMANDS[command].format(**hostile).split(), stdin="hello\n")
    assert not marker.exists(), result
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["generate", "chat", "resume"])
@pytest.mark.parametrize("hostile", ["auto_map"], indirect=True)
def test_no_question_at_a_terminal(command: str, hostile: dict[str, str], marker: Path) -> None:
    """transformers asks [y/N] of a terminal where it is not told; `y` is typed here, and nothing runs."""
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\ny\n\n")
    arguments = COMMANDS[command].format(**hostile).split()
    done = subprocess.run(
        [sys.executable, "-m", "mlxft", *arguments],
        stdin=theirs,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    os.close(ours)
    os.close(theirs)
    assert not marker.exists()
    assert b"[y/N]" not in done.stdout + done.stderr


@pytest.mark.parametrize("hostile", ["model_file"], indirect=True)
def test_trust_is_given_by_name(hostile: dict[str, str], marker: Path, mlxft: Callable[..., Any]) -> None:
    """What is refused is named with the way to allow it; and the flag does, for that command alone."""
    said = mlxft("generate", "--model", hostile["run"], "hello").err
    assert "code.py" in said
    assert "--trust-remote-code" in said
    assert not marker.exists()
    mlxft("generate", "--model", hostile["run"], "hello", "--trust-remote-code")
    assert marker.exists()
    marker.unlink()
    mlxft("generate", "--model", hostile["run"], "hello")
    assert not marker.exists()


def test_trust_counts_for_a_reward_model(
    write: Callable[..., Any], mlxft: Callable[..., Any], tmp_path: Path, marker: Path, tiny_model_dir: Path
) -> None:
    """A recipe that trusts what it loads trusts the base of its reward model, too; one that does not, does not."""
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    rows = [{"prompt": f"{i} the", "chosen": "in", "rejected": "on z"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    pairs = {"objective": "reward", "data.train": "pairs.jsonl", "data.format": "preference", "run.steps": 1}
    assert mlxft("train", write(**pairs, **{"model.path": str(base), "run.name": "judge"})).code == 0
    about = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps(about | {"model_file": "code.py"}), "utf-8")
    (base / "code.py").write_text(CODE.format(marker=str(marker)), "utf-8")
    asked = {"objective": "grpo", "data.train": "pairs.jsonl", "data.format": "prompts", "data.max_length": 64}
    asked |= {"rollout": {"prompts": 1, "samples": 2, "max_tokens": 2}, "rewards": {"adapter": "runs/judge"}}
    done = mlxft("train", write(**asked, **{"run.steps": 1}))
    assert "wants to run its own code (code.py)" in done.err
    assert not marker.exists()
    assert "code of a stranger ran" in mlxft("train", "recipe.yaml", "model.trust_remote_code=true").err
    assert marker.exists()


OPENED = {
    "generate": "generate --model runs/a hi --max-tokens 2",
    "eval": "eval runs/a rows.jsonl",
    "eval-against": "eval runs/a rows.jsonl --against base",
    "fuse": "fuse runs/a fused --force",
    "export": "export runs/a peft --format peft",
    "show": "runs show runs/a",
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


def test_an_opened_run_does_not_run_its_recipe(opened: None, marker: Path, mlxft: Callable[..., Any]) -> None:
    codes = {name: mlxft(*command.split()).code for name, command in OPENED.items()}
    assert not marker.exists()
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
        assert "if it is meant, name ./ada/tiny as the adapter's base" in done.err
    assert mlxft("fuse", "runs/a", "fused", "--force", "--model", "./ada/tiny").code == 0


def test_asking_the_hub_is_said(
    hostile: dict[str, str], mlxft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter may name a hub id as its base: that it is asked for is seen, and offline it is an error."""
    import huggingface_hub

    file = Path(hostile["adapter"], "adapter_config.json")
    about = json.loads(file.read_text("utf-8"))
    about["mlxft"]["base"]["model"] = "ada/evil"
    file.write_text(json.dumps(about), "utf-8")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: hostile["evil"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert "ada/evil: from the Hugging Face hub" in mlxft("generate", "--model", hostile["run"], "hi").err
