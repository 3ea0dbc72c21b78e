"""Reads a .gguf file: weights under Hugging Face's names, config, tokenizer.

MLX reads the container (`mx.load(..., return_metadata=True)`): Q4_0 and Q4_1 come out as affine 4-bit and Q8_0 as
affine 8-bit, all in groups of 32 (weight, scales, biases), F16 and F32 as they are; BF16 is read here.
What differs from a Hugging Face folder stands in the tables of gguf_names and gguf_pretokenizers.
Layout: ggml/docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.errors import ModelError
from mlxft.model.declared import ModelConfig, validate
from mlxft.model.gguf_config import GgufFile, config, eos_ids
from mlxft.model.gguf_header import Entry, tensor_table
from mlxft.model.gguf_names import ARCHITECTURES, ROPE_TENSORS, architecture, unpermute
from mlxft.model.gguf_tokenizer import tokenizer

__all__ = ["ARCHITECTURES", "GgufFile", "build", "config", "eos_ids", "own_dtype", "read", "tokenizer", "weights"]

GROUP_SIZE = 32
# MLX reads more, and reads some of it wrongly.
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0")


def read(path: Path) -> GgufFile:
    """Read the whole file.

    Raises:
        ModelError: not a GGUF file, truncated, split, of an architecture or quantisation that is not read here.
    """
    try:
        table = tensor_table(path)
    except OSError as error:
        raise ModelError(f"{path}: can not be read: {error.strerror or error}") from error
    except (ValueError, OverflowError) as error:
        raise ModelError(f"{path}: {error}; download it again") from error
    if odd := sorted({entry.kind for entry in table.values()} - set(READABLE)):
        raise ModelError(
            f"{path}: holds tensors in {', '.join(odd)}, which can not be read right; take a file in one of "
            f"{', '.join(READABLE)}, or the model's safetensors"
        )
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        tensors, metadata = loaded
        tensors.update({name: _bfloat16(path, entry) for name, entry in table.items() if entry.kind == "BF16"})
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: broken or truncated: {text}; download it again") from error
    file_ = GgufFile(path, tensors, metadata, architecture(metadata.get("general.architecture"), str(path)))
    if metadata.get("general.type") == "adapter":
        raise ModelError(f"{path}: is an adapter, not a model: llama.cpp takes it beside its base (--lora)")
    if file_.integer("split.count", 1) > 1:
        raise ModelError(f"{path}: one part of {file_.integer('split.count')}; join them with llama-gguf-split --merge")
    if file_.integer("expert_count", 0) > 0:
        raise ModelError(f"{path}: a mixture of experts, which is not read from .gguf files; use its safetensors")
    return file_


def _bfloat16(path: Path, entry: Entry) -> mx.array:
    """A BF16 tensor as it stands in the file: MLX would give it as float16."""
    bits = np.fromfile(path, np.uint16, math.prod(entry.shape), offset=entry.offset)
    return mx.array(bits).view(mx.bfloat16).reshape(entry.shape)


def weights(file: GgufFile, config: dict[str, Any]) -> dict[str, mx.array]:
    """All tensors under Hugging Face's names; llama.cpp's order of the rows of q and k, and the 1 it adds to the norms
    of some families, are undone.
    """
    out: dict[str, mx.array] = {}
    unknown: list[str] = []
    for name, tensor in file.tensors.items():
        if name in ROPE_TENSORS:
            continue
        ours = file.architecture.ours(name)
        if ours is None:
            unknown.append(name)
            continue
        if (heads := file.architecture.heads(name, config)) is not None:
            tensor = unpermute(tensor, heads)
        out[ours] = tensor.astype(mx.float32) - 1 if file.architecture.is_shifted(name) else tensor
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise ModelError(f"{file.path}: {len(unknown)} tensors that {config['model_type']} has not ({shown})")
    return out


def own_dtype(file: GgufFile) -> Any:
    """What a file's floats are loaded as: bfloat16 where most of them are, else float16."""
    sizes = {mx.bfloat16: 0, mx.float16: 0}
    for tensor in file.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.size
    return mx.bfloat16 if sizes[mx.bfloat16] > sizes[mx.float16] else mx.float16


def build(file: GgufFile) -> tuple[nn.Module, dict[str, Any]]:
    """The mlx-lm model with the file's own tensors (packed where they are packed), and its config."""
    import importlib

    settings = config(file)
    validate(ModelConfig, settings, file.path)
    tensors = weights(file, settings)
    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    if hasattr(model, "sanitize"):
        tensors = model.sanitize(tensors)
    layers: dict[str, int] = {}
    for path, layer in model.named_modules():
        if f"{path}.scales" in tensors:
            layers[path] = tensors[f"{path}.weight"].shape[1] * 32 // layer.weight.shape[1]
    if layers:
        # Most layers' bits stand on top, as in any MLX folder; the others stand by name.
        bits = max(set(layers.values()), key=list(layers.values()).count)
        quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        for path, own in layers.items():
            if own != bits:
                quantization[path] = {"group_size": GROUP_SIZE, "bits": own, "mode": "affine"}
        shape = {path: {"group_size": GROUP_SIZE, "bits": own} for path, own in layers.items()}
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits, class_predicate=lambda path, _: shape.get(path, False))
        settings["quantization"] = quantization
    try:
        model.load_weights(list(tensors.items()), strict=True)
    except ValueError as error:
        raise ModelError(f"{file.path}: the tensors do not fit the metadata: {error}") from error
    return model, settings
