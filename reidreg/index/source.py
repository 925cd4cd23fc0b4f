"""Features for an index and for its queries: from a file, or of images by a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from reidreg.config.layers import Layer
from reidreg.config.parsing import load_config
from reidreg.config.sections import Config
from reidreg.data.images import folder_samples
from reidreg.errors import ConfigError, DataError
from reidreg.evaluation.extract import extract_checkpoint
from reidreg.index.gallery import GalleryIndex
from reidreg.index.records import FeatureModel, Threshold
from reidreg.model.checkpoint import Checkpoint, digest_of, load_checkpoint
from reidreg.model.feature_files import load_features
from reidreg.model.restore import restore_embedder
from reidreg.values import Embeddings, Sample

_FEATURE_SUFFIXES = (".npz", ".safetensors")
_FEATURE_SECTIONS = ("input", "backbone", "head")  # of the configuration; features depend on them


@dataclass(frozen=True)
class Source:
    """A checkpoint that extracts features, with its configuration.

    Args:
        path: Its file.
        checkpoint: Its contents.
        config: Its configuration, with overrides.
    """

    path: Path
    checkpoint: Checkpoint
    config: Config

    @classmethod
    def of(cls, ckpt: str | Path, *layers: Layer, flags: Sequence[str] = ()) -> Source:
        """Read a checkpoint and override its configuration."""
        checkpoint = load_checkpoint(ckpt)
        config = load_config(checkpoint.config, *layers, flags=flags)
        return cls(Path(ckpt), checkpoint, config)

    @classmethod
    def of_index(
        cls, index: GalleryIndex, ckpt: str | Path | None, flags: Sequence[str] = ()
    ) -> Source:
        """The checkpoint of an index, with the configuration that the index was built with.

        Args:
            index: The index.
            ckpt: The checkpoint file, or None for the path that the index stores.
            flags: Overrides, such as of the device.

        Raises:
            ConfigError: The index stores no model, and no checkpoint is given.
            DataError: The checkpoint is of another model.
        """
        if ckpt is None and index.model is None:
            raise ConfigError(
                "the index was built from a file of features and knows no model; give --ckpt FILE"
            )
        if index.model is None:
            return cls.of(str(ckpt), flags=flags)
        path, options = Path(ckpt or index.model.ckpt), index.model.config
        checkpoint = load_checkpoint(path)
        # First, as the stored options may not fit the configuration of another model.
        index.check_model(_model(path, checkpoint, options))
        source = cls(path, checkpoint, load_config(checkpoint.config, options, flags=flags))
        index.check_model(source.model())
        return source

    def model(self) -> FeatureModel:
        """The model as an index stores it."""
        values = self.config.as_dict()
        options = {section: values[section] for section in _FEATURE_SECTIONS}
        return _model(self.path, self.checkpoint, options)

    def metric(self) -> str:
        """The metric that the checkpoint was evaluated with."""
        return str(self.config.evaluator.options.get("metric", "cosine"))

    def threshold(self, metric: str) -> Threshold | None:
        """The threshold of the checkpoint, or None if it is of another metric or configuration."""
        figures = self.checkpoint.metrics.get("verification") or {}
        own = load_config(self.checkpoint.config)
        measured_with = figures.get("metric", own.evaluator.options.get("metric", "cosine"))
        same = all(getattr(own, key) == getattr(self.config, key) for key in _FEATURE_SECTIONS)
        if figures.get("threshold") is None or measured_with != metric or not same:
            return None
        return Threshold(figures["threshold"], figures.get("far"))

    def embed(self, samples: Sequence[Sample], what: str) -> Embeddings:
        """The features of images."""
        return restore_embedder(self.checkpoint, self.config).embed(samples, what)

    def embed_split(self, split: str) -> Embeddings:
        """The features of a split of the configured dataset."""
        return extract_checkpoint(self.checkpoint, self.config, split=split, images=None)


def _model(path: Path, checkpoint: Checkpoint, options: dict[str, Any]) -> FeatureModel:
    text = json.dumps([options, checkpoint.preprocessing], sort_keys=True)
    digest = digest_of(text, checkpoint.model)
    return FeatureModel(str(path.expanduser().absolute()), digest, options)


def is_feature_file(path: str) -> bool:
    """Whether a path names a file of features rather than an image or a folder."""
    return path.lower().endswith(_FEATURE_SUFFIXES)


def features_of_file(path: str) -> Embeddings:
    """The features of a file; if it has no paths, each is named by its row, such as `f.npz#17`."""
    found = load_features(path, labelled=False)
    if found.paths:
        return found
    return replace(found, paths=tuple(f"{path}#{row}" for row in range(len(found.pids))))


def samples_of(paths: Sequence[str], camid: int | None) -> list[Sample]:
    """Image files, and the images of folders, as samples of unknown identity.

    Args:
        paths: Image files and folders.
        camid: Their camera, or None if it is unknown.

    Raises:
        DataError: A path does not exist, or a folder holds no images.
    """
    samples = []
    for path in paths:
        if Path(path).is_dir():
            samples += folder_samples(Path(path))
        elif Path(path).is_file():
            samples.append(Sample(path, -1, -1))
        else:
            raise DataError(f"{path}: there is no such image or folder")
    return [replace(sample, camid=-1 if camid is None else camid) for sample in samples]


def with_camid(embeddings: Embeddings, camid: int | None) -> Embeddings:
    """The same embeddings, all with one camera if it is given."""
    if camid is None:
        return embeddings
    return replace(embeddings, camids=torch.full_like(embeddings.camids, camid))
