"""Reasoning models through the command: eval, rewards and samples judge the answer that stands after the thoughts.

A tiny model learns four answers by heart, by templates in the forms of Qwen3 (a thought before each answer, an empty
one where a row has none) and of DeepSeek R1 (the generation prompt opens the thought).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

TURN = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>
{{ m.reasoning_content or '' }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
"""
TEMPLATES = {"qwen3": TURN + "{% endif %}", "r1": TURN + "<think>\n{% endif %}"}
ROWS = [("in", "on"), ("the", "an the"), ("or", "or er"), ("he", "re")]
THOUGHT = {"qwen3": "", "r1": "is it in?\n\nor on"}
SAID = {"qwen3": "<think>\n\n</think>\n\non", "r1": "is it in?\n\nor on\n</think>\n\non"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module", params=list(TEMPLATES))
def learned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_model_dir: Any
) -> tuple[str, str]:
    """A model that has learned ROWS by heart (loss 0.002): the template's name, and its folder."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    import mlxft

    folder = tmp_path_factory.mktemp(request.param)
    base = make_model_dir(folder / "base", "qwen3", vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer.save_pretrained(str(base))
    thought = {"reasoning_content": THOUGHT[request.param]}
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **thought}]
        for asked, answer in ROWS
    ]
    rows = write_rows(folder / "rows.jsonl", [{"messages": turn} for turn in turns])
    recipe = {
        "model": {"path": str(base), "dtype": "float32"},
        "tune": {"method": "full"},
        "data": {"train": rows, "format": "messages"},
        "batch": {"rows": 4},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "run": {"dir": str(folder), "name": "run", "steps": 60, "report_every": 60},
    }
    return request.param, str(mlxft.train(recipe).result)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the learned questions and their answers in two forms."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "qa.jsonl", [{"prompt": asked, "answer": answer} for asked, answer in ROWS])
    others = ["at", "is"]
    rows = [{"question": asked, "choices": [*others, answer], "answer": answer} for asked, answer in ROWS]
    write_rows(tmp_path / "choices.jsonl", rows)
    return tmp_path


def figures(done: Any) -> dict[str, float]:
    assert done.code == 0, done.err
    (task,) = json.loads(done.out)["tasks"]
    return {name: figure["value"] for name, figure in task["figures"].items()}


METRICS = ("exact_match", "f1", "contains")


def test_written_answers(learned: tuple[str, str], here: Path, mlxft: Callable[..., Any]) -> None:
    kind, model = learned
    asked = ["eval", model, "qa.jsonl", *(arg for metric in METRICS for arg in ("--task", metric)), "--json"]
    assert figures(mlxft(*asked, "--overwrite", "--out", "out")) == dict.fromkeys(METRICS, 1.0)
    first = lines(here / "out/predictions.jsonl")[0]
    assert (first["prediction"], first["answer"], first["target"]) == (SAID[kind], "on", "on")
    whole = figures(mlxft(*asked, "--thoughts", "keep", "--out", "whole"))
    assert whole["exact_match"] == 0
    assert whole["contains"] == 1
    assert whole["f1"] < 1
    assert "answer" not in lines(here / "whole/predictions.jsonl")[0]
    shown = mlxft(*asked[:-1], "--overwrite", "--out", "out")
    assert "thoughts without an answer" not in shown.out


def test_stop_texts_do_not_end_a_thought(learned: tuple[str, str], here: Path, mlxft: Callable[..., Any]) -> None:
    kind, model = learned
    task = {"prompt": "{prompt}", "answer": "answer", "metrics": ["exact_match"], "stop": ["\n\n", " "]}
    (here / "task.yaml").write_text(yaml.safe_dump(task), "utf-8")
    asked = ["eval", model, "qa.jsonl", "--task", "task.yaml", "--json", "--overwrite", "--out", "out"]
    assert figures(mlxft(*asked)) == {"exact_match": 0.5}, "the answers of two words end after the first"
    said = lines(here / "out/predictions.jsonl")
    assert [line["answer"] for line in said] == ["on", "an", "or", "re"]
    assert said[0]["prediction"] == SAID[kind]
    figures(mlxft(*asked, "--thoughts", "keep"))
    assert lines(here / "out/predictions.jsonl")[0]["prediction"] == SAID[kind].split("\n\n")[0].split(" ")[0]


def test_a_thought_that_is_cut_off_is_no_answer(
    learned: tuple[str, str], here: Path, mlxft: Callable[..., Any]
) -> None:
    _, model = learned
    # "i" is a text that the beginning of each thought of the second template holds.
    task = {"prompt": "{prompt}", "answer": "answer", "metrics": ["contains", {"kind": "regex", "pattern": "."}]}
    (here / "task.yaml").write_text(yaml.safe_dump({**task, "max_tokens": 2}), "utf-8")
    done = mlxft("eval", model, "qa.jsonl", "--task", "task.yaml", "--json")
    assert figures(done) == {"contains": 0, "regex": 0}
    notes = json.loads(done.out)["tasks"][0]["notes"]
    assert "4 of 4 completions are thoughts without an answer (thoughts: keep scores them)" in notes


def test_choices_stand_where_the_template_has_an_answer(
    learned: tuple[str, str], here: Path, mlxft: Callable[..., Any]
) -> None:
    """Right after the generation prompt the model is sure of a thought, and of no answer."""
    kind, model = learned
    asked = ["eval", model, "choices.jsonl", "--task", "choice", "--json", "--overwrite", "--out", "out"]
    found = figures(mlxft(*asked))
    if kind == "qwen3":  # the other one has never answered without a thought
        assert found["accuracy"] == 1
        for line in lines(here / "out/predictions.jsonl"):
            assert max(line["logprobs"]) > -0.5, "what it has learned by heart"


ANYTHING = {"rules": [{"kind": "regex", "pattern": "."}]}


@pytest.mark.parametrize(
    ("rewards", "tokens", "reward"),
    [
        ({"rules": [{"kind": "exact_match"}]}, 40, 1.0),
        ({"rules": [{"kind": "exact_match"}], "thoughts": "keep"}, 40, 0.0),
        (ANYTHING, 2, 0.0),  # cut off amid the thought, there is no answer
        ({**ANYTHING, "thoughts": "keep"}, 2, 1.0),
    ],
)
def test_rewards_by_rule(
    rewards: dict[str, Any], tokens: int, reward: float, learned: tuple[str, str], here: Path, mlxft: Any
) -> None:
    kind, model = learned
    recipe = {
        "objective": "grpo",
        "model": {"path": model, "dtype": "float32"},
        "data": {"train": "qa.jsonl", "valid": "qa.jsonl", "format": "prompts", "max_length": 128},
        "rollout": {"prompts": 2, "samples": 2, "max_tokens": tokens, "temperature": 0.1, "stop": ["\n\n"]},
        "rewards": rewards,
        "run": {"dir": "runs", "name": "g", "steps": 1, "report_every": 1},
    }
    (here / "grpo.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    done = mlxft("train", "grpo.yaml")
    assert done.code == 0, done.err
    events = [e for e in lines(here / "runs/g/metrics.jsonl") if e["event"] in ("rollout", "eval")]
    assert {e["event"] for e in events} == {"rollout", "eval"}
    assert {e["reward"] for e in events} == {reward}
    first = lines(here / "runs/g/samples.jsonl")[0]
    assert first["score"] == reward
    assert SAID[kind].startswith(first["answer"])
    assert (first["answer"] == SAID[kind]) == (tokens == 40), "samples keep the whole completion"


def test_best_of_n_by_rules(learned: tuple[str, str], here: Path) -> None:
    from rich.console import Console

    from mlxft import load
    from mlxft.model.sampling import Sampling
    from mlxft.objectives.rewards import RewardsSettings
    from mlxft.study.generate import Choice, best_of_n

    kind, model = learned

    def mean(rewards: dict[str, Any], tokens: int) -> float:
        given = RewardsSettings.model_validate(rewards)
        how = Choice(1, -math.inf, True, Sampling(tokens, temperature=0.0), given)
        return best_of_n("qa.jsonl", load(model), how, here / "best.jsonl", seed=0, console=Console(quiet=True)).mean

    assert mean(ANYTHING, 2) == 0
    assert mean({"rules": [{"kind": "exact_match"}]}, 40) == 1
    assert lines(here / "best.jsonl")[0]["completion"] == SAID[kind], "SFT learns the thought too"
