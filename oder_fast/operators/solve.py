"""Batches of images x with (A^H A + weight) x = rhs, by conjugate gradients: on all pixels, on some, or with x >= 0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]

# Of one inner solve, at most: what is left then is left to the outer iteration.
MAX_STEPS = 60
# Of its residual at the start, at least.
REDUCTION = 0.1
# Of fixing pixels at 0 and freeing them.
MAX_ROUNDS = 12
# Directions that `minimal_residuals` keeps orthogonal.
DIRECTIONS = 8


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the real inner product of each image, to be broadcast over it."""
    shape = (-1, *[1] * (a.ndim - 1))
    a, b = (torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in (a, b))
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).reshape(shape)


def norm(a: Tensor) -> Tensor:
    """Return the norm of each image, to be broadcast over it."""
    return torch.linalg.vector_norm(a.flatten(1), dim=1).reshape(-1, *[1] * (a.ndim - 1))


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
) -> Tensor:
    """Solve ``apply(x) = rhs`` by preconditioned conjugate gradients.

    Args:
        apply: A symmetric positive definite map of images ``(B, ...)``.
        rhs: Right-hand sides.
        start: Where to start.
        target: Norm of the residual at which an image is done, to be broadcast over it.
        precondition: An approximate inverse of `apply`, symmetric and positive definite.
        free: 1 where pixels are free; the others are 0, and their equations are left out. None for all.
    """
    rest = (lambda v: v) if free is None else (lambda v: v * free)
    x = rest(start)
    r = rest(rhs - apply(x))
    x, target = begin(x, r, target, rhs)
    p, rz = torch.zeros_like(r), torch.ones_like(target)
    for step in range(MAX_STEPS + 1):
        going = norm(r) > target
        if step == MAX_STEPS or not bool(going.any()):
            break
        z = rest(precondition(r))
        last, rz = rz, dot(r, z)
        p = torch.addcmul(z, ratio(rz, last, going), p) if step else z
        q = rest(apply(p))
        length = ratio(rz, dot(p, q), going)
        x, r = torch.addcmul(x, length, p), torch.addcmul(r, length, q, value=-1)
    return x


def nonnegative(
    apply: Apply, rhs: Tensor, start: Tensor, target: Tensor, precondition: Apply
) -> Tensor:
    """Minimize ``<x, apply(x)> / 2 - <rhs, x>`` over x >= 0: conjugate gradients on the free pixels, clipped, repeated.

    A pixel is free where it is above 0 or its gradient would raise it. Conjugate gradients on the free pixels keep the
    residual of all; where clipping changes an image, its gradient is computed anew and some pixels change sides.
    """
    x = start.clamp(min=0)
    r = rhs - apply(x)
    x, target = begin(x, r, target, rhs)
    for round_ in range(MAX_ROUNDS):
        free = ((x > 0) | (r > 0)).to(x.dtype)
        initial = norm(r * free)
        if not bool((initial > target).any()):
            break
        # Until the free pixels have settled, accuracy is wasted.
        enough = torch.maximum(target, 0.1 * initial) if round_ < MAX_ROUNDS // 2 else target
        p, rz = torch.zeros_like(r), torch.ones_like(target)
        for step in range(MAX_STEPS):
            inside = r * free
            going = norm(inside) > enough
            if not bool(going.any()):
                break
            z = precondition(inside) * free
            last, rz = rz, dot(inside, z)
            p = torch.addcmul(z, ratio(rz, last, going), p) if step else z
            q = apply(p)
            length = ratio(rz, dot(p, q), going)
            x, r = torch.addcmul(x, length, p), torch.addcmul(r, length, q, value=-1)
        if bool((x < 0).any()):
            x = x.clamp(min=0)
            r = rhs - apply(x)
    return x


def minimal_residuals(
    apply: Apply, rhs: Tensor, start: Tensor, target: Tensor, precondition: Apply, free: Tensor | None = None
) -> Tensor:
    """Solve ``apply(x) = rhs`` where `apply` is not symmetric, by generalized conjugate residuals.

    For an adjoint that is not the transpose of its forward. Arguments as of `conjugate_gradients`.

    References:
        Eisenstat, Elman, Schultz, "Variational iterative methods for nonsymmetric systems of linear equations",
        SIAM J. Numerical Analysis 20 (1983).
    """
    rest = (lambda v: v) if free is None else (lambda v: v * free)
    x = rest(start)
    r = rest(rhs - apply(x))
    x, target = begin(x, r, target, rhs)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(MAX_STEPS):
        going = norm(r) > target
        if not bool(going.any()):
            break
        p = rest(precondition(r))
        q = rest(apply(p))
        for older_p, older_q, square in pairs:
            share = ratio(dot(q, older_q), square, going)
            p, q = torch.addcmul(p, share, older_p, value=-1), torch.addcmul(q, share, older_q, value=-1)
        square = dot(q, q)
        pairs = [*pairs[1 - DIRECTIONS :], (p, q, square)]
        length = ratio(dot(r, q), square, going)
        x, r = torch.addcmul(x, length, p), torch.addcmul(r, length, q, value=-1)
    return x
