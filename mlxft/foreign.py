"""Settings and flags of other tools, and what mlxft has for them: mlx_lm, TRL, PEFT, Axolotl, LLaMA-Factory, Unsloth, torchtune, verl.

Used to explain an unknown setting or flag, and by `mlxft init --from`. Names are from the tools' public documentation.
"""
# ruff: noqa: E501  a table's line is one entry

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

UNSEEN: Any = object()  # a value that is not known, as of a flag whose value was not read


class Translation(NamedTuple):
    """What mlxft has for another tool's setting.

    settings: our setting -> its value, or UNSEEN; empty if it is left out or mlxft has no equal.
    note: what differs, or why there is nothing to write.
    """

    settings: dict[str, Any]
    note: str = ""

    def say(self, sign: str = ": ") -> str:
        """Return what to write instead, with `sign` between a setting and its value."""
        found = [k if v is UNSEEN else f"{k}{sign}{_shown(v)}" for k, v in self.settings.items()]
        if not found:
            return self.note
        return f"mlxft has {' and '.join(found)}" + (f"; {self.note}" if self.note else "")


# --- settings ---------------------------------------------------------------------------------------------------------
# One line: our setting (or several: the first that the objective has is meant) | the others' names |
# how the value changes (a function below; without one it stays) | a note.

_TABLE = """
model.path | model model_name model_name_or_path base_model model_id pretrained_model_name_or_path base_model_name_or_path hf_path model_path actor_model_path name_or_path checkpoint_dir
model.adapter | lora_model_dir adapter_name_or_path resume_adapter_file peft_model_id checkpoint_path load_adapter | adapter
model.chat_template | chat_template_jinja chat_template_path | - | a Jinja file
model.quantize | load_in_4bit quantize_base qlora quantize | four
model.quantize | load_in_8bit | eight
model.quantize | quantization_bit q_bits bits
model.group_size | q_group_size quant_group_size
model.dtype | torch_dtype compute_dtype bnb_4bit_compute_dtype precision | dtype
model.dtype | bf16 pure_bf16 | bf16
model.dtype | fp16 | fp16
model.dtype | fp32 | fp32
tune.method | fine_tune_type finetuning_type train_type | method
tune.method | adapter peft_type peft_method | adapter_kind
tune.method | use_dora peft_use_dora dora | dora
tune.method | full_finetuning | full
tune.method | use_peft use_lora | peft
tune.rank | r lora_r lora_rank lora_dim peft_r peft_lora_r
tune.alpha | lora_alpha peft_lora_alpha
tune.scale | scale lora_scale
tune.rslora | use_rslora peft_use_rslora rank_stabilized
tune.dropout | lora_dropout peft_lora_dropout
tune.lora_plus | loraplus_lr_ratio loraplus_ratio
tune.neftune | neftune_noise_alpha noise_embedding_std neft_alpha noisy_embedding_alpha
tune.targets | target_modules lora_target_modules lora_target lora_targets lora_attn_modules keys target_parameters | targets
tune.targets | lora_target_linear apply_lora_to_mlp | linear
tune.layers | num_layers lora_layers num_lora_layers | layers | mlx_lm's num_layers counts from the last block
tune.layers | layers_to_transform peft_layers_to_transform
tune.train | modules_to_save lora_modules_to_save additional_target
tune.freeze | freeze_modules
tune.router_aux | router_aux_loss_coef moe_aux_loss_coef
data.train | data dataset datasets train_dataset dataset_name train_file train_files train_data dataset_path data_path data_files dataset_id hf_dataset dataset_dir data_dir pretraining_dataset source | data
data.valid | val_set_size val_size validation_split test_size eval_split_ratio | valid
data.valid | eval_dataset valid_dataset val_dataset validation_file eval_file test_datasets eval_data_path val_files
data.fields | column_map | none | our field: their column
data.fields | dataset_text_field text_column text_field text_feature | text_field
data.fields | prompt_feature prompt_column instruction_column prompt_key | prompt_field
data.fields | completion_feature completion_column response_column | completion_field
data.fields | chat_feature messages_column field_messages conversation_column | messages_field
data.max_length | max_seq_length max_seq_len sequence_len cutoff_len max_length model_max_length block_size context_length max_sequence_length | - | longer rows are an error, unless data.overflow says otherwise
data.overflow | truncation truncation_mode truncation_strategy excess_length_strategy | overflow
data.train_on | mask_prompt completion_only_loss train_on_responses_only train_on_prompt mask_inputs | masked
data.train_on | train_on_inputs train_on_input | unmasked
data.train_on | mask_history roles_to_train | last
data.shots | max_samples max_train_samples | none | data.shots draws so many rows (per label, where there are labels)
data.stream | streaming dataset_streaming
data.cache | overwrite_cache | none | mlxft encodes again what has changed; data.cache: false switches the cache off
data.bad_rows | invalid skip_invalid
batch.rows | per_device_train_batch_size micro_batch_size batch_size train_batch_size per_device_batch_size ppo_micro_batch_size_per_gpu per_gpu_train_batch_size
batch.rows | per_device_eval_batch_size eval_batch_size val_batch_size per_gpu_eval_batch_size batch_size_val | none | validation uses the batches of training (batch.rows or batch.tokens)
batch.tokens | max_tokens_per_batch max_token_len_per_gpu ppo_max_token_len_per_gpu
batch.accumulate | gradient_accumulation_steps grad_accumulation_steps accumulate_grad_batches
batch.pack | packing sample_packing packed pack_sequences neat_packing
optim.name | optim optimizer optimizer_name | optimizer
optim.name | adafactor | adafactor
optim.lr | learning_rate lr
optim.lr | embedding_learning_rate embedding_lr | none | a group: optim.groups with {match: embed_tokens, lr: ...}
optim.schedule | lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type | schedule
optim.warmup | warmup_steps warmup_ratio num_warmup_steps lr_warmup_steps warmup_proportion
optim.min_lr | min_learning_rate
optim.min_lr | cosine_min_lr_ratio min_lr_ratio min_lr_rate | min_lr
optim.weight_decay | wd
optim.weight_decay | optimizer_config | optimizer_config
optim.betas | adam_beta1 adam_beta2 beta1 beta2 | betas
optim.eps | adam_epsilon adam_eps optim_eps
optim.clip | max_grad_norm gradient_clipping gradient_clip_val clip_grad_norm grad_clip max_norm clip_grad
run.steps | max_steps total_steps max_train_steps max_steps_per_epoch num_train_steps total_training_steps num_steps | positive
run.steps | iters num_iters iterations | iters | iters counts micro-batches, run.steps optimiser updates
run.epochs | num_train_epochs num_epochs n_epochs max_epochs total_epochs
run.eval_every | eval_steps steps_per_eval eval_interval run_val_every_n_steps test_freq | every
run.eval_every | evals_per_epoch | none | in steps; by default once an epoch
run.save_every | save_steps save_interval save_every_n_steps save_freq | every
run.save_every | saves_per_epoch | none | in steps, 100 by default
run.keep | save_total_limit keep_last_n_checkpoints
run.report_every | logging_steps steps_per_report log_every log_every_n_steps log_interval | every
run.patience | early_stopping_patience early_stopping_steps
run.eval_at_start | eval_on_start val_before_train
run.name | run_name experiment_name exp_name wandb_name wandb_run_name wandb_run_id
run.dir | output_dir adapter_path save_path output_path adapter_dir save_dir output_directory default_local_dir logging_dir o | folder | a run is the folder run.dir/run.name
run.seed | random_seed random_state data_seed seed_everything
run.compile | torch_compile compile
memory.checkpoint | gradient_checkpointing grad_checkpoint use_gradient_checkpointing activation_checkpointing enable_activation_checkpointing enable_gradient_checkpointing disable_gradient_checkpointing | checkpointing
report.to | report_to log_with logger use_tensorboard use_wandb use_mlflow use_swanlab | trackers
report.to | wandb tensorboard trackio mlflow | tracker
report.project | wandb_project project_name mlflow_experiment_name trackio_project swanlab_project
objective | stage rl trainer_type training_type algorithm adv_estimator train_mode rlhf_type | objective
preference.loss|grpo.loss | pref_loss loss_type dpo_cpo_loss_type | loss
preference.beta|grpo.kl_coef|rloo.kl_coef|reinforce.kl_coef|online_dpo.kl_coef|ppo.kl_coef|distill.beta | beta rl_beta pref_beta dpo_beta orpo_alpha orpo_beta kto_beta
ppo.kl_coef|grpo.kl_coef|rloo.kl_coef|reinforce.kl_coef|online_dpo.kl_coef | init_kl_coef kl_coef kl_loss_coef kl_coefficient
preference.label_smoothing | cdpo_label_smoothing dpo_label_smoothing label_smoothing_factor label_smoothing
preference.gamma | simpo_gamma
preference.gamma | gamma_beta_ratio | gamma
preference.nll | rpo_alpha pref_ftx sft_weight cpo_alpha
preference.good_weight | desirable_weight kto_desirable_weight kto_chosen_weight
preference.bad_weight | undesirable_weight kto_undesirable_weight kto_rejected_weight
preference.precompute | precompute_ref_log_probs rl_precompute
reward.centering | center_rewards_coefficient
rewards.adapter | reward_model reward_model_path reward_adapter reward_model_adapters
rewards.function | reward_funcs reward_functions reward_fn custom_reward_function | reward_functions | as file.py:name, called with (prompts, completions, rows)
rewards.clip | reward_clip
rewards.missing_eos_penalty | non_eos_penalty missing_eos_penalty
rewards.normalize | normalize_reward use_score_norm reward_norm | rewards_normal
rollout.samples | num_generations num_return_sequences rloo_k group_size_rollout n_samples_per_prompt rollout_n
rollout.prompts | rollout_batch_size train_prompt_bsz prompts_per_step generation_batch_size
rollout.max_tokens | max_completion_length max_new_tokens response_length max_tokens max_response_length max_output_tokens
rollout.rows | local_rollout_forward_batch_size rollout_micro_batch_size
rollout.temperature | temperature
rollout.top_p | top_p
rollout.top_k | top_k
rollout.min_p | min_p
rollout.stop | stop_words stop_sequences stop_token
grpo.clip|ppo.clip | epsilon cliprange clip_range clip_ratio clip_eps clip_ratio_low epsilon_low
grpo.clip_high | epsilon_high clip_ratio_high
grpo.epochs|ppo.epochs|rloo.epochs | num_iterations ppo_epochs num_ppo_epochs mu
grpo.scale | scale_rewards | none
grpo.ratio | importance_sampling_level | ratio
grpo.mask_truncated | mask_truncated_completions
ppo.minibatches|grpo.minibatches|rloo.minibatches | num_mini_batches num_minibatches
ppo.value_clip | cliprange_value value_clip_range vf_clip
ppo.value_coef | vf_coef value_loss_coef
ppo.lam | gae_lambda lambd
ppo.whiten | whiten_advantages ppo_score_norm | none | ppo.whiten: advantages are whitened by default
ppo.whiten | whiten_rewards ppo_whiten_rewards | none | advantages are whitened (ppo.whiten), rewards can be normalised (rewards.normalize)
ppo.kl_target|grpo.target_kl | target ppo_target
ppo.kl_horizon | horizon
ppo.critic_lr | critic_learning_rate value_lr critic_lr
ppo.critic_warmup | critic_warmup_steps value_warmup
ppo.entropy_coef | ent_coef entropy_coeff entropy_coef
ppo.dual_clip | clip_ratio_c
distill.teacher | teacher_model_name_or_path teacher_model teacher_path kd_teacher
distill.on_policy | lmbda
distill.temperature | kd_temperature
environment.path | environment_factory env_id environment_name
"""

# Settings without an equal here: the names, and what there is or why there is nothing.
_NONE = """
device_map device no_cuda use_cpu use_mps_device tf32 local_rank ddp ddp_backend ddp_timeout ddp_find_unused_parameters tpu_num_cores past_index jit_mode_eval torchdynamo torch_compile_backend torch_compile_mode low_cpu_mem_usage torchdistx_path : MLX uses the Mac's GPU; leave it out
deepspeed fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap tensor_parallel_size tensor_parallel_dim num_processes n_gpus_per_node nnodes world_size context_parallel_size use_fsdp nproc_per_node num_gpus num_machines machine_rank rdzv_endpoint custom_sharded_layers accelerator_config parallelism_config sequence_parallel_degree heads_k_stride ddp_bucket_cap_mb vllm_tensor_parallel_size ds3_gather_for_generation : several Macs: mlxft launch, and the section distributed; leave it out
flash_attention flash_attn use_flash_attention_2 attn_implementation sdp_attention xformers_attention sdpa use_liger_kernel enable_liger_kernel liger_rope liger_rms_norm use_cce use_unsloth unsloth_vllm_standby fast_inference use_fast_kernels flash_attn_cross_entropy flash_attn_rms_norm liger_kernel_config lora_mlp_kernel lora_qkv_kernel lora_o_kernel s2_attention fused : MLX has its own attention and fused kernels; leave it out
bnb_4bit_quant_type bnb_4bit_use_double_quant double_quantization quantization_method use_exllama gptq load_in_16bit llm_int8_threshold bnb_config_kwargs quantization_config use_bnb_nested_quant bnb_4bit_quant_storage de_quantize : the base is quantised by MLX: model.quantize and model.group_size
dataset_num_proc dataset_processes dataloader_num_workers dataloader_pin_memory preprocessing_num_workers dataset_prepared_path dataset_kwargs dataloader_drop_last dataset_batch_size preprocessing_batch_size num_workers shuffle dataset_keep_in_memory shuffle_dataset shuffle_merged_datasets disable_shuffling skip_prepare_dataset dataset_shard_num dataloader_prefetch_factor dataloader_persistent_workers tokenized_path buffer_size total_num_tokens : rows are encoded once, cached, and shuffled by run.seed; leave it out
remove_unused_columns : columns that are not used are named in a note; leave it out
group_by_length length_column_name eval_packing pad_to_sequence_len pad_to_multiple_of padding_free padding_side padding packing_strategy eval_sample_packing max_packed_sequence_len min_sample_len label_pad_token_id ignore_pad_token_for_loss label_names : rows of similar length share a batch anyway, and padding is not trained; leave it out
eval_strategy evaluation_strategy save_strategy logging_strategy do_eval logging_first_step save_only_model save_safetensors : run.eval_every, run.save_every and run.report_every are in steps
load_best_model_at_end metric_for_best_model greater_is_better save_best : the weights with the best validation loss are kept in adapter/ anyway; leave it out
train do_train do_predict test predict_with_generate do_bench_eval eval_table_size eval_max_new_tokens eval_causal_lm_metrics compute_accuracy eval_num_beams batch_eval_metrics include_for_metrics : mlxft train trains; mlxft eval evaluates
val_batches test_batches max_eval_samples limit_val_batches : a validation reads all its rows; give data.valid fewer rows
resume_from_checkpoint auto_resume_from_checkpoints resume : mlxft train --resume RUN
overwrite_output_dir : mlxft train --overwrite
push_to_hub hub_model_id hub_token hub_strategy hub_private_repo upload_repo export_hub_model_id : after training: mlxft push RUN REPO
special_tokens tokens added_tokens_overrides resize_token_embeddings_to_32x resize_vocab add_tokens new_special_tokens : mlxft does not add tokens to a vocabulary
bias : adapters have no biases; leave it out
task_type inference_mode fan_in_fan_out lora_fan_in_fan_out init_lora_weights lora_init layer_replication megatron_config loftq_config use_pissa pissa_init eva_config lora_bias auto_mapping revision layers_pattern lora_on_cpu peft_layer_replication rank_pattern alpha_pattern lora_task_type peft_task_type exclude_modules megatron_core trainable_token_indices corda_config runtime_config use_qalora pissa_iter pissa_convert create_new_adapter max_lora_rank model_adapter_name ref_adapter_name : not for mlxft's LoRA; leave it out
plot_loss include_num_input_tokens_seen include_tokens_per_second log_level disable_tqdm prediction_loss_only ignore_data_skip log_on_each_node skip_memory_metrics profile debug log_peak_memory_stats include_effective_tokens_per_second include_tkps print_param_status logging_nan_inf_filter profiler metric_logger log_completions num_completions_to_print log_unique_prompts : metrics.jsonl and mlxft runs plot have it; leave it out
wandb_entity wandb_watch wandb_log_model wandb_mode hf_mlflow_log_artifacts swanlab_mode wandb_group wandb_tags wandb_run_group wandb_resume comet_api_key mlflow_tracking_uri trackio_space_id : set it in the tracker's own environment, such as WANDB_ENTITY
max_prompt_length max_target_length : data.max_length is that of the whole row
assistant_only_loss : every assistant turn is trained by default; leave it out (data.train_on: all trains all)
template chat_template tokenizer_name tokenizer_name_or_path tokenizer_type tokenizer tokenizer_config eos_token pad_token unk_token tokenizer_use_fast default_system_message use_chat_template prompt_template new_system_prompt conversation_style tool_format split_special_tokens fix_tokenizer eot_tokens train_on_eot : the model's own tokenizer and chat template are used (model.chat_template replaces the latter)
strict hf_use_auth_token use_auth_token token hf_token hf_hub_token model_revision hub_revision : run hf auth login once; leave it out
use_vllm vllm_mode vllm_gpu_memory_utilization vllm_server_host vllm_server_port vllm_server_base_url gpu_memory_utilization cache_implementation vllm_model_impl vllm_importance_sampling_correction use_transformers_paged infer_backend generation_kwargs : completions are sampled by MLX in the same process; leave it out
ref_model reference_model sync_ref_model ref_model_mixup_alpha ref_model_sync_steps ref_model_path force_use_ref_model reference_model_path ref_model_adapters ref_model_init_kwargs : the reference is what the policy starts from
reward_weights : give rewards.function several functions, each with its weight
ref_free reference_free : preference.loss: simpo, orpo or cpo need no reference
freeze_trainable_layers freeze_trainable_modules unfrozen_parameters freeze_extra_modules num_layer_trainable name_module_trainable finetune_language_layers finetune_attention_modules finetune_mlp_modules : tune.method: full with tune.train or tune.layers
optim_target_modules galore_target_modules use_galore galore_rank use_badam use_apollo lisa_n_layers relora_steps use_llama_pro s2_attn shift_attn mixture_of_depths flash_optimum optim_args optimizer_in_bwd galore_target use_adam_mini lisa_step_interval relora_warmup_steps : not there; tune.method: lora saves that memory
pair_wise_loss dataset_config dataset_config_name dataset_split dataset_train_split dataset_test_split train_split eval_split split subset : in data.train as hf:org/name:config:split
mix_strategy interleave_probs dataset_mixer : data.mix with a path and a weight for each source
enable_thinking reasoning : part of the rows and of the chat template
export_dir export_size export_device export_quantization_bit export_legacy_format save_method save_model save_gguf push_model hub_path save_adapter_weights_only checkpoint_files recipe_checkpoint : after training: mlxft fuse, mlxft export or mlxft push
model_init_kwargs model_type is_llama_derived_model is_mistral_derived_model base_model_config rope_scaling num_labels : the model's own config.json says it; leave it out
finetune_vision_layers freeze_vision_tower freeze_multi_modal_projector image_max_pixels image_min_pixels visual_inputs media_dir : mlxft trains language models on texts; leave it out
bf16_full_eval fp16_full_eval fp16_opt_level half_precision_backend upcast_layernorm upcast_lmhead_output fp8 : losses, adapters and what the optimiser keeps are float32, the base has model.dtype; leave it out
lr_scheduler_kwargs cosine_constant_lr_ratio lr_div_factor : a schedule is optim.schedule with optim.warmup and optim.min_lr
loraplus_lr_embedding : a group: optim.groups with {match: embed_tokens, lr: ...}
torch_empty_cache_steps clear_cache_threshold gpu_memory_limit auto_find_batch_size activation_offloading enable_activation_offloading gradient_checkpointing_kwargs gradient_checkpointing_use_reentrant : memory.limit, memory.cache and memory.checkpoint; batch.tokens: auto takes what fits
num_virtual_tokens prefix_projection encoder_hidden_size : mlxft trains by LoRA, DoRA or in full, not by prompt tokens
eval_delay eval_accumulation_steps eval_do_concat_batches eval_use_gather_object num_generations_eval use_legacy_prediction_loop save_on_each_node save_first_step full_determinism average_tokens_across_devices : leave it out
loss loss_weights f_divergence_type f_alpha_divergence_coef ld_alpha discopop_tau dpo_use_weighting use_dft_loss delta top_entropy_quantile : the loss is that of the objective (preference.loss, grpo.variant); this one is not there
train_from_scratch : mlxft fine-tunes models that are trained already
top_k_logits : distill.top_k
"""

# Sections of the others whose settings count as if they stood at the top.
_OUTER = ("lora_parameters", "lora_config", "lora", "peft_config", "peft", "training", "training_args", "training_arguments", "sft_config", "trainer", "args", "config", "trl", "model_args", "data_args", "optimizer_params", "dpo", "actor", "algorithm", "quantization", "checkpointer")  # fmt: skip
_TARGETS = {"all-linear", "all_linear", "all"}


class _Entry(NamedTuple):
    ours: tuple[str, ...]
    convert: str
    note: str


@cache
def _entries() -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for line in _TABLE.strip().splitlines():
        parts = [part.strip() for part in line.split(" | ")]
        ours, names, convert, note = parts + ["-", ""][len(parts) - 2 :]
        for name in names.split():
            found.setdefault(name, _Entry(tuple(ours.split("|")), convert, note))
    for line in _NONE.strip().splitlines():
        names, note = line.split(" : ", 1)
        for name in names.split():
            found.setdefault(name, _Entry((), "none", note))
    return found


def translate(name: str, value: Any, known: Collection[str], beside: Mapping[str, Any] = {}) -> Translation | None:
    """Return what mlxft has for another tool's setting, or None if no tool is known to have it.

    Args:
        name: the setting, perhaps with the sections that it stands in.
        value: its value, or UNSEEN.
        known: the settings of the objective, as all_keys() gives them; of several equals it decides which is meant.
        beside: the settings beside it, which some values depend on.
    """
    bare = name.rpartition(".")[2].strip("-").replace("-", "_").lower()
    entry = _entries().get(bare)
    if entry is None and bare.startswith("no_"):  # the other way round
        return translate(bare[3:], False if value in (True, UNSEEN) else value, known, beside)
    if entry is None:
        return None
    if not entry.ours:
        return Translation({}, entry.note)
    ours = next((setting for setting in entry.ours if setting in known), entry.ours[0])
    section = ours.partition(".")[0]
    needs = f"for objective: {_OWNERS[section]}" if section in _OWNERS and ours not in known else ""
    note = "; ".join(text for text in (needs, entry.note) if text)
    if value is UNSEEN or value is None or entry.convert in ("-", "none"):
        return Translation({ours: UNSEEN if value is None or entry.convert == "none" else value}, note)
    try:
        found = _CONVERT[entry.convert](value, {(leaf := name.rpartition(".")[2]): value, **beside, "": leaf})
    except (TypeError, ValueError, AttributeError):
        found = UNSEEN
    if isinstance(found, Translation):
        return found._replace(note="; ".join(text for text in (needs, found.note or entry.note) if text))
    return Translation({ours: found}, note)


def translate_all(settings: Mapping[str, Any], known: Collection[str]) -> Iterator[tuple[str, Any, Translation | None]]:
    """Yield each setting of another tool's, those in its sections too, with its value and what mlxft has for it."""
    for name, value in settings.items():
        name = str(name)
        if isinstance(value, Mapping) and (name in _OUTER or translate(name, value, known) is None):
            for below, inner, found in translate_all({**value}, known):
                yield f"{name}.{below}", inner, found
            continue
        found = translate(name, value, known, settings)
        if found is None:  # one of our own names, such as rank in lora_parameters
            ours = [key for key in known if key.rpartition(".")[2] == name]
            first = next(
                (key for key in ours if key.partition(".")[0] in ("tune", "optim", "run", "model", "data", "rollout")),
                "",
            )
            found = Translation({first: value}) if first else None
        yield name, value, found


def explain_setting(name: str, value: Any, known: Collection[str]) -> str:
    """Return what to write instead of an unknown setting or section, or an empty text if no tool is known to have it."""
    if isinstance(value, Mapping) and translate(name, value, known) is None:
        found = [each for _, _, each in translate_all(value, known) if each is not None and each.settings]
        parts = [
            f"{ours}: {_shown(given)}" for each in found for ours, given in each.settings.items() if given is not UNSEEN
        ]
        return f"; for what is below it mlxft has {', '.join(parts)}" if parts else ""
    one = translate(name, value, known)
    return "" if one is None else f"; {one.say()}"


def explain_objective(name: str) -> str:
    """Return what to write instead of a loss or trainer that is no objective here, or an empty text if it is unknown."""
    found = translate("rl", name, ())
    return "" if found is None or UNSEEN in found.settings.values() else f" ({found.say()})"


# --- whole files ------------------------------------------------------------------------------------------------------

_MLX_LM = {"lora_parameters", "fine_tune_type", "iters", "mask_prompt", "steps_per_eval", "steps_per_report", "val_batches"} | {"test_batches", "num_layers", "lora_layers", "adapter_path", "resume_adapter_file", "grad_checkpoint", "lr_schedule"}  # fmt: skip
_LLAMA_FACTORY = {"stage", "finetuning_type", "dataset_dir", "cutoff_len", "lora_target", "pref_loss", "template"}
_OURS = {"objective", "tune", "optim", "run", "batch"}


def tool_of(raw: Mapping[str, Any]) -> str | None:
    """Return the tool whose configuration a file is, or None."""
    if any(isinstance(raw.get(name), Mapping) for name in _OURS):
        return None
    names = {str(name) for name in raw}
    if "base_model" in names:
        return "Axolotl"
    if "model_name_or_path" in names and names & _LLAMA_FACTORY:
        return "LLaMA-Factory"
    if len(names & _MLX_LM) > 1 or (isinstance(raw.get("model"), str) and isinstance(raw.get("data"), str)):
        return "mlx_lm.lora"
    known = [name for name in names if name in _entries()]
    if "model_name_or_path" in names or "per_device_train_batch_size" in names or len(known) >= 5:
        return "TRL"
    return None


# --- flags ------------------------------------------------------------------------------------------------------------

# The others' flags of commands that use a model -> ours: the first that the command has is meant.
_FLAGS = """
--temperature | temp t sampling-temp
--model | model-path model-name model-name-or-path base-model m checkpoint hf-path ckpt model-id
--adapter | adapter-path lora lora-path adapter-name-or-path adapter-file peft adapter-name adapters
--max-tokens | max-new-tokens n-predict num-predict max-length tokens-to-generate max-gen-toks max-completion-tokens max-tokens-to-sample
--top-k | topk
--top-p | topp nucleus
--min-p | minp
--system | system-prompt system-message sys
--stop | extra-eos-token stop-words stop-sequences stop-token reverse-prompt
--batch | prompt-file prompts-file file f input-file
--samples --n | num-samples num-return-sequences n-samples num-completions
--limit | num-examples max-examples max-samples num-prompts
--shots | num-fewshot n-shot fewshot k-shot
--tasks --task | eval-tasks benchmark
--tokens | batch-size eval-batch-size per-device-eval-batch-size
--out | output output-path output-file output-dir o save save-path out-file result-dir mlx-path export-dir
--bits --quantize | q-bits q quantization quantize-bits load-in-4bit w-bits outtype
--group-size | q-group-size
--dequantize | de-quantize
--chat | apply-chat-template use-chat-template
--json | output-format format-json log-json
--trust-remote-code | trust-code
--format | data-format dataset-format chat-format
--max-length | max-seq-length max-model-len max-seq-len context-length cutoff-len
--host | server-name listen address ip
--port | server-port p
--overwrite | force overwrite-output-dir force-overwrite exist-ok
--licence | licence-name
--public | no-private
--message | commit-message m
--run | run-name run-id
"""
_FLAG_NOTES = {
    "prompt": "the prompt is an argument: mlxft generate \"...\"",
    "p": "the prompt is an argument: mlxft generate \"...\"",
    "data": "the file is an argument of the command",
    "dataset": "the file is an argument of the command",
    "test": "mlxft eval MODEL FILE evaluates",
    "upload-repo": "mlxft push RUN REPO",
    "push-to-hub": "mlxft push RUN REPO",
    "export-gguf": "mlxft export --format gguf RUN OUT",
    "gguf-path": "mlxft export --format gguf RUN OUT",
    "gguf": "mlxft export --format gguf RUN OUT",
    "draft-model": "mlxft decodes without a draft model",
    "num-draft-tokens": "mlxft decodes without a draft model",
    "kv-bits": "mlxft does not quantise the cache of keys and values",
    "kv-group-size": "mlxft does not quantise the cache of keys and values",
    "max-kv-size": "the cache grows with the completion; leave it out",
    "ignore-chat-template": "a text that is not to be a turn: mlxft eval --template none, and data.template: none in a recipe",
    "use-default-chat-template": "the model's own chat template is used; leave it out",
    "chat-template": "the model's own chat template is used; model.chat_template in a recipe replaces it",
    "chat-template-args": "the model's own chat template is used with its defaults",
    "verbose": "leave it out",
    "quiet": "leave it out",
    "repetition-penalty": "mlxft samples without penalties",
    "frequency-penalty": "mlxft samples without penalties",
    "presence-penalty": "mlxft samples without penalties",
    "device": "MLX uses the Mac's GPU; leave it out",
    "dtype": "the model's own type; in a recipe model.dtype",
    "hf-token": "run hf auth login once",
    "token": "run hf auth login once",
    "config": "the recipe is an argument: mlxft train recipe.yaml",
    "c": "the recipe is an argument: mlxft train recipe.yaml",
}  # fmt: skip


_OUT = next(line for line in _FLAGS.splitlines() if line.startswith("--out ")).split()[2:]


def explain_flag(flag: str, options: Collection[str], settings: Collection[str], value: Any = UNSEEN) -> str:
    """Return what mlxft has for another tool's flag, or an empty text.

    Args:
        options: the flags that the command has.
        settings: the settings that it takes as KEY=VALUE; empty if it takes none.
        value: what stands after the flag.
    """
    whole = flag.strip("-").replace("_", "-").lower()
    name = whole.removeprefix("no-")
    for line in _FLAGS.strip().splitlines():
        ours, names = (part.split() for part in line.split(" | "))
        here = next((option for option in ours if option in options), None)
        if here is not None and (name in names or f"--{name}" in ours):
            return f"; mlxft has {here}"
    if settings:
        if name in ("config", "c"):
            return f"; {_FLAG_NOTES[name]}"
        found = translate(whole, value, settings)
        if found is None and (ours := [key for key in settings if key.rpartition(".")[2] == name.replace("-", "_")]):
            found = Translation({ours[0]: UNSEEN if value is True else value})
        if found is not None:
            return f"; settings are given as KEY=VALUE: {found.say('=')}" if found.settings else f"; {found.note}"
    if name in _FLAG_NOTES:
        return f"; {_FLAG_NOTES[name]}"
    if not settings and name in _OUT:
        return "; OUT is an argument of the command"
    known = translate(name, UNSEEN, ())
    return f"; in a recipe, or as KEY=VALUE of mlxft train: {known.say()}" if known and known.settings else ""


_OWNERS = {
    name: name for name in ("preference", "reward", "grpo", "rloo", "reinforce", "ppo", "online_dpo", "distill")
} | {
    "rollout": "grpo, rloo, reinforce, ppo, online_dpo or distill",
    "rewards": "grpo, rloo, reinforce, ppo or online_dpo",
    "environment": "grpo, rloo, reinforce or ppo",
}


def _left_out(note: str) -> Translation:
    return Translation({}, f"{note}; leave it out")


def _truth(value: Any) -> bool:
    return value not in (False, 0, "", "false", "False", "no", "off", "none", None)


def _switched(ours: str, yes: Any, default: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Return a converter for a switch: on, it is `yes` of our setting; off, our default."""
    return lambda value, beside: Translation({ours: yes}) if _truth(value) and value != "auto" else _left_out(default)


def _adapter(value: Any, beside: Mapping[str, Any]) -> Any:
    path = Path(str(value))
    return str(path.parent) if path.suffix in (".safetensors", ".npz") else str(path)


def _method(value: Any, beside: Mapping[str, Any]) -> Any:
    if value == "freeze" and isinstance(last := beside.get("freeze_trainable_layers"), int):
        return Translation({"tune.method": "full", "tune.layers": abs(last)})
    found = {"lora": "lora", "qlora": "lora", "dora": "dora", "full": "full", "freeze": "full"}.get(
        str(value).lower(), UNSEEN
    )
    return Translation({"tune.method": found, "model.quantize": 4}) if str(value).lower() == "qlora" else found


def _dtype(value: Any, beside: Mapping[str, Any]) -> Any:
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
    name = str(value).removeprefix("torch.")
    name = names.get(name, name)
    return name if name in ("float32", "bfloat16", "float16", "auto") else UNSEEN


def _targets(value: Any, beside: Mapping[str, Any]) -> Any:
    if isinstance(value, str) and value.lower() not in _TARGETS and "," in value:
        value = [name.strip() for name in value.split(",")]
    if value in ("all-linear", "all_linear", "all", ["all"], ["all-linear"]):
        return "all-linear"
    return [str(name).rpartition(".")[2] for name in value] if isinstance(value, list) else str(value)


def _data(value: Any, beside: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return f"hf:{value}" if is_hub_id(value) else value
    return UNSEEN


def is_hub_id(name: str) -> bool:
    """Return whether a data set's name is one of the hub: two parts, and no such file or folder here."""
    return (
        name.count("/") == 1
        and not name.startswith((".", "~", "/"))
        and not Path(name).exists()
        and not Path(name).suffix
    )


def _overflow(value: Any, beside: Mapping[str, Any]) -> Any:
    if not isinstance(value, str):
        return "truncate" if value else "error"
    return {"drop": "drop", "truncate": "truncate", "split": "split", "delete": "drop"}.get(value, "truncate")


def _schedule(value: Any, beside: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):  # mlx_lm: {name: cosine_decay, warmup: 100, arguments: [1e-5, 1000, 1e-7]}
        name = str(value.get("name", ""))
        kind = "cosine" if "cosine" in name else "linear" if "linear" in name else "constant"
        settings: dict[str, Any] = {"optim.schedule": kind}
        if value.get("warmup"):
            settings["optim.warmup"] = value["warmup"]
        arguments = value.get("arguments") or []
        if arguments:
            settings["optim.lr"] = arguments[0]
        if kind == "cosine" and len(arguments) > 2:
            settings["optim.min_lr"] = arguments[2]
        return Translation(settings)
    kind = next((kind for kind in ("cosine", "linear", "constant") if kind in str(value).lower()), "cosine")
    return Translation({"optim.schedule": kind}, "" if kind == value else f"{value} has no equal of its own")


def _optimizer(value: Any, beside: Mapping[str, Any]) -> Any:
    names = ("adafactor", "lion", "muon", "sgd", "adamw", "adam")
    return next((name for name in names if name in str(value).lower()), UNSEEN)


def _optimizer_config(value: Any, beside: Mapping[str, Any]) -> Any:
    """Translate mlx_lm's {adamw: {weight_decay: 0.01, betas: [...]}}, the part of the optimiser that is used."""
    own = value.get(str(beside.get("optimizer", "adam"))) or {}
    ours = {
        "weight_decay": "optim.weight_decay",
        "betas": "optim.betas",
        "eps": "optim.eps",
        "momentum": "optim.momentum",
    }
    found = {ours[name]: given for name, given in own.items() if name in ours}
    return Translation(found) if found else _left_out("nothing in it for this optimiser")


def _betas(value: Any, beside: Mapping[str, Any]) -> Any:
    one, two = (beside.get(f"adam_{name}", beside.get(name)) for name in ("beta1", "beta2"))
    return [0.9 if one is None else one, 0.999 if two is None else two] if (one, two) != (None, None) else UNSEEN


def _iters(value: Any, beside: Mapping[str, Any]) -> Any:
    each = beside.get("grad_accumulation_steps") or beside.get("gradient_accumulation_steps") or 1
    return max(1, int(value) // int(each)) if int(value) > 0 else UNSEEN


def _folder(value: Any, beside: Mapping[str, Any]) -> Any:
    path = Path(str(value))
    return (
        Translation({"run.dir": str(path.parent), "run.name": path.name.lstrip(".")})
        if path.name.strip(".")
        else UNSEEN
    )


def _trackers(value: Any, beside: Mapping[str, Any]) -> Any:
    name = beside[""]
    if name.startswith("use_"):
        return [name.removeprefix("use_")] if _truth(value) else _left_out("no tracker is used by default")
    names = value if isinstance(value, list) else str(value).split(",")
    names = [one.strip() for one in names if one.strip() in ("wandb", "tensorboard", "trackio", "mlflow")]
    return names or _left_out("no tracker is used by default")


def _tracker(value: Any, beside: Mapping[str, Any]) -> Any:
    """Translate a tracker's name as a switch, or with the project as mlx_lm's --wandb."""
    to = {"report.to": [beside[""].strip("-")]}
    return Translation({**to, "report.project": value}) if isinstance(value, str) else Translation(to)


_OBJECTIVES = {
    "sft": "sft", "pt": "sft", "pretrain": "sft", "dpo": "preference", "ipo": "preference", "kto": "preference",
    "orpo": "preference", "simpo": "preference", "cpo": "preference", "rm": "reward", "reward": "reward", "reward_model": "reward", "grpo": "grpo",
    "gdpo": "grpo", "ppo": "ppo", "rloo": "rloo", "reinforce": "reinforce", "online_dpo": "online_dpo", "gkd": "distill",
    "gae": "ppo", "reinforce_plus_plus": "reinforce", "ipo_pair": "preference", "hinge": "preference", "rm_training": "reward",
    "reward_modeling": "reward", "reward_trainer": "reward", "distillation": "distill", "kd": "distill", "cpt": "sft", "lora": "sft",
    "continued_pretraining": "sft", "gspo": "grpo", "dapo": "grpo", "dr_grpo": "grpo", "cispo": "grpo",
}  # fmt: skip


def _objective(value: Any, beside: Mapping[str, Any]) -> Any:
    name = str(value).lower().removesuffix("trainer").replace("-", "_")
    found = _OBJECTIVES.get(name, UNSEEN)
    if found == "preference" and name != "dpo":
        return Translation({"objective": found, "preference.loss": name.removesuffix("_pair")})
    if name in ("gspo", "dapo", "dr_grpo", "cispo"):
        return Translation({"objective": found, "grpo.variant": name})
    return found


def _loss(value: Any, beside: Mapping[str, Any]) -> Any:
    name = str(value[0] if isinstance(value, list) and value else value).lower()
    names = {
        "sigmoid": "dpo",
        "kto_pair": "kto",
        "dpo": "dpo",
        "ipo": "ipo",
        "hinge": "hinge",
        "simpo": "simpo",
        "orpo": "orpo",
        "cpo": "cpo",
    }
    if name in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"):
        return Translation(
            {"grpo.variant": {"dr_grpo": "dr_grpo", "dapo": "dapo", "cispo": "cispo", "gspo": "gspo"}.get(name, "grpo")}
        )
    return Translation({"preference.loss": names.get(name, UNSEEN)})


_Fields = Callable[[Any, Mapping[str, Any]], Any]


def _field(name: str) -> _Fields:
    return lambda value, beside: {name: value}


_CONVERT: dict[str, _Fields] = {
    "adapter": _adapter,
    "adapter_kind": _method,
    "method": _method,
    "four": _switched("model.quantize", 4, "the base keeps its bits by default"),
    "eight": _switched("model.quantize", 8, "the base keeps its bits by default"),
    "dora": _switched("tune.method", "dora", "tune.method is lora by default"),
    "full": _switched("tune.method", "full", "tune.method is lora by default"),
    "peft": lambda value, beside: (
        _left_out("tune.method is lora by default") if _truth(value) else Translation({"tune.method": "full"})
    ),
    "dtype": _dtype,
    "bf16": _switched("model.dtype", "bfloat16", "model.dtype is the model's own on a GPU"),
    "fp16": _switched("model.dtype", "float16", "model.dtype is the model's own on a GPU"),
    "fp32": _switched("model.dtype", "float32", "model.dtype is the model's own on a GPU"),
    "targets": _targets,
    "linear": lambda value, beside: "all-linear" if _truth(value) else "attention",
    "layers": lambda value, beside: value if isinstance(value, list) or int(value) > 0 else "all",
    "data": _data,
    "valid": lambda value, beside: (
        _left_out("nothing is held out by default") if not value else value if 0 < value < 1 else UNSEEN
    ),
    "text_field": _field("text"),
    "prompt_field": _field("prompt"),
    "completion_field": _field("completion"),
    "messages_field": _field("messages"),
    "overflow": _overflow,
    "masked": lambda value, beside: (
        _left_out("only completions are trained by default") if _truth(value) else Translation({"data.train_on": "all"})
    ),
    "unmasked": lambda value, beside: (
        Translation({"data.train_on": "all"}) if _truth(value) else _left_out("only completions are trained by default")
    ),
    "last": lambda value, beside: (
        "last"
        if _truth(value) and not isinstance(value, list)
        else _left_out("every assistant turn is trained by default")
    ),
    "optimizer": _optimizer,
    "adafactor": _switched("optim.name", "adafactor", "optim.name is adamw by default"),
    "schedule": _schedule,
    "min_lr": lambda value, beside: float(value) * float(beside.get("learning_rate", beside.get("lr"))),
    "betas": _betas,
    "optimizer_config": _optimizer_config,
    "positive": lambda value, beside: int(value) if int(value) > 0 else _left_out("run.epochs decides"),
    "iters": _iters,
    "every": lambda value, beside: int(value) if float(value) >= 1 else UNSEEN,
    "folder": _folder,
    "checkpointing": lambda value, beside: "on" if _truth(value) != beside[""].startswith("disable") else "off",
    "trackers": _trackers,
    "tracker": _tracker,
    "objective": _objective,
    "loss": _loss,
    "gamma": lambda value, beside: float(value) * float(beside.get("beta", 2.0)),
    "reward_functions": lambda value, beside: value if isinstance(value, str) and ".py:" in value else UNSEEN,
    "rewards_normal": lambda value, beside: bool(_truth(value)),
    "ratio": lambda value, beside: value if value in ("token", "sequence") else UNSEEN,
}


def _shown(value: Any) -> str:
    """Return a value as it is written in YAML and after `=` on the command line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
