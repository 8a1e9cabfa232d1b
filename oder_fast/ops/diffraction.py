"""Intensity diffraction tomography (first Born) and its data-fidelity gradient: transfer functions made on the fly."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numpy import takes_numpy
from .._torch import fft
from ..reference import diffraction as reference
from . import _checks, backends
from ._library import LIBRARY, call, compute, register, register_linear, restored

_SCAN = "Tensor transfer, Tensor depths, Tensor support"
LIBRARY.define(f"diffraction_forward(Tensor image, {_SCAN}, float[] optics, str backend) -> Tensor")
LIBRARY.define(f"diffraction_adjoint(Tensor intensities, {_SCAN}, float[] optics, str backend) -> Tensor")
LIBRARY.define(
    f"diffraction_gradient(Tensor image, Tensor? spectra, {_SCAN}, Tensor? illuminations, float[] optics, str backend) "
    "-> Tensor"
)
LIBRARY.define(
    "diffraction_gram(Tensor image, Tensor auto, Tensor pairs, Tensor? spectrum, str backend) -> Tensor"
)


class Optics(NamedTuple):
    r"""Numbers that transfer functions are made of; lengths in one unit, frequencies in cycles of it.

    The axial wavenumber at the transverse frequency `q` is
    :math:`k_z(q) = 2 \pi s \sqrt{\nu^2 - |q|^2}`.

    Attributes:
        pixel_size: Of the images.
        cutoff: :math:`\nu`, the largest frequency that propagates: index of the medium over the vacuum wavelength.
        scale: `s`; 1 for exact wavenumbers.
        amplitude: :math:`k_0^2 \Delta z / 2` with the vacuum wavenumber and the thickness of a slice.
        first: Depth of the first slice.
        spacing: Of evenly spaced slices, which cost two sines and cosines for all and whose depths follow from `first`;
            0 for the depths given.
    """

    pixel_size: float
    cutoff: float
    scale: float
    amplitude: float
    first: float = 0.0
    spacing: float = 0.0


# ------------------------------------------------------------------ what the compiled backends take


# torch.compile knows no dtype.to_complex.
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def _pairs(value: Tensor | None) -> Tensor | None:
    """Return a complex tensor as pairs of reals."""
    return None if value is None else torch.view_as_real(value)


def _transform(image: Tensor, support: Tensor | None, backend: str) -> Tensor:
    """Return the spectra of slices; the C++ backend leaves out the rows that no pupil meets."""
    if backend == "cpu":
        spectrum = torch.empty_like(image, memory_format=torch.contiguous_format)
        backends.launch(
            "diffraction_transform", image, backend, _pairs(image), _pairs(spectrum), *_planes(image, support)
        )
        return spectrum
    return fft(torch.fft.fftn, image)


def _inverse(spectrum: Tensor, support: Tensor | None, backend: str) -> Tensor:
    """Return the images of spectra; the C++ backend takes their memory, and rows that no pupil meets for zero."""
    if backend == "cpu":
        pairs = _pairs(spectrum)
        backends.launch("diffraction_inverse", spectrum, backend, pairs, pairs, *_planes(spectrum, support))
        return spectrum
    return fft(torch.fft.ifftn, spectrum)


def _planes(like: Tensor, support: Tensor | None) -> tuple[Any, ...]:
    """Return the arguments that describe the planes of slices and the pupils among their spectra."""
    batch, slices, height, width = like.shape
    if support is None:
        return None, 0, batch * slices, height, width
    return support, support.shape[0], batch * slices, height, width


def _scan(
    image: Tensor,
    transfer: Tensor,
    depths: Tensor,
    support: Tensor,
    illuminations: Tensor | None,
    optics: list[float],
) -> list[Any]:
    """Return the arguments that describe a scan, the same for every compiled kernel."""
    stored = transfer.is_complex()
    return [
        _pairs(transfer) if stored else transfer,
        stored,
        depths,
        support,
        illuminations,
        transfer.shape[0] if illuminations is None else illuminations.shape[0],
        *optics,
        image.shape[0],
        transfer.shape[0],
        *image.shape[1:],
    ]


# ------------------------------------------------------------------ forward


def _forward_impl(
    image: Tensor, transfer: Tensor, depths: Tensor, support: Tensor, optics: list[float], backend: str
) -> Tensor:
    if image.numel() == 0:
        return _forward_fake(image, transfer)
    half = image.new_empty(len(image), len(transfer), image.shape[2], image.shape[3] // 2 + 1)
    scan = _scan(image, transfer, depths, support, None, optics)
    backends.launch(
        "diffraction_forward",
        image,
        backend,
        _pairs(_transform(image, support, backend)),
        _pairs(half),
        *scan,
    )
    return fft(torch.fft.irfftn, half, size=image.shape[2:])


def _forward_fake(image: Tensor, transfer: Tensor, *_: Any) -> Tensor:
    return image.new_empty(image.shape[0], transfer.shape[0], *image.shape[2:], dtype=image.real.dtype)


register_linear(
    "diffraction_forward", _forward_impl, _forward_fake, "diffraction_adjoint", lambda image, *scan: scan
)


# ------------------------------------------------------------------ adjoint


def _adjoint_fake(intensities: Tensor, transfer: Tensor, depths: Tensor, *_: Any) -> Tensor:
    shape = (intensities.shape[0], len(depths), *intensities.shape[2:])
    return intensities.new_empty(shape, dtype=_COMPLEX[intensities.dtype])


def _adjoint_impl(
    intensities: Tensor, transfer: Tensor, depths: Tensor, support: Tensor, optics: list[float], backend: str
) -> Tensor:
    spectrum = _adjoint_fake(intensities, transfer, depths)
    if spectrum.numel() == 0:
        return spectrum
    half = fft(torch.fft.rfftn, intensities)
    scan = _scan(spectrum, transfer, depths, support, None, optics)
    backends.launch("diffraction_adjoint", spectrum, backend, _pairs(half), _pairs(spectrum), *scan)
    return _inverse(spectrum, support, backend)


register_linear(
    "diffraction_adjoint",
    _adjoint_impl,
    _adjoint_fake,
    "diffraction_forward",
    lambda intensities, *scan: scan,
)


# ------------------------------------------------------------------ gradient


def _gradient_impl(
    image: Tensor,
    spectra: Tensor | None,
    transfer: Tensor,
    depths: Tensor,
    support: Tensor,
    illuminations: Tensor | None,
    optics: list[float],
    backend: str,
) -> Tensor:
    spectrum = _like_image(image)
    if image.numel() == 0:
        return spectrum
    scan = _scan(image, transfer, depths, support, illuminations, optics)
    pairs = (_pairs(_transform(image, support, backend)), _pairs(spectra), _pairs(spectrum))
    backends.launch("diffraction_gradient", image, backend, *pairs, *scan)
    return _inverse(spectrum, support, backend)


def _like_image(image: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Apply the normal operator to `grad`, and -A_B, among spectra, with the illuminations back in their places."""
    _, with_data, transfer, depths, support, illuminations, *rest = restored(ctx)
    used = (transfer, depths, support)
    normal = call("diffraction_gradient", grad, None, *used, illuminations, *rest)
    if not (with_data and ctx.needs_input_grad[1]):
        return normal, *[None] * 7
    if illuminations is not None:
        used = (transfer.index_select(0, illuminations), depths, support.index_select(0, illuminations))
    intensities = call("diffraction_forward", grad, *used, *rest)
    # Half a spectrum stands for a whole one: its inner columns count twice.
    projected = fft(torch.fft.rfftn, intensities) * -(len(transfer) / used[0].shape[0])
    projected = projected * _weights(grad.shape[-1], projected)
    if illuminations is not None:
        empty = projected.new_zeros(projected.shape[0], len(transfer), *projected.shape[2:])
        projected = empty.index_add(1, illuminations, projected)
    return normal, projected, *[None] * 6


def _weights(width: int, like: Tensor) -> Tensor:
    """Return how often each column of half a spectrum stands in the whole one."""
    weights = torch.full((width // 2 + 1,), 2.0, dtype=like.real.dtype, device=like.device)
    weights[0] = 1.0
    if width % 2 == 0:
        weights[-1] = 1.0
    return weights


register("diffraction_gradient", _gradient_impl, _like_image, _gradient_backward, variables=(0, 1))


# ------------------------------------------------------------------ Gram matrices


def _gram_impl(image: Tensor, auto: Tensor, pairs: Tensor, spectrum: Tensor | None, backend: str) -> Tensor:
    result = _like_image(image)
    if image.numel() == 0:
        return result
    backends.launch(
        "diffraction_gram",
        image,
        backend,
        _pairs(_transform(image, None, backend)),
        _pairs(spectrum),
        _pairs(result),
        _pairs(auto),
        _pairs(pairs),
        *image.shape,
        *pairs.shape[2:],
    )
    return _inverse(result, None, backend)


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, auto, pairs, with_data, backend = restored(ctx)
    normal = call("diffraction_gram", grad, auto, pairs, None, backend)
    grad_spectrum = -fft(torch.fft.fftn, grad) if with_data else None
    return normal, None, None, grad_spectrum, None


register("diffraction_gram", _gram_impl, _like_image, _gram_backward, variables=(0, 3))


# ------------------------------------------------------------------ what users call


def _check_scan(
    op: str,
    like_name: str,
    like: Tensor,
    transfer: Tensor,
    depths: Tensor,
    support: Tensor,
    optics: Optics,
    backend: str,
) -> tuple[list[float], str]:
    """Check all but the number of slices or intensities; return the numbers and the backend."""
    height, width = like.shape[2:]
    for name, value, ndim in (("transfer", transfer, None), ("depths", depths, 1), ("support", support, 3)):
        _checks.tensor(op, name, value, ndim=ndim)
        _checks.fixed(op, name, value, like_name, like)
    kind = _COMPLEX.get(like.dtype, like.dtype)
    if transfer.ndim == 2 and transfer.dtype == torch.float64:
        if transfer.shape[1] != 2:
            raise ValueError(f"{op}: transfer must have shape (L, 2), got {tuple(transfer.shape)}")
    elif transfer.ndim == 4 and transfer.dtype == kind:
        expected = (transfer.shape[0], len(depths), height, width)
        _checks.shape(op, "transfer", transfer, expected, "illuminations, depths, H, W")
    else:
        raise TypeError(
            f"{op}: transfer must be float64 illuminations (L, 2) or {kind} functions (L, Z, H, W), got "
            f"{transfer.dtype} of shape {tuple(transfer.shape)}"
        )
    if depths.dtype != torch.float64:
        raise TypeError(f"{op}: depths must be float64, got {depths.dtype}")
    if support.dtype != torch.int32:
        raise TypeError(f"{op}: support must be int32, got {support.dtype}")
    _checks.shape(op, "support", support, (transfer.shape[0], height, 2), "illuminations, H, begin and end")
    if min(transfer.shape[0], len(depths), height, width) < 1:
        raise ValueError(f"{op}: needs at least one illumination, slice, row and column")
    try:
        numbers = [float(v) for v in optics]
    except (TypeError, ValueError):
        raise TypeError(f"{op}: optics must be an ops.Optics of numbers, got {optics!r}") from None
    if len(numbers) != len(Optics._fields):
        raise ValueError(f"{op}: optics must be {Optics._fields}, got {len(numbers)} numbers")
    if not all(math.isfinite(v) for v in numbers) or min(numbers[:3]) <= 0:
        raise ValueError(
            f"{op}: optics must be finite, and its first three numbers above 0, got {tuple(numbers)}"
        )
    return numbers, backends.resolve(backend, like.device, kind)


def _check_image(op: str, image: Tensor, depths: Tensor) -> None:
    _checks.tensor(op, "image", image, ndim=4)
    if image.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(f"{op}: image must be complex64 or complex128, got {image.dtype}")
    if isinstance(depths, Tensor):
        expected = (image.shape[0], depths.numel(), *image.shape[2:])
        _checks.shape(op, "image", image, expected, "batch, depths, H, W")


@takes_numpy
def diffraction_forward(
    image: Tensor, transfer: Tensor, depths: Tensor, support: Tensor, optics: Optics, *, backend: str = "auto"
) -> Tensor:
    r"""Compute the intensities of a weakly scattering volume under plane waves, minus 1 (first Born approximation).

    .. math:: y_l = 2 \operatorname{Re} F^{-1} \Bigl( \sum_z h_{l,z} \, F x_z \Bigr), \qquad
        h_{l,z}(u) = i \, a \, P(u + f_l) \, \frac{e^{-i z (k_z(u + f_l) - k_z(f_l))}}{k_z(u + f_l)}

    for the incident wave :math:`e^{2 \pi i f_l r}`, the pupil `P` and the amplitude `a`. It is linear over the reals:
    the real part of `x` shifts phases, the imaginary one absorbs. Written so, each illumination needs the slices'
    spectra in one pupil only, and none of its transfer functions is ever in memory.

    Args:
        image: Permittivity contrast :math:`n^2 - n_0^2` of the slices, shape ``(B, Z, H, W)``, complex64 or
            complex128.
        transfer: Transverse frequencies :math:`f_l` of the illuminations, rows and columns, float64 ``(L, 2)``; or
            transfer functions of one's own :math:`h_{l,z}`, ``(L, Z, H, W)``, dtype of `image`.
        depths: Of the slices, float64 ``(Z,)``; where `optics` has a spacing, only their number counts.
        support: int32 ``(L, H, 2)``: the signed column frequencies, first and last plus one, for which
            :math:`P(u + f_l)` is 1 in each row of the transform; 0 and 0 where none. Half the sampling rate is never
            among them.
        optics: See `Optics`.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Shape ``(B, L, H, W)``, real; differentiable any number of times in `image`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape or device that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> x = torch.full((1, 1, 4, 4), 0.01j, dtype=torch.complex64)  # an absorbing slice
        >>> support = torch.tensor([[[0, 1], [0, 0], [0, 0], [0, 0]]], dtype=torch.int32)
        >>> f, z = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> diffraction_forward(x, f, z, support, Optics(0.2, 2.0, 1.0, 20.0))[0, 0, 0]
        tensor([-0.0318, -0.0318, -0.0318, -0.0318])

    References:
        Ling, Tahir, Lin, Lee, Tian, "High-throughput intensity diffraction tomography with a computational microscope",
        Biomedical Optics Express 9 (2018).
    """
    op = "diffraction_forward"
    _check_image(op, image, depths)
    numbers, chosen = _check_scan(op, "image", image, transfer, depths, support, optics, backend)
    result: Tensor = compute(op, (image, transfer, depths, support, numbers), chosen, reference)
    return result


@takes_numpy
def diffraction_adjoint(
    intensities: Tensor,
    transfer: Tensor,
    depths: Tensor,
    support: Tensor,
    optics: Optics,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Bring intensities back to slices: the exact transpose of `diffraction_forward` over the reals.

    .. math:: x_z = 2 F^{-1} \sum_l \overline{h_{l,z}} \, F y_l, \qquad
        \langle A x, y \rangle = \operatorname{Re} \langle x, A^T y \rangle

    Illuminations are summed in order, without atomics: equal bits from run to run.

    Args:
        intensities: Shape ``(B, L, H, W)``, float32 or float64.
        transfer: As in `diffraction_forward`.
        depths: As there.
        support: As there.
        optics: As there.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Shape ``(B, Z, H, W)``, complex; differentiable any number of times in `intensities`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape or device that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> y = torch.ones(1, 1, 4, 4)
        >>> support = torch.tensor([[[0, 1], [0, 0], [0, 0], [0, 0]]], dtype=torch.int32)
        >>> f, z = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> diffraction_adjoint(y, f, z, support, Optics(0.2, 2.0, 1.0, 20.0))[0, 0, 0].imag
        tensor([-3.1831, -3.1831, -3.1831, -3.1831])
    """
    op = "diffraction_adjoint"
    _checks.tensor(op, "intensities", intensities, ndim=4)
    if intensities.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: intensities must be float32 or float64, got {intensities.dtype}")
    numbers, chosen = _check_scan(op, "intensities", intensities, transfer, depths, support, optics, backend)
    if intensities.shape[1] != len(transfer):
        raise ValueError(
            f"{op}: intensities must have shape (B, {len(transfer)} illuminations, H, W), got "
            f"{tuple(intensities.shape)}"
        )
    result: Tensor = compute(op, (intensities, transfer, depths, support, numbers), chosen, reference)
    return result


@takes_numpy
def diffraction_gradient(
    image: Tensor,
    spectra: Tensor | None,
    transfer: Tensor,
    depths: Tensor,
    support: Tensor,
    illuminations: Tensor | None,
    optics: Optics,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Compute the gradient of the least-squares data fidelity over all illuminations or a minibatch of them.

    .. math:: \frac{L}{|B|} \sum_{l \in B} A_l^T (A_l x - y_l)

    By Parseval's theorem it is formed among the spectra: the slices are transformed once and back, whatever the
    number of illuminations, and the data not at all.

    Args:
        image: Shape ``(B, Z, H, W)``, complex64 or complex128.
        spectra: ``torch.fft.rfft2(y, norm="ortho")`` of the intensities of all illuminations, shape
            ``(B, L, H, W // 2 + 1)``, dtype of `image`; None for zeros, which gives the normal operator. Gradients
            in it are those among spectra of real images.
        transfer: As in `diffraction_forward`.
        depths: As there.
        support: As there.
        illuminations: int64 indices of the minibatch, on the device of `image`; None for all. On a GPU indices out of
            range are not seen (that would cost a synchronisation) and those illuminations count as zero.
        optics: As there.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Like `image`; differentiable any number of times in `image` and `spectra`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape, device or index that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> x = torch.full((1, 1, 4, 4), 0.01j, dtype=torch.complex64)
        >>> support = torch.tensor([[[0, 1], [0, 0], [0, 0], [0, 0]]], dtype=torch.int32)
        >>> f, z = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> diffraction_gradient(x, None, f, z, support, None, Optics(0.2, 2.0, 1.0, 20.0))[0, 0, 0].imag
        tensor([0.1013, 0.1013, 0.1013, 0.1013])
    """
    op = "diffraction_gradient"
    _check_image(op, image, depths)
    numbers, chosen = _check_scan(op, "image", image, transfer, depths, support, optics, backend)
    if spectra is not None:
        _checks.tensor(op, "spectra", spectra, ndim=4)
        _checks.same(op, "spectra", spectra, "image", image)
        expected = (image.shape[0], len(transfer), image.shape[2], image.shape[3] // 2 + 1)
        _checks.shape(op, "spectra", spectra, expected, "batch, illuminations, H, W // 2 + 1")
    if illuminations is not None:
        _checks.index(op, "illuminations", illuminations, len(transfer), image.device)
    args = (image, spectra, transfer, depths, support, illuminations, numbers)
    result: Tensor = compute(op, args, chosen, reference)
    return result


@takes_numpy
def diffraction_gram(
    image: Tensor, auto: Tensor, pairs: Tensor, spectrum: Tensor | None, *, backend: str = "auto"
) -> Tensor:
    r"""Compute the same gradient over all illuminations through the Gram matrices of the transfer functions.

    .. math:: \nabla g(x) = F^{-1} \bigl( G \, F x - F A^T y \bigr), \qquad
        (G X)_z(u) = \sum_{z'} g_{z - z'}(u) \, X_{z'}(u) + m_{z,z'}(u) \, \overline{X_{z'}(-u)}

    With evenly spaced slices :math:`g_d = 2 \sum_l \overline{h_{l,z+d}} h_{l,z}` depends on the distance of
    two slices alone, a Toeplitz matrix; :math:`m_{z,z'}(u) = 2 \sum_l \overline{h_{l,z}(u) h_{l,z'}(-u)}`
    only exists where both signs of a frequency pass with one illumination. Its cost does not depend on the number of
    illuminations.

    Args:
        image: Shape ``(B, Z, H, W)``, complex64 or complex128.
        auto: :math:`g_d`, shape ``(Z, H, W)``, dtype of `image`.
        pairs: :math:`m`, shape ``(Z, Z, 2 K + 1, M + 1)``: row frequencies -K to K, column frequencies 0 to M.
        spectrum: ``torch.fft.fft2(A.adjoint(y), norm="ortho")``, like `image`; None for zeros (the normal operator).
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Like `image`; differentiable any number of times in `image` and `spectrum`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape or device that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.

    Example:
        >>> import torch
        >>> x, auto = torch.ones(1, 1, 4, 4, dtype=torch.complex64), torch.full((1, 4, 4), 2 + 0j)
        >>> diffraction_gram(x, auto, torch.zeros(1, 1, 1, 1, dtype=torch.complex64), None).real[0, 0, 0]
        tensor([2., 2., 2., 2.])
    """
    op = "diffraction_gram"
    _checks.tensor(op, "image", image, ndim=4)
    if image.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(f"{op}: image must be complex64 or complex128, got {image.dtype}")
    for name, value, ndim in (("auto", auto, 3), ("pairs", pairs, 4)):
        _checks.tensor(op, name, value, ndim=ndim)
        _checks.same(op, name, value, "image", image)
        _checks.fixed(op, name, value, "image", image)
    _checks.shape(op, "auto", auto, tuple(image.shape[1:]), "slices, H, W of image")
    n, height, width = image.shape[1:]
    _, _, rows, columns = pairs.shape
    fits = 1 <= rows <= height and rows % 2 == 1 and 1 <= columns <= (width + 1) // 2
    if tuple(pairs.shape[:2]) != (n, n) or not fits:
        raise ValueError(
            f"{op}: pairs must have shape ({n}, {n}, odd and at most {height}, at most {(width + 1) // 2}), got "
            f"{tuple(pairs.shape)}"
        )
    if spectrum is not None:
        _checks.tensor(op, "spectrum", spectrum, ndim=4)
        _checks.same(op, "spectrum", spectrum, "image", image)
        _checks.shape(op, "spectrum", spectrum, tuple(image.shape), "as image")
    chosen = backends.resolve(backend, image.device, image.dtype)
    result: Tensor = compute(op, (image, auto, pairs, spectrum), chosen, reference)
    return result
