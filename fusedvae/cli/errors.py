"""What a command says when it cannot go on."""

from __future__ import annotations

import importlib
import shlex
from importlib import metadata
from pathlib import Path
from types import ModuleType

EXTRAS = {
    "matplotlib": "train",
    "sklearn": "train",
    "tqdm": "train",
    "PIL": "train",
    "braceexpand": "train",
    "torchmetrics": "train",
    "yaml": "train",
    "anndata": "h5ad",
    "h5py": "h5ad",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
"""Which extra of the package brings a module that only commands need, unless a command has one of its own."""


class CommandError(Exception):
    """Something the user can put right. Shown as one line; the exit status is 2."""


class LostProcessError(CommandError):
    """Another process of the run has ended: said by each of those that are left, as the first may be the one."""


def require(module: str, extra: str | None = None) -> ModuleType:
    """Import ``module``, or say which extra has it: ``extra``, if the one of `EXTRAS` is another command's."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        command = extra_command(extra or EXTRAS[package])
        raise CommandError(f"this needs {package} ({error}): install it with {command}") from error


def extra_command(extra: str) -> str:
    """The command that brings what an extra lists.

    To an install, from whatever source, pip adds that by the package's name: it looks for no release and compiles
    nothing. A checkout that was not installed has to be named by its folder.
    """
    try:
        metadata.distribution("fusedvae")
        what = "fusedvae"
    except metadata.PackageNotFoundError:
        what = str(Path(__file__).parents[2])
    return f"pip install {shlex.quote(f'{what}[{extra}]')}"
