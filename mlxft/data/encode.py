"""Items to token ids, and which of the tokens are trained.

The mask of a chat comes from its template, turn by turn: what the template gives for the turns before an assistant turn
with its generation prompt is what the model sees when it answers; what the template adds for the turn is what it must
learn to say, up to and including the token that ends the turn. Where a template renders a turn otherwise later on
(reasoning models drop the thoughts of earlier turns), each turn becomes a row of its own. Where no prefix can be found
at all, the row is refused: a wrong mask trains the wrong thing and shows in no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from mlxft.data.formats import Completion, Conversation, Item, Message, Text
from mlxft.errors import ConfigError, DataError, nearest

Ids: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]

T = TypeVar("T")

TRAIN_ON = ("assistant", "last", "completion", "all")


class Encoded(NamedTuple):
    """A row ready to train on.

    Attributes:
        ids: (T,) int32.
        trained: (T,) bool; `trained[t]` says that token t is a target, predicted from the tokens before it. The first
            token never is.
        where: where the row stood, for messages.
    """

    ids: Ids
    trained: Mask
    where: str


class _Tokens(NamedTuple):
    """A text's ids, and where each token starts and ends in it (None when the tokenizer does not say)."""

    text: str
    ids: list[int]
    starts: npt.NDArray[np.int64] | None
    ends: npt.NDArray[np.int64] | None


class _Turn(NamedTuple):
    """Positions [first, stop) of what an assistant turn generates; closed when it ends with an end-of-turn token."""

    first: int
    stop: int
    closed: bool


class _NotAPrefix(Exception):
    """The template does not render a turn as its own generation prompt begins it."""


@dataclass(frozen=True)
class _Chat:
    """A tokenizer's chat template, with what each call of it is given for one row."""

    tokenizer: Any
    tools: list[dict[str, Any]] | None
    where: str
    options: dict[str, Any]

    def render(self, messages: list[Message], generation: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            # mlx-lm's own templates, which are functions, do not all take a `tools` that is None.
            tools = {} if self.tools is None else {"tools": self.tools}
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **tools, **self.options
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as exc:
            raise DataError(
                f"{self.where}: the chat template refuses these messages: {str(exc).strip() or type(exc).__name__}; "
                "change the row, or set model.chat_template to one that takes them"
            ) from exc
        return str(text)


def encode(item: Item, tokenizer: Any, where: str, train_on: str, chat: bool = True) -> list[Encoded]:
    """Token ids and mask of one item; several where a chat template renders each turn's history differently.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper, or anything with its `apply_chat_template`, `encode`, `decode`,
            `eos_token_id` and `has_chat_template`.
        where: the row's place, for messages.
        train_on: "assistant", every assistant turn; "last" or "completion", the final one; "all", every token.
            A message's `weight: 0` turns its turn off. A Text is trained whole, whatever this says; of a raw
            Completion every value but "all" trains the completion and its EOS.
        chat: whether a Completion becomes a user and an assistant turn when there is a chat template.
    Raises:
        ConfigError: an unknown `train_on`, or a conversation with `chat` off.
        DataError: no chat template for a conversation, or one by which it can not be masked rightly.
    """
    if train_on not in TRAIN_ON:
        hint = nearest(train_on, TRAIN_ON)
        raise ConfigError(f"data.train_on is {train_on!r}; expected one of {', '.join(TRAIN_ON)}{hint}")
    if isinstance(item, Text):
        return [_text(item, tokenizer, where)]
    if isinstance(item, Completion):
        if not (chat and tokenizer.has_chat_template):
            return [_completion(item, tokenizer, where, train_on)]
        turns = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.completion}]
        item = Conversation(turns)
    if not isinstance(item, Conversation):
        raise ConfigError(f"{where}: rows of prompts or of judged answers have no answers to train on by imitation")
    conversation = item
    return _by_template(tokenizer, item.tools, where, chat, lambda chat: _conversation(conversation, chat, train_on))


class Reply(NamedTuple):
    """A prompt and one answer to it, as (P,) and (R,) int32: the answer with the token that ends it."""

    prompt: Ids
    reply: Ids


def encode_reply(
    prompt: str | list[Message],
    reply: str | Message,
    tokenizer: Any,
    where: str,
    tools: list[dict[str, Any]] | None = None,
    chat: bool = True,
) -> Reply:
    """The prompt's ids as they stand when a model answers it, and those of an answer; arguments as for `encode`.

    The prompt's ids do not depend on the answer: where a token would span the two, they are tokenised apart.
    """
    if isinstance(prompt, str) and isinstance(reply, str):
        if not (chat and tokenizer.has_chat_template):
            row = _completion(Completion(prompt, reply), tokenizer, where, "last")
            first = int(np.argmax(row.trained))
            return Reply(row.ids[:first], row.ids[first:])
        prompt, reply = [{"role": "user", "content": prompt}], {"role": "assistant", "content": reply}
    if isinstance(prompt, str) or isinstance(reply, str):
        raise AssertionError("a text is answered by a text, messages by a message")
    messages = [*prompt, reply]
    return _by_template(tokenizer, tools, where, chat, lambda chat: _reply(messages, chat))


def _reply(messages: list[Message], chat: _Chat) -> Reply:
    before, text = chat.render(messages[:-1], generation=True), chat.render(messages)
    if not text.startswith(before):
        raise _NotAPrefix("the answer is not rendered as its generation prompt begins it")
    prompt, ids = _tokenise(chat.tokenizer, before).ids, _tokenise(chat.tokenizer, text).ids
    spans = ids[: len(prompt)] != prompt
    reply = _tokenise(chat.tokenizer, text[len(before) :]).ids if spans else ids[len(prompt) :]
    special = _special_ids(chat.tokenizer, frozenset(getattr(chat.tokenizer, "eos_token_ids", ())))
    end = _end_of_turn(chat.tokenizer, reply, 0, len(reply), special)
    reply = [*reply, _eos(chat.tokenizer, chat.where)] if end is None else reply[: end + 1]
    return Reply(np.asarray(prompt, dtype=np.int32), np.asarray(reply, dtype=np.int32))


def _by_template(
    tokenizer: Any, tools: list[dict[str, Any]] | None, where: str, chat: bool, encode: Callable[[_Chat], T]
) -> T:
    if not chat:
        raise ConfigError(
            f"{where}: a conversation can not be encoded without its chat template; set data.template: auto, or write "
            "prompt and answers as texts"
        )
    if not tokenizer.has_chat_template:
        raise DataError(
            f"{where}: a conversation needs a chat template, and this tokenizer has none (base models have none): "
            "use data.format: text or prompt-completion, or set model.chat_template; a judged prompt and its answers "
            "may be texts too"
        )
    try:
        return encode(_Chat(tokenizer, tools, where, {}))
    except _NotAPrefix:
        pass
    try:
        # Templates of reasoning models may open a thought in the generation prompt that the turn itself does not have.
        return encode(_Chat(tokenizer, tools, where, {"enable_thinking": False}))
    except _NotAPrefix as exc:
        raise DataError(
            f"{where}: {exc}; this chat template changes what the model generated (reasoning models drop thoughts), "
            "so the turn can not be masked rightly: give the turn its thoughts (reasoning_content), set "
            "model.chat_template to one that keeps a turn as generated, or prepare whole texts for data.format: text"
        ) from exc


def _text(item: Text, tokenizer: Any, where: str) -> Encoded:
    ids = _with_bos(tokenizer, item.text)
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return _encoded(ids, [(1, len(ids))], where)


def _completion(item: Completion, tokenizer: Any, where: str, train_on: str) -> Encoded:
    prompt, whole = _with_bos(tokenizer, item.prompt), _with_bos(tokenizer, item.prompt + item.completion)
    if whole[: len(prompt)] != prompt:
        # A token would span the two. At inference the prompt stands alone: so it does here.
        whole = prompt + list(tokenizer.encode(item.completion, add_special_tokens=False))
    eos = _eos(tokenizer, where)
    if whole[-1] != eos:
        whole.append(eos)
    return _encoded(whole, [(1 if train_on == "all" else len(prompt), len(whole))], where)


def _with_bos(tokenizer: Any, text: str) -> list[int]:
    """Ids with the BOS that the tokenizer adds by itself, if it does, and without an EOS that it adds."""
    ids = list(tokenizer.encode(text))
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] == [eos] and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    return ids


def _eos(tokenizer: Any, where: str) -> int:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"{where}: the tokenizer has no EOS token, so a model could not learn to stop; set its eos_token"
        )
    return int(eos)


def _encoded(ids: list[int], spans: list[tuple[int, int]], where: str, off: list[_Turn] | None = None) -> Encoded:
    trained = np.zeros(len(ids), dtype=np.bool_)
    for first, stop in spans:
        trained[first:stop] = True
    for turn in off or []:
        trained[turn.first : turn.stop] = False
    # Nothing stands before the first token to predict it from.
    trained[:1] = False
    return Encoded(np.asarray(ids, dtype=np.int32), trained, where)


def _conversation(item: Conversation, chat: _Chat, train_on: str) -> list[Encoded]:
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in item.messages]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on in ("last", "completion"):
        turns = turns[-1:]
    wanted = [i for i in turns if item.messages[i].get("weight", 1) != 0]
    watched = turns if train_on == "all" else wanted
    whole = _tokenise(chat.tokenizer, chat.render(messages))
    final = len(messages) - 1
    found: dict[int, _Turn | None] = {}
    for i in watched:
        ended = whole.text if i == final else chat.render(messages[: i + 1])
        found[i] = _find(chat, whole, chat.render(messages[:i], generation=True), ended, i)
        if found[i] is None:
            break
    if all(found.values()):
        located = {i: turn for i, turn in found.items() if turn is not None}
        ids, located = _closed(whole.ids, located, final, chat)
        if train_on == "all":
            return [_encoded(ids, [(1, len(ids))], chat.where, [located[i] for i in turns if i not in wanted])]
        return [_encoded(ids, [located[i][:2] for i in wanted], chat.where)]
    if train_on == "all":
        raise DataError(
            f"{chat.where}: this chat template rewrites earlier turns (reasoning models drop their thoughts), so no "
            "one row holds every token as it was generated; use data.train_on: assistant or last"
        )
    return [_one_turn(messages[: i + 1], chat) for i in wanted]


def _one_turn(messages: list[Message], chat: _Chat) -> Encoded:
    """The conversation up to its last turn, with only that turn trained."""
    final = len(messages) - 1
    whole = _tokenise(chat.tokenizer, chat.render(messages))
    turn = _find(chat, whole, chat.render(messages[:-1], generation=True), whole.text, final)
    if turn is None:
        raise AssertionError("a text is always a prefix of itself")
    ids, located = _closed(whole.ids, {final: turn}, final, chat)
    return _encoded(ids, [located[final][:2]], chat.where)


def _closed(ids: list[int], turns: dict[int, _Turn], final: int, chat: _Chat) -> tuple[list[int], dict[int, _Turn]]:
    """With an EOS after the final turn when the template ends it with no token of its own."""
    if final not in turns or turns[final].closed:
        return ids, turns
    ids = [*ids, _eos(chat.tokenizer, chat.where)]
    return ids, {**turns, final: _Turn(turns[final].first, len(ids), True)}


def _find(chat: _Chat, whole: _Tokens, prompt: str, ended: str, index: int) -> _Turn | None:
    """The turn within `whole`, given the text before it and the text up to its end.

    Returns:
        None where `whole` renders the turn, or what stands before it, otherwise.
    Raises:
        _NotAPrefix: `ended` itself does not begin with `prompt`.
    """
    if not ended.startswith(prompt):
        raise _NotAPrefix(f"messages[{index}] is not rendered as its generation prompt begins it")
    if not whole.text.startswith(prompt):
        return None
    special = _special_ids(chat.tokenizer, frozenset(getattr(chat.tokenizer, "eos_token_ids", ())))
    if whole.text.startswith(ended):
        first, stop = _from(chat, whole, len(prompt)), _until(chat, whole, len(ended))
        if stop is None:
            return None
        end = _end_of_turn(chat.tokenizer, whole.ids, first, stop, special)
        return _Turn(first, stop, False) if end is None else _Turn(first, end + 1, True)
    # What follows the end-of-turn token may differ, and some templates write that token only after the last turn.
    part = _tokenise(chat.tokenizer, ended)
    first = _from(chat, part, len(prompt))
    end = _end_of_turn(chat.tokenizer, part.ids, first, len(part.ids), special)
    if end is None or whole.ids[:end] != part.ids[:end]:
        return None
    closed = whole.ids[end : end + 1] == part.ids[end : end + 1]
    return _Turn(first, end + closed, closed)


def _tokenise(tokenizer: Any, text: str) -> _Tokens:
    """Ids of a rendered chat, as the template's own tokenisation gives them, with character offsets where there are."""
    # mlx-lm's wrapper can not be called; the tokenizer within it can, and only the call gives offsets.
    inner = tokenizer if callable(tokenizer) else getattr(tokenizer, "_tokenizer", None)
    if not callable(inner) or not getattr(inner, "is_fast", False):
        return _Tokens(text, list(tokenizer.encode(text, add_special_tokens=False)), None, None)
    out = inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    if np.any(offsets[1:] < offsets[:-1]):
        # Not in order: these offsets mean something else.
        return _Tokens(text, list(out["input_ids"]), None, None)
    return _Tokens(text, list(out["input_ids"]), offsets[:, 0], offsets[:, 1])


def _from(chat: _Chat, tokens: _Tokens, char: int) -> int:
    """Index of the first token that begins at or after a character."""
    if tokens.starts is None or tokens.ends is None:
        head = _tokenise(chat.tokenizer, tokens.text[:char]).ids
        if tokens.ids[: len(head)] != head:
            raise DataError(
                f"{chat.where}: a token spans the beginning of an assistant turn, and this tokenizer does not say "
                "where its tokens begin; use a fast tokenizer (tokenizer.json), or data.format: text"
            )
        return len(head)
    index = int(np.searchsorted(tokens.starts, char))
    if index > 0 and tokens.ends[index - 1] < char:
        # White space before the character is in no token's offsets. Either the tokenizer drops it, or it trims it from
        # the offsets of a token that has it: only the ids of the text before can tell.
        head = _tokenise(chat.tokenizer, tokens.text[:char]).ids
        return len(head) if tokens.ids[: len(head)] == head else min(index + 1, len(tokens.ids))
    return index


def _until(chat: _Chat, tokens: _Tokens, char: int) -> int | None:
    """How many tokens end at or before a character; None when the tokenizer does not let us know."""
    if char == len(tokens.text):
        return len(tokens.ids)
    if tokens.ends is None:
        head = _tokenise(chat.tokenizer, tokens.text[:char]).ids
        return len(head) if tokens.ids[: len(head)] == head else None
    return int(np.searchsorted(tokens.ends, char, side="right"))


def _end_of_turn(tokenizer: Any, ids: list[int], first: int, stop: int, special: frozenset[int]) -> int | None:
    """Position of the last special token in [first, stop), if only white space follows it there."""
    for index in range(stop - 1, first - 1, -1):
        if ids[index] in special:
            rest = ids[index + 1 : stop]
            return index if not rest or not tokenizer.decode(rest).strip() else None
    return None


@lru_cache(maxsize=4)
def _special_ids(tokenizer: Any, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Control tokens: what the tokenizer names or marks as special, and every EOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if getattr(token, "special", False)}
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return frozenset(marked.union(getattr(tokenizer, "all_special_ids", ()), eos_token_ids, eos))
