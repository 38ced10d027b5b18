"""Files of a run that are the old ones or the new ones, whole, whenever the process or the machine stops."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import CommandError

CHECKPOINT = "checkpoint.pt"
FORMAT = 1
"""Changes with the meaning of a checkpoint's entries."""

_UNFINISHED = ".unfinished"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, get it onto the disk, and give it the name ``path``."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        try:
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        if os.name == "posix":  # the new name is on the disk only when its directory is
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except (OSError, RuntimeError) as error:  # a RuntimeError is how torch.save reports a full disk
        raise CommandError(f"cannot write {path}: {error}") from error


def save(directory: Path, state: dict[str, Any]) -> None:
    """Make ``state`` the checkpoint of the run in ``directory``."""
    write_atomically(directory / CHECKPOINT, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(directory: Path) -> dict[str, Any]:
    """The state that :func:`save` was last given for ``directory``, on the CPU.

    Reads tensors and plain values only: a checkpoint from a stranger can be wrong, but runs no code.
    """
    path = directory / CHECKPOINT
    if not path.is_file():
        raise CommandError(f"{directory} holds no run to continue: there is no {CHECKPOINT}")
    with reading(directory):
        with zipfile.ZipFile(path) as archive:  # torch.load takes older formats too, and looks at no checksums
            if archive.testzip() is not None:
                raise ValueError("a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CommandError(f"{path} is not a checkpoint that this version of fusedvae can continue")
    return state


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """A block that takes in what the checkpoint in ``directory`` holds: whatever it raises is the file's fault."""
    path = directory / CHECKPOINT
    try:
        yield
    except CommandError:
        raise
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error}") from error
    except Exception as error:
        raise CommandError(f"cannot read {path}: it is damaged, or not of this version of fusedvae") from error
