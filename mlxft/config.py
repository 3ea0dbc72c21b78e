"""Every setting, declared once: its type, default, bounds and help.

A recipe is YAML. Overrides (`tune.rank=16`) beat the recipe, the recipe beats the defaults, and the run folder's
config.yaml shows what won (recipe.py reads and writes them). An objective's own sections are declared in its own
class, which OBJECTIVES finds by the recipe's `objective`.
"""

from __future__ import annotations

import importlib
import re
from datetime import date as Date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model, model_validator

from mlxft.errors import ConfigError, nearest
from mlxft.search import Sweep
from mlxft.settings import Settings as Settings

S = TypeVar("S", bound=Settings)
# name -> module of mlxft.objectives, and the class in it
OBJECTIVES = {
    "grpo": "grpo:GRPO",
    "ppo": "ppo:PPO",
    "preference": "preference:Preference",
    "reinforce": "reinforce:Reinforce",
    "reward": "reward:Reward",
    "rloo": "rloo:RLOO",
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
    """Names of the objectives there are."""
    return list(OBJECTIVES)


def objective_class(name: str) -> Any:
    """The class of an objective, imported now: it needs mlx."""
    module, _, attribute = OBJECTIVES[name].partition(":")
    return getattr(importlib.import_module(f"mlxft.objectives.{module}"), attribute)


def objective_sections(objective: str) -> dict[str, type[Settings]]:
    """The sections that an objective declares."""
    sections: dict[str, type[Settings]] = objective_class(objective).sections
    return sections


def default_lr(objective: str, method: str) -> float:
    """The rate of a recipe that gives none, which the objective declares for full fine-tuning.

    A low-rank update wants some 10 times as much, whatever the objective (Schulman et al. 2025, "LoRA Without Regret").
    """
    # Where there is no such objective the recipe is refused, and what else is wrong with it is looked for.
    full: float = objective_class(objective).learning_rate if objective in OBJECTIVES else 2e-5
    return full if method == "full" else float(f"{10 * full:g}")  # 10 x 1e-6 is 9.999999999999999e-06


def config_class(objective: str) -> type[Config]:
    """Config with the sections that `objective` declares.

    Raises:
        ConfigError: there is no such objective.
    """
    if objective not in objectives():
        raise ConfigError(
            f"objective: no such objective {objective!r}{nearest(objective, objectives())}; "
            f"there are {', '.join(objectives())}"
        )
    sections = objective_sections(objective)
    if not sections:
        return Config
    fields: dict[str, Any] = {name: (kind, Field(default_factory=kind)) for name, kind in sections.items()}
    return create_model("Config", __base__=Config, **fields)
