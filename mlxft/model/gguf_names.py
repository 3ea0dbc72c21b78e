"""Names and layouts of the model families in .gguf files, for reading and writing alike.

Source of the names: llama.cpp's src/llama-arch.cpp; of the layouts: its convert_hf_to_gguf.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxft.errors import ModelError

# Tensors that belong to the rope; in a config they are settings.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`: how its tensors are called and laid out.

    Attributes:
        outer, block: their name -> ours (without `model.layers.N.`), each without .weight or .bias.
        permuted: projections whose rows llama.cpp reorders for its rope -> the config key of their number of heads.
        shifted: norms that the model adds 1 to are stored with the 1 added.
    """

    name: str
    model_type: str
    hf_class: str
    outer: dict[str, str]
    block: dict[str, str]
    permuted: dict[str, str]
    shifted: bool = False

    def ours(self, theirs: str) -> str | None:
        """Our name of a tensor, None where the family has no such."""
        stem, _, part = theirs.rpartition(".")
        if stem in self.outer:
            return f"{self.outer[stem]}.{part}"
        head, _, rest = stem.partition(".")
        number, _, inner = rest.partition(".")
        if head == "blk" and number.isdigit() and inner in self.block:
            return f"model.layers.{number}.{self.block[inner]}.{part}"
        return None

    def theirs(self, ours: str) -> str | None:
        """Their name of a tensor, None where the family has no such."""
        stem, _, part = ours.rpartition(".")
        for name, mine in self.outer.items():
            if mine == stem:
                return f"{name}.{part}"
        number, _, inner = stem.removeprefix("model.layers.").partition(".")
        for name, mine in self.block.items():
            if mine == inner and number.isdigit() and stem.startswith("model.layers."):
                return f"blk.{number}.{name}.{part}"
        return None

    def heads(self, theirs: str, config: dict[str, Any]) -> int | None:
        """How many heads the rows of a tensor are reordered within; None where they are not."""
        key = self.permuted.get(theirs.rpartition(".")[0].rpartition(".")[2])
        return None if key is None else int(config.get(key) or config["num_attention_heads"])

    def is_shifted(self, theirs: str) -> bool:
        """Whether a tensor is a norm's that is stored with 1 added."""
        return self.shifted and theirs.endswith("_norm.weight")


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture(
            "llama",
            "llama",
            "LlamaForCausalLM",
            _OUTER,
            _NORMS | _ATTENTION | _MLP,
            {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
        ),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", _OUTER, _NORMS | _ATTENTION | _MLP, {}),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", _OUTER, _NORMS | _ATTENTION | _HEAD_NORMS | _MLP, {}),
        Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", _OUTER, _GEMMA_NORMS | _ATTENTION | _MLP, {}, True),
        Architecture(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            _OUTER,
            _GEMMA_NORMS | _ATTENTION | _HEAD_NORMS | _MLP,
            {},
            True,
        ),
        Architecture("phi3", "phi3", "Phi3ForCausalLM", _OUTER, _NORMS | _PHI3, {}),
    )
}
# model_type in config.json -> general.architecture
MODEL_TYPES = {a.model_type: a.name for a in ARCHITECTURES.values()} | {"mistral": "llama", "gemma3": "gemma3"}
# Gemma sets the scale of its attention itself; llama.cpp knows it by the number of layers: these take hidden / heads,
# all others the width of a head.
GEMMA_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def permute(tensor: mx.array, heads: int) -> mx.array:
    """Rows (heads, 2, half) to (heads, half, 2): Hugging Face's rope turns halves, llama.cpp's turns neighbours.

    Packed weights, scales, biases and bias vectors all have the output rows first, so one rule serves them.
    """
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def unpermute(tensor: mx.array, heads: int) -> mx.array:
    """The way back from `permute`."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def architecture(name: object, what: str) -> Architecture:
    """The family of a `general.architecture`.

    Raises:
        ModelError: not one of those known here; `what` says where it stands.
    """
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"{what}: architecture {name!r} is not read from .gguf files, only {', '.join(ARCHITECTURES)}; "
            "use the model's safetensors folder or hub id instead"
        )
    return ARCHITECTURES[name]
