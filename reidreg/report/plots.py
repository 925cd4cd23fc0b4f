"""The curves of a report as PNG pictures, for papers and slides."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reidreg.report.charts import rank_intervals, score_name, shares_of
from reidreg.report.figures import is_number, titled_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT = "#1b1c1f", "#d5d5d1"
_CURVES = (("#1f4e9c", "-"), ("#9a4a00", "--"), ("#6f42a8", ":"))
_GENUINE, _IMPOSTOR = "#1a7f37", "#b3261e"


def draw_cmc(figures: Mapping[str, Any]) -> bytes | None:
    """The CMC curves of the raw and the post-processed figures, as a PNG.

    Returns:
        The bytes, or None if there is no curve.
    """
    curves = {title: block for title, block in titled_blocks(figures).items() if block.get("cmc")}
    if not curves:
        return None
    figure, axes = _canvas("Rank", "Queries matched (%)")
    for number, (title, block) in enumerate(curves.items()):
        colour, line = _CURVES[number % len(_CURVES)]
        percent = [100 * share for share in block["cmc"]]
        axes.plot(range(1, len(percent) + 1), percent, line, color=colour, lw=2, label=title)
        for rank, low, high in rank_intervals(block):
            # Shifted, so that intervals of curves that meet do not overlap.
            place = [rank + 0.25 * number] * 2
            axes.plot(place, [100 * low, 100 * high], color=colour, lw=1, marker="_")
    longest = max(len(block["cmc"]) for block in curves.values())
    axes.set_xlim(0, longest + 1)
    axes.set_ylim(top=100)
    if len(curves) > 1:
        axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def draw_scores(figures: Mapping[str, Any]) -> bytes | None:
    """The score histograms of genuine and impostor pairs, with the threshold, as a PNG.

    Returns:
        The bytes, or None if there are no histograms.
    """
    verification = figures.get("verification", {})
    histogram = verification.get("histogram")
    if not histogram:
        return None
    figure, axes = _canvas(score_name(verification), "Share of pairs (%)")
    for name, colour, line in (("impostor", _IMPOSTOR, "--"), ("genuine", _GENUINE, "-")):
        axes.stairs(
            [100 * share for share in shares_of(histogram[name])],
            histogram["edges"],
            fill=True,
            facecolor=(colour, 0.2),
            edgecolor=colour,
            linestyle=line,
            linewidth=1.5,
            label=f"{name.capitalize()} pairs",
        )
    threshold = verification.get("threshold")
    if is_number(threshold):
        far = verification.get("far")
        at = f" at FAR {far:g}" if is_number(far) else ""
        axes.axvline(threshold, color=_INK, lw=1.2, label=f"Threshold {threshold:.3f}{at}")
    axes.set_ylim(bottom=0)
    figure.legend(frameon=False, loc="outside upper left", ncols=3)
    return _png(figure)


def _canvas(x: str, y: str) -> tuple[Figure, Axes]:
    # Not pyplot, which keeps every figure until it is closed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_FAINT, lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib, so that the same data give the same bytes.
    figure.savefig(buffer, dpi=150, metadata={"Software": None})
    return buffer.getvalue()
