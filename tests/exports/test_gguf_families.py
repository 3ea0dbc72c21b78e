"""Every model family as a .gguf file and back; and that the files are still those that llama.cpp ran."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import save_model

from mlxft.errors import ExportError, ModelError
from mlxft.exports.gguf import export_gguf
from mlxft.model.gguf import ARCHITECTURES, shards
from mlxft.model.load import load, read_model_config, repaired
from tests.architectures import settings
from tests.conftest import make_tokenizer

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
    config = settings(kind, vocab_size=300, **own, **changes)
    config |= {} if "text_config" in config else own | changes
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
    export_gguf(first, second, kind="f32")
    one, two = ({t.name: t.data for t in GGUFReader(file).tensors} for file in (first, second))
    # A decay goes through a logarithm and back.
    assert set(one) == set(two)
    assert all(np.allclose(one[n], two[n], rtol=1e-6 if n.endswith("ssm_a") else 0, atol=0) for n in one)
    assert read_model_config(str(first)) == read_model_config(str(second)) | {"torch_dtype": "float16"}
    golden = json.loads(GOLDEN.read_text("utf-8"))["cases"][case]
    seen = content(first)
    assert json.loads(json.dumps(seen["settings"])) == golden["settings"]
    assert (seen["tensors"], seen["probe"]) == (golden["tensors"], pytest.approx(golden["probe"], abs=2e-3))
