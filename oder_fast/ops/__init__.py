"""The operators' contract: documentation, checks, choice of the face, fake kernel and vjp."""

from .diffraction import (
    Optics,
    diffraction_adjoint,
    diffraction_forward,
    diffraction_gradient,
    diffraction_gram,
    diffraction_gram_red_update,
    diffraction_red_update,
    gram_matrices,
    gram_shape,
    normal_matrices,
    transfer_at,
)
from .faces import BackendUnavailableError, available
from .fourier import fourier_adjoint, fourier_forward, fourier_gradient, fourier_red_update
from .group_norm_prelu import group_norm_prelu
from .radon import radon_adjoint, radon_backproject, radon_forward, radon_gradient, radon_red_update
from .red_update import RedUpdate, red_update

__all__ = [
    "BackendUnavailableError",
    "Optics",
    "RedUpdate",
    "available",
    "diffraction_adjoint",
    "diffraction_forward",
    "diffraction_gradient",
    "diffraction_gram",
    "diffraction_gram_red_update",
    "diffraction_red_update",
    "fourier_adjoint",
    "fourier_forward",
    "fourier_gradient",
    "fourier_red_update",
    "gram_matrices",
    "gram_shape",
    "group_norm_prelu",
    "normal_matrices",
    "radon_adjoint",
    "radon_backproject",
    "radon_forward",
    "radon_gradient",
    "radon_red_update",
    "red_update",
    "transfer_at",
]
