"""What is compiled is compiled a bounded number of times, however many shapes the batches have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import mlxft
from mlxft.build import make_objective
from mlxft.config import parse_config
from mlxft.trainer.optim import Optimizer


@pytest.mark.parametrize("method", [{"rank": 4}, {"method": "full"}])
def test_an_epoch_of_many_shapes_traces_few_functions(
    method: dict[str, Any], recipe: Callable[..., dict[str, Any]], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            traces[name] += 1
            return function(*args)

        return call

    # What `Optimizer` compiles; a compiled function is called to be traced.
    measure, update_by = Optimizer._norm_and_factor, Optimizer._update_by
    monkeypatch.setattr(Optimizer, "_norm_and_factor", counted("measure", measure))
    monkeypatch.setattr(Optimizer, "_update_by", lambda self, decay: counted("update", update_by(self, decay)))
    settings = recipe(rows=40, tune=method, **{"run.steps": None, "optim.lr": 1e-4})
    seen = []
    for epochs in (1, 2):
        settings["run"] |= {"epochs": epochs, "name": f"epochs-{epochs}"}
        mlxft.train(settings)
        seen.append(dict(traces))
        traces.clear()
    shapes = {slot.width for slot in make_objective(parse_config(settings), tiny_tokenizer).plan(0)}
    assert len(shapes) > 12
    assert set(seen[0]) == {"measure", "update"}
    assert sum(seen[0].values()) <= 12
    assert seen[1] == seen[0], "another epoch traces nothing more than one does"
