"""Read images of real formats whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._extras import needs
from .colours import grey
from .dicom import check_dicom, check_frame, frames_of, is_hounsfield, looks_like_dicom, read_dicom
from .files import TIFF_SIGNATURES, PathLike, first_bad, map_npy, naming, npz_layout, npz_name, read_npz
from .tiff import read_tiff, tiff_layout

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


class ImageFile(NamedTuple):
    """An image as read from a file.

    Attributes:
        image: Shape ``(H, W)``, float32.
        metadata: ``format``, ``unit`` (of the values), and where the file says so ``pixel_spacing``, the
            distance of rows and of columns in mm, ``inverted``, True where low values are to be shown bright
            (MONOCHROME1, MinIsWhite), and ``left_out``, the numbers of pages of a TIFF file that are reduced copies or
            masks of others.
    """

    image: Tensor
    metadata: dict[str, Any]


class ImageHeader(NamedTuple):
    """What a file says of its images before they are read.

    Attributes:
        format: Kind of the file.
        stack: Lengths of the axes before rows and columns, none for one image alone.
        shapes: Rows and columns of each image.
        patient: Whom it shows, or else the study it belongs to, where the file says so.
        left_out: Numbers of images left out, by reason.
        warning: What is unusual about its values, if anything.
    """

    format: str
    stack: tuple[int, ...]
    shapes: list[tuple[int, int]]
    patient: str | None = None
    left_out: dict[str, int] = {}  # noqa: RUF012
    warning: str | None = None

    @property
    def frames(self) -> int | None:
        """Number of images, None for one alone."""
        return math.prod(self.stack) if self.stack else None


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
    if path.suffix.lower() in DICOM_SUFFIXES or looks_like_dicom(head):
        return "DICOM"
    raise ValueError("not a DICOM, TIFF, PNG, NPY or NPZ file")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an array of images without axes of length one that carry nothing.

    Those are the last ones, of channels, and more than one before rows and columns.
    """
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    colours = 1 if len(shape) > 2 and shape[-1] in (2, 3, 4) else 0
    before, image = shape[: len(shape) - 2 - colours], shape[len(shape) - 2 - colours :]
    if len(before) > 1:
        before = tuple(n for n in before if n != 1) or (1,)
    return before + image


def _stack_of(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the lengths of the axes before rows and columns of an array of images, at most one, and these."""
    plain = _without_ones(shape)
    grey_shape = plain[:-1] if len(plain) > 2 and plain[-1] in (2, 3, 4) else plain
    if len(grey_shape) not in (2, 3) or 0 in grey_shape:
        raise ValueError(f"it holds an array of shape {shape}, not images")
    return grey_shape[:-2], (grey_shape[-2], grey_shape[-1])


def pick(values: NDArray[Any], frame: int | None) -> NDArray[Any]:
    """Return one image of an array of them, or all, without axes of length one that carry nothing."""
    values = values.reshape(_without_ones(values.shape))
    if frame is None:
        return values
    stack = _stack_of(values.shape)[0]
    check_frame(stack[0] if stack else None, frame)
    picked: NDArray[Any] = values[frame]
    return picked


def _open_png(path: Path) -> Any:
    needs("reading PNG", "PIL")
    from PIL import Image

    image = Image.open(path, formats=["PNG"])
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        image.close()
        raise ValueError(f"it is an animation of {frames} images")
    return image


def _read_png(path: Path) -> NDArray[Any]:
    with _open_png(path) as image:
        with path.open("rb") as file:
            depth, colour = file.read(26)[24:26]
        if depth == 16 and (colour != 0 or "transparency" in image.info):
            raise ValueError("a PNG of 16 bits with colours or transparency; convert it to greyscale")
        # Before that, chunks further down are not known.
        image.load()
        if "transparency" in image.info:
            return np.asarray(image.convert("RGBA"))
        return np.asarray(image.convert("RGB") if image.mode == "P" else image)


def read_values(path: Path, array: str | None, frame: int | None) -> tuple[NDArray[Any], dict[str, Any]]:
    """Read what an image file holds, or one of several frames, kinds of numbers as stored, and grey ones as such."""
    kind = format_of(path)
    if array is not None and kind != "NPZ":
        raise ValueError(f"a {kind} file has no named arrays")
    metadata: dict[str, Any] = {"unit": "as stored"}
    if kind == "DICOM":
        values, metadata = read_dicom(path, frame)
    elif kind == "PNG":
        values = pick(_read_png(path), frame)
    elif kind == "TIFF":
        layout = tiff_layout(path)
        if frame is not None:
            check_frame(math.prod(layout.stack) if layout.stack else None, frame)
        values = read_tiff(path, frame)
        metadata |= {"inverted": True} if layout.inverted else {}
        metadata |= {"left_out": dict(layout.left_out)} if layout.left_out else {}
    elif kind == "NPY":
        values = pick(map_npy(path), frame)
    else:
        values = pick(read_npz(path, array), frame)
    return grey(values), {"format": kind, **metadata}


def read_header(path: Path, array: str | None = None) -> ImageHeader:
    """Read what a DICOM, TIFF, PNG, NPY or NPZ file says of its images, not the images.

    Of images stored as colours the pixels are read, too, but for arrays: only they tell whether these are grey.

    Raises:
        OSError: Where the file is missing or unreadable.
        NoImageError: For a DICOM file that is made to hold no image, a CT localizer, a capture of the screen or an
            image in colours.
        ValueError: For a header that is damaged, or of something else than grey images.
    """
    kind = format_of(path)
    if kind == "DICOM":
        dataset = check_dicom(path)
        frames, shape = frames_of(dataset), (int(dataset.Rows), int(dataset.Columns))
        patient = str(dataset.get("PatientID") or dataset.get("StudyInstanceUID") or "") or None
        of_frames = () if frames is None else (frames,)
        warning = None
        if dataset.get("Modality") == "CT" and not is_hounsfield(dataset):
            warning = (
                "a CT image without a rescale to Hounsfield units: its values are as stored, not in 1/mm"
            )
        return ImageHeader(kind, of_frames, [shape] * (frames or 1), patient, warning=warning)
    if kind == "PNG":
        with _open_png(path) as image:
            shape, coloured = (image.height, image.width), image.mode not in ("1", "L", "I", "I;16", "I;16B")
        if coloured:
            grey(_read_png(path))
        return ImageHeader(kind, (), [shape])
    if kind == "TIFF":
        layout = tiff_layout(path)
        if layout.coloured:
            for frame in range(math.prod(layout.stack)):
                read_values(path, None, frame if layout.stack else None)
        return ImageHeader(kind, layout.stack, layout.shapes, None, layout.left_out)
    if kind == "NPY":
        axes, dtype = map_npy(path).shape, map_npy(path).dtype
    else:
        axes, dtype = npz_layout(path, lambda names: npz_name(names, array))
    if dtype.kind not in "biufc":
        raise ValueError(f"its values are {dtype}, not numbers")
    stack, shape = _stack_of(axes)
    return ImageHeader(kind, stack, [shape] * math.prod(stack))


def read_image(path: PathLike, array: str | None = None, frame: int | None = None) -> ImageFile:
    r"""Read a two-dimensional image from a DICOM, TIFF, PNG, NPY or NPZ file.

    The kind of file is told from its content. A CT slice in DICOM becomes the linear attenuation coefficient

    .. math:: \mu = \mu_w (1 + \mathrm{HU} / 1000), \quad \mu_w = 0.02 / \mathrm{mm},

    clipped at 0, from its Hounsfield units (stored values times rescale slope plus intercept). A missing slope is 1, a
    missing intercept 0. The values of a CT file without either are not converted, nor are unsigned ones that a
    rescale leaves as they are, unless it says that they are Hounsfield units; ``metadata["unit"]`` tells. Other values
    are returned as stored, those of DICOM rescaled. A grey image stored as RGB, or through a palette, is returned as
    grey; one whose low values are to be shown bright is not inverted. Axes of length one are dropped.

    Args:
        path: The file.
        array: Which array of an NPZ file; needed only where there are several.
        frame: Which one of several, counted from 0: frame of a DICOM file, page of a TIFF file (of a hyperstack, the
            last axis running fastest), entry along the first axis of an array. None for a file with one image alone.

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
        if values.ndim == 3 and len(values) == 1:
            values = values[0]
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
