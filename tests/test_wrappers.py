"""Every public function under everything that PyTorch wraps functions in: the value and the gradients are those of the
reference formulas outside of it.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KERNEL_TARGETS, Target
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fusedvae
from fusedvae import calls, functional

pytestmark = [
    pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own
]

Function = Callable[..., Tensor]
FUNCTIONS: dict[str, tuple[Function, int]] = {
    # name: (a function of so many tensors of one shape, how many)
    "kl_standard_normal": (functional.kl_standard_normal, 2),
    "kl_normal": (functional.kl_normal, 4),
    "gaussian_nll": (functional.gaussian_nll, 3),
    "gaussian_nll, none": (lambda *t: functional.gaussian_nll(*t, reduction="none"), 3),
    "laplace_nll": (lambda r, x, s, e: functional.laplace_nll(r, x, s, extra=e), 4),
    "poisson_nll": (lambda r, x: functional.poisson_nll(r, x.abs(), scale="lograte", full=True), 2),
    "negative_binomial_nll": (
        lambda r, x, s: functional.negative_binomial_nll(r.exp(), x.abs(), s, scale="logtheta"),
        3,
    ),
    "zero_inflated_negative_binomial_nll": (
        lambda r, x, s, z: functional.zero_inflated_negative_binomial_nll(r.exp(), x.abs(), s.exp(), z),
        4,
    ),
    "discretized_logistic_nll": (lambda r, x, s: functional.discretized_logistic_nll(r, x, s), 3),
    "bernoulli_nll": (lambda r, x, w: functional.bernoulli_nll(r, x, pos_weight=w), 3),
    "bernoulli_nll, probabilities": (
        lambda r, x: functional.bernoulli_nll(r.sigmoid(), x.sigmoid(), from_logits=False, reduction="sum"),
        2,
    ),
    "forms": (
        lambda m, s, p, t: functional.kl_normal(
            m,
            s,
            p,
            t,
            scale="softplus",
            prior_scale="std",
            prior_clamp=(0.1, 2.0),
            eps=0.1,
            balance=0.8,
            dim=0,
            reduction="none",
        ),
        4,
    ),
    "weights": (
        lambda r, x, s, w, m, v: (
            w.sum()
            + functional.elbo_loss(
                r,
                x,
                m,
                v,
                s,
                weight=w > 0,
                latent_weight=w.detach().abs(),
                reduction=("weighted_mean", "mean"),
                grad_scale=4.0,
                recon_scale="logstd",
            )
        ),
        6,
    ),
    "latent at samples": (
        lambda m, v, p, t, n: (
            functional.latent(m, v, p, t, noise=torch.stack((n, n)), estimator="sample", samples=2).kl
        ),
        5,
    ),
    "importance_weighted_bound": (functional.importance_weighted_bound, 1),
    "gaussian_nll_loss": (lambda r, x, s: functional.gaussian_nll_loss(r, x, s * s + 0.1), 3),
    "elbo_loss": (lambda r, x, s, m, v: functional.elbo_loss(r, x, m, v, s, beta=0.3), 5),
    "linear_elbo": (
        lambda h, w, x, m, v: functional.linear_elbo(h, w.mT @ w, w[0], x, m, v, beta=0.3, block=4),
        5,
    ),
    "elbo_loss, none": (lambda r, x, s, m, v: functional.elbo_loss(r, x, m, v, s, reduction="none"), 5),
    "ELBOLoss": (lambda r, x, m, v: fusedvae.ELBOLoss(0.3, likelihood="laplace")(r, x, m, v), 4),
    "reparameterize": (lambda m, v, n: functional.reparameterize(m, v, noise=n), 3),
    "latent's kl": (lambda m, v: functional.latent(m, v).kl, 2),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend, and what is worked out once is worked out there."""
    calls._calls.clear()
    with fusedvae.use_backend(target.backend):
        yield


def inputs_of(name: str) -> list[Tensor]:
    return [torch.randn(4, 6).requires_grad_() for _ in range(FUNCTIONS[name][1])]


def results(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients of its sum."""
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value.sum(), inputs)]


def reference_of(name: str, inputs: list[Tensor]) -> list[Tensor]:
    with fusedvae.use_backend("reference"):
        return results(FUNCTIONS[name][0], inputs)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-6)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "deterministic algorithms": deterministic,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "anomalies detected": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


@every_function
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_contexts(target: Target, name: str, context: str) -> None:
    inputs = inputs_of(name)
    expected = reference_of(name, inputs)
    for _ in range(2):  # the second time as the first
        with CONTEXTS[context]():
            found = results(FUNCTIONS[name][0], inputs)
        assert_same(found, expected)


@every_function
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(target: Target, name: str, mode: Callable) -> None:
    inputs = inputs_of(name)
    expected = reference_of(name, inputs)[:1]
    with mode():
        assert_same([FUNCTIONS[name][0](*inputs)], expected)
        if mode is torch.inference_mode:
            assert_same([FUNCTIONS[name][0](*[t.clone() for t in inputs])], expected)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "linear_elbo"])  # whose products it changes
def test_autocast_changes_nothing_of_float32(target: Target, name: str) -> None:
    inputs = inputs_of(name)
    expected = reference_of(name, inputs)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        value = FUNCTIONS[name][0](*inputs)
    assert_same([value.detach(), *torch.autograd.grad(value.sum(), inputs)], expected)


class Annotated(Tensor):
    """A subclass that does nothing."""


@every_function
def test_subclasses_that_do_nothing(target: Target, name: str) -> None:
    plain = inputs_of(name)
    inputs = [t.detach().as_subclass(Annotated).requires_grad_() for t in plain]
    found = results(FUNCTIONS[name][0], inputs)
    assert_same([f.as_subclass(Tensor) for f in found], reference_of(name, plain))


@every_function
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(target: Target, name: str, reentrant: bool) -> None:
    inputs = inputs_of(name)
    function = FUNCTIONS[name][0]
    found = checkpoint(function, *inputs, use_reentrant=reentrant)
    for t in inputs:
        t.grad = None
    found.sum().backward()
    assert_same([found.detach(), *[t.grad for t in inputs]], reference_of(name, inputs))  # type: ignore[list-item]


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_checkpoints_of_what_the_dispatcher_sees(target: Target, reduction: str) -> None:
    """What is saved can be unpacked once only there."""
    h, w = torch.randn(4, 6), torch.randn(6, 8).requires_grad_()
    x = torch.randn(4, 8)

    def loss(h: Tensor, beta: Any) -> Tensor:
        return functional.elbo_loss(h @ w, x, h[:, :2], h[:, 2:4], beta=beta, reduction=reduction).sum()

    found = checkpoint(loss, h, np.float64(0.5), use_reentrant=False)
    expected = loss(h, 0.5)
    assert_same(*[[t.detach(), *torch.autograd.grad(t, [w])] for t in (found, expected)])


@every_function
def test_stand_ins_have_the_shapes_of_what_they_stand_for(target: Target, name: str) -> None:
    inputs = inputs_of(name)
    expected = FUNCTIONS[name][0](*inputs)
    if name != "gaussian_nll_loss":  # looks at its variance, as PyTorch's own does
        with FakeTensorMode() as mode:
            fake = FUNCTIONS[name][0](*[mode.from_tensor(t) for t in inputs])
        assert (fake.shape, fake.dtype, fake.device) == (expected.shape, expected.dtype, expected.device)
    if name not in ("gaussian_nll_loss", "latent's kl"):
        with fusedvae.use_backend("auto"):
            meta = FUNCTIONS[name][0](*[t.detach().to("meta") for t in inputs])
        assert (meta.shape, meta.dtype, meta.device.type) == (expected.shape, expected.dtype, "meta")


@every_function
def test_traced_programs_hold_what_they_need(target: Target, name: str) -> None:
    if name == "gaussian_nll_loss":
        pytest.skip("looks at its variance, as PyTorch's own does")
    inputs = [t.detach() for t in inputs_of(name)]
    program = make_fx(lambda *t: FUNCTIONS[name][0](*t))(*inputs)
    others = [t * 0.5 for t in inputs]
    assert_same([program(*others)], reference_of(name, [t.requires_grad_() for t in others])[:1])


@every_function
def test_threads_at_the_same_time(target: Target, name: str) -> None:
    function, found = FUNCTIONS[name][0], {}
    inputs = [inputs_of(name) for _ in range(4)]
    expected = [reference_of(name, i) for i in inputs]

    def work(k: int) -> None:
        for _ in range(10):
            found[k] = results(function, inputs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        assert_same(found[k], expected[k])


@pytest.mark.slow
@every_function
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_sizes_that_are_known_or_not(target: Target, name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name][0], backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for rows in (4, 7):
        inputs = [torch.randn(rows, 6).requires_grad_() for _ in range(FUNCTIONS[name][1])]
        assert_same(results(compiled, inputs), reference_of(name, inputs))


@pytest.mark.slow
@every_function
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its exporter
def test_exported_programs(target: Target, name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return FUNCTIONS[name][0](*inputs)

    inputs = [t.detach() for t in inputs_of(name)]
    program = torch.export.export(Module(), tuple(inputs)).module()
    others = [t * 0.5 for t in inputs]
    assert_same([program(*others)], reference_of(name, [t.requires_grad_() for t in others])[:1])


def test_modules_can_be_copied_and_pickled(target: Target) -> None:
    criterion = fusedvae.ELBOLoss(torch.tensor(0.3), likelihood="laplace", full=True)
    t = [torch.randn(4, 6) for _ in range(4)]
    expected = criterion(*t)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(*t), expected)
