"""Every model family as a .gguf file and back; and that the files are still those that llama.cpp ran."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import save_model

from mlxft.errors import ExportError, ModelError
from mlxft.exports.gguf import export_gguf
from mlxft.model.gguf import shards
from mlxft.model.layers import dense_weight
from mlxft.model.load import load, read_model_config, repaired
from tests.architectures import settings
from tests.conftest import make_tokenizer
from tests.exports.test_gguf_out import repack

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf_families.json"
IDS = mx.array([[3, 40, 77, 5, 9, 120, 11, 12, 250, 31, 32, 33, 7, 8, 9, 10, 100, 101, 102, 60, 61, 62, 63, 64]])
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA4 = {"global_head_dim": 16, "vocab_size_per_layer_input": 300}
UNTIED = {"tie_word_embeddings": False}
# Settings that these models do not use, or that say the same in other words.
UNUSED = {
    *("model_type", "pad_token_id", "rope_parameters", "rope_scaling", "partial_rotary_factor"),
    *("num_global_key_value_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "tie_word_embeddings", "use_double_wide_mlp", "sliding_window"),
    "sliding_window_pattern",
}
# Name -> name in tests/architectures.py, and what differs from that.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", UNTIED),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_next": ("qwen3_next", DELTA),
    "qwen3_5": ("qwen3_5", {**DELTA, "num_experts": 0, "rope_parameters": ROPE}),
    "qwen3_5_moe": ("qwen3_5_moe", {**DELTA, "rope_parameters": ROPE}),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4 k=v": (
        "gemma4_text",
        {
            **GEMMA4,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "gemma4 moe": ("gemma4_text moe", GEMMA4),
    "gpt_oss": ("gpt_oss", {"rope_scaling": YARN}),
    "glm4": ("glm4", {"attention_bias": True, "rope_traditional": True}),
    "glm4_moe": (
        "glm4_moe",
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "attention_bias": True, "head_dim": 16},
    ),
    "smollm3": (
        "smollm3",
        {"num_hidden_layers": 5, "layer_types": None, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "granite": (
        "granite untied",
        {"attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    ),
    "olmo2": ("olmo2", {**UNTIED, "rope_scaling": YARN}),
}


def family_dir(folder: Path, case: str, **changes: Any) -> Path:
    """A folder with a tiny model whose weights are the same on every machine."""
    kind, own = CASES[case]
    own = own | changes
    config = settings(kind, vocab_size=300, **own)
    config |= {} if "text_config" in config else own
    tokenizer = make_tokenizer()
    for part in (config, config.get("text_config", {})):
        part |= {"vocab_size": 300, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}
    config = {k: v for k, v in config.items() if v is not None or k == "rope_scaling"}
    config = {"rope_theta": 10000.0, "max_position_embeddings": 128} | config
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = repaired(module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config)))))
    rng, leaves = np.random.default_rng(1), []
    for name, value in sorted(tree_flatten(model.parameters())):
        noise = 0.2 * rng.standard_normal(value.shape)
        leaves.append((name, mx.array(noise + (value.ndim == 1), mx.float32)))
    model.update(tree_unflatten(leaves))
    folder.mkdir(parents=True)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer.save_pretrained(str(folder))
    return folder


def content(file: Path) -> dict[str, Any]:
    """What a file says of its model, a digest of its tensors' names, types and shapes, and a number that their order
    of rows changes."""
    reader = GGUFReader(file)
    said = {n: f.contents() for n, f in reader.fields.items() if not n.startswith(("GGUF", "tokenizer.", "mlxft."))}
    tensors = sorted(reader.tensors, key=lambda t: t.name)
    table = "\n".join(f"{t.name} {t.tensor_type.name} {t.shape.tolist()}" for t in tensors)
    probe = sum(float(np.cos(np.arange(t.data.size)) @ np.tanh(t.data.astype(np.float64).ravel())) for t in tensors)
    return {"settings": said, "tensors": hashlib.sha256(table.encode()).hexdigest(), "probe": round(probe, 4)}


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_a_family_read_back_is_the_same(case: str, tmp_path: Path) -> None:
    """f32: to the bit, out and in and out again. The file is the one whose logits llama.cpp's were (golden's note)."""
    folder = family_dir(tmp_path / "m", case)
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    export_gguf(folder, first, kind="f32")
    base, read = load(str(folder), dtype="float32"), load(str(first), dtype="float32")
    assert mx.abs(read.model(IDS) - base.model(IDS)).max().item() < 1e-5
    before, after = (dataclasses.asdict(getattr(m, "language_model", m).args) for m in (base.model, read.model))
    assert {key for key, value in before.items() if value != after[key]} <= UNUSED
    export_gguf(first, second, kind="f32")
    one, two = ({t.name: t.data for t in GGUFReader(file).tensors} for file in (first, second))
    # A decay goes through a logarithm and back.
    assert set(one) == set(two)
    assert all(np.allclose(one[n], two[n], rtol=1e-6 if n.endswith("ssm_a") else 0, atol=0) for n in one)
    assert read_model_config(str(first)) == read_model_config(str(second)) | {"torch_dtype": "float16"}
    golden = json.loads(GOLDEN.read_text("utf-8"))["cases"][case]
    seen = content(first)
    assert json.loads(json.dumps(seen["settings"])) == golden["settings"]
    assert content(second)["settings"] == seen["settings"] | {"general.name": "a"}
    assert (seen["tensors"], seen["probe"]) == (golden["tensors"], pytest.approx(golden["probe"], abs=2e-3))


def test_a_mixtures_adapter(tmp_path: Path, save_adapter: Any) -> None:
    """As llama.cpp puts it together: for each expert base + alpha / rank * B A, and for the others as ever."""
    family_dir(tmp_path / "m", "qwen3_5_moe")
    save_adapter(tmp_path / "m", tmp_path / "adapter")
    files = {name: tmp_path / f"{name}.gguf" for name in ("lora", "fused", "base")}
    export_gguf(tmp_path / "adapter", files["lora"], kind="f32", lora=True)
    export_gguf(tmp_path / "adapter", files["fused"], kind="f32")
    export_gguf(tmp_path / "m", files["base"], kind="f32")
    parts, fused, base = ({t.name: t.data for t in GGUFReader(files[n]).tensors} for n in ("lora", "fused", "base"))
    names = {name.rpartition(".")[0] for name in parts}
    assert {"blk.0.ffn_down_exps.weight", "blk.0.ffn_gate_inp_shexp.weight", "blk.0.ssm_out.weight"} <= names
    assert parts["blk.0.ffn_down_exps.weight.lora_a"].shape == (4, 4, 16)
    for name in names:
        product = 10.0 / 4 * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
        assert np.allclose(base[name] + product, fused[name], atol=1e-5), name


def test_an_experts_scale_of_gemma4_is_in_its_adapter(tmp_path: Path, save_adapter: Any) -> None:
    """llama.cpp multiplies what the base's expert gives by the scale, and not what the adapter adds."""
    family_dir(tmp_path / "m", "gemma4 moe")
    adapted = save_adapter(tmp_path / "m", tmp_path / "adapter")
    export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", kind="f32", lora=True)
    parts = {t.name: t.data for t in GGUFReader(tmp_path / "a.gguf").tensors}
    layer = adapted.model.layers[0]
    scale = np.array(layer.router.per_expert_scale)[:, None, None]
    factor = np.array(layer.experts.switch_glu.down_proj.lora_b)
    assert np.allclose(parts["blk.0.ffn_down_exps.weight.lora_b"], factor * scale)


def rewritten(
    source: Path, out: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], **options: Any
) -> Path:
    """A file by the gguf package's writer, with its metadata and tensors changed."""
    reader = GGUFReader(source)
    fields = {n: f for n, f in reader.fields.items() if not n.startswith("GGUF") and n != "general.architecture"}
    said = {n: (f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None) for n, f in fields.items()}
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    change(said, tensors)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents(), **options)
    for name, value in said.items():
        writer.add_key_value(name, *value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_files_of_llama_cpps_converter(tmp_path: Path) -> None:
    """Experts' gate and up in one tensor, the shared expert's gate as a vector, and a layer that predicts more."""
    export_gguf(family_dir(tmp_path / "m", "qwen3_5_moe"), tmp_path / "a.gguf", kind="f32")

    def change(said: dict[str, Any], tensors: dict[str, Any]) -> None:
        for layer in range(2):
            gate, up = (tensors.pop(f"blk.{layer}.ffn_{half}_exps.weight") for half in ("gate", "up"))
            tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
            tensors[f"blk.{layer}.ffn_gate_inp_shexp.weight"] = tensors[f"blk.{layer}.ffn_gate_inp_shexp.weight"][0]
        tensors["blk.2.nextn.eh_proj.weight"] = np.ones((32, 64), np.float32)
        _, *kind = said["qwen35moe.block_count"]
        said["qwen35moe.block_count"] = (3, *kind)
        said["qwen35moe.nextn_predict_layers"] = (1, *kind)

    read = load(str(rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", change)), dtype="float32")
    assert mx.allclose(read.model(IDS), load(str(tmp_path / "a.gguf"), dtype="float32").model(IDS), atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("block_count", 1 << 31, "num_hidden_layers is 2147483648"),
        ("attention.sliding_window_pattern", [True] * 3, "sliding_window_pattern is for 3 layers; the model has 4"),
        ("attention.head_count_kv", [2, 2, 2], "head_count_kv is for 3 layers"),
        ("nextn_predict_layers", 1 << 31, "num_hidden_layers is -"),
    ],
)
def test_metadata_that_lies(key: str, value: Any, says: str, tmp_path: Path) -> None:
    """Nothing is built from numbers that no model has."""
    export_gguf(family_dir(tmp_path / "m", "gemma4"), tmp_path / "a.gguf", kind="f32")

    def change(said: dict[str, Any], tensors: dict[str, Any]) -> None:
        usual = GGUFValueType.ARRAY if isinstance(value, list) else GGUFValueType.UINT32
        _, *kind = said.get(f"gemma4.{key}", (0, usual, None))
        said[f"gemma4.{key}"] = (value, *kind)

    with pytest.raises(ModelError, match=says):
        load(str(rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", change)))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in three files or more, as the gguf package's writer cuts it."""
    export_gguf(family_dir(tmp_path / "m", "mixtral"), tmp_path / "a.gguf", kind="f32")
    rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda *_: None, split_max_tensors=8)
    return sorted(tmp_path.glob("b-*.gguf"))


def test_any_part_is_the_whole_model(parts: list[Path]) -> None:
    want = load(str(parts[0].with_name("a.gguf")), dtype="float32").model(IDS)
    assert len(parts) == 3
    assert shards(parts[1]) == parts
    assert all(mx.array_equal(load(str(part), dtype="float32").model(IDS), want) for part in parts)


def test_parts_that_are_not_whole(parts: list[Path]) -> None:
    """Missing, cut off, another part's copy, another model's file, and a name that hides the others."""
    good = parts[1].read_bytes()
    other = parts[0].with_name("a.gguf").read_bytes()
    spoilt = {r"is missing": None, r"broken or cut off": good[:-9], r"is not part 2 of the 3": parts[2].read_bytes()}
    for says, data in (*spoilt.items(), (r"is not part 2 of the 3 .*holds 'blk", other)):
        parts[1].unlink(missing_ok=True)
        if data is not None:
            parts[1].write_bytes(data)
        with pytest.raises(ModelError, match=rf"b-00002-of-00003\.gguf: {says}"):
            load(str(parts[0]))
    parts[1].with_name("c.gguf").write_bytes(good)
    with pytest.raises(ModelError, match=r"c\.gguf: is one of 3 parts, and its name does not say so"):
        load(str(parts[1].with_name("c.gguf")))


def test_parts_of_two_files(tmp_path: Path) -> None:
    """With the same names, numbers and tensors: a wider model's, and one that says that it is another."""
    parts = {}
    for width in (32, 64):
        export_gguf(family_dir(tmp_path / f"m{width}", "mixtral", hidden_size=width), tmp_path / "a.gguf", kind="f16")
        rewritten(tmp_path / "a.gguf", tmp_path / f"{width}.gguf", lambda *_: None, split_max_tensors=8)
        (tmp_path / "a.gguf").rename(tmp_path / f"a{width}.gguf")
        parts[width] = sorted(tmp_path.glob(f"{width}-*.gguf"))
    second = parts[32][1]
    inside = {t.name for t in GGUFReader(second).tensors}

    def change(said: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key, value in (("no", 1), ("count", 3), ("tensors.count", len(tensors))):
            said[f"split.{key}"] = (value, GGUFValueType.UINT32, None)
        said["general.name"] = ("theirs", GGUFValueType.STRING, None)
        for name in set(tensors) - inside:
            del tensors[name]

    rewritten(tmp_path / "a32.gguf", second, change)
    with pytest.raises(
        ModelError,
        match=r"-00002-of-00003\.gguf: .* another file: it says theirs for general\.name, the first part m32",
    ):
        load(str(parts[32][0]))
    second.write_bytes(parts[64][1].read_bytes())
    with pytest.raises(
        ModelError, match=r"-00002-of-00003\.gguf: is a part of another file: it holds \w+\.weight as F16"
    ):
        load(str(parts[32][2]))


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False; llama.cpp takes True for granted"),
        ("qwen3_moe", {"rope_scaling": YARN}, "rope scaling 'yarn' of qwen3moe is not written as .gguf, only none"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 0]}, "leaves out the rope of every 4th layer"),
        ("qwen3_5", {"linear_value_head_dim": 8}, "linear_value_head_dim is 8; .* linear_key_head_dim, 16"),
        ("olmo2", {"tie_word_embeddings": True}, "no olmo2 whose head is its embedding"),
        ("olmo2", {"head_dim": 16}, "head_dim is 16; .* hidden_size together, 32"),
        ("glm4", {"rope_traditional": False}, "rope_traditional"),
        ("gemma4", {"vocab_size_per_layer_input": 200}, "vocab_size_per_layer_input"),
        ("smollm3", {"attention_bias": True}, r"no place for \(model\.layers\.4\.self_attn\.o_proj\.bias"),
    ],
)
def test_what_llama_cpp_would_run_otherwise(case: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=says):
        export_gguf(family_dir(tmp_path / "m", case, **changes), tmp_path / "a.gguf", kind="f32")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("case", "kind", "bits", "changes", "more"),
    [
        ("gpt_oss", "MXFP4", 4, {"hidden_size": 64, "intermediate_size": 64}, []),
        ("qwen3_5_moe", "Q8_0", 8, {f"linear_{n}_head_dim": 32 for n in ("key", "value")}, ["out_proj 8 2"]),
    ],
)
def test_packed_tensors_stay_packed(
    case: str, kind: str, bits: int, changes: dict[str, Any], more: list[str], tmp_path: Path
) -> None:
    """Stacked experts, and heads that are reordered, also along the inputs: as the floats they stand for."""
    folder = family_dir(tmp_path / "m", case, moe_intermediate_size=32, shared_expert_intermediate_size=32, **changes)
    export_gguf(folder, tmp_path / "a.gguf", kind="f32")
    repack(tmp_path / "a.gguf", tmp_path / "b.gguf", kind)
    plain = load(str(tmp_path / "b.gguf"), dtype="float32")
    packed = load(str(tmp_path / "b.gguf"), dtype="float32", quantize=bits)
    floats, seen = dict(plain.model.named_modules()), list[str]()
    for name, layer in packed.model.named_modules():
        if hasattr(layer, "bits"):
            seen.append(name.rpartition(".")[2] + f" {layer.bits} {dense_weight(layer).ndim}")
            assert mx.allclose(dense_weight(layer), floats[name].weight, atol=1e-3), name  # floats are read in float16
    assert {f"down_proj {bits} 3", *more} <= set(seen)


def test_mxfp4_goes_in_and_out_as_it_is(tmp_path: Path) -> None:
    folder = family_dir(tmp_path / "m", "gpt_oss", hidden_size=64, intermediate_size=64)
    export_gguf(folder, tmp_path / "a.gguf", kind="f32")
    repack(tmp_path / "a.gguf", tmp_path / "b.gguf", "MXFP4")
    said = export_gguf(tmp_path / "b.gguf", tmp_path / "c.gguf", kind="bf16")
    assert any("6 layers of experts stay in mxfp4" in line for line in said)
    one, two = ({t.name: t for t in GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in "bc")
    experts = [name for name in one if name.endswith("_exps.weight")]
    assert all(two[n].tensor_type.name == "MXFP4" and np.array_equal(one[n].data, two[n].data) for n in experts)
    assert two["blk.0.attn_q.weight"].tensor_type.name == "BF16"


def test_heads_narrower_than_groups_cannot_stay_packed(tmp_path: Path) -> None:
    export_gguf(family_dir(tmp_path / "m", "qwen3_5"), tmp_path / "a.gguf", kind="f32")
    repack(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0")
    with pytest.raises(ModelError, match=r"ssm_out\.weight cannot be kept packed; read it as floats"):
        load(str(tmp_path / "b.gguf"), quantize=8)
