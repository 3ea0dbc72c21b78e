"""Every shared setting, declared once; recipes read, overridden, explained when wrong, and described as a JSON schema.

A recipe is YAML. Overrides (`tune.rank=16`) beat the recipe, the recipe beats the defaults, and the run folder's
config.yaml shows what won. An objective declares its own sections in its class, which OBJECTIVES finds by the recipe's
`objective`.
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
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from mlxft.errors import ConfigError, half_character, nearest, shorten
from mlxft.text import home_path, read_small

# --- settings ---------------------------------------------------------------------------------------------------------
# What every section of a recipe is.


class Settings(BaseModel):
    """A section of a recipe: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _takes(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would take true for 1; in YAML 1.1, which other programs write, on and off are true and false.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {"on", "off"} <= set(get_args(kind)):
            return "on" if value else "off"
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"expected another value than {str(value).lower()}")
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, int) and abs(part) >= 2**63:
                raise ValueError(f"a number of {len(str(part))} digits; expected one below 2^63")
            if isinstance(part, str | Path) and "\0" in str(part):
                raise ValueError(f"holds the character NUL; seen {part!r:.60}")
        return value


# --- search -----------------------------------------------------------------------------------------------------------
# The `sweep:` section: which settings `mlxft sweep` varies, within what, and what it looks for.

UNITS = {"h": 3600, "m": 60, "s": 1}
LOWER_IS_BETTER = ("loss", "perplexity")
DEFAULT_TRIALS = 20


class Range(Settings):
    """What one setting may be: exactly one of these."""

    log: tuple[float, float] | None = Field(None, description="[low, high], evenly in the logarithm: learning rates.")
    float_: tuple[float, float] | None = Field(None, alias="float", description="[low, high], evenly.")
    int_: tuple[int, int] | None = Field(None, alias="int", description="[low, high], whole numbers, both included.")
    log_int: tuple[int, int] | None = Field(None, description="[low, high], whole numbers, evenly in the logarithm.")
    choice: list[Any] | None = Field(None, description="The values themselves.")

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        given = {k.rstrip("_"): v for k, v in self if v is not None}
        if len(given) != 1:
            seen = f"seen {', '.join(given)}" if given else "none is given"
            raise ValueError(f"give exactly one of log, float, int, log_int, choice; {seen}")
        ((kind, value),) = given.items()
        if kind == "choice":
            different = {json.dumps(v, sort_keys=True, default=str) for v in value}
            if len(different) < len(value):
                raise ValueError(f"choice names a value twice: {value}")
            if len(value) < 2:
                raise ValueError(f"a choice of {len(value)} leaves nothing to vary; give at least 2 values, or set it")
            return self
        low, high = value
        if not low < high:
            raise ValueError(f"the range {kind}: [{low:g}, {high:g}] is empty; give [low, high] with low below high")
        if kind.startswith("log") and low <= 0:
            raise ValueError(f"{kind}: [{low:g}, {high:g}] begins at {low:g}, which has no logarithm; begin above 0")
        return self

    @property
    def kind(self) -> str:
        """Which one it is: log, float, int, log_int or choice."""
        return next(k.rstrip("_") for k, v in self if v is not None)

    @property
    def value(self) -> Any:
        """[low, high], or the choices."""
        return next(v for _, v in self if v is not None)


class Sweep(Settings):
    """What `mlxft sweep` varies and looks for; `mlxft train` takes no recipe that has it."""

    space: dict[str, Range] = Field(
        default_factory=dict,
        description="Setting -> its range, e.g. optim.lr: {log: [1e-5, 1e-3]}, tune.rank: {choice: [4, 16, 64]}.",
    )
    metric: str = Field(
        "loss", min_length=1, description="A number of validation (`eval` in metrics.jsonl), of the weights kept."
    )
    direction: Literal["minimize", "maximize"] | None = Field(
        None, description="What is better; loss and perplexity: minimize, others have to say."
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="Where trials lie: learnt from those before (TPE), at random, or every combination."
    )
    pruner: Literal["halving", "median", "none"] = Field(
        "halving",
        description="Trials stopped at a validation: those not among the better half of all that came so far (after "
        "1, 2, 4, 8 ... validations), or worse than the median of finished ones at the same point.",
    )
    grace: int = Field(1, ge=1, description="Validations each trial has before it may be stopped.")
    trials: int | None = Field(
        None, ge=1, le=10**6, description=f"Trials in all; default {DEFAULT_TRIALS}, with time: no limit."
    )
    time: str | None = Field(None, description="Longest time of one call, e.g. 2h, 30m, 1h30m.")

    @field_validator("time", mode="before")
    @classmethod
    def _is_time(cls, value: Any) -> Any:
        if value is not None:
            seconds(value)
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        given = self.model_fields_set
        if given and not self.space:
            raise ValueError("space is needed: the settings to vary, e.g. space: {optim.lr: {log: [1e-5, 1e-3]}}")
        if given and self.direction is None and not self.metric.endswith(LOWER_IS_BETTER):
            raise ValueError(f"direction is needed for metric {self.metric}: minimize or maximize")
        if self.pruner == "none" and "grace" in given:
            raise ValueError(f"grace ({self.grace}) is for a pruner; leave it out with pruner: none")
        if self.sampler == "grid":
            endless = [k for k, r in self.space.items() if r.kind in ("log", "float")]
            if endless:
                raise ValueError(f"grid has every combination of int and choice; {', '.join(endless)}: give a choice")
        return self

    @property
    def minimize(self) -> bool:
        """Whether less is better."""
        return self.direction != "maximize"


def seconds(text: Any) -> float:
    """Of a length of time such as 90s, 30m, 2h or 1h30m.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", str(text).strip())
    total = sum(float(v) * u for v, u in zip(found.groups(), UNITS.values()) if v) if found else 0.0
    if total <= 0:
        raise ValueError(f"{text!r} is no length of time; expected such as 2h, 30m, 1h30m or 90s")
    return total


# --- config -----------------------------------------------------------------------------------------------------------
# Every setting, declared once: its type, default, bounds and help.
#
# A recipe is YAML. Overrides (`tune.rank=16`) beat the recipe, the recipe beats the defaults, and the run folder's
# config.yaml shows what won (recipe.py reads and writes them). An objective's own sections are declared in its own
# class, which OBJECTIVES finds by the recipe's `objective`.

S = TypeVar("S", bound=Settings)
# name -> module of mlxft.objectives, and the class in it
OBJECTIVES = {
    "grpo": "grpo:GRPO",
    "ppo": "ppo:PPO",
    "preference": "preference:Preference",
    "reinforce": "grpo:Reinforce",
    "reward": "reward:Reward",
    "rloo": "grpo:RLOO",
    "sft": "sft:SFT",
}


class Model(Settings):
    """The weights to start from."""

    path: str = Field(description="Hub id, local folder, .gguf of the llama family, or smollm2-135m.", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights; auto: float32 on a CPU, the checkpoint's own on a GPU."
    )
    quantize: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        None, description="Quantise the frozen base at load to so many bits (4: QLoRA)."
    )
    group_size: Literal[32, 64, 128] | None = Field(
        None, description="Weights that share one scale when quantising; default 64."
    )
    adapter: str | None = Field(None, description="Adapter folder or run to start from.")
    chat_template: Path | None = Field(None, description="Jinja file to use in place of the tokenizer's chat template.")
    trust_remote_code: bool = Field(False, description="Allow code that a model repository brings along to run.")

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.group_size is not None and self.quantize is None:
            raise ValueError(f"group_size ({self.group_size}) is for quantising; give quantize too, or leave it out")
        return self


class Tune(Settings):
    """What is trained."""

    method: Literal["lora", "dora", "full"] = Field("lora", description="Low-rank update, DoRA, or the weights.")
    rank: int = Field(8, ge=1, le=2**16, description="Rank of the update; 8 to 64 is usual.")
    scale: float | None = Field(None, gt=0, description="Multiplier of the update; default alpha / rank.")
    alpha: float | None = Field(
        None, gt=0, description="The update is multiplied by alpha / rank (rsLoRA: alpha / sqrt(rank)); default 16."
    )
    rslora: bool = Field(False, description="Rank-stabilised scaling: alpha / sqrt(rank) (Kalajdzievski 2023).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update; only sft trains with it.")
    targets: str | list[str] = Field(
        "all-linear",
        description="all-linear, attention, mlp, or name patterns such as q_proj or layers.0.*, as one or a list. "
        "Routers of experts are adapted by name only.",
    )
    layers: Literal["all"] | int | list[int] = Field(
        "all", description="Layers with adapters (full: trained layers): all, the last N, or a list of indices."
    )
    train: list[str] = Field(
        default_factory=list,
        description="Name patterns of what is trained in full: beside the adapters, or (full) in place of everything.",
    )
    freeze: list[str] = Field(default_factory=list, description="Full: name patterns of what is not trained.")
    router_aux: float | None = Field(
        None,
        gt=0,
        description="Mixtures of experts: weight of a loss that keeps their load even, E sum f P of each router (Fedus "
        "et al. 2021), mean over layers, which is 1 at best; 0.001 to 0.01 is usual. Default: none.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Tune:
        given = self.model_fields_set
        if self.method == "full":
            low_rank = sorted({"rank", "scale", "alpha", "rslora", "dropout", "targets"} & given)
            if low_rank:
                raise ValueError(f"method full has no {', '.join(low_rank)}; leave out or use lora or dora")
        elif self.freeze:
            raise ValueError(
                f"freeze is for method full; with {self.method} the base is frozen (choose by targets and layers)"
            )
        if self.scale is not None and (self.alpha is not None or self.rslora):
            other = "alpha" if self.alpha is not None else "rslora"
            raise ValueError(f"give scale or {other}, not both (scale={self.scale:g})")
        if not self.targets:
            raise ValueError("targets is empty: nothing would be adapted; leave it out, or name patterns")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"layers must be all, a number of at least 1 (the last N), or a list; seen {self.layers}")
        return self

    @property
    def multiplier(self) -> float:
        """What the low-rank product is multiplied by."""
        if self.scale is not None:
            return self.scale
        alpha = 16.0 if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.rslora else self.rank))


class Data(Settings):
    """Rows, and which of their tokens are trained."""

    train: str = Field(description="File (jsonl, json, csv, parquet), folder, or hf:org/name[:config][:split].")
    valid: str | float | None = Field(
        None, description="The same for validation, or a share such as 0.05 split off; a folder's own is found."
    )
    format: Literal[
        "messages", "prompt-completion", "text", "sharegpt", "alpaca", "preference", "ratings", "unpaired", "prompts"
    ] = Field(description="How a row is read; named, never guessed (mlxft check suggests one).")
    fields: dict[str, str] = Field(
        default_factory=dict,
        description="Other names of the format's fields, e.g. {messages: dialog}; or texts with a row's fields in "
        "braces, e.g. {prompt: 'Review: {review}'}.",
    )
    shots: int | None = Field(
        None,
        ge=1,
        description="Train on so many rows only, drawn by run.seed: of each label, where the rows have labels. The "
        "label is the row's answer if there are at most 20 different ones and twice as many rows.",
    )
    label: str | None = Field(None, min_length=1, description="With shots: the rows' field that holds the label.")
    max_length: int = Field(2048, ge=2, le=2**22, description="Longest row in tokens.")
    overflow: Literal["error", "drop", "truncate", "split"] = Field(
        "error", description="What becomes of a longer row; split is for text."
    )
    invalid: Literal["error", "drop"] = Field(
        "error", description="What becomes of a row that cannot be read or does not fit; drop: left out, with a note."
    )
    train_on: Literal["assistant", "last", "completion", "all"] | None = Field(
        None,
        description="Every assistant turn, the last one, the completion, or every token; default assistant, text: all.",
    )
    template: Literal["auto", "none"] = Field(
        "auto", description="auto: prompts and completions go through the chat template if there is one; none: as text."
    )
    date: Date | None = Field(
        None,
        description="The day that a chat template writes, if it writes one, as 2026-11-26; default: the day on which "
        "the run begins, also when it is resumed later.",
    )
    cache: bool = Field(True, description="Keep encoded rows on the disk, so that the next start need not encode them.")

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if isinstance(self.valid, float) and not 0 < self.valid < 1:
            raise ValueError(f"valid as a share must lie between 0 and 1, seen {self.valid:g}")
        if self.format == "text" and self.train_on not in (None, "all"):
            raise ValueError(f"train_on: {self.train_on} is not for format text, of which every token is trained")
        if self.overflow == "split" and self.format != "text":
            raise ValueError(f"overflow: split is for format text, not {self.format}; use error, drop or truncate")
        if self.template == "none" and self.format in ("messages", "sharegpt", "alpaca"):
            raise ValueError(f"template: none is for format prompt-completion; {self.format} needs the chat template")
        if self.label is not None and self.shots is None:
            raise ValueError(f"label ({self.label}) is for shots of each label; give shots too, or leave it out")
        return self


class Batch(Settings):
    """How rows become steps."""

    tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Tokens a micro-batch, padding included; rows of like length share one. Default 2048; auto: as "
        "many as fit in memory, at most 65536: by the plan, corrected by measured steps (memory.measure) where a run "
        "or a range test begins.",
    )
    rows: int | None = Field(None, ge=1, description="Rows a micro-batch, in place of tokens.")
    accumulate: int = Field(1, ge=1, description="Micro-batches a step.")
    pack: bool = Field(
        False,
        description="Several rows in one sequence, each seeing only itself: little padding whatever their lengths. "
        "rows then counts sequences.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Batch:
        if self.tokens is not None and self.rows is not None:
            raise ValueError(f"give tokens or rows, not both (tokens={self.tokens}, rows={self.rows})")
        return self

    @property
    def budget(self) -> int:
        """`tokens`, or its default."""
        return 2048 if self.tokens is None else int(self.tokens)


class Group(Settings):
    """Parameters with a learning rate of their own."""

    match: str = Field(
        min_length=1,
        description="Pattern of parameters' names, as in tune.targets (layers.0, embed_tokens, *norm*), or re: and a "
        "regular expression that is found in them.",
    )
    lr: float | None = Field(None, gt=0, description="Their highest learning rate; warm-up and schedule are the run's.")
    scale: float | None = Field(None, gt=0, description="Their rate as a multiple of optim.lr, in place of lr.")
    weight_decay: float | None = Field(None, ge=0, description="Their decoupled decay; default optim.weight_decay.")

    @model_validator(mode="after")
    def _consistent(self) -> Group:
        if self.lr is not None and self.scale is not None:
            raise ValueError(f"{self.match!r}: give lr or scale, not both (lr={self.lr:g}, scale={self.scale:g})")
        if self.lr is None and self.scale is None and self.weight_decay is None:
            raise ValueError(f"{self.match!r}: give lr, scale or weight_decay; without, it is no group of its own")
        try:
            re.compile(self.match[3:] if self.match.startswith("re:") else "")
        except re.error as e:
            raise ValueError(f"{self.match!r}: no regular expression: {e}") from e
        return self


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


class Optim(Settings):
    """The optimiser and its learning rate."""

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = Field(
        "adamw",
        description="Optimiser. muon: Muon for the matrices of the blocks and their low-rank factors, scaled so that "
        "lr means what it means for adamw (Liu et al. 2025); AdamW at the same lr for embeddings, output layer, heads, "
        "norms and biases.",
    )
    lr: float = Field(
        2e-4,
        gt=0,
        description="Highest learning rate. Default, for adamw: sft 2e-5, reward 1e-5, ppo 3e-6, any other objective "
        "1e-6; LoRA and DoRA take 10 times as much.",
        json_schema_extra=_without_default,  # it is that of one objective and method
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Course of the rate after warm-up.")
    warmup: int | float = Field(0.03, ge=0, description="Steps of linear warm-up; below 1: share of all steps.")
    min_lr: float = Field(0.0, ge=0, description="Rate at the end of a linear or cosine schedule.")
    weight_decay: float | None = Field(
        None, ge=0, description="Decoupled decay (sgd: added to the gradient); default 0.01 for adamw, else 0."
    )
    betas: tuple[float, float] | None = Field(None, description="adam, adamw: (0.9, 0.999); lion: (0.9, 0.99).")
    eps: float | None = Field(None, gt=0, description="adam, adamw: added to the denominator; default 1e-8.")
    momentum: float | None = Field(None, ge=0, lt=1, description="sgd: default 0; muon: default 0.95.")
    clip: float | None = Field(1.0, gt=0, description="Largest norm of the whole gradient; null: no clipping.")
    groups: list[Group] = Field(
        default_factory=list,
        description="Learning rates by parameters' names, as {match, lr or scale, weight_decay}; the first that "
        "matches counts.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Optim:
        takes = {
            "weight_decay": ("adamw", "sgd", "lion", "adafactor", "muon"),
            "betas": ("adamw", "adam", "lion"),
            "eps": ("adamw", "adam"),
            "momentum": ("sgd", "muon"),
        }
        wrong = [k for k, names in takes.items() if getattr(self, k) is not None and self.name not in names]
        if wrong:
            raise ValueError(f"{self.name} has no {', '.join(wrong)} (has: {', '.join(takes[wrong[0]])})")
        if self.betas is not None and not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must each be at least 0 and below 1, seen {list(self.betas)}")
        decayed = [g.match for g in self.groups if g.weight_decay is not None]
        if decayed and self.name not in takes["weight_decay"]:
            raise ValueError(f"groups: {self.name} has no weight_decay; leave it out of {', '.join(decayed)}")
        if "lr" in self.model_fields_set:
            self.check_min_lr()
        if self.min_lr and self.schedule == "constant":
            raise ValueError("min_lr is for the linear and cosine schedules; constant keeps lr")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup is a number of steps or a share below 1, seen {self.warmup:g}")
        return self

    def check_min_lr(self) -> None:
        """ValueError where `min_lr` is above `lr`."""
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) is above lr ({self.lr:g})")

    def with_default(self, lr: float) -> Optim:
        """With another rate where none is given, and it still counts as not given."""
        if "lr" in self.model_fields_set:
            return self
        found = self.model_copy()
        found.__dict__["lr"] = lr  # past model_copy's update, which would count it as given
        return found


class Run(Settings):
    """The run folder, its length and what is done on the way."""

    name: str | None = Field(
        None,
        pattern=r"^[^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$",
        description="Folder name, at most 200 bytes, no slash and no dot first; default: the recipe's file name.",
    )
    dir: Path = Field(Path("runs"), description="Where run folders stand.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything random.")
    steps: int | None = Field(None, ge=1, description="Optimiser updates.")
    epochs: float | None = Field(None, gt=0, le=1e6, description="Passes over the rows, in place of steps; default 1.")
    report_every: int = Field(10, ge=1, description="Steps between reports.")
    eval_every: int | None = Field(None, ge=1, description="Steps between validations; default: once an epoch.")
    eval_at_start: bool = Field(False, description="Validate once before the first step: the loss to compare with.")
    save_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    patience: int | None = Field(
        None, ge=1, description="Stop after so many validations without a better loss; default: never."
    )
    sample_prompts: list[str] = Field(default_factory=list, description="Prompts answered at each validation.")
    keep_awake: bool = Field(True, description="Keep a Mac from falling asleep while it trains.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile forward and backward for shapes of batches that come again, as packed ones do (batch.pack)"
        "; the first 16 of them. auto: where the measured step (memory.measure) is quicker so, never on a CPU; not of "
        "on-policy objectives, with dropout or with tune.router_aux.",
    )
    sample_tokens: int | None = Field(
        None, ge=1, description="Longest answer to a sample prompt, in tokens; default 64."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both (steps={self.steps}, epochs={self.epochs:g})")
        name = self.name or ""
        if len(name.encode("utf-8", "surrogatepass")) > 200:  # files beside it have a longer name
            raise ValueError(f"name is longer than 200 bytes: {name[:40]!r}...")
        if self.sample_tokens is not None and not self.sample_prompts:
            raise ValueError(f"sample_tokens ({self.sample_tokens}) has nothing to act on without sample_prompts")
        return self


class Memory(Settings):
    """What training may take, in GB (10^9 bytes)."""

    checkpoint: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Keep only each block's input and compute the rest again for the gradient; auto: where a step "
        "without it takes more than a third of the machine's memory, or than limit, by the plan or as measured.",
    )
    measure: bool = Field(
        True,
        description="Compute steps of the largest batch before training, throw their gradients away, and decide "
        "checkpoint: auto and batch.tokens: auto by what they take. Of on-policy objectives completions are made up, "
        "and sampling goes by the plan.",
    )
    limit: float | None = Field(
        None, gt=0, le=1e6, description="Refuse a plan above it; default: what the machine can give."
    )
    cache: float | None = Field(
        None, ge=0, le=1e6, description="Freed memory kept for reuse; default: as MLX does, up to the limit."
    )


class Report(Settings):
    """Trackers that a run is shown in, beside its own metrics.jsonl; each needs the extra of its name."""

    to: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = Field(
        default_factory=list,
        description="Trackers that are sent each number of metrics.jsonl; a failure there never stops training.",
    )
    project: str | None = Field(
        None, min_length=1, description="wandb, trackio: project; mlflow: experiment. Default mlxft."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Report:
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"to names a tracker twice: {', '.join(self.to)}")
        if self.project is not None and not {*self.to} - {"tensorboard"}:
            raise ValueError(f"project ({self.project}) is for wandb, trackio or mlflow; name one in report.to")
        return self


class Config(Settings):
    """A whole recipe. `section` gives an objective's own settings."""

    objective: str = Field("sft", description="What is optimised: the name of a file in mlxft/objectives.")
    model: Model
    tune: Tune = Field(default_factory=Tune)
    data: Data
    batch: Batch = Field(default_factory=Batch)
    optim: Optim = Field(default_factory=Optim)
    run: Run = Field(default_factory=Run)
    memory: Memory = Field(default_factory=Memory)
    report: Report = Field(default_factory=Report)
    sweep: Sweep = Field(default_factory=Sweep)
    versions: dict[str, str] | None = Field(None, description="Written into config.yaml; not read.")

    @model_validator(mode="after")
    def _default_lr(self) -> Config:
        optim = self.optim.with_default(default_lr(self.objective, self.tune.method))
        object.__setattr__(self, "optim", optim)  # settings are frozen once they are made
        try:
            optim.check_min_lr()
        except ValueError as e:
            raise ValueError(f"optim: {e}") from None
        return self

    def section(self, name: str, kind: type[S]) -> S:
        """The objective's own section `name`."""
        found = getattr(self, name)
        assert isinstance(found, kind), f"{name} is a {type(found).__name__}"
        return found

    @property
    def run_dir(self) -> Path:
        """The run folder."""
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
        ConfigError: there is none, its file cannot be run, or it is no objective. Python that only a run folder names
            is not run.
    """
    if name in OBJECTIVES:
        module, _, attribute = OBJECTIVES[name].partition(":")
        return getattr(importlib.import_module(f"mlxft.objectives.{module}"), attribute)
    if not is_foreign(name):
        raise ConfigError(
            f"objective: no such objective {name!r}{nearest(name, OBJECTIVES)}; there are {', '.join(OBJECTIVES)}; one "
            "of your own is file.py:Class or package.module:Class"
        )
    if name not in _trusted:
        raise ConfigError(f"objective: {name} is Python that a run folder names, and is not run")
    if name not in _foreign or name.startswith("python:"):
        _foreign[name] = _import_objective(name)
    return _foreign[name]


_handed: dict[str, Any] = {}  # what a program has handed over in place of a path, by the name that stands for it


def hand_over(name: str, value: Any) -> str:
    """Keep an object that a program gives in place of a path. Returns what stands for it in the recipe."""
    spec = f"python:{name}"
    _handed[spec] = value
    return spec


def handed_over(setting: str, spec: str) -> Any:
    """Return the object that `spec` stands for.

    Raises:
        ConfigError: it is not in this process.
    """
    if spec not in _handed:
        raise ConfigError(f"{setting}: {spec} was an object of a Python program; give it to mlxft.train again")
    return _handed[spec]


_trusted: set[str] = set()  # import paths that the user's own recipe or command has named
_foreign: dict[str, Any] = {}


def _import_objective(name: str) -> Any:
    path, _, attribute = name.rpartition(":")
    if path == "python":
        return _checked_objective(name, handed_over("objective", name))
    if path.endswith(".py"):
        module = run_file("objective", name, home_path(path))
    else:
        sys.path.append(os.getcwd())  # as `python -m` does
        try:
            module = importlib.import_module(path)
        except Exception as error:  # whatever a module raises when it is run
            raise ConfigError(f"objective: {name}: {path} cannot be imported: {error_of(error)}") from error
        finally:
            sys.path.pop()
    expected = "class; expected a subclass of mlxft.Objective"
    return _checked_objective(name, named_in("objective", name, module, attribute, expected))


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
    """Return the rate of a recipe that gives none, which the objective declares for full fine-tuning.

    A low-rank update wants some 10 times as much, whatever the objective (Schulman et al. 2025, "LoRA Without Regret").
    """
    # Where there is no such objective the recipe is refused, and what else is wrong with it is looked for.
    known = objective in OBJECTIVES or objective in _foreign
    full: float = objective_class(objective).learning_rate if known else 2e-5
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
    """Run a file as a module that nothing else can meet: of a name of its own, without bytecode left beside it.

    While it runs, what stands beside it can be imported, as by a script.

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
        raise ConfigError(f"{setting}: {spec}: {file} can not be run: {error_of(error)}") from error
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
# What is wrong with a recipe, in words: one line a problem, with the value seen and the nearest right name.


def all_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every setting below `kind`."""
    names: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += all_keys(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def explain(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One line a problem; the branches of a union become one problem."""
    problems: dict[str, list[tuple[str, Any]]] = {}
    for e in error.errors():
        location = _location(e["loc"], kind)
        if e["type"] == "extra_forbidden":
            text = "no such setting" + nearest_key(location, kind)
            problems.setdefault(location, []).append((text, None))
        elif e["type"] == "missing":
            for needed in _needed(location, kind):
                problems.setdefault(needed, []).append(("is needed" + _help(needed, kind), None))
        elif e["type"] == "string_pattern_mismatch":
            problems.setdefault(location, []).append(("does not fit" + _help(location, kind), (e["input"],)))
        elif e["type"] in ("model_type", "model_attributes_type"):
            text = f"is a section; expected settings below it, such as {_first_keys(location, kind)}"
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
    """The dotted setting of a pydantic location, without the names of union branches."""
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
    """The annotation if it is a section, or a list or mapping of sections; else None."""
    inner = get_args(annotation)[-1] if get_origin(annotation) in (list, dict) else annotation
    return annotation if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def nearest_key(location: str, kind: type[BaseModel]) -> str:
    """The nearest right name: within the section, then the same leaf in another section, then anywhere."""
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
    # The section's name would make all of its settings look alike: leaves are compared with leaves.
    close = nearest(leaf, siblings).removeprefix(" (did you mean ").removesuffix("?)")
    found = elsewhere or ([siblings[close]] if close else [])
    return f" (did you mean {' or '.join(found)}?)" if found else nearest(location, keys)


def _inner(location: str, kind: type[BaseModel]) -> type[BaseModel] | None:
    """The section of which a location within a list or mapping of sections is a setting."""
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
    """The missing setting; of a missing section, what must stand in it."""
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
# Recipes: YAML and KEY=VALUE overrides in, a validated Config out, and back to YAML for the run folder.

_MOST = 20_000  # values in a recipe: a thousand times what one has
_DEEPEST = 100
_LONGEST = 3000  # bytes of a path; 4096 with what stands below it
# Settings of which one excludes the other.
PAIRS = (("run.steps", "run.epochs"), ("batch.tokens", "batch.rows"), ("tune.scale", "tune.alpha"))


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.2, in which a key given twice is an error: the first would be ignored in silence."""


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else than a text."""


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
    # JSON, which YAML 1.2 holds, writes characters beyond 16 bits as two escapes.
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
        kind: the loader, where YAML 1.1 will do and speed counts.
    Raises:
        ConfigError: bad syntax, a key given twice, or aliases that make much of little; it names the line.
    """
    try:
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size, depth = _extent(node, {})
        if size > _MOST or depth > _DEEPEST:
            seen = f"more than {_MOST:,} values, aliases counted out" if size > _MOST else "values nested too deep"
            seen = "an alias holds itself" if size == math.inf else seen
            raise ConfigError(f"{origin}: {seen}; a recipe has some dozens, at most {_DEEPEST} deep")
        return loader.construct_document(node)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{origin}{place}: not valid YAML: {getattr(e, 'problem', None) or ' '.join(str(e).split())}"
        ) from e
    except ConfigError:
        raise
    except (ValueError, TypeError, RecursionError) as e:  # a number of 5,000 digits, or brackets without end
        raise ConfigError(f"{origin}: not valid YAML: {e}") from e


def _extent(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values a node is once each alias is what it stands for, and how deep; endless if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf, math.inf
        parts = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        below = [_extent(n, known) for n in parts] if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(n for n, _ in below), 1 + max((deep for _, deep in below), default=0)
    return known[id(node)]


def override(key: str, value: object) -> str:
    """KEY=VALUE for a text or path, whatever YAML would take it for."""
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def function_override(function: Any) -> str:
    """KEY=VALUE for a `rewards.function`, which may be a mapping."""
    return f"rewards.function={function if isinstance(function, str) else json.dumps(function)}"


def _override(raw: dict[str, Any], text: str, chosen: set[str]) -> None:
    """Put one KEY=VALUE into `raw`; `chosen` holds the keys of all overrides."""
    key, eq, value = text.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"override {shorten(text)!r}: expected KEY=VALUE, for example tune.rank=16")
    put(raw, key.strip(), read_yaml(value, f"override {shorten(key)}"), chosen, f"override {shorten(text)!r}")


def put(raw: dict[str, Any], key: str, value: Any, chosen: set[str], origin: str) -> None:
    """Set a dotted `key` in `raw`; `chosen` holds all keys that are being set.

    Raises:
        ConfigError: there is a value where a section would have to be.
    """
    *sections, leaf = key.split(".")
    if len(sections) > _DEEPEST // 2:
        raise ConfigError(f"{origin}: a key of {len(sections) + 1:,} parts; no setting has so many")
    at = raw
    for name in sections:
        below = at.setdefault(name, {})
        if below is None:
            below = at[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{origin}: {shorten(name)} is a value, not a section")
        at = below
    at[leaf] = value
    # `run.epochs=3` on the command line replaces the recipe's `run.steps`, and so on: the later choice wins.
    for pair in PAIRS:
        if key in pair and at[leaf] is not None:
            other = pair[1 - pair.index(key)]
            if other not in chosen:  # both on the command line exclude each other, as both in a recipe do
                at.pop(other.rpartition(".")[2], None)


def override_all(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Apply all KEY=VALUE overrides. Returns what is wrong with some."""
    problems = []
    chosen = {text.partition("=")[0] for text in overrides}
    for text in overrides:
        try:
            _override(raw, text, chosen)
        except ConfigError as e:
            problems.append(str(e))
    return problems


def parse_config(raw: Any, origin: str = "config", name: str | None = None, opened: bool = False) -> Config:
    """Validate a mapping; all errors are reported at once, with the value seen and the nearest right name.

    Args:
        raw: what the YAML held, overrides applied.
        origin: the file named in errors.
        name: the run's name where the recipe gives none.
        opened: see `config_class`.
    Raises:
        ConfigError: every problem, one a line.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: expected a mapping of settings, found {type(raw).__name__}")
    config = _validate(raw, origin, opened)
    _check_paths(config, origin)
    run = {"name": config.run.name or name or config.objective, "dir": home_path(config.run.dir)}
    model = {k: full_path(v) for k, v in (("path", config.model.path), ("adapter", config.model.adapter))}
    template = config.model.chat_template
    model["chat_template"] = None if template is None else Path(full_path(template))
    data = {k: full_path(v) for k, v in (("train", config.data.train), ("valid", config.data.valid))}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=run),
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update=data),
        }
    )


def _validate(raw: dict[Any, Any], origin: str, opened: bool) -> Config:
    """A Config, or every problem in one ConfigError."""
    try:
        objective = str("sft" if raw.get("objective") is None else raw["objective"])
        if not opened:
            _trusted.add(objective)
        kind = config_class(objective, opened)
    except ConfigError as e:
        # What else is wrong can still be said, but not of the objective's own sections.
        known = {k: v for k, v in raw.items() if k in Config.model_fields and k != "objective"}
        problems = [f"{origin}: {e}"]
        try:
            validated(Config, known, origin)
        except ConfigError as more:
            problems.append(str(more))
        raise ConfigError("\n".join(problems)) from e
    return validated(kind, raw, origin)


def validated(kind: type[S], raw: Mapping[Any, Any], origin: str) -> S:
    """A mapping as settings.

    Args:
        origin: the file named in errors.
    Raises:
        ConfigError: every problem, one a line.
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
            # A section's keys are held against each other only where all are known: look again without the others.
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
    """The full path of a file or folder that is there, so that a run stays usable from another folder; else `value`."""
    path = home_path(value) if isinstance(value, (str, Path)) else None
    try:
        return str(path.resolve()) if path is not None and path.exists() else value
    except (OSError, ValueError):  # too long for a path
        return value


def _check_paths(config: Config, origin: str) -> None:
    """ConfigError where a path is longer than any file system takes."""
    named = {"model": "path adapter chat_template", "data": "train valid", "run": "dir", "rewards": "adapter function"}
    paths: dict[str, Any] = {
        f"{section}.{name}": getattr(getattr(config, section, None), name, None)
        for section, names in named.items()
        for name in names.split()
    }
    wrong = [
        f"{origin}: {name}: longer than a path can be ({_LONGEST} bytes, 255 a name): {shorten(str(path))}"
        for name, given in paths.items()
        for path in (given if isinstance(given, Mapping) else [given])
        if isinstance(path, str | Path)
        and (len(os.fsencode(path)) > _LONGEST or any(len(os.fsencode(p)) > 255 for p in Path(path).parts))
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[Any, Any], list[str]]:
    """What a recipe says, overrides applied, and what is wrong with some of these.

    Raises:
        ConfigError: missing file, bad YAML, or no mapping.
    """
    raw = _read_mapping(path)
    return raw, _settle(raw, overrides, "versions" in raw)


def read_settings(path: Path, kind: type[S], example: str) -> S:
    """Settings of another kind than a Config from a YAML file.

    Args:
        example: where one can be seen, in words, for who gives a recipe instead.
    Raises:
        ConfigError: missing file, bad YAML, or any wrong setting, all reported at once.
    """
    raw = _read_mapping(path)
    if {"objective", "data", "tune"} & raw.keys():
        raise ConfigError(f"{path}: is a recipe of mlxft train; {example}")
    return validated(kind, raw, str(path))


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        text = read_small(path)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: can not read the recipe: {getattr(e, 'strerror', None) or e}") from e
    raw = read_yaml(text, str(path))
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw or {}


_NAMES_PYTHON = "the run folder names Python to be run, and may be someone else's; read it, and add "
_OR_RECIPE = ", or go on by your own recipe: mlxft train RECIPE --resume"


def _chooses(overrides: Sequence[str], key: str) -> bool:
    return any(text.partition("=")[0].strip() == key for text in overrides)


def _settle(raw: dict[Any, Any], overrides: Sequence[str], of_run: bool, looked_at: bool = False) -> list[str]:
    """Apply overrides to settings; those of a run decide nothing that only the user does. Returns the problems."""
    model, rewards = raw.get("model"), raw.get("rewards")
    if of_run and isinstance(model, dict):
        model.pop("trust_remote_code", None)
    named = rewards.pop("function", None) if of_run and not looked_at and isinstance(rewards, dict) else None
    problems = override_all(raw, overrides)
    if of_run and not looked_at and is_foreign(str(raw.get("objective"))) and not _chooses(overrides, "objective"):
        given = shlex.quote(override("objective", raw["objective"]))
        problems.append(f"objective: {_NAMES_PYTHON}{given}{_OR_RECIPE}")
    if named is not None and "function" not in raw["rewards"]:
        raw["rewards"]["function"] = named
        given = shlex.quote(function_override(named))
        problems.append(f"rewards.function: {_NAMES_PYTHON}{given}{_OR_RECIPE}")
    return problems


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    of_run: bool = False,
    looked_at: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Config:
    """Read a recipe and apply `KEY=VALUE` overrides.

    Args:
        of_run: the file is a run folder's, which may be someone else's: it decides neither that a model's code is
            trusted nor which Python gives rewards; overrides do. What a run wrote is known by its `versions`, too.
        looked_at: so, and nothing is trained by it: the rewards that it names are not asked for.
        given: key -> value of what a program sets, objects that it hands over among them.
    Raises:
        ConfigError: missing file, bad YAML, or any wrong setting, all reported at once.
    """
    raw = _read_mapping(path)
    for key, value in (given or {}).items():
        put(raw, key, value, set(given or ()), key)
    theirs = of_run or looked_at or "versions" in raw
    problems = _settle(raw, overrides, theirs, looked_at)
    opened = theirs and not _chooses(overrides, "objective") and "objective" not in (given or {})
    try:
        config = parse_config(raw, str(path), path.stem.lstrip("."), opened)
    except ConfigError as e:
        problems.append(str(e))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def dump_config(config: Config, versions: dict[str, str]) -> str:
    """The full resolved configuration as YAML, with the versions it ran under."""
    resolved = config.model_dump(mode="json", exclude={"versions", "sweep"})
    # Settings that do not apply would be refused when this is read again.
    if config.model.adapter is not None:  # it brings its own rank, targets and so on
        resolved["tune"] = {k: v for k, v in resolved["tune"].items() if k in config.tune.model_fields_set}
    elif config.tune.method == "full":
        kept = {"method", "layers", "train", "freeze", "router_aux"}
        resolved["tune"] = {k: v for k, v in resolved["tune"].items() if k in kept}
    return dump_yaml(resolved | {"versions": versions})


def dump_yaml(value: Any) -> str:
    """Write YAML that `read_yaml` reads as it was."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, of sections within sections."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


# --- schema -----------------------------------------------------------------------------------------------------------

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """The schema (draft 2020-12) of a recipe of any objective.

    An objective's own sections are there for it only, with its own defaults; unknown settings are refused.
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
        # Without objective a recipe is of the default one, for which the condition holds then.
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
    """`tune:` with nothing below it is an empty section."""
    section["type"] = [section["type"], "null"]
    return section


def _used_by(section: str) -> str:
    """What a section of some objectives is for."""
    kinds = {name: objective_sections(name)[section] for name in objectives() if section in objective_sections(name)}
    about = (next(iter(kinds.values())).__doc__ or "").strip().splitlines()[0]
    return f"{about} For objective {', '.join(kinds)}."


def _switches(node: Any) -> None:
    """Programs that write YAML 1.1 write on and off as true and false: both are right where on and off are."""
    if isinstance(node, dict):
        if {"on", "off"} <= set(node.get("enum", ())):
            node["enum"] = [*node["enum"], True, False]
            node.pop("type", None)
        for part in node.values():
            _switches(part)
    elif isinstance(node, list):
        for part in node:
            _switches(part)
