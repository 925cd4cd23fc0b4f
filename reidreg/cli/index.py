"""The command `index`: build a gallery index, add to it, and describe it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from reidreg.cli.arguments import Parser, described_parser, take_configs
from reidreg.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from reidreg.index.gallery import GalleryIndex
    from reidreg.index.records import FeatureModel
    from reidreg.index.source import Source
    from reidreg.values import Embeddings

_INDEX = """usage: reidreg index build|add|info [OPTIONS]

Build an index of a gallery on disk, for `reidreg search`.

  build   build an index of features, or of images by a checkpoint
  add     add items to an index
  info    describe an index

`reidreg index build --help` shows the options of each."""

_BUILD = """Build an index of features, or of images by a checkpoint.

Type auto is flat, which is exact, up to 2 GiB of features (1 million of 512 numbers); ivf, which
needs half as much memory, up to 32 GiB; and above that pq, at 72 bytes an item. hnsw answers
fastest, and is slow to build. The recall of an approximate index is measured, printed and stored.

Junk (pid -1) is left out where pids are known; if none is, as for a folder, all items are kept."""


def index_command(arguments: list[str]) -> int:
    """`reidreg index`."""
    commands = {"build": _build, "add": _add, "info": _info}
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_INDEX)
        return 0 if arguments else 2
    if name not in commands:
        raise ConfigError(f"give build, add or info, not {name}{did_you_mean(name, commands)}")
    return commands[name](arguments[1:])


# --------------------------------------------------------------------- build


def _build(arguments: list[str]) -> int:
    configs, flags = take_configs(arguments)
    own, overrides = _build_parser().parse_with_overrides(flags)
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


def _build_parser() -> Parser:
    parser = described_parser("reidreg index build", _BUILD)
    _add_sources(parser)
    parser.add_argument(
        "--split", metavar="SPLIT", help="or a split of its data set: gallery, query"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the index; a new folder")
    parser.add_argument(
        "--type", default="auto", metavar="TYPE", help="auto (the default), flat, ivf, hnsw or pq"
    )
    parser.add_argument(
        "--recall",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="share of the true 10 nearest that an approximate index is to find; default: 0.95",
    )
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        help="cosine or euclidean; default: the checkpoint's evaluator.metric, or cosine",
    )
    return parser


# --------------------------------------------------------------------- add


def _add(arguments: list[str]) -> int:
    parser = described_parser(
        "reidreg index add", "Add items to an index, and measure its recall again."
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


# --------------------------------------------------------------------- the items, for both


def _add_sources(parser: Parser) -> None:
    parser.add_argument("--features", metavar="FILE", help="features, as `extract` writes them")
    parser.add_argument(
        "--ckpt", metavar="FILE", help="the checkpoint that computes the features of images"
    )
    parser.add_argument("--images", metavar="DIR", help="a folder of images")
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


# --------------------------------------------------------------------- info


def _info(arguments: list[str]) -> int:
    parser = described_parser(
        "reidreg index info", "Verify the checksums of an index and describe it.", epilog=""
    )
    parser.add_argument("--index", required=True, metavar="DIR", help="the index")
    parser.add_argument("--json", action="store_true", help="print JSON")
    own = parser.parse(arguments)
    from reidreg.index.gallery import GalleryIndex

    found = GalleryIndex.load(own.index)
    print(json.dumps(found.facts(), indent=2) if own.json else "\n".join(_described(found)))
    return 0


def _described(index: GalleryIndex) -> list[str]:
    """The lines that describe an index."""
    settings = ", ".join(f"{name} {value}" for name, value in index.settings.items())
    kind = f"{index.index_type} ({settings})" if settings else f"{index.index_type}, exact"
    cameras = len({camid for camid in index.items.camids.tolist() if camid >= 0})
    lines = [
        f"index: {len(index):,} items of {index.dim:,} numbers by {cameras} known cameras, {kind}",
        f"score: {score_name(index.metric)}",
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


def score_name(metric: str) -> str:
    """What the scores of a metric are."""
    return "cosine similarity" if metric == "cosine" else "squared Euclidean distance"
