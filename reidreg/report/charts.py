"""Charts as coordinates; the template draws them as SVG, so that they follow its style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reidreg.report.figures import is_number, titled_blocks

WIDTH, HEIGHT, TALL_HEIGHT = 520, 320, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 14, 26, 54
_SCORES = {"cosine": "Cosine similarity", "euclidean": "Squared Euclidean distance"}


@dataclass(frozen=True)
class Axis:
    """A linear axis of a chart.

    Args:
        low: The value at `start`.
        high: The value at `stop`.
        start: The position where it begins, in the chart's units.
        stop: The position where it ends.
    """

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """The position of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, count: int = 5) -> list[tuple[float, float]]:
        """About `count` round values, each with its position."""
        rough = (self.high - self.low) / count
        scale = 10.0 ** math.floor(math.log10(rough))
        steps = [m * scale for m in (1, 2, 5, 10)]
        fitting = next(n for n, step in enumerate(steps) if step >= rough * 0.999)
        # A step may have no multiple on the axis; then the next smaller one has.
        return self._multiples(steps[fitting]) or self._multiples(steps[fitting - 1])

    def _multiples(self, step: float) -> list[tuple[float, float]]:
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(round(n * step, 10), self.at(n * step)) for n in range(first, last + 1)]


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Args:
        name: Its name in the legend.
        style: Its class in the style sheet.
        path: An SVG path.
        points: Points with a tooltip: x, y, text.
        whiskers: Confidence intervals: x, y of the lower end, y of the upper end.
    """

    name: str
    style: str
    path: str
    points: list[tuple[float, float, str]] = field(default_factory=list)
    whiskers: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A chart in coordinates.

    Args:
        size: Width and height, in the chart's units.
        x: The horizontal axis.
        y: The vertical axis.
        x_ticks: Position and text.
        y_ticks: Position and text.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        curves: The lines.
        summary: The chart in a sentence, for screen readers.
        mark: A marked value of x: position and text.
    """

    size: tuple[int, int]
    x: Axis
    y: Axis
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_label: str
    y_label: str
    curves: list[Curve]
    summary: str
    mark: tuple[float, str] | None = None


def cmc_chart(figures: Mapping[str, Any], height: int = HEIGHT) -> Chart | None:
    """The CMC curves of the raw and the post-processed figures, or None if there are none."""
    found = {title: block for title, block in titled_blocks(figures).items() if block.get("cmc")}
    if not found:
        return None
    ranks = max(len(block["cmc"]) for block in found.values())
    ends = [low for block in found.values() for _, low, _ in rank_intervals(block)]
    lowest = min([*ends, *(share for block in found.values() for share in block["cmc"])])
    x = Axis(1, max(ranks, 2), _LEFT, WIDTH - _RIGHT)
    # From the multiple of 10 % below the lowest point, so that good curves can be told apart.
    y = Axis(min(math.floor(lowest * 10) / 10, 0.9), 1, height - _BOTTOM, _TOP)
    curves = [
        Curve(
            name=title,
            style=f"curve-{number % 3}",
            path=_line([(x.at(k), y.at(share)) for k, share in enumerate(block["cmc"], 1)]),
            points=[
                (x.at(k), y.at(share), f"{title}, rank {k}: {share:.1%}")
                for k, share in enumerate(block["cmc"], 1)
            ],
            # Shifted, so that intervals of curves that meet do not overlap.
            whiskers=[
                (x.at(k) + 3 * number, y.at(low), y.at(high))
                for k, low, high in rank_intervals(block)
            ],
        )
        for number, (title, block) in enumerate(found.items())
    ]
    summary = "; ".join(
        f"{title}: {block['cmc'][0]:.1%} at rank 1, {block['cmc'][-1]:.1%} at rank "
        f"{len(block['cmc'])}"
        for title, block in found.items()
    )
    marks = [k for k in (1, 5, 10, 20, 30, 40, 50, 75, 100, 150, 200) if k <= ranks]
    return Chart(
        size=(WIDTH, height),
        x=x,
        y=y,
        x_ticks=[(x.at(k), str(k)) for k in marks],
        y_ticks=[(place, f"{value:.0%}") for value, place in y.ticks()],
        x_label="Rank",
        y_label="Queries matched",
        curves=curves,
        summary=summary,
    )


def rank_intervals(block: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    """The known confidence intervals of a CMC curve: rank, low, high."""
    intervals = block.get("intervals", {})
    return [(k, *intervals[f"rank{k}"]) for k in (1, 5, 10) if intervals.get(f"rank{k}")]


def score_name(verification: Mapping[str, Any]) -> str:
    """The name of the scores, by the metric of the figures."""
    return _SCORES.get(str(verification.get("metric")), "Score")


def score_chart(verification: Mapping[str, Any]) -> Chart | None:
    """The score histograms of genuine and impostor pairs, or None if there are none."""
    label = score_name(verification)
    histogram = verification.get("histogram")
    if not histogram:
        return None
    edges = histogram["edges"]
    shares = {name: shares_of(histogram[name]) for name in ("genuine", "impostor")}
    x = Axis(edges[0], edges[-1], _LEFT, WIDTH - _RIGHT)
    y = Axis(0, max(*shares["genuine"], *shares["impostor"]) or 1.0, HEIGHT - _BOTTOM, _TOP)
    curves = [
        Curve(f"{name.capitalize()} pairs", name, _steps(x, y, edges, shares[name]))
        for name in ("impostor", "genuine")
    ]
    threshold = verification.get("threshold")
    mark = None
    if is_number(threshold) and edges[0] <= threshold <= edges[-1]:
        mark = (x.at(threshold), f"threshold {threshold:.3f}")
    means = {name: _mean(edges, share) for name, share in shares.items()}
    return Chart(
        size=(WIDTH, HEIGHT),
        x=x,
        y=y,
        x_ticks=[(place, f"{value:g}") for value, place in x.ticks(6)],
        y_ticks=[(place, f"{value:.3g}%") for value, place in _percent(y).ticks(4)],
        x_label=label,
        y_label="Share of pairs",
        curves=curves,
        summary=f"{label}: mean {means['genuine']:.2f} of genuine pairs, "
        f"{means['impostor']:.2f} of impostor pairs"
        + (f"; threshold {threshold:.3f}" if is_number(threshold) else ""),
        mark=mark,
    )


def shares_of(counts: Sequence[float]) -> list[float]:
    """Counts as shares of their sum; all zero if the sum is zero."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def _mean(edges: Sequence[float], shares: Sequence[float]) -> float:
    middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    return sum(middle * share for middle, share in zip(middles, shares, strict=True))


def _percent(axis: Axis) -> Axis:
    return Axis(axis.low * 100, axis.high * 100, axis.start, axis.stop)


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _steps(x: Axis, y: Axis, edges: Sequence[float], shares: Sequence[float]) -> str:
    """The closed outline of a histogram, as an SVG path."""
    path = [f"M{x.at(edges[0]):g} {y.at(0):g}"]
    for right, share in zip(edges[1:], shares, strict=True):
        path.append(f"V{y.at(share):g}H{x.at(right):g}")
    return "".join([*path, f"V{y.at(0):g}Z"])
