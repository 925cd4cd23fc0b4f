"""The evaluation of papers: CMC, mAP and mINP of a query against a gallery."""

from __future__ import annotations

from collections.abc import Sequence
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
    check_matchable,
    clipping_note,
    match_positions,
    match_positions_of_rows,
    ranked_lists,
    rerank_rows,
    retrieval_figures,
)


@EVALUATORS.register("retrieval")
class Retrieval(Evaluator):
    """CMC, mAP and mINP by the protocol of Market-1501, exact, with optional re-ranking.

    Gallery images of the query's person by the query's camera are left out, and so is junk (pid
    -1). A query without a match is not counted among the valid ones. Of equally near images the
    earlier one in the gallery comes first.

    Args:
        metric: cosine, or squared Euclidean distance.
        max_rank: Length of the CMC curve.
        same_camera: drop leaves out matches by the query's own camera; keep is for one camera.
        ap: rectangle, the usual average precision; trapezoid is the original toolkit's.
        rerank: Give figures after k-reciprocal re-ranking beside the raw ones.
        k1: Neighbours that re-ranking looks at.
        k2: Neighbours whose sets re-ranking averages.
        lambda_value: Share of the original distance after re-ranking.
    """

    def __init__(
        self,
        metric: Literal["cosine", "euclidean"] = "cosine",
        max_rank: Annotated[int, Ge(10)] = 50,
        same_camera: Literal["drop", "keep"] = "drop",
        ap: Literal["rectangle", "trapezoid"] = "rectangle",
        rerank: bool = False,
        k1: Annotated[int, Ge(1)] = 20,
        k2: Annotated[int, Ge(1)] = 6,
        lambda_value: Annotated[float, Interval(ge=0, le=1)] = 0.3,
    ) -> None:
        self.metric = metric
        self.max_rank = max_rank
        self.same_camera = same_camera
        self.ap = ap
        self.rerank = rerank
        self.k1 = k1
        self.k2 = k2
        self.lambda_value = lambda_value

    def evaluate(self, query: Embeddings, gallery: Embeddings) -> dict[str, Any]:
        with ProgressBar("ranking") as bar:
            raw = match_positions(
                query,
                gallery,
                metric=self.metric,
                same_camera=self.same_camera,
                progress=bar.report,
            )
        figures: dict[str, Any] = retrieval_figures(raw, ranks=self.max_rank, ap=self.ap)
        if self.rerank:
            reranked = self._reranked(query, gallery)
            figures["reranked"] = retrieval_figures(reranked, ranks=self.max_rank, ap=self.ap)
        return figures

    def _reranked(self, query: Embeddings, gallery: Embeddings) -> MatchPositions:
        # Junk would be somebody's neighbour; the published figures are without it.
        gallery = _without_junk(gallery)
        rows = rerank_rows(
            query.features,
            gallery.features,
            metric=self.metric,
            k1=self.k1,
            k2=self.k2,
            lam=self.lambda_value,
        )
        with ProgressBar("re-ranking") as bar:
            return match_positions_of_rows(
                rows,
                query.pids,
                query.camids,
                gallery.pids,
                gallery.camids,
                same_camera=self.same_camera,
                progress=bar.report,
            )

    def rank(self, query: Embeddings, gallery: Embeddings, k: int) -> tuple[Tensor, Tensor]:
        return ranked_lists(query, gallery, k=k, metric=self.metric, same_camera=self.same_camera)

    def rank_everything(
        self, query: Embeddings, gallery: Embeddings, k: int
    ) -> tuple[Tensor, Tensor]:
        return ranked_lists(query, gallery, k=k, metric=self.metric, everything=True)

    def precisions(self, query: Embeddings, gallery: Embeddings) -> Tensor:
        matches = match_positions(query, gallery, metric=self.metric, same_camera=self.same_camera)
        values = torch.full((len(query.pids),), torch.nan, dtype=torch.float64)
        valid = torch.from_numpy(np.diff(matches.offsets) > 0)
        values[valid] = torch.from_numpy(average_precisions(matches, ap=self.ap))
        return values

    def check_ids(self, query: Sequence[Sample], gallery: Sequence[Sample]) -> list[str]:
        query_pids, query_camids = _ids(query)
        gallery_pids, gallery_camids = _ids(gallery)
        counts = check_matchable(
            query_pids, query_camids, gallery_pids, gallery_camids, self.same_camera
        )
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


def _without_junk(gallery: Embeddings) -> Embeddings:
    kept = gallery.pids != -1
    return Embeddings(gallery.features[kept], gallery.pids[kept], gallery.camids[kept])


def _ids(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    pids = torch.tensor([sample.pid for sample in samples])
    return pids, torch.tensor([sample.camid for sample in samples])
