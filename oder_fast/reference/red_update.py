"""One step of regularization by denoising, with momentum and projection."""

from __future__ import annotations

import torch
from torch import Tensor


def red_update(
    image: Tensor,
    fidelity_grad: Tensor,
    denoised: Tensor,
    step_size: Tensor,
    tau: Tensor,
    previous: Tensor | None = None,
    momentum: Tensor | None = None,
    nonnegative: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (updated, extrapolated, reductions) of one step from `image` (B, ...).

    updated = image - step_size * (fidelity_grad + tau * (image - denoised)), projected on >= 0 where asked;
    extrapolated = updated + momentum * (updated - previous), `momentum` (B,); updated without `previous`;
    reductions (B, 3), float64: squared norm of updated - image, squared norm of updated, and the inner
    product of image - updated with updated - previous (0 without `previous`).
    """
    updated = image - step_size * (fidelity_grad + tau * (image - denoised))
    updated = updated.to(image.dtype)
    if nonnegative:
        updated = updated.clamp(min=0)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        return (a.detach().double() * b.detach().double())[..., None].flatten(1).sum(1)

    change = updated - image
    if previous is None or momentum is None:
        extrapolated, direction = updated, None
    else:
        direction = updated - previous
        factor = momentum.to(updated.real.dtype).reshape(-1, *[1] * (image.ndim - 1))
        extrapolated = updated + factor * direction
    restart = torch.zeros_like(inner(change, change)) if direction is None else -inner(change, direction)
    return updated, extrapolated, torch.stack([inner(change, change), inner(updated, updated), restart], 1)
