"""Reading and writing YAML: safe, bounded, and strict about duplicate keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from reidreg.errors import ConfigError

# A configuration has a few hundred nodes. The limits are far above that, and far below what does
# harm: a few hundred bytes of nested aliases expand to gigabytes, and deeply nested text overflows
# the C parser's stack.
MAX_BYTES = 1 << 16
MAX_NODES = 10_000
MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2, refusing duplicate keys.

    `1e-3` is a number; `0012`, `1:30` and `2024-01-01` are text, not 10, 90 and a date.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue  # the base class refuses it
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key.value!r:.40}",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_TAG = "tag:yaml.org,2002:"
_REPLACED = ("int", "float", "timestamp")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Dumper(yaml.SafeDumper):
    """Lists on one line, and quotes around text that the loader would take for a number."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: Any = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, what) for tag, what in pairs if tag.removeprefix(_TAG) not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file; a byte order mark and CRLF line ends are fine.

    Raises:
        ConfigError: The file is missing, unreadable, not UTF-8 text, too large or too deep,
            not YAML, has a duplicate key, or holds something other than a mapping.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a configuration file")
    try:
        with path.open("rb") as file:
            # Not by the file's size: a pipe has none, and /dev/zero does not end.
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} is larger than any configuration ({MAX_BYTES:,} bytes)")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    value = parse_yaml(text, str(path))
    if value is None:
        raise ConfigError(f"{path} is empty")
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not keys and values")
    return value


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text.

    Args:
        text: The text.
        source: The name of its source, for messages.

    Raises:
        ConfigError: As for `read_yaml`.
    """
    try:
        _check_size(text, source)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: {str(error.problem or error.context):.100}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error


def _check_size(text: str, source: str) -> None:
    """Refuse malicious text by its parse events, before any value is built."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{source}: aliases (*{event.anchor:.40}) are not supported")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        nodes += 1
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise ConfigError(f"{source}: too deeply nested, or too long, for a configuration")


def dump_yaml(value: Any) -> str:
    """YAML text of plain values: keys in their order, lists on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)
