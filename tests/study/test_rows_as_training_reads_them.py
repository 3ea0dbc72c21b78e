"""Rows as they are published, and the system text and tools of a row, in the commands that read rows for themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlxft.data.sources import Row
from mlxft.errors import DataError
from mlxft.model.heads import Scorer
from mlxft.model.load import Loaded
from mlxft.model.sampling import Sampling
from mlxft.objectives.rewards import RewardsSettings
from mlxft.study.generate import Asked, Choice, best_of_n
from mlxft.study.label import read_tasks
from mlxft.study.score import read_row
from mlxft.study.tasks import Task, make_cases

TOOLS = [{"name": "sky"}]
SYSTEM = {"role": "system", "content": "of"}
USER = {"role": "user", "content": "in"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": '{"at":"on"}'}}],
}
ASKED = [USER, CALLED, {"role": "tool", "content": "on"}]
HH = {"chosen": "\n\nHuman: in\n\nAssistant: on", "rejected": "\n\nHuman: in\n\nAssistant: at"}
SHP = {"history": "in", "human_ref_A": "at", "human_ref_B": "on", "labels": 0}
ULTRAFEEDBACK = {
    "instruction": "in",
    "completions": [{"response": "at", "overall_score": 1.0}, {"response": "on", "overall_score": 2.0}],
}
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: dict[str, Any]) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
        return str(file)

    return write


@pytest.fixture
def telling(tiny_model: Loaded) -> Loaded:
    """The tiny model with a template that writes tools and whole calls."""
    tiny_model.tokenizer.chat_template = TEMPLATE
    return tiny_model


def test_published_pairs_and_ratings_are_judged_by_hand(save: Callable[..., str]) -> None:
    rows = [HH, SHP, ULTRAFEEDBACK, {"system": "of", "question": "in", "chosen": "on", "rejected": "at"}]
    found = read_tasks(save(*rows))
    assert [task.prompt for task in found] == [[USER], "in", "in", [SYSTEM, USER]]
    assert [sorted(task.completions or ()) for task in found] == [["at", "on"]] * 4


def test_prompts_to_judge_keep_system_text_tools_and_calls(save: Callable[..., str]) -> None:
    texts, calls = read_tasks(save({"prompt": "in", "system": "of", "functions": TOOLS}, {"prompt": ASKED}))
    assert (texts.prompt, texts.tools) == ([SYSTEM, USER], [{"type": "function", "function": TOOLS[0]}])
    # A prompt is known by what it says: not by how its calls were written.
    mapped = {**CALLED, "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"at": "on"}}}]}
    assert read_tasks(save({"prompt": [USER, mapped, ASKED[2]]}))[0].id == calls.id


def test_published_pairs_are_scored(telling: Loaded) -> None:
    """As the same pair in our own fields is; without a chat as the texts that they are."""

    def read(row: dict[str, Any], chat: bool = True) -> list[list[str]]:
        scorer = Scorer(None, telling.tokenizer, chat, None, None)  # type: ignore[arg-type]
        scored = read_row(scorer, row, "a:1")
        return [[telling.tokenizer.decode([*a.prompt, *a.reply]) for a in one.answers] for one in scored]

    wanted = read({"prompt": "in", "chosen": "on", "rejected": "at"})
    assert read(HH) == wanted
    assert read(SHP) == wanted
    (ranked,) = read(ULTRAFEEDBACK)
    assert [ranked[::-1]] == wanted
    assert read(HH, chat=False) == [[f"{text}<|im_end|>" for text in (HH["chosen"], HH["rejected"])]]
    (system,) = read({"prompt": "in", "completion": "on", "system": "of"})
    assert system[0].startswith("<|im_start|>system\nof<|im_end|>\n<|im_start|>user\nin")
    (told,) = read({"prompt": "in", "chosen": "on", "rejected": "at", "tools": TOOLS})
    assert told[0].startswith("[sky]<|im_start|>user\n")


def test_a_batch_of_prompts_is_asked_with_system_text_and_tools(save: Callable[..., str], telling: Loaded) -> None:
    spec = save({"prompt": "in", "system": "of", "tools": TOOLS}, {"prompt": "in", "tools": json.dumps(TOOLS)})
    first, second = (telling.tokenizer.decode(asked.ids) for asked in Asked(spec, telling).prompts)
    assert first == "[sky]<|im_start|>system\nof<|im_end|>\n<|im_start|>user\nin<|im_end|>\n<|im_start|>assistant\n"
    assert second == "[sky]<|im_start|>user\nin<|im_end|>\n<|im_start|>assistant\n"


def test_chosen_answers_keep_what_they_were_asked_with(
    save: Callable[..., str], telling: Loaded, tmp_path: Path
) -> None:
    (tmp_path / "f.py").write_text("def one(prompts, completions, rows):\n    return [1.0] * len(rows)\n")
    choice = Choice(1, None, True, Sampling(4), RewardsSettings(function=f"{tmp_path}/f.py:one"))
    spec = save({"prompt": ASKED, "system": "of", "tools": TOOLS}, {"prompt": "in"})
    best_of_n(spec, telling, choice, tmp_path / "out.jsonl", seed=1, console=Console(quiet=True))
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert first["tools"] == TOOLS
    assert [turn["role"] for turn in first["prompt"]] == ["system", "user", "assistant", "tool"]
    function = first["prompt"][2]["tool_calls"][0]["function"]
    assert function == {"name": "sky", "arguments": {"at": "on"}}, "as others read it"
    assert (second["prompt"], "tools" in second) == ("in", False)


def cases(task: Task, **row: Any) -> Any:
    (case,) = make_cases([Row("a:1", row)], task)
    return case


def test_what_is_evaluated_is_asked_with_system_text_and_tools() -> None:
    choice = Task(choices=["on", "at"])
    assert cases(choice, question="in", answer="on", system="of").prompt == [SYSTEM, USER]
    asked = cases(Task.model_validate({"metrics": ["exact_match"]}), prompt="in", answer="on", system="of", tools=TOOLS)
    assert (asked.prompt, asked.tools, asked.label) == ([SYSTEM, USER], TOOLS, "on")
    chat = cases(Task(), messages=[USER, {"role": "assistant", "content": "on"}], system="of")
    assert chat.item.messages[0] == SYSTEM
    with pytest.raises(DataError, match="a:1: system is a number; expected a string"):
        cases(choice, question="in", answer="on", system=3)
