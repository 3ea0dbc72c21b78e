"""The recipes of docs/transfer.md: texts first and then answers, and learning rates by layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxft.config import load_config
from mlxft.model.layers import LowRank
from mlxft.model.load import load as load_model
from mlxft.run import train
from mlxft.runs import load_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers, so that the groups of transfer-groups.yaml meet some."""
    return make_model_dir(tmp_path_factory.mktemp("transfer") / "base", "llama", num_hidden_layers=12)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Some of the rows that the recipes train on."""
    lines = (ROOT / "mlxft/demo/rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:24]), "utf-8")
    return tmp_path / "few.jsonl"


def test_answers_go_on_from_texts(base: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = "".join(
        json.dumps({"text": f"The {n} of them are in the house. " * 5}) + "\n" for n in ("one", "two", "three")
    )
    (tmp_path / "texts.jsonl").write_text(rows, "utf-8")
    here = [f"model.path={base}", f"run.dir={tmp_path}", "run.steps=2"]
    first = train(
        load_config(
            Path("configs/continued-pretraining.yaml"),
            [
                *here,
                f"data.train={tmp_path}/texts.jsonl",
                "data.valid=null",
                "run.eval_every=null",
                "run.eval_at_start=false",
                "tune.rank=8",
            ],
        )
    )
    there = [f"model.adapter={first.dir}", "run.epochs=null", f"data.train={few}", f"data.valid={few}"]
    second = train(load_config(Path("configs/transfer-sft.yaml"), [*here, *there]))
    start = second.metrics("eval")[0]
    assert start["step"] == 0, "what the texts alone have taught is told"
    before, after = (dict(tree_flatten(load_run(run).model.trainable_parameters())) for run in (first, second))
    assert before.keys() == after.keys()
    assert not any(mx.array_equal(before[n], after[n]).item() for n in before if "lora" in n)
    # The second run began where the first one ended: it is nearer to it than to nothing.
    moved = sum((after[n] - before[n]).square().sum().item() for n in before if "lora_b" in n)
    assert moved < sum(after[n].square().sum().item() for n in after if "lora_b" in n)
    assert next(m for _, m in load_run(second).model.named_modules() if isinstance(m, LowRank)).lora_a.shape[-1] == 8


def test_lower_layers_learn_more_slowly(base: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    steps = ["run.epochs=null", "run.steps=1", "optim.warmup=0", f"data.train={few}"]
    config = load_config(Path("configs/transfer-groups.yaml"), [f"model.path={base}", f"run.dir={tmp_path}", *steps])
    before = dict(tree_flatten(load_model(str(base)).model.parameters()))
    after = dict(tree_flatten(load_run(train(config)).model.parameters()))

    def largest(part: str) -> float:
        """The largest change: Adam's first step is the learning rate, whatever the gradient."""
        return max(mx.abs(after[n] - before[n]).max().item() for n in before if part in n)

    assert largest("embed_tokens") == 0
    assert largest("model.norm") == pytest.approx(5e-5, rel=0.05)
    assert largest("layers.11.mlp.up_proj") == pytest.approx(1.5e-5, rel=0.05)
    assert largest("layers.9.mlp.up_proj") == pytest.approx(5e-6, rel=0.05)
    assert largest("layers.0.self_attn.q_proj") == pytest.approx(5e-6, rel=0.05)
