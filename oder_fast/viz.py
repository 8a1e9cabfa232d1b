"""Images beside each other as they should be compared: in one window, their errors on one scale, what the data say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._extras import needs
from ._numpy import takes_numpy
from .operators import as_operator

__all__ = ["compare", "largest_of", "new_figure", "show_error", "show_image", "window_of"]

WINDOW = (0.005, 0.995)
"""Quantiles of the truth that are shown as black and white."""

ERRORS = 0.98
"""Quantile of the first image's errors that ends the scale."""

Window = tuple[float, float]


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib, in inches, which is drawn without a screen.

    Raises:
        ImportError: Where matplotlib is not installed.
    """
    needs("oder_fast.viz", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _array(image: Tensor) -> Any:
    return image.detach().cpu().double().numpy()


def window_of(image: Tensor) -> Window:
    """Return the least and the largest value that is shown of an image: a few extreme pixels are left out."""
    low, high = (float(q) for q in np.quantile(_array(image), WINDOW))
    return (low, high) if high > low else (low, low + 1)


def largest_of(error: Tensor) -> float:
    """Return the error at which the scale of errors ends."""
    return float(np.quantile(_array(error.abs()), ERRORS)) or 1.0


def show_image(
    axes: Any, image: Tensor, window: Window, title: str | None = None, aspect: float = 1.0
) -> Any:
    """Draw a real image ``(H, W)`` in grey.

    Args:
        axes: Of matplotlib.
        image: The image.
        window: Values shown as black and white.
        title: Above it.
        aspect: Height of a pixel over its width.

    Returns:
        What a colour bar is made from.
    """
    low, high = window
    shown = axes.imshow(
        _array(image), cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect=aspect
    )
    axes.set(xticks=[], yticks=[], title=title)
    return shown


def show_error(axes: Any, image: Tensor, truth: Tensor, largest: float, title: str | None = None) -> Any:
    """Draw :math:`|x - x^*|` of real images ``(H, W)``, from 0 to `largest`; see `show_image`."""
    shown = axes.imshow(
        _array((image - truth).abs()),
        cmap="inferno",
        vmin=0,
        vmax=largest,
        interpolation="nearest",
    )
    axes.set(xticks=[], yticks=[], title=title)
    return shown


@takes_numpy
def compare(
    images: Mapping[str, Tensor],
    truth: Tensor | None = None,
    *,
    y: Tensor | None = None,
    operator: Any = None,
    window: Window | None = None,
) -> Any:
    r"""Draw reconstructions of one image beside each other, in one window.

    The second row has their errors, on one scale, where the truth is known. The third has the data, and what each
    image leaves of them, :math:`|A x - y|`, on one scale: a sinogram, the logarithm of k-space of the first coil, or
    the first illumination. A complex image is shown by its magnitude, of a volume the middle slice, of a batch
    the middle image.

    Args:
        images: By what is written above them; ``(H, W)`` or ``(Z, H, W)``, or a batch
            (with data, of one).
        truth: The same shape.
        y: Data, ``(1, *data_shape)``, with `operator`.
        operator: As of `DEQRED`; it takes a batch of one.
        window: Values shown as black and white; by default those of the truth, or of the first image, but for the
            half percent at either end.

    Returns:
        The figure of matplotlib: ``savefig("comparison.png")``.

    Raises:
        ImportError: Where matplotlib is not installed.
        ValueError: For no images, images of several shapes, or data without the operator.

    Example:
        >>> import torch
        >>> from oder_fast import ParallelBeamCT, viz
        >>> from oder_fast.data import shepp_logan
        >>> ct, x = ParallelBeamCT(32, 20), shepp_logan(32)
        >>> y = ct(x[None])
        >>> figure = viz.compare({"FBP": ct.fbp(y)}, x, y=y, operator=ct)
        >>> len(figure.axes)
        6
    """
    if not isinstance(images, Mapping) or not images:
        raise ValueError(
            f'compare: images must hold at least one by its name, as {{"RED": x}}, got {type(images).__name__}'
        )
    if (y is None) != (operator is None):
        raise ValueError("compare: y and operator go together")
    measurement = None if operator is None else as_operator(operator)
    images = {name: _tensor(str(name), image) for name, image in images.items()}
    truth = None if truth is None else _tensor("truth", truth)
    everything = {**images, **({} if truth is None else {"truth": truth})}
    shapes = {name: tuple(image.shape) for name, image in everything.items()}
    planes = {name: _plane(image) for name, image in images.items()}
    known = None if truth is None else _plane(truth)
    if len({shape[1:] if shape[:1] == (1,) else shape for shape in shapes.values()}) > 1:
        raise ValueError(f"compare: images and truth must have one shape, got {shapes}")
    first = next(iter(planes.values()))
    shown = window_of(first if known is None else known) if window is None else window
    rows = 1 + (known is not None) + (y is not None)
    figure = new_figure(3 * (len(planes) + 1), 3.2 * rows)
    axes = figure.subplots(rows, len(planes) + 1, squeeze=False)
    if known is None:
        axes[0, 0].set_axis_off()
    else:
        show_image(axes[0, 0], known, shown, "truth")
        axes[1, 0].set_axis_off()
    for column, (name, plane) in zip(axes[:, 1:].T, planes.items(), strict=True):
        show_image(column[0], plane, shown, name)
        if known is not None:
            show_error(column[1], plane, known, largest_of(first - known), "error")
    if y is not None:
        _draw_residuals(axes[-1], images, y, measurement)
    return figure


def _tensor(name: str, image: Any) -> Tensor:
    try:
        return torch.as_tensor(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"compare: {name} must be an image, got {type(image).__name__}") from error


def _draw_residuals(line: Any, images: Mapping[str, Tensor], y: Tensor, operator: Any) -> None:
    with torch.no_grad():
        left = [
            _of_data(operator(_batch(image, operator.image_shape)) - y).abs() for image in images.values()
        ]
    data = _of_data(y)
    # K-space falls off over decades.
    data = data.abs().clamp(min=1e-6 * float(data.abs().max()) or 1).log10() if y.is_complex() else data
    show_image(line[0], data, window_of(data), "data (log)" if y.is_complex() else "data")
    largest = largest_of(left[0])
    for axes, residual in zip(line[1:], left, strict=True):
        show_error(axes, residual, torch.zeros_like(residual), largest, "|A x - y|")
    for axes in line:
        axes.set_aspect("auto")


def _batch(image: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Return an image as a batch of one."""
    if shape is not None:
        return image.reshape(1, *shape)
    return image if image.ndim > 2 and len(image) == 1 else image[None]


def _plane(image: Tensor) -> Tensor:
    """Return what is looked at of an image, ``(H, W)``, real."""
    image = image.detach()
    image = image.abs() if image.is_complex() else image
    while image.ndim > 2:
        image = image[len(image) // 2]
    if image.ndim != 2:
        raise ValueError(
            f"compare: an image must have at least two dimensions, got shape {tuple(image.shape)}"
        )
    return image


def _of_data(y: Tensor) -> Tensor:
    """Return a plane of data ``(1, ..., H, W)``: of the first coil or illumination."""
    while y.ndim > 2:
        y = y[0]
    return y.detach()
