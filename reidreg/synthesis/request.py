"""The parameters of a data set to draw, and the check of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from reidreg.errors import ConfigError

Layout = Literal["aihub_kaist", "market1501"]
# The version of the drawing. It is part of the marker, so that no folder mixes two versions.
DRAWING = 1


@dataclass(frozen=True, slots=True)
class Request:
    """The parameters of a data set.

    Args:
        layout: Folders and file names: those of AIHub KAIST or of Market-1501.
        identities: Identities, training and test together.
        cameras: Cameras; each identity is seen by at least two.
        images_per_camera: Images of an identity from each camera that sees them.
        seed: Other seeds give other people, cameras and scenes.
        full_size: The official counts of AIHub KAIST instead of the three numbers above.

    Raises:
        ConfigError: A number is too small or does not fit the layout.
    """

    layout: Layout = "aihub_kaist"
    identities: int = 80
    cameras: int = 6
    images_per_camera: int = 4
    seed: int = 0
    full_size: bool = False

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ConfigError(f"--layout {self.layout!r}: choose {' or '.join(get_args(Layout))}")
        aihub = self.layout == "aihub_kaist"
        if self.full_size and not aihub:
            raise ConfigError("--full_size has counts for aihub_kaist only: drop it, or the layout")
        least = 8 if aihub else 4
        check_at_least("identities", self.identities, least, "two to train per folder, two to test")
        check_at_least("cameras", self.cameras, 2, "retrieval looks for people in another camera")
        check_at_least("images_per_camera", self.images_per_camera, 1, "each camera gives an image")
        check_at_least("seed", self.seed, 0, "a seed cannot be negative")
        most = 99 if aihub else 9
        if self.cameras > most:
            raise ConfigError(
                f"--cameras {self.cameras} is too many: {self.layout} names hold {most} at most"
            )

    def parameters(self) -> dict[str, Any]:
        """What the images depend on, for the marker; numbers that have no effect are null."""
        values = asdict(self)
        if self.full_size:
            values.update(identities=None, cameras=None, images_per_camera=None)
        # The size comes first, so that an error names it before the numbers that it replaces.
        return {"full_size": self.full_size, **values, "drawing": DRAWING}


def check_at_least(flag: str, value: int, least: int, why: str) -> None:
    """Raise a ConfigError that names the flag if its value is too small."""
    if value < least:
        raise ConfigError(f"--{flag} {value} is too few: at least {least} ({why})")
