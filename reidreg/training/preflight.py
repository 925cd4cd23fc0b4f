"""Checks before the first epoch: does a step fit in memory, and can an evaluation succeed?

So a run does not fail after an hour for a reason that shows in a second. The checks do not change
the run: it gives the same bits with `train.preflight` or without it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from reidreg.distributed.group import broadcast, world
from reidreg.errors import ConfigError, DeviceError
from reidreg.evaluation.figures import log_figures
from reidreg.evaluation.table import describe_evaluation
from reidreg.logs.console import logger
from reidreg.machine.gpu_memory import describe_shortage, memory_of
from reidreg.machine.memory import size_in_text
from reidreg.model.embedder import embeddings_of
from reidreg.parts.interfaces import Dataset, Evaluator
from reidreg.training.run import Run
from reidreg.training.step_memory import Memory, StepProbe, missing_state, restoring_state
from reidreg.values import JUNK, Embeddings, Sample

_T = TypeVar("_T")

_NEEDED = ("mAP", "mINP", "rank1")  # that choose the best checkpoint and are logged for it
# The sample evaluation: queries of different identities, gallery images of each from other cameras
# and from the query's own, and images of other identities, junk among them.
_QUERIES, _OTHER_CAMERAS, _SAME_CAMERA, _OTHERS = 8, 2, 1, 8


def preflight(run: Run) -> None:
    """Raise now the errors that would end a run later.

    Raises:
        DeviceError: A step does not fit into the device's memory.
        ReidregError: The evaluation cannot succeed.
    """
    memory = memory_of(run.embedder.device)
    if memory is not None:
        check_memory(run, memory)
    try:
        rehearse_evaluation(run, run.validation)
        if run.validation is not run.dataset:  # it is evaluated at the end of the run
            rehearse_evaluation(run, run.dataset)
    except torch.OutOfMemoryError as error:
        raise DeviceError(describe_shortage(run.embedder.device)) from error


# --------------------------------------------------------------------- memory


def check_memory(run: Run, memory: Memory) -> None:
    """Make one step of noise, of a batch or a part of one, and compare its peak with the memory.

    Raises:
        DeviceError: It does not fit; the line says how much is needed, how much is free, and which
            processes hold the rest.
    """
    embedder = run.embedder
    probe = StepProbe(
        run.model,
        run.objective,
        embedder.input.size,
        embedder.device,
        embedder.dtype,
        missing_state(run.optimizer, run.config.optimizer),
    )
    pids = run.loader.pids_of(next(iter(run.sampler)))
    pids = pids[: len(pids) // run.config.train.accumulate]
    need: int | None
    try:
        need = probe.need(pids, memory)
        fits = need <= memory.available()
    except torch.OutOfMemoryError:
        need, fits = None, False
    if not fits:
        if need is None and world().size == 1:  # others may be waiting for this one in a step
            need = probe.estimate(pids, memory)
        memory.reset()
        raise DeviceError(describe_shortage(embedder.device, need))
    available = memory.available()
    memory.reset()  # so that the peak in the log is the run's own
    logger.info(
        "memory: a step needs %s of the %s available",
        size_in_text(need or 0),
        size_in_text(available),
    )


# --------------------------------------------------------------------- evaluation


def rehearse_evaluation(run: Run, data: Dataset) -> None:
    """Evaluate a few images with the run's embedder and evaluator; write and log nothing.

    Args:
        run: The run.
        data: The data whose query and gallery will be evaluated later.

    Raises:
        ReidregError: The first evaluation would fail.
    """
    query, gallery = few_images(data.query, data.gallery)
    with restoring_state(run.embedder.model):
        sides = [_finite(run.embedder.embed(side, "preflight")) for side in (query, gallery)]
        # As in `evaluate_dataset`: rank 0 has all features, and sends the figures to the others.
        figures = broadcast(_figures(run.evaluator, data, *sides) if world().is_main else {})
    missing = [key for key in _NEEDED if not isinstance(figures.get(key), float)]
    if missing:
        raise ConfigError(
            f"evaluator.name: {run.config.evaluator.name} gives no {', '.join(missing)} as a "
            "fraction, which the choice of the best checkpoint needs"
        )
    # A real evaluation's figures go through the same functions.
    json.dumps(figures)
    log_figures("val", figures)
    describe_evaluation(figures, 0)


def few_images(
    query: Sequence[Sample], gallery: Sequence[Sample]
) -> tuple[list[Sample], list[Sample]]:
    """A few queries, and gallery images in which each of them has a match by another camera.

    If no identity was seen by two cameras, matches by the same camera are taken.
    """
    images: dict[int, list[Sample]] = defaultdict(list)
    for sample in gallery:
        images[sample.pid].append(sample)
    seen_again: dict[int, Sample] = {}
    matched: dict[int, Sample] = {}
    for sample in query:
        if sample.pid != JUNK and sample.pid in images:
            matched.setdefault(sample.pid, sample)
            if any(other.camid != sample.camid for other in images[sample.pid]):
                seen_again.setdefault(sample.pid, sample)
    pids = spread(sorted(seen_again or matched), _QUERIES)
    queries = [(seen_again or matched)[pid] for pid in pids]
    chosen: list[Sample] = []
    for sample in queries:
        own = images[sample.pid]
        chosen += spread([other for other in own if other.camid != sample.camid], _OTHER_CAMERAS)
        chosen += spread([other for other in own if other.camid == sample.camid], _SAME_CAMERA)
    chosen += spread([sample for sample in gallery if sample.pid not in pids], _OTHERS)
    # If there is no match at all, the evaluator raises the error.
    return queries or spread(query, _QUERIES), chosen


def spread(items: Iterable[_T], count: int) -> list[_T]:
    """At most `count` items, at even distances from the first one on."""
    listed = list(items)
    taken = min(count, len(listed))
    return [listed[position * len(listed) // taken] for position in range(taken)]


def _finite(embeddings: Embeddings) -> Embeddings:
    """The embeddings, or noise for features that are not finite: training will report those."""
    if torch.isfinite(embeddings.features).all():
        return embeddings
    logger.warning("note: features are not finite before this training")
    return replace(embeddings, features=torch.randn_like(embeddings.features))


def _figures(
    evaluator: Evaluator, data: Dataset, query: Embeddings, gallery: Embeddings
) -> dict[str, Any]:
    """The evaluator's figures for a few images, or for noise if those are too few for it.

    If it fails, it is run again with all ids and noise for features. That needs no model, so it
    takes far less time than an evaluation.
    """
    try:
        return evaluator.evaluate(query, gallery)
    except Exception:
        width = query.features.shape[1]
        splits = data.query, data.gallery
        noise = [embeddings_of(split, torch.randn(len(split), width)) for split in splits]
        return evaluator.evaluate(*noise)
