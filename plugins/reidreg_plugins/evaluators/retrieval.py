"""The retrieval evaluation of ReID papers: CMC, mAP and mINP of queries against a gallery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor

from reidreg import (
    EVALUATORS,
    Embeddings,
    Evaluator,
    MatchPositions,
    ProgressBar,
    Sample,
    average_precisions,
    bootstrap_intervals,
    camera_pairs,
    check_impostors,
    check_matchable,
    clipping_note,
    expand_queries,
    match_positions,
    match_positions_of_rows,
    ranked_lists,
    rerank_rows,
    retrieval_figures,
    single_shot_positions,
    single_shot_positions_of_rows,
    verification_figures,
)


@EVALUATORS.register("retrieval")
class Retrieval(Evaluator):
    """CMC, mAP and mINP by the protocol of Market-1501 or CUHK03, exact, with optional re-ranking.

    Gallery images of the query's pid and camera are left out, and so is junk (pid -1). A query
    without a match is not valid and is in no figure. Of images at equal distance the one earlier in
    the gallery comes first.

    Args:
        metric: cosine, or squared Euclidean distance.
        max_rank: Length of the CMC curve.
        protocol: market1501 ranks all images; cuhk03 ranks one per identity, in repeated draws.
        repeats: Draws of cuhk03, the same in every run.
        same_camera: drop leaves out matches by the query's own camera; keep is for one camera.
        ap: rectangle is the usual average precision; trapezoid is the original toolkit's.
        bootstrap: Resamples for 95 % intervals of the figures, say 1000; 0 turns them off.
        cameras: Add mAP and rank-1 of every pair of cameras.
        verification: Add EER, TAR@FAR, DIR@FAR and a threshold.
        far: The false-accept rate of the threshold.
        rerank: Add figures after k-reciprocal re-ranking.
        k1: Neighbours that re-ranking considers.
        k2: Neighbours whose encodings re-ranking averages.
        lambda_value: Weight of the original distance in re-ranking.
        expansion: Neighbours of query expansion, say 5, whose figures are added; 0 turns it off.
        expansion_alpha: Exponent of the neighbours' cosines in query expansion; 0 is a plain mean.
        budget_mib: Memory for ranking in addition to the features, in MiB; it changes no figure.
    """

    def __init__(
        self,
        metric: Literal["cosine", "euclidean"] = "cosine",
        max_rank: Annotated[int, Ge(10)] = 50,
        protocol: Literal["market1501", "cuhk03"] = "market1501",
        repeats: Annotated[int, Ge(1)] = 10,
        same_camera: Literal["drop", "keep"] = "drop",
        ap: Literal["rectangle", "trapezoid"] = "rectangle",
        bootstrap: Annotated[int, Ge(0)] = 0,
        cameras: bool = False,
        verification: bool = False,
        far: Annotated[float, Interval(gt=0, lt=1)] = 1e-3,
        rerank: bool = False,
        k1: Annotated[int, Ge(1)] = 20,
        k2: Annotated[int, Ge(1)] = 6,
        lambda_value: Annotated[float, Interval(ge=0, le=1)] = 0.3,
        expansion: Annotated[int, Ge(0)] = 0,
        expansion_alpha: Annotated[float, Ge(0)] = 3.0,
        budget_mib: Annotated[int, Ge(1)] = 256,
    ) -> None:
        self.metric = metric
        self.max_rank = max_rank
        self.protocol = protocol
        self.repeats = repeats if protocol == "cuhk03" else 1
        self.same_camera = same_camera
        self.ap = ap
        self.bootstrap = bootstrap
        self.cameras = cameras
        self.verification = verification
        self.far = far
        self.rerank = rerank
        self.k1 = k1
        self.k2 = k2
        self.lambda_value = lambda_value
        self.expansion = expansion
        self.expansion_alpha = expansion_alpha
        self.budget_mib = budget_mib

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise a ValueError for figures that the protocol does not define."""
        if options["cameras"] and options["protocol"] == "cuhk03":
            raise ValueError("cameras: the table counts every match; cuhk03 draws one per identity")

    def evaluate(self, query: Embeddings, gallery: Embeddings) -> dict[str, Any]:
        ids = query.pids, query.camids, gallery.pids, gallery.camids
        counts = check_matchable(*ids, self.same_camera)  # before any distance is computed
        raw = self._positions(query, gallery)
        figures = self._figures(raw, query.pids)
        figures["skipped"] = {
            "without_gallery": counts.without_gallery,
            "same_camera_only": counts.same_camera_only,
        }
        if self.cameras:
            figures["cameras"] = self._camera_pairs(query, gallery)
        if self.verification:
            figures["verification"] = self._verification(query, gallery, raw)
        if self.rerank:
            figures["reranked"] = self._figures(self._reranked(query, gallery), query.pids)
        if self.expansion:
            figures["expanded"] = self._figures(self._expanded(query, gallery), query.pids)
        return figures

    def _figures(self, matches: MatchPositions, pids: Tensor) -> dict[str, Any]:
        figures = retrieval_figures(matches, ranks=self.max_rank, ap=self.ap)
        for key in ("num_queries", "num_valid_queries"):
            figures[key] //= self.repeats
        if self.bootstrap:
            # All repeats of an identity's queries are drawn together.
            figures["intervals"] = bootstrap_intervals(
                matches,
                pids.repeat_interleave(self.repeats),
                resamples=self.bootstrap,
                ap=self.ap,
            )
        return figures

    def _positions(self, query: Embeddings, gallery: Embeddings) -> MatchPositions:
        with ProgressBar("ranking") as bar:
            if self.protocol == "cuhk03":
                return single_shot_positions(
                    query,
                    gallery,
                    metric=self.metric,
                    same_camera=self.same_camera,
                    repeats=self.repeats,
                    budget_mib=self.budget_mib,
                    progress=bar.report,
                )
            return self._all_positions(query, gallery, bar.report)

    def _all_positions(
        self,
        query: Embeddings,
        gallery: Embeddings,
        progress: Callable[[int, int], None] | None = None,
    ) -> MatchPositions:
        return match_positions(
            query,
            gallery,
            metric=self.metric,
            same_camera=self.same_camera,
            budget_mib=self.budget_mib,
            progress=progress,
        )

    def _camera_pairs(self, query: Embeddings, gallery: Embeddings) -> list[dict[str, Any]]:
        with ProgressBar("cameras") as bar:
            return camera_pairs(
                query,
                gallery,
                metric=self.metric,
                same_camera=self.same_camera,
                ap=self.ap,
                budget_mib=self.budget_mib,
                progress=bar.report,
            )

    def _verification(
        self, query: Embeddings, gallery: Embeddings, raw: MatchPositions
    ) -> dict[str, Any]:
        matches = raw if self.protocol == "market1501" else self._all_positions(query, gallery)
        with ProgressBar("pairs") as bar:
            return verification_figures(
                query,
                gallery,
                matches,
                metric=self.metric,
                same_camera=self.same_camera,
                far=self.far,
                budget_mib=self.budget_mib,
                progress=bar.report,
            )

    def _reranked(self, query: Embeddings, gallery: Embeddings) -> MatchPositions:
        # Published figures are computed without junk, which would be a neighbour like any other.
        gallery = gallery.without_junk()
        ids = query.pids, query.camids, gallery.pids, gallery.camids
        with ProgressBar("neighbours") as bar:
            rows = rerank_rows(
                query.features,
                gallery.features,
                metric=self.metric,
                k1=self.k1,
                k2=self.k2,
                lam=self.lambda_value,
                progress=bar.report,
            )
        with ProgressBar("re-ranking") as bar:
            if self.protocol == "cuhk03":
                return single_shot_positions_of_rows(
                    rows,
                    *ids,
                    same_camera=self.same_camera,
                    repeats=self.repeats,
                    progress=bar.report,
                )
            return match_positions_of_rows(
                rows,
                *ids,
                same_camera=self.same_camera,
                budget_mib=self.budget_mib,
                progress=bar.report,
            )

    def _expanded(self, query: Embeddings, gallery: Embeddings) -> MatchPositions:
        with ProgressBar("expansion") as bar:
            expanded = expand_queries(
                query,
                gallery,
                k=self.expansion,
                alpha=self.expansion_alpha,
                metric=self.metric,
                progress=bar.report,
            )
        return self._positions(expanded, gallery)

    def rank(self, query: Embeddings, gallery: Embeddings, k: int) -> tuple[Tensor, Tensor]:
        return self._lists(query, gallery, k)

    def rank_everything(
        self, query: Embeddings, gallery: Embeddings, k: int
    ) -> tuple[Tensor, Tensor]:
        return self._lists(query, gallery, k, everything=True)

    def _lists(
        self, query: Embeddings, gallery: Embeddings, k: int, everything: bool = False
    ) -> tuple[Tensor, Tensor]:
        return ranked_lists(
            query,
            gallery,
            k=k,
            metric=self.metric,
            same_camera=self.same_camera,
            everything=everything,
            budget_mib=self.budget_mib,
        )

    def precisions(self, query: Embeddings, gallery: Embeddings) -> Tensor:
        matches = self._positions(query, gallery)
        values = torch.full((len(query.pids),), torch.nan, dtype=torch.float64)
        valid = torch.from_numpy(np.diff(matches.offsets)[:: self.repeats] > 0)
        found = torch.from_numpy(average_precisions(matches, ap=self.ap))
        values[valid] = found.view(-1, self.repeats).mean(dim=1)
        return values

    def check_ids(self, query: Sequence[Sample], gallery: Sequence[Sample]) -> list[str]:
        query_pids, query_camids = _ids(query)
        gallery_pids, gallery_camids = _ids(gallery)
        counts = check_matchable(
            query_pids, query_camids, gallery_pids, gallery_camids, self.same_camera
        )
        if self.verification:
            check_impostors(query_pids, gallery_pids)
        reasons = {
            "have no image of their person in the gallery": counts.without_gallery,
            "have images of their person by their own camera alone": counts.same_camera_only,
        }
        notes = [
            f"{count} of {len(query)} queries {reason}, and are not counted"
            for reason, count in reasons.items()
            if count
        ]
        images = len(query) + sum(sample.pid != -1 for sample in gallery)
        clipped = clipping_note(images, self.k1, self.k2) if self.rerank else None
        return [*notes, clipped] if clipped else notes


def _ids(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    pids = torch.tensor([sample.pid for sample in samples])
    return pids, torch.tensor([sample.camid for sample in samples])
