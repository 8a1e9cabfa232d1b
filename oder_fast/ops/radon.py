"""The Radon transform and its data-fidelity gradient: parallel beam, Joseph's method, exact transposes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._numpy import from_numpy, takes_numpy
from ..reference import radon as reference
from ..reference.radon import Detector
from . import _checks, backends
from ._library import LIBRARY, call, register, register_linear, restored

# A detector is its number of bins, and its spacing, offset and pixel size.
LIBRARY.define(
    "radon_forward(Tensor image, Tensor angles, int n_bins, float[] lengths, str backend) -> Tensor"
)
for _name in ("radon_adjoint", "radon_backproject"):
    LIBRARY.define(
        f"{_name}(Tensor sinogram, Tensor angles, SymInt height, SymInt width, float[] lengths, str backend) -> Tensor"
    )
LIBRARY.define(
    "radon_backproject_transpose(Tensor image, Tensor angles, int n_bins, float[] lengths, str backend) -> Tensor"
)
LIBRARY.define(
    "radon_gradient(Tensor image, Tensor? sinogram, Tensor angles, Tensor? views, int n_bins, float[] lengths, "
    "str backend) -> Tensor"
)

# Image rows or columns over which the CUDA kernels sum a ray before they write it down.
STRIP = 32


def _launch(
    name: str,
    backend: str,
    sizes: tuple[int, ...],
    angles: Tensor,
    views: Tensor | None,
    lengths: list[float],
    data: Tensor,
    *others: Tensor | None,
) -> None:
    """Launch a kernel on data and a scan, as csrc/radon.h describes it; `sizes` are batch, height, width and bins.

    The CUDA kernels sum rays over groups of strips of the image, so many that one image fills the GPU; in a gradient
    the first of these sinograms then takes the residual. The C++ backend keeps its own.
    """
    (batch, height, width, n_bins), (spacing, offset, pixel_size) = sizes, lengths
    n_used = angles.shape[0] if views is None else views.shape[0]
    n_sums = 0
    if backend == "cuda" and name in ("radon_forward", "radon_gradient"):
        n_sums = max(1, min(-(-max(height, width) // STRIP), 16, -(-4096 // (batch * n_used))))
    elif backend == "triton" and name == "radon_gradient":
        n_sums = 1
    sums = data.new_empty(n_sums, batch, n_used, n_bins, dtype=torch.float32) if n_sums else None
    counts = (angles.shape[0], n_used, n_sums, batch, height, width, n_bins)
    lines = (spacing / pixel_size, offset / pixel_size, pixel_size, sums)
    backends.launch(name, data, backend, data, *others, angles, views, *counts, *lines)


# ------------------------------------------------------------------ forward


def _forward_impl(image: Tensor, angles: Tensor, n_bins: int, lengths: list[float], backend: str) -> Tensor:
    sinogram = _forward_fake(image, angles, n_bins)
    if image.numel() == 0:
        return sinogram.zero_()
    _launch("radon_forward", backend, (*image.shape, n_bins), angles, None, lengths, image, sinogram)
    return sinogram


def _forward_fake(image: Tensor, angles: Tensor, n_bins: int, *_: Any) -> Tensor:
    return image.new_empty(image.shape[0], angles.shape[0], n_bins)


register_linear(
    "radon_forward",
    _forward_impl,
    _forward_fake,
    "radon_adjoint",
    lambda image, angles, n_bins, *geometry: (angles, *image.shape[1:], *geometry),
)


# ------------------------------------------------------------------ adjoint


def _gather(
    name: str, sinogram: Tensor, angles: Tensor, height: int, width: int, lengths: list[float], backend: str
) -> Tensor:
    """Launch `radon_adjoint` or `radon_backproject`."""
    batch, _, n_bins = sinogram.shape
    image = sinogram.new_empty(batch, height, width)
    if image.numel() == 0:
        return image
    _launch(name, backend, (*image.shape, n_bins), angles, None, lengths, sinogram, image)
    return image


def _adjoint_impl(*args: Any) -> Tensor:
    return _gather("radon_adjoint", *args)


def _backproject_impl(*args: Any) -> Tensor:
    return _gather("radon_backproject", *args)


def _adjoint_fake(sinogram: Tensor, angles: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return sinogram.new_empty(sinogram.shape[0], height, width)


register_linear(
    "radon_adjoint",
    _adjoint_impl,
    _adjoint_fake,
    "radon_forward",
    lambda sinogram, angles, height, width, *geometry: (angles, sinogram.shape[2], *geometry),
)


register_linear(
    "radon_backproject",
    _backproject_impl,
    _adjoint_fake,
    "radon_backproject_transpose",
    lambda sinogram, angles, height, width, *geometry: (angles, sinogram.shape[2], *geometry),
)


# Filtered back-projection only starts an iteration: its transpose, rarely needed, is left to the reference.


register_linear(
    "radon_backproject_transpose",
    lambda image, angles, n_bins, lengths, backend: reference.radon_backproject_transpose(
        image, angles, Detector(n_bins, *lengths)
    ),
    _forward_fake,
    "radon_backproject",
    lambda image, angles, n_bins, *geometry: (angles, *image.shape[1:], *geometry),
)


# ------------------------------------------------------------------ gradient


def _gradient_impl(
    image: Tensor,
    sinogram: Tensor | None,
    angles: Tensor,
    views: Tensor | None,
    n_bins: int,
    lengths: list[float],
    backend: str,
) -> Tensor:
    gradient = torch.empty_like(image, memory_format=torch.contiguous_format)
    if image.numel() == 0:
        return gradient
    sizes = (*image.shape, n_bins)
    _launch("radon_gradient", backend, sizes, angles, views, lengths, image, sinogram, gradient)
    return gradient


def _gradient_fake(image: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Apply the symmetric normal operator to `grad`, and -A_B with rows back in their places."""
    _, with_data, angles, views, *geometry = restored(ctx)
    normal = call("radon_gradient", grad, None, angles, views, *geometry)
    if not (with_data and ctx.needs_input_grad[1]):
        return normal, *[None] * 8
    used = angles if views is None else angles[views]
    projected = call("radon_forward", grad, used, *geometry) * (-angles.shape[0] / used.shape[0])
    if views is not None:
        empty = projected.new_zeros(projected.shape[0], angles.shape[0], projected.shape[2])
        projected = empty.index_add(1, views, projected)
    return normal, projected, *[None] * 7


register("radon_gradient", _gradient_impl, _gradient_fake, _gradient_backward, variables=(0, 1))


# ------------------------------------------------------------------ what users call


def _check_scan(op: str, angles: Tensor, detector: Detector, like: Tensor) -> tuple[Tensor, Any, list[float]]:
    """Check the geometry; return the angles, the number of bins and the lengths as the backends take them."""
    _checks.tensor(op, "angles", angles, ndim=1)
    _checks.floating(op, "angles", angles)
    _checks.constant(op, "angles", angles)
    if angles.requires_grad:
        raise ValueError(f"{op}: angles is not differentiable; detach it")
    if angles.shape[0] == 0:
        raise ValueError(f"{op}: angles must hold at least one view, got none")
    if angles.device != like.device:
        raise ValueError(f"{op}: angles must be on {like.device}, got {angles.device}")
    if not isinstance(detector, Detector):
        raise TypeError(f"{op}: detector must be an ops.Detector, got {type(detector).__name__}")
    n_bins, *lengths = map(from_numpy, detector)
    for name, value in zip(Detector._fields[1:], lengths, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    spacing, offset, pixel_size = map(float, lengths)
    if isinstance(n_bins, bool) or not isinstance(n_bins, int | torch.SymInt):
        raise TypeError(f"{op}: n_bins must be an int, got {type(n_bins).__name__}")
    if not 1 <= n_bins < 2**31:
        raise ValueError(f"{op}: n_bins must be at least 1 and below 2**31, got {n_bins}")
    _checks.positive(op, "spacing", spacing)
    _checks.positive(op, "pixel_size", pixel_size)
    # Beyond this the distance of rays along a line is no finite number.
    if not 0 < spacing / pixel_size < 1e300:
        raise ValueError(f"{op}: spacing must be above 0 and below 1e300 pixels, got {spacing / pixel_size}")
    if not abs(offset / pixel_size) < 1e300:
        raise ValueError(f"{op}: offset must be finite and below 1e300 pixels, got {offset / pixel_size}")
    return angles.to(torch.float64), n_bins, [spacing, offset, pixel_size]


@takes_numpy
def radon_forward(image: Tensor, angles: Tensor, detector: Detector, *, backend: str = "auto") -> Tensor:
    r"""Project images along parallel rays.

    .. math:: y_{b,v,d} = \int x_b \, ds \quad \text{along} \quad x\cos\theta_v + y\sin\theta_v = s_d

    The integral is Joseph's: march along the axis nearer the ray, interpolate linearly along the other, times
    the step length. x points right and y up from the image centre, which is the axis of rotation; pixels outside
    the image are zero.

    Args:
        image: Shape ``(B, H, W)``, floating point; rows run downward.
        angles: :math:`\theta_v` in radians, shape ``(V,)``, any order, on the device of `image`.
        detector: Where the bins are, :math:`s_d`, and how large a pixel is.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Sinogram, shape ``(B, V, D)``, dtype of `image`; differentiable any number of times in `image`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device or value that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> radon_forward(torch.ones(1, 2, 2), torch.zeros(1), Detector(n_bins=2))
        tensor([[[2., 2.]]])

    References:
        Joseph, "An improved algorithm for reprojecting rays through pixel images",
        IEEE Trans. Medical Imaging 1 (1982).
    """
    op = "radon_forward"
    _checks.tensor(op, "image", image, ndim=3)
    _checks.floating(op, "image", image)
    scan = _check_scan(op, angles, detector, image)
    chosen = backends.resolve(backend, image.device, image.dtype)
    if chosen == "reference":
        return reference.radon_forward(image, scan[0], Detector(scan[1], *scan[2]))
    result: Tensor = call(op, image, *scan, chosen)
    return result


@takes_numpy
def radon_adjoint(
    sinogram: Tensor,
    angles: Tensor,
    detector: Detector,
    image_shape: tuple[int, int],
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Back-project sinograms: the exact transpose of `radon_forward`.

    .. math:: x_{b,i,j} = \sum_{v,d} a_{(v,d),(i,j)} \, y_{b,v,d}

    Every pixel gathers from the bins that touch it, in a fixed order: equal bits from run to run.

    Args:
        sinogram: Shape ``(B, V, D)``, floating point.
        angles: In radians, shape ``(V,)``, on the device of `sinogram`.
        detector: As in `radon_forward`.
        image_shape: ``(H, W)`` of the result.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Images, shape ``(B, H, W)``, dtype of `sinogram`; differentiable any number of times in `sinogram`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device or value that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> radon_adjoint(torch.ones(1, 1, 2), torch.zeros(1), Detector(2), (2, 2))
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    return _back("radon_adjoint", sinogram, angles, detector, image_shape, backend)


@takes_numpy
def radon_backproject(
    sinogram: Tensor,
    angles: Tensor,
    detector: Detector,
    image_shape: tuple[int, int],
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Back-project for filtered back-projection: not the adjoint of `radon_forward`.

    .. math:: x_b(p) = \sum_v y_{b,v}(p \cdot \theta_v)

    Each row of the filtered sinogram is interpolated linearly at the pixel's centre, as the inversion formula has it,
    where the transpose of Joseph's method would leave its pattern of weights in the image.

    Arguments, result and errors as of `radon_adjoint`; its derivatives are computed in plain PyTorch.

    Example:
        >>> import torch
        >>> radon_backproject(torch.ones(1, 3, 4), torch.zeros(3), Detector(4), (2, 2))
        tensor([[[3., 3.],
                 [3., 3.]]])
    """
    return _back("radon_backproject", sinogram, angles, detector, image_shape, backend)


def _back(
    op: str, sinogram: Tensor, angles: Tensor, detector: Detector, image_shape: tuple[int, int], backend: str
) -> Tensor:
    """Check and dispatch `radon_adjoint` or `radon_backproject`."""
    _checks.tensor(op, "sinogram", sinogram, ndim=3)
    _checks.floating(op, "sinogram", sinogram)
    angles, n_bins, lengths = _check_scan(op, angles, detector, sinogram)
    expected = (sinogram.shape[0], angles.shape[0], n_bins)
    _checks.shape(op, "sinogram", sinogram, expected, "batch, number of angles, detector.n_bins")
    sides = tuple(map(from_numpy, image_shape))
    whole = all(isinstance(n, int | torch.SymInt) and not isinstance(n, bool) for n in sides)
    if len(sides) != 2 or not whole or min(sides) < 1:
        raise ValueError(f"{op}: image_shape must be (height, width), whole and at least 1, got {sides}")
    chosen = backends.resolve(backend, sinogram.device, sinogram.dtype)
    result: Tensor
    if chosen == "reference":
        result = getattr(reference, op)(sinogram, angles, Detector(n_bins, *lengths), sides)
    else:
        result = call(op, sinogram, angles, *sides, lengths, chosen)
    return result


@takes_numpy
def radon_gradient(
    image: Tensor,
    sinogram: Tensor | None,
    angles: Tensor,
    detector: Detector,
    views: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Compute the gradient of the least-squares data fidelity over all views or a minibatch of them.

    .. math:: \frac{V}{|B|} \sum_{v \in B} A_v^T (A_v x - y_v)

    An unbiased estimate of the full gradient when each view is as likely to be in the minibatch as any other.
    Nothing but the residual of the minibatch is stored between projection and back-projection.

    Args:
        image: Shape ``(B, H, W)``, floating point.
        sinogram: The measured data of all views, shape ``(B, V, D)``; None for zeros, which gives the normal
            operator :math:`A_B^T A_B x`.
        angles: In radians, shape ``(V,)``.
        detector: As in `radon_forward`.
        views: int64 indices into `angles`, on the device of `image`; None for all. On a GPU indices out of range
            are not seen (that would cost a synchronisation) and those views count as zero.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Like `image`; differentiable any number of times in `image` and `sinogram`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device, value or view index that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> radon_gradient(torch.ones(1, 2, 2), torch.full((1, 1, 2), 3.0), torch.zeros(1), Detector(2))
        tensor([[[-1., -1.],
                 [-1., -1.]]])
    """
    op = "radon_gradient"
    _checks.tensor(op, "image", image, ndim=3)
    _checks.floating(op, "image", image)
    angles, n_bins, lengths = _check_scan(op, angles, detector, image)
    if sinogram is not None:
        _checks.tensor(op, "sinogram", sinogram, ndim=3)
        _checks.same(op, "sinogram", sinogram, "image", image)
        expected = (image.shape[0], angles.shape[0], n_bins)
        _checks.shape(op, "sinogram", sinogram, expected, "batch of image, number of angles, detector.n_bins")
    if views is not None:
        _checks.index(op, "views", views, angles.shape[0], image.device)
    chosen = backends.resolve(backend, image.device, image.dtype)
    if chosen == "reference":
        return reference.radon_gradient(image, sinogram, angles, Detector(n_bins, *lengths), views)
    result: Tensor = call(op, image, sinogram, angles, views, n_bins, lengths, chosen)
    return result
