"""What each format gives, and that what does not fit is refused with its place, what was seen and what is wanted."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Any

import pytest

from mlxft.data.formats import (
    FORMATS,
    Completion,
    Conversation,
    Pair,
    Prompt,
    Ranked,
    Text,
    convert,
    read_messages,
    suggest_format,
    unwritten,
)
from mlxft.data.sources import Problem, Row
from mlxft.errors import ConfigError, DataError

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hi."}
CALL = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "noon"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "tool_call_id": "c1", "content": "blue"}


def one(format: str, row: dict[str, Any], **fields: str) -> Any:
    """The item of a single row."""
    (example,) = convert([Row("a.jsonl:1", row)], format, fields)
    assert example.where == "a.jsonl:1"
    return example.item


def refusal(format: str, row: dict[str, Any], **fields: str) -> str:
    """What is said of a row that does not fit."""
    with pytest.raises(DataError) as caught:
        one(format, row, **fields)
    return str(caught.value)


def test_messages_keep_what_templates_use() -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo?"}], "name": "ann"},
        CALLED,
        TOOL,
        {"role": "assistant", "content": "Blue.", "reasoning_content": "noon", "weight": 0},
    ]
    item = one("messages", {"messages": messages, "tools": [{"name": "sky"}], "topic": "x"})
    assert item.tools == [{"name": "sky"}]
    assert item.messages[1] == {"role": "user", "content": "Hello?", "name": "ann"}
    assert item.messages[2]["content"] == ""
    function = {"name": "sky", "arguments": {"at": "noon"}, "_written": '{"at": "noon"}'}
    assert item.messages[2]["tool_calls"] == [{**CALL, "function": function}]
    assert item.messages[3:] == [TOOL, messages[4]]
    assert CALL["function"]["arguments"] == '{"at": "noon"}', "the row itself is left as it was"


def test_null_fields_are_missing_fields() -> None:
    """Parquet gives every struct all the keys of its column."""
    row = [{**USER, "tool_calls": None, "weight": None}, {**ANSWER, "tool_calls": [], "name": None}]
    assert one("messages", {"messages": row, "tools": None}) == Conversation([USER, ANSWER])


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (
            [USER, {"role": "asistant", "content": "x"}],
            "messages[1].role is 'asistant'; expected system, user, assistant or tool",
        ),
        ([USER, {"role": "asistant", "content": "x"}], "did you mean assistant?"),
        ([USER, {"content": "x"}], "messages[1].role is None"),
        ([USER, "Hi."], "messages[1] is a string; expected an object with role and content"),
        ([USER, {"role": "assistant"}], "messages[1].content is missing"),
        ([USER, {"role": "assistant", "content": " \n"}], "every assistant turn is empty"),
        ([{"role": "user", "content": 3}, ANSWER], "messages[0].content is a number; expected a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ANSWER], "messages[0].content[0] is 'image_url'"),
        ([USER, {**ANSWER, "weight": 0.5}], "messages[1].weight is 0.5; expected 0"),
        ([USER, {**ANSWER, "weight": True}], "messages[1].weight is True"),
        ([{**USER, "weight": 1}, ANSWER], "messages[0] has a weight and role user"),
        ([{**USER, "tool_calls": [CALL]}, ANSWER], "messages[0] has tool_calls and role user"),
        ([USER, {**ANSWER, "tool_calls": [{"id": "c1"}]}], "messages[1].tool_calls[0] has no 'function' object"),
        ([USER, {**ANSWER, "tool_calls": ["f()"]}], "messages[1].tool_calls[0] is a string that is not valid JSON"),
        (
            [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "kwargs": "{}"}}]}],
            "messages[1].tool_calls[0].function has kwargs and no arguments",
        ),
        (
            [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f"}, "arguments": "{}"}]}],
            "messages[1].tool_calls[0] has arguments beside 'function'",
        ),
        (
            [USER, {**ANSWER, "function_call": {"name": "f", "arguments": "f(1)"}}],
            "messages[1].function_call.arguments is a string that is not valid JSON",
        ),
        ([USER, {**CALLED, "function_call": {"name": "f"}}], "messages[1] has tool_calls and function_call"),
        ([{**USER, "function_call": {"name": "f"}}, ANSWER], "messages[0] has tool_calls and role user"),
        (
            [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"at": "\\ud83d"}'}]}],
            "messages[1].tool_calls[0].function.arguments.at contains half of a character (U+D83D at 0)",
        ),
        (
            [USER, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[1].tool_calls[0].function.arguments is a string that is not valid JSON",
        ),
        (
            [USER, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "messages[1].tool_calls[0].function.arguments is a list; expected an object",
        ),
        ([ANSWER], "messages[0].role is assistant after nothing"),
        ([USER, USER, ANSWER], "messages[1].role is user after user; user and assistant take turns"),
        ([USER, ANSWER, ANSWER], "messages[2].role is assistant after assistant"),
        (
            [USER, {"role": "system", "content": "x"}, ANSWER],
            "messages[1].role is system after user; it may only stand first",
        ),
        ([USER, ANSWER, TOOL], "messages[2].role is tool after assistant; a tool turn follows"),
        ([USER, ANSWER, USER], "messages[2].role is user, and it is the last; expected assistant"),
        ([], "messages is empty"),
        ("Hello", "messages is a string; expected a list of messages"),
    ],
)
def test_messages_refused(messages: Any, text: str) -> None:
    assert text in refusal("messages", {"messages": messages})


def test_tools_may_be_json_text() -> None:
    assert one("messages", {"messages": [USER, ANSWER], "tools": '[{"name": "sky"}]'}).tools == [{"name": "sky"}]
    assert "tools is a string that is not valid JSON" in refusal(
        "messages", {"messages": [USER, ANSWER], "tools": "sky"}
    )
    assert "tools[0] is a string" in refusal("messages", {"messages": [USER, ANSWER], "tools": ["sky"]})


def test_prompt_completion() -> None:
    assert one("prompt-completion", {"prompt": "1 + 1 =", "completion": " 2"}) == Completion("1 + 1 =", " 2")
    want = Conversation([USER, ANSWER])
    for completion in ([ANSWER], ANSWER, "Hi."):
        assert one("prompt-completion", {"prompt": [USER], "completion": completion}) == want


def test_assistant_turns_of_a_prompt_are_context() -> None:
    item = one("prompt-completion", {"prompt": [USER, ANSWER, USER], "completion": "Bye."})
    assert [message.get("weight") for message in item.messages] == [None, 0, None, None]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "x", "completion": " "}, "completion is empty"),
        ({"prompt": "x", "completion": [ANSWER]}, "completion is a list; expected a string"),
        ({"prompt": 1, "completion": "x"}, "prompt is a number; expected a string or a list of messages"),
        ({"prompt": [USER], "completion": [USER]}, "completion[0].role is user after user"),
        ({"prompt": [USER, ANSWER], "completion": "x"}, "completion[0].role is assistant after assistant"),
        ({"prompt": "x"}, "no field 'completion'; the row has prompt"),
    ],
)
def test_prompt_completion_refused(row: dict[str, Any], text: str) -> None:
    assert text in refusal("prompt-completion", row)


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "Hello?"},
        {"from": "function_call", "value": '{"name": "sky", "arguments": {"at": "noon"}}'},
        {"from": "observation", "value": "blue"},
        {"from": "gpt", "value": "Blue.", "weight": 0},
    ]
    item = one("sharegpt", {"conversations": turns, "system": "Be brief.", "tools": '[{"name": "sky"}]'})
    call = {"type": "function", "function": {"name": "sky", "arguments": {"at": "noon"}}}
    assert item == Conversation(
        [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "blue"},
            {"role": "assistant", "content": "Blue.", "weight": 0},
        ],
        [{"name": "sky"}],
    )


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([{"from": "humam", "value": "x"}], "conversations[0].from is 'humam'; expected one of human"),
        ([{"from": "human", "value": None}], "conversations[0].value is null; expected a string"),
        (
            [{"from": "human", "value": "x"}, {"from": "human", "value": "y"}],
            "conversations[1].role is user after user",
        ),
        (
            [{"from": "human", "value": "x"}, {"from": "function_call", "value": "sky()"}],
            "conversations[1].value is a string that",
        ),
    ],
)
def test_sharegpt_refused(turns: Any, text: str) -> None:
    """Places count in the row's own list, also when a system text stands before it."""
    assert text in refusal("sharegpt", {"conversations": turns, "system": "Be brief."})


def test_alpaca() -> None:
    row = {
        "instruction": "Add.",
        "input": "1 + 1",
        "output": "2",
        "system": "Be brief.",
        "history": [["Hello?", "Hi."]],
    }
    assert one("alpaca", row).messages == [
        {"role": "system", "content": "Be brief."},
        USER,
        ANSWER,
        {"role": "user", "content": "Add.\n\n1 + 1"},
        {"role": "assistant", "content": "2"},
    ]
    for empty in ("", None, " "):
        item = one("alpaca", {"instruction": "Hello?", "input": empty, "output": "Hi."})
        assert item == Conversation([USER, ANSWER])
    assert "output is empty" in refusal("alpaca", {"instruction": "x", "output": ""})
    assert "history[0] is not a pair" in refusal("alpaca", {"instruction": "x", "output": "y", "history": [["a"]]})
    assert "input is a number" in refusal("alpaca", {"instruction": "x", "output": "y", "input": 3})


def test_text_and_prompts() -> None:
    assert one("text", {"text": "Once."}) == Text("Once.")
    row = {"prompt": "Once", "answer": 3}
    assert one("prompts", row) == Prompt("Once", row)
    assert one("prompts", {"prompt": [USER]}).prompt == [USER]
    assert "messages" not in refusal("prompts", {"prompt": [USER, ANSWER]})
    assert "prompt[1].role is assistant, and it is the last; expected user or tool" in refusal(
        "prompts", {"prompt": [USER, ANSWER]}
    )


def test_fields_map_our_name_to_theirs() -> None:
    assert one("text", {"review": "Good.", "text": "other"}, text="review") == Text("Good.")
    assert one("prompts", {"question": "Why?"}, prompt="question").row["question"] == "Why?"
    # The row's own "messages" is not what was asked for.
    rows = [Row("a:1", {"messages": [USER, ANSWER]}), Row("a:2", {"dialog": [USER, ANSWER]})]
    with pytest.raises(DataError, match=r"^a:1: no field 'dialog'; the row has messages$"):
        convert(rows, "messages", {"messages": "dialog"})


def test_fields_that_nothing_has() -> None:
    with pytest.raises(ConfigError, match=r"(?s)data\.fields\.mesages: .*did you mean messages.*messages, tools"):
        one("messages", {"messages": [USER, ANSWER]}, mesages="dialog")
    with pytest.raises(
        ConfigError, match=r"data\.fields\.input is 'contxt', which no row has \(did you mean context\?\)"
    ):
        one("alpaca", {"instruction": "x", "context": "y", "output": "z"}, input="contxt")
    with pytest.raises(ConfigError, match="did you mean sharegpt"):
        one("sharegtp", {})


def test_all_problems_of_a_file_at_once() -> None:
    rows = [
        Row("a:1", {"text": "x"}),
        Problem("a:2", "not valid JSON"),
        Row("a:3", {"text": ""}),
        Row("a:4", {"txt": "y"}),
    ]
    with pytest.raises(DataError) as caught:
        convert(rows, "text")
    lines = str(caught.value).split("\n")
    assert lines == [
        "a:2: not valid JSON",
        "a:3: text is empty; expected text",
        "a:4: no field 'text'; the row has txt",
    ]


def test_many_problems_are_counted() -> None:
    with pytest.raises(DataError) as caught:
        convert([Problem(f"a:{i}", "bad") for i in range(27)], "text")
    lines = str(caught.value).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "... and 7 more"


def test_skipped_takes_the_problems_unless_nothing_is_left() -> None:
    skipped: list[Problem] = []
    bad = Problem("a:2", "bad")
    assert len(convert([Row("a:1", {"text": "x"}), bad], "text", skipped=skipped)) == 1
    assert skipped == [bad]
    with pytest.raises(DataError, match="a:2: bad"):
        convert([bad], "text", skipped=skipped)


def test_wrong_format_names_the_likely_one() -> None:
    rows = [Row(f"a:{i}", {"conversations": []}) for i in range(3)]
    with pytest.raises(DataError, match=r"these rows look like data\.format: sharegpt, for objective: sft"):
        convert(rows, "messages")
    with pytest.raises(DataError) as caught:
        convert([*[Row(f"b:{i}", {"messages": [USER, ANSWER]}) for i in range(5)], *rows], "messages")
    assert not re.search("looks like", str(caught.value)), "three rows of eight say little about the file"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": []}, "messages"),
        ({"prompt": "x", "completion": "y"}, "prompt-completion"),
        ({"prompt": "x", "completion": None}, "prompts"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "x", "output": "y"}, "alpaca"),
        ({"text": "x"}, "text"),
        ({"review": "x"}, None),
    ],
)
def test_suggest_format(row: dict[str, Any], name: str | None) -> None:
    assert suggest_format(row) == name
    assert name is None or name in FORMATS


# --- tool calls, in the forms that people have


@pytest.mark.parametrize(
    ("call", "written"),
    [
        (CALL, '{"at": "noon"}'),
        ({**CALL, "function": {"name": "sky", "arguments": {"at": "noon"}}}, None),
        ({"id": "c1", "name": "sky", "arguments": {"at": "noon"}}, None),
        ({"id": "c1", "name": "sky", "arguments": '{"at":"noon"}'}, '{"at":"noon"}'),
        ({"id": "c1", "type": "function", "name": "sky", "parameters": {"at": "noon"}}, None),
        ('{"id": "c1", "name": "sky", "arguments": {"at": "noon"}}', None),
    ],
)
def test_a_call_in_many_forms(call: Any, written: str | None) -> None:
    """Its arguments are a mapping; what they were written as is kept beside it."""
    for calls in ([call], json.dumps([call])):
        turn = {"role": "assistant", "tool_calls": calls}
        item = one("messages", {"messages": [USER, turn, TOOL, ANSWER]})
        kept = {} if written is None else {"_written": written}
        function = {"name": "sky", "arguments": {"at": "noon"}, **kept}
        assert item.messages[1] == {
            "role": "assistant",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            "content": "",
        }


@pytest.mark.parametrize("value", ['{"a": [1e400]}', '{"a": NaN}', {"a": float("inf")}, {"a": date(2026, 11, 26)}])
def test_arguments_are_what_json_can_write(value: Any) -> None:
    """Else the model would be trained to write Infinity, which no reader of JSON takes."""
    call = {"function": {"name": "f", "arguments": value}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(DataError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments holds what JSON cannot"):
        read_messages(row)


@pytest.mark.parametrize("none", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}, {"arguments": []}])
def test_no_arguments_are_empty_ones(none: dict[str, Any]) -> None:
    for call in ({"function": {"name": "now", **none}}, {"name": "now", **none}):
        item = one("messages", {"messages": [USER, {**CALLED, "tool_calls": [call]}, TOOL, ANSWER]})
        assert item.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_several_calls_in_one_turn_and_their_results() -> None:
    calls = [CALL, {**CALL, "id": "c2"}]
    results = [TOOL, {**TOOL, "tool_call_id": "c2", "content": [{"type": "text", "text": "grey"}], "name": "sky"}]
    item = one("messages", {"messages": [USER, {**CALLED, "tool_calls": calls}, *results, ANSWER]})
    assert [call["id"] for call in item.messages[1]["tool_calls"]] == ["c1", "c2"]
    assert item.messages[2:4] == [TOOL, {**results[1], "content": "grey"}]


def test_function_calls_as_openai_had_them_before_tools() -> None:
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "sky", "arguments": '{"at": "noon"}'}},
            {"role": "function", "name": "sky", "content": "blue"},
            ANSWER,
        ],
        "functions": [{"name": "sky", "parameters": {}}],
    }
    item = one("messages", row)
    function = {"name": "sky", "arguments": {"at": "noon"}, "_written": '{"at": "noon"}'}
    assert item.messages[1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "sky", "content": "blue"},
    ]
    assert item.tools == [{"type": "function", "function": {"name": "sky", "parameters": {}}}]
    assert one("messages", {**row, "messages": [USER, ANSWER], "functions": "def f(): ..."}).tools is None
    assert "the row has tools and functions" in refusal("messages", {**row, "tools": [{"name": "sky"}]})


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]", "null", {}])
def test_no_tools(tools: Any) -> None:
    assert one("messages", {"messages": [USER, ANSWER], "tools": tools}).tools is None


def test_tools_may_be_a_list_of_json_texts() -> None:
    texts = ['{"name": "sky"}', {"name": "sea"}]
    assert one("messages", {"messages": [USER, ANSWER], "tools": texts}).tools == [{"name": "sky"}, {"name": "sea"}]


def test_an_answer_of_calls_is_the_same_however_they_are_written() -> None:
    asked, said = [USER, CALLED, TOOL], [{**CALL, "function": {"name": "sky", "arguments": {"at": "noon"}}}]
    other = [USER, {**CALLED, "tool_calls": said}, TOOL]
    item = one("preference", {"chosen": [*asked, ANSWER], "rejected": [*other, {**ANSWER, "content": "No."}]})
    assert unwritten(item.prompt) == one("preference", {"prompt": other, "chosen": "a", "rejected": "b"}).prompt
    same = {"prompt": [USER], "chosen": CALLED, "rejected": other[1]}
    assert "chosen and rejected are the same" in refusal("preference", same)


@pytest.mark.parametrize(
    ("asks", "answers"), [("human", "gpt"), ("user", "chatgpt"), ("prompter", "assistant"), ("human", "bing")]
)
def test_the_roles_that_sharegpt_and_its_kin_have(asks: str, answers: str) -> None:
    turns = [{"from": asks, "value": "Hello?"}, {"from": answers, "value": "Hi."}]
    assert one("sharegpt", {"conversations": turns}) == Conversation([USER, ANSWER])
    assert one("sharegpt", {"conversations": [turns[0], {"from": "model", "value": "Hi."}]}).messages[1] == ANSWER
    assert one("sharegpt", {"conversations": [turns[0], {"from": "bard", "value": "Hi."}]}).messages[1] == ANSWER


def test_calls_within_a_sharegpt_text_may_be_answered_by_a_tool() -> None:
    turns = [
        {"from": "human", "value": "Hello?"},
        {"from": "gpt", "value": '<tool_call>\n{"name": "sky", "arguments": {}}\n</tool_call>'},
        {"from": "tool", "value": "blue"},
        {"from": "gpt", "value": "Hi."},
    ]
    roles = [message["role"] for message in one("sharegpt", {"conversations": turns}).messages]
    assert roles == ["user", "assistant", "tool", "assistant"]


# --- a column `system`

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", {"messages": [USER, ANSWER]}),
        ("prompt-completion", {"prompt": "Hello?", "completion": "Hi."}),
        ("prompt-completion", {"prompt": [USER], "completion": "Hi."}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]}),
        ("alpaca", {"instruction": "Hello?", "output": "Hi."}),
        ("prompts", {"prompt": "Hello?"}),
        ("prompts", {"prompt": [USER]}),
        ("preference", {"prompt": "Hello?", "chosen": "Hi.", "rejected": "No."}),
        ("preference", {"prompt": [USER], "chosen": "Hi.", "rejected": "No."}),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}),
        ("preference", {"conversations": [USER], "chosen": ANSWER, "rejected": {**ANSWER, "content": "No."}}),
        ("ratings", {"prompt": "Hello?", "answers": ["Hi.", "No."], "ratings": [2, 1]}),
        ("unpaired", {"prompt": "Hello?", "completion": "Hi.", "label": True}),
    ],
)
def test_a_system_column_is_the_system_turn(format: str, row: dict[str, Any]) -> None:
    def asked(**fields: Any) -> Any:
        item = one(format, {**row, **fields})
        item = item.pairs[0] if isinstance(item, Ranked) else item
        return (item.messages if isinstance(item, Conversation) else item.prompt), item

    turns, item = asked(system="Be brief.")
    assert turns[:2] == [SYSTEM, USER]
    if isinstance(item, Pair):
        assert (item.chosen, item.rejected) == (ANSWER, {**ANSWER, "content": "No."})
    for empty in ("", None, " \n"):
        assert one(format, {**row, "system": empty}) == (
            Prompt(row["prompt"], {**row, "system": empty}) if format == "prompts" else one(format, row)
        )


@pytest.mark.parametrize("first", [SYSTEM, {"role": "developer", "content": "Rhyme."}])
def test_a_system_column_beside_a_system_turn(first: dict[str, Any]) -> None:
    said = refusal("messages", {"messages": [first, USER, ANSWER], "system": "Sing."})
    assert f"the row has a field system, and messages[0] is a {first['role']} turn too; keep one of them" in said
    same = one("messages", {"messages": [SYSTEM, USER, ANSWER], "system": "Be brief."})
    assert same.messages == [SYSTEM, USER, ANSWER], "the same text is said once"


def test_tools_of_a_text_are_told() -> None:
    item = one("prompt-completion", {"prompt": "Hello?", "completion": "Hi.", "tools": [{"name": "sky"}]})
    assert item == Conversation([USER, ANSWER], [{"name": "sky"}])
