import math

import numpy as np
import pytest
import torch

from oder_fast.data import coils, masks, shepp_logan


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(*shape, dtype=dtype, generator=seeded(seed))


def fft2(x):
    x = torch.fft.ifftshift(x, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.fft2(x, norm="ortho"), dim=(-2, -1))


def errors(maps, true):
    """Norm of the difference over the coils in each pixel, up to one phase in each pixel."""
    phase = (maps.conj() * true).sum(0).sgn()
    return torch.linalg.vector_norm(maps * phase - true, dim=0)


# ------------------------------------------------------------------ birdcage_maps


@pytest.mark.parametrize("n_coils, shape", [(1, (8, 8)), (4, (33, 20)), (8, (64, 64)), (16, (1, 5))])
def test_birdcage_maps_are_normalised(n_coils, shape):
    maps = coils.birdcage_maps(n_coils, shape)
    assert maps.shape == (n_coils, *shape)
    assert maps.dtype == torch.complex64
    torch.testing.assert_close(maps.abs().square().sum(0), torch.ones(shape))


def test_birdcage_coils_sit_on_a_circle_and_agree_in_the_centre():
    n = 65
    maps = coils.birdcage_maps(8, (n, n))
    torch.testing.assert_close(maps[:, n // 2, n // 2], torch.full((8,), 8**-0.5 + 0j))
    brightest = maps.abs().flatten(1).argmax(1)
    for c, (i, j) in enumerate(zip((brightest // n).tolist(), (brightest % n).tolist(), strict=True)):
        angle = math.atan2(n // 2 - i, j - n // 2)
        assert abs((angle - 2 * math.pi * c / 8 + math.pi) % (2 * math.pi) - math.pi) < 0.3
    # Turning the array by a quarter is turning the image, with the phases of the coils.
    torch.testing.assert_close(maps[2], torch.rot90(maps[0]), rtol=1e-4, atol=1e-5)


def test_birdcage_maps_follow_the_field_of_a_wire():
    maps = coils.birdcage_maps(6, (32, 48)).to(torch.complex128)
    y, x = ((2 * np.arange(n) + 1) / n - 1 for n in (32, 48))
    z = x[None] - 1j * y[:, None]
    for c in (1, 4):
        wire, other = (1.5 * np.exp(2j * np.pi * k / 6) for k in (c, 0))
        field = (z - other) / (z - wire) * np.exp(2j * np.pi * c / 6)
        ratio = (maps[c] / maps[0]).numpy()
        np.testing.assert_allclose(ratio, field, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((0, (8, 8)), {}, "n_coils must be at least 1, got 0"),
        ((4, (8,)), {}, r"shape must be \(H, W\), both at least 1, got \(8,\)"),
        ((4, (8, 8)), {"radius": 1.4}, r"radius must be finite and above sqrt\(2\), got 1.4"),
    ],
)
def test_birdcage_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=f"birdcage_maps: {message}"):
        coils.birdcage_maps(*arguments, **options)


# ------------------------------------------------------------------ espirit_maps


@pytest.fixture(scope="module")
def scan():
    """An object with a smooth phase, seen by 8 coils: maps, where the object is, k-space."""
    n = 96
    image = shepp_logan(n)
    turn = torch.linspace(-1, 1, n)
    image = image * torch.polar(torch.ones(n, n), turn[:, None] + 0.5 * turn[None] ** 2)
    maps = coils.birdcage_maps(8, (n, n))
    return maps, image.abs() > 0, fft2(maps * image)


def test_espirit_finds_the_maps_of_simulated_coils(scan):
    true, inside, kspace = scan
    threads = torch.get_num_threads()
    maps = coils.espirit_maps(kspace)
    assert maps.shape == kspace.shape
    assert maps.dtype == torch.complex64
    assert torch.get_num_threads() == threads
    error = errors(maps, true)[inside]
    assert error.mean() < 0.01
    assert error.quantile(0.95) < 0.015
    assert error.max() < 0.05
    torch.testing.assert_close(torch.linalg.vector_norm(maps, dim=0), torch.ones(maps.shape[1:]))
    norm = torch.linalg.vector_norm(coils.espirit_maps(kspace, crop=0.95), dim=0)
    torch.testing.assert_close(norm[inside], torch.ones(int(inside.sum())))
    # Unit norm or nothing; nothing in most of the air.
    assert ((norm == 0) | ((norm - 1).abs() < 1e-4)).all()
    assert (norm[~inside] == 0).float().mean() > 0.4


def test_espirit_with_noise(scan):
    true, inside, kspace = scan
    noise = 0.01 * normal(*kspace.shape)
    error = errors(coils.espirit_maps(kspace + noise), true)[inside]
    assert error.mean() < 0.012
    assert error.max() < 0.06


def test_espirit_from_undersampled_lines(scan):
    true, inside, kspace = scan
    mask = masks.equispaced_lines(96, 4, 16 / 96, seeded())
    found = coils.espirit_maps(kspace * mask)
    torch.testing.assert_close(found, coils.espirit_maps(kspace * mask, mask))
    torch.testing.assert_close(found, coils.espirit_maps(kspace, mask.expand(96, 96)))
    error = errors(found, true)[inside]
    assert error.mean() < 0.015
    assert error.max() < 0.05
    # Only the calibration lines count.
    centre = torch.zeros(96, dtype=torch.bool)
    centre[40:56] = True
    torch.testing.assert_close(found, coils.espirit_maps(kspace * centre))


def test_espirit_takes_odd_and_unequal_sizes():
    shape = (75, 54)
    true = coils.birdcage_maps(5, shape)
    image = torch.zeros(shape)
    image[12:60, 10:40] = 1 + torch.rand(48, 30, generator=seeded())
    kspace = fft2(true * image)
    assert errors(coils.espirit_maps(kspace), true)[image > 0].mean() < 0.01
    double = coils.espirit_maps(kspace.to(torch.complex128))
    assert double.dtype == torch.complex128
    assert errors(double, true)[image > 0].mean() < 0.01


def test_espirit_does_not_depend_on_the_scale(scan):
    _, inside, kspace = scan
    maps = coils.espirit_maps(kspace)
    for scale in (1e-9, 1e9):
        torch.testing.assert_close(
            coils.espirit_maps(scale * kspace)[:, inside], maps[:, inside], rtol=0, atol=1e-3
        )


def test_espirit_phase_is_that_of_a_virtual_coil(scan):
    _, inside, kspace = scan
    maps = coils.espirit_maps(kspace)
    # Coils that agree in the centre: the strongest combination is near to their sum.
    region = kspace[:, 36:60, 36:60].flatten(1)
    virtual = torch.linalg.eigh(region @ region.mH)[1][:, -1]
    virtual = virtual * virtual[0].conj().sgn()
    seen = (virtual.conj()[:, None, None] * maps).sum(0)[inside]
    assert seen.real.min() > 0.5
    assert seen.imag.abs().max() < 5e-3
    torch.testing.assert_close(coils.espirit_maps(torch.tensor(1j) * kspace), maps, rtol=0, atol=1e-3)


def test_espirit_refuses_too_few_calibration_lines(scan):
    kspace = scan[2]
    for lines, found in ((9, 9), (5, 5), (1, 1)):
        mask = torch.zeros(96, dtype=torch.bool)
        mask[48 - lines // 2 : 48 - lines // 2 + lines] = True
        message = f"kernel_size 6: it needs a fully sampled centre of at least 10 rows .*, found 24 rows by {found} columns"
        with pytest.raises(ValueError, match=message):
            coils.espirit_maps(kspace * mask)
    mask = torch.ones(96, dtype=torch.bool)
    mask[48] = False
    with pytest.raises(ValueError, match="found 0 rows by 0 columns"):
        coils.espirit_maps(kspace, mask)
    square = torch.zeros(96, 96, dtype=torch.bool)
    square[42:54, 42:54] = True
    with pytest.raises(ValueError, match="with 72 positions of the kernel, found 12 rows by 12 columns"):
        coils.espirit_maps(kspace, square)
    assert coils.espirit_maps(kspace, square, kernel_size=4).abs().sum() > 0


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda k: k[0], {}, r"kspace must be \(C, H, W\), none of them 0, got \(96, 96\)"),
        (lambda k: k[:, :0], {}, r"kspace must be .*, got \(8, 0, 96\)"),
        (lambda k: k * 0, {}, "kspace must not be zero everywhere"),
        (lambda k: k * math.nan, {}, r"kspace must be finite, got .*nan.* at \(0, 0, 0\)"),
        (lambda k: k, {"kernel_size": 0}, r"kernel_size must be in 1\.\.24, got 0"),
        (lambda k: k, {"threshold": 1.0}, "threshold must be at least 0 and below 1, got 1"),
        (lambda k: k, {"crop": -0.1}, "crop must be at least 0 and below 1, got -0.1"),
        (
            lambda k: k,
            {"mask": torch.ones(95).bool()},
            r"mask must be \(96,\), \(96, 1\) or \(96, 96\) as kspace is, got \(95,\)",
        ),
    ],
)
def test_espirit_arguments(scan, change, options, message):
    with pytest.raises(ValueError, match=f"espirit_maps: {message}"):
        coils.espirit_maps(change(scan[2]), **options)


def test_types(scan):
    with pytest.raises(TypeError, match=r"espirit_maps: kspace must be complex, got torch\.float32"):
        coils.espirit_maps(scan[2].real)
    with pytest.raises(TypeError, match=r"espirit_maps: mask must be bool, got torch\.float32"):
        coils.espirit_maps(scan[2], torch.ones(96))
    with pytest.raises(TypeError, match="noise_covariance: noise must be complex"):
        coils.noise_covariance(torch.ones(2, 8))
    with pytest.raises(TypeError, match="whiten: kspace must be complex"):
        coils.whiten(torch.ones(2, 8, 8), torch.eye(2))
    with pytest.raises(TypeError, match="remove_oversampling: kspace must be complex"):
        coils.remove_oversampling(torch.ones(8, 8), 0)


# ------------------------------------------------------------------ whiten


@pytest.fixture
def mixing():
    return normal(6, 6, seed=3) * torch.tensor([1.0, 2, 3, 0.1, 5, 1])[:, None] * 1e-4


def test_noise_covariance_is_that_of_the_mixing(mixing):
    noise = mixing @ normal(6, 200_000, seed=1)
    covariance = coils.noise_covariance(noise)
    expected = (mixing @ mixing.mH).to(torch.complex128)
    assert covariance.dtype == torch.complex128
    assert torch.linalg.norm(covariance - expected) < 0.01 * torch.linalg.norm(expected)
    torch.testing.assert_close(coils.noise_covariance(noise.reshape(6, 400, 500)), covariance)


def test_whitened_noise_is_white(mixing):
    noise = (mixing @ normal(6, 2 * 100 * 100, seed=2)).reshape(6, 2, 100, 100).movedim(0, 1)
    white = coils.whiten(noise, coils.noise_covariance(noise.movedim(1, 0)))
    assert white.dtype == torch.complex64
    assert white.shape == noise.shape
    again = coils.noise_covariance(white.movedim(1, 0))
    assert (again - torch.eye(6)).abs().max() < 1e-3
    # Known covariance, fresh noise: identity within what so many samples allow.
    white = coils.whiten(noise, mixing @ mixing.mH)
    assert (coils.noise_covariance(white.movedim(1, 0)) - torch.eye(6)).abs().max() < 0.04


def test_whitening_keeps_what_the_coils_see_of_the_image():
    """The best linear estimate from whitened data is that from the data with their covariance."""
    psi = (lambda a: a @ a.mH + torch.eye(4))(normal(4, 4, dtype=torch.complex128))
    maps, data = (
        normal(4, 3, 5, seed=1, dtype=torch.complex128),
        normal(4, 3, 5, seed=2, dtype=torch.complex128),
    )
    white_maps, white = coils.whiten(maps, psi), coils.whiten(data, psi)
    ours = (white_maps.conj() * white).sum(0) / white_maps.abs().square().sum(0)
    inverse = torch.linalg.inv(psi)
    top = torch.einsum("chw,cd,dhw->hw", maps.conj(), inverse, data)
    torch.testing.assert_close(ours, top / torch.einsum("chw,cd,dhw->hw", maps.conj(), inverse, maps))


@pytest.mark.parametrize(
    "covariance, message",
    [
        (torch.eye(3), r"covariance must be \(2, 2\) for 2 coils, got \(3, 3\)"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "covariance must be Hermitian, got one that differs by 0.5"),
        (
            torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
            "covariance must be positive definite, got one with the eigenvalue -1",
        ),
        (torch.zeros(2, 2), "covariance must be positive definite, got one with the eigenvalue 0"),
        (torch.tensor([[1.0, 0.0], [0.0, math.nan]]), r"covariance must be finite, got nan at \(1, 1\)"),
    ],
)
def test_covariances_that_are_none(covariance, message):
    with pytest.raises(ValueError, match=f"whiten: {message}"):
        coils.whiten(torch.ones(2, 4, 4, dtype=torch.complex64), covariance)


def test_noise_arguments():
    with pytest.raises(ValueError, match=r"whiten: kspace must be \(\.\.\., C, H, W\), got \(4, 4\)"):
        coils.whiten(torch.ones(4, 4, dtype=torch.complex64), torch.eye(4))
    with pytest.raises(
        ValueError, match=r"noise_covariance: noise must be .* at least C samples .*got \(4, 3\)"
    ):
        coils.noise_covariance(normal(4, 3))
    noise = normal(2, 5)
    noise[1, 2] = math.inf
    with pytest.raises(ValueError, match=r"noise_covariance: noise must be finite, got .* at \(1, 2\)"):
        coils.noise_covariance(noise)


# ------------------------------------------------------------------ remove_oversampling


@pytest.mark.parametrize("n, factor", [(64, 2), (66, 2), (63, 3), (60, 1.25), (64, 1)])
@pytest.mark.parametrize("axis", [-2, 2])
def test_oversampling_is_removed_exactly(n, factor, axis):
    kept = round(n / factor)
    small = normal(3, kept, kept, dtype=torch.complex128)
    start = n // 2 - kept // 2
    large = torch.zeros(3, n, kept, dtype=torch.complex128)
    large[:, start : start + kept] = small
    if axis == 2:
        large = large.mT.contiguous()
    found = coils.remove_oversampling(fft2(large), axis, factor)
    torch.testing.assert_close(found, fft2(small if axis == -2 else small.mT))


def test_oversampling_takes_every_second_sample_of_an_object_inside():
    kspace = fft2(torch.nn.functional.pad(normal(32, 32), (0, 0, 16, 16)))
    found = coils.remove_oversampling(kspace, 0)
    torch.testing.assert_close(found, math.sqrt(2) * kspace[::2], rtol=1e-4, atol=1e-4)


def test_oversampling_removal_keeps_the_noise_level():
    noise = normal(4, 512, 256)
    found = coils.remove_oversampling(noise, 1)
    assert found.abs().square().mean() == pytest.approx(1, abs=0.02)
    # White: neighbours stay uncorrelated.
    assert (found[:, 1:] * found[:, :-1].conj()).mean().abs() < 0.02


@pytest.mark.parametrize(
    "axis, factor, message",
    [
        (2, 2, "axis must be one of the 2 axes of kspace, got 2"),
        (0, 0.5, "factor must be finite and at least 1, got 0.5"),
        (0, 1000, "factor must leave some of the 64 samples of axis 0, got 1000"),
    ],
)
def test_oversampling_arguments(axis, factor, message):
    with pytest.raises(ValueError, match=f"remove_oversampling: {message}"):
        coils.remove_oversampling(torch.ones(64, 32, dtype=torch.complex64), axis, factor)
