"""The training loop, stoppable after any step and continued as if it had never stopped."""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from .. import ops, pretrained, random
from ..vae import VAE
from . import checkpoint, sharding
from .data import Data, Samples, batches, in_order
from .errors import CommandError
from .files import write_atomically
from .interruption import Interruption
from .objective import Objective
from .processes import ALONE, Alone
from .settings import LEARNED, PER_PIXEL, Settings

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

MODEL_FILES = (pretrained.CONFIG, pretrained.weights_name())
"""The trained model, for `fusedvae.VAE.from_pretrained`."""

CHECKPOINT_SECONDS = 10.0
"""Checkpoints are written this often, or less if they take more than a twentieth of the time."""

Row = dict[str, float]
Batch = tuple[Tensor, Tensor | None]
"""Samples, and their labels if they have some."""


class Trainer:
    """A model, its optimizer, its data and how far it has come.

    Everything that the next step depends on is in `state`: the parameters, the optimizer's moments, the
    random number generators, and the position. The order of the data is a function of the seed and the epoch, and the
    noise of a sample one of the seed and its place in its batch: several processes, each with its rows of every batch,
    compute what one would have, up to rounding.
    """

    def __init__(self, settings: Settings, data: Data, group: Alone = ALONE) -> None:
        epochs = settings.epochs_of(len(data.train), data.shape)
        parts = settings.grad_accum_of(data.shape, group.size)
        # With what the defaults are here: a run goes on alike where they are others.
        self.settings = settings = dataclasses.replace(
            settings,
            epochs=epochs,
            width=settings.width_of(data.shape),
            grad_accum=parts,
        )
        self.epochs, self.parts = epochs, parts
        self.data, self.group = data, group
        settings.check(len(data.classes), data.test.labels is not None)
        self.device = torch.device(settings.device)
        self.fingerprint = data.fingerprint()
        self.train_samples, self.heldout_samples = data.train, data.test
        torch.manual_seed(settings.seed)
        self.model: VAE = settings.build_model(data.shape, len(data.classes))
        if not settings.fsdp:
            self.model.to(self.device)
        self.averaged: AveragedModel | None = None
        if settings.ema is not None:
            # Sharded tensors are averaged one by one: the operation that takes many does not know them.
            how = {"avg_fn": get_ema_avg_fn} if settings.fsdp else {"multi_avg_fn": get_ema_multi_avg_fn}
            self.averaged = AveragedModel(self.model, **{name: make(settings.ema) for name, make in how.items()})
        self.objective = Objective(self.model, settings.samples, settings.bound)
        self.evaluated = self.objective
        if self.averaged is not None:
            averaged: Any = self.averaged.module
            self.evaluated = Objective(averaged, settings.samples, settings.bound)
        if settings.fsdp:
            for objective in {self.objective, self.evaluated}:
                sharding.shard(objective, self.device)
        if settings.compile:
            self.objective.compile()
        self._wrapped: nn.Module = self.objective
        if group.size > 1 and not settings.fsdp:
            self._wrapped = nn.parallel.DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == "float16")
        self.epoch, self.step = 0, 0
        self.sums = self._no_sums()
        self.history: list[Row] = []
        self.evaluations: list[Row] = []
        """Rows of evaluation.csv, which go with the history; in the first process."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_samples) // self.settings.batch)

    # --- what a run is, for the disk ---

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as tensors and plain values: the same for any number of processes, each of
        which must call it; whole in the first one."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        moments = {
            index: {name: sharding.whole(value, keep=self.group.is_first) for name, value in found.items()}
            for index, found in self.optimizer.state_dict()["state"].items()
        }
        state = {
            "settings": dataclasses.asdict(self.settings),
            "fingerprint": self.fingerprint,
            "preparation": self.data.preparation.record(),
            "model": self._whole_state(self.model),
            "optimizer": {"state": moments},
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.group.sum(self.sums),
            "history": self.history,
            "evaluations": self.evaluations,
        }
        if self.averaged is not None:
            state["averaged"] = {
                "model": self._whole_state(self.averaged.module),
                "updates": int(self.averaged.n_averaged),
            }
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` that was made with the same settings and data."""
        if state["fingerprint"] != self.fingerprint:
            raise CommandError(f"{self._sources()} not the data that this run was trained on: the contents differ")
        moments, scaling = state["optimizer"]["state"], state["scaler"]
        _check_moments(self.optimizer, moments)
        sharding.load(self.model, state["model"])
        if self.averaged is not None:
            sharding.load(self.averaged.module, state["averaged"]["model"])
            self.averaged.n_averaged.fill_(_count(state["averaged"]["updates"]))
        groups = self.optimizer.state_dict()["param_groups"]  # follow from the settings
        parameters = list(self.model.parameters())
        moments = {
            index: {name: sharding.like(value, parameters[index]) for name, value in found.items()}
            for index, found in moments.items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scaling)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.epoch, self.step = _count(state["epoch"]), _count(state["step"])
        sums = self._no_sums().copy_(state["sums"])
        self.sums = sums if self.group.is_first else self._no_sums()
        self.history = [{name: row[name] + 0 for name in COLUMNS} for row in state["history"]]
        self.evaluations = [{str(name): value + 0 for name, value in row.items()} for row in state["evaluations"]]
        if len(self.history) != self.epoch or self.step > self.steps_per_epoch:
            raise ValueError("a position that the run cannot be in")

    def _sources(self) -> str:
        data, test = self.settings.data, self.settings.test_data
        return f"{data} is" if test is None else f"{data} with --test-data {test} is"

    def save(self, directory: Path) -> None:
        """Write the checkpoint, then the metrics, which are a part of it in a form for people. Every process calls it,
        and the first one writes."""
        state = self.state()
        with self.group.together():
            if self.group.is_first:
                self._check_finite(state["sums"][0], *state["model"].values())
                checkpoint.save(directory, state)
                write_csv(directory / METRICS, COLUMNS, self.history)

    def save_model(self, directory: Path) -> None:
        """Write the trained model, for `fusedvae.VAE.from_pretrained`. The first process does."""
        extra = {"preparation": self.data.preparation.record()}
        pretrained.save(self.trained_model(), directory, extra=extra, write=_write_bytes)

    def trained_model(self) -> VAE:
        """What is evaluated: the average of the weights, if there is one. Of sharded weights a whole copy on the CPU,
        after `gather_model`."""
        return self._gathered if self.settings.fsdp else self.evaluated.model

    def gather_model(self) -> None:
        """Make sharded weights whole in the first process. Every process calls it."""
        if self.settings.fsdp:
            state = self._whole_state(self.evaluated.model)
            if self.group.is_first:
                with torch.random.fork_rng([]):  # whose draws are no part of the run's, and no other process makes
                    self._gathered = self.settings.build_model(self.data.shape, len(self.data.classes))
                self._gathered.load_state_dict(state)

    def leave_group(self) -> None:
        """From here on this process is alone.

        The wrapper goes before the group: were it the last to hold that, PyTorch would end the group under the
        interpreter's lock, and wait for a thread that may want it.
        """
        self._wrapped = self.objective
        self.group.close()
        self.group = ALONE

    def _whole_state(self, model: nn.Module) -> dict[str, Tensor]:
        keep = self.group.is_first
        return {name: sharding.whole(value, keep=keep) for name, value in model.state_dict().items()}

    # --- the loop ---

    def run(
        self,
        directory: Path,
        *,
        interruption: Interruption,
        after_step: Callable[[int], object] = lambda samples: None,
        after_epoch: Callable[[Row], object] = lambda row: None,
    ) -> bool:
        """Train to the end, with checkpoints in ``directory``; False if interrupted before it.

        Args:
            after_step: given the number of samples of the step, those of all processes.
            after_epoch: given the epoch's row.
        """
        saved, cost = time.monotonic(), 0.0
        remaining: Iterator[Batch] | None = None
        while self.epoch < self.epochs:
            is_time = time.monotonic() - saved > max(CHECKPOINT_SECONDS, 20 * cost)
            stop, save = self.group.agree(interruption.signal or 0, int(is_time and self.group.is_first))
            if stop:
                interruption.signal = stop
                break
            if save:
                started = time.monotonic()
                self.save(directory)
                saved = time.monotonic()
                cost = saved - started
            if remaining is None:
                remaining = self._batches(self.train_samples, self._order()[self.step :])
            if self.step < self.steps_per_epoch:
                samples = self._size_of(self.step)
                self.sums += self._train_step(next(remaining))
                self.step += 1
                after_step(samples)
            else:
                self._finish_epoch()
                remaining = None
                after_epoch(self.history[-1])
        self.save(directory)
        (stop,) = self.group.agree_now(interruption.signal or 0)
        interruption.signal = stop or None
        return not stop

    def evaluate(self, samples: Samples) -> Tensor:
        """(loss, NLL, KL) a sample, in evaluation mode, with noise that is the same at every call. With the
        importance-weighted bound, which is no sum, NLL and KL are those of the evidence lower bound."""
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        order = in_order(samples, self.settings.batch)
        sums = self._no_sums()
        self.evaluated.eval()
        with torch.no_grad():
            for indices, (x, labels) in zip(order, self._batches(samples, order), strict=True):
                noise = self._noise(len(indices), generator)
                condition = self.condition(labels)
                with self.settings.autocast():
                    terms = self.evaluated(x, condition, self.settings.beta, None, 0, noise)
                    if self.settings.bound == "iwae":
                        noise = noise[0] if self.settings.samples == 1 else noise  # as a model takes that of one
                        out = self.evaluated.model(x, condition, samples=self.settings.samples, noise=noise)
                        parts = out.loss(x, reduction="sum", full=True, return_terms=True)
                        terms = terms._replace(nll=parts.nll, kl=parts.kl)
                sums += torch.stack(terms).double()
        if self.settings.fsdp:  # the outermost part stays whole after a forward pass, for a backward pass to come
            self.evaluated.reshard()  # type: ignore[operator]
        return self.group.sum(sums) / len(samples)

    def condition(self, labels: Tensor | None) -> Tensor | None:
        """What the model is told of samples with these labels."""
        return labels if self.settings.condition == "labels" else None

    def first_part(self) -> Batch:
        """Of the training samples in their own order, as many as are computed at a time."""
        size = min(-(-self.settings.batch // self.parts), len(self.train_samples))
        return next(self._batches(self.train_samples, [np.arange(size)]))

    def _train_step(self, batch: Batch) -> Tensor:
        """One step of the optimizer; returns (loss, NLL, KL) summed over this process's rows, without waiting for
        them."""
        x, labels = batch
        condition = self.condition(labels)
        settings, size = self.settings, self._size_of(self.step)
        done = self.epoch * self.steps_per_epoch + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr_at(done, self.steps_per_epoch)
        beta = settings.beta_at(done, self.steps_per_epoch)
        # Gradients are averaged over the processes, whose shares of the batch may differ: each gives those of its sum.
        factor = self.scaler.scale(torch.full((), self.group.size / size, device=self.device))
        offset, noise = self.group.rows(size).start * settings.latent, None
        if settings.samples > 1 or self.parts > 1 or settings.bound == "iwae":
            offset, noise = 0, self._noise(size)
        sums = self._no_sums()
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        count = self.parts
        cuts = [len(x) * part // count for part in range(count + 1)]
        for part, (start, end) in enumerate(pairwise(cuts)):
            rows = slice(start, end)
            with self._synchronising(part == count - 1):
                with settings.autocast():
                    terms = self._wrapped(
                        x[rows],
                        None if condition is None else condition[rows],
                        torch.full((), beta, device=self.device) if settings.compile else beta,  # else compiled in
                        factor,
                        offset,
                        None if noise is None else noise[..., rows, :],
                    )
                terms.loss.backward()
            sums += torch.stack([term.detach() for term in terms]).double()
        if settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return sums

    def _noise(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """This process's rows of the noise of a batch of ``size``, ``(..., rows, latent)``."""
        several = self.settings.samples > 1 or self.settings.bound == "iwae"
        shape = (*((self.settings.samples,) if several else ()), size, self.settings.latent)
        seed = ops.draw_seed(self._noise_device(), generator, by_dispatcher=False)
        dtype = self.settings.network_dtype
        noise = random.normal(shape, seed, dtype=dtype, device=self._noise_device())
        return noise[..., self.group.rows(size), :]

    def _noise_device(self) -> torch.device:
        """The device by its full name, as tensors say it."""
        return torch.empty((), device=self.device).device

    def _synchronising(self, synchronises: bool) -> AbstractContextManager[object]:
        """A block whose backward pass exchanges gradients, or leaves that to a later one."""
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext() if synchronises else self._wrapped.no_sync()
        if self.settings.fsdp:
            self.objective.set_requires_gradient_sync(synchronises)  # type: ignore[operator]
        return nullcontext()

    def _finish_epoch(self) -> None:
        train = self.group.sum(self.sums) / len(self.train_samples)
        heldout = self.evaluate(self.heldout_samples)
        self._check_finite(train[0], heldout)
        last_step = (self.epoch + 1) * self.steps_per_epoch - 1
        beta = self.settings.beta_at(last_step, self.steps_per_epoch)
        self.history.append(dict(zip(COLUMNS, (self.epoch + 1, beta, *train.tolist(), *heldout.tolist()), strict=True)))
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = self._no_sums()

    def _check_finite(self, *values: Tensor) -> None:
        if not all(torch.isfinite(value).all() for value in values):
            remedies = ["a lower --lr"]
            if self.settings.has_scale:
                bounds = {PER_PIXEL: "a higher --logvar-floor", LEARNED: "a --recon-clamp"}
                remedies.append(bounds.get(str(self.settings.recon_logvar), "a higher --recon-logvar"))
            raise CommandError(
                f"the loss is not finite any more in epoch {self.epoch + 1}: try {' or '.join(remedies)} "
                "(the checkpoint on the disk is from before)"
            )

    def _size_of(self, step: int) -> int:
        """How many samples a step has, those of all processes."""
        return min(self.settings.batch, len(self.train_samples) - step * self.settings.batch)

    def _order(self) -> list[np.ndarray]:
        """The indices of the training samples in each step of this epoch."""
        order = np.random.default_rng([self.settings.seed, self.epoch]).permutation(len(self.train_samples))
        return [order[start : start + self.settings.batch] for start in range(0, len(order), self.settings.batch)]

    def _batches(self, samples: Samples, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """This process's rows of each of the batches in ``order``."""
        mine = [indices[self.group.rows(len(indices))] for indices in order]
        workers, dtype = self.settings.workers, self.settings.data_dtype
        return batches(samples, mine, workers=workers, device=self.device, dtype=dtype)

    def _no_sums(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.device)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    _write_bytes(path, table.getvalue().encode("ascii"))


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


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
