"""What becomes of a row's columns: the system text among them, and those that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest

from mlxft.data.formats import FORMATS, Columns, Completion, Pair, Prompt, convert
from mlxft.data.sources import Row
from mlxft.errors import DataError

USER = {"role": "user", "content": "in"}
SYSTEM = {"role": "system", "content": "Be terse."}
# As Intel's orca_dpo_pairs has them; of its kin some have no system text in a row.
ORCA = [
    {"system": "Be terse.", "question": "in", "chosen": "on", "rejected": "an the"},
    {"system": "", "question": "or", "chosen": "er", "rejected": "the"},
]


def items(format: str, rows: list[dict[str, Any]], fields: dict[str, str] | None = None, **options: Any) -> list[Any]:
    given = [Row(f"a.jsonl:{i}", row) for i, row in enumerate(rows, 1)]
    return [example.item for example in convert(given, format, fields, **options)]


def notes(format: str, rows: list[dict[str, Any]], fields: dict[str, str] | None = None, **also: Any) -> list[str]:
    columns = Columns()
    items(format, rows, fields, columns=columns)
    return columns.notes(**also)


def test_pairs_with_a_system_column() -> None:
    """Case: with an empty text (as csv has in every row), and where data.fields renames the question."""
    for fields in ({}, {"prompt": "question"}):
        first, second = items("preference", ORCA, fields)
        assert first.prompt == [SYSTEM, USER]
        assert (first.chosen["content"], first.rejected["content"]) == ("on", "an the")
        assert second == Pair("or", "er", "the")


def test_a_system_text_that_a_template_has_written_is_not_said_again() -> None:
    first, second = items("preference", ORCA, {"prompt": "{system} {question}"})
    assert (first.prompt, second.prompt) == ("Be terse. in", " or")
    # Where data.fields gives the system text itself, it is wanted.
    (both,) = items("preference", ORCA[:1], {"prompt": "{system} {question}", "system": "Sing. {system}"})
    assert both.prompt == [
        {"role": "system", "content": "Sing. Be terse."},
        {"role": "user", "content": "Be terse. in"},
    ]


def test_a_reward_function_still_sees_a_system_text_that_a_template_has_written() -> None:
    row = {"system": "Be terse.", "question": "in", "answer": "on"}
    (item,) = items("prompts", [row], {"prompt": "{system} {question}"})
    assert item == Prompt("Be terse. in", {**row, "prompt": "Be terse. in"})
    (chat,) = items("prompts", [row], {"prompt": "question"})
    assert chat.prompt == [SYSTEM, USER]


@pytest.mark.parametrize("name", ["system", "tools"])
@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("prompt-completion", {"prompt": "in", "completion": "on"}),
        ("prompts", {"prompt": "in"}),
        ("preference", {"question": "in", "chosen": "on", "rejected": "an"}),
        ("unpaired", {"prompt": "in", "completion": "on", "label": True}),
        ("ratings", {"prompt": "in", "answers": ["on", "an"], "ratings": [2, 1]}),
    ],
)
def test_in_plain_text_a_system_text_has_no_place(format: str, row: dict[str, Any], name: str) -> None:
    value: Any = "Be terse." if name == "system" else [{"name": "sky"}]
    with pytest.raises(DataError, match=rf"^a\.jsonl:1: {name} ha(s|ve) no place in plain text.*data\.fields"):
        items(format, [{**row, name: value}], chat=False)
    assert items(format, [{**row, name: ""}], chat=False) == items(format, [{**row, name: None}]) or format == "prompts"
    prompt = row.get("prompt", "in")
    told = {"prompt": "{system}: {question}" if "question" in row else "{system}: {prompt}"}
    if name == "system":
        (item,) = items(format, [{**row, name: value}], told, chat=False)
        item = item.pairs[0] if format == "ratings" else item
        assert item.prompt == f"Be terse.: {prompt}"


def test_columns_that_nothing_reads_are_named_once() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "in", "completion": "on", "id": 7, "source": "a", "empty": "", "nothing": None, "none": []},
        {"prompt": "or", "completion": "er", "id": 0, "topic": "b"},
    ]
    assert notes("prompt-completion", rows) == ["columns not used: id, source, topic"]
    assert notes("prompt-completion", rows, also=["topic", "id"]) == ["columns not used: source"]
    assert notes("prompt-completion", rows, also=None) == []
    assert notes("prompt-completion", rows, {"prompt": "{prompt} {id}"}) == ["columns not used: source, topic"]
    assert notes("prompt-completion", [{**row, "q": "x"} for row in rows], {"prompt": "q"}) == [
        "columns not used: prompt, id, source, topic"
    ]
    many = {f"c{i}": 1 for i in range(20)}
    (said,) = notes("text", [{"text": "x", **many}])
    assert said == f"columns not used: {', '.join(list(many)[:12])} and 8 more"


def test_what_a_format_reads_is_in_use() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "on"}], "system": "x", "tools": [{"name": "f"}]}
    assert notes("messages", [row]) == []
    functions = [{"name": "f", "parameters": {}}]
    assert notes("messages", [{"messages": row["messages"], "functions": functions}]) == []
    assert notes("messages", [{"messages": row["messages"], "functions": "f(x)"}]) == ["columns not used: functions"]
    assert notes("text", [{"text": "x", "system": "y"}]) == ["columns not used: system"]
    assert notes("alpaca", [{"instruction": "a", "output": "b", "history": [["c", "d"]], "text": "e"}]) == [
        "columns not used: text"
    ]


def test_every_format_but_text_takes_a_system_column() -> None:
    assert [name for name, form in FORMATS.items() if "system" not in form.optional] == ["text"]
    (item,) = items("prompt-completion", [{"prompt": "in", "completion": "on", "sys": "Be terse."}], {"system": "sys"})
    assert item.messages[0] == SYSTEM
    assert items("prompt-completion", [{"prompt": "in", "completion": "on"}]) == [Completion("in", "on")]
