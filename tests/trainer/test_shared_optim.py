"""An optimiser whose ranks each update their own parameters: the bits of one process, and a checkpoint for any number.

As a script, this file is one rank: `python test_shared_optim.py FOLDER NAME ...`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from architectures import build
from mlx.utils import tree_flatten
from ranks import run_ranks

from mlxft.config import OptimSettings
from mlxft.model.adapters import prepare_full
from mlxft.trainer.optim import Optimizer

NAMES = ["adamw", "sgd", "adafactor", "muon"]
STEPS, SAVED = 3, 2


def steps(
    name: str, group: mx.distributed.Group | None, last: int, begun: Path | None = None
) -> tuple[dict[str, mx.array], Optimizer]:
    """The parameters after steps up to `last`, in bfloat16 and clipped; with `begun`, resumed from what is there."""
    mx.random.seed(0)
    model = build("llama")
    model.set_dtype(mx.bfloat16)
    prepare_full(model, "all", [], [])
    optimizer = Optimizer(OptimSettings(name=name, lr=0.01, clip=1.0), model, group=group)
    if begun is not None:
        model.load_weights(str(begun / "weights.safetensors"))
        optimizer.load(mx.load(str(begun / "state.safetensors")))
    for step in range(0 if begun is None else SAVED, last):
        mx.random.seed(step + 10)
        grads = {n: mx.random.normal(p.shape).astype(p.dtype) for n, p in tree_flatten(model.trainable_parameters())}
        optimizer.step(model, grads, mx.array(2.0), 0.01)
    return dict(tree_flatten(model.parameters())), optimizer


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]).item() for n in a)


def save(name: str, group: mx.distributed.Group | None, folder: Path) -> None:
    folder.mkdir()
    weights, optimizer = steps(name, group, SAVED)
    mx.save_safetensors(str(folder / "weights.safetensors"), weights)
    mx.save_safetensors(str(folder / "state.safetensors"), optimizer.gathered())


def compare(name: str, group: mx.distributed.Group, folder: Path) -> dict[str, Any]:
    """What is computed by one process is computed here, too: BLAS rounds differently with other numbers of threads."""
    own = folder / f"{name} {group.rank()}"
    own.mkdir()
    save(name, None, own / "one")
    save(name, group, own / "two")
    want, whole = steps(name, None, STEPS)
    found: dict[str, Any] = {}
    for what, ranks, begun in (
        ("ranks", group, None),
        ("ranks from one", group, own / "one"),
        ("ranks from ranks", group, own / "two"),
        ("one from ranks", None, own / "two"),
    ):
        parameters, optimizer = steps(name, ranks, STEPS, begun)
        found[what] = same(parameters, want) and same(optimizer.gathered(), whole.arrays())
        if what == "ranks":
            held = sum(v.nbytes for v in optimizer.arrays().values())
            found["share"] = held / sum(v.nbytes for v in whole.arrays().values())
            found["returns nothing"] = not optimizer.gathered(keep=False)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    ranks = run_ranks([__file__, str(tmp_path_factory.mktemp("states")), *NAMES])
    assert all(code == 0 for code, _, _ in ranks), "\n".join(err[-2000:] for _, _, err in ranks)
    return [json.loads(out) for _, out, _ in ranks]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_update_as_one_process(name: str, found: list[dict[str, dict[str, Any]]]) -> None:
    """Parameters and the whole state have the same bits, resumed or not; each rank holds about half of the state."""
    for rank in found:
        about = dict(rank[name])
        assert about.pop("share") < 0.6
        assert all(about.values()), about


if __name__ == "__main__":
    group = mx.distributed.init(strict=True, backend="ring")
    print(json.dumps({name: compare(name, group, Path(sys.argv[1])) for name in sys.argv[2:]}))
