"""Names of other tools lead to ours. The lists are written from those tools' documentation, not from mlxft's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.config import all_keys, config_class, load_config, parse_config
from mlxft.errors import ConfigError
from mlxft.foreign import explain_flag, tool_of
from mlxft.study.start import convert_recipe

# name: value -> what the error has to name; "-": it says that there is no equal, or that it is left out.
SETTINGS: list[tuple[str, Any, str]] = [
    # mlx_lm.lora
    ("iters", 600, "run.steps: 600"),
    ("batch_size", 4, "batch.rows: 4"),
    ("learning_rate", 1e-5, "optim.lr: 1e-05"),
    ("num_layers", 16, "tune.layers: 16"),
    ("num_layers", -1, "tune.layers: all"),
    ("max_seq_length", 512, "data.max_length: 512"),
    ("grad_checkpoint", True, "memory.checkpoint: on"),
    ("grad_accumulation_steps", 4, "batch.accumulate: 4"),
    ("steps_per_report", 10, "run.report_every: 10"),
    ("steps_per_eval", 200, "run.eval_every: 200"),
    ("save_every", 100, "run.save_every"),
    ("adapter_path", "adapters/mine", "run.name: mine"),
    ("resume_adapter_file", "a/adapters.safetensors", "model.adapter: a"),
    ("mask_prompt", True, "leave it out"),
    ("mask_prompt", False, "data.train_on: all"),
    ("fine_tune_type", "dora", "tune.method: dora"),
    ("optimizer", "adamw", "optim.name: adamw"),
    ("lora_parameters", {"rank": 8, "scale": 20.0, "dropout": 0.0}, "tune.scale: 20.0"),
    ("lr_schedule", {"name": "cosine_decay", "warmup": 100, "arguments": [1e-5, 1000, 1e-7]}, "optim.min_lr: 1e-07"),
    ("val_batches", 25, "-"),
    ("test", True, "-"),
    # TRL, transformers, PEFT
    ("model_name_or_path", "a/b", "model.path: a/b"),
    ("per_device_train_batch_size", 8, "batch.rows: 8"),
    ("per_device_eval_batch_size", 8, "-"),
    ("gradient_accumulation_steps", 2, "batch.accumulate: 2"),
    ("num_train_epochs", 3, "run.epochs: 3"),
    ("max_steps", 100, "run.steps: 100"),
    ("max_steps", -1, "leave it out"),
    ("warmup_ratio", 0.1, "optim.warmup: 0.1"),
    ("warmup_steps", 20, "optim.warmup: 20"),
    ("lr_scheduler_type", "cosine", "optim.schedule: cosine"),
    ("lr_scheduler_type", "constant_with_warmup", "optim.schedule: constant"),
    ("weight_decay", 0.1, "optim.weight_decay"),
    ("max_grad_norm", 0.5, "optim.clip: 0.5"),
    ("adam_beta2", 0.95, "optim.betas: [0.9, 0.95]"),
    ("adam_epsilon", 1e-6, "optim.eps: 1e-06"),
    ("optim", "adamw_torch_fused", "optim"),
    ("output_dir", "out/first", "run.name: first"),
    ("save_steps", 50, "run.save_every: 50"),
    ("save_total_limit", 3, "run.keep: 3"),
    ("eval_steps", 50, "run.eval_every: 50"),
    ("logging_steps", 5, "run.report_every: 5"),
    ("eval_strategy", "steps", "run.eval_every"),
    ("load_best_model_at_end", True, "-"),
    ("report_to", "wandb", 'report.to: ["wandb"]'),
    ("report_to", "none", "leave it out"),
    ("run_name", "x", "run.name: x"),
    ("bf16", True, "model.dtype: bfloat16"),
    ("fp16", True, "model.dtype: float16"),
    ("torch_dtype", "bfloat16", "model.dtype: bfloat16"),
    ("load_in_4bit", True, "model.quantize: 4"),
    ("load_in_8bit", True, "model.quantize: 8"),
    ("bnb_4bit_quant_type", "nf4", "model.quantize"),
    ("gradient_checkpointing", True, "memory.checkpoint: on"),
    ("group_by_length", True, "-"),
    ("dataset_text_field", "body", "data.fields: {"),
    ("dataset_num_proc", 4, "-"),
    ("packing", True, "batch.pack: true"),
    ("max_length", 1024, "data.max_length"),
    ("assistant_only_loss", True, "leave it out"),
    ("r", 16, "tune.rank: 16"),
    ("lora_alpha", 32, "tune.alpha: 32"),
    ("lora_dropout", 0.05, "tune.dropout: 0.05"),
    ("target_modules", ["q_proj", "v_proj"], 'tune.targets: ["q_proj", "v_proj"]'),
    ("target_modules", "all-linear", "tune.targets: all-linear"),
    ("modules_to_save", ["lm_head"], 'tune.train: ["lm_head"]'),
    ("use_rslora", True, "tune.rslora: true"),
    ("use_dora", True, "tune.method: dora"),
    ("bias", "none", "-"),
    ("task_type", "CAUSAL_LM", "-"),
    ("neftune_noise_alpha", 5, "tune.neftune: 5"),
    ("push_to_hub", True, "mlxft push"),
    ("resume_from_checkpoint", True, "--resume"),
    ("deepspeed", "ds.json", "mlxft launch"),
    ("attn_implementation", "flash_attention_2", "-"),
    ("beta", 0.1, "preference.beta: 0.1"),
    ("loss_type", "sigmoid", "preference.loss: dpo"),
    ("precompute_ref_log_probs", True, "preference.precompute: true"),
    ("num_generations", 8, "rollout.samples: 8"),
    ("max_completion_length", 256, "rollout.max_tokens: 256"),
    ("epsilon_high", 0.28, "grpo.clip_high: 0.28"),
    ("reward_funcs", ["len"], "rewards.function"),
    ("use_vllm", True, "-"),
    ("cliprange", 0.2, "clip: 0.2"),
    ("cliprange_value", 0.2, "ppo.value_clip: 0.2"),
    ("vf_coef", 0.1, "ppo.value_coef: 0.1"),
    ("num_ppo_epochs", 4, "epochs: 4"),
    ("missing_eos_penalty", 1.0, "rewards.missing_eos_penalty"),
    ("center_rewards_coefficient", 0.01, "reward.centering: 0.01"),
    # Axolotl
    ("base_model", "a/b", "model.path: a/b"),
    ("micro_batch_size", 2, "batch.rows: 2"),
    ("sequence_len", 4096, "data.max_length: 4096"),
    ("sample_packing", True, "batch.pack: true"),
    ("val_set_size", 0.05, "data.valid: 0.05"),
    ("num_epochs", 4, "run.epochs: 4"),
    ("lora_r", 8, "tune.rank: 8"),
    ("lora_target_linear", True, "tune.targets: all-linear"),
    ("adapter", "qlora", "model.quantize: 4"),
    ("lr_scheduler", "linear", "optim.schedule: linear"),
    ("cosine_min_lr_ratio", 0.1, "optim.min_lr"),
    ("train_on_inputs", False, "leave it out"),
    ("flash_attention", True, "-"),
    ("early_stopping_patience", 3, "run.patience: 3"),
    ("wandb_project", "p", "report.project: p"),
    ("special_tokens", {"pad_token": "x"}, "-"),
    ("rl", "dpo", "objective: preference"),
    ("saves_per_epoch", 1, "run.save_every"),
    ("evals_per_epoch", 4, "-"),
    ("chat_template_jinja", "t.jinja", "model.chat_template: t.jinja"),
    # LLaMA-Factory
    ("stage", "rm", "objective: reward"),
    ("finetuning_type", "lora", "tune.method: lora"),
    ("cutoff_len", 2048, "data.max_length: 2048"),
    ("lora_rank", 8, "tune.rank: 8"),
    ("lora_target", "q_proj,v_proj", 'tune.targets: ["q_proj", "v_proj"]'),
    ("quantization_bit", 4, "model.quantize: 4"),
    ("val_size", 0.1, "data.valid: 0.1"),
    ("pref_beta", 0.1, "preference.beta: 0.1"),
    ("pref_loss", "simpo", "preference.loss: simpo"),
    ("template", "qwen", "model.chat_template"),
    ("overwrite_output_dir", True, "--overwrite"),
    ("preprocessing_num_workers", 16, "-"),
    ("plot_loss", True, "-"),
    ("additional_target", ["embed_tokens"], "tune.train"),
    # Unsloth, torchtune, verl
    ("use_gradient_checkpointing", "unsloth", "memory.checkpoint: on"),
    ("random_state", 3407, "run.seed: 3407"),
    ("full_finetuning", True, "tune.method: full"),
    ("enable_activation_checkpointing", True, "memory.checkpoint: on"),
    ("kl_loss_coef", 0.001, "kl_coef: 0.001"),
    # command lines of all of them, by a newcomer's trial
    ("dora", True, "tune.method: dora"),
    ("wandb", "mine", 'report.to: ["wandb"] and report.project: mine'),
    ("no_remove_unused_columns", True, "leave it out"),
    ("no_use_peft", True, "tune.method: full"),
    ("lora_task_type", "CAUSAL_LM", "-"),
    ("dataset_streaming", True, "data.stream: true"),
    ("adafactor", True, "optim.name: adafactor"),
    ("temperature", 0.7, "rollout.temperature: 0.7"),
    ("label_smoothing", 0.1, "preference.label_smoothing: 0.1"),
    ("gradient_checkpointing_kwargs", {"use_reentrant": False}, "-"),
    ("neat_packing", True, "batch.pack: true"),
    ("early_stopping_steps", 3, "run.patience: 3"),
    ("checkpoint_dir", "/models/a", "model.path: /models/a"),
    ("batch_size_val", 2, "-"),
    ("lr_scheduler_kwargs", {"num_cycles": 1}, "optim.schedule"),
    ("noisy_embedding_alpha", 5, "tune.neftune: 5"),
    ("sequence_parallel_degree", 2, "mlxft launch"),
    ("freeze_vision_tower", True, "leave it out"),
    ("finetune_mlp_modules", True, "tune.layers"),
    ("save_method", "merged_16bit", "mlxft fuse"),
    ("clear_cache_threshold", 0, "memory.cache"),
    ("fp16_full_eval", True, "leave it out"),
    ("eval_accumulation_steps", 4, "-"),
    ("rope_scaling", {"type": "linear"}, "-"),
    ("lora_attn_modules", ["q_proj"], 'tune.targets: ["q_proj"]'),
]
HERE = {"weight_decay": "optim", "save_every": "run", "missing_eos_penalty": "rewards"}  # the same name as ours


@pytest.mark.parametrize(("name", "value", "said"), SETTINGS, ids=[f"{n}={v}"[:40] for n, v, _ in SETTINGS])
def test_another_tools_setting_names_ours_with_its_value(name: str, value: Any, said: str) -> None:
    """At the top of a recipe, and in a section of ours where it does not stand."""
    for section in (None, "memory"):
        placed = {name: value} if section is None else {section: {name: value}}
        raw = {"model": {"path": "m"}, "data": {"train": "x.jsonl"}, **placed}
        with pytest.raises(ConfigError) as wrong:
            parse_config(raw, "recipe.yaml")
        line = next(line for line in str(wrong.value).splitlines() if name in line)
        if name == "optim" and section is None:
            assert "is a section" in line
        elif said == "-":
            assert "no such setting; " in line
        else:
            assert said in line, line
        assert "did you mean" not in line or name in (*HERE, "optim", "max_length")


def test_what_the_errors_say_can_be_written() -> None:
    """The settings that errors name exist, and take the values."""
    recipe: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "x.jsonl"}}
    for text in ("optim.lr=1e-4", "tune.alpha=32", "batch.rows=8", "report.to=wandb", "memory.checkpoint=on"):
        key, value = text.split("=")
        section, leaf = key.split(".")
        recipe.setdefault(section, {})[leaf] = yaml.safe_load(value) if leaf != "checkpoint" else value
    assert parse_config(recipe, "recipe.yaml").report.to == ["wandb"]


TRAIN_FLAGS = {
    "--learning-rate": "optim.lr=0.5",
    "--lr": "optim.lr=0.5",
    "--iters": "run.steps",
    "--batch-size": "batch.rows",
    "--num-layers": "tune.layers",
    "--lora-layers": "tune.layers",
    "--adapter-path": "run.name",
    "--max-seq-length": "data.max_length",
    "--fine-tune-type": "tune.method",
    "--grad-checkpoint": "memory.checkpoint",
    "--save-every": "run.save_every",
    "--steps-per-eval": "run.eval_every",
    "--seed": "run.seed",
    "--mask-prompt": "only completions",
    "--optimizer": "optim.name",
    "--report-to": "no tracker",
    "--train": "mlxft train",
    "--num_train_epochs": "run.epochs",
    "--per_device_train_batch_size": "batch.rows",
    "--lora_r": "tune.rank",
    "--lora-alpha": "tune.alpha",
    "--output_dir": "run.name",
    "--load_in_4bit": "model.quantize",
    "--epochs": "run.epochs",
    "--config": "argument",
    "--rank": "tune.rank",
    "--val-batches": "validation",
}
USE_FLAGS = {
    ("generate", "--temp"): "--temperature",
    ("generate", "-t"): "--temperature",
    ("chat", "--temp"): "--temperature",
    ("generate", "--adapter-path"): "--adapter",
    ("chat", "--adapter-path"): "--adapter",
    ("generate", "--max-new-tokens"): "--max-tokens",
    ("generate", "--prompt"): "argument",
    ("generate", "-p"): "argument",
    ("generate", "--system-prompt"): "--system",
    ("generate", "-m"): "--model",
    ("generate", "--model-path"): "--model",
    ("generate", "--extra-eos-token"): "--stop",
    ("generate", "--ignore-chat-template"): "template",
    ("generate", "--kv-bits"): "cache",
    ("generate", "--draft-model"): "draft",
    ("generate", "--repetition-penalty"): "penalties",
    ("fuse", "--save-path"): "OUT",
    ("fuse", "--adapter-path"): "--adapter",
    ("fuse", "--de-quantize"): "--dequantize",
    ("fuse", "--export-gguf"): "mlxft export",
    ("fuse", "--upload-repo"): "mlxft push",
    ("convert", "--hf-path"): "SRC",
    ("convert", "--mlx-path"): "OUT",
    ("convert", "-q"): "--quantize",
    ("convert", "--q-bits"): "--quantize",
    ("convert", "--q-group-size"): "--group-size",
    ("eval", "--num-fewshot"): "--shots",
    ("eval", "--batch-size"): "--tokens",
    ("eval", "--output-path"): "--out",
    ("serve", "--model"): "MODEL",
    ("sample", "--num-samples"): "--n",
    ("push", "--commit-message"): "--message",
}


def test_another_tools_flags_name_ours(mlxft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for flag, said in TRAIN_FLAGS.items():
        found = mlxft("train", flag, "0.5")
        if found.code != 2 or said not in found.err:
            wrong.append((flag, said, found.err))
    for (command, flag), said in USE_FLAGS.items():
        found = mlxft(command, flag, "x")
        if found.code != 2 or said not in found.err:
            wrong.append((f"{command} {flag}", said, found.err))
    given = {("--lora_target_modules", "q_proj", "v_proj"): 'tune.targets=["q_proj", "v_proj"]'}
    given |= {("--quantize",): "model.quantize=4", ("--wandb",): 'report.to=["wandb"]', ("-o", "x"): "run.name=x"}
    given |= {("--no_use_peft",): "tune.method=full", ("--no-mask-prompt",): "data.train_on=all"}
    for flags, said in given.items():
        found = mlxft("train", *flags)
        if found.code != 2 or said not in found.err:
            wrong.append((" ".join(flags), said, found.err))
    assert not wrong


def test_a_flag_of_nobody_is_only_refused() -> None:
    assert explain_flag("--zzz", ["--json"], all_keys(config_class("sft"))) == ""


CONFIGS = {
    "mlx_lm.lora": {"model": "a/b", "train": True, "data": "folder", "iters": 100, "lora_parameters": {"rank": 8}},
    "Axolotl": {"base_model": "a/b", "datasets": [{"path": "x/y", "type": "alpaca"}], "lora_r": 8},
    "LLaMA-Factory": {"model_name_or_path": "a/b", "stage": "dpo", "dataset": "mine", "cutoff_len": 512},
    "TRL": {"model_name_or_path": "a/b", "dataset_name": "x/y", "per_device_train_batch_size": 2},
}
TAKEN = {"mlx_lm.lora": "tune.rank", "Axolotl": "tune.rank", "LLaMA-Factory": "data.max_length", "TRL": "batch.rows"}


@pytest.mark.parametrize("tool", CONFIGS)
def test_another_tools_file_becomes_a_recipe(
    tool: str, mlxft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` points to `init --from`, which writes a recipe that loads."""
    monkeypatch.chdir(tmp_path)
    assert tool_of(CONFIGS[tool]) == tool
    Path("theirs.yaml").write_text(yaml.safe_dump(CONFIGS[tool]))
    found = mlxft("train", "theirs.yaml")
    assert found.code == 2
    assert f"configuration of {tool}" in found.err
    assert "mlxft init --from theirs.yaml" in found.err
    Path("theirs.json").write_text(json.dumps(CONFIGS[tool]))
    made = mlxft("init", "--from", "theirs.json")
    assert made.code == 0, made.err
    config = load_config(Path("mlxft.yaml"))
    assert config.model.path == "a/b"
    assert config.objective == ("preference" if tool == "LLaMA-Factory" else "sft")
    rank = {"mlx_lm.lora": "tune.rank", "Axolotl": "tune.rank"}.get(
        tool, "data.max_length" if "cutoff_len" in CONFIGS[tool] else "batch.rows"
    )
    assert rank in made.out


def test_what_the_other_tool_does_unasked_is_written_out(
    mlxft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx_lm trains prompts too and adapts 16 layers; TRL's GRPO is known by its settings."""
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(yaml.safe_dump({"model": "a/b", "train": True, "data": "folder", "iters": 100}))
    assert mlxft("init", "--from", "theirs.yaml").code == 0
    config = load_config(Path("mlxft.yaml"))
    assert (config.data.train_on, config.tune.layers, config.optim.lr, config.optim.warmup) == ("all", 16, 1e-5, 0)
    Path("grpo.json").write_text(
        json.dumps({"model_name_or_path": "a/b", "dataset_name": "x/y", "num_generations": 4, "beta": 0.1})
    )
    assert mlxft("init", "--from", "grpo.json", "--out", "grpo.yaml").code == 0
    assert yaml.safe_load(Path("grpo.yaml").read_text())["grpo"]["kl_coef"] == 0.1


def test_a_broken_file_is_not_proposed_to_be_dropped(
    mlxft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stray.csv").write_text("question,answer\n" + "a,b\n" * 5 + 'c,"d\n' + "e,f\n" * 9)
    found = mlxft("init", "stray.csv", "--yes")
    assert found.code == 1
    assert "stray.csv:7" in found.err
    assert not Path("mlxft.yaml").exists()


CHAT = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {"role_tag": "role"}}
INFO = {
    "dpo": {"ranking": True, "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}},
    "kto": {**CHAT, "columns": {"messages": "messages", "kto_tag": "label"}},
    "own": {"columns": {"prompt": "frage", "query": "dazu", "response": "antwort"}},
    "chat": CHAT,
}
CHOSEN = {"field_messages": "conv", "field_chosen": "good", "field_rejected": "bad"}
MADE = {"field_instruction": "frage", "field_output": "antwort", "format": "[INST] {instruction} [/INST]"}
FROM_VALUE = {"field_messages": "turns", "message_property_mappings": {"role": "from", "content": "value"}}


@pytest.mark.parametrize(
    ("theirs", "objective", "form", "fields"),
    [
        ({"stage": "dpo", "dataset": "dpo"}, "preference", "preference", ("ask", "good", "bad")),
        ({"stage": "rm", "dataset": "dpo"}, "reward", "preference", ("ask", "good", "bad")),
        ({"stage": "kto", "dataset": "kto"}, "preference", "unpaired", ()),
        ({"stage": "sft", "dataset": "own"}, "sft", "alpaca", ("frage", "antwort", "dazu")),
        ({"stage": "sft", "dataset": "chat,own"}, "sft", "messages", ()),
        ({"stage": "pt", "dataset": "own"}, "sft", "text", ("frage",)),
        (
            {"rl": "dpo", "datasets": [{"type": "chat_template", **CHOSEN}]},
            "preference",
            "preference",
            ("conv", "good", "bad"),
        ),
        ({"reward_model": True, "datasets": [{"type": "bradley_terry.x"}]}, "reward", "preference", ()),
        ({"datasets": [{"type": MADE}]}, "sft", "prompt-completion", ("[INST] {frage} [/INST]", "antwort")),
        ({"datasets": [{"type": "chat_template", **FROM_VALUE}]}, "sft", "sharegpt", ("turns",)),
    ],
)
def test_columns_of_other_tools(
    theirs: dict[str, Any], objective: str, form: str, fields: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.json", **about} for name, about in INFO.items()})
    )
    theirs = (
        {**theirs, "datasets": [{"path": "rows.jsonl", **d} for d in theirs["datasets"]]}
        if "datasets" in theirs
        else theirs
    )
    model = (
        {"base_model": "a/b"} if "datasets" in theirs else {"model_name_or_path": "a/b", "dataset_dir": str(tmp_path)}
    )
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**model, **theirs}))
    found = convert_recipe(tmp_path / "theirs.yaml").settings
    assert found.get("objective", "sft") == objective
    assert found["data.format"] == form
    assert tuple(found.get("data.fields", {}).values()) == fields
    if theirs.get("dataset") == "chat,own":
        more = found["data.mix"]["more1"]
        assert (more["format"], *more["fields"].values()) == ("alpaca", "frage", "antwort", "dazu")
