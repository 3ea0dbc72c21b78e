"""examples/: both loops run as a user runs them, learn, and are made of public names only."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

import mlxft
from mlxft.cli import cli

FOLDER = Path(__file__).parents[1] / "examples"
FILES = sorted(FOLDER.glob("*.py"))
MOST_LINES = 150
# A loop of rewards needs a base whose logits can become sure of a token, which the tiny one's width does not allow.
RL = ("--steps", "12", "--prompts", "4", "--group", "16", "--max-tokens", "6", "--lr", "1e-2")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, make_model_dir: Callable[..., Path]) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "wide", hidden_size=128, intermediate_size=128)


def run(name: str, *arguments: object) -> str:
    """What an example prints."""
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str, name: str) -> list[float]:
    return [float(found) for found in re.findall(rf"\b{name} (-?[\d.]+)", text)]


def test_sft_learns(wide: Path, tmp_path: Path) -> None:
    said = run("sft_loop.py", "--model", wide, "--out", tmp_path / "a", "--steps", "12", "--lr", "5e-3")
    losses, valid = numbers(said, r"step \d+ loss"), numbers(said, "validation loss")
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    assert valid[-1] < 0.9 * valid[0]
    assert all(speed > 0 for speed in numbers(said, r"norm [\d.]+"))
    assert "Where do visitors park?" in said
    shown = CliRunner().invoke(cli, ["generate", "--model", str(tmp_path / "a"), "--max-tokens", "4", "Who?"])
    assert shown.exit_code == 0, shown.output


def test_sft_takes_rows_of_a_file_and_four_bits(wide: Path, tmp_path: Path) -> None:
    rows = FOLDER.parent / "mlxft/demo/rows.jsonl"
    said = run("sft_loop.py", "--model", wide, "--out", tmp_path / "a", "--steps", "2", "--data", rows, "--bits", "4")
    assert "123 rows, 13 held out" in said
    assert mlxft.load(tmp_path / "a").config["quantization"]["bits"] == 4


def test_rl_learns(wide: Path, tmp_path: Path) -> None:
    said = run("rl_loop.py", "--model", wide, "--out", tmp_path / "a", *RL)
    rewards = numbers(said, "reward")
    assert len(rewards) == 12
    assert rewards[0] < 0.04
    assert sum(rewards[-3:]) / 3 > 0.12
    assert numbers(said, "kl")[-1] > numbers(said, "kl")[0] > 0, "the policy leaves the base"
    assert all(0.3 < ratio < 3 for ratio in numbers(said, "ratio"))
    shown = CliRunner().invoke(cli, ["generate", "--model", str(tmp_path / "a"), "--max-tokens", "4", "Who?"])
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize("name", ["sft_loop.py", "rl_loop.py"])
def test_what_is_saved_is_what_was_trained(
    name: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    save = mlxft.save_adapter

    def watched(model: Any, folder: Any, **options: Any) -> Path:
        trained.append(model)
        return save(model, folder, **options)

    monkeypatch.setattr(mlxft, "save_adapter", watched)
    arguments = ["--model", str(tiny_model_dir), "--out", str(tmp_path / "a"), "--steps", "2", "--lr", "1e-2"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    ids = mx.array([[5, 6, 7, 8]])
    (model,) = trained
    model.model.eval()
    expected = model.model(ids)
    assert mx.array_equal(mlxft.load(tmp_path / "a").model(ids), expected).item()
    assert not mx.allclose(mlxft.load(str(tiny_model_dir)).model(ids), expected, atol=1e-3).item()


@pytest.mark.slow
def test_sft_on_a_real_model(tmp_path: Path) -> None:
    arguments = ("--out", tmp_path / "a", "--steps", "3", "--accumulate", "1", "--tokens", "160")
    before, after = numbers(run("sft_loop.py", "--model", "smollm2-135m", *arguments), "validation loss")
    assert after < 0.9 * before


# --- what they are made of --------------------------------------------------------------------------------------------


def private_uses(source: str) -> Iterator[str]:
    """Yield what a loop takes from mlxft that is not public, and imports of what is neither mlx, numpy nor standard."""
    allowed = {"mlxft", "mlx", "numpy", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (n for n in names if n.split(".")[0] not in allowed or n.startswith("mlxft."))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] not in allowed or module.startswith("mlxft."):
                yield module
            elif module == "mlxft":
                yield from (alias.name for alias in node.names if alias.name not in mlxft.__all__)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            yield node.attr
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mlxft" and node.attr not in mlxft.__all__:
            yield f"mlxft.{node.attr}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import mlxft.model.load", ["mlxft.model.load"]),
        ("from mlxft.model.load import load", ["mlxft.model.load"]),
        ("from mlxft import api", ["api"]),
        ("import mlxft\nmlxft.api", ["mlxft.api"]),
        ("import torch", ["torch"]),
        ("import mlxft\nmlxft.load('a')._x", ["_x"]),
        ("import mlx.core as mx\nimport numpy\nimport mlxft\nmlxft.functional.kl", []),
    ],
)
def test_the_check_sees_private_uses(source: str, found: list[str]) -> None:
    assert list(private_uses(source)) == found


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_examples_are_short_and_public(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= MOST_LINES
    assert list(private_uses(text)) == []
    assert "mlxft." in text


def test_both_examples_are_there() -> None:
    assert [path.name for path in FILES] == ["rl_loop.py", "sft_loop.py"]
