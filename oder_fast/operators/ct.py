"""Parallel-beam computed tomography."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .._numpy import takes_numpy
from .._torch import fft, kept
from . import _blocks
from .base import LeastSquares, MeasurementOperator, Part, power_iteration

FILTERS = ("ramp", "shepp-logan", "cosine", "hann")
SAMPLING = ("uniform", "stratified")
# As in the official code of ODER: five sectors of 36 degrees.
SECTORS = 5
# Of the circulant: its grid relative to the image, and the points that A^T A's response is the mean of. Of grids 1 to 2
# times the image 1.25 costs least time: 2 saves a step in ten, and its transforms cost as much as three of A^T A at
# 256 x 256. Five points save a tenth of one point's steps, a quarter with few views, and half with coarse bins.
MARGIN = 1.25
POINTS = ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))


@takes_numpy
class ParallelBeamCT(MeasurementOperator):
    r"""Parallel-beam CT: sinograms of images, and everything a fixed point needs of them.

    .. math:: y = A x, \quad y_{v,d} = \int x \, ds \;\; \text{along} \;\; x\cos\theta_v + y\sin\theta_v = s_d

    The blocks that minibatches are made of are the views.

    Args:
        image_size: ``H = W``, or ``(H, W)``.
        angles: Number of views, spread evenly over 180 degrees from 0, or the angles in radians.
        n_bins: Number of detector bins; by default as many as the image's diagonal takes, an odd number.
        bin_spacing: Distance of neighbouring bins, in the unit of `pixel_size`; by default `pixel_size`.
        bin_offset: Position of the detector's centre relative to the axis of rotation, same unit.
        pixel_size: Edge of a pixel.
        sampling: How `draw_blocks` draws: ``"uniform"``, or ``"stratified"`` (the half circle in sectors, the
            same offsets drawn in each, as in the official code of ODER; views in order of angle).
        backend: ``"auto"`` or the name of a backend.

    Attributes:
        angles: float64, shape ``(V,)``; keeps its precision whatever ``.to(dtype)`` is called.
        n_blocks: Number of views.
        image_shape: ``(H, W)``.
        data_shape: ``(V, D)``.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For sizes, angles or names that make no scan.

    Example:
        >>> import torch
        >>> ct = ParallelBeamCT(image_size=64, angles=30)
        >>> ct(torch.ones(1, 64, 64)).shape
        torch.Size([1, 30, 91])
    """

    image_shape: tuple[int, int]
    angles: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int],
        angles: int | Sequence[float] | Tensor,
        n_bins: int | None = None,
        *,
        bin_spacing: float | None = None,
        bin_offset: float = 0.0,
        pixel_size: float = 1.0,
        sampling: Literal["uniform", "stratified"] = "uniform",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or not all(isinstance(n, int) and n >= 1 for n in size):
            raise ValueError(
                f"ParallelBeamCT: image_size must be one or two whole numbers above 0, got {image_size}"
            )
        self.image_shape = size
        self.pixel_size = float(pixel_size)
        self.bin_spacing = self.pixel_size if bin_spacing is None else float(bin_spacing)
        self.bin_offset = float(bin_offset)
        for name in ("pixel_size", "bin_spacing"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"ParallelBeamCT: {name} must be a finite number above 0, got {value}")
        if not math.isfinite(self.bin_offset):
            raise ValueError(f"ParallelBeamCT: bin_offset must be finite, got {bin_offset}")
        if n_bins is None:
            n_bins = math.ceil(math.hypot(*size) * self.pixel_size / self.bin_spacing) | 1
        if n_bins < 1:
            raise ValueError(f"ParallelBeamCT: n_bins must be at least 1, got {n_bins}")
        self.n_bins = int(n_bins)
        if sampling not in SAMPLING:
            raise ValueError(f"ParallelBeamCT: sampling must be one of {SAMPLING}, got {sampling!r}")
        self.sampling = sampling
        self.backend = backend
        self._exact_angles = kept(_read_angles(angles))
        self.register_buffer("angles", kept(self._exact_angles.clone()), persistent=False)
        self._norm_squared: float | None = None
        self._largest_view: float | None = None
        self._filters: dict[tuple[Any, ...], Tensor] = {}
        self._response: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParallelBeamCT:
        # .half() or .to(float32) must not move the rays.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.angles = kept(self._exact_angles.to(self.angles.device))
        self._filters = {}
        self._response = None
        return self

    def extra_repr(self) -> str:
        """Tell the geometry."""
        return (
            f"image_shape={self.image_shape}, n_views={self.n_blocks}, n_bins={self.n_bins}, "
            f"sampling={self.sampling!r}"
        )

    @property
    def n_blocks(self) -> int:  # type: ignore[override]
        """Number of views."""
        return self._exact_angles.shape[0]

    @property
    def data_shape(self) -> tuple[int, int]:  # type: ignore[override]
        """``(V, D)``."""
        return self.n_blocks, self.n_bins

    @property
    def detector(self) -> ops.Detector:
        """Where the bins are, as functions of `oder_fast.ops` take it."""
        return ops.Detector(self.n_bins, self.bin_spacing, self.bin_offset, self.pixel_size)

    def _check(self, name: str, value: Tensor, shape: tuple[int, int]) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"ParallelBeamCT: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.is_complex():
            raise TypeError(f"ParallelBeamCT: {name} must be real, got {value.dtype}")
        if value.ndim != 3 or tuple(value.shape[1:]) != shape:
            raise ValueError(
                f"ParallelBeamCT: {name} must have shape (B, {shape[0]}, {shape[1]}), got {tuple(value.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Project images ``(B, H, W)`` to sinograms ``(B, V, D)``; see `oder_fast.ops.radon_forward`."""
        self._check("image", x, self.image_shape)
        return ops.radon_forward(x, self.angles, self.detector, backend=self.backend)

    def adjoint(self, y: Tensor) -> Tensor:
        """Back-project sinograms ``(B, V, D)``: the exact transpose of `forward`."""
        self._check("sinogram", y, self.data_shape)
        return ops.radon_adjoint(y, self.angles, self.detector, self.image_shape, backend=self.backend)

    def least_squares(self, y: Tensor) -> CTLeastSquares:
        r"""Return the data fidelity :math:`g(x) = \tfrac12 \|A x - y\|^2` of sinograms ``(B, V, D)``."""
        self._check("sinogram", y, self.data_shape)
        return CTLeastSquares(self, y)

    def draw_blocks(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the views of a minibatch without replacement, each as likely as any other.

        Args:
            size: Number of views, 1 to `n_blocks`.
            generator: Source of randomness; on a GPU give one of that device, or each draw is copied there.

        Returns:
            Sorted int64 indices, shape ``(size,)``, on the device of `angles`.

        Raises:
            ValueError: If `size` is out of range.
        """
        n, device = self.n_blocks, self.angles.device
        _blocks.check_size("ParallelBeamCT", "views", size, n)
        if self.sampling == "uniform":
            return _blocks.draw(n, size, generator, device)
        drawn = _draw_stratified(n, size, generator, device if generator is None else generator.device)
        return drawn.sort().values.to(device, non_blocking=True)

    def split(self, y: Tensor, share: float, generator: torch.Generator | None = None) -> tuple[Part, Part]:
        """Split sinograms by views, those left out spread over the half circle; see `MeasurementOperator.split`."""
        self._check("sinogram", y, self.data_shape)
        order = self._exact_angles.remainder(math.pi).argsort()
        rest = (
            order[_blocks.left_out("ParallelBeamCT", "views", self.n_blocks, share, generator)].sort().values
        )
        keeps = torch.ones(self.n_blocks, dtype=torch.bool)
        keeps[rest] = False
        parts = keeps.nonzero().flatten(), rest
        return self._part(y, parts[0]), self._part(y, parts[1])

    def _part(self, y: Tensor, views: Tensor) -> Part:
        operator = ParallelBeamCT(
            self.image_shape,
            self._exact_angles[views],
            self.n_bins,
            bin_spacing=self.bin_spacing,
            bin_offset=self.bin_offset,
            pixel_size=self.pixel_size,
            sampling=self.sampling,
            backend=self.backend,
        )
        return Part(operator.to(self.angles.device), y.index_select(1, views.to(y.device)))

    def norm_squared(self) -> float:
        r"""Compute :math:`\|A\|^2`, the Lipschitz constant of the full gradient, by power iteration; kept."""
        if self._norm_squared is None:
            ones = torch.ones(1, *self.image_shape, device=self.angles.device)
            self._norm_squared, _ = power_iteration(self._normal, ones)
            if self._norm_squared == 0:
                raise ValueError("ParallelBeamCT: the detector sees nothing of the image")
        return self._norm_squared

    def minibatch_norm_squared(self, size: int) -> float:
        r"""Bound what takes the place of :math:`\|A\|^2` where each step sees a minibatch: the expected smoothness.

        The norm squared of one view is at most the largest entry of :math:`A_v^T A_v 1`.

        Args:
            size: Number of views a step.
        """
        _blocks.check_size("ParallelBeamCT", "views", size, self.n_blocks)
        if self._largest_view is None:
            ones = torch.ones(1, *self.image_shape, device=self.angles.device)
            views = torch.arange(self.n_blocks, device=self.angles.device).split(1)
            with torch.no_grad():
                largest = max(float(self._normal(ones, view).max()) for view in views)
            self._largest_view = largest / self.n_blocks
        return _blocks.expected_smoothness(self.n_blocks, size, self.norm_squared(), self._largest_view)

    def _normal(self, v: Tensor, blocks: Tensor | None = None) -> Tensor:
        return ops.radon_gradient(v, None, self.angles, self.detector, blocks, backend=self.backend)

    def _circulant(self, dtype: torch.dtype) -> tuple[Tensor, tuple[int, int]]:
        """Return the spectrum of A^T A's mean response to points, on a larger grid, and the grid; kept."""
        height, width = self.image_shape
        from scipy.fft import next_fast_len

        grid = next_fast_len(math.ceil(MARGIN * height)), next_fast_len(math.ceil(MARGIN * width), real=True)
        if self._response is None or self._response.dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():
                points = torch.zeros(len(POINTS), height, width, dtype=dtype, device=self.angles.device)
                response = torch.zeros(grid, dtype=dtype, device=points.device)
                at = [(int(i * height), int(j * width)) for i, j in POINTS]
                for point, (i, j) in zip(points, at, strict=True):
                    point[i, j] = 1
                for (i, j), image in zip(at, self._normal(points), strict=True):
                    # What is farther away than half the grid would wrap around.
                    rows = slice(max(0, i - grid[0] // 2), i + grid[0] // 2 + 1)
                    columns = slice(max(0, j - grid[1] // 2), j + grid[1] // 2 + 1)
                    near = torch.zeros_like(response)
                    near[:height, :width][rows, columns] = image[rows, columns]
                    response += near.roll((-i, -j), (0, 1))
                mean = fft(torch.fft.rfftn, response / len(POINTS), norm="backward")
                self._response = mean.real.clamp(min=0)
        return self._response, grid

    def initial(self, y: Tensor) -> Tensor:
        """Reconstruct a start for iterations: filtered back-projection with the Hann window."""
        return self.fbp(y, filter="hann")

    def fbp(
        self, y: Tensor, filter: Literal["ramp", "shepp-logan", "cosine", "hann"] = "ramp"
    ) -> Tensor:  # the word of the field
        r"""Reconstruct by filtered back-projection.

        .. math:: x(p) = \sum_v \Delta\theta_v \, (h * y_v)(p \cdot \theta_v)

        The ramp is the band-limited one in space (zero at even distances), so that no offset is left; each view
        weighs as much as half the circle is its own: unevenly spread angles are right too.

        Args:
            y: Sinograms, shape ``(B, V, D)``.
            filter: Window on the ramp.

        Returns:
            Images, shape ``(B, H, W)``, differentiable in `y`.

        Raises:
            ValueError: For a shape that does not fit or an unknown filter.

        References:
            Kak, Slaney, "Principles of computerized tomographic imaging" (1988), chapter 3.
        """
        self._check("sinogram", y, self.data_shape)
        if filter not in FILTERS:
            raise ValueError(f"ParallelBeamCT: filter must be one of {FILTERS}, got {filter!r}")
        key = (filter, y.dtype, y.device)
        response = self._filters.get(key)
        if response is None:
            ramp = _ramp_response(self.n_bins, filter) / self.bin_spacing
            response = (_angular_weights(self._exact_angles)[:, None] * ramp).to(y.device)
            # Transforms know no half precision.
            response = response.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
            if not torch.compiler.is_compiling():
                self._filters[key] = response = kept(response)
        length = 2 * (response.shape[-1] - 1)
        spectrum = fft(torch.fft.rfftn, y.to(response.dtype), (-1,), (length,)) * response
        filtered = fft(torch.fft.irfftn, spectrum, (-1,), (length,))[..., : self.n_bins].to(y.dtype)
        return ops.radon_backproject(
            filtered, self.angles, self.detector, self.image_shape, backend=self.backend
        )


class CTLeastSquares(LeastSquares):
    """The data fidelity of `ParallelBeamCT`; its inner solves are preconditioned by a circulant.

    A^T A is nearly a convolution: its response to a point, the mean over a few, has the spectrum `c` on a grid a
    quarter larger than the image, and ``(c + w)^-1`` between transforms is an approximate inverse, for any angles.
    """

    operator: ParallelBeamCT

    def _gradient(self, x: Tensor, blocks: Tensor | None) -> Tensor:
        ct = self.operator
        ct._check("image", x, ct.image_shape)
        return ops.radon_gradient(x, self.y, ct.angles, ct.detector, blocks, backend=ct.backend)

    def _normal(self, v: Tensor, blocks: Tensor | None) -> Tensor:
        return self.operator._normal(v, blocks)

    def _preconditioner(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        response, grid = self.operator._circulant(self.y.dtype)
        inverse = 1 / (response + weight)
        height, width = self.operator.image_shape

        def apply(v: Tensor) -> Tensor:
            image = fft(torch.fft.irfftn, fft(torch.fft.rfftn, v, size=grid) * inverse, size=grid)
            return image[..., :height, :width]

        return apply


def _read_angles(angles: int | Sequence[float] | Tensor) -> Tensor:
    if isinstance(angles, bool):
        raise TypeError("ParallelBeamCT: angles must be a number of views or angles in radians, got a bool")
    if isinstance(angles, int):
        if angles < 1:
            raise ValueError(f"ParallelBeamCT: angles must be at least one view, got {angles}")
        return torch.arange(angles, dtype=torch.float64) * (math.pi / angles)
    result = torch.as_tensor(angles, dtype=torch.float64).detach().cpu().clone()
    if result.ndim != 1 or result.shape[0] == 0:
        raise ValueError(
            f"ParallelBeamCT: angles must be one row of at least one view, got shape {tuple(result.shape)}"
        )
    if not bool(result.isfinite().all()):
        raise ValueError("ParallelBeamCT: angles must be finite")
    if bool((result.abs() > 4 * math.pi).any()):
        warnings.warn(
            f"ParallelBeamCT: angles are in radians, got up to {float(result.abs().max()):g}; for degrees give "
            "torch.deg2rad(angles)",
            stacklevel=4,
        )
    return result


def _draw_stratified(n: int, size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw the same offsets in each sector, then turn all by a random shift, which makes every view equally likely.

    Where more than half are drawn, the views left out are drawn so.
    """
    if 2 * size > n:
        keep = torch.ones(n, dtype=torch.bool, device=device)
        keep[_draw_stratified(n, n - size, generator, device)] = False
        return (
            torch.arange(n, device=device).masked_select(keep) if size < n else torch.arange(n, device=device)
        )
    sectors = min(SECTORS, n)
    starts = torch.arange(sectors, device=device) * n // sectors
    per_sector = -(-size // sectors)
    offsets = torch.randperm(n // sectors, generator=generator, device=device)[:per_sector]
    turned = starts[torch.randperm(sectors, generator=generator, device=device)]
    drawn = (offsets[:, None] + turned).flatten()[:size]
    shift = torch.randint(n, (1,), generator=generator, device=device)
    return (drawn + shift) % n


def _ramp_response(n_bins: int, window: str) -> Tensor:
    """Return the frequency response of the windowed ramp for unit spacing, at half a period's frequencies."""
    length = 1 << math.ceil(math.log2(max(64, 2 * n_bins)))
    distance = torch.fft.fftfreq(length, 1 / length, dtype=torch.float64)
    kernel = torch.where(distance % 2 == 0, 0.0, -1 / (math.pi * distance) ** 2)
    kernel[0] = 0.25
    response = fft(torch.fft.rfftn, kernel, (-1,), norm="backward").real
    frequency = torch.fft.rfftfreq(length, dtype=torch.float64)
    if window == "shepp-logan":
        response *= torch.sinc(frequency)
    elif window == "cosine":
        response *= torch.cos(math.pi * frequency)
    elif window == "hann":
        response *= 0.5 + 0.5 * torch.cos(2 * math.pi * frequency)
    return response


def _angular_weights(angles: Tensor) -> Tensor:
    """Return each view's share of the half circle: half the distance to both neighbours, modulo 180 degrees."""
    if angles.shape[0] == 1:
        return torch.full((1,), math.pi, dtype=torch.float64)
    folded, order = torch.sort(angles.remainder(math.pi))
    gaps = torch.diff(folded, append=folded[:1] + math.pi)
    shares = torch.empty_like(angles)
    shares[order] = 0.5 * (gaps + gaps.roll(1))
    return shares
