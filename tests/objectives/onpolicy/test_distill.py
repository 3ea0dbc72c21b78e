"""Distillation: known minimisers, TRL's numbers, exact on-policy gradients, teachers of every kind, stored or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxft
from mlxft.build import base_skeleton
from mlxft.config import parse_config
from mlxft.errors import ConfigError, DataError, TrainingError
from mlxft.model import logits as logits_module
from mlxft.model.frozen import frozen_residents
from mlxft.model.load import load_tokenizer
from mlxft.objectives import functional as F
from mlxft.objectives.distill import Distill, StoredTeacher, store_teacher, stretches_of
from mlxft.objectives.rollouts import Rollout

from .conftest import build_words
from .test_kin import made, moved, quietly

Words = Callable[..., Path]
Settings = Callable[..., dict[str, Any]]
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "distill.json").read_text())
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
V = 8


@pytest.fixture
def distil(words: Words, tmp_path: Path) -> Settings:
    """`distil({"divergence": "jsd"}, **{"run.steps": 3})`: a uniform student of 8 words, w7 its EOS, and a teacher."""
    rows = [{"prompt": " ".join(f"w{(i + k) % 3}" for k in range(1 + i % 3))} for i in range(12)]
    given = [{**row, "completion": f" w{i % 7} w{(3 * i + 1) % 7}"} for i, row in enumerate(rows)]
    for name, some in (("prompts", rows), ("given", given)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    teacher = str(words(V, eos=True, spread=0.4))

    def make(own: dict[str, Any], given: bool = False, **changes: Any) -> dict[str, Any]:
        kind = ("given", "prompt-completion") if given else ("prompts", "prompts")
        settings: dict[str, Any] = {
            "objective": "distill",
            "model": {"path": str(words(V, eos=True)), "dtype": "float32"},
            "tune": {"method": "full"},
            "data": {"train": str(tmp_path / f"{kind[0]}.jsonl"), "format": kind[1], "template": "none"},
            "rollout": {"prompts": 4},
            "distill": {"teacher": teacher, **own},
            "optim": {"name": "adam", "lr": 1e-2, "schedule": "constant", "warmup": 0},
            "run": {"dir": str(tmp_path / "runs"), "name": "a", "steps": 4, "report_every": 1, "save_every": 1000},
        }
        settings["data"]["max_length"] = 32
        if settings["distill"].get("on_policy", 1):
            settings["rollout"] |= {"max_tokens": 3}
        for key, value in changes.items():
            section, _, leaf = key.partition(".")
            settings.setdefault(section, {})[leaf] = value
        return settings

    return make


def load_teacher(settings: dict[str, Any]) -> nn.Module:
    return mlxft.load(settings["distill"]["teacher"]).model


def log_softmax(x: Any) -> Any:
    x = np.asarray(x, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def plain(mine: Any, theirs: Any, beta: float) -> Any:
    """Agarwal et al. 2024, section 2 and eq. 1, in float64, from log-probabilities."""
    p, q = np.exp(theirs), np.exp(mine)
    if beta in (0.0, 1.0):
        return (p * (theirs - mine)).sum(-1) if beta == 0 else (q * (mine - theirs)).sum(-1)
    m = np.log(beta * p + (1 - beta) * q)
    return (beta * p * (theirs - m) + (1 - beta) * q * (mine - m)).sum(-1)


# The mathematics.


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['beta']}-{c['temperature']}")
def test_divergences_and_their_gradients_are_trls(case: dict[str, Any]) -> None:
    student, teacher = mx.array(GOLDEN["student"]), mx.array(GOLDEN["teacher"])
    keep = mx.array((np.array(GOLDEN["labels"]) != -100).astype(np.float32)).reshape(-1)

    def loss(x: mx.array) -> mx.array:
        both = (F.log_softmax(x.reshape(-1, x.shape[-1]), case["temperature"]) for x in (x, teacher))
        return (F.divergence(*both, case["beta"]) * keep).sum()

    value, slope = mx.value_and_grad(loss)(student)
    assert value.item() == pytest.approx(case["loss"], rel=1e-5)
    np.testing.assert_allclose(slope, case["gradient"], atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["chunked"]["cases"], ids=lambda c: f"{c['beta']}-{c['temperature']}")
def test_divergences_from_hidden_states_are_trls(case: dict[str, Any]) -> None:
    g = {k: mx.array(v) for k, v in GOLDEN["chunked"].items() if k not in ("cases", "source")}

    def each(hidden: mx.array, weight: mx.array) -> mx.array:
        theirs = g["teacher_hidden"] @ g["teacher_weight"].T
        both = (F.log_softmax(x, case["temperature"]) for x in (hidden @ weight.T, theirs))
        return F.divergence(*both, case["beta"])

    np.testing.assert_allclose(each(g["hidden"], g["weight"]), case["divergence"], rtol=1e-5, atol=1e-6)
    slopes = mx.grad(lambda *x: each(*x).sum(), argnums=(0, 1))(g["hidden"], g["weight"])
    for slope, name in zip(slopes, ("hidden", "weight")):
        np.testing.assert_allclose(slope, case[name], atol=1e-5)


def test_jsd_goes_to_both_kls() -> None:
    """Divided by beta, and by 1 - beta: the limits of Agarwal et al. 2024, appendix."""
    mine, theirs = (F.log_softmax(mx.random.normal((5, 9), key=mx.random.key(i))) for i in (1, 2))
    small = 1e-2
    np.testing.assert_allclose(F.divergence(mine, theirs, small) / small, F.divergence(mine, theirs, 0.0), rtol=0.05)
    near = F.divergence(mine, theirs, 1 - small) / small
    np.testing.assert_allclose(near, F.divergence(mine, theirs, 1.0), rtol=0.05)


def test_shares_are_those_of_the_whole_distribution() -> None:
    x = 4 * mx.random.normal((6, 20), key=mx.random.key(0))
    top = mx.argpartition(-x, 4, axis=-1)[:, :5]
    shares = np.array(F.log_shares(x, top, 2.0))
    whole = log_softmax(np.array(x) / 2)
    picked = np.take_along_axis(whole, np.array(top), -1)
    np.testing.assert_allclose(shares[:, :-1], picked, rtol=1e-5)
    np.testing.assert_allclose(np.exp(shares[:, -1]), 1 - np.exp(picked).sum(-1), atol=1e-5)
    every = mx.broadcast_to(mx.arange(20), (6, 20))
    full = F.log_shares(x, every)
    for beta in (0.0, 0.3, 1.0):
        other = F.log_shares(-x, every)
        np.testing.assert_allclose(
            F.divergence(full, other, beta), F.divergence(F.log_softmax(x), F.log_softmax(-x), beta), rtol=1e-4
        )
        gradient = mx.grad(lambda y, b=beta, o=other: F.divergence(F.log_shares(y, every), o, b).sum())(x)
        assert mx.isfinite(gradient).all().item()


# Known minimisers. The student's hidden state is the same everywhere, because all of its embeddings are: it has one
# distribution for all contexts, and its teacher, which has another for each, is outside its family.


def constant_student(folder: Path, head: Any = None) -> str:
    """A student without context: 8 words, whose embeddings are all equal; `head` (8, 32) is its output layer."""
    build_words(folder, V, eos=True)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.embed_tokens.weight"
    weights[name] = mx.broadcast_to(weights[name][:1] * 50, weights[name].shape)
    if head is not None:
        weights["lm_head.weight"] = mx.array(head.astype(np.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return str(folder)


def best(wanted: Any, beta: float, features: Any) -> Any:
    """The minimiser of the mean divergence over contexts (C, 8), among softmax(features @ theta), by Newton's method
    with numeric derivatives: the log-probabilities."""
    theta = np.zeros(features.shape[1])
    mean = lambda t: plain(log_softmax(features @ t)[None], wanted, beta).mean()  # noqa: E731
    rate = 1.0
    eye = 1e-5 * np.eye(len(theta))
    for _ in range(4000):
        slope = np.array([(mean(theta + e) - mean(theta - e)) / 2e-5 for e in eye])
        while mean(theta - rate * slope) > mean(theta) and rate > 1e-12:
            rate /= 2
        theta, rate = theta - rate * slope, rate * 1.5
        if np.abs(slope).max() < 1e-9:
            break
    return log_softmax(features @ theta)


@pytest.mark.learning
@pytest.mark.parametrize("kind", BETAS)
def test_each_divergence_has_its_own_minimiser(distil: Settings, tmp_path: Path, kind: str) -> None:
    """Completions are each of 7 words and EOS, after w0: two contexts a row. The free student's minimiser is known in
    closed form: of forward KL the mean of the teacher's distributions, of reverse KL their geometric mean."""
    rows = [{"prompt": "w0", "completion": f" w{i}"} for i in range(V - 1)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = distil({"divergence": kind, "on_policy": 0.0}, True, **{"data.train": str(tmp_path / "two.jsonl")})
    settings["model"]["path"] = constant_student(tmp_path / "student")
    settings["tune"] = {"method": "full", "train": ["lm_head"]}
    settings["rollout"], settings["optim"]["lr"] = {"prompts": V - 1}, 0.02
    settings["optim"]["schedule"] = "cosine"
    settings["run"]["steps"] = 300
    teacher = load_teacher(settings)
    said = [log_softmax(np.array(teacher(mx.array([[0, i]])))[0]) for i in range(V - 1)]
    contexts = np.concatenate(said)  # (14, 8): after w0, and after w0 wi
    wanted = {
        "forward_kl": lambda: np.log(np.exp(contexts).mean(axis=0)),
        "reverse_kl": lambda: log_softmax(contexts.mean(axis=0)),
        "jsd": lambda: best(contexts, 0.5, np.eye(V)),
    }[kind]()
    model = mlxft.load(quietly(settings)).model
    found = log_softmax(np.array(model(mx.array([[0, 3, 5]])))[0])
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)  # it has no context
    np.testing.assert_allclose(np.exp(found[0]), np.exp(wanted), rtol=0.01)
    spread = np.exp(wanted).max() / np.exp(wanted).min()
    assert spread > 1.5, "a uniform student would do"


@pytest.mark.learning
def test_forward_kl_keeps_the_moments_and_reverse_kl_takes_a_mode(distil: Settings, tmp_path: Path) -> None:
    """A student of two numbers, logits a k + b k^2 for word k, and a teacher with two modes that is not of that family.

    Forward KL's minimiser has the teacher's E[k] and E[k^2]; reverse KL's lies on one of the modes.
    """
    k = np.linspace(-1, 1, V)
    head = np.zeros((V, 32))
    head[:, 0], head[:, 1] = 4 * k, 4 * k**2
    theirs = np.exp(-0.5 * ((k + 0.7) / 0.15) ** 2) * 1.5 + np.exp(-0.5 * ((k - 0.7) / 0.15) ** 2) + 1e-4
    theirs /= theirs.sum()
    build_words(tmp_path / "teacher", V, eos=True)
    weights = dict(mx.load(str(tmp_path / "teacher" / "model.safetensors")))
    embedding = mx.broadcast_to(weights["model.embed_tokens.weight"][:1] * 50, (V, 32))
    weights["model.embed_tokens.weight"] = embedding
    mx.save_safetensors(str(tmp_path / "teacher" / "model.safetensors"), weights, {"format": "mlx"})
    hidden = np.array(mlxft.load(str(tmp_path / "teacher")).model.model(mx.array([[0]])))[0, 0]
    weights["lm_head.weight"] = mx.array(np.outer(np.log(theirs), hidden / (hidden @ hidden)).astype(np.float32))
    mx.save_safetensors(str(tmp_path / "teacher" / "model.safetensors"), weights, {"format": "mlx"})
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"prompt": "w0", "completion": " w1"}) + "\n")
    found = {}
    for kind, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0)):
        settings = distil({"divergence": kind, "on_policy": 0.0}, True, **{"data.train": str(rows), "run.name": kind})
        settings["model"]["path"] = constant_student(tmp_path / f"student-{kind}", head)
        settings["distill"]["teacher"] = str(tmp_path / "teacher")
        settings["tune"] = {"method": "full", "train": ["model.norm"]}
        settings["rollout"] = {"prompts": 1}
        settings["optim"] |= {"lr": 0.1, "schedule": "cosine"}
        settings["run"]["steps"] = 250
        model = mlxft.load(quietly(settings)).model
        found[kind] = np.exp(log_softmax(np.array(model(mx.array([[0]])))[0, 0]))
        if kind == "forward_kl":
            wanted = np.exp(best(np.log(theirs)[None], beta, np.stack([k, k**2], axis=1)))
            np.testing.assert_allclose(found[kind], wanted, rtol=0.01)
    for power in (1, 2):
        assert (found["forward_kl"] * k**power).sum() == pytest.approx((theirs * k**power).sum(), rel=0.01)
    low, high = found["reverse_kl"][: V // 2].sum(), found["reverse_kl"][V // 2 :].sum()
    assert max(low, high) > 0.99
    mode = slice(0, V // 2) if low > high else slice(V // 2, V)
    assert np.argmax(found["reverse_kl"]) == np.argmax(np.where(np.isin(np.arange(V), np.arange(V)[mode]), theirs, 0))


def gradient(objective: Distill, model: nn.Module, data: Any) -> dict[str, Any]:
    """Of the sum over a batch's tokens, by parameter."""
    _, slopes = nn.value_and_grad(model, lambda: objective.loss(model, data).losses["divergence"])()
    return {name: np.array(value, dtype=np.float64) for name, value in tree_flatten(slopes)}


@pytest.mark.learning
@pytest.mark.parametrize("kind", BETAS)
def test_the_on_policy_gradient_is_the_exact_one(distil: Settings, kind: str) -> None:
    """Over enough samples of up to two tokens: each context's divergence weighs as often as the student comes there."""
    settings = distil({"divergence": kind}, **{"rollout.samples": 4096, "rollout.max_tokens": 2, "rollout.prompts": 1})
    objective, model = made(settings)
    moved(model, 0.1)
    chosen = objective._chosen(0)
    rollout, _ = objective.roll(model)
    sampled: dict[str, Any] = {}
    for rows in np.array_split(np.arange(len(rollout)), 8):
        for name, value in gradient(
            objective, model, objective.batch(rollout, rows.tolist(), objective.prompts)
        ).items():
            sampled[name] = sampled.get(name, 0.0) + value / len(rollout)
    first = np.exp(log_softmax(np.array(model(mx.array(objective.prompts[chosen[0]].ids)[None]))[0, -1]))
    exact: dict[str, Any] = {}
    for word in range(V):
        # Its first token's context is the prompt, once in all; after EOS nothing follows.
        ids = [np.array([word], np.int32), np.array([word, 0], np.int32)]
        one, two = (
            gradient(objective, model, objective.batch(Rollout(0, chosen, [reply], []), [0], objective.prompts))
            for reply in ids
        )
        for name, value in one.items():
            after = two[name] - value if word != V - 1 else 0.0
            exact[name] = exact.get(name, 0.0) + value / V + first[word] * after
    a, b = (np.concatenate([g[name].ravel() for name in sorted(exact)]) for g in (sampled, exact))
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.999
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=0.05)


# What is computed.


@pytest.mark.invariant
@pytest.mark.parametrize("kind", BETAS)
def test_chunks_give_what_whole_logits_give(distil: Settings, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(logits_module, "chunk_size", lambda vocabulary: 5)
    settings = distil({"divergence": kind, "temperature": 1.5, "on_policy": 0.5}, True)
    settings["distill"] |= {"beta": 0.3} if kind == "jsd" else {}
    objective, model = made(settings)
    moved(model)
    rollout, _ = objective.roll(model)
    data = objective.batch(rollout, range(len(rollout)), objective.prompts)
    found = np.array(objective.divergences(data, grad=True))
    teacher = load_teacher(settings)
    at = np.array(data.positions)
    mine, theirs = (
        log_softmax(np.array(m(data.ids)).reshape(-1, V)[at].astype(np.float64) / 1.5) for m in (model, teacher)
    )
    np.testing.assert_allclose(found, plain(mine, theirs, 0.3 if kind == "jsd" else BETAS[kind]), atol=1e-5)


@pytest.mark.invariant
def test_micro_batches_and_padding_change_nothing(distil: Settings) -> None:
    sums = []
    for rows in (None, 1):
        objective, model = made(distil({}, **({"batch.rows": rows} if rows else {})))
        moved(model)
        step = next(objective.steps(model))
        assert len(step.micro_batches) == (4 if rows else 1)
        slopes = [gradient(objective, model, m.data) for m in step.micro_batches]
        sums.append({name: sum(s[name] for s in slopes) / step.per["divergence"] for name in slopes[0]})
    for name, value in sums[0].items():
        np.testing.assert_allclose(sums[1][name], value, atol=1e-6)


CASES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"on_policy": 0.5, "divergence": "jsd", "minibatches": 2, "epochs": 2}, True),
    ({"on_policy": 0.0, "divergence": "forward_kl"}, True),
    ({"teacher_prompt": "w5 w6"}, False),
]


@pytest.mark.invariant
@pytest.mark.parametrize(("own", "given"), CASES, ids=["sampled", "mixed", "given", "prompted"])
def test_killed_and_resumed_is_uninterrupted(distil: Settings, own: dict[str, Any], given: bool) -> None:
    changes = {"run.save_every": 3, "run.steps": 7, "run.eval_every": 2, "data.valid": 0.25}
    settings = distil(own, given, **changes)
    whole = quietly(settings)
    half = distil(own, given, **{**changes, "run.name": "b"})
    quietly({**half, "run": {**half["run"], "steps": 3}})
    resumed = quietly(half, resume=True)
    one, other = (mx.load(str(run.result / "model.safetensors")) for run in (whole, resumed))
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    losses = [[e["loss"] for e in run.metrics("train")] for run in (whole, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.invariant
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_teacher_never_changes(distil: Settings, method: str) -> None:
    settings = distil({"teacher": "base", "teacher_prompt": "w5 w6"}, **{"tune.method": method})
    settings["model"]["path"] = settings["distill"].pop("teacher") and load_path(distil)
    settings["distill"]["teacher"] = "base"
    objective, model = made(settings)
    rollout, _ = objective.roll(model)
    seen = []
    for _ in range(2):
        data = objective.batch(rollout, range(len(rollout)), objective.prompts)
        seen.append(np.array(data.hidden))
        moved(model)
    np.testing.assert_array_equal(*seen)
    wanted = load_teacher({"distill": {"teacher": settings["model"]["path"]}}).model
    row = objective.prompts[rollout.prompts[0]]
    ids = mx.array(np.concatenate([row.taught, rollout.replies[0]]))[None]
    assert len(row.taught) == len(row.ids) + 2
    size = len(rollout.replies[0])
    np.testing.assert_allclose(seen[0][:size], wanted(ids)[0, len(row.taught) - 1 : -1], atol=1e-5)


def load_path(distil: Settings) -> str:
    """A student that has something to say: the usual teacher."""
    return str(distil({})["distill"]["teacher"])


@pytest.mark.learning
def test_a_prompt_is_distilled_into_the_weights(distil: Settings) -> None:
    """Context distillation: without the prompt the student comes to say what its base says with it."""
    settings = distil({"teacher": "base", "teacher_prompt": "w5 w6"}, **{"run.steps": 60, "run.eval_every": 60})
    settings["model"]["path"], settings["tune"] = load_path(distil), {"method": "lora", "rank": 8}
    settings["data"]["valid"], settings["rollout"] = 0.25, {"prompts": 9, "samples": 8, "max_tokens": 3}
    settings["optim"] |= {"lr": 3e-3, "schedule": "cosine"}
    first = quietly(
        {**settings, "run": {**settings["run"], "name": "b", "steps": 1, "eval_every": 1}, "optim": {"lr": 1e-9}}
    )
    before = first.metrics("eval")[-1]["loss"]
    after = [e["loss"] for e in quietly(settings).metrics("eval")]
    assert min(after) < 0.3 * before, (before, after)


@pytest.mark.learning
def test_a_run_teaches_on_the_base_it_shares(distil: Settings, tmp_path: Path) -> None:
    """An adapter of the student's base is a role: no second base is in memory, and the plan knows."""
    rows = [{"prompt": f"w{i % 3}", "completion": " w4"} for i in range(6)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = {**distil({}, **{"model.path": load_path(distil)}), "objective": "sft", "tune": {"method": "lora", "rank": 4}}
    sft["data"] = {"train": str(tmp_path / "sft.jsonl"), "format": "prompt-completion", "template": "none"}
    sft |= {"run": {**sft["run"], "name": "teacher", "steps": 40}}
    del sft["distill"], sft["rollout"]
    teacher = quietly(sft)
    settings = distil({"teacher": str(teacher.dir)}, **{"run.steps": 80, "rollout.samples": 8, "run.name": "b"})
    settings["tune"], settings["model"]["path"] = {"method": "lora", "rank": 4}, load_path(distil)
    objective, _ = made(settings)
    assert objective.teacher.shared
    config = parse_config(settings)
    planned = frozen_residents(Distill.frozen(config), config, base_skeleton(config))
    assert not planned.apart
    assert planned.frozen["teacher"] == pytest.approx(sum(v.nbytes for v in objective.teacher.arrays()), abs=4096)
    run = quietly(settings)
    assert mlxft.generate(mlxft.load(run), "w1", temperature=0).split()[0] == "w4"


def test_a_teacher_may_have_other_shapes_and_fewer_bits(distil: Settings, tmp_path: Path, words: Words) -> None:
    """Another width, a padded output layer, and 4 bits."""
    settings = distil({})
    folder = build_words(tmp_path / "wide", V, eos=True, spread=0.4)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # 3 rows that stand for no token
        weights[name] = mx.concatenate([weights[name], 5 * mx.ones((3, 32))])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": V + 3}))
    objective, model = made(settings)
    padded, _ = made(distil({"teacher": str(folder)}))
    rollout, _ = objective.roll(model)
    found = [
        np.array(o.divergences(o.batch(rollout, range(len(rollout)), o.prompts), grad=False))
        for o in (objective, padded)
    ]
    np.testing.assert_allclose(*found, rtol=1e-5)
    quantised, _ = made(distil({"quantize": 4}))
    assert any("scales" in name for name, _ in tree_flatten(quantised.teacher.split.model.parameters()))
    plan = {}
    for bits in (None, 4):
        config = parse_config(distil({"quantize": bits}))
        plan[bits] = frozen_residents(Distill.frozen(config), config, base_skeleton(config)).frozen["teacher"]
    held = sum(v.nbytes for v in quantised.teacher.arrays())
    assert plan[4] == held < plan[None]


# A teacher with another tokenizer.


def build_letters(folder: Path) -> Path:
    """A teacher that reads letters: w, 0 to 7, a space, and its EOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    build_words(folder, 16, eos=True, spread=0.4)
    letters = {letter: i for i, letter in enumerate([*"w01234567 ", *"abcde", "</s>"])}
    backend = Tokenizer(models.WordLevel(letters, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(str(folder))
    return folder


def test_stretches_end_where_both_tokens_end() -> None:
    assert stretches_of([2, 5, 8], [1, 2, 5, 7, 8]) == ([0, 1, 2], [0, 0, 1, 2, 2], 3)
    assert stretches_of([3, 5], [2, 5]) == ([0, 0], [0, 0], 1)
    # A token that ends inside a character ends nothing; after the last common end nothing is compared.
    assert stretches_of([2, -1, 4], [2, 3]) == ([0, 1, 1], [0, 1], 1)


@pytest.mark.invariant
def test_a_teacher_with_another_tokenizer_is_read_by_its_text(distil: Settings, tmp_path: Path) -> None:
    """A word of the student is its letters by the teacher: their log-probabilities add up to the word's."""
    folder = build_letters(tmp_path / "letters")
    own = {"teacher": str(folder), "align": "text"}
    objective, model = made(distil(own, **{"rollout.samples": 4}))
    rollout, _ = objective.roll(model)
    data = objective.batch(rollout, range(len(rollout)), objective.prompts)
    teacher, at = mlxft.load(str(folder)), 0
    for i, reply in enumerate(rollout.replies):
        words = [f"w{token}" for token in reply if token != V - 1]
        prompt = list(teacher.tokenizer.encode(objective.prompts[rollout.prompts[i]].text))
        ended = reply[-1] == V - 1
        ids = [*prompt, *teacher.tokenizer.encode(" ".join(words)), *([15] if ended else [])]
        logprobs = log_softmax(np.array(teacher.model(mx.array([ids])))[0, :-1])
        each = logprobs[np.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :]
        ends = np.cumsum([len(word) + (place > 0) for place, word in enumerate(words)])
        wanted = [part.sum() for part in np.split(each, ends)][: len(words) + ended]
        np.testing.assert_allclose(data.said[at : at + len(reply)], wanted, atol=1e-4)
        assert data.stretches[at : at + len(reply)].tolist() == list(range(at, at + len(reply)))
        at += len(reply)
    values = np.array(objective.divergences(data, grad=True))
    assert values.shape == (at,)


def test_completions_without_a_common_end_are_not_compared(distil: Settings, tiny_model_dir: Path) -> None:
    """A tokenizer that knows no byte of the student's text: the step is of nothing, and it is said."""
    foreign = {"align": "text", "teacher": distil({})["model"]["path"]}
    settings = distil(foreign, **{"model.path": str(tiny_model_dir), "run.steps": 2})
    run = quietly(settings)
    assert "nothing was compared" in run.metrics("rollout")[-1]["warning"]
    assert [event["loss"] for event in run.metrics("train")] == [0, 0]
    settings["data"]["valid"], settings["run"]["name"] = 0.25, "b"
    with pytest.raises(TrainingError, match="in validation nothing was compared"):
        quietly(settings)


@pytest.mark.learning
def test_aligned_by_text_the_gradient_is_that_of_reverse_kl(distil: Settings, tmp_path: Path) -> None:
    """With the student's own tokenizer every stretch is a token: over enough samples both ways are one."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "w1 "}) + "\n")
    found = []
    for own in ({"align": "text"}, {}):
        changes = {"rollout.samples": 10000, "rollout.max_tokens": 1, "data.train": str(tmp_path / "one.jsonl")}
        objective, model = made(distil(own, **changes))
        moved(model, 0.1)
        rollout, _ = objective.roll(model)
        sums: dict[str, Any] = {}
        for rows in np.array_split(np.arange(len(rollout)), 8):
            data = objective.batch(rollout, rows.tolist(), objective.prompts)
            for name, value in gradient(objective, model, data).items():
                sums[name] = sums.get(name, 0.0) + value
            if own:
                assert objective.loss(model, data).metrics["compared"].item() == len(rows)
        found.append(np.concatenate([sums[name].ravel() for name in sorted(sums)]))
    a, b = found
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.99


# A stored teacher.


@pytest.mark.invariant
def test_a_stored_teacher_says_what_it_said(distil: Settings, tmp_path: Path) -> None:
    """With all tokens stored the divergence is the live one's, and the run needs no teacher."""
    own = {"on_policy": 0.0, "divergence": "jsd", "temperature": 2.0}
    live, model = made(distil(own, True, **{"data.valid": 0.25}))
    settings = distil({**own, "cache": str(tmp_path / "cache"), "top_k": 20}, True, **{"data.valid": 0.25})
    with pytest.raises(ConfigError, match="mlxft distill-cache RECIPE writes it"):
        made(settings)
    store_teacher(parse_config(settings), live.tokenizer)
    stored, other = made(settings)
    moved(model)
    moved(other)
    assert stored.teacher is None
    assert not Distill.frozen(parse_config(settings))
    rollout, event = live.roll(model)
    assert event is None, "nothing is sampled"
    again, _ = stored.roll(other)
    found = []
    for objective, r in ((live, rollout), (stored, again)):
        data = objective.batch(r, range(len(r)), objective.prompts)
        found.append(np.array(objective.divergences(data, grad=True)))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
    measured = [o.evaluate(m)["loss"] for o, m in ((live, model), (stored, other))]
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)
    assert stored.largest(other)[0]().micro_batches


@pytest.mark.invariant
def test_a_killed_store_goes_on_where_it_was(distil: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts the teacher samples the completions; the parts that are there stay."""
    monkeypatch.setattr("mlxft.objectives.distill._PART_ROWS", 5)

    def settings(name: str) -> dict[str, Any]:
        own = {"on_policy": 0.0, "cache": str(tmp_path / name), "top_k": 3}
        return distil(own, **{"rollout.max_tokens": 4, "data.valid": 0.25})

    tokenizer = load_tokenizer(settings("one")["model"]["path"])
    for name in ("one", "two"):
        assert store_teacher(parse_config(settings(name)), tokenizer)["rows"] == 12
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(files) == 1 + 3 * 3
    (tmp_path / "two" / "tokens-00001.npy").unlink()
    about = json.loads((tmp_path / "two" / "teacher.json").read_text())
    (tmp_path / "two" / "teacher.json").write_text(json.dumps({**about, "complete": False}))
    with pytest.raises(ConfigError, match=r"two is not complete; mlxft distill-cache RECIPE writes it, from where"):
        made(settings("two"))
    before = (tmp_path / "two" / "top-00000.npy").stat().st_mtime_ns
    store_teacher(parse_config(settings("two")), tokenizer)
    assert (tmp_path / "two" / "top-00000.npy").stat().st_mtime_ns == before
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    objective, model = made(settings("one"))
    assert isinstance(objective.stored, StoredTeacher)
    assert all(row.completion is not None for row in (*objective.prompts, *objective.valid))
    rollout, _ = objective.roll(model)
    assert {len(reply) for reply in rollout.replies} <= {1, 2, 3, 4}
    with pytest.raises(ConfigError, match=r"made of something else: temperature was 1.0 and is 3.0"):
        made({**settings("one"), "distill": {**settings("one")["distill"], "temperature": 3.0}})


def test_a_store_of_another_teacher_is_refused(distil: Settings, tmp_path: Path, words: Words) -> None:
    """The same name with other weights, and the base of another student; one that is not there cannot be compared."""
    folder = tmp_path / "teacher"
    shutil.copytree(words(V, eos=True, spread=0.4), folder)
    settings = distil({"on_policy": 0.0, "teacher": str(folder), "cache": str(tmp_path / "a")}, True)
    tokenizer = load_tokenizer(settings["model"]["path"])
    store_teacher(parse_config(settings), tokenizer)
    made(settings)
    (weights,) = folder.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConfigError, match="made of something else: the teacher's weights was"):
        made(settings)
    with pytest.raises(ConfigError, match="made of something else"):
        store_teacher(parse_config(settings), tokenizer)
    shutil.rmtree(folder)
    made(settings)
    settings = distil({"on_policy": 0.0, "teacher": "base", "teacher_prompt": "w1", "cache": str(tmp_path / "b")}, True)
    store_teacher(parse_config(settings), tokenizer)
    made(settings)
    with pytest.raises(ConfigError, match=r"model.path was .*, the teacher's weights was"):
        made({**settings, "model": {**settings["model"], "path": str(words(V, eos=True, spread=0.4))}})
    with pytest.raises(ConfigError, match=r"model.quantize was None and is 4"):
        made({**settings, "model": {**settings["model"], "quantize": 4}, "tune": {"method": "lora"}})


# What does not fit.


def test_where_memory_is_short_a_stored_teacher_is_the_way_out(distil: Settings) -> None:
    for changes in ({}, {"batch.tokens": "auto"}):
        settings = distil({}, **{"memory.limit": 1e-4, **changes})
        with pytest.raises(ConfigError, match=r"distill.quantize: 4, the teacher stored first \(mlxft distill-cache"):
            quietly(settings)
    settings = distil({"on_policy": 0.0}, True, **{"memory.limit": 1e-4})
    with pytest.raises(ConfigError, match=r"a smaller batch.tokens \(the step is the same\)"):
        quietly(settings)
    kind = distil({"quantize": 8, "align": "text"})  # which cannot be stored
    assert Distill.relief(parse_config(kind)) == []


def test_rows_beyond_the_teachers_context_are_noted(distil: Settings, words: Words) -> None:
    """The student's context has room for these prompts, and the teacher's has none for its own longer ones."""
    asked = " ".join(["w1"] * 62)
    for teacher in ("base", str(words(V, eos=True, spread=0.4))):
        objective, _ = made(distil({"teacher": teacher, "teacher_prompt": asked}))
        assert [n for n in objective.notes if "12 rows are longer than the teacher's context of 64" in n]


REFUSED: list[tuple[dict[str, Any], bool, dict[str, Any], str]] = [
    ({"teacher": "base"}, False, {}, "distill.teacher: is the student itself as training begins"),
    ({"beta": 0.3}, False, {}, "beta .0.3. is for divergence: jsd"),
    ({"on_policy": 0.5}, False, {}, "distill.on_policy: with 0.5, rows need a completion"),
    ({"cache": "x"}, False, {}, "cache: a stored teacher knows stored completions only"),
    ({"align": "text", "divergence": "jsd"}, False, {}, "divergence must be reverse_kl"),
    ({"align": "text", "epochs": 2}, False, {}, "epochs must be 1"),
    ({"top_k": 5}, False, {}, "top_k: is of a stored teacher"),
    (
        {"teacher": "base", "quantize": 4, "teacher_prompt": "w1"},
        False,
        {},
        "quantize: the teacher is the student's own",
    ),
    ({"on_policy": 0.0}, True, {"rollout.temperature": 0.7}, "rollout.temperature: nothing is sampled"),
    ({"on_policy": 0.5}, True, {"rollout.samples": 2}, "rollout.samples: a row has one completion"),
    ({}, False, {"data.max_length": 3}, "raise it above"),
    ({}, False, {"tune.dropout": 0.1}, "tune.dropout: the student that samples"),
    ({}, False, {"batch.pack": True}, "batch.pack: is not for objective distill"),
    ({"teacher": "nowhere/at-all/x"}, False, {}, "distill.teacher: model 'nowhere/at-all/x'"),
]


@pytest.mark.parametrize(("own", "given", "changes", "says"), REFUSED, ids=[says[:24] for *_, says in REFUSED])
def test_settings_that_do_not_fit(
    distil: Settings, own: dict[str, Any], given: bool, changes: dict[str, Any], says: str
) -> None:
    settings = distil(own, given, **changes)
    if changes.get("tune.dropout"):
        settings["tune"]["method"] = "lora"
    with pytest.raises(mlxft.errors.MlxftError, match=says):
        made(settings)


def test_a_refused_store_leaves_its_folder_free(distil: Settings, tmp_path: Path, tiny_model_dir: Path) -> None:
    own = {"on_policy": 0.0, "cache": str(tmp_path / "cache")}
    settings = distil(own, True)
    tokenizer = load_tokenizer(settings["model"]["path"])
    with pytest.raises(ConfigError, match="has another vocabulary"):
        store_teacher(parse_config(distil({**own, "teacher": str(tiny_model_dir)}, True)), tokenizer)
    store_teacher(parse_config(settings), tokenizer)
    made(settings)


def test_a_teacher_of_another_vocabulary_is_refused(distil: Settings, tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has another vocabulary than the student: .* ids stand for other tokens, the"
    ):
        made(distil({"teacher": str(tiny_model_dir)}))


def test_a_reward_model_is_no_teacher(distil: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "scores" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "head.safetensors").touch()
    for place in (folder, folder.parent):
        with pytest.raises(ConfigError, match="is a reward model, which gives scores, not text"):
            made(distil({"teacher": str(place)}))


def test_a_row_that_is_too_long_is_named_or_dropped(distil: Settings, tmp_path: Path) -> None:
    settings = distil({"on_policy": 0.0}, True, **{"data.max_length": 5})
    with pytest.raises(
        DataError, match=r"given.jsonl:3: 6 tokens, data.max_length is 5. Raise it, or set data.overflow"
    ):
        made(settings)
    settings["data"]["overflow"] = "drop"
    objective, _ = made(settings)
    assert len(objective.prompts) == 8
    assert any("4 rows are longer" in note for note in objective.notes)


def test_the_plan_counts_the_teacher(distil: Settings, tmp_path: Path) -> None:
    """Its weights, and its hidden states of a step, beside sampling and scoring."""
    objective, model = made(distil({}))
    around = objective.beside(model)
    weights = sum(v.nbytes for _, v in tree_flatten(objective.teacher.split.model.parameters()))
    assert around.residents.frozen["teacher"] == weights
    step = objective.largest(model)[0]()
    held = sum(m.data.hidden.nbytes for m in step.micro_batches)
    assert around.residents.frozen["what the teacher says"] >= held
    assert around.sampling > 0
    assert around.scoring > 0
    given, other = made(distil({"on_policy": 0.0}, True))
    assert given.beside(other).sampling == 0


def test_a_teacher_that_does_not_fit_names_the_way_out(distil: Settings) -> None:
    with pytest.raises(
        ConfigError, match=r"What helps: distill.quantize: 4, the teacher stored first \(mlxft distill-"
    ):
        quietly(distil({}, **{"memory.limit": 2e-5}))
    own = {"teacher": "base", "teacher_prompt": "w1"}
    with pytest.raises(ConfigError, match=r"What helps: a smaller"):
        quietly(distil(own, **{"memory.limit": 2e-5}))


def test_every_pair_of_tokens_can_be_distilled(distil: Settings) -> None:
    """Any completion of two words is one that the objective can read: positions and labels are those of its tokens."""
    objective, _ = made(distil({}))
    replies = [np.array(pair, np.int32) for pair in product(range(3), range(3))]
    data = objective.batch(Rollout(0, [0] * 9, replies, []), range(9), objective.prompts)
    assert data.labels.tolist() == [token for reply in replies for token in reply]
    assert data.hidden.shape == (18, 32)
