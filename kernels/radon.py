"""Triton backend of radon_forward, radon_adjoint, radon_backproject and radon_gradient."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Edge of the square of pixels of a program.
TILE = tl.constexpr(32)
# As in the reference: views at 45 degrees march over rows although their cosines differ in the last bit.
TIE_MARGIN = tl.constexpr(1e-9)
# Numbers of a view in the table that _radon_views_kernel writes.
COLUMNS = tl.constexpr(8)
VIEWS = 64
LINES = 8
BINS = 64


def _bits(value: float) -> int:
    """Return the bits of a float64: Triton would pass a float as float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _fixed(a):
    """Return a 32.32 fixed-point number: the high word is an index, the low word the weight."""
    return tl.floor(a * 4294967296.0 + 0.5).to(tl.int64)


@triton.jit
def _fraction(position):
    """Return the leading 23 bits of the fraction as float32."""
    bits = ((position >> 9) & 0x7FFFFF).to(tl.int32) | 0x3F800000
    return bits.to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _radon_views_kernel(
    angles, views, table, n_views, n_used, height, width, n_bins,
    spacing_bits: tl.int64, offset_bits: tl.int64,
    ALL: tl.constexpr, VIEWS: tl.constexpr, COLUMNS: tl.constexpr, TIE_MARGIN: tl.constexpr,
):  # fmt: skip
    # Computes        table[v] = (sigma, slope, centre, rows, step, corner, per_row, per_column): ray d crosses
    #                 line m (a row, or a column where rows is 0) at pixel centre + (d - middle) sigma +
    #                 m slope, the middle being (n_bins - 1) / 2; pixel (i, j) has the bin coordinate corner +
    #                 i per_row + j per_column; step is the length of a ray between lines, 0 for a view index
    #                 out of range and an angle that is no number.
    # Thread mapping  grid (ceil(n_used / VIEWS)): a view each.
    # Shared memory   none.
    # Accumulation    float64.
    # Preconditions   spacing and offset in pixels.
    v = tl.program_id(0) * VIEWS + tl.arange(0, VIEWS)
    here = v < n_used
    view = v.to(tl.int64)
    if not ALL:
        view = tl.load(views + v, here, 0)
    known = here & (view >= 0) & (view < n_views)
    theta = tl.load(angles + view, known, 0.0)
    known = known & (tl.abs(theta) < 1e300)
    theta = tl.where(known, theta, 0.0)
    spacing = _float64(spacing_bits)
    offset = _float64(offset_bits)
    c = tl.cos(theta)
    s = tl.sin(theta)
    rows = tl.abs(c) + TIE_MARGIN >= tl.abs(s)
    along = tl.where(rows, c, -s)
    across = tl.where(rows, s, -c)
    inverse = 1.0 / along
    slope = across * inverse
    lines = tl.where(rows, height, width).to(tl.float64)
    length = tl.where(rows, width, height).to(tl.float64)
    half = tl.full([], 0.5, tl.float64)
    middle = (n_bins - 1) * half
    per_row = -s / spacing
    per_column = c / spacing
    centre = (length - 1.0) * 0.5 - (lines - 1.0) * 0.5 * slope + offset * inverse
    corner = middle - offset / spacing - (height - 1) * half * per_row - (width - 1) * half * per_column
    row = table + v * COLUMNS
    tl.store(row, spacing * inverse, here)
    tl.store(row + 1, slope, here)
    tl.store(row + 2, centre, here)
    tl.store(row + 3, rows.to(tl.float64), here)
    tl.store(row + 4, tl.where(known, tl.abs(inverse), 0.0), here)
    tl.store(row + 5, corner, here)
    tl.store(row + 6, per_row, here)
    tl.store(row + 7, per_column, here)


@triton.jit
def _radon_project_kernel(
    image, transposed, table, measured, views, out, n_views, n_used, height, width, n_bins,
    pixel_bits: tl.int64,
    DATA: tl.constexpr, ALL: tl.constexpr, LINES: tl.constexpr, BINS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Computes        out[b,v,d] = step_v * pixel_size * sum_m of line m of image b at ray d's crossing of it,
    #                 interpolated linearly; less measured[b,views[v],d] with DATA.
    # Thread mapping  grid (batch * n_used * ceil(n_bins / BINS)): BINS neighbouring rays of one view, LINES
    #                 lines at a time.
    # Shared memory   what tl.sum needs.
    # Accumulation    float32, every LINES-th line, then those LINES sums; positions in 32.32 fixed point.
    # Preconditions   contiguous; `transposed` is the image with rows and columns exchanged.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n_bins, BINS)
    sinogram_row = program // blocks
    b = sinogram_row // n_used
    v = sinogram_row % n_used
    d = (program % blocks).to(tl.int32) * BINS + tl.arange(0, BINS)
    row = table + v * COLUMNS
    sigma = tl.load(row)
    slope = tl.load(row + 1)
    centre = tl.load(row + 2)
    step = tl.load(row + 4)
    size = b * height * width
    rows = tl.load(row + 3) > 0
    n_lines = tl.where(rows, height, width)
    length = tl.where(rows, width, height)
    source = transposed + size
    if rows:
        source = image + size
    # Counted from the bin that comes nearest to the image's centre, no ray that touches it is far away.
    aside = (length - 1) * 0.5 - slope * ((n_lines - 1) * 0.5) - centre
    last = (n_bins - 1) * tl.full([], 1.0, tl.float64)
    middle = last * 0.5
    anchor = tl.minimum(tl.maximum(tl.floor(middle + aside / sigma + 0.5), 0.0), last)
    position = tl.minimum(tl.maximum(centre + (anchor - middle) * sigma, -536870912.0), 536870912.0)
    reach = tl.where(step > 0, tl.minimum((length + n_lines) / tl.abs(sigma) + 2.0, last), -1.0).to(tl.int32)
    bins = d - anchor.to(tl.int32)
    near = (d < n_bins) & (tl.abs(bins) <= reach)
    per_bin = _fixed(tl.minimum(tl.maximum(sigma, -1073741824.0), 1073741824.0))
    at = _fixed(position) + bins.to(tl.int64) * per_bin
    per_line = _fixed(slope)
    sums = tl.zeros([LINES, BINS], tl.float32)
    for first in range(0, n_lines, LINES):
        m = (first + tl.arange(0, LINES)).to(tl.int64)[:, None]
        p = at[None, :] + m * per_line
        n = p >> 32
        w1 = _fraction(p)
        here = near[None, :] & (m < n_lines)
        line = source + m * length + n
        low = tl.load(line, here & (n >= 0) & (n < length), 0.0).to(tl.float32)
        high = tl.load(line + 1, here & (n >= -1) & (n < length - 1), 0.0).to(tl.float32)
        sums += low * (1.0 - w1) + high * w1
    total = tl.sum(sums, 0) * (step * _float64(pixel_bits)).to(tl.float32)
    if DATA:
        view = v
        if not ALL:
            view = tl.load(views + v)
        end = tl.where((view >= 0) & (view < n_views), n_bins, 0)
        total -= tl.load(measured + (b * n_views + view) * n_bins + d, d < end, 0.0).to(tl.float32)
    tl.store(out + sinogram_row * n_bins + d, total.to(out.dtype.element_ty), d < n_bins)


@triton.jit
def _radon_gather_kernel(
    sinogram, table, image, n_used, height, width, n_bins, count, scale_bits: tl.int64,
    MATCHED: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Computes        image[b,i,j] = sum_v scale_v sum_d max(0, 1 - abs(d - u_v(i,j)) sigma_v)
    #                 sinogram[b,v,d] with the bin coordinate u of the pixel: the exact transpose of
    #                 radon_forward where MATCHED, linear interpolation along the detector where not.
    # Thread mapping  grid (tiles * batch): a program has TILE x TILE pixels of one image; no atomics.
    # Shared memory   none.
    # Accumulation    float32, views in increasing order; bin coordinates in 32.32 fixed point from a float64
    #                 origin per tile; in float64, by rays, with TAPS = 0, for bins finer than half or coarser
    #                 than 5.6 pixels.
    # Preconditions   contiguous; with TAPS = 0 no pixel takes more than `count` bins of a view.
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, TILE)
    tiles = across * tl.cdiv(height, TILE)
    b = program // tiles
    tile = (program % tiles).to(tl.int32)
    i0 = tile // across * TILE
    j0 = tile % across * TILE
    i = tl.arange(0, TILE)[:, None]
    j = tl.arange(0, TILE)[None, :]
    scale = _float64(scale_bits)
    sums = tl.zeros([TILE, TILE], tl.float32)
    for v in range(n_used):
        row = table + v * COLUMNS
        step = tl.load(row + 4)
        per_row = tl.load(row + 6)
        per_column = tl.load(row + 7)
        corner = tl.load(row + 5) + i0 * per_row + j0 * per_column
        sigma = tl.full([], 1.0, tl.float64)
        peak = tl.where(step > 0, scale, 0.0)
        if MATCHED:
            sigma = tl.abs(tl.load(row))
            peak = scale * step
        source = sinogram + (b * n_used + v) * n_bins
        if TAPS == 0:
            # How far right of the pixel the detector's middle is, along the line that rays cross; by rays, and in
            # pixels, no digits are lost however fine or coarse the bins.
            per_bin = tl.load(row)
            slope = tl.load(row + 1)
            aside = tl.load(row + 2) + (i + i0) * slope - (j + j0)
            if tl.load(row + 3) == 0:
                aside = tl.load(row + 2) + (j + j0) * slope - (i + i0)
            middle = (n_bins - 1) * tl.full([], 0.5, tl.float64)
            near = tl.abs(per_bin) / sigma
            begin = tl.ceil(middle - aside * (1 / per_bin) - 1 / sigma)
            begin = tl.minimum(tl.maximum(begin, 0.0), n_bins * 1.0).to(tl.int32)
            for k in range(0, count):
                d = begin + k
                weight = tl.maximum(1.0 - tl.abs((d - middle) * per_bin + aside) * (1 / near), 0.0) * peak
                sums += weight.to(tl.float32) * tl.load(source + d, d < n_bins, 0.0).to(tl.float32)
        else:
            # A tile beyond the limits is as far from the detector as one at them.
            base = tl.minimum(tl.maximum(tl.floor(corner), -536870912.0), 536870912.0)
            inside = tl.minimum(tl.maximum(corner - base, -536870912.0), 536870912.0)
            p = _fixed(inside) + i.to(tl.int64) * _fixed(per_row) + j.to(tl.int64) * _fixed(per_column)
            lower = (p >> 32).to(tl.int32) + base.to(tl.int32)
            fraction = _fraction(p)
            top = peak.to(tl.float32)
            fall = (peak * sigma).to(tl.float32)
            for k in tl.static_range(1 - TAPS // 2, TAPS // 2 + 1):
                distance = tl.abs(k - fraction)
                weight = tl.maximum(top - distance * fall, 0.0)
                d = lower + k
                sums += weight * tl.load(source + d, (d >= 0) & (d < n_bins), 0.0).to(tl.float32)
    i += i0
    j += j0
    here = (i < height) & (j < width)
    at = (b * height + i) * width + j
    tl.store(image + at, sums.to(image.dtype.element_ty), here)


class Scan(NamedTuple):
    """What describes a scan, as oder_fast/ops/radon.py passes it."""

    angles: Tensor
    views: Tensor | None
    n_views: int
    n_used: int
    n_sums: int
    batch: int
    height: int
    width: int
    n_bins: int
    bin_spacing: float
    bin_offset: float
    pixel_size: float
    sums: Tensor


def _table(scan: Scan) -> Tensor:
    table = scan.angles.new_empty(scan.n_used, COLUMNS.value)
    _radon_views_kernel[(triton.cdiv(scan.n_used, VIEWS),)](
        scan.angles,
        scan.angles if scan.views is None else scan.views,
        table,
        scan.n_views,
        scan.n_used,
        scan.height,
        scan.width,
        scan.n_bins,
        _bits(scan.bin_spacing),
        _bits(scan.bin_offset),
        ALL=scan.views is None,
        VIEWS=VIEWS,
        COLUMNS=COLUMNS,
        TIE_MARGIN=TIE_MARGIN,
        enable_fp_fusion=True,
    )
    return table


def _project(scan: Scan, image: Tensor, table: Tensor, measured: Tensor | None, out: Tensor) -> None:
    _radon_project_kernel[(scan.batch * scan.n_used * triton.cdiv(scan.n_bins, BINS),)](
        image,
        image.transpose(1, 2).contiguous(),
        table,
        image if measured is None else measured,
        table if scan.views is None else scan.views,
        out,
        scan.n_views,
        scan.n_used,
        scan.height,
        scan.width,
        scan.n_bins,
        _bits(scan.pixel_size),
        DATA=measured is not None,
        ALL=scan.views is None,
        LINES=LINES,
        BINS=BINS,
        COLUMNS=COLUMNS,
        enable_fp_fusion=True,
    )


def _gather(
    scan: Scan, sinogram: Tensor, table: Tensor, out: Tensor, scale: float, *, matched: bool = True
) -> None:
    spacing, n_bins = scan.bin_spacing, scan.n_bins
    # A step between lines is at most sqrt(2) pixels long.
    if spacing < 0.5 or (matched and spacing > 8 / math.sqrt(2)):
        taps, count = 0, min(n_bins, 2 * math.ceil(min(1 / spacing, n_bins)) + 1 if matched else 3)
    else:
        taps, count = 4 if matched and spacing < 1 - 1e-7 else 2, 0
    tiles = triton.cdiv(scan.height, TILE.value) * triton.cdiv(scan.width, TILE.value)
    _radon_gather_kernel[(tiles * scan.batch,)](
        sinogram,
        table,
        out,
        scan.n_used,
        scan.height,
        scan.width,
        n_bins,
        count,
        _bits(scale),
        MATCHED=matched,
        TAPS=taps,
        TILE=TILE,
        COLUMNS=COLUMNS,
        enable_fp_fusion=True,
    )


def radon_forward(dtype: int, image: Tensor, sinogram: Tensor, *args: object) -> None:
    """Launch the projection; arguments of all launchers as oder_fast/ops/radon.py passes them."""
    scan = Scan(*args)
    _project(scan, image, _table(scan), None, sinogram)


def radon_adjoint(dtype: int, sinogram: Tensor, image: Tensor, *args: object) -> None:
    """Launch the back-projection."""
    scan = Scan(*args)
    _gather(scan, sinogram, _table(scan), image, scan.pixel_size)


def radon_backproject(dtype: int, sinogram: Tensor, image: Tensor, *args: object) -> None:
    """Launch the back-projection of filtered back-projection."""
    scan = Scan(*args)
    _gather(scan, sinogram, _table(scan), image, 1.0, matched=False)


def radon_gradient(
    dtype: int, image: Tensor, measured: Tensor | None, gradient: Tensor, *args: object
) -> None:
    """Launch the gradient of the data fidelity."""
    scan = Scan(*args)
    table = _table(scan)
    _project(scan, image, table, measured, scan.sums)
    _gather(scan, scan.sums, table, gradient, scan.pixel_size * scan.n_views / scan.n_used)
