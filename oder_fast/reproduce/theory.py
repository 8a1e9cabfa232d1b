r"""The floor under the error of minibatches, against what theory says of it.

A scan of 32 x 32 pixels with 90 views, and a denoiser that is a symmetric blur, so that fixed point, contraction factor
and variances are known from dense matrices in float64. With minibatches of w of the b views the iterates of

.. math:: x_{k+1} = x_k - \gamma (\nabla g_B(x_k) + \tau (x_k - D(x_k)))

end in a cloud around the fixed point :math:`\bar x`. As the minibatch gradient is unbiased,

.. math:: E |x_{k+1} - \bar x|^2 \le \eta^2 E |x_k - \bar x|^2 + \gamma^2 \nu^2 / w, \qquad
    \text{floor} \le \frac{\gamma \nu}{\sqrt{(1 - \eta^2) w}}

with :math:`\nu^2` the mean over the views of :math:`|\nabla g_i(\bar x) - \nabla g(\bar x)|^2`. Views are drawn without
replacement, for which :math:`1 / w` becomes :math:`(b - w) / (w (b - 1))`: the effective size is
:math:`w_e = w (b - 1) / (b - w)`. Where views are drawn in sectors, the blocks are the sets of views of one offset. The
adjoint solve has the same floor, with :math:`H_i \bar u` in place of the gradients, and so has the gradient.

Sources: Liu et al., "Online deep equilibrium learning for regularization by denoising", NeurIPS 2022, for the two
theorems; Robbins and Monro, Ann. Math. Statist. 22 (1951), for the argument.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..data import add_gaussian_noise, random_ellipses
from ..deqred import DEQRED
from ..fixed_point import Implicit, Nesterov, NotConvergedWarning, Picard
from ..operators import ParallelBeamCT
from ..red import GradientStep
from ..viz import new_figure
from .report import Claim, Report, power_law

SIZE, VIEWS, SNR = 32, 90, 50.0
SECTORS = 5
"""In which views are drawn together (``sampling="stratified"``): minibatches of a multiple of them."""

TAU = 0.1
"""In units of the norm squared."""

SIZES = (5, 10, 15, 30, 45, 60)
ITERATIONS, BURN_IN = 5000, 150
"""Of a solve, and of those before what counts: many times the time 1 / (1 - eta) in which the start is forgotten."""

GRADIENTS = 80
"""Adjoint solves, each with minibatches of its own; and the iterations of each."""

ADJOINT_ITERATIONS = 90
OFFICIAL_ITERATIONS, RUNS = 180, 20
"""Of ODER as published; and solves, whose mean is compared at its last iterate."""

MINIBATCH = 30
"""Of the comparisons of momentum and variance reduction."""

Sampling = Literal["uniform", "stratified"]


class Blur(nn.Module):
    r"""A symmetric blur, with eigenvalues in [0, 1], and an image added to it.

    The gradient of a loss in that image is the solution of the adjoint equation, times :math:`\tau`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64))
        kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
        self.kernel = (kernel[:, None] * kernel)[None, None]
        self.seen: list[Tensor] | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Blur, and add."""
        if self.seen is not None:
            self.seen.append(image.detach()[0, 0].clone())
        # Zeros outside: symmetric, and the square of a symmetric operator along each axis.
        return nn.functional.conv2d(image, self.kernel, padding=1) + self.added


class Theory(NamedTuple):
    """What dense matrices tell.

    Attributes:
        tau: In absolute units.
        step: The step size, 1 / L of the whole map.
        eta: Contraction factor.
        fixed_point: Image ``(SIZE, SIZE)``.
        gradient: Of the loss in the image added to the denoiser, ``(SIZE, SIZE)``.
        forward_deviations: Of each view's gradient from the mean of all, at the fixed point, ``(VIEWS, SIZE ** 2)``.
        adjoint_deviations: Of each view's normal operator applied to the adjoint solution, from the mean.
    """

    tau: float
    step: float
    eta: float
    fixed_point: Tensor
    gradient: Tensor
    forward_deviations: Tensor
    adjoint_deviations: Tensor

    def floor(self, deviations: Tensor, size: int, sampling: Sampling) -> float:
        """Return the bound of the root mean square error."""
        blocks = deviations
        if sampling == "stratified":
            blocks = deviations.unflatten(0, (SECTORS, -1)).mean(0)
            size //= SECTORS
        variance = float(blocks.square().sum(1).mean())
        return self.step * math.sqrt(variance / effective(size, len(blocks)) / (1 - self.eta**2))


def effective(size: int, blocks: int) -> float:
    """Return how many independent blocks have the variance of `size` drawn without replacement."""
    return size * (blocks - 1) / (blocks - size)


def _matrix(apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the matrix of a linear map of images."""
    units = torch.eye(SIZE**2, dtype=torch.float64).view(-1, SIZE, SIZE)
    return apply(units).flatten(1).T


def solve_densely(ct: ParallelBeamCT, y: Tensor, weights: Tensor) -> Theory:
    """Return what theory says, of the loss ``(weights * image).sum()``."""
    projector = _matrix(lambda x: ct(x).flatten(1)).unflatten(0, (VIEWS, -1))
    # Of each view, times their number: the mean of these is what all views together give.
    normals = VIEWS * projector.mT @ projector
    targets = VIEWS * torch.einsum("vdn,vd->vn", projector, y[0])
    normal = normals.mean(0)
    tau = TAU * ct.norm_squared()
    with torch.no_grad():
        blur = _matrix(lambda x: Blur()(x[:, None])[:, 0])
    system = normal + tau * (torch.eye(SIZE**2, dtype=torch.float64) - blur)
    eigenvalues = torch.linalg.eigvalsh(system)
    step = float(1 / eigenvalues[-1])
    fixed_point = torch.linalg.solve(system, targets.mean(0))
    adjoint = torch.linalg.solve(system, weights.flatten())
    gradients = normals @ fixed_point - targets
    products = normals @ adjoint
    return Theory(
        tau=tau,
        step=step,
        eta=float(1 - step * eigenvalues[0]),
        fixed_point=fixed_point.view(SIZE, SIZE),
        gradient=tau * adjoint.view(SIZE, SIZE),
        forward_deviations=gradients - gradients.mean(0),
        adjoint_deviations=products - products.mean(0),
    )


class Experiment:
    """The scan, its data, and the solves of the package that are compared with theory."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.truth = random_ellipses(1, SIZE, generator).double()
        self.scans = {s: ParallelBeamCT(SIZE, VIEWS, sampling=s) for s in ("uniform", "stratified")}
        self.y = add_gaussian_noise(self.scans["uniform"](self.truth), SNR, generator)
        self.weights = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        self.theory = solve_densely(self.scans["uniform"], self.y, self.weights)
        self.generator = generator

    def _model(self, size: int | None, iterations: int, **options: Any) -> tuple[DEQRED, Blur]:
        norm = self.scans["uniform"].norm_squared()
        reduce, solver = options.pop("variance_reduction", False), options.pop("solver", None)
        blur = Blur()
        model = DEQRED(
            blur,
            tau=TAU,
            step=GradientStep(self.theory.step * norm, size, reduce),
            solver=solver or Picard(iterations, check_every=None, tail=None),
            normalize=False,
            generator=self.generator,
            on_failure="ignore",
            **options,
        )
        return model, blur

    def forward_floor(self, size: int, sampling: Sampling) -> float:
        """Return the root mean square distance from the fixed point of the iterates of one long solve."""
        model, blur = self._model(size, ITERATIONS)
        seen: list[Tensor] = []
        blur.seen = seen
        with torch.no_grad():
            model(self.y, self.scans[sampling], self.theory.fixed_point[None])
        errors = torch.stack(seen[BURN_IN:]) - self.theory.fixed_point
        return float(errors.square().sum((1, 2)).mean().sqrt())

    def gradient_floor(self, size: int, sampling: Sampling) -> float:
        """Return the root mean square error of gradients in the image added to the denoiser, over adjoint solves."""
        adjoint = Picard(ADJOINT_ITERATIONS, check_every=None, tail=None)
        model, blur = self._model(size, 1, differentiation=Implicit(adjoint))
        start = self.theory.fixed_point[None]
        squares = []
        with warnings.catch_warnings():
            # A solve of all iterations tests nothing, and says so.
            warnings.simplefilter("ignore", NotConvergedWarning)
            for _ in range(GRADIENTS):
                loss = (self.weights * model(self.y, self.scans[sampling], start)).sum()
                (gradient,) = torch.autograd.grad(loss, blur.added)
                squares.append((gradient[0, 0] - self.theory.gradient).square().sum())
        return float(torch.stack(squares).mean().sqrt())

    def last_error(self, **options: Any) -> float:
        """Return the root mean square error of the last iterate of solves from the filtered back-projection."""
        scan = self.scans["stratified"]
        model, _ = self._model(MINIBATCH, OFFICIAL_ITERATIONS, **options)
        squares = []
        with torch.no_grad():
            for _ in range(RUNS):
                x = model(self.y, scan)[0]
                squares.append((x - self.theory.fixed_point).square().sum())
        return float(torch.stack(squares).mean().sqrt())


def run(seed: int = 0) -> Report:
    """Do it all.

    Args:
        seed: Of phantom, noise and minibatches.

    Returns:
        Rows of floors and bounds, relative to the norm of the fixed point or the gradient.
    """
    start = time.perf_counter()
    experiment = Experiment(seed)
    theory = experiment.theory
    rows: list[dict[str, Any]] = []
    parts = (
        ("forward", experiment.forward_floor, theory.forward_deviations, theory.fixed_point, 1.0),
        ("gradient", experiment.gradient_floor, theory.adjoint_deviations, theory.gradient, theory.tau),
    )
    for part, measure, deviations, value, unit in parts:
        for sampling in ("uniform", "stratified"):
            for size in SIZES:
                floor, bound = measure(size, sampling), unit * theory.floor(deviations, size, sampling)
                clusters, of = (size, VIEWS) if sampling == "uniform" else (size // SECTORS, VIEWS // SECTORS)
                rows.append(
                    {
                        "quantity": part,
                        "sampling": sampling,
                        "views": size,
                        "effective_blocks": round(effective(clusters, of), 3),
                        "floor": floor / float(value.norm()),
                        "bound": bound / float(value.norm()),
                        "ratio": floor / bound,
                    }
                )
            print(f"oder-fast: {part}, {sampling} minibatches: done", file=sys.stderr, flush=True)
    claims = []
    for part in ("forward", "gradient"):
        what = "floor of the error" if part == "forward" else "floor of the gradient's error"
        for sampling in ("uniform", "stratified"):
            chosen = [r for r in rows if (r["quantity"], r["sampling"]) == (part, sampling)]
            slope = power_law([r["effective_blocks"] for r in chosen], [r["floor"] for r in chosen])
            claims.append(Claim(f"{what} over minibatches, {sampling}, exponent", slope, -0.55, -0.45))
            ratios = [r["ratio"] for r in chosen]
            claims.append(Claim(f"{what} over its bound, {sampling}, smallest", min(ratios), 0.75))
            claims.append(Claim(f"{what} over its bound, {sampling}, largest", max(ratios), high=1.0))
    plain = experiment.last_error()
    momentum = experiment.last_error(
        solver=Nesterov(OFFICIAL_ITERATIONS, check_every=None, restart=False, tail=None)
    )
    reduced = experiment.last_error(solver=Picard(OFFICIAL_ITERATIONS, 1e-9), variance_reduction=True)
    claims += [
        Claim(
            f"momentum without restart, {MINIBATCH} views: error over that without", momentum / plain, 2, 4
        ),
        Claim(f"variance reduction, {MINIBATCH} views: error over that without", reduced / plain, high=0.1),
    ]
    remarks = [
        f"{SIZE} x {SIZE} pixels, {VIEWS} views, tau/|A|^2 = {TAU}, step size 1/L, contraction factor "
        f"{theory.eta:.4f}; {ITERATIONS - BURN_IN} iterates or {GRADIENTS} adjoint solves a point; "
        f"{time.perf_counter() - start:.0f} s.",
        f"After {OFFICIAL_ITERATIONS} iterations of {MINIBATCH} views (in sectors), distance from the fixed point over "
        f"its norm: {plain / float(theory.fixed_point.norm()):.2e} plain, "
        f"{momentum / float(theory.fixed_point.norm()):.2e} with momentum, "
        f"{reduced / float(theory.fixed_point.norm()):.2e} with variance reduction.",
    ]
    return Report("theory", rows, claims, _figure(rows), remarks)


def _figure(rows: list[dict[str, Any]]) -> Any:
    figure = new_figure(11, 4.6)
    for axis, part, title in zip(
        figure.subplots(1, 2),
        ("forward", "gradient"),
        ("Distance from the fixed point", "Error of the gradient"),
        strict=True,
    ):
        for sampling, colour, marker in (("uniform", "tab:blue", "o"), ("stratified", "tab:orange", "s")):
            chosen = [r for r in rows if (r["quantity"], r["sampling"]) == (part, sampling)]
            views = [r["views"] for r in chosen]
            axis.loglog(views, [r["bound"] for r in chosen], color=colour, label=f"{sampling}, bound")
            axis.loglog(
                views, [r["floor"] for r in chosen], marker, color=colour, label=f"{sampling}, measured"
            )
        axis.set(xlabel=f"views of {VIEWS} in a minibatch", ylabel="root mean square, relative", title=title)
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
