"""Gradients through a fixed point: implicit, Jacobian-free, unrolled."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .maps import Checkpointed, FixedPointMap, Linearization, per_image
from .solution import FixedPointError, NotConvergedWarning, Solution
from .solvers import Anderson, Solver

Fallback = Literal["raise", "warn", "jacobian_free"]
FALLBACKS = ("raise", "warn", "jacobian_free")
# Of adjoint equations.
ADJOINT_SOLVER = Anderson(100, 1e-2, memory=8)


class Differentiation(ABC):
    """How a solve is differentiated."""

    @abstractmethod
    def solve(
        self,
        fixed_point_map: FixedPointMap,
        start: Tensor,
        solver: Solver[Any],
        adjoint_start: Tensor | None = None,
    ) -> Solution:
        """Solve for the fixed point; where gradients are recorded, the solution's value carries them.

        Args:
            fixed_point_map: The map.
            start: Shape ``(B, ...)``.
            solver: Of the forward solve.
            adjoint_start: Where the adjoint solve starts, shape of `start`; None for the Jacobian-free guess.

        Returns:
            The `Solution`, converged or not.
        """


@dataclass(frozen=True)
class Implicit(Differentiation):
    r"""Differentiate the equation of the fixed point, :math:`F(x^*, \theta) = 0`, by another fixed point.

    .. math:: -(\partial_x F)^H u = \nabla_x \ell, \qquad \nabla_\theta \ell = (\partial_\theta F)^H u

    The denoiser is linearized once, at :math:`x^*`, so memory does not depend on the number of iterations. The
    gradient in the start is zero: a fixed point does not depend on it. Second derivatives are refused.

    Args:
        solver: Of the adjoint equation; None for ``Anderson(100, 1e-2, memory=8)``, or, where the forward solve takes
            minibatches, its solver.
        on_failure: Where the adjoint solve fails: ``"raise"``; ``"warn"``, and use what it reached
            (divergence still raises); ``"jacobian_free"``: warn, and use the first guess of `u`.

    Raises:
        ValueError: For another policy.

    References:
        Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019. Gilton, Ongie, Willett, "Deep
        equilibrium architectures for inverse problems in imaging", IEEE Trans. Computational Imaging 7
        (2021).
    """

    solver: Solver[Any] | None = None
    on_failure: Fallback = "warn"

    def __post_init__(self) -> None:
        if self.on_failure not in FALLBACKS:
            raise ValueError(f"Implicit: on_failure must be one of {FALLBACKS}, got {self.on_failure!r}")
        if not (self.solver is None or isinstance(self.solver, Solver)):
            raise TypeError(f"Implicit: solver must be a Solver or None, got {self.solver!r}")

    def solve(
        self,
        fixed_point_map: FixedPointMap,
        start: Tensor,
        solver: Solver[Any],
        adjoint_start: Tensor | None = None,
    ) -> Solution:
        """Solve without a graph; attach the equation there, and the adjoint solve to its gradient."""
        solution = _solve_without_graph(fixed_point_map, start, solver)
        if not (torch.is_grad_enabled() and fixed_point_map.requires_grad):
            return solution
        linearization = _linearize(fixed_point_map, solution, start)
        chosen = self.solver
        if chosen is None:
            chosen = solver if fixed_point_map.stochastic else ADJOINT_SOLVER

        def adjoint(gradient: Tensor) -> Tensor:
            first = linearization.jacobian_free(gradient) if adjoint_start is None else adjoint_start
            # What diverged has no gradient; nothing else is a fixed point there.
            first = torch.where(per_image(solution.diverged.to(first.device), first), 0, first)
            return self._adjoint(linearization.adjoint(gradient), first, chosen, solution.adjoint)

        return _attach(solution, linearization, start, adjoint)

    def _adjoint(
        self, adjoint_map: FixedPointMap, first: Tensor, solver: Solver[Any], record: list[Solution]
    ) -> Tensor:
        solution = solver.solve(adjoint_map, first)
        record.append(solution)
        try:
            lost = bool(solution.diverged.any())
            solution.require("raise" if lost or self.on_failure != "warn" else "ignore")
        except FixedPointError as error:
            if self.on_failure != "jacobian_free":
                raise type(error)(f"Implicit, adjoint solve: {error}", error.solution) from None
            warnings.warn(
                f"Implicit, adjoint solve: {error}. The gradient is the Jacobian-free one",
                NotConvergedWarning,
                stacklevel=2,
            )
            return first
        if not bool(solution.converged.all()):
            warnings.warn(f"Implicit, adjoint solve: {solution.message}", NotConvergedWarning, stacklevel=2)
        return solution.value


@dataclass(frozen=True)
class JacobianFree(Differentiation):
    r"""Differentiate one application of the map at the fixed point, as if the denoiser were constant.

    .. math:: \nabla_\theta \ell \approx (\partial_\theta F)^H u, \quad u = (A^H A + \tau)^{-1} \nabla_x \ell

    in the proximal form, :math:`\gamma \nabla_x \ell` in the gradient form. No adjoint solve: much cheaper than
    `Implicit`, a descent direction under conditions, not the gradient.

    References:
        Fung, Heaton, Li, McKenzie, Osher, Yin, "JFB: Jacobian-free backpropagation for implicit networks",
        AAAI 2022.
    """

    def solve(
        self,
        fixed_point_map: FixedPointMap,
        start: Tensor,
        solver: Solver[Any],
        adjoint_start: Tensor | None = None,
    ) -> Solution:
        """Solve without a graph; attach the equation there."""
        solution = _solve_without_graph(fixed_point_map, start, solver)
        if not (torch.is_grad_enabled() and fixed_point_map.requires_grad):
            return solution
        linearization = _linearize(fixed_point_map, solution, start)
        return _attach(solution, linearization, start, linearization.jacobian_free)


@dataclass(frozen=True)
class Unrolled(Differentiation):
    """Differentiate the iterations themselves, through the start too.

    Each iteration keeps its point alone and is computed again in the backward pass, with the same minibatch,
    so memory is one image per iteration. Momentum and the weights of `Anderson` count as constants.
    """

    def solve(
        self,
        fixed_point_map: FixedPointMap,
        start: Tensor,
        solver: Solver[Any],
        adjoint_start: Tensor | None = None,
    ) -> Solution:
        """Solve with a graph, checkpointed."""
        if not torch.is_grad_enabled():
            return _solve_without_graph(fixed_point_map, start, solver)
        return solver.solve(Checkpointed(fixed_point_map), start)


def _solve_without_graph(fixed_point_map: FixedPointMap, start: Tensor, solver: Solver[Any]) -> Solution:
    with torch.no_grad(), fixed_point_map.solving():
        return solver.solve(fixed_point_map, start)


def _linearize(fixed_point_map: FixedPointMap, solution: Solution, start: Tensor) -> Linearization:
    """Linearize at the solution, and where there is none, at the start."""
    point = solution.value.detach()
    if bool(solution.diverged.any()):
        point = torch.where(per_image(solution.diverged.to(point.device), point), start.detach(), point)
    return fixed_point_map.linearize(point)


def _attach(
    solution: Solution, linearization: Linearization, start: Tensor, adjoint: Callable[[Tensor], Tensor]
) -> Solution:
    def gradient_of_the_rest(gradient: Tensor) -> Tensor:
        # What diverged has no derivative, and must not spoil that of the others.
        diverged = per_image(solution.diverged.to(gradient.device), gradient)
        return adjoint(torch.where(diverged, 0, gradient))

    backward = gradient_of_the_rest if bool(solution.diverged.any()) else adjoint
    value = _Attach.apply(linearization.balance, solution.value, start, backward)  # type: ignore[no-untyped-call]
    return replace(solution, value=value)


class _Attach(torch.autograd.Function):
    """The solution's value, with the gradient of the equation there, through the adjoint solve."""

    @staticmethod
    def forward(
        ctx: Any, balance: Tensor, value: Tensor, start: Tensor, adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        ctx.save_for_backward(balance)
        # No view: results may be changed in place.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            u = ctx.adjoint(gradient.contiguous())
        if torch.is_grad_enabled():
            u = _Refuse.apply(u, *ctx.saved_tensors, gradient)  # type: ignore[no-untyped-call]
        zero = torch.zeros_like(gradient) if ctx.needs_input_grad[2] else None
        return u, None, zero, None


class _Refuse(torch.autograd.Function):
    """The identity; its derivative would be a second one through the fixed point."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, balance: Tensor, gradient: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "Implicit, JacobianFree: second derivatives through the fixed point are not available; "
            "use differentiation=Unrolled()"
        )
