"""How much a denoiser expands: estimates from below at given images, and bounds from above for all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._numpy import takes_numpy
from .._torch import fft, kept
from ._krylov import Spectrum, arnoldi, largest, random_like, symmetric
from .freeze import frozen

# A constant that exceeds 1 by less than this is taken for 1.
SLACK = 1e-3
# Frequencies per axis at which the symbol of a convolution is taken, at least.
FREQUENCIES = 32
# Above this many channels on both sides its symbol is not taken: hours, for networks whose bound says nothing.
SYMBOL_CHANNELS = 128
# Covers the rounding of eigenvalues in float64.
ROUNDING = 1 + 1e-10


class Jacobian:
    r"""The Jacobian of a map at a point, by its products :math:`J v` and :math:`J^T v`.

    :math:`J^T u` is linear in `u`, and its own transposed derivative is `J`: two backward passes in place of
    forward-mode differentiation, which not every module knows.

    Args:
        function: From ``(B, C, H, W)`` to the same, each image for itself.
        point: Real, shape ``(B, C, H, W)``.

    Raises:
        ValueError: Where the output has another shape, or no gradient in the point.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], point: Tensor) -> None:
        with torch.enable_grad():
            self.leaf = point.detach().requires_grad_()
            self.output = function(self.leaf)
            if self.output.shape != point.shape:
                raise ValueError(
                    f"the denoiser must return the shape it got, {tuple(point.shape)}, got {tuple(self.output.shape)}"
                )
            if not self.output.requires_grad:
                raise ValueError(
                    "the denoiser must be differentiable, but its output has no gradient in its input"
                )
            self.dual = torch.zeros_like(self.output).requires_grad_()
            (self.transposed,) = torch.autograd.grad(
                self.output, self.leaf, self.dual, create_graph=True, materialize_grads=True
            )

    def vjp(self, v: Tensor) -> Tensor:
        """Return ``J^T v``."""
        return _gradient(self.output, self.leaf, v)

    def jvp(self, v: Tensor) -> Tensor:
        """Return ``J v``."""
        return (
            _gradient(self.transposed, self.dual, v) if self.transposed.requires_grad else torch.zeros_like(v)
        )


def _gradient(output: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(output, leaf, v, retain_graph=True, materialize_grads=True)
    return gradient.detach()


@dataclass(frozen=True)
class LipschitzEstimate:
    r"""How a denoiser `D` and its residual :math:`R(x) = x - D(x)` change near images; all float64, shape ``(B,)``.

    Attributes:
        denoiser: Largest singular value of the Jacobian of `D`: its Lipschitz constant near the image, from
            below.
        residual: The same of `R`, from below.
        smallest_eigenvalue: Of the symmetric part of the Jacobian of `R`, from above: at least 0 where `R` is
            monotone.
        largest_eigenvalue: Of the same, from below.
        errors: Relative residuals of the four eigenproblems, in this order, shape ``(B, 4)``; of the first two
            they are those of the squares. Well below 1: the numbers can be trusted.
        message: What this means for RED, and what to change.
    """

    denoiser: Tensor
    residual: Tensor
    smallest_eigenvalue: Tensor
    largest_eigenvalue: Tensor
    errors: Tensor
    message: str

    @property
    def nonexpansive(self) -> Tensor:
        """Whether no direction was found in which `D` expands, by more than 0.1 %; bool, shape ``(B,)``."""
        return self.denoiser <= 1 + SLACK

    def __str__(self) -> str:
        """Return the message."""
        return self.message


@takes_numpy
def estimate_lipschitz(
    denoiser: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    iterations: int = 50,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> LipschitzEstimate:
    r"""Estimate how much a denoiser expands near images, to tell whether RED with it is expected to converge.

    .. math:: \|J_D\|, \quad \|J_R\|, \quad \lambda_{\min}, \lambda_{\max} \text{ of } \tfrac12 (J_R + J_R^T),
        \qquad J_R = I - J_D

    With step size :math:`1 / (\|A\|^2 + 2 \tau)`, the default of `DEQRED`, the map of RED is averaged, and its
    iteration converges to a fixed point if there is one, where `D` is nonexpansive: :math:`\|J_D\| \le 1`
    everywhere. What is found here is a local constant at the images given, and from below, as Lanczos' iteration
    ends early: a value above 1 proves that `D` expands, a value below does not prove the contrary. Take images
    like those that the iteration passes through; `bound_lipschitz` bounds from above.

    Args:
        denoiser: Module or function from ``(B, C, H, W)`` to the same, each image for itself; differentiable
            twice (the second time by a zero, as piecewise linear networks are). Frozen meanwhile, see `frozen`.
        images: Where to look, real, shape ``(B, C, H, W)``.
        iterations: Products with the Jacobian and its transpose, at most, per constant; as many images are kept.
        tolerance: Largest relative residual at which the iteration stops.
        generator: Source of the start vectors; None for the default one of torch.

    Returns:
        The `LipschitzEstimate`; print it.

    Raises:
        TypeError: For images that are not real.
        ValueError: For another shape, a denoiser that is not differentiable, or settings that make no sense.

    Example:
        >>> import torch
        >>> estimate = estimate_lipschitz(lambda x: 0.5 * x, torch.zeros(1, 1, 8, 8))
        >>> estimate.denoiser
        tensor([0.5000], dtype=torch.float64)

    References:
        Ryu, Liu, Wang, Chen, Wang, Yin, "Plug-and-play methods provably converge with properly trained
        denoisers", ICML 2019. Golub, Van Loan, "Matrix computations", chapter 10.
    """
    name = "estimate_lipschitz"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: images must be a real floating-point tensor, got {got}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"{name}: images must have shape (B, C, H, W), none 0, got {tuple(images.shape)}")
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(
            f"{name}: iterations must be at least 1 and tolerance at least 0, got {iterations} and {tolerance}"
        )
    with torch.inference_mode(False), frozen(denoiser) as same:
        return estimate_from(Jacobian(same, kept(images)), iterations, tolerance, generator)


def estimate_from(
    jacobian: Jacobian, iterations: int, tolerance: float, generator: torch.Generator | None
) -> LipschitzEstimate:
    """Return the estimate of a denoiser that is linearized already, see `estimate_lipschitz`."""

    def residual(v: Tensor) -> Tensor:
        return v - jacobian.jvp(v)

    def residual_transposed(v: Tensor) -> Tensor:
        return v - jacobian.vjp(v)

    def solve(apply: Callable[[Tensor], Tensor], spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        start = random_like(jacobian.output, generator)
        return arnoldi(apply, start, spectrum, iterations, tolerance)[:2]

    of_denoiser, denoiser_error = solve(lambda v: jacobian.vjp(jacobian.jvp(v)), largest)
    of_residual, residual_error = solve(lambda v: residual_transposed(residual(v)), largest)
    ends, ends_error = solve(lambda v: (residual(v) + residual_transposed(v)) / 2, symmetric)
    norm, residual_norm = (v[:, 0].clamp(min=0).sqrt() for v in (of_denoiser, of_residual))
    errors = torch.cat([denoiser_error, residual_error, ends_error], 1)
    message = _describe(norm, residual_norm, ends, errors)
    return LipschitzEstimate(norm, residual_norm, ends[:, 0], ends[:, 1], errors, message)


def _describe(norm: Tensor, residual_norm: Tensor, ends: Tensor, errors: Tensor) -> str:
    worst = int(norm.argmax())
    top, smallest, of_residual = float(norm[worst]), float(ends[:, 0].min()), float(residual_norm.max())
    text = [
        f"Near {len(norm)} image(s), D changes at most {top:.4g} times as fast as its input (image {worst}), "
        f"x - D(x) {of_residual:.4g} times; the symmetric part of the latter's Jacobian has eigenvalues from "
        f"{smallest:.4g} to {float(ends[:, 1].max()):.4g}. (Local and from below; relative residuals up to "
        f"{float(errors.max()):.1g}.)"
    ]
    if top <= 1 + SLACK:
        text.append(
            "Nonexpansive here: where this holds everywhere, RED with the step size 1 / (|A|^2 + 2 tau), the "
            "default, is averaged and converges to a fixed point if there is one"
            + (
                f", by a factor of 1 - step_size * tau * {1 - top:.3g} per iteration or better."
                if top < 1 - SLACK
                else "; it need not contract in directions that neither the data nor D determine."
            )
        )
    elif smallest > 0:
        text.append(
            "Expansive here, but x - D(x) is strongly monotone: RED converges near here for step sizes below "
            f"2 tau m / (|A|^2 + tau r)^2 with m = {smallest:.3g}, r = {of_residual:.3g}; the default step size may "
            "be too long. Lower step_size, or see diagnose(model, y, operator) for the whole map."
        )
    else:
        text.append(
            "Expansive here, and x - D(x) is not monotone: RED converges only where the data make up for it. "
            "Lower tau; train longer, through the fixed point or with spectral norms; or see "
            "diagnose(model, y, operator) for the whole map."
        )
    return " ".join(text)


def bound_lipschitz(module: nn.Module) -> float:
    r"""Bound the Lipschitz constant of a module from above, for all images of all sizes.

    .. math:: \|f_n \circ \cdots \circ f_1\| \le \prod_i \|f_i\|, \quad \|f + g\| \le \|f\| + \|g\|, \quad
        \|(f, g)\| \le (\|f\|^2 + \|g\|^2)^{1/2}

    The norms are Euclidean, layer by layer: rigorous, but a product of worst cases, loose for deep networks. A
    bound at most 1 proves that the denoiser is nonexpansive; a larger one proves nothing. Normalizations by
    statistics of the input itself (`GroupNorm`, `LayerNorm`) have the constant :math:`\max |w| / \sqrt\epsilon`,
    316 at the default epsilon, so that bounds of networks with them are finite but say nothing.

    Known are `Sequential`, `Conv2d` and `ConvTranspose2d` (see `conv_norm`; zero padding, or circular at stride
    1), `Linear`, `MaxPool2d`, common activations, normalizations, dropout (frozen, see `frozen`), and every
    module with a method ``lipschitz_bound()``: `DnCNN`, `UNet`, `DRUNet`, `TotalVariation`, or your own.

    Args:
        module: The module.

    Returns:
        The bound.

    Raises:
        ValueError: For a module that is not known, or has no such constant; names it.

    Example:
        >>> import torch
        >>> bound_lipschitz(torch.nn.Sequential(torch.nn.Identity(), torch.nn.LeakyReLU(0.1)))
        1.0
    """
    with torch.no_grad(), frozen(module) as same:
        return _bound(same, "")


def _bound(module: nn.Module, path: str) -> float:
    own: Callable[[], float] | None = getattr(module, "lipschitz_bound", None)
    if own is not None:
        return float(own())
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return math.prod(
            _bound(child, f"{path}.{name}".lstrip(".")) for name, child in module.named_children()
        )
    for kind, rule in RULES.items():
        # A subclass that computes something else is not known.
        if isinstance(module, kind) and type(module).forward is kind.forward:
            try:
                return float(rule(module))
            except _UnknownError as error:
                raise ValueError(f"bound_lipschitz: {_name(module, path)}: {error}") from None
    raise ValueError(
        f"bound_lipschitz: no bound is known for {_name(module, path)}: give it a method lipschitz_bound()"
    )


def _name(module: nn.Module, path: str) -> str:
    return type(module).__name__ + (f" ({path})" if path else "")


class _UnknownError(Exception):
    """A module whose settings have no rule."""


def conv_norm(
    weight: Tensor,
    stride: tuple[int, ...] = (1, 1),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> float:
    r"""Bound the norm of a two-dimensional convolution with zero padding, for images of all sizes.

    The smaller of two bounds. The first takes the kernel as a matrix `W` from patches to output channels, and a
    pixel lies in at most :math:`\lceil k_h / s_h \rceil \lceil k_w / s_w \rceil` patches:

    .. math:: \|W\|_2 \, \bigl( \lceil k_h / s_h \rceil \lceil k_w / s_w \rceil \bigr)^{1/2}

    with equality where patches do not overlap. The second is for stride 1, and for others as well, for they only
    drop outputs. A zero-padded convolution is a part of the convolution of infinite images, which the Fourier
    transform makes a product with the symbol :math:`\hat W(\omega) = \sum_k W_k e^{-i \omega \cdot k}`, so that
    its norm is at most :math:`\sup_\omega \|\hat W(\omega)\|_2`. For fixed unit vectors,
    :math:`|u^* \hat W v|^2` is a real trigonometric polynomial of degree :math:`k - 1` along each axis, and such a
    polynomial of degree `d` falls from its maximum no faster than :math:`\cos(d \theta)` (M. Riesz), so that among
    `N` equidistant frequencies one is found, at most :math:`\pi / N` away, where

    .. math:: \sup_\omega \|\hat W(\omega)\|_2^2 \le \max_{\mathrm{grid}} \|\hat W\|_2^2 \,\big/
        \prod_{k \in \{k_h, k_w\}} \cos\bigl( (k - 1) \pi / N \bigr)

    2 % above the maximum for kernels 3x3 and `N` = 32. It is not taken where more than 128 channels meet.

    Args:
        weight: Shape ``(out, in / groups, kh, kw)``.
        stride: Along rows and columns.
        dilation: Along rows and columns.
        groups: Of channels.

    Returns:
        The bound; of a transposed convolution too, which is the transpose of one with the same weight.

    References:
        Sedghi, Gupta, Long, "The singular values of convolutional layers", ICLR 2019, for circular padding.
    """
    kernel = weight.detach().double().cpu().unflatten(0, (groups, -1))
    sides = kernel.shape[-2:]
    patches = math.prod(
        math.ceil(k * math.gcd(d, s) / s) for k, s, d in zip(sides, stride, dilation, strict=True)
    )
    bound = _matrix_norm(kernel.flatten(2)) * math.sqrt(patches)
    if patches > 1 and min(kernel.shape[1:3]) <= SYMBOL_CHANNELS:
        grid = [max(FREQUENCIES, 8 * k) for k in sides]
        symbol = fft(torch.fft.rfftn, kernel, size=grid, norm="backward").permute(0, 3, 4, 1, 2)
        between = math.prod(math.cos((k - 1) * math.pi / n) for k, n in zip(sides, grid, strict=True))
        bound = min(bound, _matrix_norm(symbol) / math.sqrt(between))
    return bound * ROUNDING


def _matrix_norm(matrices: Tensor) -> float:
    """Return the largest singular value of all matrices."""
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mH
    return math.sqrt(max(float(torch.linalg.eigvalsh(matrices @ matrices.mH).max()), 0.0))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _conv(module: nn.Conv2d | nn.ConvTranspose2d) -> float:
    if module.padding_mode != "zeros" and not (module.padding_mode == "circular" and module.stride == (1, 1)):
        raise _UnknownError(
            f"no bound is known for padding mode {module.padding_mode!r} and stride {module.stride}"
        )
    return conv_norm(module.weight, module.stride, module.dilation, module.groups)


def _max_pool(module: nn.MaxPool2d) -> float:
    sides, stride, dilation = (_pair(v) for v in (module.kernel_size, module.stride, module.dilation))
    return math.sqrt(
        math.prod(math.ceil(k * math.gcd(d, s) / s) for k, s, d in zip(sides, stride, dilation, strict=True))
    )


def _largest_weight(weight: Tensor | None) -> float:
    return 1.0 if weight is None else float(weight.detach().abs().max())


def _running(module: nn.BatchNorm2d | nn.InstanceNorm2d) -> float:
    if module.running_var is None:
        if isinstance(module, nn.BatchNorm2d):
            raise _UnknownError(
                "it keeps no running statistics, so that images of a batch depend on each other"
            )
        return _own_statistics(module)
    scale = torch.rsqrt(module.running_var.double() + module.eps)
    return float((scale if module.weight is None else scale * module.weight.double().abs()).max())


def _own_statistics(module: nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d) -> float:
    # The derivative of z / (|z|^2 / n + eps)^(1/2) has norm at most eps^(-1/2), which it takes at z = 0.
    return _largest_weight(module.weight) / math.sqrt(module.eps)


RULES: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _conv,
    nn.Linear: lambda module: _matrix_norm(module.weight.detach().double().cpu()) * ROUNDING,
    nn.MaxPool2d: _max_pool,
    nn.BatchNorm2d: _running,
    nn.InstanceNorm2d: _running,
    nn.GroupNorm: _own_statistics,
    nn.LayerNorm: _own_statistics,
    nn.Identity: lambda module: 1.0,
    nn.Dropout: lambda module: 1.0,
    nn.Dropout2d: lambda module: 1.0,
    nn.ReLU: lambda module: 1.0,
    nn.LeakyReLU: lambda module: max(1.0, abs(module.negative_slope)),
    nn.PReLU: lambda module: max(1.0, _largest_weight(module.weight)),
    nn.ELU: lambda module: max(1.0, abs(module.alpha)),
    nn.Softplus: lambda module: 1.0,
    nn.Tanh: lambda module: 1.0,
    nn.Sigmoid: lambda module: 0.25,
}
