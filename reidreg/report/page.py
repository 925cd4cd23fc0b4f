"""The report as one self-contained HTML page in which every value is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reidreg._version import __version__
from reidreg.evaluation.evaluate import Evaluation
from reidreg.report.cameras import camera_matrix
from reidreg.report.charts import HEIGHT, TALL_HEIGHT, cmc_chart, score_chart
from reidreg.report.figures import figure_table, is_number, skipped, titled_blocks
from reidreg.report.galleries import RankedQuery
from reidreg.report.thumbnails import Thumbnails
from reidreg.values import JUNK, Embeddings

_FOLDER = Path(__file__).parent
_TILE_WIDTH = 64


def render_page(
    evaluation: Evaluation,
    queries: Sequence[RankedQuery],
    thumbnails: Thumbnails,
    date: datetime,
    no_galleries: str,
) -> str:
    """The page of an evaluation, as HTML.

    Args:
        evaluation: The evaluation.
        queries: The ranked galleries.
        thumbnails: Receives the images of the page, and lists those that cannot be read.
        date: When the evaluation was made.
        no_galleries: The text that is shown if there are no ranked galleries.
    """
    figures = evaluation.figures
    for query in queries:
        for path in (query.path, *(image.path for image in query.images)):
            thumbnails.name(path)
    verification = figures.get("verification") or {}
    rates = _rates(verification)
    style, script = _asset("page.css"), _asset("page.js")
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=evaluation.about.get("Data set", "Evaluation"),
            lead=_lead(figures),
            version=__version__,
            date=date,
            style=style,
            script=script,
            policy=_policy(style, script),
            table=figure_table(figures),
            blocks=list(titled_blocks(figures)),
            intervals="intervals" in figures,
            facts=_facts(evaluation),
            # As high as the neighbouring section, the scores with their table.
            cmc=cmc_chart(figures, TALL_HEIGHT if rates else HEIGHT),
            verification=verification,
            scores=score_chart(verification),
            rates=rates,
            cameras=camera_matrix(figures.get("cameras") or []),
            queries=queries,
            no_galleries=no_galleries,
            groups=list(dict.fromkeys(query.group for query in queries)),
            query_cameras=sorted({query.camid for query in queries}),
            query_pids=sorted({query.pid for query in queries}),
            thumbnails=thumbnails,
            tile=(_TILE_WIDTH, thumbnails.tile_height(_TILE_WIDTH)),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["filename"] = lambda path: Path(path).name or path
    return environment


def _asset(name: str) -> Markup:
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """A content security policy that allows only this style and this script."""
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
        for text in (style, script)
    ]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _lead(figures: Mapping[str, Any]) -> str:
    headline = [
        f"{name} {figures[key]:.1%}"
        for key, name in (("mAP", "mAP"), ("rank1", "rank-1"))
        if is_number(figures.get(key))
    ]
    counts = [
        f"{figures[key]:,} {what}"
        for key, what in (("num_valid_queries", "queries"), ("num_gallery", "gallery images"))
        if key in figures
    ]
    return ", ".join(headline) + (" for " if headline and counts else "") + " in ".join(counts)


def _facts(evaluation: Evaluation) -> dict[str, list[str]]:
    """The lines that describe the evaluation, by label."""
    figures = evaluation.figures
    facts = {label: [text] for label, text in evaluation.about.items()}
    facts["Queries"] = [_side(evaluation.query), *skipped(figures)]
    facts["Gallery"] = [_side(evaluation.gallery)]
    options = {key: value for key, value in evaluation.options.items() if key != "name"}
    if evaluation.options:
        name = str(evaluation.options.get("name", ""))
        facts["Evaluator"] = [name, ", ".join(f"{key} {_shown(v)}" for key, v in options.items())]
    return facts


def _side(side: Embeddings) -> str:
    pids = side.pids[side.pids != JUNK].tolist()
    junk, cameras = len(side.pids) - len(pids), set(side.camids.tolist())
    images = f"{len(side.pids):,} images" + (f" ({junk:,} junk)" if junk else "")
    return f"{images}, {len(set(pids)):,} people, {len(cameras):,} cameras"


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class _Rates:
    names: list[str]
    rows: list[tuple[str, list[str]]]


def _rates(verification: Mapping[str, Any]) -> _Rates | None:
    """True-accept rate and identification rate, with a row for each false-accept rate."""
    kinds = (("TAR", "tar_at_far", "tar"), ("DIR", "dir_at_far", "dir"))
    columns = {
        name: {entry["far"]: (entry.get(key), entry.get("threshold")) for entry in entries}
        for name, block, key in kinds
        if (entries := verification.get(block))
    }
    fars = sorted({far for column in columns.values() for far in column})
    rows = [
        (
            f"{100 * far:.4g}%",
            [
                text
                for column in columns.values()
                for rate, threshold in [column.get(far, (None, None))]
                for text in (_formatted(rate, ".1%"), _formatted(threshold, ".3f"))
            ],
        )
        for far in fars
    ]
    names = [word for name in columns for word in (name, "threshold")]
    return _Rates(names, rows) if rows else None


def _formatted(value: Any, form: str) -> str:
    return format(value, form) if is_number(value) else "–"
