"""The training loop, stoppable after any step and continued as if it had never stopped."""

from __future__ import annotations

import csv
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType, TracebackType

import numpy as np
import torch
from torch import Tensor

from ..vae import VAE
from . import checkpoint
from .data import Data, Samples, batches, in_order
from .errors import CommandError
from .files import write_atomically
from .settings import Settings

METRICS = "metrics.csv"
COLUMNS = (
    "epoch",
    "beta",
    "train_loss",
    "train_nll",
    "train_kl",
    "heldout_loss",
    "heldout_nll",
    "heldout_kl",
)
"""Of metrics.csv, values per sample. There is no wall-clock time among them: the files of two runs of the same
settings can be compared byte for byte."""

CHECKPOINT_SECONDS = 10.0
"""Checkpoints are written this often, or less if they take more than a twentieth of the time."""

Row = dict[str, float]


class Interruption:
    """While active, turns a first SIGINT or SIGTERM into a request that the loop sees between two steps.

    The second one raises KeyboardInterrupt at once: the last checkpoint stays as it is.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class Trainer:
    """A model, its optimizer, its data and how far it has come.

    Everything that the next step depends on is in :meth:`state`: the parameters, the optimizer's moments, the
    random number generators, and the position. The order of the data is a function of the seed and the epoch.
    """

    def __init__(self, settings: Settings, data: Data) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.data = data
        self.fingerprint = data.fingerprint()
        self.shape = data.shape
        self.train_samples, self.heldout_samples = data.train, data.test
        torch.manual_seed(settings.seed)
        self.model: VAE = settings.build_model(data.shape).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
        self.epoch, self.step = 0, 0
        self.sums = self._no_sums()
        self.history: list[Row] = []

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_samples) // self.settings.batch)

    def state(self) -> dict[str, object]:
        """All that :meth:`restore` needs, as tensors and plain values."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "settings": asdict(self.settings),
            "shape": self.shape,
            "fingerprint": self.fingerprint,
            "preparation": self.data.preparation.record(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
        }

    def restore(self, state: dict) -> None:
        """Go on from a :meth:`state` that was made with the same settings and data."""
        if state["fingerprint"] != self.fingerprint:
            raise CommandError(
                f"{self.settings.data} is not the data that this run was trained on: its contents differ"
            )
        moments = state["optimizer"]["state"]
        _check_moments(self.optimizer, moments)
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # follow from the settings
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.epoch, self.step = _count(state["epoch"]), _count(state["step"])
        self.sums = self._no_sums().copy_(state["sums"])
        self.history = [{name: row[name] + 0 for name in COLUMNS} for row in state["history"]]
        if len(self.history) != self.epoch or self.step > self.steps_per_epoch:
            raise ValueError("a position that the run cannot be in")

    def save(self, directory: Path) -> None:
        """Write the checkpoint, then the metrics, which are a part of it in a form for people."""
        self._check_finite(self.sums, *self.model.parameters())
        checkpoint.save(directory, self.state())
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(directory / METRICS, lambda file: file.write(table.getvalue().encode("ascii")))

    def run(
        self,
        directory: Path,
        *,
        interruption: Interruption,
        after_step: Callable[[], object] = lambda: None,
        after_epoch: Callable[[Row], object] = lambda row: None,
    ) -> bool:
        """Train to the end, with checkpoints in ``directory``; False if interrupted before it."""
        saved, cost = time.monotonic(), 0.0
        remaining: Iterator[Tensor] | None = None
        while self.epoch < self.settings.epochs and interruption.signal is None:
            if remaining is None:
                remaining = self._batches(self.train_samples, self._order()[self.step :])
            if self.step < self.steps_per_epoch:
                self.sums += self._train_step(next(remaining))
                self.step += 1
                after_step()
            else:
                self._finish_epoch()
                remaining = None
                after_epoch(self.history[-1])
            if time.monotonic() - saved > max(CHECKPOINT_SECONDS, 20 * cost):
                started = time.monotonic()
                self.save(directory)
                saved = time.monotonic()
                cost = saved - started
        self.save(directory)
        return interruption.signal is None

    def evaluate(self, samples: Samples) -> Tensor:
        """(loss, NLL, KL) a sample, in evaluation mode, with noise that is the same at every call."""
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        sums = self._no_sums()
        self.model.eval()
        with torch.no_grad():
            for x in self._batches(samples, in_order(samples, self.settings.batch)):
                with self.settings.autocast():
                    terms = self.model.loss(
                        x, beta=self.settings.beta, full=True, return_terms=True, generator=generator
                    )
                sums += torch.stack(terms).double() * len(x)
        return sums / len(samples)

    def _train_step(self, x: Tensor) -> Tensor:
        """One step of the optimizer; returns (loss, NLL, KL) summed over the batch, without waiting for
        them."""
        self.model.train()
        done = self.epoch * self.steps_per_epoch + self.step
        with self.settings.autocast():
            beta = self.settings.beta_at(done, self.steps_per_epoch)
            terms = self.model.loss(x, beta=beta, full=True, return_terms=True)
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        self.optimizer.step()
        return torch.stack([term.detach() for term in terms]).double() * len(x)

    def _finish_epoch(self) -> None:
        train = self.sums / len(self.train_samples)
        heldout = self.evaluate(self.heldout_samples)
        self._check_finite(train, heldout)
        last_step = (self.epoch + 1) * self.steps_per_epoch - 1
        beta = self.settings.beta_at(last_step, self.steps_per_epoch)
        self.history.append(dict(zip(COLUMNS, (self.epoch + 1, beta, *train.tolist(), *heldout.tolist()), strict=True)))
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = self._no_sums()

    def _check_finite(self, *values: Tensor) -> None:
        if not all(torch.isfinite(value).all() for value in values):
            raise CommandError(
                f"the loss is not finite any more in epoch {self.epoch + 1}: try a lower --lr or a higher "
                "--logvar-floor (the checkpoint on the disk is from before)"
            )

    def _order(self) -> list[np.ndarray]:
        """The indices of the training samples in each step of this epoch."""
        order = np.random.default_rng([self.settings.seed, self.epoch]).permutation(len(self.train_samples))
        return [order[start : start + self.settings.batch] for start in range(0, len(order), self.settings.batch)]

    def _batches(self, samples: Samples, order: list[np.ndarray]) -> Iterator[Tensor]:
        workers, dtype = self.settings.workers, self.settings.data_dtype
        for x, _ in batches(samples, order, workers=workers, device=self.device, dtype=dtype):
            yield x

    def _no_sums(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.device)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a count, got {value!r}")
    return value


def _check_moments(optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, Tensor]]) -> None:
    """Refuse moments of other shapes or dtypes than the parameters have: PyTorch's fused step believes them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if moments and sorted(moments) != list(range(len(parameters))):
        raise ValueError("moments of other parameters")
    for index, found in moments.items():
        expected = {"step": ((), torch.float32)}
        for name in ("exp_avg", "exp_avg_sq"):
            expected[name] = (tuple(parameters[index].shape), parameters[index].dtype)
        if {name: (tuple(value.shape), value.dtype) for name, value in found.items()} != expected:
            raise ValueError("moments of another shape or dtype than the parameter's")


def load_model(directory: str | Path) -> VAE:
    """The model of the run in ``directory``, on the CPU, in evaluation mode."""
    state = checkpoint.load(Path(directory))
    with checkpoint.reading(Path(directory)):
        model = Settings(**state["settings"]).build_model(tuple(state["shape"]))
        model.load_state_dict(state["model"])
    return model.eval()
