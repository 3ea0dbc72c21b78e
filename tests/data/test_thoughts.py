"""Where a completion's thoughts end: by hand for each family of marks, and what no rule may do to a text."""

from __future__ import annotations

from typing import Any

import pytest

from mlxft.data.chat import (
    MARKS,
    answer_of,
    decode_completion,
    keeps_thoughts,
    opening_after,
    opening_of,
    split_thoughts,
    until_stop,
    wanted_of,
)

OPEN, CLOSE, SEP = "<|open|>", "<|close|>", "<|sep|>"
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
CALL = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("on", "on"),
        (" on\n", " on\n"),
        ("", ""),
        ("<think>\n\n</think>\n\non", "on"),
        ("\n<think>\nin or on?\n</think>\n\non\n", "on\n"),
        ("<think>in?</think><think>or on?</think>on", "on"),
        ("<think>in?</think>\n\n<think>\n\n</think>\n\non", "on"),
        ("in or on?\n</think>\n\non", "on"),  # opened by a prompt that is not seen
        ("in?</think><think>on?</think>on", "on"),
        ("<think>in or on? It might", ""),
        ("<think>in?</think><think>or", ""),
        ("<think>in?</think>", ""),
        # Marks that are quoted: by the answer, and by a thought.
        ("Write <think> and </think> around it", "Write <think> and </think> around it"),
        ("<think>so</think>It ends with </think>, always", "It ends with </think>, always"),
        ("<think>so</think>Put <think>this</think> first", "Put <think>this</think> first"),
        ("<think>They want <think>so</think> first.</think>on", "on"),
        ("<think>A <think> opens it.</think>on", "on"),
        ("It is <b>on</b> & [on]", "It is <b>on</b> & [on]"),
        # gpt-oss
        (f"{ANALYSIS}in?<|end|>{FINAL}on<|return|>", "on"),
        (f"{ANALYSIS}in?<|end|>{FINAL}on", "on"),
        (f"{ANALYSIS}in?assistant<|channel|>final<|message|>on", "on"),  # other special tokens left out
        ("<|channel|>final<|message|>on", "on"),
        (f"{ANALYSIS}in or", ""),
        (f"{ANALYSIS}in?<|end|>{CALL}" + '{"a": 1}<|call|>', '{"a": 1}'),
        # Cohere, Kimi K3, and Granite 3.3, whose answer's frame is text
        ("<|START_THINKING|>in?<|END_THINKING|>\n<|START_RESPONSE|>on<|END_RESPONSE|>", "on"),
        ("<|START_RESPONSE|>on<|END_RESPONSE|>", "on"),
        (f"{OPEN}think{SEP}in?{CLOSE}think{SEP}{OPEN}response{SEP}on{CLOSE}response{SEP}{CLOSE}message{SEP}", "on"),
        ("<think>in?</think><response>on</response>", "<response>on</response>"),
    ],
)
def test_an_answer_stands_after_its_thoughts(text: str, answer: str) -> None:
    assert answer_of(text) == answer
    thoughts, rest = split_thoughts(text)
    assert thoughts + rest == text


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_every_familys_marks(opening: str, closing: str) -> None:
    for thought in ("", "\n\n", "in or on?\nno: " + " ".join(c for _, c in MARKS if c != closing)):
        assert answer_of(f"{opening}{thought}{closing}\n\non") == "on"
        assert answer_of(f"{thought}{closing}on", opening) == "on"
    assert answer_of(f"{opening}in or on?") == answer_of("in or on?", opening) == ""
    assert opening_of(f"<|im_start|>assistant\n{opening}\n") == opening
    assert opening_of(f"<|im_start|>assistant\n{opening}\n\n{closing}\n\n") == ""
    assert opening_of(f"Write {opening} first.<|im_end|>\n<|im_start|>assistant\n") == ""


def test_marks_that_mlx_lm_finds_are_known(tokenizer: Any) -> None:
    found = tokenizer("qwen3", thinking=True)
    assert (found.think_start, found.think_end) in MARKS


def test_gpt_oss_may_be_amid_its_analysis() -> None:
    assert opening_of(f"<|start|>assistant{ANALYSIS}") == ANALYSIS
    assert opening_of(f"<|start|>assistant{ANALYSIS}so<|end|>{FINAL}") == ""
    assert answer_of(f"in?<|end|>{FINAL}on<|return|>", ANALYSIS) == "on"
    assert answer_of("in?", ANALYSIS) == ""
    assert split_thoughts("in?", ANALYSIS) == ("in?", "")


def test_a_wanted_text_is_never_lost() -> None:
    assert wanted_of("<think>so</think>on") == "on"
    assert wanted_of("on") == "on"
    assert wanted_of("<think>") == "<think>"


def test_stop_texts_count_in_the_answer() -> None:
    text = "<think>\n\nin?\n\n</think>\n\non\n\nand more"
    assert until_stop(text, ["\n\n"]) == "<think>\n\nin?\n\n</think>\n\non"
    assert until_stop(text, ["\n\n"], in_answer=False) == "<think>"
    assert until_stop("in?\n\nin", ["\n\n"], "<think>") == "in?\n\nin"
    assert until_stop("on\n\nin", ["\n\n"]) == "on"
    assert until_stop(text, ["</think>", "zz"]) == "<think>\n\nin?\n\n", "a mark is asked for by name"
    assert until_stop(text, []) == text


@pytest.mark.parametrize(
    ("own", "general", "pattern", "whole"),
    [
        (None, "drop", None, False),
        (None, "keep", None, True),
        ("drop", "keep", None, False),
        ("keep", "drop", None, True),
        (None, "drop", r"^\d+$", False),
        (None, "drop", r"(?s)^<think>.*</think>\s*<answer>.*</answer>$", True),
        (None, "drop", r"\[THINK\]", True),
        (None, "drop", r"<(?:think|reasoning)>", True),
        (None, "drop", r"<\|channel\|>final", True),
        (None, "drop", r"I think (it|that)", False),
        (None, "drop", r"<answer>(.*)</answer>", False),
        ("drop", "drop", r"</think>", False),
    ],
)
def test_what_is_judged(own: Any, general: Any, pattern: str | None, whole: bool) -> None:
    assert keeps_thoughts(own, general, pattern) is whole


def test_prompts_of_ids(tokenizer: Any) -> None:
    for thinking in (True, False):  # marks as tokens, and letter by letter
        made = tokenizer("always-opens-thought", thinking=thinking)
        turn = [{"role": "user", "content": "in <think> or on? " * 20}]
        ids = made.apply_chat_template(turn, add_generation_prompt=True, tokenize=True)
        assert opening_after(made, ids) == "<think>"
        assert opening_after(made, ids[:-8]) == ""
    assert opening_after(made, []) == ""


def test_completions_keep_the_marks_of_special_tokens(tokenizer: Any) -> None:
    """`<|im_end|>` goes, as in every library; `[THINK]`, `<|channel|>` and the like are special too, but told."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    made = tokenizer("chatml")
    ids = [*made.encode("on it<|im_end|>"), made.eos_token_id]
    assert decode_completion(made, ids) == made.decode(ids, skip_special_tokens=True) == "on it"
    special = ["[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|START_RESPONSE|>"]
    core = made._tokenizer.backend_tokenizer.from_str(made._tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    more = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|return|>"))
    for text, kept in (
        ("[THINK]in?[/THINK]on<|return|>", "[THINK]in?[/THINK]on"),
        (f"{ANALYSIS}in?<|end|><|channel|>final<|message|>on<|return|>", f"{ANALYSIS}in?<|channel|>final<|message|>on"),
    ):
        found = decode_completion(more, more.encode(text))
        assert found == kept
        assert answer_of(found) == "on"
