"""The documentation holds: its commands run, its outputs are ours, its links and keys exist."""

from __future__ import annotations

import ast
import csv
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import reidreg
from conftest import LEVELS, SMALL_BACKBONE, as_flags, run_here
from reidreg import LOSSES, fit, load_config
from reidreg.cli.main import COMMANDS
from reidreg.config.sections import ORDER
from reidreg.config.yamlfile import parse_yaml
from reidreg.evaluation.extract import extract
from reidreg.model.feature_files import save_features
from reidreg.parts.schema import options_of
from reidreg_plugins.datasets.aihub_kaist import OFFICIAL

ROOT = Path(__file__).parents[2]
GUIDE, PLUGINS = ROOT / "docs/aihub_kaist.ko.md", ROOT / "docs/plugins.md"
CONTRIBUTING, ARCHITECTURE = ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md"
PAGES = [ROOT / "README.md", CONTRIBUTING, ARCHITECTURE, *sorted((ROOT / "docs").glob("*.md"))]

# Lines of other programs: what they may look like.
FOREIGN = {
    "pip": r"pip install (--editable )?\.(\[\w+\])?",  # there is no release yet
    "wandb": r"wandb (login( --relogin)?|sync [\w./-]+/offline-run-\*|"
    r"sweep configs/sweeps/\w+\.yaml|"
    r"agent( --count \d+| --max-consecutive-failed-runs \d+)* [\w-]+/[\w-]+/SWEEP_ID)",
    "unzip": r"unzip -n \S+\.zip -d \S+",
    "make": r"make (?P<target>[a-z]+)",
    "cd": r"cd [\w./-]+",
    "git": r"git (clone https://\S+|pull)",
    "torchrun": r"torchrun( --(nproc-per-node|nnodes|max-restarts) \d+"
    r"| --rdzv-backend c10d| --rdzv-endpoint [\w.-]+:\d+)+ -m reidreg .+",
}


# --------------------------------------------------------------------- reading the pages


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Line:
    """A command of a page, and what the page says that it prints, if it does."""

    block: Block
    words: tuple[str, ...]
    printed: str = ""

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def key(self) -> str:
        return f"{self.block} {shlex.join(self.words)}"


@functools.cache
def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    start, language, body = 0, "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```") and not start:
            start, language, body = number, line[3:].strip(), []
        elif line.startswith("```"):
            found.append(Block(page, start, language, "\n".join(body)))
            start = 0
        else:
            body.append(line)
    assert not start, f"{page.name}:{start}: the block does not end"
    return found


def blocks(language: str, *pages: Path) -> list[Block]:
    """The blocks of a language, on some pages or on all."""
    return [b for page in pages or PAGES for b in blocks_of(page) if b.language == language]


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans_of(page: Path) -> list[str]:
    """The pieces of inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def commands(*pages: Path) -> list[Line]:
    """The lines of bash blocks, without `> file`, and what `torchrun` starts as a line too."""
    lines = []
    for block in blocks("bash", *pages):
        for text in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(text, comments=True)
            if words:
                lines.append(Line(block, tuple(words[: (*words, ">").index(">")])))
            if "torchrun" in words[:1]:
                lines.append(Line(block, tuple(words[words.index("-m") + 1 :])))
    return lines


def transcripts(*pages: Path) -> list[Line]:
    """The commands behind `$ ` in text blocks, with what follows them."""
    lines = []
    for block in blocks("text", *pages):
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            lines.append(Line(block, tuple(shlex.split(command)), printed))
    return lines


def parameters(lines: Sequence[Line]) -> list[Any]:
    return [pytest.param(line, id=line.key) for line in lines]


def ours(lines: Sequence[Line], *names: str) -> list[Line]:
    """The lines of reidreg's commands of these names."""
    return [line for line in lines if line.program == "reidreg" and line.words[1] in names]


def normalised(text: str) -> list[str]:
    """Lines without the number of our version and without the widths that follow from it."""
    text = re.sub(r"\(reidreg [^)]+\)", "(reidreg VERSION)", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


WITHOUT_PLUGIN = [page for page in PAGES if page != PLUGINS]


# --------------------------------------------------------------------- a place to run in

# What makes the run of the pages a matter of a second.
TINY: dict[str, Any] = {
    "input.size": [64, 32],
    "input.padding": 3,
    "sampler.batch_size": 8,
    "sampler.instances": 2,
    **SMALL_BACKBONE,
    "schedule.warmup_epochs": 1,
    "schedule.milestones": [2],
    "train.epochs": 1,
    "train.workers": 0,
    "train.precision": "fp32",
    "wandb.mode": "disabled",
}


@pytest.fixture(scope="module")
def clone(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages assume it: data, a finished run, weights, features, an old file."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data").symlink_to(aihub_root)
    (folder / "weights").mkdir()
    (folder / "weights/resnet50.pth").touch()
    (folder / "old.yml").write_text("DATASETS:\n  NAMES: 'aihub_kaist'\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(load_config("aihub_kaist", TINY))
        for split in ("query", "gallery"):
            features = extract("log/aihub_kaist/checkpoints/best.ckpt", split=split)
            save_features(features, f"features/{split}.npz")
        model = "--ckpt log/aihub_kaist/checkpoints/best.ckpt --split gallery"
        code, text = run(shlex.split(f"index build {model} --output index/gallery"))
        assert code == 0, text
    (folder / "log/quickstart").symlink_to("aihub_kaist")
    return folder


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and all output of a command, in this process."""
    done = run_here(*arguments)
    return done.returncode, done.stdout + done.stderr


# --------------------------------------------------------------------- commands


@pytest.mark.parametrize("line", parameters(ours(commands(*WITHOUT_PLUGIN), "fit")))
def test_a_training_command_resolves(
    line: Line, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    code, text = run([*line.words[1:], "--print_config"])
    assert code == 0, text
    for option, value in zip(line.words, line.words[1:], strict=False):
        if option in ("--init_from", "--resume") and value != "auto":
            assert Path(value).is_file(), f"{value}: not a place where a run leaves a checkpoint"


REAL = ("evaluate", "extract", "index", "search", "plugins", "doctor", "import-config")


@pytest.mark.parametrize("line", parameters(ours(commands(*WITHOUT_PLUGIN), *REAL)))
def test_a_command_that_is_quick_runs(
    line: Line, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    if line.words[1:3] == ("index", "build"):  # which does not overwrite
        shutil.rmtree(line.words[line.words.index("--output") + 1], ignore_errors=True)
    code, text = run(line.words[1:])
    assert code == 0, text


@pytest.mark.parametrize("line", parameters(ours(commands(*WITHOUT_PLUGIN), "synthesize")))
def test_a_drawing_command_draws(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--full_size" in line.words:
        # The size cannot be made small; that all else was accepted shows in what is refused.
        code, text = run([*line.words[1:], "--seed", "-1"])
        assert code == 2 and "--seed -1 is too few" in text
        return
    small = ["--identities", "8", "--cameras", "2", "--images_per_camera", "1"]
    code, text = run([*line.words[1:], *small])
    assert code == 0, text
    assert any(Path(line.words[line.words.index("--output") + 1], "query").iterdir())


@pytest.mark.parametrize("line", parameters(transcripts(*WITHOUT_PLUGIN)))
def test_a_shown_outcome_is_the_outcome(
    line: Line, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    _, text = run(line.words[1:])
    assert normalised(text) == normalised(line.printed)


def test_every_line_is_a_command_that_is_known() -> None:
    lines = commands()
    assert len(lines) > 50
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in lines:
        if line.program == "reidreg":
            assert line.words[1] in COMMANDS, line.key
            continue
        match = re.fullmatch(FOREIGN.get(line.program, "(?!)"), " ".join(line.words))
        assert match is not None, line.key
        assert line.program != "make" or match["target"] in targets, line.key


def test_every_command_is_in_the_guide() -> None:
    assert {line.words[1] for line in commands(GUIDE) if line.program == "reidreg"} == set(COMMANDS)


def migration_rows() -> list[Any]:
    """The flags on the right of the guide's table of the reference's commands."""
    table = prose_of(GUIDE).partition("| 기존 | reidreg |")[2].partition("\n\n")[0]
    flags = [
        span
        for row in table.splitlines()[2:]
        for span in re.findall(r"`(--[^`]+)`", row.split(" | ")[-1])
    ]
    return [pytest.param(text, id=text) for text in flags]


@pytest.mark.parametrize("flags", migration_rows())
def test_what_stands_for_a_command_of_the_reference_resolves(
    flags: str, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    base = ["fit", "--config", "configs/aihub_kaist.yaml"]
    code, text = run([*base, *shlex.split(flags), "--print_config"])
    assert code == 0, text


# --------------------------------------------------------------------- configurations


def configurations(*pages: Path) -> list[Block]:
    """The yaml blocks that hold a key of a configuration."""
    return [
        block
        for block in blocks("yaml", *pages)
        if {key.partition(".")[0] for key in parse_yaml(block.text, str(block))} & {*ORDER}
    ]


@pytest.mark.parametrize("block", configurations(*WITHOUT_PLUGIN), ids=str)
def test_a_shown_configuration_resolves(block: Block) -> None:
    values = parse_yaml(block.text, str(block))
    assert load_config("aihub_kaist", values) is not None


def test_the_guide_shows_the_configuration_that_ships() -> None:
    shown = configurations(GUIDE)[0]
    shipped = (ROOT / "configs/aihub_kaist.yaml").read_text()
    assert parse_yaml(shown.text, "shown") == parse_yaml(shipped, "shipped")


def test_the_guide_explains_every_key() -> None:
    explained = set(spans_of(GUIDE))

    def keys(values: dict[str, Any], prefix: str = "") -> list[str]:
        nested = [
            keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
            for key, value in values.items()
        ]
        return [key for part in nested for key in part]

    missing = [key for key in keys(load_config("aihub_kaist").as_dict()) if key not in explained]
    assert not missing


def test_the_guide_gives_the_published_counts() -> None:
    rows = [row for row in prose_of(GUIDE).splitlines() if row.startswith("| `")]
    for folder, (identities, images) in OFFICIAL.items():
        row = next(row for row in rows if f"`{folder}`" in row.split(" | ")[0])
        assert f"{identities}" in row and f"{images:,}" in row, folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # One with a slip of the pen is shown, with what is said of it.
    named = set(re.findall(r"configs/[\w/]+\.yaml", text)) - {"configs/aihub_kiast.yaml"}
    assert all((ROOT / name).is_file() for name in named), named


# --------------------------------------------------------------------- links and keys


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_internal_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def flags_in(page: Path) -> set[str]:
    """The dotted flags that a page mentions, but for those of deliberate mistakes."""
    text = "\n".join(block.text for block in blocks_of(page) if block.language != "text")
    spans = [span for span in spans_of(page) if "no such option" not in span]
    return set(re.findall(r"--([a-z_]+(?:\.\w+)+)", "\n".join([text, *spans])))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_is_mentioned_is_one(page: Path, with_plugin: dict[str, Any]) -> None:
    known = {section: set(options) for section, options in with_plugin["options"].items()}
    for flag in flags_in(page):
        section, _, option = re.sub(r"^losses\.\w+", "losses", flag).rpartition(".")
        assert option in known.get(section, ()), f"--{flag}"


def plain_flags(text: str) -> set[str]:
    """The flags without a dot: a command's own options."""
    return set(re.findall(r"(?<!\S)--(\w+)(?![\w.])", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_command_that_is_mentioned_is_one(page: Path) -> None:
    parts = {name: [[]] for name in COMMANDS} | {"index": [["build"], ["add"], ["info"]]}
    known = {
        name: {
            option
            for part in parts[name]
            for option in re.findall(r"--(\w+)", run([name, *part, "--help"])[1])
        }
        for name in COMMANDS
    }
    for span in spans_of(page):
        if span.startswith(("--", "reidreg ")):
            assert plain_flags(span) <= set().union(*known.values()), span
    for line in ours(commands(page), *COMMANDS):
        # Parsing alone would let an abbreviated option pass.
        assert plain_flags(" ".join(line.words)) <= known[line.words[1]], line.key


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_block_imports_public_names(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "reidreg":
            assert node.module == "reidreg"
            assert {alias.name for alias in node.names} <= {*reidreg.__all__}


def test_the_loss_of_the_contributors_guide_does_what_its_test_says() -> None:
    loss, test = blocks("python", CONTRIBUTING)
    names: dict[str, Any] = {"__name__": "contributing"}
    with LOSSES.temporary():
        for block in (loss, test):
            # Classes and functions of the page alone are kept; nothing is registered after it.
            exec(compile(block.text, str(block), "exec", dont_inherit=True), names)
        (name,) = re.findall(r"^def (test_\w+)", test.text, re.MULTILINE)
        names[name]()
        assert "eps" in options_of(LOSSES["unit_norm"])
    assert "unit_norm" not in LOSSES


def test_the_architecture_gives_every_room_its_level() -> None:
    rows = re.findall(r"^\| (\d) \| (.+?) \|", ARCHITECTURE.read_text(), re.MULTILINE)
    shown = {
        name.rstrip("/"): int(level)
        for level, rooms in rows
        for name in re.findall(r"`(\w+/?)`", rooms)
    }
    assert shown == LEVELS


# --------------------------------------------------------------------- the plugin of plugins.md

RUN = """
import contextlib, io, json, sys
from reidreg import load_config
from reidreg.cli.main import main
from reidreg.config.sections import FIXED_SECTIONS
from reidreg.parts.interfaces import REGISTRIES
from reidreg.parts.schema import options_of
from reidreg.config.schedules import SCHEDULES

commands, programs, layers = json.loads(sys.argv[1])
outcomes = {}
for name, arguments in commands.items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main(arguments)
    outcomes[name] = (code, out.getvalue())
kinds = {"losses" if kind == "loss" else kind: parts for kind, parts in REGISTRIES.items()}
options = {
    section: sorted({"name", *(o for part in parts.values() for o in options_of(part))})
    for section, parts in {**kinds, "schedule": SCHEDULES}.items()
}
options["losses"].append("weight")
options.update({name: list(options_of(part, frozenset())) for name, part in FIXED_SECTIONS.items()})
for layer in layers:
    load_config("aihub_kaist", layer)
for program in programs:
    exec(compile(program, "<plugins.md>", "exec", dont_inherit=True), {"__name__": "notebook"})
print(json.dumps({"outcomes": outcomes, "options": options}))
"""


def install(folder: Path) -> dict[str, Path]:
    """The package of plugins.md, as pip would leave it in a folder; its modules by name."""
    modules = {}
    for block in blocks("python", PLUGINS):
        if match := re.match(r"# (reidreg_mine/\w+\.py)\n", block.text):
            path = folder / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n")
            modules[path.stem] = path
    (project,) = blocks("toml", PLUGINS)
    found = re.search(r'entry-points\."reidreg\.plugins"\]\n(\w+) = "(\w+)"', project.text)
    assert found is not None and found[2] == "reidreg_mine"
    name, version = re.findall(r'^(?:name|version) = "([^"]+)"', project.text, re.MULTILINE)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[reidreg.plugins]\n{found[1]} = {found[2]}\n")
    return modules


def run_with(site: Path, clone: Path, commands: dict[str, list[str]], *more: Any) -> dict[str, Any]:
    """Commands, programs and configurations in a process that has a folder of plugins."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([commands, *(more or ([], []))])],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=clone,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    outcome: dict[str, Any] = json.loads(result.stdout)
    return outcome


# A run of every part of the page.
EVERY_PART = {
    **TINY,
    "dataset.name": "csv_list",
    "dataset.file": "people.csv",
    "sampler.name": "capped",
    "sampler.most": 4,
    "backbone.name": "few_convs",
    "head.name": "halves",
    "losses.pairs.name": "pair_margin",
    "losses.proxies.name": "proxies",
    "losses.proxies.weight": 0.1,
    "evaluator.name": "by_camera",
    "evaluator.camera": 2,
    "output_dir": "log/every_part",
}
for option in ("sampler.instances", "backbone.model", "backbone.pretrained"):
    del EVERY_PART[option]


@pytest.fixture(scope="module")
def with_plugin(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the commands and programs of plugins.md do, with its package installed."""
    site = tmp_path_factory.mktemp("site")
    install(site)
    folders = {"train": "bounding_box_train_1", "query": "query", "gallery": "bounding_box_test"}
    with (clone / "people.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["split", "path", "pid", "camid"])
        for split, folder in folders.items():
            for image in sorted((clone / "data/aihub_kaist" / folder).glob("*.jpg")):
                pid, camera = re.findall(r"^(\d+)_c(\d+)", image.name)[0]
                table.writerow([split, image.relative_to(clone), pid, camera])
    todo = {line.key: [*line.words[1:]] for line in [*commands(PLUGINS), *transcripts(PLUGINS)]}
    for arguments in todo.values():
        if arguments[0] == "fit":
            arguments.append("--print_config")
    every_part = ["fit", "--config", "aihub_kaist", *as_flags(EVERY_PART)]
    todo["every part"] = every_part
    todo["every part, resumed"] = [*every_part, "--train.epochs=2", "--resume=auto"]
    todo["listing"] = ["plugins", "--json"]
    programs = [b.text for b in blocks("python", PLUGINS) if "# reidreg_mine/" not in b.text]
    assert len(programs) >= 2
    layers = [parse_yaml(block.text, str(block)) for block in configurations(PLUGINS)]
    assert len(layers) >= 2
    todo = {key: arguments for key, arguments in todo.items() if arguments[0] in COMMANDS}
    return run_with(site, clone, todo, programs, layers)


@pytest.mark.parametrize("line", parameters(ours(commands(PLUGINS), *COMMANDS)))
def test_a_command_runs_with_the_documented_plugin(line: Line, with_plugin: dict[str, Any]) -> None:
    code, text = with_plugin["outcomes"][line.key]
    assert code == 0, text


@pytest.mark.parametrize("line", parameters(transcripts(PLUGINS)))
def test_an_outcome_with_the_documented_plugin_is_the_shown_one(
    line: Line, with_plugin: dict[str, Any]
) -> None:
    _, text = with_plugin["outcomes"][line.key]
    assert normalised(text) == normalised(line.printed)


def test_the_documented_plugin_has_a_part_of_every_kind(with_plugin: dict[str, Any]) -> None:
    code, text = with_plugin["outcomes"]["listing"]
    listing = json.loads(text)
    assert code == 0 and not listing["broken"]
    mine = {part["kind"] for part in listing["parts"] if part["plugin"] == "mine"}
    assert mine == {part["kind"] for part in listing["parts"]}
    assert all(part["summary"] for part in listing["parts"])


def test_every_documented_part_trains_evaluates_and_resumes(
    with_plugin: dict[str, Any], clone: Path
) -> None:
    for name in ("every part", "every part, resumed"):
        code, text = with_plugin["outcomes"][name]
        assert code == 0, text
        assert "camera 2" in text
    lines = (clone / "log/every_part/metrics.jsonl").read_text().splitlines()
    terms = {key for line in lines for key in json.loads(line)}
    assert {"train/pairs", "train/proxies", "train/id", "val/mAP"} <= terms
    assert json.loads(lines[-1])["epoch"] == 2
    figures = json.loads((clone / "log/every_part/metrics.json").read_text())
    assert figures["camera 2"].keys() == figures.keys() - {"camera 2"}


def test_a_broken_plugin_says_what_the_page_says(clone: Path, tmp_path: Path) -> None:
    losses = install(tmp_path)["losses"]
    losses.write_text(losses.read_text().replace("import torch\n", "import some_library\n", 1))
    pairs = ["fit", "--config", "quickstart", "--losses.pairs.name", "pair_margin"]
    todo = {
        "list": ["plugins"],
        "doctor": ["doctor"],
        "needs none": ["fit", "--config", "quickstart", "--print_config"],
        "needs one": pairs,
    }
    outcomes = run_with(tmp_path, clone, todo)["outcomes"]
    assert {name: code for name, (code, _) in outcomes.items()} == {
        "list": 0,
        "doctor": 2,
        "needs none": 0,
        "needs one": 2,
    }
    printed = {line for _, text in outcomes.values() for line in normalised(text)}
    shown = [b for b in blocks("text", PLUGINS) if "some_library" in b.text]
    assert len(shown) == 2
    for block in shown:
        assert {*normalised(block.text)} <= printed
