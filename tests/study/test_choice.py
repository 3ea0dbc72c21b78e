"""Choices as token ids: whatever a tokenizer joins at the end of the prompt, each is scored by the whole text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxft.data.sources import Row
from mlxft.errors import DataError
from mlxft.model.load import Loaded, load
from mlxft.model.logits import Split
from mlxft.study.evaluate import encode_choices, loglikelihoods, run_task
from mlxft.study.tasks import Task, make_cases

CLOZE = Task(name="cloze", prompt="{q}", choices="choices", answer="answer", delimiter="", template="none")
TEXT = "the cat is on the mat and in the other"
SPACE = "\u2581"
JOINS = "t h|h e|th e|i n|a n|o n|a t|_ t|_t h|_t he|_th e|_ m|_m at|_ c|_c at|_ i".replace("_", SPACE).split("|")


def sentencepiece(bos: bool) -> Any:
    """A BPE in SentencePiece's manner: a space before the text, bytes for what is in no token, a BOS if so wished."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(join.split(" ")) for join in JOINS]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), SPACE, *map(chr, range(33, 127))]
    tokens += dict.fromkeys(a + b for a, b in merges)
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "sentencepiece without bos"])
def model(request: pytest.FixtureRequest, make_model_dir: Callable[..., Path], tmp_path_factory: Any) -> Loaded:
    folder = make_model_dir(tmp_path_factory.mktemp("choice") / "model", vocab_size=400)
    if request.param != "bytes":
        sentencepiece(request.param == "sentencepiece").save_pretrained(str(folder))
    return load(str(folder), dtype="float32")


def whole_logprob(loaded: Loaded, ids: list[int]) -> float:
    """Of all ids but the first."""
    logits = loaded.model(mx.array([ids[:-1]]))[0].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return float(logprobs[np.arange(len(ids) - 1), ids[1:]].sum())


@pytest.mark.parametrize("plain", [True, False])
def test_wherever_a_text_is_cut(model: Loaded, plain: bool) -> None:
    """Context and continuation are the whole's own ids, at every cut of a text; and one context goes for all."""
    tokenizer = model.tokenizer
    joined = 0
    for at in range(1, len(TEXT)):
        context, choices = TEXT[:at], [TEXT[at:], "at", "he", "in", " on", "\u00e9"]
        found = encode_choices(tokenizer, context, choices, plain=plain)
        before = tokenizer.encode(context.rstrip() if plain else context, add_special_tokens=plain)
        for choice, request in zip(choices, found.requests):
            whole = tokenizer.encode(context + choice, add_special_tokens=plain)
            ids = [*request.context, *request.continuation]
            assert ids[-len(whole) :] == whole
            assert request.context == found.requests[0].context
            assert request.context
            assert request.continuation
        if found.joint:
            joined += 1
            assert found.joint <= len(context)
        else:
            assert list(found.requests[0].context) == before
    assert joined > 5


def test_choices_differ_as_whole_texts_do(model: Loaded) -> None:
    for context, choices in (("the cat on the m", ["in", "at", "on"]), ("in t", ["he", "in"]), ("is o", ["n", "r"])):
        requests = encode_choices(model.tokenizer, context, choices, plain=True).requests
        found = [x.logprob for x in loglikelihoods(Split(model.model), requests, 256)]
        first = requests[0].context[:1]
        wholes = [model.tokenizer.encode(context + choice) for choice in choices]
        texts = [whole_logprob(model, ids if ids[0] == first[0] else [*first, *ids]) for ids in wholes]
        assert np.array(found) - found[0] == pytest.approx(np.array(texts) - texts[0], abs=1e-3)
        assert max(found) < 0


def test_a_joined_choice_is_not_certain(model: Loaded) -> None:
    """A choice that made one token with the prompt's last had no token left, log-likelihood 0, and always won."""
    rows = [
        {"q": "the cat on the m", "choices": ["in", "at", "on"], "answer": "in"},
        {"q": "the mat on the c", "choices": ["on", "in", "at"], "answer": "on"},
        {"q": "in t", "choices": ["he", "at", "on"], "answer": "on"},
        {"q": "the cat", "choices": [" in", " on"], "answer": " on"},
    ]
    cases = make_cases([Row(f"rows:{n}", row) for n, row in enumerate(rows, 1)], CLOZE)
    found = run_task(model, cases, CLOZE)
    for line in found.predictions:
        assert max(line["logprobs"]) < -0.5, line
    assert any("a choice joins the prompt's last token" in note for note in found.notes)
    (other,) = (note for note in run_task(model, cases[3:], CLOZE).notes or [""])
    assert other == ""


def test_the_norm_counts_what_is_scored(model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of "the m" + "at", "m" is scored with every choice, so it counts in every choice's length.

    -4/4 is above -5.4/5 (" m" is of two characters), though -4/2 is below -5.4/3, as it is where nothing is joined.
    """
    from mlxft.study.evaluate import Likelihood

    row = {"q": "the m", "choices": ["at", "ean"], "answer": "at"}
    case = make_cases([Row("rows:1", row)], CLOZE)
    joint = encode_choices(model.tokenizer, "the m", ["at", "ean"], plain=True).joint
    said = [Likelihood(-4.0, False), Likelihood(-5.4, False)]
    monkeypatch.setattr("mlxft.study.evaluate.loglikelihoods", lambda *args: said)
    (line,) = run_task(model, case, CLOZE).predictions
    joins = "</s>" in model.tokenizer.all_special_tokens
    assert joint == 2 * joins
    assert line["scores"]["accuracy_norm"] == joins


def test_what_can_not_be_scored(tiny_model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import normalizers

    tokenizer = tiny_model.tokenizer
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_choices(tokenizer, "", ["a", "b"], plain=True)
    # At the very beginning only a BOS, or else an EOS, stands before a joined token.
    begun = encode_choices(tokenizer, "t", ["he", "x"], plain=True)
    assert begun.requests[0].context == (tokenizer.bos_token_id,)
    assert begun.joint == 1
    inner = tokenizer._tokenizer
    inner.bos_token = inner.eos_token = None
    with pytest.raises(DataError, match="no BOS or EOS"):
        encode_choices(tokenizer, "t", ["he", "x"], plain=True)
    inner.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(DataError, match="adds no token to the prompt"):
        encode_choices(tokenizer, "the cat", [" is", "\u200b"], plain=True)


def test_lm_evals_numbers_hold_where_nothing_is_joined(tiny_model: Loaded) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden/lm_eval_choice.json").read_text("utf-8"))
    for item in golden["items"]:
        said = [f" {choice}" for choice in item["choices"]]
        found = encode_choices(tiny_model.tokenizer, item["question"], said, plain=True)
        assert found.joint == 0
        numbers = [x.logprob for x in loglikelihoods(Split(tiny_model.model), found.requests, 2048)]
        assert numbers == pytest.approx(item["logprobs"], abs=1e-3)
