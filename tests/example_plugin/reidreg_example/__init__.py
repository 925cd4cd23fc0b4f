"""Two parts for reidreg. Importing this package registers them."""

from reidreg_example import circle, identity_folders

__all__ = ["circle", "identity_folders"]
