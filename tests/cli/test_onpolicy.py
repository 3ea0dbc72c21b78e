"""On-policy training through the command: what check shows of it, and every way in which its input can be wrong."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.runs import open_run

Command = Callable[..., Any]
Refused = Callable[..., str]
Recipe = Callable[..., str]
REWARDS = """
def good(prompts, completions, rows):
    return [float(len(text)) for text in completions]

def nan(prompts, completions, rows):
    return [float("nan")] * len(completions)

def short(prompts, completions, rows):
    return [0.0]

def none(prompts, completions, rows):
    return None

def raises(prompts, completions, rows):
    raise KeyError("rows have no such field")
"""


@pytest.fixture
def ppo(write: Recipe, tmp_path: Path) -> Recipe:
    """`ppo(**changes)` writes a recipe of two rollouts of four short completions."""
    (tmp_path / "rewards.py").write_text(REWARDS, "utf-8")
    rows = [{"prompt": "the in on " * (i % 2 + 1)} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")

    def make(name: str = "ppo.yaml", **changes: Any) -> str:
        settings = {
            "objective": "ppo",
            "data": {"train": "prompts.jsonl", "format": "prompts", "max_length": 64},
            "rollout": {"prompts": 4, "max_tokens": 6},
            "rewards": {"function": "rewards.py:good"},
            "ppo": {"epochs": 1, "minibatches": 1},
            "run.steps": 2,
        }
        return write(name, **{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def wide(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("wide") / "wide", hidden_size=64, head_dim=16)


@pytest.fixture
def reward_run(write: Recipe, mlxft: Command, tmp_path: Path) -> Callable[..., str]:
    """`reward_run(path)` trains a reward run of a step and returns its folder."""

    def make(name: str = "reward", **changes: Any) -> str:
        row = {"prompt": "the in", "chosen": "on it", "rejected": "at a"}
        (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 4, "utf-8")
        data = {"train": "pairs.jsonl", "format": "preference"}
        settings = {"objective": "reward", "data": data, "run.steps": 1, "run.name": name, **changes}
        done = mlxft("train", write("reward.yaml", **settings))
        assert done.code == 0, done.err
        return f"runs/{name}"

    return make


@pytest.fixture
def failed(mlxft: Command, tmp_path: Path) -> Callable[..., str]:
    """`failed("train", recipe, ...)`: exit code 1 after it began. The run says why, and holds no result that is not
    one: neither weights nor checkpoints, nor parts of files."""

    def run(*args: str) -> str:
        done = mlxft(*args)
        assert done.code == 1, done
        assert "Traceback" not in done.err
        folder = tmp_path / "runs" / "a"
        kept = {".mlxft.json", "config.yaml", "chat_template.jinja", "metrics.jsonl", "samples.jsonl", "status.json"}
        assert {p.name for p in folder.iterdir()} <= kept
        (event,) = open_run(folder).metrics("failed")
        assert event["text"] in done.err
        return str(done.err)

    return run


# What check shows


def test_check_shows_prompts_and_the_plan_by_phase(ppo: Recipe, mlxft: Command, tmp_path: Path) -> None:
    seen = mlxft("check", ppo())
    assert (seen.code, seen.err) == (0, "")
    assert "prompts: 8" in seen.out
    assert "completions a rollout: 4" in seen.out
    assert "prompts.jsonl:1: " in seen.out
    for phase in ("sampling", "scoring", "training"):
        assert f"  peak of {phase}: " in seen.out
    assert "  critic (a role): " in seen.out
    memory = json.loads(mlxft("check", ppo(), "--json").out)["memory"]
    assert list(memory["phases"]) == ["sampling", "scoring", "training"]
    assert memory["total"] == max(memory["phases"].values())
    assert memory["roles"]["critic"] == memory["adapters"]
    shared = json.loads(mlxft("check", ppo(**{"ppo.critic": "shared"}), "--json").out)["memory"]
    assert shared["roles"] == {"reference": 0, "reward": 0, "critic": 0}
    assert not (tmp_path / "runs").exists()


def test_online_dpo_by_a_reward_model(
    ppo: Recipe, mlxft: Command, refused: Refused, reward_run: Callable[..., str], tmp_path: Path
) -> None:
    """The plan counts the reward model, whose score is the reward; what is reported of pairs."""
    own = {"objective": "online_dpo", "ppo": None, "online_dpo": {"minibatches": 2}, "rollout.samples": 4}
    recipe = ppo(**own, rewards={"adapter": reward_run()})
    seen = json.loads(mlxft("check", recipe, "--json").out)
    assert seen["memory"]["roles"]["reward"] > 0
    assert list(seen["memory"]["phases"]) == ["sampling", "scoring", "training"]
    assert mlxft("train", recipe, "run.steps=4", "run.report_every=1").code == 0
    events = open_run(tmp_path / "runs" / "a").metrics()
    rollouts, steps = ([e for e in events if e["event"] == kind] for kind in ("rollout", "train"))
    assert [e["rollout"] for e in rollouts] == [0, 1]
    assert all(e["pairs"] + e["ties"] == 8 and e["reward"] == e["reward/reward_model"] for e in rollouts)
    assert {"loss", "margin", "accuracy", "rewards_chosen", "kl", "ties"} <= steps[-1].keys()
    assert "rollout.samples: 3 completions of a prompt cannot be split" in refused(
        2, "train", recipe, "rollout.samples=3", "run.name=b"
    )


def test_a_variant_is_said_and_kept(ppo: Recipe, mlxft: Command, tmp_path: Path) -> None:
    """By check, when the run begins, and in config.yaml, from which a run goes on as it was."""
    changes = {"objective": "grpo", "ppo": None, "grpo": {"variant": "gspo", "clip": 0.01}, "rollout.samples": 2}
    recipe = ppo(**changes)
    note = "grpo.variant: gspo is ratio: sequence, loss: sequence, clip: 0.01, clip_high: 0.0004, kl_coef: 0.0 (by the"
    assert note in " ".join(mlxft("check", recipe).out.split())
    done = mlxft("train", recipe)
    assert (done.code, note in " ".join(done.err.split()) or note in " ".join(done.out.split())) == (0, True)
    settings = open_run(tmp_path / "runs" / "a").config.grpo
    assert (settings.variant, settings.ratio, settings.clip, settings.clip_high) == ("gspo", "sequence", 0.01, 4e-4)


def test_the_exact_kl_needs_hidden_states(
    ppo: Recipe, refused: Refused, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_dir(tmp_path / "whole", "gpt_neox")
    changes = {"objective": "grpo", "ppo": None, "grpo": {"kl_estimator": "exact"}, "rollout.samples": 2}
    for command in ("check", "train"):
        said = refused(1, command, ppo(**changes, **{"model.path": str(folder)}))
        assert "model.path: grpo.kl_estimator: exact reads hidden states, and the body of this model (gpt_neox)" in said


def test_check_says_what_is_a_copy(ppo: Recipe, mlxft: Command) -> None:
    found = json.loads(mlxft("check", ppo(tune={"method": "full"}), "--json").out)
    memory = found["memory"]
    assert memory["roles"]["reference"] == memory["roles"]["critic"] == memory["weights"]
    assert any("the reference and the critic are whole copies of what is trained" in note for note in found["notes"])


def test_check_counts_the_reward_model(ppo: Recipe, mlxft: Command, reward_run: Callable[..., str], wide: Path) -> None:
    same = json.loads(mlxft("check", ppo(rewards={"adapter": reward_run()}), "--json").out)
    adapter = Path("runs/reward/adapter")
    assert same["memory"]["roles"]["reward"] == sum(f.stat().st_size for f in adapter.glob("*.safetensors"))
    other = reward_run("other", **{"model.path": str(wide)})
    apart = json.loads(mlxft("check", ppo(rewards={"adapter": other}), "--json").out)
    assert apart["memory"]["roles"]["reward"] > (wide / "model.safetensors").stat().st_size * 0.9
    assert any("the reward model has a base of its own" in note for note in apart["notes"])
    assert mlxft("train", ppo(rewards={"adapter": other}, **{"run.name": "apart"})).code == 0


def test_check_times_a_rollout(ppo: Recipe, mlxft: Command, tmp_path: Path) -> None:
    recipe = ppo(**{"ppo.epochs": 2, "run.steps": 40})
    time = json.loads(mlxft("check", recipe, "--time", "--json").out)["time"]
    assert list(time["rollout"]) == ["sampling", "scoring", "training"]
    assert time["expected_s"] == pytest.approx(20 * sum(time["rollout"].values()))
    assert "one rollout: sampling " in mlxft("check", recipe, "--time").out
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_says_which_phase(ppo: Recipe, refused: Refused) -> None:
    many = {"batch.rows": 1, "rollout.prompts": 64, "rollout.rows": 64}
    small = refused(2, "train", ppo(**many), "memory.limit=0.0001")
    assert "sampling needs" in small
    assert "a smaller rollout.rows (completions decoded at once) or rollout.max_tokens" in small
    large = refused(
        2, "train", ppo(**{"batch.rows": 64, "rollout.prompts": 64, "rollout.rows": 1}, memory={"limit": 0.001})
    )
    assert "training needs" in large


# What is refused before anything is written


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.temperature=0"], "rollout.temperature: must be above 0, seen 0"),
        (["data.format=messages"], "data.format: messages is not for objective ppo; choose prompts"),
        (["tune.dropout=0.1"], "tune.dropout: the policy that samples and the one that is trained would differ"),
        (["batch.pack=true"], "batch.pack: is not for objective ppo"),
        (["data.train_on=all"], "data.train_on: "),
        (["data.max_length=6"], "data.max_length (6) bounds prompt and completion together: raise it above"),
        (["rewards={}"], "rewards: give adapter, function or rules"),
        (["rewards.function=rewards.py:goood"], "rewards.py:goood: no function 'goood' in it (did you mean good?)"),
        (["rewards.function=nope.py:good"], "nope.py"),
        (["rewards={adapter: runs/none}"], "rewards.adapter: there is no run or folder runs/none"),
        (["ppo.kl_horizon=10"], "kl_horizon (10) is for an adaptive kl_coef; give kl_target too"),
        (["ppo.klcoef=1"], "ppo.klcoef: no such setting (did you mean ppo.kl_coef?)"),
    ],
)
def test_settings_that_can_not_be(overrides: list[str], said: str, ppo: Recipe, refused: Refused) -> None:
    for command in ("check", "train"):
        assert said in refused(2, command, ppo(), *overrides)


def test_a_prompt_that_leaves_no_room(ppo: Recipe, refused: Refused, mlxft: Command) -> None:
    err = refused(1, "train", ppo(), "data.max_length=26")
    assert "prompts.jsonl:2: " in err
    assert "tokens; data.max_length (26) minus rollout.max_tokens leaves 20" in err
    assert "prompts.jsonl:1: " not in err
    notes = json.loads(mlxft("check", ppo(), "data.max_length=26", "data.overflow=drop", "--json").out)["notes"]
    assert any("4 prompts leave no room for a completion" in note for note in notes)
    assert "no prompt is left to sample from" in refused(1, "train", ppo(), "data.max_length=7", "data.overflow=drop")
    # The tiny model was made for 512 tokens.
    (Path("prompts.jsonl")).write_text(json.dumps({"prompt": "the " * 600}) + "\n", "utf-8")
    err = refused(1, "check", ppo(), "data.max_length=2000")
    assert "the model's context (512) minus rollout.max_tokens leaves 506. Lower rollout.max_tokens" in err
    err = refused(2, "check", ppo(), "data.max_length=2000", "rollout.max_tokens=512")
    assert "rollout.max_tokens (512) leaves no room for a prompt in the model's 512 tokens" in err


def test_a_vocabulary_without_eos(
    ppo: Recipe, refused: Refused, mlxft: Command, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_dir(tmp_path / "endless")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            known = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({k: v for k, v in known.items() if not k.startswith("eos_token")}))
    # What ends a turn of the chat template would end a completion: asked as text, there is nothing.
    recipe = ppo(**{"model.path": str(folder), "data.template": "none"})
    for command in ("check", "train"):
        err = refused(2, command, recipe)
        assert "rollout.stop_at_eos: the tokenizer has no EOS token" in err
    assert mlxft("train", recipe, "rollout.stop_at_eos=false", "run.steps=1").code == 0


def test_a_reward_run_that_is_none(ppo: Recipe, refused: Refused, mlxft: Command, write: Recipe) -> None:
    assert mlxft("train", write("sft.yaml", **{"run.name": "sft", "run.steps": 1})).code == 0
    for command in ("check", "train"):
        err = refused(2, command, ppo(rewards={"adapter": "runs/sft"}))
        assert "rewards.adapter: runs/sft has no head: not a reward run" in err
        policy = refused(2, command, ppo(**{"ppo.epochs": 1}), "rewards={adapter: runs/sft, normalize: true}")
        assert "has no head" in policy


def test_a_policy_of_another_base_than_the_reward(
    ppo: Recipe, refused: Refused, reward_run: Callable[..., str], write: Recipe, mlxft: Command, wide: Path
) -> None:
    reward = reward_run()
    assert mlxft("train", write("sft.yaml", **{"run.name": "wide", "run.steps": 1, "model.path": str(wide)})).code == 0
    recipe = ppo(rewards={"adapter": reward}, tune=None, **{"model.adapter": "runs/wide"})
    for command in ("check", "train"):
        err = refused(1, command, recipe)
        assert "base" in err


# What can only be known of completions: the run fails, or warns and goes on


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nan", "nan"),
        ("short", "1"),
        ("none", "None"),
        ("raises", "rows have no such field"),
    ],
)
def test_rewards_that_are_no_numbers(function: str, said: str, ppo: Recipe, failed: Callable[..., str]) -> None:
    err = failed("train", ppo(rewards={"function": f"rewards.py:{function}"}))
    assert f"rewards.py:{function}" in err
    assert said in err
    assert err.startswith("RewardError: ")


def test_a_run_folder_does_not_decide_which_python_runs(ppo: Recipe, mlxft: Command, tmp_path: Path) -> None:
    """Resuming it asks for the reward function again, and so does training by its config.yaml; opening it does not."""
    file = tmp_path / "rewards.py"
    assert mlxft("train", ppo(**{"run.steps": 1, "optim.schedule": "constant", "optim.warmup": 0})).code == 0
    named = open_run("runs/a").resume
    assert named == "mlxft train --resume runs/a rewards.function=rewards.py:good"
    file.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('')\n{REWARDS}", "utf-8")
    config = tmp_path / "runs/a/config.yaml"
    for command in (["train", "--resume", "runs/a"], ["check", str(config)], ["train", str(config), "run.name=b"]):
        done = mlxft(*command, "run.steps=2")
        assert (done.code, "add rewards.function=rewards.py:good, or" in done.err) == (2, True), done.err
    config.write_text(config.read_text("utf-8").partition("versions:")[0], "utf-8")  # a stranger may leave that out
    assert mlxft("train", "--resume", "runs/a").code == 2
    assert mlxft("generate", "--model", "runs/a", "--max-tokens", "1", "the").code == 0
    assert not (tmp_path / "ran").exists()
    done = mlxft(*shlex.split(named)[1:], "run.steps=2")
    assert (tmp_path / "ran").exists(), done.err


def test_completions_that_are_all_cut_off(ppo: Recipe, mlxft: Command, tmp_path: Path) -> None:
    """A warning with each such rollout, in the file and on the terminal; the run goes on."""
    done = mlxft("train", ppo(**{"rollout.max_tokens": 1}))
    assert (done.code, done.err) == (0, "")
    rollouts = open_run(tmp_path / "runs" / "a").metrics("rollout")
    assert [e["eos_share"] for e in rollouts] == [0.0, 0.0]
    assert all("every completion was cut off: raise rollout.max_tokens" in e["warning"] for e in rollouts)
    assert done.out.count("warning: every completion was cut off") == 2
    assert open_run(tmp_path / "runs" / "a").metrics("end")[0]["step"] == 2


def test_a_policy_that_runs_away(ppo: Recipe, mlxft: Command, tmp_path: Path) -> None:
    """The run stops with advice, and the best weights by validation stay what they were."""
    changes = {"optim.lr": 3.0, "run.steps": 9, "ppo.max_kl": 0.1, "data.valid": 0.25, "run.eval_every": 1}
    done = mlxft("train", ppo(**changes))
    assert done.code == 1
    assert "TrainingError: the policy has moved too far from the reference: KL is " in done.err
    assert "nats a token, ppo.max_kl is 0.1. Raise ppo.kl_coef, lower optim.lr or ppo.epochs" in done.err
    run = open_run(tmp_path / "runs" / "a")
    assert run.metrics("failed")[0]["step"] < 9
    assert (run.dir / "adapter" / "adapters.safetensors").stat().st_size > 0
    assert mlxft("generate", "--model", str(run.dir), "the in", "--max-tokens", "2").code == 0
    assert "The best weights by validation, and checkpoints, are unchanged" in done.err
    blind = mlxft("train", ppo(**{**changes, "data.valid": None, "run.eval_every": None}), "--overwrite")
    assert blind.code == 1
    assert "Checkpoints (run.save_every) are unchanged; with data.valid the best weights would be" in blind.err


def test_a_group_of_one(ppo: Recipe, refused: Refused, tmp_path: Path) -> None:
    recipe = ppo(objective="grpo", ppo=None, grpo={"epochs": 1})
    for command in ("check", "train"):
        assert "rollout.samples: grpo compares completions of one prompt; give at least 2" in refused(
            2, command, recipe
        )


def test_a_model_without_a_body_of_its_own(
    ppo: Recipe, refused: Refused, mlxft: Command, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """A critic reads hidden states, which this architecture does not give; without one it can be trained."""
    folder = make_model_dir(tmp_path / "whole", "gpt_neox")
    for command in ("check", "train"):
        said = refused(1, command, ppo(**{"model.path": str(folder)}))
        assert "the body of this model (gpt_neox) cannot be separated from its output layer" in said
    changes = {"objective": "rloo", "ppo": None, "rloo": {"epochs": 1}, "rollout.samples": 2}
    recipe = ppo(**changes, **{"model.path": str(folder)})
    assert list(json.loads(mlxft("check", recipe, "--json").out)["memory"]["phases"])
    assert mlxft("train", recipe).code == 0
