"""What all pictures share: an empty figure, its look, writing it to a file or into an HTML page.

Of matplotlib (extra `plots`) only its Figure is used: no pyplot, no window.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxft.errors import ConfigError, missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def save(out: Path, make: Callable[[], Figure]) -> Path:
    """Write the figure that `make` draws to `out`, whole or not at all; the same numbers give the same bytes."""
    from mlxft.trainer.files import write_result

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
