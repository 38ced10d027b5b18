"""The VAE module: values against the formulas, every form of encoder and decoder, and its errors."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

import fusedvae
from fusedvae import VAE, functional, networks
from fusedvae.vae import DiagonalGaussian, VAEOutput

BATCH, CHANNELS, LATENT = 5, 3, 2
SHAPE = (CHANNELS, 4, 4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads slow down models as small as these, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Apply(nn.Module):
    """A module without parameters, made of a function."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1))


def packed_encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 2 * LATENT))


def packed_decoder() -> nn.Module:
    return nn.Sequential(nn.Linear(LATENT, 2 * math.prod(SHAPE)), nn.Unflatten(1, (2 * CHANNELS, *SHAPE[1:])))


def mean_decoder() -> nn.Module:
    return nn.Sequential(nn.Linear(LATENT, math.prod(SHAPE)), nn.Unflatten(1, SHAPE))


class AsPair(nn.Module):
    """The two halves of what a module gives, as a pair."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.module(x).chunk(2, dim=1)


def nll(x: Tensor, mean: Tensor, logvar: Tensor | float) -> Tensor:
    logvar = torch.as_tensor(logvar).expand_as(mean)
    return ((logvar + (mean - x) ** 2 * torch.exp(-logvar)) / 2).flatten(1).sum(1)


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return ((mu**2 + torch.expm1(logvar) - logvar) / 2).flatten(1).sum(1)


def make_vae(**options: object) -> VAE:
    torch.manual_seed(0)
    return VAE(packed_encoder(), packed_decoder(), LATENT, **options)


# --- values -----------------------------------------------------------------------------------------------------


def test_forward_shows_every_step(x: Tensor) -> None:
    vae = make_vae()
    torch.manual_seed(3)
    out = vae(x)
    assert isinstance(out, VAEOutput)
    mu, logvar = vae.encoder(x).chunk(2, dim=1)
    torch.testing.assert_close(out.mu, mu)
    torch.testing.assert_close(out.logvar, logvar)
    torch.testing.assert_close(out.kl, kl(mu, logvar))
    mean, recon_logvar = vae.decoder(out.z).chunk(2, dim=1)
    torch.testing.assert_close(out.recon_x, mean)
    torch.testing.assert_close(out.recon_logvar, recon_logvar)
    torch.manual_seed(3)
    torch.testing.assert_close(out.z, functional.latent(mu, logvar).z)


@pytest.mark.parametrize("beta", [1.0, 0.25, torch.tensor(0.5)])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_loss_is_the_bound_of_what_forward_computes(x: Tensor, beta: float | Tensor, reduction: str) -> None:
    vae = make_vae()
    reduce = {"batchmean": Tensor.mean, "sum": Tensor.sum, "none": Tensor.clone}[reduction]
    torch.manual_seed(3)
    out = vae(x)
    expected_nll, expected_kl = nll(x, out.recon_x, out.recon_logvar), kl(out.mu, out.logvar)
    torch.manual_seed(3)
    terms = vae.loss(x, beta=beta, reduction=reduction, return_terms=True)
    torch.testing.assert_close(terms.nll, reduce(expected_nll))
    torch.testing.assert_close(terms.kl, reduce(expected_kl))
    torch.testing.assert_close(terms.loss, reduce(expected_nll + beta * expected_kl))
    torch.manual_seed(3)
    torch.testing.assert_close(vae.loss(x, beta=beta, reduction=reduction), terms.loss)


def test_full_adds_the_constant_of_the_density(x: Tensor) -> None:
    vae = make_vae()
    losses = []
    for full in (False, True):
        torch.manual_seed(3)
        losses.append(vae.loss(x, full=full))
    constant = math.prod(SHAPE) * math.log(2 * math.pi) / 2
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor(constant), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_formulas(x: Tensor) -> None:
    vae = make_vae().double()
    x = x.double()
    torch.manual_seed(3)
    vae.loss(x, beta=0.7).backward()
    fused = {name: parameter.grad for name, parameter in vae.named_parameters()}
    vae.zero_grad()
    mu, logvar = vae.encoder(x).chunk(2, dim=1)
    torch.manual_seed(3)
    noise = functional.reparameterize(torch.zeros_like(mu), torch.zeros_like(mu))
    mean, recon_logvar = vae.decoder(mu + torch.exp(logvar / 2) * noise).chunk(2, dim=1)
    (nll(x, mean, recon_logvar) + 0.7 * kl(mu, logvar)).mean().backward()
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, msg=name)


def test_the_elbo_bounds_the_evidence_of_a_linear_model() -> None:
    # x = w z + noise has the evidence N(0, w² + s²); with the exact posterior the bound is the evidence.
    w, variance = 2.0, 0.5
    posterior_variance = 1 / (1 + w * w / variance)

    def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * w / variance * posterior_variance, torch.full_like(x, math.log(posterior_variance))

    vae = VAE(Apply(posterior), Apply(lambda z: w * z), 1, recon_logvar=math.log(variance))
    x = torch.tensor([[0.3], [-1.2], [2.5]], dtype=torch.float64)
    many = x.repeat(200_000, 1)
    torch.manual_seed(0)
    bound = -vae.loss(many, full=True, reduction="none").reshape(-1, 3).mean(0)
    evidence = torch.distributions.Normal(0, math.sqrt(w * w + variance)).log_prob(x)[:, 0]
    torch.testing.assert_close(bound, evidence.double(), rtol=0, atol=0.01)


# --- forms of encoder and decoder -------------------------------------------------------------------------------


def test_packed_and_pair_give_the_same(x: Tensor) -> None:
    vae = make_vae()
    pairs = VAE(AsPair(vae.encoder), AsPair(vae.decoder), LATENT)
    losses, gradients = [], []
    for model in (vae, pairs):
        torch.manual_seed(3)
        model.zero_grad()
        loss = model.loss(x)
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("recon_logvar", "trainable", "keys"),
    [
        (-1.5, False, []),
        (0, False, []),
        ("learned", True, ["recon_logvar"]),
        (torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1), False, ["recon_logvar"]),
        (nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)), True, ["recon_logvar"]),
    ],
)
def test_a_mean_only_decoder_takes_its_log_variance_from_the_vae(
    x: Tensor, recon_logvar: object, trainable: bool, keys: list[str]
) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=recon_logvar)
    assert [key for key in vae.state_dict() if "recon" in key] == keys
    assert ("recon_logvar" in dict(vae.named_parameters())) == trainable
    value = 0.0 if recon_logvar == "learned" else recon_logvar
    torch.manual_seed(3)
    out = vae(x)
    torch.manual_seed(3)
    terms = vae.loss(x, return_terms=True)
    torch.testing.assert_close(terms.nll, nll(x, out.recon_x, value).mean())
    torch.testing.assert_close(out.recon_logvar.expand_as(x), torch.as_tensor(value).float().expand_as(x))
    terms.loss.backward()
    if trainable:
        expected = (1 - (out.recon_x - x) ** 2 * torch.exp(-torch.as_tensor(value))) / 2 / BATCH
        kept = vae.recon_logvar.shape
        expected = expected.sum().view(kept) if kept in ((), (1,)) else expected.sum((0, 2, 3)).view(kept)
        torch.testing.assert_close(vae.recon_logvar.grad, expected.detach())


def test_a_pair_may_hold_a_log_variance_that_broadcasts(x: Tensor) -> None:
    class PerChannel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = mean_decoder()

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(z), z[:, :1, None, None].expand(-1, CHANNELS, 1, 1)

    vae = VAE(packed_encoder(), PerChannel(), LATENT)
    torch.manual_seed(3)
    out = vae(x)
    torch.manual_seed(3)
    torch.testing.assert_close(vae.loss(x), (nll(x, out.recon_x, out.recon_logvar) + out.kl).mean())
    assert vae.generate(7, sample=True).shape == (7, *SHAPE)


@pytest.mark.parametrize("latent_dim", [(4, 2, 2), [4, 2, 2], (4, None, None), (None, 2, 2)])
def test_latents_may_be_spatial(latent_dim: tuple) -> None:
    encoder = nn.Conv2d(CHANNELS, 8, 2, stride=2)
    decoder = nn.ConvTranspose2d(4, 2 * CHANNELS, 2, stride=2)
    vae = VAE(encoder, decoder, latent_dim)
    x = torch.rand(BATCH, *SHAPE)
    out = vae(x)
    assert out.z.shape == out.mu.shape == (BATCH, 4, 2, 2)
    torch.testing.assert_close(out.kl, kl(out.mu, out.logvar))
    vae.loss(x).backward()
    assert vae.embed(x).shape == (BATCH, 16)
    assert vae.reconstruct(x).shape == x.shape
    if None in latent_dim:
        with pytest.raises(ValueError, match=r"latent_dim: generate needs every size, got \(.*\*.*\); call decode"):
            vae.generate(3)
    else:
        assert vae.generate(3).shape == (3, *SHAPE)


def test_a_size_left_open_takes_images_of_several_sizes() -> None:
    vae = VAE(nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(4, 6, 2, stride=2), (4, None, None))
    for size in (4, 10):
        assert vae(torch.rand(2, 3, size, size)).z.shape == (2, 4, size // 2, size // 2)


# --- use --------------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_distributions(x: Tensor) -> None:
    vae = make_vae()
    posterior = vae.encode(x)
    assert isinstance(posterior, DiagonalGaussian)
    mu, logvar = posterior
    torch.testing.assert_close(torch.cat([mu, logvar], 1), vae.encoder(x))
    generator = torch.Generator().manual_seed(5)
    z = posterior.sample(generator=generator)
    noise = (z - mu) / torch.exp(logvar / 2)
    again = functional.reparameterize(torch.zeros_like(mu), torch.zeros_like(mu), generator=generator.manual_seed(5))
    torch.testing.assert_close(noise, again)
    mean, recon_logvar = vae.decode(z)
    torch.testing.assert_close(torch.cat([mean, recon_logvar], 1), vae.decoder(z))


def test_a_sample_has_the_moments_of_its_distribution() -> None:
    p = DiagonalGaussian(torch.tensor([[1.0, -2.0]]).expand(100_000, 2), torch.tensor([0.0, math.log(9.0)]))
    drawn = p.sample(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std(0), torch.tensor([1.0, 3.0]), rtol=0.02, atol=0)


def test_reconstruct_is_the_decoder_of_the_posterior_mean(x: Tensor) -> None:
    vae = make_vae()
    expected = vae.decoder(vae.encoder(x)[:, :LATENT])[:, :CHANNELS]
    torch.testing.assert_close(vae.reconstruct(x), expected)
    torch.testing.assert_close(vae.reconstruct(x), expected)  # no noise in it


def test_reconstruct_can_sample(x: Tensor) -> None:
    vae = make_vae()
    generator = torch.Generator().manual_seed(5)
    drawn = vae.reconstruct(x, sample=True, generator=generator)
    z = vae.encode(x).sample(generator=generator.manual_seed(5))
    torch.testing.assert_close(drawn, vae.decode(z).sample(generator=generator))
    assert not torch.equal(drawn, vae.reconstruct(x, sample=True))


def test_generate_decodes_the_prior() -> None:
    vae = make_vae()
    z = torch.randn(6, LATENT, generator=torch.Generator().manual_seed(5))
    images = vae.generate(6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(images, vae.decode(z).mu)
    sampled = vae.generate(6, sample=True, generator=torch.Generator().manual_seed(5))
    assert sampled.shape == images.shape
    assert not torch.equal(sampled, images)
    torch.manual_seed(5)
    first = vae.generate(6)
    torch.manual_seed(5)
    assert torch.equal(first, vae.generate(6))


def test_generate_samples_with_the_likelihoods_variance() -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=math.log(0.25))
    with torch.no_grad():
        vae.decoder[0].weight.zero_()
    pixels = vae.generate(4000, sample=True, generator=torch.Generator().manual_seed(0)).detach()
    torch.testing.assert_close(pixels.std(0), torch.full(SHAPE, 0.5), rtol=0.06, atol=0)


def test_embed_gives_posterior_means(x: Tensor) -> None:
    vae = make_vae()
    assert torch.equal(vae.embed(x), vae.encode(x).mu)


def test_generate_follows_the_decoders_dtype() -> None:
    assert make_vae().double().generate(2).dtype == torch.float64
    without_parameters = VAE(Apply(lambda x: (x, x)), Apply(lambda z: z), LATENT, recon_logvar=0.0)
    assert without_parameters.generate(2).dtype == torch.float32


def test_a_generator_decides_the_noise(x: Tensor) -> None:
    vae = make_vae()
    generator = torch.Generator()
    first = vae.loss(x, generator=generator.manual_seed(1))
    torch.manual_seed(99)
    assert torch.equal(first, vae.loss(x, generator=generator.manual_seed(1)))
    assert not torch.equal(first, vae.loss(x, generator=generator.manual_seed(2)))
    assert torch.equal(vae(x, generator=generator.manual_seed(1)).z, vae(x, generator=generator.manual_seed(1)).z)


def test_the_state_dict_is_the_same_under_every_backend(x: Tensor) -> None:
    states, losses = [], []
    for name in fusedvae.backends():
        with fusedvae.use_backend(name):
            torch.manual_seed(0)
            vae = VAE(*networks.conv(SHAPE, LATENT, width=4), LATENT)
            torch.manual_seed(3)
            losses.append(vae.loss(x))
            states.append(vae.state_dict())
    for state, loss in zip(states[1:], losses[1:], strict=True):
        assert list(state) == list(states[0])
        assert all(torch.equal(state[key], states[0][key]) for key in state)
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-4)


def test_a_state_dict_round_trip(x: Tensor, tmp_path: object) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    with torch.no_grad():
        vae.recon_logvar.fill_(-0.7)
    other = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    torch.save(vae.state_dict(), f"{tmp_path}/vae.pt")
    other.load_state_dict(torch.load(f"{tmp_path}/vae.pt", weights_only=True))
    assert torch.equal(other.reconstruct(x), vae.reconstruct(x))
    assert other.recon_logvar.item() == vae.recon_logvar.item()


def test_training_improves_the_bound(x: Tensor) -> None:
    torch.manual_seed(0)
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.02)
    first = vae.loss(x).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = vae.loss(x)
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 10
    assert vae.recon_logvar.item() < -0.5


def test_beta_may_be_learned_by_someone_else(x: Tensor) -> None:
    vae = make_vae()
    beta = torch.tensor(0.5, requires_grad=True)
    terms = vae.loss(x, beta=beta, return_terms=True)
    (gradient,) = torch.autograd.grad(terms.loss, beta)
    torch.testing.assert_close(gradient, terms.kl.detach())


def test_under_autocast_the_loss_is_float32(x: Tensor) -> None:
    vae = make_vae()
    torch.manual_seed(3)
    expected = vae.loss(x)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vae.loss(x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.2)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in vae.parameters())


@pytest.mark.parametrize("recon_logvar", [None, "learned"])
def test_a_compiled_step_is_one_graph_and_agrees(recon_logvar: str | None) -> None:
    torch.manual_seed(0)
    pair = networks.mlp(SHAPE, LATENT, hidden=(16,), mean_only=recon_logvar is not None)
    vae = VAE(*pair, LATENT, recon_logvar=recon_logvar)
    x = torch.rand(BATCH, *SHAPE)
    results = []
    for loss in (vae.loss, torch.compile(vae.loss, fullgraph=True, backend="aot_eager")):
        vae.zero_grad()
        torch.manual_seed(3)
        terms = loss(x, return_terms=True)
        terms.loss.backward()
        results.append((tuple(terms), [parameter.grad.clone() for parameter in vae.parameters()]))
    torch.testing.assert_close(*results)


def test_repr_names_the_options() -> None:
    assert "latent_dim=2, recon_logvar=None" in repr(make_vae())
    spatial = VAE(nn.Identity(), nn.Identity(), (4, None, None), recon_logvar="learned")
    assert "latent_dim=(4, None, None)" in repr(spatial)


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((len, nn.Identity(), 2), {}, TypeError, r"encoder: expected a torch.nn.Module, got builtin_function"),
        ((nn.Identity(), None, 2), {}, TypeError, r"decoder: expected a torch.nn.Module, got NoneType"),
        ((nn.Identity(), nn.Identity(), 0), {}, ValueError, r"latent_dim: expected positive sizes, got 0"),
        ((nn.Identity(), nn.Identity(), (4, -1)), {}, ValueError, r"latent_dim: .* got \(4, -1\)"),
        ((nn.Identity(), nn.Identity(), ()), {}, ValueError, r"latent_dim: .* got \(\)"),
        ((nn.Identity(), nn.Identity(), 2.0), {}, TypeError, r"latent_dim: .* got float"),
        ((nn.Identity(), nn.Identity(), True), {}, TypeError, r"latent_dim: .* got bool"),
        ((nn.Identity(), nn.Identity(), "2"), {}, TypeError, r"latent_dim: .* got str"),
        ((nn.Identity(), nn.Identity(), (2, 2.5)), {}, TypeError, r"latent_dim: .* got \(2, 2.5\)"),
        ((nn.Identity(), nn.Identity(), 2), {"recon_logvar": "fixed"}, ValueError, r"recon_logvar: .* 'fixed'"),
        ((nn.Identity(), nn.Identity(), 2), {"recon_logvar": [0.0]}, TypeError, r"recon_logvar: .* got list"),
        ((nn.Identity(), nn.Identity(), 2), {"recon_logvar": True}, TypeError, r"recon_logvar: .* got bool"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VAE(*arguments, **options)


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (lambda x: x.new_zeros(5, 3), ValueError, r"encoder: expected a packed posterior of shape \(5, 4\).*\(5, 3\)"),
        (lambda x: x.new_zeros(5, 4, 1, 1), ValueError, r"encoder: .*latent_dim \(2,\); got \(5, 4, 1, 1\)"),
        (lambda x: x.new_zeros(4, 4), ValueError, r"encoder: expected .*\(5, 4\).* got \(4, 4\)"),
        (lambda x: (x.new_zeros(5, 4),) * 2, ValueError, r"encoder: expected mu of shape \(5, 2\).* got \(5, 4\)"),
        (
            lambda x: (x.new_zeros(5, 2), x.new_zeros(5, 1)),
            ValueError,
            r"encoder: expected logvar of shape \(5, 2\).* got \(5, 1\)",
        ),
        (lambda x: (x, x, x), TypeError, r"encoder: expected a tensor or a pair.* got tuple of \(Tensor, Tensor"),
        (lambda x: (x, None), TypeError, r"encoder: .* got tuple of \(Tensor, NoneType\)"),
        (lambda x: {"mu": x}, TypeError, r"encoder: .* got dict"),
    ],
)
@pytest.mark.parametrize("method", ["loss", "encode", "embed", "reconstruct", "forward"])
def test_what_an_encoder_gives_is_checked(
    x: Tensor, method: str, encoder: Callable, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(VAE(Apply(encoder), packed_decoder(), LATENT), method)(x)


@pytest.mark.parametrize(
    ("decoder", "recon_logvar", "error", "message"),
    [
        (mean_decoder(), None, ValueError, r"decoder: expected a mean and a log-variance.*even.*pass recon_logvar"),
        (packed_decoder(), 0.0, ValueError, r"decoder: expected a mean of shape \(5, 3, 4, 4\).*leave recon_logvar"),
        (AsPair(packed_decoder()), 0.0, TypeError, r"decoder: expected the mean only, .* got a pair"),
        (Apply(lambda z: z.new_zeros(4, 6, 4, 4)), None, ValueError, r"decoder: .*batch of 5.*\(4, 6, 4, 4\)"),
        (Apply(lambda z: z.new_zeros(5)), None, ValueError, r"decoder: .*\(batch, channels, \.\.\.\).*\(5,\)"),
        (
            Apply(lambda z: z.new_zeros(5, 6, 4, 5)),
            None,
            ValueError,
            r"decoder: expected a packed mean and log-variance of shape \(5, 6, 4, 4\).*got \(5, 6, 4, 5\)",
        ),
        (Apply(lambda z: None), None, TypeError, r"decoder: expected a tensor or a pair.* got NoneType"),
    ],
)
@pytest.mark.parametrize("method", ["loss", "reconstruct", "forward"])
def test_what_a_decoder_gives_is_checked(
    x: Tensor, method: str, decoder: nn.Module, recon_logvar: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(VAE(packed_encoder(), decoder, LATENT, recon_logvar=recon_logvar), method)(x)


def test_an_even_number_of_channels_is_told_from_a_packed_output_by_the_data() -> None:
    # Means of two channels look like one mean and one log-variance until there is an x to compare with.
    decoder = nn.Sequential(nn.Linear(LATENT, 8), nn.Unflatten(1, (2, 2, 2)))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 2 * LATENT))
    x = torch.rand(3, 2, 2, 2)
    with pytest.raises(ValueError, match=r"\(3, 4, 2, 2\) for x of shape \(3, 2, 2, 2\), got \(3, 2, 2, 2\); if"):
        VAE(encoder, decoder, LATENT).loss(x)
    vae = VAE(encoder, decoder, LATENT, recon_logvar=0.0)
    vae.loss(x)
    assert vae.generate(5).shape == (5, 2, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda vae: vae.generate(0), ValueError, r"n: expected at least 1, got 0"),
        (lambda vae: vae.generate(2.0), TypeError, r"n: expected an integer, got float"),
        (lambda vae: vae.loss([1.0]), TypeError, r"x: expected a tensor, got list"),
        (lambda vae: vae.encode(torch.tensor(1.0)), ValueError, r"x: expected a batch dimension"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), reduction="mean"), ValueError, r"reduction: 'mean'"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), beta="1"), TypeError, r"beta: expected a number"),
    ],
)
def test_wrong_calls_are_named(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make_vae())


# --- under wrappers, exported, and with numbers of NumPy --------------------------------------------------------------


def test_the_output_has_the_loss_of_its_pass(x: Tensor) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    torch.manual_seed(5)
    expected = vae.loss(x, beta=0.3, return_terms=True, full=True)
    torch.manual_seed(5)
    found = vae(x).loss(x, beta=0.3, return_terms=True, full=True)
    parameters = list(vae.parameters())
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    for f, e in zip(
        torch.autograd.grad(found[0], parameters), torch.autograd.grad(expected[0], parameters), strict=True
    ):
        torch.testing.assert_close(f, e)


def test_the_learned_log_variance_is_no_scalar_and_comes_out_as_a_function_of_itself(x: Tensor) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    assert isinstance(vae.recon_logvar, nn.Parameter)
    assert vae.recon_logvar.shape == (1,)
    assert vae(x).recon_logvar.grad_fn is not None
    vae.load_state_dict({**vae.state_dict(), "recon_logvar": torch.tensor(0.7)})  # as versions before had it
    assert vae.recon_logvar.tolist() == [pytest.approx(0.7)]


def test_a_loss_past_a_wrapper_is_said_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("fusedvae.vae._has_warned", False)
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=0.0)
    vae(x).loss(x)
    with pytest.warns(UserWarning, match=r"do not synchronise .* wrapped\(x\)\.loss\(x\)"):
        vae.loss(x)
    vae.loss(x)  # warnings are errors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its exporter
def test_an_exported_vae_can_be_saved_and_moved(x: Tensor) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=0.0).eval()
    program, buffer = torch.export.export(vae, (x,)), io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert torch.export.load(buffer).module()(x).kl.shape == (BATCH,)
    moved = move_to_device_pass(program, "meta")
    drawn = [node for node in moved.graph.nodes if "draw_seed" in str(node.target)]
    assert [str(node.kwargs["device"]) for node in drawn] == ["meta"]


def test_sizes_and_numbers_may_be_numpys() -> None:
    six, three = np.int64(6), np.int64(3)
    vae = VAE(*networks.mlp((six,), three, hidden=[np.int32(8)]), three)
    assert vae.generate(np.int64(2)).shape == (2, 6)
    assert VAE(nn.Identity(), nn.Identity(), 3, recon_logvar=np.float32(0.5)).recon_logvar == 0.5
    seed = np.uint32(2**32 - 5)
    assert torch.equal(fusedvae.random.normal((np.int64(2), 3), seed), fusedvae.random.normal((2, 3), 2**32 - 5))


def test_a_tensor_beta_may_become_a_number_and_back() -> None:
    t = torch.zeros(4, 3)
    for beta in (torch.tensor(0.0), nn.Parameter(torch.tensor(0.0)), 0.0):
        criterion = fusedvae.ELBOLoss(beta=beta)
        criterion.beta = 0.5
        assert criterion(t, t, t + 1, t).item() == 0.75
        assert not list(criterion.parameters())
        criterion.beta = torch.tensor(0.25)
        assert criterion(t, t, t + 1, t).item() == 0.375
        assert [name for name, _ in criterion.named_buffers()] == ["beta"]
        with pytest.raises(TypeError, match="beta"):
            criterion.beta = "one"
