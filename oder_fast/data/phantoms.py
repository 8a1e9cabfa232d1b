"""Images made of ellipses, volumes made of ellipsoids, and patches cut from images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._numpy import takes_numpy

# Value, half axes, centre (x right, y up) and rotation in degrees, in units of half the image: the contrasts
# of Toft's variant, which shows the small ellipses.
SHEPP_LOGAN = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0),
    (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0),
    (-0.2, 0.11, 0.31, 0.22, 0.0, -18),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18),
    (0.1, 0.21, 0.25, 0.0, 0.35, 0),
    (0.1, 0.046, 0.046, 0.0, 0.1, 0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0),
    (0.1, 0.046, 0.023, -0.08, -0.605, 0),
    (0.1, 0.023, 0.023, 0.0, -0.605, 0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0),
)


# Of a brain in an axial T1-weighted slice: value, half axes, centre, rotation as above; then the folds of the
# outline: their number around the ellipse, and their depth as a share of the radius.
BRAIN = (
    (0.85, 0.72, 0.92, 0.0, 0.0, 0, 0, 0.0),  # scalp, fat
    (0.08, 0.67, 0.87, 0.0, 0.0, 0, 0, 0.0),  # skull
    (0.18, 0.625, 0.825, 0.0, 0.0, 0, 0, 0.0),  # fluid around the brain
    (0.50, 0.60, 0.80, 0.0, 0.0, 0, 31, 0.02),  # cortex
    (0.78, 0.25, 0.68, -0.275, 0.0, -4, 17, 0.09),  # white matter, left and right of the image
    (0.78, 0.25, 0.68, 0.275, 0.0, 4, 19, 0.09),
    (0.80, 0.17, 0.09, 0.0, 0.27, 0, 0, 0.0),  # corpus callosum, front and back
    (0.80, 0.17, 0.08, 0.0, -0.31, 0, 0, 0.0),
    (0.18, 0.012, 0.25, 0.0, 0.57, 0, 0, 0.0),  # fissure between the hemispheres
    (0.18, 0.012, 0.22, 0.0, -0.61, 0, 0, 0.0),
    (0.58, 0.10, 0.14, -0.17, 0.17, -15, 0, 0.0),  # caudate and lentiform nuclei
    (0.58, 0.10, 0.14, 0.17, 0.17, 15, 0, 0.0),
    (0.62, 0.07, 0.17, -0.30, 0.06, 14, 0, 0.0),
    (0.62, 0.07, 0.17, 0.30, 0.06, -14, 0, 0.0),
    (0.60, 0.09, 0.15, -0.11, -0.06, 14, 0, 0.0),  # thalami
    (0.60, 0.09, 0.15, 0.11, -0.06, -14, 0, 0.0),
    (0.14, 0.045, 0.16, -0.08, 0.17, -20, 0, 0.0),  # ventricles: front horns, third, back horns
    (0.14, 0.045, 0.16, 0.08, 0.17, 20, 0, 0.0),
    (0.14, 0.012, 0.09, 0.0, -0.05, 0, 0, 0.0),
    (0.14, 0.04, 0.15, -0.19, -0.32, 30, 0, 0.0),
    (0.14, 0.04, 0.15, 0.19, -0.32, -30, 0, 0.0),
    (0.95, 0.018, 0.018, 0.02, 0.46, 0, 0, 0.0),  # vessels
    (0.95, 0.030, 0.016, 0.0, -0.84, 0, 0, 0.0),
    (0.36, 0.035, 0.025, 0.31, 0.40, 25, 0, 0.0),  # lesions
    (0.36, 0.014, 0.014, 0.36, -0.27, 0, 0, 0.0),
    (0.36, 0.020, 0.012, -0.33, -0.20, 40, 0, 0.0),
)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Return x (to the right) and y (upward) of the pixel centres in [-1, 1], each (size, size)."""
    if size < 1:
        raise ValueError(f"phantom: size must be at least 1, got {size}")
    centre = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    y, x = torch.meshgrid(-centre, centre, indexing="ij")
    return x, y


@takes_numpy
def shepp_logan(size: int) -> Tensor:
    """Draw the Shepp-Logan phantom, with the contrasts of Toft's variant.

    Args:
        size: Rows and columns.

    Returns:
        Shape ``(size, size)``, float32, values in [0, 1].

    References:
        Shepp, Logan, "The Fourier reconstruction of a head section", IEEE Trans. Nuclear Science 21 (1974).
    """
    x, y = _grid(size)
    image = torch.zeros_like(x)
    for value, a, b, x0, y0, degrees in SHEPP_LOGAN:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        u = ((x - x0) * c + (y - y0) * s) / a
        v = ((y - y0) * c - (x - x0) * s) / b
        image += value * (u**2 + v**2 <= 1)
    return image.clamp(0, 1).float()


def _smooth_noise(n: int, shape: tuple[int, int], cells: int, generator: torch.Generator | None) -> Tensor:
    """Return (n, *shape) interpolated from `cells` independent normal values along each side."""
    coarse = torch.randn(n, 1, cells, cells, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, shape, mode="bicubic", align_corners=False)
    return fine[:, 0]


def _cover(u: Tensor, v: Tensor, a: Tensor, b: Tensor, size: int, stretch: Tensor | float = 1.0) -> Tensor:
    """Return how much of each pixel an ellipse covers: its edge is one pixel wide.

    Args:
        u: Coordinate along the first axis of the ellipse over its half length.
        v: Likewise, along the second.
        a: First half length, in halves of the image.
        b: Second half length.
        size: Rows and columns of the image.
        stretch: Factor of the outline's distance from the centre, in each direction.
    """
    # The distance to the ellipse, to first order, in pixels.
    norm = torch.sqrt(u**2 + v**2)
    slope = torch.sqrt((u / a) ** 2 + (v / b) ** 2) / norm.clamp_min(1e-6)
    return (0.5 - (norm / stretch - 1) / slope.clamp_min(1e-6) * size / 2).clamp(0, 1)


@takes_numpy
def random_shepp_logan(
    n: int, size: int, generator: torch.Generator | None = None, *, spread: float = 1.0
) -> Tensor:
    """Draw variants of the Shepp-Logan phantom: heads that differ in size and tilt, and in every ellipse within.

    The head is scaled to 90 to 104 % along each axis and turned by up to 15 degrees. Each ellipse within it changes by
    up to 20 % in its axes, 0.04 halves of the image in its centre, 15 degrees in its angle and 50 % in its contrast;
    the skull keeps the thickness it has. Edges are one pixel wide.

    Args:
        n: How many images.
        size: Rows and columns.
        generator: Source of the random numbers; the same seed gives the same images.
        spread: Factor of all these ranges, in 0..1; 0 gives the phantom itself.

    Returns:
        Shape ``(n, size, size)``, float32, values in [0, 1], 0 outside the head.

    Raises:
        ValueError: For an argument out of range.

    Example:
        >>> import torch
        >>> random_shepp_logan(3, 32, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 32, 32])
    """
    if not 0 <= spread <= 1:
        raise ValueError(f"random_shepp_logan: spread must be in 0..1, got {spread}")

    def vary(amount: float, count: int) -> Tensor:
        return amount * spread * (2 * torch.rand(n, count, 1, 1, generator=generator) - 1)

    x, y = (axis.float() for axis in _grid(size))
    inner = len(SHEPP_LOGAN) - 2
    still = torch.zeros(n, 2, 1, 1)

    def within(amount: float) -> Tensor:
        return torch.cat((still, vary(amount, inner)), 1)

    value, a, b, x0, y0, degrees = torch.tensor(SHEPP_LOGAN)[:, :, None, None].unbind(1)
    tilt = math.radians(15) * vary(1, 1)
    width, length = (1 - 0.03 * spread + vary(0.07, 1) for _ in range(2))
    across = (x * torch.cos(tilt) + y * torch.sin(tilt)) / width
    along = (y * torch.cos(tilt) - x * torch.sin(tilt)) / length
    value = value * (1 + within(0.5))
    a, b = a * (1 + within(0.2)), b * (1 + within(0.2))
    x0, y0 = x0 + within(0.04), y0 + within(0.04)
    angle = torch.deg2rad(degrees) + math.radians(15) * within(1)
    c, s = torch.cos(angle), torch.sin(angle)
    u = ((across - x0) * c + (along - y0) * s) / a
    v = ((along - y0) * c - (across - x0) * s) / b
    cover = _cover(u, v, a, b, size)
    return (value * cover).sum(1).clamp(0, 1)


@takes_numpy
def random_ellipses(
    n: int,
    size: int,
    generator: torch.Generator | None = None,
    *,
    ellipses: int = 16,
    texture: float = 0.0,
) -> Tensor:
    """Draw bodies with organs: one large ellipse, with smaller ones of random contrast painted over it.

    Args:
        n: How many images.
        size: Rows and columns.
        generator: Source of the random numbers; the same seed gives the same images.
        ellipses: Ellipses in each image, the body included.
        texture: Amplitude of the smooth random variation laid over the body, 0 for none.

    Returns:
        Shape ``(n, size, size)``, float32, values in [0, 1], 0 outside the body.

    Example:
        >>> import torch
        >>> random_ellipses(3, 32, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 32, 32])
    """
    if ellipses < 1:
        raise ValueError(f"random_ellipses: ellipses must be at least 1, got {ellipses}")

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, ellipses, 1, 1, generator=generator)

    x, y = (axis.float() for axis in _grid(size))
    angle = uniform(0, math.pi)
    small = torch.exp(uniform(math.log(0.015), math.log(0.35)))
    a, b = small, small * torch.exp(uniform(-1, 1))
    radius, phase = 0.75 * uniform(0, 1).sqrt(), uniform(0, 2 * math.pi)
    x0, y0 = radius * torch.cos(phase), radius * torch.sin(phase)
    value = uniform(0, 1)
    # The body: nearly centred, large, of middle brightness.
    a[:, 0], b[:, 0] = uniform(0.7, 1.1)[:, 0], uniform(0.6, 1.0)[:, 0]
    x0[:, 0], y0[:, 0] = 0.2 * x0[:, 0], 0.2 * y0[:, 0]
    value[:, 0] = 0.3 + 0.4 * value[:, 0]
    c, s = torch.cos(angle), torch.sin(angle)
    u = ((x - x0) * c + (y - y0) * s) / a
    v = ((y - y0) * c - (x - x0) * s) / b
    cover = _cover(u, v, a, b, size)
    image = torch.zeros(n, size, size)
    for k in range(ellipses):
        image = image + cover[:, k] * (value[:, k] - image)
    if texture:
        for cells in (size // 16 + 2, size // 2 + 2):
            image = image + texture * _smooth_noise(n, (size, size), cells, generator)
    return (image * cover[:, 0]).clamp(0, 1)


@takes_numpy
def smooth_phase(
    n: int,
    shape: tuple[int, int],
    generator: torch.Generator | None = None,
    *,
    amplitude: float = 1.0,
    cells: int = 3,
) -> Tensor:
    """Draw phases that vary slowly over the image, as of an MR image, around a random constant.

    Args:
        n: How many.
        shape: Rows and columns ``(H, W)``.
        generator: Source of the random numbers; the same seed gives the same phases.
        amplitude: Standard deviation of the variation, in radians.
        cells: Independent values along each side, between which the phase is interpolated.

    Returns:
        Shape ``(n, H, W)``, float32, in radians, not wrapped.

    Raises:
        ValueError: For an argument out of range.

    Example:
        >>> import torch
        >>> phase = smooth_phase(2, (32, 48), torch.Generator().manual_seed(0))
        >>> phase.shape, bool(phase.diff(dim=1).abs().max() < 0.4)
        (torch.Size([2, 32, 48]), True)
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"smooth_phase: shape must be (H, W), both at least 1, got {tuple(shape)}")
    if cells < 1:
        raise ValueError(f"smooth_phase: cells must be at least 1, got {cells}")
    if not (math.isfinite(amplitude) and amplitude >= 0):
        raise ValueError(f"smooth_phase: amplitude must be finite and at least 0, got {amplitude}")
    constant = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    return constant + amplitude * _smooth_noise(n, shape, cells, generator)


@takes_numpy
def brain_like(
    n: int, size: int, generator: torch.Generator | None = None, *, texture: float = 0.01
) -> Tensor:
    """Draw what a brain looks like in an axial T1-weighted MR slice, of ellipses and folds, with a smooth phase.

    The anatomy is always the same; tilt, sizes and brightnesses, texture and phase vary from image to image.

    Args:
        n: How many images.
        size: Rows and columns.
        generator: Source of the random numbers; the same seed gives the same images.
        texture: Amplitude of the smooth random variation laid over the tissue, 0 for none.

    Returns:
        Shape ``(n, size, size)``, complex64, magnitudes in [0, 1], 0 outside the head.

    Raises:
        ValueError: Where `size` is below 1.

    Example:
        >>> import torch
        >>> image = brain_like(1, 64, torch.Generator().manual_seed(0))
        >>> image.shape, image.dtype, image[0, 0, 0].abs().item()
        (torch.Size([1, 64, 64]), torch.complex64, 0.0)
    """
    x, y = (axis.float() for axis in _grid(size))
    parts = len(BRAIN)

    def vary(spread: float, count: int) -> Tensor:
        return 1 + spread * (2 * torch.rand(n, count, 1, 1, generator=generator) - 1)

    tilt = 0.1 * (vary(1.0, 1)[:, 0] - 1)
    across, along = x * torch.cos(tilt) + y * torch.sin(tilt), y * torch.cos(tilt) - x * torch.sin(tilt)
    length, width = vary(0.04, 1) * vary(0.01, parts), vary(0.04, 1) * vary(0.01, parts)
    brightness = vary(0.06, parts)
    waves = math.pi * vary(1.0, parts)
    image = torch.zeros(n, size, size)
    head = image
    for k, (value, half_x, half_y, x0, y0, degrees, folds, depth) in enumerate(BRAIN):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        a, b = half_x * length[:, k], half_y * width[:, k]
        u = ((across - x0) * c + (along - y0) * s) / a
        v = ((along - y0) * c - (across - x0) * s) / b
        stretch = 1 + depth * torch.sin(folds * torch.atan2(v, u) + waves[:, k])
        cover = _cover(u, v, a, b, size, stretch)
        image = image + cover * (value * brightness[:, k] - image)
        if k == 0:
            head = cover
    if texture:
        for cells in (size // 16 + 2, size // 2 + 2):
            image = image + texture * _smooth_noise(n, (size, size), cells, generator)
    return torch.polar((image * head).clamp(0, 1), smooth_phase(n, (size, size), generator))


def _rotation(angles: Tensor) -> Tensor:
    """Return the rotation (3, 3) of axes z, y, x: by angles[0] within the slices, then out of them by angles[1]."""
    a, b = angles.tolist()
    within = torch.tensor([[1.0, 0, 0], [0, math.cos(a), math.sin(a)], [0, -math.sin(a), math.cos(a)]])
    out_of = torch.tensor([[math.cos(b), 0, math.sin(b)], [0, 1.0, 0], [-math.sin(b), 0, math.cos(b)]])
    return out_of @ within


class _Volume:
    """Voxels into which ellipsoids are painted, in units of half the depth and half the shorter side.

    Args:
        shape: Slices, rows and columns.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = torch.tensor(shape)
        side = min(shape[1:])
        self.extent = torch.tensor([1.0, shape[1] / side, shape[2] / side])
        self.step = 2 * self.extent / self.shape
        self.index = torch.zeros(shape)
        self.absorption = torch.zeros(shape)

    def paint(
        self,
        center: Tensor,
        axes: Tensor,
        rotation: Tensor,
        index: float,
        absorption: float = 0.0,
    ) -> None:
        """Paint an ellipsoid over what is there, its edge one voxel wide.

        Args:
            center: z, y, x.
            axes: Half lengths.
            rotation: From z, y, x to the axes, (3, 3).
            index: Of refraction above the medium, in any unit.
            absorption: Likewise, imaginary part.
        """
        reach = (rotation * axes[:, None]).square().sum(0).sqrt() + self.step
        low = ((center - reach + self.extent) / self.step).floor().long().clamp_min(0)
        high = ((center + reach + self.extent) / self.step).ceil().long().minimum(self.shape)
        if (low >= high).any():
            return
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        to_unit = rotation / axes[:, None]
        lines = [
            (torch.arange(b.start, b.stop) + 0.5) * self.step[k] - self.extent[k] - center[k]
            for k, b in enumerate(box)
        ]
        points = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1) @ to_unit.T
        norm = torch.linalg.vector_norm(points, dim=-1)
        # The distance to the ellipsoid, to first order, in voxels.
        slope = torch.linalg.vector_norm(points @ (to_unit * self.step), dim=-1) / norm.clamp_min(1e-6)
        cover = (0.5 - (norm - 1) / slope.clamp_min(1e-6)).clamp(0, 1)
        for values, value in ((self.index, index), (self.absorption, absorption)):
            values[box] += cover * (value - values[box])


def _paint_cell(volume: _Volume, generator: torch.Generator | None) -> None:
    """Paint a cell: membrane, plasm, nucleus with nucleolus, vacuoles and granules; the index at most 1."""

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator)

    def number(low: float, high: float) -> float:
        return float(uniform(low, high, 1))

    axes = torch.cat((uniform(0.25, 0.55, 1), uniform(0.2, 0.42, 2)))
    rotation = _rotation(torch.cat((uniform(0, math.pi, 1), uniform(-0.3, 0.3, 1))))
    reach = (rotation * axes[:, None]).square().sum(0).sqrt()
    center = (2 * uniform(0, 1, 3) - 1) * (0.95 * volume.extent - reach).clamp_min(0)
    dense = number(0.6, 1.0)
    volume.paint(center, axes, rotation, 0.9 * dense)
    inner = 0.93 * axes
    volume.paint(center, inner, rotation, number(0.5, 0.65) * dense)

    def place(share: float, around: Tensor, within: Tensor) -> Tensor:
        """Return a point of the ellipsoid `within`, shrunk by a factor, around a point."""
        direction = torch.randn(3, generator=generator)
        radius = share * number(0, 1) ** (1 / 3)
        point: Tensor = around + (direction / direction.norm() * radius * within) @ rotation
        return point

    nucleus = inner * uniform(0.35, 0.5, 3)
    where = place(0.45, center, inner)
    volume.paint(where, nucleus, rotation, 0.4 * dense)
    volume.paint(place(0.5, where, nucleus), nucleus * uniform(0.25, 0.4, 3), rotation, dense)
    for _ in range(int(number(2, 5))):
        size = inner * number(0.08, 0.2)
        volume.paint(place(0.75, center, inner), size, rotation, number(0.05, 0.25) * dense)
    for _ in range(int(number(6, 14))):
        pigment = number(-1, 1)
        size = inner * number(0.04, 0.1)
        volume.paint(place(0.85, center, inner), size, rotation, number(0.8, 1.0) * dense, max(pigment, 0.0))


@takes_numpy
def cell_like(
    n: int,
    shape: tuple[int, int, int],
    generator: torch.Generator | None = None,
    *,
    cells: int = 4,
    medium_index: float = 1.33,
    index_contrast: float = 0.03,
    absorption: float = 1e-3,
) -> Tensor:
    r"""Draw the permittivity contrast of biological cells in a medium, as intensity diffraction tomography sees it.

    .. math:: \varepsilon = (n_0 + \delta + i \kappa)^2 - n_0^2

    A cell is an ellipsoid with a denser membrane, a nucleus lighter than the plasm around it and a dense nucleolus
    in it, light vacuoles and dense granules, of which some absorb. Cells lie at all depths and may overlap; later
    ones hide earlier ones. Edges are one voxel wide. Lengths across go with the shorter side, lengths along the light
    with the depth of the volume.

    Args:
        n: How many volumes.
        shape: Slices, rows and columns ``(Z, H, W)``.
        generator: Source of the random numbers; the same seed gives the same volumes.
        cells: Cells in each volume.
        medium_index: Refractive index of the medium :math:`n_0`.
        index_contrast: Largest :math:`\delta`, which is never negative.
        absorption: Largest :math:`\kappa`, that of the darkest granules.

    Returns:
        Shape ``(n, Z, H, W)``, complex64, no unit, 0 in the medium.

    Raises:
        ValueError: For an argument out of range.

    Example:
        >>> import torch
        >>> contrast = cell_like(2, (8, 32, 48), torch.Generator().manual_seed(0))
        >>> contrast.shape, contrast[0, :, 0].abs().max().item()
        (torch.Size([2, 8, 32, 48]), 0.0)

    References:
        Schürmann et al., "Cell nuclei have lower refractive index and mass density than cytoplasm",
        J. Biophotonics 9 (2016).
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"cell_like: shape must be (Z, H, W), all at least 1, got {tuple(shape)}")
    if cells < 0:
        raise ValueError(f"cell_like: cells must be at least 0, got {cells}")
    if not (math.isfinite(medium_index) and medium_index > 0):
        raise ValueError(f"cell_like: medium_index must be a finite number above 0, got {medium_index}")
    for name, value in (("index_contrast", index_contrast), ("absorption", absorption)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"cell_like: {name} must be finite and at least 0, got {value}")
    contrast = torch.zeros(n, *shape, dtype=torch.complex64)
    for k in range(n):
        volume = _Volume(shape)
        for _ in range(cells):
            _paint_cell(volume, generator)
        delta, kappa = index_contrast * volume.index, absorption * volume.absorption
        # Without the difference of two squares near 1, which would cost digits.
        contrast[k] = torch.complex(
            (2 * medium_index + delta) * delta - kappa**2, 2 * kappa * (medium_index + delta)
        )
    return contrast


@takes_numpy
def patches(image: Tensor, size: int, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Cut random patches, each in one of its 8 orientations.

    Args:
        image: Shape ``(H, W)``.
        size: Rows and columns of a patch.
        n: How many.
        generator: Source of the random numbers.

    Returns:
        Shape ``(n, size, size)``, dtype of `image`.

    Raises:
        ValueError: Where the image has other than two dimensions or is smaller than a patch.
    """
    if image.ndim != 2 or min(image.shape) < size or size < 1:
        raise ValueError(f"patches: image must be (H, W), both at least {size}, got {tuple(image.shape)}")

    def draw(high: int) -> list[int]:
        return torch.randint(high, (n,), generator=generator).tolist()

    rows, columns = draw(image.shape[0] - size + 1), draw(image.shape[1] - size + 1)
    cut = []
    for i, j, turns, flip in zip(rows, columns, draw(4), draw(2), strict=True):
        patch = torch.rot90(image[i : i + size, j : j + size], turns)
        cut.append(patch.flip(1) if flip else patch)
    return torch.stack(cut) if cut else image.new_empty(0, size, size)
