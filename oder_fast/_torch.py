"""What torch forces on us, a reason each."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

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
