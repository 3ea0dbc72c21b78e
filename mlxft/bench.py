"""mlxft bench: how fast this machine trains models of known shapes, with random weights, so that nothing is downloaded.

Each job runs in a process of its own. Figures are of the steps after the first, which builds caches and kernels.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxft import __version__
from mlxft.device import NAMES, backend
from mlxft.doctor import examine
from mlxft.errors import ConfigError, nearest
from mlxft.model.batch_sample import sample_batch
from mlxft.model.load import Loaded, count_parameters, load_tokenizer, skeleton
from mlxft.model.sample import Sampling
from mlxft.model.tiny import write_tiny
from mlxft.recipe import parse_config
from mlxft.run import train
from mlxft.text import json_text, make_console, parse_json

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True}
_QWEN = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "head_dim": 128}


def _shape(base: dict[str, Any], *sizes: int, **own: Any) -> dict[str, Any]:
    names = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    ]
    return {**base, **dict(zip(names, sizes, strict=True)), "max_position_embeddings": 40960, **own}


# Models for which figures of Macs are published, and the one of the demo.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape(_LLAMA, 576, 30, 9, 3, 1536, 49152),
    "qwen3-0.6b": _shape(_QWEN, 1024, 28, 16, 8, 3072, 151936),
    "qwen2.5-1.5b": _shape({**_QWEN, "model_type": "qwen2"}, 1536, 28, 12, 2, 8960, 151936),
    "llama-3.2-3b": _shape(_LLAMA, 3072, 28, 24, 8, 8192, 128256, head_dim=128),
    "qwen3-8b": _shape({**_QWEN, "tie_word_embeddings": False}, 4096, 36, 32, 8, 12288, 151936),
}
_GROUPS: dict[str, Any] = {"rollout": {"prompts": 2, "samples": 4, "max_tokens": 64}}
_RULES: dict[str, Any] = {"rewards": {"rules": [{"kind": "regex", "pattern": "[a-z]"}]}}
# Job -> the sections of its recipe that are not those of all.
JOBS: dict[str, dict[str, Any]] = {
    "sft-lora": {},
    "sft-lora-packed": {"batch": {"tokens": 2048, "pack": True}},
    "sft-lora-checkpointed": {"memory": {"checkpoint": "on"}},
    "sft-qlora": {"model": {"quantize": 4}},
    "dpo": {"objective": "preference", "data": {"format": "preference"}},
    "grpo": {"objective": "grpo", "data": {"format": "prompts"}, "batch": {}, **_GROUPS, **_RULES},
    "ppo": {
        "objective": "ppo",
        "data": {"format": "prompts"},
        "batch": {},
        "rollout": {"prompts": 8, "max_tokens": 64},
        "ppo": {"epochs": 1, "minibatches": 1},
        **_RULES,
    },
    "sampling": {},
}
AGAINST = ("sft-lora", "sft-lora-checkpointed", "sft-qlora", "sampling")  # what mlx_lm does too
PROMPTS, ANSWER = 16, 64  # of the job sampling: answered at once, tokens of each answer


def bench(
    jobs: Sequence[str], shape: str, steps: int, against: bool, tell: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Run jobs, one after the other, and tell each one's figures.

    Args:
        steps: counted ones, beside the first.
        against: whether mlx_lm takes its turn behind each job that it can do.
    Returns:
        All there is to report, as JSON.
    Raises:
        ConfigError: no such job or shape.
    """
    for name, known in [*((job, JOBS) for job in jobs), (shape, SHAPES)]:
        if name not in known:
            raise ConfigError(f"{name}: is none of {', '.join(known)}{nearest(name, known)}")
    rate, found = matmul_rate(), []
    for job in jobs:
        for side in ["mlxft", "mlx_lm"] if against and job in AGAINST else ["mlxft"]:
            asked = json.dumps({"job": job, "shape": shape, "steps": steps, "side": side})
            done = subprocess.run([sys.executable, "-c", WORK, asked], capture_output=True, text=True, check=False)
            line = (done.stdout.strip().splitlines() or [""])[-1]
            figures = parse_json(line) if done.returncode == 0 else {}
            figures = figures or {"error": _why(done.returncode, done.stderr)}
            if "tokens_per_s" in figures:  # forward, and the gradient in what comes in: 2 operations a number each
                operations = (2 if job == "sampling" else 4) * figures.pop("parameters")
                figures["share"] = operations * figures["tokens_per_s"] / rate
            found.append({"job": job, "shape": shape, "side": side, **figures})
            tell(found[-1])
    machine = {f.name: f.value for f in examine(Path())}
    about = {"mlxft": __version__, "commit": _commit(), "device": NAMES[backend()], "matmul_per_s": rate}
    return {**about, "machine": machine, "jobs": found}


def _why(code: int, said: str) -> str:
    """What a job's process died of: its last line, and what ended it where it can not have said that itself."""
    last = (said.strip().splitlines() or [""])[-1][:300]
    if code < 0:
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"ended by {name}{memory}" + (f"; it said last: {last}" if last else "")
    return last or f"exit code {code}, without a word"


def _commit() -> str:
    """Of the clone that mlxft runs from; empty where it was installed."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def markdown(found: dict[str, Any], command: str) -> list[str]:
    """Rows for docs/performance.md."""
    about = found["machine"]
    chip = about.get("chip") or about.get("GPU") or about.get("CPU")
    version = f"{found['mlxft']} {found['commit']}".strip()
    machine = f"{chip}, {about['memory']}; mlxft {version}, mlx {about['mlx']}"
    lines = []
    for job in found["jobs"]:
        figures = job.get("error") or f"{job['tokens_per_s']:.0f}"
        peak, share = (f"{job[k]:{form}}" if k in job else "" for k, form in (("peak_gb", ".2f"), ("share", ".0%")))
        lines.append(
            "| "
            + " | ".join([machine, job["shape"], job["job"], job["side"], figures, peak, share, f"`{command}`"])
            + " |"
        )
    return lines


def matmul_rate() -> float:
    """Operations a second of a large product, in what training computes in."""
    dtype = mx.float32 if backend() == "cpu" else mx.bfloat16
    size = 1024 if backend() == "cpu" else 4096
    a = mx.random.normal((size, size)).astype(dtype)
    times = []
    for _ in range(5):
        mx.eval(a)
        began = time.perf_counter()
        mx.eval(a @ a)
        times.append(time.perf_counter() - began)
    return float(2 * size**3 / min(times))


# What a job's process runs.
WORK = """
import json, sys
from mlxft.bench import work
print(json.dumps(work(**json.loads(sys.argv[1]))))
"""


def work(job: str, shape: str, steps: int, side: str) -> dict[str, Any]:
    """Run one job in this process; its figures as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_tiny(place)
        about = {**SHAPES[shape], "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
        (place / "model" / "config.json").write_text(json.dumps(about), "utf-8")
        _write_rows(place)
        settings = recipe(place, job, steps)
        base = _made(place / "model", settings["model"].get("quantize"))
        size = count_parameters(base.model)
        mx.reset_peak_memory()
        if job == "sampling":
            figures = _sampled(base, settings, steps, side)
        else:
            figures = _theirs(base, settings, steps, place) if side == "mlx_lm" else _ours(base, settings)
        return {"parameters": size, "peak_gb": mx.get_peak_memory() / 1e9, **figures}


def recipe(place: Path, job: str, steps: int) -> dict[str, Any]:
    """A job's recipe."""
    own = JOBS[job]
    form = own.get("data", {}).get("format", "prompt-completion")
    made: dict[str, Any] = {
        "objective": "sft",
        "model": {"path": str(place / "model")},
        "tune": {"rank": 8, "targets": "attention"},
        "data": {"train": str(place / f"{form}.jsonl"), "format": form, "cache": False},
        "batch": {"rows": 4},
        "optim": {"lr": 1e-4, "schedule": "constant", "warmup": 0},
        "memory": {"checkpoint": "off", "measure": False},
        "run": {"name": "a", "dir": str(place / "runs"), "steps": steps + 1, "report_every": 1, "save_every": 10**6},
    }
    if form == "prompt-completion":
        made["data"]["train_on"] = "all"  # as mlx_lm's trainer does
    return made | {k: made[k] | v if k in ("model", "data", "memory") else v for k, v in own.items()}


def _write_rows(place: Path) -> None:
    """Rows as long as Alpaca's: of a token a character, some hundred in the median, with a long tail."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.6, 0.7, 256), 20, 800).astype(int)
    text = "the sea is grey and the sand is warm under a white sky " * 20
    rows = [{"prompt": text[: n // 3], "completion": text[: n - n // 3]} for n in lengths]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["completion"][::-1]} for r in rows]
    for name, found in (("prompt-completion", rows), ("preference", pairs), ("prompts", rows)):
        (place / f"{name}.jsonl").write_text("".join(f"{json_text(row)}\n" for row in found), "utf-8")


def _made(folder: Path, quantize: int | None) -> Loaded:
    """A model with random weights."""
    loaded = skeleton(str(folder), quantize=quantize)
    mx.eval(loaded.model.parameters())
    mx.clear_cache()
    return replace(loaded, tokenizer=load_tokenizer(str(folder)))


def _ours(base: Loaded, settings: dict[str, Any]) -> dict[str, Any]:
    run = train(parse_config(settings), base=base, overwrite=True, console=make_console(file=io.StringIO()))
    events = run.metrics("train")
    first, last = events[0], events[-1]
    seconds = last["elapsed_s"] - first["elapsed_s"]
    rolled = run.metrics("rollout")
    more = {"sampled_per_s": rolled[-1]["sampling_tokens_per_s"]} if rolled else {}
    return {"tokens_per_s": (last["tokens"] - first["tokens"]) / seconds, **more}


def _sampled(base: Loaded, settings: dict[str, Any], steps: int, side: str) -> dict[str, Any]:
    """Answers to prompts side by side, prompts included in the time; the first round is not counted."""
    from mlx_lm import batch_generate

    lines = Path(settings["data"]["train"]).read_text("utf-8").splitlines()[:PROMPTS]
    prompts = [base.tokenizer.encode(parse_json(line)["prompt"]) for line in lines]
    base.model.eval()
    how = Sampling(ANSWER, 0.0, stop_at_eos=False)
    base.tokenizer.eos_token_ids = ()  # of batch_generate, which has no setting for it
    for turn in range(steps + 1):
        if side == "mlx_lm":
            batch_generate(base.model, base.tokenizer, prompts, max_tokens=ANSWER, completion_batch_size=PROMPTS)
        else:
            sample_batch(base.model, base.tokenizer, prompts, how, seed=turn, rows=PROMPTS)
        if not turn:
            began = time.perf_counter()
    return {"tokens_per_s": steps * PROMPTS * ANSWER / (time.perf_counter() - began)}


def _theirs(base: Loaded, settings: dict[str, Any], steps: int, place: Path) -> dict[str, Any]:
    """mlx_lm's own trainer on the same weights and rows."""
    import mlx.optimizers as opt
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset
    from mlx_lm.tuner.trainer import TrainingArgs
    from mlx_lm.tuner.trainer import train as their_train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = base.model
    model.freeze()
    keys = {f"self_attn.{name}_proj" for name in "qkvo"}
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": keys})
    rows = [parse_json(line) for line in Path(settings["data"]["train"]).read_text("utf-8").splitlines()]
    reports: list[tuple[float, int]] = []

    class Watch(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            reports.append((time.perf_counter(), train_info["trained_tokens"]))

    args = TrainingArgs(
        batch_size=4,
        iters=steps + 1,
        steps_per_report=1,
        steps_per_eval=10**6,
        steps_per_save=10**6,
        adapter_file=str(place / "theirs.safetensors"),
        grad_checkpoint=settings["memory"]["checkpoint"] == "on",
    )
    data = CacheDataset(CompletionsDataset(rows, base.tokenizer, "prompt", "completion", mask_prompt=False))
    their_train(model, opt.AdamW(learning_rate=1e-4), data, None, args, training_callback=Watch())
    (began, before), (ended, after) = reports[0], reports[-1]
    return {"tokens_per_s": (after - before) / (ended - began)}
