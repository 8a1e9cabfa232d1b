"""Sampling masks of Cartesian k-space, with the zero frequency in the centre (index ``n // 2``)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._numpy import takes_numpy

GOLDEN_ANGLE = math.pi * (math.sqrt(5) - 1) / 2
"""Angle between successive spokes, pi over the golden ratio (111.246 degrees), in radians."""


def _uniform(n: int, generator: torch.Generator | None) -> Tensor:
    """Return n numbers in [0, 1), float64, in the memory of the CPU."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(n, generator=generator, dtype=torch.float64, device=device).cpu()


def _check_acceleration(name: str, acceleration: float) -> None:
    if not (math.isfinite(acceleration) and acceleration >= 1):
        raise ValueError(f"{name}: acceleration must be finite and at least 1, got {acceleration}")


def _check_size(name: str, shape: tuple[int, int]) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name}: shape must be (H, W), both at least 1, got {tuple(shape)}")


def _center(n: int, width: int) -> slice:
    start = n // 2 - width // 2
    return slice(start, start + width)


def _center_lines(name: str, n: int, acceleration: float, center_fraction: float) -> int:
    """Check the arguments that line masks share; return the number of fully sampled lines in the centre."""
    if n < 1:
        raise ValueError(f"{name}: n must be at least 1, got {n}")
    _check_acceleration(name, acceleration)
    if not 0 <= center_fraction <= 1:
        raise ValueError(f"{name}: center_fraction must be in 0..1, got {center_fraction}")
    lines = round(n * center_fraction)
    if lines > n / acceleration:
        raise ValueError(
            f"{name}: center_fraction {center_fraction} takes {lines} lines, more than the "
            f"{n / acceleration:.4g} that acceleration {acceleration} leaves of n = {n}"
        )
    return lines


@takes_numpy
def random_lines(
    n: int, acceleration: float, center_fraction: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""Sample the centre fully and every other line with one probability, as in the fastMRI challenge.

    .. math:: l = \mathrm{round}(n f), \qquad p = \frac{n / a - l}{n - l}

    so that :math:`l + (n - l) p = n / a` lines are expected for the acceleration :math:`a` and the centre
    fraction :math:`f`; the number drawn varies around it, and is never 0.

    Args:
        n: Lines along the phase encoding.
        acceleration: All lines over the sampled ones, in expectation; at least 1.
        center_fraction: Share of the `n` lines that is sampled fully in the centre, in 0..1.
        generator: Source of the random numbers; the same seed gives the same mask.

    Returns:
        Sampling mask, shape ``(n,)``, bool.

    Raises:
        ValueError: For an argument out of range, or a centre with more lines than the acceleration leaves.

    Example:
        >>> import torch
        >>> mask = random_lines(320, 4, 0.08, torch.Generator().manual_seed(0))
        >>> mask[147:173].all().item()
        True

    References:
        Zbontar et al., "fastMRI: an open dataset and benchmarks for accelerated MRI", arXiv:1811.08839 (2018).
    """
    lines = _center_lines("random_lines", n, acceleration, center_fraction)
    probability = (n / acceleration - lines) / (n - lines) if lines < n else 1.0
    mask = _uniform(n, generator) < probability
    mask[_center(n, lines)] = True
    if not mask.any():
        mask[n // 2] = True
    return mask


@takes_numpy
def equispaced_lines(
    n: int,
    acceleration: float,
    center_fraction: float,
    generator: torch.Generator | None = None,
    *,
    offset: int | None = None,
) -> Tensor:
    r"""Sample the centre fully and the rest at an even spacing, as in the fastMRI challenge.

    .. math:: k_m = \mathrm{round}(o + m a'), \qquad a' = \frac{a (n - l)}{n - a l}, \qquad
        l = \mathrm{round}(n f)

    The spacing :math:`a'` is wider than the acceleration :math:`a` by what the centre costs, so that
    :math:`n / a` lines are sampled, but for the rounding at the ends and next to the centre.

    Args:
        n: Lines along the phase encoding.
        acceleration: All lines over the sampled ones; at least 1.
        center_fraction: Share of the `n` lines that is sampled fully in the centre, in 0..1.
        generator: Source of the random offset; not used where `offset` is given.
        offset: First line :math:`o`, in 0..round(a') - 1; drawn evenly from these where None.

    Returns:
        Sampling mask, shape ``(n,)``, bool.

    Raises:
        ValueError: For an argument out of range, or a centre with more lines than the acceleration leaves.

    Example:
        >>> equispaced_lines(12, 4, 0.0, offset=1).nonzero().flatten().tolist()
        [1, 5, 9]

    References:
        Muckley et al., "Results of the 2020 fastMRI challenge for machine learning MR image reconstruction",
        IEEE Trans. Medical Imaging 40 (2021).
    """
    lines = _center_lines("equispaced_lines", n, acceleration, center_fraction)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[_center(n, lines)] = True
    budget = n - acceleration * lines
    if budget <= 0 or lines == n:
        return mask
    spacing = acceleration * (n - lines) / budget
    choices = max(1, min(n, round(spacing)))
    if offset is None:
        offset = min(int(_uniform(1, generator).item() * choices), choices - 1)
    elif not 0 <= offset < choices:
        raise ValueError(
            f"equispaced_lines: offset must be in 0..{choices - 1} at spacing {spacing:.4g}, got {offset}"
        )
    positions = (offset + spacing * torch.arange(math.ceil(n / spacing), dtype=torch.float64)).round().long()
    mask[positions[positions < n]] = True
    return mask


@takes_numpy
def gaussian_lines(
    n: int,
    acceleration: float,
    center_fraction: float,
    generator: torch.Generator | None = None,
    *,
    width: float = 1 / 6,
) -> Tensor:
    r"""Sample the centre fully and draw the other lines with a Gaussian density, without repetition.

    .. math:: P(k) \propto \exp\left( -\frac{(k - \lfloor n / 2 \rfloor)^2}{2 (w n)^2} \right)

    Args:
        n: Lines along the phase encoding.
        acceleration: All lines over the sampled ones; ``round(n / acceleration)`` lines are sampled, exactly.
        center_fraction: Share of the `n` lines that is sampled fully in the centre, in 0..1.
        generator: Source of the random numbers; the same seed gives the same mask.
        width: Standard deviation :math:`w` of the density, as a share of `n`; above 0.

    Returns:
        Sampling mask, shape ``(n,)``, bool.

    Raises:
        ValueError: For an argument out of range, or a centre with more lines than the acceleration leaves.

    Example:
        >>> import torch
        >>> gaussian_lines(320, 8, 0.04, torch.Generator().manual_seed(0)).sum().item()
        40
    """
    lines = _center_lines("gaussian_lines", n, acceleration, center_fraction)
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"gaussian_lines: width must be finite and above 0, got {width}")
    distance = (torch.arange(n, dtype=torch.float64) - n // 2) / (width * n)
    # The largest of log-weights plus Gumbel noise are draws without repetition, without underflow.
    gumbel = -(-_uniform(n, generator).clamp_min(1e-300).log()).clamp_min(1e-300).log()
    score = gumbel - distance.square() / 2
    score[_center(n, lines)] = math.inf
    mask = torch.zeros(n, dtype=torch.bool)
    mask[score.topk(max(lines, round(n / acceleration))).indices] = True
    return mask


def _throw_darts(order: NDArray[np.int64], reach: NDArray[np.int64], taken: NDArray[np.bool_]) -> list[int]:
    """Accept points in the given order unless an accepted one blocks them.

    Args:
        order: Flat indices of the points, shape ``(H * W,)``.
        reach: Squared distance, in pixels, below which a point blocks others, shape ``(H, W)``.
        taken: Points that are blocked from the start, shape ``(H, W)``.

    Returns:
        Flat indices of the accepted points.
    """
    height, width = reach.shape
    margin = math.isqrt(int(reach.max()))
    stride = width + 2 * margin
    blocked = np.ones((height + 2 * margin, stride), dtype=np.bool_)
    inside = (slice(margin, margin + height), slice(margin, margin + width))
    blocked[inside] = taken
    flat = blocked.reshape(-1)
    discs = {}
    for squared in np.unique(reach).tolist():
        radius = math.isqrt(max(squared - 1, 0))
        dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        near = dy**2 + dx**2 < max(squared, 1)
        discs[squared] = dy[near] * stride + dx[near]
    rows, columns = np.divmod(order, width)
    padded = ((rows + margin) * stride + columns + margin).tolist()
    squares = reach.reshape(-1)[order].tolist()
    accepted = []
    for index, point, squared in zip(order.tolist(), padded, squares, strict=True):
        if not flat[point]:
            accepted.append(index)
            flat[discs[squared] + point] = True
    return accepted


@takes_numpy
def poisson_disc(
    shape: tuple[int, int],
    acceleration: float,
    center: int | tuple[int, int] = 0,
    generator: torch.Generator | None = None,
    *,
    falloff: float = 2.0,
    tolerance: float = 0.03,
) -> Tensor:
    r"""Draw a variable density Poisson disc: random samples that keep a distance to each other.

    .. math:: \| k - k' \|^2 \ge \min(r(k)^2, r(k')^2) - 1, \qquad r(k) = s (1 + f \rho(k))

    in samples, with :math:`\rho` the distance to the zero frequency (1 at the middle of an edge); squared
    distances are rounded at random, up or down.
    The scale :math:`s` is found by bisection so that the acceleration is met from below within `tolerance`;
    samples in excess are then dropped evenly, which keeps the distances.

    Args:
        shape: Rows and columns ``(H, W)``, both of them phase encodings.
        acceleration: All samples over the sampled ones; at least 1.
        center: Rows and columns (or one number for both) sampled fully in the centre.
        generator: Source of the random numbers; the same seed gives the same mask.
        falloff: Growth :math:`f` of the distance towards the edge: the density falls as
            :math:`(1 + f \rho)^{-2}`. 0 gives an even density.
        tolerance: Relative excess of samples at which the bisection stops.

    Returns:
        Sampling mask, shape ``(H, W)``, bool, with ``round(H * W / acceleration)`` samples where the
        bisection comes near enough, which on grids above about 32 by 32 it does.

    Raises:
        ValueError: For an argument out of range, or a centre with more samples than the acceleration leaves.

    Example:
        >>> import torch
        >>> mask = poisson_disc((64, 64), 4, 8, torch.Generator().manual_seed(0))
        >>> mask.sum().item(), mask[28:36, 28:36].all().item()
        (1024, True)

    References:
        Bridson, "Fast Poisson disk sampling in arbitrary dimensions", SIGGRAPH Sketches (2007).
        Lustig, Pauly, "SPIRiT: iterative self-consistent parallel imaging reconstruction from arbitrary
        k-space", Magn. Reson. Med. 64 (2010).
    """
    name = "poisson_disc"
    _check_size(name, shape)
    _check_acceleration(name, acceleration)
    height, width = shape
    rows, columns = (center, center) if isinstance(center, int) else center
    if not (0 <= rows <= height and 0 <= columns <= width):
        raise ValueError(f"{name}: center must lie in 0..{height} by 0..{width}, got {rows} by {columns}")
    if not (math.isfinite(falloff) and falloff >= 0):
        raise ValueError(f"{name}: falloff must be finite and at least 0, got {falloff}")
    if not 0 < tolerance < 1:
        raise ValueError(f"{name}: tolerance must be above 0 and below 1, got {tolerance}")
    target = round(height * width / acceleration)
    full = np.zeros(shape, dtype=np.bool_)
    full[_center(height, rows), _center(width, columns)] = True
    if rows * columns > target:
        raise ValueError(
            f"{name}: center {rows} by {columns} takes {rows * columns} samples, more than the {target} "
            f"that acceleration {acceleration} leaves of {height} by {width}"
        )
    wanted = target - rows * columns
    if wanted == 0:
        return torch.from_numpy(full)
    order = _uniform(height * width, generator).argsort().numpy()
    keep = _uniform(height * width, generator).argsort().numpy()
    # Squared distances are whole numbers: rounding them at random lets the density follow the scale smoothly.
    dither = _uniform(height * width, generator).reshape(height, width).numpy()
    y = (np.arange(height) - height // 2)[:, None] / (height / 2)
    x = (np.arange(width) - width // 2)[None, :] / (width / 2)
    growth = 1 + falloff * np.hypot(y, x)
    # Where no distance exceeds 1 every sample is accepted: `best` always holds enough of them.
    best = order[~full.reshape(-1)[order]].tolist()
    low, high = 1 / float(growth.max()), float(math.hypot(height, width))
    # A disc of radius r accepts about one sample in 0.7 r^2.
    scale = math.sqrt(acceleration * float(np.mean(growth**-2.0)) / 0.7)
    for _ in range(24):
        if len(best) <= (1 + tolerance) * wanted:
            break
        accepted = _throw_darts(order, np.floor((scale * growth) ** 2 + dither).astype(np.int64), full)
        if len(accepted) >= wanted:
            low, best = scale, accepted
        else:
            high = scale
        guess = scale * math.sqrt(max(len(accepted), 1) / max((1 + tolerance / 2) * wanted, 1))
        if low < guess < high:
            scale = guess
        else:
            scale = (low + high) / 2
    mask = full.reshape(-1).copy()
    chosen = np.zeros(height * width, dtype=np.bool_)
    chosen[best] = True
    mask[keep[chosen[keep]][:wanted]] = True
    return torch.from_numpy(mask.reshape(shape))


@takes_numpy
def radial(
    shape: tuple[int, int], n_spokes: int, *, golden_angle: bool = True, first_angle: float = 0.0
) -> Tensor:
    r"""Mark the samples of a Cartesian grid that lie on straight spokes through the zero frequency.

    .. math:: \theta_m = \theta_0 + m \, \pi / \varphi \quad \text{(golden angle)} \qquad \text{or} \qquad
        \theta_m = \theta_0 + m \, \pi / n

    A spoke takes one sample in each column (or row, where it is the steeper) from edge to edge.

    Args:
        shape: Rows and columns ``(H, W)``.
        n_spokes: How many spokes; at least 1.
        golden_angle: Whether successive spokes are the golden angle (111.246 degrees) apart, in place of
            an even spacing over 180 degrees.
        first_angle: Angle of the first spoke in radians: from the direction of growing columns towards
            that of falling rows.

    Returns:
        Sampling mask, shape ``(H, W)``, bool.

    Raises:
        ValueError: For an argument out of range.

    Example:
        >>> radial((4, 4), 2, golden_angle=False).int()
        tensor([[0, 0, 1, 0],
                [0, 0, 1, 0],
                [1, 1, 1, 1],
                [0, 0, 1, 0]], dtype=torch.int32)

    References:
        Winkelmann et al., "An optimal radial profile order based on the golden ratio for time-resolved MRI",
        IEEE Trans. Medical Imaging 26 (2007).
    """
    _check_size("radial", shape)
    if n_spokes < 1:
        raise ValueError(f"radial: n_spokes must be at least 1, got {n_spokes}")
    if not math.isfinite(first_angle):
        raise ValueError(f"radial: first_angle must be finite, got {first_angle}")
    height, width = shape
    step = GOLDEN_ANGLE if golden_angle else math.pi / n_spokes
    angles = first_angle + step * torch.arange(n_spokes, dtype=torch.float64)[:, None]
    right, down = torch.cos(angles), -torch.sin(angles)
    longest = torch.maximum(right.abs(), down.abs())
    reach = max(height, width)
    t = torch.arange(-reach, reach + 1, dtype=torch.float64)
    i = (t * (down / longest)).round().long() + height // 2
    j = (t * (right / longest)).round().long() + width // 2
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[i[inside], j[inside]] = True
    return mask
