"""The operators' contract: documentation, checks, choice of the face, fake kernel and vjp."""

from .faces import BackendUnavailableError, available
from .fourier import fourier_adjoint, fourier_forward, fourier_gradient, fourier_red_update
from .radon import radon_adjoint, radon_backproject, radon_forward, radon_gradient, radon_red_update
from .red_update import RedUpdate, red_update

__all__ = [
    "BackendUnavailableError",
    "RedUpdate",
    "available",
    "fourier_adjoint",
    "fourier_forward",
    "fourier_gradient",
    "fourier_red_update",
    "radon_adjoint",
    "radon_backproject",
    "radon_forward",
    "radon_gradient",
    "radon_red_update",
    "red_update",
]
