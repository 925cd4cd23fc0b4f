"""Query and gallery to figures, figures to text, and the features of a split.

Other packages use `evaluate` (`Evaluation`, `evaluate_checkpoint`, `evaluate_dataset`,
`evaluate_features`, `write_metrics`), `extract.extract_checkpoint`, `figures` (`blocks`,
`log_figures`) and `table` (`describe_evaluation`, `evaluation_table`).
"""
