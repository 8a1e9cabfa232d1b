"""What all files have in common: errors that name them, and being written whole or not at all."""

from __future__ import annotations

import errno
import math
import os
import re
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._extras import MissingPackageError

PathLike = str | os.PathLike[str]

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
Stamp = tuple[str, int, int]

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

SMALL = 2**28
"""Bytes that a file may unpack to, however small it is."""

MOST_PACKED = 100
"""Bytes that one stored byte may unpack to; images and k-space with zeros around them take less."""

UNFINISHED = re.compile(r"\..+-[0-9a-f]{16}(\.\w+)+", re.DOTALL)
"""Names that `atomic` gives until a file is whole."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the content of a file into a ValueError that names it.

    What the system says of the file, such as that it is missing, remains an OSError. It may be nested: the file is
    named once.
    """
    try:
        yield
    except MissingPackageError:
        raise
    except OSError as error:
        # Decoders report damaged content as an OSError without an errno, or seek to where it sends them.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


def check_size(what: str, claimed: int, stored: int, packed: bool) -> None:
    """Refuse content that asks for more memory than its file stores.

    Args:
        what: Subject of the message.
        claimed: Bytes that it asks for.
        stored: Bytes that there are of it at most.
        packed: Whether it is compressed, or spreads over more than is stored.

    Raises:
        ValueError: For more than is stored; for what is packed, `MOST_PACKED` times that and more than `SMALL`.
    """
    if claimed > (max(SMALL, MOST_PACKED * stored) if packed else stored):
        raise ValueError(f"{what} takes {claimed} bytes, and the file stores {stored}")


def stamp(path: Path) -> Stamp:
    """Return what tells a file from others and from what it was before: path, size, time of its last change."""
    status = path.stat()
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def map_npy(path: Path) -> NDArray[Any]:
    """Return the array of an NPY file, of which only what is used is read.

    Raises:
        ValueError: For a file that is truncated, holds more than one array, or no numbers.
    """
    try:
        values: Any = np.load(path, allow_pickle=False, mmap_mode="r")
    except ValueError as error:
        if "mmap length" in str(error):
            raise ValueError("it is truncated") from error
        if "Python objects" in str(error):
            raise ValueError("it holds Python objects, not numbers") from error
        raise
    if isinstance(values, np.memmap) and values.offset + values.nbytes < path.stat().st_size:
        raise ValueError(f"more follows its array of shape {values.shape}, such as a second one")
    mapped: NDArray[Any] = values
    return mapped


def is_hdf5(path: Path) -> bool:
    """Tell from its content whether a file is HDF5."""
    # The signature may follow a user block of 512 bytes or a power of two times that.
    with path.open("rb") as file:
        for offset in (0, 512, 1024, 2048, 4096):
            file.seek(offset)
            if file.read(8) == HDF5_SIGNATURE:
                return True
    return False


def first_bad(values: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first value that is NaN or Inf, None where all are finite."""
    if values.numel() == 0 or not (values.is_floating_point() or values.is_complex()):
        return None
    # Extremes are found in one pass, and NaN is one.
    if all(torch.isfinite(extreme) for extreme in torch.aminmax(_real_view(values))):
        return None
    return tuple((~torch.isfinite(values)).nonzero()[0].tolist())


def _real_view(values: Tensor) -> Tensor:
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


@contextmanager
def atomic(path: PathLike) -> Iterator[Path]:
    """Give a temporary name in the folder of `path` to write to; rename it to `path` only on success.

    Several writers of the same file do not meet: each has its own temporary name, and the last to end wins.

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
    # Not longer than a file system takes, where the name itself is not.
    temporary = path.with_name(f".{path.stem[:50]}-{uuid.uuid4().hex[:16]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: PathLike) -> None:
    """Remove the files of a folder that `atomic` had not renamed when a process was killed.

    To be called where no other writes to that folder.
    """
    for path in Path(folder).glob(".*"):
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def save_npz(path: PathLike, **arrays: Tensor | NDArray[Any] | float) -> None:
    """Write named arrays to a compressed NPZ file, atomically."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"save_npz: path must end in .npz, got {path}")
    with atomic(path) as temporary:
        np.savez_compressed(temporary, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]


def npz_name(names: list[str], array: str | None) -> str:
    """Return the name of the array asked for, or of the only one."""
    if array is None and len(names) != 1:
        hint = "; as k-space it is for parallel MRI" if "kspace" in names else ""
        raise ValueError(f"it holds {len(names)} arrays, name one of: {', '.join(names)}{hint}")
    if array is not None and array not in names:
        raise ValueError(f"it holds no array {array!r}, only: {', '.join(names)}")
    return array or names[0]


@contextmanager
def open_npz(path: Path) -> Iterator[tuple[list[str], Callable[[str], NDArray[Any]]]]:
    """Give the names of the arrays of an NPZ file, and a function that reads one of them."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:

        def read(name: str) -> NDArray[Any]:
            npz_layout(path, lambda _: name)
            values: NDArray[Any] = archive[name]
            return values

        yield archive.files, read


def read_npz(path: Path, array: str | None) -> NDArray[Any]:
    """Read the array asked for, or the only one, of an NPZ file."""
    with open_npz(path) as (names, read):
        return read(npz_name(names, array))


def npz_layout(path: Path, choose: Callable[[list[str]], str]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the shape and the kind of numbers of one array of an NPZ file, chosen from their names.

    Raises:
        ValueError: Where the array is larger than what is stored of it.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        entry = archive.getinfo(choose(names) + ".npy")
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            stored = entry.file_size - file.tell()
        size = math.prod(shape) * dtype.itemsize
        what = f"its {entry.filename.removesuffix('.npy')!r} of shape {shape}"
        if size != stored and not dtype.hasobject:
            raise ValueError(f"{what} takes {size} bytes, and {stored} are stored")
        check_size(what, size, entry.compress_size, True)
        return shape, dtype
