"""Several processes train as one: the same numbers as a single process, for every objective."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from ranks import free_ports, row_writer, run_ranks

from mlxft import distributed
from mlxft.distributed import Ranks, assign
from mlxft.run import train
from mlxft.text import make_console

pytestmark = pytest.mark.invariant
STEPS, SAVED = 8, 5


def _rows(folder: Path) -> None:
    """Write rows of each format."""
    rng, text, write = row_writer(folder)
    write("sft.jsonl", lambda: {"prompt": text(2, 8), "completion": text(2, 20)}, 61)
    write("pairs.jsonl", lambda: {"prompt": text(2, 8), "chosen": text(2, 14), "rejected": text(2, 14)}, 41)
    write("kto.jsonl", lambda: {"prompt": text(2, 8), "completion": text(2, 14), "label": rng.random() < 0.5}, 41)
    write("prompts.jsonl", lambda: {"prompt": text(2, 8)}, 23)
    (folder / "vowels.py").write_text(
        "def share(prompts, completions, rows):\n"
        "    return [sum(c in 'aeiou' for c in text) / (1 + len(text)) for text in completions]\n"
    )
    (folder / "drawn.py").write_text(_DRAWN)


# An objective that knows nothing of ranks, and draws which tokens it trains.
_DRAWN = """
from dataclasses import dataclass
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlxft import MicroBatch, Objective, Step, Terms

@dataclass
class Batch:
    ids: mx.array
    mask: mx.array

class Drawn(Objective):
    sections = {}
    def draw(self):
        return (mx.random.uniform(shape=(4, 9)) < 0.5).astype(mx.float32)
    def steps(self, model):
        while True:
            batches = [Batch(mx.random.randint(0, 200, (4, 10)), self.draw()) for _ in range(3)]
            counts = [int(batch.mask.sum()) for batch in batches]
            yield Step([MicroBatch(b, 36, n) for b, n in zip(batches, counts)], {"loss": float(sum(counts))})
    def loss(self, model, data):
        losses = nn.losses.cross_entropy(model(data.ids[:, :-1]), data.ids[:, 1:])
        return Terms({"loss": (losses * data.mask).sum()}, {})
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass

class Unlike(Drawn):
    def draw(self):
        return mx.array((np.random.default_rng().random((4, 9)) < 0.5).astype(np.float32))
"""
_SFT = {"objective": "sft", "data.train": "sft.jsonl", "data.valid": 0.2, "data.format": "prompt-completion"}
_PAIRS = {"data.train": "pairs.jsonl", "data.valid": 0.2, "data.format": "preference", "batch.rows": 6}
_PROMPTS = {
    "data.train": "prompts.jsonl",
    "data.valid": 0.2,
    "data.format": "prompts",
    "rollout.prompts": 6,
    "rollout.samples": 2,
    "rollout.max_tokens": 10,
    "batch.tokens": 200,
    "optim.lr": 2e-3,
}
_REWARDED = {**_PROMPTS, "rewards.function": "vowels.py:share"}
_PPO = {"objective": "ppo", **_REWARDED, "ppo.epochs": 2, "ppo.minibatches": 2}
CASES: dict[str, dict[str, Any]] = {
    "sft": {**_SFT, "batch.rows": 5, "batch.accumulate": 2},
    "sft, one micro-batch": {**_SFT, "batch.rows": 8},
    "sft, packed": {**_SFT, "batch.tokens": 192, "batch.pack": True, "batch.accumulate": 2},
    "sft, full": {**_SFT, "batch.rows": 5, "batch.accumulate": 3, "tune.method": "full", "optim.lr": 1e-3},
    "reward": {"objective": "reward", **_PAIRS, "optim.lr": 2e-3},
    "dpo": {"objective": "preference", **_PAIRS, "batch.accumulate": 2},
    "dpo, precomputed": {"objective": "preference", **_PAIRS, "preference.precompute": True},
    "kto": {
        "objective": "preference",
        **_PAIRS,
        "data.train": "kto.jsonl",
        "data.format": "unpaired",
        "preference.loss": "kto",
    },
    "ppo": {**_PPO, "ppo.kl_target": 0.5, "ppo.kl_horizon": 100},
    "ppo, shared critic": {**_PPO, "ppo.critic": "shared"},
    "grpo": {"objective": "grpo", **_REWARDED, "rollout.samples": 4, "grpo.epochs": 2, "grpo.minibatches": 2},
    "grpo, exact kl": {
        "objective": "grpo",
        **_REWARDED,
        "rollout.samples": 4,
        "rollout.prompts": 4,
        "grpo.kl_estimator": "exact",
        "grpo.resample": 2,
    },
    "rloo, episodes": {"objective": "rloo", **_PROMPTS, "environment.path": "guess.py:Guess", "environment.turns": 2},
    "reinforce": {"objective": "reinforce", **_REWARDED, "reinforce.baseline": "average"},
    "online_dpo": {"objective": "online_dpo", **_REWARDED},
    "distill": {
        "objective": "distill",
        **_PROMPTS,
        "distill.teacher": "base",
        "distill.teacher_prompt": "the other",
    },
}


_BASE = {"distributed.shard": "base"}
CASES |= {
    "sft, sharded base": {**CASES["sft, one micro-batch"], **_BASE},
    "sft, sharded 4-bit base": {**CASES["sft"], **_BASE, "model.quantize": 4, "model.group_size": 32},
    "dpo, sharded base": {**CASES["dpo"], **_BASE},
    "kto, sharded base": {**CASES["kto"], **_BASE},
    "reward, sharded base": {**CASES["reward"], **_BASE},
    "sft, sharded optimiser": {**CASES["sft, full"], "distributed.shard": "optimizer"},
}
_OWN = {"data.train": "sft.jsonl", "data.format": "prompt-completion", "run.eval_every": None}
CASES |= {
    "own objective": {"objective": "drawn.py:Drawn", **_OWN},
    "sft, compiled": {**_SFT, "batch.tokens": 64, "batch.accumulate": 2, "run.compile": "on", "run.save_every": SAVED},
    # Weights are known after ten steps.
    "sft, measured": {**CASES["sft"], "distributed.weights": "auto", "run.save_every": 10, "run.steps": 12},
}
# Runs that are resumed from their first checkpoint on two ranks, with these settings.
RESUMED: dict[str, dict[str, Any]] = {"sft, compiled": {}, "sft, measured": {"distributed.weights": [3, 1]}}
ON_FOUR = ("sft", "kto", "grpo", "sft, sharded base")


def _recipe(folder: Path, model: Path, name: str, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "optim": {"lr": 1e-2, "schedule": "cosine", "warmup": 2},
        "data": {"max_length": 96},
        "run": {
            "dir": str(folder / "runs"),
            "name": name,
            "steps": STEPS,
            "report_every": 1,
            "seed": 3,
        },
        "memory": {"measure": False},
    }
    for key, value in {"run.eval_every": STEPS // 2, **settings}.items():
        *sections, last = key.split(".")
        at = found
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    if settings.get("tune.method") != "full":
        found.setdefault("tune", {}).setdefault("rank", 4)
    return found


_TRAIN = """
import io, json, os, shutil, sys
from pathlib import Path
from mlxft.distributed import current
from mlxft.run import train
from mlxft.text import make_console
recipes, resumed = json.loads(open(sys.argv[1]).read())
for recipe in recipes.values():
    train(recipe, overwrite=True, console=make_console(file=io.StringIO()))
class Weights:
    def event(self, event):
        self.seen = current().weights
    def close(self):
        Path("weights.json").write_text(json.dumps(self.seen))
for name, recipe in resumed.items():
    runs = Path(recipe["run"]["dir"])
    if os.environ["MLX_RANK"] == "0":
        shutil.copytree(runs / name, runs / recipe["run"]["name"])
        shutil.rmtree(runs / recipe["run"]["name"] / "checkpoints" / f"step-{recipe['run']['steps']}")
    train(recipe, resume=True, console=make_console(file=io.StringIO()), sinks=[Weights()])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    found = tmp_path_factory.mktemp("ranks")
    _rows(found)
    before = Path.cwd()
    os.chdir(found)
    yield found
    os.chdir(before)


@pytest.fixture(scope="module")
def trained(folder: Path, tiny_model_dir: Path) -> dict[int, Path]:
    """The run folders of all cases, by the number of ranks."""
    found = {}
    for size in (1, 2, 4):
        names = CASES if size < 4 else ON_FOUR
        recipes = {name: _recipe(folder / str(size), tiny_model_dir, name, **CASES[name]) for name in names}
        more = RESUMED if size == 2 else {}
        again = {n: _recipe(folder / "2", tiny_model_dir, f"{n}, resumed", **CASES[n] | more[n]) for n in more}
        file = folder / f"{size}.json"
        file.write_text(json.dumps([recipes, again]))
        script = folder / "train.py"
        script.write_text(_TRAIN)
        for code, _, errors in run_ranks([str(script), str(file)], size):
            assert code == 0, errors[-3000:]
        found[size] = folder / str(size) / "runs"
    return found


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


def _ended(run: Path) -> Path:
    """The last checkpoint."""
    return max((run / "checkpoints").iterdir(), key=lambda place: int(place.name[5:]))


def _weights(run: Path) -> dict[str, mx.array]:
    return mx.load(str(_ended(run) / "weights.safetensors"))


def _apart(mine: dict[str, mx.array], theirs: dict[str, mx.array]) -> float:
    """The distance of two sets of weights, relative to their size."""
    assert mine.keys() == theirs.keys()
    squares = [((mine[k] - theirs[k]).square().sum().item(), mine[k].square().sum().item()) for k in mine]
    return float(np.sqrt(sum(d for d, _ in squares) / sum(s for _, s in squares)))


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in CASES), *((name, 4) for name in ON_FOUR)])
def test_ranks_train_as_one_process(trained: dict[int, Path], name: str, size: int):
    alone, together = trained[1] / name, trained[size] / name
    for kind, keys in {"train": ["loss", "grad_norm", "tokens"], "eval": ["loss"], "rollout": ["reward"]}.items():
        mine, theirs = _events(alone, kind), _events(together, kind)
        assert len(mine) == len(theirs)
        for key in keys:
            pairs = [(a[key], b[key]) for a, b in zip(mine, theirs) if key in a]
            # A policy's loss is a sum whose parts cancel, so its errors are relative to the largest one, or to 0.01.
            largest = max((abs(a) for a, _ in pairs), default=0.0)
            for a, b in pairs:
                assert b == pytest.approx(a, rel=1e-5, abs=1e-5 * max(largest, 0.01)), (kind, key)
    assert len(_events(together, "train")) == CASES[name].get("run.steps", STEPS)
    assert _apart(_weights(alone), _weights(together)) < 1e-5
    assert _events(together, "start")[0]["ranks"] == size
    assert yaml.safe_load((together / "config.yaml").read_text())["distributed"]["ranks"] == size


def test_a_rank_reports_for_all(trained: dict[int, Path]):
    last = _events(trained[2] / "grpo", "train")[-1]
    assert {f"{name}/rank{i}" for name in ("peak_memory_gb", "wait_s") for i in (0, 1)} <= last.keys()
    assert 0 <= last["communication_share"] < 1
    rollout = _events(trained[2] / "grpo", "rollout")[-1]
    assert rollout["sampling_s/rank1"] > 0


def test_a_rank_holds_its_part_of_a_sharded_base(trained: dict[int, Path]):
    for name in ("sft, sharded base", "sft, sharded 4-bit base"):
        (start,) = _events(trained[2] / name, "start")
        assert start["base_bytes_per_rank"] <= 0.55 * start["base_bytes"]
    (four,) = _events(trained[4] / "sft, sharded base", "start")
    assert four["base_bytes_per_rank"] <= 0.3 * four["base_bytes"]


def test_a_resumed_rank_compiles_the_shapes_that_it_would_have_compiled(trained: dict[int, Path]):
    """Compiled gradients differ from others in the last bits, and ranks see other shapes."""
    runs = [trained[2] / name for name in ("sft, compiled", "sft, compiled, resumed")]
    whole, resumed = (json.loads((_ended(run) / "state.json").read_text()) for run in runs)
    (first, other), again = (state["progress"]["shapes_of_ranks"] for state in (whole, resumed))
    assert [first, other] == again
    assert first != other
    mine, theirs = map(_weights, runs)
    assert all(mx.array_equal(mine[k], theirs[k]).item() for k in mine)


def test_weights_that_a_resumed_recipe_gives_replace_measured_ones(trained: dict[int, Path], folder: Path):
    state = json.loads((trained[2] / "sft, measured/checkpoints/step-10/state.json").read_text())
    assert sum(state["progress"]["weights"]) == pytest.approx(1)
    assert json.loads((folder / "weights.json").read_text()) == [0.75, 0.25]


# --- refusals and faults ----------------------------------------------------------------------------------------------

_DIFFERS = """
import io, json, os, sys
from mlxft.errors import ConfigError, TrainingError
from mlxft.run import train
import mlxft.run
from mlxft.text import make_console
rank = int(os.environ["MLX_RANK"])
os.chdir(str(rank))
found = {}
for name, recipes in json.loads(open("../recipes.json").read()).items():
    own = mlxft.run.versions
    if name == "version" and rank:
        mlxft.run.versions = lambda: {**own(), "mlx": "0.0.1"}
    try:
        train(recipes[rank], console=make_console(file=io.StringIO()))
    except (ConfigError, TrainingError) as error:
        found[name] = str(error)
    mlxft.run.versions = own
print(json.dumps(found))
"""


def test_ranks_that_differ_are_refused_by_name(
    tmp_path: Path, make_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        _rows(tmp_path / str(rank))
        for model in ("same", "other"):
            make_model_dir(tmp_path / str(rank) / model)
    weights = mx.load("1/other/model.safetensors")
    mx.save_safetensors("1/other/model.safetensors", {k: v * 1.001 for k, v in weights.items()}, {"format": "mlx"})
    lines = (tmp_path / "1/sft.jsonl").read_text().splitlines()
    (tmp_path / "1/rows.jsonl").write_text("\n".join([*lines[:-1], json.dumps({"prompt": "he", "completion": "is"})]))
    (tmp_path / "0/rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "1/vowels.py").write_text((tmp_path / "1/vowels.py").read_text() + "# another\n")
    sft, grpo = CASES["sft"], CASES["grpo"]
    cases = {
        "optim.lr": [sft, {**sft, "optim.lr": 0.5}],
        "version": [sft, sft],
        "data": [{**sft, "data.train": "rows.jsonl"}] * 2,
        "vowels.py": [grpo, grpo],
    }
    recipes = {name: [_recipe(Path(), Path("same"), name, **one) for one in both] for name, both in cases.items()}
    recipes["base"] = [_recipe(Path(), Path("other"), "base", **sft)] * 2
    unlike = "the micro-batches"  # what an objective makes is only known when it is made
    recipes[unlike] = [_recipe(Path(), Path("same"), unlike, **_OWN, objective="drawn.py:Unlike")] * 2
    (tmp_path / "recipes.json").write_text(json.dumps(recipes))
    for code, out, errors in run_ranks(_DIFFERS, 2):
        assert code == 0, errors[-3000:]
        found = json.loads(out.splitlines()[-1])
        assert found.keys() == recipes.keys()
        for name, error in found.items():
            assert "rank 1 (" in error
            assert name in error
    assert {run.name for run in tmp_path.glob("*/runs/*")} <= {unlike}, "nothing else is written"


_DISTURBED = """
import io, json, os, sys
import mlx.core as mx
import mlxft.trainer.optim as optim
from mlx.utils import tree_map
from mlxft.errors import TrainingError
from mlxft.run import train
from mlxft.text import make_console
step, factor = optim.Optimizer.step, 1.0
def disturbed(self, model, *rest):
    norms = step(self, model, *rest)
    if os.environ["MLX_RANK"] == "1":
        model.update(tree_map(lambda v: v * factor, model.trainable_parameters()))
    return norms
optim.Optimizer.step = disturbed
recipe, errors = json.loads(open(sys.argv[1]).read()), []
for name, factor in (("little", 1 + 1e-7), ("much", 1.01)):
    recipe["run"]["name"] = name
    try:
        train(recipe, console=make_console(file=io.StringIO()))
    except TrainingError as error:
        errors.append(str(error))
print(json.dumps(errors))
"""


def test_ranks_that_round_differently_keep_the_same_weights(folder: Path, tiny_model_dir: Path):
    """A rank whose weights leave rank 0's by rounding gets rank 0's at each checkpoint; by more is an error."""
    recipe = folder / "disturbed.json"
    settings = {**CASES["sft"], "run.steps": 6, "run.save_every": 2}
    recipe.write_text(json.dumps(_recipe(folder / "disturbed", tiny_model_dir, "", **settings)))
    (folder / "disturbed.py").write_text(_DISTURBED)
    for code, out, errors in run_ranks([str(folder / "disturbed.py"), str(recipe)], 2):
        assert code == 0, errors[-3000:]
        (error,) = json.loads(out.splitlines()[-1])
        assert "rank 1 (" in error
        assert "differ by" in error
    assert len(_events(folder / "disturbed/runs/little", "aligned")) == 1
    assert len(_events(folder / "disturbed/runs/little", "end")) == 1


def _launch(folder: Path, recipe: Path, *more: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "mlxft", "launch", "-n", "2", "--starting-port", str(free_ports(1)[0])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*argv, str(recipe), *more], cwd=folder, env=env, **pipes)


def _rank_process(run: str, rank: int) -> int | None:
    """The process that trains a run as this rank."""
    every = subprocess.run(["ps", "axeww", "-o", "pid=,args="], capture_output=True, text=True)
    for line in every.stdout.splitlines():
        if f"run.name={run}" in line and f"MLX_RANK={rank}" in line and "-m mlxft train" in line:
            return int(line.split()[0])
    return None


_FINISH = """
import io, json, sys
from mlxft.run import train
from mlxft.text import make_console
for recipe in json.loads(sys.argv[1]):
    train(recipe, resume=True, console=make_console(file=io.StringIO()))
"""


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_a_resumed_one_is_the_same(folder: Path, tiny_model_dir: Path):
    """Each rank is killed in a run without an end, which then gets one beyond where it has come."""
    settings = {**CASES["sft"], "run.save_every": 10, "run.eval_every": 25, "optim.schedule": "constant"}
    recipe, runs = _recipe(folder / "kill", tiny_model_dir, "whole", **settings), folder / "kill" / "runs"
    (folder / "kill.yaml").write_text(yaml.safe_dump(recipe))
    for rank in (0, 1):
        name = f"killed-{rank}"
        process = _launch(folder, folder / "kill.yaml", f"run.name={name}", "run.steps=1000000")
        metrics = runs / name / "metrics.jsonl"
        with process:
            try:
                while not metrics.exists() or metrics.read_text().count("\n") < 25:
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.02)
                victim = _rank_process(name, rank)
                assert victim is not None
                os.kill(victim, signal.SIGKILL)
                out = process.communicate(timeout=300)[0]
            except BaseException:
                process.terminate()
                raise
        assert process.returncode == 1, out[-3000:]
        assert f"rank {rank} (" in out
    steps = 10 + max(_events(runs / f"killed-{rank}", "train")[-1]["step"] for rank in (0, 1))
    recipe["run"]["steps"] = steps
    shutil.copytree(runs / "killed-1", runs / "alone")
    recipes = [{**recipe, "run": {**recipe["run"], "name": name}} for name in ("whole", "killed-0", "killed-1")]
    for code, _, errors in run_ranks(["-c", _FINISH, json.dumps(recipes)], 2):
        assert code == 0, errors[-3000:]
    whole = _weights(runs / "whole")
    for name in ("killed-0", "killed-1"):
        found = _weights(runs / name)
        assert all(mx.array_equal(whole[k], found[k]).item() for k in whole)
    # On one process: the same rows and denominators.
    said = io.StringIO()
    train({**recipe, "run": {**recipe["run"], "name": "alone"}}, resume=True, console=make_console(file=said))
    assert "began on 2 ranks and continues on 1" in said.getvalue()
    assert _apart(whole, _weights(runs / "alone")) < 1e-5


# --- who computes what ------------------------------------------------------------------------------------------------


def _ranks(size: int, weights: list[float] | None = None) -> Ranks:
    found = Ranks()
    found.size, found.weights = size, weights or [1 / size] * size
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_unit_has_one_rank_and_ranks_have_like_costs(size: int):
    rng = np.random.default_rng(size)
    groups = [[f"{g}.{i}" for i in range(rng.integers(1, 40))] for g in range(5)]
    costs = rng.uniform(1, 50, len(groups)).tolist()
    found = _ranks(size).share(groups, costs)
    assert sorted(u for units, _ in found for u in units) == sorted(u for group in groups for u in group)
    cost = {u: c for group, c in zip(groups, costs) for u in group}
    loads = [sum(cost[u] for units, rank in found if rank == r for u in units) for r in range(size)]
    assert max(loads) - min(loads) <= 2 * max(costs)
    assert len(found) <= len(groups) + size - 1, "few groups are cut"


def test_a_slower_rank_gets_less():
    found = _ranks(2, [0.75, 0.25]).share([list(range(100))], [1.0])
    assert [len(units) for units, _ in found] == [75, 25]
    assert [(p.start, p.stop) for p in (_ranks(2, [0.75, 0.25]).portion(8, r) for r in (0, 1))] == [(0, 6), (6, 8)]
    assert assign([1.0] * 8, [0.75, 0.25]).count(0) == 6


def test_things_that_cannot_be_cut_give_ranks_like_loads():
    costs = [7, 1, 1, 5, 3, 3, 2, 2]
    found = assign(costs, [1 / 3] * 3)
    assert [sum(c for c, owner in zip(costs, found) if owner == rank) for rank in range(3)] == [8, 8, 8]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 16])
def test_portions_cover_everything_once(count: int):
    parts = [_ranks(4).portion(count, rank) for rank in range(4)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))


def test_what_is_called_in_training_is_of_one_process(monkeypatch: pytest.MonkeyPatch):
    """A sink that evaluates, on rank 0 only, must not wait for ranks that train."""
    ranks = _ranks(2)
    monkeypatch.setattr(distributed, "_current", ranks)
    with distributed.joined() as same:
        assert same is ranks
    ranks.training = True
    with distributed.joined() as alone:
        assert alone.size == distributed.current().size == 1
    assert distributed.current() is ranks
