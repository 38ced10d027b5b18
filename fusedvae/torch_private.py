"""All that the package uses of PyTorch's private interface: what for, and what happens on a PyTorch that lacks it.

Tested with PyTorch 2.6 and the newest release. Where something is missing, the public way that costs more is taken, and
nothing is wrong: but for what is marked "needed", whose absence stops the import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.utils._pytree
from torch import Tensor

# needed: the mode in which AOTAutograd traces, for operators that it is to see into. It has no public name, and
# torch.library.register_torch_dispatch, which is public, takes it.
from torch._subclasses.functional_tensor import FunctionalTensorMode as FunctionalTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def record(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without what that does for torch.func: `is_watched` has ruled that out.

    It takes 3 µs off a call. Without the private base class, `apply` itself.
    """
    base = getattr(torch._C, "_FunctionBase", None)
    if base is None:
        return function.apply
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def assumed_constant(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result(function)``, which imports a compiler to set this one attribute.

    Where a PyTorch does not look at it, a compiler traces the function, as it can.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# By names of their own: every call asks these.
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack
_count_of_modes = torch._C._len_torch_dispatch_stack
_has_storage = torch._C._has_storage


def is_watched() -> bool:
    """Whether something must see operators called: a compiler or tracer, a transform of torch.func, a dispatch mode.

    needed: nothing public tells of these all.
    """
    return (
        _is_compiling()
        or _count_of_modes() != 0
        or _transforms() is not None
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def likeness(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A quick test, of as many tensors: whether they are like these in all that matters but their memory.

    That is in type, shape, strides, dtype, device, need of a gradient, and in what operators called here and now would
    see in them (a negative view, an inference tensor). Without it, or for tensors that it does not know, a test that
    always fails: then they are looked at one by one.
    """
    try:
        guards = torch._C._dynamo.guards.TensorGuards(
            *tensors,
            dynamic_dims_sizes=[[*t.shape] for t in tensors],  # type: ignore[misc]
            dynamic_dims_strides=[[*t.stride()] for t in tensors],  # type: ignore[misc]
        )
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return lambda *tensors: False
    test: Callable[..., bool] = guards.check
    return test


def is_traced() -> bool:
    """Whether torch.jit.trace writes down what is called. needed: with the others above."""
    return _tracing_state() is not None


def is_transformed(operands: Sequence[Any]) -> bool:
    """Whether a call is one that kernels cannot serve, but operations of PyTorch can.

    It is seen by a transform of torch.func, by forward-mode differentiation, or by torch.jit.trace, whose programs hold
    no operators of the package; or its tensors are made of others (gradients in batches, the shards of a DTensor).
    """
    if is_watched():
        if torch.compiler.is_dynamo_compiling():
            return _is_compiled_in_transform()
        return not _is_compiling() and (
            _transforms() is not None
            or _tracing_state() is not None
            or any(map(has_tangent, operands))
            or _are_made_of_others(operands)
        )
    return _are_made_of_others(operands)


@assumed_constant
def _is_compiled_in_transform() -> bool:
    """Whether the compiler goes through a transform of torch.func: it takes part in that while it looks."""
    return torch._C._functorch.maybe_current_level() is not None


def _are_made_of_others(operands: Sequence[Any]) -> bool:
    for operand in operands:
        if type(operand) is Tensor:
            if not _has_storage(operand):
                return True
        elif isinstance(operand, Tensor) and is_traceable_wrapper_subclass(operand):
            return True
    return False


def is_sharded(operands: Sequence[Any]) -> bool:
    """Whether some of the tensors are DTensors, and a plain call's: those of which each process holds a part."""
    return not is_watched() and any(hasattr(operand, "device_mesh") for operand in operands)


def has_tangent(operand: Any) -> bool:
    """Whether forward-mode differentiation goes through this tensor."""
    return (
        forward_ad._current_level >= 0
        and isinstance(operand, Tensor)
        and forward_ad.unpack_dual(operand).tangent is not None
    )


is_any_autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
"""Whether autocast is on for any device type, which is quicker to ask than for one. Without it, True: ask then."""

keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
"""Whether the backward pass that is under way keeps its graph, so that what is saved may be needed again. Without it,
True: then gradients are scaled out of place."""


def is_base_held(view: Tensor) -> bool:
    """Whether something besides a view holds the tensor that it is a view of: a variable, a graph, another view.

    Without a way to count these, True.
    """
    return _HELD_ALONE is None or any(n > alone for n, alone in zip(_holders_of_base(view), _HELD_ALONE, strict=True))


def _holders_of_base(view: Any) -> tuple[int, int]:
    """How many in Python and in C++ hold the tensor that this is a view of, this function among them."""
    base = view._base
    return sys.getrefcount(base), base._use_count()


with torch.inference_mode(False):
    _HELD_ALONE = _holders_of_base(torch.empty(1).view(1)) if hasattr(Tensor, "_use_count") else None
"""The same of one that nothing else holds, which depends on the releases of Python and PyTorch."""


def has_hooks_on_saved_tensors() -> bool:
    """Whether tensors that are saved now may come back as something else. Without it, True: nothing is in place."""
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(False) is not None


def register_outputs(module: str, *types: type) -> None:
    """Let exported programs that return these NamedTuples of a module be saved. Without it, they can only be run."""
    register = getattr(torch.utils._pytree, "_register_namedtuple", None)
    for kind in types if register else ():
        register(kind, serialized_type_name=f"{module}.{kind.__qualname__}")  # type: ignore[misc]


def is_in_forward_of_ddp() -> bool:
    """Whether a DistributedDataParallel is calling its module, and so sees all that happens. Without it, False."""
    return getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None


def is_managed_by_fsdp(module: torch.nn.Module) -> bool:
    """Whether FSDP, of either kind, has sharded the module or what it is a part of. Without its mark, False."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def standard_gamma(concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw of gamma distributions of scale 1. Without it, the generator seeds the default one, which is put back."""
    draw = getattr(torch, "_standard_gamma", None)
    if draw is not None:
        drawn: Tensor = draw(concentration, generator=generator)
        return drawn
    gamma = torch.distributions.Gamma(concentration, torch.ones_like(concentration))
    if generator is None:
        return gamma.sample()
    device = concentration.device
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        return gamma.sample()


def below_autograd() -> Any:
    """A block in which operators run their kernels, without autograd. needed: an operator's formula calls it."""
    return torch._C._AutoDispatchBelowAutograd()


def _address_of_current_stream(gpu: int) -> int:
    return int(torch.cuda.current_stream(gpu).cuda_stream)


current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: 0)
"""The current GPU's number, without CUDA being initialised; 0 where PyTorch knows no GPUs."""

current_stream_address: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _address_of_current_stream
)
"""The address of a GPU's current stream, without a Stream object being made for it."""

is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
"""Whether the current stream of the current GPU is being captured in a graph: the public function but for a frame."""
