# What csrc/bindings.cpp defines, which explains operands and what runs take.
from typing import Any

_Triple = tuple[int, ...]
_Operand = tuple[int, ...] | None
_Form = tuple[int, bool, float, float, float]

def cpu_isa() -> str: ...
def openmp_runtime() -> str: ...
def working_threads(threads: int) -> int: ...
def formulas() -> tuple[str, ...]: ...
def divergences() -> tuple[str, ...]: ...
def can_sum(extent: _Triple, strides: tuple[_Triple | None, ...]) -> bool: ...
def normal(out: int, dtype: int, count: int, seed: int, threads: int) -> None: ...

# With CUDA kernels only, as are `launch` and `workspace_bytes` below.
def cuda_unavailable() -> list[str]: ...
def cuda_counters() -> tuple[int, int]: ...
def launch_normal(out: int, dtype: int, count: int, seed: int, device: int, stream: int) -> None: ...

class _Task:
    def run(self, sources: tuple[Any, ...], threads: int) -> None: ...
    def launch(self, sources: tuple[Any, ...], device: int, stream: int, workspace: int, counter: int) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...

class ElementwiseTask:
    def __init__(
        self,
        in_double: bool,
        extent: _Triple,
        *,
        inputs: tuple[_Operand, ...],
        forms: tuple[_Form, ...] = (),
        gains: tuple[float, ...] = (),
        weight: _Operand = None,
        incoming: _Operand = None,
        value: _Operand = None,
        grads: tuple[_Operand, ...],
    ) -> None: ...

class LatentTask(_Task):
    def __init__(
        self,
        divergence: str,
        elements: ElementwiseTask,
        index: _Triple,
        *,
        seed: _Operand,
        offset: _Operand,
        noise: _Operand,
        grad_z: _Operand,
        z: _Operand,
    ) -> None: ...

class Term:
    def __init__(
        self,
        formula: str,
        elements: ElementwiseTask | None,
        *,
        given: _Operand = None,
        given_count: int = 0,
        factor: float = 1.0,
        normalizer: _Operand = None,
        constant: float = 0.0,
        coefficient: _Operand = None,
        out: _Operand = None,
    ) -> None: ...

class ObjectiveTask(_Task):
    def __init__(self, terms: tuple[Term, ...], values: int, loss: _Operand, grad_scale: _Operand = None) -> None: ...

class ScaleTask(_Task):
    def __init__(
        self,
        tensors: tuple[_Operand, ...],
        counts: tuple[int, ...],
        factor: _Operand,
        coefficient: _Operand = None,
        product: _Operand = None,
    ) -> None: ...
