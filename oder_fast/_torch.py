"""What torch's versions force on us, one reason each."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(method: F) -> F:
    """Keep torch.compile away from a method and all that it calls: a solve looks at values."""
    # `torch.compiler.disable` at once would import the compiler, about a second, whether it is used or not.
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args, **kwargs)

    return call  # type: ignore[return-value]


def eager() -> AbstractContextManager[Any]:
    """Run compiled denoisers as they were written: their backward passes run once only, the adjoint's many times."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast away from what is no network."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Autocast:
    """The autocast that the caller had on, for the denoiser alone."""

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.enabled = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)

    def resume(self) -> AbstractContextManager[Any]:
        """Return a context in which it is on again."""
        if not self.enabled:
            return nullcontext()
        # A weight cast and kept without a graph would lose the gradient of an evaluation that wants one.
        return torch.autocast(self.device_type, self.dtype, cache_enabled=not torch.is_grad_enabled())


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
