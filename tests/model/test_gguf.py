"""Reading .gguf files: SmolLM2 against transformers' numbers, and small files that MLX writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxft.errors import ModelError
from mlxft.model import gguf
from mlxft.model.gguf import PRE_TOKENIZERS, pre_tokenizer_of, read_gguf_header, signature, signature_of
from mlxft.model.load import base_fingerprint, load, load_tokenizer, read_model_config, resolve, skeleton

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_chat.json"


def permute(tensor: mx.array, heads: int) -> mx.array:
    """llama.cpp's order of q and k, as its convert_hf_to_gguf.py makes it."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def write_tiny(loaded: Any, file: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The tiny llama as a .gguf of float32; changes to its metadata, None takes a key away."""
    arrays: dict[str, mx.array] = {}
    for name, value in tree_flatten(loaded.model.parameters()):
        stem, _, part = name.rpartition(".")
        heads = {"q_proj": 4, "k_proj": 2}.get(stem.rpartition(".")[2])
        theirs = f"{gguf.ARCHITECTURES['llama'].theirs(stem, 2)}.{part}"
        arrays[theirs] = value if heads is None else permute(value, heads)
    tokenizer = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    vocab = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 512,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.get),
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in sorted(vocab, key=vocab.get)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": loaded.tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": loaded.tokenizer.eos_token_id,
        "tokenizer.chat_template": loaded.tokenizer.chat_template,
    }
    metadata.update(changes)
    arrays.update(tensors or {})
    kept = {}
    for key, value in metadata.items():
        if value is not None:
            strings = isinstance(value, str) or (isinstance(value, list) and isinstance(value[0], str))
            kept[key] = value if strings else mx.array(value)
    mx.save_gguf(str(file), arrays, kept)
    return file


@pytest.mark.golden
@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text("utf-8"))["cases"], ids=range(4))
def test_smollm2_against_transformers(case: dict[str, Any], smollm2: Any) -> None:
    """Source: the golden file's own note (transformers and torch, float32)."""
    ids = smollm2.tokenizer.apply_chat_template(case["messages"], tokenize=True)
    assert list(ids) == case["ids"]
    x = mx.array([case["ids"]])
    logits = smollm2.model(x)[0, :-1]
    logprobs = mx.take_along_axis(logits - mx.logsumexp(logits, axis=-1, keepdims=True), x[0, 1:, None], axis=-1)[:, 0]
    assert mx.max(mx.abs(logprobs - mx.array(case["logprobs"]))).item() < 2e-3
    trained = mx.array(case["trained"][1:])
    assert trained.sum().item() == case["trained_tokens"]
    assert -(logprobs * trained).sum().item() == pytest.approx(case["nll_sum"], rel=1e-3)


def test_smollm2_tokenizer(smollm2: Any) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids)) == ["<|im_end|>"]
    assert len(tokenizer) == 49152 == smollm2.config["vocab_size"]
    # Digits stand alone, so three of them are three tokens; text comes back as it went in.
    assert len(tokenizer.encode("123")) == 3
    for text in ("Hello, world! 2024\n\n  äöü 日本 🙂", "def f(x):\n\treturn x  # it's"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>a")[0] == tokenizer.bos_token_id


def test_smollm2_packed_as_in_the_file(smollm2: Any) -> None:
    """quantize=4 keeps the 4-bit tensors of the file: dequantised they are the weights of the float load."""
    packed = load("smollm2-135m", quantize=4, dtype="own")
    assert packed.config["quantization"]["bits"] == 4
    assert packed.config["quantization"]["group_size"] == 32
    assert packed.config["quantization"]["model.embed_tokens"]["bits"] == 8
    layer, plain = packed.model.layers[7].self_attn.k_proj, smollm2.model.layers[7].self_attn.k_proj
    back = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4)
    assert mx.array_equal(back.astype(mx.float32), plain.weight)
    assert base_fingerprint(packed) == base_fingerprint(smollm2)
    # Other bits than most of the file has: all of it is quantised again.
    assert load("smollm2-135m", quantize=8).config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_file_and_folder_are_one_model(tiny_model: Any, tmp_path: Path) -> None:
    file = write_tiny(tiny_model, tmp_path / "tiny.gguf")
    read = load(str(file), dtype="float32")
    # MLX reads the numbers back as they are, so nothing is rounded here but the float16 "own" is not asked for.
    ids = mx.array([[3, 40, 77, 5, 9, 120]])
    assert mx.array_equal(read.model(ids), tiny_model.model(ids))
    assert base_fingerprint(read) == base_fingerprint(tiny_model)
    messages = [{"role": "user", "content": "the sands of 1984, and more"}]
    assert read.tokenizer.apply_chat_template(messages) == tiny_model.tokenizer.apply_chat_template(messages)
    assert read.tokenizer.eos_token_ids == {tiny_model.tokenizer.eos_token_id}
    config = read_model_config(str(file))
    assert {k: config[k] for k in ("rope_theta", "rms_norm_eps", "head_dim", "tie_word_embeddings")} == {
        "rope_theta": 10000,
        "rms_norm_eps": 1e-5,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    assert load_tokenizer(str(file)).encode("and") == tiny_model.tokenizer.encode("and")


def test_untied_head_and_quantising_a_plain_file(tiny_model: Any, tmp_path: Path) -> None:
    head = mx.random.normal((len(tiny_model.tokenizer), 32), key=mx.random.key(1))
    file = write_tiny(tiny_model, tmp_path / "a.gguf", {"output.weight": head})
    read = load(str(file), dtype="float32", quantize=4, group_size=32)
    assert read.config["tie_word_embeddings"] is False
    assert read.model.lm_head.bits == 4
    assert read.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_large_tensors_are_read_in_slices(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, as floats and packed, give what whole tensors give; settings are read without any."""
    file = write_tiny(tiny_model, tmp_path / "a.gguf")
    whole = [load(str(file), dtype="own", quantize=bits, group_size=32 if bits else None) for bits in (0, 4)]
    monkeypatch.setattr(gguf, "_SLICE", 3 * 32)
    for bits, want in zip((0, 4), whole):
        got = load(str(file), dtype="own", quantize=bits, group_size=32 if bits else None)
        assert got.config == want.config
        arrays = dict(tree_flatten(want.model.parameters()))
        assert all(mx.array_equal(value, arrays[name]) for name, value in tree_flatten(got.model.parameters()))
    monkeypatch.setattr(gguf.np, "fromfile", None)
    assert read_model_config(str(file))["hidden_size"] == 32
    plan = skeleton(str(file), dtype="own", quantize=4, group_size=32)
    shapes = {name: value.shape for name, value in tree_flatten(plan.model.parameters())}
    assert shapes == {name: value.shape for name, value in arrays.items()}
    with pytest.raises(ModelError, match="not callable"):
        load(str(file))


def test_llama3_rope_goes_into_the_config(tiny_model: Any, tmp_path: Path) -> None:
    """The divisors are those of Llama3RoPE in mlx-lm with the same settings."""
    from mlx_lm.models.rope_utils import Llama3RoPE

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = Llama3RoPE(8, 131072, False, 500000.0, scaling)
    divisors = rope._freqs / (500000.0 ** (mx.arange(0, 8, 2) / 8))
    tensor = {"rope_freqs.weight": divisors}
    file = write_tiny(tiny_model, tmp_path / "a.gguf", tensor, **{"llama.rope.freq_base": 500000.0})
    assert read_model_config(str(file))["rope_scaling"] == scaling
    assert mx.allclose(load(str(file)).model.layers[0].self_attn.rope._freqs, rope._freqs)
    odd = {"rope_freqs.weight": divisors * mx.array([1.0, 1.0, 0.5, 1.0])}
    with pytest.raises(ModelError, match="does not follow Llama 3's rule"):
        read_model_config(str(write_tiny(tiny_model, file, odd, **{"llama.rope.freq_base": 500000.0})))


def test_bos_and_user_defined_tokens(tiny_model: Any, tmp_path: Path) -> None:
    types = [3, 3, 3] + [1] * (len(tiny_model.tokenizer) - 3)
    the = tiny_model.tokenizer.convert_tokens_to_ids("Ġthe")
    types[the] = 4
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.token_type": types}
    tokenizer = load_tokenizer(str(write_tiny(tiny_model, tmp_path / "a.gguf", **changes)))
    ids = tokenizer.encode("aĠtheb")
    assert ids[0] == tokenizer.bos_token_id
    assert the in ids


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "qwen9"}, r"architecture 'qwen9' is not read .* only llama"),
        ({"tokenizer.ggml.model": "t5"}, r"a vocabulary of kind 't5' .*only byte-level BPE"),
        ({"tokenizer.ggml.model": "llama"}, r"no tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.pre": "falcon"}, r"pre-tokenizer 'falcon' is unknown; expected one of smollm"),
        ({"tokenizer.ggml.pre": None}, r"pre-tokenizer 'none' is unknown"),
        ({"llama.expert_count": 8}, r"no llama\.expert_used_count"),
        ({"general.architecture": "qwen3", "qwen3.expert_count": 8}, "a mixture of experts of qwen3 is not read"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama.context_length": None}, r"no llama\.context_length"),
        ({"llama.attention.head_count": [4, 2]}, "expected a whole number"),
        ({"llama.block_count": 3}, "do not fit the metadata"),
        ({"split.count": 2}, "llama-gguf-split --merge"),
    ],
)
def test_refusals(changes: dict[str, Any], says: str, tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        load(str(write_tiny(tiny_model, tmp_path / "a.gguf", **changes)))


def test_unknown_tensors_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    file = write_tiny(tiny_model, tmp_path / "a.gguf", {"blk.0.attn_q_norm.weight": mx.ones(8)})
    with pytest.raises(ModelError, match=r"1 tensors unknown to llama \(blk\.0\.attn_q_norm\.weight\)"):
        load(str(file))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (9, "has tensors in Q8_1, which cannot be read; take a file in another quantisation"),
        (24, "has tensors in I8, which"),
        (99, "has tensors in type 99, which"),
        (12, r"not a multiple of Q4_K block size \(256\); download it again"),
    ],
)
def test_types_that_are_refused(kind: int, says: str, tiny_model: Any, tmp_path: Path) -> None:
    """By name, where the gguf package does not unpack them; Q4_K is one that does not fit the tensor's shape."""
    file = write_tiny(tiny_model, tmp_path / "a.gguf")
    data = bytearray(file.read_bytes())
    at = data.index(b"blk.1.ffn_down.weight") + len(b"blk.1.ffn_down.weight") + 4 + 16
    assert data[at : at + 4] == b"\0\0\0\0"
    data[at] = kind
    file.write_bytes(data)
    with pytest.raises(ModelError, match=says):
        load(str(file))


def test_a_name_that_stands_twice(tiny_model: Any, tmp_path: Path) -> None:
    """One reader would take the first, another the last: no tensor goes unchecked."""
    file = write_tiny(tiny_model, tmp_path / "a.gguf")
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_down.weight", b"blk.0.ffn_down.weight"))
    with pytest.raises(ModelError, match=r"it has 'blk.0.ffn_down.weight' twice; download it again"):
        load(str(file))


@pytest.mark.parametrize("size", [0, 3, 20, 3000, 20000, -40000])
def test_broken_files(size: int, tiny_model: Any, tmp_path: Path) -> None:
    file = write_tiny(tiny_model, tmp_path / "a.gguf")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match="download it again"):
        load(str(file))


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"hello world" * 100)
    with pytest.raises(ModelError, match="not a GGUF file: it starts with b'hell'"):
        load(str(tmp_path / "a.gguf"))


def test_types_of_smollm2() -> None:
    """210 projections in Q4_1, the embedding in Q8_0, 61 norms in F32 (gguf 0.19's reader says the same)."""
    types = [entry.kind for entry in read_gguf_header(resolve("smollm2-135m"))[1].values()]
    assert {kind: types.count(kind) for kind in set(types)} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_pre_tokenizers_are_known_again(name: str) -> None:
    """What a name stands for is recognised in a tokenizer.json, by that name or one that means the same."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    rule = PRE_TOKENIZERS[name]
    made = Tokenizer(models.BPE(ignore_merges=rule.ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(rule.splits))
    found = pre_tokenizer_of(json.loads(made.to_str()))
    assert found is not None
    assert signature(json.loads(made.to_str())["pre_tokenizer"]) == signature_of(PRE_TOKENIZERS[found])
    assert PRE_TOKENIZERS[found].ignore_merges == rule.ignore_merges
    made.normalizer = normalizers.NFC() if rule.nfc else None
    assert PRE_TOKENIZERS[pre_tokenizer_of(json.loads(made.to_str())) or ""].nfc == rule.nfc


@pytest.mark.parametrize(
    ("pattern", "ignoring", "name"),
    [
        # Qwen 2.5 and 3, Llama 3, Phi 4 as their tokenizer.json have it.
        (
            (
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ),
            False,
            "qwen2",
        ),
        (
            (
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ),
            True,
            "llama-bpe",
        ),
        (
            (
                r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            False,
            "dbrx",
        ),
        (r"\p{N}| ?\p{L}+", False, None),
    ],
)
def test_patterns_of_known_models(pattern: str, ignoring: bool, name: str | None) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, bytes_]}
    normal = {"type": "NFC"} if name == "qwen2" else None
    made = {"pre_tokenizer": steps, "model": {"ignore_merges": ignoring}, "normalizer": normal}
    assert pre_tokenizer_of(made) == name


def test_smollm2s_pre_tokenizer(smollm2: Any) -> None:
    assert pre_tokenizer_of(json.loads(smollm2.tokenizer.backend_tokenizer.to_str())) == "smollm"
