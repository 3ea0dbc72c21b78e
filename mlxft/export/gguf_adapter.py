"""A LoRA adapter as a .gguf file for llama.cpp's --lora.

Layout: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp: NAME.weight.lora_a (rank, in) and .lora_b
(out, rank), whose product counts alpha / rank times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxft.errors import ExportError
from mlxft.export.gguf_tensors import Tensor, encode
from mlxft.model.adapters import read_adapter_config, trainable_weights
from mlxft.model.gguf_names import Architecture, permute
from mlxft.model.load import Loaded
from mlxft.model.lora import LEAVES, LoRALinear, LowRank
from mlxft.rundir import find_adapter

_WHOLE = "export the whole model instead (without --lora), or fuse it (mlxft fuse)"


def adapter_tensors(
    run: Path, loaded: Loaded, arch: Architecture, kind: str
) -> tuple[list[Tensor], dict[str, Any], list[str]]:
    """Tensors, metadata and what is to be said of an adapter.

    Raises:
        ExportError: no adapter, or one that llama.cpp has no form for.
    """
    folder = find_adapter(run)
    if not (folder / "adapter_config.json").is_file():
        raise ExportError(f"--lora: {run} holds no adapter; leave --lora out")
    tuned = read_adapter_config(folder)["fine_tune_type"]
    if tuned != "lora":
        what = "DoRA rescales rows of the base" if tuned == "dora" else "its weights were trained whole"
        raise ExportError(f"--lora: {folder}: {what}, which a .gguf adapter can not say; {_WHOLE}")
    trained = [n for n in trainable_weights(loaded.model) if n.rpartition(".")[2] not in LEAVES]
    if trained:
        raise ExportError(
            f"--lora: {trained[0]} was trained whole, and a .gguf adapter holds low-rank updates only; {_WHOLE}"
        )
    tensors: list[Tensor] = []
    scales, ranks = set(), set()
    for path, layer in loaded.model.named_modules():
        if not isinstance(layer, LowRank):
            continue
        name = arch.theirs(f"{path.removeprefix('language_model.')}.weight")
        if not isinstance(layer, LoRALinear) or name is None:
            raise ExportError(f"--lora: {path} is no linear layer that llama.cpp adapts; {_WHOLE}")
        scales.add(layer.scale)
        ranks.add(layer.lora_a.shape[1])
        tensors += _pair(layer, name, arch, loaded.config, kind)
    if not tensors:
        raise ExportError(f"--lora: {folder} adapts no layer")
    scale, rank = scales.pop(), ranks.pop()
    if scale == 0:
        raise ExportError("--lora: the adapter's scale is 0: it does nothing, and llama.cpp would read 0 as 1")
    assert not scales | ranks, "an adapter has one scale and one rank"
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(scale * rank)}
    return tensors, metadata, [f"use it on the base: llama-cli -m BASE.gguf --lora FILE ({len(tensors) // 2} layers)"]


def _pair(layer: LoRALinear, name: str, arch: Architecture, config: dict[str, Any], kind: str) -> list[Tensor]:
    (width, rank), height = layer.lora_a.shape, layer.lora_b.shape[1]
    heads = arch.heads(name, config)

    def down() -> Any:
        return encode(layer.lora_a.T.astype(mx.float32), kind, f"{name}.lora_a")

    def up() -> Any:
        value = layer.lora_b.T.astype(mx.float32)
        return encode(value if heads is None else permute(value, heads), kind, f"{name}.lora_b")

    pair: tuple[tuple[str, tuple[int, ...], Callable[[], Any]], ...] = (
        ("lora_a", (rank, width), down),
        ("lora_b", (height, rank), up),
    )
    return [Tensor(f"{name}.{part}", shape, kind, read) for part, shape, read in pair]
