"""An evaluation in words: a log line, a table, and the figures of the metrics log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = ("mAP", "mINP", "rank1", "rank5", "rank10")
_WIDEST = 12  # cameras that fit side by side on a terminal


def describe_evaluation(figures: Mapping[str, Any], epoch: int, what: str = "evaluation") -> str:
    """A log line of an evaluation of the model of an epoch."""
    when = f"after epoch {epoch}" if epoch else "before training"
    blocks = _blocks(figures).items()
    parts = [f"{name.rstrip('/')} {_in_words(block)}".lstrip() for name, block in blocks]
    return f"{what} {when}: {'; '.join(parts)}"


def _in_words(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {figures[key]:.2%}" for key in FIGURES if key in figures)


def log_figures(prefix: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's figures under the keys of metrics.jsonl and W&B.

    Args:
        prefix: `val`, or `test` for what is evaluated once, at the end.
        figures: What the evaluator gave.
    """
    found = {
        f"{prefix}/{name}{key}": block[key]
        for name, block in _blocks(figures).items()
        for key in FIGURES
        if key in block
    }
    verification = figures.get("verification")
    if verification:
        found[f"{prefix}/eer"] = verification["eer"]
        for kind in ("tar", "dir"):
            for entry in verification[f"{kind}_at_far"]:
                found[f"{prefix}/{kind}_at_far_{entry['far']:g}"] = entry[kind]
    return found


def _blocks(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The raw figures and the post-processed ones, under `name/`; the raw ones under nothing."""
    blocks = {
        f"{name}/": block
        for name, block in figures.items()
        if isinstance(block, Mapping) and isinstance(block.get("mAP"), float)
    }
    return {"": figures, **blocks}


def evaluation_table(figures: Mapping[str, Any]) -> list[str]:
    """An evaluation's figures as a table: raw and post-processed side by side, and what else."""
    lines = [*_figures_table(figures), _counted(figures)]
    if figures.get("verification"):
        lines += ["", *_verification_lines(figures["verification"])]
    if figures.get("cameras"):
        lines += ["", *_camera_lines(figures["cameras"])]
    return lines


def _figures_table(figures: Mapping[str, Any]) -> list[str]:
    blocks = _blocks(figures)
    spread = any("intervals" in block for block in blocks.values())
    rows = [["figure", *(name.rstrip("/") or "raw" for name in blocks)]]
    for key in FIGURES:
        if key in figures:
            rows.append([key, *(_share(block, key, spread) for block in blocks.values())])
    return _aligned(rows) + (["in brackets: 95 % intervals, by drawing people"] if spread else [])


def _share(block: Mapping[str, Any], key: str, spread: bool) -> str:
    """A figure in percent, with its interval if there is one and room for it if others have one."""
    text = f"{block[key]:.2%}" if key in block else "-"
    ends = block.get("intervals", {}).get(key)
    if ends:
        return f"{text} [{ends[0] * 100:6.2f}, {ends[1] * 100:6.2f}]"
    return text + " " * 17 if spread else text


def _counted(figures: Mapping[str, Any]) -> str:
    """How many queries count, and why the others do not."""
    line = (
        f"{figures['num_valid_queries']:,} of {figures['num_queries']:,} queries against "
        f"{figures['num_gallery']:,} gallery images"
    )
    skipped = figures["num_queries"] - figures["num_valid_queries"]
    if not skipped:
        return line
    why = figures.get("skipped", {})
    reasons = {
        "without an image of their person in the gallery": why.get("without_gallery"),
        "with images by their own camera alone": why.get("same_camera_only"),
    }
    said = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    return f"{line}; {skipped:,} are not counted" + (f": {said}" if said else ": no match")


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
    """The mAP of each pair as a square, or, where that is too wide, of the worst pairs."""
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
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if nth == 0 else cell.rjust(width)
            for nth, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
