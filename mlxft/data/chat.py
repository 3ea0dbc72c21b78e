"""Chat templates: messages to token ids and the mask of what is trained, thoughts included."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from functools import lru_cache
from itertools import chain, islice, product
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxft.data.formats import WRITTEN, Message
from mlxft.errors import DataError
from mlxft.text import parse_json

# --- thoughts ---------------------------------------------------------------------------------------------------------
# A completion of a reasoning model has thoughts and then an answer. Their marks are looked for in text, not in token
# ids: a model that learned `<think>` from its rows may write it letter by letter.

Thoughts = Literal["drop", "keep"]

_TAGS = ("think", "thinking", "thought", "reasoning", "longcat_think", "seed:think", "mm:think")
# Marks that open and close a thought: those of mlx-lm's TokenizerWrapper, vLLM's reasoning parsers, and data sets.
MARKS: tuple[tuple[str, str], ...] = (
    *((f"<{tag}>", f"</{tag}>") for tag in _TAGS),
    ("[THINK]", "[/THINK]"),  # Mistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
    ("<|think:start|>", "<|think:end|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),  # Kimi K3
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThoughts
)
_CLOSING = dict(MARKS)
# Other marks around an answer; special tokens, so never part of it.
_FRAMES = (("<|START_RESPONSE|>", "<|END_RESPONSE|>"), ("<|open|>response<|sep|>", "<|close|>response<|sep|>"))
# gpt-oss writes messages with channels: analysis (thoughts), commentary (tool calls) or final.
_ANALYSIS = "<|channel|>analysis<|message|>"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start)\|>")


def _any_of(marks: Iterable[str]) -> str:
    return "|".join(map(re.escape, marks))


_OPENS = re.compile(rf"\s*({_any_of(list(_CLOSING))})")
_OPENED = re.compile(rf"({_any_of([*_CLOSING, _ANALYSIS])})\s*\Z")
_ANY_MARK = re.compile(_any_of([mark for pair in MARKS for mark in pair]))
_IN_PATTERN = re.compile(r"[<\[\u25c1][^>\]]*(?:think|thought|reason)|<\|(?:channel|inner)", re.IGNORECASE)


def split_thoughts(text: str, opening: str = "") -> tuple[str, str]:
    """Split a completion into its thoughts, with their marks and following white space, and its answer.

    Thoughts come first, in one or several blocks. Pairs of marks within a thought are part of it; marks in the answer
    are quoted text. A closing mark without an opening one ends a thought that was opened before the completion (see
    `opening_of` for `opening`). A thought that never ends leaves no answer.
    """
    end = _end_of_thoughts(opening + text) - len(opening)
    return text[:end], text[end:]


def _end_of_thoughts(text: str) -> int:
    if channels := list(_CHANNEL.finditer(text)):
        said = [c for c in channels if c[1] == "final"] or [c for c in channels if c[1] != "analysis"]
        return said[-1].end() if said else len(text)
    end = 0
    if not _OPENS.match(text):
        first = _ANY_MARK.search(text)
        if first is None or first[0] in _CLOSING:
            return 0
        end = first.end()
    while opened := _OPENS.match(text, end):
        # The thought ends at its own closing mark, or else at the first one.
        opening, closing, depth, ends = opened[1], _CLOSING[opened[1]], 1, []
        for mark in re.compile(_any_of([opening, closing])).finditer(text, opened.end()):
            depth += 1 if mark[0] == opening else -1
            if mark[0] == closing:
                ends.append(mark.end())
            if depth == 0:
                break
        if not ends:
            return len(text)
        end = ends[-1] if depth == 0 else ends[0]
    return len(text) - len(text[end:].lstrip())


def until_stop(text: str, stop: Sequence[str], opening: str = "", in_answer: bool = True) -> str:
    """Return a completion up to its first stop text; with `in_answer` only those in the answer count.

    A stop text with a mark of thoughts counts everywhere.
    """
    answer = len(split_thoughts(text, opening)[0]) if in_answer and stop else 0
    ends = (text.find(end, 0 if _ANY_MARK.search(end) else answer) for end in stop)
    return text[: min((at for at in ends if at >= 0), default=len(text))]


def answer_of(text: str, opening: str = "") -> str:
    """Return a completion without its thoughts, as `split_thoughts` finds them."""
    thoughts, answer = split_thoughts(text, opening)
    if "<|channel|>" in opening + thoughts:
        answer = _MESSAGE_END.split(answer, maxsplit=1)[0]
    for begin, end in _FRAMES:
        if answer.startswith(begin):
            answer = answer[len(begin) :].partition(end)[0]
    return answer


def wanted_of(text: str) -> str:
    """Return a row's wanted text without its thoughts, or unchanged if nothing would be left."""
    return answer_of(text) or text


def opening_of(prompt: str) -> str:
    """Return the mark of a thought that a rendered prompt opens at its end (as DeepSeek R1's does), or ''."""
    opened = _OPENED.search(prompt)
    return opened[1] if opened else ""


def opening_after(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return `opening_of` a prompt of token ids."""
    # Enough for the longest mark in tokens of one character.
    longest = 2 * max(map(len, [*_CLOSING, _ANALYSIS]))
    return opening_of(str(tokenizer.decode(list(ids[-longest:]))))


def keeps_thoughts(own: Thoughts | None, general: Thoughts, pattern: str | None = None) -> bool:
    """Return whether a rule or metric reads the whole completion, by its own setting or else the general one.

    Without its own, a `pattern` (regular expression) with marks of thoughts is about them.
    """
    if own is None and pattern is not None and _IN_PATTERN.search(pattern.replace("\\", "")):
        return True
    return (own or general) == "keep"


def decode_completion(tokenizer: Any, ids: Iterable[int]) -> str:
    """Decode a completion without special tokens other than the marks of thoughts."""
    left_out = _left_out(tokenizer)
    return str(tokenizer.decode([i for i in ids if i not in left_out]))


@lru_cache(maxsize=4)
def _left_out(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    added = {i: str(token) for i, token in added if getattr(token, "special", False)}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens)) | added
    marks = [mark for pair in (*MARKS, *_FRAMES) for mark in pair] + [_ANALYSIS]
    return frozenset(i for i, text in special.items() if not any(text in mark for mark in marks))


# --- sandbox ----------------------------------------------------------------------------------------------------------
# A chat template is a program that comes with a model. jinja2's sandbox keeps it from reading and running things, but
# not from filling the memory or running forever. Here each rendering has a budget, and everything that a template makes
# is paid from it by size: loop steps, calls, filters and texts. What may grow far beyond its input (`*`, `**`, `%`,
# join, center, ...) is estimated first. A list counts as often as it occurs, so nested repetition is never built.

BUDGET = 1 << 28  # characters, roughly, of everything that one rendering makes
STEP = 64  # cost of a step besides its result
LARGEST = 1 << 24  # size of a single value
SECONDS = 5.0  # for what takes time and makes nothing, such as comparing long lists
DEPTH = 64  # of nested lists
_LONGEST = 1 << 18  # characters of a template
COUNT = 100_000  # largest count or width, as in jinja2's range
# Methods, filters and functions whose result can be larger than their input.
_GROWING = (
    "center ljust rjust zfill expandtabs join replace translate format format_map to_bytes batch slice indent wordwrap "
    "truncate round tojson xmlattr urlize pprint sum fromkeys"
)
GROWING = frozenset(_GROWING.split())
# Filters that are slow for each character, so that a single one could exceed SECONDS; their input is bounded.
SLOW = frozenset(["sort", "urlize", "max", "min", "title", "striptags", "unique", "pprint"])
MOST_SLOW = 1 << 19
NESTED = re.compile(r"\{[^{}]*\{")
NUMBERS = re.compile(r"\d{5,}")


class TemplateTooLarge(jinja2.TemplateError):
    """A template uses more than the budget of a rendering."""


def bound_templates() -> None:
    """Let transformers, and so mlx-lm, render every template of this process within bounds."""
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not Bounded:
        chat_template_utils.ImmutableSandboxedEnvironment = Bounded
        chat_template_utils._compile_jinja_template.cache_clear()


def size_of(value: Any, number: bool = False, depth: int = 0) -> int:
    """Return roughly the characters of a value's text; a list counts as often as it occurs, a `number` as its value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return min(abs(value), LARGEST + 1) if number else value.bit_length()
    if not isinstance(value, list | tuple | set | frozenset | Mapping):
        return 1
    if depth > DEPTH:
        raise TemplateTooLarge(f"it nests values deeper than {DEPTH}")
    total = 16
    for part in chain(*value.items()) if isinstance(value, Mapping) else value:
        total += 16 + size_of(part, number, depth + 1)
        if total > LARGEST:
            raise TemplateTooLarge(f"it makes a value of more than {LARGEST:,} characters")
    return total


class _Generator(CodeGenerator):
    """Compiles templates with calls that pay from the budget."""

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
        if getattr(node, "ctx", "load") != "load":  # targets of an assignment
            visit(self, node, frame)
            return
        self.write("environment.made(")
        visit(self, node, frame)
        self.write(")")

    return visitor


for _name in ("visit_List", "visit_Tuple", "visit_Dict", "visit_Compare"):
    setattr(_Generator, _name, _paying(_name))


class _Rendered(jinja2.Template):
    def new_context(self, *args: Any, **kwargs: Any) -> Any:
        cast(Bounded, self.environment).begin()
        return super().new_context(*args, **kwargs)


class Bounded(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers renders chat templates, with a budget.

    A template that was refused after a long time is refused at once from then on, since it is rendered for each row.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _Generator
    template_class = _Rendered

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.globals.pop("lipsum", None)
        self.optimized = False  # constants would be computed at compile time, unpaid
        self.finalize = self._written
        self._refused: str | None = None
        self.begin()

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(source, str) and len(source) > _LONGEST:
            raise TemplateTooLarge(f"the template has {len(source):,} characters; at most {_LONGEST:,} are read")
        self.filters = {name: self._paid(name, function) for name, function in self.filters.items()}
        self.globals["strftime_now"] = _strftime_now
        # Nested namespaces would be written out as often as they occur.
        short = {"__repr__": lambda self: "<Namespace>"}
        self.globals["namespace"] = type("Namespace", (cast(type, self.globals["namespace"]),), short)
        return super().from_string(source, *args, **kwargs)

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that pays from the budget."""
        skip = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.pay(0)
            if name in SLOW and args[skip:] and size_of(args[skip]) > MOST_SLOW:
                raise TemplateTooLarge(f"{name} is given more than {MOST_SLOW:,} characters")
            if name in GROWING:
                given = [self.listed(arg) for arg in args[skip:]]
                self.foresee(name, given[0] if given else None, [*given[1:], *kwargs.values()])
                args = (*args[:skip], *given)
            return self.made(function(*args, **kwargs))

        return paid

    def begin(self) -> None:
        """Start the budget of a rendering."""
        if self._refused is not None:
            raise TemplateTooLarge(self._refused)
        self._left, self._until = BUDGET, time.monotonic() + SECONDS

    def handle_exception(self, source: str | None = None) -> NoReturn:
        error = sys.exc_info()[1]
        if isinstance(error, TemplateTooLarge) and time.monotonic() > self._until - SECONDS + 1:
            self._refused = str(error)
        super().handle_exception(source)

    def pay(self, size: int) -> None:
        """Pay for a step that makes a result of a size."""
        self._left -= STEP + size
        if self._left < 0 or time.monotonic() > self._until:
            raise TemplateTooLarge("it takes more steps, or makes more text, than allowed")

    def made(self, value: Any) -> Any:
        """Pay for a value and return it."""
        size = size_of(value)
        if size > LARGEST:
            raise TemplateTooLarge(f"it makes a value of {size:,} characters; at most {LARGEST:,} are taken")
        self.pay(size)
        return value

    def concat(self, parts: Iterable[Any]) -> str:
        """Return the result of `~`."""
        return cast(str, self.made("".join([self._written(None, part) for part in parts])))

    @jinja2.pass_context
    def _written(self, _: Any, value: Any) -> str:
        text = str(value)
        self.pay(len(text))
        return text

    def listed(self, value: Any) -> Any:
        """Return an iterator as a list, so that it can be measured; other values unchanged."""
        return self.made(list(islice(value, LARGEST))) if isinstance(value, Iterator) else value

    def foresee(self, name: str, value: Any, given: list[Any]) -> None:
        """Refuse a result of an operator, filter or method that would be too large, before it is made."""
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


# --- chat -------------------------------------------------------------------------------------------------------------

_T = TypeVar("_T")

Tools = list[dict[str, Any]]
# Keys of a message's thoughts; templates read one of them.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class NotAPrefix(Exception):
    """The template does not render a turn after its own generation prompt."""


class Unwritten(DataError):
    """The template leaves out a part of the row, or refuses the row."""

    reached = 0  # how far the row was found in the text


class _Form(NamedTuple):
    """How tool calls and tools are passed to a template."""

    text_arguments: bool = False  # the arguments of calls are JSON text, not a mapping
    null_content: bool = False  # a turn with calls only has null as content, not ""
    wrapped_tools: bool = False  # a bare tool of the row is wrapped as {"type": "function", "function": ...}


@dataclass(frozen=True)
class Chat:
    """A chat template with the options for one row."""

    tokenizer: Any  # mlx-lm's TokenizerWrapper, or anything with its `apply_chat_template`
    tools: Tools | None
    where: str  # the row's place, for messages; "" if it has none
    uses_tools: bool = False  # the row has tools or calls, so that a template named `tool_use` is used
    form: _Form = field(default_factory=_Form)
    thinking: bool | None = None  # `enable_thinking`; None: the tokenizer's default

    @property
    def _cached_by(self) -> tuple[Chat, str]:
        """Return what the shape of a rendering depends on; the tokenizer's template may be replaced."""
        return replace(self, tools=None, where=""), str(getattr(self.tokenizer, "chat_template", None))

    def error(self, text: str, reached: int = 0) -> Unwritten:
        """Return an error with the row's place."""
        error = Unwritten(f"{self.where}: {text}" if self.where else text)
        error.reached = reached
        return error

    @property
    def tail(self) -> str:
        """Return what the template writes after the token that ends the last turn of a conversation; mostly ""."""
        return _tail_of(*self._cached_by)

    def render(self, messages: Sequence[Message], generation: bool = False) -> str:
        """Return the text of messages; with `generation`, with the generation prompt of an assistant turn."""
        given = [_formed(message, self.form) for message in messages]
        day = _day.set(getattr(self.tokenizer, "_mlxft_day", None))
        try:
            return str(self._apply(given, generation))
        except Exception as exc:  # a template is a program and may raise anything
            reason = str(exc).strip() or type(exc).__name__
            raise self.error(
                f"the chat template refuses these messages: {reason}; change the row, or set model.chat_template to "
                "one that accepts them"
            ) from exc
        finally:
            _day.reset(day)

    def _apply(self, messages: list[Message], generation: bool) -> Any:
        bound_templates()
        tools, template = self.tools, getattr(self.tokenizer, "chat_template", None)
        if tools is not None and self.form.wrapped_tools:
            tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        options: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        if isinstance(template, dict):
            # transformers looks at the list of tools only; a row with calls needs that template too.
            template = template.get("tool_use" if self.uses_tools and "tool_use" in template else "default")
            options |= {} if template is None else {"chat_template": template}
        if self.form.null_content:
            return _render_with_nulls(self.tokenizer, messages, tools, generation, options)
        if tools is not None:  # not all of mlx-lm's templates that are functions accept tools=None
            options["tools"] = tools
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **options)

    @staticmethod
    def turn(prompt: str, ended: str) -> str:
        """Return a turn's text, with the mark of a thought that its generation prompt opens."""
        return opening_of(prompt) + ended[len(prompt) :]

    def check_written(self, messages: Sequence[Message], text: str, trained: Mapping[int, str]) -> None:
        """Check that every part of a row is in its rendered text.

        Args:
            text: the rendered messages, or a text that begins with them.
            trained: index of a trained turn -> its part of the text; see `turn`.
        Raises:
            Unwritten: a part is missing; it is named by turn.
        """
        for i, message in enumerate(messages):
            if problem := self._problem_of(message, trained.get(i, text), i in trained):
                raise self.error(f"messages[{i}] {problem}", i + 1)
        for name in map(_tool_name, self.tools or ()):
            if not _is_in(name, text):
                raise self.error(f"tools has {name!r}, {_NOT_WRITTEN}", len(messages) + 1)
        if dropped := self._dropped(messages):
            raise self.error(f"{dropped}, {_NOT_WRITTEN}", len(messages) + 2)

    def _problem_of(self, message: Message, text: str, trained: bool) -> str | None:
        """Return what is wrong with a message, or with how a text has it, else None."""
        content = str(message.get("content") or "")
        bos = getattr(self.tokenizer, "bos_token", None)
        if bos and content.startswith(str(bos)):
            return (
                f"begins with {bos}, which the chat template writes too: this text is rendered already; set "
                "data.template: none, or remove the marks"
            )
        if trained and (mark := self._ends_twice(content.strip(), text)):
            return (
                f"ends with {mark}, which the chat template writes too: remove it from the row, or set "
                "data.template: none if the rest of the row has its marks too"
            )
        if trained and split_thoughts(content)[0] and (key := next(filter(message.get, THOUGHTS), None)):
            return f"has thoughts in content and in {key}; keep one of them"
        if not _is_in(answer_of(content) if message["role"] == "assistant" else content, text):
            return f"({message['role']}) has content, {_NOT_WRITTEN}"
        thoughts = [content, *(message[key] for key in THOUGHTS if isinstance(message.get(key), str))]
        if trained and not all(_is_in(part, text) for part in thoughts):
            return (
                "has thoughts that this chat template does not write into the turn; remove them from the row, or set "
                "model.chat_template to one that keeps them"
            )
        lost = (self._lost_of_call(call["function"], text) for call in message.get("tool_calls", ()))
        return next(filter(None, lost), None)

    def _ends_twice(self, content: str, turn: str) -> str | None:
        """Return the token that ends a turn's content and then the turn again; None if there is none."""
        marks = _marks(self.tokenizer, special_ids(self.tokenizer)[0])
        if not content.endswith(marks):
            return None
        rest = turn.rpartition(content)[2].lstrip()
        return next((mark for mark in marks if content.endswith(mark) and rest.startswith(mark)), None)

    def _lost_of_call(self, function: Mapping[str, Any], text: str) -> str | None:
        """Return what is missing or changed of a call in a text, else None."""
        name = function["name"]
        if not _is_in(name, text):
            return f"calls {name}, {_NOT_WRITTEN}"
        if self.form.text_arguments:
            # The row's text of the arguments has all values, however they are spelled: 1e5, \u00FC, \/.
            if _text_of(function).strip() in text:
                return None
            return f"calls {name}, whose arguments this chat template does not write as they are: {_ADVICE}"
        parts, written = list(_parts(function["arguments"])), _squeezed(text)
        for part in parts:
            # A template may leave out null, and write true as True.
            if isinstance(part, str | int | float) and not isinstance(part, bool):
                leaf = part if isinstance(part, str) else _dumps(part)
                if not _is_in(leaf, text):
                    return f"calls {name} with {leaf!r}, {_NOT_WRITTEN}"
        for part in parts:
            if isinstance(part, Mapping | list) and part:
                as_json, as_python = _dumps(part), repr(part)
                if _squeezed(as_python) in written and _squeezed(as_json) not in written:
                    return f"calls {name}, and this chat template writes {as_python} for {as_json}: {_ADVICE}"
        return None

    def _dropped(self, messages: Sequence[Message]) -> str | None:
        """Return what the template drops of any row of this shape; short texts may occur in others by chance."""
        tools = self.tools
        if tools is not None:
            nothing = {"type": "object", "properties": {}}
            made = [{"name": f"toolqz{i}x", "description": "d", "parameters": nothing} for i in range(len(tools))]
            tools = [{"type": "function", "function": f} if "function" in tool else f for f, tool in zip(made, tools)]
        row = _dumps([[_stand_in(i, message) for i, message in enumerate(messages)], tools])
        return _dropped_of(*self._cached_by, row)


_ADVICE = "change the row, or set model.chat_template to one that does"
_NOT_WRITTEN = f"which this chat template does not write: {_ADVICE}"


def by_template(
    tokenizer: Any, messages: Sequence[Message], tools: Tools | None, where: str, encode: Callable[[Chat], _T]
) -> _T:
    """Return the result of `encode` for the first form of a row that the template writes completely.

    If there is none, raise the error of the form that comes closest.
    """
    uses_tools = bool(tools) or any("tool_calls" in m or m["role"] == "tool" for m in messages)
    calls = [message for message in messages if "tool_calls" in message]
    silent = any(not message["content"] for message in calls)
    bare = any("function" not in tool for tool in tools or ())
    forms = [  # the usual one first; rows without calls and bare tools have no other
        _Form(text, null, wrapped)
        for wrapped, null, text in product((False, True), repeat=3)
        if wrapped <= bare and null <= silent and text <= bool(calls)
    ]
    failed: list[tuple[Chat, Unwritten | NotAPrefix]] = []
    # Templates of reasoning models may open a thought in the generation prompt that the turn does not have.
    for form, thinking in product(forms, (None, False) if thinking_of(tokenizer) else (False, None)):
        chat = Chat(tokenizer, tools, where, uses_tools, form, thinking)
        try:
            return encode(chat)
        except (Unwritten, NotAPrefix) as exc:
            failed.append((chat, exc))
    # If a turn follows its prompt with one choice of thinking, the other's NotAPrefix is not the reason.
    follows = {chat.form for chat, exc in failed if isinstance(exc, Unwritten) and exc.reached}
    errors = [
        exc if isinstance(exc, Unwritten) else _apart(chat, messages, str(exc))
        for chat, exc in failed
        if isinstance(exc, Unwritten) or chat.form not in follows
    ]
    raise max(errors, key=lambda error: error.reached)


def _apart(chat: Chat, messages: Sequence[Message], what: str) -> Unwritten:
    """Return an error that says why turns do not follow their generation prompt, and the way out."""
    text = chat.render(messages)
    try:
        # A template that drops the row's thoughts is reason enough.
        trained = {len(messages) - 1: text} if messages[-1]["role"] == "assistant" else {}
        chat.check_written(messages, text, trained)
    except Unwritten as exc:
        return exc
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and chat.render(messages[: i + 1]) == chat.render(messages[:i]):
            return chat.error(
                f"messages[{i}] is an empty turn, which this chat template leaves out: remove it from the row, or set "
                "model.chat_template to one that writes it",
                i + 1,
            )
    word = "thoughtqzx"
    given = [{**m, THOUGHTS[0]: word} if m["role"] == "assistant" else m for m in messages]
    ways = ["give the turn its thoughts (reasoning_content)"] if word in chat.render(given) else []
    ways += ["set model.chat_template to one that keeps a turn as generated"]
    return chat.error(
        f"{what}; this chat template changes what the model generated (reasoning models open a thought that their "
        f"template drops), so the turn has no correct mask: {', '.join(ways)}, or prepare whole texts for "
        "data.format: text",
        len(messages) + 3,
    )


def _formed(message: Message, form: _Form) -> Message:
    """Return a message in a form for the template."""
    # Qwen3's template takes empty thoughts for given ones, and then leaves thoughts in the content.
    given = {key: value for key, value in message.items() if key != "weight" and (value or key not in THOUGHTS)}
    thoughts = next((given[key] for key in THOUGHTS if key in given), None)
    if thoughts is not None:
        given |= dict.fromkeys(THOUGHTS[:2], thoughts)
    if "tool_calls" in given:
        calls = copy.deepcopy(given["tool_calls"])
        for function in (call["function"] for call in calls):
            if form.text_arguments:
                function["arguments"] = _text_of(function)
            function.pop(WRITTEN, None)
        given["tool_calls"] = calls
        if form.null_content and not given["content"]:
            given["content"] = None
    return given


def _text_of(function: Mapping[str, Any]) -> str:
    """Return a call's arguments as JSON text: the row's own text if it has one."""
    return str(function.get(WRITTEN) or _dumps(function["arguments"]))


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def complete_template(tokenizer: Any) -> None:
    """Add a generation prompt to a chat template that has none, and note it (see `template_notes`).

    Without it the marks that open an assistant turn would be trained as part of the completion. They are what the
    template writes between a user turn and the assistant's content; a template whose user turns end with them needs
    none.
    """
    bound_templates()
    found = tokenizer.chat_template if getattr(tokenizer, "_chat_template", None) is None else None
    named = found if isinstance(found, dict) else {"default": found} if isinstance(found, str) else {}
    asked = [{"role": "user", "content": "textqz0x"}]
    answered = [*asked, {"role": "assistant", "content": "textqz1x"}]
    for name, text in named.items():

        def render(messages: list[Message], text: str = text, **options: Any) -> str:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=text, **options))

        try:
            before, whole = render(asked), render(answered)
            if render(asked, add_generation_prompt=True) != before:
                continue
        except Exception:  # the template needs a longer conversation
            continue
        opening, content, _ = whole.removeprefix(before).partition("textqz1x")
        if whole.startswith(before) and content and opening.strip():
            named = {**named, name: f"{text}{{% if add_generation_prompt %}}{{{{ {_dumps(opening)} }}}}{{% endif %}}"}
            tokenizer._mlxft_notes = [
                f"the chat template has no generation prompt; {opening!r} is added to it, and kept with the run"
            ]
            tokenizer.chat_template = named if isinstance(found, dict) else named["default"]


def template_notes(tokenizer: Any) -> list[str]:
    """Return notes on what `complete_template` did."""
    return list(getattr(tokenizer, "_mlxft_notes", ()))


def set_thinking(tokenizer: Any, thinking: bool) -> None:
    """Render chat templates with `enable_thinking: false` where possible, or (True) by their default."""
    tokenizer._mlxft_thinking = thinking


def thinking_of(tokenizer: Any) -> bool:
    """Return what `set_thinking` has set; default True."""
    return bool(getattr(tokenizer, "_mlxft_thinking", True))


def needs_thinking_off(tokenizer: Any, messages: Sequence[Message], tools: Tools | None) -> bool:
    """Return whether the last turn follows its generation prompt only with `enable_thinking: false`."""

    def check(chat: Chat) -> bool:
        if not chat.render(messages).startswith(chat.render(messages[:-1], generation=True)):
            raise NotAPrefix("the turn")
        return chat.thinking is False

    try:
        return by_template(tokenizer, messages, tools, "", check)
    except DataError:
        return False


def set_day(tokenizer: Any, day: date) -> None:
    """Let templates that write the date write this one."""
    tokenizer._mlxft_day = day


def day_of(tokenizer: Any) -> str:
    """Return the day that the tokenizer's template writes, as 2026-11-26; "" if it writes none."""
    if "strftime_now" not in str(getattr(tokenizer, "chat_template", None)):
        return ""
    return str(getattr(tokenizer, "_mlxft_day", None) or date.today())


_day: ContextVar[date | None] = ContextVar("day", default=None)  # that the template being rendered writes


def _strftime_now(format: str) -> str:
    """Format the time for a template: noon of the day that `set_day` has set, or else now."""
    day = _day.get()
    return (datetime.now() if day is None else datetime(day.year, day.month, day.day, 12)).strftime(format)


def _render_with_nulls(
    tokenizer: Any, messages: list[Message], tools: Tools | None, generation: bool, options: dict[str, Any]
) -> str:
    """Render as `apply_chat_template` does, but keep keys with null, which that function removes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    named = options.pop("chat_template", None)
    options.setdefault("enable_thinking", bool(getattr(tokenizer, "has_thinking", False)))
    texts, _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=named or inner.get_chat_template(None, tools),
        add_generation_prompt=generation,
        **{**inner.special_tokens_map, **options},
    )
    return str(texts[0])


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _is_in(part: str, text: str) -> bool:
    """Return whether a text has a part of a row, as it is or as a JSON string; white space may differ."""
    if part.strip() in text:
        return True
    squeezed = _squeezed(text)
    forms = (part, _dumps(part)[1:-1], json.dumps(part)[1:-1])
    return any(_squeezed(form) in squeezed for form in forms)


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value of a call's arguments and everything in it, keys included."""
    yield value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner)


@lru_cache(maxsize=64)
def _tail_of(chat: Chat, template: str) -> str:
    turns = [{"role": role, "content": f"textqz{i}x"} for i, role in enumerate(("user", "assistant", "user"))]
    try:
        whole, longer = chat.render(turns[:2]), chat.render(turns)
    except DataError:
        return ""
    head, answer, rest = whole.partition("textqz1x")
    if longer.startswith(whole) or not answer or not longer.startswith(head + answer):
        return ""
    marks = _marks(chat.tokenizer, special_ids(chat.tokenizer)[0])
    ending = re.match(rf"\s*({'|'.join(map(re.escape, marks))})", rest) if marks else None
    if ending is None or not longer.startswith(head + answer + ending[0]):
        return ""
    return rest[len(ending[0]) :]


# Names of closing and opening tokens differ by: </tool_call>, [/THINK], <|END_ACTION|>, ...calls▁end.
_PAIRED = (("</", "<"), ("[/", "["), ("END", "START"), ("END", "BEGIN"), ("end", "start"), ("end", "begin"))


def special_ids(tokenizer: Any) -> tuple[frozenset[int], dict[int, int]]:
    """Return control tokens (named or marked as special, and every EOS), and the opening token of each closing one."""
    return _special_ids(tokenizer, frozenset(getattr(tokenizer, "eos_token_ids", ())))


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any, eos_token_ids: frozenset[int]) -> tuple[frozenset[int], dict[int, int]]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if getattr(token, "special", False)}
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    named = (index for index in getattr(tokenizer, "all_special_ids", ()) if index is not None)
    special = frozenset(marked.union(named, eos_token_ids, eos))
    names = {str(token): index for index, token in added.items()}
    openers = {
        index: names[opener]
        for name, index in names.items()
        for closes, opens in _PAIRED
        if closes in name and (opener := name.replace(closes, opens)) in names
    }
    return special, openers


@lru_cache(maxsize=8)
def _marks(tokenizer: Any, ids: frozenset[int]) -> tuple[str, ...]:
    return tuple(sorted((str(tokenizer.convert_ids_to_tokens(i)) for i in ids), key=len, reverse=True))


@lru_cache(maxsize=1024)
def _dropped_of(chat: Chat, template: str, row: str) -> str | None:
    """Return which part of a row of unique words, as JSON, a template drops.

    A template that refuses such words (it may need JSON, or known names) is not checked.
    """
    messages, tools = parse_json(row)
    try:
        text = replace(chat, tools=tools).render(messages)
    except DataError:
        return None
    for i, message in enumerate(messages):
        if message["content"] not in text:
            return f"messages[{i}] has role {message['role']} and content"
        functions = [call["function"] for call in message.get("tool_calls", ())]
        if any(word not in text for f in functions for word in (f["name"], *chain(*f["arguments"].items()))):
            return f"messages[{i}] calls a tool"
    return None if all(_tool_name(tool) in text for tool in tools or ()) else "the row has tools"


def _tool_name(tool: Mapping[str, Any]) -> str:
    inner = tool.get("function")
    return str((inner if isinstance(inner, dict) else tool).get("name", ""))


def _stand_in(index: int, message: Message) -> Message:
    """Return a message with the same parts, made of words that are in no template."""
    made: Message = {"role": message["role"], "content": f"textqz{index}x" if message["content"].strip() else ""}
    if any(message.get(key) for key in THOUGHTS):
        made["reasoning_content"] = "thoughtqzx"
    # Nine letters, as Mistral's templates require of an id.
    made |= dict.fromkeys([key for key in ("name", "tool_call_id") if key in message], "callqzxid")
    calls = [f"callqz{index}n{k}x" for k in range(len(message.get("tool_calls", ())))]
    functions = [{"name": f"{call}name", "arguments": {f"{call}key": f"{call}value"}} for call in calls]
    if functions:
        made["tool_calls"] = [{"id": "callqzxid", "type": "function", "function": f} for f in functions]
    return made
