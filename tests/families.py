"""Chat templates in the manner of real families of models, each with its control tokens; written for these tests.

What each does with system, developer, tools, thoughts and ends of turns is as its makers document it.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    """A template, and the tokens of the tokenizer it belongs to."""

    template: str
    control: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()  # tokens that are not special: marks of thoughts and calls


LLAMA_CONTROL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
)  # fmt: skip

# Knows neither tools nor calls: they are dropped without a word.
LLAMA_30 = """{% for m in messages -%}
{% if loop.first %}{{ bos_token }}{% endif -%}
<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>
{%- endfor -%}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

# Writes the date; tools go into the first user turn; one call a turn, whose content is dropped; tool results as JSON.
LLAMA_31 = """{{- bos_token }}
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- if messages[0].role == 'system' %}
    {%- set opening = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set opening = "" %}
    {%- set rest = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools %}{{- "Environment: ipython\\n" }}{% endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + today + "\\n\\n" + opening + "<|eot_id|>" }}
{%- for m in rest %}
    {%- if loop.first and tools and m.role == 'user' %}
        {{- "<|start_header_id|>user<|end_header_id|>\\n\\nThese functions can be called:\\n\\n" }}
        {%- for t in tools %}{{- t | tojson(indent=4) + "\\n\\n" }}{% endfor %}
        {{- m.content | trim + "<|eot_id|>" }}
    {%- elif 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif m.role == 'tool' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + (m.content | tojson) + "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + m.role + "<|end_header_id|>\\n\\n" + m.content | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""

# A system prompt of its own; calls and results between XML marks; other roles are dropped.
QWEN_25 = """{%- set own = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' %}
{{- '<|im_start|>system\\n' + own }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\n<tools>' }}
    {%- for t in tools %}{{- '\\n' + (t | tojson) }}{% endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content or not m.tool_calls %}{{- '\\n' + m.content }}{% endif %}
        {%- for c in m.tool_calls or [] %}
            {%- set f = c.function if c.function is defined else c %}
            {{- '\\n<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
            {{- (f.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# Thoughts of turns before the last question go; the last turn has them, empty ones where there are none.
QWEN_3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for t in tools %}{{- '\\n' + (t | tojson) }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(question=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- set said = m.content %}
        {%- if not thought and '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.question and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
        {%- else %}
            {{- said }}
        {%- endif %}
        {%- for c in m.tool_calls or [] %}
            {%- if (loop.first and said) or not loop.first %}{{- '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
            {%- if c.function.arguments is string %}{{- c.function.arguments }}
            {%- else %}{{- c.function.arguments | tojson }}{% endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# The same, for a model that always thinks: the generation prompt opens the thought.
_ASKS = """{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n"""
QWEN_3_THINKING = QWEN_3.partition(_ASKS)[0] + _ASKS + "<think>\\n' }}{% endif %}"

# Strict about roles and ids; tools before the last question; a system text only before a question that is last.
MISTRAL_03 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set opening = messages[0].content %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set ns = namespace(question=0) %}
{%- for m in rest %}
    {%- if m.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception("Only user, assistant and tool roles are supported, with a system prompt at the start!") }}
    {%- endif %}
    {%- if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.index0 == ns.question %}
            {{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " }}
        {%- if loop.last and opening is defined %}{{- opening + "\\n\\n" }}{% endif %}
        {{- m.content + "[/INST]" }}
    {%- elif m.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for c in m.tool_calls %}
            {%- if c.id is not defined or c.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {%- set call = c.function | tojson %}
            {{- call[:-1] + ', "id": "' + c.id + '"}' + (']' if loop.last else ', ') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- " " + m.content | trim + eos_token }}
    {%- else %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

# The system text stands in the first user turn; roles must take turns; tools are dropped.
GEMMA_3 = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set opening = messages[0].content + '\\n\\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set opening = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- (opening if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

# Three roles, others are dropped; after the whole conversation an EOS that no turn ends with.
PHI_3 = """{% for m in messages %}
{% if m.role in ('system', 'user', 'assistant') %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Opens a thought in the generation prompt and drops thoughts from every turn; calls only where the content is null.
R1_DISTIL = """{{ bos_token }}
{%- for m in messages %}{% if m.role == 'system' %}{{- m.content }}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' and m.content is none %}
        {{- '<｜Assistant｜>' }}
        {%- for c in m.tool_calls %}
            {{- '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}
            {{- '<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
    {%- elif m.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}"""

# The form of DeepSeek V3 before it thinks: the same, but for the thought that the prompt opens.
DEEPSEEK_V3 = R1_DISTIL.replace("<｜Assistant｜><think>\\n", "<｜Assistant｜>")

# Channels: thoughts of the last turn stand in one of their own. The last turn ends otherwise than those before it.
GPT_OSS = """{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role in ('system', 'developer') %}
    {%- set opening = messages[0].content %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set opening = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- if opening or tools %}
    {{- '<|start|>developer<|message|>' + opening }}
    {%- for t in tools or [] %}
        {{- '\\ntype ' + t.function.name + ' = ' + (t.function.parameters | tojson) }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- for m in rest %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {%- if m.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {%- set f = m.tool_calls[0].function %}
        {{- '<|start|>assistant<|channel|>commentary to=' + f.name + '<|message|>' }}
        {{- (f.arguments | tojson) + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if loop.last and m.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>tool to=assistant<|message|>' + (m.content | tojson) + '<|end|>' }}
    {%- else %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""

# A system turn of its own; knows no tools.
SMOLLM_2 = """{% for m in messages -%}
{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful AI assistant<|im_end|>
{% endif -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

CHATML_WITHOUT_PROMPT = """{% for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}"""

DATED = """<|im_start|>system
Today is {{ strftime_now('%A, %d %B %Y') }}.<|im_end|>
{% for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CALLS = ("<tool_call>", "</tool_call>")
_THINK = ("<think>", "</think>")
_DEEPSEEK = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")

FAMILIES = {
    "llama-3.0": Family(LLAMA_30, LLAMA_CONTROL, "<|eot_id|>", "<|begin_of_text|>"),
    "llama-3.1": Family(LLAMA_31, LLAMA_CONTROL, "<|eot_id|>", "<|begin_of_text|>"),
    "qwen-2.5": Family(QWEN_25, _CHATML, "<|im_end|>", added=_CALLS),
    "qwen-2.5-base": Family(QWEN_25, _CHATML, "<|endoftext|>", added=_CALLS),
    "qwen-3": Family(QWEN_3, _CHATML, "<|im_end|>", added=(*_CALLS, *_THINK)),
    "qwen-3-thinking": Family(QWEN_3_THINKING, _CHATML, "<|im_end|>", added=(*_CALLS, *_THINK)),
    "mistral-0.3": Family(MISTRAL_03, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), "</s>", "<s>"),
    "gemma-3": Family(GEMMA_3, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
    "phi-3": Family(PHI_3, ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), "<|endoftext|>"),
    "deepseek-v3": Family(DEEPSEEK_V3, _DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", _THINK),
    "r1-distil": Family(R1_DISTIL, _DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", _THINK),
    "gpt-oss": Family(GPT_OSS, _HARMONY, "<|return|>"),
    "smollm-2": Family(SMOLLM_2, _CHATML, "<|im_end|>"),
    "chatml-without-prompt": Family(CHATML_WITHOUT_PROMPT, _CHATML, "<|im_end|>"),
    "dated": Family(DATED, _CHATML, "<|im_end|>"),
}


def make_family(name: str) -> Any:
    """A byte-level tokenizer of a family in mlx-lm's wrapper, as `load_tokenizer` gives it."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from mlxft.data.chat import complete_template

    family = FAMILIES[name]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.control])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    marks = {"eos_token": family.eos}
    if family.bos is not None:
        token = (family.bos, core.token_to_id(family.bos))
        core.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[token])
        marks["bos_token"] = family.bos
    inner = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **marks)
    inner.chat_template = family.template
    wrapper = TokenizerWrapper(inner)
    complete_template(wrapper)
    return wrapper


def sentencepiece(kind: str = "llama", adds_eos: bool = False) -> Any:
    """A tokenizer in the manner of SentencePiece, in mlx-lm's wrapper: spaces are letters, and bytes spell the rest.

    Args:
        kind: "llama" sets a space before each stretch of text, "metaspace" before the whole, "gemma" before none.
        adds_eos: whether each text gets an EOS, as many fine-tunes' tokenizers do it.
    """
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    space, special = "▁", ["<unk>", "<s>", "</s>"]
    pairs = "t h|th e|i n|a n|an d|e r|o n|a t|▁ t|▁ th|▁ the|▁ a|▁ i|▁ o|▁ m|m at|▁m at|▁ c|c at|▁ cat|▁ mat"
    merges = [(a, b) for a, b in (pair.split(" ") for pair in pairs.split("|"))]
    letters = [*special, *(f"<0x{i:02X}>" for i in range(256)), space, *(chr(i) for i in range(33, 127))]
    tokens = list(dict.fromkeys([*letters, *(a + b for a, b in merges)]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    ends: list[Any] = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama":
        core.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    elif kind == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Replace(" ", space)
    core.decoder = decoders.Sequence(ends if kind == "gemma" else [*ends, decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    known = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **marks))
