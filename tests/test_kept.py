"""What outlives a call is made so that later calls can be differentiated, whatever the mode of the first."""

import itertools

import pytest
import torch

from oder_fast import (
    CartesianMRI,
    DiffractionTomography,
    ParallelBeamCT,
    TotalVariation,
    diagnose,
    estimate_lipschitz,
)
from oder_fast._torch import kept
from oder_fast.data import led_ring
from oder_fast.denoisers import DnCNN, UNet
from oder_fast.deqred import DEQRED
from oder_fast.fixed_point import Implicit, Picard, Unrolled
from oder_fast.ops import fourier
from oder_fast.red import GradientStep

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning"),
]

SIZE = 16


def ct():
    return ParallelBeamCT(SIZE, torch.arange(12) * (torch.pi / 12)), torch.rand(1, SIZE, SIZE)


def mri(mask=(SIZE,), per_image=False):
    keep = torch.rand(mask) < 0.7
    keep[..., : SIZE // 2] = True
    maps = torch.randn(*[1] * per_image, 2, SIZE, SIZE, dtype=torch.complex64)
    return CartesianMRI(maps, keep), torch.randn(1, SIZE, SIZE, dtype=torch.complex64)


def idt(**options):
    optics = {"pixel_size": 0.4, "wavelength": 0.6, "numerical_aperture": 0.4, "medium_index": 1.33}
    depths = torch.tensor([-2.0, 0.0, 2.0])
    operator = DiffractionTomography((SIZE, SIZE), depths, led_ring(8, 0.3), **optics, **options)
    return operator, 0.01 * torch.randn(1, 3, SIZE, SIZE, dtype=torch.complex64)


def own_transfer_functions():
    return idt(transfer_functions=torch.randn(8, 3, SIZE, SIZE, dtype=torch.complex64))


SCANS = {
    "ct": ct,
    "mri, lines": mri,
    "mri, columns of lines": lambda: mri((SIZE, 1)),
    "mri, points": lambda: mri((SIZE, SIZE), per_image=True),
    "idt": lambda: idt(gram=False),
    "idt, Gram matrices": lambda: idt(gram=True),
    "idt, own transfer functions": own_transfer_functions,
}


def model_of(image, differentiation):
    torch.manual_seed(1)
    channels = image[0].numel() // SIZE**2 * (1 + image.is_complex())
    denoiser = DnCNN(depth=2, width=4, in_channels=channels)
    return DEQRED(
        denoiser,
        tau=1.0,
        solver=Picard(3, 1e-12),
        differentiation=differentiation,
        on_failure="ignore",
    )


def gradients(model, y, operator, x0=None):
    y = y.clone().requires_grad_()
    model(y, operator, x0).abs().sum().backward()
    return [y.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("before", [False, True], ids=["the call alone", "what comes before it too"])
@pytest.mark.parametrize(
    "differentiation", [Implicit(Picard(3, 1e-12)), pytest.param(Unrolled(), marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("scan", SCANS)
def test_gradients_after_a_first_call_in_inference_mode(scan, differentiation, before):
    def make(inference):
        torch.manual_seed(0)
        fourier._ROOTS.clear()
        with torch.inference_mode(inference and before):
            operator, image = SCANS[scan]()
            y = operator(image)
            y = y + 0.01 * y.abs().mean() * (y != 0)
        return operator, image, y

    operator, image, y = make(False)
    expected = gradients(model_of(image, differentiation), y, operator)
    operator, image, y = make(True)
    model = model_of(image, differentiation)
    with torch.inference_mode():
        if before:
            operator.to(torch.float64).to(torch.float32)
        x0 = model(y, operator)
        if hasattr(operator, "fbp"):
            operator.fbp(y)
    assert x0.is_inference()
    torch.testing.assert_close(gradients(model, y, operator), expected)
    # A start and data from a validation loop.
    for own, differentiated in itertools.product((y, y.clone()), (True, False)):
        model.requires_grad_(differentiated)
        x = model(own, operator, x0)
        assert x.requires_grad == differentiated
    assert all(not buffer.is_inference() for buffer in operator.buffers())


@pytest.mark.parametrize("make", [lambda v: DEQRED(lambda x: x, tau=v, step=GradientStep(v)), TotalVariation])
def test_settings_made_in_inference_mode(make):
    with torch.inference_mode():
        module = make(torch.tensor(0.01))
    assert len(list(module.buffers())) > 0
    assert not any(buffer.is_inference() for buffer in module.buffers())


def test_filtered_back_projection_after_one_in_inference_mode():
    operator, image = ct()
    y = operator(image)
    with torch.inference_mode():
        expected = operator.fbp(y)
    leaf = y.clone().requires_grad_()
    found = operator.fbp(leaf)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert leaf.grad.abs().max() > 0


def test_a_spectral_norm_settles_in_inference_mode():
    torch.manual_seed(0)
    operator, image = ct()
    y = operator(image)
    model = DEQRED(UNet(channels=(4, 8)), tau=1.0, solver=Picard(3, 1e-12), on_failure="ignore")
    with torch.inference_mode():
        model(y, operator)
    model(y, operator).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(buffer.is_inference() for buffer in model.buffers())


def test_derivatives_are_examined_in_inference_mode_too():
    operator, image = ct()
    y = operator(image)
    model = model_of(image, Implicit())
    seed = lambda: {"generator": torch.Generator().manual_seed(0), "iterations": 3}  # noqa: E731
    expected = diagnose(model, y, operator, image, **seed())
    estimate = estimate_lipschitz(model.denoiser, image[None], **seed())
    with torch.inference_mode():
        found = diagnose(model, y.clone(), operator, image.clone(), **seed())
        assert torch.equal(found.norm, expected.norm)
        found = estimate_lipschitz(model.denoiser, image[None].clone(), **seed())
        assert torch.equal(found.denoiser, estimate.denoiser)


def test_what_is_kept_is_the_tensor_itself_elsewhere():
    tensor = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert kept(tensor) is tensor
    with torch.inference_mode():
        assert kept(tensor) is tensor
