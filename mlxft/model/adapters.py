"""Adapters: choose what is trained, read and describe adapter folders, and merge adapters into their base."""

from __future__ import annotations

import fnmatch
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from pydantic import Field

from mlxft.data.chat import set_thinking, thinking_of
from mlxft.data.dataset import end_completions
from mlxft.errors import ConfigError, ModelError, nearest
from mlxft.model.folder import (
    Lenient,
    Rank,
    Real,
    Share,
    check_links,
    check_schema,
    read_arrays,
    read_object,
)
from mlxft.model.layers import (
    DIRECTIONS,
    INPUTS,
    LEAVES,
    LINEAR,
    QUANTIZED,
    SAVED,
    LowRank,
    adaptable,
    bias_group,
    dense_weight,
    form_of,
    is_router,
    low_rank_of,
    plain_layer,
    shift,
    wrap,
)
from mlxft.model.load import TEMPLATE_FILE, Loaded, base_fingerprint, chat_template_files, fits_base, stated_name
from mlxft.model.load import load as load_model
from mlxft.text import counted, home_path

# --- adapters ---------------------------------------------------------------------------------------------------------
# What is trained: low-rank adapters, whole weights or chosen modules; and adapters on disk.
#
# An adapter folder is mlx-lm's: adapters.safetensors beside adapter_config.json, with the full path of every adapted
# module under `lora_parameters.keys`. Modules that are trained whole beside the adapters are in the same file under
# their own names; mlx-lm refuses those by name instead of silently leaving them out. What it need not know is beside:
# inputs.safetensors, the directions by which the weights of a quantisation-aware adapter are rounded.

_Layers = Literal["all"] | int | list[int]
# Layers that select rows, by number, of a parameter.
_TABLES = {nn.Embedding: "weight", SwitchLinear: "bias"}
# Layers whose weights the model's own code reads directly: Gemma 3n's AltUp, Kimi K3's attention over blocks.
_READ_DIRECTLY = (
    *("prediction_coefs", "correction_coefs"),
    *("self_attention_res_proj", "mlp_res_proj", "output_attn_res_proj"),
)
_INPUTS_FILE = "inputs.safetensors"
_COUNTING: dict[type, type] = {}
_GROUPS = {
    "all-linear": ("*",),
    "attention": ("*attn*", "*attention*"),
    "mlp": ("*mlp*", "*ffn*", "*feed_forward*", "*moe*", "*expert*"),
}


@dataclass(frozen=True)
class LoRASpec:
    """Shape of a low-rank adapter; `paths` are the full names of the wrapped modules.

    Attributes:
        quantize_aware: bits to which adapted weights are rounded in training; None: they are not.
    """

    paths: tuple[str, ...]
    rank: int
    scale: float
    dropout: float = 0.0
    dora: bool = False
    quantize_aware: int | None = None


def layer_paths(model: nn.Module) -> list[str]:
    """Return the names of the model's blocks, first to last."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.layers if id(layer) in names]


def select_layers(model: nn.Module, layers: _Layers) -> list[str]:
    """Return the names of the chosen blocks: all, the last N, or a list of indices.

    Raises:
        ConfigError: there are fewer layers, or an index does not exist.
    """
    paths = layer_paths(model)
    if layers == "all":
        return paths
    if isinstance(layers, int):
        if layers > len(paths):
            raise ConfigError(f"tune.layers is {layers}; the model has {len(paths)} layers")
        return paths[-layers:]
    if not layers or not all(0 <= i < len(paths) for i in layers):
        raise ConfigError(f"tune.layers is {layers}; expected indices of layers from 0 to {len(paths) - 1}")
    return [paths[i] for i in sorted(set(layers))]


def matches(path: str, pattern: str) -> bool:
    """Return whether a pattern names a path, a parent of it, or the end of either: q_proj, layers.0.*, model.norm."""
    parts = path.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:end]), p)
        for end in range(1, len(parts) + 1)
        for p in (pattern, f"*.{pattern}")
    )


def _in_block(name: str, blocks: Sequence[str]) -> str:
    """Return a module's name within its block; "" if it is in none of the blocks."""
    block = next((b for b in blocks if name.startswith(f"{b}.")), None)
    return name.removeprefix(f"{block}.") if block else ""


def select_targets(model: nn.Module, targets: str | Sequence[str], layers: _Layers, dora: bool = False) -> list[str]:
    """Return the full names of the modules that get a low-rank layer.

    Args:
        targets: all-linear (every linear layer of the blocks except routers of experts), attention, mlp, or name
            patterns.
        layers: restricts modules of the blocks; modules outside of them (lm_head, embed_tokens) are named by pattern.
    Raises:
        ConfigError: a pattern matches nothing, or DoRA is not defined for a module.
    """
    chosen, blocks = select_layers(model, layers), layer_paths(model)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if adaptable(module)
        and (_in_block(name, chosen) or not _in_block(name, blocks))
        and name.rpartition(".")[2] not in _READ_DIRECTLY
    }
    found: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        if kinds := _GROUPS.get(target):
            # Not the head or the embedding, which are named if they should be adapted; and not routers: their update
            # would change which experts are chosen.
            within = {n: _in_block(n, chosen) for n in candidates if not is_router(n)}
            hits = [n for n, part in within.items() if part and any(fnmatch.fnmatchcase(part, k) for k in kinds)]
        else:
            hits = [n for n in candidates if matches(n, target)]
        if not hits:
            there = _suggestion(candidates, blocks, target, *_GROUPS)
            raise ConfigError(f"tune.targets: {target!r} matches no module; {there}")
        found += hits
    paths = sorted(set(found), key=list(candidates).index)
    unfit = [p for p in paths if dora and not isinstance(candidates[p], LINEAR)]
    if unfit:
        kind = type(candidates[unfit[0]]).__name__
        raise ConfigError(f"tune.targets: DoRA is for linear layers, {unfit[0]} is a {kind}; use lora or other targets")
    return paths


def _suggestion(names: Iterable[str], blocks: Sequence[str], wanted: str, *groups: str) -> str:
    """List the names to choose from, as they are within a block, with the most similar one."""
    listed = sorted({_in_block(name, blocks) or name for name in names})
    more = f" and {len(listed) - 30} more" if len(listed) > 30 else ""
    either = f", or {', '.join(groups)}" if groups else ""
    hint = nearest(wanted, [part for n in listed for part in {n, n.rpartition(".")[2]}])
    return f"there are {', '.join(listed[:30])}{more}{either}{hint}"


def low_rank_layers(model: nn.Module, spec: LoRASpec, owner: str) -> dict[str, LowRank]:
    """Return new low-rank layers around a model's modules, by path. Their update is zero, and only it is trainable.

    Raises:
        ModelError: the model does not have the modules that `owner` needs.
    """
    modules = dict(model.named_modules())
    missing = [p for p in spec.paths if p not in modules or not adaptable(modules[p])]
    if missing:
        raise ModelError(f"{owner}: the model has no layer {missing[0]} to adapt (of {len(missing)} such)")
    layers = {p: wrap(modules[p], spec.rank, spec.scale, spec.dropout, spec.dora) for p in spec.paths}
    for path, layer in layers.items():
        _round_as(layer, path, spec.quantize_aware)
        layer.freeze()
        layer.unfreeze(recurse=False, keys=[k for k in LEAVES if k in layer])
    return layers


def _round_as(layer: LowRank, path: str, bits: int | None) -> None:
    """Let a low-rank layer compute with its adapted weight rounded to so many bits; None: not rounded."""
    layer.form = None if bits is None else form_of(layer.base, bits)
    if bits is not None and layer.form is None:
        raise ModelError(
            f"tune.quantize_aware: {path} is {dense_weight(layer.base).shape[-1]} wide, which groups of 32 do not "
            "fill; leave it out of tune.targets"
        )
    if bits is not None and bias_group(layer):
        layer[INPUTS] = mx.zeros((dense_weight(layer.base).shape[-1], DIRECTIONS))
        layer.freeze(recurse=False, keys=[INPUTS])


def round_as(model: nn.Module, bits: int) -> None:
    """Train the low-rank layers of a model quantisation-aware from now on.

    Raises:
        ModelError: a layer's width does not divide into groups.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, LowRank):
            _round_as(layer, path, bits)


def attach(model: nn.Module, spec: LoRASpec) -> None:
    """Freeze the model and wrap `spec.paths` in low-rank layers."""
    layers = low_rank_layers(model, spec, "the adapter")
    model.freeze()
    model.update_modules(tree_unflatten(list(layers.items())))


def select_parameters(model: nn.Module, patterns: Sequence[str], setting: str) -> list[str]:
    """Return the full names of the parameters that `patterns` name, by module or by parameter.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = [name for name, _ in tree_flatten(model.parameters())]
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if matches(n, pattern)}
        if not hits:
            there = _suggestion((n.rpartition(".")[0] for n in names), layer_paths(model), pattern)
            tied = "; the head of this model is its embedding (tied): train that" if pattern == "lm_head" else ""
            raise ConfigError(f"{setting}: {pattern!r} matches nothing; {there}{tied}")
        found |= hits
    return [n for n in names if n in found]


def unfreeze(model: nn.Module, names: Sequence[str], setting: str = "tune.train") -> None:
    """Make single parameters trainable.

    Raises:
        ModelError: one belongs to a quantised layer, whose weights have no gradient.
    """
    modules = dict(model.named_modules())
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if module is None:  # a parameter in a list or a dict of its module
            raise ModelError(f"{setting}: {name} cannot be trained alone")
        if isinstance(module, QUANTIZED):
            raise ModelError(
                f"{setting}: {owner} is quantised to {module.bits} bits, and quantised weights cannot be trained; "
                "load the base without quantisation (model.quantize) or train it through an adapter (tune.targets)"
            )
        module.unfreeze(recurse=False, keys=[leaf], strict=False)
        count_all(module, leaf)


def count_all(module: nn.Module, leaf: str) -> None:
    """Sum a layer's gradient in float32 if its parameter `leaf` is a table, so that every selected row counts."""
    if any(isinstance(module, kind) and leaf == table for kind, table in _TABLES.items()):
        module.__class__ = _counting(type(module), leaf)


class _Table:
    """A substitute for a table while a layer selects rows, which sums their gradient in float32.

    MLX adds the gradients of equal rows in the table's own type, and a sum in bfloat16 stops at 256. So equal ids read
    one row in float32, where their gradients are summed, and each row of the table receives one.
    """

    def __init__(self, rows: mx.array) -> None:
        self._rows = rows

    def __getitem__(self, ids: mx.array) -> mx.array:
        rows, flat = self._rows, ids.reshape(-1)
        if rows.dtype == mx.float32:
            return rows[ids]
        places = mx.zeros(rows.shape[0], mx.int32)
        places[flat] = mx.arange(flat.size)  # any place of an id
        found = rows[flat].astype(mx.float32)[places[flat]]
        return found.astype(rows.dtype).reshape(*ids.shape, *rows.shape[1:])


def _counting(kind: type, table: str) -> type:
    """Return the subclass of a layer's class that replaces its table by a `_Table`."""
    if kind not in _COUNTING:

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            rows = self[table]
            dict.__setitem__(self, table, _Table(rows))
            try:
                return kind.__call__(self, *args, **kwargs)
            finally:
                dict.__setitem__(self, table, rows)

        found = type(kind.__name__, (kind,), {"__call__": call})
        _COUNTING[kind] = _COUNTING[found] = found
    return _COUNTING[kind]


def prepare_full(model: nn.Module, layers: _Layers, train: Sequence[str], freeze: Sequence[str]) -> None:
    """Make everything trainable, embeddings, norms and head included, or the part that `layers` and patterns select.

    Raises:
        ModelError: the base is quantised.
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    quantized = [name for name, m in model.named_modules() if isinstance(m, QUANTIZED)]
    if quantized:
        raise ModelError(
            f"tune.method full needs float weights, and {len(quantized)} layers of this base are quantised "
            f"({quantized[0]}, ...); use lora or dora (QLoRA), or load without quantisation"
        )
    every = [n for n, v in tree_flatten(model.parameters()) if mx.issubdtype(v.dtype, mx.floating)]
    chosen = set(every)
    if layers != "all" or train:
        inside = select_layers(model, layers) if layers != "all" else []
        chosen = {n for n in every if _in_block(n, inside)} | {*select_parameters(model, train, "tune.train")}
    chosen -= set(select_parameters(model, freeze, "tune.freeze"))
    if not chosen:
        raise ConfigError("tune: train, freeze and layers leave nothing to train")
    model.freeze()
    unfreeze(model, [n for n in every if n in chosen])


def prepare_adapter(model: nn.Module, spec: LoRASpec, train: Sequence[str]) -> None:
    """Attach a fresh adapter, and make the modules that `train` names trainable beside it."""
    whole = select_parameters(model, train, "tune.train")
    both = [n for n in whole if n.rpartition(".")[0] in spec.paths]
    if both:
        raise ConfigError(f"tune.train and tune.targets both name {both[0].rpartition('.')[0]}; choose one")
    attach(model, spec)
    unfreeze(model, whole)


def adapter_config(spec: LoRASpec | None, model: nn.Module, about: dict[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json as mlx-lm reads it; `about` is stored under `mlxft` (base, objective, versions)."""
    config = {"fine_tune_type": "full", "num_layers": len(layer_paths(model))}
    if spec is not None:
        config["fine_tune_type"] = "dora" if spec.dora else "lora"
        numbers = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout}
        config["lora_parameters"] = {**numbers, "keys": list(spec.paths)}
        if spec.quantize_aware is not None:  # other programs apply the update without rounding
            about = {**about, "quantize_aware": spec.quantize_aware}
    return {**config, "mlxft": about}


def attached_spec(layers: Mapping[str, LowRank]) -> LoRASpec | None:
    """Return the shape of an adapter that consists of these layers, by path; None if there are none."""
    if not layers:
        return None
    first = next(iter(layers.values()))
    # Experts' factors are (experts, rank, in) and (experts, out, rank), all others (in, rank) and (rank, out).
    rank = int(first.lora_a.shape[1])
    aware = None if first.form is None else first.form.bits
    return LoRASpec(tuple(layers), rank, first.scale, float(1 - first.dropout._p_1), "m" in first, aware)


def adapter_texts(loaded: Loaded, spec: LoRASpec | None, about: Mapping[str, Any]) -> dict[str, str]:
    """Return the text files of an adapter folder, name -> text: adapter_config.json, and the chat template.

    Args:
        about: notes, such as base and versions; what ends prompts and completions is added.
    """
    tokenizer = loaded.tokenizer
    asking: dict[str, Any] = {} if thinking_of(tokenizer) else {"enable_thinking": False}
    ends = sorted(str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.eos_token_ids)
    config = adapter_config(spec, loaded.model, {**about, **asking, "eos_tokens": ends})
    return {"adapter_config.json": json.dumps(config, indent=2) + "\n", **chat_template_files(tokenizer)}


def trained_weights(model: nn.Module) -> dict[str, mx.array]:
    """Return name -> array of what a trained model is saved as: all trainable parameters, and `INPUTS`."""
    beside = {n: v for n, v in tree_flatten(model.parameters()) if n.rpartition(".")[2] == INPUTS}
    return beside | dict(tree_flatten(model.trainable_parameters()))


def adapter_arrays(weights: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """Return the arrays of an adapter folder by file: mlx-lm knows only those of adapters.safetensors, the last one."""
    files: dict[str, dict[str, mx.array]] = {_INPUTS_FILE: {}, "adapters.safetensors": {}}
    for name, value in weights.items():
        files[_INPUTS_FILE if name.rpartition(".")[2] == INPUTS else "adapters.safetensors"][name] = value
    return {file: arrays for file, arrays in files.items() if arrays or file != _INPUTS_FILE}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json of an adapter folder.

    Raises:
        ModelError: the file does not exist, or is not an adapter's of mlxft or mlx-lm.
    """
    file = folder / "adapter_config.json"
    try:
        check_links(folder)
        config = read_object(file)
    except OSError as e:
        raise ModelError(f"{folder} is not an adapter: adapter_config.json cannot be read ({e.strerror})") from e
    if "fine_tune_type" not in config:
        peft = " (it looks like a PEFT adapter)" if "peft_type" in config else ""
        raise ModelError(f"{file}: not an adapter of mlxft or mlx-lm{peft}")
    check_schema(_WholeConfig if config["fine_tune_type"] == "full" else _AdapterConfig, config, file)
    return config


class _Base(Lenient):
    model: str | None = None
    fingerprint: str | None = None
    chat_template: str | None = None
    dtype: Literal["auto", "own", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal[0, 2, 3, 4, 5, 6, 8] | None = None
    group_size: Literal[32, 64, 128] | None = None


class _About(Lenient):
    quantize_aware: Literal[2, 3, 4, 5, 6, 8] | None = None
    eos_tokens: list[str] = Field(default_factory=list)
    base: _Base = _Base()


class _LowRank(Lenient):
    rank: Rank
    scale: Real
    dropout: Share = 0.0
    keys: list[str] | None = None


class _WholeConfig(Lenient):
    """adapter_config.json beside whole weights."""

    fine_tune_type: Literal["lora", "dora", "full"]
    num_layers: Annotated[int, Field(strict=True, ge=-1)] = 0
    mlxft: _About = _About()


class _AdapterConfig(_WholeConfig):
    """adapter_config.json of a low-rank adapter."""

    lora_parameters: _LowRank


def base_noted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an adapter's configuration records of its base: model, fingerprint, loading options; maybe nothing.

    mlx_lm.lora records the model alone. Other keys are ignored: a stranger's adapter must not declare its base's code
    trusted.
    """
    theirs = {"model": config["model"]} if isinstance(config.get("model"), str) else {}
    found: dict[str, Any] = theirs if "mlxft" not in config else config["mlxft"].get("base", {})
    return {key: found[key] for key in _Base.model_fields if key in found}


def spec_of(config: dict[str, Any], model: nn.Module) -> LoRASpec | None:
    """Return the adapter's shape on this model; None for whole weights. mlx-lm's keys within a block also count."""
    if config["fine_tune_type"] == "full":
        return None
    given, keys = config["lora_parameters"], config["lora_parameters"].get("keys")
    last = layer_paths(model)[-max(config.get("num_layers", 0), 0) :]

    def adapted(name: str) -> bool:
        inside = _in_block(name, last)
        # mlx-lm's default, without keys, is every possible layer in the last blocks.
        return bool(inside) if keys is None else name in keys or inside in keys

    paths = [name for name, module in model.named_modules() if adaptable(module) and adapted(name)]
    dora = config["fine_tune_type"] == "dora"
    aware = config.get("mlxft", {}).get("quantize_aware")
    return LoRASpec(tuple(paths), given["rank"], given["scale"], given.get("dropout", 0.0), dora, aware)


def read_adapter(folder: Path, base: str | None = None) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Read the config and weights of an adapter folder.

    Args:
        base: fingerprint of the model; an adapter that names another base is refused.
    Raises:
        ModelError: the folder has no adapter, or one of another base, or its weights cannot be read.
    """
    config = read_adapter_config(folder)
    about = base_noted(config)
    if base is not None and not fits_base(about.get("fingerprint"), base):
        raise ModelError(
            f"{folder} was trained on another base: {about.get('model')} ({about['fingerprint']}), and this model is "
            f"{base} (shapes-settings); load the adapter on its own base"
        )
    weights = read_arrays(folder / "adapters.safetensors")[0]
    if config.get("mlxft", {}).get("quantize_aware") is not None and (folder / _INPUTS_FILE).is_file():
        weights |= read_arrays(folder / _INPUTS_FILE)[0]
    return config, weights


def load_adapter(model: nn.Module, folder: Path, base: str | None = None) -> LoRASpec | None:
    """Attach the adapter in a folder and load its weights; its layers and modules trained whole become trainable.

    Raises:
        ModelError: as for `read_adapter`, or its tensors do not fit.
    """
    config, weights = read_adapter(folder, base)
    spec = spec_of(config, model)
    if spec is not None:
        attach(model, spec)
    else:
        model.freeze()
    load_trained(model, weights, str(folder / "adapters.safetensors"))
    whole = [n for n in weights if n.rpartition(".")[2] not in SAVED]
    unfreeze(model, whole, str(folder))
    return spec


def load_with_adapter(path: str | Path, adapter: Path, options: Mapping[str, Any]) -> Loaded:
    """Load a base with the adapter in a folder. Arguments and errors as for `load_base_of`."""
    loaded = load_base_of(path, adapter, options)
    load_adapter(loaded.model, adapter, base_fingerprint(loaded))
    loaded.model.eval()
    return loaded


def load_base_of(path: str | Path, adapter: Path, options: Mapping[str, Any]) -> Loaded:
    """Load the base of the adapter in a folder, without the adapter.

    Args:
        path: the base, or the folder of the adapter or its run: then the base that the adapter names.
        options: as for mlxft.model.load.load; they override what the adapter records.
    Raises:
        ModelError: there is no such base, or the adapter belongs to another one.
    """
    base = base_noted(read_adapter_config(adapter))
    base.pop("fingerprint", None)
    name = base.pop("model", None)
    named = home_path(path) not in (adapter, adapter.parent)
    if not named:
        if name is None:
            raise ModelError(f"{adapter} does not record its base; name it with --model")
        path = stated_name(name)
    elif str(path) != name:
        base = {}
    options = {**base, "chat_template": template_of(adapter), **options}
    try:
        loaded = load_model(str(path), **options)
    except ModelError as e:
        if named:
            raise
        raise ModelError(f"{adapter}: its base cannot be loaded: {e}; if it has moved, name it with --model") from e
    ask_as_trained(loaded.tokenizer, adapter)
    return loaded


def template_of(adapter: Path) -> Path | None:
    """Return the `kept_template` of an adapter."""
    return kept_template(adapter, base_noted(read_adapter_config(adapter)).get("chat_template"))


def kept_template(folder: Path, named: Any) -> Path | None:
    """Return the folder if it has the chat template of training; None: that was the base's own template.

    Args:
        folder: an adapter's or a run's.
        named: the file that the template was read from, as the folder records it.
    Raises:
        ModelError: the folder has no template and only names a file: such a path may be a stranger's and is not read.
    """
    if (folder / TEMPLATE_FILE).is_file():
        check_links(folder)
        return folder
    if named:
        raise ModelError(
            f"{folder}: was trained with the chat template {named}, which is not in the folder; copy it there as "
            f"{TEMPLATE_FILE} if it is yours"
        )
    return None


def ask_as_trained(tokenizer: Any, adapter: Path) -> list[str]:
    """Render prompts as in the training of an adapter, and end completions at the tokens that ended a turn there.

    Returns:
        A note on each EOS token that is new.
    """
    about = read_adapter_config(adapter).get("mlxft", {})
    if about.get("enable_thinking") is False:
        set_thinking(tokenizer, False)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in about.get("eos_tokens", [])]
    return end_completions(tokenizer, [i for i in ids if i is not None and i != tokenizer.unk_token_id])


def load_trained(model: nn.Module, weights: dict[str, mx.array], origin: str) -> None:
    """Put trained weights into the model; every name and shape must fit, and each adapter must be complete.

    Raises:
        ModelError: some do not fit; it lists them.
    """
    there = dict(tree_flatten(model.parameters()))
    layers = low_rank_of(model)
    adapted = {f"{path}.{k}" for path, layer in layers.items() for k in SAVED if k in layer}
    problems = [f"{n}: the model has no such parameter" for n in weights if n not in there]
    for n, w in weights.items():
        if n in there and w.shape != there[n].shape:
            problems.append(f"{n}: shape {tuple(w.shape)}, the model's is {tuple(there[n].shape)}")
    missing = sorted(adapted - set(weights))
    if missing and not problems and all(n.rpartition(".")[2] == INPUTS for n in missing):
        raise ModelError(
            f"{origin}: without {_INPUTS_FILE}, by which the weights of {counted(len(missing), 'layers')} are rounded, "
            "this is not the model that was trained; copy that file from where it was trained, or train again"
        )
    problems += [f"{n}: not in the file" for n in missing]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ModelError(f"{origin} does not fit this model:\n  " + "\n  ".join(problems[:10]) + more)
    # Low-rank factors are trained in float32, whatever their type in the file.
    full = {n: w.astype(mx.float32) for n, w in weights.items() if n in adapted}
    model.load_weights(list((weights | full).items()), strict=False)


# --- merge ------------------------------------------------------------------------------------------------------------

Change = Callable[[], mx.array]  # computes the change of a weight, in its shape, float32


class Merged(LowRank):
    """A layer whose weight is the base's plus a sum of changes of any rank."""

    def __init__(self, base: nn.Module, changes: Sequence[Change]) -> None:
        super().__init__(scale=1.0, dropout=0.0)
        if hasattr(base, "as_linear"):
            self.embedding = base
        else:
            self.linear = base
        # As functions: modules and lists that a module holds are part of its weights.
        self._changes = lambda: changes
        self._kind = lambda: base  # also while another layer replaces the base

    def delta(self) -> mx.array:
        return sum((change() for change in self._changes()), mx.zeros((), dtype=mx.float32))

    def _layer(self, kind: Any) -> nn.Module:
        layer = plain_layer(self._kind(), self.delta().astype(kind))
        layer.pop("bias", None)  # the base has added it
        return layer

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        y = self.base(x, *args, **options)
        return y + self._layer(y.dtype)(x, *args, **options).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.base.as_linear(x)
        return y + self._layer(y.dtype).as_linear(x).astype(y.dtype)

    def __getattr__(self, key: str) -> Any:
        # Mixture blocks ask their experts for sizes.
        if key in ("input_dims", "output_dims", "num_experts"):
            return getattr(self.base, key)
        return super().__getattr__(key)


def merge_adapters(model: nn.Module, adapters: Sequence[tuple[Path, float]], base: str) -> int:
    """Add the weighted sum of adapters to their base; modules trained whole count with the change of their weights.

    Args:
        adapters: folders, and the weight of each one's change.
        base: fingerprint of the model.
    Returns:
        The number of parameters changed by modules that were trained whole.
    Raises:
        ModelError: an adapter has another base, or does not fit.
    """
    changes, whole = defaultdict[str, list[Change]](list), defaultdict[str, list[Change]](list)
    for folder, weight in adapters:
        for found, new in zip((changes, whole), _changes(model, folder, weight, base)):
            for name, change in new.items():
                found[name].append(change)
    modules = dict(model.named_modules())
    for path in changes:  # one adapter may have trained whole what another has a low-rank layer on
        changes[path] += whole.pop(f"{path}.weight", [])
    model.update_modules(tree_unflatten([(path, Merged(modules[path], given)) for path, given in changes.items()]))
    there = dict(tree_flatten(model.parameters()))
    for name, given in whole.items():
        total = sum((change() for change in given), there[name].astype(mx.float32))
        model.load_weights([(name, total.astype(there[name].dtype))], strict=False)
    return len(whole)


def _changes(model: nn.Module, folder: Path, weight: float, base: str) -> tuple[dict[str, Change], dict[str, Change]]:
    """Return an adapter's changes: of layers by path, and of parameters that it trained whole by name.

    The adapter is loaded onto the model, which checks it, and removed again.
    """
    modules = dict(model.named_modules())
    before = dict(tree_flatten(model.parameters()))
    load_adapter(model, folder, base)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LowRank)}
    after = dict(tree_flatten(model.parameters()))
    model.update_modules(tree_unflatten([(path, modules[path]) for path in layers]))
    moved = {n: v for n, v in after.items() if n in before and v is not before[n]}
    model.load_weights([(name, before[name]) for name in moved], strict=False)

    def layer_change(layer: LowRank) -> mx.array:
        return weight * shift(layer)

    def whole_change(name: str) -> mx.array:
        return weight * (moved[name].astype(mx.float32) - before[name].astype(mx.float32))

    of_layers: dict[str, Change] = {path: partial(layer_change, layer) for path, layer in layers.items()}
    return of_layers, {name: partial(whole_change, name) for name in moved}
