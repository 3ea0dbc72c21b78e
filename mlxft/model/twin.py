"""A second model over the same weights, so that several trainings share one load."""

from __future__ import annotations

import copy
from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxft.model.load import Loaded


def twin(loaded: Loaded) -> Loaded:
    """Modules of its own that hold the same arrays: no number is copied.

    Training puts new arrays in the place of those it changes, so `loaded` stays as it is whatever becomes of its twin.

    Raises:
        TypeError: a module of this architecture can not be copied.
    """
    arrays = [v for _, v in tree_flatten(loaded.model) if isinstance(v, mx.array)]
    model = copy.deepcopy(loaded.model, {id(v): v for v in arrays})
    return replace(loaded, model=model, config=copy.deepcopy(loaded.config))
