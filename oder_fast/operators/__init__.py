"""Measurement operators, and the data fidelity that each makes of data."""

from .base import ForeignOperator, LeastSquares, MeasurementOperator, Part, as_operator
from .ct import ParallelBeamCT
from .idt import DiffractionTomography
from .mri import CartesianMRI
from .parallel import MeasurementParallel, split_blocks

__all__ = [
    "CartesianMRI",
    "DiffractionTomography",
    "ForeignOperator",
    "LeastSquares",
    "MeasurementOperator",
    "MeasurementParallel",
    "ParallelBeamCT",
    "Part",
    "as_operator",
    "split_blocks",
]
