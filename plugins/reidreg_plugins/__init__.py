"""The parts that ship with reidreg. Importing this package registers them."""

from reidreg_plugins import backbones, datasets, evaluators, heads, losses, samplers

__all__ = ["backbones", "datasets", "evaluators", "heads", "losses", "samplers"]
