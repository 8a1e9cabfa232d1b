"""What a solver iterates: a plain callable, or a map that can do more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Anchor = tuple[Tensor, ...]


class Step(NamedTuple):
    """One application of a map.

    Attributes:
        image: ``T(point)``, shape ``(B, ...)``.
        extrapolated: ``image + momentum * (image - previous)``; `image` itself without momentum.
        reductions: float64, shape ``(B, 3)``: squared norm of ``image - point``, squared norm of ``image``,
            and ``<point - image, image - previous>`` (0 without momentum).
        anchor: What an evaluation with all blocks leaves for the minibatches after it.
        error: Of a map that is itself computed by iteration and fell short of the accuracy asked for: a bound on the
            relative error of `image`, shape ``(B,)``; else None.
    """

    image: Tensor
    extrapolated: Tensor
    reductions: Tensor
    anchor: Anchor = ()
    error: Tensor | None = None


class Calls(NamedTuple):
    """How often a solve called what it is made of, for the whole batch at a time.

    Attributes:
        denoiser: Calls of the denoiser, or products with its transposed derivative.
        operator: Calls of the normal operator :math:`A^H A`; a minibatch counts as its share of the blocks.
    """

    denoiser: int = 0
    operator: float = 0.0


class FixedPointMap:
    """A map T on batches of images. Define the call; all else has a default.

    Attributes:
        stochastic: Whether `draw` gives minibatches.
        variance_reduced: Whether the minibatches' noise vanishes at the fixed point.
        requires_grad: Whether anything that the map depends on needs a gradient.
        gain: The distance from the fixed point is at least this many residuals where nothing contracts the error
            further: 1 for a map whose residual is a step towards the fixed point, more for one of short steps.
        rounding: Of what is computed in less than the precision of the images; 0 where nothing is.
        advice: What to change where the iteration does not converge.
        shortage: What to change where the map falls short of the accuracy asked for.
    """

    stochastic: bool = False
    variance_reduced: bool = False
    requires_grad: bool = True
    gain: float = 1.0
    rounding: float = 0.0
    advice: str = "iterate a map that contracts"
    shortage: str = "evaluate the map more accurately"

    def __call__(self, point: Tensor) -> Tensor:
        """Return ``T(point)``, shape ``(B, ...)``."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(point)")

    def step(
        self,
        point: Tensor,
        accuracy: Tensor | None = None,
        previous: Tensor | None = None,
        momentum: Tensor | None = None,
        blocks: Tensor | None = None,
        anchor: Anchor = (),
    ) -> Step:
        """Apply the map, then extrapolate from `previous`.

        Args:
            point: Shape ``(B, ...)``.
            accuracy: The last relative residual of each image, shape ``(B,)``: a map that is itself computed by
                iteration needs to be a good deal more accurate than that. None at the first evaluation.
            previous: The image to extrapolate from.
            momentum: Shape ``(B,)``.
            blocks: A minibatch from `draw`; None for all blocks.
            anchor: From the last evaluation with all blocks.
        """
        return self.finish(self(point), point, previous, momentum)

    def finish(
        self,
        image: Tensor,
        point: Tensor,
        previous: Tensor | None,
        momentum: Tensor | None,
        anchor: Anchor = (),
    ) -> Step:
        """Return the step to `image`, extrapolated, with its reductions."""
        change = image - point
        norms = [inner(change, change), inner(image, image)]
        if previous is None or momentum is None:
            reductions = torch.stack([*norms, torch.zeros_like(norms[0])], 1)
            return Step(image, image, self.agree(reductions), anchor)
        direction = image - previous
        uphill = -inner(change, direction)
        extrapolated = image + per_image(momentum, image) * direction
        return Step(image, extrapolated, self.agree(torch.stack([*norms, uphill], 1)), anchor)

    def agree(self, reductions: Tensor) -> Tensor:
        """Return the reductions that decide, where the map is evaluated in several processes at once."""
        return reductions

    def draw(self) -> Tensor:
        """Draw a minibatch of blocks; only of a stochastic map."""
        raise NotImplementedError(f"{type(self).__name__} has no minibatches")

    def calls(self) -> Calls:
        """Return what the evaluations so far have cost."""
        return Calls()

    def solving(self) -> AbstractContextManager[None]:
        """Return a context for a solve without gradients, in which the map stays the same."""
        return nullcontext()

    def linearize(self, point: Tensor) -> Linearization:
        """Linearize the map at a fixed point.

        Args:
            point: Shape ``(B, ...)``, without a graph.
        """
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            output = self(leaf)

        def adjoint(gradient: Tensor) -> FixedPointMap:
            return Plain(lambda u: vjp(output, leaf, u) + gradient, self.advice)

        return Linearization(output, adjoint, lambda gradient: gradient)


@dataclass(frozen=True)
class Linearization:
    r"""A fixed-point equation :math:`F(x, \theta) = 0` near its solution, as implicit differentiation needs it.

    .. math:: \nabla_\theta \ell = (\partial_\theta F)^H u, \qquad -(\partial_x F)^H u = \nabla_x \ell

    Attributes:
        balance: A tensor whose derivative in the parameters is that of :math:`F` at the solution. Only this
            tensor's derivatives are used; its value need not be that of F.
        adjoint: Turns the gradient in the solution into the map whose fixed point is `u`.
        jacobian_free: Turns the gradient into the first guess of `u`, as if the denoiser were constant.
    """

    balance: Tensor
    adjoint: Callable[[Tensor], FixedPointMap]
    jacobian_free: Callable[[Tensor], Tensor]


class Plain(FixedPointMap):
    """A callable ``x -> T(x)`` as a map."""

    def __init__(self, function: Callable[[Tensor], Tensor], advice: str = FixedPointMap.advice) -> None:
        self.function = function
        self.advice = advice

    def __call__(self, point: Tensor) -> Tensor:
        """Return ``T(point)``."""
        return self.function(point)


class Checkpointed(FixedPointMap):
    """A map whose graph keeps the points alone; the rest is computed again in the backward pass."""

    def __init__(self, inner_map: FixedPointMap) -> None:
        self.inner_map = inner_map
        self.stochastic = inner_map.stochastic
        self.variance_reduced = inner_map.variance_reduced
        self.gain, self.rounding = inner_map.gain, inner_map.rounding
        self.advice, self.shortage = inner_map.advice, inner_map.shortage
        self.draw = inner_map.draw  # type: ignore[method-assign]
        self.calls = inner_map.calls  # type: ignore[method-assign]
        self.agree = inner_map.agree  # type: ignore[method-assign]

    def step(
        self,
        point: Tensor,
        accuracy: Tensor | None = None,
        previous: Tensor | None = None,
        momentum: Tensor | None = None,
        blocks: Tensor | None = None,
        anchor: Anchor = (),
    ) -> Step:
        """Apply the map under `torch.utils.checkpoint`."""
        arguments = (point, accuracy, previous, momentum, blocks, anchor)
        step: Step = checkpoint(self.inner_map.step, *arguments, use_reentrant=False)
        return step


def as_map(function: FixedPointMap | Callable[[Tensor], Tensor]) -> FixedPointMap:
    """Return a map of a callable."""
    return function if isinstance(function, FixedPointMap) else Plain(function)


def vjp(output: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    """Return the vector-Jacobian product of `output` in `leaf`, and keep the graph."""
    if not output.requires_grad:
        return torch.zeros_like(v)
    (gradient,) = torch.autograd.grad(output, leaf, v, retain_graph=True, allow_unused=True)
    return torch.zeros_like(v) if gradient is None else gradient


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Return values ``(B,)`` in the real dtype of `like` (as they are where it is bool), to be broadcast."""
    values = values if values.dtype == torch.bool else values.to(like.real.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the real inner product of each image, float64, shape ``(B,)``, without a graph."""
    a, b = (torch.view_as_real(v.detach().resolve_conj()) if v.is_complex() else v.detach() for v in (a, b))
    return (a.double() * b.double()).flatten(1).sum(1)
