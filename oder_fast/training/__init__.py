"""Training loops: a denoiser on noise, and through the fixed point."""

from .loops import train_denoiser, train_fixed_point

__all__ = ["train_denoiser", "train_fixed_point"]
