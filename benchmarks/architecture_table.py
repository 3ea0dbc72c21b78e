"""Whether each architecture of mlx-lm is trained, has the right gradient, is fused and is read back: a table.

Each is built tiny, with random weights, in a process of its own.

python benchmarks/architecture_table.py --out docs/architectures.md
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import HERE, about

sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

STAGES = ("trained", "gradient", "fused", "reloaded")
SECONDS = 300  # of one architecture


def check(name: str, folder: Path) -> dict[str, str]:
    """What went wrong in each stage that was reached: "" nothing."""
    import mlxft  # noqa: F401  isort: skip - before MLX, for its BLAS
    import mlx.core as mx
    from architectures import ARCHITECTURES, build, scatter, settings
    from conftest import make_tokenizer, write_chat

    from mlxft.exports.fuse import fuse_layers
    from mlxft.model.folder import save_folder
    from mlxft.model.load import load, load_tokenizer
    from mlxft.run import train
    from mlxft.text import make_console

    found: dict[str, str] = {}
    sizes = dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), 320)
    # Where there are both: mlx-lm 0.32 reads no minicpm whose embedding is its head.
    name = f"{name} untied" if f"{name} untied" in ARCHITECTURES else name
    config = settings(name, **sizes)
    make_tokenizer().save_pretrained(str(folder / "tokenizer"))
    (folder / "tokenizer/config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    save_folder(folder / "base", build(name, **sizes), tokenizer, config)
    rows = write_chat(folder / "rows.jsonl", 4)
    recipe: dict[str, Any] = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "tune": {"rank": 2},
        "data": {"train": str(rows), "format": "messages", "cache": False},
        "batch": {"rows": 2},
        "optim": {"lr": 1e-3, "schedule": "constant", "warmup": 0},
        "run": {"dir": str(folder), "name": "run", "steps": 2, "report_every": 1, "keep_awake": False},
    }
    model: Any = None
    ids = mx.array([[3, 40, 12, 5, 21, 9]])

    def logits() -> mx.array:
        out = model(ids)
        return mx.where(mx.isinf(out), 0, out)

    def trained() -> str:
        nonlocal model
        loaded = load(str(folder / "base"), dtype="float32")
        model = loaded.model
        run = train(recipe, model=loaded, console=make_console(file=io.StringIO()))
        losses = [event["loss"] for event in run.metrics("train")]
        model.eval()
        return "" if len(losses) == 2 else f"losses {losses}"

    def gradient() -> str:
        scatter(model, seed=2, only="lora_b")
        return slope_difference(model)

    def fused() -> str:
        wanted = logits()
        fuse_layers(model)
        return differs(logits(), wanted)

    def reloaded() -> str:
        nonlocal model
        wanted = logits()
        save_folder(folder / "fused", model, tokenizer, config)
        model = load(str(folder / "fused"), dtype="float32").model
        return differs(logits(), wanted)

    def differs(found: mx.array, wanted: mx.array) -> str:
        size, most = max(1.0, float(mx.abs(wanted).max())), float(mx.abs(found - wanted).max())
        return "" if most < 1e-4 * size else f"logits of {size:.3g} differ by {most:.3g}"

    for stage, go in zip(STAGES, (trained, gradient, fused, reloaded)):
        try:
            found[stage] = go()
        except Exception as error:
            traceback.print_exc()
            found[stage] = f"{type(error).__name__}: {error}".splitlines()[0][:200].replace(str(folder), "")
        if found[stage] and stage == "trained":
            break
    return found


def slope_difference(model: Any) -> str:
    """The loss along a line through some parameters, by its gradient and by differences, as training computes it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from mlxft.model.cpu import quicker
    from mlxft.model.logits import Split, rows_nll

    split, key = Split(model), mx.random.key(0)
    ids = mx.random.randint(0, 64, (2, 9), key=key)
    batch = {"ids": ids, "positions": mx.arange(16) + mx.arange(16) // 8, "labels": ids[:, 1:].reshape(-1)}
    flat = dict(tree_flatten(model.trainable_parameters()))
    model.train()

    def loss(params: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(params.items())))
        with quicker(model):
            return rows_nll(split, **batch, weights=mx.ones(16), grad=True)

    slopes = mx.grad(loss)(flat)
    problems = []
    for part in ("lora_a", "lora_b"):
        line = {}
        for name in flat:
            key, now = mx.random.split(key)
            other = mx.random.normal(flat[name].shape, key=now)
            own = slopes[name] / mx.maximum(mx.linalg.norm(slopes[name].reshape(-1)), 1e-12)
            line[name] = (own + other / mx.linalg.norm(other.reshape(-1))) * float(name.endswith(part))
        wanted = sum(float((slopes[k] * line[k]).sum()) for k in flat)
        tried = []
        # Steps of several lengths: one may change which expert is chosen, another be lost in rounding.
        for change in (0.3, 0.1, 0.03, 0.01, 0.003):
            step = change / abs(wanted)
            ends = [float(loss({k: flat[k] + sign * step * line[k] for k in flat})) for sign in (1, -1)]
            tried.append((ends[0] - ends[1]) / (2 * step))
        if not min(abs(t - wanted) for t in tried) < 0.01 * abs(wanted):
            problems.append(f"slope in {part} {wanted:.4g}, by differences {', '.join(f'{t:.4g}' for t in tried)}")
    loss(flat)
    model.eval()
    return "; ".join(problems)


def row(name: str) -> tuple[str, dict[str, str], str]:
    """One architecture: its stages, and why it is not in all of them."""
    from architectures import NOT

    if name in NOT:
        return name, {}, NOT[name]
    command = [sys.executable, __file__, "--worker", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return name, {}, f"took more than {SECONDS} s"
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return name, {}, (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return name, found, "; ".join(f"{stage}: {text}" for stage, text in found.items() if text)


def page(rows: list[tuple[str, dict[str, str], str]]) -> str:
    """The table in Markdown, with its count."""
    whole = sum(all(found.get(stage) == "" for stage in STAGES) for _, found, _ in rows)
    at = about()
    where = f"{at['machine']}, MLX {at['mlx']}"
    lines = [
        f"# Architectures of mlx-lm {at['mlx-lm']}",
        "",
        f"{whole} of {len(rows)} are trained, have the right gradient, are fused and are read back, as tiny models",
        f"with random weights in float32, by `python benchmarks/architecture_table.py` ({where}):",
        "",
        "- trained: two steps of LoRA on all linear layers, by a recipe.",
        "- gradient: the loss along lines through all of LoRA's parameters, against differences, within 1 %.",
        "- fused: the fused model's logits are the adapted one's.",
        "- reloaded: so are those of the folder that it was saved to.",
        "",
        f"| architecture | {' | '.join(STAGES)} | reason |",
        f"| --- |{' --- |' * len(STAGES)} --- |",
    ]
    for name, found, reason in rows:
        marks = [{"": "yes", None: "-"}.get(found.get(stage), "no") for stage in STAGES]
        lines.append(f"| {name} | {' | '.join(marks)} | {reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.worker:
        with tempfile.TemporaryDirectory() as folder:
            print("\n" + json.dumps(check(args.worker, Path(folder))))
        return
    from architectures import names

    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(row, args.names or names()):
            rows.append(found)
            print(*found, file=sys.stderr, flush=True)
    text = page(rows)
    if args.out:
        args.out.write_text(text, "utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
