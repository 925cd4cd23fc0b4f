"""What every registered part keeps to: a schema that explains itself, and a quiet constructor."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reidreg import (
    BACKBONES,
    DATASETS,
    EVALUATORS,
    HEADS,
    LOSSES,
    SAMPLERS,
    Embeddings,
    Output,
    Registry,
    ReidregError,
    load_config,
)
from reidreg.parts.interfaces import REGISTRIES
from reidreg.parts.schema import RUN_TIME_FACTS, options_of

PIDS = [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 5, 5]
DIM, CLASSES = 16, 6
FACTS: dict[str, dict[str, Any]] = {
    "dataset": {},
    "sampler": {"pids": PIDS, "camids": [1] * 15, "seed": 3, "rank": 0, "world_size": 1},
    "backbone": {"num_classes": CLASSES, "num_cameras": 3, "input_size": (64, 32)},
    "head": {"num_classes": CLASSES, "num_cameras": 3, "dim": DIM},
    "loss": {"num_classes": CLASSES, "num_cameras": 3, "dim": DIM},
    "evaluator": {},
}
# Options that have no default; a new part with one needs a line here.
GIVEN: dict[tuple[str, str], dict[str, Any]] = {("backbone", "timm"): {"model": "convnext_atto"}}

PARTS = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]


def names_of(registry: Registry[Any]) -> list[str]:
    return list(registry)


def build(kind: str, name: str, **options: Any) -> Any:
    known = options_of(REGISTRIES[kind][name])
    if "pretrained" in known:
        options = {"pretrained": "none", **options}
    if kind == "sampler":
        options = {"batch_size": 4, **({"instances": 2} if "instances" in known else {}), **options}
    torch.manual_seed(0)
    given = GIVEN.get((kind, name), {})
    return REGISTRIES[kind].build(name, **{**given, **options}, **FACTS[kind])


def explained(part: type) -> dict[str, str]:
    """The entries of the Args section of the class that wrote the constructor."""
    (owner,) = [cls for cls in part.__mro__ if "__init__" in cls.__dict__][:1]
    _, _, section = (inspect.getdoc(owner) or "").partition("Args:\n")
    section = re.split(r"\n\S", section)[0]
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r"    (\w+): (.+)", line)
        if start:
            name, entries[start[1]] = start[1], start[2]
        elif line.strip() and name:
            entries[name] += " " + line.strip()
    return entries


def test_every_kind_has_parts() -> None:
    assert {kind for kind, _ in PARTS} == set(REGISTRIES) == set(FACTS)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_a_part_has_a_line_that_says_what_it_is(kind: str, name: str) -> None:
    part = REGISTRIES[kind][name]
    assert part.__doc__, "its own docstring, not that of a base class"
    first, _, rest = inspect.cleandoc(part.__doc__).partition("\n")
    assert len(first) <= 100 and first.endswith(".") and len(first.split()) >= 1
    assert not rest or rest.startswith("\n"), "an empty line ends the first"
    assert "TODO" not in part.__doc__


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_option_is_typed_and_explained(kind: str, name: str) -> None:
    part = REGISTRIES[kind][name]
    options, entries = options_of(part), explained(part)
    assert set(entries) == set(options), "an entry for each option, and none for anything else"
    for option, text in entries.items():
        assert text.endswith("."), option
        assert len(text.split()) >= 3, option
        assert text.strip(". ").lower().replace(" ", "_") != option
        # The signature has the type.
        assert not re.match(r"\(?(int|float|str|bool|list|tuple|Optional)\b", text), option
    for parameter in inspect.signature(part).parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert parameter.annotation is not parameter.empty
    assert all(option.hint is not Any for option in options.values())


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_facts_are_not_taken_for_options(kind: str, name: str) -> None:
    taken = set(inspect.signature(REGISTRIES[kind][name]).parameters) & RUN_TIME_FACTS
    assert taken <= set(FACTS[kind])


def test_the_explanations_are_the_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config("aihub_kaist", flags=["--losses.center.name=center", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    parts = [
        ("dataset", "aihub_kaist"),
        ("sampler", "identity"),
        ("backbone", "resnet50"),
        ("head", "bnneck"),
        ("loss", "triplet"),
        ("loss", "center"),
        ("evaluator", "retrieval"),
    ]
    for kind, name in parts:
        for option, text in explained(REGISTRIES[kind][name]).items():
            assert "".join(text.rstrip(".").split()) in shown, f"{kind} {name}: {option}"


# --------------------------------------------------------------------- constructors

_WATCHED = ("open", "os.listdir", "os.scandir", "os.mkdir", "subprocess.Popen", "socket.connect")
_seen: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in _WATCHED:
        _seen.append(f"{event} {arguments[:1]}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """What is opened, listed or started within the block."""
    global _seen
    events: list[str] = []
    _seen = events
    try:
        yield events
    finally:
        _seen = None


@functools.lru_cache
def warm_up(kind: str) -> None:
    """Import what constructors import: modules are files too."""
    for name in ("timm",) if kind == "backbone" else names_of(REGISTRIES[kind]):
        build(kind, name)


def test_the_watch_sees_files(tmp_path: Any) -> None:
    with watching() as events:
        (tmp_path / "file").write_text("")
        list(tmp_path.iterdir())
    assert any(event.startswith("open") for event in events) and len(events) >= 2


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_a_constructor_reads_nothing_and_asks_nobody(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        {"pretrained": "imagenet"} if "pretrained" in options_of(REGISTRIES[kind][name]) else {}
    )
    warm_up(kind)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with watching() as events:
        part = build(kind, name, **options)
    assert events == []
    assert isinstance(part, REGISTRIES[kind].base)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_an_option_that_does_not_exist_is_refused(kind: str, name: str) -> None:
    with pytest.raises(ReidregError, match="no such option"):
        build(kind, name, no_such_thing=1)


# --------------------------------------------------------------------- modules


def a_map() -> Tensor:
    return torch.rand(5, DIM, 16, 8, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.rand(5, 12, DIM, generator=torch.Generator().manual_seed(2))


def images() -> Tensor:
    return torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(3))


def with_camids(module: Any, values: Tensor) -> tuple[Tensor, ...]:
    return (values, torch.arange(len(values)) % 3) if module.uses_camids else (values,)


def tensors_of(output: Output) -> list[Tensor]:
    own = [output.features, output.embeddings]
    own += [] if output.logits is None else [output.logits]
    return own + [x for branch, _ in output.branches for x in tensors_of(branch)]


MODULES = [(kind, name) for kind, name in PARTS if kind in ("backbone", "head", "loss")]


def answers(kind: str, module: nn.Module) -> list[Tensor]:
    """What a module gives for the same input each time."""
    with torch.no_grad():
        if kind == "backbone":
            return [module(*with_camids(module, images()))]
        if kind == "head":
            return tensors_of(module(*with_camids(module, a_map())))
        return [module(an_output(), labels())]


@pytest.mark.parametrize(("kind", "name"), MODULES)
def test_a_module_can_be_copied_and_its_state_taken_over(kind: str, name: str) -> None:
    module = build(kind, name).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.01)
    expected = answers(kind, module)
    copied = copy.deepcopy(module)
    fresh = build(kind, name).eval()
    missing = fresh.load_state_dict(module.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    for other in (copied, fresh):
        for mine, theirs in zip(expected, answers(kind, other), strict=True):
            assert torch.equal(mine, theirs)
    own = {id(parameter) for parameter in module.parameters()}
    assert not own & {id(parameter) for parameter in copied.parameters()}


@pytest.mark.parametrize("name", names_of(BACKBONES))
def test_a_backbone_gives_a_map_or_tokens_of_its_width(name: str) -> None:
    backbone = build("backbone", name)
    features = backbone(*with_camids(backbone, images()))
    assert features.dtype == torch.float32 and features.isfinite().all()
    assert features.dim() in (3, 4) and len(features) == 2
    assert features.shape[1 if features.dim() == 4 else 2] == backbone.dim
    assert len(backbone.mean) == len(backbone.std) == 3
    torch.autograd.backward(features.square().mean())
    trained = [p for p in backbone.parameters() if p.requires_grad and p.grad is not None]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("name", names_of(HEADS))
@pytest.mark.parametrize("shape", ["map", "tokens"])
def test_a_head_gives_features_embeddings_and_logits(name: str, shape: str) -> None:
    head = build("head", name)
    features = (a_map() if shape == "map" else tokens()).requires_grad_()
    try:
        output = head(*with_camids(head, features))
    except ReidregError:
        assert shape == "tokens", "every head takes a map"
        return
    assert output.features.shape == (5, head.dim)
    assert output.embeddings.dim() == 2 and len(output.embeddings) == 5
    logits = [o.logits for o in [output, *(b for b, _ in output.branches)] if o.logits is not None]
    assert all(x.shape == (5, CLASSES) for x in logits)
    assert all(weight > 0 for _, weight in output.branches)
    assert all(x.isfinite().all() for x in tensors_of(output))
    torch.autograd.backward([x.square().sum() for x in tensors_of(output)])
    assert features.grad is not None and features.grad.isfinite().all()
    with torch.no_grad():
        alone = head.eval()(*with_camids(head, features[:1]))
    assert alone.embeddings.shape == (1, output.embeddings.shape[1])


def an_output() -> Output:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(8, DIM, generator=generator)
    logits = torch.randn(8, CLASSES, generator=generator)
    return Output(features, torch.nn.functional.normalize(features), logits)


def labels() -> Tensor:
    return torch.tensor([0, 0, 1, 1, 2, 2, 5, 5])


@pytest.mark.parametrize("name", names_of(LOSSES))
def test_a_loss_is_a_number_with_finite_gradients(name: str) -> None:
    loss, output = build("loss", name), an_output()
    assert output.logits is not None
    leaves = [x.requires_grad_() for x in (output.features, output.logits)]
    value = loss(output, labels())
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    value.backward()
    gradients = [x.grad for x in [*leaves, *loss.parameters()] if x.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    assert any(bool((g != 0).any()) for g in gradients)


@pytest.mark.parametrize("name", names_of(LOSSES))
def test_a_loss_does_not_care_for_the_order_of_a_batch(name: str) -> None:
    loss, output = build("loss", name), an_output()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    assert output.logits is not None
    shuffled = Output(output.features[order], output.embeddings[order], output.logits[order])
    value, other = loss(output, labels()), loss(shuffled, labels()[order])
    assert other.item() == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize("name", names_of(LOSSES))
def test_a_losses_optimizer_steps_parameters_of_its_own(name: str) -> None:
    loss = build("loss", name)
    optimizer = loss.make_optimizer()
    if optimizer is not None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert stepped == {id(p) for p in loss.parameters()} and stepped


# --------------------------------------------------------------------- samplers, evaluators, data


@pytest.mark.parametrize("name", names_of(SAMPLERS))
def test_a_sampler_gives_as_many_whole_batches_as_it_says(name: str) -> None:
    sampler = build("sampler", name)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) > 0
        assert all(len(batch) == 4 for batch in batches)
        flat = [index for batch in batches for index in batch]
        assert all(type(index) is int and 0 <= index < len(PIDS) for index in flat)


@pytest.mark.parametrize("name", names_of(SAMPLERS))
def test_a_sampler_is_a_function_of_seed_and_epoch(name: str) -> None:
    def batches(sampler: Any, epoch: int) -> list[list[int]]:
        sampler.set_epoch(epoch)
        return list(sampler)

    one, other = build("sampler", name), build("sampler", name)
    first = [batches(one, epoch) for epoch in range(4)]
    assert [batches(other, epoch) for epoch in (3, 2, 1, 0)] == first[::-1]
    assert len(Counter(map(str, first))) > 1, "epochs differ"
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert list(other) == list(one)
    facts = {**FACTS["sampler"], "seed": 4}
    options = {"batch_size": 4, **({"instances": 2} if name == "identity" else {})}
    another = SAMPLERS.build(name, **options, **facts)
    assert [batches(another, epoch) for epoch in range(4)] != first


@pytest.mark.parametrize("name", names_of(EVALUATORS))
def test_an_evaluator_gives_figures_that_json_can_hold_and_rankings(name: str) -> None:
    evaluator = build("evaluator", name)
    generator = torch.Generator().manual_seed(6)

    def embeddings(pids: list[int], camid: int) -> Embeddings:
        features = torch.eye(8)[pids] + 0.01 * torch.randn(len(pids), 8, generator=generator)
        return Embeddings(features, torch.tensor(pids), torch.full((len(pids),), camid))

    query, gallery = embeddings([1, 2, 3], 0), embeddings([1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7], 1)
    figures = evaluator.evaluate(query, gallery)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["mAP"] == pytest.approx(1.0) and figures["rank1"] == 1.0
    indices, distances = evaluator.rank(query, gallery, 4)
    assert indices.shape == distances.shape == (3, 4) and indices.dtype == torch.int64
    assert gallery.pids[indices[:, :2]].tolist() == [[1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize("name", names_of(DATASETS))
def test_a_data_set_that_is_not_there_is_an_error_only_when_it_is_read(
    name: str, tmp_path: Any
) -> None:
    (tmp_path / "file").write_text("")
    dataset = build("dataset", name, root=str(tmp_path / "file"))
    with pytest.raises(ReidregError) as caught:
        _ = dataset.query
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
