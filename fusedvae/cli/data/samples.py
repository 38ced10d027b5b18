"""Samples wherever they are: held in memory, or read as they are asked for, by worker processes if need be."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import CommandError
from .preparation import Preparation

MOST_IN_MEMORY = 2**28
"""Bytes up to which data are read once and held; larger ones are read again in every epoch."""

MOST_WORKERS = 8
"""That are started unasked."""


class Source(Protocol):
    """Where samples come from. Sent to worker processes, so that it holds no open files."""

    decodes: bool
    """Whether reading takes so long that other processes had better do it."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray | slice) -> Tensor:
        """Samples as they are stored: uint8, or float32 in [0, 1]."""

    def fingerprint(self) -> str:
        """The same for the same data, wherever they lie."""


class InMemory:
    """Samples in one tensor."""

    decodes = False

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def read(self, indices: np.ndarray | slice) -> Tensor:
        return torch.from_numpy(self.values.numpy()[indices])  # by NumPy, as in Preparation.finished

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.values.dtype} {tuple(self.values.shape)}".encode())
        digest.update(self.values.contiguous().numpy().data)
        return digest.hexdigest()


def held_if_small(source: Source, preparation: Preparation) -> Source:
    """``source`` itself, or its samples in memory."""
    dtype = source.read(slice(1)).dtype
    shape = (len(source), *preparation.shape)
    if int(np.prod(shape, dtype=object)) * dtype.itemsize > MOST_IN_MEMORY:
        return source
    values = torch.empty(shape, dtype=dtype)
    for start in range(0, len(source), 64):
        values[start : start + 64] = source.read(slice(start, start + 64))
    return InMemory(values)


class Samples(Dataset[Any]):
    """Samples in [0, 1], of one shape. A map-style dataset: an item is a sample, or a pair (sample, label) where
    there are labels; `batch` and `batches` give many at a time.

    Args:
        labels: a class a sample of ``source``, int64.
        index: which samples of ``source`` these are; all of them if None.
    """

    def __init__(
        self,
        source: Source,
        preparation: Preparation,
        labels: Tensor | None = None,
        *,
        index: np.ndarray | None = None,
    ) -> None:
        self.source, self.preparation = source, preparation
        self._labels, self._index = labels, index

    def __len__(self) -> int:
        return len(self.source) if self._index is None else len(self._index)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        position = range(len(self))[index]
        sample = self.batch(np.array([position]))[0]
        return sample if self.labels is None else (sample, self.labels[position])

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of one sample."""
        return self.preparation.shape

    @property
    def labels(self) -> Tensor | None:
        """The classes of these samples: numbers from 0, of which ``preparation.classes`` has the names."""
        if self._labels is None or self._index is None:
            return self._labels
        return self._labels[torch.from_numpy(self._index)]

    @property
    def values(self) -> Tensor:
        """All of the samples as they are stored: uint8, or float32 in [0, 1]."""
        return self.stored(slice(None))

    def subset(self, indices: np.ndarray | slice) -> Samples:
        index = np.arange(len(self.source)) if self._index is None else self._index
        return Samples(self.source, self.preparation, self._labels, index=index[indices])

    def stored(self, indices: np.ndarray | slice) -> Tensor:
        """Samples as they are stored, before ``preparation.finished``."""
        return self.source.read(indices if self._index is None else self._index[indices])

    def batch(
        self,
        indices: np.ndarray | slice,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The samples at ``indices``, in [0, 1]."""
        return self.preparation.finished(self.stored(indices), device, dtype)

    def fingerprint(self) -> str:
        """Two sets of samples with the same one are the same: a hash of all values that are held in memory, of some and
        of the sizes of those that are not, and of all labels."""
        found = self.source.fingerprint()
        if self._labels is None:
            return found
        names = json.dumps([found, *self.preparation.classes]).encode()
        return hashlib.sha256(names + self._labels.numpy().tobytes()).hexdigest()


class _StoredBatches(Dataset[Any]):
    """What worker processes make: a batch for every array of indices."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, indices: np.ndarray) -> Tensor | CommandError:
        try:
            return self.samples.stored(indices)
        except CommandError as error:
            return error  # raised by the main process: a worker's exceptions come with a traceback in their message


_LEFT_TO_THE_MAIN_PROCESS = (signal.SIGINT, signal.SIGTERM)
"""It lets a step end and saves, and then ends its workers. Ctrl-C, schedulers and `timeout` send these to all processes
of a group."""


def _start_worker(number: int) -> None:
    for name in _LEFT_TO_THE_MAIN_PROCESS:
        signal.signal(name, signal.SIG_IGN)


def default_workers(samples: Samples) -> int:
    """Worker processes where none are asked for: none unless samples must be decoded."""
    if not samples.source.decodes:
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)


def batches(
    samples: Samples,
    order: Sequence[np.ndarray],
    *,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches ``(samples, labels)`` for the arrays of indices in ``order``, one after the other.

    The same for any number of ``workers`` (None: what the data need). Draws no random numbers.
    """
    loader: DataLoader[Any] = DataLoader(
        _StoredBatches(samples),
        sampler=order,
        batch_size=None,  # an item is a batch
        num_workers=min(default_workers(samples) if workers is None else workers, len(order)),
        worker_init_fn=_start_worker,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # not the default one, of which it would draw a seed
    )
    labels = samples.labels
    for indices, stored in zip(order, _read(loader), strict=True):
        if isinstance(stored, CommandError):
            raise stored
        of_batch = None if labels is None else labels[torch.from_numpy(indices)].to(device, non_blocking=True)
        yield samples.preparation.finished(stored, device, dtype), of_batch


def _read(loader: DataLoader[Any]) -> Iterator[Any]:
    # Workers inherit the mask, so that no signal finds them before they ignore it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_MAIN_PROCESS)
    try:
        loading = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield from loading
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise CommandError(f"a process that reads the data has ended: {error}: try --workers 0") from error


def in_order(samples: Samples, size: int) -> list[np.ndarray]:
    """Indices of all samples, ``size`` at a time."""
    return [np.arange(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
