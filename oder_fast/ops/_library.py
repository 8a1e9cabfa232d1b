"""The torch library `oder_fast`, where every operator registers its kernel, fake kernel and vjp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("oder_fast", "DEF")


def contiguous(args: Sequence[Any]) -> list[Any]:
    """Return arguments with every tensor contiguous."""
    return [_contiguous(a) if isinstance(a, Tensor) else a for a in args]


def _contiguous(value: Tensor) -> Tensor:
    if value.dtype == torch.complex32:  # torch warns of every new tensor of this dtype
        return torch.view_as_complex(torch.view_as_real(value).contiguous())
    return value.contiguous()


def register(
    name: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup: Callable[..., Any],
    *,
    any_strides: bool = False,
) -> None:
    """Register one operator that `LIBRARY.define` has declared, for CPU and CUDA tensors.

    Compiled code reads tensors by address, so `impl` is given contiguous ones, whatever views callers pass and autograd
    sends back; with `any_strides` it takes them as they come. Pending conjugations, negations and zeros are torch's:
    it resolves them before it calls a kernel.
    """
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, impl if any_strides else lambda *args: impl(*contiguous(args)), key)
    torch.library.register_fake(f"oder_fast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"oder_fast::{name}", backward, setup_context=setup, lib=LIBRARY)
