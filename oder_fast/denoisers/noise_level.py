"""Denoisers that are told the noise level at each call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .._numpy import takes_numpy
from .base import set_scalar


@takes_numpy
class AtNoiseLevel(nn.Module):
    r"""Call a denoiser of two arguments, ``denoiser(x, sigma)``, at one noise level.

    .. math:: D(x) = D_\sigma(x)

    So the denoisers of deepinv are called, and others. It should be one and the same map at each call; deepinv's
    ``TVDenoiser`` and ``TGVDenoiser`` start where their last call ended (see `TotalVariation` for one that does
    not). Its ``GSDRUNet`` can be differentiated once only, and so not through a fixed point, while the attribute
    ``detach`` of its submodules is True, as it is at first.

    Args:
        denoiser: Module or function of an image ``(B, C, H, W)`` and the noise level.
        sigma: Noise level, standard deviation in the unit of the image: a float, a 0-d tensor, or a parameter to
            be trained, given to the denoiser as it is. A float is a setting and not in the `state_dict`; a tensor
            or parameter is.

    Raises:
        TypeError: For a denoiser that cannot be called, or a `sigma` that is no number.
        ValueError: For a negative `sigma`.

    Example:
        >>> import torch
        >>> shrink = AtNoiseLevel(lambda x, sigma: (x - sigma).relu(), 0.5)
        >>> shrink(torch.tensor([[[[1.0, -0.2]]]]))
        tensor([[[[0.5000, 0.0000]]]])
    """

    sigma: float | Tensor
    scale_free = False

    def __init__(self, denoiser: Callable[[Tensor, float | Tensor], Tensor], sigma: float | Tensor) -> None:
        super().__init__()
        if not callable(denoiser):
            raise TypeError(f"AtNoiseLevel: denoiser must be callable, got {type(denoiser).__name__}")
        self.denoiser = denoiser
        set_scalar(self, "sigma", sigma)

    def forward(self, image: Tensor) -> Tensor:
        """Return the denoised image, of the shape of `image`."""
        return self.denoiser(image, self.sigma)

    def extra_repr(self) -> str:
        """Tell the noise level."""
        return f"sigma={float(self.sigma.detach()) if isinstance(self.sigma, Tensor) else self.sigma}"
