"""Nothing lost: killed, interrupted, out of disk or damaged, a run goes on as if nothing had been."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import pytest
import yaml
from rich.console import Console

import mlxft
from mlxft.cli import cli as main
from mlxft.errors import CheckpointError, ConfigError, ExportError, MlxftError
from mlxft.files import MARK, claim
from mlxft.runs import Run
from mlxft.trainer import checkpoint, report

Recipe = Callable[..., dict[str, Any]]
ENDLESS = "run.steps=1000000"  # of runs that are killed from outside, which then get an end beyond where they are
SAME = ("event", "step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "best", "prompt", "answer")


def train(settings: dict[str, Any], said: list[str] | None = None, **options: Any) -> Run:
    out = io.StringIO()
    try:
        return mlxft.train(settings, console=Console(file=out, width=1000), **options)
    finally:
        if said is not None:
            said += out.getvalue().splitlines()


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "mlxft", *map(str, args)]


def cli(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, cwd=cwd, timeout=300)


def write_recipe(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def result(run: Path) -> bytes:
    files = [p for p in (run / "adapter/adapters.safetensors", run / "model/model.safetensors") if p.exists()]
    assert len(files) == 1, files
    return files[0].read_bytes()


def course(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of the training, without times and memory."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: e[k] for k in SAME if k in e} for e in events if e["event"] in ("train", "eval", "sample")]


def assert_same(one: Path, other: Path) -> None:
    """The same result, last checkpoint and course, bit for bit; nothing half-written is left."""
    assert result(one) == result(other)
    assert course(one) == course(other)
    ends = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
    assert ends[0].name == ends[1].name
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert not [p for p in other.rglob("*") if p.name.startswith(".") and p.name != MARK]


class KilledAt(BaseException):
    """Stands for a kill, in this process."""


@contextmanager
def at_step(step: int, act: Callable[[], None], kind: str = "train") -> Iterator[None]:
    """Do something when an event of `step` is reported."""
    real = report.EventFile.event

    def event(self: report.EventFile, e: dict[str, Any]) -> None:
        real(self, e)
        if e["event"] == kind and e["step"] == step and self._path.name == "metrics.jsonl":
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.EventFile, "event", event)
        yield


def killed(step: int, settings: dict[str, Any], **options: Any) -> None:
    def kill() -> None:
        raise KilledAt

    with at_step(step, kill), pytest.raises(KilledAt):
        train(settings, **options)


def interrupted(step: int, settings: dict[str, Any], said: list[str] | None = None, **options: Any) -> None:
    with at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        train(settings, said, **options)


# Killed from outside, through the command.


def ended() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def last_step(run: Path) -> int:
    try:
        tail = (run / "metrics.jsonl").read_text().splitlines()[-2:]
    except OSError:
        return 0
    return max((json.loads(line).get("step", 0) for line in tail if line.endswith("}")), default=0)


def saving(run: Path) -> bool:
    try:
        return any(name.startswith(".tmp-mlxft-") for name in os.listdir(run / "checkpoints"))
    except OSError:
        return False


def kill_when(args: list[str], ready: Callable[[], bool]) -> None:
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ready() and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended before it could be killed"


def prove_kills(tmp_path: Path, settings: dict[str, Any], moments: list[tuple[int, str]]) -> None:
    """Kill a run at or after each step (while it computes, or while it saves), resume each time, and compare.

    The uninterrupted run and the last part of the killed one are of this process, the killed parts of their own.
    """
    other = {**settings, "run": {**settings["run"], "name": "b"}}
    path, run = write_recipe(tmp_path / "b.yaml", other), tmp_path / "runs/b"
    for step, what in moments:
        wait = random.Random(step).random() * 0.02

        def ready(step: int = step, what: str = what, wait: float = wait) -> bool:
            if last_step(run) < step:
                return False
            if what == "saving":
                return saving(run)
            time.sleep(wait)
            return True

        kill_when(command("train", path, "--resume", ENDLESS), ready)
    said: list[str] = []
    for one in (settings, other):
        one["run"]["steps"] = last_step(run) + 5
    train(settings)
    train(other, said, resume=True)
    assert any(re.match(r"training after step \d+ of", line) for line in said), said
    assert_same(tmp_path / "runs/a", run)


def random_moments(seed: int, kinds: list[str]) -> list[tuple[int, str]]:
    rng = random.Random(seed)
    rng.shuffle(kinds)
    return list(zip(sorted(rng.sample(range(10, 40), len(kinds))), kinds))


LONG: dict[str, Any] = {"run.save_every": 7, "optim.schedule": "constant", "optim.warmup": 0}


@pytest.mark.slow
def test_killed_three_times_with_validation(recipe: Recipe, tmp_path: Path):
    """LoRA with dropout, validation, sampling and accumulation: three kills, one while a checkpoint is written."""
    changes: dict[str, Any] = {"tune.dropout": 0.1, "data.valid": 0.2, "run.eval_every": 9, "batch.accumulate": 2}
    changes |= {"run.sample_prompts": ["the"], "run.sample_tokens": 4}
    moments = random_moments(1, ["saving", "computing", "computing"])
    prove_kills(tmp_path, recipe(rows=12, **LONG, **changes), moments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kinds"), [("lora", ["saving", "computing"]), ("dora", ["saving"]), ("full", ["saving"])]
)
def test_killed_without_validation(recipe: Recipe, tmp_path: Path, method: str, kinds: list[str]):
    """At each checkpoint the adapter is written as well; (full) the whole model at the end."""
    tune = {"method": "full"} if method == "full" else {"method": method, "rank": 4, "dropout": 0.2}
    settings = recipe(rows=12, tune=tune, **LONG, **{"optim.lr": 1e-3})
    prove_kills(tmp_path, settings, random_moments(len(method), kinds))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130(recipe: Recipe, tmp_path: Path, signum: signal.Signals):
    settings = recipe(**{"run.steps": 100_000, "tune.dropout": 0.1})
    args = command("train", write_recipe(tmp_path / "r.yaml", settings))
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while last_step(tmp_path / "runs/a") < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signum)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    step = last_step(tmp_path / "runs/a")
    assert f"stopped after step {step} of 100000; a checkpoint is saved, resume with: mlxft train --resume" in out
    assert err.strip() == "interrupted"
    assert (tmp_path / f"runs/a/checkpoints/step-{step}/state.json").exists()


# In this process: quicker, at exact places.


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor", "muon"])
def test_interrupted_is_uninterrupted_with_every_optimiser(recipe: Recipe, tmp_path: Path, name: str):
    changes: dict[str, Any] = {"optim.name": name, "tune.dropout": 0.3, "run.steps": 7, "run.report_every": 2}
    train(recipe(**changes))
    interrupted(4, recipe(**changes, **{"run.name": "b"}))
    train(recipe(**changes, **{"run.name": "b"}), resume=True)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


@pytest.mark.parametrize(
    "changes",
    [
        {"tune.train": ["embed_tokens", "layers.1.input_layernorm"]},
        {"tune": {"method": "full"}, "model.dtype": "bfloat16"},
        {"tune": {"method": "dora", "rank": 2}, "data.valid": 0.3, "run.eval_every": 2},
        {"tune": {"method": "full", "layers": 1}, "data.valid": 0.3, "run.eval_every": 2},
        {"batch.rows": None, "batch.tokens": 150, "run.steps": None, "run.epochs": 2.5},
        {"model.quantize": 4, "model.group_size": 32},
    ],
    ids=["train-embed", "bf16-full", "dora-valid", "last-layer-valid", "token-batches", "qlora"],
)
def test_killed_is_uninterrupted(recipe: Recipe, tmp_path: Path, changes: dict[str, Any]):
    settings = {"run.steps": 7, "run.save_every": 3, "optim.lr": 1e-3, **changes}
    train(recipe(**settings))
    killed(5, recipe(**settings, **{"run.name": "b"}))
    train(recipe(**settings, **{"run.name": "b"}), resume=True)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


@pytest.mark.parametrize("objective", ["sft", "packed", "dpo"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_killed_is_uninterrupted_with_dropout_where_the_head_reads(
    recipe: Recipe, tmp_path: Path, make_model_dir: Callable[..., Path], tied: bool, objective: str
):
    """What is found out of a model in its first step, which a resumed run finds out again, draws nothing."""
    folder = make_model_dir(tmp_path / "model", tie_word_embeddings=tied)
    targets = ["all-linear", "embed_tokens"] + ([] if tied else ["lm_head"])
    settings: dict[str, Any] = {"tune": {"rank": 2, "dropout": 0.3, "targets": targets}, "model.path": str(folder)}
    settings |= {"run.steps": 7, "run.save_every": 3, "optim.lr": 1e-3}
    if objective == "packed":
        settings |= {"batch": {"tokens": 128, "pack": True}}
    if objective == "dpo":  # from an adapter that brings its dropout
        first = train(recipe(**{**settings, "run.name": "sft", "run.steps": 1}))
        rows = [{"prompt": f"{i} the", "chosen": "and the or" * (i + 1), "rejected": "in on"} for i in range(6)]
        (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        settings |= {"objective": "preference", "tune": {}, "model.adapter": str(first.dir)}
        settings |= {"data": {"train": str(tmp_path / "pairs.jsonl"), "format": "preference"}}
    train(recipe(**settings))
    killed(5, recipe(**settings, **{"run.name": "b"}))
    train(recipe(**settings, **{"run.name": "b"}), resume=True)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


def test_a_run_keeps_the_rate_that_its_recipe_left_to_the_default(recipe: Recipe, tmp_path: Path):
    """It began when the default was another one: the stored rate counts, unless another one is asked for."""
    changes: dict[str, Any] = {"run.steps": 6, "run.save_every": 2, "tune": {"method": "full"}}
    train(recipe(**changes, **{"optim.lr": 2e-4}))
    killed(5, recipe(**changes, **{"optim.lr": 2e-4, "run.name": "b"}))
    train(recipe(**changes, **{"optim.lr": None, "run.name": "b"}), resume=True)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")
    with pytest.raises(ConfigError, match=r"optim.lr: the run has 0.0002, .* 2e-05"):
        train(recipe(**changes, **{"optim.lr": 2e-5, "run.name": "b"}), resume=True)


def test_killed_before_the_first_checkpoint_starts_over(recipe: Recipe, tmp_path: Path):
    changes: dict[str, Any] = {"tune.dropout": 0.3, "data.valid": 0.3, "run.eval_every": 1, "run.eval_at_start": True}
    train(recipe(**changes))
    killed(2, recipe(**changes, **{"run.name": "b"}))
    said: list[str] = []
    train(recipe(**changes, **{"run.name": "b"}), said, resume=True)
    assert any("no checkpoint yet: starting over" in line for line in said)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")
    assert len(mlxft.runs.open_run(tmp_path / "runs/b").metrics("start")) == 1


def test_killed_between_the_last_checkpoint_and_the_result(recipe: Recipe, tmp_path: Path):
    """The run looks complete, its adapter is an older one: resuming writes the right one."""
    changes: dict[str, Any] = {"run.steps": 6, "run.save_every": 2}
    train(recipe(**changes))
    killed(5, recipe(**changes, **{"run.name": "b"}))
    stale = result(tmp_path / "runs/b")
    train(recipe(**changes, **{"run.name": "b"}), resume=True)
    (tmp_path / "runs/b/adapter/adapters.safetensors").write_bytes(stale)
    said: list[str] = []
    train(recipe(**changes, **{"run.name": "b"}), said, resume=True)
    assert any("nothing is left to train" in line for line in said)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


def test_what_a_kill_amid_a_whole_model_left_is_cleared(recipe: Recipe, tmp_path: Path):
    settings = recipe(**{"tune": {"method": "full"}, "run.save_every": 2, "run.steps": 6})
    killed(5, settings)
    half = tmp_path / f"runs/a/.model.partial-{ended()}"
    half.mkdir()
    claim(half, "model")
    (half / "model.safetensors").write_bytes(b"half")
    train(settings, resume=True)
    assert not [p for p in (tmp_path / "runs/a").rglob("*") if p.name.startswith(".") and p.name != MARK]


def damage(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def test_a_damaged_checkpoint_is_said_and_the_one_before_gives_the_same(recipe: Recipe, tmp_path: Path):
    changes: dict[str, Any] = {"run.steps": 9, "run.save_every": 3, "tune.dropout": 0.3}
    train(recipe(**changes))
    killed(8, recipe(**changes, **{"run.name": "b"}))
    damage(tmp_path / "runs/b/checkpoints/step-6")
    said: list[str] = []
    train(recipe(**changes, **{"run.name": "b"}), said, resume=True)
    assert any("step-6 is damaged" in line and "using the one before it" in line for line in said)
    assert any(line.startswith("training after step 3 of 9") for line in said)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


@pytest.mark.parametrize("damage", ["truncated", "altered", "removed"])
def test_every_file_of_a_checkpoint_in_turn(recipe: Recipe, tmp_path: Path, damage: str):
    """Whatever becomes of one file of the newest checkpoint, training goes on from the one before."""
    settings = recipe(**{"run.steps": 6, "run.save_every": 2, "tune.dropout": 0.3, "run.name": "b"})
    killed(5, settings)
    run = tmp_path / "runs/b"
    shutil.copytree(run, tmp_path / "kept")
    files = sorted(p.name for p in (run / "checkpoints/step-4").iterdir())
    assert len(files) == 4
    results = set()
    for name in files:
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run)
        file = run / "checkpoints/step-4" / name
        content = bytearray(file.read_bytes())
        file.unlink()
        if damage == "truncated":
            file.write_bytes(content[: len(content) // 2])
        if damage == "altered":
            digit = next(i for i in reversed(range(len(content))) if chr(content[i]).isdigit() or name.endswith("rs"))
            content[digit] ^= 1
            file.write_bytes(content)
        said: list[str] = []
        train(settings, said, resume=True)
        assert any("step-4 is damaged" in line for line in said), name
        assert any(line.startswith("training after step 2 of 6") for line in said), name
        results.add(result(run))
    assert len(results) == 1


KILLS = int(os.environ.get("MLXFT_KILLS", "4"))


# What is slow to import stands before the work, so that a kill seldom falls into it.
WORK = """
import sys, mlxft.cli, mlxft.run, mlxft.exports.fuse, mlxft.exports.gguf, mlxft.study.sweep, optuna
mlxft.study.sweep.ATTEMPTS = 10**6  # or a trial that is killed three times counts as failed
for args in eval(sys.argv[1]):
    print("at", args[0], flush=True)
    mlxft.cli.cli.main(args, standalone_mode=False)
print("at end", flush=True)
"""


def kill_at_random(commands: list[list[str]], kills: int, seed: int, first: float) -> Iterator[str]:
    """Run commands in a child, again and again, killed at a random moment of one: where it was then, or "at end".

    The moments lie within what the command took the last time that it was over by then, and within `first` seconds.
    """
    rng, longest = random.Random(seed), {args[0]: first for args in commands}
    for _ in range(kills):
        name = rng.choice(list(longest))
        with subprocess.Popen(
            [sys.executable, "-c", WORK, repr(commands)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            said: list[str] = []
            while said[-1:] not in ([f"at {name}\n"], [""]):
                said.append(process.stdout.readline())
            began = time.monotonic()
            try:
                process.wait(timeout=longest[name] * rng.random())
            except subprocess.TimeoutExpired:
                process.kill()
            took = time.monotonic() - began
            said += process.stdout
        where = [line for line in said if line.startswith("at ")][-1].strip()
        longest[name] = took if where != f"at {name}" else longest[name] * 1.1
        yield where


def finish(commands: list[list[str]]) -> None:
    """Run commands in a child to their end."""
    done = subprocess.run([sys.executable, "-c", WORK, repr(commands)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_killed_again_and_again_while_saving_deleting_fusing_and_exporting(recipe: Recipe, tmp_path: Path):
    """A child trains with a checkpoint a step, then fuses and exports over what is there, and replaces a run that has
    ended; it is killed at random. What was whole stays whole, the run ends as one that was not killed, and no litter is
    left."""
    changes: dict[str, Any] = {"run.steps": 30, "run.save_every": 1, "run.keep": 1}
    train(recipe(**changes))
    path, run = write_recipe(tmp_path / "b.yaml", recipe(**changes, **{"run.name": "b"})), tmp_path / "runs/b"
    work = [["train", str(path), "--resume"], ["fuse", str(run), str(tmp_path / "out"), "--overwrite", "--force"]]
    work += [["export", str(run), str(tmp_path / "out.gguf"), "--format", "gguf", "--overwrite"]]
    seen: Counter[str] = Counter()
    for place in kill_at_random(work, KILLS - KILLS // 4, 5, first=0.4):
        seen[place] += 1
        told = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        work[0][-1] = "--resume" if told and '"event": "end"' not in told else "--overwrite"
        if work[0][-1] == "--overwrite":  # half of it may be deleted
            continue
        found = sorted((run / "checkpoints").glob("step-*")) if run.exists() else []
        if found:
            checkpoint.load_checkpoint(max(found, key=lambda p: int(p.name[5:])))
    print(dict(seen))  # pytest -s
    finish(work)
    assert_same(tmp_path / "runs/a", run)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


SWEEP = {"space": {"optim.lr": {"log": [1e-5, 1e-1]}, "tune.rank": {"choice": [2, 4]}}, "trials": 6, "grace": 2}


def swept(sweep: Path) -> tuple[list[Any], dict[str, Any], dict[str, bytes]]:
    """Trials, best recipe and weights of a sweep that is finished, in which nothing half-written is left."""
    import optuna

    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{sweep / 'sweep.db'}")
    trials = [
        (t.number, t.state.name, t.params, t.value, t.intermediate_values, sorted(t.system_attrs.items()))
        for t in study.get_trials(deepcopy=False)
    ]
    best = yaml.safe_load((sweep / "best.yaml").read_text())
    best["run"].pop("name")
    weights = {str(p.relative_to(sweep)): p.read_bytes() for p in sweep.rglob("adapters.safetensors")}
    left = [p.name for p in sweep.rglob("*") if p.name.startswith(".") and p.name != MARK]
    assert not [*left, *sweep.glob("trials/*/checkpoints"), *sweep.glob("*-journal"), *sweep.parent.glob(".*")]
    return trials, best, weights


@pytest.mark.slow
def test_killed_again_and_again_while_sweeping(recipe: Recipe, tmp_path: Path):
    """A quarter of the kills, between a sweep's first and last write: a sweep that has come to its end all the same has
    the trials, in every number, of one that was not killed; the next one is begun then."""
    settings = recipe(
        **{"run.steps": 40, "run.eval_every": 4, "data.valid": 0.3, "tune.rank": None, "run.seed": 5, "sweep": SWEEP}
    )
    path = write_recipe(tmp_path / "sweep.yaml", settings)
    work, number, within = [["sweep", str(path), "--name", "s0"]], 0, 0
    for place in kill_at_random(work, max(1, KILLS // 4), 7, first=1.0):
        within += place == "at sweep" and (tmp_path / f"runs/s{number}/sweep.db").exists()
        number += place == "at end"
        work[0][-1] = f"s{number}"
    print(f"{within} kills within {number + 1} sweeps")  # pytest -s
    finish(work)
    main.main(["sweep", str(path), "--name", "whole"], standalone_mode=False)
    whole = swept(tmp_path / "runs/whole")
    assert {"PRUNED", "COMPLETE"} == {state for _, state, *_ in whole[0]}
    assert [n for n, *_ in whole[0]] == list(range(6))
    for i in range(number + 1):
        assert swept(tmp_path / f"runs/s{i}") == whole


@pytest.mark.parametrize("name", ["checkpoints", "adapter"])
def test_nothing_behind_a_link_is_replaced_or_removed(recipe: Recipe, tmp_path: Path, name: str):
    settings = recipe(**{"run.save_every": 1, "run.keep": 1})
    killed(3, settings)
    place = tmp_path / "runs/a" / name
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    before = {p: p.read_bytes() for p in (tmp_path / "elsewhere").rglob("*") if p.is_file()}
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="is a link" if "resume" in options else name):
            train(settings, **options)
    assert {p: p.read_bytes() for p in (tmp_path / "elsewhere").rglob("*") if p.is_file()} == before


def test_all_damaged_is_refused_and_nothing_touched(recipe: Recipe, tmp_path: Path):
    settings = recipe(**{"run.steps": 9, "run.save_every": 3})
    killed(8, settings)
    for folder in (tmp_path / "runs/a/checkpoints").iterdir():
        damage(folder)
    before = result(tmp_path / "runs/a"), course(tmp_path / "runs/a")
    with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
        train(settings, resume=True)
    assert (result(tmp_path / "runs/a"), course(tmp_path / "runs/a")) == before


def test_changed_data_is_refused(recipe: Recipe, tmp_path: Path):
    settings = recipe(rows=10)
    interrupted(2, settings)
    file = tmp_path / "rows-10.jsonl"
    file.write_text(file.read_text().replace("9 ", "8 ", 1))
    with pytest.raises(CheckpointError, match="training data has changed"):
        train(settings, resume=True)


def test_changed_base_is_refused(recipe: Recipe, make_model_dir: Callable[..., Path], tmp_path: Path):
    """What lies at model.path is not what the run began with, though its structure is the same."""
    base = make_model_dir(tmp_path / "base")
    settings = recipe(**{"model.path": str(base)})
    interrupted(2, settings)
    held = mx.load(str(base / "model.safetensors"))
    assert isinstance(held, dict)
    drawn = {n: mx.random.normal(v.shape, key=mx.random.key(5)) if v.ndim > 1 else v for n, v in held.items()}
    mx.save_safetensors(str(base / "model.safetensors"), drawn, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=r"base .*base has changed"):
        train(settings, resume=True)


def test_changed_validation_data_is_refused(recipe: Recipe, tmp_path: Path):
    """The best so far was found on other rows."""
    settings = recipe(rows=10, **{"data.valid": str(tmp_path / "held.jsonl")})
    lines = (tmp_path / "rows-10.jsonl").read_text().splitlines()
    (tmp_path / "held.jsonl").write_text("\n".join(lines[:3]))
    interrupted(2, settings)
    (tmp_path / "held.jsonl").write_text("\n".join(lines[:4]))
    with pytest.raises(CheckpointError, match="data has changed"):
        train(settings, resume=True)


CHANGES: list[tuple[str, Any]] = [
    ("tune.rank", 8),
    ("tune.dropout", 0.5),
    ("optim.lr", 1.0),
    ("optim.name", "adam"),
    ("batch.accumulate", 2),
    ("run.seed", 1),
    ("run.steps", 6),
    ("data.max_length", 100),
]


def test_changed_settings_are_refused_by_name(recipe: Recipe):
    interrupted(2, recipe())
    for key, value in CHANGES:
        with pytest.raises(ConfigError, match=rf"cannot resume with other settings:\n  {key}: the run has .*{value}"):
            train(recipe(**{key: value}), resume=True)
    with pytest.raises(ConfigError) as both:
        train(recipe(**dict(CHANGES)), resume=True)
    assert all(f"{key}: the run has" in str(both.value) for key, _ in CHANGES)


def test_how_often_to_look_and_save_may_change(recipe: Recipe, tmp_path: Path):
    train(recipe(**{"run.steps": 6}))
    interrupted(2, recipe(**{"run.steps": 6, "run.name": "b"}))
    train(recipe(**{"run.steps": 6, "run.name": "b", "run.save_every": 2, "run.keep": 1}), resume=True)
    assert result(tmp_path / "runs/a") == result(tmp_path / "runs/b")
    assert [p.name for p in (tmp_path / "runs/b/checkpoints").iterdir()] == ["step-6"]


def test_a_run_of_constant_rate_may_be_made_longer(recipe: Recipe, tmp_path: Path):
    constant: dict[str, Any] = {"optim.schedule": "constant", "optim.warmup": 2}
    train(recipe(**constant, **{"run.steps": 6}))
    train(recipe(**constant, **{"run.steps": 4, "run.name": "b"}))
    train(recipe(**constant, **{"run.steps": 6, "run.name": "b"}), resume=True)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


def test_an_early_stop_stays_one(recipe: Recipe, contradiction: dict[str, Any]):
    settings = recipe(**contradiction, **{"run.steps": 60, "run.patience": 2})
    run = train(settings)
    assert course(run.dir)[-1]["step"] < 60
    before = result(run.dir), course(run.dir)
    said: list[str] = []
    train(settings, said, resume=True)
    assert any("stopped early" in line for line in said)
    assert (result(run.dir), course(run.dir)) == before


def test_an_existing_run_is_refused_unless_asked(recipe: Recipe):
    run = train(recipe())
    before = result(run.dir)
    with pytest.raises(ConfigError, match="exists; resume it with resume=True, replace it with overwrite=True"):
        train(recipe())
    assert result(run.dir) == before
    with pytest.raises(ConfigError, match="not both"):
        train(recipe(), resume=True, overwrite=True)
    train(recipe(**{"run.seed": 1}), overwrite=True)
    assert result(run.dir) != before


def test_a_wrong_recipe_does_not_cost_the_run_that_it_would_overwrite(recipe: Recipe):
    run = train(recipe())
    before = result(run.dir)
    for wrong in ({"data.max_length": 5}, {"tune.targets": "nothing"}, {"model.path": "/nowhere/at/all"}):
        with pytest.raises(MlxftError):
            train(recipe(**wrong), overwrite=True)
        assert result(run.dir) == before


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_can_not_be_written_is_a_config_error(recipe: Recipe, tmp_path: Path, name: str):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot write to"):
        train(recipe(**{"run.dir": str(tmp_path / name)}))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(recipe: Recipe, tmp_path: Path):
    """A rate of 1e30 breaks the first update: step 2 has no loss, and the message says what to do."""
    path = write_recipe(tmp_path / "r.yaml", recipe(**{"optim.lr": 1e30, "optim.warmup": 0, "run.save_every": 1}))
    done = cli("train", path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for piece in ("TrainingError: step 2: ", "rows-10.jsonl:", "optim.lr", "What was saved before is intact"):
        assert piece in done.stderr, done.stderr


def test_a_poisoned_run_resumes_from_its_last_good_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlxft.objectives import sft

    changes: dict[str, Any] = {"run.steps": 8, "run.save_every": 2, "memory.measure": False}
    train(recipe(**changes))
    real, calls = sft.rows_nll, []

    def poisoned(*args: Any, **options: Any) -> mx.array:
        calls.append(1)
        return real(*args, **options) * (float("nan") if len(calls) > 5 else 1.0)

    monkeypatch.setattr(sft, "rows_nll", poisoned)
    with pytest.raises(MlxftError, match="step 6: the loss is nan"):
        train(recipe(**changes, **{"run.name": "b"}))
    monkeypatch.setattr(sft, "rows_nll", real)
    train(recipe(**changes, **{"run.name": "b"}), resume=True)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk of `size` bytes, where it may be mounted (True), else a folder (False)."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


# The command under a limit on the size of a file.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
del sys.argv[1]
from mlxft.cli import main
main()
"""


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("limit", ["disk", "file size"])
def test_a_full_disk_leaves_what_was_saved(recipe: Recipe, tmp_path: Path, method: str, limit: str):
    """A run is stopped, its disk made small, and resumed: exit 1, the old checkpoint whole; with room it goes on."""
    tune: dict[str, Any] = {"method": "full"} if method == "full" else {"rank": 16}
    changes: dict[str, Any] = {"tune": tune, "run.steps": 6, "run.save_every": 2, "optim.lr": 1e-3}
    train(recipe(**changes))
    settings = recipe(**changes, **{"run.name": "b"})
    interrupted(2, settings)
    run = tmp_path / "runs/b"
    used = sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
    largest = max(p.stat().st_size for p in run.rglob("*") if p.is_file())
    with small_disk(tmp_path / "disk", used + largest // 2 + (1 << 14)) as mounted:
        place = tmp_path / "disk/b" if limit == "disk" else run
        args = command("train", "--resume", place)
        if limit == "disk":
            shutil.copytree(run, place)
        if limit == "file size" or not mounted:
            args = [sys.executable, "-c", LIMITED, str(largest - 1000), *args[3:]]
        before = {p.relative_to(place): p.read_bytes() for p in (place / "checkpoints").rglob("*") if p.is_file()}
        failed = subprocess.run(args, capture_output=True, text=True, timeout=300)
        assert failed.returncode == 1, failed.stdout + failed.stderr
        assert "Traceback" not in failed.stderr
        assert "cannot write" in failed.stderr
        assert "what was saved before is unchanged" in failed.stderr
        after = {p.relative_to(place): p.read_bytes() for p in (place / "checkpoints").rglob("*") if p.is_file()}
        assert after == before
        assert not [p for p in place.rglob("*") if p.name.startswith(".") and p.name != MARK]
        if limit == "disk":
            shutil.rmtree(run)
            shutil.copytree(place, run)
    train(settings, resume=True)
    assert_same(tmp_path / "runs/a", run)


def test_forms_of_resume(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By run folder or by recipe, overrides before or after; a moved run is found where it is."""
    path = write_recipe(tmp_path / "a.yaml", recipe(**{"run.name": None}))
    interrupted(2, recipe())
    run = tmp_path / "runs/a"
    shutil.copytree(run, tmp_path / "kept")
    forms: list[tuple[object, ...]] = [
        ("--resume", run),
        (path, "--resume"),
        (path, "run.save_every=3", "--resume"),
        (path, "--resume", "run.save_every=3"),
    ]
    outcomes = []
    for form in forms:
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run)
        main.main(["train", *map(str, form)], standalone_mode=False)
        assert "training after step 2 of 4" in capsys.readouterr().out, form
        outcomes.append(result(run))
    assert len(set(outcomes)) == 1
    shutil.move(str(tmp_path / "kept"), str(tmp_path / "moved"))
    done = cli("train", "run.save_every=3", "--resume", tmp_path / "moved")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "moved") == outcomes[0]


def test_a_refused_resume_exits_2(recipe: Recipe, tmp_path: Path):
    interrupted(2, recipe())
    done = cli("train", "--resume", tmp_path / "runs/a", "optim.lr=0.5", "tune.rank=2")
    assert done.returncode == 2
    assert "optim.lr: the run has 0.01, the recipe has 0.5" in done.stderr
    assert "tune.rank: the run has 4, the recipe has 2" in done.stderr
    with pytest.raises(click.UsageError, match="no config"):
        main.main(["train", "--resume", str(tmp_path / "runs")], standalone_mode=False)
    train(recipe(), resume=True)


def test_a_model_that_can_not_be_written_keeps_the_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Full training ends, and there is no room for model/: the run can be completed later."""
    from mlxft.model import folder

    changes: dict[str, Any] = {"tune": {"method": "full"}, "optim.lr": 1e-3}
    train(recipe(**changes))
    settings = recipe(**changes, **{"run.name": "b"})
    real = folder.weight_bytes
    monkeypatch.setattr(folder, "weight_bytes", lambda model: 1 << 60)
    with pytest.raises(ExportError, match="GB are free"):
        train(settings)
    monkeypatch.setattr(folder, "weight_bytes", real)
    train(settings, resume=True)
    assert_same(tmp_path / "runs/a", tmp_path / "runs/b")


# A finished run is extended.


def test_an_extended_run_is_the_one_that_was_longer_from_the_start(recipe: Recipe, tmp_path: Path) -> None:
    constant = {"optim.schedule": "constant", "optim.warmup": 2, "run.steps": None, "data.valid": 0.25}
    whole = train(recipe(rows=12, **constant, **{"run.epochs": 4, "run.name": "whole"}))
    train(recipe(rows=12, **constant, **{"run.epochs": 2, "run.name": "parts"}))
    parts = tmp_path / "runs" / "parts"
    done = cli("train", "--resume", parts, "run.epochs=4")
    assert done.returncode == 0, done.stderr
    assert_same(whole.dir, parts)


def test_a_run_whose_rates_hang_on_its_length_names_the_way_that_works(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe(rows=12, **{"run.steps": None, "run.epochs": 2, "tune.alpha": 8, "run.name": "first"}))
    refused = cli("train", "--resume", tmp_path / "runs" / "first", "run.epochs=3")
    assert refused.returncode == 2
    assert "optim.schedule: cosine" in refused.stderr
    way = shlex.split(refused.stderr.partition("in a new run: mlxft ")[2])
    assert "run.epochs=1" in way
    done = cli(*way)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first-2" / "adapter").is_dir()
