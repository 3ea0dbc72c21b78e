"""What a recipe names: its model, its objective with the data, and what of the model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxft.config import Config, objective_class
from mlxft.data.chat import set_day
from mlxft.errors import ConfigError
from mlxft.model.adapters import LoRASpec, load_adapter, prepare_adapter, prepare_full, select_targets
from mlxft.model.heads import find_head, head_of
from mlxft.model.load import Loaded, base_fingerprint
from mlxft.model.load import load as load_model
from mlxft.model.routers import watch_routers
from mlxft.objectives.base import Objective
from mlxft.rundir import find_adapter


def load_base(config: Config, *, lazy: bool = False, template: Path | None = None) -> Loaded:
    """The model that a recipe names, without adapters.

    Args:
        template: where the chat template is, in place of model.chat_template.
    """
    m = config.model
    return load_model(
        m.path,
        dtype=m.dtype,
        quantize=m.quantize,
        group_size=m.group_size,
        chat_template=template or m.chat_template,
        trust_remote_code=m.trust_remote_code,
        lazy=lazy,
    )


def make_objective(config: Config, tokenizer: Any) -> Objective:
    """The objective that a recipe names, with its data.

    Raises:
        ConfigError, DataError: settings or rows do not fit.
    """
    if config.data.date is not None:
        set_day(tokenizer, config.data.date)
    objective: Objective = objective_class(config.objective)(config, tokenizer)
    run = config.run
    needing = {"patience": run.patience is not None}
    if not run.sample_prompts:  # these are answered at each validation, with or without held-out rows
        needing |= {"eval_every": run.eval_every is not None, "eval_at_start": run.eval_at_start}
    if config.batch.pack and not objective.summary().packed:
        raise ConfigError(f"batch.pack: objective {config.objective} does not pack rows; leave it out")
    idle = [f"run.{name}" for name, given in needing.items() if given]
    if idle and not objective.summary().validates:
        raise ConfigError(f"{', '.join(idle)}: there is no validation data to use; give data.valid (0.05: a share)")
    return objective


def prepare(config: Config, loaded: Loaded) -> LoRASpec | None:
    """Make trainable what the recipe says. Returns the adapter's shape, None for whole weights."""
    tune, model = config.tune, loaded.model
    if tune.router_aux is not None:
        watch_routers(model, "tune.router_aux")
    if config.model.adapter is not None:
        return _continue_adapter(config, loaded)
    mx.random.seed(config.run.seed)
    if tune.method == "full":
        prepare_full(model, tune.layers, tune.train, tune.freeze)
        return None
    dora = tune.method == "dora"
    paths = select_targets(model, tune.targets, tune.layers, dora)
    spec = LoRASpec(tuple(paths), tune.rank, tune.multiplier, tune.dropout, dora)
    prepare_adapter(model, spec, tune.train)
    return spec


def _continue_adapter(config: Config, loaded: Loaded) -> LoRASpec:
    """Start from an adapter that there is; its shape is what it is."""
    assert config.model.adapter is not None
    folder = find_adapter(Path(config.model.adapter))
    spec = load_adapter(loaded.model, folder, base_fingerprint(loaded))
    if spec is None or config.tune.method == "full":
        raise ConfigError("model.adapter: only low-rank adapters can be trained further; fuse it and train the result")
    mine = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout, "method": "dora" if spec.dora else "lora"}
    given = config.tune.model_fields_set
    wrong = [k for k, v in mine.items() if k in given and getattr(config.tune, k) not in (None, v)]
    wrong += [k for k in ("targets", "layers", "alpha", "rslora", "train") if k in given]
    if wrong:
        raise ConfigError(
            f"model.adapter: {folder} has rank {spec.rank}, scale {spec.scale:g}, dropout {spec.dropout:g}, method "
            f"{mine['method']} and its own targets; leave out tune.{', tune.'.join(wrong)}"
        )
    mx.random.seed(config.run.seed)
    return spec


def check_head(config: Config, model: nn.Module) -> None:
    """ConfigError where a reward run is to be trained further by an objective that has no use for its head."""
    given = {"model.adapter": config.model.adapter, "model.path": config.model.path}
    found = [(setting, path) for setting, path in given.items() if find_head(path)]
    if found and head_of(model) is None:
        setting, path = found[0]
        raise ConfigError(
            f"{setting}: {path} is a reward model, which gives scores, and objective {config.objective} trains one "
            "that gives text; start from a policy, or from the base"
        )
