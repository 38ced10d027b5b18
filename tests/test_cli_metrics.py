"""Metrics of a trained model on data, against values that are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedvae
from fusedvae.cli import data, metrics
from fusedvae.cli.data.samples import InMemory


class Encoder(nn.Module):
    """Posterior means that are a function of the sample, and log-variances of 0."""

    def __init__(self, means: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.means = means

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means = self.means(x)
        return means, torch.zeros_like(means)


class Decoder(nn.Module):
    """Means that are a function of the latent variables, with a parameter, which says where the model is."""

    def __init__(self, means: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.means, self.zero = means, nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return self.means(z) + self.zero


def samples_of(values: Tensor) -> data.Samples:
    return data.Samples(InMemory(values), data.Preparation(tuple(values.shape[1:])))


def vae(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], latent: int) -> fusedvae.VAE:
    return fusedvae.VAE(Encoder(encode), Decoder(decode), latent, recon_logvar=0.0).train()


@pytest.mark.parametrize("batch", [7, 64])
def test_log_likelihood_where_the_latents_say_nothing(batch: int) -> None:
    x = torch.rand(20, 5)
    model = vae(lambda x: torch.zeros(len(x), 3), lambda z: torch.zeros(*z.shape[:-1], 5), 3)
    expected = -(x.double().square() + math.log(2 * math.pi)).sum(1).mean().item() / 2
    assert metrics.log_likelihood(model, samples_of(x), particles=4, batch=batch) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_log_likelihood_is_that_of_a_linear_model() -> None:
    # x = z + noise of variance 1, z of the prior: x is normal of variance 2.
    x = 2 * torch.rand(30, 1)
    model = vae(lambda x: x / 2, lambda z: z, 1)
    expected = -(x.double().square() / 2 + math.log(4 * math.pi)).mean().item() / 2
    found = metrics.log_likelihood(model, samples_of(x), particles=20000, seed=3)
    assert found == pytest.approx(expected, abs=5e-3)
    assert found == metrics.log_likelihood(model, samples_of(x), particles=20000, seed=3)


@pytest.mark.parametrize("batch", [1, 9, 1000])
def test_active_units_are_those_whose_means_vary(batch: int) -> None:
    x = torch.rand(200, 4)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    # Variances of 1, 0.0121, 0.0081 and 0; far from zero, where sums of squares would have lost the small ones.
    scales = torch.tensor([1.0, 0.11, 0.09, 0.0])
    model = vae(lambda x: x * scales + 100, lambda z: z, 4)
    assert metrics.active_units(model, samples_of(x), batch=batch) == 2
    assert metrics.active_units(model, samples_of(x), threshold=0.005, batch=batch) == 3


@pytest.mark.parametrize("shape", [(3, 12, 15), (1, 4, 4), (6,)], ids=str)
def test_psnr(shape: tuple[int, ...]) -> None:
    x = torch.rand(10, *shape)
    model = vae(lambda x: x.flatten(1), lambda z: 1.5 * z.unflatten(-1, shape), math.prod(shape))
    error = ((1.5 * x).clamp(max=1) - x).double().square().flatten(1).mean(1)
    expected = (-10 * error.log10()).mean().item()
    assert metrics.psnr(model, samples_of(x), batch=4) == pytest.approx(expected, rel=1e-4)


def test_ssim_of_flat_images_is_that_of_their_brightness() -> None:
    x = torch.tensor([0.2, 0.5, 0.8])[:, None, None, None].expand(3, 2, 11, 13).contiguous()
    model = vae(lambda x: x.flatten(1), lambda z: 0.5 * z.unflatten(-1, (2, 11, 13)), 2 * 11 * 13)
    a, b, c = x[:, 0, 0, 0].double(), 0.5 * x[:, 0, 0, 0].double(), 0.01**2
    expected = ((2 * a * b + c) / (a**2 + b**2 + c)).mean().item()
    assert metrics.ssim(model, samples_of(x), batch=2) == pytest.approx(expected, rel=1e-3)


def test_ssim_is_1_of_the_same_images_and_less_of_others() -> None:
    x = torch.rand(4, 1, 16, 16)
    same = vae(lambda x: x.flatten(1), lambda z: z.unflatten(-1, (1, 16, 16)), 256)
    assert metrics.ssim(same, samples_of(x)) == pytest.approx(1, abs=1e-5)
    mirrored = vae(lambda x: x.flip(3).flatten(1), lambda z: z.unflatten(-1, (1, 16, 16)), 256)
    assert metrics.ssim(mirrored, samples_of(x)) < 0.5
    with pytest.raises(ValueError, match="expected images of at least 11x11, got shape"):
        metrics.ssim(same, samples_of(torch.rand(4, 1, 8, 16)))


def test_ssim_of_a_few_at_a_time_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(5, 1, 12, 13)
    model = vae(lambda x: x.flip(3).flatten(1), lambda z: z.unflatten(-1, (1, 12, 13)), 12 * 13)
    whole = metrics.ssim(model, samples_of(x))
    for images in (1, 2):
        monkeypatch.setattr(metrics, "PIXELS_AT_A_TIME", images * 12 * 13)
        assert metrics.ssim(model, samples_of(x)) == pytest.approx(whole, rel=1e-5)
