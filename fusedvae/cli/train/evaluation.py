"""How good the model is on held-out samples, beyond the loss: at the end of a run, and as often as was asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .. import metrics
from ..settings import Settings
from ..trainer import Row, Trainer, write_csv

EVALUATION = "evaluation.csv"
COLUMNS = ("epoch", "log_likelihood", "active_units", "psnr", "ssim")
"""Nats per sample, variables, decibels, and 1 for the same image; nothing where that is not defined."""

_COMPARES_IMAGES = importlib.util.find_spec("torchmetrics") is not None
"""Without torchmetrics a run does without PSNR and SSIM, rather than end for want of them."""

MOST_SAMPLES = 1000
"""More of the held-out samples would change little, and take long."""


class Evaluations:
    """Rows of evaluation.csv.

    Args:
        trainer: whose model it is, and whose processes: all of them take part, and the first one computes.
        directory: the run's.
    """

    def __init__(self, trainer: Trainer, directory: Path) -> None:
        self.trainer, self.directory = trainer, directory

    def is_due(self) -> bool:
        """Whether the settings ask for one after this epoch, which is not the last."""
        every = self.trainer.settings.evaluate_every
        return every > 0 and self.trainer.epoch % every == 0 and self.trainer.epoch < self.trainer.epochs

    def take(self) -> Row:
        """Evaluate the model as it is; empty in all processes but the first."""
        self.trainer.gather_model()
        row: Row = {}
        with self.trainer.group.together():
            if self.trainer.group.is_first:
                row = self._measured()
                others = [other for other in self.trainer.evaluations if other["epoch"] != row["epoch"]]
                self.trainer.evaluations = [*others, row]  # a run that was at its end is measured anew
                write_csv(self.directory / EVALUATION, COLUMNS, self.trainer.evaluations)
        return row

    def _measured(self) -> Row:
        trainer, settings = self.trainer, self.trainer.settings
        model, samples = trainer.trained_model(), trainer.heldout_samples.subset(slice(MOST_SAMPLES))
        how: dict[str, Any] = {
            "batch": settings.batch,
            "workers": settings.workers,
            "conditional": settings.condition == "labels",
        }
        with settings.autocast():
            row: Row = {
                "epoch": trainer.epoch,
                "log_likelihood": metrics.log_likelihood(
                    model, samples, particles=settings.evaluate_samples, seed=settings.seed, **how
                ),
                "active_units": metrics.active_units(model, samples, **how),
            }
            if len(samples.shape) == 3 and _COMPARES_IMAGES:
                row["psnr"] = metrics.psnr(model, samples, **how)
                if metrics.has_ssim(samples.shape):
                    row["ssim"] = metrics.ssim(model, samples, **how)
        return row


def line(row: Row, settings: Settings) -> str:
    """A row for people."""
    what = "log p(x|label)" if settings.condition == "labels" else "log p(x)"
    parts = [
        f"{what} {row['log_likelihood']:.2f} nats per sample ({settings.evaluate_samples} importance samples)",
        f"{row['active_units']} of {settings.latent} latent variables active",
    ]
    if "psnr" in row:
        parts.append(f"PSNR {row['psnr']:.1f} dB")
    if "ssim" in row:
        parts.append(f"SSIM {row['ssim']:.3f}")
    return ", ".join(parts)
