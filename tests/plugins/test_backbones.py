"""Backbones: ResNets against torchvision's, and models of timm at the sizes of crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from reidreg import BACKBONES, DataError, ReidregError
from reidreg.errors import ConfigError

CONV = nn.Conv2d


def an_image(height: int = 64, width: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def with_random_statistics(net: nn.Module) -> nn.Module:
    """A network whose normalisations are not the identity, as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(len(tensor), generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.copy_(0.1 * torch.randn(len(tensor), generator=generator))
    return net


def torchvision_map(net: torchvision.models.ResNet, images: Tensor) -> Tensor:
    """torchvision's forward pass without its pooling and classifier."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    result: Tensor = net.layer4(net.layer3(net.layer2(net.layer1(x))))
    return result


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> tuple[torchvision.models.ResNet, Path]:
    """A torchvision ResNet-50 with random weights, and its file."""
    torch.manual_seed(2)
    net = with_random_statistics(torchvision.models.resnet50()).eval()
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(net.state_dict(), path)
    return net, path


@pytest.mark.parametrize("stem_relu", [True, False], ids=["stem-relu", "no-stem-relu"])
@pytest.mark.parametrize("last_stride", [1, 2])
def test_resnet50_is_torchvisions_with_the_same_weights(
    resnet50: tuple[torchvision.models.ResNet, Path], last_stride: int, stem_relu: bool
) -> None:
    theirs, path = resnet50
    ours = BACKBONES.build(
        "resnet50", pretrained=str(path), last_stride=last_stride, stem_relu=stem_relu
    ).eval()
    report = ours.load_pretrained()
    assert report is not None and "left out: fc.weight, fc.bias" in report
    strides = (last_stride, last_stride)
    relu = theirs.relu
    first = theirs.layer4[0]
    first.conv2.stride = first.downsample[0].stride = strides
    theirs.relu = relu if stem_relu else nn.Identity()
    try:
        with torch.no_grad():
            expected, found = torchvision_map(theirs, an_image()), ours(an_image())
    finally:
        first.conv2.stride = first.downsample[0].stride = (2, 2)
        theirs.relu = relu
    assert found.shape == ((2, 2048, 4, 2) if last_stride == 1 else (2, 2048, 2, 1))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_last_stride_one_keeps_a_map_of_16_by_8_and_dilates_nothing() -> None:
    fine = BACKBONES.build("resnet50", pretrained="none").eval()
    coarse = BACKBONES.build("resnet50", pretrained="none", last_stride=2).eval()
    with torch.no_grad():
        image = an_image(256, 128, batch=1)
        assert fine(image).shape == (1, 2048, 16, 8)
        assert coarse(image).shape == (1, 2048, 8, 4)
    layer4 = [m for m in fine.get_submodule("net.layer4").modules() if isinstance(m, CONV)]
    assert len(layer4) == 10
    assert {conv.dilation for conv in layer4} == {conv.stride for conv in layer4} == {(1, 1)}
    assert {c.dilation for c in fine.modules() if isinstance(c, CONV)} == {(1, 1)}
    shapes = {key: value.shape for key, value in fine.state_dict().items()}
    assert shapes == {key: value.shape for key, value in coarse.state_dict().items()}
    # The other stages keep their strides.
    for layer in ("layer2", "layer3"):
        convs = fine.get_submodule(f"net.{layer}").modules()
        assert sum(isinstance(m, CONV) and m.stride == (2, 2) for m in convs) == 2


@pytest.mark.parametrize("stem_relu", [True, False])
def test_the_stem_has_a_relu_only_with_stem_relu(stem_relu: bool) -> None:
    backbone = BACKBONES.build("resnet18", pretrained="none", stem_relu=stem_relu).eval()
    seen: list[Tensor] = []
    pool = backbone.get_submodule("net.maxpool")
    pool.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        found = backbone(an_image())
    assert (seen[0] < 0).any().item() is not stem_relu
    # The blocks keep their ReLUs.
    assert (found >= 0).all()


@pytest.mark.parametrize(
    ("name", "dim", "parameters"),
    [
        ("resnet18", 512, 11_176_512),
        ("resnet34", 512, 21_284_672),
        ("resnet50", 2048, 23_508_032),
        ("resnet101", 2048, 42_500_160),
        ("resnet152", 2048, 58_143_808),
    ],
)
def test_the_resnets_are_those_of_the_paper(name: str, dim: int, parameters: int) -> None:
    backbone = BACKBONES.build(name, pretrained="none")
    assert backbone.dim == dim
    # As torchvision counts them, less the classifier of 1000 classes.
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    own = getattr(torchvision.models, name)
    with torch.device("meta"):
        whole = sum(p.numel() for p in own().parameters())
    assert whole - 1000 * dim - 1000 == parameters


def test_imagenets_normalisation_is_expected_unless_a_model_says_otherwise() -> None:
    assert BACKBONES.build("resnet18", pretrained="none").mean == (0.485, 0.456, 0.406)
    vit = BACKBONES.build("timm", model="vit_tiny_patch16_224", pretrained="none")
    assert vit.mean == vit.std == (0.5, 0.5, 0.5)


def test_a_vision_transformer_takes_the_size_of_a_crop() -> None:
    model = "vit_tiny_patch16_224"
    image = an_image(256, 128)
    shapes = {}
    for tokens in ("auto", "class", "patch"):
        vit = BACKBONES.build(
            "timm", model=model, pretrained="none", tokens=tokens, input_size=(256, 128)
        )
        with torch.no_grad():
            shapes[tokens] = vit.eval()(image).shape
        assert vit.dim == 192
    # 16 x 8 patches, after a class token.
    assert shapes == {"auto": (2, 1, 192), "class": (2, 1, 192), "patch": (2, 128, 192)}


def test_class_and_patch_tokens_are_parts_of_what_timm_returns() -> None:
    options = {"model": "vit_tiny_patch16_224", "pretrained": "none", "input_size": (64, 32)}
    torch.manual_seed(0)
    both = BACKBONES.build("timm", **options, tokens="class").eval()
    patches = BACKBONES.build("timm", **options, tokens="patch").eval()
    patches.load_state_dict(both.state_dict())
    with torch.no_grad():
        net: Any = both.get_submodule("net")
        whole = net.forward_features(an_image())
        assert torch.equal(both(an_image()), whole[:, :1])
        assert torch.equal(patches(an_image()), whole[:, 1:])


def test_a_model_without_class_token_refuses_to_pool_it() -> None:
    with pytest.raises(ReidregError, match="convnext_atto has no class token; use patch"):
        BACKBONES.build("timm", model="convnext_atto", pretrained="none", tokens="class")


@pytest.mark.parametrize("model", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_maps_of_timm_have_their_channels_first(model: str) -> None:
    backbone = BACKBONES.build("timm", model=model, pretrained="none", input_size=(128, 64)).eval()
    with torch.no_grad():
        found = backbone(an_image(128, 64))
    assert found.shape == (2, backbone.dim, 4, 2)


def test_square_position_embeddings_of_a_file_are_fitted_to_the_input_size(tmp_path: Path) -> None:
    torch.manual_seed(3)
    square = timm.create_model("vit_tiny_patch16_224")
    torch.save(square.state_dict(), tmp_path / "vit.pth")
    vit = BACKBONES.build(
        "timm",
        model="vit_tiny_patch16_224",
        pretrained=str(tmp_path / "vit.pth"),
        input_size=(256, 128),
    )
    report = vit.load_pretrained()
    assert report is not None and "150 of 150 tensors" in report and "head.weight" in report
    loaded, source = vit.get_submodule("net").state_dict(), square.state_dict()
    for key, value in loaded.items():
        if key != "pos_embed":
            assert torch.equal(value, source[key]), key
    grid = resample_abs_pos_embed(source["pos_embed"], [16, 8], num_prefix_tokens=1)
    assert torch.equal(loaded["pos_embed"], grid)
    assert torch.equal(loaded["pos_embed"][:, 0], source["pos_embed"][:, 0])


def test_weights_of_the_same_size_are_not_converted(tmp_path: Path) -> None:
    options = {"model": "vit_tiny_patch16_224", "input_size": (64, 32)}
    torch.manual_seed(4)
    trained = BACKBONES.build("timm", **options, pretrained="none")
    torch.save(trained.state_dict(), tmp_path / "ours.pth")
    again = BACKBONES.build("timm", **options, pretrained=str(tmp_path / "ours.pth"))
    again.load_pretrained()
    for key, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_windows_of_a_swin_are_fitted_to_the_input_size(tmp_path: Path) -> None:
    model = "swin_tiny_patch4_window7_224"
    source = timm.create_model(model)
    torch.save(source.state_dict(), tmp_path / "swin.pth")
    swin = BACKBONES.build(
        "timm", model=model, pretrained=str(tmp_path / "swin.pth"), input_size=(64, 32)
    )
    report = swin.load_pretrained()
    assert report is not None and "171 of 171 tensors" in report
    with torch.no_grad():
        assert swin.eval()(an_image()).isfinite().all()


def test_position_embeddings_that_cannot_be_fitted_are_an_error_of_one_line(tmp_path: Path) -> None:
    # 11 x 5 positions: timm assumes that position embeddings are square.
    tall = timm.create_model("vit_tiny_patch16_224", img_size=(176, 80))
    torch.save(tall.state_dict(), tmp_path / "tall.pth")
    vit = BACKBONES.build(
        "timm", model="vit_tiny_patch16_224", pretrained=str(tmp_path / "tall.pth")
    )
    with pytest.raises(DataError, match="cannot be fitted to this backbone and its input") as info:
        vit.load_pretrained()
    assert "\n" not in str(info.value)


def test_weights_of_a_wider_transformer_are_refused(tmp_path: Path) -> None:
    wide = timm.create_model("vit_tiny_patch16_224", embed_dim=48, num_heads=3, depth=12)
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    vit = BACKBONES.build(
        "timm", model="vit_tiny_patch16_224", pretrained=str(tmp_path / "wide.pth")
    )
    with pytest.raises(DataError, match="weights") as info:
        vit.load_pretrained()
    assert "\n" not in str(info.value)


def test_an_unknown_timm_model_is_refused_with_similar_names() -> None:
    with pytest.raises(ConfigError, match=r"model: .*'vit_smal_patch16_224'; did you mean vit_"):
        BACKBONES.build("timm", model="vit_smal_patch16_224", pretrained="none")


def test_no_weights_are_loaded_with_pretrained_none() -> None:
    for backbone in (
        BACKBONES.build("resnet18", pretrained="none"),
        BACKBONES.build("timm", model="convnext_atto", pretrained="none"),
    ):
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        assert backbone.load_pretrained() is None
        assert all(torch.equal(v, before[key]) for key, v in backbone.state_dict().items())


def test_drop_path_is_passed_on() -> None:
    options = {"model": "convnext_atto", "pretrained": "none"}
    torch.manual_seed(0)
    steady = BACKBONES.build("timm", **options)
    dropping = BACKBONES.build("timm", **options, drop_path=0.5)
    image = an_image()
    with torch.no_grad():
        assert torch.equal(steady(image), steady(image))
        assert not torch.equal(dropping(image), dropping(image))


# --------------------------------------------------------------------- an untrained start


@pytest.mark.parametrize(
    "model", ["resnet18", "resnet50", "seresnet33ts", "ecaresnet26t", "regnety_002"]
)
def test_an_untrained_model_of_timm_has_no_branch_that_is_switched_off(model: str) -> None:
    net = BACKBONES.build("timm", model=model, pretrained="none")
    gains = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert gains and all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)


def test_an_untrained_resnet_is_the_same_by_its_own_name_and_by_timms() -> None:
    torch.manual_seed(0)
    ours = BACKBONES.build("resnet18", pretrained="none", last_stride=2).state_dict()
    torch.manual_seed(0)
    theirs = BACKBONES.build("timm", model="resnet18", pretrained="none").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "test_vit", "test_convnext"])
def test_other_untrained_models_start_as_timm_has_them(model: str) -> None:
    torch.manual_seed(0)
    net = BACKBONES.build("timm", model=model, pretrained="none", input_size=(64, 32))
    torch.manual_seed(0)
    sized = {"img_size": (64, 32)} if "vit" in model else {}
    expected = timm.create_model(model, num_classes=0, **sized)
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.net.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_weights_from_a_file_are_what_the_file_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("resnet18", num_classes=0)  # with gains of zero
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    net = BACKBONES.build("resnet18", pretrained=str(tmp_path / "resnet18.pth"))
    net.load_pretrained()
    assert torch.equal(net.net.layer1[0].bn2.weight, torch.zeros(64))
    assert all(
        torch.equal(value, source.state_dict()[key]) for key, value in net.net.state_dict().items()
    )
