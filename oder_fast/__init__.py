"""Fast fixed points of regularization by denoising, and training of the denoiser through them."""

from .ops import (
    BackendUnavailableError,
    RedUpdate,
    radon_adjoint,
    radon_backproject,
    radon_forward,
    radon_gradient,
    radon_red_update,
    red_update,
)

__all__ = [
    "BackendUnavailableError",
    "RedUpdate",
    "radon_adjoint",
    "radon_backproject",
    "radon_forward",
    "radon_gradient",
    "radon_red_update",
    "red_update",
]
