"""A tiny llama over a vocabulary of words, whose first policy is uniform, and on-policy recipes for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}


def build_words(
    folder: Path, words: int, eos: bool = False, beyond: bool = False, spread: float = 0.0, pad: bool = False
) -> Path:
    """Tokens w0, w1, ...

    Args:
        eos: the last word that the model has is EOS. beyond: EOS is a word more, which the model can not give.
        spread: of the head's weights; 0: every token is equally likely.
        pad: w0 is the pad token.
    """
    from mlx_lm.models import llama
    from mlx_lm.utils import save_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words + beyond)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = {"eos_token": f"w{words + beyond - 1}"} if eos or beyond else {}
    end |= {"pad_token": "w0"} if pad else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **end)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(str(folder))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": words, **SIZES}
    config |= {"num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    config |= {"rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32"}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    key, leaves = mx.random.key(0), []
    for name, value in sorted(tree_flatten(model.parameters())):
        key, now = mx.random.split(key)
        scale = spread if "lm_head" in name else 0.02
        leaves.append((name, scale * mx.random.normal(value.shape, key=now) if value.ndim > 1 else value))
    model.update(tree_unflatten(leaves))
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`words(32, eos=True)`: see `build_words`. Read only."""
    built: dict[str, Path] = {}

    def get(count: int, **how: Any) -> Path:
        name = f"{count}-{sorted(how.items())}"
        if name not in built:
            built[name] = build_words(tmp_path_factory.mktemp("words") / "model", count, **how)
        return built[name]

    return get


@pytest.fixture
def on_policy(words: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`on_policy("grpo", words(32), "return [...]", own={...}, **{"rollout.samples": 4})`: settings of a short run.

    The body is that of the reward function, of prompts, completions and rows.
    """

    def make(objective: str, model: Path, body: str, own: dict[str, Any], **changes: Any) -> dict[str, Any]:
        (tmp_path / "rewards.py").write_text(f"def score(prompts, completions, rows):\n    {body}\n")
        rows = [{"prompt": " ".join(f"w{(i + k) % 2}" for k in range(1 + i % 3))} for i in range(16)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings: dict[str, Any] = {
            "objective": objective,
            "model": {"path": str(model), "dtype": "float32"},
            "tune": {"method": "full"},
            "data": {"train": str(tmp_path / "prompts.jsonl"), "format": "prompts", "template": "none"},
            "rollout": {"prompts": 4, "samples": 4, "max_tokens": 1, "stop_at_eos": False},
            "rewards": {"function": f"{tmp_path}/rewards.py:score"},
            objective: own,
            "optim": {"name": "adam", "lr": 1e-2, "schedule": "constant", "warmup": 0},
            "run": {"dir": str(tmp_path / "runs"), "name": "a", "steps": 40, "report_every": 1, "save_every": 1000},
        }
        settings["data"]["max_length"] = 32
        for key, value in changes.items():
            section, _, leaf = key.partition(".")
            settings.setdefault(section, {})[leaf] = value
        return settings

    return make
