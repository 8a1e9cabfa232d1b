"""Write reconstructed images in the formats that others read, whole or not at all."""

from __future__ import annotations

import errno
import math
import os
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._extras import needs
from .dicom import WATER_ATTENUATION, dicom_header, is_hounsfield, pixel_spacing
from .files import PathLike, atomic, first_bad, is_hdf5, naming
from .images import format_of
from .kspace import read_kspace
from .nifti import Size, is_nifti, nifti_affine, nifti_voxel_size, save_nifti

DESCRIPTION = "Regularization by denoising (oder_fast)"

# Of a source header, what speaks of its pixels and not of ours.
OF_PIXELS = (
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "IconImageSequence",
    "LargestImagePixelValue",
    "LargestPixelValueInSeries",
    "ModalityLUTSequence",
    "NumberOfFrames",
    "PaletteColorLookupTableUID",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PlanarConfiguration",
    "SmallestImagePixelValue",
    "SmallestPixelValueInSeries",
    "VOILUTFunction",
    "VOILUTSequence",
    "WindowCenterWidthExplanation",
    *(
        f"{c}PaletteColorLookupTable{what}"
        for c in ("Red", "Green", "Blue")
        for what in ("Data", "Descriptor")
    ),
)

RUN = uuid.uuid4().hex
"""Slices written by one run belong to one study and, of one source series, to one series."""


class _How(NamedTuple):
    """What a writer may need besides the values; see `write_image`."""

    like: Path | None
    voxel_size: Size | None
    window: tuple[float, float] | None
    bits: int
    description: str
    run: str


def _real(values: NDArray[Any]) -> NDArray[Any]:
    return np.abs(values) if np.iscomplexobj(values) else values


def _slice(what: str, values: NDArray[Any]) -> NDArray[Any]:
    if values.ndim != 2:
        raise ValueError(
            f"write_image: a {what} file holds one slice, got an image of shape {values.shape}; write slice by slice"
        )
    return _real(values)


# ------------------------------------------------------------------ DICOM


def _decimal(value: float) -> Any:
    """Return a number as DICOM stores it, in at most 16 characters."""
    from pydicom.valuerep import DSfloat

    return DSfloat(value, auto_format=True)


def _source_header(path: Path, shape: tuple[int, ...]) -> Any:
    import pydicom

    source = pydicom.dcmread(path, force=True, stop_before_pixels=True)
    if not {"SOPClassUID", "SOPInstanceUID", "Modality"} <= set(source.dir()):
        raise ValueError("a DICOM header that does not say what it is of (SOP class, SOP instance, modality)")
    if int(source.get("NumberOfFrames") or 1) > 1 or "SharedFunctionalGroupsSequence" in source:
        raise ValueError("a DICOM file of several frames: its header cannot be that of one slice")
    if (source.get("Rows"), source.get("Columns")) != shape:
        raise ValueError(
            f"its image has {source.get('Rows')} rows and {source.get('Columns')} columns, the one to be written "
            f"{shape[0]} and {shape[1]}: its geometry would be wrong"
        )
    return source


def _derived(source: Any, how: _How) -> Any:
    """Return the header of a source without what speaks of its pixels, as that of an image derived from it."""
    import pydicom
    from pydicom.uid import generate_uid

    header = pydicom.Dataset()
    header.update(
        {element.tag: element for element in source if element.tag.group not in range(0x5000, 0x6100)}
    )
    header.remove_private_tags()
    for name in OF_PIXELS:
        if name in header:
            delattr(header, name)
    reference = pydicom.Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    header.SourceImageSequence = [reference]
    header.ImageType = ["DERIVED", *(source.get("ImageType") or ("", "SECONDARY"))[1:]]
    series = str(source.get("SeriesInstanceUID", ""))
    header.SeriesInstanceUID = generate_uid(entropy_srcs=[how.run, how.description, series])
    header.SeriesNumber = int(source.get("SeriesNumber") or 0) + 1000
    if source.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        header.PhotometricInterpretation = "MONOCHROME2"
    return header


def _captured(how: _How) -> Any:
    """Return the header of an image that nothing is known of: what Secondary Capture asks for."""
    import pydicom
    from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

    header = pydicom.Dataset()
    header.SOPClassUID = SecondaryCaptureImageStorage
    for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"):
        setattr(header, name, "")
    for name in ("ReferringPhysicianName", "StudyID", "AccessionNumber", "Laterality", "PatientOrientation"):
        setattr(header, name, "")
    header.SeriesNumber = header.InstanceNumber = None
    header.StudyInstanceUID = generate_uid(entropy_srcs=[how.run])
    header.SeriesInstanceUID = generate_uid(entropy_srcs=[how.run, how.description])
    header.Modality, header.ConversionType = "OT", "SYN"
    header.ImageType = ["DERIVED", "SECONDARY"]
    header.PhotometricInterpretation = "MONOCHROME2"
    return header


def _write_dicom(path: Path, values: NDArray[Any], how: _How) -> None:
    needs("writing DICOM", "pydicom")
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    values = _slice("DICOM", values).astype(np.float64)
    source = None
    if how.like is not None and format_of(how.like) == "DICOM":
        with naming(how.like):
            source = _source_header(how.like, values.shape)
    header = _captured(how) if source is None else _derived(source, how)
    to_hounsfield = source is not None and is_hounsfield(source)
    if to_hounsfield:
        values = 1000 * (values / WATER_ATTENUATION - 1)
    low, high = float(values.min()), float(values.max())
    # Numbers as they will be read, not as they were before they were cut to 16 characters.
    slope = _decimal((high - low) / 65535) if high > low else _decimal(1.0)
    intercept = _decimal(low)
    stored = np.clip(np.rint((values - float(intercept)) / float(slope)), 0, 65535).astype("<u2")

    now = datetime.now()
    header.SOPInstanceUID = generate_uid()
    header.InstanceCreationDate, header.InstanceCreationTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    if not how.description.isascii():
        header.decode()
        header.SpecificCharacterSet = "ISO_IR 192"
    # A backslash would separate values.
    description = how.description.replace("\\", "/").encode()
    header.SeriesDescription = description[:64].decode(errors="ignore")
    header.DerivationDescription = description[:1024].decode(errors="ignore")
    header.Rows, header.Columns = stored.shape
    header.SamplesPerPixel = 1
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation = 15, 0
    header.RescaleSlope, header.RescaleIntercept = slope, intercept
    # Of CT, an unspecified unit would be taken for Hounsfield.
    header.RescaleType = "HU" if to_hounsfield else "AS STORED" if header.Modality == "CT" else "US"
    if how.voxel_size is not None:
        header.PixelSpacing = [_decimal(size) for size in how.voxel_size[1:]]
    if how.window is not None or not (to_hounsfield and "WindowCenter" in header):
        window = how.window or (low, high if high > low else low + 1)
        header.WindowCenter, header.WindowWidth = _decimal(sum(window) / 2), _decimal(window[1] - window[0])
        # The usual function is not for widths below 1.
        header.VOILUTFunction = "LINEAR_EXACT"
    header.PixelData = stored.tobytes()
    header["PixelData"].VR = "OW"
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)


# ------------------------------------------------------------------ TIFF, PNG, NPY, NPZ, NIfTI


def _write_tiff(path: Path, values: NDArray[Any], how: _How) -> None:
    needs("writing TIFF", "tifffile")
    import tifffile

    spacing: dict[str, Any] = {}
    if how.voxel_size is not None:
        _, row, column = how.voxel_size
        spacing = {"resolution": (10 / column, 10 / row), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, _real(values).astype(np.float32), photometric="minisblack", **spacing)


def _write_png(path: Path, values: NDArray[Any], how: _How) -> None:
    needs("writing PNG", "PIL")
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    values = _slice("PNG", values).astype(np.float64)
    low, high = how.window or (float(values.min()), float(values.max()))
    largest = 2**how.bits - 1
    grey = np.clip((values - low) / (high - low or 1), 0, 1) * largest
    notes = PngInfo()
    notes.add_text("Window", f"{low:.9g} {high:.9g}")
    notes.add_text("Description", how.description)
    spacing: dict[str, Any] = {}
    if how.voxel_size is not None:
        spacing = {"dpi": (25.4 / how.voxel_size[2], 25.4 / how.voxel_size[1])}
    image = Image.fromarray(np.rint(grey).astype(np.uint8 if how.bits == 8 else np.uint16))
    image.save(path, "PNG", pnginfo=notes, **spacing)


def _write_npy(path: Path, values: NDArray[Any], how: _How) -> None:
    # Given a name, NumPy would append a suffix to one in capitals.
    with path.open("wb") as file:
        np.save(file, values)


def _write_npz(path: Path, values: NDArray[Any], how: _How) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, image=values)


def _write_nifti(path: Path, values: NDArray[Any], how: _How) -> None:
    affine = None
    if how.like is not None and is_nifti(how.like):
        with naming(how.like):
            shape, stored = nifti_affine(how.like)
        # Of the same voxels, where they lie in the patient is known, too.
        affine = stored if shape == values.shape else None
    save_nifti(path, values, how.voxel_size or (1.0, 1.0, 1.0), affine, compressed=path.name.endswith(".gz"))


WRITERS: Mapping[str, Callable[[Path, NDArray[Any], _How], None]] = {
    ".dcm": _write_dicom,
    ".dicom": _write_dicom,
    ".tif": _write_tiff,
    ".tiff": _write_tiff,
    ".png": _write_png,
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".nii": _write_nifti,
    ".nii.gz": _write_nifti,
}
"""Writers by the suffix of the file, in lower case."""

HOLD_VOLUMES = (".tif", ".tiff", ".npy", ".npz", ".nii", ".nii.gz")
"""Suffixes of files that take volumes as well as slices."""


def writer_suffix(path: PathLike) -> str:
    """Return the suffix of a file to be written, as in `WRITERS`, to find out early that it is unknown.

    Raises:
        ValueError: Where there is no writer for it; the message lists those there are.

    Example:
        >>> writer_suffix("patient.one.NII.GZ")
        '.nii.gz'
    """
    name = Path(path).name.lower()
    for suffix in sorted(WRITERS, key=len, reverse=True):
        if name.endswith(suffix) and name != suffix:
            return suffix
    raise ValueError(f"{path}: its name must end in one of {', '.join(WRITERS)}")


def _voxel_size(like: Path) -> Size | None:
    """Return the size of voxels (slice, row, column) in mm that a file tells of."""
    with naming(like):
        if is_nifti(like):
            return nifti_voxel_size(like)
        if is_hdf5(like):
            size: Size | None = read_kspace(like, 0).metadata.get("voxel_size")
            return size
        if format_of(like) != "DICOM":
            return None
        header = dicom_header(like)[0]
        spacing = pixel_spacing(header)
        if spacing is None:
            return None
        between = abs(float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1))
        return between, *spacing


def _check(values: Tensor, voxel_size: Size | None, window: tuple[float, float] | None, bits: int) -> None:
    name = "write_image"
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(
            f"{name}: image must be (H, W) or (S, H, W), none of them 0, got {tuple(values.shape)}"
        )
    bad = first_bad(values)
    if bad is not None:
        raise ValueError(f"{name}: image must be finite, value {bad} is {values[bad].item()}")
    if voxel_size is not None and not (
        len(voxel_size) == 3 and all(math.isfinite(size) and size > 0 for size in voxel_size)
    ):
        raise ValueError(f"{name}: voxel_size must be three numbers above 0, got {tuple(voxel_size)}")
    if window is not None and not (len(window) == 2 and -math.inf < window[0] < window[1] < math.inf):
        raise ValueError(f"{name}: window must be (low, high) with low < high, got {tuple(window)}")
    if bits not in (8, 16):
        raise ValueError(f"{name}: bits must be 8 or 16, got {bits}")


def write_image(
    path: PathLike,
    image: Tensor,
    like: PathLike | None = None,
    *,
    voxel_size: Size | None = None,
    window: tuple[float, float] | None = None,
    bits: int = 16,
    description: str = DESCRIPTION,
    run: str = RUN,
) -> None:
    r"""Write an image in the format that the suffix of the file says, atomically.

    - ``.dcm``, ``.dicom``: one slice in 16 bits, over a rescale slope and intercept that span its values. With a DICOM
      file `like`, its header is carried over (patient, study, frame of reference, geometry; without private elements
      and overlays), as a derived image in a new series; slices of one source series, written by one `run` with
      one `description`, are one series again. Where that is CT in Hounsfield units, the image is taken to be the linear
      attenuation coefficient in 1/mm that `read_image` returns, and becomes Hounsfield units. Without one, it is a
      Secondary Capture with values as they are.
    - ``.tif``, ``.tiff``: float32, a page for each slice, with the resolution where the pixel spacing is known.
    - ``.png``: one slice in grey, the `window` brought to all grey values; it is told in the text chunk ``Window``.
    - ``.npy``, ``.npz`` (the array ``image``): as it is.
    - ``.nii``, ``.nii.gz``: float32 or complex64, as `write_nifti`; with a NIfTI file `like` of the same voxels, where
      these lie is carried over.

    Of complex images DICOM, TIFF and PNG files hold the magnitude; the others hold them as they are.

    Args:
        path: The file; an existing one is replaced. Its folder must be there.
        image: Shape ``(H, W)``, or ``(S, H, W)`` for TIFF, NPY, NPZ and NIfTI; real or complex.
        like: File that the measurements were made from or belong to, of which header or voxel size is taken over:
            DICOM, NIfTI, or k-space in HDF5. Others tell nothing.
        voxel_size: Slice, row and column distance in mm, in place of that of `like`.
        window: Values shown as black and as white, of PNG and DICOM (in HU of CT); None for the least and the largest,
            or of CT the window of `like`.
        bits: Of PNG, 8 or 16.
        description: Of the series in DICOM, and in PNG.
        run: What new series in DICOM are told apart by; by default a text of this process's own.

    Raises:
        OSError: Where the file cannot be written, or `like` not be read.
        ValueError: For an unknown suffix, a wrong shape, NaN or Inf, an argument out of range, or a DICOM file `like`
            that has another size or several frames.

    Example:
        >>> import tempfile, torch
        >>> from pydicom.data import get_testdata_file
        >>> from oder_fast.data import read_image
        >>> source = get_testdata_file("CT_small.dcm")
        >>> path = Path(tempfile.mkdtemp()) / "reconstruction.dcm"
        >>> write_image(path, read_image(source).image, like=source)
        >>> bool((read_image(path).image - read_image(source).image).abs().max() < 1e-6)
        True
    """
    path, like = Path(path), None if like is None else Path(like)
    write = WRITERS[writer_suffix(path)]
    values = image.detach().cpu().resolve_conj().resolve_neg()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    _check(values, voxel_size, window, bits)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    if voxel_size is None and like is not None:
        voxel_size = _voxel_size(like)
    with atomic(path) as temporary:
        write(temporary, values.numpy(), _How(like, voxel_size, window, bits, description, run))
