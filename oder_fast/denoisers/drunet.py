"""DRUNet: a bias-free residual U-Net told the noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, cat, nn

from .._numpy import takes_numpy
from ._checkpoints import load_fitting
from .base import Denoiser, Predicts, pad_to_multiple, set_scalar
from .lipschitz import bound_lipschitz, conv_norm


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Add convolution 3x3, ReLU, convolution 3x3 of the features to them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res = nn.Sequential(_conv(channels, channels), nn.ReLU(), _conv(channels, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Return the features plus their residual."""
        result: Tensor = features + self.res(features)
        return result

    def lipschitz_bound(self) -> float:
        """Return an upper bound of the Lipschitz constant, see `bound_lipschitz`."""
        return 1 + bound_lipschitz(self.res)


@takes_numpy
class DRUNet(Denoiser):
    r"""Denoise with a residual U-Net that takes the noise level as one more channel.

    .. math:: D_\sigma(x) = N(x, \sigma \mathbf{1})

    Residual blocks (convolution 3x3, ReLU, convolution 3x3) on each level, convolutions 2x2 of stride 2 down,
    transposed ones up, the encoder's features added on the way up, no bias anywhere. So one network serves all
    noise levels, and :math:`D_{a \sigma}(a x) = a D_\sigma(x)` for :math:`a > 0`. The defaults are the published
    network; its public weights (``drunet_gray.pth``; ``drunet_color.pth`` with ``in_channels=3``) are for images
    in [0, 1], see `load_official_state_dict`. An image whose sides are no multiples of ``2 ** levels`` is
    extended at its lower and right border by reflection (replication where it is too small) and the result
    cropped.

    Args:
        channels: Channels of each level, the last is the bottleneck.
        in_channels: Channels of the image, the noise level's not among them.
        blocks: Residual blocks per level and direction.
        sigma: Noise level, standard deviation in the unit of the image: a float, a 0-d tensor, a parameter to be
            trained, or None for a blind network without the noise level's channel. A float is a setting and not
            in the `state_dict`; a tensor or parameter is.
        predicts: ``"image"``, as published, or ``"residual"`` (the network returns ``x - D(x)``).

    Raises:
        TypeError: For a `sigma` that is no number.
        ValueError: For fewer than two levels, no channels or blocks, a negative `sigma`, or another `predicts`.

    Example:
        >>> import torch
        >>> DRUNet(channels=(4, 8), blocks=1, sigma=0.1)(torch.zeros(1, 1, 31, 17)).shape
        torch.Size([1, 1, 31, 17])

    References:
        Zhang, Li, Zuo, Zhang, Van Gool, Timofte, "Plug-and-play image restoration with deep denoiser prior",
        IEEE Trans. Pattern Analysis and Machine Intelligence 44 (2022).
    """

    sigma: float | Tensor | None

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        in_channels: int = 1,
        blocks: int = 4,
        sigma: float | Tensor | None = 0.05,
        predicts: Predicts = "image",
    ) -> None:
        super().__init__(in_channels, in_channels, predicts)
        if len(channels) < 2 or min(channels) < 1:
            raise ValueError(
                f"DRUNet: channels must name at least two levels, each of at least 1, got {tuple(channels)}"
            )
        if blocks < 1:
            raise ValueError(f"DRUNet: blocks must be at least 1, got {blocks}")
        if sigma is None:
            self.sigma = None
        else:
            set_scalar(self, "sigma", sigma)
        self.scale_free = sigma is None
        self.levels = len(channels) - 1

        def stage(width: int) -> list[nn.Module]:
            return [ResidualBlock(width) for _ in range(blocks)]

        # The names are those of the public weights.
        self.m_head = _conv(in_channels + (sigma is not None), channels[0])
        for level, (here, below) in enumerate(pairwise(channels), 1):
            down = nn.Conv2d(here, below, 2, stride=2, bias=False)
            self.add_module(f"m_down{level}", nn.Sequential(*stage(here), down))
        self.m_body = nn.Sequential(*stage(channels[-1]))
        for level, (here, below) in reversed(list(enumerate(pairwise(channels), 1))):
            up = nn.ConvTranspose2d(below, here, 2, stride=2, bias=False)
            self.add_module(f"m_up{level}", nn.Sequential(up, *stage(here)))
        self.m_tail = _conv(channels[0], in_channels)

    def network(self, image: Tensor) -> Tensor:
        """Return the raw prediction; the denoised image by default."""
        height, width = image.shape[-2:]
        features = pad_to_multiple(image, 2**self.levels)
        if self.sigma is not None:
            features = cat((features, self.sigma * features.new_ones(features[:, :1].shape)), 1)
        features = self.m_head(features)
        skips = [features]
        for level in range(1, self.levels + 1):
            skips.append(getattr(self, f"m_down{level}")(skips[-1]))
        features = self.m_body(skips[-1])
        for level in range(self.levels, 0, -1):
            features = getattr(self, f"m_up{level}")(features + skips.pop())
        prediction: Tensor = self.m_tail(features + skips.pop())
        return prediction[..., :height, :width]

    def network_lipschitz_bound(self) -> float:
        """Return an upper bound of the network's Lipschitz constant in the image, see `bound_lipschitz`.

        It holds for images whose sides need no extension.
        """
        # The noise level's channel is constant: only the image's count.
        skips = [conv_norm(self.m_head.weight[:, : self.in_channels])]
        for level in range(1, self.levels + 1):
            skips.append(skips[-1] * bound_lipschitz(getattr(self, f"m_down{level}")))
        here = skips[-1] * bound_lipschitz(self.m_body)
        for level in range(self.levels, 0, -1):
            here = (here + skips.pop()) * bound_lipschitz(getattr(self, f"m_up{level}"))
        return (here + skips.pop()) * bound_lipschitz(self.m_tail)

    def load_official_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the public weights, or others of the same names, all of them or none.

        The names are ``m_head``, ``m_down1`` to ``m_down3``, ``m_body``, ``m_up3`` to ``m_up1`` and ``m_tail``,
        with or without a common prefix (``module.``). `sigma` keeps its value: the weights do not hold it.

        Args:
            checkpoint: The state dict.

        Raises:
            ValueError: Where a key is missing, unexpected or of another shape; names each, loads nothing.

        Example:
            >>> import torch
            >>> checkpoint = torch.load("drunet_gray.pth", weights_only=True)  # doctest: +SKIP
            >>> DRUNet(sigma=0.03).load_official_state_dict(checkpoint)  # doctest: +SKIP
        """
        load_fitting(self, checkpoint, "m_head.", keep=("sigma",))

    def extra_repr(self) -> str:
        """Tell the noise level and what the network predicts."""
        sigma = float(self.sigma.detach()) if isinstance(self.sigma, Tensor) else self.sigma
        return f"sigma={sigma}, {super().extra_repr()}"
