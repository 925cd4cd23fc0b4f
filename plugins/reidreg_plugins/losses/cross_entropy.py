"""Cross-entropy over identities."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import cross_entropy

from reidreg import LOSSES, Loss, Output, ReidregError
from reidreg_plugins.losses.precision import at_least_float32


@LOSSES.register("cross_entropy")
class CrossEntropy(Loss):
    """Classification of identities, -sum q log p, with label smoothing.

    The target is q = (1 - s) onehot + s / C over C classes (Szegedy et al., 2016).

    Args:
        label_smoothing: The share s of the target that is spread over all identities.
    """

    def __init__(self, label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, output: Output, pids: Tensor) -> Tensor:
        if output.logits is None:
            raise ReidregError("loss cross_entropy needs a head with a classifier; use head bnneck")
        logits = at_least_float32(output.logits)
        return cross_entropy(logits, pids, label_smoothing=self.label_smoothing)
