"""Sampling: what comes out, where it stops, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxft.data.dataset import encode_prompt
from mlxft.errors import ConfigError, DataError
from mlxft.model.sampling import Noise, Sampling, _stop_at, complete, pick, stream


def noise(rows: int) -> Noise:
    return Noise(mx.random.split(mx.random.key(0), rows))


def test_smollm2_answers(smollm2: Any) -> None:
    ask = "What is the capital of France?"
    pieces = list(stream(smollm2.model, smollm2.tokenizer, ask, Sampling(20, temperature=0.0)))
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 3
    cut = complete(smollm2.model, smollm2.tokenizer, ask, Sampling(20, temperature=0.0, stop=("zzz", "France is")))
    assert cut == "The capital of "
    ids = encode_prompt(ask, smollm2.tokenizer)
    assert complete(smollm2.model, smollm2.tokenizer, ids, Sampling(3, temperature=0.0)) == "The capital of"


def test_greedy_is_the_argmax_of_full_passes(tiny_model: Any) -> None:
    """The key-value cache must give what a forward pass over the whole text gives."""
    ids = encode_prompt("the", tiny_model.tokenizer)
    text, seen = complete(tiny_model.model, tiny_model.tokenizer, ids, Sampling(8, temperature=0.0)), list(ids)
    for _ in range(8):
        token = mx.argmax(tiny_model.model(mx.array([seen]))[0, -1]).item()
        if token in tiny_model.tokenizer.eos_token_ids:
            break
        seen.append(token)
    assert text == tiny_model.tokenizer.decode(seen[len(ids) :])


def test_seed(tiny_model: Any) -> None:
    def say(seed: int | None) -> str:
        return complete(tiny_model.model, tiny_model.tokenizer, "a", Sampling(12), seed=seed)

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
    pieces = stream(model, tiny_model.tokenizer, "a", Sampling(30, temperature=0.9, top_p=0.9, top_k=9, min_p=0.01))
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

    quiet = complete(tiny_model.model, tiny_model.tokenizer, "a", Sampling(8, temperature=0.0))
    layer = tiny_model.model.layers[0]
    layer.mlp = Noisy(layer.mlp)
    tiny_model.model.train()
    assert complete(tiny_model.model, tiny_model.tokenizer, "a", Sampling(8, temperature=0.0)) == quiet


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
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]] * 200))
    assert set(pick(logprobs, Sampling(1, **options), noise(200)).tolist()) == allowed


def test_temperature() -> None:
    """p = .8, .2 at temperature 2 is proportional to sqrt(p): 2/3 and 1/3. 3000 draws: sd 0.0086."""
    logprobs = mx.log(mx.array([[0.8, 0.2]] * 3000))
    share = 1 - pick(logprobs, Sampling(1, temperature=2.0), noise(3000)).mean().item()
    assert share == pytest.approx(2 / 3, abs=0.035)


@pytest.mark.parametrize("vocabulary", [1, 2, 10, 97, 300])
def test_every_token_is_drawn_as_often_as_its_softmax_says(vocabulary: int) -> None:
    """Pearson's statistic over the tokens has the mean V - 1 and the variance 2 (V - 1)."""
    logits = mx.random.normal((vocabulary,), key=mx.random.key(vocabulary))
    draws = 200 * vocabulary
    drawn = pick(mx.repeat(logits[None], draws, axis=0), Sampling(1), noise(draws))
    counts = mx.array([mx.sum(drawn == token).item() for token in range(vocabulary)])
    expected = mx.softmax(logits) * draws
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic <= vocabulary - 1 + 4 * (2 * (vocabulary - 1)) ** 0.5
    assert (drawn < vocabulary).all().item()


def test_noise_is_each_rows_own() -> None:
    """Over more steps than are drawn at a time; rows that leave change nothing for the others."""
    keys = mx.random.split(mx.random.key(5), 4)
    together, alone, left = Noise(keys), Noise(keys[2:3]), Noise(keys)
    left.take(mx.array([3, 2]))
    seen = []
    for _ in range(150):
        step = together()
        assert mx.array_equal(step[2:3], alone())
        assert mx.array_equal(step[mx.array([3, 2])], left())
        seen += step.flatten().tolist()
    assert len(set(seen)) > 0.99 * len(seen)
    assert min(seen) >= 0
    assert max(seen) < 1
    assert sum(seen) / len(seen) == pytest.approx(0.5, abs=0.04)  # sd 0.0083


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
    text = complete(smollm2.model, smollm2.tokenizer, ids, Sampling(2, temperature=0.0))
    assert text.startswith(" ")


def test_wrong_settings_are_named_at_once(tiny_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens is 0.*temperature is -1.*top_p is 0.*top_k is -1.*min_p is 2"):
        Sampling(0, temperature=-1, top_p=0, top_k=-1, min_p=2)
    for stop in ([""], "x", [1]):
        with pytest.raises(ConfigError, match="none of them empty"):
            Sampling(1, stop=stop)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the prompt is empty"):
        stream(tiny_model.model, tiny_model.tokenizer, [], Sampling(1))


def test_eos_is_a_token_like_others_when_asked(tiny_model: Any) -> None:
    """With every token an eos, nothing is said; and all of it when they do not end it."""
    ids = encode_prompt("the", tiny_model.tokenizer)
    tiny_model.tokenizer.eos_token_ids = range(len(tiny_model.tokenizer.vocab))
    assert complete(tiny_model.model, tiny_model.tokenizer, ids, Sampling(8, temperature=0.0)) == ""
    said = complete(tiny_model.model, tiny_model.tokenizer, ids, Sampling(8, temperature=0.0, stop_at_eos=False))
    assert len(said) >= 4
