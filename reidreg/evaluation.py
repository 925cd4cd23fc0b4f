"""Features of a split, and the figures that follow from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reidreg.checkpoint import Checkpoint, load_checkpoint
from reidreg.config import Config, InputConfig
from reidreg.data import Labels, count_workers, eval_loader, loading_processes
from reidreg.devices import autocast, choose_device, choose_precision
from reidreg.errors import CheckpointError, ConfigError, DataError
from reidreg.interfaces import DATASETS, EVALUATORS, Dataset, Evaluator
from reidreg.logs import ProgressBar, logger
from reidreg.model import Model, build_model
from reidreg.parsing import Layer, load_config
from reidreg.transforms import eval_transform
from reidreg.values import Embeddings, Sample

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@dataclass(frozen=True)
class Embedder:
    """A model with all that turns image files into features.

    Args:
        model: The model.
        labels: The numbering it was trained with.
        input: Size, mean and std of its input.
        device: Where it runs.
        dtype: In which arithmetic.
        batch_size: Images at a time.
        workers: Loading processes.
    """

    model: Model
    labels: Labels
    input: InputConfig
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    workers: int

    @torch.inference_mode()
    def embed(self, samples: Sequence[Sample], what: str) -> Embeddings:
        """The features of images, in order, on the CPU.

        Args:
            samples: The images.
            what: What they are, for the progress bar and errors.

        Raises:
            DataError: There are none, or one cannot be read.
        """
        if not samples:
            raise DataError(f"{what}: there are no images to extract features of")
        assert self.input.mean is not None and self.input.std is not None
        cuda = self.device.type == "cuda"
        camids = torch.tensor(self.labels.camera_indices(samples))
        training = self.model.training
        self.model.eval()
        features, done = [], 0
        batches = eval_loader(
            samples,
            eval_transform(self.input, self.input.mean, self.input.std),
            batch_size=self.batch_size,
            workers=self.workers,
            pin=cuda,
        )
        with (
            loading_processes(),
            ProgressBar(what, len(samples)) as bar,
            autocast(self.device, self.dtype),
        ):
            for images in batches:
                images = images.to(
                    self.device, non_blocking=cuda, memory_format=torch.channels_last
                )
                batch_camids = camids[done : done + len(images)].to(self.device)
                features.append(self.model(images, batch_camids).embeddings.float().cpu())
                done += len(images)
                bar.advance(len(images))
        self.model.train(training)
        return Embeddings(
            torch.cat(features),
            torch.tensor([sample.pid for sample in samples]),
            torch.tensor([sample.camid for sample in samples]),
            tuple(sample.path for sample in samples),
        )


def make_embedder(model: Model, labels: Labels, config: Config) -> Embedder:
    """The embedder of a model, as `train` and `input` say; the model moves to the device."""
    device = choose_device(config.train.device)
    return Embedder(
        model=model.to(device=device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        labels=labels,
        input=resolve_input(config.input, model),
        device=device,
        dtype=choose_precision(config.train.precision, device),
        batch_size=config.train.eval_batch_size,
        workers=count_workers(config.train.workers),
    )


def resolve_input(config: InputConfig, model: Model) -> InputConfig:
    """The input's options with the backbone's normalisation where none is given."""
    return replace(
        config,
        mean=config.mean or model.backbone.mean,
        std=config.std or model.backbone.std,
    )


def evaluate_dataset(
    embedder: Embedder, evaluator: Evaluator, dataset: Dataset
) -> tuple[dict[str, Any], Embeddings, Embeddings]:
    """The figures of a model on a data set, with the query's and the gallery's features."""
    query = embedder.embed(dataset.query, "query")
    gallery = embedder.embed(dataset.gallery, "gallery")
    return evaluator.evaluate(query, gallery), query, gallery


# --------------------------------------------------------------------- from a checkpoint


def open_checkpoint(
    ckpt: str | Path, *layers: Layer, flags: Sequence[str] = ()
) -> tuple[Checkpoint, Config]:
    """A checkpoint, and its configuration under the given layers and flags."""
    checkpoint = load_checkpoint(ckpt)
    return checkpoint, load_config(checkpoint.config, *layers, flags=flags)


def restore_embedder(checkpoint: Checkpoint, config: Config) -> Embedder:
    """The model of a checkpoint, ready to embed.

    Raises:
        CheckpointError: The weights do not fit the configured model.
    """
    model = build_model(config, checkpoint.labels)
    load_weights(model, checkpoint.model)
    preprocessing = checkpoint.preprocessing
    input_config = replace(
        config.input,
        mean=config.input.mean or preprocessing["mean"],
        std=config.input.std or preprocessing["std"],
    )
    return make_embedder(model, checkpoint.labels, replace(config, input=input_config))


def load_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        CheckpointError: It does not; the line shows the first keys with their shapes.
    """
    own = model.state_dict()
    wrong = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    wrong += [f"{key} missing" for key in own if key not in state]
    wrong += [f"{key} unknown" for key in state if key not in own]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the checkpoint does not fit the configured model: {', '.join(wrong[:3])}{more}"
        )
    model.load_state_dict(state)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation with what it was made from, for reports.

    Args:
        figures: The figures, fractions 0..1.
        query: The query's features.
        gallery: The gallery's features.
        evaluator: What ranked them.
        options: The evaluator's options, `name` among them.
        about: What was evaluated, for people: label to text.
    """

    figures: dict[str, Any]
    query: Embeddings
    gallery: Embeddings
    evaluator: Evaluator
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


def evaluate_checkpoint(checkpoint: Checkpoint, config: Config) -> Evaluation:
    """Evaluate a checkpoint on the data set of a configuration."""
    dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
    evaluator = EVALUATORS.build(config.evaluator.name, **config.evaluator.options)
    for note in evaluator.check_ids(dataset.query, dataset.gallery):
        logger.info("note: %s", note)
    embedder = restore_embedder(checkpoint, config)
    figures, query, gallery = evaluate_dataset(embedder, evaluator, dataset)
    options = {"name": config.evaluator.name, **config.evaluator.options}
    return Evaluation(figures, query, gallery, evaluator, options, _about(checkpoint, config))


def _about(checkpoint: Checkpoint, config: Config) -> dict[str, str]:
    height, width = config.input.size
    root = config.dataset.options.get("root")
    return {
        "Data set": config.dataset.name + (f" in {root}" if root else ""),
        "Model": f"{config.backbone.name} + {config.head.name}, input {height} x {width}, "
        f"after {checkpoint.epoch} epochs",
    }


def evaluate(
    ckpt: str | Path,
    *layers: Layer,
    flags: Sequence[str] = (),
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint; it needs nothing but the file and the data.

    Args:
        ckpt: The checkpoint's file.
        layers: Overrides of its configuration, as for `load_config`.
        flags: Overrides as flags.
        output_dir: Where metrics.json goes; None writes nothing.

    Returns:
        The figures, fractions 0..1.
    """
    figures = evaluate_checkpoint(*open_checkpoint(ckpt, *layers, flags=flags)).figures
    if output_dir is not None:
        write_metrics(figures, Path(output_dir) / "metrics.json")
    return figures


def run_folder_of(ckpt: Path) -> Path:
    """The folder of the run that a checkpoint belongs to, by where the file lies."""
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else ckpt.parent


def evaluate_features(
    query: str | Path, gallery: str | Path, evaluator: Evaluator
) -> dict[str, Any]:
    """The figures of features from any system, in .npz files as `extract` writes them."""
    return evaluator.evaluate(load_features(query), load_features(gallery))


def write_metrics(figures: dict[str, Any], path: Path) -> None:
    """Write figures as JSON; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def extract(
    ckpt: str | Path,
    *layers: Layer,
    split: str | None = None,
    images: str | Path | None = None,
    flags: Sequence[str] = (),
) -> Embeddings:
    """The features of a split of the configured data set, or of a folder of images.

    Args:
        ckpt: The checkpoint's file.
        layers: Overrides of its configuration.
        split: train, query or gallery.
        images: A folder, searched with its sub-folders; pids and camids are then -1.
        flags: Overrides as flags.

    Raises:
        ConfigError: Not exactly one of split and images is given.
    """
    return extract_checkpoint(
        *open_checkpoint(ckpt, *layers, flags=flags), split=split, images=images
    )


def extract_checkpoint(
    checkpoint: Checkpoint, config: Config, *, split: str | None, images: str | Path | None
) -> Embeddings:
    """As `extract`, of a checkpoint that is read and a configuration that is resolved."""
    if (split is None) == (images is None):
        raise ConfigError("extract: give either a split (train, query, gallery) or images DIR")
    if images is not None:
        samples, what = folder_samples(Path(images)), str(images)
    else:
        if split not in ("train", "query", "gallery"):
            raise ConfigError(f"extract: {split!r} is no split; it is train, query or gallery")
        dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
        samples, what = list(getattr(dataset, split)), str(split)
    return restore_embedder(checkpoint, config).embed(samples, what)


def folder_samples(folder: Path) -> list[Sample]:
    """Every image below a folder, sorted; pid and camid are not known and stand as -1."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [Sample(str(path), -1, -1) for path in paths]


def save_features(embeddings: Embeddings, path: str | Path) -> None:
    """Write features as .npz: features (N, D) float32, pids, camids (N,) int64, paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            features=embeddings.features.numpy().astype(np.float32),
            pids=embeddings.pids.numpy(),
            camids=embeddings.camids.numpy(),
            paths=np.array(embeddings.paths, dtype=np.str_),
        )
    os.replace(partial, path)


def load_features(path: str | Path) -> Embeddings:
    """Read features that `save_features`, or any other system, wrote.

    Raises:
        DataError: The file is missing, damaged, lacks an array, or the arrays do not go together.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError(f"no feature file at {path}") from error
    except Exception as error:  # numpy raises whatever the zip or the array parser did
        raise DataError(f"{path} is no .npz file of plain arrays ({error})") from error
    missing = [name for name in ("features", "pids", "camids") if name not in arrays]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or '-'}")
    features = arrays["features"]
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.number):
        raise DataError(
            f"{path}: features are {features.dtype} {features.shape}, not (N, D) numbers"
        )
    lengths = {name: len(arrays[name]) for name in ("features", "pids", "camids")}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{path}: the arrays differ in length: {lengths}")
    return Embeddings(
        torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)),
        torch.from_numpy(arrays["pids"].astype(np.int64)),
        torch.from_numpy(arrays["camids"].astype(np.int64)),
        tuple(arrays["paths"].tolist()) if "paths" in arrays else (),
    )
