"""Check the files of a model folder before they are used, and write such folders."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from mlxft.data.chat import thinking_of
from mlxft.data.sources import type_name
from mlxft.errors import CheckpointError, ConfigError, ExportError, MlxftError, ModelError, half_character, switch
from mlxft.files import check_replaceable, check_writable, claim, clear, explained, is_empty, note, remove
from mlxft.text import TooDeep, parse_json

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


# --- declared ---------------------------------------------------------------------------------------------------------
# Types and limits of what the files of a model or adapter may declare, checked before anything is built from them.
#
# These files come from strangers. A wrong type or an absurd number is refused by name here, for all commands; `foreign`
# covers what only another library's reader finds.

_MOST_BYTES, _MOST_DEPTH = 1 << 26, 64  # of a JSON file; real ones have some kilobytes and five levels
_MOST_NUMBER = 1 << 31  # of a size that the schema does not name
_MOST_COUNT = 1 << 20  # of a size whose name begins with num_ or n_: models are built in loops over it
NO_NUMBERS = "the model computes NaN: its weights, its adapter or a scale are damaged"

_Layers = Annotated[int, Field(strict=True, ge=1, le=2_000)]
Heads = Annotated[int, Field(strict=True, ge=1, le=1 << 14)]
Width = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
_Rows = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Experts = Annotated[int, Field(strict=True, ge=0, le=1 << 14)]
Rank = Annotated[int, Field(strict=True, ge=1, le=1 << 16)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Id = Annotated[int, Field(strict=True, ge=-1, le=_MOST_NUMBER)]
Dtype = Annotated[str, Field(pattern=r"^(torch\.)?(float(8\w*|16|32|64)|bfloat16|auto)$")]

_SIZES: dict[Any, str] = {
    _Layers: "num_hidden_layers num_layers n_layers n_layer num_transformer_layers",
    Heads: "num_attention_heads num_heads n_heads n_head",
    Width: "hidden_size head_dim d_model n_embd model_dim hidden_dim",
    _Rows: "vocab_size padded_vocab_size num_vocab",
    Experts: "num_experts num_local_experts n_routed_experts num_experts_per_tok num_key_value_heads num_kv_heads",
    Real: "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps",
}
# Some architectures list these, one for each layer.
_LISTED = ["num_attention_heads", "num_key_value_heads", "num_heads", "num_kv_heads", "head_dim", "num_experts_per_tok"]


class Lenient(BaseModel):
    """A part of a stranger's file; keys without a type here may have any value."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Quantization(Lenient):
    """Packing of weights; a key with a layer's name has that layer's packing, or false."""

    group_size: Literal[16, 32, 64, 128]
    bits: Literal[2, 3, 4, 5, 6, 8]
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"

    @model_validator(mode="after")
    def _layers(self) -> Quantization:
        for own in (self.model_extra or {}).values():
            if isinstance(own, dict):
                Quantization.model_validate({"group_size": self.group_size, "bits": self.bits, **own})
            elif isinstance(own, list):
                raise ValueError("a layer's packing is a list; expected an object, true or false")
        return self


_FIELDS: dict[str, Any] = {
    name: (kind | list[Any] | None if name in _LISTED else kind | None, None)
    for kind, names in _SIZES.items()
    for name in names.split()
}


class ModelConfig(create_model("_Sizes", __base__=Lenient, **_FIELDS)):  # type: ignore[misc]
    """The part of config.json that all architectures share."""

    model_type: Annotated[str, Field(pattern=r"^[\w-]{1,100}$")] | None = None
    architectures: list[str] | str | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    max_position_embeddings: Real | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    eos_token_id: Id | list[Id] | None = None
    tie_word_embeddings: bool | None = None
    quantization: Quantization | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: ModelConfig | None = None
    model_file: str | None = None

    @model_validator(mode="after")
    def _others(self) -> ModelConfig:
        for name, value in (self.model_extra or {}).items():
            counts = name.startswith(("num_", "n_")) and name not in ("n_ctx", "n_positions")
            most = _MOST_COUNT if counts else _MOST_NUMBER
            if isinstance(value, int) and abs(value) > most and not name.endswith(("_length", "_tokens")):
                raise ValueError(f"{name} is {_short(value)}; expected at most {most:,}")
        return self


class GenerationConfig(Lenient):
    """generation_config.json."""

    eos_token_id: Id | list[Id] | None = None
    temperature: Real | None = None
    top_p: Real | None = None


class TokenizerConfig(Lenient):
    """tokenizer_config.json."""

    model_max_length: Annotated[float, Field(strict=True)] | None = None
    chat_template: str | list[Any] | dict[str, Any] | None = None
    added_tokens_decoder: dict[str, Any] | None = None


_FILES: dict[str, type[BaseModel]] = {
    "config.json": ModelConfig,
    "generation_config.json": GenerationConfig,
    "tokenizer_config.json": TokenizerConfig,
}
NAMED_TEMPLATES = "additional_chat_templates"  # transformers' folder for templates beside the default


def lies_in(folder: Path, file: Path) -> bool:
    """Return whether a file is in its folder, not a link to a file elsewhere; links of the hub's cache count as in."""
    real = file.resolve()
    cached = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    return cached or folder.resolve() in real.parents


def check_links(folder: Path) -> None:
    """Refuse links out of a folder, which may be a stranger's: their files would be copied, shown and uploaded.

    Weights may be links: users keep them elsewhere, and nothing but weights can be read from them.
    """
    for file in (*folder.iterdir(), *(folder / NAMED_TEMPLATES).glob("*")):
        read = file.is_dir() if file.name == NAMED_TEMPLATES else file.is_file() and file.suffix != ".safetensors"
        if read and not lies_in(folder, file):
            raise ModelError(f"{file}: is a link out of its folder, so it is not read; put a copy there if it is yours")


def check_files(folder: Path) -> None:
    """Refuse a model's folder with links out of it, or JSON files with values of the wrong type or out of bounds."""
    check_links(folder)
    for file in folder.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ModelError(f"{file}: is a pipe or a device; expected a file")
    for name, schema in _FILES.items():
        if (folder / name).exists():
            check_schema(schema, read_object(folder / name), folder / name)


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of reasonable size and depth.

    Raises:
        ModelError: the file is something else.
        OSError: the file cannot be read.
    """
    if not file.is_file() and file.exists():
        raise ModelError(f"{file}: is not a file; expected a JSON object")
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise ModelError(f"{file}: has {size:,} bytes; expected at most {_MOST_BYTES:,}")
    try:
        found = parse_json(file.read_bytes())
        depth, level = 0, [found]
        while level := [
            v for at in level for v in (at.values() if isinstance(at, dict) else at if isinstance(at, list) else ())
        ]:
            if (depth := depth + 1) > _MOST_DEPTH:
                raise TooDeep
    except TooDeep:
        raise ModelError(f"{file}: is nested deeper than {_MOST_DEPTH} levels") from None
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: is {type_name(found)}; expected a JSON object")
    if half := half_character(found):
        raise ModelError(f"{file}: {half}")
    return found


def check_schema(schema: type[BaseModel], found: Mapping[str, Any], where: Path | str) -> None:
    """Raise a ModelError with all values that do not fit the schema."""
    try:
        schema.model_validate(found)
    except RecursionError:
        raise ModelError(f"{where}: refers to itself") from None
    except ValidationError as error:
        problems: dict[str, str] = {}  # the branches of a union are one problem: the first explains most
        for e in error.errors():
            missing = e["type"] == "missing"
            # Not the names of a union's branches, which are among the locations.
            place = ".".join(str(p) for p in e["loc"] if missing or isinstance(p, int) or p in _keys(found))
            wanted = e["msg"].replace("Input should be", "expected").replace("String should", "expected a text to")
            if missing:
                problem = f"{place} is missing"
            elif e["type"] == "value_error":
                problem = str(e["ctx"]["error"])
            else:
                problem = f"{place} is {_short(e['input'])}; {wanted}"
            problems.setdefault(place, problem)
        raise ModelError(f"{where}: {'; '.join(problems.values())}") from error


def _keys(value: Any) -> set[str]:
    """Return all keys in nested mappings."""
    return set(value).union(*map(_keys, value.values())) if isinstance(value, Mapping) else set()


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write out thousands of digits
        return "a number of more than 60 digits"
    text = type_name(value) if value is None or isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def foreign(where: str) -> Iterator[None]:
    """Turn any error of another library about a stranger's file into a ModelError that names the place.

    Readers raise nearly anything, and some of mlx-lm's architectures end the process if a package is missing.
    """
    try:
        yield
    except (MlxftError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # Neither SystemExit nor a panic of Rust is an Exception; nothing else of that kind comes from a library.
        if not isinstance(error, Exception | SystemExit) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{where}: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """Return another library's error message in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_arrays(file: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a .safetensors file from its header; nothing else is read.

    Raises:
        ModelError: the file is cut off, or its tensors overlap, leave gaps or reach beyond its end.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file() and file.exists():
        raise ModelError(f"{file}: is not a file")
    try:
        with safe_open(file, framework="numpy") as found:
            return {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{file}: is not a whole safetensors file ({error}); download it again") from error


def read_arrays(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read the arrays and metadata of a .safetensors file.

    Raises:
        ModelError: the file cannot be read or is damaged, or has NaN, with which a model would compute nonsense.
    """
    try:
        check_arrays(file)
        arrays, metadata = cast(Any, mx.load(str(file), return_metadata=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    for name, value in arrays.items():
        if not mx.isfinite(value).all().item():
            raise ModelError(f"{file}: {name[:80]} holds NaN or infinity; the training that wrote it has failed")
    return arrays, metadata


# --- folder -----------------------------------------------------------------------------------------------------------

_SLACK_BYTES = 48 << 20  # of files beside the weights: a tokenizer with a quarter of a million tokens, and a reserve


def save_folder(
    dst: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    *,
    overwrite: bool = False,
    source: Path | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write config.json, model*.safetensors, tokenizer files and generation_config.json to `dst`.

    Everything is written to a hidden folder beside `dst`, which is renamed at the end. The model stays as it is;
    lazily loaded weights are read, also from `dst` itself.

    Args:
        overwrite: replace `dst` if it is a model folder that mlxft made.
        source: folder of the original model, whose generation settings and own code are copied.
        beside: a function that writes further files into the folder.
    Raises:
        ConfigError: `dst` exists and may not be replaced.
        ExportError: the disk is too small, or writing failed; then nothing is left behind.
    """
    check_destination(dst, overwrite)
    check_space(dst, weight_bytes(model))
    with replace_folder(dst, "model") as part:
        _write(part, model, tokenizer, config, source)
        if beside is not None:
            beside(part)
    return dst


@contextmanager
def replace_folder(dst: Path, kind: str) -> Iterator[Path]:
    """Yield a hidden folder beside `dst` to be filled inside the block; at its end it takes the name of `dst`.

    Args:
        kind: a key of mlxft.files.KINDS.
    Raises:
        ConfigError: `dst` exists, and mlxft did not make it, or it is of another kind.
        ExportError: writing failed; nothing of it is left, and `dst` is unchanged.
    """
    part = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
    try:
        clear(dst.parent)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        claim(part, kind)  # so that `clear` can remove it after a kill
        yield part
        claim(part, kind, (p.relative_to(part).as_posix() for p in part.rglob("*") if p.is_file()))
        check_replaceable(dst, kind)  # again: what was written may have taken hours
        _swap(part, dst)
        note(dst)
    # MLX's writer raises a RuntimeError if the disk is full.
    except (OSError, RuntimeError, CheckpointError, ExportError) as error:
        failed = "" if isinstance(error, ExportError) else f"{dst}: writing failed, nothing is left of it: "
        raise ExportError(failed + str(explained(error, dst.parent)).replace(str(part), str(dst))) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters; lazy ones stay unread."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def check_destination(dst: Path, overwrite: bool, kind: str = "model") -> None:
    """Refuse a folder that may not be written.

    Args:
        kind: a key of mlxft.files.KINDS.
    Raises:
        ConfigError: it exists and is not empty, except with `overwrite` if mlxft made a folder of this kind.
    """
    if dst.name in ("", ".."):
        raise ConfigError(f"{str(dst)!r}: give the name of a folder to write")
    if not overwrite and os.path.isdir(dst) and not is_empty(dst):
        raise ConfigError(f"{dst}: exists already; give another name, or overwrite it ({switch('overwrite')})")
    check_replaceable(dst, kind)
    check_writable(dst, "OUT")
    if "\udc80" <= max(str(dst.absolute())) <= "\udcff":  # MLX writes only to UTF-8 names
        raise ConfigError(f"{dst}: is not UTF-8; give another name")


def check_unused(dst: Path, used: Iterable[Path | None]) -> None:
    """Raise an ExportError if `dst` would replace one of the files or folders that it is made from."""
    for source in used:
        if source is not None and dst.resolve() in (path := source.resolve(), *path.parents):
            raise ExportError(f"{dst}: its source {source} is there and would be lost; give another name")


def check_space(dst: Path, weights: int) -> None:
    """Raise an ExportError unless the disk of `dst` has room for `weights` bytes and small files."""
    existing = next(folder for folder in (dst.absolute().parent, *dst.absolute().parents) if folder.exists())
    free, needed = shutil.disk_usage(existing).free, weights + _SLACK_BYTES
    if free < needed:
        raise ExportError(
            f"{dst}: needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk; free some space, "
            "write elsewhere, or quantise"
        )


def _write(folder: Path, model: nn.Module, tokenizer: Any, config: dict[str, Any], source: Path | None) -> None:
    from mlx_lm.utils import save_config, save_model

    save_model(folder, model, donate_model=False)
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if written < weight_bytes(model):
        raise OSError(f"only {written} of {weight_bytes(model)} bytes of weights were written")
    # A model with a vision tower cannot be loaded without these keys, which save_config removes.
    keep_vision = "vision_tower" in getattr(model, "model", {})
    ends = sorted(tokenizer.eos_token_ids)
    config = copy.deepcopy(config)
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if not thinking_of(tokenizer):
        config["mlxft"] = {"enable_thinking": False}
    save_config(config, folder / "config.json", keep_vision_config=keep_vision)
    tokenizer.save_pretrained(str(folder))
    generation = generation_settings(source)
    for code in source.glob("*.py") if source is not None else ():
        shutil.copy(code, folder)
    for name in ("bos_token_id", "pad_token_id"):
        if config.get(name) is not None:
            generation.setdefault(name, config[name])
    generation["eos_token_id"] = ends
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n", "utf-8")


def generation_settings(folder: Path | None) -> dict[str, Any]:
    """Return generation_config.json of a folder, the recommended sampling; empty if there is none."""
    file = folder / "generation_config.json" if folder is not None else None
    return read_object(file) if file is not None and file.is_file() else {}


def _swap(part: Path, dst: Path) -> None:
    """Rename `part` to `dst`, and only then remove what was there before."""
    old = dst.with_name(f".{dst.name}.old-{os.getpid()}")
    if dst.exists():
        dst.rename(old)
    try:
        part.rename(dst)
    except OSError:
        if old.exists():
            old.rename(dst)
        raise
    if old.exists():
        with suppress(OSError):  # the new folder is in place
            remove(old)
