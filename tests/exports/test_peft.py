"""PEFT adapters in and out, against adapters that peft itself made and what they answer there (golden/peft)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load as mlx_lm_load

import mlxft
from mlxft.errors import ExportError, ModelError
from mlxft.exports.peft import CONFIG, WEIGHTS, export_peft, export_seqcls, import_peft
from mlxft.model.heads import read_scores
from mlxft.model.logits import Split
from mlxft.study.score import open_scorer

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
TRUTH = json.loads((GOLDEN / "outputs.json").read_text("utf-8"))
IDS = mx.array(TRUTH["ids"])
TEXT = ["lora", "rslora", "dora", "patterns", "tied", "both", "whole"]
Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def golden(tmp_path: Path, tiny_tokenizer: Any) -> Callable[[str], tuple[Path, str]]:
    """`golden("lora")`: a copy of peft's adapter, which may be changed, and its base."""

    def find(name: str) -> tuple[Path, str]:
        folder = tmp_path / f"peft-{name}"
        shutil.copytree(GOLDEN / name, folder)
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        base = tmp_path / config["base_model_name_or_path"]
        if not base.exists():
            shutil.copytree(GOLDEN / base.name, base)
            tiny_tokenizer.save_pretrained(str(base))
        write(folder, base_model_name_or_path=str(base))
        return folder, str(base)

    return find


def write(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def arrays(file: Path) -> dict[str, mx.array]:
    found = mx.load(str(file))
    assert isinstance(found, dict)
    return found


def logits(adapter: Path) -> mx.array:
    return mlxft.load(adapter, dtype="float32").model(IDS)[0, :, ::25].flatten()


@pytest.mark.parametrize("name", TEXT)
def test_an_adapter_of_peft_gives_here_what_it_gives_there(name: str, golden: Any, tmp_path: Path) -> None:
    folder, base = golden(name)
    import_peft(folder, tmp_path / "in")
    expected = mx.array(TRUTH["outputs"][name])
    bare = mlxft.load(base, dtype="float32").model(IDS)[0, :, ::25].flatten()
    assert mx.abs(bare - expected).max() > 1e-2
    assert mx.allclose(logits(tmp_path / "in"), expected, atol=1e-4)
    if name in ("lora", "dora"):  # of llama: mlx-lm does not find qwen2's rope_theta where transformers 5 writes it
        model = mlx_lm_load(base, adapter_path=str(tmp_path / "in"))[0]
        model.set_dtype(mx.float32)  # the base's file is float16
        assert mx.allclose(model(IDS)[0, :, ::25].flatten(), expected, atol=1e-4)


@pytest.mark.parametrize("name", TEXT)
def test_out_again_it_is_what_peft_wrote(name: str, golden: Any, tmp_path: Path) -> None:
    """Tensor by tensor and setting by setting: so peft gives for it what `outputs.json` says."""
    folder, base = golden(name)
    import_peft(folder, tmp_path / "in")
    export_peft(tmp_path / "in", tmp_path / "out")
    theirs = {n: v.astype(mx.float32) for n, v in arrays(folder / WEIGHTS).items() if "base_layer" not in n}
    mine = arrays(tmp_path / "out" / WEIGHTS)
    assert set(mine) == set(theirs)
    config, given = (json.loads((f / CONFIG).read_text("utf-8")) for f in (tmp_path / "out", folder))
    scale, theirs_scale = (c["lora_alpha"] / (c["r"] ** 0.5 if c["use_rslora"] else c["r"]) for c in (config, given))
    for n, v in theirs.items():
        if name != "patterns":
            assert mx.array_equal(mine[n], v), n
            assert scale == pytest.approx(theirs_scale)
        elif n.endswith("lora_B.weight"):  # of other ranks and scales: what they multiply out to
            a, own = (w[n.replace("lora_B", "lora_A")] for w in (theirs, mine))
            alpha = 5 if "o_proj" in n else 8
            assert mx.allclose(scale * mine[n] @ own, alpha / a.shape[0] * v @ a, atol=1e-5)
    assert config["use_dora"] == given["use_dora"]
    assert config["base_model_name_or_path"] == base
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    if name == "rslora":
        assert config["target_modules"] == [f"model.layers.1.self_attn.{k}_proj" for k in "qv"]
    if name == "lora":
        assert config["target_modules"] == ["down_proj", "q_proj"]
    if name == "whole":
        assert sorted(config["modules_to_save"]) == ["lm_head", "model.norm"]
    if name == "tied":
        assert config["target_modules"] == ["embed_tokens", "lm_head", "q_proj"]


def test_a_score_head_comes_in_and_goes_out(golden: Any, tmp_path: Path) -> None:
    folder, _ = golden("score")
    import_peft(folder, tmp_path / "in")
    scorer = open_scorer(tmp_path / "in", dtype="float32")
    got = read_scores(scorer.split, IDS, mx.array([IDS.shape[1] - 1]))
    assert mx.allclose(got, mx.array(TRUTH["outputs"]["score"]), atol=1e-4)
    export_peft(tmp_path / "in", tmp_path / "out")
    mine, theirs = (arrays(f / WEIGHTS) for f in (tmp_path / "out", folder))
    assert set(mine) == set(theirs)
    assert all(mx.array_equal(mine[n], theirs[n].astype(mx.float32)) for n in mine)
    config = json.loads((tmp_path / "out" / CONFIG).read_text("utf-8"))
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])


def test_a_merged_score_model(golden: Any, tmp_path: Path) -> None:
    """Body and head as transformers names them; padding that does not end a row."""
    folder, _ = golden("score")
    import_peft(folder, tmp_path / "in")
    said = export_seqcls(tmp_path / "in", tmp_path / "out")
    assert "LlamaForSequenceClassification" in said[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "score"}
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer["pad_token"] == "<|endoftext|>" != tokenizer["eos_token"]
    assert config["pad_token_id"] == 0
    weights = arrays(tmp_path / "out" / "model.safetensors")
    head = weights.pop("score.weight")
    assert head.shape == (1, 16)
    body = mlxft.load(str(tmp_path / "base-llama"), dtype="float32").model
    body.load_weights(list(weights.items()))
    hidden = Split(body).hidden(IDS)[:, -1]
    assert mx.allclose((hidden @ head.T)[:, 0], mx.array(TRUTH["outputs"]["score"]), atol=1e-4)


def test_rslora_of_a_run_stays_rslora(recipe: Recipe, tmp_path: Path) -> None:
    run = mlxft.train(recipe(**{"tune.rslora": True, "tune.alpha": 6.0}))
    export_peft(run.dir, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text("utf-8"))
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 6, 4)
    import_peft(tmp_path / "out", tmp_path / "in")
    mine, back = (mlxft.load(f, dtype="float32").model(IDS) for f in (run.dir, tmp_path / "in"))
    assert mx.allclose(mine, back, atol=1e-5)


def test_a_quantised_base_is_said(recipe: Recipe, tmp_path: Path) -> None:
    run = mlxft.train(recipe(**{"model.quantize": 4, "model.group_size": 32, "run.steps": 1}))
    said = export_peft(run.dir, tmp_path / "out")
    assert "the base was quantised to 4 bits in training: load the adapter on the float original" in said[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, r"bias is 'all'; expected 'none'"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; expected 'LORA'"),
        ({"peft_type": None}, r"peft_type is None"),
        ({"task_type": "TOKEN_CLS"}, r"task_type is 'TOKEN_CLS'"),
        ({"init_lora_weights": "pissa"}, r"'pissa', which changes the base itself"),
        ({"use_qalora": True, "lora_bias": True}, r"lora_bias is set[\s\S]*use_qalora is set"),
        ({"r": 3}, r"has rank 4, its adapter_config.json says 3"),
        ({"use_dora": True}, r"does not fit use_dora True"),
        ({"lora_alpha": 0}, r"lora_alpha is 0"),
        ({"base_model_name_or_path": None}, r"names no base .*--model"),
        ({"base_model_name_or_path": "./gone"}, r"no such file or folder.*--model"),
        ({"task_type": "SEQ_CLS"}, r"expected one score.weight"),
        ({"lora_dropout": [0.1]}, r"lora_dropout is a list"),
        ({"r": "8", "lora_alpha": None}, r"r is '8'.*lora_alpha is null"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern.q_proj is 'x'"),
        ({"rank_pattern": {"q_proj": 2**40}}, r"rank_pattern.q_proj is 1099511627776"),
        ({"alpha_pattern": {"([\\w.]+)+!": 2}}, r"may take for ever to match"),
        ({"alpha_pattern": {"(a|a)" * 30: 2}}, r"may take for ever to match"),
        ({"rank_pattern": {"(": 2}}, r"'\(' cannot be read"),
    ],
)
def test_what_can_not_come_in(changes: dict[str, Any], message: str, golden: Any, tmp_path: Path) -> None:
    folder, _ = golden("lora")
    write(folder, **changes)
    with pytest.raises(ModelError, match=message):
        import_peft(folder, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_files_that_do_not_fit(golden: Any, tmp_path: Path, make_model_dir: Callable[..., Path]) -> None:
    folder, _ = golden("lora")
    weights = arrays(folder / WEIGHTS)
    mx.eval(weights)  # its file is written anew
    first = next(n for n in weights if n.endswith("lora_A.weight"))
    other = make_model_dir(tmp_path / "other", hidden_size=64)

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ModelError, match=message):
            import_peft(folder, tmp_path / "in", **options)

    refused(r"shape \(\d+, 4\), the model's is", model=str(other))
    mx.save_safetensors(str(folder / WEIGHTS), {n: v for n, v in weights.items() if n != first})
    refused(r"has no lora_A")
    mx.save_safetensors(str(folder / WEIGHTS), weights | {first.replace("lora_A", "lora_C"): weights[first]})
    refused(r"holds arrays that are not LoRA's:\n.*lora_C")
    gone = {n.replace("layers.1", "layers.7"): v for n, v in weights.items()}
    mx.save_safetensors(str(folder / WEIGHTS), gone)
    refused(r"is for modules that .* does not have:\n  model.layers.7")
    (folder / WEIGHTS).write_bytes(b"nonsense")
    refused(r"cannot be read")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(r"has no adapter_model.safetensors \(adapter_model.bin is a pickle")
    (folder / CONFIG).write_text("{")
    refused(r"not valid JSON")
    (folder / CONFIG).unlink()
    refused(r"is not a PEFT adapter")


def test_an_embedding_adapted_apart_from_its_tied_head(golden: Any, tmp_path: Path) -> None:
    folder, _ = golden("untied-embedding")
    with pytest.raises(ModelError, match=r"separately, and in .* they are one \(tied\)"):
        import_peft(folder, tmp_path / "in")


def test_what_can_not_go_out(
    recipe: Recipe, tmp_path: Path, make_model_dir: Callable[..., Path], save_adapter: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    moe = make_model_dir(tmp_path / "moe", "qwen3_moe")
    save_adapter(moe, tmp_path / "experts")
    with pytest.raises(ExportError, match="mixture of experts"):
        export_peft(tmp_path / "experts", out)
    save_adapter(moe, tmp_path / "attention", targets=["q_proj"])
    export_peft(tmp_path / "attention", tmp_path / "moe-out")
    neox = make_model_dir(tmp_path / "neox", "gpt_neox")
    save_adapter(neox, tmp_path / "neox-adapter")
    with pytest.raises(ExportError, match="architecture gpt_neox is not among those"):
        export_peft(tmp_path / "neox-adapter", out)
    full = mlxft.train(recipe(**{"tune.method": "full", "tune.rank": None, "run.steps": 1}))
    with pytest.raises(ModelError, match=r"was fully fine-tuned and has no adapter; its model is .*model"):
        export_peft(full.dir, out)
    with pytest.raises(ModelError, match="gives text, not scores"):
        export_seqcls(full.dir, out)
    with pytest.raises(ModelError, match="no such run or adapter"):
        export_peft(tmp_path / "nowhere", out)
    with pytest.raises(ModelError, match="was trained on another base"):
        export_peft(tmp_path / "attention", out, model=str(neox))
    assert not out.exists()
