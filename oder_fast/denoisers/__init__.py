"""Denoisers: networks that map a noisy image to a clean one, and what keeps them fixed during a solve."""

from .base import Denoiser
from .dncnn import DnCNN
from .freeze import folded, frozen
from .unet import UNet

__all__ = ["Denoiser", "DnCNN", "UNet", "folded", "frozen"]
