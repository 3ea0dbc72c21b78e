"""Adapters as PEFT holds them: adapter_config.json beside adapter_model.safetensors.

PEFT names a module as transformers does, below `base_model.model.`, and holds the transposes of mlx-lm's matrices:
lora_A (rank, in) and lora_B (out, rank); an embedding's are lora_embedding_A (rank, V) and lora_embedding_B (D, rank).
What it multiplies an update by is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.errors import ExportError, MlxftError, ModelError
from mlxft.export.sources import adapter_of
from mlxft.model.adapters import (
    LoRASpec,
    ask_as_trained,
    base_noted,
    load_adapter,
    read_adapter_config,
    template_of,
)
from mlxft.model.folder import check_destination, check_space, check_unused, replace_folder
from mlxft.model.heads import HEAD_FILE, Saved, check_pair, read_head
from mlxft.model.load import Loaded, load_tokenizer, skeleton
from mlxft.model.lora import EMBEDDING, LEAVES, QUANTIZED, SWITCH, LowRank
from mlxft.model.source import ALIASES, stated_name
from mlxft.rundir import find_adapter, open_run
from mlxft.trainer.files import flush, save_arrays

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Architectures whose modules have the same names in mlx-lm and in transformers, with the class that gives scores.
# Compared name by name and shape by shape: mlx-lm 0.32.2, transformers 5.23.
DENSE: dict[str, str | None] = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "ministral3": "Ministral3ForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "phi": "PhiForSequenceClassification",
    "phi3": "Phi3ForSequenceClassification",
    "smollm3": "SmolLM3ForSequenceClassification",
    "olmo2": "Olmo2ForSequenceClassification",
    "granite": None,
    "starcoder2": "Starcoder2ForSequenceClassification",
    "stablelm": "StableLmForSequenceClassification",
    "cohere": None,
    "cohere2": None,
    "glm": "GlmForSequenceClassification",
    "glm4": "Glm4ForSequenceClassification",
    "helium": "HeliumForSequenceClassification",
    "ernie4_5": None,
    "seed_oss": "SeedOssForSequenceClassification",
    "nemotron": "NemotronForSequenceClassification",
}
# Mixtures: transformers holds their experts and routers as single parameters, so only attention has a counterpart.
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class Opened:
    """An adapter on the shapes of its base; no weight of the base is read.

    Attributes:
        base: the name of the base, as it was trained on or as it was given.
        head: of a reward model.
        rslora: whether its run scaled by alpha / sqrt(rank).
    """

    folder: Path
    base: str
    about: dict[str, Any]
    loaded: Loaded
    spec: LoRASpec
    head: Saved | None
    rslora: bool

    @property
    def tied(self) -> bool:
        """Whether text comes out through the embedding."""
        return "lm_head" not in self.loaded.model


def open_adapter(run: Path, model: str | None) -> Opened:
    """The adapter of a run, or in a folder, checked against its base's names and shapes.

    Raises:
        ModelError: there is none, its base is missing or another one, or it does not fit.
    """
    folder = adapter_of(run)
    about = base_noted(read_adapter_config(folder))
    named = model or about.get("model")
    if named is None:
        raise ModelError(f"{folder} does not say which base it is for; name it with --model")
    base = model or stated_name(named)
    loaded = skeleton(base)
    spec = load_adapter(loaded.model, folder, loaded.fingerprint)
    if spec is None:
        raise ModelError(f"{folder}: holds whole weights (fine_tune_type full), not an adapter")
    head = None
    if (file := folder / HEAD_FILE).is_file():
        head = read_head(file)
        check_pair(file, head.weight)
    return Opened(folder, base, about, loaded, spec, head, _rslora(run))


def _rslora(run: Path) -> bool:
    """What the recipe says; an adapter's own folder says only what the update is multiplied by."""
    try:
        return (run / "config.yaml").is_file() and open_run(run).config.tune.rslora
    except MlxftError:
        return False


def check_names(config: dict[str, Any], paths: Sequence[str], model: nn.Module) -> None:
    """ExportError unless transformers has all of `paths` (modules of an mlx-lm model) under the same names."""
    kind = str(config["model_type"])
    if kind not in DENSE and kind not in MIXTURES:
        raise ExportError(
            f"PEFT: architecture {kind} is not among those whose modules are known to have the same names in "
            f"transformers ({', '.join([*DENSE, *MIXTURES])}); mlxft fuse writes a model in place of an adapter"
        )
    modules = dict(model.named_modules())
    for path in paths:
        inner = modules.get(path)
        base = inner.base if isinstance(inner, LowRank) else inner
        apart = kind in MIXTURES and ".layers." in path and ".self_attn." not in path and "norm" not in path
        if isinstance(base, SWITCH) or apart:
            raise ExportError(
                f"PEFT: {path} is part of a mixture of experts, which transformers holds as single parameters and "
                "not as layers that PEFT can adapt; adapt attention only (tune.targets), or fuse it (mlxft fuse)"
            )


def export_peft(run: Path, out: Path, *, model: str | None = None, overwrite: bool = False) -> list[str]:
    """Write a run's adapter as a folder that `peft.PeftModel.from_pretrained` loads; a reward model's as SEQ_CLS.

    Args:
        run: a run, or an adapter folder of mlxft or mlx-lm.
        model: the base, where the adapter does not say or it has moved; PEFT's config names it too.
    Returns:
        What was done, a sentence each.
    Raises:
        ModelError: no such adapter or base, or they do not belong together.
        ConfigError: `out` is there and may not be replaced.
        ExportError: what was adapted has no counterpart in transformers, or `out` can not be written.
    """
    check_destination(out, overwrite, "adapter")
    check_unused(out, [find_adapter(run)])
    opened = open_adapter(run, model)
    tensors, saved = peft_tensors(opened)
    config = peft_config(opened, saved)
    check_space(out, sum(v.nbytes for v in tensors.values()))
    tokenizer = load_tokenizer(opened.base, template_of(opened.folder))
    ends = ask_as_trained(tokenizer, opened.folder)
    pad = set_pad(tokenizer, opened.loaded.config) if opened.head is not None else None
    with replace_folder(out, "adapter") as part:
        save_arrays(part / WEIGHTS, tensors, {"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        tokenizer.save_pretrained(str(part))
        flush(part / WEIGHTS)
    kind = "DoRA" if opened.spec.dora else "rsLoRA" if config["use_rslora"] else "LoRA"
    also = f" and {', '.join(saved)} as a whole" if saved else ""
    said = (
        f"wrote {out}: {kind} of rank {opened.spec.rank} on {len(opened.spec.paths)} modules{also}, "
        f"lora_alpha {config['lora_alpha']:g}, for {opened.base}"
    )
    if ends and opened.head is None:
        ends = [
            *ends,
            f"transformers wants to be told: model.generate(..., eos_token_id={sorted(tokenizer.eos_token_ids)})",
        ]
    return [said, *ends, *_notes(opened, pad)]


def peft_tensors(opened: Opened) -> tuple[dict[str, mx.array], list[str]]:
    """The adapter's arrays by PEFT's names, and the modules that are in it as a whole (modules_to_save).

    Raises:
        ExportError: a module has no counterpart, or only a part of it was trained.
    """
    model = opened.loaded.model
    modules = dict(model.named_modules())
    trained = dict(tree_flatten(model.trainable_parameters()))
    whole: dict[str, list[str]] = {}
    for name in trained:
        owner, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            whole.setdefault(owner, []).append(leaf)
    check_names(opened.loaded.config, [*opened.spec.paths, *whole], model)
    tensors: dict[str, mx.array] = {}
    for path in opened.spec.paths:
        tensors |= _low_rank(path, modules[path], opened)
    for owner, leaves in whole.items():
        rest = sorted({leaf for leaf, _ in tree_flatten(modules[owner].parameters())} - set(leaves))
        if rest:
            raise ExportError(
                f"PEFT: of {owner} only {', '.join(leaves)} was trained, not {', '.join(rest)}; its modules_to_save "
                "are whole modules: name the whole one in tune.train, or fuse it (mlxft fuse)"
            )
        tensors |= {f"{PREFIX}{owner}.{leaf}": trained[f"{owner}.{leaf}"] for leaf in leaves}
    saved = list(whole)
    if "model.embed_tokens" in whole and opened.tied and opened.head is None:
        # PEFT trains a copy of the embedding; the output layer is tied to the one that stays.
        tensors[f"{PREFIX}lm_head.weight"] = trained["model.embed_tokens.weight"]
        saved.append("lm_head")
    if opened.head is not None:
        tensors[f"{PREFIX}score.weight"] = opened.head.weight.astype(mx.float32)
        saved.append("score")
    return tensors, saved


def _low_rank(path: str, layer: LowRank, opened: Opened) -> dict[str, mx.array]:
    name = PREFIX + path
    a, b = layer.lora_a, layer.lora_b
    if isinstance(layer.base, EMBEDDING):
        found = {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T}
        if opened.tied and opened.head is None:
            found |= {f"{PREFIX}lm_head.lora_A.weight": b, f"{PREFIX}lm_head.lora_B.weight": a}
        return {n: mx.contiguous(v) for n, v in found.items()}
    found = {f"{name}.lora_A.weight": a.T, f"{name}.lora_B.weight": b.T}
    if "m" in layer:
        found[f"{name}.lora_magnitude_vector"] = layer.m
    return {n: mx.contiguous(v) for n, v in found.items()}


def peft_config(opened: Opened, saved: Sequence[str]) -> dict[str, Any]:
    """adapter_config.json: what `peft.LoraConfig` reads, as far as it is not its default."""
    spec = opened.spec
    alpha = spec.scale * (math.sqrt(spec.rank) if opened.rslora else spec.rank)
    near = round(alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if opened.head is None else "SEQ_CLS",
        "base_model_name_or_path": opened.base,
        "r": spec.rank,
        "lora_alpha": near if math.isclose(alpha, near, rel_tol=1e-6) else alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": opened.rslora,
        "use_dora": spec.dora,
        "target_modules": _targets(opened),
        "modules_to_save": list(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _targets(opened: Opened) -> list[str]:
    """Short names (q_proj) where they hit what was trained and nothing else; else full ones, which PEFT takes too."""
    paths = set(opened.spec.paths)
    if opened.tied and opened.head is None and "model.embed_tokens" in paths:
        paths.add("lm_head")
    short = {path.rpartition(".")[2] for path in paths}
    there = {n for n, _ in opened.loaded.model.named_modules() if n.rpartition(".")[2] in short}
    return sorted(short if there <= paths else paths)


def set_pad(tokenizer: Any, config: dict[str, Any]) -> int | None:
    """Give the tokenizer a padding token that ends no row, and return its id; None where there is none.

    transformers pools at the last token that is not `pad_token_id`: padding with the end-of-turn token, as many
    tokenizers do, would make it read the token before the end.
    """
    plain = getattr(tokenizer, "_tokenizer", tokenizer)
    ends = set(tokenizer.eos_token_ids) | {plain.eos_token_id}
    special = {i: str(t) for i, t in plain.added_tokens_decoder.items() if t.special}
    named = [i for i, t in special.items() if "pad" in t.lower()]
    for i in [plain.pad_token_id, *named, plain.unk_token_id, *special]:
        if i is not None and i not in ends and i < config["vocab_size"]:
            plain.pad_token = plain.convert_ids_to_tokens(i)
            plain.padding_side = "right"
            return int(i)
    return None


def _notes(opened: Opened, pad: int | None) -> list[str]:
    """What whoever loads it has to know."""
    said = []
    packed = [m.base for _, m in opened.loaded.model.named_modules() if isinstance(m, LowRank)]
    bits = opened.about.get("quantize") or next((m.bits for m in packed if isinstance(m, QUANTIZED)), None)
    if bits:
        said.append(
            f"the base was quantised to {bits} bits in training: load the adapter on the float original; its answers "
            "differ from the run's by what quantising rounded off"
        )
    if opened.base in ALIASES or opened.base.endswith(".gguf"):
        said.append(
            f"{opened.base} is no folder that transformers loads: write it as one (mlxft convert {opened.base} FOLDER) "
            "and load the adapter on that"
        )
    if "model.embed_tokens" in opened.spec.paths and opened.tied and opened.head is None:
        said.append(
            "the embedding is adapted and tied to the output layer: PEFT adapts both, but can not merge them "
            "(merge_and_unload); mlxft fuse can"
        )
    if opened.head is not None:
        said += score_notes(opened.head, pad)
    return said


def score_notes(head: Saved, pad: int | None) -> list[str]:
    """How the scores of a reward model are read in transformers."""
    said = [
        f"scores are read at the last token that is not padding: set config.pad_token_id = {pad}, as the tokenizer "
        "beside it pads, and never the token that ends a turn"
        if pad is not None
        else "no token is left to pad with: score one row at a time"
    ]
    noted = head.about.get("reward", {})
    if noted.get("mean") is not None:
        said.append(
            f"scores are raw, as mlxft score gives them; on the validation rows their mean was {noted['mean']:.6g} and "
            f"their standard deviation {noted.get('std') or 0.0:.6g}"
        )
    return said
