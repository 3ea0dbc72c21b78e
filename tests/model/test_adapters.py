"""What is chosen to be trained, and adapters on disk: ours in mlx-lm, mlx-lm's in ours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.errors import ConfigError, ModelError
from mlxft.model.adapters import (
    LoRASpec,
    adapter_config,
    attach,
    load_adapter,
    prepare_adapter,
    prepare_full,
    read_adapter_config,
    select_layers,
    select_parameters,
    select_targets,
    trained_weights,
)
from mlxft.model.layers import plain_layer
from mlxft.model.load import Loaded, base_fingerprint, load

Maker = Callable[..., Path]
IDS = mx.array([[3, 40, 77, 5, 21, 9]])
ATTENTION = [f"self_attn.{k}_proj" for k in "qkvo"]
MLP = [f"mlp.{k}_proj" for k in ("gate", "down", "up")]
KINDS = ["llama", "qwen3", "gemma2", "phi3", "mixtral", "qwen3_moe"]


@pytest.fixture
def model(tiny_model: Loaded) -> nn.Module:
    return tiny_model.model


def of_kind(kind: str, tmp_path: Path, make_model_dir: Maker, **settings: Any) -> tuple[Path, nn.Module]:
    folder = tmp_path / kind
    if not folder.exists():
        make_model_dir(folder, kind, **settings)
    return folder, load(str(folder), dtype="float32").model


def scatter(model: nn.Module, seed: int = 0) -> None:
    """Every trained matrix moves, as after some steps."""
    key, leaves = mx.random.key(seed), []
    for name, value in sorted(tree_flatten(model.trainable_parameters())):
        key, now = mx.random.split(key)
        leaves.append((name, value + 0.2 * mx.random.normal(value.shape, key=now)))
    model.update(tree_unflatten(leaves))


def save(folder: Path, model: nn.Module, spec: LoRASpec | None, about: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(spec, model, about or {})), "utf-8")
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained_weights(model))
    return folder


def adapted(model: nn.Module, targets: str | list[str] = "all-linear", dora: bool = False, **shape: Any) -> LoRASpec:
    paths = select_targets(model, targets, "all", dora)
    spec = LoRASpec(tuple(paths), **{"rank": 4, "scale": 2.0, "dora": dora, **shape})
    prepare_adapter(model, spec, [])
    scatter(model)
    return spec


def inside(layers: list[int], names: list[str]) -> set[str]:
    return {f"model.layers.{i}.{n}" for i in layers for n in names}


@pytest.mark.parametrize(
    ("targets", "layers", "wanted"),
    [
        ("all-linear", "all", inside([0, 1], ATTENTION + MLP)),
        ("attention", "all", inside([0, 1], ATTENTION)),
        ("mlp", 1, inside([1], MLP)),
        ("mlp", [0], inside([0], MLP)),
        (["q_proj", "v_proj"], 2, inside([0, 1], ["self_attn.q_proj", "self_attn.v_proj"])),
        (["self_attn"], [1, 1], inside([1], ATTENTION)),
        (["layers.0.*"], "all", inside([0], ATTENTION + MLP)),
        (["*_proj"], 1, inside([1], ATTENTION + MLP)),
        (["attention", "up_proj"], [0], inside([0], [*ATTENTION, "mlp.up_proj"])),
        (["embed_tokens"], 1, {"model.embed_tokens"}),
        (["q_proj", "embed_tokens"], 1, {"model.embed_tokens"} | inside([1], ["self_attn.q_proj"])),
    ],
)
def test_targets(targets: Any, layers: Any, wanted: set[str], model: nn.Module) -> None:
    found = select_targets(model, targets, layers)
    assert set(found) == wanted
    assert len(found) == len(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_each_architecture(kind: str, tmp_path: Path, make_model_dir: Maker) -> None:
    """Attention and mlp share nothing and are all-linear together; the head and the embedding stand outside."""
    _, model = of_kind(kind, tmp_path, make_model_dir)
    everything, attention, mlp = (set(select_targets(model, t, "all")) for t in ("all-linear", "attention", "mlp"))
    assert attention
    assert mlp
    assert not attention & mlp
    assert attention | mlp == everything
    assert not any("embed" in n or "lm_head" in n for n in everything)
    if kind in ("mixtral", "qwen3_moe"):
        assert any("switch_mlp" in n for n in mlp)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_porj"], r"'q_porj' matches no module; there are .*self_attn\.q_proj.*did you mean q_proj"),
        (["q_proj", "lm_head"], "'lm_head' matches no module"),
        (["norm"], "'norm' matches no module"),
        (["all_linear"], "or all-linear, attention, mlp"),
        (["layers.7.*"], "matches no module"),
    ],
)
def test_targets_that_match_nothing_say_what_there_is(targets: list[str], says: str, model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=says):
        select_targets(model, targets, "all")


def test_dora_is_for_linear_layers(model: nn.Module, tmp_path: Path, make_model_dir: Maker) -> None:
    with pytest.raises(ConfigError, match=r"DoRA is for linear layers, model\.embed_tokens is a Embedding"):
        select_targets(model, ["embed_tokens"], "all", dora=True)
    with pytest.raises(ConfigError, match="is a SwitchLinear"):
        select_targets(of_kind("mixtral", tmp_path, make_model_dir)[1], "all-linear", "all", dora=True)
    assert len(select_targets(model, "all-linear", "all", dora=True)) == 14


@pytest.mark.parametrize(
    ("layers", "wanted"), [("all", [0, 1]), (1, [1]), (2, [0, 1]), ([0], [0]), ([1, 0, 1], [0, 1])]
)
def test_layers(layers: Any, wanted: list[int], model: nn.Module) -> None:
    assert select_layers(model, layers) == [f"model.layers.{i}" for i in wanted]


@pytest.mark.parametrize("layers", [3, [2], [-1], []])
def test_layers_that_there_are_not(layers: Any, model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"tune\.layers.*(has 2|0 to 1)"):
        select_layers(model, layers)


def test_an_adapter_trains_its_own_matrices_only(model: nn.Module) -> None:
    spec = adapted(model, "attention")
    assert set(trained_weights(model)) == {f"{p}.{leaf}" for p in spec.paths for leaf in ("lora_a", "lora_b")}
    assert all(v.dtype == mx.float32 for v in trained_weights(model).values())


def test_whole_modules_beside_an_adapter(model: nn.Module) -> None:
    spec = LoRASpec(tuple(select_targets(model, "attention", "all")), 4, 2.0)
    prepare_adapter(model, spec, ["model.norm", "input_layernorm"])
    whole = {n for n in trained_weights(model) if "lora" not in n}
    assert whole == {"model.norm.weight", *(f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))}


def test_one_module_can_not_be_both(model: nn.Module) -> None:
    spec = LoRASpec(tuple(select_targets(model, ["q_proj"], "all")), 4, 2.0)
    with pytest.raises(ConfigError, match=r"tune\.train and tune\.targets both name .*q_proj"):
        prepare_adapter(model, spec, ["q_proj"])


@pytest.mark.parametrize(
    ("layers", "train", "freeze", "wanted"),
    [
        ("all", [], [], lambda n: True),
        ("all", [], ["embed_tokens"], lambda n: "embed" not in n),
        (1, [], [], lambda n: "layers.1." in n),
        (1, ["model.norm"], [], lambda n: "layers.1." in n or n == "model.norm.weight"),
        (1, [], ["mlp"], lambda n: "layers.1." in n and "mlp" not in n),
        ("all", ["q_proj", "embed_tokens"], [], lambda n: "q_proj" in n or "embed" in n),
        ("all", ["mlp"], ["up_proj"], lambda n: "mlp" in n and "up_proj" not in n),
        ([0], ["layers.1.self_attn"], [], lambda n: "layers.0." in n or "layers.1.self_attn" in n),
    ],
)
def test_what_full_trains(
    layers: Any, train: list[str], freeze: list[str], wanted: Callable[[str], bool], model: nn.Module
) -> None:
    every = {n for n, _ in tree_flatten(model.parameters())}
    prepare_full(model, layers, train, freeze)
    assert set(trained_weights(model)) == {n for n in every if wanted(n)} != set()


def test_full_refusals(model: nn.Module, tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.freeze: 'norms' matches nothing; there are .*norm"):
        prepare_full(model, "all", [], ["norms"])
    with pytest.raises(ConfigError, match=r"tune\.train: 'lm_head' matches nothing.*\(tied\): train that"):
        prepare_full(model, "all", ["lm_head"], [])
    with pytest.raises(ConfigError, match="leave nothing to train"):
        prepare_full(model, "all", ["mlp"], ["mlp"])
    packed = load(str(tiny_model_dir), quantize=4, group_size=32).model
    with pytest.raises(ModelError, match=r"full needs float weights, and 15 layers"):
        prepare_full(packed, "all", [], [])
    with pytest.raises(ModelError, match=r"embed_tokens is quantised to 4 bits"):
        prepare_adapter(packed, LoRASpec(("model.layers.0.self_attn.q_proj",), 4, 1.0), ["embed_tokens"])


def test_parameters_by_name(model: nn.Module) -> None:
    assert select_parameters(model, ["layers.0.self_attn.q_proj.weight"], "x") == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert select_parameters(model, [], "x") == []


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind: str, dora: bool, tmp_path: Path, make_model_dir: Maker) -> None:
    _, model = of_kind(kind, tmp_path, make_model_dir)
    before = model(IDS)
    targets = "attention" if dora else ["all-linear", "embed_tokens"]
    prepare_adapter(model, LoRASpec(tuple(select_targets(model, targets, "all", dora)), 4, 20.0, 0.0, dora), [])
    assert mx.array_equal(model(IDS), before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_our_adapter_in_mlx_lm(kind: str, dora: bool, tmp_path: Path, make_model_dir: Maker) -> None:
    import mlx_lm

    folder, model = of_kind(kind, tmp_path, make_model_dir)
    spec = adapted(model, "attention" if dora else "all-linear", dora)
    saved = save(tmp_path / "adapter", model, spec)
    theirs, _ = mlx_lm.load(str(folder), adapter_path=str(saved))
    assert mx.allclose(theirs(IDS), model(IDS), atol=1e-4)
    _, again = of_kind(kind, tmp_path, make_model_dir)
    assert load_adapter(again, saved) == spec
    assert mx.array_equal(again(IDS), model(IDS))


def test_our_adapter_of_embedding_and_head_in_mlx_lm(tmp_path: Path, make_model_dir: Maker) -> None:
    import mlx_lm

    folder, model = of_kind("llama", tmp_path, make_model_dir, tie_word_embeddings=False)
    spec = adapted(model, ["embed_tokens", "lm_head", "q_proj"])
    saved = save(tmp_path / "adapter", model, spec)
    theirs, _ = mlx_lm.load(str(folder), adapter_path=str(saved))
    assert mx.allclose(theirs(IDS), model(IDS), atol=1e-4)


@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.up_proj"], ["model.layers.0.self_attn.q_proj"]])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("dora", [False, True])
def test_mlx_lms_adapter_in_ours(
    keys: list[str] | None, num_layers: int, dora: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With keys relative to a block (its documentation's way), none (its default), and full names."""
    import mlx_lm
    from mlx_lm.tuner.utils import linear_to_lora_layers

    theirs, _ = mlx_lm.load(str(tiny_model_dir))
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, **({"keys": keys} if keys else {})}
    theirs.freeze()
    linear_to_lora_layers(theirs, num_layers, dict(parameters), use_dora=dora)
    scatter(theirs)
    folder = tmp_path / "theirs"
    folder.mkdir()
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "iters": 10}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(theirs.trainable_parameters())))
    loaded = load(str(tiny_model_dir), dtype="float32")
    spec = load_adapter(loaded.model, folder, base_fingerprint(loaded))
    assert spec is not None
    assert (spec.rank, spec.scale, spec.dora) == (4, 3.0, dora)
    assert set(trained_weights(loaded.model)) == {n for n, _ in tree_flatten(theirs.trainable_parameters())}
    assert mx.allclose(loaded.model(IDS), theirs(IDS), atol=1e-4)


@pytest.mark.parametrize("name", ["minicpm", "seed_oss", "llama"])
def test_an_adapter_of_a_tied_embedding_is_its_head_too(name: str) -> None:
    """Also where an architecture reads the embedding's weight: the fused model gives the same."""
    model: Any = build(name)
    attach(model, LoRASpec(("model.embed_tokens",), 4, 2.0))
    scatter(model)
    ids = IDS % 64
    found = model(ids)
    layer = model.model.embed_tokens
    assert not mx.allclose(layer.embedding.weight, layer.fused_weight(), atol=1e-2)
    model.model.embed_tokens = plain_layer(layer.base, layer.fused_weight())
    assert mx.allclose(found, model(ids), atol=1e-4)


def test_factors_are_float32_whatever_a_file_has(model: nn.Module, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A sum of gradients in bfloat16 would stand still at 256: of a token's row, seen 1,024 times."""
    spec = LoRASpec(("model.embed_tokens", "model.layers.0.self_attn.q_proj"), 2, 1.0)
    attach(model, spec)
    scatter(model)
    folder = save(tmp_path / "adapter", model, spec)
    file = folder / "adapters.safetensors"
    half = {n: w.astype(mx.bfloat16) for n, w in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), half)
    again = load(str(tiny_model_dir), dtype="bfloat16").model
    load_adapter(again, folder)
    found = trained_weights(again)
    assert {n: w.dtype for n, w in found.items()} == dict.fromkeys(half, mx.float32)
    assert all(mx.array_equal(w, half[n]) for n, w in found.items())


def test_whole_modules_are_saved_and_loaded(model: nn.Module, tiny_model_dir: Path, tmp_path: Path) -> None:
    spec = LoRASpec(tuple(select_targets(model, ["q_proj"], "all")), 4, 2.0)
    prepare_adapter(model, spec, ["embed_tokens"])
    scatter(model)
    saved = save(tmp_path / "adapter", model, spec)
    again = load(str(tiny_model_dir), dtype="float32").model
    load_adapter(again, saved)
    assert mx.array_equal(again(IDS), model(IDS))
    assert set(trained_weights(again)) == set(trained_weights(model))
    import mlx_lm

    # Refused there, by name, not left out in silence.
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: not an adapter parameter"):
        mlx_lm.load(str(tiny_model_dir), adapter_path=str(saved))


def test_adapter_of_another_base(tiny_model_dir: Path, tmp_path: Path, make_model_dir: Maker) -> None:
    mine = load(str(tiny_model_dir), dtype="float32")
    spec = adapted(mine.model)
    about = {"base": {"model": "tiny", "fingerprint": base_fingerprint(mine)}}
    saved = save(tmp_path / "adapter", mine.model, spec, about)
    other = load(str(make_model_dir(tmp_path / "other", num_hidden_layers=3)))
    with pytest.raises(ModelError, match="was trained on another base: tiny"):
        load_adapter(other.model, saved, base_fingerprint(other))
    # A quantised form of the same base is the same base.
    packed = load(str(tiny_model_dir), dtype="float32", quantize=8, group_size=32)
    load_adapter(packed.model, saved, base_fingerprint(packed))
    assert mx.allclose(packed.model(IDS), mine.model(IDS), atol=1.0)


def test_tensors_that_do_not_fit_are_named_together(model: nn.Module, tiny_model_dir: Path, tmp_path: Path) -> None:
    spec = adapted(model, ["q_proj"])
    saved = save(tmp_path / "adapter", model, spec)
    weights = mx.load(str(saved / "adapters.safetensors"))
    weights["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((32, 9))
    weights["model.layers.9.self_attn.q_proj.lora_a"] = mx.zeros((32, 4))
    del weights["model.layers.1.self_attn.q_proj.lora_b"]
    mx.save_safetensors(str(saved / "adapters.safetensors"), weights)
    with pytest.raises(ModelError) as error:
        load_adapter(load(str(tiny_model_dir)).model, saved)
    said = str(error.value)
    assert "q_proj.lora_a: shape (32, 9), the model's is (32, 4)" in said
    assert "layers.9.self_attn.q_proj.lora_a: the model has no such parameter" in said
    assert "layers.1.self_attn.q_proj.lora_b: not in the file" in said


def test_folders_that_are_no_adapter(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"is not an adapter: adapter_config\.json cannot be read"):
        read_adapter_config(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text("{nonsense")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_adapter_config(tmp_path)
    file.write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match="looks like a PEFT adapter"):
        read_adapter_config(tmp_path)
    file.write_text(json.dumps(adapter_config(LoRASpec(("model.layers.0.mlp.up_proj",), 2, 1.0), model, {})))
    with pytest.raises(ModelError, match=r"adapters\.safetensors: cannot be read"):
        load_adapter(model, tmp_path)


def test_an_adapter_for_modules_that_there_are_not(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"the adapter: .* layer model\.layers\.7\.mlp"):
        attach(model, LoRASpec(("model.layers.7.mlp.up_proj",), 2, 1.0))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_outputs_keep_the_models_type(name: str, dora: bool, tiny_model_dir: Path) -> None:
    model = load(str(tiny_model_dir), dtype=name).model
    adapted(model, "all-linear" if dora else ["all-linear", "embed_tokens"], dora)
    assert model(IDS).dtype == getattr(mx, name)
    assert {v.dtype for v in trained_weights(model).values()} == {mx.float32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_parameters": None}, "lora_parameters is null"),
        ({"lora_parameters": {"scale": 1.0}}, "lora_parameters.rank is missing"),
        ({"lora_parameters": {"rank": None, "scale": 1.0}}, "lora_parameters.rank is null; expected a valid integer"),
        ({"lora_parameters": {"rank": 2.5, "scale": 1.0}}, "lora_parameters.rank is 2.5; expected a valid integer"),
        ({"lora_parameters": {"rank": "8", "scale": 1.0}}, "lora_parameters.rank is '8'; expected a valid integer"),
        ({"lora_parameters": {"rank": True, "scale": 1.0}}, "lora_parameters.rank is True"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "lora_parameters.rank is 0"),
        ({"lora_parameters": {"rank": -1, "scale": 1.0}}, "lora_parameters.rank is -1"),
        ({"lora_parameters": {"rank": 2**31, "scale": 1.0}}, "lora_parameters.rank is 2147483648"),
        ({"lora_parameters": {"rank": 2}}, "lora_parameters.scale is missing"),
        ({"lora_parameters": {"rank": 2, "scale": "big"}}, "lora_parameters.scale is 'big'"),
        ({"lora_parameters": {"rank": 2, "scale": math.nan}}, "lora_parameters.scale is nan; expected a finite number"),
        ({"lora_parameters": {"rank": 2, "scale": math.inf}}, "lora_parameters.scale is inf; expected a finite number"),
        ({"lora_parameters": {"rank": 2, "scale": 1, "dropout": None}}, "lora_parameters.dropout is null"),
        ({"lora_parameters": {"rank": 2, "scale": 1, "dropout": 1.5}}, "lora_parameters.dropout is 1.5"),
        ({"lora_parameters": {"rank": 2, "scale": 1, "keys": "q_proj"}}, "lora_parameters.keys is 'q_proj'"),
        ({"lora_parameters": {"rank": 2, "scale": 1, "keys": [1]}}, "lora_parameters.keys.0 is 1"),
        ({"num_layers": "all"}, "num_layers is 'all'; expected a valid integer"),
        ({"fine_tune_type": "vera"}, "fine_tune_type is 'vera'; expected 'lora', 'dora' or 'full'"),
        ({"mlxft": "0.1"}, "mlxft is '0.1'"),
        ({"mlxft": {"base": None}}, "mlxft.base is null"),
        ({"mlxft": {"base": {"model": 3}}}, "mlxft.base.model is 3"),
        ({"mlxft": {"base": {"fingerprint": 3}}}, "mlxft.base.fingerprint is 3"),
        ({"mlxft": {"base": {"chat_template": {}}}}, "mlxft.base.chat_template is an object"),
        ({"mlxft": {"base": {"dtype": -1}}}, "mlxft.base.dtype is -1"),
        ({"mlxft": {"base": {"quantize": 7}}}, "mlxft.base.quantize is 7"),
        ({"mlxft": {"base": {"group_size": "64"}}}, "mlxft.base.group_size is '64'"),
        ({"lora_parameters": ...}, "lora_parameters is missing"),
    ],
)
def test_a_configuration_that_lacks_something(change: Any, said: str, tmp_path: Path, model: nn.Module) -> None:
    """What is missing, or is something else, is named with its file wherever an adapter is loaded."""
    saved = save(tmp_path / "adapter", model, adapted(model, ["q_proj"]), {"base": {"model": "m", "fingerprint": "f"}})
    file = saved / "adapter_config.json"
    config = {**json.loads(file.read_text("utf-8")), **change}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), "utf-8")
    with pytest.raises(ModelError, match=re.escape(f"{file}: {said}")):
        load_adapter(model, saved)


def test_a_configuration_with_the_least(tmp_path: Path, model: nn.Module, tiny_model_dir: Path) -> None:
    """mlx-lm's own have no keys and nothing of ours; of whole weights nothing low-rank is asked."""
    saved = save(tmp_path / "adapter", model, adapted(model, "all-linear"))
    least = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2, "keys": None}}
    (saved / "adapter_config.json").write_text(json.dumps(least), "utf-8")
    spec = load_adapter(load(str(tiny_model_dir)).model, saved)
    assert spec is not None
    assert (spec.rank, spec.scale, spec.dropout, len(spec.paths)) == (4, 2, 0.0, 14)
    (saved / "adapter_config.json").write_text('{"fine_tune_type": "full", "lora_parameters": null}', "utf-8")
    assert read_adapter_config(saved) == {"fine_tune_type": "full", "lora_parameters": None}


@pytest.mark.parametrize(("name", "layer"), [("kimi_k3", "mlp_res_proj"), ("gemma3n", "prediction_coefs")])
def test_layers_whose_weights_are_read_past_them_are_not_adapted(name: str, layer: str) -> None:
    model = build(name)
    assert any(path.endswith(layer) for path, _ in model.named_modules())
    assert not [path for path in select_targets(model, "all-linear", "all") if path.endswith(layer)]
    with pytest.raises(ConfigError, match=f"'{layer}' matches no module"):
        select_targets(model, [layer], "all")
