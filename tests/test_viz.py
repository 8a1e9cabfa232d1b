"""Figures: one window, one scale of errors, and what is drawn of complex images, volumes and data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oder_fast import DEQRED, CartesianMRI, DiffractionTomography, ParallelBeamCT, viz
from oder_fast.data import birdcage_maps, led_ring, shepp_logan


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def drawn(axes):
    return np.asarray(axes.images[0].get_array())


def test_images_have_the_window_of_the_truth_and_errors_one_scale(g):
    truth = torch.rand(20, 24, generator=g)
    images = {"near": truth + 0.1, "far": truth + 10 * torch.rand(20, 24, generator=g)}
    figure = viz.compare(images, truth)
    axes = np.array(figure.axes).reshape(2, 3)
    windows = {axis.images[0].get_clim() for axis in axes[0]}
    assert windows == {viz.window_of(truth)}
    assert float(truth.min()) <= viz.window_of(truth)[0] < viz.window_of(truth)[1] <= float(truth.max())
    # The first image ends the scale, and another does not change it.
    assert [axis.images[0].get_clim() for axis in axes[1, 1:]] == [(0, pytest.approx(0.1, rel=1e-5))] * 2
    np.testing.assert_allclose(drawn(axes[1, 2]), (images["far"] - truth).abs().numpy(), rtol=1e-6)
    assert [axis.get_title() for axis in axes[0]] == ["truth", "near", "far"]


def test_without_a_truth_the_first_image_gives_the_window(g):
    image = torch.rand(8, 8, generator=g)
    figure = viz.compare({"a": image, "b": 5 * image})
    assert [axis.images[0].get_clim() for axis in figure.axes[1:]] == [viz.window_of(image)] * 2
    figure = viz.compare({"a": image}, window=(0.2, 0.4))
    assert figure.axes[1].images[0].get_clim() == (0.2, 0.4)


def test_a_uniform_image_has_a_window():
    low, high = viz.window_of(torch.ones(4, 4))
    assert low < high
    assert viz.largest_of(torch.zeros(4, 4)) == 1.0


def test_residuals_are_those_of_the_operator(g):
    x, ct = shepp_logan(24), ParallelBeamCT(24, 10)
    y = ct(x[None])
    figure = viz.compare({"half": 0.5 * x, "whole": x[None]}, x, y=y, operator=ct)
    axes = np.array(figure.axes).reshape(3, 3)
    np.testing.assert_allclose(drawn(axes[2, 0]), y[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(drawn(axes[2, 1]), 0.5 * y[0].numpy(), rtol=1e-4, atol=1e-4)
    assert drawn(axes[2, 2]).max() < 1e-4 * drawn(axes[2, 0]).max()


def test_complex_images_and_volumes_and_their_data(g):
    x = torch.randn(16, 12, dtype=torch.complex64, generator=g)
    mri = CartesianMRI(birdcage_maps(3, (16, 12)), torch.arange(12) % 2 == 0)
    y = mri(x[None])
    figure = viz.compare({"zero-filled": mri.adjoint(y)}, x, y=y, operator=mri)
    axes = np.array(figure.axes).reshape(3, 2)
    np.testing.assert_allclose(drawn(axes[0, 0]), x.abs().numpy(), rtol=1e-6)
    assert axes[2, 0].get_title() == "data (log)"
    assert np.isfinite(drawn(axes[2, 0])).all()
    optics = {"pixel_size": 0.4, "wavelength": 0.6, "numerical_aperture": 0.4, "medium_index": 1.33}
    idt = DiffractionTomography(16, [-2.0, 0.0, 2.0], led_ring(4, 0.3), **optics)
    volume = torch.randn(3, 16, 16, dtype=torch.complex64, generator=g)
    figure = viz.compare({"volume": volume}, volume[None], y=idt(volume[None]), operator=idt)
    np.testing.assert_allclose(drawn(figure.axes[1]), volume[1].abs().numpy(), rtol=1e-6)
    assert drawn(figure.axes[5]).shape == (16, 16)


def test_arrays_of_numpy_are_drawn():
    image = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    figure = viz.compare({"image": image}, image)
    assert len(figure.axes) == 4


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (({},), {}, "images must hold at least one"),
        ((torch.ones(1, 4, 4),), {}, 'at least one by its name, as {"RED": x}, got Tensor'),
        (({"a": torch.ones(3, 4, 4)}, torch.ones(1, 4, 4)), {}, "must have one shape"),
        (({"a": torch.ones(4, 4)}, torch.ones(4, 5)), {}, r"must have one shape, got .*\(4, 5\)"),
        (({"a": torch.ones(4, 4)},), {"y": torch.ones(1, 2, 3)}, "y and operator go together"),
        (({"a": torch.ones(4)},), {}, r"at least two dimensions, got shape \(4,\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        viz.compare(*arguments, **options)


@pytest.mark.parametrize(
    ("images", "operator", "message"),
    [
        ({"a": "b"}, None, "a must be an image, got str"),
        ({"a": torch.ones(4, 4)}, 3, "operator must be a MeasurementOperator, or have A"),
    ],
)
def test_arguments_of_another_kind_are_refused(images, operator, message):
    y = None if operator is None else torch.ones(1, 2, 7)
    with pytest.raises(TypeError, match=message):
        viz.compare(images, y=y, operator=operator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool])
def test_images_of_every_kind_of_number_are_drawn(dtype):
    image = shepp_logan(8).to(dtype)
    axes = viz.compare({"a": image.requires_grad_(dtype.is_floating_point)}).axes[1]
    np.testing.assert_array_equal(drawn(axes), image.detach().double().numpy())


def test_operators_of_others_leave_residuals_too():
    class Physics:
        def A(self, x):
            return 2 * x

        def A_adjoint(self, y):
            return 2 * y

    x = shepp_logan(8)[None, None]
    figure = viz.compare({"x": x}, x, y=2 * x, operator=Physics())
    assert drawn(figure.axes[5]).max() == 0


def test_a_solution_draws_its_residuals():
    ct = ParallelBeamCT(16, 12)
    y = ct(torch.stack([shepp_logan(16), 3 * shepp_logan(16)]))
    model = DEQRED(lambda x: 0.5 * x, tau=0.1)
    solution = model(y, ct, return_solution=True)
    axes = solution.plot()
    assert len(axes.lines) == 2
    assert axes.get_title().startswith(f"{solution.denoiser_calls} calls of the denoiser")
    assert axes.lines[1].get_label().startswith("image 1: converged")
    np.testing.assert_allclose(axes.lines[0].get_ydata()[0], float(solution.residuals[0, 0]))
    assert solution.plot(axes) is axes
