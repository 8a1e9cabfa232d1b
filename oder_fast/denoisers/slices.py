"""A network for complex volumes of any number of slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._numpy import takes_numpy
from .base import Denoiser, Predicts, check_image
from .lipschitz import bound_lipschitz

PARTS = 2
"""Channels of a slice: real and imaginary part."""

ABOVE = 3.0
"""Bound of the norm of x - b: the root of a slice's values over those whose mean b is, sqrt(5) for large slices."""


@takes_numpy
class SliceDnCNN(Denoiser):
    r"""Denoise each slice of a complex volume, seeing its neighbours too, by dilated convolutions and ReLU.

    .. math:: D(x)_z = N\bigl((x - b)_{z-n}, \dots, (x - b)_{z+n}\bigr)

    One network serves all slices, so that a volume may have any number of them, and any size. There are no biases:
    ``D(a x) = a D(x)`` for a > 0. Beyond its first and last slice a volume is taken for 0.

    The data of intensity diffraction tomography do not hold the mean of a slice's real part. The network makes the
    background of each slice 0: :math:`b`, of real and imaginary part each, is the mean of the second fifth of a
    slice's values in increasing order. It so assumes that objects are denser than the medium around them, and cover
    at most 60 % of a slice.

    Args:
        dilations: Of each convolution 3x3; at least 2.
        width: Channels between them.
        neighbours: Slices seen on either side.
        predicts: ``"image"`` or ``"residual"``, which is of :math:`x - b`.

    Raises:
        ValueError: For fewer than two dilations, one under 1, a width under 1, or another `predicts`.

    Example:
        >>> import torch
        >>> SliceDnCNN((1, 2, 1), width=8)(torch.zeros(1, 10, 9, 7)).shape
        torch.Size([1, 10, 9, 7])

    References:
        Zhang, Zuo, Gu, Zhang, "Learning deep CNN denoiser prior for image restoration", CVPR 2017 (the dilations).
    """

    scale_free = True

    def __init__(
        self,
        dilations: Sequence[int] = (1, 2, 3, 4, 3, 2, 1),
        width: int = 32,
        neighbours: int = 2,
        predicts: Predicts = "image",
    ) -> None:
        super().__init__(PARTS, PARTS, predicts)
        if len(dilations) < 2 or min(dilations) < 1:
            raise ValueError(f"SliceDnCNN: dilations must be at least two, each at least 1, got {dilations}")
        if width < 1 or neighbours < 0:
            raise ValueError(
                f"SliceDnCNN: width must be at least 1 and neighbours at least 0, got {width} and {neighbours}"
            )
        self.neighbours = neighbours
        channels = [PARTS * (2 * neighbours + 1), *[width] * (len(dilations) - 1), PARTS]
        layers: list[nn.Module] = []
        for (before, after), dilation in zip(pairwise(channels), dilations, strict=True):
            layers += [
                nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation, bias=False),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers[:-1])

    def network(self, image: Tensor) -> Tensor:
        """Return the raw prediction for volumes whose background is 0, shape ``(B, 2 Z, H, W)``."""
        batch, channels, height, width = image.shape
        slices, seen = channels // PARTS, 2 * self.neighbours + 1
        volume = image.reshape(batch, slices, PARTS, height, width)
        empty = volume.new_zeros(batch, self.neighbours, PARTS, height, width)
        padded = torch.cat((empty, volume, empty), 1)
        stacks = torch.stack([padded[:, k : k + slices] for k in range(seen)], 2)
        stacks = stacks.reshape(batch * slices, seen * PARTS, height, width)
        prediction: Tensor = self.layers(stacks.contiguous(memory_format=torch.channels_last))
        return prediction.reshape(batch, channels, height, width)

    def forward(self, image: Tensor) -> Tensor:
        """Return the denoised volume, of one ``(B, 2 Z, H, W)`` whose channels are re, im, re, im..."""
        check_image("SliceDnCNN", image)
        if image.shape[1] % PARTS or not image.numel():
            raise ValueError(
                "SliceDnCNN: image must have two channels for each slice and not be empty, got shape "
                f"{tuple(image.shape)}"
            )
        above = image - background(image)
        prediction = self.network(above)
        return above - prediction if self.predicts == "residual" else prediction

    def network_lipschitz_bound(self) -> float:
        """Return an upper bound of the Lipschitz constant of `network`, see `bound_lipschitz`."""
        return math.sqrt(2 * self.neighbours + 1) * bound_lipschitz(self.layers)

    def lipschitz_bound(self) -> float:
        """Return an upper bound of the Lipschitz constant of the denoiser, see `bound_lipschitz`."""
        return ABOVE * super().lipschitz_bound()


def background(image: Tensor) -> Tensor:
    """Return the mean of the second fifth of the values of each channel, in increasing order, ``(B, C, 1, 1)``.

    The derivative of one quantile would jump from pixel to pixel.
    """
    values = image.flatten(2).sort(2).values
    n = values.shape[2]
    return values[:, :, n // 5 : n // 5 + max(1, n // 5)].mean(2)[:, :, None, None]
