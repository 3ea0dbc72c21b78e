"""A model folder: what its files declare, checked before it is believed, and how one is written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import mlx.nn as nn
from mlx.utils import tree_flatten
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from mlxft.data.chat import thinking_of
from mlxft.data.sources import type_name
from mlxft.errors import CheckpointError, ConfigError, ExportError, MlxftError, ModelError, half_character, switch
from mlxft.files import check_replaceable, check_writable, claim, clear, is_empty, note, remove
from mlxft.text import TooDeep, parse_json

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


# --- declared ---------------------------------------------------------------------------------------------------------
# What the files of a model or adapter may declare, held against bounds before anything is built from them.
#
# These files come from strangers. Whatever in them is of the wrong kind or absurd is refused by name here, in one place
# for every command; what only another library's reader finds is named by `foreign`.

MOST_BYTES, MOST_DEPTH = 1 << 26, 64  # of a JSON file; real ones have some kilobytes and five levels
NO_NUMBERS = "the model computes NaN: its weights, its adapter or a scale are damaged"
MOST_NUMBER = 1 << 31  # of a size that the schema does not name

_Layers = Annotated[int, Field(strict=True, ge=1, le=2_000)]
Heads = Annotated[int, Field(strict=True, ge=1, le=1 << 14)]
Width = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
_Rows = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Experts = Annotated[int, Field(strict=True, ge=0, le=1 << 14)]
Rank = Annotated[int, Field(strict=True, ge=1, le=1 << 16)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Id = Annotated[int, Field(strict=True, ge=-1, le=MOST_NUMBER)]
Dtype = Annotated[str, Field(pattern=r"^(torch\.)?(float(8\w*|16|32|64)|bfloat16|auto)$")]
MOST_COUNTED = 1 << 20  # of what a name that begins with num_ or n_ counts: models are built in loops over it

_SIZES: dict[Any, str] = {
    _Layers: "num_hidden_layers num_layers n_layers n_layer num_transformer_layers",
    Heads: "num_attention_heads num_heads n_heads n_head",
    Width: "hidden_size head_dim d_model n_embd model_dim hidden_dim",
    _Rows: "vocab_size padded_vocab_size num_vocab",
    Experts: "num_experts num_local_experts n_routed_experts num_experts_per_tok num_key_value_heads num_kv_heads",
    Real: "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps",
}
# Some architectures list these, one for each layer.
_LISTED = "num_attention_heads num_key_value_heads num_heads num_kv_heads head_dim num_experts_per_tok"


class Lenient(BaseModel):
    """A part of a stranger's file: what is not named is let through."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Quantization(Lenient):
    """How weights are packed; under the name of a layer stands how that one is, or false."""

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


def _kind(name: str, kind: Any) -> Any:
    return (kind | list[Any] | None, None) if name in _LISTED.split() else (kind | None, None)


_Sizes = create_model(
    "_Sizes", __base__=Lenient, **{name: _kind(name, kind) for kind, names in _SIZES.items() for name in names.split()}
)


class ModelConfig(_Sizes):
    """config.json, as far as every architecture has it."""

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
            most = MOST_COUNTED if counts else MOST_NUMBER
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
NAMED_TEMPLATES = "additional_chat_templates"  # transformers' folder for those beside the default


def lies_in(folder: Path, file: Path) -> bool:
    """Whether a folder's file is its own, no link to a file elsewhere; links of the hub's cache are."""
    real = file.resolve()
    cached = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    return cached or folder.resolve() in real.parents


def check_links(folder: Path) -> None:
    """Refuse links out of a folder that someone may have sent: what they lead to would be copied, shown and pushed.

    Weights are let through: users keep them elsewhere, and nothing but weights can be read from them.

    Raises:
        ModelError: there is one.
    """
    for file in (*folder.iterdir(), *(folder / NAMED_TEMPLATES).glob("*")):
        read = file.is_dir() if file.name == NAMED_TEMPLATES else file.is_file() and file.suffix != ".safetensors"
        if read and not lies_in(folder, file):
            raise ModelError(f"{file}: is a link out of its folder, and is not read; put a copy there if it is yours")


def check_files(folder: Path) -> None:
    """Hold the files of a model's folder against what they may declare.

    Raises:
        ModelError: one is not a JSON object, what it says is of the wrong kind or out of bounds, or it is a link out.
    """
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
        ModelError: it is something else.
        OSError: it cannot be read.
    """
    if not file.is_file() and file.exists():
        raise ModelError(f"{file}: is not a file; expected a JSON object")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ModelError(f"{file}: has {size:,} bytes; expected at most {MOST_BYTES:,}")
    try:
        found = parse_json(file.read_bytes())
        depth, level = 0, [found]
        while level := [v for at in level for v in (at.values() if isinstance(at, dict) else at if _deep(at) else ())]:
            if (depth := depth + 1) > MOST_DEPTH:
                raise TooDeep
    except TooDeep:
        raise ModelError(f"{file}: is nested deeper than {MOST_DEPTH} levels") from None
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: is {type_name(found)}; expected a JSON object")
    if half := half_character(found):
        raise ModelError(f"{file}: {half}")
    return found


def _deep(value: Any) -> bool:
    return isinstance(value, dict | list)


def check_schema(schema: type[BaseModel], found: Mapping[str, Any], where: Path | str) -> None:
    """ModelError naming all that does not fit the schema."""
    try:
        schema.model_validate(found)
    except RecursionError:
        raise ModelError(f"{where}: refers to itself") from None
    except ValidationError as error:
        said: dict[str, str] = {}
        for e in error.errors():  # the branches of a union are one problem: the first says most
            place = ".".join(str(p) for p in e["loc"] if str(p) in _names(found) or isinstance(p, int))
            wanted = (
                e["msg"].replace("Input should be", "expected").replace("String should match", "expected a text of")
            )
            if e["type"] == "missing":
                place = ".".join(map(str, e["loc"]))
                said[place] = f"{place} is missing"
            elif e["type"] == "value_error":
                said.setdefault(place, str(e["ctx"]["error"]))
            else:
                said.setdefault(place, f"{place} is {_short(e['input'])}; {wanted}")
        raise ModelError(f"{where}: {'; '.join(said.values())}") from error


def _names(found: Mapping[str, Any]) -> set[str]:
    """Every key in a value, at any depth."""
    names: set[str] = set()
    todo: list[Any] = [found]
    while todo:
        at = todo.pop()
        if isinstance(at, Mapping):
            names |= set(map(str, at))
            todo += at.values()
    return names


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write out thousands of digits
        return "a number of more than 60 digits"
    text = type_name(value) if value is None or _deep(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def foreign(where: str) -> Iterator[None]:
    """Turn whatever another library raises over a stranger's file into a ModelError that says where.

    Readers raise nearly anything, and some of mlx-lm's architectures end the process where a package is missing.
    """
    try:
        yield
    except (MlxftError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # Rust's panics are no Exceptions, nor is SystemExit; nothing else of that kind is a library's.
        if not isinstance(error, Exception | SystemExit) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"{where}: {said or type(error).__name__}") from error


def check_arrays(file: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a .safetensors file by its header; nothing else is read.

    Raises:
        ModelError: it is cut off, or its tensors overlap, leave gaps or reach beyond it.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file() and file.exists():
        raise ModelError(f"{file}: is not a file")
    try:
        with safe_open(file, framework="numpy") as found:
            return {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{file}: is not a whole safetensors file ({error}); download it again") from error


def check_numbers(file: Path, arrays: Mapping[str, Any]) -> None:
    """ModelError where arrays of a file hold NaN or infinity, of which a model computes nothing, in silence."""
    import mlx.core as mx

    for name, value in arrays.items():
        if not mx.isfinite(value).all().item():
            raise ModelError(f"{file}: {name[:80]} holds NaN or infinity; the training that wrote it has failed")


# --- folder -----------------------------------------------------------------------------------------------------------

# Beside the weights: a tokenizer of a quarter of a million tokens, and some air.
_SLACK_BYTES = 48 << 20


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

    Everything is written to a hidden folder beside `dst` and renamed at the end. The model stays as it is; lazily
    loaded weights are read on the way, also from `dst` itself.

    Args:
        overwrite: replace `dst` if it is a model folder that mlxft made.
        source: what the model came from: a folder's generation settings, and the code of a model that has its own,
            are carried over.
        beside: writes what else belongs into the folder.
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
    """A hidden folder beside `dst`, to be filled inside the block; at its end it takes the name of `dst`.

    Args:
        kind: of mlxft.files.KINDS.
    Raises:
        ConfigError: `dst` is there, and is not one of its kind that mlxft made.
        ExportError: writing failed; nothing is left of it, and `dst` is as it was.
    """
    part = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
    try:
        clear(dst.parent)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        claim(part, kind)  # by which `clear` knows it for ours after a kill
        yield part
        claim(part, kind, (p.relative_to(part).as_posix() for p in part.rglob("*") if p.is_file()))
        check_replaceable(dst, kind)  # again: what was written may have taken hours
        _swap(part, dst)
        note(dst)
    # MLX's writer raises RuntimeError where the disk is full.
    except (OSError, RuntimeError, CheckpointError) as error:
        said = f"{dst}: writing failed, nothing is left of it: {error}"
        raise ExportError(said.replace(str(part), str(dst))) from error
    except ExportError as error:  # a file in it has no room
        if str(part) not in str(error):
            raise
        raise ExportError(str(error).replace(str(part), str(dst))) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, read or not yet."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def check_destination(dst: Path, overwrite: bool, kind: str = "model") -> None:
    """Refuse a folder that may not be written: it is there, and not empty or `overwrite` and of its kind and ours.

    Args:
        kind: of mlxft.files.KINDS.
    Raises:
        ConfigError: so it is.
    """
    if dst.name in ("", ".."):
        raise ConfigError(f"{str(dst)!r}: give the name of a folder to write")
    if not overwrite and os.path.isdir(dst) and not is_empty(dst):
        raise ConfigError(f"{dst}: exists already; give another name, or overwrite it ({switch('overwrite')})")
    check_replaceable(dst, kind)
    check_writable(dst, "OUT")
    if "\udc80" <= max(str(dst.absolute())) <= "\udcff":  # MLX writes under UTF-8 names alone
        raise ConfigError(f"{dst}: is not UTF-8; give another name")


def check_unused(dst: Path, used: Iterable[Path | None]) -> None:
    """ExportError if one of the files or folders that `dst` is made of would be gone with what `dst` replaces."""
    gone = dst.resolve()
    for source in used:
        if source is not None and gone in (path := source.resolve(), *path.parents):
            raise ExportError(
                f"{dst}: what it is made of lies there ({source}) and would be lost; give another name for it"
            )


def check_space(dst: Path, weights: int) -> None:
    """ExportError unless the disk of `dst` has room for `weights` bytes and the small files beside them."""
    existing = next(folder for folder in (dst.absolute().parent, *dst.absolute().parents) if folder.exists())
    free, needed = shutil.disk_usage(existing).free, weights + _SLACK_BYTES
    if free < needed:
        raise ExportError(
            f"{dst}: needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk; "
            "free some, write elsewhere, or quantise"
        )


def _write(folder: Path, model: nn.Module, tokenizer: Any, config: dict[str, Any], source: Path | None) -> None:
    from mlx_lm.utils import save_config, save_model

    save_model(folder, model, donate_model=False)
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if written < weight_bytes(model):
        raise OSError(f"only {written} of {weight_bytes(model)} bytes of weights were written")
    # save_config drops keys from what it is given; a vision tower's model can not be loaded without them.
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
    """How a model's makers would sample: generation_config.json, or nothing where there is none.

    Raises:
        ModelError: it is no JSON object.
    """
    file = folder / "generation_config.json" if folder is not None else None
    if file is None or not file.is_file():
        return {}
    return read_object(file)


def _swap(part: Path, dst: Path) -> None:
    """`part` takes the name of `dst`; what was there before goes only after that."""
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
        with suppress(OSError):  # what has a new name is in its place
            remove(old)
