"""Settings, recipes and what is said of wrong ones, without the command (tests/cli goes through it)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from mlxft import config as config_module
from mlxft.config import (
    Config,
    OptimSettings,
    Settings,
    config_class,
    dump_config,
    load_config,
    objectives,
    parse_config,
    read_yaml,
)
from mlxft.errors import ConfigError

LEAST: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t.jsonl", "format": "text"}}


def least(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**LEAST, **{k: {**LEAST.get(k, {}), **v} for k, v in sections.items()}}


def recipe(folder: Path, text: str = "model: {path: m}\ndata: {train: t.jsonl, format: text}\n") -> Path:
    file = folder / "short.yaml"
    file.write_text(text, "utf-8")
    return file


def fields(kind: type[BaseModel]) -> list[Any]:
    own = [(f"{kind.__name__}.{name}", field) for name, field in kind.model_fields.items()]
    below = [f.annotation for _, f in own if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)]
    return [pair for pair in own if pair[1].annotation not in below] + [p for kind in below for p in fields(kind)]


def test_every_setting_has_help() -> None:
    assert not [name for name, field in fields(Config) if not (field.description or "").strip()]


def test_the_least_recipe(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path))
    assert (config.objective, config.tune.method, config.optim.name, config.run.name) == (
        "sft",
        "lora",
        "adamw",
        "short",
    )
    assert config.run_dir == Path("runs/short")
    assert parse_config(LEAST).run.name == "sft"


@pytest.mark.parametrize(
    ("tune", "wanted"),
    [
        ({}, 2.0),
        ({"rank": 4}, 4.0),
        ({"alpha": 32, "rank": 4}, 8.0),
        ({"rslora": True, "rank": 16}, 4.0),
        ({"rslora": True, "rank": 4, "alpha": 2}, 1.0),
        ({"scale": 0.5, "rank": 64}, 0.5),
    ],
)
def test_multiplier_of_the_low_rank_update(tune: dict[str, Any], wanted: float) -> None:
    """alpha / rank, rsLoRA alpha / sqrt(rank), alpha 16 where it is not given; scale is the number itself."""
    assert parse_config(least(tune=tune)).tune.multiplier == wanted


def test_overrides_beat_the_recipe_which_beats_defaults(tmp_path: Path) -> None:
    file = recipe(tmp_path, "model: {path: m}\ndata: {train: t.jsonl, format: text}\ntune: {rank: 4}\nbatch:\n")
    config = load_config(file, ["tune.dropout=0.5", "batch.rows=3", "tune.targets=[a, b]", "optim.lr=2e-3"])
    assert (config.tune.rank, config.tune.dropout, config.tune.targets) == (4, 0.5, ["a", "b"])
    assert (config.batch.rows, config.optim.lr, config.tune.layers) == (3, 2e-3, "all")
    assert load_config(file, ["tune.rank=5", "tune.rank=6"]).tune.rank == 6, "the later of two wins"
    assert load_config(file, ["run.sample_prompts=['a=b']"]).run.sample_prompts == ["a=b"]


@pytest.mark.parametrize(
    ("section", "one", "other"), [("run", "steps", "epochs"), ("batch", "tokens", "rows"), ("tune", "scale", "alpha")]
)
def test_an_override_takes_the_place_of_what_it_excludes(section: str, one: str, other: str, tmp_path: Path) -> None:
    for given, asked in ((one, other), (other, one)):
        file = recipe(tmp_path, f"model: {{path: m}}\ndata: {{train: t, format: text}}\n{section}: {{{given}: 2}}\n")
        changed = getattr(load_config(file, [f"{section}.{asked}=3"]), section)
        assert (getattr(changed, asked), getattr(changed, given)) == (3, None)
        kept = getattr(load_config(file, [f"{section}.{asked}=null"]), section)
        assert (getattr(kept, asked), getattr(kept, given)) == (None, 2), "null takes nothing's place"
        with pytest.raises(ConfigError, match="not both"):
            load_config(file, [f"{section}.{asked}=3", f"{section}.{given}=3"])


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("1E6", 1e6), ("-3e2", -300.0), ("1e", "1e"), ("e5", "e5")]
)
def test_numbers_with_an_exponent_are_numbers(text: str, value: Any) -> None:
    assert read_yaml(text, "x") == value
    assert parse_config(least(data=read_yaml("valid: 5e-2", "x"))).data.valid == 0.05


def test_an_empty_section_is_as_none(tmp_path: Path) -> None:
    raw = {**LEAST, "tune": None, "run": None, "objective": None}
    assert parse_config(raw) == parse_config(LEAST)


def test_paths_that_are_there_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stays usable from another folder, and ~ is the home folder everywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("m", "t.jsonl", "v.jsonl", "c.jinja"):
        (tmp_path / name).touch()
    here = str(tmp_path.resolve())
    for start in ("", "~/"):
        raw = least(
            model={"path": f"{start}m", "adapter": f"{start}m", "chat_template": f"{start}c.jinja"},
            data={"train": f"{start}t.jsonl", "valid": f"{start}v.jsonl"},
        )
        config = parse_config(raw)
        assert (config.model.path, config.model.adapter) == (f"{here}/m", f"{here}/m")
        assert config.model.chat_template == Path(here, "c.jinja")
        assert (config.data.train, config.data.valid) == (f"{here}/t.jsonl", f"{here}/v.jsonl")
    assert parse_config(least(run={"dir": "~/runs"})).run.dir == tmp_path / "runs"
    config = parse_config(least(model={"path": "org/name"}, data={"train": "hf:org/name", "valid": 0.1}))
    assert (config.model.path, config.data.train, config.data.valid) == ("org/name", "hf:org/name", 0.1)
    assert parse_config(least(model={"path": "~nobody-at-all/x"})).model.path == "~nobody-at-all/x"


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"tune": {"method": "full", "freeze": ["norm"], "layers": [0, 1]}},
        {"tune": {"method": "dora", "targets": ["a", "b"], "scale": 2.5}},
        {"model": {"adapter": "runs/x"}, "tune": {"rank": 8}},
        {"model": {"quantize": 4, "group_size": 32}},
        {
            "data": {
                "format": "messages",
                "template": "auto",
                "train_on": "last",
                "valid": 0.1,
                "fields": {"messages": "d"},
            }
        },
        {"optim": {"name": "lion", "betas": [0.8, 0.9], "clip": None}},
        {"run": {"epochs": 2.5, "sample_prompts": ["é ⟦"], "sample_tokens": 3, "patience": 2}},
    ],
)
def test_config_yaml_reads_back_as_the_same_settings(sections: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(least(**sections), name="a")
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config, {"mlxft": "0"}), "utf-8")
    again = load_config(file)
    assert again.versions == {"mlxft": "0"}
    assert again.model_copy(update={"versions": None}) == config


def test_settings_do_not_change(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        parse_config(LEAST).tune.rank = 3  # type: ignore[misc]


class Prize(Settings):
    """A section of an objective's own."""

    margin: float = 0.5
    rank: int = 1


@pytest.fixture
def prize(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second objective, `prize`, with a section of its own."""

    def sections(objective: str) -> dict[str, type[Settings]]:
        return {"prize": Prize} if objective == "prize" else {}

    monkeypatch.setattr(config_module, "objectives", lambda: ["sft", "prize"])
    monkeypatch.setattr(config_module, "objectives", lambda: ["sft", "prize"])
    for module in (config_module, config_module):
        monkeypatch.setattr(module, "objective_sections", sections)


@pytest.mark.usefixtures("prize")
def test_an_objective_declares_its_own_sections() -> None:
    config = parse_config({**LEAST, "objective": "prize", "prize": {"margin": 2}})
    assert config.section("prize", Prize).margin == 2.0
    assert parse_config({**LEAST, "objective": "prize"}).section("prize", Prize).margin == 0.5
    assert "prize.margin" in config_module.all_keys(config_class("prize"))
    with pytest.raises(ConfigError, match=r"^config: prize: no such setting for this objective; it belongs to prize$"):
        parse_config({**LEAST, "prize": {"margin": 2}})
    with pytest.raises(ConfigError, match=r"prize\.margn: no such setting \(did you mean prize\.margin\?\)"):
        parse_config({**LEAST, "objective": "prize", "prize": {"margn": 2}})
    with pytest.raises(
        ConfigError, match=r"^config: rank: no such setting \(did you mean tune\.rank or prize\.rank\?\)$"
    ):
        parse_config({**LEAST, "objective": "prize", "rank": 2})


def test_objectives_are_the_files_there_are() -> None:
    assert "sft" in objectives()
    assert not {"base", "functional"} & set(objectives())
    with pytest.raises(ConfigError, match="no such objective 'base'"):
        config_class("base")


def test_a_branch_of_a_union_is_not_named_in_a_message() -> None:
    """pydantic reports each branch: tune.layers.int, tune.layers.list[int] ..."""
    with pytest.raises(ConfigError) as e:
        parse_config(least(tune={"layers": "some", "targets": 5}, data={"valid": [5]}))
    places = [line.split(": ")[1] for line in str(e.value).splitlines()]
    assert sorted(places) == ["data.valid", "tune.layers", "tune.targets"]
    assert str(e.value).count("seen 'some'") == 1


def test_what_is_not_a_mapping() -> None:
    for raw in ([1], "text", 3):
        with pytest.raises(ConfigError, match=f"^config: expected a mapping of settings, found {type(raw).__name__}$"):
            parse_config(raw)


# The learning rate that a recipe leaves out.

RATES = {
    "sft": 2e-5,
    "distill": 2e-5,
    "reward": 1e-5,
    "preference": 1e-6,
    "ppo": 3e-6,
    "grpo": 1e-6,
    "rloo": 1e-6,
    "reinforce": 1e-6,
    "online_dpo": 1e-6,
}


def bare(objective: str, **tune: Any) -> dict[str, Any]:
    return {**LEAST, "objective": objective, "tune": tune}


@pytest.mark.parametrize("objective", objectives())
def test_the_default_rate_is_the_methods(objective: str) -> None:
    """Of full fine-tuning as the field has it, times 10 for what is low-rank; in config.yaml as the number it is."""
    rate = RATES[objective]
    assert parse_config(bare(objective, method="full")).optim.lr == pytest.approx(rate)
    for method in ("lora", "dora"):
        config = parse_config(bare(objective, method=method))
        assert config.optim.lr == float(f"{10 * rate:g}"), "without a tail of nines"
        assert config_class(objective).model_validate(bare(objective, method=method)).optim.lr == config.optim.lr
        written = yaml.safe_load(dump_config(config, {}))
        assert written["optim"]["lr"] == config.optim.lr
        assert parse_config(written | {"tune": {"method": "full"}}).optim.lr == config.optim.lr, "as it ran"
    given = parse_config(bare(objective, method="full") | {"optim": {"lr": 0.5, "name": "muon"}})
    assert given.optim.lr == 0.5
    other = parse_config(bare(objective, method="full") | {"optim": {"name": "muon", "warmup": 3}})
    assert (other.optim.lr, other.optim.warmup) == (pytest.approx(rate), 3)


def test_the_help_says_the_default_rates() -> None:
    said = OptimSettings.model_fields["lr"].description or ""
    for objective, rate in RATES.items():
        own = re.search(rf"\b{objective} (?:and \w+ )?(\S+?),", said)
        stated = own or re.search(r"any other objective (\S+?);", said)
        assert stated is not None
        assert float(stated[1]) == rate, objective
    assert "default" not in Config.model_json_schema()["$defs"]["OptimSettings"]["properties"]["lr"]


def test_min_lr_is_held_against_the_rate_that_counts() -> None:
    """1e-4 is below the default of LoRA, above that of full fine-tuning."""
    optim = {"optim": {"min_lr": 1e-4}}
    assert parse_config(bare("sft", method="lora") | optim).optim.min_lr == 1e-4
    with pytest.raises(ConfigError, match=r"optim: min_lr \(0.0001\) is above lr \(2e-05\)"):
        parse_config(bare("sft", method="full") | optim)
