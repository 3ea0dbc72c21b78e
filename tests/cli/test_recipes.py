"""mlxft recipes and mlxft completion: what a user gets without the clone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxft.config import load_config
from mlxft.demo.recipes import recipe_names

CONFIGS = Path(__file__).parents[2] / "configs"
Command = Callable[..., Any]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, which is the home folder, too."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_all_recipes_are_listed(mlxft: Command) -> None:
    assert set(recipe_names()) == {path.stem for path in CONFIGS.glob("*.yaml")}
    assert all(20 < len(about) < 150 for about in recipe_names().values())
    done = mlxft("recipes")
    assert done.code == 0
    assert all(name in done.out for name in recipe_names())


def test_a_copy_works_without_the_clone(empty: Path, mlxft: Command) -> None:
    for name in recipe_names():
        assert mlxft("recipes", "copy", name, f"mine/{name}.yaml").code == 0
        text = (empty / "mine" / f"{name}.yaml").read_text()
        assert "configs/" not in text
        assert "mlxft/demo" not in text
        settings = yaml.safe_load(text)
        if not name.startswith("eval-") and name != "label":
            load_config(Path(f"mine/{name}.yaml"))
        named = {**settings.get("data", {}), **settings.get("rewards", {})}
        for file in (named.get("train"), named.get("valid"), named.get("function", "").partition(":")[0]):
            assert not str(file).startswith("mine/") or (empty / file).is_file()
    assert {"rows.jsonl", "valid.jsonl", "pairs.jsonl", "rewards.py"} <= {path.name for path in Path("mine").iterdir()}


def test_a_copy_replaces_nothing_of_the_users(empty: Path, mlxft: Command) -> None:
    assert mlxft("recipes", "copy", "sft-lora").out == "wrote sft-lora.yaml, rows.jsonl\n"
    assert mlxft("recipes", "copy", "sft-dora").code == 0, "the rows are the same"
    Path("rows.jsonl").write_text("mine")
    Path("sft-full.yaml").write_text("mine")
    done = mlxft("recipes", "copy", "sft-full")
    assert (done.code, "exists already" in done.err) == (2, True)
    assert Path("rows.jsonl").read_text() == Path("sft-full.yaml").read_text() == "mine"
    assert mlxft("recipes", "copy", "configs/sft-full.yaml", "--overwrite").code == 0
    assert "did you mean sft-lora" in mlxft("recipes", "copy", "sft-loar").err
    assert "mlxft recipes copy dpo-lora writes it" in mlxft("train", "configs/dpo-lora.yaml").err


@pytest.mark.parametrize(
    ("shell", "file", "start"),
    [
        ("zsh", ".config/mlxft/completion.zsh", ".zshrc"),
        ("bash", ".config/mlxft/completion.bash", ".bashrc"),
        ("fish", ".config/fish/completions/mlxft.fish", None),
    ],
)
def test_completion_is_installed_once(
    shell: str, file: str, start: str | None, empty: Path, mlxft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    if start:
        (empty / start).write_text("alias l=ls")  # without an end of line
    assert mlxft("completion", shell, "--install").code == 0
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    again = mlxft("completion", "--install")
    assert again.code == 0
    assert mlxft("completion").out.strip() == (empty / file).read_text().strip()
    assert "_MLXFT_COMPLETE" in (empty / file).read_text()
    assert {"zsh": "-S ''", "bash": "nospace", "fish": ""}[shell] in (empty / file).read_text()  # after KEY=
    if start:
        assert "reads it already" in again.out
        lines = (empty / start).read_text().splitlines()
        assert (lines[0], len(lines)) == ("alias l=ls", 2)
        assert lines[1].endswith(f"source {empty / file}")
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert "give one of zsh, bash, fish" in mlxft("completion").err
