"""Judged answers to token ids: the prompt as a model sees it, and each answer as it would have generated it.

A pair is whole or not there: cut at a limit, its two answers could become one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mlxft.data.encode import Ids, Reply, encode_reply
from mlxft.data.formats import Example, Judged, Preference, Ranked
from mlxft.data.sources import report_lines
from mlxft.errors import ConfigError, DataError, nearest

OVERFLOW = ("error", "drop")
_BIASED = 0.9  # a share of pairs that length alone would get right
_FEW = 10  # pairs too few to speak of a bias


class EncodedPair(NamedTuple):
    """A prompt (P,) and two answers (C,), (R,), int32, each up to and including the token that ends it."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    margin: float | None
    weight: float
    tie: bool
    where: str


class EncodedAnswer(NamedTuple):
    """A prompt (P,) and one answer (C,), int32, and whether it is a good one."""

    prompt_ids: Ids
    completion_ids: Ids
    label: bool
    where: str
    weight: float = 1.0


@dataclass(frozen=True)
class PairCounts:
    """What became of a source's rows.

    Attributes:
        source_rows: rows given.
        pairs: pairs (of `build_answers`: answers) in the data set.
        tokens, response_tokens: in them; a pair's prompt counts once.
        dropped: pairs left out as too long.
        identical: pairs left out since their answers have the same tokens.
        undecided: rows left out whose ratings are all equal.
        ties: pairs in the data set of which neither answer is better.
        chosen_longer: share of the pairs, ties aside, whose chosen answer has more tokens; of equal lengths a half.
        one_length: the tokens that each and every answer has, or None.
        source_notes: what there is to say of how the rows were chosen.
        fingerprint: of the rows that were chosen, both splits.
    """

    source_rows: int = 0
    pairs: int = 0
    tokens: int = 0
    response_tokens: int = 0
    dropped: int = 0
    identical: int = 0
    undecided: int = 0
    ties: int = 0
    chosen_longer: float | None = None
    one_length: int | None = None
    source_notes: tuple[str, ...] = ()
    fingerprint: str = ""

    def left_out(self) -> list[str]:
        """What is not in the data set, a sentence each."""
        said = {
            "dropped": "pairs were longer than data.max_length and are left out",
            "identical": "pairs have two answers with the same tokens and are left out",
            "undecided": "rows have equal ratings only and are left out",
        }
        return [f"{getattr(self, name):,} {text}" for name, text in said.items() if getattr(self, name)]

    def notes(self) -> list[str]:
        """What was left out, and what the lengths give away, a sentence each."""
        notes = [*self.source_notes, *self.left_out(), *([f"{self.ties:,} pairs are ties"] if self.ties else [])]
        if self.one_length is not None and self.pairs > 1:
            notes.append(f"every answer has {self.one_length} tokens: were they cut before they came here?")
        share = self.chosen_longer
        if share is not None and self.pairs - self.ties >= _FEW and not 1 - _BIASED < share < _BIASED:
            which, part = ("longer", share) if share > 0.5 else ("shorter", 1 - share)
            notes.append(
                f"the chosen answer is the {which} one in {part:.0%} of the pairs: length may be all it learns"
            )
        return notes


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order of their source, and the counts."""

    rows: list[EncodedPair]
    counts: PairCounts


@dataclass(frozen=True)
class Answers:
    """Labelled answers in the order of their source, and the counts."""

    rows: list[EncodedAnswer]
    counts: PairCounts


Row = TypeVar("Row", EncodedPair, EncodedAnswer)


def build_pairs(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, overflow: str, chat: bool = True
) -> Pairs:
    """Encode examples of the formats preference and ratings.

    Args:
        max_length: tokens that a prompt and its longer answer may have together.
        overflow: "error" reports all longer ones; "drop" leaves them out.
        chat: whether texts become a user and an assistant turn when there is a chat template.
    Raises:
        ConfigError: an `overflow` that would cut answers, or rows that are no pairs.
        DataError: rows that can not be encoded or are too long (all of them in one), or no pair is left.
    """

    def encode(example: Example) -> list[EncodedPair]:
        where, item = example
        if not isinstance(item, Preference | Ranked):
            raise ConfigError(f"{where}: not a pair of answers; use data.format: preference or ratings")
        done: dict[int, Reply] = {}  # an answer of many stands in many pairs
        pairs = item.pairs if isinstance(item, Ranked) else (item,)
        return [_pair(pair, tokenizer, where, chat, done) for pair in pairs]

    rows: list[EncodedPair] = []
    identical = dropped = undecided = 0
    for group in _fit(examples, encode, max_length, overflow):
        distinct = [pair for pair in group if not np.array_equal(pair.chosen_ids, pair.rejected_ids)]
        kept = [pair for pair in distinct if length(pair) <= max_length]
        undecided += not group
        identical += len(group) - len(distinct)
        dropped += len(distinct) - len(kept)
        # What is left of a prompt's pairs still counts as one prompt.
        share = sum(pair.weight for pair in kept) / sum(pair.weight for pair in group) if kept else 1.0
        rows += [pair._replace(weight=pair.weight / share) for pair in kept]
    counts = PairCounts(len(examples), identical=identical, dropped=dropped, undecided=undecided)
    counts = _count(counts, rows, [(pair.chosen_ids, pair.rejected_ids) for pair in rows])
    decided = [pair for pair in rows if not pair.tie]
    longer = [0.5 + 0.5 * np.sign(len(pair.chosen_ids) - len(pair.rejected_ids)) for pair in decided]
    share_longer = float(np.mean(longer)) if longer else None
    return Pairs(rows, replace(counts, ties=len(rows) - len(decided), chosen_longer=share_longer))


def build_answers(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, overflow: str, chat: bool = True
) -> Answers:
    """Encode examples of the format unpaired; arguments and errors as for `build_pairs`."""

    def encode(example: Example) -> list[EncodedAnswer]:
        where, item = example
        if not isinstance(item, Judged):
            raise ConfigError(f"{where}: not an answer with a label; use data.format: unpaired")
        prompt, reply = encode_reply(item.prompt, item.completion, tokenizer, where, item.tools, chat)
        return [EncodedAnswer(prompt, reply, item.label, where)]

    encoded = [row for group in _fit(examples, encode, max_length, overflow) for row in group]
    rows = [row for row in encoded if length(row) <= max_length]
    counts = PairCounts(len(examples), dropped=len(encoded) - len(rows))
    return Answers(rows, _count(counts, rows, [(row.completion_ids,) for row in rows]))


def length(row: EncodedPair | EncodedAnswer) -> int:
    """Tokens of the prompt and its longest answer."""
    return len(row.prompt_ids) + max(map(len, _answers(row)))


def ends_of(rows: Sequence[EncodedPair | EncodedAnswer]) -> set[int]:
    """The ids that end answers."""
    return {int(ids[-1]) for row in rows for ids in _answers(row)}


def ids_fingerprint(rows: Sequence[EncodedPair | EncodedAnswer]) -> str:
    """blake2b over the ids of every row, in order, and what is said of each."""
    digest = blake2b(digest_size=16)
    for row in rows:
        for ids in (row.prompt_ids, *_answers(row)):
            # The length first: without it one answer's end could not be told from the next one's beginning.
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
        said = (row.margin, row.weight, row.tie) if isinstance(row, EncodedPair) else (row.label, row.weight)
        digest.update(repr(said).encode())
    return digest.hexdigest()


class Part(NamedTuple):
    """A text of a row, what it is there (prompt, chosen, rejected or completion), and how many tokens it has."""

    name: str
    text: str
    tokens: int


def describe(row: EncodedPair | EncodedAnswer, tokenizer: Any) -> list[Part]:
    """The texts of a row, the prompt's first."""
    named = {"prompt": row.prompt_ids}
    if isinstance(row, EncodedPair):
        named |= {"chosen": row.chosen_ids, "rejected": row.rejected_ids}
    else:
        named |= {"completion": row.completion_ids}
    return [Part(name, str(tokenizer.decode(ids.tolist())), len(ids)) for name, ids in named.items()]


def shared_part(pair: EncodedPair, tokenizer: Any) -> Part:
    """What both answers of a pair begin with: the tokens up to where they part."""
    size = min(len(pair.chosen_ids), len(pair.rejected_ids))
    differ = np.flatnonzero(pair.chosen_ids[:size] != pair.rejected_ids[:size])
    size = int(differ[0]) if differ.size else size
    return Part("shared", str(tokenizer.decode(pair.chosen_ids[:size].tolist())) if size else "", size)


def _answers(row: EncodedPair | EncodedAnswer) -> tuple[Ids, ...]:
    return (row.chosen_ids, row.rejected_ids) if isinstance(row, EncodedPair) else (row.completion_ids,)


def _pair(pair: Preference, tokenizer: Any, where: str, chat: bool, done: dict[int, Reply]) -> EncodedPair:
    for reply in (pair.chosen, pair.rejected):
        if id(reply) not in done:
            done[id(reply)] = encode_reply(pair.prompt, reply, tokenizer, where, pair.tools, chat)
    (prompt, chosen), (again, rejected) = done[id(pair.chosen)], done[id(pair.rejected)]
    if not np.array_equal(prompt, again):
        # Only where one answer needs the template without thinking and the other does not.
        raise DataError(f"{where}: the chat template gives chosen and rejected different prompts; give both thoughts")
    return EncodedPair(prompt, chosen, rejected, pair.margin, pair.weight, pair.tie, where)


def _fit(
    examples: Sequence[Example], encode: Callable[[Example], list[Row]], max_length: int, overflow: str
) -> list[list[Row]]:
    """Each example's rows; what can not be encoded, and under "error" what is too long, raised together."""
    if overflow not in OVERFLOW:
        why = (
            "an answer that is cut is another answer"
            if overflow in ("truncate", "split")
            else nearest(overflow, OVERFLOW)
        )
        raise ConfigError(f"data.overflow is {overflow!r}; expected error or drop for judged answers: {why}")
    if max_length < 2:
        raise ConfigError(f"data.max_length is {max_length}; expected at least 2: a prompt and an answer")
    groups: list[list[Row]] = []
    problems: list[str] = []
    for example in examples:
        try:
            groups.append(encode(example))
        except DataError as exc:
            problems.append(str(exc))
    if problems:
        raise DataError(report_lines(problems))
    long = [row for group in groups for row in group if length(row) > max_length]
    if long and overflow == "error":
        lines = [f"{row.where}: {length(row)} tokens; data.max_length is {max_length}" for row in long]
        longest = max(map(length, long))
        advice = f"raise data.max_length (the longest has {longest}) or set data.overflow: drop"
        raise DataError(f"{report_lines(lines)}\n{advice}")
    return groups


def _count(
    counts: PairCounts, rows: Sequence[EncodedPair | EncodedAnswer], answers: list[tuple[Ids, ...]]
) -> PairCounts:
    """With the numbers that pairs and single answers share."""
    if not rows:
        why = "; ".join(counts.notes()) or "there are none"
        raise DataError(f"no row is left to train on, of {counts.source_rows:,}: {why}")
    lengths = [len(ids) for row in answers for ids in row]
    tokens = sum(lengths) + sum(len(row.prompt_ids) for row in rows)
    one = lengths[0] if len(set(lengths)) == 1 else None
    return replace(counts, pairs=len(rows), tokens=tokens, response_tokens=sum(lengths), one_length=one)
