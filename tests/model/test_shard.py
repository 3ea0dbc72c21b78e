"""A base that is cut over ranks: the same numbers as a whole one, in a part of its memory.

As a script, this file is one rank of two: `python test_shard.py CASE ...` prints what each case found, as JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from ranks import run_ranks

from mlxft.distributed import assign
from mlxft.errors import ModelError
from mlxft.model import logits as logits_module
from mlxft.model.adapters import LoRASpec, prepare_adapter, select_targets
from mlxft.model.layers import LEAVES, checkpoint_layers, evaluating, watch_routers, watching
from mlxft.model.load import count_parameters
from mlxft.model.logits import Split, rows_nll
from mlxft.model.memory import Job, plan
from mlxft.model.roles import Roles
from mlxft.model.shard import exchanged, shard_base, sharding_of, shares

IDS = [[1, 2, 3, 4, 5, 6, 7, 8], [6, 7, 8, 9, 3, 2, 2, 1]]
# Blocks that share keys and values, run experts, have windows, cap logits, or carry states; and a head of its own.
KINDS = ["llama", "llama untied", "qwen3_moe", "gemma2", "gemma3", "gemma4_text", "gpt2", "mamba", "qwen3_next"]
REFUSED = ["gemma3n", "iquestloopcoder"]  # they read a block's weights outside of its call


def adapted(model: nn.Module, dropout: float = 0.0, dora: bool = False) -> nn.Module:
    """A model with an adapter that does something."""
    paths = select_targets(model, "all-linear", "all", dora)
    prepare_adapter(model, LoRASpec(tuple(paths), 4, 2.0, dropout, dora), [])
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    mx.eval(model.parameters())
    return model


def large(layers: int, bits: int | None = None, tied: bool = True, width: int = 128) -> nn.Module:
    """A llama of float32 or packed weights, most of which are in its blocks."""
    mx.random.seed(1)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4, "vocab_size": 1024}
    args = llama.ModelArgs("llama", num_hidden_layers=layers, rms_norm_eps=1e-5, tie_word_embeddings=tied, **sizes)
    model = llama.Model(args)
    if bits is not None:
        nn.quantize(model, 64, bits)
    return adapted(model)


Found = tuple[mx.array, dict[str, mx.array]]


def loss_and_gradients(model: nn.Module, ids: mx.array, passes: int = 1) -> Found:
    split = Split(model)
    model.train()
    width = ids.shape[1]
    places, labels = mx.arange(width - 1), ids[0, 1:]

    def loss(params: Any) -> mx.array:
        model.update(params)
        parts = [
            rows_nll(split, ids[:, k:], places[k:] - k, labels[k:], mx.ones(width - 1 - k), grad=True)
            for k in range(passes)
        ]
        return sum(parts[1:], parts[0])

    own = model.trainable_parameters()
    try:
        value, grads = mx.value_and_grad(loss)(own)
    finally:
        model.update(own)
    mx.eval(value, grads)
    return value, dict(tree_flatten(grads))


def apart(a: Found, b: Found) -> float:
    """The largest difference in losses and gradients, relative to the largest gradient."""
    assert a[1].keys() == b[1].keys(), "other gradients"
    scale = max(float(mx.abs(v).max()) for v in a[1].values())
    assert scale > 1e-3
    return max(abs(float(a[0] - b[0])), *(float(mx.abs(a[1][n] - b[1][n]).max()) for n in a[1])) / scale


def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    cache, ids, found = make_prompt_cache(model), mx.array([prompt]), list[int]()
    with evaluating(model):
        for _ in range(count):
            ids = mx.argmax(model(ids, cache=cache)[:, -1:], axis=-1)
            found.append(int(ids.item()))
    return found


# --- one process ------------------------------------------------------------------------------------------------------
# A group of one rank gathers from itself only; blocks, stand-ins and recomputation are those of several.


def alone() -> mx.distributed.Group:
    return mx.distributed.init()


def checkpointed(model: nn.Module, ids: mx.array | None = None) -> Found:
    checkpoint_layers(model)
    found = loss_and_gradients(model, mx.array(IDS) if ids is None else ids)
    checkpoint_layers(model, False)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_a_sharded_model_are_those_of_a_whole_one(name: str) -> None:
    model = adapted(build(name))
    whole = checkpointed(model)
    shard_base(model, alone())
    assert apart(whole, loss_and_gradients(model, mx.array(IDS))) < 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_reads_blocks_from_outside_is_refused(name: str) -> None:
    model = adapted(build(name))
    with pytest.raises(ModelError, match="outside of its call"):
        shard_base(model, alone())


def test_blocks_that_share_weights_are_refused() -> None:
    model = adapted(build("llama"))
    model.layers[1].mlp = model.layers[0].mlp
    with pytest.raises(ModelError, match="share weights"):
        shard_base(model, alone())


def test_a_model_without_frozen_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing is frozen"):
        shard_base(build("llama"), alone())


def test_dropout_is_drawn_again() -> None:
    model = adapted(build("llama"), dropout=0.5)
    found = []
    for sharded in (False, True):
        mx.random.seed(7)
        if sharded:
            shard_base(model, alone())
            mx.random.seed(7)
            found.append(loss_and_gradients(model, mx.array(IDS)))
        else:
            found.append(checkpointed(model))
    assert apart(*found) < 1e-6


def test_routers_are_watched() -> None:
    model = adapted(build("qwen3_moe"))
    watch_routers(model, "tune.router_aux")
    masks = {(2, 8): mx.ones((2, 8))}
    found = []
    for _ in range(2):
        with watching(masks) as seen:
            value, grads = loss_and_gradients(model, mx.array(IDS))
        found.append((value, grads, {k: v.tolist() for k, v in seen.items()}))
        if not sharding_of(model) is not None:
            shard_base(model, alone())
    assert found[0][2]
    assert found[0][2] == found[1][2]
    assert apart(found[0][:2], found[1][:2]) < 1e-5


def test_roles_and_the_bare_base_are_switched() -> None:
    model = adapted(build("llama"))
    roles = Roles(model, "policy")
    roles.copy("policy", "reference")
    want = {}
    with evaluating(model):
        for name in ("policy", None):
            with roles.use(name):
                want[name] = model(mx.array(IDS))
        mx.eval(list(want.values()))
        assert not mx.allclose(want["policy"], want[None]).item()
        shard_base(model, alone())
        for name in ("policy", "reference", None):
            with roles.use(name):
                assert mx.array_equal(model(mx.array(IDS)), want["policy" if name else None]).item()


def test_a_role_keeps_its_own_values_in_a_block() -> None:
    """A norm that a role brings along is not overwritten by the base's, and comes back with the base."""
    model = adapted(build("llama"))
    roles = Roles(model, "policy")
    shard_base(model, alone())
    name = "model.layers.0.input_layernorm.weight"
    roles.add("other", None, {name: mx.full((32,), 3.0)})
    with roles.use(None):
        plain = model(mx.array(IDS))
    with roles.use("other"):
        assert not mx.allclose(model(mx.array(IDS)), plain).item()
    with roles.use(None):
        assert mx.array_equal(model(mx.array(IDS)), plain).item()


def test_dora_must_come_before_sharding() -> None:
    model = adapted(build("llama"), dora=True)
    whole = checkpointed(model)
    roles = Roles(model, "policy")
    shard_base(model, alone())
    assert apart(whole, loss_and_gradients(model, mx.array(IDS))) < 1e-6
    with pytest.raises(ModelError, match="before sharding"):
        roles.add("other", roles["policy"].spec)


def test_weights_outside_of_a_call_are_not_numbers() -> None:
    """What would read them goes wrong loudly; names, shapes, types and counts are as before."""
    model = adapted(build("llama"))
    about = {n: (v.shape, v.dtype) for n, v in tree_flatten(model.parameters())}
    count = count_parameters(model)
    shard_base(model, alone())
    assert {n: (v.shape, v.dtype) for n, v in tree_flatten(model.parameters())} == about
    assert count_parameters(model) == count
    for weight in (model.model.embed_tokens.weight, model.layers[0].mlp.up_proj.linear.weight):
        assert mx.isnan(weight).all().item()


def test_a_head_in_chunks_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of gathers does not depend on how many positions a rank has."""
    gathers = 0
    gather = mx.distributed.all_gather

    def counted(x: mx.array, **options: Any) -> mx.array:
        nonlocal gathers
        gathers += 1
        return gather(x, **options)

    monkeypatch.setattr(mx.distributed, "all_gather", counted)
    monkeypatch.setattr(logits_module, "chunk_size", lambda vocabulary: 1)
    monkeypatch.setattr(logits_module, "_LEAST_CHUNK", 1)
    for name, beside in (("llama", 1), ("llama untied", 2)):
        model = adapted(build(name))
        shard_base(model, alone())
        for width in (2, 8):
            split = Split(model)
            model._sharded.release()
            gathers = 0
            model.train()
            ids = mx.array(IDS)[:, :width]
            places = mx.arange(width - 1)

            def loss(params: Any, ids: mx.array = ids, places: mx.array = places, split: Split = split) -> mx.array:
                split.model.update(params)
                return rows_nll(split, ids, places, ids[0, 1:], mx.ones(len(places)), grad=True)

            own = model.trainable_parameters()
            mx.eval(mx.grad(loss)(own))
            model.update(own)
            assert gathers == 2 * len(model.layers) + beside


def test_a_plan_counts_what_a_rank_holds() -> None:
    model = large(8)
    want = shares(model, 2)
    one, two = (plan(Job(model, 0, ranks=n), 1, 32, True) for n in (1, 2))
    assert (one.gathered, two.gathered) == (0, want.gathered)
    assert one.weights - two.weights == want.whole - want.resident
    assert two.total - one.total == want.gathered - (want.whole - want.resident)
    per_block = (want.whole - 1024 * 128 * 4) / 8
    assert want.gathered == pytest.approx(2 * per_block + 1024 * 128 * 4)
    sharded = shard_base(model, alone())
    assert sharded.whole == want.whole
    assert shares(model, 2) == want


# --- two processes ----------------------------------------------------------------------------------------------------


def case_architectures(group: mx.distributed.Group) -> dict[str, float]:
    """Rank 1 has a longer batch: loss and gradients are those that each had with the whole model."""
    found = {}
    mx.random.seed(0)
    for name in KINDS[:6]:
        model = adapted(build(name))
        ids = mx.array(IDS)[:, : 5 + 3 * group.rank()]
        whole = checkpointed(model, ids)
        sharded = shard_base(model, group)
        found[name] = apart(whole, loss_and_gradients(model, ids))
        assert sharded.resident < 0.55 * sharded.whole
    return found


def case_memory(group: mx.distributed.Group) -> dict[str, Any]:
    """Bytes of a base of 24 blocks, float32, packed and with its own head; of a step and a pass; greedy completions."""
    found = {}
    for name, model in (("float32", large(24)), ("4 bits", large(24, 4, width=256)), ("untied", large(8, tied=False))):
        ids = mx.array(IDS)[:, : 4 + 4 * group.rank()]
        tokens = greedy(model, IDS[0], 4)
        whole = checkpointed(model, ids)
        base = sum(v.nbytes for n, v in tree_flatten(model.parameters()) if n.rpartition(".")[2] not in LEAVES)
        others = mx.get_active_memory() - base
        mx.reset_peak_memory()
        sharded = shard_base(model, group)
        sharded.release()
        gc.collect()
        about: dict[str, Any] = {"base": base, "resident": mx.get_active_memory() - others}
        about["while sharding"] = mx.get_peak_memory() - others
        mx.reset_peak_memory()
        about["apart"] = apart(whole, loss_and_gradients(model, ids))
        about["step"] = mx.get_peak_memory() - others
        sharded.release()
        gc.collect()
        mx.reset_peak_memory()
        with evaluating(model):
            mx.eval(model(ids))
        about["pass"] = mx.get_peak_memory() - others
        about |= {"tokens": tokens, "sharded tokens": greedy(model, IDS[0], 4)}
        found[name] = about
        del model, sharded, whole
        gc.collect()
    return found


def case_waiting(group: mx.distributed.Group) -> float:
    """Blocks' weights in memory when MLX was asked for the last gather alone."""
    model = large(12, tied=False)
    sharded = shard_base(model, group)
    with evaluating(model):
        mx.eval(model(mx.array(IDS)))
        sharded.release()
        gc.collect()
        before = mx.get_active_memory()
        logits = model(mx.array(IDS))
        sharded.release()
        mx.eval(sharded._last)
        return (mx.get_active_memory() - before) / (logits.nbytes + shares(model, 2).whole / 12)


def case_order(group: mx.distributed.Group) -> bool:
    """Two passes in one graph, evaluated in opposite orders by the ranks: each gets its own blocks' weights."""
    model = large(4)
    ids = mx.array(IDS)
    with evaluating(model):
        want = [model(ids), model(ids[:1, :3])]
        mx.eval(want)
        shard_base(model, group)
        found = [model(ids), model(ids[:1, :3])]
        for each in found if group.rank() else found[::-1]:
            mx.eval(each)
        whole = [mx.array_equal(a, b).item() for a, b in zip(want, found)]
    # Two passes whose gradients are one graph, as for pairs.
    model = large(4)
    return all(whole) and apart(_twice(model), (shard_base(model, group), _twice(model))[1]) < 1e-6


def _twice(model: nn.Module) -> Found:
    checkpoint_layers(model)
    return loss_and_gradients(model, mx.array(IDS), passes=2)


def case_exchange(group: mx.distributed.Group) -> bool:
    """Arrays of all types and sizes arrive with their bits, in several messages."""
    import mlxft.model.shard as shard

    shard.MESSAGE = 512
    mx.random.seed(0)
    shapes = {"a": (3, 5), "b": (), "c": (700,), "d": (2, 9, 4), "e": (1,), "f": (129,)}
    types = [mx.float32, mx.bfloat16, mx.uint8, mx.float16, mx.int32, mx.uint64]
    every = {n: (100 * mx.random.normal(s)).astype(t) for (n, s), t in zip(shapes.items(), types)}
    owner = dict(zip(every, assign([v.nbytes for v in every.values()], [0.5, 0.5])))
    own = {n: v for n, v in every.items() if owner[n] == group.rank()}
    like = {n: mx.zeros(v.shape, v.dtype) for n, v in every.items()}
    rounds = list(exchanged(own, like, owner, group))
    found = {n: v for each in rounds for n, v in each.items()}
    same = all(found[n].dtype == v.dtype and mx.array_equal(found[n], v).item() for n, v in every.items())
    return same and found.keys() == every.keys() and len(rounds) > 1


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    """What all cases found on each rank."""
    found = run_ranks([__file__])
    assert all(code == 0 for code, _, _ in found), "\n".join(err[-2000:] for _, _, err in found)
    return [json.loads(out) for _, out, _ in found]


def test_two_ranks_compute_what_one_does(cases: list[dict[str, Any]]) -> None:
    for found in cases:
        assert len(found["architectures"]) == 6
        assert max(found["architectures"].values()) < 1e-6, found


def test_each_rank_holds_half(cases: list[dict[str, Any]]) -> None:
    for found in cases:
        for about in found["memory"].values():
            assert about["resident"] <= 0.55 * about["base"], about
            assert about["while sharding"] <= 1.15 * about["base"], about
            assert about["apart"] < 1e-5, about


def test_a_pass_holds_two_blocks(cases: list[dict[str, Any]]) -> None:
    """Of 24 blocks: gathers run neither long before their blocks, nor are their weights kept."""
    for found in cases:
        for name in ("float32", "4 bits"):
            about = found["memory"][name]
            assert about["pass"] <= 0.72 * about["base"], about
            assert about["step"] <= 0.9 * about["base"], about


def test_greedy_completions_with_a_cache_are_the_same(cases: list[dict[str, Any]]) -> None:
    for found in cases:
        for about in found["memory"].values():
            assert about["tokens"] == about["sharded tokens"]


def test_gathers_wait_for_the_blocks_before(cases: list[dict[str, Any]]) -> None:
    """Else the weights of all 12 would be there; the head's and the last block's wait for their use."""
    for found in cases:
        assert 0.5 < found["waiting"] < 4, found["waiting"]


def test_collectives_have_one_order(cases: list[dict[str, Any]]) -> None:
    assert all(found["order"] for found in cases)


def test_arrays_are_exchanged_bit_for_bit(cases: list[dict[str, Any]]) -> None:
    assert all(found["exchange"] for found in cases)


CASES: dict[str, Callable[[mx.distributed.Group], Any]] = {
    "architectures": case_architectures,
    "memory": case_memory,
    "order": case_order,
    "waiting": case_waiting,
    "exchange": case_exchange,
}

if __name__ == "__main__":
    ranks = mx.distributed.init(strict=True, backend="ring")
    print(json.dumps({name: CASES[name](ranks) for name in sys.argv[1:] or CASES}))
