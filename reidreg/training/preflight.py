"""Before the first epoch: does a step fit into memory, and does an evaluation run to its end?

A run must not die after an hour of what could be seen in a second. Nothing here changes the run:
the same bits come out with `train.preflight` or without it.
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
from reidreg.training.step_memory import Memory, Trial, missing_state, undisturbed
from reidreg.values import JUNK, Embeddings, Sample

_T = TypeVar("_T")

_NEEDED = ("mAP", "mINP", "rank1")  # by which `best` is chosen, and what is said of it
# One query of each of a few people, with what an evaluation may meet: matches by other cameras and
# by the same one, other people, junk.
_PEOPLE, _OTHER_CAMERAS, _SAME_CAMERA, _OTHERS = 8, 2, 1, 8


def preflight(run: Run) -> None:
    """Look at what would end a run later.

    Raises:
        DeviceError: A step does not fit into the device's memory.
        ReidregError: The evaluation cannot succeed.
    """
    memory = memory_of(run.embedder.device)
    if memory is not None:
        check_memory(run, memory)
    try:
        rehearse_evaluation(run, run.validation)
        if run.validation is not run.dataset:  # it waits for the end of the run
            rehearse_evaluation(run, run.dataset)
    except torch.OutOfMemoryError as error:
        raise DeviceError(describe_shortage(run.embedder.device)) from error


# --------------------------------------------------------------------- memory


def check_memory(run: Run, memory: Memory) -> None:
    """Make one step of a batch of noise, or of a part of one, and compare its peak with the memory.

    Raises:
        DeviceError: It does not fit; the line says how much is needed, free, and held by whom.
    """
    embedder = run.embedder
    trial = Trial(
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
        need = trial.need(pids, memory)
        fits = need <= memory.available()
    except torch.OutOfMemoryError:
        need, fits = None, False
    if not fits:
        if need is None and world().size == 1:  # others may be within a step that waits for this
            need = trial.reckon(pids, memory)
        memory.reset()
        raise DeviceError(describe_shortage(embedder.device, need))
    available = memory.available()
    memory.reset()  # so that the peak in the log is that of the run
    logger.info(
        "memory: a step needs %s of the %s at hand",
        size_in_text(need or 0),
        size_in_text(available),
    )


# --------------------------------------------------------------------- evaluation


def rehearse_evaluation(run: Run, data: Dataset) -> None:
    """Evaluate a handful of people, by the real embedder and evaluator; keep and log nothing.

    Args:
        run: The run.
        data: Whose query and gallery are to be evaluated later.

    Raises:
        ReidregError: What would have ended the first evaluation.
    """
    query, gallery = handful(data.query, data.gallery)
    with undisturbed(run.embedder.model):
        sides = [_finite(run.embedder.embed(side, "preflight")) for side in (query, gallery)]
        # As in `evaluate_dataset`: the first process has all features, and says what they give.
        figures = broadcast(_figures(run.evaluator, data, *sides) if world().is_main else {})
    missing = [key for key in _NEEDED if not isinstance(figures.get(key), float)]
    if missing:
        raise ConfigError(
            f"evaluator.name: {run.config.evaluator.name} gives no {', '.join(missing)} as a "
            "fraction, which the choice of the best checkpoint needs"
        )
    # As a real evaluation's are, to see that they can be.
    json.dumps(figures)
    log_figures("val", figures)
    describe_evaluation(figures, 0)


def handful(
    query: Sequence[Sample], gallery: Sequence[Sample]
) -> tuple[list[Sample], list[Sample]]:
    """A few queries, and gallery images among which each of them has a match by another camera.

    Where nobody was seen by two cameras, a match by the same camera has to do.
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
    people = spread(sorted(seen_again or matched), _PEOPLE)
    queries = [(seen_again or matched)[pid] for pid in people]
    chosen: list[Sample] = []
    for sample in queries:
        own = images[sample.pid]
        chosen += spread([other for other in own if other.camid != sample.camid], _OTHER_CAMERAS)
        chosen += spread([other for other in own if other.camid == sample.camid], _SAME_CAMERA)
    chosen += spread([sample for sample in gallery if sample.pid not in people], _OTHERS)
    # Without any match it is the evaluator that says so.
    return queries or spread(query, _PEOPLE), chosen


def spread(items: Iterable[_T], count: int) -> list[_T]:
    """At most so many items, at even distances from the first one on."""
    listed = list(items)
    taken = min(count, len(listed))
    return [listed[position * len(listed) // taken] for position in range(taken)]


def _finite(embeddings: Embeddings) -> Embeddings:
    """Embeddings, with noise for features that are not finite: that is for training to say."""
    if torch.isfinite(embeddings.features).all():
        return embeddings
    logger.warning("note: features are not finite before this training")
    return replace(embeddings, features=torch.randn_like(embeddings.features))


def _figures(
    evaluator: Evaluator, data: Dataset, query: Embeddings, gallery: Embeddings
) -> dict[str, Any]:
    """The evaluator's figures of a handful; of noise for all images where that is too few for it.

    An evaluator may need more than a handful. What it says of the real ids decides then: ranking
    noise takes no model, so it is far less than an evaluation.
    """
    try:
        return evaluator.evaluate(query, gallery)
    except Exception:
        width = query.features.shape[1]
        splits = data.query, data.gallery
        noise = [embeddings_of(split, torch.randn(len(split), width)) for split in splits]
        return evaluator.evaluate(*noise)
