"""The processes that train together, started by torchrun: who they are, and how they agree."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CommandError, LostProcessError

T = TypeVar("T")


class Alone:
    """The one process of a run; and what a group of them can do."""

    rank, size, local_rank = 0, 1, 0
    to_go_on = ""
    """What to say beside that a process was lost."""
    is_broken = False
    """Whether one was: to close the group would be to wait for it."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's part of ``count`` rows: stretches in the order of the ranks, of sizes that differ by one at
        most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return value

    def agree(self, *wishes: int) -> tuple[int, ...]:
        """The largest of each of some numbers over all processes, for a loop to ask in every turn: it waits for nobody,
        and answers what was asked in the turn before."""
        return wishes

    def agree_now(self, *wishes: int) -> tuple[int, ...]:
        """The same, of this very turn."""
        return wishes

    def shared(self, value: T) -> T:
        """The first process's value."""
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends in a CommandError in every process if it does in one of them."""
        yield

    def close(self) -> None:
        """From here on each process is alone."""


class Group(Alone):
    """The processes of torchrun, this one among them.

    Tensors on GPUs go through NCCL; what the processes agree on is on the CPU and goes through gloo in a group of its
    own, so that nobody waits for a GPU for it, and the end of a process is noticed at once.
    """

    def __init__(self, device_type: str) -> None:
        self.local_rank = int(os.environ["LOCAL_RANK"])
        try:
            if device_type == "cuda":
                torch.cuda.set_device(self.local_rank)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
            self._control = dist.new_group(backend="gloo")
        except (RuntimeError, ValueError) as error:
            raise CommandError(f"the processes cannot be joined: {_first_line(error)}") from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._asked: tuple[Tensor, Any] | None = None

    def sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def agree(self, *wishes: int) -> tuple[int, ...]:
        answer = self._answer() if self._asked else (0,) * len(wishes)
        numbers = torch.tensor(wishes)
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._asked = numbers, work
        return answer

    def agree_now(self, *wishes: int) -> tuple[int, ...]:
        before = self._answer() if self._asked else (0,) * len(wishes)
        numbers = torch.tensor([*map(max, wishes, before)])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._control)
        return tuple(numbers.tolist())

    def _answer(self) -> tuple[int, ...]:
        assert self._asked is not None
        (numbers, work), self._asked = self._asked, None
        work.wait()
        return tuple(numbers.tolist())

    def shared(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, group=self._control)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        problem = None
        try:
            yield
        except CommandError as error:
            problem = str(error)
        problems: list[str | None] = [None] * self.size
        dist.all_gather_object(problems, problem, group=self._control)
        for rank, found in enumerate(problems):
            if found is not None:
                raise CommandError(found if rank == 0 else f"process {rank}: {found}")

    def close(self) -> None:
        if dist.is_initialized() and not self.is_broken:
            dist.destroy_process_group()


ALONE = Alone()


def speaks() -> bool:
    """Whether this process says what all processes of torchrun find alike; true of one that is alone."""
    return not _is_one_of_several() or os.environ.get("RANK") == "0"


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def joined(device: str) -> Alone:
    """The group that torchrun has put this process into; if there is none, it is alone.

    Args:
        device: the option, "auto", "cpu" or "cuda": with several processes, each has the GPU of its local rank.
    """
    if not _is_one_of_several():
        return ALONE
    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if number:
        raise CommandError(f"--device {device}: of several processes each has a GPU of its own: --device cuda")
    if kind == "cuda" and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise CommandError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', 'several')} processes on a machine of {torch.cuda.device_count()} "
            "GPUs: expected no more of them, or --device cpu"
        )
    return Group(kind)


@contextmanager
def noticing_losses(group: Alone) -> Iterator[None]:
    """A block that says in one line if another process of the group has ended: by way of what waited for it."""
    try:
        yield
    except RuntimeError as error:
        if group.size == 1 or not _is_of_communication(error):
            raise
        group.is_broken = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that are left: not before they say why
        reason = _first_line(error).split(". ")[0]
        raise LostProcessError(
            f"process {group.rank}: another process of this run has ended, or cannot be reached ({reason})"
            f"{group.to_go_on}"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "timed out", "closed by peer", "process group")
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
