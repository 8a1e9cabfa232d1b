import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import lsq_linear, minimize
from torch import nn
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from oder_fast.denoisers import (
    BM3D,
    AtNoiseLevel,
    DnCNN,
    DRUNet,
    SliceDnCNN,
    TotalVariation,
    UNet,
    frozen,
)
from oder_fast.denoisers.slices import background
from oder_fast.denoisers.total_variation import differences, transposed_differences
from oder_fast.deqred import DEQRED
from oder_fast.fixed_point import Anderson
from oder_fast.operators import ParallelBeamCT

SMALL = (4, 8, 12)


def legacy_conv(cls, *args, **kwargs):
    return legacy_spectral_norm(cls(*args, **kwargs))


def official_state(prefix="rObj.network."):
    """State dict of the official network, built from its description: one entry per layer, hooks' names."""
    state = {}

    def conv(name, cls, cin, cout, size, bias):
        module = legacy_conv(cls, cin, cout, size, bias=bias).eval()
        state.update({f"{prefix}{name}.{k}": v for k, v in module.state_dict().items()})

    def block(outer, inner, cin, cout):
        conv(f"{outer}.{inner}conv1", nn.Conv2d, cin, cout, 3, False)
        conv(f"{outer}.{inner}conv2", nn.Conv2d, cout, cout, 3, False)
        state[f"{prefix}{outer}.{inner}norm1.weight"] = torch.rand(cout) + 0.5
        state[f"{prefix}{outer}.{inner}norm1.bias"] = torch.randn(cout)
        for relu in ("relu1", "relu2"):
            state[f"{prefix}{outer}.{inner}{relu}.weight"] = torch.rand(1)

    features = [1, 32, 64, 128, 256, 512]
    for level in range(1, 5):
        block(f"encoder{level}", f"enc{level}", features[level - 1], features[level])
    block("bottleneck", "bottleneck", 256, 512)
    for level in range(4, 0, -1):
        conv(f"upconv{level}", nn.ConvTranspose2d, features[level + 1], features[level], 2, True)
        block(f"decoder{level}", f"dec{level}", 2 * features[level], features[level])
    conv("conv", nn.Conv2d, 32, 1, 1, True)
    return state


def official_forward(state, x, prefix="rObj.network."):
    """The official network in eval mode, from its state dict alone."""

    def weight(name, dim):
        w = state[f"{prefix}{name}.weight_orig"]
        matrix = w.transpose(0, dim).flatten(1)
        sigma = state[f"{prefix}{name}.weight_u"] @ matrix @ state[f"{prefix}{name}.weight_v"]
        return w / sigma

    def block(outer, inner, x):
        get = lambda name: state[f"{prefix}{outer}.{inner}{name}"]  # noqa: E731
        x = F.conv2d(x, weight(f"{outer}.{inner}conv1", 0), padding=1)
        x = F.group_norm(x, 4, get("norm1.weight"), get("norm1.bias"))
        x = F.prelu(x, get("relu1.weight"))
        x = F.conv2d(x, weight(f"{outer}.{inner}conv2", 0), padding=1)
        return F.prelu(x, get("relu2.weight"))

    skips = []
    for level in range(1, 5):
        skips.append(block(f"encoder{level}", f"enc{level}", x))
        x = F.max_pool2d(skips[-1], 2, 2)
    x = block("bottleneck", "bottleneck", x)
    for level in range(4, 0, -1):
        name = f"upconv{level}"
        x = F.conv_transpose2d(x, weight(name, 1), state[f"{prefix}{name}.bias"], stride=2)
        x = block(f"decoder{level}", f"dec{level}", torch.cat((x, skips.pop()), 1))
    return F.conv2d(x, weight("conv", 0), state[f"{prefix}conv.bias"])


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return official_state()


@pytest.fixture(scope="module")
def official():
    return UNet()


def test_default_unet_is_the_official_network(official):
    assert sum(p.numel() for p in official.parameters()) == 7_759_539
    count = lambda *kinds: sum(isinstance(m, kinds) for m in official.modules())  # noqa: E731
    assert count(nn.Conv2d, nn.ConvTranspose2d) == 23
    assert count(nn.GroupNorm) == 9
    assert count(nn.PReLU) == 18


@pytest.mark.parametrize("wrapped", [False, True])
def test_official_checkpoint_gives_the_official_residual(state, wrapped):
    unet = UNet().eval()
    unet.load_official_state_dict({"epoch": 3, "model_state_dict": state} if wrapped else state)
    unet.double()
    x = torch.rand(2, 1, 32, 48, dtype=torch.float64)
    with torch.no_grad(), frozen(unet) as fixed:
        expected = official_forward({k: v.double() for k, v in state.items()}, x)
        torch.testing.assert_close(x - fixed(x), expected, rtol=1e-9, atol=1e-11)


def test_official_checkpoint_without_prefix(state, official):
    official.load_official_state_dict({k.removeprefix("rObj.network."): v for k, v in state.items()})
    key = "rObj.network.decoder2.dec2conv1.weight_orig"
    assert torch.equal(official.decoder2.dec2conv1.parametrizations.weight.original, state[key])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("rObj.network.decoder2.dec2norm1.bias"), "missing decoder2.dec2norm1.bias"),
        (lambda s: s.pop("rObj.network.conv.weight_u"), "missing conv.parametrizations.weight.0._u"),
        (
            lambda s: s.update({"rObj.network.extra.weight": torch.ones(1)}),
            "unexpected rObj.network.extra.weight",
        ),
        (lambda s: s.update({"dObj.theta": torch.ones(1)}), "unexpected dObj.theta"),
        (
            lambda s: s.update({"rObj.network.conv.bias": torch.ones(2)}),
            r"conv.bias has shape \(2,\)",
        ),
        (lambda s: s.update({"rObj.network.conv.bias": 1.0}), "conv.bias is no tensor but float"),
        (lambda s: s.clear(), "missing encoder1"),
    ],
)
def test_official_checkpoint_that_does_not_fit_loads_nothing(state, official, spoil, message):
    spoiled = dict(state)
    spoil(spoiled)
    before = {k: v.clone() for k, v in official.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        official.load_official_state_dict(spoiled)
    assert all(torch.equal(before[k], v) for k, v in official.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 31), (8, 8), (13, 16), (17, 40)])
def test_unet_takes_any_size(shape):
    torch.manual_seed(0)
    unet = UNet(SMALL).eval()
    x = torch.randn(2, 1, *shape)
    denoised = unet(x)
    assert denoised.shape == x.shape
    assert denoised.isfinite().all()
    padded = F.pad(x, (0, -shape[1] % 4, 0, -shape[0] % 4), mode="replicate")
    if padded.shape == x.shape or min(shape) < 4:
        torch.testing.assert_close(denoised, unet(padded)[..., : shape[0], : shape[1]])


@pytest.mark.parametrize(
    "build",
    [lambda **k: UNet(SMALL, **k), lambda **k: DnCNN(3, 8, **k), lambda **k: small_drunet(**k)],
)
def test_the_call_returns_the_image_whatever_is_predicted(build):
    torch.manual_seed(0)
    residual, image = build(predicts="residual").eval(), build(predicts="image").eval()
    image.load_state_dict(residual.state_dict())
    x = torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(residual(x), x - residual.network(x))
    torch.testing.assert_close(image(x), residual.network(x))


def test_channels():
    x = torch.randn(1, 2, 8, 8)
    assert UNet(SMALL, in_channels=2)(x).shape == (1, 2, 8, 8)
    assert UNet(SMALL, in_channels=2, out_channels=1, predicts="image")(x).shape == (1, 1, 8, 8)
    assert DnCNN(2, 4, in_channels=2)(x).shape == (1, 2, 8, 8)


def test_dncnn_without_bias_is_homogeneous():
    net = DnCNN(4, 8, bias=False)
    x = torch.randn(1, 1, 9, 9)
    torch.testing.assert_close(net(3 * x), 3 * net(x))
    assert not torch.allclose(DnCNN(4, 8)(3 * x), 3 * DnCNN(4, 8)(x))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: UNet(predicts="noise"), 'UNet: predicts must be "residual" or "image", got \'noise\''),
        (lambda: UNet((8, 10)), r"UNet: channels must be multiples of 4, its groups, got \(8, 10\)"),
        (lambda: UNet((8,)), "UNet: channels must name at least two levels"),
        (lambda: UNet(SMALL, out_channels=2), "UNet: a residual has the channels of the image"),
        (lambda: UNet(SMALL, in_channels=0), "UNet: channels must be at least 1"),
        (lambda: DnCNN(1), "DnCNN: depth must be at least 2"),
        (
            lambda: DRUNet((8,)),
            r"DRUNet: channels must name at least two levels, each of at least 1, got \(8,\)",
        ),
        (lambda: small_drunet(sigma=-1.0), "DRUNet: sigma must be finite and at least 0, got -1.0"),
        (
            lambda: small_drunet(sigma=torch.ones(2)),
            "DRUNet: sigma must be a float or a 0-d floating-point tensor",
        ),
        (lambda: DRUNet((4, 8), blocks=0), "DRUNet: blocks must be at least 1, got 0"),
        (lambda: SliceDnCNN((1,)), r"SliceDnCNN: dilations must be at least two, .* got \(1,\)"),
        (lambda: SliceDnCNN((1, 0)), r"SliceDnCNN: dilations must be at least two, each at least 1"),
        (lambda: SliceDnCNN(width=0), "SliceDnCNN: width must be at least 1 and .* got 0 and 2"),
        (lambda: SliceDnCNN(neighbours=-1), "SliceDnCNN: .* neighbours at least 0, got 32 and -1"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "image, error, message",
    [
        (torch.zeros(1, 8, 8), ValueError, r"DnCNN: image must have shape \(B, 1, H, W\), got \(1, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8), ValueError, r"DnCNN: image must have shape \(B, 1, H, W\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), TypeError, "DnCNN: image must be floating-point"),
        ([[1.0]], TypeError, "DnCNN: image must be a torch.Tensor, got list"),
    ],
)
def test_bad_images_are_named(image, error, message):
    with pytest.raises(error, match=message):
        DnCNN(2, 4)(image)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 0, 8, 8), (1, 2, 0, 8)])
def test_volumes_without_two_channels_a_slice_are_refused(shape):
    with pytest.raises(ValueError, match="two channels for each slice and not be empty, got shape"):
        small_slices()(torch.zeros(shape))


# ------------------------------------------------------------------ SliceDnCNN


def small_slices(**options):
    return SliceDnCNN((1, 2, 1), 6, **{"neighbours": 1, **options})


@pytest.mark.parametrize("predicts", ["image", "residual"])
def test_slices_are_denoised_from_themselves_and_their_neighbours(predicts):
    torch.manual_seed(0)
    net, x = small_slices(predicts=predicts), torch.randn(2, 10, 9, 7)
    denoised = net(x)
    for z in range(5):
        # Alone with its neighbours, and the medium beyond the ends.
        alone = net(x[:, 2 * max(z - 1, 0) : 2 * min(z + 2, 5)])
        at = 2 * min(z, 1)
        torch.testing.assert_close(alone[:, at : at + 2], denoised[:, 2 * z : 2 * z + 2])
    changed = x.clone()
    changed[:, 8:] += torch.randn(2, 2, 9, 7)
    different = (net(changed) - denoised).abs().amax((0, 2, 3)) > 1e-6
    assert different.tolist() == [False] * 6 + [True] * 4


def test_volumes_are_denoised_alike_in_any_unit_and_above_any_background():
    net, x = small_slices(), torch.randn(1, 6, 12, 10)
    torch.testing.assert_close(net(300 * x), 300 * net(x))
    torch.testing.assert_close(net(x + torch.arange(6.0)[:, None, None]), net(x), rtol=1e-4, atol=1e-5)


def test_the_background_is_that_of_objects_over_half_a_slice():
    image = torch.zeros(1, 2, 20, 20)
    image[:, 0, :11] = torch.rand(11, 20)
    image[:, 1] = 0.5
    torch.testing.assert_close(background(image).flatten(), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 4, 1, 3), (3, 2, 5, 2)])
def test_small_volumes_are_denoised_too(shape):
    assert small_slices()(torch.randn(shape)).shape == shape
    assert SliceDnCNN((1, 1), 4, neighbours=0)(torch.randn(shape)).shape == shape


# ------------------------------------------------------------------ DRUNet


def drunet_state(in_channels=1, prefix=""):
    """State dict of the public DRUNet, built from its description: shapes and names alone."""
    state = {}

    def conv(name, *shape):
        state[f"{prefix}{name}.weight"] = torch.randn(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5

    def blocks(name, first, width):
        for block in range(first, first + 4):
            for layer in (0, 2):
                conv(f"{name}.{block}.res.{layer}", width, width, 3, 3)

    widths = [64, 128, 256, 512]
    conv("m_head", 64, in_channels + 1, 3, 3)
    for level in (1, 2, 3):
        blocks(f"m_down{level}", 0, widths[level - 1])
        conv(f"m_down{level}.4", widths[level], widths[level - 1], 2, 2)
    blocks("m_body", 0, 512)
    for level in (3, 2, 1):
        conv(f"m_up{level}.0", widths[level], widths[level - 1], 2, 2)
        blocks(f"m_up{level}", 1, widths[level - 1])
    conv("m_tail", in_channels, 64, 3, 3)
    return state


def drunet_forward(state, x, sigma):
    """The public network from its state dict alone."""

    def blocks(name, first, x):
        for block in range(first, first + 4):
            inside = F.conv2d(x, state[f"{name}.{block}.res.0.weight"], padding=1).relu()
            x = x + F.conv2d(inside, state[f"{name}.{block}.res.2.weight"], padding=1)
        return x

    x = F.conv2d(torch.cat((x, torch.full_like(x[:, :1], sigma)), 1), state["m_head.weight"], padding=1)
    skips = [x]
    for level in (1, 2, 3):
        x = F.conv2d(blocks(f"m_down{level}", 0, x), state[f"m_down{level}.4.weight"], stride=2)
        skips.append(x)
    x = blocks("m_body", 0, x)
    for level in (3, 2, 1):
        x = F.conv_transpose2d(x + skips.pop(), state[f"m_up{level}.0.weight"], stride=2)
        x = blocks(f"m_up{level}", 1, x)
    return F.conv2d(x + skips.pop(), state["m_tail.weight"], padding=1)


@pytest.fixture(scope="module")
def public_drunet():
    torch.manual_seed(0)
    return DRUNet(sigma=0.2), drunet_state()


def test_public_drunet_weights_give_the_public_network(public_drunet):
    net, state = public_drunet
    net.load_official_state_dict({f"module.{k}": v for k, v in state.items()})
    assert sum(p.numel() for p in net.parameters()) == 32_638_656
    x = torch.rand(1, 1, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(net(x), drunet_forward(state, x, 0.2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda s: s.pop("m_body.3.res.2.weight"),
            "DRUNet: the checkpoint does not fit: missing m_body.3.res.2",
        ),
        (lambda s: s.update({"m_head.bias": torch.ones(64)}), "unexpected m_head.bias"),
        (lambda s: s.update({"sigma": torch.ones(())}), "unexpected sigma"),
        (
            lambda s: s.update({"m_head.weight": torch.ones(64, 4, 3, 3)}),
            r"m_head.weight has shape \(64, 4, 3, 3\), not \(64, 2, 3, 3\)",
        ),
    ],
)
def test_weights_that_do_not_fit_drunet_load_nothing(public_drunet, spoil, message):
    net, state = public_drunet
    spoiled = dict(state)
    spoil(spoiled)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        net.load_official_state_dict(spoiled)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def small_drunet(**options):
    return DRUNet((4, 6, 8), blocks=1, **options)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 31), (8, 8), (13, 16)])
@pytest.mark.parametrize("sigma", [None, 0.1])
def test_drunet_takes_any_size(shape, sigma):
    net = small_drunet(in_channels=2, sigma=sigma)
    denoised = net(torch.randn(2, 2, *shape))
    assert denoised.shape == (2, 2, *shape)
    assert denoised.isfinite().all()


def test_drunet_scales_with_image_and_noise_level():
    torch.manual_seed(0)
    net, blind = small_drunet(sigma=0.1), small_drunet(sigma=None)
    louder = small_drunet(sigma=0.3)
    louder.load_state_dict(net.state_dict())
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(louder(3 * x), 3 * net(x))
    assert not torch.allclose(louder(x), net(x))
    torch.testing.assert_close(blind(3 * x), 3 * blind(x))


def test_drunet_noise_level_can_be_trained_and_kept():
    torch.manual_seed(0)
    trained = small_drunet(sigma=nn.Parameter(torch.tensor(0.1)))
    trained(torch.randn(1, 1, 8, 8)).square().sum().backward()
    assert trained.sigma.grad.abs() > 0
    fixed, buffer = small_drunet(sigma=0.1), small_drunet(sigma=torch.tensor(0.2))
    assert "sigma" not in fixed.state_dict()
    buffer.load_official_state_dict(fixed.state_dict())
    assert float(buffer.sigma) == pytest.approx(0.2)
    assert "sigma" in buffer.state_dict()
    assert buffer.double().sigma.dtype == torch.float64
    assert "sigma=0.1" in repr(fixed)


# ------------------------------------------------------------------ total variation


def exact_tv(weight, **options):
    return TotalVariation(weight, iterations=5000, tolerance=2e-6, **options)


def dense_differences(channels, height, width):
    """Forward differences as a matrix, built from the definition: rows (channel, axis, i, j)."""
    pixel = np.arange(channels * height * width).reshape(channels, height, width)
    matrix = np.zeros((channels, 2, height, width, pixel.size))
    for c, i, j in np.ndindex(channels, height, width):
        for axis, (di, dj) in enumerate(((1, 0), (0, 1))):
            if i + di < height and j + dj < width:
                matrix[c, axis, i, j, pixel[c, i + di, j + dj]] += 1
                matrix[c, axis, i, j, pixel[c, i, j]] -= 1
    return matrix.reshape(-1, pixel.size)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (1, 1, 1, 6), (1, 2, 7, 1)])
def test_differences_are_those_of_the_definition_and_their_transpose(shape):
    x = torch.randn(shape, dtype=torch.float64)
    matrix = torch.from_numpy(dense_differences(*shape[1:]))
    torch.testing.assert_close(differences(x).flatten(1), x.flatten(1) @ matrix.T)
    q = torch.randn(differences(x).shape, dtype=torch.float64)
    torch.testing.assert_close(transposed_differences(q).flatten(1), q.flatten(1) @ matrix)


def test_anisotropic_total_variation_against_bounded_least_squares():
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    matrix = dense_differences(1, 5, 6)
    weight = 0.4
    dual = lsq_linear(matrix.T, x.flatten().numpy(), bounds=(-weight, weight), method="bvls", tol=1e-14).x
    expected = torch.from_numpy(x.flatten().numpy() - matrix.T @ dual).reshape(x.shape)
    torch.testing.assert_close(exact_tv(weight, isotropic=False)(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_total_variation_against_a_general_convex_solver(isotropic, joint):
    channels, height, width, weight = 2, 3, 3, 0.3
    x = torch.randn(1, channels, height, width, dtype=torch.float64)
    matrix, target = dense_differences(channels, height, width), x.flatten().numpy()

    def lengths(dual):
        squares = dual.reshape(channels, 2, height, width) ** 2
        return squares.sum((0,) * joint + (1,) * isotropic, keepdims=True) if isotropic or joint else squares

    found = minimize(
        lambda q: 0.5 * ((target - matrix.T @ q) ** 2).sum(),
        np.zeros(len(matrix)),
        jac=lambda q: matrix @ (matrix.T @ q - target),
        constraints={"type": "ineq", "fun": lambda q: (weight**2 - lengths(q)).ravel()},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-11},
    )
    assert found.success
    expected = torch.from_numpy(target - matrix.T @ found.x).reshape(x.shape)
    denoised = exact_tv(weight, isotropic=isotropic, joint=joint)(x)
    torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("vertical", [False, True])
def test_a_step_keeps_its_edge_and_loses_contrast(vertical):
    # A plateau of n samples with one edge moves by weight / n, until the plateaus meet.
    step = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)[None, None, None]
    expected = torch.tensor([0.1, 0.1, 1 - 0.2 / 3, 1 - 0.2 / 3, 1 - 0.2 / 3], dtype=torch.float64)[
        None, None, None
    ]
    if vertical:
        step, expected = step.mT, expected.mT
    torch.testing.assert_close(exact_tv(0.2)(step), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(exact_tv(5.0)(step), torch.full_like(step, 0.6), rtol=0, atol=1e-6)


def test_joint_channels_share_their_edges():
    # Two channels with one step of length |(1, 1)|: both plateaus move along it together.
    step = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64).expand(1, 2, 1, 4)
    separate, joint = exact_tv(0.2)(step), exact_tv(0.2, joint=True)(step)
    assert float(separate[0, 0, 0, 0]) == pytest.approx(0.1, abs=1e-6)
    assert float(joint[0, 0, 0, 0]) == pytest.approx(0.1 / 2**0.5, abs=1e-6)
    # Any rotation of the channels, a change of phase of a complex image, commutes.
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    rotate = lambda v: torch.einsum("dc,bchw->bdhw", turn, v)  # noqa: E731
    torch.testing.assert_close(
        exact_tv(0.3, joint=True)(rotate(x)), rotate(exact_tv(0.3, joint=True)(x)), rtol=0, atol=2e-5
    )
    assert not torch.allclose(exact_tv(0.3)(rotate(x)), rotate(exact_tv(0.3)(x)), atol=1e-2)


@pytest.mark.parametrize("isotropic", [False, True])
def test_total_variation_is_firmly_nonexpansive(isotropic):
    tolerance = 1e-4
    denoiser = TotalVariation(0.5, iterations=5000, tolerance=tolerance, isotropic=isotropic)
    a = torch.randn(1, 1, 5, 6, dtype=torch.float64).expand(3, -1, -1, -1)
    b = a + torch.tensor([0.1, 1.0, 10.0])[:, None, None, None] * torch.randn_like(a)
    change = denoiser(a) - denoiser(b)
    together = (change * (a - b)).flatten(1).sum(1)
    norm = lambda v: v.flatten(1).norm(dim=1)  # noqa: E731
    inexact = 2 * tolerance * (norm(a) + norm(b)) * norm(a - b)
    assert bool((change.square().flatten(1).sum(1) <= together + inexact).all())
    assert float((inexact / together).max()) < 0.2


def test_zero_weight_is_the_identity_and_the_weight_can_be_trained():
    x = torch.randn(2, 1, 5, 6)
    weight = nn.Parameter(torch.tensor(0.0))
    denoised = TotalVariation(weight)(x)
    assert torch.equal(denoised, x)
    # What total variation loses at first: the derivative of the proximal map at weight 0 is minus a subgradient.
    denoised.square().sum().backward()
    assert float(weight.grad) == pytest.approx(-2 * float(differences(x).norm(dim=2).sum()), rel=1e-5)
    fixed = TotalVariation(0.1)
    assert not fixed.state_dict()
    assert "weight=0.1, iterations=200" in repr(fixed)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"isotropic": False}, marks=pytest.mark.exhaustive), {"joint": True}]
)
def test_the_derivative_is_that_of_the_exact_proximal_map(options):
    torch.manual_seed(1)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def denoise(x, weight):
        denoiser = TotalVariation(0.0, iterations=200, tolerance=0.0, **options)
        denoiser.weight = weight
        return denoiser(x)

    assert torch.autograd.gradcheck(denoise, (x, weight), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("iterations", [1, 3, 10, pytest.param(40, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("options", [{}, {"isotropic": False}, {"joint": True}])
def test_the_derivative_is_symmetric_and_nonexpansive_however_early_it_ends(iterations, options):
    torch.manual_seed(0)
    denoiser = TotalVariation(0.2, iterations=iterations, tolerance=0.0, **options)
    x = torch.randn(2, 4, 5, dtype=torch.float64).cumsum(1)
    jacobian = torch.autograd.functional.jacobian(lambda v: denoiser(v[None])[0], x).reshape(40, 40)
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-12)
    assert float(torch.linalg.matrix_norm(jacobian, 2)) <= 1 + 1e-12


def test_the_value_is_the_same_with_and_without_a_graph():
    x = torch.rand(1, 1, 6, 7)
    with_graph = TotalVariation(0.1)(x.clone().requires_grad_())
    assert with_graph.requires_grad
    assert torch.equal(with_graph.detach(), TotalVariation(0.1)(x))


def test_the_derivative_is_the_mean_over_each_plateau():
    step = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)[None, None, None]
    step = step + 0.01 * torch.randn_like(step)
    jacobian = torch.autograd.functional.jacobian(TotalVariation(0.2), step).reshape(5, 5)
    expected = torch.block_diag(torch.full((2, 2), 1 / 2), torch.full((3, 3), 1 / 3)).double()
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2])
def test_the_duality_gap_bounds_the_error_of_each_image(tolerance):
    torch.manual_seed(0)
    # One image is done long before the other.
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64) * torch.tensor([1.0, 10.0])[:, None, None, None] + 1
    denoiser = TotalVariation(0.5, iterations=2000, tolerance=tolerance)
    denoised, exact = denoiser(x), TotalVariation(0.5, iterations=2000, tolerance=1e-5)(x)
    error = (denoised - exact).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert bool((error <= tolerance + 1e-5).all())
    for b in range(2):
        torch.testing.assert_close(denoised[b : b + 1], denoiser(x[b : b + 1]), rtol=0, atol=1e-12)


def test_the_bound_of_the_error_at_the_start_is_that_of_the_variation():
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    denoiser = TotalVariation(0.3)
    found = denoiser._error(x, torch.zeros_like(differences(x)), torch.tensor(0.3, dtype=torch.float64))
    variation = float(differences(x).norm(dim=2).sum())
    assert float(found) == pytest.approx((2 * 0.3 * variation) ** 0.5 / float(x.norm()))


def test_an_image_that_is_done_takes_no_more_iterations():
    counts = []
    for tolerance in (0.0, 1e-2):
        denoiser = TotalVariation(0.1, iterations=500, tolerance=tolerance)
        x = torch.rand(1, 1, 12, 12)
        counts.append(denoiser._solve(x, torch.tensor(0.1))[1])
    assert counts[0] == 500
    assert counts[1] < 200
    assert torch.equal(TotalVariation(0.1)(torch.zeros(1, 1, 4, 4)), torch.zeros(1, 1, 4, 4))


def test_red_with_total_variation_converges():
    ct = ParallelBeamCT(16, 12)
    x = torch.zeros(1, 16, 16)
    x[:, 4:12, 5:11] = 1
    model = DEQRED(
        TotalVariation(nn.Parameter(torch.tensor(0.05)), iterations=50), tau=0.05, on_failure="raise"
    )
    found = model(ct(x), ct)
    (found - x).square().sum().backward()
    assert float((found - x).detach().norm() / x.norm()) < 0.1
    assert model.denoiser.weight.grad.isfinite()
    assert model.denoiser.weight.grad != 0


@pytest.mark.parametrize(
    "build, error, message",
    [
        (
            lambda: TotalVariation(-0.1),
            ValueError,
            "TotalVariation: weight must be finite and at least 0, got -0.1",
        ),
        (
            lambda: TotalVariation("much"),
            TypeError,
            "TotalVariation: weight must be a float or a 0-d tensor, got str",
        ),
        (lambda: TotalVariation(0.1, iterations=0), ValueError, "iterations must be at least 1, got 0"),
        (lambda: TotalVariation(0.1, tolerance=-1.0), ValueError, "tolerance must be finite and at least 0"),
        (lambda: TotalVariation(0.1)(torch.zeros(3, 3)), ValueError, r"shape \(B, C, H, W\), got \(3, 3\)"),
    ],
)
def test_what_total_variation_refuses_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


# ------------------------------------------------------------------ denoisers that are told the noise level


class Shrink(nn.Module):
    """A denoiser as deepinv's are called."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9))

    def forward(self, x, sigma):
        return self.gain * F.relu(x - sigma)


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda v: nn.Parameter(torch.tensor(v))])
def test_a_denoiser_that_is_told_the_noise_level(kind):
    denoiser = AtNoiseLevel(Shrink(), kind(0.25))
    x = torch.rand(2, 1, 5, 5)
    torch.testing.assert_close(denoiser(x), 0.9 * F.relu(x - 0.25))
    assert ("sigma" in denoiser.state_dict()) is not isinstance(denoiser.sigma, float)
    assert ("sigma" in dict(denoiser.named_parameters())) is isinstance(denoiser.sigma, nn.Parameter)
    assert "sigma=0.25" in repr(denoiser)


def test_noise_level_and_weights_are_trained_through_the_fixed_point():
    ct = ParallelBeamCT(8, 6)
    denoiser = AtNoiseLevel(Shrink(), nn.Parameter(torch.tensor(0.1)))
    model = DEQRED(denoiser, tau=0.1, on_failure="raise")
    model(ct(torch.rand(1, 8, 8)), ct).square().sum().backward()
    assert denoiser.sigma.grad != 0
    assert denoiser.denoiser.gain.grad != 0


def test_what_a_noise_level_refuses_is_named():
    with pytest.raises(TypeError, match="AtNoiseLevel: denoiser must be callable, got float"):
        AtNoiseLevel(1.0, 0.1)
    with pytest.raises(ValueError, match="AtNoiseLevel: sigma must be finite and at least 0, got nan"):
        AtNoiseLevel(Shrink(), float("nan"))


def test_denoisers_of_deepinv():
    models = pytest.importorskip("deepinv.models")
    torch.manual_seed(0)
    theirs, ours = models.DRUNet(1, 1, pretrained=None), DRUNet(sigma=0.1)
    ours.load_official_state_dict(theirs.state_dict())
    x = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(AtNoiseLevel(theirs, 0.1)(x), ours(x))
    y = (ct := ParallelBeamCT(16, 12))(x[:, 0])
    for small in (
        models.DRUNet(1, 1, nc=(4, 4, 4, 4), nb=1, pretrained=None),
        models.TVDenoiser(n_it_max=50),
    ):
        model = DEQRED(AtNoiseLevel(small, 0.1), tau=0.05, on_failure="raise")
        assert model(y, ct).isfinite().all()


# ------------------------------------------------------------------ BM3D


@pytest.fixture
def package(monkeypatch):
    """Stands in for the package bm3d: notes what it is given."""
    calls = []

    def bm3d(image, sigma):
        calls.append((image, sigma))
        return image + len(calls)

    monkeypatch.setitem(sys.modules, "bm3d", SimpleNamespace(bm3d=bm3d, __spec__="found"))
    return calls


def test_bm3d_is_given_each_channel_of_each_image(package):
    x = torch.rand(2, 3, 5, 6)
    denoised = BM3D(0.1)(x)
    assert denoised.dtype == x.dtype
    torch.testing.assert_close(denoised - x, torch.arange(1.0, 7).reshape(2, 3, 1, 1).expand_as(x))
    assert [(image.shape, image.dtype.name, sigma) for image, sigma in package] == [
        ((5, 6), "float64", 0.1)
    ] * 6
    assert BM3D(0.1)(torch.zeros(0, 1, 4, 4)).shape == (0, 1, 4, 4)


def test_bm3d_refuses_to_be_trained_through(package):
    x = torch.rand(1, 1, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="BM3D: it has no derivative in its input"):
        BM3D(0.1)(x)
    with torch.no_grad():
        assert not BM3D(0.1)(x).requires_grad
    ct = ParallelBeamCT(8, 6)
    model = DEQRED(BM3D(0.1), tau=0.1, on_failure="ignore", solver=Anderson(3))
    y = ct(torch.rand(1, 8, 8))
    assert model(y, ct).isfinite().all()
    with pytest.raises(RuntimeError, match="BM3D: it has no derivative"):
        model(y.requires_grad_(), ct)


def test_what_bm3d_refuses_is_named(package, monkeypatch):
    with pytest.raises(ValueError, match="BM3D: sigma must be above 0, got 0"):
        BM3D(0)
    with pytest.raises(TypeError, match="BM3D: sigma must be a float, it cannot be trained, got Tensor"):
        BM3D(torch.tensor(0.1))
    monkeypatch.setitem(sys.modules, "bm3d", None)
    with pytest.raises(ImportError, match=r"BM3D \(noncommercial use only\) needs bm3d: pip install bm3d$"):
        BM3D(0.1)


def test_the_real_bm3d_removes_noise():
    pytest.importorskip("bm3d")
    x = torch.zeros(1, 1, 48, 48)
    x[..., 12:36, 16:30] = 1
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert float((BM3D(0.1)(noisy) - x).norm()) < 0.3 * float((noisy - x).norm())


def test_a_blind_drunet_denoises_data_in_any_unit():
    torch.manual_seed(0)
    blind, image = DRUNet((4, 8), blocks=1, sigma=None), torch.randn(1, 1, 12, 9)
    torch.testing.assert_close(blind(1024 * image), 1024 * blind(image), rtol=0, atol=0)
    assert blind.scale_free
    assert not DEQRED(blind, tau=0.1).normalize
    assert not DRUNet((4, 8), blocks=1, sigma=0.1).scale_free
