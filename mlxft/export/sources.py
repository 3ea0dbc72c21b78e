"""What is to be fused: runs and adapter folders, each with a weight, and the base under them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxft.config import Config
from mlxft.errors import ConfigError, MlxftError, ModelError
from mlxft.model.adapters import base_noted, load_adapter, load_base_of, read_adapter, read_adapter_config
from mlxft.model.fingerprint import fits_base
from mlxft.model.heads import find_head, load_head
from mlxft.model.load import Loaded, base_fingerprint
from mlxft.model.logits import Split
from mlxft.model.merge import merge_adapters
from mlxft.rundir import find_adapter, open_run
from mlxft.text import home_path


@dataclass(frozen=True)
class Source:
    """An adapter to fuse.

    Attributes:
        weight: what its change is multiplied by.
        base: what it says of its base (see `base_noted`).
        config: the recipe of its run, where that is known.
    """

    folder: Path
    weight: float = 1.0
    base: dict[str, Any] = field(default_factory=dict)
    config: Config | None = None

    @property
    def form(self) -> str:
        """The base in words: its name, and its bits where it was quantised for the training."""
        bits = self.base.get("quantize")
        return f"{self.base.get('model')}{f' in {bits} bits' if bits else ''}"


def parse_adapter(text: str) -> tuple[Path, float]:
    """`runs/a:0.7` -> runs/a and 0.7; without a number the weight is 1.

    Raises:
        ConfigError: what stands behind the colon is no number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or home_path(text).exists():
        return home_path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not name:
        raise ConfigError(f"--adapter {text}: {number!r} is no weight; expected FOLDER or FOLDER:NUMBER, as in a:0.7")
    return home_path(name), weight


def find_sources(run: Path | None, adapters: Sequence[tuple[Path, float]]) -> tuple[list[Source], str | None]:
    """The adapters to fuse, and the base where `run` names one in place of a run.

    Raises:
        ModelError: no such run or adapter, one that was trained whole, or adapters of several bases.
        ConfigError: one is named twice.
    """
    named = [(folder, weight) for folder, weight in adapters]
    base = None
    if run is not None:
        place = home_path(run)
        if not adapters or _is_run(place) or (find_adapter(place) / "adapter_config.json").exists():
            named.insert(0, (run, 1.0))
        else:
            base = str(run)
    if not named:
        raise ConfigError("nothing to fuse: name a run, or adapters with --adapter")
    sources = [_source(home_path(path), weight) for path, weight in named]
    seen: dict[Path, Path] = {}
    for (path, _), source in zip(named, sources):
        if (real := source.folder.resolve()) in seen:
            raise ConfigError(
                f"--adapter: {path} is named twice; name it once, with the weight that it is to have (FOLDER:NUMBER)"
            )
        seen[real] = path
    _check_one_base(sources)
    return sources, base


def adapter_of(path: Path) -> Path:
    """The adapter's folder of a run, or the folder itself.

    Raises:
        ModelError: nothing there, a run that was trained whole or has no result yet, or something else.
    """
    folder = find_adapter(path)
    if (folder / "adapter_config.json").exists():
        return folder
    if not path.exists():
        raise ModelError(f"{path}: no such run or adapter")
    if (path / "model").is_dir():
        raise ModelError(
            f"{path}: was trained whole, there is no adapter; its model is {path / 'model'}, and can be used as it is "
            "(mlxft convert writes a copy)"
        )
    if _is_run(path):
        open_run(path)  # which says what is wrong with a file that is no recipe
        raise ModelError(f"{path} has no result yet; go on with mlxft train --resume {path}")
    raise ModelError(f"{path}: is neither a run nor an adapter (mlxft convert copies a model)")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() and not (path / "config.json").exists()


def _source(path: Path, weight: float) -> Source:
    folder = adapter_of(path)
    recipe = next((p / "config.yaml" for p in (path, folder.parent) if (p / "config.yaml").is_file()), None)
    try:
        config = open_run(recipe.parent).config if recipe else None
    except MlxftError:  # of another version: only its validation rows are missed
        config = None
    return Source(folder, weight, base_noted(read_adapter_config(folder)), config)


def _check_one_base(sources: Sequence[Source]) -> None:
    known = [source for source in sources if source.base.get("fingerprint")]
    for source in known[1:]:
        first = known[0]
        if not fits_base(source.base["fingerprint"], first.base["fingerprint"]):
            raise ModelError(
                f"adapters of two bases can not be merged: {first.folder} is of {first.base.get('model')} "
                f"({first.base['fingerprint']}), {source.folder} of {source.base.get('model')} "
                f"({source.base['fingerprint']})"
            )
    heads = [str(source.folder) for source in sources if find_head(source.folder)]
    if len(sources) > 1 and heads:
        raise ModelError(f"{heads[0]} is a reward model, whose head can not be merged; fuse it alone")


def load_base(sources: Sequence[Source], model: str | None) -> tuple[Loaded, list[str]]:
    """The base that the first adapter says it was trained on, or `model`; a reward model's head is attached.

    Returns:
        The base, and what is to be said of it: that the adapters were trained on several forms of it.
    Raises:
        ModelError: it is not there, or not what the adapters were trained on.
    """
    first = sources[0].folder
    loaded = load_base_of(model or first, first, {})
    fingerprint = base_fingerprint(loaded)
    for source in sources:
        read_adapter(source.folder, fingerprint)  # refuses another base's before anything is measured
    if (head := find_head(first)) is not None:
        load_head(Split(loaded.model), head, fingerprint)
    loaded.model.eval()
    forms = {source.form: source.folder for source in sources if source.base.get("model")}
    if len(forms) < 2:
        return loaded, []
    trained = ", ".join(f"{folder} on {form}" for form, folder in forms.items())
    bits = (loaded.config.get("quantization") or {}).get("bits")
    on = f"{loaded.source}, {f'quantised to {bits} bits' if bits else 'in float'}"
    way = "name another one first, or --model, to merge on its base"
    return loaded, [f"the adapters were trained on several forms of the base ({trained}); merged on {on}: {way}"]


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
