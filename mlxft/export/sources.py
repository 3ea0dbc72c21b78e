"""What is to be fused: runs and adapter folders, each with a weight, and the base under them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxft.config import Config
from mlxft.errors import ConfigError, MlxftError, ModelError
from mlxft.model.adapters import load_adapter, load_base_of, read_adapter_config
from mlxft.model.heads import find_head, load_head
from mlxft.model.load import Loaded, base_fingerprint
from mlxft.model.logits import Split
from mlxft.model.merge import merge_adapters
from mlxft.rundir import find_adapter, open_run


@dataclass(frozen=True)
class Source:
    """An adapter's folder, the number its change is multiplied by, and the recipe of its run where that is known."""

    folder: Path
    weight: float = 1.0
    config: Config | None = None


def parse_adapter(text: str) -> tuple[Path, float]:
    """`runs/a:0.7` -> runs/a and 0.7; without a number the weight is 1.

    Raises:
        ConfigError: what stands behind the colon is no number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return Path(text).expanduser(), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not name:
        raise ConfigError(f"--adapter {text}: {number!r} is no weight; expected FOLDER or FOLDER:NUMBER, as in a:0.7")
    return Path(name).expanduser(), weight


def find_sources(run: Path | None, adapters: Sequence[tuple[Path, float]]) -> tuple[list[Source], str | None]:
    """The adapters to fuse, and the base where `run` names one in place of a run.

    Raises:
        ModelError: no such run or adapter, one that was trained whole, or adapters of several bases.
        ConfigError: one is named twice.
    """
    named = [(folder, weight) for folder, weight in adapters]
    base = None
    if run is not None:
        if not adapters or _is_source(run):
            named.insert(0, (run, 1.0))
        else:
            base = str(run)
    if not named:
        raise ConfigError("nothing to fuse: name a run, or adapters with --adapter")
    sources = [_source(path.expanduser(), weight) for path, weight in named]
    seen: dict[Path, Path] = {}
    for (path, _), source in zip(named, sources):
        if (real := source.folder.resolve()) in seen:
            raise ConfigError(
                f"--adapter: {path} is named twice; name it once, with the weight that it is to have (FOLDER:NUMBER)"
            )
        seen[real] = path
    _check_one_base(sources)
    return sources, base


def _is_source(path: Path) -> bool:
    path = path.expanduser()
    run = (path / "config.yaml").exists() and not (path / "config.json").exists()
    return run or (find_adapter(path) / "adapter_config.json").exists()


def _source(path: Path, weight: float) -> Source:
    if not path.exists():
        raise ModelError(f"{path}: no such run or adapter")
    folder = find_adapter(path)
    if not (folder / "adapter_config.json").exists():
        if (path / "model").is_dir():
            raise ModelError(f"{path}: was trained whole, there is no adapter to fuse; its model is {path / 'model'}")
        if (path / "config.yaml").exists() and not (path / "config.json").exists():
            open_run(path)  # which says what is wrong with a file that is no recipe
            raise ModelError(f"{path} has no result yet; go on with mlxft train --resume {path}")
        raise ModelError(
            f"{path}: is neither a run nor an adapter: there is nothing to fuse (mlxft convert copies a model)"
        )
    recipe = next((p / "config.yaml" for p in (path, folder.parent) if (p / "config.yaml").is_file()), None)
    try:
        config = open_run(recipe.parent).config if recipe else None
    except MlxftError:  # of another version: only its validation rows are missed
        config = None
    return Source(folder, weight, config)


def _check_one_base(sources: Sequence[Source]) -> None:
    bases = [read_adapter_config(source.folder).get("mlxft", {}).get("base", {}) for source in sources]
    known = [(s, b) for s, b in zip(sources, bases) if b.get("fingerprint")]
    for source, base in known[1:]:
        first, other = known[0]
        if base["fingerprint"] != other["fingerprint"]:
            raise ModelError(
                f"adapters of two bases can not be merged: {first.folder} is of {other.get('model')} "
                f"({other['fingerprint']}), {source.folder} of {base.get('model')} ({base['fingerprint']})"
            )
    if len(sources) > 1 and any(find_head(source.folder) for source in sources):
        heads = [str(source.folder) for source in sources if find_head(source.folder)]
        raise ModelError(f"{heads[0]} is a reward model, whose head can not be merged; fuse it alone")


def load_base(sources: Sequence[Source], model: str | None) -> Loaded:
    """The base that the first adapter says it was trained on, or `model`; a reward model's head is attached.

    Raises:
        ModelError: it is not there, or not what the adapters were trained on.
    """
    first = sources[0].folder
    loaded = load_base_of(model or first, first, {})
    fingerprint = base_fingerprint(loaded)
    for source in sources:
        about = read_adapter_config(source.folder).get("mlxft", {}).get("base", {})
        if about.get("fingerprint") not in (None, "", fingerprint):
            where = model or about.get("model")
            raise ModelError(
                f"{source.folder} was trained on another base: {about.get('model')} ({about['fingerprint']}), and "
                f"{where} is {fingerprint} now; name the one it was trained on with --model"
            )
    head = find_head(first)
    if head is not None:
        load_head(Split(loaded.model), head, fingerprint)
    loaded.model.eval()
    return loaded


def attach_sources(loaded: Loaded, sources: Sequence[Source]) -> None:
    """Put the adapters onto the base.

    Raises:
        ModelError: one does not fit.
    """
    fingerprint = base_fingerprint(loaded)
    if len(sources) == 1 and sources[0].weight == 1.0:
        load_adapter(loaded.model, sources[0].folder, fingerprint)
    else:
        merge_adapters(loaded.model, [(s.folder, s.weight) for s in sources], fingerprint)
    loaded.model.eval()
