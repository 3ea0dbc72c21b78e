"""Pictures: what they show is what the events say, they can be opened, and bad input is refused in words."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlxft.errors import ConfigError, DataError
from mlxft.study.plots import (
    COLOURS,
    INK,
    INLINE_INK,
    curves,
    fewshot_curves,
    figure,
    importance,
    lr_curve,
    panels,
    running_mean,
    svg_panels,
    sweep_history,
)

SFT: list[dict[str, Any]] = [{"event": "start", "step": 0, "objective": "sft", "text": "go"}]
for i in range(1, 7):
    SFT.append(
        {"event": "train", "step": i, "loss": 3 / i, "lr": 1e-3 * i, "grad_norm": 0.5, "tokens_per_s": 90.0}
        | {"trained_tokens_per_s": 30.0, "peak_memory_gb": 1.3, "elapsed_s": 1.0}
    )
SFT.insert(4, {"event": "eval", "step": 3, "loss": 1.25, "best": True, "elapsed_s": 1.0})
SFT.append({"event": "eval", "step": 6, "loss": 1.5, "best": False, "elapsed_s": 2.0})
MARGINS = {"accuracy": 0.5, "margin": 0.1, "rewards_chosen": 0.2, "rewards_rejected": 0.1}
PAIRS: list[dict[str, Any]] = [
    {"event": kind, "step": s, "loss": 0.6, **MARGINS} for s in (1, 2) for kind in ("train", "eval")
]
PPO: list[dict[str, Any]] = []
for i in range(1, 4):
    of_rollout = {"reward": 0.1 * i, "reward/score": 0.1 * i, "kl": 0.2, "entropy": 3.0, "response_tokens": 7.0}
    of_rollout |= {"eos_share": 0.9, "explained_variance": 0.3, "sampling_tokens_per_s": 50.0}
    PPO.append({"event": "rollout", "rollout": i - 1, "step": i, **of_rollout})
    PPO.append({"event": "train", "step": i, "loss": -0.1, "value_loss": 0.4, "critic_grad_norm": 2.0, **of_rollout})
    PPO.append({"event": "eval", "step": i, "loss": -0.3, "win_rate": 0.5, "reward": 0.3, "kl": 0.2, "best": i == 3})


def titles(events: list[dict[str, Any]]) -> list[str]:
    return [panel.title for panel, _ in panels(events)]


def test_only_what_is_there_is_drawn() -> None:
    assert titles(SFT) == ["loss", "learning rate", "gradient norm, before clipping", "speed", "peak memory"]
    assert titles(PAIRS) == ["loss", "accuracy", "margin"]
    wanted = {"reward", "KL to the reference", "win rate against the reference", "completion length", "entropy"}
    wanted |= {"completions ended by EOS", "value loss", "explained variance of the critic", "speed"}
    assert wanted <= set(titles(PPO))
    assert "loss" not in titles(PPO), "a policy's surrogate and what its validation is chosen by are not one thing"


def test_lines_hold_the_numbers_of_the_events() -> None:
    loss = {p.title: lines for p, lines in panels(SFT)}["loss"]
    assert loss == {"training": ([1, 2, 3, 4, 5, 6], [3 / i for i in range(1, 7)]), "validation": ([3, 6], [1.25, 1.5])}
    reward = {p.title: lines for p, lines in panels(PPO)}["reward"]
    # The step repeats its rollout's numbers, and a reward of one part is that part: each is drawn once.
    assert reward == {"training": ([1, 2, 3], [0.1, 0.2, 0.1 * 3]), "validation": ([1, 2, 3], [0.3, 0.3, 0.3])}
    drawn = figure(SFT).axes[0]
    assert [list(line.get_ydata()) for line in drawn.lines] == [loss["training"][1], [1.25, 1.5], [1.25]]
    assert drawn.get_ylabel() == "nats / token"
    assert "best: 1.25" in drawn.get_legend_handles_labels()[1]
    assert all(ax.get_xlabel() == "step" and ax.get_ylabel() for ax in figure(PPO).axes)


def test_numbers_that_are_none_are_gaps() -> None:
    events = [{"event": "train", "step": i, "loss": v} for i, v in enumerate([1.0, "nan", "inf", 2.0])]
    (_, lines), *_ = panels(events)
    assert lines["training"][1][0] == 1.0
    assert math.isnan(lines["training"][1][1])
    assert figure(events).axes
    assert running_mean([2.0, math.nan, 4.0, 6.0], 2) == [2.0, 2.0, 4.0, 5.0]


def test_noise_is_smoothed_and_a_schedule_is_not() -> None:
    events = [{"event": "train", "step": i, "loss": i % 2, "lr": 1 / (i + 1)} for i in range(300)]
    loss, lr = figure(events).axes
    assert len(loss.lines) == 2
    assert max(loss.lines[1].get_ydata()[20:]) - min(loss.lines[1].get_ydata()[20:]) < 0.2
    assert len(lr.lines) == 1


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_are_files_of_their_kind_and_the_same_each_time(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / f"a{suffix}"
    assert curves(SFT, out, title="$x^2$") == [out]
    first = out.read_bytes()
    if suffix == ".png":
        with Image.open(out) as image:
            image.load()
            assert image.width > 900
    elif suffix == ".svg":
        assert ET.fromstring(first).tag.endswith("svg")
    else:
        assert first.startswith(b"%PDF-")
    curves(SFT, out, title="$x^2$")
    assert out.read_bytes() == first
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2, https://www.w3.org/TR/WCAG21/#dfn-relative-luminance)."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_on_light_and_on_dark(colour: str) -> None:
    light, dark, own = luminance("#ffffff"), luminance("#161616"), luminance(colour)
    assert (light + 0.05) / (own + 0.05) >= 3
    assert (own + 0.05) / (dark + 0.05) >= 3


def test_inline_pictures_take_the_colours_of_their_page() -> None:
    parts = svg_panels(SFT)
    assert list(parts) == titles(SFT)
    for title, part in parts.items():
        assert part.startswith("<svg")
        assert 'width="100%"' in part.split(">")[0]
        assert " height=" not in part.split(">")[0]
        assert "currentColor" in part
        for unwanted in (INK, INLINE_INK, "<style", "<?xml", "<metadata", "<script", "white"):
            assert unwanted not in part
        assert title in [e.text for e in ET.fromstring(part).iter()]
        ids = [e.attrib["id"] for e in ET.fromstring(part).iter() if "id" in e.attrib]
        assert all(f"#{name}" in part for name in ids), "an id that nothing refers to may meet another on the page"


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, matplotlib\nfrom mlxft.study.plots import curves, svg_panels\n"
        "def settings():\n    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        f"before = settings()\nevents = {SFT!r}\ncurves(events, pathlib.Path('a.svg'))\nsvg_panels(events)\n"
        "print(settings() == before, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout, done.stderr) == ("True False\n", "")


TRIALS: list[dict[str, Any]] = [
    {"number": 0, "value": 2.0, "state": "complete"},
    {"number": 1, "value": 2.5, "state": "pruned"},
    {"number": 2, "value": None, "state": "failed"},
    {"number": 3, "value": 1.0, "state": "complete"},
    {"number": 4, "value": 1.5, "state": "complete"},
]
TABLE: list[dict[str, Any]] = [
    {"k": 0, "method": "zero-shot", "value": 0.5, "low": 0.4, "high": 0.6},
    {"k": 16, "method": "tuned", "value": 0.8, "low": 0.7, "high": 0.85},
    {"k": "all", "method": "tuned", "value": 0.9, "low": math.nan, "high": math.nan},
]


@pytest.mark.parametrize(
    "draw",
    [
        lambda out: sweep_history(TRIALS, out, metric="accuracy", lower_is_better=False),
        lambda out: importance({"optim.lr": 0.9, "tune.rank": 0.1}, out),
        lambda out: lr_curve([1e-5, 1e-4, 1e-3], [3.0, 2.0, math.inf], 1e-4, out),
        lambda out: lr_curve([1e-5, 1e-4], [3.0, 3.0], None, out),
        lambda out: fewshot_curves(TABLE, out),
    ],
)
def test_other_pictures(draw: Callable[[Path], Path], tmp_path: Path) -> None:
    out = tmp_path / "a.svg"
    assert draw(out) == out
    assert ET.fromstring(out.read_bytes()).tag.endswith("svg")


def lines_of(monkeypatch: pytest.MonkeyPatch, draw: Callable[[Path], Path]) -> dict[str, list[list[float]]]:
    """What a picture draws: label -> [x, y]."""
    import mlxft.study.plots as module

    made: list[Any] = []
    monkeypatch.setattr(module, "_save", lambda fig, out: made.append(fig))
    draw(Path("a.png"))
    return {str(x.get_label()): [list(x.get_xdata()), list(x.get_ydata())] for x in made[0].axes[0].lines}


def test_the_sweeps_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    low = lines_of(monkeypatch, lambda out: sweep_history(TRIALS, out))
    assert low["best so far"] == [[0, 3, 4], [2.0, 1.0, 1.0]]
    assert low["pruned"] == [[1], [2.5]]
    assert low["failed"][0] == [2]
    high = lines_of(monkeypatch, lambda out: sweep_history(TRIALS, out, lower_is_better=False))
    assert high["best so far"][1] == [2.0, 2.0, 2.0]


def test_the_range_test_shows_the_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(monkeypatch, lambda out: lr_curve([1e-5, 1e-4], [3.0, 2.0], 5e-5, out))
    assert lines["suggested: 5e-05"][0] == [5e-5, 5e-5]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    with pytest.raises(DataError, match="no training step or validation has been reported yet"):
        curves(SFT[:1], out)
    for draw in (
        lambda: sweep_history([], out),
        lambda: importance({}, out),
        lambda: lr_curve([1e-5], [math.nan], None, out),
        lambda: fewshot_curves([], out),
    ):
        with pytest.raises(DataError, match="nothing to draw"):
            draw()
    with pytest.raises(ConfigError, match=r"a\.bmp: a picture ends in \.png, \.svg or \.pdf"):
        curves(SFT, tmp_path / "a.bmp")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'mlxft\[plots\]'"):
        curves(SFT, tmp_path / "a.png")
