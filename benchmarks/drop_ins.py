"""Measure what `fusedvae.patch` changes in the libraries that it knows: steps of models, as they come and patched.

    python benchmarks/drop_ins.py [--threads 2] [--rounds 30] [--cpu-time] [CASE ...]

Each round runs steps of either, so that what else the machine does meets both; printed are the medians, and the median
of the rounds' ratios with their quartiles. Where a machine is busy, ``--cpu-time`` counts what the process computed
rather than how long that took: on one thread, the same. Cases whose library is not installed are left out.
docs/drop-ins.md has what a run printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusedvae

Step = Callable[[], None]


def posterior_of_a_video(shape: tuple[int, ...]) -> Step:
    """Sample and KL of an autoencoder's moments, with their gradients."""
    from diffusers.models.autoencoders import vae

    moments = torch.randn(shape, requires_grad=True)

    def step() -> None:
        posterior = vae.DiagonalGaussianDistribution(moments)
        (posterior.sample().square().mean() + 1e-6 * posterior.kl().mean()).backward()
        moments.grad = None

    return step


def encoding_of_a_video(shape: tuple[int, ...]) -> Step:
    """A sample of an autoencoder's moments, as for a latent diffusion model."""
    from diffusers.models.autoencoders import vae

    moments = torch.randn(shape)

    @torch.no_grad()
    def step() -> None:
        vae.DiagonalGaussianDistribution(moments).sample()

    return step


def _step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def autoencoder_of_images(size: int) -> Step:
    """A training step of AutoencoderKL, its network cut small."""
    import diffusers

    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    x = torch.randn(1, 3, size, size)

    def loss() -> Tensor:
        posterior = model.encode(x).latent_dist
        return nn.functional.mse_loss(model.decode(posterior.sample()).sample, x) + 1e-6 * posterior.kl().mean()

    return _step_of(model, loss)


def single_cells(genes: int) -> Step:
    """A training step of scVI, on counts of 128 cells."""
    import anndata
    import numpy as np
    import scvi

    counts = np.random.default_rng(0).poisson(0.5, (256, genes)).astype(np.float32)
    data = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data)
    model.module.train()
    tensors = next(iter(model._make_data_loader(data, batch_size=128)))
    return _step_of(model.module, lambda: model.module(tensors, loss_kwargs={"kl_weight": 0.5})[2].loss)


def images_with_pythae(batch: int) -> Step:
    """A training step of pythae's VAE of its default networks, on images of 28 x 28."""
    from pythae.models import VAE, VAEConfig

    model = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=16))
    x = torch.rand(batch, 1, 28, 28)
    return _step_of(model, lambda: model({"data": x}).loss)


CASES: dict[str, tuple[str, Callable[[], Step]]] = {
    "video-posterior": ("diffusers", lambda: posterior_of_a_video((1, 32, 13, 60, 90))),
    "video-encoding": ("diffusers", lambda: encoding_of_a_video((1, 32, 13, 60, 90))),
    "autoencoder-256": ("diffusers", lambda: autoencoder_of_images(256)),
    "scvi-2000": ("scvi", lambda: single_cells(2_000)),
    "scvi-20000": ("scvi", lambda: single_cells(20_000)),
    "pythae-28": ("pythae", lambda: images_with_pythae(128)),
}


def measure(
    library: str, step: Step, rounds: int, clock: Callable[[], float], **options: Any
) -> tuple[float, float, list[float]]:
    """The medians of a step as it comes and patched, and the quartiles of the ratios of rounds."""

    def seconds(step: Step, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            step()
        return (clock() - start) / repeats

    once = seconds(step, 3)
    repeats = max(1, int(0.05 / once))
    plain, patched = [], []
    for k in range(rounds + 2):  # the first two are thrown away
        a = seconds(step, repeats)
        with fusedvae.patch(library, **options):
            step()  # whatever a first call does
            b = seconds(step, repeats)
        if k >= 2:
            plain.append(a)
            patched.append(b)
    ratios = [a / b for a, b in zip(plain, patched, strict=True)]
    return statistics.median(plain), statistics.median(patched), statistics.quantiles(ratios, n=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; by default all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="count the time that the process computes")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"CASE: expected of {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")  # the libraries' own
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, fusedvae {fusedvae.__version__}, threads: {arguments.threads}, {clock.__name__}")
    for name, (library, make) in CASES.items():
        if (arguments.cases and name not in arguments.cases) or importlib.util.find_spec(library) is None:
            continue
        step = make()
        version = importlib.metadata.version({"scvi": "scvi-tools"}.get(library, library))
        for noise in ("fused", "library"):
            plain, patched, (low, middle, high) = measure(library, step, arguments.rounds, clock, noise=noise)
            print(
                f"{name}, {library} {version}, noise={noise!r}: {1e3 * plain:.3f} ms -> {1e3 * patched:.3f} ms, "
                f"{middle:.2f}x ({low:.2f}-{high:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
