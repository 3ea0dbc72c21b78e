"""Rewards: rules, Python functions and reward models, and their weighted sum."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mlxft.config import Settings, error_of, handed_over, load_config, named_in, run_file
from mlxft.data.chat import Thoughts, answer_of, keeps_thoughts, wanted_of
from mlxft.data.dataset import EncodedCompletion, Ids
from mlxft.data.formats import Message, tools_of
from mlxft.data.sources import report_lines
from mlxft.errors import ConfigError, DataError, RewardError, missing_extra, nearest
from mlxft.model.frozen import FrozenModels, FrozenSource
from mlxft.model.heads import Scorer, find_head, read_head
from mlxft.text import home_path, parse_json, read_small

# --- settings ---------------------------------------------------------------------------------------------------------
# The section `rewards` of a recipe, and the rules that it may have.

Value: TypeAlias = "Callable[[ToScore, str, str | int | float], float]"  # of a completion, its text, the wanted value


class Rule(Settings):
    """A reward by rule. Each kind is a class with its own settings."""

    kind: str
    weight: float = Field(1.0, description="Factor of the rule's value.")

    def scorer(self, at: str) -> Value:
        """Return the function that gives a completion its value.

        Args:
            at: where the rule stands in the recipe, for messages.
        """
        raise AssertionError(f"{type(self).__name__} gives no value")


class TextRule(Rule):
    """A rule that reads a completion's text: by default its answer, without the thoughts before it."""

    thoughts: Thoughts | None = Field(
        None,
        description="drop: read the answer without its thoughts; keep: the whole completion. Default: as "
        "rewards.thoughts, but keep for a regex that names the marks of thoughts, such as <think>.",
    )

    def keeps_thoughts(self, general: Thoughts) -> bool:
        """Return whether the rule reads the whole completion, where `rewards.thoughts` is `general`."""
        return keeps_thoughts(self.thoughts, general)


class ExactMatch(TextRule):
    """1 where the completion equals the text in a field of the row, else 0; surrounding white space is ignored."""

    kind: Literal["exact_match"] = "exact_match"
    field: str = Field("answer", min_length=1, description="Field of the row that holds the wanted text.")
    ignore_case: bool = Field(False, description="Ignore upper and lower case.")

    def scorer(self, at: str) -> Value:
        def fold(text: str) -> str:
            return text.strip().casefold() if self.ignore_case else text.strip()

        return lambda item, text, wanted: float(fold(text) == fold(str(wanted)))


class Regex(TextRule):
    """1 where a Python regular expression is found in the completion, else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, description="The expression; (?i) in front ignores case.")
    full: bool = Field(False, description="Match the whole completion, without surrounding white space.")

    def scorer(self, at: str) -> Value:
        pattern = re.compile(self.pattern)
        if self.full:
            return lambda item, text, wanted: float(pattern.fullmatch(text.strip()) is not None)
        return lambda item, text, wanted: float(pattern.search(text) is not None)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as exc:
            raise ValueError(f"{value!r} is not a regular expression: {exc}") from None
        return value

    def keeps_thoughts(self, general: Thoughts) -> bool:
        return keeps_thoughts(self.thoughts, general, self.pattern)


class Number(TextRule):
    """1 where the last number of the completion equals the number in a field of the row, else 0.

    Commas between thousands, currency signs and percent signs are ignored: 1,234.50, $1234.5 and 1234.5% are equal.
    """

    kind: Literal["number"] = "number"
    field: str = Field("answer", min_length=1, description="Field with the wanted number; the last one of a text.")
    tolerance: float = Field(1e-6, ge=0, description="Largest difference between the two numbers.")

    def scorer(self, at: str) -> Value:
        def value(item: ToScore, text: str, wanted: str | int | float) -> float:
            found, target = last_number(text), _as_number(wanted)
            return float(found is not None and target is not None and abs(found - target) <= self.tolerance)

        return value


class JsonSchema(TextRule):
    """1 where the completion, or the content of its ``` fence, is JSON that fits the schema, else 0."""

    # BaseModel has a method `schema`, so the attribute has another name than the setting.
    kind: Literal["json_schema"] = "json_schema"
    schema_: str | dict[str, Any] | None = Field(
        None, alias="schema", description="A JSON Schema or the path of its file; default: any JSON fits."
    )

    def scorer(self, at: str) -> Value:
        fits = _validator(at, self)

        def value(item: ToScore, text: str, wanted: str | int | float) -> float:
            there, found = find_json(text)
            return float(there and (fits is None or fits(found)))

        return value

    @model_serializer(mode="wrap")
    def _by_setting(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"schema" if name == "schema_" else name: value for name, value in handler(self).items()}


class Length(Rule):
    """1 where the completion's length lies in a window; outside it falls linearly, to 0 at a distance of `slack`.

    The length is that of all that was sampled, thoughts included.
    """

    kind: Literal["length"] = "length"
    min: int | None = Field(None, ge=0, description="Smallest length; default: no bound.")
    max: int | None = Field(None, ge=0, description="Largest length; default: no bound.")
    unit: Literal["tokens", "chars"] = Field(
        "tokens", description="tokens: as sampled, with the one that ends the completion; chars: of the text."
    )
    slack: int = Field(
        0, ge=0, description="Distance from the window at which the value reaches 0; 0: right outside it."
    )

    @model_validator(mode="after")
    def _window(self) -> Length:
        if self.min is None and self.max is None:
            raise ValueError("give min or max, or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self

    def scorer(self, at: str) -> Value:
        def value(item: ToScore, text: str, wanted: str | int | float) -> float:
            size = len(item.reply_ids) if self.unit == "tokens" else len(text)
            below = self.min - size if self.min is not None else 0
            above = size - self.max if self.max is not None else 0
            outside = max(0, below, above)
            return max(0.0, 1 - outside / self.slack) if outside and self.slack else float(outside == 0)

        return value


AnyRule = ExactMatch | Regex | Number | JsonSchema | Length
_KINDS: dict[str, type[AnyRule]] = {
    "exact_match": ExactMatch,
    "regex": Regex,
    "number": Number,
    "json_schema": JsonSchema,
    "length": Length,
}


class RewardsSettings(Settings):
    """The section `rewards`: the reward of a completion, a weighted sum of a reward model, functions and rules."""

    SOURCES: ClassVar[tuple[str, ...]] = ("adapter", "function", "rules")

    adapter: str | None = Field(
        None, description="A reward run (or its adapter or model folder), of the policy's base or another one."
    )
    adapter_weight: float = Field(1.0, description="Factor of the reward model's score.")
    normalize: bool = Field(
        False, description="Subtract the mean from the scores and divide by the std that the reward run stored."
    )
    function: str | dict[str, float] | None = Field(
        None,
        description="file.py:name, called as name(prompts, completions, rows) -> floats; several: mapped to weights.",
    )
    rules: list[AnyRule] = Field(
        default_factory=list,
        description=f"Mappings with a kind ({', '.join(_KINDS)}), that kind's settings, and a weight.",
    )
    thoughts: Thoughts = Field(
        "drop",
        description="What rules read. drop: the answer without its thoughts (<think>...</think>, and other families' "
        "marks); a thought that never ends leaves no answer. keep: the whole completion. A rule may have its own "
        "`thoughts`; length, functions (see mlxft.answer_of) and reward models always read the whole completion.",
    )
    clip: float | None = Field(
        None,
        gt=0,
        description="Bound of the reward: after normalising, weighting, summing and the missing-EOS penalty it is "
        "clipped to -clip..clip.",
    )
    missing_eos_penalty: float | None = Field(
        None, ge=0, description="Subtracted from the reward of a completion that was cut off before EOS or a stop text."
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _read_rules(cls, value: Any) -> Any:
        """Validate each mapping by its kind, so that an error names the rule and its setting."""
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
            raise ValueError("has no function; give file.py:name, or leave it out")
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
            raise ValueError("thoughts: for rules that read a completion's text; give such rules, or leave it out")
        return self

    @property
    def given(self) -> bool:
        """Return whether there is any reward."""
        return any(getattr(self, name) for name in self.SOURCES)


def _read_rule(index: int, rule: Any) -> AnyRule | list[str]:
    """Return the rule, or what is wrong with it."""
    at = f"rules[{index}]"
    if isinstance(rule, Rule):
        return rule  # type: ignore[return-value]
    if not isinstance(rule, Mapping):
        return [f"{at} is {rule!r:.60}; expected a mapping with a kind"]
    name = rule.get("kind")
    if not isinstance(name, str) or name not in _KINDS:
        seen = f"is {name!r}{nearest(str(name), _KINDS)}" if "kind" in rule else "is needed"
        return [f"{at}.kind {seen}; there are {', '.join(_KINDS)}"]
    kind = _KINDS[name]
    try:
        return kind.model_validate(dict(rule))
    except ValidationError as error:
        return [_problem(at, kind, e) for e in error.errors()]


def _problem(at: str, kind: type[Rule], e: Any) -> str:
    """Return a validation error of a rule as text."""
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


# --- rules ------------------------------------------------------------------------------------------------------------
# Rewards by rule: an exact text, a pattern, a number, JSON, a length.

# A sign counts only where no word or number precedes it: 10-5 has no -5. Thousands have commas, or nothing, between.
_NUMBER = re.compile(
    r"(?:(?P<sign>(?<![\w.)\]%])[-+\u2212])?(?:[$\u20ac\u00a3\u00a5\u20b9]\s?(?P<inner>[-\u2212])?)?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?P<power>[eE][-+]?\d+)?"
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def last_number(text: str) -> float | None:
    """Return the last number of a text, or None; see the rule `number`."""
    every = list(_NUMBER.finditer(text))
    if not every:
        return None
    found = every[-1]
    sign = (found["sign"] or "") + (found["inner"] or "")
    negative = "-" in sign or "\u2212" in sign
    value = float(found["digits"].replace(",", "") + (found["power"] or ""))
    return -value if negative else value


def find_json(text: str) -> tuple[bool, Any]:
    """Return whether a text, or the last of its ``` fences that does, holds JSON, and the value."""
    for part in (text, *reversed(_FENCE.findall(text))):
        try:
            return True, parse_json(part, parse_constant=_no_json)
        except (ValueError, RecursionError):
            continue
    return False, None


def _no_json(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(name)


class ScoredRule:
    """A rule ready to score.

    Args:
        thoughts: what the rule reads, where its own setting is not given.
    Attributes:
        name: by place and kind, such as rules/0_regex.
    Raises:
        ConfigError: a schema cannot be read or is not one.
    """

    def __init__(self, index: int, rule: AnyRule, thoughts: Thoughts = "drop") -> None:
        self.rule = rule
        self.name = f"rules/{index}_{rule.kind}"
        self.weight = rule.weight
        self._whole = not isinstance(rule, TextRule) or rule.keeps_thoughts(thoughts)
        self._value = rule.scorer(f"rewards.rules[{index}]")

    def problem(self, row: dict[str, Any]) -> str | None:
        """Return what is wrong with a row for this rule, or None."""
        if not isinstance(self.rule, ExactMatch | Number):
            return None
        field = self.rule.field
        if field not in row:
            has = ", ".join(sorted(row)) or "none"
            return f"no field {field!r}, which {self.name} compares with; the row has {has}"
        value = row[field]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return f"{field} is {value!r:.40}; expected a text or a number, which {self.name} compares with"
        if isinstance(self.rule, Number):
            wanted = _as_number(self._wanted(row))
            if wanted is None or not math.isfinite(wanted):
                return f"{field} is {value!r:.40}, which has no number; {self.name} compares with one"
        return None

    def score(self, items: Sequence[ToScore]) -> list[float]:
        """Return a value for each completion.

        Raises:
            DataError: a row does not have what the rule reads.
        """
        values = []
        for item in items:
            if problem := self.problem(item.row):
                raise DataError(f"{item.where}: {problem}")
            text = item.completion if self._whole else item.answer
            values.append(self._value(item, text, self._wanted(item.row)))
        return values

    def _wanted(self, row: dict[str, Any]) -> str | int | float:
        """Return the value of the row's field; '' for a rule that compares with none."""
        value: str | int | float = row[self.rule.field] if isinstance(self.rule, ExactMatch | Number) else ""
        return wanted_of(value) if isinstance(value, str) and not self._whole else value


def _as_number(value: str | int | float) -> float | None:
    try:
        return last_number(value) if isinstance(value, str) else float(value)
    except OverflowError:
        return math.inf


def _validator(at: str, rule: JsonSchema) -> Callable[[Any], bool] | None:
    """Return a function that checks a value by the rule's schema; None where any JSON fits."""
    if rule.schema_ is None:
        return None
    schema, origin = _read_schema(at, rule.schema_)
    try:
        from jsonschema import SchemaError, validators
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise ConfigError(f"{at}.schema: {missing_extra('jsonschema', 'rewards')}") from None
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
        # An empty registry: nothing is fetched for a $ref that leads out of the schema.
        validator = kind(schema, registry=Registry())
        list(validator.iter_errors({}))
    except SchemaError as exc:
        place = "/".join(str(part) for part in exc.absolute_path)
        raise ConfigError(f"{origin}: not a JSON Schema: {exc.message}{f' (at {place})' if place else ''}") from None
    except Unresolvable as exc:
        raise _unresolved(origin, exc) from None
    except RecursionError:
        raise ConfigError(f"{origin}: a $ref leads back to itself, or the schema is nested too deep") from None

    def fits(value: Any) -> bool:
        try:
            return bool(validator.is_valid(value))
        except Unresolvable as exc:
            raise _unresolved(origin, exc) from None
        except RecursionError:
            return False

    return fits


def _unresolved(origin: str, error: Any) -> ConfigError:
    return ConfigError(f"{origin}: $ref to {error.ref!r}, which is not in the schema; put it under $defs")


def _read_schema(at: str, given: str | dict[str, Any]) -> tuple[Any, str]:
    """Return a schema, and where it is from."""
    if isinstance(given, dict):
        return given, f"{at}.schema"
    try:
        schema = parse_json(read_small(home_path(given)))
    except OSError as exc:
        raise ConfigError(f"{at}.schema: cannot read {given}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{at}.schema: {given} is not valid JSON: {exc}") from exc
    if not isinstance(schema, dict | bool):
        raise ConfigError(f"{at}.schema: {given} holds {type(schema).__name__}; expected a JSON Schema, a mapping")
    return schema, f"{at}.schema: {given}"


# --- functions --------------------------------------------------------------------------------------------------------
# Rewards by the user's functions: loaded from a file and called on batches; what they return is checked.

# Components that are not functions.
MODEL, MISSING_EOS = "reward_model", "missing_eos"
CALL = "name(prompts, completions, rows) -> list of floats"


class ScoredFunction:
    """A reward function ready to score.

    Attributes:
        name: its name in reports.
        spec: file.py:name.
    """

    def __init__(self, name: str, spec: str, weight: float, function: Callable[..., Any]) -> None:
        self.name, self.spec, self.weight = name, spec, weight
        self._function = function

    def score(self, items: Sequence[ToScore]) -> list[float]:
        """Return a value for each completion.

        Raises:
            RewardError: it raised, or did not return a finite number for each.
        """
        try:
            result = self._call(items)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit(0) would end the run as if it were done
            raise self._located(items, error) from error
        values = self._listed(result, len(items))
        found = []
        for item, value in zip(items, values):
            number = as_number(value)
            if number is None:
                raise RewardError(
                    f"{self.spec}: {item.where}: returned {_shown(value)} for the completion "
                    f"{_short(item.completion)}; expected a finite number"
                )
            found.append(number)
        return found

    def _call(self, items: Sequence[ToScore]) -> Any:
        # Copies, since the function may change them.
        rows = [dict(item.row) for item in items]
        return self._function([item.prompt for item in items], [item.completion for item in items], rows)

    def _located(self, items: Sequence[ToScore], error: BaseException) -> RewardError:
        """Return the error with the row it comes from: the first that raises when called with it alone."""
        for item in items:
            try:
                self._call([item])
            except KeyboardInterrupt:
                raise
            except BaseException as alone:
                return RewardError(
                    f"{self.spec}: {item.where}: raised {error_of(alone)} for the completion {_short(item.completion)}"
                )
        first = f" from {items[0].where} on" if items else ""
        return RewardError(
            f"{self.spec}: raised {error_of(error)} for {len(items)} completions{first}, and for none of them alone"
        )

    def _listed(self, result: Any, count: int) -> Sequence[Any]:
        what = f"a list of {count} numbers, one for each completion"
        if result is None:
            raise RewardError(f"{self.spec}: returned None; expected {what} (is a return missing?)")
        listed = hasattr(result, "__len__") and hasattr(result, "__iter__") and getattr(result, "ndim", 1) > 0
        if not listed or isinstance(result, str | bytes | dict | set):
            raise RewardError(f"{self.spec}: returned {_shown(result)}; expected {what}")
        if len(result) != count:
            raise RewardError(f"{self.spec}: returned {len(result)} values for {count} completions; expected {what}")
        return list(result)


def as_number(value: Any) -> float | None:
    """Return a finite float in float32's range, else None. An array of one element counts as its number."""
    if not isinstance(value, bool | int | float) and callable(item := getattr(value, "item", None)):
        try:
            value = item()
        except Exception:  # of several elements: each library has its own error for it
            return None
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


def load_functions(given: str | dict[str, float] | None) -> list[ScoredFunction]:
    """Return the functions of `rewards.function`; each file is run once.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be run.
    """
    weights = {given: 1.0} if isinstance(given, str) else dict(given or {})
    modules: dict[Path, ModuleType] = {}
    names = [spec.rpartition(":")[2] for spec in weights]
    found = []
    for (spec, weight), name in zip(weights.items(), names):
        path, colon, _ = spec.rpartition(":")
        if not (path and colon and name):
            raise ConfigError(
                f"rewards.function: {spec!r} does not name a function; expected file.py:name, called as {CALL}"
            )
        if path == "python":
            found.append(ScoredFunction(name, spec, weight, handed_over("rewards.function", spec)))
            continue
        file = home_path(path)
        if file not in modules:
            modules[file] = run_file("rewards.function", spec, file)
        # Reports show the plain name where it is unique.
        shown = spec if names.count(name) > 1 or name in (MODEL, MISSING_EOS) else name
        function = named_in("rewards.function", spec, modules[file], name, f"function; expected {CALL}")
        found.append(ScoredFunction(shown, spec, weight, function))
    return found


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:60]} ({type(value).__name__})"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


# --- reward model -----------------------------------------------------------------------------------------------------
# Rewards by a reward run: a frozen model on the policy's base, or on its own.


@dataclass(frozen=True)
class RewardRun:
    """A reward run on the disk.

    Attributes:
        folder: its adapter, or its whole model.
        chat: whether its rows went through the chat template.
        mean, std: of its scores on its validation rows; None where it had none.
    """

    folder: Path
    chat: bool
    mean: float | None
    std: float | None


def find_reward_run(path: str, normalize: bool) -> RewardRun:
    """Return the reward run that `rewards.adapter` names; only its head's file is read.

    Raises:
        ConfigError: there is no reward run, or `normalize` needs a mean and std that it did not store.
        ModelError: its head cannot be read.
    """
    place = home_path(path)
    file = find_head(path)
    if file is None:
        if not place.exists():
            raise ConfigError(f"rewards.adapter: there is no run or folder {path}")
        raise ConfigError(
            f"rewards.adapter: {path} has no head: not a reward run, or one without trained weights yet; name a run of "
            "objective: reward"
        )
    about = read_head(file).about
    noted = about.get("reward", {})
    mean, std = noted.get("mean"), noted.get("std")
    if normalize and (mean is None or not std):
        seen = f"its std is {std}" if std is not None else "it was trained without data.valid"
        raise ConfigError(f"rewards.normalize: {path} has no mean and std to normalise by: {seen}; leave normalize out")
    return RewardRun(file.parent, reads_chat(place, about), mean, std)


def reads_chat(folder: Path, about: dict[str, Any]) -> bool:
    """Return whether a reward model was trained on rows in the chat template, as its head, or else its run, says.

    Args:
        folder: the run, its adapter, or a model.
        about: what the head notes; heads of older runs do not note it.
    """
    runs = [place for place in (folder, folder.parent) if (place / "config.yaml").is_file()]
    template = about.get("template") or (
        load_config(runs[0] / "config.yaml", looked_at=True).data.template if runs else "auto"
    )
    return bool(template == "auto")


class RewardModel:
    """A reward run ready to score.

    Args:
        tokenizer: the policy's.
        models: frozen models beside the policy.
    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, run: RewardRun, tokenizer: Any, models: FrozenModels) -> None:
        self.model = models.open(FrozenSource("reward", run.folder))
        own = self.model.tokenizer
        self._scorer = Scorer(self.model.split, own or tokenizer, run.chat, run.mean, run.std)

    def score(self, items: Sequence[ToScore], tokens: int) -> list[float]:
        """Return the scores of completions, read in batches of at most `tokens` tokens.

        Raises:
            DataError: a completion cannot be encoded for the model.
            RewardError: a score is not a finite number.
        """
        if self.model.shared:
            completions = [EncodedCompletion(item.prompt_ids, self._sampled(item)) for item in items]
        else:
            completions = [self._encode(item) for item in items]
        with self.model.reading():
            scores = self._scorer.scores(completions, tokens)
        for item, score in zip(items, scores):
            if score - score != 0:  # NaN or infinite
                raise RewardError(f"rewards.adapter: {item.where}: the reward model's score is {score}")
        return scores

    def _sampled(self, item: ToScore) -> Ids:
        """Return a completion's ids; where a stop text ended it, those of the text before, ended as rows are."""
        ended = item.finished and item.reply_ids[-1] not in self._scorer.tokenizer.eos_token_ids
        return self._encode(item).reply if ended else item.reply_ids

    def _encode(self, item: ToScore) -> EncodedCompletion:
        """Encode prompt and completion by this model's tokenizer and template."""
        scorer = self._scorer
        prompt = item.prompt if item.asked is None else item.asked
        if not isinstance(prompt, str) and not (scorer.chat and scorer.tokenizer.has_chat_template):
            prompt = item.prompt
        reply: Any = item.completion
        if not isinstance(prompt, str):
            reply = {"role": "assistant", "content": reply}
        found = scorer.encode(prompt, reply, item.where, tools_of(item.row))
        # The token that ends a completion says that it is whole.
        return found if item.finished else EncodedCompletion(found.prompt, found.reply[:-1])


# --- rewards ----------------------------------------------------------------------------------------------------------

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ToScore:
    """A completion to score.

    Attributes:
        prompt_ids, reply_ids: (P,) and (R,) int32, as sampled: with the EOS that ended it, without padding.
        prompt, completion: their texts, without special tokens other than the marks of thoughts.
        row: the fields of its row.
        finished: whether EOS or a stop text ended it.
        where: the row's place, for messages.
        asked: the text or messages that the prompt was rendered from; None: the text `prompt`.
        opening: the mark that opens a thought at the end of the prompt, or "".
    """

    prompt_ids: Ids
    reply_ids: Ids
    prompt: str
    completion: str
    row: dict[str, Any]
    finished: bool
    where: str
    asked: str | list[Message] | None = None
    opening: str = ""

    @property
    def answer(self) -> str:
        """Return the completion without its thoughts."""
        return answer_of(self.completion, self.opening)


class Scores(NamedTuple):
    """Rewards of n completions.

    Attributes:
        total: (n,) float32, the rewards.
        components: name -> (n,) float32: each source's own values, before normalising, weights and clipping, and what
            the missing-EOS penalty adds.
    """

    total: Values
    components: dict[str, Values]


class Rewards:
    """The rewards of a recipe.

    Args:
        tokenizer: the policy's.
        needed: whether nothing else gives rewards.
    Attributes:
        role: the reward model's role, if it stands on the policy's base: the critic may start from it.
    Raises:
        ConfigError: no source is given, or one cannot be used. The reward run is loaded by `prepare`.
    """

    def __init__(self, settings: RewardsSettings, tokenizer: Any, needed: bool = True) -> None:
        if needed and not settings.given:
            raise ConfigError("rewards: give adapter, function or rules; or an environment that rewards its episodes")
        self.role: str | None = None
        self._settings = settings
        self._tokenizer = tokenizer
        self._run = None if settings.adapter is None else find_reward_run(settings.adapter, settings.normalize)
        self._model: RewardModel | None = None
        self._rules = [ScoredRule(i, rule, settings.thoughts) for i, rule in enumerate(settings.rules)]
        self._sources: list[ScoredFunction | ScoredRule] = [*load_functions(settings.function), *self._rules]

    @property
    def names(self) -> list[str]:
        """Return the names of the components, in the order of `Scores.components`."""
        model = [] if self._run is None else [MODEL]
        penalty = [] if self._settings.missing_eos_penalty is None else [MISSING_EOS]
        return [*model, *(source.name for source in self._sources), *penalty]

    @property
    def columns(self) -> set[str] | None:
        """Return the rows' columns that rules read; None where a function is given, which may read all."""
        if any(isinstance(source, ScoredFunction) for source in self._sources):
            return None
        return {rule.rule.field for rule in self._rules if isinstance(rule.rule, ExactMatch | Number)}

    @property
    def slope(self) -> float:
        """Return what one unit of the reward model's score adds to a reward."""
        s = self._settings
        std = self._run.std if s.normalize and self._run is not None else None
        return s.adapter_weight / (std or 1.0)

    @property
    def offset(self) -> float:
        """Return what a score of 0 by the reward model adds to a reward."""
        mean = self._run.mean if self._settings.normalize and self._run is not None else None
        return -self.slope * (mean or 0.0)

    def check_rows(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Check that rows, each with its place, have what the rules read.

        Raises:
            DataError: rows do not; all of them in one.
        """
        found = [(where, rule.problem(row)) for where, row in rows for rule in self._rules]
        if lines := [f"{where}: {problem}" for where, problem in found if problem]:
            raise DataError(report_lines(lines))

    def prepare(self, models: FrozenModels) -> None:
        """Load the reward model, if there is one: as the role "reward" where it is of the policy's base.

        Raises:
            ModelError: it cannot be loaded.
        """
        if self._run is not None:
            self._model = RewardModel(self._run, self._tokenizer, models)
            self.role = self._model.model.role

    def score(self, items: Sequence[ToScore], *, tokens: int) -> Scores:
        """Return the rewards of completions, in their order.

        Components (the reward model's normalised if asked for) are weighted and added up; then the missing-EOS penalty
        is subtracted; then the total is clipped.

        Args:
            tokens: most tokens of a batch that the reward model reads, padding included.
        Raises:
            DataError, RewardError: a source gives no number for a completion.
        """
        s = self._settings
        components: dict[str, Values] = {}
        total = np.zeros(len(items))
        if self._run is not None:
            assert self._model is not None, "prepare first"
            values = np.array(self._model.score(items, tokens))
            components[MODEL] = values.astype(np.float32)
            if s.normalize:
                assert self._run.mean is not None
                assert self._run.std is not None
                values = (values - self._run.mean) / self._run.std
            total += s.adapter_weight * values
        for source in self._sources:
            values = np.array(source.score(items) if items else [])
            components[source.name] = values.astype(np.float32)
            total += source.weight * values
        if s.missing_eos_penalty is not None:
            values = -s.missing_eos_penalty * np.array([not item.finished for item in items], dtype=np.float64)
            components[MISSING_EOS] = values.astype(np.float32)
            total += values
        if s.clip is not None:
            total = np.clip(total, -s.clip, s.clip)
        return Scores(total.astype(np.float32), components)
