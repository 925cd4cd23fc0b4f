"""The reference system's network, training step and evaluation, restated plainly from what they do.

Networks, losses and rates are those of reid-strong-baseline (Luo et al., Bag of Tricks and a Strong
Baseline for Deep Person Re-identification, 2019) without its stem's missing ReLU: nothing here is
fast, and nothing is shared with reidreg, so that the two can be compared as wholes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """What a run of the reference system is configured with.

    Args:
        losses: Of cross_entropy, triplet and center, those that are added up.
        label_smoothing: The share of the target that is spread over all identities.
        optimizer: adam or sgd, which has a momentum of 0.9.
        bias_lr_factor: Factor on the learning rate of what has `bias` in its name.
        bias_weight_decay: Its weight decay.
    """

    losses: tuple[str, ...] = ("cross_entropy", "triplet")
    label_smoothing: float = 0.1
    margin: float = 0.3
    optimizer: str = "adam"
    lr: float = 3.5e-4
    weight_decay: float = 5e-4
    bias_lr_factor: float = 1.0
    bias_weight_decay: float = 5e-4
    center_weight: float = 5e-4
    center_lr: float = 0.5
    milestones: tuple[int, ...] = (2, 3)
    warmup_epochs: int = 2
    warmup_factor: float = 0.01

    def rate(self, epoch: int) -> float:
        """The factor on the learning rate in an epoch, which is counted from 1."""
        passed = sum(milestone <= epoch for milestone in self.milestones)
        share = epoch / self.warmup_epochs if epoch < self.warmup_epochs else 1.0
        warm = self.warmup_factor * (1 - share) + share
        return float(warm * 0.1**passed)


class Block(nn.Module):
    """Two 3 x 3 convolutions, and the input added to what they give (He et al., CVPR 2016)."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if stride != 1 or width != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return torch.relu(shortcut + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ReferenceModel(nn.Module):
    """ResNet-18 with a last stride of 1, and the neck; it starts as torch's modules do.

    Names of parameters are those of reidreg's model with the head `bnneck`.
    """

    def __init__(self, identities: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 64
        for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 1)):
            blocks = Block(width, channels, stride), Block(channels, channels, 1)
            layers.append(nn.Sequential(*blocks))
            width = channels
        names = ["layer1", "layer2", "layer3", "layer4"]
        stem = {"conv1": nn.Conv2d(3, 64, 7, 2, 3, bias=False), "bn1": nn.BatchNorm2d(64)}
        self.backbone = nn.ModuleDict(
            {"net": nn.ModuleDict({**stem, **dict(zip(names, layers, strict=True))})}
        )
        neck, classifier = nn.BatchNorm1d(width), nn.Linear(width, identities, bias=False)
        neck.bias.requires_grad_(False)
        nn.init.normal_(classifier.weight, std=0.001)
        self.head = nn.ModuleDict({"neck": neck, "classifier": classifier})

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images to the feature before the neck, the feature after it, and the logits."""
        net = self.backbone["net"]
        assert isinstance(net, nn.ModuleDict)
        x = torch.relu(net["bn1"](net["conv1"](images)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = net[name](x)
        pooled = x.mean(dim=(2, 3))
        normalised = self.head["neck"](pooled)
        return pooled, normalised, self.head["classifier"](normalised)


class ReferenceTrainer:
    """The reference's training step.

    Args:
        recipe: What to train.
        identities: C, how many there are.
        start: The weights to start from.
        centers: (C, 512), where the centre loss starts, if it is asked for.
    """

    def __init__(
        self,
        recipe: Recipe,
        identities: int,
        start: Mapping[str, Tensor],
        centers: Tensor | None = None,
    ) -> None:
        self.recipe = recipe
        self.identities = identities
        self.model = ReferenceModel(identities)
        self.model.load_state_dict(start)
        groups = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                bias = "bias" in name
                groups.append(
                    {
                        "params": [parameter],
                        "factor": recipe.bias_lr_factor if bias else 1.0,
                        "weight_decay": recipe.bias_weight_decay if bias else recipe.weight_decay,
                    }
                )
        if recipe.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
        else:
            self.optimizer = torch.optim.Adam(groups, lr=0.0)
        self.centers = None if centers is None else nn.Parameter(centers.clone())

    def step(self, images: Tensor, pids: Tensor, epoch: int) -> None:
        """Make a step in an epoch, which is counted from 1."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.rate(epoch) * group["factor"]
        self.model.train()
        self.optimizer.zero_grad()
        features, _, logits = self.model(images)
        loss = torch.zeros(())
        if "cross_entropy" in recipe.losses:
            loss = loss + smoothed_cross_entropy(logits, pids, recipe.label_smoothing)
        if "triplet" in recipe.losses:
            loss = loss + batch_hard(features, pids, recipe.margin)
        if self.centers is not None:
            self.centers.grad = None
            loss = loss + recipe.center_weight * center_loss(features, pids, self.centers)
        loss.backward()
        self.optimizer.step()
        if self.centers is not None:
            assert self.centers.grad is not None
            with torch.no_grad():
                self.centers -= recipe.center_lr * self.centers.grad / recipe.center_weight


def smoothed_cross_entropy(logits: Tensor, pids: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy with a target of 1 - s on the identity and s / C on each of all C."""
    target = torch.full_like(logits, smoothing / logits.shape[1])
    target[torch.arange(len(pids)), pids] += 1 - smoothing
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def batch_hard(features: Tensor, pids: Tensor, margin: float) -> Tensor:
    """The triplet loss of each image with its farthest alike and its nearest unlike."""
    squares = (features[:, None] - features[None, :]).square().sum(dim=2)
    distances = squares.clamp(min=1e-12).sqrt()
    terms = []
    for row, pid in zip(distances, pids, strict=True):
        alike, unlike = row[pids == pid], row[pids != pid]
        terms.append((alike.max() - unlike.min() + margin).clamp(min=0))
    return torch.stack(terms).mean()


def center_loss(features: Tensor, pids: Tensor, centers: Tensor) -> Tensor:
    """The mean squared distance to the centres; all pairs but an image's own count 1e-12."""
    squares = (features[:, None] - centers[None, :]).square().sum(dim=2)
    own = torch.nn.functional.one_hot(pids, len(centers)).to(squares.dtype)
    return (squares * own).clamp(1e-12, 1e12).sum() / len(features)


def evaluate(
    query: NDArray[np.float64], gallery: NDArray[np.float64], ids: Mapping[str, NDArray[np.int64]]
) -> tuple[float, NDArray[np.float64]]:
    """The mAP and CMC of unit-normalised features, a query at a time.

    Args:
        query: (Q, D) features.
        gallery: (G, D) features.
        ids: query_pids, query_camids, gallery_pids and gallery_camids.
    """
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    precisions, firsts = [], []
    for row, pid, camid in zip(query, ids["query_pids"], ids["query_camids"], strict=True):
        distances = np.square(gallery - row).sum(axis=1)
        same = ids["gallery_pids"] == pid
        kept = ~(same & (ids["gallery_camids"] == camid))
        hits = np.flatnonzero(same[kept][np.argsort(distances[kept], kind="stable")]) + 1
        if len(hits):
            precisions.append(np.mean(np.arange(1, len(hits) + 1) / hits))
            firsts.append(hits[0])
    cmc = np.array([np.mean(np.array(firsts) <= rank) for rank in range(1, 11)])
    return float(np.mean(precisions)), cmc
