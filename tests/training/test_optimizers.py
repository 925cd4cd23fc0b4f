"""Optimizers by name, and parameter groups compared with one group per tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reidreg import BACKBONES, load_plugins
from reidreg.config.optimizers import check_optimizer, optimizer_class, torch_optimizers
from reidreg.config.sections import OptimizerConfig
from reidreg.errors import ConfigError
from reidreg.training.optimizers import (
    layer_scales,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)

load_plugins()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    net[1].bias.requires_grad_(False)
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """A step for each factor on the learning rates."""
    generator = torch.Generator().manual_seed(1)
    for factor in rates:
        set_learning_rate(optimizer, factor)
        optimizer.zero_grad()
        images = torch.randn(6, 3, 5, 5, generator=generator)
        torch.autograd.backward(nn.functional.cross_entropy(net(images), torch.arange(6) % 5))
        optimizer.step()


def one_group_a_tensor(net: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """As in reid-strong-baseline: one group per tensor, with separate options for biases."""
    groups: list[dict[str, Any]] = []
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        lr, decay = config.lr, config.weight_decay
        if "bias" in name:
            lr = config.lr * config.bias_lr_factor
            decay = decay if config.bias_weight_decay is None else config.bias_weight_decay
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay, "initial_lr": lr})
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    # With the same kernel: the gradient of a bias before batch normalisation is a rounding error,
    # which Adam scales up to a full step.
    return torch.optim.Adam(groups, fused=True)


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("factor", "decay"), [(1.0, None), (2.0, None), (1.0, 0.0), (2.0, 0.0), (0.5, 0.1)]
)
def test_few_groups_train_as_one_group_per_tensor(
    name: str, factor: float, decay: float | None
) -> None:
    config = OptimizerConfig(
        name=name, lr=0.05, weight_decay=0.01, bias_lr_factor=factor, bias_weight_decay=decay
    )
    ours, theirs = small_net(), small_net()
    optimizer = make_optimizer(config, ours.named_parameters())
    assert len(optimizer.param_groups) == (1 if (factor, decay) == (1.0, None) else 2)
    rates = [0.1, 1.0, 0.5]
    train(ours, optimizer, rates)
    train(theirs, one_group_a_tensor(theirs, config), rates)
    for (key, mine), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-7), key
    assert not torch.allclose(ours.get_parameter("4.weight"), small_net().get_parameter("4.weight"))


def test_the_first_step_of_adam_is_the_learning_rate_by_hand() -> None:
    weight, bias = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([2.0]))
    config = OptimizerConfig(lr=0.1, weight_decay=0.5, bias_lr_factor=2.0, bias_weight_decay=0.0)
    optimizer = make_optimizer(config, [("weight", weight), ("bias", bias)])
    weight.grad, bias.grad = torch.tensor([-0.5]), torch.tensor([-0.5])
    optimizer.step()
    # Decay is part of the gradient: -0.5 + 0.5 * 2 is positive; without decay it is not.
    assert weight.item() == pytest.approx(2 - 0.1, rel=1e-5)
    assert bias.item() == pytest.approx(2 + 0.2, rel=1e-5)


def test_batch_normalisation_is_decayed_too() -> None:
    net = small_net()
    (group,) = make_optimizer(OptimizerConfig(), net.named_parameters()).param_groups
    assert group["weight_decay"] == 5e-4
    assert any(p is net.get_parameter("1.weight") for p in group["params"])


def test_frozen_parameters_are_left_out() -> None:
    net = small_net()
    for config in (OptimizerConfig(), OptimizerConfig(bias_lr_factor=2)):
        trained = [
            p for g in parameter_groups(config, net.named_parameters(), {}) for p in g["params"]
        ]
        assert len(trained) == 5 and all(p.requires_grad for p in trained)


def test_a_group_without_parameters_is_left_out() -> None:
    config = OptimizerConfig(bias_lr_factor=2)
    only = [("scale", nn.Parameter(torch.ones(1)))]
    assert len(parameter_groups(config, only, {})) == 1


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_learning_rates_fall_layer_by_layer_towards_the_input(name: str) -> None:
    backbone = BACKBONES.build("timm", model=name, pretrained="none", input_size=(32, 32))
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(backbone.dim, 5)})
    scales = layer_scales(model, 0.5)
    assert scales.keys() == {name for name, _ in backbone.named_parameters(prefix="backbone")}
    factors = sorted(set(scales.values()))
    assert factors == [0.5**n for n in reversed(range(len(factors)))]
    if name.startswith("vit"):
        last = len(factors) - 1
        for block in range(12):
            assert scales[f"backbone.net.blocks.{block}.attn.qkv.weight"] == 0.5 ** (
                last - block - 1
            )
        assert scales["backbone.net.patch_embed.proj.weight"] == 0.5**last
        assert scales["backbone.net.norm.weight"] == 1
    config = OptimizerConfig(lr=0.1, weight_decay=0.01, bias_lr_factor=2.0)
    optimizer = make_optimizer(config, model.named_parameters(), scales)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        factor = (2.0 if "bias" in key else 1.0) * scales.get(key, 1.0)
        assert rates[id(parameter)] == pytest.approx(0.1 * factor)


def test_layers_that_timm_does_not_know_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.layer_decay"):
        layer_scales(small_net(), 0.5)


def test_the_schedule_multiplies_each_groups_own_rate() -> None:
    config = OptimizerConfig(lr=0.01, bias_lr_factor=2.0)
    optimizer = make_optimizer(config, small_net().named_parameters())
    for factor in (0.1, 1.0, 0.5):
        set_learning_rate(optimizer, factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.01 * factor, 0.02 * factor])


def test_momentum_is_nine_tenths_for_sgd_and_the_optimizers_own_for_others() -> None:
    def momentum(**options: Any) -> float:
        optimizer = make_optimizer(OptimizerConfig(**options), small_net().named_parameters())
        return float(optimizer.param_groups[0]["momentum"])

    assert momentum(name="sgd") == 0.9
    assert momentum(name="sgd", momentum=0.5) == 0.5
    assert momentum(name="rmsprop") == 0.0


def test_betas_are_passed_on() -> None:
    config = OptimizerConfig(name="adamw", betas=(0.8, 0.95))
    optimizer = make_optimizer(config, small_net().named_parameters())
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_torchs_optimizer_is_taken_where_timm_has_the_name_too() -> None:
    assert optimizer_class("adamw") is torch.optim.AdamW
    assert optimizer_class("lamb").__module__.startswith("timm.")


@pytest.mark.parametrize("name", [*sorted(torch_optimizers()), "lamb", "lion", "adopt"])
def test_every_optimizer_of_torch_and_some_of_timm_lower_a_loss(name: str) -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.0)
    optimizer = make_optimizer(config, [("weight", parameter)])
    for _ in range(20):
        optimizer.zero_grad()
        torch.autograd.backward(parameter.square().sum())
        optimizer.step()
    assert parameter.detach().square().sum() < 14.25


def test_a_first_step_that_a_scaler_skips_does_not_change_the_momentum() -> None:
    parameter = nn.Parameter(torch.ones(1000))
    optimizer = make_optimizer(OptimizerConfig(name="sgd", lr=0.1), [("weight", parameter)])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    for weight, scale in ((2.0**100, 1.0), (1.0, 1.0)):
        optimizer.zero_grad()
        ballast = [torch.full((1000,), 1e30) for _ in range(100)]
        del ballast  # memory that is not zero when it is allocated again
        scaler.scale(weight * parameter.sum()).backward()
        scaler.step(optimizer)
        scaler.update(scale)
    # The gradient of the only step that was not skipped, with its weight decay.
    assert torch.allclose(parameter.detach(), torch.full((1000,), 1 - 0.1 * (1 + 5e-4)))


def test_a_parameter_that_is_unfrozen_later_is_trained_with_momentum_from_then_on() -> None:
    first, second = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    config = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.0)
    optimizer = make_optimizer(config, [("first", first), ("second", second)])
    for step in range(3):
        first.grad = torch.ones(3)
        second.grad = torch.ones(3) if step else None
        optimizer.step()
    assert torch.allclose(first.detach(), torch.full((3,), -0.1 * (1 + 1.9 + 2.71)))
    assert torch.allclose(second.detach(), torch.full((3,), -0.1 * (1 + 1.9)))


def test_if_a_fused_kernel_fails_at_its_first_step_foreach_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*tensors: Any, **options: Any) -> None:
        raise RuntimeError("`fused=True` requires all the params to be of another device")

    monkeypatch.setattr(torch, "_fused_adagrad_", refuse)
    config = OptimizerConfig(name="adagrad", weight_decay=0.0)
    (group,) = make_optimizer(config, small_net().named_parameters()).param_groups
    assert group["foreach"] and not group["fused"]
    config = OptimizerConfig(name="adam")
    (group,) = make_optimizer(config, small_net().named_parameters()).param_groups
    assert group["fused"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "adamm"}, "no optimizer 'adamm'; did you mean 'adam'"),
        ({"name": "lbfgs"}, "no optimizer 'lbfgs'"),
        ({"name": "muon"}, "no optimizer 'muon'"),
        ({"name": "adahessian"}, "no optimizer 'adahessian'"),
        ({"name": "bnbadam8bit"}, "no optimizer 'bnbadam8bit'"),
        ({"name": "fusedadam"}, "no optimizer 'fusedadam'"),
        ({"name": "rprop"}, r"optimizer\.weight_decay: rprop has no weight decay; set it to 0"),
        ({"name": "adam", "momentum": 0.9}, r"optimizer\.momentum: adam has no momentum"),
        ({"name": "sgd", "betas": (0.9, 0.99)}, r"optimizer\.betas: sgd has no betas"),
    ],
)
def test_an_option_that_an_optimizer_does_not_have_is_an_error_of_one_line(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_optimizer(OptimizerConfig(**options))
    assert "\n" not in str(caught.value)
