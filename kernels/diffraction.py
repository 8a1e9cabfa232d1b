"""Triton backend of diffraction_forward, diffraction_adjoint, diffraction_gradient and diffraction_gram."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a program, slices times columns, and its most columns.
NUMBERS = 256
COLUMNS = 128


@triton.jit
def _wave(turns):
    """Return cosine and sine of 2 pi turns, by their series within an eighth of a turn."""
    quarters = 4 * turns
    whole = tl.floor(quarters + 0.5)
    x = (quarters - whole) * 1.57079632679
    square = x * x
    s = 1 / 362880
    s = -1 / 5040 + square * s
    s = 1 / 120 + square * s
    s = -1 / 6 + square * s
    s = x * (1 + square * s)
    c = -1 / 720 + square * (1 / 40320)
    c = 1 / 24 + square * c
    c = -0.5 + square * c
    c = 1 + square * c
    quarter = whole.to(tl.int32)
    odd = (quarter & 1) != 0
    re = tl.where(odd, s, c)
    im = tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -re, re), tl.where((quarter & 2) != 0, -im, im)


@triton.jit
def _numbers(base, at, here):
    """Load complex numbers, zero where not `here`."""
    return tl.load(base + 2 * at, here, 0.0), tl.load(base + 2 * at + 1, here, 0.0)


@triton.jit
def _row_pair(i, height):
    """Return the frequency number of a row, and the row of the negative frequencies."""
    return tl.where(2 * i < height, i, i - height), tl.where(i == 0, 0, height - i)


@triton.jit
def _functions(
    transfer, depths, light, z, j, at, inside, row_number, n_slices, plane,
    row_step, column_step, cutoff_squared, gain, scale, sign: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Return the transfer functions at frequencies, with sign -1 the conjugates of those at their negatives."""
    if STORED:
        re, im = _numbers(transfer + 2 * light * n_slices * plane, z * plane + at, inside)
        return re, sign * im
    f_row = tl.load(transfer + 2 * light).to(tl.float32)
    f_column = tl.load(transfer + 2 * light + 1).to(tl.float32)
    squared = f_row * f_row + f_column * f_column
    root = tl.sqrt_rn(tl.maximum(cutoff_squared - squared, 0.0))
    u = sign * row_step * row_number.to(tl.float32)
    row_term = u * (u + 2 * f_row)
    u = sign * column_step * j.to(tl.float32)
    more = u * (u + 2 * f_column) + row_term
    axial = tl.sqrt_rn(tl.where(inside, cutoff_squared - squared - more, 1.0))
    kappa = tl.where(inside, tl.div_rn(scale * more, axial + root), 0.0)
    amplitude = tl.where(inside, tl.div_rn(tl.zeros_like(axial) + gain, axial), 0.0)
    depth = tl.load(depths + z, z < n_slices, 0.0).to(tl.float32)
    w_re, w_im = _wave(sign * kappa * depth)
    return -sign * amplitude * w_im, sign * amplitude * w_re


@triton.jit
def _diffraction_kernel(
    spectrum, half, out, transfer, depths, support, illuminations,
    n_used, n_illuminations, n_slices, height, width,
    row_step, column_step, cutoff_squared, gain, scale, factor,
    ALL: tl.constexpr, STORED: tl.constexpr, IMAGE: tl.constexpr, DATA: tl.constexpr, FORWARD: tl.constexpr,
    SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Computes        with FORWARD half spectra of intensities S_l(u) = t_l(u) + conj t_l(-u), t_l = sum_z h_lz
    #                 X_z; else G_z = factor sum_l conj(h_lz) R_l, of which R is S with IMAGE, less the data with
    #                 DATA, or the data alone.
    # Thread mapping  grid (rows * batch * blocks of columns): a program has BLOCK frequencies of the half plane
    #                 and their negatives, all slices; no atomics.
    # Shared memory   what tl.sum needs.
    # Accumulation    float32, illuminations in the order given.
    # Preconditions   pairs of reals; no pupil holds a frequency of half the sampling rate.
    program = tl.program_id(0).to(tl.int64)
    half_width = width // 2 + 1
    tiles = tl.cdiv(half_width, BLOCK)
    first = (program % tiles * BLOCK).to(tl.int32)
    b = program // tiles // height
    i = (program // tiles % height).to(tl.int32)
    number, mirror = _row_pair(i, height)
    j = (first + tl.arange(0, BLOCK))[None, :]
    z = tl.arange(0, SLICES).to(tl.int64)[:, None]
    plane = tl.full([], 1, tl.int64) * height * width
    here = j < (width + 1) // 2
    at = tl.full([], 1, tl.int64) * i * width + j
    at_mirror = tl.full([], 1, tl.int64) * mirror * width + tl.where(j == 0, 0, width - j)
    meant = here & (z < n_slices)
    image = b * n_slices * plane
    x_re = tl.zeros([SLICES, BLOCK], tl.float32)
    x_im = tl.zeros([SLICES, BLOCK], tl.float32)
    m_re = x_re
    m_im = x_im
    if IMAGE:
        x_re, x_im = _numbers(spectrum, image + z * plane + at, meant)
        m_re, m_im = _numbers(spectrum, image + z * plane + at_mirror, meant)
        m_im = -m_im
    g_re = tl.zeros([SLICES, BLOCK], tl.float32)
    g_im = tl.zeros([SLICES, BLOCK], tl.float32)
    n_re = tl.zeros([SLICES, BLOCK], tl.float32)
    n_im = tl.zeros([SLICES, BLOCK], tl.float32)
    for used in range(n_used):
        light = tl.full([], 0, tl.int64) + used
        if not ALL:
            light = tl.load(illuminations + used)
        known = (light >= 0) & (light < n_illuminations)
        light = tl.where(known, light, 0)
        begin = tl.load(support + 2 * (light * height + i))
        end = tl.load(support + 2 * (light * height + i) + 1)
        # Mirrored columns.
        m_end = 1 - tl.load(support + 2 * (light * height + mirror))
        m_begin = 1 - tl.load(support + 2 * (light * height + mirror) + 1)
        meets = (begin < end) & (begin < first + BLOCK) & (first < end)
        meets = meets | ((m_begin < m_end) & (m_begin < first + BLOCK) & (first < m_end))
        inside = (j >= begin) & (j < end) & here
        m_inside = (j >= m_begin) & (j < m_end) & here
        row = half + 2 * ((b * n_illuminations + light) * height + i) * half_width
        s_re = tl.zeros([1, BLOCK], tl.float32)
        s_im = tl.zeros([1, BLOCK], tl.float32)
        if meets & known:
            h_re, h_im = _functions(
                transfer, depths, light, z, j, at, inside & (z < n_slices), number, n_slices, plane,
                row_step, column_step, cutoff_squared, gain, scale, 1, STORED,
            )  # fmt: skip
            k_re, k_im = _functions(
                transfer, depths, light, z, j, at_mirror, m_inside & (z < n_slices), number, n_slices, plane,
                row_step, column_step, cutoff_squared, gain, scale, -1, STORED,
            )  # fmt: skip
            if IMAGE:
                s_re = tl.sum(h_re * x_re - h_im * x_im + (k_re * m_re - k_im * m_im), 0, keep_dims=True)
                s_im = tl.sum(h_re * x_im + h_im * x_re + (k_re * m_im + k_im * m_re), 0, keep_dims=True)
            if not FORWARD:
                if DATA:
                    y_re, y_im = _numbers(row, j, inside | m_inside)
                    if IMAGE:
                        s_re -= y_re
                        s_im -= y_im
                    else:
                        s_re = y_re
                        s_im = y_im
                g_re += h_re * s_re + h_im * s_im
                g_im += h_re * s_im - h_im * s_re
                n_re += k_re * s_re + k_im * s_im
                n_im += k_re * s_im - k_im * s_re
        if FORWARD:
            tl.store(row + 2 * j, s_re, j < half_width)
            tl.store(row + 2 * j + 1, s_im, j < half_width)
    if not FORWARD:
        # The column of half the sampling rate is zero, and column 0 its own mirror image, left to its row.
        target = out + 2 * (image + z * plane + at)
        stored = (j < half_width) & (z < n_slices)
        tl.store(target, g_re * factor, stored)
        tl.store(target + 1, g_im * factor, stored)
        target = out + 2 * (image + z * plane + at_mirror)
        tl.store(target, n_re * factor, meant & (j > 0))
        tl.store(target + 1, -n_im * factor, meant & (j > 0))


@triton.jit
def _diffraction_gram_kernel(
    spectrum, data, out, auto, pairs, n_slices, height, width, rows, columns,
    DATA: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Computes        at each frequency u a Hermitian Toeplitz matrix of auto(u) times X(u), plus pairs(u) times
    #                 conj X(-u) where pairs has u or -u, less the data with DATA.
    # Thread mapping  grid (rows * batch * blocks of columns): a program has BLOCK frequencies of the plane, all
    #                 slices.
    # Shared memory   what tl.sum needs.
    # Accumulation    float32.
    # Preconditions   pairs of reals.
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(width, BLOCK)
    j = (program % tiles * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)[None, :]
    b = program // tiles // height
    i = (program // tiles % height).to(tl.int32)
    number, mirror = _row_pair(i, height)
    z = tl.arange(0, SLICES).to(tl.int64)[:, None]
    plane = tl.full([], 1, tl.int64) * height * width
    at = tl.full([], 1, tl.int64) * i * width + j
    meant = (j < width) & (z < n_slices)
    image = b * n_slices * plane
    x_re, x_im = _numbers(spectrum, image + z * plane + at, meant)
    # At -u the matrix of pairs is the transposed one.
    negative = j > width - columns
    reach = rows // 2
    paired = tl.abs(number) <= reach
    inside = meant & (negative | (j < columns)) & (z < tl.where(paired, n_slices, 0))
    at_mirror = tl.full([], 1, tl.int64) * mirror * width + tl.where(j == 0, 0, width - j)
    m_re, m_im = _numbers(spectrum, image + z * plane + at_mirror, inside)
    at_pair = tl.where(negative, (reach - number) * columns + width - j, (reach + number) * columns + j)
    pair_plane = tl.full([], 1, tl.int64) * rows * columns
    for y in range(n_slices):
        apart = y - z
        g_re, g_im = _numbers(auto, tl.where(apart < 0, -apart, apart) * plane + at, meant)
        g_im = tl.where(apart < 0, -g_im, g_im)
        re = tl.sum(g_re * x_re - g_im * x_im, 0, keep_dims=True)
        im = tl.sum(g_re * x_im + g_im * x_re, 0, keep_dims=True)
        if paired:
            entry = tl.where(negative, z * n_slices + y, y * n_slices + z)
            p_re, p_im = _numbers(pairs, entry * pair_plane + at_pair, inside)
            re += tl.sum(p_re * m_re + p_im * m_im, 0, keep_dims=True)
            im += tl.sum(p_im * m_re - p_re * m_im, 0, keep_dims=True)
        to = image + y * plane + at
        if DATA:
            y_re, y_im = _numbers(data, to, j < width)
            re -= y_re
            im -= y_im
        tl.store(out + 2 * to, re, j < width)
        tl.store(out + 2 * to + 1, im, j < width)


class Scan(NamedTuple):
    """What describes a scan, as oder_fast/ops/diffraction.py passes it."""

    transfer: Tensor
    stored: bool
    depths: Tensor
    support: Tensor
    illuminations: Tensor | None
    n_used: int
    pixel_size: float
    cutoff: float
    scale: float
    amplitude: float
    first: float
    spacing: float
    batch: int
    n_illuminations: int
    n_slices: int
    height: int
    width: int


def edges(n_slices: int) -> dict[str, int]:
    """Return what a program has of slices and columns."""
    slices = triton.next_power_of_2(n_slices)
    return {"SLICES": slices, "BLOCK": max(1, min(COLUMNS, NUMBERS // slices))}


def _launch(
    scan: Scan, spectrum: Tensor | None, half: Tensor | None, out: Tensor | None, *, forward: bool = False
) -> None:
    sizes = edges(scan.n_slices)
    any_tensor = next(t for t in (out, half) if t is not None)
    _diffraction_kernel[(triton.cdiv(scan.width // 2 + 1, sizes["BLOCK"]) * scan.height * scan.batch,)](
        *(any_tensor if t is None else t for t in (spectrum, half, out)),
        scan.transfer,
        scan.depths,
        scan.support,
        scan.support.view(torch.int64) if scan.illuminations is None else scan.illuminations,
        scan.n_used,
        scan.n_illuminations,
        scan.n_slices,
        scan.height,
        scan.width,
        1 / (scan.height * scan.pixel_size),
        1 / (scan.width * scan.pixel_size),
        scan.cutoff**2,
        scan.amplitude / (2 * math.pi * scan.scale),
        scan.scale,
        2 * scan.n_illuminations / scan.n_used,
        ALL=scan.illuminations is None,
        STORED=scan.stored,
        IMAGE=spectrum is not None,
        DATA=half is not None,
        FORWARD=forward,
        **sizes,
    )


def diffraction_forward(dtype: int, spectrum: Tensor, half: Tensor, *args: object) -> None:
    """Launch it; arguments of all launchers as oder_fast/ops/diffraction.py passes them."""
    _launch(Scan(*args), spectrum, half, None, forward=True)


def diffraction_adjoint(dtype: int, half: Tensor, spectrum: Tensor, *args: object) -> None:
    """Launch the transpose."""
    _launch(Scan(*args), None, half, spectrum)


def diffraction_gradient(
    dtype: int, spectrum: Tensor, half: Tensor | None, gradient: Tensor, *args: object
) -> None:
    """Launch both, less the data in between."""
    _launch(Scan(*args), spectrum, half, gradient)


def diffraction_gram(
    dtype: int,
    spectrum: Tensor,
    data: Tensor | None,
    gradient: Tensor,
    auto: Tensor,
    pairs: Tensor,
    batch: int,
    n_slices: int,
    height: int,
    width: int,
    rows: int,
    columns: int,
) -> None:
    """Launch the same through Gram matrices."""
    sizes = edges(n_slices)
    _diffraction_gram_kernel[(triton.cdiv(width, sizes["BLOCK"]) * height * batch,)](
        spectrum,
        gradient if data is None else data,
        gradient,
        auto,
        pairs,
        n_slices,
        height,
        width,
        rows,
        columns,
        DATA=data is not None,
        **sizes,
    )
