"""Models with open weights, and which of them fit into a machine's memory: `mlxft models`, and what `init` proposes.

catalogue.yaml is written by hand: names, licences, dates and shapes. catalogue.json follows from it by the memory plan
(benchmarks/catalogue.py writes it), because a plan takes seconds and the table has more than a hundred.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxft.build import base_skeleton, job_of
from mlxft.config import parse_config
from mlxft.data.dataset import cache_folder
from mlxft.device import Backend, backend, planning_for, usable_bytes
from mlxft.errors import ConfigError, MlxftError, ModelError, nearest
from mlxft.files import write_text
from mlxft.model.load import count_parameters, skeleton
from mlxft.model.memory import MAC_SHARE, plan
from mlxft.text import json_text, parse_json, read_small

Verdict = Literal["fits", "tight", "no"]
# Method -> the settings that make it. Defaults otherwise: rank 8 on every linear layer, AdamW.
FIT_METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"model": {"quantize": 4}},
    "dora": {"tune": {"method": "dora"}},
    "full": {"tune": {"method": "full"}},
}
PLANNED_TOKENS = 2048  # tokens of the one row that is planned for: the default of data.max_length
WITH_ROOM = 0.8  # share of the usable memory up to which a model fits with room for other programs
_BENCH = "bench.json"  # beside the encoded rows
_JOBS = {"lora": "sft-lora", "qlora": "sft-qlora"}  # jobs of `mlxft bench` that measure a method


class KnownModel(NamedTuple):
    """A model of the catalogue.

    Attributes:
        config: what its config.json says, as far as the architecture depends on it.
        parameters: of its language model.
        memory: kind of backend -> method -> bytes that training needs; None: the method does not work on it.
    """

    name: str
    family: str
    licence: str
    released: str
    config: dict[str, Any]
    parameters: int
    memory: dict[str, dict[str, int | None]]


class Fit(NamedTuple):
    """How a model fits, trained by one method on rows of up to 2,048 tokens, one at a time, with checkpointing."""

    model: KnownModel
    method: str
    needed: int | None
    verdict: Verdict
    tokens_per_s: float | None = None  # by this machine's bench, in proportion to the parameters


def _read(file: str) -> str:
    return (resources.files("mlxft.study") / file).read_text("utf-8")


def _described() -> tuple[str, list[KnownModel]]:
    """Return the date of the catalogue and its models, without what is computed."""
    found = yaml.safe_load(_read("catalogue.yaml"))
    models = []
    for family in found["families"]:
        for name, own in family["models"].items():
            shape = {**family["shape"], **own}
            released, nested = shape.pop("released", family["released"]), shape.pop("nested", family.get("nested"))
            config = (
                {"model_type": nested, "text_config": shape, "vocab_size": shape["vocab_size"]} if nested else shape
            )
            config["torch_dtype"] = "bfloat16"
            about = (name, family["family"], family["licence"], str(released), config)
            models.append(KnownModel(*about, 0, {}))
    return str(found["dated"]), models


@cache
def catalogue() -> tuple[str, list[KnownModel]]:
    """Return the date of the catalogue and its models, the smallest first."""
    dated, models = _described()
    known = parse_json(_read("catalogue.json"))
    whole = [model._replace(**known[model.name]) for model in models]
    return dated, sorted(whole, key=lambda model: model.parameters)


def compute_catalogue() -> dict[str, Any]:
    """Return what catalogue.json holds: name -> parameters and memory. It takes some minutes."""
    kinds: tuple[Backend, ...] = ("metal", "cpu")
    found = {}
    for model in _described()[1]:
        memory = {k: {method: needed_bytes(model.config, method, k) for method in FIT_METHODS} for k in kinds}
        found[model.name] = {"parameters": _parameters(model.config), "memory": memory}
    return found


def _parameters(config: Mapping[str, Any]) -> int:
    with _written(config) as folder:
        return count_parameters(skeleton(folder).model)


def _written(config: Mapping[str, Any]) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder with this config.json."""
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def needed_bytes(config: Mapping[str, Any], method: str, kind: Backend) -> int | None:
    """Return the peak of training on one row of `PLANNED_TOKENS` tokens; None if the method does not work.

    Args:
        config: config.json of the model; nothing else of it is read.
    """
    with _written(config) as folder, planning_for(kind):
        recipe = {"model": {"path": folder}, "data": {"train": "rows.jsonl", "format": "messages"}}
        for section, settings in FIT_METHODS[method].items():
            recipe[section] = {**recipe.get(section, {}), **settings}
        try:
            settled = parse_config(recipe)
            return plan(job_of(settled, base_skeleton(settled)), 1, PLANNED_TOKENS, checkpoint=True).needed
        except (ConfigError, ModelError):
            return None


def fitting(memory_gb: float | None = None, method: str = "lora", *, every: bool = False) -> list[Fit]:
    """Return the models that fit into memory when trained by a method, the largest first; tight ones after the others.

    Args:
        memory_gb: memory of a Mac (None: this machine).
        method: lora, qlora (a base of 4 bits), dora or full.
        every: also return the models that do not fit, and keep the catalogue's order, the smallest first.
    Raises:
        ConfigError: there is no such method, or the memory is not above 0.
    """
    if method not in FIT_METHODS:
        expected = ", ".join(FIT_METHODS)
        raise ConfigError(f"method {method!r}: expected one of {expected}{nearest(method, FIT_METHODS)}")
    if memory_gb is not None and not memory_gb > 0:
        raise ConfigError(f"memory is {memory_gb:g} GB; expected a number above 0")
    room = usable_bytes() if memory_gb is None else MAC_SHARE * memory_gb * 2**30
    kind = "cpu" if memory_gb is None and backend() == "cpu" else "metal"
    measured = _measured_rate(method) if memory_gb is None else None
    found = []
    for model in catalogue()[1]:
        needed = model.memory[kind][method]
        verdict: Verdict = "no" if needed is None or needed > room else "tight" if needed > WITH_ROOM * room else "fits"
        speed = None if measured is None or verdict == "no" else measured / model.parameters
        found.append(Fit(model, method, needed, verdict, speed))
    if every:
        return found
    return sorted((f for f in found if f.verdict != "no"), key=lambda f: (f.verdict, -f.model.parameters))


def fits_to_json(memory_gb: float | None = None) -> dict[str, Any]:
    """Return every model with how each method fits, as JSON."""
    rows: dict[str, dict[str, Any]] = {}
    for method in FIT_METHODS:
        for fit in fitting(memory_gb, method, every=True):
            name, family, licence, released, _, parameters, _ = fit.model
            about = {"model": name, "family": family, "licence": licence, "released": released}
            row = rows.setdefault(name, {**about, "parameters": parameters, "methods": {}})
            row["methods"][method] = {"verdict": fit.verdict, "needed_gb": fit.needed and fit.needed / 1e9}
            if fit.tokens_per_s is not None:
                row["methods"][method]["tokens_per_s"] = fit.tokens_per_s
    usable = usable_bytes() if memory_gb is None else MAC_SHARE * memory_gb * 2**30
    return {"dated": catalogue()[0], "usable_gb": usable / 1e9, "models": list(rows.values())}


_STYLES = {"fits": "green", "tight": "yellow", "no": "dim"}


def show_fits(console: Console, found: dict[str, Any], where: str) -> None:
    """Print what `fits_to_json` returns as a table; a narrow terminal gets fewer columns."""
    wide = console.width >= 120
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for column in ("model", "size", *(("licence", "released") if wide else ()), *FIT_METHODS):
        table.add_column(column, overflow="fold")
    for row in found["models"]:
        size = row["parameters"] / 1e9
        cells = [row["model"], f"{size:.2g}B" if size < 10 else f"{size:.0f}B"]
        cells += [row["licence"], row["released"]] if wide else []
        table.add_row(*cells, *(_cell(fit) for fit in row["methods"].values()))
    console.print(table)
    console.print(
        f"{where}: {found['usable_gb']:.1f} GB usable. Memory: one row of {PLANNED_TOKENS:,} tokens at a time, with "
        "gradient checkpointing. fits: a fifth of it is left for other programs; tight: less is left; no: too large.\n"
        f"The list is of {found['dated']}. A model that is not on it works, too, if mlx-lm has its architecture: "
        "mlxft check says what a recipe takes."
    )
    if any("tokens_per_s" in fit for row in found["models"] for fit in row["methods"].values()):
        console.print("tok/s: training, by the largest model that mlxft bench timed here, in proportion to the size.")


def _cell(fit: dict[str, Any]) -> Text:
    needed = "" if fit["needed_gb"] is None else f" {fit['needed_gb']:.1f} GB"
    speed = f", {fit['tokens_per_s']:,.0f} tok/s" if "tokens_per_s" in fit else ""
    return Text(f"{fit['verdict']}{needed}{speed}", _STYLES[fit["verdict"]])


# --- bench ------------------------------------------------------------------------------------------------------------
# `mlxft bench` keeps its latest figure of each job, so that `mlxft models` can say how fast this machine is.


def keep_bench(job: str, shape: str, parameters: int, tokens_per_s: float) -> None:
    """Keep the speed of a job; a home folder that cannot be written to is no obstacle."""
    if (folder := cache_folder()) is None:
        return
    about = {"device": backend(), "parameters": parameters, "tokens_per_s": tokens_per_s}
    with suppress(OSError, MlxftError):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _BENCH, json_text(_kept() | {f"{job} {shape}": about}, indent=2))


def _kept() -> dict[str, Any]:
    folder = cache_folder()
    try:
        return {} if folder is None else dict(parse_json(read_small(folder / _BENCH)))
    except (OSError, ValueError, TypeError):
        return {}


def _measured_rate(method: str) -> float | None:
    """Return tokens per second times parameters, of the largest model that bench has timed; None: none."""
    rates = [
        (job["parameters"], job["parameters"] * job["tokens_per_s"])
        for name, job in _kept().items()
        if name.split()[0] == _JOBS.get(method) and job["device"] == backend()
    ]
    return max(rates)[1] if rates else None
