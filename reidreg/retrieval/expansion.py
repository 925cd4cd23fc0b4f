"""Alpha query expansion: each query moves towards the gallery images that it is nearest to.

Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019: with unit
vectors, q' = normalise(q + sum over the k nearest g of max(cos(q, g), 0)**alpha * g). With alpha 0
it is the plain average of average query expansion (Chum et al., Total Recall, ICCV 2007); the
larger alpha is, the less the farther ones count.

Neighbours are found by their distances alone. No pid or camera says which may take part, for a
system in use has no labels; only junk (pid -1), which no evaluation counts, is no neighbour.
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

_HELD = 2**22  # numbers of neighbours' vectors that are held in float64 at a time
_CANCELLED = 1e-9  # a sum of unit vectors of this length or less has no direction


def expand_queries(
    query: Embeddings,
    gallery: Embeddings,
    *,
    k: int,
    alpha: float = 3.0,
    metric: str = "cosine",
    progress: Progress | None = None,
) -> Embeddings:
    """The queries, moved towards their nearest gallery items; the gallery stays as it is.

    With the metric cosine the new features are unit vectors. With euclidean, neighbours are the
    nearest by squared distance, weights are those of the vectors' cosines, and the new feature is
    the weighted mean, (q + sum of w g) / (1 + sum of w), so that its length is that of features.

    Args:
        query: Q embeddings.
        gallery: G embeddings; junk (pid -1) is no neighbour.
        k: How many neighbours take part; 0 leaves the queries as they are.
        alpha: The exponent of the cosines, at least 0.
        metric: `cosine` or `euclidean` (squared).
        progress: Called with the number of queries searched for and of all.

    Returns:
        Embeddings with features (Q, D) float32 on the queries' device, and the labels of `query`.

    Raises:
        DataError: The features or labels do not fit together, or are not finite.
        ConfigError: An option is wrong.
    """
    check_at_least("k", k, 0)
    check_at_least("alpha", alpha, 0)
    if k == 0:
        return query
    lists, _ = ranked_lists(
        query, gallery, k=k, metric=metric, same_camera="keep", progress=progress
    )
    moved = _towards if metric == "cosine" else _mean
    vectors = query.features.detach().to(torch.float32)
    features = torch.empty_like(vectors)
    for span in spans(len(vectors), max(1, _HELD // (k * vectors.shape[1]))):
        own = vectors[span].double()
        near = lists[span].clamp(min=0).to(gallery.features.device)
        items = gallery.features.detach()[near].to(own.device, torch.float32).double()
        weights = _weights(own, items, alpha) * (lists[span] >= 0).to(own.device)
        features[span] = moved(own, items, weights).float()
    return replace(query, features=features)


def _weights(own: Tensor, items: Tensor, alpha: float) -> Tensor:
    """(n, k) The cosines of vectors (n, D) and their neighbours (n, k, D), clipped, to a power."""
    cosines = torch.bmm(_unit(items), _unit(own)[:, :, None])[:, :, 0]
    return cosines.clamp(min=0, max=1) ** alpha


def _towards(own: Tensor, items: Tensor, weights: Tensor) -> Tensor:
    """(n, D) The unit vectors in the direction of the weighted sum."""
    own = _unit(own)
    total = own + torch.bmm(weights[:, None], _unit(items))[:, 0]
    # Opposite vectors, which only an alpha of 0 lets take part, may leave nothing.
    gone = total.norm(dim=1, keepdim=True) <= _CANCELLED
    return torch.where(gone, own, _unit(total))


def _mean(own: Tensor, items: Tensor, weights: Tensor) -> Tensor:
    """(n, D) The weighted mean, in which the vector itself has weight 1."""
    total = own + torch.bmm(weights[:, None], items)[:, 0]
    return total / (1 + weights.sum(dim=1, keepdim=True))


def _unit(vectors: Tensor) -> Tensor:
    """The vectors divided by their norms; one of zeros, which euclidean allows, stays."""
    return functional.normalize(vectors, dim=-1, eps=1e-300)
