"""Samples to batches on the device, and what there is to say about a data set.

Other packages use `labels` (`Labels`, `labels_of`, `training_samples`), `statistics`
(`statistics_table`), `holdout.hold_out`, `sampling.build_sampler`, `loading` (`TrainLoader`,
`eval_loader`), `workers` (`count_workers`, `loading_processes`), `transforms` (`Augmentation`,
`Normalisation`) and `images`. `image_cache` and `buffer_pool` serve the loaders.
"""
