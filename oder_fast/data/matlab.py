"""Arrays of MATLAB files: of version 7.3, which are HDF5, and of versions 5 to 7.

The latter are read here: on damaged ones SciPy's reader can end the process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .files import check_size, is_hdf5
from .hdf5 import Numbers, dataset, is_matlab, open_hdf5

MATLAB_SUFFIX = ".mat"
ORDERS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
"""Order of bytes, by how the header of 128 bytes ends."""

STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Numbers in an element of a file, by its kind."""

MATRIX, COMPRESSED = 14, 15
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
"""Numbers of an array, by its class; they may be stored as smaller ones."""

IS_COMPLEX = 0x800
HEAD = 4096
"""Bytes within which an array's class, size and name stand."""


def is_matlab_file(path: Path) -> bool:
    """Tell from its content whether MATLAB wrote a file."""
    if is_hdf5(path):
        with open_hdf5(path) as file:
            return is_matlab(file)
    with path.open("rb") as file:
        return file.read(128)[124:] in ORDERS


@contextmanager
def open_matlab(path: Path) -> Iterator[tuple[list[str], Callable[[str], Any]]]:
    """Give the names of the arrays of a MATLAB file, and a function that returns one of them.

    What it returns has a shape, a dtype and ranges of the first axis; of version 7.3 those alone are read.
    """
    if is_hdf5(path):
        with open_hdf5(path) as file:
            # Under # MATLAB keeps what cells and objects refer to.
            named = [name for name in file if name[0] != "#" and dataset(file, name) is not None]
            yield named, lambda name: Numbers(file[name])
        return
    arrays = {array.name: array for array in _arrays(path)}
    yield list(arrays), lambda name: _values(arrays[name])


class _Array(NamedTuple):
    """An array of a file of version 5 to 7.

    Attributes:
        name: Of it.
        kind: Its class.
        is_complex: Whether it has an imaginary part.
        shape: In the order that MATLAB shows.
        content: Its bytes, as stored.
        packed: Whether they are compressed.
        size: Of what they unpack to.
        first: Where in that its numbers begin.
        order: Of bytes.
    """

    name: str
    kind: int
    is_complex: bool
    shape: tuple[int, ...]
    content: NDArray[np.uint8]
    packed: bool
    size: int
    first: int
    order: str


def _element(data: NDArray[np.uint8], start: int, order: str) -> tuple[int, int, int, int]:
    """Return the kind of an element, where its bytes begin and end, and where the next one begins."""
    if start + 8 > len(data):
        raise ValueError("it is truncated")
    kind, size = np.frombuffer(data[start : start + 8].tobytes(), f"{order}u4").tolist()
    if kind >> 16:  # up to four bytes stand in the place of their number
        kind, size, first, following = kind & 0xFFFF, kind >> 16, start + 4, start + 8
    else:
        first = start + 8
        following = first + size + (0 if kind == COMPRESSED else -size % 8)
    return kind, first, first + size, following


def _numbers(data: NDArray[np.uint8], start: int, order: str) -> tuple[NDArray[Any], int]:
    """Return the numbers of an element, and where the next one begins."""
    kind, first, end, following = _element(data, start, order)
    if kind not in STORED or end > len(data) or (end - first) % int(STORED[kind][1]):
        raise ValueError("it is damaged or truncated: an element of it holds no numbers")
    return np.frombuffer(data[first:end].tobytes(), order + STORED[kind]), following


def _arrays(path: Path) -> Iterator[_Array]:
    """Find the arrays of numbers in a file."""
    data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    order, start = ORDERS[data[124:128].tobytes()], 128
    while start < len(data):
        kind, first, end, following = _element(data, start, order)
        if end > len(data):
            raise ValueError("it is truncated")
        content, packed = data[start:end], kind == COMPRESSED
        start = following
        if packed:
            content = data[first:end]
            head = np.frombuffer(zlib.decompressobj().decompress(content.tobytes(), HEAD), np.uint8)
        else:
            head = content[:HEAD]
        kind, first, end, _ = _element(head, 0, order)
        if kind != MATRIX:
            continue
        flags, after = _numbers(head, first, order)
        shape, after = _numbers(head, after, order)
        name, after = _numbers(head, after, order)
        kind = int(flags[0]) & 0xFF if len(flags) else 0
        text = name.tobytes().decode("ascii", "replace")
        if kind in CLASSES and text:
            is_complex = bool(flags[0] & IS_COMPLEX)
            yield _Array(text, kind, is_complex, tuple(shape.tolist()), content, packed, end, after, order)


def _values(array: _Array) -> NDArray[Any]:
    what = f"its {array.name!r} of shape {array.shape}"
    dtype = np.dtype(array.order + CLASSES[array.kind])
    count = math.prod(array.shape)
    if min(array.shape, default=0) < 0:
        raise ValueError(f"{what} is damaged")
    data = array.content
    if array.packed:
        check_size(what, max(array.size, count * dtype.itemsize), len(data), True)
        unpacker = zlib.decompressobj()
        data = np.frombuffer(unpacker.decompress(data.tobytes(), array.size), np.uint8)
        # The checksum stands behind the last byte.
        unpacker.decompress(unpacker.unconsumed_tail, 1)
        if len(data) < array.size or not unpacker.eof:
            raise ValueError(f"{what} is truncated")
    values, after = _numbers(data, array.first, array.order)
    if array.is_complex:
        imaginary, _ = _numbers(data, after, array.order)
        if len(imaginary) != len(values):
            raise ValueError(f"{what} is damaged: its parts differ in size")
        values = values + 1j * imaginary.astype(dtype)
    if len(values) != count:
        raise ValueError(f"{what} holds {len(values)} numbers")
    kind = np.result_type(dtype, np.complex64) if array.is_complex else dtype
    return values.astype(kind).reshape(array.shape, order="F")
