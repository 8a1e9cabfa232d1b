"""How far reconstructions are from the truth, for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import LeastSquares, Part

WINDOW, SIGMA = 11, 1.5
"""Gaussian window of the structural similarity, as Wang et al. have it."""


FLATTEST = 1e-3
"""Least range of a true image over its largest magnitude."""

POWER_ITERATIONS, POWER_ACCURACY = 10, 1e-2
"""By which the contraction factor is found, and how accurate the solves in them are."""


def mse_loss(image: Tensor, truth: Tensor) -> Tensor:
    r"""Return the mean squared error, :math:`|x - \hat x|^2` of complex images."""
    difference = image - truth
    return (difference * difference.conj()).real.mean()


def l1_loss(image: Tensor, truth: Tensor) -> Tensor:
    r"""Return the mean absolute error, :math:`|x - \hat x|` of complex images."""
    return (image - truth).abs().mean()


def ssim_loss(image: Tensor, truth: Tensor) -> Tensor:
    r"""Return 1 minus the mean structural similarity; of complex images that of their magnitudes.

    .. math:: \mathrm{SSIM} = \frac{(2 \mu_x \mu_y + c_1)(2 \sigma_{xy} + c_2)}
        {(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)}

    with a Gaussian window of 11 pixels, :math:`c_i = (k_i L)^2`, :math:`k = (0.01, 0.03)`, and the range :math:`L` of
    each true image.

    Args:
        image: Shape ``(B, ..., H, W)``, real or complex, both sides at least 11.
        truth: The same.

    Raises:
        ValueError: For an image that is smaller than the window.

    References:
        Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE Trans. Image Processing 13 (2004).
    """
    if min(image.shape[-2:]) < WINDOW:
        raise ValueError(
            f"ssim_loss: images must have at least {WINDOW} rows and columns, got {tuple(image.shape)}"
        )
    x, y = (magnitude(v).reshape(len(v), -1, *v.shape[-2:]) for v in (image, truth))
    span = (y.flatten(1).amax(1) - y.flatten(1).amin(1))[:, None, None, None]
    # A truth that is uniform, but for rounding, has no range of its own.
    span = torch.maximum(span, FLATTEST * y.flatten(1).abs().amax(1)[:, None, None, None])
    # Squares of squares of it must not vanish.
    span = torch.where(span > torch.finfo(x.dtype).tiny ** 0.2, span, torch.ones_like(span))
    # Variances of what differs from one level: else they would be small differences of large squares.
    level = y.flatten(1).mean(1)[:, None, None, None]
    x, y = x - level, y - level
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    ramp = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-(ramp**2) / (2 * SIGMA**2))
    window = window / window.sum()

    def average(v: Tensor) -> Tensor:
        flat = v.reshape(-1, 1, *v.shape[-2:])
        blurred = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return blurred.reshape(*v.shape[:2], *blurred.shape[-2:])

    mean_x, mean_y = average(x), average(y)
    var_x, var_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + level, mean_y + level
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return 1 - similarity.mean()


def magnitude(image: Tensor) -> Tensor:
    """Return the magnitude of a complex image, differentiable at 0 too; a real one as it is."""
    if not image.is_complex():
        return image
    tiny = torch.finfo(image.real.dtype).tiny
    return (image.real.square() + image.imag.square() + tiny).sqrt()


def splitting_loss(image: Tensor, left_out: Part) -> Tensor:
    r"""Return how wrongly images foretell measurements that they were not reconstructed from; needs no truth.

    .. math:: \frac{\|A_2 \hat x(y_1) - y_2\|^2}{\|y_2\|^2}

    the mean over images. Where the noise of the two parts is independent, it differs in expectation from the error
    of :math:`A_2 \hat x` by the noise alone, which no weight can change.

    Args:
        image: Reconstructed from the part that was kept, shape ``(B, *image_shape)``.
        left_out: The other part, of `MeasurementOperator.split`.

    References:
        Yaman, Hosseini, Moeller, Ellermann, Ugurbil, Akcakaya, "Self-supervised learning of physics-guided
        reconstruction neural networks without fully sampled reference data", Magnetic Resonance in Medicine 84 (2020).
    """
    return _relative(_squares(left_out.operator(image) - left_out.y), left_out.y)


def sure_loss(
    measured: Tensor, beside: Tensor, y: Tensor, probe: Tensor, step: float, noise: float, count: Tensor
) -> Tensor:
    r"""Return Stein's unbiased estimate of the error of A x under white Gaussian noise; needs no truth.

    .. math:: \|A \hat x(y) - y\|^2 - m \sigma^2 + \frac{2 \sigma^2}{\epsilon}
        \operatorname{Re} \langle b, A \hat x(y + \epsilon b) - A \hat x(y) \rangle

    over :math:`\|y\|^2`, the mean over images. It sees nothing of the error in what A does not measure.

    Args:
        measured: :math:`A \hat x(y)`, shape ``(B, *data_shape)``.
        beside: :math:`A \hat x(y + \epsilon b)`.
        y: Data.
        probe: :math:`b`, white Gaussian numbers of variance 1 where something is measured, else 0.
        step: :math:`\epsilon`.
        noise: :math:`\sigma`, the noise's standard deviation; of complex noise that of both parts together.
        count: :math:`m`, values measured of each image, shape ``(B,)``.

    References:
        Ramani, Blu, Unser, "Monte-Carlo SURE: a black-box optimization of regularization parameters for general
        denoising algorithms", IEEE Trans. Image Processing 17 (2008). Metzler, Mousavi, Heckel, Baraniuk,
        "Unsupervised learning with Stein's unbiased risk estimator", arXiv:1805.10531 (2018).
    """
    along = ((beside - measured) * probe.conj()).real.flatten(1).sum(1) / step
    return _relative(_squares(measured - y) + noise**2 * (2 * along - count), y)


def contraction_loss(
    denoise: Callable[[Tensor], Tensor],
    fidelity: LeastSquares,
    point: Tensor,
    tau: float,
    most: float,
    probe: Tensor,
    free: Tensor | None = None,
) -> Tensor:
    r"""Return by how much the map of the proximal form contracts less than it should, at fixed points.

    .. math:: \max(0, \hat\rho - \rho_{\max})^2, \qquad \hat\rho = \frac{\|T'^H v\|}{\|v\|}, \qquad
        T'^H v = D'(x)^H \tau (A^H A + \tau)^{-1} v

    the mean over images, with `v` the last of a few power iterations of :math:`T'^H`. Where the largest eigenvalue is
    near 1 a solve takes hundreds of calls; what the data determine the network may expand.

    Args:
        denoise: The denoiser as a map of images, differentiable twice.
        fidelity: Data fidelity of the measurements.
        point: Where to look: solutions, shape ``(B, *image_shape)``.
        tau: Weight of the prior, absolute.
        most: :math:`\rho_{\max}`.
        probe: Where the power iterations start, shape of `point`.
        free: 1 where a pixel is free, 0 where x >= 0 holds it; None for all.

    References:
        Pesquet, Repetti, Terris, Wiaux, "Learning maximally monotone operators for image recovery", SIAM Journal on
        Imaging Sciences 14 (2021), who penalize a norm of the denoiser alone.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        denoised = denoise(leaf)
    weight = torch.tensor(tau, dtype=point.real.dtype, device=point.device)
    accuracy = torch.full((len(point),), POWER_ACCURACY, device=point.device)
    v = probe if free is None else free * probe
    for k in range(POWER_ITERATIONS):
        v = v / _norm(v)
        with torch.no_grad():
            weighted = fidelity.solve(weight * v, weight, torch.zeros_like(v), accuracy, free)
        last = recorded and k == POWER_ITERATIONS - 1
        (v,) = torch.autograd.grad(denoised, leaf, weighted, retain_graph=True, create_graph=last)
        v = v if free is None else free * v
    return (_norm(v).flatten() - most).clamp(min=0).square().mean()


def _norm(v: Tensor) -> Tensor:
    tiny = torch.finfo(v.real.dtype).tiny
    return (_squares(v) + tiny).sqrt().reshape(-1, *(1,) * (v.ndim - 1))


def _squares(v: Tensor) -> Tensor:
    return (v * v.conj()).real.flatten(1).sum(1)


def _relative(squares: Tensor, y: Tensor) -> Tensor:
    size = _squares(y.detach())
    return (squares / torch.where(size > 0, size, 1)).mean()


LOSSES = {"mse": mse_loss, "l1": l1_loss, "ssim": ssim_loss}
"""Losses that compare with the truth."""


def total_loss(weights: Mapping[Any, float], image: Tensor, truth: Tensor) -> Tensor:
    """Return the weighted sum of losses by name.

    Raises:
        TypeError: For real images and complex truths, or the reverse.
        ValueError: For images of another shape than the truths'.
    """
    if image.shape != truth.shape:
        raise ValueError(
            f"total_loss: image must have the shape of truth, {tuple(truth.shape)}, got {tuple(image.shape)}"
        )
    if image.is_complex() != truth.is_complex():
        raise TypeError(
            f"total_loss: image and truth must both be real or both complex, got {image.dtype} and {truth.dtype}"
        )
    terms = [weight * LOSSES[name](image, truth) for name, weight in weights.items()]
    return torch.stack(terms).sum()
