"""The operators as PyTorch knows them: what compilers, tracers and modes see of the package.

Each takes a list of operands and the fields of what the call is (a NamedTuple of `fusedvae.backend.specs`), and gives a
list of outputs. Its kernel finds the call and has it allocate and fill these; the same code describes the outputs to
torch.compile. Numbers among the operands go as 0-dim tensors, so that no program depends on their values.

The dispatcher boxes and unboxes every argument of a Python kernel, twice with an autograd formula: for small tensors
that would cost more than all the rest. So plain eager calls do without: see `fusedvae.autograd`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend
from .backend.evaluation import with_tensors_for_numbers
from .backend.specs import Objective, Sampling, SamplingGradient, TermGradient
from .calls import (
    LatentCall,
    LatentGradientCall,
    ObjectiveCall,
    Operands,
    TermGradientCall,
    empty_gradients,
    find,
    latent_outputs,
    objective_outputs,
)
from .torch_private import FunctionalTensorMode, below_autograd, is_transformed, is_watched

_library = torch.library.Library("fusedvae", "DEF")
_KERNEL_DEVICES = ("CPU", "CUDA")


class Operator:
    """A registered operator."""

    def __init__(self, name: str, make: Callable[..., Any], outputs: Callable[..., list[Tensor]], options: str) -> None:
        """Register an operator of the calls that ``make`` makes.

        Args:
            make: the class of a call.
            outputs: allocates what the call gives, from operands and what the call is.
            options: the schema of the fields of what the call is.
        """
        self.name = name
        self._make, self._outputs = make, outputs
        _library.define(f"{name}(Tensor?[] operands, {options}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
        for device in _KERNEL_DEVICES:
            _library.impl(name, self._run, device)
        torch.library.register_fake(f"fusedvae::{name}", self._describe, lib=_library)
        self._let_compilers_see_triton_kernels()
        self.overload = getattr(torch.ops.fusedvae, name).default

    def __call__(self, operands: Operands, spec: Any) -> list[Tensor]:
        """Run by way of the dispatcher."""
        tensors = with_tensors_for_numbers(operands)
        return self.overload(tensors, *[list(f) if isinstance(f, tuple) else f for f in spec])

    def below_autograd(self, operands: Operands, spec: Any) -> list[Tensor]:
        """The same, for a formula that the dispatcher has called."""
        with below_autograd():
            return self(operands, spec)

    def register_autograd(self, run: Callable[[Operands, Any], list[Tensor]]) -> None:
        """Make ``run``, which takes what the kernel takes, what the operator does where a derivative is wanted."""
        _library.impl(self.name, lambda operands, *fields: run(operands, self.spec_of(fields)), "Autograd")

    def spec_of(self, fields: Sequence[Any]) -> Any:
        """What the call is, of the schema's arguments."""
        return _SPECS[self.name](*[tuple(f) if isinstance(f, list) else f for f in fields])

    def _run(self, operands: list[Tensor | None], *fields: Any) -> list[Tensor]:
        keeps_workspace = False  # whoever compiled or recorded this owns all memory that is made in it
        return list(find(self._make, operands, self.spec_of(fields), keeps_workspace).outputs(operands))

    def _describe(self, operands: list[Tensor | None], *fields: Any) -> list[Tensor]:
        return self._outputs(operands, self.spec_of(fields))

    def _let_compilers_see_triton_kernels(self) -> None:
        """Have a compiler trace through to Triton kernels, as `torch.library.triton_op` does, where it can read them.

        It plans for sizes that are known: otherwise, and for all other backends, the operator stays whole in its graph.
        """
        if not hasattr(torch.library, "wrap_triton"):
            return

        def run(mode: Any, overload: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
            operands, *fields = args
            spec = self.spec_of(fields)
            if spec.backend != "triton" or not _is_readable([t for t in operands if t is not None]):
                return mode.__torch_dispatch__(overload, types, args, kwargs)
            from .backend.triton.launch import traced  # not before somebody uses it: it is slow to import

            with mode, traced():
                return self._make(operands, spec).outputs(operands)

        torch.library.register_torch_dispatch(f"fusedvae::{self.name}", FunctionalTensorMode, run, lib=_library)


def _is_readable(operands: list[Tensor]) -> bool:
    """Whether a compiler can read the Triton kernels that run on some operands.

    A program that is traced to be stored could not keep them, and interpreted kernels are none.
    """
    sizes = [size for t in operands for size in (*t.shape, *t.stride())]
    return (
        all(t.dtype != torch.float64 or t.dim() == 0 for t in operands)
        and all(type(size) is int for size in sizes)
        and not (hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting())
        and os.environ.get("TRITON_INTERPRET") != "1"
    )


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None), float, int))


def needs_dispatcher(operands: Operands) -> bool:
    """Whether a call must go by way of the dispatcher: somebody watches, or a tensor is not what it seems."""
    return is_watched() or not _PLAIN_TYPES.issuperset(map(type, operands))


_SPECS: dict[str, Callable[..., Any]] = {
    "objective": Objective,
    "term_gradient": TermGradient,
    "latent": Sampling,
    "latent_gradient": SamplingGradient,
}

_FORMS = "str[] maps, bool[] squared, float[] limits"


def gradient_outputs(operands: Operands, spec: TermGradient | SamplingGradient, **options: Any) -> list[Tensor]:
    """The gradients, uninitialised."""
    return empty_gradients(operands, spec.needed, **options)


objective = Operator(
    "objective",
    ObjectiveCall,
    objective_outputs,
    f"str[] formulas, {_FORMS}, float? balance, bool[] weighted, bool[] normalized, int packed_dim, bool full, "
    "str[] reductions, int[]? dim, ScalarType dtype, bool returns_terms, bool[] needed, bool is_grad_scaled, "
    "str backend",
)
term_gradient = Operator(
    "term_gradient",
    TermGradientCall,
    gradient_outputs,
    f"str formula, {_FORMS}, float[] gains, int[]? dim, int packed_dim, bool[] needed, str backend",
)
latent = Operator(
    "latent",
    LatentCall,
    latent_outputs,
    f"str divergence, {_FORMS}, int? samples, bool at_sample, ScalarType? kl_dtype, int[] kl_dim, int packed_dim, "
    "str backend",
)
latent_gradient = Operator(
    "latent_gradient",
    LatentGradientCall,
    gradient_outputs,
    f"str divergence, {_FORMS}, int? samples, bool at_sample, int[] kl_dim, int packed_dim, bool[] needed, str backend",
)


# --- noise ------------------------------------------------------------------------------------------------------------


def draw_seed(device: torch.device, generator: torch.Generator | None, *, by_dispatcher: bool) -> Tensor:
    """A 64-bit seed from torch's generator, kept on the device.

    An operator of its own, so that a compiled program draws the very seed that an eager one does.
    """
    if generator is not None and generator.device != device:  # nobody waits for the way there
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"generator: expected one on {device} where a graph is captured, whose replays would not draw from "
                f"another; got one on {generator.device}"
            )
        return draw_seed(generator.device, generator, by_dispatcher=by_dispatcher).to(device, non_blocking=True)
    if by_dispatcher and not is_transformed(()):
        # A compiler takes two calls with the same arguments for one, unless it knows the operator for a random one; but
        # never two uninitialised tensors. (The device is given by keyword: what moves an exported program to another
        # looks for that.)
        return torch.ops.fusedvae.draw_seed(torch.empty((), dtype=torch.int64, device=device), generator=generator)
    return _draw_seed(device, generator)


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


_library.define(
    "draw_seed(Tensor place, *, Generator? generator=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
for _key in _KERNEL_DEVICES:
    _library.impl("draw_seed", lambda place, *, generator=None: _draw_seed(place.device, generator), _key)
torch.library.register_fake(
    "fusedvae::draw_seed", lambda place, *, generator=None: torch.empty_like(place), lib=_library
)


def normal(shape: list[int], seed: Tensor, dtype: torch.dtype, backend_name: str) -> Tensor:
    """The noise stream of ``seed`` in a fresh tensor."""
    if needs_dispatcher([seed]):
        return torch.ops.fusedvae.normal(shape, seed, dtype, backend_name)
    return _normal(shape, seed, dtype, backend_name)


def _empty_normal(shape: list[int], seed: Tensor, dtype: torch.dtype, backend_name: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=seed.device)


def _normal(shape: list[int], seed: Tensor, dtype: torch.dtype, backend_name: str) -> Tensor:
    out = _empty_normal(shape, seed, dtype, backend_name)
    backend.kernels(backend_name).normal(out, seed)
    return out


_library.define(
    "normal(SymInt[] shape, Tensor seed, ScalarType dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in _KERNEL_DEVICES:
    _library.impl("normal", _normal, _key)
torch.library.register_fake("fusedvae::normal", _empty_normal, lib=_library)
