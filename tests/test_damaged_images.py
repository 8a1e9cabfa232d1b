"""Files that are damaged at random end in the right values or in one sentence that names them."""

import time
import tracemalloc

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image

from oder_fast import data

LARGEST = 2**26
"""Bytes that reading a damaged file of some kB may take."""

# Libraries warn of what they read, and DICOM of what its headers say.
pytestmark = pytest.mark.filterwarnings("ignore")


def write_pages(path, values):
    with tifffile.TiffWriter(path) as writer:
        for page in values:
            writer.write(page, contiguous=False)


def write_dicom(path, values, compressed):
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.NuclearMedicineImageStorage, "1.2.3"
    dataset.Modality, dataset.PatientID, dataset.ImageType = "NM", "somebody", ["ORIGINAL", "PRIMARY"]
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.PixelSpacing, dataset.RescaleSlope, dataset.RescaleIntercept = [0.5, 0.5], 2, -1
    dataset.PixelData = values.tobytes()
    if compressed:
        dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(path, enforce_file_format=True, implicit_vr=False, little_endian=True)


def write_nifti(path, values):
    nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), path)


WRITERS = {
    "stack.tif": lambda path, values: tifffile.imwrite(path, values, photometric="minisblack"),
    "pages.tif": write_pages,
    "zip.tif": lambda path, values: tifffile.imwrite(
        path, values, photometric="minisblack", compression="zlib", bigtiff=True, byteorder=">"
    ),
    "imagej.tif": lambda path, values: tifffile.imwrite(path, values, imagej=True),
    "a.ome.tif": lambda path, values: tifffile.imwrite(path, values, photometric="minisblack"),
    "rle.dcm": lambda path, values: write_dicom(path, values, compressed=True),
    "frames.dcm": lambda path, values: write_dicom(path, values, compressed=False),
    "a.npy": np.save,
    "a.npz": lambda path, values: np.savez_compressed(path, a=values),
    "a.nii": write_nifti,
    "a.nii.gz": write_nifti,
    "a.png": lambda path, values: Image.fromarray(values[0]).save(path),
}


def damaged(content, generator):
    """Return the content cut off, with bits flipped, or with zeros, and whether all before its end is as it was."""
    kind = generator.integers(3)
    result = bytearray(content)
    # Headers are at the beginning, and directories at the end.
    end = len(content) if generator.random() < 0.5 else min(len(content), 1500)
    at = int(generator.integers(end))
    if kind == 0:
        return content[: at if generator.random() < 0.5 else len(content) - 1 - at // 8], True
    if kind == 1:
        for _ in range(int(generator.integers(1, 6))):
            result[int(generator.integers(end))] ^= 1 << int(generator.integers(8))
    else:
        result[at : at + int(generator.integers(1, 64))] = bytes(len(result[at : at + 64]))[:64]
        result = result[: len(content)]
    return bytes(result), False


def read_all(path):
    return [sample.image.numpy() for sample in data.ImageFolder([path], scale="none")]


def check(path, write, seeds):
    values = np.random.default_rng(0).integers(1, 30000, (3, 24, 20)).astype(np.uint16)
    write(path, values)
    content, expected = path.read_bytes(), read_all(path)
    readers = [read_all, lambda path: data.read_image(path)]
    if path.suffix in (".tif", ".npy", ".npz"):
        readers.append(data.read_array)
    if ".nii" in path.name:
        readers = [read_all, data.read_nifti]
    for seed in seeds:
        generator = np.random.default_rng(seed)
        part, whole = damaged(content, generator)
        path.write_bytes(part)
        for read in readers:
            # Of the processor: others may be at work on it.
            started = time.process_time()
            tracemalloc.reset_peak()
            message, found = "", None
            try:
                found = read(path)
            except ValueError as error:
                message = str(error)
            assert found is not None or message.startswith(str(path)), (seed, message)
            if found is not None and whole and read is read_all:
                assert len(found) == len(expected), seed
                assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), seed
            assert tracemalloc.get_traced_memory()[1] < LARGEST, seed
            assert time.process_time() - started < 5, seed


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", WRITERS)
def test_ten_damaged_files(tmp_path, traced, name):
    check(tmp_path / name, WRITERS[name], range(10))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WRITERS)
def test_many_damaged_files(tmp_path, traced, name):
    check(tmp_path / name, WRITERS[name], range(10, 400))
