"""mlxft models: the table of open models, what each takes, and what fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from mlxft.errors import ConfigError
from mlxft.model.memory import MAC_SHARE
from mlxft.study.catalogue import FIT_METHODS, KnownModel, catalogue, fitting, keep_bench, needed_bytes

MODELS = {model.name: model for model in catalogue()[1]}
# Names that do not say the size: without embeddings of layers, rounded down, or active parameters only.
OTHERWISE = {
    "google/gemma-4-E2B-it": 4.63,
    "google/gemma-4-E4B-it": 8.88,
    "ibm-granite/granite-4.0-1b": 1.63,
    "ibm-granite/granite-4.0-micro": 3.4,
    "microsoft/Phi-4-mini-instruct": 3.84,
    "microsoft/phi-4": 14.7,
    "meta-llama/Llama-3.2-1B-Instruct": 1.24,
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_shape_is_that_of_the_name(model: KnownModel) -> None:
    found = re.search(r"-([\d.]+)([MBb])(?=-|$)", model.name)
    assert found or model.name in OTHERWISE
    billions = OTHERWISE.get(model.name) or (float(found[1]) * (1e-3 if found[2] == "M" else 1) if found else 0)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.13)
    for kind in ("metal", "cpu"):
        assert set(model.memory[kind]) == set(FIT_METHODS)
    assert re.fullmatch(r"20\d\d-\d\d", model.released)


@pytest.mark.parametrize(
    ("name", "method", "kind"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "lora", "cpu"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "full", "metal"),
        ("Qwen/Qwen3.5-0.8B", "qlora", "metal"),
        ("google/gemma-3-1b-it", "lora", "metal"),
    ],
)
def test_memory_is_by_the_plan(name: str, method: str, kind: Any) -> None:
    """If the plan has changed: python benchmarks/catalogue.py."""
    model = MODELS[name]
    assert needed_bytes(model.config, method, kind) == pytest.approx(model.memory[kind][method], rel=0.02)


def test_what_fits_is_the_largest_first_with_tight_ones_last() -> None:
    found = fitting(16, "qlora")
    room = MAC_SHARE * 16 * 2**30
    assert all(fit.needed is not None and fit.needed <= room for fit in found)
    for verdict in ("fits", "tight"):
        sizes = [fit.model.parameters for fit in found if fit.verdict == verdict]
        assert sizes == sorted(sizes, reverse=True)
    assert [fit.verdict for fit in found] == sorted(fit.verdict for fit in found)
    assert max(fit.needed or 0 for fit in found if fit.verdict == "fits") <= 0.8 * room
    names = [fit.model.name for fit in found]
    assert "Qwen/Qwen3-8B" in names
    assert "Qwen/Qwen3-8B" not in [fit.model.name for fit in fitting(16, "lora")]
    assert not fitting(0.1)
    with pytest.raises(ConfigError, match="did you mean qlora"):
        fitting(16, "qlor")
    with pytest.raises(ConfigError, match="above 0"):
        fitting(0)


def test_the_table_and_the_json(mlxft: Callable[..., Any]) -> None:
    done = mlxft("models", "--memory", "16")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    for part in ("fits 6.5 GB", "no 142.3 GB", "12.0 GB usable", catalogue()[0]):
        assert part in done.out
    found = json.loads(mlxft("models", "--memory", "16", "--json").out)
    row = next(row for row in found["models"] if row["model"] == "Qwen/Qwen3-8B")
    assert row["methods"]["full"]["verdict"] == "no"
    assert (row["licence"], row["released"]) == ("Apache-2.0", "2025-04")


def test_speeds_come_from_this_machines_bench(mlxft: Callable[..., Any]) -> None:
    assert "tok/s" not in mlxft("models").out
    keep_bench("sft-lora", "smollm2-135m", 10**8, 1000.0)
    keep_bench("sft-lora", "tiny", 10**6, 9999.0)
    keep_bench("dpo", "smollm2-135m", 10**9, 1.0)
    small = fitting(method="lora", every=True)[0]
    assert small.tokens_per_s == pytest.approx(1e11 / small.model.parameters)
    assert fitting(64, "lora")[0].tokens_per_s is None, "of another machine nothing is known"
    assert fitting(method="qlora")[0].tokens_per_s is None
    assert "tok/s" in mlxft("models").out
