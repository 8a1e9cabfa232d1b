"""Read images of real formats whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import TIFF_SIGNATURES, PathLike, first_bad, map_npy, naming, npz_layout, npz_name, read_npz

WATER_ATTENUATION = 0.02
"""Linear attenuation coefficient of water in 1/mm, at about 66 keV."""

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")

# What the header of a slice is read for.
DICOM_TAGS = [
    "ImageType",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "SOPClassUID",
    "StudyInstanceUID",
]


class ImageFile(NamedTuple):
    """An image as read from a file.

    Attributes:
        image: Shape ``(H, W)``, float32.
        metadata: ``format``, ``unit`` (of the values), and where the file says so ``pixel_spacing``, the
            distance of rows and of columns in mm.
    """

    image: Tensor
    metadata: dict[str, Any]


class ImageHeader(NamedTuple):
    """What a file says of its images before they are read.

    Attributes:
        format: Kind of the file.
        shape: Rows and columns of an image.
        frames: Number of images, None for one alone.
        patient: Whom it shows, or else the study it belongs to, where the file says so.
    """

    format: str
    shape: tuple[int, int]
    frames: int | None
    patient: str | None = None


class NoImageError(ValueError):
    """A file in good order that is made to hold no image to learn from."""


def format_of(path: Path) -> str:
    """Tell the kind of an image file from its content."""
    with path.open("rb") as file:
        head = file.read(132)
    if not head:
        raise ValueError("the file is empty")
    if head[128:132] == b"DICM":
        return "DICOM"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] in TIFF_SIGNATURES:
        return "TIFF"
    if head.startswith(b"\x93NUMPY"):
        return "NPY"
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return "NPZ"
    if path.suffix.lower() in DICOM_SUFFIXES:
        return "DICOM"
    raise ValueError("not a DICOM, TIFF, PNG, NPY or NPZ file")


def _layout(shape: tuple[int, ...]) -> tuple[int | None, tuple[int, int]]:
    """Return the number of frames, None for one image alone, and the rows and columns of stored values."""
    grey = shape[:-1] if len(shape) > 2 and shape[-1] in (2, 3, 4) else shape
    if len(grey) not in (2, 3) or 0 in grey:
        raise ValueError(f"it holds an array of shape {shape}, not images")
    return (grey[0] if len(grey) == 3 else None), (grey[-2], grey[-1])


def _check_frame(frames: int | None, frame: int) -> None:
    if frames is None:
        raise ValueError(f"it holds one image alone, no frame {frame}")
    if not 0 <= frame < frames:
        raise ValueError(f"it holds {frames} frames, frame {frame} is not among them")


def _pick(values: NDArray[Any], frame: int | None) -> NDArray[Any]:
    if frame is None:
        return values
    _check_frame(_layout(values.shape)[0], frame)
    picked: NDArray[Any] = values[frame]
    return picked


def _functional(dataset: Any, group: str, frame: int) -> Any:
    """Return the part of a DICOM header that speaks of a frame's `group`: its own, the shared one, or the header."""
    for name, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(name)
        if groups and index < len(groups) and groups[index].get(group):
            return groups[index][group][0]
    return dataset


def _read_dicom(path: Path, frame: int | None) -> tuple[NDArray[Any], dict[str, Any]]:
    import pydicom
    from pydicom.pixels import pixel_array

    dataset = pydicom.dcmread(path, force=True, stop_before_pixels=frame is not None)
    if frame is None:
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ValueError("it holds no pixel data (not an image, or truncated)")
        values = dataset.pixel_array
    else:
        _check_frame(_dicom_frames(dataset), frame)
        values = pixel_array(path, index=frame)
    rescale = _functional(dataset, "PixelValueTransformationSequence", frame or 0)
    is_ct = dataset.get("Modality") == "CT"
    metadata: dict[str, Any] = {"unit": "1/mm" if is_ct else "as stored"}
    measures = _functional(dataset, "PixelMeasuresSequence", frame or 0)
    if "PixelSpacing" in measures:
        metadata["pixel_spacing"] = tuple(float(s) for s in measures.PixelSpacing)
    return _rescaled(values, rescale, is_ct), metadata


def _rescaled(values: NDArray[Any], rescale: Any, is_ct: bool) -> NDArray[Any]:
    """Return what stored values mean, of CT the attenuation, with few arrays in between: each takes its time."""
    from pydicom.pixels import apply_modality_lut

    slope, intercept = 1.0, 0.0
    if "ModalityLUTSequence" in rescale:
        values = apply_modality_lut(values, rescale)
    elif "RescaleSlope" in rescale and "RescaleIntercept" in rescale:
        slope, intercept = float(rescale.RescaleSlope), float(rescale.RescaleIntercept)
    if is_ct:
        slope, intercept = WATER_ATTENUATION * slope / 1000, WATER_ATTENUATION * (1 + intercept / 1000)
    elif (slope, intercept) == (1, 0):
        return values
    values = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    values *= slope
    values += intercept
    return np.maximum(values, 0, out=values) if is_ct else values


def _dicom_frames(dataset: Any) -> int | None:
    frames = int(dataset.get("NumberOfFrames") or 1)
    return frames if frames > 1 else None


def _dicom_header(path: Path) -> ImageHeader:
    import pydicom

    dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=DICOM_TAGS)
    patient = str(dataset.get("PatientID") or dataset.get("StudyInstanceUID") or "") or None
    kind = dataset.get("SOPClassUID") or getattr(dataset, "file_meta", {}).get("MediaStorageSOPClassUID")
    name = pydicom.uid.UID(str(kind or "")).name
    # An unknown kind is named by its number.
    if name != kind and name and "Image" not in name:
        raise NoImageError(f"a DICOM file of the kind {name}, not an image")
    if "LOCALIZER" in (dataset.get("ImageType") or ()) and dataset.get("Modality") == "CT":
        raise NoImageError("a CT localizer: a projection, not a slice")
    if not (dataset.get("Rows") and dataset.get("Columns")):
        raise ValueError("it holds no image size (not an image, or truncated)")
    _check_decoder(dataset.file_meta.get("TransferSyntaxUID"))
    shape = (int(dataset.Rows), int(dataset.Columns))
    return ImageHeader("DICOM", shape, _dicom_frames(dataset), patient)


def _check_decoder(syntax: Any) -> None:
    from pydicom.pixels import get_decoder

    if syntax is None or not syntax.is_compressed or syntax.name == "Deflated Explicit VR Little Endian":
        return
    decoder = get_decoder(syntax)
    if not decoder.is_available:
        needed = "; ".join(decoder.missing_dependencies)
        raise ValueError(f"its pixels are compressed ({syntax.name}), which needs another package: {needed}")


def _read_png(path: Path) -> NDArray[Any]:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        with path.open("rb") as file:
            depth, colour = file.read(26)[24:26]
        if depth == 16 and colour != 0:
            raise ValueError("a PNG of 16 bits with colours or transparency; convert it to greyscale")
        return np.asarray(image.convert("RGB") if image.mode == "P" else image)


def _read_tiff(path: Path, frame: int | None) -> NDArray[Any]:
    import tifffile

    if frame is None:
        return np.asarray(tifffile.imread(path))
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        frames = _layout(series.shape)[0]
        _check_frame(frames, frame)
        # Some stacks are described as one page.
        if len(series.pages) != frames:
            return _pick(series.asarray(), frame)
        try:
            return np.asarray(file.asarray(key=frame, series=0))
        except IndexError:
            raise ValueError(f"its pages end before frame {frame} (truncated)") from None


def read_values(path: Path, array: str | None, frame: int | None) -> tuple[NDArray[Any], dict[str, Any]]:
    """Read what an image file holds, or one of several frames, colours and kinds of numbers as stored."""
    kind = format_of(path)
    if array is not None and kind != "NPZ":
        raise ValueError(f"a {kind} file has no named arrays")
    metadata: dict[str, Any] = {"unit": "as stored"}
    if kind == "DICOM":
        values, metadata = _read_dicom(path, frame)
    elif kind == "PNG":
        values = _pick(_read_png(path), frame)
    elif kind == "TIFF":
        values = _read_tiff(path, frame)
    elif kind == "NPY":
        values = _pick(np.load(path, allow_pickle=False) if frame is None else map_npy(path), frame)
    else:
        values = _pick(read_npz(path, array), frame)
    return grey(values), {"format": kind, **metadata}


def read_header(path: Path, array: str | None = None) -> ImageHeader:
    """Read what a DICOM, TIFF, PNG, NPY or NPZ file says of its images, not the images.

    Raises:
        OSError: Where the file is missing or unreadable.
        NoImageError: For a DICOM file that is made to hold no image, or a CT localizer.
        ValueError: For a header that is damaged, or of something else than images.
    """
    kind = format_of(path)
    if kind == "DICOM":
        return _dicom_header(path)
    if kind == "PNG":
        from PIL import Image

        with Image.open(path, formats=["PNG"]) as image:
            return ImageHeader(kind, (image.height, image.width), None)
    if kind == "TIFF":
        import tifffile

        with tifffile.TiffFile(path) as file:
            shape, dtype = file.series[0].shape, file.series[0].dtype
    elif kind == "NPY":
        values = map_npy(path)
        shape, dtype = values.shape, values.dtype
    else:
        shape, dtype = npz_layout(path, lambda names: npz_name(names, array))
    if dtype is None or dtype.kind not in "biufc":
        raise ValueError(f"its values are {dtype}, not numbers")
    frames, (height, width) = _layout(shape)
    return ImageHeader(kind, (height, width), frames)


def grey(values: NDArray[Any]) -> NDArray[Any]:
    """Return the one channel of a grey image that is stored as RGB, or with an opaque alpha channel."""
    if values.ndim != 3 or values.shape[2] not in (2, 3, 4):
        return values
    if values.shape[2] in (2, 4):
        if values.dtype.kind != "u" or np.any(values[..., -1] != np.iinfo(values.dtype).max):
            raise ValueError("it has transparent pixels")
        values = values[..., :-1]
    if np.any(values != values[..., :1]):
        raise ValueError("it is a colour image; a grey one is needed")
    return values[..., 0]


def read_image(path: PathLike, array: str | None = None, frame: int | None = None) -> ImageFile:
    r"""Read a two-dimensional image from a DICOM, TIFF, PNG, NPY or NPZ file.

    The kind of file is told from its content. A CT slice in DICOM becomes the linear attenuation coefficient

    .. math:: \mu = \mu_w (1 + \mathrm{HU} / 1000), \quad \mu_w = 0.02 / \mathrm{mm},

    clipped at 0, from its Hounsfield units (stored values times rescale slope plus intercept); other values
    are returned as stored. A grey image stored as RGB is returned as grey.

    Args:
        path: The file.
        array: Which array of an NPZ file; needed only where there are several.
        frame: Which one of several, counted from 0: frame of a DICOM file, page of a TIFF file, entry along the first
            axis of an array. None for a file with one image alone.

    Returns:
        The image ``(H, W)``, float32, and what the file says about it.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file that is truncated, not an image, not two-dimensional, or holds NaN or Inf; for a frame
            that is not there. The message names the file and the reason.

    Example:
        >>> import pydicom.data
        >>> image, metadata = read_image(pydicom.data.get_testdata_file("CT_small.dcm"))
        >>> tuple(image.shape), metadata["unit"]
        ((128, 128), '1/mm')
    """
    path = Path(path)
    with naming(path):
        values, metadata = read_values(path, array, frame)
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"it holds an array of shape {values.shape}, not a two-dimensional image")
        if values.dtype.kind not in "biuf":
            raise ValueError(f"its values are {values.dtype}, not real numbers")
        with np.errstate(over="ignore"):
            image = torch.from_numpy(np.require(values, np.float32, ("C", "W", "O")))
        bad = first_bad(image)
        if bad is not None:
            raise ValueError(f"pixel {bad} is {float(image[bad])}")
    return ImageFile(image, metadata)
