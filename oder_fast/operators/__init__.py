"""Measurement operators: what a user builds, and what the fixed point takes its gradients from."""

from .ct import ParallelBeamCT

__all__ = ["ParallelBeamCT"]
