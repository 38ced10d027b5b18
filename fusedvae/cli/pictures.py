"""Pictures of a trained model, drawn with matplotlib, each one PNG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..vae import VAE
from .data import Samples
from .errors import require
from .files import write_atomically
from .trainer import Trainer

RECONSTRUCTIONS = "reconstructions.png"
PRIOR_SAMPLES = "samples.png"
TRAVERSAL = "traversal.png"
SCATTER = "scatter.png"
CURVE = "curve.png"
PICTURES = (RECONSTRUCTIONS, PRIOR_SAMPLES, TRAVERSAL, SCATTER, CURVE)

_GAP_SHADE = 0.35
_MOST_COLUMNS = 120
"""Of the strip that shows a vector: as many as a tile has pixels on the page, or a few more."""
_STEPS = (-3, -2.4, -1.8, -1.2, -0.6, 0, 0.6, 1.2, 1.8, 2.4, 3)
"""Values of a latent variable in a traversal, in standard deviations of the prior."""
_COMPONENTS = ("first principal component", "second principal component")


def draw(trainer: Trainer, directory: Path) -> None:
    """Draw every picture of ``PICTURES`` into ``directory``."""
    model, settings = trainer.trained_model().eval(), trainer.settings
    device = next(model.parameters()).device
    few = trainer.heldout_samples.subset(slice(40))
    with torch.no_grad(), settings.autocast():
        x, condition = _batch(trainer, few, slice(None), device)
        pairs = torch.stack([x, model.reconstruct(x, condition).to(x.dtype)])
        generator = torch.Generator(device).manual_seed(settings.seed)
        # Of each class, if there are some, as many: ten of them make a column each.
        classes = torch.arange(100, device=device) % max(len(trainer.data.classes), 1)
        samples = model.generate(100, trainer.condition(classes), generator=generator)
        walks, variables = _traversal(model, x, condition)
        embedded = _embedding(trainer, model, trainer.train_samples.subset(slice(5000)), device)
    _save_tiles(
        directory / RECONSTRUCTIONS,
        _one_above_the_other(pairs),
        columns=10,
        title="held-out samples, each above its reconstruction",
    )
    _save_tiles(directory / PRIOR_SAMPLES, samples, columns=10, title="samples of the prior, decoded")
    _save_tiles(
        directory / TRAVERSAL,
        walks,
        columns=len(_STEPS),
        title="the first held-out sample with one latent variable changed, those of the largest KL first",
        row_labels=[f"z[{variable}]" for variable in variables],
        column_labels=[f"{step:g}" for step in _STEPS],
    )
    names = ("z[0]", "z[1]") if settings.latent == 2 else ("z[0]", "") if settings.latent == 1 else _COMPONENTS
    _save_scatter(directory / SCATTER, embedded, trainer.train_samples.labels, names)
    _save_curve(directory / CURVE, trainer.history)


def _batch(trainer: Trainer, samples: Samples, rows: slice, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Samples, and what the model is told of them."""
    x = samples.batch(rows, device=device, dtype=trainer.settings.data_dtype)
    labels = None if samples.labels is None else samples.labels[rows].to(device)
    return x, trainer.condition(labels)


def _traversal(model: VAE, x: Tensor, condition: Tensor | None, *, rows: int = 10) -> tuple[Tensor, list[int]]:
    """Decode the first of ``x`` with one latent variable at a time moved through its prior.

    The variables are those of the largest KL over ``x``: the ones that the model uses.
    """
    mu, logvar = (parameter.float() for parameter in model.encode(x, condition))
    kl = (mu.square() + torch.expm1(logvar) - logvar).mean(0)
    variables = kl.argsort(descending=True)[:rows]
    z = mu[0].repeat(len(variables), len(_STEPS), 1)
    for row, variable in enumerate(variables):
        z[row, :, variable] = torch.tensor(_STEPS, device=z.device)
    z = z.flatten(0, 1).to(next(model.parameters()).dtype)
    decoded = model.decode(z, None if condition is None else condition[:1].expand(len(z))).mu
    return decoded, variables.tolist()


def _embedding(trainer: Trainer, model: VAE, samples: Samples, device: torch.device) -> Tensor:
    """Posterior means, their two largest principal components if there are more than two."""
    parts = []
    for start in range(0, len(samples), trainer.settings.batch):
        indices = slice(start, start + trainer.settings.batch)
        x, condition = _batch(trainer, samples, indices, device)
        parts.append(model.embed(x, condition).double().cpu())
    points = torch.cat(parts)
    if points.shape[1] == 1:
        return torch.cat([points, torch.zeros_like(points)], dim=1)
    if points.shape[1] == 2:
        return points
    centred = points - points.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=True).Vh  # as many as there are variables, however few the points
    return centred @ axes[:2].T


def _one_above_the_other(pairs: Tensor) -> Tensor:
    """``(2, n, *shape)`` to n images of twice the height, with a line between the two."""
    above, below = (_as_images(samples) for samples in pairs)
    return torch.cat([above, torch.full_like(above[:, :, :1], _GAP_SHADE), below], dim=2)


def _as_images(samples: Tensor) -> Tensor:
    """``(n, channels, height, width)``; a vector becomes a strip: a column a value, or a mean of some if it is long."""
    if samples.ndim == 2:
        columns = min(samples.shape[1], _MOST_COLUMNS)
        values = torch.nn.functional.adaptive_avg_pool1d(samples[:, None].float(), columns)
        return values[:, :, None].expand(-1, -1, max(1, columns // 3), -1)
    return samples


def _tiles(samples: Tensor, columns: int) -> Tensor:
    """Lay images out in a grid with gaps between them: ``(height, width, 3)`` in [0, 1]."""
    images = _as_images(samples).float().cpu().clamp(0, 1)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    rows = math.ceil(len(images) / columns)
    gap = max(1, images.shape[-1] // 16)
    images = torch.nn.functional.pad(images, (gap, gap, gap, gap), value=_GAP_SHADE)
    missing = rows * columns - len(images)
    images = torch.cat([images, torch.full((missing, *images.shape[1:]), _GAP_SHADE)])
    _, channels, height, width = images.shape
    grid = images.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, columns * width, channels)


def _new_figure(width: float, height: float) -> Any:
    return require("matplotlib.figure").Figure((width, height), dpi=100, layout="constrained")


def _save(path: Path, figure: Any) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _save_tiles(
    path: Path,
    samples: Tensor,
    *,
    columns: int,
    title: str,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> None:
    grid = _tiles(samples, columns).numpy()
    height, width = grid.shape[:2]
    figure = _new_figure(8, min(max(8 * height / width, 1.5), 16) + 0.4)
    axes = figure.add_subplot()
    axes.imshow(grid, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_yticks(_centres(len(row_labels), height), row_labels, fontsize=8)
    axes.set_xticks(_centres(len(column_labels), width), column_labels, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10)
    _save(path, figure)


def _centres(count: int, length: int) -> list[float]:
    """Where ``count`` tiles that share ``length`` pixels have their middles."""
    return [(index + 0.5) * length / count - 0.5 for index in range(count)]


def _save_scatter(path: Path, points: Tensor, labels: Tensor | None, names: tuple[str, str]) -> None:
    figure = _new_figure(7, 6)
    axes = figure.add_subplot()
    if labels is None:
        axes.scatter(*points.T.numpy(), s=6)
    else:
        labels = labels[: len(points)]
        for label in labels.unique().tolist():
            # Each point is its label, since nobody tells ten classes apart by colours alone.
            axes.scatter(*points[labels == label].T.numpy(), s=28, marker=f"${label}$", linewidths=0.1)
    axes.set_xlabel(names[0], fontsize=9)
    axes.set_ylabel(names[1], fontsize=9)
    if not names[1]:
        axes.set_yticks([])
    axes.set_title("posterior means of training samples", fontsize=10)
    _save(path, figure)


def _save_curve(path: Path, history: list[dict[str, float]]) -> None:
    figure = _new_figure(11, 3.6)
    epochs = [row["epoch"] for row in history]
    marker = "." if len(epochs) < 3 else None
    for axes, term, name in zip(figure.subplots(1, 3), ("loss", "nll", "kl"), ("loss", "NLL", "KL"), strict=True):
        for part, label, line in (("train", "training", "-"), ("heldout", "held-out", "--")):
            axes.plot(epochs, [row[f"{part}_{term}"] for row in history], line, marker=marker, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel("nats per sample")
        axes.set_title(name, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if epochs:
            axes.legend(fontsize=8)
    _save(path, figure)
