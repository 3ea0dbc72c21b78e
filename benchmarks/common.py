"""What the benchmarks share: rows of wanted lengths, workers in processes of their own, and the report."""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]

# The llama of the task with a known optimum.
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def lengths(kind: str, n: int, seed: int = 0) -> list[int]:
    """Tokens a row. alpaca: log-normal with mean 200 and a tail to 750; equal: 200 each."""
    if kind == "equal":
        return [200] * n
    rng = np.random.default_rng(seed)
    return [int(v) for v in np.clip(rng.lognormal(5.15, 0.55, n), 40, 750)]


def write_rows(path: Path, sizes: list[int], trained_share: float, seed: int = 0) -> None:
    """prompt-completion rows of about these sizes: the template around them takes some 30 tokens of the prompt's."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as f:
        for size in sizes:
            answer = max(2, round(size * trained_share))
            question = max(2, size - answer - 30)
            row = {
                "prompt": " ".join(rng.choice(WORDS, question)),
                "completion": " ".join(rng.choice(WORDS, answer - 1)),
            }
            f.write(json.dumps(row) + "\n")


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """A folder with a model of random weights, and a tokenizer of one token a word."""
    import mlxft  # noqa: F401  isort: skip - before MLX, for its BLAS
    import mlx.core as mx
    from mlx_lm.utils import save_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<eos>", *WORDS])}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), config["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    folder.mkdir(parents=True)
    mx.random.seed(0)
    save_model(folder, module.Model(module.ModelArgs.from_dict(config)))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(str(folder))


def worker(script: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run `script --worker JOB` in a process of its own; its last line is its result."""
    command = [sys.executable, script, "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def about() -> dict[str, str]:
    """Machine, versions and commit."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    names = ("mlxft", "mlx", "mlx-lm")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        **{n: version(n) for n in names},
    }


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios pair by pair: both of a pair saw the machine in the same mood."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def report(name: str, columns: list[str], rows: list[list[Any]], extra: dict[str, Any]) -> None:
    """Print a table and write results/NAME.json."""
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(len(r[i]) for r in [columns, *shown]) for i in range(len(columns))]
    for row in [columns, *shown]:
        print("  ".join(v.rjust(w) for v, w in zip(row, widths)))
    out = HERE / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"about": about(), "columns": columns, "rows": rows, **extra}, indent=1) + "\n")
    print(f"wrote {out.relative_to(HERE.parent)}")
