import io
import math
import os
import stat
import zipfile

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from oder_fast import data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def ramp():
    return np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000


# ------------------------------------------------------------------ read_image


def test_ct_slice_is_attenuation():
    path = get_testdata_file("CT_small.dcm")
    image, metadata = data.read_image(path)
    hounsfield = pydicom.dcmread(path).pixel_array.astype(float) - 1024
    expected = torch.from_numpy(np.clip(0.02 * (1 + hounsfield / 1000), 0, None)).float()
    torch.testing.assert_close(image, expected)
    assert metadata["format"] == "DICOM"
    assert metadata["unit"] == "1/mm"
    assert metadata["pixel_spacing"] == (0.661468, 0.661468)


def test_air_below_minus_1000_is_clipped(tmp_path):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    values = dataset.pixel_array.copy()
    values[0, 0] = -2000
    dataset.PixelData = values.tobytes()
    dataset.save_as(tmp_path / "air.dcm")
    assert data.read_image(tmp_path / "air.dcm").image[0, 0] == 0


def test_another_modality_keeps_its_values():
    path = get_testdata_file("MR_small.dcm")
    image, metadata = data.read_image(path)
    np.testing.assert_array_equal(image, pydicom.dcmread(path).pixel_array)
    assert metadata["unit"] == "as stored"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", ["tif", "npy", "npz"])
def test_values_as_stored(tmp_path, ramp, dtype, suffix):
    values = (ramp // 250).astype(dtype)
    path = tmp_path / f"image.{suffix}"
    {
        "tif": lambda: tifffile.imwrite(path, values),
        "npy": lambda: np.save(path, values),
        "npz": lambda: np.savez(path, image=values),
    }[suffix]()
    image, metadata = data.read_image(path)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image, values.astype(np.float32))
    assert metadata == {"format": {"tif": "TIFF"}.get(suffix, suffix.upper()), "unit": "as stored"}


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "LA", "P", "1"])
def test_png(tmp_path, ramp, mode):
    if mode == "I;16":
        expected = ramp
        Image.fromarray(ramp).save(tmp_path / "image.png")
    else:
        expected = ((ramp // 250) % 2 if mode == "1" else ramp // 250).astype(np.uint8)
        grey = Image.fromarray(expected * 255 if mode == "1" else expected)
        grey.convert(mode).save(tmp_path / "image.png")
    np.testing.assert_array_equal(data.read_image(tmp_path / "image.png").image, expected)


def test_content_decides_and_not_the_name(tmp_path, ramp):
    np.save(tmp_path / "image.npy", ramp)
    (tmp_path / "image.npy").rename(tmp_path / "image.png")
    assert data.read_image(tmp_path / "image.png").metadata["format"] == "NPY"


def test_one_of_several_arrays(tmp_path, ramp):
    path = tmp_path / "two.npz"
    np.savez(path, a=ramp, b=ramp + 1)
    np.testing.assert_array_equal(data.read_image(path, "b").image, ramp + 1)
    with pytest.raises(ValueError, match="it holds 2 arrays, name one of: a, b"):
        data.read_image(path)
    with pytest.raises(ValueError, match="it holds no array 'c', only: a, b"):
        data.read_image(path, "c")
    np.save(tmp_path / "one.npy", ramp)
    with pytest.raises(ValueError, match="a NPY file has no named arrays"):
        data.read_image(tmp_path / "one.npy", "b")


def encoded(kind):
    """A valid image of noise, large enough that a half of it is damaged."""
    values = np.random.default_rng(0).integers(0, 60000, (64, 64)).astype(np.uint16)
    buffer = io.BytesIO()
    if kind == "png":
        Image.fromarray(values).save(buffer, "PNG")
    elif kind == "tif":
        tifffile.imwrite(buffer, values)
    elif kind == "npy":
        np.save(buffer, values)
    elif kind == "npz":
        np.savez_compressed(buffer, image=values)
    else:
        with open(get_testdata_file("CT_small.dcm"), "rb") as file:
            buffer.write(file.read())
    return buffer.getvalue()


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["png", "tif", "npy", "npz", "dcm"])
def test_a_truncated_file_is_named(tmp_path, kind, kept):
    path = tmp_path / f"half.{kind}"
    content = encoded(kind)
    path.write_bytes(content)
    assert data.read_image(path).image.ndim == 2
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=f"half.{kind}: ."):
        data.read_image(path)


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros(5), r"an array of shape \(5,\), not a two-dimensional image"),
        (np.zeros((2, 3, 5)), r"an array of shape \(2, 3, 5\)"),
        (np.zeros((0, 3)), r"an array of shape \(0, 3\)"),
        (np.zeros((2, 3), complex), "its values are complex128, not real numbers"),
        (np.array([["a"]]), "its values are <U1"),
        (np.array([[object()]]), "it holds Python objects, not numbers"),
        (np.array([[1.0, 2.0], [np.nan, 4.0]]), r"pixel \(1, 0\) is nan"),
        (np.array([[1.0, -np.inf]]), r"pixel \(0, 1\) is -inf"),
        (np.array([[1e300]]), r"pixel \(0, 0\) is inf"),
        (np.arange(12).reshape(2, 2, 3), "it is a colour image"),
        (np.zeros((2, 2, 4), np.uint8), "it has transparent pixels"),
    ],
)
def test_arrays_that_are_no_image(tmp_path, values, message):
    path = tmp_path / "array.npy"
    np.save(path, values, allow_pickle=True)
    with pytest.raises(ValueError, match=f"array.npy: .*{message}"):
        data.read_image(path)


@pytest.mark.parametrize("shape", [(4, 5, 1), (1, 4, 5), (1, 4, 5, 1), (1, 1, 4, 5), (4, 5, 1, 1)])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_axes_of_length_one_carry_nothing(tmp_path, shape, suffix):
    values = np.arange(20.0).reshape(4, 5)
    path = tmp_path / f"image.{suffix}"
    np.save(path, values.reshape(shape)) if suffix == "npy" else np.savez(path, values.reshape(shape))
    np.testing.assert_array_equal(data.read_image(path).image, values)
    (sample,) = data.ImageFolder(path, scale="none")
    np.testing.assert_array_equal(sample.image, values)


@pytest.mark.parametrize("shape", [(3, 4, 5, 1), (3, 1, 4, 5), (1, 3, 4, 5)])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_axes_of_length_one_in_stacks(tmp_path, shape, suffix):
    values = np.arange(60.0).reshape(3, 4, 5)
    path = tmp_path / f"images.{suffix}"
    np.save(path, values.reshape(shape)) if suffix == "npy" else np.savez(path, values.reshape(shape))
    images = [sample.image for sample in data.ImageFolder(path, scale="none")]
    np.testing.assert_array_equal(torch.stack(images), values)
    np.testing.assert_array_equal(data.read_image(path, frame=2).image, values[2])
    (volume,) = data.ImageFolder(path, scale="none", volumes=True)
    np.testing.assert_array_equal(volume.image.real, values)


@pytest.mark.parametrize("stored", [">u2", ">f4", ">f8", "<i8", "f2", "?"])
def test_any_order_of_bytes_and_axes(tmp_path, stored):
    values = np.asfortranarray((np.arange(20).reshape(4, 5) % 2).astype(stored))
    np.save(tmp_path / "image.npy", values)
    np.savez(tmp_path / "image.npz", values)
    for name in ("image.npy", "image.npz"):
        np.testing.assert_array_equal(data.read_image(tmp_path / name).image, values.astype(np.float32))
        np.testing.assert_array_equal(data.read_array(tmp_path / name), values.astype(np.float32))


def test_a_second_array_behind_the_first(tmp_path, ramp):
    path = tmp_path / "two.npy"
    with path.open("wb") as file:
        np.save(file, ramp)
        np.save(file, ramp)
    for read in (data.read_image, data.read_array, data.ImageFolder):
        with pytest.raises(ValueError, match=r"two\.npy: more follows its array of shape \(3, 4\)"):
            read(path)


def test_an_array_that_asks_for_more_than_is_stored(tmp_path, ramp):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (3, 9999)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + ramp.tobytes())
    for read in (data.read_image, data.read_array, data.ImageFolder):
        with pytest.raises(
            ValueError, match=r"a\.npz: its 'a' of shape \(3, 9999\) takes 59994 bytes, and 24 are"
        ):
            read(tmp_path / "a.npz")


def test_real_and_imaginary_part_are_no_alpha(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 5, 2), np.float32))
    with pytest.raises(
        ValueError, match=r"a\.npy: .* neither grey nor RGB; real and imaginary part must be stored"
    ):
        data.read_image(tmp_path / "a.npy")


def test_png_with_transparent_colours_and_animations(tmp_path, ramp):
    grey = Image.fromarray((ramp // 250).astype(np.uint8))
    grey.save(tmp_path / "opaque.png", transparency=7)
    np.testing.assert_array_equal(data.read_image(tmp_path / "opaque.png").image, ramp // 250)
    for mode in ("L", "P"):
        grey.convert(mode).save(tmp_path / "holes.png", transparency=0)
        with pytest.raises(ValueError, match=r"holes\.png: it has transparent pixels"):
            data.read_image(tmp_path / "holes.png")
    grey.save(tmp_path / "two.png", save_all=True, append_images=[grey.rotate(180)])
    for read in (data.read_image, data.ImageFolder):
        with pytest.raises(ValueError, match=r"two\.png: it is an animation of 2 images"):
            read(tmp_path / "two.png")


def test_other_files_are_named(tmp_path):
    path = tmp_path / "note.png"
    path.write_text("this is not an image " * 20)
    with pytest.raises(ValueError, match=r"note\.png: not a DICOM, TIFF, PNG, NPY or NPZ file"):
        data.read_image(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"note\.png: the file is empty"):
        data.read_image(path)
    with pytest.raises(ValueError, match="no pixel data"):
        data.read_image(get_testdata_file("rtplan.dcm"))
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        data.read_image(tmp_path / "missing.png")
    with pytest.raises(IsADirectoryError):
        data.read_image(tmp_path)


def test_sixteen_bit_colour_is_not_silently_rounded(tmp_path):
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    body = zlib.compress(b"\0" + struct.pack(">HHH", 257, 257, 257))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    with pytest.raises(ValueError, match=r"deep\.png: a PNG of 16 bits with colours"):
        data.read_image(tmp_path / "deep.png")


# ------------------------------------------------------------------ atomic, save_npz


def test_atomic_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), data.atomic(path) as temporary:  # noqa: PT012
            assert (temporary.parent, temporary.suffix) == (tmp_path, ".txt")
            temporary.write_text("half")
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["result.txt"]
    assert path.read_text() == "old"


def test_save_npz(tmp_path):
    path = tmp_path / "arrays.npz"
    data.save_npz(path, x=torch.arange(3.0), y=np.ones((2, 2)), z=1.5)
    data.save_npz(path, x=torch.arange(4.0), y=np.ones((2, 2)), z=1.5)
    with np.load(path) as archive:
        assert archive.files == ["x", "y", "z"]
        np.testing.assert_array_equal(archive["x"], [0, 1, 2, 3])
    assert [p.name for p in tmp_path.iterdir()] == ["arrays.npz"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(ValueError, match=r"path must end in \.npz"):
        data.save_npz(tmp_path / "arrays.npy", x=1.0)


# ------------------------------------------------------------------ phantoms


def test_shepp_logan_is_the_known_one():
    from skimage.data import shepp_logan_phantom

    ours, known = data.shepp_logan(400), torch.from_numpy(shepp_logan_phantom()).float()
    assert (ours - known).abs().mean() < 5e-3
    assert sorted({round(v, 1) for v in ours.unique().tolist()}) == [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]


@pytest.mark.parametrize("texture", [0.0, 0.05])
def test_random_ellipses(texture):
    images = data.random_ellipses(4, 48, seeded(), texture=texture)
    assert images.shape == (4, 48, 48)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() <= 1
    assert (images.flatten(1).std(1) > 0.05).all()
    assert torch.equal(images, data.random_ellipses(4, 48, seeded(), texture=texture))
    assert not torch.equal(images, data.random_ellipses(4, 48, seeded(1), texture=texture))


def test_one_ellipse_has_its_area_and_sharp_edges():
    image = data.random_ellipses(64, 64, seeded(), ellipses=1)
    between = (image > 0) & (image < image.amax((1, 2), keepdim=True))
    assert (image.amax((1, 2)) >= 0.3).all()
    # Partly covered pixels lie on the outline alone: its length is below 4 sides of the image.
    assert (between.sum((1, 2)) < 4 * 64).all()
    assert between.any()


def test_patches_are_oriented_cuts_of_the_image():
    image = torch.arange(63.0).reshape(7, 9)
    cut = data.patches(image, 3, 200, seeded())
    assert cut.shape == (200, 3, 3)
    orientations = set()
    for patch in cut:
        found = []
        for flip in (False, True):
            for turns in range(4):
                back = torch.rot90(patch.flip(1) if flip else patch, -turns)
                row, column = divmod(int(back[0, 0]), 9)
                if row <= 4 and column <= 6 and torch.equal(back, image[row : row + 3, column : column + 3]):
                    found.append((flip, turns))
        assert len(found) == 1
        orientations.update(found)
    assert len(orientations) == 8
    assert torch.equal(cut, data.patches(image, 3, 200, seeded()))
    assert data.patches(image, 7, 1, seeded()).shape == (1, 7, 7)
    with pytest.raises(ValueError, match=r"both at least 8, got \(7, 9\)"):
        data.patches(image, 8, 1)


def test_smooth_phase():
    phase = data.smooth_phase(400, (12, 20), seeded(), amplitude=0.5)
    assert phase.shape == (400, 12, 20)
    assert phase.dtype == torch.float32
    varying = phase - phase.mean((1, 2), keepdim=True)
    assert 0.15 < varying.std() < 0.5
    assert varying.diff(dim=2).abs().max() < 0.75
    constant = data.smooth_phase(400, (12, 20), seeded(), amplitude=0.0)
    assert torch.equal(constant, constant[:, :1, :1].expand(-1, 12, 20))
    assert constant.min() >= 0
    assert constant.max() < 2 * math.pi
    # Constants all around the circle.
    assert torch.polar(torch.ones(400), constant[:, 0, 0]).mean().abs() < 0.2
    assert torch.equal(phase, data.smooth_phase(400, (12, 20), seeded(), amplitude=0.5))


def test_brain_like():
    images = data.brain_like(3, 96, seeded())
    assert images.shape == (3, 96, 96)
    assert images.dtype == torch.complex64
    magnitude = images.abs()
    assert magnitude.max() <= 1 + 1e-6
    assert magnitude[:, 0].max() == 0
    assert magnitude[:, :, 0].max() == 0
    # Fluid in a ventricle is dark, white matter to its left bright, the skull dark under a bright scalp.
    assert (magnitude[:, 40, 44] < 0.4).all()
    assert (magnitude[:, 30, 33] > 0.65).all()
    column = magnitude[:, :20, 48]
    assert (column.amax(1) > 0.7).all()
    assert (column[:, 6:12].amin(1) < 0.3).all()
    # The phase is smooth where there is signal.
    inside = (magnitude[:, :, 1:] > 0.3) & (magnitude[:, :, :-1] > 0.3)
    turns = (images[:, :, 1:] * images[:, :, :-1].conj()).angle()[inside].abs()
    assert turns.max() < 0.3
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images, data.brain_like(3, 96, seeded()))
    assert data.brain_like(0, 16).shape == (0, 16, 16)
    assert data.brain_like(1, 1, texture=0.0).isfinite().all()


def test_cell_like():
    shape = (10, 40, 64)
    contrast = data.cell_like(3, shape, seeded())
    assert contrast.shape == (3, *shape)
    assert contrast.dtype == torch.complex64
    index = torch.sqrt(contrast.to(torch.complex128) + 1.33**2)
    delta, kappa = index.real - 1.33, index.imag
    assert delta.min() > -1e-6
    assert 0.015 < delta.max() <= 0.03 + 1e-6
    assert kappa.min() >= 0
    assert 3e-4 < kappa.max() <= 1e-3 + 1e-8
    # Granules alone absorb; most of a volume is medium, and its border is nothing else.
    assert 0 < (kappa > 0).float().mean() < 0.05
    assert 0.03 < (contrast != 0).float().mean() < 0.6
    for side in (contrast[:, :, 0], contrast[:, :, -1], contrast[..., 0], contrast[..., -1]):
        assert side.abs().max() == 0
    # Slices show different parts of it, volumes different cells.
    occupied = contrast.abs().amax((2, 3)) > 0
    assert (occupied.sum(1) >= 5).all()
    middle = contrast[:, 3:7]
    assert (middle.diff(dim=1).abs().amax((2, 3)) > 1e-3).all()
    assert not torch.equal(contrast[0], contrast[1])
    assert torch.equal(contrast, data.cell_like(3, shape, seeded()))
    assert not torch.equal(contrast, data.cell_like(3, shape, seeded(1)))


def test_cells_have_edges_one_voxel_wide_and_scale_with_the_grid():
    one = data.cell_like(1, (32, 64, 64), seeded(), cells=1, absorption=0.0)[0]
    assert one.imag.abs().max() == 0
    fine = data.cell_like(1, (64, 128, 128), seeded(), cells=1, absorption=0.0)[0]
    pooled = torch.nn.functional.avg_pool3d(fine.real[None, None], 2)[0, 0]
    assert (pooled - one.real).norm() < 0.1 * one.real.norm()
    # From medium to membrane and back takes two voxels at most, wherever a line crosses the cell.
    lines = one.real[one.real.amax(2) > 0.9 * one.real.max()]
    assert len(lines) > 0
    for line in lines:
        rise = (line > 0).nonzero()[0].item()
        assert line[rise : rise + 4].max() > 0.6 * line.max()


def test_cells_in_other_media():
    weak = data.cell_like(1, (4, 24, 24), seeded(), medium_index=1.0, index_contrast=0.01, absorption=0.02)
    expected = data.cell_like(
        1, (4, 24, 24), seeded(), medium_index=1.47, index_contrast=0.01, absorption=0.02
    )
    delta = torch.sqrt(weak.to(torch.complex128) + 1) - 1
    torch.testing.assert_close(
        torch.sqrt(expected.to(torch.complex128) + 1.47**2) - 1.47, delta, rtol=0, atol=1e-7
    )
    assert data.cell_like(1, (4, 24, 24), seeded(), cells=0).abs().max() == 0
    assert data.cell_like(0, (4, 24, 24)).shape == (0, 4, 24, 24)
    for shape in ((1, 1, 1), (1, 16, 9), (5, 1, 30)):
        assert data.cell_like(2, shape, seeded()).isfinite().all()


def test_phantom_arguments():
    with pytest.raises(
        ValueError, match=r"cell_like: shape must be \(Z, H, W\), all at least 1, got \(3, 0, 3\)"
    ):
        data.cell_like(1, (3, 0, 3))
    with pytest.raises(ValueError, match="cell_like: cells must be at least 0, got -1"):
        data.cell_like(1, (3, 3, 3), cells=-1)
    with pytest.raises(ValueError, match="cell_like: medium_index must be a finite number above 0"):
        data.cell_like(1, (3, 3, 3), medium_index=math.nan)
    with pytest.raises(ValueError, match=r"cell_like: absorption must be finite and at least 0, got -1.0"):
        data.cell_like(1, (3, 3, 3), absorption=-1.0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        data.brain_like(1, 0)
    with pytest.raises(ValueError, match=r"shape must be \(H, W\), both at least 1, got \(0, 3\)"):
        data.smooth_phase(1, (0, 3))
    with pytest.raises(ValueError, match="cells must be at least 1, got 0"):
        data.smooth_phase(1, (3, 3), cells=0)
    with pytest.raises(ValueError, match="amplitude must be finite and at least 0"):
        data.smooth_phase(1, (3, 3), amplitude=-1.0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        data.shepp_logan(0)
    with pytest.raises(ValueError, match="ellipses must be at least 1"):
        data.random_ellipses(1, 8, ellipses=0)


# ------------------------------------------------------------------ noise, metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_gaussian_noise_has_its_exact_ratio_per_image(dtype):
    y = (
        torch.randn(3, 5, 7, generator=seeded(), dtype=dtype)
        * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    )
    noisy = data.add_gaussian_noise(y, 25.0, seeded(1))
    ratio = torch.linalg.vector_norm(noisy - y, dim=(1, 2)) / torch.linalg.vector_norm(y, dim=(1, 2))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 10 ** (-25 / 20)), rtol=1e-4, atol=0)
    assert torch.equal(noisy, data.add_gaussian_noise(y, 25.0, seeded(1)))
    with pytest.raises(ValueError, match="snr_db must be finite"):
        data.add_gaussian_noise(y, math.inf)


def test_poisson_noise_follows_the_counting_statistics():
    y = torch.full((1, 200, 200), 1.5)
    noisy = data.add_poisson_noise(y, 1e4, seeded())
    expected = 1e4 * math.exp(-1.5)
    counts = 1e4 * torch.exp(-noisy.double())
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=0.05)
    assert abs(counts.mean() / expected - 1) < 0.002
    assert abs(counts.var() / expected - 1) < 0.05
    assert torch.equal(noisy, data.add_poisson_noise(y, 1e4, seeded()))


def test_poisson_noise_without_a_photon_stays_finite():
    noisy = data.add_poisson_noise(torch.full((1, 2, 2), 50.0), 100.0, seeded())
    torch.testing.assert_close(noisy, torch.full((1, 2, 2), math.log(200)))
    for photons in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="photons must be a finite number above 0"):
            data.add_poisson_noise(noisy, photons)


def test_metrics():
    truth = torch.rand(32, 32, generator=seeded()) * 4
    image = truth + 0.1
    data_range = float(truth.max() - truth.min())
    assert data.psnr(image, truth) == pytest.approx(20 * math.log10(data_range / 0.1), abs=1e-3)
    assert data.psnr(image, truth, 1.0) == pytest.approx(20, abs=1e-3)
    assert data.snr(image, truth) == pytest.approx(
        20 * math.log10(float(truth.norm()) / (0.1 * 32)), abs=1e-3
    )
    assert data.ssim(truth, truth) == pytest.approx(1)
    assert data.ssim(truth.flip(0), truth) < 0.5


@pytest.mark.parametrize("metric", [data.psnr, data.ssim, data.snr])
def test_metrics_say_what_they_cannot_compare(metric):
    image, name = torch.rand(8, 9), metric.__name__
    with pytest.raises(TypeError, match=f"{name}: image must be a torch.Tensor, got list"):
        metric([[1.0]], image)
    with pytest.raises(ValueError, match=rf"{name}: image must not be empty, got the shape \(0, 9\)"):
        metric(image[:0], image)
    if metric is not data.snr:
        with pytest.raises(TypeError, match=f"{name}: data_range must be a number or None, got 'a'"):
            metric(image, image, "a")
        assert metric(image, image.flip(0), image.max()) == metric(image, image.flip(0), float(image.max()))
    with pytest.raises(
        ValueError, match=r"ssim: images must have at least 7 rows and 7 columns, got .* \(6, 9\)"
    ):
        data.ssim(image[:6], image[:6])


def test_metrics_take_what_a_model_gives():
    truth = torch.rand(16, 16, generator=seeded())
    image = truth + 0.1 * torch.rand(16, 16, generator=seeded(1))
    for metric in (data.psnr, data.ssim, data.snr):
        plain = metric(image, truth)
        assert metric(image.clone().requires_grad_(), truth.clone().requires_grad_()) == plain
        assert metric(image.bfloat16(), truth) == pytest.approx(plain, rel=0.02)
        if torch.cuda.is_available():
            assert metric(image.cuda(), truth.cuda()) == pytest.approx(plain, rel=1e-5)
    for metric in (data.psnr, data.ssim):
        with pytest.raises(ValueError, match="data_range must be finite and above 0, got -1"):
            metric(image, truth, -1.0)
    for metric in (data.psnr, data.ssim, data.snr):
        with pytest.raises(
            ValueError, match=r"image must have the shape of truth, \(16, 16\), got \(1, 16, 16\)"
        ):
            metric(image[None], truth)


def test_metrics_of_complex_images(generator):
    """The ratio counts phases; peak and structure are for magnitudes."""
    truth = torch.randn(16, 16, dtype=torch.complex64, generator=generator)
    assert data.snr(truth * (1 + 0.1j), truth) == pytest.approx(20, abs=1e-4)
    for metric in (data.psnr, data.ssim):
        with pytest.raises(TypeError, match="give the magnitudes"):
            metric(truth, truth)
