"""Denoisers: networks that map a noisy image to a clean one, and what keeps them fixed during a solve."""

from torch import nn

from .base import Denoiser
from .bm3d import BM3D
from .dncnn import DnCNN
from .drunet import DRUNet
from .freeze import frozen
from .lipschitz import LipschitzEstimate, bound_lipschitz, estimate_lipschitz
from .noise_level import AtNoiseLevel
from .slices import SliceDnCNN
from .total_variation import TotalVariation
from .unet import UNet

KINDS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "dncnn": DnCNN,
    "drunet": DRUNet,
    "slice_dncnn": SliceDnCNN,
}
"""Networks, as configurations and model cards name them."""

__all__ = [
    "BM3D",
    "AtNoiseLevel",
    "DRUNet",
    "Denoiser",
    "DnCNN",
    "LipschitzEstimate",
    "SliceDnCNN",
    "TotalVariation",
    "UNet",
    "bound_lipschitz",
    "estimate_lipschitz",
    "frozen",
]
