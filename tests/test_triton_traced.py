"""What a compiler sees of the Triton kernels: traced for a GPU that need not be there, and not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor

from fusedvae import functional

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="a compiler has no use for interpreted kernels"),
    pytest.mark.skipif(not hasattr(torch.library, "wrap_triton"), reason="this PyTorch cannot see into kernels"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own, from its compiler
]

from functorch.compile import make_boxed_func  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fusedvae.backend import triton as backend  # noqa: E402


class Driver:
    """All that tracing asks of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def gpu_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    monkeypatch.setattr(type(backend.BACKEND), "unavailable", lambda self, device_type, index=None: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    triton.runtime.driver._active = before


def traced(function: Callable[..., Tensor], *operands: Tensor) -> list[torch.fx.Node]:
    """The calls in the forward and backward graphs of a compiled function, which must be one graph."""
    calls: list[torch.fx.Node] = []

    def see(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        calls.extend(node for node in graph.graph.nodes if node.op == "call_function")
        (outputs,) = graph.graph.find_nodes(op="output")
        values = [None if node is None else node.meta["val"] for node in outputs.args[0]]
        results = [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for v in values]
        return make_boxed_func(lambda *inputs: results)

    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=see, bw_compiler=see))
    compiled(*operands).backward()
    return calls


def step(recon_x: Tensor, x: Tensor, recon_logvar: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    z, kl = functional.latent(mu, logvar, backend="triton")
    loss = functional.elbo_loss(recon_x + z.sum(), x, mu, logvar, recon_logvar, backend="triton")
    return loss + kl.sum()


def step_with_more(recon_x: Tensor, x: Tensor, recon_scale: Tensor, mu: Tensor, std: Tensor) -> Tensor:
    """What the usual step has not: other forms of scales, weights, samples at some offset, a prior that is learned."""
    options: dict[str, Any] = {"scale": "std", "clamp": (0.1, None), "eps": 1e-3, "backend": "triton"}
    z, kl = functional.latent(mu, std, mu[:1], std[:1], samples=3, estimator="sample", offset=7, **options)
    options.update(recon_scale="softplus", weight=x > 0, latent_weight=std > 0, grad_scale=2.0)
    options.update(reduction="weighted_mean")
    loss = functional.elbo_loss(recon_x + z.sum(), x, mu, std, recon_scale, **options)
    return loss + kl.sum()


def operands(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in ((8, 16), (8, 16), (16,), (8, 4), (8, 4))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_holds_the_kernels(dtype: torch.dtype) -> None:
    calls = traced(step, *operands(dtype))
    launches = [node for node in calls if "triton_kernel_wrapper" in str(node.target)]
    written = [set(node.kwargs["tensors_to_clone"]) for node in launches]
    # What a kernel writes is all that the compiler need copy: operands are seen to be read only.
    assert written == [
        {"z", "value"},
        {"loss", "a_g0", "a_g1", "a_g2", "b_g0", "b_g1", "totals", "counters"},
        {"g0", "g1"},
    ]
    assert {str(node.target) for node in calls if "fusedvae" in str(node.target)} == {"fusedvae.draw_seed.default"}


def test_a_compiled_step_with_more_holds_the_kernels() -> None:
    calls = traced(step_with_more, *operands(torch.float32))
    launches = [node for node in calls if "triton_kernel_wrapper" in str(node.target)]
    written = [set(node.kwargs["tensors_to_clone"]) for node in launches]
    assert written[0] == {"z", "value"}
    assert {"loss", "a_g0", "a_g1", "a_g2", "b_g0", "b_g1"} <= written[1]
    assert {"g0", "g1", "g2", "g3"} <= written[2]
    assert {str(node.target) for node in calls if "fusedvae" in str(node.target)} == {"fusedvae.draw_seed.default"}


def test_in_float64_the_operators_stay_whole() -> None:
    calls = traced(step, *operands(torch.float64))
    assert not [node for node in calls if "triton_kernel_wrapper" in str(node.target)]
    found = [str(node.target) for node in calls if "fusedvae" in str(node.target)]
    names = ("draw_seed", "latent", "objective", "latent_gradient")
    assert found == [f"fusedvae.{name}.default" for name in names]
