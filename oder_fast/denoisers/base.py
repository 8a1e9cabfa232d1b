"""What all denoisers share: the call always returns the denoised image."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._numpy import takes_numpy
from .._torch import kept

Predicts = Literal["residual", "image"]


@takes_numpy
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

    scale_free: bool = False
    """Whether D(a x) = a D(x) for all a > 0, so that images in any unit are denoised alike."""

    recompute: bool = False
    """Whether the graph at a fixed point keeps what is dear to compute alone; see `UNet`."""

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
        raise NotImplementedError(f"{type(self).__name__} must define network(image)")

    def network_lipschitz_bound(self) -> float:
        """Return an upper bound of the Lipschitz constant of `network`, see `bound_lipschitz`."""
        raise NotImplementedError(f"{type(self).__name__} has no network_lipschitz_bound()")

    def lipschitz_bound(self) -> float:
        """Return an upper bound of the Lipschitz constant of the denoiser, see `bound_lipschitz`."""
        bound = self.network_lipschitz_bound()
        return 1 + bound if self.predicts == "residual" else bound

    def forward(self, image: Tensor) -> Tensor:
        """Return the denoised image D(x), shape ``(B, C, H, W)``, of an image of that shape."""
        check_image(type(self).__name__, image, self.in_channels)
        prediction = self.network(image)
        return image - prediction if self.predicts == "residual" else prediction

    def extra_repr(self) -> str:
        """Say what the network predicts."""
        return f"predicts={self.predicts!r}"


def check_image(name: str, image: Tensor, channels: int | None = None) -> None:
    """Refuse what is no real image ``(B, C, H, W)``, or one with other channels."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: image must be a torch.Tensor, got {type(image).__name__}")
    if not torch.is_floating_point(image):
        raise TypeError(f"{name}: image must be floating-point, got {image.dtype}")
    if image.ndim != 4 or (channels is not None and image.shape[1] != channels):
        wanted = "C" if channels is None else channels
        raise ValueError(f"{name}: image must have shape (B, {wanted}, H, W), got {tuple(image.shape)}")


def set_scalar(module: nn.Module, name: str, value: float | Tensor, *, positive: bool = False) -> None:
    """Give a module a setting of at least 0, or above 0: a float, a 0-d tensor (a buffer) or a parameter.

    Raises:
        TypeError: For anything else.
        ValueError: For a tensor of another shape or dtype, a negative value, NaN or infinity.
    """
    owner = type(module).__name__
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"{owner}: {name} must be a float or a 0-d floating-point tensor, got {value.dtype} "
                f"of shape {tuple(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a float or a 0-d tensor, got {type(value).__name__}")
    number = float(value.detach()) if isinstance(value, Tensor) else float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(
            f"{owner}: {name} must be finite and {'above' if positive else 'at least'} 0, got {number}"
        )
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, kept(value))
    else:
        setattr(module, name, value)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Extend images at their lower and right border until their sides are multiples.

    By reflection, or by replication where the image is too small to be reflected.
    """
    height, width = image.shape[-2:]
    pad_height, pad_width = -height % multiple, -width % multiple
    if not (pad_height or pad_width):
        return image
    mode = "reflect" if pad_height < height and pad_width < width else "replicate"
    return F.pad(image, (0, pad_width, 0, pad_height), mode=mode)
