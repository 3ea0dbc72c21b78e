"""Every recipe in configs/: it reads, says only what differs from the defaults, and trains what its name says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten

from mlxft.build import make_objective
from mlxft.cli.use import label
from mlxft.config import Config, config_class, load_config
from mlxft.data.sources import Row
from mlxft.errors import ConfigError
from mlxft.model.layers import LowRank
from mlxft.model.load import load as load_model
from mlxft.objectives.rewards import ToScore, load_functions
from mlxft.run import train
from mlxft.runs import load_run
from mlxft.study.label import read_label_recipe
from mlxft.study.tasks import Task, make_cases, read_task

ROOT = Path(__file__).parents[1]
LABEL = ROOT / "configs/label.yaml"
TASKS = sorted((ROOT / "configs").glob("eval-*.yaml"))
RECIPES = sorted(set((ROOT / "configs").glob("*.yaml")) - {LABEL, *TASKS})
NAMES = [r.stem for r in RECIPES]
CHATS = ROOT / "mlxft/demo/rows.jsonl"
PAIRS = ROOT / "mlxft/demo/pairs.jsonl"
# What a tiny model needs, and runs that a recipe starts from.
FITTED = {
    "sweep": ["sweep=null"],  # one trial
    "fewshot-reviews": [f"data.train={PAIRS}", "data.fields={prompt: '{prompt}', completion: ' {chosen}'}"],
    "transfer-groups": ["optim.groups=[{match: 're:layers\\.[0-3]\\.', scale: 0.1}]"],
    "ppo-reward-model": [f"data.train={PAIRS}", "rollout.prompts=2", "rollout.max_tokens=8", "run.epochs=null"],
    "grpo": ["rollout.prompts=2", "rollout.samples=2", "rollout.max_tokens=8"],
    "rloo": ["rollout.prompts=2", "rollout.max_tokens=8"],
    "distill": ["rollout.prompts=2", "rollout.max_tokens=8"],
    "distill-prompt": ["rollout.prompts=2", "rollout.max_tokens=8"],
    "environment": [
        "data.train=environment",
        "rollout.prompts=2",
        "rollout.samples=2",
        "rollout.max_tokens=8",
        "environment.turns=2",
    ],
    "ppo-function": ["rollout.prompts=2", "rollout.max_tokens=8"],
    "gspo": ["rollout.prompts=4", "rollout.samples=2", "rollout.max_tokens=8"],
    # A random model has no word right, and pairs of equal rewards are left out.
    "online-dpo": ["rollout.prompts=4", "rollout.max_tokens=8", "rewards.rules=[{kind: regex, pattern: '[a-m]'}]"],
}
FITTED["fewshot-reviews"] += ["tune.layers=4", "run.eval_every=null"]  # it has no validation rows
BY_FUNCTION = ("ppo-function", "grpo", "gspo", "rloo", "online-dpo")
FITTED |= {name: [*FITTED[name], f"data.train={PAIRS}"] for name in (*BY_FUNCTION, "distill", "distill-prompt")}
NEEDED = {
    "transfer-sft": {"model.adapter": "continued-pretraining"},
    "ppo-reward-model": {"rewards.adapter": "reward-lora"},
    "distill": {"distill.teacher": "sft-lora"},
}
ROWS = 24
JUDGED = ("reward-lora", "reward-qlora", "dpo-lora", "orpo", "kto")


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}".lstrip("."))
    else:
        yield prefix, tree


@pytest.fixture(scope="module")
def base(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, for recipes that train the last four; width 64, for groups of 64."""
    sizes = {"num_hidden_layers": 6, "hidden_size": 64, "head_dim": 16}
    return make_model_dir(tmp_path_factory.mktemp("base") / "base", "llama", **sizes)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": f"The {n} of them are in the house. " * 5} for n in ("first", "second", "third", "last")]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return file


@pytest.fixture(scope="module")
def trained(
    base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Config, nn.Module]]:
    """Trains a recipe for two steps on the tiny model, once; gives its settings and the model it left."""
    done: dict[str, tuple[Config, nn.Module]] = {}
    runs = tmp_path_factory.mktemp("runs")

    def few(override: str) -> str:
        """Two steps need no more than a few of the rows."""
        for file in (CHATS, PAIRS):
            short = runs / file.name
            short.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:ROWS]), "utf-8")
            override = override.replace(str(file), str(short))
        return override

    def get(name: str) -> tuple[Config, nn.Module]:
        if name not in done:
            rows = texts if name == "continued-pretraining" else PAIRS if name in JUDGED else CHATS
            overrides = [f"model.path={base}", f"data.train={rows}", f"run.dir={runs}", "run.steps=2"]
            # So that ten validation rows are not more than the whole of a tiny run.
            overrides += ["run.eval_every=2"] if name != "sft-lora" else []
            overrides += FITTED.get(name, [])
            for setting, needed in NEEDED.get(name, {}).items():  # the recipe that stands before it on the road
                get(needed)
                overrides.append(f"{setting}={runs}/{needed}")
            config = load_config(ROOT / f"configs/{name}.yaml", [few(o) for o in overrides])
            run = train(config)
            assert [e["step"] for e in run.metrics("end")] == [2]
            done[name] = config, load_run(run, scores=config.objective == "reward").model
        return done[name]

    return get


def adapted(model: nn.Module) -> list[LowRank]:
    return [m for _, m in model.named_modules() if isinstance(m, LowRank)]


def changed(model: nn.Module, base: Path) -> set[str]:
    """Names of the parameters that training has changed."""
    before = dict(tree_flatten(load_model(str(base)).model.parameters()))
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    return {n for n in before if not mx.array_equal(before[n], after[n]).item()}


def test_there_are_the_recipes_that_the_readme_names() -> None:
    named = ("quickstart", "sft-lora", "sft-qlora", "sft-dora", "sft-full", "transfer-last-layers")
    assert {*named, "continued-pretraining"} <= set(NAMES)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_recipe_is_short_and_says_only_what_differs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = recipe.read_text("utf-8")
    assert len(text.splitlines()) <= 40
    assert text.startswith("# "), "the first line says what the recipe is for"
    config = load_config(recipe)
    assert config.run.name == recipe.stem
    bare = {"model": {"path": "x"}, "data": {"train": "x", "format": "messages"}, "objective": config.objective}
    kind = config_class(config.objective)
    default = dict(leaves(kind.model_validate(bare).model_dump(mode="json"))) | {"objective": "sft"}
    same = [key for key, value in leaves(yaml.safe_load(text)) if key != "data.format" and default.get(key) == value]
    assert not same, f"these are the defaults: {same}"


def test_the_recipe_of_label_says_only_what_differs_from_the_options() -> None:
    text = LABEL.read_text("utf-8")
    assert len(text.splitlines()) <= 40
    assert text.startswith("# ")
    given = read_label_recipe(LABEL)
    assert {"prompts", "model", "out"} < set(given)
    defaults = {option.name: option.default for option in label.params}
    assert not [k for k, v in given.items() if defaults.get(k) == v]


def test_the_task_of_eval_says_only_what_differs_from_the_defaults() -> None:
    rows = {"eval-reviews": {"review": "Good.", "label": "great"}, "eval-numbers": {"question": "1 + 1?", "answer": 2}}
    assert {task.stem for task in TASKS} == set(rows)
    for file in TASKS:
        text = file.read_text("utf-8")
        assert len(text.splitlines()) <= 40
        assert text.startswith("# ")
        given = yaml.safe_load(text)
        assert not [name for name, value in given.items() if Task.model_fields[name].default == value]
        (case,) = make_cases([Row("rows:1", rows[file.stem])], read_task(str(file)))
        assert case.label == str(given["answer"] and rows[file.stem][given["answer"]])


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_recipe_runs_as_it_is_from_a_clone_or_says_what_is_yours(
    recipe: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(recipe)
    if "YOURS" in recipe.read_text("utf-8"):
        with pytest.raises(ConfigError, match=r"texts\.jsonl|runs/reward-lora|runs/sft-lora|reviews-train\.jsonl"):
            make_objective(config, tiny_tokenizer)
    else:
        summary = make_objective(config, tiny_tokenizer).summary()
        assert summary.validates
        assert next(iter(summary.counts.values())) > 100


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains(name: str, trained: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on a tiny model; a recipe that is new is among them by itself."""
    monkeypatch.chdir(ROOT)
    config, model = trained(name)
    assert config.run.steps == 2
    # What trains is there and, by rewards that a random model gets none of, at least finite.
    assert config.tune.method == "full" or adapted(model)
    assert all(mx.isfinite(v).all().item() for _, v in tree_flatten(model.parameters()) if v.dtype == mx.float32)
    if config.tune.method == "full":
        assert changed(model, base)


@pytest.mark.parametrize("name", ["quickstart", "sft-lora", "sft-dora", "continued-pretraining"])
def test_low_rank_recipes_train_an_adapter_on_a_float_base(name: str, trained: Any) -> None:
    config, model = trained(name)
    layers = adapted(model)
    assert len(layers) == (24 if name == "sft-dora" else 42)  # six layers, of 4 attention and 3 mlp matrices
    assert all(type(m.base) is nn.Linear for m in layers)
    assert {m.lora_a.shape[-1] for m in layers} == {config.tune.rank}
    assert all(mx.any(m.lora_b != 0).item() for m in layers), "every layer has learnt something"
    assert all(("m" in m) == (name == "sft-dora") for m in layers)


def test_qlora_trains_an_adapter_on_a_four_bit_base(trained: Any) -> None:
    _, model = trained("sft-qlora")
    layers = adapted(model)
    assert len(layers) == 42
    assert {(type(m.base).__name__, m.base.bits) for m in layers} == {("QuantizedLinear", 4)}
    assert all(mx.any(m.lora_b != 0).item() for m in layers)


@pytest.mark.parametrize("name", JUDGED)
def test_recipes_of_judged_answers_train_an_adapter(name: str, trained: Any) -> None:
    config, model = trained(name)
    layers = adapted(model)
    assert len(layers) == 42
    assert all(mx.any(m.lora_b != 0).item() for m in layers)
    assert ("score_head" in model) == (config.objective == "reward")
    assert {type(m.base).__name__ for m in layers} == {"QuantizedLinear" if "qlora" in name else "Linear"}


def test_full_changes_every_weight(trained: Any, base: Path) -> None:
    _, model = trained("sft-full")
    assert changed(model, base) == {n for n, _ in tree_flatten(model.parameters())}


def test_transfer_changes_the_last_layers_and_the_norm_only(trained: Any, base: Path) -> None:
    _, model = trained("transfer-last-layers")
    inside = tuple(f"model.layers.{i}." for i in (2, 3, 4, 5))
    every = {n for n, _ in tree_flatten(model.parameters())}
    assert changed(model, base) == {n for n in every if n.startswith((*inside, "model.norm."))}


def test_pretraining_trains_every_token_once(texts: Path, tiny_tokenizer: Any) -> None:
    recipe = ROOT / "configs/continued-pretraining.yaml"
    rows = f"data.train={texts}"
    whole = load_config(recipe, [rows, "data.valid=null", "run.eval_every=null", "run.eval_at_start=false"])
    cut = load_config(recipe, [rows, "data.max_length=32"])
    counts = make_objective(whole, tiny_tokenizer).summary().counts
    assert counts["trained tokens"] == counts["tokens"] - 4  # nothing predicts the first token of each text
    pieces = make_objective(cut, tiny_tokenizer).summary().counts
    assert pieces["rows"] > 3
    assert pieces["trained tokens"] + pieces["validation trained tokens"] == counts["trained tokens"]


@pytest.mark.parametrize("name", BY_FUNCTION)
def test_recipes_by_a_function_train_an_adapter(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "f.py").write_text("def size(prompts, completions, rows):\n    return [len(c) for c in completions]\n")
    overrides = [f"model.path={base}", f"run.dir={tmp_path}", "run.epochs=null", "run.steps=2"]
    # A random model has no word right.
    overrides += ["rollout.prompts=2", "rollout.max_tokens=8", f"rewards.function={tmp_path}/f.py:size"]
    run = train(load_config(ROOT / f"configs/{name}.yaml", overrides))
    assert run.metrics("rollout")[0]["reward/size"] > 0
    assert "win_rate" in run.metrics("eval")[-1]
    assert all(mx.any(m.lora_b != 0).item() for m in adapted(load_run(run).model)), "every layer has learnt something"


def test_the_example_of_a_reward_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (function,) = load_functions("configs/rewards.py:overlap")
    ids = np.zeros(1, dtype=np.int32)
    said = ["The 9th.", "it is the 9th.", "", "no"]
    items = [ToScore(ids, ids, "When?", text, {"chosen": "The 9th."}, True, "rows:1") for text in said]
    # 2 words of 4 and 2 are in common: precision 1 / 2, recall 1.
    assert function.score(items) == pytest.approx([1, 2 / 3, 0, 0])
