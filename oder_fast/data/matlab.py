"""Arrays of MATLAB files of any version."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .files import check_size, is_hdf5
from .hdf5 import Numbers, dataset, is_matlab, open_hdf5

MATLAB_SUFFIX = ".mat"
NUMERIC = {"double": 8, "single": 4, "logical": 1} | {
    f"{sign}int{8 * size}": size for sign in ("", "u") for size in (1, 2, 4, 8)
}
"""Classes of arrays of numbers, and the bytes of one."""

HEADS = (b"\x00\x01IM", b"\x01\x00MI")
"""How the header of versions 5 to 7 ends, at byte 124."""

LARGEST_TYPE = 5000
"""Types of arrays in version 4, with which its files begin, are smaller."""


def is_matlab_file(path: Path) -> bool:
    """Tell whether MATLAB wrote a file: from its content, version 4 (which has no signature) from its name."""
    if is_hdf5(path):
        with open_hdf5(path) as file:
            return is_matlab(file)
    with path.open("rb") as file:
        head = file.read(128)
    first = min(int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    is_fourth = path.suffix.lower() == MATLAB_SUFFIX and len(head) >= 20 and first < LARGEST_TYPE
    return head[124:] in HEADS or is_fourth


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
    import scipy.io

    with path.open("rb") as stream:
        known = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(stream)}

        def read(name: str) -> Any:
            shape, kind = known[name]
            # Complex numbers have two parts.
            size = 2 * NUMERIC[kind] * math.prod(int(n) for n in shape)
            check_size(f"its {name!r} of shape {shape}", size, path.stat().st_size, True)
            stream.seek(0)
            return np.asarray(scipy.io.loadmat(stream, variable_names=[name])[name])

        yield [name for name, (_, kind) in known.items() if kind in NUMERIC], read
