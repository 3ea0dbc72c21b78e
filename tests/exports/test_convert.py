"""Folders that others read, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxft.errors import ConfigError, ExportError
from mlxft.exports.fuse import convert_model
from mlxft.model.folder import save_folder
from mlxft.model.load import base_fingerprint, fits_base, load

IDS = mx.array([[3, 40, 77, 5]])
MESSAGES = [{"role": "user", "content": "the sands of 1984"}]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_gguf_becomes_a_folder_for_mlx_lm_and_transformers(smollm2: Any, tmp_path: Path) -> None:
    import mlx_lm
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    told = convert_model("smollm2-135m", tmp_path / "out", quantize=4)
    assert told["bytes"] < 120e6
    assert (told["parameters"], told["dtype"]) == (134_515_008, "float16")
    assert names(tmp_path) == ["out"]
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    packed = load("smollm2-135m", quantize=4, dtype="own")
    assert mx.array_equal(model.layers[3].self_attn.q_proj.weight, packed.model.layers[3].self_attn.q_proj.weight)
    assert base_fingerprint(load(str(tmp_path / "out"))) == base_fingerprint(packed)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("Hello, world! 2024\n\n  äöü 🙂", "<|im_start|>user\nit's", " a  b\tc"):
        assert theirs.encode(text) == tokenizer.encode(text) == smollm2.tokenizer.encode(text)
    asked = smollm2.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    for other in (theirs, tokenizer):
        assert other.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False) == asked
        assert other.eos_token == "<|im_end|>"
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.rope_parameters["rope_theta"]) == ("llama", 100000)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2]


def test_dequantised_folder_is_the_direct_load(smollm2: Any, tmp_path: Path) -> None:
    told = convert_model("smollm2-135m", tmp_path / "out")
    assert (told["dtype"], told["quantization"], told["bits_per_weight"]) == ("float16", None, 16.0)
    back = load(str(tmp_path / "out"), dtype="float32")
    assert base_fingerprint(back) == base_fingerprint(smollm2)
    for layer in (0, 29):
        assert mx.array_equal(
            back.model.layers[layer].self_attn.q_proj.weight, smollm2.model.layers[layer].self_attn.q_proj.weight
        )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_quantise_and_back(kind: str, make_model_dir: Any, tmp_path: Path) -> None:
    source = make_model_dir(tmp_path / kind, kind)
    packed = convert_model(str(source), tmp_path / "q8", quantize=8, group_size=32)
    assert packed["quantization"]["bits"] == 8
    assert packed["bits_per_weight"] < 16
    plain = convert_model(str(tmp_path / "q8"), tmp_path / "plain", dequantize=True, dtype="float32")
    assert plain["quantization"] is None
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text("utf-8"))
    first, last = load(str(source), dtype="float32"), load(str(tmp_path / "plain"), dtype="float32")
    logits = first.model(IDS)
    # 8 bits in groups of 32 err by about 0.3 % of a weight's spread; a few layers of them by little more.
    assert mx.linalg.norm(logits - last.model(IDS)).item() < 0.04 * mx.linalg.norm(logits).item()
    assert fits_base(base_fingerprint(first), base_fingerprint(last))


def test_dtype_is_the_checkpoints_own_unless_given(tiny_model_dir: Path, tmp_path: Path) -> None:
    told = convert_model(str(tiny_model_dir), tmp_path / "own")
    assert told["dtype"] == "float32"
    assert (tmp_path / "own/model.safetensors").stat().st_size > 4 * told["parameters"]
    assert convert_model(str(tiny_model_dir), tmp_path / "half", dtype="bfloat16")["dtype"] == "bfloat16"
    assert mx.load(str(tmp_path / "half/model.safetensors"))["model.norm.weight"].dtype == mx.bfloat16


def test_what_is_there_is_not_touched(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_model(str(tiny_model_dir), out)
    before = (out / "config.json").read_text("utf-8")
    with pytest.raises(ConfigError, match="exists already; give another name, or overwrite"):
        convert_model(str(tiny_model_dir), out, dtype="float16")
    assert (out / "config.json").read_text("utf-8") == before
    # Over itself: the weights are read before the old folder goes.
    convert_model(str(out), out, dtype="float16", overwrite=True)
    assert load(str(out), dtype="own").config["torch_dtype"] == "float16"
    assert names(tmp_path) == ["out"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("x")
    with pytest.raises(ConfigError, match="not a model folder"):
        convert_model(str(tiny_model_dir), tmp_path / "photos", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        convert_model(str(tiny_model_dir), tmp_path / "photos/one.jpg", overwrite=True)
    assert names(tmp_path / "photos") == ["one.jpg"]


def test_settings_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        convert_model("nowhere", tmp_path / "out", quantize=4, dequantize=True)


def test_full_disk_is_seen_before_writing(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ExportError, match=r"needs about 0\.05 GB, 0\.00 GB are free"):
        save_folder(tmp_path / "new/out", tiny_model.model, tiny_model.tokenizer, tiny_model.config)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), RuntimeError("[write] Unable to write")])
def test_failed_write_leaves_nothing(
    kind: Exception, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_lm.utils

    def fail(*_: Any) -> None:
        raise kind

    out = save_folder(tmp_path / "out", tiny_model.model, tiny_model.tokenizer, tiny_model.config)
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(mlx_lm.utils.mx, "save_safetensors", lambda *_, **__: fail())
    for name in ("out", "other"):
        with pytest.raises(ExportError, match="writing failed"):
            save_folder(
                tmp_path / name, tiny_model.model, tiny_model.tokenizer, tiny_model.config, overwrite=name == "out"
            )
    assert names(tmp_path) == ["out"]
    assert (out / "model.safetensors").read_bytes() == before


def test_model_and_config_are_left_as_they_were(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.config.update(_name_or_path="a", vision_config={"b": 1})
    logits, config = tiny_model.model(IDS), json.dumps(tiny_model.config)
    source = tmp_path / "source"
    source.mkdir()
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 9}')
    (source / "own.py").write_text("x = 1\n")
    out = save_folder(tmp_path / "out", tiny_model.model, tiny_model.tokenizer, tiny_model.config, source=source)
    assert mx.array_equal(tiny_model.model(IDS), logits)
    assert json.dumps(tiny_model.config) == config
    generation = json.loads((out / "generation_config.json").read_text("utf-8"))
    assert (generation["temperature"], generation["eos_token_id"]) == (0.6, [tiny_model.tokenizer.eos_token_id])
    assert (out / "own.py").exists()
    told = convert_model(str(out), tmp_path / "again")
    assert json.loads((Path(told["path"]) / "generation_config.json").read_text("utf-8")) == generation


def test_failed_rename_puts_the_old_folder_back(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = save_folder(tmp_path / "out", tiny_model.model, tiny_model.tokenizer, tiny_model.config)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ExportError, match="Permission denied"):
        save_folder(out, tiny_model.model, tiny_model.tokenizer, tiny_model.config, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (out / "model.safetensors").is_file()


def test_what_quantising_costs_is_measured(tiny_model_dir: Path, tmp_path: Path) -> None:
    """In fewer bits more is lost; nothing if nothing is rounded."""
    told = [
        convert_model(str(tiny_model_dir), tmp_path / f"q{bits}", quantize=bits, group_size=32, measure=True)[
            "measured"
        ]
        for bits in (8, 4)
    ]
    assert 0 < told[0]["kl"] < told[1]["kl"]
    assert told[1]["agreement"] <= told[0]["agreement"] <= 1
    assert (told[0]["source"], told[0]["tokens"] > 100) == ("built-in text", True)
    (tmp_path / "rows.jsonl").write_text('{"text": "the sands of time and other sands"}\n')
    same = convert_model(str(tiny_model_dir), tmp_path / "same", measure=True, probe=str(tmp_path / "rows.jsonl"))
    assert (same["measured"]["kl"], same["measured"]["agreement"]) == (0, 1)
