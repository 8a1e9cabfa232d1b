"""Why a reconstruction converges, or does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._numpy import takes_numpy
from .denoisers import LipschitzEstimate
from .denoisers._krylov import Spectrum, arnoldi, largest, modulus, random_like
from .denoisers.call import as_channels, from_channels
from .denoisers.lipschitz import SLACK, Jacobian, estimate_from
from .deqred import DEQRED
from .fixed_point.maps import inner, per_image
from .operators import as_operator
from .red import GradientMap, REDMap

# A contraction factor closer to 1 than this is none that float32 could tell.
RESOLUTION = 1e-5
# A direction of which a proximal step changes less than this share is called undetermined.
UNDETERMINED = 1e-3
# Relative residual to which inner solves are taken here.
ACCURACY = 1e-4
# Share of the mean of each channel, of a direction, above which it is called a mean.
MEAN = 0.9


@dataclass(frozen=True)
class Diagnosis:
    r"""The map `T` of a `DEQRED` linearized at images; tensors are float64 of shape ``(B,)`` but for `direction`.

    Attributes:
        norm_squared: :math:`\|A\|^2` of all measurements.
        tau: :math:`\tau`, in units of :math:`\|A\|^2`.
        step_size: :math:`\gamma`, in units of :math:`1 / \|A\|^2`; None in the proximal form.
        residual: Relative residual :math:`\|T(x) - x\| / \|T(x)\|` at the images.
        denoiser: How much the denoiser expands there.
        norm: Largest singular value of :math:`T'`, from below: below 1, each iteration near there brings any two
            images nearer.
        contraction: Spectral radius of :math:`T'`, estimated: the factor of the error per iteration in the end.
        errors: Relative residuals of the eigenproblems of `norm` (squared) and `contraction`, shape ``(B, 2)``.
        direction: The direction in which the error shrinks most slowly, of norm 1, shape ``(B, *image_shape)``.
        kept: Share :math:`\langle v, T' v \rangle` of that direction `v` that a proximal step keeps, in either form: 1
            where neither data nor denoiser determine it.
        denoiser_calls: Calls of the denoiser in which `Picard` shrinks the error by the solver's tolerance; infinite
            where the map does not contract.
        message: All of this in words, and what to change.
    """

    norm_squared: float
    tau: float
    step_size: float | None
    residual: Tensor
    denoiser: LipschitzEstimate
    norm: Tensor
    contraction: Tensor
    errors: Tensor
    direction: Tensor
    kept: Tensor
    denoiser_calls: Tensor
    message: str

    @property
    def converges(self) -> Tensor:
        """Whether the iteration is expected to converge near each image; bool, shape ``(B,)``."""
        return self.contraction < 1 - RESOLUTION

    @property
    def unique(self) -> Tensor:
        """Whether no direction was found that the equation leaves undetermined; bool, shape ``(B,)``."""
        return (self.kept - 1).abs() > UNDETERMINED

    def __str__(self) -> str:
        """Return the message."""
        return self.message


@takes_numpy
def diagnose(
    model: DEQRED,
    y: Tensor,
    operator: Any,
    x: Tensor | None = None,
    *,
    iterations: int = 50,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    r"""Tell why the fixed-point iteration of a model converges for these measurements, or does not.

    .. math:: T'(x) v = (P A^H A P + \tau)^{-1} P \tau D'(x) v, \qquad
        T'(x) v = P \bigl( v - \gamma (A^H A v + \tau (v - D'(x) v)) \bigr)

    in the proximal and in the gradient form, with all measurements, whatever the minibatch, and `P` the mask of the
    pixels above 0 where the model is nonnegative. Norm and spectral radius of this are found by Krylov iterations,
    which approach them from below where `D'` is symmetric: read `Diagnosis.contraction` as "at least".

    *A fixed point that is not unique.* Where `D` leaves a direction unchanged that `A` does not see, :math:`T'` has the
    eigenvalue 1 in both forms: that part of the image stays what the start has. Total variation and the mean of a slice
    in diffraction tomography are such a pair. The iterations start from random numbers and the mean of each channel, so
    that a mean is found at once. What to do: take the part from the start on purpose (give `x0`), measure it, or take a
    denoiser that pulls it somewhere, if only by a factor of 0.99.

    Args:
        model: The model.
        y: Measurements, shape ``(B, *data_shape)``.
        operator: The operator, as of ``model(y, operator)``.
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
        >>> ct = ParallelBeamCT(image_size=16, angles=12)
        >>> diagnosis = diagnose(DEQRED(lambda x: 0.5 * x, tau=0.1), ct(torch.ones(1, 16, 16)), ct)
        >>> bool(diagnosis.converges), bool(diagnosis.unique)
        (True, True)
    """
    if not isinstance(model, DEQRED):
        raise TypeError(f"diagnose: model must be a DEQRED, got {type(model).__name__}")
    measurement = as_operator(operator)
    where = "at the images given"
    if x is None:
        x, where = _solution(model, y, measurement)
    with torch.inference_mode(False), torch.no_grad(), model._problem(y, measurement, x) as (red, point, _):
        derivative = _Derivative(red, point.detach())
        jacobian = derivative.jacobian

        def solve(apply: Callable[[Tensor], Tensor], spectrum: Spectrum) -> tuple[Tensor, Tensor, Tensor]:
            start = random_like(jacobian.output, generator)
            # Half of it is the means of the channels: what data and denoiser leave alone is most often one of them.
            means = random_like(start[..., :1, :1], generator).expand_as(start)
            values, errors, vectors = arnoldi(apply, start + means, spectrum, iterations, tolerance)
            return values[:, 0].clamp(min=0), errors[:, 0], vectors

        estimate = estimate_from(jacobian, iterations, tolerance, generator)
        squared, norm_error, _ = solve(lambda v: derivative.transposed(derivative(v)), largest)
        contraction, contraction_error, direction = solve(derivative, modulus)
        kept, residual = derivative.kept(direction), derivative.residual()
        norm_squared = float(measurement.norm_squared())
        step_size = float(red.step_size) * norm_squared if isinstance(red, GradientMap) else None
    shrinks = contraction < 1 - RESOLUTION
    needed = (math.log(model.solver.tolerance) / contraction.clamp(min=1e-300).log()).clamp(min=1).ceil()
    found = Diagnosis(
        norm_squared,
        float(model.tau),
        step_size,
        residual,
        estimate,
        squared.sqrt(),
        contraction,
        torch.stack([norm_error, contraction_error], 1),
        from_channels(direction, point),
        kept,
        torch.where(shrinks, needed, math.inf),
        "",
    )
    return replace(found, message=_describe(found, where, model.solver.tolerance))


class _Derivative:
    """The derivative of the map at a point, on images as real channels ``(B, C, H, W)``."""

    def __init__(self, red: REDMap, point: Tensor) -> None:
        self.red = red
        self.point = point
        self.weight = red.weight.to(point.real.dtype)
        self.free = (point > 0).to(point.dtype) if red.nonnegative else None
        self.jacobian = Jacobian(self._denoise, as_channels(point))
        accuracy = torch.finfo(point.dtype).eps ** 0.75
        self.accuracy = torch.full((len(point),), accuracy, device=point.device)

    def _denoise(self, channels: Tensor) -> Tensor:
        return as_channels(self.red.denoise(from_channels(channels, self.point)))

    def _normal(self, v: Tensor) -> Tensor:
        """Return ``A^H A v``."""
        return as_channels(self.red.fidelity.normal(from_channels(v, self.point)))

    def _solve(self, v: Tensor) -> Tensor:
        """Return ``(A^H A + tau)^-1 v`` on the free pixels."""
        rhs = from_channels(v, self.point)
        solved = self.red.fidelity.solve(rhs, self.weight, torch.zeros_like(rhs), self.accuracy, self.free)
        return as_channels(solved)

    def _active(self, v: Tensor) -> Tensor:
        return v if self.free is None else v * as_channels(self.free)

    def _step(self, v: Tensor, denoised: Tensor, step_size: Tensor) -> Tensor:
        return v - step_size.to(v.dtype) * (self._normal(v) + self.weight * (v - denoised))

    def __call__(self, v: Tensor) -> Tensor:
        """Return ``T' v``."""
        if not isinstance(self.red, GradientMap):
            return self._proximal(v)
        return self._active(self._step(v, self.jacobian.jvp(v), self.red.step_size))

    def _proximal(self, v: Tensor) -> Tensor:
        return self._solve(self._active(self.weight * self.jacobian.jvp(v)))

    def transposed(self, v: Tensor) -> Tensor:
        """Return ``T'^H v``."""
        v = self._active(v)
        if isinstance(self.red, GradientMap):
            return self._step(v, self.jacobian.vjp(v), self.red.step_size)
        return self.jacobian.vjp(self.weight * self._solve(v))

    def kept(self, v: Tensor) -> Tensor:
        """Return the share of directions of norm 1 that a proximal step keeps; without tau, this map's own step."""
        v = self._active(v)
        return (inner(v, self._proximal(v) if float(self.weight) > 0 else self(v)) / inner(v, v)).cpu()

    def residual(self) -> Tensor:
        """Return the relative residual of the map at the point."""
        step = self.red.step(self.point, torch.full_like(self.accuracy, ACCURACY))
        change, size, _ = step.reductions.unbind(1)
        return torch.where(change > 0, (change / size).sqrt(), 0).cpu()


def _solution(model: DEQRED, y: Tensor, operator: Any) -> tuple[Tensor, str]:
    """Return the images that the model finds, converged or not, or its start where it diverges, and what they are."""
    with torch.no_grad():
        solution = model._solve(y, operator, None)
        value = solution.value
        if bool(solution.diverged.any()):
            diverged = per_image(solution.diverged.to(value.device), value)
            return torch.where(diverged, operator.initial(y), value), "at the start, for the solve diverges"
    if bool(solution.converged.all()):
        return value, "at the solution"
    return value, "where the solve ended without converging"


def _describe(found: Diagnosis, where: str, tolerance: float) -> str:
    radius, norm = float(found.contraction.max()), float(found.norm.max())
    default = 1 / (1 + 2 * found.tau)
    form = (
        "the proximal form" if found.step_size is None else f"gradient steps of {found.step_size:.4g} / |A|^2"
    )
    if found.step_size is not None:
        form += f" ({found.step_size / default:.3g} of 1 / (|A|^2 + 2 tau))"
    text = [
        f"|A|^2 = {found.norm_squared:.4g}, tau = {found.tau:.4g} |A|^2, {form}.",
        f"Linearized {where} (relative residual up to {float(found.residual.max()):.2g}):",
        f"D changes at most {float(found.denoiser.denoiser.max()):.4g} times as fast as its input, x - D(x) "
        f"{float(found.denoiser.residual.max()):.4g} times; the map T has the contraction factor {radius:.6g} "
        f"or more, and the norm {norm:.6g} or more (relative residuals up to {float(found.errors.max()):.1g}).",
    ]
    if radius <= 1 + RESOLUTION and not bool(found.unique.all()):
        text.append(
            f"{_name(found)} is determined by neither the data nor D: T keeps it (an eigenvalue of 1), and the fixed "
            "point is not unique: that part stays as it is at the start. Give x0 with the one you want, measure it, or "
            "take a denoiser that pulls it somewhere, if only by a factor of 0.99."
        )
    elif radius < 1 - RESOLUTION:
        text.append(
            f"T contracts there: Picard() takes about {int(found.denoiser_calls.max())} calls of the denoiser or more "
            f"to shrink the error by {tolerance:.0e}, Anderson() usually fewer."
        )
        if not bool(found.denoiser.nonexpansive.all()):
            text.append(
                "But D expands there: elsewhere the iteration may move away; the data make up for it here."
            )
    elif radius <= 1 + RESOLUTION:
        text.append("T hardly contracts there: lower tau, or take a denoiser that contracts.")
    else:
        text.append("T expands there: the iteration moves away from a fixed point with this derivative.")
        if found.step_size is not None and found.step_size > default * (1 + SLACK):
            text.append("Leave step_size to its default first: this one is longer.")
        elif float(found.denoiser.smallest_eigenvalue.min()) > 0:
            text.append(
                "x - D(x) is monotone there: gradient steps that are short enough, GradientStep(step_size), contract."
            )
        else:
            text.append(
                "x - D(x) is not monotone there, and the data do not make up for it: lower tau, or take a denoiser "
                "that expands less (spectral norms, longer training, training through the fixed point)."
            )
    return "\n".join(text)


def _name(found: Diagnosis) -> str:
    """Say what the undetermined direction of the first image that has one is."""
    image = int((~found.unique).nonzero()[0])
    direction = found.direction[image : image + 1]
    channels = as_channels(direction)[0]
    # The share of each channel's mean in the square of the norm.
    shares = channels.mean((-1, -2)).square() * channels[0].numel()
    if float(shares.sum()) < MEAN:
        return f"Some direction (Diagnosis.direction[{image}])"
    of = "the image" if direction.ndim == 3 else f"its {direction.shape[1]} slices or channels"
    return f"The mean of {of}"
