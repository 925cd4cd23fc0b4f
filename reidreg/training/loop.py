"""The training loop; read it from `fit` down.

configuration -> parts -> batches -> Output -> losses -> step -> evaluation -> checkpoint
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reidreg.config.sections import Config
from reidreg.data.workers import loading_processes
from reidreg.distributed.group import (
    broadcast,
    broadcast_state,
    joined,
    main_first,
    start_together,
    wait,
    world,
)
from reidreg.errors import ConfigError, DataError, DeviceError, InterruptedRun
from reidreg.evaluation.evaluate import evaluate_dataset, write_metrics
from reidreg.evaluation.figures import log_figures
from reidreg.evaluation.table import describe_evaluation
from reidreg.logs.console import log_silenced, logger
from reidreg.logs.metrics import MetricsLog
from reidreg.logs.progress import ProgressBar
from reidreg.logs.step_phases import DATA, NO_LISTENER, StepListener
from reidreg.logs.wandb import start_wandb
from reidreg.machine.devices import choose_device
from reidreg.machine.gpu_memory import describe_shortage
from reidreg.machine.world import world_from_env
from reidreg.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from reidreg.model.restore import load_weights
from reidreg.training.announce import announce, describe_step
from reidreg.training.batch_size import with_batch_size
from reidreg.training.initial_weights import start_weights
from reidreg.training.optimizers import set_learning_rate
from reidreg.training.preflight import preflight
from reidreg.training.profiling import Profile, ProfileBarrier
from reidreg.training.resuming import check_resume
from reidreg.training.run import Run, build_run
from reidreg.training.runfolder import RunFolder
from reidreg.training.signals import StopSignals
from reidreg.training.state import capture, restore
from reidreg.values import Batch


def fit(config: Config, resume: str | None = None, profile: int = 0) -> dict[str, Any]:
    """Train a model, and evaluate it during training and at the end.

    With `validation.identities` the evaluations use held-out training identities, and the best
    model of the run is evaluated on query and gallery at the end.

    Args:
        config: The configuration, from `load_config`.
        resume: `auto` resumes from the newest checkpoint in `output_dir`, if there is one; a path
            resumes from that file; None starts a new run and moves an earlier run's files aside.
        profile: The number of steps to time, and to record in `output_dir`/profile; 0 for none.

    Returns:
        The last evaluation's figures, fractions 0..1.

    Raises:
        ReidregError: An error that the user can fix; see its subclasses.
        DivergedError: The loss or a gradient is not finite.
        InterruptedRun: SIGINT or SIGTERM was received, and the state is saved.
    """
    if profile < 0:
        raise ConfigError(f"--profile: {profile} is not a number of steps; 0 turns it off")
    device = choose_device(config.train.device)
    folder = RunFolder(Path(config.output_dir).expanduser())
    with (
        StopSignals() as signals,
        joined(device, config.train.rank_timeout) as processes,
        folder.held() if processes.is_main else log_silenced(),
    ):
        # Without a resume, the checkpoints in the folder belong to an earlier run.
        with signals.immediate(folder.saved() if resume is not None else None):
            run, source = start(folder, config, resume)
        if processes.is_main:
            begin_files(folder, run.config, new_run=source is None)
        with signals.immediate(folder.saved()), main_first():
            run.loader.prepare()
        announce(run)
        metrics = open_metrics(run, folder)
        listener = step_listener(profile, folder, device)
        exit_code = 1
        try:
            train(run, folder, metrics, signals, listener)
            exit_code = 0
        except torch.OutOfMemoryError as error:
            raise DeviceError(describe_shortage(device)) from error
        finally:
            listener.close()
            metrics.close(exit_code)
        return run.progress.metrics


def step_listener(profile: int, folder: RunFolder, device: torch.device) -> StepListener:
    """What times the steps of this process: nothing, unless a profile is asked for."""
    if not profile:
        return NO_LISTENER
    if not world().is_main:
        return ProfileBarrier(profile)
    return Profile(profile, folder.profile, device)


def start(folder: RunFolder, config: Config, resume: str | None) -> tuple[Run, Path | None]:
    """Build a run up to its first step; returns it with the file that it resumes from, if any.

    It writes only a marker into the folder, so it can be interrupted at any moment.
    """
    # Before anything slow: a wrong path or a forbidden change is an error at once.
    source, checkpoint = broadcast(
        first_checkpoint(folder, config, resume) if world().is_main else (None, None)
    )
    resumed = checkpoint if source is not None else None
    config = with_batch_size(config, resumed)
    if resumed is not None:
        for change in check_resume(resumed.config, resumed.training, config):
            logger.info("changed on resume: %s", change)
    run = build_run(config)
    if resumed is not None:
        restore(run, resumed)
        logger.info("resumed from %s at step %d", source, run.progress.step)
    else:
        start_weights(run, checkpoint)
    if config.train.preflight:
        preflight(run)
    return run, source


def first_checkpoint(
    folder: RunFolder, config: Config, resume: str | None
) -> tuple[Path | None, Checkpoint | None]:
    """The file to resume from, if any, with its checkpoint, or else that of `init_from`, if any."""
    if world_from_env().restarts and folder.begun():
        resume = "auto"  # the launcher has restarted this run
    resumed = folder.open_resumable(resume)
    folder.mark_begun(resumed is not None)
    if resumed is not None:
        return resumed
    return None, load_checkpoint(config.init_from) if config.init_from else None


def begin_files(folder: RunFolder, config: Config, new_run: bool) -> None:
    """Write the configuration; for a new run, first move the files of an earlier one aside."""
    aside = folder.set_earlier_run_aside() if new_run else None
    if aside is not None:
        logger.info("files of an earlier run are now in %s", aside)
    folder.mark_begun(True)
    folder.write_config(config)


def open_metrics(run: Run, folder: RunFolder) -> MetricsLog:
    """The log of the run's figures; only rank 0 writes any."""
    if not world().is_main:
        return MetricsLog(None)
    return MetricsLog(
        folder.metrics_log,
        run.progress.step,
        start_wandb(run.config, folder.root),
        to_come=[
            *(["val"] if evaluation_due(run) else []),
            *(["test"] if test_due(run) else []),
        ],
    )


# --------------------------------------------------------------------- the loop


def train(
    run: Run, folder: RunFolder, metrics: MetricsLog, signals: StopSignals, listener: StepListener
) -> None:
    """Train the remaining epochs, with the evaluations and checkpoints between them."""
    run.forward.set_listener(listener)
    config, progress = run.config.train, run.progress
    signals.obey(folder.saved())  # a signal from before now does not wait for a step
    if config.eval_untrained and progress.step == 0:
        evaluate_epoch(run, folder, metrics, signals)
    while progress.epoch < config.epochs or evaluation_due(run):
        # After a resume, an evaluation that was interrupted comes first.
        if not evaluation_due(run):
            try:
                with loading_processes():
                    train_epoch(run, folder, metrics, signals, listener)
            except DataError:
                # Some schedulers send the signal to the loading processes too. The current step
                # may be half done then, so nothing is saved now.
                if signals.received is not None:
                    raise InterruptedRun(signals.received, folder.saved()) from None
                raise
            save_last(run, folder)
        if evaluation_due(run):
            evaluate_epoch(run, folder, metrics, signals)
            save_last(run, folder)
        if progress.epoch % config.checkpoint_every == 0:
            kept = folder.at_epoch(progress.epoch)
            save(run, kept)
            logger.info("saved %s", kept)
    if test_due(run):
        evaluate_best(run, folder, metrics, signals)
        save_last(run, folder)


def train_epoch(
    run: Run, folder: RunFolder, metrics: MetricsLog, signals: StopSignals, listener: StepListener
) -> None:
    """Train the rest of the current epoch."""
    config, progress, meter = run.config.train, run.progress, run.meter
    set_learning_rate(run.optimizer, run.schedule.factor(progress.epoch + 1))
    run.model.train()
    run.freezer.begin(progress.epoch)
    run.forward.begin()
    steps = len(run.sampler)
    with ProgressBar(f"epoch {progress.epoch + 1}/{config.epochs}", steps) as bar:
        bar.report(progress.batch, steps)
        meter.resume_clock()
        batches = run.loader.epoch(progress.epoch, start=progress.batch, listener=listener)
        listener.begin(DATA)
        for batch in meter.watching(start_together(batches)):
            train_step(run, batch, listener)
            listener.begin("other")

            # -------------------- once in a while --------------------
            if progress.batch % config.log_every == 0 or progress.batch == steps:
                run.divergence.check()
                figures = meter.take(run.optimizer.param_groups[0]["lr"], run.embedder.device)
                figures = {"step": progress.step, "epoch": progress.epoch + 1, **figures}
                metrics.write(figures)
                logger.info("%s", describe_step(figures, progress.batch, steps, config.epochs))
                bar.advance(0, meter.short)
            bar.advance()
            if progress.batch < steps:
                stop_if_asked(run, folder, signals)
            listener.end_step()
    listener.end_epoch()
    progress.epoch += 1
    progress.batch = 0
    stop_if_asked(run, folder, signals, at_once=True)


def train_step(run: Run, batch: Batch, listener: StepListener = NO_LISTENER) -> None:
    """Make a step with a batch, which is on the device.

    The host does not wait for the device here, except with a gradient scaler whose optimizer has no
    fused kernel, and with some of timm's optimizers.
    """
    parts = run.config.train.accumulate
    run.optimizer.zero_grad()
    run.objective.zero_grad()
    for number, part in enumerate(parts_of(batch, parts), start=1):
        with run.forward.averaging(now=number == parts):
            loss, terms, logits = run.forward(part)  # it begins the phases forward and loss
            listener.begin("backward")
            run.scaler.scale(loss / parts).backward()  # type: ignore[no-untyped-call]
        listener.begin("other")
        run.meter.add(loss, terms, logits, part.pids)

    listener.begin("optimizer")
    trained = [parameter for parameter in run.parameters if parameter.grad is not None]
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
    # A scaler skips steps that are not finite, and lowers its scale.
    watched = None if run.scaler.is_enabled() else norm
    run.divergence.watch(run.progress.step + 1, loss, watched, terms)
    clip = run.config.optimizer.clip_norm
    if clip is not None:
        nn.utils.clip_grads_with_norm_(trained, clip, norm, foreach=True)
    run.scaler.step(run.optimizer)
    run.objective.step(run.scaler)
    run.scaler.update()
    run.progress.batch += 1
    run.progress.step += 1
    if run.ema is not None:
        run.ema.update(run.model, run.progress.step)


def parts_of(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch in parts of equal size, in order."""
    size = len(batch.pids) // count
    for start in range(0, len(batch.pids), size):
        part = slice(start, start + size)
        yield Batch(batch.images[part], batch.pids[part], batch.camids[part])


def stop_if_asked(run: Run, folder: RunFolder, signals: StopSignals, at_once: bool = False) -> None:
    """Save and raise InterruptedRun between two steps, if any process received a signal."""
    received = signals.agreed(at_once)
    if received is not None:
        run.divergence.check()
        save_last(run, folder)
        raise InterruptedRun(received, str(folder.last))


def save(run: Run, path: Path) -> None:
    """Write the weights from rank 0; the other ranks wait for it."""
    checkpoint = capture(run, resumable=False)
    if world().is_main:
        save_checkpoint(checkpoint, path)
    wait()


def save_last(run: Run, folder: RunFolder) -> None:
    """As `save`, with everything that a resume needs."""
    checkpoint = capture(run)
    if world().is_main:
        folder.save_last(checkpoint)
    wait()


def evaluation_due(run: Run) -> bool:
    """Whether the epoch that has just ended is to be evaluated and has not been."""
    epoch, config = run.progress.epoch, run.config.train
    at_epoch = epoch > 0 and (epoch % config.eval_every == 0 or epoch == config.epochs)
    return at_epoch and run.progress.batch == 0 and run.progress.evaluated != epoch


def evaluate_epoch(run: Run, folder: RunFolder, metrics: MetricsLog, signals: StopSignals) -> None:
    """Evaluate the current model, and save it as `best` if its mAP is the highest so far."""
    progress = run.progress
    # The running statistics of each process are those of its own share of the batches.
    broadcast_state(run.embedder.model)
    with signals.immediate(folder.saved()):
        figures, _, _ = evaluate_dataset(run.embedder, run.evaluator, run.validation)
        if run.validation is not run.dataset:
            figures = {**figures, "evaluated": "validation"}
    progress.metrics, progress.evaluated = figures, progress.epoch
    write_figures(folder, figures)
    metrics.write({"step": progress.step, "epoch": progress.epoch, **log_figures("val", figures)})
    logger.info("%s", describe_evaluation(figures, progress.epoch))
    if progress.epoch > 0 and figures["mAP"] > progress.best:
        progress.best = figures["mAP"]
        metrics.summarise({f"best/{key}": figures[key] for key in ("mAP", "mINP", "rank1")})
        save(run, folder.best)
        logger.info("saved %s (best mAP so far)", folder.best)


def test_due(run: Run) -> bool:
    """Whether identities were held out, and query and gallery are not evaluated yet."""
    progress = run.progress
    return run.validation is not run.dataset and progress.tested != progress.epoch


def evaluate_best(run: Run, folder: RunFolder, metrics: MetricsLog, signals: StopSignals) -> None:
    """Evaluate the best model on query and gallery, once, at the end of the run."""
    progress = run.progress
    with signals.immediate(folder.saved()):
        checkpoint = broadcast(best_checkpoint(folder) if world().is_main else None)
        assert checkpoint is not None
        # A copy: the run may be resumed with its own model, and building another one would draw
        # random numbers.
        model = copy.deepcopy(run.embedder.model)
        load_weights(model, checkpoint.model)
        embedder = replace(run.embedder, model=model)
        figures, _, _ = evaluate_dataset(embedder, run.evaluator, run.dataset)
    logged = log_figures("test", figures)
    figures = {**figures, "evaluated": "test", "validation": checkpoint.metrics}
    progress.metrics, progress.tested = figures, progress.epoch
    write_figures(folder, figures)
    metrics.write({"step": progress.step, "epoch": progress.epoch, **logged})
    logger.info("%s", describe_evaluation(figures, checkpoint.epoch, "test of the best model"))


def best_checkpoint(folder: RunFolder) -> Checkpoint:
    """The best checkpoint of a finished run."""
    # A run that was resumed from another folder may never have been better than there.
    return load_checkpoint(folder.best if folder.best.exists() else folder.last)


def write_figures(folder: RunFolder, figures: dict[str, Any]) -> None:
    """Write the last evaluation's figures, from rank 0."""
    if world().is_main:
        write_metrics(figures, folder.metrics)
