"""Models and adapters as .gguf files: what stands in them, and that they are the same models when read back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader

from mlxft import __version__
from mlxft.data.dataset import set_embedding_rows
from mlxft.errors import ModelError
from mlxft.exports.gguf import export_gguf, vocabulary
from mlxft.model.gguf import ARCHITECTURES, getter
from mlxft.model.layers import dense_weight
from mlxft.model.load import load, load_tokenizer
from mlxft.runs import load_run

IDS = mx.array([[3, 40, 77, 5, 9, 120, 11, 12, 250, 31, 32, 33]])
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"type": "longrope", "long_factor": [1.0, 1.5, 2.0, 4.0], "short_factor": [1.0, 1.0, 1.1, 1.2]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama3": (
        "llama",
        {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "max_position_embeddings": 16384, "attention_bias": True},
    ),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "tie_word_embeddings": False}),
    "yarn": (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "mistral": ("mistral", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", WIDE),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {}),
    "phi3-long": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 64, "num_attention_heads": 4},
    ),
}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items() if not name.startswith("GGUF")}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_model_read_back_is_the_same(case: str, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """f32: to the bit, so names, row order, norms and rope are undone exactly; the identity of the base too."""
    kind, changes = FAMILIES[case]
    folder = make_model_dir(tmp_path / "m", kind, **changes)
    base = load(str(folder), dtype="float32")
    said = export_gguf(folder, tmp_path / "a.gguf", kind="f32")
    assert said[0].startswith(f"wrote {tmp_path / 'a.gguf'} (")
    read = load(str(tmp_path / "a.gguf"), dtype="float32")
    # Norms that are stored with 1 added lose what 1 + w has no room for.
    tolerance = 2e-5 if case.startswith("gemma") else 0
    assert mx.abs(read.model(IDS) - base.model(IDS)).max().item() <= tolerance
    if kind != "mistral":  # which comes back as the llama that it is
        assert read.fingerprint == base.fingerprint
    messages = [{"role": "user", "content": "the sands of 1984, and more"}]
    assert read.tokenizer.apply_chat_template(messages) == base.tokenizer.apply_chat_template(messages)
    assert read.tokenizer.eos_token_ids == base.tokenizer.eos_token_ids


@pytest.mark.parametrize("case", ["llama", "qwen2"])
@pytest.mark.parametrize(("kind", "size"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_kinds(case: str, kind: str, size: float, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """In -> out -> in: a second export of the first one's file has the same bytes in every tensor."""
    folder = make_model_dir(tmp_path / "m", FAMILIES[case][0], **FAMILIES[case][1])
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    export_gguf(folder, first, kind=kind)
    export_gguf(first, second, kind=kind)
    one, two = ({t.name: t for t in GGUFReader(file).tensors} for file in (first, second))
    assert list(one) == list(two)
    assert all(one[n].tensor_type == two[n].tensor_type and np.array_equal(one[n].data, two[n].data) for n in one)
    wanted = {1: "F32", 2: kind.upper()}
    assert all(t.tensor_type.name == wanted[len(t.shape)] for t in one.values())
    assert fields(first) == {**fields(second), "general.name": "m"}
    want, got = (load(str(p), dtype="float32").model(IDS) for p in (folder, first))
    assert 0 < mx.abs(want - got).max().item() < size * mx.abs(want).max().item() * 10


Pack = Callable[[str, np.ndarray], np.ndarray]


def repack(source: Path, out: Path, kind: str, pack: Pack | None = None) -> dict[str, Any]:
    """A file with its matrices in another kind, by the gguf package alone or by `pack`; gives what they stand for."""
    reader, wanted = GGUFReader(source), reference.GGMLQuantizationType[kind]
    pack = pack or (lambda _, value: reference.quants.quantize(value, wanted))
    meant = {}
    writer = reference.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF") and name != "general.architecture":
            kinds = [*field.types, None]
            writer.add_key_value(name, field.contents(), kinds[0], kinds[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2 or tensor.shape[0] % 32:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        packed = pack(tensor.name, np.array(tensor.data))
        writer.add_tensor(tensor.name, packed, raw_dtype=wanted)
        meant[tensor.name] = reference.quants.dequantize(packed, wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16"])
@pytest.mark.parametrize("case", ["qwen3", "gemma3", "phi3"])
def test_packed_files_of_others(case: str, kind: str, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """What the gguf package packs is read as what it unpacks: in bfloat16 if that holds its scales, else in float16."""
    folder = make_model_dir(tmp_path / "m", FAMILIES[case][0], **FAMILIES[case][1])
    export_gguf(folder, tmp_path / "a.gguf", kind="f32")
    meant = repack(tmp_path / "a.gguf", tmp_path / "b.gguf", kind)
    read = load(str(tmp_path / "b.gguf"), dtype="float32").model
    arch = ARCHITECTURES[FAMILIES[case][0]]
    layers = {f"{arch.theirs(path, 2)}.weight": layer for path, layer in read.named_modules()}
    for name, value in meant.items():
        assert np.allclose(np.array(layers[name].weight), value, atol=1e-3), name
    if kind != "BF16":  # the form that MLX has of the same type is the same model
        bits = 4 if kind == "MXFP4" else int(kind[1])
        packed = load(str(tmp_path / "b.gguf"), dtype="own", quantize=bits)
        assert packed.config["quantization"]["bits"] == bits
        for path, layer in packed.model.named_modules():
            if f"{arch.theirs(path, 2)}.weight" in meant:
                weight = layers[f"{arch.theirs(path, 2)}.weight"].weight
                assert mx.allclose(dense_weight(layer).astype(mx.float32), weight, atol=1e-6), path
    own = load(str(tmp_path / "b.gguf"), dtype="own")
    assert own.config["torch_dtype"] == ("bfloat16" if kind in ("BF16", "MXFP4") else "float16")


# Where the float16 scales of a block stand, for kinds that the gguf package unpacks but does not pack.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}


@pytest.mark.parametrize("kind", SCALES)
def test_k_quants_are_what_the_gguf_package_unpacks(
    kind: str, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Random blocks with scales of 2e-4: the logits are those of a file that holds their numbers unpacked."""
    items, size = reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(7)

    def blocks(name: str, value: np.ndarray) -> np.ndarray:
        out = rng.integers(0, 256, (value.size // items, size), dtype=np.uint8)
        for at in SCALES[kind]:
            out[:, at : at + 2] = np.full(1, 2e-4, np.float16).view(np.uint8)
        return out.reshape(value.shape[0], -1)

    folder = make_model_dir(tmp_path / "m", "llama", hidden_size=256, intermediate_size=512, head_dim=64)
    export_gguf(folder, tmp_path / "a.gguf", kind="f32")
    meant = repack(tmp_path / "a.gguf", tmp_path / "b.gguf", kind, blocks)
    repack(tmp_path / "a.gguf", tmp_path / "c.gguf", "F16", lambda name, _: meant[name].astype(np.float16))
    read, want = load(str(tmp_path / "b.gguf"), dtype="float32"), load(str(tmp_path / "c.gguf"), dtype="float32")
    assert "quantization" not in read.config
    assert mx.array_equal(read.model(IDS), want.model(IDS))
    assert mx.std(want.model(IDS)).item() > 1e-2
    assert load(str(tmp_path / "b.gguf"), dtype="own").config["torch_dtype"] == "float16"
    packed = load(str(tmp_path / "b.gguf"), dtype="float32", quantize=4)
    assert packed.config["quantization"] == {"group_size": 32 if "4" in kind else 64, "bits": 4, "mode": "affine"}
    own = load(str(tmp_path / "b.gguf"), dtype="float32", quantize=int(re.findall("[0-9]", kind)[0]))
    layer = own.model.layers[0].mlp.up_proj
    back = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    off = mx.abs(back - read.model.layers[0].mlp.up_proj.weight).max().item()
    # K types of 4 and 5 bits lose the rounding of their scales; the others are quantised again in larger groups.
    assert (off < 4e-4) == (kind in ("Q4_K", "Q5_K")), off


def test_blocks_that_stand_for_no_finite_number(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path / "m", "llama", hidden_size=256, intermediate_size=512, head_dim=64)
    export_gguf(folder, tmp_path / "a.gguf", kind="f32")
    full = lambda _, value: np.full((value.shape[0], value.shape[1] // 256 * 144), 0xFF, np.uint8)  # noqa: E731
    with np.errstate(all="ignore"):
        repack(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_K", full)
    with pytest.raises(ModelError, match="a tensor in Q4_K has values that are not finite; download it again"):
        load(str(tmp_path / "b.gguf"))


def test_rows_turn_there_and_back() -> None:
    """Heads of 4 rows: halves (0 1 | 2 3) become neighbours 0 2 1 3, as convert_hf_to_gguf.py has it."""
    rows, get = mx.arange(8)[:, None] * mx.ones((1, 3)), getter({"num_attention_heads": 2})
    (layout,) = ARCHITECTURES["llama"].layouts("blk.0.attn_q.weight")
    turned = layout.out(rows, get)
    assert turned[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert mx.array_equal(layout.back(turned, get), rows)


def test_metadata_of_a_llama(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": False}
    folder = make_model_dir(tmp_path / "Tiny", "llama", **WIDE, **changes)
    export_gguf(folder, tmp_path / "a.gguf", kind="f16")
    seen = fields(tmp_path / "a.gguf")
    tokens, merges = seen.pop("tokenizer.ggml.tokens"), seen.pop("tokenizer.ggml.merges")
    kinds, template = seen.pop("tokenizer.ggml.token_type"), seen.pop("tokenizer.chat_template")
    assert seen == {
        "general.architecture": "llama",
        "mlxft.version": __version__,
        "general.type": "model",
        "general.name": "Tiny",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.vocab_size": 300,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 500000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert (tokens[:3], kinds[:4], len(tokens)) == (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [3, 3, 3, 1], 300)
    assert merges[:2] == ["t h", "h e"]
    assert template == load_tokenizer(str(folder)).chat_template
    first = GGUFReader(tmp_path / "a.gguf").tensors[0]
    assert (first.name, first.tensor_type.name) == ("rope_freqs.weight", "F32")
    # Waves of 2 pi 500000^(i / 4) positions: 6.3, 167, 4443 and 118 thousand; the third lies between.
    smooth = (8192 / (2 * np.pi * 500000**0.5) - 1) / 3
    assert np.allclose(first.data, [1, 1, 1 / ((1 - smooth) / 8 + smooth), 8], rtol=1e-5)


def test_a_padded_embedding(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path / "m", "qwen3", vocab_size=320)
    export_gguf(folder, tmp_path / "a.gguf", kind="f16")
    seen = fields(tmp_path / "a.gguf")
    assert seen["tokenizer.ggml.tokens"][299:302] == ["ers", "[PAD300]", "[PAD301]"]
    assert seen["tokenizer.ggml.token_type"][299:302] == [1, 5, 5]


@pytest.mark.parametrize("case", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_fused(
    case: str, dora: bool, make_model_dir: Callable[..., Path], tmp_path: Path, save_adapter: Any
) -> None:
    folder = make_model_dir(tmp_path / "m", FAMILIES[case][0], **FAMILIES[case][1])
    adapted = save_adapter(folder, tmp_path / "adapter", dora=dora)
    said = export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", kind="f32")
    assert "the adapter is fused into" in said[1]
    read = load(str(tmp_path / "a.gguf"), dtype="float32").model
    assert mx.allclose(read(IDS), adapted(IDS), atol=2e-4)
    assert not mx.allclose(load(str(folder), dtype="float32").model(IDS), adapted(IDS), atol=2e-2)


def test_a_packed_base_is_dequantised(make_model_dir: Callable[..., Path], tmp_path: Path, save_adapter: Any) -> None:
    from mlxft.exports.fuse import convert_model

    convert_model(str(make_model_dir(tmp_path / "m", "llama", **WIDE)), tmp_path / "q", quantize=4, group_size=32)
    adapted = save_adapter(tmp_path / "q", tmp_path / "adapter")
    said = export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", kind="f32")
    assert any("the base is quantised: 15 layers were dequantised first" in line for line in said)
    read = load(str(tmp_path / "a.gguf"), dtype="float32").model
    assert mx.allclose(read(IDS), adapted(IDS), atol=2e-4)


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3"])
def test_a_lora_file(case: str, make_model_dir: Callable[..., Path], tmp_path: Path, save_adapter: Any) -> None:
    """As llama.cpp puts it together: base tensor + alpha / rank * B A, in the base file's own row order."""
    folder = make_model_dir(tmp_path / "m", FAMILIES[case][0], **FAMILIES[case][1])
    adapted = save_adapter(folder, tmp_path / "adapter")
    export_gguf(tmp_path / "adapter", tmp_path / "lora.gguf", kind="f32", lora=True)
    export_gguf(tmp_path / "adapter", tmp_path / "fused.gguf", kind="f32")
    export_gguf(folder, tmp_path / "base.gguf", kind="f32")
    lora = GGUFReader(tmp_path / "lora.gguf")
    seen = fields(tmp_path / "lora.gguf")
    assert {k: v for k, v in seen.items() if k.startswith(("adapter", "general.type"))} == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 10.0,  # scale 2.5, rank 4
    }
    parts = {t.name: t.data for t in lora.tensors}
    base, fused = ({t.name: t.data for t in GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("base", "fused"))
    names = {name.rpartition(".")[0] for name in parts}
    assert {f"{n}.lora_a" for n in names} | {f"{n}.lora_b" for n in names} == set(parts)
    assert names == {n for n in base if n.startswith("blk.") and "norm" not in n and n.endswith(".weight")}
    for name in names:
        product = 10.0 / 4 * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
        assert np.allclose(base[name] + product, fused[name], atol=1e-5)
    assert adapted is not None


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary(prefix: bool, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Scores say what merges said: text comes out in the same tokens, unknown letters as bytes."""
    folder = make_model_dir(tmp_path / "m", "llama", vocab_size=300)
    write_pieces(folder, prefix)
    export_gguf(folder, tmp_path / "a.gguf", kind="f16")
    seen = fields(tmp_path / "a.gguf")
    assert (seen["tokenizer.ggml.model"], seen["tokenizer.ggml.add_bos_token"]) == ("llama", True)
    assert seen["tokenizer.ggml.add_space_prefix"] is prefix
    assert seen["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    at = seen["tokenizer.ggml.tokens"].index("▁the")
    assert seen["tokenizer.ggml.scores"][at] == -2.0
    ours, read = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path / "a.gguf"))
    for text in ("the the hat", "  the\n\nhat é <s> the", "hehe", ""):
        assert read.encode(text) == ours.encode(text)
        ids = ours.encode(text)
        assert read.decode(ids) == ours.decode(ids)
        assert streamed(read, ids) == streamed(ours, ids)


def streamed(tokenizer: Any, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)


def write_pieces(folder: Path, prefix: bool = True) -> None:
    """A tokenizer like Llama 2's into a model folder: bytes, a few letters and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("h", "e"), ("a", "t"), ("h", "at")]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *"▁theat"[:-1], *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(undo if prefix else undo[:-1])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(str(folder))


def test_phi3s_name_tells_llama_cpp_of_its_marks(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp looks for Phi 3's tokens in any file of that name, and fails without them."""
    export_gguf(make_model_dir(tmp_path / "phi3-fine", "phi3"), tmp_path / "a.gguf", kind="f16")
    assert fields(tmp_path / "a.gguf")["general.name"] == "phi 3-fine"


def test_of_several_ends_the_one_that_the_template_writes_is_the_turns(
    make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where a mark's name holds the letters of the answer that the template is asked with."""
    tokenizer = load_tokenizer(make_model_dir(tmp_path / "m", "llama"))
    tokenizer._tokenizer.add_special_tokens({"additional_special_tokens": ["<|after|>", "<|end_of_block|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end_of_block|>")
    for end in ("<|after|>", "<|end_of_block|>"):
        tokenizer.add_eos_token(end)
    set_embedding_rows(tokenizer, len(tokenizer))
    eot = vocabulary(tokenizer, len(tokenizer))["tokenizer.ggml.eot_token_id"]
    assert tokenizer.convert_ids_to_tokens(eot) == "<|end_of_block|>"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_trained_run_goes_out(method: str, recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """What a run answers with, its file answers with."""
    from mlxft.run import train

    rank = {"tune.rank": 4 if method == "lora" else None}
    run = train(recipe(**{"optim.lr": 1e-2, "run.steps": 6, "tune.method": method, **rank}))
    export_gguf(run.dir, tmp_path / "a.gguf", kind="f32")
    want = load_run(run.dir).model(IDS)
    assert mx.allclose(load(str(tmp_path / "a.gguf"), dtype="float32").model(IDS), want, atol=1e-4)
