"""A gallery index: build it from embeddings, add to it, search it, save and load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reidreg.errors import DataError
from reidreg.files import exclusive
from reidreg.index.approximate import Candidates, Progress, Settings, build_candidates, choose_type
from reidreg.index.embeddings import checked_features, items_of
from reidreg.index.files import Contents, Items, read_contents, write_contents
from reidreg.index.records import FeatureModel, Recall, Threshold, record_of
from reidreg.index.search import IndexSearch, groups_by_camera
from reidreg.index.tuning import check_recall, tune
from reidreg.logs.console import logger
from reidreg.retrieval.index_search import Space, Vectors
from reidreg.retrieval.options import check_at_least
from reidreg.retrieval.vectors import Features
from reidreg.values import Embeddings

_BUSY = "wait until it is done"


class GalleryIndex:
    """A gallery that is searched often: build, add, search, save, load.

    `flat` compares a query with every item and is exact. The other types find candidates faster and
    may miss some neighbours; candidates are ordered by exact distances, and the recall against
    exact search is measured when the index is built. Of two items at equal distance the earlier one
    ranks first.

        index = GalleryIndex.build(extract(ckpt, split="gallery"))
        numbers, scores = index.search(features, k=10)
        index.save("gallery")

    Args:
        index_type: `flat`, `ivf`, `hnsw` or `pq`.
        space: How features are compared.
        vectors: The features as they were given.
        items: Their pids, camids and paths.
        candidates: The faiss index that finds candidates, for an approximate index.
        settings: How thoroughly it is searched.
        recall: The recall that was measured, for an approximate index.
        model: The model that extracted the features, if known.
        threshold: The score from which two images count as the same person, if known.
    """

    def __init__(
        self,
        index_type: str,
        space: Space,
        vectors: Vectors,
        items: Items,
        *,
        candidates: Candidates | None = None,
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
        self._search = IndexSearch(vectors, space, candidates)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def dim(self) -> int:
        """The length of a feature."""
        return self._search.vectors.dim

    @property
    def metric(self) -> str:
        """`cosine` or `euclidean` (squared)."""
        return self._search.space.metric

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
        progress: Progress | None = None,
    ) -> GalleryIndex:
        """Build an index, and measure its recall if it is approximate.

        The same gallery gives the same index on the same machine with the same number of threads.
        All items are indexed, junk (pid -1) included; `Embeddings.without_junk` removes it.

        Args:
            gallery: N embeddings; float32 features are shared, not copied.
            index_type: `flat`, `ivf`, `hnsw`, `pq`, or `auto` (see `approximate.choose_type`).
            metric: `cosine` or `euclidean` (squared).
            recall: The share of the 10 nearest that a search should find, 0..1; decides how
                thoroughly an approximate index is searched.
            model: The model that extracted the features.
            threshold: The score from which two images count as the same person.
            progress: Called with the number of items indexed and their total.

        Raises:
            DataError: The gallery is empty, or a feature is not finite or, for cosine, zero.
            ConfigError: An option is invalid.
        """
        check_recall(recall)
        features, side = checked_features("gallery", gallery, metric)
        space, vectors = Space.of(metric, side), Vectors([features])
        kind = choose_type(index_type, len(features), vectors.dim, recall)
        if index_type not in ("auto", kind):
            logger.info(
                "%d items are too few to train %s; the index is flat", len(features), index_type
            )
        found = None if kind == "flat" else build_candidates(kind, vectors, space, progress)
        index = cls(
            kind,
            space,
            vectors,
            items_of(gallery, 0),
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
        progress: Progress | None = None,
    ) -> None:
        """Append items.

        An approximate index keeps its cells and settings; `tune` measures its recall again.

        Args:
            gallery: Embeddings from the same model.
            model: The model that extracted them.
            progress: Called with the number of items indexed and their total.

        Raises:
            DataError: They have another dimension or model, are not finite, or are far longer than
                those of the index, or a path contains a NUL character. The index is unchanged then.
        """
        self.check_model(model)
        features, side = checked_features("gallery", gallery, self.metric)
        self._check_dim("gallery", features.shape[1])
        items = self.items.followed_by(items_of(gallery, len(self.items)))
        self._search.add(features, side, progress)
        self.items = items

    def tune(self, recall: float | None = None) -> None:
        """Choose how thoroughly an approximate index is searched, and measure its recall.

        It takes the fastest settings that reach the recall; if none do, the most thorough ones,
        with a warning. An exact index does not change.

        Args:
            recall: 0..1; None keeps the one that was wanted before.
        """
        wanted = recall if recall is not None else (self.recall.wanted if self.recall else 0.95)
        check_recall(wanted)
        if self._search.candidates is None or len(self) < 2:
            return
        self.settings, self.recall = tune(self._search, wanted)
        if self.recall.reached < wanted:
            logger.warning(
                "%s reaches a recall@%d of %.3f at most, not %g; `flat` is exact",
                self.index_type,
                self.recall.k,
                self.recall.reached,
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
            features: (Q, D), from the model that extracted the features of the index.
            k: The length of the lists; a larger number than there are items gives all of them.
            exclude_camids: (Q,) the camera whose items each query leaves out. An evaluation leaves
                out only the query's own identity under its camera; here that identity is unknown,
                so all items of the camera are left out.
            paths: Q names, for error messages.

        Returns:
            Item numbers, (Q, min(k, N)) int64, and scores, (Q, min(k, N)) float32: cosine
            similarities in descending order, or squared Euclidean distances in ascending order.
            With a camera left out there may be fewer items; the remaining numbers are -1 and the
            scores infinite.

        Raises:
            DataError: The features have another dimension, are not finite or, for cosine, zero.
            ConfigError: k is less than 1.
        """
        check_at_least("k", k, 1)
        queries = self._search.side("query", features, paths)
        count, dim = queries.features.shape
        self._check_dim("query", dim)
        groups = groups_by_camera(count, exclude_camids, self.items.camids)
        distances, items = self._search.nearest(queries, min(k, len(self)), self.settings, groups)
        return torch.from_numpy(items), torch.from_numpy(self._search.space.scores(distances))

    def passes(self, scores: Tensor, threshold: float) -> Tensor:
        """Which scores (from `search`) count as the same person at a threshold."""
        return scores >= threshold if self.metric == "cosine" else scores <= threshold

    # ----------------------------------------------------------------- files

    def save(self, folder: str | Path) -> None:
        """Write the index; it replaces one that the folder already holds, in one step.

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
        """Read an index; its features are memory-mapped.

        Raises:
            DataError: There is none, or it is damaged, of a newer format, or not one of reidreg.
        """
        contents = read_contents(Path(folder))
        facts = contents.facts
        try:
            index = cls(
                facts["type"],
                Space(facts["metric"], facts["scale"], facts["longest"]),
                contents.vectors,
                contents.items,
                candidates=contents.candidates,
                settings=facts["parameters"],
                recall=record_of(Recall, facts["recall"]),
                model=record_of(FeatureModel, facts["model"]),
                threshold=record_of(Threshold, facts["threshold"]),
            )
            counts = contents.counts()
        except (KeyError, TypeError) as error:
            raise DataError(
                f"this version of reidreg cannot read the index {folder}: {error!r}"
            ) from error
        if len(counts) != 1:
            raise DataError(
                f"the files of the index {folder} do not go together; rebuild it with "
                "`reidreg index build`"
            )
        return index

    def facts(self) -> dict[str, Any]:
        """The description of the index, as its manifest stores it."""
        space = self._search.space
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
        """Refuse features of another model than that of the index, where both are known.

        Raises:
            DataError: The models differ.
        """
        if model is not None and self.model is not None and model.digest != self.model.digest:
            raise DataError(
                f"{model.ckpt} is another model, or has other options, than the one that the index "
                f"was built with ({self.model.ckpt}); their features cannot be compared"
            )

    def _contents(self) -> Contents:
        return Contents(self.facts(), self._search.vectors, self.items, self._search.candidates)

    def _check_dim(self, name: str, dim: int) -> None:
        if dim != self.dim:
            raise DataError(
                f"{name} features have {dim} values each, those of the index have {self.dim}; "
                "both must come from the same model"
            )


def add_to_index(
    folder: str | Path,
    gallery: Embeddings,
    *,
    model: FeatureModel | None = None,
    progress: Progress | None = None,
) -> GalleryIndex:
    """Append items to an index on disk and measure its recall again.

    The folder is locked meanwhile, so that no other process writes there.

    Raises:
        DataError: As for `GalleryIndex.load` and `add`.
        ConfigError: Another process is writing there.
    """
    folder = Path(folder)
    GalleryIndex.load(folder)  # first, as the lock would create a file where there is no index
    with exclusive(folder, "index", _BUSY):
        index = GalleryIndex.load(folder)
        index.add(gallery, model=model, progress=progress)
        index.tune()
        write_contents(folder, index._contents())
    return index
