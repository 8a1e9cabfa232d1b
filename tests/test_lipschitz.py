"""Lipschitz constants of denoisers: estimates against dense Jacobians, bounds against estimates."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from oder_fast.denoisers import (
    DnCNN,
    DRUNet,
    SliceDnCNN,
    TotalVariation,
    UNet,
    bound_lipschitz,
    estimate_lipschitz,
)
from oder_fast.denoisers.lipschitz import conv_norm
from oder_fast.deqred import DEQRED
from oder_fast.diagnosis import diagnose
from oder_fast.fixed_point import Picard
from oder_fast.operators import ParallelBeamCT
from oder_fast.red import GradientStep, ProximalStep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dense(function, image):
    """Jacobian of a map at one image, as a matrix."""
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v[None])[0], image)
    return jacobian.reshape(image.numel(), image.numel())


def spectral(matrix):
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def lengthen(net, factor):
    with torch.no_grad():
        for p in net.parameters():
            p *= factor
    return net


def build(name):
    networks = {
        "dncnn": lambda: lengthen(DnCNN(4, 6, bias=True), 1.5),
        "dncnn image": lambda: lengthen(DnCNN(3, 6, predicts="image"), 1.5),
        "dncnn spectral": lambda: DnCNN(4, 6, spectral_norm=True),
        "unet": lambda: UNet((4, 8, 8)),
        "drunet": lambda: DRUNet((4, 6), blocks=1, sigma=0.1),
        "drunet blind": lambda: DRUNet((4, 6), blocks=1, sigma=None, predicts="residual"),
        "custom": lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(4, 1, 3, padding=1)
        ),
    }
    return networks[name]().double()


NETWORKS = ("dncnn", "dncnn image", "dncnn spectral", "unet", "drunet", "drunet blind", "custom")

# ------------------------------------------------------------------ estimates


@pytest.mark.parametrize("name", NETWORKS)
def test_the_estimate_is_that_of_the_dense_jacobian(name):
    net = build(name).eval()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    estimate = estimate_lipschitz(net, images, iterations=64, tolerance=1e-10)
    for b, image in enumerate(images):
        jacobian = dense(net, image)
        residual = torch.eye(64, dtype=torch.float64) - jacobian
        ends = torch.linalg.eigvalsh((residual + residual.T) / 2)
        assert float(estimate.denoiser[b]) == pytest.approx(spectral(jacobian), rel=1e-9)
        assert float(estimate.residual[b]) == pytest.approx(spectral(residual), rel=1e-9)
        assert float(estimate.smallest_eigenvalue[b]) == pytest.approx(float(ends[0]), abs=1e-9)
        assert float(estimate.largest_eigenvalue[b]) == pytest.approx(float(ends[-1]), abs=1e-9)
    assert float(estimate.errors.max()) < 1e-8


def test_few_iterations_give_lower_bounds_and_say_how_rough_they_are():
    net = build("dncnn")
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    exact = spectral(dense(net, image[0]))
    rough = [estimate_lipschitz(net, image, iterations=n, tolerance=0.0) for n in (1, 3, 6)]
    found = [float(e.denoiser) for e in rough]
    assert found[0] < found[-1] <= exact * (1 + 1e-12)
    assert float(rough[0].errors[0, 0]) > float(rough[-1].errors[0, 0]) > 0


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0, 3.0])
def test_multiples_of_the_identity(gain):
    # The Krylov space ends after one product; the other image, a blur, goes on.
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16

    def denoiser(x):
        return torch.cat((gain * x[:1], F.conv2d(x[1:], kernel, padding=1)))

    estimate = estimate_lipschitz(denoiser, torch.zeros(2, 1, 7, 9))
    assert float(estimate.denoiser[0]) == pytest.approx(gain, abs=1e-5)
    assert float(estimate.residual[0]) == pytest.approx(abs(1 - gain), abs=1e-5)
    assert float(estimate.smallest_eigenvalue[0]) == pytest.approx(1 - gain, abs=1e-5)
    assert float(estimate.largest_eigenvalue[0]) == pytest.approx(1 - gain, abs=1e-5)


def test_images_do_not_influence_each_other():
    net = build("dncnn")
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    options = {"iterations": 64, "tolerance": 1e-9}
    both = estimate_lipschitz(net, images, **options).denoiser
    alone = [estimate_lipschitz(net, images[b : b + 1], **options).denoiser for b in range(2)]
    torch.testing.assert_close(both, torch.cat(alone))
    assert float(both[0]) != pytest.approx(float(both[1]))


def test_the_estimate_is_that_of_the_frozen_map_and_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Dropout(0.5))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    images = torch.randn(2, 1, 6, 6)
    estimate = estimate_lipschitz(net, images, iterations=36, tolerance=0.0)
    assert all(m.training for m in net.modules())
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    exact = spectral(dense(net.eval(), images[0]))
    assert float(estimate.denoiser[0]) == pytest.approx(exact, rel=1e-4)


def test_the_generator_makes_it_repeatable():
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    first, second = (
        estimate_lipschitz(
            build_once, image, iterations=3, generator=torch.Generator().manual_seed(1)
        ).denoiser
        for build_once in [build("dncnn")] * 2
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "denoiser, message, nonexpansive",
    [
        (lambda x: 0.5 * x, r"Nonexpansive here: .* by a factor of 1 - step_size \* tau \* 0.5", True),
        (lambda x: x, "Nonexpansive here: .* need not contract in directions that neither", True),
        (lambda x: -1.5 * x, "Expansive here, but x - D.x. is strongly monotone: .* m = 2.5, r = 2.5", False),
        (lambda x: 1.5 * x, "Expansive here, and x - D.x. is not monotone: .* Lower tau", False),
    ],
)
def test_the_message_says_what_it_means(denoiser, message, nonexpansive):
    estimate = estimate_lipschitz(denoiser, torch.zeros(1, 1, 8, 8))
    assert re.search(message, str(estimate))
    assert bool(estimate.nonexpansive) is nonexpansive


@pytest.mark.parametrize(
    "denoiser, images, options, error, message",
    [
        (lambda x: x, torch.zeros(1, 8, 8), {}, ValueError, r"shape \(B, C, H, W\), none 0, got \(1, 8, 8\)"),
        (
            lambda x: x,
            torch.zeros(1, 1, 8, 8).long(),
            {},
            TypeError,
            "real floating-point tensor, got torch.int64",
        ),
        (lambda x: x, [1.0], {}, TypeError, "got list"),
        (
            lambda x: x,
            torch.zeros(1, 1, 8, 8),
            {"iterations": 0},
            ValueError,
            "iterations must be at least 1",
        ),
        (
            lambda x: x.detach(),
            torch.zeros(1, 1, 8, 8),
            {},
            ValueError,
            "must be differentiable, but its output",
        ),
        (lambda x: x[..., 1:], torch.zeros(1, 1, 8, 8), {}, ValueError, "must return the shape it got"),
        (
            lambda x: x.sqrt(),
            torch.zeros(1, 1, 8, 8),
            {},
            ValueError,
            "derivative of the map is not finite at image 0",
        ),
    ],
)
def test_what_cannot_be_estimated_is_named(denoiser, images, options, error, message):
    with pytest.raises(error, match=message):
        estimate_lipschitz(denoiser, images, **options)


# ------------------------------------------------------------------ bounds


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bound_is_above_the_estimate(name):
    net = build(name).eval()
    bound = bound_lipschitz(net)
    for scale in (0.1, 1.0, 10.0):
        images = scale * torch.randn(2, 1, 8, 8, dtype=torch.float64)
        estimate = estimate_lipschitz(net, images, iterations=64, tolerance=1e-6)
        assert float(estimate.denoiser.max()) <= bound
    assert math.isfinite(bound)


def matrix_of(layer, shape):
    """A linear layer without its bias as a dense matrix."""
    size = math.prod(shape)
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return (layer(eye) - layer(torch.zeros_like(eye))).reshape(size, -1)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 2, "bias": False},
        {"kernel_size": (1, 5), "padding": (0, 2)},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 5, "stride": (2, 3), "padding": 2, "dilation": 2},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 1},
    ],
)
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_are_bounded(cls, options):
    if cls is nn.ConvTranspose2d and "padding_mode" in options:
        pytest.skip("transposed convolutions know no other padding")
    layer = cls(4, 2, **options).double()
    exact = spectral(matrix_of(layer, (4, 9, 12)))
    bound = bound_lipschitz(layer)
    assert exact <= bound
    # Tight at a stride of 1 up to the border of the image and the grid of frequencies; else never off by much.
    assert bound <= (1.2 if "stride" not in options else 2.5) * exact


def test_a_dilation_that_meets_the_stride_puts_a_pixel_in_more_patches():
    layer = nn.Conv2d(1, 1, (1, 4), stride=(1, 2), dilation=(1, 2), bias=False).double()
    nn.init.ones_(layer.weight)
    exact = spectral(matrix_of(layer, (1, 1, 60)))
    assert exact <= bound_lipschitz(layer) <= 1.05 * exact


def test_unet_adds_the_squares_of_what_it_concatenates():
    unet = UNet((4, 4, 4), predicts="image")
    for name, _ in list(unet.named_children()):
        setattr(unet, name, nn.Identity())
    assert bound_lipschitz(unet) == pytest.approx(math.sqrt(3))


def test_convolution_of_patches_that_do_not_overlap_is_exact():
    for layer in (nn.Conv2d(3, 5, 2, stride=2), nn.ConvTranspose2d(3, 5, 2, stride=2), nn.Conv2d(3, 5, 1)):
        layer = layer.double()
        exact = spectral(matrix_of(layer, (3, 4, 6)))
        assert bound_lipschitz(layer) == pytest.approx(exact, rel=1e-9)


def test_the_symbol_is_bounded_between_the_frequencies():
    # Real kernels with their highest frequency anywhere, most of them between two of the grid.
    phases = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)
    for _ in range(20):
        kernel = torch.randn(1, 1, 1, 7, dtype=torch.float64)
        wave = torch.exp(1j * torch.arange(7)[:, None] * phases)
        highest = float((kernel[0, 0].to(wave.dtype) @ wave).abs().max())
        assert highest <= conv_norm(kernel) <= 1.2 * highest


def test_wide_convolutions_are_bounded_by_their_patches():
    weight = torch.randn(130, 130, 3, 3, dtype=torch.float64)
    assert conv_norm(weight) == pytest.approx(3 * spectral(weight.flatten(1)), rel=1e-8)


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.PReLU(init=-2.0), (1, 4, 4), 2.0),
        (nn.LeakyReLU(0.3), (1, 4, 4), 1.0),
        (nn.ELU(alpha=3.0), (1, 4, 4), 3.0),
        (nn.Sigmoid(), (1, 4, 4), 0.25),
        (nn.MaxPool2d(2), (1, 4, 4), 1.0),
        (nn.MaxPool2d(3, stride=1), (1, 5, 5), 3.0),
        (nn.GroupNorm(1, 2, eps=0.25), (2, 3, 3), 2.0),
        (nn.LayerNorm(3, eps=0.25), (2, 3, 3), 2.0),
        (nn.InstanceNorm2d(2, eps=0.25), (2, 3, 3), 2.0),
    ],
)
def test_other_layers_are_bounded(layer, shape, expected):
    layer = layer.double()
    assert bound_lipschitz(layer) == pytest.approx(expected)
    for scale in (0.0, 0.1, 1.0):
        x = scale * torch.randn(1, *shape, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())
        assert spectral(jacobian) <= expected * (1 + 1e-9)


def test_the_constant_of_a_normalization_is_taken():
    # At an image without contrast, where it multiplies all differences by the inverse root of epsilon.
    layer = nn.GroupNorm(1, 2, eps=1e-5).double()
    jacobian = torch.autograd.functional.jacobian(layer, torch.zeros(1, 2, 3, 3, dtype=torch.float64))
    assert spectral(jacobian.reshape(18, 18)) == pytest.approx(bound_lipschitz(layer), rel=1e-6)


def test_batch_norm_is_bounded_by_its_running_statistics():
    layer = nn.BatchNorm2d(2).double()
    layer.running_var.copy_(torch.tensor([4.0, 0.25]))
    assert bound_lipschitz(layer) == pytest.approx(2.0, rel=1e-4)
    assert layer.training


def test_legacy_spectral_norm_is_seen():
    layer = legacy_spectral_norm(nn.Conv2d(2, 2, 1)).eval()
    with torch.no_grad():
        layer.weight_orig *= 100
    assert bound_lipschitz(layer) < 10
    with torch.no_grad():
        layer(torch.zeros(1, 2, 3, 3))
    assert bound_lipschitz(layer) == pytest.approx(spectral(layer.weight.flatten(1)), rel=1e-6)


@pytest.mark.parametrize("predicts", ["image", "residual"])
def test_the_bound_of_slices_counts_neighbours_and_background(predicts):
    net = lengthen(SliceDnCNN((1, 2), 3, neighbours=1, predicts=predicts), 1.5).double()
    image = torch.randn(1, 6, 3, 3, dtype=torch.float64)
    assert spectral(dense(net, image[0])) <= bound_lipschitz(net)


def test_residual_predictions_add_the_identity():
    net = DnCNN(2, 4)
    image = DnCNN(2, 4, predicts="image")
    image.load_state_dict(net.state_dict())
    assert bound_lipschitz(net) == pytest.approx(1 + bound_lipschitz(image))


def test_spectral_norms_of_kernels_are_no_certificate():
    conv = parametrizations.spectral_norm(nn.Conv2d(1, 1, 3, padding=1, bias=False), n_power_iterations=50)
    with torch.no_grad():
        conv.parametrizations.weight.original.fill_(1.0)
    conv(torch.zeros(1, 1, 9, 9))
    assert bound_lipschitz(conv) == pytest.approx(3.0, rel=0.05)


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "module, message",
    [
        (
            nn.Sequential(nn.ReLU(), nn.Sequential(nn.Bilinear(2, 2, 2))),
            r"no bound is known for Bilinear \(1.0\)",
        ),
        (Twice(1, 1, 3), "no bound is known for Twice: give it a method lipschitz_bound"),
        (
            nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
            "Conv2d: no bound is known for padding mode 'reflect'",
        ),
        (nn.BatchNorm2d(1, track_running_stats=False), "BatchNorm2d: it keeps no running statistics"),
    ],
)
def test_what_cannot_be_bounded_is_named(module, message):
    with pytest.raises(ValueError, match=message):
        bound_lipschitz(module)


# ------------------------------------------------------------------ the whole map


def dense_map(model, ct, x):
    """Derivative of T at an image, from dense matrices."""
    size = x.numel()
    eye = torch.eye(size, dtype=x.dtype)
    normal = ct.adjoint(ct(eye.reshape(size, *x.shape[1:]))).reshape(size, size)
    denoiser = dense(model.denoiser, x)
    weight = model.tau * ct.norm_squared()
    free = (x.flatten() > 0) if model.nonnegative else torch.ones(size, dtype=torch.bool)
    if isinstance(model.step, ProximalStep):
        derivative = torch.zeros_like(eye)
        inner = normal[free][:, free] + weight * eye[free][:, free]
        derivative[free] = torch.linalg.solve(inner, weight * denoiser[free])
        return derivative
    step_size = 1 / (1 + 2 * model.tau) / ct.norm_squared()
    return (eye - step_size * (normal + weight * (eye - denoiser))) * free[:, None]


@pytest.mark.parametrize("nonnegative", [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.parametrize("step", [ProximalStep(), GradientStep(), GradientStep(None, 3)])
def test_diagnosis_is_that_of_the_dense_derivative(nonnegative, step):
    ct = ParallelBeamCT(6, 5)
    net = lengthen(DnCNN(3, 4), 0.8).double()
    model = DEQRED(net, tau=0.1, step=step, nonnegative=nonnegative, normalize=False)
    y = ct(torch.rand(1, 6, 6, dtype=torch.float64) - 0.2)
    x = torch.randn(1, 6, 6, dtype=torch.float64)
    found = diagnose(model, y, ct, x, iterations=36, tolerance=1e-9)
    start = x.clamp(min=0) if nonnegative else x
    exact = spectral(dense(net, start))
    assert float(found.denoiser.denoiser) == pytest.approx(exact, rel=1e-8)
    assert found.norm_squared == pytest.approx(ct.norm_squared())
    assert found.errors.max() < 1e-6
    assert found.direction.shape == x.shape
    if getattr(step, "minibatch_size", None) is None:
        jacobian = dense_map(model, ct, start)
        assert float(found.norm) == pytest.approx(spectral(jacobian), rel=1e-6)
        assert float(found.contraction) == pytest.approx(
            float(torch.linalg.eigvals(jacobian).abs().max()), rel=1e-6
        )
        assert found.step_size == (None if isinstance(step, ProximalStep) else pytest.approx(1 / 1.2))


@pytest.mark.parametrize("step", [ProximalStep(), pytest.param(GradientStep(), marks=pytest.mark.exhaustive)])
def test_the_predicted_contraction_is_the_one_seen(step):
    ct = ParallelBeamCT(6, 5)
    model = DEQRED(lambda x: 0.5 * x, tau=0.1, step=step, solver=Picard(3000, 1e-9))
    y = ct(torch.rand(2, 6, 6, dtype=torch.float64))
    solution = model(y, ct, return_solution=True)
    found = diagnose(model, y, ct, iterations=36, tolerance=1e-6)
    torch.testing.assert_close(found.contraction, solution.contraction, rtol=0, atol=0.02)
    assert bool(found.converges.all())
    assert bool(found.unique.all())
    # The first iterations, which shrink much faster, are not in the prediction.
    assert bool((solution.iterations <= found.denoiser_calls + 3).all())
    assert bool((solution.iterations >= 0.5 * found.denoiser_calls).all())


class Twofold:
    """A physics without a norm: complex images, measured twice as large."""

    def A(self, x):
        return 2 * x

    def A_adjoint(self, y):
        return 2 * y


def test_complex_images_and_operators_without_a_norm():
    y, physics = torch.randn(1, 6, 6, dtype=torch.complex128), Twofold()
    for step, contraction in ((ProximalStep(), 0.25 / 1.25 * 0.25), (GradientStep(0.4), 1 - 0.4 * 1.1875)):
        found = diagnose(DEQRED(lambda x: 0.25 * x, tau=0.25, step=step), y, physics)
        assert found.norm_squared == pytest.approx(4.0)
        assert float(found.contraction) == pytest.approx(contraction)
        assert float(found.norm) == pytest.approx(contraction)
        assert found.direction.dtype == y.dtype


class Measured(Twofold):
    """Of the left half alone."""

    def A(self, x):
        return x * (torch.arange(x.shape[-1]) < x.shape[-1] // 2)

    A_adjoint = A


@pytest.mark.parametrize(
    ("denoiser", "step", "message", "converges"),
    [
        (
            lambda x: 0.5 * x,
            ProximalStep(),
            r"the proximal form.*at the solution .*T contracts there: Picard\(\) takes about \d+ calls of the denoiser",
            True,
        ),
        (
            lambda x: 3 * x * (1 + x.abs()),
            ProximalStep(),
            "at the start, for the solve diverges .*x - D.x. is not monotone there, .* lower tau",
            False,
        ),
        (
            lambda x: -6 * x,
            ProximalStep(),
            r"T expands there: .* gradient steps that are short enough",
            False,
        ),
        (lambda x: 0 * x, GradientStep(9.0), r"\(27 of 1 / .*Leave step_size to its default first", False),
        (lambda x: -1.1 * x, GradientStep(), "T contracts there: .* But D expands there", True),
    ],
)
def test_the_diagnosis_says_what_to_change(denoiser, step, message, converges):
    model = DEQRED(denoiser, tau=1.0, step=step, solver=Picard(300, 1e-5), on_failure="ignore")
    generator = torch.Generator().manual_seed(0)
    found = diagnose(model, torch.ones(1, 6, 6), Measured(), generator=generator)
    assert re.search(message, str(found).replace("\n", " ")), str(found)
    assert bool(found.converges.all()) is converges
    assert bool(found.denoiser_calls.isfinite().all()) is converges


class WithoutMeans(Twofold):
    """Blind to the mean of each slice, as diffraction tomography is."""

    def A(self, x):
        return x - x.mean((-2, -1), keepdim=True)

    A_adjoint = A


@pytest.mark.parametrize("step", [ProximalStep(), GradientStep()])
def test_a_fixed_point_that_is_not_unique_is_found_and_named(step):
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    operator = WithoutMeans()
    model = DEQRED(TotalVariation(0.05), tau=0.05, step=step, on_failure="ignore")
    found = diagnose(model, operator.A(x), operator)
    assert not found.unique.any()
    assert "The mean of its 3 slices or channels is determined by neither the data nor D" in str(found)
    assert "Give x0 with the one you want" in str(found)
    means = found.direction.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(found.direction, means.expand_as(x), rtol=0, atol=0.02)
    # A denoiser that pulls settles it.
    pulling = DEQRED(lambda v: 0.95 * v, tau=0.05, step=step, on_failure="ignore")
    assert diagnose(pulling, operator.A(x), operator).unique.all()


def test_what_cannot_be_diagnosed_is_named():
    with pytest.raises(TypeError, match="diagnose: model must be a DEQRED, got ReLU"):
        diagnose(nn.ReLU(), torch.zeros(1, 4, 4), Measured())
    model = DEQRED(lambda x: 0.5 * x.detach(), tau=1.0)
    with pytest.raises(ValueError, match="the denoiser must be differentiable"):
        diagnose(model, torch.ones(1, 4, 4), Measured())
