"""Training a model: `loop.fit` builds a run, trains, evaluates and saves it, and resumes it.

Other rooms use `loop.fit` and `loop.train_step`, `run.build_run` and `trainable.build_trainable`,
`optimizers.make_schedule`, and `resuming.changes_between`.
"""
