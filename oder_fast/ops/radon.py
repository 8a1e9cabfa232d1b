"""The Radon transform and its data-fidelity gradient: parallel beam, Joseph's method, exact transposes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._numpy import takes_numpy
from ..reference import radon as reference
from . import _checks, backends
from ._library import LIBRARY, register

_GEOMETRY = "int n_bins, float bin_spacing, float bin_offset, float pixel_size, str backend"
LIBRARY.define(f"radon_forward(Tensor image, Tensor angles, {_GEOMETRY}) -> Tensor")
for _name in ("radon_adjoint", "radon_backproject"):
    LIBRARY.define(
        f"{_name}(Tensor sinogram, Tensor angles, SymInt height, SymInt width, float bin_spacing, "
        "float bin_offset, float pixel_size, str backend) -> Tensor"
    )
LIBRARY.define(
    "radon_backproject_transpose(Tensor image, Tensor angles, int n_bins, float bin_spacing, float bin_offset, "
    "float pixel_size) -> Tensor"
)
LIBRARY.define(
    f"radon_gradient(Tensor image, Tensor? sinogram, Tensor angles, Tensor? views, {_GEOMETRY}) -> Tensor"
)

# Image rows or columns over which the CUDA kernels sum a ray before they write it down.
STRIP = 32


def _sums(
    image: Tensor, angles: Tensor, views: Tensor | None, n_bins: int, backend: str
) -> tuple[Tensor | None, int]:
    """Allocate the ray sums of a projection, shape (n_sums, B, n_used, D), and tell n_sums.

    The CUDA kernels split the image into so many groups of strips that one image fills the GPU; in a gradient
    the first sinogram then takes the residual. The C++ backend keeps its own, in its back-projection's layout.
    """
    if backend == "cpu":
        return None, 0
    batch, height, width = image.shape
    n_used = angles.shape[0] if views is None else views.shape[0]
    n_sums = 1
    if backend == "cuda":
        n_sums = max(1, min(-(-max(height, width) // STRIP), 16, -(-4096 // (batch * n_used))))
    return image.new_empty(n_sums, batch, n_used, n_bins, dtype=torch.float32), n_sums


# ------------------------------------------------------------------ forward


def _forward_impl(
    image: Tensor,
    angles: Tensor,
    n_bins: int,
    bin_spacing: float,
    bin_offset: float,
    pixel_size: float,
    backend: str,
) -> Tensor:
    batch, height, width = image.shape
    sinogram = image.new_empty(batch, angles.shape[0], n_bins)
    if image.numel() == 0:
        return sinogram.zero_()
    backends.named(backend).launch(
        "radon_forward",
        image,
        backends.DTYPE_CODES[image.dtype],
        image,
        sinogram,
        *(_sums(image, angles, None, n_bins, backend) if backend == "cuda" else (None, 0)),
        batch,
        height,
        width,
        angles,
        angles.shape[0],
        n_bins,
        bin_spacing,
        bin_offset,
        pixel_size,
    )
    return sinogram


def _forward_fake(image: Tensor, angles: Tensor, n_bins: int, *_: Any) -> Tensor:
    return image.new_empty(image.shape[0], angles.shape[0], n_bins)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, angles, _, *geometry = inputs
    ctx.save_for_backward(angles)
    ctx.size, ctx.geometry = image.shape[1:], geometry


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (angles,) = ctx.saved_tensors
    return torch.ops.oder_fast.radon_adjoint(grad, angles, *ctx.size, *ctx.geometry), *[None] * 6


register("radon_forward", _forward_impl, _forward_fake, _forward_backward, _forward_setup)


# ------------------------------------------------------------------ adjoint


def _gather(
    name: str,
    sinogram: Tensor,
    angles: Tensor,
    height: int,
    width: int,
    bin_spacing: float,
    bin_offset: float,
    pixel_size: float,
    backend: str,
) -> Tensor:
    """Launch `radon_adjoint` or `radon_backproject`."""
    batch, _, n_bins = sinogram.shape
    image = sinogram.new_empty(batch, height, width)
    if image.numel() == 0:
        return image
    backends.named(backend).launch(
        name,
        sinogram,
        backends.DTYPE_CODES[sinogram.dtype],
        sinogram,
        image,
        batch,
        height,
        width,
        angles,
        angles.shape[0],
        n_bins,
        bin_spacing,
        bin_offset,
        pixel_size,
    )
    return image


def _adjoint_impl(*args: Any) -> Tensor:
    return _gather("radon_adjoint", *args)


def _backproject_impl(*args: Any) -> Tensor:
    return _gather("radon_backproject", *args)


def _adjoint_fake(sinogram: Tensor, angles: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return sinogram.new_empty(sinogram.shape[0], height, width)


def _adjoint_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sinogram, angles, _, _, *geometry = inputs
    ctx.save_for_backward(angles)
    ctx.n_bins, ctx.geometry = sinogram.shape[2], geometry


def _adjoint_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (angles,) = ctx.saved_tensors
    return torch.ops.oder_fast.radon_forward(grad, angles, ctx.n_bins, *ctx.geometry), *[None] * 7


register("radon_adjoint", _adjoint_impl, _adjoint_fake, _adjoint_backward, _adjoint_setup)


def _backproject_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sinogram, angles, _, _, *geometry, _ = inputs
    ctx.save_for_backward(angles)
    ctx.n_bins, ctx.geometry = sinogram.shape[2], geometry


def _backproject_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (angles,) = ctx.saved_tensors
    transpose = torch.ops.oder_fast.radon_backproject_transpose
    return transpose(grad, angles, ctx.n_bins, *ctx.geometry), *[None] * 7


register("radon_backproject", _backproject_impl, _adjoint_fake, _backproject_backward, _backproject_setup)


# Filtered back-projection only starts an iteration: its transpose, rarely needed, is left to the reference.


def _transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (angles,) = ctx.saved_tensors
    back = torch.ops.oder_fast.radon_backproject
    backend = backends.resolve("auto", grad.device, grad.dtype)
    if backend == "reference":
        image = reference.radon_backproject(grad, angles, *ctx.size, *ctx.geometry)
    else:
        image = back(grad, angles, *ctx.size, *ctx.geometry, backend)
    return image, *[None] * 5


register(
    "radon_backproject_transpose",
    reference.radon_backproject_transpose,
    _forward_fake,
    _transpose_backward,
    _forward_setup,
)


# ------------------------------------------------------------------ gradient


def _gradient_impl(
    image: Tensor,
    sinogram: Tensor | None,
    angles: Tensor,
    views: Tensor | None,
    n_bins: int,
    bin_spacing: float,
    bin_offset: float,
    pixel_size: float,
    backend: str,
) -> Tensor:
    batch, height, width = image.shape
    gradient = torch.empty_like(image, memory_format=torch.contiguous_format)
    if image.numel() == 0:
        return gradient
    backends.named(backend).launch(
        "radon_gradient",
        image,
        backends.DTYPE_CODES[image.dtype],
        image,
        sinogram,
        *_sums(image, angles, views, n_bins, backend),
        gradient,
        batch,
        height,
        width,
        angles,
        angles.shape[0],
        views,
        angles.shape[0] if views is None else views.shape[0],
        n_bins,
        bin_spacing,
        bin_offset,
        pixel_size,
    )
    return gradient


def _gradient_fake(image: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, sinogram, angles, views, *geometry = inputs
    ctx.save_for_backward(angles, views)
    ctx.with_data, ctx.geometry = sinogram is not None, geometry


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Apply the symmetric normal operator to `grad`, and -A_B with rows back in their places."""
    angles, views = ctx.saved_tensors
    normal = torch.ops.oder_fast.radon_gradient(grad, None, angles, views, *ctx.geometry)
    if not (ctx.with_data and ctx.needs_input_grad[1]):
        return normal, *[None] * 8
    used = angles if views is None else angles[views]
    scale = -angles.shape[0] / used.shape[0]
    projected = torch.ops.oder_fast.radon_forward(grad, used, *ctx.geometry) * scale
    if views is not None:
        empty = projected.new_zeros(projected.shape[0], angles.shape[0], projected.shape[2])
        projected = empty.index_add(1, views, projected)
    return normal, projected, *[None] * 7


register("radon_gradient", _gradient_impl, _gradient_fake, _gradient_backward, _gradient_setup)


# ------------------------------------------------------------------ what users call


def _check_geometry(
    op: str, angles: Tensor, n_bins: int, spacing: float, offset: float, pixel_size: float, like: Tensor
) -> Tensor:
    """Check the geometry and return the angles as the backends take them."""
    _checks.tensor(op, "angles", angles, ndim=1)
    _checks.floating(op, "angles", angles)
    if angles.shape[0] == 0:
        raise ValueError(f"{op}: angles must hold at least one view, got none")
    if angles.device != like.device:
        raise ValueError(f"{op}: angles must be on {like.device}, got {angles.device}")
    if isinstance(n_bins, bool) or not isinstance(n_bins, (int, torch.SymInt)):
        raise TypeError(f"{op}: n_bins must be an int, got {type(n_bins).__name__}")
    if n_bins < 1:
        raise ValueError(f"{op}: n_bins must be at least 1, got {n_bins}")
    _checks.positive(op, "bin_spacing", spacing)
    _checks.positive(op, "pixel_size", pixel_size)
    # Beyond this the distance of rays along a line is no finite number.
    if not 0 < spacing / pixel_size < 1e300:
        raise ValueError(
            f"{op}: bin_spacing must be above 0 and below 1e300 pixels, got {spacing / pixel_size}"
        )
    if not abs(offset / pixel_size) < 1e300:
        raise ValueError(f"{op}: bin_offset must be finite and below 1e300 pixels, got {offset / pixel_size}")
    return angles.detach().to(torch.float64)


@takes_numpy
def radon_forward(
    image: Tensor,
    angles: Tensor,
    n_bins: int,
    *,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""Project images along parallel rays.

    .. math:: y_{b,v,d} = \int x_b \, ds \quad \text{along} \quad x\cos\theta_v + y\sin\theta_v = s_d

    The integral is Joseph's: march along the axis nearer the ray, interpolate linearly along the other, times
    the step length. x points right and y up from the image centre, which is the axis of rotation; pixels outside
    the image are zero; :math:`s_d = (d - (D - 1)/2)\,\mathrm{bin\_spacing} + \mathrm{bin\_offset}`.

    Args:
        image: Shape ``(B, H, W)``, floating point; rows run downward.
        angles: :math:`\theta_v` in radians, shape ``(V,)``, any order, on the device of `image`.
        n_bins: Number of detector bins ``D``.
        bin_spacing: Distance of neighbouring bins, in the unit of `pixel_size`.
        bin_offset: Position of the detector's centre, same unit.
        pixel_size: Edge of a pixel; the result is in this unit times the unit of `image`.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Sinogram, shape ``(B, V, D)``, dtype of `image`; differentiable any number of times in `image`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device or value that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> radon_forward(torch.ones(1, 2, 2), torch.zeros(1), n_bins=2)
        tensor([[[2., 2.]]])

    References:
        Joseph, "An improved algorithm for reprojecting rays through pixel images",
        IEEE Trans. Medical Imaging 1 (1982).
    """
    op = "radon_forward"
    _checks.tensor(op, "image", image, ndim=3)
    _checks.floating(op, "image", image)
    angles = _check_geometry(op, angles, n_bins, bin_spacing, bin_offset, pixel_size, image)
    chosen = backends.resolve(backend, image.device, image.dtype)
    geometry = (n_bins, float(bin_spacing), float(bin_offset), float(pixel_size))
    if chosen == "reference":
        return reference.radon_forward(image, angles, *geometry)
    result: Tensor = torch.ops.oder_fast.radon_forward(image, angles, *geometry, chosen)
    return result


@takes_numpy
def radon_adjoint(
    sinogram: Tensor,
    angles: Tensor,
    image_shape: tuple[int, int],
    *,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""Back-project sinograms: the exact transpose of `radon_forward`.

    .. math:: x_{b,i,j} = \sum_{v,d} a_{(v,d),(i,j)} \, y_{b,v,d}

    Every pixel gathers from the bins that touch it, in a fixed order: equal bits from run to run.

    Args:
        sinogram: Shape ``(B, V, D)``, floating point.
        angles: In radians, shape ``(V,)``, on the device of `sinogram`.
        image_shape: ``(H, W)`` of the result.
        bin_spacing: As in `radon_forward`.
        bin_offset: As in `radon_forward`.
        pixel_size: As in `radon_forward`.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Images, shape ``(B, H, W)``, dtype of `sinogram`; differentiable any number of times in `sinogram`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device or value that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> radon_adjoint(torch.ones(1, 1, 2), torch.zeros(1), (2, 2))
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    geometry = (bin_spacing, bin_offset, pixel_size)
    return _back("radon_adjoint", sinogram, angles, image_shape, geometry, backend)


@takes_numpy
def radon_backproject(
    sinogram: Tensor,
    angles: Tensor,
    image_shape: tuple[int, int],
    *,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""Back-project for filtered back-projection: not the adjoint of `radon_forward`.

    .. math:: x_b(p) = \sum_v y_{b,v}(p \cdot \theta_v)

    Each row of the sinogram is interpolated linearly at the pixel's centre, as the inversion formula has it,
    where the transpose of Joseph's method would leave its pattern of weights in the image.

    Args:
        sinogram: Filtered sinogram, shape ``(B, V, D)``, floating point.
        angles: In radians, shape ``(V,)``, on the device of `sinogram`.
        image_shape: ``(H, W)`` of the result.
        bin_spacing: As in `radon_forward`.
        bin_offset: As in `radon_forward`.
        pixel_size: As in `radon_forward`.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Images, shape ``(B, H, W)``, dtype of `sinogram`; differentiable in `sinogram` (in plain PyTorch).

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device or value that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> radon_backproject(torch.ones(1, 3, 4), torch.zeros(3), (2, 2))
        tensor([[[3., 3.],
                 [3., 3.]]])
    """
    geometry = (bin_spacing, bin_offset, pixel_size)
    return _back("radon_backproject", sinogram, angles, image_shape, geometry, backend)


def _back(
    op: str,
    sinogram: Tensor,
    angles: Tensor,
    image_shape: tuple[int, int],
    geometry: tuple[float, float, float],
    backend: str,
) -> Tensor:
    """Check and dispatch `radon_adjoint` or `radon_backproject`."""
    _checks.tensor(op, "sinogram", sinogram, ndim=3)
    _checks.floating(op, "sinogram", sinogram)
    batch, _, n_bins = sinogram.shape
    angles = _check_geometry(op, angles, n_bins, *geometry, sinogram)
    expected = (batch, angles.shape[0], n_bins)
    _checks.shape(op, "sinogram", sinogram, expected, "one row for each of the angles")
    if len(image_shape) != 2 or min(image_shape) < 1:
        raise ValueError(
            f"{op}: image_shape must be (height, width), both at least 1, got {tuple(image_shape)}"
        )
    chosen = backends.resolve(backend, sinogram.device, sinogram.dtype)
    args = (sinogram, angles, *image_shape, *map(float, geometry))
    if chosen == "reference":
        result: Tensor = getattr(reference, op)(*args)
        return result
    result = getattr(torch.ops.oder_fast, op)(*args, chosen)
    return result


@takes_numpy
def radon_gradient(
    image: Tensor,
    sinogram: Tensor | None,
    angles: Tensor,
    views: Tensor | None = None,
    *,
    n_bins: int | None = None,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
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
        views: int64 indices into `angles`, on the device of `image`; None for all. On a GPU indices out of range
            are not seen (that would cost a synchronisation) and those views count as zero.
        n_bins: Number of detector bins, where `sinogram` is None.
        bin_spacing: As in `radon_forward`.
        bin_offset: As in `radon_forward`.
        pixel_size: As in `radon_forward`.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Like `image`; differentiable any number of times in `image` and `sinogram`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device, value or view index that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> radon_gradient(torch.ones(1, 2, 2), torch.full((1, 1, 2), 3.0), torch.zeros(1))
        tensor([[[-1., -1.],
                 [-1., -1.]]])
    """
    op = "radon_gradient"
    _checks.tensor(op, "image", image, ndim=3)
    _checks.floating(op, "image", image)
    if sinogram is not None:
        _checks.tensor(op, "sinogram", sinogram, ndim=3)
        n_bins = sinogram.shape[2]
    elif n_bins is None:
        raise ValueError(f"{op}: n_bins must be given where sinogram is None")
    angles = _check_geometry(op, angles, n_bins, bin_spacing, bin_offset, pixel_size, image)
    if sinogram is not None:
        _checks.same(op, "sinogram", sinogram, "image", image)
        expected = (image.shape[0], angles.shape[0], n_bins)
        _checks.shape(op, "sinogram", sinogram, expected, "batch of image, number of angles, n_bins")
    if views is not None:
        _checks.index(op, "views", views, angles.shape[0], image.device)
    chosen = backends.resolve(backend, image.device, image.dtype)
    args = (image, sinogram, angles, views, n_bins, float(bin_spacing), float(bin_offset), float(pixel_size))
    if chosen == "reference":
        return reference.radon_gradient(*args)
    result: Tensor = torch.ops.oder_fast.radon_gradient(*args, chosen)
    return result
