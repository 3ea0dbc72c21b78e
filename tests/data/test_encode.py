"""The mask: what is trained is what the model would generate, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxft.data.dataset import Encoded, encode, encode_prompt, trained_spans
from mlxft.data.formats import Completion, Conversation, Prompt, Text
from mlxft.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_chat.json").read_text(encoding="utf-8"))
Make = Callable[..., Any]


def chat(*contents: str, **extra: Any) -> Conversation:
    """User and assistant in turn; `extra` goes into the last message."""
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    messages[-1] |= extra
    return Conversation(messages)


TWO = chat("Hi?", "Yes.", "And?", "No.")


def trained(row: Encoded, tok: Any) -> list[str]:
    assert row.ids.dtype == np.int32
    assert row.trained.dtype == np.bool_
    assert row.ids.shape == row.trained.shape
    assert not row.trained[0]
    return [text for text, on in trained_spans(row, tok) if on]


def whole(row: Encoded, tok: Any) -> str:
    return "".join(text for text, _ in trained_spans(row, tok))


@pytest.fixture(scope="session")
def smollm2() -> Any:
    from mlxft.model.load import load_tokenizer

    return load_tokenizer("smollm2-135m")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["messages"][-1]["content"][:12])
def test_smollm2_as_transformers_has_it(smollm2: Any, case: dict[str, Any]) -> None:
    (row,) = encode(Conversation(case["messages"]), smollm2, "x", "assistant")
    assert row.ids.tolist() == case["ids"]
    assert row.trained.astype(int).tolist() == case["trained"]
    assert row.trained.sum() == case["trained_tokens"]


@pytest.mark.parametrize(
    ("name", "bos", "want"),
    [
        ("chatml", False, ["Yes.<|im_end|>", "No.<|im_end|>"]),
        ("llama3", True, ["Yes.<|eot_id|>", "No.<|eot_id|>"]),
        ("gemma", True, ["Yes.<end_of_turn>", "No.<end_of_turn>"]),
        # Earlier turns have no end to train; the last gets an EOS.
        ("open-ended", False, ["Yes.\n", "No.\n<|eos|>"]),
        ("closes-last", False, [" Yes.", " No.<|eos|>"]),
    ],
)
@pytest.mark.parametrize("trim", [False, True], ids=["offsets", "trimmed-offsets"])
def test_assistant_turns_of_each_template(tokenizer: Make, name: str, bos: bool, want: list[str], trim: bool) -> None:
    tok = tokenizer(name, bos=bos, trim=trim)
    (row,) = encode(TWO, tok, "x", "assistant")
    assert trained(row, tok) == want
    rendered = tok.apply_chat_template(TWO.messages, tokenize=True)
    assert row.ids.tolist() == rendered + ([tok.eos_token_id] if name == "open-ended" else [])


def test_train_on(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    for train_on in ("last", "completion"):
        (row,) = encode(TWO, tok, "x", train_on)
        assert trained(row, tok) == ["No.<|im_end|>"]
    (row,) = encode(TWO, tok, "x", "all")
    assert row.trained.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_weight_zero_turns_a_turn_off(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    item = Conversation([TWO.messages[0], {**TWO.messages[1], "weight": 0}, *TWO.messages[2:]])
    (row,) = encode(item, tok, "x", "assistant")
    assert trained(row, tok) == ["No.<|im_end|>"]
    (row,) = encode(item, tok, "x", "all")
    assert [text for text, on in trained_spans(row, tok) if not on] == ["<|im_start|>", "Yes.<|im_end|>"]
    (row,) = encode(chat("Hi?", "Yes.", weight=0), tok, "x", "assistant")
    assert not row.trained.any()


def test_tools_and_calls_reach_the_template(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    call = {"function": {"name": "sky", "arguments": {"at": "noon"}}}
    messages = [
        {"role": "user", "content": "Colour?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "Blue."},
    ]
    (row,) = encode(Conversation(messages, [{"name": "sky"}]), tok, "x", "assistant")
    assert trained(row, tok) == ["[sky [('at', 'noon')]]<|im_end|>", "Blue.<|im_end|>"]
    assert whole(row, tok).startswith("[tools sky]")


def test_rewritten_history_gives_a_row_a_turn(tokenizer: Make) -> None:
    """The template shows thoughts of the last turn only: turn 1 with its thought, then turn 2 after a turn without."""
    tok = tokenizer("qwen3", thinking=True)
    item = Conversation([{**m, "reasoning_content": "Hm."} if m["content"] == "Yes." else m for m in TWO.messages])
    first, second = encode(item, tok, "x", "assistant")
    assert trained(first, tok) == ["<think>\nHm.\n</think>\n\nYes.<|im_end|>"]
    assert "And?" not in whole(first, tok)
    assert trained(second, tok) == ["<think>\n\n</think>\n\nNo.<|im_end|>"]
    assert "assistant\nYes.<|im_end|>" in whole(second, tok)
    (last,) = encode(item, tok, "x", "last")
    assert last.ids.tolist() == second.ids.tolist()
    assert last.trained.tolist() == second.trained.tolist()
    with pytest.raises(
        DataError, match=r"x: this chat template rewrites earlier turns.*data\.train_on: assistant or last"
    ):
        encode(item, tok, "x", "all")


def test_one_turn_needs_no_row_of_its_own(tokenizer: Make) -> None:
    tok = tokenizer("qwen3", thinking=True)
    (row,) = encode(chat("Hi?", "Yes."), tok, "x", "all")
    assert row.trained.sum() == len(row.ids) - 1


def test_generation_prompt_that_opens_a_thought(tokenizer: Make) -> None:
    tok = tokenizer("opens-thought", thinking=True)
    (row,) = encode(chat("Hi?", "Yes."), tok, "x", "assistant")
    assert trained(row, tok) == ["Yes.<|im_end|>"]
    with pytest.raises(
        DataError, match=r"a:7: messages\[1\] is not rendered.*has no correct mask.*model\.chat_template"
    ):
        encode(chat("Hi?", "Yes."), tokenizer("always-opens-thought", thinking=True), "a:7", "assistant")


@pytest.mark.parametrize("trim", [False, True], ids=["offsets", "trimmed-offsets"])
def test_a_token_across_the_boundary_is_not_trained(tokenizer: Make, trim: bool) -> None:
    """The prompt ends in a space, which the tokenizer joins with the b of the answer: " b" begins before the answer."""
    tok = tokenizer("open-ended", trim=trim)
    (row,) = encode(chat("x", "bell"), tok, "x", "assistant")
    assert trained(row, tok) == ["ell\n<|eos|>"]
    assert trained_spans(row, tok)[0][0].endswith("assistant: b")


class NoOffsets:
    """A tokenizer that only encodes and decodes, like a slow one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":
            raise AttributeError(name)
        return getattr(self.inner, name)


def test_without_offsets_tokens_must_be_a_prefix(tokenizer: Make) -> None:
    fast = tokenizer("chatml")
    slow = NoOffsets(fast)
    (a,), (b,) = encode(TWO, fast, "x", "assistant"), encode(TWO, slow, "x", "assistant")
    assert a.ids.tolist() == b.ids.tolist()
    assert a.trained.tolist() == b.trained.tolist()
    with pytest.raises(DataError, match="a token spans the beginning of an assistant turn"):
        encode(chat("x", "bell"), NoOffsets(tokenizer("open-ended")), "x", "assistant")


def test_control_token_inside_an_answer_does_not_end_it(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    (row,) = encode(chat("Hi?", "say <|eos|> now"), tok, "x", "assistant")
    assert trained(row, tok) == ["say <|eos|> now<|im_end|>"]
    tok = tokenizer("open-ended")
    (row,) = encode(chat("Hi?", "say <|eos|> now"), tok, "x", "assistant")
    assert trained(row, tok) == ["say <|eos|> now\n<|eos|>"]


def test_template_that_refuses(tokenizer: Make) -> None:
    item = Conversation([{"role": "system", "content": "Be brief."}, *TWO.messages])
    with pytest.raises(DataError, match=r"a:7: the chat template refuses these messages: System role not supported"):
        encode(item, tokenizer("gemma"), "a:7", "assistant")


def test_conversation_needs_a_template(tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"a:7: a conversation needs a chat template.*data\.format: text"):
        encode(TWO, tokenizer("none"), "a:7", "assistant")
    with pytest.raises(ConfigError, match="cannot be encoded without its chat template"):
        encode(TWO, tokenizer("chatml"), "a:7", "assistant", chat=False)


def test_completion_is_a_chat_when_it_can_be(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    (row,) = encode(Completion("Hi?", "Yes."), tok, "x", "assistant")
    (same,) = encode(chat("Hi?", "Yes."), tok, "x", "assistant")
    assert row.ids.tolist() == same.ids.tolist()
    assert row.trained.tolist() == same.trained.tolist()


@pytest.mark.parametrize(("name", "use_chat"), [("none", True), ("chatml", False)])
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_raw_completion(tokenizer: Make, name: str, use_chat: bool, bos: bool) -> None:
    tok = tokenizer(name, bos=bos)
    (row,) = encode(Completion("1 + 1 =", " 2"), tok, "x", "assistant", chat=use_chat)
    assert whole(row, tok) == ("<|bos|>" if bos else "") + "1 + 1 = 2<|eos|>"
    assert trained(row, tok) == [" 2<|eos|>"]
    (row,) = encode(Completion("1 + 1 =", " 2"), tok, "x", "all", chat=use_chat)
    assert row.trained.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_raw_completion_stands_after_the_prompts_own_tokens(tokenizer: Make) -> None:
    """At inference the prompt's last space is a token of its own; so it is here, though " b" would be one."""
    tok = tokenizer("none")
    (row,) = encode(Completion("ring a ", "bell"), tok, "x", "assistant")
    assert row.ids.tolist()[: len("ring a ")] == tok.encode("ring a ")
    assert trained(row, tok) == ["bell<|eos|>"]


def test_text_is_trained_whole(tokenizer: Make) -> None:
    for bos in (False, True):
        tok = tokenizer("none", bos=bos)
        for text in ("Once.", "Once.<|eos|>"):
            (row,) = encode(Text(text), tok, "x", "assistant")
            assert whole(row, tok) == ("<|bos|>" if bos else "") + "Once.<|eos|>"
            assert row.trained.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_prompts_have_nothing_to_train(tokenizer: Make) -> None:
    with pytest.raises(ConfigError, match="are not for supervised"):
        encode(Prompt("Once", {}), tokenizer("chatml"), "x", "assistant")


def test_no_more_work_than_needed(tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer("chatml")
    calls: list[str] = []
    inner = tok._tokenizer
    cls = type(inner)
    render, tokenise = cls.apply_chat_template, cls.__call__
    monkeypatch.setattr(
        cls, "apply_chat_template", lambda self, *a, **k: calls.append("render") or render(self, *a, **k)
    )
    monkeypatch.setattr(cls, "__call__", lambda self, *a, **k: calls.append("tokenise") or tokenise(self, *a, **k))
    encode(chat("So?", "No."), tok, "x", "assistant")  # what a template drops is asked once for all rows of a shape
    calls.clear()
    encode(chat("Hi?", "Yes."), tok, "x", "assistant")
    assert sorted(calls) == ["render", "render", "tokenise"]


def test_first_token_is_never_trained(tokenizer: Make) -> None:
    """Also when nothing stands before the completion: there is nothing to predict it from."""
    (row,) = encode(Completion("", "ab"), tokenizer("none"), "x", "assistant")
    assert row.trained.tolist() == [False, True, True]


def test_prompt_as_a_model_is_asked(tokenizer: Make) -> None:
    tok = tokenizer("chatml")

    def text(prompt: Any, **options: Any) -> str:
        return str(tok.decode(encode_prompt(prompt, tok, **options)))

    tail = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text("hi") == tail
    assert text("hi", system="be kind") == "<|im_start|>system\nbe kind<|im_end|>\n" + tail
    assert text([{"role": "user", "content": "hi"}]) == tail
    assert text("hi", chat=False) == "hi"
    with pytest.raises(ConfigError, match="start with their own"):
        text([{"role": "system", "content": "a"}], system="b")
    plain = tokenizer("none")
    assert encode_prompt("hi", plain) == plain.encode("hi")
    with pytest.raises(ConfigError, match="system has no place"):
        encode_prompt("hi", plain, system="b")
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt([{"role": "user", "content": "hi"}], plain)
