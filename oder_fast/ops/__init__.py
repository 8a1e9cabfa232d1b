"""The operators' contract: documentation, checks, choice of the backend, fake kernel and vjp."""

from ..reference.radon import Detector
from .backends import BackendUnavailableError, available
from .diffraction import (
    Optics,
    diffraction_adjoint,
    diffraction_forward,
    diffraction_gradient,
    diffraction_gram,
)
from .fourier import fourier_adjoint, fourier_forward, fourier_gradient
from .radon import radon_adjoint, radon_backproject, radon_forward, radon_gradient
from .red_update import RedUpdate, red_update

__all__ = [
    "BackendUnavailableError",
    "Detector",
    "Optics",
    "RedUpdate",
    "available",
    "diffraction_adjoint",
    "diffraction_forward",
    "diffraction_gradient",
    "diffraction_gram",
    "fourier_adjoint",
    "fourier_forward",
    "fourier_gradient",
    "radon_adjoint",
    "radon_backproject",
    "radon_forward",
    "radon_gradient",
    "red_update",
]
