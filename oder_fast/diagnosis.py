"""Why a reconstruction converges, or does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .denoisers import LipschitzEstimate
from .denoisers._krylov import Spectrum, arnoldi, largest, modulus, random_like
from .denoisers.lipschitz import SLACK, Jacobian, estimate_from
from .deqred import DEQRED, RED, as_channels, from_channels
from .fixed_point import DivergenceError, Solution

# A contraction factor closer to 1 than this is none that float32 could tell.
RESOLUTION = 1e-5
DIVERGES = "at the start, for the solve diverges"


@dataclass(frozen=True)
class Diagnosis:
    r"""The map `T` of a `DEQRED` linearized at images; tensors are float64 of shape ``(B,)``.

    Attributes:
        norm_squared: :math:`\|A\|^2` of all measurements.
        step_size: :math:`\gamma`.
        tau: :math:`\tau`.
        residual: Relative residual :math:`\|T(x) - x\| / \|T(x)\|` at the images.
        denoiser: How much the denoiser expands there.
        norm: Largest singular value of :math:`T'`, from below: below 1, each iteration near there brings any two
            images nearer.
        contraction: Spectral radius of :math:`T'`, estimated: the factor of the error per iteration in the end.
        errors: Relative residuals of the eigenproblems of `norm` (squared) and `contraction`, shape ``(B, 2)``.
        iterations: Iterations of `Picard` that shrink the residual by the solver's tolerance; infinite where the
            map does not contract.
        message: All of this in words, and what to change.
    """

    norm_squared: float
    step_size: float
    tau: float
    residual: Tensor
    denoiser: LipschitzEstimate
    norm: Tensor
    contraction: Tensor
    errors: Tensor
    iterations: Tensor
    message: str

    @property
    def converges(self) -> Tensor:
        """Whether the iteration is expected to converge near each image; bool, shape ``(B,)``."""
        return self.contraction < 1 - RESOLUTION

    def __str__(self) -> str:
        """Return the message."""
        return self.message


def diagnose(
    model: DEQRED,
    y: Tensor,
    x: Tensor | None = None,
    *,
    iterations: int = 50,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    r"""Tell why the fixed-point iteration of a model converges for these measurements, or does not.

    .. math:: T'(x) v = P \bigl( v - \gamma (A^H A v + \tau (v - D'(x) v)) \bigr)

    with all measurements, whatever the minibatch, and `P` the mask of the pixels above 0 where the model is
    nonnegative. Norm and spectral radius of this are found by Krylov iterations, which approach them from below
    where `D'` is symmetric; eigenvalues near 1 of directions that neither the data nor the denoiser determine are
    found last. Read `Diagnosis.contraction` as "at least".

    Args:
        model: The model.
        y: Measurements, shape ``(B, *data_shape)``.
        x: Where to look, shape ``(B, *image_shape)``; by default the model's own solution, or its start where it
            finds none.
        iterations: Products with each derivative, at most.
        tolerance: Largest relative residual of an eigenproblem at which its iteration stops.
        generator: Source of the start vectors; None for the default one of torch.

    Returns:
        The `Diagnosis`; print it.

    Raises:
        TypeError: For a model that is no `DEQRED`, or data or images that do not fit it.
        ValueError: For data or images that do not fit the model, or a denoiser that is not differentiable.

    Example:
        >>> import torch
        >>> from oder_fast import DEQRED, ParallelBeamCT
        >>> model = DEQRED(ParallelBeamCT(image_size=16, angles=12), lambda x: 0.5 * x, tau=30.0)
        >>> diagnosis = diagnose(model, model.operator(torch.ones(1, 16, 16)))
        >>> bool(diagnosis.converges)
        True
    """
    if not isinstance(model, DEQRED):
        raise TypeError(f"diagnose: model must be a DEQRED, got {type(model).__name__}")
    where = "at the images given"
    if x is None:
        x, where = _solution(model, y)
    with torch.inference_mode(False), torch.no_grad(), model._problem(y, x) as (red, point):
        whole = replace(red.fidelity, minibatch_size=None, variance_reduction=False)
        derivative = _Derivative(replace(red, fidelity=whole), point.detach())
        jacobian = derivative.jacobian

        def solve(apply: Callable[[Tensor], Tensor], spectrum: Spectrum) -> tuple[Tensor, Tensor]:
            start = random_like(jacobian.output, generator)
            values, errors = arnoldi(apply, start, spectrum, iterations, tolerance)
            return values[:, 0].clamp(min=0), errors[:, 0]

        estimate = estimate_from(jacobian, iterations, tolerance, generator)
        squared, norm_error = solve(lambda v: derivative.transposed(derivative(v)), largest)
        contraction, contraction_error = solve(derivative, modulus)
        if hasattr(model.operator, "norm_squared"):
            norm_squared = float(model.operator.norm_squared())
        else:
            norm_squared = float(solve(derivative.normal, largest)[0].max())
        step_size, tau, residual = float(red.step_size), float(red.tau), derivative.residual()
    shrinks = contraction < 1 - RESOLUTION
    needed = (math.log(model.solver.tolerance) / contraction.clamp(min=1e-300).log()).clamp(min=1).ceil()
    found = Diagnosis(
        norm_squared,
        step_size,
        tau,
        residual,
        estimate,
        squared.sqrt(),
        contraction,
        torch.stack([norm_error, contraction_error], 1),
        torch.where(shrinks, needed, math.inf),
        "",
    )
    return replace(found, message=_describe(found, where, model.solver.tolerance))


class _Derivative:
    """The derivative of the map at a point, on images as real channels ``(B, C, H, W)``."""

    def __init__(self, red: RED, point: Tensor) -> None:
        self.red = red
        self.point = point
        self.fidelity = red.fidelity.homogeneous(None)
        self.mask = as_channels(point) > 0 if red.nonnegative else None
        self.jacobian = Jacobian(self._denoise, as_channels(point))

    def _denoise(self, channels: Tensor) -> Tensor:
        return as_channels(self.red.denoise(from_channels(channels, self.point)))

    def normal(self, v: Tensor) -> Tensor:
        """Return ``A^H A v``."""
        return as_channels(self.fidelity.gradient(from_channels(v, self.point)))

    def _step(self, v: Tensor, denoised: Tensor) -> Tensor:
        step_size, tau = (value.to(v.dtype) for value in (self.red.step_size, self.red.tau))
        return v - step_size * (self.normal(v) + tau * (v - denoised))

    def _active(self, v: Tensor) -> Tensor:
        return v if self.mask is None else v * self.mask

    def __call__(self, v: Tensor) -> Tensor:
        """Return ``T' v``."""
        return self._active(self._step(v, self.jacobian.jvp(v)))

    def transposed(self, v: Tensor) -> Tensor:
        """Return ``T'^H v``."""
        v = self._active(v)
        return self._step(v, self.jacobian.vjp(v))

    def residual(self) -> Tensor:
        """Return the relative residual of the map at the point."""
        change, size, _ = self.red.step(self.point).reductions.unbind(1)
        return torch.where(change > 0, (change / size).sqrt(), 0).cpu()


def _solution(model: DEQRED, y: Tensor) -> tuple[Tensor, str]:
    """Return the images that the model finds, converged or not, or its start, and what they are."""
    with torch.no_grad():
        try:
            solution: Solution = model._solve(y, None)
        except DivergenceError:
            with model._problem(y, None) as (_, start):
                return start, DIVERGES
    if bool(solution.converged.all()):
        return solution.value, "at the solution"
    return solution.value, "where the solve ended without converging"


def _describe(found: Diagnosis, where: str, tolerance: float) -> str:
    radius, norm = float(found.contraction.max()), float(found.norm.max())
    default = 1 / (found.norm_squared + 2 * found.tau)
    text = [
        f"|A|^2 = {found.norm_squared:.4g}, tau = {found.tau:.4g}, step_size = {found.step_size:.4g} "
        f"({found.step_size / default:.3g} of 1 / (|A|^2 + 2 tau)).",
        f"Linearized {where} (relative residual up to {float(found.residual.max()):.2g}):",
        f"D changes at most {float(found.denoiser.denoiser.max()):.4g} times as fast as its input, x - D(x) "
        f"{float(found.denoiser.residual.max()):.4g} times; the map T has the contraction factor {radius:.6g} "
        f"or more, and the norm {norm:.6g} or more (relative residuals up to {float(found.errors.max()):.1g}).",
    ]
    if radius < 1 - RESOLUTION and where == DIVERGES:
        text.append(
            "T contracts there, but the accelerated iteration diverges: take Picard() or a smaller step_size."
        )
    elif radius < 1 - RESOLUTION:
        text.append(
            f"T contracts there: Picard() takes about {int(found.iterations.max())} iterations or more to shrink "
            f"the residual by {tolerance:.0e}, Nesterov() and Anderson() usually fewer."
        )
        if not bool(found.denoiser.nonexpansive.all()):
            text.append(
                "But D expands there: elsewhere the iteration may move away; the data make up for it here."
            )
    elif radius <= 1 + RESOLUTION:
        text.append(
            "Some direction is determined by neither the data nor D: T keeps it. The iteration still converges if "
            "D is nonexpansive, slowly, to a fixed point that depends on the start."
        )
    else:
        text.append("T expands there: the iteration moves away from a fixed point with this derivative.")
        if found.step_size > default * (1 + SLACK):
            text.append("Leave step_size to its default first: this one is longer.")
        elif float(found.denoiser.smallest_eigenvalue.min()) > 0:
            text.append("x - D(x) is monotone there: a smaller step_size makes T contract.")
        else:
            text.append(
                "x - D(x) is not monotone there, and the data do not make up for it: lower tau, or take a denoiser "
                "that expands less (spectral norms, longer training, training through the fixed point)."
            )
    return "\n".join(text)
