"""Distillation: a student learns from the full distributions of a teacher (GKD, Agarwal et al. 2024).

The student reads its own completions (on-policy), those of the rows (off-policy), or a mix, and its loss is the
divergence from the teacher at each of their tokens. The teacher's hidden states are computed when a step is made, and
its output layer is applied in chunks beside the student's, so that the logits of all positions exist of neither model.
A teacher that does not fit beside the student writes its likeliest tokens to disk first: `store_teacher`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from rich.console import Console

from mlxft.config import Config
from mlxft.data.chat import decode_completion
from mlxft.data.dataset import (
    Encoded,
    EncodedCompletion,
    Ids,
    chat_notes,
    encode_completion,
    encode_prompt,
    of_valid,
    turn_end,
)
from mlxft.data.formats import Completion, Conversation, Example, Message, Prompt, tools_of
from mlxft.data.sources import report_lines
from mlxft.distributed import current
from mlxft.errors import ConfigError, DataError, ModelError, TrainingError
from mlxft.files import write_beside, write_text
from mlxft.model.adapters import base_noted, read_adapter_config
from mlxft.model.cpu import as_trained
from mlxft.model.frozen import FrozenModel, FrozenSource, frozen_skeleton, open_apart
from mlxft.model.heads import find_head
from mlxft.model.layers import limits, probing
from mlxft.model.load import load, resolve, sampled_digest
from mlxft.model.logits import Read, Split, ahead, read_positions, row_sums, rows_hidden, rows_logprobs
from mlxft.model.memory import Beside, ShapeSplit, scoring_bytes
from mlxft.model.sampling import sample_batch
from mlxft.objectives import functional as F
from mlxft.objectives.base import MicroBatch, NoDropout, Step, Terms, beyond_context, whole_row_problems
from mlxft.objectives.episodes import EncodedPrompt
from mlxft.objectives.pairs import stack
from mlxft.objectives.rollouts import (
    CUT_OFF,
    SAMPLES_SHOWN,
    PassSettings,
    Rollout,
    RolloutObjective,
    RolloutSettings,
    room_for_prompts,
)
from mlxft.text import Event, bar, counted, home_path, parse_json, read_small

# --- settings ---------------------------------------------------------------------------------------------------------

BASE = "base"
TOP_K = 64
_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


class DistillSettings(PassSettings):
    """The section `distill`."""

    teacher: str = Field(
        BASE,
        description="Model to learn from: a run, an adapter, a model folder, a .gguf file or a hub id, with the "
        "student's vocabulary; base: the student's own base, without its adapter.",
    )
    quantize: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        None, description="Quantise the teacher to this many bits when it is loaded."
    )
    teacher_prompt: str | None = Field(
        None,
        min_length=1,
        description="Text that only the teacher sees: a system turn before the prompt, or the start of one that is "
        "there (context distillation).",
    )
    on_policy: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the rows whose completion is sampled from the student; the others keep their own.",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "reverse_kl",
        description="forward_kl: KL(teacher || student), which covers all that the teacher would say; reverse_kl: "
        "KL(student || teacher), which keeps to what it is likely to say; jsd: the generalised Jensen-Shannon "
        "divergence between the two.",
    )
    beta: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="With divergence: jsd: from forward KL, near 0, to reverse KL, near 1; default 0.5.",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Both distributions are softmax(logits / temperature); above 1 unlikely tokens count more.",
    )
    align: Literal["ids", "text"] = Field(
        "ids",
        description="ids: the teacher has the student's vocabulary. text: it may have another one; the probabilities "
        "of stretches of text are compared at whose ends tokens of both end, on the student's own completions: "
        "reverse KL, estimated from samples.",
    )
    cache: Path | None = Field(
        None,
        description="Folder with what mlxft distill-cache stored of the teacher, which is then not loaded; needs "
        "on_policy: 0.",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        le=10**4,
        description="Tokens at each position whose log-probabilities are stored, with that of all others together; "
        f"with cache; default {TOP_K}.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DistillSettings:
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta ({self.beta:g}) is for divergence: jsd; set that, or leave beta out")
        if self.quantize is not None and self.teacher == BASE:
            raise ValueError("quantize: the teacher is the student's own base; see model.quantize, or name a teacher")
        if self.top_k is not None and self.cache is None:
            raise ValueError("top_k: is of a stored teacher, and a loaded one gives all tokens; set cache, too")
        if self.align == "text":
            needed = {"on_policy": 1.0, "divergence": "reverse_kl", "temperature": 1.0, "epochs": 1, "minibatches": 1}
            if wrong := [name for name, value in needed.items() if getattr(self, name) != value]:
                raise ValueError(
                    f"align: text compares what the newest student samples, by reverse KL; {wrong[0]} must be "
                    f"{needed[wrong[0]]}"
                )
            if self.teacher == BASE:
                raise ValueError("align: text is for a teacher with another tokenizer; leave it out, or name a teacher")
        if self.cache is not None and self.on_policy > 0:
            raise ValueError(
                "cache: a stored teacher knows stored completions only; set on_policy: 0, or leave cache out"
            )
        return self

    @property
    def weight(self) -> float:
        """Return the `beta` of `functional.divergence`."""
        return _BETAS[self.divergence] if self.divergence != "jsd" else 0.5 if self.beta is None else self.beta


DISTILL_FORMATS = ("prompts", "prompt-completion", "messages", "sharegpt", "alpaca")
# Arrays of a chunk's logits that a divergence takes, as a multiple of those that log-probabilities take: the teacher's
# logits, and both models' distributions.
_DISTRIBUTIONS = 4
_APART = 1 << 30  # the stretch of a token that is not compared
_NOTHING = (
    "nothing was compared: no completion has a stretch of text at whose ends tokens of student and teacher end, or the "
    "teacher's tokenizer changes the text (distill.align: text)"
)
_NO_DROPOUT = NoDropout("the student that samples or is compared with the teacher must be the one that is used")


def check_distill_recipe(config: Config, settings: DistillSettings, rollout: RolloutSettings) -> list[str]:
    """Check the recipe of a distillation, and return notes.

    Raises:
        ConfigError: settings have no meaning together; all of them in one.
    """
    data, share = config.data, settings.on_policy
    problems = whole_row_problems(config, DISTILL_FORMATS, _NO_DROPOUT)
    if settings.teacher == BASE and settings.teacher_prompt is None and config.model.adapter is None:
        problems.append(
            "distill.teacher: is the student itself as training begins, so there is nothing to learn; name a teacher, "
            "or give distill.teacher_prompt"
        )
    if data.format == "prompts" and share < 1 and settings.cache is None:
        problems.append(
            f"distill.on_policy: with {share:g}, rows need a completion, and those of data.format: prompts have none; "
            "set it to 1, choose another format, or store the teacher's own completions (distill.cache)"
        )
    if share < 1 and rollout.samples > 1:
        problems.append("rollout.samples: a row has one completion; give 1 where distill.on_policy is below 1")
    if share > 0 and data.max_length <= rollout.max_tokens:
        problems.append(
            f"data.max_length ({data.max_length}) bounds prompt and completion together: raise it above "
            f"rollout.max_tokens ({rollout.max_tokens})"
        )
    if not share and data.format != "prompts":
        given = [
            name
            for name, field in RolloutSettings.model_fields.items()
            if name not in ("prompts", "samples")
            and getattr(rollout, name) != field.get_default(call_default_factory=True)
        ]
        if given:
            named = ", ".join(f"rollout.{name}" for name in given)
            problems.append(f"{named}: nothing is sampled where distill.on_policy is 0; leave it out")
    if problems:
        raise ConfigError("\n".join(problems))
    return [note] if share and (note := rollout.bias_note()) else []


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaughtPrompt(EncodedPrompt):
    """A prompt of a student and its teacher.

    Attributes:
        taught: ids of the prompt as the teacher sees it.
        completion: the row's own; None where there is none.
    """

    taught: Ids
    completion: Ids | None = None


def _parts(item: Any) -> tuple[str | list[Message], str | Message | None, dict[str, Any]]:
    """Return prompt, completion and row of an item; of a conversation the last turn is the completion."""
    if isinstance(item, Prompt):
        return item.prompt, None, item.row
    if isinstance(item, Completion):
        return item.prompt, item.completion, {}
    assert isinstance(item, Conversation)
    return item.messages[:-1], item.messages[-1], {"tools": item.tools} if item.tools else {}


def _with_system(prompt: str | list[Message], system: str, templated: bool) -> str | list[Message]:
    """Return a prompt that begins with a text: as a system turn, or in a plain prompt as text."""
    if isinstance(prompt, str):
        if not templated:
            return f"{system}\n\n{prompt}"
        return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    if prompt and prompt[0]["role"] == "system":
        return [{**prompt[0], "content": f"{system}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": system}, *prompt]


# --- teacher ----------------------------------------------------------------------------------------------------------


def find_teacher(path: str, weights: bool = True) -> Path:
    """Return the folder or file of the weights that `distill.teacher` names: of a run its result.

    Args:
        weights: download the weights of a hub id, too.
    Raises:
        ConfigError: there is nothing, a run without trained weights, or a reward model.
    """
    folder = home_path(path)
    if find_head(path):
        raise ConfigError(
            f"distill.teacher: {path} is a reward model, which gives scores, not text; name another teacher"
        )
    for result, file in ((folder / "adapter", "adapter_config.json"), (folder / "model", "config.json")):
        if (result / file).is_file():
            return result
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"distill.teacher: {path} has no trained weights yet")
    if (folder / "adapter_config.json").is_file():
        return folder
    try:
        return resolve(path, weights=weights)
    except ModelError as error:
        raise ConfigError(f"distill.teacher: {error}") from error


def check_vocabulary(student: Any, teacher: Any, name: str) -> None:
    """Refuse a teacher whose tokenizer gives other ids, by which tokens would be compared that are not the same.

    A teacher may know more tokens, beyond the student's last one, or fewer.

    Raises:
        ConfigError: an id that both have stands for different tokens.
    """
    mine, theirs = (dict(tokenizer.get_vocab()) for tokenizer in (student, teacher))
    known = {id: token for token, id in mine.items()}
    other = {id: token for token, id in theirs.items()}
    shared = known.keys() & other.keys()
    apart = sorted(id for id in shared if known[id] != other[id])
    if not apart and shared:
        return
    seen = f"{len(apart):,} of {len(shared):,} ids stand for other tokens" if shared else "they share no id"
    first = f", the first is {apart[0]}: {known[apart[0]]!r} and {other[apart[0]]!r}" if apart else ""
    raise ConfigError(
        f"distill.teacher: {name} has another vocabulary than the student: {seen}{first}. Distributions over tokens "
        "can only be compared where the tokens are the same: choose a teacher of the student's family, set "
        "distill.align: text, or train on completions that the teacher wrote (mlxft sample, then objective: sft)"
    )


@dataclass(frozen=True, kw_only=True)
class DistillBatch:
    """B completions after their prompts, with what the teacher says at each of their N tokens.

    Attributes:
        ids: (B, T) right-padded; last: (B,) the last real token of each row.
        positions, labels: (N,) flat index that predicts a token, and the token.
        hidden: (N, D) the teacher's hidden states, or (N, V) its logits where its output layer cannot be separated;
            None with a stored teacher.
        top, shares: (N, K) tokens of a stored teacher, and (N, K + 1) their log-probabilities and that of the others.
        stretches, said: (N,) the stretch of text that a token is in, and (M,) each stretch's log-probability by a
            teacher with another tokenizer; a stretch M or beyond is not compared.
    """

    ids: mx.array
    last: mx.array
    positions: mx.array
    labels: mx.array
    hidden: mx.array | None = None
    top: mx.array | None = None
    shares: mx.array | None = None
    stretches: mx.array | None = None
    said: mx.array | None = None


# --- alignment --------------------------------------------------------------------------------------------------------


def token_ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return for each token the length of the text up to its end, or -1 where it ends inside a character."""
    whole, ends = decode_completion(tokenizer, ids), list[int]()
    for count in range(1, len(ids) + 1):
        before = decode_completion(tokenizer, ids[:count])
        ends.append(len(before) if whole.startswith(before) and not before.endswith("\ufffd") else -1)
    return ends


def stretches_of(mine: Sequence[int], theirs: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Return the stretch of each token of a student and of a teacher, and how many stretches are compared.

    A stretch ends where tokens of both end; what follows the last such end has the number of stretches itself.

    Args:
        mine, theirs: from `token_ends`, of the same text.
    """
    common = sorted(({*mine} & {*theirs}) - {-1})
    place = {end: number for number, end in enumerate(common)}

    def numbers(ends: Sequence[int]) -> list[int]:
        found, now = list[int](), 0
        for end in ends:
            found.append(now)
            now = max(now, place[end] + 1) if end in place else now
        return found

    return numbers(mine), numbers(theirs), len(common)


# --- store ------------------------------------------------------------------------------------------------------------
# What a teacher says, on disk: rows in parts, so that a killed run continues where it was.

_FILE, _PART_ROWS = "teacher.json", 256
_WEIGHTS = "the teacher's weights"


def weights_digest(path: str) -> str | None:
    """Return a hash of the weights that a teacher's path names, by samples; None where that is not on this machine."""
    try:
        return sampled_digest(find_teacher(path, weights=False)) if home_path(path).exists() else None
    except (OSError, ConfigError):  # loading the teacher reports it
        return None


def _part(folder: Path, number: int, what: str) -> Path:
    return folder / f"{what}-{number:05}.npy"


def _write_array(path: Path, array: npt.NDArray[Any]) -> None:
    def write(beside: Path) -> None:
        with beside.open("wb") as file:  # np.save would append .npy to the name
            np.save(file, array)

    write_beside(path, write)


def _read_part(folder: Path, number: int) -> tuple[Any, Any, Any]:
    """Return a part's tokens (N, 2), and its `top` and `shares`, which stay on disk.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    found = []
    for what in ("tokens", "top", "shares"):
        file = _part(folder, number, what)
        try:
            found.append(np.load(file, mmap_mode="r"))
            if len(found[-1]) != len(found[0]):
                raise ValueError("it has another number of tokens")
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(
                f"distill.cache: {file} is damaged: {error}; mlxft distill-cache RECIPE writes it again"
            ) from error
    return np.array(found[0]), found[1], found[2]


def _is_whole(folder: Path, number: int) -> bool:
    try:
        _read_part(folder, number)
    except ConfigError:
        return False
    return True


def _about(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its stored teacher; raise ConfigError where its file cannot be used."""
    try:
        about = parse_json(read_small(folder / _FILE))
        return {name: about[name] for name in ("made_of", "parts", "complete")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"distill.cache: {folder / _FILE} is damaged: {error}; delete the folder") from error


class StoredTeacher:
    """What `store_teacher` wrote; the numbers stay on disk, and a batch's are read when it is made.

    Args:
        key: what they depend on, name -> value, as the recipe has it now.
    Raises:
        ConfigError: there is no such folder, it is not complete, or it was made of something else.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        file, way = folder / _FILE, "mlxft distill-cache RECIPE writes it"
        if not file.is_file():
            raise ConfigError(f"distill.cache: there is no stored teacher in {folder}; {way}")
        about = _about(folder)
        known = about["made_of"]
        # The teacher need not be on the machine that trains.
        apart = [name for name, value in key.items() if known.get(name) != value]
        apart = [name for name in apart if key[name] is not None or name != _WEIGHTS]
        if apart:
            seen = ", ".join(f"{n} was {known.get(n)!r} and is {key[n]!r}" for n in apart)
            raise ConfigError(f"distill.cache: {folder} was made of something else: {seen}; {way} to another folder")
        if not about["complete"]:
            raise ConfigError(f"distill.cache: {folder} is not complete; {way}, from where it stopped")
        self.completions: list[Ids] = []
        self._places: list[tuple[int, int]] = []  # part, and the first token in it
        self._parts: list[tuple[Any, Any]] = []
        for number in range(about["parts"]):
            tokens, top, shares = _read_part(folder, number)
            ends = np.flatnonzero(np.diff(tokens[:, 0])) + 1
            self._places += [(number, int(start)) for start in (0, *ends)]
            self.completions += [np.ascontiguousarray(part[:, 1]) for part in np.split(tokens, ends)]
            self._parts.append((top, shares))

    def read(self, rows: Sequence[int]) -> dict[str, mx.array]:
        """Return `top` and `shares` of all tokens of some rows."""
        top, shares = [], []
        for row in rows:
            number, start = self._places[row]
            here = slice(start, start + len(self.completions[row]))
            top.append(self._parts[number][0][here])
            shares.append(self._parts[number][1][here])
        return {"top": mx.array(np.concatenate(top)), "shares": mx.array(np.concatenate(shares))}


# --- distill ----------------------------------------------------------------------------------------------------------


class Distill(RolloutObjective[DistillSettings]):
    """Distillation on the student's own completions, on given ones, or on both."""

    sections: ClassVar = {"distill": DistillSettings, "rollout": RolloutSettings}
    learning_rate = 2e-5
    stores = False  # whether the teacher's numbers are written

    prompts: list[TaughtPrompt]  # type: ignore[assignment]
    valid: list[TaughtPrompt]  # type: ignore[assignment]

    @classmethod
    def formats(cls, config: Config) -> Sequence[str]:
        s = config.section("distill", DistillSettings)
        samples = s.on_policy == 1 or s.cache is not None  # else each row needs a completion
        return [name for name in DISTILL_FORMATS if name != "prompts" or samples]

    def __init__(self, config: Config, tokenizer: Any) -> None:
        settings = config.section("distill", DistillSettings)
        notes = check_distill_recipe(config, settings, config.section("rollout", RolloutSettings))
        self.frozen(config)  # refuses a teacher that is not there before the rows are read
        super().__init__(config, tokenizer, DistillSettings, notes)
        self.stored = self.open_stored()
        if self.stored is not None and config.data.format == "prompts":
            found, rows = self.stored.completions, [*self.prompts, *self.valid]
            rows = [replace(row, completion=ids) for row, ids in zip(rows, found)]
            self.prompts, self.valid = rows[: len(self.prompts)], rows[len(self.prompts) :]
        self.teacher: FrozenModel | None = None
        self._compared, self._rolled = 0, False  # stretches of the last rollout, if there was one
        self._unwritten = ""  # why the teacher could not read a completion

    # Rows

    def encode(self, train: Sequence[Example], valid: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        if self.config.data.template == "auto" and train:
            asked, _, row = _parts(train[0].item)
            turn = turn_end(self.tokenizer, asked if isinstance(asked, list) else None, tools_of(row))
            self.notes += chat_notes(self.tokenizer, turn)
        found = self._encode(train)
        with of_valid():
            return found, self._encode(valid) if valid else []

    def _encode(self, examples: Sequence[Example]) -> list[TaughtPrompt]:
        data, tokenizer = self.config.data, self.tokenizer
        chat, found, problems, dropped = data.template == "auto", list[TaughtPrompt](), list[str](), 0
        samples = self.samples
        room = room_for_prompts(self.config, self.tokenizer) if samples else None
        for where, item in examples:
            asked, wanted, row = _parts(item)
            try:
                tools, completion = tools_of(row), None
                if wanted is None:
                    ids = np.array(encode_prompt(asked, tokenizer, tools=tools, chat=chat, where=where), np.int32)
                else:
                    ids, completion = encode_completion(asked, wanted, tokenizer, where, tools, chat)
                taught = ids
                if (system := self.settings.teacher_prompt) is not None:
                    seen = _with_system(asked, system, chat and tokenizer.has_chat_template)
                    told = encode_prompt(seen, tokenizer, tools=tools, chat=chat, where=where)
                    taught = np.array(told, np.int32)
            except DataError as error:
                problems.append(str(error))
                continue
            whole = len(ids) + (len(completion) if completion is not None else 0)
            wrong = ""
            if not len(ids):
                wrong = "the prompt has no tokens"
            elif room is not None and len(ids) > room.tokens:
                wrong = f"{len(ids)} tokens; {room.bound} minus rollout.max_tokens leaves {room.tokens}. {room.way}"
            elif whole > data.max_length:
                wrong = f"{whole} tokens, data.max_length is {data.max_length}. Raise it"
            if wrong and len(ids) and data.overflow == "drop":
                dropped += 1
            elif wrong:
                problems.append(f"{where}: {wrong}" + (", or set data.overflow: drop" if len(ids) else ""))
            else:
                text = asked if isinstance(asked, str) else str(tokenizer.decode(ids.tolist()))
                found.append(TaughtPrompt(ids, text, row, where, asked, taught, completion))
        if problems:
            raise DataError(report_lines(problems))
        if dropped:
            self.notes.append(counted(dropped, "rows are longer than data.max_length allows, and are left out"))
        if not found:
            raise DataError("no row is left: all are longer than data.max_length leaves room for")
        lengths = [len(p.ids) + (len(p.completion) if p.completion is not None else 0) for p in found]
        self.notes += beyond_context(self.config.model.path, lengths)
        self._note_teacher_context(found)
        return found

    def _note_teacher_context(self, rows: Sequence[TaughtPrompt]) -> None:
        """Note rows that are longer than the teacher's context: its prompt may be longer, and its context shorter."""
        s, sampled = self.settings, self.rollouts.max_tokens if self.samples else 0
        if s.align == "text" or (s.cache is not None and not self.stores):
            return
        path = self.config.model.path
        if s.teacher != BASE:
            folder = find_teacher(s.teacher, False)
            is_adapter = (folder / "adapter_config.json").is_file()
            path = str(base_noted(read_adapter_config(folder)).get("model", path)) if is_adapter else str(folder)
        if path == self.config.model.path and s.teacher_prompt is None:  # noted of the student
            return
        lengths = [len(p.taught) + max(sampled, 0 if p.completion is None else len(p.completion)) for p in rows]
        way = "choose another teacher, or lower data.max_length, rollout.max_tokens or distill.teacher_prompt's length"
        self.notes += beyond_context(path, lengths, "the teacher", way)

    @property
    def samples(self) -> bool:
        """Return whether the student samples completions."""
        return self.settings.on_policy > 0

    def key(self) -> dict[str, Any]:
        """Return what a stored teacher depends on, as JSON; None where it cannot be known without a download."""
        s = self.settings
        digest = hashlib.blake2b(digest_size=16)
        sampled = self.config.data.format == "prompts"
        for p in (*self.prompts, *self.valid):
            for ids in (p.ids, p.taught, np.zeros(0, np.int32) if sampled or p.completion is None else p.completion):
                digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
        how = self.rollouts.model_dump(mode="json", exclude={"prompts", "samples", "rows"}) if sampled else {}
        m = self.config.model
        base = {"path": m.path, "quantize": m.quantize, "group_size": m.group_size} if s.teacher == BASE else {}
        return {
            "rows": digest.hexdigest(),
            "teacher": s.teacher,
            **{f"model.{name}": value for name, value in base.items()},
            _WEIGHTS: weights_digest(m.path if s.teacher == BASE else s.teacher),
            "quantize": s.quantize,
            "temperature": s.temperature,
            "top_k": s.top_k or TOP_K,
            **{f"rollout.{name}": value for name, value in how.items()},
            **({"run.seed": self.config.run.seed} if sampled else {}),
        }

    def open_stored(self) -> StoredTeacher | None:
        """Return the stored teacher that the recipe names."""
        return None if self.settings.cache is None else StoredTeacher(self.settings.cache, self.key())

    # Teacher

    @classmethod
    def frozen(cls, config: Config) -> list[FrozenSource]:
        s = config.section("distill", DistillSettings)
        if s.cache is not None:
            return []
        return [FrozenSource("teacher", None if s.teacher == BASE else find_teacher(s.teacher, False), s.quantize)]

    @classmethod
    def relief(cls, config: Config) -> list[str]:
        s = config.section("distill", DistillSettings)
        if s.cache is not None or s.teacher == BASE:
            return []
        found = [] if s.quantize is not None else ["distill.quantize: 4"]
        if s.align == "ids":
            found.append("the teacher stored first (mlxft distill-cache, with distill.on_policy: 0 and distill.cache)")
        return found

    def open_frozen(self) -> None:
        for source in self.frozen(self.config):
            if source.folder is not None:
                find_teacher(self.settings.teacher)
            self.teacher = self.models.base() if source.folder is None else self.models.open(source)
            if self.teacher.tokenizer is not None and self.settings.align == "ids":
                check_vocabulary(self.tokenizer, self.teacher.tokenizer, self.settings.teacher)

    def _read_teacher(
        self, rollout: Rollout, rows: Sequence[int], prompts: Sequence[TaughtPrompt]
    ) -> dict[str, mx.array]:
        """Return what the teacher says at each token of some completions: fields of `DistillBatch`."""
        if self.stored is not None:
            first = len(self.prompts) if prompts is self.valid else 0
            return self.stored.read([first + rollout.prompts[i] for i in rows])
        if self.settings.align == "text":
            return self._read_text(rollout, rows, prompts)
        if self.settings.teacher_prompt is not None:
            prompts = [replace(prompt, ids=prompt.taught) for prompt in prompts]
        a = rollout.stacked(rows, prompts)
        assert self.teacher is not None
        with self.teacher.reading() as split:
            if split.separable:
                hidden = as_trained(lambda: rows_hidden(split, a.ids, a.positions))
            else:
                whole = split.model(a.ids)
                hidden = whole.reshape(-1, whole.shape[-1])[a.positions]
        mx.async_eval(hidden)  # before the student's own work, so that its activations never stand beside these
        return {"hidden": hidden}

    def _read_text(self, rollout: Rollout, rows: Sequence[int], prompts: Sequence[TaughtPrompt]) -> dict[str, mx.array]:
        """Return `stretches` and `said` of some completions, by a teacher with a tokenizer of its own."""
        assert self.teacher is not None
        theirs, mine = self.teacher.tokenizer or self.tokenizer, self.tokenizer
        chat, stacked = self.config.data.template == "auto", list[EncodedCompletion]()
        stretches, owners, count = list[int](), list[int](), 0
        for i in rows:
            row, ids = prompts[rollout.prompts[i]], rollout.replies[i].tolist()
            ended = ids[-1] in mine.eos_token_ids
            bare = ids[:-1] if ended else ids
            text, asked = decode_completion(mine, bare), row.asked
            if (system := self.settings.teacher_prompt) is not None:
                asked = _with_system(asked, system, chat and theirs.has_chat_template)
            as_message = text if isinstance(asked, str) else {"role": "assistant", "content": text}
            try:
                prompt, reply = encode_completion(asked, as_message, theirs, row.where, tools_of(row.row), chat)
            except DataError as error:  # a sampled text that the teacher's tokenizer or template cannot write
                self._unwritten = f"; {error}"
                stretches += [_APART] * len(ids)
                stacked.append(EncodedCompletion(row.ids, np.zeros(0, np.int32)))
                continue
            if not ended:
                reply = reply[:-1]
            told = reply.tolist()
            first, second = token_ends(mine, bare), token_ends(theirs, told[:-1] if ended else told)
            if decode_completion(theirs, told[: len(second)]) != text:  # the template or the tokenizer has changed it
                first, second = [-1] * len(first), [-1] * len(second)
            elif ended:  # the two tokens that end it stand for the same
                first, second = [*first, len(text) + 1], [*second, len(text) + 1]
            a, b, found = stretches_of(first, second)
            a, b = (x + [found] * (n - len(x)) for x, n in ((a, len(ids)), (b, len(told))))
            stretches += [count + at if at < found else _APART for at in a]
            owners += [count + at if at < found else _APART for at in b]
            count += found
            stacked.append(EncodedCompletion(prompt, reply))
        self._compared += count
        kept = [place for place, each in enumerate(stacked) if len(each.reply)]
        said = mx.zeros(count)
        if kept and count:
            batch = stack([stacked[place] for place in kept])
            with self.teacher.reading() as split:
                logprobs = as_trained(
                    lambda: rows_logprobs(split, batch.ids, batch.positions, batch.labels, grad=False)
                )
            at = np.array(owners)
            said = row_sums(logprobs[mx.array(np.flatnonzero(at < _APART))], mx.array(at[at < _APART]), count)
        mx.async_eval(said)
        return {"stretches": mx.array(np.array(stretches, np.int32)), "said": said}

    # Rollouts

    def mixed(
        self, prompts: Sequence[TaughtPrompt], chosen: list[int], samples: int, number: int, seed: int
    ) -> Rollout:
        """Return sampled completions of the student, and then given ones, by the share of `distill.on_policy`."""
        own = np.random.default_rng([seed, 6]).random(len(chosen)) < self.settings.on_policy
        asked = [i for i, mine in zip(chosen, own) if mine]
        rollout = self.sample(prompts, asked, samples, number, seed) if asked else Rollout(number, [], [], [])
        for i in [i for i, mine in zip(chosen, own) if not mine]:
            completion = prompts[i].completion
            assert completion is not None
            rollout.prompts.append(i)
            rollout.replies.append(completion)
        return rollout

    def roll(self, model: nn.Module) -> tuple[Rollout, Event | None]:
        number = self._number
        mx.eval(model.trainable_parameters())  # the rest of the last step does not count as sampling
        began = time.perf_counter()
        chosen = self._chosen(number)
        rollout = self.mixed(self.prompts, chosen, self.rollouts.samples, number, self.seed_of(number))
        seconds, sampled = time.perf_counter() - began, rollout.sizes[: len(rollout.finished)]
        if not len(sampled):
            return rollout, None
        event: Event = {
            "event": "rollout",
            "rollout": number,
            "response_tokens": float(sampled.mean()),
            "eos_share": float(np.mean(rollout.finished)),
            "sampled_share": len(sampled) / len(rollout),
            "sampling_tokens_per_s": int(sampled.sum()) / max(seconds, 1e-9),
            "sampling_s": seconds,
            "scoring_s": 0.0,
        }
        if not any(rollout.finished) and self.rollouts.stop_at_eos:
            event["warning"] = CUT_OFF
        if self.settings.align == "text" and self._rolled and not sum(current().gather(self._compared)):
            event["warning"] = f"of the last rollout {_NOTHING}{self._unwritten}"
        self._compared, self._rolled = 0, True
        return rollout, event

    def make(self, rollout: Rollout, rows: Sequence[int]) -> list[MicroBatch]:
        a = self._stacked(rollout, rows, self.prompts)
        tokens = int(rollout.lengths(self.prompts)[list(rows)].sum())
        where = tuple(dict.fromkeys(self.prompts[rollout.prompts[i]].where for i in rows))
        batch = MicroBatch(a, tokens, int(a.labels.size), where)
        return [batch.with_finish(lambda data: replace(data, **self._read_teacher(rollout, rows, self.prompts)))]

    def batch(self, rollout: Rollout, rows: Sequence[int], prompts: Sequence[TaughtPrompt]) -> DistillBatch:
        """Return some completions with what the teacher says of them."""
        return replace(self._stacked(rollout, rows, prompts), **self._read_teacher(rollout, rows, prompts))

    @staticmethod
    def _stacked(rollout: Rollout, rows: Sequence[int], prompts: Sequence[TaughtPrompt]) -> DistillBatch:
        a = rollout.stacked(rows, prompts)
        return DistillBatch(ids=a.ids, last=a.last, positions=a.positions, labels=a.labels)

    def per(self, rollout: Rollout, rows: Sequence[int]) -> dict[str, float]:
        return {"divergence": float(rollout.sizes[list(rows)].sum())}

    # Loss

    def _reader(self, data: DistillBatch, agreement: bool = False) -> Read:
        """Return what gives the divergence at each position from the student's logits and the position's index.

        Args:
            agreement: give (n, 2): also whether both models' likeliest token is the same.
        """
        s = self.settings

        def read(logits: mx.array, at: mx.array) -> mx.array:
            if data.top is not None:
                assert data.shares is not None
                mine, theirs = F.log_shares(logits, data.top[at], s.temperature), data.shares[at]
                best = mx.take_along_axis(data.top[at], mx.argmax(theirs[:, :-1], axis=-1)[:, None], axis=-1)[:, 0]
            else:
                assert data.hidden is not None
                assert self.teacher is not None
                with self.teacher.reading() as split:
                    said = split.logits(data.hidden[at]) if split.separable else data.hidden[at]
                both = min(said.shape[-1], logits.shape[-1])  # embeddings are often padded to other sizes
                logits, said = logits[:, :both], said[:, :both]
                mine, theirs = F.log_softmax(logits, s.temperature), F.log_softmax(said, s.temperature)
                best = mx.argmax(said, axis=-1)
            apart = F.divergence(mine, theirs, s.weight)
            if not agreement:
                return apart
            return mx.stack([apart, (mx.argmax(logits, axis=-1) == best).astype(mx.float32)], axis=-1)

        return read

    def _sampled_kl(self, data: DistillBatch, grad: bool) -> mx.array:
        """Return (M,) log student - log teacher of each stretch, whose gradient is that of reverse KL.

        Its expectation over the student's samples is the KL of a stretch, and that of log student's gradient times it
        is KL's gradient (Williams 1992), the stretches before it given.
        """
        assert data.stretches is not None
        assert data.said is not None
        mine = rows_logprobs(self.split, data.ids, data.positions, data.labels, grad=grad)
        count = data.said.shape[0]
        inside = mx.minimum(data.stretches, count)
        sums = row_sums(mine, inside, count + 1)[:count]
        apart = mx.stop_gradient(sums - data.said)
        return apart + apart * (sums - mx.stop_gradient(sums))

    def divergences(self, data: DistillBatch, grad: bool, agreement: bool = False) -> mx.array:
        """Return (N,) divergences in nats, or (N, 2) with the agreement beside them; (M,) of stretches of text."""
        if data.said is not None:
            return self._sampled_kl(data, grad)
        at = mx.arange(data.labels.shape[0])
        reader = self._reader(data, agreement)
        return read_positions(self.split, data.ids, data.positions, at, reader, grad, _DISTRIBUTIONS)

    def loss(self, model: nn.Module, data: DistillBatch) -> Terms:
        metrics = {}
        if data.said is not None and data.stretches is not None:
            metrics["compared"] = (data.stretches < data.said.shape[0]).astype(mx.float32).sum()
        return Terms({"divergence": self.divergences(data, grad=True).sum()}, metrics)

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        """Return divergence and agreement on held-out rows, over completions sampled with the same random numbers."""
        if not self.valid:
            return {}
        every = list(range(len(self.valid)))
        rollout = self.mixed(self.valid, every, 1, 0, self.seed_of(0, valid=True))
        lengths = rollout.lengths(self.valid)
        total, before, ranks = np.zeros(2), self._compared, current()
        with probing(model):
            own = [rows for rows, rank in self.pieces(every, lengths) if rank == ranks.rank]
            batches = ((0, self.batch(rollout, rows, self.valid)) for rows in own)
            read: Callable[[DistillBatch], mx.array] = lambda data: as_trained(  # noqa: E731
                lambda: self.divergences(data, False, True)
            )
            for _, values in ahead(batches, read):
                total += np.array(values, dtype=np.float64).sum(axis=0)
        compared, self._compared = self._compared - before, before
        *sums, stretches = map(math.fsum, zip(*ranks.gather([*total.tolist(), compared])))
        if self.settings.align == "text" and not stretches:
            raise TrainingError(f"in validation {_NOTHING}{self._unwritten}")
        loss, agreement = (total / float(rollout.sizes.sum()) for total in sums)
        found: dict[str, Any] = {"loss": loss, "response_tokens": float(rollout.sizes.mean())}
        if self.settings.align == "ids":
            found["agreement"] = agreement
        sampled = range(min(len(rollout.finished), SAMPLES_SHOWN))
        if rollout.finished:
            found["eos_share"] = float(np.mean(rollout.finished))
        shown = [(self.valid[rollout.prompts[i]], rollout.replies[i]) for i in sampled]
        texts = [{"prompt": p.text, "answer": self.text(ids, self.opening(p))} for p, ids in shown]
        return {**found, "samples": texts}

    def previews(self, n: int) -> list[Encoded]:
        """Return the first rows; the completion that a row has is trained, unless all are sampled."""
        if self.settings.on_policy == 1:
            return super().previews(n)
        found = []
        for p in self.prompts[:n]:
            reply = np.zeros(0, np.int32) if p.completion is None else p.completion
            trained = np.arange(len(p.ids) + len(reply)) >= len(p.ids)
            found.append(Encoded(np.concatenate([p.ids, reply]), trained, p.where))
        return found

    # Memory

    def longest(self, prompt: EncodedPrompt) -> tuple[int, int]:
        assert isinstance(prompt, TaughtPrompt)
        given = prompt.completion if self.settings.on_policy < 1 else None
        most = max(self.rollouts.max_tokens if self.samples else 0, len(given) if given is not None else 0)
        return most, most

    def rehearsed(self, chosen: Sequence[Sequence[int]]) -> Any:
        if self.stored is None:
            return super().rehearsed(chosen)
        # A stored teacher has said something of stored completions only.
        micro_batches, count = [], 0
        for prompts in chosen:
            replies = [row.completion for row in (self.prompts[i] for i in prompts) if row.completion is not None]
            micro_batches += self.make(Rollout(self._number, [*prompts], replies, []), range(len(prompts)))
            count += sum(map(len, replies))
        return Step(micro_batches, {"divergence": float(count)})

    def beside(self, model: nn.Module) -> Beside:
        around = super().beside(model)
        shapes, held = self.scored(), 0
        positions = max(sum(shape.trained for shape, _ in step) for step in self._largest_steps())
        if self.stored is not None:
            held = positions * 8 * (self.settings.top_k or TOP_K)
        else:
            (source,) = self.frozen(self.config)
            there = model if source.folder is None else frozen_skeleton(source)
            split = ShapeSplit(there)
            width = split._width if split.separable else split.vocabulary
            held = positions * width * split._dtype.size
            more = max((len(p.taught) - len(p.ids) for p in self.prompts), default=0)
            read = [shape._replace(width=shape.width + more) for shape in shapes]
            around = around._replace(scoring=max(around.scoring, scoring_bytes(there, read)))
        frozen = {**around.residents.frozen, "what the teacher says": held}
        sampling = around.sampling if self.samples else 0
        return around._replace(residents=around.residents._replace(frozen=frozen), sampling=sampling)


# --- distill-cache ----------------------------------------------------------------------------------------------------


class _Storing(Distill):
    """The rows of a distillation whose teacher is not stored yet."""

    stores = True

    def open_stored(self) -> None:
        return None


def store_teacher(config: Config, tokenizer: Any, console: Console | None = None) -> dict[str, Any]:
    """Write to `distill.cache` what the teacher says at each token of the completions, for training without it.

    Of rows without completions (data.format: prompts) it samples the completions itself. The student is not loaded.
    What a killed call has written stays, and the next one continues from there.

    Returns:
        rows, tokens, and bytes on disk.
    Raises:
        ConfigError, DataError, ModelError: as training raises; CheckpointError: the folder cannot be written.
    """
    s = config.section("distill", DistillSettings)
    if s.cache is None:
        raise ConfigError("distill.cache: name the folder to write, e.g. distill.cache=teacher distill.on_policy=0")
    rows = _Storing(config, tokenizer)
    folder, key, every = s.cache, rows.key(), [*rows.prompts, *rows.valid]
    (source,) = Distill.frozen(config.model_copy(update={"distill": s.model_copy(update={"cache": None})}))
    parts = -(-len(every) // _PART_ROWS)
    about = {"made_of": key, "parts": parts, "rows": len(rows.prompts), "held_out": len(rows.valid), "complete": False}
    # A call that was refused before it wrote numbers leaves nothing that another teacher must keep away from.
    if (folder / _FILE).is_file() and _about(folder)["made_of"] != key and any(folder.glob("*.npy")):
        raise ConfigError(f"distill.cache: {folder} holds what was made of something else; name another folder")
    write_text(folder / _FILE, json.dumps(about, indent=2))
    left = [n for n in range(parts) if not _is_whole(folder, n)]
    if console is not None:
        for note in rows.notes:
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    with limits(config.memory.limit, config.memory.cache):
        _store_parts(rows, source, left, every, console)
    write_text(folder / _FILE, json.dumps({**about, "complete": True}, indent=2))
    tokens = sum(map(len, StoredTeacher(folder, key).completions))
    return {"rows": len(every), "tokens": tokens, "bytes": sum(file.stat().st_size for file in folder.iterdir())}


def _store_parts(
    rows: Distill, source: FrozenSource, left: Sequence[int], every: Sequence[TaughtPrompt], console: Console | None
) -> None:
    """Load the teacher, and write the parts that are left."""
    if not left:
        return
    teacher = _alone(rows.config, source)
    if teacher.tokenizer is not None:
        check_vocabulary(rows.tokenizer, teacher.tokenizer, rows.settings.teacher)
    with bar(console, len(every), "rows") as done:
        done(len(every) - sum(len(every[n * _PART_ROWS : (n + 1) * _PART_ROWS]) for n in left))
        for number in left:
            first = number * _PART_ROWS
            _store_part(rows, teacher, every[first : first + _PART_ROWS], number, first)
            done(len(every[first : first + _PART_ROWS]))


def _alone(config: Config, source: FrozenSource) -> FrozenModel:
    """Load the teacher without the student."""
    if source.folder is not None:
        find_teacher(config.section("distill", DistillSettings).teacher)
        return open_apart(source)
    m = config.model
    loaded = load(m.path, dtype=m.dtype, quantize=m.quantize, group_size=m.group_size)
    return FrozenModel(Split(loaded.model))


def _store_part(rows: Distill, teacher: FrozenModel, part: Sequence[TaughtPrompt], number: int, first: int) -> None:
    s, folder = rows.settings, rows.settings.cache
    assert folder is not None
    k = s.top_k or TOP_K
    completions = [row.completion for row in part]
    with teacher.reading() as split:
        if any(completion is None for completion in completions):
            asked, seed = [row.taught.tolist() for row in part], rows.seed_of(number, valid=False)
            found = sample_batch(split.model, rows.tokenizer, asked, rows.sampling, seed=seed, rows=rows.rollouts.rows)
            completions = [np.array(sampled.ids, np.int32) for (sampled,) in found]
        given = [completion for completion in completions if completion is not None]
        rollout = Rollout(0, list(range(len(part))), given, [])
        theirs = [replace(row, ids=row.taught) for row in part]
        lengths = rollout.lengths(theirs)
        known = max(rows.tokenizer.get_vocab().values()) + 1  # a padded embedding has more

        def read(logits: mx.array, at: mx.array) -> mx.array:
            logits = logits[:, :known]
            most = min(k, logits.shape[-1])
            top = mx.argpartition(-logits, most - 1, axis=-1)[:, :most]
            # One array, as chunks are joined: ids are exact in float32 up to 2**24.
            return mx.concatenate([F.log_shares(logits, top, s.temperature), top.astype(mx.float32)], axis=-1)

        def of_rows(places: Sequence[int]) -> mx.array:
            a = rollout.stacked(places, theirs)
            return read_positions(split, a.ids, a.positions, mx.arange(a.labels.shape[0]), read, False)

        said: list[Any] = [None] * len(part)
        batches = ((places, places) for places in rows.micro_batches(range(len(part)), lengths))
        for places, values in ahead(batches, of_rows):
            ends = np.cumsum(rollout.sizes[list(places)])[:-1]
            for place, of_one in zip(places, np.split(np.array(values), ends)):
                said[place] = of_one
    whole = np.concatenate(said)
    k = whole.shape[1] // 2
    _write_array(_part(folder, number, "shares"), whole[:, : k + 1])
    _write_array(_part(folder, number, "top"), whole[:, k + 1 :].astype(np.int32))
    numbers = np.repeat(np.arange(first, first + len(part)), rollout.sizes)
    _write_array(_part(folder, number, "tokens"), np.stack([numbers, np.concatenate(given)], axis=1).astype(np.int32))
