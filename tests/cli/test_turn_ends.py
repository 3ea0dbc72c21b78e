"""A base model whose EOS its chat template never writes: what ends a trained turn ends a completion everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxft.data.dataset import encode, encode_prompt
from mlxft.data.formats import Conversation
from mlxft.model.load import load
from mlxft.runs import load_run

Command = Callable[..., Any]
QA = [("in", "on"), ("the", "an the"), ("or", "or er"), ("he", "re")]
ROWS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in QA]


def set_eos(folder: Path) -> Path:
    """ChatML with EOS <|endoftext|>, id 0, as Qwen 2.5's base models have it."""
    for name, marks in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
        ("config.json", {"eos_token_id": 0}),
    ):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | marks), "utf-8")
    return folder


@pytest.fixture
def base(make_model_dir: Command, tmp_path: Path) -> str:
    return str(set_eos(make_model_dir(tmp_path / "base")))


def lines(file: str, rows: list[Any]) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_it_stops_after_its_answer(base: str, write: Command, mlxft: Command, tmp_path: Path) -> None:
    """Trained to answer, the model answers and stops: in generate, eval, samples of a run, rollouts and mlx_lm."""
    from mlx_lm import generate
    from mlx_lm import load as load_with_mlx_lm

    full = {"model.path": base, "tune": {"method": "full"}, "data.train": "qa.jsonl", "data.valid": "qa.jsonl"}
    how = {"batch.rows": 4, "optim.schedule": "constant", "run.steps": 150, "run.report_every": 150}
    how |= {"run.eval_every": 150, "run.sample_prompts": ["in"]}
    recipe = write(**full, **how)
    lines("qa.jsonl", ROWS)
    said = mlxft("check", recipe)
    assert "a turn ends with <|im_end|>, which was not among the EOS tokens (<|endoftext|>)" in said.out
    done = mlxft("train", recipe)
    assert done.code == 0, done.err
    (sample,) = [json.loads(line) for line in Path("runs/a/samples.jsonl").read_text("utf-8").splitlines()]
    assert sample["answer"] == "on"
    assert [mlxft("generate", "--model", "runs/a", "--max-tokens", "24", q).out for q, _ in QA] == [
        f"{a}\n" for _, a in QA
    ]
    done = mlxft("eval", "runs/a", "qa.jsonl", "--task", "exact_match", "--json")
    assert json.loads(done.out)["tasks"][0]["figures"]["exact_match"]["value"] == 1.0

    lines("prompts.jsonl", [{"prompt": q, "answer": a} for q, a in QA])
    grpo = {"objective": "grpo", "model.path": "runs/a/model", "data.train": "prompts.jsonl", "data.format": "prompts"}
    grpo |= {"data.max_length": 256, "rollout": {"prompts": 4, "samples": 2, "max_tokens": 24, "temperature": 0.01}}
    grpo |= {"rewards": {"rules": [{"kind": "exact_match", "field": "answer"}]}, "run.steps": 1, "run.name": "g"}
    done = mlxft("train", write("grpo.yaml", **grpo))
    assert done.code == 0, done.err
    events = [json.loads(line) for line in Path("runs/g/metrics.jsonl").read_text("utf-8").splitlines()]
    (step,) = [event for event in events if event["event"] == "train"]
    assert step["eos_share"] == 1.0
    assert step["reward"] == 1.0

    model, tokenizer = load_with_mlx_lm("runs/a/model")
    for q, a in QA:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)
        assert generate(model, tokenizer, prompt, max_tokens=24) == a


def test_every_way_out_knows_the_end(base: str, write: Command, mlxft: Command, tmp_path: Path) -> None:
    """The adapter's notes, the fused folder's two files, mlx_lm, GGUF's eot, Ollama's Modelfile, PEFT's message."""
    import gguf
    from mlx_lm import load as load_with_mlx_lm

    lines("qa.jsonl", ROWS)
    assert mlxft("train", write(**{"model.path": base, "data.train": "qa.jsonl"})).code == 0
    noted = json.loads(Path("runs/a/adapter/adapter_config.json").read_text("utf-8"))["mlxft"]["eos_tokens"]
    assert noted == ["<|endoftext|>", "<|im_end|>"]
    # On an adapter by itself, away from its run, as well.
    Path("runs/a/adapter").rename("moved")
    done = mlxft("fuse", "moved", "fused", "--force")
    assert done.code == 0, done.err
    for name in ("config.json", "generation_config.json"):
        assert json.loads(Path("fused", name).read_text("utf-8"))["eos_token_id"] == [0, 2]
    assert load_with_mlx_lm("fused")[1].eos_token_ids == {0, 2}
    done = mlxft("export", "moved", "a.gguf", "--format", "gguf", "--type", "f32")
    assert done.code == 0, done.err
    fields = gguf.GGUFReader("a.gguf").fields
    ids = [fields[f"tokenizer.ggml.{role}_token_id"].contents() for role in ("eos", "eot")]
    assert ids == [0, 2]
    assert mlxft("export", "moved", "ollama", "--format", "ollama", "--type", "f32").code == 0
    stops = [line for line in Path("ollama/Modelfile").read_text("utf-8").splitlines() if " stop " in line]
    assert stops == ['PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"']
    done = mlxft("export", "moved", "peft", "--format", "peft")
    assert "model.generate(..., eos_token_id=[0, 2])" in done.out + done.err


@pytest.mark.parametrize(
    ("objective", "format", "row"),
    [
        ("preference", "preference", {"prompt": "in", "chosen": "on", "rejected": "an"}),
        ("preference", "unpaired", {"prompt": "in", "completion": "on", "label": True}),
        ("grpo", "prompts", {"prompt": "in", "answer": "on"}),
    ],
)
def test_other_objectives_too(
    objective: str, format: str, row: dict[str, Any], base: str, write: Command, mlxft: Command
) -> None:
    changes = {"objective": objective, "model.path": base, "data.train": "r.jsonl", "data.format": format}
    if format == "unpaired":
        changes["preference"] = {"loss": "kto"}
    if objective == "grpo":
        changes |= {"rollout": {"prompts": 2, "samples": 2, "max_tokens": 4}, "data.max_length": 64}
        changes["rewards"] = {"rules": [{"kind": "exact_match", "field": "answer"}]}
    recipe = write(**changes)
    lines(
        "r.jsonl", [row, {**row, "prompt": "the", "label": False} if format == "unpaired" else {**row, "prompt": "the"}]
    )
    done = mlxft("check", recipe)
    assert done.code == 0, done.err
    assert done.out.count("a turn ends with <|im_end|>") == 1
    assert "turn_ends_with: <|im_end|>\n" in done.out


OPENS_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def test_asked_as_it_was_trained(make_model_dir: Command, write: Command, mlxft: Command, tmp_path: Path) -> None:
    """Rows without thoughts, and a generation prompt that opens one unless told not to: it is told so ever after."""
    base = make_model_dir(tmp_path / "base", vocab_size=302)
    tokenizer = load(str(base)).tokenizer
    tokenizer._tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(base)
    Path("opens.jinja").write_text(OPENS_THOUGHT, "utf-8")
    lines("qa.jsonl", ROWS)
    changes = {
        "model.path": str(base),
        "model.chat_template": "opens.jinja",
        "data.train": "qa.jsonl",
        "data.valid": "qa.jsonl",
    }
    full = {"tune": {"method": "full"}, "batch.rows": 4, "optim.schedule": "constant", "run.steps": 150}
    done = mlxft("train", write(**changes, **full, **{"run.report_every": 150, "run.eval_every": 150}))
    assert done.code == 0, done.err
    assert "enable_thinking: false" in done.out
    for model in ("runs/a", "runs/a/model"):
        assert mlxft("generate", "--model", model, "--max-tokens", "24", "in").out == "on\n"
    done = mlxft("eval", "runs/a", "qa.jsonl", "--task", "exact_match", "--json")
    assert json.loads(done.out)["tasks"][0]["figures"]["exact_match"]["value"] == 1.0

    assert mlxft("train", write(**changes, **{"run.name": "lora"})).code == 0
    about = json.loads(Path("runs/lora/adapter/adapter_config.json").read_text("utf-8"))["mlxft"]
    assert about["enable_thinking"] is False
    assert mlxft("fuse", "runs/lora/adapter", "fused", "--force").code == 0
    for model in ("runs/lora", "runs/lora/adapter", "fused"):
        tokenizer = load_run(model).tokenizer
        assert tokenizer.decode(encode_prompt("in", tokenizer)).endswith("<|im_start|>assistant\n")
        with_thoughts = [*ROWS[0]["messages"][:1], {**ROWS[0]["messages"][1], "reasoning_content": "Hm."}]
        (row,) = encode(Conversation(with_thoughts), tokenizer, "x", "assistant")
        assert tokenizer.decode(row.ids[row.trained].tolist()) == "<think>\nHm.\n</think>\non<|im_end|>"

    # Rows of both kinds: the template's own way, which opens a thought, stays.
    turns = ROWS[1]["messages"]
    lines("qa.jsonl", [*ROWS, {"messages": [turns[0], {**turns[1], "reasoning_content": "Hm."}]}])
    done = mlxft("train", write(**changes, **{"run.name": "both"}))
    assert "enable_thinking" not in done.out
    tokenizer = load_run("runs/both").tokenizer
    assert tokenizer.decode(encode_prompt("in", tokenizer)).endswith("<think>\n")
