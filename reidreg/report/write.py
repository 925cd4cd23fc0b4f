"""An evaluation to look at: one HTML page, and pictures for papers and slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from reidreg.errors import DataError
from reidreg.evaluation.evaluate import Evaluation
from reidreg.files import PRIVATE, replacing
from reidreg.logs.console import logger
from reidreg.report.contact_sheet import draw_sheet
from reidreg.report.galleries import RankedQuery, ranked_queries
from reidreg.report.page import render_page
from reidreg.report.plots import draw_cmc, draw_scores
from reidreg.report.thumbnails import Thumbnails

_SHEET_ROWS = 4


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
    pairs, scores and ranked galleries, as far as the figures have them. Beside it stand
    `cmc.png`, `scores.png` and `ranked.png`. The page and `ranked.png` show images of people, and
    only their owner may read them. The same evaluation gives the same bytes, but for the date.

    Args:
        evaluation: What to show. Features without paths give a page without galleries; an image
            whose file is gone leaves an empty tile, and the log counts them.
        folder: Where the files go.
        rows: How many of the best, of the worst and of some random queries to show.
        k: Gallery images of each query; those that the evaluation leaves out come on top.
        date: When the evaluation was made; None is now.

    Returns:
        The page.

    Raises:
        DataError: The folder cannot be written to, or the paths do not go with the features.
    """
    folder, date = Path(folder), date or datetime.now(timezone.utc)
    thumbnails, queries = Thumbnails(), []
    if evaluation.query.paths and evaluation.gallery.paths:
        queries = ranked_queries(evaluation, rows=rows, k=k)
        reason = "No query has a match."
    else:
        reason = "These features come without the paths of their images."
    page = render_page(evaluation, queries, thumbnails, date, no_galleries=reason)
    try:
        _write(folder, page, evaluation.figures, queries)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot write {folder} ({reason}); give another --output") from error
    if thumbnails.missing:
        logger.warning(
            "report: %d of its images cannot be read, the first is %r",
            len(thumbnails.missing),
            thumbnails.missing[0],
        )
    return folder / "index.html"


def _write(
    folder: Path, page: str, figures: Mapping[str, Any], queries: Sequence[RankedQuery]
) -> None:
    with replacing(folder / "index.html", PRIVATE) as file:
        # A file name may hold bytes that are no UTF-8.
        file.write(page.encode("utf-8", errors="replace"))
    if queries:
        with replacing(folder / "ranked.png", PRIVATE) as file:
            draw_sheet(_first(queries), figures).save(file, "PNG")
    for name, picture in (("cmc", draw_cmc(figures)), ("scores", draw_scores(figures))):
        if picture is not None:
            with replacing(folder / f"{name}.png") as file:
                file.write(picture)


def _first(queries: Sequence[RankedQuery]) -> list[RankedQuery]:
    """The first of each sort, for a picture of one screen."""
    return [
        query
        for sort in ("best", "worst", "random")
        for query in [query for query in queries if query.sort == sort][:_SHEET_ROWS]
    ]
