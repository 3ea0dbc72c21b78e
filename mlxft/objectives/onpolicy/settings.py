"""What on-policy objectives share in a recipe: how completions are sampled, and what they are worth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mlxft.config import Settings
from mlxft.data.thoughts import Thoughts, keeps_thoughts
from mlxft.errors import nearest


class Rule(Settings):
    """A reward by rule. Each kind is a class of its own, with its own settings."""

    kind: str
    weight: float = Field(1.0, description="What the rule's value is multiplied by.")


class TextRule(Rule):
    """A rule that judges what a completion says: by default its answer, without the thoughts before it."""

    thoughts: Thoughts | None = Field(
        None,
        description="drop: judge the answer without its thoughts; keep: the whole completion; default: as "
        "rewards.thoughts, and keep for a regex that names the marks of thoughts, as <think>.",
    )

    def keeps_thoughts(self, general: Thoughts) -> bool:
        """Return whether the whole completion is judged, where `rewards.thoughts` is `general`."""
        return keeps_thoughts(self.thoughts, general)


class ExactMatch(TextRule):
    """1 where the completion is the text of a field of the row, else 0; white space around both does not count."""

    kind: Literal["exact_match"] = "exact_match"
    field: str = Field("answer", min_length=1, description="Field of the row that holds the wanted text.")
    ignore_case: bool = Field(False, description="Whether upper and lower case are the same.")


class Regex(TextRule):
    """1 where a regular expression of Python is found in the completion, else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, description="The expression; (?i) in front ignores case.")
    full: bool = Field(False, description="The whole completion must fit, white space around it aside.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as exc:
            raise ValueError(f"{value!r} is no regular expression: {exc}") from None
        return value

    def keeps_thoughts(self, general: Thoughts) -> bool:
        return keeps_thoughts(self.thoughts, general, self.pattern)


class Number(TextRule):
    """1 where the last number of the completion is the number in a field of the row, else 0.

    Commas between thousands, currency signs and percent signs are left out: 1,234.50, $1234.5 and 1234.5% are equal.
    """

    kind: Literal["number"] = "number"
    field: str = Field("answer", min_length=1, description="Field with the wanted number; of a text, its last number.")
    tolerance: float = Field(1e-6, ge=0, description="Largest difference between the two numbers.")


class JsonSchema(TextRule):
    """1 where the completion, or what stands in its ``` fence, is JSON and fits the schema, else 0."""

    # BaseModel has a method `schema`, so the attribute has another name than the setting.
    kind: Literal["json_schema"] = "json_schema"
    schema_: str | dict[str, Any] | None = Field(
        None, alias="schema", description="A JSON Schema or the path of its file; default: any JSON will do."
    )

    @model_serializer(mode="wrap")
    def _by_setting(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"schema" if name == "schema_" else name: value for name, value in handler(self).items()}


class Length(Rule):
    """1 where the completion's length lies in a window; outside it falls linearly, to 0 at a distance of `slack`.

    Thoughts count: it is the length of all that was sampled.
    """

    kind: Literal["length"] = "length"
    min: int | None = Field(None, ge=0, description="Least length; default: none.")
    max: int | None = Field(None, ge=0, description="Greatest length; default: none.")
    unit: Literal["tokens", "chars"] = Field(
        "tokens", description="tokens: as sampled, with the one that ends the completion; chars: of its text."
    )
    slack: int = Field(0, ge=0, description="Distance from the window at which the value is 0; 0: at once.")

    @model_validator(mode="after")
    def _window(self) -> Length:
        if self.min is None and self.max is None:
            raise ValueError("give min or max, or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


AnyRule = ExactMatch | Regex | Number | JsonSchema | Length
KINDS: dict[str, type[AnyRule]] = {
    "exact_match": ExactMatch,
    "regex": Regex,
    "number": Number,
    "json_schema": JsonSchema,
    "length": Length,
}


class RewardsSettings(Settings):
    """The section `rewards`: what a completion is worth, the weighted sum of a reward model, functions and rules."""

    SOURCES: ClassVar[tuple[str, ...]] = ("adapter", "function", "rules")

    adapter: str | None = Field(
        None, description="A reward run (or its adapter or model folder): of the policy's base, or of another one."
    )
    adapter_weight: float = Field(1.0, description="What the reward model's score is multiplied by.")
    normalize: bool = Field(
        False, description="Take the reward run's mean off the scores and divide by its std, both as it stored them."
    )
    function: str | dict[str, float] | None = Field(
        None,
        description="file.py:name, called as name(prompts, completions, rows) -> floats; several: mapped to weights.",
    )
    rules: list[AnyRule] = Field(
        default_factory=list,
        description=f"Mappings with a kind ({', '.join(KINDS)}), that kind's settings, and a weight.",
    )
    thoughts: Thoughts = Field(
        "drop",
        description="What rules judge. drop: the answer without its thoughts (<think>...</think>, and other families' "
        "marks); a thought that never ends leaves no answer. keep: the whole completion. A rule may differ by its own "
        "`thoughts`; length, functions (see mlxft.answer_of) and reward models always read the whole completion.",
    )
    clip: float | None = Field(
        None,
        gt=0,
        description="Bound of the total: after normalising, weighting, adding up and the missing-EOS penalty it is "
        "held between -clip and clip.",
    )
    missing_eos_penalty: float | None = Field(
        None, ge=0, description="Taken off the total where a completion was cut off before EOS or a stop text."
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _read_rules(cls, value: Any) -> Any:
        """Each mapping by its kind, so that an error names the rule and its setting."""
        if not isinstance(value, list):
            raise ValueError(f"expected a list of rules, each a mapping with a kind; seen {value!r:.60}")
        found = [_read_rule(i, rule) for i, rule in enumerate(value)]
        problems = [line for problems in found if isinstance(problems, list) for line in problems]
        if problems:
            raise ValueError("; ".join(problems))
        return found

    @field_validator("function", mode="before")
    @classmethod
    def _some_function(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value:
            raise ValueError("names no function; give file.py:name, or leave it out")
        wrong = [k for k, weight in value.items() if isinstance(weight, bool)] if isinstance(value, dict) else []
        if wrong:
            raise ValueError(f"{wrong[0]} has the weight {value[wrong[0]]}; expected a number")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RewardsSettings:
        # By value: config.yaml holds every setting, also those that nobody gave.
        idle = [k for k, off in (("adapter_weight", 1.0), ("normalize", False)) if getattr(self, k) != off]
        if idle and self.adapter is None:
            raise ValueError(f"{' and '.join(idle)}: for a reward model's scores; give adapter too, or leave it out")
        if self.thoughts != "drop" and not any(isinstance(rule, TextRule) for rule in self.rules):
            raise ValueError("thoughts: for rules that judge what a completion says; give such rules, or leave it out")
        return self

    @property
    def given(self) -> bool:
        """Whether there is any reward."""
        return any(getattr(self, name) for name in self.SOURCES)


def _read_rule(index: int, rule: Any) -> AnyRule | list[str]:
    """The rule, or what is wrong with it."""
    at = f"rules[{index}]"
    if isinstance(rule, Rule):
        return rule  # type: ignore[return-value]
    if not isinstance(rule, Mapping):
        return [f"{at} is {rule!r:.60}; expected a mapping with a kind"]
    name = rule.get("kind")
    if not isinstance(name, str) or name not in KINDS:
        seen = f"is {name!r}{nearest(str(name), KINDS)}" if "kind" in rule else "is needed"
        return [f"{at}.kind {seen}; there are {', '.join(KINDS)}"]
    kind = KINDS[name]
    try:
        return kind.model_validate(dict(rule))
    except ValidationError as error:
        return [_problem(at, kind, e) for e in error.errors()]


def _problem(at: str, kind: type[Rule], e: Any) -> str:
    """One problem of a rule in words."""
    there = [field.alias or name for name, field in kind.model_fields.items()]
    # A union's branches stand in the location after the setting's name.
    place = ".".join([at, *(str(part) for part in e["loc"][:1])])
    if e["type"] == "extra_forbidden":
        return f"{place}: no such setting{nearest(str(e['loc'][0]), there)}; it has {', '.join(there)}"
    if e["type"] == "missing":
        return f"{place} is needed: {kind.model_fields[str(e['loc'][0])].description}"
    if e["type"] == "value_error":
        return f"{place}: {e['ctx']['error']}"
    return f"{place}: {e['msg'][0].lower()}{e['msg'][1:]}; seen {e['input']!r:.60}"
