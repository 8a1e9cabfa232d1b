"""Open HDF5 files that may come from anywhere: one opener, and one way to a dataset."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._extras import needs
from .files import check_size

HEAP = b"GCOL\x01\0\0\0"
"""How a heap begins."""

SMALLEST_HEAP = 4096
"""Bytes of one."""

_one_at_a_time = threading.RLock()


def _renew_lock() -> None:
    """Take a lock of its own for a forked process: the thread that held the other is not there to give it back."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading; another thread that opens one waits until it is closed.

    HDF5 keeps the type of a dataset for all who have its file open. Where the type is a compound with a part of
    variable length, as in ISMRMRD, it refers to the first who read it, and once that one has closed the file the
    others crash (https://github.com/h5py/h5py/issues/2920). It reads for one thread at a time anyway.

    Raises:
        ValueError: Where one of its links points to another file.
    """
    needs("reading HDF5", "h5py")
    import h5py

    def outward(name: bytes, link: Any) -> bytes | None:
        # Links that point into the same file can leave it only by way of another link.
        return None if link.type in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT) else name

    with _one_at_a_time, h5py.File(path, "r") as file:
        # Links are not followed here, so that nothing else is opened.
        found = file.id.links.visit(outward, info=True)
        if found is not None:
            raise ValueError(f"its {found.decode('utf-8', 'replace')!r} is a link to another file")
        yield file


def dataset(group: Any, name: str) -> Any:
    """Return a dataset that the file stores, None where there is none of that name.

    Raises:
        ValueError: For a dataset stored in another file, in part alone, or packed beyond measure.
    """
    import h5py

    found = group.get(name)
    if not isinstance(found, h5py.Dataset):
        return None
    layout = found.id.get_create_plist()
    if layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count():
        raise ValueError(f"its {name!r} is stored in another file")
    if found.shape is None:
        raise ValueError(f"its {name!r} is empty")
    _check_stored(found, name, bool(layout.get_nfilters()))
    return found


def _check_stored(found: Any, name: str, packed: bool) -> None:
    """Check that what a dataset claims to hold is in the file."""
    claimed, chunks = math.prod(found.shape) * found.dtype.itemsize, found.chunks
    if claimed == 0:
        return
    stored = Path(found.file.filename).stat().st_size
    # A chunk is read as a whole.
    largest = max(claimed, 0 if chunks is None else math.prod(chunks) * found.dtype.itemsize)
    check_size(f"its {name!r} of shape {found.shape}", largest if packed else claimed, stored, packed)
    if chunks is not None:
        check_size(f"a chunk of its {name!r}", largest, stored, True)
        there = found.id.get_num_chunks()
        wanted = math.prod(-(-n // size) for n, size in zip(found.shape, chunks, strict=True))
    else:
        there, wanted = int(found.id.get_storage_size() >= claimed), 1
    if there < wanted:
        raise ValueError(f"its {name!r} is incomplete: {there} of {wanted} parts were written")


def check_heaps(file: Any) -> None:
    """Check the heaps that values of variable length stand in: on a damaged one the HDF5 library may never return.

    Raises:
        ValueError: For a heap whose objects do not fill it.
    """
    with open(file.filename, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(HEAP)
        while start >= 0:
            size = int.from_bytes(data[start + 8 : start + 16], "little")
            end, place = start + size, start + 16
            # Of chance, in other data.
            if not SMALLEST_HEAP <= size <= len(data) - start:
                end = start + len(HEAP)
            while place + 16 <= end:
                # Index, references and size; the free space, index 0, counts its header.
                index = int.from_bytes(data[place : place + 2], "little")
                length = int.from_bytes(data[place + 8 : place + 16], "little")
                step = length if index == 0 else 16 + length + -length % 8
                if step < 16 or place + step > end:
                    raise ValueError("it is damaged: a heap of its values is not filled by them")
                place += step
            start = data.find(HEAP, end)


def is_matlab(file: Any) -> bool:
    """Tell whether MATLAB wrote a file (version 7.3)."""
    return any("MATLAB_class" in node.attrs for node in map(file.get, file) if node is not None)


class Numbers:
    """The numbers of a dataset as their writer meant them.

    MATLAB stores arrays with the last axis first, and complex numbers in two parts.

    Args:
        dataset: From `dataset`.

    Attributes:
        shape: Axes in the order that the writer shows.
        dtype: Of what is read.

    Raises:
        ValueError: For what MATLAB marks as text, or as empty.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._reversed = "MATLAB_class" in dataset.attrs
        if dataset.attrs.get("MATLAB_empty"):
            raise ValueError(f"its {dataset.name.strip('/')!r} is empty")
        if self._reversed and dataset.attrs["MATLAB_class"] in (b"char", "char"):
            raise ValueError(f"its {dataset.name.strip('/')!r} is text, not numbers")
        self._parts = dataset.dtype.names == ("real", "imag")
        self.shape: tuple[int, ...] = dataset.shape[::-1] if self._reversed else dataset.shape
        self.dtype: np.dtype[Any] = (
            np.result_type(dataset.dtype["real"], np.complex64) if self._parts else dataset.dtype
        )

    def __getitem__(self, first: slice) -> NDArray[Any]:
        """Read a range of the first axis."""
        # Of a number without axes there is no range.
        where = () if not self.shape else (..., first) if self._reversed else first
        values = np.asarray(self._dataset[where])
        if self._parts:
            pair, values = values, np.empty(values.shape, self.dtype)
            values.real, values.imag = pair["real"], pair["imag"]
        return values.T if self._reversed else values
