"""Items to token ids, and which of the tokens are trained.

The mask of a chat comes from its template, turn by turn: what the template gives for the turns before an assistant turn
with its generation prompt is what the model sees when it answers; what the template adds for the turn is what it must
learn to say, up to and including the token that ends the turn. Where a template renders a turn otherwise later on
(reasoning models drop the thoughts of earlier turns), each turn becomes a row of its own. Where no prefix can be found
at all, the row is refused: a wrong mask trains the wrong thing and shows in no loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mlxft.data.chat import (
    Chat,
    NotAPrefix,
    Tools,
    by_template,
    needs_thinking_off,
    set_thinking,
    special_ids,
    template_notes,
)
from mlxft.data.formats import Completion, Conversation, Example, Item, Judged, Message, Preference, Ranked, Text
from mlxft.errors import ConfigError, DataError, nearest

Ids: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]

TRAIN_ON = ("assistant", "last", "completion", "all")


class Encoded(NamedTuple):
    """A row ready to train on.

    Attributes:
        ids: (T,) int32.
        trained: (T,) bool; `trained[t]` says that token t is a target, predicted from the tokens before it. The first
            token never is.
        where: where the row stood, for messages.
        ends: the ids that end its trained turns.
    """

    ids: Ids
    trained: Mask
    where: str
    ends: tuple[int, ...] = ()


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
    _check_has_template(tokenizer, where, chat)
    return by_template(
        tokenizer, item.messages, item.tools, where, lambda chat: _conversation(conversation, chat, train_on)
    )


class Reply(NamedTuple):
    """A prompt and one answer to it, as (P,) and (R,) int32: the answer with the token that ends it."""

    prompt: Ids
    reply: Ids


def encode_reply(
    prompt: str | list[Message],
    reply: str | Message,
    tokenizer: Any,
    where: str,
    tools: Tools | None = None,
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
    _check_has_template(tokenizer, where, chat)
    return by_template(tokenizer, messages, tools, where, lambda chat: _reply(messages, chat))


def encode_prompt(
    prompt: str | list[Message],
    tokenizer: Any,
    *,
    system: str | None = None,
    tools: Tools | None = None,
    chat: bool = True,
    where: str = "",
) -> list[int]:
    """Return the ids of a prompt up to where the answer starts: what `encode_reply` has before the answer.

    Args:
        prompt: a text, a user turn where there is a chat template; or messages, checked (see `message_at`).
        system: text of a system turn that goes before.
        chat: whether a chat template is used; without it, or where there is none, the prompt is a text.
    Raises:
        ConfigError: `system` is given where it has no place.
        DataError: messages or tools without a chat template, messages that the template refuses or does not write,
            or a token that the model does not have.
    """
    at = f"{where}: " if where else ""
    if not (chat and tokenizer.has_chat_template):
        why = "this tokenizer has no chat template" if chat else "the chat template is not used (template: none)"
        if not isinstance(prompt, str) or tools:
            raise DataError(f"{at}{why}, so messages and tools have no form; give text, or a template")
        if system is not None:
            raise ConfigError(f"{why}, so system has no place; write it into the prompt")
        return context_ids(tokenizer, prompt, plain=True, where=where)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is not None:
        if messages and messages[0]["role"] == "system":
            raise ConfigError("system is given, and the messages start with one of their own; keep one of them")
        messages = [{"role": "system", "content": system}, *messages]
    return by_template(tokenizer, messages, tools, where, lambda chat: _prompt(messages, chat))


def prompt_text(prompt: list[Message], tokenizer: Any, *, tools: Tools | None = None, where: str = "") -> str:
    """Return the text of messages up to where the answer starts. Raises: as `encode_prompt`."""
    return by_template(tokenizer, prompt, tools, where, lambda chat: _prompt_text(prompt, chat))


def _prompt_text(messages: list[Message], chat: Chat) -> str:
    text = chat.render(messages, generation=True)
    chat.check_written(messages, text, {})
    return text


def _prompt(messages: list[Message], chat: Chat) -> list[int]:
    ids = _tokenise(chat.tokenizer, _prompt_text(messages, chat)).ids
    return check_ids(ids, chat.tokenizer, chat.where)


def _reply(messages: list[Message], chat: Chat) -> Reply:
    before, text = chat.render(messages[:-1], generation=True), chat.render(messages)
    if not text.startswith(before):
        raise NotAPrefix("the answer is not rendered as its generation prompt begins it")
    chat.check_written(messages, text, {len(messages) - 1: chat.turn(before, text)})
    tokenizer, text = chat.tokenizer, text.removesuffix(chat.tail)
    prompt, ids = _tokenise(tokenizer, before).ids, _tokenise(tokenizer, text).ids
    reply = _going_on(tokenizer, prompt, ids, text[len(before) :], chat.where)
    end = _end_of_turn(tokenizer, reply, 0, len(reply))
    reply = [*reply, _eos(tokenizer, chat.where)] if end is None else reply[: end + 1]
    check_ids([*prompt, *reply], tokenizer, chat.where)
    return Reply(np.asarray(prompt, dtype=np.int32), np.asarray(reply, dtype=np.int32))


def _check_has_template(tokenizer: Any, where: str, chat: bool) -> None:
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


def _text(item: Text, tokenizer: Any, where: str) -> Encoded:
    ids = text_ids(tokenizer, item.text)
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return _encoded(ids, [(1, len(ids))], tokenizer, where)


def _completion(item: Completion, tokenizer: Any, where: str, train_on: str) -> Encoded:
    prompt, whole = text_ids(tokenizer, item.prompt), text_ids(tokenizer, item.prompt + item.completion)
    ids = prompt + _going_on(tokenizer, prompt, whole, item.completion, where)
    eos = _eos(tokenizer, where)
    if ids[-1] != eos:
        ids.append(eos)
    return _encoded(ids, [(1 if train_on == "all" else len(prompt), len(ids))], tokenizer, where)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a plain text as every use of it has them: one BOS where the tokenizer adds it, no added EOS.

    A text that begins with the BOS itself gets no second one, as mlx-lm and llama.cpp have it.
    """
    before, after = _added(tokenizer)
    ids = list(tokenizer.encode(text))
    bare = ids[len(before) : len(ids) - len(after)]
    return bare if bare[: len(before)] == before else before + bare


def context_ids(tokenizer: Any, text: str, *, plain: bool, where: str = "") -> list[int]:
    """Return the ids of a text that a model goes on from: a plain one (see `text_ids`), or one that a template wrote.

    Raises:
        DataError: a token that the model does not have.
    """
    ids = text_ids(tokenizer, text) if plain else list(tokenizer.encode(text, add_special_tokens=False))
    return check_ids(ids, tokenizer, where)


@lru_cache(maxsize=8)
def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer sets before and after every text."""
    whole, bare = list(tokenizer.encode("a")), list(tokenizer.encode("a", add_special_tokens=False))
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
    return ([], []) if at is None else (whole[:at], whole[at + len(bare) :])


# Texts whose tokens seldom join with what follows them.
_ANCHORS = ("\n", "\n\n", ":", "0", "a", "(", "\u4e00")


def _going_on(tokenizer: Any, prompt: list[int], whole: list[int], text: str, where: str) -> list[int]:
    """The ids that follow a prompt's own, so that both together spell what `whole` spells.

    Where a token would span the two, the text is tokenised apart: at inference the prompt stands alone, and so it does
    here. By itself a text may be spelt otherwise (SentencePiece sets a space before it), so it is cut off behind texts
    of which the tokens are known, until one gives the right spelling.
    """
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    wanted = tokenizer.decode(whole)
    for anchor in ("", *_ANCHORS):
        head = list(tokenizer.encode(anchor, add_special_tokens=False)) if anchor else []
        ids = list(tokenizer.encode(anchor + text, add_special_tokens=False))
        if ids[: len(head)] == head and tokenizer.decode(prompt + ids[len(head) :]) == wanted:
            return ids[len(head) :]
    raise DataError(
        f"{where}: a token spans prompt and completion ({text[:20]!r}), and this tokenizer has no way to spell the "
        "completion by itself; end the prompt or begin the completion elsewhere (before the white space, say)"
    )


def check_ids(ids: list[int], tokenizer: Any, where: str) -> list[int]:
    """Return the ids.

    Raises:
        DataError: the model's embedding has no row for one: MLX would read what lies behind it in memory.
    """
    rows: int | None = getattr(tokenizer, "_mlxft_rows", None)
    if rows is not None and ids and max(ids) >= rows:
        worst = next(i for i in ids if i >= rows)
        token = tokenizer.convert_ids_to_tokens(worst)
        at = f"{where}: " if where else ""
        raise DataError(
            f"{at}token {token!r} ({worst}) is not in the model, whose embedding has {rows} rows; leave the token out, "
            "or take the tokenizer that belongs to the model"
        )
    return ids


def set_embedding_rows(tokenizer: Any, rows: int | None) -> None:
    """Tell the tokenizer how many ids its model has; None: unknown."""
    tokenizer._mlxft_rows = rows


def end_completions(tokenizer: Any, ends: Iterable[int]) -> list[str]:
    """Let what ends a trained turn end a completion: it joins the tokenizer's EOS ids.

    Returns:
        What is to be said of it, a sentence for each that was not among them.
    """
    notes = []
    for end in sorted(set(ends) - set(tokenizer.eos_token_ids)):
        had = ", ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(tokenizer.eos_token_ids)) or "none"
        token = tokenizer.convert_ids_to_tokens(end)
        notes.append(f"a turn ends with {token}, which was not among the EOS tokens ({had}): it ends completions too")
        tokenizer.add_eos_token(end)
    return notes


def chat_notes(tokenizer: Any, ends: Iterable[int], examples: Sequence[Example] = ()) -> list[str]:
    """Do as `end_completions`, ask the model as it is trained, and say what was done to the chat template.

    Args:
        examples: what is trained on. If the turns of the first ones have no thoughts, and their generation prompt opens
            one unless told not to, prompts are rendered so from now on.
    """
    notes = [*template_notes(tokenizer), *end_completions(tokenizer, ends)]
    turns = [turns for example in examples[:_LOOKED_AT] if (turns := _answered(example.item)) is not None]
    if turns and tokenizer.has_chat_template and all(needs_thinking_off(tokenizer, *each) for each in turns):
        set_thinking(tokenizer, False)
        notes.append(
            "the rows have no thoughts, and the chat template's generation prompt opens one: it is asked without "
            "(enable_thinking: false), in training and where mlxft uses the result; elsewhere set it yourself"
        )
    return notes


_LOOKED_AT = 32  # rows


def _answered(item: Item) -> tuple[list[Message], Tools | None] | None:
    """A conversation that ends with an assistant turn; None for an item that is none."""
    if isinstance(item, Ranked):
        return _answered(item.pairs[0]) if item.pairs else None
    if isinstance(item, Conversation):
        return item.messages, item.tools
    answer = getattr(item, "chosen", None) or getattr(item, "completion", None)
    if isinstance(item, Completion | Preference | Judged) and answer is not None:
        turns = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        last = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        return [*turns, last], getattr(item, "tools", None)
    return None


def turn_end(tokenizer: Any, prompt: list[Message] | None = None, tools: Tools | None = None) -> tuple[int, ...]:
    """Return the id that ends an assistant turn by the chat template; none where there is no such token or template."""
    if not tokenizer.has_chat_template:
        return ()
    asked = prompt or [{"role": "user", "content": "Hello"}]
    try:
        reply = encode_reply(asked, {"role": "assistant", "content": "Hello."}, tokenizer, "", tools).reply
    except DataError:  # a template that wants more of a conversation than this
        return ()
    return (int(reply[-1]),)


def _eos(tokenizer: Any, where: str) -> int:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"{where}: the tokenizer has no EOS token, so a model could not learn to stop; set its eos_token"
        )
    return int(eos)


def _encoded(
    ids: list[int],
    spans: list[tuple[int, int]],
    tokenizer: Any,
    where: str,
    off: list[_Turn] | None = None,
    ends: Iterable[int] = (),
) -> Encoded:
    check_ids(ids, tokenizer, where)
    trained = np.zeros(len(ids), dtype=np.bool_)
    for first, stop in spans:
        trained[first:stop] = True
    for turn in off or []:
        trained[turn.first : turn.stop] = False
    # Nothing stands before the first token to predict it from.
    trained[:1] = False
    return Encoded(np.asarray(ids, dtype=np.int32), trained, where, tuple(sorted(set(ends))))


def _conversation(item: Conversation, chat: Chat, train_on: str) -> list[Encoded]:
    messages = item.messages
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on in ("last", "completion"):
        turns = turns[-1:]
    wanted = [i for i in turns if messages[i].get("weight", 1) != 0]
    watched = turns if train_on == "all" else wanted
    whole = _tokenise(chat.tokenizer, chat.render(messages))
    final = len(messages) - 1
    found: dict[int, _Turn | None] = {}
    texts: dict[int, str] = {}
    for i in watched:
        prompt = chat.render(messages[:i], generation=True)
        ended = whole.text if i == final else chat.render(messages[: i + 1])
        found[i] = _find(chat, whole, prompt, ended.removesuffix(chat.tail), i)
        if found[i] is None:
            break
        texts[i] = chat.turn(prompt, ended)
    if all(found.values()):
        chat.check_written(messages, whole.text, {i: texts[i] for i in wanted})
        located = {i: turn for i, turn in found.items() if turn is not None}
        ids, located = _closed(whole.ids, located, final, chat)
        ends = [ids[located[i].stop - 1] for i in wanted if located[i].closed]
        if train_on == "all":
            off = [located[i] for i in turns if i not in wanted]
            return [_encoded(ids, [(1, len(ids))], chat.tokenizer, chat.where, off, ends)]
        return [_encoded(ids, [located[i][:2] for i in wanted], chat.tokenizer, chat.where, ends=ends)]
    if train_on == "all":
        raise DataError(
            f"{chat.where}: this chat template rewrites earlier turns (reasoning models drop their thoughts), so no "
            "one row holds every token as it was generated; use data.train_on: assistant or last"
        )
    return [_one_turn(messages[: i + 1], chat) for i in wanted]


def _one_turn(messages: list[Message], chat: Chat) -> Encoded:
    """The conversation up to its last turn, with only that turn trained."""
    final = len(messages) - 1
    whole = _tokenise(chat.tokenizer, chat.render(messages))
    prompt = chat.render(messages[:-1], generation=True)
    turn = _find(chat, whole, prompt, whole.text.removesuffix(chat.tail), final)
    if turn is None:
        raise AssertionError("a text is always a prefix of itself")
    chat.check_written(messages, whole.text, {final: chat.turn(prompt, whole.text)})
    ids, located = _closed(whole.ids, {final: turn}, final, chat)
    last = located[final]
    return _encoded(ids, [last[:2]], chat.tokenizer, chat.where, ends=[ids[last.stop - 1]] if last.closed else ())


def _closed(ids: list[int], turns: dict[int, _Turn], final: int, chat: Chat) -> tuple[list[int], dict[int, _Turn]]:
    """With an end for turns that the template ends with no token of their own.

    That is the token that opens the next turn, where it is an EOS (GLM: <|user|>, <|observation|>); behind the final
    turn an EOS is added. Other turns stay open.
    """
    eos = set(getattr(chat.tokenizer, "eos_token_ids", ()))
    for i, turn in turns.items():
        if not turn.closed and i != final and eos.intersection(ids[turn.stop : turn.stop + 1]):
            turns = {**turns, i: _Turn(turn.first, turn.stop + 1, True)}
    if final not in turns or turns[final].closed:
        return ids, turns
    ids = [*ids, _eos(chat.tokenizer, chat.where)]
    return ids, {**turns, final: _Turn(turns[final].first, len(ids), True)}


def _find(chat: Chat, whole: _Tokens, prompt: str, ended: str, index: int) -> _Turn | None:
    """The turn within `whole`, given the text before it and the text up to its end.

    Returns:
        None where `whole` renders the turn, or what stands before it, otherwise.
    Raises:
        NotAPrefix: `ended` itself does not begin with `prompt`.
    """
    if not ended.startswith(prompt):
        raise NotAPrefix(f"messages[{index}] is not rendered as its generation prompt begins it")
    if not whole.text.startswith(prompt):
        return None
    if whole.text.startswith(ended):
        first, stop = _from(chat, whole, len(prompt)), _until(chat, whole, len(ended))
        if stop is None:
            return None
        end = _end_of_turn(chat.tokenizer, whole.ids, first, stop)
        return _Turn(first, stop, False) if end is None else _Turn(first, end + 1, True)
    # What follows the end-of-turn token may differ, and some templates write that token only after the last turn.
    part = _tokenise(chat.tokenizer, ended)
    first = _from(chat, part, len(prompt))
    end = _end_of_turn(chat.tokenizer, part.ids, first, len(part.ids))
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


def _from(chat: Chat, tokens: _Tokens, char: int) -> int:
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


def _until(chat: Chat, tokens: _Tokens, char: int) -> int | None:
    """How many tokens end at or before a character; None when the tokenizer does not let us know."""
    if char == len(tokens.text):
        return len(tokens.ids)
    if tokens.ends is None:
        head = _tokenise(chat.tokenizer, tokens.text[:char]).ids
        return len(head) if tokens.ids[: len(head)] == head else None
    return int(np.searchsorted(tokens.ends, char, side="right"))


def _end_of_turn(tokenizer: Any, ids: list[int], first: int, stop: int) -> int | None:
    """Position of the last special token in [first, stop), if only white space follows it there; None where none does.

    A token that closes what another one opened within the turn (`</tool_call>`) ends that, and not the turn.
    """
    special, openers = special_ids(tokenizer)
    for index in range(stop - 1, first - 1, -1):
        if ids[index] in special:
            rest = ids[index + 1 : stop]
            last = not rest or not tokenizer.decode(rest).strip()
            return index if last and openers.get(ids[index]) not in ids[first:index] else None
    return None
