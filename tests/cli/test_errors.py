"""Wrong input through the command: the exit code, one message with place, seen, wanted and way out, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[..., str]
Write = Callable[..., str]
CHAT = [{"role": "user", "content": "the in"}, {"role": "assistant", "content": "on"}]


def lines(path: Path, *rows: Any) -> str:
    """A jsonl file; strings are written as they are. Returns its name."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return path.name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tune.rnak=8", ["recipe.yaml: tune.rnak: no such setting (did you mean tune.rank?)"]),
        ("tune.lr=8", ["tune.lr: no such setting (did you mean optim.lr?)"]),
        ("rank=8", ["rank: no such setting (did you mean tune.rank?)"]),
        ("run.train=x", ["run.train: no such setting (did you mean tune.train or data.train?)"]),
        ("trian.rank=8", ["trian: no such setting"]),
        ("tune.rank=many", ["tune.rank: ", "integer", "seen 'many'"]),
        ("tune.rank=yes", ["tune.rank: ", "valid integer", "seen 'yes'"]),
        ("tune.rank=true", ["tune.rank: ", "true"]),
        ("tune.rank=0", ["tune.rank: ", "greater than or equal to 1", "seen 0"]),
        ("tune.method=qlora", ["expected 'lora', 'dora' or 'full' (did you mean lora?); seen 'qlora'"]),
        ("tune=lora", ["tune: is a section", "tune.method", "seen 'lora'"]),
        ("optim.lr=.inf", ["optim.lr: ", "finite"]),
        ("optim.betas=[0.9, 1.5]", ["betas must each be at least 0 and below 1"]),
        ("optim.warmup=1.5", ["warmup must be a whole number of steps or a share below 1, seen 1.5"]),
        ("optim.min_lr=1", ["min_lr (1) is above lr (0.01)"]),
        ("optim.momentum=0.9", ["adamw has no momentum (only sgd, muon)"]),
        ("data.valid=1.5", ["between 0 and 1, seen 1.5"]),
        ("run.epochs=0", ["run.epochs: ", "greater than 0"]),
        ("run.name=..", ["run.name: does not fit", "seen '..'"]),
        ("run.seed=100000000000000000000", ["run.seed: "]),
        ("tune.rank", ["override 'tune.rank': expected KEY=VALUE"]),
        ("tune.rank.x=3", ["override 'tune.rank.x=3': rank is a value, not a section"]),
        ("tune.rank=[", ["override tune.rank:1: not valid YAML"]),
        (
            "objective=stf",
            [
                "no such objective 'stf'",
                "(did you mean sft?); there are distill, grpo, online_dpo, ppo, preference, reinforce, reward, rloo",
            ],
        ),
        ("objective=KTOTrainer", ["(mlxft has objective: preference and preference.loss: kto)"]),
    ],
)
def test_wrong_settings(override: str, said: list[str], write: Write, refused: Refused) -> None:
    err = refused(2, "train", write(), override)
    assert err.startswith("ConfigError: ")
    for part in said:
        assert part in err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.steps=3", "run.epochs=2"], "run: give steps or epochs, not both (steps=3, epochs=2)"),
        (["batch.tokens=9", "batch.rows=2"], "batch: give tokens or rows, not both (tokens=9, rows=2)"),
        (["tune.scale=2", "tune.alpha=4"], "tune: give scale or alpha, not both (scale=2)"),
        (["tune.scale=2", "tune.rslora=true"], "tune: give scale or rslora, not both (scale=2)"),
        (["tune.method=full"], "tune: method full has no rank"),
        (["tune.freeze=[norm]"], "tune: freeze needs method full"),
        (["optim.schedule=constant", "optim.min_lr=0.001"], "min_lr needs a linear or cosine schedule"),
        (["data.template=none"], "data: template: none"),
        (["data.format=text", "data.train_on=last"], "data: train_on: last"),
        (["data.overflow=split"], "data: overflow: split"),
        (["model.group_size=32"], "model: group_size (32) needs quantize"),
        (["run.sample_tokens=3"], "run: sample_tokens (3) needs sample_prompts"),
        (["run.patience=3"], "run.patience: there is no validation data"),
        (["run.eval_every=3"], "run.eval_every: there is no validation data"),
        (["run.eval_at_start=true"], "run.eval_at_start: there is no validation data"),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], said: str, write: Write, refused: Refused) -> None:
    assert said in refused(2, "train", write(), *overrides)


def test_all_that_is_wrong_is_said_at_once(write: Write, refused: Refused) -> None:
    """Wrong overrides, unknown keys, wrong values and contradictions, also within one section."""
    path = write(**{"run.epochs": 2, "run.seeed": 1, "tune.rank": "x", "optim.lr": -1, "modle": {"path": "x"}})
    err = refused(2, "train", path, "what", "data.format=json")
    for part in (
        "'what': expected KEY=VALUE",
        "run.seeed: no such setting (did you mean run.seed?)",
        "run: give steps or epochs, not both",
        "tune.rank: ",
        "optim.lr: ",
        "modle: no such setting (did you mean model?)",
        "data.format: expected 'auto'",
    ):
        assert part in err
    assert len(err.splitlines()) == 7


def test_what_is_wrong_beside_an_unknown_objective_is_said_too(write: Write, refused: Refused) -> None:
    err = refused(2, "train", write(objective="stf", stf={"x": 1}, **{"tune.rnk": 3}))
    assert "no such objective 'stf'" in err
    assert "tune.rnk: no such setting" in err
    assert "stf: no such setting" not in err, "the section may well be the objective's own"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["model.path: is needed: ", "data.train: is needed: "]),
        ("model:\ndata:\n", ["model.path: is needed", "data.train: is needed"]),
        ("- a\n- b\n", ["expected a mapping of settings, found list"]),
        ("model: {path: a}\ntune: [\n", [":3: not valid YAML"]),
        ("tune:\n\trank: 3\n", [":2: not valid YAML"]),
        ("tune:\n  rank: 3\n  rank: 4\n", [":3: not valid YAML: key 'rank' is given twice"]),
        ("? [a]: b\n: c\n", [":1: not valid YAML"]),
        ("? [a]\n: c\n", [":1: not valid YAML: a key must be a plain name"]),
        ("run: {steps: " + "9" * 5000 + "}\n", ["not valid YAML: Exceeds the limit"]),
        ("x: !!python/object:os.system {}\n", [":1: not valid YAML"]),
        ("a: &a {b: *a}\n", ["an alias contains itself"]),
        ("1: 2\n", ["1: keys should be strings; seen 1"]),
    ],
)
def test_recipes_that_can_not_be_read(
    text: str, said: list[str], write: Write, refused: Refused, tmp_path: Path
) -> None:
    write()
    (tmp_path / "bad.yaml").write_text(text, "utf-8")
    err = refused(2, "check", "bad.yaml")
    for part in said:
        assert f"bad.yaml{'' if part.startswith(':') else ': '}{part}" in err


def test_recipes_that_are_not_there(write: Write, refused: Refused, tmp_path: Path) -> None:
    write()
    (tmp_path / "latin.yaml").write_bytes("run: {name: é}\n".encode("latin-1"))
    assert "nope.yaml: cannot read the recipe: No such file" in refused(2, "check", "nope.yaml")
    assert "is a folder; give a recipe" in refused(2, "check", str(tmp_path))
    assert "is a folder" in refused(2, "train", str(tmp_path))
    assert "latin.yaml: cannot read the recipe" in refused(2, "check", "latin.yaml")
    assert "give a recipe" in refused(2, "train")
    assert "no config.yaml" in refused(2, "train", "--resume", str(tmp_path))
    assert "not both" in refused(2, "train", "recipe.yaml", "--resume", "--overwrite")


def test_data_files(write: Write, refused: Refused, tmp_path: Path) -> None:
    recipe = write()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n", "utf-8")
    (tmp_path / "rows.doc").write_text("x", "utf-8")
    (tmp_path / "folder").mkdir()
    near = refused(2, "train", recipe, "data.train=rows-1.jsonl")
    assert "data.train: rows-1.jsonl: no such file (did you mean rows-10.jsonl?)" in near
    assert "data.valid: nope/v.jsonl: no such file" in refused(2, "train", recipe, "data.valid=nope/v.jsonl")
    assert "unknown kind of file '.doc'; known are .jsonl" in refused(2, "train", recipe, "data.train=rows.doc")
    assert "no file for the train split" in refused(2, "train", recipe, "data.train=folder")
    assert "the path is too long" in refused(2, "train", recipe, f"data.train={'a' * 400}")
    for name in ("empty.jsonl", "blank.jsonl"):
        assert f"DataError: {name}: no rows" in refused(1, "train", recipe, f"data.train={name}")
        assert f"DataError: data.valid: {name}: no rows" in refused(1, "train", recipe, f"data.valid={name}")
    lines(tmp_path / "one.jsonl", {"messages": CHAT})
    assert "empty valid split" in refused(1, "train", recipe, "data.train=one.jsonl", "data.valid=0.1")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{nope", "bad.jsonl:2: not valid JSON"),
        ('["a"]', "bad.jsonl:2: the row is a list; expected an object"),
        ({"text": "a"}, "bad.jsonl:2: no field 'messages'; the row has text"),
        ({"messages": CHAT[:1]}, "messages[0].role is user, and it is the last; expected assistant to end it"),
        ({"messages": CHAT[::-1]}, "bad.jsonl:2: messages[0].role is assistant after nothing"),
        ({"messages": [CHAT[0], {"role": "asistant", "content": "a"}]}, "(did you mean assistant?)"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": 3}]}, "messages[1].content is a number"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "every assistant turn is empty"),
    ],
)
def test_one_row_that_is_wrong(row: Any, said: str, write: Write, refused: Refused, tmp_path: Path) -> None:
    lines(tmp_path / "bad.jsonl", {"messages": CHAT}, row, {"messages": CHAT})
    err = refused(1, "train", write(), "data.train=bad.jsonl")
    assert err.startswith("DataError: bad.jsonl:2: ")
    assert said in err


def test_many_rows_that_are_wrong(write: Write, refused: Refused, tmp_path: Path) -> None:
    lines(tmp_path / "bad.jsonl", *["{nope"] * 30, {"messages": CHAT})
    said = refused(1, "train", write(), "data.train=bad.jsonl").splitlines()
    assert [s.removeprefix("DataError: ").partition(": ")[0] for s in said[:20]] == [
        f"bad.jsonl:{i}" for i in range(1, 21)
    ]
    assert said[20] == "... and 10 more"
    assert said[21:] == ["30 of 31 rows do not fit; data.bad_rows: drop leaves them out"]
    text = refused(1, "train", write(), "data.format=text")
    assert "the rows do not fit data.format: text\nthey look like\n  data.format=messages\n" in text


def test_rows_longer_than_the_limit(write: Write, refused: Refused, mlxft: Callable[..., Any], tmp_path: Path) -> None:
    long = [{"role": "user", "content": "x" * 20}, {"role": "assistant", "content": "y" * 30}]
    lines(tmp_path / "long.jsonl", {"messages": CHAT}, {"messages": long}, {"messages": [CHAT[0], long[1]]})
    lines(tmp_path / "long.txt.jsonl", {"text": "a" * 100})
    recipe = write(**{"data.train": "long.jsonl", "data.max_length": 40, "run.steps": 1})
    err = refused(1, "train", recipe)
    assert "long.jsonl:2: " in err
    assert "long.jsonl:3: " in err
    assert "tokens; data.max_length is 40" in err
    assert "set data.overflow: drop, truncate or split" in err
    dropped = mlxft("check", recipe, "data.overflow=drop", "--json").out
    assert json.loads(dropped)["data"]["rows"] == 1
    assert json.loads(dropped)["notes"][0] == "2 rows were longer than data.max_length and are left out"
    cut = json.loads(mlxft("check", recipe, "data.overflow=truncate", "--json").out)
    assert cut["notes"][0] == "2 rows were longer than data.max_length and are cut"
    assert cut["data"]["rows"] == 3
    text = ["data.train=long.txt.jsonl", "data.format=text", "--json"]
    split = json.loads(mlxft("check", recipe, *text, "data.overflow=split").out)
    # 100 letters and an EOS, all but the first predicted once, in pieces of 40 that share a token with the one before.
    assert split["data"] == {
        "rows": 3,
        "tokens": 103,
        "trained tokens": 100,
        "padding share": pytest.approx(0, abs=0.3),
    }
    assert "no row is left to train on" in refused(1, "train", recipe, "data.overflow=drop", "data.max_length=5")
    lines(tmp_path / "held-out.jsonl", {"messages": long})
    said = refused(1, "train", recipe, "data.train=rows-10.jsonl", "data.valid=held-out.jsonl", "data.overflow=drop")
    assert said.startswith("DataError: data.valid: no row is left to train on, of 1: 1 row was longer")


def test_messages_without_a_chat_template(
    write: Write, refused: Refused, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_dir(tmp_path / "base")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}))
    err = refused(1, "train", write(**{"model.path": str(folder)}))
    assert "rows-10.jsonl:1: a conversation needs a chat template, and this tokenizer has none" in err
    assert "use data.format: text or prompt-completion, or set model.chat_template" in err


@pytest.mark.parametrize(
    ("code", "overrides", "said"),
    [
        (2, ["tune.targets=q_prj"], "tune.targets: 'q_prj' matches no module; there are mlp.down_proj, mlp.gate_proj,"),
        (2, ["tune.targets=q_prj"], "self_attn.v_proj, or all-linear, attention, mlp (did you mean q_proj?)"),
        (2, ["tune.targets=[q_proj, nope]"], "tune.targets: 'nope' matches no module"),
        (2, ["tune.layers=3"], "tune.layers is 3; the model has 2 layers"),
        (2, ["tune.layers=[0, 2, -1]"], "tune.layers is [0, 2, -1]; expected indices of layers from 0 to 1"),
        (2, ["tune.layers=[]"], "tune.layers is []; expected indices of layers from 0 to 1"),
        (2, ["tune.layers=0"], "layers must be all, a number of at least 1 (the last N), or a list; seen 0"),
        (2, ["tune.train=[nope]"], "tune.train: 'nope' matches nothing; there are input_layernorm,"),
        (2, ["tune.train=[lm_head]"], "the head of this model is its embedding (tied): train that"),
        (2, ["tune.train=[q_proj]"], "tune.train and tune.targets both name model.layers.0.self_attn.q_proj"),
        (2, ["tune.method=dora", "tune.targets=[embed_tokens]"], "DoRA is for linear layers"),
        (1, ["model.quantize=4", "model.group_size=32", "tune.train=[embed_tokens]"], "is quantised to 4 bits"),
    ],
)
def test_what_is_trained(code: int, overrides: list[str], said: str, write: Write, refused: Refused) -> None:
    assert said in refused(code, "train", write(), *overrides)


def test_full_fine_tuning(write: Write, refused: Refused) -> None:
    recipe = write(tune={"method": "full"})
    quantised = refused(1, "train", recipe, "model.quantize=4", "model.group_size=32")
    assert "tune.method full needs float weights" in quantised
    assert "use lora or dora (QLoRA), or load without quantisation" in quantised
    assert "'lm_head' matches nothing" in refused(2, "train", recipe, "tune.freeze=[lm_head]")
    assert "leave nothing to train" in refused(2, "train", recipe, "tune.train=[norm]", "tune.freeze=[norm]")


def test_models(write: Write, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = write()
    for name in ("empty", "no-weights"):
        (tmp_path / name).mkdir()
    (tmp_path / "no-weights" / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "lama"}', "utf-8")
    (tmp_path / "odd" / "model.safetensors").touch()

    def say(path: str) -> str:
        err = refused(1, "train", recipe, f"model.path={path}")
        assert err.startswith("ModelError: model ")
        return err

    assert "no such file or folder" in say("./nope")
    assert "no config.json in" in say("empty")
    assert "no model*.safetensors in" in say("no-weights")
    assert "mlx-lm has no architecture 'lama' (did you mean llama?)" in say("odd")
    assert "is a file; expected a folder, a .gguf file or a hub id" in say("recipe.yaml")
    assert "(did you mean smollm2-135m?)" in say("smollm2-135")
    hub = say("nobody/no-such-model")
    assert "the hub is switched off (HF_HUB_OFFLINE is set) and its cache does not hold it" in hub
    assert "chat_template 'no.jinja': cannot be read" in refused(2, "train", recipe, "model.chat_template=no.jinja")


def test_a_quantised_model_keeps_its_bits_and_groups(
    write: Write, refused: Refused, mlxft: Callable[..., Any], tiny_model_dir: Path
) -> None:
    recipe = write()
    assert mlxft("convert", str(tiny_model_dir), "q4", "--quantize", "4", "--group-size", "32").code == 0
    asked = ["model.path=q4", "model.quantize=8"]
    assert "is quantised already, to 4 bits, and cannot go to 8" in refused(1, "train", recipe, *asked)
    asked = ["model.path=q4", "model.quantize=4", "model.group_size=64"]
    assert "is quantised already, in groups of 32, not 64" in refused(1, "train", recipe, *asked)


def test_run_folders_that_can_not_be_written(write: Write, refused: Refused, tmp_path: Path) -> None:
    recipe = write()
    (tmp_path / "file").touch()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.txt").write_text("years of work", "utf-8")
    assert "cannot write to file/a: Not a directory" in refused(2, "train", recipe, "run.dir=file")
    exists = refused(2, "train", recipe, "run.name=mine")
    assert "mine exists; resume it with --resume" in exists
    foreign = refused(2, "train", recipe, "run.name=mine", "--overwrite")
    assert "is not a run folder that this version of mlxft made (it has thesis.txt)" in foreign


def test_a_run_is_not_replaced_when_its_own_files_are_used(
    write: Write, refused: Refused, mlxft: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = write(**{"run.steps": 1})
    assert mlxft("train", recipe).code == 0
    err = refused(2, "train", recipe, "--overwrite", f"model.adapter={tmp_path / 'runs' / 'a'}")
    assert "model.adapter is in this run folder" in err


def test_commands_and_options(write: Write, refused: Refused) -> None:
    recipe = write()
    assert "no such command: trian (did you mean train?)" in refused(2, "trian", recipe)
    assert "No such option '--jsn'" in refused(2, "check", recipe, "--jsn")
    assert "No such option '--nope'" in refused(2, "--nope")
    assert "give a recipe; or --model" in refused(2, "check")
    assert "-1 is not in the range" in refused(2, "check", recipe, "--rows", "-1")
    assert "give --dequantize or --bits, not both" in refused(2, "fuse", "a", "b", "--bits", "4", "--dequantize")
    assert "exclude each other" in refused(2, "convert", "a", "b", "--quantize", "4", "--dequantize")
    assert "group_size 32 is for quantising" in refused(2, "convert", "a", "b", "--group-size", "32")


@pytest.mark.parametrize(("package", "spec"), [("datasets", "hf:org/name"), ("pyarrow", "rows.parquet")])
def test_an_extra_that_is_not_installed(
    package: str, spec: str, write: Write, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, package, None)  # an import of it fails as if it were not there
    err = refused(2, "train", write(), f"data.train={spec}")
    assert f"this needs the package {package}: pip install 'mlxft[data]'" in err


def test_a_damaged_parquet_file(write: Write, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    assert "rows.parquet: not a readable parquet file" in refused(1, "train", write(), "data.train=rows.parquet")


def test_errors_of_the_installed_command(write: Write, shell: Callable[..., Any], tmp_path: Path) -> None:
    """The same through processes of their own, for the exit codes and the streams."""
    recipe = write()
    wrong = shell("train", recipe, "tune.rnak=8")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err == "ConfigError: recipe.yaml: tune.rnak: no such setting (did you mean tune.rank?)\n"
    bad = lines(tmp_path / "bad.jsonl", "{nope")
    failed = shell("train", recipe, f"data.train={bad}")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.startswith("DataError: bad.jsonl:1: not valid JSON")
    assert not (tmp_path / "runs").exists()
