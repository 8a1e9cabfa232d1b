"""Group normalization followed by PReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_prelu(
    image: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Return prelu(group_norm(image)) of `image` (B, C, H, W); half precision is computed in float32."""
    kind = torch.float32 if image.dtype in (torch.bfloat16, torch.float16) else image.dtype
    weight, bias = (None if v is None else v.to(kind) for v in (weight, bias))
    return F.prelu(F.group_norm(image.to(kind), groups, weight, bias, eps), slope.to(kind)).to(image.dtype)
