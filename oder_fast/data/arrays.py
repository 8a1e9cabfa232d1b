"""Read arrays of any number of dimensions, such as sinograms and stacks of intensities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from .hdf5 import Numbers, dataset, open_hdf5
from .images import format_of
from .matlab import is_matlab_file, open_matlab
from .tiff import read_tiff_array, tiff_array_shape


@contextmanager
def _stored(path: Path, array: str | None) -> Iterator[Any]:
    """Give an array of an HDF5 or MATLAB file: its shape, its dtype and, when asked for, its values."""
    if is_hdf5(path):
        with open_hdf5(path) as file:
            import h5py

            names: list[str] = []
            file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
            # Under # MATLAB keeps what cells and objects refer to.
            names = [name for name in names if name[0] != "#"]
            yield Numbers(dataset(file, npz_name(names, array if array is None else array.strip("/"))))
    else:
        with open_matlab(path) as (names, read):
            yield read(npz_name(names, array))


def array_layout(path: Path, array: str | None) -> tuple[tuple[int, ...], bool]:
    """Return the shape of the array that `read_array` reads, and whether it is complex, without reading it.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file of another kind, or an array that is not there.
    """
    if is_hdf5(path) or is_matlab_file(path):
        with _stored(path, array) as stored:
            return stored.shape, stored.dtype.kind == "c"
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
    """Read an array of numbers from an NPY, NPZ, TIFF, HDF5 or MATLAB file.

    The kind of file is told from its content. The pages of a TIFF file are the first axis, or those of time, slice and
    channel; an OME-TIFF set of several files is read as a whole. Smaller pages beside the others, such as previews, are
    left out with a warning. Arrays of MATLAB files have their axes in the order that MATLAB shows. A file that points
    to other files, or stores less than it claims, is refused.

    Args:
        path: The file.
        array: Which array of an NPZ, HDF5 (there with its groups, ``group/name``) or MATLAB file; needed only where
            there are several.

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
        elif is_hdf5(path) or is_matlab_file(path):
            with _stored(path, array) as stored:
                values = stored[:]
        else:
            named = False
            if head.startswith(b"\x93NUMPY"):
                values = map_npy(path)
            # DICOM files may begin as TIFF ones do.
            elif head[:4] in TIFF_SIGNATURES and head[128:] != b"DICM":
                values = read_tiff_array(path)
            else:
                raise ValueError("not an NPY, NPZ, TIFF, HDF5 or MATLAB file")
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
