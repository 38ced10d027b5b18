"""scvi-tools: the normal distributions of its modules, with their samples and divergences."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions
from torch.distributions.utils import _standard_normal

from .. import distributions
from ._replacing import Class, Replacement, check_equal, check_signature, example, in_the_place_of


def replacements(noise: str) -> list[Replacement]:
    """torch's normal distribution where the library has it, and the library's own, which is one."""
    import scvi

    original = scvi.distributions.Normal

    def of_the_library(self: Any, shape: torch.Size) -> dict[str, Any]:
        drawn = _standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device)
        batch = self.loc.shape or (1,)
        return {"noise": drawn.reshape(batch if shape == self.loc.shape else (-1, *batch))}

    attributes = {"_noise": of_the_library} if noise == "library" else {}
    normal = type("Normal", (distributions.Normal,), {**attributes, "__module__": __name__}) if attributes else None
    check_signature(original, "__init__", "mu, scale, validate_args, normal_mu")
    new = in_the_place_of(original, (original, distributions.Normal), **attributes)
    loc, scale, value = example(2, 3, seed=0), example(2, 3, seed=1).exp(), example(2, 3, seed=2)
    p, q = new(loc, scale, normal_mu=loc), original(loc, scale, normal_mu=loc)
    check_equal("scvi.distributions.Normal.log_prob", p.log_prob(value), q.log_prob(value))
    return [
        Class("scvi", torch.distributions.Normal, normal or distributions.Normal),
        Class("scvi", original, new),
    ]
