"""Run folders from outside: what is in one, and loading its result for use."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxft.config import Config
from mlxft.errors import CheckpointError, MlxftError, ModelError
from mlxft.model.adapters import load_adapter, read_adapter_config
from mlxft.model.load import Loaded, base_fingerprint
from mlxft.model.load import load as load_model
from mlxft.recipe import load_config


@dataclass(frozen=True)
class Run:
    """A run folder."""

    dir: Path
    config: Config

    @property
    def result(self) -> Path:
        """The trained adapter, or the trained model's folder."""
        return self.dir / ("model" if self.config.tune.method == "full" else "adapter")

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, all or of one kind."""
        lines = (self.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [e for e in found if event in (None, e["event"])]


def versions() -> dict[str, str]:
    """What a run ran under."""
    names = ("mlxft", "mlx", "mlx-lm", "transformers", "numpy")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def find_adapter(path: Path) -> Path:
    """The adapter folder of a run, or the folder itself."""
    inside = path / "adapter"
    return inside if (inside / "adapter_config.json").exists() else path


def load(path: str | Path | Run, adapter: str | Path | None = None, **options: Any) -> Loaded:
    """Load for use: a run, an adapter folder, a fused or any other model, with an adapter if one is named.

    Args:
        path: also a Run, as `train` and `open_run` return it.
        options: as for mlxft.model.load.load; they override what the run or adapter says of its base.
    Raises:
        ModelError: nothing there, or the adapter belongs to another base.
    """
    path = path.dir if isinstance(path, Run) else path
    folder = Path(path).expanduser()
    if adapter is None and (folder / "config.yaml").exists() and not (folder / "config.json").exists():
        run = open_run(folder)
        if not run.result.exists():
            raise ModelError(f"{folder} has no result yet; go on with mlxft train --resume {folder}")
        path, adapter = (run.result, None) if run.config.tune.method == "full" else (path, run.result)
    elif adapter is None and (folder / "adapter_config.json").exists():
        adapter = folder
    if adapter is None:
        return load_model(str(path), **options)
    adapter = find_adapter(Path(adapter).expanduser())
    base = dict(read_adapter_config(adapter).get("mlxft", {}).get("base", {}))
    base.pop("fingerprint", None)
    name = base.pop("model", None)
    if Path(path).expanduser() in (adapter, adapter.parent):
        if name is None:
            raise ModelError(f"{adapter} does not say which base it is for; name it with --model")
        path = name
    elif str(path) != name:
        base = {}
    template = base.pop("chat_template", None)
    loaded = load_model(str(path), **{**base, "chat_template": Path(template) if template else None, **options})
    load_adapter(loaded.model, adapter, base_fingerprint(loaded))
    loaded.model.eval()
    return loaded


def open_run(folder: str | Path) -> Run:
    """The run in a folder.

    Raises:
        CheckpointError: it is no run folder.
    """
    folder = Path(folder).expanduser()
    try:
        config = load_config(folder / "config.yaml")
    except MlxftError as e:
        raise CheckpointError(f"{folder} is no run folder: {e}") from e
    run = config.run.model_copy(update={"dir": folder.resolve().parent, "name": folder.resolve().name})
    return Run(folder, config.model_copy(update={"run": run}))
