"""Preference data as it is published: rows of well-known sets, told by their columns, in our own fields.

A layout is looked for within the format that the recipe names, and which one was found is said in a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from mlxft.data.formats import Message, flag_at
from mlxft.data.sources import Problem, Row
from mlxft.data.template import is_template
from mlxft.errors import DataError

Fields = Mapping[str, Any]
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ANSWER = "\n\nAssistant:"


class Published(NamedTuple):
    """A row of a published set in our own fields.

    Attributes:
        says: which set's layout it has, for a note.
        columns: of the row, those that were read.
        fields: ours, in their place.
    """

    says: str
    columns: tuple[str, ...]
    fields: dict[str, Any]


def as_published(row: Fields, format: str, chat: bool = True, names: Fields | None = None) -> Published | None:
    """Read a row by the layout that it has; None where it has none, and is in our own fields or wrong.

    Args:
        format: the format of ours that it shall be in.
        chat: whether texts go through a chat template: then a transcript becomes its turns.
        names: data.fields.
    Raises:
        DataError: it has the columns of a layout, and they do not hold what they should.
    """
    found = (read(row, chat, names or {}) for read in LAYOUTS.get(format, ()))
    return next((published for published in found if published is not None), None)


def in_our_fields(row: Fields, formats: Iterable[str], chat: bool = True) -> dict[str, Any]:
    """A row by the first of the formats that has a layout for it; as it is where none has."""
    found = next((found for name in formats if (found := as_published(row, name, chat)) is not None), None)
    if found is None:
        return dict(row)
    return {name: value for name, value in row.items() if name not in found.columns} | found.fields


def _has(row: Fields, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


class _Prompt(NamedTuple):
    """The columns that hold the prompt, and what it is."""

    columns: tuple[str, ...]
    prompt: Any


def _prompt_of(row: Fields, chat: bool) -> _Prompt | None:
    """The prompt by one of the names that published sets have for it. Alpaca's `input` is what an instruction is about.

    Raises:
        DataError: there are several.
    """
    if _has(row, "prompt"):
        return _Prompt(("prompt",), (_turns_asked(row["prompt"]) if chat else []) or row["prompt"])
    names = tuple(name for name in ("question", "instruction", "input") if _has(row, name))
    if not names or _has(row, "conversations"):
        return None
    if len(names) == 1:
        return _Prompt(names, row[names[0]])
    texts = [row[name] for name in names if name != "input" or row[name] != ""]
    if "question" in names or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"the row has {' and '.join(names)}; say which is the prompt: data.fields: {{prompt: {names[0]}}}"
        )
    return _Prompt(names, "\n\n".join(texts))


# Anthropic's HH


def _transcript(text: Any) -> list[Message]:
    """The turns of "Human: ...\\n\\nAssistant: ..."; none where it is no such text.

    What one of the two says twice in a row is one turn.
    """
    before, *parts = _TURN.split(text.lstrip()) if isinstance(text, str) else [""]
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        role, said = _SPEAKERS[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            said = f"{turns.pop()['content']}\n\n{said}".strip()
        turns.append({"role": role, "content": said})
    return turns if not before and turns and turns[0]["role"] == "user" else []


def _turns_asked(text: Any) -> list[Message]:
    """The turns of a transcript up to where the assistant is to answer; none where a text is no such transcript."""
    if not isinstance(text, str) or not text.rstrip().endswith(_ANSWER):
        return []
    return _transcript(text.rstrip().removesuffix(_ANSWER))


def _hh(row: Fields, chat: bool, names: Fields) -> Published | None:
    sides = {name: row.get(name) for name in ("chosen", "rejected")}
    if _has(row, "prompt") or _has(row, "conversations") or not all(_transcript(text) for text in sides.values()):
        return None
    says = "Anthropic's HH: chosen and rejected are whole transcripts"
    if chat:
        return Published(says, tuple(sides), {name: _transcript(text) for name, text in sides.items()})
    cuts = {name: str(text).rpartition(_ANSWER) for name, text in sides.items()}
    if len({prompt for prompt, _, _ in cuts.values()}) > 1:
        raise DataError("chosen and rejected differ before the last answer; expected two answers to the same prompt")
    prompt = cuts["chosen"][0] + _ANSWER
    return Published(says, tuple(sides), {"prompt": prompt, **{name: cut[2] for name, cut in cuts.items()}})


def _asking(row: Fields, chat: bool, names: Fields) -> Published | None:
    # A prompt that a template wrote is as it was asked for.
    turns = _turns_asked(row.get("prompt")) if chat and not is_template(str(names.get("prompt", ""))) else []
    return Published("Anthropic's HH: the prompt is a transcript", ("prompt",), {"prompt": turns}) if turns else None


# Pairs


def _orca(row: Fields, chat: bool, names: Fields) -> Published | None:
    sides = [row.get("chosen"), row.get("rejected")]
    # Whole conversations hold their prompt: another column may say something else.
    if _has(row, "prompt") or None in sides or all(isinstance(side, list) and len(side) > 1 for side in sides):
        return None
    asked = _prompt_of(row, chat)
    if asked is None:
        return None
    return Published(f"Orca: prompt is {' and '.join(asked.columns)}", asked.columns, {"prompt": asked.prompt})


def _responses(row: Fields, chat: bool, names: Fields) -> Published | None:
    pair = ("chosen_response", "rejected_response")
    if not _has(row, *pair) or _has(row, "chosen") or (asked := _prompt_of(row, chat)) is None:
        return None
    fields = {"prompt": asked.prompt, "chosen": row[pair[0]], "rejected": row[pair[1]]}
    return Published(
        f"UltraFeedback of Argilla: prompt is {' and '.join(asked.columns)}, chosen is chosen_response",
        (*asked.columns, *pair),
        fields,
    )


def _shp(row: Fields, chat: bool, names: Fields) -> Published | None:
    columns = ("history", "human_ref_A", "human_ref_B", "labels")
    if not _has(row, *columns):
        return None
    history, *pair, label = (row[name] for name in columns)
    chosen, rejected = pair if flag_at(label, "labels") else reversed(pair)
    return Published(
        "SHP: prompt is history, chosen is human_ref_A where labels is 1, else human_ref_B",
        columns,
        {"prompt": history, "chosen": chosen, "rejected": rejected},
    )


# Several answers, and what each is worth


def _rated(row: Fields, name: str, text: str, rating: str) -> tuple[list[Any], list[Any]] | None:
    """The texts and the ratings of a list of objects; None where a column is none with such texts."""
    given = row.get(name)
    if not isinstance(given, list) or not given or not all(isinstance(x, dict) and text in x for x in given):
        return None
    for i, x in enumerate(given):
        if x.get(rating) is None:
            has = ", ".join(key for key, value in x.items() if value is not None)
            raise DataError(f"{name}[{i}] has no {rating}; it has {has}")
    return [x[text] for x in given], [x[rating] for x in given]


def _ultrafeedback(row: Fields, chat: bool, names: Fields) -> Published | None:
    score = str(names.get("ratings", "overall_score"))
    asked, rated = _prompt_of(row, chat), _rated(row, "completions", "response", score)
    if asked is None or rated is None:
        return None
    return Published(
        f"UltraFeedback: prompt is {' and '.join(asked.columns)}, answers are completions' response, ratings {score}",
        (*asked.columns, "completions", score),
        {"prompt": asked.prompt, "answers": rated[0], "ratings": rated[1]},
    )


def _nectar(row: Fields, chat: bool, names: Fields) -> Published | None:
    asked, rated = _prompt_of(row, chat), _rated(row, "answers", "answer", "rank")
    if asked is None or rated is None:
        return None
    return Published(
        "Nectar: answers' answer and rank, of which 1 is the best",
        (*asked.columns, "answers"),
        {"prompt": asked.prompt, "answers": rated[0], "ratings": [-float(rank) for rank in rated[1]]},
    )


def _distilabel(row: Fields, chat: bool, names: Fields) -> Published | None:
    rating = next((name for name in ("ratings", "rating") if isinstance(row.get(name), list)), None)
    if rating is None or not _has(row, "generations") or (asked := _prompt_of(row, chat)) is None:
        return None
    return Published(
        f"distilabel: prompt is {' and '.join(asked.columns)}, answers are generations, ratings is {rating}",
        (*asked.columns, "generations", rating),
        {"prompt": asked.prompt, "answers": row["generations"], "ratings": row[rating]},
    )


LAYOUTS: dict[str, tuple[Callable[[Fields, bool, Fields], Published | None], ...]] = {
    "preference": (_shp, _responses, _hh, _orca, _asking),
    "ratings": (_ultrafeedback, _nectar, _distilabel, _asking),
    "unpaired": (_asking,),
    "prompts": (_asking,),
}
"""The layouts of each format, the one that says most of a row first."""


def together(rows: Iterable[Row | Problem], rating: str, prompt: str) -> Iterator[Row | Problem]:
    """Rows of one response each as one row for each prompt, as HelpSteer has them: one after the other.

    Args:
        rating: the column that says what a response is worth.
        prompt: the column that holds the prompt.
    """
    held: list[Row] = []
    for row in rows:
        data = row.data if isinstance(row, Row) and _has(row.data, prompt, "response", rating) else {}
        if held and data.get(prompt) != held[0].data[prompt]:
            yield _one_row(held, rating)
            held = []
        if isinstance(row, Row) and data and not isinstance(data[rating], list):
            held.append(row)
        else:
            yield row
    if held:
        yield _one_row(held, rating)


def _one_row(rows: list[Row], rating: str) -> Row:
    first = {name: value for name, value in rows[0].data.items() if name != "response"}
    lists = {"answers": [row.data["response"] for row in rows], rating: [row.data[rating] for row in rows]}
    return Row(rows[0].where, first | lists)
