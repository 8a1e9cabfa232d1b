import gzip
import stat

import numpy as np
import pytest
import torch

from oder_fast import data
from oder_fast.data import nifti


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_round_trip(tmp_path, shape, dtype, suffix):
    image = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"patient.one{suffix}"
    size = (3.3, 0.4375, 0.7)
    nifti.write_nifti(path, image + 1, size)
    nifti.write_nifti(path, image, size)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes().startswith(b"\x1f\x8b") == (suffix == ".nii.gz")
    values, found = nifti.read_nifti(path)
    assert values.dtype == dtype
    assert torch.equal(values, image)
    assert found == pytest.approx(size, rel=1e-6)
    assert stat.S_IMODE(path.stat().st_mode) & 0o200


def test_others_read_our_nifti(tmp_path):
    import nibabel

    image = torch.arange(24.0).reshape(2, 3, 4)
    nifti.write_nifti(tmp_path / "volume.nii.gz", image, (5.0, 1.0, 2.0))
    volume = nibabel.load(tmp_path / "volume.nii.gz")
    assert volume.shape == (4, 3, 2)
    assert volume.header.get_zooms() == (2.0, 1.0, 5.0)
    assert volume.header.get_xyzt_units()[0] == "mm"
    # Columns grow to the left, rows to the back, slices to the head.
    assert nibabel.aff2axcodes(volume.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(volume.get_fdata()[3, 1, 0], image[0, 1, 3])


def test_we_read_the_nifti_of_others(tmp_path):
    import nibabel

    stored = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    affine = np.array([[0, 0, 2.5, 9], [-1.5, 0, 0, 8], [0, 0.5, 0, 7], [0, 0, 0, 1]])
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        volume = kind(stored, affine)
        volume.header.set_xyzt_units("micron")
        volume.header.set_slope_inter(2, 1)
        nibabel.save(volume, tmp_path / "volume.nii")
        values, size = nifti.read_nifti(tmp_path / "volume.nii")
        np.testing.assert_array_equal(values, nibabel.load(tmp_path / "volume.nii").get_fdata().T)
        assert values.dtype == torch.float32
        assert size == pytest.approx((2.5e-3, 0.5e-3, 1.5e-3))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("ones", [1, 2, 4])
def test_axes_of_length_one_after_the_third_carry_nothing(tmp_path, suffix, ones):
    import nibabel

    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    path = tmp_path / f"a{suffix}"
    nibabel.save(nibabel.Nifti1Image(values.reshape(4, 3, 2, *[1] * ones), np.diag([1, 2, 3, 1])), path)
    found, size = nifti.read_nifti(path)
    np.testing.assert_array_equal(found, values.T)
    assert size == (3, 2, 1)
    for sample, expected in zip(data.ImageFolder(path, scale="none"), values.T, strict=True):
        np.testing.assert_array_equal(sample.image, expected)
    data.write_image(tmp_path / "like.nii", found, like=path)
    np.testing.assert_array_equal(nibabel.load(tmp_path / "like.nii").affine, np.diag([1, 2, 3, 1]))


@pytest.fixture
def volume(tmp_path):
    """A file with the values 0, 1, ... and voxels of 2, 3 and 4 mm, and the function that writes it with other bytes."""
    import nibabel

    path = tmp_path / "a.nii"
    nibabel.save(
        nibabel.Nifti1Image(np.arange(24, dtype=np.float32).reshape(4, 3, 2), np.diag([2, 3, 4, 1])), path
    )
    content = path.read_bytes()

    def write(**fields):
        header = nibabel.Nifti1Header(content[:348], check=False)
        for name, value in fields.items():
            header[name] = value
        path.write_bytes(header.binaryblock + content[348:])
        return path

    return write


@pytest.mark.parametrize(
    "fields, size, scale",
    [
        ({"xyzt_units": 5}, (4, 3, 2), 1),
        ({"xyzt_units": 7}, (4, 3, 2), 1),
        ({"xyzt_units": 3}, (4e-3, 3e-3, 2e-3), 1),
        ({"scl_slope": np.nan}, (4, 3, 2), 1),
        ({"scl_slope": 0, "scl_inter": 7}, (4, 3, 2), 1),
        ({"scl_slope": 2, "scl_inter": 0}, (4, 3, 2), 2),
        ({"vox_offset": 0}, (4, 3, 2), 1),
        # A turn whose quaternion, rounded, is a little longer than 1.
        (
            {"sform_code": 0, "qform_code": 1, "quatern_b": 0.58, "quatern_c": 0.58, "quatern_d": 0.58},
            (4, 3, 2),
            1,
        ),
        (
            {"sform_code": 0, "qform_code": 1, "quatern_b": 1.0001, "quatern_c": 0, "quatern_d": 0},
            (4, 3, 2),
            1,
        ),
    ],
)
def test_headers_of_other_programs(volume, fields, size, scale):
    path = volume(**fields)
    expected = scale * np.arange(24, dtype=np.float32).reshape(4, 3, 2).T
    values, found = nifti.read_nifti(path)
    np.testing.assert_array_equal(values, expected)
    assert found == pytest.approx(size)
    images = [sample.image for sample in data.ImageFolder(path, scale="none")]
    np.testing.assert_array_equal(torch.stack(images), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"dim": [3, 9999, 9999, 9999, 1, 1, 1, 1]},
            "it is truncated: it has 448 bytes, and its voxels end at 39988",
        ),
        ({"vox_offset": 400}, "it is truncated"),
        ({"magic": b"ni1"}, r"a NIfTI header whose voxels are in another file \(\.img\)"),
        (
            {"srow_x": 0, "srow_y": 0, "srow_z": 0},
            r"its voxel size is \(0\.0, 0\.0, 0\.0\) mm, which must be above 0",
        ),
        (
            {"sform_code": 0, "qform_code": 1, "quatern_b": 9},
            r"its quaternion \(9\.0, 0\.0, 0\.0\) is no rotation",
        ),
        ({"scl_slope": 2, "scl_inter": np.nan}, "."),
    ],
)
def test_headers_that_are_wrong(volume, fields, message):
    path = volume(**fields)
    with pytest.raises(ValueError, match=rf"a\.nii: {message}"):
        nifti.read_nifti(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_big_endian(tmp_path, name):
    import nibabel

    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    header = nibabel.Nifti1Image(values, np.eye(4)).header.as_byteswapped(">")
    nibabel.save(nibabel.Nifti1Image(values.astype(">f4"), np.eye(4), header), tmp_path / name)
    np.testing.assert_array_equal(nifti.read_nifti(tmp_path / name)[0], values.T)
    np.testing.assert_array_equal(data.ImageFolder(tmp_path, scale="none")[1].image, values.T[1])


def test_nifti_files_that_are_wrong(tmp_path):
    import nibabel

    path = tmp_path / "a.nii"
    nifti.write_nifti(path, torch.ones(8, 8, 8))
    content = path.read_bytes()
    for kept in (0, 100, 400, len(content) - 100):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"a\.nii: ."):
            nifti.read_nifti(path)
    path.write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(ValueError, match=r"a\.nii: ."):
        nifti.read_nifti(path)
    path.write_text("no image " * 100)
    with pytest.raises(ValueError, match=r"a\.nii: not a NIfTI file"):
        nifti.read_nifti(path)
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 3, 4, 5), np.float32), np.eye(4)), path)
    with pytest.raises(
        ValueError, match=r"a\.nii: it holds an array of shape \(2, 3, 4, 5\), not \(W, H\) or"
    ):
        nifti.read_nifti(path)
    bad = np.ones((2, 3, 4), np.float32)
    bad[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(bad, np.eye(4)), path)
    with pytest.raises(ValueError, match=r"a\.nii: value \(3, 2, 1\) is nan"):
        nifti.read_nifti(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.nii"):
        nifti.read_nifti(tmp_path / "missing.nii")


@pytest.mark.parametrize(
    "name, shape, size, message",
    [
        ("a.gz", (4, 4), (1, 1, 1), r"path must end in \.nii or \.nii\.gz, got .*a\.gz"),
        ("a.nii", (4,), (1, 1, 1), r"image must be \(H, W\) or \(S, H, W\), none of them 0, got \(4,\)"),
        ("a.nii", (0, 4), (1, 1, 1), r"image .* none of them 0, got \(0, 4\)"),
        ("a.nii", (4, 4), (1, 1), r"voxel_size must be three numbers above 0, got \(1, 1\)"),
        ("a.nii", (4, 4), (1, 0, 1), r"voxel_size must be three numbers above 0, got \(1, 0, 1\)"),
    ],
)
def test_nifti_arguments(tmp_path, name, shape, size, message):
    with pytest.raises(ValueError, match=f"write_nifti: {message}"):
        nifti.write_nifti(tmp_path / name, torch.ones(shape), size)
    assert not list(tmp_path.iterdir())


def test_nifti_refuses_what_is_not_finite(tmp_path):
    image = torch.ones(3, 4)
    image[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"write_nifti: image must be finite, value \(1, 2\) is inf"):
        nifti.write_nifti(tmp_path / "a.nii", image)
    assert not list(tmp_path.iterdir())
