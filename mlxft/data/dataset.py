"""Rows to token ids: encode completions and pairs, apply limits, cache, and load the training and validation splits."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import time
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from hashlib import blake2b
from importlib.metadata import version
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from mlxft.config import CHATS, Config, DataSettings, Paths, SourceSettings, objective_class
from mlxft.data.chat import (
    Chat,
    NotAPrefix,
    Tools,
    by_template,
    day_of,
    needs_thinking_off,
    set_thinking,
    special_ids,
    template_notes,
    thinking_of,
)
from mlxft.data.formats import (
    FORMATS,
    RECOGNISED_BY,
    Columns,
    Completion,
    Conversation,
    Conversion,
    Example,
    Item,
    Labelled,
    Message,
    Pair,
    Prompt,
    Ranked,
    Recognised,
    Text,
    convert,
    labels_of,
    pick_shots,
    recognise,
    with_completion,
)
from mlxft.data.sources import (
    REPORTED,
    Problem,
    Row,
    find_files,
    read_rows,
    report_lines,
    source_hash,
    split_in,
)
from mlxft.errors import CheckpointError, ConfigError, DataError, nearest
from mlxft.files import write_beside
from mlxft.text import bar, counted, make_console, parse_json

# --- batching ---------------------------------------------------------------------------------------------------------
# Rows are batched by length, or packed into sequences, so that there is little padding.
#
# An epoch's rows are shuffled and cut into windows; within a window they are sorted by length and cut into batches, and
# then all batches are shuffled. So rows of like length share a batch, but different ones each epoch, and lengths are
# mixed over the epoch. Packed rows fill sequences of one width by best fit.

WINDOW = 64  # batches; a larger window pads less and mixes less
WIDTHS = (512, 1024, 2048)  # of packed sequences: attention over longer ones costs more than the padding it saves
SAMPLE = 4096  # rows that choose a width
PADDING = 0.05  # share of padding that is good enough
PACKED = 1 << 20  # rows that are packed together: of more, any that come together are packed
IntArray: TypeAlias = npt.NDArray[np.int64]  # or of int32: rows' lengths


@dataclass(frozen=True)
class Slot:
    """A planned batch: the indices of the rows in each of its sequences, and the width they are padded to."""

    sequences: tuple[tuple[int, ...], ...]  # one row each, unless packed
    width: int

    @property
    def rows(self) -> tuple[int, ...]:
        """Return all rows, in order."""
        return tuple(row for sequence in self.sequences for row in sequence)


@dataclass(frozen=True, eq=False)
class Plan(Sequence[Slot]):
    """The batches of an epoch, as arrays: 4 bytes a row, and some 24 a batch. Each is made when it is asked for.

    Attributes:
        order: (N,) rows, sequence after sequence.
        starts, stops, widths: (B,) of each batch, the sequences that it has, and its width.
        begins, ends: (S,) of each sequence, its place in `order`; None where each row is a sequence.
    """

    order: npt.NDArray[np.int32]
    starts: IntArray
    stops: IntArray
    widths: IntArray
    begins: IntArray | None = None
    ends: IntArray | None = None

    def __len__(self) -> int:
        return len(self.widths)

    @overload
    def __getitem__(self, at: int) -> Slot: ...

    @overload
    def __getitem__(self, at: slice) -> list[Slot]: ...

    def __getitem__(self, at: int | slice) -> Slot | list[Slot]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        first, stop = int(self.starts[at]), int(self.stops[at])
        if self.begins is None or self.ends is None:
            sequences = tuple((row,) for row in self.order[first:stop].tolist())
        else:
            edges = zip(self.begins[first:stop].tolist(), self.ends[first:stop].tolist())
            sequences = tuple(tuple(self.order[begin:end].tolist()) for begin, end in edges)
        return Slot(sequences, int(self.widths[at]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and list(self) == list(other)

    def of(self, rows: IntArray) -> Plan:
        """Return the plan with the rows of these numbers in place of the first, the second, ..."""
        return replace(self, order=rows[self.order].astype(np.int32))

    def sums(self, values: npt.NDArray[Any]) -> IntArray:
        """Return (B,) the sum over the rows of each batch of a value (N,) that each row has."""
        upto = np.concatenate([[0], np.cumsum(values[self.order], dtype=np.int64)])
        if self.begins is not None:
            upto = np.concatenate([[0], np.cumsum(upto[self.ends] - upto[self.begins])])
        return upto[self.stops] - upto[self.starts]


def plan_epoch(
    lengths: IntArray, *, tokens: int | None = None, rows: int | None = None, seed: int | None, epoch: int = 0
) -> Plan:
    """Plan the batches of one epoch, which has every row once.

    Args:
        lengths: tokens of each row.
        tokens: budget of a batch, rows x width; a longer row is a batch of its own.
        rows: rows per batch, instead of `tokens`.
        seed: gives, with `epoch`, the order of rows and batches; None sorts all by length, for validation.
    """
    assert (tokens is None) != (rows is None), "one of tokens and rows"
    if seed is None:
        order = np.argsort(lengths, kind="stable")
        ends = np.array(_cut(lengths[order], tokens, rows), dtype=np.int64)
        mixed = np.arange(len(ends))
    else:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))
        size = rows if rows is not None else (tokens or 0) / float(lengths.mean())
        # At least two windows: one would group the same rows in every epoch.
        count = max(2, round(len(order) / (WINDOW * max(1.0, size))))
        # Cut windows to whole batches where rows are counted, so that only the last batch is not full.
        step = -(-len(order) // count)
        if rows is not None:
            step = max(rows, step - step % rows)
        found: list[int] = []
        for start in range(0, len(order), step):
            window = order[start : start + step]
            window = window[np.argsort(lengths[window], kind="stable")]
            order[start : start + step] = window
            found += [start + end for end in _cut(lengths[window], tokens, rows)]
        ends = np.array(found, dtype=np.int64)
        mixed = rng.permutation(len(ends))
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    widths = lengths[order[ends - 1]].astype(np.int64)
    return Plan(order.astype(np.int32), starts[mixed], ends[mixed], widths[mixed])


def _cut(lengths: IntArray, tokens: int | None, rows: int | None) -> list[int]:
    """Cut rows of these lengths, shortest first, into batches, and return where each ends."""
    if rows is not None:
        return [*range(rows, len(lengths), rows), *([len(lengths)] if len(lengths) else [])]
    ends: list[int] = []
    start = 0
    for row, length in enumerate(lengths.tolist()):
        if row > start and (row + 1 - start) * length > (tokens or 0):
            ends.append(row)
            start = row
    return [*ends, *([len(lengths)] if len(lengths) else [])]


def pack_width(lengths: IntArray, tokens: int | None = None) -> int:
    """Choose the width of packed sequences: the smallest of a few with little padding, at least the longest row.

    Args:
        lengths: tokens of each row.
        tokens: budget of a batch, which the sequences fill as far as possible.
    """
    longest = int(lengths.max())
    # Multiples of 32 are faster, unless the budget is too small.
    least = -(-longest // 32) * 32
    if tokens is not None and least > tokens:
        least = longest
    sample = lengths[np.linspace(0, len(lengths) - 1, min(len(lengths), SAMPLE)).astype(np.int64)]
    order = np.argsort(-sample, kind="stable")
    tried: list[tuple[float, int]] = []
    for wanted in WIDTHS:
        width = max(least, wanted)
        if tokens is not None:
            part = tokens // max(1, tokens // width)
            width = max(least, part - part % 32)
        width = min(width, max(least, int(lengths.sum())))  # few rows do not fill a wide sequence
        padding = 1 - int(sample.sum()) / (len(_best_fit(order, sample, width)) * width)
        if padding <= PADDING:
            return width
        tried.append((padding, width))
    return min(tried)[1]


def pack_epoch(
    lengths: IntArray, *, width: int, tokens: int | None = None, rows: int | None = None, seed: int, epoch: int = 0
) -> Plan:
    """Plan an epoch's batches of packed sequences, with every row once. All but the last have one shape.

    Args:
        lengths: tokens of each row, at most `width`.
        tokens: budget of a batch, sequences x width; at least one sequence.
        rows: sequences per batch, instead of `tokens`.
        seed: gives, with `epoch`, the order of rows and sequences.
    """
    assert (tokens is None) != (rows is None), "one of tokens and rows"
    rng = np.random.default_rng([seed, epoch])
    every = rng.permutation(len(lengths)) if len(lengths) > PACKED else np.arange(len(lengths))
    order, sizes = np.empty(len(lengths), dtype=np.int32), list[int]()
    for start in range(0, len(every), PACKED):
        part = every[start : start + PACKED]
        # Longest first, so that short rows fill gaps; with noise, so that not the same rows meet in every epoch.
        packs = _best_fit(part[np.argsort(-lengths[part] * rng.uniform(0.8, 1.25, len(part)))], lengths, width)
        order[start : start + len(part)] = np.concatenate(packs)
        sizes += map(len, packs)
    ends, mixed = np.cumsum(np.array(sizes, dtype=np.int64)), rng.permutation(len(sizes))
    count = rows if rows is not None else max(1, (tokens or 0) // width)
    starts = np.arange(0, len(sizes), count)
    stops = np.minimum(starts + count, len(sizes))
    return Plan(order, starts, stops, np.full(len(starts), width), (ends - sizes)[mixed], ends[mixed])


def _best_fit(order: IntArray, lengths: IntArray, width: int) -> list[tuple[int, ...]]:
    """Put each row into the sequence where it leaves the least room, or into a new one."""
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(width + 1)]
    rooms = 0  # bit r is set where a sequence has room for r tokens: finds the smallest sufficient room at once
    for row in order.tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = width, len(packs)
            packs.append([])
        packs[pack].append(row)
        if room > length:
            by_room[room - length].append(pack)
            rooms |= 1 << (room - length)
    return [tuple(pack) for pack in packs]


def padding_share(plan: Plan, lengths: IntArray) -> float:
    """Return the share of computed tokens that are padding."""
    return 1.0 - int(lengths[plan.order].sum()) / int(((plan.stops - plan.starts) * plan.widths).sum())


# --- encode -----------------------------------------------------------------------------------------------------------
# Items become token ids and a mask of the trained tokens.
#
# A chat's mask comes from its template, turn by turn. What the template renders for the turns before an assistant turn,
# with the generation prompt, is what the model sees before it generates; what the turn adds is what it must learn, up
# to and including the token that ends the turn. Where a template renders a turn differently later on (reasoning models
# drop earlier thoughts), each turn becomes a row of its own. Where no prefix matches at all, the row is refused: no
# loss would show a wrong mask.

Ids: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]
Sizes: TypeAlias = npt.NDArray[np.int32]


class Encoded(NamedTuple):
    """A row ready to train on."""

    ids: Ids  # (T,)
    trained: Mask  # (T,), true where token t is a target, predicted from the tokens before it; never the first
    where: str  # the row's place, for messages
    ends: tuple[int, ...] = ()  # the ids that end its trained turns


class _Tokens(NamedTuple):
    """A text's ids, and where each token starts and ends in it, (T, 2); None where the tokenizer gives no offsets."""

    text: str
    ids: list[int]
    offsets: npt.NDArray[np.int64] | None = None


class _Turn(NamedTuple):
    """Positions [first, stop) that an assistant turn generates; closed if it ends with an end-of-turn token."""

    first: int
    stop: int
    closed: bool


def encode(item: Item, tokenizer: Any, where: str, train_on: str, chat: bool = True) -> list[Encoded]:
    """Encode one item; into several rows where a chat template renders each turn's history differently.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper, or anything with its `apply_chat_template`, `encode`, `decode`,
            `eos_token_id` and `has_chat_template`.
        where: the row's place, for messages.
        train_on: "assistant", every assistant turn; "last" or "completion", the final one; "all", every token.
            A message's `weight: 0` leaves its turn out. A Text is always trained whole; of a Completion without
            template every value but "all" trains the completion and its EOS.
        chat: whether a Completion becomes a user and an assistant turn where there is a chat template.
    Raises:
        ConfigError: a conversation comes with `chat` off.
        DataError: a conversation has no chat template, or one that does not give a mask.
    """
    if isinstance(item, Text):
        ids, eos = text_ids(tokenizer, item.text), tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return [_encoded(ids, [(1, len(ids), True)], tokenizer, where)]
    if isinstance(item, Completion):
        if not (chat and tokenizer.has_chat_template):
            return [_completion(item, tokenizer, where, train_on)]
        item = Conversation(with_completion(item.prompt, item.completion))
    if not isinstance(item, Conversation):
        raise ConfigError(f"{where}: prompts, pairs and labelled completions are not for supervised fine-tuning")
    _check_has_template(tokenizer, where, chat)
    messages = item.messages
    return by_template(tokenizer, messages, item.tools, where, lambda chat: _conversation(messages, chat, train_on))


class EncodedCompletion(NamedTuple):
    """A prompt (P,) and a completion (R,), int32, with the token that ends it."""

    prompt: Ids
    reply: Ids


def encode_completion(
    prompt: str | list[Message],
    reply: str | Message,
    tokenizer: Any,
    where: str,
    tools: Tools | None = None,
    chat: bool = True,
) -> EncodedCompletion:
    """Encode a prompt as it stands before generation, and a completion; arguments as for `encode`.

    The prompt's ids do not depend on the completion: where a token would span the two, they are tokenised apart.
    """
    if isinstance(prompt, str) and isinstance(reply, str) and not (chat and tokenizer.has_chat_template):
        row = _completion(Completion(prompt, reply), tokenizer, where, "last")
        first = int(np.argmax(row.trained))
        return EncodedCompletion(row.ids[:first], row.ids[first:])
    messages = with_completion(prompt, reply)
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
    """Return the ids of a prompt up to where the completion starts, as `encode_completion` has them.

    Args:
        prompt: a text, which is a user turn where there is a chat template; or messages, checked (see `message_at`).
        system: text of a system turn before it.
        chat: whether a chat template is used; without one the prompt is a text.
    Raises:
        ConfigError: `system` is given where it has no place.
        DataError: messages or tools have no chat template, or one that does not write them.
    """
    if not (chat and tokenizer.has_chat_template):
        why = "this tokenizer has no chat template" if chat else "the chat template is not used (template: none)"
        if not isinstance(prompt, str) or tools:
            at = f"{where}: " if where else ""
            raise DataError(f"{at}{why}, so messages and tools cannot be rendered; give text, or a template")
        if system is not None:
            raise ConfigError(f"{why}, so system has no place; write it into the prompt")
        return context_ids(tokenizer, prompt, plain=True, where=where)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is not None:
        if messages and messages[0]["role"] == "system":
            raise ConfigError("system is given, and the messages start with their own; keep one of them")
        messages = [{"role": "system", "content": system}, *messages]
    text = prompt_text(messages, tokenizer, tools=tools, where=where)
    return context_ids(tokenizer, text, plain=False, where=where)


def prompt_text(prompt: list[Message], tokenizer: Any, *, tools: Tools | None = None, where: str = "") -> str:
    """Return the text of messages up to where the completion starts; raise as `encode_prompt`."""

    def written(chat: Chat) -> str:
        text = chat.render(prompt, generation=True)
        chat.check_written(prompt, text, {})
        return text

    return by_template(tokenizer, prompt, tools, where, written)


def _reply(messages: list[Message], chat: Chat) -> EncodedCompletion:
    before, text = chat.render(messages[:-1], generation=True), chat.render(messages)
    if not text.startswith(before):
        raise NotAPrefix("the completion is not rendered after its generation prompt")
    chat.check_written(messages, text, {len(messages) - 1: chat.turn(before, text)})
    tokenizer, text = chat.tokenizer, text.removesuffix(chat.tail)
    prompt, ids = _tokenise(tokenizer, before).ids, _tokenise(tokenizer, text).ids
    reply = _continued(tokenizer, prompt, ids, text[len(before) :], chat.where)
    end = _end_of_turn(tokenizer, reply, 0, len(reply))
    reply = [*reply, _eos(tokenizer, chat.where)] if end is None else reply[: end + 1]
    check_ids([*prompt, *reply], tokenizer, chat.where)
    return EncodedCompletion(np.asarray(prompt, dtype=np.int32), np.asarray(reply, dtype=np.int32))


def _check_has_template(tokenizer: Any, where: str, chat: bool) -> None:
    if not chat:
        raise ConfigError(
            f"{where}: a conversation cannot be encoded without its chat template; set data.template: auto, or write "
            "prompt and completions as texts"
        )
    if not tokenizer.has_chat_template:
        raise DataError(
            f"{where}: a conversation needs a chat template, and this tokenizer has none (base models have none): "
            "use data.format: text or prompt-completion, or set model.chat_template; prompt and completions of a "
            "pair may be texts too"
        )


def _completion(item: Completion, tokenizer: Any, where: str, train_on: str) -> Encoded:
    prompt, whole = text_ids(tokenizer, item.prompt), text_ids(tokenizer, item.prompt + item.completion)
    ids = prompt + _continued(tokenizer, prompt, whole, item.completion, where)
    eos = _eos(tokenizer, where)
    if ids[-1] != eos:
        ids.append(eos)
    return _encoded(ids, [(1 if train_on == "all" else len(prompt), len(ids), True)], tokenizer, where)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a plain text: with one BOS where the tokenizer adds it, without an added EOS.

    A text that begins with the BOS gets no second one, as in mlx-lm and llama.cpp.
    """
    before, after = _added(tokenizer)
    ids = list(tokenizer.encode(text))
    bare = ids[len(before) : len(ids) - len(after)]
    return bare if bare[: len(before)] == before else before + bare


def context_ids(tokenizer: Any, text: str, *, plain: bool, where: str = "") -> list[int]:
    """Return the ids of a text to complete: a plain one (see `text_ids`), or one that a template rendered."""
    ids = text_ids(tokenizer, text) if plain else list(tokenizer.encode(text, add_special_tokens=False))
    return check_ids(ids, tokenizer, where)


@lru_cache(maxsize=8)
def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after every text."""
    whole, bare = list(tokenizer.encode("a")), list(tokenizer.encode("a", add_special_tokens=False))
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
    return ([], []) if at is None else (whole[:at], whole[at + len(bare) :])


_LOOKED_AT = 32  # rows
_NAMED = 3  # rows that a note names of those that are left out
# Texts whose tokens rarely join with what follows.
_ANCHORS = ("\n", "\n\n", ":", "0", "a", "(", "\u4e00")


def _continued(tokenizer: Any, prompt: list[int], whole: list[int], text: str, where: str) -> list[int]:
    """Return the ids after a prompt's, so that both together decode to what `whole` decodes to.

    Where a token would span the two, the text is tokenised apart, since at inference the prompt stands alone. Alone, a
    text may be tokenised differently (SentencePiece adds a space), so it is encoded after known texts and their tokens
    are cut off, until one decodes rightly.
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
        f"{where}: a token spans prompt and completion ({text[:20]!r}), and this tokenizer cannot encode the "
        "completion alone; end the prompt or begin the completion elsewhere, e.g. before the white space"
    )


def check_ids(ids: list[int], tokenizer: Any, where: str) -> list[int]:
    """Return ids; raise DataError if the model's embedding has no row for one: MLX would read beyond its memory."""
    rows: int | None = getattr(tokenizer, "_mlxft_rows", None)
    if rows is not None and ids and max(ids) >= rows:
        worst = next(i for i in ids if i >= rows)
        token = f"{f'{where}: ' if where else ''}token {tokenizer.convert_ids_to_tokens(worst)!r} ({worst})"
        raise DataError(
            f"{token} is not in the model, whose embedding has {rows} rows; leave the token out, or use the model's "
            "own tokenizer"
        )
    return ids


def set_embedding_rows(tokenizer: Any, rows: int | None) -> None:
    """Note at the tokenizer how many ids its model has; None: unknown."""
    tokenizer._mlxft_rows = rows


def end_completions(tokenizer: Any, ends: Iterable[int]) -> list[str]:
    """Add the ids that end trained turns to the tokenizer's EOS ids, and return a note for each that was not one."""
    notes = []
    for end in sorted(set(ends) - set(tokenizer.eos_token_ids)):
        had = ", ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(tokenizer.eos_token_ids)) or "none"
        token = tokenizer.convert_ids_to_tokens(end)
        notes.append(f"a turn ends with {token}, which was not among the EOS tokens ({had}): it ends completions too")
        tokenizer.add_eos_token(end)
    return notes


def chat_notes(tokenizer: Any, ends: Iterable[int], examples: Sequence[Example] = ()) -> list[str]:
    """Set the tokenizer up so that generation matches training, and return notes; see `end_completions`.

    If the first examples have no thoughts, and the generation prompt opens one by default, thinking is switched off in
    the template from now on.
    """
    notes = [*template_notes(tokenizer), *end_completions(tokenizer, ends)]
    turns = [turns for example in examples[:_LOOKED_AT] if (turns := _answered(example.item)) is not None]
    if turns and tokenizer.has_chat_template and all(needs_thinking_off(tokenizer, *each) for each in turns):
        set_thinking(tokenizer, False)
        notes.append(
            "the rows have no thoughts, and the chat template's generation prompt opens one: mlxft renders it with "
            "enable_thinking: false, in training and use; set that yourself in other programs"
        )
    return notes


def _answered(item: Item) -> tuple[list[Message], Tools | None] | None:
    """Return the item as a conversation that ends with an assistant turn, and its tools; None without such a turn."""
    if isinstance(item, Ranked):
        return _answered(item.pairs[0]) if item.pairs else None
    if isinstance(item, Conversation):
        return item.messages, item.tools
    reply = getattr(item, "chosen", None) or getattr(item, "completion", None)
    if isinstance(item, Completion | Pair | Labelled) and reply is not None:
        return with_completion(item.prompt, reply), getattr(item, "tools", None)
    return None


def turn_end(tokenizer: Any, prompt: list[Message] | None = None, tools: Tools | None = None) -> tuple[int, ...]:
    """Return the id that ends an assistant turn in the chat template; () without such a token or template."""
    if not tokenizer.has_chat_template:
        return ()
    asked = prompt or [{"role": "user", "content": "Hello"}]
    try:
        reply = encode_completion(asked, {"role": "assistant", "content": "Hello."}, tokenizer, "", tools).reply
    except DataError:  # the template needs a longer conversation
        return ()
    return (int(reply[-1]),)


def _eos(tokenizer: Any, where: str) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{where}: the tokenizer has no EOS token, so the model cannot learn to stop; set its eos_token"
        )
    return int(tokenizer.eos_token_id)


def _encoded(
    ids: list[int], spans: Iterable[tuple[int, int, bool]], tokenizer: Any, where: str, ends: Iterable[int] = ()
) -> Encoded:
    check_ids(ids, tokenizer, where)
    trained = np.zeros(len(ids), dtype=np.bool_)
    for first, stop, on in spans:
        trained[first:stop] = on
    # Nothing predicts the first token.
    trained[:1] = False
    return Encoded(np.asarray(ids, dtype=np.int32), trained, where, tuple(sorted(set(ends))))


def _conversation(messages: list[Message], chat: Chat, train_on: str) -> list[Encoded]:
    final = len(messages) - 1
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on in ("last", "completion"):
        turns = turns[-1:]
    wanted = [i for i in turns if messages[i].get("weight", 1) != 0]
    whole = _tokenise(chat.tokenizer, chat.render(messages))
    found: dict[int, _Turn] = {}
    texts: dict[int, str] = {}
    for i in turns if train_on == "all" else wanted:
        prompt = chat.render(messages[:i], generation=True)
        ended = whole.text if i == final else chat.render(messages[: i + 1])
        turn = _find(chat, whole, prompt, ended.removesuffix(chat.tail), i)
        if turn is None and train_on == "all":
            raise DataError(
                f"{chat.where}: this chat template rewrites earlier turns (reasoning models drop their thoughts), so "
                "no single row holds every token as it was generated; use data.train_on: assistant or last"
            )
        if turn is None:  # a final turn never is: a text is a prefix of itself
            return [row for j in wanted for row in _conversation(messages[: j + 1], chat, "last")]
        found[i], texts[i] = turn, chat.turn(prompt, ended)
    chat.check_written(messages, whole.text, {i: texts[i] for i in wanted})
    ids, found = _closed(whole.ids, found, final, chat)
    ends = [ids[found[i].stop - 1] for i in wanted if found[i].closed]
    spans = [(1, len(ids), True)] if train_on == "all" else []
    spans += [(turn.first, turn.stop, i in wanted) for i, turn in found.items()]
    return [_encoded(ids, spans, chat.tokenizer, chat.where, ends)]


def _closed(ids: list[int], turns: dict[int, _Turn], final: int, chat: Chat) -> tuple[list[int], dict[int, _Turn]]:
    """Give turns an end where the template writes no token for it, and return the ids and turns.

    The end is the token that opens the next turn where that is an EOS (GLM: <|user|>, <|observation|>); after the final
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
    """Return the turn within `whole`, given the text before it and the text up to its end.

    Return None where `whole` renders the turn, or what is before it, differently.
    """
    if not ended.startswith(prompt):
        raise NotAPrefix(f"messages[{index}] is not rendered after its generation prompt")
    if not whole.text.startswith(prompt):
        return None
    if whole.text.startswith(ended):
        first, stop = _from(chat, whole, len(prompt)), _until(chat, whole, len(ended))
        if stop is None:
            return None
        end = _end_of_turn(chat.tokenizer, whole.ids, first, stop)
        return _Turn(first, stop, False) if end is None else _Turn(first, end + 1, True)
    # The text after the end-of-turn token may differ, and some templates write that token only after the last turn.
    part = _tokenise(chat.tokenizer, ended)
    first = _from(chat, part, len(prompt))
    end = _end_of_turn(chat.tokenizer, part.ids, first, len(part.ids))
    if end is None or whole.ids[:end] != part.ids[:end]:
        return None
    closed = whole.ids[end : end + 1] == part.ids[end : end + 1]
    return _Turn(first, end + closed, closed)


def _tokenise(tokenizer: Any, text: str) -> _Tokens:
    """Tokenise a rendered chat, with character offsets where the tokenizer gives them."""
    # Only calling the tokenizer gives offsets, and mlx-lm's wrapper cannot be called.
    inner = tokenizer if callable(tokenizer) else getattr(tokenizer, "_tokenizer", None)
    if not callable(inner) or not getattr(inner, "is_fast", False):
        return _Tokens(text, list(tokenizer.encode(text, add_special_tokens=False)))
    out = inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    # Offsets out of order mean something else.
    return _Tokens(text, list(out["input_ids"]), None if np.any(offsets[1:] < offsets[:-1]) else offsets)


def _from(chat: Chat, tokens: _Tokens, char: int) -> int:
    """Return the index of the first token that begins at or after a character."""
    index = -1
    if tokens.offsets is not None:
        index = int(np.searchsorted(tokens.offsets[:, 0], char))
        if index == 0 or tokens.offsets[index - 1, 1] >= char:
            return index
    # Without offsets, or where none has the white space before the character (the tokenizer drops it, or trims it from
    # the offsets of a token that has it), the ids of the text before decide.
    head = _tokenise(chat.tokenizer, tokens.text[:char]).ids
    if tokens.ids[: len(head)] == head:
        return len(head)
    if index >= 0:
        return min(index + 1, len(tokens.ids))
    raise DataError(
        f"{chat.where}: a token spans the beginning of an assistant turn, and this tokenizer gives no offsets; use a "
        "fast tokenizer (tokenizer.json), or data.format: text"
    )


def _until(chat: Chat, tokens: _Tokens, char: int) -> int | None:
    """Return how many tokens end at or before a character; None where the tokenizer does not tell."""
    if char == len(tokens.text):
        return len(tokens.ids)
    if tokens.offsets is not None:
        return int(np.searchsorted(tokens.offsets[:, 1], char, side="right"))
    head = _tokenise(chat.tokenizer, tokens.text[:char]).ids
    return len(head) if tokens.ids[: len(head)] == head else None


def _end_of_turn(tokenizer: Any, ids: list[int], first: int, stop: int) -> int | None:
    """Return the position of the last special token in [first, stop) if only white space follows it, else None.

    A token that closes what another one opened within the turn (`</tool_call>`) does not end the turn.
    """
    special, openers = special_ids(tokenizer)
    index = next((i for i in range(stop - 1, first - 1, -1) if ids[i] in special), None)
    if index is None or openers.get(ids[index]) in ids[first:index]:
        return None
    rest = ids[index + 1 : stop]
    return None if rest and tokenizer.decode(rest).strip() else index


# --- encode pairs -----------------------------------------------------------------------------------------------------
# Pairs and labelled completions become token ids: the prompt as a model sees it, each completion as it would generate
# it. A pair that is too long is left out, never cut: its two completions could become equal.


class EncodedPair(NamedTuple):
    """A prompt (P,) and two completions (C,), (R,), int32, each with the token that ends it."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    margin: float | None
    weight: float
    tie: bool
    where: str


class EncodedLabelled(NamedTuple):
    """A prompt (P,) and a completion (C,), int32, and whether it is good."""

    prompt_ids: Ids
    completion_ids: Ids
    label: bool
    where: str
    weight: float = 1.0


_BIASED = 0.9  # share of pairs that length alone would get right, above which it is noted
_FEW = 10  # pairs, too few for that note
_LEFT_OUT = {
    "dropped": "{} were longer than data.max_length and are left out",
    "truncated": "{} were longer than data.max_length and are cut",
    "split": "{} were longer than data.max_length and are split",
    "untrainable": "{} have no trained token and are left out",
    "identical": "{} have two completions with the same tokens and are left out",
    "undecided": "rows have equal ratings only and are left out",
}
EncodedRow = TypeVar("EncodedRow", Encoded, EncodedPair, EncodedLabelled)
_PairRow = TypeVar("_PairRow", EncodedPair, EncodedLabelled)


@dataclass(frozen=True)
class Counts:
    """Counts of a source's rows: of supervised fine-tuning, pairs, or labelled completions."""

    source_rows: int = 0  # rows given
    rows: int = 0  # in the data set: fewer by those left out, more by turns, pieces and pairs that stand alone
    tokens: int = 0  # in the data set; a pair's prompt counts once
    trained_tokens: int = 0  # of pairs and labelled completions: of the completions
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    untrainable: int = 0
    identical: int = 0
    undecided: int = 0  # source rows of ratings
    ties: int = 0  # pairs in the data set without a better completion
    chosen_longer: float | None = None  # share of pairs without ties whose chosen completion is longer; equal: half
    one_length: int | None = None  # the tokens of every completion, where all have the same number
    source_notes: tuple[str, ...] = ()  # on how the rows were chosen
    fingerprint: str = ""  # of the chosen rows, both splits
    kind: str = "rows"  # or "pairs"
    mixture: Mixture | None = None  # of several sources

    def left_out(self) -> list[str]:
        """Return a sentence for each kind of row that is left out or cut."""
        found = ((getattr(self, name), text.format(self.kind)) for name, text in _LEFT_OUT.items())
        return [counted(count, text) for count, text in found if count]

    def notes(self) -> list[str]:
        """Return notes on what was left out, and on lengths that give the choice away."""
        notes = [
            *self.source_notes,
            *self.left_out(),
            *([counted(self.ties, "pairs without a better completion")] if self.ties else []),
        ]
        if self.one_length is not None and self.rows > 1:
            notes.append(f"every completion has {self.one_length} tokens: were they cut before?")
        share = self.chosen_longer
        if share is not None and self.rows - self.ties >= _FEW and not 1 - _BIASED < share < _BIASED:
            which, part = ("longer", share) if share > 0.5 else ("shorter", 1 - share)
            notes.append(
                f"the chosen completion is the {which} one in {part:.0%} of the pairs: the model may only learn length"
            )
        return notes


def add_counts(parts: Sequence[Counts]) -> Counts:
    """Return the counts of several sources, or of several blocks of a source, together."""
    if len(parts) == 1:
        return parts[0]
    sums = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(Counts) if f.type == "int"}
    decided = sums["rows"] - sums["ties"]
    longer = sum(part.chosen_longer * (part.rows - part.ties) for part in parts if part.chosen_longer is not None)
    paired = any(part.chosen_longer is not None for part in parts)
    lengths = {part.one_length for part in parts if part.rows}
    one = lengths.pop() if len(lengths) == 1 else None
    return Counts(**sums, chosen_longer=longer / decided if paired else None, one_length=one, kind=parts[0].kind)


@dataclass(frozen=True)
class Dataset(Generic[EncodedRow]):
    """Encoded rows in the order of their sources, in memory or on the disk, and the counts."""

    rows: Sequence[EncodedRow]
    counts: Counts


def encode_pairs(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    overflow: str,
    chat: bool = True,
    block: bool = False,
) -> Dataset[EncodedPair]:
    """Encode examples of the formats preference and ratings.

    Args:
        max_length: most tokens of a prompt and its longer completion together.
        overflow: "error" reports all longer ones; "drop" leaves them out.
        chat: whether texts become a user and an assistant turn where there is a chat template.
        block: whether these are some of a source's rows; then all may be left out.
    Raises:
        ConfigError: rows are not pairs.
        DataError: rows cannot be encoded or are too long (all of them in one), or no pair is left.
    """

    def encode(example: Example) -> list[EncodedPair]:
        where, item = example
        if not isinstance(item, Pair | Ranked):
            raise ConfigError(f"{where}: not a pair; use data.format: preference or ratings")
        pairs = item.pairs if isinstance(item, Ranked) else (item,)
        # One of several completions is in several pairs.
        sides = {id(side): (pair, side) for pair in pairs for side in (pair.chosen, pair.rejected)}
        done = {
            key: encode_completion(pair.prompt, side, tokenizer, where, pair.tools, chat)
            for key, (pair, side) in sides.items()
        }
        return [_pair(pair, done[id(pair.chosen)], done[id(pair.rejected)], where) for pair in pairs]

    rows: list[EncodedPair] = []
    identical = dropped = undecided = 0
    for group in _fit_pairs(examples, encode, max_length, overflow):
        distinct = [pair for pair in group if not np.array_equal(pair.chosen_ids, pair.rejected_ids)]
        kept = [pair for pair in distinct if length(pair) <= max_length]
        undecided += not group
        identical += len(group) - len(distinct)
        dropped += len(distinct) - len(kept)
        # The remaining pairs of a prompt still count as one prompt.
        share = sum(pair.weight for pair in kept) / sum(pair.weight for pair in group) if kept else 1.0
        rows += [pair._replace(weight=pair.weight / share) for pair in kept]
    counts = Counts(len(examples), identical=identical, dropped=dropped, undecided=undecided, kind="pairs")
    decided = [pair for pair in rows if not pair.tie]
    longer = [0.5 + 0.5 * np.sign(len(pair.chosen_ids) - len(pair.rejected_ids)) for pair in decided]
    share_longer = float(np.mean(longer)) if longer else None
    counts = replace(_counted(rows, counts, block), ties=len(rows) - len(decided), chosen_longer=share_longer)
    return Dataset(rows, counts)


def encode_labelled(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    overflow: str,
    chat: bool = True,
    block: bool = False,
) -> Dataset[EncodedLabelled]:
    """Encode examples of the format unpaired; arguments and errors as for `encode_pairs`."""

    def encode(example: Example) -> list[EncodedLabelled]:
        where, item = example
        if not isinstance(item, Labelled):
            raise ConfigError(f"{where}: not a completion with a label; use data.format: unpaired")
        prompt, reply = encode_completion(item.prompt, item.completion, tokenizer, where, item.tools, chat)
        return [EncodedLabelled(prompt, reply, item.label, where)]

    encoded = [row for group in _fit_pairs(examples, encode, max_length, overflow) for row in group]
    rows = [row for row in encoded if length(row) <= max_length]
    return Dataset(rows, _counted(rows, Counts(len(examples), dropped=len(encoded) - len(rows), kind="pairs"), block))


def length(row: EncodedPair | EncodedLabelled) -> int:
    """Return the tokens of the prompt and its longest completion."""
    return len(row.prompt_ids) + max(map(len, _completions(row)))


def sizes_of(rows: Iterable[Encoded | EncodedPair | EncodedLabelled]) -> Sizes:
    """Return (N, 2) the tokens of each row and the trained ones; or (N, 2 or 3) those of prompt and completions."""
    if isinstance(rows, StoredRows):
        return rows.sizes
    return np.array([_sizes(row) for row in rows], dtype=np.int32, order="F")


def lengths_of(rows: Sequence[Encoded | EncodedPair | EncodedLabelled]) -> IntArray:
    """Return (N,) the tokens of each row, or of its prompt and its longest completion."""
    sizes: Any = sizes_of(rows)
    if not len(rows) or isinstance(rows[0], Encoded):
        return sizes.reshape(len(rows), -1)[:, 0] if len(rows) else np.zeros(0, dtype=np.int64)
    return sizes[:, 0] + sizes[:, 1:].max(axis=1)


def _sizes(row: Encoded | EncodedPair | EncodedLabelled) -> tuple[int, ...]:
    if isinstance(row, Encoded):
        return len(row.ids), int(row.trained.sum())
    return tuple(map(len, (row.prompt_ids, *_completions(row))))


def ends_of(rows: Iterable[Encoded | EncodedPair | EncodedLabelled]) -> set[int]:
    """Return the ids that end trained turns."""
    if isinstance(rows, StoredRows):
        return rows.ends
    return {
        end
        for row in rows
        for end in (row.ends if isinstance(row, Encoded) else [int(ids[-1]) for ids in _completions(row)])
    }


def ids_fingerprint(rows: Sequence[EncodedPair | EncodedLabelled]) -> str:
    """Hash the ids and labels of every row, in order."""
    digest = blake2b(digest_size=16)
    for row in rows:
        for ids in (row.prompt_ids, *_completions(row)):
            # The length first: it separates a completion from the next one.
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
        said = (row.margin, row.weight, row.tie) if isinstance(row, EncodedPair) else (row.label, row.weight)
        digest.update(repr(said).encode())
    return digest.hexdigest()


class Part(NamedTuple):
    """A text of a row, its name (prompt, chosen, rejected or completion), and its number of tokens."""

    name: str
    text: str
    tokens: int


def describe_pair(row: EncodedPair | EncodedLabelled, tokenizer: Any) -> list[Part]:
    """Return the texts of a row, the prompt first."""
    named = [(name.removesuffix("_ids"), ids) for name, ids in row._asdict().items() if name.endswith("_ids")]
    return [Part(name, str(tokenizer.decode(ids.tolist())), len(ids)) for name, ids in named]


def shared_part(pair: EncodedPair, tokenizer: Any) -> Part:
    """Return what both completions of a pair begin with."""
    size = min(len(pair.chosen_ids), len(pair.rejected_ids))
    differ = np.flatnonzero(pair.chosen_ids[:size] != pair.rejected_ids[:size])
    size = int(differ[0]) if differ.size else size
    return Part("shared", str(tokenizer.decode(pair.chosen_ids[:size].tolist())) if size else "", size)


def _completions(row: EncodedPair | EncodedLabelled) -> tuple[Ids, ...]:
    return (row.chosen_ids, row.rejected_ids) if isinstance(row, EncodedPair) else (row.completion_ids,)


def _pair(pair: Pair, chosen: EncodedCompletion, rejected: EncodedCompletion, where: str) -> EncodedPair:
    if not np.array_equal(chosen.prompt, rejected.prompt):
        # Only where one completion has thoughts and the other has none.
        raise DataError(f"{where}: the chat template gives chosen and rejected different prompts; give both thoughts")
    return EncodedPair(chosen.prompt, chosen.reply, rejected.reply, pair.margin, pair.weight, pair.tie, where)


def _fit_pairs(
    examples: Sequence[Example], encode: Callable[[Example], list[_PairRow]], max_length: int, overflow: str
) -> list[list[_PairRow]]:
    """Encode each example; raise together what cannot be encoded or, under "error", is too long."""
    groups = _encode_each(examples, encode)
    if overflow == "error":
        _refuse_long([(row.where, length(row)) for group in groups for row in group], max_length, "drop")
    return groups


def _counted(rows: Sequence[Encoded | EncodedPair | EncodedLabelled], counts: Counts, block: bool = False) -> Counts:
    """Add the counts of rows and tokens; raise DataError if there are none, but for a block of a source."""
    if not (rows or block):
        _refuse_empty(counts)
    lengths = [len(ids) for row in rows if not isinstance(row, Encoded) for ids in _completions(row)]
    tokens = sum(lengths) + sum(len(row.ids if isinstance(row, Encoded) else row.prompt_ids) for row in rows)
    trained = sum(lengths) + sum(int(row.trained.sum()) for row in rows if isinstance(row, Encoded))
    one = lengths[0] if len(set(lengths)) == 1 else None
    return replace(counts, rows=len(rows), tokens=tokens, trained_tokens=trained, one_length=one)


def _refuse_empty(counts: Counts) -> None:
    """Raise DataError if no row is left."""
    if not counts.rows:
        why = "; ".join(counts.notes()) or "there are none"
        see = "data.max_length and data.train_on" if counts.kind == "rows" else "data.max_length"
        raise DataError(f"no row is left to train on, of {counts.source_rows:,}: {why}; see {see}")


# --- cache ------------------------------------------------------------------------------------------------------------
# Encoded rows on the disk, so that the next run on the same rows starts faster.
#
# An entry is named by a hash of everything that encoding depends on: the rows' content, what is trained, the chat
# template, the tokenizer, and the versions of the code. What cannot be read is encoded again; what cannot be written is
# left out.

LIMIT = 2 * 10**9  # bytes; the entries used last stay


def cache_folder() -> Path | None:
    """Return $MLXFT_CACHE, or ~/.cache/mlxft/tokens; None without a home folder."""
    given = os.environ.get("MLXFT_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "mlxft" / "tokens"
    except RuntimeError:
        return None


def encoding_key(rows: str, tokenizer: Any, train_on: str, chat: bool) -> str | None:
    """Return the name of the entry for rows of a fingerprint; None where the tokenizer cannot be hashed."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    template = getattr(inner, "chat_template", None)
    backend = getattr(inner, "backend_tokenizer", None)
    # A template that is code has no text to hash.
    text = getattr(tokenizer, "_chat_template", None) is None and isinstance(template, str | dict | None)
    if not text or not getattr(inner, "is_fast", False) or backend is None:
        return None
    # Hash the code itself: a version to raise by hand would be forgotten.
    code = blake2b(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    facts = {
        "rows": rows,
        "code": code.hexdigest(),
        "versions": [version(p) for p in ("transformers", "tokenizers", "mlx-lm")],
        "options": [train_on, chat, day_of(tokenizer), thinking_of(tokenizer), getattr(tokenizer, "_mlxft_rows", None)],
        "tokenizer": type(inner).__name__,
        "special": {k: str(v) for k, v in inner.special_tokens_map.items()},
        "eos": sorted(getattr(tokenizer, "eos_token_ids", ())),
        "thinking": bool(getattr(tokenizer, "has_thinking", False)),
        "template": template,
    }
    digest = blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=20)
    digest.update(backend.to_str().encode())
    return digest.hexdigest()


def read_cache(key: str, examples: Sequence[Example]) -> list[Encoded] | None:
    """Return the entry's rows; None if there is none, or it is damaged."""
    if (folder := cache_folder()) is None:
        return None
    path = folder / f"{key}.npz"
    try:
        with path.open("rb") as raw, np.load(raw) as file:  # the archive's own checksums tell a damaged one
            ids, trained, lengths, sources = (file[n] for n in ("ids", "trained", "lengths", "sources"))
            ends, counts = (file[n].tolist() for n in ("ends", "end_counts"))
        if not (ids.shape == trained.shape == (int(lengths.sum()),) and lengths.shape == sources.shape):
            return None
        cuts = np.cumsum(lengths)[:-1]
        parts = np.split(ids.astype(np.int32, copy=False), cuts), np.split(trained.astype(np.bool_, copy=False), cuts)
        wheres = [examples[i].where for i in sources.tolist()]
        rest = iter(ends)
        rows = [Encoded(i, t, w, tuple(islice(rest, count))) for i, t, w, count in zip(*parts, wheres, counts)]
        with suppress(OSError):
            os.utime(path)  # used now: among the last to go
        return rows
    except Exception:  # a file of any content may stand there, and numpy's readers raise whatever they meet
        return None


def write_cache(key: str, rows: Sequence[Encoded], sources: Sequence[int]) -> None:
    """Make an entry of rows and the indices of the examples that they come from; whole, or not at all."""
    if (folder := cache_folder()) is None:
        return
    arrays = {
        "ids": np.concatenate([row.ids for row in rows]).astype(np.int32),
        "trained": np.concatenate([row.trained for row in rows]),
        "lengths": np.array([len(row.ids) for row in rows], dtype=np.int64),
        "sources": np.array(sources, dtype=np.int64),
        "ends": np.array([end for row in rows for end in row.ends], dtype=np.int64),
        "end_counts": np.array([len(row.ends) for row in rows], dtype=np.int64),
    }
    with suppress(OSError, CheckpointError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_beside(folder / f"{key}.npz", lambda path: np.savez(path, **arrays))  # type: ignore[arg-type]
        _evict(folder, "*.npz", LIMIT)


def _evict(folder: Path, pattern: str, limit: int, spared_s: float = 0) -> None:
    """Delete the entries used longest ago, so that the rest stays within a limit; but none of the last seconds."""
    total, now = 0, time.time()
    found = [(path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob(pattern)]
    for used, size, path in sorted(found, reverse=True):
        total += size
        if total > limit and now - used >= spared_s:
            path.unlink(missing_ok=True)


# --- stored rows ------------------------------------------------------------------------------------------------------
# Rows of a streamed source (data.stream): encoded to one file, from which training reads those of a batch.
#
# The file has the rows one after another; then where each begins, int64, and their `Sizes`, int32, a column after the
# other; then facts as JSON, their number of bytes and _WHOLE. It is named as an entry of the cache is, by everything
# that the rows depend on, and renamed into place once it is complete: what a killed process leaves is never read. In
# memory are the sizes, 8 bytes a row (12 of a pair); where it begins is read from the file. Rows are read by their
# numbers, so that an epoch's order is drawn from all rows, as it is without `data.stream`.

STORED_LIMIT = 50 * 10**9  # bytes; the files used last stay
_SPARED_S = 86400.0  # however many they are, files that were used on the last day stay, too
_BLOCK = 256  # examples that are encoded at once
_WHOLE = b"mlxft rows 1"
_HEAD = struct.Struct("<IQ")  # of a row: checksum of the rest, bytes of its JSON
_ARRAYS = ("ids", "trained", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")


def _packed(row: Encoded | EncodedPair | EncodedLabelled) -> bytes:
    arrays = [value for value in row if isinstance(value, np.ndarray)]
    others = [value for value in row if not isinstance(value, np.ndarray)]
    about = json.dumps([[len(value) for value in arrays], others]).encode()
    rest = b"".join([about, *(value.tobytes() for value in arrays)])
    return _HEAD.pack(zlib.crc32(rest), len(about)) + rest


class _File(Generic[EncodedRow]):
    """A file of stored rows, open for reading: it can be read even when another process has removed it.

    Raises:
        ValueError, OSError, LookupError, TypeError: there is none, or it is damaged.
    """

    def __init__(self, path: Path, kind: type[EncodedRow]) -> None:
        self._path, self._kind = path, cast(Any, kind)
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        end = os.fstat(self._fd).st_size - len(_WHOLE)
        if self._read(end, len(_WHOLE)) != _WHOLE:
            raise ValueError("not a whole file of rows")
        (size,) = struct.unpack("<Q", self._read(end - 8, 8))
        self.facts: dict[str, Any] = parse_json(self._read(end - 8 - size, size))
        rows, columns = self.facts["shape"]
        place = end - 8 - size - 4 * rows * columns
        sizes = np.frombuffer(self._read(place, 4 * rows * columns), dtype="<i4")
        self.sizes: Sizes = sizes.reshape(columns, rows).T
        self._places = place - 8 * (rows + 1)
        self.counts = Counts(**self.facts["counts"] | {"source_notes": ()})

    def _read(self, at: int, size: int) -> bytes:
        if at < 0 or len(found := os.pread(self._fd, size, at)) < size:
            raise ValueError("the file is too short")
        return found

    def row(self, number: int) -> EncodedRow:
        """Return a row; raise DataError if the disk gives another than was written."""
        start, stop = struct.unpack("<QQ", self._read(self._places + 8 * number, 16))
        raw = self._read(start, stop - start)
        checksum, size = _HEAD.unpack_from(raw)
        if zlib.crc32(raw[_HEAD.size :]) != checksum:
            raise DataError(f"{self._path}: is damaged at row {number}; delete it, and resume: it is made again")
        at = _HEAD.size + size
        lengths, others = (iter(part) for part in parse_json(raw[_HEAD.size : at]))
        values: list[Any] = []
        for name in self._kind._fields:
            if name in _ARRAYS:
                kind, length = np.dtype(np.bool_ if name == "trained" else "<i4"), next(lengths)
                values.append(np.frombuffer(raw, kind, length, at).copy())
                at += length * kind.itemsize
            else:
                value = next(others)
                values.append(tuple(value) if isinstance(value, list) else value)
        return self._kind(*values)


class StoredRows(Sequence[EncodedRow]):
    """The rows of files, one source after the other, each read when it is asked for.

    Attributes:
        sizes: see `sizes_of`.
        ends: the ids that end trained turns.
    """

    def __init__(self, files: Sequence[_File[EncodedRow]]) -> None:
        self.files: Sequence[_File[EncodedRow]] = files
        self._starts = [0, *accumulate(len(file.sizes) for file in files)]
        self.sizes = files[0].sizes if len(files) == 1 else np.concatenate([file.sizes.T for file in files], axis=1).T
        self.ends = {end for file in files for end in file.facts["ends"]}

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, at: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, at: slice) -> list[EncodedRow]: ...

    def __getitem__(self, at: int | slice) -> EncodedRow | list[EncodedRow]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        file = bisect_right(self._starts, at) - 1
        return self.files[file].row(at - self._starts[file])


def _write_stored(path: Path, blocks: Iterable[Dataset[Any]], facts: Callable[[], dict[str, Any]]) -> None:
    """Write the rows of blocks, and then the facts."""
    places, columns = array("q", [0]), list[Any]()
    marks: set[int] = set()
    counts: Counts | None = None
    with path.open("wb", buffering=1 << 20) as file:
        for block in blocks:
            counts = add_counts([block.counts] if counts is None else [counts, block.counts])
            marks |= ends_of(block.rows)
            for row in block.rows:
                raw = _packed(row)
                file.write(raw)
                places.append(places[-1] + len(raw))
                sizes = _sizes(row)
                columns = columns or [array("i") for _ in sizes]
                for column, size in zip(columns, sizes):
                    column.append(size)
        assert counts is not None, "a source without rows has raised"
        _refuse_empty(counts)
        about = {"shape": [len(places) - 1, len(columns)], "counts": asdict(counts), "ends": sorted(marks), **facts()}
        text = json.dumps(about).encode()
        file.writelines([places.tobytes(), *(column.tobytes() for column in columns), text])
        file.write(struct.pack("<Q", len(text)) + _WHOLE)


def _stored(
    data: DataSettings,
    at: str,
    spec: Paths,
    split: str,
    tokenizer: Any,
    encode: Encode[Any],
    kind: type[EncodedRow],
) -> _File[EncodedRow]:
    """Open a source's encoded rows on the disk; where there are none yet, encode them.

    Raises:
        ConfigError: the source is read whole, or there is no place for the file.
        DataError: rows do not fit, cannot be encoded or are too long.
        CheckpointError: the file cannot be written, as on a full disk.
    """
    found, total = source_hash(spec, split)
    chosen = data.model_dump_json(include={"format", "fields", "max_length", "overflow", "bad_rows"})
    of = f"{kind.__name__} {chosen} {found}"
    key = encoding_key(of, tokenizer, data.train_on or "assistant", data.template == "auto")
    if (folder := cache_folder()) is None or key is None:
        why = "there is no home folder: set MLXFT_CACHE to one" if key else "the tokenizer has no tokenizer.json"
        raise ConfigError(f"data.stream: encoded rows are found again by what they depend on, and {why}")
    path = folder / f"{key}.rows"
    with suppress(OSError, ValueError, LookupError, TypeError):
        opened = _File(path, kind)
        os.utime(path)  # used now: among the last to go
        return opened
    rows = _Reading(data, spec, split, tokenizer)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with bar(make_console(stderr=True), total, f"rows of {at} encoded") as advance:
            write_beside(path, lambda part: _write_stored(part, rows.blocks(encode, advance), rows.facts))
    except (CheckpointError, OSError) as e:
        way = "encoded rows take some 5 bytes a token: make room, or set MLXFT_CACHE to a folder on another disk"
        raise CheckpointError(f"data.stream: {e}; {way}") from e
    with suppress(OSError):
        _evict(folder, "*.rows", STORED_LIMIT, _SPARED_S)
    return _File(path, kind)


class _Reading:
    """Reads a source block by block, and hashes the rows that fit as `data_fingerprint` does."""

    def __init__(self, data: DataSettings, spec: Paths, split: str, tokenizer: Any) -> None:
        self._data, self._source, self._columns, self._hashed = data, (spec, split), Columns(), blake2b(digest_size=16)
        self._said: list[str] = []
        chat = data.template == "auto" and tokenizer.has_chat_template
        self._conversion = Conversion(data.format, data.fields, chat=chat, columns=self._columns, kept=REPORTED)

    def examples(self) -> Iterator[Example]:
        """Yield the rows that fit."""
        return self._conversion.examples(read_rows(*self._source, self._said))

    def blocks(self, encode: Encode[EncodedRow], advance: Callable[[int], None]) -> Iterator[Dataset[EncodedRow]]:
        """Yield encoded rows. After the first row that does not fit nothing more is encoded, only the others found."""
        drop, examples = self._data.bad_rows == "drop", self.examples()
        while block := list(islice(examples, _BLOCK)):
            if drop or not self._conversion.wrong:
                _hash_examples(self._hashed, block)
                try:
                    found = encode(block, True)
                except DataError as e:
                    raise DataError(f"{e}\nnot encoded yet (data.stream): the rows after {block[-1].where}") from e
                yield found
            advance(len(block))
        _check_all(self._conversion, self._data, *self._source)

    def facts(self) -> dict[str, Any]:
        """Return the notes and the hash of the rows, once all are read."""
        notes = self._said + _notes(self._columns, (), self._conversion.wrong, self._conversion.problems)
        return {"notes": notes, "fingerprint": self._hashed.hexdigest()}


# --- mixture ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several sources of training rows, and how often an epoch uses each.

    The rows of a source are drawn in passes, each in an order of its own. An epoch continues where the one before has
    ended and takes weight x rows of them, rounded so that epochs add up. So no row is ever used twice more than another
    one of its source.

    Attributes:
        weights: name of each source -> uses of each of its rows in an epoch.
        starts: (S + 1,) where each source begins among all rows, and their number.
        tokens, trained: (N,) of each row.
    """

    weights: dict[str, Fraction]
    starts: tuple[int, ...]
    tokens: Sizes
    trained: Sizes
    seed: int

    def __post_init__(self) -> None:
        for (name, weight), (start, end) in zip(self.weights.items(), pairwise(self.starts)):
            if weight * (end - start) < 1:
                raise ConfigError(
                    f"data.mix.{name}.weight: {float(weight):g} of {end - start:,} rows is less than one row an epoch; "
                    f"raise it to at least {1 / (end - start):.2g}"
                )

    def epoch(self, number: int) -> IntArray:
        """Return the rows of an epoch, of one source after the other; a row may be among them several times."""
        found = []
        for source, (weight, (start, end)) in enumerate(zip(self.weights.values(), pairwise(self.starts))):
            rows = end - start
            at, stop = int(number * weight * rows), int((number + 1) * weight * rows)
            while at < stop:
                turn, first = divmod(at, rows)
                order = np.random.default_rng([self.seed, 7, source, turn]).permutation(rows)
                part = order[first : first + stop - at]
                found.append(start + part)
                at += len(part)
        return np.concatenate(found)

    def count(self, rows: Sequence[int] | npt.NDArray[Any]) -> dict[str, tuple[int, int, int]]:
        """Return the rows, tokens and trained tokens that each source has among some rows."""
        chosen = np.asarray(rows)
        sources = np.searchsorted(self.starts, chosen, side="right") - 1
        values = (None, self.tokens[chosen], self.trained[chosen])
        sums = [np.bincount(sources, each, len(self.weights)) for each in values]
        return {name: (int(a), int(b), int(c)) for name, a, b, c in zip(self.weights, *sums)}


# --- dataset ----------------------------------------------------------------------------------------------------------
# Encoded rows as a data set: lengths held to the limit, everything that was left out counted.

_T = TypeVar("_T")

OVERFLOW = ("error", "drop", "truncate", "split")
TRAIN_ON = ("assistant", "last", "completion", "all")


def encode_rows(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    train_on: str,
    max_length: int,
    overflow: str,
    chat: bool = True,
    cache: bool = False,
    block: bool = False,
) -> Dataset[Encoded]:
    """Encode examples of supervised fine-tuning, up to a length.

    Args:
        max_length: most tokens of a row.
        overflow: what to do with a longer one. "error" reports them all; "drop" leaves them out; "truncate" keeps the
            head, and drops rows without a trained token in it; "split" (texts only) makes pieces of max_length, each
            beginning with the last token of the one before, untrained: every token but the first is trained once.
        cache: whether to read the encoded rows from the disk, and to write them there.
        block: whether these are some of a source's rows; then all may be left out.
    Raises:
        ConfigError: an unknown `train_on` or `overflow`, a `max_length` below 2, or "split" for other items than texts.
        DataError: rows cannot be encoded or are too long (all of them in one), or no row is left.
    """
    for setting, value, known in (("train_on", train_on, TRAIN_ON), ("overflow", overflow, OVERFLOW)):
        if value not in known:
            raise ConfigError(f"data.{setting} is {value!r}; expected one of {', '.join(known)}{nearest(value, known)}")
    if max_length < 2:
        raise ConfigError(f"data.max_length is {max_length}; expected at least 2: one token to read and one to predict")
    if overflow == "split" and not all(isinstance(example.item, Text) for example in examples):
        raise ConfigError("data.overflow: split is for data.format: text; use error, drop or truncate")
    key = encoding_key(data_fingerprint(examples), tokenizer, train_on, chat) if cache else None
    encoded = read_cache(key, examples) if key else None
    if encoded is None:
        groups = _encode_each(examples, lambda example: encode(example.item, tokenizer, example.where, train_on, chat))
        encoded = [row for group in groups for row in group]
        if key and encoded:
            write_cache(key, encoded, [i for i, group in enumerate(groups) for _ in group])
    if overflow == "error":
        _refuse_long([(row.where, len(row.ids)) for row in encoded], max_length, "drop, truncate or split (texts)")
    rows, changed = _fit(encoded, max_length, overflow)
    return Dataset(rows, _counted(rows, Counts(len(examples), **changed), block))


def _encode_each(examples: Sequence[Example], encode: Callable[[Example], list[_T]]) -> list[list[_T]]:
    """Encode each example into its rows, and raise all problems together."""
    groups: list[list[_T]] = []
    problems: list[str] = []
    for example in examples:
        try:
            groups.append(encode(example))
        except DataError as exc:
            problems.append(str(exc))
    if problems:
        raise DataError(report_lines(problems))
    return groups


def _refuse_long(rows: Iterable[tuple[str, int]], max_length: int, ways: str) -> None:
    """Raise DataError for rows, each with its tokens, that are longer than `max_length`."""
    long = [(where, tokens) for where, tokens in rows if tokens > max_length]
    if not long:
        return
    lines = [f"{where}: {tokens} tokens; data.max_length is {max_length}" for where, tokens in long]
    longest = max(tokens for _, tokens in long)
    advice = f"raise data.max_length (the longest has {longest}) or set data.overflow: {ways}"
    raise DataError(f"{report_lines(lines)}\n{advice}")


def _fit(encoded: list[Encoded], max_length: int, overflow: str) -> tuple[list[Encoded], dict[str, Any]]:
    """Return rows within the length, and how many are left out or cut, by the names in `Counts`."""
    rows: list[Encoded] = []
    changed: Counter[str] = Counter()
    for row in encoded:
        if not row.trained.any():
            changed["untrainable"] += 1
        elif len(row.ids) <= max_length:
            rows.append(row)
        elif overflow == "split":
            changed["split"] += 1
            # The last token of a piece is a target there, and the context of the next piece's first target.
            for start in range(0, len(row.ids) - 1, max_length - 1):
                trained = row.trained[start : start + max_length].copy()
                trained[0] = False
                rows.append(Encoded(row.ids[start : start + max_length], trained, row.where))
        elif overflow == "truncate" and row.trained[:max_length].any():
            changed["truncated"] += 1
            rows.append(row._replace(ids=row.ids[:max_length], trained=row.trained[:max_length]))
        else:
            changed["dropped"] += 1
    return rows, changed


def split_valid(examples: Sequence[_T], share: float, seed: int) -> tuple[list[_T], list[_T]]:
    """Split a share of the examples off for validation: (train, valid), each in the source's order.

    The same examples, share and seed give the same lists. Valid has the rounded share, at least one row.
    """
    count = max(1, round(share * len(examples)))
    if not 0 < share < 1 or count >= len(examples):
        raise DataError(
            f"empty valid split, or no train rows beside it: {len(examples)} rows and a share of {share}; each needs "
            "at least one row: give more rows, another share between 0 and 1, or a validation file"
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


# Names by which runs on the disk have hashed their rows.
_HASHED_AS: dict[type, str] = {Pair: "Preference", Labelled: "Judged"}


def data_fingerprint(*splits: Sequence[Example]) -> str:
    """Hash the rows of each split, in order, so that a run is resumed on the same data.

    The rows and not their ids, which depend on the date where a chat template writes it, and on versions of libraries.
    """
    digest = blake2b(digest_size=16)
    for examples in splits:
        _hash_examples(digest, examples)
        digest.update(b"\n")
    return digest.hexdigest()


def _hash_examples(digest: blake2b, examples: Sequence[Example]) -> None:
    # An item within an item is not JSON, nor a row's value such as a date of parquet's.
    as_json = json.JSONEncoder(sort_keys=True, default=lambda v: vars(v) if is_dataclass(v) else repr(v))
    for _, item in examples:
        kind = _HASHED_AS.get(type(item), type(item).__name__)
        digest.update(as_json.encode([kind, vars(item)]).encode("utf-8", "surrogatepass") + b"\n")


def trained_spans(encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return a row as spans of text, each with whether its tokens are trained."""
    ids, trained = encoded.ids.tolist(), encoded.trained
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    return [(str(tokenizer.decode(ids[a:b])), bool(trained[a])) for a, b in pairwise(edges) if a < b]


@contextmanager
def of_setting(setting: str) -> Iterator[None]:
    """Let a DataError inside the block name a setting."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error


of_valid = partial(of_setting, "data.valid")


class Splits(NamedTuple):
    """Training and validation examples, the second empty where there are none, and notes."""

    train: list[Example]
    valid: list[Example]
    notes: list[str]


def _load(
    data: DataSettings, at: str, spec: Paths, split: str, chat: bool, reads: Collection[str] | None
) -> tuple[list[Example], list[str] | None, list[str]]:
    """Return the examples of one source, their labels where data.shots needs them and they have some, and notes."""
    columns, said = Columns(), list[str]()
    shots = data.shots is not None and at == "data"
    with _of_source(at):
        found = read_rows(spec, split, said)
        rows = list(found) if shots else found  # which are not all held where nothing but their items is needed
        conversion = Conversion(data.format, data.fields, chat=chat, columns=columns)
        examples = list(conversion.examples(rows))
        _check_all(conversion, data, spec, split)
    labels = None
    if shots:
        used = {example.where for example in examples}
        kept = [row.data for row in rows if isinstance(row, Row) and row.where in used]
        labels = labels_of(examples, kept, data.label)
    return examples, labels, said + _notes(columns, reads, conversion.wrong, conversion.problems)


def _check_all(conversion: Conversion, data: DataSettings, spec: Paths, split: str) -> None:
    """Raise what is wrong with the rows of a source, once all are read."""
    try:
        conversion.check(data.bad_rows == "drop")
    except DataError as e:
        if not conversion.fitted:
            raise
        count = f"{conversion.wrong:,} of {conversion.wrong + conversion.fitted:,} rows"
        way = f"{count} do not fit; data.bad_rows: drop leaves them out"
        given = any(one.startswith(("hf:", "python:")) for one in ([spec] if isinstance(spec, str) else spec))
        files = [] if given else find_files(spec, split)
        odd = [f for f in files if len(files) > 1 and not _any_fits(data, "data", f.spec, split)]
        if odd:
            way = f"{counted(len(odd), 'files have')} other columns: {', '.join(file.name for file in odd[:_NAMED])}"
            if split == "train":
                name = re.sub(r"\W", "_", odd[0].path.stem)
                way += f"; a file with a format and fields of its own is a source: data.mix.{name}.path={odd[0].spec}"
        raise DataError(f"{e}\n{way}") from e


def _notes(columns: Columns, reads: Collection[str] | None, wrong: int, problems: Sequence[Problem]) -> list[str]:
    """Return notes on the columns of a source, and on its rows that are left out."""
    first = "; ".join(f"{problem.where}: {problem.text}" for problem in problems[:_NAMED])
    which = "the first" if wrong > 1 else "this one"
    left_out = f"{counted(wrong, 'rows are left out')} (data.bad_rows: drop), {which}: {first}"
    return columns.notes(reads) + ([left_out] if problems else [])


def with_format(config: Config) -> Config:
    """Return a recipe with the format of its rows, and the names of its fields, where it leaves them open.

    Raises:
        ConfigError: other settings do not work with this format.
        DataError: none of the formats that the objective takes fits the rows, or several.
    """
    formats = objective_class(config.objective).formats(config)
    data = _recognised(config.data, formats, f"objective {config.objective}")
    return config.model_copy(update={"data": data})


def _recognised(data: DataSettings, formats: Sequence[str] = tuple(FORMATS), taker: str = "") -> DataSettings:
    reading = _reading(data, "data", data.train, "train", formats, taker)
    found = data if reading is None else data.recognised(reading.notes, format=reading.format, fields=reading.fields)
    among = [name for name in formats if (name == "prompts") == (found.format == "prompts")]
    notes: list[str] = []

    def read(source: _Source, at: str, name: str, split: str) -> _Source:
        """Return a source with a reading of its own, unless the settings say it or its rows fit that of data.train."""
        inherits = source.format is None and source.fields is None
        if inherits and _any_fits(found, at, source.path, split):
            return source
        if (own := _reading(data.of(source), at, source.path, split, among, taker)) is None:
            return source
        notes.extend(f"{name}: {note}" for note in own.notes)
        return source.model_copy(update={"format": own.format, "fields": own.fields})

    mix = {name: read(source, f"data.mix.{name}", name, "train") for name, source in data.mix.items()}
    held_out = valid_source(data)
    valid = None if held_out is None else read(held_out, "data.valid", "validation", "valid")
    update = {"mix": mix} | ({} if valid == held_out else {"valid": valid})
    return found.recognised(notes, **update) if notes or mix != data.mix else found


_Source = TypeVar("_Source", bound=SourceSettings)


def _reading(
    data: DataSettings, at: str, spec: Paths, split: str, formats: Sequence[str], taker: str
) -> Recognised | None:
    """Recognise the rows of a source; return None where the settings say how they are read."""
    chat, is_open = data.template == "auto", data.format == "auto"
    if not is_open and (data.format not in formats or not FORMATS[data.format].missing(data.fields)):
        return None  # there is nothing to find, or the objective refuses it
    if spec == "environment":
        return Recognised(formats[0], data.fields, []) if is_open else None
    wanted = tuple(name for name in formats if chat or name not in CHATS) if is_open else (data.format,)
    try:
        with _of_source(at, spec if at == "data.valid" and data.valid is None else ""):
            found = recognise(read_rows(spec, split), data.fields, wanted, chat=chat, taker=taker)
    except DataError:
        if is_open or data.bad_rows == "error":
            raise
        return None  # some rows may fit
    return found if is_open or found.fields != data.fields else None


def _any_fits(data: DataSettings, at: str, spec: Paths, split: str) -> bool:
    """Return whether some of the first rows of a source can be read as those of data.train."""
    if spec == "environment":
        return True
    with _of_source(at):
        rows = islice(read_rows(spec, split), RECOGNISED_BY)
        conversion = Conversion(data.format, data.fields, chat=data.template == "auto", kept=0)
        return any(True for _ in conversion.examples(rows))


@contextmanager
def _of_source(at: str, folder: Paths = "") -> Iterator[None]:
    """Let an error name the settings of a source.

    Args:
        at: data (data.train), data.mix.NAME or data.valid.
        folder: data.train that has the validation rows, too, so that data.valid does not name them.
    """
    setting = {"data": "data.train", "data.valid": at}.get(at, f"{at}.path")
    try:
        yield
    except (ConfigError, DataError) as e:
        text = re.sub(r"\bdata\.(?=(?:format|fields)\b)", f"{at}.", str(e))
        text = re.sub(r"(?<!yaml )\bdata\.train=", f"{setting}=", text)
        text += f"\nwith these write data.valid={folder}, too" if folder and f"{at}.format" in text else ""
        in_config = isinstance(e, ConfigError) or at != "data"
        raise type(e)(f"{setting}: {text}" if in_config else text) from e


def valid_source(data: DataSettings) -> SourceSettings | None:
    """Return the source of validation rows: data.valid, or data.train if it has some of its own; else None."""
    own = data.valid is None and split_in(data.train, "valid")
    return SourceSettings(path=data.train) if own else data.held_out


def load_splits(
    data: DataSettings,
    seed: int,
    setting: str = "data.shots",
    *,
    tokenizer: Any = None,
    reads: Collection[str] | None = (),
    mix: bool = False,
) -> Splits:
    """Read the training and validation examples; the second is empty where a recipe names none and a folder has none.

    Args:
        setting: the setting that asks for few rows, for messages.
        tokenizer: of the model to train; None: one with a chat template.
        reads: columns that the objective reads besides those of the format; None: all.
        mix: whether the caller reads the sources of data.mix, which are not among these examples.
    Raises:
        ConfigError: a recipe streams rows, or mixes sources, which the caller does not.
    """
    for name, used in (("stream", data.stream), ("mix", data.mix and not mix)):
        if used:
            why = "hold all rows in memory" if name == "stream" else "draw rows from one source"
            raise ConfigError(f"data.{name}: is for the objectives sft, reward and preference; others {why}")
    data = _recognised(data) if "auto" in data.formats.values() else data
    chat = data.template == "auto" and (tokenizer is None or tokenizer.has_chat_template)
    how = (chat, None if reads is None else {*reads, data.label or ""})
    train, labels, notes = _load(data, "data", data.train, "train", *how)
    valid: list[Example] = []
    other: list[str] = []
    if isinstance(data.valid, float):
        # The validation rows do not depend on data.shots.
        kept, held_out = split_valid(list(range(len(train))), data.valid, seed)
        train, valid = [train[i] for i in kept], [train[i] for i in held_out]
        labels = labels and [labels[i] for i in kept]
    elif (source := valid_source(data)) is not None:
        valid, _, other = _load(data.of(source), "data.valid", source.path, "valid", *how)
    notes = [*data.notes, *notes, *(f"validation: {note}" for note in other if note not in notes)]
    if data.shots is None:
        return Splits(train, valid, notes)
    shots = pick_shots(labels, len(train), data.shots, seed, setting)
    return Splits([train[i] for i in shots.rows], valid, [*notes, shots.note])


Encode: TypeAlias = Callable[[Sequence[Example], bool], Dataset[EncodedRow]]


def encode_sources(
    config: Config, tokenizer: Any, encode: Encode[EncodedRow], kind: Any
) -> tuple[Dataset[EncodedRow], Dataset[EncodedRow] | None, list[str], str]:
    """Load and encode the rows that a recipe names, from one source or several, in memory or on the disk.

    Args:
        encode: encodes examples; called also with whether they are a block of a source.
        kind: of the rows that it makes.
    Returns:
        Training and validation rows, notes, and a hash of the rows.
    """
    config = with_format(config) if "auto" in config.data.formats.values() else config
    data = config.data
    load: Any = _load_stored if data.stream else _load_encoded
    found: _Loaded[EncodedRow] = load(config, tokenizer, encode, kind)
    rows: Sequence[EncodedRow] = _joined([each.rows for each in found.sources])
    counts = add_counts([each.counts for each in found.sources])
    notes = [*found.notes, *chat_notes(tokenizer, ends_of(rows), found.first)]
    if data.mix:
        sizes = sizes_of(rows)
        tokens, trained = (sizes[:, 0], sizes[:, 1]) if kind is Encoded else (sizes.sum(1), sizes[:, 1:].sum(1))
        weights = {name: Fraction(repr(source.weight)) for name, source in data.sources.items()}
        starts = (0, *accumulate(len(each.rows) for each in found.sources))
        counts = replace(counts, mixture=Mixture(weights, starts, tokens, trained, config.run.seed))
    return Dataset(rows, counts), found.valid, notes, found.fingerprint


@dataclass(frozen=True)
class _Loaded(Generic[EncodedRow]):
    """Datasets of a recipe's sources and of its validation rows, notes, the first examples, and a hash of the rows."""

    sources: list[Dataset[EncodedRow]]
    valid: Dataset[EncodedRow] | None
    notes: list[str]
    first: Sequence[Example]
    fingerprint: str


def _load_encoded(config: Config, tokenizer: Any, encode: Encode[EncodedRow], kind: Any) -> _Loaded[EncodedRow]:
    """Load and encode rows into memory."""
    data = config.data
    train, valid, notes = load_splits(data, config.run.seed, tokenizer=tokenizer, mix=True)
    groups = {"data.train": train}
    for name, source in data.mix.items():
        at, chat = f"data.mix.{name}", data.template == "auto" and tokenizer.has_chat_template
        groups[f"{at}.path"], _, said = _load(data.of(source), at, source.path, "train", chat, ())
        notes += [f"{name}: {note}" for note in said]
    sources = [encode(train, False)]
    for setting, examples in islice(groups.items(), 1, None):
        with of_setting(setting):
            sources.append(encode(examples, False))
    with of_valid():
        second = encode(valid, False) if valid else None
    few = _LOOKED_AT // len(groups) if data.template == "auto" else 0
    first = [example for group in groups.values() for example in group[:few]]
    return _Loaded(sources, second, notes, first, data_fingerprint(*groups.values(), valid))


def _load_stored(config: Config, tokenizer: Any, encode: Encode[EncodedRow], kind: Any) -> _Loaded[EncodedRow]:
    """Encode rows to the disk, or find them there."""
    data, files, notes = config.data, list[Any](), config.data.notes
    wanted: list[tuple[str, str, SourceSettings, str]] = [("data", "", SourceSettings(path=data.train), "train")]
    wanted += [(f"data.mix.{name}", f"{name}: ", source, "train") for name, source in data.mix.items()]
    wanted += [("data.valid", "validation: ", held_out, "valid")] if (held_out := valid_source(data)) else []
    for at, name, source, split in wanted:
        with _of_source(at):
            files.append(_stored(data.of(source), at, source.path, split, tokenizer, encode, kind))
        notes += [f"{name}{note}" for note in files[-1].facts["notes"] if note not in notes]
    sources = [_Reading(data.of(s), s.path, "train", tokenizer).examples() for s in data.sources.values()]
    few = _LOOKED_AT // len(sources) if data.template == "auto" else 0
    first = [example for examples in sources for example in islice(examples, few)]
    found = [Dataset(StoredRows([file]), file.counts) for file in files]
    fingerprint = blake2b(" ".join(file.facts["fingerprint"] for file in files).encode(), digest_size=16).hexdigest()
    valid = found.pop() if held_out is not None else None
    return _Loaded(found, valid, notes, first, f"stream {fingerprint}")


def _joined(parts: Sequence[Sequence[EncodedRow]]) -> Sequence[EncodedRow]:
    """Return the rows of several sources, one after the other."""
    if len(parts) == 1:
        return parts[0]
    stored = [file for part in parts if isinstance(part, StoredRows) for file in part.files]
    return StoredRows(stored) if stored else list(chain(*parts))


class EncodedSplits(NamedTuple):
    """A recipe's training and validation rows as token ids, notes, and a hash of the rows."""

    train: Dataset[Encoded]
    valid: Dataset[Encoded] | None
    notes: list[str]
    fingerprint: str


def load_encoded(config: Config, tokenizer: Any, *, mix: bool = False) -> EncodedSplits:
    """Load and encode the rows that a recipe names.

    Args:
        mix: whether the caller draws an epoch's rows by `counts.mixture`.
    Raises:
        ConfigError, DataError: settings or rows do not fit; a recipe mixes sources, and the caller does not.
    """
    data = config.data
    if data.mix and not mix:
        raise ConfigError(f"data.mix: objective {config.objective} draws its rows from one source; leave it out")
    options: dict[str, Any] = {
        "train_on": data.train_on or "assistant",
        "max_length": data.max_length,
        "overflow": data.overflow,
        "chat": data.template == "auto",
    }

    def encode_some(examples: Sequence[Example], block: bool) -> Dataset[Encoded]:
        return encode_rows(examples, tokenizer, **options, cache=data.cache and not block, block=block)

    return EncodedSplits(*encode_sources(config, tokenizer, encode_some, Encoded))


# --- samples ----------------------------------------------------------------------------------------------------------
# A few rows to compute something on: to compare models, or to see what a layer's inputs are like.

_LONGEST = 256  # tokens of a row, so that no single row is the whole sample


def built_in_examples(scores: bool) -> list[Example]:
    """Return the package's own rows: questions with completions, and reviews; for scores, pairs."""
    folder = Path(__file__).parents[1] / "demo"
    if scores:
        return convert(read_rows(str(folder / "pairs.jsonl"), "valid"), "preference")
    examples: list[Example] = []
    lines = [(folder / name).read_text("utf-8").splitlines()[:60] for name in ("rows.jsonl", "reviews.jsonl")]
    for i, (chat, review) in enumerate(zip(*(map(parse_json, part) for part in lines)), 1):
        examples.append(Example(f"rows.jsonl:{i}", Completion(*(turn["content"] for turn in chat["messages"]))))
        examples.append(Example(f"reviews.jsonl:{i}", Text(review["review"])))
    return examples


def sample_rows(
    examples: Sequence[Example], tokenizer: Any, config: Config | None, scores: bool, budget: int
) -> list[Encoded]:
    """Return randomly chosen rows, the same each time, of at most `budget` tokens together."""
    order = list(examples)
    random.Random(0).shuffle(order)
    chat = config is None or config.data.template == "auto"
    train_on = "all" if config is None else config.data.train_on or "assistant"
    found: list[Encoded] = []
    problem: DataError | None = None
    spent = 0
    for example in order:
        try:
            rows = _scored(example, tokenizer, chat) if scores else _written(example, tokenizer, chat, train_on)
            for row in (_shortened(row, scores) for row in rows):
                if row.trained.any() and (not found or spent + len(row.ids) <= budget):
                    found.append(row)
                    spent += len(row.ids)
        except DataError as error:
            problem = error
        if spent >= budget - 16:
            break
    if not found:
        raise problem or DataError("no row has a token that a model would predict")
    return found


def _shortened(row: Encoded, scores: bool) -> Encoded:
    """Keep at most _LONGEST tokens, around the first compared one; of a completion to be scored, the last ones."""
    if len(row.ids) <= _LONGEST:
        return row
    first = int(np.argmax(row.trained))
    start = len(row.ids) - _LONGEST if scores else max(0, min(first - _LONGEST // 2, len(row.ids) - _LONGEST))
    trained = row.trained[start : start + _LONGEST].copy()
    trained[0] = False
    return Encoded(row.ids[start : start + _LONGEST], trained, row.where)


def _written(example: Example, tokenizer: Any, chat: bool, train_on: str) -> Iterator[Encoded]:
    """Yield what the model would write: trained tokens of a text, a pair's chosen completion, or a whole prompt."""
    where, item = example
    if isinstance(item, Prompt):
        given = item.prompt
        if isinstance(given, str):
            text = given
        elif tokenizer.has_chat_template:
            text = prompt_text(given, tokenizer, where=where)
        else:
            text = "\n".join(str(turn.get("content")) for turn in given)
        yield from encode(Text(text), tokenizer, where, "all")
    elif isinstance(item, (Conversation, Completion, Text)):
        yield from encode(item, tokenizer, where, train_on, chat)
    else:
        yield next(_scored(example, tokenizer, chat))


def _scored(example: Example, tokenizer: Any, chat: bool) -> Iterator[Encoded]:
    """Yield completions as they are scored, each after its prompt."""
    where, item = example
    item = item.pairs[0] if isinstance(item, Ranked) else item
    if isinstance(item, (Text, Prompt)):
        raise DataError(f"{where}: has no completion to score")
    prompt: Any = item.messages[:-1] if isinstance(item, Conversation) else item.prompt
    completions: list[Any]
    if isinstance(item, Conversation):
        completions = [item.messages[-1]]
    else:
        completions = [item.chosen, item.rejected] if isinstance(item, Pair) else [item.completion]
    for completion in completions:
        row = encode_completion(prompt, completion, tokenizer, where, getattr(item, "tools", None), chat)
        ids = np.concatenate([row.prompt, row.reply])
        yield Encoded(ids, np.arange(len(ids)) >= max(1, len(row.prompt)), where)


def sample_texts(tokenizer: Any, budget: int = 1024) -> list[list[int]]:
    """Return the ids of some built-in texts, of at most `budget` tokens together."""
    return [row.ids.tolist() for row in sample_rows(built_in_examples(False), tokenizer, None, False, budget)]
