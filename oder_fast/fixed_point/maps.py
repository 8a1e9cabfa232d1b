"""What a solver iterates: a plain callable, or a map that can do more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Step(NamedTuple):
    """One application of a map.

    Attributes:
        image: ``T(point)``, shape ``(B, ...)``.
        extrapolated: ``image + momentum * (image - previous)``; `image` itself without momentum.
        reductions: float64, shape ``(B, 3)``: squared norm of ``image - point``, squared norm of ``image``,
            and ``<point - image, image - previous>`` (0 without momentum).
    """

    image: Tensor
    extrapolated: Tensor
    reductions: Tensor


class Hidden:
    """What evaluations of a map have in common beside their arguments, and a CUDA graph has to know.

    Attributes:
        carried: Tensors that one evaluation leaves for the next ones; can be set to copies of them.
        generators: That minibatches are drawn from on a GPU, beside torch's default one.
        obstacle: Why an evaluation, the drawing included, cannot be captured.
    """

    carried: tuple[Tensor, ...] = ()
    generators: tuple[torch.Generator, ...] = ()
    obstacle: str | None = None


class FixedPointMap:
    """A map T on batches of images. Define the call; all else has a default.

    Attributes:
        stochastic: Whether `draw` gives a minibatch's map instead of this one.
        variance_reduced: Whether the minibatches' noise vanishes at the fixed point. Such a map is evaluated
            itself before the first draw, and again now and then.
        requires_grad: Whether anything that the map depends on needs a gradient.
        advice: What to change where the iteration does not converge.
        hidden: What evaluations have in common beside their arguments.
    """

    stochastic: bool = False
    variance_reduced: bool = False
    requires_grad: bool = True
    advice: str = "iterate a map that contracts"
    hidden: Hidden = Hidden()

    def __call__(self, point: Tensor) -> Tensor:
        """Return ``T(point)``, shape ``(B, ...)``."""
        raise NotImplementedError

    def step(self, point: Tensor, previous: Tensor | None = None, momentum: Tensor | None = None) -> Step:
        """Apply the map, then extrapolate from `previous` by `momentum`, shape ``(B,)``."""
        image = self(point)
        change = inner(image - point, image - point)
        norm = inner(image, image)
        if previous is None or momentum is None:
            return Step(image, image, self.agree(torch.stack([change, norm, torch.zeros_like(norm)], 1)))
        direction = image - previous
        uphill = inner(point - image, direction)
        extrapolated = image + per_image(momentum, image) * direction
        return Step(image, extrapolated, self.agree(torch.stack([change, norm, uphill], 1)))

    def agree(self, reductions: Tensor) -> Tensor:
        """Return the reductions that decide, where the map is evaluated in several processes at once."""
        return reductions

    def draw(self) -> FixedPointMap:
        """Return the map of one fresh minibatch, which does not change from call to call."""
        return self

    def select(self, images: Tensor) -> FixedPointMap | None:
        """Return the map of some images of the batch alone; None where they cannot be told apart."""
        return None

    def solving(self) -> AbstractContextManager[None]:
        """Return a context for a solve without gradients, in which the map stays the same."""
        return nullcontext()

    def recomputing(self) -> AbstractContextManager[None]:
        """Return a context that a checkpointed step is computed again in."""
        return nullcontext()

    def linearize(self, point: Tensor, minibatch_size: int | str | None) -> Linearization:
        """Evaluate the map once at `point`, with the graph to everything else it depends on.

        Args:
            point: Shape ``(B, ...)``, without a graph.
            minibatch_size: Blocks in a minibatch of the adjoint; ``"same"`` as this map's, None for all.
        """
        if minibatch_size not in (None, "same"):
            raise ValueError(
                f"Implicit: this map has no minibatches, but minibatch_size is {minibatch_size!r}"
            )
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            output = self(leaf)

        return Linearization(output, Plain(lambda v: vjp(output, leaf, v), self.advice))


@dataclass(frozen=True)
class Linearization:
    r"""A map near a point :math:`x`, as implicit differentiation needs it.

    Attributes:
        output: :math:`T(x)` with the graph to everything the map depends on.
        transposed: The linear map :math:`v \mapsto T'(x)^H v`, which may draw minibatches of its own.
    """

    output: Tensor
    transposed: FixedPointMap


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
        self.advice = inner_map.advice

    def __call__(self, point: Tensor) -> Tensor:
        """Return ``T(point)``."""
        return self.step(point).image

    def step(self, point: Tensor, previous: Tensor | None = None, momentum: Tensor | None = None) -> Step:
        """Apply the map under `torch.utils.checkpoint`."""
        step: Step = checkpoint(
            self.inner_map.step,
            point,
            previous,
            momentum,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), self.inner_map.recomputing()),
        )
        return step

    def draw(self) -> FixedPointMap:
        """Return a minibatch's map, checkpointed; it uses the same minibatch when computed again."""
        return Checkpointed(self.inner_map.draw())

    def select(self, images: Tensor) -> FixedPointMap | None:
        """Return the map of some images, checkpointed."""
        selected = self.inner_map.select(images)
        return None if selected is None else Checkpointed(selected)


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
    """Return values ``(B,)`` in the real dtype of `like`, to be broadcast over its images."""
    return values.to(like.real.dtype).reshape(-1, *[1] * (like.ndim - 1))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the real inner product of each image, float64, shape ``(B,)``, without a graph."""
    a, b = (torch.view_as_real(v.detach().resolve_conj()) if v.is_complex() else v.detach() for v in (a, b))
    return (a.double() * b.double()).flatten(1).sum(1)
