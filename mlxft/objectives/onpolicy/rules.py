"""Rewards by rule: an exact answer, a pattern, a number, JSON, a length."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlxft.data.thoughts import Thoughts, wanted_of
from mlxft.errors import ConfigError, DataError, missing_extra
from mlxft.objectives.onpolicy.settings import AnyRule, ExactMatch, JsonSchema, Length, Number, Regex, TextRule
from mlxft.text import home_path, parse_json, read_small

if TYPE_CHECKING:
    from mlxft.objectives.onpolicy.rewards import Item

# A sign only where no word or number stands before it: 10-5 has no -5. Thousands are parted by commas, or not at all.
_NUMBER = re.compile(
    r"(?:(?P<sign>(?<![\w.)\]%])[-+\u2212])?(?:[$\u20ac\u00a3\u00a5\u20b9]\s?(?P<inner>[-\u2212])?)?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?P<power>[eE][-+]?\d+)?"
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def last_number(text: str) -> float | None:
    """The last number of a text, or None; see the rule `number`."""
    every = list(_NUMBER.finditer(text))
    if not every:
        return None
    found = every[-1]
    sign = (found["sign"] or "") + (found["inner"] or "")
    negative = "-" in sign or "\u2212" in sign
    value = float(found["digits"].replace(",", "") + (found["power"] or ""))
    return -value if negative else value


def find_json(text: str) -> tuple[bool, Any]:
    """Whether a text, or the last of its ``` fences that does, holds JSON; and its value."""
    for part in (text, *reversed(_FENCE.findall(text))):
        try:
            return True, parse_json(part, parse_constant=_no_json)
        except (ValueError, RecursionError):
            continue
    return False, None


def _no_json(name: str) -> None:
    """Python reads NaN and Infinity, which JSON does not have."""
    raise ValueError(name)


class ScoredRule:
    """A rule ready to score.

    Args:
        thoughts: what is judged, where the rule itself does not say.
    Attributes:
        name: rules/0_regex, by its place and kind.
        weight: what its values are multiplied by.
    Raises:
        ConfigError: a schema that can not be read or is none.
    """

    def __init__(self, index: int, rule: AnyRule, thoughts: Thoughts = "drop") -> None:
        self.rule = rule
        self.name = f"rules/{index}_{rule.kind}"
        self.weight = rule.weight
        self._whole = not isinstance(rule, TextRule) or rule.keeps_thoughts(thoughts)
        self._value = _scorer(f"rewards.rules[{index}]", rule)

    def problem(self, row: dict[str, Any]) -> str | None:
        """What a row lacks that the rule reads, or None."""
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
                return f"{field} is {value!r:.40}, which holds no number; {self.name} compares with one"
        return None

    def score(self, items: Sequence[Item]) -> list[float]:
        """A value for each completion.

        Raises:
            DataError: rows lack what the rule reads.
        """
        values = []
        for item in items:
            if problem := self.problem(item.row):
                raise DataError(f"{item.where}: {problem}")
            said = item.completion if self._whole else item.answer
            values.append(self._value(item, said, self._wanted(item.row)))
        return values

    def _wanted(self, row: dict[str, Any]) -> str | int | float:
        """What the row's field holds; '' for a rule that compares with none."""
        value: str | int | float = row[self.rule.field] if isinstance(self.rule, ExactMatch | Number) else ""
        return wanted_of(value) if isinstance(value, str) and not self._whole else value


def _scorer(at: str, rule: AnyRule) -> Callable[[Item, str, str | int | float], float]:
    """The value of a completion: the function takes it, what of its text is judged, and what the row wants."""
    if isinstance(rule, ExactMatch):
        return lambda item, said, wanted: _exact_match(said, str(wanted), rule.ignore_case)
    if isinstance(rule, Regex):
        pattern = re.compile(rule.pattern)
        if rule.full:
            return lambda item, said, wanted: float(pattern.fullmatch(said.strip()) is not None)
        return lambda item, said, wanted: float(pattern.search(said) is not None)
    if isinstance(rule, Number):
        return lambda item, said, wanted: _number(said, wanted, rule.tolerance)
    if isinstance(rule, JsonSchema):
        fits = _validator(at, rule)
        return lambda item, said, wanted: _json(fits, said)
    return lambda item, said, wanted: _length(rule, len(item.reply_ids) if rule.unit == "tokens" else len(said))


def _exact_match(said: str, wanted: str, ignore_case: bool) -> float:
    said, wanted = said.strip(), wanted.strip()
    if ignore_case:
        said, wanted = said.casefold(), wanted.casefold()
    return float(said == wanted)


def _number(said: str, wanted: str | int | float, tolerance: float) -> float:
    one, two = last_number(said), _as_number(wanted)
    return float(one is not None and two is not None and abs(one - two) <= tolerance)


def _as_number(value: str | int | float) -> float | None:
    try:
        return last_number(value) if isinstance(value, str) else float(value)
    except OverflowError:
        return math.inf


def _length(rule: Length, size: int) -> float:
    below = rule.min - size if rule.min is not None else 0
    above = size - rule.max if rule.max is not None else 0
    outside = max(0, below, above)
    if outside == 0:
        return 1.0
    return max(0.0, 1 - outside / rule.slack) if rule.slack else 0.0


def _json(fits: Callable[[Any], bool] | None, text: str) -> float:
    there, value = find_json(text)
    return float(there and (fits is None or fits(value)))


def _validator(at: str, rule: JsonSchema) -> Callable[[Any], bool] | None:
    """Whether a value fits the rule's schema; None where any JSON will do."""
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
        # With a registry of its own nothing is fetched for a $ref that leads out of the schema.
        validator = kind(schema, registry=Registry())
        list(validator.iter_errors({}))
    except SchemaError as exc:
        place = "/".join(str(part) for part in exc.absolute_path)
        raise ConfigError(f"{origin}: not a JSON Schema: {exc.message}{f' (at {place})' if place else ''}") from None
    except Unresolvable as exc:
        raise ConfigError(f"{origin}: $ref to {exc.ref!r}, which is not in the schema; put it under $defs") from None
    except RecursionError:
        raise ConfigError(f"{origin}: a $ref leads back to itself, or the schema is nested too deep") from None

    def fits(value: Any) -> bool:
        try:
            return bool(validator.is_valid(value))
        except Unresolvable as exc:
            raise ConfigError(
                f"{origin}: $ref to {exc.ref!r}, which is not in the schema; put it under $defs"
            ) from None
        except RecursionError:
            return False

    return fits


def _read_schema(at: str, given: str | dict[str, Any]) -> tuple[Any, str]:
    """A schema, and where it is from."""
    if isinstance(given, dict):
        return given, f"{at}.schema"
    try:
        schema = parse_json(read_small(home_path(given)))
    except OSError as exc:
        raise ConfigError(f"{at}.schema: can not read {given}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{at}.schema: {given} is not valid JSON: {exc}") from exc
    if not isinstance(schema, dict | bool):
        raise ConfigError(f"{at}.schema: {given} holds {type(schema).__name__}; expected a JSON Schema, a mapping")
    return schema, f"{at}.schema: {given}"
