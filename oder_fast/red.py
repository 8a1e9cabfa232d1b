"""The two maps whose fixed points DEQRED finds, and their adjoint equation."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .denoisers.call import ImageDenoiser
from .fixed_point import Calls, FixedPointMap, Linearization, Step
from .fixed_point.maps import Anchor, vjp
from .operators import LeastSquares, MeasurementOperator

# Share of the outer residual that the inner solve is more accurate by, and the residual that counts at the start.
INNER, FIRST = 0.1, 0.1
# Times that the minibatches of an inner solve go through the measurements.
EPOCHS = 4


@dataclass(frozen=True)
class ProximalStep:
    r"""The proximal form: each iteration solves for the image that fits data and denoised image best.

    .. math:: T(x) = \arg\min_u \tfrac12 \|A u - y\|^2 + \tfrac{\tau}{2} \|u - D(x)\|^2
        = (A^H A + \tau)^{-1} (A^H y + \tau D(x))

    The denoiser alone limits how fast it converges: in tens of calls. The inner solve stops at a tenth of the outer
    residual and starts at the last iterate.

    Args:
        minibatch_size: Blocks of a minibatch that the inner solve takes steps with, variance-reduced and anchored at
            the outer iterate; None to solve with all blocks by conjugate gradients, or in closed form. See
            `ProximalMap` for where minibatches pay.

    Raises:
        ValueError: For a minibatch of no blocks.
    """

    minibatch_size: int | None = None

    def __post_init__(self) -> None:
        _check_size("ProximalStep", self.minibatch_size)


@dataclass(frozen=True)
class GradientStep:
    r"""The gradient form, as RED and ODER were published: each iteration takes a step along the gradient.

    .. math:: T(x) = P \bigl( x - \gamma (\nabla g(x) + \tau (x - D(x))) \bigr)

    Args:
        step_size: :math:`\gamma` in units of :math:`1 / \|A\|^2`; a float, a 0-d tensor or a parameter to be trained.
            None for :math:`1 / (1 + 2 \tau)`, with which the map is averaged if `D` is nonexpansive; with minibatches
            the operator's ``minibatch_norm_squared(size)`` then takes the place of :math:`\|A\|^2`.
        minibatch_size: Blocks per iteration (views, coils, illuminations); None for all of them.
        variance_reduction: Let each minibatch correct the last full gradient (taken every ``solver.check_every``
            iterations), so that its noise vanishes at the fixed point and the solve converges like one with all
            blocks. False: the minibatch's gradient itself, as ODER was published, whose noise is a floor under the
            error; the solver's `tail` then lowers it.

    Raises:
        ValueError: For a minibatch of no blocks.
    """

    step_size: float | Tensor | None = None
    minibatch_size: int | None = None
    variance_reduction: bool = True

    def __post_init__(self) -> None:
        _check_size("GradientStep", self.minibatch_size)


def _check_size(name: str, size: Any) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"{name}: minibatch_size must be a whole number above 0 or None, got {size!r}")


@dataclass
class REDMap(FixedPointMap):
    r"""What both forms share: the equation of their fixed point.

    .. math:: A^H A x - r + w (x - D(x)) = 0

    with :math:`r = A^H y` and the denoiser in the forward pass, and :math:`r` the gradient in the solution and the
    transposed derivative of the denoiser in the adjoint pass.

    Attributes:
        fidelity: The data fidelity.
        denoise: The denoiser `D`, or its transposed derivative.
        weight: `w`, 0-d, float64.
        source: The gradient `r` of the adjoint pass; None in the forward pass.
        nonnegative: Whether the solution is constrained to x >= 0.
        free: 1 where a pixel of the adjoint solution is free, 0 where the constraint is active; None for all.
        generator: Of the minibatches.
    """

    fidelity: LeastSquares
    denoise: ImageDenoiser
    weight: Tensor
    source: Tensor | None = None
    nonnegative: bool = False
    free: Tensor | None = None
    generator: torch.Generator | None = None

    advice = "lower tau, or take a denoiser that contracts (spectral norms, more training)"

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether the weights, the data or a parameter need a gradient; assumed of a mere function."""
        return self.denoise.requires_grad or self.weight.requires_grad or self.fidelity.y.requires_grad

    @property
    def rounding(self) -> float:  # type: ignore[override]
        """That of the denoiser, under autocast."""
        return self.denoise.rounding

    def __call__(self, point: Tensor) -> Tensor:
        """Return ``T(point)``."""
        return self.step(point).image

    def denoised(self, point: Tensor) -> Tensor:
        """Return ``D(point)``, in all processes that of the first: they must take the same steps."""
        denoised = self.denoise(point)
        agreed = self.fidelity.operator.agree(denoised)
        if agreed is denoised or not denoised.requires_grad:
            return agreed
        return denoised + (agreed - denoised.detach())

    def agree(self, reductions: Tensor) -> Tensor:
        """Return the reductions that decide in all processes."""
        return self.fidelity.operator.agree(reductions)

    def calls(self) -> Calls:
        """Return what the evaluations so far have cost."""
        return Calls(self.denoise.calls, self.fidelity.calls)

    def solving(self) -> AbstractContextManager[None]:
        """Return the denoiser's context for a solve without gradients."""
        return self.denoise.solving()

    def residual(self, point: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Return the data's part of the equation, ``A^H A x - r``, or an estimate from a minibatch."""
        if self.source is None:
            return self.fidelity.gradient(point, blocks)
        return self._masked(self.fidelity.normal(point, blocks) - self.source)

    def draw(self) -> Tensor:
        """Draw a minibatch of blocks."""
        size = self._minibatch_size
        assert size is not None
        return self.fidelity.operator.draw_blocks(size, self.generator)

    @property
    def _minibatch_size(self) -> int | None:
        return None

    def _masked(self, image: Tensor) -> Tensor:
        return image if self.free is None else image * self.free

    def linearize(self, point: Tensor) -> Linearization:
        """Linearize the denoiser at a fixed point; all else is linear, and the constraint a mask."""
        free = (point > 0).to(point.dtype) if self.nonnegative else None
        with self.denoise.linearizing() as denoise, torch.enable_grad():
            leaf = point.detach().requires_grad_()
            denoised = denoise(leaf)
            # Only this tensor's derivatives are used: what has none may be left out.
            balance = self.weight.to(point.real.dtype) * (denoised - point)
            balance = self._complete(balance, point)
        if free is not None:
            balance = balance * free
        transposed = self.denoise.transposed(lambda v: vjp(denoised, leaf, v))
        adjoint = replace(
            self,
            fidelity=self.fidelity.counted_anew(),
            denoise=transposed,
            weight=self.weight.detach(),
            nonnegative=False,
            free=free,
        )
        operator = self.fidelity.operator
        made_of = _versions(operator)

        def equation(gradient: Tensor) -> REDMap:
            now = _versions(operator)
            if len(now) != len(made_of) or any(
                old is not new or before != version
                for (old, before), (new, version) in zip(made_of, now, strict=True)
            ):
                raise RuntimeError(
                    f"{type(operator).__name__} was changed between the solve and its gradient; call backward() first, "
                    "or make another operator"
                )
            return replace(adjoint, source=gradient)

        return Linearization(balance, equation, adjoint.jacobian_free)

    def _complete(self, balance: Tensor, point: Tensor) -> Tensor:
        if not self.fidelity.y.requires_grad:
            return balance
        return balance + self.fidelity.adjoint_data()

    def jacobian_free(self, gradient: Tensor) -> Tensor:
        """Return what the adjoint equation gives where the denoiser's derivative is 0."""
        raise NotImplementedError(f"{type(self).__name__} must define jacobian_free(gradient)")


def _versions(operator: MeasurementOperator) -> list[tuple[Tensor, int]]:
    """Return the buffers of an operator, and how often each has been changed in place."""
    return [(b, 0 if b.is_inference() else b._version) for b in operator.buffers()]


@dataclass
class ProximalMap(REDMap):
    r"""The map of `ProximalStep`.

    Attributes:
        minibatch_size: Blocks of a minibatch of the inner solve; None for all.
        condition: :math:`\|A\|^2 / w`.
    """

    minibatch_size: int | None = None
    condition: float = 1.0

    shortage = "the inner solve ran out of steps: raise tau"

    @property
    def rounding(self) -> float:  # type: ignore[override]
        r"""Where `A` sees nothing, the inner solve divides the rounding of :math:`A^H A x` by the weight."""
        return max(super().rounding, float(torch.finfo(self.fidelity.y.dtype).eps) * self.condition)

    @property
    def _minibatch_size(self) -> int | None:
        return self.minibatch_size

    def step(
        self,
        point: Tensor,
        accuracy: Tensor | None = None,
        previous: Tensor | None = None,
        momentum: Tensor | None = None,
        blocks: Tensor | None = None,
        anchor: Anchor = (),
    ) -> Step:
        """Denoise, then solve."""
        source = self.fidelity.adjoint_data() if self.source is None else self.source
        weight = self.weight.to(point.real.dtype)
        rhs = torch.addcmul(source, weight, self.denoised(point))
        if accuracy is None:
            accuracy = torch.full((len(point),), FIRST, device=point.device)
        tolerance = INNER * accuracy.clamp(max=FIRST)
        image = self._solve(rhs, weight, point, tolerance)
        return self.finish(image, point, previous, momentum)._replace(error=self.fidelity.left)

    def _solve(self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor) -> Tensor:
        if self.minibatch_size is not None:
            return self._solve_by_minibatches(rhs, weight, start)
        if not torch.is_grad_enabled():
            if self.nonnegative:
                return self.fidelity.solve_nonnegative(rhs, weight, start, tolerance)
            return self.fidelity.solve(rhs, weight, start, tolerance, self.free)
        image: Tensor = _Solve.apply(  # type: ignore[no-untyped-call]
            rhs, weight, start, tolerance, self.fidelity, self.nonnegative, self.free
        )
        return image

    def _solve_by_minibatches(self, rhs: Tensor, weight: Tensor, start: Tensor) -> Tensor:
        r"""Take gradient steps on the inner problem, each with a minibatch `B`, anchored at the outer iterate.

        .. math:: u \leftarrow u - \gamma \Bigl( \nabla(\tilde x) + \frac{n}{|B|} A_B^H A_B (u - \tilde x)
            + w (u - \tilde x) \Bigr)

        At the fixed point the gradient at the anchor is 0 and no step moves: it is that of the exact inner solve.
        """
        assert self.minibatch_size is not None
        operator = self.fidelity.operator
        there = self._masked(self.fidelity.normal(start) + weight * start - rhs)
        length = 1 / (operator.minibatch_norm_squared(self.minibatch_size) + weight)
        moved = torch.zeros_like(start)
        for _ in range(EPOCHS * -(-operator.n_blocks // self.minibatch_size)):
            curvature = self._masked(self.fidelity.normal(moved, self.draw()) + weight * moved)
            moved = moved - length * (there + curvature)
            if self.nonnegative:
                moved = (start + moved).clamp(min=0) - start
        return start + moved

    def jacobian_free(self, gradient: Tensor) -> Tensor:
        """Solve once, as accurately as a gradient needs it."""
        gradient = self._masked(gradient)
        tolerance = torch.full((len(gradient),), INNER * FIRST, device=gradient.device)
        weight = self.weight.to(gradient.real.dtype)
        rough = self.fidelity.solve(gradient, weight, torch.zeros_like(gradient), tolerance, self.free)
        return self.fidelity.solve(gradient, weight, rough, tolerance, self.free)


class _Solve(torch.autograd.Function):
    """The solution of the inner problem, differentiable any number of times in its right-hand side and weight."""

    @staticmethod
    def forward(
        ctx: Any,
        rhs: Tensor,
        weight: Tensor,
        start: Tensor,
        tolerance: Tensor,
        fidelity: LeastSquares,
        nonnegative: bool,
        free: Tensor | None,
    ) -> Tensor:
        if nonnegative:
            image = fidelity.solve_nonnegative(rhs, weight, start, tolerance)
            free = (image > 0).to(image.dtype)
        else:
            image = fidelity.solve(rhs, weight, start, tolerance, free)
        ctx.fidelity = fidelity
        ctx.save_for_backward(image, weight, tolerance, free)
        return image

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        image, weight, tolerance, free = ctx.saved_tensors
        start = torch.zeros_like(gradient)
        back = _Solve.apply(gradient, weight, start, tolerance, ctx.fidelity, False, free)  # type: ignore[no-untyped-call]
        along_weight = -(back.conj() * image).real.sum().to(weight.dtype)
        return back, along_weight, None, None, None, None, None


@dataclass
class GradientMap(REDMap):
    r"""The map of `GradientStep`.

    Attributes:
        step_size: :math:`\gamma` itself, 0-d, float64.
        minibatch_size: Blocks of a minibatch; None for all.
        variance_reduced: Whether minibatches correct the last full gradient.
    """

    step_size: Tensor = field(kw_only=True)
    minibatch_size: int | None = None
    variance_reduced: bool = True

    advice = "lower step_size or tau, or take a denoiser that contracts (spectral norms, more training)"

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether there are minibatches to draw."""
        return self.minibatch_size is not None

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether the weights, the data or a parameter need a gradient; assumed of a mere function."""
        return super().requires_grad or self.step_size.requires_grad

    @property
    def gain(self) -> float:  # type: ignore[override]
        r"""Where `A` sees nothing, a step goes :math:`\gamma w` of the way to the denoised image."""
        strength = float(self.step_size.detach()) * float(self.weight.detach())
        return max(1.0, 1 / strength) if strength > 0 else math.inf

    @property
    def _minibatch_size(self) -> int | None:
        return self.minibatch_size

    def step(
        self,
        point: Tensor,
        accuracy: Tensor | None = None,
        previous: Tensor | None = None,
        momentum: Tensor | None = None,
        blocks: Tensor | None = None,
        anchor: Anchor = (),
    ) -> Step:
        r"""Take one RED step and extrapolate, in one pass over memory.

        With variance reduction a minibatch `B` corrects the gradient at the anchor :math:`\tilde x`,

        .. math:: \nabla g(\tilde x) + \frac{n}{|B|} A_B^H A_B (x - \tilde x),

        at the price of the minibatch's gradient alone; its noise vanishes as `x` and the anchor come together.
        """
        if blocks is not None and self.variance_reduced:
            there, gradient_there = anchor
            gradient = gradient_there + self._masked(self.fidelity.normal(point - there, blocks))
        else:
            gradient = self.residual(point, blocks)
            anchor = (point, gradient) if blocks is None else ()
        update = ops.red_update(
            point,
            gradient,
            self._masked(self.denoised(point)),
            self.step_size,
            self.weight,
            previous=previous,
            momentum=momentum,
            nonnegative=self.nonnegative,
        )
        return Step(update.image, update.extrapolated, self.agree(update.reductions), anchor)

    def _complete(self, balance: Tensor, point: Tensor) -> Tensor:
        if self.step_size.requires_grad:
            balance = balance - self.fidelity.gradient(point)
            return balance * (self.step_size / self.step_size.detach()).to(point.real.dtype)
        return super()._complete(balance, point)

    def jacobian_free(self, gradient: Tensor) -> Tensor:
        """Return one step from 0."""
        return self._masked(gradient) * self.step_size.detach().to(gradient.real.dtype)
