"""Sampling in batches: the same as one at a time, whatever stands beside; each answer ends where it should."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build, scatter
from mlx.utils import tree_flatten, tree_unflatten

from mlxft.errors import ConfigError, DataError
from mlxft.model import sampling as sampling_module
from mlxft.model.load import load
from mlxft.model.sampling import Sampled, Sampling, complete, sample_batch, text_of

PROMPTS = [[3], [5, 6, 7, 8, 9, 10, 11], [4, 20], list(range(20, 60)), [7, 8, 9], [8, 7, 9]]
GREEDY = Sampling(12, temperature=0.0, stop_at_eos=False)


class Words:
    """A tokenizer of 32 tokens whose texts are one letter each; the eos ids as given."""

    pad_token_id: int | None = None

    def __init__(self, *eos: int) -> None:
        self.eos_token_ids, self._tokenizer = set(eos), self

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("@") + i) for i in ids)

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) - ord("@") for letter in text]


class Cycle(nn.Module):
    """Says after each token the next one of 32, and the more surely the larger `sure`."""

    def __init__(self, sure: float = 30.0) -> None:
        super().__init__()
        self.sure = sure
        self.layers: list[nn.Module] = []
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        self.calls.append(ids.shape)
        if cache:
            state = ids[:, None, :, None].astype(mx.float32)
            cache[0].update_and_fetch(state, state)
        return self.sure * (mx.arange(32) == (ids[..., None] + 1) % 32).astype(mx.float32)

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import KVCache

        return [KVCache()]


def tiny(kind: str, **config: Any) -> nn.Module:
    """A tiny model of an architecture that the fixtures do not have, with random weights, the same each time."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, "vocab_size": 64, **config}))
    key, leaves = mx.random.key(0), []
    for name, value in sorted(tree_flatten(model.parameters())):
        key, now = mx.random.split(key)
        noise = 0.1 * mx.random.normal(value.shape, key=now)
        leaves.append((name, noise if value.ndim > 1 else value + noise))
    model.update(tree_unflatten(leaves))
    return model


def gemma3() -> nn.Module:
    """Five layers that see 8 tokens, in rotating caches, and one that sees all."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    return tiny("gemma3_text", num_key_value_heads=2, sliding_window=8, sliding_window_pattern=6, **sizes)


def lfm2() -> nn.Module:
    """A layer of convolution, with a state in place of keys and values, and one of attention."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    block = {"block_dim": 32, "block_ff_dim": 64, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0}
    rest = {"max_position_embeddings": 512, "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3}
    return tiny("lfm2", block_auto_adjust_ff_dim=False, full_attn_idxs=[1], rope_theta=1e4, **sizes, **block, **rest)


def one_by_one(model: nn.Module, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The likeliest tokens by forward passes over the whole, without any cache."""
    found = []
    for prompt in prompts:
        seen = list(prompt)
        for _ in range(tokens):
            seen.append(int(mx.argmax(model(mx.array([seen]))[0, -1]).item()))
        found.append(seen[len(prompt) :])
    return found


@pytest.mark.parametrize(
    ("kind", "padded"), [("llama", True), ("qwen3", True), ("mixtral", True), ("gemma2", False), ("phi3", True)]
)
def test_greedy_in_a_batch_is_greedy_alone(
    kind: str, padded: bool, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Prompts from 1 to 40 tokens side by side. Gemma 2's attention takes no padding, so lengths stay apart there."""
    loaded = load(str(make_model_dir(tmp_path / kind, kind)), dtype="float32")
    expected = one_by_one(loaded.model, PROMPTS, 12)
    found = sample_batch(loaded.model, loaded.tokenizer, PROMPTS, GREEDY, seed=0)
    assert found == [[Sampled(ids, "length")] for ids in expected]
    assert sampling_module.pads(loaded.model) is padded


@pytest.mark.parametrize("prefill", [4096, 12])
@pytest.mark.parametrize(("make", "padded"), [(gemma3, True), (lfm2, False)])
def test_windows_and_recurrent_states(
    make: Callable[[], nn.Module], padded: bool, prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts beyond the window, and decoding past it; prompts in one go and in pieces."""
    monkeypatch.setattr(sampling_module, "PREFILL", prefill)
    model = make()
    assert sampling_module.pads(model) is padded
    found = sample_batch(model, Words(), PROMPTS, GREEDY, seed=0)  # type: ignore[arg-type]
    assert [answer.ids for (answer,) in found] == one_by_one(model, PROMPTS, 12)
    twice = sample_batch(model, Words(), PROMPTS, GREEDY, seed=0, samples=2)  # type: ignore[arg-type]
    assert twice == [answers * 2 for answers in found]


def test_layers_that_share_keys_take_no_padding() -> None:
    """mlx-lm's afm7 turns their queries by the place in the row, padding included: lengths stay apart."""
    model = build("afm7")
    scatter(model, 0)
    assert not sampling_module.pads(model)
    found = sample_batch(model, Words(), PROMPTS, GREEDY, seed=0)  # type: ignore[arg-type]
    assert [answer.ids for (answer,) in found] == one_by_one(model, PROMPTS, 12)


def test_caches_that_are_not_known_are_used_one_at_a_time(tiny_model: Any) -> None:
    from mlx_lm.models.cache import KVCache

    class Own(KVCache):  # type: ignore[misc]
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            assert keys.shape[0] == 1
            return super().update_and_fetch(keys, values)

    model = tiny_model.model
    expected = one_by_one(model, PROMPTS, 6)
    model.make_cache = lambda: [Own() for _ in model.layers]
    sampling = Sampling(6, temperature=0.0, stop_at_eos=False)
    found = sample_batch(model, tiny_model.tokenizer, PROMPTS, sampling, seed=0, samples=2)
    assert [[answer.ids for answer in answers] for answers in found] == [[ids] * 2 for ids in expected]


def test_logits_of_each_step_are_those_of_a_full_pass(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities within 1e-4 at every step of rows that were padded, replicated and left alone by others."""
    seen: list[mx.array] = []

    def record(logits: mx.array, *args: Any) -> mx.array:
        seen.append(logits)
        return drawn(logits, *args)

    drawn = sampling_module.pick
    monkeypatch.setattr(sampling_module, "pick", record)
    sampling = Sampling(10, stop_at_eos=False)
    found = sample_batch(tiny_model.model, tiny_model.tokenizer, PROMPTS, sampling, samples=2, seed=3)
    order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    rows = [(PROMPTS[i], answer.ids) for i in order for answer in found[i]]
    assert [step.shape[0] for step in seen] == [len(rows)] * 10
    for row, (prompt, ids) in enumerate(rows):
        whole = nn.log_softmax(tiny_model.model(mx.array([prompt + ids]))[0, len(prompt) - 1 : -1])
        stepwise = nn.log_softmax(mx.stack([step[row] for step in seen]))
        assert mx.abs(whole - stepwise).max().item() < 1e-4


def test_the_same_call_gives_the_same_ids(tiny_model: Any) -> None:
    """Whatever was sampled before, and however many rows stand side by side: an answer's randomness is its own."""

    def say(seed: int, rows: int | None = None) -> list[list[Sampled]]:
        return sample_batch(
            tiny_model.model, tiny_model.tokenizer, PROMPTS, Sampling(10), samples=3, seed=seed, rows=rows
        )

    first = say(1)
    assert len({tuple(answer.ids) for answers in first for answer in answers}) == 18
    mx.random.seed(99)
    other = say(2)
    assert other != first
    assert all(say(1, rows) == first for rows in (None, 1, 2, 4, 7))


def test_frequencies_are_those_of_the_softmax_at_the_temperature() -> None:
    """After token 3, token 4 has the weight e^(sure / T) among 31 of weight 1: at 2 and T 0.5 that is e^4 = 54.6.

    Pearson's statistic of 4000 draws over 32 tokens has mean 31 and standard deviation 7.9.
    """
    found = sample_batch(
        Cycle(2.0), Words(), [[3]], Sampling(1, 0.5, stop_at_eos=False), samples=4000, seed=5, rows=500
    )  # type: ignore[arg-type]
    counts = [sum(answer.ids == [token] for answer in found[0]) for token in range(32)]
    expected = [4000 * (54.598 if token == 4 else 1) / (54.598 + 31) for token in range(32)]
    assert sum((n - e) ** 2 / e for n, e in zip(counts, expected)) < 31 + 4 * 7.9


def test_pad_is_never_drawn() -> None:
    """After token 4 the likeliest is 5. As pad it is never taken, and the others are as likely as they are besides."""

    def say(tokenizer: Any, temperature: float, **options: Any) -> list[int]:
        how = Sampling(1, temperature, **options)
        found = sample_batch(Cycle(1.0), tokenizer, [[4]], how, samples=3000, seed=1, rows=500)
        return [answer.ids[0] for answer in found[0]]

    padded = Words(8)
    padded.pad_token_id = 5
    drawn = say(padded, 1.0)
    counts = [drawn.count(token) for token in range(32)]
    assert counts[5] == 0
    assert sum((n - 3000 / 31) ** 2 / (3000 / 31) for i, n in enumerate(counts) if i != 5) < 30 + 4 * 7.8
    assert 5 not in say(padded, 0.0)
    assert 5 not in say(padded, 1.0, top_k=3, top_p=0.9, min_p=0.1)
    assert set(say(padded, 0.0, stop_at_eos=False)) == {5}, "where eos is a token like others pad is one too"
    padded.pad_token_id = 8
    assert say(padded, 1.0) == say(Words(8), 1.0), "padding by eos, which ends answers"


def test_where_answers_end() -> None:
    """Prompts of the alphabet's letters, which the model goes on with: eos 8 is H, and J is a stop string."""

    def say(*prompts: str, tokens: int = 20, **options: Any) -> list[tuple[str, str, str]]:
        how = Sampling(tokens, temperature=0.0, **options)
        tokenizer: Any = Words(8, 31)
        found = sample_batch(Cycle(), tokenizer, [tokenizer.encode(text) for text in prompts], how, seed=0)
        return [(tokenizer.decode(a.ids), a.finish, text_of(tokenizer, a, how)) for (a,) in found]

    assert say("G", "ABC", "XYZZ") == [("H", "eos", ""), ("DEFGH", "eos", "DEFG"), ("[\\]^_", "eos", "[\\]^")]
    assert say("G", "AAAB", tokens=3) == [("H", "eos", ""), ("CDE", "length", "CDE")]
    assert say("A", tokens=7) == [("BCDEFGH", "eos", "BCDEFG")], "an eos at the very end is one"
    assert say("G", stop_at_eos=False, tokens=4) == [("HIJK", "length", "HIJK")]
    assert say("I", "A", "F", stop=("KL", "EF", "zz")) == [
        ("JKL", "stop", "J"),
        ("BCDEF", "stop", "BCD"),
        ("GH", "eos", "G"),
    ]
    assert say("C", stop=("D",)) == [("D", "stop", "")]


class Thinking(Words):
    """C opens a thought, and F closes it."""

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).replace("C", "<think>").replace("F", "</think>")


def test_stop_strings_may_count_in_answers_only() -> None:
    tokenizer: Any = Thinking(31)
    prompts = [[2], [2, 3], [7]]  # B, BC (which opens a thought), G

    def say(tokens: int = 20, **options: Any) -> list[tuple[str, str]]:
        how = Sampling(tokens, temperature=0.0, **options)
        found = sample_batch(Cycle(), tokenizer, prompts, how, seed=0)
        return [(a.finish, text_of(tokenizer, a, how, ids)) for ids, (a,) in zip(prompts, found)]

    both = {"stop": ("E", "I")}
    assert say(**both) == [("stop", "<think>D"), ("stop", "D"), ("stop", "H")]
    answers = [("stop", "<think>DE</think>GH"), ("stop", "DE</think>GH"), ("stop", "H")]
    assert say(**both, stop_in_answer=True) == answers
    cut = [("length", "<think>DE"), ("length", "DE</think>"), ("stop", "H")]
    assert say(3, **both, stop_in_answer=True) == cut
    assert say(stop=("</think>",), stop_in_answer=True)[:2] == [("stop", "<think>DE"), ("stop", "DE")]


def test_rows_that_have_ended_leave() -> None:
    """Eight rows end at eos 20 after 1, 2, ... 8 tokens. A step more than they need is under way when they end."""
    model = Cycle()
    done: list[int] = []
    found = sample_batch(
        model,
        Words(20),  # type: ignore[arg-type]
        [[3, 20 - n] for n in range(1, 9)],
        Sampling(30, temperature=0.0),
        seed=0,
        on_done=done.append,
    )
    assert [len(answer.ids) for (answer,) in found] == list(range(1, 9))
    assert done == [1] * 8
    widths = [shape[0] for shape in model.calls[1:]]
    assert widths[:2] == [8, 8]
    assert widths[-1] == 1
    assert sum(widths) < 8 * 9


def test_a_prompt_is_computed_once_for_all_its_samples() -> None:
    model, prompts = Cycle(), [[3] * 100, [4] * 100]
    found = sample_batch(model, Words(), prompts, Sampling(3, stop_at_eos=False), samples=40, seed=0, rows=16)  # type: ignore[arg-type]
    assert [len(answers) for answers in found] == [40, 40]
    assert sum(rows * width for rows, width in model.calls if width > 1) == 2 * 99
    assert max(rows for rows, _ in model.calls) == 16


def test_little_of_the_prompts_is_padding() -> None:
    """100 and 104 tokens go together; 400 by itself; the answers are in the prompts' order."""
    model = Cycle()
    prompts = [[i] * n for i, n in ((1, 104), (2, 400), (3, 100), (4, 101))]
    found = sample_batch(model, Words(), prompts, Sampling(2, 0.0, stop_at_eos=False), seed=0)  # type: ignore[arg-type]
    assert [answer.ids for (answer,) in found] == [[2, 3], [3, 4], [4, 5], [5, 6]]
    assert sorted(shape for shape in model.calls if shape[1] > 10) == [(1, 399), (3, 103)]


def test_nothing_is_left_behind(tiny_model: Any) -> None:
    """Flags and random state as before; dropout off; adapters and the grown caches of other calls no matter."""
    model = tiny_model.model
    quiet = sample_batch(model, tiny_model.tokenizer, PROMPTS, GREEDY, seed=0)

    class Noisy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.drop = inner, nn.Dropout(0.9)

        def __call__(self, x: mx.array) -> mx.array:
            return self.drop(self.inner(x))

    model.layers[0].mlp = Noisy(model.layers[0].mlp)
    model.train()
    model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(7)
    assert sample_batch(model, tiny_model.tokenizer, PROMPTS, GREEDY, seed=0) == quiet
    sample_batch(model, tiny_model.tokenizer, PROMPTS, Sampling(4, 0.9, 0.9, 9, 0.01), seed=0)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)
    assert [module.training for module in model.modules()] == flags


def test_one_sample_of_a_batch_is_what_generate_says(tiny_model: Any) -> None:
    model, tokenizer = tiny_model.model, tiny_model.tokenizer
    how = Sampling(12, temperature=0.0, stop=("e",))
    for (answer,), prompt in zip(sample_batch(model, tokenizer, PROMPTS, how, seed=0), PROMPTS):
        assert text_of(tokenizer, answer, how) == complete(model, tokenizer, prompt, how)


def test_refusals(tiny_model: Any) -> None:
    model, tokenizer = tiny_model.model, tiny_model.tokenizer
    with pytest.raises(DataError, match="no prompts to complete"):
        sample_batch(model, tokenizer, [], Sampling(1), seed=0)
    with pytest.raises(DataError, match=r"prompt 1 is empty \(2 are\)"):
        sample_batch(model, tokenizer, [[1], [], []], Sampling(1), seed=0)
    with pytest.raises(ConfigError, match="samples is 0"):
        sample_batch(model, tokenizer, [[1]], Sampling(1), seed=0, samples=0)
    with pytest.raises(ConfigError, match="rows is 0"):
        sample_batch(model, tokenizer, [[1]], Sampling(1), seed=0, rows=0)
    with pytest.raises(ConfigError, match=r"set rollout\.stop_at_eos to false"):
        sample_batch(Cycle(), Words(), [[1]], Sampling(1), seed=0)  # type: ignore[arg-type]


def test_the_trial_takes_tokens_that_every_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond an embedding MLX reads what lies in memory: of a vocabulary of two, NaN once in a while."""
    asked: list[int] = []
    prefill = sampling_module.prefill

    def watched(model: nn.Module, prompts: Any) -> Any:
        asked.extend(token for prompt in prompts for token in prompt)
        return prefill(model, prompts)

    monkeypatch.setattr(sampling_module, "prefill", watched)
    monkeypatch.setattr(sampling_module, "_TRIED", {})
    model = build("llama", vocab_size=2)
    assert sampling_module.pads(model)
    assert set(asked) == {0, 1}
