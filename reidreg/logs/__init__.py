"""What a run reports: log lines, figures, progress, and Weights & Biases.

Lines for people go through `console.logger`, figures through `metrics.MetricsLog`, progress through
`progress.ProgressBar`; `wandb.start_wandb` starts the W&B run. All of it is written whether or not
W&B is on, and an error of W&B never ends a run.
"""
