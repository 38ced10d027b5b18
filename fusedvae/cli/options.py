"""What the commands' options have in common: how numbers and devices are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from .errors import CommandError

MOST_THREADS = 1024
"""More are a slip of the keyboard, and end processes in ways that no message comes from."""


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of integers in a range, both ends of which are in it."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse


def number(low: float, high: float = math.inf, *, exclusive: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers in a range; its ends are in it unless ``exclusive``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = low < value < high if exclusive else low <= value <= high
        if not (inside and math.isfinite(value)):
            wanted = f"above {low:g}" if exclusive else f"of at least {low:g}" if low > -math.inf else ""
            wanted += f" and below {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"expected a number {wanted}".rstrip() + f", got {text!r}")
        return value

    return parse


def usable_device(name: str) -> str:
    """The device of that name, "auto" being a GPU where there is one; refused if no tensor can be on it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise CommandError(f"--device {name} cannot be used: expected auto, cpu, cuda or cuda:N")
    try:
        torch.ones((), device=torch.device(name)).item()
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name
