"""Train a VAE on digits, on an array, or on a folder of images.

Writes to the run's directory a checkpoint (checkpoint.pt), the metrics of each epoch (metrics.csv), and
pictures: held-out samples beside their reconstructions, samples of the prior, a walk along each latent
variable, the latent space, and the training curve. Ctrl-C leaves a checkpoint, and --resume goes on from it
as if nothing had happened; in Python, fusedvae.cli.trainer.load_model(DIR) is the trained model. All losses
are in nats per sample: loss = NLL + beta * KL is, for beta 1, the negative evidence lower bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import signal
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..backend import NAMES, resolve, use_backend
from . import checkpoint, pictures
from .data import DIGITS, Data, Preparation, Samples, prepare
from .errors import CommandError, require
from .files import only_writer
from .options import MOST_THREADS, integer, number, usable_device
from .settings import ARCHITECTURES, DTYPES, LEARNED, PER_PIXEL, Settings
from .timing import step_times, waiting_processes
from .trainer import METRICS, Interruption, Row, Trainer

RUNS = Path("runs")
"""Where runs go that --out does not place."""

RUN_FILES = (checkpoint.CHECKPOINT, METRICS, *pictures.PICTURES)

MOST_UNITS, MOST_PIXELS, MOST_WORKERS = 2**24, 2**13, 1024
"""More are slips of the keyboard."""

CHANGEABLE = ("data", "array", "test_data", "epochs", "device", "threads", "workers", "backend")
"""Options that may be given again with --resume. The data may have moved, but not changed."""


def _directory(text: str) -> Path:
    if not text:  # what "$OUT" is where OUT is not set
        raise argparse.ArgumentTypeError("expected the name of a directory, got ''")
    return Path(text)


def _image_shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(map(int, text.split(",")))
    except ValueError:
        sizes = ()
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected H,W or C,H,W, got {text!r}")
    return sizes


def _recon_logvar(text: str) -> str | float:
    if text in (PER_PIXEL, LEARNED):
        return text
    try:
        return number(-math.inf)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected '{PER_PIXEL}', '{LEARNED}' or a number, got {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = {field.name: field.default for field in fields(Settings)}

    def option(group: Any, name: str, help: str, **kind: Any) -> None:
        # Absent options stay absent from the namespace: --resume must know what was asked for.
        default = defaults[name.lstrip("-").replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(name, help=help + shown, default=argparse.SUPPRESS, **kind)

    run = parser.add_argument_group("the run")
    run.add_argument(
        "--out", type=_directory, metavar="DIR", help="directory of the run (default: a new one under runs/)"
    )
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run that is in --out, which is otherwise refused",
    )
    run.add_argument(
        "--resume", type=_directory, metavar="DIR", help="go on with the run in DIR, with its own settings"
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar, no line an epoch")

    data = parser.add_argument_group("data")
    option(
        data,
        "--data",
        f"'{DIGITS}', an .npy, .npz or .h5ad file, a folder of images, or .tar files of these as WebDataset writes "
        "them ({000..099} stands for numbers); a line of output says how the values are scaled to [0, 1]",
        metavar="SOURCE",
    )
    option(data, "--test-data", "data to measure on, in the place of a part of --data", metavar="SOURCE")
    option(data, "--array", "which array of an .npz file that holds several", metavar="NAME")
    option(
        data,
        "--image-size",
        "resize and crop image files to this side",
        type=integer(1, MOST_PIXELS),
        metavar="PIXELS",
    )
    option(
        data,
        "--image-shape",
        "the images that the rows of an array are: H,W or C,H,W",
        type=_image_shape,
        metavar="SIZES",
    )
    option(
        data,
        "--channels",
        "where an array of images has its channels: (samples, channels, height, width) or (samples, height, width, "
        "channels); by default recognised where there are 1, 3 or 4",
        choices=("first", "last"),
    )
    option(
        data,
        "--heldout",
        "part of the samples not trained on; the same ones for every seed",
        type=number(0, 1, exclusive=True),
        metavar="FRACTION",
    )

    model = parser.add_argument_group("model")
    option(model, "--arch", "networks; auto: conv for images, mlp for vectors", choices=ARCHITECTURES)
    option(model, "--latent", "number of latent variables", type=integer(1, MOST_UNITS), metavar="N")
    option(
        model,
        "--width",
        "channels at full resolution (conv, default 32) or units of the first layer (mlp, default 512)",
        type=integer(1, MOST_UNITS),
        metavar="N",
    )
    option(
        model,
        "--recon-logvar",
        f"log-variance of the likelihood: '{PER_PIXEL}', from the decoder; '{LEARNED}', one learned number; "
        "or a number that stays",
        type=_recon_logvar,
        metavar="WHAT",
    )
    option(
        model,
        "--logvar-floor",
        f"lower bound of a {PER_PIXEL} log-variance: lower gives a better bound, higher better samples",
        type=number(-math.inf),
        metavar="X",
    )

    training = parser.add_argument_group("training")
    option(training, "--beta", "weight of the KL", type=number(0), metavar="X")
    option(
        training,
        "--warmup",
        "epochs over which beta grows from 0 to its value",
        type=number(0),
        metavar="EPOCHS",
    )
    option(training, "--epochs", "times to go through the data", type=integer(1), metavar="N")
    option(training, "--batch", "samples a step", type=integer(1), metavar="N")
    option(training, "--lr", "learning rate of AdamW", type=number(0, exclusive=True), metavar="X")
    option(
        training,
        "--seed",
        "of the initial weights, the order of the data and the noise",
        type=integer(0, 2**32 - 1),
        metavar="N",
    )

    machine = parser.add_argument_group("machine")
    option(
        machine,
        "--dtype",
        "bfloat16 is mixed precision: networks under torch.autocast, parameters in float32",
        choices=DTYPES,
    )
    option(machine, "--device", "cpu, cuda, cuda:1, ...; auto: cuda where there is one", metavar="NAME")
    option(
        machine,
        "--threads",
        "CPU threads; with --resume, those of before",
        type=integer(1, MOST_THREADS),
        metavar="N",
    )
    option(
        machine,
        "--workers",
        "processes that read the data; by default none, or for image files too many to hold in memory one a CPU",
        type=integer(0, MOST_WORKERS),
        metavar="N",
    )
    option(
        machine,
        "--backend",
        "what computes sampling and loss; auto: what FUSEDVAE_BACKEND says, else the best that serves the device",
        choices=("auto", *NAMES),
    )


def checked(values: dict[str, Any]) -> Settings:
    """Settings of these values, each of which must be one that its option takes.

    Raises:
        ValueError, TypeError: it is not, or there is no such option.
    """
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_arguments(parser)
    settings = Settings(**values)
    words = [f"{_option_name(name)}={value}" for name, value in values.items() if value is not None]
    try:
        parsed = parser.parse_args(words)
    except (argparse.ArgumentError, CommandError) as error:
        raise ValueError(str(error)) from error
    if any(getattr(parsed, name) != value for name, value in values.items() if value is not None):
        raise ValueError("a setting of another kind than its option's")
    return settings


def run(arguments: argparse.Namespace) -> int:
    if not arguments.quiet:
        require("tqdm")
    require("matplotlib.figure")
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings) if hasattr(arguments, field.name)}
    with ExitStack() as stack:
        state = None
        if arguments.resume is None:
            settings = Settings(**given)
        else:
            checkpoint.check_there_is_one(arguments.resume)
            stack.enter_context(only_writer(arguments.resume))
            state = checkpoint.load(arguments.resume)
            settings = _continued(state, given, arguments)
        settings = _on_this_machine(settings)
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        stack.enter_context(_chosen_backend(settings))
        preparation = None
        if state is not None:
            with checkpoint.reading(arguments.resume):
                preparation = Preparation.from_record(state["preparation"])
        data = prepare(settings, preparation)
        # By absolute paths the data are found again from wherever the run goes on.
        test_data = None if settings.test_data is None else _absolute(settings.test_data)
        absolute = dataclasses.replace(settings, data=_absolute(settings.data), test_data=test_data)
        trainer = _new_trainer(absolute, data)
        if state is None:
            directory = _new_directory(arguments, settings)
            stack.enter_context(only_writer(directory))
            _clear(directory, arguments.overwrite)
        else:
            directory = arguments.resume
            _refuse_among_images(directory, settings)
            with checkpoint.reading(directory):
                trainer.restore(state)
        return _train(trainer, directory, quiet=arguments.quiet)


def _absolute(source: str) -> str:
    return source if source == DIGITS else str(Path(source).absolute())


def _new_trainer(settings: Settings, data: Data) -> Trainer:
    try:
        return Trainer(settings, data)
    except (RuntimeError, MemoryError) as error:
        width = "" if settings.width is None else f" and --width {settings.width}"
        raise CommandError(f"cannot make a model of --latent {settings.latent}{width}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def _continued(state: dict, given: dict[str, Any], arguments: argparse.Namespace) -> Settings:
    """The settings of the checkpointed run with those replaced that may be."""
    if arguments.out is not None or arguments.overwrite:
        raise CommandError("--resume goes on in the run's own directory: it takes neither --out nor --overwrite")
    with checkpoint.reading(arguments.resume):
        settings = checked(state["settings"])
        done = state["epoch"] + (state["step"] > 0)
    for name, value in given.items():
        if name not in CHANGEABLE and value != getattr(settings, name):
            raise CommandError(
                f"{_option_name(name)} {value} differs from the run's own {getattr(settings, name)}: with "
                f"--resume only {', '.join(map(_option_name, CHANGEABLE))} can change"
            )
    if given.get("epochs", done) < done:
        raise CommandError(f"--epochs {given['epochs']}: the run is in epoch {done} already")
    return dataclasses.replace(settings, **given)


def _on_this_machine(settings: Settings) -> Settings:
    """Settings with what "auto" stands for here: a run that goes on elsewhere goes on alike."""
    name = usable_device(settings.device)
    return dataclasses.replace(settings, device=name, threads=settings.threads or torch.get_num_threads())


def _chosen_backend(settings: Settings) -> AbstractContextManager[object]:
    chosen = None if settings.backend == "auto" else settings.backend
    try:
        resolve(torch.device(settings.device).type, chosen)
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
                f"{directory} holds a run ({', '.join(found)}): --resume {directory} goes on with it, "
                "--overwrite replaces it, another --out leaves it alone"
            )
        for name in found:
            (directory / name).unlink()
    except OSError as error:
        raise CommandError(f"cannot use {directory}: {error}") from error


def _train(trainer: Trainer, directory: Path, *, quiet: bool) -> int:
    settings = trainer.settings
    _print_summary(trainer, directory)
    bar = None
    if not quiet:
        total = settings.epochs * trainer.steps_per_epoch
        done = trainer.epoch * trainer.steps_per_epoch + trainer.step
        bar = require("tqdm").tqdm(total=total, initial=done, unit="step", disable=None, leave=False)

    def after_step() -> None:
        if bar is not None:
            bar.update()

    def after_epoch(row: Row) -> None:
        if bar is not None:
            bar.write(_epoch_line(row, settings.epochs), file=sys.stdout)

    trainer.save(directory)  # from here on --resume works
    with Interruption() as interruption:
        try:
            finished = trainer.run(directory, interruption=interruption, after_step=after_step, after_epoch=after_epoch)
        finally:
            if bar is not None:
                bar.close()
    if not finished:
        where = f"in epoch {trainer.epoch + 1}, after {trainer.step} of {trainer.steps_per_epoch} steps"
        if trainer.epoch == settings.epochs:
            where = "after the last epoch, before the pictures"
        print(f"interrupted {where}; to go on: fusedvae train --resume {shlex.quote(str(directory))}")
        return 143 if interruption.signal == signal.SIGTERM else 130
    print(f"drawing pictures in {directory}", flush=True)
    pictures.draw(trainer, directory)
    _print_end(trainer)
    return 0


def _print_summary(trainer: Trainer, directory: Path) -> None:
    settings = trainer.settings
    print(f"data: {trainer.data.description}")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{len(trainer.train_samples)} samples of {'x'.join(map(str, trainer.shape))} to train on, "
        f"{len(trainer.heldout_samples)} held out; {parameters:,} parameters; "
        f"{settings.device}, {settings.threads} threads, {settings.dtype}, "
        f"{resolve(trainer.device.type)} backend; writing to {directory}",
        flush=True,
    )


def _epoch_line(row: Row, epochs: int) -> str:
    def terms(part: str) -> str:
        return f"{row[f'{part}_loss']:8.2f} (NLL {row[f'{part}_nll']:8.2f}, KL {row[f'{part}_kl']:6.2f})"

    count = f"{row['epoch']:{len(str(epochs))}d}/{epochs}"
    return f"epoch {count}  train {terms('train')}  held-out {terms('heldout')}"


def _print_end(trainer: Trainer) -> None:
    last = trainer.history[-1]
    print(
        f"held-out samples after epoch {last['epoch']}: loss {last['heldout_loss']:.2f}, "
        f"NLL {last['heldout_nll']:.2f}, KL {last['heldout_kl']:.2f} nats per sample"
    )
    batch = _first_batch(trainer.train_samples, trainer)
    times = step_times(trainer.model, batch, trainer.settings)
    if times is None:
        print("a step takes what the reference takes: no fused kernels are in use (see fusedvae info)")
        return
    busy = "; the machine is busy with other work, so they say little" if waiting_processes() >= 1 else ""
    print(f"medians of interleaved runs, with the fused kernels and with the reference in plain PyTorch{busy}:")
    print(f"a training step of {len(batch)} samples: {times.step}")
    print(f"of it sampling, KL and NLL, forward and backward: {times.objective}")


def _first_batch(samples: Samples, trainer: Trainer) -> torch.Tensor:
    settings = trainer.settings
    return samples.batch(slice(settings.batch), device=trainer.device, dtype=settings.data_dtype)
