"""Where metrics go beside metrics.csv: TensorBoard, or Weights & Biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import require
from ..settings import Settings

EVENTS = "events"
"""TensorBoard's files, a directory in the run's."""


class Logger(Protocol):
    def log(self, epoch: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Nowhere:
    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """A run that goes on, goes on in the same plot: what came after its checkpoint is left out."""

    def __init__(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory / EVENTS), purge_step=done + 1)

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(_grouped(name), value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    def __init__(self, directory: Path, settings: Settings) -> None:
        wandb = require("wandb")
        self._run: Any = wandb.init(
            project="fusedvae",
            name=directory.resolve().name,
            dir=str(directory),
            config=dataclasses.asdict(settings),
        )

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self._run.log({"epoch": epoch, **{_grouped(name): value for name, value in values.items()}}, step=epoch)

    def close(self) -> None:
        self._run.finish()


def _grouped(name: str) -> str:
    """``train_loss`` as ``train/loss``: what belongs together is shown together."""
    part, _, rest = name.partition("_")
    return f"{part}/{rest}" if part in ("train", "heldout") else name


def check(settings: Settings) -> None:
    """Refuse a logger whose package is not there."""
    if settings.logger != "none":
        require(settings.logger)


def logger(settings: Settings, directory: Path, done: int) -> Logger:
    """The one that the settings ask for, of a run with so many epochs behind it."""
    if settings.logger == "tensorboard":
        return TensorBoard(directory, done)
    if settings.logger == "wandb":
        return WeightsAndBiases(directory, settings)
    return Nowhere()
