"""mlxft bench: every job runs, here on a tiny shape, and its figures become rows of the page."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from click.testing import CliRunner
from mlx_lm.models import qwen3

from mlxft import selftest
from mlxft.cli.study import bench as command
from mlxft.errors import ConfigError
from mlxft.selftest import AGAINST, JOBS, SHAPES, bench_markdown, work

TINY = {**SHAPES["qwen3-0.6b"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "intermediate_size": 128, "vocab_size": 512, "head_dim": 64}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    for job in ("grpo", "ppo"):
        monkeypatch.setitem(JOBS[job], "rollout", {**JOBS[job]["rollout"], "max_tokens": 4})


@pytest.mark.parametrize("job", JOBS)
def test_each_job_runs(job: str) -> None:
    found = work(job, "tiny", 2, "mlxft")
    assert found["tokens_per_s"] > 0
    assert found["peak_gb"] > 0
    # Attention and SwiGLU of two layers, their norms, and an embedding that is the head too.
    layer = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 64
    assert found["parameters"] == 2 * layer + 512 * 64 + 64
    assert ("sampled_per_s" in found) == (job in ("grpo", "ppo"))


@pytest.mark.parametrize("job", AGAINST)
def test_mlx_lm_takes_its_turn(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its trainer checkpoints the class of the layers, for the rest of the process; a job has one of its own.
    monkeypatch.setattr(qwen3.TransformerBlock, "__call__", qwen3.TransformerBlock.__call__)
    assert work(job, "tiny", 2, "mlx_lm")["tokens_per_s"] > 0


def test_the_shapes_are_those_of_the_models() -> None:
    """Numbers of parameters in millions, as their makers give them."""

    def size(about: dict[str, Any]) -> float:
        width, layers, heads = about["hidden_size"], about["num_hidden_layers"], about["num_attention_heads"]
        head = about.get("head_dim", width // heads)
        attention = 2 * width * head * (heads + about["num_key_value_heads"])
        ends = about["vocab_size"] * width * (1 if about["tie_word_embeddings"] else 2)
        return (layers * (attention + 3 * width * about["intermediate_size"]) + ends) / 1e6

    known = {"smollm2-135m": 134.5, "qwen3-0.6b": 596, "qwen2.5-1.5b": 1544, "llama-3.2-3b": 3213, "qwen3-8b": 8191}
    for name, millions in known.items():
        assert size(SHAPES[name]) == pytest.approx(millions, rel=0.01), name


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sft-lroa: .*did you mean sft-lora"):
        selftest.bench(["sft-lroa"], "tiny", 2, False, print)
    with pytest.raises(ConfigError, match=r"qwen3-9b: .*did you mean qwen3-8b"):
        selftest.bench(["sft-lora"], "qwen3-9b", 2, False, print)


def test_a_job_that_fails_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "WORK", "raise SystemExit('no memory')")
    found = selftest.bench(["sft-lora", "dpo"], "tiny", 2, True, lambda job: None)
    assert [(j["job"], j["side"], j["error"]) for j in found["jobs"]] == [
        ("sft-lora", "mlxft", "no memory"),
        ("sft-lora", "mlx_lm", "no memory"),
        ("dpo", "mlxft", "no memory"),
    ]
    assert "| tiny | dpo | mlxft | no memory |  |  | `mlxft bench` |" in bench_markdown(found, "mlxft bench")[-1]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "ended by SIGKILL, .* memory",
        ),
        ("import os; os.write(2, b'mlx: x'); os.abort()", "SIGABRT; .* mlx: x$"),
        ("import os; os._exit(7)", "^exit code 7"),
    ],
)
def test_a_job_that_dies_without_a_word_is_told_by_its_end(
    work: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "WORK", work)
    (found,) = selftest.bench(["dpo"], "tiny", 2, False, lambda job: None)["jobs"]
    assert re.search(said, found["error"])


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_failed_job_is_a_failed_bench(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "WORK", "raise SystemExit('no memory')")
    done = CliRunner().invoke(command, ["dpo", "--shape", "tiny", *options])
    assert done.exit_code == 1
    if options:
        assert json.loads(done.stdout)["jobs"][0]["error"] == "no memory"
    monkeypatch.setattr(selftest, "WORK", 'print(\'{"tokens_per_s": 1.0, "peak_gb": 1.0, "parameters": 2}\')')
    assert CliRunner().invoke(command, ["dpo", "--shape", "tiny", *options]).exit_code == 0
