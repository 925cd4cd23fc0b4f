"""The command `plugins`."""

from __future__ import annotations

import json

from reidreg.cli.arguments import Parser
from reidreg.errors import ConfigError, did_you_mean


def plugins_command(arguments: list[str]) -> int:
    """`reidreg plugins`."""
    parser = Parser(
        prog="reidreg plugins", description="List every registered part, and broken plugins."
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help="dataset, sampler, backbone, ...")
    parser.add_argument("--json", action="store_true", help="print JSON")
    own = parser.parse(arguments)
    from reidreg.parts.plugins import broken_plugins

    parts = _parts(_kind(own.kind))
    broken = [{"plugin": str(p), "module": p.module, "error": p.error} for p in broken_plugins()]
    if own.json:
        print(json.dumps({"parts": parts, "broken": broken}, indent=2))
        return 0
    for line in _table(parts):
        print(line)
    for plugin in broken:
        print(f"broken: {plugin['plugin']}: {plugin['error']}")
    return 0


def _kind(word: str | None) -> str | None:
    """The kind that a word means, singular or plural."""
    from reidreg.parts.interfaces import REGISTRIES

    plurals = {f"{kind}es" if kind.endswith("s") else f"{kind}s": kind for kind in REGISTRIES}
    if word is None:
        return None
    kind = plurals.get(word, word)
    if kind not in REGISTRIES:
        raise ConfigError(f"no kind {word!r}{did_you_mean(word, REGISTRIES)}")
    return kind


def _parts(kind: str | None) -> list[dict[str, str]]:
    """What is registered of a kind, or of all kinds."""
    from reidreg.parts.interfaces import REGISTRIES

    return [
        {
            "kind": registry.kind,
            "name": name,
            "plugin": registry.plugin(name).name,
            "origin": str(registry.plugin(name)),
            "class": f"{part.__module__}.{part.__qualname__}",
            "summary": (part.__doc__ or "").strip().splitlines()[0] if part.__doc__ else "",
        }
        for registry in REGISTRIES.values()
        for name, part in registry.items()
        if kind in (None, registry.kind)
    ]


def _table(parts: list[dict[str, str]]) -> list[str]:
    columns = ("kind", "name", "origin")
    widths = [max((len(part[key]) for part in parts), default=0) for key in columns]
    return [
        "  ".join(
            [
                *(part[key].ljust(width) for key, width in zip(columns, widths, strict=True)),
                part["summary"],
            ]
        )
        for part in parts
    ]
