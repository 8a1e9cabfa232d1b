"""Triton face of group_norm_prelu."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WARPS = 8
# Entries of partial results that are read at once.
BLOCK = 2048


@triton.jit
def _share(channels, parts, CHANNELS: tl.constexpr):
    """Return image, part and channels of this program, all in 64 bits."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, CHANNELS)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return program // blocks // parts, program // blocks % parts, c


@triton.jit
def _tile(n, c, channels, positions, CHANNELS_LAST: tl.constexpr):
    """Return where in an image the positions n of the channels c lie, and which of them there are."""
    inside = (n < positions)[:, None] & (c < channels)[None, :]
    if CHANNELS_LAST:
        at = n[:, None] * channels + c[None, :]
    else:
        at = n[:, None] + c[None, :] * positions
    return at, inside


@triton.jit
def _coefficients(
    mean, rstd, weight, bias, slope, b, c, channels, width, SLOPES: tl.constexpr
):  # fmt: skip
    """Return mean, what it lacks in float32, inverse deviation, weight, bias and slope of channels."""
    inside = c < channels
    at = b * (channels // width) + c // width
    center = tl.load(mean + at, inside, 0.0)
    high = center.to(tl.float32)
    low = (center - high.to(tl.float64)).to(tl.float32)
    inverse = tl.load(rstd + at, inside, 0.0).to(tl.float32)
    gain = tl.load(weight + c, inside, 0.0).to(tl.float32)
    offset = tl.load(bias + c, inside, 0.0).to(tl.float32)
    below = tl.load(slope + c * SLOPES, inside, 0.0).to(tl.float32)
    return high[None, :], low[None, :], inverse[None, :], gain[None, :], offset[None, :], below[None, :]


@triton.jit
def _group_norm_moments_kernel(
    image, means, squares, channels, positions, parts, share,
    CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Computes        means[b,p,c] = mean of image[b,c,n] over the positions n of part p, squares[b,p,c] = sum of
    #                 (image[b,c,n] - means[b,p,c])^2.
    # Thread mapping  grid (batch * parts * blocks of CHANNELS channels): a program takes its part, `share` positions,
    #                 by tiles of POSITIONS x CHANNELS.
    # Shared memory   what tl.sum needs.
    # Accumulation    float32, relative to the first number of the part: Welford's update for each element of the tile
    #                 over the tiles in increasing order, then Chan's formula over its rows.
    # Preconditions   image contiguous, or channels last; POSITIONS divides share; no part is empty.
    b, part, c = _share(channels, parts, CHANNELS)
    image += b * channels * positions
    begin = part * share
    row = tl.arange(0, POSITIONS)
    first, _ = _tile(begin + tl.arange(0, 1), c, channels, positions, CHANNELS_LAST)
    shift = tl.load(image + first, (c < channels)[None, :], 0.0).to(tl.float32)
    mean = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    square = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for before in range(0, share, POSITIONS):
        at, inside = _tile(begin + before + row, c, channels, positions, CHANNELS_LAST)
        x = tl.load(image + at, inside, 0.0).to(tl.float32) - shift
        change = tl.where(inside, x - mean, 0.0)
        mean += change * (1.0 / (before // POSITIONS + 1))
        square += change * (x - mean)
    length = tl.minimum(positions - begin, share)
    count = tl.maximum(tl.cdiv(length - row, POSITIONS), 0).to(tl.float32)[:, None]
    center = tl.sum(mean * count, 0) / length.to(tl.float32)
    apart = mean - center[None, :]
    # What rounding left.
    rest = tl.sum(apart * count, 0) / length.to(tl.float32)
    apart -= rest[None, :]
    square = tl.sum(square + count * apart * apart, 0)
    at = (b * parts + part) * channels + c
    exact = tl.sum(shift, 0).to(tl.float64) + center.to(tl.float64) + rest.to(tl.float64)
    tl.store(means + at, exact, c < channels)
    tl.store(squares + at, square, c < channels)


@triton.jit
def _group_norm_finish_kernel(
    means, squares, mean, rstd, channels, positions, parts, share, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    # Computes        mean[b,g] and rstd[b,g] = (variance + eps)^(-1/2) of the `width` channels of group g, by Chan's
    #                 formula from those of their parts.
    # Thread mapping  grid (batch * groups): a program each.
    # Shared memory   what tl.sum needs.
    # Accumulation    float64; order fixed by parts and width alone.
    # Preconditions   width divides channels.
    program = tl.program_id(0).to(tl.int64)
    groups = channels // width
    means += program // groups * parts * channels + program % groups * width
    squares += program // groups * parts * channels + program % groups * width
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts * width, BLOCK):
        k = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = k < parts * width
        count = tl.minimum(positions - k // width * share, share).to(tl.float64)
        total += tl.load(means + k // width * channels + k % width, inside, 0.0) * count
    center = tl.sum(total) / width / positions
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts * width, BLOCK):
        k = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = k < parts * width
        count = tl.minimum(positions - k // width * share, share).to(tl.float64)
        apart = tl.load(means + k // width * channels + k % width, inside, 0.0) - center
        square = tl.load(squares + k // width * channels + k % width, inside, 0.0).to(tl.float64)
        total += tl.where(inside, square + count * apart * apart, 0.0)
    tl.store(mean + program, center)
    tl.store(rstd + program, 1.0 / tl.sqrt(tl.sum(total) / width / positions + eps))


@triton.jit
def _group_norm_prelu_kernel(
    image, weight, bias, slope, mean, rstd, output, channels, positions, tiles, width,
    CHANNELS_LAST: tl.constexpr, SLOPES: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Computes        output = z where z > 0, slope * z elsewhere, with z = weight * (image - mean) * rstd + bias.
    # Thread mapping  grid (batch * tiles * blocks of CHANNELS channels): a program has one tile.
    # Shared memory   none.
    # Accumulation    float32; the mean in two parts, so that a large one does not cancel.
    # Preconditions   image and output contiguous, or channels last, both; SLOPES is 1 where each channel has a slope,
    #                 else 0.
    b, tile, c = _share(channels, tiles, CHANNELS)
    high, low, inverse, gain, offset, below = _coefficients(
        mean, rstd, weight, bias, slope, b, c, channels, width, SLOPES
    )
    n = tile * POSITIONS + tl.arange(0, POSITIONS)
    at, inside = _tile(n, c, channels, positions, CHANNELS_LAST)
    at += b * channels * positions
    x = tl.load(image + at, inside, 0.0).to(tl.float32)
    z = ((x - high) - low) * inverse * gain + offset
    tl.store(output + at, tl.where(z > 0, z, below * z).to(output.dtype.element_ty), inside)


@triton.jit
def _group_norm_sums_kernel(
    gradient, image, weight, bias, slope, mean, rstd, partials, channels, positions, parts, share, width,
    CHANNELS_LAST: tl.constexpr, SLOPES: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Computes        partials[b,p,:,c] = sums over the positions of part p of h, h * u, and gradient * z where z <= 0,
    #                 with u = (image - mean) * rstd, z = weight * u + bias, h = gradient where z > 0, slope * gradient
    #                 elsewhere.
    # Thread mapping  as _group_norm_moments_kernel.
    # Shared memory   what tl.sum needs.
    # Accumulation    float32, for each element of the tile over the tiles in increasing order, then over its rows.
    # Preconditions   gradient and image contiguous, or channels last, both.
    b, part, c = _share(channels, parts, CHANNELS)
    high, low, inverse, gain, offset, below = _coefficients(
        mean, rstd, weight, bias, slope, b, c, channels, width, SLOPES
    )
    first = b * channels * positions
    sum0 = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    sum1 = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    sum2 = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for before in range(0, share, POSITIONS):
        n = part * share + before + tl.arange(0, POSITIONS)
        at, inside = _tile(n, c, channels, positions, CHANNELS_LAST)
        x = tl.load(image + first + at, inside, 0.0).to(tl.float32)
        g = tl.load(gradient + first + at, inside, 0.0).to(tl.float32)
        u = ((x - high) - low) * inverse
        z = u * gain + offset
        h = tl.where(z > 0, g, below * g)
        sum0 += h
        sum1 += h * u
        sum2 += tl.where(z > 0, 0.0, g * z)
    at = (b * parts + part) * 3 * channels + c
    tl.store(partials + at, tl.sum(sum0, 0), c < channels)
    tl.store(partials + at + channels, tl.sum(sum1, 0), c < channels)
    tl.store(partials + at + 2 * channels, tl.sum(sum2, 0), c < channels)


@triton.jit
def _group_norm_gather_kernel(
    partials, weight, sums, moments, channels, positions, parts, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Computes        sums[b,m,c] = sum_p partials[b,p,m,c], and moments[b,g,m], m = 0, 1: mean over group g of weight *
    #                 what was summed.
    # Thread mapping  grid (batch * groups): program b * groups + g has the `width` channels of a group, and COLUMNS >=
    #                 width.
    # Shared memory   what tl.sum needs.
    # Accumulation    float64; order fixed by parts alone.
    # Preconditions   width divides channels.
    program = tl.program_id(0).to(tl.int64)
    groups = channels // width
    b = program // groups
    column = tl.arange(0, COLUMNS)
    c = program % groups * width + column
    gain = tl.load(weight + c, column < width, 0.0).to(tl.float64)
    for m in tl.static_range(3):
        total = tl.zeros([ROWS, COLUMNS], tl.float64)
        for first in range(0, parts, ROWS):
            part = first + tl.arange(0, ROWS)
            at = ((b * parts + part[:, None]) * 3 + m) * channels + c[None, :]
            inside = (part < parts)[:, None] & (column < width)[None, :]
            total += tl.load(partials + at, inside, 0.0).to(tl.float64)
        of_channel = tl.sum(total, 0)
        tl.store(sums + (b * 3 + m) * channels + c, of_channel, column < width)
        if m < 2:
            tl.store(moments + 2 * program + m, tl.sum(of_channel * gain) / width / positions)


@triton.jit
def _group_norm_gradient_kernel(
    gradient, image, weight, bias, slope, mean, rstd, moments, output, channels, positions, tiles, width,
    CHANNELS_LAST: tl.constexpr, SLOPES: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Computes        output = rstd * (weight * h - moments[b,g,0] - u * moments[b,g,1]), u and h as in
    #                 _group_norm_sums_kernel: the gradient of the image.
    # Thread mapping  as _group_norm_prelu_kernel.
    # Shared memory   none.
    # Accumulation    float32.
    # Preconditions   gradient, image and output contiguous, or channels last, all.
    b, tile, c = _share(channels, tiles, CHANNELS)
    high, low, inverse, gain, offset, below = _coefficients(
        mean, rstd, weight, bias, slope, b, c, channels, width, SLOPES
    )
    moments += 2 * (b * (channels // width) + c // width)
    constant = tl.load(moments, c < channels, 0.0).to(tl.float32)[None, :]
    along = tl.load(moments + 1, c < channels, 0.0).to(tl.float32)[None, :]
    n = tile * POSITIONS + tl.arange(0, POSITIONS)
    at, inside = _tile(n, c, channels, positions, CHANNELS_LAST)
    at += b * channels * positions
    x = tl.load(image + at, inside, 0.0).to(tl.float32)
    g = tl.load(gradient + at, inside, 0.0).to(tl.float32)
    u = ((x - high) - low) * inverse
    h = tl.where(u * gain + offset > 0, g, below * g)
    result = inverse * (gain * h - constant - u * along)
    tl.store(output + at, result.to(output.dtype.element_ty), inside)


def group_norm_prelu(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    output: Tensor,
    mean: Tensor,
    rstd: Tensor,
    means: Tensor,
    squares: Tensor,
    eps: float,
    batch: int,
    channels: int,
    positions: int,
    width: int,
    channels_last: bool,
    tile: tuple[int, int],
    parts: int,
    share: int,
) -> None:
    """Launch the statistics and what takes them; arguments as oder_fast/ops/group_norm_prelu.py passes them."""
    shape = {"CHANNELS_LAST": channels_last, "POSITIONS": tile[0], "CHANNELS": tile[1]}
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    blocks, tiles = triton.cdiv(channels, tile[1]), triton.cdiv(positions, tile[0])
    _group_norm_moments_kernel[(batch * parts * blocks,)](
        image, means, squares, channels, positions, parts, share, **shape, **options
    )
    _group_norm_finish_kernel[(mean.numel(),)](
        means, squares, mean, rstd, channels, positions, parts, share, width, eps, BLOCK=BLOCK, **options
    )
    _group_norm_prelu_kernel[(batch * tiles * blocks,)](
        image,
        weight,
        bias,
        slope,
        mean,
        rstd,
        output,
        channels,
        positions,
        tiles,
        width,
        SLOPES=int(slope.numel() > 1),
        **shape,
        **options,
    )


def group_norm_prelu_backward(
    gradient: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    mean: Tensor,
    rstd: Tensor,
    output: Tensor | None,
    partials: Tensor,
    sums: Tensor,
    moments: Tensor,
    batch: int,
    channels: int,
    positions: int,
    width: int,
    channels_last: bool,
    tile: tuple[int, int],
    parts: int,
    share: int,
) -> None:
    """Launch the sums that all gradients take, and the gradient of the image where there is memory for it."""
    shape = {"CHANNELS_LAST": channels_last, "POSITIONS": tile[0], "CHANNELS": tile[1]}
    shape |= {"SLOPES": int(slope.numel() > 1)}
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    blocks, tiles = triton.cdiv(channels, tile[1]), triton.cdiv(positions, tile[0])
    given = (gradient, image, weight, bias, slope, mean, rstd)
    _group_norm_sums_kernel[(batch * parts * blocks,)](
        *given, partials, channels, positions, parts, share, width, **shape, **options
    )
    columns = triton.next_power_of_2(width)
    _group_norm_gather_kernel[(mean.numel(),)](
        partials,
        weight,
        sums,
        moments,
        channels,
        positions,
        parts,
        width,
        ROWS=max(1, BLOCK // columns),
        COLUMNS=columns,
        **options,
    )
    if output is not None:
        _group_norm_gradient_kernel[(batch * tiles * blocks,)](
            *given, moments, output, channels, positions, tiles, width, **shape, **options
        )
