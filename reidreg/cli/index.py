"""The commands `index` and `search`.

What they need is imported when they run, so that their help is there at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reidreg.cli.arguments import Parser, take_configs
from reidreg.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from reidreg.index.gallery import GalleryIndex
    from reidreg.index.records import FeatureModel
    from reidreg.index.source import Source
    from reidreg.values import Embeddings

_OVERRIDES = (
    "Beside these, the options of the checkpoint's configuration, such as --train.device cpu."
)

# --------------------------------------------------------------------- index


_INDEX = """usage: reidreg index build|add|info [OPTIONS]

Put a gallery on disk, to search in.

  build   an index of features, or of images by a checkpoint
  add     further items behind those of an index
  info    what an index holds

`reidreg index build --help` shows the options of each."""

_BUILD = """Build an index of features, or of images by a checkpoint.

auto is flat, which is exact, up to 2 GiB of features (1 million of 512 numbers); ivf, which holds
half of that in memory, up to 32 GiB; and pq, 72 bytes an item, beyond. hnsw answers fastest, and is
built slowly. The recall of what is not exact is measured, printed and stored.

Junk (pid -1) is left out where pids are known; where none is, as in a folder, all are kept."""


def index(arguments: list[str]) -> int:
    """`reidreg index`."""
    commands = {"build": _build, "add": _add, "info": _info}
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_INDEX)
        return 0 if arguments else 2
    if name not in commands:
        raise ConfigError(f"give build, add or info, not {name}{did_you_mean(name, commands)}")
    return commands[name](arguments[1:])


def _build(arguments: list[str]) -> int:
    configs, flags = take_configs(arguments)
    parser = _parser("reidreg index build", _BUILD)
    _add_sources(parser)
    parser.add_argument("--split", metavar="SPLIT", help="or of its data set: gallery, query")
    parser.add_argument("--output", required=True, metavar="DIR", help="the index; a new folder")
    parser.add_argument(
        "--type", default="auto", metavar="TYPE", help="auto (the default), flat, ivf, hnsw or pq"
    )
    parser.add_argument(
        "--recall",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of the 10 nearest that is to be found; default: 0.95",
    )
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        help="cosine or euclidean; default: the checkpoint's evaluator.metric, or cosine",
    )
    own, overrides = parser.parse_with_overrides(flags)
    _check_source(own, own.split)
    if own.ckpt is None and (own.images or own.split):
        raise ConfigError("--images and --split need the model: give --ckpt FILE")
    from reidreg.index.files import holds_index
    from reidreg.index.gallery import GalleryIndex
    from reidreg.index.source import Source
    from reidreg.logs.console import log_to_console
    from reidreg.logs.progress import ProgressBar

    if holds_index(Path(own.output)):
        raise ConfigError(
            f"--output {own.output} holds an index already; `reidreg index add` adds to it, "
            "and a new one needs another folder"
        )
    _refuse_overrides(own, [*configs, *overrides])
    log_to_console()
    source = Source.of(own.ckpt, *configs, flags=overrides) if own.ckpt else None
    metric = own.metric or (source.metric() if source else "cosine")
    gallery = _gallery(own, source, own.split).without_junk()
    with ProgressBar("indexing", len(gallery.pids)) as bar:
        built = GalleryIndex.build(
            gallery,
            index_type=own.type,
            metric=metric,
            recall=own.recall,
            model=source.model() if source else None,
            threshold=source.threshold(metric) if source else None,
            progress=bar.report,
        )
    built.save(own.output)
    print("\n".join(_described(built)))
    print(f"written: {own.output}")
    return 0


def _add(arguments: list[str]) -> int:
    parser = _parser(
        "reidreg index add",
        "Put further items behind those of an index; its recall is measured again.",
    )
    parser.add_argument("--index", required=True, metavar="DIR", help="the index")
    _add_sources(parser)
    own, overrides = parser.parse_with_overrides(arguments)
    _check_source(own)
    _refuse_overrides(own, overrides)
    from reidreg.index.gallery import GalleryIndex, add_to_index
    from reidreg.index.source import Source
    from reidreg.logs.console import log_to_console
    from reidreg.logs.progress import ProgressBar

    log_to_console()
    source: Source | None = None
    model: FeatureModel | None = None
    if own.images:
        source = Source.of_index(GalleryIndex.load(own.index), own.ckpt, overrides)
        model = source.model()
    gallery = _gallery(own, source).without_junk()
    with ProgressBar("indexing", len(gallery.pids)) as bar:
        found = add_to_index(own.index, gallery, model=model, progress=bar.report)
    print(f"added: {len(gallery.pids):,} items")
    print("\n".join(_described(found)))
    return 0


def _info(arguments: list[str]) -> int:
    parser = _parser("reidreg index info", "What an index holds, after its checksums.", epilog="")
    parser.add_argument("--index", required=True, metavar="DIR", help="the index")
    parser.add_argument("--json", action="store_true", help="as JSON")
    own = parser.parse(arguments)
    from reidreg.index.gallery import GalleryIndex

    found = GalleryIndex.load(own.index)
    print(json.dumps(found.facts(), indent=2) if own.json else "\n".join(_described(found)))
    return 0


def _described(index: GalleryIndex) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in index.settings.items())
    kind = f"{index.index_type} ({settings})" if settings else f"{index.index_type}, exact"
    cameras = len({camid for camid in index.items.camids.tolist() if camid >= 0})
    lines = [
        f"index: {len(index):,} items of {index.dim:,} numbers by {cameras} known cameras, {kind}",
        f"score: {_score_name(index.metric)}",
    ]
    recall = index.recall
    if recall:
        lines.append(
            f"recall@{recall.k}: {recall.reached:.4f} of what exact search finds, over "
            f"{recall.queries:,} of its {recall.items:,} items (wanted: {recall.wanted:g})"
        )
    if index.threshold:
        far = index.threshold.far
        at = f", at a false-accept rate of {far:g}" if far is not None else ""
        lines.append(f"threshold: {index.threshold.value:.4f}{at}")
    if index.model:
        lines.append(f"model: {index.model.ckpt}")
    return lines


def _score_name(metric: str) -> str:
    return "cosine similarity" if metric == "cosine" else "squared Euclidean distance"


# --------------------------------------------------------------------- search


_SEARCH = """Find the nearest items of an index, for images or features.

The queries are images, folders of images, or one file of features. Where there is a threshold,
items at or beyond it are marked as the same person.

--exclude_same_camera leaves out all items of the query's camera. In an evaluation only those of the
query's own identity are left out, but whoever searches does not know that identity.

--json prints one document:
{"index", "metric", "score", "threshold", "far", "queries": [{"query", "results": [
  {"rank", "item", "score", "pid", "camid", "path", "same"}]}]}
where item is the number in the index, pid and camid are -1 where they are not known, and threshold,
far and same are null without a threshold."""


def search(arguments: list[str]) -> int:
    """`reidreg search`."""
    parser = _parser("reidreg search", _SEARCH)
    parser.add_argument("--index", required=True, metavar="DIR", help="the index")
    parser.add_argument(
        "--query", required=True, nargs="+", metavar="PATH", help="images, folders, or features"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="items; default: 10")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--exclude_same_camera", action="store_true", help="leave out items of the query's camera"
    )
    parser.add_argument("--query_camid", type=int, metavar="N", help="the camera of the queries")
    parser.add_argument(
        "--threshold",
        default="auto",
        metavar="auto|NUMBER|none",
        help="from where on it is the same person; default: the model's, if it has one",
    )
    parser.add_argument("--ckpt", metavar="FILE", help="the index's model, if it was moved")
    own, overrides = parser.parse_with_overrides(arguments)
    from reidreg.index.gallery import GalleryIndex
    from reidreg.retrieval.options import check_at_least

    check_at_least("--top", own.top, 1)
    index = GalleryIndex.load(own.index)
    threshold = _threshold(index, own.threshold)
    if own.exclude_same_camera and not (index.items.camids >= 0).any():
        raise ConfigError(
            "--exclude_same_camera: the index knows no cameras; `reidreg index build --camid N` "
            "says which one took a folder's images"
        )
    query = _queries(index, own, overrides)
    excluded = _excluded(own, query)
    numbers, scores = index.search(query.features, own.top, excluded, paths=query.paths)
    results = _results(index, query, numbers, scores, threshold)
    if own.json:
        print(json.dumps(_document(own.index, index, threshold, results), indent=2))
    else:
        print("\n".join(_table(results, _score_name(index.metric), threshold)))
    return 0


def _threshold(index: GalleryIndex, wanted: str) -> float | None:
    if wanted == "none":
        return None
    if wanted == "auto":
        return index.threshold.value if index.threshold else None
    try:
        return float(wanted)
    except ValueError as error:
        raise ConfigError(f"--threshold {wanted}: it is a number, auto or none") from error


def _queries(index: GalleryIndex, own: argparse.Namespace, overrides: list[str]) -> Embeddings:
    """The features of what is searched for."""
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
    """The camera of each query, if its items are left out."""
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
    """What was found, as the JSON document has it."""
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
        "score": _score_name(index.metric),
        "threshold": threshold,
        "far": far,
        "queries": results,
    }


def _table(results: list[dict[str, Any]], score: str, threshold: float | None) -> list[str]:
    """Aligned columns, the longest, paths, last."""
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


# --------------------------------------------------------------------- what both read


def _parser(prog: str, description: str, epilog: str = _OVERRIDES) -> Parser:
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_sources(parser: Parser) -> None:
    parser.add_argument("--features", metavar="FILE", help="features, as `extract` writes them")
    parser.add_argument("--ckpt", metavar="FILE", help="a checkpoint, which makes the features")
    parser.add_argument("--images", metavar="DIR", help="of a folder's images")
    parser.add_argument("--camid", type=int, metavar="N", help="the camera that took all of them")


def _check_source(own: argparse.Namespace, split: str | None = None) -> None:
    given = [value for value in (own.features, own.images, split) if value is not None]
    if len(given) != 1:
        raise ConfigError("give one of --features FILE, --images DIR and, to build, --split SPLIT")
    if own.features is not None and own.ckpt is not None:
        raise ConfigError("--features need no model; leave --ckpt out")


def _refuse_overrides(own: argparse.Namespace, overrides: list[str]) -> None:
    if own.features is not None and overrides:
        raise ConfigError(f"{overrides[0]}: features of a file have no configuration to override")


def _gallery(
    own: argparse.Namespace, source: Source | None, split: str | None = None
) -> Embeddings:
    """The items that the options name."""
    from reidreg.index.source import features_of_file, samples_of, with_camid

    if source is None:
        return with_camid(features_of_file(own.features), own.camid)
    if split is not None:
        return with_camid(source.embed_split(split), own.camid)
    if not Path(own.images).is_dir():
        raise ConfigError(f"--images {own.images}: no such folder")
    return source.embed(samples_of([own.images], own.camid), own.images)
