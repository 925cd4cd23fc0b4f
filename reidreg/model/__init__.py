"""The model, its checkpoint, and features from both.

Other packages use `model` (`Model`, `build_model`), `checkpoint` (`Checkpoint`, `load_checkpoint`,
`save_checkpoint`), `restore` (`open_checkpoint`, `restore_embedder`, `caching_embedder`,
`load_weights`), `embedder` (`Embedder`, `make_embedder`), `feature_files` (`load_features`,
`save_features`), `feature_cache.cache_folder_of`, `extractor.FeatureExtractor` and `thresholds`.
"""
