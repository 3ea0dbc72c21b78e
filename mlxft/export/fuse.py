"""An adapter fused into its base: one folder that mlx-lm, LM Studio and transformers load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxft.errors import ExportError, ModelError
from mlxft.model.folder import check_destination, save_folder, weight_bytes
from mlxft.model.load import Loaded
from mlxft.model.lora import QUANTIZED, LowRank, dense_weight, plain
from mlxft.rundir import find_adapter, load


def fuse_layers(model: nn.Module, *, dequantize: bool = False, bits: int | None = None) -> dict[str, int]:
    """Replace every low-rank layer by a plain one that does the same.

    Args:
        dequantize: leave no layer of the model quantised.
        bits: of fused layers whose base is quantised; default: as the base.
    Returns:
        Path of each requantised layer -> its bits.
    """
    requantized: dict[str, int] = {}
    fused: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if not isinstance(module, LowRank):
            continue
        base = module.base
        dtype = base.scales.dtype if isinstance(base, QUANTIZED) else base.weight.dtype
        layer = plain(base, module.fused_weight().astype(dtype))
        if isinstance(base, QUANTIZED) and not dequantize:
            if base.mode != "affine" and bits not in (None, base.bits):
                raise ExportError(f"--bits: {path} is quantised as {base.mode}, which has {base.bits} bits")
            requantized[path] = bits or base.bits
            layer = layer.to_quantized(base.group_size, requantized[path], mode=base.mode)
        fused.append((path, layer))
    model.update_modules(tree_unflatten(fused))
    if dequantize:
        rest = [(path, plain(m, dense_weight(m))) for path, m in model.named_modules() if isinstance(m, QUANTIZED)]
        model.update_modules(tree_unflatten(rest))
    return requantized


def fused_config(loaded: Loaded, requantized: dict[str, int], dequantize: bool) -> dict[str, Any]:
    """config.json of the fused model: true to how each layer is quantised."""
    config = copy.deepcopy(loaded.config)
    if dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        return config
    quantization = config.get("quantization")
    if quantization:
        for path, bits in requantized.items():
            own = quantization.get(path)
            before = own if isinstance(own, dict) else quantization
            if bits != before["bits"]:
                keys = ("group_size", "bits", "mode")
                quantization[path] = {k: before[k] for k in keys if k in before} | {"bits": bits}
        config["quantization_config"] = quantization
    return config


def fuse(
    run: Path,
    out: Path,
    *,
    model: str | None = None,
    dequantize: bool = False,
    bits: int | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Fuse a run or an adapter into its base and write the folder `out`.

    Returns:
        What was done, a sentence each; on a quantised base, what became of the precision.
    Raises:
        ModelError: no such run, or an adapter of another base.
        ExportError: `out` exists, or can not be written.
    """
    check_destination(out, overwrite)
    if not run.exists():
        raise ModelError(f"{run}: no such run or adapter")
    if not (find_adapter(run) / "adapter_config.json").exists():
        whole = f"; it was trained whole: its model is {run / 'model'}" if (run / "model").is_dir() else ""
        raise ModelError(f"{run}: there is no adapter to fuse (no adapter_config.json){whole}")
    loaded = load(model, find_adapter(run)) if model else load(run)
    quantized = [m for _, m in loaded.model.named_modules() if isinstance(m, QUANTIZED)]
    if (dequantize or bits) and not quantized:
        raise ExportError("the base is not quantised: --dequantize and --bits have nothing to act on")
    adapted = sum(isinstance(m, LowRank) for _, m in loaded.model.named_modules())
    if not adapted and not (run / "config.yaml").exists() and not (run / "adapter_config.json").exists():
        raise ModelError(
            f"{run}: is neither a run nor an adapter: there is nothing to fuse (mlxft convert copies a model)"
        )
    requantized = fuse_layers(loaded.model, dequantize=dequantize, bits=bits)
    config = fused_config(loaded, requantized, dequantize)
    mx.eval(loaded.model.parameters())
    source = loaded.path if loaded.path and loaded.path.is_dir() else None
    save_folder(out, loaded.model, loaded.tokenizer, config, overwrite=overwrite, source=source)
    said = [f"fused {adapted} layers; wrote {out} ({weight_bytes(loaded.model) / 1e6:,.0f} MB of weights)"]
    if quantized and dequantize:
        said.append("the base was quantised; the fused model is float: nothing of the adapter is rounded away")
    elif requantized:
        kinds = sorted(set(requantized.values()))
        said.append(
            f"the base is quantised: {len(requantized)} fused layers were rounded to {', '.join(map(str, kinds))} bits "
            "again, which can lose part of the fine-tune; --bits 8 or --dequantize keep more"
        )
    return said
