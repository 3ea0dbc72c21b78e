"""Reward models: the utilities behind Bradley-Terry choices come back; scores are the same however they are read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rich.console import Console
from stepping import first_step, sums_of

from mlxft.build import make_objective, prepare
from mlxft.config import parse_config
from mlxft.data.dataset import EncodedCompletion
from mlxft.errors import ConfigError, DataError, ModelError
from mlxft.model.heads import find_head, head_of, read_head
from mlxft.model.load import Loaded
from mlxft.objectives.functional import bradley_terry
from mlxft.objectives.rewards import find_reward_run
from mlxft.run import train
from mlxft.runs import Run, load_run
from mlxft.study.score import ScoredRow, Scorer, open_scorer, score_file, summarise, tables

Recipe = Callable[..., dict[str, Any]]
WORDS = ["the", "in", "on", "and", "or", "a", "is", "of", "to", "at"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Good answers hold no z, bad ones do."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        good, bad = (" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(2))
        rows.append({"prompt": f"{i} {rng.choice(WORDS)}", "chosen": good, "rejected": f"{bad} z z"})
    return rows


@pytest.fixture
def settings(recipe: Recipe, tmp_path: Path) -> Recipe:
    """`recipe` for a reward model on twenty pairs, a fifth of them held out."""

    def make(rows: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
        file = write(tmp_path / "pairs.jsonl", pairs(20) if rows is None else rows)
        base = {"objective": "reward", "data.train": file, "data.format": "preference", "data.valid": 0.2}
        return recipe(**{**base, "run.steps": 8, **changes})

    return make


def objective(settings: dict[str, Any], loaded: Loaded) -> Any:
    """Ready to give losses."""
    config = parse_config(settings)
    found = make_objective(config, loaded.tokenizer)
    prepare(config, loaded)
    found.prepare(loaded.model)
    return found


@pytest.mark.learning
@pytest.mark.slow
def test_bradley_terry_recovery(recipe: Recipe, tmp_path: Path) -> None:
    """Eight items with utilities in +-1.5 and 5,600 choices: each utility within 0.05, the loss within 0.005.

    Without centring, whose pull towards 0 would shrink the utilities: at 0.01 by a tenth. That the constant is free
    does not matter, the utilities are compared centred.
    """
    utilities = np.linspace(-1.5, 1.5, 8)
    couples = list(combinations(range(8), 2))
    names = list("bcdfghjk")
    rows = []
    for a, b in couples:
        # Each couple as often as any other, and won as often as expected: what is left to see is the model's error,
        # and not that of the draw (0.03 an item).
        count = 5_600 // len(couples)
        wins = round(count / (1 + math.exp(utilities[b] - utilities[a])))
        rows += [{"prompt": "of", "chosen": names[a], "rejected": names[b]}] * wins
        rows += [{"prompt": "of", "chosen": names[b], "rejected": names[a]}] * (count - wins)
    file = write(tmp_path / "choices.jsonl", rows)
    changes = {
        "objective": "reward",
        "reward": {"centering": 0.0},
        "data.train": file,
        "data.format": "preference",
        "data.template": "none",
        "data.valid": file,
        "batch.rows": 280,
        "run.steps": None,
        "run.epochs": 8,
        "run.eval_every": 1000,
        "run.report_every": 50,
        "optim.lr": 2e-2,
        "tune.rank": 16,
    }
    run = train(recipe(**changes))
    scorer = open_scorer(run.dir)
    found = np.array(scorer.scores([scorer.encode("of", name, "") for name in names]))
    assert np.abs(found - found.mean() - utilities).max() < 0.05
    margins = np.array([utilities[a] - utilities[b] for a, b in couples])
    sure = 1 / (1 + np.exp(-margins))
    bayes = float(np.mean(-sure * np.log(sure) - (1 - sure) * np.log(1 - sure)))
    assert bayes == pytest.approx(0.5137, abs=1e-4)
    last = run.metrics("eval")[-1]
    assert last["loss"] == pytest.approx(bayes, abs=0.005)
    assert last["accuracy"] == pytest.approx(0.760, abs=0.01)
    assert last["ece"] < 0.02, "sure as often as right"


def test_scores_are_the_same_padded_alone_saved_and_scored(settings: Recipe, tmp_path: Path) -> None:
    run = train(settings())
    rows = pairs(12, seed=3)
    file = write(tmp_path / "test.jsonl", rows)
    console = Console(quiet=True)
    batched = score_file(run.dir, file, console)
    assert [row.scores for row in batched] == [row.scores for row in score_file(run.dir, file, console)]
    alone = score_file(run.dir, file, console, tokens=1)
    np.testing.assert_allclose([r.scores for r in batched], [r.scores for r in alone], atol=1e-4)
    # The file's other forms are the same answers.
    singles = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]}
        for r in rows
    ]
    singles += [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
    found = [row.scores[0] for row in score_file(run.dir, write(tmp_path / "single.jsonl", singles), console)]
    np.testing.assert_allclose(found, [row.scores[0] for row in batched] * 2, atol=1e-4)
    ranked = [{"prompt": r["prompt"], "answers": [r["rejected"], r["chosen"]]} for r in rows]
    lines = [row.to_json() for row in score_file(run.dir, write(tmp_path / "ranked.jsonl", ranked), console)]
    np.testing.assert_allclose([line["scores"][::-1] for line in lines], [r.scores for r in batched], atol=1e-4)
    assert all((line["ranking"] == [1, 0]) == (line["scores"][1] > line["scores"][0]) for line in lines)
    summary = summarise(batched)
    wins = [r.scores[0] > r.scores[1] for r in batched]
    assert summary["accuracy"] == pytest.approx(sum(wins) / 12)
    assert summary["accuracy"] > 0.9, "it has learnt what z says"


def test_scores_in_the_run_are_those_of_the_saved_run(settings: Recipe, tiny_model: Loaded, tmp_path: Path) -> None:
    """The validation's loss by the run in memory, and by the scores of what it saved."""
    held = pairs(6, seed=9)
    valid = write(tmp_path / "valid.jsonl", held)
    run = train(settings(**{"data.valid": valid, "run.eval_every": 8}))
    rows = score_file(run.dir, valid, Console(quiet=True))
    chosen, rejected = (mx.array([row.scores[i] for row in rows]) for i in (0, 1))
    wanted = bradley_terry(chosen, rejected, centering=0.01)
    last = run.metrics("eval")[-1]
    assert last["loss"] == pytest.approx(wanted.mean().item(), abs=1e-5)
    assert last["accuracy"] == pytest.approx(wanted.metrics["accuracy"].item() / 6)
    values = np.array([row.scores for row in rows])
    assert last["score_mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert last["score_std"] == pytest.approx(values.std(), rel=1e-4)
    noted = json.loads((run.result / "adapter_config.json").read_text())["mlxft"]["reward"]
    assert noted == {"mean": last["score_mean"], "std": last["score_std"]}
    scorer = open_scorer(run.dir)
    assert (scorer.mean, scorer.std) == (noted["mean"], noted["std"])
    margins = values[:, 0] - values[:, 1]
    sure, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    bins = np.clip(((sure - 0.5) * 20).astype(int), 0, 9)
    ece = sum((bins == b).mean() * abs(right[bins == b].mean() - sure[bins == b].mean()) for b in set(bins.tolist()))
    assert last["ece"] == pytest.approx(ece, abs=1e-4)
    assert sum(b["share"] for b in last["reliability"]) == pytest.approx(1)
    assert sum(b["share"] for b in last["scores_by_length"].values()) == pytest.approx(1)
    summary = summarise(rows)
    assert {k: summary[k] for k in ("accuracy", "margin", "mean", "std", "ece")} == pytest.approx(
        {k: last[f"score_{k}" if k in ("mean", "std") else k] for k in ("accuracy", "margin", "mean", "std", "ece")},
        abs=1e-4,
    )
    for name in ("reliability", "scores_by_length"):
        np.testing.assert_allclose(_numbers(summary[name]), _numbers(last[name]), atol=1e-4)


def _numbers(table: Any) -> list[float]:
    return [v for row in (table if isinstance(table, list) else table.values()) for v in row.values()]


def test_a_row_of_several_pairs_counts_once_and_a_tie_not_at_all() -> None:
    """Right in the first row, wrong in both halves of the second: 1/2, and a margin of (2 - (1 + 3) / 2) / 2 = 0."""
    answers = [EncodedCompletion(np.zeros(1, np.int32), np.zeros(n, np.int32)) for n in (1, 2)]
    rows = [
        ScoredRow("f:1", "pair", answers, [3.0, 1.0]),
        ScoredRow("f:2", "pair", answers, [0.0, 1.0], 0.5),
        ScoredRow("f:2", "pair", answers, [0.0, 3.0], 0.5),
        ScoredRow("f:3", "pair", answers, [5.0, 3.0], 1.0, True),
    ]
    found = summarise(rows)
    assert (found["rows"], found["pairs"], found["ties"]) == (3, 3, 1)
    assert (found["accuracy"], found["margin"]) == (0.5, 0.0)
    assert found["mean"] == pytest.approx((3 + 1 + (0 + 1 + 0 + 3) / 2 + 5 + 3) / 6)
    assert found["scores_by_length"]["short"]["mean"] == pytest.approx(1.5)
    assert rows[3].to_json()["tie"]
    assert not {"pairs", "accuracy", "ece"} & summarise(rows[3:]).keys()
    assert len(tables(found)) == 1 + len(found["reliability"]) + 1 + 2


def test_the_adapter_alone_is_mlx_lms(settings: Recipe) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    run = train(settings())
    files = sorted(p.name for p in run.result.iterdir())
    assert files == ["adapter_config.json", "adapters.safetensors", "chat_template.jinja", "head.safetensors"]
    base, _ = load_model(Path(run.config.model.path))
    assert load_adapters(base, str(run.result)) is not None


def test_a_reward_run_is_refused_where_text_is_wanted_and_the_reverse(settings: Recipe, recipe: Recipe) -> None:
    reward, policy = train(settings()), train(recipe(**{"run.name": "policy"}))
    for wanted in (reward.dir, reward.result):
        with pytest.raises(ModelError, match="is a reward model: it gives scores, not text; use mlxft score"):
            load_run(wanted)
    with pytest.raises(ModelError, match="gives text, not scores"):
        open_scorer(policy.dir)
    with pytest.raises(ConfigError, match=r"model.adapter: .* is a reward model.*objective sft"):
        train(recipe(**{"model.adapter": str(reward.dir), "run.name": "b", "tune.rank": None}))
    (reward.result / "head.safetensors").unlink()
    for opened in (load_run, open_scorer):
        with pytest.raises(ModelError, match=r"without its head: head\.safetensors"):
            opened(reward.result)


def test_a_reward_run_is_trained_further_with_its_head(settings: Recipe) -> None:
    first = train(settings())
    more = settings(**{"model.adapter": str(first.dir), "run.name": "b", "tune.rank": None, "run.eval_at_start": True})
    second = train({**more, "optim": {"lr": 1e-9}})
    before, after = (run.metrics("eval")[-1]["loss"] for run in (first, second))
    assert second.metrics("eval")[0]["loss"] == pytest.approx(before, rel=1e-5)
    assert after == pytest.approx(before, rel=1e-4)


def test_whole_weights_are_trained_saved_and_scored(settings: Recipe, tmp_path: Path) -> None:
    run = train(settings(**{"tune": {"method": "full"}, "optim.lr": 1e-3, "data.valid": 0.2}))
    assert find_head(run.dir) == run.dir / "model" / "head.safetensors"
    rows = score_file(run.dir, write(tmp_path / "t.jsonl", pairs(4)), Console(quiet=True))
    assert all(math.isfinite(value) for row in rows for value in row.scores)
    with pytest.raises(ModelError, match="is a reward model"):
        load_run(run.dir)
    from mlx_lm.utils import load_model

    load_model(run.result)  # strict: the head is no part of the model's own files


def test_weights_ties_margins_and_smoothing_reach_the_loss(settings: Recipe, tiny_model: Loaded) -> None:
    rows = pairs(4)
    rows[1]["tie"] = True
    rows[2]["margin"] = 1.5
    rows[3]["rejected"] = [rows[3]["rejected"], "z"]  # two pairs, which count as one
    changes = {"data.valid": None, "reward": {"margin": True, "label_smoothing": 0.1}, "batch.rows": 9}
    found = objective(settings(rows, **changes), tiny_model)
    tiny_model.model.eval()
    step = first_step(found, tiny_model.model)
    (batch,) = step.micro_batches
    got = sums_of(found, tiny_model.model, step)
    order = {where: [i for i, w in enumerate(batch.rows) if w == where] for where in batch.rows}
    one, tie, margin, two = (order[f"pairs.jsonl:{n}"] for n in (1, 2, 3, 4))
    assert sorted(len(found) for found in (one, tie, margin, two)) == [1, 1, 1, 2]
    scorer = Scorer(found.sharing(tiny_model.model).split, tiny_model.tokenizer, True, None, None)
    total = 0.0
    for n, row in enumerate(rows):
        worse = row["rejected"] if isinstance(row["rejected"], list) else [row["rejected"]]
        for text in worse:
            encoded = [scorer.encode(row["prompt"], reply, "") for reply in (row["chosen"], text)]
            c, r = scorer.scores(encoded)
            m, e = (1.5 if n == 2 else 0.0), (0.5 if n == 1 else 0.1)
            loss = (1 - e) * math.log1p(math.exp(-(c - r - m))) + e * math.log1p(math.exp(c - r + m))
            total += (loss + 0.01 * (c + r) ** 2) / len(worse)
    assert got.weight.item() == 4
    assert got.total.item() == pytest.approx(total, rel=1e-5)
    assert batch.trained_tokens == 10


def test_ties_are_left_out_of_validation_and_said(settings: Recipe, tiny_model: Loaded, tmp_path: Path) -> None:
    held = pairs(4)
    held[0]["tie"] = True
    found = objective(settings(**{"data.valid": write(tmp_path / "v.jsonl", held)}), tiny_model)
    assert len(found.valid) == 3
    assert "1 ties are left out of validation" in found.summary().notes
    only = settings(**{"data.valid": write(tmp_path / "w.jsonl", [{**row, "tie": True} for row in held])})
    with pytest.raises(DataError, match="has ties only"):
        make_objective(parse_config(only), tiny_model.tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.format": "messages"},
            "data.format: messages is not for objective reward; choose preference",
        ),
        ({"data.train_on": "last"}, "data.train_on: completions are trained whole"),
        ({"data.overflow": "truncate"}, "data.overflow: truncate would change"),
        ({"batch.pack": True}, "batch.pack: is not for objective reward"),
        ({"tune.dropout": 0.1}, "tune.dropout: what is compared"),
        ({"reward": {"margin": True}}, "reward.margin: no row has a margin"),
        ({"run.sample_prompts": ["x"]}, "run.sample_prompts: a reward model gives scores, not text"),
    ],
)
def test_settings_without_meaning_are_refused(
    changes: dict[str, Any], message: str, settings: Recipe, tiny_tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_objective(parse_config(settings(**changes)), tiny_tokenizer)


def test_resume_is_exact(settings: Recipe) -> None:
    """Stopped after four of eight steps and gone on: the same weights, head and numbers as in one go."""
    # At a rate so small that the last validation is the best: then the resumed run writes the result.
    changes = {"batch.accumulate": 2, "run.save_every": 4, "run.eval_every": 4, "run.keep": 9, "optim.lr": 5e-4}
    whole = train(settings(**changes))
    settings_b = settings(**changes, **{"run.name": "b"})
    stop_after(4, settings_b)
    run = train(settings_b, resume=True)
    assert_same(whole, run)


def stop_after(steps: int, settings: dict[str, Any]) -> None:
    """Train, and lose everything after the checkpoint of `steps`."""
    import shutil

    run = train(settings)
    for folder in (run.dir / "checkpoints").iterdir():
        if int(folder.name[5:]) > steps:
            shutil.rmtree(folder)
    shutil.rmtree(run.result)


def assert_same(a: Run, b: Run) -> None:
    """Equal to the last bit: what was saved, and every reported loss."""
    for file in ("adapters.safetensors", "head.safetensors"):
        if (a.result / file).exists() or (b.result / file).exists():
            x, y = (mx.load(str(run.result / file)) for run in (a, b))
            assert isinstance(x, dict)
            assert isinstance(y, dict)
            assert x.keys() == y.keys()
            assert all(mx.array_equal(x[n], y[n]).item() for n in x)
    for event in ("train", "eval"):
        first, second = ([(e["step"], e["loss"]) for e in run.metrics(event)] for run in (a, b))
        assert first == second


def test_every_trained_parameter_has_a_gradient(settings: Recipe, tiny_model: Loaded) -> None:
    found = objective(settings(), tiny_model)
    model = tiny_model.model
    model.train()
    step = first_step(found, model)

    def loss(parameters: Any) -> mx.array:
        model.update(parameters)
        return sums_of(found, model, step).total

    slopes = dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))
    assert "score_head.weight" in slopes
    assert head_of(model) is not None
    # lora_b is zero at first, so lora_a has no gradient yet.
    assert all(mx.any(v != 0).item() for n, v in slopes.items() if not n.endswith("lora_a"))


def test_a_head_file_says_what_it_is(settings: Recipe) -> None:
    run = train(settings())
    saved = read_head(run.result / "head.safetensors")
    base = json.loads((run.result / "adapter_config.json").read_text())["mlxft"]["base"]
    assert saved.fingerprint == base["fingerprint"]
    assert set(saved.about["reward"]) == {"mean", "std"}


def test_texts_are_read_as_they_were_trained_from_the_adapter_alone_too(settings: Recipe, tmp_path: Path) -> None:
    run = train(settings(**{"data.template": "none", "run.steps": 1}))
    alone = tmp_path / "alone"
    run.result.rename(alone)
    assert [open_scorer(alone).chat, find_reward_run(str(alone), False).chat] == [False, False]
