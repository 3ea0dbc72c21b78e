"""Rows on which a fused model is compared with what it was made of: built-in ones, a file's, or held-out ones of a run.

A run's recipe names the last. It may be a stranger's, so what it names is read only where that is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import mlxft
from mlxft.config import Config
from mlxft.data.convert import convert, suggest_format
from mlxft.data.encode import Encoded, Reply, encode, encode_reply, prompt_text
from mlxft.data.formats import Completion, Conversation, Example, Judged, Preference, Prompt, Ranked, Text
from mlxft.data.sources import Problem, find_split, read_rows
from mlxft.data.splits import load_splits
from mlxft.errors import ConfigError, DataError
from mlxft.text import parse_json

TOKENS = 512  # of all probe rows together: enough to tell the precisions apart, quick to go through
VALID = "valid"  # in a file's place: the validation rows that the runs' recipes name
LONGEST = 256  # of one row, so that no single one is the whole probe


@dataclass(frozen=True)
class Probe:
    """Encoded rows; `trained` says which tokens are compared (of scores: a row's last token is read).

    Attributes:
        source: where they are from, for messages.
        notes: what else there is to measure on.
    """

    rows: list[Encoded]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens are compared."""
        return sum(int(row.trained.sum()) for row in self.rows)


def find_probe(configs: Sequence[Config], tokenizer: Any, file: str | None, scores: bool) -> Probe:
    """The rows to compare on: built-in text, or `file`'s, which may be VALID.

    Rows that a run was trained on are never taken: on them it has learnt more than elsewhere.

    Args:
        configs: of the runs whose adapters are fused, as far as they are known.
        scores: whether answers are wanted, to be scored, in place of texts.
    Raises:
        ConfigError, DataError: the file is not there, or no row of it can be used.
    """
    if file is None:
        held = [c.data.valid if isinstance(c.data.valid, str) else c.data.train for c in configs if c.data.valid]
        hint = [f"--probe {VALID} measures on the run's own validation rows (of {', '.join(held)})"] if held else []
        return Probe(_encode(_built_in(scores), tokenizer, None, scores), "built-in text", tuple(hint))
    if file != VALID:
        config = configs[0] if configs else None
        rows = _encode(_file_examples(file, config, _chats(config, tokenizer)), tokenizer, config, scores)
        return Probe(rows, file)
    found: list[Encoded] = []
    for config in configs:
        examples = _held_out(config, tokenizer)
        found += _encode(examples, tokenizer, config, scores, TOKENS // len(configs)) if examples else []
    if not found:
        raise ConfigError(f"--probe {VALID}: the run has no validation rows; name a file, or leave it out")
    return Probe(found, "validation rows")


def _chats(config: Config | None, tokenizer: Any) -> bool:
    """Whether texts go through the chat template."""
    return bool(tokenizer.has_chat_template) and (config is None or config.data.template == "auto")


def _held_out(config: Config, tokenizer: Any) -> list[Example]:
    """A run's validation rows; none where it had none."""
    data = config.data
    if isinstance(data.valid, float):
        return load_splits(data, config.run.seed, tokenizer=tokenizer)[1]
    spec = data.valid
    if spec is None and Path(data.train).is_dir() and find_split(Path(data.train), "valid"):
        spec = data.train
    if spec is None:
        return []
    skipped: list[Problem] | None = [] if data.invalid == "drop" else None
    return convert(read_rows(spec, "valid"), data.format, data.fields, skipped, chat=_chats(config, tokenizer))


def _file_examples(file: str, config: Config | None, chat: bool) -> list[Example]:
    """A file's rows, in the run's format where they have its fields, else in the one they look like."""
    rows = list(read_rows(file, "valid"))
    first = next((row.data for row in rows if not isinstance(row, Problem)), {})
    looks = suggest_format(first)
    if config is not None:
        try:
            return convert(rows, config.data.format, config.data.fields, chat=chat)
        except (ConfigError, DataError):
            if looks == config.data.format:
                raise
    if looks is None:
        raise DataError(
            f"{file}: rows have {', '.join(first) or 'no fields'}; a probe's have messages, text, prompt and "
            "completion, or prompt, chosen and rejected"
        )
    return convert(rows, looks, chat=chat)


def _built_in(scores: bool) -> list[Example]:
    """Rows that come with the package: questions with answers and reviews; pairs of answers to be scored."""
    folder = Path(mlxft.__file__).parent / "demo"
    if scores:
        return convert(read_rows(str(folder / "pairs.jsonl"), "valid"), "preference")
    examples: list[Example] = []
    lines = [(folder / name).read_text("utf-8").splitlines()[:60] for name in ("rows.jsonl", "reviews.jsonl")]
    for i, (chat, review) in enumerate(zip(*(map(parse_json, part) for part in lines)), 1):
        question, answer = (turn["content"] for turn in chat["messages"])
        examples.append(Example(f"rows.jsonl:{i}", Completion(question, answer)))
        examples.append(Example(f"reviews.jsonl:{i}", Text(review["review"])))
    return examples


def _encode(
    examples: Sequence[Example], tokenizer: Any, config: Config | None, scores: bool, budget: int = TOKENS
) -> list[Encoded]:
    """Rows chosen by lot, the same each time, until there are `budget` tokens."""
    order = list(examples)
    random.Random(0).shuffle(order)
    chat = config is None or config.data.template == "auto"
    train_on = "all" if config is None else config.data.train_on or "assistant"
    found: list[Encoded] = []
    problem: DataError | None = None
    spent = 0
    for example in order:
        try:
            for row in _answers(example, tokenizer, chat) if scores else _texts(example, tokenizer, chat, train_on):
                cut = _cut(row, scores)
                if not cut.trained.any() or (found and spent + len(cut.ids) > budget):
                    continue
                found.append(cut)
                spent += len(cut.ids)
        except DataError as error:
            problem = error
        if spent >= budget - 16:
            break
    if not found:
        raise problem or DataError("no row has a token that a model would predict")
    return found


def _cut(row: Encoded, scores: bool) -> Encoded:
    """At most LONGEST tokens, with the first ones that count; of an answer to be scored, the last ones."""
    if len(row.ids) <= LONGEST:
        return row
    first = int(np.argmax(row.trained))
    start = len(row.ids) - LONGEST if scores else max(0, min(first - LONGEST // 2, len(row.ids) - LONGEST))
    trained = row.trained[start : start + LONGEST].copy()
    trained[0] = False
    return Encoded(row.ids[start : start + LONGEST], trained, row.where)


def _texts(example: Example, tokenizer: Any, chat: bool, train_on: str) -> Iterator[Encoded]:
    """What the model would say: trained tokens of a text, the preferred answer of a pair, a whole prompt."""
    where, item = example
    if isinstance(item, Prompt):
        given = item.prompt
        if isinstance(given, str) or not tokenizer.has_chat_template:
            text = given if isinstance(given, str) else "\n".join(str(turn.get("content")) for turn in given)
        else:
            text = prompt_text(given, tokenizer, where=where)
        yield from encode(Text(text), tokenizer, where, "all")
    elif isinstance(item, (Conversation, Completion, Text)):
        yield from encode(item, tokenizer, where, train_on, chat)
    else:
        yield next(_answers(example, tokenizer, chat))


def _answers(example: Example, tokenizer: Any, chat: bool) -> Iterator[Encoded]:
    """Answers as they are scored, each behind its prompt."""
    where, item = example
    if isinstance(item, Ranked):
        item = item.pairs[0]
    if isinstance(item, Preference):
        for reply in (item.chosen, item.rejected):
            yield _row(encode_reply(item.prompt, reply, tokenizer, where, item.tools, chat), where)
    elif isinstance(item, (Judged, Completion)):
        tools = item.tools if isinstance(item, Judged) else None
        yield _row(encode_reply(item.prompt, item.completion, tokenizer, where, tools, chat), where)
    elif isinstance(item, Conversation):
        *prompt, reply = item.messages
        yield _row(encode_reply(prompt, reply, tokenizer, where, item.tools, chat), where)
    else:
        raise DataError(f"{where}: has no answer to score")


def _row(reply: Reply, where: str) -> Encoded:
    ids = np.concatenate([reply.prompt, reply.reply])
    trained = np.arange(len(ids)) >= max(1, len(reply.prompt))
    return Encoded(ids, trained, where)


def limited(probe: Probe, positions: int) -> Probe:
    """The same with at most so many tokens compared, for vocabularies whose logits take much memory."""
    rows: list[Encoded] = []
    for row in probe.rows:
        trained = row.trained & (np.cumsum(row.trained) <= positions)
        positions -= int(trained.sum())
        if trained.any():
            rows.append(Encoded(row.ids, trained, row.where))
    return replace(probe, rows=rows)
