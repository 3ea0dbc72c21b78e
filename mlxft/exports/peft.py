"""Export and import PEFT adapters, and export reward models as sequence classifiers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxft.config import full_path
from mlxft.errors import ExportError, MlxftError, ModelError, shorten
from mlxft.exports.fuse import adapter_of, fuse_layers
from mlxft.files import flush, save_arrays
from mlxft.model.adapters import (
    LoRASpec,
    adapter_config,
    ask_as_trained,
    attach,
    base_noted,
    load_adapter,
    load_trained,
    read_adapter_config,
    template_of,
    unfreeze,
)
from mlxft.model.folder import (
    Lenient,
    Rank,
    Real,
    Share,
    check_destination,
    check_links,
    check_schema,
    check_space,
    check_unused,
    read_arrays,
    read_object,
    replace_folder,
    save_folder,
    weight_bytes,
)
from mlxft.model.heads import (
    HEAD_FILE,
    Saved,
    ScoreHead,
    adapter_metadata,
    check_pair,
    find_head,
    head_arrays,
    head_metadata,
    read_head,
    without_head,
)
from mlxft.model.layers import EMBEDDING, LEAVES, LINEAR, QUANTIZED, SWITCH, LowRank, adaptable
from mlxft.model.load import ALIASES, Loaded, load, load_tokenizer, skeleton, stated_name
from mlxft.runs import find_adapter, load_run, open_run

# --- peft -------------------------------------------------------------------------------------------------------------
# A PEFT adapter is adapter_config.json beside adapter_model.safetensors.
#
# PEFT names modules as transformers does, below `base_model.model.`, and stores the transposes of mlx-lm's matrices:
# lora_A (rank, in) and lora_B (out, rank); an embedding's are lora_embedding_A (rank, V) and lora_embedding_B (D,
# rank). An update's multiplier is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.

_PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Architectures whose modules have the same names in mlx-lm and in transformers.
# Compared by name and shape: mlx-lm 0.32.2, transformers 5.23.
_DENSE = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "smollm3"),
    *("olmo2", "granite", "starcoder2", "stablelm", "cohere", "cohere2", "glm", "glm4", "helium", "ernie4_5"),
    *("seed_oss", "nemotron"),
)
# Mixtures: transformers stores their experts and routers as single parameters, so only attention has a counterpart.
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class _Opened:
    """An adapter on the shapes of its base, whose weights are not read.

    Attributes:
        base: the name of the base, as noted in the adapter or as given.
        head: of a reward model.
        rslora: its run scaled by alpha / sqrt(rank).
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
        """The embedding is also the output layer."""
        return "lm_head" not in self.loaded.model and self.head is None


def _open_adapter(run: Path, model: str | None) -> _Opened:
    """Open the adapter of a run or folder, checked against its base's names and shapes."""
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
    head = read_head(folder / HEAD_FILE) if (folder / HEAD_FILE).is_file() else None
    if head is not None:
        check_pair(folder / HEAD_FILE, head.weight)
    rslora = False
    with suppress(MlxftError):  # only a run's recipe says it, not the adapter's folder
        rslora = (run / "config.yaml").is_file() and open_run(run).config.tune.rslora
    return _Opened(folder, base, about, loaded, spec, head, rslora)


def _check_names(config: dict[str, Any], paths: Sequence[str], model: nn.Module) -> None:
    """Raise ExportError unless transformers has all of `paths` (modules of an mlx-lm model) under the same names."""
    kind = str(config["model_type"])
    if kind not in _DENSE and kind not in _MIXTURES:
        raise ExportError(
            f"PEFT: architecture {kind} is not among those whose modules are known to have the same names in "
            f"transformers ({', '.join([*_DENSE, *_MIXTURES])}); mlxft fuse writes a model instead of an adapter"
        )
    modules = dict(model.named_modules())
    for path in paths:
        inner = modules.get(path)
        base = inner.base if isinstance(inner, LowRank) else inner
        apart = kind in _MIXTURES and ".layers." in path and ".self_attn." not in path and "norm" not in path
        if isinstance(base, SWITCH) or apart:
            raise ExportError(
                f"PEFT: {path} is part of a mixture of experts, which transformers stores as single parameters and "
                "not as layers that PEFT can adapt; adapt attention only (tune.targets), or fuse it (mlxft fuse)"
            )


def export_peft(run: Path, out: Path, *, model: str | None = None, overwrite: bool = False) -> list[str]:
    """Write a run's adapter as a folder that `peft.PeftModel.from_pretrained` loads; a reward model's as SEQ_CLS.

    Args:
        run: a run, or an adapter folder of mlxft or mlx-lm.
        model: the base, if the adapter does not name it or it has moved; PEFT's config names it too.
    Returns:
        What was done, a sentence each.
    Raises:
        ModelError: the adapter or base is missing, or they do not belong together.
        ConfigError: `out` exists and may not be replaced.
        ExportError: an adapted module has no counterpart in transformers, or `out` cannot be written.
    """
    check_destination(out, overwrite, "adapter")
    check_unused(out, [find_adapter(run)])
    opened = _open_adapter(run, model)
    tensors, saved = _peft_tensors(opened)
    config = _peft_config(opened, saved)
    check_space(out, sum(v.nbytes for v in tensors.values()))
    tokenizer = load_tokenizer(opened.base, template_of(opened.folder))
    ends = ask_as_trained(tokenizer, opened.folder)
    pad = _set_pad(tokenizer, opened.loaded.config) if opened.head is not None else None
    with replace_folder(out, "adapter") as part:
        save_arrays(part / WEIGHTS, tensors, {"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        tokenizer.save_pretrained(str(part))
        flush(part / WEIGHTS)
    kind = "DoRA" if opened.spec.dora else "rsLoRA" if config["use_rslora"] else "LoRA"
    also = f" and the whole of {', '.join(saved)}" if saved else ""
    said = (
        f"wrote {out}: {kind} of rank {opened.spec.rank} on {len(opened.spec.paths)} modules{also}, "
        f"lora_alpha {config['lora_alpha']:g}, for {opened.base}"
    )
    if ends and opened.head is None:
        ends = [*ends, f"in transformers: model.generate(..., eos_token_id={sorted(tokenizer.eos_token_ids)})"]
    return [said, *ends, *_notes(opened, pad)]


def _peft_tensors(opened: _Opened) -> tuple[dict[str, mx.array], list[str]]:
    """Return the adapter's arrays by PEFT's names, and the modules that it holds whole (modules_to_save)."""
    model = opened.loaded.model
    modules = dict(model.named_modules())
    trained = dict(tree_flatten(model.trainable_parameters()))
    whole: dict[str, list[str]] = {}
    for name in trained:
        owner, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            whole.setdefault(owner, []).append(leaf)
    _check_names(opened.loaded.config, [*opened.spec.paths, *whole], model)
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
        tensors |= {f"{_PREFIX}{owner}.{leaf}": trained[f"{owner}.{leaf}"] for leaf in leaves}
    saved = list(whole)
    if "model.embed_tokens" in whole and opened.tied:
        # PEFT trains a copy of the embedding; the output layer stays tied to the original.
        tensors[f"{_PREFIX}lm_head.weight"] = trained["model.embed_tokens.weight"]
        saved.append("lm_head")
    if opened.head is not None:
        tensors[f"{_PREFIX}score.weight"] = opened.head.weight.astype(mx.float32)
        saved.append("score")
    return tensors, saved


def _low_rank(path: str, layer: LowRank, opened: _Opened) -> dict[str, mx.array]:
    name = _PREFIX + path
    a, b = layer.lora_a, layer.lora_b
    if isinstance(layer.base, EMBEDDING):
        found = {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T}
        if opened.tied:
            found |= {f"{_PREFIX}lm_head.lora_A.weight": b, f"{_PREFIX}lm_head.lora_B.weight": a}
    else:
        found = {f"{name}.lora_A.weight": a.T, f"{name}.lora_B.weight": b.T}
    if "m" in layer:
        found[f"{name}.lora_magnitude_vector"] = layer.m
    return {n: mx.contiguous(v) for n, v in found.items()}


def _peft_config(opened: _Opened, saved: Sequence[str]) -> dict[str, Any]:
    """Return adapter_config.json: the fields of `peft.LoraConfig` that differ from its defaults."""
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


def _targets(opened: _Opened) -> list[str]:
    """Return short names (q_proj) if they match only what was trained, else full ones, which PEFT accepts too."""
    paths = set(opened.spec.paths)
    if opened.tied and "model.embed_tokens" in paths:
        paths.add("lm_head")
    short = {path.rpartition(".")[2] for path in paths}
    there = {n for n, _ in opened.loaded.model.named_modules() if n.rpartition(".")[2] in short}
    return sorted(short if there <= paths else paths)


def _set_pad(tokenizer: Any, config: dict[str, Any]) -> int | None:
    """Give the tokenizer a padding token that ends no row, and return its id, or None if there is none.

    transformers reads the score at the last token that is not `pad_token_id`: padding with the end-of-turn token, as
    many tokenizers do, would make it read the token before the end.
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


def _notes(opened: _Opened, pad: int | None) -> list[str]:
    said = []
    packed = [m.base for _, m in opened.loaded.model.named_modules() if isinstance(m, LowRank)]
    bits = opened.about.get("quantize") or next((m.bits for m in packed if isinstance(m, QUANTIZED)), None)
    if bits:
        said.append(
            f"the base was quantised to {bits} bits in training: load the adapter on the float original; its "
            "completions differ from the run's by the rounding"
        )
    if opened.spec.quantize_aware is not None:
        said.append(
            f"trained with weights rounded to {opened.spec.quantize_aware} bits (tune.quantize_aware), as an adapter "
            "does not round them: mlxft fuse writes the model that was trained"
        )
    if opened.base in ALIASES or opened.base.endswith(".gguf"):
        said.append(
            f"transformers cannot load {opened.base}: write it as a folder (mlxft convert {opened.base} FOLDER), and "
            "load the adapter on that"
        )
    if "model.embed_tokens" in opened.spec.paths and opened.tied:
        said.append(
            "the embedding is adapted and tied to the output layer: PEFT adapts both, but cannot merge them "
            "(merge_and_unload); mlxft fuse can"
        )
    return said + _score_notes(opened.head, pad) if opened.head is not None else said


def _score_notes(head: Saved, pad: int | None) -> list[str]:
    """Say how transformers reads the scores of a reward model."""
    said = [
        f"scores are read at the last token that is not padding: set config.pad_token_id = {pad}, with which the "
        "tokenizer beside it pads, and never the token that ends a turn"
        if pad is not None
        else "no token is free for padding: score one row at a time"
    ]
    noted = head.about.get("reward", {})
    if noted.get("mean") is not None:
        said.append(
            f"scores are raw, as in mlxft score; on the validation rows their mean was {noted['mean']:.6g} and "
            f"their standard deviation {noted.get('std') or 0.0:.6g}"
        )
    return said


# --- peft in ----------------------------------------------------------------------------------------------------------
# A PEFT adapter as an adapter of mlxft and mlx-lm.

# Settings that change LoRA into something else; each is refused.
_OTHER = (
    *("lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "arrow_config", "kasa_config", "monteclora_config"),
)
# Initialisations that leave the base as it is; others (pissa, olora, corda, loftq, ...) change it.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
_Arrays = dict[str, mx.array]


class _PeftConfig(Lenient):
    """The fields of PEFT's adapter_config.json that are read."""

    base_model_name_or_path: str | None = None
    r: Rank
    lora_alpha: Real
    lora_dropout: Share | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Real] | None = None


def _wrong_pattern(pattern: str) -> list[str]:
    """Return what is wrong with a stranger's regular expression: it must compile and match fast."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return [f"the pattern {shorten(pattern)!r} cannot be read: {error}"]
    repeats = len(re.findall(r"[*+?{]", re.sub(r"\\.", "", pattern)))
    nested = re.search(r"\)[*+?{]", pattern)
    if len(pattern) > 200 or repeats > 3 or pattern.count("|") > 8 or nested:
        return [f"the pattern {shorten(pattern)!r} may take for ever to match; write module names instead"]
    return []


def import_peft(folder: Path, out: Path, *, model: str | None = None, overwrite: bool = False) -> list[str]:
    """Write a PEFT LoRA, rsLoRA or DoRA adapter as an adapter folder of mlxft and mlx-lm.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the base; default: the one that the adapter names.
    Returns:
        What was done, a sentence each.
    Raises:
        ModelError: the adapter cannot be read, is of another kind, or does not fit the base.
        ConfigError: `out` exists and may not be replaced.
        ExportError: `out` cannot be written.
    """
    check_destination(out, overwrite, "adapter")
    check_unused(out, [folder])
    config = _read_config(folder)
    arrays = _read_weights(folder)
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{folder / CONFIG}: names no base (base_model_name_or_path); name it with --model")
    try:
        base = skeleton(model or stated_name(str(name)))
    except ModelError as e:
        raise ModelError(f"{e}{'' if model else '; name the folder of the base with --model'}") from e
    low, whole = _sort_arrays(arrays, folder)
    head = _take_head(whole, config, base.config, folder)
    _check_there(base, list(low), list(whole), folder)
    _check_names(base.config, list(low), base.model)
    _untie(base, low, whole, folder, scores=head is not None)
    modules = {n: m for n, m in base.model.named_modules() if n in low}
    spec, weights = _to_mlx(low, config, folder)
    spec = replace(spec, paths=tuple(modules))
    if spec.dora and (unfit := [path for path, m in modules.items() if not isinstance(m, LINEAR)]):
        raise ModelError(f"{folder}: DoRA on {unfit[0]}, which is not a linear layer; mlxft adapts only those by DoRA")
    attach(base.model, spec)
    load_trained(base.model, weights | whole, str(folder / WEIGHTS))
    unfreeze(base.model, list(whole), str(folder / CONFIG))
    about = {"base": {"model": full_path(str(name)), "fingerprint": base.fingerprint}, "imported": "peft"}
    with replace_folder(out, "adapter") as part:
        text = json.dumps(adapter_config(spec, base.model, about), indent=2)
        (part / CONFIG).write_text(text + "\n", "utf-8")
        if head is not None:
            save_arrays(part / HEAD_FILE, head_arrays(head), head_metadata(base.fingerprint, {}))
        save_arrays(part / "adapters.safetensors", weights | whole, adapter_metadata(head))
        flush(part / "adapters.safetensors")
    kind = "DoRA" if spec.dora else "LoRA"
    also = f" and {len(whole)} whole parameters" if whole else ""
    scored = ", with a score head: a reward model (mlxft score)" if head is not None else ""
    shape = f"{kind} of rank {spec.rank} and scale {spec.scale:g} on {len(low)} modules"
    return [f"wrote {out}: {shape}{also} for {name}{scored}"]


def _read_config(folder: Path) -> dict[str, Any]:
    """Read a PEFT adapter's adapter_config.json, and refuse all that mlx-lm's adapters cannot do in one message."""
    file = folder / CONFIG
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; expected a PEFT adapter ({CONFIG} and {WEIGHTS})")
    try:
        check_links(folder)
        config = read_object(file)
    except OSError as e:
        raise ModelError(f"{folder} is not a PEFT adapter: cannot read {CONFIG} ({e.strerror})") from e
    if "peft_type" not in config:
        mine = "fine_tune_type" in config
        raise ModelError(
            f"{file}: has no peft_type"
            + ("; it already is an adapter of mlxft or mlx-lm" if mine else ", so it is not PEFT's")
        )
    check_schema(_PeftConfig, config, file)
    kind = config["peft_type"]
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type is {kind!r}; expected 'LORA' (also with use_rslora and use_dora)")
    task = config.get("task_type")
    problems = [f"{key} is set ({config[key]!r:.60})" for key in _OTHER if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}; expected 'none': mlx-lm's adapters have no biases")
    if task not in (None, "CAUSAL_LM", "SEQ_CLS"):
        problems.append(f"task_type is {task!r}; expected CAUSAL_LM, or SEQ_CLS with one label")
    if config.get("init_lora_weights", True) not in _STARTS:
        problems.append(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base itself; save it from PEFT "
            "as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for pattern in {**(config.get("rank_pattern") or {}), **(config.get("alpha_pattern") or {})}:
        problems += _wrong_pattern(pattern)
    if problems:
        raise ModelError(f"{file}: cannot be imported:\n  " + "\n  ".join(problems))
    return config


def _read_weights(folder: Path) -> _Arrays:
    file = folder / WEIGHTS
    if not file.is_file():
        old = "adapter_model.bin"
        seen = f" ({old} is a pickle, which may run code when opened; save it again as safetensors)"
        raise ModelError(f"{folder}: has no {WEIGHTS}{seen if (folder / old).exists() else ''}")
    arrays, _ = read_arrays(file)
    if not arrays:
        raise ModelError(f"{file}: is empty")
    return arrays


def _sort_arrays(arrays: _Arrays, folder: Path) -> tuple[dict[str, _Arrays], _Arrays]:
    """Return module -> its A, B and m, and the arrays that were trained whole, by their names in the base."""
    low: dict[str, _Arrays] = {}
    whole: _Arrays = {}
    strange = []
    for name, value in arrays.items():
        short = name.removeprefix(_PREFIX)
        found = re.fullmatch(rf"(.+?)\.({'|'.join(map(re.escape, _PARTS))})", short)
        if found:
            low.setdefault(found[1], {})[_PARTS[found[2]]] = value
        elif short == name or ".lora_" in name:
            strange.append(name)
        else:
            whole[short.replace(".modules_to_save.", ".")] = value
    strange += [f"{p}: has no lora_{k}" for p, parts in low.items() for k in ("A", "B") if k not in parts]
    if strange or not low:
        lines = "\n  ".join(strange[:10]) or "no LoRA at all"
        raise ModelError(f"{folder / WEIGHTS}: holds arrays that are not LoRA's:\n  {lines}")
    return low, whole


def _to_mlx(low: dict[str, _Arrays], config: dict[str, Any], folder: Path) -> tuple[LoRASpec, _Arrays]:
    """Return mlx-lm's matrices of one rank and one scale.

    Smaller ranks are padded with zeros, and other scales are multiplied into B: both are exact.

    Args:
        low: module -> A (rank, in), B (out, rank) and, with DoRA, m (out,).
    """
    dora = bool(config.get("use_dora"))
    wrong = [p for p, parts in low.items() if ("m" in parts) != dora or parts["A"].ndim != 2 or parts["B"].ndim != 2]
    wrong = wrong or [p for p, parts in low.items() if parts["A"].shape[0] != parts["B"].shape[1]]
    if wrong:
        seen = {k: tuple(v.shape) for k, v in low[wrong[0]].items()}
        raise ModelError(
            f"{folder / WEIGHTS}: {wrong[0]} has {seen}, which does not fit use_dora {dora} and its config"
        )
    rank = max(parts["A"].shape[0] for parts in low.values())
    scales = {p: _scale(p, parts["A"].shape[0], config, folder) for p, parts in low.items()}
    scale = max(scales.values(), key=list(scales.values()).count)
    weights: _Arrays = {}
    for path, parts in low.items():
        a, b = (parts[k].astype(mx.float32) for k in ("A", "B"))
        more = rank - a.shape[0]
        b = b if scales[path] == scale else b * (scales[path] / scale)
        weights[f"{path}.lora_a"] = mx.contiguous(mx.pad(a, [(0, more), (0, 0)]).T)
        weights[f"{path}.lora_b"] = mx.contiguous(mx.pad(b, [(0, 0), (0, more)]).T)
        if dora:
            weights[f"{path}.m"] = parts["m"].astype(mx.float32).reshape(-1)
    dropout = config.get("lora_dropout") or 0.0
    return LoRASpec(tuple(low), rank, scale, dropout, dora), weights


def _scale(path: str, rank: int, config: dict[str, Any], folder: Path) -> float:
    """Return lora_alpha / r of a module, by the patterns that PEFT matches at the end of its name."""
    alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    said = _by_pattern(config.get("rank_pattern"), path, config["r"])
    # The output layer that is tied to an adapted embedding has the embedding's rank.
    if said != rank and path != "lm_head":
        raise ModelError(f"{folder / WEIGHTS}: {path} has rank {rank}, its {CONFIG} says {said}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale) or scale == 0:
        raise ModelError(f"{folder / CONFIG}: lora_alpha is {alpha!r} for {path}; expected a number other than 0")
    return float(scale)


def _by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _take_head(whole: _Arrays, config: dict[str, Any], base: dict[str, Any], folder: Path) -> ScoreHead | None:
    """Take the score head of a SEQ_CLS adapter out of `whole`."""
    if config.get("task_type") != "SEQ_CLS":
        return None
    weight = whole.pop("score.weight", None)
    width = (base.get("text_config") or base).get("hidden_size")
    if weight is None or any(n.startswith(("score.", "classifier.")) for n in whole):
        raise ModelError(f"{folder}: task_type is SEQ_CLS; expected one score.weight without a bias as its head")
    if weight.shape != (1, width):
        raise ModelError(f"{folder}: score.weight has shape {tuple(weight.shape)}; expected (1, {width}), of one label")
    return ScoreHead.of(weight)


def _check_there(base: Loaded, low: list[str], whole: list[str], folder: Path) -> None:
    """Raise ModelError for all modules that the base does not have; `lm_head` of a tied base is checked by `_untie`."""
    fits = {"lm_head", *(path for path, module in base.model.named_modules() if adaptable(module))}
    names = {"lm_head.weight", *(name for name, _ in tree_flatten(base.model.parameters()))}
    missing = [path for path in low if path not in fits]
    missing += [name for name in whole if re.sub(r"\.base_layer\.weight$", ".weight", name) not in names]
    if missing:
        more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ModelError(
            f"{folder} is for modules that {base.source} does not have:\n  " + "\n  ".join(missing[:10]) + more
        )


def _untie(base: Loaded, low: dict[str, _Arrays], whole: _Arrays, folder: Path, scores: bool) -> None:
    """Remove what PEFT stores twice; raise ModelError if embedding and output layer are tied here and differ there.

    `base_layer.weight` is a copy of the base's own embedding, which PEFT stores beside an adapted one.
    """
    copies = {n: whole.pop(n) for n in list(whole) if n.endswith(".base_layer.weight")}
    _check_copies(base, copies, folder)
    if "lm_head" in base.model or scores:
        return
    head, embedding = low.pop("lm_head", None), low.get("model.embed_tokens")
    apart = (head is None) != (embedding is None)
    if head is not None and embedding is not None:
        apart = not (_same(head["A"], embedding["B"].T) and _same(head["B"], embedding["A"].T))
    out, given = whole.pop("lm_head.weight", None), whole.get("model.embed_tokens.weight")
    apart |= (out is None) != (given is None)
    if out is not None and given is not None:
        apart |= not _same(out, given)
    if apart:
        raise ModelError(
            f"{folder}: adapts embed_tokens and lm_head separately, and in {base.source} they are one (tied); "
            "train with ensure_weight_tying, leave them out, or merge it in PEFT and convert the model (mlxft convert)"
        )


def _same(x: mx.array, y: mx.array) -> bool:
    return x.shape == y.shape and bool(mx.allclose(x, y, rtol=1e-5, atol=1e-7).item())


def _check_copies(base: Loaded, copies: _Arrays, folder: Path) -> None:
    """Raise ModelError if a copy of the base's embedding differs from it, because its vocabulary was changed."""
    for name, value in copies.items():
        owner = name.removesuffix(".base_layer.weight")
        if owner == "lm_head" and owner not in dict(base.model.named_modules()):
            owner = "model.embed_tokens"
        real = load(base.source, dtype="own", lazy=True).model
        module = dict(real.named_modules())[owner]
        if isinstance(module, QUANTIZED):
            continue  # rounded: there is no original to compare with
        mine = module.weight.astype(mx.float32)
        near = mine.shape == value.shape and mx.abs(mine - value.astype(mx.float32)).max() <= 1e-2 * mx.abs(mine).max()
        if not near:
            raise ModelError(
                f"{folder / WEIGHTS}: {name} {tuple(value.shape)} is not the embedding of {base.source} "
                f"{tuple(mine.shape)}: the adapter was trained on a base with another vocabulary"
            )


# --- seqcls -----------------------------------------------------------------------------------------------------------


def export_seqcls(run: Path, out: Path, *, model: str | None = None, overwrite: bool = False) -> list[str]:
    """Write a reward run, adapter or model folder as one float folder: body, and head as `score`.

    Returns:
        What was done, a sentence each.
    Raises:
        ModelError: the run is missing, or gives text and not scores.
        ExportError: transformers has no such class for the architecture, or `out` cannot be written.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    check_destination(out, overwrite)
    loaded = load_run(model, find_adapter(run), scores=True) if model else load_run(run, scores=True)
    check_unused(out, [loaded.path, find_adapter(run)])
    kind = str(loaded.config["model_type"])
    classes = {name: found for name in _DENSE if (found := CLASSES.get(name))}
    if kind not in classes or "model" not in loaded.model:
        known = ", ".join(classes)
        raise ExportError(f"seq-cls: architecture {kind} has no class for scores that is known to fit ({known})")
    file = find_head(run)
    assert file is not None, "load_run has found it"
    saved = read_head(file)
    packed = any(isinstance(m, QUANTIZED) for m in loaded.model.modules())
    fuse_layers(loaded.model, dequantize=True)
    whole = nn.Module()
    with without_head(loaded.model):
        whole.model = loaded.model.model
    whole.score = nn.Linear(1, 1, bias=False)
    whole.score.weight = saved.weight.astype(whole.model.embed_tokens.weight.dtype)  # as transformers stores it
    pad = _set_pad(loaded.tokenizer, loaded.config)
    dropped = ("quantization", "quantization_config", "tie_word_embeddings")
    config = {k: v for k, v in loaded.config.items() if k not in dropped} | {
        "architectures": [classes[kind]],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "problem_type": "regression",
        "pad_token_id": pad,
    }
    save_folder(out, whole, loaded.tokenizer, config, overwrite=overwrite, source=loaded.path)
    said = [f"wrote {out}: {classes[kind]} with one label ({weight_bytes(whole) / 1e6:,.0f} MB of weights)"]
    if packed:
        said.append("the base was quantised; the model is written in float, so no update is rounded away")
    return said + _score_notes(saved, pad)
