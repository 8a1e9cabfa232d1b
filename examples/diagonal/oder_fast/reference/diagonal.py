"""Pixels weighted by a mask."""

from __future__ import annotations

from torch import Tensor


def diagonal(image: Tensor, mask: Tensor) -> Tensor:
    """Return mask * image for images (B, H, W) and a mask (H, W)."""
    return mask * image
