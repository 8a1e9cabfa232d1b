"""Measurement operators: what a user builds, and what the fixed point takes its gradients from."""

from .ct import ParallelBeamCT
from .mri import CartesianMRI

__all__ = ["CartesianMRI", "ParallelBeamCT"]
