"""The tokenizer in a .gguf file: byte-level BPE, or SentencePiece's BPE by its scores."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from mlxft.errors import ModelError
from mlxft.model.gguf_config import GgufFile, eos_ids
from mlxft.model.gguf_pretokenizers import PRE_TOKENIZERS

# token_type in the file: 3 is a control token, 4 one that the maker added as it stands.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # how SentencePiece writes a space


def tokenizer(file: GgufFile) -> Any:
    """The file's tokenizer, as mlx-lm's TokenizerWrapper around a transformers one.

    Raises:
        ModelError: a vocabulary or pre-tokenizer that is not known here.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    tokens = file.value("tokenizer.ggml.tokens")
    names: dict[str, str] = {}
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        if file.has(f"tokenizer.ggml.{key}_token_id"):
            names[f"{role}_token"] = tokens[file.integer(f"tokenizer.ggml.{key}_token_id")]
    kind = file.value("tokenizer.ggml.model")
    if kind not in _BACKENDS:
        raise ModelError(
            f"{file.path}: a {kind!r} vocabulary is not read from .gguf files, only byte-level BPE ('gpt2') and "
            "SentencePiece's BPE ('llama'); use the model's safetensors folder or hub id"
        )
    backend, add_bos = _BACKENDS[kind](file, tokens)
    _add_marks(file, backend, tokens)
    if (bos := names.get("bos_token")) is not None and file.value("tokenizer.ggml.add_bos_token", add_bos):
        _begin_with(backend, bos, tokens.index(bos))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=file.integer("context_length"),
        clean_up_tokenization_spaces=False,
        **names,
    )
    if file.has("tokenizer.chat_template"):
        fast.chat_template = file.value("tokenizer.chat_template")
    pieces = partial(SPMStreamingDetokenizer, trim_space=_prefixed(file))
    streaming = BPEStreamingDetokenizer if kind == "gpt2" else pieces
    return TokenizerWrapper(fast, streaming, eos_token_ids=eos_ids(file))


def _types(file: GgufFile, tokens: list[str]) -> list[int]:
    return list(file.value("tokenizer.ggml.token_type", [NORMAL] * len(tokens)))


def _vocab(file: GgufFile, tokens: list[str]) -> dict[str, int]:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError(f"{file.path}: the vocabulary has tokens twice; convert it anew")
    return vocab


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Any, bool]:
    """Byte-level BPE with the file's merges and pre-tokenizer; whether it begins with bos by itself."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.value("tokenizer.ggml.pre", "none")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{file.path}: pre-tokenizer {pre!r} is not known, only {', '.join(PRE_TOKENIZERS)}; "
            "use the model's safetensors folder or hub id"
        )
    rule = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in merges):
        raise ModelError(f"{file.path}: the vocabulary has a merge that is not of two; convert it anew")
    model = models.BPE(vocab=_vocab(file, tokens), merges=merges, fuse_unk=False, ignore_merges=rule.ignore_merges)
    out = Tokenizer(model)
    out.pre_tokenizer = pre_tokenizers.Sequence(rule.steps())
    out.decoder = decoders.ByteLevel()
    if rule.nfc:
        out.normalizer = normalizers.NFC()
    return out, rule.add_bos


def _sentencepiece(file: GgufFile, tokens: list[str]) -> tuple[Any, bool]:
    """SentencePiece's BPE: the pair whose token scores highest is merged first; unknown letters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    types, vocab = _types(file, tokens), _vocab(file, tokens)
    unknown = tokens[types.index(UNKNOWN)] if UNKNOWN in types else None
    scores = file.value("tokenizer.ggml.scores")
    merges = _merges(vocab, types, scores)
    out = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = _prefixed(file)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefixed else []
    out.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        undo.append(decoders.Strip(" ", 1, 0))
    out.decoder = decoders.Sequence(undo)
    return out, True


def _prefixed(file: GgufFile) -> bool:
    """Whether text is given a space before it, which is taken off again where tokens become text."""
    return bool(file.value("tokenizer.ggml.add_space_prefix", True))


def _merges(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order in which its score lets them merge."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, number in vocab.items():
        if types[number] != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_marks(file: GgufFile, backend: Any, tokens: list[str]) -> None:
    """Tokens that are never cut: special ones, and those that the maker added."""
    from tokenizers import AddedToken

    types = _types(file, tokens)
    control = [token for token, kind in zip(tokens, types) if kind in (CONTROL, UNKNOWN)]
    # Phi 3's marks take the space behind them with them; the file says so by its name alone, as for llama.cpp.
    phi3 = re.search("phi-?3", str(file.value("general.name", "")), re.IGNORECASE) is not None
    greedy = [phi3 and token not in ("<unk>", "<s>", "<|endoftext|>") for token in control]
    marks = [AddedToken(token, normalized=False, special=True, rstrip=g) for token, g in zip(control, greedy)]
    backend.add_special_tokens(marks)
    # Runs of spaces would never be met as they stand: the normalizer writes spaces otherwise, and merges make them.
    added = [token for token, kind in zip(tokens, types) if kind == USER_DEFINED and token.strip(f" {SPACE}")]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])


def _begin_with(backend: Any, bos: str, number: int) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
