"""Direct preference training: a known optimum, signs of gradients, and numbers that must not move."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from stepping import first_batch, first_step, sums_of

from mlxft.build import make_objective, prepare
from mlxft.config import parse_config
from mlxft.data.dataset import EncodedCompletion
from mlxft.errors import ConfigError, DataError
from mlxft.model.load import Loaded
from mlxft.model.logits import Split, row_sums, rows_logprobs
from mlxft.objectives import functional as F
from mlxft.objectives.functional import LossSum
from mlxft.objectives.pairs import completions_of, stack
from mlxft.run import train
from mlxft.runs import Run
from mlxft.trainer.loop import validate

Recipe = Callable[..., dict[str, Any]]
LOSSES = ("dpo", "ipo", "hinge", "simpo", "orpo", "cpo", "kto")
WORDS = ["the", "in", "on", "and", "or", "a", "is", "of", "to", "at"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def pairs(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for i in range(count):
        good, bad = (" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(2))
        rows.append({"prompt": f"{i} {rng.choice(WORDS)}", "chosen": good, "rejected": f"{bad} z"})
    return rows


@pytest.fixture
def settings(recipe: Recipe, tmp_path: Path) -> Recipe:
    """`recipe` for preference training; `settings("kto", rows, ...)`."""

    def make(loss: str = "dpo", rows: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
        file = write(tmp_path / "pairs.jsonl", pairs(12) if rows is None else rows)
        base: dict[str, Any] = {"objective": "preference", "data.train": file, "data.format": "preference"}
        own = {"loss": loss, **changes.pop("preference", {})}
        return recipe(**{**base, "preference": own, **changes})

    return make


def objective(settings: dict[str, Any], loaded: Loaded) -> Any:
    """Ready to give losses."""
    config = parse_config(settings)
    found = make_objective(config, loaded.tokenizer)
    prepare(config, loaded)
    found.prepare(loaded.model)
    return found


def trained(objective: Any, model: Any, steps: int, lr: float) -> list[float]:
    """Plain Adam over `steps` batches; the losses."""
    from mlx.optimizers import Adam

    optimizer, losses = Adam(lr, bias_correction=True), []
    model.train()
    pulled = objective.steps(model)
    for _ in range(steps):
        step = next(pulled)

        def loss(parameters: Any, step: Any = step) -> Any:
            model.update(parameters)
            return sums_of(objective, model, step)

        parameters = model.trainable_parameters()
        sums, slopes = mx.value_and_grad(loss)(parameters)
        model.update(parameters)
        weight = sums.weight.item()
        optimizer.update(model, tree_map(lambda g, weight=weight: g / weight, slopes))
        mx.eval(model.parameters(), optimizer.state)
        losses.append((sums.total / sums.weight).item())
    return losses


# Log-probabilities


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [False, True])
def test_logprobs_in_chunks_are_those_of_whole_logits_and_so_are_gradients(
    tied: bool, whole: bool, make_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's number has a cotangent of its own; with a trained head (`whole`) its gradient is exact too."""
    from mlxft.model.adapters import LoRASpec, attach, select_targets
    from mlxft.model.load import load

    monkeypatch.setattr("mlxft.model.logits.chunk_size", lambda vocabulary: 4)
    model = load(str(make_model_dir(tmp_path / "m", "llama", tie_word_embeddings=tied)), dtype="float32").model
    if whole:
        model.unfreeze()
    else:
        attach(model, LoRASpec(tuple(select_targets(model, "all-linear", "all")), 2, 2.0))
        model.update(tree_map(lambda v: v + 0.05, model.trainable_parameters()))
    split = Split(model)
    rng = np.random.default_rng(0)
    answers = [
        EncodedCompletion(*(rng.integers(3, 90, n).astype(np.int32) for n in sizes))
        for sizes in ((3, 5), (2, 9), (4, 1))
    ]
    a = stack(answers)
    cotangent = mx.array(rng.normal(size=15).astype(np.float32))

    def chunked(parameters: Any) -> mx.array:
        model.update(parameters)
        got = rows_logprobs(split, a.ids, a.positions, a.labels, grad=True)
        return (got * cotangent).sum() + got[3] * got[7]

    def plain(parameters: Any) -> mx.array:
        model.update(parameters)
        logits = model(a.ids)
        got = F.token_logprobs(logits.reshape(-1, logits.shape[-1])[a.positions], a.labels)
        return (got * cotangent).sum() + got[3] * got[7]

    parameters = model.trainable_parameters()
    (x, dx), (y, dy) = (mx.value_and_grad(f)(parameters) for f in (chunked, plain))
    model.update(parameters)
    assert x.item() == pytest.approx(y.item(), rel=1e-5)
    for (name, g), (_, h) in zip(tree_flatten(dx), tree_flatten(dy)):
        np.testing.assert_allclose(np.array(g), np.array(h), rtol=1e-3, atol=1e-4, err_msg=name)
    quiet = rows_logprobs(split, a.ids, a.positions, a.labels, grad=False)
    alone = []
    for answer in answers:
        one = stack([answer])
        alone.append(rows_logprobs(split, one.ids, one.positions, one.labels, grad=False))
    np.testing.assert_allclose(np.array(quiet), np.array(mx.concatenate(alone)), atol=1e-4)
    sums = row_sums(quiet, a.owners, 3).tolist()
    assert sums == pytest.approx([v.sum().item() for v in alone], abs=1e-4)


# The optimum


@pytest.mark.learning
def test_dpo_converges_to_the_optimum_that_the_frequencies_imply(settings: Recipe, tmp_path: Path) -> None:
    """Three prompts, two answers each, A preferred with frequency p: beta (difference of log-ratios) = logit p.

    The rows are in exact proportion, so the optimum of the loss is known: within 2 %.
    """
    shares = {"the": 0.8, "of": 0.6, "to": 0.3}
    rows = []
    for prompt, share in shares.items():
        for i in range(10):
            good, bad = ("in", "on and") if i < round(10 * share) else ("on and", "in")
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    changes = {"batch.rows": 30, "run.steps": 150, "optim.lr": 2e-2, "tune.rank": 8, "preference": {"beta": 0.5}}
    run = train(settings("dpo", rows, **changes))
    from mlxft.runs import load_run

    config = run.config
    found = make_objective(config, load_run(run).tokenizer)
    policy, reference = load_run(run).model, load_run(config.model.path, dtype="float32").model
    wanted = {share: math.log(share / (1 - share)) / 0.5 for share in shares.values()}
    for row, share in ((found.rows[0], 0.8), (found.rows[10], 0.6), (found.rows[20], 0.3)):
        a = stack(completions_of(row))
        sums = [
            row_sums(rows_logprobs(Split(m), a.ids, a.positions, a.labels, grad=False), a.owners, 2)
            for m in (policy, reference)
        ]
        ratios = (sums[0] - sums[1]).tolist()
        assert ratios[0] - ratios[1] == pytest.approx(wanted[share], rel=0.02)
    entropy = np.mean([-p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares.values()])
    assert run.metrics("train")[-1]["loss"] == pytest.approx(entropy, rel=0.005)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_lowers_its_own_objective(loss: str, settings: Recipe, tiny_model: Loaded) -> None:
    found = objective(settings(loss, **{"batch.rows": 24}), tiny_model)
    losses = trained(found, tiny_model.model, 25, 1e-2)
    floor = {"ipo": 0.3 * losses[0], "orpo": 0.9 * losses[0], "cpo": 0.9 * losses[0]}
    assert losses[-1] < floor.get(loss, 0.85 * losses[0])
    metrics = sums_of(found, tiny_model.model, first_step(found, tiny_model.model))
    assert metrics.metrics["accuracy"].item() / metrics.weight.item() > 0.8


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pair_raises_chosen_against_rejected(loss: str, settings: Recipe, tiny_model: Loaded) -> None:
    """A step along the gradient of a batch of one pair (kto: of either answer) moves the log-probabilities so."""
    found = objective(settings(loss, pairs(2)[:1], **{"batch.rows": 1}), tiny_model)
    model = tiny_model.model
    row = found.rows[0]
    answers = [answer for r in found.rows for answer in completions_of(r)] if loss == "kto" else completions_of(row)
    goods = [r.label for r in found.rows] if loss == "kto" else [True, False]
    split = Split(model)

    def sums() -> dict[bool, float]:
        a = stack(answers)
        values = rows_logprobs(split, a.ids, a.positions, a.labels, grad=False)
        return dict(zip(goods, row_sums(values, a.owners, 2).tolist()))

    before = sums()
    trained(found, model, 2, 1e-3)  # of kto: one step on each answer
    after = sums()
    gain = {good: after[good] - before[good] for good in (True, False)}
    assert gain[True] - gain[False] > 1e-3


def test_the_first_loss_is_that_of_no_preference(settings: Recipe, tiny_model: Loaded) -> None:
    """The policy is the reference at first: DPO is ln 2, IPO 1 / (2 beta)^2, hinge 1, KTO 1/2, and the KL is 0."""
    wanted = {"dpo": math.log(2), "ipo": 25.0, "hinge": 1.0, "kto": 0.5}
    for loss, value in wanted.items():
        found = objective(settings(loss), tiny_model)
        tiny_model.model.train()
        sums = sums_of(found, tiny_model.model, first_step(found, tiny_model.model))
        assert (sums.total / sums.weight).item() == pytest.approx(value, abs=1e-4)
        assert sums.metrics["kl"].item() == pytest.approx(0, abs=1e-6)
        attach_nothing(tiny_model)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "kto"])
def test_a_margin_of_rounding_size_is_a_tie(loss: str, settings: Recipe, tiny_model: Loaded) -> None:
    """A reference whose numbers were computed in batches of other shapes is the policy, but for the last bit or two."""
    found = objective(settings(loss, **{"batch.rows": 24}), tiny_model)
    step = first_step(found, tiny_model.model)
    (batch,) = step.micro_batches
    a = batch.data
    tokens = found.sharing(tiny_model.model).logprobs(a, grad=False)

    def against(reference: mx.array) -> LossSum:
        data = replace(a, reference=reference)
        return sums_of(found, tiny_model.model, replace(step, micro_batches=[replace(batch, data=data)]))

    ulps = mx.where(mx.random.uniform(shape=tokens.shape, key=mx.random.key(0)) < 0.5, 1.0, -1.0) * 2.0**-23
    sums = against(tokens * (1 + ulps))
    assert sums.metrics["margin"].item() != 0
    assert (sums.metrics["accuracy"] / sums.weight).item() == 0.5
    better = a.good[a.owners] if loss == "kto" else a.owners < a.lengths.size // 2
    sums = against(tokens - mx.where(better, 1e-3, -1e-3))
    assert sums.metrics["accuracy"].item() == sums.weight.item()


def test_ipo_is_of_means_over_tokens(settings: Recipe, tiny_model: Loaded) -> None:
    """An answer twice as long, with the same log-ratio a token, has the same loss: (h - 1 / (2 beta))^2, h a token's.

    With every token of the chosen answers 0.5 and of the rejected 0.1 nats above the reference, h is 0.4.
    """
    rows = [{"prompt": "the", "chosen": "in on at" * (1 + i), "rejected": "of" * (3 - i)} for i in range(3)]
    found = objective(settings("ipo", rows, preference={"beta": 0.25}, **{"batch.rows": 3}), tiny_model)
    step = first_step(found, tiny_model.model)
    (batch,) = step.micro_batches
    tokens = found.sharing(tiny_model.model).logprobs(batch.data, grad=False)
    data = replace(batch.data, reference=tokens - mx.where(batch.data.owners < 3, 0.5, 0.1))
    sums = sums_of(found, tiny_model.model, replace(step, micro_batches=[replace(batch, data=data)]))
    assert (sums.total / sums.weight).item() == pytest.approx((0.4 - 2) ** 2, rel=1e-4)
    names = ("rewards_chosen", "rewards_rejected", "margin", "accuracy")
    means = {name: (sums.metrics[name] / sums.weight).item() for name in names}
    assert means == pytest.approx(dict(zip(names, (0.125, 0.025, 0.1, 1.0))), rel=1e-4)


def attach_nothing(loaded: Loaded) -> None:
    """Take the adapter off again."""
    from mlx.utils import tree_unflatten

    from mlxft.model.layers import LowRank

    bare = [(name, m.base) for name, m in loaded.model.named_modules() if isinstance(m, LowRank)]
    loaded.model.update_modules(tree_unflatten(bare))


def test_losses_are_the_functions_of_sums_and_means(settings: Recipe, tiny_model: Loaded) -> None:
    """Against the pure functions, on log-probabilities of whole logits; nll, gamma and smoothing included."""
    model, rows = tiny_model.model, pairs(3)
    rows[2]["rejected"] = [rows[2]["rejected"], "z"]  # two pairs that count half each
    own: dict[str, dict[str, float]] = {
        "dpo": {"beta": 0.3, "label_smoothing": 0.2, "nll": 0.5},
        "ipo": {"beta": 0.3},
        "hinge": {"beta": 0.3},
        "simpo": {"gamma": 0.7},
        "orpo": {},
        "cpo": {"label_smoothing": 0.1},
    }
    for loss, given in own.items():
        found = objective(settings(loss, rows, preference=given, **{"batch.rows": 9}), tiny_model)
        a = stack([completions_of(row)[i] for i in (0, 1) for row in found.rows])
        ref = row_sums(rows_logprobs(Split(model), a.ids, a.positions, a.labels, grad=False), a.owners, 8)
        model.update(tree_map(lambda v: v + 0.02, model.trainable_parameters()))
        sums = row_sums(rows_logprobs(Split(model), a.ids, a.positions, a.labels, grad=False), a.owners, 8)
        (c, r), (rc, rr) = (mx.split(x, 2) for x in (sums, ref))
        mc, mr = mx.split(sums / a.lengths, 2)
        losses = {
            "dpo": F.dpo(c, r, rc, rr, 0.3, 0.2) - 0.5 * mc,
            "ipo": F.ipo(mc, mr, *mx.split(ref / a.lengths, 2), 0.3),
            "hinge": F.hinge(c, r, rc, rr, 0.3),
            "simpo": F.simpo(mc, mr, 2.0, 0.7),
            "orpo": F.odds_ratio(mc, mr, 0.1) - mc,
            "cpo": F.cpo(c, r, 0.1, 0.1) - mc,
        }
        weights = mx.array([row.weight for row in found.rows])
        got = sums_of(found, model, first_step(found, model))
        assert got.weight.item() == 3
        assert got.total.item() == pytest.approx((losses[loss] * weights).sum().item(), rel=1e-4), loss
        attach_nothing(tiny_model)


# The reference


def test_the_reference_of_a_trained_adapter_is_that_adapter(settings: Recipe, tmp_path: Path) -> None:
    first = train(settings("orpo"))
    more = {"model.adapter": str(first.dir), "tune.rank": None, "run.name": "b", "run.steps": 1, "optim.lr": 1e-9}
    second = train(settings("dpo", **more))
    assert second.metrics("train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert second.metrics("train")[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_precomputed_or_asked_each_time_is_the_same_run(loss: str, settings: Recipe) -> None:
    held = {"data.valid": 0.25}
    one = train(settings(loss, **held))
    other = train(settings(loss, preference={"precompute": True}, **held, **{"run.name": "b"}))
    assert (other.dir / "reference.npz").exists()
    for event in ("train", "eval"):
        first, second = ([e["loss"] for e in run.metrics(event)] for run in (one, other))
        np.testing.assert_allclose(first, second, rtol=1e-4)


def test_precomputed_numbers_of_other_rows_or_damaged_ones_are_not_used(settings: Recipe) -> None:
    changes = settings("dpo", preference={"precompute": True})
    run = train(changes)
    kept = (run.dir / "reference.npz").read_bytes()
    before = run.metrics("train")
    for damaged in (kept[:100], b"", kept):
        shutil.rmtree(run.dir / "checkpoints")
        (run.dir / "reference.npz").write_bytes(damaged)
        again = train(changes, resume=True)
        assert [e["loss"] for e in again.metrics("train")] == [e["loss"] for e in before]
    assert (run.dir / "reference.npz").read_bytes()[:2] == b"PK"


def test_precomputed_numbers_of_other_weights_at_the_same_path_are_not_used(
    settings: Recipe, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_dir(tmp_path / "model")
    changes = settings("dpo", preference={"precompute": True}, **{"model.path": str(folder), "run.steps": 1})
    run = train(changes)
    shutil.rmtree(run.dir / "checkpoints")
    weights = cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))
    weights = {k: v[::-1] if v.ndim > 1 else v for k, v in weights.items()}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    again = train(changes, resume=True)
    assert again.metrics("train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert again.metrics("train")[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_whole_weights_have_their_own_beginning_as_the_reference(settings: Recipe) -> None:
    run = train(settings("dpo", **{"tune": {"method": "full"}, "optim.lr": 1e-3, "run.steps": 8}))
    losses = [e["loss"] for e in run.metrics("train")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.6
    assert run.metrics("train")[-1]["kl"] > 0.01


# KTO


def test_kto_takes_answers_without_a_pair(settings: Recipe, tiny_model: Loaded) -> None:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in pairs(5)]
    rows += [{"prompt": r["prompt"], "completion": r["rejected"], "label": False} for r in pairs(3)]
    found = objective(settings("kto", rows, **{"data.format": "unpaired", "batch.rows": 8}), tiny_model)
    batch = first_batch(found, tiny_model.model)
    assert batch.data.good.sum().item() == 5
    assert len(batch.rows) == 8
    one = "all rows have one prompt"
    assert not any(one in note for note in found.notes)
    changes = {"data.format": "unpaired", "preference": {"precompute": True}}
    same = settings("kto", [{**row, "prompt": "x"} for row in rows], **changes)
    first, second = make_objective(parse_config(same), tiny_model.tokenizer).notes
    assert "of 16 completions are computed before the first step" in first
    assert one in second


def test_kto_tells_the_implicit_rewards_of_good_and_bad_answers(
    settings: Recipe, tiny_model: Loaded, tmp_path: Path
) -> None:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i < 2} for i, r in enumerate(pairs(5))]
    changes = {"data.format": "unpaired", "data.valid": write(tmp_path / "v.jsonl", rows), "batch.rows": 2}
    found, model = objective(settings("kto", rows, **changes), tiny_model), tiny_model.model
    model.update(tree_map(lambda v: v + 0.03, model.trainable_parameters()))
    wanted: dict[bool, list[float]] = {True: [], False: []}
    for step in found.valid_steps(model):
        (batch,) = step.micro_batches
        a = batch.data
        policy = rows_logprobs(Split(model), a.ids, a.positions, a.labels, grad=False)
        log_ratios = row_sums(policy - a.reference, a.owners, len(batch.rows)).tolist()
        for good, value in zip(a.good.tolist(), log_ratios):
            wanted[bool(good)].append(0.1 * value)
    told = validate(model, found)
    assert told["rewards_chosen"] == pytest.approx(sum(wanted[True]) / 2, abs=1e-5)
    assert told["rewards_rejected"] == pytest.approx(sum(wanted[False]) / 3, abs=1e-5)
    assert told["rewards_chosen"] != told["rewards_rejected"]


def test_kl_is_that_of_the_other_losses_and_the_reference_point_stands_beside_it(
    settings: Recipe, tiny_model: Loaded
) -> None:
    """Pairs taken apart are the same answers: so is their KL, also where the reference point is held at 0."""
    changes = {"batch.rows": 64, "data.valid": 0.5}
    first = objective(settings("dpo", pairs(6), **changes), tiny_model)
    second = make_objective(parse_config(settings("kto", pairs(6), **changes)), tiny_model.tokenizer)
    model = tiny_model.model
    second.prepare(model)
    model.update(tree_map(lambda v: v + 0.03, model.trainable_parameters()))
    told = {"dpo": validate(model, first), "kto": validate(model, second)}
    assert told["kto"]["kl"] == pytest.approx(told["dpo"]["kl"], rel=1e-4)
    assert told["kto"]["kl"] > 0.01
    assert told["kto"]["reference_point"] != told["kto"]["kl"]


def test_a_prompt_with_several_rejected_answers_counts_once_for_kto_too(settings: Recipe, tiny_model: Loaded) -> None:
    """One good answer and three bad ones, of a third each, as the pairs they make count one in all."""
    first, second = pairs(2)
    rows = [{**first, "rejected": ["z", "z z", "z z z"]}, second]
    found = objective(settings("kto", rows, **{"batch.rows": 8}), tiny_model)
    step = first_step(found, tiny_model.model)
    (batch,) = step.micro_batches
    whose = dict.fromkeys(batch.rows, 0.0)
    good, weights = batch.data.good.tolist(), batch.data.weights.tolist()
    for where, label, weight in zip(batch.rows, good, weights):
        assert weight == pytest.approx(1 if label or where.endswith(":2") else 1 / 3)
        whose[where] += weight
    assert list(whose.values()) == pytest.approx([2, 2])
    assert found.summary().counts["tokens"] == batch.tokens
    sums = sums_of(found, tiny_model.model, step)
    assert (sums.weight.item(), sums.total.item()) == pytest.approx((4, 2), abs=1e-5)  # before the first step: 1/2 each


def test_the_reference_point_is_of_the_whole_step_and_of_other_prompts(settings: Recipe, tiny_model: Loaded) -> None:
    changes = {"batch.rows": 4, "batch.accumulate": 3, "preference": {"beta": 1.0}}
    found = objective(settings("kto", pairs(6), **changes), tiny_model)
    model = tiny_model.model
    model.update(tree_map(lambda v: v + 0.03, model.trainable_parameters()))
    points = [batch.data.point.item() for batch in first_step(found, model).micro_batches]
    assert len(points) == 3
    assert len(set(points)) == 1
    prompts = [row.prompt_ids.tolist() for row in found.rows]
    assert all(prompts[p] != prompts[i] for i, p in enumerate(found._partners[0]))
    answers = [found._mismatched(i, False) for i in range(12)]
    a = stack(answers)
    policy = rows_logprobs(Split(model), a.ids, a.positions, a.labels, grad=False)
    model.update(tree_map(lambda v: v - 0.03, model.trainable_parameters()))
    reference = rows_logprobs(Split(model), a.ids, a.positions, a.labels, grad=False)
    wanted = max(0.0, (policy - reference).sum().item() / 12)
    assert points[0] == pytest.approx(wanted, rel=1e-3, abs=1e-4)


# Refusals


def test_a_tie_is_refused_by_its_place(settings: Recipe, tiny_tokenizer: Any) -> None:
    rows = pairs(3)
    rows[1]["tie"] = True
    for loss in ("dpo", "kto"):
        with pytest.raises(DataError, match=rf"pairs\.jsonl:2: is a tie, which loss {loss} cannot learn from"):
            make_objective(parse_config(settings(loss, rows)), tiny_tokenizer)


@pytest.mark.parametrize(
    ("loss", "own", "message"),
    [
        ("ipo", {"label_smoothing": 0.1}, "loss ipo has no label_smoothing; it is for dpo, cpo"),
        ("dpo", {"gamma": 1.0}, "loss dpo has no gamma; it is for simpo"),
        ("orpo", {"precompute": True}, "loss orpo has no reference to precompute"),
        ("kto", {"nll": 1.0}, "loss kto has no nll"),
        ("dpo", {"good_weight": 1.0}, "loss dpo has no good_weight; it is for kto"),
        ("dop", {}, "preference.loss: expected .*did you mean dpo"),
    ],
)
def test_a_setting_that_would_not_act_is_refused(
    loss: str, own: dict[str, Any], message: str, settings: Recipe
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(settings(loss, preference=own))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_margins_that_do_not_act_are_said(loss: str, settings: Recipe, tiny_tokenizer: Any) -> None:
    rows = [{**row, "margin": 1} for row in pairs(3)]
    found = make_objective(parse_config(settings(loss, rows)), tiny_tokenizer)
    assert f"3 rows have a margin, which loss {loss} does not use" in found.summary().notes


def test_kto_and_pairs_want_their_own_formats(settings: Recipe, tiny_tokenizer: Any) -> None:
    for loss, form in (("dpo", "unpaired"), ("kto", "ratings")):
        with pytest.raises(ConfigError, match=f"data.format: {form} is not for objective preference"):
            make_objective(parse_config(settings(loss, **{"data.format": form})), tiny_tokenizer)


# Resume


@pytest.mark.parametrize(("loss", "precompute"), [("dpo", False), ("dpo", True), ("orpo", None), ("kto", False)])
def test_resume_is_exact(loss: str, precompute: bool | None, settings: Recipe) -> None:
    """Stopped after two of four steps and gone on: the same weights and numbers as in one go."""
    own = {} if precompute is None else {"precompute": precompute}
    changes = {"batch.accumulate": 2, "run.save_every": 2, "run.keep": 9, "preference": own}
    whole = train(settings(loss, **changes))
    stopped = settings(loss, **changes, **{"run.name": "b"})
    run = train(stopped)
    for folder in (run.dir / "checkpoints").iterdir():
        if int(folder.name[5:]) > 2:
            shutil.rmtree(folder)
    shutil.rmtree(run.result)
    resumed = train(stopped, resume=True)
    assert weights(whole) == weights(resumed)
    first, second = ([(e["step"], e["loss"]) for e in r.metrics("train")] for r in (whole, resumed))
    assert first == second


def weights(run: Run) -> bytes:
    return (run.result / "adapters.safetensors").read_bytes()
