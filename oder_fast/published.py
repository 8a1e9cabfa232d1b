"""ODER as it was published."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._numpy import takes_numpy
from .deqred import DEQRED
from .fixed_point import Differentiation, Nesterov
from .red import GradientStep


@takes_numpy
def oder(
    denoiser: Callable[[Tensor], Tensor],
    tau: float | Tensor,
    minibatch_size: int,
    *,
    step_size: float | Tensor | None = None,
    max_iterations: int = 180,
    nonnegative: bool = True,
    generator: torch.Generator | None = None,
    differentiation: Differentiation | None = None,
) -> DEQRED:
    r"""Return ODER as its official code has it: minibatch gradients, Nesterov's momentum, a fixed number of iterations.

    .. math:: x_k = P \bigl( s_{k-1} - \gamma (\nabla g_{B_k}(s_{k-1}) + \tau (s_{k-1} - D(s_{k-1}))) \bigr), \quad
        s_k = x_k + \frac{t_{k-1} - 1}{t_k} (x_k - x_{k-1})

    without restart, without variance reduction, without a mean of the last iterates, and without a test. For CT the
    code draws views in sectors: build ``ParallelBeamCT(..., sampling="stratified")``.

    Args:
        denoiser: As of `DEQRED`.
        tau: In units of :math:`\|A\|^2`.
        minibatch_size: Blocks per iteration.
        step_size: In units of :math:`1 / \|A\|^2`; None for the default of `GradientStep`.
        max_iterations: Iterations, all of which are run; the official code's by default.
        nonnegative: Whether iterates are clipped at 0; False for complex images.
        generator: Source of the minibatches.
        differentiation: As of `DEQRED`.

    Example:
        >>> import torch
        >>> from oder_fast.operators import ParallelBeamCT
        >>> ct = ParallelBeamCT(image_size=16, angles=10, sampling="stratified")
        >>> model = oder(lambda x: 0.9 * x, tau=0.1, minibatch_size=5)
        >>> model(ct(torch.ones(1, 16, 16)), ct).shape
        torch.Size([1, 16, 16])

    References:
        Liu, Xu, Gan, Shoushtari, Kamilov, "Online deep equilibrium learning for regularization by denoising",
        NeurIPS 2022, and its official code.
    """
    return DEQRED(
        denoiser,
        tau=tau,
        step=GradientStep(step_size, minibatch_size, variance_reduction=False),
        solver=Nesterov(max_iterations, check_every=None, restart=False, tail=None),
        differentiation=differentiation,
        nonnegative=nonnegative,
        normalize=False,
        generator=generator,
        on_failure="ignore",
    )
