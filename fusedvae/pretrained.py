"""Models as files: ``config.json``, from which a VAE is made again, and its tensors beside it.

The tensors are in ``model.safetensors``, where safetensors is installed, else in ``model.pt``, of which tensors alone
are read: no code of a file is run. Both are of the state_dict.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import networks
from .version import __version__

if TYPE_CHECKING:
    from .vae import VAE

CONFIG = "config.json"
SAFETENSORS, PICKLED = "model.safetensors", "model.pt"
FORMAT = 1
"""Changes with the meaning of a config's entries."""

OPTIONS = (
    "likelihood",
    "recon_scale",
    "recon_clamp",
    "recon_eps",
    "scale",
    "clamp",
    "eps",
    "prior_scale",
    "prior_clamp",
    "prior_eps",
)
"""Of a VAE, which are plain values and attributes of the same names."""

_MODULES = ("encoder", "decoder", "prior")


def save(
    model: VAE,
    directory: Path,
    *,
    extra: dict[str, Any] | None = None,
    write: Callable[[Path, bytes], object] | None = None,
) -> None:
    """Write a model to ``directory``, which is made if there is none.

    Args:
        extra: what else the config is to hold, of plain values; it is of no account to `load`.
        write: writes a file; by default one that is there already is replaced when the new one is whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write = write or _write
    name, content = _packed(model)
    # The weights first: a directory with a config has what that speaks of.
    write(directory / name, content)
    config = {**config_of(model), "weights": name, **(extra or {})}
    write(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def config_of(model: VAE) -> dict[str, Any]:
    """All that `load` needs of a model beside its tensors."""
    config: dict[str, Any] = {"library": "fusedvae", "version": __version__, "format": FORMAT}
    for name in _MODULES:
        module = getattr(model, name)
        if name != "prior" or module is not None:
            config[name] = _described(module)
    if model.prior_mu is not None:
        config["prior"] = [_value(model.prior_mu), _value(model.prior_logvar)]
    sizes = model.latent_shape
    config["latent_dim"] = sizes[0] if len(sizes) == 1 and sizes[0] is not None else list(sizes)
    config["recon_logvar"] = _value(model.recon_logvar)
    for name in OPTIONS:
        value = getattr(model, name)
        config[name] = list(value) if isinstance(value, tuple) else value
    return config


def load(make: type[VAE], directory: Path, modules: dict[str, nn.Module | None]) -> VAE:
    """The model that `save` wrote, on the CPU, in evaluation mode.

    Args:
        make: the class of the model.
        modules: those that the config names but cannot make, by "encoder", "decoder" and "prior".
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no model: there is no {CONFIG}")
    try:
        config = json.loads(path.read_text())
        if config["library"] != "fusedvae" or config["format"] != FORMAT:
            raise ValueError("it is not of this version of fusedvae")
        given = {name: _made(name, config.get(name), modules.get(name)) for name in _MODULES}
        options = {name: _untupled(config[name]) for name in OPTIONS}
        options["recon_logvar"] = _unvalued(config["recon_logvar"])
        latent_dim, weights = config["latent_dim"], config["weights"]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    model = make(given["encoder"], given["decoder"], latent_dim, prior=given["prior"], **options)
    tensors = _unpacked(directory, weights)
    # Own networks take the tensors as they are, in their dtypes; a user's modules keep their tensors, and the values
    # are copied to them, wherever they are.
    model.load_state_dict(tensors, assign=not any(modules.values()))
    return model.eval()


def _described(module: nn.Module) -> dict[str, Any]:
    name = type(module).__name__
    if getattr(networks, name, None) is type(module):
        return {"class": name, "arguments": dict(module.arguments)}  # type: ignore[arg-type]
    return {"class": f"{type(module).__module__}.{name}"}


def _made(name: str, description: Any, given: nn.Module | None) -> Any:
    """The encoder, the decoder or the prior of a config; or the one that was given in its place."""
    if given is not None:
        return given
    if description is None:
        if name == "prior":
            return None
        raise ValueError(f"there is no {name}")
    if isinstance(description, list):
        return tuple(map(_unvalued, description))
    kind = description["class"]
    if "arguments" in description and kind in networks.__all__ and isinstance(getattr(networks, kind), type):
        return getattr(networks, kind)(**description["arguments"])
    raise ValueError(
        f"its {name} is a {kind}, which is none of fusedvae.networks: make it, and pass it as "
        f"from_pretrained(..., {name}=...)"
    )


def _value(value: Tensor | float | None) -> Any:
    """A number, or of a tensor what it takes to make another."""
    if not isinstance(value, Tensor):
        return value
    return {"shape": list(value.shape), "learned": isinstance(value, nn.Parameter)}


def _unvalued(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    tensor = torch.ones(value["shape"])
    return nn.Parameter(tensor) if value["learned"] else tensor


def _untupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def weights_name() -> str:
    """Of the file that `save` writes tensors to."""
    return PICKLED if importlib.util.find_spec("safetensors") is None else SAFETENSORS


def _packed(model: nn.Module) -> tuple[str, bytes]:
    """The state_dict as a file, and its name."""
    # Copies: safetensors takes no two tensors that share memory, and none with gaps.
    tensors = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    name = weights_name()
    if name == SAFETENSORS:
        return name, importlib.import_module("safetensors.torch").save(tensors, metadata={"format": "pt"})
    file = io.BytesIO()
    torch.save(tensors, file)
    return name, file.getvalue()


def _unpacked(directory: Path, name: str) -> dict[str, Tensor]:
    if name not in (SAFETENSORS, PICKLED):
        raise ValueError(f"cannot read {directory / CONFIG}: expected weights in {SAFETENSORS} or {PICKLED}")
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no whole model: there is no {name}")
    load_file = _required("safetensors.torch", f"to read {path}").load_file if name == SAFETENSORS else None
    try:
        if load_file is not None:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and torch have each their own for what is not whole
        raise ValueError(f"cannot read {path}: it is damaged ({error})") from error


def _required(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is needed {purpose}: pip install 'fusedvae[hub]'") from error


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def downloaded(name: str, **options: Any) -> Path:
    """The directory where huggingface_hub has put the files of a model of that name."""
    hub = _required("huggingface_hub", f"for {name!r}, which is no directory")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[CONFIG, SAFETENSORS, PICKLED], **options))
    except (OSError, ValueError) as error:  # among them that it is no name of the Hub's, and that there is no network
        raise FileNotFoundError(
            f"directory: {name!r} is no directory, and no model of that name could be had from the Hugging Face Hub: "
            f"{error}"
        ) from error


_CARD = """---
{{ card_data }}
---

A variational autoencoder of [fusedvae](https://github.com/fusedvae/fusedvae):

```python
model = fusedvae.VAE.from_pretrained("NAME")
```
"""


def upload(model: VAE, name: str, **options: Any) -> str:
    """Make a repository for a model on the Hugging Face Hub, or a new commit in it; returns the commit's address.

    Args:
        options: of ``huggingface_hub.ModelHubMixin.push_to_hub``, whose work it is.
    """
    hub = _required("huggingface_hub", "to upload a model")
    tags = ["variational-autoencoder"]
    card = _CARD.replace("NAME", name)

    # Not a base class of VAE: that would import huggingface_hub with the package.
    class Uploaded(hub.ModelHubMixin, library_name="fusedvae", tags=tags, model_card_template=card):  # type: ignore
        def _save_pretrained(self, save_directory: Path) -> None:
            save(model, save_directory)

    return str(Uploaded().push_to_hub(name, **options))
