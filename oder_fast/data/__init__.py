"""Real images, phantoms, simulated measurements, and how good a reconstruction is."""

from .images import ImageFile, atomic, read_image, save_npz
from .metrics import psnr, snr, ssim
from .phantoms import patches, random_ellipses, shepp_logan
from .simulation import add_gaussian_noise, add_poisson_noise

__all__ = [
    "ImageFile",
    "add_gaussian_noise",
    "add_poisson_noise",
    "atomic",
    "patches",
    "psnr",
    "random_ellipses",
    "read_image",
    "save_npz",
    "shepp_logan",
    "snr",
    "ssim",
]
