"""The profile of training steps, and the meter's waiting time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import small_run
from reidreg import fit, load_checkpoint, load_config
from reidreg.errors import ConfigError
from reidreg.logs.step_phases import StepListener
from reidreg.training.meter import Meter
from reidreg.training.profiling import WARM_UP, Profile, Stopwatch, profile_table
from worlds import in_processes

CPU = torch.device("cpu")
PHASES = ("data", "host to device", "forward", "loss", "backward", "optimizer", "other")


def test_a_profiled_run_is_the_same_run_with_a_trace_and_a_table(
    aihub_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = small_run(aihub_root, tmp_path / "plain")
    values["train"]["epochs"] = 3
    fit(load_config("aihub_kaist", values))
    values["output_dir"] = str(tmp_path / "profiled")
    fit(load_config("aihub_kaist", values), profile=3)
    plain, profiled = (
        load_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("plain", "profiled")
    )
    assert all(torch.equal(plain.model[key], profiled.model[key]) for key in plain.model)
    trace = json.loads((tmp_path / "profiled/profile/trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert all(names.count(phase) >= 3 for phase in PHASES)
    assert "aten::" in (tmp_path / "profiled/profile/operators.txt").read_text()
    log = (tmp_path / "profiled/train.log").read_text()
    assert "profile of 3 steps" in log and not (tmp_path / "plain/profile").exists()
    assert all(f"INFO {phase} " in log for phase in (*PHASES, "step"))
    assert not capfd.readouterr().err, "torch's recorder is silent"


def profiled(values: dict[str, Any]) -> dict[str, Any]:
    """A profiled run, in which writing the profile takes longer than `rank_timeout`."""
    write = Profile.write

    def slowly(self: Profile) -> None:
        time.sleep(8)
        write(self)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Profile, "write", slowly)
        return fit(load_config("aihub_kaist", values), profile=1)


@pytest.mark.slow
def test_with_several_processes_rank_0_is_profiled_and_the_others_wait(
    aihub_root: Path, tmp_path: Path
) -> None:
    values = small_run(aihub_root, tmp_path / "run")
    values["backbone.model"] = "test_resnet"
    values["train"] |= {"epochs": 2, "rank_timeout": 5.0}
    one, other = in_processes(2, profiled, values)
    assert one == other and "mAP" in one
    assert (tmp_path / "run/profile/trace.json").exists()
    assert (tmp_path / "run/train.log").read_text().count("profile of 1 steps") == 1


def steps(listener: StepListener, count: int) -> None:
    """Steps of two phases, 2 ms of data and 6 ms of the rest."""
    listener.begin("data")
    for _ in range(count):
        time.sleep(0.002)
        listener.begin("forward")
        time.sleep(0.006)
        listener.end_step()
    listener.end_epoch()


def test_phases_are_timed_after_the_warm_up_and_not_between_epochs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "reidreg")
    profile = Profile(4, tmp_path, CPU)
    steps(profile, WARM_UP + 2)
    time.sleep(0.5)  # an evaluation, say
    steps(profile, 2)
    steps(profile, 4)
    profile.close()
    rows = {line.split()[0]: line.split()[1:] for line in caplog.messages if "%" in line}
    data, forward, whole = (float(rows[name][0]) for name in ("data", "forward", "step"))
    assert 2 <= data < forward < 100 and forward >= 6
    assert whole == pytest.approx(data + forward, abs=0.02)
    assert caplog.messages[0] == "profile of 4 steps"
    assert (tmp_path / "trace.json").exists()


@pytest.mark.parametrize(("count", "timed"), [(1, 0), (WARM_UP, 0), (WARM_UP + 2, 2)])
def test_a_profile_of_a_run_that_ends_early_reports_the_steps_so_far(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, timed: int
) -> None:
    caplog.set_level("INFO", "reidreg")
    profile = Profile(100, tmp_path, CPU)
    steps(profile, count)
    profile.close()
    expected = f"profile of {timed} steps" if timed else "the run was over before step 6"
    assert expected in caplog.text


def test_a_recording_that_ends_early_is_written(tmp_path: Path) -> None:
    profile = Profile(3, tmp_path, CPU)
    steps(profile, WARM_UP + 4)
    profile.close()
    assert (tmp_path / "trace.json").exists()


def test_shares_add_up_to_the_whole() -> None:
    lines = profile_table({"data": 10.0, "forward": 30.0}, steps=2)
    assert [line.split() for line in lines[2:]] == [
        ["data", "5.00", "25.0%"],
        ["forward", "15.00", "75.0%"],
        ["step", "20.00", "100.0%"],
    ]


def test_the_default_listener_costs_nothing() -> None:
    listener = StepListener()
    start = time.process_time()
    for _ in range(10_000):
        listener.begin("forward")
    assert (time.process_time() - start) / 10_000 < 20e-6


def test_a_negative_number_of_steps_is_an_error(aihub_root: Path, tmp_path: Path) -> None:
    config = load_config("aihub_kaist", small_run(aihub_root, tmp_path / "run"))
    with pytest.raises(ConfigError, match="--profile: -1"):
        fit(config, profile=-1)
    assert not (tmp_path / "run").exists()


def test_the_meter_measures_how_long_the_loop_waits_for_data() -> None:
    def batches():  # type: ignore[no-untyped-def]
        for number in range(3):
            time.sleep(0.04)
            yield number

    meter = Meter()
    pids = torch.zeros(4, dtype=torch.int64)
    for number in meter.watching(batches()):
        time.sleep(0.01)
        meter.add(torch.tensor(float(number)), {}, None, pids)
    figures = meter.take(0.1, CPU)
    assert 0.5 < figures["train/data_wait"] < 0.95
    meter.add(torch.tensor(0.0), {}, None, pids)
    assert meter.take(0.1, CPU)["train/data_wait"] == 0.0


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    device = torch.device("cuda")
    stopwatch = Stopwatch(device)
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        stopwatch.begin("forward")
        for _ in range(20):
            matrix @ matrix
        stopwatch.begin("other")
        stopwatch.end_step()
    found = stopwatch.milliseconds()
    assert found["forward"] > 10 * found["other"]
