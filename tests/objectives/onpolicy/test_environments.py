"""Environments: known optima, what is trained of an episode, the protocol and its failures, tools, and verifiers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxft
from mlxft.config import load_config, override
from mlxft.errors import ConfigError, DataError, EpisodeError
from mlxft.objectives.episodes import EncodedPrompt, EnvironmentSettings, Episodes
from mlxft.objectives.rollouts import Rollout

from .test_kin import made, quietly

Words = Callable[..., Path]
OnPolicy = Callable[..., dict[str, Any]]
Play = Callable[..., dict[str, Any]]


@pytest.fixture
def play(words: Words, on_policy: OnPolicy, tmp_path: Path) -> Play:
    """`play("grpo", "...", own={...}, **{"environment.turns": 3})`: settings with an environment `Env` of that body."""

    def make(objective: str, body: str, own: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        path = tmp_path / "env.py"
        path.write_text(f"import asyncio, time\nimport mlxft\nfrom mlxft import Observation\n\nclass Env:\n{body}")
        model = changes.pop("model", None) or words(8)
        body = changes.pop("rewards", None)
        settings = on_policy(objective, model, body or "pass", own or {}, **{"rollout.max_tokens": 2, **changes})
        if body is None:
            del settings["rewards"]
        settings["environment"] = {"path": f"{path}:Env", **settings.get("environment", {})}
        return settings

    return make


# Known optima.

ARMS = """
    def reset(self, row, seed):
        self.arm, self.turns = seed % 2, 0

    async def step(self, turn):
        self.turns += 1
        if self.turns == 1:
            return Observation(f"w{2 + self.arm}" if turn.text == "w0" else "w4")
        return Observation(reward=float(turn.text == f"w{2 + self.arm}"), end=True)
"""
COST, MANY = 0.1, 5


def best() -> float:
    """The best reward - 0.1 KL of the bandit: of the five first words, w0 reveals which arm pays 1.

    V = c ln mean e^(Q/c) at each turn: Q is 1 for one of the words after w0, and 0.5 for two of them after others.
    """
    asked = COST * np.log((np.exp(1 / COST) + MANY - 1) / MANY)
    blind = COST * np.log((2 * np.exp(0.5 / COST) + MANY - 2) / MANY)
    return float(COST * np.log((np.exp(asked / COST) + (MANY - 1) * np.exp(blind / COST)) / MANY))


def reached(folder: Path) -> float:
    """The policy's reward - 0.1 KL, by all ten courses of the bandit."""
    model = mlxft.load(folder).model

    def chances(*ids: int) -> Any:
        return np.array(mx.softmax(model(mx.array([ids]))[0, -1].astype(mx.float32)), dtype=np.float64)

    def kl(p: Any) -> float:
        return float((p * np.log(MANY * p)).sum())

    first = chances(0, 1)
    total = -COST * kl(first)
    for word in range(MANY):
        for arm in (2, 3):
            second = chances(0, 1, word, arm if word == 0 else 4)
            total += first[word] / 2 * (second[arm] - COST * kl(second))
    return total


@pytest.mark.learning
@pytest.mark.parametrize(
    ("objective", "own", "rate"),
    [
        pytest.param("grpo", {"kl_in": "advantages", "scale": "none"}, 1e-2, marks=pytest.mark.slow),
        ("rloo", {}, 1e-2),
        pytest.param("ppo", {"epochs": 1, "lam": 1.0}, 3e-3, marks=pytest.mark.slow),
    ],
)
def test_the_optimum_of_a_two_turn_bandit_is_reached(
    words: Words, play: Play, tmp_path: Path, objective: str, own: dict[str, Any], rate: float
) -> None:
    """Within 2 % in 150 steps, although the first turn pays only by what the second makes of it."""
    changes = {"rollout.samples": 32, "rollout.max_tokens": 1, "rollout.rows": 128, "batch.rows": 128}
    changes |= {"run.steps": 150, "optim.lr": rate, "optim.schedule": "linear"}
    settings = play(objective, ARMS, {"kl_coef": COST, **own}, model=words(MANY), **changes)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w0 w1"}\n' * 4)
    assert reached(quietly(settings).dir) == pytest.approx(best(), rel=0.02)


# What is trained.

TALK = """
    def reset(self, row, seed):
        self.left = 1 + seed % 3
        return "w7 w6" if seed % 2 else None

    def step(self, turn):
        self.left -= 1
        reward = 0.1 * len(turn.text)
        return Observation("w5 " * (1 + len(turn.text) % 3), reward, end=self.left == 0)
"""
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"loss": "sequence"}),
    ("grpo", {"loss": "token", "kl_coef": 0.0}),
    ("rloo", {}),
    ("reinforce", {}),
    ("ppo", {"epochs": 1, "critic": "shared"}),
    ("ppo", {"epochs": 1}),
]


def rolled(settings: dict[str, Any], words: Words) -> tuple[Any, nn.Module, Rollout, dict[str, Any]]:
    """The objective with its first rollout."""
    objective, model = made(settings)
    rollout, event = objective.roll(model)
    assert {episode.turns for episode in rollout.episodes} == {1, 2, 3}
    assert {episode.begin for episode in rollout.episodes} >= {1, 2, 3}
    return objective, model, rollout, event


@pytest.mark.invariant
@pytest.mark.parametrize(("objective", "own"), METHODS)
def test_no_token_of_an_environment_is_trained(words: Words, play: Play, objective: str, own: dict[str, Any]) -> None:
    """Losses, KL, entropy, denominators and gradients have the policy's tokens only, by sums over whole contexts."""
    model_dir = words(8, spread=0.2)
    settings = play(objective, TALK, own, model=model_dir, **{"batch.rows": 5, "data.max_length": 40})
    o, model, rollout, event = rolled(settings, words)
    flat = [np.flatnonzero(own) for own in rollout.own]
    assert sum(map(len, flat)) < sum(map(len, rollout.replies))
    o._rollout = rollout
    step = next(o.steps(model))

    def whole(i: int) -> tuple[mx.array, np.ndarray]:
        """Log-probabilities of all tokens of an episode after the first, and which are the policy's."""
        begin = rollout.begins[i]
        ids = np.concatenate([o.prompts[rollout.prompts[i]].ids[:begin], rollout.replies[i]])
        logits = nn.log_softmax(model(mx.array(ids[None]))[0, :-1])
        found = mx.take_along_axis(logits, mx.array(ids[1:, None]), axis=1)[:, 0]
        return found, begin - 1 + flat[i]

    for i in range(len(rollout)):
        logprobs, mine = whole(i)
        np.testing.assert_allclose(rollout.tokens["old_logprobs"][i], np.array(logprobs)[mine], atol=1e-5)
    labels = np.concatenate([rollout.replies[i][flat[i]] for i in range(len(rollout))])
    trained = [b for b in step.micro_batches if b.data.advantages is not None]
    assert sorted(np.concatenate([np.array(b.data.labels) for b in trained]).tolist()) == sorted(labels.tolist())
    assert sum(b.trained_tokens for b in trained) == len(labels) == rollout.sizes.sum()
    by_tokens = objective == "ppo" or own.get("loss") == "token"
    assert step.per["policy"] == (len(labels) if by_tokens else len(rollout))
    assert event["response_tokens"] == pytest.approx(len(labels) / len(rollout))

    # At a ratio of 1 the gradient is that of -A log pi, over the policy's tokens, divided as the method does.
    def plainly() -> mx.array:
        total = mx.array(0.0)
        for i in range(len(rollout)):
            logprobs, mine = whole(i)
            share = len(mine) if own.get("loss") == "sequence" else 1
            gains = mx.array(rollout.tokens["advantages"][i])
            total -= (gains * logprobs[mx.array(mine)]).sum() / share
        return total

    def policy() -> mx.array:
        return sum((o.loss(model, b.data).losses["policy"] for b in trained), mx.array(0.0))

    if objective == "grpo":
        o.needs_reference = False  # the term of KL, whose gradient is 0 where the policy is the reference
    seen, expected = (dict(tree_flatten(nn.value_and_grad(model, f)()[1])) for f in (policy, plainly))
    assert max(float(mx.abs(g).max()) for g in expected.values()) > 1e-3
    for name, slope in expected.items():
        if "critic" not in name:
            np.testing.assert_allclose(np.array(seen[name]), np.array(slope), rtol=2e-3, atol=1e-5, err_msg=name)


FIVE = "return [5.0] * len(prompts)"


@pytest.mark.invariant
def test_rewards_of_turns_stand_at_their_last_tokens(words: Words, play: Play) -> None:
    """What the environment gives is at each turn's end, and what rewards.function adds at the last one's."""
    o, _, rollout, event = rolled(play("ppo", TALK, {"kl_coef": 0.0}, rewards=FIVE, **{"data.max_length": 40}), words)
    grid = np.array(rollout.rewards)
    for i, episode in enumerate(rollout.episodes):
        ends = np.flatnonzero(np.diff([*rollout.own[i].astype(int), 0]) == -1)
        mine = np.cumsum(rollout.own[i])[ends] - 1
        assert len(mine) == episode.turns == len(episode.rewards)
        expected = np.zeros(grid.shape[1])
        expected[mine] = [value for _, value in episode.rewards]
        expected[mine[-1]] += 5
        np.testing.assert_allclose(grid[i], expected, atol=1e-5)
    assert event["reward"] == pytest.approx(event["reward/environment"] + event["reward/score"])
    again = Rollout.of(rollout.arrays())
    assert np.array_equal(np.array(again.rewards), grid)
    assert [list(own) for own in again.own] == [list(own) for own in rollout.own]
    assert again.lengths(o.prompts).tolist() == rollout.lengths(o.prompts).tolist()


# The protocol.

ROWS = [{"prompt": "w0 w1", "answer": "x"}]


def settings_of(path: Path | str, **given: Any) -> EnvironmentSettings:
    return EnvironmentSettings.model_validate({"path": str(path), **given})


def outcome(play: Play, body: str, steps: int = 1, **changes: Any) -> dict[str, Any]:
    """The last rollout's event of a short run."""
    settings = play("rloo", body, {"kl_coef": 0.0}, **{"run.steps": steps, **changes})
    return quietly(settings).metrics("rollout")[-1]


SAYS = "\n    def reset(self, row, seed):\n        pass\n\n    def step(self, turn):\n        "


@pytest.mark.parametrize(
    ("body", "words_of"),
    [
        (f"{SAYS}return 'w1'", r"env.py:Env: prompts.jsonl:\d+: step 1: it returned 'w1'; expected an mlxft.Obs"),
        (f"{SAYS}return Observation('w1', reward=float('nan'))", r"step 1: its reward is nan; expected a finite"),
        (f"{SAYS}return Observation()", r"step 1: it returned no messages and no end"),
        (f"{SAYS}return Observation(3)", r"step 1: its messages are 3; expected a text or a list of messages"),
        (f"{SAYS}return Observation([{{'role': 'asistant', 'content': 'a'}}])", r"messages\[0\].role is 'asistant'"),
        (f"{SAYS}return Observation([{{'role': 'system', 'content': 'a'}}])", r"role system; expected tool or user"),
        (f"{SAYS}return Observation(end=True)", r"step 1: the episode ended without any reward"),
        (f"{SAYS}return Observation('w1 \\ud800')", r"step 1: messages\[0\].content contains half of a character"),
        (f"{SAYS}pass".replace("pass", "raise KeyError('no')", 1), r"reset raised KeyError: 'no' \(line 8\)"),
        (f"{SAYS}pass".replace("pass", "return 'w1 ' * 40", 1), "the first observation leaves no room for a turn"),
    ],
)
def test_replies_that_cannot_be_used(play: Play, body: str, words_of: str) -> None:
    with pytest.raises((EpisodeError, DataError), match=words_of):
        outcome(play, body)


def test_an_end_needs_no_reward_where_rewards_are_given(play: Play) -> None:
    event = outcome(play, f"{SAYS}return Observation(end=True)", rewards=FIVE)
    assert event["reward"] == 5
    assert event["reward/environment"] == 0


@pytest.mark.parametrize(
    ("limits", "turns", "name"),
    [({"environment.turns": 3}, 3, "turns"), ({"environment.tokens": 7}, 3, "tokens"), ({}, 8, "turns")],
)
def test_limits_end_an_episode(play: Play, limits: dict[str, Any], turns: int, name: str) -> None:
    """Two tokens a turn and one of the environment: seven tokens are three turns, the last of one token."""
    body = f"{SAYS}return Observation('w1', reward=1)"
    event = outcome(play, body, **limits)
    assert (event["turns"], event[f"limit_{name}"], event["reward"]) == (turns, 1, turns)
    assert event["response_tokens"] == min(2 * turns, 7 - 2 if name == "tokens" else 99)
    assert event["eos_share"] == 0
    assert "no episode was ended by the environment" in event["warning"]


# Panics of Rust code are no Exception either.
PANIC = """
    class Panic(BaseException):
        pass
    globals()["Panic"] = Panic
"""


@pytest.mark.parametrize(("on_error", "turns"), [("observe", 2), ("end", 1)])
def test_steps_that_raise(play: Play, on_error: str, turns: int) -> None:
    """The model sees the error, or the episode ends with the rewards so far."""
    body = f"{SAYS}raise ValueError('w3')"
    changes = {"environment.on_error": on_error, "environment.turns": 2, "data.max_length": 48}
    for error in ("ValueError('w3')", "SystemExit(3)", "KeyboardInterrupt", "Panic('\\ud800')"):
        event = outcome(play, PANIC + body.replace("ValueError('w3')", error), **changes, **{"run.name": error[:6]})
        assert (event["turns"], event["tool_errors"], event["reward"]) == (turns, turns, 0)
        assert "every step of the environment raised an error" in event["warning"]


ASYNC = """
    def reset(self, row, seed):
        self.late = seed % 4 == 0

    async def step(self, turn):
        await asyncio.sleep(600 if self.late else 0.2)
        return Observation(reward=1.0, end=True)
"""
SYNC = ASYNC.replace("async def", "def").replace("await asyncio.sleep(600", "time.sleep(3").replace("0.2)", "0)")


@pytest.mark.parametrize("body", [ASYNC, SYNC])
def test_hanging_calls_end_their_episodes(play: Play, body: str) -> None:
    """Coroutines wait side by side; code that hangs is left behind in its thread, and the others are not lost."""
    began = time.monotonic()
    event = outcome(play, body, **{"environment.seconds": 0.6})
    share = event["limit_seconds"]
    assert 0 < share < 0.5
    assert event["reward"] == 1 - share
    assert time.monotonic() - began < 120


def test_hanging_too_often_is_refused(play: Play) -> None:
    body = f"{SAYS}time.sleep(1)"
    with pytest.raises(EpisodeError, match=r"8 calls took longer than environment.seconds \(0.05\) and cannot be stop"):
        outcome(play, body, **{"environment.seconds": 0.05})


def test_an_environment_is_found_as_an_objective_is(
    words: Words, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a file, a module, a name; as plain text or with settings; and from a run folder only where it is named."""
    settings = play("rloo", TALK, {"kl_coef": 0.0}, **{"run.steps": 1, "data.max_length": 40})
    path = settings["environment"]["path"]
    settings["environment"] = path
    run = quietly(settings)
    assert run.config.environment.path == path  # type: ignore[attr-defined]
    assert override("environment.path", path) in run.resume.replace("'", "")
    with pytest.raises(ConfigError, match=r"environment.path: the run folder names Python code"):
        load_config(run.dir / "config.yaml", of_run=True)
    for key in ("environment.path", "environment"):
        load_config(run.dir / "config.yaml", [override(key, path)], of_run=True)
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    config = load_config(tmp_path / "recipe.yaml", ["environment.turns=3"])
    assert (config.environment.path, config.environment.turns) == (path, 3)  # type: ignore[attr-defined]
    monkeypatch.syspath_prepend(tmp_path)
    for spec, problem in (
        ("env:Env", None),
        ("env:Nothing", "no class 'Nothing' in it"),
        ("calculater", "no such environment 'calculater'; expected file.py:Class"),
    ):
        if problem is None:
            quietly({**settings, "environment": spec, "run": {**settings["run"], "name": "b"}})
        else:
            with pytest.raises(ConfigError, match=problem):
                quietly({**settings, "environment": spec, "run": {**settings["run"], "name": "c"}})
    quietly({**settings, "run": {**settings["run"], "name": "handed"}}, environment=Says)
    settings["run"]["name"] = "d"
    with pytest.raises(ConfigError, match=r"environment: turns: there is no environment"):
        quietly({**settings, "environment": {"turns": 3}})
    with pytest.raises(ConfigError, match=r"cannot be made with environment.options: TypeError"):
        quietly({**settings, "environment": {"path": path, "options": {"x": 1}}})
    (tmp_path / "half.py").write_text("class Half:\n    def reset(self, row, seed): ...\n")
    with pytest.raises(ConfigError, match=r"Half has no step"):
        quietly({**settings, "environment": f"{tmp_path}/half.py:Half"})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("def rows(self, valid): return 5", r"data.train: environment .*: rows cannot be read: TypeError: 'int'"),
        (
            "def rows(self, valid): raise RuntimeError('no net')",
            r"rows cannot be read: RuntimeError: no net \(line 6\)",
        ),
        ("tools = ['search']", r"tools\[0\] is 'search'; expected a JSON schema"),
        ("tools = [{'type': 'function', 'function': {}}]", r"tools\[0\] is .*; expected a JSON schema"),
        ("def __init__(self): raise SystemExit(0)", r"cannot be made with environment.options: SystemExit: 0"),
    ],
)
def test_classes_that_cannot_be_used(play: Play, body: str, problem: str) -> None:
    settings = play("rloo", f"    {body}\n{SAYS}pass", {"kl_coef": 0.0}, **{"data.train": "environment"})
    with pytest.raises(ConfigError, match=problem):
        quietly(settings)


# Chat templates and tools: the model's part is played by texts.


class Says:
    """An environment that replies "2", and ends after three turns."""

    def reset(self, row: dict[str, Any], seed: int) -> str | None:
        self.turns: list[mlxft.Turn] = []
        return row.get("first")

    def step(self, turn: mlxft.Turn) -> mlxft.Observation:
        self.turns.append(turn)
        return mlxft.Observation("2", reward=1, end=len(self.turns) == 3)


SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "calculate", "description": "d", "parameters": SCHEMA}}


class Tooled(Says):
    tools = (TOOL,)


CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "1+1"}}\n</tool_call>'
MISTRAL = '[TOOL_CALLS] [{"name": "calculate", "arguments": {"expression": "1+1"}, "id": "call00000"}]'


def tokenizer_of(family: str) -> Any:
    from families import make_family
    from mlx_lm.tool_parsers import json_tools

    found = make_family(family)
    if family.startswith("qwen"):  # these templates write calls in a way of their own that mlx-lm does not look for
        found._tool_parser = json_tools.parse_tool_call
        found._tool_call_start, found._tool_call_end = json_tools.tool_call_start, json_tools.tool_call_end
    return found


def spoken(
    kind: type[Says], family: str, texts: list[str], monkeypatch: pytest.MonkeyPatch, finish: str = "eos", **how: Any
) -> tuple[Any, Any]:
    """An episode in which the model says these texts, one a turn; and its tokenizer."""
    from mlxft.config import hand_over
    from mlxft.data.dataset import encode_prompt
    from mlxft.model.sampling import Sampled, Sampling
    from mlxft.objectives import episodes as module

    tokenizer = tokenizer_of(family)
    first = how.pop("first", None)
    e = Episodes(settings_of(hand_over("environment.path", kind.__name__, kind), **how), tokenizer, True, True)
    asked = [{"role": "user", "content": "Hi"}]
    ids = encode_prompt(asked, tokenizer, tools=e.tools_of({}), where="p:1")
    prompt = EncodedPrompt(np.array(ids, np.int32), "Hi", {"first": first}, "p:1", asked)
    e.check(prompt)

    def talk(model: Any, tokenizer: Any, starts: Any, sampling: Any, reply: Callable[..., Any], **_: Any) -> None:
        for text in texts:
            said = tokenizer.encode(text, add_special_tokens=False)
            said = [*said, tokenizer.eos_token_id] if finish == "eos" else said
            starts = reply([(0, Sampled(said, finish))])
            if starts[0] is None:
                break

    monkeypatch.setattr(module, "sample_turns", talk)
    (found,) = e.play(None, [prompt], Sampling(500), most=5000, seed=0)  # type: ignore[arg-type]
    return found, tokenizer


def whole_text(episode: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode([*episode.prompt.ids[: episode.begin].tolist(), *episode.ids]))


@pytest.mark.parametrize(
    ("kind", "family", "text"),
    [
        (Says, "llama-3.0", "Yes"),
        (Says, "qwen-2.5", "Yes"),
        (Says, "qwen-3", "Yes"),
        (Says, "gemma-3", "Yes"),
        (Says, "smollm-2", "Yes"),
        (Says, "deepseek-v3", "Yes"),
        (Tooled, "qwen-2.5", CALL),
        (Tooled, "qwen-3", CALL),
        (Tooled, "qwen-3-thinking", f"So.\n</think>\n\n{CALL}"),
        (Tooled, "mistral-0.3", MISTRAL),
    ],
)
def test_what_is_between_turns_is_what_the_template_writes(
    kind: type[Says], family: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole context, turns as sampled, is the template's text of the conversation."""
    episode, tokenizer = spoken(kind, family, [text] * 3, monkeypatch)
    assert (episode.turns, episode.ended, episode.unparsed) == (3, "end", 0)
    seen = whole_text(episode, tokenizer)
    tools = {"tools": [TOOL]} if kind is Tooled else {}
    written = episode.messages[:-1]
    expected = tokenizer.apply_chat_template(written, tokenize=False, **tools)
    if family in ("qwen-2.5", "llama-3.0", "smollm-2", "mistral-0.3", "qwen-3-thinking"):
        both = ["".join(text.split()) for text in (expected, seen)]  # a template may write a space before a turn
        assert both[0].startswith(both[1])
    mine = [
        tokenizer.decode(part) for part in np.split(np.array(episode.ids), np.flatnonzero(np.diff(episode.own)) + 1)
    ]
    ended = text + tokenizer.eos_token
    assert mine[::2] == [ended] * 3, "as sampled, with what ended them"
    assert len(set(mine[1::2])) == 1
    assert "2" in mine[1]
    assert family == "mistral-0.3" or mine[1].endswith(tokenizer.decode(episode.prompt.ids[-1:]))
    assert len(episode.messages) == 7
    assert [m["role"] for m in episode.messages[2::2]] == ["tool" if kind is Tooled else "user"] * 3


@pytest.mark.parametrize(
    ("kind", "family", "problem"),
    [
        (Says, "qwen-3-thinking", r"p:1: environment python:Says: this chat template rewrites earlier turns"),
        (Says, "gpt-oss", r"rewrites earlier turns where a message of role user follows"),
        (Tooled, "smollm-2", r"mlx-lm has no parser for the tool calls of this chat template"),
    ],
)
def test_templates_that_cannot_write_an_episode(
    kind: type[Says], family: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((DataError, ConfigError), match=problem):
        spoken(kind, family, ["Yes"], monkeypatch)


def test_thoughts_that_the_template_drops_later_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen 3 drops thoughts where a user's message follows; a turn that is cut off in them only ends there."""
    with pytest.raises(DataError, match=r"rewrites earlier turns where a message of role user follows"):
        spoken(Says, "qwen-3", ["<think>\nSo.\n</think>\n\nYes"], monkeypatch)
    episode, tokenizer = spoken(Says, "qwen-3", ["<think>\nSo", "Yes"], monkeypatch, "length")
    assert "<think>\nSo<|im_end|>\n<|im_start|>user\n2<|im_end|>\n" in whole_text(episode, tokenizer)


def test_tool_calls_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By mlx-lm's parser; what cannot be parsed is shown to the model, or ends the episode."""
    twice = CALL + CALL.replace("1+1", "2*3")
    seen: list[mlxft.Turn] = []

    class Keeps(Tooled):
        def step(self, turn: mlxft.Turn) -> mlxft.Observation:
            seen.append(turn)
            return super().step(turn)

    half = CALL.replace("1+1", "\\ud83d")  # of an emoji
    texts = [f"Now.\n{twice}", "<tool_call>{broken</tool_call>", '<tool_call>["a"]</tool_call>', half, CALL, "four"]
    episode, tokenizer = spoken(Keeps, "qwen-2.5", texts, monkeypatch)
    assert [turn.calls for turn in seen] == [
        tuple(mlxft.ToolCall("calculate", {"expression": text}) for text in ("1+1", "2*3")),
        (mlxft.ToolCall("calculate", {"expression": "1+1"}),),
        (),
    ]
    assert seen[0].text.startswith("Now.")
    assert (episode.turns, episode.unparsed, episode.ended) == (6, 3, "end")
    assert episode.turn_rewards.nonzero()[0].size == 3
    assert "Error: ValueError: the tool call cannot be parsed" in whole_text(episode, tokenizer)
    episode, _ = spoken(Keeps, "qwen-2.5", texts, monkeypatch, on_error="end")
    assert (episode.turns, episode.unparsed, episode.ended) == (2, 1, "error")


def test_a_first_observation_stands_before_the_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    episode, tokenizer = spoken(Says, "smollm-2", ["Yes"] * 3, monkeypatch, first="3")
    text = whole_text(episode, tokenizer)
    assert text.startswith(tokenizer.decode(episode.prompt.ids[: episode.begin].tolist()))
    assert "Hi<|im_end|>\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n" in text
    assert sum(episode.own) == 3 * len(tokenizer.encode("Yes<|im_end|>"))


# What mlxft brings.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1+2)*3", "9"),
        ("-2^2", "-4"),
        ("2 ** 3 ** 2", "512"),
        ("2^-2", "0.25"),
        ("7 % 4 - .5", "2.5"),
        ("1/3", "0.3333333333"),
        ("--3", "3"),
    ],
)
def test_calculate(text: str, value: str) -> None:
    from mlxft.objectives.environments import Calculator

    assert Calculator().run(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "1 +", "(1", "1)", "1 2", "a", "__import__('os')", "1/0", "5 % 0", "0^-1", "9^9^9^9", "2^0.5", "1.2.3"),
        *("1" * 201, "(" * 60 + "1" + ")" * 60, "2^900 * 2^900", "1" * 190 + "^9", "-" * 100 + "1"),
    ],
)
def test_calculate_refuses(text: str) -> None:
    from mlxft.objectives.environments import calculate

    with pytest.raises(ValueError, match=r"."):
        calculate(text)


def test_the_calculator_rewards_the_number() -> None:
    from mlxft.objectives.environments import Calculator, calculate

    env = Calculator(count=20)
    rows = env.rows(False)
    assert len(rows) == 20
    assert rows == Calculator(count=20).rows(False) != env.rows(True)
    row = rows[0]
    expression = row["prompt"].removeprefix("What is ").partition("?")[0]
    assert str(calculate(expression)) == row["answer"]
    env.reset(row, 0)
    calls = (
        mlxft.ToolCall("calculate", {"expression": expression}),
        mlxft.ToolCall("eval", {}),
        mlxft.ToolCall("calculate", {}),
    )
    seen = env.step(mlxft.Turn("", "", calls))
    assert not seen.end
    assert [m["content"][:24] for m in seen.messages] == [
        row["answer"],
        "Error: there is no tool ",
        "Error: calculate needs e",
    ]
    assert env.step(mlxft.Turn("", f"It is {row['answer']}.")) == mlxft.Observation(reward=1.0, end=True)
    assert env.step(mlxft.Turn("", "none")).reward == 0


def test_search_finds_the_rows_that_fit(tmp_path: Path) -> None:
    from mlxft.objectives.environments import Search

    texts = ["The whale lives in the sea.", "A horse eats hay.", "Whales are mammals of the sea; the whale sings."]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    env = Search(str(path), most=2)
    env.reset({"answer": "the sea"}, 0)
    found = env.step(mlxft.Turn("", "", (mlxft.ToolCall("search", {"query": "whale sea"}),)))
    assert found.messages[0]["content"].split("\n\n") == [texts[0], texts[2]]  # type: ignore[index]
    assert env.run("zebra") == "Nothing was found."
    assert [env.step(mlxft.Turn("", text)).reward for text in ("In The Sea!", "In the seaside")] == [1, 0]
    with pytest.raises(ConfigError, match="no rows with a text in 'body'"):
        Search(str(path), field="body")


def test_the_word_game() -> None:
    from mlxft.objectives.environments import Words as Game

    env = Game(lives=2)
    assert {row["word"] for row in env.rows(True)}.isdisjoint(row["word"] for row in env.rows(False))
    assert env.rows(False)[1]["prompt"].endswith(": _ _ _ _ _")
    env.reset({"word": "apple"}, 0)
    turns = [env.step(mlxft.Turn("", text)) for text in ("P, I think.", "zz", "p")]
    assert turns == [
        mlxft.Observation("_ p p _ _ 2 wrong guesses are left.", 0.4),
        mlxft.Observation("_ p p _ _ Wrong so far: z. 1 wrong guesses are left.", 0),
        mlxft.Observation("The word was apple.", 0, end=True),
    ]
    env.reset({"word": "apple"}, 0)
    assert env.step(mlxft.Turn("", "e")).reward == 0.2
    assert (
        env.step(mlxft.Turn("", "... 12 ...")).messages == "_ _ _ _ e Wrong so far: nothing. 1 wrong guesses are left."
    )
    assert env.step(mlxft.Turn("", "Is it Apple?")) == mlxft.Observation("Right!", 0.8, end=True)


# The package verifiers: its protocol, as mlxft uses it, in a stand-in; and the package itself where it is installed.


class Fields(dict[str, Any]):
    """Stands for verifiers' pydantic models."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def model_dump(self, exclude_none: bool = False) -> dict[str, Any]:
        return {k: v for k, v in self.items() if v is not None or not exclude_none}


class FakeRubric:
    has_group_rewards = False

    async def score_rollout(self, state: dict[str, Any]) -> None:
        said = [m for m in state["messages"] if m["role"] == "assistant"]
        state["reward"] = float(state["answer"] in said[-1]["content"]) + 0.1 * len(said)


class FakeEnvironment:
    """Two turns, of which the second is asked for by a user; or one that fails."""

    eval_dataset = None
    rubric: Any = FakeRubric()
    tool_defs: Any = None

    def __init__(self, **options: Any) -> None:
        self.options = options

    def get_dataset(self) -> Any:
        rows = [{"prompt": [{"role": "user", "content": f"w{i}"}], "answer": "w1", "info": None} for i in range(4)]
        return type("Dataset", (), {"to_list": lambda self: rows})()

    async def rollout(self, given: Any, client: Any, model: str, sampling_args: Any) -> dict[str, Any]:
        state: dict[str, Any] = {"answer": given["answer"], "error": None, "messages": list(given["prompt"])}
        for turn in range(2):
            messages = [Fields(**m) for m in state["messages"]]
            response = await client.get_response(prompt=messages, model=model, tools=None, state=state)
            said = response.message
            assert said.is_truncated is (said.finish_reason == "length")
            state["messages"].append({"role": "assistant", "content": said.content})
            if self.options.get("fails"):
                state["error"] = RuntimeError("no")
                break
            if turn == 0:
                state["messages"].append({"role": "user", "content": "w2 w3"})
        return state


@pytest.fixture
def verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    import abc
    import sys
    import types

    class Client(abc.ABC):
        def __init__(self, config: Any) -> None:
            self.config = config

        @abc.abstractmethod
        def setup_client(self, config: Any) -> Any: ...

    fake, clients, kinds = (types.ModuleType(f"verifiers{name}") for name in ("", ".clients", ".types"))
    loaded = {"two": FakeEnvironment}
    fake.load_environment = lambda name, **options: loaded[name](**options)  # type: ignore[attr-defined]
    clients.Client = Client  # type: ignore[attr-defined]
    kinds.Response = kinds.ResponseMessage = kinds.ToolCall = Fields  # type: ignore[attr-defined]
    for name, module in (("verifiers", fake), ("verifiers.clients", clients), ("verifiers.types", kinds)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("verifiers")
def test_an_environment_of_verifiers(play: Play, tiny_model_dir: Path) -> None:
    """Its rollouts run as they are, with its own rows, and its rubric rewards them."""
    changes = {"run.steps": 2, "data.train": "environment", "data.template": "auto", "data.max_length": 200}
    settings = play("grpo", TALK, {"kl_coef": 0.0}, model=tiny_model_dir, **changes)
    settings["environment"] = "verifiers:two"
    events = quietly(settings).metrics("rollout")
    assert [(e["turns"], e["tool_errors"], e["eos_share"]) for e in events] == [(2, 0, 1)] * 2
    assert all(e["reward"] >= 0.2 for e in events)
    settings["run"]["name"] = "b"
    with pytest.raises(ConfigError, match="verifiers:three: KeyError"):
        quietly({**settings, "environment": "verifiers:three"})
    with pytest.raises(ConfigError, match=r"data.valid: environment verifiers:two has no rows of its own"):
        quietly({**settings, "data": {**settings["data"], "valid": "environment"}})


def verified(options: dict[str, Any], turns: list[mlxft.Turn]) -> list[Any]:
    """What an environment of verifiers gives at reset and after each turn."""
    import asyncio

    from mlxft.objectives.environments import from_verifiers

    async def run() -> list[Any]:
        env = from_verifiers("two", options)()
        return [await env.reset(env.rows(False)[1], 0), *[await env.step(turn) for turn in turns]]

    return asyncio.run(run())


@pytest.mark.usefixtures("verifiers")
def test_a_rollout_of_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [mlxft.Turn("w5", "w5", finished=False), mlxft.Turn("w1", "w1")]
    first, second, last = verified({}, turns)
    assert first is None
    assert second == mlxft.Observation([{"role": "user", "content": "w2 w3"}])
    assert last == mlxft.Observation([], 1.2, end=True)
    with pytest.raises(RuntimeError, match="no"):
        verified({"fails": True}, turns[:1])
    monkeypatch.setattr(FakeRubric, "has_group_rewards", True)
    with pytest.raises(ConfigError, match="it rewards groups of rollouts"):
        verified({}, turns)


REAL = """
import verifiers as vf
from datasets import Dataset

def number(letter: str) -> str:
    \"\"\"Return the number of a letter.

    Args:
        letter: One letter.
    \"\"\"
    return str(ord(letter) - 96)

def load_environment(kind):
    data = Dataset.from_list([{"question": f"letter {c}", "answer": str(i + 1)} for i, c in enumerate("abcd")])
    written = lambda completion, **_: float(len(str(completion[-1].content)))
    rubric = vf.Rubric(funcs=[written])
    if kind == "single":
        return vf.SingleTurnEnv(dataset=data, rubric=rubric)
    if kind == "tool":
        return vf.ToolEnv(dataset=data, tools=[number], rubric=rubric, max_turns=3)

    class Two(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **_):
            return [{"role": "user", "content": "Sure?"}]

    return Two(dataset=data, rubric=rubric, max_turns=2)
"""
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    '<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}</tool_call>'
    "{% endfor %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize(("kind", "turns"), [("single", 1), ("multi", 2), ("tool", 1)])
def test_the_package_verifiers(
    play: Play, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, turns: int
) -> None:
    """Ten steps of GRPO in environments of its own classes."""
    if not hasattr(pytest.importorskip("verifiers"), "load_environment"):
        pytest.skip("another protocol")
    (tmp_path / "letters.py").write_text(REAL)
    (tmp_path / "tools.jinja").write_text(TOOLS)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"run.steps": 10, "data.train": "environment", "data.template": "auto", "data.max_length": 400}
    changes |= {"model.chat_template": str(tmp_path / "tools.jinja")}
    settings = play("grpo", TALK, {}, model=tiny_model_dir, **changes)
    settings["environment"] = {"path": "verifiers:letters", "options": {"kind": kind}}
    events = quietly(settings).metrics("rollout")
    assert len(events) == 10
    assert all((e["turns"], e["eos_share"]) == (turns, 1) and e["reward"] > 0 for e in events)


def test_without_verifiers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from mlxft.objectives.environments import from_verifiers

    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ConfigError, match=r"needs the package verifiers: pip install 'mlxft\[verifiers\]'"):
        from_verifiers("two", {})
    monkeypatch.setitem(sys.modules, "verifiers", types.ModuleType("verifiers"))
    with pytest.raises(ConfigError, match=r"has another protocol than 0.1.14 to 0.3"):
        from_verifiers("two", {})


# Around training: validation, the memory plan, the schema, and the commands.


def test_validation_plays_episodes(play: Play, tmp_path: Path) -> None:
    """Held-out prompts are played too; samples.jsonl has whole conversations."""
    (tmp_path / "valid.jsonl").write_text('{"prompt": "w3 w4"}\n{"prompt": "w5"}\n')
    changes = {"run.steps": 2, "run.eval_every": 1, "data.max_length": 40, "data.valid": str(tmp_path / "valid.jsonl")}
    run = quietly(play("rloo", TALK, {}, **changes))
    for event in run.metrics("eval"):
        assert event["reward"] == pytest.approx(event["reward/environment"])
        assert event["loss"] == pytest.approx(0.05 * event["kl"] - event["reward"])
        assert 1 <= event["turns"] <= 3
    lines = [json.loads(line) for line in (run.dir / "samples.jsonl").read_text().splitlines()]
    assert len(lines) >= 4
    for line in lines:
        roles = [m["role"] for m in line["messages"]]
        assert roles[0] == "user"
        assert roles.count("assistant") >= 1


@pytest.mark.invariant
@pytest.mark.parametrize("tokens", [None, 12])
def test_the_plan_has_the_longest_episode(play: Play, tokens: int | None) -> None:
    """What data.max_length or environment.tokens leaves; the policy's are at most turns x max_tokens of it."""
    changes: dict[str, Any] = {"data.max_length": 40, "environment.turns": 4, "batch.rows": 4}
    changes |= {} if tokens is None else {"environment.tokens": tokens}
    objective, model = made(play("grpo", TALK, {}, **changes))
    prompts = [len(p.ids) for p in objective.prompts]
    widths = {shape.width for shape in objective.shapes()}
    assert max(widths) == (40 if tokens is None else max(prompts) + tokens)
    assert {shape.trained for shape in objective.shapes()} == {4 * min(4 * 2, tokens or 99)}
    rolling = objective._rolling()
    assert rolling.prompt + rolling.completion == max(widths)
    for make in objective.largest(model):
        for batch in make().micro_batches:
            assert batch.data.ids.shape[1] in widths
            assert batch.trained_tokens == 4 * 2 * len(batch.data.ids)
    rollout, _ = objective.roll(model)
    assert rollout.lengths(objective.prompts).max() <= max(widths)


def test_the_schema_takes_a_text_or_a_section() -> None:
    from jsonschema import Draft202012Validator

    from mlxft.config import recipe_schema

    check = Draft202012Validator(recipe_schema())
    recipe = {"objective": "grpo", "model": {"path": "x"}, "data": {"train": "x", "format": "prompts"}}
    for value in ("calculator", {"path": "words", "turns": 3, "options": {"lives": 2}}, None):
        assert check.is_valid({**recipe, "environment": value}), value
    for value in (3, {"turnz": 3}, {"turns": 0}):
        assert not check.is_valid({**recipe, "environment": value}), value
    assert not check.is_valid({**recipe, "objective": "sft", "environment": "words"})


def cli(*args: object) -> Any:
    from click.testing import CliRunner

    from mlxft.cli import cli as main

    return CliRunner().invoke(main, [*map(str, args)])


def test_sample_writes_conversations(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rows of data.format: messages, with the score of the environment; episodes that a limit ended only if asked."""
    from mlxft.data.formats import convert
    from mlxft.data.sources import read_rows

    out = tmp_path / "out.jsonl"
    given = ("--model", tiny_model_dir, "--out", out, "--max-tokens", 4, "--n", 2, "--seed", 1, "--keep", "all")
    asked = ("sample", "environment", "--environment", "{path: words, turns: 9, options: {lives: 2}}")
    done = cli(*asked, *given, "--json")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kept"] == len(rows) == 2 * said["prompts"] == said["answers"]
    assert {tuple(m["role"] for m in row["messages"]) for row in rows} <= {
        ("user", "assistant") * n for n in range(1, 8)
    }
    assert all(0 <= row["score"] <= 1 for row in rows)
    assert len(list(convert(read_rows(str(out), "train"), "messages"))) == len(rows)
    late = cli("sample", "environment", "--environment", "{path: words, turns: 1}", *given, "--overwrite")
    assert "ended by a limit or an error: raise the limits of --environment" in str(late.exception)
    assert cli("sample", "environment", *given).exit_code == 2
    wrong = cli("sample", "environment", "--environment", "{path: words, turnz: 1}", *given, "--overwrite")
    assert "turnz: no such setting (did you mean turns?)" in str(wrong.exception)


def test_eval_reports_the_reward_of_episodes(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its mean with error and interval, turns and errors; against another model as a paired difference."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "the {i}"}}\n' for i in range(5)))
    (tmp_path / "env.py").write_text(
        "from mlxft import Observation\n\nclass Env:\n    def reset(self, row, seed):\n        self.n = 0\n\n"
        "    def step(self, turn):\n        self.n += 1\n        if self.n == 1:\n            raise ValueError('no')\n"
        "        return Observation(reward=float(seed_of(turn)), end=True)\n\n"
        "def seed_of(turn):\n    return len(turn.text) % 3\n"
    )
    out = tmp_path / "out"
    asked = ("eval", tiny_model_dir, tmp_path / "prompts.jsonl", "--environment", f"{tmp_path}/env.py:Env")
    done = cli(*asked, "--out", out, "--against", tiny_model_dir, "--json", "--limit", 4)
    assert done.exit_code == 0, done.output
    (task,) = json.loads(done.stdout)["tasks"]
    assert (task["kind"], task["rows"], task["figures"]["reward"]["n"]) == ("episodes", 4, 4)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    rewards = [line["scores"]["reward"] for line in lines]
    assert task["figures"]["reward"]["value"] == pytest.approx(np.mean(rewards))
    assert [line["finish"] for line in lines] == ["end"] * 4
    assert all(len(line["messages"]) == 4 and line["turns"] == 2 for line in lines)
    text = " ".join(task["notes"])
    assert "95% interval of the mean reward" in text
    assert "2.00 turns, 1.00 tool errors" in text
    assert task["paired"][0]["tied"] == 4
    assert cli(*asked, "--task", "f1").exit_code == 2
