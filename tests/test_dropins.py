"""fusedvae.patch: what it does to a library and undoes, and that models of the library compute what they did.

Whole models are compared on equal noise, loss and gradients, patched against as they come. Libraries that are not
installed are skipped: `pip install -c constraints.txt '.[interop]'` brings them all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import math
import pickle
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedvae
from fusedvae import distributions, dropins

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def _library(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: see the extra 'interop'")
    return importlib.import_module(name)


@pytest.fixture
def diffusers() -> ModuleType:
    return _library("diffusers")


@pytest.fixture
def pythae() -> ModuleType:
    _library("pythae")
    return importlib.import_module("pythae.models")


@pytest.fixture
def scvi() -> ModuleType:
    return _library("scvi")


def _loss_and_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The loss and the gradients of all parameters, from the same noise at every call."""
    model.zero_grad()
    torch.manual_seed(7)
    value = loss()
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **gradients}


def _assert_alike(library: str, model: nn.Module, loss: Callable[[], Tensor], tolerance: float) -> None:
    """Compare a model patched and not: on the library's noise, and that the package's own differs."""
    expected = _loss_and_gradients(model, loss)
    with fusedvae.patch(library, noise="library"):
        found = _loss_and_gradients(model, loss)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for name, gradient in expected.items() if name != "loss")
    assert largest > 0
    for name, value in expected.items():
        scale = torch.maximum(value.abs().max(), 0.1 * largest)  # some are 0, but for rounding
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=tolerance, msg=name)
    again = _loss_and_gradients(model, loss)  # undone
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    with fusedvae.patch(library, noise="fused"):
        other = _loss_and_gradients(model, loss)["loss"]
    assert other != expected["loss"]
    assert other.isfinite()


# --- patch itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["diffusion"], {}), ValueError, "library: expected one of 'diffusers', 'pythae', 'scvi'; got 'diffusion'"),
        ((["diffusers"], {"noise": "mine"}), ValueError, "noise: expected 'fused' or 'library', got 'mine'"),
    ],
    ids=["library", "noise"],
)
def test_wrong_arguments(arguments: tuple[list[str], dict[str, str]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedvae.patch(*arguments[0], **arguments[1])


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dropins.LIBRARIES, "pythae", "no-such-distribution")
    with pytest.raises(
        ImportError, match=r"library: pythae is not installed here.*; pip install no-such-distribution$"
    ):
        fusedvae.patch("pythae")


def test_a_switch_and_a_context_manager(diffusers: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers.models.autoencoders import autoencoder_kl, vae

    original = vae.DiagonalGaussianDistribution
    moments = torch.randn(2, 4, 3, 3)
    with caplog.at_level(logging.INFO, logger="fusedvae"):
        patch = fusedvae.patch("diffusers")
    version = importlib.metadata.version("diffusers")
    assert [record.getMessage() for record in caplog.records] == [
        f"diffusers {version}: replaced DiagonalGaussianDistribution, OobleckDiagonalGaussianDistribution"
    ]
    try:
        assert patch.replaced == ("DiagonalGaussianDistribution", "OobleckDiagonalGaussianDistribution")
        # Wherever it is called, and what is made of it, is one of either class.
        for module in (vae, autoencoder_kl):
            assert module.DiagonalGaussianDistribution is not original
            made = module.DiagonalGaussianDistribution(moments)
            assert isinstance(made, original)
            assert isinstance(made, distributions.DiagonalGaussianDistribution)
        assert torch.equal(pickle.loads(pickle.dumps(made)).mean, made.mean)
        # A module that is imported now.
        sys.modules.pop("diffusers.models.autoencoders.autoencoder_kl_temporal_decoder", None)
        late = importlib.import_module("diffusers.models.autoencoders.autoencoder_kl_temporal_decoder")
        assert late.DiagonalGaussianDistribution is vae.DiagonalGaussianDistribution
        # A second time is no error, and undoing it undoes nothing.
        with fusedvae.patch("diffusers") as second:
            assert second.replaced == ()
        assert vae.DiagonalGaussianDistribution is not original
        with pytest.raises(ValueError, match="noise: diffusers is patched already, with noise='fused'"):
            fusedvae.patch("diffusers", noise="library")
    finally:
        patch.undo()
    for module in (vae, autoencoder_kl, late):
        assert module.DiagonalGaussianDistribution is original
    patch.undo()
    assert vae.DiagonalGaussianDistribution is original
    assert made.kl().shape == (2,)  # what was made goes on
    with pytest.raises(KeyError), fusedvae.patch("diffusers"):
        raise KeyError
    assert vae.DiagonalGaussianDistribution is original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda original: lambda self, other=None: 2 * original(self, other), "kl does not compute what was expected"),
        (lambda original: lambda self, prior=None: original(self, prior), r"kl takes \(prior\), expected \(other\)"),
        (None, "has no attribute 'kl'"),
    ],
    ids=["values", "arguments", "absent"],
)
def test_a_version_that_is_not_known(
    diffusers: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any] | None, message: str
) -> None:
    from diffusers.models.autoencoders import vae

    original = vae.DiagonalGaussianDistribution
    if change is None:
        monkeypatch.delattr(original, "kl")
    else:
        monkeypatch.setattr(original, "kl", change(original.kl))
    with pytest.raises(
        RuntimeError, match=rf"diffusers \S+ is not as known, and nothing of it was replaced: .*{message}"
    ):
        fusedvae.patch("diffusers")
    assert vae.DiagonalGaussianDistribution is original
    monkeypatch.undo()
    with fusedvae.patch("diffusers"):
        pass


def test_what_others_replaced_since_stays(pythae: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pythae.VAE, "_sample_gauss", pythae.VAE._sample_gauss)  # to be put back after the test
    patch = fusedvae.patch("pythae")
    theirs = lambda self, mu, std: (mu, std)  # noqa: E731
    pythae.VAE._sample_gauss = theirs
    patch.undo()
    assert pythae.VAE._sample_gauss is theirs


# --- diffusers --------------------------------------------------------------------------------------------------------


def _image_autoencoder(diffusers: ModuleType) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def _video_autoencoder(diffusers: ModuleType) -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def _audio_autoencoder(diffusers: ModuleType) -> nn.Module:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
    )


AUTOENCODERS = {
    "AutoencoderKL": (_image_autoencoder, (2, 3, 16, 16)),
    "AutoencoderKLCogVideoX": (_video_autoencoder, (1, 3, 9, 16, 16)),
    "AutoencoderOobleck": (_audio_autoencoder, (2, 2, 64)),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_of_diffusers(diffusers: ModuleType, name: str) -> None:
    make, shape = AUTOENCODERS[name]
    torch.manual_seed(1)
    model, x = make(diffusers).double(), torch.randn(shape, dtype=torch.float64)

    def loss() -> Tensor:
        posterior = model.encode(x).latent_dist
        z = posterior.sample(generator=torch.Generator().manual_seed(int(torch.randint(100, ()))))
        return nn.functional.mse_loss(model.decode(z).sample, x) + 0.1 * posterior.kl().mean()

    _assert_alike("diffusers", model, loss, 1e-12)


def test_a_training_step_of_diffusers_as_one_graph(diffusers: ModuleType) -> None:
    torch.manual_seed(1)
    model, x = _image_autoencoder(diffusers), torch.randn(2, 3, 16, 16)

    def step(x: Tensor) -> Tensor:
        posterior = model.encode(x, return_dict=False)[0]
        (recon_x,) = model.decode(posterior.sample(), return_dict=False)
        return nn.functional.mse_loss(recon_x, x) + 0.1 * posterior.kl().mean()

    with fusedvae.patch("diffusers"):
        expected = _loss_and_gradients(model, lambda: step(x))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = _loss_and_gradients(model, lambda: compiled(x))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# --- pythae -----------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "VAE": {},
    "BetaVAE": {"beta": 3.0},
    "DisentangledBetaVAE": {"beta": 2.0, "C": 3.0, "warmup_epoch": 4},
    "VAMP": {"number_components": 6, "linear_scheduling_steps": 5},
    "IWAE": {"number_samples": 4},
    "CIWAE": {"number_samples": 4, "beta": 0.3},
    "MIWAE": {"number_samples": 4, "number_gradient_estimates": 2},
    "PIWAE": {"number_samples": 4, "number_gradient_estimates": 2},
    "VAE_IAF": {},
    "VAE_LinNF": {},
    # Whose samples alone are replaced:
    "BetaTCVAE": {},
    "FactorVAE": {},
    "INFOVAE_MMD": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("reconstruction_loss", ["mse", "bce"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_pythae(pythae: ModuleType, name: str, reconstruction_loss: str) -> None:
    configuration = getattr(pythae, f"{name}Config", None) or getattr(pythae, f"{name}_Config")
    torch.manual_seed(1)
    model = getattr(pythae, name)(
        configuration(input_dim=(1, 5, 4), latent_dim=3, reconstruction_loss=reconstruction_loss, **FAMILIES[name])
    )
    model.train()
    x = torch.rand(6, 1, 5, 4)

    def loss() -> Tensor:
        output = model({"data": x}, epoch=2, dataset_size=60)
        named = [key for key in output if key.endswith("loss") and isinstance(output[key], Tensor)]
        assert named
        return sum(output[key].sum() for key in sorted(named) if output[key].requires_grad)

    _assert_alike("pythae", model, loss, 2e-5)


@pytest.mark.slow
def test_training_with_pythae(pythae: ModuleType, tmp_path: Any) -> None:
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig

    torch.manual_seed(1)
    model = pythae.BetaVAE(pythae.BetaVAEConfig(input_dim=(1, 5, 4), latent_dim=3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    configuration = BaseTrainerConfig(str(tmp_path), num_epochs=2, per_device_train_batch_size=8, no_cuda=True)
    with fusedvae.patch("pythae"):
        TrainingPipeline(model, configuration)(train_data=torch.rand(16, 1, 5, 4).numpy())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- scvi-tools -------------------------------------------------------------------------------------------------------


def _counts(cells: int = 40, genes: int = 30) -> Any:
    import anndata
    import numpy as np

    generator = np.random.default_rng(0)
    rates = generator.gamma(2.0, 1.0, (cells, genes))
    counts = generator.poisson(rates) * (generator.random((cells, genes)) > 0.3)
    data = anndata.AnnData(counts.astype(np.float32))
    data.obs["batch"] = np.array(["a", "b"])[generator.integers(2, size=cells)]
    return data


SINGLE_CELL: dict[str, dict[str, Any]] = {
    "zinb": {},
    "zinb, library": {"use_observed_lib_size": False},
    "nb": {"dispersion": "gene-cell"},
    "poisson": {},
    "normal": {"latent_distribution": "ln"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE_CELL)
def test_scvi(scvi: ModuleType, name: str) -> None:
    data = _counts()
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    torch.manual_seed(1)
    model = scvi.model.SCVI(data, n_hidden=16, n_latent=5, gene_likelihood=name.split(",")[0], **SINGLE_CELL[name])
    dtype = torch.float32 if name == "zinb, library" else torch.float64  # that one makes float32 of its own
    model.module.train().to(dtype)
    tensors = next(iter(model._make_data_loader(data, batch_size=40)))
    tensors["X"] = tensors["X"].to(dtype)

    def loss() -> Tensor:
        return model.module(tensors, loss_kwargs={"kl_weight": 0.7})[2].loss

    _assert_alike("scvi", model.module, loss, 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.slow
def test_densities_of_scvi_are_one_function(scvi: ModuleType) -> None:
    from scvi.distributions import _negative_binomial as counts

    torch.manual_seed(2)
    mu, theta, zi_logits = torch.rand(6, 4) + 0.5, 100 + torch.rand(4), torch.randn(6, 4)
    x = torch.randint(0, 20, (6, 4)).float()
    plain = counts.log_zinb_positive(x, mu, theta, zi_logits), counts.log_nb_positive(x, mu, theta, 1e-3)
    with fusedvae.patch("scvi") as patch:
        assert patch.noise == "library"
        assert {"log_nb_positive", "log_zinb_positive"} <= set(patch.replaced)
        density = counts.log_zinb_positive(x, mu, theta, zi_logits)
        assert density.grad_fn is None
        torch.testing.assert_close(density, plain[0], rtol=1e-4, atol=1e-4)  # where theta is large, theirs cancels
        same = scvi.distributions.ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=zi_logits).log_prob(x)
        assert torch.equal(density, same)
        nb = counts.log_nb_positive(x, mu=mu, theta=theta)
        assert torch.equal(nb, scvi.distributions.NegativeBinomial(mu=mu, theta=theta).log_prob(x))
        assert torch.equal(counts.log_nb_positive(x, mu, theta, 1e-3), plain[1])  # another eps: the library's own
    assert torch.equal(counts.log_zinb_positive(x, mu, theta, zi_logits), plain[0])


@pytest.mark.slow
def test_what_scvi_draws_again_is_the_same(scvi: ModuleType) -> None:
    """One method samples by the library's distributions, the other by an import of its own."""
    data = _counts()
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    with fusedvae.patch("scvi"):
        model = scvi.model.SCVI(data, n_hidden=16, n_latent=5)
        module = model.module.eval()
        x, batch = torch.from_numpy(data.X), torch.zeros(40, 1, dtype=torch.long)
        torch.manual_seed(3)
        first = module._regular_inference(x, batch)
        torch.manual_seed(3)
        again = module._cached_inference(first["qz"].loc, first["qz"].scale ** 2, x.sum(1, keepdim=True))
    torch.testing.assert_close(again["z"], first["z"])


@pytest.mark.slow
def test_training_with_scvi(scvi: ModuleType) -> None:
    data = _counts()
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    with fusedvae.patch("scvi"):
        model = scvi.model.SCVI(data, n_hidden=16, n_latent=5)
        model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False)
        assert model.get_latent_representation().shape == (40, 5)
        assert math.isfinite(model.get_elbo())


@pytest.mark.slow
def test_pyro(scvi: ModuleType) -> None:
    """TraceMeanField_ELBO, which comes with scvi-tools' pyro, takes its divergences from `kl_divergence`."""
    import pyro
    from pyro.distributions.torch_distribution import TorchDistributionMixin
    from pyro.infer import TraceMeanField_ELBO

    class Normal(distributions.Normal, TorchDistributionMixin):
        pass

    x = torch.randn(6, 4)
    found = {}
    for kind in (pyro.distributions.Normal, Normal):
        pyro.clear_param_store()
        loc = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_()

        def model(x: Tensor, kind: Any = kind) -> None:
            with pyro.plate("data", 6):
                z = pyro.sample("z", kind(torch.zeros(6, 4), 1.0).to_event(1))
                pyro.sample("x", pyro.distributions.Normal(0 * z, 1.0).to_event(1), obs=x)

        def guide(x: Tensor, loc: Tensor = loc, kind: Any = kind) -> None:
            with pyro.plate("data", 6):
                pyro.sample("z", kind(loc, 0.5 * torch.ones(6, 4)).to_event(1))

        loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
        found[kind] = (loss.detach(), *torch.autograd.grad(loss, loc))
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)
