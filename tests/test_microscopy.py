"""Illuminations, image stacks and simulated images of intensity diffraction tomography."""

import math

import numpy as np
import pytest
import scipy.ndimage
import tifffile
import torch

from oder_fast import data
from oder_fast.data import simulation

WAVELENGTH, MEDIUM, APERTURE, PIXEL = 0.515, 1.33, 0.65, 0.16
WAVENUMBER = 2 * math.pi / WAVELENGTH
OPTICS = {
    "wavelength": WAVELENGTH,
    "medium_index": MEDIUM,
    "numerical_aperture": APERTURE,
    "pixel_size": PIXEL,
}


def sines(*directions):
    return torch.tensor(directions, dtype=torch.float64)


# ------------------------------------------------------------------ LEDs


def test_the_board_of_the_paper_leaves_89_leds():
    illuminations, index = data.led_grid(32, 32, 4.0, 79.0, center=(16, 16), numerical_aperture=0.25)
    assert illuminations.shape == (89, 2)
    assert illuminations.dtype == torch.float64
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(index.tolist())
    assert (illuminations.norm(dim=1) <= 0.25).all()
    # Its light travels away from the LED: one below and left of the axis sends it upward and to the right.
    k = index.tolist().index([18, 13])
    expected = torch.tensor([-8.0, 12.0], dtype=torch.float64) / math.sqrt(8**2 + 12**2 + 79**2)
    torch.testing.assert_close(illuminations[k], expected)
    on_axis = illuminations[index.tolist().index([16, 16])]
    assert on_axis.abs().max() == 0


def test_a_whole_board_is_centred():
    illuminations, index = data.led_grid(3, 4, 1.0, 2.0)
    assert index.tolist() == [[i, j] for i in range(3) for j in range(4)]
    torch.testing.assert_close(illuminations, -illuminations.flip(0))
    assert illuminations[0, 0] > 0
    assert illuminations[0, 1] > 0


def test_an_led_on_the_edge_of_the_aperture_is_kept():
    for aperture in (3 / 5, math.nextafter(3 / 5, 0)):
        assert len(data.led_grid(1, 7, 1.0, 4.0, numerical_aperture=aperture)[0]) == 7


def test_led_ring():
    ring = data.led_ring(24, APERTURE, start=0.3)
    assert ring.dtype == torch.float64
    torch.testing.assert_close(ring.norm(dim=1), torch.full((24,), APERTURE, dtype=torch.float64))
    turned = torch.complex(ring[:, 1], ring[:, 0])
    torch.testing.assert_close(turned[0].angle().item(), 0.3)
    torch.testing.assert_close(
        (turned.roll(-1) / turned).angle(), torch.full((24,), math.pi / 12, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: data.led_grid(0, 3, 1.0, 1.0),
            "led_grid: n_rows must be at least 1, got 0",
        ),
        (lambda: data.led_grid(3, 3, -1.0, 1.0), "led_grid: pitch must be a finite number above 0, got -1.0"),
        (lambda: data.led_grid(3, 3, 1.0, math.inf), "led_grid: distance must be a finite number above 0"),
        (lambda: data.led_grid(3, 3, 1.0, 1.0, center=(math.nan, 1)), "led_grid: center must be two finite"),
        (
            lambda: data.led_grid(3, 3, 1.0, 1.0, numerical_aperture=0),
            "led_grid: numerical_aperture must be a finite number above 0",
        ),
        (
            lambda: data.led_grid(2, 2, 4.0, 4.0, numerical_aperture=0.1),
            "led_grid: numerical_aperture 0.1 leaves no LED, the least sine is 0.57",
        ),
        (lambda: data.led_ring(0, 0.5), "led_ring: n must be at least 1, got 0"),
        (lambda: data.led_ring(3, math.nan), "led_ring: numerical_aperture must be a finite number above 0"),
        (lambda: data.led_ring(3, 0.5, start=math.inf), "led_ring: start must be finite, got inf"),
    ],
)
def test_led_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.led_grid(3.5, 3, 1.0, 1.0), "led_grid: n_rows must be an int, got float"),
        (lambda: data.led_grid(3, 3, "4 mm", 1.0), "led_grid: pitch must be a number, got str"),
        (lambda: data.led_ring(True, 0.5), "led_ring: n must be an int, got bool"),
        (lambda: data.read_led_stack(7), "read_led_stack: source must be a folder or files, got int"),
        (lambda: data.normalize_background([[1.0]]), "images must be a tensor of floating point, got list"),
    ],
)
def test_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


# ------------------------------------------------------------------ read_led_stack


def frame(seed, shape=(5, 7)):
    return np.random.default_rng(seed).integers(0, 60000, shape).astype(np.uint16)


def write_scan(folder, names):
    for k, name in enumerate(names):
        tifffile.imwrite(folder / name, frame(k))


def test_a_folder_of_leds_is_sorted_by_their_numbers(tmp_path):
    write_scan(tmp_path, ["scan_2024_y16_x9.tif", "scan_2024_y16_x12.TIFF", "scan_2024_y2_x30.tif"])
    tifffile.imwrite(tmp_path / "._scan_2024_y16_x9.tif", frame(9))
    tifffile.imwrite(tmp_path / "dark.tif", frame(10, (2, 2)))
    (tmp_path / "notes_1_2.txt").write_text("no image")
    images, index = data.read_led_stack(tmp_path)
    assert images.dtype == torch.float32
    assert index.dtype == torch.int64
    assert index.tolist() == [[2, 30], [16, 9], [16, 12]]
    np.testing.assert_array_equal(images, np.stack([frame(2), frame(0), frame(1)]))
    by_name = data.read_led_stack(str(path) for path in tmp_path.glob("scan_*"))
    torch.testing.assert_close(by_name, (images, index))


def test_signs_in_names(tmp_path):
    write_scan(tmp_path, ["led_-3_+4.tif", "led_3_4.tif", "led_-3_-4.tif", "led_0_-12.tif"])
    images, index = data.read_led_stack(tmp_path)
    assert index.tolist() == [[-3, -4], [-3, 4], [0, -12], [3, 4]]
    np.testing.assert_array_equal(images, np.stack([frame(k) for k in (2, 0, 3, 1)]))


@pytest.mark.parametrize("name", ["led-3-4.tif", "scan-3_4.tif", "2024-3-4.tif", "C03-R04.tif", "3-4.tif"])
def test_hyphens_that_are_no_signs(tmp_path, name):
    write_scan(tmp_path, [name])
    assert data.read_led_stack(tmp_path)[1].tolist() == [[3, 4]]


def test_hyphens_that_may_be_signs(tmp_path):
    write_scan(tmp_path, ["x-3_y+4.tif"])
    with pytest.raises(
        ValueError, match=r"x-3_y\+4\.tif: a - in its name may be a sign or not; give a pattern"
    ):
        data.read_led_stack(tmp_path)
    pattern = r"x(?P<col>[-+]?\d+)_y(?P<row>[-+]?\d+)"
    assert data.read_led_stack(tmp_path, pattern)[1].tolist() == [[4, -3]]


def test_names_of_another_pattern(tmp_path):
    write_scan(tmp_path, ["C03-R11.tif", "C04-R10.tif"])
    images, index = data.read_led_stack(tmp_path, r"^C(?P<col>\d+)-R(?P<row>\d+)")
    assert index.tolist() == [[10, 4], [11, 3]]
    np.testing.assert_array_equal(images[0], frame(1))
    with pytest.raises(ValueError, match=r"pattern must have the groups row and col, got '\^C"):
        data.read_led_stack(tmp_path, r"^C(?P<col>\d+)")
    with pytest.raises(ValueError, match="is no regular expression"):
        data.read_led_stack(tmp_path, r"(?P<row>")
    with pytest.raises(ValueError, match=r"C03-R11\.tif: row 'R' and column '03' .* must be whole numbers"):
        data.read_led_stack([tmp_path / "C03-R11.tif"], r"^C(?P<col>\d+)-(?P<row>.)")


def test_scans_that_are_wrong(tmp_path):
    with pytest.raises(ValueError, match="no file name matches"):
        data.read_led_stack(tmp_path)
    with pytest.raises(ValueError, match="source must hold at least one file"):
        data.read_led_stack([])
    with pytest.raises(FileNotFoundError, match="missing"):
        data.read_led_stack(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"1_2\.tif"):
        data.read_led_stack([tmp_path / "1_2.tif"])
    write_scan(tmp_path, ["a_1_2.tif", "a_1_3.tif", "dark.tif"])
    with pytest.raises(ValueError, match=r"dark\.tif: its name does not match"):
        data.read_led_stack([tmp_path / "dark.tif"])
    write_scan(tmp_path, ["b_01_02.tif"])
    with pytest.raises(ValueError, match=r"b_01_02\.tif: row 1, column 2 is also .*a_1_2\.tif"):
        data.read_led_stack(tmp_path)
    (tmp_path / "b_01_02.tif").unlink()
    tifffile.imwrite(tmp_path / "a_1_4.tif", frame(0, (5, 8)))
    with pytest.raises(
        ValueError, match=r"a_1_4\.tif: its size is \(5, 8\), that of .*a_1_2\.tif is \(5, 7\)"
    ):
        data.read_led_stack(tmp_path)
    colours = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    tifffile.imwrite(tmp_path / "a_1_4.tif", colours, photometric="rgb")
    with pytest.raises(ValueError, match=r"a_1_4\.tif: it is a colour image"):
        data.read_led_stack(tmp_path)
    tifffile.imwrite(tmp_path / "a_1_4.tif", np.stack([frame(k) for k in range(9)]))
    with pytest.raises(ValueError, match=r"a_1_4\.tif: .* not a two-dimensional image"):
        data.read_led_stack(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.95])
def test_a_truncated_frame_is_named(tmp_path, kept):
    tifffile.imwrite(tmp_path / "1_1.tif", frame(0, (64, 64)))
    tifffile.imwrite(tmp_path / "1_2.tif", frame(1, (64, 64)))
    content = (tmp_path / "1_2.tif").read_bytes()
    (tmp_path / "1_2.tif").write_bytes(content[: kept if kept in (0, 4) else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"1_2\.tif: ."):
        data.read_led_stack(tmp_path)


# ------------------------------------------------------------------ normalize_background


@pytest.mark.parametrize("window", [None, 1, 4, 5, (3, 8), (30, 41)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_background_is_the_moving_average(window, dtype, generator):
    images = 100 + 10 * torch.rand(2, 3, 11, 14, generator=generator, dtype=dtype)
    y = data.normalize_background(images, window)
    assert y.dtype == dtype
    size = {None: (5, 7), 1: (1, 1), 4: (4, 4), 5: (5, 5)}.get(window, window)
    background = scipy.ndimage.uniform_filter(
        images.double().numpy(), size=size, mode="nearest", axes=(-2, -1)
    )
    expected = torch.from_numpy(images.double().numpy() / background - 1)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-12)


def test_brightness_of_an_led_drops_out(generator):
    images = 1 + torch.rand(2, 16, 16, generator=generator)
    y = data.normalize_background(images)
    torch.testing.assert_close(
        data.normalize_background(images * torch.tensor([3.0, 700.0])[:, None, None]), y
    )
    assert data.normalize_background(torch.full((9, 9), 7.0)).abs().max() == 0
    assert data.normalize_background(torch.ones(0, 4, 4)).shape == (0, 4, 4)


def test_backgrounds_that_are_refused():
    images = torch.ones(2, 6, 6)
    with pytest.raises(TypeError, match=r"images must be a tensor of floating point, got torch.int64"):
        data.normalize_background(images.long())
    with pytest.raises(ValueError, match=r"images must be \(..., H, W\), got \(6,\)"):
        data.normalize_background(images[0, 0])
    for window in (0, (3, 0), (3, 3, 3)):
        with pytest.raises(ValueError, match="window must be at least 1 along both axes"):
            data.normalize_background(images, window)
    images[1, 2, 3] = -20
    with pytest.raises(ValueError, match=r"background must be above 0, got -1.333 at \(1, 1, 2\)"):
        data.normalize_background(images, 3)
    with pytest.raises(ValueError, match="background must be above 0, got 0 at"):
        data.normalize_background(torch.zeros(3, 3))
    images[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match=r"images must be finite, got nan at \(1, 2, 3\)"):
        data.normalize_background(images, 3)


# ------------------------------------------------------------------ the first Born approximation


def axial(squared):
    return 2 * math.pi * torch.sqrt((MEDIUM / WAVELENGTH) ** 2 - squared + 0j)


def frequencies(shape, f=(0.0, 0.0), pixel_size=PIXEL):
    """Squared transverse frequencies of waves whose envelopes have those of the FFT."""
    row, column = (torch.fft.fftfreq(n, pixel_size, dtype=torch.float64) for n in shape)
    return (row[:, None] + f[0]) ** 2 + (column + f[1]) ** 2


def linear_model(contrast, directions, depths, thickness, pixel_size=PIXEL):
    """Intensities to first order in the contrast: T(u) X(u) + conj(T(-u) X(-u)) at the frequency u.

    T = (i k0^2 dz / 2) P(u + f) exp(-i z (kz(u + f) - kz(f))) / kz(u + f), the incident wave exp(+2 pi i f r).
    """
    images = []
    for s in directions:
        f = (s / WAVELENGTH).tolist()
        squared = frequencies(contrast.shape[1:], f, pixel_size)
        passes = squared <= (APERTURE / WAVELENGTH * (1 + 1e-9)) ** 2
        kz = axial(squared)
        scattered = torch.zeros(contrast.shape[1:], dtype=torch.complex128)
        for z, part in zip(depths, contrast, strict=True):
            wave = torch.exp(-1j * z * (kz - axial(torch.tensor(f[0] ** 2 + f[1] ** 2)))) / kz
            scattered += wave * torch.fft.fft2(part)
        scattered = torch.where(passes, 0.5j * WAVENUMBER**2 * thickness * scattered, 0)
        images.append(2 * torch.fft.ifft2(scattered).real)
    return torch.stack(images)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def smooth_noise(shape, generator):
    """Random slices whose frequencies reach beyond the pupil."""
    noise = torch.randn(shape, dtype=torch.complex128, generator=generator)
    return torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-frequencies(shape[1:]) / 1.5**2))


def test_beam_propagation_scatters_as_born_to_first_order(generator):
    """The distance of the two goes to zero in proportion to the contrast, at any obliquity and depth."""
    contrast = smooth_noise((5, 32, 40), generator)
    directions = sines((0, 0), (0.5, 0.2), (-0.1, -0.45), (APERTURE, 0))
    depths = torch.tensor([-1.5, -0.7, 0.2, 0.9, 2.0], dtype=torch.float64)
    reference = linear_model(contrast, directions, depths, 0.8)
    for scale in (1e-2, 1e-3, 1e-4):
        y = data.beam_propagation(scale * contrast[None], directions, depths=depths, thickness=0.8, **OPTICS)
        for image, expected in zip(y[0] / scale, reference, strict=True):
            assert distance(image, expected) < 4 * scale
            assert distance(image, expected) > scale / 2


def sphere_points(radius):
    """Points and weights of a quadrature of the ball: rows, columns, depths."""
    r, along, around = (torch.from_numpy(t) for t in (*np.polynomial.legendre.leggauss(10), np.arange(16.0)))
    radii, radial_weights = (r + 1) * radius / 2, along * (radius / 2) * ((r + 1) * radius / 2) ** 2
    heights, height_weights = r, along
    rho = torch.sqrt(1 - heights**2)
    angles = 2 * math.pi * around / 16
    unit = torch.stack(
        (
            rho[:, None] * torch.sin(angles),
            rho[:, None] * torch.cos(angles),
            heights[:, None].expand(-1, 16),
        ),
        -1,
    )
    points = (radii[:, None, None, None] * unit).reshape(-1, 3)
    weights = (radial_weights[:, None, None] * height_weights[:, None] * (2 * math.pi / 16)).expand(
        -1, -1, 16
    )
    return points, weights.reshape(-1)


def test_a_bead_scatters_as_the_integral_over_greens_function():
    """Full waves: k0^2 eps times the incident wave, integrated over a bead with exp(i k r) / (4 pi r).

    The field is computed in a plane behind the bead from points of its volume, taken back to the focal plane by its
    angular spectrum, and filtered by the pupil. Neither slices nor Weyl's expansion, nor a sign of the transfer
    functions, enters. What is left, up to 1 %, is the finite plane and the steps of 0.2 um between the slices.
    """
    n, radius, plane, eps, thickness = 96, 0.8, 3.0, 1.0 + 0.4j, 0.2
    center = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    directions = sines((0, 0), (0.5, 0.2))
    k = WAVENUMBER * MEDIUM
    at = (torch.arange(n, dtype=torch.float64) - n // 2) * PIXEL

    points, weights = sphere_points(radius)
    assert weights.sum().item() == pytest.approx(4 / 3 * math.pi * radius**3)
    points = points + center
    f = directions / WAVELENGTH
    kz = axial(f.square().sum(1)).real
    incident = torch.exp(1j * (2 * math.pi * points[:, :2] @ f.T + points[:, 2:] * kz))
    detector = torch.stack((*torch.meshgrid(at, at, indexing="ij"), torch.full((n, n), plane)), -1).double()
    source = WAVENUMBER**2 * eps * weights[:, None] * incident
    field = []
    for row in detector.reshape(-1, 3).split(4 * n):
        r = torch.cdist(row, points)
        field.append(torch.polar(1 / (4 * math.pi * r), k * r) @ source)
    direct = []
    for values, wave in zip(torch.cat(field).T.reshape(2, n, n), f.tolist(), strict=True):
        envelope = values * torch.exp(-2j * math.pi * (at[:, None] * wave[0] + at * wave[1]))
        squared = frequencies((n, n), wave)
        back = torch.where(
            squared <= (APERTURE / WAVELENGTH) ** 2, torch.exp(-1j * plane * axial(squared)), 0
        )
        direct.append(2 * torch.fft.ifft2(back * torch.fft.fft2(envelope)).real)
    direct = torch.stack(direct)

    # Voxels hold averages, whose spectrum over a pixel is undone; 4 x 4 x 4 points in each.
    depths = center[2] + (torch.arange(10) - 4.5).double() * thickness
    fine = ((torch.arange(4, dtype=torch.float64) + 0.5) / 4 - 0.5)[:, None]
    z, y, x = (
        (fine * step + values - c) ** 2
        for values, c, step in (
            (depths, center[2], thickness),
            (at, center[0], PIXEL),
            (at, center[1], PIXEL),
        )
    )
    contrast = torch.zeros(10, n, n, dtype=torch.complex128)
    for a in z:
        for b in y:
            for c in x:
                contrast += eps / 64 * (a[:, None, None] + b[:, None] + c <= radius**2)
    average = torch.sinc(torch.fft.fftfreq(n, dtype=torch.float64))
    contrast = torch.fft.ifft2(torch.fft.fft2(contrast) / (average[:, None] * average))

    linear = linear_model(contrast, directions, depths, thickness)
    simulated = data.beam_propagation(1e-5 * contrast[None], directions, depths=depths, **OPTICS)[0] / 1e-5
    for image, other, expected in zip(linear, simulated, direct, strict=True):
        assert distance(image, expected) < 0.015
        assert distance(other, expected) < 0.015
        # Had a sign been wrong, little would agree.
        assert distance(image, expected.flip(0, 1)) > 0.5


# ------------------------------------------------------------------ beam_propagation


@pytest.mark.parametrize("size", [0.5, 30.0])
def test_a_slice_is_the_exponential_of_its_operator(size, generator):
    """Against a dense matrix exponential, for weak and for very strong slices; its flux is kept without absorption."""
    shape = (4, 6)
    cosine = torch.linspace(0.3, 1, 24, dtype=torch.float64).reshape(shape)
    phase = size * torch.rand(shape, dtype=torch.float64, generator=generator)
    wave = torch.randn(1, *shape, dtype=torch.complex128, generator=generator)
    identity = torch.eye(24, dtype=torch.complex128).reshape(24, *shape)
    matrix = torch.fft.ifft2(torch.fft.fft2(identity * phase) / cosine).reshape(24, 24).T
    expected = (torch.linalg.matrix_exp(1j * matrix) @ wave.reshape(24)).reshape(1, *shape)
    result = simulation._through_slice(wave, phase + 0j, 1 / cosine)
    assert distance(result, expected) < 1e-7

    def flux(field):
        return (cosine * torch.fft.fft2(field).abs() ** 2).sum().item()

    assert flux(result) == pytest.approx(flux(wave), rel=1e-7)


def test_many_slices_scatter_as_full_waves():
    """Against the Helmholtz equation, reflections included, in a slab whose index varies across alone.

    Waves exp(+-i Q z) in the slab, Q^2 = d^2/dx^2 + k0^2 n^2 by dense eigenvectors, are matched at both sides with
    the free ones. The contrast is far beyond the first Born approximation. Where slices delay by k0 dz (n - n0), or
    that over the cosine of the incident wave alone, the distance was 0.57 to 0.66.
    """
    width, pixel, length, slices = 48, 0.3, 8.0, 32
    x = torch.arange(width, dtype=torch.float64) / width
    index = MEDIUM + 0.02 * torch.exp(3 * torch.cos(2 * math.pi * x) - 3) + 0.01 * torch.cos(4 * math.pi * x)
    spectrum = torch.fft.fftfreq(width, pixel, dtype=torch.float64)
    transform = torch.fft.fft(torch.eye(width, dtype=torch.complex128), norm="ortho", dim=0)
    free = transform.mH @ (axial(spectrum**2)[:, None] * transform)
    squares, modes = torch.linalg.eigh(
        torch.diag(WAVENUMBER**2 * (index**2 - MEDIUM**2)).to(free.dtype) + free @ free
    )
    inside = torch.sqrt(squares + 0j)
    slab = modes @ (inside[:, None] * modes.mH)
    across = modes @ (torch.exp(1j * length * inside)[:, None] * modes.mH)
    matching = torch.cat(
        (
            torch.cat((free + slab, (free - slab) @ across), 1),
            torch.cat(((slab - free) @ across, -(slab + free)), 1),
        )
    )
    depths = (torch.arange(slices, dtype=torch.float64) + 0.5) * length / slices - length / 2
    contrast = (index**2 - MEDIUM**2).expand(1, slices, 1, width).to(torch.complex128)
    for cycles in (0, 3, -5):
        f = cycles / (width * pixel)
        assert abs(f) < APERTURE / WAVELENGTH
        incident = torch.exp(2j * math.pi * cycles * x - 0.5j * length * axial(torch.tensor(f**2)))
        there, back = torch.linalg.solve(matching, torch.cat((2 * free @ incident, 0 * incident))).chunk(2)
        focus = torch.exp(-0.5j * length * axial(spectrum**2))
        passed = torch.where(
            spectrum.abs() <= APERTURE / WAVELENGTH, focus * torch.fft.fft(across @ there + back), 0
        )
        exact = torch.fft.ifft(passed).abs() ** 2 - 1
        direction = sines((0, f * WAVELENGTH))
        y = data.beam_propagation(contrast, direction, depths=depths, **OPTICS | {"pixel_size": pixel})[
            0, 0, 0
        ]
        linear = linear_model(contrast[0], direction, depths, length / slices, pixel)[0, 0]
        assert distance(y, exact) < 0.02
        assert distance(linear, exact) > 0.3


@pytest.mark.parametrize("s", [0.0, 0.3, 0.6])
def test_an_absorbing_slab_dims_by_its_exact_wavenumber(s):
    """exp(-2 L Im sqrt(k0^2 n^2 - k0^2 s^2)), whatever the direction, periodic on the grid or not."""
    eps = (MEDIUM + 0.004 + 0.002j) ** 2 - MEDIUM**2
    slab = torch.full((1, 4, 6, 5), eps, dtype=torch.complex128)
    depths = torch.arange(4) * 1.5
    y = data.beam_propagation(slab, sines((s * 0.6, s * 0.8)), depths=depths, **OPTICS)
    inside = torch.sqrt(torch.tensor(MEDIUM**2 + eps - s**2)).imag.item()
    expected = math.exp(-2 * WAVENUMBER * 6.0 * inside) - 1
    torch.testing.assert_close(y, torch.full_like(y, expected), rtol=2e-3, atol=0)
    transparent = data.beam_propagation(slab.real + 0j, sines((0, s)), depths=depths, **OPTICS)
    assert transparent.abs().max() < 1e-9


def test_empty_volumes_shifts_and_mirrors(generator):
    contrast = 0.05 * smooth_noise((3, 11, 15), generator)[None]
    directions = sines((0.2, -0.5), (0, 0))
    depths = torch.tensor([-1.0, 0.0, 2.0])

    def simulate(volume, s=directions):
        return data.beam_propagation(volume, s, depths=depths, thickness=1.0, **OPTICS)

    y = simulate(contrast)
    assert y.abs().max() > 0.01
    assert simulate(torch.zeros_like(contrast)).abs().max() < 1e-12
    torch.testing.assert_close(simulate(contrast.roll((3, -5), (2, 3))), y.roll((3, -5), (2, 3)))
    torch.testing.assert_close(simulate(contrast.flip(3), directions * sines((1, -1))), y.flip(3))
    torch.testing.assert_close(simulate(contrast.mT, directions.flip(1)), y.mT)
    torch.testing.assert_close(simulate(torch.cat((0 * contrast, contrast)))[1:], y)
    single = simulate(contrast.to(torch.complex64))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), y, rtol=0, atol=1e-6)
    assert simulate(contrast[:0]).shape == (0, 2, 11, 15)
    assert simulate(contrast, directions[:0]).shape == (1, 0, 11, 15)


def test_thickness_is_the_distance_of_even_slices(generator):
    contrast = 0.02 * smooth_noise((3, 8, 8), generator)[None]
    depths = torch.tensor([-1.5, 0.0, 1.5])
    y = data.beam_propagation(contrast, sines((0, 0.1)), depths=depths, **OPTICS)
    same = data.beam_propagation(contrast, sines((0, 0.1)), depths=depths, thickness=1.5, **OPTICS)
    assert torch.equal(y, same)
    # Half as thick and twice as many, at nearly the same depths.
    twice = contrast.repeat_interleave(2, 1)
    close = depths.double().repeat_interleave(2) + torch.tensor([0.0, 1e-9]).repeat(3)
    halves = data.beam_propagation(twice, sines((0, 0.1)), depths=close, thickness=0.75, **OPTICS)
    torch.testing.assert_close(halves, y, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"contrast": torch.zeros(1, 2, 4)}, "contrast must be complex, got torch.float32"),
        (
            {"contrast": torch.zeros(2, 4, 4) + 0j},
            r"contrast must be \(B, Z, H, W\), Z, H and W at least 1, got \(2, 4, 4\)",
        ),
        (
            {"contrast": torch.full((1, 2, 4, 4), complex(math.nan, 0))},
            r"contrast must be finite, got \(nan.* at \(0, 0, 0, 0\)",
        ),
        ({"illuminations": torch.zeros(2)}, r"illuminations must be \(L, 2\), got \(2,\)"),
        ({"illuminations": sines((0, math.inf))}, r"illuminations must be finite, got inf at \(0, 1\)"),
        (
            {"illuminations": sines((0, 0), (0.5, 0.5))},
            r".* dark field .* illumination 1 has \|s\| = 0.707107, above numerical_aperture 0.65",
        ),
        ({"depths": torch.zeros(3)}, r"depths must be \(2,\), one for each slice, got \(3,\)"),
        ({"depths": torch.tensor([1.0, 0.0])}, r"depths must grow from slice to slice, got \[1.0, 0.0\]"),
        (
            {"contrast": torch.zeros(1, 1, 4, 4) + 0j, "depths": torch.zeros(1)},
            r"thickness is needed .* \[0.0\]",
        ),
        (
            {"contrast": torch.zeros(1, 3, 4, 4) + 0j, "depths": torch.tensor([0.0, 1.0, 3.0])},
            "thickness is needed where slices are not evenly spaced",
        ),
        ({"thickness": -1.0}, "thickness must be a finite number above 0, got -1.0"),
        ({"wavelength": 0.0}, "wavelength must be a finite number above 0, got 0.0"),
        ({"pixel_size": math.nan}, "pixel_size must be a finite number above 0, got nan"),
        ({"numerical_aperture": 1.4}, "numerical_aperture must be below medium_index 1.33, got 1.4"),
    ],
)
def test_beam_propagation_arguments(change, message):
    arguments = {
        "contrast": torch.zeros(1, 2, 4, 4, dtype=torch.complex64),
        "illuminations": sines((0, 0)),
        "depths": torch.tensor([0.0, 1.0]),
        **OPTICS,
    }
    with pytest.raises((TypeError, ValueError), match=f"beam_propagation: {message}"):
        data.beam_propagation(**arguments | change)
