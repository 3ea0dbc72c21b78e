"""Chat templates in bounds: a template is a program that came with a model, and it may take no more than a rendering.

jinja2's sandbox keeps a template from reading and running things, not from filling the memory or going on for ever.
Here everything that a template makes is paid for out of a budget for each rendering: a step of a loop, a call, a filter
and a text by their size. What can grow by far more than what it is given (`*`, `**`, `%`, join, center, ...) is
estimated before it is made. A list counts as often as it is met: one that holds a list twice, forty times over, is
never made.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

BUDGET = 1 << 28  # characters, roughly, of all that one rendering makes
STEP = 64  # what a step costs beside what it makes
LARGEST = 1 << 24  # size of a single value
SECONDS = 5.0  # for what costs time and makes nothing, such as comparing long lists
DEPTH = 64  # of lists within lists
LONGEST = 1 << 18  # characters of a template
COUNT = 100_000  # a number that says how often or how wide, as of jinja2's own range
# Methods, filters and functions whose result can be larger than what they are given.
_GROWING = (
    "center ljust rjust zfill expandtabs join replace translate format format_map to_bytes batch slice indent wordwrap "
    "truncate round tojson xmlattr urlize pprint sum fromkeys"
)
GROWING = frozenset(_GROWING.split())
# Filters that do much for each character, so that one alone would outlast SECONDS; they may be given so many.
SLOW = frozenset(["sort", "urlize", "max", "min", "title", "striptags", "unique", "pprint"])
MOST_SLOW = 1 << 19
NESTED = re.compile(r"\{[^{}]*\{")
NUMBERS = re.compile(r"\d{5,}")


class TemplateTooLarge(jinja2.TemplateError):
    """A template takes more than a rendering may."""


def bound_templates() -> None:
    """Let transformers, and mlx-lm by it, render every template of this process in bounds."""
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not Bounded:
        chat_template_utils.ImmutableSandboxedEnvironment = Bounded
        chat_template_utils._compile_jinja_template.cache_clear()


def size_of(value: Any, number: bool = False, depth: int = 0) -> int:
    """Characters of a value's text, roughly: each list counts as often as it is met. A `number` is as much as it says.

    Raises:
        TemplateTooLarge: it is too large, or nests too deep.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return min(abs(value), LARGEST + 1) if number else value.bit_length()
    if not isinstance(value, list | tuple | set | frozenset | Mapping):
        return 1
    if depth > DEPTH:
        raise TemplateTooLarge(f"it nests values deeper than {DEPTH}")
    total = 16
    parts = value if not isinstance(value, Mapping) else (part for pair in value.items() for part in pair)
    for part in parts:
        total += 16 + size_of(part, number, depth + 1)
        if total > LARGEST:
            raise TemplateTooLarge(f"it makes a value of more than {LARGEST:,} characters")
    return total


class _Generator(CodeGenerator):
    """Writes the budget's calls into a template's code."""

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        written = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        self.writeline(f"environment.pay({written})", node)
        if node.nodes:
            super().visit_Output(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, nodes.Output([], lineno=node.lineno))  # each step pays
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def _paying(name: str) -> Callable[..., None]:
    visit = getattr(CodeGenerator, name)

    def visitor(self: _Generator, node: nodes.Expr, frame: Frame) -> None:
        if getattr(node, "ctx", "load") != "load":  # the names that are set
            visit(self, node, frame)
            return
        self.write("environment.made(")
        visit(self, node, frame)
        self.write(")")

    return visitor


for _name in ("visit_List", "visit_Tuple", "visit_Dict", "visit_Compare"):
    setattr(_Generator, _name, _paying(_name))


class _Rendered(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        owner = cast(Bounded, self.environment)
        owner.begin()
        try:
            return super().render(*args, **kwargs)
        except TemplateTooLarge as error:
            owner.refuse(str(error))
            raise

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        cast(Bounded, self.environment).begin()
        return super().generate(*args, **kwargs)


class _Filters(dict[str, Callable[..., Any]]):
    """Filters that pay: whatever is entered."""

    def __init__(self, owner: Bounded, given: Mapping[str, Callable[..., Any]]) -> None:
        self._owner = owner
        super().__init__()
        for name, function in given.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        owner, skip = self._owner, int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            owner.pay(0)
            if name in SLOW and args[skip:] and size_of(args[skip]) > MOST_SLOW:
                raise TemplateTooLarge(f"{name} is given more than {MOST_SLOW:,} characters")
            if name in GROWING:
                given = [owner.listed(arg) for arg in args[skip:]]
                owner.foresee(name, given[0] if given else None, [*given[1:], *kwargs.values()])
                args = (*args[:skip], *given)
            return owner.made(function(*args, **kwargs))

        super().__setitem__(name, paid)


class Bounded(ImmutableSandboxedEnvironment):
    """The sandbox that transformers renders chat templates in, with a budget.

    A template that took long until it was refused is refused at once from then on: it is asked again for each row.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _Generator
    template_class = _Rendered

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.globals.pop("lipsum", None)
        self.optimized = False  # constants would be computed while it compiles, unpaid
        self.filters = _Filters(self, self.filters)
        self.finalize = self._written
        self._refused: str | None = None
        self.begin()

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(source, str) and len(source) > LONGEST:
            raise TemplateTooLarge(f"the template has {len(source):,} characters; at most {LONGEST:,} are read")
        # A namespace within namespaces would be written as often as it is met; nobody writes one.
        short = {"__repr__": lambda self: "<Namespace>"}
        self.globals["namespace"] = type("Namespace", (cast(type, self.globals["namespace"]),), short)
        return super().from_string(source, *args, **kwargs)

    def begin(self) -> None:
        """A rendering begins."""
        if self._refused is not None:
            raise TemplateTooLarge(self._refused)
        self._left, self._until = BUDGET, time.monotonic() + SECONDS

    def refuse(self, why: str) -> None:
        """Let no more be rendered, if it took long."""
        if time.monotonic() > self._until - SECONDS + 1:
            self._refused = why

    def pay(self, size: int) -> None:
        """Take a step that makes something of a size.

        Raises:
            TemplateTooLarge: there is nothing left to pay with.
        """
        self._left -= STEP + size
        if self._left < 0 or time.monotonic() > self._until:
            raise TemplateTooLarge("it takes more steps, or makes more text, than a rendering may")

    def made(self, value: Any) -> Any:
        """Pay for a value, and give it back."""
        size = size_of(value)
        if size > LARGEST:
            raise TemplateTooLarge(f"it makes a value of {size:,} characters; at most {LARGEST:,} are taken")
        self.pay(size)
        return value

    def concat(self, parts: tuple[Any, ...]) -> str:  # type: ignore[override]
        """What `~` makes."""
        texts = [self._written(None, part) for part in parts]
        return cast(str, self.made("".join(texts)))

    @jinja2.pass_context
    def _written(self, _: Any, value: Any) -> str:
        text = str(value)
        self.pay(len(text))
        return text

    def listed(self, value: Any) -> Any:
        """What is counted before it is used: the list of an iterator."""
        return self.made(list(islice(value, LARGEST))) if isinstance(value, Iterator) else value

    def foresee(self, name: str, value: Any, given: list[Any]) -> None:
        """Refuse what would grow too large, before it is made.

        Args:
            name: of an operator, a filter or a method.
            value: what it is applied to.
        """
        many: list[Any] = [arg for arg in given if isinstance(arg, int | float) and name != "%" and abs(arg) > COUNT]
        if name == "round" and any(isinstance(arg, int) and arg > 1000 for arg in given):
            many = given
        size = size_of(value)
        if name in ("format", "format_map", "%") and isinstance(value, str):
            places = value.count("%") + value.count("{")
            wide = NUMBERS.search(value) or NESTED.search(value) or ("*" in value and name != "format_map")
            many = [*many, value] if wide else many
            size += places * sum(map(size_of, given))
        elif name == "replace" and isinstance(value, str) and len(given) > 1:
            size += value.count(str(given[0])) * size_of(given[1])
        elif name != "%":
            size = math.prod([size + 1, *(size_of(arg, number=True) + 1 for arg in given)])
            size *= DEPTH if name in ("tojson", "pprint") and given else 1
        if many or size > LARGEST:
            raise TemplateTooLarge(f"{name} would make a value of more than {LARGEST:,} characters")
        self.pay(0)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
            if bits > COUNT:
                raise TemplateTooLarge(f"{operator} would make a number of {bits:,} bits")
        elif operator == "*" and not (isinstance(left, float) or isinstance(right, float)):
            value, count = (right, left) if isinstance(left, int) else (left, right)
            self.foresee(operator, value, [count])
        elif operator == "%" and isinstance(left, str | bytes):
            self.foresee(operator, left, [right])
        return self.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.pay(0)
        name = getattr(obj, "__name__", None)
        if name in GROWING and not isinstance(obj, jinja2.runtime.Macro):
            given = tuple(map(self.listed, args))
            owner = getattr(obj, "__self__", None) or getattr(getattr(obj, "__wrapped__", None), "__self__", None)
            self.foresee(name, owner, [*given, *kwargs.values()])
            args = given
        return self.made(super().call(context, obj, *args, **kwargs))
