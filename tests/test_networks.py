"""Ready networks: shapes, bounds, and that they can learn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fusedvae import VAE, networks

BUILDERS = {"mlp": networks.mlp, "conv": networks.conv}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads slow down models as small as these, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 10), (1, 28, 28), (3, 64, 64), (1, 4, 4), (2, 1, 1)])
def test_a_decoder_gives_back_the_shape_that_its_encoder_took(name: str, shape: tuple[int, ...]) -> None:
    small = {"hidden": (16,)} if name == "mlp" else {"width": 2}
    encoder, decoder = BUILDERS[name](shape, 5, **small)
    x = torch.rand(2, *shape)
    packed = encoder(x)
    assert packed.shape == (2, 10)
    mean, logvar = decoder(packed[:, :5])
    assert mean.shape == logvar.shape == x.shape
    assert mean.is_contiguous()
    assert logvar.is_contiguous()


def test_an_mlp_takes_vectors_and_any_number_of_layers() -> None:
    for hidden in ((), (7,), (9, 8, 7)):
        encoder, decoder = networks.mlp((13,), 3, hidden=hidden)
        packed = encoder(torch.rand(4, 13))
        assert packed.shape == (4, 6)
        assert decoder(packed[:, :3])[0].shape == (4, 13)
        assert sum(isinstance(m, torch.nn.SiLU) for m in decoder.modules()) == len(hidden)


def test_the_mlp_decoder_mirrors_the_encoder() -> None:
    encoder, decoder = networks.mlp((13,), 3, hidden=(9, 8))

    def linear(module: torch.nn.Module) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, torch.nn.Linear)]

    assert linear(encoder) == [(13, 9), (9, 8), (8, 6)]
    assert linear(decoder) == [(3, 8), (8, 9), (9, 13), (9, 13)]


@pytest.mark.parametrize("name", BUILDERS)
def test_mean_only_leaves_the_log_variance_to_the_vae(name: str) -> None:
    encoder, decoder = BUILDERS[name]((1, 8, 8), 2, mean_only=True)
    z = torch.randn(3, 2)
    assert decoder(z).shape == (3, 1, 8, 8)
    assert not any("logvar" in key for key in decoder.state_dict())
    VAE(encoder, decoder, 2, recon_logvar="learned").loss(torch.rand(3, 1, 8, 8)).backward()


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("floor", [-6.0, -1.5])
def test_the_log_variance_stays_above_its_floor_and_keeps_a_gradient(name: str, floor: float) -> None:
    _, decoder = BUILDERS[name]((1, 8, 8), 2, logvar_floor=floor)
    with torch.no_grad():
        head = decoder.heads.logvar
        bias = head.bias if name == "conv" else head[0].bias
        bias.fill_(floor - 9.0)
    _, logvar = decoder(torch.randn(3, 2))
    assert (logvar >= floor).all()
    # The output varies by less than 4 around the bias: softplus(-9 + 4) = 0.0067.
    assert (logvar < floor + 0.01).all()
    logvar.sum().backward()
    assert bias.grad is not None
    assert (bias.grad > 0).all()


def test_far_above_the_floor_the_log_variance_is_the_output() -> None:
    _, decoder = networks.mlp((4,), 2, logvar_floor=-30.0)
    z = torch.randn(3, 2)
    expected = decoder.heads.logvar(decoder.layers(z))
    torch.testing.assert_close(decoder(z)[1], expected, rtol=1e-5, atol=1e-5)


def test_conv_halves_the_resolution_until_it_is_at_most_four() -> None:
    encoder, _ = networks.conv((3, 64, 40), 2, width=4)
    convolutions = [m for m in encoder.layers if isinstance(m, torch.nn.Conv2d)]
    assert [m.stride[0] for m in convolutions] == [1, 2, 2, 2, 2]
    assert [m.out_channels for m in convolutions] == [4, 8, 16, 32, 32]
    assert encoder.layers[-1].in_features == 32 * 4 * 3


def test_a_conv_sample_does_not_depend_on_its_batch() -> None:
    encoder, decoder = networks.conv((1, 8, 8), 2, width=4)
    x = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(encoder(x)[2:3], encoder(x[2:3]))
    z = torch.randn(6, 2)
    torch.testing.assert_close(decoder(z)[0][2:3], decoder(z[2:3])[0])


@pytest.mark.parametrize("name", BUILDERS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    vae = VAE(*BUILDERS[name]((1, 8, 8), 4), 4)
    vae.loss(torch.rand(8, 1, 8, 8)).backward()
    for key, parameter in vae.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", BUILDERS)
def test_networks_fit_a_few_samples(name: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8)
    small = {"hidden": (64,)} if name == "mlp" else {"width": 8}
    vae = VAE(*BUILDERS[name]((1, 8, 8), 4, **small), 4)
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        vae.loss(x).backward()
        optimizer.step()
    error = (vae.eval().reconstruct(x) - x).square().mean()
    assert error < 0.2 * x.var(), f"mean squared error {error:.4f} of a variance {x.var():.4f}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_work_in_other_dtypes(dtype: torch.dtype) -> None:
    encoder, decoder = (module.to(dtype) for module in networks.conv((1, 8, 8), 2, width=4))
    packed = encoder(torch.rand(2, 1, 8, 8, dtype=dtype))
    assert packed.dtype == dtype
    assert all(output.dtype == dtype for output in decoder(packed[:, :2]))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: networks.mlp((), 2), ValueError, r"shape: expected positive integers, at least 1"),
        (lambda: networks.mlp((True,), 2), TypeError, "shape: expected a sequence of integers"),
        (lambda: networks.mlp((0,), 2), ValueError, r"shape: expected positive integers.*\(0,\)"),
        (lambda: networks.mlp(784, 2), TypeError, r"shape: expected a sequence of integers, got 784"),
        (lambda: networks.mlp((4,), 0), ValueError, r"latent_dim: expected at least 1, got 0"),
        (lambda: networks.mlp((4,), 2.0), TypeError, r"latent_dim: expected an integer, got 2.0"),
        (lambda: networks.mlp((4,), 2, hidden=64), TypeError, r"^hidden: expected a sequence of integers, got 64$"),
        (lambda: networks.mlp((4,), 2, hidden=(3, -1)), ValueError, r"hidden: expected positive.*\(3, -1\)"),
        (lambda: networks.conv((8, 8), 2), ValueError, r"shape: expected positive integers, at least 3"),
        (lambda: networks.conv((1, 2, 8, 8), 2), ValueError, r"shape: expected \(channels, height, width\)"),
        (lambda: networks.conv((1, 8, 8), 2, width=0), ValueError, r"width: expected at least 1, got 0"),
        (lambda: networks.conv((1, 8, 8), True), TypeError, r"latent_dim: expected an integer, got True"),
        (lambda: networks.mlp((4,), 2, logvar_floor="-4"), TypeError, r"logvar_floor: expected a number, got str"),
        (lambda: networks.conv((1, 8, 8), 2, logvar_floor=True), TypeError, r"logvar_floor: .* number, got bool"),
    ],
)
def test_wrong_sizes_are_named(build: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", BUILDERS)
def test_numbers_of_numpy_are_kept_as_plain_ones(name: str, classes: int | None) -> None:
    def made(whole: type, real: type, boolean: type) -> list[dict]:
        own = {"hidden": [whole(9), whole(7)]} if name == "mlp" else {"width": whole(4)}
        options = {"mean_only": boolean(False), "logvar_floor": real(-1.5), **own}
        torch.manual_seed(0)
        pair = BUILDERS[name](
            (whole(1), 8, whole(8)), whole(5), classes=None if classes is None else whole(classes), **options
        )
        outputs.append([value for module in pair for value in module.state_dict().values()])
        return [module.arguments for module in pair]

    outputs: list[list[torch.Tensor]] = []
    arguments, plain = made(np.int64, np.float32, np.bool_), made(int, float, bool)
    assert repr(arguments) == repr(plain)  # of NumPy, a number's would have its type
    assert all(torch.equal(one, same) for one, same in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_wrong_inputs_are_named(name: str) -> None:
    encoder, decoder = BUILDERS[name]((1, 8, 8), 2)
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, 1, 8, 8\) by \w+Encoder, got \(3, 8, 8\)"):
        encoder(torch.rand(3, 8, 8))
    with pytest.raises(TypeError, match=r"x: expected floating point by \w+Encoder, got torch.uint8"):
        encoder(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"z: expected shape \(batch, 2\) by \w+Decoder, got \(3, 4\)"):
        decoder(torch.rand(3, 4))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1, 2], TypeError, "expected a tensor by LabelledEncoder, got list"),
        (torch.zeros(3), TypeError, "expected int64 or int32 by LabelledEncoder, got torch.float32"),
        (torch.tensor([0, 1]), ValueError, r"expected shape \(3,\) by LabelledEncoder, got \(2,\)"),
        (torch.tensor([[0], [1], [2]]), ValueError, r"expected shape \(3,\) by LabelledEncoder, got \(3, 1\)"),
        (torch.tensor([0, 1, 4]), ValueError, "expected from 0 to 3 by LabelledEncoder, got from 0 to 4"),
        (torch.tensor([0, -1, 3]), ValueError, "expected from 0 to 3 by LabelledEncoder, got from -1 to 3"),
    ],
    ids=["list", "float", "short", "column", "high", "negative"],
)
def test_wrong_labels_are_named(name: str, labels: object, error: type[Exception], message: str) -> None:
    vae = VAE(*BUILDERS[name]((1, 4, 4), 2, classes=4), 2)
    with pytest.raises(error, match=f"labels: {message}"):
        vae.loss(torch.rand(3, 1, 4, 4), labels)
    with pytest.raises(error, match=f"labels: {message}".replace("Encoder", "Decoder")):
        vae.generate(3, labels)
