"""What is left to llama.cpp: its quantiser (a stand-in on PATH), importance matrices, and the comparison with it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader

import mlxft
from mlxft.cli.export import export
from mlxft.data.dataset import Encoded
from mlxft.errors import ConfigError, ExportError
from mlxft.exports import llama_cpp
from mlxft.exports.gguf import export_gguf
from mlxft.exports.llama_cpp import find_importance, read_importance, write_importance
from mlxft.exports.ollama import export_ollama
from mlxft.model.gguf import ARCHITECTURES, MODEL_TYPES
from mlxft.model.layers import LoRALinear
from mlxft.model.load import load
from tests.exports.test_gguf_families import family_dir
from tests.exports.test_gguf_out import repack

# Writes what it was called with beside the files, and copies the floats.
QUANTISER = """#!{python}
import pathlib, shutil, sys
pathlib.Path("{log}").write_text(" ".join(sys.argv[1:]))
*options, source, out, kind = sys.argv[1:]
if "--imatrix" in options:
    shutil.copy(options[options.index("--imatrix") + 1], "{log}.matrix")
print("[   1/   1] output.weight - ...", flush=True)
if kind == "Q6_K":
    sys.exit("failed to quantize: no such thing")
shutil.copy(source, out)
"""
ROWS = '{"text": "the sands of time and other sands"}\n{"text": "in the beginning there was an and"}\n'


@pytest.fixture
def quantiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama-quantize on PATH; gives the file that its arguments go to."""
    log, tool = tmp_path / "called", tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(QUANTISER.format(python=sys.executable, log=log))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return log


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llama.cpp anywhere."""
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda _: None)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda _: None)


def test_floats_go_through_the_quantiser(
    tiny_model_dir: Path, quantiser: Path, tmp_path: Path, save_adapter: Any
) -> None:
    told: list[str] = []
    out = tmp_path / "out" / "a.gguf"
    (tmp_path / "rows.jsonl").write_text(ROWS)
    said = export_gguf(tiny_model_dir, out, kind="q4_k_m", imatrix=str(tmp_path / "rows.jsonl"), tell=told.append)
    assert "llama.cpp quantises tensor 1 of 1" in told
    option, matrix, source, part, kind = quantiser.read_text().split()
    # No folder's name goes into the file, where llama-quantize notes its matrix.
    assert (option, kind) == ("--imatrix", "Q4_K_M")
    assert not any("/" in name for name in (matrix, source, part))
    assert said[0].startswith(f"wrote {out} (")
    assert "q4_k_m" in said[0]
    assert any(line.startswith("importance matrix of ") and "in 2 rows" in line for line in said)
    assert any("not measured" in line for line in said)
    assert "q4_k_m packs 256 weights at a time: llama.cpp keeps rows of 32, 64 in larger types" in said
    assert [p.name for p in out.parent.iterdir()] == ["a.gguf"]
    weighed = read_importance(quantiser.with_name("called.matrix"))
    assert len(weighed) == 14
    assert weighed["blk.1.ffn_down.weight"].shape == (1, 64)
    tensor = next(t for t in GGUFReader(out).tensors if t.name == "blk.0.ffn_up.weight")
    assert tensor.tensor_type.name == "F16"
    folder = tmp_path / "ollama"
    assert "q4_k_m" in export_ollama(tiny_model_dir, folder, kind="q4_k_m")[0]
    assert sorted(p.name for p in folder.iterdir()) == [".mlxft.json", "Modelfile", "model.gguf"]
    save_adapter(out, tmp_path / "adapter")
    said = export_gguf(tmp_path / "adapter", tmp_path / "b.gguf", kind="q4_k_m")
    assert any("a.gguf: the adapter alone (--lora), used beside it, is not rounded" in line for line in said)


@pytest.mark.usefixtures("quantiser")
def test_the_first_rows_of_a_stream_are_weighed(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXFT_CACHE", str(tmp_path / "cache"))
    run = mlxft.train(recipe(**{"data.stream": True, "data.format": "auto", "run.steps": 1})).dir
    monkeypatch.setattr("mlxft.exports.fuse._STREAMED", 6)
    said = export_gguf(run, tmp_path / "a.gguf", kind="q4_k_m", imatrix="train")
    assert any(line.startswith("importance matrix of ") and "in 6 rows (training rows)" in line for line in said)


def test_mxfp4_is_kept(tmp_path: Path, quantiser: Path) -> None:
    """llama.cpp refuses to quantise it again, unless it is named as the type that its tensors are to have."""
    folder = family_dir(tmp_path / "m", "gpt_oss", hidden_size=64, intermediate_size=64)
    export_gguf(folder, tmp_path / "a.gguf", kind="f32")
    repack(tmp_path / "a.gguf", tmp_path / "b.gguf", "MXFP4")
    said = export_gguf(tmp_path / "b.gguf", tmp_path / "c.gguf", kind="q4_k_m")
    option, given, *_ = quantiser.read_text().split()
    pattern, _, form = given.rpartition("=")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "c.gguf").tensors}
    assert (option, form) == ("--tensor-type", "MXFP4")
    assert {name for name in kinds if re.search(pattern, name)} == {n for n in kinds if n.endswith("_exps.weight")}
    assert {kinds[name] for name in kinds if re.search(pattern, name)} == {"MXFP4"}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert "6 layers of experts stay in mxfp4" in said


def test_nothing_is_left_of_a_failure(
    tiny_model_dir: Path, quantiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "a.gguf"
    with pytest.raises(ExportError, match=r"failed to write q6_k .*no such thing"):
        export_gguf(tiny_model_dir, out, kind="q6_k")
    assert not any(out.parent.iterdir())

    def interrupted(text: str) -> None:
        if "tensor" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(tiny_model_dir, out, kind="q4_k_m", tell=interrupted)
    assert not any(out.parent.iterdir())
    free = 1 << 40
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))

    def fills(text: str) -> None:
        nonlocal free
        free = 0 if "tensor" in text else free

    with pytest.raises(
        ExportError, match=r"a\.gguf: writing failed, nothing is left of it: .*No space.* \(0 bytes are"
    ):
        export_gguf(tiny_model_dir, out, kind="q6_k", tell=fills)
    assert not any(out.parent.iterdir())
    free = 48 << 20
    with pytest.raises(ExportError, match="are free on its disk"):
        export_gguf(tiny_model_dir, out, kind="q4_k_m")


@pytest.mark.usefixtures("alone")
def test_without_llama_cpp(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"brew install llama\.cpp, or pip install .*Without it: .*q8_0, q5_1"):
        export_gguf(tiny_model_dir, tmp_path / "a.gguf", kind="q4_k_m")
    with pytest.raises(ExportError, match="which f16 is not made with"):
        export_gguf(tiny_model_dir, tmp_path / "a.gguf", kind="f16", imatrix="train")
    with pytest.raises(ExportError, match="not found here"):
        export_gguf(tiny_model_dir, tmp_path / "a.gguf", kind="q4_0", imatrix="train")
    with pytest.raises(ExportError, match="are for a whole model"):
        export_gguf(tiny_model_dir, tmp_path / "a.gguf", kind="f16", lora=True, measure=True)
    said = export_gguf(tiny_model_dir, tmp_path / "a.gguf", kind="q4_0")
    assert any("keeps some finer" in line for line in said)
    kinds = {t.tensor_type.name for t in GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds == {"F32", "Q4_0"}
    packed = load(str(tmp_path / "a.gguf"), quantize=4)
    assert packed.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_importance_is_the_mean_square_of_inputs(
    kind: str, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """The inputs of two layers, computed here from the model's parts; experts count the tokens they get."""
    loaded = load(str(make_model_dir(tmp_path / "m", kind)))
    arch, model = ARCHITECTURES[MODEL_TYPES[kind]], loaded.model
    layer = model.layers[0]
    layer.self_attn.q_proj = LoRALinear(layer.self_attn.q_proj, 2, 1.0, 0.0)
    rows = [Encoded(np.array(ids), np.ones(len(ids), bool), "") for ids in ([3, 40, 77, 5, 9], [120, 11, 12] * 40)]
    found = find_importance(model, lambda path: arch.tensors(f"{path}.weight", 2), rows, lambda _: None)
    xs = [layer.input_layernorm(model.model.embed_tokens(mx.array(row.ids)[None])) for row in rows]
    want = sum(np.square(np.array(x[0])).sum(axis=0) for x in xs)
    assert np.allclose(found["blk.0.attn_q.weight"].sums, want, rtol=1e-4)
    assert found["blk.0.attn_q.weight"].counts.tolist() == [125]
    if kind == "qwen3_moe":
        part = found["blk.1.ffn_down_exps.weight"]
        assert part.sums.shape == (4, 32)
        assert part.counts.sum() == 2 * 125  # two experts a token
        gate, up = (found[f"blk.1.ffn_{name}_exps.weight"] for name in ("gate", "up"))
        assert np.array_equal(gate.sums, up.sums)
        # Over all experts, each token's input is counted twice.
        assert np.allclose(gate.sums.sum(axis=0), 2 * found["blk.1.ffn_gate_inp.weight"].sums[0], rtol=1e-3)
    write_importance(tmp_path / "i.gguf", {"a": found["blk.0.attn_q.weight"]._replace(counts=np.zeros(1))}, 3)
    assert np.array_equal(read_importance(tmp_path / "i.gguf")["a"], np.ones((1, 32)))
    assert type(layer.mlp).__name__ != "_Recorder"
    assert isinstance(layer.self_attn.q_proj, LoRALinear)


@pytest.mark.usefixtures("quantiser")
def test_types_are_measured_in_llama_cpp(
    tiny_model_dir: Path, tmp_path: Path, save_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for llama-cpp-python that computes what the file says with mlxft; f16 is what q4_k_m is made from."""

    class Llama:
        def __init__(self, file: str, n_ctx: int, **_: Any) -> None:
            self._model, self.scores = load(file, dtype="float32").model, np.zeros((n_ctx, 0))

        def reset(self) -> None:
            self.scores[:] = 0

        def eval(self, ids: list[int]) -> None:
            self.scores = np.array(self._model(mx.array([ids]))[0])

    save_adapter(tiny_model_dir, tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ExportError, match=r"pip install 'mlxft\[llama-cpp\]'"):
        export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", kind="f32", measure=True)
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    out, kinds = tmp_path / "out" / "a.gguf", ("q8_0", "f32", "q4_k_m")
    types = [part for kind in kinds for part in ("--type", kind)]
    asked = [str(tmp_path / "adapter"), str(out), "--format", "gguf", *types, *types, "--measure", "--json"]
    done = CliRunner().invoke(export, asked, catch_exceptions=False)
    told = json.loads(done.stdout)
    assert told["type"] == ",".join(kinds)
    assert sorted(p.name for p in out.parent.iterdir()) == sorted(f"a-{kind}.gguf" for kind in kinds)
    assert [(f["type"], f["path"]) for f in told["files"]] == [(k, str(out.with_name(f"a-{k}.gguf"))) for k in kinds]
    gaps = {f["type"]: f["kl"] for f in told["files"]}
    assert 0 <= gaps["f32"] < 1e-6 < gaps["q8_0"]
    assert told["files"][1]["kept"] == pytest.approx(1, abs=1e-4)
    assert told["adapted_to_base"] > 0 < told["probe"]["tokens"]
    at = next(i for i, line in enumerate(told["said"]) if line.startswith("type "))
    assert told["said"][at].endswith("  KL a token    kept  same likeliest token")
    assert [line.split()[0] for line in told["said"][at + 1 : at + 4]] == [*kinds]
    alone = export_gguf(tmp_path / "adapter", tmp_path / "b.gguf", kind="q8_0")
    assert (tmp_path / "b.gguf").read_bytes() == out.with_name("a-q8_0.gguf").read_bytes()
    assert "kl" not in alone.figures["files"][0]
    with pytest.raises(ConfigError, match=r"try .*/c\.gguf"):
        export_gguf(tmp_path / "adapter", tmp_path / "c", kind=kinds)
    with pytest.raises(ExportError, match=r"holds one \.gguf file, not q8_0, f32"):
        export_ollama(tmp_path / "adapter", tmp_path / "o", kind=kinds[:2])
    with pytest.raises(ConfigError, match="no run is known here"):
        export_gguf(tmp_path / "adapter", tmp_path / "c.gguf", kind="f32", measure=True, probe="valid")
