"""Several processes as one run: join them, exchange values, and end all of them together.

Other packages use `group` (`joined`, `world`, `broadcast`, `gather`, `wait`, `main_first`,
`start_together`, `collect_rows`, `broadcast_state`, `Agreement`), `gradients` (`average_gradients`,
`gather_output`, `gather_rows`, `count_true`, `mean_over_processes`), `same_run.check_same_run`,
`failure.tell_failure`, `lifeline.end_with_parent`, and `random_state`.
"""
