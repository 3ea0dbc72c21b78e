"""mlxft runs and mlxft schema as commands, on runs that were trained, killed, broken; shell completion."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mlxft.config import all_keys, config_class, objectives, parse_config, read_yaml, recipe_schema
from mlxft.errors import ConfigError

Command = Callable[..., Any]
ROOT = Path(__file__).parents[2]
SAMPLE = {"run.sample_prompts": ["the in"], "run.sample_tokens": 4, "data.valid": 0.2, "run.eval_at_start": True}
MINE = {"model": {"path": "x"}, "data": {"train": "x", "format": "messages"}}


def status_of(mlxft: Command, name: str) -> dict[str, Any]:
    (found,) = [r for r in json.loads(mlxft("runs", "--json").out) if r["name"] == name]
    return dict(found)


def test_a_runs_life_seen_from_outside(write: Command, mlxft: Command, tmp_path: Path) -> None:
    assert mlxft("runs").out == "no runs in runs; train one: mlxft train RECIPE\n"
    assert mlxft("train", write(**SAMPLE)).code == 0
    assert mlxft("train", write("b.yaml", **{**SAMPLE, "tune.rank": 2, "run.name": "b"})).code == 0
    listed = mlxft("runs")
    assert (listed.code, listed.err) == (0, "")
    assert re.search(r"a +done +sft .*loss [\d.]+ @ 4 ", listed.out)
    shown = mlxft("runs", "show", "a")
    for piece in ("tune.rank", "the in", "step 0:", "step 4:", "adapter/", "untrained", "trained_tokens_per_s"):
        assert piece in shown.out, piece
    assert json.loads(mlxft("runs", "show", "runs/a", "--json").out)["settings"]["tune.rank"] == 4
    compared = json.loads(mlxft("runs", "compare", "a", "b", "--json").out)
    assert compared["settings"] == {"tune.rank": {"a": 4, "b": 2}}
    events = [json.loads(line) for line in (tmp_path / "runs/b/metrics.jsonl").read_text().splitlines()]
    last = [e for e in events if e["event"] == "eval"][-1]
    assert compared["results"]["validation loss"]["b"] == last["loss"]
    assert mlxft("runs", "plot", "a", "b", "--out", "both.svg").out == "wrote both.svg\n"
    assert mlxft("runs", "report", "a", "--out", "a.html").out == "wrote a.html\n"
    assert "the in" in (tmp_path / "a.html").read_text()
    assert mlxft("runs", "rm", "a", stdin="n\n").code == 130
    assert (tmp_path / "runs/a").exists()
    assert mlxft("runs", "--dir", "runs", "rm", "a", "b", "--yes").code == 0
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_in_training_is_watched_and_a_killed_one_is_known(write: Command, mlxft: Command, tmp_path: Path) -> None:
    recipe = write(**{"run.steps": 100_000, "run.report_every": 1, "run.save_every": 50})
    command = [sys.executable, "-m", "mlxft"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    training = subprocess.Popen([*command, "train", recipe], cwd=tmp_path, **quiet)
    try:
        wait_for(
            lambda: (tmp_path / "runs/a/checkpoints").exists() and list((tmp_path / "runs/a/checkpoints").glob("s*"))
        )
        assert status_of(mlxft, "a")["status"] == "running"
        for refused in (
            ["train", recipe, "--overwrite"],
            ["train", "--resume", "runs/a"],
            ["runs", "rm", "a", "--yes"],
        ):
            told = mlxft(*refused)
            assert told.code == 1
            assert f"is in use now, by process {training.pid}" in told.err
        watching = subprocess.Popen(
            [*command, "runs", "watch", "a"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        other = subprocess.Popen(
            [*command, "runs", "watch", "a"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            # Tests that run in the background of a script have inherited that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert other.stdout is not None
        assert watching.stdout is not None
        for watcher in (watching, other):
            assert re.match(r"step \d+ epoch .* loss", watcher.stdout.readline())
        other.send_signal(signal.SIGINT)
        other.communicate(timeout=300)
        assert other.returncode == 130
    finally:
        training.kill()
        training.wait()
    out, err = watching.communicate(timeout=300)
    assert (watching.returncode, err) == (1, "")
    assert re.search(r"a: interrupted after step \d+ \(its process was killed\)", out)
    assert status_of(mlxft, "a")["status"] == "interrupted"
    assert mlxft("runs", "rm", "a", "--yes").code == 0


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_a_failure_keeps_its_message(write: Command, mlxft: Command) -> None:
    failed = mlxft("train", write(**{"optim.lr": 1e30, "optim.clip": None, "optim.name": "sgd", "optim.warmup": 0}))
    assert failed.code == 1
    found = status_of(mlxft, "a")
    assert found["status"] == "failed"
    assert found["error"] in failed.err
    assert found["error"].splitlines()[0][:30] in mlxft("runs").out


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("show", "nope"), 2, "nope: no such run in runs"),
        (("show", "half"), 0, "config.yaml is not a recipe"),
        (("plot", "half"), 1, "there is nothing to draw"),
        (("plot", "half", "--out", "x.gif"), 2, "a picture ends in"),
        (("compare", "half"), 2, "at least two"),
        (("rm", "half", "nope", "--yes"), 2, "no such run"),
        (("--json", "show", "half"), 2, "--json after show"),
        (("--dir", "nowhere"), 2, "nowhere"),
        (("watch", "half"), 1, "half: half-written"),
    ],
)
def test_bad_input(
    args: tuple[str, ...], code: int, told: str, mlxft: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    half = tmp_path / "runs/half"
    half.mkdir(parents=True)
    (half / "config.yaml").touch()
    done = mlxft("runs", *args)
    assert done.code == code, done
    assert told in " ".join((done.out + done.err).split())
    assert half.exists()


def test_five_hundred_runs_are_listed_within_a_second(write: Command, mlxft: Command, shell: Command) -> None:
    assert mlxft("train", write(**SAMPLE)).code == 0
    for i in range(500):
        shutil.copytree("runs/a", f"runs/run-{i:03d}", ignore=shutil.ignore_patterns("checkpoints"))

    def spent() -> float:  # CPU time of processes that have ended: other work on the machine must not count
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        began = spent()
        listed = shell("runs", "--json")
        times.append(spent() - began)
        assert len(json.loads(listed.out)) == 501
        if times[-1] < 1.0:
            break
    assert min(times) < 1.0, times
    code = "import sys, mlxft.cli.study, mlxft.runs, mlxft.study.report; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mlx", "transformers", "pydantic", "matplotlib"} & set(modules)


# Schema


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(recipe_schema())


def test_the_command_prints_the_schema(mlxft: Command) -> None:
    done = mlxft("schema")
    assert (done.code, json.loads(done.out)) == (0, recipe_schema())


def recipes() -> list[Path]:
    others = {ROOT / "configs/label.yaml", *(ROOT / "configs").glob("eval-*.yaml")}
    return sorted(set((ROOT / "configs").glob("*.yaml")) - others)


@pytest.mark.parametrize("recipe", recipes(), ids=lambda p: p.stem)
def test_every_recipe_is_right_by_the_schema(recipe: Path, schema: jsonschema.Draft202012Validator) -> None:
    assert [e.message for e in schema.iter_errors(read_yaml(recipe.read_text("utf-8"), recipe.name))] == []


def test_config_yaml_of_a_run_is_right_by_the_schema(
    write: Command, mlxft: Command, tmp_path: Path, schema: jsonschema.Draft202012Validator
) -> None:
    assert mlxft("train", write(**{"run.steps": 1})).code == 0
    assert [e.message for e in schema.iter_errors(yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text()))] == []


@pytest.mark.parametrize("objective", objectives())
def test_every_setting_of_every_objective_is_there_and_no_other(objective: str) -> None:
    schema = recipe_schema()
    rule = next(r for r in schema["allOf"] if r["if"]["properties"]["objective"]["const"] == objective)

    def keys(node: dict[str, Any], prefix: str) -> set[str]:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        assert node["additionalProperties"] is False
        return {f"{prefix}.{k}" for k in node["properties"]}

    found: set[str] = set()
    for name, place in (schema["properties"] | rule["then"]["properties"]).items():
        if place is not False:
            found |= keys(place, name) if "$ref" in place else {name}
    assert set(all_keys(config_class(objective))) <= found
    assert {k.partition(".")[0] for k in found} == set(config_class(objective).model_fields)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"tune": {"rnak": 8}}, "$.tune"),
        ({"tune": {"rank": 0}}, "$.tune.rank"),
        ({"optim": {"lr": "fast"}}, "$.optim.lr"),
        ({"optim": {"lr": True}}, "$.optim.lr"),
        ({"data": {"train": "x", "format": "massages"}}, "$.data.format"),
        ({"data": {"format": "messages"}}, "$.data"),
        ({"objective": "pop"}, "$.objective"),
        ({"ppo": {}}, "$"),  # sft has none
        ({"objective": "ppo", "ppo": {"clip": -1}}, "$.ppo.clip"),
        ({"objective": "ppo", "preference": {}}, "$"),
        ({"report": {"to": ["wandlb"]}}, "$.report.to[0]"),
        ({"colour": "red"}, "$"),
    ],
)
def test_what_recipes_refuse_the_schema_refuses(
    changes: dict[str, Any], place: str, schema: jsonschema.Draft202012Validator
) -> None:
    assert place in {e.json_path for e in schema.iter_errors({**MINE, **changes})}
    with pytest.raises(ConfigError):
        parse_config({**MINE, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"tune": None, "report": None},  # sections with nothing below them
        {"memory": {"checkpoint": True}},  # how YAML 1.1 writes on
        {"memory": {"checkpoint": "auto"}, "tune": {"layers": [0, 2], "targets": "mlp"}},
        {"optim": {"betas": [0.9, 0.99], "warmup": 5}, "batch": {"tokens": "auto"}},
    ],
)
def test_what_recipes_take_the_schema_takes(changes: dict[str, Any], schema: jsonschema.Draft202012Validator) -> None:
    assert [e.message for e in schema.iter_errors({**MINE, **changes})] == []
    parse_config({**MINE, **changes})


# Shell completion, as the shell asks for it


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("mlxft ru", {"runs"}),
        ("mlxft runs sh", {"show"}),
        ("mlxft runs show q", {"quick", "quack"}),
        ("mlxft runs rm quick qua", {"quack"}),
        ("mlxft train --re", {"--resume"}),
        ("mlxft fuse qui", {"qui", "quick"}),  # a file, too
        ("mlxft check recipe.yaml tune.ra", {"tune.rank="}),
    ],
)
def test_the_shell_completes(words: str, wanted: set[str], tmp_path: Path) -> None:
    for name in ("quick", "quack", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    script = Path(sys.executable).parent / "mlxft"
    asked = {"_MLXFT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run([script], env=os.environ | asked, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == wanted, done.stderr


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_the_line_for_the_shells_start_file_works(shell_name: str) -> None:
    script = Path(sys.executable).parent / "mlxft"
    asked = {"_MLXFT_COMPLETE": f"{shell_name}_source"}
    done = subprocess.run([script], env=os.environ | asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "_MLXFT_COMPLETE" in done.stdout
    assert "mlxft" in done.stdout
