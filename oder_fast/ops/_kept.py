"""Tensors that outlive the call they are made in."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of one made under `torch.inference_mode`.

    Such a tensor can take no part in a derivative for as long as it lives: what is kept for later calls goes through
    here.

    Example:
        >>> import torch
        >>> with torch.inference_mode():
        ...     ones = torch.ones(1)
        ...     copied = kept(ones)
        >>> ones.is_inference(), copied.is_inference()
        (True, False)
    """
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
