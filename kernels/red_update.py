"""Triton backend of red_update."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _red_step(
    x, gradient, denoised, previous, step_size, tau, momentum,
    MOMENTUM: tl.constexpr, NONNEGATIVE: tl.constexpr,
):  # fmt: skip
    """Return updated, before it is rounded to its storage, extrapolated, and the terms of the three sums."""
    updated = x - step_size * (gradient + tau * (x - denoised))
    if NONNEGATIVE:
        updated = tl.where(updated < 0, 0.0, updated)
    change = updated - x
    extrapolated = updated
    uphill = tl.zeros_like(change)
    if MOMENTUM:
        direction = updated - previous
        extrapolated = updated + momentum * direction
        uphill = -change * direction
    squared_change = (change * change).to(tl.float64)
    squared = (updated * updated).to(tl.float64)
    return updated, extrapolated, squared_change, squared, uphill.to(tl.float64)


@triton.jit
def _red_update_kernel(
    image, gradient, denoised, step_size, tau, previous, momentum, updated, extrapolated, partials,
    n_partials, n,
    MOMENTUM: tl.constexpr, NONNEGATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Computes        updated = P(x - step (g + tau (x - denoised))), extrapolated = updated + momentum
    #                 (updated - previous), and for each part of an image the sums of (updated - x)^2,
    #                 updated^2 and (x - updated) (updated - previous).
    # Thread mapping  grid (batch * n_partials): program b * n_partials + part has an equal share of image b
    #                 and takes it by runs of BLOCK numbers.
    # Shared memory   what tl.sum needs.
    # Accumulation    float64 over the runs in increasing order.
    # Preconditions   contiguous; one dtype; step_size, tau, momentum float64.
    program = tl.program_id(0).to(tl.int64)
    b = program // n_partials
    share = tl.cdiv(tl.cdiv(n, n_partials), BLOCK) * BLOCK
    begin = (program % n_partials) * share
    step = tl.load(step_size).to(tl.float32)
    weight = tl.load(tau).to(tl.float32)
    factor = step
    if MOMENTUM:
        factor = tl.load(momentum + b).to(tl.float32)
    sum0 = tl.zeros([BLOCK], tl.float64)
    sum1 = tl.zeros([BLOCK], tl.float64)
    sum2 = tl.zeros([BLOCK], tl.float64)
    for first in range(0, share, BLOCK):
        k = begin + first + tl.arange(0, BLOCK)
        inside = k < n
        at = b * n + k
        x = tl.load(image + at, inside, 0.0).to(tl.float32)
        g = tl.load(gradient + at, inside, 0.0).to(tl.float32)
        d = tl.load(denoised + at, inside, 0.0).to(tl.float32)
        p = x
        if MOMENTUM:
            p = tl.load(previous + at, inside, 0.0).to(tl.float32)
        u, e, term0, term1, term2 = _red_step(x, g, d, p, step, weight, factor, MOMENTUM, NONNEGATIVE)
        tl.store(updated + at, u.to(image.dtype.element_ty), inside)
        if MOMENTUM:
            tl.store(extrapolated + at, e.to(image.dtype.element_ty), inside)
        sum0 += term0
        sum1 += term1
        sum2 += term2
    tl.store(partials + 3 * program, tl.sum(sum0))
    tl.store(partials + 3 * program + 1, tl.sum(sum1))
    tl.store(partials + 3 * program + 2, tl.sum(sum2))


@triton.jit
def _red_finish_kernel(partials, reductions, n_partials, BLOCK: tl.constexpr):
    # Computes        reductions[b,m] = sum_p partials[b,p,m].
    # Thread mapping  grid (3 * batch): program 3 * b + m has one sum.
    # Shared memory   what tl.sum needs.
    # Accumulation    float64; order fixed by n_partials alone.
    # Preconditions   none.
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n_partials, BLOCK):
        p = first + tl.arange(0, BLOCK)
        at = 3 * (program // 3 * n_partials + p) + program % 3
        total += tl.load(partials + at, p < n_partials, 0.0)
    tl.store(reductions + program, tl.sum(total))


def red_update(
    dtype: int,
    image: Tensor,
    gradient: Tensor,
    denoised: Tensor,
    step_size: Tensor,
    tau: Tensor,
    previous: Tensor | None,
    momentum: Tensor | None,
    nonnegative: bool,
    updated: Tensor,
    extrapolated: Tensor | None,
    reductions: Tensor,
    partials: Tensor,
    n_partials: int,
    batch: int,
    n: int,
) -> None:
    """Launch the RED step; arguments as oder_fast/ops/red_update.py passes them."""
    has_momentum = previous is not None
    _red_update_kernel[(batch * n_partials,)](
        image,
        gradient,
        denoised,
        step_size,
        tau,
        previous if has_momentum else image,
        momentum if has_momentum else tau,
        updated,
        extrapolated if has_momentum else updated,
        partials,
        n_partials,
        n,
        MOMENTUM=has_momentum,
        NONNEGATIVE=nonnegative,
        BLOCK=BLOCK,
        enable_fp_fusion=True,
    )
    _red_finish_kernel[(3 * batch,)](partials, reductions, n_partials, BLOCK=BLOCK, enable_fp_fusion=True)
