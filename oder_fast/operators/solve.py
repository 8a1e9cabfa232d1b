"""Batches of images x with (A^H A + weight) x = rhs, by conjugate gradients: on all pixels, on some, or with x >= 0.

Each solve returns the images, and where its steps ran out, the norms of the residuals left, 0 of images that are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
Solved = tuple[Tensor, Tensor | None]

# Of one inner solve, at most: what is left then is left to the outer iteration.
MAX_STEPS = 60
# Of its residual at the start, at least.
REDUCTION = 0.1
# Rounds that do not lower the objective; near the rounding of the images a few are to be expected.
MAX_VAIN = 3
# Of the projected gradients that end one with x >= 0.
MAX_PROJECTED = 200
# Part of the residual that is left to the next round, in which other pixels are free.
UNSETTLED = 0.03
# Directions that `minimal_residuals` keeps orthogonal.
DIRECTIONS = 8


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the real inner product of each image, to be broadcast over it."""
    shape = (-1, *[1] * (a.ndim - 1))
    a, b = (torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in (a, b))
    products: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return products.reshape(shape)


def norm(a: Tensor) -> Tensor:
    """Return the norm of each image, to be broadcast over it."""
    norms: Tensor = torch.linalg.vector_norm(a.flatten(1), dim=1)
    return norms.reshape(-1, *[1] * (a.ndim - 1))


def ratio(a: Tensor, b: Tensor, going: Tensor) -> Tensor:
    """Return a / b where an image goes on and b is not 0; else 0."""
    good = going & (b != 0)
    return torch.where(good, a / torch.where(good, b, 1), 0)


def begin(x: Tensor, r: Tensor, target: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a solve starts, and its target.

    The first residual is brought down to a tenth at least: a start within the target would come back as it is, and who
    asks how far the solution is from it would be told 0. Where the residual is no number the start is none either.
    """
    size = norm(r)
    least = 4 * torch.finfo(r.dtype).eps * norm(rhs)
    return x + 0 * size, torch.minimum(target, REDUCTION * size).maximum(torch.minimum(least, target))


def conjugate_gradients(
    apply: Apply, rhs: Tensor, start: Tensor, target: Tensor, precondition: Apply, free: Tensor | None = None
) -> Solved:
    """Solve ``apply(x) = rhs`` by preconditioned conjugate gradients.

    Args:
        apply: A symmetric positive definite map of images ``(B, ...)``.
        rhs: Right-hand sides.
        start: Where to start.
        target: Norm of the residual at which an image is done, to be broadcast over it.
        precondition: An approximate inverse of `apply`, symmetric and positive definite.
        free: 1 where pixels are free; the others are 0, and their equations are left out. None for all.
    """
    x = start if free is None else start * free
    r = rhs - apply(x)
    x, target = begin(x, r if free is None else r * free, target, rhs)
    x, r, steps = _descend(apply, x, r, target, precondition, free, MAX_STEPS)
    return x, _left(norm(r if free is None else r * free), target) if steps == MAX_STEPS else None


def _left(size: Tensor, target: Tensor) -> Tensor | None:
    going = size > target
    return torch.where(going, size, 0) if bool(going.any()) else None


def _descend(
    apply: Apply,
    x: Tensor,
    r: Tensor,
    target: Tensor,
    precondition: Apply,
    free: Tensor | None,
    max_steps: int,
) -> tuple[Tensor, Tensor, int]:
    """Take steps of conjugate gradients from `x`, whose residual is `r`; return both, of all pixels, and the steps."""
    p, rz = torch.zeros_like(r), torch.ones_like(target)
    for step in range(max_steps):
        inside = r if free is None else r * free
        going = norm(inside) > target
        if not bool(going.any()):
            return x, r, step
        z = precondition(inside)
        z = z if free is None else z * free
        last, rz = rz, dot(inside, z)
        p = torch.addcmul(z, ratio(rz, last, going), p) if step else z
        q = apply(p)
        length = ratio(rz, dot(p, q), going)
        x, r = torch.addcmul(x, length, p), torch.addcmul(r, length, q, value=-1)
    return x, r, max_steps


def nonnegative(
    apply: Apply,
    rhs: Tensor,
    start: Tensor,
    target: Tensor,
    precondition: Apply,
    smallest: Tensor,
    largest: Tensor,
) -> Solved:
    r"""Minimize ``q(x) = <x, apply(x)> / 2 - <rhs, x>`` over x >= 0: conjugate gradients on the free pixels, clipped.

    A pixel is free where it is above 0 or its residual ``r = rhs - apply(x)`` would raise it; an image is done where
    the residual of its free pixels is at most `target`. Each round solves for the free pixels to a part of their
    residual, and clips the result.

    It never cycles: an image of which `MAX_VAIN` rounds have not lowered q is left to accelerated projected gradients.
    Between two images q falls by ``<x' - x, r + r'> / 2``, without cancellation. What is left after `MAX_STEPS` is left
    to the next solve, which starts from here: `x` solves the problem whose right-hand side lacks that residual.

    Args:
        apply: As of `conjugate_gradients`.
        rhs: As there.
        start: As there.
        target: As there, of the residual of the free pixels.
        precondition: As there.
        smallest: A bound from below on the eigenvalues of `apply`.
        largest: One from above.
    """
    x = start.clamp(min=0)
    r, steps = rhs - apply(x), 1
    x, target = begin(x, r * ((x > 0) | (r > 0)), target, rhs)
    vain = torch.zeros_like(target)
    while True:
        free = ((x > 0) | (r > 0)).to(x.dtype)
        size = norm(r * free)
        left = size > target
        going = left & (vain < MAX_VAIN)
        if steps >= MAX_STEPS or not bool(going.any()):
            break
        # Until the free pixels have settled, accuracy is wasted.
        rough = torch.where(going, torch.maximum(target, UNSETTLED * size), math.inf)
        new, new_r, taken = _descend(apply, x, r, rough, precondition, free, MAX_STEPS - steps)
        steps += taken
        if bool((new < 0).any()):
            new = new.clamp(min=0)
            new_r, steps = rhs - apply(new), steps + 1
            vain = vain + (going & (dot(new - x, r + new_r) <= 0))
        x, r = new, new_r
    remaining = torch.where(left, size, 0)
    lost = left & (vain >= MAX_VAIN)
    if bool(lost.any()):
        x, more = _projected_gradients(apply, rhs, x, torch.where(lost, target, math.inf), smallest, largest)
        remaining = torch.where(lost, 0 if more is None else more, remaining)
    return x, remaining if bool((remaining > 0).any()) else None


def _projected_gradients(
    apply: Apply, rhs: Tensor, x: Tensor, target: Tensor, smallest: Tensor, largest: Tensor
) -> Solved:
    """Minimize as `nonnegative`, which it ends; the error shrinks by ``1 - sqrt(smallest / largest)`` a step.

    The residual of the free pixels after a step is at most `largest` times the step's length.

    References:
        Nesterov, "Introductory lectures on convex optimization" (2004), section 2.2.
    """
    slow = (smallest / largest).sqrt()
    momentum, point = (1 - slow) / (1 + slow), x
    going = target < math.inf
    for _ in range(MAX_PROJECTED):
        new = (point + (rhs - apply(point)) / largest).clamp(min=0)
        new = torch.where(going, new, x)
        residual = largest * norm(new - point)
        going = going & (residual > target)
        point = torch.where(going, new + momentum * (new - x), new)
        x = new
        if not bool(going.any()):
            return x, None
    return x, torch.where(going, residual, 0)


def minimal_residuals(
    apply: Apply, rhs: Tensor, start: Tensor, target: Tensor, precondition: Apply, free: Tensor | None = None
) -> Solved:
    """Solve ``apply(x) = rhs`` where `apply` is not symmetric, by generalized conjugate residuals.

    For an adjoint that is not the transpose of its forward. Arguments as of `conjugate_gradients`.

    References:
        Eisenstat, Elman, Schultz, "Variational iterative methods for nonsymmetric systems of linear equations",
        SIAM J. Numerical Analysis 20 (1983).
    """

    def rest(v: Tensor) -> Tensor:
        return v if free is None else v * free

    x = rest(start)
    r = rest(rhs - apply(x))
    x, target = begin(x, r, target, rhs)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(MAX_STEPS):
        going = norm(r) > target
        if not bool(going.any()):
            return x, None
        p = rest(precondition(r))
        q = rest(apply(p))
        for older_p, older_q, square in pairs:
            share = ratio(dot(q, older_q), square, going)
            p, q = torch.addcmul(p, share, older_p, value=-1), torch.addcmul(q, share, older_q, value=-1)
        square = dot(q, q)
        pairs = [*pairs[1 - DIRECTIONS :], (p, q, square)]
        length = ratio(dot(r, q), square, going)
        x, r = torch.addcmul(x, length, p), torch.addcmul(r, length, q, value=-1)
    return x, _left(norm(r), target)
