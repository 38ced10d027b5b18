"""Calls are found again for operands that are alike, and for no others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedvae import calls, use_backend
from fusedvae.calls import find
from fusedvae.torch_private import likeness


class Call:
    """A call, which is told from others by what it is."""

    def __init__(self, operands: Any, *options: object) -> None:
        self.options = options


def operands() -> tuple[Tensor, Tensor, float]:
    return torch.randn(4, 6), torch.randn(6).requires_grad_(), 0.5


UNLIKE: dict[str, Callable[[Tensor, Tensor, float], tuple[Any, ...]]] = {
    "shape": lambda a, b, c: (a[:3], b, c),
    "dimensions": lambda a, b, c: (a[None], b, c),
    "strides": lambda a, b, c: (torch.randn(6, 4).t(), b, c),
    "broadcast": lambda a, b, c: (a[:1].expand(4, 6), b, c),
    "dtype": lambda a, b, c: (a.double(), b, c),
    "device": lambda a, b, c: (a.to("meta"), b, c),
    "gradient": lambda a, b, c: (a, b.detach(), c),
    "parameter": lambda a, b, c: (a, torch.nn.Parameter(b.detach()), c),
    "negative": lambda a, b, c: (torch._neg_view(a), b, c),
    "number": lambda a, b, c: (a, b, 1),
    "tensor in the place of a number": lambda a, b, c: (a, b, torch.tensor(c)),
    "nothing in its place": lambda a, b, c: (a, b, None),
}


@pytest.fixture(params=["test of all at once", "one by one"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_calls", {})
    if request.param == "one by one":  # as with a PyTorch that has no such test
        monkeypatch.setattr(calls, "likeness", lambda tensors: lambda *others: False)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("change", UNLIKE)
def test_operands_that_differ_have_calls_of_their_own(change: str) -> None:
    other = UNLIKE[change](*operands())
    first = find(Call, operands(), "option")
    for _ in range(2):  # by turns: what was found last is asked first
        assert find(Call, operands(), "option") is first
        assert find(Call, other, "option") is not first
        assert find(Call, other, "option") is find(Call, other, "option")
    assert find(Call, operands(), "another") is not first


@pytest.mark.usefixtures("_way")
def test_what_is_set_around_a_call_tells_it_from_others() -> None:
    first = find(Call, operands())
    with torch.no_grad():
        assert find(Call, operands()) is not first
    with torch.autocast("cpu", torch.bfloat16):
        assert find(Call, operands()) is not first
    with use_backend("reference"):
        assert find(Call, operands()) is not first
    with torch.inference_mode():
        assert find(Call, operands()) is not first
    assert find(Call, operands()) is first


@pytest.mark.usefixtures("_way")
def test_calls_hold_no_tensors() -> None:
    given = operands()
    held = [weakref.ref(t) for t in given if isinstance(t, Tensor)]
    find(Call, given)
    del given
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_pytorch_has_the_test_of_all_at_once() -> None:
    tensors = [t for t in operands() if isinstance(t, Tensor)]
    assert likeness(tensors)(*[t.clone().detach().requires_grad_(t.requires_grad) for t in tensors])
