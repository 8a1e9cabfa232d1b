"""Extreme eigenvalues of linear maps that are known by what they do to a vector, for each image of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What is left after orthogonalization is rounding below this many times the precision.
ROUNDING = 100

Spectrum = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]


def arnoldi(
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    spectrum: Spectrum,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Approximate eigenvalues of a linear map on real images in its Krylov space of `start`.

    Arnoldi's iteration, every vector orthogonalized twice against all before: :math:`M Q = Q H + \beta\, q\, e^T`.
    For a symmetric map this is Lanczos' iteration, which needs far fewer products than a power iteration.

    Args:
        apply: The map, from ``(B, ...)`` to the same, each image for itself.
        start: Random vectors, shape ``(B, ...)``.
        spectrum: `symmetric`, `largest` or `modulus`.
        iterations: Largest number of products.
        tolerance: Stop where all residuals are at most this share of the eigenvalue of largest modulus.

    Returns:
        The eigenvalues of each image, float64, shape ``(B, n)``; the norms :math:`\| M q - \theta q \|` of
        their residuals relative to the largest modulus, as `tolerance` is; and the eigenvector of the last eigenvalue,
        its real part of norm 1 where it is complex, shape ``(B, ...)``.
    """
    batch, size = start.shape[0], start[0].numel()
    steps = min(iterations, size)
    eps = torch.finfo(start.dtype).eps
    flat = start.flatten(1)
    basis = flat.new_zeros(batch, steps, size)
    basis[:, 0] = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    # The last row of H holds beta.
    projected = torch.zeros(batch, steps + 1, steps, dtype=torch.float64)
    dimension = [steps] * batch
    for step in range(steps):
        image = apply(basis[:, step].reshape(start.shape)).reshape(batch, size)
        length = torch.linalg.vector_norm(image, dim=1)
        if not bool(length.isfinite().all()):
            raise ValueError(
                f"the derivative of the map is not finite at image {int((~length.isfinite()).nonzero()[0])}"
            )
        known = basis[:, : step + 1]
        for _ in range(2):
            coefficients = torch.einsum("bkn,bn->bk", known, image)
            image = image - torch.einsum("bk,bkn->bn", coefficients, known)
            projected[:, : step + 1, step] += coefficients.double().cpu()
        beta = torch.linalg.vector_norm(image, dim=1)
        beta = torch.where(beta <= ROUNDING * eps * length, 0, beta)
        projected[:, step + 1, step] = beta.double().cpu()
        values, errors = [], []
        coordinates = flat.new_zeros(batch, steps)
        for b in range(batch):
            if projected[b, step + 1, step] == 0:
                dimension[b] = min(dimension[b], step + 1)
            n = min(dimension[b], step + 1)
            found = spectrum(projected[b, :n, :n], float(projected[b, n, n - 1]))
            values.append(found[0])
            errors.append(found[1])
            coordinates[b, :n] = (found[2] / torch.linalg.vector_norm(found[2])).to(coordinates)
        theta = torch.stack(values)
        residual = torch.stack(errors)
        largest = theta.abs().amax(1, keepdim=True)
        relative = torch.where(largest > 0, residual / largest, residual)
        if step + 1 == steps or bool((relative <= tolerance).all()):
            break
        basis[:, step + 1] = torch.where(beta[:, None] > 0, image / beta[:, None], 0)
    return theta, relative, torch.einsum("bk,bkn->bn", coordinates, basis).reshape(start.shape)


def random_like(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return normal random numbers, drawn where the generator lives."""
    device = images.device if generator is None else generator.device
    drawn = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=device)
    return drawn.to(images.device)


def symmetric(projected: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest and the largest eigenvalue of a symmetric map, their residuals, and the last's vector."""
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    return values[[0, -1]], beta * vectors[-1, [0, -1]].abs(), vectors[:, -1]


def largest(projected: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest eigenvalue of a symmetric map, its residual, and its vector."""
    values, errors, vector = symmetric(projected, beta)
    return values[1:], errors[1:], vector


def modulus(projected: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest modulus of an eigenvalue of any map, its residual, and the real part of its vector."""
    values, vectors = torch.linalg.eig(projected)
    top = values.abs().argmax()
    return values[top].abs()[None], beta * vectors[-1, top].abs()[None], vectors[:, top].real
