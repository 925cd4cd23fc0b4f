"""The command `search`: the nearest items of a gallery index, for images or features."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from reidreg.cli.arguments import Parser, described_parser
from reidreg.cli.index import score_name
from reidreg.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from reidreg.index.gallery import GalleryIndex
    from reidreg.values import Embeddings

_SEARCH = """Find the nearest items of an index, for images or features.

The queries are images, folders of images, or one file of features. If there is a threshold, items
that reach it are marked as the same person.

--exclude_same_camera leaves out all items of the query's camera. An evaluation leaves out only
those of the query's own identity, which is not known in a search.

--json prints one document:
{"index", "metric", "score", "threshold", "far", "queries": [{"query", "results": [
  {"rank", "item", "score", "pid", "camid", "path", "same"}]}]}
where item is the position in the index, pid and camid are -1 if unknown, and threshold, far and
same are null without a threshold."""


def search_command(arguments: list[str]) -> int:
    """`reidreg search`."""
    own, overrides = _search_parser().parse_with_overrides(arguments)
    from reidreg.index.gallery import GalleryIndex
    from reidreg.retrieval.options import check_at_least

    check_at_least("--top", own.top, 1)
    index = GalleryIndex.load(own.index)
    threshold = _threshold(index, own.threshold)
    if own.exclude_same_camera and not (index.items.camids >= 0).any():
        raise ConfigError(
            "--exclude_same_camera: the index knows no cameras; `reidreg index build --camid N` "
            "sets that of a folder's images"
        )
    query = _queries(index, own, overrides)
    excluded = _excluded(own, query)
    numbers, scores = index.search(query.features, own.top, excluded, paths=query.paths)
    results = _results(index, query, numbers, scores, threshold)
    if own.json:
        print(json.dumps(_document(own.index, index, threshold, results), indent=2))
    else:
        print("\n".join(_table(results, score_name(index.metric), threshold)))
    return 0


def _search_parser() -> Parser:
    parser = described_parser("reidreg search", _SEARCH)
    parser.add_argument("--index", required=True, metavar="DIR", help="the index")
    parser.add_argument(
        "--query", required=True, nargs="+", metavar="PATH", help="images, folders, or features"
    )
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="items to find; default: 10"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--exclude_same_camera", action="store_true", help="leave out items of the query's camera"
    )
    parser.add_argument("--query_camid", type=int, metavar="N", help="the camera of the queries")
    parser.add_argument(
        "--threshold",
        default="auto",
        metavar="auto|NUMBER|none",
        help="the score from which on an item is the same person; default: the model's, if any",
    )
    parser.add_argument(
        "--ckpt", metavar="FILE", help="the checkpoint of the index, if it was moved"
    )
    return parser


def _threshold(index: GalleryIndex, wanted: str) -> float | None:
    if wanted == "none":
        return None
    if wanted == "auto":
        return index.threshold.value if index.threshold else None
    try:
        return float(wanted)
    except ValueError as error:
        raise ConfigError(f"--threshold {wanted}: expected a number, auto or none") from error


def _queries(index: GalleryIndex, own: argparse.Namespace, overrides: list[str]) -> Embeddings:
    """The features of the queries."""
    from reidreg.index.source import (
        Source,
        features_of_file,
        is_feature_file,
        samples_of,
        with_camid,
    )

    if any(map(is_feature_file, own.query)):
        if len(own.query) > 1:
            raise ConfigError("--query: give one file of features, or images and folders")
        if overrides or own.ckpt:
            raise ConfigError("--query: features need no model; leave --ckpt and its options out")
        return with_camid(features_of_file(own.query[0]), own.query_camid)
    samples = samples_of(own.query, own.query_camid)
    return Source.of_index(index, own.ckpt, overrides).embed(samples, "query")


def _excluded(own: argparse.Namespace, query: Embeddings) -> Tensor | None:
    """The camera of each query (Q,), or None if no camera is excluded."""
    if not own.exclude_same_camera:
        return None
    if bool((query.camids < 0).any()):
        raise ConfigError(
            "--exclude_same_camera: the camera of the queries is not known; give --query_camid N"
        )
    return query.camids


def _results(
    index: GalleryIndex,
    query: Embeddings,
    numbers: Tensor,
    scores: Tensor,
    threshold: float | None,
) -> list[dict[str, Any]]:
    """The items found for each query, as in the JSON document."""
    passed = index.passes(scores, threshold) if threshold is not None else None
    found = []
    for row, path in enumerate(query.paths):
        results = [
            {
                "rank": column + 1,
                "item": item,
                "score": float(scores[row, column]),
                "pid": int(index.items.pids[item]),
                "camid": int(index.items.camids[item]),
                "path": index.items.paths[item],
                "same": bool(passed[row, column]) if passed is not None else None,
            }
            for column, item in enumerate(numbers[row].tolist())
            if item >= 0
        ]
        found.append({"query": path, "results": results})
    return found


def _document(
    folder: str, index: GalleryIndex, threshold: float | None, results: list[dict[str, Any]]
) -> dict[str, Any]:
    stored = index.threshold
    far = stored.far if stored is not None and stored.value == threshold else None
    return {
        "index": folder,
        "metric": index.metric,
        "score": score_name(index.metric),
        "threshold": threshold,
        "far": far,
        "queries": results,
    }


def _table(results: list[dict[str, Any]], score: str, threshold: float | None) -> list[str]:
    """The lines of a table with aligned columns; the paths are last."""
    lines = [f"score: {score}" + (f"; threshold {threshold:.4f}" if threshold is not None else "")]
    header = ["rank", "score", *(["same"] if threshold is not None else []), "pid", "camid", "path"]
    for result in results:
        rows = [header]
        for found in result["results"]:
            same = [] if threshold is None else ["yes" if found["same"] else "no"]
            ids = ["-" if found[name] < 0 else str(found[name]) for name in ("pid", "camid")]
            rows.append([str(found["rank"]), f"{found['score']:.4f}", *same, *ids, found["path"]])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        lines += ["", f"query: {result['query']}"]
        lines += [
            "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
            for row in rows
        ]
    return lines
