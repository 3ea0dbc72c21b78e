"""Sampling: what comes out, where it stops, and that it leaves no trace."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxft.errors import ConfigError, DataError
from mlxft.model.sample import _sampler, _stop_at, generate, render_prompt, stream


def test_smollm2_answers(smollm2: Any) -> None:
    ask = "What is the capital of France?"
    pieces = list(stream(smollm2.model, smollm2.tokenizer, ask, max_tokens=20, temperature=0.0))
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 3
    cut = generate(smollm2.model, smollm2.tokenizer, ask, max_tokens=20, temperature=0.0, stop=["zzz", "France is"])
    assert cut == "The capital of "
    ids = render_prompt(smollm2.tokenizer, ask)
    assert generate(smollm2.model, smollm2.tokenizer, ids, max_tokens=3, temperature=0.0) == "The capital of"


def test_greedy_is_the_argmax_of_full_passes(tiny_model: Any) -> None:
    """The key-value cache must give what a forward pass over the whole text gives."""
    ids = render_prompt(tiny_model.tokenizer, "the")
    text, seen = generate(tiny_model.model, tiny_model.tokenizer, ids, max_tokens=8, temperature=0.0), list(ids)
    for _ in range(8):
        token = mx.argmax(tiny_model.model(mx.array([seen]))[0, -1]).item()
        if token in tiny_model.tokenizer.eos_token_ids:
            break
        seen.append(token)
    assert text == tiny_model.tokenizer.decode(seen[len(ids) :])


def test_seed(tiny_model: Any) -> None:
    def say(seed: int | None) -> str:
        return generate(tiny_model.model, tiny_model.tokenizer, "a", max_tokens=12, temperature=1.0, seed=seed)

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(5)}) == 5
    assert say(None) != say(None)


def test_random_state_and_training_flags_are_as_before(tiny_model: Any) -> None:
    model = tiny_model.model
    model.train()
    model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(7)
    pieces = stream(model, tiny_model.tokenizer, "a", max_tokens=30, temperature=0.9, top_p=0.9, top_k=9, min_p=0.01)
    next(pieces)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)
    assert not model.training
    pieces.close()
    assert [module.training for module in model.modules()] == flags


def test_dropout_is_off(tiny_model: Any) -> None:
    class Noisy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.drop = inner, nn.Dropout(0.9)

        def __call__(self, x: mx.array) -> mx.array:
            return self.drop(self.inner(x))

    quiet = generate(tiny_model.model, tiny_model.tokenizer, "a", max_tokens=8, temperature=0.0)
    layer = tiny_model.model.layers[0]
    layer.mlp = Noisy(layer.mlp)
    tiny_model.model.train()
    assert generate(tiny_model.model, tiny_model.tokenizer, "a", max_tokens=8, temperature=0.0) == quiet


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.75}, {0, 1}),
        ({"min_p": 0.2}, {0, 1, 2}),
    ],
)
def test_filters(options: dict[str, Any], allowed: set[int]) -> None:
    """p = .5, .3, .15, .05: the first two reach .75; .15/.5 is above 0.2 and .05/.5 below."""
    settings = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, **options}
    sample = _sampler(1.0, seed=0, **settings)
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    assert {sample(logprobs).item() for _ in range(200)} == allowed


def test_temperature() -> None:
    """p = .8, .2 at temperature 2 is proportional to sqrt(p): 2/3 and 1/3. 3000 draws: sd 0.0086."""
    sample = _sampler(2.0, 1.0, 0, 0.0, seed=0)
    logprobs = mx.log(mx.array([[0.8, 0.2]]))
    share = Counter(sample(logprobs).item() for _ in range(3000))[0] / 3000
    assert share == pytest.approx(2 / 3, abs=0.035)


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["ab", "cd", "ef"], (), "abcdef"),
        (["ab", "cd", "ef"], ("cd",), "ab"),
        (["a<", "en", "d>b"], ("<end>",), "a"),
        (["a<", "en", "x>b"], ("<end>",), "a<enx>b"),
        (["aa", "ab"], ("aab",), "a"),
        (["xyz"], ("z", "y"), "x"),
        (["ab<e"], ("<end>",), "ab<e"),
        (["stop"], ("stop",), ""),
    ],
)
def test_stop_strings(pieces: list[str], stop: tuple[str, ...], shown: str) -> None:
    out = list(_stop_at(iter(pieces), stop))
    assert "".join(out) == shown
    assert all(out)


def test_leading_space_is_kept_in_plain_text(smollm2: Any) -> None:
    ids = smollm2.tokenizer.encode("The capital of France is")
    text = generate(smollm2.model, smollm2.tokenizer, ids, max_tokens=2, temperature=0.0)
    assert text.startswith(" ")


def test_render_prompt(tiny_tokenizer: Any, tiny_model: Any) -> None:
    def text(*args: Any) -> str:
        return str(tiny_tokenizer.decode(render_prompt(tiny_tokenizer, *args)))

    tail = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text("hi") == tail
    assert text("hi", "be kind") == "<|im_start|>system\nbe kind<|im_end|>\n" + tail
    assert text([{"role": "user", "content": "hi"}]) == tail
    with pytest.raises(ConfigError, match="one of their own"):
        text([{"role": "system", "content": "a"}], "b")
    with pytest.raises(DataError, match="refuses these messages"):
        text([{"speaker": "user"}])
    plain = tiny_model.tokenizer
    plain.chat_template, plain.has_chat_template = None, False
    assert render_prompt(plain, "hi") == plain.encode("hi")
    with pytest.raises(ConfigError, match="system has no place"):
        render_prompt(plain, "hi", "b")
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(plain, [{"role": "user", "content": "hi"}])


def test_wrong_settings_are_named_at_once(tiny_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens is 0.*temperature is -1.*top_p is 0.*top_k is -1.*min_p is 2"):
        stream(tiny_model.model, tiny_model.tokenizer, "a", max_tokens=0, temperature=-1, top_p=0, top_k=-1, min_p=2)
    with pytest.raises(ConfigError, match="none of them empty"):
        stream(tiny_model.model, tiny_model.tokenizer, "a", max_tokens=1, temperature=0, stop=[""])
    with pytest.raises(DataError, match="the prompt is empty"):
        stream(tiny_model.model, tiny_model.tokenizer, [], max_tokens=1, temperature=0)
