"""Lengths, splits, counts and fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import pytest

from mlxft.data.dataset import Counts, Encoded, data_fingerprint, encode, encode_rows, split_valid, trained_spans
from mlxft.data.formats import Completion, Conversation, Example, Pair, Prompt, Ranked, Text, convert
from mlxft.data.sources import Row
from mlxft.errors import ConfigError, DataError

Make = Callable[..., Any]


def chat(where: str, question: str, answer: str, **extra: Any) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]
    return Example(where, Conversation(messages))


def test_counts_add_up(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    examples = [chat("a:1", "Hi?", "Yes."), chat("a:2", "Hi?", "x" * 99), chat("a:3", "Hi?", "No.", weight=0)]
    dataset = encode_rows(examples, tok, train_on="assistant", max_length=60, overflow="drop")
    (row,) = dataset.rows
    assert row.where == "a:1"
    assert dataset.counts == Counts(
        source_rows=3,
        rows=1,
        tokens=len(row.ids),
        trained_tokens=len("Yes.") + 1,
        dropped=1,
        untrainable=1,
    )


def test_too_long_rows_are_reported_together(tokenizer: Make) -> None:
    examples = [chat(f"a:{i}", "Hi?", "x" * (10 * i)) for i in range(8)]
    with pytest.raises(DataError) as caught:
        encode_rows(examples, tokenizer("chatml"), train_on="assistant", max_length=70, overflow="error")
    lines = str(caught.value).split("\n")
    # <|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n ... <|im_end|>\n: 1+5+3+2 and 1+10, and 2
    assert lines[:-1] == [f"a:{i}: {24 + 10 * i} tokens; data.max_length is 70" for i in (5, 6, 7)]
    assert "the longest has 94" in lines[-1]
    assert (
        len(encode_rows(examples, tokenizer("chatml"), train_on="assistant", max_length=94, overflow="error").rows) == 8
    )


def test_truncate_keeps_the_head_and_drops_what_is_left_untrained(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    examples = [chat("a:1", "Hi?", "x" * 99), chat("a:2", "y" * 99, "Yes.")]
    dataset = encode_rows(examples, tok, train_on="assistant", max_length=40, overflow="truncate")
    (row,) = dataset.rows
    (full,) = encode(examples[0].item, tok, "a:1", "assistant")
    assert row.ids.tolist() == full.ids[:40].tolist()
    assert row.trained.tolist() == full.trained[:40].tolist()
    assert (dataset.counts.truncated, dataset.counts.dropped) == (1, 1)


@pytest.mark.parametrize("max_length", [2, 3, 7, 10, 11, 12, 50])
@pytest.mark.parametrize("length", [2, 10, 11, 12, 20, 21])
def test_split_trains_every_token_but_the_first_once(tokenizer: Make, max_length: int, length: int) -> None:
    tok = tokenizer("none")
    text = "".join(chr(97 + i) for i in range(length - 1))
    (full,) = encode(Text(text), tok, "a:1", "all")
    assert len(full.ids) == length
    dataset = encode_rows([Example("a:1", Text(text))], tok, train_on="all", max_length=max_length, overflow="split")
    targets = [int(t) for row in dataset.rows for t in row.ids[row.trained]]
    assert targets == full.ids[1:].tolist()
    # Each target is predicted from the token that stands before it in the text.
    pairs = [(int(row.ids[t - 1]), int(row.ids[t])) for row in dataset.rows for t in np.flatnonzero(row.trained)]
    assert pairs == list(zip(full.ids[:-1].tolist(), full.ids[1:].tolist()))
    assert all(2 <= len(row.ids) <= max_length for row in dataset.rows)
    assert dataset.counts.split == (length > max_length)
    assert dataset.counts.trained_tokens == length - 1


def test_settings_out_of_bounds(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    examples = [chat("a:1", "Hi?", "Yes.")]
    with pytest.raises(ConfigError, match=r"data\.overflow: split is for data\.format: text"):
        encode_rows(examples, tok, train_on="assistant", max_length=99, overflow="split")
    with pytest.raises(ConfigError, match=r"data\.max_length is 1"):
        encode_rows(examples, tok, train_on="assistant", max_length=1, overflow="drop")


def test_rows_that_can_not_be_encoded_are_reported_together(tokenizer: Make) -> None:
    system = {"role": "system", "content": "Be brief."}
    good = chat("a:1", "Hi?", "Yes.")
    assert isinstance(good.item, Conversation)
    bad = [Example(f"a:{i}", Conversation([system, *good.item.messages])) for i in (2, 3)]
    with pytest.raises(DataError) as caught:
        encode_rows([good, *bad], tokenizer("gemma"), train_on="assistant", max_length=99, overflow="error")
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == ["a:2", "a:3"]


def test_nothing_left_says_why(tokenizer: Make) -> None:
    examples = [chat("a:1", "Hi?", "x" * 99), chat("a:2", "Hi?", "No.", weight=0)]
    wanted = r"no row is left to train on, of 2: 1 row was longer than .*; 1 row has no trained token"
    with pytest.raises(DataError, match=wanted):
        encode_rows(examples, tokenizer("chatml"), train_on="assistant", max_length=60, overflow="drop")


def test_split_valid_is_seeded_and_disjoint() -> None:
    examples = [Example(f"a:{i}", Text(str(i))) for i in range(50)]
    train, valid = split_valid(examples, 0.1, 7)
    assert len(valid) == 5
    assert sorted([*train, *valid], key=examples.index) == examples
    assert train == sorted(train, key=examples.index)
    assert split_valid(examples, 0.1, 7) == (train, valid)
    assert split_valid(examples, 0.1, 8) != (train, valid)
    assert [len(part) for part in split_valid(examples[:2], 0.01, 0)] == [1, 1]


@pytest.mark.parametrize(("rows", "share"), [(1, 0.5), (0, 0.5), (10, 0.0), (10, 1.0), (3, 0.9)])
def test_split_valid_that_leaves_a_side_empty(rows: int, share: float) -> None:
    with pytest.raises(DataError, match="empty valid split"):
        split_valid([Example(f"a:{i}", Text("x")) for i in range(rows)], share, 0)


def test_fingerprint_sees_rows_order_and_splits() -> None:
    a, b = Example("x:1", Text("one")), Example("x:2", Text("two"))
    others = [([a, b], []), ([b, a], []), ([a], [b]), ([a], []), ([Example("x:1", Completion("one", "two"))], [])]
    assert len({data_fingerprint(*splits) for splits in others}) == len(others)
    assert data_fingerprint([a, b]) == data_fingerprint([Example("elsewhere:7", Text("one")), b])
    # Values that JSON does not have: a date of parquet's, pairs within pairs, half of a character.
    odd = [
        Example("x", Prompt("p", {"day": date(2026, 1, 1)})),
        Example("x", Ranked((Pair("p", "\ud83d", "b"),))),
    ]
    assert data_fingerprint(odd) == data_fingerprint(list(odd))
    # Fixed once: a fingerprint in a checkpoint must mean the same in the next release.
    assert data_fingerprint([a, b]) == "160727c904e5342b963203772c3270d3"


CHAT = "73899e1f06519fe973b871ec0859b318"


@pytest.mark.parametrize(
    ("format", "row", "wanted"),
    [
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, CHAT),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, CHAT),
        ("alpaca", {"instruction": "a", "input": "", "output": "b"}, CHAT),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, "49cd8d4d73cee35324a1b212d2d7adf0"),
        ("prompts", {"prompt": "a", "answer": "b"}, "a236fc393f5770ffe74ffc64f6d0f952"),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
            "7a49fd81df684ac617e9097a2920665d",
        ),
        (
            "ratings",
            {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 2, 3]},
            "73ad217c117deed3642ffcafa12b7aff",
        ),
        ("unpaired", {"prompt": "a", "completion": "b", "label": True}, "d914398e2368521fcd997f845f62c802"),
    ],
)
def test_a_run_that_is_resumed_knows_its_rows_again(format: str, row: dict[str, Any], wanted: str) -> None:
    """As the runs on people's disks have hashed them, whatever the types and their fields are called here."""
    assert data_fingerprint(convert([Row("f:1", row)], format)) == wanted


def test_describe_joins_runs(tokenizer: Make) -> None:
    tok = tokenizer("none")
    row = Encoded(np.array(tok.encode("abcd"), np.int32), np.array([False, True, True, False]), "x")
    assert trained_spans(row, tok) == [("a", False), ("bc", True), ("d", False)]
