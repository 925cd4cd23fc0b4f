"""Writes the files of a report: the HTML page, and pictures for papers and slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from reidreg.errors import DataError
from reidreg.evaluation.evaluate import Evaluation
from reidreg.files import PRIVATE, replacing
from reidreg.logs.console import logger
from reidreg.report.contact_sheet import draw_contact_sheet
from reidreg.report.galleries import RankedQuery, ranked_queries
from reidreg.report.page import render_page
from reidreg.report.plots import draw_cmc, draw_scores
from reidreg.report.thumbnails import Thumbnails

_SHEET_ROWS = 4  # queries of each group in ranked.png


def write_report(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    rows: int = 10,
    k: int = 10,
    date: datetime | None = None,
) -> Path:
    """Write the report of an evaluation.

    `index.html` is one page that needs no network and no other file: figures, CMC curve, camera
    pairs, scores and ranked galleries, where the evaluation has them. `cmc.png`, `scores.png` and
    `ranked.png` are written next to it. The page and `ranked.png` show images of people and are
    readable by their owner only. The same evaluation gives the same bytes, except for the date.

    Args:
        evaluation: The evaluation. Without image paths the page has no ranked galleries; an image
            that cannot be read is an empty tile, and the log counts them.
        folder: Where the files are written.
        rows: Queries in each group: best, worst and random.
        k: Gallery images of each query, besides those that the evaluation leaves out.
        date: When the evaluation was made; None is now.

    Returns:
        The path of the page.

    Raises:
        DataError: The folder cannot be written to, or there is not one path for each feature.
    """
    folder, date = Path(folder), date or datetime.now(timezone.utc)
    thumbnails, queries = Thumbnails(), []
    if evaluation.query.paths and evaluation.gallery.paths:
        queries = ranked_queries(evaluation, rows=rows, k=k)
        reason = "No query has a match."
    else:
        reason = "The features come without image paths."
    page = render_page(evaluation, queries, thumbnails, date, no_galleries=reason)
    try:
        _write(folder, page, evaluation.figures, queries)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot write {folder} ({reason}); give another --output") from error
    if thumbnails.missing:
        logger.warning(
            "report: %d images cannot be read, the first is %r",
            len(thumbnails.missing),
            thumbnails.missing[0],
        )
    return folder / "index.html"


def _write(
    folder: Path, page: str, figures: Mapping[str, Any], queries: Sequence[RankedQuery]
) -> None:
    with replacing(folder / "index.html", PRIVATE) as file:
        # A file name may contain bytes that are not UTF-8.
        file.write(page.encode("utf-8", errors="replace"))
    if queries:
        with replacing(folder / "ranked.png", PRIVATE) as file:
            draw_contact_sheet(_first(queries), figures).save(file, "PNG")
    for name, picture in (("cmc", draw_cmc(figures)), ("scores", draw_scores(figures))):
        if picture is not None:
            with replacing(folder / f"{name}.png") as file:
                file.write(picture)


def _first(queries: Sequence[RankedQuery]) -> list[RankedQuery]:
    """The first queries of each group, so that the picture fits on one screen."""
    return [
        query
        for group in ("best", "worst", "random")
        for query in [query for query in queries if query.group == group][:_SHEET_ROWS]
    ]
