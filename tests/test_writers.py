import io
import shutil

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from oder_fast import data

CT = get_testdata_file("CT_small.dcm")
MR = get_testdata_file("MR_small.dcm")
SUFFIXES = [".dcm", ".tif", ".png", ".npy", ".npz", ".nii", ".nii.gz"]


def noise(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def read(path):
    return data.read_nifti(path)[0] if ".nii" in path.name else data.read_image(path).image


# ------------------------------------------------------------------ all formats


@pytest.mark.parametrize("suffix", data.WRITERS)
def test_round_trip(tmp_path, suffix):
    image = noise(20, 30)
    path = tmp_path / f"image.one{suffix.upper() if suffix != '.nii' else suffix}"
    if suffix == ".nii.gz":
        path = tmp_path / "image.one.nii.gz"
    data.write_image(path, torch.zeros(3, 4))
    data.write_image(path, image)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".png":
        low, high = image.min(), image.max()
        torch.testing.assert_close(read(path), (65535 * (image - low) / (high - low)).round(), rtol=0, atol=1)
    else:
        step = float(image.max() - image.min()) / 65535 if suffix in (".dcm", ".dicom") else 0
        torch.testing.assert_close(read(path), image, rtol=1e-6, atol=0.51 * step)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_complex_images(tmp_path, suffix):
    image = noise(6, 7, dtype=torch.complex64)
    path = tmp_path / f"image{suffix}"
    data.write_image(path, image.conj())
    if suffix in (".npy", ".npz"):
        assert torch.equal(data.read_array(path), image.conj().resolve_conj())
    elif ".nii" in suffix:
        assert torch.equal(read(path), image.conj().resolve_conj())
    elif suffix == ".png":
        assert (read(path).argmax(), read(path).argmin()) == (image.abs().argmax(), image.abs().argmin())
    else:
        torch.testing.assert_close(read(path), image.abs(), rtol=1e-6, atol=1e-4 if suffix == ".dcm" else 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_volumes(tmp_path, suffix):
    volume, path = noise(3, 6, 7), tmp_path / f"volume{suffix}"
    if suffix in (".dcm", ".png"):
        with pytest.raises(ValueError, match=r"file holds one slice, got an image of shape \(3, 6, 7\)"):
            data.write_image(path, volume)
        assert list(tmp_path.iterdir()) == []
    else:
        data.write_image(path, volume)
        found = read(path) if ".nii" in suffix else data.read_array(path)
        assert torch.equal(found, volume)
        assert [s.image.shape for s in data.ImageFolder(tmp_path)] == [(6, 7)] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int16, torch.bool])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_kinds_of_numbers(tmp_path, suffix, dtype):
    image = (noise(6, 7) > 0).to(dtype)
    data.write_image(tmp_path / f"a{suffix}", image)
    values = read(tmp_path / f"a{suffix}")
    torch.testing.assert_close(values / values.max(), image.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_left_of_a_failure(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"image{suffix}"
    data.write_image(path, noise(4, 4))
    before = path.read_bytes()
    image = noise(4, 4)
    image[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"image must be finite, value \(1, 2\) is nan"):
        data.write_image(path, image)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError, match="missing"):
        data.write_image(tmp_path / "missing" / path.name, noise(4, 4))


def test_arguments(tmp_path):
    path, image = tmp_path / "a.png", noise(4, 4)
    for name in ("a.jpg", "a", ".png", "a.gz"):
        with pytest.raises(ValueError, match=r"its name must end in one of \.dcm, .*\.nii\.gz"):
            data.write_image(tmp_path / name, image)
    for shape in ((4,), (0, 4), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"image must be \(H, W\) or \(S, H, W\)"):
            data.write_image(path, torch.zeros(shape))
    for window in ((1, 1), (2, 1), (0, np.nan), (0, np.inf), (1,)):
        with pytest.raises(ValueError, match=r"window must be \(low, high\) with low < high"):
            data.write_image(path, image, window=window)
    for size in ((1, 1), (1, 0, 1), (1, 1, np.nan)):
        with pytest.raises(ValueError, match="voxel_size must be three numbers above 0"):
            data.write_image(path, image, voxel_size=size)
    with pytest.raises(ValueError, match="bits must be 8 or 16, got 12"):
        data.write_image(path, image, bits=12)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.write_image(path, image, like=tmp_path / "nowhere.dcm")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ DICOM


def test_ct_is_carried_over(tmp_path):
    source, path = pydicom.dcmread(CT), tmp_path / "new.dcm"
    attenuation = data.read_image(CT).image
    data.write_image(path, attenuation, like=CT)
    written = pydicom.dcmread(path)
    slope = float(written.RescaleSlope)
    assert slope < 0.1
    # Hounsfield units to half a step; what lies below -1000 was clipped when it was read.
    hounsfield = written.pixel_array * slope + float(written.RescaleIntercept)
    expected = np.maximum(source.pixel_array.astype(float) - 1024, -1000)
    np.testing.assert_allclose(hounsfield, expected, rtol=0, atol=slope / 2 + 1e-3)
    again, metadata = data.read_image(path)
    torch.testing.assert_close(again, attenuation, rtol=0, atol=0.02 * slope / 1000)
    assert metadata == {"format": "DICOM", "unit": "1/mm", "pixel_spacing": (0.661468, 0.661468)}
    for name in (
        "PatientName",
        "PatientID",
        "StudyInstanceUID",
        "FrameOfReferenceUID",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "SliceThickness",
        "PixelSpacing",
        "Modality",
        "SOPClassUID",
        "KVP",
    ):
        assert written[name].value == source[name].value, name
    assert written.ImageType[:2] == ["DERIVED", "PRIMARY"]
    assert written.ImageType[2:] == source.ImageType[2:]
    assert written.RescaleType == "HU"
    assert written.SOPInstanceUID not in (source.SOPInstanceUID, "")
    assert written.SeriesInstanceUID not in (source.SeriesInstanceUID, "")
    assert written.file_meta.MediaStorageSOPInstanceUID == written.SOPInstanceUID
    assert written.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert "PixelPaddingValue" not in written
    assert not any(element.tag.is_private for element in written)
    assert data.ImageFolder(path).groups == ["1CT1"]


def test_slices_of_a_run_are_one_series(tmp_path):
    image = data.read_image(CT).image
    for name, like, more in (
        ("a", CT, {}),
        ("b", CT, {}),
        ("c", CT, {"description": "another"}),
        ("d", None, {}),
        ("e", None, {}),
    ):
        data.write_image(tmp_path / f"{name}.dcm", image, like, **more)
    a, b, c, d, e = (pydicom.dcmread(tmp_path / f"{name}.dcm") for name in "abcde")
    assert a.SeriesInstanceUID == b.SeriesInstanceUID != c.SeriesInstanceUID
    assert d.SeriesInstanceUID == e.SeriesInstanceUID != a.SeriesInstanceUID
    assert d.StudyInstanceUID == e.StudyInstanceUID
    assert len({one.SOPInstanceUID for one in (a, b, c, d, e)}) == 5
    assert c.SeriesDescription == "another"


def test_sources_of_other_encodings(tmp_path):
    source = pydicom.dcmread(CT)
    source.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    source.save_as(tmp_path / "implicit.dcm", implicit_vr=True, little_endian=True)
    image = data.read_image(CT).image
    for like in (tmp_path / "implicit.dcm", get_testdata_file("MR_small_bigendian.dcm")):
        shape = data.ImageFolder([like]).shapes[0]
        data.write_image(tmp_path / "a.dcm", image[: shape[0], : shape[1]], like=like)
        written = pydicom.dcmread(tmp_path / "a.dcm")
        assert written.PatientID == pydicom.dcmread(like).PatientID
        assert written.pixel_array.shape == shape
    (tmp_path / "bare.dcm").write_bytes(b"\0" * 300)
    with pytest.raises(ValueError, match=r"bare\.dcm: a DICOM header that does not say what it is of"):
        data.write_image(tmp_path / "a.dcm", image, like=tmp_path / "bare.dcm")


@pytest.mark.parametrize(
    "characters, name",
    [
        (None, "Plain^Name"),
        ("ISO_IR 100", "Müller^Jürgen"),
        ("ISO_IR 144", "Люкc^O"),
        ("ISO_IR 192", "山田^太郎"),
    ],
)
def test_names_in_any_writing(tmp_path, characters, name):
    source = pydicom.dcmread(CT)
    source.SpecificCharacterSet, source.PatientName = characters, name
    source.save_as(tmp_path / "source.dcm")
    for description in ("plain", "größer: α", r"folder\file"):
        data.write_image(
            tmp_path / "a.dcm", noise(128, 128), tmp_path / "source.dcm", description=description
        )
        written = pydicom.dcmread(tmp_path / "a.dcm")
        assert written.PatientName == name
        assert written.SeriesDescription == description.replace("\\", "/")
    data.write_image(tmp_path / "a.dcm", noise(4, 4), description="größer: α" * 20)
    assert pydicom.dcmread(tmp_path / "a.dcm").SeriesDescription == "größer: α" * 5 + "grö"


def test_window_of_ct(tmp_path):
    source = pydicom.dcmread(CT)
    source.WindowCenter, source.WindowWidth = 40, 400
    source.save_as(tmp_path / "source.dcm")
    image = data.read_image(CT).image
    data.write_image(tmp_path / "a.dcm", image, tmp_path / "source.dcm")
    data.write_image(tmp_path / "b.dcm", image, tmp_path / "source.dcm", window=(-1000, 0))
    data.write_image(tmp_path / "c.dcm", image)
    a, b, c = (pydicom.dcmread(tmp_path / f"{name}.dcm") for name in "abc")
    assert (a.WindowCenter, a.WindowWidth) == (40, 400)
    assert (b.WindowCenter, b.WindowWidth, b.VOILUTFunction) == (-500, 1000, "LINEAR_EXACT")
    assert c.WindowCenter - c.WindowWidth / 2 == pytest.approx(image.min().item(), abs=1e-6)
    assert c.WindowCenter + c.WindowWidth / 2 == pytest.approx(image.max().item(), abs=1e-6)


def test_mr_keeps_its_values(tmp_path):
    image = data.read_image(MR).image * 0.37 + 0.1
    data.write_image(tmp_path / "new.dcm", image, like=MR)
    written = pydicom.dcmread(tmp_path / "new.dcm")
    np.testing.assert_allclose(
        data.read_image(tmp_path / "new.dcm").image, image, rtol=0, atol=float(written.RescaleSlope) * 0.51
    )
    assert (written.Modality, written.PatientID) == ("MR", "4MR1")


@pytest.mark.parametrize("values", [1e-9, 3.7e8, -2.5])
def test_any_scale_loses_half_a_step(tmp_path, values):
    for image in (values * noise(16, 17) + values, torch.full((3, 3), values)):
        data.write_image(tmp_path / "a.dcm", image)
        written = pydicom.dcmread(tmp_path / "a.dcm")
        found = written.pixel_array * float(written.RescaleSlope) + float(written.RescaleIntercept)
        step = float(image.max() - image.min()) / 65535
        # Ten digits of slope and intercept.
        np.testing.assert_allclose(found, image.double(), rtol=1e-8, atol=0.501 * step)
        assert len(str(written.RescaleSlope)) <= 16
        assert len(str(written.RescaleIntercept)) <= 16


def test_dicom_without_a_source(tmp_path):
    data.write_image(tmp_path / "a.dcm", noise(5, 6), voxel_size=(3, 0.5, 0.25))
    written = pydicom.dcmread(tmp_path / "a.dcm")
    assert written.SOPClassUID.name == "Secondary Capture Image Storage"
    assert written.Modality == "OT"
    assert written.PixelSpacing == [0.5, 0.25]
    for name in (
        "PatientID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "ReferringPhysicianName",
        "ConversionType",
    ):
        assert name in written
    np.save(tmp_path / "a.npy", np.zeros((5, 6)))
    data.write_image(tmp_path / "b.dcm", noise(5, 6), like=tmp_path / "a.npy")
    assert pydicom.dcmread(tmp_path / "b.dcm").Modality == "OT"


def test_sources_that_do_not_fit(tmp_path):
    with pytest.raises(
        ValueError, match=r"CT_small\.dcm: its image has 128 rows and 128 columns, .* 64 and 128"
    ):
        data.write_image(tmp_path / "a.dcm", noise(64, 128), like=CT)
    with pytest.raises(ValueError, match=r"rtdose\.dcm: a DICOM file of several frames"):
        data.write_image(tmp_path / "a.dcm", noise(10, 10), like=get_testdata_file("rtdose.dcm"))
    assert list(tmp_path.iterdir()) == []


def test_colour_and_overlay_sources(tmp_path):
    source = pydicom.dcmread(CT)
    source.PhotometricInterpretation = "PALETTE COLOR"
    source.add_new(0x60000010, "US", 128)
    source.add_new("SmallestImagePixelValue", "US", 3)
    source.save_as(tmp_path / "source.dcm")
    data.write_image(tmp_path / "a.dcm", noise(128, 128).abs(), like=tmp_path / "source.dcm")
    written = pydicom.dcmread(tmp_path / "a.dcm")
    assert written.PhotometricInterpretation == "MONOCHROME2"
    assert 0x60000010 not in written
    assert "SmallestImagePixelValue" not in written


# ------------------------------------------------------------------ TIFF, PNG, NIfTI


def test_tiff_resolution(tmp_path):
    data.write_image(tmp_path / "a.tif", noise(5, 6), voxel_size=(1, 0.5, 0.25))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages[0]
        assert page.dtype == np.float32
        assert page.resolution == (40.0, 20.0)
        assert page.resolutionunit == tifffile.RESUNIT.CENTIMETER
    data.write_image(tmp_path / "b.tif", data.read_image(CT).image, like=CT)
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        assert file.pages[0].resolution[0] == pytest.approx(10 / 0.661468, rel=1e-5)


@pytest.mark.parametrize("bits", [8, 16])
def test_png_window(tmp_path, bits):
    image = torch.tensor([[-1.0, 0.0], [0.5, 3.0]])
    data.write_image(tmp_path / "a.png", image, window=(0, 2), bits=bits, voxel_size=(1, 0.1, 0.1))
    with Image.open(tmp_path / "a.png") as png:
        assert png.text["Window"] == "0 2"
        assert png.info["dpi"] == pytest.approx((254, 254), rel=1e-3)
        assert png.mode == ("L" if bits == 8 else "I;16")
    largest = 2**bits - 1
    assert read(tmp_path / "a.png").tolist() == [[0, 0], [round(largest / 4), largest]]
    data.write_image(tmp_path / "flat.png", torch.full((2, 2), 3.0), bits=bits)
    assert read(tmp_path / "flat.png").tolist() == [[0, 0], [0, 0]]


def test_nifti_keeps_where_the_voxels_lie(tmp_path):
    affine = np.array([[0, -0.5, 0, 3], [0.25, 0, 0, -7], [0, 0, 2, 11], [0, 0, 0, 1]])
    volume = noise(3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(volume.numpy().T, affine), tmp_path / "source.nii.gz")
    data.write_image(tmp_path / "a.nii", volume, like=tmp_path / "source.nii.gz")
    np.testing.assert_allclose(nibabel.load(tmp_path / "a.nii").affine, affine)
    assert torch.equal(data.read_nifti(tmp_path / "a.nii")[0], volume)
    # Of other voxels only the size is kept.
    data.write_image(tmp_path / "b.nii", volume[0], like=tmp_path / "source.nii.gz")
    assert data.read_nifti(tmp_path / "b.nii")[1][1:] == pytest.approx((0.5, 0.25))
    data.write_image(tmp_path / "c.nii", data.read_image(CT).image, like=CT)
    assert data.read_nifti(tmp_path / "c.nii")[1][1:] == pytest.approx((0.661468, 0.661468))


def test_voxel_size_of_kspace(tmp_path):
    xml = """<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding><encodedSpace>
      <matrixSize><x>8</x><y>4</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>16</x><y>12</y><z>5</z></fieldOfView_mm></encodedSpace></encoding></ismrmrdHeader>"""
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["kspace"], file["ismrmrd_header"] = np.ones((2, 3, 8, 4), np.complex64), xml
    data.write_image(tmp_path / "a.nii.gz", noise(8, 4), like=tmp_path / "scan.h5")
    assert data.read_nifti(tmp_path / "a.nii.gz")[1] == pytest.approx((5, 2, 3))


# ------------------------------------------------------------------ read_array


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.complex128])
def test_arrays(tmp_path, shape, dtype):
    values = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    np.savez(tmp_path / "a.npz", sinogram=values)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file["measured/sinogram"] = values
    names = ["a.npy", "a.npz", "a.h5"]
    if values.ndim > 1 and dtype != np.complex128:
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
        names.append("a.tif")
    for name in names:
        found = data.read_array(tmp_path / name)
        assert found.dtype == (torch.complex64 if dtype == np.complex128 else torch.float32)
        assert found.is_contiguous()
        np.testing.assert_array_equal(found, values)
    assert torch.equal(data.read_array(tmp_path / "a.npz", "sinogram"), found)
    assert torch.equal(data.read_array(tmp_path / "a.h5", "/measured/sinogram"), found)
    with pytest.raises(ValueError, match=r"a\.npy: it holds one array without a name, not 'b'"):
        data.read_array(tmp_path / "a.npy", "b")


def test_matlab_arrays(tmp_path):
    values = np.arange(12.0).reshape(3, 4)
    pair = np.zeros((4, 3), [("real", "f8"), ("imag", "f8")])
    pair["real"], pair["imag"] = values.T, 2 * values.T
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file["x"], file["z"] = values.T, pair
        for name in "xz":
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    np.testing.assert_array_equal(data.read_array(tmp_path / "a.mat", "x"), values)
    np.testing.assert_array_equal(data.read_array(tmp_path / "a.mat", "z"), values * (1 + 2j))
    with pytest.raises(ValueError, match=r"a\.mat: it holds 2 arrays, name one of: x, z"):
        data.read_array(tmp_path / "a.mat")


def test_arrays_that_are_wrong(tmp_path):
    for values, message in (
        (np.array([["a"]]), "its values are <U1, not numbers"),
        (np.zeros((3, 0)), r"it holds an array of shape \(3, 0\), without values"),
        (np.array([[0, 1], [np.nan, 0]]), r"value \(1, 0\) is nan"),
        (np.array([1e300]), r"value \(0,\) is inf"),
        (np.array([object()]), "it holds Python objects, not numbers"),
    ):
        np.save(tmp_path / "a.npy", values, allow_pickle=True)
        with pytest.raises(ValueError, match=rf"a\.npy: .*{message}"):
            data.read_array(tmp_path / "a.npy")
    shutil.copy(CT, tmp_path / "a.dcm")
    with pytest.raises(ValueError, match=r"a\.dcm: not an NPY, NPZ, TIFF, HDF5 or MATLAB file"):
        data.read_array(tmp_path / "a.dcm")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty: the file is empty"):
        data.read_array(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nothing"):
        data.read_array(tmp_path / "nothing")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("g")
    with pytest.raises(ValueError, match=r"a\.h5: it holds 0 arrays"):
        data.read_array(tmp_path / "a.h5")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["npy", "npz", "tif", "pages.tif", "h5"])
def test_truncated_arrays_are_named(tmp_path, kind, kept):
    values = np.random.default_rng(0).random((6, 32, 32)).astype(np.float32)
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, values)
    elif kind == "npz":
        np.savez(buffer, values)
    elif kind == "tif":
        tifffile.imwrite(buffer, values)
    elif kind == "pages.tif":
        with tifffile.TiffWriter(buffer) as writer:
            for page in values:
                writer.write(page, metadata=None, contiguous=False)
    else:
        with h5py.File(buffer, "w") as file:
            file.create_dataset("x", data=values, chunks=(1, 32, 32))
    content = buffer.getvalue()
    path = tmp_path / f"half.{kind}"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"half\.{kind}: ."):
        data.read_array(path)
