"""Whole runs compared with the reference system: initial weights, tens of steps, and ranking."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import reference_system
from reference_system import Recipe, ReferenceModel, ReferenceTrainer
from reidreg import Config, Sample, fit, load_checkpoint, load_config
from reidreg.model.model import Model
from reidreg.training.initial_weights import start_weights
from reidreg.training.run import Run, build_run

EPOCHS = 4
CENTER = {"losses.center": {"name": "center", "weight": 5e-4}}
SHUFFLED = {"sampler": {"name": "random", "batch_size": 8}}

# A recipe of the reference, and the same in reidreg's configuration.
RECIPES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "softmax_triplet": (Recipe(), {}),
    "center": (Recipe(losses=("cross_entropy", "triplet", "center")), CENTER),
    "sgd": (
        Recipe(optimizer="sgd", lr=0.01, bias_lr_factor=2.0, bias_weight_decay=0.0),
        {
            "optimizer": {"name": "sgd", "lr": 0.01, "bias_lr_factor": 2.0},
            "optimizer.bias_weight_decay": 0.0,
        },
    ),
    "softmax": (
        Recipe(losses=("cross_entropy",), label_smoothing=0.0),
        {**SHUFFLED, "losses.triplet.weight": 0, "losses.id.label_smoothing": 0.0},
    ),
    "triplet": (Recipe(losses=("triplet",)), {"losses.id.weight": 0}),
}


@contextlib.contextmanager
def arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Everything that is built and computed has this dtype; pixels, which are float32, are cast."""

    def cast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0].to(dtype), *inputs[1:]) if isinstance(module, Model) else None

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with register_module_forward_pre_hook(cast):
            yield
    finally:
        torch.set_default_dtype(before)


def configure(aihub_root: Path, output: Path, changes: dict[str, Any]) -> Config:
    layers: dict[str, Any] = {
        "dataset.root": str(aihub_root),
        "input": {"size": [32, 16], "padding": 2},
        "sampler": {"batch_size": 8, "instances": 4},
        "backbone": {"name": "resnet18", "pretrained": "none"},
        "schedule": {"milestones": [2, 3], "warmup_epochs": 2},
        "train": {"epochs": EPOCHS, "workers": 0, "precision": "fp32", "preflight": False},
        "wandb.mode": "disabled",
        "output_dir": str(output),
    }
    return load_config("aihub_kaist", layers, changes)


def the_reference(run: Run, recipe: Recipe) -> ReferenceTrainer:
    """The reference with our initial weights, after the steps of all epochs."""
    # The centres of center loss are initial weights, too.
    centers = run.objective.state_dict().get("terms.term_center.centers")
    labels = len(run.embedder.labels.pids)
    trainer = ReferenceTrainer(recipe, labels, run.model.state_dict(), centers)
    for epoch in range(EPOCHS):
        for batch in run.loader.epoch(epoch):
            images = batch.images.contiguous().to(torch.get_default_dtype())
            trainer.step(images, batch.pids, epoch + 1)
    return trainer


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference of two tensors, relative to the expected one's norm."""
    gap = (found.double() - expected.double()).norm()
    return float(gap / expected.double().norm().clamp(min=1e-12))


def ids_of(query: list[Sample], gallery: list[Sample]) -> dict[str, Any]:
    return {
        f"{side}_{field}s": np.array([getattr(sample, field) for sample in samples])
        for side, samples in (("query", query), ("gallery", gallery))
        for field in ("pid", "camid")
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_whole_run_gives_the_references_weights_and_figures(
    name: str, aihub_root: Path, tmp_path: Path
) -> None:
    recipe, changes = RECIPES[name]
    config = configure(aihub_root, tmp_path / "run", changes)
    with arithmetic(torch.float64):
        run = build_run(config)
        start_weights(run, None)
        reference = the_reference(run, recipe)
        figures = fit(config)
        checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
        assert checkpoint.step >= 20

        expected = reference.model.state_dict()
        assert checkpoint.model.keys() == expected.keys()
        bound = 1e-9  # rounding errors grow from step to step, from 1e-16 by some powers of ten
        far = {key for key in expected if distance(checkpoint.model[key], expected[key]) > bound}
        assert not far
        if reference.centers is not None:
            assert checkpoint.training is not None
            centers = checkpoint.training["objective"]["terms.term_center.centers"]
            assert distance(centers, reference.centers.detach()) < bound

        # The features of both models, from the same pixels; they are float32's at best.
        query, gallery = list(run.dataset.query), list(run.dataset.gallery)
        run.model.load_state_dict(checkpoint.model)
        features = [run.embedder.embed(samples, "ours").features for samples in (query, gallery)]
        run.model.load_state_dict(expected)
        theirs = [run.embedder.embed(samples, "theirs").features for samples in (query, gallery)]
    assert all(distance(*pair) < 1e-6 for pair in zip(features, theirs, strict=True))
    mean_ap, cmc = reference_system.evaluate(
        theirs[0].double().numpy(), theirs[1].double().numpy(), ids_of(query, gallery)
    )
    assert figures["mAP"] == pytest.approx(mean_ap, abs=1e-6)
    assert figures["cmc"][:10] == pytest.approx(cmc, abs=1e-6)


@pytest.mark.parametrize("name", ["softmax_triplet", "sgd"])
def test_a_run_in_float32_is_as_near_to_float64_as_the_reference_is(
    name: str, aihub_root: Path, tmp_path: Path
) -> None:
    # Twenty steps on batches of 8 make 1e-2 of 1e-7, so two systems differ by more than a bound.
    recipe, changes = RECIPES[name]
    config = configure(aihub_root, tmp_path / "run", changes)
    with arithmetic(torch.float32):
        run = build_run(config)
        start_weights(run, None)
        theirs = the_reference(run, recipe).model.state_dict()
        with arithmetic(torch.float64):
            exact = the_reference(run, recipe).model.state_dict()
        fit(config)
    ours = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").model
    assert ours.keys() == exact.keys()
    assert distance(joined(ours), joined(exact)) < 4 * distance(joined(theirs), joined(exact))


def joined(state: Mapping[str, Tensor]) -> Tensor:
    """All tensors as one vector: those that have hardly left zero are rounding errors alone."""
    return torch.cat([state[key].double().flatten() for key in sorted(state)])


def test_initial_weights_have_the_references_distributions(
    aihub_root: Path, tmp_path: Path
) -> None:
    run = build_run(configure(aihub_root, tmp_path / "run", {}))
    start_weights(run, None)
    ours = run.model.state_dict()
    theirs = ReferenceModel(len(run.embedder.labels.pids)).state_dict()
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        found = ours[key]
        if expected.dim() < 2:  # gains, biases and running statistics are not random
            assert torch.equal(found, expected), key
            continue
        spread = float(expected.std())
        error = spread / found.numel() ** 0.5
        assert abs(float(found.mean())) < 5 * error, key
        assert float(found.std()) == pytest.approx(spread, abs=5 * error), key
        # The same distribution, not only the same deviation: a uniform one is bounded.
        assert float(found.abs().max()) == pytest.approx(float(expected.abs().max()), rel=0.35), key
