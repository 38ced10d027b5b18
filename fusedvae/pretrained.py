"""Models as files: ``config.json``, from which a VAE is made again, and its tensors beside it.

The tensors are in ``model.safetensors``, where safetensors is installed, else in ``model.pt``, of which tensors alone
are read: no code of a file is run. Both are of the state_dict.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import os
import secrets
import sys
from collections.abc import Callable
from numbers import Integral, Real
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

    Of a model whose tensors are spread over processes (FSDP2, DTensors in general) every process that has a part must
    call it: they are made whole one after the other, and the first of these processes alone keeps and writes them. The
    others do not wait until it has.

    Args:
        extra: what else the config is to hold, of plain values; it is of no account to `load`.
        write: writes a file; by default one that is there already is replaced when the new one is whole.
    """
    # All files before one is written: a model that cannot be saved leaves the one that is there as it was.
    files = _files(model, extra or {})
    if files is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (write or _write)(directory / name, content)


def _files(model: VAE, extra: dict[str, Any]) -> dict[str, bytes] | None:
    """The contents of the files of a model, by their names; None in a process that is not to write them."""
    name = weights_name()
    config = json.dumps({**config_of(model), "weights": name, **extra}, indent=2) + "\n"
    tensors = _whole_tensors(model)
    # The weights first: a directory with a config has what that speaks of.
    return None if tensors is None else {name: _packed(tensors, name), CONFIG: config.encode()}


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
        config[name] = _plain(getattr(model, name))
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
    _check_takes_options(make, directory)
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or config.get("library") != "fusedvae":
            raise ValueError("expected a directory that VAE.save_pretrained wrote; this one is of something else")
        if config.get("format") != FORMAT:
            raise ValueError(f"it is not of this version of fusedvae: expected format {FORMAT}")
        given = {name: _made(name, config.get(name), modules.get(name)) for name in _MODULES}
        options = {name: _untupled(config[name]) for name in OPTIONS}
        options["recon_logvar"] = _unvalued(config["recon_logvar"])
        latent_dim, weights = config["latent_dim"], config["weights"]
    except KeyError as error:
        raise ValueError(f"cannot read {path}: there is no {error}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    model = make(given["encoder"], given["decoder"], latent_dim, prior=given["prior"], **options)
    own = model.state_dict(keep_vars=True)
    names = {_name(name): name for name in own}
    tensors = {names.get(name, name): value for name, value in _unpacked(directory, weights).items()}
    # What is made here gets the dtypes of what was saved; a user's modules keep theirs, and values are copied to them,
    # wherever they are.
    given_ones = tuple(f"{name}." for name, module in modules.items() if module is not None)
    for name in own.keys() & tensors.keys():
        if not name.startswith(given_ones):
            own[name].data = own[name].data.to(tensors[name].dtype)
    model.load_state_dict(tensors)
    return model.eval()


def _check_takes_options(make: type[VAE], directory: Path) -> None:
    """Check that a subclass can be made as `load` makes it, before that asks for modules."""
    signature = inspect.signature(make)
    try:
        signature.bind("encoder", "decoder", "latent_dim", prior=None, recon_logvar=None, **dict.fromkeys(OPTIONS))
    except TypeError as error:
        raise TypeError(
            f"{make.__name__}: expected a class whose __init__ takes what that of VAE does, got one that takes "
            f"{signature}: make the model yourself and load the tensors in {directory} with its load_state_dict; or "
            "let the class inherit from huggingface_hub.PyTorchModelHubMixin first, which saves such arguments"
        ) from error


def _described(module: nn.Module) -> dict[str, Any]:
    while hasattr(module, _COMPILED):
        module = getattr(module, _COMPILED)
    kind = _class_of(module)
    if getattr(networks, kind.__name__, None) is kind:
        return {"class": kind.__name__, "arguments": dict(module.arguments)}  # type: ignore[arg-type]
    return {"class": f"{kind.__module__}.{kind.__name__}"}


def _class_of(module: nn.Module) -> type:
    """That which a module was made of: FSDP2 gives it another, derived from FSDPModule and that one."""
    kind = type(module)
    # Where nothing has imported FSDP, nothing is sharded.
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return kind.__bases__[-1] if issubclass(kind, sharded) else kind


_COMPILED = "_orig_mod"
"""What a module of torch.compile calls the module in it."""


def _name(name: str) -> str:
    """A tensor's name, the same whether modules are compiled or not."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _plain(value: Any) -> Any:
    """An option as JSON has it: numbers of NumPy are Python's, tuples lists."""
    if isinstance(value, (tuple, list)):
        return [*map(_plain, value)]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


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
    is_learned = isinstance(value, nn.Parameter)
    return {"shape": list(value.shape), "learned": is_learned, "frozen": is_learned and not value.requires_grad}


def _unvalued(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    tensor = torch.ones(value["shape"])
    return nn.Parameter(tensor, requires_grad=not value.get("frozen", False)) if value["learned"] else tensor


def _untupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def weights_name() -> str:
    """Of the file that `save` writes tensors to."""
    return PICKLED if importlib.util.find_spec("safetensors") is None else SAFETENSORS


def _whole_tensors(model: nn.Module) -> dict[str, Tensor] | None:
    """The state_dict on the CPU; None in a process that is not to write it."""
    state: dict[str, Any] = model.state_dict()
    spread = {name for name, value in state.items() if hasattr(value, "full_tensor")}  # DTensors
    writer = min((int(state[name].device_mesh.mesh.min()) for name in spread), default=None)
    writes = writer is None or writer == torch.distributed.get_rank()
    tensors = {}
    for name, value in state.items():
        whole = value.full_tensor() if name in spread else value  # which all processes must ask for
        if writes:
            # Copies: safetensors takes no two tensors that share memory, and none with gaps.
            tensors[_name(name)] = whole.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors if writes else None


def _packed(tensors: dict[str, Tensor], name: str) -> bytes:
    """Tensors as the content of a file of that name."""
    if name == SAFETENSORS:
        return importlib.import_module("safetensors.torch").save(tensors, metadata={"format": "pt"})
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


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
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise TypeError("there is something else than tensors")
        return tensors
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

    Of a model that is spread over processes, every one must call it, as `save`; those that do not write return "".

    Args:
        options: of ``huggingface_hub.ModelHubMixin.push_to_hub``, whose work it is.
    """
    hub = _required("huggingface_hub", "to upload a model")
    tags = ["variational-autoencoder"]
    card = _CARD.replace("NAME", name)
    files = _files(model, {})
    if files is None:
        return ""
    contents = files.items()

    # Not a base class of VAE: that would import huggingface_hub with the package.
    class Uploaded(hub.ModelHubMixin, library_name="fusedvae", tags=tags, model_card_template=card):  # type: ignore
        def _save_pretrained(self, save_directory: Path) -> None:
            for file, content in contents:
                _write(save_directory / file, content)

    return str(Uploaded().push_to_hub(name, **options))
