"""A PEFT adapter as mlxft and mlx-lm read them; see mlxft.export.peft for how the two differ."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxft.errors import ModelError, shorten
from mlxft.export.peft import CONFIG, PREFIX, WEIGHTS, check_names
from mlxft.model.adapters import LoRASpec, adapter_config, attach, load_trained, unfreeze
from mlxft.model.declared import (
    Lenient,
    Rank,
    Real,
    Share,
    check_arrays,
    check_links,
    check_numbers,
    read_object,
    validate,
)
from mlxft.model.folder import check_destination, check_unused, replace_folder
from mlxft.model.heads import HEAD_FILE, ScoreHead, adapter_metadata, head_arrays, head_metadata
from mlxft.model.load import Loaded, load, skeleton
from mlxft.model.lora import LINEAR, QUANTIZED, adaptable
from mlxft.model.source import stated_name
from mlxft.recipe import full_path
from mlxft.trainer.files import flush, save_arrays

# Settings that make of LoRA something else; each is refused where it is set.
OTHER = (
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Ways to begin that leave the base as it is; others (pissa, olora, corda, loftq, ...) change it.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
Arrays = dict[str, mx.array]


class _PeftConfig(Lenient):
    """What is read of PEFT's adapter_config.json."""

    base_model_name_or_path: str | None = None
    r: Rank
    lora_alpha: Real
    lora_dropout: Share | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Real] | None = None


def _wrong_pattern(pattern: str) -> list[str]:
    """What is wrong with an expression of someone else's: matching it must end soon."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return [f"the pattern {shorten(pattern)!r} can not be read: {error}"]
    repeats = len(re.findall(r"[*+?{]", re.sub(r"\\.", "", pattern)))
    nested = re.search(r"\)[*+?{]", pattern)
    if len(pattern) > 200 or repeats > 3 or pattern.count("|") > 8 or nested:
        return [f"the pattern {shorten(pattern)!r} may take for ever to match; write module names in its place"]
    return []


def import_peft(folder: Path, out: Path, *, model: str | None = None, overwrite: bool = False) -> list[str]:
    """Write a PEFT LoRA, rsLoRA or DoRA adapter as an adapter folder of mlxft and mlx-lm.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the base; default: the one that the adapter names.
    Returns:
        What was done, a sentence each.
    Raises:
        ModelError: the adapter can not be read, is of another kind, or does not fit the base.
        ConfigError: `out` is there and may not be replaced.
        ExportError: `out` can not be written.
    """
    check_destination(out, overwrite, "adapter")
    check_unused(out, [folder])
    config = read_config(folder)
    arrays = _read_weights(folder)
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{folder / CONFIG}: names no base (base_model_name_or_path); name it with --model")
    base = _base(model or stated_name(str(name)), model is None)
    low, whole = sort_arrays(arrays, folder)
    head = _take_head(whole, config, base.config, folder)
    _check_there(base, list(low), list(whole), folder)
    check_names(base.config, list(low), base.model)
    _settle_tied(base, low, whole, folder, scores=head is not None)
    spec, weights = to_mlx(low, config, folder)
    modules = [n for n, _ in base.model.named_modules() if n in low]
    spec = LoRASpec(tuple(modules), spec.rank, spec.scale, spec.dropout, spec.dora)
    _check_kinds(base, spec, folder)
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


def _base(name: str, from_adapter: bool) -> Loaded:
    try:
        return skeleton(name)
    except ModelError as e:
        way = "; name the base's folder with --model" if from_adapter else ""
        raise ModelError(f"{e}{way}") from e


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT adapter that can be imported.

    Raises:
        ModelError: there is none, or it asks for what mlx-lm's adapters can not do; all of it in one.
    """
    file = folder / CONFIG
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; expected a PEFT adapter ({CONFIG} and {WEIGHTS})")
    try:
        check_links(folder)
        config = read_object(file)
    except OSError as e:
        raise ModelError(f"{folder} is no PEFT adapter: can not read {CONFIG} ({e.strerror})") from e
    if "peft_type" not in config:
        mine = "fine_tune_type" in config
        raise ModelError(
            f"{file}: has no peft_type"
            + ("; it is an adapter of mlxft or mlx-lm already" if mine else ", so it is not PEFT's")
        )
    validate(_PeftConfig, config, file)
    kind = config["peft_type"]
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type is {kind!r}; expected 'LORA' (also with use_rslora and use_dora)")
    task = config.get("task_type")
    problems = [f"{key} is set ({config[key]!r:.60})" for key in OTHER if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}; expected 'none': mlx-lm's adapters have no biases")
    if task not in (None, "CAUSAL_LM", "SEQ_CLS"):
        problems.append(f"task_type is {task!r}; expected CAUSAL_LM, or SEQ_CLS with one label")
    if config.get("init_lora_weights", True) not in STARTS:
        problems.append(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base itself; save it from PEFT "
            "as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for pattern in {**(config.get("rank_pattern") or {}), **(config.get("alpha_pattern") or {})}:
        problems += _wrong_pattern(pattern)
    if problems:
        raise ModelError(f"{file}: can not be imported:\n  " + "\n  ".join(problems))
    return config


def _read_weights(folder: Path) -> Arrays:
    file = folder / WEIGHTS
    if not file.is_file():
        old = "adapter_model.bin"
        seen = f" ({old} is a pickle, which may run code when opened: save it again as safetensors)"
        raise ModelError(f"{folder}: has no {WEIGHTS}{seen if (folder / old).exists() else ''}")
    try:
        check_arrays(file)
        arrays = mx.load(str(file))
    except (OSError, RuntimeError, ValueError) as e:
        raise ModelError(f"{file}: can not be read: {e}") from e
    assert isinstance(arrays, dict)
    if not arrays:
        raise ModelError(f"{file}: is empty")
    check_numbers(file, arrays)
    return arrays


def sort_arrays(arrays: Arrays, folder: Path) -> tuple[dict[str, Arrays], Arrays]:
    """Module -> its A, B and m; and what was trained whole, by the names of the base.

    Raises:
        ModelError: a name that is not LoRA's, or half of a pair is missing.
    """
    low: dict[str, Arrays] = {}
    whole: Arrays = {}
    strange = []
    for name, value in arrays.items():
        short = name.removeprefix(PREFIX)
        found = re.fullmatch(rf"(.+?)\.({'|'.join(map(re.escape, PARTS))})", short)
        if found:
            low.setdefault(found[1], {})[PARTS[found[2]]] = value
        elif short == name or ".lora_" in name:
            strange.append(name)
        else:
            whole[short.replace(".modules_to_save.", ".")] = value
    strange += [f"{p}: has no lora_{k}" for p, parts in low.items() for k in ("A", "B") if k not in parts]
    if strange or not low:
        lines = "\n  ".join(strange[:10]) or "no LoRA at all"
        raise ModelError(f"{folder / WEIGHTS}: holds what is not known of LoRA:\n  {lines}")
    return low, whole


def to_mlx(low: dict[str, Arrays], config: dict[str, Any], folder: Path) -> tuple[LoRASpec, Arrays]:
    """mlx-lm's matrices of one rank and one scale.

    Smaller ranks are filled with zeros, and other scales are multiplied into B: both are exact.

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
    weights: Arrays = {}
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
    """lora_alpha / r of a module, by the patterns that PEFT matches at the end of its name."""
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


def _take_head(whole: Arrays, config: dict[str, Any], base: dict[str, Any], folder: Path) -> ScoreHead | None:
    """The score head of a SEQ_CLS adapter, out of `whole`."""
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
    """ModelError for modules that the base does not have, all in one. `lm_head` of a tied base is looked at later."""
    modules = dict(base.model.named_modules())
    names = dict(tree_flatten(base.model.parameters()))
    missing = [p for p in low if p != "lm_head" and not (p in modules and adaptable(modules[p]))]
    owners = {n: n.removesuffix(".base_layer.weight") for n in whole}
    missing += [n for n, o in owners.items() if o != "lm_head" and n != "lm_head.weight" and not _known(n, o, names)]
    if missing:
        more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ModelError(
            f"{folder} is for modules that {base.source} does not have:\n  " + "\n  ".join(missing[:10]) + more
        )


def _known(name: str, owner: str, names: Arrays) -> bool:
    return (name if owner == name else f"{owner}.weight") in names


def _settle_tied(base: Loaded, low: dict[str, Arrays], whole: Arrays, folder: Path, scores: bool) -> None:
    """Take out what PEFT stores twice; ModelError where embedding and output layer are one here and two there.

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
            f"{folder}: adapts embed_tokens and lm_head each for itself, and in {base.source} they are one (tied); "
            "train with ensure_weight_tying, leave them out, or merge it in PEFT and convert the model (mlxft convert)"
        )


def _same(x: mx.array, y: mx.array) -> bool:
    return x.shape == y.shape and bool(mx.allclose(x, y, rtol=1e-5, atol=1e-7).item())


def _check_copies(base: Loaded, copies: Arrays, folder: Path) -> None:
    """ModelError where a copy of the base's embedding is not the base's: its vocabulary was changed."""
    for name, value in copies.items():
        owner = name.removesuffix(".base_layer.weight")
        if owner == "lm_head" and owner not in dict(base.model.named_modules()):
            owner = "model.embed_tokens"
        real = load(base.source, dtype="own", lazy=True).model
        module = dict(real.named_modules())[owner]
        if isinstance(module, QUANTIZED):
            continue  # rounded: there is nothing to compare with
        mine = module.weight.astype(mx.float32)
        near = mine.shape == value.shape and mx.abs(mine - value.astype(mx.float32)).max() <= 1e-2 * mx.abs(mine).max()
        if not near:
            raise ModelError(
                f"{folder / WEIGHTS}: {name} {tuple(value.shape)} is not the embedding of {base.source} "
                f"{tuple(mine.shape)}: the adapter was trained on a base with another vocabulary"
            )


def _check_kinds(base: Loaded, spec: LoRASpec, folder: Path) -> None:
    modules = dict(base.model.named_modules())
    unfit = [p for p in spec.paths if spec.dora and not isinstance(modules[p], LINEAR)]
    if unfit:
        raise ModelError(f"{folder}: DoRA on {unfit[0]}, which is no linear layer; mlxft has it for linear layers only")
