"""The configuration of a run: YAML files and flags to a typed `Config`.

The door is `parsing.load_config` (and `parse`, `resolve` for commands), `sections` for the options
and `layers` for files and their names; `schedules` and `optimizers` hold what a name stands for.
Only `optimizers` imports torch, so that help without a configuration answers at once.
"""
