"""Triton backend of diagonal."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _diagonal_kernel(image, mask, data, n, count, BLOCK: tl.constexpr):
    # Computes        data[b,k] = mask[k] * image[b,k].
    # Thread mapping  grid (ceil(count / BLOCK)): a program has BLOCK pixels.
    # Shared memory   none.
    # Accumulation    none; products in float32.
    # Preconditions   contiguous; one dtype (checked by the caller).
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    weights = tl.load(mask + at % n, inside).to(tl.float32)
    product = weights * tl.load(image + at, inside).to(tl.float32)
    tl.store(data + at, product.to(data.dtype.element_ty), inside)


def diagonal(dtype: int, image: Tensor, mask: Tensor, data: Tensor, batch: int, n: int) -> None:
    """Launch the kernel; arguments as oder_fast/ops/diagonal.py passes them."""
    count = batch * n
    _diagonal_kernel[(triton.cdiv(count, BLOCK),)](image, mask, data, n, count, BLOCK=BLOCK)
