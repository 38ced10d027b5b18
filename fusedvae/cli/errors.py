"""What a command says when it cannot go on."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRAS = {
    "matplotlib": "train",
    "sklearn": "train",
    "tqdm": "train",
    "PIL": "train",
    "braceexpand": "train",
    "torchmetrics": "train",
    "yaml": "train",
    "anndata": "h5ad",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
"""Which extra of the package brings a module that only commands need."""


class CommandError(Exception):
    """Something the user can put right. Shown as one line; the exit status is 2."""


class LostProcessError(CommandError):
    """Another process of the run has ended: said by each of those that are left, as the first may be the one."""


def require(module: str) -> ModuleType:
    """Import ``module``, or say which extra has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = EXTRAS[module.partition(".")[0]]
        raise CommandError(f"this needs {module} ({error}): install it with pip install 'fusedvae[{extra}]'") from error
