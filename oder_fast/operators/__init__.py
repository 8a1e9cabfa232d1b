"""Measurement operators: what a user builds, and what the fixed point takes its gradients from."""

from .ct import ParallelBeamCT
from .idt import DiffractionTomography
from .mri import CartesianMRI

__all__ = ["CartesianMRI", "DiffractionTomography", "ParallelBeamCT"]
