"""The weighted sum of losses, branches, and the losses' own optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from reidreg import LOSSES, Loss, Output, load_config
from reidreg.data.labels import Labels
from reidreg.training.objective import Objective, build_objective, over_branches

PIDS = torch.tensor([0, 0, 1, 2, 2, 2])


def some_features(seed: int = 0) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def plain(features: Tensor, logits: Tensor | None = None) -> Output:
    return Output(features, features, logits)


class Mean(Loss):
    """The mean of the features, times a number that the model's optimizer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, output: Output, pids: Tensor) -> Tensor:
        return self.factor * output.features.mean()


def test_the_total_is_the_weighted_sum_and_terms_are_reported_unweighted() -> None:
    terms = {"metric": LOSSES.build("triplet"), "mean": Mean()}
    objective = Objective(terms, {"metric": 0.25, "mean": 3.0})
    output = plain(some_features())
    total, values = objective(output, PIDS)
    assert list(values) == ["metric", "mean"]
    assert values["mean"].item() == pytest.approx(some_features().mean().item())
    expected = 0.25 * values["metric"].item() + 3 * values["mean"].item()
    assert total.item() == pytest.approx(expected)


def test_a_term_of_weight_zero_is_left_out() -> None:
    terms: dict[str, Loss] = {"mean": Mean(), "other": Mean()}
    objective = Objective(terms, {"mean": 1.0, "other": 0.0})
    _, values = objective(plain(some_features()), PIDS)
    assert list(values) == ["mean"]
    assert [name for name, _ in objective.shared_parameters()] == ["mean.factor"]


def test_a_term_may_have_the_name_of_a_method_of_a_module() -> None:
    for name in ("forward", "items", "type", "training", "step"):
        objective = Objective({name: Mean()}, {name: 1.0})
        assert list(objective(plain(some_features()), PIDS)[1]) == [name]


def test_branches_give_the_weighted_mean() -> None:
    whole, part = plain(some_features(1)), plain(some_features(2))
    both = Output(whole.features, whole.embeddings, None, ((whole, 3.0), (part, 1.0)))
    value = over_branches(Mean(), both, PIDS)
    expected = (3 * whole.features.mean() + part.features.mean()) / 4
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_branch_may_have_branches_and_the_outer_fields_are_not_used() -> None:
    a, b, c = (plain(some_features(seed)) for seed in (1, 2, 3))
    inner = Output(torch.full((6, 4), torch.nan), a.embeddings, None, ((a, 1.0), (b, 1.0)))
    outer = Output(torch.full((6, 4), torch.nan), a.embeddings, None, ((inner, 1.0), (c, 2.0)))
    means = [x.features.mean().item() for x in (a, b, c)]
    expected = ((means[0] + means[1]) / 2 + 2 * means[2]) / 3
    assert over_branches(Mean(), outer, PIDS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("weight", [5e-4, 1.0, 40.0])
def test_centres_move_to_their_images_whatever_the_weight(weight: float, scaled: bool) -> None:
    torch.manual_seed(0)
    loss = LOSSES.build("center", num_classes=4, dim=4, lr=0.5)
    objective = Objective({"metric": Mean(), "center": loss}, {"metric": 1.0, "center": weight})
    centers = dict(loss.named_parameters())["centers"]
    features, before = some_features().requires_grad_(), centers.detach().clone()
    model_optimizer = SGD([features], lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    total, _ = objective(plain(features), PIDS)
    objective.zero_grad()
    scaler.scale(total).backward()
    scaler.step(model_optimizer)
    objective.step(scaler)
    scaler.update()
    # c_j += (1/B) sum over the images of j of (x_i - c_j); identity 3 has none.
    expected = before.clone()
    for x, pid in zip(some_features(), PIDS.tolist(), strict=True):
        expected[pid] += (x - before[pid]) / len(PIDS)
    assert torch.allclose(centers, expected, atol=1e-6)
    assert torch.equal(centers[3], before[3])


def test_the_weight_of_center_scales_the_gradient_of_the_model() -> None:
    gradients = []
    for weight in (1.0, 5e-4):
        torch.manual_seed(0)
        loss = LOSSES.build("center", num_classes=4, dim=4)
        features = some_features().requires_grad_()
        Objective({"center": loss}, {"center": weight})(plain(features), PIDS)[0].backward()
        assert features.grad is not None
        gradients.append(features.grad)
    assert torch.allclose(gradients[0] * 5e-4, gradients[1], rtol=1e-5)


def test_gradients_of_the_centres_are_reset_between_steps() -> None:
    loss = LOSSES.build("center", num_classes=4, dim=4)
    objective = Objective({"center": loss}, {"center": 0.5})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        (centers,) = loss.parameters()
        before = centers.detach().clone()
        objective.zero_grad()
        objective(plain(some_features()), PIDS)[0].backward()
        objective.step(scaler)
        moved = torch.zeros_like(before).index_add(0, PIDS, some_features() - before[PIDS]) / 6
        assert torch.allclose(centers.detach() - before, moved, atol=1e-6)


def test_parameters_of_losses_go_to_their_own_optimizer_or_to_the_models() -> None:
    center = LOSSES.build("center", num_classes=4, dim=4)
    objective = Objective({"center": center, "mean": Mean()}, {"center": 1.0, "mean": 1.0})
    assert [name for name, _ in objective.shared_parameters()] == ["mean.factor"]
    assert list(objective.optimizer_state()) == ["center"]
    assert len(list(objective.parameters())) == 2


def test_an_objective_is_built_from_a_configuration() -> None:
    flags = ["--losses.center.name=center", "--losses.center.weight=0.001"]
    config = load_config("aihub_kaist", flags=[*flags, "--losses.triplet.weight=0"])
    labels = Labels(pids=tuple(range(10, 30)), camids=(1, 2, 3))
    objective = build_objective(config, labels, dim=16)
    assert [name for name, _ in objective.losses()] == ["id", "center"]
    (centers,) = (p for _, loss in objective.losses() for p in loss.parameters())
    assert centers.shape == (20, 16)
    logits = torch.zeros(6, 20)
    total, values = objective(Output(torch.zeros(6, 16), torch.zeros(6, 16), logits), PIDS)
    expected = values["id"].item() + 0.001 * values["center"].item()
    assert total.item() == pytest.approx(expected, rel=1e-6)
