"""The loop and what it needs.

`mlxft.train(...)`, the function of the Python API, and this package share a name, and Python gives the name to a
package once it is imported. So the package can be called: it passes the call on.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """`mlxft.run.train`."""
        return importlib.import_module("mlxft.run").train(*args, **options)


sys.modules[__name__].__class__ = _Callable
