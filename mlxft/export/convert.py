"""One model folder out of any model that mlxft loads: hub id, folder, .gguf file or alias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxft.errors import ConfigError
from mlxft.model.folder import check_destination, save_folder, weight_bytes


def convert(
    src: str,
    dst: Path,
    *,
    dtype: str = "auto",
    quantize: int | None = None,
    group_size: int | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write `src` as a folder that mlx-lm and transformers read.

    Args:
        dtype: of floating weights; "auto" keeps the checkpoint's own (a .gguf: float16).
        quantize: bits; a .gguf that has as many keeps its own tensors. Without it a .gguf is dequantised and
            anything else stays as it is.
        dequantize: write plain weights from a quantised checkpoint.
    Returns:
        path, source, model_type, dtype, quantization (or None), parameters, bytes of weights, bits_per_weight.
    Raises:
        ConfigError: settings that exclude each other; or `dst` is there and may not be replaced.
        ModelError: `src` can not be loaded.  ExportError: the disk is too small or writing failed.
    """
    from mlxft.model.load import count_parameters, load

    if dequantize and quantize:
        raise ConfigError(f"convert: dequantize and quantize={quantize} exclude each other; do one, then the other")
    if group_size is not None and not quantize:
        raise ConfigError(f"convert: group_size {group_size} is for quantising; give quantize too, or leave it out")
    check_destination(dst, overwrite)
    loaded = load(
        src,
        dtype="own" if dtype == "auto" else dtype,
        quantize=0 if dequantize else quantize,
        group_size=group_size,
        trust_remote_code=trust_remote_code,
        revision=revision,
        lazy=True,
    )
    save_folder(dst, loaded.model, loaded.tokenizer, loaded.config, overwrite=overwrite, source=loaded.path)
    parameters, size = count_parameters(loaded.model), weight_bytes(loaded.model)
    return {
        "path": str(dst),
        "source": src,
        "model_type": loaded.config["model_type"],
        "dtype": loaded.config.get("torch_dtype", loaded.config.get("dtype")),
        "quantization": loaded.config.get("quantization"),
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": round(8 * size / parameters, 3),
    }
