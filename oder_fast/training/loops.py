"""Training by the number of steps, so that a seed determines the result whatever the machine's speed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .logs import live_line
from .losses import mse_loss

Generator = torch.Generator | None


def _fit(
    what: str,
    module: nn.Module,
    compute_loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    clip_norm: float,
    progress: bool,
) -> list[float]:
    """Minimize by Adam with a rate that falls to zero along half a cosine; return the loss of each step."""
    for name, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if not value > 0:
            raise ValueError(f"{what}: {name} must be above 0, got {value}")
    if steps < 0:
        raise ValueError(f"{what}: steps must not be negative, got {steps}")
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{what}: nothing to train, no parameter requires a gradient")
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses: list[float] = []
    training = module.training
    module.train()
    try:
        with live_line(what, "step", steps, progress) as bar:
            for step in range(steps):
                optimizer.zero_grad()
                loss = compute_loss()
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    advice = f"lower learning_rate={learning_rate}"
                    raise RuntimeError(f"{what}: the loss is {losses[-1]} at step {step}; {advice}")
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
                optimizer.step()
                schedule.step()
                recent = losses[-50:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.2e}", refresh=False)
                bar.update()
    finally:
        module.train(training)
    return losses


def train_denoiser(
    denoiser: nn.Module,
    make_batch: Callable[[Generator], Tensor],
    *,
    steps: int,
    sigma: tuple[float, float] = (0.0, 0.1),
    learning_rate: float = 1e-3,
    clip_norm: float = 1.0,
    generator: Generator = None,
    progress: bool = True,
) -> list[float]:
    r"""Train a denoiser to remove white Gaussian noise.

    .. math:: \min_\theta \mathbb{E} \, \| D_\theta(x + \sigma n) - x \|^2, \quad \sigma \text{ uniform}

    Interrupting it leaves the weights of the last complete step.

    Args:
        denoiser: Called with noisy images ``(B, C, H, W)``.
        make_batch: Given `generator`, returns clean images ``(B, C, H, W)``.
        steps: Number of Adam steps.
        sigma: Least and largest standard deviation of the noise, in the unit of the images.
        learning_rate: At the start; falls to zero along half a cosine.
        clip_norm: Largest norm of a gradient.
        generator: Source of the noise; the same seed gives the same weights.
        progress: Show a bar with the rate, the time left and the loss.

    Returns:
        The loss of each step.

    Raises:
        ValueError: For a setting out of range.
        RuntimeError: Where the loss is no longer finite.

    Example:
        >>> import torch
        >>> from oder_fast.data import random_ellipses
        >>> from oder_fast.denoisers import DnCNN
        >>> losses = train_denoiser(
        ...     DnCNN(3, 8), lambda g: random_ellipses(4, 32, g)[:, None], steps=2, progress=False
        ... )
        >>> len(losses)
        2
    """
    low, high = sigma
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"train_denoiser: sigma must be two numbers 0 <= low <= high, got {sigma}")

    def compute_loss() -> Tensor:
        clean = make_batch(generator)
        device = clean.device if generator is None else generator.device
        shape = (clean.shape[0], *[1] * (clean.ndim - 1))
        level = low + (high - low) * torch.rand(shape, generator=generator, device=device)
        noise = level * torch.randn(clean.shape, generator=generator, device=device)
        denoised: Tensor = denoiser(clean + noise.to(clean))
        return (denoised - clean).square().mean()

    return _fit(
        "train_denoiser",
        denoiser,
        compute_loss,
        steps=steps,
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        progress=progress,
    )


def train_fixed_point(
    model: nn.Module,
    make_batch: Callable[[Generator], tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    clip_norm: float = 1.0,
    generator: Generator = None,
    progress: bool = True,
) -> list[float]:
    r"""Train through the fixed point: the model's output, not the denoiser's, is compared with the truth.

    .. math:: \min_\theta \mathbb{E} \, \| \bar x_\theta(y) - x \|^2, \qquad \bar x = T_\theta(\bar x; y)

    Args:
        model: Called with measurements, returns images; an `oder_fast.DEQRED`, whose differentiation decides
            how the gradient is computed.
        make_batch: Given `generator`, returns measurements ``(B, ...)`` and the true images ``(B, H, W)``, real or
            complex.
        steps: Number of Adam steps.
        learning_rate: At the start; falls to zero along half a cosine.
        clip_norm: Largest norm of a gradient.
        generator: Given to `make_batch`.
        progress: Show a bar with the rate, the time left and the loss.

    Returns:
        The loss of each step.

    Raises:
        TypeError: For real images where the model's are complex, or the reverse.
        ValueError: For a setting out of range, or images of another shape.
        RuntimeError: Where the loss is no longer finite.
    """

    def compute_loss() -> Tensor:
        measured, truth = make_batch(generator)
        image: Tensor = model(measured)
        if image.shape != truth.shape:
            raise ValueError(
                f"train_fixed_point: make_batch must return true images of shape {tuple(image.shape)}, as the "
                f"model does, got {tuple(truth.shape)}"
            )
        if image.is_complex() != truth.is_complex():
            kind = "complex" if image.is_complex() else "real"
            raise TypeError(f"train_fixed_point: make_batch must return {kind} images, as the model does")
        return mse_loss(image, truth)

    return _fit(
        "train_fixed_point",
        model,
        compute_loss,
        steps=steps,
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        progress=progress,
    )
