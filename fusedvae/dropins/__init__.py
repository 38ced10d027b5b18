"""Have an installed library compute with the fused kernels: `patch`.

There is a module a library. Each says what takes the place of what, and compares the two before, so that a version of
the library which computes something else is refused rather than changed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from types import TracebackType
from typing import Literal

from ..backend import use_backend
from ._replacing import Replacement, UnknownShapeError

__all__ = ["Patch", "patch"]

LIBRARIES = {"diffusers": "diffusers", "pythae": "pythae", "scvi": "scvi-tools"}
"""What can be patched, and the names under which it is installed."""

_logger = logging.getLogger("fusedvae")
_active: dict[str, Patch] = {}


class Patch:
    """What `patch` did to a library: a context manager, at whose end it is undone.

    Attributes:
        library: the name of the library.
        version: of the library, as installed.
        noise: what `patch` was given, or the library's default.
        replaced: the names of what was replaced. Nothing, if the library was patched already.
    """

    library: str
    version: str
    noise: str
    replaced: tuple[str, ...]

    def __init__(self, library: str, version: str, noise: str, replacements: list[Replacement]) -> None:
        self.library, self.version, self.noise = library, version, noise
        self._replacements = replacements
        self.replaced = tuple([replacement.name for replacement in replacements])
        for replacement in replacements:
            replacement.do()

    def undo(self) -> None:
        """Put back what was replaced; a second time does nothing."""
        for replacement in self._replacements:
            replacement.undo()
        if self._replacements:
            self._replacements = []
            del _active[self.library]
            _logger.info("%s %s: put back %s", self.library, self.version, ", ".join(self.replaced))

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<{self.library} {self.version}: replaced {', '.join(self.replaced) or 'nothing'}>"


def patch(
    library: Literal["diffusers", "pythae", "scvi"], *, noise: Literal["fused", "library"] | None = None
) -> Patch:
    """Make an installed library sample, and compute divergences and likelihoods, with the fused kernels.

    It holds at once, and until the `Patch` that is returned is undone: by ``undo()``, or at the end of a ``with``
    block. What it replaced is logged, at level INFO by the logger "fusedvae". Names that your own modules have imported
    from the library before are not among it.

        >>> fusedvae.patch("diffusers")
        >>> with fusedvae.patch("pythae"):
        ...     trainer.train()

    Args:
        library: "diffusers": the posteriors of its autoencoders. "pythae": the samples of its models, and the losses
            of VAE, BetaVAE, DisentangledBetaVAE, IWAE, CIWAE, MIWAE, PIWAE, VAMP, VAE_IAF and VAE_LinNF. "scvi": normal
            distributions, their samples and divergences, and the densities of two distributions of counts.
        noise: "fused" for the package's noise; "library" for the library's own, so that a seed gives what it gave
            before, at the price of drawing it. By default "fused", but of scvi-tools "library": there methods draw
            again what others drew from the same seed, and some of them by what no patch reaches.

    Raises:
        ValueError: no such library or noise; or the library is patched already, with another noise.
        ImportError: the library is not installed.
        RuntimeError: the installed version does not compute what is known to be replaceable; nothing was changed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(map(repr, LIBRARIES))}; got {library!r}")
    if noise not in ("fused", "library", None):
        raise ValueError(f"noise: expected 'fused' or 'library', got {noise!r}")
    try:
        version = importlib.metadata.version(LIBRARIES[library])
        importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"library: {library} is not installed here, or cannot be imported: {error}; "
            f"pip install {LIBRARIES[library]}"
        ) from error
    module = importlib.import_module(f".{library}", __name__)
    chosen: str = noise or module.DEFAULT_NOISE
    active = _active.get(library)
    if active is not None:
        if active.noise != chosen:
            raise ValueError(f"noise: {library} is patched already, with noise={active.noise!r}; undo that first")
        _logger.info("%s %s: patched already", library, version)
        return Patch(library, version, chosen, [])
    try:
        with use_backend("auto"):  # what is compared is on the CPU
            replacements = module.replacements(chosen)
    except (UnknownShapeError, AttributeError, ImportError) as error:
        raise RuntimeError(f"{library} {version} is not as known, and nothing of it was replaced: {error}") from error
    _active[library] = found = Patch(library, version, chosen, replacements)
    _logger.info("%s %s: replaced %s", library, version, ", ".join(found.replaced))
    return found
