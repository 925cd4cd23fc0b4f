"""What a training step updates: a model and its losses, with their optimizer."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from reidreg.config.sections import Config
from reidreg.data.labels import Labels
from reidreg.distributed.group import world
from reidreg.model.embedder import Embedder, make_embedder
from reidreg.model.model import Model, build_model
from reidreg.training.objective import Objective, build_objective
from reidreg.training.optimizers import layer_scales, make_optimizer


class Trainable(NamedTuple):
    """A model on its device, an embedder around it, the losses, and the optimizer of both."""

    model: Model
    embedder: Embedder
    objective: Objective
    optimizer: Optimizer


def build_trainable(config: Config, labels: Labels) -> Trainable:
    """Build a model that tells the identities of `labels` apart; its weights are random."""
    model = build_model(config, labels)
    if config.train.sync_batchnorm and world().size > 1:
        synchronise_batchnorm(model)
    embedder = make_embedder(model, labels, config)
    objective = build_objective(config, labels, model.head.dim).to(embedder.device)
    parameters = [*model.named_parameters(), *objective.shared_parameters()]
    layer_decay = config.optimizer.layer_decay
    scales = layer_scales(model, layer_decay) if layer_decay is not None else {}
    optimizer = make_optimizer(config.optimizer, parameters, scales)
    return Trainable(model, embedder, objective, optimizer)


def synchronise_batchnorm(model: nn.Module) -> None:
    """Replace batch normalisation by torch's SyncBatchNorm; parameters and their names stay."""
    layers: Any = importlib.import_module("timm.layers")  # it also converts timm's BatchNormAct2d
    layers.convert_sync_batchnorm(model)
