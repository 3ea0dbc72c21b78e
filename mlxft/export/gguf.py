"""A run, an adapter or a model as one .gguf file, for llama.cpp and what is built on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft import __version__
from mlxft.errors import CheckpointError, ConfigError, ExportError, missing_extra
from mlxft.export.gguf_adapter import adapter_tensors
from mlxft.export.gguf_settings import Get, family, lookup, rope_tensors, settings
from mlxft.export.gguf_tensors import (
    FILE_TYPES,
    KINDS,
    Tensor,
    Weight,
    encode,
    model_weights,
    stored_bytes,
    stored_kind,
)
from mlxft.export.gguf_vocab import vocabulary
from mlxft.model import gguf
from mlxft.model.folder import check_space, check_unused
from mlxft.model.gguf_names import ROPE_LONG, ROPE_TENSORS, Architecture, permute
from mlxft.model.gguf_tokenizer import SPACE
from mlxft.model.heads import find_head
from mlxft.model.load import Loaded
from mlxft.model.lora import QUANTIZED, LowRank
from mlxft.model.source import ALIASES, resolve
from mlxft.owned import check_file, is_stream, note
from mlxft.rundir import find_adapter, load
from mlxft.trainer.files import write_beside

MADE_BY = "mlxft.version"  # key of the metadata that marks a file as ours


def export_gguf(
    run: Path, out: Path, *, kind: str, lora: bool = False, model: str | None = None, overwrite: bool = False
) -> list[str]:
    """Write a run, an adapter on its base, or any model that mlxft loads as a .gguf file.

    Args:
        run: a run or adapter folder, a model folder, a .gguf file, a hub id or an alias.
        out: the file, ending in .gguf.
        kind: of the matrices: f32, f16, bf16 or q8_0; vectors are f32 always.
        lora: write the adapter alone, for llama.cpp's --lora.
        model: the base, where the adapter does not say or it has moved.
        overwrite: replace `out` if it is a .gguf file that mlxft wrote.
    Returns:
        What was done, a sentence each.
    Raises:
        ConfigError: `out` is no file that may be written.
        ExportError: an architecture, tokenizer, adapter or kind that .gguf can not hold; no space.
        ModelError: nothing there, or an adapter of another base.
    """
    check_arguments(kind, lora)
    check_output(out, overwrite)
    loaded = open_model(run, model)
    check_unused(out, [loaded.path])
    said = write_adapter(run, loaded, out, kind) if lora else write_model(run, loaded, out, kind)
    note(out)
    return said


def write_model(run: Path, loaded: Loaded, out: Path, kind: str) -> list[str]:
    """Write a whole model, its adapter fused; see `export_gguf`. The model is used up."""
    arch, get = family(loaded.config), lookup(loaded.model, loaded.config)
    tensors, said = model_tensors(loaded.model, arch, get, kind)
    rows = next(t.shape[0] for t in tensors if t.name == "token_embd.weight")
    own = {f"{arch.name}.vocab_size": rows, **settings(arch, get), **vocabulary(loaded.tokenizer, rows)}
    said += notes(loaded, own, tensors)
    size = write(out, arch.name, about(run, arch, kind, loaded.tokenizer) | own, tensors)
    return [f"wrote {out} ({size / 1e6:,.1f} MB, {len(tensors)} tensors, {kind})", *said]


def write_adapter(run: Path, loaded: Loaded, out: Path, kind: str) -> list[str]:
    """Write the adapter alone; see `export_gguf`."""
    arch = family(loaded.config)
    tensors, own, said = adapter_tensors(run, loaded, arch, kind)
    size = write(out, arch.name, about(run, arch, kind, loaded.tokenizer) | own, tensors)
    return [f"wrote {out} ({size / 1e6:,.1f} MB, {len(tensors)} tensors, {kind})", *said]


def check_arguments(kind: str, lora: bool = False) -> None:
    """ExportError for what can not be written, before anything is loaded."""
    if kind not in KINDS:
        raise ExportError(
            f"type {kind!r} is not written as .gguf, only {', '.join(KINDS)}; llama-quantize makes others"
        )
    if lora and kind == "q8_0":
        raise ExportError("a .gguf adapter is written as f16, bf16 or f32, not q8_0: its rows are too short to pack")
    if find_spec("gguf") is None:
        raise ExportError(f"--format gguf: {missing_extra('gguf', 'gguf')}")


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse a file that may not be written.

    Raises:
        ConfigError: its name has another ending; or it is there, and not `overwrite` and a file that mlxft wrote.
    """
    if out.suffix != ".gguf":
        raise ConfigError(f"{out}: the file's name must end in .gguf, so that others know it; try {out}.gguf")
    check_file(out, overwrite, "OUT")
    if is_stream(out):
        raise ConfigError(f"{out}: is a device or a pipe, which a .gguf can not be written to; give a file's name")
    if out.is_file():
        with out.open("rb") as file:
            head = file.read(4096)
        if not head.startswith(b"GGUF") or MADE_BY.encode() not in head:
            raise ConfigError(
                f"{out}: is not a .gguf file that this version of mlxft wrote, so it is not overwritten; give another "
                "name, or remove it yourself"
            )


def open_model(run: Path, model: str | None) -> Loaded:
    """What is to be written, its weights unread.

    A .gguf file alone keeps its own numbers: it is opened packed, not by way of the float16 that it runs in.
    """
    if (head := find_head(run)) is not None:
        raise ExportError(
            f"{run} is a reward model ({head.name}): it gives scores, and a .gguf file holds models that give text; "
            "export it as --format seq-cls, or use mlxft score"
        )
    if model is not None:
        folder = find_adapter(run)
        if not (folder / "adapter_config.json").is_file():
            raise ExportError(f"--model: {run} holds no adapter that would want a base; leave it out")
        return load(model, folder, lazy=True)
    if run.suffix == ".gguf" or str(run) in ALIASES:
        where = resolve(str(run))
        file = gguf.read(where)
        network, config = gguf.build(file)
        return Loaded(network, gguf.tokenizer(file), config, str(run), where)
    return load(run, lazy=True)


def about(run: Path, arch: Architecture, kind: str, tokenizer: Any) -> dict[str, Any]:
    """Metadata that every file has."""
    name = (run.stem if run.suffix == ".gguf" else run.resolve().name) or arch.name
    return {
        "general.type": "model",
        "general.name": fitting_name(name, tokenizer),
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
    }


def fitting_name(name: str, tokenizer: Any) -> str:
    """A model's name that llama.cpp draws the right conclusion from.

    Phi 3's marks take the space behind them with them; llama.cpp knows that by the name alone (phi-3 or phi3), and
    can not load a file of that name without these tokens.
    """
    marks = [t for t in tokenizer.added_tokens_decoder.values() if t.content in ("<|user|>", "<|assistant|>")]
    vocab = tokenizer.get_vocab()
    is_phi3 = any(t.rstrip for t in marks) and all(t in vocab for t in ("</s>", "<unk>", "<s>", "<|endoftext|>"))
    says_so = re.search("phi-?3", name, re.IGNORECASE) is not None
    if is_phi3 == says_so:
        return name
    return f"{name} (phi-3)" if is_phi3 else re.sub("(?i)(phi)-?3", r"\1 3", name)


def model_tensors(model: nn.Module, arch: Architecture, get: Get, kind: str) -> tuple[list[Tensor], list[str]]:
    """All tensors of a model in llama.cpp's names and layout, and what is to be said of them."""
    packed = sum(isinstance(m, QUANTIZED) for m in model.modules())
    adapted = sum(isinstance(m, LowRank) for m in model.modules())
    heads = {"num_attention_heads": get("num_attention_heads"), "num_key_value_heads": get("num_key_value_heads")}
    tensors, unknown = [], []
    for weight in model_weights(model):
        name = arch.theirs(weight.name.removeprefix("language_model."))
        if name is None:
            unknown.append(weight.name)
            continue
        stored = stored_kind(name, weight.shape, kind)
        tensors.append(Tensor(name, weight.shape, stored, _reader(weight, name, stored, arch, heads)))
    if unknown:
        shown = ", ".join(unknown[:5])
        raise ExportError(f"{len(unknown)} weights that a {arch.name} .gguf has no place for ({shown})")
    for name, value in rope_tensors(arch, get).items():
        tensors.append(Tensor(name, value.shape, "f32", partial(encode, value, "f32", name)))
    said = [f"the adapter is fused into {adapted} layers"] if adapted else []
    if packed:
        said.append(f"the base is quantised: {packed} layers were dequantised, then written as {kind}")
    return tensors, said


def _reader(weight: Weight, name: str, kind: str, arch: Architecture, config: dict[str, Any]) -> Callable[[], Any]:
    def read() -> Any:
        value = weight.read()
        if (heads := arch.heads(name, config)) is not None:
            value = permute(value, heads)
        if arch.is_shifted(name):
            value = value + 1
        return encode(value, kind, name)

    return read


def notes(loaded: Loaded, metadata: dict[str, Any], tensors: list[Tensor]) -> list[str]:
    """What llama.cpp will do otherwise than mlx-lm."""
    said, tokenizer = [], loaded.tokenizer
    if (beyond := len(tokenizer) - len(metadata["tokenizer.ggml.tokens"])) > 0:
        said.append(f"{beyond} tokens that the embedding has no row for are left out")
    if "text_config" in loaded.config:
        said.append("only the language model is written; its eyes are not")
    start = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[:1])
    if metadata.get("tokenizer.ggml.add_space_prefix") is False and start[0].startswith(SPACE):
        said.append(
            "llama.cpp cuts chats as mlx-lm does; plain text, without the chat template, it begins without a space"
        )
    if window := metadata.get("gemma2.attention.sliding_window"):
        said.append(
            f"every other layer of a Gemma 2 sees the last {window} tokens only in llama.cpp, and all in mlx-lm: "
            "beyond that length their answers differ"
        )
    if any(t.name == ROPE_LONG for t in tensors):
        original = loaded.config.get("original_max_position_embeddings", 4096)
        said.append(
            f"mlx-lm turns by the long rope factors at every length; llama.cpp does where its context (-c) is over "
            f"{original}: give it more for the same answers"
        )
    return said


def write(out: Path, arch: str, metadata: dict[str, Any], tensors: list[Tensor]) -> int:
    """Write a file, one tensor in memory at a time; whole or not at all. Returns its bytes.

    Raises:
        ExportError: no space, or writing failed; nothing is left of it.
    """
    check_space(out, sum(stored_bytes(t.shape, t.kind) for t in tensors))
    # The rope's tensors first, as llama.cpp's converter has them.
    ordered = sorted(tensors, key=lambda t: t.name not in ROPE_TENSORS)
    try:
        # The first, so that a look at the file's head tells whose it is.
        metadata = {MADE_BY: __version__, **metadata}
        write_beside(out, lambda part: _fill(part, arch, metadata, ordered))
    except CheckpointError as error:
        raise ExportError(f"{out}: writing failed, nothing is left of it: {error.__cause__}") from error
    return out.stat().st_size


def _fill(file: Path, arch: str, metadata: dict[str, Any], tensors: list[Tensor]) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    stored = {"f32": "float32", "f16": "float16", "bf16": "uint16", "q8_0": "uint8"}
    of = GGUFValueType
    types = {bool: of.BOOL, int: of.UINT32, float: of.FLOAT32, str: of.STRING}
    writer = GGUFWriter(file, arch)
    try:
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, types[type(value)])
        for t in tensors:
            size = stored_bytes(t.shape, t.kind)
            shape = (*t.shape[:-1], stored_bytes(t.shape[-1:], t.kind)) if t.kind == "q8_0" else t.shape
            writer.add_tensor_info(t.name, shape, np.dtype(stored[t.kind]), size, GGMLQuantizationType[t.kind.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            writer.write_tensor_data(t.read())
            mx.clear_cache()
    finally:
        writer.close()
