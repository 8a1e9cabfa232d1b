"""Intensity diffraction tomography, in minibatches of illuminations."""

from __future__ import annotations

import copy
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._numpy import takes_numpy
from .._torch import fft, kept
from . import _blocks, _matrices
from .base import LeastSquares, MeasurementOperator, Part

# Relative tolerance of radii and distances, for what was computed in floating point.
ROUNDING = 1e-9
# Matrices that are kept, in bytes: Gram matrices with `gram="auto"`, and eigenvectors for closed forms.
LARGEST = 2**30
ASKED = "as asked for"
# Frequencies solved for or searched at a time.
CHUNK = 2048


class Pairs(NamedTuple):
    r"""Pairs of frequencies u and -u, and A^H A there, Hermitian matrices of twice the number of slices, diagonalised.

    Attributes:
        here: Flat indices of u, shape (n,).
        there: Flat indices of -u.
        values: Eigenvalues, shape (n, 2 Z).
        vectors: Eigenvectors for (X(u), conj X(-u)), shape (n, 2 Z, 2 Z).
    """

    here: Tensor
    there: Tensor
    values: Tensor
    vectors: Tensor


@takes_numpy
class DiffractionTomography(MeasurementOperator):
    r"""Intensity diffraction tomography: images of a weakly scattering volume under plane waves from many directions.

    .. math:: y_l = 2 \operatorname{Re} F^{-1} \Bigl( \sum_z h_{l,z} \, F x_z \Bigr)

    with the permittivity contrast :math:`x = n^2 - n_0^2` of slices and the transfer functions :math:`h_{l,z}` of the
    first Born approximation (`oder_fast.ops.diffraction_forward`); y is the intensity over that without the object,
    minus 1. The blocks that minibatches are made of are the illuminations.

    With evenly spaced slices the transfer functions follow from two waves per illumination and frequency, and none
    is stored. Where all illuminations are used again and again, Gram matrices of the frequencies give the same
    gradient at a cost that does not depend on their number (`gram`): the full batch is then cheaper than a minibatch.

    Args:
        image_size: Rows and columns ``(H, W)``, at least 4 each, or one number for both.
        depths: Of the slices, in micrometres, growing along the light; the plane in focus is 0.
        illuminations: Direction sines in air of the light, rows and columns (no unit), shape ``(L, 2)``: the wave is
            :math:`e^{2 \pi i s r / \lambda}`. See `oder_fast.data.led_grid`. None may lie outside the pupil: the model
            is for bright field.
        pixel_size: Distance of the camera's pixels, in micrometres.
        wavelength: In vacuum, in micrometres.
        numerical_aperture: Of the objective.
        medium_index: Refractive index of the medium, :math:`n_0`.
        magnification: Of the objective: the object's pixels are smaller than the camera's by it.
        thickness: Of a slice in micrometres; by default the mean distance of the slices.
        axial: ``"exact"``: the wavenumber along the axis as it is in the medium, :math:`2 \pi
            \sqrt{(n_0 / \lambda)^2 - |q|^2}`; ``"vacuum"``: :math:`2 \pi n_0 \sqrt{1 / \lambda^2 - |q|^2}`, as public
            codes have it, for comparison with them.
        transfer_functions: Transfer functions of one's own :math:`h_{l,z}` in place of those, shape ``(L, Z, H, W)``,
            complex: of measured pupils, or averaged over extended sources.
        gram: Whether full-batch gradients go through Gram matrices: True, False, or ``"auto"`` for where they cost less
            and fit in a gibibyte; `gram_reason` says why or why not.
        backend: ``"auto"`` or the name of a backend.

    Attributes:
        illuminations: ``(L, 2)``, float64.
        depths: ``(Z,)``, float64.
        gram: True or False.
        gram_reason: Why.
        n_blocks: Number of illuminations.
        image_shape: ``(Z, H, W)``; images are complex.
        data_shape: ``(L, H, W)``; data are real.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For shapes that disagree, values out of range or not finite, an illumination outside the pupil.

    Example:
        >>> import torch
        >>> from oder_fast.data import led_ring
        >>> idt = DiffractionTomography(
        ...     (32, 32), [-4.0, 0.0, 4.0], led_ring(8, 0.3), pixel_size=0.4, wavelength=0.6, numerical_aperture=0.4,
        ...     medium_index=1.33)
        >>> idt(torch.zeros(1, 3, 32, 32, dtype=torch.complex64)).shape
        torch.Size([1, 8, 32, 32])

    References:
        Ling, Tahir, Lin, Lee, Tian, "High-throughput intensity diffraction tomography with a computational microscope",
        Biomedical Optics Express 9 (2018).
    """

    image_shape: tuple[int, int, int]
    illuminations: Tensor
    depths: Tensor
    support: Tensor
    transfer: Tensor
    reached: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int],
        depths: Sequence[float] | Tensor,
        illuminations: Tensor,
        *,
        pixel_size: float,
        wavelength: float,
        numerical_aperture: float,
        medium_index: float,
        magnification: float = 1.0,
        thickness: float | None = None,
        axial: Literal["exact", "vacuum"] = "exact",
        transfer_functions: Tensor | None = None,
        gram: bool | Literal["auto"] = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        height, width = _read_size(image_size)
        z = _read_numbers("depths", depths, (None,))
        s = _read_numbers("illuminations", illuminations, (None, 2))
        pixel_size = _positive("pixel_size", pixel_size)
        wavelength = _positive("wavelength", wavelength)
        numerical_aperture = _positive("numerical_aperture", numerical_aperture)
        medium_index = _positive("medium_index", medium_index)
        magnification = _positive("magnification", magnification)
        if bool((z.diff() <= 0).any()):
            at = int((z.diff() <= 0).nonzero()[0])
            raise ValueError(
                f"DiffractionTomography: depths must grow from slice to slice, got {float(z[at]):g} before "
                f"{float(z[at + 1]):g}"
            )
        if numerical_aperture >= medium_index:
            raise ValueError(
                f"DiffractionTomography: numerical_aperture must be below medium_index, {medium_index}, got "
                f"{numerical_aperture}"
            )
        if axial not in ("exact", "vacuum"):
            raise ValueError(f'DiffractionTomography: axial must be "exact" or "vacuum", got {axial!r}')
        if axial == "vacuum" and numerical_aperture >= 1:
            raise ValueError('DiffractionTomography: axial "vacuum" needs a numerical_aperture below 1')
        outside = (s.norm(dim=1) > numerical_aperture * (1 + ROUNDING)).nonzero()
        if len(outside):
            worst = int(outside[0])
            raise ValueError(
                f"DiffractionTomography: illumination {worst} has the sine {float(s[worst].norm()):.4g}, outside the "
                f"pupil of numerical aperture {numerical_aperture:g}: the model is for bright field"
            )
        if thickness is None:
            if len(z) == 1:
                raise ValueError("DiffractionTomography: one slice alone needs a thickness")
            thickness = float(z[-1] - z[0]) / (len(z) - 1)
        thickness = _positive("thickness", thickness)
        spacing = float(z[-1] - z[0]) / (len(z) - 1) if len(z) > 1 else thickness
        even = bool((z.diff() - spacing).abs().max() <= 1e-6 * spacing) if len(z) > 1 else True
        sample = pixel_size / magnification
        self.optics = ops.Optics(
            pixel_size=sample,
            cutoff=(medium_index if axial == "exact" else 1.0) / wavelength,
            scale=1.0 if axial == "exact" else medium_index,
            amplitude=2 * math.pi**2 / wavelength**2 * thickness,
            first=float(z[0]),
            spacing=spacing if even else 0.0,
        )
        self.medium_index = medium_index
        self.image_shape = (len(z), height, width)
        self.backend = backend
        radius = numerical_aperture * (1 + ROUNDING) / wavelength
        if transfer_functions is None:
            support = _pupils(s / wavelength, radius, height, width, sample)
            transfer = s / wavelength
            _warn_of_sampling(s / wavelength, radius, sample, support)
        else:
            transfer = _read_functions(transfer_functions, (len(s), *self.image_shape))
            support = _extent(transfer)
        self.register_buffer("illuminations", kept(s), persistent=False)
        self.register_buffer("depths", kept(z), persistent=False)
        self.register_buffer("support", kept(support), persistent=False)
        self.register_buffer("transfer", kept(transfer), persistent=False)
        self.register_buffer("reached", kept(_reached(support, width)), persistent=False)
        self.gram, self.gram_reason = _choose_gram(gram, self)
        self._matrices: tuple[Tensor, Tensor] | None = None
        self._pairs: list[Pairs] = []
        self._norm_squared: float | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffractionTomography:
        # Geometry stays in float64, whatever the precision of images.
        like = fn(torch.empty(0))
        for name, value in self._buffers.items():
            assert value is not None
            dtype = (
                like.dtype.to_complex() if value.is_complex() and like.is_floating_point() else value.dtype
            )
            self._buffers[name] = kept(value.to(like.device, dtype))
        self._matrices, self._pairs = None, []
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Matrices are large, and built again when they are needed.
        return self.__dict__ | {"_matrices": None, "_pairs": []}

    def extra_repr(self) -> str:
        """Tell the sizes."""
        kind = "stored" if self.transfer.is_complex() else "generated"
        return (
            f"image_shape={self.image_shape}, n_illuminations={self.n_blocks}, "
            f"pixel_size={self.optics.pixel_size:.4g} um, transfer functions {kind}, gram={self.gram} "
            f"({self.gram_reason})"
        )

    @property
    def n_blocks(self) -> int:  # type: ignore[override]
        """Number of illuminations."""
        return len(self.transfer)

    @property
    def data_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """``(L, H, W)``."""
        return self.n_blocks, *self.image_shape[1:]

    @property
    def _scan(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.transfer, self.depths, self.support

    @property
    def _whole(self) -> _matrices.Scan:
        return _matrices.Scan(*self._scan, self.optics, self.image_shape[2])

    def _check(self, name: str, value: Tensor, shape: tuple[int, ...], *, is_complex: bool) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"DiffractionTomography: {name} must be a torch.Tensor, got {type(value).__name__}"
            )
        if value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != shape:
            wanted = ", ".join(map(str, ("B", *shape)))
            raise ValueError(
                f"DiffractionTomography: {name} must have shape ({wanted}), got {tuple(value.shape)}"
            )
        if value.is_complex() != is_complex or not (is_complex or value.is_floating_point()):
            kind = "complex" if is_complex else "real"
            raise TypeError(f"DiffractionTomography: {name} must be {kind}, got {value.dtype}")
        precision = value.real.dtype
        if precision not in (torch.float32, torch.float64):
            raise TypeError(
                f"DiffractionTomography: {name} must be in single or double precision, got {value.dtype}"
            )
        if self.transfer.is_complex() and self.transfer.real.dtype != precision:
            raise TypeError(
                f"DiffractionTomography: {name} is {value.dtype} and transfer_functions {self.transfer.dtype}; "
                f"call .to({precision}) on the operator"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Image contrasts ``(B, Z, H, W)``: intensities ``(B, L, H, W)`` minus 1."""
        self._check("image", x, self.image_shape, is_complex=True)
        return ops.diffraction_forward(x, *self._scan, self.optics, backend=self.backend)

    def adjoint(self, y: Tensor) -> Tensor:
        """Bring intensities ``(B, L, H, W)`` back to slices ``(B, Z, H, W)``: the exact transpose over the reals."""
        self._check("intensities", y, self.data_shape, is_complex=False)
        return ops.diffraction_adjoint(y, *self._scan, self.optics, backend=self.backend)

    def least_squares(self, y: Tensor) -> IDTLeastSquares:
        r"""Return the data fidelity :math:`g(x) = \tfrac12 \|A x - y\|^2` of intensities ``(B, L, H, W)``.

        Raises:
            ValueError: For a shape that does not fit, or data that are NaN or infinite.
        """
        self._check_data(y)
        return IDTLeastSquares(self, y)

    def _check_data(self, y: Tensor) -> None:
        self._check("intensities", y, self.data_shape, is_complex=False)
        if y.shape[0] == 0:
            raise ValueError(
                f"DiffractionTomography: intensities must hold at least one image, got {tuple(y.shape)}"
            )
        if not torch.compiler.is_compiling() and not bool(y.detach().isfinite().all()):
            raise ValueError("DiffractionTomography: intensities must be finite, got NaN or infinite ones")

    def _gram_matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Gram matrices, built when they are first needed."""
        if self._matrices is None or self._matrices[0].dtype != like.dtype:
            with torch.inference_mode(False), torch.no_grad():
                auto, pairs = _matrices.gram_matrices(self._whole)
                self._matrices = auto.to(like.dtype), pairs.to(like.dtype)
        return self._matrices

    def _keeps_pairs(self, dtype: torch.dtype) -> bool:
        """Tell whether the eigenvectors of all pairs of frequencies may be kept."""
        return self.reached.shape[1] * (2 * self.image_shape[0]) ** 2 * dtype.itemsize <= LARGEST

    def _diagonalised(self, dtype: torch.dtype) -> Iterable[Pairs]:
        """Return A^H A at all pairs of frequencies, a chunk after the other; kept where they fit."""
        if not self._keeps_pairs(dtype):
            return self._diagonalise(dtype)
        if not self._pairs or self._pairs[0].vectors.dtype != dtype:
            self._pairs = list(self._diagonalise(dtype))
        return self._pairs

    def _diagonalise(self, dtype: torch.dtype) -> Iterator[Pairs]:
        width = self.image_shape[2]
        for here, there in self.reached.split(CHUNK, dim=1):
            # Kept beyond the call; diagonalised in double precision whatever the images have.
            with torch.inference_mode(False), torch.no_grad():
                values, vectors = torch.linalg.eigh(self._normal_matrices(here // width, here % width))
                yield Pairs(here, there, values.clamp(min=0).to(dtype.to_real()), vectors.to(dtype))

    def _solve(self, rhs: Tensor, weight: float | Tensor) -> Tensor:
        """Return (A^H A + weight)^-1 rhs of slices ``(B, Z, H, W)``; differentiable in `rhs`."""
        right = fft(torch.fft.fftn, rhs.contiguous()).flatten(2)
        # One, or one for each image.
        weights = torch.as_tensor(weight, dtype=rhs.real.dtype, device=rhs.device).flatten()
        solution = right / weights[:, None, None]
        for here, there, values, vectors in self._diagonalised(rhs.dtype):
            both = torch.cat((right.index_select(2, here).conj(), right.index_select(2, there)), 1)
            # Contiguous and without lazy conjugates: a batched product is five times slower otherwise.
            along = (vectors.mT @ both.permute(2, 1, 0).contiguous()).conj() / (values[..., None] + weights)
            solved = vectors @ along.resolve_conj()
            at_here, at_there = solved.permute(2, 1, 0).split(self.image_shape[0], 1)
            solution = solution.index_copy(2, there, at_there.conj()).index_copy(2, here, at_here)
        image: Tensor = fft(torch.fft.ifftn, solution.reshape(rhs.shape))
        return image

    def draw_blocks(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the illuminations of a minibatch without replacement, each as likely as any other.

        Args:
            size: Number of illuminations, 1 to `n_blocks`.
            generator: Source of randomness; on a GPU give one of that device, or each draw is copied there.

        Returns:
            Sorted int64 indices, shape ``(size,)``, on the device of `illuminations`.

        Raises:
            ValueError: If `size` is out of range.
        """
        _blocks.check_size("DiffractionTomography", "illuminations", size, self.n_blocks)
        return _blocks.draw(self.n_blocks, size, generator, self.illuminations.device)

    def split(self, y: Tensor, share: float, generator: torch.Generator | None = None) -> tuple[Part, Part]:
        """Split by illuminations, those left out spread over their order; see `MeasurementOperator.split`."""
        self._check("intensities", y, self.data_shape, is_complex=False)
        rest = _blocks.left_out("DiffractionTomography", "illuminations", self.n_blocks, share, generator).to(
            y.device
        )
        keeps = torch.ones(self.n_blocks, dtype=torch.bool, device=y.device)
        keeps[rest] = False
        stay = keeps.nonzero().flatten()
        return Part(self._of(stay), y.index_select(1, stay)), Part(self._of(rest), y.index_select(1, rest))

    def _of(self, blocks: Tensor) -> DiffractionTomography:
        """Return the operator of some of the illuminations."""
        part = copy.copy(self)
        part._buffers = dict(self._buffers)
        for name in ("illuminations", "support", "transfer"):
            tensor = getattr(self, name)
            part._buffers[name] = kept(tensor.index_select(0, blocks.to(tensor.device)))
        part._buffers["reached"] = kept(_reached(part.support, self.image_shape[2]))
        part._matrices, part._pairs, part._norm_squared = None, [], None
        if self.gram_reason != ASKED:
            part.gram, part.gram_reason = _choose_gram("auto", part)
        return part

    def norm_squared(self) -> float:
        r"""Compute :math:`\|A\|^2`, the Lipschitz constant of the full gradient; kept.

        It is the largest eigenvalue of :math:`A^T A` at any frequency. Frequencies are searched in the order of the
        trace there, which bounds it, until no other can have a larger one.
        """
        if self._norm_squared is None:
            trace = self._traces()
            order = trace.flatten().argsort(descending=True)
            best, width = 0.0, trace.shape[1]
            for chunk in order.split(CHUNK // 8):
                if float(trace.flatten()[chunk[0]]) <= best:
                    break
                i, j = chunk // width, chunk % width
                best = max(best, float(torch.linalg.eigvalsh(self._normal_matrices(i, j))[:, -1].max()))
            self._norm_squared = best * (1 + 1e-6)
        return self._norm_squared

    def minibatch_norm_squared(self, size: int) -> float:
        r"""Bound what takes the place of :math:`\|A\|^2` where each step sees a minibatch: the expected smoothness.

        Args:
            size: Number of illuminations a step.
        """
        _blocks.check_size("DiffractionTomography", "illuminations", size, self.n_blocks)
        if size == self.n_blocks:
            return self.norm_squared()
        largest = max(float(self._traces(one).max()) for one in range(self.n_blocks))
        return _blocks.expected_smoothness(self.n_blocks, size, self.norm_squared(), largest)

    def _normal_matrices(self, rows: Tensor, columns: Tensor) -> Tensor:
        return _matrices.normal_matrices(self._whole, rows, columns)

    def _traces(self, illumination: int | None = None) -> Tensor:
        """Return the traces of A^T A at the half plane's frequencies (H, W // 2 + 1), of all or one illumination."""
        n, height, width = self.image_shape
        power = torch.zeros(height, width, dtype=torch.float64, device=self.support.device)
        for one in range(self.n_blocks) if illumination is None else (illumination,):
            ends = self.support[one]
            used = (ends[:, 0] < ends[:, 1]).nonzero()
            if len(used) == 0:
                continue
            j = torch.arange(int(ends[used, 0].min()), int(ends[used, 1].max()), device=ends.device)
            stored = self.transfer.is_complex()
            depths = self.depths if stored else self.depths[:1]
            h = _matrices.transfer_at(self._whole.only(one)._replace(depths=depths), used, j)[0]
            power[used, j] += h.abs().square().sum(0) * (1 if stored else n)
        mirrored = power.flip(0, 1).roll((1, 1), (0, 1))
        return 2 * (power + mirrored)[:, : width // 2 + 1]

    def initial(self, y: Tensor) -> Tensor:
        r"""Reconstruct a start for iterations: `tikhonov` with a hundredth of :math:`\|A\|^2` as its weight."""
        return self.tikhonov(y, 0.01 * self.norm_squared())

    def tikhonov(self, y: Tensor, weight: float) -> Tensor:
        r"""Solve :math:`\min_x \tfrac12 \|A x - y\|^2 + \tfrac{w}{2} \|x\|^2`, all slices together.

        The solution is closed: a system of twice the number of slices at each pair of frequencies u and -u. The systems
        are diagonalised once, for any weight, and kept where they fit in a gibibyte.

        Args:
            y: Intensities, shape ``(B, L, H, W)``.
            weight: `w`, in the unit of :math:`A^T A`; compare `norm_squared`.

        Returns:
            Shape ``(B, Z, H, W)``, complex, differentiable in `y`.

        Raises:
            ValueError: For a shape that does not fit, or a weight that is not above the rounding of :math:`A^T A`.
        """
        self._check_data(y)
        weight = _positive("weight", weight)
        smallest = torch.finfo(y.dtype).eps * self.norm_squared()
        if weight < smallest:
            raise ValueError(
                f"DiffractionTomography: weight is too small, below the rounding of A^T A in {y.dtype}, "
                f"{smallest:.3g}: got {weight:g}; compare norm_squared(), {self.norm_squared():.3g}"
            )
        return self._solve(self.adjoint(y), weight)

    def refractive_index(self, contrast: Tensor) -> Tensor:
        r"""Return the complex refractive index :math:`n = \sqrt{n_0^2 + x}` of permittivity contrasts."""
        return (self.medium_index**2 + _complex("contrast", contrast)).sqrt()

    def contrast(self, refractive_index: Tensor) -> Tensor:
        r"""Return the permittivity contrast :math:`n^2 - n_0^2` of refractive indices, complex."""
        return _complex("refractive_index", refractive_index) ** 2 - self.medium_index**2


class IDTLeastSquares(LeastSquares):
    """The data fidelity of `DiffractionTomography`; with all illuminations through Gram matrices where they pay.

    `solve` is closed, in the eigenvectors of A^H A at each pair of frequencies, where they fit in a gibibyte: its error
    is the rounding of `rhs` over `weight`, whatever `start` and `tolerance`, and it counts as one call.
    """

    operator: DiffractionTomography

    def __init__(self, operator: DiffractionTomography, y: Tensor) -> None:
        super().__init__(operator, y)
        self._spectra: Tensor | None = None
        self._spectrum: Tensor | None = None

    def _gradient(self, x: Tensor, blocks: Tensor | None) -> Tensor:
        if self.operator.gram and blocks is None:
            if self._spectrum is None or (self.y.requires_grad and torch.is_grad_enabled()):
                self._spectrum = fft(torch.fft.fftn, self.adjoint_data())
            return self._take(x, self._spectrum, blocks)
        if self._spectra is None or (self.y.requires_grad and torch.is_grad_enabled()):
            self._spectra = fft(torch.fft.rfftn, self.y)
        return self._take(x, self._spectra, blocks)

    def _normal(self, v: Tensor, blocks: Tensor | None) -> Tensor:
        return self._take(v, None, blocks)

    def solve(
        self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor, free: Tensor | None = None
    ) -> Tensor:
        """Solve in closed form; see `LeastSquares.solve`."""
        if free is not None or not self.operator._keeps_pairs(rhs.dtype):
            return super().solve(rhs, weight, start, tolerance, free)
        self._count(None)
        return self.operator._solve(rhs, weight)

    def _take(self, x: Tensor, data: Tensor | None, blocks: Tensor | None) -> Tensor:
        idt = self.operator
        idt._check("image", x, idt.image_shape, is_complex=True)
        if idt.gram and blocks is None:
            return ops.diffraction_gram(x, *idt._gram_matrices(x), data, backend=idt.backend)
        return ops.diffraction_gradient(x, data, *idt._scan, blocks, idt.optics, backend=idt.backend)


def _complex(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not (value.is_complex() or value.is_floating_point()):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"DiffractionTomography: {name} must be a real or complex torch.Tensor, got {got}")
    return value if value.is_complex() else torch.complex(value, torch.zeros_like(value))


def _read_size(image_size: Any) -> tuple[int, int]:
    size = (image_size, image_size) if isinstance(image_size, numbers.Integral) else image_size
    whole = isinstance(size, Sequence) and all(
        isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in size
    )
    if not whole or len(size) != 2 or min(size) < 4:
        raise ValueError(
            f"DiffractionTomography: image_size must be rows and columns, at least 4 each, got {image_size!r}"
        )
    return int(size[0]), int(size[1])


def _read_numbers(name: str, values: Sequence[float] | Tensor, shape: tuple[int | None, ...]) -> Tensor:
    try:
        result = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        hint = "; of a tuple of two give the first" if isinstance(values, tuple) and len(values) == 2 else ""
        raise TypeError(
            f"DiffractionTomography: {name} must be numbers, got {type(values).__name__}{hint}"
        ) from error
    if result.is_complex() or result.dtype == torch.bool:
        raise TypeError(f"DiffractionTomography: {name} must be real numbers, got {result.dtype}")
    result = result.to(torch.float64).clone()
    wanted = ", ".join("at least 1" if n is None else str(n) for n in shape)
    fits = result.ndim == len(shape) and len(result) > 0
    if not fits or any(n is not None and n != m for n, m in zip(shape, result.shape, strict=True)):
        raise ValueError(
            f"DiffractionTomography: {name} must have shape ({wanted}), got {tuple(result.shape)}"
        )
    if not bool(result.isfinite().all()):
        raise ValueError(f"DiffractionTomography: {name} must be finite, got {result[~result.isfinite()][0]}")
    return result


def _positive(name: str, value: Any) -> float:
    """Return a plain number, checked: one of NumPy's in single precision would spoil what it is multiplied with."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"DiffractionTomography: {name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"DiffractionTomography: {name} must be a finite number above 0, got {number}")
    return number


def _read_functions(functions: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(functions, Tensor) or functions.dtype not in (torch.complex64, torch.complex128):
        got = functions.dtype if isinstance(functions, Tensor) else type(functions).__name__
        raise TypeError(
            f"DiffractionTomography: transfer_functions must be a complex64 or complex128 tensor, got {got}"
        )
    if tuple(functions.shape) != shape:
        raise ValueError(
            f"DiffractionTomography: transfer_functions must have shape {shape} (illuminations, depths, H, W), got "
            f"{tuple(functions.shape)}"
        )
    functions = functions.detach().resolve_conj().clone()
    if not bool(torch.view_as_real(functions).isfinite().all()):
        raise ValueError("DiffractionTomography: transfer_functions must be finite, got NaN or infinite ones")
    # Half the sampling rate is its own negative: it has no place in a pupil.
    for axis in (-2, -1):
        if functions.shape[axis] % 2 == 0:
            functions.select(axis, functions.shape[axis] // 2).zero_()
    return functions


def _pupils(f: Tensor, radius: float, height: int, width: int, pixel_size: float) -> Tensor:
    """Return int32 (L, H, 2): where |u + f| <= radius in each row, as `oder_fast.ops.diffraction_forward` takes it."""
    k = torch.arange(height, dtype=torch.float64)
    k = torch.where(2 * k < height, k, k - height)
    chord = radius**2 - (k / (height * pixel_size) + f[:, :1]) ** 2
    reach, centre = chord.clamp(min=0).sqrt(), -f[:, 1:]
    scale, last = width * pixel_size, (width - 1) // 2
    begin = ((centre - reach) * scale).ceil().clamp(-last, last + 1)
    end = ((centre + reach) * scale).floor().clamp(-last - 1, last) + 1
    # Half the sampling rate is its own negative: it has no place in a pupil.
    empty = (chord < 0) | (begin >= end) | (2 * k.abs() == height)
    return torch.stack((begin, end), -1).masked_fill(empty[..., None], 0).to(torch.int32)


def _reached(support: Tensor, width: int) -> Tensor:
    """Return the pairs of frequencies u and -u that pass a pupil, as flat indices (2, n)."""
    height = support.shape[1]
    k = torch.arange(width, device=support.device)
    k = torch.where(2 * k < width, k, k - width)
    passed = torch.zeros(height, width, dtype=torch.bool, device=support.device)
    for ends in support:
        passed |= (k >= ends[:, :1]) & (k < ends[:, 1:])
    passed |= passed.flip(0, 1).roll((1, 1), (0, 1))
    i, j = passed.nonzero().unbind(1)
    # One of the two: on the left, and in the column of both the upper one.
    once = (2 * j < width) & ((j > 0) | (2 * i <= height))
    i, j = i[once], j[once]
    return torch.stack((i * width + j, -i % height * width + -j % width))


def _extent(functions: Tensor) -> Tensor:
    """Return the support of transfer functions, as `_pupils` does."""
    used, width = (functions != 0).any(1), functions.shape[-1]
    k = torch.arange(width)
    k = torch.where(2 * k < width, k, k - width).to(functions.device)
    begin = torch.where(used, k, width).amin(-1)
    end = torch.where(used, k, -width).amax(-1) + 1
    return torch.stack((begin, end), -1).masked_fill(~used.any(-1)[..., None], 0).to(torch.int32)


def _warn_of_sampling(f: Tensor, radius: float, pixel_size: float, support: Tensor) -> None:
    if int((support[..., 1] - support[..., 0]).sum(1).max()) <= 1:
        warnings.warn(
            "DiffractionTomography: no pupil holds more than one frequency of the images: are pixel_size and "
            "wavelength in micrometres?",
            stacklevel=3,
        )
    reach = float(f.abs().max()) + radius
    if reach > 0.5 / pixel_size * (1 + ROUNDING):
        warnings.warn(
            f"DiffractionTomography: images hold frequencies up to {reach:.3g} per micrometre, and pixels of "
            f"{pixel_size:.3g} um sample up to {0.5 / pixel_size:.3g}: what lies above is left out of the model",
            stacklevel=3,
        )


def _choose_gram(gram: bool | str, operator: DiffractionTomography) -> tuple[bool, str]:
    """Return whether full batches go through Gram matrices, and why."""
    if gram is not True and gram is not False and gram != "auto":
        raise ValueError(f'DiffractionTomography: gram must be True, False or "auto", got {gram!r}')
    if gram is False:
        return False, ASKED
    if operator.transfer.is_complex() or operator.optics.spacing == 0:
        why = (
            "transfer functions of one's own" if operator.transfer.is_complex() else "slices unevenly spaced"
        )
        if gram is True:
            raise ValueError(f"DiffractionTomography: gram needs evenly spaced slices, generated; got {why}")
        return False, why
    n, height, width = operator.image_shape
    rows, columns = _matrices.gram_shape(operator.support, width)
    size = 8 * (n * height * width + n * n * rows * columns)
    if gram is True:
        return True, ASKED
    if size > LARGEST:
        return False, f"the matrices would take {size / 2**20:.0f} MiB"
    extent = operator.support[..., 1] - operator.support[..., 0]
    direct = 4 * n * int(extent.sum())
    pupil = (extent > 0).any(0).sum() * (operator.support[..., 1].max() - operator.support[..., 0].min())
    through_gram = n * n * (int(pupil) + 2 * rows * columns)
    if through_gram >= direct:
        return False, f"{operator.n_blocks} illuminations cost less than matrices of {n} slices"
    return True, (
        f"the matrices take {size / 2**20:.1f} MiB and {direct / through_gram:.1f} times fewer operations than "
        f"{operator.n_blocks} illuminations"
    )
