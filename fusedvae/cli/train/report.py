"""What a run says of itself: at its start, as it goes, and at its end."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from ...backend import resolve
from ..errors import require
from ..timing import StepTimes, step_times, waiting_processes
from ..trainer import Row, Trainer


def print_summary(trainer: Trainer, directory: Path) -> None:
    settings, group = trainer.settings, trainer.group
    print(f"data: {trainer.data.description}")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    processes = "" if group.size == 1 else f"{group.size} processes, "
    epochs, steps = trainer.epochs, trainer.steps_per_epoch
    print(
        f"{len(trainer.train_samples)} samples of {'x'.join(map(str, trainer.data.shape))} to train on, "
        f"{len(trainer.heldout_samples)} held out; {parameters:,} parameters; "
        f"{processes}{settings.device}, {settings.threads} thread{'s' * (settings.threads != 1)}, {settings.dtype}, "
        f"{resolve(trainer.device.type)} backend; {epochs} epoch{'s' * (epochs != 1)} of "
        f"{steps} step{'s' * (steps != 1)}; "
        f"writing to {directory}",
        flush=True,
    )


class Progress:
    """The bar, and a line an epoch: both with the samples a second, and the time to go."""

    def __init__(self, trainer: Trainer, *, quiet: bool) -> None:
        self.epochs, self.quiet = trainer.epochs, quiet
        self._total = trainer.epochs * len(trainer.train_samples)
        done = trainer.epoch * len(trainer.train_samples) + trainer.step * trainer.settings.batch
        self._done = self._first = done
        self._started = time.perf_counter()
        self._bar: Any = None
        if not quiet:
            self._bar = require("tqdm").tqdm(
                total=self._total, initial=done, unit="sample", unit_scale=True, disable=None, leave=False
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def after_step(self, samples: int) -> None:
        self._done += samples
        if self._bar is not None:
            self._bar.update(samples)

    def after_epoch(self, row: Row) -> None:
        if self._bar is not None:
            rate = (self._done - self._first) / max(time.perf_counter() - self._started, 1e-9)
            self.say(f"{_epoch_line(row, self.epochs)}  {self._pace(rate)}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _pace(self, rate: float) -> str:
        left = (self._total - self._done) / rate if rate else 0.0
        return f"{rate:.3g} samples/s" + (f", {timedelta(seconds=round(left))} to go" if left else "")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _epoch_line(row: Row, epochs: int) -> str:
    def terms(part: str) -> str:
        return f"{row[f'{part}_loss']:8.2f} (NLL {row[f'{part}_nll']:8.2f}, KL {row[f'{part}_kl']:6.2f})"

    count = f"{row['epoch']:{len(str(epochs))}d}/{epochs}"
    return f"epoch {count}  train {terms('train')}  held-out {terms('heldout')}"


def print_end(trainer: Trainer, evaluation: str) -> None:
    last = trainer.history[-1]
    print(
        f"held-out samples after epoch {last['epoch']}: loss {last['heldout_loss']:.2f}, "
        f"NLL {last['heldout_nll']:.2f}, KL {last['heldout_kl']:.2f} nats per sample"
    )
    print(evaluation)
    if trainer.settings.fsdp:
        return
    x, labels = trainer.first_part()
    times = step_times(trainer.trained_model(), x, trainer.settings, trainer.condition(labels))
    if times is None:
        print("a step takes what the reference takes: no fused kernels are in use (see fusedvae info)")
        return
    busy = "; the machine is busy with other work, so they say little" if waiting_processes() >= 1 else ""
    print(f"medians of interleaved runs, with the fused kernels and with the reference in plain PyTorch{busy}:")
    print(f"a training step of {len(x)} samples: {times.step}")
    print(f"of it sampling, KL and NLL, forward and backward: {times.objective}")
    print(_gain(times))


def _gain(times: StepTimes) -> str:
    """What the kernels save, and in which part of a step: no step is faster than its networks are."""
    step, loss = times.step, times.objective
    part = min(loss.reference / step.reference, 1.0)
    ratio = loss.reference / loss.fused
    saved = loss.reference - loss.fused
    if saved <= 0:
        return f"gain: none at this size: the fused loss takes {ratio**-1:.2f} times as long as in eager PyTorch"
    return (
        f"gain: the loss is {ratio:.1f} times as fast as in eager PyTorch, which saves {_time(saved)} of every step; "
        f"there it was {100 * part:.0f} % of a step, and the other {100 - 100 * part:.0f} %, networks and optimizer, "
        "stay as they are"
    )


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
