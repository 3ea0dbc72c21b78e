"""Every part of a row is found in what a template of its family writes, or the row is refused with the reason."""

from __future__ import annotations

import copy
import json
import re
from datetime import date
from typing import Any

import pytest
from families import FAMILIES, Family, make_family, sentencepiece

from mlxft.data.chat import THOUGHTS, day_of, set_day, template_notes
from mlxft.data.dataset import (
    encode,
    encode_completion,
    encode_prompt,
    end_completions,
    set_embedding_rows,
    text_ids,
    trained_spans,
    turn_end,
)
from mlxft.data.formats import Completion, Conversation, Text, read_messages
from mlxft.errors import DataError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HI, YES = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
AND, NO = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}


def calling(content: Any, arguments: Any, tools: Any) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": '"dry"', "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "No rain."},
    ]
    return {"messages": turns, "tools": tools}


ROWS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [HI, YES, AND, NO]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, HI, YES]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, HI, YES]},
    "call-null": calling(None, {"city": "Ulm"}, [WEATHER]),
    "call-text": calling("", '{"city": "Ulm"}', [WEATHER]),
    "call-json-tools": calling(None, {"city": "Ulm"}, json.dumps([WEATHER])),
    "call-without-list": calling(None, '{"city": "Ulm"}', None),
    "thoughts": {"messages": [HI, {**YES, "reasoning_content": "Hm, so."}]},
    "inline-thoughts": {"messages": [HI, {**YES, "content": "<think>\nHm, so.\n</think>\n\nYes."}]},
    "early-thoughts": {
        "messages": [HI, {**YES, "reasoning_content": "Hm, so."}, AND, {**NO, "reasoning_content": "Mh."}]
    },
    "empty-turn": {"messages": [HI, {**YES, "content": ""}, AND, NO]},
}
CALLS = ("call-null", "call-text", "call-json-tools", "call-without-list")
HIM, SEP = "<think>\n\n</think>\n\n", "||"  # an empty thought; a row of its own
SHUT = "\n</think>\n\n"


def two(end: str, opens: str = "") -> str:
    return f"{opens}Yes.{end}|{opens}No.{end}"


def outcomes(end: str, opens: str = "") -> dict[str, str]:
    """What a plain family does with rows that hold no calls: the trained pieces, parted by |."""
    thought = f"{opens}<think>\nHm, so.\n</think>\n\nYes.{end}"
    return {
        "plain": two(end, opens),
        "system": f"{opens}Yes.{end}",
        "developer": f"{opens}Yes.{end}",
        "thoughts": "! messages[1] has thoughts",
        "inline-thoughts": thought,
        "early-thoughts": "! messages[1] has thoughts",
        "empty-turn": f"{opens}{end}|{opens}No.{end}",
    } | dict.fromkeys(CALLS, "! messages[1] calls weather, which this chat template does not write")


def with_calls(call: str, end: str, rest: str = "") -> dict[str, str]:
    return dict.fromkeys(CALLS, f"{call}{end}|{rest}No rain.{end}")


QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
DROPPED_DEVELOPER = {"developer": "! messages[0] (developer) has content"}
HARMONY = "<|channel|>final<|message|>"
QWEN_25 = outcomes("<|im_end|>") | DROPPED_DEVELOPER | with_calls(QWEN_CALL, "<|im_end|>")
DEEPSEEK_END = "<｜end▁of▁sentence｜>"
EXPECTED: dict[str, dict[str, str]] = {
    "llama-3.0": outcomes("<|eot_id|>"),
    "llama-3.1": outcomes("<|eot_id|>")
    | with_calls('{"name": "weather", "parameters": {"city": "Ulm"}}', "<|eot_id|>"),
    "qwen-2.5": QWEN_25,
    "qwen-2.5-base": QWEN_25,
    "qwen-3": DROPPED_DEVELOPER
    | dict.fromkeys(CALLS, f"{HIM}{QWEN_CALL}<|im_end|>{SEP}{HIM}No rain.<|im_end|>")
    | {
        "plain": f"{HIM}Yes.<|im_end|>{SEP}{HIM}No.<|im_end|>",
        "system": f"{HIM}Yes.<|im_end|>",
        "thoughts": "<think>\nHm, so.\n</think>\n\nYes.<|im_end|>",
        "inline-thoughts": "<think>\nHm, so.\n</think>\n\nYes.<|im_end|>",
        "early-thoughts": "<think>\nHm, so.\n</think>\n\nYes.<|im_end|>||<think>\nMh.\n</think>\n\nNo.<|im_end|>",
        "empty-turn": f"{HIM}<|im_end|>{SEP}{HIM}No.<|im_end|>",
    },
    # The mark that opens a thought stands in the prompt; what follows it is trained.
    "qwen-3-thinking": DROPPED_DEVELOPER
    | dict.fromkeys(CALLS, f"{SHUT}{QWEN_CALL}<|im_end|>{SEP}{SHUT}No rain.<|im_end|>")
    | dict.fromkeys(("thoughts", "inline-thoughts"), f"Hm, so.{SHUT}Yes.<|im_end|>")
    | {
        "plain": f"{SHUT}Yes.<|im_end|>{SEP}{SHUT}No.<|im_end|>",
        "system": f"{SHUT}Yes.<|im_end|>",
        "early-thoughts": f"Hm, so.{SHUT}Yes.<|im_end|>{SEP}Mh.{SHUT}No.<|im_end|>",
        "empty-turn": f"{SHUT}<|im_end|>{SEP}{SHUT}No.<|im_end|>",
    },
    "mistral-0.3": outcomes("</s>", " ")
    | with_calls('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}, "id": "abcdefghi"}]', "</s>", " ")
    | {
        "system": "! messages[0] (system) has content, which this chat template does not write",
        "developer": "! Only user, assistant and tool roles are supported",
    },
    "gemma-3": outcomes("<end_of_turn>")
    | dict.fromkeys(CALLS, "! Conversation roles must alternate")
    | {"developer": "! Conversation roles must alternate"},
    "phi-3": outcomes("<|end|>") | DROPPED_DEVELOPER,
    "deepseek-v3": outcomes(DEEPSEEK_END)
    | DROPPED_DEVELOPER
    | dict.fromkeys(CALLS, "! the row has tools, which this chat template does not write")
    | {
        "call-without-list": '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Ulm"}<｜tool▁call▁end｜>'
        f"{DEEPSEEK_END}|No rain.{DEEPSEEK_END}",
        "inline-thoughts": "! messages[1] has thoughts",
    },
    "r1-distil": DROPPED_DEVELOPER
    | dict.fromkeys(("plain", "system", "empty-turn"), "! reasoning models open a thought that their template drops")
    | dict.fromkeys(CALLS[:3], "! the row has tools, which this chat template does not write")
    | {"call-without-list": "! reasoning models open a thought that their template drops"}
    | dict.fromkeys(("thoughts", "inline-thoughts", "early-thoughts"), "! has thoughts that this chat template"),
    "gpt-oss": outcomes("<|return|>", HARMONY)
    | dict.fromkeys(
        CALLS, '<|channel|>commentary to=weather<|message|>{"city": "Ulm"}<|call|>|' + HARMONY + "No rain.<|return|>"
    )
    | {
        # What ends a turn in the history, <|end|>, ends a message within a turn as well.
        "plain": f"{HARMONY}Yes.|{HARMONY}No.<|return|>",
        "empty-turn": f"{HARMONY}|{HARMONY}No.<|return|>",
        "thoughts": f"<|channel|>analysis<|message|>Hm, so.<|end|><|start|>assistant{HARMONY}Yes.<|return|>",
        "early-thoughts": f"<|channel|>analysis<|message|>Hm, so.<|end|><|start|>assistant{HARMONY}Yes.<|return|>||"
        f"<|channel|>analysis<|message|>Mh.<|end|><|start|>assistant{HARMONY}No.<|return|>",
    },
    "smollm-2": outcomes("<|im_end|>"),
    "chatml-without-prompt": outcomes("<|im_end|>"),
    "dated": outcomes("<|im_end|>"),
}


@pytest.fixture(scope="module")
def families() -> dict[str, Any]:
    return {name: make_family(name) for name in FAMILIES}


def trained(tok: Any, row: dict[str, Any], train_on: str = "assistant") -> str:
    """The trained pieces of a row, parted by |, and of each row that it becomes by ||; or why it is refused."""
    try:
        rows = encode(read_messages(row), tok, "a.jsonl:7", train_on)
    except DataError as error:
        return f"! {str(error).removeprefix('a.jsonl:7: ')}"
    return "||".join("|".join(text for text, on in trained_spans(row, tok) if on) for row in rows)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_trained_as_meant_or_refused_with_the_reason(families: dict[str, Any], name: str, row: str) -> None:
    """No third outcome: twelve families and their kin, with each kind of row that people have."""
    found, want = trained(families[name], ROWS[row]), EXPECTED[name][row]
    if want.startswith("! "):
        assert found.startswith("! ")
        assert want[2:] in found
        assert "a.jsonl:7" not in found  # taken off: it stood in front
    else:
        assert found == want


def test_what_ends_a_turn_ends_a_completion(families: dict[str, Any]) -> None:
    """Phi 3 writes <|end|> after each turn and its EOS after the whole: the turn ends with the first of them."""
    ends = {"qwen-2.5-base": "<|im_end|>", "phi-3": "<|end|>", "gemma-3": "<end_of_turn>", "llama-3.0": "<|eot_id|>"}
    for name, end in ends.items():
        tok = make_family(name)
        (row,) = encode(read_messages(ROWS["plain"]), tok, "x", "assistant")
        assert [tok.convert_ids_to_tokens(i) for i in row.ends] == [end]
        assert row.ends == turn_end(tok)
        before = set(tok.eos_token_ids)
        notes = end_completions(tok, row.ends)
        assert tok.eos_token_ids == before | set(row.ends)
        assert len(notes) == (name != "llama-3.0")
        assert all(end in note and FAMILIES[name].eos in note for note in notes)
        assert end_completions(tok, row.ends) == []
    # A turn that calls ends with another token than one that answers.
    (row,) = encode(read_messages(ROWS["call-null"]), families["gpt-oss"], "x", "assistant")
    assert {families["gpt-oss"].convert_ids_to_tokens(i) for i in row.ends} == {"<|call|>", "<|return|>"}


def test_a_mark_that_closes_what_the_turn_opened_does_not_end_it(families: dict[str, Any]) -> None:
    """Where the marks of calls are special tokens and nothing else ends a turn, an EOS is added; no mark joins it."""
    tok = copy.deepcopy(families["qwen-2.5"])
    tok._tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tok.chat_template = tok.chat_template.replace("{{- '<|im_end|>\\n' }}", "{{- '\\n' }}")
    row = {"messages": ROWS["call-null"]["messages"][:2], "tools": [WEATHER]}
    (found,) = encode(read_messages(row), tok, "x", "assistant")
    assert [text for text, on in trained_spans(found, tok) if on] == [f"{QWEN_CALL}\n<|im_end|>"]
    assert [tok.convert_ids_to_tokens(i) for i in found.ends] == ["<|im_end|>"]


def glm() -> Any:
    """Turns have no end of their own: the mark that opens the next one is an EOS. Empty turns are left out."""
    template = """[gMASK]<sop>{% for m in messages %}{% if m.content or m.tool_calls %}<|
{{- 'observation' if m.role == 'tool' else m.role }}|>
{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
    marks = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    FAMILIES["glm"] = Family(template, ("[gMASK]", "<sop>", "<|endoftext|>", *marks), "<|endoftext|>")
    try:
        tok = make_family("glm")
    finally:
        del FAMILIES["glm"]
    return tok


def test_a_turn_ends_with_the_eos_that_opens_the_next_one() -> None:
    tok = glm()
    row = ROWS["call-without-list"]
    # As long as the mark is no EOS it is the next turn's.
    assert trained(tok, row) == '\nweather {"city": "Ulm"}|\nNo rain.<|endoftext|>'
    for mark in ("<|user|>", "<|observation|>"):
        tok.add_eos_token(mark)
    assert trained(tok, row) == '\nweather {"city": "Ulm"}<|observation|>|\nNo rain.<|endoftext|>'
    assert trained(tok, ROWS["plain"]) == "\nYes.<|user|>|\nNo.<|endoftext|>"
    assert trained(tok, ROWS["plain"], "last") == "\nNo.<|endoftext|>"
    off = {"messages": [HI, {**YES, "weight": 0}, AND, NO]}
    assert trained(tok, off) == "\nNo.<|endoftext|>"
    (found,) = encode(read_messages(row), tok, "x", "assistant")
    assert {tok.convert_ids_to_tokens(i) for i in found.ends} == {"<|observation|>", "<|endoftext|>"}


def test_an_empty_turn_that_the_template_leaves_out_is_the_reason() -> None:
    assert "messages[1] is an empty turn, which this chat template leaves out" in trained(glm(), ROWS["empty-turn"])


@pytest.mark.parametrize("name", ["qwen-2.5-base", "llama-3.0", "phi-3", "mistral-0.3"])
def test_an_end_of_turn_is_not_written_twice(families: dict[str, Any], name: str) -> None:
    """People write it into their rows for trainers whose templates do not."""
    end = EXPECTED[name]["plain"].rpartition("No.")[2]
    for content in (f"Yes.{end}", f"Yes. {end}\n"):
        row = {"messages": [HI, {**YES, "content": content}, AND, NO]}
        assert f"messages[1] ends with {end}, which the chat template writes" in trained(families[name], row)
        # In what is not trained it is text; within a turn too.
        row["messages"][1]["weight"] = 0
        assert trained(families[name], row).endswith(f"No.{end}")
    assert trained(families[name], {"messages": [HI, {**YES, "content": f"{end} ends."}]}).endswith(f"{end} ends.{end}")


USER_CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "user", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("name", "row", "lost"),
    [
        # Each part is a word that the rest of the text has too: only where it stands can tell.
        (
            "qwen-2.5",
            {"messages": [{"role": "developer", "content": "in"}, {**HI, "content": "in the"}, YES]},
            "developer",
        ),
        ("phi-3", {"messages": [HI, USER_CALL, {"role": "tool", "content": "Hi"}, NO]}, "calls user|calls a tool"),
        ("phi-3", {"messages": [HI, YES, AND, NO], "tools": [{"name": "user"}]}, "tools"),
        ("smollm-2", {"messages": [HI, YES], "tools": [{"name": "assistant"}]}, "tools"),
    ],
)
def test_short_words_are_not_found_by_chance(
    families: dict[str, Any], name: str, row: dict[str, Any], lost: str
) -> None:
    found = trained(families[name], row)
    assert found.startswith("! ")
    assert re.search(lost, found)


def test_each_call_of_a_turn_is_looked_for(families: dict[str, Any]) -> None:
    tok = copy.deepcopy(families["qwen-2.5"])
    tok.chat_template = tok.chat_template.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    turns = [dict(turn) for turn in ROWS["call-null"]["messages"]]
    again = {"function": {"name": "sky", "arguments": {"at": "noon"}}}
    turns[1]["tool_calls"] = [*turns[1]["tool_calls"], again]
    assert "calls sky" in trained(tok, {"messages": turns, "tools": [WEATHER]})
    # The same call twice: its words are there once.
    turns[1]["tool_calls"] = turns[1]["tool_calls"][:1] * 2
    assert "messages[1] calls a tool" in trained(tok, {"messages": turns, "tools": [WEATHER]})


def call_row(arguments: Any) -> dict[str, Any]:
    return {"messages": calling(None, arguments, None)["messages"][:2]}


@pytest.mark.parametrize(
    ("write", "want"),
    [
        ("{{ f.arguments | tojson }}", '{"city": "Ulm", "n": 2}<|im_end|>'),
        ("{{ f.arguments }}", '{"city": "Ulm", "n": 2}<|im_end|>'),  # a mapping would be written as Python
        ("{{ 'call ' + f.arguments }}", 'call {"city": "Ulm", "n": 2}<|im_end|>'),  # takes no mapping
        ("{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "city=Ulm;n=2;<|im_end|>"),
        ("{% for k in f.arguments %}{{ k }} {% endfor %}", "! messages[1] calls weather with 'Ulm'"),
    ],
)
@pytest.mark.parametrize("arguments", [{"city": "Ulm", "n": 2}, '{"city": "Ulm", "n": 2}'], ids=["mapping", "text"])
def test_arguments_go_in_as_the_template_takes_them(
    families: dict[str, Any], write: str, want: str, arguments: Any
) -> None:
    tok = copy.deepcopy(families["smollm-2"])
    calls = f"{{% for c in m.tool_calls or [] %}}{{% set f = c.function %}}{{{{ f.name }}}} {write}{{% endfor %}}"
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "{{ m.content }}" + calls)
    found = trained(tok, call_row(arguments))
    assert want[2:] in found if want.startswith("! ") else found == "weather " + want


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ({"of": {"city": "Ulm"}}, "! messages[1] calls weather, and this chat template writes {'city': 'Ulm'} for {"),
        ({"of": {"at": [1, {"rain": True}]}}, "this chat template writes {'at': [1, {'rain': True}]} for {"),
        ({"of": ["Ulm"]}, "this chat template writes ['Ulm'] for [\"Ulm\"]"),
        ({"of": [1, 2]}, "weather of=[1, 2];<|im_end|>"),
    ],
)
def test_a_value_within_arguments_is_not_written_as_python(families: dict[str, Any], arguments: Any, want: str) -> None:
    tok = copy.deepcopy(families["smollm-2"])
    calls = """{% for c in m.tool_calls or [] %}{{ c.function.name }} {% for k, v in c.function.arguments.items() -%}
{{ k }}={{ v }};{% endfor %}{% endfor %}"""
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "{{ m.content }}" + calls)
    assert want in trained(tok, call_row(arguments))


@pytest.mark.parametrize(
    "arguments", ['{"n": 1e5}', '{ "n":1E-3, "x": 1.50 }', '{"city": "M\\u00FCnchen"}', '{"p": "a\\/b"}']
)
def test_values_count_as_written_however_the_row_spells_them(families: dict[str, Any], arguments: str) -> None:
    """A template that takes arguments as text writes 1e5, not 100000.0, and an escape as it stands."""
    call = f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
    assert trained(families["deepseek-v3"], call_row(arguments)) == f"{call}{DEEPSEEK_END}"


def test_the_template_named_tool_use_writes_rows_with_calls(families: dict[str, Any]) -> None:
    """Also those without a list of tools, by which transformers goes."""
    tok = copy.deepcopy(families["smollm-2"])
    tok.chat_template = {"default": families["smollm-2"].chat_template, "tool_use": families["qwen-2.5"].chat_template}
    for row in CALLS:
        assert trained(tok, ROWS[row]) == EXPECTED["qwen-2.5"][row]
    assert trained(tok, ROWS["plain"]) == EXPECTED["smollm-2"]["plain"]
    assert "helpful AI assistant" in tok.decode(encode_prompt("Hi?", tok))
    asked = tok.decode(encode_prompt("Hi?", tok, tools=[WEATHER]))
    assert '<tools>\n{"type": "function"' in asked


def test_bare_tools_are_wrapped_for_a_template_that_wants_it(families: dict[str, Any]) -> None:
    bare = WEATHER["function"]
    row = {"messages": [HI, YES], "tools": [bare]}
    assert trained(families["gpt-oss"], row) == f"{HARMONY}Yes.<|return|>"  # which reads tool.function.name
    assert trained(families["qwen-2.5"], row) == "Yes.<|im_end|>"


def test_the_reason_is_that_of_the_choice_of_thinking_that_a_turn_follows(families: dict[str, Any]) -> None:
    """With thinking off the turn does not begin as its prompt; that is not why the row cannot be trained."""
    tok = copy.deepcopy(families["qwen-3-thinking"])
    tok.chat_template = tok.chat_template.replace("said.lstrip('\\n')", "said[:10]").replace(
        "<think>\\n' }}{% endif %}",
        "' + ('<think>\\n' if enable_thinking is not defined or enable_thinking else '') }}{% endif %}",
    )
    assert trained(tok, ROWS["inline-thoughts"]) == f"Hm, so.{SHUT}Yes.<|im_end|>"
    row = {"messages": [HI, {**YES, "content": "<think>\nHm, so.\n</think>\n\nYes, of course."}]}
    assert trained(tok, row).startswith(
        "! messages[1] (assistant) has content, which this chat template does not write"
    )


@pytest.mark.parametrize("key", THOUGHTS)
def test_thoughts_stand_in_one_place(families: dict[str, Any], key: str) -> None:
    """Qwen3's own template takes them from the content only where the message has no others, empty ones included."""
    tok = copy.deepcopy(families["qwen-3"])
    tok.chat_template = tok.chat_template.replace("if not thought and", "if m.reasoning_content is not string and")
    said = {**YES, "content": "<think>\nHm, so.\n</think>\n\nYes."}
    assert trained(tok, {"messages": [HI, {**said, key: ""}]}) == EXPECTED["qwen-3"]["inline-thoughts"]
    both = trained(tok, {"messages": [HI, {**said, key: "Hm, so."}]})
    assert both == f"! messages[1] has thoughts in content and in {key}; keep one of them"


@pytest.mark.parametrize("key", THOUGHTS)
def test_thoughts_by_any_name(families: dict[str, Any], key: str) -> None:
    for name in ("qwen-3", "gpt-oss"):
        row = {"messages": [HI, {**YES, key: "Hm, so."}]}
        assert trained(families[name], row) == EXPECTED[name]["thoughts"]


def test_thoughts_of_turns_that_are_context_may_go(families: dict[str, Any]) -> None:
    turns = [HI, {**YES, "content": "<think>\nHm.\n</think>\n\nYes.", "weight": 0}, AND, NO]
    assert trained(families["qwen-3"], {"messages": turns}) == f"{HIM}No.<|im_end|>"
    turns[1] = {**YES, "content": "<think>\nHm.\n</think>\n\nYes.", "weight": 1}
    assert trained(families["qwen-3"], {"messages": turns}, "last") == f"{HIM}No.<|im_end|>"


def test_a_prompt_is_written_whole_too(families: dict[str, Any]) -> None:
    """What is asked goes through the same door: generate, rollouts, eval and label."""
    with pytest.raises(DataError, match=r"messages\[0\] \(developer\) has content"):
        encode_prompt([{"role": "developer", "content": "Be brief."}, HI], families["phi-3"])
    with pytest.raises(DataError, match="tools has 'weather'"):
        encode_prompt("Rain?", families["smollm-2"], tools=[WEATHER])
    with pytest.raises(DataError, match=r"x: messages\[1\] calls weather"):
        encode_completion([HI], read_messages(call_row({"city": "Ulm"})).messages[1], families["smollm-2"], "x")
    turns = [HI, {**YES, "content": "<think>\nHm.\n</think>\n\nYes."}, AND]
    assert (
        families["qwen-3"]
        .decode(encode_prompt(turns, families["qwen-3"]))
        .endswith("And?<|im_end|>\n<|im_start|>assistant\n")
    )


@pytest.mark.parametrize(
    ("form", "written"),
    [("%d %B %Y", "07 March 2026"), ("%-d.%m.", "7.03."), ("%A, 100% %%d %F", "Saturday, 100% %d 2026-03-07")],
)
def test_the_day_stands_still_whatever_the_template_asks_of_it(
    families: dict[str, Any], form: str, written: str
) -> None:
    """The format may be a variable, a macro's argument or named."""
    tok = copy.deepcopy(families["dated"])
    calls = "{{ strftime_now(form) }}|{{ strftime_now(format=form) }}|{{ written(form) }}"
    macro = "{% macro written(x) %}{{ strftime_now(x) }}{% endmacro %}"
    tok.chat_template = f"{macro}{{% set form = {form!r} %}}{calls}|{{{{ messages[0].content }}}}"
    set_day(tok, date(2026, 3, 7))
    assert tok.decode(encode_prompt("Hi?", tok)) == f"{written}|{written}|{written}|Hi?"


def test_the_day_stands_still(families: dict[str, Any]) -> None:
    for name, form in (
        ("llama-3.1", "26 Nov 2026"),
        ("gpt-oss", "2026-11-26"),
        ("dated", "Thursday, 26 November 2026"),
    ):
        tok = make_family(name)
        set_day(tok, date(2026, 11, 26))
        assert day_of(tok) == "2026-11-26"
        today = tok.apply_chat_template([HI], tokenize=False, add_generation_prompt=True)
        text = tok.decode(encode_prompt([HI], tok))
        assert form in text
        # The date aside, nothing is written otherwise.
        assert len(text.splitlines()) == len(today.splitlines())
        assert [line for line in text.splitlines() if form not in line] == [
            line for line, other in zip(today.splitlines(), text.splitlines()) if form not in other
        ]
        (row,) = encode(read_messages(ROWS["system"]), tok, "x", "assistant")
        assert form in "".join(text for text, _ in trained_spans(row, tok))
    assert day_of(families["qwen-2.5"]) == ""


def test_a_template_without_generation_prompt_gets_one(families: dict[str, Any]) -> None:
    tok = families["chatml-without-prompt"]
    (note,) = template_notes(tok)
    assert "no generation prompt" in note
    assert tok.apply_chat_template([HI], tokenize=False, add_generation_prompt=True).endswith("<|im_start|>assistant\n")
    assert tok.apply_chat_template([HI, YES], tokenize=False) == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in (HI, YES)
    )
    # A template whose user turns end with the mark needs none, and others have one.
    assert [name for name, other in families.items() if template_notes(other)] == ["chatml-without-prompt"]
    assert tok.decode(encode_prompt("Hi?", tok)).endswith("assistant\n")


def test_text_that_has_been_through_a_template_is_not_put_through_another(families: dict[str, Any]) -> None:
    done = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
    with pytest.raises(DataError, match=r"x: messages\[0\] begins with <\|begin_of_text\|>.*data\.template: none"):
        encode(Completion(done, "Yes."), families["llama-3.0"], "x", "assistant")
    (row,) = encode(Completion(done, "Yes.<|eot_id|>"), families["llama-3.0"], "x", "assistant", chat=False)
    assert "".join(text for text, _ in trained_spans(row, families["llama-3.0"])) == f"{done}Yes.<|eot_id|>"


@pytest.mark.parametrize("text", ["in the", "<s>in the", "<s> [INST] in the [/INST] and</s>", "in the</s>", "<s>"])
def test_one_bos_and_no_eos_that_nobody_wrote(text: str) -> None:
    for adds_eos in (False, True):
        tok = sentencepiece(adds_eos=adds_eos)
        ids = text_ids(tok, text)
        assert ids.count(tok.bos_token_id) == 1
        assert ids[0] == tok.bos_token_id
        assert (ids[-1] == tok.eos_token_id) == text.endswith("</s>")
        assert encode_prompt(text, tok) == ids
        (row,) = encode(Text(text), tok, "x", "all")
        assert row.ids.tolist() == (ids if text.endswith("</s>") else [*ids, tok.eos_token_id])
        (row,) = encode(Completion(text, " on"), tok, "x", "assistant")
        assert row.ids.tolist()[: len(ids)] == ids
        assert row.ids.tolist().count(tok.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["llama", "metaspace", "gemma"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the cat on the m", "at"),  # one token across the two
        ("the cat ", "mat"),
        ("the", " cat"),
        ("the:", "cat"),
        ("the cat\n", "\nand"),
        ("a", "<unk>"),
        ("the ", "  mat"),
        ("é", "ö😀"),
    ],
)
def test_a_completion_keeps_its_spelling(kind: str, prompt: str, completion: str) -> None:
    """decode(prompt ids + completion ids) is prompt + completion, and the prompt's ids are those it has alone."""
    tok = sentencepiece(kind)
    reply = encode_completion(prompt, completion, tok, "x", chat=False)
    assert reply.prompt.tolist() == text_ids(tok, prompt) == encode_prompt(prompt, tok)
    ids = [*reply.prompt.tolist(), *reply.reply.tolist()]
    assert tok.decode(ids).removeprefix("<s>").removesuffix("</s>").removeprefix(" ") == prompt + completion


def test_no_id_beyond_the_embedding(families: dict[str, Any]) -> None:
    tok = copy.deepcopy(families["smollm-2"])
    size = len(tok)
    tok._tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    asked = [{"role": "user", "content": "a <tool> b"}]
    pieces = [
        lambda: encode(Conversation([*asked, YES]), tok, "x", "assistant"),
        lambda: encode(Completion("a", "<tool>"), tok, "x", "assistant", chat=False),
        lambda: encode(Text("<tool>"), tok, "x", "all"),
        lambda: encode_completion(asked, YES, tok, "x"),
        lambda: encode_completion("<tool>", "b", tok, "x", chat=False),
        lambda: encode_prompt(asked, tok, where="x"),
        lambda: encode_prompt("<tool>", tok, chat=False, where="x"),
    ]
    for piece in pieces:
        piece()  # nobody knows how many rows there are
    set_embedding_rows(tok, size + 1)
    for piece in pieces:
        piece()
    set_embedding_rows(tok, size)
    for piece in pieces:
        with pytest.raises(DataError, match=rf"x: token '<tool>' \({size}\) is not in the model.*{size} rows"):
            piece()
