"""Reads a .gguf file of the llama family: weights under Hugging Face's names, config, tokenizer.

MLX reads the container (`mx.load(..., return_metadata=True)`): Q4_0 and Q4_1 come out as affine 4-bit and Q8_0 as
affine 8-bit, all in groups of 32 (weight, scales, biases), F16 and F32 as they are. What differs from a
Hugging Face folder stands in the tables below, one entry for each architecture and each pre-tokenizer.
Layout and names: ggml/docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxft.errors import ModelError
from mlxft.model.gguf_header import tensor_types

GROUP_SIZE = 32
# MLX reads more, and reads some of it wrongly.
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0")


@dataclass(frozen=True)
class Architecture:
    """How one value of `general.architecture` maps to Hugging Face's world."""

    model_type: str
    hf_class: str
    outer: dict[str, str]
    block: dict[str, str]
    # Projections whose rows llama.cpp reorders for its rope, with the key that holds their number of heads.
    permuted: dict[str, str]


ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        hf_class="LlamaForCausalLM",
        outer={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
        block={
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
    ),
}
# The frequencies of Llama 3's rope come as a tensor of their own; they go into the config.
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class PreTokenizer:
    """What `tokenizer.ggml.pre` stands for, in the steps of the `tokenizers` library."""

    steps: Callable[[], list[Any]]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _byte_level(regex: bool) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _smollm() -> list[Any]:
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]


def _split(digits: str) -> Callable[[], list[Any]]:
    """GPT-4's pattern; families differ in how many digits stand together."""

    def steps() -> list[Any]:
        from tokenizers import Regex, pre_tokenizers

        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            + digits
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        return [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level(False)]

    return steps


_LLAMA3 = PreTokenizer(_split(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "smollm": PreTokenizer(_smollm),
    "gpt-2": PreTokenizer(lambda: [_byte_level(True)]),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer(_split(r"\p{N}"), nfc=True),
}

# token_type in the file: 3 is a control token, 4 one that the maker added as it stands.
CONTROL, USER_DEFINED = 3, 4


@dataclass
class GgufFile:
    """A file as read: tensors under llama.cpp's names, and the key-value metadata."""

    path: Path
    tensors: dict[str, mx.array]
    metadata: dict[str, Any]
    architecture: Architecture

    def has(self, key: str) -> bool:
        return self._full(key) in self.metadata

    def _full(self, key: str) -> str:
        common = key.startswith(("general.", "tokenizer.", "split."))
        return key if common else f"{self.metadata['general.architecture']}.{key}"

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value as Python has it; ModelError where it is missing and has no default."""
        full = self._full(key)
        if full not in self.metadata:
            if default is None:
                raise ModelError(f"{self.path}: the metadata has no {full}; the file is incomplete, convert it anew")
            return default
        found = self.metadata[full]
        return found.tolist() if isinstance(found, mx.array) else found

    def integer(self, key: str, default: int | None = None) -> int:
        found = self.value(key, default)
        if not isinstance(found, int):
            raise ModelError(f"{self.path}: {self._full(key)} is not one whole number: {found}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        # Stored as float32: 7 digits give back the 1e-05 that was meant.
        return float(f"{self.value(key, default):.7g}")


def read(path: Path) -> GgufFile:
    """Read the whole file.

    Raises:
        ModelError: not a GGUF file, truncated, split, of an architecture or quantisation that is not read here.
    """
    try:
        types = set(tensor_types(path).values())
    except OSError as error:
        raise ModelError(f"{path}: can not be read: {error.strerror or error}") from error
    except (ValueError, OverflowError) as error:
        raise ModelError(f"{path}: {error}; download it again") from error
    if odd := sorted(types - set(READABLE)):
        raise ModelError(
            f"{path}: holds tensors in {', '.join(odd)}, which can not be read right; take a file in one of "
            f"{', '.join(READABLE)}, or the model's safetensors"
        )
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        tensors, metadata = loaded
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: broken or truncated: {text}; download it again") from error
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"{path}: architecture {name!r} is not read from .gguf files, only {', '.join(ARCHITECTURES)}; "
            "use the model's safetensors folder or hub id instead"
        )
    file_ = GgufFile(path, tensors, metadata, ARCHITECTURES[name])
    if file_.integer("split.count", 1) > 1:
        raise ModelError(f"{path}: one part of {file_.integer('split.count')}; join them with llama-gguf-split --merge")
    if file_.integer("expert_count", 0) > 0:
        raise ModelError(f"{path}: a mixture of experts, which is not read from .gguf files; use its safetensors")
    return file_


def config(file: GgufFile) -> dict[str, Any]:
    """A config.json that transformers and mlx-lm both read (rope under its older, common names)."""
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: no token_embd.weight; this is not a language model's file")
    hidden, heads = file.integer("embedding_length"), file.integer("attention.head_count")
    theta = file.number("rope.freq_base", 10000.0)
    head_dim = file.integer("attention.key_length", file.integer("rope.dimension_count", hidden // heads))
    out: dict[str, Any] = {
        "architectures": [file.architecture.hf_class],
        "model_type": file.architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": file.integer("feed_forward_length"),
        "num_hidden_layers": file.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": file.integer("context_length"),
        "rope_theta": int(theta) if theta.is_integer() else theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float16",
    }
    for name in ("bos", "eos", "padding"):
        if file.has(f"tokenizer.ggml.{name}_token_id"):
            out[f"{'pad' if name == 'padding' else name}_token_id"] = file.integer(f"tokenizer.ggml.{name}_token_id")
    if len(stops := eos_ids(file)) > 1:
        out["eos_token_id"] = stops
    return out


def eos_ids(file: GgufFile) -> list[int]:
    """Ids that end an answer: end of text and, where the file has one of its own, end of turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return list(dict.fromkeys(file.integer(key) for key in keys if file.has(key)))


def _rope_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = file.value("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number("rope.scaling.factor")}
    if kind != "none":
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not read from .gguf files; use the safetensors folder")
    if ROPE_FREQS not in file.tensors:
        return None
    # llama.cpp stores only the resulting divisors. Llama 3.1 to 3.3 share all constants but the factor.
    seen = file.tensors[ROPE_FREQS].astype(mx.float32)
    factor, original = float(mx.max(seen).item()), 8192  # type: ignore[arg-type]
    wavelengths = [2 * math.pi * theta ** (2 * i / head_dim) for i in range(head_dim // 2)]
    expected = [_llama3_divisor(wavelength, factor, original) for wavelength in wavelengths]
    if seen.shape != (head_dim // 2,) or not mx.allclose(seen, mx.array(expected), rtol=1e-3).item():
        raise ModelError(f"{file.path}: {ROPE_FREQS} does not follow Llama 3's rule; use the safetensors folder")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _llama3_divisor(wavelength: float, factor: float, original: int) -> float:
    """Long waves are stretched by `factor`, short ones not, those between smoothly (Llama 3.1's rope)."""
    if wavelength < original / 4:
        return 1.0
    if wavelength > original:
        return factor
    smooth = (original / wavelength - 1) / 3
    return 1 / ((1 - smooth) / factor + smooth)


def weights(file: GgufFile, config: dict[str, Any]) -> dict[str, mx.array]:
    """All tensors under Hugging Face's names, with llama.cpp's row order of q and k undone."""
    out: dict[str, mx.array] = {}
    unknown: list[str] = []
    for name, tensor in file.tensors.items():
        if name == ROPE_FREQS:
            continue
        stem, _, part = name.rpartition(".")
        block = stem.split(".", 2)
        if block[0] == "blk" and len(block) == 3 and block[2] in file.architecture.block:
            heads_key = file.architecture.permuted.get(block[2])
            value = tensor if heads_key is None else _unpermute(tensor, config[heads_key])
            out[f"model.layers.{block[1]}.{file.architecture.block[block[2]]}.{part}"] = value
        elif stem in file.architecture.outer:
            out[f"{file.architecture.outer[stem]}.{part}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise ModelError(f"{file.path}: {len(unknown)} tensors that {config['model_type']} has not ({shown})")
    return out


def _unpermute(tensor: mx.array, heads: int) -> mx.array:
    """Rows (heads, half, 2) back to (heads, 2, half): Hugging Face's rope turns halves, llama.cpp's turns neighbours.

    Packed weights, scales, biases and bias vectors all have the output rows first, so one rule serves them.
    """
    rows = tensor.shape[0]
    return tensor.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def build(file: GgufFile) -> tuple[nn.Module, dict[str, Any]]:
    """The mlx-lm model with the file's own tensors (packed where they are packed), and its config."""
    import importlib

    settings = config(file)
    tensors = weights(file, settings)
    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    layers: dict[str, int] = {}
    for path, layer in model.named_modules():
        if f"{path}.scales" in tensors:
            layers[path] = tensors[f"{path}.weight"].shape[1] * 32 // layer.weight.shape[1]
    if layers:
        # Most layers' bits stand on top, as in any MLX folder; the others stand by name.
        bits = max(set(layers.values()), key=list(layers.values()).count)
        quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        for path, own in layers.items():
            if own != bits:
                quantization[path] = {"group_size": GROUP_SIZE, "bits": own, "mode": "affine"}
        shape = {path: {"group_size": GROUP_SIZE, "bits": own} for path, own in layers.items()}
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits, class_predicate=lambda path, _: shape.get(path, False))
        settings["quantization"] = quantization
    try:
        model.load_weights(list(tensors.items()), strict=True)
    except ValueError as error:
        raise ModelError(f"{file.path}: the tensors do not fit the metadata: {error}") from error
    return model, settings


def tokenizer(file: GgufFile) -> Any:
    """The file's tokenizer, as mlx-lm's TokenizerWrapper around a transformers one.

    Raises:
        ModelError: a vocabulary or pre-tokenizer that is not known here.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    tokens = file.value("tokenizer.ggml.tokens")
    names: dict[str, str] = {}
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        if file.has(f"tokenizer.ggml.{key}_token_id"):
            names[f"{role}_token"] = tokens[file.integer(f"tokenizer.ggml.{key}_token_id")]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_backend(file, tokens, names.get("bos_token")),
        model_max_length=file.integer("context_length"),
        clean_up_tokenization_spaces=False,
        **names,
    )
    if file.has("tokenizer.chat_template"):
        fast.chat_template = file.value("tokenizer.chat_template")
    return TokenizerWrapper(fast, BPEStreamingDetokenizer, eos_token_ids=eos_ids(file))


def _backend(file: GgufFile, tokens: list[str], bos: str | None) -> Any:
    """The `tokenizers` pipeline: byte-level BPE with the file's merges, special tokens and pre-tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    kind, pre = file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre", "none")
    if kind != "gpt2":
        raise ModelError(
            f"{file.path}: a {kind!r} vocabulary (SentencePiece and the like) is not read from .gguf files, only "
            "byte-level BPE ('gpt2'); use the model's safetensors folder or hub id"
        )
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{file.path}: pre-tokenizer {pre!r} is not known, only {', '.join(PRE_TOKENIZERS)}; "
            "use the model's safetensors folder or hub id"
        )
    rule = PRE_TOKENIZERS[pre]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    if len(vocab) != len(tokens) or any(len(pair) != 2 for pair in merges):
        raise ModelError(f"{file.path}: the vocabulary has tokens twice or a merge that is not of two; convert it anew")
    out = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=rule.ignore_merges))
    out.pre_tokenizer = pre_tokenizers.Sequence(rule.steps())
    out.decoder = decoders.ByteLevel()
    if rule.nfc:
        out.normalizer = normalizers.NFC()
    types = file.value("tokenizer.ggml.token_type", [1] * len(tokens))
    control = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    out.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    added = [token for token, kind in zip(tokens, types) if kind == USER_DEFINED]
    out.add_tokens([AddedToken(token, normalized=False) for token in added])
    if bos is not None and file.value("tokenizer.ggml.add_bos_token", rule.add_bos):
        out.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return out
