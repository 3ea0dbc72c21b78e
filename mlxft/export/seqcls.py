"""A reward model as transformers' AutoModelForSequenceClassification with one label, its adapter merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxft.errors import ExportError
from mlxft.export.fuse import fuse_layers
from mlxft.export.peft import DENSE, score_notes, set_pad
from mlxft.model.folder import check_destination, check_unused, save_folder, weight_bytes
from mlxft.model.heads import find_head, read_head, without_head
from mlxft.model.lora import QUANTIZED
from mlxft.rundir import find_adapter, load


def export_seqcls(run: Path, out: Path, *, model: str | None = None, overwrite: bool = False) -> list[str]:
    """Write a reward run, adapter or model folder as one float folder: body, and head as `score`.

    Returns:
        What was done, a sentence each.
    Raises:
        ModelError: no such run, or it gives text and not scores.
        ExportError: transformers has no such class for the architecture, or `out` can not be written.
    """
    check_destination(out, overwrite)
    loaded = load(model, find_adapter(run), scores=True) if model else load(run, scores=True)
    check_unused(out, [loaded.path, find_adapter(run)])
    kind = str(loaded.config["model_type"])
    if DENSE.get(kind) is None or "model" not in loaded.model:
        known = ", ".join(name for name, there in DENSE.items() if there)
        raise ExportError(f"seq-cls: architecture {kind} has no class for scores that is known to fit ({known})")
    file = find_head(run)
    assert file is not None, "load has found it"
    saved = read_head(file)
    packed = any(isinstance(m, QUANTIZED) for m in loaded.model.modules())
    fuse_layers(loaded.model, dequantize=True)
    whole = nn.Module()
    with without_head(loaded.model):
        whole.model = loaded.model.model
    whole.score = nn.Linear(1, 1, bias=False)
    whole.score.weight = saved.weight.astype(_dtype(whole.model))
    pad = set_pad(loaded.tokenizer, loaded.config)
    config = seqcls_config(loaded.config, kind, pad)
    save_folder(out, whole, loaded.tokenizer, config, overwrite=overwrite, source=loaded.path)
    said = [f"wrote {out}: {DENSE[kind]} with one label ({weight_bytes(whole) / 1e6:,.0f} MB of weights)"]
    if packed:
        said.append("the base was quantised; what is written is float: nothing of the adapter is rounded away")
    return said + score_notes(saved, pad)


def _dtype(body: nn.Module) -> mx.Dtype:
    """Of the body's embedding: transformers holds the head in the same."""
    return body.embed_tokens.weight.dtype


def seqcls_config(config: dict[str, Any], kind: str, pad: int | None) -> dict[str, Any]:
    """config.json of the classifier: of a model with one label, whose number is a score."""
    dropped = ("quantization", "quantization_config", "tie_word_embeddings")
    return {k: v for k, v in config.items() if k not in dropped} | {
        "architectures": [DENSE[kind]],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "problem_type": "regression",
        "pad_token_id": pad,
    }
