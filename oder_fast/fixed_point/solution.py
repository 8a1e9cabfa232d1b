"""What a fixed-point solve gives back, and how it fails."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._extras import new_axes

Policy = Literal["raise", "warn", "ignore"]
POLICIES = ("raise", "warn", "ignore")
# Contraction factors are fitted to this share of the residual history, its end.
FITTED_SHARE = 0.5


@dataclass(frozen=True, repr=False)
class Solution:
    r"""A fixed point, and how it was reached.

    Attributes:
        value: The :math:`T(s)` with the least residual of each image, shape ``(B, ...)``; NaN of one that diverged.
        iterations: Evaluations of the map that each image took, int64, shape ``(B,)``.
        residuals: Relative residuals :math:`\|T(s) - s\| / \|T(s)\|`, float64, shape ``(n, B)``: a row for
            each residual taken, NaN where an image had converged before. Of a stochastic map only those of
            the full map, never a minibatch's.
        residual_iterations: At which iterations the rows of `residuals` were taken, int64, shape ``(n,)``.
        converged: Whether each image's estimated distance reached the tolerance, bool, shape ``(B,)``.
        diverged: Whether each image's residual became NaN, infinite, or grew far beyond its start, bool, ``(B,)``.
        contraction: Factor by which the residual shrank per iteration at the end, fitted to the last half of
            `residuals`, float64, shape ``(B,)``; NaN where there were too few; 1 or more: the map, as
            iterated, does not contract.
        distance: Estimated relative distance of the value from the fixed point, float64, shape ``(B,)``: the residual
            over one minus the contraction seen in the last iterations.
        message: What happened, and what to change where an image did not converge.
        denoiser_calls: Calls of the denoiser, for the whole batch at a time; in an adjoint solution the products
            with its transposed derivative.
        operator_calls: Calls of the normal operator :math:`A^H A`; a minibatch counts as its share of the blocks,
            a solve in closed form as one.
        adjoint: Solutions of the adjoint equation: implicit differentiation appends one in each backward
            pass.
    """

    value: Tensor
    iterations: Tensor
    residuals: Tensor
    residual_iterations: Tensor
    converged: Tensor
    diverged: Tensor
    contraction: Tensor
    distance: Tensor
    message: str
    denoiser_calls: int = 0
    operator_calls: float = 0.0
    adjoint: list[Solution] = field(default_factory=list)

    def __repr__(self) -> str:
        """Tell how it went; the image itself would fill the screen."""
        return (
            f"Solution(value={tuple(self.value.shape)} {self.value.dtype}, iterations={self.iterations.tolist()}, "
            f"distance={[float(f'{d:.3g}') for d in self.distance]}, converged={self.converged.tolist()}, "
            f"denoiser_calls={self.denoiser_calls}, operator_calls={self.operator_calls:g}, message={self.message!r})"
        )

    @property
    def residual(self) -> Tensor:
        """The last relative residual of each image, float64, shape ``(B,)``."""
        return last_residual(self.residuals)

    def plot(self, axes: Any = None) -> Any:
        """Draw the relative residual of each image over the iterations, and say how many calls they took.

        Args:
            axes: Of matplotlib; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: Where matplotlib is not installed.

        Example:
            >>> from oder_fast import DEQRED, ParallelBeamCT
            >>> ct = ParallelBeamCT(image_size=16, angles=12)
            >>> model = DEQRED(lambda x: 0.5 * x, tau=0.1)
            >>> model(torch.ones(1, 12, ct.n_bins), ct, return_solution=True).plot().get_xlabel()
            'iteration'
        """
        if axes is None:
            axes = new_axes("Solution.plot")
        for image, residuals in enumerate(self.residuals.numpy().T):
            known = np.isfinite(residuals) & (residuals > 0)
            end = (
                "diverged"
                if self.diverged[image]
                else "converged"
                if self.converged[image]
                else "not converged"
            )
            label = f"image {image}: {end}, distance {float(self.distance[image]):.1e}"
            axes.semilogy(self.residual_iterations.numpy()[known], residuals[known], ".-", label=label)
        axes.set(
            xlabel="iteration",
            ylabel="relative residual",
            title=f"{self.denoiser_calls} calls of the denoiser, {self.operator_calls:g} of the operator",
        )
        axes.grid(alpha=0.3)
        axes.legend()
        return axes

    def require(self, on_failure: Policy, *, stacklevel: int = 2) -> Solution:
        """Return this solution if all images converged; else do what the policy says.

        Args:
            on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``.
            stacklevel: Where the warning points to, as in `warnings.warn`.

        Raises:
            DivergenceError: Where an image diverged and the policy is ``"raise"``, or all images did.
            NotConvergedError: Where an image did not converge and the policy is ``"raise"``.
        """
        if bool(self.converged.all()):
            return self
        if bool(self.diverged.all()) or (on_failure == "raise" and bool(self.diverged.any())):
            raise DivergenceError(self.message, self)
        if on_failure == "raise":
            raise NotConvergedError(self.message, self)
        if on_failure == "warn":
            warnings.warn(self.message, NotConvergedWarning, stacklevel=stacklevel)
        return self


class FixedPointError(RuntimeError):
    """A fixed point was not found.

    Attributes:
        solution: The state of the solve when it stopped.
    """

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        super().__init__(message)
        self.solution = solution


class NotConvergedError(FixedPointError):
    """The iterations ended before the estimated distance reached the tolerance."""


class DivergenceError(FixedPointError):
    """The residual grew far beyond its start, or became NaN or infinite."""


class NotConvergedWarning(UserWarning):
    """The iterations ended before the estimated distance reached the tolerance."""


def last_residual(residuals: Tensor) -> Tensor:
    """Return the last entry of each column that is no NaN."""
    count = (~residuals.isnan()).sum(0)
    index = (count - 1).clamp(min=0)
    return (
        residuals.gather(0, index[None])[0]
        if len(residuals)
        else residuals.new_full((residuals.shape[1],), math.nan)
    )


def fit_contraction(residuals: Tensor, iterations: Tensor) -> Tensor:
    """Fit a geometric decay to the end of each column of residuals (n, B)."""
    factors = []
    for column in residuals.numpy().T:
        known = np.isfinite(column) & (column > 0)
        logs, at = np.log(column[known]), iterations.numpy()[known]
        first = int(len(logs) * (1 - FITTED_SHARE))
        logs, at = logs[first:], at[first:] - at[first:].mean() if len(at) else at
        factors.append(math.exp(at @ logs / (at @ at)) if len(logs) > 1 else math.nan)
    return torch.tensor(factors, dtype=torch.float64)
