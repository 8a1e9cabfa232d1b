"""The U-Net of the official ODER code, and smaller ones of its kind."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, cat, nn
from torch.nn.utils import parametrizations

from .._numpy import takes_numpy
from ._checkpoints import load_fitting
from .base import Denoiser, Predicts, pad_to_multiple
from .lipschitz import bound_lipschitz

Norm = Callable[[nn.Module], nn.Module]

GROUPS = 4

# Parameters and buffers of a spectral norm: the hook's names, and those of the parametrization.
LEGACY_NAMES = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}


def _block(
    name: str, in_channels: int, channels: int, norm: Callable[[nn.Module], nn.Module]
) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            [
                (f"{name}conv1", norm(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))),
                (f"{name}norm1", nn.GroupNorm(GROUPS, channels)),
                (f"{name}relu1", nn.PReLU()),
                (f"{name}conv2", norm(nn.Conv2d(channels, channels, 3, padding=1, bias=False))),
                (f"{name}relu2", nn.PReLU()),
            ]
        )
    )


@takes_numpy
class UNet(Denoiser):
    """Denoise with a U-Net; the defaults are the official network, 7,759,539 parameters.

    A block is convolution 3x3, group normalization in 4 groups, PReLU, convolution 3x3, PReLU; between levels
    max-pooling by 2 and transposed convolution by 2; the encoder's features are concatenated on the way up.
    Each (transposed) convolution carries a spectral norm, which bounds the kernel as a matrix: it is no
    certificate that the denoiser contracts. An image whose sides are no multiples of ``2 ** levels`` is
    extended at its lower and right border by reflection (replication where it is too small) and the result
    cropped.

    Args:
        channels: Channels of each level, the last is the bottleneck; multiples of 4.
        in_channels: Channels of the image.
        out_channels: Channels of the prediction; `in_channels` where None.
        predicts: ``"residual"``, as in the official code (the network returns ``x - D(x)``), or ``"image"``.
        spectral_norm: Normalize each (transposed) convolution.
        recompute: Whether a `DEQRED` that trains the network keeps no normalizations, activations and concatenations
            for its derivatives, but computes them again: a step at 256 x 256 takes 137 MiB for 240.

    Raises:
        ValueError: For fewer than two levels, channels that 4 does not divide, or another `predicts`.

    Example:
        >>> import torch
        >>> UNet(channels=(8, 16))(torch.zeros(1, 1, 31, 17)).shape
        torch.Size([1, 1, 31, 17])

    References:
        Liu, Xu, Gan, Shoushtari, Kamilov, "Online deep equilibrium learning for regularization by denoising",
        NeurIPS 2022. Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        in_channels: int = 1,
        out_channels: int | None = None,
        predicts: Predicts = "residual",
        spectral_norm: bool = True,
        recompute: bool = False,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(in_channels, out_channels, predicts)
        self.recompute = recompute
        if len(channels) < 2:
            raise ValueError(f"UNet: channels must name at least two levels, got {tuple(channels)}")
        if any(c < GROUPS or c % GROUPS for c in channels):
            raise ValueError(
                f"UNet: channels must be multiples of {GROUPS}, its groups, got {tuple(channels)}"
            )
        norm = parametrizations.spectral_norm if spectral_norm else nn.Identity()
        self.levels = len(channels) - 1
        for level, (above, here) in enumerate(pairwise((in_channels, *channels[:-1])), 1):
            self.add_module(f"encoder{level}", _block(f"enc{level}", above, here, norm))
        self.bottleneck = _block("bottleneck", channels[-2], channels[-1], norm)
        for level in range(self.levels, 0, -1):
            here, below = channels[level - 1], channels[level]
            self.add_module(f"upconv{level}", norm(nn.ConvTranspose2d(below, here, 2, stride=2)))
            self.add_module(f"decoder{level}", _block(f"dec{level}", 2 * here, here, norm))
        self.conv = norm(nn.Conv2d(channels[0], out_channels, 1))

    def network(self, image: Tensor) -> Tensor:
        """Return the raw prediction; the residual ``x - D(x)`` by default."""
        height, width = image.shape[-2:]
        features = pad_to_multiple(image, 2**self.levels)
        skips = []
        for level in range(1, self.levels + 1):
            skips.append(getattr(self, f"encoder{level}")(features))
            features = F.max_pool2d(skips[-1], 2)
        features = self.bottleneck(features)
        for level in range(self.levels, 0, -1):
            features = getattr(self, f"upconv{level}")(features)
            features = getattr(self, f"decoder{level}")(cat((features, skips.pop()), 1))
        prediction: Tensor = self.conv(features)
        return prediction[..., :height, :width]

    def network_lipschitz_bound(self) -> float:
        """Return an upper bound of the network's Lipschitz constant, see `bound_lipschitz`.

        It holds for images whose sides need no extension. Group normalization makes it useless in practice:
        its constant is the inverse root of its epsilon, 316, whatever the weights of the convolutions.
        """
        here = 1.0
        skips = []
        for level in range(1, self.levels + 1):
            here *= bound_lipschitz(getattr(self, f"encoder{level}"))
            skips.append(here)
        here *= bound_lipschitz(self.bottleneck)
        for level in range(self.levels, 0, -1):
            here *= bound_lipschitz(getattr(self, f"upconv{level}"))
            here = bound_lipschitz(getattr(self, f"decoder{level}")) * math.hypot(here, skips.pop())
        return here * bound_lipschitz(self.conv)

    def load_official_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load weights as the official code saves them, all of them or none.

        The official checkpoints keep spectral norms as hooks do (``weight_orig``, ``weight_u``, ``weight_v``)
        and carry the prefix of the module that held the network (``rObj.network.``).

        Args:
            checkpoint: The state dict, or the checkpoint that holds it as ``model_state_dict``.

        Raises:
            ValueError: Where a key is missing, unexpected or of another shape; names each, loads nothing.

        Example:
            >>> import torch
            >>> checkpoint = torch.load("ODER.pth", weights_only=True)  # doctest: +SKIP
            >>> UNet().load_official_state_dict(checkpoint)  # doctest: +SKIP
        """
        state: Mapping[str, Any] = checkpoint.get("model_state_dict", checkpoint)
        load_fitting(self, state, "encoder1.", LEGACY_NAMES)
