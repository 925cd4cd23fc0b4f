"""An evaluation as text: a log line and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reidreg.evaluation.figures import FIGURES, blocks, numbers_of

_WIDEST = 12  # cameras that fit side by side on a terminal


def describe_evaluation(figures: Mapping[str, Any], epoch: int, what: str = "evaluation") -> str:
    """A log line of an evaluation of the model of an epoch."""
    when = f"after epoch {epoch}" if epoch else "before training"
    parts = [f"{name} {_listed(block)}".lstrip() for name, block in blocks(figures).items()]
    return f"{what} {when}: {'; '.join(parts)}"


def _listed(block: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:.2%}" for key, value in numbers_of(block).items())


def evaluation_table(figures: Mapping[str, Any]) -> list[str]:
    """An evaluation as lines: figures of all blocks side by side, and what else was computed."""
    lines = [*_figures_table(figures), _query_counts(figures)]
    if figures.get("verification"):
        lines += ["", *_verification_lines(figures["verification"])]
    if figures.get("cameras"):
        lines += ["", *_camera_lines(figures["cameras"])]
    return lines


def _figures_table(figures: Mapping[str, Any]) -> list[str]:
    columns = blocks(figures)
    intervals = any("intervals" in block for block in columns.values())
    rows = [["figure", *(name or "raw" for name in columns)]]
    rows += [
        [key, *(_cell(block, key, intervals) for block in columns.values())]
        for key in FIGURES
        if key in numbers_of(figures)
    ]
    note = ["in brackets: 95 % bootstrap intervals over people"] if intervals else []
    return _aligned(rows) + note


def _cell(block: Mapping[str, Any], key: str, intervals: bool) -> str:
    """A figure in percent with its interval, or with blanks for it where other cells have one."""
    value = numbers_of(block).get(key)
    text = "-" if value is None else f"{value:.2%}"
    ends = block.get("intervals", {}).get(key)
    if ends:
        return f"{text} [{ends[0] * 100:6.2f}, {ends[1] * 100:6.2f}]"
    return text + " " * 17 if intervals else text


def _query_counts(figures: Mapping[str, Any]) -> str:
    """How many queries are counted, and why the others are not."""
    line = (
        f"{figures['num_valid_queries']:,} of {figures['num_queries']:,} queries against "
        f"{figures['num_gallery']:,} gallery images"
    )
    skipped = figures["num_queries"] - figures["num_valid_queries"]
    if not skipped:
        return line
    counts = figures.get("skipped", {})
    reasons = {
        "without an image of their person in the gallery": counts.get("without_gallery"),
        "with images by their own camera alone": counts.get("same_camera_only"),
    }
    listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    return f"{line}; {skipped:,} are not counted: {listed or 'no match'}"


def _verification_lines(verification: Mapping[str, Any]) -> list[str]:
    cosine = verification.get("metric", "cosine") == "cosine"
    what = "a cosine of at least" if cosine else "a squared distance of at most"
    rows = [["FAR", "TAR", "threshold", "DIR", "threshold"]]
    both = zip(verification["tar_at_far"], verification["dir_at_far"], strict=True)
    for pairs, queries in both:
        rows.append(
            [
                f"{pairs['far'] * 100:g} %",
                f"{pairs['tar']:.2%}",
                f"{pairs['threshold']:.4f}",
                f"{queries['dir']:.2%}",
                f"{queries['threshold']:.4f}",
            ]
        )
    return [
        f"verification: EER {verification['eer']:.2%} of {verification['num_genuine']:,} genuine "
        f"and {verification['num_impostor']:,} impostor pairs",
        *_aligned(rows),
        f"the same person at a FAR of {verification['far'] * 100:g} %: {what} "
        f"{verification['threshold']:.4f}",
    ]


def _camera_lines(cameras: Sequence[Mapping[str, Any]]) -> list[str]:
    """The mAP of each pair as a matrix, or, where that is too wide, of the worst pairs."""
    pairs = {(row["query_camera"], row["gallery_camera"]): row for row in cameras}
    queries, galleries = (sorted(set(side)) for side in zip(*pairs, strict=True))
    if len(galleries) > _WIDEST:
        worst = sorted(cameras, key=lambda row: (row["mAP"], row["query_camera"]))[:_WIDEST]
        rows = [["from camera", "to camera", "queries", "mAP", "rank1"]]
        for row in worst:
            ends = f"{row['query_camera']}", f"{row['gallery_camera']}", f"{row['num_queries']:,}"
            rows.append([*ends, f"{row['mAP']:.2%}", f"{row['rank1']:.2%}"])
        return [f"the worst of {len(pairs):,} pairs of cameras", *_aligned(rows)]
    rows = [["from", *map(str, galleries)]]
    for query in queries:
        found = [pairs.get((query, gallery)) for gallery in galleries]
        rows.append([str(query), *(f"{row['mAP']:.2%}" if row else "-" for row in found)])
    return ["mAP from the camera of the query to that of the gallery", *_aligned(rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if nth == 0 else cell.rjust(width)
            for nth, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
