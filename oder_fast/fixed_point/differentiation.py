"""Gradients through a fixed point: implicit, Jacobian-free, unrolled."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .graphs import EAGER, Execution, tell
from .maps import Checkpointed, FixedPointMap, Hidden, Linearization
from .solution import FixedPointError, NotConvergedWarning, Solution
from .solvers import Solver

Fallback = Literal["raise", "warn", "jacobian_free"]
FALLBACKS = ("raise", "warn", "jacobian_free")


@dataclass
class AdjointMemory:
    """The last adjoint solution, where a warm start begins."""

    last: Tensor | None = None


class Differentiation(ABC):
    """How a solve is differentiated."""

    @abstractmethod
    def solve(
        self,
        fixed_point_map: FixedPointMap,
        start: Tensor,
        solver: Solver[Any],
        memory: AdjointMemory,
        execution: Execution = EAGER,
    ) -> Solution:
        """Solve for the fixed point; where gradients are recorded, the solution's value carries them.

        Args:
            fixed_point_map: The map.
            start: Shape ``(B, ...)``.
            solver: Of the forward solve.
            memory: Where a warm start is kept from call to call.
            execution: How the iterations of this solve and of its adjoint run.

        Returns:
            The `Solution`, converged or not.

        Raises:
            DivergenceError: Where the forward solve diverges.
        """


@dataclass(frozen=True)
class Implicit(Differentiation):
    r"""Differentiate the fixed point itself, by another fixed point.

    .. math:: w = T'(x^*)^H w + g, \qquad \nabla_\theta \ell = (\partial_\theta T(x^*))^H w

    The map is linearized once, at :math:`x^*`, so memory does not depend on the number of iterations. The
    gradient in the start is zero: a fixed point does not depend on it. Second derivatives are refused.

    Args:
        solver: Of the adjoint equation; None for that of the forward solve.
        minibatch_size: Blocks in a minibatch of the adjoint solve, drawn afresh: a number, ``"same"`` as in
            the forward solve, or None for all.
        warm_start: Start from the adjoint solution of the last call where it had this shape, else from `g`.
        on_failure: Where the adjoint solve fails: ``"raise"``; ``"warn"``, and use what it reached
            (divergence still raises); ``"jacobian_free"``: warn, and use :math:`w = g`.

    Raises:
        ValueError: For another policy, or a minibatch of no blocks.

    References:
        Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019. Gilton, Ongie, Willett, "Deep
        equilibrium architectures for inverse problems in imaging", IEEE Trans. Computational Imaging 7
        (2021).
    """

    solver: Solver[Any] | None = None
    minibatch_size: int | Literal["same"] | None = "same"
    warm_start: bool = False
    on_failure: Fallback = "warn"

    def __post_init__(self) -> None:
        if self.on_failure not in FALLBACKS:
            raise ValueError(f"Implicit: on_failure must be one of {FALLBACKS}, got {self.on_failure!r}")
        size = self.minibatch_size
        if not (size is None or size == "same" or (type(size) is int and size >= 1)):
            raise ValueError(
                f'Implicit: minibatch_size must be a number of blocks, "same", or None for all, got {size!r}'
            )

    def solve(
        self,
        fixed_point_map: FixedPointMap,
        start: Tensor,
        solver: Solver[Any],
        memory: AdjointMemory,
        execution: Execution = EAGER,
    ) -> Solution:
        """Solve without a graph; attach one evaluation of the map, and the adjoint solve to its gradient."""
        solution = _solve_without_graph(fixed_point_map, start, solver, execution)
        if not (torch.is_grad_enabled() and fixed_point_map.requires_grad):
            return solution
        with execution.aside():
            linearization = fixed_point_map.linearize(solution.value, self.minibatch_size)

        def adjoint(gradient: Tensor) -> Tensor:
            with execution.aside():
                w = self._adjoint(
                    linearization, gradient, self.solver or solver, memory, execution, solution.adjoint
                )
            return execution.hand_over(w)

        return _attach(solution, linearization, start, adjoint)

    def _adjoint(
        self,
        linearization: Linearization,
        gradient: Tensor,
        solver: Solver[Any],
        memory: AdjointMemory,
        execution: Execution,
        record: list[Solution],
    ) -> Tensor:
        warm = self.warm_start and memory.last is not None and memory.last.shape == gradient.shape
        first = memory.last.to(gradient) if warm and memory.last is not None else gradient
        try:
            solution = solver.solve(_Adjoint(linearization.transposed, gradient), first, execution)
            record.append(solution)
            tell(solution.fallback_reason, execution.told, stacklevel=2)
            solution.require("ignore" if self.on_failure == "warn" else "raise")
        except FixedPointError as error:
            if self.on_failure != "jacobian_free":
                raise type(error)(f"Implicit, adjoint solve: {error}", error.solution) from None
            warnings.warn(
                f"Implicit, adjoint solve: {error}. The gradient is the Jacobian-free one",
                NotConvergedWarning,
                stacklevel=2,
            )
            return gradient
        if not bool(solution.converged.all()):
            warnings.warn(f"Implicit, adjoint solve: {solution.message}", NotConvergedWarning, stacklevel=2)
        memory.last = solution.value if self.warm_start else None
        return solution.value


@dataclass(frozen=True)
class JacobianFree(Differentiation):
    r"""Differentiate one application of the map at the fixed point, as if :math:`T'(x^*)` were zero.

    .. math:: \nabla_\theta \ell \approx (\partial_\theta T(x^*))^H g

    No adjoint solve: much cheaper than `Implicit`, a descent direction under conditions, not the gradient.

    References:
        Fung, Heaton, Li, McKenzie, Osher, Yin, "JFB: Jacobian-free backpropagation for implicit networks",
        AAAI 2022.
    """

    def solve(
        self,
        fixed_point_map: FixedPointMap,
        start: Tensor,
        solver: Solver[Any],
        memory: AdjointMemory,
        execution: Execution = EAGER,
    ) -> Solution:
        """Solve without a graph; attach one evaluation of the map."""
        solution = _solve_without_graph(fixed_point_map, start, solver, execution)
        if not (torch.is_grad_enabled() and fixed_point_map.requires_grad):
            return solution
        return _attach(
            solution, fixed_point_map.linearize(solution.value, None), start, lambda gradient: gradient
        )


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
        memory: AdjointMemory,
        execution: Execution = EAGER,
    ) -> Solution:
        """Solve with a graph, checkpointed."""
        if not torch.is_grad_enabled():
            return _solve_without_graph(fixed_point_map, start, solver, execution)
        if execution is not EAGER and execution.reason is None:
            reason = "Unrolled lets autograd record the iterations, which a graph would replay unrecorded"
            execution = Execution(reason, execution.told)
        return solver.solve(Checkpointed(fixed_point_map), start, execution)


class _Adjoint(FixedPointMap):
    """The map ``w -> T'(x)^H w + g``."""

    def __init__(self, transposed: FixedPointMap, gradient: Tensor) -> None:
        self.transposed = transposed
        self.gradient = gradient
        self.stochastic = transposed.stochastic
        self.variance_reduced = transposed.variance_reduced
        self.advice = transposed.advice

    @property
    def hidden(self) -> Hidden:  # type: ignore[override]
        return self.transposed.hidden

    def __call__(self, point: Tensor) -> Tensor:
        return self.transposed(point) + self.gradient

    def agree(self, reductions: Tensor) -> Tensor:
        return self.transposed.agree(reductions)

    def draw(self) -> FixedPointMap:
        return _Adjoint(self.transposed.draw(), self.gradient)


def _solve_without_graph(
    fixed_point_map: FixedPointMap, start: Tensor, solver: Solver[Any], execution: Execution
) -> Solution:
    with execution.aside(), torch.no_grad(), fixed_point_map.solving():
        solution = solver.solve(fixed_point_map, start, execution)
    execution.hand_over(solution.value)
    return solution


def _attach(
    solution: Solution, linearization: Linearization, start: Tensor, adjoint: Callable[[Tensor], Tensor]
) -> Solution:
    value = _Attach.apply(linearization.output, solution.value, start, adjoint)  # type: ignore[no-untyped-call]
    return replace(solution, value=value)


class _Attach(torch.autograd.Function):
    """The solution's value, with the gradient of the map's output there, through the adjoint solve."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, value: Tensor, start: Tensor, adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        ctx.save_for_backward(output)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            w = ctx.adjoint(gradient.contiguous())
        if torch.is_grad_enabled():
            w = _Refuse.apply(w, *ctx.saved_tensors, gradient)  # type: ignore[no-untyped-call]
        zero = torch.zeros_like(gradient) if ctx.needs_input_grad[2] else None
        return w, None, zero, None


class _Refuse(torch.autograd.Function):
    """The identity; its derivative would be a second one through the fixed point."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, output: Tensor, gradient: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "Implicit, JacobianFree: second derivatives through the fixed point are not available; "
            "use differentiation=Unrolled()"
        )
