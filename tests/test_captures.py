"""Which capture of a CUDA graph work is recorded in, and what that decides: whether memory may be written over."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedvae import autograd, captures, functional, linear
from fusedvae.torch_private import has_hooks_on_saved_tensors

GPU = torch.device("cuda", 0)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a driver that stands in says: its answer, and the number of the capture."""
    said = {"error": 0, "number": 0}

    def ask(stream: int, status: ctypes.c_int, number: ctypes.c_uint64, *others: None) -> int:
        assert stream == 0x5EA0
        assert others == (None,) * 3
        number.value = said["number"]
        return said["error"]

    monkeypatch.setattr(captures, "is_capturing", lambda: True)
    monkeypatch.setattr(captures, "current_gpu", lambda: 0)
    monkeypatch.setattr(captures, "current_stream_address", lambda gpu: 0x5EA0)
    monkeypatch.setattr(captures, "_question", lambda: ask)
    return said


def test_a_capture_is_known_by_its_number(capture: Any) -> None:
    capture["number"] = 7
    first = captures.current_capture(GPU)
    assert first is not None
    assert captures.current_capture(GPU) == first
    capture["number"] = 8
    assert captures.current_capture(GPU) != first
    assert captures.current_capture(torch.device("cpu")) is None


def test_where_the_driver_does_not_tell_no_two_are_the_same(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capture["error"] = 1
    assert captures.current_capture(GPU) != captures.current_capture(GPU)
    monkeypatch.setattr(captures, "_question", lambda: None)
    assert captures.current_capture(GPU) != captures.current_capture(GPU)
    monkeypatch.setattr(captures, "is_capturing", lambda: False)
    assert captures.current_capture(GPU) is None


def operands() -> list[Tensor]:
    return [torch.randn(5, 6).requires_grad_(), torch.randn(5, 6), *[torch.randn(5, 2).requires_grad_() for _ in "ab"]]


def layer() -> list[Tensor]:
    return [torch.randn(5, 3).requires_grad_(), torch.randn(6, 3).requires_grad_(), torch.randn(6).requires_grad_()]


@pytest.mark.parametrize("is_apart", [True, False], ids=["apart", "together"])
@pytest.mark.parametrize("is_linear", [False, True], ids=["elbo", "linear"])
def test_gradients_of_another_capture_are_left_as_they_are(
    monkeypatch: pytest.MonkeyPatch, is_apart: bool, is_linear: bool
) -> None:
    now = {"capture": 1}
    for module in (autograd, linear):
        monkeypatch.setattr(module, "current_capture", lambda device: now["capture"])
    given = [*layer(), *operands()[1:]] if is_linear else operands()
    loss = functional.linear_elbo(*given, block=4) if is_linear else functional.elbo_loss(*given)  # type: ignore[call-overload]
    node = loss.grad_fn
    while not hasattr(node, "gradients"):  # of linear_elbo, below the sum of its terms
        node = node.next_functions[0][0]
    left = node.gradients
    before = [gradient.clone() for gradient in left]
    wanted = given[:3] if is_linear else [t for t in given if t.requires_grad]
    now["capture"] = 2 if is_apart else 1
    found = torch.autograd.grad(loss, wanted, torch.tensor(3.0))
    for gradient, was, made in zip(left, before, found, strict=True):
        assert torch.equal(gradient, was) == is_apart
        assert torch.equal(made, 3 * was)


@pytest.mark.skipif(has_hooks_on_saved_tensors(), reason="this PyTorch does not tell of hooks on saved tensors")
@pytest.mark.parametrize("is_apart", [True, False], ids=["apart", "together"])
def test_so_is_what_a_gradient_would_be_written_over(monkeypatch: pytest.MonkeyPatch, is_apart: bool) -> None:
    now = {"capture": 1}
    monkeypatch.setattr(autograd, "current_capture", lambda device: now["capture"])
    leaf, x, *_ = operands()
    recon_x = leaf * 1.0
    before = recon_x.detach().clone()
    values = functional.gaussian_nll(recon_x, x, reduction="none", inplace=True)
    now["capture"] = 2 if is_apart else 1
    (found,) = torch.autograd.grad(values.sum(), leaf)
    torch.testing.assert_close(found, before - x)
    assert torch.equal(recon_x, before) == is_apart


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_backward_pass_in_a_graph_of_its_own(backend: Any, reduction: Any) -> None:
    leaf, x = torch.randn(64, 48, device=GPU).requires_grad_(), torch.randn(64, 48, device=GPU)
    factor = torch.ones(() if reduction == "sum" else (64,), device=GPU)

    def forward() -> Tensor:
        return functional.gaussian_nll(leaf * 1.0, x, reduction=reduction, inplace=True, backend=backend)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        torch.autograd.grad(forward(), leaf, factor)
    torch.cuda.current_stream().wait_stream(aside)
    graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graphs[0]):
        value = forward()
    with torch.cuda.graph(graphs[1], pool=graphs[0].pool()):
        (found,) = torch.autograd.grad(value, leaf, factor)
    graphs[0].replay()
    for number in (2.0, 3.0, 0.5):
        factor.fill_(number)
        graphs[1].replay()
        torch.testing.assert_close(found, number * (leaf - x).detach())
