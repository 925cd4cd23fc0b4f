"""The package from outside: its names, how its modules hang together, and what it never does."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import types
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import reidreg
from conftest import LEVELS
from reidreg.parts.plugins import GROUP

PACKAGE = Path(reidreg.__file__).parent
PLUGINS = Path(importlib.import_module("reidreg_plugins").__file__ or "").parent
OURS = sorted(PACKAGE.rglob("*.py"))
THEIRS = sorted(PLUGINS.rglob("*.py"))
ROOT = Path(__file__).parents[2]
EXAMPLE = sorted((ROOT / "tests/example_plugin").rglob("*.py"))
PROSE = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.*")]
)


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent if path in OURS else path.parents[1]))


# --------------------------------------------------------------------- names


def test_the_public_names_are_sorted_and_each_can_be_imported() -> None:
    assert reidreg.__all__ == sorted(reidreg.__all__)
    assert len(set(reidreg.__all__)) == len(reidreg.__all__)
    for name in reidreg.__all__:
        value = getattr(reidreg, name)
        assert not isinstance(value, types.ModuleType)
        home = getattr(value, "__module__", "reidreg.")
        assert home.startswith("reidreg."), f"{name} comes from {home}"


def test_the_public_names_are_the_namespace() -> None:
    # Once all were looked up, what is there besides are modules, dunders and the typing helpers.
    for name in reidreg.__all__:
        getattr(reidreg, name)
    found = {
        name
        for name, value in vars(reidreg).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert found - {"Any", "TYPE_CHECKING", "annotations"} == set(reidreg.__all__)
    assert set(reidreg.__all__) <= set(dir(reidreg))


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == reidreg.__all__
    for name, module in seen.items():
        assert module is not None
        assert getattr(importlib.import_module(module), name) is getattr(reidreg, name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'reidreg' has no attribute 'Nothing'"):
        _ = reidreg.Nothing


# --------------------------------------------------------------------- imports


def imports(path: Path, everywhere: bool) -> Iterator[str]:
    """The modules that a file imports: at its top level, or inside functions too.

    What stands under TYPE_CHECKING is no import: it never runs.
    """
    tree = ast.parse(path.read_text(), str(path))
    for node in ast.walk(tree) if everywhere else top_level(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run on import."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]


def module_of(path: Path) -> str:
    """The dotted name under which a file of the package is imported."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def graph() -> dict[str, set[str]]:
    """Which modules of the package each one imports at its top level."""
    modules = {module_of(path): path for path in OURS}
    return {
        name: {module for module in imports(path, everywhere=False) if module in modules} - {name}
        for name, path in modules.items()
    }


def test_modules_do_not_import_each_other() -> None:
    edges = graph()
    assert sum(map(len, edges.values())) > 50
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")
    assert not edges["reidreg.errors"] and edges["reidreg"] == {"reidreg._version"}
    importers = [name for name, targets in edges.items() if "reidreg.cli.main" in targets]
    assert importers == ["reidreg.__main__"]


def room_of(module: str) -> str:
    """The package below `reidreg` that a module lies in, or its own name at the top."""
    return module.split(".")[1]


def rooms() -> dict[str, set[str]]:
    """Which rooms each room imports, inside functions too; `reidreg` itself is no room."""
    modules = {module_of(path): path for path in OURS if path.parent != PACKAGE or is_room(path)}
    found: dict[str, set[str]] = {room_of(name): set() for name in modules}
    for name, path in modules.items():
        targets = {target for target in imports(path, everywhere=True) if target in modules}
        found[room_of(name)] |= {room_of(target) for target in targets} - {room_of(name)}
    return found


def is_room(path: Path) -> bool:
    """Whether a module at the top counts as a room: not the facade and what starts it."""
    return not path.stem.startswith("_")


def test_rooms_import_from_their_own_level_or_below() -> None:
    edges = rooms()
    assert edges.keys() == LEVELS.keys()
    up = {
        f"{room} -> {target}"
        for room, targets in edges.items()
        for target in targets
        if LEVELS[target] > LEVELS[room]
    }
    assert not up
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(f"rooms import each other: {' -> '.join(error.args[1])}")


def test_only_the_facade_and_rooms_lie_at_the_top() -> None:
    modules = [path.stem for path in PACKAGE.glob("*.py") if is_room(path)]
    assert len(modules) <= 5, modules
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    # `import reidreg.evaluate.x` would put the package in the place of the function.
    assert not packages & {*reidreg.__all__}
    for name in packages:
        assert importlib.import_module(f"reidreg.{name}").__doc__, f"{name}: what is it for?"


@pytest.mark.parametrize("path", [*OURS, *THEIRS], ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        node.name: length
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions) and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert not long


def dotted_names(path: Path) -> set[str]:
    """The names below `reidreg` that a file's prose has between backticks; `x` stands for any."""
    return set(re.findall(r"`(reidreg(?:\.\w\w+)+)(?:\(\))?`", path.read_text(encoding="utf-8")))


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("path", [*OURS, *THEIRS, *PROSE], ids=name_of)
def test_every_dotted_name_in_prose_is_there(path: Path) -> None:
    # The entry-point group bears the name that the package had before there were rooms.
    assert [name for name in dotted_names(path) - {GROUP} if not resolves(name)] == []


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_the_framework_never_imports_its_plugins(path: Path) -> None:
    assert not [name for name in imports(path, everywhere=True) if "reidreg_plugins" in name]


@pytest.mark.parametrize("path", [*THEIRS, *EXAMPLE], ids=name_of)
def test_a_plugin_imports_from_the_front_door_alone(path: Path) -> None:
    own = path.relative_to(PLUGINS.parent if path in THEIRS else EXAMPLE[0].parents[1]).parts[0]
    public = {"reidreg", *(f"reidreg.{name}" for name in reidreg.__all__)}
    for name in imports(path, everywhere=True):
        if name.partition(".")[0].startswith("reidreg"):
            assert name in public or name.partition(".")[0] == own, name


def test_every_plugin_module_is_listed_by_its_folder() -> None:
    for init in PLUGINS.glob("*/__init__.py"):
        parts = {
            path.stem
            for path in init.parent.glob("*.py")
            if re.search(r"^@[A-Z]+\.register\(", path.read_text(), re.MULTILINE)
        }
        listed = importlib.import_module(f"reidreg_plugins.{init.parent.name}").__all__
        assert listed == sorted(listed) and set(listed) == parts


# --------------------------------------------------------------------- what is never done

FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "os.execv",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.jit.load",
    "torch.export.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tempfile.mktemp",
}
SAFE = "pickle.UnpicklingError"


def calls(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The calls of a file: what is called, and its keywords as text."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Call):
            keywords = {word.arg or "**": ast.unparse(word.value) for word in node.keywords}
            yield ast.unparse(node.func), keywords


def misdeeds(path: Path) -> list[str]:
    """What a file does that it must not."""
    found = []
    for function, keywords in calls(path):
        last = function.rpartition(".")[2]
        if function in FORBIDDEN or last in ("extractall", "extract_all", "unpack_archive"):
            found.append(function)
        if keywords.get("shell", "False") != "False":
            found.append(f"{function} with a shell")
        if function == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if function in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.append("np.load without allow_pickle=False")
        if function == "yaml.load" and keywords.get("Loader") not in ("_Loader", "yaml.SafeLoader"):
            found.append("yaml.load without a safe loader")
    banned = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
    for name in imports(path, everywhere=True):
        text = path.read_text().replace(SAFE, "")
        used = name in banned and re.search(rf"\b{name}\.\w", text)
        if used or name.startswith(tuple(f"{module}." for module in banned)):
            found.append(f"import of {name}")
    return found


@pytest.mark.parametrize("path", [*OURS, *THEIRS], ids=name_of)
def test_nothing_unsafe_is_called(path: Path) -> None:
    assert misdeeds(path) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "import os\nos.system('ls')",
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_the_ban_finds_what_it_looks_for(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(text)
    assert misdeeds(tmp_path / "x.py")


def test_the_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from reidreg.config import yamlfile

    assert issubclass(yamlfile._Loader, yaml.SafeLoader)
