"""The labels of training: how identities and cameras are numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reidreg.errors import DataError
from reidreg.parts.interfaces import Dataset
from reidreg.values import Sample


@dataclass(frozen=True)
class Labels:
    """Class labels and camera indices: an id's position among the sorted ids.

    Args:
        pids: The training identities, sorted; an identity's position is its label.
        camids: The training cameras, sorted; a camera's position is its index.
    """

    pids: tuple[int, ...]
    camids: tuple[int, ...]

    def pid_labels(self, samples: Sequence[Sample]) -> list[int]:
        """The label of each sample."""
        label = {pid: position for position, pid in enumerate(self.pids)}
        return [label[sample.pid] for sample in samples]

    def camera_indices(self, samples: Sequence[Sample]) -> list[int]:
        """The camera index of each sample, -1 for a camera that training did not see."""
        index = {camid: position for position, camid in enumerate(self.camids)}
        return [index.get(sample.camid, -1) for sample in samples]


def training_samples(dataset: Dataset) -> list[Sample]:
    """The training images of known identities: junk (pid -1) is left out.

    Raises:
        DataError: They are of fewer than two identities.
    """
    samples = [sample for sample in dataset.train if sample.pid >= 0]
    identities = {sample.pid for sample in samples}
    if len(identities) < 2:
        raise DataError(
            f"the train split holds {len(samples)} images of {len(identities)} identities; "
            "training needs at least 2 identities"
        )
    return samples


def labels_of(samples: Sequence[Sample]) -> Labels:
    """The labels for training with these samples."""
    return Labels(
        pids=tuple(sorted({sample.pid for sample in samples})),
        camids=tuple(sorted({sample.camid for sample in samples})),
    )
