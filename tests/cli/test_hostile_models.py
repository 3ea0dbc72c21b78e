"""Damaged and absurd models through the commands: refused in a line that names the file and what is wrong in it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[..., str]
Write = Callable[..., str]


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")


def deep(file: Path) -> None:
    file.write_text('{"model_type": "llama", "a": ' + "[" * 100_000 + "]" * 100_000 + "}")


def growing(file: Path, part: str) -> None:
    """A text of a letter becomes one of 10^9."""
    tens = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10} for _ in range(9)]
    change(file, **{part: {"type": "Sequence", f"{part}s": tens}})


CONFIGS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: f.write_text("[1]"), "is a list"),
    (deep, "nested deeper"),
    (lambda f: (f.unlink(), os.mkfifo(f)), "pipe"),
    (lambda f: f.write_bytes(b"\xff\x00"), "not valid JSON"),
    (lambda f: change(f, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    (lambda f: change(f, vocab_size=10**12), "vocab_size is 1000000000000"),
    (lambda f: change(f, num_attention_heads=0), "num_attention_heads is 0"),
    (lambda f: change(f, num_attention_heads=7), "shape"),
    (lambda f: change(f, hidden_size="32"), "hidden_size is '32'"),
    (lambda f: change(f, torch_dtype="float7"), "torch_dtype is 'float7'"),
    (lambda f: change(f, quantization=[4]), "quantization is a list"),
    (lambda f: change(f, quantization={"bits": 0, "group_size": 32}), "quantization.bits is 0"),
    (lambda f: change(f, model_type="../x"), "model_type is '../x'"),
    (lambda f: change(f, model_type="base"), "no architecture 'base'"),
    (lambda f: change(f, model_type="cache"), "no architecture 'cache'"),
    (lambda f: change(f, model_type="olmo"), "no architecture 'olmo'"),
    (lambda f: change(f, num_key_value_heads=None, rope_scaling={"rope_type": "x"}), "x"),
    (lambda f: change(f, hidden_size=64), "shape"),
    (lambda f: change(f, num_hidden_layers=3), "parameters"),
    (lambda f: change(f, rms_norm_eps=None), ""),
    (lambda f: change(f, eos_token_id=["x"]), "eos_token_id"),
    (lambda f: change(f, rope_theta="x"), "its config does not fit its architecture"),
    (lambda f: change(f.with_name("tokenizer_config.json"), mask_token="\ud800"), "half of a character"),
    (lambda f: f.with_name("generation_config.json").write_text("[1]"), "generation_config.json: is a list"),
    (lambda f: change(f.with_name("tokenizer_config.json"), model_max_length="x"), "model_max_length is 'x'"),
    (lambda f: deep(f.with_name("tokenizer_config.json")), "tokenizer_config.json: is nested deeper"),
    (lambda f: deep(f.with_name("tokenizer.json")), "no tokenizer"),
    (lambda f: growing(f.with_name("tokenizer.json"), "normalizer"), "its replacements would make a text"),
    (lambda f: growing(f.with_name("tokenizer.json"), "decoder"), "its replacements would make a text"),
    (lambda f: f.with_name("model.safetensors").unlink(), "no model*.safetensors"),
]


@pytest.mark.parametrize(("damage", "said"), CONFIGS)
def test_a_damaged_model_is_refused_by_name(
    damage: Callable[[Path], Any], said: str, model: Path, write: Write, mlxft: Callable[..., Any]
) -> None:
    damage(model / "config.json")
    recipe = write(**{"model.path": str(model)})
    for args in (
        ["check", recipe],
        ["train", recipe],
        ["generate", "--model", str(model), "a"],
        ["convert", str(model), "out"],
    ):
        done = mlxft(*args)
        assert done.code in (1, 2), (args, done)
        assert said in done.err, args
        assert "Traceback" not in done.err
    assert not Path("out").exists()
    assert not Path("runs/a").exists()


def test_a_special_token_that_the_vocabulary_has_not(
    model: Path, tmp_path: Path, write: Write, mlxft: Callable[..., Any]
) -> None:
    """transformers gives it the number None."""
    change(model / "tokenizer_config.json", pad_token="")
    assert mlxft("check", write(**{"model.path": str(model)})).code == 0


def test_weights_that_are_no_numbers_are_said(
    model: Path, tmp_path: Path, write: Write, mlxft: Callable[..., Any]
) -> None:
    """Neither empty answers nor a dash in place of a loss, in silence."""
    import mlx.core as mx

    def spoil(file: Path) -> None:
        arrays, about = mx.load(str(file), return_metadata=True)  # type: ignore[misc]
        mx.save_safetensors(str(file), {k: v * float("nan") for k, v in arrays.items()}, about)

    recipe = write(**{"model.path": str(model), "run.steps": 1})
    assert mlxft("train", recipe).code == 0
    for args in (["export", "runs/a", "peft", "--format", "peft"], ["fuse", "runs/a", "fused", "--force"]):
        assert mlxft(*args).code == 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the in"}\n', "utf-8")
    spoil(tmp_path / "runs/a/adapter/adapters.safetensors")
    spoil(tmp_path / "peft/adapter_model.safetensors")
    spoil(tmp_path / "fused/model.safetensors")
    for said, args in (
        ("holds NaN", ["generate", "--model", "runs/a", "a"]),
        ("holds NaN", ["import", "peft", "again"]),
        ("computes NaN", ["generate", "--model", "fused", "a", "--max-tokens", "4"]),
        ("computes NaN", ["generate", "--model", "fused", "--batch", "prompts.jsonl", "--temperature", "1"]),
        ("computes NaN", ["eval", "fused", "rows-10.jsonl"]),
    ):
        done = mlxft(*args)
        assert (done.code, said in done.err) == (1, True), (args, done)


def safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
        | {"b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}},
        {"a": {"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 16]}},
    ],
    ids=["overlap", "beyond", "absurd"],
)
def test_tensors_that_overlap_or_reach_beyond_the_file(
    header: dict[str, Any], model: Path, tmp_path: Path, refused: Refused, write: Write
) -> None:
    (model / "model.safetensors").write_bytes(safetensors(header, bytes(24)))
    recipe = write(**{"model.path": str(model)})
    for args in (["check", recipe], ["train", recipe], ["generate", "--model", str(model), "a"]):
        assert "model.safetensors: is not a whole safetensors file" in refused(1, *args)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(pairs: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + pairs + tensors


NESTED = string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50_000 + struct.pack("<IQ", 4, 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gguf(NESTED, 1), "array of arrays"),
        (gguf(string(b"a") + struct.pack("<IIQ", 9, 0, 1 << 62), 1), "cut off or broken"),
        (gguf(b"", 1 << 60), "cut off"),
        (gguf(tensors=string(b"t") + struct.pack("<I99QIQ", 99, *[1] * 99, 0, 0), tensor_count=1), "99 dimensions"),
        (gguf(tensors=string(b"t") + struct.pack("<IQIQ", 1, 1 << 40, 0, 0), tensor_count=1), "beyond the file's end"),
    ],
    ids=["nested", "long-array", "pairs", "dimensions", "beyond"],
)
def test_a_hostile_gguf_never_reaches_the_c_code(content: bytes, said: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    assert said in refused(1, "generate", "--model", str(tmp_path / "m.gguf"), "a")


def test_absurd_metadata_of_a_whole_gguf(
    model: Path, tmp_path: Path, mlxft: Callable[..., Any], refused: Refused
) -> None:
    file = tmp_path / "m.gguf"
    assert mlxft("export", str(model), str(file), "--format", "gguf").code == 0
    whole = file.read_bytes()
    key = string(b"llama.block_count")
    at = whole.index(key) + len(key) + 4
    for layers in (2**31, 0, 999):
        file.write_bytes(whole[:at] + struct.pack("<I", layers) + whole[at + 4 :])
        refused(1, "generate", "--model", str(file), "a")


@pytest.mark.parametrize("name", ["m[v2]", "full[1]", "a*b?", "~x"])
def test_a_name_that_looks_like_a_pattern(name: str, model: Path, write: Write, mlxft: Callable[..., Any]) -> None:
    place = model.rename(model.with_name(name))
    recipe = write(tune={"method": "full"}, **{"model.path": str(place), "run.name": "f[1]", "run.steps": 1})
    for args in (
        ["check", recipe],
        ["train", recipe],
        ["generate", "--model", "runs/f[1]", "a", "--max-tokens", "2"],
        ["convert", "runs/f[1]/model", "out[2]"],
        ["generate", "--model", "out[2]", "a", "--max-tokens", "2"],
        ["generate", "--model", name, "a", "--max-tokens", "2"],  # ~x is the home of nobody
    ):
        done = mlxft(*args)
        assert done.code == 0, (args, done)


def test_a_low_hard_limit_of_open_files(tmp_path: Path) -> None:
    """mlx-lm raises it as it is imported, which the system refuses whoever is not root."""
    code = """
import resource
real = resource.setrlimit
real(resource.RLIMIT_NOFILE, (512, 1024))
def refuse(what, limits):
    if limits[1] > resource.getrlimit(what)[1]:
        raise ValueError("not allowed to raise maximum limit")
    real(what, limits)
resource.setrlimit = refuse
import mlxft.model.load
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024, 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
