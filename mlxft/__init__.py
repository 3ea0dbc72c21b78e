"""mlxft: fine-tune language models on a Mac with MLX."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "answer_of", "load", "train"]

if TYPE_CHECKING:
    from mlxft.data.chat import answer_of
    from mlxft.run import train
    from mlxft.runs import Run
    from mlxft.runs import load_run as load


class _BeforeMLX:
    """An entry of `sys.meta_path` that loads a fast BLAS when MLX is about to be imported, and finds no module itself.

    A process that needs no MLX, as `mlxft --help`, thus loads no BLAS with its threads.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "mlx.core":
            from mlxft.device import load as load_blas

            load_blas()


if sys.platform == "darwin":
    from mlxft.device import relax_watchdog

    relax_watchdog()
elif sys.platform == "linux":
    sys.meta_path.insert(0, _BeforeMLX)


def __getattr__(name: str) -> Any:
    """The Python API, imported when first used: `import mlxft` stays fast."""
    if name == "Run":
        from mlxft.runs import Run

        return Run
    if name == "load":
        from mlxft.runs import load_run

        return load_run
    if name == "train":
        from mlxft.run import train

        return train
    if name == "answer_of":
        from mlxft.data.chat import answer_of

        return answer_of
    raise AttributeError(f"module 'mlxft' has no attribute {name!r}")
