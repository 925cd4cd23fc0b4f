"""Backbones, one family a file."""

from reidreg_plugins.backbones import resnet, timm

__all__ = ["resnet", "timm"]
