"""Illuminations and image stacks of microscopes that turn on one LED after the other."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._numpy import takes_numpy
from .files import PathLike
from .images import read_image

_SIGNED = r"(?:\+|(?<![^\W_])-)?\d+"
LED_NAME = rf"(?P<row>{_SIGNED})\D+?(?P<col>{_SIGNED})\.tiff?$"
"""Names of images of LEDs: they end in two numbers, the row and the column on the board.

A ``-`` after a word or a number is no sign: ``led-3-4.tif`` is row 3, column 4.
"""

_AMBIGUOUS = re.compile(r"(?:^|[\W_])[a-z]-$", re.IGNORECASE)
"""What comes before a number that may be signed or not, as in ``x-3_y-4.tif``."""

APERTURE_TOLERANCE = 1 + 1e-9
"""An LED on the edge of the aperture is kept, whatever the rounding of its sines."""


def _check_count(name: str, **values: Any) -> None:
    for argument, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {value}")


def _check_positive(name: str, **values: Any) -> None:
    for argument, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"{name}: {argument} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: {argument} must be a finite number above 0, got {value}")


@takes_numpy
def led_grid(
    n_rows: int,
    n_columns: int,
    pitch: float,
    distance: float,
    *,
    center: tuple[float, float] | None = None,
    numerical_aperture: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""List the illuminations of a flat board of LEDs, parallel to the sample.

    .. math:: s = -\frac{d}{\sqrt{|d|^2 + D^2}}, \qquad d = p \, (\mathrm{index} - \mathrm{center})

    with the pitch `p` and the distance `D`: light of an LED below the centre travels upward. The rows and columns of
    the board are taken to lie along those of the images; for a board that is turned or mirrored, turn or mirror `s`.

    Args:
        n_rows: Rows of the board.
        n_columns: Columns of the board.
        pitch: Distance of neighbouring LEDs.
        distance: From the board to the sample, in the unit of `pitch`.
        center: Row and column of the point of the board on the optical axis, counted from 0; None for the middle of
            the board.
        numerical_aperture: Of the objective: LEDs above it (dark field) are left out. None keeps all.

    Returns:
        Direction sines in air `s`, rows and columns (no unit), shape ``(L, 2)``, float64; and the row and column of
        each LED on the board, shape ``(L, 2)``, int64. Sorted by row, then by column.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For an argument out of range, or where no LED is left.

    Example:
        >>> illuminations, index = led_grid(32, 32, 4.0, 79.0, center=(16, 16), numerical_aperture=0.25)
        >>> illuminations.shape, index[0].tolist()
        (torch.Size([89, 2]), [11, 15])
    """
    _check_count("led_grid", n_rows=n_rows, n_columns=n_columns)
    _check_positive("led_grid", pitch=pitch, distance=distance)
    if center is None:
        center = ((n_rows - 1) / 2, (n_columns - 1) / 2)
    if len(center) != 2 or not all(math.isfinite(c) for c in center):
        raise ValueError(f"led_grid: center must be two finite numbers, got {tuple(center)}")
    index = torch.cartesian_prod(torch.arange(n_rows), torch.arange(n_columns)).reshape(-1, 2)
    offset = pitch * (index.double() - torch.tensor(center, dtype=torch.float64))
    illuminations = -offset / torch.sqrt(offset.square().sum(1, keepdim=True) + distance**2)
    if numerical_aperture is not None:
        _check_positive("led_grid", numerical_aperture=numerical_aperture)
        sines = torch.linalg.vector_norm(illuminations, dim=1)
        kept = sines <= numerical_aperture * APERTURE_TOLERANCE
        if not kept.any():
            raise ValueError(
                f"led_grid: numerical_aperture {numerical_aperture} leaves no LED, the least sine is {sines.min():.4g}"
            )
        illuminations, index = illuminations[kept], index[kept]
    return illuminations, index


@takes_numpy
def led_ring(n: int, numerical_aperture: float, *, start: float = 0.0) -> Tensor:
    r"""List the illuminations of a ring of evenly spaced LEDs around the optical axis.

    .. math:: s_l = \mathrm{NA} \, (\sin\varphi_l, \cos\varphi_l), \qquad \varphi_l = \varphi_0 + 2 \pi l / n

    Angles run from the columns' direction towards that of the rows, clockwise as an image is shown, and are those
    in which the light travels: opposite to where the LED is.

    Args:
        n: Number of LEDs.
        numerical_aperture: Sine in air of their angle to the axis (no unit).
        start: Angle :math:`\varphi_0` of the first, in radians.

    Returns:
        Direction sines in air, rows and columns (no unit), shape ``(n, 2)``, float64.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For an argument out of range.

    Example:
        >>> led_ring(4, 0.5).round(decimals=3).abs()
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000],
                [0.0000, 0.5000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """
    _check_count("led_ring", n=n)
    _check_positive("led_ring", numerical_aperture=numerical_aperture)
    if not math.isfinite(start):
        raise ValueError(f"led_ring: start must be finite, got {start}")
    angle = start + 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return numerical_aperture * torch.stack((torch.sin(angle), torch.cos(angle)), 1)


def _led(path: Path, pattern: re.Pattern[str]) -> tuple[int, int] | None:
    match = pattern.search(path.name)
    if match is None:
        return None
    if pattern.pattern == LED_NAME and any(
        _AMBIGUOUS.search(path.name[: match.start(group)]) for group in ("row", "col")
    ):
        raise ValueError(f"{path}: a - in its name may be a sign or not; give a pattern that says which")
    try:
        return int(match["row"]), int(match["col"])
    except (TypeError, ValueError):
        raise ValueError(
            f"{path}: row {match['row']!r} and column {match['col']!r} in its name must be whole numbers"
        ) from None


def read_led_stack(source: PathLike | Iterable[PathLike], pattern: str = LED_NAME) -> tuple[Tensor, Tensor]:
    r"""Read the images of a scan, one file for each LED, with its row and column in the name.

    Args:
        source: A folder, whose files of other names are left out; or the files themselves.
        pattern: Regular expression to be found in the name of a file (not of its folder), with the groups ``row`` and
            ``col``; upper and lower case are the same. As given, names end in two numbers, as in ``y16_x12.tif`` or
            ``led_-3_+4.tif``; a ``-`` right after a word or a number is no sign, and after a single letter refused.

    Returns:
        Images as stored, shape ``(L, H, W)``, float32; and the row and column of the LED of each, as the names say,
        shape ``(L, 2)``, int64. Sorted by row, then by column.

    Raises:
        OSError: Where a file or the folder is missing or unreadable.
        TypeError: For a source that is neither a folder nor files.
        ValueError: For names that say no LED, or the same one twice; images that differ in size; a file that is
            truncated, not an image, not grey, or holds NaN or Inf; a pattern that cannot be used. The message names
            the file and the reason.

    Example:
        >>> import tempfile, tifffile, numpy as np
        >>> folder = Path(tempfile.mkdtemp())
        >>> for column in (12, 9):
        ...     tifffile.imwrite(folder / f"y16_x{column}.tif", np.full((4, 6), column, np.uint16))
        >>> images, index = read_led_stack(folder)
        >>> images.shape, index.tolist()
        (torch.Size([2, 4, 6]), [[16, 9], [16, 12]])
    """
    if not isinstance(source, str | os.PathLike | Iterable):
        raise TypeError(f"read_led_stack: source must be a folder or files, got {type(source).__name__}")
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"read_led_stack: pattern {pattern!r} is no regular expression: {error}") from error
    if not {"row", "col"} <= set(compiled.groupindex):
        raise ValueError(f"read_led_stack: pattern must have the groups row and col, got {pattern!r}")
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        # Hidden files are copies that some systems make beside the real ones.
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
        paths = [path for path in paths if compiled.search(path.name)]
        if not paths:
            raise ValueError(f"{folder}: no file name matches {pattern!r}")
    else:
        paths = [Path(path) for path in source]
        if not paths:
            raise ValueError("read_led_stack: source must hold at least one file, got none")
    leds: dict[tuple[int, int], Path] = {}
    for path in paths:
        led = _led(path, compiled)
        if led is None:
            raise ValueError(f"{path}: its name does not match {pattern!r}")
        if led in leds:
            first, second = sorted((leds[led], path))
            raise ValueError(f"{second}: row {led[0]}, column {led[1]} is also {first}")
        leds[led] = path
    order = sorted(leds)
    images: list[Tensor] = []
    for led in order:
        image = read_image(leds[led]).image
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{leds[led]}: its size is {tuple(image.shape)}, that of {leds[order[0]]} is {tuple(images[0].shape)}"
            )
        images.append(image)
    return torch.stack(images), torch.tensor(order)


def _moving_average(images: Tensor, size: int, dim: int) -> Tensor:
    """Return averages over `size` neighbours along an axis, the edges repeated outward."""
    n = images.shape[dim]
    where = torch.arange(-(size // 2) - 1, n + (size - 1) // 2, device=images.device).clamp(0, n - 1)
    # The first sum is that of nothing: differences of sums are windows.
    total = images.index_select(dim, where).cumsum(dim)
    return (total.narrow(dim, size, n) - total.narrow(dim, 0, n)) / size


@takes_numpy
def normalize_background(images: Tensor, window: int | tuple[int, int] | None = None) -> Tensor:
    r"""Divide images by their background, a moving average, and subtract 1.

    .. math:: y = I / \bar I - 1

    The edges are repeated outward for it, and sums are in double precision. What varies more slowly than the window
    is lost with the background.

    Args:
        images: Intensities, shape ``(..., H, W)``, real.
        window: Rows and columns over which is averaged; an even number reaches one further up and to the left. None
            for half the image along each axis, made odd.

    Returns:
        Relative deviation from the background (no unit), like `images`.

    Raises:
        TypeError: For images that are not of floating point.
        ValueError: For a shape or window out of range, NaN or Inf, or a background that is not above 0.

    Example:
        >>> import torch
        >>> images = torch.full((2, 8, 8), 300.0)
        >>> images[:, 4, 4] = 600
        >>> y = normalize_background(images)
        >>> y.shape, round(y[0, 4, 4].item(), 3), round(y[0, 4, 3].item(), 3)
        (torch.Size([2, 8, 8]), 0.923, -0.038)

    References:
        Ling, Tahir, Lin, Lee, Tian, "High-throughput intensity diffraction tomography with a computational
        microscope", Biomed. Opt. Express 9 (2018).
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"normalize_background: images must be a tensor of floating point, got {got}")
    if images.ndim < 2 or min(images.shape[-2:]) < 1:
        raise ValueError(f"normalize_background: images must be (..., H, W), got {tuple(images.shape)}")
    if window is None:
        window = (images.shape[-2] // 2 | 1, images.shape[-1] // 2 | 1)
    elif isinstance(window, int):
        window = (window, window)
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"normalize_background: window must be at least 1 along both axes, got {window}")
    bad = (~torch.isfinite(images)).nonzero()
    if len(bad):
        index = tuple(bad[0].tolist())
        raise ValueError(
            f"normalize_background: images must be finite, got {images[index].item()} at {index}"
        )
    background = _moving_average(_moving_average(images.double(), window[0], -2), window[1], -1)
    low = (background <= 0).nonzero()
    if len(low):
        index = tuple(low[0].tolist())
        raise ValueError(
            f"normalize_background: the background must be above 0, got {background[index].item():.4g} at {index}"
        )
    normalized: Tensor = images / background - 1
    return normalized.to(images.dtype)
