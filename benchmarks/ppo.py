"""PPO with four roles over one base, next to SFT: peak memory, what of the base is resident, and the phases' seconds.

    python benchmarks/ppo.py                 # a random llama of 8 layers and width 256, vocabulary 8,192
    python benchmarks/ppo.py --checkpoint    # both with gradient checkpointing

Policy, reference (the adapter that the policy began as), reward model and critic are adapters of one base. SFT trains
the same base, adapter shape and tokens a micro-batch: rows as long as prompt and completion together, of which the
completion is trained. Each run is in a process of its own, and stands beside what `mlxft check` predicts for it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import WORDS, make_model, report, worker

import mlxft  # before mlx: brings the fast BLAS on Linux

assert mlxft

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
PROMPT, ANSWER = 96, 64
MOST = 1.3


def write_rows(folder: Path, rows: int) -> None:
    """The same prompts with a completion, with two, and alone; a reward by length."""
    rng = np.random.default_rng(0)
    kinds: dict[str, list[dict[str, str]]] = {"sft": [], "pairs": [], "prompts": []}
    for _ in range(rows):
        prompt = " ".join(rng.choice(WORDS, PROMPT))
        first, second = (" " + " ".join(rng.choice(WORDS, ANSWER - 1)) for _ in range(2))
        kinds["sft"].append({"prompt": prompt, "completion": first})
        kinds["pairs"].append({"prompt": prompt, "chosen": first, "rejected": second})
        kinds["prompts"].append({"prompt": prompt})
    for name, found in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))


def recipe(job: dict[str, Any], objective: str) -> dict[str, Any]:
    """Settings of a run; PPO goes on from the SFT run and is judged by the reward run."""
    folder = Path(job["folder"])
    data = {"sft": "sft", "reward": "pairs", "ppo": "prompts"}[objective]
    settings: dict[str, Any] = {
        "objective": objective,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "tune": {"method": "lora", "rank": 8},
        "data": {"train": str(folder / f"{data}.jsonl"), "template": "none", "cache": False},
        "batch": {"tokens": job["tokens"]},
        "memory": {"checkpoint": job["checkpoint"]},
        "run": {"dir": str(folder / "runs"), "name": objective, "steps": job["steps"], "report_every": 1},
    }
    settings["data"]["format"] = {"sft": "prompt-completion", "reward": "preference", "ppo": "prompts"}[objective]
    if objective == "ppo":
        settings["model"]["adapter"] = str(folder / "runs" / "sft")
        del settings["tune"]
        settings["rewards"] = {"adapter": str(folder / "runs" / "reward")}
        settings["rollout"] = {"prompts": job["rows"], "max_tokens": ANSWER, "stop_at_eos": False}
        settings["ppo"] = {"epochs": 1, "minibatches": 1}
    return settings


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Predict, then train."""
    from rich.console import Console

    from mlxft.build import base_skeleton, make_objective, plan_batches
    from mlxft.model.load import load_tokenizer
    from mlxft.run import as_config

    config = as_config(recipe(job, job["objective"]))
    objective = make_objective(config, load_tokenizer(config.model.path))
    model = base_skeleton(config)
    plan, rows, width = plan_batches(config, model, objective.shapes(), objective.beside(model))
    run = mlxft.train(config, overwrite=True, console=Console(quiet=True))
    train, rollouts = run.metrics("train"), run.metrics("rollout")
    sampling, scoring = (sum(e[name] for e in rollouts) for name in ("sampling_s", "scoring_s"))
    return {
        "rows": rows,
        "width": width,
        "predicted": plan.total,
        "measured": max(e["peak_memory_gb"] for e in train) * 1e9,
        "sampling_s": sampling,
        "scoring_s": scoring,
        "training_s": train[-1]["elapsed_s"] - sampling - scoring,
        "sampled_tokens_per_s": float(np.mean([e["sampling_tokens_per_s"] for e in rollouts])) if rollouts else 0.0,
    }


def resident(job: dict[str, Any]) -> dict[str, Any]:
    """Once all roles are there: bytes of the base, of each role, of all arrays once each, and in memory."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxft.build import load_base, make_objective, prepare
    from mlxft.model.load import base_fingerprint
    from mlxft.run import as_config

    config = as_config(recipe(job, "ppo"))
    loaded = load_base(config, lazy=True)
    base = sum(v.nbytes for _, v in tree_flatten(loaded.model.parameters()))
    objective: Any = make_objective(config, loaded.tokenizer)
    prepare(config, loaded)
    objective.prepare(loaded.model, base_fingerprint(loaded))
    mx.eval(loaded.model.parameters())
    roles = objective.roles
    held: dict[int, int] = {}  # by object: roles share what none of them has trained yet
    for name in roles.names:
        with roles.use(name):
            mx.eval(loaded.model.parameters())
            held |= {id(v): v.nbytes for _, v in tree_flatten(loaded.model.parameters())}
    own = {name: roles.nbytes(name) for name in roles.names}
    return {"base": base, "roles": own, "arrays": sum(held.values()), "active": mx.get_active_memory()}


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--tokens", type=int, default=2560, help="of a micro-batch")
    parser.add_argument("--rows", type=int, default=32, help="completions a rollout")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        print(json.dumps((resident if job["objective"] == "resident" else measure)(job)))
        return
    with tempfile.TemporaryDirectory() as tmp:
        job = {"folder": tmp, "tokens": args.tokens, "rows": args.rows, "steps": args.steps}
        job["checkpoint"] = "on" if args.checkpoint else "off"
        make_model(Path(tmp) / "model", MODEL)
        write_rows(Path(tmp), args.rows)
        found = {name: worker(__file__, {**job, "objective": name}) for name in ("sft", "reward", "ppo", "resident")}
    there = found.pop("resident")
    apart = there["arrays"] - there["base"]
    copies = (there["active"] - apart) / there["base"]
    table = [
        [name, f"{f['rows']} x {f['width']}", f["measured"] / 1e6, f["predicted"] / 1e6, f["predicted"] / f["measured"]]
        + [f[part] for part in ("sampling_s", "scoring_s", "training_s", "sampled_tokens_per_s")]
        for name, f in found.items()
    ]
    ratio = found["ppo"]["measured"] / found["sft"]["measured"]
    columns = ["objective", "batch", "peak MB", "predicted MB", "ratio", "sampling s", "scoring s", "training s"]
    columns.append("sampled tokens/s")
    roles = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in there["roles"].items())
    held = f"in memory {there['active'] / 1e6:.1f} MB"
    print(f"base {there['base'] / 1e6:.1f} MB, roles {apart / 1e6:.1f} MB ({roles}; some still shared), {held}")
    print(f"the base is resident {copies:.3f} times; PPO's peak is {ratio:.2f} of SFT's")
    extra = {"job": {k: v for k, v in job.items() if k != "folder"}, "resident": there, "peak_of_sft": ratio}
    report("ppo-checkpointed" if args.checkpoint else "ppo", columns, table, {**extra, "copies_of_base": copies})
    assert apart <= sum(there["roles"].values()) + 1e5, "an array of the base is there twice"
    assert copies < 1.02, "the base is resident more than once"
    assert ratio <= MOST, f"PPO's peak is above {MOST} of SFT's"


if __name__ == "__main__":
    main()
