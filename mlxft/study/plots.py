"""Pictures: the course of a run, a sweep, a range test of the learning rate, few-shot tables.

All take plain lists and dictionaries. They need matplotlib, the extra `plots`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxft.errors import ConfigError, DataError, missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# --- drawing ----------------------------------------------------------------------------------------------------------
# What all pictures share: an empty figure, its look, writing it to a file or into an HTML page.
#
# Of matplotlib (extra `plots`) only its Figure is used: no pyplot, no window.

SUFFIXES = (".png", ".svg", ".pdf")
# Of middle brightness: at least 3:1 against white and against a dark page alike.
COLOURS = ("#2f7ed8", "#d9730d", "#2a9d62", "#b455c9", "#c2413b", "#8a8a00")
INK, INLINE_INK = "#222222", "#010203"  # the second stands for the page's own colour of text, until it is put in


def check_suffix(out: Path) -> Path:
    """`out`, if a picture can be written so.

    Raises:
        ConfigError: it ends otherwise than in .png, .svg or .pdf.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{out}: a picture ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    return out


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches wide and high."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise ConfigError(missing_extra("matplotlib", "plots")) from e
    return Figure(figsize=(width, height), layout="constrained")


def _save(out: Path, make: Callable[[], Figure]) -> Path:
    """Write the figure that `make` draws to `out`, whole or not at all; the same numbers give the same bytes."""
    from mlxft.files import write_result

    fig = make()
    import matplotlib

    kind = out.suffix.lower().removeprefix(".")
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "mlxft"}):
        drawn = io.BytesIO()  # a pipe, to which it may be written, has no way back
        fig.savefig(drawn, format=kind, dpi=130, facecolor="white", metadata=undated)

    def write(path: Path) -> None:
        path.write_bytes(drawn.getvalue())

    write_result(out, write)
    return out


def inline(fig: Figure) -> str:
    """A figure drawn with INLINE_INK as an <svg> element: transparent, as wide as its place, its text and axes in the
    page's own colour (currentColor), without ids that could meet others on the page."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text: small, searchable, sharp. The salt makes the same picture the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mlxft"}):
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Its style element would hold for the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace(INLINE_INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%" stroke-linejoin="round"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    used = set(re.findall(r"#([\w-]+)", text))
    return re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)


def finish(ax: Axes, title: str, x: str, y: str, ink: str) -> None:
    """Labels, thin axes, a faint grid, and a legend where there is more than one line."""
    ax.set_title(title, fontsize=10, color=ink, loc="left")
    ax.set_xlabel(x, fontsize=9, color=ink)
    ax.set_ylabel(y, fontsize=9, color=ink)
    ax.tick_params(colors=ink, labelsize=8)
    for text in (ax.xaxis.get_offset_text(), ax.yaxis.get_offset_text()):
        text.set_color(ink)
        text.set_fontsize(8)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(ink)
    ax.grid(alpha=0.25, linewidth=0.6, color="#888888")
    ax.set_axisbelow(True)
    legend(ax, ink)


def legend(ax: Axes, ink: str) -> None:
    """A legend, where there is more than one line to tell apart."""
    labels = ax.get_legend_handles_labels()[1]
    if len(labels) > 1:
        ax.legend(fontsize=7 if len(labels) > 4 else 8, frameon=False, labelcolor=ink, ncols=1 + (len(labels) > 4))


# --- plots ------------------------------------------------------------------------------------------------------------

_Event = Mapping[str, Any]
LOSS_UNITS = {"sft": "nats / token", "reward": "nats / pair", "preference": "nats / pair"}
SMOOTH_FROM = 150  # points, from which a line is too noisy to read without its running mean


@dataclass(frozen=True)
class Panel:
    """One small picture: which numbers of which events it shows.

    Args:
        keys: a pattern that the whole name of a number matches.
        kinds: of events. On-policy steps repeat their rollout's numbers, hence "rollout" before "train".
        unit: label of the vertical axis.
        share: the numbers lie between 0 and 1.
        amount: zero belongs into the picture.
        noisy: many points are read by their running mean.
    """

    title: str
    keys: str
    unit: str
    kinds: tuple[str, ...] = ("train", "eval")
    share: bool = False
    amount: bool = False
    noisy: bool = True


ROLLOUT = ("rollout", "train", "eval")
LOSS = (Panel("loss", "loss", "loss"),)
# On-policy, the two are not the same thing: a surrogate of one step, and what the kept weights are chosen by.
LOSS_ON_POLICY = (
    Panel("loss of the policy", "loss", "loss", ("train",)),
    Panel("cost of the KL less reward", "loss", "reward", ("eval",)),
)
PANELS = (
    Panel("accuracy", "accuracy", "share of pairs", share=True),
    Panel("margin", "margin|rewards_chosen|rewards_rejected", "reward"),
    Panel("reward", "reward(/.*)?", "reward", ROLLOUT),
    Panel("KL to the reference", "kl", "nats / response", ROLLOUT),
    Panel("win rate against the reference", "win_rate", "share", share=True),
    Panel("response length", "response_tokens", "tokens", ROLLOUT, amount=True),
    Panel("responses ended by EOS", "eos_share", "share", ROLLOUT, share=True),
    Panel("entropy", "entropy", "nats / token", ROLLOUT),
    Panel("value loss", "value_loss", "squared error", ("train",)),
    Panel("explained variance of the critic", "explained_variance", "share", ("rollout",)),
    Panel("ratio clipped", "clip_fraction|value_clip_fraction", "share", ("train",), share=True),
    Panel("KL of a pass (approx.)", "approx_kl", "nats / token", ("train",)),
    Panel("learning rate", r"lr([/._].*)?", "rate", ("train",), noisy=False),
    Panel("gradient norm, before clipping", r"(.*_)?grad_norm", "L2 norm", ("train",)),
    Panel(
        "speed",
        "tokens_per_s|trained_tokens_per_s|sampling_tokens_per_s",
        "tokens / s",
        ("train", "rollout"),
        amount=True,
    ),
    Panel("peak memory", "peak_memory_gb", "GB", ("train",), amount=True, noisy=False),
)
SIDES = ("low", "high")  # of an interval
Series = dict[str, tuple[list[float], list[float]]]  # label -> steps, values


def _number(value: Any) -> float | None:
    """A number of an event; one that is not finite was written as text."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def series(events: Iterable[_Event], panel: Panel) -> Series:
    """What a panel shows: label -> (steps, values). Empty where the run has none of it."""
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    pattern = re.compile(panel.keys)
    for event in events:
        kind = event.get("event")
        if kind not in panel.kinds:
            continue
        for key, value in event.items():
            if pattern.fullmatch(key) and (v := _number(value)) is not None:
                steps, values = found.setdefault((key, kind), ([], []))
                steps.append(float(event.get("step", 0)))
                values.append(v)
    kept: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for (key, kind), line in found.items():
        repeated = line in kept.values() or (kind == "train" and (key, "rollout") in found)
        if any(map(math.isfinite, line[1])) and not repeated:
            kept[key, kind] = line
    several = len({key for key, _ in kept}) > 1
    return {_label(key, kind, several): line for (key, kind), line in kept.items()}


def _label(key: str, kind: str, several: bool) -> str:
    where = "validation" if kind == "eval" else "training"
    name = key.replace("_", " ")
    return f"{name}, {where}" if several and kind == "eval" else name if several else where


def panels(events: Sequence[_Event]) -> list[tuple[Panel, Series]]:
    """The panels that a run has numbers for, in order.

    Raises:
        DataError: it has none.
    """
    losses = LOSS_ON_POLICY if any(e.get("event") == "rollout" for e in events) else LOSS
    found = [(panel, lines) for panel in (*losses, *PANELS) if (lines := series(events, panel))]
    if not found:
        raise DataError("there is nothing to draw: no training step or validation has been reported yet")
    return found


def figure(events: Sequence[_Event], *, title: str = "", columns: int = 2, ink: str = INK) -> Figure:
    """All curves of a run as one matplotlib Figure.

    Args:
        events: of metrics.jsonl; unknown ones are passed over.
        ink: colour of text and axes.
    Raises:
        DataError: nothing to draw.  ConfigError: matplotlib is not installed.
    """
    return _drawn(events, panels(events), title, columns, ink)


def _drawn(events: Sequence[_Event], drawn: list[tuple[Panel, Series]], title: str, columns: int, ink: str) -> Figure:
    objective = next((str(e["objective"]) for e in events if e.get("event") == "start" and "objective" in e), "")
    columns = min(columns, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    fig = new_figure(4.8 * columns, 2.9 * rows + (0.3 if title else 0))
    for i, (panel, lines) in enumerate(drawn):
        ax = fig.add_subplot(rows, columns, i + 1)
        _draw(ax, panel, lines, ink)
        if panel in LOSS:
            ax.set_ylabel(LOSS_UNITS.get(objective, "loss"))
        if panel.keys == "loss" and "eval" in panel.kinds:
            _mark_best(ax, events, ink)
    if title:
        fig.suptitle(title, fontsize=11, color=ink, parse_math=False)
    return fig


def curves(events: Sequence[_Event], out: Path, *, title: str = "", columns: int = 2) -> list[Path]:
    """All curves of a run as one picture.

    Args:
        out: .png, .svg or .pdf; replaced if it is there.
    Returns:
        The files written.
    Raises:
        DataError: nothing to draw.
        ConfigError: another suffix, or matplotlib is not installed.
        CheckpointError: the file can not be written.
    """
    return [_save(check_suffix(out), lambda: figure(events, title=title, columns=columns))]


def overlay(runs: Mapping[str, Sequence[_Event]], out: Path, *, columns: int = 2) -> list[Path]:
    """The curves of several runs in one picture, each number's lines in one panel; see `curves`.

    Args:
        runs: name -> events.
    Raises:
        DataError: a run has nothing to draw.  ConfigError, CheckpointError: as for `curves`.
    """
    merged: dict[str, tuple[Panel, Series]] = {}
    for name, events in runs.items():
        try:
            drawn = panels(events)
        except DataError as e:
            raise DataError(f"{name}: {e}") from e
        for panel, lines in drawn:
            into = merged.setdefault(panel.title, (panel, {}))[1]
            into |= {name if len(lines) == 1 else f"{name}, {label}": line for label, line in lines.items()}
    return [_save(check_suffix(out), lambda: _drawn([], list(merged.values()), "", columns, INK))]


def svg(events: Sequence[_Event], *, columns: int = 1) -> str:
    """All curves of a run as one <svg> element for an HTML page; see `inline`."""
    return inline(figure(events, columns=columns, ink=INLINE_INK))


def svg_panels(events: Sequence[_Event]) -> dict[str, str]:
    """Each curve as an <svg> element of its own, by title, for a page that lays them out; see `inline`."""
    return {panel.title: inline(_drawn(events, [(panel, lines)], "", 1, INLINE_INK)) for panel, lines in panels(events)}


def sweep_history(
    trials: Sequence[Mapping[str, Any]], out: Path, *, metric: str = "loss", lower_is_better: bool = True
) -> Path:
    """What each trial of a sweep reached, and the best so far.

    Args:
        trials: each with `number`, `value` (None if there is none) and `state` (complete, pruned, failed; any case).
    Raises:
        DataError: no trial.  ConfigError, CheckpointError: as for `curves`.
    """
    if not trials:
        raise DataError("there is nothing to draw: the sweep has no trial yet")

    def make() -> Figure:
        fig = new_figure(6.4, 3.6)
        ax = fig.add_subplot()
        done: list[tuple[int, float]] = []
        for state, marker, colour in (("complete", "o", 0), ("pruned", "x", 1)):
            of_state = [t for t in trials if str(t["state"]).lower() == state]
            points = [(int(t["number"]), v) for t in of_state if (v := _number(t.get("value"))) is not None]
            if points:
                ax.plot(*zip(*points), marker, color=COLOURS[colour], label=state)
            done = done or sorted(points)
        failed = [int(t["number"]) for t in trials if str(t["state"]).lower().startswith("fail")]
        if failed:
            base = ax.get_xaxis_transform()
            ax.plot(failed, [0.03] * len(failed), "^", color=COLOURS[4], transform=base, label="failed")
        pick: Callable[[Iterable[float]], float] = min if lower_is_better else max
        best = [(n, pick(v for _, v in done[: i + 1])) for i, (n, _) in enumerate(done)]
        if best:
            ax.step(*zip(*best), where="post", color=COLOURS[2], label="best so far")
        ax.locator_params(axis="x", integer=True)
        finish(ax, "trials", "trial", metric, INK)
        return fig

    return _save(check_suffix(out), make)


def importance(shares: Mapping[str, float], out: Path, *, metric: str = "loss") -> Path:
    """How much each setting of a sweep matters, as bars.

    Args:
        shares: setting -> its share, as Optuna's importances give it.
    Raises:
        DataError: no setting.  ConfigError, CheckpointError: as for `curves`.
    """
    if not shares:
        raise DataError("there is nothing to draw: no setting was varied")

    def make() -> Figure:
        ranked = sorted(shares.items(), key=lambda item: item[1])
        fig = new_figure(6.4, 1.2 + 0.35 * len(ranked))
        ax = fig.add_subplot()
        bars = ax.barh([name for name, _ in ranked], [share for _, share in ranked], color=COLOURS[0])
        ax.bar_label(bars, fmt="%.2f", padding=3, color=INK, fontsize=8)
        ax.set_xlim(0, 1.1 * max(1e-9, ranked[-1][1]))
        finish(ax, "what matters", f"share of the spread of {metric}", "", INK)
        return fig

    return _save(check_suffix(out), make)


def lr_curve(rates: Sequence[float], losses: Sequence[float], suggestion: float | None, out: Path) -> Path:
    """The range test of the learning rate: loss over rate (log scale), and the suggested one.

    Raises:
        DataError: no finite loss.  ConfigError, CheckpointError: as for `curves`.
    """
    finite = [(r, v) for r, v in zip(rates, losses) if math.isfinite(v)]
    if not finite:
        raise DataError("there is nothing to draw: no loss of the range test is finite")

    def make() -> Figure:
        fig = new_figure(6.4, 3.6)
        ax = fig.add_subplot()
        ax.plot(*zip(*finite), color=COLOURS[0], label="loss")
        ax.set_xscale("log")
        # After the loss has run away its height would flatten all that matters.
        first, low = finite[0][1], min(v for _, v in finite)
        span = max(first - low, 1e-3)
        ax.set_ylim(low - 0.1 * span, max(min(max(v for _, v in finite), first + 2 * span), first) + 0.1 * span)
        if suggestion is not None:
            ax.axvline(suggestion, color=COLOURS[1], linestyle="--", label=f"suggested: {suggestion:.2g}")
        finish(ax, "range test", "learning rate", "training loss", INK)
        return fig

    return _save(check_suffix(out), make)


def fewshot_curves(table: Sequence[Mapping[str, Any]], out: Path, *, metric: str = "accuracy") -> Path:
    """A few-shot table: one line a method over the number of examples, with intervals.

    Args:
        table: rows with `k` (a number, or a word such as "all", which stands last), `method`, `value`, and `low` and
            `high` where there is an interval.
    Raises:
        DataError: no row.  ConfigError, CheckpointError: as for `curves`.
    """
    if not table:
        raise DataError("there is nothing to draw: the table is empty")
    words = list(dict.fromkeys(row["k"] for row in table if isinstance(row["k"], str)))
    ks = [*sorted({row["k"] for row in table if not isinstance(row["k"], str)}), *words]

    def make() -> Figure:
        fig = new_figure(6.4, 3.8)
        ax = fig.add_subplot()
        methods = list(dict.fromkeys(str(row["method"]) for row in table))
        for i, method in enumerate(methods):
            rows = sorted((r for r in table if str(r["method"]) == method), key=lambda r: ks.index(r["k"]))
            # A little aside of each other, so that intervals at one k can be told apart.
            at = [ks.index(r["k"]) + 0.06 * (i - (len(methods) - 1) / 2) for r in rows]
            value = [float(r["value"]) for r in rows]
            low, high = ([float(v if (v := r.get(side)) is not None else r["value"]) for r in rows] for side in SIDES)
            error = [[v - w for v, w in zip(value, low)], [w - v for v, w in zip(value, high)]]
            ax.errorbar(
                at, value, error, color=COLOURS[i % len(COLOURS)], marker="o", markersize=4, capsize=3, label=method
            )
        ax.set_xticks(range(len(ks)), [str(k) for k in ks])
        finish(ax, "few-shot", "examples (k)", metric, INK)
        return fig

    return _save(check_suffix(out), make)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those up to `window - 1` before it; what is not finite is left out."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _draw(ax: Axes, panel: Panel, lines: Series, ink: str) -> None:
    names = list(dict.fromkeys(label.removesuffix(", validation") for label in lines))
    for label, (steps, values) in lines.items():
        name = label.removesuffix(", validation")
        colour, style = COLOURS[names.index(name) % len(COLOURS)], "-" if name == label else "--"
        noisy = panel.noisy and len(values) >= SMOOTH_FROM
        marker = "o" if len(values) <= 25 else None
        faint, own = (0.3, None) if noisy else (1.0, label)
        ax.plot(steps, values, style, color=colour, alpha=faint, marker=marker, markersize=3, linewidth=1.4, label=own)
        if noisy:
            smooth = running_mean(values, len(values) // 30)
            ax.plot(steps, smooth, style, color=colour, linewidth=1.6, label=f"{label} (running mean)")
    if panel.share:
        ax.set_ylim(-0.03, 1.03)
    elif panel.amount:
        ax.set_ylim(0, 1.1 * max((v for _, values in lines.values() for v in values if math.isfinite(v)), default=1))
    ax.locator_params(axis="x", integer=True)
    finish(ax, panel.title, "step", panel.unit, ink)


def _mark_best(ax: Axes, events: Sequence[_Event], ink: str) -> None:
    """A ring round the validation whose weights were kept."""
    best = [
        e for e in events if e.get("event") == "eval" and e.get("best") is True and _number(e.get("loss")) is not None
    ]
    if best:
        step, loss = best[-1]["step"], float(best[-1]["loss"])
        ax.plot([step], [loss], "o", markersize=9, fillstyle="none", color=ink, label=f"best: {loss:.4g}")
        legend(ax, ink)
