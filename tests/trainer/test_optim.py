"""Schedules and optimisers against hand computations and an independent AdamW."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import build, scatter
from mlx.utils import tree_flatten

from mlxft.config import Group, OptimSettings
from mlxft.errors import CheckpointError, ConfigError
from mlxft.model.adapters import LoRASpec, prepare_adapter, prepare_full, select_targets
from mlxft.model.heads import ScoreHead, attach_head
from mlxft.model.layers import LoRALinear
from mlxft.model.load import load
from mlxft.model.logits import Split
from mlxft.model.roles import Roles
from mlxft.objectives.ppo import add_critic
from mlxft.trainer.optim import Optimizer, group_of, hidden_matrices, learning_rate, orthogonalised

NAMES = ["adamw", "adam", "sgd", "lion", "adafactor", "muon"]


class Weights(nn.Module):
    """A matrix and a vector."""

    def __init__(self, matrix: Any, vector: Any, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.matrix, self.vector = mx.array(matrix, dtype=dtype), mx.array(vector, dtype=dtype)


def grads_of(matrix: Any, vector: Any) -> dict[str, mx.array]:
    return {"matrix": mx.array(matrix, dtype=mx.float32), "vector": mx.array(vector, dtype=mx.float32)}


def test_warmup_then_linear():
    """2 of 10 steps warm up: lr/2, lr; then 8 steps fall: 1 - k/8."""
    s = OptimSettings(lr=1.0, schedule="linear", warmup=2)
    expected = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert [learning_rate(s, k, 10) for k in range(10)] == pytest.approx(expected, abs=1e-12)


def test_cosine_with_least_rate():
    """From 1 to 0.2: 0.2 + 0.8 (1 + cos(pi k / 4)) / 2 with cos = 1, 1/sqrt 2, 0, -1/sqrt 2."""
    s = OptimSettings(lr=1.0, schedule="cosine", warmup=0, min_lr=0.2)
    expected = [1.0, 0.6 + 0.4 / math.sqrt(2), 0.6, 0.6 - 0.4 / math.sqrt(2)]
    assert [learning_rate(s, k, 4) for k in range(4)] == pytest.approx(expected, abs=1e-12)


def test_warmup_as_a_share_is_rounded_up():
    """A quarter of 10 steps is 3: thirds of lr, then lr stays."""
    s = OptimSettings(lr=3.0, schedule="constant", warmup=0.25)
    assert [learning_rate(s, k, 10) for k in range(10)] == pytest.approx([1.0, 2.0, 3.0] + [3.0] * 7)


def test_linear_ends_at_least_rate():
    """The rate after the last step is min_lr; halfway between lr and it is the mean of both."""
    s = OptimSettings(lr=1.0, schedule="linear", warmup=0, min_lr=0.5)
    assert learning_rate(s, 4, 8) == pytest.approx(0.75)
    assert learning_rate(s, 8, 8) == pytest.approx(0.5)


def test_warmup_longer_than_the_run():
    """12 warm-up steps, 4 steps: k/12, and nothing is divided by zero."""
    s = OptimSettings(lr=12.0, schedule="cosine", warmup=12)
    assert [learning_rate(s, k, 4) for k in range(4)] == pytest.approx([1, 2, 3, 4])


def test_adamw_first_step_by_hand():
    """Bias correction makes the first update lr * g/|g|; decay comes off the weight: 1 (1 - 0.1 * 0.5) - 0.1 = 0.85.

    The gradient is a sum over 4 items: 2 / 4 = 0.5 is what the optimiser must see, and the norm it reports.
    """
    model = Weights([[0.0]], [1.0])
    opt = Optimizer(OptimSettings(lr=0.1, weight_decay=0.5, clip=None), model)
    norm = opt.step(model, grads_of([[0.0]], [2.0]), mx.array(4.0), 0.1)["grad_norm"]
    assert model.vector.item() == pytest.approx(0.85, abs=1e-6)
    assert norm.item() == pytest.approx(0.5)


@pytest.mark.parametrize("clip", [None, 0.7])
def test_adamw_equals_numpy_over_five_steps(clip: float | None):
    """Loshchilov & Hutter 2019, algorithm 2, in float64, with the whole gradient's norm clipped."""
    rng = np.random.default_rng(0)
    theta = {"matrix": rng.normal(size=(3, 4)), "vector": rng.normal(size=5)}
    model = Weights(theta["matrix"], theta["vector"])
    opt = Optimizer(OptimSettings(lr=1.0, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, clip=clip), model)
    m = {n: np.zeros_like(p) for n, p in theta.items()}
    v = {n: np.zeros_like(p) for n, p in theta.items()}
    for t in range(1, 6):
        lr, weight = 0.03 / t, float(t + 1)
        total = {n: rng.normal(size=p.shape) * weight for n, p in theta.items()}
        norm = opt.step(model, grads_of(**total), mx.array(weight), lr)["grad_norm"]
        g = {n: x / weight for n, x in total.items()}
        length = math.sqrt(sum((x**2).sum() for x in g.values()))
        assert norm.item() == pytest.approx(length, rel=1e-5)
        if clip is not None and length > clip:
            g = {n: x * clip / length for n, x in g.items()}
        for n in theta:
            m[n] = 0.8 * m[n] + 0.2 * g[n]
            v[n] = 0.95 * v[n] + 0.05 * g[n] ** 2
            step = (m[n] / (1 - 0.8**t)) / (np.sqrt(v[n] / (1 - 0.95**t)) + 1e-6)
            theta[n] = theta[n] * (1 - lr * 0.1) - lr * step
    np.testing.assert_allclose(np.array(model.matrix), theta["matrix"], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(np.array(model.vector), theta["vector"], rtol=2e-5, atol=2e-6)


def test_sgd_with_clipping_by_hand():
    """Gradient (3, 4) has norm 5; clipped to 1 it is (0.6, 0.8): -0.5 of it."""
    model = Weights([[0.0]], [0.0, 0.0])
    opt = Optimizer(OptimSettings(name="sgd", lr=0.5, clip=1.0), model)
    assert opt.step(model, grads_of([[0.0]], [3.0, 4.0]), mx.array(1.0), 0.5)["grad_norm"].item() == pytest.approx(5.0)
    assert model.vector.tolist() == pytest.approx([-0.3, -0.4], abs=1e-6)


def descend(opt: Optimizer, model: Weights, steps: int, begin: int = 0) -> float:
    """Gradient steps on |matrix|^2 + |vector|^2; returns what it is then."""
    for k in range(begin, begin + steps):
        opt.step(model, {"matrix": 2 * model.matrix, "vector": 2 * model.vector}, mx.array(1.0), 0.02 / (1 + k))
        mx.eval(model.parameters(), opt.arrays())
    return float(model.matrix.square().sum() + model.vector.square().sum())


def fresh() -> Weights:
    return Weights([[1.0, -2.0], [0.5, 3.0]], [1.0, -1.0, 2.0])


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_descends_and_goes_on_from_its_arrays(name: str):
    """8 steps, and 3 + 5 with the state put into a new optimiser, give the same bits."""
    settings = OptimSettings(name=name, lr=0.02, clip=None)
    whole = fresh()
    opt = Optimizer(settings, whole)
    before = float(whole.matrix.square().sum() + whole.vector.square().sum())
    assert descend(opt, whole, 8) < before

    first = fresh()
    begun = Optimizer(settings, first)
    descend(begun, first, 3)
    kept, second = begun.arrays(), Weights(first.matrix, first.vector)
    again = Optimizer(settings, second)
    again.load(kept)
    descend(again, second, 5, begin=3)
    assert second.matrix.tolist() == whole.matrix.tolist()
    assert second.vector.tolist() == whole.vector.tolist()


def test_the_state_of_another_optimiser_is_refused():
    with pytest.raises(CheckpointError, match="optimiser state does not fit muon"):
        Optimizer(OptimSettings(name="muon"), fresh()).load(Optimizer(OptimSettings(name="sgd"), fresh()).arrays())


def test_master_weights_keep_small_updates():
    """1 - 100 * 0.0001 = 0.99. A bfloat16 next to 1 is 0.996: each single update would round to nothing."""
    assert (mx.array(1.0, mx.bfloat16) - mx.array(1e-4, mx.bfloat16)).item() == 1.0
    model = Weights([[1.0]], [1.0], mx.bfloat16)
    opt = Optimizer(OptimSettings(name="sgd", lr=1e-4, clip=None), model)
    for _ in range(100):
        opt.step(
            model, {"matrix": mx.ones((1, 1), mx.bfloat16), "vector": mx.ones(1, mx.bfloat16)}, mx.array(1.0), 1e-4
        )
    assert opt.arrays()["master.vector"].item() == pytest.approx(0.99, abs=1e-5)
    assert model.vector.dtype == mx.bfloat16
    assert model.vector.item() == pytest.approx(0.99, abs=0.004)


def test_float32_weights_have_no_second_copy():
    """Adapters are float32: a master copy of them would be waste."""
    assert not [n for n in Optimizer(OptimSettings(), fresh()).arrays() if n.startswith("master")]


def test_groups_have_rates_and_decays_of_their_own_and_share_one_norm():
    """SGD by hand: gradient (3, 4) has norm 5, clipped to 1 as a whole: 0.6 and 0.8.

    matrix: decay 0.1 of weight 1 is added, at rate 0.5 x 0.2; vector: rate 0.05 (lr), no decay.
    """
    groups = [{"match": "matrix", "scale": 0.2, "weight_decay": 0.1}, {"match": "re:^vec", "lr": 0.05}]
    model = Weights([[1.0]], [0.0])
    opt = Optimizer(OptimSettings(name="sgd", lr=0.5, clip=1.0, groups=groups), model)
    assert opt.scales == {"matrix": 0.2, "re:^vec": pytest.approx(0.1)}
    norm = opt.step(model, grads_of([[3.0]], [4.0]), mx.array(1.0), 0.5)
    assert list(norm) == ["grad_norm"]
    assert norm["grad_norm"].item() == pytest.approx(5.0)
    assert model.matrix.item() == pytest.approx(1 - 0.5 * 0.2 * (0.6 + 0.1), abs=1e-6)
    assert model.vector.item() == pytest.approx(-0.05 * 0.8, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_the_runs_own_rate_change_nothing(name: str):
    """Groups only part the parameters; resumed after 3 of 8 steps they give the same bits, too."""
    decay = {} if name == "adam" else {"weight_decay": 0.1}
    plain, parted = (
        OptimSettings(name=name, lr=0.02, groups=groups, **decay)
        for groups in ([], [{"match": "vector", "scale": 1.0}, {"match": "*", "lr": 0.02, **decay}])
    )
    ends = []
    for settings in (plain, parted):
        model = fresh()
        opt = Optimizer(settings, model)
        descend(opt, model, 3)
        kept, again = opt.arrays(), Weights(model.matrix, model.vector)
        opt = Optimizer(settings, again)
        opt.load(kept)
        descend(opt, again, 5, begin=3)
        ends.append((again.matrix.tolist(), again.vector.tolist()))
    assert ends[0] == ends[1]


def test_a_group_within_a_part_that_is_clipped_by_itself():
    """The part runs at twice the rate; a group's scale multiplies that, a group's lr replaces it."""
    settings = OptimSettings(name="sgd", lr=1.0, clip=None, groups=[{"match": "vector", "scale": 0.5}])
    model = Weights([[0.0]], [0.0])
    opt = Optimizer(settings, model, {"vec": 2.0})
    norms = opt.step(model, grads_of([[3.0]], [4.0]), mx.array(1.0), 1.0)
    assert (norms["grad_norm"].item(), norms["vec_grad_norm"].item()) == (3.0, 4.0)
    assert (model.matrix.item(), model.vector.item()) == (-3.0, -4.0)
    model = Weights([[0.0]], [0.0])
    settings = settings.model_copy(update={"groups": [Group(match="vector", lr=0.25)]})
    Optimizer(settings, model, {"vec": 2.0}).step(model, grads_of([[3.0]], [4.0]), mx.array(1.0), 1.0)
    assert (model.matrix.item(), model.vector.item()) == (-3.0, -1.0)


NAMED = ["model.layers.1.mlp.up_proj.lora_a", "model.layers.10.mlp.up_proj.lora_a", "model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["layers.1"], [0, None, None]),
        (["mlp"], [0, 0, None]),
        (["layers.1", "*"], [0, 1, 1]),
        ([r"re:layers\.\d+\."], [0, 0, None]),
        (["*.weight", "up_proj"], [1, 1, 0]),
    ],
)
def test_the_first_group_that_matches_counts(patterns: list[str], wanted: list[int | None]):
    found = group_of([Group(match=p, scale=0.5) for p in patterns], NAMED)
    assert [found.get(n) for n in NAMED] == wanted


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["embed_token"], r"'embed_token' matches no parameter that is trained \(did you mean embed_tokens\?\)"),
        (["layers.2"], r"did you mean layers\.1\?.*there are 3, such as model\.layers\.1\.mlp"),
        (["*", "mlp"], "'mlp' matches only"),
    ],
)
def test_a_group_of_nothing_is_refused(patterns: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        group_of([Group(match=p, scale=0.5) for p in patterns], NAMED)


def test_what_an_update_makes_anew():
    """Parameter, master and moments: of the largest parameter, 32 numbers, and of both, which are one bundle."""
    matrix, vector = np.ones((8, 4)), np.ones(3)
    sizes = {(mx.float32, "adamw"): 3 * 128, (mx.float32, "lion"): 2 * 128, (mx.bfloat16, "adamw"): 64 + 3 * 128}
    for (dtype, name), size in sizes.items():
        model = Weights(matrix, vector, dtype)
        assert Optimizer(OptimSettings(name=name), model).renewed(model) == (size, size * 35 // 32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_an_updates_peak_is_what_it_makes_anew_and_the_gradient_in_float32(dtype: mx.Dtype):
    """What a plan of memory counts; the parameter is large enough for nothing else to matter."""
    model = Weights(np.ones((1024, 1024)), np.ones(3), dtype)
    optimizer = Optimizer(OptimSettings(), model)
    found = []
    gc.collect()
    for _ in range(6):
        grads = {"matrix": mx.ones((1024, 1024), dtype), "vector": mx.ones((3,), dtype)}
        mx.eval(grads, optimizer.arrays(), model.parameters())
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(optimizer.step(model, grads, mx.array(1.0), 1e-3), model.parameters(), optimizer.arrays())
        found.append(mx.get_peak_memory() - before)
    # A buffer that MLX's own thread frees only after `before` was read makes an update look smaller, never larger.
    assert max(found) == pytest.approx(optimizer.renewed(model)[0] + 4 * 1024 * 1024, rel=0.15)


# Muon.


class Blocks(nn.Module):
    """One block of a linear layer with a bias and a norm, behind an embedding."""

    def __init__(self, weight: Any, bias: Any) -> None:
        super().__init__()
        out_dims, in_dims = np.shape(weight)
        block = nn.Module()
        block.proj = nn.Linear(in_dims, out_dims)
        block.proj.weight, block.proj.bias = mx.array(weight, dtype=mx.float32), mx.array(bias, dtype=mx.float32)
        self.embed_tokens = nn.Embedding(4, in_dims)
        self.layers = [block]


def newton_schulz(matrix: Any) -> Any:
    """U p(p(p(p(p(S / |S|))))) V^T with p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5, by singular values in float64."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return (u * s) @ v


def test_muon_equals_numpy_over_four_steps():
    """torch.optim.Muon's algorithm (nesterov, adjust_lr_fn match_rms_adamw) on the matrix; on all else AdamW's.

    B = b B + (1 - b) G; O = NS((1 - b) G + b B); W = W (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) O.
    """
    rng = np.random.default_rng(1)
    weight, bias, table = rng.normal(size=(3, 5)), rng.normal(size=3), rng.normal(size=(4, 5))
    model = Blocks(weight, bias)
    model.embed_tokens.weight = mx.array(table, dtype=mx.float32)
    opt = Optimizer(OptimSettings(name="muon", lr=1.0, weight_decay=0.3, momentum=0.9, clip=None), model)
    buffer = np.zeros_like(weight)
    moments = {n: [np.zeros_like(p), np.zeros_like(p)] for n, p in (("bias", bias), ("table", table))}
    for t in range(1, 5):
        lr = 0.05 / t
        g, gb, gt = rng.normal(size=weight.shape), rng.normal(size=3), rng.normal(size=table.shape)
        grads = {"layers.0.proj.weight": g, "layers.0.proj.bias": gb, "embed_tokens.weight": gt}
        opt.step(model, {n: mx.array(x, dtype=mx.float32) for n, x in grads.items()}, mx.array(1.0), lr)
        buffer = 0.9 * buffer + 0.1 * g
        weight = weight * (1 - lr * 0.3) - lr * 0.2 * math.sqrt(5) * newton_schulz(0.1 * g + 0.9 * buffer)
        stepped = []
        for name, value, slope in (("bias", bias, gb), ("table", table, gt)):
            m, v = moments[name]
            m[:], v[:] = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
            update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            stepped.append(value * (1 - lr * 0.3) - lr * update)
        bias, table = stepped
    np.testing.assert_allclose(np.array(model.layers[0].proj.weight), weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(model.layers[0].proj.bias), bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(model.embed_tokens.weight), table, rtol=1e-4, atol=1e-5)


def test_muon_does_not_turn_decay_into_a_direction():
    """Without a gradient a matrix shrinks by 1 - lr x decay and by nothing else: decay does not go through NS."""
    model = Blocks([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0])
    opt = Optimizer(OptimSettings(name="muon", lr=0.1, weight_decay=0.5), model)
    grads = {"layers.0.proj.weight": mx.zeros((2, 2)), "layers.0.proj.bias": mx.zeros(2)}
    opt.step(model, {**grads, "embed_tokens.weight": mx.zeros((4, 2))}, mx.array(1.0), 0.1)
    np.testing.assert_allclose(np.array(model.layers[0].proj.weight), 0.95 * np.array([[1, 2], [3, 4]]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 64), (64, 4), (16, 16), (3, 4, 64)], ids=str)
def test_muons_update_is_as_large_in_every_shape(shape: tuple[int, ...]):
    """(rank, in) and (out, rank) as well: its root mean square is about 0.2 of the rate, as AdamW's."""
    x = orthogonalised(mx.random.normal(shape, key=mx.random.key(0)))
    size = mx.sqrt((0.2 * math.sqrt(max(shape[-2:])) * x).square().mean()).item()
    assert 0.7 * 0.2 < size < 1.25 * 0.2


def test_experts_are_orthogonalised_one_by_one():
    """As each alone: in one matrix together the larger gradient would drown the other."""
    both = mx.random.normal((2, 6, 4), key=mx.random.key(1)) * mx.array([1.0, 1e-3])[:, None, None]
    apart = mx.stack([orthogonalised(matrix) for matrix in both])
    assert mx.allclose(orthogonalised(both), apart, atol=1e-5)
    assert orthogonalised(mx.zeros((2, 3))).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate"}),
    ],
)
def test_what_muon_updates_of_whole_weights(
    kind: str, inside: set[str], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Matrices of the blocks; not the embedding (tied or not), the output layer, a scalar head, norms and biases."""
    model = load(str(make_model_dir(tmp_path / kind, kind)), dtype="float32").model
    prepare_full(model, "all", [], [])
    attach_head(model, ScoreHead(32))
    found = hidden_matrices(model)
    assert {n.split(".")[-2] for n in found} == inside
    assert all(n.endswith(".weight") for n in found)


def test_what_muon_updates_of_adapters_and_a_critic(tiny_model_dir: Path) -> None:
    """Factors of the blocks' layers, DoRA's magnitudes and an adapted embedding aside; of a critic the same."""
    model = load(str(tiny_model_dir), dtype="float32").model
    targets = select_targets(model, ["q_proj", "embed_tokens"], "all")
    prepare_adapter(model, LoRASpec(tuple(targets), 2, 1.0), ["layers.0.mlp.up_proj", "model.norm"])
    own = {f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in (0, 1) for x in "ab"}
    own |= {"model.layers.0.mlp.up_proj.weight"}
    assert hidden_matrices(model) == own
    add_critic(model, Split(model), Roles(model, adopt="policy"), "policy", 32)
    assert hidden_matrices(model) == own | {f"critic.role.{n.replace('.', '/')}" for n in own}
    dora = load(str(tiny_model_dir), dtype="float32").model
    prepare_adapter(dora, LoRASpec(("model.layers.0.mlp.up_proj",), 2, 1.0, dora=True), [])
    assert {n.split(".")[-1] for n in hidden_matrices(dora)} == {"lora_a", "lora_b"}


# LoRA+ (Hayou et al. 2024).


def adapter(method: str = "lora") -> nn.Module:
    """A tiny llama with adapters on all linear layers, whose B are not zero."""
    model = build("llama")
    mx.random.seed(0)
    paths = tuple(select_targets(model, "all-linear", "all", method == "dora"))
    prepare_adapter(model, LoRASpec(paths, 2, 2.0, 0.0, method == "dora"), [])
    scatter(model, seed=2, only="lora_b")
    return model


def after(settings: OptimSettings, method: str = "lora", **options: Any) -> dict[str, mx.array]:
    """Trained parameters after three steps with the same gradients."""
    model = adapter(method)
    opt = Optimizer(settings, model, **options)
    for step in range(3):
        key, grads = mx.random.key(step), dict[str, mx.array]()
        for name, value in sorted(tree_flatten(model.trainable_parameters())):
            key, now = mx.random.split(key)
            grads[name] = mx.random.normal(value.shape, key=now)
        opt.step(model, grads, mx.array(1.0), settings.lr)
    return dict(tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sgd"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_multiplies_the_rate_of_b_alone(name: str, method: str) -> None:
    """To the last bit, B moves as at 4 times the rate, and all else as at the rate itself."""
    settings = OptimSettings(name=name, lr=1e-3, clip=None)  # type: ignore[arg-type]
    plus = after(settings, method, lora_plus=4.0)
    slow, fast = after(settings, method), after(settings.model_copy(update={"lr": 4e-3}), method)
    for key, value in plus.items():
        same, other = (fast, slow) if key.endswith("lora_b") else (slow, fast)
        assert mx.array_equal(value, same[key]).item(), key
        assert not mx.array_equal(value, other[key]).item(), key
    assert {key.rpartition(".")[2] for key in plus} == {"lora_a", "lora_b", *(["m"] if method == "dora" else [])}


def test_lora_plus_is_beside_the_rate_of_a_group_and_a_part() -> None:
    """The rate of B is its group's times the ratio, and so is that of a part: a critic's B has dots in its name."""
    groups = [Group(match="layers.0", lr=2e-3, weight_decay=0.5)]
    settings = OptimSettings(lr=1e-3, groups=groups, clip=None)
    opt = Optimizer(settings, adapter(), {"model.layers.1": 0.5}, lora_plus=8.0)
    rates = {n: b.scale for bundles in opt._bundles.values() for b in bundles for n in b.names}
    decays = {n: b.decay for bundles in opt._bundles.values() for b in bundles for n in b.names}
    for name, scale in rates.items():
        group = 2.0 if "layers.0" in name else 0.5
        assert scale == pytest.approx(group * (8 if name.endswith("lora_b") else 1)), name
        assert decays[name] == (0.5 if "layers.0" in name else None)
    assert opt.scales == pytest.approx({"layers.0": 2.0, "lora_b": 8.0})


def test_with_lora_plus_b_learns_at_any_width() -> None:
    """The claim of the paper's section 4, on one layer: a stable rate of A falls as 1 / n with the width n. At that
    rate for B too, what three updates change of the output falls as 1 / n; with a ratio that grows as n it does not.

    Adam's first update of B is lr sign(g), whose effect on the output is lr |A x|_1, and A x does not depend on n.
    """
    moved: dict[bool, list[float]] = {}
    for plus in (False, True):
        for n in (64, 256, 1024):
            mx.random.seed(n)
            layer = LoRALinear(nn.Linear(n, 8, bias=False), 32, 1.0, 0.0)
            layer.linear.freeze()
            x = mx.where(mx.random.uniform(shape=(1, n)) < 0.5, -1.0, 1.0)
            target = layer(x) + 100.0  # far away, so that the gradient keeps its sign
            settings = OptimSettings(name="adam", lr=0.1 / n, clip=None)
            opt, before = Optimizer(settings, layer, lora_plus=n / 64 if plus else None), layer(x)
            for _ in range(3):
                loss = nn.value_and_grad(layer, lambda m=layer, x=x, t=target: (m(x) - t).square().sum())
                opt.step(layer, dict(tree_flatten(loss()[1])), mx.array(1.0), settings.lr)
            moved.setdefault(plus, []).append(float(mx.abs(layer(x) - before).mean()))
    assert moved[False][0] == pytest.approx(moved[True][0]), "the ratio is 1"
    for plus, power in ((False, -1), (True, 0)):
        slope = np.polyfit(np.log([64, 256, 1024]), np.log(moved[plus]), 1)[0]
        assert slope == pytest.approx(power, abs=0.15), moved
