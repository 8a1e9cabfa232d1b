"""Coil-weighted Cartesian Fourier sampling and its data-fidelity gradient: parallel MRI, exact transposes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._numpy import takes_numpy
from .._torch import kept
from ..reference import fourier as reference
from . import _checks, backends
from ._library import LIBRARY, call, compute, register, register_linear, restored

_SCAN = "Tensor coil_maps, Tensor sampling"
LIBRARY.define(f"fourier_forward(Tensor image, {_SCAN}, int axis, str backend) -> Tensor")
LIBRARY.define(f"fourier_adjoint(Tensor samples, {_SCAN}, int axis, str backend) -> Tensor")
LIBRARY.define(
    f"fourier_gradient(Tensor image, Tensor? samples, {_SCAN}, Tensor? coils, int axis, str backend) -> Tensor"
)

# Edges of the block of pixels of a program of the Triton backend, each with one partial sum of the norms.
ROWS = COLUMNS = 32
# In half precision the coil maps of the GPU backends take half the memory.
HALF = torch.complex32

# ------------------------------------------------------------------ what the compiled backends take


def _pairs(value: Tensor) -> Tensor:
    """Return a complex tensor as contiguous pairs of reals."""
    return torch.view_as_real(value).contiguous()


def _sizes(coil_maps: Tensor, sampling: Tensor, axis: int) -> tuple[int, int]:
    """Return the length of the (first) transform and the length of the other axis."""
    height, width = coil_maps.shape[2:]
    return (width, height) if axis == -1 and sampling.ndim == 2 else (height, width)


def _sample_shape(batch: int, coil_maps: Tensor, sampling: Tensor, axis: int) -> tuple[int, ...]:
    if sampling.ndim == 3:
        return batch, *coil_maps.shape[1:]
    return batch, coil_maps.shape[1], sampling.shape[1], _sizes(coil_maps, sampling, axis)[1]


def _new_samples(like: Tensor, coil_maps: Tensor, sampling: Tensor, axis: int) -> Tensor:
    """Allocate samples; those of a mask column by column, as the compiled backends read and write them."""
    shape = _sample_shape(like.shape[0], coil_maps, sampling, axis)
    if sampling.ndim == 2:
        return like.new_empty(shape)
    return like.new_empty(*shape[:2], shape[3], shape[2]).transpose(-1, -2)


def _in_order(samples: Tensor | None, sampling: Tensor) -> Tensor | None:
    """Return samples as pairs of reals in the order of memory of `_new_samples`."""
    if samples is None:
        return None
    return _pairs(samples if sampling.ndim == 2 else samples.transpose(-1, -2))


def _scan(
    batch: int, coil_maps: Tensor, sampling: Tensor, coils: Tensor | None, axis: int, backend: str
) -> list[Any]:
    """Return the arguments that describe a scan, the same for every compiled kernel."""
    n, width = _sizes(coil_maps, sampling, axis)
    transposed = axis == -1 and sampling.ndim == 2
    n_used = coil_maps.shape[1] if coils is None else coils.shape[0]
    scratch: tuple[Any, ...] = (None, None, None)
    if backend != "cpu":
        device = coil_maps.device
        mask = sampling.ndim == 3
        # Between the two axes of a mask; the Triton backend keeps all spectra, those of a mask before and after.
        planes = 1 + mask if backend == "triton" else int(mask)
        workspace = (planes, batch, n_used, n if mask else sampling.shape[1], width, 2)
        scratch = (
            roots_of_unity(n, device),
            roots_of_unity(width, device) if mask else None,
            torch.empty(workspace, device=device) if planes else None,
        )
    return [
        backends.DTYPE_CODES[torch.float16 if coil_maps.dtype == HALF else coil_maps.real.dtype],
        _pairs(coil_maps.transpose(-1, -2) if transposed else coil_maps),
        coil_maps.shape[0] == 1,
        (sampling if sampling.ndim == 2 else sampling.transpose(-1, -2)).contiguous(),
        sampling.shape[1] if sampling.ndim == 2 else 0,
        sampling.shape[0] == 1,
        coils,
        n_used,
        transposed,
        *scratch,
        batch,
        coil_maps.shape[1],
        n,
        width,
    ]


def roots_of_unity(n: int, device: torch.device) -> Tensor:
    """Return exp(-2 pi i k / n), k = 0 .. n - 1, as pairs of float32 (n, 2), rounded from float64."""
    key = (n, device)
    if key not in _ROOTS:
        angle = torch.arange(n, dtype=torch.float64) * (-2 * torch.pi / n)
        _ROOTS[key] = kept(torch.stack((angle.cos(), angle.sin()), -1).float().to(device))
    return _ROOTS[key]


_ROOTS: dict[tuple[int, torch.device], Tensor] = {}


# ------------------------------------------------------------------ forward


def _forward_impl(image: Tensor, coil_maps: Tensor, sampling: Tensor, axis: int, backend: str) -> Tensor:
    samples = _new_samples(image, coil_maps, sampling, axis)
    if samples.numel() > 0:
        scan = _scan(image.shape[0], coil_maps, sampling, None, axis, backend)
        backends.launch("fourier_forward", image, backend, _pairs(image), _in_order(samples, sampling), *scan)
    return samples


def _forward_fake(image: Tensor, coil_maps: Tensor, sampling: Tensor, axis: int, backend: str) -> Tensor:
    return _new_samples(image, coil_maps, sampling, axis)


register_linear("fourier_forward", _forward_impl, _forward_fake, "fourier_adjoint", lambda image, *scan: scan)


# ------------------------------------------------------------------ adjoint


def _new_image(batch: int, like: Tensor, coil_maps: Tensor) -> Tensor:
    return like.new_empty(batch, *coil_maps.shape[2:])


def _adjoint_impl(samples: Tensor, coil_maps: Tensor, sampling: Tensor, axis: int, backend: str) -> Tensor:
    image = _new_image(samples.shape[0], samples, coil_maps)
    if image.numel() > 0:
        scan = _scan(samples.shape[0], coil_maps, sampling, None, axis, backend)
        backends.launch(
            "fourier_adjoint", samples, backend, _in_order(samples, sampling), _pairs(image), *scan
        )
    return image


def _adjoint_fake(samples: Tensor, coil_maps: Tensor, sampling: Tensor, axis: int, backend: str) -> Tensor:
    return _new_image(samples.shape[0], samples, coil_maps)


register_linear(
    "fourier_adjoint", _adjoint_impl, _adjoint_fake, "fourier_forward", lambda samples, *scan: scan
)


# ------------------------------------------------------------------ gradient


def _gradient_impl(
    image: Tensor,
    samples: Tensor | None,
    coil_maps: Tensor,
    sampling: Tensor,
    coils: Tensor | None,
    axis: int,
    backend: str,
) -> Tensor:
    gradient = _new_image(image.shape[0], image, coil_maps)
    if gradient.numel() > 0:
        scan = _scan(image.shape[0], coil_maps, sampling, coils, axis, backend)
        data = _in_order(samples, sampling)
        backends.launch("fourier_gradient", image, backend, _pairs(image), data, _pairs(gradient), *scan)
    return gradient


def _gradient_fake(image: Tensor, samples: Tensor | None, coil_maps: Tensor, *_: Any) -> Tensor:
    return _new_image(image.shape[0], image, coil_maps)


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Apply the Hermitian normal operator to `grad`, and -A_B with the coils back in their places."""
    _, with_data, coil_maps, sampling, coils, *how = restored(ctx)
    normal = call("fourier_gradient", grad, None, coil_maps, sampling, coils, *how)
    if not (with_data and ctx.needs_input_grad[1]):
        return normal, *[None] * 6
    maps = coil_maps
    if coils is not None:
        maps = torch.view_as_complex(torch.view_as_real(coil_maps.resolve_conj()).index_select(1, coils))
    scale = -coil_maps.shape[1] / maps.shape[1]
    projected = call("fourier_forward", grad, maps, sampling, *how) * scale
    if coils is not None:
        empty = projected.new_zeros(projected.shape[0], coil_maps.shape[1], *projected.shape[2:])
        projected = empty.index_add(1, coils, projected)
    return normal, projected, *[None] * 5


register("fourier_gradient", _gradient_impl, _gradient_fake, _gradient_backward, variables=(0, 1))


# ------------------------------------------------------------------ what users call


def _check_scan(
    op: str, like_name: str, like: Tensor, coil_maps: Tensor, sampling: Tensor, axis: int, backend: str
) -> tuple[Tensor, int, str]:
    """Check everything but image and samples; return the maps, the axis from the end, and the backend."""
    _checks.tensor(op, like_name, like)
    if not like.is_complex() or like.dtype == HALF:
        raise TypeError(f"{op}: {like_name} must be complex64 or complex128, got {like.dtype}")
    _checks.tensor(op, "coil_maps", coil_maps, ndim=4)
    _checks.fixed(op, "coil_maps", coil_maps, like_name, like)
    if coil_maps.dtype != HALF:
        _checks.same(op, "coil_maps", coil_maps, like_name, like)
    batch, (_, n_coils, height, width) = like.shape[0], coil_maps.shape
    if coil_maps.shape[0] not in (1, batch) or min(n_coils, height, width) < 1:
        raise ValueError(
            f"{op}: coil_maps must have shape (1 or {batch}, C, H, W), none of them 0, got {tuple(coil_maps.shape)}"
        )
    if not isinstance(axis, int) or axis not in (-2, -1):
        raise ValueError(f"{op}: axis must be -2 or -1, got {axis}")
    _checks.tensor(op, "sampling", sampling)
    if sampling.device != like.device:
        raise ValueError(f"{op}: sampling must be on {like.device}, got {sampling.device}")
    if sampling.ndim == 3 and sampling.dtype == torch.bool:
        if sampling.shape[0] not in (1, batch) or tuple(sampling.shape[1:]) != (height, width):
            raise ValueError(
                f"{op}: a mask must have shape (1 or {batch}, {height}, {width}), got {tuple(sampling.shape)}"
            )
        axis = -2
    elif sampling.ndim == 2 and sampling.dtype == torch.int64:
        _check_lines(op, sampling, batch, coil_maps.shape[axis])
    else:
        raise TypeError(
            f"{op}: sampling must be int64 lines (K, L) or a bool mask (K, H, W), got {sampling.dtype} "
            f"of shape {tuple(sampling.shape)}"
        )
    chosen = backends.resolve(backend, like.device, like.dtype)
    if coil_maps.dtype == HALF and chosen == "cpu":
        raise TypeError(f"{op}: coil_maps in {HALF} are for the GPU backends, not for 'cpu'")
    return coil_maps, axis, chosen


def _check_lines(op: str, lines: Tensor, batch: int, n: int) -> None:
    if lines.shape[0] not in (1, batch) or lines.shape[1] == 0:
        raise ValueError(f"{op}: lines must have shape (1 or {batch}, at least 1), got {tuple(lines.shape)}")
    if lines.device.type != "cpu" or torch.compiler.is_compiling() or lines.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(lines))
    if low < -1 or high >= n:
        raise ValueError(f"{op}: lines must lie in 0..{n - 1} (-1 pads), got {low if low < -1 else high}")


def _check_image(op: str, image: Tensor, coil_maps: Tensor) -> None:
    _checks.tensor(op, "image", image, ndim=3)
    _checks.shape(op, "image", image, (image.shape[0], *coil_maps.shape[2:]), "batch, and H, W of coil_maps")


def _check_samples(
    op: str, samples: Tensor, batch: int, coil_maps: Tensor, sampling: Tensor, axis: int
) -> None:
    expected = _sample_shape(batch, coil_maps, sampling, axis)
    why = "batch, coils, " + ("lines, points of a line" if sampling.ndim == 2 else "H, W")
    _checks.shape(op, "samples", samples, expected, why)


@takes_numpy
def fourier_forward(
    image: Tensor, coil_maps: Tensor, sampling: Tensor, *, axis: int = -2, backend: str = "auto"
) -> Tensor:
    r"""Weight images by coil sensitivity maps, transform them, and keep the samples of lines or of points.

    .. math:: y_{b,c} = M F (S_c \odot x_b)

    `F` is the orthonormal discrete Fourier transform with zero frequency at index 0. Where whole lines are sampled,
    the transform along them is unitary and drops out of :math:`A^H A`; so `F` then runs along `axis` alone, and
    the samples are those of a k-space that was transformed back along its lines once (see `CartesianMRI`).

    Args:
        image: Shape ``(B, H, W)``, complex64 or complex128.
        coil_maps: :math:`S_c`, shape ``(1 or B, C, H, W)``, dtype of `image`; on the GPU backends also complex32,
            which halves their memory at a relative error of 2e-4. Not differentiable.
        sampling: int64 lines ``(1 or B, L)``, the frequencies sampled along `axis`, each once, -1 as padding; or a bool
            mask ``(1 or B, H, W)`` of points.
        axis: The axis that the lines are counted along, -2 or -1; of no meaning for a mask.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Samples ``(B, C, L, P)`` with `P` the length of a line, zero where -1 pads; or ``(B, C, H, W)``, zero
        where the mask is. Differentiable any number of times in `image`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device or value that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> x, maps = torch.ones(1, 4, 3, dtype=torch.complex64), torch.ones(1, 2, 4, 3, dtype=torch.complex64)
        >>> fourier_forward(x, maps, torch.tensor([[0, 2]])).real[0, 0]
        tensor([[2., 2., 2.],
                [0., 0., 0.]])

    References:
        Pruessmann, Weiger, Scheidegger, Boesiger, "SENSE: sensitivity encoding for fast MRI", Magnetic Resonance
        in Medicine 42 (1999).
    """
    op = "fourier_forward"
    coil_maps, axis, chosen = _check_scan(op, "image", image, coil_maps, sampling, axis, backend)
    _check_image(op, image, coil_maps)
    result: Tensor = compute(op, (image, coil_maps, sampling, axis), chosen, reference)
    return result


@takes_numpy
def fourier_adjoint(
    samples: Tensor, coil_maps: Tensor, sampling: Tensor, *, axis: int = -2, backend: str = "auto"
) -> Tensor:
    r"""Combine the inverse transforms of samples over the coils: the exact conjugate transpose of `fourier_forward`.

    .. math:: x_b = \sum_c \overline{S_c} \odot F^H M y_{b,c}

    Coils are summed in order, without atomics: equal bits from run to run.

    Args:
        samples: As `fourier_forward` returns them, complex64 or complex128.
        coil_maps: As in `fourier_forward`.
        sampling: As in `fourier_forward`.
        axis: As in `fourier_forward`.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Images ``(B, H, W)``, dtype of `samples`; differentiable any number of times in `samples`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device or value that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> y, maps = torch.ones(1, 2, 1, 3, dtype=torch.complex64), torch.ones(1, 2, 4, 3, dtype=torch.complex64)
        >>> fourier_adjoint(y, maps, torch.tensor([[0]])).real[0, 0]
        tensor([1., 1., 1.])
    """
    op = "fourier_adjoint"
    _checks.tensor(op, "samples", samples, ndim=4)
    coil_maps, axis, chosen = _check_scan(op, "samples", samples, coil_maps, sampling, axis, backend)
    _check_samples(op, samples, samples.shape[0], coil_maps, sampling, axis)
    result: Tensor = compute(op, (samples, coil_maps, sampling, axis), chosen, reference)
    return result


@takes_numpy
def fourier_gradient(
    image: Tensor,
    samples: Tensor | None,
    coil_maps: Tensor,
    sampling: Tensor,
    coils: Tensor | None = None,
    *,
    axis: int = -2,
    backend: str = "auto",
) -> Tensor:
    r"""Compute the gradient of the least-squares data fidelity over all coils or a minibatch of them.

    .. math:: \frac{C}{|B|} \sum_{c \in B} \overline{S_c} \odot F^H M (F (S_c \odot x) - y_c)

    An unbiased estimate of the full gradient when each coil is as likely to be in the minibatch as any other. On
    the compiled backends nothing but maps, samples and images passes through memory where lines are sampled; a mask
    takes one plane of intermediate results more.

    Args:
        image: Shape ``(B, H, W)``, complex64 or complex128.
        samples: The measured data of all coils, as `fourier_forward` returns them; None for zeros, which gives the
            normal operator :math:`A_B^H A_B x`.
        coil_maps: As in `fourier_forward`.
        sampling: As in `fourier_forward`.
        coils: int64 indices of the minibatch, on the device of `image`; None for all. On a GPU indices out of range
            are not seen (that would cost a synchronisation) and those coils count as zero.
        axis: As in `fourier_forward`.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Like `image`; differentiable any number of times in `image` and `samples`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device, value or index that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> x, maps = torch.ones(1, 4, 3, dtype=torch.complex64), torch.ones(1, 2, 4, 3, dtype=torch.complex64)
        >>> fourier_gradient(x, None, maps, torch.tensor([[0, 2]])).real[0, 0]
        tensor([2., 2., 2.])
    """
    op = "fourier_gradient"
    coil_maps, axis, chosen = _check_scan(op, "image", image, coil_maps, sampling, axis, backend)
    _check_image(op, image, coil_maps)
    if samples is not None:
        _checks.tensor(op, "samples", samples, ndim=4)
        _checks.same(op, "samples", samples, "image", image)
        _check_samples(op, samples, image.shape[0], coil_maps, sampling, axis)
    if coils is not None:
        _checks.index(op, "coils", coils, coil_maps.shape[1], image.device)
    result: Tensor = compute(op, (image, samples, coil_maps, sampling, coils, axis), chosen, reference)
    return result
