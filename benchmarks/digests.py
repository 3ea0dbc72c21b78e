"""Whether two commits train the same weights to the bit, and whether one resumes what the other began.

    python benchmarks/digests.py keep FOLDER       # at the commit before
    python benchmarks/digests.py compare FOLDER    # at the commit after: exit 1 where anything differs

`keep` makes a tiny model and rows in FOLDER, trains every recipe below for 12 steps, and once more for 6. `compare`
trains them again on the same model and rows, and resumes a copy of the run of 6 steps to 12. The numbers are those of
this machine's kernels, so both commits are to run on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import TINY, WORDS, make_model

STEPS, HALF = 12, 6
REWARD = """def reward(prompts, completions, rows):
    return [c.count("time") - 0.1 * len(c.split()) for c in completions]
"""
FORMATS = {"sft": "prompt-completion", "pairs": "preference", "labels": "unpaired", "prompts": "prompts"}
ROLLOUT = {"prompts": 4, "samples": 2, "max_tokens": 6}


def rows(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def words(low: int, high: int) -> str:
        return " " + " ".join(rng.choice(WORDS, rng.integers(low, high)))

    kinds: dict[str, list[dict[str, Any]]] = {"sft": [], "pairs": [], "labels": [], "prompts": []}
    for i in range(40):
        prompt = words(2, 12)
        kinds["sft"].append({"prompt": prompt, "completion": words(1, 9)})
        kinds["pairs"].append({"prompt": prompt, "chosen": words(1, 9), "rejected": words(1, 9)})
        kinds["labels"].append({"prompt": prompt, "completion": words(1, 9), "label": i % 3 > 0})
        kinds["prompts"].append({"prompt": prompt})
    for kind, made in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    (folder / "reward.py").write_text(REWARD, "utf-8")


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    def off(kind: str, **own: Any) -> dict[str, Any]:
        data = {"train": str(folder / f"{kind}.jsonl"), "format": FORMATS[kind], "valid": 0.2}
        return {"data": data, **own}

    def on(**own: Any) -> dict[str, Any]:
        data = {"train": str(folder / "prompts.jsonl"), "format": "prompts", "valid": 0.2}
        return {"data": data, "rollout": ROLLOUT, "rewards": {"function": f"{folder}/reward.py:reward"}, **own}

    full = {"tune": {"method": "full"}, "optim": {"lr": 1e-3}}
    return {
        "sft": off("sft", objective="sft"),
        "sft-packed": off("sft", objective="sft", batch={"tokens": 256, "accumulate": 2, "pack": True}),
        "sft-full": off("sft", objective="sft", **full),
        "sft-dropout": off("sft", objective="sft", tune={"rank": 4, "dropout": 0.1}),
        "dpo": off("pairs", objective="preference", preference={"loss": "dpo"}),
        "simpo": off("pairs", objective="preference", preference={"loss": "simpo"}),
        "orpo": off("pairs", objective="preference", preference={"loss": "orpo"}),
        "kto": off("labels", objective="preference", preference={"loss": "kto"}),
        "reward": off("pairs", objective="reward", reward={"centering": 0.01}),
        "ppo": on(objective="ppo", ppo={"epochs": 2, "minibatches": 2, "critic_warmup": 1}),
        "ppo-shared": on(objective="ppo", ppo={"epochs": 2, "minibatches": 2, "critic": "shared"}),
        "ppo-stops": on(objective="ppo", ppo={"epochs": 2, "minibatches": 2, "target_kl": 1e-5}),
        "grpo": on(objective="grpo", grpo={"epochs": 2, "minibatches": 2, "kl_coef": 0.05}),
        "grpo-again": on(objective="grpo", grpo={"epochs": 2, "minibatches": 2, "skip_equal": True, "resample": 1}),
        "rloo": on(objective="rloo", rloo={"epochs": 2, "minibatches": 2}),
        "reinforce": on(objective="reinforce", reinforce={"epochs": 1, "minibatches": 2}),
    }


def write_recipe(folder: Path, name: str, out: Path, steps: int) -> Path:
    """Write one recipe whose run is out/name; returns its path."""
    settings = recipes(folder)[name]
    settings = {"model": {"path": str(folder / "model")}, "tune": {"rank": 4}, "batch": {"tokens": 192}, **settings}
    settings["optim"] = {"lr": 3e-3, "schedule": "constant", "warmup": 0, **settings.get("optim", {})}
    settings["run"] = {"dir": str(out), "name": name, "steps": steps, "save_every": HALF, "eval_every": HALF, "seed": 3}
    recipe = out / f"{name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps(settings), "utf-8")
    return recipe


def train(folder: Path, name: str, out: Path, steps: int, resume: bool = False) -> Path:
    """Train one recipe into out/name, by the command line; returns the run folder."""
    recipe = write_recipe(folder, name, out, steps)
    command = [sys.executable, "-m", "mlxft", "train", str(recipe), *(["--resume"] if resume else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return out / name


def weights(run: Path) -> dict[str, np.ndarray]:
    """Every weight that the run left, by file and name; of bfloat16 its float32."""
    import mlx.core as mx

    found = {}
    for place in ("adapter", "model"):
        for file in sorted((run / place).glob("*.safetensors")):
            for name, value in mx.load(str(file)).items():  # type: ignore[union-attr]
                found[f"{file.name}:{name}"] = np.array(
                    value.astype(mx.float32) if value.dtype == mx.bfloat16 else value
                )
    assert found, f"{run} has no weights"
    return found


def digest(found: dict[str, np.ndarray]) -> str:
    h = hashlib.sha256()
    for name in sorted(found):
        h.update(name.encode() + found[name].tobytes())
    return h.hexdigest()[:16]


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest difference of any weight; infinite where the names differ."""
    if a.keys() != b.keys():
        return float("inf")
    return max(float(np.abs(a[name].astype(np.float64) - b[name]).max()) for name in a)


def losses(run: Path) -> list[Any]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [
        [e["event"], e.get("step"), e.get("loss"), e.get("reward")] for e in events if e["event"] in ("train", "eval")
    ]


def inputs(folder: Path) -> None:
    """A tiny model and rows for every recipe."""
    sizes = {**TINY, "max_position_embeddings": 256, "vocab_size": 32}
    make_model(folder / "model", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes})
    rows(folder)


def keep(folder: Path) -> int:
    folder.mkdir(parents=True)
    inputs(folder)
    for name in recipes(folder):
        print(name, digest(weights(train(folder, name, folder / "whole", STEPS))), flush=True)
        train(folder, name, folder / "half", HALF)
    return 0


def compare(folder: Path, names: list[str]) -> int:
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        for name in names or recipes(folder):
            old = folder / "whole" / name
            kept = weights(old)
            new = train(folder, name, Path(place) / "whole", STEPS)
            half = Path(place) / "half"
            shutil.copytree(folder / "half" / name, half / name)
            resumed = weights(train(folder, name, half, STEPS, resume=True))
            apart = [difference(kept, weights(new)), difference(kept, resumed)]
            reports = losses(old) == losses(new)
            wrong += bool(any(apart) or not reports)
            print(
                f"{name:12} {digest(kept)} trained again: differs by {apart[0]:.1e}; resumed: {apart[1]:.1e}; "
                f"reported numbers {'equal' if reports else 'DIFFER'}",
                flush=True,
            )
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("keep", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="these recipes only")
    args = parser.parse_args()
    folder = args.folder.resolve()
    return keep(folder) if args.what == "keep" else compare(folder, args.names)


if __name__ == "__main__":
    sys.exit(main())
