"""Denoisers: networks that map a noisy image to a clean one, and what keeps them fixed during a solve."""

from .freeze import folded, frozen

__all__ = ["folded", "frozen"]
