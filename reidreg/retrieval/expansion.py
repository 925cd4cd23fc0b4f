"""Alpha query expansion: move each query towards its nearest gallery images.

Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019: with unit
vectors, q' = normalise(q + sum over the k nearest g of max(cos(q, g), 0)**alpha * g). Alpha 0 gives
average query expansion (Chum et al., Total Recall, ICCV 2007); a larger alpha gives less weight to
farther neighbours.

Neighbours are chosen by distance alone, not by pid or camera, since a deployed system has no
labels; only junk (pid -1), which evaluation ignores, is excluded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from reidreg.retrieval.blocks import Progress, spans
from reidreg.retrieval.options import check_at_least
from reidreg.retrieval.ranked_lists import ranked_lists
from reidreg.values import Embeddings

_HELD = 2**22  # float64 values of neighbours' vectors that are held at a time
_CANCELLED = 1e-9  # a sum of unit vectors no longer than this has no direction


def expand_queries(
    query: Embeddings,
    gallery: Embeddings,
    *,
    k: int,
    alpha: float = 3.0,
    metric: str = "cosine",
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Embeddings:
    """The queries, moved towards their nearest gallery items.

    With the metric cosine the new features are unit vectors. With euclidean, neighbours are the
    nearest by squared distance, weights are still powers of cosines, and the new feature is the
    weighted mean (q + sum of w g) / (1 + sum of w), which keeps the scale of the features.

    Args:
        query: Q embeddings.
        gallery: G embeddings; junk (pid -1) is no neighbour.
        k: The number of neighbours; 0 leaves the queries unchanged.
        alpha: The exponent of the cosines, at least 0.
        metric: `cosine` or `euclidean` (squared).
        chunk: Queries to move at a time; None takes as many as fit 32 MiB.
        progress: Called with the number of queries searched and of all.

    Returns:
        Embeddings with features (Q, D) float32 on the queries' device, and the labels of `query`.

    Raises:
        DataError: Shapes do not match, or a feature is not finite.
        ConfigError: An option is wrong.
    """
    check_at_least("k", k, 0)
    check_at_least("alpha", alpha, 0)
    if chunk is not None:
        check_at_least("chunk", chunk, 1)
    if k == 0:
        return query
    lists, _ = ranked_lists(
        query, gallery, k=k, metric=metric, same_camera="keep", progress=progress
    )
    moved = _towards if metric == "cosine" else _mean
    vectors = query.features.detach().to(torch.float32)
    features = torch.empty_like(vectors)
    for span in spans(len(vectors), chunk or max(1, _HELD // (k * vectors.shape[1]))):
        own = vectors[span].double()
        near = lists[span].clamp(min=0).to(gallery.features.device)
        items = gallery.features.detach()[near].to(own.device, torch.float32).double()
        weights = _weights(own, items, alpha) * (lists[span] >= 0).to(own.device)
        features[span] = moved(own, items, weights).float()
    return replace(query, features=features)


def _weights(own: Tensor, items: Tensor, alpha: float) -> Tensor:
    """(n, k) The cosines of vectors (n, D) and their neighbours (n, k, D), max(cos, 0)**alpha."""
    cosines = torch.bmm(_unit(items), _unit(own)[:, :, None])[:, :, 0]
    return cosines.clamp(min=0, max=1) ** alpha


def _towards(own: Tensor, items: Tensor, weights: Tensor) -> Tensor:
    """(n, D) The normalised weighted sum."""
    own = _unit(own)
    total = own + torch.bmm(weights[:, None], _unit(items))[:, 0]
    # Opposite vectors, which have a weight only if alpha is 0, may cancel.
    cancelled = total.norm(dim=1, keepdim=True) <= _CANCELLED
    return torch.where(cancelled, own, _unit(total))


def _mean(own: Tensor, items: Tensor, weights: Tensor) -> Tensor:
    """(n, D) The weighted mean, in which the vector itself has weight 1."""
    total = own + torch.bmm(weights[:, None], items)[:, 0]
    return total / (1 + weights.sum(dim=1, keepdim=True))


def _unit(vectors: Tensor) -> Tensor:
    """The vectors divided by their norms; zero vectors, which euclidean allows, stay."""
    return functional.normalize(vectors, dim=-1, eps=1e-300)
