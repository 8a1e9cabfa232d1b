"""What torch.compile is to leave alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def _disable(function: F, recursive: bool) -> F:
    # `torch.compiler.disable` as a decorator would import the compiler, about a second, whether it is used or not.
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, recursive=recursive))
        return disabled[0](*args, **kwargs)

    return call  # type: ignore[return-value]


def untraced(function: F) -> F:
    """Keep torch.compile from tracing a function that loops and looks at values; what it calls is compiled."""
    return _disable(function, recursive=False)


def bookkeeping(function: F) -> F:
    """Keep torch.compile away from a function and all that it calls."""
    return _disable(function, recursive=True)
