"""DnCNN without batch normalization."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .._numpy import takes_numpy
from .base import Denoiser, Predicts
from .lipschitz import bound_lipschitz


@takes_numpy
class DnCNN(Denoiser):
    """Denoise with a chain of convolutions 3x3 and ReLU.

    Args:
        depth: Number of convolutions, at least 2.
        width: Channels between them.
        in_channels: Channels of the image.
        predicts: ``"residual"`` (the network returns ``x - D(x)``) or ``"image"``.
        bias: Give the convolutions a bias; without it, ``D(a x) = a D(x)`` for a > 0.
        spectral_norm: Normalize each convolution's kernel as a matrix.

    Raises:
        ValueError: For a depth under 2, a width under 1, or another `predicts`.

    Example:
        >>> import torch
        >>> DnCNN(depth=3, width=8)(torch.zeros(1, 1, 9, 7)).shape
        torch.Size([1, 1, 9, 7])

    References:
        Zhang, Zuo, Chen, Meng, Zhang, "Beyond a Gaussian denoiser", IEEE Trans. Image Processing 26 (2017).
    """

    def __init__(
        self,
        depth: int = 17,
        width: int = 64,
        in_channels: int = 1,
        predicts: Predicts = "residual",
        bias: bool = True,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(in_channels, in_channels, predicts)
        if depth < 2 or width < 1:
            raise ValueError(f"DnCNN: depth must be at least 2 and width at least 1, got {depth} and {width}")
        norm = parametrizations.spectral_norm if spectral_norm else nn.Identity()
        channels = [in_channels, *[width] * (depth - 1), in_channels]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [norm(nn.Conv2d(before, after, 3, padding=1, bias=bias)), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.scale_free = not bias

    def network(self, image: Tensor) -> Tensor:
        """Return the raw prediction; the residual ``x - D(x)`` by default."""
        prediction: Tensor = self.layers(image)
        return prediction

    def network_lipschitz_bound(self) -> float:
        """Return an upper bound of the network's Lipschitz constant, see `bound_lipschitz`."""
        return bound_lipschitz(self.layers)
