"""An adapter fused into its base: one folder that mlx-lm, LM Studio and transformers load."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
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


@dataclass
class Fusion:
    """What fusing did."""

    layers: int = 0
    requantized: dict[str, int] = field(default_factory=dict)  # path of a layer -> its bits
    update2: float = 0.0  # squared length of the adapter's update, over the requantised layers
    rounding2: float = 0.0  # the same of what requantising them moved

    @property
    def rounding(self) -> float:
        """How far requantising moved the weights, in lengths of the adapter's update: near 0 all of it survives."""
        return float((self.rounding2 / self.update2) ** 0.5) if self.update2 else 0.0


def fuse_layers(model: nn.Module, *, dequantize: bool = False, bits: int | None = None) -> Fusion:
    """Replace every low-rank layer by a plain one that does the same.

    Args:
        dequantize: leave no layer of the model quantised.
        bits: of fused layers whose base is quantised; default: as the base.
    """
    done = Fusion()
    fused: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if not isinstance(module, LowRank):
            continue
        base = module.base
        dtype = base.scales.dtype if isinstance(base, QUANTIZED) else base.weight.dtype
        weight = module.fused_weight()
        layer = plain(base, weight.astype(dtype))
        if isinstance(base, QUANTIZED) and not dequantize:
            if base.mode != "affine" and bits not in (None, base.bits):
                raise ExportError(f"--bits: {path} is quantised as {base.mode}, which has {base.bits} bits")
            done.requantized[path] = bits or base.bits
            layer = layer.to_quantized(base.group_size, done.requantized[path], mode=base.mode)
            done.update2 += float((weight - dense_weight(base)).astype(mx.float32).square().sum())
            done.rounding2 += float((dense_weight(layer) - weight).astype(mx.float32).square().sum())
        fused.append((path, layer))
    done.layers = len(fused)
    model.update_modules(tree_unflatten(fused))
    if dequantize:
        rest = [(path, plain(m, dense_weight(m))) for path, m in model.named_modules() if isinstance(m, QUANTIZED)]
        model.update_modules(tree_unflatten(rest))
    return done


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
        if (run / "model").is_dir():
            raise ModelError(f"{run}: was trained whole, there is no adapter to fuse; its model is {run / 'model'}")
        if not (run / "config.yaml").exists():
            raise ModelError(
                f"{run}: is neither a run nor an adapter: there is nothing to fuse (mlxft convert copies a model)"
            )
    loaded = load(model, find_adapter(run)) if model else load(run)
    quantized = [m for _, m in loaded.model.named_modules() if isinstance(m, QUANTIZED)]
    if (dequantize or bits) and not quantized:
        raise ExportError("the base is not quantised: --dequantize and --bits have nothing to act on")
    done = fuse_layers(loaded.model, dequantize=dequantize, bits=bits)
    config = fused_config(loaded, done.requantized, dequantize)
    mx.eval(loaded.model.parameters())
    source = loaded.path if loaded.path and loaded.path.is_dir() else None
    save_folder(out, loaded.model, loaded.tokenizer, config, overwrite=overwrite, source=source)
    said = [f"fused {done.layers} layers; wrote {out} ({weight_bytes(loaded.model) / 1e6:,.0f} MB of weights)"]
    if quantized and dequantize:
        said.append("the base was quantised; the fused model is float: nothing of the adapter is rounded away")
    elif done.requantized:
        said.append(_precision(done))
    return said


def _precision(done: Fusion) -> str:
    """What requantising left of the fine-tune, in a sentence."""
    kinds = ", ".join(str(bits) for bits in sorted(set(done.requantized.values())))
    said = (
        f"the base is quantised: {len(done.requantized)} fused layers were rounded to {kinds} bits again, which moved "
        f"their weights {done.rounding:.2g} times as far as the adapter did"
    )
    if done.rounding <= 0.25:
        return said
    better = "" if min(done.requantized.values()) >= 8 else "--bits 8 keeps more, "
    return f"{said}; such noise can drown the fine-tune: {better}--dequantize keeps all of it"
