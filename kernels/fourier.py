"""Triton backend of fourier_forward, fourier_adjoint and fourier_gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Edges of the block of a result that a program has, as ROWS and COLUMNS in oder_fast/ops/fourier.py, and how many
# terms of its sums are multiplied at a time.
ROWS = 32
COLUMNS = 32
DEPTH = 16
# Loads ahead of the loop would spill registers.
STAGES = 1
# The product of two indices of the transform must fit in 31 bits.
MAX_LENGTH = 46340


@triton.jit
def _number(base, at, here):
    """Load complex numbers, zero where not `here`."""
    return tl.load(base + 2 * at, here, 0.0).to(tl.float32), tl.load(base + 2 * at + 1, here, 0.0).to(
        tl.float32
    )


@triton.jit
def _multiply(a, b, re, im):
    """Return the matrix product of complex a = (re, im) and b, added to (re, im)."""
    a_re, a_im = a
    b_re, b_im = b
    re = tl.dot(a_re, b_re, re, input_precision="ieee")
    re = tl.dot(-a_im, b_im, re, input_precision="ieee")
    im = tl.dot(a_re, b_im, im, input_precision="ieee")
    im = tl.dot(a_im, b_re, im, input_precision="ieee")
    return re, im


@triton.jit
def _coil(coils, u, n_coils, ALL: tl.constexpr):
    """Return the index of a used coil in 64 bits, 0 and not 1 as the second where there is no such coil."""
    coil = u
    if not ALL:
        coil = tl.load(coils + u)
    known = (coil >= 0) & (coil < n_coils)
    return tl.where(known, coil, 0), tl.where(known, 1, 0)


@triton.jit
def _fourier_transform_kernel(
    source, maps, coils, lines, roots, data, mask, target,
    n_used, n_coils, n, n_lines, width, maps_batch, lines_batch, mask_batch,
    source_row, source_column, target_row, target_column, data_row, data_column,
    scale,
    MAPS: tl.constexpr, ALL: tl.constexpr, LINES: tl.constexpr, DATA: tl.constexpr, MASK: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Computes        target[b,u,m,j] = (scale * sum_i w^(line[m] i) source[b,u,i,j] - data[b,c,m,j]) *
    #                 mask[b,m,j] with w = exp(-2 pi i / n) and c = coils[u]; zero where a line is not in
    #                 0 .. n - 1. The source is an image times the coil map with MAPS; line[m] = m without
    #                 LINES; with INVERSE w is conjugated and the mask, of a source, taken before.
    # Thread mapping  grid (batch * n_used * blocks of lines * blocks of columns): a program has ROWS x COLUMNS
    #                 numbers of a plane.
    # Shared memory   what tl.dot needs.
    # Accumulation    float32, blocks of DEPTH rows in increasing order, each by tl.dot in float32.
    # Preconditions   pairs of reals; n and n_lines at most MAX_LENGTH; each plane contiguous, rows and columns as
    #                 the strides say.
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, COLUMNS)
    tiles = across * tl.cdiv(n_lines, ROWS)
    plane = program // tiles
    tile = (program % tiles).to(tl.int32)
    b = plane // n_used
    coil, known = _coil(coils, plane % n_used, n_coils, ALL)
    m = tile // across * ROWS + tl.arange(0, ROWS)
    j = (tile % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    line = m
    sampled = m < n_lines
    if LINES:
        index = tl.load(lines + b % lines_batch * n_lines + m, sampled, -1)
        sampled = (index >= 0) & (index < n)
        line = tl.where(sampled, index, 0).to(tl.int32)
    size = tl.full([], 1, tl.int64) * n * width
    of_source = source + 2 * plane * size
    of_maps = maps
    if MAPS:
        of_source = source + 2 * b * size
        of_maps = maps + 2 * (b % maps_batch * n_coils + coil) * size
    of_mask = mask + b % mask_batch * size
    re = tl.zeros([ROWS, COLUMNS], tl.float32)
    im = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n, DEPTH):
        i = first + tl.arange(0, DEPTH)
        turn = line[:, None] * i[None, :] % n
        w_re, w_im = _number(roots, turn, sampled[:, None] & (i < n)[None, :])
        i = i.to(tl.int64)[:, None]
        here = (i < n * known) & (j < width)
        x_re, x_im = _number(of_source, i * source_row + j * source_column, here)
        if MAPS:
            s_re, s_im = _number(of_maps, i * width + j, here)
            x_re, x_im = x_re * s_re - x_im * s_im, x_re * s_im + x_im * s_re
        if INVERSE:
            w_im = -w_im
            if MASK:
                taken = tl.load(of_mask + i * source_row + j * source_column, here, 0).to(tl.float32)
                x_re *= taken
                x_im *= taken
        re, im = _multiply((w_re, w_im), (x_re, x_im), re, im)
    re *= scale
    im *= scale
    m = m.to(tl.int64)[:, None]
    size = tl.full([], 1, tl.int64) * n_lines * width
    here = (m < n_lines) & (j < width)
    meant = here & sampled[:, None] & (m < n_lines * known)
    at = m * data_row + j * data_column
    if DATA:
        y_re, y_im = _number(data + 2 * (b * n_coils + coil) * size, at, meant)
        re -= y_re
        im -= y_im
    if MASK and not INVERSE:
        taken = tl.load(of_mask + at, meant, 0).to(tl.float32)
        re *= taken
        im *= taken
    at = target + 2 * (plane * size + m * target_row + j * target_column)
    tl.store(at, tl.where(meant, re, 0.0), here)
    tl.store(at + 1, tl.where(meant, im, 0.0), here)


@triton.jit
def _fourier_combine_kernel(
    spectra, maps, coils, lines, roots, image, n_used, n_coils, n, n_lines, width, maps_batch, lines_batch,
    image_row, image_column, scale,
    ALL: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Computes        image[b,i,j] = scale * sum_u conj(S[c,i,j]) sum_l conj(w^(line[m] i)) spectra[b,u,m,j],
    #                 w = exp(-2 pi i / n), c = coils[u]: the conjugate transpose of the transform.
    # Thread mapping  grid (blocks of rows * blocks of columns * batch): a program has ROWS x COLUMNS pixels of
    #                 one image; no atomics.
    # Shared memory   what tl.dot needs.
    # Accumulation    float32, coils in increasing order, of a coil blocks of DEPTH lines, each by tl.dot.
    # Preconditions   pairs of reals; n at most MAX_LENGTH.
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, COLUMNS)
    tiles = across * tl.cdiv(n, ROWS)
    b = program // tiles
    tile = (program % tiles).to(tl.int32)
    i = tile // across * ROWS + tl.arange(0, ROWS)
    j = (tile % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = (i < n)[:, None] & (j < width)
    wide = i.to(tl.int64)[:, None]
    sum_re = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_im = tl.zeros([ROWS, COLUMNS], tl.float32)
    for u in range(n_used):
        coil, known = _coil(coils, u, n_coils, ALL)
        spectrum = spectra + 2 * (b * n_used + u) * n_lines * width
        re = tl.zeros([ROWS, COLUMNS], tl.float32)
        im = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, n_lines, DEPTH):
            m = first + tl.arange(0, DEPTH)
            line = m
            sampled = m < n_lines
            if LINES:
                index = tl.load(lines + b % lines_batch * n_lines + m, sampled, -1)
                sampled = (index >= 0) & (index < n)
                line = tl.where(sampled, index, 0).to(tl.int32)
            turn = i[:, None] * line[None, :] % n
            w_re, w_im = _number(roots, turn, sampled[None, :] & (i < n)[:, None])
            at = m.to(tl.int64)[:, None] * width + j
            r = _number(spectrum, at, sampled[:, None] & (j < width))
            re, im = _multiply((w_re, -w_im), r, re, im)
        of_maps = maps + 2 * (b % maps_batch * n_coils + coil) * n * width
        s_re, s_im = _number(of_maps, wide * width + j, here & (wide < n * known))
        sum_re += re * s_re + im * s_im
        sum_im += im * s_re - re * s_im
    sum_re *= scale
    sum_im *= scale
    at = b * n * width + wide * image_row + j * image_column
    tl.store(image + 2 * at, sum_re, here)
    tl.store(image + 2 * at + 1, sum_im, here)


class Scan(NamedTuple):
    """What describes a scan, as oder_fast/ops/fourier.py passes it."""

    maps_dtype: int
    maps: Tensor
    shared_maps: bool
    sampling: Tensor
    n_lines: int
    shared_sampling: bool
    coils: Tensor | None
    n_used: int
    transposed: bool
    roots_n: Tensor
    roots_width: Tensor | None
    workspace: Tensor
    batch: int
    n_coils: int
    n: int
    width: int

    @property
    def mask(self) -> Tensor | None:
        """The mask of points, or None where lines are sampled."""
        return self.sampling if self.n_lines == 0 else None

    @property
    def image_strides(self) -> tuple[int, int]:
        """Strides of an image along n and along width."""
        return (1, self.n) if self.transposed else (self.width, 1)


def _transform(
    scan: Scan,
    source: Tensor,
    strides: tuple[int, int],
    target: Tensor,
    target_strides: tuple[int, int],
    *,
    along_width: bool = False,
    data: Tensor | None = None,
    inverse: bool = False,
    masked: bool = False,
) -> None:
    n, width = (scan.width, scan.n) if along_width else (scan.n, scan.width)
    roots = scan.roots_width if along_width else scan.roots_n
    n_lines = n if along_width or scan.mask is not None else scan.n_lines
    if max(scan.n, scan.width if scan.mask is not None else 0) > MAX_LENGTH:
        raise ValueError(f"fourier: the Triton kernels transform at most {MAX_LENGTH} points")
    tiles = triton.cdiv(n_lines, ROWS) * triton.cdiv(width, COLUMNS)
    _fourier_transform_kernel[(tiles * scan.batch * scan.n_used,)](
        source,
        scan.maps,
        roots if scan.coils is None else scan.coils,
        scan.sampling,
        roots,
        source if data is None else data,
        scan.sampling.view(torch.uint8) if masked else scan.sampling,
        target,
        scan.n_used,
        scan.n_coils,
        n,
        n_lines,
        width,
        1 if scan.shared_maps else scan.batch,
        *[1 if scan.shared_sampling else scan.batch] * 2,
        *strides,
        *target_strides,
        *((width, 1)),
        n**-0.5,
        MAPS=not along_width,
        ALL=scan.coils is None,
        LINES=scan.mask is None,
        DATA=data is not None,
        MASK=masked,
        INVERSE=inverse,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_stages=STAGES,
        enable_fp_fusion=True,
    )


def _combine(scan: Scan, spectra: Tensor, image: Tensor, scale: float = 1.0) -> None:
    tiles = triton.cdiv(scan.n, ROWS) * triton.cdiv(scan.width, COLUMNS)
    _fourier_combine_kernel[(tiles * scan.batch,)](
        spectra,
        scan.maps,
        scan.roots_n if scan.coils is None else scan.coils,
        scan.sampling,
        scan.roots_n,
        image,
        scan.n_used,
        scan.n_coils,
        scan.n,
        scan.n_lines or scan.n,
        scan.width,
        1 if scan.shared_maps else scan.batch,
        1 if scan.shared_sampling else scan.batch,
        *scan.image_strides,
        scale * scan.n**-0.5,
        ALL=scan.coils is None,
        LINES=scan.mask is None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_stages=STAGES,
        enable_fp_fusion=True,
    )


def fourier_forward(dtype: int, image: Tensor, samples: Tensor, *args: object) -> None:
    """Launch the transform; arguments of all launchers as oder_fast/ops/fourier.py passes them."""
    scan = Scan(*args)
    rows, columns = (scan.width, 1), (1, scan.width)
    if scan.mask is None:
        _transform(scan, image, scan.image_strides, samples, rows)
        return
    _transform(scan, image, rows, scan.workspace[0], rows)
    _transform(scan, scan.workspace[0], columns, samples, (scan.n, 1), along_width=True, masked=True)


def fourier_adjoint(dtype: int, samples: Tensor, image: Tensor, *args: object) -> None:
    """Launch the transpose."""
    scan = Scan(*args)
    spectra = samples
    if scan.mask is not None:
        spectra = scan.workspace[0]
        source, target = (scan.n, 1), (1, scan.width)
        _transform(scan, samples, source, spectra, target, along_width=True, inverse=True, masked=True)
    _combine(scan, spectra, image)


def fourier_gradient(
    dtype: int, image: Tensor, samples: Tensor | None, gradient: Tensor, *args: object
) -> None:
    """Launch the transform less the data, and the transpose of that."""
    scan = Scan(*args)
    spectra, after = scan.workspace[0], scan.workspace[-1]
    rows, columns = (scan.width, 1), (1, scan.width)
    if scan.mask is None:
        _transform(scan, image, scan.image_strides, spectra, rows, data=samples)
    else:
        _transform(scan, image, rows, spectra, rows)
        _transform(scan, spectra, columns, after, columns, along_width=True, data=samples, masked=True)
        _transform(scan, after, columns, spectra, columns, along_width=True, inverse=True)
    _combine(scan, spectra, gradient, scan.n_coils / scan.n_used)
