"""The options of ``fusedvae train``: on the command line, in files, and in checkpoints from strangers."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from ...backend import NAMES
from ..data import DIGITS
from ..errors import CommandError, require
from ..options import MOST_THREADS, integer, number
from ..settings import (
    ARCHITECTURES,
    BETA_SCHEDULES,
    BOUNDS,
    CONDITIONS,
    CONV_WIDTH,
    DTYPES,
    EPOCHS,
    LEARNED,
    LEAST_CONV_WIDTH,
    LIKELIHOODS,
    LOGGERS,
    LR_SCHEDULES,
    MLP_WIDTH,
    PER_PIXEL,
    RECON_SCALES,
    SCALES,
    SMALL,
    Settings,
)

OPTIONS = "options.json"
"""Every option of a run as it was used, for ``--config``."""

MOST_UNITS, MOST_PIXELS, MOST_WORKERS, MOST_SAMPLES = 2**24, 2**13, 1024, 2**20
"""Numbers beyond these are slips of the keyboard, and end processes in ways that no message comes from."""

CHANGEABLE = (
    "data",
    "array",
    "test_data",
    "epochs",
    "evaluate_every",
    "evaluate_samples",
    "logger",
    "grad_accum",
    "device",
    "threads",
    "workers",
    "backend",
    "compile",
    "fsdp",
)
"""Options that may be given again with --resume. The data may have moved, but not changed."""

_AMP = {"bf16": "bfloat16", "fp16": "float16"}


def directory(text: str) -> Path:
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


def _clamp(text: str) -> tuple[float | None, float | None]:
    low, comma, high = text.partition(",")
    try:
        bounds = tuple(number(-math.inf)(bound) if bound else None for bound in (low, high))
    except argparse.ArgumentTypeError:
        bounds = (None, None)
    if not comma or bounds == (None, None):
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH, of which one may be empty, got {text!r}")
    if None not in bounds and bounds[0] > bounds[1]:  # type: ignore[operator]
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH, LOW no higher than HIGH, got {text!r}")
    return bounds  # type: ignore[return-value]


def _recon_logvar(text: str) -> str | float:
    if text in (PER_PIXEL, LEARNED):
        return text
    try:
        return number(-math.inf)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected '{PER_PIXEL}', '{LEARNED}' or a number, got {text!r}") from None


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of `Settings`."""
    defaults = {field.name: field.default for field in fields(Settings)}

    def option(group: Any, name: str, help: str, **kind: Any) -> None:
        # Absent options stay absent from the namespace: --resume must know what was asked for.
        default = defaults[name.lstrip("-").replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(name, help=help + shown, default=argparse.SUPPRESS, **kind)

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
        f"channels at full resolution (conv; default: {CONV_WIDTH}, half of them with each doubling of images above "
        f"{SMALL} pixels, down to {LEAST_CONV_WIDTH}) or units of the first layer (mlp; default: {MLP_WIDTH})",
        type=integer(1, MOST_UNITS),
        metavar="N",
    )
    option(
        model, "--condition", "what the networks are told beside their inputs: the data's labels", choices=CONDITIONS
    )
    option(model, "--likelihood", "p(x|z); mse and l1 are the squared and the absolute error", choices=LIKELIHOODS)
    option(
        model,
        "--recon-logvar",
        f"log-variance of the likelihood (or its scale, see --recon-scale): '{PER_PIXEL}', from the decoder; "
        f"'{LEARNED}', one learned number; or a fixed number",
        type=_recon_logvar,
        metavar="WHAT",
    )
    option(
        model,
        "--logvar-floor",
        f"lower bound of what the decoder gives for a {PER_PIXEL} scale, a log-variance unless --recon-scale says "
        "otherwise: lower gives a better bound, higher better samples",
        type=number(-math.inf),
        metavar="X",
    )
    option(
        model,
        "--recon-scale",
        "form of that scale (default: logvar; of laplace logscale); fusedvae.functional has the formulas",
        choices=RECON_SCALES,
    )
    option(model, "--recon-clamp", "bounds of it, before its form", type=_clamp, metavar="LOW,HIGH")
    option(model, "--recon-eps", "added to what its form names", type=number(0), metavar="X")
    option(model, "--scale", "form of the posterior's scale, likewise", choices=SCALES)
    option(model, "--clamp", "bounds of it", type=_clamp, metavar="LOW,HIGH")
    option(model, "--eps", "added to what its form names", type=number(0), metavar="X")

    training = parser.add_argument_group("training")
    option(training, "--bound", "what is maximised; iwae: the importance-weighted bound of --samples", choices=BOUNDS)
    option(training, "--samples", "of the posterior, for each of the data", type=integer(1, MOST_SAMPLES), metavar="K")
    option(training, "--beta", "weight of the KL", type=number(0), metavar="X")
    option(
        training,
        "--warmup",
        "epochs over which beta grows from 0 to its value",
        type=number(0),
        metavar="EPOCHS",
    )
    option(
        training,
        "--beta-schedule",
        "how beta grows; cyclical: in a line, then as long at its value, then again from 0",
        choices=BETA_SCHEDULES,
    )
    option(
        training,
        "--epochs",
        f"times to go through the data (default: {EPOCHS}, or more of few data, the more the larger the images)",
        type=integer(1),
        metavar="N",
    )
    option(training, "--batch", "samples a step, those of all processes", type=integer(1), metavar="N")
    option(
        training,
        "--grad-accum",
        "compute a step in this many parts, one after the other, for less memory (default: 1, or more of images beyond "
        "128 pixels)",
        type=integer(1),
        metavar="N",
    )
    option(training, "--lr", "learning rate of AdamW", type=number(0, exclusive=True), metavar="X")
    option(training, "--lr-schedule", "how it goes down from there", choices=LR_SCHEDULES)
    option(training, "--lr-warmup", "epochs over which it grows from 0 first", type=number(0), metavar="EPOCHS")
    option(training, "--lr-final", "part of it that is left in the last step", type=number(0, 1), metavar="X")
    option(
        training,
        "--clip-grad",
        "bound of the norm of all gradients",
        type=number(0, exclusive=True),
        metavar="NORM",
    )
    option(
        training,
        "--ema",
        "evaluate, draw and save an exponential moving average of the weights, with this decay a step",
        type=number(0, 1, exclusive=True),
        metavar="DECAY",
    )
    option(
        training,
        "--seed",
        "of the initial weights, the order of the data and the noise",
        type=integer(0, 2**32 - 1),
        metavar="N",
    )

    watching = parser.add_argument_group("watching")
    option(
        watching,
        "--evaluate-every",
        "epochs between estimates of log p(x), active units and the like; 0: at the end only",
        type=integer(0),
        metavar="EPOCHS",
    )
    option(
        watching,
        "--evaluate-samples",
        "importance samples of an estimate of log p(x)",
        type=integer(1, MOST_SAMPLES),
        metavar="K",
    )
    option(watching, "--logger", "where metrics go beside metrics.csv", choices=LOGGERS)

    machine = parser.add_argument_group("machine")
    precision = machine.add_mutually_exclusive_group()
    option(
        precision,
        "--dtype",
        "bfloat16 and float16 are mixed precision: networks under torch.autocast, parameters in float32, with float16 "
        "a GradScaler",
        choices=DTYPES,
    )
    precision.add_argument(
        "--amp",
        dest="dtype",
        type=_amp,
        default=argparse.SUPPRESS,
        metavar="{bf16,fp16}",
        help="mixed precision: another name for --dtype bfloat16 and float16",
    )
    option(
        machine,
        "--device",
        "cpu, cuda, cuda:1, ...; auto: cuda where there is one. Of the processes of torchrun each has its own",
        metavar="NAME",
    )
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
    option(machine, "--compile", "torch.compile the training step", action=argparse.BooleanOptionalAction)
    option(
        machine,
        "--fsdp",
        "spread weights and moments over the processes of torchrun, for models that one device does not hold",
        action=argparse.BooleanOptionalAction,
    )


def _amp(text: str) -> str:
    if text not in _AMP:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(_AMP)}, got {text!r}")
    return _AMP[text]


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parsed(values: dict[str, Any]) -> dict[str, Any]:
    """Options by the names of their fields, read as the command line would read them.

    Raises:
        ValueError: there is no such option, or it takes no such value.
    """
    defaults = {field.name: field.default for field in fields(Settings)}
    words = []
    for name, value in values.items():
        field = str(name).replace("-", "_")
        if field not in defaults and field != "amp":  # an option, too, that sets the dtype
            raise ValueError(f"{option_name(field)} is no option of a run's settings")
        is_switch = isinstance(defaults.get(field), bool)
        if value is not None and isinstance(value, bool) != is_switch:
            raise ValueError(
                f"{option_name(field)}: expected {'true or false' if is_switch else 'a value'}, got {value!r}"
            )
        if isinstance(value, bool):
            words.append(option_name(field) if value else f"--no-{field.replace('_', '-')}")
        elif isinstance(value, (list, tuple)):
            words.append(f"{option_name(field)}={','.join('' if v is None else str(v) for v in value)}")
        elif value is not None:
            words.append(f"{option_name(field)}={value}")
    parser = _Parser(allow_abbrev=False, add_help=False)
    add_settings(parser)
    return vars(parser.parse_args(words))


def checked(values: dict[str, Any]) -> Settings:
    """Settings from a checkpoint, each of which must be one that its option takes.

    Raises:
        ValueError, TypeError: it is not, or there is no such option.
    """
    expected = {name: value for name, value in values.items() if value is not None}
    if parsed(values) != expected:
        raise ValueError("a setting of another kind than its option's")
    return Settings(**values)


def read(path: Path) -> dict[str, Any]:
    """The options in a file: a mapping in YAML or JSON, of their names without the dashes."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--config: cannot read {path}: {error}") from error
    try:
        found = _mapping(path, text)
        return parsed(found)
    except ValueError as error:
        raise CommandError(f"--config {path}: {error}") from error


def _mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        if path.suffix == ".json":
            raise
        yaml = require("yaml")
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a mapping of options to values, got {type(found).__name__}")
    return found


def text_of(settings: Settings) -> str:
    """The same for a file: every option that has a value."""
    values: dict[str, Any] = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return json.dumps({name: value for name, value in values.items() if value is not None}, indent=2) + "\n"
