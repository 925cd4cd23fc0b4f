"""A gallery to search in: features, whose they are, and a way to the nearest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reidreg.errors import ConfigError, DataError
from reidreg.index.approximate import (
    Report,
    Settings,
    add_candidates,
    build_candidates,
    candidates,
    choose_type,
    ladder,
)
from reidreg.index.files import Contents, Items, read_contents, write_contents
from reidreg.locking import exclusive
from reidreg.logs.console import logger
from reidreg.retrieval.distances import Features, FloatArray, IntArray, Side, check_at_least
from reidreg.retrieval.index_search import (
    BruteForce,
    Float32Array,
    Mask,
    Space,
    Vectors,
    checked_side,
    exact_search,
    measured,
)
from reidreg.values import Embeddings

RECALL_AT = 10
_SAMPLED = 1000  # items that recall is measured with
_BUSY = "wait until it is done"


@dataclass(frozen=True, slots=True)
class Recall:
    """How much of what exact search finds an approximate one does.

    It is measured with items of the index, and without leaving out a camera: an image that is not
    in the index finds a little less, and so does a search that leaves out many of the nearest.

    Args:
        wanted: The recall that the settings were chosen for.
        reached: The share of the exact `k` nearest that is found, or that is as near.
        k: Neighbours of each item, itself left out.
        queries: Items that were searched with, drawn from the index.
        items: Items that the index held then.
    """

    wanted: float
    reached: float
    k: int
    queries: int
    items: int


@dataclass(frozen=True, slots=True)
class FeatureModel:
    """What made the features of an index.

    Args:
        ckpt: The checkpoint's file, as an absolute path.
        digest: A SHA-256 of its weights and of the options that features depend on.
        config: The configuration that it was used with.
    """

    ckpt: str
    digest: str
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Threshold:
    """From where on two images are taken for the same person.

    Args:
        value: A cosine similarity, at or above which, or a squared Euclidean distance, at or
            below which they are.
        far: The false-accept rate that it was chosen for, or None.
    """

    value: float
    far: float | None = None


class GalleryIndex:
    """A gallery that is searched often: build, add, search, save, load.

    `flat` compares with every item, and is exact. The other types find candidates faster and may
    miss some; what they find is put in order by exact distances all the same, and their recall
    against exact search is measured when they are built. Of two items at equal distance the earlier
    one is nearer.

        index = GalleryIndex.build(extract(ckpt, split="gallery"))
        numbers, scores = index.search(features, k=10)
        index.save("gallery")

    Args:
        index_type: `flat`, `ivf`, `hnsw` or `pq`.
        space: How features are compared.
        vectors: The features as they were given.
        items: Whose they are.
        candidates: What an approximate index finds its candidates with.
        settings: How thoroughly it searches.
        recall: What was measured, for an approximate index.
        model: What made the features, where that is known.
        threshold: From where on two images show the same person, where that is known.
    """

    def __init__(
        self,
        index_type: str,
        space: Space,
        vectors: Vectors,
        items: Items,
        *,
        candidates: Any = None,
        settings: Settings | None = None,
        recall: Recall | None = None,
        model: FeatureModel | None = None,
        threshold: Threshold | None = None,
    ) -> None:
        self.index_type = index_type
        self.items = items
        self.settings = settings or {}
        self.recall = recall
        self.model = model
        self.threshold = threshold
        self._candidates = candidates
        self._force = BruteForce(vectors, space, keep=candidates is None)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def dim(self) -> int:
        """Numbers of a feature."""
        return self._force.vectors.dim

    @property
    def metric(self) -> str:
        """`cosine` or `euclidean` (squared)."""
        return self._force.space.metric

    # ----------------------------------------------------------------- building

    @classmethod
    def build(
        cls,
        gallery: Embeddings,
        *,
        index_type: str = "auto",
        metric: str = "cosine",
        recall: float = 0.95,
        model: FeatureModel | None = None,
        threshold: Threshold | None = None,
        progress: Report | None = None,
    ) -> GalleryIndex:
        """Build an index, and measure its recall if it is an approximate one.

        The same gallery gives the same index, on the same machine with as many threads. All items
        are indexed, junk (pid -1) too: `without_junk` leaves it out.

        Args:
            gallery: N embeddings; features in float32 are shared, not copied.
            index_type: `flat`, `ivf`, `hnsw`, `pq`, or `auto`, as `approximate.choose_type` says.
            metric: `cosine` or `euclidean` (squared).
            recall: The share of the 10 nearest that is to be found, 0..1; decides how thoroughly
                an approximate index searches.
            model: What made the features.
            threshold: From where on two images show the same person.
            progress: Told how many items are in, and of how many.

        Raises:
            DataError: The gallery is empty, or a feature is not finite or, for cosine, zero.
            ConfigError: An option is wrong.
        """
        _check_recall(recall)
        features, side = _checked("gallery", gallery, metric)
        space, vectors = Space.of(metric, side), Vectors([features])
        kind = choose_type(index_type, len(features), vectors.dim, recall)
        if index_type not in ("auto", kind):
            logger.info(
                "%d items are too few to train %s; the index is flat", len(features), index_type
            )
        report = progress or _silent
        found = None if kind == "flat" else build_candidates(kind, vectors, space, report)
        index = cls(
            kind,
            space,
            vectors,
            _items(gallery, 0),
            candidates=found,
            model=model,
            threshold=threshold,
        )
        index.tune(recall)
        return index

    def add(
        self,
        gallery: Embeddings,
        *,
        model: FeatureModel | None = None,
        progress: Report | None = None,
    ) -> None:
        """Put further items behind those that are there.

        An approximate index keeps its cells and settings; `tune` measures its recall again.

        Args:
            gallery: Embeddings from the same model.
            model: What made them.
            progress: Told how many items are in, and of how many.

        Raises:
            DataError: They are of another width or model, or not finite, or far longer.
        """
        self.check_model(model)
        features, side = _checked("gallery", gallery, self.metric)
        self._check_dim("gallery", features.shape[1])
        before = self._force
        space, vectors = before.space.with_items(side), before.vectors.followed_by(features)
        space.float32(side, slice(None))  # before anything is changed
        if self._candidates is not None:
            add_candidates(self._candidates, Vectors([features]), space, progress or _silent)
        self._force = before.extended(vectors, space, features)
        self.items = self.items.followed_by(_items(gallery, len(self.items)))

    def tune(self, recall: float | None = None) -> None:
        """Choose how thoroughly an approximate index searches, and measure its recall.

        The quickest settings that reach the recall are taken; if none does, the most thorough ones,
        with a warning. An exact index stays as it is.

        Args:
            recall: 0..1; None takes the one that was wanted before.
        """
        wanted = recall if recall is not None else (self.recall.wanted if self.recall else 0.95)
        _check_recall(wanted)
        if self._candidates is None or len(self) < 2:
            return
        rows = np.random.default_rng(0).permutation(len(self))[:_SAMPLED]
        k = min(RECALL_AT, len(self) - 1)
        raw = self._force.vectors.take(rows)
        queries = self._side("item", raw)
        truth = _others(exact_search(queries, raw, self._force, k + 1), rows)[:, k - 1]
        reached = 0.0
        for settings in ladder(self._candidates):
            found = self._measured(queries, raw, k + 1, settings, None)
            near = _others(found, rows)[:, :k] <= truth[:, None]
            self.settings, reached = settings, float(near.mean())
            if reached >= wanted:
                break
        self.recall = Recall(wanted, reached, k, len(rows), len(self))
        if reached < wanted:
            logger.warning(
                "%s reaches a recall@%d of %.3f at most, not %g; `flat` is exact",
                self.index_type,
                k,
                reached,
                wanted,
            )

    # ----------------------------------------------------------------- searching

    def search(
        self,
        features: Features,
        k: int = 10,
        exclude_camids: Sequence[int] | Tensor | None = None,
        *,
        paths: Sequence[str] = (),
    ) -> tuple[Tensor, Tensor]:
        """The k nearest items of each query.

        Args:
            features: (Q, D), from the model that made the index's features.
            k: The length of the lists; more than there are items gives all of them.
            exclude_camids: (Q,) cameras, one for each query, whose items are left out. In an
                evaluation only items of the query's own identity are left out for its camera; here
                nobody knows that identity, so that all of the camera's are.
            paths: Q names, for errors.

        Returns:
            Numbers of items (Q, min(k, N)) int64, and scores, (Q, min(k, N)) float32: cosine
            similarities, falling, or squared Euclidean distances, rising. Where a camera is left
            out there may be fewer items; then the numbers are -1 and the scores infinite.

        Raises:
            DataError: The features are of another width, not finite or, for cosine, zero.
            ConfigError: k is less than 1.
        """
        check_at_least("k", k, 1)
        queries = self._side("query", features, paths)
        self._check_dim("query", queries.features.shape[1])
        raw = queries.features.to(torch.float32).numpy()
        width = min(k, len(self))
        items = np.full((len(raw), width), -1, dtype=np.int64)
        distances = np.full((len(raw), width), np.inf)
        for rows, allowed in self._groups(len(raw), exclude_camids):
            side = self._side("query", raw[rows]) if allowed is not None else queries
            distances[rows], items[rows] = self._search(side, raw[rows], width, allowed)
        return torch.from_numpy(items), torch.from_numpy(self._force.space.scores(distances))

    def passes(self, scores: Tensor, threshold: float) -> Tensor:
        """Which scores are those of the same person by a threshold, as `search` gives them."""
        return scores >= threshold if self.metric == "cosine" else scores <= threshold

    def _groups(
        self, count: int, camids: Sequence[int] | Tensor | None
    ) -> list[tuple[IntArray, Mask | None]]:
        """Queries that may find the same items, with those."""
        if camids is None:
            return [(np.arange(count), None)]
        cameras = np.asarray(camids)
        if cameras.shape != (count,):
            raise DataError(f"there are {count} queries, but {cameras.shape} cameras to leave out")
        return [
            (np.flatnonzero(cameras == camid), self.items.camids != camid)
            for camid in np.unique(cameras)
        ]

    def _search(
        self, queries: Side, raw: Float32Array, k: int, allowed: Mask | None
    ) -> tuple[FloatArray, IntArray]:
        if self._candidates is None:
            return exact_search(queries, raw, self._force, k, allowed)
        distances, items = self._measured(queries, raw, k, self.settings, allowed)
        # A graph or a few cells may hold fewer of the allowed items than there are.
        wanted = k if allowed is None else min(k, int(np.count_nonzero(allowed)))
        short = np.flatnonzero((items[:, :wanted] < 0).any(axis=1))
        if len(short):
            side = self._side("query", raw[short])
            found = exact_search(side, raw[short], self._force, k, allowed)
            distances[short], items[short] = found
        return distances, items

    def _measured(
        self, queries: Side, raw: Float32Array, k: int, settings: Settings, allowed: Mask | None
    ) -> tuple[FloatArray, IntArray]:
        """The nearest of an approximate index's candidates, (Q, k), in exact order."""
        space, vectors = self._force.space, self._force.vectors
        prepared = space.float32(queries, slice(None))
        found = candidates(self._candidates, prepared, k, settings, allowed)
        distances, items = measured(raw, vectors, found, space.metric)
        return distances[:, :k].copy(), items[:, :k].copy()

    # ----------------------------------------------------------------- files

    def save(self, folder: str | Path) -> None:
        """Write the index; a folder that holds one gets this one instead, in one step.

        Raises:
            DataError: The folder cannot be written to, or the disk is full.
            ConfigError: Another process is writing there.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write the index {folder}: {error.strerror}") from error
        with exclusive(folder, "index", _BUSY):
            write_contents(folder, self._contents())

    @classmethod
    def load(cls, folder: str | Path) -> GalleryIndex:
        """Read an index; its features are mapped from the disk.

        Raises:
            DataError: There is none, or it is damaged, of a newer format, or none of reidreg.
        """
        contents = read_contents(Path(folder))
        facts, vectors, items = contents.facts, contents.vectors, contents.items
        try:
            index = cls(
                facts["type"],
                Space(facts["metric"], facts["scale"], facts["longest"]),
                vectors,
                items,
                candidates=contents.candidates,
                settings=facts["parameters"],
                recall=_read_as(Recall, facts["recall"]),
                model=_read_as(FeatureModel, facts["model"]),
                threshold=_read_as(Threshold, facts["threshold"]),
            )
            held = index._candidates.ntotal if index._candidates is not None else len(vectors)
            counts = {len(items.camids), len(items.paths), len(vectors), held, facts["items"]}
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder} is no index that this reidreg reads: {error!r}") from error
        if counts != {len(items)}:
            raise DataError(f"the files of the index {folder} do not go together; build it anew")
        return index

    def facts(self) -> dict[str, Any]:
        """What there is to say about the index, as its manifest says it."""
        space = self._force.space
        return {
            "type": self.index_type,
            "metric": self.metric,
            "items": len(self),
            "dim": self.dim,
            "scale": space.scale,
            "longest": space.longest,
            "parameters": self.settings,
            "recall": asdict(self.recall) if self.recall else None,
            "model": asdict(self.model) if self.model else None,
            "threshold": asdict(self.threshold) if self.threshold else None,
        }

    def check_model(self, model: FeatureModel | None) -> None:
        """Refuse features of another model than the index's, where both are known.

        Raises:
            DataError: They are of another.
        """
        if model is not None and self.model is not None and model.digest != self.model.digest:
            raise DataError(
                f"{model.ckpt} is another model, or has other options, than what made the index "
                f"({self.model.ckpt}); their features cannot be compared"
            )

    def _contents(self) -> Contents:
        return Contents(self.facts(), self._force.vectors, self.items, self._candidates)

    def _check_dim(self, name: str, dim: int) -> None:
        if dim != self.dim:
            raise DataError(
                f"{name} features have {dim} values each, those of the index have {self.dim}; "
                "both must come from the same model"
            )

    def _side(self, name: str, features: Features, paths: Sequence[str] = ()) -> Side:
        return self._force.space.side(name, features, paths)


def add_to_index(
    folder: str | Path,
    gallery: Embeddings,
    *,
    model: FeatureModel | None = None,
    progress: Report | None = None,
) -> GalleryIndex:
    """Put further items into an index on disk; nobody else writes there meanwhile.

    Its recall is measured again.

    Raises:
        DataError: As for `GalleryIndex.load` and `add`.
        ConfigError: Another process is writing there.
    """
    folder = Path(folder)
    GalleryIndex.load(folder)  # before a lock's file is made where there is no index
    with exclusive(folder, "index", _BUSY):
        index = GalleryIndex.load(folder)
        index.add(gallery, model=model, progress=progress)
        index.tune()
        write_contents(folder, index._contents())
    return index


def without_junk(gallery: Embeddings) -> Embeddings:
    """A gallery without its junk (pid -1), which nobody looks for.

    Where no pid is known all of them are -1, as for a folder of images: then nothing is left out.
    """
    known = gallery.pids != -1
    if not bool(known.any()) or bool(known.all()):
        return gallery
    paths = tuple(path for path, keep in zip(gallery.paths, known.tolist(), strict=False) if keep)
    return replace(
        gallery,
        features=gallery.features[known],
        pids=gallery.pids[known],
        camids=gallery.camids[known],
        paths=paths,
    )


def _checked(name: str, gallery: Embeddings, metric: str) -> tuple[Float32Array, Side]:
    """Features as float32, checked."""
    features = gallery.features.detach().to("cpu", torch.float32).contiguous()
    side = checked_side(name, features, metric, gallery.paths)
    counts = {len(features), len(gallery.pids), len(gallery.camids)}
    if len(counts) > 1 or len(gallery.paths) not in (0, len(features)):
        raise DataError(
            f"{name}: {len(features)} features, {len(gallery.pids)} pids, "
            f"{len(gallery.camids)} camids and {len(gallery.paths)} paths do not go together"
        )
    return features.numpy(), side


def _items(gallery: Embeddings, first: int) -> Items:
    """Whose the features are; an item without a path is named by its number."""
    numbers = range(first, first + len(gallery.pids))
    paths = gallery.paths or tuple(f"#{number}" for number in numbers)
    if any("\0" in path for path in paths):
        raise DataError("a path holds a NUL character, which no file name does")
    return Items(
        gallery.pids.cpu().numpy().astype(np.int64),
        gallery.camids.cpu().numpy().astype(np.int64),
        paths,
    )


def _others(found: tuple[FloatArray, IntArray], rows: IntArray) -> FloatArray:
    """The distances (Q, k) to items other than the query itself, in order."""
    distances, items = found
    return np.sort(np.where(items == rows[:, None], np.inf, distances), axis=1)


def _check_recall(recall: float) -> None:
    if not 0 < recall <= 1:
        raise ConfigError(f"recall: {recall} is no share; it is above 0 and at most 1")


def _read_as(cls: type[Any], values: dict[str, Any] | None) -> Any:
    return None if values is None else cls(**values)


def _silent(done: int, total: int) -> None:
    """Nobody watches."""
