"""The step of regularization by denoising, in one pass over memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numpy import takes_numpy
from ..reference import red_update as reference
from . import _checks, backends
from ._library import LIBRARY, call, register

# Numbers that a GPU block updates at least, before one image is split over more blocks.
PART = 4096


class RedUpdate(NamedTuple):
    """What a RED step gives.

    Attributes:
        image: The updated iterate, shape and dtype of the image.
        extrapolated: ``image + momentum * (image - previous)``; `image` itself where no momentum was asked for.
        reductions: Shape ``(B, 3)``, float64, not differentiable: squared norm of the change, squared norm of
            the updated iterate, and ``<point - image, image - previous>``, which is positive where momentum
            points uphill (the test of adaptive restart).
    """

    image: Tensor
    extrapolated: Tensor
    reductions: Tensor


LIBRARY.define(
    "red_update(Tensor image, Tensor fidelity_grad, Tensor denoised, Tensor step_size, Tensor tau, "
    "Tensor? previous, Tensor? momentum, bool nonnegative, str backend) -> (Tensor, Tensor, Tensor)"
)


def _fake(image: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate updated, extrapolated (empty without `previous`) and reductions."""
    updated = torch.empty_like(image, memory_format=torch.contiguous_format)
    extrapolated = image.new_empty(0) if args[4] is None else torch.empty_like(updated)
    return updated, extrapolated, image.new_empty(image.shape[0], 3, dtype=torch.float64)


def _impl(image: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    fidelity_grad, denoised, step_size, tau, previous, momentum, nonnegative, backend = args
    updated, extrapolated, reductions = _fake(image, *args)
    if image.numel() == 0:
        return updated, extrapolated, reductions.zero_()
    batch, length = image.shape[0], image.numel() // image.shape[0] * (2 if image.is_complex() else 1)
    parts = 0 if backend == "cpu" else min(-(-length // PART), 1024)
    backends.launch(
        "red_update",
        image,
        backend,
        _reals(image),
        _reals(fidelity_grad),
        _reals(denoised),
        step_size.to(torch.float64),
        tau.to(torch.float64),
        None if previous is None else _reals(previous),
        None if momentum is None else momentum.to(torch.float64),
        nonnegative,
        _reals(updated),
        None if previous is None else _reals(extrapolated),
        reductions,
        reductions.new_empty(batch, parts, 3) if parts else None,
        parts,
        batch,
        length,
    )
    return updated, extrapolated, reductions


def _reals(value: Tensor) -> Tensor:
    """Return a complex tensor as pairs of reals."""
    return torch.view_as_real(value) if value.is_complex() else value


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    image, fidelity_grad, denoised, step_size, tau, previous, momentum, nonnegative, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.has_previous = previous is not None
    ctx.save_for_backward(
        image, fidelity_grad, denoised, step_size, tau, momentum, output[0] if nonnegative else None
    )


def _backward(ctx: Any, grad_updated: Tensor, grad_extrapolated: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    image, fidelity_grad, denoised, step_size, tau, momentum, updated = ctx.saved_tensors
    total, grad_previous = grad_updated, None
    if ctx.has_previous:
        factor = momentum.to(total.real.dtype).reshape(-1, *[1] * (image.ndim - 1))
        total = total + (1 + factor) * grad_extrapolated
        grad_previous = -factor * grad_extrapolated
    if updated is not None:  # it was projected
        total = total * (updated > 0)
    step = step_size.to(total.real.dtype)
    weight = tau.to(total.real.dtype)
    along_prior = (total.conj() * (image - denoised)).real.sum()
    grad_step = -((total.conj() * fidelity_grad).real.sum() + weight * along_prior)
    return (
        (1 - step * weight) * total,
        -step * total,
        step * weight * total,
        grad_step.to(step_size.dtype),
        (-step * along_prior).to(tau.dtype),
        grad_previous,
        None,
        None,
        None,
    )


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, None]:
    image, fidelity_grad, denoised, step_size, tau, previous, momentum, nonnegative, _ = ctx.inputs
    along = [0 if tangent is None else tangent for tangent in tangents[:6]]
    step, weight = (v.to(image.real.dtype) for v in (step_size, tau))
    prior = along[0] - along[2] + torch.zeros_like(image)
    slope = along[1] + weight * prior + along[4] * (image - denoised)
    updated = along[0] - step * slope - along[3] * (fidelity_grad + weight * (image - denoised))
    if nonnegative:
        moved = image - step * (fidelity_grad + weight * (image - denoised))
        updated = updated * (moved > 0)
    if previous is None:
        return updated, image.new_empty(0), None
    factor = momentum.to(image.real.dtype).reshape(-1, *[1] * (image.ndim - 1))
    return updated, updated + factor * (updated - along[5]), None


register("red_update", _impl, _fake, _backward, _setup, variables=range(6), jvp=_jvp)


@takes_numpy
def red_update(
    image: Tensor,
    fidelity_grad: Tensor,
    denoised: Tensor,
    step_size: float | Tensor,
    tau: float | Tensor,
    *,
    previous: Tensor | None = None,
    momentum: float | Tensor | None = None,
    nonnegative: bool = False,
    backend: str = "auto",
) -> RedUpdate:
    r"""Take one step of regularization by denoising in a single pass over memory.

    .. math:: x^+ = P(s - \gamma (\nabla g(s) + \tau (s - D(s)))), \quad s^+ = x^+ + \beta (x^+ - x)

    The denoiser is not called here: pass its output, so that any network, and any way of differentiating it,
    can be used. `P` is the projection on :math:`x \ge 0` where asked for, else the identity.

    Args:
        image: The point `s`, shape ``(B, ...)``, real or complex.
        fidelity_grad: Gradient of the data fidelity at `s`, like `image`.
        denoised: ``D(s)``, like `image`.
        step_size: The step, float or 0-d tensor.
        tau: The weight of the prior, float or 0-d tensor.
        previous: The last iterate `x`, like `image`; given together with `momentum`.
        momentum: ``beta``, float or tensor ``(B,)``; not differentiated.
        nonnegative: Project on ``x >= 0`` (real images only).
        backend: ``"auto"`` or the name of a backend.

    Returns:
        A `RedUpdate`; `image` and `extrapolated` are differentiable any number of times in `image`,
        `fidelity_grad`, `denoised`, `step_size`, `tau` and `previous`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape or device that does not fit, or a projection of complex images.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, 2)
        >>> red_update(x, 2 * x, 0 * x, step_size=0.25, tau=1.0).image
        tensor([[[0.2500, 0.2500],
                 [0.2500, 0.2500]]])

    References:
        Romano, Elad, Milanfar, "The little engine that could: regularization by denoising (RED)",
        SIAM J. Imaging Sciences 10 (2017).
    """
    op = "red_update"
    _checks.tensor(op, "image", image)
    _checks.floating(op, "image", image, allow_complex=True)
    if image.ndim == 0:
        raise ValueError(f"{op}: image must have shape (B, ...), got ()")
    alike = {"fidelity_grad": fidelity_grad, "denoised": denoised}
    if previous is not None:
        alike["previous"] = previous
    for name, value in alike.items():
        _checks.tensor(op, name, value)
        _checks.same(op, name, value, "image", image)
        _checks.shape(op, name, value, tuple(image.shape), "that of image")
    if nonnegative and image.is_complex():
        raise ValueError(f"{op}: nonnegative needs a real image, got {image.dtype}")
    if (previous is None) != (momentum is None):
        raise ValueError(f"{op}: previous and momentum go together")
    step_size = _parameter("step_size", step_size, image.device)
    tau = _parameter("tau", tau, image.device)
    if momentum is not None:
        if not isinstance(momentum, Tensor):
            momentum = torch.tensor(float(momentum), dtype=torch.float64, device=image.device)
        momentum = momentum.expand(image.shape[0]) if momentum.ndim == 0 else momentum
        _checks.shape(op, "momentum", momentum, (image.shape[0],), "one for each image")
    chosen = backends.resolve(backend, image.device, image.dtype)
    args = (image, fidelity_grad, denoised, step_size, tau, previous, momentum, nonnegative)
    if chosen == "reference":
        return RedUpdate(*reference.red_update(*args))
    updated, extrapolated, reductions = call("red_update", *args, chosen)
    return RedUpdate(updated, updated if previous is None else extrapolated, reductions)


def _parameter(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """Return a 0-d tensor for a float or a 0-d tensor."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"red_update: {name} must be a float or a 0-d floating-point tensor, got {tuple(value.shape)} "
                f"{value.dtype}"
            )
        return value
    if not isinstance(value, (int, float)):
        raise TypeError(f"red_update: {name} must be a float or a 0-d tensor, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"red_update: {name} must be finite, got {value}")
    return torch.tensor(float(value), dtype=torch.float64, device=device)
