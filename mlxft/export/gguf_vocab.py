"""A tokenizer as llama.cpp wants it in a .gguf file: tokens, their kinds, merges or scores, chat template."""

from __future__ import annotations

import json
from typing import Any

from mlxft.data.encode import turn_end
from mlxft.errors import ExportError
from mlxft.model.gguf_pretokenizers import PRE_TOKENIZERS, recognise
from mlxft.model.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from mlxft.text import parse_json

# Of a token that no merge makes; far below any rank.
_NO_SCORE = -1e6


def vocabulary(tokenizer: Any, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper, or transformers' own.
        rows: of the embedding; ids that the tokenizer does not use are filled up, tokens beyond are left out.
    Raises:
        ExportError: a tokenizer of a kind that llama.cpp does not have, or one that it would run otherwise.
    """
    spec = _spec(tokenizer)
    model = spec["model"]
    if model["type"] != "BPE":
        raise ExportError(f"the tokenizer is of the kind {model['type']}; .gguf files are written for BPE only")
    added = {token["id"]: token for token in spec["added_tokens"]}
    tokens = _tokens(model["vocab"], added, rows)
    types = [_kind(i, token, added, model) for i, token in enumerate(tokens)]
    texts = [token if token is not None else f"[PAD{i}]" for i, token in enumerate(tokens)]
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        out = _sentencepiece(spec, texts, types, merges, chat_template(tokenizer) is not None)
    else:
        out = _byte_level(spec, merges)
    out["tokenizer.ggml.tokens"] = texts
    out["tokenizer.ggml.token_type"] = types
    return out | _marks(tokenizer, rows)


def _spec(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("the tokenizer has no tokenizer.json (it is not a fast one); .gguf files need it")
    spec: dict[str, Any] = parse_json(backend.to_str())
    return spec


def _tokens(vocab: dict[str, int], added: dict[int, dict[str, Any]], rows: int) -> list[str | None]:
    """Text of each id of the embedding, None where none has it."""
    by_id = {i: token for token, i in vocab.items()} | {i: token["content"] for i, token in added.items()}
    beyond = [i for i in by_id if i >= rows and i not in added]
    if beyond:
        raise ExportError(f"the tokenizer has {max(by_id) + 1} tokens, the embedding {rows} rows; they do not fit")
    return [by_id.get(i) for i in range(rows)]


def _kind(number: int, token: str | None, added: dict[int, dict[str, Any]], model: dict[str, Any]) -> int:
    if token is None:
        return UNUSED
    if token == model.get("unk_token") and model.get("byte_fallback"):
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] or _looks_special(token) else USER_DEFINED
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL


def _looks_special(token: str) -> bool:
    """Marks that some makers did not declare special; llama.cpp's converter takes them for such, too."""
    fences = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(left) and token.endswith(right) for left, right in fences
    )


def _byte_level(spec: dict[str, Any], merges: list[Any]) -> dict[str, Any]:
    name = recognise(spec)
    normal = _flat(spec.get("normalizer"), "normalizers")
    if name is None or any(step["type"] != "NFC" for step in normal):
        what = json.dumps(spec.get("pre_tokenizer") if name is None else spec["normalizer"])
        raise ExportError(
            f"the tokenizer cuts text in a way that has no name in llama.cpp here: {what[:200]}; known are "
            f"{', '.join(PRE_TOKENIZERS)}. llama.cpp's own convert_hf_to_gguf.py may know it: give it the fused folder "
            "(mlxft fuse)"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _sentencepiece(
    spec: dict[str, Any], texts: list[str], types: list[int], merges: list[Any], chats: bool
) -> dict[str, Any]:
    """llama.cpp merges the pair whose token scores highest: scores fall with the first merge that makes a token."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [0.0] * len(texts)
    for i, (text, kind) in enumerate(zip(texts, types)):
        if kind == NORMAL:
            scores[i] = -float(ranks[text]) if text in ranks else _NO_SCORE
        elif kind == USER_DEFINED:
            texts[i] = text.replace(SPACE, " ")
    steps = [*_flat(spec.get("normalizer"), "normalizers"), *_flat(spec.get("pre_tokenizer"), "pretokenizers")]
    known = ("Prepend", "Replace", "Metaspace", "Split")
    odd = [step["type"] for step in steps if step["type"] not in known]
    if odd:
        raise ExportError(
            f"the tokenizer changes text by {', '.join(odd)} before it cuts it, which llama.cpp's SentencePiece "
            "vocabulary does not do; use the fused folder (mlxft fuse)"
        )
    # llama.cpp sets a space before every stretch of text or before none. Metaspace's "first" sets one at the very
    # start only: with a chat template a mark stands there, so none is right.
    always = "always" if chats else "first"
    prefixed = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") in ("always", always))
        for step in steps
    )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for s in step[inner] for part in _flat(s, inner)] if step["type"] == "Sequence" else [step]


def _marks(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Ids with a meaning, what an encoded text begins and ends with, and the chat template."""
    out: dict[str, Any] = {}
    eos = tokenizer.eos_token_id
    roles = {"bos": tokenizer.bos_token_id, "eos": eos, "unknown": tokenizer.unk_token_id}
    roles["padding"] = tokenizer.pad_token_id
    if (turn := _end_of_turn(tokenizer)) is not None:
        roles["eot"] = turn
    for role, number in roles.items():
        if number is not None and number < rows:
            out[f"tokenizer.ggml.{role}_token_id"] = int(number)
    ids = list(tokenizer.encode("a"))
    out["tokenizer.ggml.add_bos_token"] = roles["bos"] is not None and ids[0] == roles["bos"]
    out["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and eos is not None and ids[-1] == eos
    if (template := chat_template(tokenizer)) is not None:
        out["tokenizer.chat_template"] = template
    return out


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's Jinja template, the default one of several."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    return found or None


def _end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer in the chat template, where it is another than eos."""
    others = set(getattr(tokenizer, "eos_token_ids", ())) - {tokenizer.eos_token_id}
    if not others or chat_template(tokenizer) is None:
        return None
    if len(others) == 1:
        return int(next(iter(others)))
    # Where the template refuses to be asked, llama.cpp finds the token by its name.
    return next((end for end in turn_end(tokenizer) if end in others), None)
