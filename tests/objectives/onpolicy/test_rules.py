"""Rules: what each gives for known completions, and what it says of rows and settings that do not fit."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mlxft.errors import ConfigError, DataError
from mlxft.objectives.rewards import Rewards, RewardsSettings, ScoredRule, ToScore, find_json, last_number
from mlxft.objectives.rollouts import RolloutSettings


def item(completion: str, row: dict[str, Any] | None = None, tokens: int = 3, where: str = "p.jsonl:1") -> ToScore:
    ids = np.arange(tokens, dtype=np.int32)
    return ToScore(ids, ids, "a", completion, row or {}, True, where)


def rule(**settings: Any) -> ScoredRule:
    (made,) = RewardsSettings.model_validate({"rules": [settings]}).rules
    return ScoredRule(0, made)


def values(made: ScoredRule, completions: list[str], row: dict[str, Any] | None = None) -> list[float]:
    return made.score([item(text, row) for text in completions])


def test_exact_match() -> None:
    said = [" Paris\n", "paris", "Paris.", ""]
    assert values(rule(kind="exact_match"), said, {"answer": "Paris "}) == [1, 0, 0, 0]
    assert values(rule(kind="exact_match", ignore_case=True), said, {"answer": "PARIS"}) == [1, 1, 0, 0]
    assert values(rule(kind="exact_match", field="city"), said, {"city": "Paris."}) == [0, 0, 1, 0]
    assert values(rule(kind="exact_match"), ["7", "7.0"], {"answer": 7}) == [1, 0]


def test_regex() -> None:
    said = ["so 42.", "42", " 42\n", "four"]
    assert values(rule(kind="regex", pattern=r"\d+"), said) == [1, 1, 1, 0]
    assert values(rule(kind="regex", pattern=r"\d+", full=True), said) == [0, 1, 1, 0]
    assert values(rule(kind="regex", pattern="(?i)FOUR"), said) == [0, 0, 0, 1]


# A rule, and the two answers of which the first is right. The thought before each holds what the other one says.
JUDGED = [
    ({"kind": "exact_match"}, "42", "41"),
    ({"kind": "number"}, "so 42", "so 41"),
    ({"kind": "regex", "pattern": "^4[02468]$"}, "42", "41"),
    ({"kind": "regex", "pattern": "42", "full": True}, "42", "41"),
    ({"kind": "json_schema", "schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', '{"b": 1}'),
]


@pytest.mark.parametrize(("settings", "right", "wrong"), JUDGED)
def test_thoughts_are_not_judged(settings: dict[str, Any], right: str, wrong: str) -> None:
    row = {"answer": "42"}
    said = [f"<think>\n{b}\n</think>\n\n{a}" for a, b in ((right, wrong), (wrong, right))]
    said += [right, "<think>\n\n</think>\n\n" + right, f"{wrong}</think>{right}", f"<think>{right}"]
    assert values(rule(**settings), said, row) == [1, 0, 1, 1, 1, 0]
    assert values(rule(**settings), [right, ""], {"answer": f"<think>{wrong}</think>42"}) == [1, 0]
    opened = [replace(item(text, row), opening="<think>") for text in (f"{wrong}</think>{right}", right)]
    assert rule(**settings).score(opened) == [1, 0], "a thought that never ends leaves no answer"


def test_what_is_judged_can_be_chosen() -> None:
    said = ["<think>41</think>42", "42", "<think>42"]
    rules: list[dict[str, Any]] = [
        {"kind": "regex", "pattern": "^42$"},
        {"kind": "regex", "pattern": "^42$", "thoughts": "keep"},
        {"kind": "regex", "pattern": r"^<think>\d+<\/think>"},  # of the form, as R1's format reward
        {"kind": "regex", "pattern": r"^<think>\d+", "thoughts": "drop"},
        {"kind": "exact_match"},
        {"kind": "number"},
        {"kind": "json_schema"},
    ]

    def scores(thoughts: str) -> list[list[float]]:
        settings = RewardsSettings.model_validate({"rules": rules, "thoughts": thoughts})
        made = [ScoredRule(i, one, settings.thoughts) for i, one in enumerate(settings.rules)]
        return [values(one, said, {"answer": 42}) for one in made]

    assert scores("drop") == [[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert scores("keep") == [[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 1, 0]]
    whole = Rewards(RewardsSettings.model_validate({"rules": rules[4:5], "thoughts": "keep"}), None)
    assert whole.score([item(text, {"answer": 42}) for text in said], tokens=8).total.tolist() == [0, 1, 0]


def test_a_length_is_of_thoughts_too() -> None:
    said = ["<think>41</think>42", "42"]
    assert values(rule(kind="length", max=5, unit="chars"), said) == [0, 1]
    assert "rules[0].thoughts: no such setting" in problems(rules=[{"kind": "length", "max": 5, "thoughts": "drop"}])


def test_functions_are_given_whole_completions(tmp_path: Path) -> None:
    """As in other libraries; mlxft.answer_of is there for those that want the answer."""
    body = (
        "from mlxft import answer_of\n\ndef f(prompts, completions, rows):\n    return [len(c) for c in completions]\n"
    )
    body += "\ndef g(prompts, completions, rows):\n    return [len(answer_of(c)) for c in completions]\n"
    (tmp_path / "r.py").write_text(body)
    for name, sizes in (("f", [19, 2]), ("g", [2, 2])):
        made = Rewards(RewardsSettings(function=f"{tmp_path}/r.py:{name}"), None)
        found = made.score([item("<think>41</think>42"), item("42")], tokens=8)
        assert found.total.tolist() == sizes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("first 3, then 1,234,567.50!", 1234567.5),
        ("$1,200", 1200),
        ("-$5", -5),
        ("€ -5.5", -5.5),
        ("\u22127 degrees", -7),
        ("50%", 50),
        ("10-5", 5),
        ("10 - 5", 5),
        ("f(2)-3", 3),
        ("=-3", -3),
        ("x = .5", 0.5),
        ("1.5e3", 1500),
        ("1,2345", 2345),
        ("12,34", 34),
        ("#### 18", 18),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_number() -> None:
    made = rule(kind="number")
    assert values(made, ["4 + 5 = 9", "9.0", "$9.00", "8", "nine"], {"answer": 9}) == [1, 1, 1, 0, 0]
    assert values(made, ["so 1200"], {"answer": "a + b = 1,200 #### 1,200"}) == [1]
    assert values(made, ["9" * 400], {"answer": 9}) == [0], "too large for a float is no error"
    near = rule(kind="number", tolerance=0.5)
    assert values(near, ["9.5", "9.6"], {"answer": "9"}) == [1, 0]


def test_json_by_itself_and_in_a_fence() -> None:
    fenced = 'Here:\n```json\n{"a": 1}\n```\nDone.'
    assert find_json(fenced) == (True, {"a": 1})
    assert find_json("```\nnot\n```\n```\n[2]\n```") == (True, [2])
    said = ['{"a": 1}', " [1, 2]\n", fenced, "{'a': 1}", "NaN", "", "[" * 100_000]
    assert values(rule(kind="json_schema"), said) == [1, 1, 1, 0, 0, 0, 0]


def test_json_schema_inline_and_from_a_file(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#/$defs/n"}}}
    schema |= {"$defs": {"n": {"type": "integer"}}}
    said = ['{"a": 1}', '{"a": "1"}', "{}", "[1]", '```json\n{"a": 2, "b": 0}\n```']
    (tmp_path / "s.json").write_text(json.dumps(schema), "utf-8")
    for given in (schema, str(tmp_path / "s.json")):
        assert values(rule(kind="json_schema", schema=given), said) == [1, 0, 0, 0, 1]


def test_a_schema_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{", "utf-8")
    (tmp_path / "list.json").write_text("[]", "utf-8")
    for schema, says in (
        ({"type": "objekt"}, r"rewards.rules\[0\].schema: not a JSON Schema: 'objekt' is not valid.*\(at type\)"),
        ("nowhere.json", r"rewards.rules\[0\].schema: cannot read nowhere.json: No such file"),
        (str(tmp_path / "broken.json"), "is not valid JSON"),
        (str(tmp_path / "list.json"), "holds list; expected a JSON Schema"),
        ({"$ref": "http://127.0.0.1:1/s.json"}, r"\$ref to 'http://127.0.0.1:1/s.json', which is not in the schema"),
    ):
        with pytest.raises(ConfigError, match=says):
            rule(kind="json_schema", schema=schema)
    hidden = rule(kind="json_schema", schema={"properties": {"a": {"$ref": "http://127.0.0.1:1/s.json"}}})
    with pytest.raises(ConfigError, match="which is not in the schema"):
        values(hidden, ['{"a": 1}'])


def test_a_schema_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match=r"package jsonschema: pip install 'mlxft\[rewards\]'"):
        rule(kind="json_schema", schema={"type": "object"})
    assert values(rule(kind="json_schema"), ["{}"]) == [1], "without a schema it is not needed"


def test_length() -> None:
    def sized(made: ScoredRule, sizes: list[int]) -> list[float]:
        return made.score([item("x" * size, tokens=size) for size in sizes])

    assert sized(rule(kind="length", min=2, max=4), [1, 2, 4, 5]) == [0, 1, 1, 0]
    assert sized(rule(kind="length", max=4, slack=4), [0, 4, 5, 7, 8, 20]) == [1, 1, 0.75, 0.25, 0, 0]
    assert sized(rule(kind="length", min=4, slack=2), [1, 2, 3, 9]) == [0, 0, 0.5, 1]
    chars = rule(kind="length", max=3, unit="chars")
    assert chars.score([item("abc", tokens=99), item("abcd", tokens=1)]) == [1, 0]


def test_rows_without_what_a_rule_reads() -> None:
    exact, number = rule(kind="exact_match"), rule(kind="number", field="n")
    assert exact.problem({"answer": "a"}) is None
    assert "no field 'answer', which rules/0_exact_match compares with; the row has b, q" in str(
        exact.problem({"q": 1, "b": 2})
    )
    for value in (None, True, ["a"]):
        assert "expected a text or a number" in str(exact.problem({"answer": value}))
    for value in ("none", "9" * 400, float("nan"), 10**400):
        assert "has no number" in str(number.problem({"n": value}))
    assert number.problem({"n": "about 3"}) is None
    with pytest.raises(DataError, match=r"p.jsonl:1: no field 'answer'"):
        values(exact, ["a"], {"b": 1})


def problems(**settings: Any) -> str:
    with pytest.raises(ValidationError) as raised:
        RewardsSettings.model_validate(settings)
    return str(raised.value)


def test_all_that_is_wrong_with_rules_is_said_at_once() -> None:
    said = problems(
        rules=[
            {"kind": "regx"},
            {"pattern": "a"},
            {"kind": "regex"},
            {"kind": "number", "feild": "x", "weight": True},
            {"kind": "length"},
            {"kind": "length", "min": 5, "max": 2},
            {"kind": "regex", "pattern": "("},
            {"kind": "length", "max": 5, "unit": "words"},
            3,
        ]
    )
    for line in (
        "rules[0].kind is 'regx' (did you mean regex?); there are exact_match",
        "rules[1].kind is needed",
        "rules[2].pattern is needed: The expression",
        "rules[3].feild: no such setting (did you mean field?); it has kind, weight, thoughts, field, tolerance",
        "rules[3].weight: true",
        "rules[4]: give min or max, or both",
        "rules[5]: min (5) is above max (2)",
        "rules[6].pattern: '(' is not a regular expression",
        "rules[7].unit: input should be 'tokens' or 'chars'; seen 'words'",
        "rules[8] is 3; expected a mapping with a kind",
    ):
        assert line in said
    assert "expected a list of rules" in problems(rules="regex")


def test_settings_that_have_nothing_to_act_on() -> None:
    assert "normalize: for a reward model's scores; give adapter too" in problems(normalize=True)
    assert "adapter_weight: for a reward model's scores" in problems(adapter_weight=2.0)
    assert "thoughts: for rules that read" in problems(thoughts="keep")
    assert "thoughts: for rules" in problems(thoughts="keep", rules=[{"kind": "length", "max": 5}], function="a.py:f")
    assert "has the weight True" in problems(function={"a.py:f": True})
    assert "has no function" in problems(function={})
    assert "greater than 0" in problems(clip=0)
    assert "greater than or equal to 0" in problems(missing_eos_penalty=-1)


def test_settings_are_the_same_after_they_are_written_and_read() -> None:
    """config.yaml holds every setting, also those that nobody gave."""
    rules = [
        {"kind": "json_schema", "schema": {"type": "object"}, "weight": 2},
        {"kind": "length", "max": 5, "slack": 2},
        {"kind": "regex", "pattern": "a"},
        {"kind": "number"},
        {"kind": "exact_match"},
    ]
    given = RewardsSettings.model_validate({"rules": rules, "function": {"a.py:f": 0.5}, "clip": 3})
    written = json.loads(json.dumps(given.model_dump(mode="json")))
    assert written["rules"][0]["schema"] == {"type": "object"}
    assert RewardsSettings.model_validate(written) == given


def test_rollouts_sample() -> None:
    assert RolloutSettings().bias_note() is None
    note = RolloutSettings(top_p=0.9, top_k=5).bias_note()
    assert note is not None
    assert note.startswith("rollout.top_p, rollout.top_k: ")
    for wrong, says in (({"temperature": 0}, "on-policy training needs sampling"), ({"stop": ["a", ""]}, "empty text")):
        with pytest.raises(ValidationError, match=says):
            RolloutSettings.model_validate(wrong)
