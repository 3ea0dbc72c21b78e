"""Small tokenizers with the chat templates that the families of models have, written for these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import mlxft  # noqa: F401  (loads a fast BLAS before mlx does)

CONTROL = [
    "<|bos|>",
    "<|eos|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
THINK = ["<think>", "</think>"]

CHATML = """{%- if tools %}[tools {% for t in tools %}{{ t.name }}{% endfor %}]
{% endif %}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.items() | list }}]
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{ bos_token }}
{%- for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

# The last assistant turn gets its thoughts, or an empty thought; earlier turns lose theirs.
QWEN3 = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>
{{ m.reasoning_content or '' }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

# Opens a thought in the generation prompt that the turn does not have, unless told not to.
OPENS_THOUGHT = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is not defined or enable_thinking %}<think>
{% endif %}{% endif %}"""

ALWAYS_OPENS_THOUGHT = OPENS_THOUGHT.replace("enable_thinking is not defined or enable_thinking", "true")

GEMMA = """{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- bos_token }}
{%- for m in messages -%}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

# No token ends a turn.
OPEN_ENDED = """{%- for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""

# Only the last turn is closed.
CLOSES_LAST = """{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- if loop.last and m.role == 'assistant' %}<|eos|>{% else %}
{% endif %}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "opens-thought": OPENS_THOUGHT,
    "always-opens-thought": ALWAYS_OPENS_THOUGHT,
    "gemma": GEMMA,
    "open-ended": OPEN_ENDED,
    "closes-last": CLOSES_LAST,
    "none": None,
}
# " b" and "ell": merges for tests where a token spans a boundary.
MERGES = [("Ġ", "b"), ("e", "l"), ("el", "l"), ("Ċ", "Ċ")]


def make_tokenizer(template: str | None, *, bos: bool = False, trim: bool = False, thinking: bool = False) -> Any:
    """A byte-level tokenizer in mlx-lm's wrapper.

    bos: whether `encode` puts a BOS in front, as Llama's does. trim: offsets without white space, as RoBERTa's.
    """
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in MERGES]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    if thinking:
        core.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        token = ("<|bos|>", core.token_to_id("<|bos|>"))
        steps.append(processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[token]))
    core.post_processor = processors.Sequence(steps)
    inner = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>")
    inner.chat_template = template
    return TokenizerWrapper(inner)


@pytest.fixture(scope="session")
def tokenizer() -> Callable[..., Any]:
    """tokenizer("chatml", bos=..., trim=..., thinking=...): made once each."""
    made: dict[Any, Any] = {}

    def get(name: str, **options: bool) -> Any:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = make_tokenizer(TEMPLATES[name], **options)
        return made[key]

    return get
