"""Weights files: every usual format loads, no code in one runs, damage is an error of one line."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from reidreg import BACKBONES, Backbone, DataError
from reidreg.errors import ConfigError
from reidreg_plugins.backbones.weights import load_weights_file, read_weights, without_prefix

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """A torchvision ResNet-18's weights, classifier included."""
    torch.manual_seed(0)
    found: State = torchvision.models.resnet18().state_dict()
    return found


def load(path: Path, name: str = "resnet18") -> tuple[Backbone, str]:
    backbone = BACKBONES.build(name, pretrained=str(path))
    report = backbone.load_pretrained()
    assert report is not None
    return backbone, report


def holds(backbone: Backbone, state: State) -> bool:
    own = backbone.get_submodule("net").state_dict()
    return all(torch.equal(own[key], state[key]) for key in own)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


WRITERS: dict[str, Callable[[State, Path], None]] = {
    "torchvision.pth": lambda state, path: torch.save(state, path),
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "state_dict.tar": lambda state, path: torch.save(
        {"epoch": 3, "arch": "resnet18", "state_dict": state, "best": 0.5}, path
    ),
    "model.pth": lambda state, path: torch.save({"model": state, "optimizer": {}}, path),
    "ema.pth": lambda state, path: torch.save({"state_dict_ema": state}, path),
    "nested.pth": lambda state, path: torch.save({"model": {"state_dict": state}}, path),
    "ddp.pth": lambda state, path: torch.save(prefixed(state, "module."), path),
    "compiled.pth": lambda state, path: torch.save(prefixed(state, "_orig_mod."), path),
    "backbone.pth": lambda state, path: torch.save(prefixed(state, "backbone."), path),
    "reid-strong-baseline.pth": lambda state, path: torch.save(
        {**prefixed(state, "base."), "bottleneck.weight": torch.ones(512)}, path
    ),
    "wrapped.pth": lambda state, path: torch.save(
        {"state_dict": prefixed(state, "module.backbone.")}, path
    ),
    "fast.pth": lambda state, path: torch.save(
        {"model": {**prefixed(state, "module.model."), "heads.weight": torch.ones(2, 2)}}, path
    ),
    "weights.safetensors": lambda state, path: save_file(state, path),
    "module.safetensors": lambda state, path: save_file(prefixed(state, "module."), path),
}


@pytest.mark.parametrize("form", WRITERS)
def test_every_usual_format_of_a_file_loads(form: str, state: State, tmp_path: Path) -> None:
    WRITERS[form](state, tmp_path / form)
    backbone, report = load(tmp_path / form)
    assert holds(backbone, state)
    assert report.startswith(f"pretrained weights: 100 of 100 tensors from {tmp_path / form}")
    assert "fc.weight" in report


def test_a_file_of_timm_loads(tmp_path: Path) -> None:
    source = timm.create_model("resnet18", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    assert holds(load(tmp_path / "timm.pth")[0], source.state_dict())


def test_a_state_dict_of_our_own_backbone_loads(tmp_path: Path) -> None:
    source = BACKBONES.build("resnet18", pretrained="none")
    torch.save(source.state_dict(), tmp_path / "own.pth")
    backbone, report = load(tmp_path / "own.pth")
    assert holds(backbone, source.get_submodule("net").state_dict())
    assert "left out" not in report and "missing" not in report


def test_counters_that_older_files_lack_are_not_reported(state: State, tmp_path: Path) -> None:
    old = {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    _, report = load(tmp_path / "old.pth")
    assert "missing" not in report


def test_a_few_missing_tensors_are_named(state: State, tmp_path: Path) -> None:
    torch.save({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, tmp_path / "x.pth")
    _, report = load(tmp_path / "x.pth")
    assert "99 of 100 tensors" in report and "missing: layer1.0.conv1.weight" in report


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_weights_of_another_architecture_are_refused(
    name: str, state: State, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(DataError, match="of another architecture") as caught:
        load(tmp_path / "resnet18.pth", name)
    assert "\n" not in str(caught.value) and "resnet18.pth" in str(caught.value)


def test_refused_weights_leave_the_module_as_it_was(state: State, tmp_path: Path) -> None:
    torch.save({**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "x.pth")
    backbone = BACKBONES.build("resnet18", pretrained=str(tmp_path / "x.pth"))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(DataError, match=r"conv1.weight is \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"):
        backbone.load_pretrained()
    assert all(torch.equal(v, before[key]) for key, v in backbone.state_dict().items())


def test_prefixes_are_removed_only_as_far_as_keys_match() -> None:
    own = {"model.weight": torch.zeros(1), "model.bias": torch.zeros(1)}
    assert without_prefix(own, own).keys() == own.keys()
    assert without_prefix(prefixed(own, "module."), own).keys() == own.keys()
    assert without_prefix({"other": torch.zeros(1)}, own).keys() == {"other"}
    assert without_prefix({}, own) == {}


# --------------------------------------------------------------------- code in a file


class Calls:
    """Unpickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def evil_contents(marker: Path) -> Mapping[str, Any]:
    touch = f"open({str(marker)!r}, 'w').close()"
    system = Calls(os.system, f"touch {marker}")
    return {
        "system": system,
        "exec": Calls(exec, touch),
        "eval": Calls(eval, touch),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "in-a-list": {"state_dict": [system]},
        "beside-tensors": {"conv1.weight": torch.zeros(2), "extra": system},
        "as-a-key": {("a", Calls(os.mkdir, str(marker))): torch.zeros(2)},
        "module": nn.Linear(2, 2),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("gadget", evil_contents(Path("x")))
def test_code_in_a_file_is_not_run(gadget: str, form: str, protocol: int, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    content = evil_contents(marker)[gadget]
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        zipped = form == "zip"
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError) as caught:
        read_weights(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_error_for_python_objects_says_what_to_save_instead(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(DataError, match=r"save model\.state_dict\(\)"):
        read_weights(tmp_path / "model.pth")


# --------------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 102530333\n",
        b"PK\x03\x04" + bytes(200),
        b"\x80\x02" + bytes(range(200)),
        bytes(range(256)),
    ],
    ids=["empty", "html", "git-lfs", "zip", "pickle", "bytes"],
)
def test_a_file_that_holds_no_weights_is_an_error_of_one_line(
    content: bytes, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_error_for_a_saved_web_page_shows_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("<html>not found</html>")
    with pytest.raises(DataError, match="no weights file .*<html>"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_and_garbled_files_are_data_errors_of_one_line(form: str, tmp_path: Path) -> None:
    tensors = {f"layer{i}.weight": torch.randn(3, 3) for i in range(8)}
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    rng = random.Random(0)
    for percent in range(0, 100, 2):
        path.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(DataError) as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)
    refused = 0
    for _ in range(150):
        garbled = bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            garbled[rng.randrange(len(garbled))] = rng.randrange(256)
        path.write_bytes(garbled)
        # Changed values of a tensor go unnoticed; everything else is a DataError.
        try:
            read_weights(path)
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"state_dict": {}}, "text"],
    ids=["empty", "no-tensors", "list", "tensor", "empty-state", "text"],
)
def test_a_file_without_tensors_by_name_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match="holds no tensors by name"):
        read_weights(tmp_path / "w.pth")


def test_a_mapping_that_contains_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match="holds no tensors by name"):
        read_weights(tmp_path / "w.pth")


def test_a_missing_file_is_refused_before_and_at_loading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither imagenet, nor none, nor a file"):
        BACKBONES.build("resnet18", pretrained=str(tmp_path / "nowhere.pth"))
    with pytest.raises(DataError, match="no weights file at"):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(DataError, match="no weights file at"):
        read_weights(tmp_path / "nowhere.safetensors")


def test_a_folder_is_no_weights_file(tmp_path: Path) -> None:
    for name in ("folder.pth", "folder.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match="no weights file"):
            read_weights(tmp_path / name)


def test_only_weights_that_do_not_fit_are_converted(tmp_path: Path) -> None:
    module, calls = nn.Linear(2, 3), []

    def widen(state: State) -> State:
        calls.append(sorted(state))
        return {key: torch.cat([value, value])[:3] for key, value in state.items()}

    fitting = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    torch.save(fitting, tmp_path / "fitting.pth")
    load_weights_file(module, tmp_path / "fitting.pth", widen)
    assert not calls and torch.equal(module.weight, torch.ones(3, 2))
    torch.save({"weight": torch.full((2, 2), 7.0), "bias": torch.zeros(2)}, tmp_path / "small.pth")
    load_weights_file(module, tmp_path / "small.pth", widen)
    assert calls == [["bias", "weight"]] and torch.equal(module.weight, torch.full((3, 2), 7.0))


def test_a_converter_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    def fail(state: State) -> State:
        raise KeyError("patch_embed\nand more")

    torch.save({"weight": torch.zeros(9)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="cannot be fitted .*patch_embed") as caught:
        load_weights_file(nn.Linear(2, 3), tmp_path / "w.pth", fail)
    assert "\n" not in str(caught.value)
