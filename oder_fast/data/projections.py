"""Read scans of parallel beams: counts of a detector, which become sinograms with their geometry."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._numpy import takes_numpy
from .files import PathLike, first_bad, is_hdf5, naming
from .hdf5 import dataset, open_hdf5
from .rotation_axis import find_rotation_axis

Average = Literal["mean", "median"]

DATA, FLATS, DARKS, THETA = (f"exchange/{name}" for name in ("data", "data_white", "data_dark", "theta"))

DEGREES = ("deg", "degree", "degrees")
RADIANS = ("rad", "radian", "radians")

TURN = 2 * np.pi + 0.1
"""Angles without a unit that span this or less are as likely radians as degrees."""

SEARCHED = 8
"""Rows that the axis is looked for in, at most."""


class ProjectionFile(NamedTuple):
    """A parallel-beam scan as read from a file.

    Attributes:
        sinograms: Line integrals of the attenuation, shape ``(R, V, D)``: rows of the detector, views, bins; float32.
        angles: Of the views, shape ``(V,)``, float64, radians.
        axis: Where the axis of rotation meets a row, in bins; the middle of the first bin is 0.
        metadata: What was done to get there:

            - ``format``; ``rows``: indices of those read;
            - ``flats``, ``darks``: number of frames averaged; ``average``: how;
            - ``axis_method``: ``"given"``, ``"opposite"`` or ``"moments"``; ``axis_comparisons``: of opposite views;
            - ``interpolated``: bins that were filled in, in whole or in some views, as ``{row: (bin, ...)}``;
            - ``ring_width``: of `remove_rings`, or None.
    """

    sinograms: Tensor
    angles: Tensor
    axis: float
    metadata: dict[str, Any]

    @property
    def geometry(self) -> dict[str, Any]:
        """The scan as arguments of `ParallelBeamCT` (``angles``, ``n_bins``, ``bin_offset``), for bins of width 1."""
        n_bins = self.sinograms.shape[-1]
        return {"angles": self.angles, "n_bins": n_bins, "bin_offset": (n_bins - 1) / 2 - self.axis}


class Normalized(NamedTuple):
    """Sinograms of counts.

    Attributes:
        sinograms: Shape ``(R, V, D)``, float32.
        interpolated: Bins that were filled in, in whole or in some views, as ``{row: (bin, ...)}``.
    """

    sinograms: Tensor
    interpolated: dict[int, tuple[int, ...]]


@takes_numpy
def normalize_projections(
    counts: Tensor,
    flats: Tensor,
    darks: Tensor | None = None,
    *,
    average: Average = "mean",
    interpolate: int = 0,
) -> Normalized:
    r"""Turn the counts of a detector into line integrals of the attenuation.

    .. math:: p = -\log \frac{c - \bar{k}}{\bar{w} - \bar{k}}

    with the frames `w` of the open beam (flats) and `k` without a beam (darks) averaged. Where counts or flats are not
    above the darks there is no logarithm: a bin is dead, or the object opaque. Such bins are refused, unless
    `interpolate` allows some. Then each view is filled in there on a line between the next bins to the left and right
    (beyond the last, with its value), and the result lists them.

    Args:
        counts: Shape ``(V, R, D)``: views, rows of the detector, bins.
        flats: Shape ``(F, R, D)``, or ``(R, D)``.
        darks: Shape ``(K, R, D)``, or ``(R, D)``; None for a detector that counts nothing in the dark.
        average: ``"mean"``, or ``"median"``, which single bright pixels do not change.
        interpolate: Number of bins of a row that may be filled in.

    Returns:
        Sinograms ``(R, V, D)``, and the bins that were filled in.

    Raises:
        TypeError: For complex values or a wrong type of `interpolate`.
        ValueError: For shapes that do not fit, NaN or Inf, and more bins without a logarithm than `interpolate`.

    Example:
        >>> import torch
        >>> flats, darks = torch.full((5, 1, 8), 1100.0), torch.full((5, 1, 8), 100.0)
        >>> counts = 100 + 1000 * torch.exp(torch.tensor(-0.5)).expand(3, 1, 8)
        >>> normalize_projections(counts, flats, darks).sinograms[0, 0, :2]
        tensor([0.5000, 0.5000])
    """
    name = "normalize_projections"
    _check_choices(name, average, interpolate)
    for what, values in (("counts", counts), ("flats", flats), ("darks", darks)):
        if not isinstance(values, Tensor) and not (what == "darks" and values is None):
            raise TypeError(f"{name}: {what} must be a torch.Tensor, got {type(values).__name__}")
    if counts.ndim != 3 or 0 in counts.shape:
        raise ValueError(f"{name}: counts must have the shape (V, R, D), got {tuple(counts.shape)}")
    shape = tuple(counts.shape[1:])
    fields = []
    for what, field in (("flats", flats), ("darks", torch.zeros(shape) if darks is None else darks)):
        if field.ndim not in (2, 3) or tuple(field.shape[-2:]) != shape or len(field) == 0:
            raise ValueError(
                f"{name}: {what} must be frames of {shape[0]} rows and {shape[1]} bins, as counts are, got the "
                f"shape {tuple(field.shape)}"
            )
        fields.append(field.reshape(-1, *shape))
    for what, values in (("counts", counts), ("flats", fields[0]), ("darks", fields[1])):
        if values.is_complex():
            raise TypeError(f"{name}: {what} must be real, got {values.dtype}")
        bad = first_bad(values)
        if bad is not None:
            raise ValueError(f"{name}: value {bad} of {what} is {values[bad].item()}")
    try:
        return _normalized(counts, fields[0], fields[1], average, interpolate, range(shape[0]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _normalized(
    counts: Tensor, flats: Tensor, darks: Tensor, average: Average, interpolate: int, rows: range
) -> Normalized:
    """Do the same with what was checked; `rows` are the numbers by which rows are spoken of."""
    flat, dark = (_averaged(field, average) for field in (flats, darks))
    sinograms = np.empty((counts.shape[1], counts.shape[0], counts.shape[2]), np.float32)
    interpolated = {}
    # Row by row: float64 takes the place of one row alone.
    for r, row in enumerate(rows):
        beam = flat[r] - dark[r]
        light = counts[:, r].detach().cpu().to(torch.float64).numpy() - dark[r]
        good = (light > 0) & (beam > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = -np.log(light / beam)
        filled = np.flatnonzero(~good.all(0))
        if len(filled) > interpolate:
            raise ValueError(_dead(row, filled, good, beam, interpolate))
        if len(filled):
            _fill(p, good, row)
            interpolated[row] = tuple(filled.tolist())
        sinograms[r] = p
    return Normalized(torch.from_numpy(sinograms), interpolated)


def _check_choices(name: str, average: str, interpolate: Any) -> None:
    if average not in get_args(Average):
        raise ValueError(f"{name}: average must be one of {get_args(Average)}, got {average!r}")
    if isinstance(interpolate, bool) or not isinstance(interpolate, int):
        raise TypeError(f"{name}: interpolate must be an int, got {type(interpolate).__name__}")
    if interpolate < 0:
        raise ValueError(f"{name}: interpolate must be at least 0, got {interpolate}")


def _averaged(field: Tensor, average: Average) -> NDArray[np.float64]:
    frames = field.detach().cpu().to(torch.float64).numpy()
    averaged: NDArray[np.float64] = (np.mean if average == "mean" else np.median)(frames, axis=0)
    return averaged


def _dead(
    row: int, filled: NDArray[Any], good: NDArray[np.bool_], beam: NDArray[Any], interpolate: int
) -> str:
    first, views = int(filled[0]), len(good)
    if beam[first] <= 0:
        reason = "its flats are not above its darks"
    else:
        reason = f"its counts are not above its darks in {int((~good[:, first]).sum())} of {views} views"
    return (
        f"{len(filled)} of the {len(beam)} bins of row {row} have no logarithm, {interpolate} may be interpolated; the "
        f"first is bin {first}: {reason}"
    )


def _fill(p: NDArray[np.float64], good: NDArray[np.bool_], row: int) -> None:
    bins = np.arange(p.shape[1])
    for view in np.flatnonzero(~good.all(1)):
        seen = good[view]
        if not seen.any():
            raise ValueError(f"no bin of row {row} has a logarithm in view {view}")
        p[view, ~seen] = np.interp(bins[~seen], bins[seen], p[view, seen])


@takes_numpy
def remove_rings(sinograms: Tensor, width: int = 9) -> Tensor:
    r"""Take the stripes out of sinograms that bins of unequal gain leave, and that become rings in images.

    .. math:: p_{v,d} \leftarrow p_{v,d} - (m_d - \tilde{m}_d), \quad m_d = \frac{1}{V} \sum_v p_{v,d}

    with the median :math:`\tilde m_d` of `m` over `width` bins around `d`. The mean over all views of an object varies
    slowly from bin to bin; the logarithm of a bin's gain does not. Stripes up to half the width go. So do true rings,
    and part of a sharp edge at the same distance from the axis in all views: of a round, centred sample.

    Args:
        sinograms: Shape ``(..., V, D)``, real.
        width: Of the median, an odd number of bins, at least 3.

    Returns:
        Sinograms of the same shape and dtype.

    Raises:
        TypeError: For a complex sinogram or whole numbers, or a width that is not a whole number.
        ValueError: For a width that is even or too small, or fewer than two axes.

    Example:
        >>> import torch
        >>> p = torch.ones(4, 20)
        >>> p[:, 7] += 0.1
        >>> bool((remove_rings(p) == 1).all())
        True

    References:
        Boin, Haibel, "Compensation of ring artefacts in synchrotron tomographic images", Opt. Express 14 (2006): the
        same with a quotient before the logarithm, and a mean in place of the median.
    """
    if not isinstance(sinograms, Tensor):
        raise TypeError(f"remove_rings: sinograms must be a torch.Tensor, got {type(sinograms).__name__}")
    if not sinograms.is_floating_point():
        raise TypeError(f"remove_rings: sinograms must be of real numbers, got {sinograms.dtype}")
    if sinograms.ndim < 2:
        raise ValueError(
            f"remove_rings: sinograms must have the shape (..., V, D), got {tuple(sinograms.shape)}"
        )
    _check_width("remove_rings: width", width)
    reach = width // 2
    means = sinograms.mean(-2)
    if means.numel() == 0:
        return sinograms.clone()
    # At the edges the end is repeated.
    bins = torch.arange(-reach, means.shape[-1] + reach, device=means.device).clamp(0, means.shape[-1] - 1)
    smooth = means[..., bins].unfold(-1, width, 1).median(-1).values
    return sinograms - (means - smooth)[..., None, :]


def _check_width(what: str, width: Any) -> None:
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"{what} must be an int, got {type(width).__name__}")
    if width < 3 or width % 2 == 0:
        raise ValueError(f"{what} must be odd and at least 3, got {width}")


@takes_numpy
def read_projections(
    path: PathLike,
    rows: int | slice | None = None,
    *,
    angles: Tensor | None = None,
    axis: float | None = None,
    average: Average = "mean",
    interpolate: int = 0,
    ring_width: int | None = None,
) -> ProjectionFile:
    """Read a parallel-beam scan from a DataExchange file (HDF5), the format of TomoPy and of many beamlines.

    The file holds ``exchange/data`` (views, rows, bins), the open beam ``exchange/data_white`` and the dark frames
    ``exchange/data_dark`` of the same rows and bins, and ``exchange/theta``, one angle for each view, in degrees unless
    its attribute ``units`` says radians. Counts become line integrals by `normalize_projections`; their unit is 1 over
    the width of a bin, at the sample, where images have pixels of that width. The rotation axis is found in the rows
    that are read, by `find_rotation_axis`; of many rows, in 8 of them spread evenly.

    A file without dark frames is read with a warning, as if they were 0. The direction of rotation is not in the file:
    where it is the other way round, images are mirrored; ``angles=-scan.angles`` turns them.

    Args:
        path: The file.
        rows: One row of the detector, or a range such as ``slice(100, 120)``; the others are not read. All of them
            where None. A single row keeps its dimension.
        angles: Of the views, shape ``(V,)``, radians, in place of the file's; needed where it has none.
        axis: Where the axis of rotation meets a row, in bins, in place of the one to be found.
        average: Of flats and darks: ``"mean"`` or ``"median"``.
        interpolate: Number of dead bins of a row that may be filled in; ``metadata["interpolated"]`` lists them.
        ring_width: Width of `remove_rings`; None leaves stripes as they are.

    Returns:
        Sinograms ``(R, V, D)``, angles, axis and what was done. ``ParallelBeamCT(size, **scan.geometry)`` is the
        operator.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file of another kind, truncated, without one of the data sets, with shapes that disagree, NaN
            or Inf, or dead bins; for rows that are not there; where the axis cannot be found. The message names the
            file and the reason.
        TypeError: For an argument of the wrong type.

    Example:
        >>> import tempfile
        >>> import h5py
        >>> path = Path(tempfile.mkdtemp()) / "scan.h5"
        >>> with h5py.File(path, "w") as file:
        ...     file["exchange/data"] = np.full((90, 4, 32), 50.0)
        ...     file["exchange/data_white"] = np.full((5, 4, 32), 100.0)
        ...     file["exchange/data_dark"] = np.zeros((5, 4, 32))
        ...     file["exchange/theta"] = np.linspace(0, 180, 90, endpoint=False)
        >>> scan = read_projections(path, rows=slice(1, 3), axis=16.0)
        >>> scan.sinograms.shape, scan.geometry["bin_offset"]
        (torch.Size([2, 90, 32]), -0.5)

    References:
        De Carlo et al., "Scientific data exchange: a schema for HDF5-based storage of raw and analyzed data", J.
        Synchrotron Rad. 21 (2014).
    """
    path = Path(path)
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int | float)):
        raise TypeError(f"read_projections: axis must be a number of bins, got {type(axis).__name__}")
    if ring_width is not None:
        _check_width("read_projections: ring_width", ring_width)
    _check_choices("read_projections", average, interpolate)
    with naming(path):
        if not is_hdf5(path):
            raise ValueError("not an HDF5 file")
        with open_hdf5(path) as file:
            data, flats, darks = (_stored(file, name) for name in (DATA, FLATS, DARKS))
            if data is None or flats is None:
                missing = [name for name, found in ((DATA, data), (FLATS, flats)) if found is None]
                raise ValueError(f"it has no {' and no '.join(map(repr, missing))}")
            views, count, bins = data.shape
            for name, found in ((FLATS, flats), (DARKS, darks)):
                if found is not None and found.shape[1:] != data.shape[1:]:
                    raise ValueError(
                        f"its {name!r} has the shape {found.shape}, and its {DATA!r} {count} rows of {bins} bins"
                    )
            chosen = _chosen(rows, count)
            theta = _stored_angles(file, views) if angles is None else _given_angles(angles, views)
            counts, white = _read(data, DATA, chosen), _read(flats, FLATS, chosen)
            dark = torch.zeros(1, *white.shape[1:]) if darks is None else _read(darks, DARKS, chosen)
        if darks is None:
            warnings.warn(f"{path}: it has no {DARKS!r}, taken as 0", stacklevel=3)
        sinograms, interpolated = _normalized(counts, white, dark, average, interpolate, chosen)
        if ring_width is not None:
            sinograms = remove_rings(sinograms, ring_width)
        if axis is None:
            searched = np.unique(np.linspace(0, len(sinograms) - 1, SEARCHED).round().astype(int))
            axis, method, comparisons = find_rotation_axis(sinograms[torch.from_numpy(searched)], theta)
        else:
            method, comparisons = "given", 0
            if not 0 <= axis <= bins - 1:
                raise ValueError(f"the axis must lie between its bins 0 and {bins - 1}, got {axis}")
    metadata = {
        "format": "DataExchange",
        "rows": tuple(chosen),
        "flats": len(white),
        "darks": 0 if darks is None else len(dark),
        "average": average,
        "axis_method": method,
        "axis_comparisons": comparisons,
        "interpolated": interpolated,
        "ring_width": ring_width,
    }
    return ProjectionFile(sinograms, theta, float(axis), metadata)


def _stored(file: Any, name: str) -> Any:
    """Return a data set of frames, None where there is none."""
    found = dataset(file, name)
    if found is None:
        return None
    if found.ndim != 3 or 0 in found.shape:
        axes = "(views, rows, bins)" if name == DATA else "(frames, rows, bins)"
        raise ValueError(f"its {name!r} has the shape {found.shape}, not {axes}")
    if found.dtype.kind not in "iuf":
        raise ValueError(f"its {name!r} is {found.dtype}, not real numbers")
    return found


def _read(data: Any, name: str, rows: range) -> Tensor:
    """Read the rows asked for, of all frames."""
    with np.errstate(over="ignore"):
        values = torch.from_numpy(np.asarray(data[:, rows.start : rows.stop : rows.step], np.float32))
    bad = first_bad(values)
    if bad is not None:
        frame, row, column = bad
        raise ValueError(f"value {(frame, rows[row], column)} of its {name!r} is {values[bad].item()}")
    return values


def _chosen(rows: int | slice | None, count: int) -> range:
    """Return the numbers of the rows asked for, of `count`."""
    if rows is None:
        return range(count)
    if isinstance(rows, slice):
        chosen = range(count)[rows]
        if not chosen or chosen.step < 0:
            raise ValueError(f"rows {rows.start}:{rows.stop}:{rows.step} are none of its {count} in order")
        return chosen
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise TypeError(f"rows must be an int, a slice or None, got {type(rows).__name__}")
    if not -count <= rows < count:
        raise ValueError(f"it has {count} rows, row {rows} is not among them")
    return range(rows % count, rows % count + 1)


def _stored_angles(file: Any, views: int) -> Tensor:
    """Return the angles of a file in radians."""
    stored = dataset(file, THETA)
    if stored is None:
        raise ValueError(f"it has no {THETA!r}: give the angles of its {views} views (angles)")
    if stored.shape != (views,):
        raise ValueError(f"its {THETA!r} has the shape {stored.shape}, and its {DATA!r} {views} views")
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"its {THETA!r} is {stored.dtype}, not real numbers")
    theta = np.asarray(stored[:], np.float64)
    bad = np.flatnonzero(~np.isfinite(theta))
    if len(bad):
        raise ValueError(f"value {int(bad[0])} of its {THETA!r} is {theta[bad[0]]}")
    unit = stored.attrs.get("units")
    unit = unit.decode("utf-8", "replace") if isinstance(unit, bytes) else unit
    span = float(np.ptp(theta))
    if unit is None and 0 < span <= TURN:
        raise ValueError(
            f"its {THETA!r} spans {span:.4g} without a unit, which may be degrees or radians: give the angles (angles)"
        )
    if unit is not None and str(unit).strip().lower() not in DEGREES + RADIANS:
        raise ValueError(f"its {THETA!r} is in {unit!r}, neither degrees nor radians")
    in_radians = unit is not None and str(unit).strip().lower() in RADIANS
    return torch.from_numpy(theta if in_radians else np.deg2rad(theta))


def _given_angles(angles: Any, views: int) -> Tensor:
    theta = torch.as_tensor(angles).detach().cpu().to(torch.float64)
    if tuple(theta.shape) != (views,):
        raise ValueError(
            f"angles must have the shape ({views},), one for each of its views, got {tuple(theta.shape)}"
        )
    if not bool(theta.isfinite().all()):
        raise ValueError("angles must be finite")
    return theta


def projections_shape(path: Path) -> tuple[int, int, int] | None:
    """Return the views, rows and bins of a DataExchange file; None for a file of another kind."""
    if not is_hdf5(path):
        return None
    with open_hdf5(path) as file:
        if dataset(file, FLATS) is None:
            return None
        data = _stored(file, DATA)
        return None if data is None else (data.shape[0], data.shape[1], data.shape[2])
