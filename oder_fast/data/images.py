"""Read images of real formats whole or not at all; write files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PathLike = str | os.PathLike[str]

WATER_ATTENUATION = 0.02
"""Linear attenuation coefficient of water in 1/mm, at about 66 keV."""

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


class ImageFile(NamedTuple):
    """An image as read from a file.

    Attributes:
        image: Shape ``(H, W)``, float32.
        metadata: ``format``, ``unit`` (of the values), and where the file says so ``pixel_spacing``, the
            distance of rows and of columns in mm.
    """

    image: Tensor
    metadata: dict[str, Any]


def _format(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(132)
    if not head:
        raise ValueError("the file is empty")
    if head[128:132] == b"DICM":
        return "DICOM"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head.startswith(b"\x93NUMPY"):
        return "NPY"
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return "NPZ"
    if path.suffix.lower() in DICOM_SUFFIXES:
        return "DICOM"
    raise ValueError("not a DICOM, TIFF, PNG, NPY or NPZ file")


def _read_dicom(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    import pydicom
    from pydicom.pixels import apply_modality_lut

    dataset = pydicom.dcmread(path, force=True)
    if "PixelData" not in dataset:
        raise ValueError("it holds no pixel data (not an image, or truncated)")
    values = apply_modality_lut(dataset.pixel_array, dataset)
    metadata: dict[str, Any] = {"unit": "as stored"}
    if "PixelSpacing" in dataset:
        metadata["pixel_spacing"] = tuple(float(s) for s in dataset.PixelSpacing)
    if dataset.get("Modality") == "CT":
        values = np.maximum(WATER_ATTENUATION * (1 + values / 1000), 0)
        metadata["unit"] = "1/mm"
    return values, metadata


def _read_png(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        with path.open("rb") as file:
            depth, colour = file.read(26)[24:26]
        if depth == 16 and colour != 0:
            raise ValueError("a PNG of 16 bits with colours or transparency; convert it to greyscale")
        values = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    return values, {"unit": "as stored"}


def _read_tiff(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    import tifffile

    return tifffile.imread(path), {"unit": "as stored"}


def _read_npy(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    return np.load(path, allow_pickle=False), {"unit": "as stored"}


def _read_npz(path: Path, array: str | None) -> tuple[NDArray[Any], dict[str, Any]]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if array is None and len(archive.files) != 1:
            raise ValueError(f"it holds {len(archive.files)} arrays, name one of: {', '.join(archive.files)}")
        if array is not None and array not in archive.files:
            raise ValueError(f"it holds no array {array!r}, only: {', '.join(archive.files)}")
        return archive[array or archive.files[0]], {"unit": "as stored"}


def _grey(values: NDArray[Any]) -> NDArray[Any]:
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


def read_image(path: PathLike, array: str | None = None) -> ImageFile:
    r"""Read a two-dimensional image from a DICOM, TIFF, PNG, NPY or NPZ file.

    The kind of file is told from its content. A CT slice in DICOM becomes the linear attenuation coefficient

    .. math:: \mu = \mu_w (1 + \mathrm{HU} / 1000), \quad \mu_w = 0.02 / \mathrm{mm},

    clipped at 0, from its Hounsfield units (stored values times rescale slope plus intercept); other values
    are returned as stored. A grey image stored as RGB is returned as grey.

    Args:
        path: The file.
        array: Which array of an NPZ file; needed only where there are several.

    Returns:
        The image ``(H, W)``, float32, and what the file says about it.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file that is truncated, not an image, not two-dimensional, or holds NaN or Inf;
            the message names the file and the reason.

    Example:
        >>> import pydicom.data
        >>> image, metadata = read_image(pydicom.data.get_testdata_file("CT_small.dcm"))
        >>> tuple(image.shape), metadata["unit"]
        ((128, 128), '1/mm')
    """
    path = Path(path)
    try:
        kind = _format(path)
        if array is not None and kind != "NPZ":
            raise ValueError(f"a {kind} file has no named arrays")
        if kind == "NPZ":
            values, metadata = _read_npz(path, array)
        else:
            read = {"DICOM": _read_dicom, "PNG": _read_png, "TIFF": _read_tiff, "NPY": _read_npy}[kind]
            values, metadata = read(path)
        values = _grey(values)
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"it holds an array of shape {values.shape}, not a two-dimensional image")
        if values.dtype.kind not in "biuf":
            raise ValueError(f"its values are {values.dtype}, not real numbers")
        with np.errstate(over="ignore"):
            image = torch.from_numpy(np.array(values, dtype=np.float32))
    except OSError as error:
        # Decoders report damaged content as an OSError without an errno.
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    bad = (~image.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(f"{path}: pixel ({row}, {column}) is {float(image[row, column])}")
    return ImageFile(image, {"format": kind, **metadata})


@contextmanager
def atomic(path: PathLike) -> Iterator[Path]:
    """Give a temporary name in the folder of `path` to write to; rename it to `path` only on success.

    Args:
        path: The file to be written; an existing one is replaced.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic(folder / "result.txt") as temporary:
        ...     _ = temporary.write_text("42")
        >>> [file.name for file in folder.iterdir()]
        ['result.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_npz(path: PathLike, **arrays: Tensor | NDArray[Any] | float) -> None:
    """Write named arrays to a compressed NPZ file, atomically."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"save_npz: path must end in .npz, got {path}")
    with atomic(path) as temporary:
        np.savez_compressed(temporary, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]
