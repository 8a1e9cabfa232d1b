"""The torch library `oder_fast`, where every operator registers its kernel, fake kernel and derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks

LIBRARY = torch.library.Library("oder_fast", "DEF")
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_VARIABLES: dict[str, Sequence[int]] = {}


def call(name: str, *args: Any) -> Any:
    """Call a registered operator, also within transforms of `torch.func` and with forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.oder_fast, name)(*args)
    if forward_ad._current_level >= 0:
        for k, value in enumerate(args):
            if k not in _VARIABLES[name] and isinstance(value, Tensor):
                _checks.constant(name, f"argument {k}", value)
    elif not torch._C._are_functorch_transforms_active():
        return getattr(torch.ops.oder_fast, name)(*args)
    return _FUNCTIONS[name].apply(*args)


def compute(name: str, args: Sequence[Any], backend: str, reference: Any) -> Any:
    """Compute an operator by its function in the module `reference`, or by a kernel."""
    return getattr(reference, name)(*args) if backend == "reference" else call(name, *args, backend)


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
    setup: Callable[..., Any] | None = None,
    *,
    variables: Sequence[int] = (0,),
    jvp: Callable[..., Any] | None = None,
) -> None:
    """Register one operator that `LIBRARY.define` has declared, for CPU and CUDA tensors.

    Compiled code reads tensors by address, so `impl` is given contiguous ones, whatever views callers pass and autograd
    sends back. Pending conjugations, negations and zeros are torch's: it resolves them before it calls a kernel.

    Args:
        name: Of the operator.
        impl: Allocates the result, and launches a kernel.
        fake: Allocates the result.
        backward: The vjp, from ``ctx`` and the gradients; made of `call`, so that it can be differentiated again.
        setup: Keeps what `backward` needs; by default everything, for `restored`, but of the `variables` only whether
            they are there.
        variables: Positions of the tensors in which, together, the operator is linear; the others have no derivative.
        jvp: From ``ctx`` and the tangents to those of the results, where it is not linear.
    """

    def keep_the_rest(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _keep(ctx, [a is not None if k in variables else a for k, a in enumerate(inputs)])

    setup = setup or keep_the_rest
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, lambda *args: impl(*contiguous(args)), key)
    torch.library.register_fake(f"oder_fast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"oder_fast::{name}", backward, setup_context=setup, lib=LIBRARY)

    def keep_for_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup(ctx, inputs, output)
        ctx.inputs = inputs

    def along(ctx: Any, *tangents: Tensor | None) -> Any:
        args = list(ctx.inputs)
        for k in variables:
            if args[k] is not None:
                args[k] = torch.zeros_like(args[k]) if tangents[k] is None else tangents[k]
        return call(name, *args)

    def one_by_one(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            call(
                name, *(a.select(d, k) if isinstance(d, int) else a for a, d in zip(args, dims, strict=True))
            )
            for k in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    methods = {
        "forward": lambda *args: getattr(torch.ops.oder_fast, name)(*args),
        "setup_context": keep_for_both,
        "backward": backward,
        "jvp": jvp or along,
        "vmap": one_by_one,
    }
    _VARIABLES[name] = variables
    _FUNCTIONS[name] = type(
        name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in methods.items()}
    )


def register_linear(
    name: str, impl: Callable[..., Any], fake: Callable[..., Any], transpose: str, of: Callable[..., Any]
) -> None:
    """Register an operator that is linear in its first argument, and the operator `transpose` as its vjp.

    Args:
        name: Of the operator.
        impl: As of `register`.
        fake: As of `register`.
        transpose: Name of the operator that is the transpose.
        of: From this one's arguments to those of the transpose after the first.
    """

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return call(transpose, grad, *restored(ctx)), *[None] * (ctx.n_inputs - 1)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.n_inputs = len(inputs)
        _keep(ctx, of(*inputs))

    register(name, impl, fake, backward, setup)


def _keep(ctx: Any, args: Sequence[Any]) -> None:
    ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))
    ctx.others = [None if isinstance(a, Tensor) else (a,) for a in args]


def restored(ctx: Any) -> list[Any]:
    """Return what was kept for a vjp."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]
