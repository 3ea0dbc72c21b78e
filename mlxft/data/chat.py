"""A tokenizer's chat template: messages to text, and every part of a row found again in that text.

A template is a program of the model's makers. It may drop what it does not know (tool calls, a system turn, thoughts),
and it may take tool calls in one form only. So the forms that people's rows come in are tried, and a row of which no
form is written whole is refused: what is missing from the text cannot be learnt, and shows in no loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, TypeVar

from mlxft.data.formats import ROLES, WRITTEN, Message
from mlxft.data.thoughts import answer_of, opening_of, split_thoughts
from mlxft.errors import DataError

T = TypeVar("T")

Tools = list[dict[str, Any]]
# Names that a message's thoughts go by; templates read one of them.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class NotAPrefix(Exception):
    """The template does not render a turn as its own generation prompt begins it."""


class Unwritten(DataError):
    """The template does not write a part of the row, or refuses the row.

    Attributes:
        reached: how much of the row was found before; of several forms' errors the furthest is the reason.
    """

    reached = 0


class Form(NamedTuple):
    """How tool calls and tools are handed to a template.

    Attributes:
        text_arguments: the arguments of calls as JSON text, not as a mapping.
        null_content: the content of a turn that only calls is null, not "".
        wrapped_tools: each tool within {"type": "function", "function": ...}, where the row has it bare.
    """

    text_arguments: bool = False
    null_content: bool = False
    wrapped_tools: bool = False


USUAL = Form()


@dataclass(frozen=True)
class Chat:
    """The template with what each call of it is given for one row.

    Attributes:
        tokenizer: mlx-lm's TokenizerWrapper, or anything with its `apply_chat_template`.
        where: the row's place, for messages; "" where there is none.
        uses_tools: whether the row has tools or calls, so that a template named `tool_use` is its template.
        thinking: `enable_thinking`; None is the tokenizer's own choice.
    """

    tokenizer: Any
    tools: Tools | None
    where: str
    uses_tools: bool = False
    form: Form = USUAL
    thinking: bool | None = None

    def error(self, text: str, reached: int = 0) -> Unwritten:
        """An error with the row's place."""
        error = Unwritten(f"{self.where}: {text}" if self.where else text)
        error.reached = reached
        return error

    @property
    def tail(self) -> str:
        """What the template writes after a whole conversation, behind the mark that ends its last turn; mostly ""."""
        template = str(getattr(self.tokenizer, "chat_template", None))
        return _tail_of(self.tokenizer, template, self.uses_tools, self.form, self.thinking)

    def render(self, messages: Sequence[Message], generation: bool = False) -> str:
        """Return the text of messages; with `generation`, up to where the next assistant turn is written.

        Raises:
            DataError: the template refuses them, with its own reason.
        """
        given = [_formed(message, self.form) for message in messages]
        tools = self.tools
        if tools is not None and self.form.wrapped_tools:
            tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        try:
            return str(self._apply(given, tools, generation))
        except Exception as exc:  # a template is a program of its own: anything may come out of it
            reason = str(exc).strip() or type(exc).__name__
            raise self.error(
                f"the chat template refuses these messages: {reason}; change the row, or set model.chat_template to "
                "one that takes them"
            ) from exc

    def _apply(self, messages: list[Message], tools: Tools | None, generation: bool) -> Any:
        bound_templates()
        options: dict[str, Any] = {}
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            # transformers goes by the list of tools alone; a row with calls needs the template that writes them.
            template = template.get("tool_use" if self.uses_tools and "tool_use" in template else "default")
            options |= {} if template is None else {"chat_template": template}
        day: date | None = getattr(self.tokenizer, "_mlxft_day", None)
        if day is not None and isinstance(template, str) and (clock := _clock(template, day)):
            options["chat_template"] = clock + template
        if self.thinking is not None:
            options["enable_thinking"] = self.thinking
        if self.form.null_content:
            return _render_with_nulls(self.tokenizer, messages, tools, generation, options)
        if tools is not None:  # mlx-lm's own templates, which are functions, do not all take a `tools` that is None
            options["tools"] = tools
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **options)

    @staticmethod
    def turn(prompt: str, ended: str) -> str:
        """Return a turn's text, with the mark of the thought that its generation prompt has opened already."""
        return opening_of(prompt) + ended[len(prompt) :]

    def check_written(self, messages: Sequence[Message], text: str, trained: Mapping[int, str]) -> None:
        """Find every part of a row in its rendered text.

        Args:
            text: what `render` gave for the messages, or what begins with it.
            trained: index of a trained turn -> the part of the text that is the turn; see `turn`.
        Raises:
            DataError: the first part that is missing, by turn and name.
        """
        for i, message in enumerate(messages):
            turn = trained.get(i)
            self._check_turn(i, message, text if turn is None else turn, turn is not None)
        for tool in self.tools or ():
            inner = tool.get("function")
            name = str((inner if isinstance(inner, dict) else tool).get("name", ""))
            if not _is_in(name, text):
                raise self.error(
                    f"tools has {name!r}, which this chat template does not write: {_ADVICE}", len(messages) + 1
                )
        if dropped := self._dropped(messages):
            raise self.error(f"{dropped}, which this chat template does not write: {_ADVICE}", len(messages) + 2)

    def _check_turn(self, index: int, message: Message, text: str, trained: bool) -> None:
        at, content = f"messages[{index}]", str(message.get("content") or "")
        bos = getattr(self.tokenizer, "bos_token", None)
        if bos and content.startswith(str(bos)):
            raise self.error(
                f"{at} begins with {bos}, which the chat template writes itself: this text has been through a template "
                "already; set data.template: none, or take the marks out",
                index + 1,
            )
        if trained and (mark := self._ends_twice(content.strip(), text)):
            raise self.error(
                f"{at} ends with {mark}, which the chat template writes behind it as well: take it out of the row, or "
                "set data.template: none if the rest of the row has its marks too",
                index + 1,
            )
        if trained and split_thoughts(content)[0] and (key := next(filter(message.get, THOUGHTS), None)):
            raise self.error(f"{at} has thoughts in content and in {key}; keep one of them", index + 1)
        answer = answer_of(content) if message["role"] == "assistant" else content
        thoughts = [content] if trained else []
        thoughts += [message[key] for key in THOUGHTS if trained and isinstance(message.get(key), str)]
        problem = None
        if not _is_in(answer, text):
            problem = f"({message['role']}) has content, {_NOT_WRITTEN}"
        elif not all(_is_in(part, text) for part in thoughts):
            problem = (
                "has thoughts that this chat template does not write into the turn; take them out of the row, or set "
                "model.chat_template to one that keeps them"
            )
        for call in message.get("tool_calls", ()):
            problem = problem or self._lost_of_call(call["function"], text)
        if problem:
            raise self.error(f"{at} {problem}", index + 1)

    def _ends_twice(self, content: str, turn: str) -> str | None:
        """The token that ends both the content of a turn and, behind that, the turn; None where there is none."""
        marks = _marks(self.tokenizer, special_ids(self.tokenizer)[0])
        if not content.endswith(marks):
            return None
        rest = turn.rpartition(content)[2].lstrip()
        return next((mark for mark in marks if content.endswith(mark) and rest.startswith(mark)), None)

    def _lost_of_call(self, function: Mapping[str, Any], text: str) -> str | None:
        """What of a call is not in a text, or not as it should be; None where all is."""
        name, arguments = function["name"], function["arguments"]
        # Text that stands there as the row wrote it holds all its values, however they are spelt: 1e5, \u00FC, \/.
        as_text = self.form.text_arguments
        missing = next(
            (part for part in (name, *(() if as_text else _leaves(arguments))) if not _is_in(part, text)), None
        )
        if missing is not None:
            what = f"calls {name}" if missing == name else f"calls {name} with {missing!r}"
            return f"{what}, {_NOT_WRITTEN}"
        if as_text:
            if _text_of(function).strip() in text:
                return None
            return f"calls {name}, whose arguments this chat template does not write as they are: {_ADVICE}"
        written = _squeezed(text)
        for part in _containers(arguments):
            as_json, as_python = _dumps(part), repr(part)
            if _squeezed(as_python) in written and _squeezed(as_json) not in written:
                return f"calls {name}, and this chat template writes {as_python} for {as_json}: {_ADVICE}"
        return None

    def _dropped(self, messages: Sequence[Message]) -> str | None:
        """What the template drops of any row of this shape, in words; short texts may stand in others by chance."""
        template = getattr(self.tokenizer, "chat_template", None)
        shape = tuple(_shape(message) for message in messages)
        tools = None if self.tools is None else tuple("function" in tool for tool in self.tools)
        return _dropped_of(self.tokenizer, str(template), tools, shape, self.uses_tools, self.form, self.thinking)


_ADVICE = "change the row, or set model.chat_template to one that does"
_NOT_WRITTEN = f"which this chat template does not write: {_ADVICE}"


def by_template(
    tokenizer: Any, messages: Sequence[Message], tools: Tools | None, where: str, encode: Callable[[Chat], T]
) -> T:
    """Return what `encode` makes of the first form of a row that the template writes whole.

    Raises:
        DataError: no form is; the reason is that of the row as it stands.
    """
    uses_tools = bool(tools) or any("tool_calls" in m or m["role"] == "tool" for m in messages)
    failed: list[tuple[Chat, Unwritten | NotAPrefix]] = []
    # Templates of reasoning models may open a thought in the generation prompt that the turn itself does not have.
    for form, thinking in product(_forms(messages, tools), (None, False) if thinking_of(tokenizer) else (False, None)):
        chat = Chat(tokenizer, tools, where, uses_tools, form, thinking)
        try:
            return encode(chat)
        except (Unwritten, NotAPrefix) as exc:
            failed.append((chat, exc))
    # Where a turn follows its prompt with one choice of thinking, that it does not with the other is no reason.
    follows = {chat.form for chat, exc in failed if isinstance(exc, Unwritten) and exc.reached}
    errors = [
        exc if isinstance(exc, Unwritten) else _apart(chat, messages, str(exc))
        for chat, exc in failed
        if isinstance(exc, Unwritten) or chat.form not in follows
    ]
    raise max(errors, key=lambda error: error.reached)


def _apart(chat: Chat, messages: Sequence[Message], what: str) -> Unwritten:
    """Why no turn begins as its generation prompt does, as far as it can be found out, and the way out."""
    last = len(messages) - 1
    text = chat.render(messages)
    try:
        # Where the template has no place for thoughts that the row has, that is the reason.
        chat.check_written(messages, text, {last: text} if messages[last]["role"] == "assistant" else {})
    except Unwritten as exc:
        return exc
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and chat.render(messages[: i + 1]) == chat.render(messages[:i]):
            return chat.error(
                f"messages[{i}] is an empty turn, which this chat template leaves out: take it out of the row, or set "
                "model.chat_template to one that writes it",
                i + 1,
            )
    word = "thoughtqzx"
    given = [{**m, THOUGHTS[0]: word} if m["role"] == "assistant" else m for m in messages]
    ways = ["give the turn its thoughts (reasoning_content)"] if word in chat.render(given) else []
    ways += ["set model.chat_template to one that keeps a turn as generated"]
    return chat.error(
        f"{what}; this chat template changes what the model generated (reasoning models open a thought that their "
        f"template drops), so the turn cannot be masked rightly: {', '.join(ways)}, or prepare whole texts for "
        "data.format: text",
        len(messages) + 3,
    )


def _forms(messages: Sequence[Message], tools: Tools | None) -> Iterator[Form]:
    """The forms of a row, the usual one first; one where there are neither calls nor bare tools."""
    calls = any("tool_calls" in message for message in messages)
    silent = any("tool_calls" in message and not message["content"] for message in messages)
    bare = any("function" not in tool for tool in tools or ())
    for wrapped, null, text in product((False, True), repeat=3):
        if wrapped <= bare and null <= silent and text <= calls:
            yield Form(text, null, wrapped)


def _formed(message: Message, form: Form) -> Message:
    """A message as a template is given it."""
    # Of empty thoughts Qwen3's template takes note, and then leaves those in the content where they stand.
    given = {key: value for key, value in message.items() if key != "weight" and (value or key not in THOUGHTS)}
    thoughts = next((given[key] for key in THOUGHTS if key in given), None)
    if thoughts is not None:
        given |= dict.fromkeys(THOUGHTS[:2], thoughts)
    if "tool_calls" in given:
        given["tool_calls"] = [{**call, "function": _function(call["function"], form)} for call in given["tool_calls"]]
        if form.null_content and not given["content"]:
            given["content"] = None
    return given


def _function(function: Mapping[str, Any], form: Form) -> dict[str, Any]:
    given = {key: value for key, value in function.items() if key != WRITTEN}
    return {**given, "arguments": _text_of(function)} if form.text_arguments else given


def _text_of(function: Mapping[str, Any]) -> str:
    """A call's arguments as JSON text: as the row wrote them, if it wrote text."""
    return str(function.get(WRITTEN) or _dumps(function["arguments"]))


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def complete_template(tokenizer: Any) -> None:
    """Add a generation prompt to a chat template that has none, and take note of it (see `template_notes`).

    Without it the marks that open an assistant turn would be trained as a part of the answer. They are what the
    template writes between a user turn and the content of the answer; one whose user turns end with them needs none.
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
        except Exception:  # a template that wants more of a conversation than this has what it needs
            continue
        opening, content, _ = whole.removeprefix(before).partition("textqz1x")
        if whole.startswith(before) and content and opening.strip():
            named = {**named, name: f"{text}{{% if add_generation_prompt %}}{{{{ {_dumps(opening)} }}}}{{% endif %}}"}
            tokenizer._mlxft_notes = [
                f"the chat template has no generation prompt; {opening!r} is added to it, and kept with the result"
            ]
            tokenizer.chat_template = named if isinstance(found, dict) else named["default"]


def template_notes(tokenizer: Any) -> list[str]:
    """What `complete_template` did, a sentence each."""
    return list(getattr(tokenizer, "_mlxft_notes", ()))


def set_thinking(tokenizer: Any, thinking: bool) -> None:
    """Let chat templates be rendered with `enable_thinking: false` where they can be, or (True) as they are."""
    tokenizer._mlxft_thinking = thinking


def thinking_of(tokenizer: Any) -> bool:
    """Return False where `set_thinking` has said so."""
    return bool(getattr(tokenizer, "_mlxft_thinking", True))


def needs_thinking_off(tokenizer: Any, messages: Sequence[Message], tools: Tools | None) -> bool:
    """Tell whether the last turn follows its generation prompt with `enable_thinking: false` only."""

    def check(chat: Chat) -> bool:
        if not chat.render(messages).startswith(chat.render(messages[:-1], generation=True)):
            raise NotAPrefix("the turn")
        return chat.thinking is False

    try:
        return by_template(tokenizer, messages, tools, "", check)
    except DataError:
        return False


def set_day(tokenizer: Any, day: date) -> None:
    """Let templates that write the date write this one, whenever they are rendered."""
    tokenizer._mlxft_day = day


def day_of(tokenizer: Any) -> str:
    """The day that the tokenizer's template writes, as 2026-11-26; "" where it writes none."""
    if "strftime_now" not in str(getattr(tokenizer, "chat_template", None)):
        return ""
    return str(getattr(tokenizer, "_mlxft_day", None) or date.today())


# What a template may ask of its clock. An escaped % goes first, so that what follows it is not taken for a code.
_CODES = (
    "%%",
    *(f"%-{code}" for code in "dmyHIMSj"),
    *(f"%{code}" for code in "aAbBcCdDeFGhHIjklmMnpPrRsStTuUVwWxXyYzZ"),
)


@lru_cache(maxsize=16)
def _clock(template: str, day: date) -> str:
    """What stands before a template to make its clock stand still, at noon; "" for one that has none.

    Templates call `strftime_now`, which transformers gives them and does not let anyone replace; a macro of that name
    comes before it. No macro can format a date, so it puts what each code stands for into the format that is asked for.
    """
    if "strftime_now" not in template:
        return ""
    noon = datetime(day.year, day.month, day.day, 12)
    codes = _dumps([["%%", "\0"], *((code, noon.strftime(code)) for code in _CODES[1:]), ["\0", "%"]])
    return (
        "{%- macro strftime_now(format) %}{%- set ns = namespace(text=format) %}"
        f"{{%- for code, value in {codes} %}}{{%- set ns.text = ns.text | replace(code, value) %}}{{%- endfor %}}"
        "{{- ns.text }}{%- endmacro %}\n"  # Jinja takes this newline away
    )


def _render_with_nulls(
    tokenizer: Any, messages: list[Message], tools: Tools | None, generation: bool, options: dict[str, Any]
) -> str:
    """As `apply_chat_template`, which takes keys with null away before a template sees them."""
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
    """Whether a text holds a part of a row, as it is or as a JSON string; white space may differ."""
    if part.strip() in text:
        return True
    squeezed = _squeezed(text)
    forms = (part, _dumps(part)[1:-1], json.dumps(part)[1:-1])
    return any(_squeezed(form) in squeezed for form in forms)


def _leaves(value: Any) -> Iterator[str]:
    """The keys and the texts, numbers and truth values of a call's arguments; null may be left out by a template."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):  # True is true in JSON and True in Python
        yield _dumps(value)


def _containers(value: Any) -> Iterator[Any]:
    """The objects and lists of a call's arguments that hold something, at every depth."""
    if isinstance(value, Mapping | list) and value:
        yield value
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _containers(inner)


class _Shape(NamedTuple):
    """What of a message a template may look at, beside its texts."""

    role: str
    content: bool
    thoughts: bool
    calls: int
    keys: tuple[str, ...]


def _shape(message: Message) -> _Shape:
    thoughts = any(message.get(key) for key in THOUGHTS)
    keys = tuple(key for key in ("name", "tool_call_id") if key in message)
    return _Shape(message["role"], bool(message["content"].strip()), thoughts, len(message.get("tool_calls", ())), keys)


@lru_cache(maxsize=64)
def _tail_of(tokenizer: Any, template: str, uses_tools: bool, form: Form, thinking: bool | None) -> str:
    """See `Chat.tail`: what a turn is followed by at the end of a conversation and not within it, where a special token
    ends it in both."""
    chat = Chat(tokenizer, None, "", uses_tools, form, thinking)
    turns = [{"role": role, "content": f"textqz{i}x"} for i, role in enumerate(("user", "assistant", "user"))]
    try:
        whole, longer = chat.render(turns[:2]), chat.render(turns)
    except DataError:
        return ""
    head, answer, rest = whole.partition("textqz1x")
    if longer.startswith(whole) or not answer or not longer.startswith(head + answer):
        return ""
    marks = _marks(tokenizer, special_ids(tokenizer)[0])
    ending = re.match(rf"\s*({'|'.join(map(re.escape, marks))})", rest) if marks else None
    if ending is None or not longer.startswith(head + answer + ending[0]):
        return ""
    return rest[len(ending[0]) :]


# How the names of tokens that close differ from those that open: </tool_call>, [/THINK], <|END_ACTION|>, ...calls▁end.
_PAIRED = (("</", "<"), ("[/", "["), ("END", "START"), ("END", "BEGIN"), ("end", "start"), ("end", "begin"))


def special_ids(tokenizer: Any) -> tuple[frozenset[int], dict[int, int]]:
    """Control tokens: what the tokenizer names or marks as special, and every EOS; and what opens those that close."""
    return _special_ids(tokenizer, frozenset(getattr(tokenizer, "eos_token_ids", ())))


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any, eos_token_ids: frozenset[int]) -> tuple[frozenset[int], dict[int, int]]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if getattr(token, "special", False)}
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    named = (index for index in getattr(tokenizer, "all_special_ids", ()) if index is not None)  # a token it has not
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
    """The texts of control tokens, the longest first."""
    return tuple(sorted((str(tokenizer.convert_ids_to_tokens(i)) for i in ids), key=len, reverse=True))


@lru_cache(maxsize=1024)
def _dropped_of(
    tokenizer: Any,
    template: str,
    tools: tuple[bool, ...] | None,
    shapes: tuple[_Shape, ...],
    uses_tools: bool,
    form: Form,
    thinking: bool | None,
) -> str | None:
    """Which part of a row of these shapes a template drops: each part is a word that stands nowhere else.

    A template that refuses such words (it may want JSON, or names it knows) is not asked further.
    """
    words = [[f"textqz{i}x", *(f"callqz{i}n{k}x" for k in range(shape.calls))] for i, shape in enumerate(shapes)]
    names = [f"toolqz{i}x" for i in range(len(tools or ()))]
    messages = [_stand_in(shape, content, calls) for shape, (content, *calls) in zip(shapes, words)]
    nothing = {"type": "object", "properties": {}}
    functions = [{"name": name, "description": "d", "parameters": nothing} for name in names]
    described = [{"type": "function", "function": f} if own else f for f, own in zip(functions, tools or ())]
    chat = Chat(tokenizer, None if tools is None else described, "", uses_tools, form, thinking)
    try:
        text = chat.render(messages)
    except DataError:
        return None
    for i, (shape, (content, *calls)) in enumerate(zip(shapes, words)):
        if shape.content and content not in text:
            return f"messages[{i}] has role {shape.role} and content"
        if any(f"{call}{part}" not in text for call in calls for part in ("name", "key", "value")):
            return f"messages[{i}] calls a tool"
    if any(name not in text for name in names):
        return "the row has tools"
    return None


def _stand_in(shape: _Shape, content: str, calls: Sequence[str]) -> Message:
    """A message of a shape, with words that stand in no template."""
    assert shape.role in ROLES
    message: Message = {"role": shape.role, "content": content if shape.content else ""}
    if shape.thoughts:
        message["reasoning_content"] = "thoughtqzx"
    # Nine letters, which is what Mistral's templates want of an id.
    message |= dict.fromkeys(shape.keys, "callqzxid")
    functions = [{"name": f"{call}name", "arguments": {f"{call}key": f"{call}value"}} for call in calls]
    if functions:
        message["tool_calls"] = [{"id": "callqzxid", "type": "function", "function": f} for f in functions]
    return message
