"""Which code computes: the choice between backends, and the protocol that the kernel backends share.

`reference` is plain PyTorch and always there; `native` is the compiled extension; `triton` compiles at run time.
The public face is `backends`, `use_backend` and `BackendInfo`; the rest of the package calls `resolve`, once an
operation, and passes the name on, so that a backward pass runs where its forward pass did.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

NAMES = ("native", "triton", "reference")
"""Every backend, in the order in which "auto" tries them."""


class Objective(NamedTuple):
    """What an objective is, but for its operands."""

    is_variance: bool
    """Whether ``spread`` is the variance, not its logarithm."""
    eps: float
    """The variance's lower bound."""
    full: bool
    """Whether the NLL has its constant, log(2 pi) / 2 an element."""
    reduction: str
    """"sample" gives a value a sample, "element" a value an element (likelihood only), all else a total."""
    scale: float
    """What the total is multiplied by."""


class ElboOperands(NamedTuple):
    """Operands of an objective, then the buffers to fill; None where there is none, or none is wanted.

    Packed operands come whole: with ``spread`` None, ``recon_x`` holds mean and log-variance, halves along
    dimension 1, and so does its gradient; with ``logvar`` None, so does ``mu``. See `unpacked`.
    """

    recon_x: Tensor | None
    x: Tensor | None
    spread: Tensor | float | None
    """recon_logvar or the variance; a tensor broadcasts to recon_x's shape."""
    mu: Tensor | None
    logvar: Tensor | None
    kl_in: Tensor | None
    """The KL of each sample, instead of mu and logvar."""
    beta: Tensor | float | None
    loss: Tensor | None
    nll: Tensor | None
    kl: Tensor | None
    grad_recon_x: Tensor | None
    grad_x: Tensor | None
    grad_spread: Tensor | None
    """Of the tensor spread's own shape: the gradient is summed over the dimensions it is broadcast along."""
    grad_mu: Tensor | None
    grad_logvar: Tensor | None

    def unpacked(self) -> ElboOperands:
        """The same with packed operands as views of their halves."""
        operands = self
        if self.recon_x is not None and self.spread is None:
            (mean, spread), (grad, grad_spread) = halves(self.recon_x), halves(self.grad_recon_x)
            operands = operands._replace(recon_x=mean, spread=spread, grad_recon_x=grad, grad_spread=grad_spread)
        if self.mu is not None and self.logvar is None:
            (mu, logvar), (grad_mu, grad_logvar) = halves(self.mu), halves(self.grad_mu)
            operands = operands._replace(mu=mu, logvar=logvar, grad_mu=grad_mu, grad_logvar=grad_logvar)
        return operands


class NllOperands(NamedTuple):
    """Operands and gradient buffers of a likelihood, as in `ElboOperands`, and the weight of each value."""

    recon_x: Tensor
    x: Tensor
    spread: Tensor | float | None
    weight: Tensor
    """One for all, one a sample, or of x's shape."""
    grad_recon_x: Tensor | None
    grad_x: Tensor | None
    grad_spread: Tensor | None

    def unpacked(self) -> NllOperands:
        """The same with packed operands as views of their halves."""
        if self.spread is not None:
            return self
        (mean, spread), (grad, grad_spread) = halves(self.recon_x), halves(self.grad_recon_x)
        return self._replace(recon_x=mean, spread=spread, grad_recon_x=grad, grad_spread=grad_spread)


class LatentOperands(NamedTuple):
    """Operands of a pass over the latent, then the buffers to fill; None where there is none, or none is wanted.

    Packed operands come whole: with ``logvar`` None, ``mu`` and ``grad_mu`` hold both. See `unpacked`.
    """

    mu: Tensor
    logvar: Tensor | None
    noise: Tensor | None = None
    grad_z: Tensor | None = None
    grad_kl: Tensor | None = None
    z: Tensor | None = None
    kl: Tensor | None = None
    grad_mu: Tensor | None = None
    grad_logvar: Tensor | None = None

    def unpacked(self) -> LatentOperands:
        """The same with packed operands as views of their halves."""
        if self.logvar is not None:
            return self
        (mu, logvar), (grad_mu, grad_logvar) = halves(self.mu), halves(self.grad_mu)
        return self._replace(mu=mu, logvar=logvar, grad_mu=grad_mu, grad_logvar=grad_logvar)


def halves(packed: Tensor | None) -> tuple[Any, Any]:
    """The mean half and the log-variance half of a packed tensor, as views; of None, None."""
    if packed is None:
        return None, None
    first, second = packed.chunk(2, 1)
    return first, second


Memo = dict[Any, Any]
"""A place for what is worked out of a call's sizes, strides, dtypes and options.

The caller passes the same one to calls that agree in all of these, and an empty one where it keeps none."""


class KernelBackend(Protocol):
    """What a kernel backend can do. Callers allocate every output; operands may have any strides and dtypes."""

    def unavailable(self, device_type: str) -> str | None:
        """None if this backend serves the device type, else the reason and the remedy, in one sentence."""

    def describe(self, device_type: str) -> str:
        """What serves the device type, in a few words (the instruction set, the chip family)."""

    def normal(self, out: Tensor, seed: Tensor) -> None:
        """Fill ``out`` with the noise stream of ``seed`` (0-dim int64, on the same device)."""

    def latent(self, operands: LatentOperands, seed: Tensor | None, memo: Memo) -> None:
        """One pass over the latent: sample ``z``, per-sample ``kl``, gradients; each where asked for.

        The noise comes from ``seed`` or ``noise``; neither is needed if neither z nor grad_z is. The gradients are
        those of sum(grad_z * z) + sum(grad_kl * kl).
        """

    def elbo(self, objective: Objective, operands: ElboOperands, memo: Memo) -> None:
        """Fill loss = nll + beta * kl, and its terms where asked for, and the gradients of ``loss``.

        The KL comes from mu and logvar or, a value a sample, from ``kl_in``. Either half may be absent.
        """

    def nll_backward(self, objective: Objective, operands: NllOperands, memo: Memo) -> None:
        """Gradients of sum(weight * nll)."""

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor, memo: Memo) -> None:
        """Multiply each dense tensor by the 0-dim ``factor`` in place; touch nothing when it is 1. No host sync."""


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


def unavailable(name: str, device_type: str) -> str | None:
    """None if the backend serves the device type, else the reason and the remedy."""
    return None if name == "reference" else kernels(name).unavailable(device_type)


def current_choice() -> str:
    """What `use_backend` has chosen: a name, or "auto"."""
    return _choice


def resolve(device_type: str, requested: str | None = None) -> str:
    """The backend that serves the device type: the call's own choice, else that of `use_backend`.

    Raises RuntimeError, with reason and remedy, if a backend asked for by name is unavailable; "auto" cannot fail.
    """
    return _resolve(device_type, _choice if requested is None else checked_name(requested))


@torch.compiler.assume_constant_result  # what can serve a device does not change while a process lives
def _resolve(device_type: str, name: str) -> str:
    if name == "auto":
        return next(name for name in NAMES if unavailable(name, device_type) is None)
    checked_name(name, source="FUSEDVAE_BACKEND")  # all other names have been checked before
    reason = unavailable(name, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is unavailable for {device_type!r} tensors: {reason}")
    return name


def device_types() -> tuple[str, ...]:
    """The device types of this machine that PyTorch can use, as far as the package knows any of them."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def backends() -> dict[str, BackendInfo]:
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


def checked_name(name: str, *, source: str = "backend") -> str:
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

    def __init__(self, name: str) -> None:
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
