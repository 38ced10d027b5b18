"""The checkpoint of a run: everything that its next step depends on, in one file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import CommandError
from .files import write_atomically

CHECKPOINT = "checkpoint.pt"
FORMAT = 3
"""Changes with the meaning of a checkpoint's entries."""


def save(directory: Path, state: dict[str, Any]) -> None:
    """Make ``state`` the checkpoint of the run in ``directory``."""
    write_atomically(directory / CHECKPOINT, lambda file: torch.save({"format": FORMAT, **state}, file))


def check_there_is_one(directory: Path) -> None:
    try:
        found = (directory / CHECKPOINT).is_file()
    except OSError as error:  # a folder that may not be entered
        raise CommandError(f"cannot read {directory}: {error.strerror}") from error
    if not found:
        raise CommandError(f"{directory} holds no run to continue: there is no {CHECKPOINT}")


def load(directory: Path) -> dict[str, Any]:
    """The state that `save` was last given for ``directory``, on the CPU.

    Reads tensors and plain values only: a checkpoint from a stranger can be wrong, but runs no code.
    """
    path = directory / CHECKPOINT
    check_there_is_one(directory)
    with reading(directory):
        with zipfile.ZipFile(path) as archive:  # torch.load takes older formats too, and looks at no checksums
            if archive.testzip() is not None:
                raise ValueError("a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        of_what = f"a checkpoint of format {found}" if isinstance(found, int) else "not a checkpoint"
        raise CommandError(f"{path} is {of_what}: this version of fusedvae continues those of format {FORMAT}")
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
