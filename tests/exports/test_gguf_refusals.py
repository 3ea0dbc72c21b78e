"""What is not written as .gguf, and that nothing is left of it, nor lost to it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxft.errors import ConfigError, ExportError, ModelError
from mlxft.exports.fuse import convert_model
from mlxft.exports.gguf import export_gguf
from mlxft.exports.ollama import export_ollama

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("kind", "changes", "asked", "says"),
    [
        ("gpt_neox", {}, {}, r"'gpt_neox' is not written as \.gguf, only llama, mixtral, qwen2.*mlxft fuse"),
        ("llama", {"hidden_size": 48}, {"kind": "q8_0"}, r"rows of 48 numbers cannot be packed as q8_0.*f16"),
        ("llama", {}, {"kind": "q4_k"}, r"type 'q4_k' is not written as \.gguf, only f32, f16, bf16, q8_0"),
        ("llama", {}, {"lora": True}, r"--lora: .* holds no adapter; leave --lora out"),
        ("llama", {}, {"lora": True, "kind": "q8_0"}, r"written as f16, bf16 or f32, not q8_0"),
        ("llama", {}, {"model": "x"}, r"--model: .* holds no adapter"),
        ("llama", {"rope_traditional": True}, {}, "rope_traditional"),
        ("gemma2", {"query_pre_attn_scalar": 100}, {}, r"query_pre_attn_scalar is 100; llama.cpp uses 8"),
        ("qwen2", {"rope_scaling": LLAMA3}, {}, r"rope scaling 'llama3' of qwen2 .* only linear, yarn"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 7}}, {}, "beta_fast of its own"),
        ("llama", {"vocab_size": 200}, {}, "the tokenizer has 300 tokens, the embedding 200 rows"),
    ],
)
def test_refusals(
    kind: str,
    changes: dict[str, Any],
    asked: dict[str, Any],
    says: str,
    make_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = make_model_dir(tmp_path / "m", kind, **changes)
    with pytest.raises(ExportError, match=says):
        export_gguf(folder, tmp_path / "out" / "a.gguf", **{"kind": "f16", **asked})
    assert not (tmp_path / "out").exists()


def test_adapters_that_a_file_can_not_hold(tiny_model_dir: Path, tmp_path: Path, save_adapter: Any) -> None:
    save_adapter(tiny_model_dir, tmp_path / "dora", dora=True)
    with pytest.raises(ExportError, match=r"DoRA rescales rows .*without --lora"):
        export_gguf(tmp_path / "dora", tmp_path / "a.gguf", kind="f16", lora=True)
    save_adapter(tiny_model_dir, tmp_path / "embedding", targets=["embed_tokens"])
    with pytest.raises(ExportError, match=r"model\.embed_tokens is not a linear layer"):
        export_gguf(tmp_path / "embedding", tmp_path / "a.gguf", kind="f16", lora=True)
    save_adapter(tiny_model_dir, tmp_path / "whole")
    file = tmp_path / "whole" / "adapters.safetensors"
    mx.save_safetensors(str(file), {**mx.load(str(file)), "model.norm.weight": mx.ones(32)})
    with pytest.raises(ExportError, match=r"model\.norm\.weight was trained whole"):
        export_gguf(tmp_path / "whole", tmp_path / "a.gguf", kind="f16", lora=True)


def test_reward_models_and_foreign_bases(
    tiny_model_dir: Path, make_model_dir: Callable[..., Path], tmp_path: Path, save_adapter: Any
) -> None:
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    other = make_model_dir(tmp_path / "other", "llama", num_hidden_layers=3)
    with pytest.raises(ModelError, match="was trained on another base"):
        export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", kind="f16", model=str(other))
    with pytest.raises(ModelError, match="no such file or folder"):
        export_gguf(tmp_path / "nothing", tmp_path / "a.gguf", kind="f16")
    mx.save_safetensors(str(tmp_path / "adapter" / "head.safetensors"), {"score_head.weight": mx.zeros((1, 32))})
    with pytest.raises(ModelError, match=r"is a reward model: .*--format seq-cls"):
        export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", kind="f16")


def test_a_broken_gguf_file_as_the_model(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """A weight under a name that no layer has."""
    export_gguf(make_model_dir(tmp_path / "m", "llama"), tmp_path / "a.gguf", kind="q8_0")
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_q.waight"))
    with pytest.raises(ModelError, match=r"b\.gguf: has 1 tensors unknown to llama"):
        export_gguf(tmp_path / "b.gguf", tmp_path / "c.gguf", kind="f16")


def test_what_stands_there_is_safe(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.gguf"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"exists already; .*overwrite=True"):
        export_gguf(tiny_model_dir, file, kind="f16")
    with pytest.raises(ConfigError, match=r"is not a \.gguf file that this version of mlxft wrote"):
        export_gguf(tiny_model_dir, file, kind="f16", overwrite=True)
    with pytest.raises(ConfigError, match=r"must end in \.gguf.* try .*b\.gguf"):
        export_gguf(tiny_model_dir, tmp_path / "b", kind="f16")
    (tmp_path / "c.gguf").mkdir()
    with pytest.raises(ConfigError, match="or a folder"):
        export_gguf(tiny_model_dir, tmp_path / "c.gguf", kind="f16")
    good = tmp_path / "d.gguf"
    export_gguf(tiny_model_dir, good, kind="f16")
    before = good.read_bytes()
    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", _full)
    with pytest.raises(ExportError, match=r"writing failed, nothing is left of it.*No space"):
        export_gguf(tiny_model_dir, good, kind="f16", overwrite=True)
    assert good.read_bytes() == before
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(ExportError, match=r"needs about 0\.05 GB, 0\.01 GB are free"):
        export_gguf(tiny_model_dir, tmp_path / "e.gguf", kind="f16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "c.gguf", "d.gguf"]


def test_nothing_is_left_of_what_cannot_grow(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A limit on the size of files ends writing amid the weights, as a full disk does."""
    ways: list[Callable[[Path], object]] = [
        partial(export_gguf, tiny_model_dir, kind="f16"),
        partial(export_ollama, tiny_model_dir, kind="q8_0"),
        partial(convert_model, str(tiny_model_dir)),
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for way in ways:
            with pytest.raises(
                ExportError, match=r"out\S*: writing failed, nothing is left of it: .*a limit on the size"
            ):
                way(tmp_path / "out.gguf")
            assert not any(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_numbers_too_large_for_f16(tiny_model: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    from mlxft.model.folder import save_folder

    tiny_model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    save_folder(tmp_path / "m", tiny_model.model, tiny_model.tokenizer, tiny_model.config, source=tiny_model_dir)
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight: .*too large for f16, use bf16"):
        export_gguf(tmp_path / "m", tmp_path / "a.gguf", kind="f16")
    export_gguf(tmp_path / "m", tmp_path / "a.gguf", kind="bf16")
