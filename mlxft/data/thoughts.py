"""Where a reasoning model's thoughts end in a completion, and its answer begins.

Marks are looked for in text, not in token ids: a model that learned `<think>` from its rows may write it letter by
letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

Thoughts = Literal["drop", "keep"]

_TAGS = ("think", "thinking", "thought", "reasoning", "longcat_think", "seed:think", "mm:think")
# What opens and what closes a thought: the marks that mlx-lm's TokenizerWrapper and vLLM's reasoning parsers know, and
# those of data sets to fine-tune on.
MARKS: tuple[tuple[str, str], ...] = (
    *((f"<{tag}>", f"</{tag}>") for tag in _TAGS),
    ("[THINK]", "[/THINK]"),  # Mistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
    ("<|think:start|>", "<|think:end|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),  # Kimi K3
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThoughts
)
_CLOSING = dict(MARKS)
# What stands around an answer beside the thoughts; made of special tokens, so never text of the answer.
_FRAMES = (
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
)
# gpt-oss writes messages, each with its channel: analysis (thoughts), commentary (calls of tools) or final.
_ANALYSIS = "<|channel|>analysis<|message|>"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start)\|>")


def _any_of(marks: Sequence[str]) -> str:
    return "|".join(re.escape(mark) for mark in marks)


_OPENS = re.compile(rf"\s*({_any_of(list(_CLOSING))})")
_OPENED = re.compile(rf"({_any_of([*_CLOSING, _ANALYSIS])})\s*\Z")
_ANY_MARK = re.compile(_any_of([mark for pair in MARKS for mark in pair]))
_IN_PATTERN = re.compile(r"[<\[\u25c1][^>\]]*(?:think|thought|reason)|<\|(?:channel|inner)", re.IGNORECASE)
_SPACE = re.compile(r"\s*")


def split_thoughts(text: str, opening: str = "") -> tuple[str, str]:
    """Cut a completion into its thoughts, marks and white space after them included, and its answer.

    Thoughts stand at the beginning, in one block or several. Pairs of marks within a thought are part of it; once the
    answer has begun, marks are text that it quotes. A closing mark that no opening one precedes ends a thought that was
    opened out of sight. A thought that never ends leaves no answer.

    Args:
        opening: the mark by which the prompt has opened a thought already; see `opening_of`.
    """
    end = _end_of_thoughts(opening + text) - len(opening)  # a mark that opens a thought does not end it
    return text[:end], text[end:]


def _end_of_thoughts(text: str) -> int:
    if channels := list(_CHANNEL.finditer(text)):
        said = [c for c in channels if c[1] == "final"] or [c for c in channels if c[1] != "analysis"]
        return said[-1].end() if said else len(text)
    end = 0
    if not _OPENS.match(text):
        first = _ANY_MARK.search(text)
        if first is None or first[0] in _CLOSING:
            return 0
        end = first.end()
    while opened := _OPENS.match(text, end):
        closed = _closed(text, opened.end(), opened[1])
        if closed is None:
            return len(text)
        end = closed
    spaces = _SPACE.match(text, end)
    assert spaces is not None
    return spaces.end()


def _closed(text: str, start: int, opening: str) -> int | None:
    """Where the thought ends that `opening` began before `start`: at its own closing mark, or else at the first."""
    closing, depth, first = _CLOSING[opening], 1, None
    for mark in re.finditer(_any_of([opening, closing]), text[start:]):
        depth += 1 if mark[0] == opening else -1
        if mark[0] == closing and first is None:
            first = start + mark.end()
        if depth == 0:
            return start + mark.end()
    return first


def until_stop(text: str, stop: Sequence[str], opening: str = "", in_answer: bool = True) -> str:
    """Return a completion up to its first stop text.

    Args:
        opening: the mark by which the prompt has opened a thought already.
        in_answer: whether a stop text counts in the answer only, not in the thoughts before it; one that holds a mark
            of thoughts counts everywhere.
    """
    answer = len(split_thoughts(text, opening)[0]) if in_answer and stop else 0
    ends = (text.find(end, 0 if _ANY_MARK.search(end) else answer) for end in stop)
    return text[: min((at for at in ends if at >= 0), default=len(text))]


def answer_of(text: str, opening: str = "") -> str:
    """Return a completion without its thoughts; a text without marks as it is.

    Args:
        opening: the mark by which the prompt has opened a thought already; see `opening_of`.
    """
    thoughts, answer = split_thoughts(text, opening)
    if "<|channel|>" in opening + thoughts:
        answer = _MESSAGE_END.split(answer, maxsplit=1)[0]
    for begin, end in _FRAMES:
        if answer.startswith(begin):
            answer = answer[len(begin) :].partition(end)[0]
    return answer


def wanted_of(text: str) -> str:
    """Return a row's wanted text without its thoughts; where nothing would be left, as it is."""
    return answer_of(text) or text


def opening_of(prompt: str) -> str:
    """Return the mark of the thought that a rendered prompt leaves open at its end, as DeepSeek R1's does, or ''."""
    opened = _OPENED.search(prompt)
    return opened[1] if opened else ""


def opening_after(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return `opening_of` a prompt of token ids."""
    # No mark is longer, in tokens of a character each.
    longest = 2 * max(map(len, [*_CLOSING, _ANALYSIS]))
    return opening_of(str(tokenizer.decode(list(ids[-longest:]))))


def keeps_thoughts(own: Thoughts | None, general: Thoughts, pattern: str | None = None) -> bool:
    """Return whether a rule or metric judges the whole completion.

    Args:
        own, general: its own setting, and the one that holds where it has none.
        pattern: its regular expression: one that names the marks of thoughts is about them.
    """
    if own is None and pattern is not None and _IN_PATTERN.search(pattern.replace("\\", "")):
        return True
    return (own or general) == "keep"


def decode_completion(tokenizer: Any, ids: Iterable[int]) -> str:
    """Decode a completion without special tokens, but for those that mark its thoughts."""
    left_out = _left_out(tokenizer)
    return str(tokenizer.decode([i for i in ids if i not in left_out]))


@lru_cache(maxsize=4)
def _left_out(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    added = {i: str(token) for i, token in added if getattr(token, "special", False)}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens)) | added
    marks = [mark for pair in (*MARKS, *_FRAMES) for mark in pair] + [_ANALYSIS]
    return frozenset(i for i, text in special.items() if not any(text in mark for mark in marks))
