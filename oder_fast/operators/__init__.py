"""Measurement operators: what a user builds, and what the fixed point takes its gradients from."""

from .ct import ParallelBeamCT
from .idt import DiffractionTomography
from .mri import CartesianMRI
from .parallel import MeasurementParallel, split_blocks

__all__ = ["CartesianMRI", "DiffractionTomography", "MeasurementParallel", "ParallelBeamCT", "split_blocks"]
