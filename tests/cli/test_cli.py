"""The command line as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Command, as_flags
from reidreg.cli import main as cli
from reidreg.cli.main import COMMANDS, main
from reidreg.machine.gpu_memory import Holder


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: reidreg {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_option_of_any_command_is_one_line_and_2(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {
        "evaluate": ["--query=q", "--gallery=g"],
        "synthesize": ["--output=x"],
        "import-config": ["f.yml"],
    }
    assert main([command, *needed.get(command, []), "--optput", "x"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"reidreg {command}: ")


def test_a_mistyped_command_gets_a_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["evalute"]) == 2
    assert "did you mean 'evaluate'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("reidreg 0.")


def test_an_unexpected_error_is_one_line_that_names_the_file_of_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: list[str]) -> int:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(cli.COMMANDS, "doctor", (broken, ""))
    assert main(["doctor"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    saved = Path(line.rpartition(" ")[2])
    assert "Traceback" in saved.read_text()
    saved.unlink()


def test_the_whole_way_from_images_to_figures(
    tiny: dict[str, Any], reidreg: Command, reidreg_here: Command, tmp_path: Path
) -> None:
    trained = reidreg("fit", "--config", "aihub_kaist", *as_flags(tiny))
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    for word in ("# images", "parameters", "steps", "epoch 1/1", "images/s", "mAP"):
        assert word in trained.stdout
    ckpt = f"{tiny['output_dir']}/checkpoints/best.ckpt"
    evaluated = reidreg("evaluate", "--ckpt", ckpt, "--report", "--output", "out")
    assert evaluated.returncode == 0, evaluated.stderr
    assert (tmp_path / "out/report/ranked.png").stat().st_size > 10_000
    assert ckpt in (tmp_path / "out/report/index.html").read_text()
    for split in ("query", "gallery"):
        result = reidreg_here(
            "extract", "--ckpt", ckpt, "--split", split, "--output", f"{split}.npz"
        )
        assert result.returncode == 0, result.stderr
    features = reidreg_here("evaluate", "--query", "query.npz", "--gallery", "gallery.npz")
    assert features.returncode == 0, features.stderr
    figures = json.loads((tmp_path / "out/metrics.json").read_text())
    assert f"{figures['mAP']:.2%}" in features.stdout
    with np.load(tmp_path / "query.npz") as file:
        assert len(file["features"]) == figures["num_queries"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["evaluate"], "--ckpt FILE"),
        (["evaluate", "--ckpt", "none.ckpt"], "no checkpoint at none.ckpt"),
        (["evaluate", "--query", "q.npz"], "--gallery"),
        (["extract", "--ckpt", "none.ckpt"], "no checkpoint at none.ckpt"),
        (["extract"], "--ckpt FILE"),
        (["plugins", "losss"], "did you mean 'loss'"),
        (["synthesize"], "--output"),
        (["synthesize", "--output", "x", "--cameras", "1"], "cameras"),
        (["import-config", "none.yml"], "none.yml"),
        (["fit", "--config"], "--config"),
        (["fit", "--config", "aihub_kais"], "did you mean 'aihub_kaist'"),
        (["fit"], "--config quickstart"),
    ],
)
def test_what_is_missing_or_wrong_is_named_in_one_line(
    arguments: list[str],
    word: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and word in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_missing_data_folder_is_one_line_that_says_what_to_do(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = as_flags({**tiny, "dataset.root": "/nowhere"})
    assert main(["fit", "--config", "aihub_kaist", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "/nowhere" in line and "--dataset.root" in line


def test_plugins_as_json_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    names = {(part["kind"], part["name"]) for part in listed["parts"]}
    assert {("dataset", "aihub_kaist"), ("backbone", "resnet50"), ("loss", "center")} <= names
    assert listed["broken"] == []


def test_plugins_of_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "losses"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[1] for line in lines] == ["center", "cross_entropy", "triplet"]


def test_synthesize_prints_what_it_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "market"
    options = ["--layout", "market1501", "--identities", "8", "--cameras", "2"]
    assert main(["synthesize", "--output", str(folder), *options, "--images_per_camera", "1"]) == 0
    assert "bounding_box_train" in capsys.readouterr().out
    assert (folder / "query").is_dir()


def test_doctor_looks_at_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("python", "torch", "cuda", "W&B", "memory", "plugins", "disk", "all is well"):
        assert word in text


def test_doctor_says_what_memory_is_free_and_who_holds_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gib = 2**30
    free = [(2 * gib, 16 * gib), (24 * gib, 24 * gib)]
    held = [
        [
            Holder(4711, "reidreg fit ...", 9 * gib),
            Holder(os.getpid(), "", gib),
            Holder(12, "", None),
        ],
        [],
    ]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: free[index])
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: ["T4", "A10"][index])
    monkeypatch.setattr("reidreg.machine.gpu_memory.holders", lambda device: held[device.index])
    monkeypatch.setattr("reidreg.tools.doctor.available_memory", lambda: 3 * gib)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("cuda:0        T4, 2.0 GiB of 16.0 GiB free")
    assert lines[first + 1 : first + 4] == [
        "              pid 4711 reidreg fit ... holds 9.0 GiB",
        "              pid 12 holds memory",
        "cuda:1        A10, 24.0 GiB of 24.0 GiB free",
    ]
    assert "memory        3.0 GiB available to this process" in lines
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("reidreg.tools.doctor.available_memory", lambda: None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "cuda          none" in text and "memory        an unknown amount available" in text


def test_doctor_looks_at_the_data_of_a_configuration(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"dataset: {{root: {tiny['dataset.root']}}}")
    config = ["--config", "aihub_kaist", "--config", str(tmp_path / "mine.yaml")]
    assert main(["doctor", *config]) == 0
    assert "query    |" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("dataset: {root: /nowhere}")
    assert main(["doctor", *config]) == 2
    assert "problem" in capsys.readouterr().out
