"""Retrieval: from query and gallery features to figures, without a model or a configuration.

The doors are `match_positions` (ranking) with `retrieval_figures` (metrics); `ranked_lists` and the
searches of an index (index_search); re-ranking, query expansion, single-shot, verification, camera
and bootstrap figures, each in the module of its name. They share the exact arithmetic of distances
and the rule of what counts as a match (matching).
"""
