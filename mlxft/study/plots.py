"""Plot the curves of runs, a sweep, a learning-rate range test or a few-shot table, from plain lists and mappings.

Only matplotlib's Figure is used (the extra `plots`): no pyplot, no window.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxft.errors import ConfigError, DataError, missing_extra
from mlxft.text import VALUE, with_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# --- drawing ----------------------------------------------------------------------------------------------------------
# What all plots share: an empty figure, its style, and writing it to a file or into an HTML page.

# Medium brightness: the contrast is at least 3:1 against white and against a dark page.
COLOURS = ("#2f7ed8", "#d9730d", "#2a9d62", "#b455c9", "#c2413b", "#8a8a00")
INK, INLINE_INK = "#222222", "#010203"  # the second is a placeholder for the text colour of an HTML page


def check_suffix(out: Path) -> Path:
    """Return `out`; raise a ConfigError if its suffix is not .png, .svg or .pdf."""
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{out}: a picture ends in .png, .svg or .pdf")
    return out


def _new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; width and height are in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise ConfigError(missing_extra("matplotlib", "plots")) from e
    return Figure(figsize=(width, height), layout="constrained")


def _save(fig: Figure, out: Path) -> None:
    """Write a figure completely or not at all; the same numbers give the same bytes."""
    import matplotlib

    from mlxft.files import write_result

    kind = check_suffix(out).suffix.lower().removeprefix(".")
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    drawn = io.BytesIO()  # `out` may be a pipe, in which matplotlib cannot seek
    with matplotlib.rc_context({"svg.hashsalt": "mlxft"}):
        fig.savefig(drawn, format=kind, dpi=130, facecolor="white", metadata=undated)

    def write(path: Path) -> None:
        path.write_bytes(drawn.getvalue())

    write_result(out, write)


@contextmanager
def _picture(out: Path, title: str, x: str, y: str, height: float = 3.6) -> Iterator[Axes]:
    """Yield empty axes; at the end, style them, label x and y, and write the picture."""
    fig = _new_figure(6.4, height)
    ax = fig.add_subplot()
    yield ax
    _finish(ax, title, x, y, INK)
    _save(fig, out)


def _inline(fig: Figure) -> str:
    """Return a figure drawn with INLINE_INK as an <svg> element.

    It is transparent and as wide as its place on the page; text and axes have the page's text colour (currentColor),
    and it keeps no id that could clash with others on the page.
    """
    import matplotlib

    buffer = io.StringIO()
    # Text stays text: small, searchable, sharp. With the salt, the same picture has the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mlxft"}):
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Its style element would apply to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace(INLINE_INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%" stroke-linejoin="round"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    used = set(re.findall(r"#([\w-]+)", text))
    return re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)


def _finish(ax: Axes, title: str, x: str, y: str, ink: str) -> None:
    """Add labels, thin axes, a faint grid, and a legend if there are several lines."""
    ax.set_title(title, fontsize=10, color=ink, loc="left")
    ax.set_xlabel(x, fontsize=9, color=ink)
    ax.set_ylabel(y, fontsize=9, color=ink)
    ax.tick_params(colors=ink, labelsize=8)
    for text in (ax.xaxis.get_offset_text(), ax.yaxis.get_offset_text()):
        text.set(color=ink, fontsize=8)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(ink)
    ax.grid(alpha=0.25, linewidth=0.6, color="#888888")
    ax.set_axisbelow(True)
    _legend(ax, ink)


def _legend(ax: Axes, ink: str) -> None:
    labels = ax.get_legend_handles_labels()[1]
    if len(labels) > 1:
        ax.legend(fontsize=7 if len(labels) > 4 else 8, frameon=False, labelcolor=ink, ncols=1 + (len(labels) > 4))


# --- curves of runs ---------------------------------------------------------------------------------------------------

_Event = Mapping[str, Any]
LOSS_UNITS = {"sft": "nats / token", "reward": "nats / pair", "preference": "nats / pair"}
SMOOTH_FROM = 150  # points; with more, a line is too noisy to read without its running mean


@dataclass(frozen=True)
class Panel:
    """One plot of a run: the metrics and events that it shows.

    Attributes:
        keys: regular expression that matches the whole name of a metric.
        kinds: kinds of events. On-policy steps repeat their rollout's numbers, hence "rollout" before "train".
        unit: label of the y axis.
        share: the numbers are between 0 and 1.
        amount: the y axis starts at zero.
        noisy: a long line also gets its running mean.
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
# On-policy, these two differ: training minimises a surrogate, and validation selects the weights to keep.
LOSS_ON_POLICY = (
    Panel("loss of the policy", "loss", "loss", ("train",)),
    Panel("reward less KL cost", VALUE, "reward", ("eval",)),
)
SPEEDS = "tokens_per_s|trained_tokens_per_s|sampling_tokens_per_s"
PANELS = (
    Panel("accuracy", "accuracy", "share of pairs", share=True),
    Panel("margin", "margin|rewards_chosen|rewards_rejected", "reward"),
    Panel("reward", "reward(/.*)?", "reward", ROLLOUT),
    Panel("KL to the reference", "kl", "nats / completion", ROLLOUT),
    Panel("win rate against the reference", "win_rate", "share", share=True),
    Panel("completion length", "response_tokens", "tokens", ROLLOUT, amount=True),
    Panel("completions ended by EOS", "eos_share", "share", ROLLOUT, share=True),
    Panel("entropy", "entropy", "nats / token", ROLLOUT),
    Panel("value loss", "value_loss", "squared error", ("train",)),
    Panel("explained variance of the critic", "explained_variance", "share", ("rollout",)),
    Panel("ratio clipped", "clip_fraction|value_clip_fraction", "share", ("train",), share=True),
    Panel("KL to the sampling policy (approx.)", "approx_kl", "nats / token", ("train",)),
    Panel("learning rate", r"lr([/._].*)?", "rate", ("train",), noisy=False),
    Panel("gradient norm, before clipping", r"(.*_)?grad_norm", "L2 norm", ("train",)),
    Panel("speed", SPEEDS, "tokens / s", ("train", "rollout"), amount=True),
    Panel("peak memory", "peak_memory_gb", "GB", ("train",), amount=True, noisy=False),
)
_Line = tuple[list[float], list[float]]  # steps, values
Series = dict[str, _Line]  # by label


def _number(value: Any) -> float | None:
    """Return an event's number; a number that is not finite was written as text."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _series(events: Iterable[_Event], panel: Panel) -> Series:
    """Return a panel's lines; empty if the run has none of its metrics."""
    found: dict[tuple[str, str], _Line] = {}
    for event in events:
        kind = event.get("event")
        if kind not in panel.kinds:
            continue
        for key, value in event.items():
            if re.fullmatch(panel.keys, key) and (v := _number(value)) is not None:
                steps, values = found.setdefault((key, kind), ([], []))
                steps.append(float(event.get("step", 0)))
                values.append(v)
    kept: dict[tuple[str, str], _Line] = {}
    for (key, kind), line in found.items():
        repeated = line in kept.values() or (kind == "train" and (key, "rollout") in found)
        if any(map(math.isfinite, line[1])) and not repeated:
            kept[key, kind] = line
    if len({key for key, _ in kept}) < 2:
        return {"validation" if kind == "eval" else "training": line for (_, kind), line in kept.items()}
    return {key.replace("_", " ") + ", validation" * (kind == "eval"): line for (key, kind), line in kept.items()}


def panels(events: Sequence[_Event]) -> list[tuple[Panel, Series]]:
    """Return the panels that a run has numbers for, with their lines; raise a DataError if it has none."""
    events = [with_value(e) for e in events]
    losses = LOSS_ON_POLICY if any(e.get("event") == "rollout" for e in events) else LOSS
    found = [(panel, lines) for panel in (*losses, *PANELS) if (lines := _series(events, panel))]
    if not found:
        raise DataError("there is nothing to draw: no training step or validation has been reported yet")
    return found


def figure(
    events: Sequence[_Event], drawn: list[tuple[Panel, Series]] | None = None, *, title: str = "", ink: str = INK
) -> Figure:
    """Draw the curves of a run as one matplotlib Figure with two columns.

    Args:
        events: lines of metrics.jsonl; unknown ones are ignored.
        drawn: the panels to draw (default: all that the run has).
        ink: colour of text and axes.
    Raises:
        DataError: there is nothing to draw.  ConfigError: matplotlib is not installed.
    """
    drawn = panels(events) if drawn is None else drawn
    objective = next((str(e["objective"]) for e in events if e.get("event") == "start" and "objective" in e), "")
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    fig = _new_figure(4.8 * columns, 2.9 * rows + (0.3 if title else 0))
    for i, (panel, lines) in enumerate(drawn):
        ax = fig.add_subplot(rows, columns, i + 1)
        _draw_panel(ax, panel, lines, ink)
        if panel in LOSS:
            ax.set_ylabel(LOSS_UNITS.get(objective, "loss"))
        if panel.keys in ("loss", VALUE) and "eval" in panel.kinds:
            _mark_best(ax, events, panel.keys, ink)
    if title:
        fig.suptitle(title, fontsize=11, color=ink, parse_math=False)
    return fig


def curves(events: Sequence[_Event], out: Path, *, title: str = "") -> list[Path]:
    """Plot all curves of a run into one file, and return the files written.

    Args:
        out: a .png, .svg or .pdf file; it is replaced if it exists.
    Raises:
        DataError: there is nothing to draw.
        ConfigError: `out` has another suffix, or matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    _save(figure(events, title=title), out)
    return [out]


def overlay(runs: Mapping[str, Sequence[_Event]], out: Path) -> list[Path]:
    """Plot the curves of several runs, given by name, into one file; raise the errors of `curves`."""
    _save(figure([], overlaid(runs)), out)
    return [out]


def overlaid(runs: Mapping[str, Sequence[_Event]]) -> list[tuple[Panel, Series]]:
    """Return the panels of several runs, given by name, each with the lines of all; raise a DataError as `panels`."""
    merged: dict[str, tuple[Panel, Series]] = {}
    for name, events in runs.items():
        try:
            drawn = panels(events)
        except DataError as e:
            raise DataError(f"{name}: {e}") from e
        for panel, lines in drawn:
            into = merged.setdefault(panel.title, (panel, {}))[1]
            into |= {name if len(lines) == 1 else f"{name}, {label}": line for label, line in lines.items()}
    return list(merged.values())


def svg_panels(events: Sequence[_Event]) -> dict[str, str]:
    """Return each curve as an <svg> element of its own for an HTML page, by title."""
    return {panel.title: _inline(figure(events, [(panel, lines)], ink=INLINE_INK)) for panel, lines in panels(events)}


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the `window - 1` values before it, without those that are not finite."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _draw_panel(ax: Axes, panel: Panel, lines: Series, ink: str) -> None:
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
    _finish(ax, panel.title, "step", panel.unit, ink)


def _mark_best(ax: Axes, events: Sequence[_Event], key: str, ink: str) -> None:
    """Draw a ring round the validation whose weights were kept."""
    best = [e for e in events if e.get("event") == "eval" and e.get("best") is True]
    if best and (value := _number(with_value(best[-1]).get(key))) is not None:
        ax.plot([best[-1]["step"]], [value], "o", markersize=9, fillstyle="none", color=ink, label=f"best: {value:.4g}")
        _legend(ax, ink)


# --- other plots ------------------------------------------------------------------------------------------------------
# Each raises DataError if there is nothing to draw, and otherwise what `curves` does.


def sweep_history(
    trials: Sequence[Mapping[str, Any]], out: Path, *, metric: str = "loss", lower_is_better: bool = True
) -> Path:
    """Plot the value of each trial of a sweep, and the best so far.

    Args:
        trials: each with `number`, `value` (may be None) and `state`: complete, pruned or failed.
    """
    if not trials:
        raise DataError("there is nothing to draw: the sweep has no trial yet")
    with _picture(out, "trials", "trial", metric) as ax:
        done, pruned = ([(t["number"], t["value"]) for t in trials if t["state"] == s] for s in ("complete", "pruned"))
        for points, marker, colour, label in ((done, "o", COLOURS[0], "complete"), (pruned, "x", COLOURS[1], "pruned")):
            if points:
                ax.plot(*zip(*points), marker, color=colour, label=label)
        if failed := [t["number"] for t in trials if t["state"] == "failed"]:
            base = ax.get_xaxis_transform()
            ax.plot(failed, [0.03] * len(failed), "^", color=COLOURS[4], transform=base, label="failed")
        if done:
            numbers, values = zip(*sorted(done), strict=True)
            best = list(accumulate(values, min if lower_is_better else max))
            ax.step(numbers, best, where="post", color=COLOURS[2], label="best so far")
        ax.locator_params(axis="x", integer=True)
    return out


def importance(shares: Mapping[str, float], out: Path, *, metric: str = "loss") -> Path:
    """Plot how much each setting of a sweep matters, as bars.

    Args:
        shares: share of each setting, as Optuna's importances give it.
    """
    if not shares:
        raise DataError("there is nothing to draw: no setting was varied")
    ranked = sorted(shares.items(), key=lambda item: item[1])
    title, x = "importance of settings", f"share of the spread of {metric}"
    with _picture(out, title, x, "", height=1.2 + 0.35 * len(ranked)) as ax:
        bars = ax.barh([name for name, _ in ranked], [share for _, share in ranked], color=COLOURS[0])
        ax.bar_label(bars, fmt="%.2f", padding=3, color=INK, fontsize=8)
        ax.set_xlim(0, 1.1 * max(1e-9, ranked[-1][1]))
    return out


def lr_curve(rates: Sequence[float], losses: Sequence[float], suggestion: float | None, out: Path) -> Path:
    """Plot a learning-rate range test: the loss over the rate (log scale), and the suggested rate."""
    finite = [(r, v) for r, v in zip(rates, losses) if math.isfinite(v)]
    if not finite:
        raise DataError("there is nothing to draw: no loss of the range test is finite")
    with _picture(out, "range test", "learning rate", "training loss") as ax:
        ax.plot(*zip(*finite), color=COLOURS[0], label="loss")
        ax.set_xscale("log")
        # At full height, the losses after divergence would flatten the rest of the curve.
        first, low, high = finite[0][1], min(v for _, v in finite), max(v for _, v in finite)
        span = max(first - low, 1e-3)
        ax.set_ylim(low - 0.1 * span, max(min(high, first + 2 * span), first) + 0.1 * span)
        if suggestion is not None:
            ax.axvline(suggestion, color=COLOURS[1], linestyle="--", label=f"suggested: {suggestion:.2g}")
    return out


def fewshot_curves(table: Sequence[Mapping[str, Any]], out: Path, *, metric: str = "accuracy") -> Path:
    """Plot a few-shot table: one line per method over the number of examples, with intervals.

    Args:
        table: rows with `k` (a number, or "all", which is drawn last), `method`, `value`, `low` and `high`.
    """
    if not table:
        raise DataError("there is nothing to draw: the table is empty")
    ks = sorted({row["k"] for row in table}, key=lambda k: math.inf if isinstance(k, str) else k)
    methods = list(dict.fromkeys(row["method"] for row in table))
    with _picture(out, "few-shot", "examples (k)", metric, height=3.8) as ax:
        for i, (method, colour) in enumerate(zip(methods, COLOURS)):
            rows = sorted((r for r in table if r["method"] == method), key=lambda r: ks.index(r["k"]))
            # Shift the methods sideways, so that intervals at the same k do not overlap.
            at = [ks.index(r["k"]) + 0.06 * (i - (len(methods) - 1) / 2) for r in rows]
            error = [[r["value"] - r["low"] for r in rows], [r["high"] - r["value"] for r in rows]]
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "capsize": 3}
            ax.errorbar(at, [r["value"] for r in rows], error, label=method, **style)
        ax.set_xticks(range(len(ks)), [str(k) for k in ks])
    return out
