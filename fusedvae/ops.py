"""The operators: schemas, output allocation and kernels, registered with torch.library.

Each allocates its outputs (the same code describes them to torch.compile) and hands them and its operands to the
backend that its last option names. The autograd formulas are in `fusedvae.autograd`, the checks and conveniences in
`fusedvae.functional`.

A log-variance may be None beside a mean: both are packed in the mean's tensor then, halves along dimension 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad

from . import backend
from .backend import ElboOperands, LatentOperands, Memo, NllOperands, Objective, halves
from .backend.reference import scale_of

_library = torch.library.Library("fusedvae", "DEF")


class Operator:
    """A registered operator, callable without the dispatcher's overhead where nothing needs the dispatcher.

    The dispatcher boxes and unboxes every argument of a Python kernel, twice with an autograd formula: for small
    tensors that would cost more than all the rest. So a plain eager call goes straight to the formula or the kernel,
    and through the dispatcher if a compiler traces, a mode watches, or the tensors are not plain.

    Kernels and formulas are called as ``f(memo, options, *operands)``: a `backend.Memo`, the arguments that are no
    operands, and the operands. The memo is None where a formula runs behind the dispatcher, which cannot pass one on.
    """

    def __init__(
        self, kernel: Callable, fake: Callable, operands: str, options: str, returns: str, tags: tuple[torch.Tag, ...]
    ) -> None:
        self.kernel = kernel
        self._record: Callable | None = None
        self._name = kernel.__name__
        self._kinds = [operand.rsplit(" ", 1)[0] for operand in operands.split(", ")]
        self._returns_list = returns.endswith("[]")
        arguments = ", ".join(filter(None, (_schema(operands), options)))
        _library.define(f"{self._name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag, *tags))
        for device in ("CPU", "CUDA"):
            _library.impl(self._name, self._behind_the_dispatcher(lambda *args: kernel({}, *args)), device)
        torch.library.register_fake(f"fusedvae::{self._name}", self._behind_the_dispatcher(fake), lib=_library)
        if options.endswith("str backend"):
            self._let_compilers_see_triton_kernels()
        self.overload = getattr(torch.ops.fusedvae, self._name).default

    def __call__(self, *operands: Any, options: tuple[Any, ...] = ()) -> Any:
        """Run, with autograd."""
        run = self._without_dispatcher(operands)
        return self._dispatch(options, *operands) if run is None else run({}, options, *operands)

    def prepared(self, *operands: Any, options: tuple[Any, ...] = ()) -> Callable[..., Any]:
        """What runs this on ``operands``, or any others of the same types, sizes, strides and dtypes.

        It may be used for as long as gradients are wanted as now and `is_watched` stays as it is.
        """
        run = self._without_dispatcher(operands)
        return partial(self._dispatch, options) if run is None else partial(run, {}, options)

    def _without_dispatcher(self, operands: tuple[Any, ...]) -> Callable | None:
        """The formula or the kernel, where nothing needs the dispatcher."""
        if is_watched() or not _PLAIN_TYPES.issuperset(map(type, operands)):
            return None
        return self._record if self._record and _wants_derivative(operands) else self.kernel

    def below_autograd(self, memo: Memo | None, options: tuple[Any, ...], *operands: Any) -> Any:
        """Run the kernel, for a formula that was called with ``memo``."""
        if memo is not None:
            return self.kernel(memo, options, *operands)
        with torch._C._AutoDispatchBelowAutograd():
            return self._dispatch(options, *operands)

    def register_autograd(self, formula: type[torch.autograd.Function]) -> None:
        """Make ``formula`` the operator's derivative."""
        # Its `apply` but for what that does for torch.func, which `is_watched` rules out.
        self._record = super(torch.autograd.Function, formula).apply  # type: ignore[misc]

        def run(options: tuple[Any, ...], *operands: Any) -> Any:
            record = formula.apply if _wants_derivative(operands) else self.below_autograd
            outputs = record(None, options, *operands)
            return list(outputs) if self._returns_list else outputs

        _library.impl(self._name, self._behind_the_dispatcher(run), "Autograd")

    def _let_compilers_see_triton_kernels(self) -> None:
        """Have a compiler trace through to Triton kernels, as `torch.library.triton_op` does, where it can read them.

        It passes numbers to them in float32 and plans for sizes that are known: otherwise, and for all other backends,
        the operator stays whole in its graph.
        """
        if not hasattr(torch.library, "wrap_triton"):
            return
        kernel = self._behind_the_dispatcher(lambda *args: self.kernel({}, *args))

        def traced(mode: Any, overload: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
            if args[-1] != "triton" or not _is_readable([t for t in args if isinstance(t, Tensor)]):
                return mode.__torch_dispatch__(overload, types, args, kwargs)
            from .backend import triton  # not before somebody uses it: it is slow to import

            with mode, triton.traced():
                return kernel(*args)

        torch.library.register_torch_dispatch(f"fusedvae::{self._name}", FunctionalTensorMode, traced, lib=_library)

    def _dispatch(self, options: tuple[Any, ...], *operands: Any) -> Any:
        flat: list[Any] = []
        for kind, operand in zip(self._kinds, operands, strict=True):
            flat.append(operand)
            if kind == _TENSOR_OR_NUMBER:
                flat[-1:] = (operand, None) if operand is None or isinstance(operand, Tensor) else (None, operand)
        return self.overload(*flat, *options)

    def _behind_the_dispatcher(self, function: Callable) -> Callable:
        """``function`` of options and operands as a function of the schema's arguments."""

        def run(*arguments: Any) -> Any:
            rest = list(arguments)
            operands = []
            for kind in self._kinds:
                operand = rest.pop(0)
                if kind == _TENSOR_OR_NUMBER:
                    number = rest.pop(0)
                    operand = number if operand is None else operand
                operands.append(operand)
            return function(tuple(rest), *operands)

        return run


_TENSOR_OR_NUMBER = "Tensor|float?"
"""The kind of an operand that may be a tensor, a number or absent: of two arguments in a schema."""


def _schema(operands: str) -> str:
    def arguments(operand: str) -> str:
        kind, name = operand.rsplit(" ", 1)
        return f"Tensor? {name}, float? {name}_value" if kind == _TENSOR_OR_NUMBER else operand

    return ", ".join(map(arguments, operands.split(", ")))


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None), float, int, list, torch.device, torch.Generator))
"""Types of operands that are what they seem: no tracer's stand-ins, no tensor subclasses."""


def _wants_derivative(operands: tuple[Any, ...]) -> bool:
    """Whether autograd must record what is done to these."""
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in operands)
    # PyTorch has the formula say that it knows no forward mode, rather than lose a tangent.
    return wanted or (forward_ad._current_level >= 0 and any(map(_has_tangent, operands)))


def _has_tangent(operand: Any) -> bool:
    return isinstance(operand, Tensor) and forward_ad.unpack_dual(operand).tangent is not None


def _is_readable(operands: list[Tensor]) -> bool:
    """Whether a compiler can read the Triton kernels that run on some operands.

    A program that is traced to be stored could not keep them, and interpreted kernels are none.
    """
    sizes = [size for t in operands for size in (*t.shape, *t.stride())]
    return (
        all(t.dtype != torch.float64 for t in operands)
        and all(type(size) is int for size in sizes)
        and not (hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting())
        and os.environ.get("TRITON_INTERPRET") != "1"
    )


def is_watched() -> bool:
    """Whether something must see operators called: a compiler, a transform of torch.func, a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _operator(
    operands: str, options: str, returns: str, *, fake: Callable, tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable], Operator]:
    """Register the decorated function as the kernel of the operator of its name, on every device type with kernels.

    ``fake`` is called as the kernel is, without a memo, and makes the outputs.
    """
    return lambda kernel: Operator(kernel, fake, operands, options, returns, tags)


# --- outputs ----------------------------------------------------------------------------------------------------


def _like(operands: tuple[Any, ...], needed: list[bool]) -> list[Tensor | None]:
    """A gradient buffer for each operand that needs one."""
    return [torch.empty_like(t) if need else None for t, need in zip(operands, needed)]  # noqa: B905 - a hot path


def positions(flags: list[bool]) -> list[int]:
    """Of those that are set."""
    return [k for k, flag in enumerate(flags) if flag]


def _present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# --- noise ------------------------------------------------------------------------------------------------------


def _fake_seed(options: tuple, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@_operator(
    "Device device, Generator? generator",
    "",
    "Tensor",
    fake=_fake_seed,
    tags=(torch.Tag.nondeterministic_seeded,),
)
def draw_seed(memo: Memo, options: tuple, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A 64-bit seed from torch's generator, kept on the device.

    An operator of its own, so that a compiled program draws the very seed that an eager one does.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


# No tensor argument tells the dispatcher which device this is for.
_library.impl("draw_seed", lambda *operands: draw_seed.kernel({}, (), *operands), "BackendSelect")


def _normal_out(options: tuple, shape: list[int], seed: Tensor) -> Tensor:
    return torch.empty(shape, dtype=options[0], device=seed.device)


@_operator("SymInt[] shape, Tensor seed", "ScalarType dtype, str backend", "Tensor", fake=_normal_out)
def normal(memo: Memo, options: tuple, shape: list[int], seed: Tensor) -> Tensor:
    """The noise stream of ``seed`` in a fresh tensor."""
    out = _normal_out(options, shape, seed)
    backend.kernels(options[-1]).normal(out, seed)
    return out


# --- the latent -------------------------------------------------------------------------------------------------


def unpack(mean: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, whether they came as two tensors or packed as one."""
    return halves(mean) if logvar is None else (mean, logvar)


def _sample_like(mu: Tensor, logvar: Tensor | None) -> Tensor:
    if logvar is None:
        return torch.empty_like(halves(mu)[0])
    if mu.dtype is logvar.dtype:
        return torch.empty_like(mu)
    return torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))


def _blanks(memo: Memo, make: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
    """Tensors like those that ``make`` makes, without working out again what they are like."""
    found = memo.get("blanks")
    if found is None:
        found = memo["blanks"] = [(t.shape, t.stride(), t.dtype, t.device) for t in make()]
    return [torch.empty_strided(*like, dtype=dtype, device=device) for *like, dtype, device in found]


def _reparameterize_out(
    options: tuple, mu: Tensor, logvar: Tensor | None, seed: Tensor | None, noise: Tensor | None
) -> Tensor:
    return _sample_like(mu, logvar)


@_operator("Tensor mu, Tensor? logvar, Tensor? seed, Tensor? noise", "str backend", "Tensor", fake=_reparameterize_out)
def reparameterize(
    memo: Memo, options: tuple, mu: Tensor, logvar: Tensor | None, seed: Tensor | None, noise: Tensor | None
) -> Tensor:
    """z = mu + exp(logvar / 2) * noise, the noise given or made from the seed."""
    (z,) = _blanks(memo, lambda: (_sample_like(mu, logvar),))
    backend.kernels(options[-1]).latent(LatentOperands(mu, logvar, noise, z=z), seed, memo)
    return z


def _latent_out(options: tuple, mu: Tensor, logvar: Tensor | None, seed: Tensor) -> tuple[Tensor, Tensor]:
    return _sample_like(mu, logvar), mu.new_empty(mu.shape[:1], dtype=options[0])


@_operator(
    "Tensor mu, Tensor? logvar, Tensor seed",
    "ScalarType kl_dtype, str backend",
    "(Tensor z, Tensor kl)",
    fake=_latent_out,
)
def latent(memo: Memo, options: tuple, mu: Tensor, logvar: Tensor | None, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The sample and its KL to the standard normal, one value a sample, in one pass."""
    z, kl = _blanks(memo, lambda: _latent_out(options, mu, logvar, seed))
    backend.kernels(options[-1]).latent(LatentOperands(mu, logvar, z=z, kl=kl), seed, memo)
    return z, kl


def _latent_grads(
    options: tuple,
    mu: Tensor,
    logvar: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
) -> list[Tensor]:
    return [torch.empty_like(mu)] if logvar is None else [torch.empty_like(mu), torch.empty_like(logvar)]


@_operator(
    "Tensor mu, Tensor? logvar, Tensor? seed, Tensor? noise, Tensor? grad_z, Tensor? grad_kl",
    "str backend",
    "Tensor[]",
    fake=_latent_grads,
)
def latent_backward(
    memo: Memo,
    options: tuple,
    mu: Tensor,
    logvar: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
) -> list[Tensor]:
    """Gradients of sum(grad_z * z) + sum(grad_kl * kl): of mu and logvar, or of the packed tensor."""
    grads = _latent_grads(options, mu, logvar, seed, noise, grad_z, grad_kl)
    operands = LatentOperands(mu, logvar, noise, grad_z, grad_kl, None, None, *grads)
    backend.kernels(options[-1]).latent(operands, seed, memo)
    return grads


# --- the bound --------------------------------------------------------------------------------------------------


class _ElboRecipe(NamedTuple):
    """How the operator runs on operands of some sizes, strides and dtypes."""

    loss: Tensor | None
    """A tensor like its only value, if that is a total: nothing allocates one quicker than `torch.empty_like`."""
    needed: list[int]
    """The operands that need a gradient."""
    objective: Objective
    compute: Callable[[Objective, ElboOperands, Memo], None]


def _elbo_values(options: tuple, operands: tuple[Any, ...]) -> list[Tensor]:
    _, _, _, reduction, dtype, terms, _, _ = options
    recon_x, x, _, mu, _, _, _ = operands
    if reduction == "element":
        loss = torch.empty_like(recon_x, dtype=dtype)
    else:
        witness = mu if x is None else x
        loss = witness.new_empty(witness.shape[:1] if reduction == "sample" else (), dtype=dtype)
    return [loss, torch.empty_like(loss), torch.empty_like(loss)] if terms else [loss]


def _elbo_recipe(options: tuple, operands: tuple[Any, ...]) -> _ElboRecipe:
    is_variance, eps, full, reduction, _, terms, needed, name = options
    witness = operands[3] if operands[1] is None else operands[1]
    return _ElboRecipe(
        None if terms or reduction in ("sample", "element") else _elbo_values(options, operands)[0],
        positions(needed),
        Objective(is_variance, eps, full, reduction, scale_of(reduction, witness.shape)),
        backend.kernels(name).elbo,
    )


def _fake_elbo(options: tuple, *operands: Any) -> list[Tensor]:
    return _elbo_values(options, operands) + _present(_like(operands, options[6]))


@_operator(
    "Tensor? recon_x, Tensor? x, Tensor|float? spread, Tensor? mu, Tensor? logvar, Tensor? kl_in, Tensor|float? beta",
    "bool is_variance, float eps, bool full, str reduction, ScalarType dtype, bool terms, bool[] needed, str backend",
    "Tensor[]",
    fake=_fake_elbo,
)
def elbo(memo: Memo, options: tuple, *operands: Any) -> list[Tensor]:
    """loss = nll + beta * kl: the value (with ``terms``: loss, nll, kl), then the gradients of loss.

    A gradient follows for each of recon_x, x, spread, mu, logvar that is ``needed``. Without mu, the KL is that of
    ``kl_in`` (a value a sample) or absent; without recon_x, the NLL is absent.
    """
    recipe = memo.get("recipe")
    if recipe is None:
        recipe = memo["recipe"] = _elbo_recipe(options, operands)
    values = _elbo_values(options, operands) if recipe.loss is None else [torch.empty_like(recipe.loss)]
    grads: list[Tensor | None] = [None] * 5
    for k in recipe.needed:
        grads[k] = torch.empty_like(operands[k])
    terms = values if len(values) == 3 else (values[0], None, None)
    recipe.compute(recipe.objective, ElboOperands._make((*operands, *terms, *grads)), memo)
    return values + _present(grads)


def _nll_grads(
    options: tuple, recon_x: Tensor, x: Tensor, spread: Tensor | float | None, weight: Tensor
) -> list[Tensor]:
    return _present(_like((recon_x, x, spread), options[2]))


@_operator(
    "Tensor recon_x, Tensor x, Tensor|float? spread, Tensor weight",
    "bool is_variance, float eps, bool[] needed, str backend",
    "Tensor[]",
    fake=_nll_grads,
)
def nll_backward(
    memo: Memo, options: tuple, recon_x: Tensor, x: Tensor, spread: Tensor | float | None, weight: Tensor
) -> list[Tensor]:
    """Gradients of sum(weight * nll) for each of recon_x, x, spread that is ``needed``.

    ``weight`` is 0-dim, one value a sample, or of x's shape.
    """
    is_variance, eps, needed, name = options
    grads = _like((recon_x, x, spread), needed)
    objective = Objective(is_variance, eps, False, "element", 1.0)
    backend.kernels(name).nll_backward(objective, NllOperands(recon_x, x, spread, weight, *grads), memo)
    return _present(grads)
