"""mlxft sweep: the real command, killed and gone on with; and in this process what it refuses and records."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mlxft.config import SweepSettings, load_config, parse_config, seconds
from mlxft.errors import CheckpointError, ConfigError, DataError, TrainingError
from mlxft.files import claim, hold
from mlxft.run import train
from mlxft.runs import open_run
from mlxft.study.sweep import Outcome, Store, SweepResult, sweep

SPACE = {"optim.lr": {"log": [1e-5, 1e-1]}, "tune.rank": {"choice": [2, 4, 8]}}
Write = Callable[..., Path]


@pytest.fixture
def write(recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write({"space": ...}, **changes)`: a recipe with a sweep, of 8 steps and 3 validation rows of 12."""
    monkeypatch.chdir(tmp_path)

    def make(section: dict[str, Any] | None = None, **changes: Any) -> Path:
        settings = {"run.steps": 8, "run.name": "s", "run.report_every": 4, "data.valid": 0.25}
        settings["tune.rank"] = None
        file = tmp_path / "recipe.yaml"
        sections = recipe(12, **{**settings, **changes}) | ({} if section is None else {"sweep": section})
        file.write_text(yaml.safe_dump(sections), "utf-8")
        return file

    return make


def quiet(path: Path, *overrides: str, **options: Any) -> SweepResult:
    return sweep(path, overrides, console=Console(file=io.StringIO()), **options)


def stored(folder: Path) -> list[Any]:
    """What a sweep has written down of its trials."""
    import optuna

    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'sweep.db'}")
    found = study.get_trials(deepcopy=False)
    return [(t.number, t.state, t.params, t.intermediate_values, sorted(t.system_attrs.items())) for t in found]


def attempts(folder: Path) -> list[int]:
    """The trial that was begun last, and how often."""
    with sqlite3.connect(folder / "sweep.db") as db:
        query = "select value_json from study_user_attributes where key = 'attempts'"
        found: list[int] = json.loads(db.execute(query).fetchone()[0])
        return found


def test_a_sweep_that_is_killed_goes_on(write: Write, tmp_path: Path) -> None:
    """Killed in its sixth trial and called again: 12 trials, the sixth as it was; a third of the steps saved; the best
    recipe trains to the very figure."""
    command = [sys.executable, "-m", "mlxft", "sweep", str(write({"space": SPACE})), "--trials", "12", "--json"]
    begun = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sixth = tmp_path / "runs/s/trials/5/metrics.jsonl"
    while not (sixth.exists() and '"eval"' in sixth.read_text()):
        assert begun.poll() is None, "it ended by itself"
        time.sleep(0.01)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    before = stored(tmp_path / "runs/s")
    assert 5 <= len(before) < 12
    begun_config = yaml.safe_load((tmp_path / f"runs/s/trials/{len(before)}/config.yaml").read_text())
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert f"runs/s: {len(before)} trials are finished" in done.stderr
    now = stored(tmp_path / "runs/s")
    assert len(now) == 12
    assert now[: len(before)] == before
    again = now[len(before)][2]
    assert (again["optim.lr"], again["tune.rank"]) == (begun_config["optim"]["lr"], begun_config["tune"]["rank"]), (
        "a trial that was not finished is done again as it was"
    )
    assert [t["number"] for t in found["trials"]] == list(range(12))
    assert {t["state"] for t in found["trials"]} == {"complete", "pruned"}
    assert all((t["state"] == "complete") == (t["steps"] == t["total"] == 8) for t in found["trials"])
    saved = 1 - sum(t["steps"] for t in found["trials"]) / (12 * 8)
    assert found["steps"]["saved"] == pytest.approx(saved)
    assert saved >= 1 / 3
    assert set(found["importance"]) == set(SPACE)
    best = min((t for t in found["trials"] if t["state"] == "complete"), key=lambda t: t["value"])
    assert found["best"] == {
        **{k: best[k] for k in ("number", "value", "params")},
        "recipe": str(tmp_path / "runs/s/best.yaml"),
    }
    run = train(tmp_path / "runs/s/best.yaml", console=Console(quiet=True))
    assert min(e["loss"] for e in run.metrics("eval")) == best["value"]
    assert run.dir == tmp_path / "runs/s-best"
    assert not list((tmp_path / "runs/s/trials").glob("*/checkpoints"))
    kept = {p.parent.name for p in (tmp_path / "runs/s/trials").glob("*/adapter")}
    assert kept == {str(t["number"]) for t in found["trials"] if t["state"] == "complete"}
    assert {(tmp_path / "runs/s" / name).exists() for name in ("history.png", "importance.png")} == {True}


def test_an_interrupted_sweep_says_so_and_goes_on(write: Write, tmp_path: Path) -> None:
    """Ctrl-C within a trial: exit code 130, and the trial is done again without counting as an attempt."""
    path = write({"space": SPACE}, **{"run.steps": 4000, "run.eval_every": 4})
    command = [sys.executable, "-m", "mlxft", "sweep", str(path)]
    begun = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "runs/s/trials/0/metrics.jsonl"
    while not (first.exists() and '"eval"' in first.read_text()):
        assert begun.poll() is None, "it ended by itself"
        time.sleep(0.01)
    begun.send_signal(signal.SIGINT)
    out, err = begun.communicate(timeout=300)
    assert (begun.returncode, err.strip()) == (130, "interrupted")
    assert "interrupted after 0 trials; the same command resumes" in out
    assert not first.exists()
    assert stored(tmp_path / "runs/s") == []
    assert attempts(tmp_path / "runs/s") == [0, 0]


def test_failed_trials_are_recorded_and_weights_of_whole_models_are_the_bests(write: Write, tmp_path: Path) -> None:
    """A grid of 2 rates, one of which runs away at once, and 2 kinds of training: 4 trials, of which 2 fail."""
    space = {"optim.lr": {"choice": [0.01, 1e30]}, "tune.method": {"choice": ["full", "lora"]}}
    path = write({"space": space, "sampler": "grid", "pruner": "none"}, **{"run.steps": 4, "run.eval_every": 2})
    found = quiet(path, trials=9)
    assert (
        sorted((o.state, o.params["optim.lr"]) for o in found.trials)
        == [("complete", 0.01)] * 2 + [("failed", 1e30)] * 2
    )
    assert all(("Try a lower optim.lr" in o.error) if o.error else o.state == "complete" for o in found.trials)
    assert found.best is not None
    models = [p.parent.name for p in (tmp_path / "runs/s/trials").glob("*/model")]
    assert models == ([str(found.best.number)] if found.best.params["tune.method"] == "full" else [])
    assert yaml.safe_load(found.recipe.read_text())["run"]["eval_every"] == 2
    table = Console(width=80, record=True, file=io.StringIO())
    found.print(table)
    assert "best" in table.export_text()


def test_lists_are_varied_and_more_is_better_where_it_is_said(write: Write) -> None:
    """Of two lists; the best is the one with the highest loss if that is what is asked for. Both orders of one grid
    have the same figures; data that are varied are read again."""
    space = {
        "tune.targets": {"choice": [["q_proj"], ["q_proj", "v_proj"]]},
        "data.train_on": {"choice": ["all", "last"]},
    }
    path = write({"space": space, "sampler": "grid", "pruner": "none", "direction": "maximize"}, **{"run.steps": 2})
    found = quiet(path)
    assert len(found.trials) == 4
    assert found.best is not None
    assert found.best.value == max(o.value or 0 for o in found.trials)
    assert yaml.safe_load(found.recipe.read_text())["tune"]["targets"] == found.best.params["tune.targets"]
    counts = {
        open_run(found.dir / f"trials/{o.number}").metrics("start")[0]["data"]["trained tokens"] for o in found.trials
    }
    assert len(counts) == 2


def test_the_time_is_up_and_the_sweep_goes_on(write: Write, tmp_path: Path) -> None:
    path = write({"space": SPACE, "pruner": "median"}, **{"run.steps": 4})
    with pytest.raises(TrainingError, match="the time was up before one was finished"):
        quiet(path, limit="0.01s")
    found = quiet(path, trials=1)
    assert [(o.number, o.state) for o in found.trials] == [(0, "complete")]
    with pytest.raises(ConfigError, match=r"(?s)another recipe.*--name.*run.seed: the sweep has 0, the recipe has 3"):
        quiet(path, "run.seed=3", trials=2)
    assert len(quiet(path, "run.report_every=2", trials=2).trials) == 2
    again = quiet(path, "run.seed=3", trials=1, overwrite=True)
    assert [o.number for o in again.trials] == [0]
    assert not (tmp_path / "runs/s/trials/1").exists()


def test_a_sweep_in_use_and_other_folders_are_refused(write: Write, tmp_path: Path) -> None:
    path = write({"space": SPACE})
    folder = tmp_path / "runs/s"
    with hold(folder):
        with pytest.raises(CheckpointError, match=rf"s is in use now, by process {os.getpid()}"):
            quiet(path)
        claim(folder, "sweep")
    (folder / "sweep.db").write_bytes(b"no database" * 1000)
    with pytest.raises(CheckpointError, match=r"sweep.db: file is not a database; start over with --overwrite"):
        quiet(path)
    (folder / "sweep.db").rename(folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"exists and is not a sweep"):
        quiet(path)
    with pytest.raises(ConfigError, match=r"that mlxft did not make \(config.yaml\)"):
        quiet(path, overwrite=True)


def test_a_best_recipe_that_was_changed_by_hand_stays(write: Write, tmp_path: Path) -> None:
    path = write({"space": SPACE})
    quiet(path, trials=1)
    best = tmp_path / "runs/s/best.yaml"
    best.write_text("mine", "utf-8")
    quiet(path, trials=3)
    assert best.read_text("utf-8") == "mine"
    best.unlink()
    quiet(path, trials=3)
    assert "run:" in best.read_text("utf-8")


def test_the_best_recipe_of_a_folder_of_any_name(write: Write, tmp_path: Path) -> None:
    """A line break in it ends no comment, and what YAML has a meaning for is a name."""
    place = tmp_path / "a\nmodel: \u2028{x"
    found = quiet(write({"space": SPACE}, **{"run.dir": str(place), "run.steps": 2}), trials=1, name="\U0001f600 [x]")
    best = load_config(found.recipe)
    assert best.run_dir == place / "\U0001f600 [x]-best"
    assert len([line for line in found.recipe.read_text().splitlines() if line.startswith("#")]) == 1


BAD: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    "no section": (None, {}, r"sweep.space is needed"),
    "no space": ({"trials": 3}, {}, r"sweep: space is needed"),
    "unknown": ({"space": {"optim.rate": {"log": [1, 2]}}}, {}, r"sweep.space.optim.rate: no such setting"),
    "elsewhere": ({"space": {"tune.lr": {"log": [1, 2]}}}, {}, r"tune.lr: no such setting \(did you mean optim.lr\?\)"),
    "fixed": ({"space": {"run.name": {"choice": ["a", "b"]}}}, {}, r"run.name: cannot be varied"),
    "teacher": (
        {"space": {"distill.teacher": {"choice": ["a", "b"]}}},
        {"objective": "distill"},
        r"distill.teacher: cannot be varied",
    ),
    "loss": (
        {"space": {"distill.divergence": {"choice": ["jsd", "reverse_kl"]}}},
        {"objective": "distill"},
        r"distill.divergence: changes what the loss is",
    ),
    "empty": ({"space": {"optim.lr": {"float": [1, 1]}}}, {}, r"optim.lr: the range float: \[1, 1\] is empty"),
    "reversed": ({"space": {"tune.rank": {"int": [8, 2]}}}, {}, r"tune.rank: the range int: \[8, 2\] is empty"),
    "log of 0": ({"space": {"optim.lr": {"log": [0, 1]}}}, {}, r"log: \[0, 1\] starts at 0"),
    "one choice": ({"space": {"tune.rank": {"choice": [4]}}}, {}, r"tune.rank: choice needs at least 2 values, seen 1"),
    "twice": ({"space": {"tune.rank": {"choice": [4, 4]}}}, {}, r"tune.rank: choice lists a value twice"),
    "two kinds": ({"space": {"tune.rank": {"int": [1, 2], "choice": [1, 2]}}}, {}, r"exactly one of.*seen int, choice"),
    "kind": (
        {"space": {"tune.rank": {"chioce": [1, 2]}}},
        {},
        r"rank.chioce: no such setting \(did you mean choice\?\)",
    ),
    "bounds": ({"space": {"tune.rank": {"int": [0, 8]}}}, {}, r"tune.rank: with 0: tune.rank: input should be greater"),
    "value": ({"space": {"optim.name": {"choice": ["adamw", "sdg"]}}}, {}, r"with 'sdg'.*did you mean sgd"),
    "pair": ({"space": {"tune.scale": {"log": [1, 2]}, "tune.alpha": {"log": [1, 2]}}}, {}, "exclude each other"),
    "grid": ({"space": SPACE, "sampler": "grid"}, {}, r"sweep: sampler: grid .*optim.lr"),
    "endless": (
        {"space": {"run.seed": {"int": [1, 99999]}}, "sampler": "grid"},
        {},
        "the grid has 99,999 combinations",
    ),
    "direction": ({"space": SPACE, "metric": "accuracy"}, {}, "sweep: direction is needed for metric accuracy"),
    "time": ({"space": SPACE, "time": "soon"}, {}, "sweep.time: 'soon'"),
    "grace": ({"space": SPACE, "pruner": "none", "grace": 2}, {}, "grace .2. needs a pruner"),
    "no validation": ({"space": SPACE}, {"data.valid": None}, "there is no validation data; give data.valid"),
    "recipe": ({"space": SPACE}, {"tune": {"targets": "q_porj"}}, "tune.targets: 'q_porj' matches no module"),
    "groups": ({"space": SPACE}, {"optim.groups": [{"match": "lora_c", "scale": 2.0}]}, r"did you mean lora_a|lora_b"),
    "memory": ({"space": {"tune.rank": {"int": [2, 8]}}}, {"memory.limit": 1e-4}, "with tune.rank=2: training needs"),
    "no target": (
        {"space": {"tune.targets": {"choice": ["q_porj", "k_porj"]}}},
        {},
        "no trial could be trained; with tune.targets=q_porj: .*matches no module",
    ),
    "metric": (
        {"space": SPACE, "metric": "accurracy", "direction": "maximize"},
        {"run.steps": 2},
        "sweep.metric: accurracy is not what validation reports; it reports loss",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_swept_is_refused_and_leaves_nothing(case: str, write: Write, tmp_path: Path) -> None:
    section, changes, said = BAD[case]
    with pytest.raises(ConfigError, match=said) as caught:
        quiet(write(section, **changes))
    assert caught.type is ConfigError, "its name is what a user reads"
    assert not (tmp_path / "runs/s").exists()


def test_a_key_that_is_given_twice_is_refused(write: Write) -> None:
    path = write({"space": SPACE})
    path.write_text(path.read_text().replace("    tune.rank:", "    optim.lr: {log: [1, 2]}\n    tune.rank:"))
    with pytest.raises(ConfigError, match=r"recipe.yaml:\d+: .*key 'optim.lr' is given twice"):
        quiet(path)


def test_without_rows_it_is_a_data_error_and_train_takes_no_sweep(write: Write, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    with pytest.raises(DataError):
        quiet(write({"space": SPACE}, **{"data.train": "bad.jsonl"}))
    with pytest.raises(ConfigError, match="sweep: this recipe is for mlxft sweep"):
        train(write({"space": SPACE}))


def test_without_optuna_it_says_what_to_install(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optuna: pip install 'mlxft\[sweep\]'"):
        quiet(write({"space": SPACE}))


@pytest.mark.parametrize(("text", "wanted"), [("2h", 7200), ("1h30m", 5400), ("45s", 45), ("0.5m", 30)])
def test_lengths_of_time(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


def test_steps_saved_are_of_pruned_trials_only() -> None:
    """Of 100, 100 and 100 steps: complete after 100, complete by patience after 60, pruned after 20; one failed."""
    made = [("complete", 1.0, 100), ("complete", 0.5, 60), ("pruned", 3.0, 20), ("failed", None, 7)]
    trials = [Outcome(i, state, value, {}, steps, 100, 1.0, None) for i, (state, value, steps) in enumerate(made)]
    found = SweepResult(Path("x"), "loss", True, trials, {})
    assert found.steps() == {"taken": 180, "all": 300, "saved": pytest.approx(80 / 300)}
    assert found.best == trials[1]
    assert SweepResult(Path("x"), "loss", False, trials, {}).best == trials[0]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_trials_depend_on_their_number_and_those_before_alone(sampler: str, tmp_path: Path) -> None:
    """8 trials at once, and one with each opening of the file, are the same; a rate's optimum is what matters."""
    space = {
        "optim.lr": {"choice": [1, 2, 3, 4]} if sampler == "grid" else {"log": [1e-4, 1.0]},
        "run.seed": {"int": [0, 3]},
    }
    from optuna.trial import TrialState

    settings = SweepSettings.model_validate({"space": space, "sampler": sampler})
    rows = []
    for name, every in (("once", 8), ("again", 1)):
        (tmp_path / name).mkdir()
        seen = []
        for _ in range(8 // every):
            store = Store(tmp_path / name, settings, 1, {"a": 1})
            for _ in range(every):
                trial, params = store.ask()
                seen.append(params)
                store.finish(trial, TrialState.COMPLETE, abs(params["optim.lr"] - 0.1), {})
        rows.append(seen)
    assert rows[0] == rows[1]
    assert len({str(r) for r in rows[0]}) == 8
    assert next(iter(store.importance())) == "optim.lr"


def test_a_trial_that_keeps_ending_its_process_is_given_up(write: Write, tmp_path: Path) -> None:
    """Three beginnings without an end count as a failure: a model too large would end each call."""
    path = write({"space": SPACE}, **{"run.steps": 2})
    quiet(path, trials=1)
    with sqlite3.connect(tmp_path / "runs/s/sweep.db") as db:
        db.execute("update study_user_attributes set value_json = '[1, 3]' where key = 'attempts'")
    found = quiet(path, trials=2)
    assert [o.state for o in found.trials] == ["complete", "failed"]
    assert "ended 3 times" in (found.trials[1].error or "")


def test_a_full_disk_fails_no_trial(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep ends there, and goes on with that trial once there is room."""
    path, full = write({"space": SPACE, "trials": 3}, **{"run.steps": 2}), [False, True, False, False]

    def check_room(folder: Path, need: int) -> None:
        if full.pop(0):
            raise OSError(28, f"No space left on device ({need} bytes are needed)")

    monkeypatch.setattr("mlxft.trainer.checkpoint.check_room", check_room)
    with pytest.raises(CheckpointError, match=r"trials/1/checkpoints/step-2: No space left on device \(\d+ bytes"):
        quiet(path)
    assert not (tmp_path / "runs/s/trials/1").exists()
    assert attempts(tmp_path / "runs/s") == [1, 0]
    found = quiet(path)
    assert [(o.number, o.error) for o in found.trials] == [(0, None), (1, None), (2, None)]
    assert attempts(tmp_path / "runs/s") == [2, 1]


def test_a_recipe_with_a_sweep_is_a_recipe() -> None:
    raw = {"model": {"path": "m"}, "data": {"train": "t", "format": "text"}, "sweep": {"space": SPACE, "time": "2h"}}
    found = parse_config(raw).sweep
    assert (found.space["optim.lr"].kind, found.space["tune.rank"].value) == ("log", [2, 4, 8])
    assert found.minimize


def test_the_recipe_of_a_sweep(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """configs/sweep.yaml, with trials of 4 steps: it validates four times, and its best trains from anywhere."""
    monkeypatch.chdir(Path(__file__).parents[2])
    overrides = [f"model.path={tiny_model_dir}", f"run.dir={tmp_path}", "run.steps=4", "batch.rows=2"]
    found = quiet(Path("configs/sweep.yaml"), *overrides, trials=2)
    assert [o.number for o in found.trials] == [0, 1]
    assert found.trials[0].total == 4
    assert [e["step"] for e in open_run(found.dir / "trials/0").metrics("eval")] == [1, 2, 3, 4]
    monkeypatch.chdir(tmp_path)
    run = train(found.recipe, console=Console(quiet=True))
    assert found.best is not None
    assert run.metrics("end")[0]["best_loss"] == found.best.value


def test_a_kill_at_any_moment_of_a_trial_changes_none(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two suggestions; after the pruner's note of a rung that was passed; within and after the transaction."""
    from optuna.pruners import SuccessiveHalvingPruner
    from optuna.samplers import TPESampler
    from optuna.storages import RDBStorage

    class Killed(BaseException):
        """Stands for a kill."""

    settings = write({"space": SPACE, "pruner": "halving", "trials": 5, "grace": 1})
    quiet(settings, name="a")
    whole = stored(tmp_path / "runs/a")
    assert any(state.name == "PRUNED" for _, state, *_ in whole)
    for place, name in (
        (TPESampler, "sample_independent"),
        (SuccessiveHalvingPruner, "prune"),
        (RDBStorage, "_set_trial_intermediate_value_without_commit"),
        (RDBStorage, "_create_new_trial"),
    ):
        real, calls, kills = getattr(place, name), 0, 0

        def call(self: Any, *args: Any, real: Any = real, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            found = real(self, *args, **options)
            if calls in (3, 8):
                raise Killed
            return found

        with monkeypatch.context() as patch:
            patch.setattr(place, name, call)
            while True:
                try:
                    quiet(settings, name=name)
                    break
                except Killed:
                    kills += 1
                    left = stored(tmp_path / "runs" / name)
                    assert left == whole[: len(left)], "what is written is whole"
        assert kills >= 1
        assert stored(tmp_path / "runs" / name) == whole


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_sweep_of_an_earlier_version_goes_on(sampler: str, tmp_path: Path) -> None:
    """It wrote down a trial as it began: one that was left so is begun again, under its number."""
    import optuna
    from optuna.trial import TrialState

    space = {"a": {"int": [0, 2]}, "b": {"choice": [1, 2]}}
    settings = SweepSettings.model_validate({"space": space, "sampler": sampler})
    store = Store(tmp_path, settings, 0, {})
    for i in range(3):
        trial, _ = store.ask()
        store.finish(trial, TrialState.COMPLETE, float(i), {})
    begun = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'sweep.db'}").ask()
    begun.suggest_int("a", 0, 2)
    seen = [t.params for t in store.trials()]
    for number in range(3, 6):
        trial, params = Store(tmp_path, settings, 0, {}).ask()
        assert trial.number == number
        seen.append(params)
        store.finish(trial, TrialState.PRUNED, 0.5, {"steps": 1})
    assert [(t.number, t.value) for t in store.trials()] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        *((n, 0.5) for n in (3, 4, 5)),
    ]
    if sampler == "grid":
        assert len({str(sorted(p.items())) for p in seen}) == 6


def test_a_sweep_leaves_the_budget_to_each_trial(write: Write, tmp_path: Path) -> None:
    space = {"optim.lr": {"choice": [1e-4, 1e-3]}}
    found = quiet(write({"space": space}, batch={"tokens": "auto"}), trials=1)
    assert [outcome.state for outcome in found.trials] == ["complete"]
