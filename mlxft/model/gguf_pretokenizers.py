"""What `tokenizer.ggml.pre` stands for, in the steps of the `tokenizers` library; read in both directions.

Source of the patterns: llama.cpp's src/llama-vocab.cpp and the tokenizer.json files of the models it names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxft.text import parse_json


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-level BPE.

    Attributes:
        steps: the pre-tokenizers, in their order.
        ignore_merges: a piece that is a token is taken whole.
        add_bos: what llama.cpp does where a file does not say.
    """

    steps: Callable[[], list[Any]]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _byte_level(regex: bool) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _smollm() -> list[Any]:
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]


_SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The same, as some files spell it.
_SPELLED_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> Callable[[], list[Any]]:
    def steps() -> list[Any]:
        from tokenizers import Regex, pre_tokenizers

        return [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level(False)]

    return steps


def _gpt4(digits: str) -> Callable[[], list[Any]]:
    """GPT-4's pattern; families differ in how many digits stand together."""
    return _split(_SHORT_FORMS + _LETTERS + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n" + _SPACES)


def _gpt4o(short_forms: str, digits: str) -> Callable[[], list[Any]]:
    """GPT-4o's pattern, which parts words at a change from small to capital letters."""
    start, capitals, small = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = f"{start}{capitals}*{small}+{short_forms}|{start}{capitals}+{small}*{short_forms}|"
    return _split(words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n/" + _SPACES)


_LLAMA3 = PreTokenizer(_gpt4(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
# The first name of several that mean the same is the one that is written.
PRE_TOKENIZERS = {
    "smollm": PreTokenizer(_smollm),
    "gpt-2": PreTokenizer(lambda: [_byte_level(True)]),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer(_gpt4(r"\p{N}"), nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_gpt4(r"\p{N}")),
    "dbrx": PreTokenizer(_gpt4(r"\p{N}{1,3}")),
    "tekken": PreTokenizer(_gpt4o("", r"\p{N}"), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer(_gpt4o(f"{_SHORT_FORMS}?", r"\p{N}{1,3}")),
}


def recognise(tokenizer: dict[str, Any]) -> str | None:
    """The name of the pre-tokenizer in a tokenizer.json, by what it does; None where it is none of these."""
    seen = signature(tokenizer.get("pre_tokenizer"))
    ignoring = bool(tokenizer["model"].get("ignore_merges"))
    found = [
        name for name, rule in PRE_TOKENIZERS.items() if rule.ignore_merges == ignoring and seen == signature_of(rule)
    ]
    # llama.cpp does not compose letters and their marks (NFC) for any; the name keeps who does.
    nfc = "NFC" in json.dumps(tokenizer.get("normalizer"))
    return min(found, key=lambda name: PRE_TOKENIZERS[name].nfc != nfc, default=None)


def signature(step: dict[str, Any] | None) -> list[Any]:
    """What steps of a tokenizer.json do, whatever else they say."""
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [part for inner in step["pretokenizers"] for part in signature(inner)]
    if kind == "Split":
        pattern = step["pattern"].get("Regex", step["pattern"].get("String"))
        return [(kind, pattern.replace(_SPELLED_OUT, _SHORT_FORMS), step["behavior"], step["invert"])]
    if kind == "ByteLevel":
        return [(kind, step["add_prefix_space"], step.get("use_regex", True))]
    return [(kind, json.dumps({k: v for k, v in sorted(step.items()) if k != "type"}))]


def signature_of(rule: PreTokenizer) -> list[Any]:
    """The same of one of those above."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    probe = Tokenizer(models.BPE())
    probe.pre_tokenizer = pre_tokenizers.Sequence(rule.steps())
    return signature(parse_json(probe.to_str())["pre_tokenizer"])
