"""Heads: pooling, normalisation, and the features of losses and retrieval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reidreg import HEADS, Head
from reidreg_plugins.heads.pooling import GeM, Pool


def bnneck(**options: Any) -> Head:
    torch.manual_seed(0)
    return HEADS.build("bnneck", num_classes=20, dim=6, **options)


def a_map(batch: int = 5) -> Tensor:
    return torch.rand(batch, 6, 4, 2, generator=torch.Generator().manual_seed(1))


def test_bnneck_starts_with_a_frozen_shift_and_a_classifier_near_zero() -> None:
    torch.manual_seed(0)
    head = HEADS.build("bnneck", num_classes=500, dim=64)
    neck, classifier = head.get_submodule("neck"), head.get_submodule("classifier")
    assert isinstance(neck, nn.BatchNorm1d) and isinstance(classifier, nn.Linear)
    assert neck.eps == 1e-5 and neck.momentum == 0.1
    assert torch.equal(neck.weight, torch.ones(64)) and neck.weight.requires_grad
    assert torch.equal(neck.bias, torch.zeros(64)) and not neck.bias.requires_grad
    assert classifier.bias is None and classifier.weight.shape == (500, 64)
    assert abs(classifier.weight.mean().item()) < 2e-5
    assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)


def test_bnneck_gives_the_feature_before_the_neck_and_logits_after_it() -> None:
    head, features = bnneck(), a_map()
    output = head(features)
    pooled = features.mean(dim=(2, 3))
    normalised = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
    weight = head.get_parameter("classifier.weight")
    assert output.logits is not None
    assert torch.allclose(output.features, pooled, atol=1e-6)
    assert torch.allclose(output.embeddings, normalised, atol=1e-5)
    assert torch.allclose(output.logits, normalised @ weight.T, atol=1e-6)


@pytest.mark.parametrize("feature", ["after", "before"])
def test_retrieval_uses_the_configured_feature(feature: str) -> None:
    head = bnneck(feature=feature)
    for _ in range(3):
        head(a_map())
    head.eval()
    output = head(a_map())
    # In evaluation the neck uses its running statistics.
    neck = head.get_submodule("neck")
    assert isinstance(neck, nn.BatchNorm1d)
    assert neck.running_mean is not None and neck.running_var is not None
    pooled = a_map().mean(dim=(2, 3))
    normalised = (pooled - neck.running_mean) / (neck.running_var + 1e-5).sqrt()
    expected = normalised if feature == "after" else pooled
    assert torch.allclose(output.embeddings, expected, atol=1e-5)
    assert torch.allclose(output.features, pooled, atol=1e-6)


def test_running_statistics_change_in_training_only() -> None:
    head = bnneck()
    pooled = a_map().mean(dim=(2, 3))
    head(a_map())
    mean, var = head.get_buffer("neck.running_mean"), head.get_buffer("neck.running_var")
    assert torch.allclose(mean, 0.1 * pooled.mean(0), atol=1e-6)
    assert torch.allclose(var, 0.9 + 0.1 * pooled.var(0), atol=1e-6)
    before = mean.clone(), var.clone()
    head.eval()
    head(a_map())
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_a_single_image_can_be_embedded_but_not_trained_on() -> None:
    head = bnneck()
    with pytest.raises(ValueError, match="more than 1 value"):
        head(a_map(1))
    head.eval()
    together = head(a_map()).embeddings
    assert torch.allclose(head(a_map()[:1]).embeddings, together[:1], atol=1e-6)


def test_metric_losses_give_no_gradient_to_neck_and_classifier() -> None:
    head = bnneck()
    features = a_map().requires_grad_()
    head(features).features.sum().backward()
    assert features.grad is not None
    assert all(parameter.grad is None for parameter in head.parameters())
    assert not torch.equal(head.get_buffer("neck.running_mean"), torch.zeros(6))


def test_linear_is_a_classifier_on_the_pooled_feature() -> None:
    torch.manual_seed(0)
    head = HEADS.build("linear", num_classes=20, dim=6)
    output = head(a_map())
    pooled = a_map().mean(dim=(2, 3))
    weight, bias = head.get_parameter("classifier.weight"), head.get_parameter("classifier.bias")
    assert output.logits is not None
    assert torch.allclose(output.features, pooled, atol=1e-6)
    assert torch.equal(output.embeddings, output.features)
    assert torch.allclose(output.logits, pooled @ weight.T + bias, atol=1e-6)
    assert output.logits.shape == (5, 20)


@pytest.mark.parametrize("name", ["bnneck", "linear"])
@pytest.mark.parametrize("pooling", ["avg", "max", "gem"])
def test_tokens_are_pooled_like_the_positions_of_a_map(name: str, pooling: str) -> None:
    torch.manual_seed(0)
    head = HEADS.build(name, num_classes=20, dim=6, pooling=pooling).eval()
    tokens = a_map().flatten(2).transpose(1, 2)
    assert tokens.shape == (5, 8, 6)
    assert torch.allclose(head(tokens).features, head(a_map()).features)


def test_average_and_maximum_by_hand() -> None:
    positions = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[-4.0, -1.0], [-2.0, -1.0]]]])
    assert torch.equal(Pool("avg")(positions), torch.tensor([[3.0, -2.0]]))
    assert torch.equal(Pool("max")(positions), torch.tensor([[6.0, -1.0]]))


def test_gem_is_the_mean_at_one_and_tends_to_the_maximum() -> None:
    positions = a_map().flatten(2) + 0.1
    assert torch.allclose(GeM(p=1.0)(positions), positions.mean(dim=2), atol=1e-6)
    gaps = [
        (positions.amax(dim=2) - GeM(p=p)(positions)).max().item() for p in (1.0, 3.0, 20.0, 60.0)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 <= gaps[-1] < 0.04


def test_gem_by_hand_and_its_power_is_learned() -> None:
    gem = GeM()
    positions = torch.tensor([[[1.0, 2.0, 3.0]]])
    value = gem(positions)
    assert value.item() == pytest.approx(((1 + 8 + 27) / 3) ** (1 / 3), rel=1e-6)
    value.sum().backward()
    # A larger power weights larger values more.
    assert gem.p.grad is not None and gem.p.grad.item() > 0


def test_gem_of_zeros_and_negatives_is_finite_with_its_gradients() -> None:
    gem = GeM()
    positions = torch.tensor([[[0.0, 0.0], [-1.0, -2.0]]], requires_grad=True)
    pooled = gem(positions)
    pooled.sum().backward()
    assert torch.allclose(pooled, torch.full((1, 2), 1e-6))
    assert positions.grad is not None and positions.grad.isfinite().all()
    assert gem.p.grad is not None and gem.p.grad.isfinite().all()
