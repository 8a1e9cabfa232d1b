"""Coil-weighted Fourier sampling against second opinions: SciPy, dense matrices, plain transforms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from cases import TOLERANCE, relative_error

import oder_fast


def draw(*size, generator, dtype=torch.complex64):
    return torch.randn(*size, dtype=torch.complex128, generator=generator).to(dtype)


def all_lines(n):
    return torch.arange(n)[None]


@pytest.mark.parametrize("axis", [-2, -1])
def test_every_length_equals_scipy(axis, build, generator):
    """One map of ones and all lines: the bare transform, of every length from 1 to 400."""
    if build.device != "cpu":
        pytest.skip("the lengths are those of the C++ backend's transform")
    for n in range(1, 401):
        size = (n, 3) if axis == -2 else (3, n)
        for dtype in (torch.complex64, torch.complex128)[: 1 if n % 7 else 2]:
            x = draw(1, *size, generator=generator, dtype=dtype)
            ones = torch.ones(1, 1, *size, dtype=dtype)
            got = oder_fast.ops.fourier_forward(x, ones, all_lines(n), axis=axis, backend=build.backend)
            expected = scipy.fft.fft(x[0].to(torch.complex128).numpy(), axis=axis, norm="ortho")
            expected = torch.from_numpy(np.moveaxis(expected, axis, -2).copy())
            assert relative_error(got[0, 0], expected) < TOLERANCE[dtype], n
            back = oder_fast.ops.fourier_adjoint(got, ones, all_lines(n), axis=axis, backend=build.backend)
            assert relative_error(back, x) < 2 * TOLERANCE[dtype], n


@pytest.mark.parametrize("n", [1, 17, 368, 509, 768, 1000, 1024, 2039])
def test_long_lengths_and_columns_of_one(n, build, generator):
    x = draw(1, n, 1, generator=generator).to(build.device)
    ones = torch.ones(1, 1, n, 1, dtype=x.dtype, device=build.device)
    lines = all_lines(n).to(build.device)
    got = oder_fast.ops.fourier_forward(x, ones, lines, backend=build.backend)
    assert relative_error(got[0, 0], torch.fft.fft(x[0].to(torch.complex128), dim=0, norm="ortho")) < 2e-6


def test_transforms_keep_the_norm(build, generator):
    """Maps whose powers sum to one, everything sampled: A^H A is the identity."""
    maps = draw(1, 4, 30, 28, generator=generator).to(build.device)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    x = draw(2, 30, 28, generator=generator).to(build.device)
    mask = torch.ones(1, 30, 28, dtype=torch.bool, device=build.device)
    for sampling, axis in ((all_lines(30), -2), (all_lines(28), -1), (mask, -2)):
        sampling = sampling.to(build.device)
        normal = oder_fast.ops.fourier_gradient(x, None, maps, sampling, axis=axis, backend=build.backend)
        assert relative_error(normal, x) < 2e-6
        samples = oder_fast.ops.fourier_forward(x, maps, sampling, axis=axis, backend=build.backend)
        assert abs(float(samples.to(torch.complex128).norm() / x.to(torch.complex128).norm()) - 1) < 1e-6


def dense_dft(n):
    k = np.arange(n)
    return np.exp(-2j * np.pi * np.outer(k, k) / n) / np.sqrt(n)


def test_equals_a_dense_matrix(build, generator):
    height, width, coils = 5, 4, 2
    x = draw(1, height, width, generator=generator)
    maps = draw(1, coils, height, width, generator=generator)
    rows, columns = dense_dft(height), dense_dft(width)
    weighted = maps[0].numpy().astype(complex) * x[0].numpy()
    lines, mask = torch.tensor([[4, 0, 1]]), torch.rand(1, height, width, generator=generator) < 0.5
    expected = {
        (-2, "lines"): np.einsum("kh,chw->ckw", rows, weighted)[:, [4, 0, 1]],
        (-1, "lines"): np.einsum("kw,chw->ckh", columns, weighted)[:, [3, 0, 1]],
        (-2, "mask"): np.einsum("kh,lw,chw->ckl", rows, columns, weighted) * mask.numpy(),
    }
    for (axis, kind), value in expected.items():
        sampling = mask if kind == "mask" else lines.clamp(max=3) if axis == -1 else lines
        args = [v.to(build.device) for v in (x, maps, sampling)]
        got = oder_fast.ops.fourier_forward(*args, axis=axis, backend=build.backend)
        assert relative_error(got[0].cpu(), torch.from_numpy(value)) < 2e-6


def test_padding_lines_mean_nothing(build, generator):
    x, maps = draw(2, 9, 6, generator=generator), draw(1, 2, 9, 6, generator=generator)
    padded = torch.tensor([[3, -1, 7], [-1, 2, -1]])
    y = draw(2, 2, 3, 6, generator=generator)
    x, maps, padded, y = (v.to(build.device) for v in (x, maps, padded, y))
    both = oder_fast.ops.fourier_gradient(x, y, maps, padded, backend=build.backend)
    first = oder_fast.ops.fourier_gradient(
        x[:1], y[:1, :, [0, 2]], maps, padded[:1, [0, 2]], backend=build.backend
    )
    second = oder_fast.ops.fourier_gradient(
        x[1:], y[1:, :, [1]], maps, padded[1:, [1]], backend=build.backend
    )
    assert relative_error(both, torch.cat((first, second))) < 1e-6
    samples = oder_fast.ops.fourier_forward(x, maps, padded, backend=build.backend)
    assert bool((samples[0, :, 1] == 0).all())
    assert bool((samples[1, :, [0, 2]] == 0).all())


@pytest.mark.parametrize("points", [False, True])
def test_minibatches_average_to_the_full_gradient(points, build, generator):
    x, maps = draw(2, 12, 10, generator=generator), draw(1, 6, 12, 10, generator=generator)
    sampling = torch.rand(1, 12, 10, generator=generator) < 0.4 if points else torch.tensor([[1, 5, 6, 11]])
    y = oder_fast.ops.fourier_forward(
        draw(2, 12, 10, generator=generator), maps, sampling, backend="reference"
    )
    x, maps, sampling, y = (v.to(build.device) for v in (x, maps, sampling, y))
    full = oder_fast.ops.fourier_gradient(x, y, maps, sampling, backend=build.backend)
    parts = [
        oder_fast.ops.fourier_gradient(
            x, y, maps, sampling, torch.tensor(c, device=build.device), backend=build.backend
        )
        for c in ([0, 3], [5, 1], [2, 4])
    ]
    assert relative_error(sum(parts) / 3, full) < 1e-6


def test_conjugated_and_real_views_are_taken(generator):
    x, maps = draw(1, 8, 8, generator=generator), draw(1, 2, 8, 8, generator=generator)
    lines = torch.tensor([[0, 3]])
    got = oder_fast.ops.fourier_forward(x.conj(), maps.conj(), lines)
    assert torch.equal(
        got, oder_fast.ops.fourier_forward(x.conj().clone(), maps.conj().resolve_conj(), lines)
    )


def test_nan_stays_in_its_columns_and_images(generator):
    """A NaN reaches what depends on it, and nothing else."""
    x, maps = draw(2, 8, 20, generator=generator), draw(1, 2, 8, 20, generator=generator)
    x[0, 3, 17] = torch.nan
    got = oder_fast.ops.fourier_gradient(x, None, maps, torch.tensor([[1, 2]]))
    bad = got.isnan().any(1)
    assert bad[0].nonzero().flatten().tolist() == [17]
    assert not bad[1].any()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"image": torch.ones(1, 8, 6)},
            TypeError,
            "image must be complex64 or complex128, got torch.float32",
        ),
        (
            {"image": torch.ones(8, 6, dtype=torch.complex64)},
            ValueError,
            "coil_maps must have shape|3 dimensions",
        ),
        (
            {"image": torch.ones(1, 8, 7, dtype=torch.complex64)},
            ValueError,
            r"image must have shape \(1, 8, 6\)",
        ),
        (
            {"coil_maps": torch.ones(2, 8, 6, dtype=torch.complex64)},
            ValueError,
            "coil_maps must have 4 dimensions",
        ),
        ({"coil_maps": torch.ones(3, 2, 8, 6, dtype=torch.complex64)}, ValueError, "1 or 1, C, H, W"),
        ({"coil_maps": torch.ones(1, 2, 8, 6, dtype=torch.complex128)}, TypeError, "dtype of image"),
        (
            {"coil_maps": torch.ones(1, 2, 8, 6, dtype=torch.complex64, requires_grad=True)},
            ValueError,
            "not differentiable",
        ),
        ({"sampling": torch.tensor([[0, 8]])}, ValueError, r"lines must lie in 0\.\.7"),
        ({"sampling": torch.tensor([[-2]])}, ValueError, r"got -2"),
        ({"sampling": torch.tensor([[1, 1]])}, ValueError, "line 1 is given twice"),
        ({"sampling": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "at least 1"),
        ({"sampling": torch.tensor([0, 1])}, TypeError, r"int64 lines \(K, L\)"),
        (
            {"sampling": torch.ones(1, 8, 5, dtype=torch.bool)},
            ValueError,
            r"a mask must have shape \(1 or 1, 8, 6\)",
        ),
        ({"axis": 0}, ValueError, "axis must be -2 or -1"),
        ({"axis": -1.0}, ValueError, "axis must be -2 or -1, got -1.0"),
        (
            {"samples": torch.ones(1, 2, 3, 6, dtype=torch.complex64)},
            ValueError,
            r"samples must have shape \(1, 2, 2, 6\)",
        ),
        (
            {"samples": torch.ones(1, 2, 2, 6, dtype=torch.complex128)},
            TypeError,
            "samples must have the dtype",
        ),
        ({"coils": torch.tensor([2])}, ValueError, r"coils must lie in 0\.\.1, got 2"),
        ({"coils": torch.tensor([0.0])}, TypeError, "coils must be int64"),
    ],
)
def test_bad_input_is_named(change, error, match):
    arguments = {
        "image": torch.ones(1, 8, 6, dtype=torch.complex64),
        "samples": None,
        "coil_maps": torch.ones(1, 2, 8, 6, dtype=torch.complex64),
        "sampling": torch.tensor([[0, 1]]),
        "coils": None,
    }
    with pytest.raises(error, match=match):
        oder_fast.ops.fourier_gradient(**{**arguments, **change})


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_half_precision_maps_are_for_gpu_backends():
    image = torch.ones(1, 8, 6, dtype=torch.complex64)
    with pytest.raises(TypeError, match="for the GPU backends, not for 'cpu'"):
        oder_fast.ops.fourier_forward(
            image, torch.ones(1, 2, 8, 6, dtype=torch.complex32), torch.tensor([[0]])
        )


def test_no_line_at_all_is_no_data(fastest, generator):
    """As the mask of one image of a batch may have it, or one that was emptied in place."""
    dtype = fastest.dtypes[0].to_complex()
    image, maps = (torch.randn(s, dtype=dtype, generator=generator) for s in ((2, 8, 6), (1, 3, 8, 6)))
    none, options = torch.full((1, 2), -1), {"backend": fastest.backend}
    image, maps, none = (t.to(fastest.device) for t in (image, maps, none))
    samples = oder_fast.ops.fourier_forward(image, maps, none, **options)
    assert samples.shape == (2, 3, 2, 6)
    assert not samples.any()
    assert not oder_fast.ops.fourier_adjoint(samples + 1, maps, none, **options).any()
    assert not oder_fast.ops.fourier_gradient(image, samples + 1, maps, none, **options).any()
