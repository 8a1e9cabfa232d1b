"""What all denoisers share: the call always returns the denoised image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Predicts = Literal["residual", "image"]


class Denoiser(nn.Module):
    r"""Turn what a network predicts into the denoised image.

    .. math:: D(x) = x - N(x) \quad \text{(residual)}, \qquad D(x) = N(x) \quad \text{(image)}

    A subclass defines :math:`N` as `network`.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels the network returns; `in_channels` where it predicts the residual.
        predicts: ``"residual"`` or ``"image"``.

    Raises:
        ValueError: For another `predicts`, or a residual with other channels than the image.
    """

    def __init__(self, in_channels: int, out_channels: int, predicts: Predicts) -> None:
        super().__init__()
        name = type(self).__name__
        if predicts not in ("residual", "image"):
            raise ValueError(f'{name}: predicts must be "residual" or "image", got {predicts!r}')
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"{name}: channels must be at least 1, got {in_channels} and {out_channels}")
        if predicts == "residual" and in_channels != out_channels:
            raise ValueError(
                f"{name}: a residual has the channels of the image, {in_channels}, got {out_channels}"
            )
        self.in_channels = in_channels
        self.predicts = predicts

    def network(self, image: Tensor) -> Tensor:
        """Return the raw prediction N(x), shape ``(B, C, H, W)``."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Return the denoised image D(x), shape ``(B, C, H, W)``, of an image of that shape."""
        name = type(self).__name__
        if not isinstance(image, Tensor):
            raise TypeError(f"{name}: image must be a torch.Tensor, got {type(image).__name__}")
        if not torch.is_floating_point(image):
            raise TypeError(f"{name}: image must be floating-point, got {image.dtype}")
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"{name}: image must have shape (B, {self.in_channels}, H, W), got {tuple(image.shape)}"
            )
        prediction = self.network(image)
        return image - prediction if self.predicts == "residual" else prediction

    def extra_repr(self) -> str:
        """Say what the network predicts."""
        return f"predicts={self.predicts!r}"
