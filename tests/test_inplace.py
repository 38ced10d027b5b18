"""inplace=True: the gradient of the reconstruction in its own memory, with the same numbers, or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import KERNEL_TARGETS, Target
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedvae
from fusedvae import functional
from fusedvae.backend.reference import LIKELIHOODS
from fusedvae.functional.likelihoods import run_likelihood
from fusedvae.torch_private import has_hooks_on_saved_tensors

pytestmark = [
    pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True),
    pytest.mark.skipif(has_hooks_on_saved_tensors(), reason="this PyTorch does not tell of hooks on saved tensors"),
]


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend."""
    with fusedvae.use_backend(target.backend):
        yield


class Step:
    """A decoder's output, a leaf through an operation that saves nothing of it, and where its gradient came to lie."""

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf.detach().requires_grad_()
        self.recon_x = torch.empty_like(leaf).copy_(self.leaf)
        self.written: list[bool] = []
        self.recon_x.register_hook(lambda g: self.written.append(g.data_ptr() == self.recon_x.data_ptr()))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood(name: str, reduction: str) -> None:
    formula = LIKELIHOODS[name]
    given = torch.rand(5, 37, dtype=torch.float64) * 0.8 + 0.1
    x = (torch.rand(5, 37, dtype=torch.float64) * 3).floor().clamp(max=1.0)
    others = {k: torch.rand(37, dtype=torch.float64).requires_grad_() for k in formula.inputs[2:]}

    def gradients(step: Step, inplace: bool) -> list[Tensor]:
        inputs = (step.recon_x, x, *others.values())
        loss = run_likelihood(name, inputs, None, False, None, reduction, None, 1, None, inplace)
        value = loss.detach().clone()
        return [value, *torch.autograd.grad((loss * 1.75).sum(), [step.leaf, *others.values()])]

    plain, step = Step(given), Step(given)
    for found, expected in zip(gradients(step, True), gradients(plain, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert (plain.written, step.written) == ([False], [True])


def channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "arranged"),
    [
        ((3, 5, 7, 9), torch.Tensor.contiguous),
        ((3, 5, 7, 9), channels_last),
        pytest.param((130, 1030), torch.Tensor.contiguous, marks=pytest.mark.large),
        ((2, 9, 130), lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
        ((0, 4), torch.Tensor.contiguous),
        ((5, 0), torch.Tensor.contiguous),
        ((1, 1), torch.Tensor.contiguous),
    ],
    ids=["contiguous", "channels_last", "many tiles", "transposed", "no samples", "no elements", "one element"],
)
@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
def test_every_layout(
    shape: tuple[int, ...], arranged: Callable[[Tensor], Tensor], is_packed: bool, dtype: torch.dtype
) -> None:
    given = arranged(torch.randn(shape[0], 2 * shape[1], *shape[2:]) if is_packed else torch.randn(shape)).to(dtype)
    x, mu = torch.randn(shape), torch.randn(shape[0], 3)
    recon_logvar = None if is_packed else torch.randn(shape[1:]).requires_grad_()

    def gradients(step: Step, inplace: bool) -> list[Tensor]:
        loss = functional.elbo_loss(step.recon_x, x, mu, mu, recon_logvar, inplace=inplace)
        assert isinstance(loss, Tensor)
        leaves = [step.leaf] if recon_logvar is None else [step.leaf, recon_logvar]
        return [loss.detach().clone(), *torch.autograd.grad(loss * 0.5, leaves)]

    plain, step = Step(given), Step(given)
    for found, expected in zip(gradients(step, True), gradients(plain, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert step.written == [True]


def test_a_factor_with_a_sign_to_come_is_read_with_it() -> None:
    step, x, mu = Step(torch.randn(4, 9)), torch.randn(4, 9), torch.randn(4, 2)
    loss = functional.elbo_loss(step.recon_x, x, mu, mu, inplace=True, return_terms=True).loss
    expected = -2.0 * (step.leaf.detach() - x) / 4
    (found,) = torch.autograd.grad(loss, step.leaf, torch._neg_view(torch.full((), 2.0)))
    torch.testing.assert_close(found, expected)


def test_a_kept_graph_gives_the_same_gradients_again() -> None:
    for reduction in ("sum", "none"):
        step, x = Step(torch.randn(4, 9)), torch.randn(4, 9)
        expected = 3.0 * (step.leaf.detach() - x)
        loss = 3.0 * functional.gaussian_nll(step.recon_x, x, reduction=reduction, inplace=True).sum()
        for is_kept in (True, True, False):
            (found,) = torch.autograd.grad(loss, step.leaf, retain_graph=is_kept)
            torch.testing.assert_close(found, expected)
            found.mul_(0)  # whoever got it may do as they please, but for the last
        assert step.written == [False, False, True]
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, step.leaf)


def test_terms_that_are_each_differentiable() -> None:
    x, mu, beta = torch.randn(4, 9), torch.randn(4, 2), torch.tensor(0.3, requires_grad=True)
    step = Step(torch.randn(4, 9))
    expected = (step.leaf.detach() - x) / 4
    terms = functional.elbo_loss(step.recon_x, x, mu, mu, beta=beta, return_terms=True, inplace=True)
    assert isinstance(terms, functional.ELBOTerms)
    assert_same(step.recon_x, step.leaf)
    (found,) = torch.autograd.grad(2.0 * terms.nll, step.leaf, retain_graph=True)
    torch.testing.assert_close(found, 2.0 * expected)
    found, d_beta = torch.autograd.grad(terms.loss, [step.leaf, beta])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(d_beta, terms.kl.detach())
    assert step.written == [False, True]


def test_nothing_but_the_reconstruction_is_written_over() -> None:
    x, mu, logvar = torch.randn(4, 9), *(torch.randn(4, 2).requires_grad_() for _ in range(2))
    leaf, before = torch.randn(4, 9).requires_grad_(), mu.detach().clone()
    terms = functional.elbo_loss(leaf * 1, x, mu, logvar, return_terms=True, inplace=True)
    _, found = torch.autograd.grad(terms.loss + terms.kl, [leaf, mu])
    torch.testing.assert_close(found, before / 2)
    assert torch.equal(mu.detach(), before)


def test_a_loss_scaler() -> None:
    x = torch.zeros(64, 32)
    for options in ({}, {"grad_scale": 1.0}):
        step = Step((torch.rand(64, 32) * 0.25).half())
        loss = functional.elbo_loss(step.recon_x, x, x[:, :2], x[:, :2], inplace=True, **options)
        (found,) = torch.autograd.grad(loss * 1024, step.leaf)
        torch.testing.assert_close(found.double(), step.leaf.double() * 16, rtol=2e-3, atol=1e-3)
        assert step.written == [True]


def test_a_tensor_that_keeps_its_gradient() -> None:
    step, x = Step(torch.randn(4, 9)), torch.randn(4, 9)
    step.recon_x.retain_grad()
    functional.gaussian_nll(step.recon_x, x, reduction="sum", inplace=True).backward()
    assert step.recon_x.grad is not None
    torch.testing.assert_close(step.recon_x.grad, step.leaf.detach() - x)


# --- what would be wrong, and is an error -----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Tanh(), nn.ReLU(), nn.Softplus(), nn.Flatten()], ids=str)
def test_a_decoder_whose_last_operation_saved_its_output(last: nn.Module, reduction: str) -> None:
    decoder = nn.Sequential(nn.Linear(3, 5), last)
    z, x = torch.randn(4, 3), torch.rand(4, 5)
    expected = torch.autograd.grad(functional.gaussian_nll(decoder(z), x, reduction="sum"), [*decoder.parameters()])
    loss = functional.gaussian_nll(decoder(z), x, reduction=reduction, inplace=True).sum()
    if reduction == "batchmean":
        loss = loss * 4
    if isinstance(last, (nn.Sigmoid, nn.Tanh, nn.ReLU)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return
    for found, e in zip(torch.autograd.grad(loss, [*decoder.parameters()]), expected, strict=True):
        torch.testing.assert_close(found, e)


def test_a_decoder_in_float16_whose_last_operation_saved_its_output() -> None:
    leaf, x = torch.randn(4, 5).requires_grad_(), torch.rand(4, 5)
    loss = functional.gaussian_nll(torch.sigmoid(leaf.half()), x.half(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_use_that_saved_it() -> None:
    for reduction in ("sum", "none"):
        step, x = Step(torch.randn(4, 9)), torch.randn(4, 9)
        other = step.recon_x.square().sum()
        loss = functional.gaussian_nll(step.recon_x, x, reduction=reduction, inplace=True).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + other).backward()


def test_second_derivatives() -> None:
    step, x = Step(torch.randn(4, 9)), torch.randn(4, 9)
    loss = functional.gaussian_nll(step.recon_x, x, reduction="sum", inplace=True)
    with pytest.raises(RuntimeError, match="recon_x has been overwritten with its gradient"):
        torch.autograd.grad(loss, step.leaf, create_graph=True)
    step = Step(torch.randn(4, 9))
    loss = functional.laplace_nll(step.recon_x.square(), x, reduction="sum", inplace=True)
    with pytest.raises(RuntimeError, match="recon_x has been overwritten with its gradient"):
        torch.autograd.grad(loss, step.leaf, torch.ones(3), is_grads_batched=True)
    # Of values per sample, nothing is overwritten before the backward pass, which has operations of PyTorch then.
    step = Step(torch.randn(4, 9))
    loss = functional.gaussian_nll(step.recon_x, x, reduction="none", inplace=True).sum()
    (first,) = torch.autograd.grad(loss, step.leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), step.leaf)
    torch.testing.assert_close(second, 2.0 * (step.leaf - x).detach())


def test_a_second_loss_in_the_same_memory() -> None:
    step, x = Step(torch.randn(4, 9)), torch.randn(4, 9)
    first = functional.gaussian_nll(step.recon_x, x, reduction="sum", inplace=True)
    with pytest.raises(ValueError, match=r"recon_x: expected memory .* got one that has it already"):
        functional.gaussian_nll(step.recon_x, x, reduction="sum", inplace=True)
    (found,) = torch.autograd.grad(first, step.leaf)
    torch.testing.assert_close(found, step.leaf.detach() - x)


def _refused(recon_x: Tensor, x: Tensor, message: str, **options) -> None:
    before = recon_x.detach().clone()
    with pytest.raises(ValueError, match=message):
        functional.elbo_loss(recon_x, x, torch.zeros(len(x), 2), torch.zeros(len(x), 2), inplace=True, **options)
    assert_same(recon_x.detach(), before)


def test_memory_that_is_not_its_own() -> None:
    leaf, x = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    _refused(leaf, x, "recon_x: expected memory .* got that of a leaf")
    _refused(leaf.view(2, 12), x.view(2, 12), "got that of a leaf")
    whole = leaf * 2
    _refused(whole, whole, "got some that x lies in too")
    _refused(whole, whole.detach(), "got some that x lies in too")
    _refused(whole, x, "got some that recon_logvar lies in too", recon_logvar=whole.detach())
    _refused(whole, x, "got some that another operand lies in too", weight=whole.detach()[0])
    first, second = (leaf * 2).chunk(2, 0)
    _refused(first, x[:2], "got some that recon_logvar lies in too", recon_logvar=second)
    _refused(first, x[:2], "got a part of a larger tensor, which it is a view of")
    _refused((leaf * 2)[:2], x[:2], "got a part of a larger tensor, which it is a view of")
    _refused(whole[:, :3], x[:, :3], "got some with gaps, or broadcast")
    _refused((leaf[:1] * 2).expand(4, 6), x, "got some with gaps, or broadcast")
    _refused((leaf * 2).as_strided((3, 6), (3, 1)), x[:3], "got some with gaps, or broadcast")


def test_a_view_that_others_see() -> None:
    leaf, x = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    whole = leaf * 2
    _refused(whole.view(4, 2, 3), x.view(4, 2, 3), "which it is a view of, and which something else holds")
    view, other = (leaf * 2).view(4, 2, 3), whole
    other = view.flatten()  # a view of the same tensor
    _refused(view, x.view(4, 2, 3), "which it is a view of, and which something else holds")
    del other
    loss = functional.gaussian_nll(view, x.view(4, 2, 3), reduction="sum", inplace=True)  # none, now
    (found,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found, 2 * (2 * leaf.detach() - x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_where_gradients_have_memory_of_their_own() -> None:
    w, x = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    message = "inplace: expected False where gradients have memory of their own"

    def loss(w: Tensor) -> Tensor:
        return functional.gaussian_nll(w * 2, x, reduction="sum", inplace=True)

    with pytest.raises(ValueError, match=message):
        torch.func.grad(loss)(w)
    with pytest.raises(ValueError, match=message):
        torch.jit.trace(loss, (w,), check_trace=False)
    with fusedvae.use_backend("reference"), pytest.raises(ValueError, match=message):
        loss(w)
    with pytest.raises(ValueError, match=message):
        functional.gaussian_nll(w * 2, x, weight=torch.ones(6, requires_grad=True), inplace=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"{message}|Observed exception"):  # PyTorch 2.6 does not say which
        torch.compile(loss, fullgraph=True, backend="eager")(w)


def test_nothing_is_written_that_nothing_needs() -> None:
    step, x = Step(torch.randn(4, 6)), torch.randn(4, 6)
    with torch.no_grad():
        value = functional.gaussian_nll(step.leaf, x, inplace=True)
    assert_same(value, functional.gaussian_nll(step.leaf, x).detach())
    recon_x, logvar = step.leaf.detach().clone(), torch.zeros(4, 6, requires_grad=True)
    functional.gaussian_nll(recon_x, x, logvar, inplace=True).backward()
    assert_same(recon_x, step.leaf.detach())
    torch.vmap(lambda r: functional.gaussian_nll(r, x, inplace=True))(recon_x.expand(2, 4, 6))


def test_saved_tensors_that_come_back_as_others() -> None:
    step, x = Step(torch.randn(4, 6)), torch.randn(4, 6)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> int:
        kept.append(t.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: kept[k]):
        loss = functional.gaussian_nll(step.recon_x, x, reduction="none", inplace=True).sum()
    before = [t.clone() for t in kept]
    (found,) = torch.autograd.grad(loss, step.leaf)
    torch.testing.assert_close(found, step.leaf.detach() - x)
    for t, b in zip(kept, before, strict=True):
        assert_same(t, b)


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Tanh(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_was_saved_under_hooks_is_not_written_over(last: nn.Module, reduction: str) -> None:
    """Of that PyTorch checks no versions: its gradients would be wrong, without an error."""
    layer, h, x = nn.Linear(6, 12), torch.randn(4, 6), torch.rand(4, 12)

    def loss(inplace: bool) -> Tensor:
        return functional.gaussian_nll(last(layer(h)), x, reduction=reduction, inplace=inplace).sum()

    (expected,) = torch.autograd.grad(loss(False), [layer.weight])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hooked = loss(True)
    with torch.autograd.graph.save_on_cpu():
        saved = loss(True)
    for found in (hooked, saved, checkpoint(loss, True, use_reentrant=False)):
        assert_same(torch.autograd.grad(found, [layer.weight])[0], expected)


# --- memory, and modules ----------------------------------------------------------------------------------------------


@pytest.mark.large
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("is_each", [False, True], ids=["a log-variance", "a log-variance an element"])
def test_extra_memory(is_each: bool, reduction: str, target: Target) -> None:
    n = 1 << 22
    x, mu = torch.randn(4, n // 4), torch.randn(4, 8)
    recon_logvar = torch.zeros((4, n // 4) if is_each else (1,)).requires_grad_()
    step = Step(torch.randn(4, n // 4))

    def run() -> None:
        loss = functional.elbo_loss(step.recon_x, x, mu, mu, recon_logvar, reduction=reduction, inplace=True)
        assert isinstance(loss, Tensor)
        torch.autograd.grad(loss.sum(), [step.recon_x, recon_logvar])

    if target.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        assert torch.cuda.max_memory_allocated() - before < (4 * n if is_each else 0) + n
        return
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > n)
    assert allocated == 4 * n * is_each


class _Views(nn.Module):
    """A decoder whose output is a view of what its last layer gave, a mean and a log-variance packed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2 * 12)
        self.is_reused = False
        """Whether the last gradient lay where the output did."""

    def forward(self, z: Tensor) -> Tensor:
        given = self.layer(z)
        given.register_hook(functools.partial(self._compare, given.data_ptr()))
        return given.view(-1, 2, 3, 4)

    def _compare(self, address: int, gradient: Tensor) -> None:
        self.is_reused = gradient.data_ptr() == address


@pytest.mark.parametrize(
    "options",
    [{}, {"samples": 3}, {"samples": 3, "bound": "iwae"}, {"reduction": "none"}, {"reduction": "mean"}],
    ids=["loss", "samples", "iwae", "none", "mean"],
)
def test_a_vae(options: dict) -> None:
    vae = fusedvae.VAE(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), _Views(), 3)
    x = torch.randn(5, 1, 3, 4)

    def gradients(inplace: bool) -> list[Tensor]:
        torch.manual_seed(4)
        loss = vae.loss(x, inplace=inplace, **options).sum()
        found = torch.autograd.grad(loss, [*vae.parameters()])
        assert vae.decoder.is_reused == inplace
        return [loss.detach(), *found]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_output_of_a_vae_and_the_loss_as_a_module() -> None:
    decoder = nn.Linear(3, 12)
    vae = fusedvae.VAE(nn.Linear(12, 6), decoder, 3, recon_logvar="learned")
    x = torch.randn(5, 12)

    def gradients(inplace: bool) -> list[Tensor]:
        torch.manual_seed(4)
        loss = vae(x).loss(x, inplace=inplace)
        return [loss.detach(), *torch.autograd.grad(loss, [*vae.parameters()])]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)
    z, mu = torch.randn(5, 3), torch.randn(5, 3)
    module = fusedvae.ELBOLoss(inplace=True)
    assert repr(module) == "ELBOLoss(beta=1.0, reduction='batchmean', inplace=True)"
    recon_x = decoder(z)
    found = torch.autograd.grad(module(recon_x, x, mu, mu), decoder.weight)
    torch.testing.assert_close(found, torch.autograd.grad(fusedvae.ELBOLoss()(decoder(z), x, mu, mu), decoder.weight))
    torch.testing.assert_close(recon_x, (decoder(z) - x) / 5)
