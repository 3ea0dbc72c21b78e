"""llama.cpp: find its quantiser and run it, make importance matrices for it, and compare its models with MLX's."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxft.data.dataset import Encoded
from mlxft.errors import ExportError, missing_extra
from mlxft.exports.fuse import Meter, Probe
from mlxft.files import explained
from mlxft.model.gguf import read_gguf_header
from mlxft.model.layers import LINEAR, SWITCH, LowRank, Recorder, Standin, standing_in, unpacked
from mlxft.model.load import Loaded
from mlxft.text import aligned

# --- quantiser --------------------------------------------------------------------------------------------------------
# llama-quantize of llama.cpp, or the same function in the library of llama-cpp-python.
#
# Both run in a process of their own: they cannot be interrupted from Python, and end their process on some errors.

# Type -> its number in llama.h (llama_ftype).
QUANTISED = {"q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q4_k_m": 15, "q4_k_s": 14, "q3_k_m": 12, "q2_k": 10}
QUANTISED |= {"iq4_nl": 25, "iq4_xs": 30, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
KEPT = "MXFP4"  # of gpt-oss' experts, which stay what they are
HOW = "brew install llama.cpp, or pip install 'mlxft[llama-cpp]'"
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\]")
_LAST = 5  # lines of a failed quantiser that are shown


def find_quantiser() -> list[str] | None:
    """Return the command that quantises a file: SOURCE OUT TYPE MATRIX KEPT; None if llama.cpp is not here."""
    if tool := shutil.which("llama-quantize"):
        return [tool]
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    # Only what this process imports from, not the folder that it works in, which may hold a stranger's files.
    code = f"import sys; sys.path[:] = {[p for p in sys.path if p]!r}; "
    code += "from mlxft.exports.llama_cpp import quantise_here; quantise_here(*sys.argv[1:])"
    return [sys.executable, "-c", code]


def quantise(source: Path, kind: str, matrix: Path | None, tell: Callable[[str], object], out: Path) -> None:
    """Write `source`, a .gguf of floats, as `out` in another type; all files are in one folder.

    Tensors in MXFP4 are copied: llama.cpp would refuse to quantise them again.

    Args:
        kind: a key of QUANTISED.
        matrix: file of an importance matrix.
    Raises:
        ExportError: there is no quantiser, or it failed.
        OSError: it failed because the disk is full.
    """
    command = find_quantiser()
    if command is None:
        raise ExportError(f"type {kind!r} needs llama.cpp's quantiser: {HOW}")
    # By names in their folder: llama-quantize records the matrix's path in the file, which goes to others.
    files = [source.name, out.name, kind.upper()]
    names = [re.escape(name) for name, entry in read_gguf_header(source)[1].items() if entry.kind == KEPT]
    kept = f"^({'|'.join(names)})$" if names else ""
    if len(command) == 1:
        options = (("--imatrix", matrix.name if matrix else ""), ("--tensor-type", kept and f"{kept}={KEPT}"))
        command += [part for name, value in options if value for part in (name, value)] + files
    else:
        command += [*files, matrix.name if matrix else "", kept]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    last: list[str] = []
    with subprocess.Popen(command, cwd=source.parent, text=True, errors="replace", **pipes) as process:
        try:
            for line in process.stdout or ():
                found = _TENSOR.search(line)
                before = last[:-1] if found and last and _TENSOR.search(last[-1]) else last
                last = [*before, " ".join(line.split())][-_LAST:]
                if found:
                    tell(f"llama.cpp quantises tensor {found[1]} of {found[2]}")
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        failed = f"llama.cpp failed to write {kind} (exit code {process.returncode}): {' | '.join(filter(None, last))}"
        reason = explained(OSError(failed), out.parent)
        raise reason if reason.args != (failed,) else ExportError(failed)


def library() -> Any:
    """Return llama-cpp-python's module.

    Raises:
        ExportError: it is not installed, or its library cannot be loaded.
    """
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        raise ExportError(missing_extra("llama-cpp-python", "llama-cpp")) from error
    except (OSError, RuntimeError) as error:
        raise ExportError(f"llama-cpp-python's library cannot be loaded: {error}") from error


def quantise_here(source: str, out: str, kind: str, matrix: str, kept: str) -> None:
    """Quantise by llama-cpp-python's library in this process, which exits with llama.cpp's code."""
    from gguf import GGMLQuantizationType

    llama = library()
    options = llama.llama_model_quantize_default_params()
    options.ftype = QUANTISED[kind.lower()]
    if matrix:
        held = [(name.encode(), np.ascontiguousarray(value)) for name, value in read_importance(Path(matrix)).items()]
        rows = (llama.llama_model_imatrix_data * (len(held) + 1))()  # a row of zeros ends it
        for row, (name, value) in zip(rows, held):
            row.name, row.size = name, value.size
            row.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        options.imatrix = rows
    if kept:
        forms = (llama.llama_model_tensor_override * 2)()  # without a pattern, the second ends them
        forms[0].pattern, forms[0].type = kept.encode(), int(GGMLQuantizationType[KEPT])
        options.tt_overrides = forms
    sys.exit(int(llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options))))


# --- importance -------------------------------------------------------------------------------------------------------
# An importance matrix: for each matrix of the model, the mean square of each of its inputs over some tokens. llama.cpp
# weighs the errors of rounding with it.
#
# Layout of the file, by llama.cpp's tools/imatrix: NAME.in_sum2 (experts, inputs) and NAME.counts (experts, 1), both
# float32, without experts 1. Only matrices of blocks have one, not the embedding and the head.


_CHUNK = 512  # tokens, by which llama.cpp counts


class Importance(NamedTuple):
    """Sums of squared inputs (experts, inputs), and the number of tokens of each (experts,); float32."""

    sums: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]


class _Sums:
    """Adds up squared inputs (..., D), each for the experts that get it: indices (...), if the layer has experts."""

    def __init__(self, experts: int) -> None:
        self.sums, self.counts, self._experts = mx.zeros((1, 1)), mx.zeros((experts,)), experts

    def see(self, x: mx.array, indices: mx.array | None = None) -> None:
        squares, width = x.astype(mx.float32).square(), x.shape[-1]
        if indices is None:
            squares = squares.reshape(-1, width)
            indices = mx.zeros((len(squares),), mx.int32)
        else:  # mlx-lm's experts get (..., 1, D), for each of several indices or for all alike
            squares = mx.broadcast_to(squares[..., 0, :], (*indices.shape, width)).reshape(-1, width)
            indices = indices.reshape(-1)
        self.sums = mx.broadcast_to(self.sums, (self._experts, width)).at[indices].add(squares)
        self.counts = self.counts.at[indices].add(1.0)


def find_importance(
    model: nn.Module, names: Callable[[str], Sequence[str]], rows: Sequence[Encoded], tell: Callable[[str], object]
) -> dict[str, Importance]:
    """Return the importance of a model's matrices over all tokens of some rows.

    Args:
        names: path of a layer -> its matrices in the file; those of no block are left out.
    """
    found: dict[str, _Sums] = {}
    with unpacked(model):
        recorders: dict[str, nn.Module] = {}
        for path, layer in model.named_modules():
            inner = layer.base if isinstance(layer, LowRank) else layer
            if path.endswith((".linear", ".embedding")) and path.rpartition(".")[0] in recorders:
                continue
            if isinstance(inner, LINEAR + SWITCH + (Standin,)) and any(n.startswith("blk.") for n in names(path)):
                found[path] = _Sums(inner.num_experts if hasattr(inner, "num_experts") else 1)
                recorders[path] = Recorder(layer, found[path].see)
        with standing_in(model, recorders):
            for i, row in enumerate(rows, 1):
                tell(f"importance matrix: row {i} of {len(rows)}")
                mx.eval(model(mx.array(row.ids)[None]), [(f.sums, f.counts) for f in found.values()])
    read = {path: Importance(np.array(f.sums), np.array(f.counts)) for path, f in found.items()}
    return {name: part for path, part in read.items() for name in names(path)}


def write_importance(file: Path, found: Mapping[str, Importance], tokens: int) -> None:
    """Write an importance matrix as llama.cpp's llama-quantize and llama-imatrix read it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "imatrix")
    try:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["rows of mlxft"])
        writer.add_uint32("imatrix.chunk_size", _CHUNK)
        writer.add_uint32("imatrix.chunk_count", max(1, tokens // _CHUNK))
        for name, part in sorted(found.items()):
            writer.add_tensor(f"{name}.in_sum2", part.sums.astype(np.float32))
            writer.add_tensor(f"{name}.counts", part.counts.astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_importance(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the mean squares (experts, inputs) of each matrix in a file; 1 for experts that got no token."""
    table = read_gguf_header(file)[1]
    out = {}
    for name in (key.removesuffix(".in_sum2") for key in table if key.endswith(".in_sum2")):
        sums, counts = np.array(table[f"{name}.in_sum2"].read()), np.array(table[f"{name}.counts"].read())
        out[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0).astype(np.float32)
    return out


# --- comparison -------------------------------------------------------------------------------------------------------


def logits_of(file: Path, longest: int) -> Callable[[Sequence[int]], np.ndarray[Any, Any]]:
    """Open a .gguf file in llama.cpp, and return a function that gives the logits (T, V) of a row's ids (T,).

    Raises:
        ExportError: llama-cpp-python is not installed, or cannot load the file.
    """
    try:
        model = library().Llama(
            str(file), n_ctx=longest, n_batch=longest, n_ubatch=longest, n_gpu_layers=-1, logits_all=True, verbose=False
        )
    except ValueError as error:
        raise ExportError(f"{file}: llama-cpp-python cannot load it (a newer one may): {error}") from error

    def read(ids: Sequence[int]) -> np.ndarray[Any, Any]:
        model.reset()
        model.eval([int(i) for i in ids])
        return np.array(model.scores[: len(ids)])

    return read


class Fidelity:
    """What a model predicts in float on probe rows, for the fidelity of files written from it.

    Args:
        loaded: the model, with its adapter if it has one.
    """

    def __init__(self, loaded: Loaded, probe: Probe) -> None:
        library()  # raises before anything is computed
        self._meter = Meter(loaded, probe)
        self._own = self._meter.read()
        low_rank = {path: m.base for path, m in loaded.model.named_modules() if isinstance(m, LowRank)}
        with standing_in(loaded.model, low_rank):
            self._whole = self._meter.gap(self._own, self._meter.read()) if low_rank else None

    def measure(self, file: Path) -> dict[str, float]:
        """Measure a file in llama.cpp; `kept` is the share of the adaptation, if there is one."""
        longest = max(len(row.ids) for row in self._meter.probe.rows)
        gap = self._meter.gap(self._own, self._meter.read_from(logits_of(file, longest)))
        found = {"kl": gap.divergence, "agreement": gap.agreement}
        if self._whole is not None and self._whole.divergence > 0:
            found["kept"] = min(1.0, max(0.0, 1 - gap.divergence / self._whole.divergence))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return what files are compared on, and what there is to keep, as `mlxft fuse` has it."""
        probe, whole = self._meter.probe, self._whole
        out: dict[str, Any] = {"source": probe.source, "rows": len(probe.rows), "tokens": probe.tokens}
        base = {"adapted_to_base": whole.divergence, "agreement_base": whole.agreement} if whole else {}
        return {"probe": out, **base}

    def lines(self, files: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return a table of files: `type`, `bytes` and what `measure` found."""
        probe, whole = self._meter.probe, self._whole
        what = f"measured in llama.cpp on {probe.tokens:,} tokens ({probe.source})"
        said = [f"{what}, against the model in float:"]
        if whole is not None:
            said = [
                f"{what}; from the adapted model in float to its base:",
                f"KL a token {whole.divergence:.3g}, same likeliest token {whole.agreement:.1%}",
            ]
        rows = [("type", "file", "KL a token", "kept", "same likeliest token")]
        for file in files:
            kept = f"{file['kept']:.1%}" if "kept" in file else "-"
            size = f"{file['bytes'] / 1e6:,.1f} MB"
            rows.append((file["type"], size, f"{file['kl']:.3g}", kept, f"{file['agreement']:.1%}"))
        return [*said, *aligned(rows), *probe.notes]
