"""Pairs, ratings and labelled answers: what each row gives, what is refused, and the ids of a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlxft.data.dataset import encode, encode_completion, encode_labelled, encode_pairs, ids_fingerprint
from mlxft.data.formats import Conversation, Example, Labelled, Pair, Ranked, convert, suggest_format
from mlxft.data.sources import Row
from mlxft.errors import ConfigError, DataError

Make = Callable[..., Any]
USER = {"role": "user", "content": "Hello?"}
MORE = {"role": "user", "content": "More?"}
GOOD = {"role": "assistant", "content": "Good day."}
BAD = {"role": "assistant", "content": "Bah."}
ASKED, SAID, GRUMBLED = (  # the same as ShareGPT writes them
    {"from": source, "value": text} for source, text in (("human", "Hello?"), ("gpt", "Good day."), ("gpt", "Bah."))
)
PAIR = Pair([USER], GOOD, BAD)


def one(format: str, row: dict[str, Any], **fields: str) -> Any:
    (example,) = convert([Row("a.jsonl:1", row)], format, fields)
    assert example.where == "a.jsonl:1"
    return example.item


def refusal(format: str, row: dict[str, Any]) -> str:
    with pytest.raises(DataError, match=r"^a\.jsonl:1: ") as caught:
        one(format, row)
    return str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": "Good day.", "rejected": "Bah."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, {**GOOD, "weight": 1}], "rejected": [USER, BAD]},
        {"prompt": "Hello?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": None, "tie": None},
        {"prompt": "Hello?", "chosen": [GOOD], "rejected": [BAD], "preferred": "chosen", "tie": False},
        {
            "conversations": [{"from": "human", "value": "Hello?"}],
            "chosen": {"from": "gpt", "value": "Good day."},
            "rejected": {"from": "gpt", "value": "Bah."},
        },
        {"conversations": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [GRUMBLED]},
        {"prompt": "Hello?", "chosen": SAID, "rejected": GRUMBLED},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, GRUMBLED]},
    ],
)
def test_one_pair_in_many_forms(row: dict[str, Any]) -> None:
    assert one("preference", row) == PAIR


def test_texts_margins_and_ties() -> None:
    row = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
    assert one("preference", row) == Pair("1 + 1 =", " 2", " 3")
    assert one("preference", {**row, "margin": 1.5}).margin == 1.5
    assert one("preference", {**row, "margin": "1.5", "tie": ""}).margin == 1.5, "csv holds text"
    assert one("preference", {**row, "tie": True}) == one("preference", {**row, "preferred": "tie"})
    assert one("preference", {**row, "tie": True}).tie
    assert one("preference", {**row, "rejected": " 2", "tie": True}).tie, "two equal answers can only be a tie"
    assert one("preference", {"q": "x", "w": "a", "rejected": "b"}, prompt="q", chosen="w").chosen == "a"


def test_earlier_turns_and_a_system_text_are_the_prompt() -> None:
    before = [{"role": "system", "content": "Be brief."}, USER, BAD, MORE]
    assert one("preference", {"chosen": [*before, GOOD], "rejected": [*before, BAD]}).prompt == before
    turns = [
        {"from": "human", "value": "Hello?"},
        {"from": "gpt", "value": "Bah."},
        {"from": "human", "value": "More?"},
    ]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}}
    assert one("preference", {**row, "system": "Be brief."}).prompt == before
    assert one("preference", row).prompt == before[1:]


def test_several_rejected_texts_count_as_one_prompt() -> None:
    item = one("preference", {"prompt": "x", "chosen": "a", "rejected": ["b", "c"], "tie": True})
    assert [(pair.rejected, pair.weight, pair.tie) for pair in item.pairs] == [("b", 0.5, True), ("c", 0.5, True)]
    assert "chosen and rejected[1] are the same" in refusal(
        "preference", {"prompt": "x", "chosen": "a", "rejected": ["b", "a"]}
    )


TEXTS = {"prompt": "x", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "x", "chosen": "a"}, "no field 'rejected'; the row has prompt, chosen"),
        ({"chosen": "a", "rejected": "b"}, "no field 'prompt', and the completions are texts"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no field 'prompt', and chosen has one message only"),
        ({**TEXTS, "rejected": "a"}, "chosen and rejected are the same; expected a difference"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
        ({**TEXTS, "chosen": " \n"}, "chosen is empty"),
        ({"prompt": [USER], "chosen": GOOD, "rejected": {**BAD, "content": ""}}, "rejected is empty"),
        ({**TEXTS, "prompt": ""}, "prompt is empty"),
        ({**TEXTS, "prompt": 3}, "prompt is a number; expected a string or a list of messages"),
        ({**TEXTS, "chosen": 3}, "chosen is a number; expected text, a message or a list of messages"),
        ({**TEXTS, "chosen": [USER, GOOD]}, "chosen is for another prompt"),
        ({**TEXTS, "chosen": [GOOD]}, "rejected is a string, and the other completion is messages"),
        ({"chosen": [USER, GOOD], "rejected": [MORE, BAD]}, "chosen[0] and rejected[0] differ before the last turn"),
        (
            {"chosen": [USER, BAD, MORE, GOOD], "rejected": [USER, BAD]},
            "chosen[1] and rejected[1] differ before the last turn",
        ),
        ({"prompt": [USER], "chosen": [MORE, GOOD], "rejected": BAD}, "chosen[0] is not as in the prompt"),
        ({"prompt": [USER], "chosen": [USER, GOOD, MORE, GOOD], "rejected": BAD}, "chosen[1] is not as in the prompt"),
        ({"prompt": [USER], "chosen": USER, "rejected": BAD}, "chosen.role is user after user"),
        ({"prompt": [USER, GOOD], "chosen": "a", "rejected": "b"}, "prompt[1].role is assistant, and it is the last"),
        ({**TEXTS, "margin": float("nan")}, "margin is nan; expected a finite number"),
        ({**TEXTS, "margin": float("inf")}, "margin is inf; expected a finite number"),
        ({**TEXTS, "margin": 1e39}, "margin is 1e+39; expected a finite number"),  # infinite in float32
        ({**TEXTS, "margin": True}, "margin is True; expected a finite number"),
        ({**TEXTS, "margin": "big"}, "margin is 'big'; expected a finite number"),
        ({**TEXTS, "margin": 1, "tie": True}, "margin is 1 and the row is a tie"),
        ({**TEXTS, "tie": "maybe"}, "tie is 'maybe'; expected true or false"),
        ({**TEXTS, "preferred": "rejected"}, "preferred is 'rejected'; expected 'tie' or 'chosen'"),
        ({**TEXTS, "preferred": "tie", "tie": False}, "expected the two to agree"),
        ({**TEXTS, "system": 3}, "system is a number; expected a string"),
        (
            {"prompt": [{"role": "system", "content": "Rhyme."}, USER], "chosen": GOOD, "rejected": BAD, "system": "x"},
            "the row has a field system, and prompt[0] is a system turn too; keep one of them",
        ),
        (
            {**TEXTS, "conversations": [{"from": "human", "value": "x"}]},
            "prompt and conversations; expected one of them",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "x"}],
                "chosen": {"from": "gbt", "value": "a"},
                "rejected": "b",
            },
            "chosen.from is 'gbt'; expected one of",
        ),
    ],
)
def test_pairs_refused(row: dict[str, Any], text: str) -> None:
    assert text in refusal("preference", row)


RATED = {"prompt": "x", "answers": ["a", "b", "c"]}


def test_ratings_make_every_pair_that_differs_and_count_once() -> None:
    item = one("ratings", {**RATED, "ratings": [1, 3, 1]})
    assert [(pair.chosen, pair.rejected, pair.weight) for pair in item.pairs] == [("b", "a", 0.5), ("b", "c", 0.5)]
    best_first = [("c", "a"), ("c", "b"), ("a", "b")]
    for said in ({"ranking": [2, 0, 1]}, {"scores": [0.5, -2, 7]}):
        pairs = one("ratings", {**RATED, **said}).pairs
        assert [(pair.chosen, pair.rejected) for pair in pairs] == best_first
        assert sum(pair.weight for pair in pairs) == pytest.approx(1, abs=1e-12)
    assert one("ratings", {**RATED, "ratings": [2, 2, 2]}) == Ranked(())
    pair = one("ratings", {"prompt": [USER], "completions": ["Bah.", "Good day."], "scores": [0, 1]}).pairs[0]
    assert pair == PAIR


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ([USER], [BAD, [GOOD]]),
        ([USER], [[USER, BAD], "Good day."]),
        ("Hello?", [BAD, GOOD]),
        ("Hello?", [[USER, BAD], [USER, GOOD]]),
        ([USER], [GRUMBLED, SAID]),
    ],
)
def test_answers_that_are_rated_may_be_messages(prompt: Any, answers: list[Any]) -> None:
    assert one("ratings", {"prompt": prompt, "answers": answers, "ratings": [1, 2]}) == Ranked((PAIR,))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "x", "answers": ["a"], "ratings": [1]}, "answers has one entry; expected two or more"),
        ({**RATED, "ratings": [1, 2]}, "ratings has 2 numbers for 3 answers"),
        ({**RATED, "ratings": [1, 2, None]}, "ratings[2] is None; expected a finite number"),
        ({**RATED, "ratings": [1, 2, float("nan")]}, "ratings[2] is nan"),
        ({**RATED, "ranking": [1, 2, 3]}, "ranking is [1, 2, 3]; expected each index from 0 to 2 once"),
        ({**RATED, "answers": ["a", "", "c"], "ratings": [1, 2, 3]}, "answers[1] is empty"),
        (
            {**RATED, "answers": ["a", GOOD, "c"], "ratings": [1, 2, 3]},
            "answers[0] is a string, and the other completion",
        ),
        ({**RATED, "answers": [GOOD, [MORE, BAD], BAD], "ratings": [1, 2, 3]}, "answers[1] is for another prompt"),
        ({**RATED, "answers": ["a", "b", "a"], "ratings": [1, 2, 3]}, "answers[0] and answers[2] are the same text"),
        ({**RATED, "ratings": [1, 2, 3], "scores": [1, 2, 3]}, "the row has ratings and scores; expected one of them"),
        (RATED, "no field 'ratings' or 'scores' or 'ranking'; the row has prompt, answers"),
    ],
)
def test_ratings_refused(row: dict[str, Any], text: str) -> None:
    assert text in refusal("ratings", row)


def test_unpaired() -> None:
    assert one("unpaired", {"prompt": "x", "completion": "a", "label": True}) == Labelled("x", "a", True)
    assert one("unpaired", {"prompt": "x", "completion": "a", "label": "False"}).label is False
    want = Labelled([USER], GOOD, False)
    for prompt, completion in (([USER], "Good day."), ([USER], [GOOD]), ("Hello?", [USER, GOOD]), ("Hello?", GOOD)):
        assert one("unpaired", {"prompt": prompt, "completion": completion, "label": 0}) == want
    assert "label is 'fine'; expected true or false" in refusal(
        "unpaired", {"prompt": "x", "completion": "a", "label": "fine"}
    )
    assert "completion is empty" in refusal("unpaired", {"prompt": "x", "completion": " ", "label": True})
    assert "completion is for another prompt" in refusal(
        "unpaired", {"prompt": "x", "completion": [USER, GOOD], "label": True}
    )


def test_all_problems_at_once() -> None:
    rows = [Row("a:1", TEXTS), Row("a:2", {**TEXTS, "rejected": "a"}), Row("a:3", {**TEXTS, "margin": float("inf")})]
    with pytest.raises(DataError) as caught:
        convert(rows, "preference")
    assert [line.split(" ")[0] for line in str(caught.value).split("\n")] == ["a:2:", "a:3:"]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (TEXTS, "preference"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference"),
        ({**RATED, "scores": [1]}, "ratings"),
        ({"prompt": "x", "completion": "a", "label": False}, "unpaired"),
    ],
)
def test_suggest_format(row: dict[str, Any], name: str) -> None:
    assert suggest_format(row) == name


# --- token ids


def pairs(*items: Any, tok: Any, **options: Any) -> Any:
    examples = [Example(f"a:{i}", item) for i, item in enumerate(items, 1)]
    return encode_pairs(examples, tok, **{"max_length": 200, "overflow": "error", **options})


@pytest.mark.parametrize(
    ("template", "prompt", "chosen"),
    [
        ("chatml", "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n", "Good day.<|im_end|>"),
        ("llama3", None, "Good day.<|eot_id|>"),
        ("gemma", None, "Good day.<end_of_turn>"),
        ("qwen3", None, "Good day.<|im_end|>"),
        ("opens-thought", None, "Good day.<|im_end|>"),
        ("closes-last", "user: Hello?assistant:", " Good day.<|eos|>"),
        ("open-ended", "user: Hello?\nassistant: ", "Good day.\n<|eos|>"),
    ],
)
def test_a_pair_is_what_the_model_saw_and_would_say(tokenizer: Make, template: str, prompt: str, chosen: str) -> None:
    """Held against what SFT trains of the same conversation, and against the text."""
    tok = tokenizer(template)
    (pair,) = pairs(PAIR, tok=tok).rows
    for answer, ids in ((GOOD, pair.chosen_ids), (BAD, pair.rejected_ids)):
        (row,) = encode(Conversation([USER, answer]), tok, "x", "last")
        assert row.ids[row.trained].tolist() == ids.tolist()
        assert row.ids[: int(np.argmax(row.trained))].tolist() == pair.prompt_ids.tolist()
    if template != "qwen3":  # whose empty thought belongs to the answer or to the prompt, as the template has it
        assert tok.decode(pair.chosen_ids) == chosen
    if prompt is not None:
        assert tok.decode(pair.prompt_ids) == prompt


def test_texts_are_turns_where_there_is_a_template(tokenizer: Make) -> None:
    texts = Pair("Hello?", "Good day.", "Bah.")
    chat, raw = tokenizer("chatml"), tokenizer("none", bos=True)
    assert ids_fingerprint(pairs(texts, tok=chat).rows) == ids_fingerprint(pairs(PAIR, tok=chat).rows)
    for tok, options in ((raw, {}), (chat, {"chat": False})):
        (pair,) = pairs(texts, tok=tok, **options).rows
        assert tok.decode(pair.prompt_ids).removeprefix("<|bos|>") == "Hello?"
        assert [tok.decode(ids) for ids in (pair.chosen_ids, pair.rejected_ids)] == ["Good day.<|eos|>", "Bah.<|eos|>"]
    with pytest.raises(DataError, match=r"a:1: a conversation needs a chat template.*of a pair may be texts"):
        pairs(PAIR, tok=raw)
    with pytest.raises(ConfigError, match=r"a:1: .*set data\.template: auto, or write prompt and completions as texts"):
        pairs(PAIR, tok=chat, chat=False)


def test_the_prompt_does_not_depend_on_the_answer(tokenizer: Make) -> None:
    """Two newlines are one token here; at inference the prompt's own newline stands alone."""
    tok = tokenizer("chatml")
    (pair,) = pairs(Pair([USER], {**GOOD, "content": "\nGood day."}, BAD), tok=tok).rows
    assert tok.decode(pair.prompt_ids).endswith("assistant\n")
    assert tok.decode(pair.chosen_ids) == "\nGood day.<|im_end|>"
    alone = encode_completion([USER], BAD, tok, "x").prompt
    assert pair.prompt_ids.tolist() == alone.tolist()


def text_pair(chosen: int, rejected: int, **fields: Any) -> Pair:
    """A prompt of 2 tokens and answers of as many as told, EOS not counted."""
    return Pair("qq", "a" * chosen, "e" * rejected, **fields)


def test_too_long_is_refused_or_dropped_but_never_cut(tokenizer: Make) -> None:
    tok = tokenizer("none")
    items = [text_pair(3, 4), text_pair(5, 4), text_pair(4, 9)]
    with pytest.raises(DataError) as caught:
        pairs(*items, tok=tok, max_length=7)
    assert str(caught.value).split("\n") == [
        "a:2: 8 tokens; data.max_length is 7",
        "a:3: 12 tokens; data.max_length is 7",
        "raise data.max_length (the longest has 12) or set data.overflow: drop",
    ]
    kept = pairs(*items, tok=tok, max_length=7, overflow="drop")
    assert [row.where for row in kept.rows] == ["a:1"]
    assert (kept.counts.dropped, kept.counts.tokens, kept.counts.trained_tokens) == (2, 11, 9)
    assert "2 pairs were longer than data.max_length and are left out" in kept.counts.notes()
    with pytest.raises(DataError, match="no row is left"):
        pairs(*items, tok=tok, max_length=3, overflow="drop")


def test_what_is_left_of_a_prompt_counts_once(tokenizer: Make) -> None:
    tok = tokenizer("none")
    group = Ranked(tuple(text_pair(3, n, weight=0.25) for n in (1, 2, 20, 30)))
    kept = pairs(group, Ranked(()), tok=tok, max_length=10, overflow="drop")
    assert [row.weight for row in kept.rows] == [0.5, 0.5]
    assert (kept.counts.source_rows, kept.counts.rows, kept.counts.dropped, kept.counts.undecided) == (2, 2, 2, 1)


def test_answers_that_only_the_template_makes_equal_are_left_out(tokenizer: Make) -> None:
    trimmed = Pair([USER], GOOD, {**GOOD, "content": "Good day. "})
    kept = pairs(trimmed, PAIR, tok=tokenizer("llama3"))
    assert (kept.counts.identical, [row.where for row in kept.rows]) == (1, ["a:2"])
    assert len(pairs(trimmed, PAIR, tok=tokenizer("chatml")).rows) == 2


def test_length_bias_is_reported(tokenizer: Make) -> None:
    tok = tokenizer("none")
    even = pairs(text_pair(3, 4), text_pair(4, 3), text_pair(4, 4), text_pair(9, 1, tie=True), tok=tok).counts
    assert (even.chosen_longer, even.ties, even.one_length) == (0.5, 1, None)
    assert even.notes() == ["1 pair without a better completion"]
    warning = "of the pairs: the model may only learn length"
    longer = pairs(*[text_pair(5, 4)] * 19, text_pair(4, 5), tok=tok).counts
    assert longer.chosen_longer == pytest.approx(0.95)
    assert longer.notes() == [f"the chosen completion is the longer one in 95% {warning}"]
    shorter = pairs(*[text_pair(4, 5)] * 10, tok=tok).counts
    assert shorter.notes() == [f"the chosen completion is the shorter one in 100% {warning}"]
    same = pairs(text_pair(4, 4), text_pair(4, 4), tok=tok).counts
    assert (same.one_length, same.chosen_longer) == (5, 0.5)
    assert same.notes() == ["every completion has 5 tokens: were they cut before?"]


def test_labelled_answers(tokenizer: Make) -> None:
    tok = tokenizer("none")
    items = [Labelled("qq", "aaa", True), Labelled("qq", "e" * 30, False), Labelled("qq", "e", False)]
    examples = [Example(f"a:{i}", item) for i, item in enumerate(items, 1)]
    kept = encode_labelled(examples, tok, max_length=10, overflow="drop")
    assert [(tok.decode(row.completion_ids), row.label, row.where) for row in kept.rows] == [
        ("aaa<|eos|>", True, "a:1"),
        ("e<|eos|>", False, "a:3"),
    ]
    assert (kept.counts.dropped, kept.counts.tokens, kept.counts.rows) == (1, 10, 2)
    with pytest.raises(ConfigError, match="a:1: not a pair; use"):
        encode_pairs(examples, tok, max_length=10, overflow="drop")
    with pytest.raises(ConfigError, match="a:1: not a completion with a label"):
        encode_labelled([Example("a:1", PAIR)], tok, max_length=10, overflow="drop")
    with pytest.raises(ConfigError, match="are not for supervised"):
        encode(PAIR, tok, "a:1", "last")


def test_fingerprint_sees_every_part(tokenizer: Make) -> None:
    tok = tokenizer("none")
    variants = [text_pair(3, 4), text_pair(4, 3), text_pair(3, 4, margin=1.0), text_pair(3, 4, tie=True)]
    variants.append(text_pair(3, 4, weight=0.5))
    assert len({ids_fingerprint(pairs(item, tok=tok).rows) for item in variants}) == len(variants)
