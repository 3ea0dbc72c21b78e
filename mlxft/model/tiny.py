"""A tiny model with a tokenizer and rows, made on the spot: what selftest trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.text import json_text

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # whose attention has a kernel
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def write_tiny(folder: Path) -> None:
    """Write model/, messages.jsonl, preference.jsonl and prompts.jsonl, the same each time."""
    from mlx_lm.models import llama
    from mlx_lm.utils import save_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names[:3])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    config = {**CONFIG, "vocab_size": len(names), "bos_token_id": 1, "eos_token_id": 2}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    rng = np.random.default_rng(0)
    leaves = [
        (name, mx.array((0.05 * rng.standard_normal(v.shape)).astype(np.float32)) if v.ndim > 1 else v)
        for name, v in sorted(tree_flatten(model.parameters()))
    ]
    model.update(tree_unflatten(leaves))
    place = folder / "model"
    place.mkdir(parents=True, exist_ok=True)
    save_model(place, model)
    (place / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer.save_pretrained(str(place))
    words = ["the", "sea", "is", "grey", "and", "the", "sand", "is", "warm", "under", "a", "white", "sky"]
    texts = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(48)]
    asked, told, other = texts[:16], texts[16:32], texts[32:]
    turns = [[("user", a), ("assistant", b)] for a, b in zip(asked, told)]
    chats = [{"messages": [{"role": r, "content": c} for r, c in pair]} for pair in turns]
    pairs = [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(asked, told, other)]
    for name, rows in (("messages", chats), ("preference", pairs), ("prompts", [{"prompt": a} for a in asked])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json_text(row)}\n" for row in rows), "utf-8")
