"""Grey images that are stored as colours."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class ColourError(ValueError):
    """An image in colours, where a grey one is needed."""


def through_palette(values: NDArray[Any], table: NDArray[Any]) -> NDArray[Any]:
    """Return the colours ``(..., 3)`` that stored values stand for, of 8 bits where the table ``(N, 3)`` has no more.

    Tables have entries of 16 bits: those of 8 bits are stored as 257 times their value.
    """
    if values.size and int(values.max()) >= len(table):
        raise ValueError(f"its palette has {len(table)} colours, and a pixel has number {values.max()}")
    if table.dtype == np.uint16 and not np.any(table % 257):
        table = (table // 257).astype(np.uint8)
    colours: NDArray[Any] = table[values]
    return colours


def grey(values: NDArray[Any]) -> NDArray[Any]:
    """Return the one channel of a grey image that is stored as RGB, or with an opaque alpha channel."""
    if values.ndim != 3 or values.shape[2] not in (2, 3, 4):
        return values
    if values.shape[2] in (2, 4):
        if values.dtype.kind != "u":
            parts = "; real and imaginary part must be stored as one complex number"
            raise ValueError(
                f"it holds an array of shape {values.shape} of {values.dtype}, neither grey nor RGB"
                + (parts if values.shape[2] == 2 else "")
            )
        if np.any(values[..., -1] != np.iinfo(values.dtype).max):
            raise ValueError("it has transparent pixels")
        values = values[..., :-1]
    if np.any(values != values[..., :1]):
        raise ColourError("it is a colour image; a grey one is needed")
    return values[..., 0]
