"""Declare every shared setting once; read and override recipes, explain what is wrong in them, and give their schema.

A recipe is YAML. Overrides (`tune.rank=16`) take precedence over the recipe, the recipe over the defaults, and the run
folder's config.yaml records the result. An objective declares its own sections in its class, which OBJECTIVES finds by
the recipe's `objective`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Hashable, Mapping, Sequence
from datetime import date as Date
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from mlxft.errors import ConfigError, half_character, nearest, shorten
from mlxft.text import home_path, read_small

# --- settings ---------------------------------------------------------------------------------------------------------
# The base class of every section of a recipe.


class Settings(BaseModel):
    """A section of a recipe. Unknown keys are errors, and values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _takes(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would read true as 1. YAML 1.1, which other programs write, reads on and off as true and false.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {"on", "off"} <= set(get_args(kind)):
            return "on" if value else "off"
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{str(value).lower()} is not a value of this setting")
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, int) and abs(part) >= 2**63:
                raise ValueError(f"the number has {len(str(part))} digits; expected one below 2^63")
            if isinstance(part, str | Path) and "\0" in str(part):
                raise ValueError(f"contains the character NUL; seen {part!r:.60}")
        return value


# --- search -----------------------------------------------------------------------------------------------------------
# The `sweep:` section: which settings `mlxft sweep` varies, in which ranges, and which metric it optimises.

UNITS = {"h": 3600, "m": 60, "s": 1}
LOWER_IS_BETTER = ("loss", "perplexity")
DEFAULT_TRIALS = 20


class Range(Settings):
    """The range of one setting that a sweep varies; exactly one kind of range is given."""

    log: tuple[float, float] | None = Field(
        None, description="[low, high], uniform in the logarithm, as for learning rates."
    )
    float_: tuple[float, float] | None = Field(None, alias="float", description="[low, high], uniform.")
    int_: tuple[int, int] | None = Field(None, alias="int", description="[low, high], integers, both included.")
    log_int: tuple[int, int] | None = Field(None, description="[low, high], integers, uniform in the logarithm.")
    choice: list[Any] | None = Field(None, description="List of values to choose from.")

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        given = {k.rstrip("_"): v for k, v in self if v is not None}
        if len(given) != 1:
            seen = f"seen {', '.join(given)}" if given else "seen none"
            raise ValueError(f"give exactly one of log, float, int, log_int, choice; {seen}")
        ((kind, value),) = given.items()
        if kind == "choice":
            different = {json.dumps(v, sort_keys=True, default=str) for v in value}
            if len(different) < len(value):
                raise ValueError(f"choice lists a value twice: {value}")
            if len(value) < 2:
                raise ValueError(
                    f"choice needs at least 2 values, seen {len(value)}; set a single value outside of sweep"
                )
            return self
        low, high = value
        if not low < high:
            raise ValueError(f"the range {kind}: [{low:g}, {high:g}] is empty; low must be below high")
        if kind.startswith("log") and low <= 0:
            raise ValueError(
                f"the range {kind}: [{low:g}, {high:g}] starts at {low:g}, which has no logarithm; start above 0"
            )
        return self

    @property
    def kind(self) -> str:
        """Return the kind of the range: log, float, int, log_int or choice."""
        return next(k.rstrip("_") for k, v in self if v is not None)

    @property
    def value(self) -> Any:
        """Return [low, high], or the list of choices."""
        return next(v for _, v in self if v is not None)


class SweepSettings(Settings):
    """Search of `mlxft sweep`. `mlxft train` refuses a recipe with this section."""

    space: dict[str, Range] = Field(
        default_factory=dict,
        description="Range of each setting to vary, e.g. optim.lr: {log: [1e-5, 1e-3]}, "
        "tune.rank: {choice: [4, 16, 64]}.",
    )
    metric: str = Field(
        "loss",
        min_length=1,
        description="Validation metric to optimise (`eval` in metrics.jsonl), of the kept weights.",
    )
    direction: Literal["minimize", "maximize"] | None = Field(
        None, description="Whether to minimize or maximize the metric (default for loss and perplexity: minimize)."
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="How trials are chosen: learnt from earlier trials (TPE), random, or every combination."
    )
    pruner: Literal["halving", "median", "none"] = Field(
        "halving",
        description="Which trials are stopped early: halving stops those outside the better half of the trials that "
        "reached 1, 2, 4, 8 ... validations; median stops those worse than the median of the finished trials.",
    )
    grace: int = Field(1, ge=1, description="Number of validations before a trial may be stopped.")
    trials: int | None = Field(
        None, ge=1, le=10**6, description=f"Total number of trials (default: {DEFAULT_TRIALS}; with time: no limit)."
    )
    time: str | None = Field(None, description="Time limit of one call, e.g. 2h, 30m, 1h30m.")

    @field_validator("time", mode="before")
    @classmethod
    def _is_time(cls, value: Any) -> Any:
        if value is not None:
            seconds(value)
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _consistent(self) -> SweepSettings:
        given = self.model_fields_set
        if given and not self.space:
            raise ValueError("space is needed: the settings to vary, e.g. space: {optim.lr: {log: [1e-5, 1e-3]}}")
        if given and self.direction is None and not self.metric.endswith(LOWER_IS_BETTER):
            raise ValueError(f"direction is needed for metric {self.metric}: minimize or maximize")
        if self.pruner == "none" and "grace" in given:
            raise ValueError(f"grace ({self.grace}) needs a pruner; leave it out with pruner: none")
        if self.sampler == "grid":
            endless = [k for k, r in self.space.items() if r.kind in ("log", "float")]
            if endless:
                raise ValueError(f"sampler: grid needs int or choice ranges; give a choice for {', '.join(endless)}")
        return self

    @property
    def minimize(self) -> bool:
        """Return whether a lower metric is better."""
        return self.direction != "maximize"


def seconds(text: Any) -> float:
    """Return the seconds in a duration such as 90s, 30m, 2h or 1h30m.

    Raises:
        ValueError: the text is not a duration.
    """
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", str(text).strip())
    total = sum(float(v) * u for v, u in zip(found.groups(), UNITS.values()) if v) if found else 0.0
    if total <= 0:
        raise ValueError(f"{text!r} is not a duration; expected e.g. 2h, 30m, 1h30m or 90s")
    return total


# --- config -----------------------------------------------------------------------------------------------------------
# Every setting, declared once: its type, default, bounds and help.

S = TypeVar("S", bound=Settings)
# A section that a plain text may stand for -> the setting that the text is.
TEXTS = {"environment": "path", "valid": "path"}
# name -> module of mlxft.objectives, and the class in it
OBJECTIVES = {
    "distill": "distill:Distill",
    "grpo": "grpo:GRPO",
    "online_dpo": "online_dpo:OnlineDPO",
    "ppo": "ppo:PPO",
    "preference": "preference:Preference",
    "reinforce": "grpo:Reinforce",
    "reward": "reward:Reward",
    "rloo": "grpo:RLOO",
    "sft": "sft:SFT",
}


class ModelSettings(Settings):
    """Base model to start from."""

    path: str = Field(description="Model: a hub id, folder, .gguf file, or smollm2-135m.", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights; auto is float32 on a CPU, and the model's own type on a GPU."
    )
    quantize: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        None, description="Quantise the frozen base to this many bits when it is loaded (4 is QLoRA)."
    )
    group_size: Literal[32, 64, 128] | None = Field(
        None, description="Number of weights that share a quantisation scale (default: 64)."
    )
    adapter: str | None = Field(None, description="Adapter folder or run whose adapter is trained further.")
    chat_template: Path | None = Field(None, description="Jinja file that replaces the tokenizer's chat template.")
    trust_remote_code: bool = Field(False, description="Allow Python code that comes with the model to run.")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if self.group_size is not None and self.quantize is None:
            raise ValueError(f"group_size ({self.group_size}) needs quantize; give quantize too, or leave it out")
        return self


LOW_RANK = ("rank", "scale", "alpha", "rslora", "dropout", "lora_plus", "quantize_aware", "targets")


class TuneSettings(Settings):
    """Parameters that are trained, and how."""

    method: Literal["lora", "dora", "full"] = Field(
        "lora", description="Fine-tuning method: LoRA, DoRA, or full (all weights)."
    )
    rank: int = Field(8, ge=1, le=2**16, description="Rank of the update; 8 to 64 is usual.")
    scale: float | None = Field(None, gt=0, description="Multiplier of the update (default: alpha / rank).")
    alpha: float | None = Field(
        None, gt=0, description="The update is multiplied by alpha / rank; rsLoRA: alpha / sqrt(rank) (default: 16)."
    )
    rslora: bool = Field(False, description="Scale the update by alpha / sqrt(rank) (Kalajdzievski 2023).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update; only sft uses it.")
    quantize_aware: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        None,
        description="Train quantisation-aware: adapted layers compute with the adapted weight rounded to this many "
        "bits, as mlxft fuse then writes it, and the gradient goes straight through the rounding. A base with as many "
        "bits keeps its scales; groups are the base's, or 64 weights on a float base (default: no rounding).",
    )
    lora_plus: float | None = Field(
        None,
        ge=1,
        description="LoRA+ (Hayou et al. 2024): learning rate of each adapter's B as a multiple of that of A, which "
        "optim.lr or optim.groups give; 16 is theirs, with a smaller optim.lr (default: one rate for both).",
    )
    neftune: float | None = Field(
        None,
        gt=0,
        description="NEFTune (Jain et al. 2023): alpha of the noise on embeddings while training, uniform and at most "
        "alpha / sqrt(tokens of the row x width). 5 to 15 is usual; only sft uses it (default: no noise).",
    )
    targets: str | list[str] = Field(
        "all-linear",
        description="Layers to adapt: all-linear, attention, mlp, or a name pattern or list of patterns such as q_proj "
        "or layers.0.*. Routers of experts are adapted only if a pattern names them.",
    )
    layers: Literal["all"] | int | list[int] = Field(
        "all", description="Blocks with adapters (full: trained blocks): all, the last N, or a list of indices."
    )
    train: list[str] = Field(
        default_factory=list,
        description="Name patterns of parameters that are trained in full, in addition to the adapters; with full, "
        "only these are trained.",
    )
    freeze: list[str] = Field(
        default_factory=list, description="With full: name patterns of parameters that are not trained."
    )
    router_aux: float | None = Field(
        None,
        gt=0,
        description="Mixtures of experts: weight of the load-balancing loss, E sum f P of each router (Fedus et al. "
        "2021), averaged over layers; its minimum is 1. 0.001 to 0.01 is usual (default: no such loss).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TuneSettings:
        given = self.model_fields_set
        if self.method == "full":
            low_rank = sorted(set(LOW_RANK) & given)
            if low_rank:
                raise ValueError(f"method full has no {', '.join(low_rank)}; leave this out, or use lora or dora")
        elif self.freeze:
            raise ValueError(
                f"freeze needs method full; with {self.method} the base is frozen (choose by targets and layers)"
            )
        if self.quantize_aware is not None and self.dropout:
            raise ValueError(
                "dropout acts on the update alone, and quantize_aware rounds it together with its base; leave out one"
            )
        if self.scale is not None and (self.alpha is not None or self.rslora):
            other = "alpha" if self.alpha is not None else "rslora"
            raise ValueError(f"give scale or {other}, not both (scale={self.scale:g})")
        if not self.targets:
            raise ValueError("targets is empty, so nothing would be adapted; leave it out, or give name patterns")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"layers must be all, a number of at least 1 (the last N), or a list; seen {self.layers}")
        return self

    @property
    def multiplier(self) -> float:
        """Return the factor that the low-rank product is multiplied by."""
        if self.scale is not None:
            return self.scale
        alpha = 16.0 if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.rslora else self.rank))


CHATS = ("messages", "sharegpt", "alpaca")  # formats that need a chat template


Paths: TypeAlias = str | list[str]  # of rows: a file, pattern, folder or hub data set, or several


RowFormat: TypeAlias = Literal[
    "auto",
    "messages",
    "prompt-completion",
    "text",
    "sharegpt",
    "alpaca",
    "preference",
    "ratings",
    "unpaired",
    "prompts",
]


class SourceSettings(Settings):
    """Rows beside those of data.train, which may be read in another way."""

    path: Paths = Field(description="Files, folder or hub data set, as data.train names them.")
    format: RowFormat | None = Field(
        None,
        description="Format of these rows (default: that of data.train; where data.format is auto and the rows do not "
        "fit what it finds, they are recognised by themselves).",
    )
    fields: dict[str, str] | None = Field(
        None, description="As data.fields, for these rows (default: data.fields, if the format is the same)."
    )


class MixedSettings(SourceSettings):
    """A source of training rows beside data.train."""

    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often an epoch uses each row of the source. A fraction uses other rows in each epoch, all of "
        "them equally often.",
    )


class DataSettings(Settings):
    """Rows to train on, and which of their tokens are trained."""

    train: Paths = Field(
        description="Training rows: a file (jsonl, json, csv, tsv, xlsx, ods, parquet, txt, md, chats exported from "
        "ChatGPT or Claude), a pattern such as rows/*.csv, a folder, hf:org/name[:config][:split], or a list of these. "
        "file.xlsx:Sheet2 names a sheet."
    )
    valid: Paths | float | SourceSettings | None = Field(
        None,
        description="Validation rows, given like train, or a share of the training rows to split off, e.g. 0.05; a "
        "validation file in a folder of data.train, or a sheet in its workbook, is found by its name. {path: ..., "
        "format: ..., fields: ...} reads them in another way than the training rows.",
    )
    mix: dict[str, MixedSettings] = Field(
        default_factory=dict,
        description="Further sources of training rows: a name for each, mapped to its path and weight, and to its "
        "format and fields where they differ, e.g. {general: {path: general.jsonl, weight: 0.1}, faq: {path: faq.csv, "
        "fields: {prompt: Frage, completion: Antwort}}}. An epoch has each row of data.train once.",
    )
    format: RowFormat = Field(
        "auto",
        description="Format of the rows. auto takes the one that they fit, of those that the objective takes, and maps "
        "columns with usual names; where none or several fit, the error shows the settings to write.",
    )
    fields: dict[str, str] = Field(
        default_factory=dict,
        description="Map from the format's fields to the rows' fields, e.g. {messages: dialog}, or to templates with "
        "fields in braces, e.g. {prompt: 'Review: {review}'}.",
    )
    shots: int | None = Field(
        None,
        ge=1,
        description="Train on this many rows only, drawn by run.seed; if the rows have labels, on this many per label. "
        "A row's completion counts as its label if there are at most 20 different ones and twice as many rows.",
    )
    label: str | None = Field(None, min_length=1, description="With shots: field of the rows that holds the label.")
    max_length: int = Field(2048, ge=2, le=2**22, description="Maximum length of a row in tokens.")
    overflow: Literal["error", "drop", "truncate", "split"] = Field(
        "error", description="What to do with longer rows; split works only for format text."
    )
    bad_rows: Literal["error", "drop"] = Field(
        "error", description="What to do with rows that cannot be read or do not fit the format; drop leaves them out."
    )
    train_on: Literal["assistant", "last", "completion", "all"] | None = Field(
        None,
        description="Tokens to train on: every assistant turn, the last one, the completion, or all (default: "
        "assistant; format text: all).",
    )
    template: Literal["auto", "none"] = Field(
        "auto",
        description="auto applies the chat template, if there is one, to prompts and completions; none does not.",
    )
    date: Date | None = Field(
        None,
        description="Date for chat templates that write one, e.g. 2026-11-26 (default: the day on which the run "
        "begins; a resumed run keeps it).",
    )
    cache: bool = Field(True, description="Cache encoded rows on disk, so that the next run need not encode them.")
    stream: bool = Field(
        False,
        description="Read rows one at a time, encode them to the disk before the first step, and train from there, for "
        "data larger than memory: jsonl, parquet and hub data sets. Batches are the same as without it.",
    )

    @property
    def sources(self) -> dict[str, MixedSettings]:
        """Return all sources of training rows by name, data.train as train."""
        return {"train": MixedSettings(path=self.train), **self.mix}

    @property
    def held_out(self) -> SourceSettings | None:
        """Return the source of data.valid; None if it names none, or is a share."""
        if self.valid is None or isinstance(self.valid, float):
            return None
        return self.valid if isinstance(self.valid, SourceSettings) else SourceSettings(path=self.valid)

    @property
    def formats(self) -> Mapping[str, str]:
        """Return the format of each source by its setting, such as data.mix.faq; auto where it is to be recognised."""
        others: dict[str, SourceSettings] = {f"data.mix.{name}": source for name, source in self.mix.items()}
        others |= {"data.valid": source} if (source := self.held_out) else {}
        return {"data": self.format} | {name: source.format or self.format for name, source in others.items()}

    def of(self, source: SourceSettings) -> DataSettings:
        """Return the settings by which the rows of a source are read."""
        format = source.format or self.format
        inherited = self.fields if format == self.format else {}
        fields = inherited if source.fields is None else source.fields
        return self.model_copy(update={"format": format, "fields": fields})

    def as_begun(self, then: DataSettings) -> DataSettings:
        """Return the settings with how the rows were read when a run began, where these leave it open."""
        update: dict[str, Any] = {}
        if self.format in ("auto", then.format) and self.fields.items() <= then.fields.items():
            update = {"format": then.format, "fields": then.fields}
        update["mix"] = dict(self.mix)
        for name, source in self.mix.items():
            of = then.mix.get(name, source)
            given = (source.fields or {}).items() <= (of.fields or {}).items()
            if given and source.format in (None, "auto", of.format):
                update["mix"][name] = source.model_copy(update={"format": of.format, "fields": of.fields})
        own = self.train if self.valid is None else self.valid
        if isinstance(then.valid, SourceSettings) and then.valid.path == own:
            update["valid"] = then.valid
        return self.model_copy(update=update)

    # How the rows were recognised, where the recipe left it open.
    _notes: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "invalid" in raw:
            raise ValueError(f"invalid is called bad_rows: write data.bad_rows: {raw['invalid']}")
        return raw

    @field_validator("valid", mode="before")
    @classmethod
    def _section_or_path(cls, raw: Any) -> Any:
        """Say what is wrong with a section, and not that it is neither a path nor a share either."""
        try:
            return SourceSettings.model_validate(raw) if isinstance(raw, Mapping) else raw
        except ValidationError as e:
            raise ValueError("; ".join(explain(e, SourceSettings))) from None

    @model_validator(mode="after")
    def _consistent(self) -> DataSettings:
        if "train" in self.mix:
            raise ValueError("mix: train is the name of the rows of data.train; choose another name")
        if self.stream:
            self._check_stream()
        if isinstance(self.valid, float) and not 0 < self.valid < 1:
            raise ValueError(f"valid as a share must be between 0 and 1, seen {self.valid:g}")
        if self.label is not None and self.shots is None:
            raise ValueError(f"label ({self.label}) needs shots; give shots too, or leave it out")
        self._check_formats()
        return self

    def _check_formats(self) -> None:
        """Raise ValueError for settings that the formats do not have, as far as these are known."""
        formats = [name for name in dict.fromkeys(self.formats.values()) if name != "auto"]
        if formats == ["text"] and self.train_on not in (None, "all"):
            raise ValueError(f"train_on: {self.train_on} does not work with format text, which trains every token")
        if self.overflow == "split" and (others := [name for name in formats if name != "text"]):
            raise ValueError(
                f"overflow: split works only with format text, not {others[0]}; use error, drop or truncate"
            )
        if self.template == "none" and (chats := [name for name in formats if name in CHATS]):
            raise ValueError(f"template: none does not work with format {chats[0]}, which needs the chat template")

    def recognised(self, notes: Sequence[str], **update: Any) -> DataSettings:
        """Return the settings with how the rows are read: `format`, `fields`, and the sources of mix and valid.

        Raises:
            ConfigError: other settings do not work with these formats.
        """
        found = self.model_copy(update=update)
        found._notes = (*self._notes, *notes)
        try:
            found._check_formats()
        except ValueError as e:
            raise ConfigError(f"data.{e}") from None
        return found

    @property
    def notes(self) -> list[str]:
        """Return notes on how the rows were recognised."""
        return list(self._notes)

    def _check_stream(self) -> None:
        """Raise ValueError for settings that need all rows at once."""
        if isinstance(self.valid, float):
            raise ValueError(
                f"valid: a share ({self.valid:g}) is drawn from all rows at once, which stream does not hold; write "
                "the validation rows to a file of their own, and give it"
            )
        if self.shots is not None:
            raise ValueError("shots draws from all rows at once, which stream does not hold; leave stream out")
        if not self.cache:
            raise ValueError("stream keeps encoded rows on the disk; leave cache: false out")


class BatchSettings(Settings):
    """Division of rows into micro-batches and steps."""

    tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Tokens in a micro-batch, padding included; rows of similar length share one (default: what makes "
        "64 of an epoch, but 256 to 2048; on-policy objectives: 2048). auto takes as many as fit in memory, at "
        "most 65536, by the memory plan, corrected by measured steps (memory.measure) when a run or range test begins.",
    )
    rows: int | None = Field(None, ge=1, description="Rows in a micro-batch, instead of tokens.")
    accumulate: int = Field(1, ge=1, description="Micro-batches in a step.")
    pack: bool = Field(
        False,
        description="Pack several rows into one sequence, in which each row attends only to itself, to save padding. "
        "rows then counts sequences.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> BatchSettings:
        if self.tokens is not None and self.rows is not None:
            raise ValueError(f"give tokens or rows, not both (tokens={self.tokens}, rows={self.rows})")
        return self

    @property
    def budget(self) -> int:
        """Return `tokens`, or what an objective takes that leaves them open."""
        return 2048 if self.tokens is None else int(self.tokens)


class Group(Settings):
    """Group of parameters with its own learning rate or weight decay."""

    match: str = Field(
        min_length=1,
        description="Pattern of parameter names, as in tune.targets (layers.0, embed_tokens, *norm*), or re: and a "
        "regular expression to search for in the names.",
    )
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the group; warm-up and schedule are the run's."
    )
    scale: float | None = Field(
        None, gt=0, description="Learning rate of the group as a multiple of optim.lr, instead of lr."
    )
    weight_decay: float | None = Field(None, ge=0, description="Decoupled weight decay (default: optim.weight_decay).")

    @model_validator(mode="after")
    def _consistent(self) -> Group:
        if self.lr is not None and self.scale is not None:
            raise ValueError(f"{self.match!r}: give lr or scale, not both (lr={self.lr:g}, scale={self.scale:g})")
        if self.lr is None and self.scale is None and self.weight_decay is None:
            raise ValueError(f"{self.match!r}: give lr, scale or weight_decay; without one the group changes nothing")
        try:
            re.compile(self.match[3:] if self.match.startswith("re:") else "")
        except re.error as e:
            raise ValueError(f"{self.match!r}: not a regular expression: {e}") from e
        return self


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


class OptimSettings(Settings):
    """Optimiser and learning rate."""

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = Field(
        "adamw",
        description="Optimiser. muon uses Muon for the matrices of the blocks and their low-rank factors, scaled so "
        "that lr means what it means for adamw (Liu et al. 2025), and AdamW at the same lr for embeddings, output "
        "layer, heads, norms and biases.",
    )
    lr: float = Field(
        2e-4,
        gt=0,
        description="Peak learning rate (default for adamw: sft and distill 2e-5, reward 1e-5, ppo 3e-6, any other "
        "objective 1e-6; LoRA and DoRA: 10 times as much).",
        json_schema_extra=_without_default,  # the default depends on objective and method
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Learning-rate schedule after warm-up."
    )
    warmup: int | float = Field(
        0.03, ge=0, description="Steps of linear warm-up; a value below 1 is a share of all steps."
    )
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of a linear or cosine schedule.")
    weight_decay: float | None = Field(
        None,
        ge=0,
        description="Decoupled weight decay; sgd adds it to the gradient (default: 0.01 for adamw, else 0).",
    )
    betas: tuple[float, float] | None = Field(
        None, description="Decay rates of the moments (default for adam, adamw: 0.9, 0.999; lion: 0.9, 0.99)."
    )
    eps: float | None = Field(None, gt=0, description="adam, adamw: constant added to the denominator (default: 1e-8).")
    momentum: float | None = Field(
        None, ge=0, lt=1, description="sgd, muon: momentum (default for sgd: 0; muon: 0.95)."
    )
    clip: float | None = Field(1.0, gt=0, description="Maximum norm of the gradient; null turns clipping off.")
    groups: list[Group] = Field(
        default_factory=list,
        description="Groups of parameters with their own learning rate, as {match, lr or scale, weight_decay}; the "
        "first group that matches counts.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> OptimSettings:
        takes = {
            "weight_decay": ("adamw", "sgd", "lion", "adafactor", "muon"),
            "betas": ("adamw", "adam", "lion"),
            "eps": ("adamw", "adam"),
            "momentum": ("sgd", "muon"),
        }
        wrong = [k for k, names in takes.items() if getattr(self, k) is not None and self.name not in names]
        if wrong:
            raise ValueError(f"{self.name} has no {', '.join(wrong)} (only {', '.join(takes[wrong[0]])})")
        if self.betas is not None and not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must each be at least 0 and below 1, seen {list(self.betas)}")
        decayed = [g.match for g in self.groups if g.weight_decay is not None]
        if decayed and self.name not in takes["weight_decay"]:
            raise ValueError(f"groups: {self.name} has no weight_decay; leave it out of {', '.join(decayed)}")
        if "lr" in self.model_fields_set:
            self.check_min_lr()
        if self.min_lr and self.schedule == "constant":
            raise ValueError("min_lr needs a linear or cosine schedule; constant keeps lr")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup must be a whole number of steps or a share below 1, seen {self.warmup:g}")
        return self

    def check_min_lr(self) -> None:
        """Raise a ValueError if `min_lr` is above `lr`."""
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) is above lr ({self.lr:g})")

    def with_default(self, lr: float) -> OptimSettings:
        """Return these settings with the rate `lr` if none is given; it still counts as not given."""
        if "lr" in self.model_fields_set:
            return self
        found = self.model_copy()
        found.__dict__["lr"] = lr  # model_copy(update=...) would count it as given
        return found


class RunSettings(Settings):
    """Run folder, length of the run, and what is done while it trains."""

    name: str | None = Field(
        None,
        pattern=r"^[^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$",
        description="Name of the run folder: at most 200 bytes, without a slash or a leading dot (default: the "
        "recipe's file name).",
    )
    dir: Path = Field(Path("runs"), description="Folder that holds the run folders.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed for all random numbers.")
    steps: int | None = Field(None, ge=1, description="Number of steps (optimiser updates).")
    epochs: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Number of epochs, instead of steps (default: as many as make 200 steps of sft, 100 of other "
        "objectives, but 1 to 20).",
    )
    report_every: int = Field(10, ge=1, description="Steps between reports.")
    eval_every: int | None = Field(None, ge=1, description="Steps between validations (default: one epoch).")
    eval_at_start: bool = Field(False, description="Validate before the first step, to have a loss to compare with.")
    save_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Number of checkpoints to keep; older ones are removed.")
    patience: int | None = Field(
        None, ge=1, description="Stop after this many validations without a better loss (default: never)."
    )
    sample_prompts: list[str] = Field(default_factory=list, description="Prompts to complete at each validation.")
    keep_awake: bool = Field(True, description="Keep a Mac awake while it trains.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile the forward and backward pass for the first 16 batch shapes that repeat, as they do with "
        "batch.pack. auto compiles if the measured step (memory.measure) is faster compiled, never on a CPU. Not for "
        "on-policy objectives, dropout, tune.neftune or tune.router_aux.",
    )
    sample_tokens: int | None = Field(
        None, ge=1, description="Maximum length of a sample completion in tokens (default: 64)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both (steps={self.steps}, epochs={self.epochs:g})")
        name = self.name or ""
        if len(name.encode("utf-8", "surrogatepass")) > 200:  # temporary files beside the folder have longer names
            raise ValueError(f"name is longer than 200 bytes: {name[:40]!r}...")
        if self.sample_tokens is not None and not self.sample_prompts:
            raise ValueError(f"sample_tokens ({self.sample_tokens}) needs sample_prompts; give some, or leave it out")
        return self


class MemorySettings(Settings):
    """Memory that training may use, in GB (10^9 bytes)."""

    checkpoint: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Gradient checkpointing: keep only each block's input and recompute the rest for the gradient. "
        "auto turns it on if a step without it takes more than a third of the machine's memory, or more than limit, "
        "as planned or measured.",
    )
    measure: bool = Field(
        True,
        description="Before training, run steps with the largest batch, discard their gradients, and decide "
        "checkpoint: auto and batch.tokens: auto by the memory that they take. For on-policy objectives the "
        "completions are made up, and the memory of sampling is planned, not measured.",
    )
    limit: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Refuse to train if the memory plan is above this (default: what the machine has).",
    )
    cache: float | None = Field(
        None, ge=0, le=1e6, description="Freed memory that is kept for reuse (default: as MLX does, up to the limit)."
    )


class DistributedSettings(Settings):
    """Training over several processes: `mlxft launch`, or mlx.launch, starts one on each Mac."""

    ranks: int | None = Field(
        None,
        ge=1,
        description="Processes that train together; others are refused, and mlxft check plans for them. Default: as "
        "many as were started.",
    )
    weights: list[Annotated[float, Field(gt=0)]] | Literal["auto"] | None = Field(
        None,
        description="Share of the work of each rank, [2, 1] for a Mac twice as fast; auto: by the speed of the first "
        "steps. Default: all the same.",
    )
    shard: Literal["none", "base", "optimizer"] = Field(
        "none",
        description="base: each rank holds a part of the frozen weights, and blocks are gathered when they are "
        "computed, for a base larger than one Mac (LoRA and DoRA, objectives that sample nothing). optimizer: full "
        "fine-tuning whose optimiser state is in parts on the ranks.",
    )
    timeout: float = Field(
        30.0, ge=2, description="Seconds without a sign of life after which a rank is taken for lost."
    )


class ReportSettings(Settings):
    """Experiment trackers, in addition to metrics.jsonl; each needs the extra of its name."""

    to: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = Field(
        default_factory=list,
        description="Trackers that receive the metrics of metrics.jsonl, or a single one; a failing tracker never "
        "stops training.",
    )
    project: str | None = Field(
        None, min_length=1, description="Project of wandb and trackio, experiment of mlflow (default: mlxft)."
    )

    @field_validator("to", mode="before")
    @classmethod
    def _listed(cls, to: Any) -> Any:
        return [to] if isinstance(to, str) else to

    @model_validator(mode="after")
    def _consistent(self) -> ReportSettings:
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"to lists a tracker twice: {', '.join(self.to)}")
        if self.project is not None and not {*self.to} - {"tensorboard"}:
            raise ValueError(f"project ({self.project}) needs wandb, trackio or mlflow; add one to report.to")
        return self


class Config(Settings):
    """A whole recipe. `section` returns an objective's own settings."""

    objective: str = Field("sft", description="Name of the objective to optimise.")
    model: ModelSettings
    tune: TuneSettings = Field(default_factory=TuneSettings)
    data: DataSettings
    batch: BatchSettings = Field(default_factory=BatchSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    run: RunSettings = Field(default_factory=RunSettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    distributed: DistributedSettings = Field(default_factory=DistributedSettings)
    report: ReportSettings = Field(default_factory=ReportSettings)
    sweep: SweepSettings = Field(default_factory=SweepSettings)
    versions: dict[str, str] | None = Field(
        None, description="Versions of the packages that a run used; written to config.yaml."
    )

    @model_validator(mode="after")
    def _default_lr(self) -> Config:
        optim = self.optim.with_default(default_lr(self.objective, self.tune.method))
        object.__setattr__(self, "optim", optim)  # settings are frozen once they are made
        try:
            optim.check_min_lr()
        except ValueError as e:
            raise ValueError(f"optim: {e}") from None
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.tune.lora_plus is not None and self.optim.name == "sgd":
            raise ValueError(
                f"tune.lora_plus ({self.tune.lora_plus:g}) is for optimisers whose updates do not grow with the "
                "gradient, and those of optim.name: sgd do; choose adamw or another, or leave it out"
            )
        shard, method = self.distributed.shard, self.tune.method
        if shard == "base" and method == "full":
            raise ValueError(
                "distributed.shard: base is for frozen weights, and tune.method: full has none; choose optimizer, or "
                "lora"
            )
        if shard == "optimizer" and method != "full":
            raise ValueError(
                f"distributed.shard: optimizer is for tune.method: full; the optimiser state of {method} is small and "
                "stays whole on every rank: leave it out, or choose base"
            )
        if shard == "base" and self.tune.quantize_aware is not None:
            raise ValueError(
                "tune.quantize_aware: rounds whole weights, and distributed.shard: base cuts them; leave out one"
            )
        if shard == "base" and self.memory.checkpoint == "off":
            raise ValueError("memory.checkpoint: off; with distributed.shard: base blocks are always checkpointed")
        if shard == "base" and self.run.compile == "on":
            raise ValueError("run.compile: on; with distributed.shard: base a step cannot be compiled")
        return self

    @property
    def sharded(self) -> Config:
        """Return the recipe as it is computed with a sharded base: planned rather than measured, and checkpointed."""
        if self.distributed.shard != "base":
            return self
        memory = self.memory.model_copy(update={"checkpoint": "on", "measure": False})
        run = self.run.model_copy(update={"compile": "off"})
        return self.model_copy(update={"memory": memory, "run": run})

    @property
    def begun(self) -> Config:
        """Return a run's recipe with the sizes that it was trained with, which older versions did not write down."""
        batch, run = self.batch, self.run
        if batch.tokens is None and batch.rows is None:
            batch = batch.model_copy(update={"tokens": batch.budget})
        if run.steps is None and run.epochs is None:
            run = run.model_copy(update={"epochs": 1.0})
        return self.model_copy(update={"batch": batch, "run": run})

    def section(self, name: str, kind: type[S]) -> S:
        """Return the objective's own section `name`."""
        found = getattr(self, name)
        assert isinstance(found, kind), f"{name} is a {type(found).__name__}"
        return found

    @property
    def run_dir(self) -> Path:
        """Return the path of the run folder."""
        assert self.run.name is not None, "load_config names the run"
        return self.run.dir / self.run.name


def objectives() -> list[str]:
    """Return the names of the objectives that mlxft brings."""
    return list(OBJECTIVES)


def is_foreign(objective: str) -> bool:
    """Whether a recipe's objective is an import path: `file.py:Class`, or `package.module:Class`."""
    return objective not in OBJECTIVES and ":" in objective


def objective_class(name: str) -> Any:
    """Return the class of an objective, imported now: it needs mlx.

    Raises:
        ConfigError: it does not exist, its file cannot be run, or it is not an objective. Python that only a run
            folder names is not run.
    """
    if name in OBJECTIVES:
        module, _, attribute = OBJECTIVES[name].partition(":")
        return getattr(importlib.import_module(f"mlxft.objectives.{module}"), attribute)
    if not is_foreign(name):
        from mlxft.foreign import explain_objective

        raise ConfigError(
            f"objective: no such objective {name!r}{explain_objective(name) or nearest(name, OBJECTIVES)}; there are "
            f"{', '.join(OBJECTIVES)}; one of your own is file.py:Class or package.module:Class"
        )
    if name not in _trusted:
        raise ConfigError(f"objective: {name} is Python that a run folder names, and is not run")
    stamp = _stamp(name)
    if name not in _foreign or _foreign[name][0] != stamp:
        _foreign[name] = stamp, _import_objective(name)
    return _foreign[name][1]


_handed: dict[tuple[str, str], Any] = {}  # (setting, what stands for it) -> an object that a program gives in place


def hand_over(setting: str, name: str, value: Any) -> str:
    """Keep an object that a program gives in place of a setting's path, and return what stands for it in the recipe."""
    spec = f"python:{name}"
    _handed[setting, spec] = value
    return spec


def handed_over(setting: str, spec: str) -> Any:
    """Return the object that `spec` stands for.

    Raises:
        ConfigError: it is not in this process.
    """
    if (setting, spec) not in _handed:
        raise ConfigError(f"{setting}: {spec} was an object of a Python program; give it to mlxft.train again")
    return _handed[setting, spec]


_trusted: set[str] = set()  # import paths that the user's own recipe or command has named
_foreign: dict[str, tuple[Any, Any]] = {}  # import path -> what `_stamp` gave for it, and the class


def _stamp(name: str) -> Any:
    """Return what changes when an objective's file, or the object that was handed over, is another one."""
    path = name.rpartition(":")[0]
    if path == "python":
        return handed_over("objective", name)
    file = home_path(path).absolute()
    return (file, file.stat().st_mtime_ns) if path.endswith(".py") and file.is_file() else None


def _import_objective(name: str) -> Any:
    if name.startswith("python:"):
        return _checked_objective(name, handed_over("objective", name))
    return _checked_objective(name, named_by("objective", name, "class; expected a subclass of mlxft.Objective"))


def _checked_objective(name: str, found: Any) -> Any:
    attribute = name.rpartition(":")[2]
    base = importlib.import_module("mlxft.objectives.base").Objective
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"objective: {name}: {attribute} is not a subclass of mlxft.Objective")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"objective: {name}: {attribute} lacks {', '.join(missing)}")
    return found


def objective_sections(objective: str) -> dict[str, type[Settings]]:
    """Return the sections that an objective declares."""
    sections: dict[str, type[Settings]] = objective_class(objective).sections
    return sections


def default_lr(objective: str, method: str) -> float:
    """Return the default learning rate; the objective declares it for full fine-tuning.

    LoRA needs about 10 times as much, whatever the objective (Schulman et al. 2025, "LoRA Without Regret").
    """
    # A recipe with an unknown objective is refused later, together with its other problems.
    # One of the user's own is known once its sections were read; no Python is run for it here.
    full = 2e-5
    if objective in OBJECTIVES:
        full = objective_class(objective).learning_rate
    elif objective in _foreign:
        full = _foreign[objective][1].learning_rate
    return full if method == "full" else float(f"{10 * full:g}")  # 10 x 1e-6 is 9.999999999999999e-06


class OpenedConfig(Config):
    """The recipe in a run folder whose objective is Python, which is not run: its sections are kept as they are."""

    model_config = ConfigDict(extra="allow")


def config_class(objective: str, opened: bool = False) -> type[Config]:
    """Return Config with the sections that `objective` declares.

    Args:
        opened: the objective is what a run folder says, which may be someone else's: no Python of it is run.
    Raises:
        ConfigError: there is no such objective.
    """
    if opened and is_foreign(objective):
        return OpenedConfig
    sections = objective_sections(objective)
    if not sections:
        return Config
    fields: dict[str, Any] = {name: (kind, Field(default_factory=kind)) for name, kind in sections.items()}
    return create_model("Config", __base__=Config, **fields)


# --- Python that a recipe names ---------------------------------------------------------------------------------------


def run_file(setting: str, spec: str, file: Path) -> ModuleType:
    """Run a file as a module with a unique name, so that it meets no other module, and write no bytecode.

    While it runs, it can import modules beside it, as a script can.

    Args:
        setting, spec: what names it in the recipe, for messages.
    Raises:
        ConfigError: there is no such file, or it cannot be run.
    """
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.py")]) if file.parent.is_dir() else ""
        raise ConfigError(f"{setting}: {spec}: no such file {file}{near}; looked in {file.absolute().parent}")
    name = f"mlxft_file_{blake2b(str(file.absolute()).encode(), digest_size=6).hexdigest()}"
    loader = importlib.machinery.SourceFileLoader(name, str(file.absolute()))
    module_spec = importlib.util.spec_from_loader(name, loader)
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickled things look their module up by its name.
    before = sys.modules.get(name)
    sys.modules[name] = module
    beside = str(file.absolute().parent)
    sys.path.append(beside)  # last: a file called json.py is nobody else's json
    try:
        exec(loader.source_to_code(loader.get_data(loader.path), loader.path), module.__dict__)
    except BaseException as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"{setting}: {spec}: {file} cannot be run: {error_of(error)}") from error
    finally:
        if beside in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(beside)]
    return module


def named_in(setting: str, spec: str, module: ModuleType, name: str, what: str) -> Any:
    """Return what can be called by `name` in a module that a recipe names.

    Args:
        what: what it should be, for messages: "function; expected ...".
    Raises:
        ConfigError: there is nothing of that name, or it cannot be called.
    """
    kind = what.partition(";")[0]
    there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        has = f"it has {', '.join(sorted(there))}" if there else f"it has no {kind}"
        raise ConfigError(f"{setting}: {spec}: no {kind} {name!r} in it{nearest(name, there)}; {has}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"{setting}: {spec}: {name} is {type(found).__name__}, not a {what}")
    return found


def named_by(setting: str, spec: str, what: str) -> Any:
    """Return what file.py:name or package.module:name stands for; `what` and errors are as for `named_in`."""
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        module = run_file(setting, spec, home_path(path))
    else:
        sys.path.append(os.getcwd())  # as `python -m` does
        try:
            module = importlib.import_module(path)
        except Exception as error:  # whatever a module raises when it is run
            raise ConfigError(f"{setting}: {spec}: {path} cannot be imported: {error_of(error)}") from error
        finally:
            sys.path.pop()
    return named_in(setting, spec, module, name, what)


def error_of(error: BaseException) -> str:
    """Return an error's kind, words, and the line of the user's file where it happened."""
    words = " ".join(str(error).split())[:300]
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_globals.get("__name__", "").startswith("mlxft_file_"):
            line = at.tb_lineno
        at = at.tb_next
    return type(error).__name__ + (f": {words}" if words else "") + (f" (line {line})" if line else "")


# --- explain ----------------------------------------------------------------------------------------------------------
# Explain what is wrong with a recipe: one line per problem, with the value seen and the nearest right name.


def all_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all settings below `kind`."""
    names: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += all_keys(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def explain(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """Return one line per problem; the branches of a union count as one problem."""
    problems: dict[str, list[tuple[str, Any]]] = {}
    for e in error.errors():
        location = _location(e["loc"], kind)
        if e["type"] == "extra_forbidden":
            text = "no such setting" + nearest_key(location, kind, e["input"])
            problems.setdefault(location, []).append((text, None))
        elif e["type"] == "missing":
            for needed in _needed(location, kind):
                problems.setdefault(needed, []).append(("is needed" + _help(needed, kind), None))
        elif e["type"] == "string_pattern_mismatch":
            problems.setdefault(location, []).append(("does not fit" + _help(location, kind), (e["input"],)))
        elif e["type"] in ("model_type", "model_attributes_type"):
            text = f"is a section; expected settings below it, for example {_first_keys(location, kind)}"
            problems.setdefault(location, []).append((text, (e["input"],)))
        elif e["type"] == "value_error":
            problems.setdefault(location, []).append((str(e["ctx"]["error"]), None))
        elif e["type"] == "literal_error" and isinstance(e["input"], str):
            text = f"expected {e['ctx']['expected']}" + nearest(e["input"], e["ctx"]["expected"].split("'"))
            problems.setdefault(location, []).append((text, (e["input"],)))
        else:
            problems.setdefault(location, []).append((e["msg"][0].lower() + e["msg"][1:], (e["input"],)))
    lines = []
    for location, found in problems.items():
        texts = list(dict.fromkeys(text for text, _ in found))
        seen = f"; seen {found[0][1][0]!r}" if found[0][1] is not None else ""
        location, seen = shorten(location), shorten(seen)
        lines.append(f"{location}: {' or '.join(texts)}{seen}" if location else " or ".join(texts))
    return lines


def _location(loc: tuple[int | str, ...], kind: type[BaseModel]) -> str:
    """Return the dotted name of a pydantic location, without the names of union branches."""
    parts: list[str] = []
    at: Any = kind
    for part in loc:
        if at is None:
            break
        parts.append(str(part))
        if isinstance(at, type) and issubclass(at, BaseModel):
            names = {f.alias or name: f for name, f in at.model_fields.items()}
            at = _section(names[str(part)].annotation) if str(part) in names else None
        else:  # a key or a number within dict[str, Section] or list[Section]
            at = get_args(at)[-1]
    return ".".join(parts)


def _section(annotation: Any) -> Any:
    """Return the annotation if it is a section, or a list or mapping of sections; else None."""
    inner = get_args(annotation)[-1] if get_origin(annotation) in (list, dict) else annotation
    return annotation if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def nearest_key(location: str, kind: type[BaseModel], value: Any = None) -> str:
    """Return the right name: another tool's setting in our words, or the nearest in the section, else anywhere."""
    keys = all_keys(kind)
    section, _, leaf = location.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    siblings |= {k: k for k in kind.model_fields if not section}
    elsewhere = [k for k in keys if k.rpartition(".")[2] == leaf]
    owners = [] if section else [name for name in objectives() if leaf in objective_sections(name)]
    if owners:
        return f" for this objective; it belongs to {' and '.join(owners)}"
    inner = _inner(location, kind)
    if inner is not None:
        return nearest(leaf, [f.alias or name for name, f in inner.model_fields.items()])
    from mlxft.foreign import explain_setting

    # Axolotl's `adapter: qlora` and mlx_lm's `train: true` are not ours of that name.
    theirs = not elsewhere or value is True or value in ("lora", "qlora", "dora") or leaf == "template"
    section_near = nearest(location, kind.model_fields) if isinstance(value, Mapping) else ""
    if theirs and not section_near and (said := explain_setting(location, value, keys)):
        return said
    # Compare leaves with leaves: the section's name would make all of its settings look alike.
    close = nearest(leaf, siblings).removeprefix(" (did you mean ").removesuffix("?)")
    found = elsewhere or ([siblings[close]] if close else [])
    return f" (did you mean {' or '.join(found)}?)" if found else nearest(location, keys)


def _inner(location: str, kind: type[BaseModel]) -> type[BaseModel] | None:
    """Return the section that a setting belongs to, if it is in a list or mapping of sections; else None."""
    at: Any = kind
    for name in location.split("."):
        field = at.model_fields.get(name)
        at = _section(field.annotation) if field else None
        if get_origin(at) in (list, dict):
            found: type[BaseModel] = get_args(at)[-1]
            return found
        if at is None:
            return None
    return None


def _needed(location: str, kind: type[BaseModel]) -> list[str]:
    """Return the name of a missing setting; for a missing section, the names of its required settings."""
    field = kind.model_fields.get(location)
    below = field.annotation if field else None
    if not (isinstance(below, type) and issubclass(below, BaseModel)):
        return [location]
    return [f"{location}.{name}" for name, inner in below.model_fields.items() if inner.is_required()]


def _first_keys(location: str, kind: type[BaseModel]) -> str:
    inner = _inner(location, kind)
    if inner is not None:
        return ", ".join([f.alias or name for name, f in inner.model_fields.items()][:3])
    return ", ".join([k for k in all_keys(kind) if k.startswith(f"{location}.")][:3])


def _help(location: str, kind: type[BaseModel]) -> str:
    at: Any = _inner(location, kind) or kind
    for part in location.split(".") if at is kind else location.split(".")[-1:]:
        field = at.model_fields.get(part)
        if field is None:
            return ""
        description, at = field.description, field.annotation
    return f": {description}" if description else ""


# --- recipe -----------------------------------------------------------------------------------------------------------
# Read a recipe from YAML and KEY=VALUE overrides into a validated Config, and write it as YAML for the run folder.

_MOST = 20_000  # values in a recipe, a thousand times the usual number
_DEEPEST = 100
_LONGEST = 3000  # bytes of a path; the system allows 4096, including what is below it
# Pairs of settings that exclude each other.
PAIRS = (("run.steps", "run.epochs"), ("batch.tokens", "batch.rows"), ("tune.scale", "tune.alpha"))


class _Loader(yaml.SafeLoader):
    """Load safe YAML 1.2. A key given twice is an error, because the first would be ignored silently."""


class _Dumper(yaml.SafeDumper):
    """Dump YAML, with quotes around strings that YAML 1.1 or 1.2 would read as another type."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _str(loader: _Loader, node: yaml.ScalarNode) -> str:
    # JSON, a subset of YAML 1.2, writes characters beyond 16 bits as two escapes.
    return str(loader.construct_scalar(node)).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:str", _str)
# YAML 1.1, which PyYAML reads, has octals in 010, minutes in 1:30, booleans in yes, no, on and off, and dates.
_OTHERS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if tag not in _OTHERS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _form, _first in (  # section 10.3.2 of YAML 1.2.2
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_form})$"), list(_first))


def read_yaml(text: str | bytes, origin: str, kind: Any = _Loader) -> Any:
    """Parse YAML 1.2.

    Args:
        kind: another loader, where YAML 1.1 is enough and speed matters.
    Raises:
        ConfigError: the syntax is wrong, a key is given twice, or aliases expand to too many values.
    """
    try:
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size, depth = _extent(node, {})
        if size > _MOST or depth > _DEEPEST:
            seen = f"more than {_MOST:,} values, aliases expanded" if size > _MOST else "values nested too deep"
            seen = "an alias contains itself" if size == math.inf else seen
            raise ConfigError(f"{origin}: {seen}; a recipe has a few dozen values, nested at most {_DEEPEST} deep")
        return loader.construct_document(node)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{origin}{place}: not valid YAML: {getattr(e, 'problem', None) or ' '.join(str(e).split())}"
        ) from e
    except ConfigError:
        raise
    except (ValueError, TypeError, RecursionError) as e:  # a number of 5,000 digits, or endless brackets
        raise ConfigError(f"{origin}: not valid YAML: {e}") from e


def _extent(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Return the number of values in a node and its depth, aliases expanded; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf, math.inf
        parts = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        below = [_extent(n, known) for n in parts] if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(n for n, _ in below), 1 + max((deep for _, deep in below), default=0)
    return known[id(node)]


def override(key: str, value: object) -> str:
    """Return KEY=VALUE for a string or path, quoted so that YAML reads it as a string."""
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def function_override(function: Any) -> str:
    """Return KEY=VALUE for `rewards.function`, which may be a mapping."""
    return f"rewards.function={function if isinstance(function, str) else json.dumps(function)}"


def _override(raw: dict[str, Any], text: str, chosen: set[str]) -> None:
    """Set one KEY=VALUE in `raw`; `chosen` holds the keys of all overrides."""
    key, eq, value = text.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"override {shorten(text)!r}: expected KEY=VALUE, for example tune.rank=16")
    value = json.dumps(value) if value.startswith("*") else value  # a pattern of files, not an alias of YAML
    put(raw, key.strip(), read_yaml(value, f"override {shorten(key)}"), chosen, f"override {shorten(text)!r}")


def put(raw: dict[str, Any], key: str, value: Any, chosen: set[str], origin: str) -> None:
    """Set a dotted `key` in `raw`; `chosen` holds all keys that are being set.

    Raises:
        ConfigError: a parent of the key is a value, not a section.
    """
    *sections, leaf = key.split(".")
    if len(sections) > _DEEPEST // 2:
        raise ConfigError(f"{origin}: the key has {len(sections) + 1:,} parts; no setting has that many")
    at = raw
    for name in sections:
        below = at.setdefault(name, {})
        if isinstance(below, str | list) and name in TEXTS:
            below = at[name] = {TEXTS[name]: below}
        if below is None:
            below = at[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{origin}: {shorten(name)} is a value, not a section")
        at = below
    at[leaf] = value
    # `run.epochs=3` on the command line replaces the recipe's `run.steps`, and so on.
    for pair in PAIRS:
        if key in pair and at[leaf] is not None:
            other = pair[1 - pair.index(key)]
            if other not in chosen:  # both on the command line are an error, as both in a recipe are
                at.pop(other.rpartition(".")[2], None)


def override_all(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Apply all overrides, and return the problems."""
    problems = []
    chosen = {text.partition("=")[0] for text in overrides}
    for text in overrides:
        try:
            _override(raw, text, chosen)
        except ConfigError as e:
            problems.append(str(e))
    return problems


def parse_config(raw: Any, origin: str = "config", name: str | None = None, opened: bool = False) -> Config:
    """Validate a mapping; report all problems at once, with the value seen and the nearest right name.

    Args:
        raw: the parsed YAML with overrides applied.
        origin: the file to name in errors.
        name: the run's name if the recipe gives none.
        opened: see `config_class`.
    Raises:
        ConfigError: every problem, one per line.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: expected a mapping of settings, found {type(raw).__name__}")
    config = _validate(raw, origin, opened)
    _check_paths(config, origin)
    run = {"name": config.run.name or name or config.objective, "dir": home_path(config.run.dir)}
    model = {k: full_path(v) for k, v in (("path", config.model.path), ("adapter", config.model.adapter))}
    template = config.model.chat_template
    model["chat_template"] = None if template is None else Path(full_path(template))
    data = {k: full_source(v) for k, v in (("train", config.data.train), ("valid", config.data.valid))}
    data["mix"] = {name: full_source(source) for name, source in config.data.mix.items()}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=run),
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update=data),
        }
    )


def _validate(raw: dict[Any, Any], origin: str, opened: bool) -> Config:
    """Return a Config, or raise one ConfigError with every problem."""
    try:
        objective = str("sft" if raw.get("objective") is None else raw["objective"])
        if not opened:
            _trusted.add(objective)
        kind = config_class(objective, opened)
    except ConfigError as e:
        # Report the other problems too; those of the objective's own sections cannot be known.
        known = {k: v for k, v in raw.items() if k in Config.model_fields and k != "objective"}
        problems = [f"{origin}: {e}"]
        try:
            validated(Config, known, origin)
        except ConfigError as more:
            problems.append(str(more))
        raise ConfigError("\n".join(problems)) from e
    return validated(kind, raw, origin)


def validated(kind: type[S], raw: Mapping[Any, Any], origin: str) -> S:
    """Validate a mapping as settings of the class `kind`.

    Args:
        origin: the file to name in errors.
    Raises:
        ConfigError: every problem, one per line.
    """
    if half := half_character(raw):
        raise ConfigError(f"{origin}: {half}")
    # `tune:` with nothing below it is an empty section.
    raw = {k: v for k, v in raw.items() if v is not None or k not in kind.model_fields}
    problems: dict[str, None] = {}
    while True:
        try:
            found = kind.model_validate(raw)
            break
        except ValidationError as e:
            problems |= dict.fromkeys(explain(e, kind))
            unknown = [error["loc"] for error in e.errors() if error["type"] == "extra_forbidden"]
            if not unknown:
                break
            # Pydantic runs a section's own validator only if all keys are known: validate again without the others.
            raw = copy.deepcopy(raw)
            for *place, leaf in unknown:
                at: Any = raw
                for name in place:
                    at = at[name]
                del at[leaf]
    if problems:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in problems))
    return found


def full_path(value: Any) -> Any:
    """Return the full path of an existing file or folder, so that a run works from another folder; else `value`."""
    path = home_path(value) if isinstance(value, (str, Path)) else None
    try:
        return str(path.resolve()) if path is not None and path.exists() else value
    except (OSError, ValueError):  # too long for a path
        return value


def full_source(value: Any) -> Any:
    """Return the full path of rows: of files and folders, each in a list, patterns, and parts such as a sheet."""
    if isinstance(value, list):
        return [full_source(each) for each in value]
    if isinstance(value, SourceSettings):
        return value.model_copy(update={"path": full_source(value.path)})
    if not isinstance(value, str) or value.startswith(("hf:", "python:")):
        return value
    path, _, part = value.rpartition(":")
    if (found := full_path(value)) == value and path and (whole := full_path(path)) != path:
        return f"{whole}:{part}"
    pattern = found == value and any(sign in value for sign in "*?[")
    return str(home_path(value).absolute()) if pattern else found


def _check_paths(config: Config, origin: str) -> None:
    """Raise a ConfigError for a path that is longer than any file system allows."""
    named = {"model": "path adapter chat_template", "data": "train", "run": "dir", "rewards": "adapter function"}
    named["distill"] = "teacher cache"
    named["environment"] = "path"
    paths: dict[str, Any] = {
        f"{section}.{name}": getattr(getattr(config, section, None), name, None)
        for section, names in named.items()
        for name in names.split()
    }
    paths |= {f"data.mix.{name}.path": source.path for name, source in config.data.mix.items()}
    paths |= {"data.valid": source.path} if (source := config.data.held_out) else {}
    wrong = [
        f"{origin}: {name}: the path is too long (at most {_LONGEST} bytes, 255 per name): {shorten(str(path))}"
        for name, given in paths.items()
        for path in (given if isinstance(given, Mapping | list) else [given])
        if isinstance(path, str | Path)
        and (len(os.fsencode(path)) > _LONGEST or any(len(os.fsencode(p)) > 255 for p in Path(path).parts))
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[Any, Any], list[str]]:
    """Return the settings of a recipe with overrides applied, and the problems of the overrides.

    Raises:
        ConfigError: the file is missing, or is not valid YAML or not a mapping.
    """
    raw = _read_recipe(path)
    return raw, _settle(raw, overrides, "versions" in raw)


def read_settings(path: Path, kind: type[S], example: str) -> S:
    """Read settings of another class than Config from a YAML file.

    Args:
        example: sentence that points to an example, for users who give a recipe instead.
    Raises:
        ConfigError: the file is missing or not valid YAML, or a setting is wrong; all problems at once.
    """
    raw = _read_mapping(path)
    if {"objective", "data", "tune"} & raw.keys():
        raise ConfigError(f"{path}: this is a recipe for mlxft train; {example}")
    return validated(kind, raw, str(path))


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        text = read_small(path)
    except (OSError, ValueError) as e:
        ours = not path.exists() and (Path(__file__).parent / "configs" / f"{path.stem}.yaml").is_file()
        copy = f"; mlxft recipes copy {path.stem} writes it" if ours else ""
        raise ConfigError(f"{path}: cannot read the recipe: {getattr(e, 'strerror', None) or e}{copy}") from e
    raw = read_yaml(text, str(path))
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw or {}


def _read_recipe(path: Path) -> dict[Any, Any]:
    """Read a recipe's mapping; raise ConfigError for another tool's configuration."""
    raw = _read_mapping(path)
    if "versions" not in raw:
        from mlxft.foreign import tool_of

        if tool := tool_of(raw):
            raise ConfigError(
                f"{path}: this is a configuration of {tool}, not a recipe of mlxft; to make one of it: mlxft init "
                f"--from {shlex.quote(str(path))}"
            )
    return raw


def _name_of(raw: Mapping[str, Any]) -> str | None:
    """Return the name of a run without a recipe: its objective and its data's name."""
    data = raw.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    stem = re.sub(r"[^\w.-]+", "-", Path(train.partition("[")[0]).stem).strip(".-") if isinstance(train, str) else ""
    objective = str(raw.get("objective") or "sft")
    return f"{objective}-{stem}"[:100] if stem and objective.isidentifier() else None


_NAMES_PYTHON = "the run folder names Python code to run, and may come from someone else; read the code and add "
_OR_RECIPE = ", or resume with your own recipe: mlxft train RECIPE --resume"


def _chooses(overrides: Sequence[str], key: str) -> bool:
    return any(text.partition("=")[0].strip() == key for text in overrides)


def _settle(raw: dict[Any, Any], overrides: Sequence[str], of_run: bool, looked_at: bool = False) -> list[str]:
    """Apply overrides to settings, and return the problems; drop what a run folder may not decide for the user."""
    model, rewards = raw.get("model"), raw.get("rewards")
    if of_run and isinstance(model, dict):
        model.pop("trust_remote_code", None)
    named = rewards.pop("function", None) if of_run and not looked_at and isinstance(rewards, dict) else None
    met = raw.get("environment")
    met = met.get("path") if isinstance(met, dict) else met
    data = raw.get("data")
    if of_run and isinstance(data, dict) and "invalid" in data:  # as earlier versions have called it
        data["bad_rows"] = data.pop("invalid")
    problems = override_all(raw, overrides)
    chosen = any(_chooses(overrides, key) for key in ("environment", "environment.path"))
    if of_run and not looked_at and ":" in str(met) and not chosen:
        given = shlex.quote(override("environment.path", met))
        problems.append(f"environment.path: {_NAMES_PYTHON}{given}{_OR_RECIPE}")
    if of_run and not looked_at and is_foreign(str(raw.get("objective"))) and not _chooses(overrides, "objective"):
        given = shlex.quote(override("objective", raw["objective"]))
        problems.append(f"objective: {_NAMES_PYTHON}{given}{_OR_RECIPE}")
    if named is not None and "function" not in raw["rewards"]:
        raw["rewards"]["function"] = named
        given = shlex.quote(function_override(named))
        problems.append(f"rewards.function: {_NAMES_PYTHON}{given}{_OR_RECIPE}")
    return problems


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    of_run: bool = False,
    looked_at: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Config:
    """Read a recipe and apply `KEY=VALUE` overrides, which are the whole recipe if there is no file.

    Args:
        of_run: the file is from a run folder, which may be someone else's: overrides, not the file, decide whether a
            model's code is trusted and which Python code computes rewards. A file with `versions` counts as one, too.
        looked_at: the file is from a run folder and nothing is trained from it, so the reward function that it names
            needs no override.
        given: setting -> value that a program sets; objects that it hands over are among them.
    Raises:
        ConfigError: the file is missing or not valid YAML, or a setting is wrong; all problems at once.
    """
    raw = _read_recipe(path) if path is not None else {}
    for key, value in (given or {}).items():
        put(raw, key, value, set(given or ()), key)
    theirs = of_run or looked_at or "versions" in raw
    problems = _settle(raw, overrides, theirs, looked_at)
    opened = theirs and not _chooses(overrides, "objective") and "objective" not in (given or {})
    try:
        origin, name = ("settings", _name_of(raw)) if path is None else (str(path), path.stem.lstrip("."))
        config = parse_config(raw, origin, name, opened)
    except ConfigError as e:
        problems.append(str(e))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def dump_config(config: Config, versions: dict[str, str]) -> str:
    """Return the full resolved configuration as YAML, with the versions of the packages."""
    resolved = config.model_dump(mode="json", exclude={"versions", "sweep"})
    # Leave out settings that do not apply: reading them again would be an error.
    if config.model.adapter is not None:  # the adapter has its own rank, targets and so on
        resolved["tune"] = {k: v for k, v in resolved["tune"].items() if k in config.tune.model_fields_set}
    elif config.tune.method == "full":
        kept = {"method", "layers", "train", "freeze", "neftune", "router_aux"}
        resolved["tune"] = {k: v for k, v in resolved["tune"].items() if k in kept}
    return dump_yaml(resolved | {"versions": versions})


def dump_yaml(value: Any) -> str:
    """Return YAML that `read_yaml` reads back unchanged."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to a dict from dotted name to value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


# --- schema -----------------------------------------------------------------------------------------------------------

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of a recipe, for every objective.

    An objective's own sections are allowed for it only, with its own defaults; unknown settings are not allowed.
    """
    root = Config.model_json_schema()
    defs: Schema = root["$defs"]
    required = set(root["required"])
    rules = []
    names = objectives()
    everyone = list(dict.fromkeys(s for name in names for s in objective_sections(name)))
    for name in names:
        own = objective_sections(name)
        sections: Schema = {}
        for section in everyone:
            if section not in own:
                sections[section] = False
                continue
            found = own[section].model_json_schema()
            defs |= found.pop("$defs", {})
            defs[f"{name}.{section}"] = _or_empty(found)
            sections[section] = {"$ref": f"#/$defs/{name}.{section}"}
        # A recipe without `objective` has the default one, whose condition must hold then.
        condition: Schema = {"properties": {"objective": {"const": name}}}
        if name != Config.model_fields["objective"].default:
            condition["required"] = ["objective"]
        rules.append({"if": condition, "then": {"properties": sections}})
    root["properties"]["objective"] |= {"anyOf": [{"enum": names}, {"pattern": ":"}]}  # or an import path
    root["properties"] |= {s: {"description": _used_by(s)} for s in everyone}
    root |= {"allOf": rules, "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mlxft recipe"}
    for section, place in root["properties"].items():
        if section not in required and "$ref" in place:
            _or_empty(defs[place["$ref"].rpartition("/")[2]])
    _switches(root)
    return root


def _or_empty(section: Schema) -> Schema:
    """Allow null for a section: `tune:` with nothing below it is an empty section."""
    kind = section["type"]
    section["type"] = [*(kind if isinstance(kind, list) else [kind]), "null"]
    return section


def _used_by(section: str) -> str:
    """Return the description of a section that only some objectives have."""
    kinds = {name: objective_sections(name)[section] for name in objectives() if section in objective_sections(name)}
    about = (next(iter(kinds.values())).__doc__ or "").strip().splitlines()[0]
    return f"{about} For objective {', '.join(kinds)}."


def _switches(node: Any) -> None:
    """Allow true and false where on and off are allowed: programs that write YAML 1.1 write them so."""
    if isinstance(node, dict):
        if {"on", "off"} <= set(node.get("enum", ())):
            node["enum"] = [*node["enum"], True, False]
            node.pop("type", None)
        for part in node.values():
            _switches(part)
    elif isinstance(node, list):
        for part in node:
            _switches(part)
