"""BM3D, by the package of its authors."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from .._extras import needs
from .._numpy import takes_numpy
from .base import check_image, set_scalar


@takes_numpy
class BM3D(nn.Module):
    r"""Denoise by block matching and collaborative filtering, with the package ``bm3d`` of the authors.

    Each channel of each image by itself, on the CPU whatever the device of the image, in seconds for 512x512. It
    has no derivative: use it without gradients (``torch.no_grad()``), as a fixed denoiser. It is no proximal map
    and not nonexpansive, and `estimate_lipschitz` cannot measure it: RED with it converges in practice, not by a
    theorem.

    The package is no dependency of this one and its licence is for noncommercial use only.

    Args:
        sigma: Noise level, standard deviation in the unit of the image; a float above 0.

    Raises:
        ImportError: Where the package is not installed.
        TypeError: For a `sigma` that is no number.
        ValueError: For a `sigma` that is not above 0.

    Example:
        >>> import torch
        >>> with torch.no_grad():  # doctest: +SKIP
        ...     denoised = BM3D(0.1)(torch.rand(1, 1, 64, 64))

    References:
        Dabov, Foi, Katkovnik, Egiazarian, "Image denoising by sparse 3-D transform-domain collaborative filtering",
        IEEE Trans. Image Processing 16 (2007). Makinen, Azzari, Foi, "Collaborative filtering of correlated noise",
        IEEE Trans. Image Processing 29 (2020).
    """

    sigma: float

    scale_free = False

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if not isinstance(sigma, (float, int)):
            raise TypeError(f"BM3D: sigma must be a float, it cannot be trained, got {type(sigma).__name__}")
        set_scalar(self, "sigma", sigma)
        if sigma == 0:
            raise ValueError("BM3D: sigma must be above 0, got 0")
        needs("BM3D (noncommercial use only)", "bm3d")

    def forward(self, image: Tensor) -> Tensor:
        """Return the denoised image D(x), shape ``(B, C, H, W)``, of an image of that shape.

        Raises:
            RuntimeError: Where a gradient in the image is asked for.
        """
        check_image("BM3D", image)
        if torch.is_grad_enabled() and image.requires_grad:
            raise RuntimeError(
                "BM3D: it has no derivative in its input, so that nothing can be trained through it: call it under "
                "torch.no_grad(), or take another denoiser (DRUNet, TotalVariation)"
            )
        bm3d = importlib.import_module("bm3d")
        planes = image.detach().double().cpu().flatten(0, 1)
        denoised = [torch.from_numpy(bm3d.bm3d(plane.numpy(), float(self.sigma))) for plane in planes]
        result = torch.stack(denoised) if denoised else planes
        return result.reshape(image.shape).to(image)

    def extra_repr(self) -> str:
        """Tell the noise level."""
        return f"sigma={self.sigma}"
