"""Rewards: a reward run gives the scores of `mlxft score` wherever it is loaded; sums of sources; bad functions."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from mlxft.data.dataset import encode_completion
from mlxft.errors import ConfigError, DataError, RewardError
from mlxft.model.adapters import LoRASpec, prepare_adapter, select_targets
from mlxft.model.frozen import FrozenModels
from mlxft.model.heads import ScoreHead, head_arrays, head_metadata, read_head
from mlxft.model.load import Loaded, base_fingerprint, load
from mlxft.model.roles import Roles
from mlxft.objectives.rewards import Rewards, RewardsSettings, ToScore, as_number
from mlxft.run import train
from mlxft.runs import Run
from mlxft.study.score import open_scorer, score_file

ROWS = [
    {"prompt": f"{i} the", "chosen": f"{word} of in", "rejected": f"{word} z" + " z" * i}
    for i, word in enumerate(["in", "on", "at", "is", "to", "a", "or", "and", "of", "the"])
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def trained(folder: Path, model: Path, **tune: Any) -> Run:
    """A reward run under a folder."""
    data = {"train": write(folder / "pairs.jsonl", ROWS), "format": "preference", "valid": 0.3, "cache": False}
    return train(
        {
            "objective": "reward",
            "model": {"path": str(model), "dtype": "float32"},
            "tune": tune or {"rank": 4},
            "data": data,
            "batch": {"rows": 4},
            "optim": {"lr": 1e-2},
            "run": {"dir": str(folder / "runs"), "name": "a", "steps": 6},
        },
        console=Console(quiet=True),
    )


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("reward"), tiny_model_dir)


@pytest.fixture(scope="module")
def wanted(run: Run) -> list[float]:
    """What `mlxft score` says of every row's two answers."""
    found = score_file(run.dir, str(run.dir.parents[1] / "pairs.jsonl"), Console(quiet=True))
    return [value for row in found for value in row.scores]


def items(tokenizer: Any, **changes: Any) -> list[ToScore]:
    """Every row's two answers as if a policy with this tokenizer had sampled them."""
    found = []
    for i, row in enumerate(ROWS):
        for text in (row["chosen"], row["rejected"]):
            ids = encode_completion(row["prompt"], text, tokenizer, "")
            fields = {"prompt": row["prompt"], "answer": row["chosen"], **changes.get("row", {})}
            found.append(
                ToScore(*ids, row["prompt"], text, fields, changes.get("finished", True), f"pairs.jsonl:{i + 1}")
            )
    return found


def adapt(loaded: Loaded) -> None:
    """A policy in training, with dropout, that has moved away from the base."""
    spec = LoRASpec(tuple(select_targets(loaded.model, "all-linear", "all")), 2, 2.0, 0.5)
    prepare_adapter(loaded.model, spec, [])
    for _, module in loaded.model.named_modules():
        if "lora_b" in module:
            module.lora_b = module.lora_b + 0.1
    loaded.model.train()


def prepared(loaded: Loaded, base: str | None = None, **settings: Any) -> tuple[Rewards, Roles]:
    rewards = Rewards(RewardsSettings.model_validate(settings), loaded.tokenizer)
    adapt(loaded)
    models = FrozenModels(loaded.model, base_fingerprint(loaded), base)
    rewards.prepare(models)
    return rewards, models.roles


def test_as_a_role_its_scores_are_those_of_mlxft_score(run: Run, wanted: list[float], tiny_model: Loaded) -> None:
    rewards, roles = prepared(tiny_model, str(run.config.model.path), adapter=str(run.dir))
    assert (rewards.role, roles.active, rewards.names) == ("reward", "policy", ["reward_model"])
    model, asked = tiny_model.model, items(tiny_model.tokenizer)
    flags = [module.training for module in model.modules()]
    model.eval()
    before = np.array(model(mx.array([[1, 2, 3]])))
    model.train()
    found = rewards.score(asked, tokens=4096)
    assert [module.training for module in model.modules()] == flags
    assert all(flags)
    assert roles.active == "policy"
    model.eval()
    np.testing.assert_array_equal(np.array(model(mx.array([[1, 2, 3]]))), before)
    np.testing.assert_allclose(found.total, wanted, atol=1e-4)
    np.testing.assert_array_equal(found.components["reward_model"], found.total)
    assert found.total.dtype == np.float32
    assert np.ptp(found.total) > 0.1, "a reward that says something"


def test_scores_do_not_depend_on_batches_or_company(run: Run, wanted: list[float], tiny_model: Loaded) -> None:
    rewards, _ = prepared(tiny_model, adapter=str(run.result))
    asked = items(tiny_model.tokenizer)
    for tokens in (1, 50, 4096):
        np.testing.assert_allclose(rewards.score(asked, tokens=tokens).total, wanted, atol=1e-4)
    np.testing.assert_allclose(rewards.score(asked[5:6], tokens=50).total, wanted[5:6], atol=1e-4)
    np.testing.assert_allclose(rewards.score(asked[::-1], tokens=50).total, wanted[::-1], atol=1e-4)
    assert rewards.score([], tokens=50).total.shape == (0,)


def test_on_another_base_texts_are_encoded_again(
    run: Run, wanted: list[float], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    other = load(str(make_model_dir(tmp_path / "qwen3", "qwen3")), dtype="float32")
    rewards, roles = prepared(other, adapter=str(run.dir))
    assert (rewards.role, roles.names) == (None, ["policy"])
    asked = items(other.tokenizer)
    # The policy's own ids say nothing to another model.
    strange = [ToScore(i.prompt_ids[:1], i.reply_ids[:1], i.prompt, i.completion, i.row, True, i.where) for i in asked]
    np.testing.assert_allclose(rewards.score(strange, tokens=64).total, wanted, atol=1e-4)
    turns = [[{"role": "user", "content": i.prompt}] for i in asked]
    chats = [
        ToScore(i.prompt_ids, i.reply_ids, "as text", i.completion, {}, True, i.where, turn)
        for i, turn in zip(asked, turns)
    ]
    np.testing.assert_allclose(rewards.score(chats, tokens=64).total, wanted, atol=1e-4)
    plain = [ToScore(i.prompt_ids, i.reply_ids, i.prompt, i.completion, {}, True, i.where) for i in asked]
    np.testing.assert_allclose(rewards.score(plain, tokens=64).total, wanted, atol=1e-4)


def test_a_completion_that_was_cut_off_is_scored_without_its_end(
    run: Run, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    scorer = open_scorer(run.dir)
    whole = [scorer.encode(row["prompt"], row["chosen"], "") for row in ROWS]
    without = scorer.scores([answer._replace(reply=answer.reply[:-1]) for answer in whole])
    assert np.abs(np.array(without) - scorer.scores(whole)).max() > 1e-2, "the end of an answer says something"
    other = load(str(make_model_dir(tmp_path / "qwen3", "qwen3")), dtype="float32")
    rewards, _ = prepared(other, adapter=str(run.dir))
    found = rewards.score(items(other.tokenizer, finished=False)[::2], tokens=64)
    np.testing.assert_allclose(found.total, without, atol=1e-4)


@pytest.mark.parametrize("beside", [False, True], ids=["role", "another-base"])
def test_a_completion_that_a_stop_text_ended_is_read_up_to_it_and_then_eos(
    run: Run, wanted: list[float], beside: bool, tiny_model: Loaded, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """As a whole answer, wherever the reward model is loaded; the stop text may share a token with what it follows."""
    other = load(str(make_model_dir(tmp_path / "qwen3", "qwen3")), dtype="float32") if beside else tiny_model
    rewards, _ = prepared(other, adapter=str(run.dir))
    assert (rewards.role is None) == beside
    for stop in ("\n\nthe", "s in", "z"):
        asked = items(other.tokenizer)
        sampled = [np.array(other.tokenizer.encode(i.completion + stop), dtype=np.int32) for i in asked]
        stopped = [
            ToScore(i.prompt_ids, ids, i.prompt, i.completion, i.row, True, i.where) for i, ids in zip(asked, sampled)
        ]
        np.testing.assert_allclose(rewards.score(stopped, tokens=64).total, wanted, atol=1e-4)


def test_a_fine_tune_of_the_base_is_another_base(
    run: Run, wanted: list[float], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Its fingerprint, of shapes, is the same; the reward's adapter on its weights would give other scores."""
    shutil.copytree(tiny_model_dir, tmp_path / "tuned")
    weights: Any = mx.load(str(tmp_path / "tuned" / "model.safetensors"))
    moved = {name: value + 0.05 * mx.sin(mx.arange(value.size)).reshape(value.shape) for name, value in weights.items()}
    mx.save_safetensors(str(tmp_path / "tuned" / "model.safetensors"), moved, {"format": "mlx"})
    tuned = load(str(tmp_path / "tuned"), dtype="float32")
    rewards, _ = prepared(tuned, str(tmp_path / "tuned"), adapter=str(run.dir))
    assert rewards.role is None
    np.testing.assert_allclose(rewards.score(items(tuned.tokenizer), tokens=64).total, wanted, atol=1e-4)
    link = tmp_path / "link"
    link.symlink_to(tiny_model_dir)
    same, _ = prepared(load(str(link), dtype="float32"), str(link), adapter=str(run.dir))
    assert same.role == "reward", "another name for the same folder"


def test_a_wholly_trained_reward_model(tiny_model: Loaded, tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path, tiny_model_dir, method="full")
    found = score_file(whole.dir, str(tmp_path / "pairs.jsonl"), Console(quiet=True))
    rewards, _ = prepared(tiny_model, str(tiny_model_dir), adapter=str(whole.dir))
    assert rewards.role is None
    scores = rewards.score(items(tiny_model.tokenizer), tokens=4096).total
    np.testing.assert_allclose(scores, [value for row in found for value in row.scores], atol=1e-4)


def test_components_are_normalised_weighted_added_penalised_and_clipped(
    run: Run, wanted: list[float], tiny_model: Loaded, tmp_path: Path
) -> None:
    (tmp_path / "r.py").write_text("def size(prompts, completions, rows):\n    return [len(c) for c in completions]\n")
    settings = {
        "adapter": str(run.dir),
        "adapter_weight": 0.5,
        "function": {f"{tmp_path}/r.py:size": -0.1},
        "rules": [{"kind": "exact_match", "weight": 2}, {"kind": "regex", "pattern": "z z"}],
    }
    noted = read_head(run.result / "head.safetensors").about["reward"]
    asked = items(tiny_model.tokenizer)
    asked = [
        ToScore(i.prompt_ids, i.reply_ids, i.prompt, i.completion, i.row, n % 3 > 0, i.where)
        for n, i in enumerate(asked)
    ]
    cut = np.array([n % 3 == 0 for n in range(len(asked))])
    model = np.array(wanted)
    size = np.array([len(i.completion) for i in asked])
    exact = np.array([n % 2 == 0 for n in range(len(asked))])
    double = np.array(["z z" in i.completion for i in asked])
    rest = -0.1 * size + 2 * exact + double
    normal = (model - noted["mean"]) / noted["std"]
    plain, _ = prepared(tiny_model, **settings)
    found = plain.score(asked, tokens=4096)
    assert list(found.components) == plain.names == ["reward_model", "size", "rules/0_exact_match", "rules/1_regex"]
    for name, values in zip(plain.names, (model, size, exact, double)):
        np.testing.assert_allclose(found.components[name], values, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(found.total, 0.5 * model + rest, atol=1e-4)
    more = {"normalize": True, "missing_eos_penalty": 1.5, "clip": 1.0}
    full, _ = prepared(load(str(run.config.model.path), dtype="float32"), **settings, **more)
    before = 0.5 * normal + rest - 1.5 * cut
    assert (before < -1).any()
    assert (np.abs(before) < 1).any(), "something of everything"
    found = full.score(asked, tokens=4096)
    np.testing.assert_allclose(found.total, np.clip(before, -1, 1), atol=1e-3)
    np.testing.assert_allclose(found.components["reward_model"], model, atol=1e-4)
    assert list(found.components) == full.names == [*plain.names, "missing_eos"]
    np.testing.assert_allclose(found.components["missing_eos"], -1.5 * cut)


def test_reward_runs_that_are_none(run: Run, tiny_model: Loaded, tiny_model_dir: Path, tmp_path: Path) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(ConfigError) as raised:
            Rewards(RewardsSettings.model_validate(settings), tiny_model.tokenizer)
        return str(raised.value)

    assert refused().startswith("rewards: give adapter, function or rules")
    assert "rewards.adapter: there is no run or folder runs/none" in refused(adapter="runs/none")
    assert "has no head: not a reward run" in refused(adapter=str(tiny_model_dir))
    folder = tmp_path / "adapter"
    shutil.copytree(run.result, folder)
    head = head_arrays(ScoreHead.of(read_head(folder / "head.safetensors").weight))
    for about, says in (({}, "was trained without data.valid"), ({"reward": {"mean": 1.0, "std": 0.0}}, "std is 0.0")):
        mx.save_safetensors(str(folder / "head.safetensors"), head, head_metadata("", about))
        assert says in refused(adapter=str(folder), normalize=True)


def test_a_reward_model_that_gives_no_number(run: Run, tiny_model: Loaded) -> None:
    rewards, roles = prepared(tiny_model, adapter=str(run.dir))
    head = roles["reward"].head
    assert head is not None
    head.weight = head.weight * mx.inf
    with pytest.raises(RewardError, match=r"rewards.adapter: pairs.jsonl:1: the reward model's score is (nan|-?inf)"):
        rewards.score(items(tiny_model.tokenizer), tokens=4096)


# Functions and rules need no model.


def asked(count: int = 3) -> list[ToScore]:
    ids = np.arange(2, dtype=np.int32)
    return [ToScore(ids, ids, f"p{i}", f"c{i}", {"n": i}, True, f"rows.jsonl:{i + 1}") for i in range(count)]


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rewards]:
    """`rewards("return [1.0] * 3")`: by the body of a function, in a file of the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(body: str, **settings: Any) -> Rewards:
        code = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "r.py").write_text(f"import math\n\n\ndef f(prompts, completions, rows):\n{code}", "utf-8")
        return Rewards(RewardsSettings.model_validate({"function": "r.py:f", **settings}), None)

    return make


@pytest.mark.parametrize(
    "body",
    [
        "return [0.0, 1.0, 2.0]",
        "return (False, True, 2)",
        "return [float(row['n']) for row in rows]",
        "return [float(text[1]) for text in completions]",
        "return [float(text[1]) for text in prompts]",
        "import numpy as np\nreturn np.arange(3)",
        "import numpy as np\nreturn [np.bool_(False), np.float32(1), np.array([2])]",
        "import numpy as np\nreturn np.arange(3.0)[:, None]",
        "import mlx.core as mx\nreturn mx.arange(3)",
        "import mlx.core as mx\nreturn [mx.array(0.0), mx.array(1.0, dtype=mx.bfloat16), mx.array([2])]",
        "rows.clear()\nprompts.clear()\nreturn range(3)",
    ],
)
def test_what_a_function_may_return(rewards: Callable[..., Rewards], body: str) -> None:
    given = asked()
    found = rewards(body).score(given, tokens=1)
    np.testing.assert_array_equal(found.total, [0, 1, 2])
    np.testing.assert_array_equal(found.components["f"], [0, 1, 2])
    assert [item.row for item in given] == [{"n": 0}, {"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("pass", "r.py:f: returned None; expected a list of 3 numbers, one for each completion (is a return missing?)"),
        ("return [1.0, 2.0]", "r.py:f: returned 2 values for 3 completions; expected a list of 3 numbers"),
        ("return 1.0", "r.py:f: returned 1.0 (float); expected a list of 3 numbers"),
        ("return 'abc'", "returned 'abc' (str)"),
        ("return {0: 1, 1: 2, 2: 3}", "(dict); expected"),
        ("return (x for x in range(3))", "(generator); expected"),
        ("import mlx.core as mx\nreturn mx.array(1.0)", "(array); expected"),
        (
            "return [1.0, math.nan, 2.0]",
            "rows.jsonl:2: returned nan (float) for the completion 'c1'; expected a finite",
        ),
        ("return [1.0, 2.0, -math.inf]", "rows.jsonl:3: returned -inf (float)"),
        ("return [1.0, None, 2.0]", "rows.jsonl:2: returned None (NoneType)"),
        ("return ['1', 2.0, 3.0]", "rows.jsonl:1: returned '1' (str)"),
        ("return [1e300, 2.0, 3.0]", "rows.jsonl:1: returned 1e+300 (float)"),
        ("return [10 ** 400, 2.0, 3.0]", "rows.jsonl:1: returned 1000"),
        ("return [[1, 2], 2.0, 3.0]", "rows.jsonl:1: returned [1, 2] (list)"),
        ("import numpy as np\nreturn np.ones((3, 2))", "rows.jsonl:1: returned array([1., 1.]) (ndarray)"),
        ("return [1j, 2.0, 3.0]", "rows.jsonl:1: returned 1j (complex)"),
        (
            "return [1 / (row['n'] - 1) for row in rows]",
            "r.py:f: rows.jsonl:2: raised ZeroDivisionError: division by zero (line 5) for the completion 'c1'",
        ),
        ("raise KeyError('gold')", "rows.jsonl:1: raised KeyError: 'gold' (line 5)"),
        ("raise SystemExit(0)", "rows.jsonl:1: raised SystemExit: 0 (line 5)"),
        ("raise type('PanicException', (BaseException,), {})('p')", "rows.jsonl:1: raised PanicException: p (line 5)"),
        (
            "if len(rows) > 1:\n    raise RuntimeError('too many')\nreturn [1.0]",
            "r.py:f: raised RuntimeError: too many (line 6) for 3 completions from rows.jsonl:1 on, and for none",
        ),
    ],
)
def test_what_a_function_may_not_do(rewards: Callable[..., Rewards], body: str, says: str) -> None:
    with pytest.raises(RewardError, match=re.escape(says)) as raised:
        rewards(body).score(asked(), tokens=1)
    assert "raised" not in says or raised.value.__cause__ is not None


def test_an_interruption_in_a_function_is_one(rewards: Callable[..., Rewards]) -> None:
    with pytest.raises(KeyboardInterrupt):
        rewards("raise KeyboardInterrupt").score(asked(), tokens=1)


def test_as_number() -> None:
    assert as_number(np.float64(0.5)) == 0.5
    assert as_number(np.array([1, 2])) is None
    assert as_number(mx.array([1, 2])) is None


def test_functions_are_loaded_at_once_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "rewards.py": "SIZE = 3\nfrom math import sqrt\ndef score(p, c, r):\n    return [1.0] * len(p)\n",
        "syntax.py": "def score(:\n",
        "broken.py": "import sys\n\nsys.exit(3)\n",
        "needs.py": "import a_package_that_is_not_there\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")

    def refused(function: Any) -> str:
        with pytest.raises(ConfigError) as raised:
            Rewards(RewardsSettings.model_validate({"function": function}), None)
        return str(raised.value)

    path = list(sys.path)
    said = refused("reward.py:score")
    assert (
        f"rewards.function: reward.py:score: no such file reward.py (did you mean rewards.py?); looked in {tmp_path}"
        in said
    )
    assert "no function 'scores' in it (did you mean score?); it has score, sqrt" in refused("rewards.py:scores")
    assert "SIZE is int, not a function" in refused({"rewards.py:SIZE": 1.0})
    assert "does not name a function; expected file.py:name" in refused("rewards.py")
    assert "does not name a function" in refused("rewards.py:")
    assert "syntax.py cannot be run: SyntaxError: invalid syntax" in refused("syntax.py:score")
    assert "cannot be run: SystemExit: 3 (line 3)" in refused("broken.py:score")
    assert "ModuleNotFoundError: No module named 'a_package_that_is_not_there'" in refused("needs.py:score")
    assert sys.path == path
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files), "no bytecode is left beside them"


def test_a_file_is_read_anew_and_has_dataclasses(rewards: Callable[..., Rewards], tmp_path: Path) -> None:
    """No cache of an older text of the same size, as a second save within a second would find it."""
    for value in (1.0, 2.0):
        assert rewards(f"return [{value}] * 3").score(asked(), tokens=1).total.tolist() == [value] * 3
    (tmp_path / "d.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass A:\n    x: float\n"
        "\n\ndef f(p, c, r):\n    return [A(2.0).x for _ in p]\n",
        "utf-8",
    )
    both = Rewards(RewardsSettings.model_validate({"function": {"r.py:f": 1, "d.py:f": 10}}), None)
    assert both.names == ["r.py:f", "d.py:f"], "one name for two functions would be none"
    assert both.score(asked(), tokens=1).total.tolist() == [22.0] * 3


def test_a_file_may_import_what_stands_beside_it(tmp_path: Path) -> None:
    """What is installed goes first, and afterwards the path is as before."""
    (tmp_path / "beside_me.py").write_text("ONE = 1.0\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')\n")
    code = "import json\nfrom beside_me import ONE\n\n\ndef f(p, c, r):\n    return [ONE] * len(c)\n"
    (tmp_path / "r.py").write_text(code)
    before = sys.path.copy()
    made = Rewards(RewardsSettings(function=f"{tmp_path}/r.py:f"), None)
    assert made.score(asked(), tokens=1).total.tolist() == [1.0] * 3
    assert sys.path == before


def test_rows_that_lack_what_rules_read_are_all_named() -> None:
    rules = [{"kind": "exact_match"}, {"kind": "number", "field": "n"}]
    found = Rewards(RewardsSettings.model_validate({"rules": rules}), None)
    found.check_rows([("a:1", {"answer": "x", "n": 1})])
    with pytest.raises(DataError) as raised:
        found.check_rows([("a:1", {"answer": "x", "n": 1}), ("a:2", {"n": 1}), ("a:3", {"answer": "x", "n": "none"})])
    lines = str(raised.value).splitlines()
    assert [line[:4] for line in lines] == ["a:2:", "a:3:"]
    assert "no field 'answer'" in lines[0]
    assert "has no number; rules/1_number" in lines[1]
