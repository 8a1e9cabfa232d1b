"""The torch library `oder_fast`, where every operator registers its kernel, fake kernel and vjp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("oder_fast", "DEF")


def register(
    name: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup: Callable[..., Any],
) -> None:
    """Register one operator that `LIBRARY.define` has declared, for CPU and CUDA tensors."""
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, impl, key)
    torch.library.register_fake(f"oder_fast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"oder_fast::{name}", backward, setup_context=setup, lib=LIBRARY)
