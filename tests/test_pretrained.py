"""Models as files: what is saved is what is loaded, and no code comes with it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import results_of_processes
from torch import Tensor, nn

import fusedvae
from fusedvae import VAE, networks
from fusedvae.pretrained import OPTIONS

IMAGE = (3, 5, 6)


def learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


MODELS: dict[str, Any] = {
    "conv": lambda: VAE(*networks.conv(IMAGE, 4, width=4, logvar_floor=-3.0), 4),
    "mlp of one learned scale": lambda: VAE(
        *networks.mlp(IMAGE, 4, hidden=(9, 7), mean_only=True), 4, recon_logvar="learned"
    ),
    "a number": lambda: VAE(*networks.mlp(IMAGE, 4, hidden=(9,), mean_only=True), 4, recon_logvar=-1.5),
    "tensors, fixed and learned": lambda: VAE(
        *networks.mlp(IMAGE, 4, hidden=(9,), mean_only=True),
        4,
        recon_logvar=torch.randn(3, 1, 1),
        prior=(learned(4), torch.randn(4)),
    ),
    "forms": lambda: VAE(
        *networks.mlp(IMAGE, (4), hidden=(9,)),
        4,
        likelihood="laplace",
        recon_scale="softplus",
        recon_clamp=(None, 2.0),
        recon_eps=1e-3,
        scale="logstd",
        clamp=(-5, 3),
        prior=(0.5, -0.25),
    ),
    "logits in float64": lambda: VAE(
        *networks.mlp(IMAGE, 4, hidden=(9,), mean_only=True), 4, likelihood="bernoulli"
    ).double(),
    "labelled images": lambda: VAE(*networks.conv(IMAGE, 4, width=4, classes=3), 4),
    "labelled vectors": lambda: VAE(*networks.mlp((11,), 4, hidden=(9,), classes=3), 4),
    "numbers of NumPy": lambda: VAE(
        *networks.mlp(
            (np.prod([3, 4]),),
            np.int64(4),
            hidden=(9,),
            classes=np.unique([0, 1, 2]).max() + 1,
            logvar_floor=np.float32(-3),
        ),
        np.int64(4),
        scale="softplus",
        clamp=(np.int64(-3), 3),
        eps=np.float32(0.1),
        prior=(np.float32(0.5), np.int64(2)),
    ),
}


def check_same(model: VAE, other: VAE) -> None:
    assert not other.training
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, value in model.state_dict().items():
        assert value.dtype == other.state_dict()[name].dtype
        assert torch.equal(value, other.state_dict()[name]), name
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in other.named_parameters()]
    shape = model.encoder.shape  # type: ignore[union-attr]
    x = torch.rand(5, *shape, dtype=next(model.parameters()).dtype)
    labels = torch.tensor([0, 1, 2, 1, 0]) if hasattr(model.encoder, "labels") else None
    values = []
    for each in (model.eval(), other):
        torch.manual_seed(0)
        values.append([each.loss(x, labels, full=True), each.generate(5, labels), each.reconstruct(x, labels)])
    assert all(torch.equal(one, same) for one, same in zip(*values, strict=True))


@pytest.mark.parametrize("has_safetensors", [True, False], ids=["safetensors", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_own_networks_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, has_safetensors: bool
) -> None:
    if not has_safetensors:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "model")
    weights = "model.safetensors" if has_safetensors else "model.pt"
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", weights}
    found = VAE.from_pretrained(tmp_path / "model")
    check_same(model, found)
    for option in OPTIONS:
        assert getattr(found, option) == getattr(model, option)


def test_a_model_is_on_the_cpu_whatever_device_is_the_default(tmp_path: Path) -> None:
    networks_of_two = networks.mlp((3, 4), 2, hidden=(9,), mean_only=True)
    model = VAE(*networks_of_two, 2, recon_logvar="learned", prior=(torch.rand(2), 0.5))
    model.save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        found = VAE.from_pretrained(tmp_path / "model")
    check_same(model, found)


def test_a_value_that_was_frozen_stays_so(tmp_path: Path) -> None:
    frozen = learned(3, 1, 1).requires_grad_(False)
    model = VAE(*networks.mlp(IMAGE, 4, hidden=(9,), mean_only=True), 4, recon_logvar=frozen, prior=(learned(4), 0.5))
    model.save_pretrained(tmp_path / "model")
    found = VAE.from_pretrained(tmp_path / "model")
    check_same(model, found)
    assert [name for name, value in found.named_parameters() if not value.requires_grad] == ["recon_logvar"]


def test_the_file_is_what_others_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = MODELS["conv"]()
    model.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert json.loads((tmp_path / "config.json").read_text())["encoder"] == {
        "class": "ConvEncoder",
        "arguments": {"shape": [3, 5, 6], "latent_dim": 4, "width": 4},
    }


class Mine(nn.Module):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Prior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(3))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.mean, torch.zeros(3)


def test_a_model_that_cannot_be_saved_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    model = MODELS["conv"]()
    model.save_pretrained(tmp_path / "model")
    other = MODELS["a number"]()
    other.encoder.arguments["hidden"] = {9}  # type: ignore[index]
    for directory in ("model", "none"):
        with pytest.raises(TypeError, match="set is not JSON serializable"):
            other.save_pretrained(tmp_path / directory)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(list((tmp_path / "model").iterdir())) == 2
    check_same(model, VAE.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_beside_a_module_that_is_given_all_else_has_the_dtypes_of_what_was_saved(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    def encoder() -> nn.Module:
        return Mine(6, 6)

    decoder = networks.MLPDecoder(3, (6,), hidden=(5,), mean_only=True)
    model = VAE(encoder(), decoder, 3, recon_logvar=torch.rand(1), prior=(learned(3), torch.randn(3))).to(dtype)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(1 / 3)
    model.save_pretrained(tmp_path)
    for given_dtype in (dtype, torch.float32):
        given = encoder().to(given_dtype)
        kept = given.layer.weight
        found = VAE.from_pretrained(tmp_path, encoder=given)
        assert found.encoder.layer.weight is kept  # type: ignore[union-attr]
        for name, value in model.state_dict().items():
            expected = value.to(given_dtype) if name.startswith("encoder.") else value
            assert found.state_dict()[name].dtype == expected.dtype, name
            assert torch.equal(found.state_dict()[name], expected), name
        assert [n for n, _ in found.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_tensors_in_any_layout_are_saved(tmp_path: Path) -> None:
    model = MODELS["conv"]().to(memory_format=torch.channels_last)
    assert any(not value.is_contiguous() for value in model.parameters())
    model.save_pretrained(tmp_path)
    found = VAE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_write_that_fails_leaves_no_config_without_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        MODELS["a number"]().save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    replaced = []
    monkeypatch.setattr(os, "replace", lambda source, target: replaced.append(target.name))
    MODELS["a number"]().save_pretrained(tmp_path)
    assert replaced[-1] == "config.json"


def test_values_beside_modules_that_are_all_given_have_the_dtypes_of_what_was_saved(tmp_path: Path) -> None:
    model = VAE(Mine(6, 6), Mine(3, 6), 3, recon_logvar="learned", prior=(torch.randn(3), 0.5)).double()
    nn.init.constant_(model.recon_logvar, 1 / 3)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    found = VAE.from_pretrained(tmp_path, encoder=Mine(6, 6).double(), decoder=Mine(3, 6).double())
    assert found.recon_logvar.dtype == torch.float64  # type: ignore[union-attr]
    assert found.recon_logvar.item() == 1 / 3  # type: ignore[union-attr]
    assert torch.equal(found.prior_mu, model.prior_mu)  # type: ignore[arg-type]


def test_compiled_modules_are_saved_as_what_they_were_made_of(tmp_path: Path) -> None:
    model = MODELS["labelled images"]()
    plain = model.encoder, model.decoder
    inner = model.decoder.network.layers[0]
    model.encoder, model.decoder = (torch.compile(module, backend="eager") for module in plain)
    plain[1].network.layers[0] = torch.compile(inner, backend="eager")
    assert "decoder._orig_mod.network.layers.0._orig_mod.weight" in model.state_dict()
    model.save_pretrained(tmp_path)
    model.encoder, model.decoder = plain
    plain[1].network.layers[0] = inner
    check_same(model, VAE.from_pretrained(tmp_path))


@pytest.mark.parametrize("is_saved_compiled", [False, True])
@pytest.mark.parametrize("is_loaded_compiled", [False, True])
def test_the_values_of_compiled_modules_and_of_plain_ones_are_those_of_each_other(
    tmp_path: Path, is_saved_compiled: bool, is_loaded_compiled: bool
) -> None:
    def modules(are_compiled: bool) -> dict[str, Any]:
        made = {"encoder": Mine(6, 6), "decoder": Mine(3, 12), "prior": Prior()}
        return {
            name: torch.compile(module, backend="eager") if are_compiled else module for name, module in made.items()
        }

    model = VAE(**modules(is_saved_compiled), latent_dim=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its encoder is a \S+\.Mine, "):
        VAE.from_pretrained(tmp_path)
    given = modules(is_loaded_compiled)
    found = VAE.from_pretrained(tmp_path, **given)
    assert found.encoder is given["encoder"]
    for one, same in zip(model.parameters(), found.parameters(), strict=True):
        assert torch.equal(one, same)
    assert torch.equal(found.prior.mean, model.prior.mean)  # type: ignore[union-attr]


def _saved_together(directory: Path) -> tuple[str, int] | None:
    """What uploading a model gives that processes have together, and how often it is done; the model is saved, too."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = MODELS["tensors, fixed and learned"]()
    for part in (model.encoder, model.decoder, model):
        fully_shard(part)
    model.save_pretrained(directory / f"of process {dist.get_rank()}")
    with contextlib.suppress(ImportError), mock.patch("huggingface_hub.hub_mixin.HfApi") as api:
        api.return_value.upload_folder.return_value = "https://hub/commit"
        return model.push_to_hub("a"), api.return_value.upload_folder.call_count
    return None


@pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without torch.distributed")
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_a_model_that_processes_share_is_written_whole_by_the_first(tmp_path: Path) -> None:
    found = results_of_processes(2, tmp_path / "store", _saved_together, tmp_path)
    has_hub = importlib.util.find_spec("huggingface_hub") is not None
    assert found == ([("https://hub/commit", 1), ("", 0)] if has_hub else [None, None])
    torch.manual_seed(0)
    check_same(MODELS["tensors, fixed and learned"](), VAE.from_pretrained(tmp_path / "of process 0"))
    assert not (tmp_path / "of process 1").exists()


def test_modules_of_other_kinds_are_asked_for_and_filled(tmp_path: Path) -> None:
    model = VAE(Mine(6, 6), Mine(3, 12), 3, prior=Prior())
    model.save_pretrained(tmp_path)
    modules = {"encoder": Mine(6, 6), "decoder": Mine(3, 12), "prior": Prior()}
    for name, module in modules.items():
        others = {other: modules[other] for other in modules if other != name}
        expected = rf"its {name} is a \S+\.{type(module).__name__}, .*from_pretrained\(\.\.\., {name}=\.\.\.\)"
        with pytest.raises(ValueError, match=expected):
            VAE.from_pretrained(tmp_path, **others)
    other = VAE.from_pretrained(tmp_path, **modules)
    assert other.encoder is modules["encoder"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    with pytest.raises(RuntimeError, match="size mismatch"):
        VAE.from_pretrained(tmp_path, **{**modules, "encoder": Mine(7, 6)})


def test_a_subclass_comes_back_as_one(tmp_path: Path) -> None:
    class Special(VAE):
        pass

    Special(*networks.mlp((4,), 2, hidden=(3,)), 2).save_pretrained(tmp_path)
    assert type(Special.from_pretrained(tmp_path)) is Special


def test_a_subclass_with_arguments_of_its_own_says_what_it_must_take(tmp_path: Path) -> None:
    class Special(VAE):
        def __init__(self, width: int) -> None:
            super().__init__(Mine(4, width), Mine(2, 8), 2)

    class Open(VAE):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)

    model = Special(4)
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"Special: expected a class whose __init__ takes .*, got .*\(width: 'int'\)"):
        Special.from_pretrained(tmp_path)
    found = Open.from_pretrained(tmp_path, encoder=Mine(4, 4), decoder=Mine(2, 8))
    assert type(found) is Open
    # As the message advises.
    again = Special(4)
    again.load_state_dict(found.state_dict())
    assert all(torch.equal(one, same) for one, same in zip(model.parameters(), again.parameters(), strict=True))


def test_a_folder_of_another_library_says_what_was_expected(tmp_path: Path) -> None:
    MODELS["conv"]().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    own = json.loads(config.read_text())
    lacking = {name: value for name, value in own.items() if name != "latent_dim"}
    for content, expected in (
        ({"_class_name": "AutoencoderKL", "latent_channels": 4}, "expected a directory that VAE.save_pretrained wrote"),
        ([], "expected a directory that VAE.save_pretrained wrote"),
        ({**own, "format": 2}, "it is not of this version of fusedvae: expected format 1"),
        (lacking, "there is no 'latent_dim'"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"cannot read .*config\.json: {expected}"):
            VAE.from_pretrained(tmp_path)


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model: there is no config\.json"):
        VAE.from_pretrained(tmp_path)
    MODELS["conv"]().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = json.loads(config.read_text())
    damaged: list[Any] = [{name: value for name, value in whole.items() if name != lacking} for lacking in whole]
    damaged += [
        3,
        {},
        {**whole, "format": 2},
        {**whole, "weights": "../other.pt"},
        {**whole, "encoder": {"class": "os.system"}},
    ]
    damaged += [{**whole, "encoder": {"class": "conv", "arguments": {}}}]
    damaged += [{**whole, "encoder": {"class": "ConvEncoder", "arguments": {"nonsense": 1}}}]
    for content in damaged:
        if isinstance(content, dict) and "version" not in content and len(content) == len(whole) - 1:
            continue  # for people only
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
            VAE.from_pretrained(tmp_path)
    config.write_text(json.dumps(whole))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors: it is damaged"):
        VAE.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no model\.safetensors"):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no/such/directory", "me/absent"])
def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path, name: str) -> None:
    pytest.importorskip("huggingface_hub")
    message = (
        rf"directory: '{name}' is no directory, and no model of that name could be had from the Hugging Face Hub: "
    )
    with pytest.raises(FileNotFoundError, match=message):
        VAE.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(TypeError, match="directory: expected a path or a name, got int"):
        VAE.from_pretrained(3)  # type: ignore[arg-type]


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "owned"),))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    MODELS["conv"]().save_pretrained(tmp_path)
    torch.save({"encoder": Mean()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"cannot read .*model\.pt"):
        VAE.from_pretrained(tmp_path)
    assert not (tmp_path / "owned").exists()
    # Of what the module of the networks holds, it makes what that has to offer.
    monkeypatch.setattr(networks, "mkdir", os.mkdir, raising=False)
    whole = json.loads((tmp_path / "config.json").read_text())
    crafted = {**whole, "encoder": {"class": "mkdir", "arguments": {"path": str(tmp_path / "owned")}}}
    (tmp_path / "config.json").write_text(json.dumps(crafted))
    with pytest.raises(ValueError, match="its encoder is a mkdir, which is none of"):
        VAE.from_pretrained(tmp_path)
    assert not (tmp_path / "owned").exists()
    (tmp_path / "config.json").write_text(json.dumps(whole))
    for content in ({"encoder.layers.0.weight": 3}, [torch.ones(2)]):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"cannot read .*model\.pt: it is damaged \(there is something else than"):
            VAE.from_pretrained(tmp_path)


HUB_CACHE = "models--me--a", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The Hugging Face Hub without a network: what is uploaded lies in huggingface_hub's cache, as if downloaded."""
    pytest.importorskip("huggingface_hub")
    asked: list[Any] = []
    repository, revision = tmp_path / "cache" / HUB_CACHE[0], HUB_CACHE[1]

    class HfApi:
        def __init__(self, token: str | None) -> None:
            asked.append(token)

        def create_repo(self, *, repo_id: str, private: bool | None, exist_ok: bool) -> object:
            asked.append((repo_id, private))
            return SimpleNamespace(repo_id=f"me/{repo_id.removeprefix('me/')}")

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, **options: object) -> str:
            asked.append((repo_id, commit_message, options["create_pr"]))
            shutil.copytree(folder_path, repository / "snapshots" / revision)
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text(revision)
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", HfApi)
    return SimpleNamespace(asked=asked, cache=tmp_path / "cache", files=repository / "snapshots" / revision)


def test_the_hub(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["mlp of one learned scale"]()
    options = {"private": True, "token": "t", "commit_message": "new", "create_pr": True}
    assert model.push_to_hub("a", **options) == "https://hub/commit"
    assert hub.asked == ["t", ("a", True), ("me/a", "new", True)]
    assert {path.name for path in hub.files.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (hub.files / "README.md").read_text()
    assert "library_name: fusedvae" in card
    assert 'fusedvae.VAE.from_pretrained("a")' in card
    check_same(model, fusedvae.VAE.from_pretrained(hub.files))
    check_same(model, fusedvae.VAE.from_pretrained("me/a", cache_dir=hub.cache, local_files_only=True))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    check_same(model, fusedvae.VAE.from_pretrained(hub.files))
    with pytest.raises(ImportError, match=r"huggingface_hub is needed for 'me/a'.*pip install 'fusedvae\[hub\]'"):
        VAE.from_pretrained("me/a")
    with pytest.raises(ImportError, match=r"huggingface_hub is needed to upload a model.*'fusedvae\[hub\]'"):
        model.push_to_hub("me/a")


def test_what_is_saved_can_be_uploaded_at_once(hub: SimpleNamespace, tmp_path: Path) -> None:
    model = MODELS["conv"]()
    assert model.save_pretrained(tmp_path / "me" / "a") is None
    assert model.save_pretrained(tmp_path / "a", push_to_hub=True, private=False) == "https://hub/commit"
    assert hub.asked == [None, ("a", False), ("me/a", "Push model using huggingface_hub.", None)]
    check_same(model, VAE.from_pretrained(tmp_path / "a"))
    with pytest.raises(TypeError, match="private: expected with push_to_hub=True only"):
        model.save_pretrained(tmp_path / "a", private=True)


def test_a_class_with_arguments_of_its_own_takes_the_mixin_of_the_hub(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Mine(hub.PyTorchModelHubMixin, VAE, library_name="mine"):
        def __init__(self, width: int, latent_dim: int = 2) -> None:
            super().__init__(*networks.mlp((5,), latent_dim, hidden=(width,)), latent_dim)

    model = Mine(7)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"width": 7, "latent_dim": 2}
    same = Mine.from_pretrained(tmp_path)
    assert type(same) is Mine
    check_same(model, same)
