"""reidreg: a plugin-registry framework for re-identification in PyTorch.

Importing this package imports no torch: the names below are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from reidreg._version import __version__ as __version__

# Public name -> the module that defines it.
_HOMES = {
    "BACKBONES": "parts.interfaces",
    "Backbone": "parts.interfaces",
    "Batch": "values",
    "Checkpoint": "model.checkpoint",
    "Config": "config.sections",
    "DATASETS": "parts.interfaces",
    "DataError": "errors",
    "Dataset": "parts.interfaces",
    "EVALUATORS": "parts.interfaces",
    "Embeddings": "values",
    "Evaluator": "parts.interfaces",
    "FeatureExtractor": "model.extractor",
    "GalleryIndex": "index.gallery",
    "HEADS": "parts.interfaces",
    "Head": "parts.interfaces",
    "LOSSES": "parts.interfaces",
    "Loss": "parts.interfaces",
    "MatchPositions": "retrieval.ranking",
    "Output": "values",
    "ProgressBar": "logs.progress",
    "Registry": "parts.registry",
    "ReidregError": "errors",
    "SAMPLERS": "parts.interfaces",
    "Sample": "values",
    "Sampler": "parts.interfaces",
    "average_precisions": "retrieval.metrics",
    "bootstrap_intervals": "retrieval.bootstrap",
    "camera_pairs": "retrieval.cameras",
    "check_impostors": "retrieval.verification",
    "check_matchable": "retrieval.matching",
    "clipping_note": "retrieval.reranking",
    "evaluate": "evaluation.evaluate",
    "evaluate_checkpoint": "evaluation.evaluate",
    "evaluate_features": "evaluation.evaluate",
    "expand_queries": "retrieval.expansion",
    "extract": "evaluation.extract",
    "fit": "training.loop",
    "load_checkpoint": "model.checkpoint",
    "load_config": "config.parsing",
    "load_features": "model.feature_files",
    "load_plugins": "parts.plugins",
    "match_positions": "retrieval.ranking",
    "match_positions_of_rows": "retrieval.ranking",
    "ranked_lists": "retrieval.ranked_lists",
    "rerank_rows": "retrieval.reranking",
    "retrieval_figures": "retrieval.metrics",
    "save_features": "model.feature_files",
    "single_shot_positions": "retrieval.singleshot",
    "single_shot_positions_of_rows": "retrieval.singleshot",
    "synthesize": "synthesis.dataset",
    "verification_figures": "retrieval.verification",
    "write_report": "report.write",
}

__all__ = [
    "BACKBONES",
    "Backbone",
    "Batch",
    "Checkpoint",
    "Config",
    "DATASETS",
    "DataError",
    "Dataset",
    "EVALUATORS",
    "Embeddings",
    "Evaluator",
    "FeatureExtractor",
    "GalleryIndex",
    "HEADS",
    "Head",
    "LOSSES",
    "Loss",
    "MatchPositions",
    "Output",
    "ProgressBar",
    "Registry",
    "ReidregError",
    "SAMPLERS",
    "Sample",
    "Sampler",
    "average_precisions",
    "bootstrap_intervals",
    "camera_pairs",
    "check_impostors",
    "check_matchable",
    "clipping_note",
    "evaluate",
    "evaluate_checkpoint",
    "evaluate_features",
    "expand_queries",
    "extract",
    "fit",
    "load_checkpoint",
    "load_config",
    "load_features",
    "load_plugins",
    "match_positions",
    "match_positions_of_rows",
    "ranked_lists",
    "rerank_rows",
    "retrieval_figures",
    "save_features",
    "single_shot_positions",
    "single_shot_positions_of_rows",
    "synthesize",
    "verification_figures",
    "write_report",
]

if TYPE_CHECKING:
    from reidreg.config.parsing import load_config
    from reidreg.config.sections import Config
    from reidreg.errors import DataError, ReidregError
    from reidreg.evaluation.evaluate import evaluate, evaluate_checkpoint, evaluate_features
    from reidreg.evaluation.extract import extract
    from reidreg.index.gallery import GalleryIndex
    from reidreg.logs.progress import ProgressBar
    from reidreg.model.checkpoint import Checkpoint, load_checkpoint
    from reidreg.model.extractor import FeatureExtractor
    from reidreg.model.feature_files import load_features, save_features
    from reidreg.parts.interfaces import (
        BACKBONES,
        DATASETS,
        EVALUATORS,
        HEADS,
        LOSSES,
        SAMPLERS,
        Backbone,
        Dataset,
        Evaluator,
        Head,
        Loss,
        Sampler,
    )
    from reidreg.parts.plugins import load_plugins
    from reidreg.parts.registry import Registry
    from reidreg.report.write import write_report
    from reidreg.retrieval.bootstrap import bootstrap_intervals
    from reidreg.retrieval.cameras import camera_pairs
    from reidreg.retrieval.expansion import expand_queries
    from reidreg.retrieval.matching import check_matchable
    from reidreg.retrieval.metrics import average_precisions, retrieval_figures
    from reidreg.retrieval.ranked_lists import ranked_lists
    from reidreg.retrieval.ranking import MatchPositions, match_positions, match_positions_of_rows
    from reidreg.retrieval.reranking import clipping_note, rerank_rows
    from reidreg.retrieval.singleshot import single_shot_positions, single_shot_positions_of_rows
    from reidreg.retrieval.verification import check_impostors, verification_figures
    from reidreg.synthesis.dataset import synthesize
    from reidreg.training.loop import fit
    from reidreg.values import Batch, Embeddings, Output, Sample


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reidreg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"reidreg.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
