"""What torch's versions force on us, one reason each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Contiguous(torch.autograd.Function):
    """Make a tensor contiguous, and each derivative that comes back through here too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Contiguous.apply(grad)  # type: ignore[no-untyped-call]


def fft(
    transform: Callable[..., Tensor],
    value: Tensor,
    axes: tuple[int, ...] = (-2, -1),
    size: Sequence[int] | None = None,
    norm: str = "ortho",
) -> Tensor:
    """Apply one of `torch.fft`'s transforms, over contiguous memory with the axes at the end.

    With MKL on some processors a transform over several axes writes past its buffers where an axis left out lies
    innermost in memory: in what einsum returns, in a contiguous tensor transformed over its first axes. Derivatives
    are transforms too, so the gradients that come back are made contiguous as well.

    Args:
        transform: `torch.fft.fftn`, `ifftn`, `rfftn` or `irfftn`.
        value: The tensor.
        axes: To transform over, counted from the end.
        size: Of the axes to transform over, as the functions of `torch.fft` take it.
        norm: As there.
    """
    last = tuple(range(-len(axes), 0))
    moved = _Contiguous.apply(value.movedim(axes, last))  # type: ignore[no-untyped-call]
    result: Tensor = _Contiguous.apply(transform(moved, size, last, norm))  # type: ignore[no-untyped-call]
    return result.movedim(last, axes)
