"""mlxft train: every format and kind of file end to end, and every setting: it acts, or it raises."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml

from mlxft.config import Config, all_keys, config_class
from mlxft.runs import open_run

Command = Callable[..., Any]
Write = Callable[..., str]

FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "user", "content": "the in"}, {"role": "assistant", "content": "on"}]},
        {
            "messages": [
                {"role": "system", "content": "of"},
                {"role": "user", "content": "the in"},
                {"role": "assistant", "content": "it is"},
                {"role": "user", "content": "is"},
                {"role": "assistant", "content": "at"},
            ],
        },
    ],
    "prompt-completion": [{"prompt": "the in", "completion": "on"}, {"prompt": "of", "completion": "is at"}],
    "text": [{"text": "the in on of is"}, {"text": "is at"}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "in"}], "system": "of"}]
    * 2,
    "alpaca": [{"instruction": "the", "input": "in", "output": "on"}, {"instruction": "the", "output": "at"}],
}


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows in the kind of file that the name says. Returns its name."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, sorted({key for row in rows for key in row}), restval="")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(f"{json.dumps(row)}\n" for row in rows)
        path.write_text(text, "utf-8")
    return path.name


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return open_run(run).metrics(kind)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains(name: str, write: Write, mlxft: Command, tmp_path: Path) -> None:
    rows = FORMATS[name]
    recipe = write(**{"data.format": name, "data.train": save(tmp_path / "r.jsonl", rows), "run.steps": 2})
    done = mlxft("train", recipe)
    assert (done.code, done.err) == (0, "")
    start, end = events(tmp_path / "runs" / "a", "start")[0], events(tmp_path / "runs" / "a", "train")[-1]
    assert (start["data"]["rows"], start["steps"], end["step"]) == (2, 2, 2)
    assert 0 < start["data"]["trained tokens"] < start["data"]["tokens"]
    assert (tmp_path / "runs" / "a" / "adapter" / "adapters.safetensors").stat().st_size > 0


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_run(kind: str, write: Write, mlxft: Command, tmp_path: Path) -> None:
    rows = FORMATS["prompt-completion"]
    settings = {"data.format": "prompt-completion", "run.steps": 1}
    weights = []
    for run, file in (("a", "r.jsonl"), ("b", f"other.{kind}")):
        recipe = write(f"{run}.yaml", **settings, **{"data.train": save(tmp_path / file, rows), "run.name": run})
        assert mlxft("train", recipe).code == 0
        weights.append((tmp_path / "runs" / run / "adapter" / "adapters.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("valid", ["valid", "validation", "dev"])
def test_a_folder_brings_its_validation_rows(valid: str, write: Write, mlxft: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    save(tmp_path / "data" / "train.jsonl", FORMATS["text"] * 2)
    save(tmp_path / "data" / f"{valid}.json", FORMATS["text"][:1])
    assert mlxft("train", write(**{"data.train": "data", "data.format": "text", "run.steps": 1})).code == 0
    data = events(tmp_path / "runs" / "a", "start")[0]["data"]
    assert (data["rows"], data["validation rows"]) == (4, 1)
    assert [e["step"] for e in events(tmp_path / "runs" / "a", "eval")] == [1]


def test_a_share_is_split_off_and_fields_have_other_names(write: Write, mlxft: Command, tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in FORMATS["prompt-completion"]] * 5
    changes = {"data.train": save(tmp_path / "r.csv", rows), "data.format": "prompt-completion", "data.valid": 0.2}
    recipe = write(**changes, **{"data.fields": {"prompt": "q", "completion": "a"}, "run.steps": 1})
    assert mlxft("train", recipe).code == 0
    data = events(tmp_path / "runs" / "a", "start")[0]["data"]
    assert (data["rows"], data["validation rows"]) == (8, 2)


def test_overrides_beat_the_recipe_and_config_yaml_says_what_won(write: Write, mlxft: Command, tmp_path: Path) -> None:
    recipe = write(**{"tune.alpha": 4})
    overrides = ["run.epochs=0.5", "tune.scale=3", "batch.tokens=60", "optim.lr=2e-3", "run.name=b"]
    assert mlxft("train", recipe, *overrides).code == 0
    won = yaml.safe_load((tmp_path / "runs" / "b" / "config.yaml").read_text())
    assert (won["run"]["epochs"], won["run"]["steps"]) == (0.5, None)
    assert (won["tune"]["scale"], won["tune"]["alpha"]) == (3, None)
    assert (won["batch"]["tokens"], won["batch"]["rows"]) == (60, None)
    assert (won["optim"]["lr"], won["data"]["train"]) == (0.002, str(tmp_path / "rows-10.jsonl"))
    assert mlxft("train", "--resume", "runs/b").code == 0, "config.yaml is a recipe"


@pytest.mark.parametrize(
    "changes",
    [
        {"tune": {"method": "full", "layers": 1}},
        {"model.quantize": 4, "model.group_size": 32},
        {"optim.name": "sgd", "optim.momentum": 0.5},
        {"data.format": "text", "data.train": "text.jsonl", "data.overflow": "split"},
        {"model.adapter": "runs/first", "tune": None},
    ],
)
def test_config_yaml_is_a_recipe_for_the_same_run(
    changes: dict[str, Any], write: Write, mlxft: Command, tmp_path: Path
) -> None:
    save(tmp_path / "text.jsonl", FORMATS["text"])
    if "model.adapter" in changes:
        assert mlxft("train", write("first.yaml", **{"run.name": "first", "run.steps": 1})).code == 0
    assert mlxft("train", write(**changes, **{"run.steps": 1})).code == 0
    config = tmp_path / "runs" / "a" / "config.yaml"
    again = mlxft("train", str(config), "run.name=again")
    assert (again.code, again.err) == (0, "")
    results = [next((tmp_path / "runs" / r).glob("*/*.safetensors")).read_bytes() for r in ("a", "again")]
    assert results[0] == results[1]
    assert mlxft("train", "--resume", "runs/a").code == 0


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that a setting may change."""
    found = open_run(run)
    train, start = found.metrics("train"), found.metrics("start")[0]
    file = next(found.result.glob("*.safetensors"))
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    about = json.loads((found.result / "adapter_config.json").read_text()) if found.result.name == "adapter" else {}
    return {
        "weights": file.read_bytes(),
        "names": sorted(arrays),
        "dtypes": {str(a.dtype) for a in arrays.values()},
        "scale": about.get("lora_parameters", {}).get("scale"),
        "trainable": start["trainable_parameters"],
        "data": {k: v for k, v in start["data"].items() if not isinstance(v, float)},
        "losses": [e["loss"] for e in train],
        "lrs": [e["lr"] for e in train],
        "tokens": train[-1]["trained_tokens"],
        "reports": [e["step"] for e in train],
        "steps": start["steps"],
        "evals": [e["step"] for e in found.metrics("eval")],
        "end": found.metrics("end")[0]["step"],
        "samples": [e["prompt"] for e in found.metrics("sample")],
        "answers": [len(e["answer"]) for e in found.metrics("sample")],
        "checkpoints": sorted(p.name for p in (run / "checkpoints").glob("step-*")),
    }


VALID = {"data.valid": 0.2}
PAIRS = {"data.train": "pairs.jsonl", "data.format": "prompt-completion"}
AGAINST = {"data.valid": "against.jsonl", "optim.lr": 0.03, "optim.warmup": 0, "optim.schedule": "constant"}
TEXT = {"data.train": "text.jsonl", "data.format": "text"}
QUANTIZED = {"model.quantize": 4, "model.group_size": 32}
FULL = {"tune": {"method": "full"}}
EPOCH = {"run.steps": None, "run.epochs": 1}

# setting -> (settings of both runs, the value of the second, what must differ, and what it must be where that is known)
ACTS: dict[str, tuple[dict[str, Any], Any, str, Any]] = {
    "model.path": ({}, "wide", "trainable", None),
    "model.dtype": ({**FULL, "model.dtype": None}, "bfloat16", "dtypes", {"mlx.core.bfloat16"}),
    "model.quantize": (QUANTIZED, 8, "losses", None),
    "model.group_size": (QUANTIZED, 64, "losses", None),
    "model.adapter": ({"tune": None}, "runs/base", "losses", None),
    "model.chat_template": ({}, "chat.jinja", "data", None),
    "tune.method": ({}, "dora", "names", None),
    "tune.rank": ({}, 2, "trainable", 2048),
    "tune.scale": ({}, 3.0, "scale", 3.0),
    "tune.alpha": ({}, 6.0, "scale", 1.5),
    "tune.rslora": ({}, True, "scale", 8.0),
    "tune.dropout": ({}, 0.5, "losses", None),
    "tune.quantize_aware": ({}, 4, "losses", None),
    "tune.lora_plus": ({}, 4.0, "weights", None),
    "tune.neftune": ({}, 5.0, "losses", None),
    "tune.targets": ({}, ["q_proj"], "trainable", 2 * 4 * (32 + 32)),
    "tune.layers": ({}, 1, "trainable", 2048),
    "tune.train": ({}, ["model.norm"], "trainable", 4096 + 32),
    "tune.freeze": ({**FULL}, ["embed_tokens"], "trainable", None),
    "data.train": (PAIRS, "more.jsonl", "data", None),
    "data.valid": ({}, 0.2, "evals", [4]),
    "data.mix": ({}, {"more": {"path": "mixed.jsonl"}}, "data", None),
    "data.format": ({"data.train": "both.jsonl"}, "text", "data", None),
    "data.fields": ({"data.train": "both.jsonl"}, {"messages": "dialog"}, "data", None),
    "data.max_length": ({"data.overflow": "drop"}, 30, "data", None),
    "data.overflow": ({**TEXT, "data.max_length": 6, "data.overflow": "drop"}, "split", "data", None),
    "data.train_on": ({}, "all", "data", None),
    "data.template": (PAIRS, "none", "data", None),
    "data.shots": ({}, 3, "data", None),
    "data.label": ({"data.train": "labelled.jsonl", "data.shots": 1}, "topic", "data", None),
    "batch.tokens": ({**EPOCH, "batch.rows": None, "batch.tokens": 200}, 60, "steps", None),
    "batch.rows": (EPOCH, 5, "steps", 2),
    "batch.accumulate": (EPOCH, 3, "steps", 2),
    "optim.name": ({}, "lion", "weights", None),
    "optim.lr": ({"optim.schedule": "constant", "optim.warmup": 0}, 0.5, "lrs", [0.5] * 4),
    "optim.schedule": ({"optim.warmup": 0}, "linear", "lrs", [0.01, 0.0075, 0.005, 0.0025]),
    "optim.warmup": ({"optim.schedule": "constant", "optim.warmup": 0}, 2, "lrs", [0.005, 0.01, 0.01, 0.01]),
    "optim.min_lr": ({"optim.schedule": "linear", "optim.warmup": 0}, 0.006, "lrs", [0.01, 0.009, 0.008, 0.007]),
    "optim.weight_decay": ({}, 0.9, "weights", None),
    "optim.betas": ({}, [0.5, 0.9], "weights", None),
    "optim.eps": ({}, 0.1, "weights", None),
    "optim.momentum": ({"optim.name": "sgd"}, 0.9, "weights", None),
    "optim.clip": ({}, 0.001, "weights", None),
    "optim.groups": ({}, [{"match": "*.lora_a", "scale": 0.1}], "weights", None),
    "run.name": ({}, "named", "folder", "named"),
    "run.dir": ({}, "elsewhere", "folder", "elsewhere"),
    "run.seed": ({}, 7, "weights", None),
    "run.steps": ({}, 3, "end", 3),
    "run.epochs": ({"run.steps": None}, 2, "end", 10),
    "run.report_every": ({}, 3, "reports", [3, 4]),
    "run.eval_every": (VALID, 3, "evals", [3, 4]),
    "run.eval_at_start": (VALID, True, "evals", [0, 4]),
    "run.save_every": ({"run.keep": 9}, 2, "checkpoints", ["step-2", "step-4"]),
    "run.keep": ({"run.save_every": 1}, 1, "checkpoints", ["step-4"]),
    # What is held out contradicts what is trained: the first validation is better than the second.
    "run.patience": ({**PAIRS, **AGAINST, "run.eval_every": 1, "run.steps": 9}, 1, "end", None),
    "run.sample_prompts": ({}, ["the in", "of"], "samples", ["the in", "of"]),
    "run.sample_tokens": ({"run.sample_prompts": ["the in"]}, 2, "answers", None),
}
# Proved elsewhere: objective (test_errors), code that a model brings (tests/model), packing (invariant), the token
# cache (tests/data), memory (tests/model); versions is not read, and says so.
ELSEWHERE = {"objective", "model.trust_remote_code", "versions", "batch.pack", "data.cache"}
ELSEWHERE |= {"data.stream"}  # tests/data/test_stream, tests/invariant/test_stream: the rows are the same
ELSEWHERE |= {"memory.checkpoint", "memory.limit", "memory.cache"}
ELSEWHERE |= {"memory.measure", "run.keep_awake"}  # tests/test_measure, tests/test_device
ELSEWHERE |= {"report.to", "report.project"}  # tests/trainer/test_trackers
ELSEWHERE |= {"run.compile"}  # tests/trainer/test_gradient
ELSEWHERE |= {"data.bad_rows"}  # tests/cli/test_rows: where it drops nothing, it changes nothing
ELSEWHERE |= {"data.date"}  # tests/cli/test_kept_template: of templates that write one
ELSEWHERE |= {"tune.router_aux"}  # of mixtures: tests/objectives/test_balance
ELSEWHERE |= {f"distributed.{name}" for name in ("ranks", "weights", "shard", "timeout")}  # tests/test_distributed
# tests/study/test_sweep
ELSEWHERE |= {f"sweep.{k}" for k in ("space", "metric", "direction", "sampler", "pruner", "grace", "trials", "time")}


def test_the_table_names_every_setting() -> None:
    assert {*ACTS, *ELSEWHERE} == set(all_keys(config_class("sft")))
    assert set(all_keys(Config)) <= {*ACTS, *ELSEWHERE}


@pytest.fixture(scope="session")
def wide(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("wide") / "wide", hidden_size=64, head_dim=16)


@pytest.mark.parametrize("setting", ACTS)
def test_every_setting_acts(setting: str, write: Write, mlxft: Command, tmp_path: Path, wide: Path) -> None:
    """Two runs that differ in one setting differ in what the setting is for."""
    common, value, aspect, wanted = ACTS[setting]
    save(tmp_path / "text.jsonl", FORMATS["text"])
    save(tmp_path / "pairs.jsonl", FORMATS["prompt-completion"])
    save(tmp_path / "more.jsonl", FORMATS["prompt-completion"] * 2)
    save(tmp_path / "mixed.jsonl", FORMATS["messages"])
    save(tmp_path / "against.jsonl", [{"prompt": "the in", "completion": "the.the.the"}])
    chats = [FORMATS["messages"][0]["messages"], FORMATS["messages"][1]["messages"]]
    save(tmp_path / "labelled.jsonl", [{**row, "topic": i} for i, row in enumerate(FORMATS["messages"])])
    save(tmp_path / "both.jsonl", [{"messages": chats[0], "dialog": chats[1], "text": "is at"}])
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    value = str(wide) if value == "wide" else value
    runs = []
    for name, changes in (("base", common), ("other", {**common, setting: value})):
        place = tmp_path / "runs" / name
        changes = {"run.name": name, **changes}
        if setting in ("run.name", "run.dir") and name == "other":
            place = tmp_path / "runs" / "named" if setting == "run.name" else tmp_path / "elsewhere" / name
        if setting == "run.steps":
            changes = {"run.epochs": None, **changes}
        done = mlxft("train", write(f"{name}.yaml", **changes))
        assert (done.code, done.err) == (0, "")
        runs.append({**outcome(place), "folder": str(place)})
    assert runs[0][aspect] != runs[1][aspect]
    if aspect == "folder":
        assert wanted in runs[1]["folder"]
    elif wanted is not None:
        assert runs[1][aspect] == (pytest.approx(wanted) if aspect in ("lrs", "scale") else wanted)
    if setting == "run.patience":
        assert runs[1]["end"] < runs[0]["end"] == 9


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor", "muon"])
def test_settings_of_each_optimiser_act_or_raise(name: str, write: Write, mlxft: Command, tmp_path: Path) -> None:
    """No optimiser takes a setting and leaves it aside."""
    plain = write("plain.yaml", **{"optim.name": name, "run.name": "plain", "run.steps": 3})
    assert mlxft("train", plain).code == 0
    before = outcome(tmp_path / "runs" / "plain")["weights"]
    for setting, value in (("weight_decay", "0.9"), ("betas", "[0.5, 0.6]"), ("eps", "0.01"), ("momentum", "0.5")):
        done = mlxft("train", plain, f"optim.{setting}={value}", "run.name=other", "--overwrite")
        if done.code == 2:
            assert f"{name} has no {setting}" in done.err
        else:
            assert done.code == 0, done.err
            assert outcome(tmp_path / "runs" / "other")["weights"] != before, f"{name}: {setting} did nothing"
