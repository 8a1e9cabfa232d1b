"""Read images of DICOM files: which hold any, and what the numbers stored in them mean."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._extras import needs
from .colours import ColourError, grey, through_palette

WATER_ATTENUATION = 0.02
"""Linear attenuation coefficient of water in 1/mm, at about 66 keV."""

# What the header of a slice is read for.
HEADER = [
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "ImageType",
    "Modality",
    "ModalityLUTSequence",
    "NumberOfFrames",
    "PatientID",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "Rows",
    "SOPClassUID",
    "SamplesPerPixel",
    "SharedFunctionalGroupsSequence",
    "StudyInstanceUID",
]

# What pixels cannot be read without; of floating point, all but the last two.
NEEDED = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
)

PIXEL_DATA = 0x7FE00010
FLOATS = (0x7FE00008, 0x7FE00009)

SLICES = ("CT", "MR", "PT")
"""Modalities of slices: captures of the screen among them are reports."""


class NoImageError(ValueError):
    """A file in good order that is made to hold no image to learn from."""


class _Pixels(NamedTuple):
    """The element with the pixels: its tag, and its length in bytes, None where they are compressed."""

    tag: int
    length: int | None


class _Bounded(io.BufferedReader):
    """A file that is asked for no more than it holds, whatever length an element says that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = max(0, min(size, self.size - self.tell()))
        return super().read(size)


def looks_like_dicom(head: bytes) -> bool:
    """Tell whether the first 132 bytes of a file are those of a DICOM file, with its preamble or without."""
    if head[128:132] == b"DICM":
        return True
    # The first element is of the file meta information (0002) or of group 0008, of small number and length.
    if len(head) < 12 or head[:2] not in (b"\x02\0", b"\x08\0") or head[3]:
        return False
    return head[4:6] in (b"UL", b"UI", b"CS", b"OB", b"DA", b"TM", b"DT") or (
        0 < int.from_bytes(head[4:8], "little") <= 128
    )


def dicom_header(path: Path, tags: list[str] | None = None) -> tuple[Any, _Pixels | None]:
    """Read the header of a DICOM file, or the elements named, and what is said of its pixels.

    A file without a transfer syntax gets the one that it was read with: little endian, unless it looks otherwise.
    """
    needs("reading DICOM", "pydicom")
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_partial

    found: list[_Pixels] = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag == PIXEL_DATA or tag in FLOATS:
            found.append(_Pixels(tag, None if length == 0xFFFFFFFF else length))
        return bool(found)

    with _Bounded(path) as file:
        dataset = read_partial(
            file, at_pixels, force=True, specific_tags=tags and [tag_for_keyword(tag) for tag in tags]
        )
    return _with_syntax(dataset), found[0] if found else None


def _whole(path: Path) -> tuple[Any, _Pixels | None]:
    """Read all of a DICOM file, and what is said of its pixels."""
    needs("reading DICOM", "pydicom")
    import pydicom

    dataset = _with_syntax(pydicom.dcmread(io.BytesIO(path.read_bytes()), force=True))
    for tag in (PIXEL_DATA, *FLOATS):
        if tag in dataset:
            element = dataset[tag]
            return dataset, _Pixels(tag, None if element.is_undefined_length else len(element.value or b""))
    return dataset, None


def _with_syntax(dataset: Any) -> Any:
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def frames_of(dataset: Any) -> int | None:
    """Return the number of frames, None of a file with one image."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    return frames if frames > 1 else None


def check_dicom(path: Path) -> Any:
    """Read the header of an image and return it, once nothing in it keeps the pixels from being read.

    Raises:
        NoImageError: For a file that is made to hold no image, a CT localizer, a capture of the screen or an image in
            colours.
        ValueError: For a header that is damaged, or pixels that cannot be decoded here.
    """
    needs("reading DICOM", "pydicom")
    from pydicom.uid import UID

    dataset, pixels = dicom_header(path, HEADER)
    kind = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    name = UID(kind).name
    # An unknown kind is named by its number.
    if name != kind and "Image" not in name:
        raise NoImageError(f"a DICOM file of the kind {name}, not an image")
    if kind and name == kind and pixels is None:
        raise NoImageError(f"a DICOM file of the private kind {kind}, without an image")
    if "LOCALIZER" in (dataset.get("ImageType") or ()) and dataset.get("Modality") == "CT":
        raise NoImageError("a CT localizer: a projection, not a slice")
    if "Secondary Capture" in name and dataset.get("Modality") in SLICES:
        raise NoImageError(f"a capture of the screen ({dataset.Modality}), not a slice")
    if not (dataset.get("Rows") and dataset.get("Columns")):
        raise ValueError("it holds no image size (not an image, or truncated)")
    if pixels is None:
        raise ValueError("it holds no pixel data (not an image, or truncated)")
    _check_pixels(dataset, pixels)
    if dataset.SamplesPerPixel != 1 or dataset.PhotometricInterpretation == "PALETTE COLOR":
        try:
            for frame in range(frames_of(dataset) or 1):
                grey(read_dicom(path, frame if frames_of(dataset) else None)[0])
        except ColourError:
            raise NoImageError("a DICOM image in colours, not in grey") from None
    return dataset


def _check_pixels(dataset: Any, pixels: _Pixels) -> None:
    """Raise where pixels cannot be decoded here, or are fewer frames than the header says, or more."""
    from pydicom.pixels import get_decoder

    for element in NEEDED[:3] if pixels.tag in FLOATS else NEEDED:
        if dataset.get(element) in (None, ""):
            raise ValueError(f"its header has no {element}")
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ValueError(f"its pixels are stored in a way that no decoder knows ({syntax.name})") from None
    if not decoder.is_available:
        needed = "; ".join(decoder.missing_dependencies)
        raise ValueError(f"its pixels are compressed ({syntax.name}), which needs another package: {needed}")
    # Compressed ones are counted when they are decoded.
    if pixels.length is None or syntax.is_encapsulated or "422" in dataset.PhotometricInterpretation:
        return
    frames = frames_of(dataset) or 1
    bits = math.prod(
        int(dataset[name].value) for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
    )
    excess = pixels.length - math.ceil(frames * bits / 8)
    if excess < 0:
        raise ValueError(
            f"its pixels are {pixels.length} bytes, {-excess} fewer than its header says (truncated)"
        )
    # One byte makes lengths even.
    if excess > 1 and 8 * excess >= bits:
        raise ValueError(f"its header says {frames} frames, and its pixels are {8 * pixels.length // bits}")


def _functional(dataset: Any, group: str, frame: int) -> Any:
    """Return the part of a header that speaks of a frame's `group`: its own, the shared one, or the header."""
    for name, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(name)
        if groups and index < len(groups) and groups[index].get(group):
            return groups[index][group][0]
    return dataset


def pixel_spacing(dataset: Any, frame: int = 0) -> tuple[float, float] | None:
    """Return the distance of rows and of columns in mm, None where a header has no two numbers above 0."""
    try:
        row, column = (
            float(size) for size in _functional(dataset, "PixelMeasuresSequence", frame).PixelSpacing
        )
    except (AttributeError, TypeError, ValueError):
        return None
    return (row, column) if 0 < row < math.inf and 0 < column < math.inf else None


def read_dicom(path: Path, frame: int | None) -> tuple[NDArray[Any], dict[str, Any]]:
    """Read an image, one of several or all, as what its numbers mean, colours as stored; and what the header says.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file that is damaged, or pixels that cannot be decoded here.
    """
    dataset, pixels = _whole(path) if frame is None else dicom_header(path)
    if pixels is None:
        raise ValueError("it holds no pixel data (not an image, or truncated)")
    _check_pixels(dataset, pixels)
    frames = frames_of(dataset)
    if frame is not None:
        check_frame(frames, frame)
    values = _stored(path, dataset, frame)
    is_attenuation = is_hounsfield(dataset)
    if frames and frame is None:
        values = np.stack([_meant(one, dataset, k, is_attenuation) for k, one in enumerate(values)])
    else:
        values = _meant(values, dataset, frame or 0, is_attenuation)
    metadata: dict[str, Any] = {"unit": "1/mm" if is_attenuation else "as stored"}
    spacing = pixel_spacing(dataset, frame or 0)
    if spacing is not None:
        metadata["pixel_spacing"] = spacing
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        metadata["inverted"] = True
    return values, metadata


def check_frame(frames: int | None, frame: int) -> None:
    """Raise where there is no such frame."""
    if frames is None:
        raise ValueError(f"it holds one image alone, no frame {frame}")
    if not 0 <= frame < frames:
        raise ValueError(f"it holds {frames} frames, frame {frame} is not among them")


def _stored(path: Path, dataset: Any, frame: int | None) -> NDArray[Any]:
    """Return the values of one frame or all, or the colours that they stand for in a palette."""
    from pydicom.pixels import apply_color_lut, pixel_array

    values: NDArray[Any]
    syntax = dataset.file_meta.TransferSyntaxUID
    if frame is None:
        values = pixel_array(dataset)
    elif syntax.is_deflated:
        values = pixel_array(_whole(path)[0], index=frame)
    else:
        with _Bounded(path) as file:
            values = pixel_array(file, index=frame, transfer_syntax_uid=syntax)
    if dataset.get("PhotometricInterpretation") != "PALETTE COLOR":
        return values
    every = np.arange(2 ** int(dataset.BitsStored), dtype=values.dtype)
    return through_palette(values, apply_color_lut(every, dataset))


def _number(dataset: Any, name: str) -> float | None:
    """Return a number of the header, None where it is missing or empty, which are the same."""
    value = dataset.get(name)
    return None if value is None or value == "" else float(value)


def is_hounsfield(dataset: Any) -> bool:
    """Tell whether the values of all frames, rescaled, are Hounsfield units.

    They are where a CT image has a rescale to them. One that changes nothing, of unsigned values, says nothing.
    """
    return dataset.get("Modality") == "CT" and all(
        _to_hounsfield(dataset, _functional(dataset, "PixelValueTransformationSequence", frame))
        for frame in range(frames_of(dataset) or 1)
    )


def _to_hounsfield(dataset: Any, rescale: Any) -> bool:
    tables = rescale.get("ModalityLUTSequence")
    if tables:
        return bool(tables[0].get("ModalityLUTType") == "HU")
    slope, intercept = _number(rescale, "RescaleSlope"), _number(rescale, "RescaleIntercept")
    if slope is None and intercept is None:
        return False
    unit = str(rescale.get("RescaleType") or "US")
    if unit != "US":
        return unit.startswith("HU")
    return dataset.get("PixelRepresentation") != 0 or (slope or 1, intercept or 0) != (1, 0)


def _meant(values: NDArray[Any], dataset: Any, frame: int, is_attenuation: bool) -> NDArray[Any]:
    """Return what stored values mean, of CT the attenuation, with few arrays in between: each takes its time."""
    from pydicom.pixels import apply_modality_lut

    rescale = _functional(dataset, "PixelValueTransformationSequence", frame)
    slope, intercept = 1.0, 0.0
    if rescale.get("ModalityLUTSequence"):
        values = apply_modality_lut(values, rescale)
    else:
        given = _number(rescale, "RescaleSlope"), _number(rescale, "RescaleIntercept")
        slope, intercept = 1.0 if given[0] is None else given[0], given[1] or 0.0
    if slope == 0:
        raise ValueError("its rescale slope is 0, which makes all values the same")
    if is_attenuation:
        slope, intercept = WATER_ATTENUATION * slope / 1000, WATER_ATTENUATION * (1 + intercept / 1000)
    elif (slope, intercept) == (1, 0):
        return values
    values = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    values *= slope
    values += intercept
    return np.maximum(values, 0, out=values) if is_attenuation else values
