"""What goes into an index, and what looks for it: features from files, or of images by a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from reidreg.config.parsing import Layer, load_config
from reidreg.config.sections import Config
from reidreg.errors import ConfigError, DataError
from reidreg.evaluation.evaluate import extract_checkpoint, folder_samples
from reidreg.index.gallery import GalleryIndex
from reidreg.index.records import FeatureModel, Threshold
from reidreg.model.checkpoint import Checkpoint, digest_of, load_checkpoint
from reidreg.model.feature_files import load_features
from reidreg.model.restore import restore_embedder
from reidreg.values import Embeddings, Sample

_FEATURE_SUFFIXES = (".npz", ".safetensors")
_FEATURES = ("input", "backbone", "head")  # the sections that features depend on


@dataclass(frozen=True)
class Source:
    """A checkpoint that makes features, as it was read.

    Args:
        path: Its file.
        checkpoint: What it holds.
        config: Its configuration, with overrides.
    """

    path: Path
    checkpoint: Checkpoint
    config: Config

    @classmethod
    def of(cls, ckpt: str | Path, *layers: Layer, flags: Sequence[str] = ()) -> Source:
        """Read a checkpoint, with overrides of its configuration."""
        checkpoint = load_checkpoint(ckpt)
        config = load_config(checkpoint.config, *layers, flags=flags)
        return cls(Path(ckpt), checkpoint, config)

    @classmethod
    def of_index(
        cls, index: GalleryIndex, ckpt: str | Path | None, flags: Sequence[str] = ()
    ) -> Source:
        """The checkpoint of an index, used as it was when the index was built.

        Args:
            index: The index.
            ckpt: Where the checkpoint is now, or None if it is where it was.
            flags: Overrides, of the device perhaps.

        Raises:
            ConfigError: The index does not know its model, and no checkpoint is given.
            DataError: It is another model's.
        """
        if ckpt is None and index.model is None:
            raise ConfigError(
                "the index was built from a file of features and knows no model; give --ckpt FILE"
            )
        if index.model is None:
            return cls.of(str(ckpt), flags=flags)
        path, options = Path(ckpt or index.model.ckpt), index.model.config
        checkpoint = load_checkpoint(path)
        # Before its configuration is joined with that of another model.
        index.check_model(_model(path, checkpoint, options))
        source = cls(path, checkpoint, load_config(checkpoint.config, options, flags=flags))
        index.check_model(source.model())
        return source

    def model(self) -> FeatureModel:
        """What an index keeps of it."""
        values = self.config.as_dict()
        options = {section: values[section] for section in _FEATURES}
        return _model(self.path, self.checkpoint, options)

    def metric(self) -> str:
        """The metric that it was evaluated with."""
        return str(self.config.evaluator.options.get("metric", "cosine"))

    def threshold(self, metric: str) -> Threshold | None:
        """The threshold that is stored with it, if it is one for this metric and these options."""
        figures = self.checkpoint.metrics.get("verification") or {}
        own = load_config(self.checkpoint.config)
        measured_with = figures.get("metric", own.evaluator.options.get("metric", "cosine"))
        same = all(getattr(own, key) == getattr(self.config, key) for key in _FEATURES)
        if figures.get("threshold") is None or measured_with != metric or not same:
            return None
        return Threshold(figures["threshold"], figures.get("far"))

    def embed(self, samples: Sequence[Sample], what: str) -> Embeddings:
        """The features of images."""
        return restore_embedder(self.checkpoint, self.config).embed(samples, what)

    def embed_split(self, split: str) -> Embeddings:
        """The features of a split of the configured data set."""
        return extract_checkpoint(self.checkpoint, self.config, split=split, images=None)


def _model(path: Path, checkpoint: Checkpoint, options: dict[str, Any]) -> FeatureModel:
    text = json.dumps([options, checkpoint.preprocessing], sort_keys=True)
    digest = digest_of(text, checkpoint.model)
    return FeatureModel(str(path.expanduser().absolute()), digest, options)


def is_feature_file(path: str) -> bool:
    """Whether a name is that of a file of features, and not of an image or a folder."""
    return path.lower().endswith(_FEATURE_SUFFIXES)


def features_of_file(path: str) -> Embeddings:
    """The features of a file; each without the path of an image is named by its row, `f.npz#17`."""
    found = load_features(path, labelled=False)
    if found.paths:
        return found
    return replace(found, paths=tuple(f"{path}#{row}" for row in range(len(found.pids))))


def samples_of(paths: Sequence[str], camid: int | None) -> list[Sample]:
    """Images, and those of folders, as samples of unknown people.

    Args:
        paths: Image files and folders.
        camid: The camera that took them, or None if it is not known.

    Raises:
        DataError: There is no such file, or a folder holds no images.
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
    """The same, all of them by one camera if it is given."""
    if camid is None:
        return embeddings
    return replace(embeddings, camids=torch.full_like(embeddings.camids, camid))
