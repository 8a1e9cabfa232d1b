"""Find the axis of rotation of a parallel-beam scan in its sinograms."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._numpy import takes_numpy
from .files import first_bad

Method = Literal["auto", "opposite", "moments"]
Values = NDArray[np.float64]

SAME = 1e-6
"""Views that differ less, in radians, are of one direction."""

NEAR = 3.0
"""Three neighbouring views are compared where they span at most this many usual steps."""

WIDEST = math.radians(15)
"""Largest usual step of views that are compared."""

BLUR = 1.0
"""Standard deviation, in bins, of the Gaussian that views are smoothed by at least."""

MOTION = 0.5
"""The same, relative to what the edge of the field moves by along a view between two views."""

LEAST_OVERLAP = 0.2
"""Share of the bins that a view and a mirrored one must have in common."""

LEAST_BINS = 8

MOST_LINES = 512
"""Comparisons times rows that count, spread evenly: more add memory, and little else."""

SPAN = math.radians(90)
"""What views must span at least for moments."""

MARGIN = 0.02
"""Share of the bins at each edge of a view that is air where the object is whole."""

AIR = 0.1
"""What is there of the largest mean over views of a bin, at most."""


class RotationAxis(NamedTuple):
    """Where the axis of rotation meets the detector.

    Attributes:
        bin: Its position in bins; the middle of the first bin is 0.
        method: ``"opposite"`` or ``"moments"``, see `find_rotation_axis`.
        comparisons: Of opposite views; 0 for moments.
    """

    bin: float
    method: str
    comparisons: int


@takes_numpy
def find_rotation_axis(sinograms: Tensor, angles: Tensor, *, method: Method = "auto") -> RotationAxis:
    r"""Find the axis of rotation of a parallel-beam scan.

    Views half a turn apart are mirror images about the axis: with the axis at bin `c`,

    .. math:: p(\theta + \pi, d) = p(\theta, 2c - d)

    ``"opposite"`` looks for the `c` that makes them agree where they overlap, up to a constant. Each view is compared
    with what its two neighbours in angle give for its angle, on a line; of the three, some are mirrored. So a scan need
    not have a view at exactly 180 degrees: one that ends a step before is enough. The object may reach beyond the
    detector. All rows and comparisons count together, by least squares.

    ``"moments"`` needs no opposite views. The centre of mass of a whole object moves on
    :math:`c + a \cos\theta + b \sin\theta`, which is fitted. No part of the object may leave the detector, and both
    ends of it must see air: their mean is subtracted as the background.

    ``"auto"`` takes opposite views where there are some, else moments. The result says which.

    Accuracy on simulated ellipses, 256 x 256, with noise of 2 % of the open beam and the axis up to 32 bins from the
    middle, as the median and the most of 12 scans, in bins:

    - opposite views, 24 to 181 views over 180 degrees: 0.02 to 0.07, at most 0.3; where the object reaches beyond the
      detector 0.1 to 0.4, at most 1.4;
    - the same over 360 degrees: 0.01, at most 0.03; 0.02, at most 0.1;
    - moments over 90 to 150 degrees: 0.02 to 0.12, at most 0.3.

    Angles that are wrong move the axis. In a real scan of 181 views whose angles are one degree short of the half turn
    that it made, by a third of a bin.

    Args:
        sinograms: Shape ``(V, D)`` or ``(R, V, D)`` for several rows of one scan; real.
        angles: Of the views, shape ``(V,)``, radians, in any order.
        method: ``"auto"``, ``"opposite"`` or ``"moments"``.

    Returns:
        The axis. ``ParallelBeamCT`` takes it as ``bin_offset = ((D - 1) / 2 - axis.bin) * bin_spacing``.

    Raises:
        TypeError: For a complex sinogram or whole numbers.
        ValueError: For shapes that do not fit, NaN or Inf, an unknown method; where neither method can be used.

    Example:
        >>> import torch
        >>> from oder_fast import ParallelBeamCT
        >>> x = torch.zeros(1, 64, 64)
        >>> x[:, 20:40, 30:50] = 1
        >>> ct = ParallelBeamCT(64, angles=90, n_bins=101, bin_offset=-4.5)  # the axis is at bin 54.5
        >>> round(find_rotation_axis(ct(x), ct.angles).bin, 1)
        54.5

    References:
        Vo, Drakopoulos, Atwood, Reinhard, "Reliable method for calculating the center of rotation in parallel-beam
        tomography", Opt. Express 22 (2014), reviews such methods.
    """
    p, theta = _checked(sinograms, angles, method)
    if method != "moments":
        found = _opposite(p, theta)
        if found is not None:
            return found
        if method == "opposite":
            raise ValueError(
                f"find_rotation_axis: {_span(theta)}, so none of its {len(theta)} views has an opposite one; "
                "take moments, or give the axis"
            )
    return _moments(p, theta)


def _checked(sinograms: Tensor, angles: Tensor, method: str) -> tuple[Values, Values]:
    name = "find_rotation_axis"
    if method not in get_args(Method):
        raise ValueError(f"{name}: method must be one of {get_args(Method)}, got {method!r}")
    for what, values in (("sinograms", sinograms), ("angles", angles)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{name}: {what} must be a torch.Tensor, got {type(values).__name__}")
    if not sinograms.is_floating_point():
        raise TypeError(f"{name}: sinograms must be of real numbers, got {sinograms.dtype}")
    if sinograms.ndim not in (2, 3) or 0 in sinograms.shape:
        raise ValueError(
            f"{name}: sinograms must have the shape (V, D) or (R, V, D), got {tuple(sinograms.shape)}"
        )
    if tuple(angles.shape) != (sinograms.shape[-2],):
        raise ValueError(
            f"{name}: angles must have the shape ({sinograms.shape[-2]},), one for each view, got "
            f"{tuple(angles.shape)}"
        )
    if sinograms.shape[-1] < LEAST_BINS:
        raise ValueError(f"{name}: sinograms must have at least {LEAST_BINS} bins, got {sinograms.shape[-1]}")
    for what, values in (("sinograms", sinograms), ("angles", angles)):
        bad = first_bad(values)
        if bad is not None:
            raise ValueError(f"{name}: value {bad} of {what} is {values[bad].item()}")
    p = sinograms.detach().cpu().to(torch.float64).numpy()
    return p.reshape(-1, *p.shape[-2:]), angles.detach().cpu().to(torch.float64).numpy()


def _span(theta: Values) -> str:
    return f"the views span {math.degrees(float(np.ptp(theta))):.4g} degrees"


class _Comparison(NamedTuple):
    """A view as it was measured and its neighbours, of three with mirrored ones among them.

    Attributes:
        views: Indices of the three.
        mirrored: Which of them are.
        weights: With which their sum should be 0.
    """

    views: list[int]
    mirrored: list[bool]
    weights: list[float]


def _comparisons(theta: Values) -> tuple[list[_Comparison], float]:
    """Return what can be compared, and the usual step of the views' angles."""
    turn, n = 2 * math.pi, len(theta)
    # Exactly opposite views stand side by side, whatever the rounding.
    angle = np.round(np.concatenate([theta, theta + math.pi]) % turn / SAME) * SAME % turn
    mirrored = np.arange(2 * n) >= n
    order = np.lexsort((mirrored, angle))
    angle, mirrored, view = angle[order], mirrored[order], order % n
    steps = np.diff(np.unique(np.round(theta % turn / SAME) * SAME))
    step = float(np.median(steps)) if len(steps) else math.inf
    if step > WIDEST:
        return [], step
    found = []
    for b in range(2 * n):
        three = [b - 1, b, (b + 1) % (2 * n)]
        if len({bool(mirrored[k]) for k in three}) == 1:
            continue
        before, after = (float((angle[i] - angle[j]) % turn) for i, j in zip(three[1:], three, strict=False))
        span = before + after
        share = before / span if span > SAME / 2 else 0.0
        # A neighbour of the same direction is all that is needed.
        if min(before, after) > SAME / 2 and span > NEAR * step:
            continue
        weights = [share - 1, 1.0, -share]
        if {bool(mirrored[k]) for k, w in zip(three, weights, strict=True) if w} == {False, True}:
            found.append(
                _Comparison([int(view[k]) for k in three], [bool(mirrored[k]) for k in three], weights)
            )
    return found, step


def _opposite(p: Values, theta: Values) -> RotationAxis | None:
    from scipy import interpolate, ndimage, optimize, signal

    compared, step = _comparisons(theta)
    if not compared:
        return None
    count = max(1, min(len(compared), MOST_LINES // len(p)))
    compared = [compared[k * len(compared) // count] for k in range(count)]
    bins = p.shape[-1]
    sigma = min(max(BLUR, MOTION * step * bins / 2), bins / 16)
    # What was filled in beyond the edges is left out.
    cut = math.ceil(sigma)
    smooth = ndimage.gaussian_filter1d(p, sigma, -1, mode="nearest")[..., cut : bins - cut]
    n = smooth.shape[-1]

    def sums(which: bool) -> Values:
        return np.concatenate(
            [sum(w * smooth[:, v] for v, m, w in zip(*one, strict=True) if m is which) for one in compared]
        )

    # With the axis at k / 2, direct[d] = mirrored[k - d]. Of k, all whole numbers first.
    direct, mirrored = sums(False), -sums(True)
    k = np.arange(2 * n - 1)
    overlap = np.minimum(k, 2 * n - 2 - k) + 1
    ones = np.ones((1, n))
    means = [signal.fftconvolve(values, ones, axes=-1) for values in (direct, mirrored)]
    energy = np.convolve(np.square(direct).sum(0) + np.square(mirrored).sum(0), ones[0])
    error = energy - 2 * signal.fftconvolve(direct, mirrored, axes=-1).sum(0)
    error -= np.square(means[0] - means[1]).sum(0) / overlap
    energy -= (np.square(means[0]).sum(0) + np.square(means[1]).sum(0)) / overlap
    seen = (overlap >= LEAST_OVERLAP * n) & (energy > 1e-9 * energy.max())
    if not seen.any() or energy.max() <= 1e-12 * np.square(smooth).sum():
        raise ValueError("find_rotation_axis: the views are constant, there is nothing to find the axis by")
    start = int(k[seen][np.argmin(error[seen] / energy[seen])])

    # Then between them, on the same bins throughout.
    reach = 3
    d = np.arange(max(0, start + reach - (n - 1)), min(n - 1, start - reach) + 1)
    spline = interpolate.CubicSpline(np.arange(n), mirrored, axis=-1)
    fixed = direct[:, d] - direct[:, d].mean(1, keepdims=True)

    def disagreement(twice: float) -> float:
        values = spline(twice - d)
        values -= values.mean(1, keepdims=True)
        return float(np.square(fixed - values).sum() / (np.square(fixed).sum() + np.square(values).sum()))

    best: Any = optimize.minimize_scalar(
        disagreement, bounds=(start - reach, start + reach), method="bounded", options={"xatol": 1e-3}
    )
    return RotationAxis(float(best.x) / 2 + cut, "opposite", len(compared))


def _moments(p: Values, theta: Values) -> RotationAxis:
    rows, views, bins = p.shape
    turned = np.sort(theta % (2 * math.pi))
    # What a gap leaves of the circle.
    covered = 2 * math.pi - float(np.diff(turned, append=turned[0] + 2 * math.pi).max())
    if views < 4 or covered < SPAN:
        raise ValueError(
            f"find_rotation_axis: {_span(theta)}: moments need {math.degrees(SPAN):.0f} degrees and 4 views, and "
            "opposite views there are none; give the axis"
        )
    margin = max(1, round(MARGIN * bins))
    ends = np.concatenate([p[..., :margin], p[..., -margin:]], -1)
    background = ends.mean(-1, keepdims=True)
    mean = (p - background).mean(1)
    largest, outside = mean.max(), (ends - background).mean(1)
    if not largest > 0 or np.abs(outside).max() > AIR * largest:
        raise ValueError(
            f"find_rotation_axis: {_span(theta)}, so there are no opposite views, and the object leaves the field of "
            "view, so that moments are wrong; give the axis"
        )
    d = np.arange(bins) - (bins - 1) / 2
    mass, first = (p - background).sum(-1), ((p - background) * d).sum(-1)
    # Of each row: first = mass c + a cos + b sin, with one c.
    columns = np.zeros((rows, views, 1 + 2 * rows))
    columns[..., 0] = mass / mass.mean()
    for r in range(rows):
        columns[r, :, 1 + 2 * r], columns[r, :, 2 + 2 * r] = np.cos(theta), np.sin(theta)
    fit = np.linalg.lstsq(columns.reshape(rows * views, -1), first.reshape(-1) / mass.mean(), rcond=None)[0]
    return RotationAxis(float(fit[0]) + (bins - 1) / 2, "moments", 0)
