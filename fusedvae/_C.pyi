# What csrc/bindings.cpp defines, which explains forms and what runs take.
from typing import Any

_Triple = tuple[int, ...]
_Form = tuple[int, ...] | None

def cpu_isa() -> str: ...
def formulas() -> tuple[str, ...]: ...
def can_sum(extent: _Triple, strides: tuple[_Triple | None, ...]) -> bool: ...
def normal(out: int, dtype: int, count: int, seed: int, threads: int) -> None: ...

# With CUDA kernels only, as are `launch` and `workspace_bytes` below.
def cuda_unavailable() -> str: ...
def launch_normal(out: int, dtype: int, count: int, seed: int, device: int, stream: int) -> None: ...

class _Task:
    def run(self, sources: tuple[Any, ...], threads: int) -> None: ...
    def launch(self, sources: tuple[Any, ...], device: int, stream: int, workspace: int) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...

class LatentTask(_Task):
    def __init__(
        self,
        extent: _Triple,
        index: _Triple,
        in_double: bool,
        *,
        seed: _Form,
        mu: _Form,
        logvar: _Form,
        noise: _Form,
        grad_z: _Form,
        grad_kl: _Form,
        z: _Form,
        kl: _Form,
        grad_mu: _Form,
        grad_logvar: _Form,
    ) -> None: ...

class ElementwiseTask:
    def __init__(
        self,
        formula: str,
        parameter: float,
        in_double: bool,
        extent: _Triple,
        *,
        inputs: tuple[_Form, ...],
        weight: _Form,
        value: _Form,
        grads: tuple[_Form, ...],
    ) -> None: ...

class Term:
    def __init__(
        self,
        elements: ElementwiseTask | None,
        *,
        given: _Form = None,
        given_count: int = 0,
        factor: float = 1.0,
        constant: float = 0.0,
        coefficient: _Form = None,
        out: _Form = None,
    ) -> None: ...

class ObjectiveTask(_Task):
    def __init__(self, terms: tuple[Term, ...], values: int, loss: _Form) -> None: ...

class ScaleTask(_Task):
    def __init__(self, forms: tuple[_Form, ...], counts: tuple[int, ...], factor: _Form) -> None: ...
