"""Registries: mappings with a decorator, whose classes' signatures are schemas."""

from __future__ import annotations

import math
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt
from hypothesis import given
from hypothesis import strategies as st

from reidreg import BACKBONES, HEADS, LOSSES, SAMPLERS, Loss, Registry
from reidreg.errors import ConfigError, PluginError, UnknownNameError
from reidreg.parts.interfaces import REGISTRIES
from reidreg.parts.schema import (
    RUN_TIME_FACTS,
    check_limits,
    check_schema,
    describe_type,
    fits,
    options_of,
    shown,
)

Count = Annotated[int, Ge(1)]
Share = Annotated[float, Interval(ge=0, le=1)]


class Part(ABC):
    @abstractmethod
    def answer(self) -> Any: ...


class Wheel(Part):
    """A wheel.

    Args:
        spokes: How many.
        share: Of what.
    """

    def __init__(self, seed: int, spokes: Count = 5, share: Share = 0.5) -> None:
        self.seed = seed
        self.spokes = spokes
        self.share = share

    def answer(self) -> tuple[int, int, float]:
        return self.seed, self.spokes, self.share


class Axle(Part):
    def __init__(self, length: float) -> None:
        self.length = length

    def answer(self) -> float:
        return self.length


@pytest.fixture
def parts() -> Registry[Part]:
    registry: Registry[Part] = Registry("part", Part)  # type: ignore[type-abstract]
    registry.register("wheel")(Wheel)
    registry.register("axle")(Axle)
    return registry


# --------------------------------------------------------------------- a mapping with a decorator


def test_a_registry_is_a_mapping_from_names_to_classes(parts: Registry[Part]) -> None:
    assert isinstance(parts, Mapping)
    assert list(parts) == parts.names() == ["axle", "wheel"]
    assert len(parts) == 2
    assert "wheel" in parts and "spoke" not in parts
    assert parts["wheel"] is Wheel
    assert dict(parts) == {"axle": Axle, "wheel": Wheel}
    assert parts.get("wheel") is Wheel


def test_register_returns_the_class_unchanged() -> None:
    registry: Registry[Part] = Registry("part", Part)  # type: ignore[type-abstract]
    before = vars(Wheel).copy()
    assert registry.register("wheel")(Wheel) is Wheel
    assert vars(Wheel) == before


@pytest.mark.parametrize(
    "name", ["", "Wheel", "myWheel", "my-wheel", "my wheel", "2wheels", "_wheel", "wheel.x", "räd"]
)
def test_a_name_that_is_not_snake_case_is_refused(parts: Registry[Part], name: str) -> None:
    with pytest.raises(PluginError, match="snake_case, such as 'my_part'"):
        parts.register(name)(Axle)


def test_a_taken_name_names_both_owners(parts: Registry[Part]) -> None:
    class Other(Wheel):
        pass

    Other.__module__ = "somebody_else"
    with pytest.raises(PluginError) as caught:
        parts.register("wheel")(Other)
    text = str(caught.value)
    assert "part 'wheel' is taken" in text and __name__ in text and "somebody_else" in text
    assert parts["wheel"] is Wheel


def test_a_built_in_part_is_never_replaced() -> None:
    class Mine(Loss):
        pass

    before = LOSSES["triplet"]
    with pytest.raises(PluginError, match=r"'triplet' is taken: builtin \(reidreg .* tries to"):
        LOSSES.register("triplet")(Mine)
    assert LOSSES["triplet"] is before


def test_the_same_class_again_is_a_notebook_cell_run_twice(parts: Registry[Part]) -> None:
    def run_cell() -> type[Part]:
        class Hub(Part):
            def answer(self) -> None: ...

        parts.register("hub")(Hub)
        return Hub

    first, second = run_cell(), run_cell()
    assert first is not second and parts["hub"] is second


def test_an_unknown_name_suggests_the_nearest(parts: Registry[Part]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parts["weel"]
    assert str(caught.value) == "no part is registered as 'weel'; did you mean 'wheel'?"


def test_an_unknown_name_that_is_near_to_none_lists_all(parts: Registry[Part]) -> None:
    with pytest.raises(UnknownNameError, match="'qqq'; known: axle, wheel"):
        parts.build("qqq")
    with pytest.raises(UnknownNameError, match="'qqq'"):
        parts.plugin("qqq")


def test_get_of_an_unknown_name_is_an_error_and_not_a_default(parts: Registry[Part]) -> None:
    # A ConfigError is not a KeyError, so `get` does not swallow it.
    with pytest.raises(UnknownNameError):
        parts.get("weel")


def test_an_endless_name_still_makes_one_short_line(parts: Registry[Part]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parts["x\n" * 5000]
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_the_origin_of_a_part_is_its_plugin() -> None:
    assert LOSSES.plugin("triplet").name == "builtin"
    assert LOSSES.plugin("triplet").distribution == "reidreg"


# --------------------------------------------------------------------- temporary parts


def test_a_temporary_part_is_gone_after_the_block_and_a_replaced_one_is_back(
    parts: Registry[Part],
) -> None:
    def wheel() -> type[Part]:
        class Wheel(Part):
            def answer(self) -> None: ...

        Wheel.__qualname__ = "Wheel"
        return Wheel

    before = dict(parts)
    with parts.temporary():
        parts.register("hub")(Axle)
        parts.register("wheel")(wheel())
        assert parts["hub"] is Axle and parts["wheel"] is not Wheel
        with parts.temporary():
            parts.register("spoke")(Axle)
        assert "spoke" not in parts and "hub" in parts
    assert dict(parts) == before


def test_temporary_parts_are_gone_after_an_error(parts: Registry[Part]) -> None:
    with pytest.raises(ZeroDivisionError), parts.temporary():
        parts.register("hub")(Axle)
        1 / 0  # noqa: B018
    assert "hub" not in parts


def test_plugins_that_are_first_loaded_in_a_temporary_block_stay() -> None:
    code = (
        "from reidreg import LOSSES\n"
        "with LOSSES.temporary():\n    assert 'triplet' in LOSSES\n"
        "assert 'triplet' in LOSSES"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --------------------------------------------------------------------- building


def test_build_passes_options_and_the_facts_that_are_taken(parts: Registry[Part]) -> None:
    part = parts.build("wheel", spokes=3, seed=7, num_classes=10, pids=[1, 2], rank=0)
    assert part.answer() == (7, 3, 0.5)
    assert parts.build("axle", length=2, seed=7).answer() == 2


def test_build_of_shipped_parts_with_the_facts_of_the_documentation() -> None:
    sampler = SAMPLERS.build(
        "identity", pids=[0, 0, 1, 1], camids=[0] * 4, batch_size=4, instances=2, seed=0
    )
    assert len(sampler) == 1
    assert HEADS.build("bnneck", num_classes=3, dim=4, num_cameras=2).dim == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spoks": 3}, "part.spoks: no such option; did you mean 'spokes'?"),
        ({"colour": 3}, "part.colour: no such option; known: share, spokes"),
        ({"spokes": 0}, "part.spokes: 0 is out of range; it must be at least 1"),
        ({"share": 1.5}, "part.share: 1.5 is out of range; it must be at least 0 and at most 1"),
        ({"share": math.nan}, "part.share: nan is out of range"),
        ({"spokes": "3"}, "part.spokes: expected a whole number, got 3"),
        ({"spokes": True}, "part.spokes: expected a whole number, got true"),
        ({"spokes": 2.0}, "part.spokes: expected a whole number, got 2.0"),
        ({"spokes": None}, "part.spokes: expected a whole number, got null"),
    ],
)
def test_build_refuses_a_wrong_option(
    parts: Registry[Part], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parts.build("wheel", seed=0, **options)
    assert str(caught.value).startswith(message)


def test_build_refuses_a_missing_option(parts: Registry[Part]) -> None:
    with pytest.raises(ConfigError, match="^part.length: this option must be given$"):
        parts.build("axle")


def test_build_takes_the_numbers_of_numpy(parts: Registry[Part]) -> None:
    part = parts.build("wheel", spokes=np.int64(3), share=np.float32(0.25), seed=0)
    assert part.answer() == (0, 3, 0.25)


def test_build_reports_options_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="^sampler.batch_size: 6 is not a multiple"):
        SAMPLERS.build("identity", pids=[0, 1], batch_size=6, instances=4)
    with pytest.raises(ConfigError, match="^backbone.pretrained: 'no/such/file' is neither"):
        BACKBONES.build("resnet18", pretrained="no/such/file")


# --------------------------------------------------------------------- signatures as schemas


def test_options_are_the_parameters_without_run_time_facts() -> None:
    options = options_of(Wheel)
    assert list(options) == ["spokes", "share"]
    assert options["spokes"].default == 5 and not options["spokes"].required
    assert options["share"].hint == Share
    assert options_of(Axle)["length"].required


class Untyped(Part):
    def __init__(self, spokes=5) -> None:  # type: ignore[no-untyped-def]
        pass


class Keywords(Part):
    def __init__(self, **options: int) -> None:
        pass


class Positions(Part):
    def __init__(self, *options: int) -> None:
        pass


class ByPosition(Part):
    def __init__(self, spokes: int, /) -> None:
        pass


class NameIsOurs(Part):
    def __init__(self, name: str = "x") -> None:
        pass


class TakesAnything(Part):
    def __init__(self, what: Any = None) -> None:
        pass


class TakesClass(Part):
    def __init__(self, what: type[Loss] = Loss) -> None:
        pass


class TakesObject(Part):
    def __init__(self, what: Part | None = None) -> None:
        pass


class TakesSequence(Part):
    def __init__(self, what: Sequence[int] = ()) -> None:
        pass


class BareList(Part):
    def __init__(self, what: list = []) -> None:  # type: ignore[type-arg]  # noqa: B006
        pass


class WrongDefault(Part):
    def __init__(self, margin: float = None) -> None:  # type: ignore[assignment]
        pass


class MissingType(Part):
    def __init__(self, what: NotImported = 1) -> None:  # type: ignore[name-defined]  # noqa: F821
        pass


class NoPart:
    pass


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Untyped, "Untyped.__init__: option 'spokes' has no type"),
        (Keywords, "Keywords.__init__ takes *options; name each option"),
        (Positions, "Positions.__init__ takes *options; name each option"),
        (ByPosition, "ByPosition.__init__ takes 'spokes' by position only"),
        (NameIsOurs, "the name of option 'name' is reserved"),
        (TakesAnything, "option 'what' is of type Any"),
        (TakesClass, "option 'what' is of type"),
        (TakesObject, "option 'what' is of type Part or null"),
        (TakesSequence, "option 'what' is of type Sequence"),
        (BareList, "option 'what' is of type list"),
        (WrongDefault, "option 'margin' is a number, and its default None is not"),
        (
            MissingType,
            "its types cannot be resolved at run time (name 'NotImported' is not defined)",
        ),
        (NoPart, "does not extend reidreg.Part"),
        (len, "does not extend reidreg.Part"),
    ],
)
def test_a_class_that_is_not_a_schema_is_refused_at_registration(
    parts: Registry[Part], part: Any, message: str
) -> None:
    with pytest.raises(PluginError) as caught:
        parts.register("odd")(part)
    assert message in str(caught.value) and str(caught.value).startswith("part 'odd': ")
    assert "odd" not in parts


def test_a_loss_has_no_option_weight_since_a_term_has_one() -> None:
    class Weighted(Loss):
        def __init__(self, weight: float = 1.0) -> None:
            super().__init__()

    with pytest.raises(PluginError, match="the name of option 'weight' is reserved"):
        LOSSES.register("weighted")(Weighted)
    assert "weighted" not in LOSSES


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
def test_every_shipped_part_is_a_schema_with_help_for_each_option(kind: str) -> None:
    registry = REGISTRIES[kind]
    assert len(registry) > 0
    for name, part in registry.items():
        check_schema(part, registry.base, name, {"name", "weight"})
        text = "\n".join(base.__doc__ or "" for base in part.__mro__)
        described = [line.strip() for line in text.splitlines()]
        for option in options_of(part).values():
            assert any(line.startswith(f"{option.name}: ") for line in described), (name, option)
            if not option.required:
                check_limits(option.name, option.default, option.hint)
        assert not RUN_TIME_FACTS & options_of(part).keys()


# --------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, Count),
        (1, Annotated[float, Gt(0)]),
        (None, Count | None),
        (2, Count | None),
        ("auto", Count | Literal["auto"]),
        (True, Count | bool),
        ((1, 2), tuple[Count, Count]),
        ([1, 2], tuple[Count, Count]),
        ((), tuple[Count, ...]),
        ([3, 4, 5], tuple[Count, ...]),
        ([1], list[Count]),
        (["a"], list[str] | str),
        ("a", list[str] | str),
        ({"a": 1}, dict[str, int]),
        (0.0, Share),
        (1, Share),
        (2**40, int),
    ],
)
def test_a_value_within_its_limits_passes(value: Any, hint: Any) -> None:
    check_limits("key", value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (0, Count, "key: 0 is out of range; it must be at least 1"),
        (0, Count | None, "key: 0 is out of range; it must be at least 1"),
        (-1, Count | Literal["auto"], "key: -1 is out of range; it must be at least 1"),
        ((1, 0), tuple[Count, Count], "key[1]: 0 is out of range; it must be at least 1"),
        ([1, 0], tuple[Count, ...], "key[1]: 0 is out of range; it must be at least 1"),
        ([[0]], list[list[Count]], "key[0][0]: 0 is out of range; it must be at least 1"),
        ([0], list[Count] | None, "key[0]: 0 is out of range; it must be at least 1"),
        ((1,), tuple[Count, Count], "key: expected [a whole number, a whole number], got (1,)"),
        (1.5, Share, "key: 1.5 is out of range; it must be at least 0 and at most 1"),
        (1, Annotated[float, Lt(1)], "key: 1 is out of range; it must be less than 1"),
        (0, Annotated[float, Gt(0)], "key: 0 is out of range; it must be more than 0"),
        (3, Annotated[int, Ge(0), Le(2)], "key: 3 is out of range; it must be at least 0 and at"),
        (math.nan, Share, "key: nan is out of range"),
        (math.inf, Share, "key: inf is out of range"),
        (math.nan, float, "key: nan is not a finite number"),
        (math.inf, Annotated[float, Gt(0)], "key: inf is not a finite number"),
        (-math.inf, float | None, "key: -inf is not a finite number"),
        ((0.0, math.nan), tuple[float, float], "key[1]: nan is not a finite number"),
        (True, Count, "key: expected a whole number, got true"),
        (False, float, "key: expected a number, got false"),
        ("1", Count, "key: expected a whole number, got 1"),
        (None, float, "key: expected a number, got null"),
        (1, bool, "key: expected true or false, got 1"),
        (True, Literal[1, 2], "key: expected 1 or 2, got true"),
        (1.0, Literal[1, 2], "key: expected 1 or 2, got 1.0"),
        ("x", Literal["a", "b"], "key: expected 'a' or 'b', got x"),
        ([1], list[str], "key[0]: expected text, got 1"),
        ("abc", list[str], "key: expected a list [text, ...], got abc"),
        (3, list[str] | str, "key: expected a list [text, ...] or text, got 3"),
    ],
)
def test_a_value_outside_is_refused_with_what_is_allowed(
    value: Any, hint: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_limits("key", value, hint)
    assert str(caught.value).startswith(message)


@given(
    value=st.floats(),
    low=st.floats(-10, 10),
    width=st.floats(0, 10),
    optional=st.booleans(),
    position=st.integers(0, 2),
)
def test_an_interval_holds_at_any_depth(
    value: float, low: float, width: float, optional: bool, position: int
) -> None:
    inner: Any = Annotated[float, Interval(ge=low, lt=low + width)]
    hint: Any = inner | None if optional else inner
    wrapped = [None if optional else low] * 3 if width > 0 else []
    if wrapped:
        wrapped[position] = value
    subject, kind = (wrapped, list[hint]) if wrapped else (value, hint)
    if low <= value < low + width:
        check_limits("key", subject, kind)
    else:
        with pytest.raises(ConfigError, match="out of range"):
            check_limits("key", subject, kind)


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()))
def test_a_value_is_shown_on_one_short_line(value: Any) -> None:
    text = shown(value)
    assert text and "\n" not in text and len(text) <= 63
    assert shown("x" * 1000, 10) == "x" * 10 + "..."


def test_types_are_described_in_words() -> None:
    assert describe_type(Count) == "a whole number"
    assert describe_type(Share | None) == "a number or null"
    assert describe_type(tuple[Count, ...]) == "a list [a whole number, ...]"
    assert describe_type(tuple[int, str]) == "[a whole number, text]"
    assert describe_type(Literal["a", 2]) == "'a' or 2"
    assert all(fits(member, Literal["a", 2]) for member in get_args(Literal["a", 2]))
