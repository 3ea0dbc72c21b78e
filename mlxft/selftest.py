"""Compare this machine's numbers with the CPU's (`mlxft selftest`), and time training on it (`mlxft bench`)."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxft import __version__
from mlxft.build import base_skeleton, make_objective, plan_batches
from mlxft.config import parse_config
from mlxft.device import BACKEND_NAMES, backend
from mlxft.doctor import examine
from mlxft.errors import ConfigError, MlxftError, nearest
from mlxft.exports.fuse import fuse_sources
from mlxft.model.cpu import cross_entropy, gated_delta
from mlxft.model.load import Loaded, count_parameters, load_tokenizer, skeleton
from mlxft.model.sampling import Sampling, sample_batch
from mlxft.run import train, train_config
from mlxft.runs import load_run
from mlxft.study.catalogue import keep_bench
from mlxft.text import json_text, make_console, parse_json

# --- tiny -------------------------------------------------------------------------------------------------------------
# Make a tiny model with a tokenizer and rows, which selftest trains.

_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # MLX has a fused attention kernel for this width
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def write_tiny(folder: Path) -> None:
    """Write model/, messages.jsonl, preference.jsonl and prompts.jsonl; they are always the same."""
    from mlx_lm.models import llama
    from mlx_lm.utils import save_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names[:3])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=_TEMPLATE
    )
    config = {**CONFIG, "vocab_size": len(names), "bos_token_id": 1, "eos_token_id": 2}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    rng = np.random.default_rng(0)
    leaves = [
        (name, mx.array((0.05 * rng.standard_normal(v.shape)).astype(np.float32)) if v.ndim > 1 else v)
        for name, v in sorted(tree_flatten(model.parameters()))
    ]
    model.update(tree_unflatten(leaves))
    place = folder / "model"
    place.mkdir(parents=True, exist_ok=True)
    save_model(place, model)
    (place / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer.save_pretrained(str(place))
    words = ["the", "sea", "is", "grey", "and", "the", "sand", "is", "warm", "under", "a", "white", "sky"]
    texts = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(48)]
    prompts, completions, others = texts[:16], texts[16:32], texts[32:]
    turns = [[("user", a), ("assistant", b)] for a, b in zip(prompts, completions)]
    chats = [{"messages": [{"role": r, "content": c} for r, c in pair]} for pair in turns]
    pairs = [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(prompts, completions, others)]
    for name, rows in (("messages", chats), ("preference", pairs), ("prompts", [{"prompt": a} for a in prompts])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json_text(row)}\n" for row in rows), "utf-8")


# --- selftest ---------------------------------------------------------------------------------------------------------
# mlxft selftest: compute what training consists of on this machine's device, and compare with float32 on the CPU.

_Arrays = list[mx.array]
# Allowed difference, relative to the largest number: for float32, which GPUs multiply in fewer bits, and for bfloat16.
FLOAT, HALF = 5e-3, 4e-2
LOSSES = 2e-2  # allowed relative difference of the losses of a few steps
PLANNED = 0.2  # allowed relative difference between planned and measured memory
_STEPS = 4


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        found, allowed: the largest relative difference.
        error: what went wrong, if it is not a difference.
    """

    name: str
    found: float = 0.0
    allowed: float = 0.0
    error: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Return whether the check passed; a NaN does not pass."""
        return not self.error and self.found <= self.allowed


def selftest(on_check: Callable[[Check], object] = lambda check: None) -> list[Check]:
    """Run all checks, and call `on_check` with each one when it is done."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, allowed, work in [*_operations(), *_trainings(Path(folder))]:
            began = time.perf_counter()
            try:
                check = Check(name, float(work()), allowed)
            except (MlxftError, RuntimeError, ValueError, TypeError, subprocess.SubprocessError) as error:
                check = Check(name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            found.append(Check(**{**asdict(check), "seconds": time.perf_counter() - began}))
            on_check(found[-1])
    return found


def selftest_report(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the checks and the machine as JSON, for an issue report."""
    lines = [{**asdict(c), "passed": c.passed} for c in checks]
    machine = {f.name: f.value for f in examine(Path())}
    return {"mlxft": __version__, "device": BACKEND_NAMES[backend()], "machine": machine, "checks": lines}


def _difference(ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> float:
    """Return the largest difference within a pair of arrays, relative to its largest number; the worst of all pairs."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        a, b = (np.array(x.astype(mx.float32)) for x in (one, other))
        share = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))
        worst = share if not share <= worst else worst  # a NaN stays
    return worst


def _compare(function: Callable[..., mx.array], arrays: _Arrays, dtype: mx.Dtype, reference: Any = None) -> float:
    """Compare value and gradient on the device with those of `reference` (default: itself) in float32 on the CPU."""

    def both(compute: Callable[..., mx.array], given: _Arrays) -> _Arrays:
        weights = mx.random.normal(compute(*given).shape, key=mx.random.key(9))

        def total(*a: mx.array) -> mx.array:
            return (compute(*a).astype(mx.float32) * weights).sum()

        real = [i for i, a in enumerate(given) if mx.issubdtype(a.dtype, mx.floating)]
        slopes: Any = mx.grad(total, argnums=real)(*given)
        out = [compute(*given), *slopes]
        mx.eval(out)
        return out

    def cast(kind: mx.Dtype) -> _Arrays:
        return [a.astype(kind) if mx.issubdtype(a.dtype, mx.floating) else a for a in arrays]

    mx.eval(arrays)
    with mx.stream(mx.cpu):
        wanted = both(reference or function, [a.astype(mx.float32) if a.dtype == dtype else a for a in cast(dtype)])
    return _difference(both(function, cast(dtype)), wanted)


def _draw(*shapes: Sequence[int]) -> _Arrays:
    with mx.stream(mx.cpu):
        return [mx.random.normal(tuple(shape), key=mx.random.key(i)) for i, shape in enumerate(shapes)]


def _operations() -> Iterator[tuple[str, float, Callable[[], float]]]:
    """Yield the name, the allowed difference and the function of each operation in a step."""
    for dtype, allowed in ((mx.float32, FLOAT), (mx.bfloat16, HALF)):
        kind = str(dtype).rpartition(".")[2]
        for width in (64, 128):
            yield f"attention of heads {width} wide, {kind}", allowed, partial(_attention, dtype, width)
        yield f"4-bit product, {kind}", 2 * allowed, partial(_quantized, dtype)
        if dtype == mx.float32 or backend() != "cpu":  # MLX has this operation on the CPU in float32 only
            yield f"experts' product, {kind}", allowed, partial(_experts, dtype)
        yield f"cross entropy over 50,000 tokens, {kind}", allowed, partial(_entropy, dtype)
    yield "gated delta rule", FLOAT, _delta


def _attention(dtype: mx.Dtype, width: int) -> float:
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask="causal")

    return _compare(attend, _draw((2, 4, 256, width), (2, 2, 256, width), (2, 2, 256, width)), dtype)


def _quantized(dtype: mx.Dtype) -> float:
    x, w = _draw((64, 512), (384, 512))
    with mx.stream(mx.cpu):
        q, scales, biases = mx.quantize(w.astype(dtype), 64, 4)
        whole = mx.dequantize(q, scales.astype(mx.float32), biases.astype(mx.float32), 64, 4)

    def product(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, q, scales, biases, True, 64, 4)

    return _compare(product, [x], dtype, lambda x: x @ whole.T)


def _experts(dtype: mx.Dtype) -> float:
    x, w = _draw((32, 1, 1, 256), (8, 256, 128))
    chosen = mx.array(np.random.default_rng(0).integers(0, 8, (32, 2)).astype(np.uint32))

    def product(x: mx.array, w: mx.array) -> mx.array:
        return mx.gather_mm(x, w, rhs_indices=chosen)

    return _compare(product, [x, w], dtype, lambda x, w: x @ w[chosen])


def _entropy(dtype: mx.Dtype) -> float:
    hidden, head = _draw((32, 256), (50_000, 256))
    labels = mx.array(np.random.default_rng(0).integers(0, 50_000, 32))

    def plain(h: mx.array, w: mx.array) -> mx.array:
        logits = h @ (w.T * 0.1)
        return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

    return _compare(lambda h, w: cross_entropy(h @ (w.T * 0.1), labels), [hidden, head], dtype, plain)


def _delta() -> float:
    from mlx_lm.models.gated_delta import gated_delta_ops

    q, k, v, g, beta = _draw((1, 200, 16, 128), (1, 200, 16, 128), (1, 200, 32, 128), (1, 200, 32), (1, 200, 32))
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True, stream=mx.cpu)

    def by(update: Callable[..., Any]) -> Callable[..., mx.array]:
        return lambda q, k, v, g, b: update(q, k, v, mx.sigmoid(g + 2), mx.sigmoid(b), None)[0]

    return _compare(by(gated_delta), [q, k, v, g, beta], mx.float32, by(gated_delta_ops))


def selftest_recipe(folder: Path, objective: str, name: str, **more: Any) -> dict[str, Any]:
    """Return a recipe for a few steps on the tiny model."""
    form = {"sft": "messages", "preference": "preference", "ppo": "prompts"}[objective]
    made: dict[str, Any] = {
        "objective": objective,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "tune": {"rank": 4},
        "data": {"train": str(folder / f"{form}.jsonl"), "format": form, "cache": False},
        "run": {"name": name, "dir": str(folder / "runs"), "steps": _STEPS, "report_every": 1, "keep_awake": False},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0},
        "batch": {"rows": 4},
    }
    if objective == "ppo":
        made |= {"rollout": {"prompts": 4, "max_tokens": 8}, "ppo": {"epochs": 1, "minibatches": 1}}
        made |= {"rewards": {"rules": [{"kind": "regex", "pattern": "[a-z]"}]}, "batch": {}}
    for key, value in more.items():
        section, _, setting = key.partition("__")
        made[section][setting] = value
    return made


def losses(settings: dict[str, Any]) -> list[float]:
    """Train, and return the losses of the steps."""
    run = train(settings, overwrite=True, console=make_console(file=io.StringIO()))
    return [float(event["loss"]) for event in run.metrics("train")]


# The reference runs this code in another process, because the device of this process is the user's choice.
ON_CPU = """
import json, sys
import mlxft, mlx.core as mx
mx.set_default_device(mx.cpu)
from mlxft.selftest import losses
print(json.dumps([losses(settings) for settings in json.loads(sys.stdin.read())]))
"""


def _trainings(folder: Path) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """Yield the name, the allowed difference and the function of each training."""
    compared = {
        "SFT against the CPU": selftest_recipe(folder, "sft", "sft"),
        "DPO against the CPU": selftest_recipe(folder, "preference", "dpo"),
        "SFT compiled against the CPU": selftest_recipe(folder, "sft", "compiled", batch__rows=16, run__compile="on"),
        "SFT in bfloat16 against float32": selftest_recipe(folder, "sft", "half", model__dtype="bfloat16"),
    }
    known: dict[str, list[float]] = {}

    def prepare() -> float:
        write_tiny(folder)
        on_cpu = [
            {**s, "run": {**s["run"], "name": f"{s['run']['name']}-cpu", "compile": "off"}} for s in compared.values()
        ]
        on_cpu = [{**s, "model": {**s["model"], "dtype": "float32"}} for s in on_cpu]
        command = [sys.executable, "-c", ON_CPU]
        done = subprocess.run(command, input=json.dumps(on_cpu), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        known.update(zip(compared, parse_json(done.stdout.strip().splitlines()[-1])))
        return 0.0

    def against(name: str) -> float:
        ours, theirs = losses(compared[name]), known[name]
        return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

    yield "a tiny model and its losses on the CPU", 0.0, prepare
    for name in compared:
        yield name, LOSSES, partial(against, name)
    yield "DPO in bfloat16 begins at ln 2", FLOAT, partial(_begins, folder)
    yield "PPO: the ratio between sampling and training is 1", FLOAT, partial(_ppo, folder)
    yield "a resumed run equals an uninterrupted one", FLOAT if backend() != "cpu" else 0.0, partial(_resumed, folder)
    yield "a fused model gives the adapter's logits", FLOAT, partial(_fused, folder)
    yield "measured memory against planned", PLANNED, partial(_memory_error, folder)


def _begins(folder: Path) -> float:
    first = losses(
        selftest_recipe(folder, "preference", "begins", model__dtype="bfloat16", run__steps=1, batch__rows=1)
    )[0]
    return abs(first - math.log(2)) / math.log(2)


def _ppo(folder: Path) -> float:
    settings = selftest_recipe(folder, "ppo", "ppo")
    run = train(settings, overwrite=True, console=make_console(file=io.StringIO()))
    events = run.metrics("train")
    if not any(e["grad_norm"] > 0 for e in events):
        raise RuntimeError("all completions had the same reward, so nothing was learnt")
    return max(abs(e[name] - 1.0) for e in events for name in ("ratio_mean", "ratio_max"))


def _resumed(folder: Path) -> float:
    """Compare two steps and two more after a resume with four steps at once."""
    settings = selftest_recipe(folder, "sft", "whole")
    quiet = make_console(file=io.StringIO())
    whole = train(settings, overwrite=True, console=quiet)
    parted = selftest_recipe(folder, "sft", "parted", run__save_every=2)

    class Interrupt:
        def event(self, event: dict[str, Any]) -> None:
            if event["event"] == "train" and event["step"] == 3:
                raise KeyboardInterrupt

        def close(self) -> None:
            pass

    with suppress(KeyboardInterrupt):
        train(parted, overwrite=True, console=quiet, sinks=[Interrupt()])
    again = train(parted, resume=True, console=quiet)
    one, other = (mx.load(str(run.result / "adapters.safetensors")) for run in (again, whole))
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    return _difference([one[n] for n in sorted(one)], [other[n] for n in sorted(other)])


def _fused(folder: Path) -> float:
    run = folder / "runs" / "sft"
    fuse_sources(run, folder / "fused", force=True, overwrite=True)
    ids = mx.array([[1, 5, 9, 20, 30]])
    adapted, fused = load_run(run), load_run(folder / "fused")
    return _difference([fused.model(ids)], [adapted.model(ids)])


def _memory_error(folder: Path) -> float:
    settings = selftest_recipe(folder, "sft", "memory", batch__rows=16)
    config = parse_config(settings)
    before = mx.get_active_memory()
    run = train(settings, overwrite=True, console=make_console(file=io.StringIO()))
    objective = make_objective(config, load_run(run).tokenizer)
    plan = plan_batches(config, base_skeleton(config), objective.shapes())[0]
    measured = max(e["peak_memory_gb"] for e in run.metrics("train")) * 1e9 - before
    return abs(plan.total - measured) / measured


# --- bench ------------------------------------------------------------------------------------------------------------

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


# Models with published figures for Macs, and the model of the demo.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape(_LLAMA, 576, 30, 9, 3, 1536, 49152),
    "qwen3-0.6b": _shape(_QWEN, 1024, 28, 16, 8, 3072, 151936),
    "qwen2.5-1.5b": _shape({**_QWEN, "model_type": "qwen2"}, 1536, 28, 12, 2, 8960, 151936),
    "llama-3.2-3b": _shape(_LLAMA, 3072, 28, 24, 8, 8192, 128256, head_dim=128),
    "qwen3-8b": _shape({**_QWEN, "tie_word_embeddings": False}, 4096, 36, 32, 8, 12288, 151936),
}
_GROUPS: dict[str, Any] = {"rollout": {"prompts": 2, "samples": 4, "max_tokens": 64}}
_RULES: dict[str, Any] = {"rewards": {"rules": [{"kind": "regex", "pattern": "[a-z]"}]}}
# Job -> the sections of its recipe that differ from the other jobs.
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
AGAINST = ("sft-lora", "sft-lora-checkpointed", "sft-qlora", "sampling")  # jobs that mlx_lm also has
PROMPTS, LENGTH = 16, 64  # job sampling: prompts completed at once, and tokens in each completion


def bench(
    jobs: Sequence[str], shape: str, steps: int, against: bool, on_job: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Run jobs one after the other, and call `on_job` with the figures of each.

    Args:
        steps: number of timed steps, in addition to the first.
        against: whether to run mlx_lm after each job that it also has.
    Returns:
        The whole report, as JSON.
    Raises:
        ConfigError: there is no such job or shape.
    """
    for name, known in [*((job, JOBS) for job in jobs), (shape, SHAPES)]:
        if name not in known:
            raise ConfigError(f"{name}: is not one of {', '.join(known)}{nearest(name, known)}")
    rate, found = matmul_rate(), []
    for job in jobs:
        for side in ["mlxft", "mlx_lm"] if against and job in AGAINST else ["mlxft"]:
            request = json.dumps({"job": job, "shape": shape, "steps": steps, "side": side})
            done = subprocess.run([sys.executable, "-c", WORK, request], capture_output=True, text=True, check=False)
            line = (done.stdout.strip().splitlines() or [""])[-1]
            figures = parse_json(line) if done.returncode == 0 else {}
            figures = figures or {"error": _why(done.returncode, done.stderr)}
            if "tokens_per_s" in figures:  # 2 operations per parameter, forward and for the inputs' gradient
                size = figures.pop("parameters")
                figures["share"] = (2 if job == "sampling" else 4) * size * figures["tokens_per_s"] / rate
                if side == "mlxft":
                    keep_bench(job, shape, size, figures["tokens_per_s"])
            found.append({"job": job, "shape": shape, "side": side, **figures})
            on_job(found[-1])
    machine = {f.name: f.value for f in examine(Path())}
    about = {"mlxft": __version__, "commit": _commit(), "device": BACKEND_NAMES[backend()], "matmul_per_s": rate}
    return {**about, "machine": machine, "jobs": found}


def _why(code: int, stderr: str) -> str:
    """Return why a job's process failed: its last line, or the signal that ended it."""
    last = (stderr.strip().splitlines() or [""])[-1][:300]
    if code < 0:
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"ended by {name}{memory}" + (f"; its last line: {last}" if last else "")
    return last or f"exit code {code}, without a message"


def _commit() -> str:
    """Return the commit of the clone that mlxft runs from; "" if mlxft was installed."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        return ""


def bench_markdown(found: dict[str, Any], command: str) -> list[str]:
    """Return table rows for docs/performance.md."""
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
    """Return the operations per second of a large matrix product, in the type that training computes in."""
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


# A job's process runs this code.
WORK = f"""
import json, sys
from {__name__} import work
print(json.dumps(work(**json.loads(sys.argv[1]))))
"""


def work(job: str, shape: str, steps: int, side: str) -> dict[str, Any]:
    """Run one job in this process, and return its figures as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_tiny(place)
        about = {**SHAPES[shape], "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
        (place / "model" / "config.json").write_text(json.dumps(about), "utf-8")
        _write_rows(place)
        settings = bench_recipe(place, job, steps)
        base = _made(place / "model", settings["model"].get("quantize"))
        size = count_parameters(base.model)
        mx.reset_peak_memory()
        if job == "sampling":
            figures = _sampled(base, settings, steps, side)
        else:
            figures = _theirs(base, settings, steps, place) if side == "mlx_lm" else _ours(base, settings)
        return {"parameters": size, "peak_gb": mx.get_peak_memory() / 1e9, **figures}


def bench_recipe(place: Path, job: str, steps: int) -> dict[str, Any]:
    """Return a job's recipe."""
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
    """Write rows as long as Alpaca's: about a hundred tokens (one per character) in the median, with a long tail."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.6, 0.7, 256), 20, 800).astype(int)
    text = "the sea is grey and the sand is warm under a white sky " * 20
    rows = [{"prompt": text[: n // 3], "completion": text[: n - n // 3]} for n in lengths]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["completion"][::-1]} for r in rows]
    for name, found in (("prompt-completion", rows), ("preference", pairs), ("prompts", rows)):
        (place / f"{name}.jsonl").write_text("".join(f"{json_text(row)}\n" for row in found), "utf-8")


def _made(folder: Path, quantize: int | None) -> Loaded:
    """Return a model with random weights."""
    loaded = skeleton(str(folder), quantize=quantize)
    mx.eval(loaded.model.parameters())
    mx.clear_cache()
    return replace(loaded, tokenizer=load_tokenizer(str(folder)))


def _ours(base: Loaded, settings: dict[str, Any]) -> dict[str, Any]:
    run = train_config(parse_config(settings), base=base, overwrite=True, console=make_console(file=io.StringIO()))
    events = run.metrics("train")
    first, last = events[0], events[-1]
    seconds = last["elapsed_s"] - first["elapsed_s"]
    rolled = run.metrics("rollout")
    more = {"sampled_per_s": rolled[-1]["sampling_tokens_per_s"]} if rolled else {}
    return {"tokens_per_s": (last["tokens"] - first["tokens"]) / seconds, **more}


def _sampled(base: Loaded, settings: dict[str, Any], steps: int, side: str) -> dict[str, Any]:
    """Time the completion of prompts in a batch, prefill included; the first round is not counted."""
    from mlx_lm import batch_generate

    lines = Path(settings["data"]["train"]).read_text("utf-8").splitlines()[:PROMPTS]
    prompts = [base.tokenizer.encode(parse_json(line)["prompt"]) for line in lines]
    base.model.eval()
    how = Sampling(LENGTH, 0.0, stop_at_eos=False)
    base.tokenizer.eos_token_ids = ()  # batch_generate has no setting to ignore EOS
    for repeat in range(steps + 1):
        if side == "mlx_lm":
            batch_generate(base.model, base.tokenizer, prompts, max_tokens=LENGTH, completion_batch_size=PROMPTS)
        else:
            sample_batch(base.model, base.tokenizer, prompts, how, seed=repeat, rows=PROMPTS)
        if not repeat:
            began = time.perf_counter()
    return {"tokens_per_s": steps * PROMPTS * LENGTH / (time.perf_counter() - began)}


def _theirs(base: Loaded, settings: dict[str, Any], steps: int, place: Path) -> dict[str, Any]:
    """Time mlx_lm's own trainer on the same weights and rows."""
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
