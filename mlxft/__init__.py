"""mlxft: fine-tune language models on a Mac with MLX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlxft.device import prepare_process

__version__ = "0.1.0"
# The Python API: name -> where it stands. Each is imported when first used, so that `import mlxft` stays fast.
_PLACES = {
    "Config": "config",
    "Environment": "objectives.episodes",
    "FrozenModels": "model.frozen",
    "FrozenSource": "model.frozen",
    "MicroBatch": "objectives.base",
    "Objective": "objectives.base",
    "Observation": "objectives.episodes",
    "Run": "runs",
    "Settings": "config",
    "Shape": "model.memory",
    "Step": "objectives.base",
    "Summary": "objectives.base",
    "Terms": "objectives.base",
    "ToolCall": "objectives.episodes",
    "Turn": "objectives.episodes",
    "adapt": "api",
    "answer_of": "data.chat",
    "errors": "",
    "evaluate": "api",
    "export": "api",
    "functional": "objectives",
    "fuse": "api",
    "generate": "api",
    "load": "runs:load_run",
    "load_encoded": "data.dataset",
    "logprobs": "api",
    "open_run": "runs",
    "read_rows": "data.sources",
    "sample": "api",
    "sample_tokens": "api",
    "save_adapter": "api",
    "score": "api",
    "tokenize": "api",
    "train": "run",
}
__all__ = [
    "Config",
    "Environment",
    "FrozenModels",
    "FrozenSource",
    "MicroBatch",
    "Objective",
    "Observation",
    "Run",
    "Settings",
    "Shape",
    "Step",
    "Summary",
    "Terms",
    "ToolCall",
    "Turn",
    "__version__",
    "adapt",
    "answer_of",
    "errors",
    "evaluate",
    "export",
    "functional",
    "fuse",
    "generate",
    "load",
    "load_encoded",
    "logprobs",
    "open_run",
    "read_rows",
    "sample",
    "sample_tokens",
    "save_adapter",
    "score",
    "tokenize",
    "train",
]

if TYPE_CHECKING:
    from mlxft.api import (
        adapt,
        evaluate,
        export,
        fuse,
        generate,
        logprobs,
        sample,
        sample_tokens,
        save_adapter,
        score,
        tokenize,
    )
    from mlxft.config import Config, Settings
    from mlxft.data.chat import answer_of
    from mlxft.data.dataset import load_encoded
    from mlxft.data.sources import read_rows
    from mlxft.model.frozen import FrozenModels, FrozenSource
    from mlxft.model.memory import Shape
    from mlxft.objectives import functional
    from mlxft.objectives.base import MicroBatch, Objective, Step, Summary, Terms
    from mlxft.objectives.episodes import Environment, Observation, ToolCall, Turn
    from mlxft.run import train
    from mlxft.runs import Run, open_run
    from mlxft.runs import load_run as load


prepare_process()


def __getattr__(name: str) -> Any:
    """Import a name of the Python API."""
    if name not in _PLACES:
        raise AttributeError(f"module 'mlxft' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    if name in ("errors", "functional"):
        return importlib.import_module(".".join(filter(None, ["mlxft", module, name])))
    return getattr(importlib.import_module(f"mlxft.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
