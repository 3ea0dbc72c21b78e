"""Prompts of rows, as the model sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.config import parse_config
from mlxft.data.formats import Example, Prompt
from mlxft.errors import DataError
from mlxft.model.load import load_tokenizer
from mlxft.objectives.rollouts import encode_prompts

TEMPLATE = "{% if tools %}{{ tools[0].name }} {% endif %}{{ messages[0].content }}"


def test_tools_reach_the_template(
    on_policy: Callable[..., dict[str, Any]], words: Callable[..., Path], tiny_model_dir: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": "on"}, {"prompt": "on", "tools": [{"name": "the"}]}]
    examples = [Example(f"p:{i}", Prompt("on", row)) for i, row in enumerate(rows, 1)]
    settings = on_policy("ppo", words(4), "return [0.0] * len(rows)", {}, **{"rollout.stop_at_eos": False})
    chat = parse_config({**settings, "data": {**settings["data"], "template": "auto"}})
    (without, with_tools), held_out = encode_prompts(examples, [], chat, tokenizer, [])
    assert held_out == []
    assert tokenizer.decode(without.ids.tolist()).split() == ["on"]
    assert tokenizer.decode(with_tools.ids.tolist()).split() == ["the", "on"]
    plain = parse_config(settings)
    with pytest.raises(DataError, match=r"^p:2: the chat template is not used .*, so messages and tools"):
        encode_prompts(examples, [], plain, tokenizer, [])
    with pytest.raises(DataError, match=r"^data\.valid: p:2: the chat template is not used"):
        encode_prompts(examples[:1], examples, plain, tokenizer, [])
