"""Which code computes: the choice between backends, and the protocol that the kernel backends share.

`reference` is plain PyTorch and always there; `native` is the compiled extension; `triton` compiles at run time.
The public face is `backends`, `use_backend` and `BackendInfo`; the rest of the package calls `resolve`, once an
operation, and passes the name on, so that a backward pass runs where its forward pass did.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedvae.torch_private import assumed_constant
from fusedvae.typing import Backend

from . import reference, specs

NAMES: tuple[Backend, ...] = ("native", "triton", "reference")
"""Every backend, in the order in which "auto" tries them."""


# --- what a backend is asked to prepare ---------------------------------------------------------------------------


class Part(NamedTuple):
    """What kernels take for an operand: one of the call's sources, or half of a packed one."""

    source: int
    """Its position among the sources."""
    shape: torch.Size | None
    """Of the part itself; None for a number. It may have dimensions of size 1 that the source has not."""
    strides: tuple[int, ...]
    dtype: torch.dtype | None
    half: int | None = None
    """Which half of the source; None for the whole."""
    dim: int = 1
    """The dimension that the halves are along."""

    @property
    def is_number(self) -> bool:
        return self.shape is None

    @property
    def offset(self) -> int:
        """Where the part begins in its source, in bytes."""
        if not self.half:
            return 0
        assert self.shape is not None
        assert self.dtype is not None
        return self.shape[self.dim] * self.strides[self.dim] * self.dtype.itemsize

    def of(self, sources: Sequence[Any]) -> Any:
        """The tensor, or a view of it, or the number."""
        source = sources[self.source]
        return source if self.half is None else specs.halves(source, self.dim)[self.half]

    def with_ones(self, dim: Sequence[int]) -> Part:
        """The part with more dimensions, of size 1: these, counted in the result."""
        assert self.shape is not None
        sizes, steps = list(self.shape), list(self.strides)
        for d in sorted(dim):
            sizes.insert(d, 1)
            steps.insert(d, 0)
        return self._replace(shape=torch.Size(sizes), strides=tuple(steps))

    def halves(self, dim: int) -> tuple[Part, Part]:
        """The parts of a mean and a scale that are packed in this one."""
        assert self.shape is not None
        half = specs.half_of(self.shape, dim)
        return self._replace(shape=half, half=0, dim=dim), self._replace(shape=half, half=1, dim=dim)


class TermWork(NamedTuple):
    """A term of an objective: the sum of a formula's values, or of values that are given, and its gradients."""

    formula: reference.Formula
    in_double: bool
    """Whether the arithmetic is done in float64, else float32."""
    inputs: tuple[Part, ...]
    """The formula's; the first has the shape that all are walked over, the others broadcast to it."""
    grads: tuple[Part | None, ...]
    """Of each input, where it is wanted: of the input's own shape, summed over what that is broadcast along."""
    forms: tuple[reference.Form, ...] = ()
    """Of the formula's scales, in the order of its pairs."""
    gains: tuple[float, ...] | None = None
    """What each gradient of a divergence is multiplied by besides."""
    factor: float = 1.0
    """What the sum, and so the gradients, are multiplied by."""
    normalizer: Part | None = None
    """A further factor of both: one value; 1 without."""
    constant: float = 0.0
    """Added to each element's value, before that is weighted."""
    coefficient: Part | None = None
    """What the loss has the term times: one value; 1 without."""
    weight: Part | None = None
    """Of each element, in value and gradients; broadcasts to the shape. Where it is 0, so are these, whatever the
    inputs hold."""
    incoming: Part | None = None
    """A further weight of each element, in gradients alone, so that a term has this or values; broadcasts to the shape.
    (Beside a sample there may be both.)"""
    value: Part | None = None
    """Of the elements, summed over what it is broadcast along; where there is no objective of totals or samples."""
    out: Part | None = None
    """factor * normalizer * sum."""


class ObjectiveWork(NamedTuple):
    """loss = sum of coefficient * term, and the gradients of the loss."""

    terms: tuple[TermWork, ...]
    values: str
    """"total", "sample" (a value for each) or "element" (one term has its own values, and there is no loss)."""
    loss: Part | None
    grad_scale: Part | None = None
    """What all gradients are multiplied by: one value; 1 without."""


class LatentWork(NamedTuple):
    """One pass over the latent: the sample z = mean + deviation * noise, beside its divergence.

    Each output where it is there: z, the divergence's value, and the gradients of sum(grad_z * z) + sum(incoming *
    divergence), the divergence's own. The noise comes from a seed or is given; neither is needed if z and grad_z are
    absent and the divergence does not depend on the sample.
    """

    divergence: TermWork
    """Without factor and coefficient. The mean and the scale are its first two inputs."""
    shape: torch.Size
    """The shape of the sample; what is walked over. All parts broadcast to it."""
    at_sample: bool
    """Whether the divergence is log q(z) - log p(z) at the sample, whose mean is the divergence."""
    seed: Part | None = None
    offset: Part | None = None
    """The position of the first element in the noise stream: one number; 0 without."""
    noise: Part | None = None
    grad_z: Part | None = None
    z: Part | None = None


Launcher = Callable[[tuple[Any, ...]], None]
"""Runs what it was prepared for on sources (operands, then outputs) of the sizes, strides and dtypes that it was
prepared for."""


MOST_KEPT = 1 << 22
"""Bytes of a workspace that a backend may keep between launches. Where a million samples have sums of their own it is
larger, and new memory takes no time beside what such a launch does."""


class KernelBackend(Protocol):
    """What a kernel backend can do. Callers allocate every output and keep the launchers; operands may have any strides
    and dtypes. What prepares a launcher is told how many ``sources`` that will be given, and whether that
    ``keeps_workspace`` between its launches: behind the dispatcher, where a compiler may record launches in a CUDA
    graph and owns all memory that is made meanwhile, each launch takes one of its own."""

    def unavailable(self, device_type: str, index: int | None = None) -> str | None:
        """None if this backend serves the device (any of the type, without an index), else the reason and the remedy,
        in one sentence."""

    def describe(self, device_type: str) -> str:
        """What serves the device type, in a few words (the instruction set, the chip family)."""

    def normal(self, out: Tensor, seed: Tensor) -> None:
        """Fill ``out`` with the noise stream of ``seed`` (0-dim int64, on the same device)."""

    def prepare_latent(
        self, work: LatentWork, sources: int, device: torch.device, *, keeps_workspace: bool = True
    ) -> Launcher:
        """What does this work."""

    def prepare_objective(
        self, work: ObjectiveWork, sources: int, device: torch.device, *, keeps_workspace: bool = True
    ) -> Launcher:
        """What does this work."""

    def prepare_scale(
        self,
        tensors: Sequence[Part],
        factor: Part,
        device: torch.device,
        coefficient: Part | None = None,
        product: Part | None = None,
    ) -> Launcher:
        """What multiplies dense tensors by the 0-dim factor in place, all in one launch, and touches none of them when
        it is 1, without a host sync. The factor's product with a coefficient, a number, goes into another 0-dim tensor,
        if that is wanted."""


def of_gpu(reasons: Sequence[str | None], index: int | None) -> str | None:
    """Of why each GPU is not served, that of one GPU; without an index None if any is served."""
    if index is None:
        return None if None in reasons else reasons[0]
    return reasons[index]


# --- the choice -----------------------------------------------------------------------------------------------------


class BackendInfo(NamedTuple):
    """An available backend: what it is, and the device types it serves here."""

    description: str
    devices: tuple[str, ...]


_loaded: dict[str, KernelBackend] = {}
_choice = os.environ.get("FUSEDVAE_BACKEND") or "auto"  # checked when it is used: a wrong one must not stop an import


def kernels(name: str) -> KernelBackend:
    """The kernel backend of that name (never "reference": that one has formulas, not kernels)."""
    found = _loaded.get(name)
    if found is None:
        found = _loaded[name] = import_module(f"fusedvae.backend.{name}").BACKEND
    return found


def unavailable(name: str, device_type: str, index: int | None = None) -> str | None:
    """None if the backend serves that device, or without an index any of the type; else the reason and the remedy."""
    return None if name == "reference" else kernels(name).unavailable(device_type, index)


def current_choice() -> str:
    """What `use_backend` has chosen: a name, or "auto"."""
    return _choice


def resolve(device_type: str, requested: str | None = None, *, index: int | None = None) -> str:
    """The backend that serves the device (any of the type, without an index): the call's own choice, else that of
    `use_backend`.

    Raises RuntimeError, with reason and remedy, if a backend asked for by name is unavailable; "auto" cannot fail.
    """
    return _resolve(device_type, index, _choice if requested is None else checked_name(requested))


@assumed_constant  # what can serve a device does not change while a process lives
def _resolve(device_type: str, index: int | None, name: str) -> str:
    if name == "auto":
        found = next(name for name in NAMES if unavailable(name, device_type, index) is None)
        if found == "reference" and device_type in ("cpu", "cuda"):
            _warn_without_kernels(device_type, index)
        return found
    checked_name(name, source="FUSEDVAE_BACKEND")  # all other names have been checked before
    reason = unavailable(name, device_type, index)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is unavailable for {device_type!r} tensors: {reason}")
    return name


_has_warned = False


def _warn_without_kernels(device_type: str, index: int | None) -> None:
    """Say once that nothing is fused where it could be, and what to do about it."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"fusedvae computes in plain PyTorch on {device_type!r}, as right and not as fast: "
            f"{unavailable('native', device_type, index)}",
            stacklevel=4,
        )


def device_types() -> tuple[str, ...]:
    """The device types of this machine that PyTorch can use, as far as the package knows any of them."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def backends() -> dict[Backend, BackendInfo]:
    """The backends available on this machine, best first: name -> (description, device types served).

    >>> list(fusedvae.backends())  # doctest: +SKIP
    ['native', 'reference']
    """
    found = {}
    for name in NAMES:
        served = tuple(device for device in device_types() if unavailable(name, device) is None)
        if served:
            description = "; ".join(dict.fromkeys(describe(name, device) for device in served))
            found[name] = BackendInfo(description, served)
    return found


def describe(name: str, device_type: str) -> str:
    """What a backend uses on a device type, in a few words."""
    return "plain PyTorch" if name == "reference" else kernels(name).describe(device_type)


def checked_name(name: str, *, source: str = "backend") -> Backend:
    """A name that `use_backend` takes. Raises TypeError or ValueError for another, which came from ``source``."""
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected a name, got {type(name).__name__}")
    if name not in ("auto", *NAMES):
        raise ValueError(f"{source}: expected one of 'auto', {', '.join(map(repr, NAMES))}; got {name!r}")
    return name


class use_backend:  # noqa: N801 - reads as a function at the call site, like torch.set_grad_enabled
    """Choose the backend of every operation that follows: "auto", "native", "triton" or "reference".

    As a function call it holds until the next one; as a context manager, until the block ends. The environment
    variable FUSEDVAE_BACKEND sets the initial choice, "auto" without it; operations, not the import, raise for a wrong
    one. The choice is one for the process.

    Raises ValueError for a name that is none of these, RuntimeError (with reason and remedy) for a backend that
    no device of this machine can use.
    """

    def __init__(self, name: Backend) -> None:
        global _choice
        if checked_name(name) != "auto" and all(unavailable(name, device) for device in device_types()):
            reasons = "; ".join(f"{device}: {unavailable(name, device)}" for device in device_types())
            raise RuntimeError(f"backend {name!r} is unavailable: {reasons}")
        self._previous, _choice = _choice, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._previous
