"""Losses against worked examples and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reidreg import LOSSES, Loss, Output, ReidregError


def output_of(features: Tensor, logits: Tensor | None = None) -> Output:
    return Output(features, features, logits)


def naive_triplet(features: Tensor, pids: Tensor, margin: float | None) -> float:
    """Batch-hard triplet loss by loops over anchors, positives and negatives."""
    rows, labels = features.double().tolist(), pids.tolist()
    losses = []
    for anchor, label in zip(rows, labels, strict=True):
        positive, negative = 0.0, math.inf
        for other, other_label in zip(rows, labels, strict=True):
            distance = math.dist(anchor, other)
            if other_label == label:
                positive = max(positive, distance)
            else:
                negative = min(negative, distance)
        gap = positive - negative
        losses.append(math.log1p(math.exp(gap)) if margin is None else max(0.0, gap + margin))
    return sum(losses) / len(losses)


def smoothed(logits: Tensor, pids: Tensor, share: float) -> float:
    """-sum q log p by loops."""
    total = 0.0
    for row, label in zip(logits.double().tolist(), pids.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(x) for x in row))
        for position, x in enumerate(row):
            q = (1 - share) * (position == label) + share / len(row)
            total -= q * (x - normaliser)
    return total / len(logits)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_cross_entropy_of_a_zero_classifier_is_ln_of_the_number_of_identities(share: float) -> None:
    loss = LOSSES.build("cross_entropy", label_smoothing=share)
    value = loss(output_of(torch.zeros(4, 2), torch.zeros(4, 188)), torch.tensor([0, 5, 187, 5]))
    assert value.item() == pytest.approx(math.log(188), rel=1e-6)
    assert value.item() == pytest.approx(5.236442, abs=1e-6)


def test_smoothing_keeps_the_loss_above_the_entropy_of_its_target() -> None:
    # q is 0.9 + 0.1/188 for one class and 0.1/188 for the 187 others.
    high, low = 0.9 + 0.1 / 188, 0.1 / 188
    floor = -high * math.log(high) - 187 * low * math.log(low)
    assert floor == pytest.approx(0.8442, abs=1e-4)
    loss = LOSSES.build("cross_entropy", label_smoothing=0.1)
    pids = torch.tensor([3, 77])
    best = torch.full((2, 188), math.log(low)).index_put(
        (torch.arange(2), pids), torch.tensor(math.log(high))
    )
    assert loss(output_of(best, best), pids).item() == pytest.approx(floor, rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 30.0):
        other = best + scale * torch.randn(2, 188, generator=generator)
        assert loss(output_of(other, other), pids).item() > floor
    # Full certainty, the minimum of plain cross-entropy, costs more than the target itself.
    certain = torch.zeros(2, 188).index_put((torch.arange(2), pids), torch.tensor(100.0))
    assert loss(output_of(certain, certain), pids).item() > floor + 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_label_smoothing_is_that_of_loops_and_that_of_torch(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, 11, generator=generator)
    pids = torch.randint(0, 11, (6,), generator=generator)
    value = LOSSES.build("cross_entropy", label_smoothing=share)(output_of(logits, logits), pids)
    assert value.item() == pytest.approx(smoothed(logits, pids, share), rel=1e-5)
    assert torch.equal(value, torch.nn.CrossEntropyLoss(label_smoothing=share)(logits, pids))


def test_cross_entropy_without_a_classifier_is_an_error_that_names_a_head() -> None:
    with pytest.raises(ReidregError, match="bnneck"):
        LOSSES.build("cross_entropy")(output_of(torch.zeros(2, 3)), torch.tensor([0, 1]))


def test_triplet_of_a_worked_example() -> None:
    # On a line: person 0 at 0 and 3, person 1 at 4 and 10.
    features = torch.tensor([[0.0], [3.0], [4.0], [10.0]])
    pids = torch.tensor([0, 0, 1, 1])
    # (hardest positive, hardest negative): (3, 4), (3, 1), (6, 1), (6, 7); margin 0.3, at least 0.
    expected = (0 + 2.3 + 5.3 + 0) / 4
    value = LOSSES.build("triplet", margin=0.3)(output_of(features), pids)
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0, None])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_triplet_is_that_of_three_loops(dtype: torch.dtype, margin: float | None) -> None:
    generator = torch.Generator().manual_seed(2)
    loss = LOSSES.build("triplet", margin=margin)
    for counts in ([4, 4, 4, 4], [1, 2, 5, 3], [1, 1, 1], [7, 1]):
        pids = torch.tensor([pid for pid, count in enumerate(counts) for _ in range(count)])
        pids = pids[torch.randperm(len(pids), generator=generator)]
        features = torch.randn(len(pids), 8, generator=generator).to(dtype)
        value = loss(output_of(features), pids)
        # |x|^2 + |y|^2 - 2xy leaves an image at a distance of about 1e-3 from itself in float32.
        single = min(counts) == 1
        assert value.item() == pytest.approx(
            naive_triplet(features, pids, margin), rel=1e-5, abs=1e-4 if single else 1e-6
        )


def test_the_only_image_of_an_identity_is_its_own_positive() -> None:
    features = torch.tensor([[0.0], [1.0], [9.0]])
    value = LOSSES.build("triplet", margin=2.0)(output_of(features), torch.tensor([0, 1, 2]))
    # Hardest negatives: 1, 1, 8; hardest positives: 0.
    assert value.item() == pytest.approx((1 + 1 + 0) / 3, abs=1e-5)


def test_the_soft_margin_is_log_of_one_plus_exp() -> None:
    features = torch.tensor([[0.0], [3.0], [4.0], [10.0]])
    expected = sum(math.log(1 + math.exp(gap)) for gap in (3 - 4, 3 - 1, 6 - 1, 6 - 7)) / 4
    value = LOSSES.build("triplet", margin=None)(output_of(features), torch.tensor([0, 0, 1, 1]))
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("margin", [0.3, None])
def test_a_batch_of_one_identity_has_no_loss_and_no_gradient(margin: float | None) -> None:
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    value = LOSSES.build("triplet", margin=margin)(output_of(features), torch.zeros(4).long())
    value.backward()
    assert value.item() == 0
    assert features.grad is not None and torch.equal(features.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("margin", [0.3, None])
def test_equal_images_have_a_finite_gradient(margin: float | None) -> None:
    features = torch.ones(4, 3).requires_grad_()
    LOSSES.build("triplet", margin=margin)(
        output_of(features), torch.tensor([0, 0, 1, 1])
    ).backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_the_gradient_of_triplet_goes_from_the_hardest_negative_to_the_positive() -> None:
    features = torch.tensor([[0.0], [3.0], [4.0], [10.0]], requires_grad=True)
    LOSSES.build("triplet", margin=0.3)(output_of(features), torch.tensor([0, 0, 1, 1])).backward()
    # Anchors 1 and 2 are active: |3-0| - |3-4| and |4-10| - |4-3|, each a quarter.
    expected = torch.tensor([[-1.0], [1 + 1 + 1], [-1 - 1 - 1], [1.0]]) / 4
    assert features.grad is not None
    assert torch.allclose(features.grad, expected, atol=1e-5)


def center_of(num_classes: int, dim: int, lr: float = 0.5) -> Loss:
    torch.manual_seed(4)
    return LOSSES.build("center", num_classes=num_classes, dim=dim, lr=lr)


def test_center_is_the_mean_squared_distance_to_the_own_centre() -> None:
    loss = center_of(3, 2)
    centers = dict(loss.named_parameters())["centers"]
    with torch.no_grad():
        centers.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]]))
    features = torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.0, 1.0]])
    # 25, 1 and 1 + 0.
    value = loss(output_of(features), torch.tensor([0, 1, 1]))
    assert value.item() == pytest.approx((25 + 1 + 1) / 3)


def test_center_is_that_of_loops_over_all_columns() -> None:
    loss = center_of(7, 5)
    centers = loss.get_parameter("centers").detach()
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(5))
    pids = torch.tensor([0, 0, 3, 6, 6, 6])
    total = 0.0
    for x, pid in zip(features, pids.tolist(), strict=True):
        for column, center in enumerate(centers):
            square = float((x - center).square().sum()) if column == pid else 0.0
            total += min(max(square, 1e-12), 1e12)
    assert loss(output_of(features), pids).item() == pytest.approx(total / 6, rel=1e-6)


def test_centres_start_as_standard_normal_numbers() -> None:
    (centers,) = center_of(200, 50).parameters()
    assert centers.shape == (200, 50)
    assert abs(centers.mean().item()) < 0.03 and abs(centers.std().item() - 1) < 0.03


def test_the_gradient_of_center_on_the_features_is_twice_the_mean_difference() -> None:
    loss = center_of(3, 4)
    (centers,) = loss.parameters()
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(6)).requires_grad_()
    pids = torch.tensor([0, 1, 1, 2, 0])
    loss(output_of(features), pids).backward()
    assert features.grad is not None
    assert torch.allclose(features.grad, 2 / 5 * (features - centers[pids]).detach(), atol=1e-6)


def test_losses_of_low_precision_outputs_are_computed_in_float32() -> None:
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))
    pids = torch.tensor([0, 0, 1, 1])
    for name in ("triplet", "center", "cross_entropy"):
        loss = LOSSES.build(name, num_classes=8, dim=8)
        low = features.to(torch.bfloat16)
        value = loss(output_of(low, low), pids)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(output_of(low.float(), low.float()), pids))
