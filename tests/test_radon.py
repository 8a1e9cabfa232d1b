"""The Radon transform by itself: second opinions, physics, messages, memory."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import ELLIPSES, angles_over, ellipse_image, ellipse_sinogram, relative_error

import oder_fast
from oder_fast.ops import Detector


def dense_joseph(height, width, angles, n_bins, spacing, offset):
    """Build the matrix with NumPy from the definition alone, one ray and one line at a time."""
    matrix = np.zeros((len(angles), n_bins, height, width))
    for v, theta in enumerate(angles):
        c, s = np.cos(theta), np.sin(theta)
        for d in range(n_bins):
            t = (d - (n_bins - 1) / 2) * spacing + offset
            if abs(c) >= abs(s):
                for i in range(height):
                    y = (height - 1) / 2 - i
                    u = (t - y * s) / c + (width - 1) / 2
                    for j in range(width):
                        matrix[v, d, i, j] += max(0.0, 1 - abs(u - j)) / abs(c)
            else:
                for j in range(width):
                    x = j - (width - 1) / 2
                    u = (height - 1) / 2 - (t - x * c) / s
                    for i in range(height):
                        matrix[v, d, i, j] += max(0.0, 1 - abs(u - i)) / abs(s)
    return torch.from_numpy(matrix.reshape(len(angles) * n_bins, height * width))


@pytest.mark.parametrize(
    ("size", "n_bins", "spacing", "offset"),
    [
        ((7, 9), 13, 1.0, 0.0),
        ((6, 5), 8, 0.6, 0.4),
        ((5, 8), 4, 2.3, -1.0),
        # Bins much coarser and finer than pixels, beyond the range of 64-bit integers and to the end of float64's.
        ((6, 7), 5, 40.0, 1.5),
        ((7, 6), 5, 5000.0, -0.3),
        ((5, 6), 3, 1e20, 0.4),
        ((6, 5), 9, 1e-5, 0.3),
        ((7, 4), 9, 1e-310, 0.3),
    ],
)
def test_equals_a_dense_matrix(size, n_bins, spacing, offset, build, generator):
    angles = torch.tensor([0.0, 0.2, 0.9, 1.4, math.pi / 2, 2.0, 2.8, 4.0, -1.1], dtype=torch.float64)
    matrix = dense_joseph(*size, angles.numpy(), n_bins, spacing, offset)
    image = torch.randn(1, *size, generator=generator)
    sinogram = torch.randn(1, len(angles), n_bins, generator=generator)
    detector, on = Detector(n_bins, spacing, offset), {"device": build.device}
    forward = oder_fast.ops.radon_forward(
        image.to(**on), angles.to(**on), detector, backend=build.backend
    ).cpu()
    assert relative_error(forward.flatten(), matrix @ image.double().flatten()) < 2e-6
    adjoint = oder_fast.ops.radon_adjoint(
        sinogram.to(**on), angles.to(**on), detector, size, backend=build.backend
    ).cpu()
    assert relative_error(adjoint.flatten(), matrix.T @ sinogram.double().flatten()) < 2e-6


def test_ellipses_have_their_analytic_radon_transform(build):
    n, n_bins = 256, 367
    angles = angles_over(60, start=0.02)
    image = ellipse_image(ELLIPSES, n)[None].to(build.device, torch.float32)
    got = oder_fast.ops.radon_forward(
        image, angles.to(build.device), Detector(n_bins), backend=build.backend
    )[0]
    exact = ellipse_sinogram(ELLIPSES, angles, torch.arange(n_bins) - (n_bins - 1) / 2)
    assert relative_error(got.cpu(), exact) < 4e-3


def test_pixel_size_is_a_unit_of_length(build, generator):
    image = torch.rand(1, 20, 20, generator=generator).to(build.device)
    angles = angles_over(6).to(build.device)
    one = oder_fast.ops.radon_forward(image, angles, Detector(31, offset=0.5), backend=build.backend)
    scaled = oder_fast.ops.radon_forward(
        image, angles, Detector(31, spacing=0.25, offset=0.125, pixel_size=0.25), backend=build.backend
    )
    assert relative_error(scaled, 0.25 * one) < 1e-6


def test_views_equal_the_rows_of_the_scan(build, generator):
    image = torch.rand(2, 15, 15, generator=generator).to(build.device)
    angles = angles_over(9).to(build.device)
    whole = oder_fast.ops.radon_forward(image, angles, Detector(21), backend=build.backend)
    for v in range(9):
        alone = oder_fast.ops.radon_forward(image, angles[v : v + 1], Detector(21), backend=build.backend)
        assert torch.equal(alone[:, 0], whole[:, v])


def test_minibatches_average_to_the_full_gradient(build, generator):
    image = torch.rand(1, 16, 16, generator=generator).to(build.device)
    angles = angles_over(12).to(build.device)
    data = torch.rand(1, 12, 23, generator=generator).to(build.device)
    full = oder_fast.ops.radon_gradient(image, data, angles, Detector(data.shape[2]), backend=build.backend)
    parts = [
        oder_fast.ops.radon_gradient(
            image, data, angles, Detector(data.shape[2]), views, backend=build.backend
        )
        for views in torch.randperm(12, generator=generator).to(build.device).split(3)
    ]
    assert relative_error(sum(parts) / len(parts), full) < 1e-6


def test_a_view_drawn_twice_counts_twice(build, generator):
    image = torch.rand(1, 10, 10, generator=generator).to(build.device)
    angles = angles_over(4).to(build.device)
    once = oder_fast.ops.radon_gradient(image, None, angles, Detector(15), torch.tensor([2]).to(build.device))
    twice = oder_fast.ops.radon_gradient(
        image, None, angles, Detector(15), torch.tensor([2, 2]).to(build.device)
    )
    assert relative_error(twice, once) < 1e-6


def test_concurrent_calls_do_not_disturb_each_other(generator):
    image = torch.rand(1, 100, 100, generator=generator)
    angles = angles_over(40)
    expected = oder_fast.ops.radon_gradient(image, None, angles, Detector(143))
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(oder_fast.ops.radon_gradient(image, None, angles, Detector(143)), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells the size of this process on Linux")
def test_a_detector_far_aside_takes_no_memory():
    import resource

    sinogram, angles = torch.ones(1, 100, 90), torch.linspace(0, 3, 100)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, before[1]))
    try:
        image = oder_fast.ops.radon_adjoint(
            sinogram, angles, Detector(sinogram.shape[2], offset=4e5), (64, 64), backend="cpu"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not image.any()


IMAGE, SINOGRAM, ANGLES = torch.zeros(1, 8, 8), torch.zeros(1, 3, 11), angles_over(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: oder_fast.ops.radon_forward([[1.0]], ANGLES, Detector(5)), TypeError, "radon_forward: image must be a torch.Tensor, got list"),
        (lambda: oder_fast.ops.radon_forward(IMAGE[0], ANGLES, Detector(5)), ValueError, r"image must have 3 dimensions, got shape \(8, 8\)"),
        (lambda: oder_fast.ops.radon_forward(IMAGE.long(), ANGLES, Detector(5)), TypeError, "image must be floating-point, got torch.int64"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES[:0], Detector(5)), ValueError, "at least one view"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES[:, None], Detector(5)), ValueError, "angles must have 1 dimensions"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(0)), ValueError, "n_bins must be at least 1 .* got 0"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(2**70)), ValueError, "n_bins must be .* below 2"),
        (
            lambda: oder_fast.ops.radon_adjoint(torch.zeros(1, len(ANGLES), 5), ANGLES, Detector(5), (8.0, 8)),
            ValueError,
            r"image_shape must be \(height, width\), whole and at least 1, got \(8.0, 8\)",
        ),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5, None)), TypeError, "spacing must be a number, got NoneType"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES.clone().requires_grad_(), Detector(5)), ValueError, "angles is not differentiable; detach it"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5.0)), TypeError, "n_bins must be an int, got float"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5, spacing=0.0)), ValueError, "spacing must be a finite number above 0"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5, offset=math.nan)), ValueError, "offset must be finite"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5, spacing=1e300, pixel_size=1e-300)), ValueError, "spacing must be above 0 and below 1e300 pixels, got inf"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5, spacing=1e-300, pixel_size=1e300)), ValueError, "spacing must be above 0 and below 1e300 pixels, got 0.0"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5, offset=1e308, pixel_size=0.1)), ValueError, "offset must be finite and below 1e300 pixels"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES * math.nan, Detector(5)), ValueError, "angle"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES.to("meta"), Detector(5)), ValueError, "angles must be on cpu, got meta"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5), backend="gpu"), ValueError, "backend must be one of"),
        (lambda: oder_fast.ops.radon_forward(IMAGE, ANGLES, Detector(5), backend="cuda"), oder_fast.ops.BackendUnavailableError, "backend 'cuda' is not available"),
        (lambda: oder_fast.ops.radon_adjoint(SINOGRAM, ANGLES[:2], Detector(11), (8, 8)), ValueError, r"sinogram must have shape \(1, 2, 11\)"),
        (lambda: oder_fast.ops.radon_adjoint(SINOGRAM, ANGLES, Detector(11), (8, 0)), ValueError, "image_shape"),
        (lambda: oder_fast.ops.radon_gradient(IMAGE, SINOGRAM.double(), ANGLES, Detector(11)), TypeError, "sinogram must have the dtype of image"),
        (lambda: oder_fast.ops.radon_gradient(IMAGE, SINOGRAM[:, :2], ANGLES, Detector(11)), ValueError, r"sinogram must have shape \(1, 3, 11\)"),
        (lambda: oder_fast.ops.radon_gradient(IMAGE, None, ANGLES, 11), TypeError, "detector must be an ops.Detector, got int"),
        (lambda: oder_fast.ops.radon_adjoint(SINOGRAM, ANGLES, Detector(12), (8, 8)), ValueError, r"sinogram must have shape \(1, 3, 12\)"),
        (lambda: oder_fast.ops.radon_gradient(IMAGE, SINOGRAM, ANGLES, Detector(11), torch.tensor([0, 3])), ValueError, r"views must lie in 0..2, got 3"),
        (lambda: oder_fast.ops.radon_gradient(IMAGE, SINOGRAM, ANGLES, Detector(11), torch.tensor([-1])), ValueError, r"views must lie in 0..2, got -1"),
        (lambda: oder_fast.ops.radon_gradient(IMAGE, SINOGRAM, ANGLES, Detector(11), torch.tensor([0.0])), TypeError, "views must be int64"),
        (lambda: oder_fast.ops.radon_gradient(IMAGE, SINOGRAM, ANGLES, Detector(11), torch.tensor([], dtype=torch.int64)), ValueError, "views must not be empty"),
    ],
)  # fmt: skip
def test_messages_name_operator_argument_rule_and_what_arrived(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # of torch.func itself
def test_forward_mode_in_what_describes_the_scan_is_refused_rather_than_zero():
    with pytest.raises(RuntimeError, match="radon_forward: angles has no derivative; detach it"):
        torch.func.jvp(lambda a: oder_fast.ops.radon_forward(IMAGE, a, Detector(11)), (ANGLES,), (ANGLES,))


def test_a_detector_of_narrow_numbers_is_not_computed_with_in_their_precision():
    image = torch.rand(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers = [np.float16(v) for v in (0.7, -0.3, 1.3)]
    for backend in ("reference", "cpu"):
        got, expected = (
            oder_fast.ops.radon_forward(image, ANGLES, Detector(9, *lengths), backend=backend)
            for lengths in (numbers, map(float, numbers))
        )
        assert torch.equal(got, expected)
