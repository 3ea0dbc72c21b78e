"""Preference sets in the layouts that they are published in: columns as theirs, contents invented."""

from __future__ import annotations

from typing import Any

import pytest

from mlxft.data.formats import Columns, Labelled, Pair, Ranked, convert, suggest_format
from mlxft.data.sources import Row
from mlxft.errors import ConfigError, DataError

USER = {"role": "user", "content": "How far is Ulm?"}
GOOD = {"role": "assistant", "content": "An hour by train."}
BAD = {"role": "assistant", "content": "Far."}
MORE = {"role": "user", "content": "And by bike?"}
PAIR = Pair([USER], GOOD, BAD)
TEXTS = Pair("How far is Ulm?", "An hour by train.", "Far.")

HH = {
    "chosen": "\n\nHuman: How far is Ulm?\n\nAssistant: An hour by train.",
    "rejected": "\n\nHuman: How far is Ulm?\n\nAssistant: Far.",
}
ORCA = {
    "system": "Be brief.",
    "question": "How far is Ulm?",
    "chosen": "An hour by train.",
    "rejected": "Far.",
}
ARGILLA_BINARIZED = {
    "source": "sharegpt",
    "instruction": "How far is Ulm?",
    "chosen_response": "An hour by train.",
    "rejected_response": "Far.",
    "chosen_avg_rating": 4.5,
    "rejected_avg_rating": 2.0,
    "chosen_model": "a",
}
ARGILLA_CLEANED = {
    "source": "sharegpt",
    "prompt": "How far is Ulm?",
    "chosen": [USER, GOOD],
    "chosen-rating": 4.5,
    "chosen-model": "a",
    "rejected": [USER, BAD],
    "rejected-rating": 2.0,
    "rejected-model": "b",
}
DPO_MIX = {
    "dataset": "x",
    "chosen": [USER, GOOD],
    "rejected": [USER, BAD],
    "chosen_rating": 5.0,
    "rejected_rating": 1.0,
}
DISTILABEL_ORCA = {
    "system": "",
    "input": "How far is Ulm?",
    "chosen": "An hour by train.",
    "rejected": "Far.",
    "generations": ["An hour by train.", "Far."],
    "rating": [9.0, 4.0],
    "status": "unchanged",
    "in_gsm8k_train": False,
}
H4_BINARIZED = {
    "prompt": "How far is Ulm?",
    "prompt_id": "f00",
    "chosen": [USER, GOOD],
    "rejected": [USER, BAD],
    "messages": [USER, GOOD],
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}
SHP = {
    "post_id": "x1",
    "domain": "asktravel_train",
    "history": "How far is Ulm?",
    "human_ref_A": "An hour by train.",
    "human_ref_B": "Far.",
    "labels": 1,
    "score_A": 52,
    "score_B": 54,
    "score_ratio": 1.1,
}


def one(format: str, row: dict[str, Any], *, chat: bool = True, **fields: str) -> Any:
    (example,) = convert([Row("a.jsonl:1", row)], format, fields, chat=chat)
    return example.item


def refusal(format: str, row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError, match=r"^a\.jsonl:1: ") as caught:
        one(format, row, **options)
    return str(caught.value)


def notes(format: str, row: dict[str, Any], **fields: str) -> list[str]:
    columns = Columns()
    convert([Row("a.jsonl:1", row)], format, fields, columns=columns)
    return columns.notes()


@pytest.mark.parametrize(
    ("row", "pair", "unused"),
    [
        (HH, PAIR, ""),
        (
            ORCA,
            Pair([{"role": "system", "content": "Be brief."}, USER], GOOD, BAD),
            "",
        ),
        ({**ORCA, "system": ""}, TEXTS, ""),
        (ARGILLA_BINARIZED, TEXTS, "source, chosen_avg_rating, rejected_avg_rating, chosen_model"),
        (ARGILLA_CLEANED, PAIR, "source, chosen-rating, chosen-model, rejected-rating, rejected-model"),
        (DPO_MIX, PAIR, "dataset, chosen_rating, rejected_rating"),
        (DISTILABEL_ORCA, TEXTS, "generations, rating, status, in_gsm8k_train"),
        (H4_BINARIZED, PAIR, "prompt_id, messages, score_chosen, score_rejected"),
        (SHP, TEXTS, "post_id, domain, score_A, score_B, score_ratio"),
        ({"instruction": "How far", "input": "is Ulm?", "chosen": "An hour by train.", "rejected": "Far."}, None, ""),
    ],
)
def test_a_pair_as_it_is_published(row: dict[str, Any], pair: Pair | None, unused: str) -> None:
    """Ratings beside a pair are no margin unless data.fields says so."""
    assert one("preference", row) == (pair or Pair("How far\n\nis Ulm?", TEXTS.chosen, TEXTS.rejected))
    assert suggest_format(row) in ("preference", "ratings")
    said = [note for note in notes("preference", row) if note.startswith("columns not used: ")]
    assert said == ([f"columns not used: {unused}"] if unused else [])


def test_which_layout_was_found_is_said() -> None:
    assert notes("preference", SHP)[0].startswith("rows are read as published: SHP: prompt is history")
    assert notes("preference", ORCA) == ["rows are read as published: Orca: prompt is question"]
    assert notes("preference", {"prompt": "x", "chosen": "a", "rejected": "b"}) == []


def test_the_label_of_shp_says_which_is_better() -> None:
    for second in (0, "0", False):
        assert one("preference", {**SHP, "labels": second}) == Pair("How far is Ulm?", "Far.", "An hour by train.")
    assert "labels is 2; expected true or false" in refusal("preference", {**SHP, "labels": 2})


def test_margins_are_asked_for() -> None:
    assert one("preference", H4_BINARIZED).margin is None
    asked = {"margin": "{score_chosen} - {score_rejected}"}
    assert one("preference", H4_BINARIZED, **asked).margin == 2.5
    assert notes("preference", H4_BINARIZED, **asked) == ["columns not used: prompt_id, messages"]
    assert one("preference", {**H4_BINARIZED, "score_rejected": -1.5}, **asked).margin == 10.0
    assert "margin is '8.5 - much'" in refusal("preference", {**H4_BINARIZED, "score_rejected": "much"}, **asked)
    assert one("preference", SHP, margin="score_ratio").margin == 1.1


def test_a_transcript_is_its_turns() -> None:
    before = "\n\nHuman: How far is Ulm?\n\nAssistant: Far.\n\nHuman: And by bike?"
    row = {"chosen": f"{before}\n\nAssistant: Two\n\ndays. ", "rejected": f"{before}\n\nAssistant: No."}
    item = one("preference", row)
    assert item.prompt == [USER, BAD, MORE]
    assert (item.chosen["content"], item.rejected["content"]) == ("Two\n\ndays.", "No.")
    # What one says twice in a row is one turn.
    twice = {side: text.replace("?\n\nAssistant", "?\n\nHuman: Well?\n\nAssistant") for side, text in HH.items()}
    assert one("preference", twice).prompt[0]["content"] == "How far is Ulm?\n\nWell?"
    other = {**row, "rejected": row["rejected"].replace("Far.", "Near.")}
    assert "chosen[1] and rejected[1] differ before the last turn" in refusal("preference", other)
    assert "chosen and rejected differ before the last turn" in refusal("preference", other, chat=False)
    assert "no field 'prompt'" in refusal("preference", {**row, "rejected": "No."}), "one transcript is no pair"


def test_a_transcript_stays_text_where_there_is_no_chat() -> None:
    item = one("preference", HH, chat=False)
    assert item == Pair("\n\nHuman: How far is Ulm?\n\nAssistant:", " An hour by train.", " Far.")


@pytest.mark.parametrize("format", ["preference", "ratings", "unpaired", "prompts"])
def test_a_prompt_that_is_a_transcript(format: str) -> None:
    row = {
        "prompt": "\n\nHuman: How far is Ulm?\n\nAssistant:",
        "chosen": "An hour by train.",
        "rejected": "Far.",
        "answers": ["An hour by train.", "Far."],
        "ratings": [2, 1],
        "completion": "An hour by train.",
        "label": True,
    }
    item = one(format, row)
    assert (item.pairs[0] if isinstance(item, Ranked) else item).prompt == [USER]
    both = row["prompt"].replace("Ulm?", "Ulm?\n\nAssistant: Far.\n\nHuman: And by bike?")
    longer = one(format, {**row, "prompt": both})
    assert (longer.pairs[0] if isinstance(longer, Ranked) else longer).prompt == [USER, BAD, MORE]
    answered = row["prompt"].replace("Ulm?", "Ulm?\n\nAssistant: Far.")
    assert "prompt[1].role is assistant, and it is the last" in refusal(format, {**row, "prompt": answered})
    raw = one(format, row, chat=False)
    assert (raw.pairs[0] if isinstance(raw, Ranked) else raw).prompt == row["prompt"]
    # A template of data.fields is taken at its word.
    as_told = one(format, {**row, "q": "How far?"}, prompt="Human: {q}\n\nAssistant:")
    assert (as_told.pairs[0] if isinstance(as_told, Ranked) else as_told).prompt == "Human: How far?\n\nAssistant:"


def test_which_column_is_the_prompt_is_never_guessed() -> None:
    both = {**ORCA, "input": "What?"}
    said = "the row has question and input; say which is the prompt: data.fields: {prompt: question}"
    assert said in refusal("preference", both)
    assert one("preference", {**both, "system": ""}, prompt="question") == TEXTS
    # Whole conversations hold their prompt, whatever another column says.
    assert one("preference", {**DPO_MIX, "input": "x"}) == PAIR


ULTRAFEEDBACK = {
    "source": "sharegpt",
    "instruction": "How far is Ulm?",
    "models": ["a", "b"],
    "completions": [
        {"model": "a", "response": "Far.", "overall_score": 5.0, "fine-grained_score": 4.0, "annotations": {}},
        {"model": "b", "response": "An hour by train.", "overall_score": 8.0, "fine-grained_score": 3.0},
    ],
    "correct_answers": ["None"],
}
NECTAR = {
    "prompt": "\n\nHuman: How far is Ulm?\n\nAssistant: ",
    "answers": [
        {"answer": "Far.", "model": "a", "rank": 2.0},
        {"answer": "An hour by train.", "model": "b", "rank": 1.0},
    ],
    "turns": 1,
}


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (ULTRAFEEDBACK, TEXTS),
        (DISTILABEL_ORCA, TEXTS),
        ({"instruction": "How far is Ulm?", "generations": [TEXTS.rejected, TEXTS.chosen], "ratings": [1, 5]}, TEXTS),
        (NECTAR, PAIR),
    ],
)
def test_ratings_as_they_are_published(row: dict[str, Any], pair: Pair) -> None:
    assert one("ratings", row) == Ranked((pair,))
    assert suggest_format(row) == "ratings"


def test_which_score_of_ultrafeedback() -> None:
    assert "completions' response, ratings overall_score" in notes("ratings", ULTRAFEEDBACK)[0]
    (pair,) = one("ratings", ULTRAFEEDBACK, ratings="fine-grained_score").pairs
    assert (pair.chosen, pair.rejected) == ("Far.", "An hour by train.")
    with pytest.raises(ConfigError, match=r"data\.fields\.ratings is 'score', which no row has"):
        one("ratings", ULTRAFEEDBACK, ratings="score")
    unrated = {**ULTRAFEEDBACK, "completions": [{"response": "Far.", "overall_score": None}]}
    assert refusal("ratings", unrated).endswith("completions[0] has no overall_score; it has response")


def helpsteer(*rows: tuple[str, str, int]) -> list[Row]:
    return [
        Row(f"a.jsonl:{i}", {"prompt": prompt, "response": text, "helpfulness": rating, "verbosity": 2})
        for i, (prompt, text, rating) in enumerate(rows, 1)
    ]


def test_rows_of_one_response_each_are_one_for_each_prompt() -> None:
    asked = "How far is Ulm?"
    rows = helpsteer((asked, "Far.", 1), (asked, "An hour by train.", 4), ("Why?", "a", 3), ("Why?", "b", 2))
    columns = Columns()
    found = convert(rows, "ratings", {"ratings": "helpfulness"}, columns=columns)
    assert [example.where for example in found] == ["a.jsonl:1", "a.jsonl:3"]
    assert found[0].item == Ranked((TEXTS,))
    assert columns.notes() == ["columns not used: verbosity"]
    with pytest.raises(DataError, match=r"^a\.jsonl:3: answers has one entry; expected two or more to compare$"):
        convert(rows[:3], "ratings", {"ratings": "helpfulness"})
    way = r"the row has prompt, response, helpfulness, verbosity; where a row has one response, name its rating"
    with pytest.raises(DataError, match=rf"no field 'answers' or 'completions' and no 'ratings'.*{way}"):
        convert(rows, "ratings")
    with pytest.raises(ConfigError, match=r"data\.fields\.ratings is 'helpfullness'.*did you mean helpfulness"):
        convert(rows, "ratings", {"ratings": "helpfullness"})


def test_answers_with_a_label_keep_their_system_text() -> None:
    row = {"prompt": "How far is Ulm?", "completion": "Far.", "label": False, "system": "Be brief."}
    assert one("unpaired", row) == Labelled([{"role": "system", "content": "Be brief."}, USER], BAD, False)
