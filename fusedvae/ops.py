"""The operators: schemas, output allocation and kernels, registered with torch.library.

Five operators carry everything. Each allocates its outputs (the same code describes them to torch.compile),
takes packed operands apart, and hands plain tensors to the backend named by its last argument. The autograd
formulas are in `fusedvae.autograd`, the checks and conveniences in `fusedvae.functional`.

Optional operands come in pairs where a number may stand for a tensor: ``spread``/``spread_value`` (both None: the
decoder's output is packed) and ``beta``/``beta_value``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend
from .backend import Latents, Memo, Reconstruction
from .backend.reference import scale_of

_library = torch.library.Library("fusedvae", "DEF")


class Operator:
    """A registered operator, callable without the dispatcher's overhead where nothing needs the dispatcher.

    The dispatcher boxes and unboxes every argument of a Python kernel, twice with an autograd formula: for small
    tensors that would cost more than all the rest. So a plain eager call goes straight to the formula or the kernel,
    and through the dispatcher if a compiler traces, a mode watches, or the tensors are not plain.

    The arguments of an operator are its operands and, after them, its options, which are no tensors. Callers may pass
    a ``memo`` (see `backend.Memo`); it never reaches the dispatcher.
    """

    def __init__(self, name: str, kernel: Callable, operands: int) -> None:
        self.kernel = kernel
        self.formula: type[torch.autograd.Function] | None = None
        self.overload = getattr(torch.ops.fusedvae, name).default
        self._operands = operands
        self._returns_list = [str(r.type) for r in self.overload._schema.returns] == ["List[Tensor]"]

    def __call__(self, *operands: Any, options: tuple[Any, ...] = (), memo: Memo | None = None) -> Any:
        """Run with autograd."""
        if torch.compiler.is_compiling() or not _is_plain_eager(operands):
            return self.overload(*operands, *options)
        return self._differentiable(self.formula, operands, options, {} if memo is None else memo)

    def _differentiable(
        self,
        formula: type[torch.autograd.Function] | None,
        operands: tuple[Any, ...],
        options: tuple[Any, ...],
        memo: Memo,
    ) -> Any:
        if formula is None or not torch.is_grad_enabled() or not torch._C._any_requires_grad(*operands):
            return self.below_autograd(*operands, options=options, memo=memo)
        out = formula.apply(memo, options, *operands)
        return list(out) if self._returns_list else out

    def below_autograd(self, *operands: Any, options: tuple[Any, ...], memo: Memo) -> Any:
        """Run the kernel."""
        if _is_plain_eager(operands):
            return self.kernel(*operands, *options, memo=memo)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*operands, *options)

    def register_autograd(
        self, formula: type[torch.autograd.Function], *, registered: type[torch.autograd.Function] | None = None
    ) -> None:
        """Make ``formula`` the operator's derivative, and ``registered``, if another, that behind the dispatcher.

        A formula takes a memo, the tuple of options, and the operands.
        """
        self.formula = formula
        behind, count = registered or formula, self._operands

        def differentiable(*args: Any) -> Any:
            return self._differentiable(behind, args[:count], args[count:], {})

        _library.impl(self.overload._opname, differentiable, "Autograd")


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None), float, list, torch.device, torch.Generator))
"""Types of operands that are what they seem: no tracer's stand-ins, no tensor subclasses."""


def _is_plain_eager(operands: tuple[Any, ...]) -> bool:
    return (
        _PLAIN_TYPES.issuperset(map(type, operands))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _operator(
    operands: str, options: str, returns: str, *, fake: Callable, tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable], Operator]:
    """Register the decorated function as the operator of its name, and its kernel on every device type with kernels.

    The kernel takes the operands and options of the schema, and a ``memo``; ``fake`` takes the same but that, and
    makes the outputs alone.
    """

    def register(kernel: Callable) -> Operator:
        name = kernel.__name__
        arguments = ", ".join(filter(None, (operands, options)))
        _library.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag, *tags))
        for device in ("CPU", "CUDA"):
            _library.impl(name, lambda *args: kernel(*args, memo={}), device)
        torch.library.register_fake(f"fusedvae::{name}", fake, lib=_library)
        return Operator(name, kernel, operands.count(",") + 1)

    return register


# --- operands ---------------------------------------------------------------------------------------------------


def halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The mean half and the log-variance half of a packed tensor, as views."""
    first, second = packed.chunk(2, 1)
    return first, second


def unpack(mean: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, whether they came as two tensors or packed as one."""
    return halves(mean) if logvar is None else (mean, logvar)


def _reconstruction(
    recon_x: Tensor,
    x: Tensor,
    spread: Tensor | None,
    spread_value: float | None,
    is_variance: bool,
    eps: float,
    full: bool,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Reconstruction:
    grad_recon_x, grad_x, grad_spread = grads
    operand: Tensor | float
    if spread is not None:
        operand = spread
    elif spread_value is not None:
        operand = spread_value
    else:
        recon_x, operand = halves(recon_x)
        if grad_recon_x is not None:
            grad_recon_x, grad_spread = halves(grad_recon_x)
    return Reconstruction(recon_x, x, operand, is_variance, eps, full, grad_recon_x, grad_x, grad_spread)


def _latents(mu: Tensor, logvar: Tensor | None, grad_mu: Tensor | None, grad_logvar: Tensor | None) -> Latents:
    if logvar is None:
        mu, logvar = halves(mu)
        if grad_mu is not None:
            grad_mu, grad_logvar = halves(grad_mu)
    return Latents(mu, logvar, grad_mu, grad_logvar)


def _like(*operands: Tensor | None, needed: list[bool]) -> list[Tensor | None]:
    """A gradient buffer for each operand that needs one."""
    return [torch.empty_like(t) if need and t is not None else None for t, need in zip(operands, needed, strict=True)]


def _present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# --- noise ------------------------------------------------------------------------------------------------------


def _fake_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@_operator(
    "Device device, Generator? generator",
    "",
    "Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
    fake=_fake_seed,
)
def draw_seed(device: torch.device, generator: torch.Generator | None, *, memo: Memo) -> Tensor:
    """A 64-bit seed from torch's generator, kept on the device.

    An operator of its own, so that a compiled program draws the very seed that an eager one does.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


# No tensor argument tells the dispatcher which device this is for.
_library.impl("draw_seed", lambda *args: draw_seed.kernel(*args, memo={}), "BackendSelect")


def _normal_out(shape: list[int], seed: Tensor, dtype: torch.dtype, backend_name: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=seed.device)


@_operator("SymInt[] shape, Tensor seed", "ScalarType dtype, str backend", "Tensor", fake=_normal_out)
def normal(shape: list[int], seed: Tensor, dtype: torch.dtype, backend_name: str, *, memo: Memo) -> Tensor:
    """The noise stream of ``seed`` in a fresh tensor."""
    out = _normal_out(shape, seed, dtype, backend_name)
    backend.kernels(backend_name).normal(out, seed)
    return out


# --- the latent -------------------------------------------------------------------------------------------------


def _sample_like(mu: Tensor, logvar: Tensor | None) -> Tensor:
    if logvar is None:
        mu, logvar = halves(mu)
    return torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))


def _reparameterize_out(
    mu: Tensor, logvar: Tensor | None, seed: Tensor | None, noise: Tensor | None, backend_name: str
) -> Tensor:
    return _sample_like(mu, logvar)


@_operator("Tensor mu, Tensor? logvar, Tensor? seed, Tensor? noise", "str backend", "Tensor", fake=_reparameterize_out)
def reparameterize(
    mu: Tensor, logvar: Tensor | None, seed: Tensor | None, noise: Tensor | None, backend_name: str, *, memo: Memo
) -> Tensor:
    """z = mu + exp(logvar / 2) * noise, the noise given or made from the seed."""
    z = _sample_like(mu, logvar)
    backend.kernels(backend_name).latent(_latents(mu, logvar, None, None), seed=seed, noise=noise, z=z, memo=memo)
    return z


def _latent_out(
    mu: Tensor, logvar: Tensor | None, seed: Tensor, kl_dtype: torch.dtype, backend_name: str
) -> tuple[Tensor, Tensor]:
    return _sample_like(mu, logvar), mu.new_empty(mu.shape[:1], dtype=kl_dtype)


@_operator(
    "Tensor mu, Tensor? logvar, Tensor seed",
    "ScalarType kl_dtype, str backend",
    "(Tensor z, Tensor kl)",
    fake=_latent_out,
)
def latent(
    mu: Tensor, logvar: Tensor | None, seed: Tensor, kl_dtype: torch.dtype, backend_name: str, *, memo: Memo
) -> tuple[Tensor, Tensor]:
    """The sample and its KL to the standard normal, one value a sample, in one pass."""
    z, kl = _latent_out(mu, logvar, seed, kl_dtype, backend_name)
    backend.kernels(backend_name).latent(_latents(mu, logvar, None, None), seed=seed, z=z, kl=kl, memo=memo)
    return z, kl


def _latent_grads(
    mu: Tensor,
    logvar: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    backend_name: str,
) -> list[Tensor]:
    return _present(_like(mu, logvar, needed=[True, True]))


@_operator(
    "Tensor mu, Tensor? logvar, Tensor? seed, Tensor? noise, Tensor? grad_z, Tensor? grad_kl",
    "str backend",
    "Tensor[]",
    fake=_latent_grads,
)
def latent_backward(
    mu: Tensor,
    logvar: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    backend_name: str,
    *,
    memo: Memo,
) -> list[Tensor]:
    """Gradients of sum(grad_z * z) + sum(grad_kl * kl): of mu and logvar, or of the packed tensor."""
    grads = _latent_grads(mu, logvar, seed, noise, grad_z, grad_kl, backend_name)
    backend.kernels(backend_name).latent(
        _latents(mu, logvar, grads[0], grads[-1]), seed=seed, noise=noise, grad_z=grad_z, grad_kl=grad_kl, memo=memo
    )
    return grads


# --- the bound --------------------------------------------------------------------------------------------------


def _elbo_out(
    recon_x: Tensor | None,
    x: Tensor | None,
    spread: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl_in: Tensor | None,
    reduction: str,
    dtype: torch.dtype,
    terms: bool,
    needed: list[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The value buffers, one or three, and the gradient buffers of the operands that need them."""
    witness = next(t for t in (x, mu, kl_in) if t is not None)
    count = 3 if terms else 1
    if reduction == "element":
        assert recon_x is not None
        values = [torch.empty_like(recon_x, dtype=dtype) for _ in range(count)]
    else:
        shape = witness.shape[:1] if reduction == "sample" else ()
        values = [witness.new_empty(shape, dtype=dtype) for _ in range(count)]
    return values, _like(recon_x, x, spread, mu, logvar, needed=needed)


def _fake_elbo(
    recon_x: Tensor | None,
    x: Tensor | None,
    spread: Tensor | None,
    spread_value: float | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl_in: Tensor | None,
    beta: Tensor | None,
    beta_value: float,
    is_variance: bool,
    eps: float,
    full: bool,
    reduction: str,
    dtype: torch.dtype,
    terms: bool,
    needed: list[bool],
    backend_name: str,
) -> list[Tensor]:
    values, grads = _elbo_out(recon_x, x, spread, mu, logvar, kl_in, reduction, dtype, terms, needed)
    return values + _present(grads)


@_operator(
    "Tensor? recon_x, Tensor? x, Tensor? spread, float? spread_value, Tensor? mu, Tensor? logvar, Tensor? kl_in, "
    "Tensor? beta, float beta_value",
    "bool is_variance, float eps, bool full, str reduction, ScalarType dtype, bool terms, bool[] needed, str backend",
    "Tensor[]",
    fake=_fake_elbo,
)
def elbo(
    recon_x: Tensor | None,
    x: Tensor | None,
    spread: Tensor | None,
    spread_value: float | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl_in: Tensor | None,
    beta: Tensor | None,
    beta_value: float,
    is_variance: bool,
    eps: float,
    full: bool,
    reduction: str,
    dtype: torch.dtype,
    terms: bool,
    needed: list[bool],
    backend_name: str,
    *,
    memo: Memo,
) -> list[Tensor]:
    """loss = nll + beta * kl: the value (with ``terms``: loss, nll, kl), then the gradients of loss.

    A gradient follows for each of recon_x, x, spread, mu, logvar that is ``needed``. Without mu, the KL is that of
    ``kl_in`` (a value a sample) or absent; without recon_x, the NLL is absent.
    """
    values, grads = _elbo_out(recon_x, x, spread, mu, logvar, kl_in, reduction, dtype, terms, needed)
    reconstruction = latents = None
    scale = 1.0
    if recon_x is not None and x is not None:
        buffers = (grads[0], grads[1], grads[2])
        reconstruction = _reconstruction(recon_x, x, spread, spread_value, is_variance, eps, full, buffers)
        scale = scale_of(reduction, x.shape)
    if mu is not None:
        latents = _latents(mu, logvar, grads[3], grads[4])
        scale = scale_of(reduction, mu.shape)
    loss, nll, kl = values if terms else (values[0], None, None)
    weight = beta_value if beta is None else beta
    backend.kernels(backend_name).elbo(reconstruction, latents, kl_in, weight, reduction, scale, loss, nll, kl, memo)
    return values + _present(grads)


def _nll_grads(
    recon_x: Tensor,
    x: Tensor,
    spread: Tensor | None,
    spread_value: float | None,
    weight: Tensor,
    is_variance: bool,
    eps: float,
    needed: list[bool],
    backend_name: str,
) -> list[Tensor]:
    return _present(_like(recon_x, x, spread, needed=needed))


@_operator(
    "Tensor recon_x, Tensor x, Tensor? spread, float? spread_value, Tensor weight",
    "bool is_variance, float eps, bool[] needed, str backend",
    "Tensor[]",
    fake=_nll_grads,
)
def nll_backward(
    recon_x: Tensor,
    x: Tensor,
    spread: Tensor | None,
    spread_value: float | None,
    weight: Tensor,
    is_variance: bool,
    eps: float,
    needed: list[bool],
    backend_name: str,
    *,
    memo: Memo,
) -> list[Tensor]:
    """Gradients of sum(weight * nll) for each of recon_x, x, spread that is ``needed``.

    ``weight`` is 0-dim, one value a sample, or of x's shape.
    """
    grads = _like(recon_x, x, spread, needed=needed)
    reconstruction = _reconstruction(
        recon_x, x, spread, spread_value, is_variance, eps, False, (grads[0], grads[1], grads[2])
    )
    backend.kernels(backend_name).nll_backward(reconstruction, weight)
    return _present(grads)
