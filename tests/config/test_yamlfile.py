"""YAML: read safely, refused with one line, and written so that it reads back the same."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from reidreg.config.yamlfile import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NODES,
    dump_yaml,
    parse_yaml,
    read_yaml,
)
from reidreg.errors import ConfigError


def parsed(text: str) -> Any:
    return parse_yaml(text, "here")


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    line = str(caught.value)
    assert line.startswith("here") and "\n" not in line and len(line) < 170
    return line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3.5e-4", 3.5e-4),
        ("1E5", 1e5),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("3", 3),
        ("-3", -3),
        ("0", 0),
        ("0x1F", 31),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("0012", "0012"),
        ("08", "08"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-01", "2024-01-01"),
        ("2024-13-45", "2024-13-45"),
        ("913264e", "913264e"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'1e5'", "1e5"),
        ("-", [None]),
    ],
)
def test_plain_text_is_what_it_looks_like(text: str, value: Any) -> None:
    found = parsed(text)
    assert found == value and type(found) is type(value)


def test_not_a_number_is_a_number() -> None:
    assert math.isnan(parsed(".nan"))


plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.from_regex(r"[-+]?[0-9_.:e-]{1,8}", fullmatch=True),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(plain)
@example("1e5")
@example({"0012": "1:30", "on": ["yes", "null", "~", "", " ", "2024-01-01"]})
@example([1e-7, 1e16, -0.0, 5e-324, 10**30])
def test_what_is_written_reads_back(value: Any) -> None:
    found = parsed(dump_yaml(value))
    assert found == value and repr(found) == repr(value)


def test_keys_keep_their_order_and_lists_stand_on_one_line() -> None:
    text = dump_yaml({"b": {"y": [1, [2, 3]], "x": None}, "a": "text"})
    assert text == "b:\n  y: [1, [2, 3]]\n  x: null\na: text\n"


def test_pyyamls_own_safe_loader_reads_the_same() -> None:
    value = {"lr": 3.5e-4, "tags": ["1e5", "0012", "2024-01-01", "1:30", "on"], "n": [1, 2.5]}
    assert yaml.safe_load(dump_yaml(value)) == value


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\na: 2", "here, line 2: duplicate key 'a'"),
        ("x: {b: {a: 1, 'a': 2}}", "here, line 1: duplicate key 'a'"),
        ("1: a\n1: b", "here, line 2: duplicate key '1'"),
        ("[a]: b", "here, line 1: found unhashable key"),
        ("{a: b}: c", "here, line 1: found unhashable key"),
        (
            "<<: a",
            "here, line 1: expected a mapping or list of mappings for merging, but found scalar",
        ),
        ("a: !!map x", "here, line 1: expected a mapping node, but found scalar"),
        ("a: !!int x", "here: invalid literal for int() with base 10: 'x'"),
        ("a: &x 1\nb: *x", "here: aliases (*x) are not supported"),
        ("a: *x", "here: aliases (*x) are not supported"),
        ("a: 'b", "here, line 1: found unexpected end of stream"),
        ("a: b: c", "here, line 1: mapping values are not allowed here"),
        ("a: \x00", "here: unacceptable character #x0000: special characters are not allowed"),
        ("a: 1\n--- \nb: 1", "here, line 2: but found another document"),
        ("@a", "here, line 1: found character '@' that cannot start any token"),
    ],
)
def test_bad_text_is_refused_with_its_line(text: str, line: str) -> None:
    assert refused(text) == line


@pytest.mark.parametrize(
    "tag",
    [
        "python/object:os.X",
        "python/object/apply:os.system",
        "python/name:os.system",
        "python/tuple",
    ],
)
def test_python_tags_are_refused(tag: str) -> None:
    assert f"python/{tag.split('/')[1][:4]}" in refused(f"a: !!{tag} [x]")
    assert "python" in refused(f"!!{tag} [x]")


def test_long_tags_keys_and_anchors_make_short_lines() -> None:
    for text in ("a: !!{0} [x]", "a: *{0}", "{0}: 1\n{0}: 2", "!<{0}> a"):
        refused(text.format("1" * 120))


def test_depth_and_size_have_their_limits() -> None:
    assert parsed("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    refused("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    refused("[" + "a," * MAX_NODES + "]")


def test_a_file_just_within_the_limit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: 1\n#".ljust(MAX_BYTES, "x"))
    assert read_yaml(file) == {"a": 1}
    file.write_text("a: 1\n#".ljust(MAX_BYTES + 1, "x"))
    with pytest.raises(ConfigError, match="larger than any configuration"):
        read_yaml(file)


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("a: 1\n",))
    writer.start()
    assert read_yaml(pipe) == {"a": 1}
    writer.join()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot read .*x\.yaml: No such file or directory$"):
        read_yaml(tmp_path / "x.yaml")


@given(st.text())
def test_any_text_gives_a_value_or_one_line(text: str) -> None:
    try:
        parsed(text)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("here")


@given(st.binary(max_size=200))
def test_any_file_gives_a_mapping_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    try:
        assert isinstance(read_yaml(file), dict)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
