"""Train a VAE on digits, arrays, .h5ad files, folders of images, or .tar files of images.

Writes to the run's directory a checkpoint (checkpoint.pt), the metrics of each epoch (metrics.csv), and
pictures: held-out samples beside their reconstructions, samples of the prior, a walk along each latent
variable, the latent space, and the training curve. Ctrl-C leaves a checkpoint, and --resume goes on from it
as if nothing had happened; in Python, fusedvae.VAE.from_pretrained(DIR) is the trained model. All losses
are in nats per sample: loss = NLL + beta * KL is, for beta 1, the negative evidence lower bound.

With several processes (torchrun --nproc-per-node N -m fusedvae train ...) each computes its part of every batch,
on a GPU of its own where there are some, and the curve is that of one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import shlex
import signal
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ... import functional
from ...backend import resolve, use_backend
from .. import checkpoint, pictures
from ..data import DIGITS, Data, Preparation, prepare
from ..errors import CommandError, require
from ..files import only_writer, write_atomically
from ..interruption import Interruption
from ..options import usable_device
from ..processes import Alone, joined, noticing_losses
from ..settings import Settings
from ..trainer import METRICS, MODEL_FILES, Row, Trainer
from . import evaluation, loggers, options
from .report import Progress, print_end, print_summary

RUNS = Path("runs")
"""Where runs go that --out does not place."""

RUN_FILES = (checkpoint.CHECKPOINT, METRICS, evaluation.EVALUATION, options.OPTIONS, *MODEL_FILES, *pictures.PICTURES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--out", type=options.directory, metavar="DIR", help="directory of the run (default: a new one under runs/)"
    )
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run that is in --out, which is otherwise refused",
    )
    run.add_argument(
        "--resume", type=options.directory, metavar="DIR", help="go on with the run in DIR, with its own settings"
    )
    run.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"options in YAML or JSON, as a run leaves them in {options.OPTIONS}; "
        "options on the command line override it",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar, no line an epoch")
    options.add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.quiet:
        require("tqdm")
    require("matplotlib.figure")
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings) if hasattr(arguments, field.name)}
    if arguments.config is not None:
        given = {**options.read(arguments.config), **given}
    with ExitStack() as stack:
        group = joined(given.get("device", "auto"))
        stack.callback(group.close)
        stack.enter_context(noticing_losses(group))
        if not group.is_first:
            stack.enter_context(redirect_stdout(io.StringIO()))
        trainer, directory = _begun(arguments, given, group, stack)
        return _train(trainer, directory, group, quiet=arguments.quiet)


def _begun(
    arguments: argparse.Namespace, given: dict[str, Any], group: Alone, stack: ExitStack
) -> tuple[Trainer, Path]:
    """A run and its directory, new or to go on with: everything that bad input can stop. What must be undone at the
    end is put on ``stack``."""
    threads = torch.get_num_threads()
    stack.callback(torch.set_num_threads, threads)
    state = None
    with group.together():
        if arguments.resume is None:
            settings = Settings(**given)
        else:
            checkpoint.check_there_is_one(arguments.resume)
            if group.is_first:
                stack.enter_context(only_writer(arguments.resume))
            state = checkpoint.load(arguments.resume)
            settings = _continued(state, given, arguments, group)
        settings = _on_this_machine(settings, group)
        loggers.check(settings)
        torch.set_num_threads(settings.threads or threads)
        stack.enter_context(_chosen_backend(settings))
        data = _data(settings, state, arguments)
    # By absolute paths the data are found again from wherever the run goes on.
    found: dict[str, Any] = {name: _absolute(getattr(settings, name)) for name in ("data", "test_data")}
    trainer = _new_trainer(dataclasses.replace(settings, **found), data, group)
    directory = arguments.resume
    with group.together():
        if group.is_first and state is None:
            directory = _new_directory(arguments, settings)
            stack.enter_context(only_writer(directory))
            _clear(directory, arguments.overwrite)
    directory = group.shared(directory)
    if state is not None:
        _refuse_among_images(directory, settings)
        with checkpoint.reading(directory):
            trainer.restore(state)
    return trainer, directory


def _data(settings: Settings, state: dict[str, Any] | None, arguments: argparse.Namespace) -> Data:
    if state is None:
        return prepare(settings)
    for name in ("data", "test_data"):
        source = getattr(settings, name)
        if source in (None, DIGITS) or hasattr(arguments, name) or "{" in source or Path(source).exists():
            continue
        raise CommandError(f"no such data: {source}: if they have moved, say where: {options.option_name(name)} SOURCE")
    with checkpoint.reading(arguments.resume):
        preparation = Preparation.from_record(state["preparation"])
    return prepare(settings, preparation)


def _absolute(source: str | None) -> str | None:
    return source if source is None or source == DIGITS else str(Path(source).absolute())


def _new_trainer(settings: Settings, data: Data, group: Alone) -> Trainer:
    try:
        return Trainer(settings, data, group)
    except (RuntimeError, MemoryError) as error:
        width = "" if settings.width is None else f" and --width {settings.width}"
        raise CommandError(f"cannot make a model of --latent {settings.latent}{width}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _continued(state: dict[str, Any], given: dict[str, Any], arguments: argparse.Namespace, group: Alone) -> Settings:
    """The settings of the checkpointed run with those replaced that may be."""
    if arguments.out is not None or arguments.overwrite:
        raise CommandError("--resume goes on in the run's own directory: it takes neither --out nor --overwrite")
    with checkpoint.reading(arguments.resume):
        settings = options.checked(state["settings"])
        if group.size == 1:  # which has all of the weights
            settings = dataclasses.replace(settings, fsdp=False)
        done = state["epoch"] + (state["step"] > 0)
    for name, value in given.items():
        if name not in options.CHANGEABLE and value != getattr(settings, name):
            raise CommandError(
                f"{options.option_name(name)} {value} differs from the run's own {getattr(settings, name)}: with "
                f"--resume only {', '.join(map(options.option_name, options.CHANGEABLE))} can change"
            )
    if given.get("epochs", done) < done:
        raise CommandError(f"--epochs {given['epochs']}: the run is in epoch {done} already")
    return dataclasses.replace(settings, **given)


def _on_this_machine(settings: Settings, group: Alone) -> Settings:
    """Settings with what "auto" stands for here: a run that goes on elsewhere goes on alike."""
    if settings.fsdp and group.size == 1:
        raise CommandError("--fsdp is for several processes: torchrun --nproc-per-node N -m fusedvae train ...")
    name = usable_device(settings.device if group.size == 1 else settings.device.partition(":")[0])
    return dataclasses.replace(settings, device=name, threads=settings.threads or torch.get_num_threads())


def _chosen_backend(settings: Settings) -> AbstractContextManager[object]:
    chosen = None if settings.backend == "auto" else settings.backend
    try:
        resolve(torch.device(settings.device).type, chosen)
        if torch.device(settings.device).type == "cpu":  # a wrong FUSEDVAE_CPU_ISA shows when a kernel runs
            zero = torch.zeros(1, 1)
            functional.reparameterize(zero, zero, noise=zero, backend=chosen)
    except (RuntimeError, ValueError) as error:  # a ValueError is about the name in FUSEDVAE_BACKEND
        raise CommandError(f"--backend {settings.backend}: {error}") from error
    return nullcontext() if chosen is None else use_backend(chosen)


def _refuse_among_images(directory: Path, settings: Settings) -> None:
    """A run in the folder of its own data would find its pictures there when it goes on."""
    for source in (settings.data, settings.test_data):
        if source is None or source == DIGITS or not Path(source).is_dir():
            continue
        if directory.resolve().is_relative_to(Path(source).resolve()):
            raise CommandError(f"{directory} is in {source}, the folder of images to learn: choose another --out")


def _new_directory(arguments: argparse.Namespace, settings: Settings) -> Path:
    """Make the run's directory. Comes after everything that bad input can stop, so that an earlier run is removed,
    where that was asked for, only when there is something to put in its place."""
    if arguments.out is None:
        if arguments.overwrite:
            raise CommandError("--overwrite needs --out, the run to replace")
        number = 1
        while True:
            directory = RUNS / f"{Path(settings.data).stem}-{number:03d}"
            _refuse_among_images(directory, settings)
            try:
                directory.mkdir(parents=True)
                return directory
            except FileExistsError:
                number += 1
            except OSError as error:
                raise CommandError(f"cannot make {directory}: {error}") from error
    directory = arguments.out
    _refuse_among_images(directory, settings)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot use {directory}: {error}") from error
    return directory


def _clear(directory: Path, overwrite: bool) -> None:
    """Remove an earlier run's files, where that was asked for."""
    try:
        found = [name for name in RUN_FILES if (directory / name).exists()]
        if found and not overwrite:
            raise CommandError(
                f"{directory} holds a run ({', '.join(found[:2])}): --resume {directory} goes on with it, "
                "--overwrite replaces it, another --out leaves it alone"
            )
        for path in [
            *(directory / name for name in found),
            *(directory / loggers.EVENTS).glob("events.out.tfevents.*"),
        ]:
            path.unlink()
    except OSError as error:
        raise CommandError(f"cannot use {directory}: {error}") from error


def _train(trainer: Trainer, directory: Path, group: Alone, *, quiet: bool) -> int:
    settings = trainer.settings
    print_summary(trainer, directory)
    trainer.save(directory)  # from here on --resume works
    group.to_go_on = f"; the last checkpoint is whole, to go on: {_resuming(directory)}"
    # A run that is at its end is evaluated anew, and its last epoch logged anew with that.
    again = trainer.history[-1:] if trainer.epoch == trainer.epochs else []
    log = loggers.logger(
        settings if group.is_first else dataclasses.replace(settings, logger="none"),
        directory,
        trainer.epoch - len(again),
    )
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        stack.enter_context(noticing_losses(group))  # here, too: between the two, a signal would end it without a word
        stack.callback(log.close)
        with group.together():
            if group.is_first:
                text = options.text_of(settings).encode()
                write_atomically(directory / options.OPTIONS, lambda file: file.write(text))
        progress = stack.enter_context(Progress(trainer, quiet=quiet or not group.is_first))
        evaluations = evaluation.Evaluations(trainer, directory)

        def logged(row: Row) -> None:
            log.log(trainer.epoch, {name: value for name, value in row.items() if name != "epoch"})

        def evaluate() -> Row:
            row = evaluations.take()
            logged(row)
            return row

        def after_epoch(row: Row) -> None:
            progress.after_epoch(row)
            logged(row)
            if evaluations.is_due():
                row = evaluate()
                progress.say(f"  {evaluation.line(row, settings)}" if row else "")

        for last in again:
            logged(last)
        finished = trainer.run(
            directory, interruption=interruption, after_step=progress.after_step, after_epoch=after_epoch
        )
        progress.close()
        row: Row = {}
        if finished:
            row = evaluate()
            trainer.save(directory)  # with that
        trainer.gather_model()
        trainer.leave_group()
        if group.is_first:  # the others are done
            trainer.save_model(directory)
            print(f"drawing pictures in {directory}", flush=True)
            pictures.draw(trainer, directory)
            if finished:
                print_end(trainer, evaluation.line(row, settings))
    if finished:
        return 0
    print(f"interrupted {_position(trainer)}; to go on: {_resuming(directory)}")
    return 143 if interruption.signal == signal.SIGTERM else 130


def _position(trainer: Trainer) -> str:
    if trainer.epoch == trainer.epochs:
        return "after the last epoch"
    return f"in epoch {trainer.epoch + 1}, after {trainer.step} of {trainer.steps_per_epoch} steps"


def _resuming(directory: Path) -> str:
    return f"fusedvae train --resume {shlex.quote(str(directory))}"
