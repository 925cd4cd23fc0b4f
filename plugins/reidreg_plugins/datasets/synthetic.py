"""Synthetic pedestrians, for a first run without any data."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from reidreg import DATASETS, Dataset, Sample, synthesize
from reidreg_plugins.datasets.aihub_kaist import AIHubKAIST

logger = logging.getLogger("reidreg")


@DATASETS.register("synthetic")
class Synthetic(Dataset):
    """Synthetic pedestrians in the layout of AIHub KAIST, drawn when they are first needed.

    Args:
        root: The folder in which the images are kept.
        identities: How many identities there are, training and test together.
        cameras: How many cameras there are.
        images_per_camera: Images of an identity by each camera that sees it.
        data_seed: The seed of the images; another one gives other people and cameras.
    """

    def __init__(
        self,
        root: str = "data",
        identities: Annotated[int, Ge(8)] = 80,
        cameras: Annotated[int, Ge(2)] = 6,
        images_per_camera: Annotated[int, Ge(1)] = 4,
        data_seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        self.root = Path(root).expanduser()
        self.identities = identities
        self.cameras = cameras
        self.images_per_camera = images_per_camera
        self.data_seed = data_seed

    @cached_property
    def folder(self) -> Path:
        """The folder of the images: one for each choice of options."""
        sizes = f"{self.identities}x{self.cameras}x{self.images_per_camera}"
        return self.root / f"synthetic-{sizes}-{self.data_seed}"

    @cached_property
    def _drawn(self) -> AIHubKAIST:
        if not self.folder.exists():
            logger.info("drawing a data set into %s", self.folder)
        synthesize(
            self.folder,
            layout="aihub_kaist",
            identities=self.identities,
            cameras=self.cameras,
            images_per_camera=self.images_per_camera,
            seed=self.data_seed,
        )
        folders = [f"bounding_box_train_{number}" for number in (1, 2, 3)]
        return AIHubKAIST(str(self.folder), train_folder=folders)

    @property
    def train(self) -> list[Sample]:
        return self._drawn.train

    @property
    def query(self) -> list[Sample]:
        return self._drawn.query

    @property
    def gallery(self) -> list[Sample]:
        return self._drawn.gallery

    def folders(self) -> dict[str, str]:
        return self._drawn.folders()
