"""The training loop: its results, its files, and bit-exact resumes."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import as_flags
from reidreg import Config, fit, load_checkpoint, load_config
from reidreg.errors import CheckpointError, ConfigError, DataError, DivergedError
from reidreg.model.checkpoint import save_checkpoint
from reidreg.training.divergence import DivergenceCheck
from reidreg.training.initial_weights import start_weights
from reidreg.training.loop import train_step
from reidreg.training.run import Run, build_run
from reidreg.training.state import capture
from runs import Values, differing, lines_of


def configure(tiny: Values, **changes: Any) -> Config:
    return load_config("aihub_kaist", tiny, {k.replace("__", "."): v for k, v in changes.items()})


def test_a_run_writes_the_documented_files(tiny: Values) -> None:
    config = configure(tiny, train__epochs=2, train__checkpoint_every=1)
    figures = fit(config)
    folder = Path(config.output_dir)
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "metrics.json",
        "checkpoints",
    }
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {
        "last.ckpt",
        "previous.ckpt",
        "best.ckpt",
        "epoch_0001.ckpt",
        "epoch_0002.ckpt",
    }
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored == figures
    assert {"mAP", "mINP", "rank1", "rank5", "rank10", "cmc"} <= stored.keys()
    assert {"num_queries", "num_valid_queries", "num_gallery"} <= stored.keys()
    assert not {"evaluated", "validation"} & stored.keys(), "nobody was held out"
    assert not any(key.startswith("test/") for line in lines_of(folder) for key in line)
    assert load_config(folder / "config.yaml").as_dict() == config.as_dict()


def test_metrics_jsonl_has_the_documented_keys_and_steps_in_order(tiny: Values) -> None:
    config = configure(tiny, train__epochs=2, train__eval_every=1)
    fit(config)
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    training = [line for line in lines if "train/loss" in line]
    keys = {
        "step",
        "epoch",
        "train/loss",
        "train/id",
        "train/triplet",
        "train/accuracy",
        "train/lr",
        "train/images_per_second",
        "train/data_wait",
        "train/peak_memory_gib",
    }
    assert all(line.keys() == keys for line in training)
    assert all(0 < line["train/data_wait"] < 1 for line in training)
    assert all(0.1 < line["train/peak_memory_gib"] < 100 for line in training)
    validation = [line for line in lines if "val/mAP" in line]
    assert [line["epoch"] for line in validation] == [1, 2]
    assert validation[0].keys() >= {"val/mAP", "val/mINP", "val/rank1", "val/rank5", "val/rank10"}


def test_total_loss_is_the_weighted_sum_of_the_terms(tiny: Values) -> None:
    config = configure(tiny, losses__triplet__weight=0.25)
    fit(config)
    for line in lines_of(Path(config.output_dir)):
        if "train/loss" in line:
            expected = line["train/id"] + 0.25 * line["train/triplet"]
            assert line["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_the_first_loss_is_that_of_a_uniform_guess(tiny: Values) -> None:
    # With a classifier near zero, -sum q log p is ln C whatever the smoothing.
    config = configure(tiny, losses__triplet__weight=0.0, train__log_every=1)
    fit(config)
    first = lines_of(Path(config.output_dir))[0]
    classes = len(load_checkpoint(Path(config.output_dir) / "checkpoints/last.ckpt").labels.pids)
    assert first["train/loss"] == pytest.approx(torch.tensor(float(classes)).log().item(), abs=0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_after_an_epoch_is_the_same_run_bit_for_bit(
    tiny: Values, tmp_path: Path, workers: int
) -> None:
    common = {
        "train__workers": workers,
        "train__cache": "none",
        "losses__center__name": "center",
        "losses__center__weight": 0.0005,
        "train__eval_every": 1,
        "train__ema_decay": 0.99,
        "train__accumulate": 2,
        "optimizer__clip_norm": 5.0,
        "train__freeze": ["conv1"],
        "train__freeze_epochs": 3,
    }
    whole = configure(tiny, **common, train__epochs=4, output_dir=str(tmp_path / "whole"))
    fit(whole)
    half = {**common, "output_dir": str(tmp_path / "halves")}
    fit(configure(tiny, **half, train__epochs=2))
    fit(configure(tiny, **half, train__epochs=4), resume="auto")
    assert not differing(
        tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "halves/checkpoints/last.ckpt"
    )
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "halves")


def test_a_run_in_bfloat16_is_reproducible(tiny: Values, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        fit(configure(tiny, train__precision="bf16", output_dir=str(folder)))
    assert not differing(*(folder / "checkpoints/last.ckpt" for folder in folders))


def interrupted(values: Values, number: signal.Signals, after: str) -> subprocess.Popen[str]:
    """Start a run, and send it a signal once its log contains `after`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "reidreg", "fit", "--config", "aihub_kaist", *as_flags(values)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if after in line:
            process.send_signal(number)
            break
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_saves_in_the_middle_of_an_epoch_and_the_resumed_run_is_exact(
    tiny: Values, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    values = {
        **tiny,
        "dataset.train_folder": "[bounding_box_train_1, bounding_box_train_2]",
        "sampler.batch_size": 4,
        "train.epochs": 3,
        "train.log_every": 2,
        "train.workers": 2,
        "train.cache": "none",
    }
    fit(load_config("aihub_kaist", flags=as_flags({**values, "output_dir": tmp_path / "whole"})))
    values["output_dir"] = str(tmp_path / "stopped")
    process = interrupted(values, number, "epoch 2/3 step 4/")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert len(errors.strip().splitlines()) == 1 and "--resume auto" in errors
    stopped = load_checkpoint(tmp_path / "stopped/checkpoints/last.ckpt")
    assert stopped.epoch == 1 and stopped.training is not None
    assert stopped.training["progress"]["batch"] >= 4
    fit(load_config("aihub_kaist", flags=as_flags(values)), resume="auto")
    assert not differing(
        tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "stopped/checkpoints/last.ckpt"
    )
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "stopped")


# Options with state of their own, which a resume has to restore too.
EVERYTHING = {
    "train.workers": 2,
    "train.cache": "none",
    "train.ema_decay": 0.99,
    "losses.center.name": "center",
    "losses.center.weight": 0.0005,
}


@pytest.mark.slow
def test_a_run_that_is_killed_many_times_ends_as_one_that_was_not(
    tiny: Values, tmp_path: Path
) -> None:
    """SIGKILL at random moments, some of them while a checkpoint is written."""
    values = {**tiny, **EVERYTHING, "train.epochs": 8, "train.eval_every": 3}
    fit(load_config("aihub_kaist", flags=as_flags({**values, "output_dir": tmp_path / "whole"})))
    values["output_dir"] = str(tmp_path / "killed")
    command = [sys.executable, "-m", "reidreg", "fit", "--config", "aihub_kaist"]
    chance, kills, code = random.Random(0), 0, None
    while code != 0:
        process = subprocess.Popen(
            [*command, *as_flags(values), "--resume", "auto"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        while "epoch " not in (line := process.stdout.readline()) and line:
            pass
        # Longer from kill to kill, so that the run progresses on a slow machine too.
        delay = chance.uniform(0, 1 + kills)
        killer = threading.Timer(delay, process.kill)
        killer.start()
        process.communicate()
        killer.cancel()
        code = process.returncode
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        assert kills < 60
    assert kills >= 3
    assert not differing(
        tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "killed/checkpoints/last.ckpt"
    )
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(tiny: Values, tmp_path: Path) -> None:
    values = {**tiny, **EVERYTHING, "train.epochs": 3}
    fit(load_config("aihub_kaist", flags=as_flags({**values, "output_dir": tmp_path / "whole"})))
    values["output_dir"] = str(tmp_path / "killed")
    process = interrupted(values, signal.SIGKILL, "epoch 2/3 step 2/")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    fit(load_config("aihub_kaist", flags=as_flags(values)), resume="auto")
    assert not differing(
        tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "killed/checkpoints/last.ckpt"
    )
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before_and_the_run_is_exact(
    tiny: Values, tmp_path: Path
) -> None:
    fit(configure(tiny, train__epochs=3, output_dir=str(tmp_path / "whole")))
    last = tmp_path / "damaged/checkpoints/last.ckpt"
    damaged = {"output_dir": str(tmp_path / "damaged"), "train__eval_every": 3}
    fit(configure(tiny, **damaged, train__epochs=2))
    os.truncate(last, 1_000_000)
    fit(configure(tiny, **damaged, train__epochs=3), resume="auto")
    assert "last.ckpt is damaged" in (tmp_path / "damaged/train.log").read_text()
    assert not differing(tmp_path / "whole/checkpoints/last.ckpt", last)


def test_a_run_in_fp32_can_be_resumed_in_fp16(tiny: Values) -> None:
    from reidreg.training.run import build_run
    from reidreg.training.state import capture, restore

    saved = capture(build_run(configure(tiny)))
    run = build_run(configure(tiny, train__precision="fp16"))
    restore(run, saved)
    assert run.scaler.is_enabled() and run.scaler.get_scale() > 1


def test_resume_auto_without_a_checkpoint_starts_a_new_run(tiny: Values) -> None:
    assert fit(configure(tiny), resume="auto")["num_queries"] > 0


def test_resuming_a_finished_run_changes_nothing(tiny: Values) -> None:
    config = configure(tiny)
    figures = fit(config)
    last = Path(config.output_dir) / "checkpoints/last.ckpt"
    before = last.read_bytes()
    assert fit(config, resume="auto") == figures
    assert last.read_bytes() == before


def test_a_changed_learning_rate_is_used_after_a_resume_and_logged(tiny: Values) -> None:
    config = configure(tiny)
    fit(config)
    changed = configure(tiny, train__epochs=2, optimizer__lr=1e-4)
    fit(changed, resume="auto")
    folder = Path(config.output_dir)
    assert "optimizer.lr: 0.00035 -> 0.0001" in (folder / "train.log").read_text()
    assert lines_of(folder)[-2]["train/lr"] == pytest.approx(1e-4 * 0.1)


def test_resuming_on_other_identities_is_refused(tiny: Values) -> None:
    fit(configure(tiny))
    other = configure(tiny, dataset__train_folder="bounding_box_train_2", train__epochs=2)
    with pytest.raises(CheckpointError, match="--init_from"):
        fit(other, resume="auto")


def test_resuming_with_another_optimizer_is_refused(tiny: Values) -> None:
    fit(configure(tiny))
    with pytest.raises(CheckpointError, match="another optimizer"):
        fit(configure(tiny, train__epochs=2, optimizer__name="sgd"), resume="auto")


def test_resuming_from_weights_alone_is_refused(tiny: Values) -> None:
    config = configure(tiny)
    fit(config)
    best = Path(config.output_dir) / "checkpoints/best.ckpt"
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        fit(config, resume=str(best))


def test_a_second_run_moves_the_first_ones_files_aside(tiny: Values) -> None:
    config = configure(tiny)
    fit(config)
    folder = Path(config.output_dir)
    first = (folder / "checkpoints/last.ckpt").read_bytes()
    log = (folder / "train.log").read_text()
    fit(configure(tiny, train__seed=5))
    assert (folder / "earlier-1/checkpoints/last.ckpt").read_bytes() == first
    assert (folder / "earlier-1/metrics.jsonl").exists()
    assert (folder / "train.log").read_text().startswith(log)


def test_a_folder_in_use_is_refused(tiny: Values, tmp_path: Path) -> None:
    values = {**tiny, "train.epochs": 50}
    process = interrupted(values, signal.SIGCONT, "epoch 1/50")
    try:
        with pytest.raises(ConfigError, match=f"in use by process {process.pid}"):
            fit(configure(tiny))
    finally:
        process.kill()
        process.communicate()


def test_init_from_takes_the_weights_but_not_a_classifier_of_others(
    tiny: Values, tmp_path: Path
) -> None:
    config = configure(tiny)
    fit(config)
    best = Path(config.output_dir) / "checkpoints/best.ckpt"
    # A learning rate this small leaves the weights as they were loaded.
    changes = {"init_from": str(best), "optimizer__lr": 1e-12, "optimizer__weight_decay": 0.0}
    other = configure(
        tiny,
        **changes,
        dataset__train_folder="bounding_box_train_2",
        output_dir=str(tmp_path / "tuned"),
    )
    fit(other)
    old = load_checkpoint(best).model
    new = load_checkpoint(tmp_path / "tuned/checkpoints/last.ckpt").model
    key = "backbone.net.layer4.0.conv2.weight"
    assert torch.allclose(old[key], new[key], atol=1e-6)
    assert not torch.allclose(old["head.classifier.weight"], new["head.classifier.weight"])
    assert "not loaded: head.classifier.weight" in (tmp_path / "tuned/train.log").read_text()


def test_init_from_another_architecture_is_refused(tiny: Values, tmp_path: Path) -> None:
    config = configure(tiny)
    fit(config)
    best = str(Path(config.output_dir) / "checkpoints/best.ckpt")
    other = configure(
        tiny, init_from=best, backbone__name="resnet34", output_dir=str(tmp_path / "other")
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        fit(other)


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny: Values, tmp_path: Path) -> None:
    config = configure(tiny)
    fit(config)
    last = Path(config.output_dir) / "checkpoints/last.ckpt"
    checkpoint = load_checkpoint(last)
    checkpoint.model["backbone.net.conv1.0.weight"][0, 0, 0, 0] = float("nan")
    poisoned = tmp_path / "poisoned.ckpt"
    save_checkpoint(checkpoint, poisoned)
    before = last.read_bytes()
    with pytest.raises(DivergedError, match=r"loss is nan at step \d+ .*nothing was saved since"):
        fit(configure(tiny, train__epochs=2), resume=str(poisoned))
    assert last.read_bytes() == before


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_limits_the_gradient_and_nothing_else(
    tiny: Values, tmp_path: Path, limit: float
) -> None:
    """With plain SGD the weights move by the learning rate times the gradient."""
    changes = {
        "optimizer__name": "sgd",
        "optimizer__momentum": 0.0,
        "optimizer__weight_decay": 0.0,
        "schedule__warmup_epochs": 0,
        "sampler__batch_size": 12,
        "optimizer__clip_norm": limit,
    }
    run = build_run(configure(tiny, **changes))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    step(run)
    gradients = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
    assert gradients.norm().item() <= limit * 1.0001
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            moved = before[name] - run.config.optimizer.lr * parameter.grad
            assert torch.allclose(parameter, moved, atol=1e-7), name


def step(run: Run) -> None:
    """The first step of a run."""
    run.model.train()
    train_step(run, next(iter(run.loader.epoch(0))))


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tiny: Values) -> None:
    """If every layer and loss computes each image by itself: without batch statistics."""
    gradients = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        run = build_run(configure(tiny, losses__triplet__weight=0.0, train__accumulate=parts))
        for module in run.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0
                module.forward = functools.partial(frozen_norm, module)
        step(run)
        gradients.append(
            {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
        )
    for name, whole in gradients[0].items():
        for others in gradients[1:]:
            assert torch.allclose(whole, others[name], rtol=1e-3, atol=1e-5), name


def frozen_norm(module: torch.nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.batch_norm(
        x, module.running_mean, module.running_var, module.weight, module.bias, False
    )


def test_parts_that_separate_the_images_of_an_identity_are_refused(tiny: Values) -> None:
    with pytest.raises(ConfigError, match=r"train\.accumulate: batches of 8 of 2 images"):
        fit(configure(tiny, train__accumulate=8))


def test_parts_and_losses_that_compare_images_are_warned_of(
    tiny: Values, caplog: pytest.LogCaptureFixture
) -> None:
    build_run(configure(tiny, train__accumulate=2))
    assert "train.accumulate 2, triplet compares 4 images of a batch, not all 8" in caplog.text
    caplog.clear()
    build_run(configure(tiny, train__accumulate=2, losses__triplet__weight=0.0))
    assert "compares" not in caplog.text


def test_averaged_weights_are_evaluated_kept_and_follow_the_formula(tiny: Values) -> None:
    run = build_run(configure(tiny, train__ema_decay=0.9))
    start_weights(run, None)
    assert run.ema is not None and run.embedder.model is run.ema.model
    expected = {k: v.clone().double() for k, v in run.model.state_dict().items()}
    for number in (1, 2, 3):
        step(run)
        # timm copies the weights in the first step, and averages from the second on.
        decay = min(0.9, 1 - number ** (-2 / 3)) if number > 1 else 0.0
        for key, value in run.model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
    for key, value in run.ema.model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[key], atol=1e-6), key
    saved = capture(run)
    assert saved.training is not None
    key = "backbone.net.conv1.0.weight"
    assert torch.equal(saved.model[key], run.ema.model.state_dict()[key])
    assert torch.equal(saved.training["model"][key], run.model.state_dict()[key])
    assert not torch.equal(saved.model[key], saved.training["model"][key])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_frozen_parameters_do_not_change_for_their_epochs_and_are_then_trained(
    optimizer: str, tiny: Values
) -> None:
    config = configure(
        tiny,
        optimizer__name=optimizer,
        train__epochs=3,
        train__checkpoint_every=1,
        train__freeze=["^backbone"],
        train__freeze_epochs=2,
    )
    fit(config)
    folder = Path(config.output_dir) / "checkpoints"
    first, second, third = (load_checkpoint(folder / f"epoch_000{n}.ckpt").model for n in (1, 2, 3))
    for key in first:
        if key.startswith("backbone"):  # running statistics among them
            assert torch.equal(first[key], second[key]), key
    assert not torch.equal(first["head.classifier.weight"], second["head.classifier.weight"])
    for key in ("backbone.net.conv1.0.weight", "backbone.net.bn1.running_mean"):
        assert not torch.equal(second[key], third[key])


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["^spine"], r"'\^spine' matches no trained parameter; there are backbone\.net\.conv1"),
        (["."], "every parameter is frozen"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(
    tiny: Values, freeze: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_run(configure(tiny, train__freeze=freeze, train__freeze_epochs=1))


def test_a_wrong_regular_expression_for_freezing_is_an_error(tiny: Values) -> None:
    with pytest.raises(ConfigError, match=r"train\.freeze: '\(' is not a regular expression"):
        configure(tiny, train__freeze=["("])


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_figures(tiny: Values, tmp_path: Path) -> None:
    plain = configure(tiny, output_dir=str(tmp_path / "plain"))
    compiled = configure(tiny, train__compile=True, output_dir=str(tmp_path / "compiled"))
    fit(plain)
    fit(compiled)
    names = [
        load_checkpoint(tmp_path / f"{n}/checkpoints/last.ckpt").model
        for n in ("plain", "compiled")
    ]
    assert names[0].keys() == names[1].keys()
    ours, theirs = (lines_of(tmp_path / name) for name in ("plain", "compiled"))
    for line, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert line["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_error_names_the_first_step_that_was_not_finite(at_once: bool) -> None:
    check = DivergenceCheck(torch.device("cpu" if at_once else "meta"))
    fine, bad = torch.tensor(1.5), torch.tensor(float("nan"))
    check.watch(1, fine, fine, {"id": fine})
    check.check()
    failing = [
        lambda: check.watch(2, fine, bad, {"id": torch.tensor(2.5)}),
        lambda: check.watch(3, bad, bad, {"id": bad}),
        check.check,
    ]
    with pytest.raises(DivergedError, match=r"the gradient is nan at step 2 \(id 2\.5\)"):
        for attempt in failing:
            attempt()
    check = DivergenceCheck(torch.device("meta"))
    check.watch(7, bad, None, {"id": bad})
    with pytest.raises(DivergedError, match=r"the loss is nan at step 7 \(id nan\)"):
        check.check()


def test_eval_untrained_evaluates_before_the_first_step(tiny: Values) -> None:
    config = configure(tiny, train__eval_untrained=True)
    fit(config)
    first = lines_of(Path(config.output_dir))[0]
    assert first["step"] == 0 and "val/mAP" in first


def test_a_damaged_image_stops_the_run_with_its_name(tiny: Values, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(tiny["dataset.root"], root)
    victim = next((root / "aihub_kaist/bounding_box_train_1").glob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:200])
    config = configure(tiny, dataset__root=str(root), train__workers=2, train__cache="none")
    with pytest.raises(DataError, match=victim.name) as caught:
        fit(config)
    assert "\n" not in str(caught.value)


def test_an_output_folder_that_cannot_be_made_is_refused_before_training(
    tiny: Values, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        fit(configure(tiny, output_dir=str(tmp_path / "file/run")))


def test_a_query_without_any_match_stops_before_training(tiny: Values, tmp_path: Path) -> None:
    config = configure(tiny, dataset__gallery_folder="bounding_box_train_1")
    with pytest.raises(DataError, match="no query has a match"):
        fit(config)
    assert not list((Path(config.output_dir) / "checkpoints").iterdir())


@pytest.mark.slow
def test_training_raises_map_clearly_on_drawn_data(tmp_path: Path) -> None:
    root = tmp_path / "data"
    config = load_config(
        "quickstart", {"dataset.root": str(root), "output_dir": str(tmp_path / "run")}
    )
    start = time.perf_counter()
    figures = fit(config)
    untrained = lines_of(tmp_path / "run")[0]["val/mAP"]
    assert figures["mAP"] > 2 * untrained
    assert time.perf_counter() - start < 600


@pytest.mark.gpu
def test_a_gpu_run_learns_and_resumes(tiny: Values) -> None:
    for precision in ("bf16", "fp16", "fp32"):
        config = configure(
            tiny,
            train__device="cuda",
            train__precision=precision,
            train__workers=2,
            train__cache="none",
            output_dir=f"{tiny['output_dir']}-{precision}",
            losses__center__name="center",
            losses__center__weight=0.0005,
        )
        fit(config)
        longer = load_config(config.as_dict(), {"train.epochs": 2})
        assert fit(longer, resume="auto")["num_valid_queries"] > 0
        lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-2])["train/peak_memory_gib"] > 0
        assert "memory: a step needs" in (Path(config.output_dir) / "train.log").read_text()


def test_no_process_is_left_behind_by_a_signal(tiny: Values) -> None:
    values = {**tiny, "train.epochs": 50, "train.workers": 2, "train.cache": "none"}
    process = interrupted(values, signal.SIGTERM, "epoch 1/50 step 2/")
    process.communicate(timeout=60)
    listed = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout
    assert str(values["output_dir"]) not in listed


def test_a_signal_to_the_whole_process_group_ends_as_cleanly(tiny: Values, tmp_path: Path) -> None:
    values = {**tiny, "train.epochs": 50, "train.workers": 2, "train.cache": "none"}
    process = subprocess.Popen(
        [sys.executable, "-m", "reidreg", "fit", "--config", "aihub_kaist", *as_flags(values)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 1/50 step 2/" in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert load_checkpoint(tmp_path / "run/checkpoints/last.ckpt").step > 0


def test_a_loading_process_that_dies_is_named_in_one_line(tiny: Values) -> None:
    # With long steps, so that torch's error is not lost among many log lines.
    changes = {"train.epochs": 50, "train.workers": 1, "train.cache": "none"}
    values = {**tiny, **changes, "backbone.name": "resnet18"}
    del values["backbone.model"]
    process = interrupted(values, signal.SIGCONT, "epoch 1/50 step 2/")
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    for worker in listed.stdout.split():
        os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    (line,) = errors.strip().splitlines()
    assert "loading process" in line and "--train.workers" in line


def test_a_missing_init_from_is_an_error_before_the_data_are_read(tiny: Values) -> None:
    config = configure(tiny, init_from="none.ckpt", dataset__root="/nowhere")
    with pytest.raises(CheckpointError, match=r"no checkpoint at none\.ckpt"):
        fit(config)
