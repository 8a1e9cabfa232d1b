"""Parallel magnetic resonance imaging on a Cartesian grid, in minibatches of coils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from .._numpy import takes_numpy
from .._torch import fft, kept
from . import _blocks
from .base import LeastSquares, MeasurementOperator, Part

T = TypeVar("T")

# Of the squared modulus of a coil map that is the same everywhere.
ROUNDING = 1e-6
# Lowest frequencies along an axis that are never left out, as Yaman et al. (2020) have it.
CENTRE = 4


@takes_numpy
class CartesianMRI(MeasurementOperator):
    r"""Parallel MRI: undersampled k-space of images, and everything a fixed point needs of them.

    .. math:: y_c = M F (S_c \odot x), \qquad c = 1, \dots, C

    with the orthonormal two-dimensional Fourier transform `F`, coil sensitivity maps :math:`S_c` and a sampling mask
    `M`. The blocks that minibatches are made of are the coils.

    A mask that keeps or drops whole lines of k-space is recognised. The transform along the lines is then unitary and
    cancels in :math:`A^H A`: `least_squares` undoes it once, and each gradient transforms along the other axis only.

    Args:
        coil_maps: :math:`S_c`, shape ``(C, H, W)``, or ``(B, C, H, W)`` with maps for each image of a batch;
            complex64 or complex128, and complex32 (half the memory, a relative error of 2e-4) for the GPU backends. Of
            pixels where all of them are 0 nothing is measured: a fixed point has there what the denoiser keeps.
        mask: What is sampled, bool or 0 and 1: ``(W,)`` for lines with phase encoding along the last axis (as in
            fastMRI), ``(H, 1)`` for phase encoding along the first axis, ``(H, W)`` for points; ``(B, 1, W)``,
            ``(B, H, 1)`` or ``(B, H, W)`` with a mask for each image of a batch.
        centered: Whether k-space has its zero frequency, and the image its origin, at index ``n // 2`` (as in
            fastMRI, BART and scanners' files), or at index 0.
        readout_size: Samples along a line of k-space where the readout is oversampled: at least the image's size along
            the lines. The image is then the middle of the field of view; what lies outside is taken for zero.
        backend: ``"auto"`` or the name of a backend.

    Attributes:
        coil_maps: ``(1 or B, C, H, W)``.
        mask: bool, shape ``(1 or B, H', W')`` with 1 for an axis along which it does not change.
        n_blocks: Number of coils.
        image_shape: ``(H, W)``.
        data_shape: ``(C, H', W')``, the shape of k-space.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For shapes that disagree, no sampled line or point, a readout that is too short, or (without a
            process group) maps that are zero everywhere.

    Example:
        >>> import torch
        >>> mask = torch.zeros(32, dtype=torch.bool)
        >>> mask[::4] = True
        >>> mri = CartesianMRI(torch.ones(2, 32, 32, dtype=torch.complex64), mask)
        >>> mri(torch.ones(1, 32, 32, dtype=torch.complex64)).shape
        torch.Size([1, 2, 32, 32])

    References:
        Pruessmann, Weiger, Scheidegger, Boesiger, "SENSE: sensitivity encoding for fast MRI", Magnetic Resonance
        in Medicine 42 (1999).
    """

    image_shape: tuple[int, int]
    coil_maps: Tensor
    mask: Tensor

    def __init__(
        self,
        coil_maps: Tensor,
        mask: Tensor,
        *,
        centered: bool = True,
        readout_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("coil_maps", coil_maps), ("mask", mask)):
            if not isinstance(value, Tensor):
                raise TypeError(f"CartesianMRI: {name} must be a torch.Tensor, got {type(value).__name__}")
        if not coil_maps.is_complex():
            raise TypeError(f"CartesianMRI: coil_maps must be complex, got {coil_maps.dtype}")
        if coil_maps.requires_grad:
            raise ValueError("CartesianMRI: coil_maps is not differentiable; detach it")
        if mask.is_complex():
            raise TypeError(f"CartesianMRI: mask must be bool or real, got {mask.dtype}")
        if not isinstance(centered, bool):
            raise TypeError(f"CartesianMRI: centered must be a bool, got {type(centered).__name__}")
        if coil_maps.ndim not in (3, 4) or 0 in coil_maps.shape:
            raise ValueError(
                f"CartesianMRI: coil_maps must have shape (C, H, W) or (B, C, H, W), got {tuple(coil_maps.shape)}"
            )
        maps = coil_maps.detach().resolve_conj()
        maps = maps if maps.ndim == 4 else maps[None]
        if not bool(torch.view_as_real(maps).isfinite().all()):
            raise ValueError("CartesianMRI: coil_maps must be finite")
        # Coils that one of several processes has may see nothing; `MeasurementParallel` looks at those of all.
        alone = not (dist.is_available() and dist.is_initialized())
        if alone and not bool((maps != 0).any()):
            raise ValueError("CartesianMRI: coil_maps are zero everywhere")
        self.image_shape = (maps.shape[2], maps.shape[3])
        self.centered = centered
        self.backend = backend
        if readout_size is not None and (isinstance(readout_size, bool) or not isinstance(readout_size, int)):
            raise TypeError(f"CartesianMRI: readout_size must be an int, got {type(readout_size).__name__}")
        lines, self.axis = _read_mask(mask, self.image_shape, readout_size)
        if lines.shape[0] not in (1, maps.shape[0]) and maps.shape[0] != 1:
            raise ValueError(
                f"CartesianMRI: coil_maps and mask must be for as many images, got {maps.shape[0]} and {lines.shape[0]}"
            )
        along = -1 if self.axis == -2 else -2
        size = list(self.image_shape)
        if readout_size is not None:
            if self.axis is None:
                raise ValueError("CartesianMRI: readout_size needs a mask of whole lines")
            if readout_size < size[along]:
                raise ValueError(
                    f"CartesianMRI: readout_size must be at least the {size[along]} pixels along a line, "
                    f"got {readout_size}"
                )
            size[along] = readout_size
        if self.axis is not None and lines.shape[self.axis] != self.image_shape[self.axis]:
            raise ValueError(
                f"CartesianMRI: mask must have {self.image_shape[self.axis]} lines along axis {self.axis}, as "
                f"coil_maps have, got {lines.shape[self.axis]}"
            )
        self._kspace_shape = (size[0], size[1])
        if self.axis == -1:
            # The backends read the maps along the transform.
            maps = _by_columns(maps)
        self.register_buffer("coil_maps", kept(maps), persistent=False)
        self.register_buffer("mask", kept(lines), persistent=False)
        self._derived: dict[str, tuple[list[Any], Any]] = {}
        # A compiled call takes it as it is.
        _ = self.sampling

    def __getstate__(self) -> dict[str, Any]:
        # Tensors count their changes anew in a copy, so it gets what the mask is now; the rest is made when needed.
        _ = self.sampling
        return self.__dict__ | {"_derived": {"sampling": self._derived["sampling"]}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CartesianMRI:
        # .to(float64) would make the maps real.
        sampling, maps = self.sampling, self._buffers.pop("coil_maps")
        assert maps is not None
        super()._apply(lambda value: kept(fn(value)), recurse)  # type: ignore[no-untyped-call]
        like = fn(maps.real.new_empty(0))
        dtype = {torch.float32: torch.complex64, torch.float64: torch.complex128}.get(like.dtype, maps.dtype)
        dtype = like.dtype if like.is_complex() else dtype
        self.register_buffer("coil_maps", kept(maps.to(like.device, dtype)), persistent=False)
        moved = kept(fn(sampling))
        self._derived = {"sampling": (_versions(self.mask), moved)}
        return self

    def _follow(self, name: str, make: Callable[[], T], *sources: Tensor) -> T:
        """Return what is made of buffers, kept; made anew where one was replaced or changed in place since."""
        kept_for, value = self._derived.get(name, ([], None))
        if torch.compiler.is_compiling() and kept_for:
            return cast("T", value)
        now = _versions(*sources)
        if len(kept_for) != len(now) or any(
            old is not new or before != version
            for (old, before), (new, version) in zip(kept_for, now, strict=True)
        ):
            # Kept beyond the call.
            with torch.inference_mode(False), torch.no_grad():
                value = make()
            self._derived[name] = now, value
        return cast("T", value)

    @property
    def sampling(self) -> Tensor:
        """The mask as functions of `oder_fast.ops` take it: line numbers ``(1 or B, L)``, or points."""

        def make() -> Tensor:
            return (_points if self.axis is None else _line_numbers)(self.mask, self.centered)

        return self._follow("sampling", make, self.mask)

    def extra_repr(self) -> str:
        """Tell the sizes."""
        kind = "points" if self.axis is None else f"lines of axis {self.axis}"
        share = float(self.mask.float().mean())
        return (
            f"image_shape={self.image_shape}, n_coils={self.n_blocks}, sampled={share:.3g} ({kind}), "
            f"centered={self.centered}"
        )

    @property
    def n_blocks(self) -> int:  # type: ignore[override]
        """Number of coils."""
        return self.coil_maps.shape[1]

    @property
    def data_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """``(C, H', W')``."""
        return self.n_blocks, *self._kspace_shape

    def _check(self, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"CartesianMRI: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != shape:
            wanted = ", ".join(map(str, ("B", *shape)))
            raise ValueError(f"CartesianMRI: {name} must have shape ({wanted}), got {tuple(value.shape)}")
        if not value.is_complex():
            raise TypeError(f"CartesianMRI: {name} must be complex, got {value.dtype}")
        for what, tensor in (("coil maps", self.coil_maps), ("masks", self.mask)):
            if tensor.shape[0] not in (1, value.shape[0]):
                raise ValueError(
                    f"CartesianMRI: {name} must hold {tensor.shape[0]} images, as many as there are {what}, "
                    f"got {value.shape[0]}"
                )

    def forward(self, x: Tensor) -> Tensor:
        """Measure images ``(B, H, W)``: k-space ``(B, C, H', W')``, zero where the mask is."""
        self._check("image", x, self.image_shape)
        samples = ops.fourier_forward(x, self.coil_maps, self.sampling, axis=self._axis, backend=self.backend)
        return self._restore(samples)

    def adjoint(self, y: Tensor) -> Tensor:
        """Combine k-space ``(B, C, H', W')`` to images ``(B, H, W)``: the exact conjugate transpose of `forward`."""
        samples = self._convert(y)
        return ops.fourier_adjoint(
            samples, self.coil_maps, self.sampling, axis=self._axis, backend=self.backend
        )

    def least_squares(self, y: Tensor) -> MRILeastSquares:
        r"""Return the data fidelity :math:`g(x) = \tfrac12 \|A x - y\|^2` of k-space ``(B, C, H', W')``.

        k-space takes the form of the gradients once: the origin moves to index 0, only what the mask keeps is left, and
        where that is whole lines they are transformed back along themselves, an oversampled readout cut to the image.

        Raises:
            ValueError: For a shape that does not fit, samples that are NaN or infinite, or data that disagree with the
                mask: values where nothing is sampled, or nothing at all where something is.
        """
        self._check("k-space", y, self.data_shape)
        if not torch.compiler.is_compiling():
            empty = (y.detach() == 0).flatten(1).all(1)
            if bool(empty.any()):
                image = int(empty.nonzero()[0])
                raise ValueError(
                    f"CartesianMRI: k-space of image {image} is zero wherever the mask samples it"
                )
        return self.least_squares_part(y)

    def least_squares_part(self, y: Tensor) -> MRILeastSquares:
        """Return the data fidelity of some of the coils, which may see nothing of an image."""
        return MRILeastSquares(self, y)

    def _samples(self, y: Tensor) -> Tensor:
        """Return k-space as `oder_fast.ops.fourier_gradient` takes it, checked."""
        samples = self._convert(y)
        values = y.detach()
        if torch.compiler.is_compiling():
            return samples
        if not bool(torch.view_as_real(values.resolve_conj()).isfinite().all()):
            raise ValueError("CartesianMRI: k-space must be finite, got NaN or infinite samples")
        outside = (values != 0) & ~self.mask[:, None]
        if bool(outside.any()):
            where = tuple(int(i) for i in outside.nonzero()[0])
            raise ValueError(
                f"CartesianMRI: mask and k-space disagree: the mask is 0 at index {where}, where k-space is "
                f"{values[where].item():.3g}; give the mask it was measured with, or y * mask"
            )
        return samples

    def draw_blocks(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the coils of a minibatch without replacement, each as likely as any other.

        Args:
            size: Number of coils, 1 to `n_blocks`.
            generator: Source of randomness; on a GPU give one of that device, or each draw is copied there.

        Returns:
            Sorted int64 indices, shape ``(size,)``, on the device of `coil_maps`.

        Raises:
            ValueError: If `size` is out of range.
        """
        _blocks.check_size("CartesianMRI", "coils", size, self.n_blocks)
        return _blocks.draw(self.n_blocks, size, generator, self.coil_maps.device)

    def split(self, y: Tensor, share: float, generator: torch.Generator | None = None) -> tuple[Part, Part]:
        """Split k-space by lines, or by points where the mask has points; see `MeasurementOperator.split`.

        The four lowest frequencies along each axis of the mask are always kept.

        References:
            Yaman, Hosseini, Moeller, Ellermann, Ugurbil, Akcakaya, "Self-supervised learning of physics-guided
            reconstruction neural networks without fully sampled reference data", Magnetic Resonance in Medicine 84
            (2020).
        """
        self._check("k-space", y, self.data_shape)
        _blocks.check_share("CartesianMRI", share)
        device = "cpu" if generator is None else generator.device
        order = torch.rand(self.mask.shape[1:], generator=generator, device=device).to(self.mask.device)
        centre = torch.ones_like(self.mask[:1])
        for axis, n in ((-2, self.mask.shape[-2]), (-1, self.mask.shape[-1])):
            if n > 1:
                frequency = torch.arange(n, device=self.mask.device)
                frequency = frequency - n // 2 if self.centered else (frequency + n // 2) % n - n // 2
                low = (frequency >= -CENTRE // 2) & (frequency < CENTRE // 2)
                centre = centre & low.reshape((-1, 1) if axis == -2 else (1, -1))
        free = self.mask & ~centre
        order = torch.where(free, order, -1).flatten(1)
        rest = torch.zeros_like(order, dtype=torch.bool)
        for image, mask in enumerate(self.mask):
            many = min(max(1, round(share * int(mask.sum()))), int(free[image].sum()))
            if many == 0 or bool((mask == free[image]).all() and many == int(mask.sum())):
                what = "lines" if self.axis is not None else "points"
                raise ValueError(
                    f"CartesianMRI: nothing can be left out of {int(mask.sum())} {what} of k-space, of which the "
                    f"{CENTRE} lowest frequencies stay"
                )
            rest[image, order[image].topk(many).indices] = True
        rest = rest.reshape(self.mask.shape)
        return self._part(y, self.mask & ~rest), self._part(y, rest)

    def _part(self, y: Tensor, mask: Tensor) -> Part:
        along = self._kspace_shape[-1 if self.axis == -2 else -2]
        operator = CartesianMRI(
            self.coil_maps,
            mask,
            centered=self.centered,
            readout_size=None if self.axis is None else along,
            backend=self.backend,
        )
        return Part(operator, torch.where(mask[:, None], y, 0))

    def norm_squared(self) -> float:
        r"""Bound :math:`\|A\|^2`, the Lipschitz constant of the full gradient.

        With the orthonormal transform it is at most :math:`\max_p \sum_c |S_c(p)|^2`, and just that where all of
        k-space is sampled.
        """
        return float(self._power().sum(1).max())

    def minibatch_norm_squared(self, size: int) -> float:
        r"""Bound what takes the place of :math:`\|A\|^2` where each step sees a minibatch of coils.

        A coil sees a part of the image, and that part alone counts, :math:`C / b` times, in a minibatch of `b` coils.
        Steps are safe up to the inverse of the expected smoothness.

        Args:
            size: Number of coils a step.
        """
        _blocks.check_size("CartesianMRI", "coils", size, self.n_blocks)
        largest = float(self._power().max())
        return _blocks.expected_smoothness(self.n_blocks, size, self.norm_squared(), largest)

    def _power(self) -> Tensor:
        return torch.view_as_real(self.coil_maps).float().square().sum(-1)

    def _uniform_power(self) -> Tensor | None:
        """Return the squared modulus of one coil's sensitivity, shape (1 or B, 1, 1), where it does not vary; kept."""

        def make() -> Tensor | None:
            power = torch.view_as_real(self.coil_maps).double().square().sum(-1).amax(1)
            least, most = power.amin((-2, -1), True), power.amax((-2, -1), True)
            same = self.n_blocks == 1 and bool((most - least <= ROUNDING * most).all())
            return most.to(self.coil_maps.real.dtype) if same else None

        return self._follow("uniform", make, self.coil_maps)

    def _circulant(self) -> tuple[Tensor, Tensor]:
        """Return the spectrum of a circulant C and weights R of the pixels such that A^H A is about R C R; kept.

        R is the sensitivity of all coils together, relative to its largest. C is along the axes that A^H A mixes.
        """

        def make() -> tuple[Tensor, Tensor]:
            axes = (-2, -1) if self.axis is None else (self.axis,)
            maps = self.coil_maps.contiguous()
            maps = maps.to(torch.complex64) if maps.dtype == torch.complex32 else maps
            power = torch.view_as_real(maps).square().sum((-1, 1))
            most = power.amax((-2, -1), True)
            reach = (power / torch.where(most > 0, most, 1)).sqrt()
            spectra = fft(torch.fft.fftn, maps.conj(), axes, norm="backward")
            correlation = fft(torch.fft.ifftn, spectra.abs().square().sum(1), axes, norm="backward")
            seen = reach.square().sum(axes, True)
            mask = torch.fft.ifftshift(self.mask, dim=axes) if self.centered else self.mask
            kernel = fft(torch.fft.ifftn, mask.to(maps.real.dtype), axes, norm="backward")
            product = kernel * correlation / torch.where(seen > 0, seen, 1)
            spectrum = fft(torch.fft.fftn, product, axes, norm="backward")
            return spectrum.real.clamp(min=0), reach

        return self._follow("response", make, self.coil_maps, self.mask)

    def initial(self, y: Tensor) -> Tensor:
        """Reconstruct a start for iterations: zero-filled, the coils combined by their maps."""
        return self.adjoint(y)

    @property
    def _axis(self) -> int:
        return -2 if self.axis is None else self.axis

    def _convert(self, y: Tensor) -> Tensor:
        """Bring k-space into the form of `oder_fast.ops.fourier_forward`."""
        self._check("k-space", y, self.data_shape)
        if self.axis is None:
            if self.centered:
                y = _modulate(torch.fft.ifftshift(y, dim=(-2, -1)), (-2, -1), -1)
            return _by_columns(y)
        pixels = self.image_shape[-1 if self.axis == -2 else -2]
        index, places, turns = self._index(y)
        # Of the lines that are sampled alone.
        rows = y.movedim(self.axis, -2).take_along_dim(places, -2)
        rows = _middle(_transform(rows, -1, self.centered, inverse=True), -1, pixels, self.centered)
        if turns is not None:
            rows = rows * turns.conj()
        return torch.where(index >= 0, rows, 0)

    def _restore(self, samples: Tensor) -> Tensor:
        """Undo `_convert`, but for what the mask leaves out."""
        if self.axis is None:
            if not self.centered:
                return samples
            centred: Tensor = torch.fft.fftshift(_modulate(samples, (-2, -1), +1), dim=(-2, -1))
            return centred
        readout = self._kspace_shape[-1 if self.axis == -2 else -2]
        index, places, turns = self._index(samples)
        rows = torch.where(index >= 0, samples, 0)
        if turns is not None:
            rows = rows * turns
        rows = _transform(_surrounded(rows, -1, readout, self.centered), -1, self.centered, inverse=False)
        empty = rows.new_zeros(*rows.shape[:2], self.image_shape[self.axis], readout)
        return empty.scatter_add(-2, places.expand(rows.shape), rows).movedim(-2, self.axis)

    def _index(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return sampled lines (1 or B, 1, L, 1), their places in k-space, and the phases of an origin at n // 2."""
        assert self.axis is not None
        index, n = self.sampling[:, None, :, None], self.image_shape[self.axis]
        lines = index.clamp(min=0)
        if not self.centered:
            return index, lines, None
        return index, (lines + n // 2) % n, _turns(lines, n, 1).to(like.dtype)


class MRILeastSquares(LeastSquares):
    r"""The data fidelity of `CartesianMRI`.

    `solve` is closed for one coil whose sensitivity has the same modulus s everywhere: A^H A is then s^2 times a
    projection, and

    .. math:: (A^H A + w)^{-1} r = \frac{1}{w} \Bigl( r - \frac{A^H A r}{s^2 + w} \Bigr)

    Several coils take conjugate gradients, preconditioned by the circulant nearest to A^H A on the pixels that the
    coils see: at R = 4, 8 coils and a weight of 0.02 |A|^2 that takes 8 to 13 calls of the operator a solve, where 15
    to 19 are needed without.
    """

    operator: CartesianMRI

    def __init__(self, operator: CartesianMRI, y: Tensor) -> None:
        super().__init__(operator, y)
        self.samples = operator._samples(y)

    def solve(
        self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor, free: Tensor | None = None
    ) -> Tensor:
        """Solve, in closed form where there is one; see `LeastSquares.solve`."""
        square = self.operator._uniform_power() if free is None else None
        if square is None:
            return super().solve(rhs, weight, start, tolerance, free)
        return (rhs - self.normal(rhs) / (square + weight)) / weight

    def _preconditioner(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        spectrum, reach = self.operator._circulant()
        axes = (-2, -1) if self.operator.axis is None else (self.operator.axis,)
        inverse, outside = 1 / (spectrum + weight), (1 - reach.square()) / weight

        def apply(v: Tensor) -> Tensor:
            inside = fft(torch.fft.ifftn, fft(torch.fft.fftn, reach * v, axes) * inverse, axes)
            return torch.addcmul(reach * inside, outside, v)

        return apply

    def _gradient(self, x: Tensor, blocks: Tensor | None) -> Tensor:
        return self._take(x, self.samples, blocks)

    def _normal(self, v: Tensor, blocks: Tensor | None) -> Tensor:
        return self._take(v, None, blocks)

    def _take(self, x: Tensor, samples: Tensor | None, blocks: Tensor | None) -> Tensor:
        mri = self.operator
        mri._check("image", x, mri.image_shape)
        return ops.fourier_gradient(
            x, samples, mri.coil_maps, mri.sampling, blocks, axis=mri._axis, backend=mri.backend
        )


def _versions(*tensors: Tensor) -> list[tuple[Tensor, int]]:
    """Return tensors, and how often each has been changed in place."""
    return [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _read_mask(
    mask: Tensor, image_shape: tuple[int, int], readout_size: int | None
) -> tuple[Tensor, int | None]:
    """Return the mask (1 or B, H' or 1, W' or 1), and the axis that sampled lines are counted along."""
    if mask.dtype != torch.bool:
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError("CartesianMRI: mask must hold only 0 and 1")
        mask = mask != 0
    given = tuple(mask.shape)
    if mask.ndim in (1, 2):
        mask = mask.reshape(1, 1, -1) if mask.ndim == 1 else mask[None]
    allowed = [{1, n} | ({readout_size} if readout_size is not None else set()) for n in image_shape]
    if mask.ndim != 3 or mask.shape[1] not in allowed[0] or mask.shape[2] not in allowed[1]:
        height, width = image_shape
        raise ValueError(
            f"CartesianMRI: mask must have shape ({width},), ({height}, 1) or ({height}, {width}), as the images of "
            f"coil_maps, or (B, 1, {width}), (B, {height}, 1) or (B, {height}, {width}) for each of them; got {given}"
        )
    empty = (~mask.flatten(1).any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"CartesianMRI: mask samples nothing{f' of image {int(empty[0])}' if len(mask) > 1 else ''}"
        )
    columns = mask.shape[1] > 1 and mask.shape[2] == 1
    for along in (-2, -1):
        first = mask.narrow(along, 0, 1)
        if bool((mask == first).all()):
            mask = first
    if mask.shape[1] > 1 and mask.shape[2] > 1:
        axis = None
    else:
        axis = -2 if mask.shape[1] > 1 else -1
        if mask.shape[1:] == (1, 1):
            # Everything is sampled: lines run as the mask's shape has them.
            axis = -2 if columns else -1
            mask = mask.expand(-1, *((image_shape[0], 1) if columns else (1, image_shape[1])))
    return mask.contiguous(), axis


def _by_columns(values: Tensor) -> Tensor:
    """Lay values out column by column, as the backends read what belongs to points."""
    return values.transpose(-1, -2).contiguous().transpose(-1, -2)


def _points(mask: Tensor, centered: bool) -> Tensor:
    return _by_columns(torch.fft.ifftshift(mask, dim=(-2, -1)) if centered else mask)


def _line_numbers(mask: Tensor, centered: bool) -> Tensor:
    """Return the sampled frequencies (K, L) in increasing order, padded with -1."""
    flat = mask.flatten(1)
    flat = torch.fft.ifftshift(flat, dim=-1) if centered else flat
    order = torch.sort(~flat, dim=1, stable=True).indices
    longest = max(1, int(flat.sum(1).max()))
    numbers = torch.where(flat.gather(1, order), order, -1)
    return numbers[:, :longest].contiguous()


def _modulate(spectrum: Tensor, axes: tuple[int, ...], sign: int) -> Tensor:
    """Turn spectra by exp(sign 2 pi i k (n // 2) / n), which moves the image's origin: -1 to index n // 2."""
    for axis in axes:
        n = spectrum.shape[axis]
        shape = [1] * spectrum.ndim
        shape[axis] = n
        turns = _turns(torch.arange(n, device=spectrum.device), n, sign)
        spectrum = spectrum * turns.to(spectrum.dtype).reshape(shape)
    return spectrum


def _turns(k: Tensor, n: int, sign: int) -> Tensor:
    """Return exp(sign 2 pi i k (n // 2) / n), complex128."""
    # The product modulo n: exact where the turns are.
    angle = (k * (n // 2) % n).double() * (sign * 2 * torch.pi / n)
    return torch.polar(torch.ones_like(angle), angle)


def _transform(values: Tensor, axis: int, centered: bool, inverse: bool) -> Tensor:
    if values.numel() == 0:  # which MKL refuses
        return values
    if centered:
        values = torch.fft.ifftshift(values, dim=axis)
    result = fft(torch.fft.ifftn if inverse else torch.fft.fftn, values, (axis,))
    return torch.fft.fftshift(result, dim=axis) if centered else result


def _middle(values: Tensor, axis: int, size: int, centered: bool) -> Tensor:
    """Cut an axis to the part around the origin."""
    n = values.shape[axis]
    if n == size:
        return values
    if centered:
        return values.narrow(axis, n // 2 - size // 2, size)
    before = size // 2
    return torch.cat((values.narrow(axis, 0, size - before), values.narrow(axis, n - before, before)), axis)


def _surrounded(values: Tensor, axis: int, size: int, centered: bool) -> Tensor:
    """Surround the part around the origin with zeros: the transpose of `_middle`."""
    n = values.shape[axis]
    if n == size:
        return values
    shape = list(values.shape)
    shape[axis] = size - n
    zeros = values.new_zeros(shape)
    if centered:
        left = size // 2 - n // 2
        parts = (zeros.narrow(axis, 0, left), values, zeros.narrow(axis, left, size - n - left))
        return torch.cat(parts, axis)
    before = n // 2
    parts = (values.narrow(axis, 0, n - before), zeros, values.narrow(axis, n - before, before))
    return torch.cat(parts, axis)
