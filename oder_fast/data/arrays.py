"""Read arrays of any number of dimensions, such as sinograms and stacks of intensities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import (
    TIFF_SIGNATURES,
    PathLike,
    first_bad,
    is_hdf5,
    map_npy,
    naming,
    npz_layout,
    npz_name,
    read_npz,
)
from .images import format_of
from .tiff import read_tiff_array, tiff_array_shape


@contextmanager
def _dataset(path: Path, array: str | None) -> Iterator[tuple[Any, bool, bool]]:
    """Give the dataset of an HDF5 file, whether MATLAB stored it, with the first axis last, and complex as pairs."""
    import h5py

    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        dataset = file[npz_name(names, array if array is None else array.strip("/"))]
        yield dataset, "MATLAB_class" in dataset.attrs, dataset.dtype.names == ("real", "imag")


def _read_hdf5(path: Path, array: str | None) -> NDArray[Any]:
    with _dataset(path, array) as (dataset, reversed_axes, pairs):
        values = np.asarray(dataset[()])
    if pairs:
        values = values["real"] + 1j * values["imag"]
    return values.T if reversed_axes else values


def array_layout(path: Path, array: str | None) -> tuple[tuple[int, ...], bool]:
    """Return the shape of the array that `read_array` reads, and whether it is complex, without reading it.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file of another kind, or an array that is not there.
    """
    if is_hdf5(path):
        with _dataset(path, array) as (dataset, reversed_axes, pairs):
            shape = tuple(dataset.shape)
            return (shape[::-1] if reversed_axes else shape), pairs or dataset.dtype.kind == "c"
    kind = format_of(path)
    if kind == "NPY":
        values = map_npy(path)
        return values.shape, values.dtype.kind == "c"
    if kind == "NPZ":
        shape, dtype = npz_layout(path, lambda names: npz_name(names, array))
        return shape, dtype.kind == "c"
    if kind == "TIFF":
        shape, dtype = tiff_array_shape(path)
        return shape, dtype.kind == "c"
    raise ValueError(f"a {kind} file, which holds images and no measurements")


def read_array(path: PathLike, array: str | None = None) -> Tensor:
    """Read an array of numbers from an NPY, NPZ, TIFF or HDF5 file.

    The kind of file is told from its content. The pages of a TIFF file are the first axis, or those of time, slice and
    channel; an OME-TIFF set of several files is read as a whole. Smaller pages beside the others, such as previews, are
    left out with a warning. Arrays that MATLAB wrote to HDF5 (version 7.3) have their axes in the order that MATLAB
    shows.

    Args:
        path: The file.
        array: Which array of an NPZ or HDF5 file (there with its groups, ``group/name``); needed only where there are
            several.

    Returns:
        Values as stored, of any shape, float32, or complex64 where they are complex.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file that is truncated, of another kind, empty, not numeric, or holds NaN or Inf; for an
            array that is not there. The message names the file and the reason.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sinogram.npy"
        >>> np.save(path, np.ones((90, 365)))
        >>> read_array(path).shape
        torch.Size([90, 365])
    """
    path = Path(path)
    with naming(path):
        with path.open("rb") as file:
            head = file.read(132)
        named = True
        if not head:
            raise ValueError("the file is empty")
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            values = read_npz(path, array)
        elif is_hdf5(path):
            values = _read_hdf5(path, array)
        else:
            named = False
            if head.startswith(b"\x93NUMPY"):
                values = map_npy(path)
            # DICOM files may begin as TIFF ones do.
            elif head[:4] in TIFF_SIGNATURES and head[128:] != b"DICM":
                values = read_tiff_array(path)
            else:
                raise ValueError("not an NPY, NPZ, TIFF or HDF5 file")
        if array is not None and not named:
            raise ValueError(f"it holds one array without a name, not {array!r}")
        if values.dtype.kind not in "biufc":
            raise ValueError(f"its values are {values.dtype}, not numbers")
        if values.size == 0:
            raise ValueError(f"it holds an array of shape {values.shape}, without values")
        dtype = np.complex64 if values.dtype.kind == "c" else np.float32
        with np.errstate(over="ignore"):
            result = torch.from_numpy(np.array(values, dtype=dtype, order="C"))
        bad = first_bad(result)
        if bad is not None:
            raise ValueError(f"value {bad} is {result[bad].item()}")
    return result
