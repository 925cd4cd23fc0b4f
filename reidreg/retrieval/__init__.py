"""Retrieval: from query and gallery features to figures, without a model or a configuration.

An evaluation enters by `match_positions` and `retrieval_figures`, `ranked_lists`, `rerank_rows`,
`expand_queries`, `single_shot_positions`, `verification_figures`, `camera_pairs`,
`bootstrap_intervals` and `check_matchable`; an index enters by the module `index_search`. All use
the exact distances of `distances` and the rule in `matching` of what counts as a match.
"""
