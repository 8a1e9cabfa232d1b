"""DICOM files: which are images, and what the numbers stored in them mean."""

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data import get_testdata_file

from oder_fast import data

STORED = np.arange(48, dtype=np.uint16).reshape(6, 8) * 20
WATER = 0.02


def dataset_of(
    pixels=STORED, modality="CT", kind=uid.CTImageStorage, syntax=uid.ExplicitVRLittleEndian, **elements
):
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.StudyInstanceUID = kind, "1.2.3", "1.2"
    dataset.Modality, dataset.PatientID = modality, "p"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def write(path, *args, **elements):
    dataset_of(*args, **elements).save_as(path, enforce_file_format=True)
    return path


def check_rescaled(path, expected, unit):
    image, metadata = data.read_image(path)
    np.testing.assert_allclose(image, expected, rtol=1e-6, atol=1e-9)
    assert metadata["unit"] == unit


# ------------------------------------------------------------------ rescale


@pytest.mark.parametrize("slope", [None, "2", "1"])
@pytest.mark.parametrize("intercept", [None, "-1024"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_slope_is_1_and_a_missing_intercept_0(tmp_path, slope, intercept, empty):
    given = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    elements = {name: value for name, value in given.items() if empty or value is not None}
    meant = STORED * float(slope or 1) + float(intercept or 0)
    check_rescaled(write(tmp_path / "mr.dcm", modality="MR", **elements), meant, "as stored")
    path = write(tmp_path / "ct.dcm", **elements)
    if slope == "2" or intercept is not None:
        check_rescaled(path, np.maximum(WATER * (1 + meant / 1000), 0), "1/mm")
    else:
        check_rescaled(path, STORED, "as stored")


def test_what_is_in_hounsfield_units(tmp_path):
    identity = {"RescaleSlope": "1", "RescaleIntercept": "0"}
    attenuation = WATER * (1 + STORED / 1000)
    signed = STORED.astype(np.int16)
    check_rescaled(write(tmp_path / "a.dcm", signed, **identity), attenuation, "1/mm")
    check_rescaled(write(tmp_path / "b.dcm", STORED, **identity, RescaleType="HU"), attenuation, "1/mm")
    check_rescaled(write(tmp_path / "c.dcm", signed, **identity, RescaleType="Z_EFF"), STORED, "as stored")
    check_rescaled(write(tmp_path / "d.dcm", signed), STORED, "as stored")


def test_ct_that_is_in_other_units_is_told_of(tmp_path):
    write(tmp_path / "a.dcm")
    write(tmp_path / "b.dcm")
    write(tmp_path / "c.dcm", RescaleIntercept="-1024")
    with pytest.warns(
        UserWarning, match=r"ImageFolder: 2 of a CT image without a rescale .*; the first is .*a\.dcm"
    ):
        data.ImageFolder(tmp_path)


@pytest.mark.parametrize(
    "elements, message",
    [
        ({"RescaleSlope": "0", "RescaleIntercept": "5"}, "its rescale slope is 0"),
        ({"BitsAllocated": None}, "its header has no BitsAllocated"),
        ({"SamplesPerPixel": None}, "its header has no SamplesPerPixel"),
        ({"Rows": 7}, r"its pixels are 96 bytes, 16 fewer than its header says \(truncated\)"),
        ({"Rows": 3}, "its header says 1 frames, and its pixels are 2"),
    ],
)
def test_headers_that_do_not_fit(tmp_path, elements, message):
    path = write(tmp_path / "a.dcm", modality="MR", **elements)
    with pytest.raises(ValueError, match=rf"a\.dcm: {message}"):
        data.read_image(path)


def table(entries, kind):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries), 0, 16]
    item.add_new(0x00283006, "OW", np.asarray(entries, "<u2").tobytes())
    item.ModalityLUTType = kind
    return item


def test_tables_in_place_of_a_rescale(tmp_path):
    tables = [table(np.arange(1000) * 2, "US")]
    check_rescaled(
        write(tmp_path / "a.dcm", modality="MR", ModalityLUTSequence=tables), STORED * 2, "as stored"
    )
    check_rescaled(write(tmp_path / "b.dcm", ModalityLUTSequence=tables), STORED * 2, "as stored")
    tables = [table(np.arange(1000) * 2, "HU")]
    check_rescaled(write(tmp_path / "c.dcm", ModalityLUTSequence=tables), WATER * (1 + STORED / 500), "1/mm")
    check_rescaled(write(tmp_path / "d.dcm", modality="MR", ModalityLUTSequence=[]), STORED, "as stored")


def test_each_frame_has_its_rescale_also_in_a_volume(tmp_path):
    groups = []
    for slope in (2, 3):
        transformation = pydicom.Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, 1
        groups.append(pydicom.Dataset())
        groups[-1].PixelValueTransformationSequence = [transformation]
    path = write(
        tmp_path / "a.dcm", np.stack([STORED, STORED]), "MR", PerFrameFunctionalGroupsSequence=groups
    )
    expected = np.stack([STORED * 2 + 1, STORED * 3 + 1])
    np.testing.assert_array_equal(data.ImageFolder(path, scale="none", volumes=True)[0].image.real, expected)
    np.testing.assert_array_equal(data.read_image(path, frame=1).image, expected[1])


@pytest.mark.parametrize("spacing", [None, [0, 0], [0.5, 0], [-1, 1]])
def test_a_spacing_that_is_none(tmp_path, spacing):
    path = write(tmp_path / "a.dcm", modality="MR", PixelSpacing=spacing)
    assert "pixel_spacing" not in data.read_image(path).metadata
    data.write_image(tmp_path / "out.tif", data.read_image(path).image, like=path)


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_a_spacing_that_is_text(tmp_path):
    path = write(tmp_path / "a.dcm", modality="MR", PixelSpacing=[0.25, 0.25])
    path.write_bytes(path.read_bytes().replace(b"0.25\\0.25 ", b"none\\none "))
    assert data.read_image(path).metadata == {"format": "DICOM", "unit": "as stored"}


def test_low_values_that_are_shown_bright(tmp_path):
    path = write(tmp_path / "a.dcm", modality="CR", PhotometricInterpretation="MONOCHROME1")
    image, metadata = data.read_image(path)
    np.testing.assert_array_equal(image, STORED)
    assert metadata["inverted"] is True


# ------------------------------------------------------------------ colours


def with_palette(path, tables):
    index = (STORED // 5).astype(np.uint8)
    dataset = dataset_of(index, "US", uid.UltrasoundImageStorage, PhotometricInterpretation="PALETTE COLOR")
    for colour, entries in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(dataset, f"{colour}PaletteColorLookupTableData", entries.astype("<u2").tobytes())
    dataset.save_as(path, enforce_file_format=True)
    return index


def test_palettes(tmp_path):
    ramp = np.arange(256)
    index = with_palette(tmp_path / "eight.dcm", [(255 - ramp) * 257] * 3)
    np.testing.assert_array_equal(data.read_image(tmp_path / "eight.dcm").image, 255 - index)
    with_palette(tmp_path / "sixteen.dcm", [(255 - ramp) * 100] * 3)
    np.testing.assert_array_equal(
        data.read_image(tmp_path / "sixteen.dcm").image, (255 - index.astype(int)) * 100
    )
    assert len(data.ImageFolder(tmp_path)) == 2
    with_palette(tmp_path / "colour.dcm", [ramp * 257, ramp[::-1] * 257, ramp * 257])
    with pytest.raises(ValueError, match=r"colour\.dcm: it is a colour image"):
        data.read_image(tmp_path / "colour.dcm")
    assert data.ImageFolder(tmp_path).left_out == {"a DICOM image in colours, not in grey": 1}


def write_rgb(path, colours, **elements):
    rgb = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    plane = np.ascontiguousarray(colours[..., 0])
    return write(path, plane, **rgb, **elements, PixelData=np.ascontiguousarray(colours).tobytes())


def test_colours_are_found_when_headers_are_read(tmp_path):
    grey = (STORED // 5).astype(np.uint8)
    write_rgb(tmp_path / "grey.dcm", np.stack([grey] * 3, 2), modality="US")
    path = write_rgb(
        tmp_path / "report.dcm", np.stack([grey, grey, 255 - grey], 2), modality="CT", RescaleSlope="2"
    )
    dataset = data.ImageFolder(tmp_path, scale="none")
    assert dataset.names == ["grey.dcm"]
    np.testing.assert_array_equal(dataset[0].image, grey)
    assert dataset.left_out == {"a DICOM image in colours, not in grey": 1}
    with pytest.raises(ValueError, match=r"report\.dcm: a DICOM image in colours"):
        data.ImageFolder([path])


# ------------------------------------------------------------------ what is an image


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_captures_of_the_screen_are_no_slices(tmp_path, modality):
    write(tmp_path / "slice.dcm", modality="MR")
    path = write(tmp_path / "dose.dcm", modality=modality, kind=uid.SecondaryCaptureImageStorage)
    dataset = data.ImageFolder(tmp_path)
    assert dataset.names == ["slice.dcm"]
    assert dataset.left_out == {f"a capture of the screen ({modality}), not a slice": 1}
    with pytest.raises(ValueError, match=r"dose\.dcm: a capture of the screen"):
        data.ImageFolder([path])
    write(path, modality="OT", kind=uid.SecondaryCaptureImageStorage)
    assert len(data.ImageFolder(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["1.3.12.2.1107.5.9.1", "1.3.46.670589.11.0.0.12.1", "1.2.840.113619.4.30"])
@pytest.mark.parametrize("sized", [True, False])
def test_private_objects_without_an_image_are_left_out(tmp_path, kind, sized):
    write(tmp_path / "slice.dcm", modality="MR")
    other = dataset_of(modality="MR", kind=kind)
    for name in ("PixelData", *(() if sized else ("Rows", "Columns"))):
        delattr(other, name)
    other.save_as(tmp_path / "other.dcm", enforce_file_format=True)
    dataset = data.ImageFolder(tmp_path)
    assert dataset.names == ["slice.dcm"]
    assert dataset.left_out == {f"a DICOM file of the private kind {kind}, without an image": 1}
    # A private kind with an image is one.
    write(tmp_path / "other.dcm", modality="MR", kind=kind)
    assert len(data.ImageFolder(tmp_path)) == 2


def test_an_image_without_pixels_is_damaged(tmp_path):
    dataset = dataset_of(modality="MR", kind=uid.MRImageStorage)
    del dataset.PixelData
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(ValueError, match=r"a\.dcm: it holds no pixel data"):
        data.ImageFolder(tmp_path)


@pytest.mark.parametrize("name", ["a.dcm", "IM0001"])
@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("frames", [1, 3])
def test_files_without_meta_information(tmp_path, name, implicit, frames):
    pixels = STORED if frames == 1 else np.stack([STORED + k for k in range(3)])
    dataset = dataset_of(pixels, RescaleSlope="1", RescaleIntercept="-1024")
    del dataset.file_meta
    pydicom.dcmwrite(
        tmp_path / name, dataset, implicit_vr=implicit, little_endian=True, enforce_file_format=False
    )
    found = data.ImageFolder(tmp_path, scale="none")
    assert len(found) == frames
    for k, sample in enumerate(found):
        expected = np.maximum(WATER * (1 + (STORED + k - 1024.0) / 1000), 0)
        np.testing.assert_allclose(sample.image, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("syntax", [uid.DeflatedExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_other_transfer_syntaxes(tmp_path, syntax):
    path = write(tmp_path / "a.dcm", np.stack([STORED, STORED + 1]), "NM", syntax=syntax, RescaleSlope="2")
    for k, sample in enumerate(data.ImageFolder(path, scale="none")):
        np.testing.assert_array_equal(sample.image, (STORED + k) * 2)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.100", "1.2.840.113619.5.2", "1.2.3.4"])
def test_transfer_syntaxes_that_no_decoder_knows(tmp_path, syntax):
    dataset = dataset_of(modality="MR")
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm", implicit_vr=False, little_endian=True)
    with pytest.raises(ValueError, match=r"a\.dcm: its pixels are stored in a way that no decoder knows"):
        data.ImageFolder(tmp_path)


def test_values_of_examples_are_those_of_pydicom():
    for name in ("MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "image_dfl.dcm"):
        path = get_testdata_file(name)
        np.testing.assert_array_equal(data.read_image(path).image, pydicom.dcmread(path).pixel_array)


def test_ct_in_other_units_is_written_as_it_is(tmp_path):
    source = write(tmp_path / "a.dcm", RescaleSlope="2", RescaleType="Z_EFF")
    image = data.read_image(source).image
    data.write_image(tmp_path / "b.dcm", image, like=source)
    written, metadata = data.read_image(tmp_path / "b.dcm")
    np.testing.assert_allclose(written, image, atol=0.02)
    assert metadata["unit"] == "as stored"
